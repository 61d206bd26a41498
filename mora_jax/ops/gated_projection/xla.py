"""The sparse gated projection for every XLA back end: no sort, frozen rows free of gradient.

Two things make routing nearly free. The scores lie as [experts, tokens], so every reduction over experts runs along the
leading axis and vectorises over tokens. And the k-th largest score is found exactly without sorting: by k rounds of
"largest that is left" while k is small, otherwise by 32 steps of bit descent on order-preserving integers.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from mora_jax.ops.gated_projection.reference import FLOOR

GATES = "gates"  # the name under which a rematerialisation policy may keep the gates: choosing is dear, a product cheap
ROUNDS_UP_TO = 16  # the k from which 40 counting passes are cheaper than 2k maximum passes (measured on CPU)


class Selection(NamedTuple):
    """The static half of the gate; see `api.gated_projection` for the meaning of each field."""

    top_k: int
    temperature: float
    threshold: float
    threshold_mode: str


def _kept_by_rounds(s: Float[Array, "n t"], k: int) -> Bool[Array, "n t"]:
    """Takes the largest score k times; among equals the lowest index, as an index per token picks exactly one."""
    index = jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
    kept, left = jnp.zeros(s.shape, bool), s
    for _ in range(k):
        top = jnp.max(left, axis=0, keepdims=True)
        first = jnp.min(jnp.where(left == top, index, s.shape[0]), axis=0, keepdims=True)
        kept |= index == first
        left = jnp.where(index == first, -jnp.inf, left)
    return kept


def _largest_prefix(fits, bits: int, start: Int[Array, "1 t"]) -> Int[Array, "1 t"]:
    """The largest integer that `fits` (a monotone test), built bit by bit from the highest."""

    def step(i, found):
        candidate = found | (jnp.int32(1) << (bits - 1 - i))
        return jnp.where(fits(candidate), candidate, found)

    return jax.lax.fori_loop(0, bits, step, start)


def _kept_by_descent(s: Float[Array, "n t"], k: int) -> Bool[Array, "n t"]:
    """Finds the k-th largest score as an integer with the same order, then the index up to which its ties are kept."""
    bits = jax.lax.bitcast_convert_type(s, jnp.int32)
    order = bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))
    order = jnp.where(s == 0.0, 0, order)  # -0.0 equals 0.0, as it does for a comparison of floats
    index = jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)

    def count(mask):
        return jnp.sum(mask, axis=0, keepdims=True, dtype=jnp.int32)

    sign = jnp.where(count(order >= 0) >= k, jnp.int32(0), jnp.iinfo(jnp.int32).min)
    kth = _largest_prefix(lambda c: count(order >= c) >= k, 31, sign)
    above, tied = order > kth, order == kth
    room = k - count(above)
    end = _largest_prefix(lambda c: count(tied & (index < c)) <= room, s.shape[0].bit_length(), jnp.zeros_like(kth))
    return above | (tied & (index < end))


def _gate(z: Float[Array, "n t"], exists: Bool[Array, " n"], how: Selection):
    """From responses that are zero where no expert exists: scores s, softmax p (Eq. 7), gates g (Eq. 8) and 1/||z||."""
    norm2 = jnp.sum(z * z, axis=0, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.maximum(norm2, FLOOR))
    s = z * inverse
    alive = exists[:, None]
    if how.top_k >= z.shape[0]:
        kept = jnp.broadcast_to(alive, s.shape)
    else:
        select = _kept_by_rounds if how.top_k <= ROUNDS_UP_TO else _kept_by_descent
        kept = select(jnp.where(alive, s, -jnp.inf), how.top_k) & alive
    peak = jnp.max(jnp.where(kept, s, -jnp.inf), axis=0, keepdims=True)
    weight = jnp.where(kept, jnp.exp((jnp.where(kept, s, peak) - peak) * (1.0 / how.temperature)), 0.0)
    total = jnp.sum(weight, axis=0, keepdims=True)
    p = weight / jnp.where(total == 0.0, 1.0, total)
    g = p
    if how.threshold != 0.0:
        best = jnp.max(jnp.where(alive, s, -jnp.inf), axis=0, keepdims=True)
        absolute = how.threshold_mode == "absolute"
        bar = how.threshold if absolute else jnp.where(best > 0, how.threshold * best, jnp.inf)
        g = jnp.where(s >= bar, p, 0.0)
    return s, p, g, jnp.where(norm2 > FLOOR, inverse, 0.0)


def _respond(x: Float[Array, "t d_in"], keys: Float[Array, "n d_in"], exists: Bool[Array, " n"]) -> Float[Array, "n t"]:
    contract_inputs = (((1,), (1,)), ((), ()))
    z = jax.lax.dot_general(
        keys.astype(jnp.float32), x.astype(jnp.float32), contract_inputs, precision=jax.lax.Precision.HIGHEST
    )
    return jnp.where(exists[:, None], z, 0.0)


def gates(x, keys, exists, how: Selection) -> Float[Array, "t n"]:
    """g for every token; differentiable only through `gated_projection`."""
    return _gate(_respond(x, keys, exists), exists, how)[2].T


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def gated_projection(
    x: Float[Array, "t d_in"],
    keys: Float[Array, "n d_in"],
    values: Float[Array, "n d_out"],
    exists: Bool[Array, " n"],
    how: Selection,
    frozen: int,
) -> Float[Array, "t d_out"]:
    """y = sum_i g_i z_i b_i; the first `frozen` rows of keys and values are constants."""
    return _forward(x, keys, values, exists, how, frozen)[0]


def _forward(x, keys, values, exists, how, frozen):
    del frozen
    z = _respond(x, keys, exists)
    s, p, g, inverse = _gate(z, exists, how)
    p = checkpoint_name(p, GATES)
    g = p if how.threshold == 0.0 else g
    y = jnp.dot((g * z).T, values.astype(jnp.float32)).astype(x.dtype)
    return y, (x, keys, values, z, s, p, g, inverse)


def _backward(how, frozen, saved, dy):
    x, keys, values, z, s, p, g, inverse = saved
    dy = dy.astype(jnp.float32)
    contract_outputs = (((1,), (1,)), ((), ()))
    dc = jax.lax.dot_general(values.astype(jnp.float32), dy, contract_outputs)  # [n t], c = g z
    dg = jnp.where(g == p, dc * z, 0.0)  # no gradient through a gate that the threshold closed
    ds = p * (dg - jnp.sum(p * dg, axis=0, keepdims=True)) * (1.0 / how.temperature)
    dz = g * dc + (ds - s * jnp.sum(s * ds, axis=0, keepdims=True)) * inverse
    dz = jnp.where(inverse == 0.0, 0.0, dz)  # below the floor a response is a constant
    dx = jnp.dot(dz.T, keys.astype(jnp.float32)).astype(x.dtype)
    d_keys = jnp.dot(dz[frozen:], x.astype(jnp.float32)).astype(keys.dtype)
    d_values = jnp.dot((g * z)[frozen:], dy).astype(values.dtype)
    rows = ((frozen, 0), (0, 0))
    return dx, jnp.pad(d_keys, rows), jnp.pad(d_values, rows), None


gated_projection.defvjp(_forward, _backward)
