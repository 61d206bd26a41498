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
from mora_jax.ops.gated_projection.pallas_tpu_gate import (
    MATRIX,
    Rows,
    each_slice,
    fold_bank,
    fold_fresh,
    gate,
    open_gates,
    product,
    respond,
    strips,
)
from mora_jax.ops.gated_projection.tiles import LANES, TPU_VMEM, Tiles, padded_rows, round_up, tpu_tiles
from mora_jax.ops.gated_projection.xla import Selection


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

    With fresh rows keys and values are constants. `interpret` runs the kernels on the CPU, for tests.
    """
    return _forward(x, keys, values, fresh_keys, fresh_values, live, how, interpret)[0]


def unsupported(x, keys, values, fresh_keys, how: Selection) -> str | None:
    """Why these shapes and dtypes cannot run here, in one clause; None where they can. Looks at nothing but shapes."""
    del how
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x is {x.dtype}, not float32 or bfloat16"
    rows = padded_rows(keys.shape[0]) + (0 if fresh_keys is None else padded_rows(fresh_keys.shape[0]))
    for backward in (False, True):
        if tpu_tiles(x.shape[0], x.shape[1], values.shape[1], rows, x.dtype.itemsize, backward) is None:
            return f"{rows} experts of {x.shape[1]} inputs and {values.shape[1]} outputs exceed VMEM"
    return None


def _forward(x, keys, values, fresh_keys, fresh_values, live, how, interpret):
    saved = x, keys, values, fresh_keys, fresh_values, live
    if x.shape[0] == 0:
        return jnp.zeros((0, values.shape[1]), x.dtype), saved
    banks = pad_banks(keys, fresh_keys), pad_banks(values, fresh_values)
    fresh = 0 if fresh_keys is None else fresh_keys.shape[0]
    y = _fused(pad_tokens(x), *banks, jnp.reshape(live, 1).astype(jnp.int32), fresh, how, interpret)
    return y[: x.shape[0]], saved


def _backward(how, interpret, saved, dy):
    x, keys, values, fresh_keys, fresh_values, live = saved
    if fresh_keys is None:  # every row has a gradient, and such banks are small: nothing to save
        _, vjp = jax.vjp(lambda x, keys, values: xla.project(x, keys, values, None, None, live, how), x, keys, values)
        return *vjp(dy), None, None, None
    fresh = fresh_keys.shape[0]
    banks = pad_banks(keys, fresh_keys), pad_banks(values, fresh_values)
    live = jnp.reshape(live, 1).astype(jnp.int32)
    dx, d_keys, d_values = gradients(pad_tokens(x), *banks, live, pad_tokens(dy), fresh, how, interpret)
    d_fresh = d_keys.astype(fresh_keys.dtype), d_values.astype(fresh_values.dtype)
    return dx[: x.shape[0]], None, None, *d_fresh, None


project.defvjp(_forward, _backward)


def pad_banks(bank, fresh) -> tuple[jax.Array, ...]:
    """Both banks with rows padded to what the kernels take; no copy where they are already."""
    banks = (bank,) if fresh is None else (bank, fresh)
    return tuple(jnp.pad(b, ((0, padded_rows(b.shape[0]) - b.shape[0]), (0, 0))) for b in banks)


def pad_tokens(x):
    """At least one register of tokens; more are cut raggedly inside the kernels."""
    return jnp.pad(x, ((0, max(0, LANES - x.shape[0])), (0, 0)))


def _fused(x, keys, values, live, fresh: int, how: Selection, interpret):
    (tokens, d_in), d_out = x.shape, values[0].shape[1]
    total = sum(k.shape[0] for k in keys)
    tiles = tpu_tiles(tokens, d_in, d_out, total, x.dtype.itemsize, backward=False)
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
            pltpu.VMEM((total, LANES), jnp.int32),
            pltpu.VMEM((total, LANES), jnp.float32),
            pltpu.VMEM((tiles.tokens, round_up(total, LANES)), x.dtype),
            pltpu.VMEM((tiles.tokens, tiles.outputs), jnp.float32),
        ],
    )
    kernel = partial(_kernel, how=how, fresh=fresh, slices_in=slices_in)
    return pl.pallas_call(
        kernel,
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((tokens, d_out), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=TPU_VMEM + (12 << 20)
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


def _kernel(live_ref, x_ref, keys, values, y_ref, z_ref, order_ref, weight_ref, c_ref, sum_ref, *, how, fresh, slices_in):
    """c_ref is g z as [tokens, experts]."""
    rows = Rows(keys[0].shape[0], fresh, z_ref.shape[0] - keys[0].shape[0], live_ref[0])
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        z_ref[...] = jnp.zeros_like(z_ref)

    @pl.when(step < slices_in)
    def _():
        respond(z_ref, x_ref, keys, rows, exact=True)

    @pl.when(step == slices_in - 1)
    def _():
        for cols in strips(z_ref.shape[1]):
            _mix(z_ref, order_ref, weight_ref, c_ref, rows, how, cols)

    @pl.when(step >= slices_in - 1)
    def _():
        _answer(y_ref, sum_ref, c_ref, values, rows)


def _mix(z_ref, order_ref, weight_ref, c_ref, rows: Rows, how: Selection, cols):
    """Gates of one strip of tokens, stored as g z with experts along lanes."""
    passed = gate(z_ref.at[:, cols], order_ref, weight_ref, rows, how, pl.ds(0, LANES))

    def mix(offset):
        def body(start, size, _):
            at = pl.ds(offset + start, size)
            z = z_ref[at, cols]
            c = open_gates(weight_ref[at, :], z, passed)[1] * z
            c_ref[cols, at] = c.T.astype(c_ref.dtype)

        return body

    fold_bank(rows, mix(0))
    fold_fresh(rows, mix(rows.bank))


def _answer(y_ref, sum_ref, c_ref, values, rows: Rows):
    """y = c . values for the columns that are in fast memory."""
    sum_ref[...] = jnp.zeros_like(sum_ref)

    def add(bank_ref, offset, cut):
        def body(start, size, _):
            v = bank_ref[pl.ds(start, size), cut].astype(c_ref.dtype)
            sum_ref[:, cut] += product(c_ref[:, pl.ds(offset + start, size)], v, MATRIX)

        return body

    def over(cut):
        fold_bank(rows, add(values[0], 0, cut))
        if rows.fresh_rows:
            fold_fresh(rows, add(values[1], rows.bank, cut))

    each_slice(y_ref.shape[1], over)
    y_ref[...] = sum_ref[...].astype(y_ref.dtype)
