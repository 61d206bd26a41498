"""Workdirs made by hand, and what a browser would find in the report of one."""

from __future__ import annotations

import base64
import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from mora_jax.data.images import png
from mora_jax.metrics import continual
from mora_jax.reporting import page
from mora_jax.runtime.writers import row_name, write_json, write_lines

TASKS = ["colours", "digits", "moods"]
R = [[71.25, None, None], [64.5, 33.125, None], [60.0, 30.5, 88.875]]
SUMMARY = continual.summary(np.array([[float("nan") if v is None else v for v in row] for row in R]))


def share(**mass: float) -> dict[str, Any]:
    return {"active_experts_mean": 2.5, "tokens_without_expert": 0.125, "mass": mass}


GATES = [
    {"task": "colours", "experts_per_site": 8, **share(colours=1.0), "on": {"colours": share(colours=1.0)}},
    {
        "task": "digits",
        "experts_per_site": 16,
        **share(colours=0.75, digits=0.25),
        "on": {"colours": share(colours=0.875, digits=0.125), "digits": share(colours=0.5, digits=0.5)},
    },
]
RESULTS: dict[str, Any] = {
    "benchmark": "folder",
    "tasks": TASKS,
    "metric": ["choice", "last_number", "fuzzy"],
    "baselines": {"majority": [51.5, None, None], "zero_shot_lenient": [21.75, 5.25, 7.5]},
    "method": "mora",
    "model": "tiny",
    "seed": 3,
    "config": {"train": {"learning_rate": 0.002}, "seed": 3},
    "versions": {"mora_jax": "0.1.0", "jax": "9.8.7"},
    "trainable_parameters": 1234567,
    "sites": 8,
    "eval_examples": [2, 2, 2],
    "device": "cpu cpu x 1 (some core)",
    "command": "python -m mora_jax.train --config=a.py --workdir=w",
    "R": R,
    "zero_shot": [11.5, 2.25, 0.0],
    "summary": SUMMARY,
    "gates": GATES,
    "train_traces": 1,
    "wall_seconds": 12.3,
    "complete": True,
}
STEPS = [{"step": i + 1, "task": TASKS[i // 4], "loss": 6.0 / (i + 1)} for i in range(12)]
ANSWERS = [
    {"prompt": "sky ->", "answer": " blue", "prediction": " blue", "score": 1.0},
    {"prompt": "sun ->", "answer": " red", "prediction": " rood", "score": 0.5},
]
MAP = {
    "task": "digits",
    "layer": 1,
    "truncated": False,
    "tokens": ["one", " two", "\n"],
    "origins": ["colours", "colours", "digits", "digits"],
    "sites": {"attn/q": [[0, 1, 0.9], [1, 2, 0.25]]},
}
PICTURED = {
    "task": "colours",
    "layer": 1,
    "truncated": False,
    "tokens": ["class", "row 1, column 1", "row 1, column 2", "row 2, column 1", "row 2, column 2"],
    "picture": base64.b64encode(png(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))).decode("ascii"),
    "origins": ["colours", "colours", "digits", "digits"],
    "sites": {"vision/attn/q": [[1, 0, 0.5], [1, 1, 0.25], [2, 3, 0.25], [4, 1, 0.5]]},
}


def make(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """A workdir as a run leaves it; `changes` go into results.json."""
    results = copy.deepcopy(RESULTS) | (changes or {})
    tasks = results["tasks"]
    write_json(folder / "results.json", results)
    write_lines(folder / "metrics.jsonl", STEPS)
    for row in ("00_zero_shot", row_name(2, tasks)):
        write_lines(folder / "predictions" / row / f"{tasks[0]}.jsonl", ANSWERS)
    write_lines(folder / "gates" / f"{row_name(2, tasks)}.jsonl", [MAP])
    return folder


class Page(HTMLParser):
    """What a browser would find: balanced elements, cells of tables, texts, embedded data."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.data: Any = None
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "wbr"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"] and dict(self.elements[-1][1]).get("type") == "application/json":
            self.data = json.loads(data)
            return
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += data + " "

    def row(self, name: str) -> list[str]:
        (found,) = [row for row in self.rows if row[0] == name]
        return found[1:]


def drawn(*folders: Path) -> Page:
    return Page(page.write(list(folders), folders[0].parent / "out.html").read_text(encoding="utf-8"))
