"""Frozen dense kernels in 8 or 4 bits: codes, and a float32 scale for each block of a column.

int8: symmetric, one block of all inputs for each output, level = code. nf4: NormalFloat, blocks of 64 inputs, 16 levels
that split a normal distribution into equal parts (QLoRA, arXiv 2305.14314, section 3 and appendix E; the scales are not
quantised again here). Only kernels of dense layers inside the stacked layers are coded: embeddings, norms and biases
are a few percent of a large model. What is trained never is.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int, Shaped

from mora_jax.models.unread import Entry, Unread

NONE = "none"
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_BETWEEN = tuple((low + high) / 2 for low, high in itertools.pairwise(NF4_LEVELS))


def _nf4_codes(w: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    return sum((w > edge).astype(jnp.uint8) for edge in _BETWEEN)


def _nf4_levels(codes: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """A tree of 15 choices by the bits of a code: a table of 16 rows would be a gather, which a TPU does one by one."""
    codes, levels = codes.astype(jnp.uint8), [jnp.float32(level) for level in NF4_LEVELS]
    for bit in range(4):
        on = (codes >> bit) & 1 == 1
        levels = [jnp.where(on, high, low) for low, high in zip(levels[::2], levels[1::2], strict=True)]
    return levels[0]


class Code(NamedTuple):
    """`top` is the largest level, `block` the inputs that share a scale (None = all); codes are nearest levels."""

    dtype: Any
    top: float
    block: int | None
    codes: Callable[[Array], Array]
    levels: Callable[[Array], Array]


CODES: Mapping[str, Code] = {
    "int8": Code(jnp.int8, 127.0, None, jnp.round, lambda codes: codes.astype(jnp.float32)),
    "nf4": Code(jnp.uint4, 1.0, 64, _nf4_codes, _nf4_levels),
}
QUANTISE = (NONE, *CODES)  # what model.quantise can be


def is_coded(path: str) -> bool:
    """Whether a parameter is a dense kernel inside the stacked layers."""
    *above, last = path.split("/")
    return last == "kernel" and "layers" in above


def blocks(d_in: int, name: str) -> int:
    """Scales of one column."""
    return 1 if CODES[name].block is None else d_in // math.gcd(d_in, CODES[name].block)


def stored(shapes: Mapping[str, tuple[int, ...]], dtype: Any, name: str) -> dict[str, jax.ShapeDtypeStruct]:
    """What parameters of these shapes, by path, are kept as: a coded kernel has `kernel_scale` beside it."""
    found = {}
    for path, shape in shapes.items():
        found[path] = jax.ShapeDtypeStruct(shape, dtype)
        if name != NONE and is_coded(path):
            *above, d_in, d_out = shape
            found[path] = jax.ShapeDtypeStruct(shape, CODES[name].dtype)
            found[f"{path}_scale"] = jax.ShapeDtypeStruct((*above, blocks(d_in, name), d_out), jnp.float32)
    return found


@partial(jax.jit, static_argnums=(1, 2))
def _encode(w: Array, name: str, block: int) -> tuple[Array, Array]:
    code, (*above, d_in, d_out) = CODES[name], w.shape
    w = w.astype(jnp.float32).reshape(*above, d_in // block, block, d_out)
    scale = jnp.max(jnp.abs(w), axis=-2, keepdims=True) / code.top
    codes = code.codes(w / jnp.where(scale > 0, scale, 1.0)).astype(code.dtype)
    return codes.reshape(*above, d_in, d_out), scale.squeeze(-2)


def encode(
    w: Float[Array, "*above d_in d_out"], name: str
) -> tuple[Int[Array, "*above d_in d_out"], Float[Array, "*above blocks d_out"]]:
    """(codes, scales) with codes * scales nearest to w; a block of zeros has scale 0."""
    return _encode(w, name, w.shape[-2] // blocks(w.shape[-2], name))


def decode(
    codes: Int[Array, "*above d_in d_out"], scale: Float[Array, "*above blocks d_out"]
) -> Float[Array, "*above d_in d_out"]:
    """The weights that codes and scales stand for, float32."""
    *above, d_in, d_out = codes.shape
    levels = _levels(codes).reshape(*above, scale.shape[-2], -1, d_out)
    return (levels * scale[..., None, :]).reshape(*above, d_in, d_out)


def _levels(codes: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    return next(code.levels for code in CODES.values() if codes.dtype == code.dtype)(codes)


def product(
    x: Float[Array, "... d_in"],
    kernel: Float[Array, "d_in d_out"] | Int[Array, "d_in d_out"],
    scale: Float[Array, "blocks d_out"] | None,
    dtype: Any,
) -> Float[Array, "... d_out"]:
    """x W in `dtype`, W plain (`scale` is None) or coded. One block's scale waits until after the product."""
    if scale is None:
        return jnp.dot(x, kernel.astype(dtype))
    if len(scale) > 1:
        return jnp.dot(x, decode(kernel, scale).astype(dtype))
    y = jnp.dot(x, _levels(kernel).astype(dtype)).astype(jnp.float32)
    return (y * scale.reshape((1,) * (y.ndim - 1) + scale.shape[-1:])).astype(dtype)


@dataclasses.dataclass(frozen=True)
class UnreadCode(Unread):
    """Codes (or scales) of a stacked kernel that is still in its file. A part of them reads the blocks it lies in.

    With int8 that is all inputs: what a device holds of a kernel cut over its inputs costs reading the columns whole.
    """

    name: str = NONE
    d_in: int = 0
    scales: bool = False

    def jobs(self, spans: Sequence[range], target: Shaped[np.ndarray, "..."]) -> list[Callable[[], None]]:
        """Calls that fill `target` with the part at `spans`, each with that of one layer."""
        block, (_, inputs, columns) = self.d_in // blocks(self.d_in, self.name), spans
        unit = 1 if self.scales else block  # rows of ours in a block
        first, last = inputs.start // unit, -(-inputs.stop // unit)
        rows = range(first * block, last * block)

        def layer(entry: Entry, into: Shaped[np.ndarray, "rows columns"]) -> None:
            w = np.empty((len(rows), len(columns)), np.float32)
            self._copy_from(entry, [rows, columns], w)
            found = _encode(w, self.name, block)[self.scales]
            into[...] = found[inputs.start - first * unit : inputs.stop - first * unit]

        return [partial(layer, self.entries[number], into) for number, into in zip(spans[0], target, strict=True)]


def coded(params: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Parameters with their kernels coded; those that are still in a file are coded layer by layer as they are read."""
    if name == NONE:
        return params
    flat = flatten_dict(params, sep="/")
    for path in [path for path in flat if is_coded(path)]:
        kernel, both = flat[path], (path, f"{path}_scale")
        if not isinstance(kernel, Unread):
            flat |= dict(zip(both, encode(kernel, name), strict=True))
            continue
        kept = stored({path: kernel.shape}, kernel.dtype, name)
        for which, scales in zip(both, (False, True), strict=True):
            leaf, source = kept[which], (kernel.entries, kernel.share, kernel.read, name, kernel.shape[-2], scales)
            flat[which] = UnreadCode(leaf.shape, np.dtype(leaf.dtype), *source)
    return unflatten_dict(flat, sep="/")


def plain(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Shapes of the parameters that coded ones stand for."""
    flat = flatten_dict(params, sep="/")
    scales = {f"{path}_scale" for path in flat} & flat.keys()
    return unflatten_dict(
        {path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for path, leaf in flat.items() if path not in scales},
        sep="/",
    )


def bits(dtype: Any) -> int:
    """Of one number on a device; numpy keeps a 4-bit number in a byte."""
    dtype = np.dtype(dtype)
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize
