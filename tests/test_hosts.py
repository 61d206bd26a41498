"""Several real processes as one run: they agree and train what one process trains."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from interruptions import arrays, checkpoints, rows, wait_for
from launching import BINARY, CONFIG, Ended, results, write_task
from processes import address, all_ended, of_pair, said, start

from mora_jax.errors import MoraError
from mora_jax.runtime.checkpoint import Checkpoints
from mora_jax.runtime.distributed import AXES, abstract, make_mesh

STEPS, STOP_AT = 20, 4
SAME_STEPS = {
    "train.steps_per_task": STEPS,
    "train.batch_size": 8,
    "train.learning_rate": 0.02,
    "eval.batch_size": 8,
    "benchmark.train_limit": 0,
    "benchmark.eval_limit": 0,
    "checkpoint.every_steps": 2,
    "log.every_steps": 1,
}


# ---------------------------------------------------------------- the train binary


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    write_task(folder / "data" / "colours", ("red", "blue", "green"), train_count=48, test_count=20)
    write_task(folder / "other" / "colours", ("red", "blue"), train_count=48, test_count=20)
    return folder


def command(folder: Path, workdir: str, method: str = "inc_lora", **options: object) -> list[str]:
    values = {"benchmark.root": folder / "data", **SAME_STEPS}
    values |= {key.replace("__", "."): value for key, value in options.items()}
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    config = f"--config={CONFIG}:smoke,benchmark=folder,method={method}"
    return [*BINARY, config, f"--workdir={folder / workdir}", *overrides]


@pytest.mark.parametrize(
    ("option", "value", "parts"),
    [
        ("train__learning_rate", 0.5, ("processes 0", "and 1", "train.learning_rate: 0.02 and 0.5")),
        pytest.param("benchmark__root", "other", ("data of task colours",), marks=pytest.mark.slow),
    ],
)
def test_hosts_that_were_started_differently_are_refused(option, value, parts, folder, environment):
    place = address()
    value = folder / value if value == "other" else value
    commands = [command(folder, "differing"), command(folder, "differing", **{option: value})]
    pair = [start([*words, *of_pair(i, place)], environment) for i, words in enumerate(commands)]
    for run in all_ended(pair):
        assert run.code == 2, run
        assert run.err.count("\n") == 1, run.err
        for part in parts:
            assert part in run.err
    assert not list((folder / "differing").glob("*.json*"))


@pytest.fixture(scope="module")
def one_device(folder: Path, environment: dict[str, str]) -> Path:
    (run,) = all_ended([start(command(folder, "one"), environment)])
    assert run.code == 0, run.err
    return folder / "one"


@pytest.fixture(scope="module")
def stopped(folder: Path, environment: dict[str, str]) -> Iterator[tuple[Path, list[Ended]]]:
    """Two processes with four devices each, of which the second one was asked to stop while they trained."""
    place, workdir = address(), folder / "pair"
    pair = [start([*command(folder, "pair"), *of_pair(i, place)], environment, 4) for i in range(2)]
    wait_for(pair[0], lambda: len(rows(workdir)) >= STOP_AT)
    pair[1].send_signal(signal.SIGTERM)
    return workdir, all_ended(pair)


def test_a_signal_to_one_process_saves_on_all(stopped):
    workdir, runs = stopped
    assert [run.code for run in runs] == [0, 0], runs
    assert "stopped as asked; the same command resumes" in runs[0].out
    assert said(runs[1]) == []
    assert runs[0].err == ""
    assert all("SIGTERM caught" in line for line in runs[1].err.splitlines())  # as the preemption service tells it
    newest = checkpoints(workdir)[-1]
    assert newest.endswith("-training")
    assert STOP_AT <= int(newest.split("-")[0]) == len(rows(workdir)) < STEPS


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 2, 2)])
def test_a_checkpoint_of_two_processes_has_the_same_bits_on_another_mesh(sizes, stopped, tmp_path):
    workdir = Path(shutil.copytree(stopped[0], tmp_path / "copy"))
    newest = checkpoints(workdir)[-1]
    held = arrays(workdir, newest)
    with ocp.PyTreeCheckpointer() as reader:
        described = reader.metadata(workdir / "checkpoints" / newest / "arrays").item_metadata.tree
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), described)
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()[: int(np.prod(sizes))])
    _, restored = Checkpoints(workdir, keep=1).restore(lambda meta: abstract(mesh, shapes))
    leaves, _ = jax.tree_util.tree_flatten_with_path(restored)
    assert len(leaves) == len(held)
    for path, leaf in leaves:
        assert leaf.sharding.mesh == mesh
        expected = held[jax.tree_util.keystr(path, simple=True, separator="/")]
        assert np.asarray(leaf).tobytes() == expected.tobytes(), path


def test_a_checkpoint_without_one_of_its_shards_is_refused_in_one_line(stopped, tmp_path):
    workdir = Path(shutil.copytree(stopped[0], tmp_path / "copy"))
    *earlier, newest = checkpoints(workdir)
    for name in earlier:
        shutil.rmtree(workdir / "checkpoints" / name)
    of_second = [
        path for path in (workdir / "checkpoints" / newest).rglob("*") if path.is_file() and "process_1" in str(path)
    ]
    max(of_second, key=lambda path: path.stat().st_size).unlink()
    with pytest.raises(MoraError, match=f"damaged .*{newest}: .*process_1.* is missing"):
        Checkpoints(workdir, keep=1).restore(lambda meta: {})


def test_eight_devices_go_on_where_two_processes_stopped_as_one_device_would(stopped, one_device, folder, environment):
    workdir = stopped[0]
    (run,) = all_ended([start(command(folder, "pair"), environment, 8)])
    assert run.code == 0, run.err
    assert "resumed from" in run.out
    assert_same_stream(workdir, one_device, 1e-5, 1e-5)


@pytest.mark.slow
def test_two_processes_evaluate_what_was_taught_as_one_does(one_device, tmp_path, environment):
    place, outputs = address(), [tmp_path / "pair.json", tmp_path / "one.json"]
    binary = [sys.executable, "-m", "mora_jax.evaluate", f"--workdir={one_device}"]
    pair = [start([*binary, f"--output={outputs[0]}", *of_pair(i, place)], environment, 4) for i in range(2)]
    for run in all_ended([*pair, start([*binary, f"--output={outputs[1]}"], environment)]):
        assert run.code == 0, run.err
    found, expected = (json.loads(path.read_text())["rows"] for path in outputs)
    assert found == expected


def losses(workdir: Path) -> np.ndarray:
    found = rows(workdir)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    return np.array([row["loss"] for row in found])


def answers(workdir: Path) -> list[str]:
    files = sorted((workdir / "predictions").glob("*/*.jsonl"))
    assert len(files) == 2
    return [json.loads(line)["prediction"] for file in files for line in file.read_text().splitlines()]


def assert_same_stream(workdir: Path, expected: Path, first: float, later: float) -> None:
    """Losses agree, relative to their size, and at most one prediction in a hundred differs."""
    found, reference = losses(workdir), losses(expected)
    assert reference[-1] < 0.7 * reference[0], "without learning nothing is shown"
    np.testing.assert_allclose(found[0], reference[0], rtol=first)
    np.testing.assert_allclose(found, reference, rtol=later)
    pairs = list(zip(answers(workdir), answers(expected), strict=True))
    assert len(pairs) == 40
    assert sum(a != b for a, b in pairs) <= 0.01 * len(pairs)
    assert len({b for _, b in pairs}) > 1


# ---------------------------------------------------------------- every mesh, two methods


def selections(workdir: Path) -> set[tuple[Any, ...]]:
    """(site, token, expert) of every active expert in the run's gate maps."""
    (file,) = (workdir / "gates").glob("*.jsonl")
    maps = [json.loads(line) for line in file.read_text().splitlines()]
    return {(m["task"], site, *entry[:2]) for m in maps for site, entries in m["sites"].items() for entry in entries}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["inc_lora", "mora"])
def test_all_meshes_and_processes_train_alike(method, folder, environment, record_property):
    reference = folder / f"{method}-1"
    # A hard top-k amplifies rounding with every step, and large steps amplify it sooner.
    rate = {"train__learning_rate": 0.005} if method == "mora" else {}
    (run,) = all_ended([start(command(folder, reference.name, method, **rate), environment)])
    assert run.code == 0, run.err
    meshes = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2)}
    workdirs = []
    for name, sizes in meshes.items():
        mesh = {f"mesh__{axis}": size for axis, size in zip(AXES, sizes, strict=True)} | rate
        workdirs.append(folder / f"{method}-{name}")
        (run,) = all_ended([start(command(folder, workdirs[-1].name, method, **mesh), environment, 8)])
        assert run.code == 0, run.err
    place = address()
    workdirs.append(folder / f"{method}-pair")
    words = command(folder, workdirs[-1].name, method, mesh__data=2, mesh__fsdp=2, mesh__model=2, **rate)
    for run in all_ended([start([*words, *of_pair(i, place)], environment, 4) for i in range(2)]):
        assert run.code == 0, run.err
    for workdir in workdirs:
        assert_same_stream(workdir, reference, 1e-5, 1e-5 if method == "inc_lora" else 1e-3)
        apart = np.abs(losses(workdir) / losses(reference) - 1)
        record_property(f"{workdir.name}: relative difference of the first loss", f"{apart[0]:.1e}")
        record_property(f"{workdir.name}: largest of 20 losses", f"{apart.max():.1e}")
        assert results(workdir)["train_traces"] == 1
        if method == "mora":
            found, expected = selections(workdir), selections(reference)
            share = len(found ^ expected) / len(found | expected)
            record_property(f"{workdir.name}: percent of selections that differ", f"{100 * share:.4f}")
            assert share < 0.01
