"""From a checked config to the things that every binary works with: tasks, mesh, model family, sites, a score."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from mora_jax import config as configs
from mora_jax.benchmarks import stream
from mora_jax.benchmarks.pictures import PictureTask
from mora_jax.benchmarks.stream import Task
from mora_jax.data import packages
from mora_jax.errors import MoraError
from mora_jax.methods import bank as banks
from mora_jax.methods.method import Method
from mora_jax.methods.presets import PRESETS
from mora_jax.metrics.text import METRICS
from mora_jax.models.registry import MODELS, kind_of, load_model
from mora_jax.runtime import distributed
from mora_jax.runtime.contrastive import ClipFamily
from mora_jax.runtime.display import Display
from mora_jax.runtime.family import Answers, Family
from mora_jax.runtime.language import LanguageFamily


def keep_compiled() -> None:
    """Lets XLA keep what it compiles on the disk, for the next process."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(packages.cache_dir() / "xla")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def print_known() -> None:
    """What --list prints: every name that a config value can have."""
    display = Display()
    tasks = ", ".join(stream.task_names("packaged_text", ""))
    display.facts("known names", {
        "benchmark": f"{', '.join(stream.names())} (tasks of packaged_text: {tasks})",
        "model": ", ".join(MODELS),
        "method": ", ".join(PRESETS),
        "metric": ", ".join(METRICS),
    })  # fmt: skip


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
    return [task.few_shot(c.shots, c.split_seed).limited(c.train_limit, c.eval_limit) for task in loaded]


class Kind(NamedTuple):
    """A kind of model: its family, the tasks that it is taught, and both in words."""

    family: Callable[..., Family]
    takes: Callable[[Task], bool]
    name: str
    records: str


# Kinds of models, as `registry.kind_of` names them.
KINDS = {
    "decoder": Kind(
        LanguageFamily,
        lambda task: not isinstance(task, PictureTask),
        "a language model",
        "text",
    ),
    "clip": Kind(ClipFamily, lambda task: isinstance(task, PictureTask), "a CLIP model", "pictures"),
}


def load_family(config: Any, method: Method, tasks: Sequence[Task]) -> tuple[Mesh, Family, banks.Sites]:
    """(mesh, model family for a stream, sites that the method adapts), the weights on the devices. Raises MoraError."""
    kind = KINDS[kind_of(config.model)]
    for task in tasks:
        if not kind.takes(task):
            raise MoraError(
                f"model.name={config.model.name!r} is {kind.name}, which takes {kind.records}; task {task.name!r} has "
                f"{next(other.records for other in KINDS.values() if other.takes(task))}"
            )
    mesh = distributed.make_mesh(config.mesh)
    family = kind.family(load_model(config.model, config.seed), method, config, mesh, tasks)
    distributed.check_mesh(mesh, family.heads)
    return mesh, family, banks.find_sites(family.params, family.site_kinds, method)


def evaluate(
    family: Family,
    variables: Mapping[str, Any],
    task: Task,
    split: str,
    display: Display,
    title: str,
    check: Callable[[], None] = lambda: None,
) -> tuple[Answers, float, float]:
    """(answers, score, lenient score) on one split, scores in percent; `check()` runs after every batch.

    `variables` are those of `family.prepare`.
    """
    examples = task.split(split)
    with display.progress(title, "examples", len(examples)) as advance:

        def after_batch(n: int) -> None:
            advance(n, "")
            check()

        answer = family.predict(variables, task, examples, after_batch)
    strict, lenient = (task.score(answer.texts, split, lenient=flag) for flag in (False, True))
    return answer, strict, lenient
