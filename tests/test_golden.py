"""Golden numbers: the losses of three steps on a fixed stream, for every preset that trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from mora_jax.methods.presets import PRESETS

# method -> loss of each step of `llm_cl.py:smoke` on two tasks (three steps each, learning rate 1e-2), one CPU
# device, seed 0. A change here is a change of results: say why in the commit that makes it.
GOLDEN: dict[str, list[float]] = {
    "mora": [5.729722, 5.632856, 5.61585, 5.518362, 5.698391, 5.462316],
    "inc_lora": [5.729722, 5.337263, 4.921733, 5.649631, 5.53897, 5.180072],
    "seq_lora": [5.729722, 5.337263, 4.921733, 5.649631, 5.432542, 5.062624],
}


def losses(method: str, workdir: Path) -> list[float]:
    command = [sys.executable, "-m", "mora_jax.train", f"--config=configs/llm_cl.py:smoke,method={method}"]
    command += ["--config.benchmark.tasks=arithmetic,sentiment", "--config.train.learning_rate=1e-2"]
    command += [f"--workdir={workdir}"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", sorted(GOLDEN))
def test_losses(method: str, tmp_path: Path) -> None:
    assert losses(method, tmp_path) == pytest.approx(GOLDEN[method], abs=2e-5)


def test_nothing_is_missing_from_the_table() -> None:
    assert set(GOLDEN) == {name for name, axes in PRESETS.items() if axes["experts"] != "none"}
