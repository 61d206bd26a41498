"""Workdirs in a bucket: a whole run over a stand-in for Google Cloud Storage, and what takes the place of a lock."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import pytest
from bucket import Files
from launching import Ended, assert_refused

from mora_jax import errors, report
from mora_jax.adapter import from_workdir
from mora_jax.errors import MoraError
from mora_jax.runtime import storage
from mora_jax.runtime.writers import read_lines


@pytest.fixture
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LEASE", 0.3)


def test_a_run_in_a_bucket_resumes_past_a_damaged_checkpoint_and_is_reported(
    bucket: str, short_leases, smoke, main: Callable[..., Ended]
):
    workdir = f"{bucket}/runs/one"
    options = {"checkpoint__every_steps": 2, "train__steps_per_task": 3, "log__every_steps": 1}
    command = smoke("smoke,benchmark=folder,method=inc_lora", workdir, benchmark__tasks="colours", **options)
    assert main(*command).code == 0
    found = storage.at(workdir)
    newest = max(p.name for p in (found / "checkpoints").iterdir())
    Files.store[f"/bucket/runs/one/checkpoints/{newest}/meta.json"].write(b"x")  # at its beginning
    run = main(*command)
    assert run.code == 0, run
    assert f"{newest} is damaged and passed over: meta.json" in run.err
    assert "resumed from gs://bucket/runs/one at step 2" in run.out
    results = json.loads((found / "results.json").read_text())
    assert results["complete"]
    assert [row["step"] for row in read_lines(found / "metrics.jsonl")] == [1, 2, 3]
    assert not (found / storage.LOCK).exists()
    assert len(from_workdir(found, None, {}).tasks) == 1
    (found / "report.html").unlink()
    assert report.main([workdir]) == 0
    assert (found / "report.html").read_text().startswith("<!DOCTYPE html>")


# ---------------------------------------------------------------- locks


def test_a_lock_that_is_renewed_refuses_and_one_that_is_not_is_taken_over(bucket: str, short_leases):
    workdir = storage.at(f"{bucket}/w")
    with storage.locked(workdir):
        refused = pytest.raises(MoraError, match=r"--workdir=gs://bucket/w is in use by process \d+ on ")
        with refused, storage.locked(workdir):
            pass
        kept = (workdir / storage.LOCK).read_text()
    storage.write_text(workdir / storage.LOCK, kept)  # as a process that was killed leaves it
    started = time.monotonic()
    with storage.locked(workdir):
        assert time.monotonic() - started >= storage.LEASE
    assert not (workdir / storage.LOCK).exists()


def test_two_that_start_at_the_same_moment_do_not_both_go_on(bucket: str, short_leases, monkeypatch):
    workdir = storage.at(f"{bucket}/w")
    other = json.dumps({"host": "there", "pid": 7, "token": "theirs"})

    def meanwhile(seconds: float) -> None:
        storage.write_text(workdir / storage.LOCK, other)

    monkeypatch.setattr(storage.time, "sleep", meanwhile)
    with pytest.raises(MoraError, match="taken at the same moment by process 7 on there"), storage.locked(workdir):
        pass
    assert (workdir / storage.LOCK).read_text() == other  # it is not ours to take away


def test_an_owner_that_slept_too_long_ends_and_leaves_the_lock_alone(bucket: str, short_leases, monkeypatch, capfd):
    workdir, codes = storage.at(f"{bucket}/w"), []
    other = json.dumps({"host": "there", "pid": 7, "token": "theirs"})
    monkeypatch.setattr(storage.hosts, "end", codes.append)
    with storage.locked(workdir):
        storage.write_text(workdir / storage.LOCK, other)
        time.sleep(3 * storage.LEASE)
    assert codes == [errors.AGAIN]
    assert (workdir / storage.LOCK).read_text() == other
    assert "was taken over by process 7 on there" in capfd.readouterr().err


def test_a_renewal_that_fails_is_tried_again(bucket: str, short_leases, monkeypatch, capfd):
    workdir, write, failures = storage.at(f"{bucket}/w"), storage.write_text, iter([ConnectionError("no route")])

    def unreliable(path: Path, text: str) -> None:
        if '"turn"' in text and (failure := next(failures, None)):
            raise failure
        write(path, text)

    monkeypatch.setattr(storage, "write_text", unreliable)
    with storage.locked(workdir):
        before = (workdir / storage.LOCK).read_text()
        time.sleep(2 * storage.LEASE)
        assert (workdir / storage.LOCK).read_text() != before
    assert "cannot be renewed (no route); trying again" in capfd.readouterr().err


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def without_gcsfs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)


@pytest.mark.parametrize(("url", "part"), [("s3://b/w", "gs://BUCKET/DIR"), ("gs://b/w", "requirements-gs.txt")])
def test_a_place_that_cannot_be_reached_is_refused(url, part, without_gcsfs, smoke, main: Callable[..., Ended]):
    assert_refused(main(*smoke(workdir=url)), url, part)


def test_tensorboard_in_a_bucket_is_refused(bucket: str, short_leases, smoke, main: Callable[..., Ended]):
    run = main(*smoke("smoke,benchmark=folder,method=zero_shot", f"{bucket}/w", log__tensorboard=True))
    assert_refused(run, "log.tensorboard=true", "gs://bucket/w")
