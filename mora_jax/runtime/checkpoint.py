"""Checkpoints that survive: orbax for the arrays, a manifest of SHA-256 sums written last, restore newest first.

A checkpoint is a folder `checkpoints/<global step>-<phase>` with `arrays/` (orbax), `meta.json` and `MANIFEST.json`.
What is found out after it and changes no arrays, entries of a row of R, goes into `row.json` in the workdir meanwhile.
Orbax notices a missing file but restores a flipped byte silently; the manifest does not. A folder without a manifest
was never finished and counts as absent.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from mora_jax import errors
from mora_jax.errors import MoraError
from mora_jax.runtime import hosts, storage
from mora_jax.runtime.writers import write_json

MANIFEST = "MANIFEST.json"
ROW = "row.json"


def _name(step: int, task: int, phase: str) -> str:
    """Sorts by time: a task is first trained (several checkpoints), then frozen, then evaluated."""
    order = {"training": 0, "trained": 1, "evaluated": 2}[phase]
    return f"{step:08d}-{task + 1:03d}-{order}-{phase}"


def _sums(folder: Path) -> dict[str, str]:
    files = sorted(p for p in storage.files_below(folder) if p.name != MANIFEST)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _damage(folder: Path) -> str | None:
    """What is wrong with a finished checkpoint, or None."""
    try:
        expected = json.loads((folder / MANIFEST).read_text())
    except ValueError:
        return f"{MANIFEST} is not JSON"
    found = _sums(folder)
    for name, total in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != total:
            return f"{name} does not have its SHA-256 sum"
    return None


def _check_space(folder: Path, arrays: Any) -> None:
    """Raises OSError while there is still nothing to clean up; orbax's threads would each print a traceback."""
    need = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)) * 5 // 4 + (1 << 16)  # orbax adds its own files
    free = storage.free_bytes(folder)
    if free < need:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {free} bytes are free, about {need} are needed")


class Checkpoints:
    """The checkpoints of one workdir. `keep` bounds those taken inside a task; one per finished task stays."""

    def __init__(self, workdir: Path, keep: int):
        self.folder = workdir / "checkpoints"
        self.keep = keep
        self.newest: str | None = None  # saved or restored
        self._orbax = ocp.StandardCheckpointer()
        absl.logging.set_verbosity(absl.logging.FATAL)  # a failed save is told in one line, below; orbax logs pages

    def finished(self) -> list[Path]:
        """Folders with a manifest, newest first."""
        return sorted((p.parent for p in self.folder.glob(f"*/{MANIFEST}")), reverse=True)

    def save(self, arrays: Any, meta: dict[str, Any]) -> Path:
        """Writes a checkpoint; `meta` holds at least step (global), task and phase.

        Raises MoraError if it cannot; where another process is lost, what JAX says of that.
        """
        folder = self.folder / _name(meta["step"], meta["task"], meta["phase"])
        try:
            if hosts.first():
                if folder.exists():
                    self._remove(folder)
                folder.mkdir(parents=True)
                _check_space(folder, arrays)
            # Every process writes the shards that it holds.
            self._orbax.save(storage.absolute(folder) / "arrays", arrays)
            self._orbax.wait_until_finished()
            hosts.wait()
            if hosts.first():
                write_json(folder / "meta.json", meta)
                write_json(folder / MANIFEST, _sums(folder))
        except Exception as problem:  # orbax and tensorstore have no common error for a full or read-only disk
            with contextlib.suppress(OSError):
                storage.remove_folder(folder)
            if hosts.several() and isinstance(problem, jax.errors.JaxRuntimeError):
                raise
            reason = str(problem).strip()[-200:]  # what the operating system said stands last
            raise MoraError(
                f"cannot write checkpoint {folder}: {reason}; earlier checkpoints are untouched",
                errors.code_of(problem),
            ) from problem
        self.newest = folder.name
        if hosts.first():
            self._thin(meta)
            self._row.unlink(missing_ok=True)
        return folder

    def note(self, run: str, row: Any) -> None:
        """Keeps a JSON value beside the newest checkpoint of `run`, or where it has none yet, until the next save."""
        write_json(self._row, {"row": row, "sum": self._row_sum(run, row)})

    def noted(self, run: str) -> Any:
        """What `note` kept beside the checkpoint that was restored, the same on all processes; None without.

        What belongs to another checkpoint or run, or is damaged, is passed over.
        """
        found = None
        with hosts.together():
            if hosts.first():
                with contextlib.suppress(FileNotFoundError, ValueError):
                    found = json.loads(self._row.read_text())
        found = hosts.gathered(found)[0]
        intact = isinstance(found, dict) and found.get("sum") == self._row_sum(run, found.get("row"))
        return found["row"] if intact else None

    @property
    def _row(self) -> Path:
        return self.folder.parent / ROW

    def _row_sum(self, run: str, row: Any) -> str:
        return hashlib.sha256(json.dumps([self.newest, run, row], sort_keys=True).encode()).hexdigest()

    def restore(self, target: Callable[[dict[str, Any]], Any]) -> tuple[dict[str, Any], Any] | None:
        """(meta, arrays) of the newest intact checkpoint, or None if there is none; `target(meta)` gives shapes.

        Damaged ones are named on stderr and passed over. Raises MoraError if all that exist are damaged.
        """
        newest = None
        with hosts.together():
            if hosts.first():
                for folder in self.folder.iterdir() if self.folder.is_dir() else ():
                    if folder.is_dir() and not (folder / MANIFEST).exists():  # a save or removal that was cut short
                        storage.remove_folder(folder)
                newest = self._newest_intact(lambda task, phase: True)
        found = hosts.gathered(newest and (newest[0].name, newest[1]))[0]
        if found is None:
            return None
        name, meta = found
        self.newest = name
        return meta, self._orbax.restore(storage.absolute(self.folder / name) / "arrays", target(meta))

    def read(self, wanted: Callable[[int, str], bool] = lambda task, phase: True) -> tuple[dict[str, Any], Any] | None:
        """(meta, numpy arrays) of the newest intact checkpoint with `wanted(task, phase)`, task from 0; None without.

        Changes nothing on the disk, so the workdir may belong to a run that goes on. Errors as for `restore`.
        """
        found = self._newest_intact(wanted)
        if found is None:
            return None
        folder, meta = found
        with ocp.PyTreeCheckpointer() as reader:
            path = storage.absolute(folder) / "arrays"
            described = reader.metadata(path).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), described)
            return meta, reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))

    def _newest_intact(self, wanted: Callable[[int, str], bool]) -> tuple[Path, dict[str, Any]] | None:
        damaged = []
        for folder in self.finished():
            _, task, _, phase = folder.name.split("-")
            if not wanted(int(task) - 1, phase):
                continue
            try:
                damage = _damage(folder)
            except FileNotFoundError:
                if folder.exists():
                    raise
                continue  # removed meanwhile by the run that owns this workdir, which has saved a newer one
            if damage is None:
                return folder, json.loads((folder / "meta.json").read_text())
            print(f"checkpoint {folder.name} is damaged and passed over: {damage}", file=sys.stderr, flush=True)
            damaged.append(f"{folder.name}: {damage}")
        if damaged:
            raise MoraError(
                f"every checkpoint in {self.folder} is damaged ({', '.join(damaged)}); use another --workdir"
            )
        return None

    def _thin(self, meta: dict[str, Any]) -> None:
        saved = _name(meta["step"], meta["task"], meta["phase"])
        # Later ones are damaged and were passed over by the restore: they must not crowd out what is intact.
        finished = [p for p in self.finished() if p.name <= saved]
        drop = [p for p in finished if p.name.endswith("-training")][self.keep :]
        if meta["phase"] == "evaluated":  # holds all that the one before the evaluation held
            drop += [p for p in finished if p.name == _name(meta["step"], meta["task"], "trained")]
        for folder in drop:
            self._remove(folder)

    @staticmethod
    def _remove(folder: Path) -> None:
        (folder / MANIFEST).unlink(missing_ok=True)  # first, so that a kill in between leaves no half with a manifest
        storage.remove_folder(folder)
