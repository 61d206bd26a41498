"""Benchmarks `standard_cl` and `standard_cl_published`: text classification as generation, in O-LoRA's six orders.

The protocol is that of O-LoRA (arXiv 2310.14152): order1 to order3 are streams of four tasks, order4 to order6 of
fifteen. `benchmark.tasks=order4` stands for the tasks of that order.

Files `<root>/<task>/` or, as published, `<root>/<kind>/<task>/`: {train,eval,test}.json, where dev.json does for
eval.json, and labels.json, the labels in the order in which prompts show them. Records are of either format:
    {"prompt", "answer"}    the prompt as it is shown, without the name of the dataset
    {"sentence", "label"}   O-LoRA's own files, from which the prompt is made here
The published prompt begins with two lines that name kind and dataset, and so tell the model which task it is at;
`standard_cl` leaves them out, `standard_cl_published` has them.

An eval split that repeats the test split (so it is in the published files) is not offered: nothing is tuned on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mora_jax.benchmarks import folder
from mora_jax.benchmarks.stream import Example, Task
from mora_jax.errors import MoraError, unknown

# The question over the options, word for word as published: scores hang on it. COPA's sentences bring their own.
INSTRUCTIONS: dict[str, str] = {
    "TC": "What is the topic of the following paragraph?",
    "SC": "What is the sentiment of the following paragraph?",
    "NLI": 'What is the logical relationship between the "sentence 1" and the "sentence 2"?',
    "QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning?',
    "BoolQA": "According to the following passage, is the question true or false?",
    "MultiRC": "According to the following passage and question, is the candidate answer true or false?",
    "WiC": "Given a word and two sentences, whether the word is used with the same sense in both sentence?",
    "COPA": "",
}

# Task -> its kind, which is also the folder it is published in.
KINDS: dict[str, str] = {
    **dict.fromkeys(("agnews", "dbpedia", "yahoo"), "TC"),
    **dict.fromkeys(("amazon", "yelp", "IMDB", "SST-2"), "SC"),
    **dict.fromkeys(("MNLI", "CB", "RTE"), "NLI"),
    **{name: name for name in ("QQP", "BoolQA", "MultiRC", "WiC", "COPA")},
}

ORDERS: dict[str, tuple[str, ...]] = {
    "order1": ("dbpedia", "amazon", "yahoo", "agnews"),
    "order2": ("dbpedia", "amazon", "agnews", "yahoo"),
    "order3": ("yahoo", "amazon", "agnews", "dbpedia"),
    "order4": (
        *("MNLI", "CB", "WiC", "COPA", "QQP", "BoolQA", "RTE", "IMDB"),
        *("yelp", "amazon", "SST-2", "dbpedia", "agnews", "MultiRC", "yahoo"),
    ),
    "order5": (
        *("MultiRC", "BoolQA", "WiC", "MNLI", "CB", "COPA", "QQP", "RTE"),
        *("IMDB", "SST-2", "dbpedia", "agnews", "yelp", "amazon", "yahoo"),
    ),
    "order6": (
        *("yelp", "amazon", "MNLI", "CB", "COPA", "QQP", "RTE", "IMDB"),
        *("SST-2", "dbpedia", "agnews", "yahoo", "MultiRC", "BoolQA", "WiC"),
    ),
}

SPLIT_FILES = {**folder.SPLIT_FILES, "eval": ("eval.json", "dev.json")}
# The published limits: 512 tokens of source, 50 of target.
TASK_LIMITS = {name: dict(zip(folder.LIMITS, (512, 50, 50), strict=True)) for name in ORDERS["order4"]}
_NO_EVAL = "its eval.json or dev.json repeats test.json: to choose hyper-parameters, set aside a part of train.json"


@dataclass(frozen=True)
class StandardCL:
    """The benchmark with one kind of prompt; see the module."""

    names_dataset: bool
    ORDERS = ORDERS
    TASK_LIMITS = TASK_LIMITS

    def task_names(self, root: str) -> tuple[str, ...]:
        """The fifteen tasks in order 4; MoraError if the root is no folder or holds none of them."""
        path = folder.data_root(root)
        if not any(folder.split_files(place, SPLIT_FILES) for name in KINDS for place in _places(path, name)):
            raise MoraError(
                f"benchmark.root {root!r} holds no task of standard_cl ({', '.join(sorted(KINDS))}); set it to "
                f"{folder.LAYOUT}"
            )
        return ORDERS["order4"]

    def load_task(self, name: str, root: str, *, split_seed: int, metric: str | None) -> Task:
        """One of the fifteen tasks; `split_seed` is unused here. MoraError names what is wrong in the files."""
        del split_seed
        if name not in KINDS:
            raise unknown("task of benchmark 'standard_cl'", name, (*KINDS, *ORDERS))
        path = _find(folder.data_root(root), name)
        splits = folder.read_splits(path, SPLIT_FILES, self._formats(name, path))
        metric = metric or folder.DEFAULT_METRIC
        repeated = splits.get("eval") is not None and splits.get("eval") == splits.get("test")
        return Task(
            name=name,
            metric=metric,
            splits={split: examples for split, examples in splits.items() if not (repeated and split == "eval")},
            labels=folder.labels_of(path, metric, splits.get("train", ())),
            **TASK_LIMITS[name],
            advice=_NO_EVAL if repeated else "",
        )

    def _formats(self, name: str, path: Path) -> Mapping[tuple[str, str], folder.Build]:
        kind = KINDS[name]
        names = f"Task:{kind}\nDataset:{name}\n" if self.names_dataset else ""
        question = cache(lambda: _question(kind, path))  # only records of sentence and label need labels.json

        def from_prompt(prompt: str, answer: str) -> Example:
            return Example(names + prompt, answer)

        def from_sentence(sentence: str, label: str) -> Example:
            return Example(f"{names}{question()}{sentence}\nAnswer:", label)

        return {folder.PROMPT_ANSWER: from_prompt, folder.SENTENCE_LABEL: from_sentence}


def _places(root: Path, name: str) -> tuple[Path, Path]:
    return root / name, root / KINDS[name] / name


def _find(root: Path, name: str) -> Path:
    """The folder of a task: the first of the two places that holds a split."""
    places = _places(root, name)
    for place in places:
        if folder.split_files(place, SPLIT_FILES):
            return place
    raise MoraError(f"task {name!r}: neither {places[0]} nor {places[1]} holds train.json, eval.json or test.json")


def _question(kind: str, path: Path) -> str:
    """What stands before the sentence: the instruction and the options."""
    if not INSTRUCTIONS[kind]:
        return ""
    labels = path / "labels.json"
    if not labels.is_file():
        raise MoraError(
            f"{labels} is missing; records of sentence and label need it, since their prompts list the labels"
        )
    return f"{INSTRUCTIONS[kind]} Choose one from the option.\nOption: {', '.join(folder.read_labels(labels))} \n"


LEAK_FREE, PUBLISHED = StandardCL(names_dataset=False), StandardCL(names_dataset=True)
