"""Pictures in, batches out: records that are read and decoded when they are needed, and plans of batches for Grain.

A picture that cannot be decoded is skipped, named and counted; more than 1 % of a split stops the run.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import grain
import numpy as np
from jaxtyping import Int, UInt8

from mora_jax.data import images
from mora_jax.errors import MoraError

MOST_SKIPPED = 0.01  # of the records of a split
THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes and resizes without Python's lock
AHEAD = 4  # batches


class Encoded(Protocol):
    """What this module needs of a record (see benchmarks.pictures.Picture)."""

    @property
    def source(self) -> str: ...

    @property
    def read(self) -> Callable[[], bytes]: ...


class Reader:
    """The records of one split as pixels [size, size, 3]. `skipped` holds the sources of those that are none."""

    def __init__(self, records: Sequence[Encoded], size: int, split: str):
        self.records, self.size, self.split = records, size, split
        self.skipped: set[str] = set()
        self._lock = threading.Lock()  # Grain reads in threads

    def __call__(self, index: int) -> UInt8[np.ndarray, "size size 3"] | None:
        """One record, None if it cannot be read. Raises MoraError, naming it, where it is one too many."""
        record = self.records[index]
        try:
            return images.pixels(record.read(), self.size, record.source)
        except (MoraError, OSError) as problem:
            self._skip(record.source, problem)
            return None

    def _skip(self, source: str, problem: Exception) -> None:
        with self._lock:
            known = source in self.skipped
            self.skipped.add(source)
            count = len(self.skipped)
        told = str(problem) if str(problem).startswith(source) else f"{source}: {problem}"
        if count > MOST_SKIPPED * len(self.records):
            raise MoraError(
                f"{told}; {count} of the {len(self.records)} pictures of {self.split} cannot be read, more than the "
                f"{MOST_SKIPPED:.0%} that are skipped"
            )
        if not known:
            print(f"warning: skipped {told}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class TrainPlan:
    """Which records make up each batch of a task; `constant` is the same in all of them.

    In the place of a record that cannot be read comes the next one that can, in the order of the split.
    """

    reader: Reader
    labels: Int[np.ndarray, " records"]
    batches: Int[np.ndarray, "steps b"]
    constant: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """pictures [b, size, size, 3] uint8, labels [b] int32, and what is constant."""
        members, pictures = [], []
        for index in self.batches[step].tolist():
            while (picture := self.reader(index)) is None:
                index = (index + 1) % len(self.labels)
            members.append(index)
            pictures.append(picture)
        return {"pictures": np.stack(pictures), "labels": self.labels[members], **self.constant}


@dataclass(frozen=True)
class ReadPlan:
    """All records in their order, a batch at a time; the last one is filled up with black pictures."""

    reader: Reader
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.reader.records) // self.batch_size)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """pictures [b, size, size, 3] uint8, and real [b] bool: the rows that hold a record that could be read."""
        size = self.reader.size
        pictures = np.zeros((self.batch_size, size, size, 3), np.uint8)
        real = np.zeros(self.batch_size, bool)
        start = step * self.batch_size
        for row, index in enumerate(range(start, min(start + self.batch_size, len(self.reader.records)))):
            if (picture := self.reader(index)) is not None:
                pictures[row], real[row] = picture, True
        return {"pictures": pictures, "real": real}


def plan_batches(records: int, *, batch_size: int, steps: int, epochs: int, seed: int) -> Int[np.ndarray, "steps b"]:
    """A deterministic order of full batches. Exactly one of `steps` and `epochs` is positive.

    `epochs` makes as many steps as it takes to see every record so often, the last batch filled with records of one
    epoch more. Every epoch is shuffled by (seed, epoch); its last records begin the next one's first batch, so no
    record is ever seen two times more than another.
    """
    steps = steps or -(-epochs * records // batch_size)
    needed = steps * batch_size
    order = [np.random.default_rng((seed, epoch)).permutation(records) for epoch in range(-(-needed // records))]
    return np.concatenate(order)[:needed].reshape(steps, batch_size)


def pipeline(plan: TrainPlan | ReadPlan) -> grain.DatasetIterator:
    """The plan as a Grain iterator, whose state is the position to resume from; batches are decoded in threads."""
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    return iter(grain.MapDataset.source(plan).to_iter_dataset(options))
