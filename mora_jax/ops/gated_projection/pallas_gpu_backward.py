"""The backward kernel of the gated projection on Hopper: dx, and for the trained rows dz and c."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mora_jax.ops.gated_projection.pallas_gpu_gate import Plan, Tile, cut, decide, product, respond


def backward_kernel(live_ref, x_ref, dy_ref, *refs, plan: Plan):
    """Walks over the token tiles: decides again, then dc = values dy where a gate is open, dz, and dx = dz keys."""
    count = len(plan.banks)
    keys, values, refs = refs[:count], refs[count : 2 * count], refs[2 * count :]
    dx_ref, trained_dz_ref, trained_c_ref, z_ref, dc_ref, dz_ref, active_ref = refs

    def visit(program, number):
        tile = Tile(plan, program, number, live_ref[0], z_ref)
        gate = decide(tile, x_ref, keys)
        active = _active(tile, gate, active_ref)
        tile.barrier()
        sums = _gate_gradient(tile, gate, dy_ref, values, active_ref, active, dc_ref)
        tile.barrier()
        _response_gradient(tile, gate, sums, dc_ref, dz_ref, trained_dz_ref, trained_c_ref)
        tile.barrier()
        _input_gradient(tile, dz_ref, keys, dx_ref)
        tile.barrier()

    Tile.walk(plan, visit)


def _active(tile: Tile, gate, active_ref) -> list[jax.Array]:
    """Lists the blocks in which some token keeps an expert; how many there are in each bank."""
    found = []
    for bank in tile.plan.banks:

        def step(i, count, bank=bank):
            kept = tile.kept(bank, i, tile.scores(bank, i, gate.inverse), gate)
            return tile.list_block(active_ref, bank, i, kept, count)

        found.append(jax.lax.fori_loop(0, tile.blocks(bank), step, jnp.int32(0)))
    return found


def _gates(tile: Tile, bank, i, gate):
    """s (zero where no expert is), p, z and which gates are open in block i."""
    s, z = tile.scores(bank, i, gate.inverse), tile.z(bank, i)
    p = tile.softmax(bank, i, s, gate) / gate.total
    how = tile.plan.how
    is_open = p > 0.0 if how.threshold == 0.0 else (p > 0.0) & tile.opened(s, gate)
    return jnp.where(p > 0.0, s, 0.0), p, z, is_open


def _gate_gradient(tile: Tile, gate, dy_ref, value_refs, active_ref, active, dc_ref):
    """Writes dc of the active blocks; the sums over experts of p dg, s p dg and s p."""
    plan = tile.plan
    sums = (tile.full(0.0), tile.full(0.0), tile.full(0.0))
    for number, bank in enumerate(plan.banks):

        def step(entry, sums, number=number, bank=bank):
            i = active_ref[tile.program, bank.list + entry]
            dc = respond(tile, dy_ref, value_refs[number], bank, i, plan.d_out, plan.tiles.outputs, plan.parts)
            dc_ref[tile.program, :, tile.at(bank, i)] = dc
            s, p, z, is_open = _gates(tile, bank, i, gate)
            weighted = jnp.where(is_open, p * dc * z, 0.0)
            terms = (weighted, s * weighted, s * p)
            return tuple(a + jnp.sum(b, axis=1, keepdims=True) for a, b in zip(sums, terms, strict=True))

        sums = jax.lax.fori_loop(0, active[number], step, sums)
    return sums


def _response_gradient(tile: Tile, gate, sums, dc_ref, dz_ref, trained_dz_ref, trained_c_ref) -> None:
    """dz of every live block, through g z (Eq. 4), the softmax (Eq. 7) and the norm (Eq. 5)."""
    plan = tile.plan
    mean, weighted, plain = sums
    inverse_temperature = 1.0 / plan.how.temperature
    along = (weighted - mean * plain) * inverse_temperature  # sum of s ds

    def step(_, bank, i, carry):
        _, p, z, is_open = _gates(tile, bank, i, gate)
        dc = jnp.where(is_open, dc_ref[tile.program, :, tile.at(bank, i)], 0.0)  # unwritten elsewhere
        g = jnp.where(is_open, p, 0.0)
        ds = p * (dc * z - mean) * inverse_temperature
        exists = tile.exists(bank, i)
        dz = g * dc + (ds - z * gate.inverse * along) * gate.inverse
        dz = jnp.where(gate.directed | gate.broken, dz, 0.0)  # below the floor a response is a constant
        dz = jnp.where(exists & gate.broken, jnp.nan, jnp.where(exists, dz, 0.0))
        for part, a in enumerate(cut(dz, plan.parts)):
            dz_ref[tile.program, part, :, tile.at(bank, i)] = a
        if bank is plan.banks[-1]:
            own = pl.ds(i * bank.block, bank.block)
            tile.store(trained_dz_ref, own, dz)
            tile.store(trained_c_ref, own, jnp.where(exists & gate.broken, jnp.nan, g * z))
        return carry

    tile.over(step, 0)


def _input_gradient(tile: Tile, dz_ref, key_refs, dx_ref) -> None:
    """dx = dz keys over the live blocks, a slice of the inputs at a time."""
    plan, width = tile.plan, tile.plan.tiles.inputs

    def write(j, carry):
        at = pl.ds(j * width, width)

        def add(number, bank, i, dx):
            ref = key_refs[number]
            dz = [dz_ref[tile.program, part, :, tile.at(bank, i)] for part in range(plan.parts)]
            rows = pl.ds(i * bank.block, bank.block)
            keys = [ref[part, rows, at] for part in range(min(plan.parts, ref.shape[0]))]
            return dx + product(dz, keys)

        dx = tile.over(add, jnp.zeros((tile.size, width), jnp.float32))
        tile.store(dx_ref, at, dx)
        return carry

    jax.lax.fori_loop(0, plan.d_in // width, write, 0)
