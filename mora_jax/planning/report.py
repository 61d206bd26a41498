"""A plan: one config on one target, as plain values and as tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from mora_jax.planning.abstract import Work, bytes_of
from mora_jax.planning.advice import advice
from mora_jax.planning.compiled import examine
from mora_jax.planning.tasks import task_names
from mora_jax.planning.topologies import Target
from mora_jax.runtime import distributed
from mora_jax.runtime.display import Display

GIB = 1 << 30
RATES = {"memory": "memory", "network": "network", "between hosts": "far"}
COLUMNS = {"train": "train step", "decode": "batch of answers"}


def count_tasks(config: Any) -> int:
    """Tasks of the stream that a config names."""
    return len(task_names(config))


def make_plan(config: Any, aim: Target, devices: Sequence[Any], tasks: int) -> dict[str, Any]:
    """Compiles the steps of `config` for `devices` and says what they need. Raises MoraError for what cannot be."""
    mesh = distributed.make_mesh(config.mesh, devices)
    work = Work(config, mesh, tasks)
    steps = {}
    for name, step in work.steps().items():
        found = examine(step, aim)
        steps[name] = found | {"advice": advice(name, found, work, aim)}
    held, whole = bytes_of(work.family.params)
    fits = [step["fits"] for step in steps.values()]
    return {
        "topology": aim.name,
        "fits": None if None in fits else all(fits),
        "chip": None if aim.chip is None else dataclasses.asdict(aim.chip) | {"shapes": None, "kind": None},
        "devices": aim.devices,
        "mesh": dict(mesh.shape),
        "model": config.model.name,
        "dtype": config.model.dtype,
        "quantise": config.model.quantise,
        "remat": config.model.remat,
        "method": config.method.name,
        "kernel": config.kernel,
        "tasks": tasks,
        "experts_per_site": work.capacity,
        "sites": sum(site.layers for site in work.sites.values()),
        "layers": work.sizes.layers,
        "batch_size": {"train": config.train.batch_size, "decode": config.eval.batch_size},
        "tokens": {name: work.longest[name]._asdict() for name in steps},
        "frozen_over_share": held / (whole / aim.devices),
        "steps": steps,
    }


def _batch(rows: int, longest: dict[str, Any]) -> str:
    of = longest["task"] or "no task's own limits, which come with its data"
    return f"{rows} x ({longest['prompt']} + {longest['answer']} tokens: {of})"


def _figures(chip: dict[str, Any]) -> str:
    rates = [f"{name} {chip[key] / 1e9:,.0f} GB/s" for name, key in RATES.items()]
    memory = f"{chip['hbm'] / GIB:.1f} GiB ({chip['usable']:.1%} usable)"
    return f"{memory}, {chip['flops'] / 1e12:,.0f} TFLOP/s bf16, {', '.join(rates)}"


def _number(value: float | None, unit: float, digits: int = 2) -> str:
    return "?" if value is None else f"{value / unit:,.{digits}f}"


def _verdict(fits: bool | None) -> str:
    return {True: "[green]fits[/]", False: "[red]does not fit[/]", None: "unknown memory"}[fits]


def show(plan: dict[str, Any], display: Display) -> None:
    """The plan as tables: what was planned, bytes, costs, collectives; then what would help."""
    chip = plan["chip"]
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan["mesh"].items())
    experts = f"{plan['experts_per_site']} experts at {plan['sites']} sites"
    facts = {
        "topology": f"{plan['topology']}: {plan['devices']} devices, mesh {mesh}",
        "model": f"{plan['model']}, {plan['dtype']}, remat {plan['remat']}, kernel {plan['kernel']}",
        "frozen kernels": plan["dtype"] if plan["quantise"] == "none" else plan["quantise"],
        "method": f"{plan['method']}, {plan['tasks']} tasks, {experts}",
        **{COLUMNS[name]: _batch(plan["batch_size"][name], longest) for name, longest in plan["tokens"].items()},
        "chip": _figures(chip) if chip else "no figures for this device, so no times",
        "frozen weights": f"{plan['frozen_over_share']:.3f} x an equal share on each device",
    }
    display.facts("plan", facts)
    for table in (_bytes(plan), _costs(plan), _collectives(plan)):
        if table.row_count:
            display.console.print(table)
    for name, step in plan["steps"].items():
        for line in step["advice"]:
            display.say(f"{name} does not fit; would help: {line}")


def _table(title: str, plan: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name in plan["steps"]:
        table.add_column(COLUMNS[name], justify="right")
    return table


def _bytes(plan: dict[str, Any]) -> Table:
    table, steps = _table("GiB of one device", plan), plan["steps"].values()
    names = list(dict.fromkeys(name for step in steps for name in step["bytes"]))
    for name in [n for n in names if n not in ("total", "available")] + ["total", "available"]:
        cells = [_number(s["bytes"][name], GIB, 3) if name in s["bytes"] else "" for s in steps]
        table.add_row(escape(name.replace("_", " ")), *cells, end_section=name == "program")
    table.add_row("", *(_verdict(step["fits"]) for step in steps))
    return table


def _costs(plan: dict[str, Any]) -> Table:
    table, steps = _table("costs of one device", plan), plan["steps"].values()
    table.add_row("TFLOP of products", *(_number(step.get("flops"), 1e12) for step in steps))
    table.add_row("GB to and from memory", *(_number(step.get("memory_traffic"), 1e9) for step in steps))
    for part in ("compute", "memory", "network"):
        cells = [_number((step.get("seconds") or {}).get(part), 1e-3, 1) for step in steps]
        table.add_row(f"at least ms, {part}", *cells)
    table.add_row("gated projection", *(step["kernel"] for step in steps))
    table.add_row("bound by", *(step.get("bound") or "?" for step in steps))
    table.add_row("compiled in s", *(f"{step['compile_seconds']:.1f}" for step in steps))
    return table


def _collectives(plan: dict[str, Any]) -> Table:
    table = _table("collectives: times, MB received", plan)
    steps = [step.get("collectives", {}) for step in plan["steps"].values()]
    for kind in sorted({kind for step in steps for kind in step}):
        cells = [f"{s[kind]['count']:,} x, {s[kind]['bytes'] / 1e6:,.1f}" if kind in s else "" for s in steps]
        table.add_row(kind, *cells)
    return table
