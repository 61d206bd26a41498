"""TRACE: its tasks, metrics and limits, the sets it comes in, and one clear line for files that are not it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import CONFIG, Ended, assert_refused

from mora_jax import config as configs
from mora_jax.benchmarks import stream, trace
from mora_jax.benchmarks.stream import Task
from mora_jax.errors import MoraError
from mora_jax.metrics import text

NAMES = ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")


def write(path: Path, records: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(records if isinstance(records, str) else json.dumps(records), encoding="utf-8")


def records(count: int, answer: str = "A") -> list[dict[str, str]]:
    return [{"prompt": f"Question {i}? A or B. Answer:", "answer": answer} for i in range(count)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in NAMES:
        for split, count in (("train", 8), ("eval", 2), ("test", 2)):
            write(tmp_path / name / f"{split}.json", records(count))
    return tmp_path


def load(root: Path, *tasks: str, **metrics: str) -> list[Task]:
    return stream.load("trace", str(root), tasks, metrics=metrics, split_seed=0)


def test_the_published_order_metrics_and_epochs(root: Path) -> None:
    tasks = load(root)
    assert tuple(task.name for task in tasks) == NAMES
    assert [task.metric for task in tasks] == [
        "choice", "choice", "rouge_l", "fuzzy", "first_character", "last_number", "last_number", "sari",
    ]  # fmt: skip
    assert [task.epochs for task in tasks] == [2, 1, 3, 2, 1, 2, 2, 3]
    assert [task.max_prompt_tokens for task in tasks] == [1024, 1024, 4096, 1024, 1024, 1024, 1024, 1024]
    assert {task.max_answer_tokens for task in tasks} == {512}
    assert all(task.max_new_tokens and task.max_new_tokens <= 512 for task in tasks)


def test_some_tasks_in_another_order(root: Path) -> None:
    assert [task.name for task in load(root, "20Minuten", "FOMC")] == ["20Minuten", "FOMC"]
    with pytest.raises(MoraError, match="unknown task of benchmark 'trace' 'fomc'; known: 20Minuten, C-STANCE, FOMC"):
        load(root, "fomc")


def test_the_strict_scorer_is_a_metric_of_the_config(root: Path) -> None:
    strict = {"FOMC": "string_equality", "NumGLUE-cm": "string_equality"}
    tasks = {task.name: task for task in stream.load("trace", str(root), [], metrics=strict, split_seed=0)}
    assert tasks["FOMC"].score(["A", "A."], "test") == 50.0
    assert tasks["C-STANCE"].score(["A", "A."], "test") == 100.0
    assert tasks["NumGLUE-cm"].metric == "string_equality"
    named = trace.__doc__.replace("\n", "").partition("--config.benchmark.metrics=")[2]
    assert configs.pairs("benchmark.metrics", named) == dict.fromkeys(
        ("C-STANCE", "FOMC", "NumGLUE-cm", "NumGLUE-ds"), "string_equality"
    )


@pytest.mark.parametrize(
    ("sizes", "variant"),
    [
        ({"train": 500, "eval": 41, "test": 81}, "500-example set"),
        ({"eval": 100, "test": 100}, "500-example set"),
        ({"train": 5000, "eval": 496, "test": 496}, "5000-example set"),
        ({"eval": 687, "test": 692}, "5000-example set"),
        ({"train": 8, "test": 2}, "a set of its own size"),
    ],
)
def test_the_set_shows_in_the_number_of_records(sizes: dict[str, int], variant: str, tmp_path: Path) -> None:
    for split, count in sizes.items():
        write(tmp_path / "FOMC" / f"{split}.json", records(count))
    [task] = load(tmp_path, "FOMC")
    assert task.variant == variant
    assert task.limited(4, 1).variant == variant


def test_a_missing_train_split_matters_only_to_who_asks(root: Path) -> None:
    (root / "MeetingBank" / "train.json").unlink()
    task = load(root, "MeetingBank")[0]
    assert len(task.split("test")) == 2
    with pytest.raises(MoraError) as caught:
        task.split("train")
    assert str(caught.value) == (
        "task 'MeetingBank' has no 'train' split; it has: eval, test; leave it out by naming the other tasks in "
        "benchmark.tasks, or add its train.json from the TRACE release"
    )


def test_a_task_that_is_not_there(root: Path) -> None:
    for split in stream.SPLITS:
        (root / "Py150" / f"{split}.json").unlink()
    assert len(load(root, "FOMC", "20Minuten")) == 2
    with pytest.raises(MoraError, match=r"task folder .*Py150 holds none of train\.json, eval\.json, test\.json"):
        load(root)


def test_roots_that_are_not_trace(root: Path, tmp_path: Path) -> None:
    with pytest.raises(MoraError, match=r"benchmark\.root is empty; set it to the folder that holds <task>"):
        stream.load("trace", "", [], metrics={}, split_seed=0)
    with pytest.raises(MoraError, match="nowhere' is no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(MoraError, match=r"holds no task of TRACE \(C-STANCE, FOMC, .*\); set it to the folder that"):
        load(root / "FOMC")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (
            [{"sentence": "s", "label": "l"}],
            ['record 0 (from 0): no "prompt"; each record needs "prompt" and "answer"',
             '"sentence" and "label" is the format of benchmark standard_cl'],
        ),
        ([{"question": "q"}], ['no "prompt"; each record needs "prompt" and "answer"']),
        ('{"prompt": "p", "answer": "a"}\n' * 2, ["line 2", "JSON list, not one record a line"]),
    ],
)  # fmt: skip
def test_files_in_another_format(content: Any, parts: list[str], root: Path) -> None:
    write(root / "FOMC" / "train.json", content)
    with pytest.raises(MoraError) as caught:
        load(root, "FOMC")
    for part in (str(root / "FOMC" / "train.json"), *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# --- the run ----------------------------------------------------------------------------------------------------------


def test_the_published_hyper_parameters_are_the_defaults(root: Path) -> None:
    c = configs.load(f"{CONFIG}:benchmark=trace", {"benchmark.root": str(root)})
    assert (c.train.batch_size, c.train.learning_rate, c.train.schedule, c.train.clip_norm) == (32, 5e-4, "constant", 1)
    assert (c.train.adam_b1, c.train.adam_b2, c.train.weight_decay) == (0.9, 0.95, 0)
    assert (c.method.rank, c.method.top_k, c.method.temperature, c.method.threshold) == (8, 8, 0.03, 0.2)
    assert (c.method.scale, c.method.targets, c.eval.decoding) == (2.0, "attn/q,attn/k,attn/v,attn/o", "greedy")
    tasks = load(root, "20Minuten", "FOMC", "Py150")
    lengths = configs.lengths(c, [t.name for t in tasks], {t.name: t.epochs for t in tasks})
    assert lengths == [(0, 3), (0, 1), (0, 2)], "a task keeps its epochs in any order"
    assert configs.load(f"{CONFIG}:benchmark=trace", {"train.batch_size": "4"}).train.batch_size == 4


def test_epochs_of_ones_own_need_to_be_there() -> None:
    c = configs.load(f"{CONFIG}:benchmark=folder", {"train.epochs_per_task": "-1"})
    with pytest.raises(MoraError, match=r"task a has no number of epochs of its own; train\.epochs_per_task=-1"):
        configs.lengths(c, ["a"], {"a": None})
    with pytest.raises(MoraError, match=r"train\.epochs_per_task=-2 must be at least 0, or -1"):
        configs.load(f"{CONFIG}:benchmark=folder", {"train.epochs_per_task": "-2"})
    with pytest.raises(MoraError, match="exactly one of them must be other than 0"):
        configs.load(f"{CONFIG}:benchmark=trace", {"train.steps_per_task": "5"})


def test_a_run_says_which_set_it_is_of(main: Callable[..., Ended], root: Path, tmp_path: Path) -> None:
    """The frozen tiny model answers two of the tasks, one scored against its prompt, decoded as published."""
    argv = [f"--config={CONFIG}:smoke,benchmark=trace,method=zero_shot", f"--workdir={tmp_path / 'w'}"]
    argv += [
        f"--config.benchmark.root={root}",
        "--config.benchmark.tasks=20Minuten,FOMC",
        "--config.eval.decoding=moram",
    ]
    run = main(*argv)
    assert (run.code, run.err) == (0, "")
    said = " ".join(run.out.split())
    assert "trace: 20Minuten -> FOMC" in said
    assert "│ data │ a set of its own size │" in said
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert results["variant"] == ["a set of its own size"] * 2
    assert results["metric"] == ["sari", "choice"]
    lines = (tmp_path / "w" / "predictions" / "00_zero_shot" / "20Minuten.jsonl").read_text().splitlines()
    scored = [json.loads(line) for line in lines]
    for line in scored:
        expected = text.metric("sari").of(line["prediction"], line["answer"], line["prompt"])
        assert line["score"] == pytest.approx(expected, abs=1e-4)
    assert results["zero_shot"][0] == pytest.approx(100 * sum(line["score"] for line in scored) / 2, abs=0.01)


def test_a_run_without_a_train_split_is_refused_before_any_work(
    main: Callable[..., Ended], root: Path, tmp_path: Path
) -> None:
    (root / "MeetingBank" / "train.json").unlink()
    run = main(
        f"--config={CONFIG}:smoke,benchmark=trace", f"--workdir={tmp_path / 'w'}", f"--config.benchmark.root={root}"
    )
    assert_refused(run, "'MeetingBank' has no 'train' split", "benchmark.tasks")


# --- the real files ---------------------------------------------------------------------------------------------------


def test_the_real_files(shared_data: Path) -> None:
    tasks = {task.name: task for task in load(shared_data / "trace")}
    assert {task.variant for task in tasks.values()} == {"500-example set"}
    sizes = {name: {split: len(examples) for split, examples in task.splits.items()} for name, task in tasks.items()}
    usual = {"train": 500, "eval": 100, "test": 100}
    assert sizes == dict.fromkeys(NAMES, usual) | {
        "NumGLUE-cm": {"train": 500, "eval": 41, "test": 81},
        "MeetingBank": {"eval": 100, "test": 100},
    }
    assert tasks["C-STANCE"].labels == tasks["FOMC"].labels == ("A", "B", "C")
    assert all(tasks[name].labels is None for name in NAMES[2:])
    assert tasks["Py150"].split("test")[0].prompt.startswith("<s> ")
    with pytest.raises(MoraError, match="'MeetingBank' has no 'train' split"):
        tasks["MeetingBank"].split("train")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "20Minuten"])
def test_the_right_answer_scores_full(name: str, shared_data: Path) -> None:
    """Also after another record's answer was taken: then it does not. ROUGE adds 1e-8 to a denominator."""
    [task] = load(shared_data / "trace", name)
    answers = [example.answer for example in task.split("test")]
    assert task.score(answers, "test") == pytest.approx(100, abs=1.5 if name == "Py150" else 1e-4)
    assert task.score(answers[1:] + answers[:1], "test") < 70


def test_a_right_simplification_beats_the_text_itself(shared_data: Path) -> None:
    [task] = load(shared_data / "trace", "20Minuten")
    examples = task.split("test")
    right, copied = ([getattr(e, key) for e in examples] for key in ("answer", "prompt"))
    assert task.score(right, "test") == pytest.approx(99.6, abs=0.05)  # see `sari` on n-grams that come several times
    assert task.score(copied, "test") < 50
