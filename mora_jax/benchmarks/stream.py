"""The stream of tasks: what a task is, and the table of benchmarks that offer tasks.

A new benchmark is one new module with `task_names` and `load_task` (see `Benchmark`) and one new row of `BENCHMARKS`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import sys
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import numpy as np

from mora_jax.data.registries import Unavailable
from mora_jax.errors import MoraError, some, unknown
from mora_jax.metrics import text

SPLITS = ("train", "eval", "test")


@dataclass(frozen=True)
class Example:
    """One record. The model reads prompt + answer joined with nothing between them."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A task of a stream: its records by split, how they are scored, its own limits in tokens (None = the config's).

    labels: the distinct answers where the task is a classification, else None.
    epochs: over the train split where the config says neither steps nor epochs; None = the config must say.
    variant: which one of several published sets of its data this is, for the run to show; empty where there is one.
    advice: said after the error about a split that is not there.
    """

    name: str
    metric: str
    splits: Mapping[str, tuple[Example, ...]]
    labels: tuple[str, ...] | None = None
    max_prompt_tokens: int | None = None
    max_answer_tokens: int | None = None
    max_new_tokens: int | None = None
    epochs: int | None = None
    variant: str = ""
    advice: str = ""

    def __post_init__(self) -> None:
        text.metric(self.metric)
        if not set(self.splits) <= set(SPLITS):
            raise ValueError(f"task {self.name!r}: splits are {SPLITS}, not {tuple(self.splits)}")

    def split(self, name: str) -> tuple[Example, ...]:
        """The records of one split; MoraError naming the splits there are if this is not one of them."""
        if name not in self.splits:
            have = ", ".join(split for split in SPLITS if split in self.splits) or "none"
            advice = self.advice and f"; {self.advice}"
            raise MoraError(f"task {self.name!r} has no {name!r} split; it has: {have}{advice}")
        return self.splits[name]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over all that decides results: name, metric, records of all splits, token limits."""
        content = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode("ascii")).hexdigest()

    def made(self, epochs: int) -> int:
        """By which version of the code its digest, and its batches over so many epochs (0 = by steps), are made.

        Raised when the same data get another digest or other batches: the second one's epochs see all records alike.
        """
        return 2 if epochs else 1

    def _content(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "metric": self.metric,
            "splits": {name: [[e.prompt, e.answer] for e in examples] for name, examples in self.splits.items()},
            "limits": [self.max_prompt_tokens, self.max_answer_tokens, self.max_new_tokens],
        }

    def score(self, predictions: Sequence[str | None], split: str, lenient: bool = False) -> float:
        """Mean score in percent of one prediction per record of the split, in its order; None counts nowhere.

        Raises MoraError where no record has a prediction.
        """
        pairs = [(e, p) for e, p in zip(self.split(split), predictions, strict=True) if p is not None]
        if not pairs:
            raise MoraError(f"task {self.name!r} has no {split!r} record that can be read")
        answers, prompts = [e.answer for e, _ in pairs], [e.prompt for e, _ in pairs]
        return text.mean_percent(text.metric(self.metric), [p for _, p in pairs], answers, prompts, lenient)

    def majority_percent(self, split: str) -> float | None:
        """The strict score in percent of always giving the most frequent train answer (of equals, the first in order).

        None where that means nothing: a task without labels or without a train split.
        """
        if self.labels is None or "train" not in self.splits:
            return None
        counts = Counter(example.answer for example in self.splits["train"])
        majority = min(counts, key=lambda answer: (-counts[answer], answer))
        return self.score([majority] * len(self.split(split)), split)

    def few_shot(self, shots: int, seed: int) -> Task:
        """The task with `shots` training records of each label, drawn without replacement; 0 = all.

        The draw depends on `seed` and on the records of that label alone. `variant` says it, and which labels have
        fewer. Raises MoraError for a task without labels.
        """
        if not shots:
            return self
        if self.labels is None:
            raise MoraError(f"benchmark.shots={shots}: task {self.name!r} has no labels to draw from; legal: 0 (all)")
        records = self.split("train")
        members: dict[str, list[int]] = {label: [] for label in self.labels}
        for index, record in enumerate(records):
            members.setdefault(record.answer, []).append(index)
        kept: set[int] = set()
        for label, indices in members.items():
            rng = np.random.default_rng((seed, zlib.crc32(label.encode())))
            kept.update(rng.permutation(indices)[:shots].tolist())
        few = [label for label, indices in members.items() if len(indices) < shots]
        said = f"{shots} shots drawn with seed {seed}"
        if few:
            said += f", all there are of {len(few)} of {len(members)} classes that have fewer ({some(few)})"
        return dataclasses.replace(
            self,
            splits={**self.splits, "train": tuple(records[i] for i in sorted(kept))},
            variant="; ".join(filter(None, (self.variant, said))),
        )

    def limited(self, train_limit: int, eval_limit: int) -> Task:
        """The task with the first records only; 0 = all. `eval_limit` holds for both eval and test."""
        for key, limit in (("train_limit", train_limit), ("eval_limit", eval_limit)):
            if limit < 0:
                raise MoraError(f"benchmark.{key} = {limit}; legal: 0 (all records) or a positive count")
        limits = {"train": train_limit, "eval": eval_limit, "test": eval_limit}
        return dataclasses.replace(self, splits={name: x[: limits[name] or None] for name, x in self.splits.items()})


class Benchmark(Protocol):
    """What a benchmark's module offers. `root` is the folder of its files, empty where it needs none.

    It may also have `ORDERS`, a mapping from the name of a published order to its tasks: a name for several at once;
    `TASK_LIMITS`, the token limits of each task, in the benchmark's order, where they do not lie with the data; and
    `LABEL_SPACE`, the `eval.label_space` of its protocol where that is not `joint`.
    """

    def task_names(self, root: str) -> tuple[str, ...]:
        """The tasks there are, in the benchmark's own order."""

    def load_task(self, name: str, root: str, *, split_seed: int, metric: str | None) -> Task:
        """One of them; `metric` None = the task's own metric, `split_seed` where splits are drawn here."""


# Module paths (module or module:object) rather than modules: listing names must not import (or download) anything.
BENCHMARKS: dict[str, str] = {
    "folder": "mora_jax.benchmarks.folder",
    "image_folder": "mora_jax.benchmarks.image_folder",
    "mtil": "mora_jax.benchmarks.mtil",
    "packaged_images": "mora_jax.benchmarks.packaged_images",
    "packaged_text": "mora_jax.benchmarks.packaged_text",
    "standard_cl": "mora_jax.benchmarks.standard_cl:LEAK_FREE",
    "standard_cl_published": "mora_jax.benchmarks.standard_cl:PUBLISHED",
    "trace": "mora_jax.benchmarks.trace",
    "xtail": "mora_jax.benchmarks.xtail",
}


def names() -> tuple[str, ...]:
    """The known benchmarks."""
    return tuple(sorted(BENCHMARKS))


def _benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, BENCHMARKS)
    module, _, attribute = BENCHMARKS[name].partition(":")
    found = importlib.import_module(module)
    return cast(Benchmark, getattr(found, attribute) if attribute else found)


def task_names(name: str, root: str) -> tuple[str, ...]:
    """The tasks of a benchmark in its own order; MoraError for an unknown benchmark or a bad root."""
    return _benchmark(name).task_names(root)


def label_space(name: str) -> str:
    """What a benchmark compares pictures with by its protocol: `joint` or `own`; MoraError for an unknown benchmark."""
    return getattr(_benchmark(name), "LABEL_SPACE", "joint")


def task_limits(name: str) -> Mapping[str, Mapping[str, int]]:
    """Task -> the token limits that it is loaded with, in the benchmark's order; empty where they lie with the data."""
    return getattr(_benchmark(name), "TASK_LIMITS", {})


def spelt_out(name: str, tasks: Sequence[str]) -> list[str]:
    """`tasks` with the tasks of an order in the place of its name."""
    orders = getattr(_benchmark(name), "ORDERS", {})
    return [task for entry in tasks for task in orders.get(entry, (entry,))]


def load(name: str, root: str, tasks: Sequence[str], *, metrics: Mapping[str, str], split_seed: int) -> list[Task]:
    """The stream: the named tasks of a benchmark in that order, or all in the benchmark's order if `tasks` is empty.

    tasks: names of tasks or of published orders. metrics: task -> metric where it should not be the task's own. Where
    none is named, a task whose data cannot be had on this machine is left out with a line on stderr.
    MoraError for an unknown benchmark, task or metric and for a task named twice, before any records are read.
    """
    benchmark = _benchmark(name)
    known, orders = benchmark.task_names(root), getattr(benchmark, "ORDERS", {})
    tasks = spelt_out(name, tasks)
    for task in (*tasks, *metrics):
        if task not in known:
            raise unknown(f"task of benchmark {name!r}", task, (*known, *orders))
    for task, count in Counter(tasks).items():
        if count > 1:
            raise MoraError(f"task {task!r} is named {count} times; a stream holds each task at most once")
    for metric in metrics.values():
        text.metric(metric)
    loaded = []
    for task in tasks or known:
        try:
            loaded.append(benchmark.load_task(task, root, split_seed=split_seed, metric=metrics.get(task)))
        except Unavailable as refusal:
            if tasks:
                raise
            print(f"task {task!r} is left out: {refusal}", file=sys.stderr)
    if not loaded:
        raise Unavailable(f"none of the tasks of benchmark {name!r} can be had on this machine; see above")
    return loaded
