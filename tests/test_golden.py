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
    "mora": [5.604639, 5.050318, 5.540044, 5.614289, 5.697408, 5.462521],
    "inc_lora": [5.604639, 4.79085, 4.813816, 5.81709, 5.608492, 5.110003],
    "seq_lora": [5.604639, 4.79085, 4.813816, 5.81709, 5.489179, 5.034041],
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
