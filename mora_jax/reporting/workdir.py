"""Reads what a run left in its workdir, and says in one line what is wrong with it."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mora_jax.errors import MoraError
from mora_jax.runtime import storage
from mora_jax.runtime.writers import ZERO_SHOT_ROW, read_lines, row_name


@dataclasses.dataclass(frozen=True)
class Workdir:
    """One run. `predictions` and `gate_maps` hold what is there; an unfinished run has less of everything.

    gate_maps: rows of R -> maps of one record each: of all tasks under the last row, of its own task under another.
    """

    path: Path
    results: dict[str, Any]
    steps: list[dict[str, Any]]
    predictions: dict[str, dict[str, list[dict[str, Any]]]]  # row -> task -> records
    gate_maps: dict[str, list[dict[str, Any]]]

    @property
    def tasks(self) -> list[str]:
        return self.results["tasks"]

    @property
    def name(self) -> str:
        return storage.absolute(self.path).name

    @property
    def taught(self) -> int:
        """How many tasks have their row in R."""
        R = self.results["R"] or []
        return sum(row[i] is not None for i, row in enumerate(R))

    @property
    def last_row(self) -> list[float | None] | None:
        """The newest row of R, or None before the first."""
        return self.results["R"][self.taught - 1] if self.taught else None


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0


def _score(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value))


def _scores(value: Any, tasks: int) -> bool:
    return isinstance(value, list) and len(value) == tasks and all(map(_score, value))


def _matrix(value: Any, tasks: int) -> bool:
    return value is None or (
        isinstance(value, list) and len(value) == tasks and all(_scores(row, tasks) for row in value)
    )


def _texts(value: Any, tasks: int) -> bool:
    return isinstance(value, list) and len(value) == tasks > 0 and all(isinstance(text, str) for text in value)


def _numbers(value: Any, tasks: int) -> bool:
    return _scores(value, tasks) and None not in value


def _shares(entry: Any) -> bool:
    """One entry of `gates`, or one of its `on`."""
    keys = ("active_experts_mean", "tokens_without_expert", "mass")
    if not isinstance(entry, dict) or any(key not in entry for key in keys):
        return False
    mass = entry["mass"]
    return all(_score(entry[key]) for key in keys[:2]) and (
        mass is None or (isinstance(mass, dict) and all(map(_score, mass.values())))
    )


def _gates(value: Any) -> bool:
    """Runs before 0.1.0 have none; there is none for a method without gates."""
    return value is None or (
        isinstance(value, list)
        and all(_shares(row) and {"task", "experts_per_site", "on"} <= set(row) for row in value)
        and all(_shares(entry) for row in value for entry in row["on"].values())
    )


def _inside(row: dict[str, Any]) -> bool:
    """Whether every cell of a gate map lies in it."""
    limits = [range(len(row["tokens"])), range(len(row["origins"]))]
    names = all(isinstance(text, str) for text in (*row["tokens"], *row["origins"]))
    cells = [cell for site in row["sites"].values() for cell in (site if isinstance(site, list) else [None])]
    return names and all(
        isinstance(cell, list)
        and len(cell) == 3
        and all(at in limit for at, limit in zip(cell[:2], limits, strict=True))
        and _numbers(cell[2:], 1)
        for cell in cells
    )


def _square(row: dict[str, Any]) -> bool:
    """Whether the tokens of a map are those of its picture, where it has one; maps before CLIP have no such key."""
    picture, patches = row.get("picture"), len(row["tokens"]) - 1
    if picture is None:
        return True
    try:
        png = base64.b64decode(picture, validate=True)
    except (TypeError, ValueError):
        return False
    return png.startswith(PNG) and patches > 0 and math.isqrt(patches) ** 2 == patches


def _text(value: Any, tasks: int) -> bool:
    return isinstance(value, str)


PNG = b"\x89PNG\r\n\x1a\n"
# What a report cannot do without: key of results.json -> (is it legal, given the number of tasks; in words).
NEEDED: Mapping[str, tuple[Callable[[Any, int], bool], str]] = {
    "tasks": (_texts, "a list of names"),
    "metric": (_texts, "a list with one name per task"),
    "R": (_matrix, "null or one row per task with one number or null per task"),
    "zero_shot": (_scores, "one number or null per task"),
    "summary": (
        lambda v, tasks: isinstance(v, dict) and all(map(_score, v.values())),
        "an object of numbers or null",
    ),
    "baselines": (
        lambda v, tasks: isinstance(v, dict) and all(_scores(row, tasks) for row in v.values()),
        "an object with one number or null per task under each name",
    ),
    "config": (lambda v, tasks: isinstance(v, dict), "an object"),
    "versions": (lambda v, tasks: isinstance(v, dict), "an object"),
    "seed": (lambda v, tasks: isinstance(v, int), "a whole number"),
    "complete": (lambda v, tasks: isinstance(v, bool), "true or false"),
    "eval_examples": (_numbers, "one number per task"),
    **dict.fromkeys(
        ("trainable_parameters", "sites", "train_traces", "wall_seconds"),
        (lambda v, tasks: _numbers([v], 1), "a number"),
    ),
    **dict.fromkeys(("benchmark", "method", "model", "device", "command"), (_text, "a text")),
}
# What a line of the other files must hold: key -> type.
STEP = {"step": int, "task": str, "loss": (int, float)}
PREDICTION = {"prompt": str, "answer": str, "prediction": str, "score": (int, float)}
GATE_MAP = {"task": str, "layer": int, "truncated": bool, "tokens": list, "origins": list, "sites": dict}


def read(path: Path) -> Workdir:
    """The run in a workdir. Raises MoraError for a folder without results.json and for files that cannot be drawn."""
    file = path / "results.json"
    if not file.is_file():
        there = "is no folder" if not path.is_dir() else "holds no results.json"
        raise MoraError(f"{path} {there}; expected the --workdir of a train run that has got past its zero-shot row")
    results = _json(file)
    tasks = results.get("tasks") if isinstance(results, dict) else None
    for key, (legal, words) in NEEDED.items():
        if not isinstance(results, dict) or key not in results or not legal(results[key], _length(tasks)):
            raise MoraError(f"{file}: {key} must be {words}")
    if not _gates(results.get("gates")):
        raise MoraError(f"{file}: gates must be null or a list with one object per evaluated row")
    rows = [ZERO_SHOT_ROW, *(row_name(i, tasks) for i in range(len(tasks)))]
    predictions = {
        row: {
            task: _records(path / "predictions" / row / f"{task}.jsonl", PREDICTION)
            for task in tasks
            if (path / "predictions" / row / f"{task}.jsonl").is_file()
        }
        for row in rows
    }
    return Workdir(
        path=path,
        results=results,
        steps=_steps(path / "metrics.jsonl"),
        predictions={row: found for row, found in predictions.items() if found},
        gate_maps={row: maps for row in rows[1:] if (maps := _gate_maps(path / "gates" / f"{row}.jsonl"))},
    )


def _gate_maps(file: Path) -> list[dict[str, Any]]:
    """The maps of one row of R, none where there is no file."""
    maps = _records(file, GATE_MAP) if file.is_file() else []
    for number, row in enumerate(maps, 1):
        if not _inside(row):
            raise MoraError(f"{file} line {number}: sites must hold [token, expert, gate] of its tokens and origins")
        if not _square(row):
            raise MoraError(f"{file} line {number}: picture must be null or a PNG with a class token and n x n patches")
    return maps


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as problem:
        raise MoraError(f"{file} cannot be read: {problem}") from None


def _steps(file: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, which a running or killed process may have left with half a last line."""
    rows = read_lines(file)
    for number, row in enumerate(rows, 1):
        _check(file, number, row, STEP)
    return rows


def _records(file: Path, kinds: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file that is only ever written whole."""
    rows = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # splitlines would cut at U+2028 inside a text
    except (ValueError, OSError) as problem:
        raise MoraError(f"{file} cannot be read: {problem}") from None
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as problem:
            raise MoraError(f"{file} line {number} is not JSON: {problem}") from None
        _check(file, number, rows[-1], kinds)
    return rows


def _check(file: Path, number: int, row: Any, kinds: Mapping[str, Any]) -> None:
    legal = row if isinstance(row, dict) else {}
    legal = {key: value for key, value in legal.items() if not isinstance(value, float) or math.isfinite(value)}
    wrong = [key for key, kind in kinds.items() if not isinstance(legal.get(key), kind)]
    if wrong:
        raise MoraError(f"{file} line {number} has no usable {', '.join(wrong)}")
