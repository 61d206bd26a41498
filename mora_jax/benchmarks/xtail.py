"""Benchmark `xtail`: X-TAIL, cross-domain task-agnostic incremental learning (RAIL, arXiv 2406.18868).

Ten unlike sets of pictures, taught one after another from 16 pictures a class (`benchmark.shots=16`), 1100 classes
together. After every task all ten are tested against one joint list of the 1100 classes (`eval.label_space=joint`):
nobody tells the model which set a picture is from. Each class is one text, from one template. Two texts are the same,
`a photo of a pagoda.` of Caltech101 and of SUN397, and count as one answer here; the published code counts the classes,
by which the second pagoda is always wrong: one class of SUN397's 397.

Where the pictures lie, and which splits are the published ones: `mora_jax.benchmarks.domains.reading`.
"""

from __future__ import annotations

from mora_jax.benchmarks.domains import reading
from mora_jax.benchmarks.pictures import PictureTask

# In the published order.
TASKS = (
    "Aircraft", "Caltech101", "DTD", "EuroSAT", "Flowers", "Food101", "MNIST", "OxfordPets", "StanfordCars", "SUN397",
)  # fmt: skip


def task_names(root: str) -> tuple[str, ...]:
    """The ten sets in the published order; MoraError if the root is no folder or holds none of them."""
    return reading.task_names(TASKS, root)


def load_task(name: str, root: str, *, split_seed: int, metric: str | None) -> PictureTask:
    """One of the ten with all its pictures and X-TAIL's template; MoraError as `reading.load_task`."""
    return reading.load_task(
        name, root, split_seed=split_seed, metric=metric, templates=lambda domain: (domain.template,)
    )
