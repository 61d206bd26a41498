"""Benchmark `folder`: tasks from files `<root>/<task>/{train,eval,test}.json`, the layout of TRACE (arXiv 2310.06762).

Each file is a UTF-8 JSON list of {"prompt": text, "answer": text or number}; other keys are ignored. Beside it may lie
    task.json    any of {"metric", "max_prompt_tokens", "max_answer_tokens", "max_new_tokens"}
    labels.json  the labels, as O-LoRA's benchmark has them: a list of texts, or an object id -> text or text -> id
A split without a file is simply not there: asking for it names the ones that are. The benchmarks that read files of
their own (`trace`, `standard_cl`) read them with the functions below.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mora_jax.benchmarks.stream import SPLITS, Example, Task
from mora_jax.data.files import read_json
from mora_jax.errors import MoraError
from mora_jax.metrics import text

# The two keys of a record in each format there is: what is shown, what is wanted.
PROMPT_ANSWER, SENTENCE_LABEL = ("prompt", "answer"), ("sentence", "label")
LAYOUT = "the folder that holds <task>/{train,eval,test}.json"
SPLIT_FILES: Mapping[str, tuple[str, ...]] = {split: (f"{split}.json",) for split in SPLITS}
DEFAULT_METRIC = "exact_match"
LIMITS = ("max_prompt_tokens", "max_answer_tokens", "max_new_tokens")
TASK_KEYS = ("metric", *LIMITS)
# More distinct train answers than this is free text, not a classification.
MOST_LABELS = 32


def data_root(root: str, layout: str = LAYOUT) -> Path:
    """`benchmark.root` as a folder; MoraError, saying what it must hold, if it is empty or none."""
    if not root:
        raise MoraError(f"benchmark.root is empty; set it to {layout}")
    path = Path(root).expanduser()
    if not path.is_dir():
        raise MoraError(f"benchmark.root {root!r} is no folder; set it to {layout}")
    return path


def split_files(folder: Path, files: Mapping[str, tuple[str, ...]] = SPLIT_FILES) -> dict[str, Path]:
    """The file of each split that a task folder has: the first that exists of the names it may have."""
    found = {split: [folder / name for name in names if (folder / name).is_file()] for split, names in files.items()}
    return {split: paths[0] for split, paths in found.items() if paths}


def task_names(root: str) -> tuple[str, ...]:
    """The sorted names of the folders under `root` with at least one split file; MoraError if there are none."""
    names = tuple(sorted(folder.name for folder in data_root(root).iterdir() if split_files(folder)))
    if not names:
        raise MoraError(
            f"benchmark.root {root!r} has no task: no folder in it holds train.json, eval.json or test.json"
        )
    return names


def _is_number(value: Any) -> bool:
    """An int or float that a float can hold; not a bool, which is an int in Python but no number anyone meant."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _described(formats: Sequence[tuple[str, str]]) -> str:
    return ", or ".join(f'"{shown}" and "{wanted}"' for shown, wanted in formats)


def _format_of(record: Any, where: str, formats: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """The format whose two keys a record has; MoraError naming the formats there are."""
    if not isinstance(record, dict):
        raise MoraError(f"{where}: {type(record).__name__} instead of an object with {_described(formats)}")
    nearest = max(formats, key=lambda keys: sum(key in record for key in keys))
    for key in nearest:
        if key not in record:
            hint = ""
            if set(SENTENCE_LABEL) <= set(record) and SENTENCE_LABEL not in formats:
                hint = f"; {_described([SENTENCE_LABEL])} is the format of benchmark standard_cl"
            raise MoraError(f'{where}: no "{key}"; each record needs {_described(formats)}{hint}')
    return nearest


def _texts(record: Mapping[str, Any], keys: tuple[str, str], where: str) -> tuple[str, str]:
    """The two texts of a record; a wanted number becomes text."""
    shown, wanted = (record[key] for key in keys)
    if not isinstance(shown, str):
        raise MoraError(f'{where}: "{keys[0]}" is {json.dumps(shown)[:40]}; legal: text')
    if not isinstance(wanted, str) and not _is_number(wanted):
        raise MoraError(f'{where}: "{keys[1]}" is {json.dumps(wanted)[:40]}; legal: text or a finite number')
    for key, text_of in zip(keys, (shown, str(wanted)), strict=True):
        if any("\ud800" <= character <= "\udfff" for character in text_of):
            raise MoraError(
                f'{where}: "{key}" holds half of a character (a lone UTF-16 surrogate); legal: Unicode text'
            )
    return shown, str(wanted)


Build = Callable[[str, str], Example]
FORMATS: Mapping[tuple[str, str], Build] = {PROMPT_ANSWER: Example}


def read_examples(path: Path, formats: Mapping[tuple[str, str], Build] = FORMATS) -> tuple[Example, ...]:
    """The records of a split. `formats`: the two keys of each legal format -> what makes an example of their texts."""
    records = read_json(path)
    if not isinstance(records, list):
        raise MoraError(f"{path}: {type(records).__name__} instead of a list of records")
    if not records:
        raise MoraError(f"{path}: an empty list; a split needs at least one record (or remove the file)")
    examples = []
    for i, record in enumerate(records):
        where = f"{path}, record {i} (from 0)"
        keys = _format_of(record, where, tuple(formats))
        examples.append(formats[keys](*_texts(record, keys, where)))
    return tuple(examples)


def read_splits(
    folder: Path,
    files: Mapping[str, tuple[str, ...]] = SPLIT_FILES,
    formats: Mapping[tuple[str, str], Build] = FORMATS,
) -> dict[str, tuple[Example, ...]]:
    """The splits of a task folder; MoraError if it has none."""
    found = split_files(folder, files)
    if not found:
        raise MoraError(f"task folder {folder} holds none of train.json, eval.json, test.json")
    return {split: read_examples(path, formats) for split, path in found.items()}


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise MoraError(f"{path}: {type(settings).__name__} instead of an object; legal keys: {', '.join(TASK_KEYS)}")
    for key, value in settings.items():
        if key not in TASK_KEYS:
            raise MoraError(f"{path}: unknown key {key!r}; legal: {', '.join(TASK_KEYS)}")
        if key in LIMITS and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise MoraError(f"{path}: {key} = {json.dumps(value)}; legal: a whole number of tokens >= 1")
    if "metric" in settings and settings["metric"] not in tuple(text.METRICS):
        known = ", ".join(sorted(text.METRICS))
        raise MoraError(f"{path}: unknown metric {json.dumps(settings['metric'])}; known: {known}")
    return settings


def read_labels(path: Path) -> tuple[str, ...]:
    """The labels of a labels.json, in its order."""
    labels = read_json(path)
    if isinstance(labels, dict):
        # Both directions are in use: {"0": "World"} and {"World": 0}.
        texts = all(isinstance(value, str) for value in labels.values())
        labels = list(labels.values() if texts else labels.keys())
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise MoraError(f"{path}: legal: a non-empty list of texts, or an object id -> text or text -> id")
    return tuple(labels)


def labels_of(folder: Path, metric: str, train: tuple[Example, ...]) -> tuple[str, ...] | None:
    """labels.json's, else the distinct train answers if at most 32 and the metric suits labels, else None."""
    path = folder / "labels.json"
    if path.is_file():
        return read_labels(path)
    answers = sorted({example.answer for example in train})
    if text.metric(metric).labels and 1 <= len(answers) <= MOST_LABELS:
        return tuple(answers)
    return None


def load_task(name: str, root: str, *, split_seed: int, metric: str | None) -> Task:
    """One task folder. Metric: `metric`, else task.json's, else exact_match. `split_seed` is unused here.

    MoraError names the file and the record for whatever is wrong in it.
    """
    del split_seed
    folder = data_root(root) / name
    splits = read_splits(folder)
    settings = _settings(folder / "task.json")
    metric = metric or settings.get("metric", DEFAULT_METRIC)
    text.metric(metric)
    return Task(
        name=name,
        metric=metric,
        splits=splits,
        labels=labels_of(folder, metric, splits.get("train", ())),
        **{key: settings.get(key) for key in LIMITS},
    )
