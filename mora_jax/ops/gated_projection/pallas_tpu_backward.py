"""The gradients of the sparse gated projection as one TPU kernel, for a constant bank and trainable fresh experts.

Nothing is saved by the forward pass but its inputs. A tile of tokens goes through three phases: its gates are computed
again while slices of x and keys come by; slices of dy and values give the gradient of g z, and that of the fresh
values; after the gradient of the gates, slices of keys and x give dx and the gradient of the fresh keys. The gradients
of fresh rows gather in VMEM over all tiles of a core: deterministic, and nothing is computed for frozen rows.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mora_jax.ops.gated_projection.pallas_tpu_gate import (
    MATRIX,
    Gate,
    Rows,
    each_slice,
    exact_product,
    fold,
    gate,
    mix,
    respond,
    stack_shape,
    strips,
    turn,
    turned_columns,
)
from mora_jax.ops.gated_projection.tiles import LANES, SLICE, TPU_VMEM_LIMIT, tpu_tiles
from mora_jax.ops.gated_projection.xla import Selection

SLOPE, INVERSE, BAR = range(3)  # rows of what is kept of a token's gate


def gradients(x, keys, values, live, dy, fresh: int, how: Selection, interpret):
    """(dx, d_fresh_keys, d_fresh_values) for padded arrays; keys and values are (bank, fresh) pairs."""
    (tokens, d_in), d_out = x.shape, values[0].shape[1]
    bank, fresh_rows = keys[0].shape[0], keys[1].shape[0]
    total = bank + fresh_rows
    tiles = tpu_tiles(tokens, d_in, d_out, total, x.dtype.itemsize, fresh_rows)
    slices_in, slices_out = d_in // tiles.inputs, d_out // tiles.outputs
    number = pl.cdiv(tokens, tiles.tokens)
    cores = 2 if number % 2 == 0 else 1
    last = slices_in + slices_out - 2  # the step in which the slices of x begin to come by again

    def tile(core, i):
        return core * (number // cores) + i

    def in_slice(j):
        return jnp.where(j < last, jnp.minimum(j, slices_in - 1), j - last)

    def out_slice(j):
        return jnp.clip(j - (slices_in - 1), 0, slices_out - 1)

    def keys_spec(k):
        return pl.BlockSpec((k.shape[0], tiles.inputs), lambda core, i, j, live: (0, in_slice(j)))

    def values_spec(v):
        return pl.BlockSpec((v.shape[0], tiles.outputs), lambda core, i, j, live: (0, out_slice(j)))

    def whole(d):
        return pl.BlockSpec((1, fresh_rows, d), lambda core, i, j, live: (core, 0, 0))

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(cores, number // cores, last + slices_in),
        in_specs=[
            pl.BlockSpec((tiles.tokens, tiles.inputs), lambda core, i, j, live: (tile(core, i), in_slice(j))),
            pl.BlockSpec((tiles.tokens, tiles.outputs), lambda core, i, j, live: (tile(core, i), out_slice(j))),
            tuple(keys_spec(k) for k in keys),
            tuple(values_spec(v) for v in values),
        ],
        out_specs=[
            pl.BlockSpec(
                (tiles.tokens, tiles.inputs), lambda core, i, j, live: (tile(core, i), jnp.maximum(j - last, 0))
            ),
            whole(d_in),
            whole(d_out),
        ],
        scratch_shapes=[
            pltpu.VMEM((total, tiles.tokens), jnp.float32),
            pltpu.VMEM((total, tiles.tokens), jnp.float32),
            pltpu.VMEM((total, tiles.tokens), jnp.float32),
            pltpu.VMEM((total, tiles.tokens), jnp.int32),
            pltpu.VMEM((8, tiles.tokens), jnp.float32),
            pltpu.VMEM((tiles.tokens, turned_columns(bank, fresh_rows)), x.dtype),
            stack_shape(x.dtype, tiles, bank, fresh_rows),
            pltpu.VMEM((tiles.tokens, min(tiles.inputs, SLICE)), jnp.float32),
        ],
    )
    dx, d_keys, d_values = pl.pallas_call(
        partial(_kernel, how=how, fresh=fresh, tokens=tokens, slices=(slices_in, slices_out)),
        grid_spec=grid,
        out_shape=[
            jax.ShapeDtypeStruct((tokens, d_in), x.dtype),
            jax.ShapeDtypeStruct((cores, fresh_rows, d_in), jnp.float32),
            jax.ShapeDtypeStruct((cores, fresh_rows, d_out), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=TPU_VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * (total * (4 * d_in + d_out) + 3 * fresh_rows * (d_in + d_out)),
            transcendentals=tokens * total,
            bytes_accessed=tokens * (2 * d_in + d_out) * x.dtype.itemsize + 8 * total * (d_in + d_out),
        ),
        interpret=interpret,
        name="gated_projection_gradients",
    )(live, x, dy, keys, values)
    return dx, jnp.sum(d_keys, axis=0)[:fresh], jnp.sum(d_values, axis=0)[:fresh]


def _kernel(live_ref, x_ref, dy_ref, keys, values, *outputs_and_scratch, how, fresh, tokens, slices):
    dx_ref, d_keys_ref, d_values_ref, *scratch = outputs_and_scratch
    z_ref, share_ref, dz_ref, order_ref, token_ref, turned_ref, stack_ref, sum_ref = scratch
    bank = keys[0].shape[0]
    rows = Rows(bank, fresh, z_ref.shape[0] - bank, live_ref[0])
    step, tile = pl.program_id(2), pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    left = tokens - tile * x_ref.shape[0]  # tokens from the first of this tile on; the rest of the tile is garbage
    ragged = tokens % x_ref.shape[0] != 0
    second, third = slices[0] - 1, slices[0] + slices[1] - 2

    @pl.when(step == 0)
    def _():
        z_ref[...] = jnp.zeros_like(z_ref)
        dz_ref[...] = jnp.zeros_like(dz_ref)

    @pl.when((step == 0) & (pl.program_id(1) == 0))
    def _():
        d_keys_ref[...] = jnp.zeros_like(d_keys_ref)
        d_values_ref[...] = jnp.zeros_like(d_values_ref)

    @pl.when(step <= second)
    def _():
        respond(z_ref, x_ref, keys, stack_ref, rows, exact=True)

    @pl.when(step == second)
    def _():
        gate(z_ref, order_ref, share_ref, rows, how, partial(_keep, share_ref, token_ref, rows))

    @pl.when((step >= second) & (step <= third))
    def _():
        respond(dz_ref, dy_ref, values, stack_ref, rows, exact=False)
        c = _fresh_mix(z_ref, share_ref, token_ref, rows, how)
        _gather(d_values_ref, c, dy_ref, (step - second) * dy_ref.shape[1], left if ragged else None)

    @pl.when(step == third)
    def _():
        for cols in strips(z_ref.shape[1]):
            _gate_gradient(z_ref, share_ref, dz_ref, token_ref, turned_ref, rows, how, cols)

    @pl.when(step >= third)
    def _():
        mix(dx_ref, turned_ref, keys, stack_ref, sum_ref, rows)
        dz = dz_ref[bank:, :]
        _gather(d_keys_ref, dz, x_ref, (step - third) * x_ref.shape[1], left if ragged else None)


def _keep(share_ref, token_ref, rows: Rows, cols, passed: Gate):
    """Leaves p of one strip of tokens in share_ref and what else its gradient needs in token_ref."""

    def normalise(start, size, _):
        share_ref[pl.ds(start, size), cols] *= passed.share

    fold(rows, normalise)
    token_ref[SLOPE : SLOPE + 1, cols] = passed.slope
    token_ref[INVERSE : INVERSE + 1, cols] = passed.inverse
    if passed.bar is not None:
        token_ref[BAR : BAR + 1, cols] = passed.bar


def _opened(z, p, token_ref, how: Selection, cols):
    """g: p where Eq. 8 lets it through."""
    if how.threshold == 0.0:
        return p
    return jnp.where(z * token_ref[INVERSE : INVERSE + 1, cols] >= token_ref[BAR : BAR + 1, cols], p, 0.0)


def _fresh_mix(z_ref, share_ref, token_ref, rows: Rows, how: Selection):
    """g z of the fresh experts, [fresh, tokens]."""
    z = z_ref[rows.bank :, :]
    return _opened(z, share_ref[rows.bank :, :], token_ref, how, slice(None)) * z


def _gather(out_ref, weights, tokens_ref, first_column, left):
    """out[:, columns] += weights . tokens, without the rows of `tokens` from `left` on."""
    if left is not None:
        lane = jax.lax.broadcasted_iota(jnp.int32, weights.shape, 1)
        weights = jnp.where(lane < left, weights, 0.0)

    def over(cut):
        rows = tokens_ref[:, cut]
        if left is not None:
            valid = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0) < left
            rows = jnp.where(valid, rows.astype(jnp.float32), 0.0).astype(rows.dtype)
        at = pl.ds(pl.multiple_of(first_column + cut.start, LANES), cut.size) if out_ref.shape[2] > cut.size else cut
        out_ref[0, :, at] += exact_product(weights, rows, MATRIX)

    each_slice(tokens_ref.shape[1], over, SLICE)


def _gate_gradient(z_ref, share_ref, dz_ref, token_ref, turned_ref, rows: Rows, how: Selection, cols):
    """From dc = d(g z) to dz, in place and once more with experts along lanes."""
    slope, inverse = token_ref[SLOPE : SLOPE + 1, cols], token_ref[INVERSE : INVERSE + 1, cols]
    zero = jnp.zeros_like(slope)

    def parts(start, size):
        at = pl.ds(start, size)
        z, p, dc = z_ref[at, cols], share_ref[at, cols], dz_ref[at, cols]
        g = _opened(z, p, token_ref, how, cols)
        return z, p, g, dc, jnp.where(g == p, dc * z, 0.0)  # no gradient through a gate that Eq. 8 closed

    def mean(start, size, total):
        _, p, _, _, dg = parts(start, size)
        return total + jnp.sum(p * dg, axis=0, keepdims=True)

    centre = fold(rows, mean, zero)

    def along(start, size, total):
        z, p, _, _, dg = parts(start, size)
        return total + jnp.sum(z * inverse * p * (dg - centre), axis=0, keepdims=True)

    radial = fold(rows, along, zero)

    def finish(start, size, _):
        z, p, g, dc, dg = parts(start, size)
        ds = (p * (dg - centre) - z * inverse * radial) * (1.0 / how.temperature)
        dz = jnp.where(slope == 0.0, 0.0, g * dc + ds * slope)
        dz_ref[pl.ds(start, size), cols] = dz

    fold(rows, finish)
    turn(turned_ref, dz_ref, rows, cols)
