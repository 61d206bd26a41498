"""The product as its user meets it: the real binary, the real model, real text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def train(workdir: Path, config: str, *overrides: str) -> dict:
    command = [sys.executable, "-m", "mora_jax.train", f"--config={config}", f"--workdir={workdir}"]
    command += [f"--config.{override}" for override in overrides]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return json.loads((workdir / "results.json").read_text(encoding="utf-8"))


def test_real_trace_tasks_are_a_folder_benchmark(shared_data: Path, tmp_path: Path) -> None:
    results = train(
        tmp_path,
        "configs/llm_cl.py:smoke,benchmark=folder",
        f"benchmark.root={shared_data / 'trace'}",
        "benchmark.tasks=C-STANCE,NumGLUE-cm",
        "benchmark.metrics=C-STANCE=choice,NumGLUE-cm=last_number",
    )
    assert results["complete"]
    assert results["tasks"] == ["C-STANCE", "NumGLUE-cm"]
    assert results["metric"] == ["choice", "last_number"]
    assert results["baselines"]["majority"][0] is not None
    assert results["baselines"]["majority"][1] is None
    assert results["prompts_truncated"] > 0  # bytes against a limit of 48


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_smollm2_learns_and_remembers(tmp_path: Path) -> None:
    """Two tasks of the default stream with its own hyper-parameters; the bounds are far below what it reaches."""
    results = train(tmp_path, "configs/llm_cl.py", "benchmark.tasks=bbc_topics,arithmetic", "benchmark.eval_limit=24")
    zero_shot, R = results["zero_shot"], results["R"]
    assert R[0][0] > zero_shot[0] + 25
    assert R[1][0] > R[0][0] - 25
    assert results["train_traces"] == 1
