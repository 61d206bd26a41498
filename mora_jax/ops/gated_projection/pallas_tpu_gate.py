"""What the TPU kernels share: responses and gates of one tile of tokens, computed inside a kernel.

Experts lie along rows and tokens along lanes, so every sum or maximum over experts is a sum of registers. Rows are the
padded bank, of which whole blocks of dead rows are never touched, and behind it the padded fresh experts.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mora_jax.ops.gated_projection.reference import FLOOR
from mora_jax.ops.gated_projection.tiles import BLOCK, LANES, whole_lanes
from mora_jax.ops.gated_projection.xla import Selection

LOWEST = jnp.iinfo(jnp.int32).min  # below the order of every score: a row without an expert
HIGHEST = jax.lax.Precision.HIGHEST
CONTRACT_COLUMNS = (((1,), (1,)), ((), ()))
MATRIX = (((1,), (0,)), ((), ()))


class Rows(NamedTuple):
    """Where experts lie: `bank` padded rows of which `live` exist, then `fresh` rows padded to `fresh_rows`."""

    bank: int
    fresh: int
    fresh_rows: int
    live: jax.Array

    @property
    def total(self) -> int:
        return self.bank + self.fresh_rows

    def exist(self, start, shape):
        """Which rows of a block that begins at row `start` hold an expert."""
        row = start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        exist = row < self.live
        if self.fresh:
            exist |= (row >= self.bank) & (row < self.bank + self.fresh)
        return exist


def fold_bank(rows: Rows, body, carry=None):
    """carry = body(first row, row count, carry) over the blocks of the bank that hold live rows."""
    block = min(rows.bank, BLOCK)
    if rows.bank == block:
        return body(0, block, carry)
    blocks = (rows.live + block - 1) // block
    return jax.lax.fori_loop(0, blocks, lambda b, c: body(pl.multiple_of(b * block, block), block, c), carry)


def fold_fresh(rows: Rows, body, carry=None):
    """The same over the fresh rows."""
    for start in range(0, rows.fresh_rows, BLOCK):
        carry = body(start, min(BLOCK, rows.fresh_rows - start), carry)
    return carry


def fold(rows: Rows, body, carry=None):
    """The same over both, rows counted from the start of the bank."""
    carry = fold_bank(rows, body, carry)
    return fold_fresh(rows, lambda start, size, c: body(rows.bank + start, size, c), carry)


def each_slice(width: int, body, at_most: int = 512) -> None:
    """body(columns) over equal slices of `width` columns; one slice where it is no multiple of a register."""
    size = whole_lanes(width, at_most)
    if size == width:
        body(pl.ds(0, width))
        return

    def step(i, _):
        body(pl.ds(pl.multiple_of(i * size, LANES), size))

    jax.lax.fori_loop(0, width // size, step, None)


def bf16_parts(a: jax.Array) -> list[jax.Array]:
    """Bfloat16 arrays whose sum is `a`: three of 8 bits each for float32. Cut by mask: nothing rounds, nothing folds."""
    if a.dtype == jnp.bfloat16:
        return [a]
    parts = []
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(a, jnp.int32)
        part = jax.lax.bitcast_convert_type(bits & jnp.int32(-65536), jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        a = a - part
    return parts


def product(a: jax.Array, b: jax.Array, dimensions, *, exact: bool = False) -> jax.Array:
    """A float32 product: at full precision for a float32 `b`, else in one pass, or as many as `a` has parts if exact.

    The parts go through as one taller matrix, so that `b` is loaded into the matrix unit once.
    """
    if b.dtype == jnp.float32:
        return jax.lax.dot_general(
            a.astype(jnp.float32), b, dimensions, precision=HIGHEST, preferred_element_type=jnp.float32
        )
    parts = bf16_parts(a) if exact else [a.astype(b.dtype)]
    tall = jnp.concatenate(parts) if len(parts) > 1 else parts[0]
    found = jax.lax.dot_general(tall, b, dimensions, preferred_element_type=jnp.float32)
    return sum(found[i * a.shape[0] : (i + 1) * a.shape[0]] for i in range(len(parts))) if len(parts) > 1 else found


def respond(out_ref, tokens_ref, banks, rows: Rows, *, exact: bool) -> None:
    """out [rows, tokens] += bank . tokens^T for the columns that are in fast memory, live blocks only."""

    def add(bank_ref, offset, cut):
        def body(start, size, _):
            part = product(bank_ref[pl.ds(start, size), cut], tokens_ref[:, cut], CONTRACT_COLUMNS, exact=exact)
            out_ref[pl.ds(offset + start, size), :] += part

        return body

    def over(cut):
        fold_bank(rows, add(banks[0], 0, cut))
        if rows.fresh_rows:
            fold_fresh(rows, add(banks[1], rows.bank, cut))

    each_slice(tokens_ref.shape[1], over)


class Gate(NamedTuple):
    """Of a strip of tokens, each [1, tokens]: 1/||z||, the same or 0 below the floor, 1/sum of weights, bar of Eq. 8."""

    inverse: jax.Array
    slope: jax.Array
    share: jax.Array
    bar: jax.Array | None


def gate(z_ref, order_ref, weight_ref, rows: Rows, how: Selection, cols) -> Gate:
    """Eq. 5 to 8 for the tokens at `cols`: leaves masked z in z_ref and exp((s - max)/temperature) in weight_ref."""
    width = cols.size

    def square(start, size, total):
        at = pl.ds(start, size)
        z = jnp.where(rows.exist(start, (size, width)), z_ref[at, cols], 0.0)
        z_ref[at, cols] = z
        return total + jnp.sum(z * z, axis=0, keepdims=True)

    norm2 = fold(rows, square, jnp.zeros((1, width), jnp.float32))
    inverse = jax.lax.rsqrt(jnp.maximum(norm2, FLOOR))
    best = _order(z_ref, order_ref, rows, cols, inverse)
    kth, end = _kth(order_ref, rows, how.top_k, cols)

    def weigh(start, size, total):
        at = pl.ds(start, size)
        order = order_ref[at, cols]
        index = start + jax.lax.broadcasted_iota(jnp.int32, (size, width), 0)
        kept = ((order > kth) | ((order == kth) & (index < end))) & (order > LOWEST)
        s = z_ref[at, cols] * inverse
        weight = jnp.where(kept, jnp.exp((s - best) * (1.0 / how.temperature)), 0.0)
        weight_ref[at, cols] = weight
        return total + jnp.sum(weight, axis=0, keepdims=True)

    total = fold(rows, weigh, jnp.zeros((1, width), jnp.float32))
    bar = None
    if how.threshold != 0.0:
        relative = jnp.where(best > 0, how.threshold * best, jnp.inf)
        bar = relative if how.threshold_mode == "relative" else jnp.full_like(best, how.threshold)
    return Gate(inverse, jnp.where(norm2 <= FLOOR, 0.0, inverse), 1.0 / jnp.where(total == 0.0, 1.0, total), bar)


def _order(z_ref, order_ref, rows: Rows, cols, inverse):
    """Scores as integers of the same order (-0.0 counts as 0.0); returns the largest score."""

    def body(start, size, best):
        at = pl.ds(start, size)
        s = z_ref[at, cols] * inverse
        exist = rows.exist(start, s.shape)
        bits = jax.lax.bitcast_convert_type(s, jnp.int32)
        order = jnp.where(s == 0.0, 0, bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF)))
        order_ref[at, cols] = jnp.where(exist, order, LOWEST)
        return jnp.maximum(best, jnp.max(jnp.where(exist, s, -jnp.inf), axis=0, keepdims=True))

    return fold(rows, body, jnp.full((1, cols.size), -jnp.inf, jnp.float32))


def _kth(order_ref, rows: Rows, k: int, cols):
    """Per token the k-th largest order, by bit descent, and the row before which experts of equal order are kept."""
    shape = (1, cols.size)
    if k >= rows.total:
        return jnp.full(shape, LOWEST), jnp.full(shape, rows.total)

    def count(test):
        def body(start, size, total):
            mask = test(order_ref[pl.ds(start, size), cols], start)
            return total + jnp.sum(mask.astype(jnp.int32), axis=0, keepdims=True)

        return fold(rows, body, jnp.zeros(shape, jnp.int32))

    def descend(fits, bits, found):
        def step(i, found):
            candidate = found | (jnp.int32(1) << (bits - 1 - i))
            return jnp.where(fits(candidate), candidate, found)

        return jax.lax.fori_loop(0, bits, step, found)

    positive = count(lambda order, start: order >= 0) >= k
    kth = descend(
        lambda c: count(lambda order, start: order >= c) >= k, 31, jnp.where(positive, jnp.int32(0), LOWEST)
    )
    reach = count(lambda order, start: order >= kth)
    tied = jnp.max(jnp.where(kth > LOWEST, reach, 0)) > k

    def first_of_equals():
        room = k - count(lambda order, start: order > kth)

        def before(end):
            def test(order, start):
                return (order == kth) & (start + jax.lax.broadcasted_iota(jnp.int32, order.shape, 0) < end)

            return count(test) <= room

        return descend(before, rows.total.bit_length(), jnp.zeros(shape, jnp.int32))

    return kth, jax.lax.cond(tied, first_of_equals, lambda: jnp.full(shape, rows.total))


def open_gates(weight, z, passed: Gate):
    """(p, g) of a block of experts: Eq. 7, and Eq. 8 where there is a bar."""
    p = weight * passed.share
    if passed.bar is None:
        return p, p
    return p, jnp.where(z * passed.inverse >= passed.bar, p, 0.0)


def strips(tokens: int) -> list:
    """The lanes of each strip of tokens whose gates are computed together."""
    return [pl.ds(start, LANES) for start in range(0, tokens, LANES)]
