"""Parameters that still lie in their file: a device, or a host, reads only the part that it holds.

A key table says from which stored tensors a parameter is made; here that is done for any part of it, so that loading a
model never needs room for more than the parts asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Shaped

READERS = 2  # tensors that are read at a time; each may be held twice, as stored and as it will be
MAPPED = 1 << 21  # numbers of a stored tensor that are read at a time: so few that malloc uses the same pages again
BLOCK, PAD = 128, 8  # rows and columns of a tile that is transposed inside the cache, and what parts its rows there
# A nested dict of arrays, the "params" collection of a model; also of `Unread`.
Params = dict[str, Any]
Index = tuple[slice, ...]


class Stored(Protocol):
    """What reading and writing must know of a kind of tensor in any key table.

    `parts` are the parameters that one stored tensor holds, in equal shares along its first axis. `transform` turns it
    into ours: "transpose" also flattens all axes but the first, as for the kernel of a convolution over patches.
    """

    @property
    def parts(self) -> tuple[str, ...]: ...
    @property
    def transform(self) -> Literal["transpose", "none"]: ...


class Entry(NamedTuple):
    """One stored tensor: its row, its layer (None outside a stack), its name and its shape in the file."""

    row: Stored
    layer: int | None
    name: str
    stored_shape: tuple[int, ...]


# Reads the part of a stored tensor that an index of slices names, one for each of its axes.
Read = Callable[[Entry, Index], Shaped[np.ndarray, "..."]]


@dataclass(frozen=True)
class Unread:
    """A parameter of this shape and dtype; `unread[index]` reads a part, by one slice (of step 1) for each axis.

    `entries`: the stored tensors it is made of, one for each layer where it is stacked. `share`: which of the
    parameters that they hold it is.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    entries: tuple[Entry, ...]
    share: int
    read: Read

    def __getitem__(self, index: Index) -> Shaped[np.ndarray, "..."]:
        spans = [range(size)[cut] for size, cut in zip(self.shape, index, strict=True)]
        part = np.empty([len(span) for span in spans], self.dtype)
        _run(self.jobs(spans, part))
        return part

    def jobs(self, spans: Sequence[range], target: Shaped[np.ndarray, "..."]) -> list[Callable[[], None]]:
        """Calls that fill `target` with the part at `spans`, each from one stored tensor."""
        if self.entries[0].layer is None:
            return [lambda: self._copy_from(self.entries[0], spans, target)]
        return [
            lambda layer=layer, into=into: self._copy_from(self.entries[layer], spans[1:], into)
            for layer, into in zip(spans[0], target, strict=True)
        ]

    def _copy_from(self, entry: Entry, spans: Sequence[range], target: Shaped[np.ndarray, "..."]) -> None:
        transposed, stored = entry.row.transform == "transpose", entry.stored_shape
        cuts = [slice(span.start, span.stop) for span in (reversed(spans) if transposed else spans)]
        if cuts:
            first = self.share * (stored[0] // len(entry.row.parts))
            cuts[0] = slice(first + cuts[0].start, first + cuts[0].stop)
        if not cuts:
            target[...] = self.read(entry, ())
            return
        # Where rows are cut, pages of whole rows are mapped: never many of them.
        step = max(1, MAPPED // max(1, math.prod(stored[1:])))
        for start in range(cuts[0].start, cuts[0].stop, step):
            rows = slice(start, min(start + step, cuts[0].stop))
            if len(stored) > len(cuts):  # all axes but the first become one, which is cut afterwards
                whole = (slice(0, size) for size in stored[1:])
                tensor = self.read(entry, (rows, *whole)).reshape(rows.stop - rows.start, -1)[:, cuts[1]]
            else:
                tensor = self.read(entry, (rows, *cuts[1:]))
            into = slice(rows.start - cuts[0].start, rows.stop - cuts[0].start)
            _copy(tensor, target[:, into] if transposed else target[into], transposed=transposed)


def unread(wanted: Sequence[Entry], sizes: Mapping[str, tuple[int, ...]], dtype: Any, read: Read) -> Params:
    """The parameters of shapes `sizes` by path, each `Unread` of `dtype`, from the stored tensors `wanted`."""
    sources: dict[str, tuple[int, list[Entry]]] = {}
    for entry in wanted:
        for share, path in enumerate(entry.row.parts):
            sources.setdefault(path, (share, []))[1].append(entry)
    flat = {
        path: Unread(shape, np.dtype(dtype), tuple(sources[path][1]), sources[path][0], read)
        for path, shape in sizes.items()
    }
    return unflatten_dict(flat, sep="/")


def load(params: Params) -> Params:
    """All of the `Unread` parameters, as numpy arrays; the host holds them and the few tensors being read."""
    flat = flatten_dict(params)
    arrays = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in flat.items()}
    _run([job for path, leaf in flat.items() for job in leaf.jobs([range(n) for n in leaf.shape], arrays[path])])
    return unflatten_dict(arrays)


def _run(jobs: Sequence[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(READERS) as pool:  # numpy and safetensors leave the interpreter free while they copy
        for _ in pool.map(lambda job: job(), jobs):
            pass


def _copy(tensor: Shaped[np.ndarray, "..."], target: Shaped[np.ndarray, "..."], *, transposed: bool) -> None:
    """target = tensor, or its transpose; cast to target's dtype.

    As bit patterns, for numpy copies bfloat16 element by element; and tile by tile, each through two small arrays: rows
    of a model's matrix lie a power of two apart, so that a column of one falls into few lines of the cache. Four times
    as fast as assigning tensor.T.
    """
    if tensor.dtype != target.dtype:
        tensor = tensor.astype(target.dtype)
    bits = np.dtype(f"u{target.itemsize}")
    tensor, target = tensor.view(bits), target.view(bits)
    if not transposed:
        target[...] = tensor
        return
    side = min(BLOCK, max(target.shape))
    tile, turned = np.empty((2, side, side + PAD), bits)
    for i in range(0, target.shape[0], BLOCK):
        for j in range(0, target.shape[1], BLOCK):
            into = target[i : i + BLOCK, j : j + BLOCK]
            n, m = into.shape
            tile[:m, :n] = tensor[j : j + m, i : i + n]
            turned[:n, :m] = tile[:m, :n].T
            into[...] = turned[:n, :m]
