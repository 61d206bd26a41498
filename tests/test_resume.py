"""Resuming, with the real binary: however a run is interrupted, the same command ends in the same R and adapters."""

from __future__ import annotations

import itertools
import json
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import SEED
from interruptions import (
    OPTIONS,
    RESULT_KEYS,
    STEPS,
    SUMMARY_KEYS,
    TASKS,
    TIMINGS,
    Stage,
    World,
    arrays,
    assert_one_error,
    assert_same_end,
    checkpoints,
    ended,
    meta,
    rows,
    sums,
    wait_for,
)
from launching import results

from mora_jax.runtime.checkpoint import MANIFEST

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
    assert {path for path in before | after if before.get(path) != after.get(path)} <= {
        "results.json",
        "report.html",
    }  # the time
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
