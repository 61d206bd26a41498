"""Benchmark `folder`: tasks from files `<root>/<task>/{train,eval,test}.json`, the layout of TRACE (arXiv 2310.06762).

Each file is a UTF-8 JSON list of {"prompt": text, "answer": text or number}; other keys are ignored. Beside it may lie
    task.json    any of {"metric", "max_prompt_tokens", "max_answer_tokens", "max_new_tokens"}
    labels.json  the labels, as O-LoRA's benchmark has them: a list of texts, or an object id -> text or text -> id
A split without a file is simply not there: asking for it names the ones that are.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mora_jax.benchmarks.stream import SPLITS, Example, Task
from mora_jax.errors import MoraError
from mora_jax.metrics import text

DEFAULT_METRIC = "exact_match"
LIMITS = ("max_prompt_tokens", "max_answer_tokens", "max_new_tokens")
TASK_KEYS = ("metric", *LIMITS)
# More distinct train answers than this is free text, not a classification.
MOST_LABELS = 32


def _root(root: str) -> Path:
    layout = "the folder that holds <task>/{train,eval,test}.json"
    if not root:
        raise MoraError(f"benchmark.root is empty; set it to {layout}")
    path = Path(root).expanduser()
    if not path.is_dir():
        raise MoraError(f"benchmark.root {root!r} is no folder; set it to {layout}")
    return path


def _has_split(folder: Path) -> bool:
    return any((folder / f"{split}.json").is_file() for split in SPLITS)


def task_names(root: str) -> tuple[str, ...]:
    """The sorted names of the folders under `root` with at least one split file; MoraError if there are none."""
    names = tuple(sorted(folder.name for folder in _root(root).iterdir() if _has_split(folder)))
    if not names:
        raise MoraError(
            f"benchmark.root {root!r} has no task: no folder in it holds train.json, eval.json or test.json"
        )
    return names


def _read_json(path: Path) -> Any:
    try:
        # utf-8-sig: a byte-order mark, which some editors write, is not content.
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise MoraError(f"{path}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise MoraError(f"{path}, line {error.lineno}, column {error.colno}: broken JSON: {error.msg}") from None
    except RecursionError:
        raise MoraError(f"{path}: broken JSON: brackets nested too deep") from None
    except ValueError as error:  # such as a number of more digits than Python reads
        raise MoraError(f"{path}: broken JSON: {error}") from None
    except OSError as error:
        raise MoraError(f"{path}: cannot be read: {error.strerror}") from None


def _is_number(value: Any) -> bool:
    """An int or float that a float can hold; not a bool, which is an int in Python but no number anyone meant."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _example(record: Any, where: str) -> Example:
    if not isinstance(record, dict):
        raise MoraError(f'{where}: {type(record).__name__} instead of an object with "prompt" and "answer"')
    for key in ("prompt", "answer"):
        if key not in record:
            raise MoraError(f'{where}: no "{key}"; each record needs "prompt" and "answer"')
    prompt, answer = record["prompt"], record["answer"]
    if not isinstance(prompt, str):
        raise MoraError(f'{where}: "prompt" is {json.dumps(prompt)[:40]}; legal: text')
    if not isinstance(answer, str) and not _is_number(answer):
        raise MoraError(f'{where}: "answer" is {json.dumps(answer)[:40]}; legal: text or a finite number')
    for key, text_of in (("prompt", prompt), ("answer", str(answer))):
        if any("\ud800" <= character <= "\udfff" for character in text_of):
            raise MoraError(
                f'{where}: "{key}" holds half of a character (a lone UTF-16 surrogate); legal: Unicode text'
            )
    return Example(prompt, str(answer))


def _examples(path: Path) -> tuple[Example, ...]:
    records = _read_json(path)
    if not isinstance(records, list):
        raise MoraError(f"{path}: {type(records).__name__} instead of a list of records")
    if not records:
        raise MoraError(f"{path}: an empty list; a split needs at least one record (or remove the file)")
    return tuple(_example(record, f"{path}, record {i} (from 0)") for i, record in enumerate(records))


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    settings = _read_json(path)
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


def _labels_from(path: Path) -> tuple[str, ...]:
    labels = _read_json(path)
    if isinstance(labels, dict):
        # Both directions are in use: {"0": "World"} and {"World": 0}.
        texts = all(isinstance(value, str) for value in labels.values())
        labels = list(labels.values() if texts else labels.keys())
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise MoraError(f"{path}: legal: a non-empty list of texts, or an object id -> text or text -> id")
    return tuple(labels)


def _labels(folder: Path, metric: str, train: tuple[Example, ...]) -> tuple[str, ...] | None:
    path = folder / "labels.json"
    if path.is_file():
        return _labels_from(path)
    answers = sorted({example.answer for example in train})
    if text.metric(metric).labels and 1 <= len(answers) <= MOST_LABELS:
        return tuple(answers)
    return None


def load_task(name: str, root: str, *, split_seed: int, metric: str | None) -> Task:
    """One task folder. Metric: `metric`, else task.json's, else exact_match. `split_seed` is unused here.

    Labels: labels.json's, else the distinct train answers if at most 32 and the metric suits labels, else None.
    MoraError names the file and the record for whatever is wrong in it.
    """
    del split_seed
    folder = _root(root) / name
    if not _has_split(folder):
        raise MoraError(f"task folder {folder} holds none of train.json, eval.json, test.json")
    settings = _settings(folder / "task.json")
    metric = metric or settings.get("metric", DEFAULT_METRIC)
    text.metric(metric)
    files = {split: folder / f"{split}.json" for split in SPLITS}
    splits = {split: _examples(path) for split, path in files.items() if path.is_file()}
    return Task(
        name=name,
        metric=metric,
        splits=splits,
        labels=_labels(folder, metric, splits.get("train", ())),
        **{key: settings.get(key) for key in LIMITS},
    )
