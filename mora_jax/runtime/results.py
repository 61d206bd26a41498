"""What a run tells: the opening table, results.json after every row of R, the closing tables."""

from __future__ import annotations

import base64
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import mora_jax
from mora_jax.benchmarks.stream import Task
from mora_jax.data.images import png
from mora_jax.methods import bank as banks
from mora_jax.methods.gates import ACTIVE
from mora_jax.methods.method import Method
from mora_jax.runtime.display import Display
from mora_jax.runtime.distributed import chosen
from mora_jax.runtime.family import GateCounts, GateMap
from mora_jax.runtime.progress import Progress
from mora_jax.runtime.state import count_parameters
from mora_jax.runtime.writers import row_name, write_json, write_lines

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow", "tokenizers", "gguf")


class Results:
    """One run's results.json and tables. `facts` holds what does not change while the run goes on."""

    def __init__(
        self,
        config: Any,
        tasks: Sequence[Task],
        method: Method,
        sites: banks.Sites,
        *,
        frozen_parameters: int,
        chance: Sequence[float | None],
        prompt_tokens: Sequence[int | None],
        fingerprint: str,
        command: str,
        workdir: Path,
        display: Display,
    ):
        self.method, self.sites, self.display = method, sites, display
        self.path = workdir / "results.json"
        self.names = [task.name for task in tasks]
        self.drawn = {task.name: task.split("train") for task in tasks} if config.benchmark.shots else {}
        self.sizes = {task.name: {split: len(records) for split, records in task.splits.items()} for task in tasks}
        self.frozen_parameters = frozen_parameters
        split = config.eval.split
        fresh = jax.eval_shape(lambda: banks.new_fresh(sites, method, 0, 0)) if method.trains else {}
        self.facts = {
            "benchmark": config.benchmark.name,
            "tasks": self.names,
            "metric": [task.metric for task in tasks],
            "variant": [task.variant for task in tasks],
            "majority": [task.majority_percent(split) for task in tasks],
            "chance": rounded(chance),
            "prompt_tokens": list(prompt_tokens),  # the most of each task that are read
            "method": config.method.name,
            "model": config.model.name,
            "seed": config.seed,
            "config": config.to_dict(),
            "fingerprint": fingerprint,
            "versions": versions(),
            "trainable_parameters": count_parameters(fresh),
            "sites": sum(site.layers for site in sites.values()),
            "eval_examples": [len(task.split(split)) for task in tasks],
            "device": device(),
            "command": command,
        }

    def introduce(self) -> None:
        """The table a run begins with, and shots/TASK.jsonl: the records that were drawn."""
        for task, records in self.drawn.items():
            rows = ({"prompt": record.prompt, "answer": record.answer} for record in records)
            write_lines(self.path.parent / "shots" / f"{task}.jsonl", rows)
        m, facts, c = self.method, self.facts, self.facts["config"]
        last = len(self.names) - 1
        full = jax.eval_shape(lambda: banks.empty(self.sites, m.capacity(last))) if m.trains else {}
        experts = f"{m.rank if m.trains else 0} experts at {facts['sites']} sites"
        model = c["model"]
        kept = model["dtype"] + ("" if model["quantise"] == "none" else f", dense kernels {model['quantise']}")
        variants = variants_of(self.names, facts["variant"])
        size, parts, devices = c["train"]["batch_size"], c["train"]["accumulate"], jax.device_count()
        shared = chosen(c["mesh"]) or size // parts % devices == 0  # a mesh that was asked for is refused otherwise
        waste = "" if shared else ", which do not divide it: each computes all of them"
        self.display.facts("this run", {
            "benchmark": f"{facts['benchmark']}: {' -> '.join(self.names)}",
            **({"data": variants} if variants else {}),
            "model": f"{facts['model']} ({kept}), {self.frozen_parameters:,} frozen parameters",
            "method": facts["method"],
            "trainable": f"{facts['trainable_parameters']:,} parameters per task: {experts}",
            "bank": f"{count_parameters(full):,} parameters when full: up to {m.live_after(last)} experts per site",
            "global batch": f"{size} examples a step on {devices} device(s){waste}",
            "device": facts["device"],
            "workdir": str(self.path.parent),
        })  # fmt: skip

    def write(self, progress: Progress, timing: Mapping[str, Any], *, complete: bool) -> None:
        """results.json as it stands now."""
        facts, trains = dict(self.facts), self.method.trains
        baselines = {"majority": facts.pop("majority"), "zero_shot_lenient": rounded(progress.zero_shot_lenient)}
        if (chance := facts.pop("chance")) != [None] * len(self.names):
            baselines["chance"] = chance
        taught = progress.task + (progress.phase == "evaluated") - 1
        summary = progress.summary(trains)
        active, none = progress.gate_report()
        content = {
            **facts,
            "experts_per_site": self.method.live_after(taught),
            "R": [rounded(row) for row in progress.R] if trains else None,
            "zero_shot": rounded(progress.zero_shot),
            "baselines": baselines,
            "summary": dict(zip(summary, rounded(summary.values()), strict=True)),
            "train_traces": progress.train_traces,
            **timing,
            "active_experts_mean": None if active is None else round(active, 4),
            "tokens_without_expert": None if none is None else round(none, 6),
            "gates": self.gate_rows(progress),
            "prompts_truncated": sum(sum(splits.values()) for splits in progress.truncated.values()),
            "prompts_truncated_of": progress.truncated,  # {task: {split: prompts}}
            "records_skipped": sum(len(names) for splits in progress.skipped.values() for names in splits.values()),
            "task_seconds": [round(s, 2) for s in progress.task_seconds],
            "wall_seconds": round(progress.wall_seconds, 2),
            "complete": complete,
        }
        write_json(self.path, content)

    def gate_rows(self, progress: Progress) -> list[dict[str, Any]] | None:
        """What the gates did, one entry per evaluated row of R; None where the method has no gates.

        `mass` is the share of gate mass by task of origin, over tokens and sites; `on` splits it by the task
        that was asked.
        """
        if not self.method.has_gates:
            return None
        rows = []
        for index, task in enumerate(self.names):
            if not (counts := progress.gate_row(index)):
                continue
            origins = self.origins(index)
            rows.append({
                "task": task,
                "experts_per_site": self.method.live_after(index),
                **_gate_entry(sum(counts.values(), GateCounts()), origins),
                "on": {self.names[i]: _gate_entry(count, origins) for i, count in counts.items()},
            })  # fmt: skip
        return rows

    def origins(self, index: int) -> list[str]:
        """Names of the tasks that trained each block of the bank after task `index`."""
        return [" + ".join(self.names[t] for t in tasks) for tasks in self.method.origins(index)]

    def write_gate_maps(self, index: int, maps: Mapping[str, GateMap]) -> None:
        """gates/<row>.jsonl: the gates under the bank after task `index` on one record of each task in `maps`."""
        live, origins = self.method.live_after(index), self.origins(index)
        write_lines(
            self.gate_map_path(index),
            (
                {
                    "task": task,
                    "layer": found.layer,
                    "truncated": found.truncated,
                    "tokens": found.tokens,
                    "picture": None if found.picture is None else base64.b64encode(png(found.picture)).decode("ascii"),
                    "origins": [origins[expert // self.method.rank] for expert in range(live)],
                    "sites": {site: _sparse(g[:, :live]) for site, g in found.sites.items()},
                }
                for task, found in maps.items()
            ),
        )

    def gate_map_path(self, index: int) -> Path:
        return self.path.parent / "gates" / f"{row_name(index, self.names)}.jsonl"

    def conclude(self, p: Progress) -> None:
        """The tables a run ends with."""
        trains = self.method.trains
        self.display.matrix(self.names, p.zero_shot, p.R if trains else None)
        baselines = {"zero-shot": p.zero_shot, "zero-shot, lenient": p.zero_shot_lenient} if trains else {}
        baselines |= {name: self.facts[name] for name in ("majority", "chance")}
        baselines = {name: row for name, row in baselines.items() if row != [None] * len(self.names)}
        if baselines:
            row = ("last row of R", p.R[len(self.names) - 1]) if trains else ("zero-shot", p.zero_shot)
            self.display.gains(self.names, *row, baselines)
        self.display.summary(p.summary(trains))
        active, none = p.gate_report()
        if self.method.has_gates and active is not None:
            self.display.say(f"experts active per token and site: {active:.2f}; tokens without any: {100 * none:.2f} %")
        if cut := self.prompts_cut(p):
            self.display.say(cut)
        seconds, traces = f"{p.wall_seconds:.0f} s in all", f"train step traced {p.train_traces}x"
        self.display.say(f"{self.path} written; {seconds}; {traces}")

    def prompts_cut(self, p: Progress) -> str:
        """Which tasks had prompts cut on the left, to how many tokens, and how many of how many, in one line; or ""."""
        found, limits = [], dict(zip(self.names, self.facts["prompt_tokens"], strict=True))
        for name, splits in p.truncated.items():
            counts = [f"{splits[split]}/{n} {split}" for split, n in self.sizes[name].items() if splits.get(split)]
            found += [f"{name} to {limits[name]} tokens, {', '.join(counts)}"] if counts else []
        return f"prompts cut: {'; '.join(found)}" if found else ""


def variants_of(tasks: Sequence[str], variants: Sequence[str]) -> str:
    """Which set of its data each task is; "" where none has several."""
    told: dict[str, list[str]] = {}
    for task, variant in zip(tasks, variants, strict=True):
        told.setdefault(variant, []).append(task)
    told.pop("", None)
    if list(told.values()) == [list(tasks)]:
        return next(iter(told))
    return "; ".join(f"{', '.join(of)}: {variant}" for variant, of in told.items())


def _gate_entry(count: GateCounts, origins: Sequence[str]) -> dict[str, Any]:
    total = sum(count.mass)
    shares = zip(origins, count.mass, strict=False)  # the bank has room for more blocks than there are
    return {
        "active_experts_mean": round(count.active / count.pairs, 4),
        "tokens_without_expert": round(count.none / count.pairs, 6),
        "mass": {origin: round(mass / total, 6) for origin, mass in shares} if total else None,
    }


def _sparse(g: np.ndarray) -> list[tuple[int, int, float]]:
    """(token, expert, gate) of the active experts."""
    return [(int(t), int(i), round(float(g[t, i]), 4)) for t, i in zip(*np.nonzero(g > ACTIVE), strict=True)]


def rounded(values: Iterable[float | None]) -> list[float | None]:
    """Percentages with four digits, as results.json shows them."""
    return [None if v is None else round(v, 4) for v in values]


def versions() -> dict[str, str]:
    """The versions that a number depends on."""
    ours = {"mora_jax": mora_jax.__version__, "python": platform.python_version()}
    return ours | {name: importlib.metadata.version(name) for name in PACKAGES}


def device() -> str:
    """Platform, kind and number of devices; on a CPU its name and core count too."""
    kind = jax.devices()[0]
    name = f"{kind.platform} {kind.device_kind} x {jax.device_count()}"
    if kind.platform != "cpu":
        return name
    return f"{name} ({_cpu_name()}, {len(os.sched_getaffinity(0))} cores)"


def _cpu_name() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
