"""Where a run's files lie: a folder of this machine, or a bucket under gs://BUCKET/DIR, reached through etils' epath.

The rest of the code has one path type for both. What a bucket does not have stands here: it has no folders, nothing can
be appended to, it does not tell its free space, and it has no locks.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from mora_jax import errors
from mora_jax.errors import MoraError
from mora_jax.runtime import hosts

BUCKET = "gs://"
LOCK = ".lock"
LEASE = 60.0  # seconds after which a lock that its owner has not renewed counts as abandoned
RENEWALS = 3  # of a lock in that time


def at(text: str | Path) -> Path:
    """The path that a command line names. Raises MoraError for a URL other than gs://, and without what reads those."""
    text = str(text)
    if "://" not in text:
        return Path(text)
    if not text.startswith(BUCKET):
        raise MoraError(f"{text} is of an unknown kind; legal: a folder, or gs://BUCKET/DIR")
    try:
        import fsspec  # which comes with gcsfs

        fsspec.get_filesystem_class("gs")
    except ImportError:
        raise MoraError(f"{text} needs gcsfs: python -m pip install -r requirements-gs.txt") from None
    return epath.Path(text)


def is_remote(path: Path) -> bool:
    """Whether it is in a bucket."""
    return str(path).startswith(BUCKET)


def absolute(path: Path) -> Path:
    """The same place whatever the current folder is."""
    return path if is_remote(path) else path.resolve()


def files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and in those inside it."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from files_below(path)
        else:
            yield path


def remove_folder(folder: Path) -> None:
    """Removes a folder with all that is in it."""
    folder.rmtree() if is_remote(folder) else shutil.rmtree(folder)


def free_bytes(folder: Path) -> float:
    """Bytes that still fit; a bucket has no end."""
    return float("inf") if is_remote(folder) else shutil.disk_usage(folder).free


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, as a bucket does by itself; of several processes the first one does."""
    if not hosts.first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        path.write_text(text)
        return
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def append_text(path: Path, text: str) -> None:
    """Adds to the end of a file, which a bucket writes anew; of several processes the first one does."""
    if not hosts.first():
        return
    if is_remote(path):
        path.write_text(path.read_text() + text)
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds a workdir for this run, by its first process; the lock goes with it, however it ends.

    Raises MoraError if it is taken.
    """
    if not hosts.first():
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise MoraError(f"--workdir={workdir} cannot be written: {problem.strerror}") from None
    with _leased(workdir) if is_remote(workdir) else _flocked(workdir):
        yield


@contextlib.contextmanager
def _flocked(workdir: Path) -> Iterator[None]:
    try:
        file = open(workdir / LOCK, "a+")  # noqa: SIM115 - open as long as the lock is held
    except OSError as problem:
        raise MoraError(f"--workdir={workdir} cannot be written: {problem.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise MoraError(f"--workdir={workdir} is in use by another run; wait for it or choose another") from None
        yield


@contextlib.contextmanager
def _leased(workdir: Path) -> Iterator[None]:
    """A lock object that its owner renews. One that does not change for LEASE seconds is of a process that is gone.

    A bucket cannot make an object only where there is none (not through epath), so two that start in the same instant
    could both take it; each therefore looks again a moment later whose it is.
    """
    lock, own = workdir / LOCK, {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
    if (found := _content(lock)) is not None:
        print(f"{lock} is of {_owner(found)}; waiting {LEASE:.0f} s to see whether it still runs", file=sys.stderr)
        time.sleep(LEASE)
        now = _content(lock)
        if now is not None and now != found:
            raise MoraError(f"--workdir={workdir} is in use by {_owner(now)}; wait for it or choose another")
    over = threading.Event()

    def renew() -> None:
        turn = 0
        while not over.wait(LEASE / RENEWALS):
            turn += 1
            try:
                now = _content(lock)
                if now is not None and own["token"] not in now:  # after a pause longer than the lease
                    print(f"error: --workdir={workdir} was taken over by {_owner(now)}; this run ends", file=sys.stderr)
                    return hosts.end(errors.AGAIN)
                write_text(lock, json.dumps(own | {"turn": turn}))
            # Clients of buckets raise errors of many kinds; the next turn tries again, and the lease lasts for several.
            except Exception as problem:
                print(f"warning: {lock} cannot be renewed ({problem}); trying again", file=sys.stderr)

    write_text(lock, json.dumps(own))
    time.sleep(min(1.0, LEASE / RENEWALS))
    if own["token"] not in (now := _content(lock) or ""):
        raise MoraError(f"--workdir={workdir} was taken at the same moment by {_owner(now)}; choose another")
    renewing = threading.Thread(target=renew, daemon=True)
    renewing.start()
    try:
        yield
    finally:
        over.set()
        renewing.join()
        if own["token"] in (_content(lock) or ""):
            lock.unlink(missing_ok=True)


def _content(lock: Path) -> str | None:
    with contextlib.suppress(FileNotFoundError):
        return lock.read_text()
    return None


def _owner(content: str) -> str:
    try:
        said = json.loads(content)
        return f"process {said['pid']} on {said['host']}"
    except (ValueError, KeyError, TypeError):
        return "another run"
