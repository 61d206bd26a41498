"""What a person sees: tables, progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mora_jax.metrics.continual import CONVENTIONS
from mora_jax.runtime import hosts

# Colours of R from poor to good, on a dark and on a light terminal: (at least so many percent, style).
SHADES = ((80, "bold green"), (60, "green"), (40, "yellow"), (20, "dark_orange"), (0, "red"))


class Display:
    """Prints to one console, of the first process only; width 120 where the output is not a terminal."""

    def __init__(self) -> None:
        quiet = not hosts.first()
        self.console = Console(highlight=False, quiet=quiet)
        if not self.console.is_terminal:
            self.console = Console(highlight=False, width=120, quiet=quiet)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def facts(self, title: str, rows: Mapping[str, str]) -> None:
        """A table of two columns."""
        table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
        for name, value in rows.items():
            table.add_row(escape(name), escape(value))
        self.console.print(table)

    @contextlib.contextmanager
    def progress(self, what: str, unit: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        """Yields `advance(n, note)`: a bar with time left on a terminal, now and then a line elsewhere."""
        if not self.console.is_terminal:
            yield self._lines(what, unit, total, done)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(escape(f"{what} ({unit})"), total=total, completed=done, note="")
            yield lambda n, note="": bar.update(task, advance=n, note=note)

    def _lines(self, what: str, unit: str, total: int, done: int) -> Callable[[int, str], None]:
        every = max(1, math.ceil(total / 4))

        def advance(n: int, note: str = "") -> None:
            nonlocal done
            before, done = done, done + n
            if done // every > before // every or done == total:
                self.say(f"{what}: {done}/{total} {unit} {note}".rstrip())

        return advance

    def matrix(
        self, tasks: Sequence[str], zero_shot: Sequence[float | None], R: Sequence[Sequence[float | None]] | None
    ):
        """R with one row per taught task, the zero-shot row first; colour says how good, bold column = just taught."""
        table = Table(
            title="R: percent on each task (column) after each training (row)", title_justify="left", title_style="bold"
        )
        table.add_column("after")
        for name in tasks:
            table.add_column(escape(name), justify="right")
        table.add_row("zero-shot", *map(_shade, zero_shot), end_section=True)
        for name, row in zip(tasks, R or [], strict=False):
            if any(value is not None for value in row):
                table.add_row(escape(name), *map(_shade, row))
        self.console.print(table)

    def scores(self, tasks: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> None:
        """Percent on each task (column), a row for each state of the bank."""
        table = Table(title="percent on each task after ...", title_justify="left", title_style="bold")
        table.add_column("after")
        for name in tasks:
            table.add_column(escape(name), justify="right")
        for name, row in rows.items():
            table.add_row(escape(name), *map(_shade, row))
        self.console.print(table)

    def gains(
        self,
        tasks: Sequence[str],
        what: str,
        final: Sequence[float | None],
        baselines: Mapping[str, Sequence[float | None]],
    ) -> None:
        """One row of scores beside each baseline and the gain over it, in percentage points."""
        table = Table(title=f"{what}, and gain in points over ...", title_justify="left", title_style="bold")
        table.add_column("task")
        table.add_column("score", justify="right")
        for name in baselines:
            table.add_column(name, justify="right")
        for i, task in enumerate(tasks):
            cells = [_gain(final[i], values[i]) for values in baselines.values()]
            table.add_row(escape(task), _shade(final[i]), *cells)
        self.console.print(table)

    def summary(self, summary: Mapping[str, Any]) -> None:
        """The scores of `metrics.continual`, with their conventions."""
        table = Table(title="summary (percent)", title_justify="left", title_style="bold", show_header=False)
        for name, value in summary.items():
            table.add_row(name, "-" if value is None else f"{value:.2f}", CONVENTIONS[name])
        self.console.print(table)


def _shade(value: float | None) -> str:
    if value is None:
        return "[dim]·[/]"
    style = next(style for least, style in SHADES if value >= least)
    return f"[{style}]{value:.1f}[/]"


def _gain(value: float | None, baseline: float | None) -> str:
    if value is None or baseline is None:
        return "[dim]·[/]"
    gain = value - baseline
    style = "green" if gain > 0 else "red" if gain < 0 else "dim"
    return f"{baseline:.1f} [{style}]{gain:+.1f}[/]"
