"""Workdirs that are damaged or belong to another experiment: what is named, passed over, refused or continued."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from interruptions import (
    World,
    assert_one_error,
    assert_same_end,
    checkpoints,
    ended,
    rows,
    sums,
)
from launching import results

from mora_jax import config as configs
from mora_jax.benchmarks.stream import Task
from mora_jax.errors import MoraError
from mora_jax.runtime.checkpoint import MANIFEST, Checkpoints

# --- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def largest_array(folder: Path) -> Path:
    return max((path for path in folder.glob("arrays/**/d/*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGES: Mapping[str, tuple[Callable[[Path], None], Callable[[Path], Path], str]] = {
    "a flipped byte": (flip, largest_array, "does not have its SHA-256 sum"),
    "a truncated file": (truncate, largest_array, "does not have its SHA-256 sum"),
    "a deleted file": (Path.unlink, largest_array, "is missing"),
    "flipped meta": (flip, lambda folder: folder / "meta.json", "meta.json does not have its SHA-256 sum"),
    "deleted meta": (Path.unlink, lambda folder: folder / "meta.json", "meta.json is missing"),
    "deleted arrays": (shutil.rmtree, lambda folder: folder / "arrays", "is missing"),
    "truncated manifest": (truncate, lambda folder: folder / MANIFEST, ""),
    "empty manifest": (lambda path: path.write_text(""), lambda folder: folder / MANIFEST, "MANIFEST.json is not JSON"),
    "binary manifest": (lambda path: path.write_bytes(b"\xff"), lambda f: f / MANIFEST, "MANIFEST.json is not JSON"),
    "deleted manifest": (Path.unlink, lambda folder: folder / MANIFEST, ""),
}


class Chosen(Exception):
    """Raised in place of reading arrays: the checkpoint that a restore settled for."""


def chosen(workdir: Path) -> str:
    def target(found: dict[str, Any]) -> None:
        raise Chosen(f"{found['step']:08d}-{found['task'] + 1:03d}")

    with pytest.raises(Chosen) as caught:
        Checkpoints(workdir, 2).restore(target)
    return str(caught.value)


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_newest_is_named_and_passed_over(
    kind: str, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = shutil.copytree(stopped, tmp_path / "w")
    *_, before, newest = checkpoints(workdir)
    damage, what, words = DAMAGES[kind]
    damage(what(workdir / "checkpoints" / newest))
    if kind == "truncated manifest":  # the last byte is a newline: nothing is lost
        assert newest.startswith(chosen(workdir))
        return
    assert before.startswith(chosen(workdir))
    said = capsys.readouterr().err
    if kind == "deleted manifest":  # the same as a checkpoint that was never finished
        assert said == ""
        return
    assert newest in said
    assert words in said
    if "file" in kind or "byte" in kind:
        assert "arrays/" in said


def test_intact_checkpoint_is_taken_silently(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoints(stopped)[-1].startswith(chosen(stopped))
    assert capsys.readouterr().err == ""


def test_damaged_run_ends_like_the_reference(world: World, stopped: Path, reference: Path) -> None:
    """Four kinds of damage at once, and what a kill in the midst of writing leaves behind."""
    workdir = world.copy(stopped, "damaged")
    third, second, first, newest = (workdir / "checkpoints" / name for name in checkpoints(workdir)[-4:])
    flip(largest_array(newest))
    truncate(largest_array(first))
    largest_array(second).unlink()
    (third / MANIFEST).unlink()
    (third / f".{MANIFEST}.part").write_text('{"meta.json": "12')
    (third / "arrays.orbax-checkpoint-tmp").mkdir()
    (workdir / ".results.json.part").write_text("{")
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 29, "loss": 1.5, "ta')
    run = world.run(workdir)
    assert run.code == 0
    said = run.err.splitlines()
    assert len(said) == 3
    for line, folder, words in zip(said, (newest, first, second), ("SHA-256", "SHA-256", "missing"), strict=True):
        assert folder.name in line
        assert words in line
    assert "at step 0: zero-shot" in run.out
    assert_same_end(workdir, reference)


def test_all_checkpoints_damaged_is_an_error(world: World, stopped: Path) -> None:
    workdir = world.copy(stopped, "hopeless")
    names = checkpoints(workdir)
    for name in names:
        flip(largest_array(workdir / "checkpoints" / name))
    before = sums(workdir)
    run = world.run(workdir)
    assert_one_error(run, "every checkpoint", "damaged", *names)
    assert len(run.err.splitlines()) == len(names) + 1
    assert sums(workdir) == before


def test_a_new_checkpoint_outlives_damaged_later_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After falling back, what is saved on the way must not be thinned away in favour of damaged checkpoints."""
    held = Checkpoints(tmp_path, keep=2)

    def save(step: int) -> Path:
        return held.save({"x": np.full(4, step)}, {"step": step, "task": 0, "phase": "training"})

    for step in (6, 9):
        flip(save(step) / "meta.json")
    assert save(3).name in checkpoints(tmp_path)
    assert chosen(tmp_path) == "00000003-001"
    assert capsys.readouterr().err.count("damaged") == 2


# --- other configs in the same workdir --------------------------------------------------------------------------------


def other_data(world: World) -> Path:
    data = world.folder / "other"
    if not data.exists():
        shutil.copytree(world.data, data)
        file = data / "digits" / "train.json"
        file.write_text(file.read_text().replace("one", "uno", 1))
    return data


REFUSALS: Mapping[str, tuple[Callable[[World], dict[str, object]], tuple[str, ...]]] = {
    "hyper-parameters": (
        lambda world: {"train.learning_rate": 0.01, "method.top_k": 4, "eval.max_new_tokens": 7},
        ("train.learning_rate: 0.05 -> 0.01", "method.top_k: 8 -> 4", "eval.max_new_tokens: 8 -> 7"),
    ),
    "data": (lambda world: {"benchmark.root": other_data(world)}, ("task 1 data: ",)),
    "order": (
        lambda world: {"benchmark.tasks": "digits,colours,yesno"},
        ("task 0 task: 'colours' -> 'digits'", "task 0 data: ", "task 1 task: 'digits' -> 'colours'", "task 1 data: "),
    ),
    "fewer tasks": (lambda world: {"benchmark.tasks": "colours"}, ("benchmark.tasks no longer holds digits, yesno",)),
    "steps": (lambda world: {"train.steps_per_task": "12,10,12"}, ("task 1 steps: 12 -> 10",)),
}


@pytest.mark.parametrize("change", REFUSALS)
def test_changed_experiment_is_refused_and_nothing_overwritten(change: str, world: World, reference: Path) -> None:
    before = sums(reference)
    options, words = REFUSALS[change]
    run = ended(world.popen(world.command(reference, options(world))))
    assert_one_error(run, f"--workdir={reference} holds another experiment", *words)
    assert run.err.count("\n") == 1
    named = run.err.partition("use another --workdir. ")[2].split("; ")
    assert len(named) == len(words), "only what differs is named"
    assert sums(reference) == before


def test_settings_of_execution_may_change(world: World, stopped: Path, reference: Path) -> None:
    workdir = world.copy(stopped, "executed")
    options = {"checkpoint__every_steps": 5, "checkpoint__keep": 1, "eval__batch_size": 6, "log__every_steps": 7}
    run = world.run(workdir, **options, log__tensorboard="true")
    assert run.code == 0, run.err
    assert "at step 0: " not in run.out
    assert_same_end(workdir, reference, besides=["config", "gates"])
    for row, expected in zip(results(workdir)["gates"], results(reference)["gates"], strict=True):
        assert row["mass"] == pytest.approx(expected["mass"], abs=1e-5)  # summed in batches of another size
    assert list((workdir / "tensorboard").iterdir())


def test_other_bank_bucket_is_restored_or_refused(world: World, stopped: Path, reference: Path) -> None:
    """`method.capacity_bucket` changes the shape of what a checkpoint holds."""
    workdir = world.copy(stopped, "bucket")
    run = world.run(workdir, method__capacity_bucket=24)
    if run.code:
        assert_one_error(run, "method.capacity_bucket: 32 -> 24")
        return
    losses = [[row["loss"] for row in rows(where)] for where in (workdir, reference)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_more_tasks_continue_a_finished_stream(world: World, reference: Path) -> None:
    workdir = world.folder / "appended"
    assert world.run(workdir, benchmark__tasks="colours,digits").code == 0
    first = results(workdir)
    assert first["complete"] is True
    assert first["R"] == [row[:2] for row in results(reference)["R"][:2]]
    kept = {name: sums(workdir / "checkpoints" / name) for name in checkpoints(workdir) if "evaluated" in name}
    run = world.run(workdir, benchmark__tasks="colours,digits,yesno")
    assert run.code == 0, run.err
    assert "at step 24: task 2 (digits), evaluated" in run.out
    assert_same_end(workdir, reference, besides=["config"])
    assert {name: sums(workdir / "checkpoints" / name) for name in kept} == kept


def test_another_version_of_the_code_is_told_before_its_digests() -> None:
    old = [{"task": "colours", "data": "a", "steps": 0, "epochs": 1}]
    new = [{"task": "colours", "data": "b", "steps": 0, "epochs": 1, "made": 2}]
    with pytest.raises(MoraError, match=r"another version of mora_jax, which made other batches .* of task colours"):
        configs.stream_differences(old, new)
    assert configs.stream_differences(new, new) == []
    by_steps = [{"task": "colours", "data": "a", "steps": 3, "epochs": 0}]
    assert "task 0 epochs: 1 -> 0" in configs.stream_differences(new, by_steps)
    assert configs.stream_differences(by_steps, []) == ["benchmark.tasks no longer holds colours"]
    assert [Task("a", "choice", {}).made(epochs) for epochs in (0, 1)] == [1, 2]


def test_fingerprint_leaves_out_execution_only() -> None:
    """What may change in a workdir is listed here once more, so that a new key has to be decided about."""
    config = configs.load(f"{ROOT}/configs/llm_cl.py:smoke", {})
    left_out = set(configs.flatten(config)) - set(configs.fingerprint(config, "weights"))
    assert left_out - {"method.capacity_bucket"} == {
        *("mesh.data", "mesh.fsdp", "mesh.model", "checkpoint.every_steps", "checkpoint.keep", "kernel"),
        *("log.every_steps", "log.tensorboard", "eval.batch_size", "model.remat", "model.weights"),
        *("benchmark.root", "benchmark.tasks", "benchmark.metrics", "benchmark.train_limit", "benchmark.eval_limit"),
        *("train.steps_per_task", "train.epochs_per_task", "train.accumulate"),
    }


@pytest.mark.slow
def test_number_of_devices_may_change(world: World, stopped: Path, reference: Path) -> None:
    """Sums over a batch are then taken in another order, so that only the first steps can be compared closely."""
    workdir = world.copy(stopped, "devices")
    flags = "--xla_force_host_platform_device_count=4"
    run = ended(world.popen(world.command(workdir, {}), XLA_FLAGS=flags))
    assert (run.code, run.err) == (0, "")
    assert results(workdir)["device"].startswith("cpu cpu x 4")
    assert results(workdir)["R"][:2] == results(reference)["R"][:2]
    losses = [[row["loss"] for row in rows(where)] for where in (workdir, reference)]
    np.testing.assert_allclose(*losses, rtol=1e-2)
