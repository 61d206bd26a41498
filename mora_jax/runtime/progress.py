"""How far a run has come: everything a checkpoint stores beside arrays; and how it is asked to stop."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from mora_jax.metrics import continual
from mora_jax.runtime import hosts
from mora_jax.runtime.family import GateCounts

EVALUATED = ("zero_shot", "zero_shot_lenient", "truncated", "skipped", "wall_seconds")  # what evaluations change


@dataclasses.dataclass
class Progress:
    """Counted from 0; task -1 is the zero-shot row. `phase`: training, trained (frozen, not evaluated) or evaluated."""

    task: int = -1
    phase: str = "training"
    step: int = 0  # global: over all tasks
    task_step: int = 0
    data: dict[str, Any] | None = None  # position of the Grain iterator
    zero_shot: list[float | None] = dataclasses.field(default_factory=list)
    zero_shot_lenient: list[float | None] = dataclasses.field(default_factory=list)
    R: list[list[float | None]] = dataclasses.field(default_factory=list)
    gates: list[list[list | None]] = dataclasses.field(default_factory=list)  # GateCounts of every entry of R
    truncated: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)  # task -> split -> prompts
    skipped: dict[str, dict[str, list[str]]] = dataclasses.field(default_factory=dict)  # sources that cannot be read
    task_seconds: list[float] = dataclasses.field(default_factory=list)
    wall_seconds: float = 0.0
    train_traces: int = 0  # the most that any process needed

    def widen(self, tasks: int) -> None:
        """Makes room for all tasks of the stream; what has not been measured is None."""
        for row in (self.zero_shot, self.zero_shot_lenient, *self.R, *self.gates):
            row.extend([None] * (tasks - len(row)))
        for matrix in (self.R, self.gates):
            matrix.extend([None] * tasks for _ in range(tasks - len(matrix)))
        self.task_seconds.extend([0.0] * (tasks - len(self.task_seconds)))

    def row(self) -> dict[str, Any]:
        """What has changed since the task was trained: the zero-shot row, and that of the task."""
        row = {"R": self.R[self.task], "gates": self.gates[self.task]} if self.task >= 0 else {}
        return row | {name: getattr(self, name) for name in EVALUATED}

    def with_row(self, row: Mapping[str, Any] | None) -> Progress:
        """This, with what `row()` gave later in the same task, if anything."""
        for name in EVALUATED if row else ():
            setattr(self, name, row[name])
        if row and self.task >= 0:
            self.R[self.task], self.gates[self.task] = row["R"], row["gates"]
        return self

    def skip(self, task: str, split: str, sources: Iterable[str]) -> None:
        """Notes records that could not be read; a resumed run meets some of them again."""
        splits = self.skipped.setdefault(task, {})
        splits[split] = sorted({*splits.get(split, ()), *sources})

    def matrix(self) -> np.ndarray:
        """R as floats, NaN where not evaluated."""
        return np.array([[np.nan if v is None else v for v in row] for row in self.R], float)

    def summary(self, trains: bool) -> dict[str, float | None]:
        """The scores of the finished part of the stream: tasks that have their row in R."""
        if not trains:
            known = [value for value in self.zero_shot if value is not None]
            return (
                continual.summary_of_zero_shot(np.array(known))
                if known
                else dict.fromkeys(continual.summary(np.ones((1, 1))))
            )
        taught = self.task + (self.phase == "evaluated")
        if taught < 1:
            return dict.fromkeys(continual.summary(np.ones((1, 1))))
        return continual.summary(self.matrix()[:taught, :taught])

    def gate_row(self, row: int) -> dict[int, GateCounts]:
        """What the gates did on each task that row `row` was evaluated on; empty where the method has none."""
        counts = {i: GateCounts(*entry[:3], tuple(entry[3])) for i, entry in enumerate(self.gates[row]) if entry}
        return {i: count for i, count in counts.items() if count.pairs}

    def gate_report(self) -> tuple[float | None, float | None]:
        """(mean active experts, share of none) per prompt token and site, over the newest evaluated row."""
        rows = [row for row in map(self.gate_row, range(len(self.gates))) if row]
        if not rows:
            return None, None
        total = sum(rows[-1].values(), GateCounts())
        return total.active / total.pairs, total.none / total.pairs


class StopSignals:
    """Turns SIGTERM and SIGINT into a request that the loop answers at its next safe place.

    Of several processes each may be asked: JAX's preemption service hears SIGTERM, tells the others and finds a place
    that none of them has passed.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._places = 0
        for number in (signal.SIGINT,) if hosts.several() else (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None:  # asked twice: stop now
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
        if hosts.several():
            os.kill(os.getpid(), signal.SIGTERM)

    def here(self) -> bool:
        """Whether to stop here: on all processes alike, so all must ask at the same places."""
        if not hosts.several():
            return self.received is not None
        self._places += 1
        return multihost_utils.reached_preemption_sync_point(self._places)


class Stopped(Exception):
    """The run was asked to stop, and every step and every entry of R that it has is saved."""
