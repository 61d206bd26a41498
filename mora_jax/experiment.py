"""From a checked config to the things that every binary works with: tasks, mesh, model family, sites, a score."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from mora_jax import config as configs
from mora_jax.benchmarks import stream
from mora_jax.benchmarks.stream import Task
from mora_jax.data import packages
from mora_jax.methods import bank as banks
from mora_jax.methods.method import Method
from mora_jax.models.registry import load_model
from mora_jax.runtime import distributed
from mora_jax.runtime.display import Display
from mora_jax.runtime.generate import Generation
from mora_jax.runtime.language import LanguageFamily


def keep_compiled() -> None:
    """Lets XLA keep what it compiles on the disk, for the next process."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(packages.cache_dir() / "xla")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def load_tasks(config: Any) -> list[Task]:
    """The stream that `config.benchmark` names, cut to its limits. Raises MoraError for bad names and bad data."""
    c = config.benchmark
    loaded = stream.load(
        c.name,
        c.root,
        configs.names(c.tasks),
        metrics=configs.pairs("benchmark.metrics", c.metrics),
        split_seed=c.split_seed,
    )
    return [task.limited(c.train_limit, c.eval_limit) for task in loaded]


def load_family(config: Any, method: Method) -> tuple[Mesh, LanguageFamily, banks.Sites]:
    """(mesh, model family, sites that the method adapts), the weights on the devices. Raises MoraError."""
    mesh = distributed.make_mesh(config.mesh)
    family = LanguageFamily(load_model(config.model, config.seed), method, config, mesh)
    return mesh, family, banks.find_sites(family.params, family.site_kinds, method)


def evaluate(
    family: LanguageFamily,
    variables: Mapping[str, Any],
    task: Task,
    split: str,
    display: Display,
    title: str,
    check: Callable[[], None] = lambda: None,
) -> tuple[Generation, float, float]:
    """(answers, score, lenient score) on one split, scores in percent; `check()` runs after every batch."""
    prompts = [example.prompt for example in task.split(split)]
    with display.progress(title, "examples", len(prompts)) as advance:

        def after_batch(n: int) -> None:
            advance(n, "")
            check()

        answer = family.predict(variables, task, prompts, after_batch)
    strict, lenient = (task.score(answer.texts, split, lenient=flag) for flag in (False, True))
    return answer, strict, lenient
