"""Steps in flight: metrics stay on the device until their step has ended, yet a broken loss stops the run at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mora_jax.errors import MoraError
from mora_jax.runtime.writers import MetricsLog


class StepLog:
    """Collects the metrics of dispatched steps in order and writes a row for each, in groups of `every`.

    `rate` is the count of a row by which its speed is told.
    """

    def __init__(self, log: MetricsLog, every: int, advance: Callable[[int, str], None], rate: str):
        self._log, self._every, self._advance, self._rate = log, every, advance, rate
        self._flying: list[tuple[dict[str, Any], Mapping[str, jax.Array]]] = []
        self._rows: list[dict[str, Any]] = []
        self._last = time.monotonic()

    def add(self, row: dict[str, Any], metrics: Mapping[str, jax.Array]) -> None:
        """A step that was dispatched: what is known of it on the host, and its metrics on the device."""
        self._flying.append((row, metrics))

    def settle(self, in_flight: int) -> None:
        """Waits until at most `in_flight` steps are under way. MoraError for a loss or update that is not finite."""
        while len(self._flying) > in_flight:
            row, metrics = self._flying.pop(0)
            row |= {name: float(value) for name, value in jax.device_get(metrics).items()}
            for name, what in (("loss", "loss"), ("fresh_norm", "the norm of the fresh experts")):
                if not np.isfinite(row[name]):
                    self.flush()
                    where = f"step {row['step']} (step {row['task_step']} of task {row['task']})"
                    raise MoraError(
                        f"{what} is {row[name]} at {where} with train.learning_rate={row['learning_rate']:g}; "
                        "stopped before another checkpoint was taken, the earlier ones are intact"
                    )
            now = time.monotonic()
            seconds, self._last = now - self._last, now
            speed = round(row[self._rate] / seconds, 1)
            row |= {"seconds": round(seconds, 4), f"{self._rate}_per_second": speed}
            self._rows.append(row)
            self._advance(1, f"loss {row['loss']:.3f}  {speed:.0f} {self._rate}/s")
            if len(self._rows) >= self._every:
                self.flush()

    def flush(self) -> None:
        """Writes the rows of all settled steps."""
        self._log.write(self._rows)
        self._rows = []

    def restart_clock(self) -> None:
        """The time until now belongs to something else, such as a checkpoint."""
        self._last = time.monotonic()
