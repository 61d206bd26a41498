"""What the TPU kernels share: responses and gates of one tile of tokens, computed inside a kernel.

Experts lie along rows and tokens along lanes, so every sum or maximum over experts is a sum of registers. Rows are the
padded bank, of which whole blocks of dead rows are never touched, and behind it the padded fresh experts.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mora_jax.ops.gated_projection.reference import FLOOR
from mora_jax.ops.gated_projection.tiles import BLOCK, LANES, MIX_STRIP, SLICE, STRIP, Tiles, round_up, whole_lanes
from mora_jax.ops.gated_projection.xla import ROUNDS_UP_TO, Selection

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

    @property
    def first(self) -> int:
        """The rows of the first block of the bank, which goes through products together with the fresh rows."""
        return min(self.bank, BLOCK)

    @property
    def blocks(self) -> jax.Array:
        """How many blocks of the bank hold live rows; the first counts always, as fresh rows go through with it."""
        blocks = jax.lax.div(self.live + (BLOCK - 1), BLOCK)  # `//` asks for the chip, unknown when compiling ahead
        return jnp.maximum(blocks, 1)

    def exist(self, start, shape):
        """Which rows of a block that begins at row `start` hold an expert."""
        row = start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        exist = row < self.live
        if self.fresh:
            exist |= (row >= self.bank) & (row < self.bank + self.fresh)
        return exist


def turned_columns(bank: int, fresh_rows: int) -> int:
    """Columns of an array with experts along lanes: first block and fresh rows, up to whole registers, other blocks."""
    first = min(bank, BLOCK)
    return round_up(first + fresh_rows, LANES) + bank - first


def fold(rows: Rows, body, carry=None):
    """carry = body(first row, row count, carry) over the blocks of the bank with live rows, then the fresh rows."""
    if rows.bank == rows.first:
        carry = body(0, rows.bank, carry)
    else:
        start = partial(pl.multiple_of, values=BLOCK)
        carry = jax.lax.fori_loop(0, rows.blocks, lambda b, c: body(start(b * BLOCK), BLOCK, c), carry)
    return body(rows.bank, rows.fresh_rows, carry) if rows.fresh_rows else carry


def each_slice(width: int, body, at_most: int) -> None:
    """body(columns) over equal slices of `width` columns; one slice where it is no multiple of a register."""
    size = whole_lanes(width, at_most)
    if size == width:
        body(pl.ds(0, width))
        return

    def step(i, _):
        body(pl.ds(pl.multiple_of(i * size, LANES), size))

    jax.lax.fori_loop(0, width // size, step, None)


def bf16_parts(a: jax.Array) -> list[jax.Array]:
    """Three bfloat16 arrays of 8 bits each whose sum is the float32 `a`; cut by mask, so no compiler folds them."""
    parts, a = [], a.astype(jnp.float32)
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(a, jnp.int32)
        part = jax.lax.bitcast_convert_type(bits & jnp.int32(-65536), jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        a = a - part
    return parts


def product(a: jax.Array, b: jax.Array, dimensions) -> jax.Array:
    """A product with float32 sums, at full precision for float32."""
    precision = HIGHEST if b.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def exact_product(a: jax.Array, b: jax.Array, dimensions) -> jax.Array:
    """The same at the precision of a float32 `a` where `b` is bfloat16: the parts of `a` are one tall matrix."""
    if b.dtype == jnp.float32:
        return product(a.astype(jnp.float32), b, dimensions)
    parts = product(jnp.concatenate(bf16_parts(a)), b, dimensions)
    height = a.shape[0]
    return parts[:height] + parts[height : 2 * height] + parts[2 * height :]


def stack(stack_ref, blocks, parts: int) -> int:
    """Writes [part 0 of every block, part 1 of every block, ...]; returns how many rows these are."""
    row = 0
    cut = [bf16_parts(a) if parts > 1 else [a.astype(stack_ref.dtype)] for a in blocks]
    for part in range(parts):
        for block in cut:
            stack_ref[row : row + block[0].shape[0], : block[0].shape[1]] = block[part]
            row += block[0].shape[0]
    return row


def stack_shape(dtype, tiles: Tiles, bank: int, fresh_rows: int):
    """Scratch for `stack`: as many parts as `dtype`, that of the tokens, needs, of the widest slice."""
    parts = 3 if dtype == jnp.bfloat16 else 1
    columns = max(whole_lanes(tiles.inputs, SLICE), whole_lanes(tiles.outputs, SLICE))
    return pltpu.VMEM((parts * (min(bank, BLOCK) + fresh_rows), columns), dtype)


def respond(out_ref, tokens_ref, banks, stack_ref, rows: Rows, *, exact: bool) -> None:
    """out [rows, tokens] += bank . tokens^T for the columns that are in fast memory, live blocks only.

    Every block is one tall matrix, so that tokens are loaded into the matrix unit once: its parts, if `exact`, and the
    fresh rows with the first.
    """
    parts = 3 if exact and tokens_ref.dtype == jnp.bfloat16 else 1

    def add(targets, cut):
        blocks = [ref[at, cut] for ref, at, _ in targets]
        height = stack(stack_ref, blocks, parts)

        def strip(cols):
            found = product(stack_ref[:height, : cut.size], tokens_ref[cols, cut], CONTRACT_COLUMNS)
            row = 0
            for _, at, out in targets * parts:
                out_ref[out, cols] += found[row : row + at.size]
                row += at.size

        each_slice(tokens_ref.shape[0], strip, STRIP[tokens_ref.dtype.name])

    def over(cut):
        targets = [(banks[0], pl.ds(0, rows.first), pl.ds(0, rows.first))]
        if rows.fresh_rows:
            targets.append((banks[1], pl.ds(0, rows.fresh_rows), pl.ds(rows.bank, rows.fresh_rows)))
        add(targets, cut)

        def later(block, _):
            at = pl.ds(pl.multiple_of(block * BLOCK, BLOCK), BLOCK)
            add([(banks[0], at, at)], cut)

        if rows.bank > rows.first:
            jax.lax.fori_loop(1, rows.blocks, later, None)

    each_slice(tokens_ref.shape[1], over, SLICE)


def turn(turned_ref, source_ref, rows: Rows, cols) -> None:
    """One strip of `source` [rows, tokens] with experts along lanes, first block and fresh rows side by side."""
    near = [source_ref[: rows.first, cols]]
    if rows.fresh_rows:
        near.append(source_ref[rows.bank :, cols])
    near = jnp.concatenate(near) if rows.fresh_rows else near[0]
    turned_ref[cols, : near.shape[0]] = near.T.astype(turned_ref.dtype)

    def later(block, _):
        at = pl.ds(pl.multiple_of(block * BLOCK, BLOCK), BLOCK)
        turned_ref[cols, _later_columns(block, rows)] = source_ref[at, cols].T.astype(turned_ref.dtype)

    if rows.bank > rows.first:
        jax.lax.fori_loop(1, rows.blocks, later, None)


def _later_columns(block, rows: Rows):
    start = round_up(rows.first + rows.fresh_rows, LANES) + (block - 1) * BLOCK
    return pl.ds(pl.multiple_of(start, LANES), BLOCK)


def mix(out_ref, turned_ref, banks, stack_ref, sum_ref, rows: Rows, active=None) -> None:
    """out [tokens, columns] = turned . banks for the columns that are in fast memory.

    The first block of the bank and the fresh rows are always added; later blocks where live and, with `active`, where
    active[block] is not 0.
    """

    def each_strip(body):
        each_slice(out_ref.shape[0], body, MIX_STRIP[turned_ref.dtype.name])

    def over(cut):
        blocks = [banks[0][: rows.first, cut]] + [ref[:, cut] for ref in banks[1:]]
        height, here = stack(stack_ref, blocks, 1), pl.ds(0, cut.size)
        single = rows.bank == rows.first

        def near(tokens):
            total = product(turned_ref[tokens, :height], stack_ref[:height, here], MATRIX)
            if single:
                out_ref[tokens, cut] = total.astype(out_ref.dtype)
            else:
                sum_ref[tokens, here] = total

        def later(block, _):
            @pl.when(True if active is None else active[block] != 0)
            def _():
                bank = banks[0][pl.ds(pl.multiple_of(block * BLOCK, BLOCK), BLOCK), cut].astype(turned_ref.dtype)

                def strip(tokens):
                    sum_ref[tokens, here] += product(turned_ref[tokens, _later_columns(block, rows)], bank, MATRIX)

                each_strip(strip)

        each_strip(near)
        if not single:
            jax.lax.fori_loop(1, rows.blocks, later, None)
            out_ref[:, cut] = sum_ref[:, here].astype(out_ref.dtype)

    each_slice(out_ref.shape[1], over, SLICE)


class Gate(NamedTuple):
    """Of tokens, each [1, tokens]: 1/||z||, the same or 0 below the floor, 1/sum of weights, bar of Eq. 8."""

    inverse: jax.Array
    slope: jax.Array
    share: jax.Array
    bar: jax.Array | None


def gate(z_ref, order_ref, weight_ref, rows: Rows, how: Selection, then) -> None:
    """Eq. 5 to 8: masks z_ref, leaves exp((s - max)/temperature) in weight_ref, calls then(columns, Gate) per strip."""
    norms = [_order(z_ref, order_ref, rows, cols) for cols in strips(z_ref.shape[1])]
    kth, end = _kth(order_ref, rows, how.top_k)
    for cols, (norm2, inverse, best) in zip(strips(z_ref.shape[1]), norms, strict=True):
        at = slice(cols.start, cols.start + cols.size)
        total = _weigh(z_ref, order_ref, weight_ref, rows, how, cols, (inverse, best, kth[:, at], end[:, at]))
        bar = None
        if how.threshold != 0.0:
            relative = jnp.where(best > 0, how.threshold * best, jnp.inf)
            bar = relative if how.threshold_mode == "relative" else jnp.full_like(best, how.threshold)
        slope = jnp.where(norm2 <= FLOOR, 0.0, inverse)
        then(cols, Gate(inverse, slope, 1.0 / jnp.where(total == 0.0, 1.0, total), bar))


def _order(z_ref, order_ref, rows: Rows, cols):
    """Scores as integers of the same order (-0.0 counts as 0.0); returns ||z||^2, 1/||z|| and the largest score."""

    def square(start, size, total):
        at = pl.ds(start, size)
        z = jnp.where(rows.exist(start, (size, cols.size)), z_ref[at, cols], 0.0)
        z_ref[at, cols] = z
        return total + jnp.sum(z * z, axis=0, keepdims=True)

    norm2 = fold(rows, square, jnp.zeros((1, cols.size), jnp.float32))
    inverse = jax.lax.rsqrt(jnp.maximum(norm2, FLOOR))

    def body(start, size, best):
        at = pl.ds(start, size)
        s = z_ref[at, cols] * inverse
        exist = rows.exist(start, s.shape)
        bits = jax.lax.bitcast_convert_type(s, jnp.int32)
        order = jnp.where(s == 0.0, 0, bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF)))
        order_ref[at, cols] = jnp.where(exist, order, LOWEST)
        return jnp.maximum(best, jnp.max(jnp.where(exist, s, -jnp.inf), axis=0, keepdims=True))

    return norm2, inverse, fold(rows, body, jnp.full((1, cols.size), -jnp.inf, jnp.float32))


def _weigh(z_ref, order_ref, weight_ref, rows: Rows, how: Selection, cols, chosen):
    """Unnormalised softmax over the kept experts; returns its sum."""
    inverse, best, kth, end = chosen

    def body(start, size, total):
        at = pl.ds(start, size)
        order = order_ref[at, cols]
        index = start + jax.lax.broadcasted_iota(jnp.int32, order.shape, 0)
        kept = ((order > kth) | ((order == kth) & (index < end))) & (order > LOWEST)
        s = z_ref[at, cols] * inverse
        weight = jnp.where(kept, jnp.exp((s - best) * (1.0 / how.temperature)), 0.0)
        weight_ref[at, cols] = weight
        return total + jnp.sum(weight, axis=0, keepdims=True)

    return fold(rows, body, jnp.zeros((1, cols.size), jnp.float32))


def _kth(order_ref, rows: Rows, k: int):
    """Per token the k-th largest order, and the row before which experts of equal order are kept.

    For small k by k rounds of "largest below the last"; where that is not the answer, because scores are equal, and for
    larger k by bit descent.
    """
    shape = (1, order_ref.shape[1])
    everything = jnp.full(shape, rows.total)
    if k >= rows.total:
        return jnp.full(shape, LOWEST), everything
    existing = jnp.minimum(rows.live, rows.bank) + rows.fresh
    if k > ROUNDS_UP_TO:
        return _descend(order_ref, rows, k)

    def next_largest(_, last):
        def body(start, size, top):
            order = order_ref[pl.ds(start, size), :]
            return jnp.maximum(top, jnp.max(jnp.where(order < last, order, LOWEST), axis=0, keepdims=True))

        return fold(rows, body, jnp.full(shape, LOWEST))

    kth = jax.lax.fori_loop(0, k, next_largest, jnp.full(shape, jnp.iinfo(jnp.int32).max))
    reach = _count(order_ref, rows, lambda order, start: order >= kth)
    ambiguous = (jnp.max(jnp.abs(reach - k)) > 0) & (existing > k)
    return jax.lax.cond(ambiguous, lambda: _descend(order_ref, rows, k), lambda: (kth, everything))


def _count(order_ref, rows: Rows, test):
    """How many experts of each token pass test(order, first row)."""

    def body(start, size, total):
        mask = test(order_ref[pl.ds(start, size), :], start)
        return total + jnp.sum(mask.astype(jnp.int32), axis=0, keepdims=True)

    return fold(rows, body, jnp.zeros((1, order_ref.shape[1]), jnp.int32))


def _descend(order_ref, rows: Rows, k: int):
    """The k-th largest order bit by bit from the highest, then in the same way the row before which equals are kept."""

    def largest(fits, bits, found):
        def step(i, found):
            candidate = found | (jnp.int32(1) << (bits - 1 - i))
            return jnp.where(fits(candidate), candidate, found)

        return jax.lax.fori_loop(0, bits, step, found)

    positive = _count(order_ref, rows, lambda order, start: order >= 0) >= k
    start_from = jnp.where(positive, jnp.int32(0), LOWEST)
    kth = largest(lambda c: _count(order_ref, rows, lambda order, start: order >= c) >= k, 31, start_from)
    room = k - _count(order_ref, rows, lambda order, start: order > kth)

    def fits(end):
        def test(order, start):
            return (order == kth) & (start + jax.lax.broadcasted_iota(jnp.int32, order.shape, 0) < end)

        return _count(order_ref, rows, test) <= room

    return kth, largest(fits, rows.total.bit_length(), jnp.zeros_like(kth))


def contributions(z_ref, weight_ref, active_ref, rows: Rows, cols, passed: Gate) -> None:
    """c = g z (Eq. 7 and 8) in place of the weights, and in which blocks of the bank any is not 0."""

    def body(start, size, _):
        at = pl.ds(start, size)
        z = z_ref[at, cols]
        p = weight_ref[at, cols] * passed.share
        c = z * (p if passed.bar is None else jnp.where(z * passed.inverse >= passed.bar, p, 0.0))
        weight_ref[at, cols] = c
        if active_ref is not None and rows.bank > rows.first:
            active_ref[jax.lax.div(start, BLOCK)] |= jnp.max((c != 0.0).astype(jnp.int32))

    fold(rows, body)


def strips(tokens: int) -> list:
    """The tokens of each strip whose gates are weighed together."""
    return [pl.ds(start, LANES) for start in range(0, tokens, LANES)]
