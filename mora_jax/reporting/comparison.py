"""The sections of a report on several runs, in the order of the page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mora_jax.metrics.continual import CONVENTIONS
from mora_jax.reporting.charts import Axis, Series, line_chart, scatter
from mora_jax.reporting.markup import Markup, breakable, el, number, section, table
from mora_jax.reporting.single import PERCENT, command, matrix, stream_ticks, task_curve
from mora_jax.reporting.workdir import Workdir
from mora_jax.runtime import storage

STREAM = ("benchmark", "tasks", "metric", "eval_examples")  # what runs must share before their scores compare
Runs = Sequence[tuple[str, Workdir]]  # each with a name of its own


def named(runs: Sequence[Workdir]) -> Runs:
    """Numbers the runs and names each by the end of its path, as much of it as tells them apart."""
    parts = [storage.absolute(run.path).parts for run in runs]
    depth = next(n for n in range(1, 99) if len({p[-n:] for p in parts}) == len(parts))
    return [(f"{i + 1} {Path(*p[-depth:])}", run) for i, (p, run) in enumerate(zip(parts, runs, strict=True))]


def heading(runs: Runs) -> Markup:
    """What is compared, and whether it may be."""
    methods = ", ".join(dict.fromkeys(run.results["method"] for _, run in runs))
    warnings = []
    unlike = [key for key in STREAM if len({repr(run.results.get(key)) for _, run in runs}) > 1]
    if unlike:
        warnings.append(f"These runs differ in {', '.join(unlike)}: their scores do not compare.")
    open_runs = [name for name, run in runs if not run.results["complete"]]
    if open_runs:
        warnings.append(f"Not finished, shown as far as they went: {', '.join(open_runs)}.")
    return el(
        "header",
        el("p", methods, class_="over"),
        el("h1", f"{len(runs)} runs side by side"),
        *(el("p", text, class_="warn") for text in warnings),
    )


def summaries(runs: Runs) -> Markup:
    """One row per run."""
    keys = list(dict.fromkeys(key for _, run in runs for key in run.results["summary"]))
    rows = [
        (
            breakable(name),
            run.results["method"],
            run.results["seed"],
            f"{run.taught}/{len(run.tasks)}",
            *(el("td", number(run.results["summary"].get(key), 2), class_="number") for key in keys),
        )
        for name, run in runs
    ]
    names = [el("span", breakable(key), title=CONVENTIONS.get(key)) for key in keys]
    conventions = el(
        "details",
        el("summary", "conventions"),
        el("dl", *(part for key in keys for part in (el("dt", key), el("dd", CONVENTIONS.get(key, ""))))),
    )
    header = ("run", "method", "seed", "tasks taught", *names)
    return section("Summary", table(header, rows, "plain"), conventions, note="Percent; differences in points.")


def trade(runs: Runs) -> Markup:
    """Plasticity against stability, and the mean over the stream."""
    clouds, left_out = [], []
    for name, run in runs:
        point = tuple(run.results["summary"].get(key) for key in ("learned", "backward_transfer"))
        clouds.append(Series(name, [] if None in point else [point]))
        left_out += [name] * (None in point)
    chart = scatter(
        clouds,
        Axis("learned, percent"),
        Axis("backward transfer, points"),
        title="Learned against backward transfer (up and right is better)",
    )
    longest = max(len(run.tasks) for _, run in runs)
    means = line_chart(
        [Series(name, list(enumerate(_means(run), 1))) for name, run in runs],
        Axis("after task", ticks=stream_ticks(longest)[1:]),
        Axis("percent", low=0, high=100),
        title="Mean score on the tasks taught so far",
    )
    missing = f"Without a point, as one of its two numbers is not defined: {', '.join(left_out)}." if left_out else ""
    return section("Learning and forgetting", el("div", chart, means, class_="pair"), note=missing)


def curves(runs: Runs) -> Markup:
    """One small chart per task, one line per run."""
    tasks = list(dict.fromkeys(task for _, run in runs for task in run.tasks))
    charts = [
        line_chart(
            [_curve(name, run, task) for name, run in runs],
            PERCENT._replace(ticks=stream_ticks(max(len(run.tasks) for _, run in runs))),
            Axis("percent", low=0, high=100),
            title=task,
        )
        for task in tasks
    ]
    note = "Score of one task over the stream (dashed: before it was taught)."
    return section("Tasks", el("div", *charts, class_="pair"), note=note)


def matrices(runs: Runs) -> Markup:
    """R of every run."""
    drawn = (el("figure", el("figcaption", name, el("span", run.results["method"])), matrix(run)) for name, run in runs)
    note = "R in percent: row = after training that task, column = evaluated task; outlined: just taught."
    return section("Matrices", el("div", *drawn, class_="pair"), note=note)


def differences(runs: Runs) -> Markup:
    """The keys of config, versions and machine in which the runs differ."""
    flat = [
        {"device": run.results["device"]}
        | _flatten(run.results["versions"], "versions.")
        | _flatten(run.results["config"])
        for _, run in runs
    ]
    keys = [key for key in sorted(set().union(*flat)) if len({repr(values.get(key)) for values in flat}) > 1]
    rows = [(breakable(key), *(el("td", str(values.get(key, "·"))) for values in flat)) for key in keys]
    header = ("key", *(breakable(name) for name, _ in runs))
    shown = table(header, rows, "plain") if rows else el("p", "Nothing: config, versions and device are the same.")
    commands = (part for name, run in runs for part in (el("dt", name), el("dd", command(run))))
    return section("What differs", shown, el("details", el("summary", "commands"), el("dl", *commands)))


PARTS: Sequence[Callable[[Runs], Markup]] = (heading, summaries, trade, matrices, curves, differences)


def sections(runs: Sequence[Workdir]) -> list[Markup]:
    """The page of several runs, from top to bottom."""
    known = named(runs)
    return [draw(known) for draw in PARTS]


def _means(run: Workdir) -> list[float]:
    R = run.results["R"] or []
    rows = [R[t][: t + 1] for t in range(run.taught)]
    return [statistics.fmean(row) for row in rows if None not in row]


def _curve(name: str, run: Workdir, task: str) -> Series:
    if task not in run.tasks:
        return Series(name, [])
    return task_curve(name, run, run.tasks.index(task))


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
