"""Runs that are interrupted and what they leave: shared by the tests of resuming and of damaged checkpoints.

One uninterrupted run is the reference. One more is killed, stopped and resumed five times on its way (`interrupted`),
and tests damage, change or continue copies of its workdir. Timings are exempt everywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
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
from launching import SECONDS, Ended, results

from mora_jax.runtime.checkpoint import MANIFEST

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
    *(
        "tokens_without_expert",
        "gates",
        "prompts_truncated",
        "prompts_truncated_of",
        "prompt_tokens",
        "records_skipped",
        "eval_examples",
        "task_seconds",
        "wall_seconds",
        "device",
    ),
    *("command", "complete"),
}
SUMMARY_KEYS = {
    *("overall_performance", "learned", "average", "transfer", "last"),
    *("backward_transfer", "backward_transfer_clipped", "forgetting"),
}
TIMINGS = {"step_seconds_median", "tokens_per_second", "examples_per_second", "task_seconds", "wall_seconds"}
ROW_TIMINGS = {"seconds", "tokens_per_second", "examples_per_second", "compiled"}


# --- running the binary -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class World:
    """Where the data, the workdirs and the compile cache of these runs are, and how to run the binary there."""

    folder: Path
    data: Path
    environment: Mapping[str, str]
    config: str = "configs/llm_cl.py:smoke,benchmark=folder"

    def command(self, workdir: Path, options: Mapping[str, object]) -> list[str]:
        values = {"benchmark.root": self.data, **OPTIONS, **options}
        overrides = [f"--config.{key}={value}" for key, value in values.items()]
        return [sys.executable, "-m", "mora_jax.train", f"--config={self.config}", f"--workdir={workdir}", *overrides]

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


@pytest.fixture(scope="session")
def world(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("resume")
    return World(folder, write_data(folder / "data"), environment)


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def stopped(world: World, interrupted: dict[str, Stage]) -> Path:
    """The workdir of a run that was stopped in the midst of task 3; copy it before use."""
    return world.folder / "stopped"
