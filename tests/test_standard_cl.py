"""The standard CL benchmark: six orders, two formats of files, and prompts that do or do not name the dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import CONFIG

from mora_jax import config as configs
from mora_jax.benchmarks import standard_cl, stream
from mora_jax.benchmarks.stream import Example, Task
from mora_jax.errors import MoraError

BOTH = ("standard_cl", "standard_cl_published")
TOPICS = ["World", "Sports"]
SENTENCE = "Title: A\nText: A match."
PROMPT = (
    "What is the topic of the following paragraph? Choose one from the option.\n"
    f"Option: World, Sports \n{SENTENCE}\nAnswer:"
)
NAMED = f"Task:TC\nDataset:agnews\n{PROMPT}"


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def load(root: Path, *tasks: str, name: str = "standard_cl", **metrics: str) -> list[Task]:
    return stream.load(name, str(root), tasks, metrics=metrics, split_seed=0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """agnews as prompts and answers, and QQP and COPA as O-LoRA publishes them, in folders of their kind."""
    write(tmp_path / "agnews" / "train.json", [{"prompt": PROMPT, "answer": "Sports"}])
    write(tmp_path / "agnews" / "test.json", [{"prompt": PROMPT + " ", "answer": "World"}])
    write(tmp_path / "agnews" / "labels.json", TOPICS)
    for name, labels in (("QQP", ["False", "True"]), ("COPA", ["A", "B"])):
        for split in ("train", "dev", "test"):
            write(tmp_path / name / name / f"{split}.json", [{"label": labels[0], "sentence": f"{name} {split}"}])
        write(tmp_path / name / name / "labels.json", labels)
    return tmp_path


# --- orders -----------------------------------------------------------------------------------------------------------


# O-LoRA (arXiv 2310.14152, tables 7 and 8; its configs/instruction_config.json), spelt out so that no edit of ours goes
# unseen.
PUBLISHED_ORDERS = {
    "order1": "dbpedia, amazon, yahoo, agnews",
    "order2": "dbpedia, amazon, agnews, yahoo",
    "order3": "yahoo, amazon, agnews, dbpedia",
    "order4": "MNLI, CB, WiC, COPA, QQP, BoolQA, RTE, IMDB, yelp, amazon, SST-2, dbpedia, agnews, MultiRC, yahoo",
    "order5": "MultiRC, BoolQA, WiC, MNLI, CB, COPA, QQP, RTE, IMDB, SST-2, dbpedia, agnews, yelp, amazon, yahoo",
    "order6": "yelp, amazon, MNLI, CB, COPA, QQP, RTE, IMDB, SST-2, dbpedia, agnews, yahoo, MultiRC, BoolQA, WiC",
}
PUBLISHED_INSTRUCTIONS = {
    "TC": "What is the topic of the following paragraph?",
    "SC": "What is the sentiment of the following paragraph?",
    "NLI": 'What is the logical relationship between the "sentence 1" and the "sentence 2"?',
    "QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning?',
    "BoolQA": "According to the following passage, is the question true or false?",
    "MultiRC": "According to the following passage and question, is the candidate answer true or false?",
    "WiC": "Given a word and two sentences, whether the word is used with the same sense in both sentence?",
    "COPA": "",
}


def test_orders_and_instructions_are_the_published_ones() -> None:
    assert {name: ", ".join(order) for name, order in standard_cl.ORDERS.items()} == PUBLISHED_ORDERS
    assert standard_cl.INSTRUCTIONS == PUBLISHED_INSTRUCTIONS


def test_orders() -> None:
    assert list(standard_cl.ORDERS) == [f"order{i}" for i in range(1, 7)]
    short, long = ([set(standard_cl.ORDERS[f"order{i}"]) for i in numbers] for numbers in ((1, 2, 3), (4, 5, 6)))
    assert short == [{"dbpedia", "amazon", "yahoo", "agnews"}] * 3
    assert long == [set(standard_cl.KINDS)] * 3
    assert [len(order) for order in standard_cl.ORDERS.values()] == [4, 4, 4, 15, 15, 15]
    assert len(set(standard_cl.ORDERS.values())) == 6
    assert [order[0] for order in standard_cl.ORDERS.values()] == [
        "dbpedia", "dbpedia", "yahoo", "MNLI", "MultiRC", "yelp",
    ]  # fmt: skip
    assert [order[-1] for order in standard_cl.ORDERS.values()] == [
        "agnews", "yahoo", "dbpedia", "yahoo", "yahoo", "WiC",
    ]  # fmt: skip


@pytest.fixture
def full(tmp_path: Path) -> Path:
    for name in standard_cl.KINDS:
        write(tmp_path / name / "test.json", [{"prompt": name, "answer": "A"}])
    return tmp_path


@pytest.mark.parametrize("order", standard_cl.ORDERS)
def test_an_order_is_a_name_for_its_tasks(order: str, full: Path) -> None:
    assert tuple(task.name for task in load(full, order)) == standard_cl.ORDERS[order]


def test_an_order_with_more_tasks_behind_it(full: Path) -> None:
    assert [task.name for task in load(full, "order3", "yelp")] == ["yahoo", "amazon", "agnews", "dbpedia", "yelp"]
    with pytest.raises(MoraError, match="task 'yahoo' is named 2 times"):
        load(full, "order3", "yahoo")
    with pytest.raises(
        MoraError, match=r"'order7'; known: BoolQA, .*, agnews, amazon, dbpedia, order1, .*order6, yahoo"
    ):
        load(full, "order7")


def test_no_names_are_all_tasks_in_order_4(full: Path) -> None:
    assert tuple(task.name for task in load(full)) == standard_cl.ORDERS["order4"]


# --- files and prompts ------------------------------------------------------------------------------------------------


def test_prompts_and_answers_are_read_as_they_are(root: Path) -> None:
    [task] = load(root, "agnews")
    assert task.split("train") == (Example(PROMPT, "Sports"),)
    assert (task.metric, task.labels) == ("exact_match", ("World", "Sports"))
    assert (task.max_prompt_tokens, task.max_answer_tokens, task.max_new_tokens) == (512, 50, 50)
    assert task.score(["world."], "test") == 100.0
    assert load(root, "agnews", agnews="fuzzy")[0].metric == "fuzzy"


def test_both_formats_make_the_same_prompt(root: Path) -> None:
    [of_prompt] = load(root, "agnews")
    write(root / "agnews" / "train.json", [{"sentence": SENTENCE, "label": "Sports"}])
    [of_sentence] = load(root, "agnews")
    assert of_sentence.split("train") == of_prompt.split("train") == (Example(PROMPT, "Sports"),)


def test_published_prompts_name_the_dataset_and_the_default_does_not(root: Path) -> None:
    write(root / "agnews" / "train.json", [{"sentence": SENTENCE, "label": "A"}, {"prompt": PROMPT, "answer": "A"}])
    for name, prompt in zip(BOTH, (PROMPT, NAMED), strict=True):
        [task] = load(root, "agnews", name=name)
        assert [example.prompt for example in task.split("train")] == [prompt, prompt]
    for name in ("agnews", "QQP", "COPA"):
        hidden, shown = (load(root, name, name=benchmark)[0] for benchmark in BOTH)
        assert f"Dataset:{name}\n" not in hidden.split("test")[0].prompt
        assert f"Dataset:{name}\n" in shown.split("test")[0].prompt
        assert hidden.digest != shown.digest


def test_published_folders(root: Path) -> None:
    """A folder for each kind, dev.json for the eval split, and COPA without options."""
    [copa, qqp] = load(root, "COPA", "QQP")
    assert qqp.split("eval") == (
        Example(
            'Whether the "first sentence" and the "second sentence" have the same meaning? Choose one from the '
            "option.\nOption: False, True \nQQP dev\nAnswer:",
            "False",
        ),
    )
    assert copa.split("train") == (Example("COPA train\nAnswer:", "A"),)
    assert (copa.labels, qqp.labels) == (("A", "B"), ("False", "True"))


def test_every_kind_has_an_instruction() -> None:
    assert set(standard_cl.KINDS.values()) == set(standard_cl.INSTRUCTIONS)


def test_an_eval_split_that_repeats_the_test_split_is_not_offered(root: Path) -> None:
    (root / "agnews" / "eval.json").write_bytes((root / "agnews" / "test.json").read_bytes())
    [task] = load(root, "agnews")
    with pytest.raises(
        MoraError, match=r"has no 'eval' split; it has: train, test; its eval\.json or dev\.json repeats"
    ):
        task.split("eval")
    write(root / "agnews" / "eval.json", [{"prompt": "other", "answer": "World"}])
    assert len(load(root, "agnews")[0].split("eval")) == 1


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "t"}, r'no "prompt"; each record needs "prompt" and "answer", or "sentence" and "label"'),
        ({"prompt": "p", "label": "l"}, r'no "answer"; each record needs "prompt" and "answer", or "sentence" and'),
        ({"sentence": "s"}, r'no "label"; each record needs "prompt" and "answer", or "sentence" and "label"'),
        (["s"], r'list instead of an object with "prompt" and "answer", or "sentence" and "label"'),
        ({"sentence": 3, "label": "l"}, r'"sentence" is 3; legal: text'),
        ({"sentence": "s", "label": None}, r'"label" is null; legal: text or a finite number'),
    ],
)
def test_other_records(record: Any, message: str, root: Path) -> None:
    path = root / "QQP" / "QQP" / "test.json"
    write(path, [{"sentence": "s", "label": "True"}, record])
    with pytest.raises(MoraError, match=message) as caught:
        load(root, "QQP")
    assert str(caught.value).startswith(f"{path}, record 1 (from 0)")


def test_sentences_need_labels(root: Path) -> None:
    for name in ("QQP", "COPA", "agnews"):
        next((root / name).rglob("labels.json")).unlink()
    assert [len(task.splits) for task in load(root, "COPA", "agnews")] == [3, 2]
    with pytest.raises(MoraError, match=r"QQP/labels\.json is missing; records of sentence and label need it"):
        load(root, "QQP")


def test_tasks_and_roots_that_are_not_there(root: Path) -> None:
    with pytest.raises(MoraError, match=r"task 'RTE': neither .*RTE nor .*NLI/RTE holds train\.json"):
        load(root, "RTE")
    with pytest.raises(MoraError, match=r"benchmark\.root is empty"):
        stream.load("standard_cl", "", [], metrics={}, split_seed=0)
    with pytest.raises(
        MoraError, match=r"holds no task of standard_cl \(BoolQA, .*\); set it to the folder that holds"
    ):
        load(root / "agnews")


# --- the config and the real files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
def test_the_published_hyper_parameters_are_the_defaults(name: str) -> None:
    c = configs.load(f"{CONFIG}:benchmark={name},method=seq_lora", {})
    assert (c.train.batch_size, c.train.learning_rate, c.train.schedule) == (64, 1e-3, "constant")
    assert (c.train.epochs_per_task, c.method.rank, c.method.scale, c.benchmark.tasks) == (1, 8, 4.0, "order1")
    assert configs.load(f"{CONFIG}:benchmark={name}", {"benchmark.tasks": "order6"}).benchmark.tasks == "order6"
    assert configs.load(f"{CONFIG}:benchmark=folder", {}).method.scale == 2.0


def test_the_real_files(shared_data: Path) -> None:
    tasks = load(shared_data / "standard_cl", "order1", "yelp")
    assert [task.name for task in tasks] == ["dbpedia", "amazon", "yahoo", "agnews", "yelp"]
    assert [len(task.labels or ()) for task in tasks] == [14, 5, 10, 4, 5]
    for task in tasks:
        assert {split: len(examples) for split, examples in task.splits.items()} == {"train": 500, "test": 100}
        assert {example.answer for example in task.split("test")} <= set(task.labels)
        for example in task.split("train"):
            question = f"{standard_cl.INSTRUCTIONS[standard_cl.KINDS[task.name]]} Choose one from the option.\nOption: "
            assert example.prompt.startswith(f"{question}{', '.join(task.labels)} \n")
            assert example.prompt.endswith("\nAnswer:")
        answers = [example.answer for example in task.split("test")]
        assert task.score(answers, "test") == 100.0
        assert task.score(answers[1:] + answers[:1], "test") < 50
