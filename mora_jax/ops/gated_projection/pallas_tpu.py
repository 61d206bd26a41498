"""The sparse gated projection as one TPU kernel: responses, exact top-k, softmax, threshold and the value product.

A tile of tokens goes through three phases. Its responses to all live experts gather in VMEM while slices of x and keys
come by; its gates are computed once; then the slices of values come by and leave as slices of y. Nothing of size
[tokens, experts] reaches main memory. Where whole rows fit, there is one slice and the banks are read once.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from mora_jax.ops.gated_projection import xla
from mora_jax.ops.gated_projection.pallas_tpu_backward import gradients
from mora_jax.ops.gated_projection.pallas_tpu_decode import answer
from mora_jax.ops.gated_projection.pallas_tpu_gate import (
    Gate,
    Rows,
    contributions,
    gate,
    mix,
    respond,
    stack_shape,
    turn,
    turned_columns,
)
from mora_jax.ops.gated_projection.tiles import (
    BLOCK,
    LANES,
    SLICE,
    TPU_VMEM_LIMIT,
    WIDEST,
    Tiles,
    padded_rows,
    tpu_tiles,
)
from mora_jax.ops.gated_projection.xla import Selection

DECODED_TOKENS = 32  # up to here rows of values are fetched one by one,
DECODED_ROWS = 64  # up to so many for a token


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def project(
    x: Float[Array, "t d_in"],
    keys: Float[Array, "n d_in"],
    values: Float[Array, "n d_out"],
    fresh_keys: Float[Array, "r d_in"] | None,
    fresh_values: Float[Array, "r d_out"] | None,
    live: Int[Array, ""],
    how: Selection,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "t d_out"]:
    """y = sum_i g_i z_i b_i of `reference.py` over the first `live` rows of keys and values and all fresh rows.

    With fresh rows keys and values are constants. A few tokens before a large bank are left to `decode`. `interpret`
    runs the kernels on the CPU, for tests.
    """
    if fresh_keys is None and x.shape[0] <= DECODED_TOKENS and 2 * x.shape[0] * how.top_k <= keys.shape[0]:
        return decode(x, keys, values, fresh_keys, fresh_values, live, how, interpret)
    return _forward(x, keys, values, fresh_keys, fresh_values, live, how, interpret)[0]


def decode(
    x: Float[Array, "t d_in"],
    keys: Float[Array, "n d_in"],
    values: Float[Array, "n d_out"],
    fresh_keys: Float[Array, "r d_in"] | None,
    fresh_values: Float[Array, "r d_out"] | None,
    live: Int[Array, ""],
    how: Selection,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "t d_out"]:
    """The same y without a gradient, for a few tokens: reads live keys and the values of the chosen experts only.

    More than 128 tokens, a top_k above 64 and values that are not float32 (rows that cannot be fetched singly) go
    through `project`'s kernel.
    """
    float32 = all(v is None or v.dtype == jnp.float32 for v in (values, fresh_values))
    if not 0 < x.shape[0] <= LANES or how.top_k > DECODED_ROWS or not float32:
        return _forward(x, keys, values, fresh_keys, fresh_values, live, how, interpret)[0]
    banks = pad_banks(keys, fresh_keys), pad_banks(values, fresh_values)
    fresh = 0 if fresh_keys is None else fresh_keys.shape[0]
    live = jnp.reshape(live, 1).astype(jnp.int32)
    return answer(pad_tokens(x), *banks, live, fresh, x.shape[0], how, interpret)


def unsupported(x, keys, values, fresh_keys, how: Selection) -> str | None:
    """Why these shapes and dtypes cannot run here, in one clause; None where they can. Looks at nothing but shapes."""
    del how
    for name, array in {"x": x, "keys": keys, "values": values}.items():
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {array.dtype}, not float32 or bfloat16"
    if fresh_keys is not None and fresh_keys.shape[0] > BLOCK:
        return f"{fresh_keys.shape[0]} fresh experts are more than {BLOCK}"
    for d in (x.shape[1], values.shape[1]):
        if d % LANES and d > WIDEST:
            return f"width {d} is neither a multiple of {LANES} nor at most {WIDEST}"
    bank, d_in, d_out = padded_rows(keys.shape[0]), x.shape[1], values.shape[1]
    fresh = 0 if fresh_keys is None else padded_rows(fresh_keys.shape[0])
    for gradient_rows in (None, fresh or None):
        if tpu_tiles(x.shape[0], d_in, d_out, bank + fresh, x.dtype.itemsize, gradient_rows) is None:
            return f"{bank} + {fresh} experts of {d_in} inputs and {d_out} outputs exceed VMEM"
    return None


def _forward(x, keys, values, fresh_keys, fresh_values, live, how, interpret):
    saved = x, keys, values, fresh_keys, fresh_values, live
    banks = pad_banks(keys, fresh_keys), pad_banks(values, fresh_values)
    fresh = 0 if fresh_keys is None else fresh_keys.shape[0]
    y = _fused(pad_tokens(x), *banks, jnp.reshape(live, 1).astype(jnp.int32), fresh, how, interpret)
    return y[: x.shape[0]], saved


def _backward(how, interpret, saved, dy):
    x, keys, values, fresh_keys, fresh_values, live = saved
    if fresh_keys is None:  # gradients of every row would not fit VMEM in general: they take the unfused path
        _, vjp = jax.vjp(lambda *rows: xla.gated_projection(*rows, None, None, live, how), x, keys, values)
        return *vjp(dy), None, None, None
    fresh = fresh_keys.shape[0]
    banks = pad_banks(keys, fresh_keys), pad_banks(values, fresh_values)
    live = jnp.reshape(live, 1).astype(jnp.int32)
    dy = jnp.pad(dy, ((0, max(0, LANES - x.shape[0])), (0, 0)))
    dx, d_keys, d_values = gradients(pad_tokens(x), *banks, live, dy, fresh, how, interpret)
    return xla.cotangents(dx[: x.shape[0]], d_keys, d_values, keys, values, fresh_keys, fresh_values)


project.defvjp(_forward, _backward)


def pad_banks(bank, fresh) -> tuple[jax.Array, ...]:
    """Both banks with rows padded to what the kernels take; no copy where they are already."""
    banks = (bank,) if fresh is None else (bank, fresh)
    return tuple(jnp.pad(b, ((0, padded_rows(b.shape[0]) - b.shape[0]), (0, 0))) for b in banks)


def pad_tokens(x):
    """At least one register of tokens; more are cut raggedly inside the kernels.

    The last token is repeated: zeros would have equal scores, which cost a search for the lowest rows.
    """
    return jnp.pad(x, ((0, max(0, LANES - x.shape[0])), (0, 0)), mode="edge" if x.shape[0] else "constant")


def _fused(x, keys, values, live, fresh: int, how: Selection, interpret):
    (tokens, d_in), d_out = x.shape, values[0].shape[1]
    bank, total = keys[0].shape[0], sum(k.shape[0] for k in keys)
    tiles = tpu_tiles(tokens, d_in, d_out, total, x.dtype.itemsize)
    slices_in, slices_out = d_in // tiles.inputs, d_out // tiles.outputs

    def in_slice(i, j, live):
        return jnp.minimum(j, slices_in - 1)

    def out_slice(i, j, live):
        return jnp.maximum(j - (slices_in - 1), 0)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(pl.cdiv(tokens, tiles.tokens), slices_in + slices_out - 1),
        in_specs=[
            pl.BlockSpec((tiles.tokens, tiles.inputs), lambda *at: (at[0], in_slice(*at))),
            tuple(pl.BlockSpec((k.shape[0], tiles.inputs), lambda *at: (0, in_slice(*at))) for k in keys),
            tuple(pl.BlockSpec((v.shape[0], tiles.outputs), lambda *at: (0, out_slice(*at))) for v in values),
        ],
        out_specs=pl.BlockSpec((tiles.tokens, tiles.outputs), lambda *at: (at[0], out_slice(*at))),
        scratch_shapes=[
            pltpu.VMEM((total, tiles.tokens), jnp.float32),
            pltpu.VMEM((total, tiles.tokens), jnp.int32),
            pltpu.VMEM((total, tiles.tokens), jnp.float32),
            pltpu.VMEM((tiles.tokens, turned_columns(bank, total - bank)), x.dtype),
            stack_shape(x.dtype, tiles, bank, total - bank),
            pltpu.VMEM((tiles.tokens, min(tiles.outputs, SLICE)), jnp.float32),
            pltpu.SMEM((pl.cdiv(total, BLOCK),), jnp.int32),
        ],
    )
    kernel = partial(_kernel, how=how, fresh=fresh, slices_in=slices_in)
    return pl.pallas_call(
        kernel,
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((tokens, d_out), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=TPU_VMEM_LIMIT
        ),
        cost_estimate=_cost(tokens, d_in, d_out, total, x.dtype.itemsize, tiles),
        interpret=interpret,
        name="gated_projection",
    )(live, x, keys, values)


def _cost(tokens, d_in, d_out, rows, itemsize, tiles: Tiles) -> pl.CostEstimate:
    """Floating-point operations and bytes, every row live."""
    reads = pl.cdiv(tokens, tiles.tokens)
    bank_in = rows * d_in * 4 * (reads if tiles.inputs < d_in else 1)
    bank_out = rows * d_out * 4 * (reads if tiles.outputs < d_out else 1)
    return pl.CostEstimate(
        flops=2 * tokens * rows * (3 * d_in + d_out),
        transcendentals=tokens * rows,
        bytes_accessed=tokens * (d_in + d_out) * itemsize + bank_in + bank_out,
    )


def _kernel(live_ref, x_ref, keys, values, y_ref, *scratch, how, fresh, slices_in):
    z_ref, order_ref, c_ref, turned_ref, stack_ref, sum_ref, active_ref = scratch
    rows = Rows(keys[0].shape[0], fresh, z_ref.shape[0] - keys[0].shape[0], live_ref[0])
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        z_ref[...] = jnp.zeros_like(z_ref)

    @pl.when(step < slices_in)
    def _():
        respond(z_ref, x_ref, keys, stack_ref, rows, exact=True)

    @pl.when(step == slices_in - 1)
    def _():
        for block in range(active_ref.shape[0]):
            active_ref[block] = 0

        def finish(cols, passed: Gate):
            contributions(z_ref, c_ref, active_ref, rows, cols, passed)
            turn(turned_ref, c_ref, rows, cols)

        gate(z_ref, order_ref, c_ref, rows, how, finish)

    @pl.when(step >= slices_in - 1)
    def _():
        mix(y_ref, turned_ref, values, stack_ref, sum_ref, rows, active_ref)
