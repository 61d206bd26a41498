"""Scores of what a run has learned so far, on its own benchmark or on another one.

    python -m mora_jax.evaluate --workdir=DIR [--task=N|-1|all] [--config.benchmark.KEY=VALUE ...] [--output=FILE]

The run may be finished or going on; nothing in its workdir changes but the output.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mora_jax import config as configs
from mora_jax import experiment
from mora_jax.adapter import Adapter
from mora_jax.benchmarks import stream
from mora_jax.benchmarks.pictures import PictureTask
from mora_jax.benchmarks.stream import Task
from mora_jax.layouts import every_state, open_adapter, task_number
from mora_jax.runtime import hosts, storage
from mora_jax.runtime.display import Display
from mora_jax.runtime.family import GateCounts
from mora_jax.runtime.results import device, rounded, versions
from mora_jax.runtime.writers import write_json

USAGE = """\
python -m mora_jax.evaluate --workdir=DIR [--task=N|-1|all] [--config.KEY=VALUE ...] [--output=FILE]
python -m mora_jax.evaluate --adapter=FOLDER [...]
python -m mora_jax.evaluate ... --coordinator=HOST:PORT --processes=N --process=I

--task=N evaluates the experts as they stood after task N, counted from 0 in the order of the stream; -1 is the frozen
model before the first task, all is every one of them; without it, the last task that has been frozen. On the run's
own tasks those that were not yet taught are left out, as in R, unless --config.eval.future_tasks=true or
--config.benchmark.tasks names them; pictures are compared with the classes of the whole stream all the same where
eval.label_space=joint. --config.benchmark.root alone says where the run's own data lie by now: its tasks and limits
stay, and are told. A --config.benchmark.name, even the run's own with another root, is another benchmark: evaluated
whole, with all its tasks and records, their token limits and its label space, and with no root, unless a --config.KEY
says them. FILE is evaluate.json in DIR or FOLDER. Of several processes the last form starts one, as for python -m
mora_jax.train."""
OPTIONS = ("workdir", "adapter", "task", "output", "config.KEY", *hosts.OPTIONS)
OTHER_TASKS = ("benchmark.name", "benchmark.root", "benchmark.tasks")
# What a run chose for its own benchmark: where it lies and names of its tasks (empty = all), limits of what is taught,
# limits of what is asked (0 = all records, a task's own). Not `split_seed`: two benchmarks over one set of pictures
# must draw its splits alike, or one would test what the other has taught.
OWN_TASKS = ("benchmark.root", "benchmark.tasks", "benchmark.metrics")
TAUGHT_LIMITS = ("benchmark.train_limit", "benchmark.shots")
ASKED_LIMITS = ("benchmark.eval_limit", "train.max_prompt_tokens", "train.max_answer_tokens", "eval.max_new_tokens")


def other_benchmark(overrides: Mapping[str, str]) -> dict[str, str]:
    """The overrides; beside one that names a benchmark nothing is left of what the run chose for its own."""
    if "benchmark.name" not in overrides:
        return dict(overrides)
    own = dict.fromkeys(OWN_TASKS, "") | dict.fromkeys((*TAUGHT_LIMITS, *ASKED_LIMITS), "0")
    return own | {"eval.label_space": stream.label_space(overrides["benchmark.name"])} | dict(overrides)


def load_tasks(config: Any, named: str | None) -> tuple[list[Task], list[Task]]:
    """(the tasks to score, those whose classes a picture is compared with).

    The config names the stream, `named` some tasks of it (None = all) or others, which are then compared with as well.
    """
    if named is None:
        tasks = experiment.load_tasks(config)
        return tasks, tasks
    of_named = config.copy_and_resolve_references()
    with of_named.unlocked():
        of_named.benchmark.tasks = named
    tasks = experiment.load_tasks(of_named)
    if config.eval.label_space != "joint" or not isinstance(tasks[0], PictureTask):
        return tasks, tasks
    whole = {task.name: task for task in (*experiment.load_tasks(config), *tasks)}
    return tasks, list(whole.values())


def evaluate_row(
    adapter: Adapter, tasks: Sequence[Task], family: Any, bank: Mapping[str, Any], display: Display, own: bool
) -> dict[str, Any]:
    """One row: percent on each task, None where `own` and not taught by then; what the gates did."""
    last, split, counts, truncated = len(adapter.tasks) - 1, adapter.config.eval.split, GateCounts(), 0
    variables = family.prepare({"params": family.params} | bank)
    title = f"after {adapter.tasks[last]}" if adapter.tasks else "frozen model"
    strict: list[float | None] = []
    lenient: list[float | None] = []
    for task in tasks:
        if own and adapter.tasks and task.name not in adapter.tasks and not adapter.config.eval.future_tasks:
            strict.append(None)
            lenient.append(None)
            continue
        answer, *scores = experiment.evaluate(family, variables, task, split, display, f"  {title} -> {task.name}")
        strict.append(scores[0])
        lenient.append(scores[1])
        counts, truncated = counts + answer.gates, truncated + answer.truncated
    gated = adapter.tasks and counts.pairs
    return {
        "task": last,
        "name": adapter.tasks[last] if adapter.tasks else "zero-shot",
        "experts_per_site": adapter.experts,
        "scores": rounded(strict),
        "lenient": rounded(lenient),
        "active_experts_mean": round(counts.active / counts.pairs, 4) if gated else None,
        "tokens_without_expert": round(counts.none / counts.pairs, 6) if gated else None,
        "prompts_truncated": truncated,
        "origin": dict(adapter.origin),
    }


def run(argv: Sequence[str]) -> None:
    """Everything but the handling of errors."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return
    options, given = configs.split(argv, OPTIONS)
    hosts.start(hosts.from_options(options))
    overrides, display = other_benchmark(given), Display()
    every = options.get("task") == "all"
    with hosts.together() as facts:
        named = overrides.pop("benchmark.tasks") if "benchmark.tasks" in given else None
        newest = open_adapter(options, overrides, None if every else task_number(options.get("task")))
        states = every_state(newest, options, overrides) if every else [newest]
        config, own = newest.config, not set(OTHER_TASKS) & given.keys()
        tasks, compared = load_tasks(config, named)
        for task in tasks:  # a missing split is known before any work
            task.split(config.eval.split)
        experiment.keep_compiled()
        mesh, family, sites = experiment.load_family(config, newest.method, compared)
        facts |= configs.alike(config) | versions() | {f"data of task {task.name}": task.digest for task in compared}
        facts |= {"weights": family.identity, "states": [dict(adapter.origin) for adapter in states]}
        facts |= {"tasks": [task.name for task in tasks]}
    flat = configs.flatten(config)
    if limits := [f"{key}={flat[key]}" for key in ASKED_LIMITS if flat[key]]:
        display.say(f"limits: {', '.join(limits)}")
    rows = []
    for adapter in states:
        bank = adapter.variables(mesh, sites, family.identity)
        rows.append(evaluate_row(adapter, tasks, family, bank, display, own))
    where = storage.at(options.get("workdir") or options["adapter"])
    path = storage.at(options.get("output") or where / "evaluate.json")
    content = {
        "benchmark": config.benchmark.name,
        "tasks": [task.name for task in tasks],
        "metric": [task.metric for task in tasks],
        "label_space": family.label_space,
        "chance": rounded(family.chance(task) for task in tasks),
        "taught": list(newest.tasks),
        "rows": rows,
        "method": config.method.name,
        "model": config.model.name,
        "weights": family.identity,
        "seed": config.seed,
        "config": config.to_dict(),
        "versions": versions(),
        "eval_examples": [len(task.split(config.eval.split)) for task in tasks],
        "device": device(),
        "command": shlex.join(["python", "-m", "mora_jax.evaluate", *argv]),
    }
    write_json(path, content)
    display.scores(content["tasks"], {row["name"]: row["scores"] for row in rows})
    display.say(f"{path} written")


def main() -> int:
    """The exit code: 0 when done, else as `mora_jax.errors` lists them."""
    return hosts.exit_code(run, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
