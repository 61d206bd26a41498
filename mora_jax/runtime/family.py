"""The seam between the binaries and a model family: what `train.py` asks, and what it is told about gates.

A family is a model on a mesh that can be taught a stream of tasks: `language.py` has decoders, `contrastive.py` CLIP.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float, UInt8

from mora_jax.benchmarks.stream import Example, Task

SitePath = tuple[str, ...]


class GateCounts(NamedTuple):
    """Sums over (token, site): how many pairs there are, active experts, pairs without any, gates by block."""

    pairs: int = 0
    active: int = 0
    none: int = 0
    mass: tuple[float, ...] = ()  # of each block of experts that were trained together, in the order of the bank

    @classmethod
    def fetched(cls, counts: tuple) -> GateCounts:
        """From the arrays that `count_gates` gives, once they are on the host."""
        *totals, mass = counts
        return cls(*map(int, totals), tuple(map(float, mass)))

    def __add__(self, other: GateCounts) -> GateCounts:
        mass = itertools.zip_longest(self.mass, other.mass, fillvalue=0.0)
        counts = (a + b for a, b in zip(self[:3], other[:3], strict=True))
        return GateCounts(*counts, tuple(a + b for a, b in mass))


class GateMap(NamedTuple):
    """The gates of one layer on one record: what its tokens show, and g [tokens, capacity] for each kind of site.

    picture: what the tokens are patches of, row by row behind a class token; None for text.
    """

    tokens: list[str]
    truncated: bool
    layer: int
    sites: dict[str, np.ndarray]
    picture: UInt8[np.ndarray, "size size 3"] | None = None


class TrainData(NamedTuple):
    """Batches from the first step on, as an iterator with Grain's `get_state` and `set_state`, and their number.

    truncated: prompts that were cut. skipped: sources of records that cannot be read; it grows while batches are made.
    """

    batches: Iterator[Mapping[str, np.ndarray]]
    steps: int
    truncated: int = 0
    skipped: set[str] | frozenset[str] = frozenset()


class Answers(Protocol):
    """Texts in the order of the records, None for one that could not be read; prompts cut; what the gates did."""

    texts: Sequence[str | None]
    truncated: int
    gates: GateCounts


class Family(Protocol):
    """A model on a mesh with its method, ready for the tasks of one stream.

    identity: names its weights. params: them, on the mesh. site_kinds: the path of every dense layer that a method may
    adapt, with its kind. heads: how many attention heads there are, by name. rate: the count of a batch (see `count`)
    by which speed is told. weight: see `TrainStep`; None where the loss of a batch is no mean over its rows.
    label_space: how many classes of all tasks every score of the run is measured against; None where each task has its
    own measure, so that tasks may be added to a stream.
    """

    identity: str
    params: Mapping[str, Any]
    rate: str
    weight: Callable[[Mapping[str, Array]], Float[Array, ""]] | None

    @property
    def label_space(self) -> int | None: ...

    @property
    def site_kinds(self) -> dict[SitePath, str]: ...

    @property
    def heads(self) -> dict[str, int]: ...

    def loss(self, variables: Mapping[str, Any], batch: Mapping[str, Array]) -> Float[Array, ""]:
        """What a train step minimises; traced."""

    def train_data(self, task: Task, index: int, steps: int, epochs: int) -> TrainData:
        """The batches of task number `index`: exactly one of `steps` and `epochs` is positive."""

    def count(self, batch: Mapping[str, np.ndarray]) -> dict[str, int]:
        """What a row of metrics.jsonl counts of a batch."""

    def chance(self, task: Task) -> float | None:
        """The score in percent of answering at random; None where there is no list to choose from."""

    def prompt_tokens(self, task: Task) -> int | None:
        """The most tokens of a prompt that are read, the rest is cut; None where there are no prompts."""

    def prepare(self, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        """`variables` with what all tasks of one row of R share; `predict` needs it."""

    def predict(
        self,
        variables: Mapping[str, Any],
        task: Task,
        examples: Sequence[Example],
        after_batch: Callable[[int], None],
    ) -> Answers:
        """What the model answers; `after_batch(n)` is called with the number of records a batch has answered."""

    def gate_map(self, variables: Mapping[str, Any], task: Task, examples: Sequence[Example]) -> GateMap:
        """The gates on the first of these records that can be read."""


def count_gates(stats: Mapping, real: Bool[Array, "b t"]) -> tuple:
    """The sums of `GateCounts` over the real tokens of all sites; `active` is [layers b t], `mass` one block longer."""
    pairs = active = none = jnp.int32(0)
    masses = []
    for path, leaf in flatten_dict(stats).items():
        if path[-1] == "mass":
            masses.append(jnp.sum(jnp.where(real[None, ..., None], leaf, 0.0), axis=(0, 1, 2)))
            continue
        mask = jnp.broadcast_to(real[None], leaf.shape)
        pairs += jnp.sum(mask, dtype=jnp.int32)
        active += jnp.sum(jnp.where(mask, leaf, 0), dtype=jnp.int32)
        none += jnp.sum(mask & (leaf == 0), dtype=jnp.int32)
    return pairs, active, none, sum(masses) if masses else jnp.zeros(0)
