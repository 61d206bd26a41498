"""The tasks of a config's stream with their token limits, without their records wherever a table has the limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mora_jax import config as configs
from mora_jax.benchmarks import folder, packaged_text, standard_cl, stream, trace
from mora_jax.benchmarks.stream import Task
from mora_jax.errors import unknown

STANDARD_CL = ("standard_cl", "standard_cl_published")


def task_names(config: Any) -> tuple[str, ...]:
    """The tasks of the stream; their data is not needed where the config or the paper names them."""
    benchmark, named = config.benchmark, configs.names(config.benchmark.tasks)
    if named:
        return tuple(task for name in named for task in standard_cl.ORDERS.get(name, (name,)))
    if benchmark.name == "trace":
        return tuple(trace.TASKS)
    if benchmark.name in STANDARD_CL:
        return standard_cl.ORDERS["order4"]
    return stream.task_names(benchmark.name, benchmark.root)


def _table(benchmark: str) -> Mapping[str, Mapping[str, int]] | None:
    """Task -> the limits that `load_task` gives it; None where they lie with the data."""
    if benchmark == "trace":
        return {name: {limit: getattr(row, limit) for limit in folder.LIMITS} for name, row in trace.TASKS.items()}
    if benchmark in STANDARD_CL:
        most = standard_cl.MAX_PROMPT_TOKENS, standard_cl.MAX_ANSWER_TOKENS, standard_cl.MAX_ANSWER_TOKENS
        return {name: dict(zip(folder.LIMITS, most, strict=True)) for name in standard_cl.KINDS}
    if benchmark == "packaged_text":
        return {name: {"max_new_tokens": row.max_new_tokens} for name, row in packaged_text.TASKS.items()}
    return None


def of_stream(config: Any) -> list[Task]:
    """The tasks with the limits of a run; none where these need data that is not here. MoraError for an unknown one."""
    benchmark = config.benchmark
    table = _table(benchmark.name)
    if table is not None:
        for name in task_names(config):
            if name not in table:
                raise unknown(f"task of benchmark {benchmark.name!r}", name, table)
        return [Task(name, folder.DEFAULT_METRIC, {}, **table[name]) for name in task_names(config)]
    if benchmark.name == "folder" and benchmark.root:
        return stream.load("folder", benchmark.root, task_names(config), metrics={}, split_seed=benchmark.split_seed)
    return []
