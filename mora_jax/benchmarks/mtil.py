"""Benchmark `mtil`: multi-domain task-incremental learning (ZSCL, arXiv 2303.06628), in its two orders.

Eleven sets of pictures, taught one after another from all training pictures or from five a class
(`benchmark.shots=5`). A picture is tested against the classes of its own set (`eval.label_space=own`), each the
renormalised mean over all of OpenAI's templates for the set. `benchmark.tasks=order1` and `order2` are the published
orders I and II; names of sets may follow.

Where the pictures lie, and which splits are the published ones: `mora_jax.benchmarks.domains.reading`.
"""

from __future__ import annotations

from mora_jax.benchmarks.domains import reading
from mora_jax.benchmarks.pictures import PictureTask

LABEL_SPACE = "own"
ORDERS: dict[str, tuple[str, ...]] = {
    "order1": (
        "Aircraft", "Caltech101", "CIFAR100", "DTD", "EuroSAT", "Flowers", "Food101", "MNIST", "OxfordPets",
        "StanfordCars", "SUN397",
    ),
    "order2": (
        "StanfordCars", "Food101", "MNIST", "OxfordPets", "Flowers", "SUN397", "Aircraft", "Caltech101", "DTD",
        "EuroSAT", "CIFAR100",
    ),
}  # fmt: skip


def task_names(root: str) -> tuple[str, ...]:
    """The eleven sets in order I; MoraError if the root is no folder or holds none of them."""
    return reading.task_names(ORDERS["order1"], root)


def load_task(name: str, root: str, *, split_seed: int, metric: str | None) -> PictureTask:
    """One of the eleven with all its pictures and OpenAI's templates; MoraError as `reading.load_task`."""
    return reading.load_task(name, root, split_seed=split_seed, metric=metric, templates=lambda domain: domain.ensemble)
