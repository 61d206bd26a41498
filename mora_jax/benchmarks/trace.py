"""Benchmark `trace`: the eight tasks of TRACE (arXiv 2310.06762), scored as in MoRAM's runs (arXiv 2506.21035).

Files `<root>/<task>/{train,eval,test}.json`, lists of {"prompt", "answer"}, as published. Two sets of them are in use,
whose scores are not comparable; which one it is shows in the number of records:
    500   500 train, 100 eval, 100 test records (NumGLUE-cm: 500, 41, 81)
    5000  5000 train, about 2000 eval, 2000 test
The strict scorer of the TRACE authors compares whole strings where MoRAM's looks for a letter or a number:
    --config.benchmark.metrics=C-STANCE=string_equality,FOMC=string_equality,NumGLUE-cm=string_equality,\
NumGLUE-ds=string_equality
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mora_jax.benchmarks import folder
from mora_jax.benchmarks.stream import Example, Task
from mora_jax.errors import MoraError, unknown


@dataclass(frozen=True)
class _Row:
    """A task: its metric, the published number of epochs, and its limits in tokens."""

    metric: str
    epochs: int
    max_new_tokens: int
    max_prompt_tokens: int = 1024
    max_answer_tokens: int = 512


# In the published order. The published runs generate up to 512 tokens everywhere. Where a letter or a number is scored
# less is enough for a model that has learned to stop; eval.max_new_tokens=512 is the published limit for all tasks.
TASKS: dict[str, _Row] = {
    "C-STANCE": _Row("choice", epochs=2, max_new_tokens=16),
    "FOMC": _Row("choice", epochs=1, max_new_tokens=16),
    "MeetingBank": _Row("rouge_l", epochs=3, max_new_tokens=512, max_prompt_tokens=4096),
    "Py150": _Row("fuzzy", epochs=2, max_new_tokens=128),
    "ScienceQA": _Row("first_character", epochs=1, max_new_tokens=8),
    "NumGLUE-cm": _Row("last_number", epochs=2, max_new_tokens=32),
    "NumGLUE-ds": _Row("last_number", epochs=2, max_new_tokens=32),
    "20Minuten": _Row("sari", epochs=3, max_new_tokens=512),
}

TASK_LIMITS = {name: {limit: getattr(row, limit) for limit in folder.LIMITS} for name, row in TASKS.items()}

# MeetingBank's train split is missing from the 500 set as it is passed on.
_NO_TRAIN = "leave it out by naming the other tasks in benchmark.tasks, or add its train.json from the TRACE release"
_SMALL = 500


def task_names(root: str) -> tuple[str, ...]:
    """The eight tasks in the published order; MoraError if the root is no folder or holds none of them."""
    path = folder.data_root(root)
    if not any(folder.split_files(path / name) for name in TASKS):
        raise MoraError(
            f"benchmark.root {root!r} holds no task of TRACE ({', '.join(TASKS)}); set it to {folder.LAYOUT}"
        )
    return tuple(TASKS)


def variant(splits: Mapping[str, tuple[Example, ...]]) -> str:
    """Which of the published sets a task's records are from, by their number."""
    largest = max(map(len, splits.values()))
    if largest > _SMALL:
        return "5000-example set"
    if "train" in splits and largest < _SMALL:
        return "a set of its own size"
    return "500-example set"


def load_task(name: str, root: str, *, split_seed: int, metric: str | None) -> Task:
    """One of the eight tasks with its published splits; `split_seed` is unused here.

    MoraError names the file and the record for whatever is wrong in it.
    """
    del split_seed
    if name not in TASKS:
        raise unknown("task of benchmark 'trace'", name, TASKS)
    row, path = TASKS[name], folder.data_root(root) / name
    splits = folder.read_splits(path)
    metric = metric or row.metric
    return Task(
        name=name,
        metric=metric,
        splits=splits,
        labels=folder.labels_of(path, metric, splits.get("train", ())),
        **TASK_LIMITS[name],
        epochs=row.epochs,
        variant=variant(splits),
        advice=_NO_TRAIN if "train" not in splits else "",
    )
