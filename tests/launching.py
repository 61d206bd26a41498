"""Running the train binary, in a process of its own or in this one, over small data; shared by the tests that do."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import jax
import pytest
from conftest import ROOT
from jax.experimental.compilation_cache import compilation_cache

from mora_jax import errors, train

BINARY = (sys.executable, "-m", "mora_jax.train")
SECONDS = 300  # most that one launch may take on a busy machine
CONFIG = f"{ROOT}/configs/llm_cl.py"
TASKS = {"colours": ("red", "blue"), "digits": ("one", "two", "three")}


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One device, and one compile cache for all runs of this session."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "xla")}
    environment.pop("XLA_FLAGS", None)
    return environment


@pytest.fixture
def binary(environment: dict[str, str]) -> Callable[..., Ended]:
    """Runs the real binary in a process of its own."""

    def run(
        *argv: str,
        command: Sequence[str] = BINARY,
        variables: Mapping[str, str] = MappingProxyType({}),
        seconds: int = SECONDS,
    ) -> Ended:
        done = subprocess.run(
            [*command, *argv],
            cwd=ROOT,
            env=environment | dict(variables),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def main(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ended]]:
    """Runs a binary's `main` in this process, which saves the imports."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", environment["JAX_COMPILATION_CACHE_DIR"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()  # which otherwise keeps to the folder it was first used with

    def run(*argv: str, of: ModuleType = train) -> Ended:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [of.__name__, *argv])
        return Ended(of.main(), *capfd.readouterr())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def write_task(folder: Path, words: tuple[str, ...], train_count: int = 16, test_count: int = 4) -> None:
    folder.mkdir(parents=True)
    for split, count in (("train", train_count), ("test", test_count)):
        records = [{"prompt": f"{folder.name} {i} ->", "answer": words[i % len(words)]} for i in range(count)]
        (folder / f"{split}.json").write_text(json.dumps(records))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for task, words in TASKS.items():
        write_task(tmp_path / "data" / task, words)
    return tmp_path / "data"


@pytest.fixture(scope="session")
def taught(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The workdir of a finished run of a method over two tasks, made once; large steps, so that it learns something."""
    folder = tmp_path_factory.mktemp("taught")
    for task, words in TASKS.items():
        write_task(folder / "data" / task, words)

    @functools.cache
    def run(method: str) -> Path:
        config = f"--config={CONFIG}:smoke,benchmark=folder,method={method}"
        values = {"benchmark.root": folder / "data", "benchmark.metrics": "colours=fuzzy,digits=fuzzy"}
        values |= {"train.learning_rate": 0.1, "train.steps_per_task": 10}
        options = [f"--config.{key}={value}" for key, value in values.items()]
        command = [*BINARY, config, f"--workdir={folder / method}", *options]
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=SECONDS, check=True)
        return folder / method

    return run


@pytest.fixture
def smoke(data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of a smoke run over `data`; keyword `a__b=c` becomes --config.a.b=c."""

    def arguments(arg: str = "smoke,benchmark=folder", workdir: Path = tmp_path / "w", **options: object) -> list[str]:
        values = {"benchmark.root": data} | {key.replace("__", "."): value for key, value in options.items()}
        overrides = [f"--config.{key}={value}" for key, value in values.items()]
        return [f"--config={CONFIG}:{arg}", f"--workdir={workdir}", *overrides]

    return arguments


def results(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "results.json").read_text(encoding="utf-8"))


def assert_refused(run: Ended, *parts: str, code: int = errors.REFUSED) -> None:
    """The exit code and exactly one line on stderr, which holds all parts."""
    assert run.code == code, run
    assert run.err.startswith("error: ")
    assert run.err.count("\n") == 1, run.err
    for part in parts:
        assert part in run.err
