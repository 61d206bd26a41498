"""Inside the Hopper kernels: one token tile, its responses, and which experts it keeps.

Triton has no scratch memory of its own, so a tile's responses lie in a buffer of global memory that belongs to the
program and is used again for its next tile: a few megabytes for the whole chip, whatever the number of tokens, that
stay in the L1 and L2 caches. Registers hold one block of experts at a time, so any number of experts compiles without
spills, and every pass over the experts visits live blocks only.

Tensor cores multiply bfloat16. A float32 operand is cut into three bfloat16 parts that add up to it, and the products
that matter are summed from the smallest (the six-pass scheme of Henry, Tang and Heinecke, arXiv 1904.06376).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mora_jax.ops.gated_projection.reference import FLOOR
from mora_jax.ops.gated_projection.tiles_gpu import Tiles
from mora_jax.ops.gated_projection.xla import Selection

PARTS = 3  # bfloat16 numbers that make up one float32
ROUNDS_UP_TO = 32  # the k from which 32 counting passes over the scores are fewer than k
LOWEST = -0x7F800001  # minus infinity as an integer of the same order as the floats
UPPER_HALF = -0x10000  # mask of the bits that a float32 shares with bfloat16


class Bank(NamedTuple):
    """Rows of one kind, frozen or fresh, in blocks of equal size."""

    rows: int  # rows that were given; what follows in the last block is padding
    block: int
    blocks: int
    first: int  # column of the first row among all columns of a tile
    list: int  # entry of the list of active blocks where those of this bank begin
    fresh: bool


class Plan(NamedTuple):
    """Everything static that a kernel knows."""

    tokens: int
    d_in: int
    d_out: int
    banks: tuple[Bank, ...]
    tiles: Tiles
    programs: int
    how: Selection
    exact: bool  # float32 in and out, against bfloat16
    interpret: bool

    @property
    def columns(self) -> int:
        """Columns of one tile of responses, padding included."""
        return sum(bank.blocks * bank.block for bank in self.banks)

    @property
    def parts(self) -> int:
        """bfloat16 parts of what is not a score: gates times responses, values, gradients."""
        return PARTS if self.exact else 1


class Gate(NamedTuple):
    """What decides about one token, each [tokens, 1]."""

    inverse: jax.Array  # 1 / ||z||
    directed: jax.Array  # ||z||^2 lies above the floor
    broken: jax.Array  # ||z||^2 is NaN
    kth: jax.Array  # the k-th largest score
    end: jax.Array  # where scores equal the k-th: the first column that is not kept
    peak: jax.Array  # the largest score
    total: jax.Array  # sum of the kept exp((s - peak) / temperature)


def cut(a: jax.Array, parts: int) -> list[jax.Array]:
    """bfloat16 arrays that add up to `a`: exactly for three parts, rounded to the nearest for one."""
    if a.dtype == jnp.bfloat16:
        return [a]
    if parts == 1:
        return [a.astype(jnp.bfloat16)]
    found = []
    for _ in range(parts):
        bits = jax.lax.bitcast_convert_type(a, jnp.int32) & jnp.int32(UPPER_HALF)
        part = jax.lax.bitcast_convert_type(bits, jnp.float32)
        found.append(part.astype(jnp.bfloat16))
        a = a - part
    return found


def terms(a: int, b: int) -> list[tuple[int, int]]:
    """Which parts meet in a product of `a` by `b` parts: the others are below the rounding of float32."""
    return [(i, j) for i in range(a) for j in range(b) if i + j < max(a, b)]


def product(a: list[jax.Array], b: list[jax.Array], transpose: bool = False) -> jax.Array:
    """The product of two sums of parts, a b or a b^T, as far as float32 can tell; the smallest terms first.

    Only for the short stretch of a loop's step: tensor cores round towards zero where they accumulate, so sums over
    several terms and over the steps are left to ordinary arithmetic (Ootomo and Yokota, arXiv 2203.03341).
    """
    total = None
    for i, j in sorted(terms(len(a), len(b)), key=sum, reverse=True):
        term = plgpu.dot(a[i], b[j], trans_b=transpose)
        # A difference: Triton makes a chain of products of a sum, and computes half of a chain twice.
        total = term if total is None else total - (-term)
    return total


class Tile:
    """One token tile of one program: its place in the arrays, its live columns, its responses."""

    def __init__(self, plan: Plan, program: jax.Array, number: jax.Array, live: jax.Array, z_ref):
        self.plan, self.z_ref = plan, z_ref
        self.live = jnp.minimum(live, plan.banks[0].rows)
        self.size, self.program = plan.tiles.tokens, program
        self.start = number * self.size
        inside = self.start + jax.lax.broadcasted_iota(jnp.int32, (self.size, 1), 0)
        self.valid = inside < plan.tokens

    @staticmethod
    def walk(plan: Plan, visit: Callable) -> None:
        """Calls visit(program, number of the tile) for every tile of this program: each `programs`-th."""
        program = pl.program_id(0)
        own = jax.lax.div(pl.cdiv(plan.tokens, plan.tiles.tokens) - 1 - program, jnp.int32(plan.programs)) + 1

        def step(i, carry):
            visit(program, program + i * plan.programs)
            return carry

        jax.lax.fori_loop(0, own, step, 0)

    def load(self, ref, at: pl.Slice, width: int) -> jax.Array:
        """[tokens, width] of x or dy, zero below the last token."""
        mask = jnp.broadcast_to(self.valid, (self.size, width))
        return plgpu.load(ref.at[pl.ds(self.start, self.size), at], mask=mask, other=0.0)

    def store(self, ref, at: pl.Slice, block: jax.Array) -> None:
        """Writes [tokens, width] where there are tokens."""
        mask = jnp.broadcast_to(self.valid, block.shape)
        plgpu.store(ref.at[pl.ds(self.start, self.size), at], block.astype(ref.dtype), mask=mask)

    def z(self, bank: Bank, i) -> jax.Array:
        """The responses [tokens, block] of block i."""
        return self.z_ref[self.program, :, self.at(bank, i)]

    def at(self, bank: Bank, i) -> pl.Slice:
        """The columns of block i."""
        return pl.ds(bank.first + i * bank.block, bank.block)

    def column(self, bank: Bank, i) -> jax.Array:
        """[tokens, block]: the number of each column of block i."""
        inside = jax.lax.broadcasted_iota(jnp.int32, (self.size, bank.block), 1)
        return bank.first + i * bank.block + inside

    def exists(self, bank: Bank, i) -> jax.Array:
        """[tokens, block]: which columns of block i are experts, neither dead nor padding."""
        return self.column(bank, i) < bank.first + (bank.rows if bank.fresh else self.live)

    def blocks(self, bank: Bank):
        """How many blocks of the bank have a live row."""
        return bank.blocks if bank.fresh else jax.lax.div(self.live + (bank.block - 1), jnp.int32(bank.block))

    def over(self, step: Callable, carry):
        """Folds step(number of the bank, bank, block, carry) over the live blocks."""
        for number, bank in enumerate(self.plan.banks):

            def body(i, carry, number=number, bank=bank):
                return step(number, bank, i, carry)

            carry = jax.lax.fori_loop(0, self.blocks(bank), body, carry)
        return carry

    def full(self, value, dtype=jnp.float32) -> jax.Array:
        """A constant per token."""
        return jnp.full((self.size, 1), value, dtype)

    def scores(self, bank: Bank, i, inverse: jax.Array) -> jax.Array:
        """s of block i (Eq. 5), minus infinity where there is no expert."""
        return jnp.where(self.exists(bank, i), self.z(bank, i) * inverse, -jnp.inf)

    def kept(self, bank: Bank, i, s: jax.Array, gate: Gate) -> jax.Array:
        """Which experts of block i are among the k (Eq. 6)."""
        tied = (s == gate.kth) & (self.column(bank, i) < gate.end)
        return ((s > gate.kth) | tied) & (s > -jnp.inf)

    def softmax(self, bank: Bank, i, s: jax.Array, gate: Gate) -> jax.Array:
        """p of block i (Eq. 7) before it is divided by the total."""
        weight = jnp.exp((s - gate.peak) * (1.0 / self.plan.how.temperature))
        return jnp.where(self.kept(bank, i, s, gate), weight, 0.0)

    def opened(self, s: jax.Array, gate: Gate) -> jax.Array:
        """Which scores reach the bar of Eq. 8."""
        how = self.plan.how
        if how.threshold_mode == "absolute":
            return s >= how.threshold
        return (s >= how.threshold * gate.peak) & (gate.peak > 0)

    def list_block(self, ref, bank: Bank, i, mask: jax.Array, count):
        """Lists block i as active if the mask holds anywhere; how many blocks are listed now."""
        ref[self.program, bank.list + count] = i
        return count + jnp.max(mask.astype(jnp.int32))

    def barrier(self) -> None:
        """What the program wrote into its buffers may now be read by all of its threads."""
        if not self.plan.interpret:
            plgpu.debug_barrier()


def respond(tile: Tile, a_ref, row_ref, bank: Bank, i, depth: int, width: int, a_parts: int) -> jax.Array:
    """a rows^T [tokens, block] for block i of the bank, in steps of `width` along the `depth` of both."""

    def step(j, total):
        at = pl.ds(j * width, width)
        a = cut(tile.load(a_ref, at, width), a_parts)
        rows = [row_ref[part, pl.ds(i * bank.block, bank.block), at] for part in range(row_ref.shape[0])]
        return total + product(a, rows, transpose=True)

    return jax.lax.fori_loop(0, depth // width, step, jnp.zeros((tile.size, bank.block), jnp.float32))


def decide(tile: Tile, x_ref, key_refs) -> Gate:
    """Writes the responses of a tile into its buffer and finds what its gates need (Eq. 5 to 7)."""
    plan = tile.plan

    def score(number, bank, i, carry):
        norm2, most = carry
        z = respond(tile, x_ref, key_refs[number], bank, i, plan.d_in, plan.tiles.inputs, PARTS)
        exists = tile.exists(bank, i)
        z = jnp.where(exists, z, 0.0)
        tile.z_ref[tile.program, :, tile.at(bank, i)] = z
        most = jnp.maximum(most, jnp.max(jnp.where(exists, z, -jnp.inf), axis=1, keepdims=True))
        return norm2 + jnp.sum(z * z, axis=1, keepdims=True), most

    norm2, most = tile.over(score, (tile.full(0.0), tile.full(-jnp.inf)))
    tile.barrier()
    inverse = jax.lax.rsqrt(jnp.maximum(norm2, FLOOR))
    kth, end = _last_kept(tile, inverse)
    peak = most * inverse  # rounding keeps the order, so this is the largest score
    gate = Gate(inverse, norm2 > FLOOR, norm2 != norm2, kth, end, peak, norm2)

    def add(_, bank, i, total):
        s = tile.scores(bank, i, inverse)
        return total + jnp.sum(tile.softmax(bank, i, s, gate), axis=1, keepdims=True)

    total = tile.over(add, tile.full(0.0))
    return gate._replace(total=jnp.where(total == 0.0, 1.0, total))


def _count(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask.astype(jnp.int32), axis=1, keepdims=True)


def _last_kept(tile: Tile, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The k-th largest score of each token, and the column before which its equals are kept."""
    k, columns = tile.plan.how.top_k, tile.plan.columns
    everything = tile.full(columns, jnp.int32)
    if k >= sum(bank.rows for bank in tile.plan.banks):
        return tile.full(-jnp.inf), everything
    kth = _by_rounds(tile, inverse, k) if k <= ROUNDS_UP_TO else _by_descent(tile, inverse, k)

    def compare(_, bank, i, carry):
        s = tile.scores(bank, i, inverse)
        return carry[0] + _count(s > kth), carry[1] + _count(s == kth)

    above, equal = tile.over(compare, (tile.full(0, jnp.int32), tile.full(0, jnp.int32)))
    room = k - above

    def search(start):
        def fits(bound):
            def step(_, bank, i, count):
                s = tile.scores(bank, i, inverse)
                return count + _count((s == kth) & (tile.column(bank, i) < bound))

            return tile.over(step, tile.full(0, jnp.int32)) <= room

        return _largest(fits, columns.bit_length(), start)

    crowded = jnp.max(equal - room) > 0
    return kth, jax.lax.cond(crowded, search, lambda _: everything, tile.full(0, jnp.int32))


def _largest(fits: Callable, bits: int, start: jax.Array) -> jax.Array:
    """The largest integer that `fits` (a monotone test), built bit by bit from the highest."""

    def step(i, found):
        candidate = found | (jnp.int32(1) << (bits - 1 - i))
        return jnp.where(fits(candidate), candidate, found)

    return jax.lax.fori_loop(0, bits, step, start)


def _by_rounds(tile: Tile, inverse: jax.Array, k: int) -> jax.Array:
    """Goes down the distinct scores until k scores are not below: one pass counts and finds the next."""

    def turn(_, score):
        def step(_, bank, i, carry):
            reached, below = carry
            s = tile.scores(bank, i, inverse)
            below = jnp.maximum(below, jnp.max(jnp.where(s < score, s, -jnp.inf), axis=1, keepdims=True))
            return reached + _count(s >= score), below

        reached, below = tile.over(step, (tile.full(0, jnp.int32), tile.full(-jnp.inf)))
        return jnp.where(reached >= k, score, below)

    return jax.lax.fori_loop(0, k, turn, tile.full(jnp.inf))


def _by_descent(tile: Tile, inverse: jax.Array, k: int) -> jax.Array:
    """Finds the k-th largest score bit by bit, as an integer of the same order."""

    def enough(bound):
        def step(_, bank, i, count):
            s = tile.scores(bank, i, inverse)
            return count + _count(_ordered(s) >= bound)

        return tile.over(step, tile.full(0, jnp.int32)) >= k

    positive = enough(tile.full(0, jnp.int32))
    found = _largest(enough, 31, jnp.where(positive, tile.full(0, jnp.int32), tile.full(-(2**31), jnp.int32)))
    found = jnp.maximum(found, LOWEST)  # fewer than k scores: all of them
    bits = found ^ ((found >> 31) & jnp.int32(0x7FFFFFFF))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _ordered(s: jax.Array) -> jax.Array:
    """Integers in the order of the floats; -0.0 equals 0.0, as it does for a comparison of floats."""
    bits = jax.lax.bitcast_convert_type(s, jnp.int32)
    return jnp.where(s == 0.0, 0, bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF)))
