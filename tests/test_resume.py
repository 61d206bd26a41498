"""Resuming, with the real binary: however a run is interrupted, the same command ends in the same R and adapters.

One uninterrupted run is the reference. One more is killed, stopped and resumed five times on its way (`interrupted`),
and copies of its workdir are damaged, changed or continued with other configs. Timings are exempt everywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT, SEED

from mora_jax import config as configs
from mora_jax.runtime.checkpoint import MANIFEST, Checkpoints

SECONDS = 300  # most that one launch may take on a busy machine
TASKS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "colours": ("fuzzy", ("red", "blue", "dark red")),
    "digits": ("fuzzy", ("one", "two", "three")),
    "yesno": ("first_character", ("yes", "no")),
}
STEPS = 12  # per task
OPTIONS: Mapping[str, object] = {
    "benchmark.train_limit": 0,
    "benchmark.eval_limit": 0,
    "train.steps_per_task": STEPS,
    "train.learning_rate": 0.05,  # large enough that R is not all zero after 12 steps
    "eval.max_new_tokens": 8,
    "checkpoint.every_steps": 3,
    "log.every_steps": 1,  # so that the test sees how far a run is
}
# DESIGN.md section 6
RESULT_KEYS = {
    *("benchmark", "tasks", "metric", "R", "zero_shot", "baselines", "summary", "method", "model", "seed", "config"),
    *("fingerprint", "versions", "trainable_parameters", "experts_per_site", "sites", "train_traces"),
    *("step_seconds_median", "tokens_per_second", "examples_per_second", "active_experts_mean"),
    *("tokens_without_expert", "prompts_truncated", "eval_examples", "task_seconds", "wall_seconds", "device"),
    *("command", "complete"),
}
SUMMARY_KEYS = {
    *("overall_performance", "learned", "average", "transfer", "last"),
    *("backward_transfer", "backward_transfer_clipped", "forgetting"),
}
TIMINGS = {"step_seconds_median", "tokens_per_second", "examples_per_second", "task_seconds", "wall_seconds"}
ROW_TIMINGS = {"seconds", "tokens_per_second", "compiled"}


# --- running the binary -----------------------------------------------------------------------------------------------


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@dataclasses.dataclass(frozen=True)
class World:
    """Where the data, the workdirs and the compile cache of this file's runs are, and how to run the binary there."""

    folder: Path
    data: Path
    environment: Mapping[str, str]

    def command(self, workdir: Path, options: Mapping[str, object], arg: str = "smoke,benchmark=folder") -> list[str]:
        values = {"benchmark.root": self.data, **OPTIONS, **options}
        overrides = [f"--config.{key}={value}" for key, value in values.items()]
        config = f"--config=configs/llm_cl.py:{arg}"
        return [sys.executable, "-m", "mora_jax.train", config, f"--workdir={workdir}", *overrides]

    def start(self, workdir: Path, **options: object) -> subprocess.Popen[str]:
        return self.popen(self.command(workdir, dotted(options)))

    def run(self, workdir: Path, **options: object) -> Ended:
        return ended(self.start(workdir, **options))

    def crash(self, workdir: Path, writes: int) -> Ended:
        """Runs the same command, but the process kills itself at its `writes`-th change of the disk."""
        command = self.command(workdir, {})
        return ended(self.popen([sys.executable, "-c", CRASH, str(writes), *command[3:]]))

    def popen(self, command: Sequence[str], **variables: str) -> subprocess.Popen[str]:
        environment = dict(self.environment) | variables
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def copy(self, workdir: Path, name: str) -> Path:
        return Path(shutil.copytree(workdir, self.folder / name))


# Every durable change of the workdir goes through one of these three; the first lines are the binary's own main.
CRASH = """
import os, shutil, signal, sys
from mora_jax import train
left = int(sys.argv.pop(1))
def counted(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
os.replace, os.mkdir, shutil.rmtree = map(counted, (os.replace, os.mkdir, shutil.rmtree))
sys.exit(train.main())
"""


def dotted(options: Mapping[str, object]) -> dict[str, object]:
    return {key.replace("__", "."): value for key, value in options.items()}


def ended(process: subprocess.Popen[str]) -> Ended:
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return Ended(process.returncode, out, err)


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the run ended before the moment came: {process.communicate()}")
        time.sleep(0.002)


def write_data(folder: Path) -> Path:
    for task, (metric, words) in TASKS.items():
        rng = random.Random(f"{SEED} {task}")
        (folder / task).mkdir(parents=True)
        (folder / task / "task.json").write_text(json.dumps({"metric": metric}))
        for split, count in (("train", 20), ("test", 6)):
            answers = [rng.choice(words) for _ in range(count)]
            records = [{"prompt": f"{task} {i}: {word} ->", "answer": word} for i, word in enumerate(answers)]
            (folder / task / f"{split}.json").write_text(json.dumps(records))
    return folder


# --- reading a workdir ------------------------------------------------------------------------------------------------


def results(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "results.json").read_text(encoding="utf-8"))


def rows(workdir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without timings; a line that is being written is left out."""
    with contextlib.suppress(FileNotFoundError):
        lines = (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
        return [{k: v for k, v in json.loads(line).items() if k not in ROW_TIMINGS} for line in lines]
    return []


def checkpoints(workdir: Path) -> list[str]:
    """Names of the finished checkpoints, oldest first."""
    return sorted(path.parent.name for path in workdir.glob(f"checkpoints/*/{MANIFEST}"))


def arrays(workdir: Path, name: str) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path."""
    folder = workdir / "checkpoints" / name / "arrays"
    with ocp.PyTreeCheckpointer() as reader:
        described = reader.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), described)
        tree = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def meta(workdir: Path, name: str) -> dict[str, Any]:
    return json.loads((workdir / "checkpoints" / name / "meta.json").read_text())


def sums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, but for the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_same_bits(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for path, array in one.items():
        assert (array.dtype, array.shape) == (other[path].dtype, other[path].shape), path
        assert array.tobytes() == other[path].tobytes(), path


def assert_same_end(workdir: Path, reference: Path, besides: Sequence[str] = ()) -> None:
    """The same results, losses, predictions, adapters and optimiser states, each step exactly once."""
    assert [row["step"] for row in rows(workdir)] == list(range(1, STEPS * len(TASKS) + 1))
    assert rows(workdir) == rows(reference)
    exempt = TIMINGS | {"command", *besides}
    found, expected = ({k: v for k, v in results(w).items() if k not in exempt} for w in (workdir, reference))
    assert found == expected
    assert sums(workdir / "predictions") == sums(reference / "predictions")
    assert [n for n in checkpoints(workdir) if n.endswith("-evaluated")] == [
        n for n in checkpoints(reference) if n.endswith("-evaluated")
    ]
    for name in set(checkpoints(workdir)) & set(checkpoints(reference)):
        assert_same_bits(arrays(workdir, name), arrays(reference, name))


def assert_one_error(run: Ended, *parts: str) -> None:
    """Exit code 2 and, at the end of stderr, one line that holds all parts."""
    assert run.code == 2, run
    assert "Traceback" not in run.err
    *_, last = run.err.splitlines()
    assert last.startswith("error: ")
    for part in parts:
        assert part in last


# --- the runs that tests share ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "xla")}
    environment.pop("XLA_FLAGS", None)  # one device, as on a laptop
    folder = tmp_path_factory.mktemp("resume")
    return World(folder, write_data(folder / "data"), environment)


@pytest.fixture(scope="module")
def reference(world: World) -> Path:
    """A run that nothing interrupted."""
    run = world.run(world.folder / "reference")
    assert run.code == 0, run.err
    return world.folder / "reference"


class Stage(NamedTuple):
    """How one of the launches of `interrupted` ended, and what it left behind."""

    run: Ended
    rows: list[dict[str, Any]]
    results: dict[str, Any] | None
    checkpoints: list[str]


@pytest.fixture(scope="module")
def interrupted(world: World, reference: Path) -> dict[str, Stage]:
    """One workdir, the same command six times: killed in training, while a checkpoint is written and in evaluation;
    stopped in training and in evaluation; then left alone. A copy is kept as `stopped` after the first stop.

    What must not come too late is sent while the next thing to do is seconds of compiling.
    """
    workdir = world.folder / "interrupted"

    def at_rows(count: int) -> Callable[[], bool]:
        return lambda: len(rows(workdir)) >= count

    def at_file(path: str) -> Callable[[], bool]:
        return (workdir / path).exists

    def second_row_of_R() -> bool:
        return (workdir / "results.json").exists() and results(workdir)["R"][1][1] is not None

    moments: dict[str, tuple[int, Callable[[], bool]]] = {
        "killed in training": (signal.SIGKILL, at_rows(5)),
        "killed in writing": (signal.SIGKILL, at_file("checkpoints/00000018-002-0-training")),
        "killed in evaluation": (signal.SIGKILL, at_file("predictions/02_digits/colours.jsonl")),
        "stopped in training": (signal.SIGTERM, second_row_of_R),
        "stopped in evaluation": (signal.SIGINT, at_file(f"checkpoints/00000036-003-1-trained/{MANIFEST}")),
    }
    stages = {}

    def note(name: str, run: Ended) -> None:
        found = results(workdir) if (workdir / "results.json").exists() else None
        stages[name] = Stage(run, rows(workdir), found, checkpoints(workdir))

    for name, (number, happened) in moments.items():
        (workdir / "results.json").unlink(missing_ok=True)  # a resumed run writes it again
        process = world.start(workdir)
        wait_for(process, happened)
        process.send_signal(number)
        note(name, ended(process))
        if name == "stopped in training":
            world.copy(workdir, "stopped")
    note("finished", world.run(workdir))
    return stages


@pytest.fixture(scope="module")
def stopped(world: World, interrupted: dict[str, Stage]) -> Path:
    """The workdir of a run that was stopped in the midst of task 3; copy it before use."""
    return world.folder / "stopped"


# --- the reference ----------------------------------------------------------------------------------------------------


def test_results_hold_every_key(reference: Path) -> None:
    found = results(reference)
    assert found.keys() >= RESULT_KEYS
    assert found["summary"].keys() == SUMMARY_KEYS
    assert found["baselines"].keys() == {"majority", "zero_shot_lenient"}
    assert found["complete"] is True
    assert (found["benchmark"], found["model"], found["method"], found["seed"]) == ("folder", "tiny", "mora", 0)
    assert found["tasks"] == list(TASKS)
    assert found["metric"] == [metric for metric, _ in TASKS.values()]
    assert found["eval_examples"] == [6, 6, 6]
    assert found["experts_per_site"] == 24
    assert found["sites"] == 8
    assert found["train_traces"] == 1
    assert found["prompts_truncated"] == 0
    assert found["config"]["train"]["learning_rate"] == OPTIONS["train.learning_rate"]
    assert len(found["zero_shot"]) == len(found["task_seconds"]) == 3
    assert "--config=configs/llm_cl.py:smoke,benchmark=folder" in found["command"]
    for key in TIMINGS - {"task_seconds"} | {"active_experts_mean"}:
        assert found[key] > 0
    assert all(seconds > 0 for seconds in found["task_seconds"])
    assert 0 <= found["tokens_without_expert"] <= 1


def test_R_is_a_lower_triangle_that_fits_its_summary(reference: Path) -> None:
    found = results(reference)
    R = found["R"]
    for i, row in enumerate(R):
        assert all(0 <= value <= 100 for value in row[: i + 1])
        assert row[i + 1 :] == [None] * (2 - i)
    assert len({value for row in R for value in row}) > 4, "a degenerate R would prove nothing in this file"
    assert found["summary"]["overall_performance"] == pytest.approx(np.mean(R[2]), abs=1e-3)
    assert found["summary"]["learned"] == pytest.approx(np.mean([R[i][i] for i in range(3)]), abs=1e-3)
    assert found["summary"]["last"] == found["summary"]["overall_performance"]
    assert found["summary"]["transfer"] is None
    backward = np.mean([R[2][i] - R[i][i] for i in range(2)])
    assert found["summary"]["backward_transfer"] == pytest.approx(backward, abs=1e-3)


def test_predictions_are_written_and_make_up_R(reference: Path) -> None:
    found, names = results(reference), list(TASKS)
    files = {path.relative_to(reference / "predictions").as_posix() for path in reference.glob("predictions/*/*")}
    taught = {f"{i + 1:02d}_{row}/{task}.jsonl" for i, row in enumerate(names) for task in names[: i + 1]}
    assert files == taught | {f"00_zero_shot/{task}.jsonl" for task in names}
    for file in files:
        lines = [json.loads(line) for line in (reference / "predictions" / file).read_text().splitlines()]
        row, column = int(file[:2]) - 1, names.index(Path(file).stem)
        test = json.loads((reference.parent / "data" / names[column] / "test.json").read_text())
        assert [(line["prompt"], line["answer"]) for line in lines] == [(r["prompt"], r["answer"]) for r in test]
        assert all(line.keys() == {"prompt", "answer", "prediction", "score"} for line in lines)
        score = found["zero_shot"][column] if row < 0 else found["R"][row][column]
        assert 100 * np.mean([line["score"] for line in lines]) == pytest.approx(score, abs=1e-2)


def test_metrics_have_one_row_per_step(reference: Path) -> None:
    found = rows(reference)
    assert [row["step"] for row in found] == list(range(1, 37))
    assert [row["task"] for row in found] == [task for task in TASKS for _ in range(STEPS)]
    assert [row["task_step"] for row in found] == [*range(1, STEPS + 1)] * 3
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 and row["examples"] == 4 for row in found)


def test_checkpoints_hold_what_is_trained_and_nothing_else(reference: Path) -> None:
    inside = f"{3 * STEPS - 3:08d}-003-0-training"
    assert checkpoints(reference) == [
        "00000000-000-2-evaluated",
        "00000012-001-2-evaluated",
        "00000024-002-2-evaluated",
        "00000030-003-0-training",
        inside,
        "00000036-003-2-evaluated",
    ]
    held = arrays(reference, inside)
    moments = [path for path in held if "opt_state" in path]
    assert {path.split("/")[0] for path in held} == {"bank", "layout", "state"}
    assert {path.split("/")[-1] for path in held if path.startswith("bank")} == {"keys", "values", "live"}
    assert any("/mu/" in path for path in moments)
    assert any("/nu/" in path for path in moments)
    assert held["state/step"] == STEPS - 3
    assert all(array.ndim < 3 or array.shape[1] in (8, 32) for array in held.values()), "only experts, no weights"
    found = meta(reference, inside)
    assert {"step", "task", "phase", "fingerprint", "stream", "random", "progress"} <= found.keys()
    assert found["progress"]["data"] is not None
    assert found["progress"]["R"][1] == pytest.approx(results(reference)["R"][1], abs=1e-4, nan_ok=True)
    assert found["fingerprint"]["train.learning_rate"] == OPTIONS["train.learning_rate"]
    evaluated = arrays(reference, "00000036-003-2-evaluated")
    assert {path.split("/")[0] for path in evaluated} == {"bank", "layout"}
    assert all((array == 24).all() for path, array in evaluated.items() if path.endswith("live"))


def test_manifest_sums_every_file_and_is_written_last(reference: Path) -> None:
    for name in checkpoints(reference):
        folder = reference / "checkpoints" / name
        manifest = json.loads((folder / MANIFEST).read_text())
        assert manifest == {path: total for path, total in sums(folder).items() if path != MANIFEST}
        assert "meta.json" in manifest
        newest = max(path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file())
        assert (folder / MANIFEST).stat().st_mtime_ns == newest


def test_frozen_experts_never_change(reference: Path) -> None:
    """Rows that a task froze are the same bits in every later checkpoint."""
    ends = [arrays(reference, f"{STEPS * (i + 1):08d}-{i + 1:03d}-2-evaluated") for i in range(3)]
    for i, (early, late) in enumerate(itertools.pairwise(ends)):
        for path in (path for path in early if path.endswith(("keys", "values"))):
            rows_of = slice(0, 8 * (i + 1))
            assert early[path][:, rows_of].tobytes() == late[path][:, rows_of].tobytes(), path
            assert early[path][:, rows_of].any(), path


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["killed in training", "killed in writing", "killed in evaluation"])
def test_kill_leaves_a_prefix_of_the_run(name: str, interrupted: dict[str, Stage], reference: Path) -> None:
    stage = interrupted[name]
    assert stage.run.code == -signal.SIGKILL
    assert stage.rows == rows(reference)[: len(stage.rows)]
    assert stage.results is not None
    assert stage.results["complete"] is False
    assert stage.results.keys() == results(reference).keys()


@pytest.mark.parametrize("name", ["stopped in training", "stopped in evaluation"])
def test_stop_saves_and_exits_cleanly(name: str, interrupted: dict[str, Stage], reference: Path) -> None:
    stage = interrupted[name]
    assert stage.run.code == 0
    assert stage.run.err == ""
    assert "stopped as asked; the same command resumes" in stage.run.out
    assert stage.rows == rows(reference)[: len(stage.rows)]
    assert stage.results is not None
    assert stage.results["complete"] is False
    newest = stage.checkpoints[-1]
    assert int(newest.split("-")[0]) == len(stage.rows), "nothing that was done is lost"


def test_stop_in_training_is_saved_at_that_step(interrupted: dict[str, Stage]) -> None:
    newest = interrupted["stopped in training"].checkpoints[-1]
    assert newest.endswith("-003-0-training")
    assert 2 * STEPS < int(newest.split("-")[0]) < 3 * STEPS


def test_results_so_far_are_those_of_the_end(interrupted: dict[str, Stage], reference: Path) -> None:
    found, final = interrupted["stopped in training"].results, results(reference)
    assert found is not None
    assert found["complete"] is False
    assert found["zero_shot"] == final["zero_shot"]
    assert found["R"] == [final["R"][0], final["R"][1], [None] * 3]
    assert found["experts_per_site"] == 16
    first = interrupted["killed in training"].results
    assert first is not None
    assert first["R"] == [[None] * 3] * 3
    assert first["zero_shot"] == final["zero_shot"]
    assert set(first["summary"].values()) == {None}


def test_resume_says_where(interrupted: dict[str, Stage]) -> None:
    for earlier, later in itertools.pairwise(interrupted):
        step = int(interrupted[earlier].checkpoints[-1].split("-")[0])
        assert f"at step {step}: " in interrupted[later].run.out, later


def test_interrupted_run_ends_like_the_reference(world: World, interrupted: dict[str, Stage], reference: Path) -> None:
    assert interrupted["finished"].run.code == 0
    assert interrupted["finished"].run.err == ""
    assert_same_end(world.folder / "interrupted", reference)


def test_rerun_of_a_finished_run_changes_nothing(world: World, reference: Path) -> None:
    workdir = world.copy(reference, "rerun")
    before = sums(workdir)
    run = world.run(workdir)
    assert run.code == 0
    assert "steps" not in run.out, "nothing is trained"
    assert "examples" not in run.out.replace("examples a step", ""), "nothing is evaluated"
    after = sums(workdir)
    assert {path for path in before | after if before.get(path) != after.get(path)} <= {"results.json"}
    assert_same_end(workdir, reference)


def test_second_run_in_a_workdir_fails_at_once(world: World, stopped: Path) -> None:
    workdir = world.copy(stopped, "shared")
    (workdir / "results.json").unlink()
    first = world.start(workdir)
    try:
        wait_for(first, (workdir / "results.json").exists)
        first.send_signal(signal.SIGSTOP)  # it keeps the lock and cannot end before the second one has started
        before = sums(workdir)
        second = world.run(workdir)
        assert_one_error(second, f"--workdir={workdir}", "in use by another run")
        assert second.err.count("\n") == 1
        assert sums(workdir) == before
    finally:
        first.kill()
        first.communicate()


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
    assert_same_end(workdir, reference, besides=["config"])
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


def test_fingerprint_leaves_out_execution_only() -> None:
    """What may change in a workdir is listed here once more, so that a new key has to be decided about."""
    config = configs.load(f"{ROOT}/configs/llm_cl.py:smoke", {})
    left_out = set(configs.flatten(config)) - set(configs.fingerprint(config, "weights"))
    assert left_out - {"method.capacity_bucket"} == {
        *("mesh.data", "mesh.fsdp", "mesh.model", "checkpoint.every_steps", "checkpoint.keep", "kernel"),
        *("log.every_steps", "log.tensorboard", "eval.batch_size", "model.remat", "model.weights"),
        *("benchmark.root", "benchmark.tasks", "benchmark.metrics", "benchmark.train_limit", "benchmark.eval_limit"),
        *("train.steps_per_task", "train.epochs_per_task"),
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


# --- many moments -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_kill_at_a_random_moment(part: int, world: World, reference: Path) -> None:
    """The moment is drawn from the run's whole time span, imports included."""
    workdir = world.folder / f"random{part}"
    started = time.monotonic()
    timed = world.folder / "timed"
    if not timed.exists():
        assert world.run(timed).code == 0
        (timed / "span").write_text(str(time.monotonic() - started))
    span = float((timed / "span").read_text())
    moment = (part + random.Random(SEED + part).random()) / 10 * span
    process = world.start(workdir)
    time.sleep(moment)
    process.kill()
    killed = ended(process)
    assert killed.code in (0, -signal.SIGKILL)  # 0: it had ended already
    run = world.run(workdir)
    assert run.code == 0, run.err
    assert run.err == ""
    assert_same_end(workdir, reference)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_crash_again_and_again_between_two_changes_of_the_disk(seed: int, world: World, reference: Path) -> None:
    workdir = world.folder / f"crash{seed}"
    draw = random.Random(seed)
    codes = []
    while 0 not in codes:
        run = world.crash(workdir, draw.randint(1, 60))
        codes.append(run.code)
        assert run.code in (0, -signal.SIGKILL), run.err
        assert rows(workdir) == rows(reference)[: len(rows(workdir))]
        assert len(codes) < 60
    assert len(codes) > 2
    assert_same_end(workdir, reference)
