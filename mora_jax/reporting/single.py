"""The sections of one run's report, in the order of the page."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from mora_jax.metrics.continual import CONVENTIONS
from mora_jax.reporting import gatemaps
from mora_jax.reporting.charts import Axis, Series, line_chart, share_bars
from mora_jax.reporting.markup import Markup, breakable, el, embedded, heat_table, number, section, table
from mora_jax.reporting.workdir import Workdir
from mora_jax.runtime.results import variants_of
from mora_jax.runtime.writers import ZERO_SHOT_ROW, row_name

LOSS_POINTS = 400  # drawn of a longer loss curve, each the mean of the steps around it
EXAMPLES = 100  # predictions shown of each task in each row
LETTERS = 4000  # of a prompt, from its end
PERCENT = Axis("after task (0 = zero-shot)", low=0, high=100)


def claim(run: Workdir) -> Markup:
    """What was run, on what, by which command."""
    r = run.results
    versions = ", ".join(f"{name} {version}" for name, version in r["versions"].items())
    score, tasks = r["summary"].get("overall_performance"), len(run.tasks)
    reached = "no score yet" if score is None else f"overall performance {number(score)}\u00a0%"
    stream = "1 task" if tasks == 1 else f"{tasks} tasks"
    facts = {
        "method": r["method"],
        "model": r["model"],
        "benchmark": f"{r['benchmark']}: {' → '.join(run.tasks)}",
        **({"data": said} if (said := variants_of(run.tasks, r.get("variant", [""] * tasks))) else {}),
        "seed": r["seed"],
        "device": r["device"],
        "versions": versions,
        "trained": f"{r['trainable_parameters']:,} parameters per task at {r['sites']} sites",
        "time": f"{number(r['wall_seconds'], 0)} s, train step traced {r['train_traces']}x",
        "command": command(run),
    }
    items = (part for name, value in facts.items() for part in (el("dt", name), el("dd", value)))
    return el(
        "header",
        el("p", f"{r['method']} on {r['model']}, {stream} of {r['benchmark']}, seed {r['seed']}", class_="over"),
        el("h1", reached),
        unfinished(run),
        el("dl", *items),
    )


def command(run: Workdir) -> Markup:
    """The command line, to be broken between its words only."""
    return el("code", *(part for word in run.results["command"].split(" ") for part in (el("span", word), " ")))


def unfinished(run: Workdir) -> Markup | None:
    """A word of warning where the run has not come to its end."""
    if run.results["complete"]:
        return None
    done = f"{run.taught} of {len(run.tasks)} tasks taught and evaluated"
    return el("p", f"This run is not finished: {done}. Everything below stands as far as it went.", class_="warn")


def summary(run: Workdir) -> Markup:
    """The numbers of `metrics.continual`, each with its convention."""
    rows = [
        (breakable(name), el("td", number(value, 2), class_="number"), CONVENTIONS.get(name, ""))
        for name, value in run.results["summary"].items()
    ]
    examples = run.results["eval_examples"]
    note = "Percent; differences in points. A dot is a number that is not defined or not measured yet."
    if min(examples) > 0:
        bound = 50 / math.sqrt(min(examples))
        note += (
            f" {min(examples)} evaluated examples in the smallest task: "
            f"the standard error of a task's score is at most {bound:.1f} points."
        )
    return section("Summary", table(("score", "value", "convention"), rows, "plain words"), note=note)


def matrix(run: Workdir) -> Markup:
    """R with the zero-shot row first."""
    R, tasks = run.results["R"] or [], run.tasks
    rows = [("zero-shot", run.results["zero_shot"])]
    rows += [(_numbered(i, tasks), row) for i, row in enumerate(R) if any(v is not None for v in row)]
    marked = [(i, i - 1) for i in range(1, len(rows))]
    columns = [_numbered(i, tasks) for i in range(len(tasks))]
    return heat_table("after ↓ on →", columns, rows, marked)


def scores(run: Workdir) -> Markup:
    """R, and what it says over the stream and against the baselines."""
    curves = line_chart(
        [task_curve(f"{i + 1} {task}", run, i) for i, task in enumerate(run.tasks)],
        PERCENT._replace(ticks=stream_ticks(len(run.tasks))),
        Axis("percent", low=0, high=100),
        title="Score of each task over the stream (dashed: before it was taught)",
    )
    return section(
        "Scores",
        matrix(run),
        el("div", curves if run.results["R"] else None, gains(run), class_="pair"),
        note="R in percent: row = after training that task, column = evaluated task; outlined: just taught.",
    )


def task_curve(name: str, run: Workdir, index: int) -> Series:
    """Column `index` of R as a line from the row that taught it on; what was measured before leads to it."""
    points = [(t + 1, row[index]) for t, row in enumerate(run.results["R"] or []) if row[index] is not None]
    zero_shot = run.results["zero_shot"][index]
    before = [(0, zero_shot)] if zero_shot is not None else []
    since = [p for p in points if p[0] > index]
    return Series(name, since, before + [p for p in points if p[0] <= index] + since[:1])


def gains(run: Workdir) -> Markup:
    """The newest row of R beside each baseline, with the gain over it."""
    baselines = {"zero-shot": run.results["zero_shot"]}
    names = {"zero_shot_lenient": "zero-shot, lenient"}
    others = sorted(run.results["baselines"].items())  # pictures are scored in one way: no lenient column beside it
    baselines |= {names.get(name, name): values for name, values in others if values != baselines["zero-shot"]}
    final = run.last_row or [None] * len(run.tasks)
    rows = []
    for i in range(len(run.tasks)):
        cells = [_gain(final[i], values[i]) for values in baselines.values()]
        metric = el("small", " ", run.results["metric"][i])
        rows.append((el("span", _numbered(i, run.tasks), metric), number(final[i]), *cells))
    last = "last" if run.results["complete"] else "newest"
    title = f"Gain of the {last} row of R over the baselines" if run.results["R"] else "Baselines"
    caption = el("figcaption", title, el("span", "baseline in percent, gain in points"))
    return el("figure", caption, table(("task", "score", *baselines), rows, "plain gains"))


def training(run: Workdir) -> Markup | None:
    """The loss of every step, with the boundaries between tasks."""
    if not run.steps:
        return None
    raw = [(step["step"], step["loss"]) for step in run.steps]
    width = math.ceil(len(raw) / LOSS_POINTS)
    points = [_mean(raw[i : i + width]) for i in range(0, len(raw), width)]
    half = max(1, len(points) // 40)
    smooth = [
        (x, statistics.fmean(y for _, y in points[max(0, i - half) : i + half + 1])) for i, (x, _) in enumerate(points)
    ]
    starts = [i for i, step in enumerate(run.steps) if i == 0 or step["task"] != run.steps[i - 1]["task"]]
    regions = [(raw[i][0], _place(run.steps[i]["task"], run.tasks)) for i in starts]
    chart = line_chart(
        [Series("loss", smooth, marks=len(smooth) == 1, faint=points)],
        Axis("train step, all tasks"),
        Axis("loss", low=0),
        regions=regions,
        title="Training loss (thin: as logged; thick: running mean; numbers: tasks)",
    )
    return section("Training", el("div", chart, class_="pair"))


def gates(run: Workdir) -> Markup | None:
    """How many experts answer, whose they are, and for how many tokens there is none."""
    rows = run.results.get("gates")
    if not rows:
        return None
    bank = [(row["experts_per_site"], row) for row in rows]
    axis = Axis("experts per site", ticks=[(n, str(n)) for n, _ in bank])
    active = line_chart(
        [Series("active", [(n, row["active_experts_mean"]) for n, row in bank])],
        axis,
        Axis("per token and site", low=0),
        title="Active experts against bank size",
    )
    none = line_chart(
        [Series("none", [(n, 100 * row["tokens_without_expert"]) for n, row in bank])],
        axis,
        Axis("percent of tokens and sites", low=0),
        title="Tokens without any active expert against bank size",
    )
    entries = [entry for row in rows for entry in (row, *row["on"].values())]
    origins = list(dict.fromkeys(name for entry in entries for name in entry["mass"] or {}))
    after = [(f"after {_place(row['task'], run.tasks)} {row['task']}", row["mass"]) for row in rows]
    asked = [(f"on {_place(task, run.tasks)} {task}", entry["mass"]) for task, entry in rows[-1]["on"].items()]
    bars = (
        el("figure", el("figcaption", title, el("span", "percent of gate mass")), share_bars(shares, origins))
        for title, shares in (
            ("Gate mass by task of origin, after each task", after),
            ("The same after the newest task, by the task that is asked", asked),
        )
    )
    note = (
        "Over what the model reads of the evaluated examples (of CLIP also the class texts) and all sites; "
        "a gate of next to nothing does not count as active. A colour is the task whose training made the expert."
    )
    return section("Gates", el("div", active, none, *bars, class_="pair"), gatemaps.draw(run), note=note)


def predictions(run: Workdir) -> Markup | None:
    """Every answer, to browse: data for the script of the page."""
    if not run.predictions:
        return None
    texts: dict[str, int] = {}  # prompts and answers come again in every row
    rows, cut = [], False
    titles = {ZERO_SHOT_ROW: "zero-shot"}
    titles |= {row_name(i, run.tasks): f"after {i + 1} {task}" for i, task in enumerate(run.tasks)}
    for row, tasks in run.predictions.items():
        found = []
        for task, records in tasks.items():
            cut |= len(records) > EXAMPLES
            shown = [
                [
                    texts.setdefault(_end(record["prompt"]), len(texts)),
                    texts.setdefault(record["answer"], len(texts)),
                    texts.setdefault(record["prediction"], len(texts)),
                    record["score"],
                ]
                for record in records[:EXAMPLES]
            ]
            found.append({"name": task, "of": len(records), "shown": shown})
        rows.append({"name": titles[row], "tasks": found})
    limit = f" The first {EXAMPLES} of each task are here, all of them in the folder predictions." if cut else ""
    filters = (el("option", text, value=value) for value, text in FILTERS.items())
    return section(
        "Predictions",
        el(
            "div",
            el("label", "row ", el("select", id="row")),
            el("label", "task ", el("select", id="task")),
            el("label", "show ", el("select", *filters, id="filter")),
            el("span", id="count", role="status"),
            class_="choose",
        ),
        el("noscript", el("p", "Browsing needs JavaScript; the same answers are in the folder predictions.")),
        el("div", id="answers"),
        el("button", "more", id="more", type="button", hidden="hidden"),
        embedded("predictions", {"texts": list(texts), "rows": rows}),
        note=f"Right is a score of 1, wrong a score of 0, partly right anything between.{limit}",
    )


FILTERS = {"all": "all", "right": "right", "partly": "partly right", "wrong": "wrong"}


def configuration(run: Workdir) -> Markup:
    """The whole config, folded away."""
    text = json.dumps(run.results["config"], indent=2, ensure_ascii=False)
    return section("Config", el("details", el("summary", "all keys"), el("pre", text)))


def sections(run: Workdir) -> list[Markup]:
    """The page of one run, from top to bottom."""
    parts = (claim, summary, scores, training, gates, predictions, configuration)
    return [part for draw in parts if (part := draw(run))]


def stream_ticks(tasks: int) -> list[tuple[float, str]]:
    """0 for zero-shot, then the tasks; not every one is named where there are many."""
    every = math.ceil((tasks + 1) / 16)
    return [(i, str(i) if i % every == 0 else "") for i in range(tasks + 1)]


def _numbered(index: int, tasks: Sequence[str]) -> Markup:
    return el("span", f"{index + 1} ", breakable(tasks[index]))


def _place(task: str, tasks: Sequence[str]) -> str:
    return str(tasks.index(task) + 1) if task in tasks else task


def _gain(value: float | None, baseline: float | None) -> Markup:
    if value is None or baseline is None:
        return el("td", number(baseline))
    gain = round(value - baseline, 1) + 0.0  # no -0.0
    sign = "up" if gain > 0 else "down" if gain < 0 else "same"
    return el("td", number(baseline), " ", el("b", number(gain, signed=True), class_=sign))


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return points[len(points) // 2][0], statistics.fmean(y for _, y in points)


def _end(prompt: Any) -> str:
    return prompt if len(prompt) <= LETTERS else f"… {prompt[-LETTERS:]}"
