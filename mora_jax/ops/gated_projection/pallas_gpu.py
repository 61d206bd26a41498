"""The sparse gated projection on NVIDIA Hopper, as Pallas kernels for Triton: the gate never leaves the chip.

A fixed number of programs walk over the token tiles. For each tile one kernel computes the responses, finds the exact
top-k, the softmax and the threshold, and multiplies by the values of those blocks of experts that some token of the
tile activates. The backward kernel recomputes the gate instead of keeping it.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from mora_jax.ops.gated_projection import pallas_gpu_decode
from mora_jax.ops.gated_projection.pallas_gpu_backward import backward_kernel
from mora_jax.ops.gated_projection.pallas_gpu_gate import PARTS, Bank, Plan, Tile, cut, decide, product, terms
from mora_jax.ops.gated_projection.tiles_gpu import PROGRAMS, SMALLEST, tiles_of
from mora_jax.ops.gated_projection.xla import Selection, cotangents

ADDRESSES = 2**31  # Triton counts elements in int32
FLOATS = (jnp.float32, jnp.bfloat16)


def unsupported(x, keys, values, fresh_keys, how: Selection) -> str | None:
    """Why these shapes and dtypes cannot run here, in one clause, or None. Looks at nothing but shapes and dtypes."""
    del how
    for name, array in (("x", x), ("keys", keys), ("values", values), ("fresh keys", fresh_keys)):
        if array is not None and array.dtype not in FLOATS:
            return f"{name} of dtype {array.dtype}: only float32 and bfloat16"
    for name, size in (("d_in", x.shape[1]), ("d_out", values.shape[1])):
        if size % SMALLEST:
            return f"{name} {size} is no multiple of {SMALLEST}"
        if x.shape[0] * size >= ADDRESSES:
            return f"{x.shape[0]} tokens of {size} numbers do not fit 32-bit addresses"
        if PARTS * keys.shape[0] * size >= ADDRESSES:
            return f"{keys.shape[0]} experts of {size} numbers do not fit 32-bit addresses"
    return None


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def project(
    x: Float[Array, "t d_in"],
    keys: Float[Array, "n d_in"],
    values: Float[Array, "n d_out"],
    fresh_keys: Float[Array, "r d_in"] | None,
    fresh_values: Float[Array, "r d_out"] | None,
    live: Int[Array, ""],
    how: Selection,
    interpret: bool = False,
) -> Float[Array, "t d_out"]:
    """sum_i g_i z_i b_i (MoRA, arXiv 2506.21035, Eq. 4 to 8) in the dtype of x; see `api.gated_projection`.

    `interpret` runs the kernel on the CPU, without tensor cores, for tests.
    """
    if x.shape[0] == 0:
        return jnp.zeros((0, values.shape[1]), x.dtype)
    plan = _plan(x, keys, values, fresh_keys, how, "forward", interpret)
    rows = _pairs(plan, keys, fresh_keys, PARTS), _pairs(plan, values, fresh_values, plan.parts)
    buffers = [_buffer(plan, jnp.float32), _buffer(plan, jnp.bfloat16, plan.parts), _active(plan)]
    y, *_ = _call(forward_kernel, plan, [x], rows, [((plan.tokens, plan.d_out), x.dtype)], buffers, live)
    return y


def decode(
    x: Float[Array, "t d_in"],
    keys: Float[Array, "n d_in"],
    values: Float[Array, "n d_out"],
    fresh_keys: Float[Array, "r d_in"] | None,
    fresh_values: Float[Array, "r d_out"] | None,
    live: Int[Array, ""],
    how: Selection,
    interpret: bool = False,
) -> Float[Array, "t d_out"]:
    """`project` for a few tokens, without a gradient: it reads the live keys and the values of chosen experts only.

    With fresh rows, with more than 32 tokens, or with a larger k or bank than the kernel was built for, it is
    `project`, which is always right.
    """
    if fresh_keys is None and pallas_gpu_decode.fits(x, keys, how):
        return pallas_gpu_decode.decode_few(x, keys, values, live, how, interpret)
    return project(x, keys, values, fresh_keys, fresh_values, live, how, interpret)


def forward_kernel(live_ref, x_ref, *refs, plan: Plan):
    """Walks over the token tiles: decide, gate, multiply."""
    count = len(plan.banks)
    keys, values, (y_ref, z_ref, c_ref, active_ref) = refs[:count], refs[count : 2 * count], refs[2 * count :]

    def visit(program, number):
        tile = Tile(plan, program, number, live_ref[0], z_ref)
        gate = decide(tile, x_ref, keys)
        active = _gates(tile, gate, c_ref, active_ref)
        tile.barrier()
        _outputs(tile, c_ref, active_ref, active, values, y_ref)
        tile.barrier()

    Tile.walk(plan, visit)


def _gates(tile: Tile, gate, c_ref, active_ref) -> list[jax.Array]:
    """Writes c = g z of a tile and lists the active blocks; how many there are in each bank."""
    plan = tile.plan
    found = []
    for bank in plan.banks:

        def step(i, count, bank=bank):
            s, z = tile.scores(bank, i, gate.inverse), tile.z(bank, i)
            p = tile.softmax(bank, i, s, gate) / gate.total
            g = p if plan.how.threshold == 0.0 else jnp.where(tile.opened(s, gate), p, 0.0)
            c = jnp.where(gate.broken & tile.exists(bank, i), jnp.nan, g * z)
            for part, a in enumerate(cut(c, plan.parts)):
                c_ref[tile.program, part, :, tile.at(bank, i)] = a
            return tile.list_block(active_ref, bank, i, c != 0.0, count)

        found.append(jax.lax.fori_loop(0, tile.blocks(bank), step, jnp.int32(0)))
    return found


def _outputs(tile: Tile, c_ref, active_ref, active, value_refs, y_ref) -> None:
    """y = c values over the active blocks, a slice of the outputs at a time."""
    plan, width = tile.plan, tile.plan.tiles.outputs

    def write(j, carry):
        at = pl.ds(j * width, width)
        y = jnp.zeros((tile.size, width), jnp.float32)
        for number, bank in enumerate(plan.banks):

            def add(i, y, number=number, bank=bank):
                block = active_ref[tile.program, bank.list + i]
                c = [c_ref[tile.program, part, :, tile.at(bank, block)] for part in range(plan.parts)]
                ref = value_refs[number]
                rows = [ref[part, pl.ds(block * bank.block, bank.block), at] for part in range(ref.shape[0])]
                return y + product(c, rows)

            y = jax.lax.fori_loop(0, active[number], add, y)
        tile.store(y_ref, at, y)
        return carry

    jax.lax.fori_loop(0, plan.d_out // width, write, 0)


def _save(x, keys, values, fresh_keys, fresh_values, live, how, interpret):
    y = project(x, keys, values, fresh_keys, fresh_values, live, how, interpret)
    return y, (x, keys, values, fresh_keys, fresh_values, live)


def _backward(how, interpret, saved, dy):
    """dx from one kernel; the kernel also writes dz and c of the trained rows alone, [tokens, r], which a plain
    product turns into their gradients. With fresh rows the bank has none."""
    x, keys, values, fresh_keys, fresh_values, live = saved
    if x.shape[0] == 0:
        return (*jax.tree.map(jnp.zeros_like, saved[:5]), None)
    plan = _plan(x, keys, values, fresh_keys, how, "backward", interpret)
    rows = _pairs(plan, keys, fresh_keys, PARTS), _pairs(plan, values, fresh_values, plan.parts)
    trained = (plan.tokens, plan.banks[-1].blocks * plan.banks[-1].block), jnp.float32
    outs = [((plan.tokens, plan.d_in), x.dtype), trained, trained]
    buffers = [
        _buffer(plan, jnp.float32),
        _buffer(plan, jnp.float32),
        _buffer(plan, jnp.bfloat16, plan.parts),
        _active(plan),
    ]
    dx, dz, c, *_ = _call(backward_kernel, plan, [x, dy], rows, outs, buffers, live)
    bank = plan.banks[-1]
    exists = jnp.arange(bank.rows) < (bank.rows if bank.fresh else live)
    d_keys, d_values = (_weighted_rows(a[:, : bank.rows], exists, b) for a, b in ((dz, x), (c, dy)))
    return cotangents(dx, d_keys, d_values, keys, values, fresh_keys, fresh_values)


project.defvjp(_save, _backward)


def _weighted_rows(weights: jax.Array, exists: jax.Array, a: jax.Array) -> jax.Array:
    """weights^T a [rows, d] in float32; weights of rows that do not exist were never written."""
    weights = jnp.where(exists[None, :], weights, 0.0)
    contract_tokens = (((0,), (0,)), ((), ()))
    if a.dtype == jnp.float32:
        return jax.lax.dot_general(weights, a, contract_tokens, precision=jax.lax.Precision.HIGHEST)
    halves = _cut_outside(weights, 2)
    return sum(jax.lax.dot_general(half, a, contract_tokens, preferred_element_type=jnp.float32) for half in halves)


def _cut_outside(a: jax.Array, parts: int) -> jax.Array:
    """[parts, ...] bfloat16 arrays that add up to `a`; the first alone is `a` rounded to the nearest."""
    if a.dtype == jnp.bfloat16:
        return a[None]
    found = []
    for _ in range(parts):
        part = jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7)  # a pair of casts would be optimised away
        found.append(part.astype(jnp.bfloat16))
        a = a - part
    return jnp.stack(found)


def _plan(x, keys, values, fresh_keys, how, kernel: str, interpret: bool) -> Plan:
    (tokens, d_in), (n, d_out) = x.shape, values.shape
    exact = x.dtype == jnp.float32
    fresh = 0 if fresh_keys is None else fresh_keys.shape[0]
    tiles = tiles_of(kernel, d_in, d_out, n, fresh, exact)
    banks, first, entry = [], 0, 0
    kinds = ((n, tiles.experts, False), (fresh, tiles.fresh, True))
    for rows, block, is_fresh in kinds[: 1 if fresh_keys is None else 2]:
        blocks = max(pl.cdiv(rows, block), 1)
        banks.append(Bank(rows, block, blocks, first, entry, is_fresh))
        first, entry = first + blocks * block, entry + blocks + 1
    programs = min(PROGRAMS, pl.cdiv(tokens, tiles.tokens))
    return Plan(tokens, d_in, d_out, tuple(banks), tiles, programs, how, exact, interpret)


def _pairs(plan: Plan, frozen: jax.Array, fresh: jax.Array | None, parts: int) -> list[jax.Array]:
    """For each bank its rows [parts, rows, d], padded to whole blocks."""
    arrays = []
    for bank, a in zip(plan.banks, (frozen, fresh), strict=False):
        arrays.append(_cut_outside(jnp.pad(a, ((0, bank.blocks * bank.block - bank.rows), (0, 0))), parts))
    return arrays


def _buffer(plan: Plan, dtype, parts: int = 0):
    """Space for one tile of columns per program."""
    lead = (plan.programs, parts) if parts else (plan.programs,)
    return (*lead, plan.tiles.tokens, plan.columns), dtype


def _active(plan: Plan):
    """Space for the list of active blocks of every bank, with room for one entry that does not count."""
    return (plan.programs, sum(bank.blocks + 1 for bank in plan.banks)), jnp.int32


def flops(plan: Plan, key_parts: int, value_parts: int, backward: bool) -> int:
    """Of a kernel's products of bfloat16 parts, as if every row existed and every block of experts were active."""
    inward, outward = len(terms(plan.parts, key_parts)), len(terms(plan.parts, value_parts))
    again = len(terms(plan.parts, min(plan.parts, key_parts))) if backward else 0  # dx = dz keys
    return 2 * plan.tokens * plan.columns * ((inward + again) * plan.d_in + outward * plan.d_out)


def _call(kernel, plan: Plan, tokens, rows, outs, buffers, live):
    def whole(shape):
        return pl.BlockSpec(shape, lambda _: (0,) * len(shape))

    arguments = [jnp.asarray(live, jnp.int32).reshape(1), *tokens, *rows[0], *rows[1]]
    results = [*outs, *buffers]
    call = pl.pallas_call(
        partial(kernel, plan=plan),
        grid=(plan.programs,),
        in_specs=[whole(a.shape) for a in arguments],
        out_specs=[whole(shape) for shape, _ in results],
        out_shape=[jax.ShapeDtypeStruct(*result) for result in results],
        compiler_params=plgpu.CompilerParams(num_warps=plan.tiles.warps, num_stages=plan.tiles.stages),
        interpret=plan.interpret,
        name=kernel.__name__,
    )
    count = flops(plan, rows[0][0].shape[0], rows[1][0].shape[0], kernel is backward_kernel)
    with jax.named_scope(f"flops={count}"):  # the way to Triton drops pl.CostEstimate; planning/hlo.py reads this
        return call(*arguments)
