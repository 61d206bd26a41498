"""The sparse gated projection of a few tokens before a large bank: only live keys and selected values are read.

Blocks of keys come by once, dead ones never; after the last of them the gates are computed, every token lists its
experts with an open gate, and the rows of `values` on that list are fetched one by one, a token ahead of their use.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mora_jax.ops.gated_projection.pallas_tpu_gate import (
    CONTRACT_COLUMNS,
    Rows,
    contributions,
    each_slice,
    exact_product,
    fold,
    gate,
)
from mora_jax.ops.gated_projection.tiles import BLOCK, LANES, SLICE, TPU_VMEM_LIMIT
from mora_jax.ops.gated_projection.xla import Selection


def answer(x, keys, values, live, fresh: int, count: int, how: Selection, interpret):
    """y [count, d_out] for padded arrays: x [LANES, d_in], keys and values as (bank,) or (bank, fresh)."""
    d_in, d_out = x.shape[1], values[0].shape[1]
    bank, total = keys[0].shape[0], sum(k.shape[0] for k in keys)
    block = min(bank, BLOCK)
    slots = min(how.top_k, total)

    def live_block(b, live):
        return jnp.minimum(b, jnp.maximum(jax.lax.div(live[0] + (block - 1), block) - 1, 0)), 0

    def whole(b, live):
        return 0, 0

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(bank // block,),
        in_specs=[
            pl.BlockSpec(x.shape, whole),
            (pl.BlockSpec((block, d_in), live_block), *(pl.BlockSpec(k.shape, whole) for k in keys[1:])),
            tuple(pl.BlockSpec(memory_space=pl.ANY) for _ in values),
        ],
        out_specs=pl.BlockSpec((count, d_out), whole),
        scratch_shapes=[
            pltpu.VMEM((total, LANES), jnp.float32),
            pltpu.VMEM((total, LANES), jnp.int32),
            pltpu.VMEM((total, LANES), jnp.float32),
            pltpu.VMEM((slots, LANES), jnp.int32),
            pltpu.VMEM((slots, LANES), jnp.float32),
            pltpu.SMEM((slots, LANES), jnp.int32),
            pltpu.SMEM((slots, LANES), jnp.float32),
            pltpu.VMEM((2 * slots, d_out), jnp.float32),
            pltpu.VMEM((count, d_out), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
    )
    return pl.pallas_call(
        partial(_kernel, bank=bank, how=how, fresh=fresh),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((count, d_out), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=TPU_VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(
            flops=6 * LANES * total * d_in + 2 * count * slots * d_out,
            transcendentals=LANES * total,
            bytes_accessed=x.size * x.dtype.itemsize + 4 * total * d_in + 4 * count * slots * d_out,
        ),
        interpret=interpret,
        name="gated_projection_decode",
    )(live, x, keys, values)


def _kernel(live_ref, x_ref, keys, values, y_ref, *scratch, bank, how, fresh):
    z_ref, order_ref, weight_ref, *listed, index_ref, c_ref, fetched_ref, sum_ref, arrived = scratch
    rows = Rows(bank, fresh, z_ref.shape[0] - bank, live_ref[0])
    step, block = pl.program_id(0), keys[0].shape[0]

    @pl.when(step * block < rows.live)
    def _():
        _respond(z_ref, x_ref, keys[0], pl.multiple_of(step * block, block))

    @pl.when(step == pl.num_programs(0) - 1)
    def _():
        if fresh:
            _respond(z_ref, x_ref, keys[1], bank)
        gate(z_ref, order_ref, weight_ref, rows, how, partial(contributions, z_ref, weight_ref, None, rows))
        _list(weight_ref, *listed, rows)
        pltpu.sync_copy(listed[0], index_ref)
        pltpu.sync_copy(listed[1], c_ref)
        _fetch(y_ref, values, index_ref, c_ref, fetched_ref, sum_ref, arrived, rows)


def _respond(z_ref, x_ref, keys_ref, row):
    """z of the keys that are in fast memory, stored from `row` on."""
    at = pl.ds(row, keys_ref.shape[0])
    z_ref[at, :] = jnp.zeros((keys_ref.shape[0], LANES), jnp.float32)

    def over(cut):
        z_ref[at, :] += exact_product(keys_ref[:, cut], x_ref[:, cut], CONTRACT_COLUMNS)

    each_slice(x_ref.shape[1], over, SLICE)


def _list(weight_ref, index_ref, c_ref, rows: Rows):
    """The experts of each token with a weight, in order of rows, and the weights; then rows.total."""

    def slot(i, last):
        def first_after(start, size, carry):
            first, found = carry
            c = weight_ref[pl.ds(start, size), :]
            row = start + jax.lax.broadcasted_iota(jnp.int32, c.shape, 0)
            here = jnp.min(jnp.where((c != 0.0) & (row > last), row, rows.total), axis=0, keepdims=True)
            value = jnp.sum(jnp.where(row == here, c, 0.0), axis=0, keepdims=True)
            return jnp.minimum(first, here), jnp.where(here < first, value, found)

        first, found = fold(rows, first_after, (jnp.full_like(last, rows.total), jnp.zeros(last.shape, jnp.float32)))
        index_ref[pl.ds(i, 1), :] = first
        c_ref[pl.ds(i, 1), :] = found
        return first

    jax.lax.fori_loop(0, index_ref.shape[0], slot, jnp.full((1, LANES), -1, jnp.int32))


def _fetch(y_ref, values, index_ref, c_ref, fetched_ref, sum_ref, arrived, rows: Rows):
    """y of each token from the listed rows of values, which are fetched while the token before is summed."""
    count, slots = y_ref.shape[0], index_ref.shape[0]

    def each_copy(token, act):
        half = jax.lax.rem(token, 2)

        def one(i, _):
            row = index_ref[i, token]
            target = fetched_ref.at[pl.ds(half * slots + i, 1), :]
            sources = [(values[0], 0, rows.bank)]
            if rows.fresh_rows:
                sources.append((values[1], rows.bank, rows.total))
            for source, first, end in sources:

                @pl.when((row >= first) & (row < end))
                def _(source=source, first=first):
                    at = source.at[pl.ds(row - first, 1), :]
                    act(pltpu.make_async_copy(at, target, arrived.at[half]))

        jax.lax.fori_loop(0, slots, one, None)

    def answer_one(token, _):
        @pl.when(token + 1 < count)
        def _():
            each_copy(token + 1, lambda copy: copy.start())

        each_copy(token, lambda copy: copy.wait())

        def add(i, _):
            @pl.when(index_ref[i, token] < rows.total)
            def _():
                row = fetched_ref[pl.ds(jax.lax.rem(token, 2) * slots + i, 1), :]
                sum_ref[pl.ds(token, 1), :] += c_ref[i, token] * row

        jax.lax.fori_loop(0, slots, add, None)

    sum_ref[...] = jnp.zeros_like(sum_ref)
    each_copy(jnp.int32(0), lambda copy: copy.start())
    jax.lax.fori_loop(0, count, answer_one, None)
    y_ref[...] = sum_ref[...].astype(y_ref.dtype)
