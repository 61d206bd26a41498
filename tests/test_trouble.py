"""Trouble on the way of a run that began well: a loss that is not finite, long prompts, disks."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from launching import Ended, assert_refused, results

from mora_jax import errors
from mora_jax.errors import MoraError
from mora_jax.runtime import hosts
from mora_jax.runtime.checkpoint import Checkpoints

# --- trouble on the way -----------------------------------------------------------------------------------------------


def test_training_that_is_not_finite_stops_at_once(
    smoke: Callable[..., list[str]], binary: Callable[..., Ended], tmp_path: Path
) -> None:
    """Nothing is saved from the bad step on; what was saved before and the rows up to it are kept."""
    run = binary(*smoke(train__learning_rate=1e30, train__steps_per_task=9, checkpoint__every_steps=4))
    assert_refused(run, "1e+30")
    where = re.search(r" is -?(nan|inf) at step (\d+) \(step \2 of task colours\)", run.err)
    assert where, run.err
    workdir = tmp_path / "w"
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["00000000-000-2-evaluated"]
    assert results(workdir)["complete"] is False
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, int(where[2])))


def test_prompts_over_the_limit_are_cut_and_counted(
    smoke: Callable[..., list[str]], main: Callable[..., Ended], data: Path, tmp_path: Path
) -> None:
    """Two in train and one in test; empty ones and empty answers are no reason to stop either."""
    for split, count in (("train", 2), ("test", 1)):
        path = data / "digits" / f"{split}.json"
        records = json.loads(path.read_text())
        for record in records[:count]:
            record["prompt"] = "a very long prompt " * 300
        records[3] = {"prompt": "", "answer": ""}
        path.write_text(json.dumps(records))
    run = main(*smoke(benchmark__tasks="digits"))
    assert run.code == 0, run
    found = results(tmp_path / "w")
    assert found["prompts_truncated"] == 3
    assert found["prompts_truncated_of"] == {"digits": {"train": 2, "test": 1}}
    assert found["prompt_tokens"] == [48]
    assert "\nprompts cut: digits to 48 tokens, 2/16 train, 1/4 test\n" in run.out
    assert found["complete"] is True
    losses = [json.loads(line)["loss"] for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("workdir", ["/proc/nowhere", "{tmp}/file", "{tmp}/file/below", "/dev/null/x"])
def test_workdir_that_cannot_be_made(
    workdir: str, smoke: Callable[..., list[str]], main: Callable[..., Ended], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("kept")
    path = Path(workdir.format(tmp=tmp_path))
    assert_refused(main(*smoke(workdir=path)), f"--workdir={path} cannot be written")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("name", ["checkpoints", "predictions", "results.json", "metrics.jsonl"])
def test_file_or_folder_in_the_way_is_named(
    name: str, smoke: Callable[..., list[str]], main: Callable[..., Ended], tmp_path: Path
) -> None:
    path = tmp_path / "w" / name
    path.parent.mkdir()
    path.mkdir() if "." in name else path.write_text("kept")
    assert_refused(main(*smoke("smoke,benchmark=folder,method=zero_shot")), name)


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (MoraError("unknown thing"), errors.REFUSED),
        (MoraError("no answer", errors.AGAIN), errors.AGAIN),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "prompts.txt"), errors.REFUSED),
        (OSError(errno.ENOSPC, "No space left on device"), errors.AGAIN),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), errors.AGAIN),
    ],
)
def test_trouble_that_may_be_over_has_another_exit_code_than_bad_input(
    problem: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(argv: Sequence[str]) -> None:
        raise problem

    assert errors.exit_code(run, []) == code
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("several", "raised"), [(False, MoraError), (True, jax.errors.JaxRuntimeError)])
def test_a_checkpoint_that_cannot_be_written_is_trouble_and_a_lost_process_is_not_hidden(
    several: bool, raised: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def lost() -> None:
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: another task died")

    monkeypatch.setattr(hosts, "several", lambda: several)
    monkeypatch.setattr(hosts, "first", lambda: True)
    monkeypatch.setattr(hosts, "wait", lost)
    with pytest.raises(raised, match="another task died") as caught:
        Checkpoints(tmp_path, 1).save({"x": np.ones(1)}, {"step": 1, "task": 0, "phase": "training"})
    assert getattr(caught.value, "code", errors.LOST) == (errors.LOST if several else errors.AGAIN)
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.fixture
def small_disk() -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system with the given options, or changes those of the one there is; skips where it cannot.

    It is not in pytest's own folder, which must stay easy to remove even if this process is killed.
    """
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    folder = Path(tempfile.mkdtemp(prefix="mora_jax-small-disk-"))

    def mount(options: str) -> Path:
        remount = "remount," if folder.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", remount + options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)
    folder.rmdir()


def test_full_disk_is_one_line_and_the_run_goes_on_with_more_room(
    smoke: Callable[..., list[str]], binary: Callable[..., Ended], small_disk: Callable[[str], Path]
) -> None:
    workdir = small_disk("size=300k") / "w"
    argv = smoke(workdir=workdir, log__every_steps=1)
    full = binary(*argv)
    assert full.code == errors.AGAIN, full
    assert re.search("No space left on device|free", full.err)
    saved = sorted(path.parent.name for path in workdir.glob("checkpoints/*/MANIFEST.json"))
    small_disk("size=8m")
    again = binary(*argv)
    assert again.code == 0, again.err
    assert not saved or f"at step {int(saved[-1][:8])}: " in again.out
    assert results(workdir)["complete"] is True
    assert_refused(full, code=errors.AGAIN)
    assert len(full.err) < 600


def test_read_only_disk_is_one_line_and_keeps_everything(
    smoke: Callable[..., list[str]], main: Callable[..., Ended], small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("size=8m")
    argv = smoke("smoke,benchmark=folder,method=zero_shot", workdir=disk / "w")
    assert main(*argv).code == 0
    before = (disk / "w" / "results.json").read_bytes()
    small_disk("ro")
    assert_refused(main(*argv), str(disk / "w"), "Read-only file system")
    assert_refused(main(*smoke(workdir=disk / "new")), "Read-only file system")
    assert (disk / "w" / "results.json").read_bytes() == before


LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
os.execv(sys.argv[1], sys.argv[1:])
"""
NO_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # whose files could not grow either


def test_file_that_cannot_grow_is_one_line(
    smoke: Callable[..., list[str]], binary: Callable[..., Ended], tmp_path: Path
) -> None:
    """The same as a full disk, without root: the operating system limits the size of a file."""
    command = [sys.executable, "-c", LIMITED, sys.executable, "-m", "mora_jax.train"]
    run = binary(*smoke("smoke,benchmark=folder,method=zero_shot"), command=command, variables=NO_CACHE)
    assert run.code == errors.AGAIN, run
    assert run.err.splitlines()[-1].startswith("error: ")
    assert "File too large" in run.err
    assert not list((tmp_path / "w").glob("checkpoints/*/MANIFEST.json"))
    assert run.err.count("\n") == 1, f"{run.err.count(chr(10))} lines on stderr"
