"""The gated projection of a few tokens on Hopper, where reading the bank is the whole cost.

Two kernels: one reads every live key once, over all multiprocessors, and one per token and slice of the outputs picks
the experts and reads their values, no others.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from mora_jax.ops.gated_projection.pallas_gpu_gate import PARTS, cut, product
from mora_jax.ops.gated_projection.reference import FLOOR
from mora_jax.ops.gated_projection.tiles_gpu import PROGRAMS, SMALLEST, divisor, power_of_two
from mora_jax.ops.gated_projection.xla import Selection

MOST_TOKENS = 32
MOST_ROUNDS = 64  # each kept expert costs a pass over the scores of its token
MOST_EXPERTS = 8192  # the scores of one token lie in the registers of one program
BLOCK = 32  # experts that one program responds to


def fits(x: jax.Array, keys: jax.Array, how: Selection) -> bool:
    """Whether `decode_few` takes these shapes."""
    few = 0 < x.shape[0] <= MOST_TOKENS and how.top_k <= MOST_ROUNDS
    return few and 0 < keys.shape[0] <= MOST_EXPERTS


def decode_few(
    x: Float[Array, "t d_in"],
    keys: Float[Array, "n d_in"],
    values: Float[Array, "n d_out"],
    live: Int[Array, ""],
    how: Selection,
    interpret: bool,
) -> Float[Array, "t d_out"]:
    """sum_i g_i z_i b_i (MoRA, arXiv 2506.21035, Eq. 4 to 8) for t <= 32 tokens, forward only."""
    (tokens, d_in), (n, d_out) = x.shape, values.shape
    width = divisor(d_in, 64)
    splits = divisor(d_in // width, max(power_of_two(PROGRAMS // pl.cdiv(n, BLOCK)), 1))
    live = jnp.asarray(live, jnp.int32).reshape(1)
    blocks, rows = pl.cdiv(n, BLOCK), max(power_of_two(tokens), SMALLEST)

    def call(kernel, grid, result, *arguments):
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=[_whole(a.shape) for a in arguments],
            out_specs=_whole(result.shape),
            out_shape=result,
            compiler_params=plgpu.CompilerParams(num_warps=8),
            interpret=interpret,
            name=kernel.func.__name__,
        )(*arguments)

    score = partial(decode_scores_kernel, rows=rows, width=width, steps=d_in // width // splits)
    parts_of_z = jax.ShapeDtypeStruct((splits, rows, blocks * BLOCK), jnp.float32)
    z = call(score, (blocks, splits), parts_of_z, live, x, keys)
    slice_of_y = divisor(d_out, 512)
    choose = partial(decode_outputs_kernel, how=how, width=slice_of_y)
    y = jax.ShapeDtypeStruct((tokens, d_out), x.dtype)
    return call(choose, (tokens, d_out // slice_of_y), y, live, z, values)


def _whole(shape):
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def decode_scores_kernel(live_ref, x_ref, keys_ref, z_ref, *, rows: int, width: int, steps: int):
    """The part of z [splits, rows, n] that one block of experts and one stretch of the inputs contribute."""
    block, split = pl.program_id(0), pl.program_id(1)
    experts = pl.ds(block * BLOCK, BLOCK)
    alive = jnp.minimum(live_ref[0], keys_ref.shape[0])
    token = jax.lax.broadcasted_iota(jnp.int32, (rows, width), 0) < x_ref.shape[0]
    expert = block * BLOCK + jax.lax.broadcasted_iota(jnp.int32, (BLOCK, width), 0) < alive

    def step(i, z):
        at = pl.ds((split * steps + i) * width, width)
        x = plgpu.load(x_ref.at[pl.ds(0, rows), at], mask=token, other=0.0)
        keys = plgpu.load(keys_ref.at[experts, at], mask=expert, other=0.0)
        return z + product(cut(x, PARTS), cut(keys, PARTS), transpose=True)

    needed = steps * (block * BLOCK < alive).astype(jnp.int32)
    z_ref[split, :, experts] = jax.lax.fori_loop(0, needed, step, jnp.zeros((rows, BLOCK), jnp.float32))


def decode_outputs_kernel(live_ref, z_ref, values_ref, y_ref, *, how: Selection, width: int):
    """One slice of y for one token: takes the largest score k times and adds the value that belongs to it."""
    token, at = pl.program_id(0), pl.ds(pl.program_id(1) * width, width)
    splits, _, columns = z_ref.shape
    size = power_of_two(columns)
    index = jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
    exists = index < live_ref[0]
    mask = jnp.broadcast_to(exists[None, :], (splits, size))
    z = jnp.sum(plgpu.load(z_ref.at[:, token, pl.ds(0, size)], mask=mask, other=0.0), axis=0)
    norm2 = jnp.sum(z * z)
    s = jnp.where(exists, z * jax.lax.rsqrt(jnp.maximum(norm2, FLOOR)), -jnp.inf)
    peak = jnp.max(s)
    bar = how.threshold if how.threshold_mode == "absolute" else jnp.where(peak > 0, how.threshold * peak, jnp.inf)

    def turn(_, carry):
        score, last, total, y = carry
        left = jnp.where((s < score) | ((s == score) & (index > last)), s, -jnp.inf)
        top = jnp.max(left)
        first = jnp.min(jnp.where(left == top, index, size))
        there = top > -jnp.inf
        weight = jnp.where(there, jnp.exp((top - peak) * (1.0 / how.temperature)), 0.0)
        is_open = there if how.threshold == 0.0 else there & (top >= bar)
        mask = jnp.broadcast_to(is_open, (width,))
        row = jnp.minimum(first, values_ref.shape[0] - 1)
        value = plgpu.load(values_ref.at[row, at], mask=mask, other=0.0).astype(jnp.float32)
        response = jnp.sum(jnp.where(index == first, z, 0.0))
        return top, first, total + weight, y + jnp.where(mask, weight * response * value, 0.0)

    start = (jnp.float32(jnp.inf), jnp.int32(-1), jnp.float32(0.0), jnp.zeros((width,), jnp.float32))
    _, _, total, y = jax.lax.fori_loop(0, how.top_k, turn, start)
    y = jnp.where(norm2 != norm2, jnp.nan, y / jnp.where(total == 0.0, 1.0, total))
    y_ref[token, at] = y.astype(y_ref.dtype)
