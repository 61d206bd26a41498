"""What a workdir has learned, read back by the other binaries: scores as in R, text as in predictions/."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from interruptions import sums
from launching import CONFIG, Ended, assert_refused, results, write_task

from mora_jax import evaluate, export, generate
from mora_jax.adapter import from_workdir
from mora_jax.errors import MoraError

EVALUATE, GENERATE = ((sys.executable, "-m", f"mora_jax.{name}") for name in ("evaluate", "generate"))


def evaluation(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def predictions(workdir: Path, row: str, task: str) -> list[dict]:
    return [json.loads(line) for line in (workdir / "predictions" / row / f"{task}.jsonl").read_text().splitlines()]


def test_every_row_of_the_run_is_reproduced(
    taught: Callable[[str], Path], binary: Callable[..., Ended], tmp_path: Path
) -> None:
    """All rows come from the newest checkpoint."""
    workdir, found = taught("mora"), results(taught("mora"))
    before = sums(workdir)
    run = binary(f"--workdir={workdir}", "--task=all", f"--output={tmp_path / 'e.json'}", command=EVALUATE)
    assert (run.code, run.err) == (0, "")
    told = evaluation(tmp_path / "e.json")
    assert [row["scores"] for row in told["rows"]] == [found["zero_shot"], *found["R"]]
    assert any(found["R"][1]), "a run that scores nothing shows nothing"
    assert found["R"][0][0] != found["R"][1][0], "equal rows would not tell the tasks apart"
    assert told["rows"][0]["lenient"] == found["baselines"]["zero_shot_lenient"]
    for key in ("tokens_without_expert", "active_experts_mean", "experts_per_site"):
        assert told["rows"][-1][key] == found[key]
    assert [row["task"] for row in told["rows"]] == [-1, 0, 1]
    for key in ("tasks", "metric", "versions", "device", "method", "model", "seed", "eval_examples"):
        assert told[key] == found[key]
    assert told["command"].startswith("python -m mora_jax.evaluate --workdir=")
    assert "zero-shot" in run.out
    assert sums(workdir) == before


def test_a_block_that_is_trained_on_needs_the_checkpoint_of_each_task(
    taught: Callable[[str], Path], main: Callable[..., Ended], tmp_path: Path
) -> None:
    run = main(f"--workdir={taught('seq_lora')}", "--task=all", f"--output={tmp_path / 'e.json'}", of=evaluate)
    assert (run.code, run.err) == (0, "")
    found, rows = results(taught("seq_lora")), evaluation(tmp_path / "e.json")["rows"]
    assert [row["scores"] for row in rows] == [found["zero_shot"], *found["R"]]
    assert found["R"][0][0] != found["R"][1][0], "equal rows would not tell the tasks apart"
    assert [row["origin"]["task"] for row in rows] == [1, 0, 1]


def test_another_benchmark_is_evaluated_whole(
    taught: Callable[[str], Path], main: Callable[..., Ended], tmp_path: Path
) -> None:
    """The run has eval_limit=4 and 48 tokens of prompt, 4 of answer."""
    write_task(tmp_path / "data" / "animals", ("cat", "dog"), test_count=3)
    write_task(tmp_path / "data" / "colours", ("red", "blue"), test_count=6)
    long = [{"prompt": "colours " * 8 + "0 ->", "answer": "red"}] * 6
    (tmp_path / "data" / "colours" / "test.json").write_text(json.dumps(long))
    shutil.copytree(taught("mora"), tmp_path / "w")
    other = ["--config.benchmark.name=folder", f"--config.benchmark.root={tmp_path / 'data'}"]
    other.append("--config.eval.max_new_tokens=4")
    run = main(f"--workdir={tmp_path / 'w'}", "--task=0", *other, of=evaluate)
    assert (run.code, run.err) == (0, "")
    told = evaluation(tmp_path / "w" / "evaluate.json")
    assert told["tasks"] == ["animals", "colours"]
    assert told["eval_examples"] == [3, 6]
    assert [row["name"] for row in told["rows"]] == ["colours"]
    assert None not in told["rows"][0]["scores"]
    assert told["rows"][0]["prompts_truncated"] == 0
    again = ["--config.benchmark.eval_limit=2", "--config.train.max_prompt_tokens=48"]
    assert main(f"--workdir={tmp_path / 'w'}", "--task=0", *other, *again, of=evaluate).code == 0
    told = evaluation(tmp_path / "w" / "evaluate.json")
    assert (told["eval_examples"], told["rows"][0]["prompts_truncated"]) == ([2, 2], 2)


def test_data_that_have_moved_are_asked_as_before(
    taught: Callable[[str], Path], main: Callable[..., Ended], tmp_path: Path
) -> None:
    found = results(taught("mora"))
    shutil.copytree(found["config"]["benchmark"]["root"], tmp_path / "moved")
    moved = [f"--config.benchmark.root={tmp_path / 'moved'}", f"--output={tmp_path / 'e.json'}"]
    run = main(f"--workdir={taught('mora')}", *moved, of=evaluate)
    assert (run.code, run.err) == (0, "")
    told = evaluation(tmp_path / "e.json")
    assert (told["rows"][0]["scores"], told["eval_examples"]) == (found["R"][1], found["eval_examples"])
    assert (told["label_space"], told["chance"]) == (None, [None, None])
    assert (
        "limits: benchmark.eval_limit=4, train.max_prompt_tokens=48, train.max_answer_tokens=16, eval.max_new_tokens=4"
    ) in " ".join(run.out.split())


def test_limits_of_the_run_stay_with_its_own_data() -> None:
    assert evaluate.other_benchmark({"benchmark.tasks": "a"}) == {"benchmark.tasks": "a"}
    assert evaluate.other_benchmark({"benchmark.root": "a"}) == {"benchmark.root": "a"}
    other = evaluate.other_benchmark({"benchmark.name": "trace", "benchmark.shots": "3"})
    assert (other["benchmark.tasks"], other["benchmark.eval_limit"], other["benchmark.shots"]) == ("", "0", "3")
    assert other["benchmark.root"] == "", "or a benchmark that reads no folder would refuse the run's"
    assert "benchmark.split_seed" not in other
    for name, space in (("mtil", "own"), ("xtail", "joint")):
        assert evaluate.other_benchmark({"benchmark.name": name})["eval.label_space"] == space
    assert other["eval.max_new_tokens"] == other["train.max_prompt_tokens"] == other["train.max_answer_tokens"] == "0"


def test_an_exported_adapter_scores_and_answers_as_its_run(
    taught: Callable[[str], Path], main: Callable[..., Ended], tmp_path: Path
) -> None:
    workdir, folder = taught("mora"), tmp_path / "a"
    assert main(f"--workdir={workdir}", f"--to={folder}", "--layout=authors", of=export).code == 0
    assert main(f"--adapter={folder}", of=evaluate)[::2] == (0, "")
    assert [row["scores"] for row in evaluation(folder / "evaluate.json")["rows"]] == results(workdir)["R"][1:]
    expected = predictions(workdir, "02_digits", "colours")
    asked = [f"--prompt={expected[1]['prompt']}", f"--adapter={folder}"]
    run = main(*asked, of=generate)
    assert (run.code, run.out) == (0, expected[1]["prediction"] + "\n")


@pytest.mark.parametrize(("task", "row"), [("0", "01_colours"), ("1", "02_digits"), ("-1", "00_zero_shot")])
def test_generate_answers_what_predictions_hold(
    task: str,
    row: str,
    taught: Callable[[str], Path],
    main: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    expected = predictions(taught("mora"), row, "colours")
    (tmp_path / "prompts").write_text("".join(line["prompt"] + "\n" for line in expected))
    with open(tmp_path / "prompts", encoding="utf-8") as prompts:
        monkeypatch.setattr(sys, "stdin", prompts)
        run = main(f"--workdir={taught('mora')}", f"--task={task}", of=generate)
    assert run.code == 0
    assert run.out.split("\n")[:-1] == [line["prediction"].replace("\n", "\\n") for line in expected]
    notes = run.err.splitlines()
    assert len(notes) == len(expected)
    begins = {
        "0": "gate mass: colours 100.0 %;",
        "1": "gate mass: colours ",
        "-1": "no experts: this is the frozen model",
    }
    assert all(note.startswith(begins[task]) for note in notes)


def test_generate_says_which_experts_answered(
    taught: Callable[[str], Path], binary: Callable[..., Ended], main: Callable[..., Ended]
) -> None:
    run = binary(f"--workdir={taught('mora')}", "--prompt=digits 2 ->", command=GENERATE)
    assert run.code == 0
    words = run.err.replace(",", "").replace(";", "").split()
    assert words[:3] == ["gate", "mass:", "colours"]
    assert float(words[3]) + float(words[6]) == pytest.approx(100, abs=0.11)
    assert "of 16 experts active per token and site" in run.err
    constant = main(f"--workdir={taught('seq_lora')}", "--prompt=digits 2 ->", of=generate)
    assert constant.err == "method seq_lora has no gates: all 8 experts answer every token\n"


# ---------------------------------------------------------------- runs that go on


def in_training(workdir: Path, copy: Path) -> Path:
    """The workdir as it was while the second task was taught: a save that is not finished, no results.json."""
    shutil.copytree(workdir, copy)
    for folder in copy.glob("checkpoints/*-002-*"):
        if not folder.name.endswith("-training"):
            shutil.rmtree(folder)
    assert [*copy.glob("checkpoints/*-002-0-training")]
    (copy / "checkpoints" / "00000099-002-0-training").mkdir()
    (copy / "results.json").unlink()
    return copy


@pytest.mark.parametrize("method", ["mora", "seq_lora"])
def test_a_run_that_goes_on_is_read_and_left_alone(method: str, taught: Callable[[str], Path], tmp_path: Path) -> None:
    workdir = in_training(taught(method), tmp_path / "w")
    before = sums(workdir)
    adapter = from_workdir(workdir, None, {})
    assert adapter.tasks == ("colours",)
    finished = from_workdir(taught(method), 0, {})
    for path, site in finished.rows.items():
        for name, rows in site.items():
            assert rows.shape[1] == 8
            np.testing.assert_array_equal(adapter.rows[path][name], rows)
    assert sums(workdir) == before
    assert (workdir / "checkpoints" / "00000099-002-0-training").is_dir()
    with pytest.raises(MoraError, match=r"--task=1 has not been taught; legal: .* 0 \(colours\)"):
        from_workdir(workdir, 1, {})


def test_a_task_whose_checkpoint_is_gone_is_named(taught: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(taught("seq_lora"), tmp_path / "w")
    for folder in (tmp_path / "w" / "checkpoints").glob("*-001-*"):
        shutil.rmtree(folder)
    with pytest.raises(MoraError, match=r"no longer has the checkpoint of task 0 \(colours\)"):
        from_workdir(tmp_path / "w", 0, {})


# ---------------------------------------------------------------- mistakes


def test_another_seed_is_another_model(taught: Callable[[str], Path], main: Callable[..., Ended]) -> None:
    run = main(f"--workdir={taught('mora')}", "--config.seed=1", of=evaluate)
    assert_refused(run, "--config.seed cannot be changed after training", "config.benchmark.")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--task=2"], ["--task=2 has not been taught", "1 (digits)"]),
        (["--task=last"], ["--task=last must be a number"]),
        (["--config.benchmark.tasks=shapes"], ["unknown task", "'shapes'"]),
        (["--config.eval.split=eval"], ["'eval' split"]),
        (["--config.eval.batch=3"], ["unknown config key 'eval.batch'"]),
        (["--adapter=a"], ["exactly one of"]),
        ([f"--config={CONFIG}"], ["--config is not understood", "--workdir, --adapter, --task"]),
    ],
)
def test_mistakes(argv: list[str], parts: list[str], taught: Callable[[str], Path], main: Callable[..., Ended]) -> None:
    assert_refused(main(f"--workdir={taught('mora')}", *argv, of=evaluate), *parts)
