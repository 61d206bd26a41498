"""The tasks of a config's stream with their token limits, without their records wherever a table has the limits."""

from __future__ import annotations

from typing import Any

from mora_jax import config as configs
from mora_jax.benchmarks import folder, stream
from mora_jax.benchmarks.stream import Task
from mora_jax.errors import unknown


def task_names(config: Any) -> list[str]:
    """The tasks of the stream; their data is not needed where the config or the benchmark's table names them."""
    benchmark = config.benchmark
    if named := configs.names(benchmark.tasks):
        return stream.spelt_out(benchmark.name, named)
    return list(stream.task_limits(benchmark.name) or stream.task_names(benchmark.name, benchmark.root))


def of_stream(config: Any) -> list[Task]:
    """The tasks with the limits of a run; none where these need data that is not here. MoraError for an unknown one."""
    benchmark = config.benchmark
    table = stream.task_limits(benchmark.name)
    if not table and not benchmark.root:
        return []
    names = task_names(config)
    if not table:
        return stream.load(benchmark.name, benchmark.root, names, metrics={}, split_seed=benchmark.split_seed)
    for name in names:
        if name not in table:
            raise unknown(f"task of benchmark {benchmark.name!r}", name, table)
    return [Task(name, folder.DEFAULT_METRIC, {}, **table[name]) for name in names]
