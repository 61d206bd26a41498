"""The sparse gated projection for every XLA back end: no sort, frozen rows free of gradient.

Two things make routing nearly free. The scores lie as [experts, tokens], so every reduction over experts runs along the
leading axis and vectorises over tokens. And the k-th largest score is found exactly without sorting: by k rounds of
"largest below the last" while k is small, otherwise by 32 steps of bit descent on order-preserving integers.

Frozen and fresh rows are joined here, outside of what is differentiated: a copy of n rows is cheaper than a second pass
over t rows of output (measured on CPU, where n <= t).
"""

from __future__ import annotations

from collections.abc import Iterator
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


def rounds(s: Float[Array, "n t"], k: int) -> Iterator[tuple[Float[Array, "1 t"], Int[Array, "1 t"]]]:
    """The k largest scores of each token, one after another, with their place; the lowest index first among equals."""
    index, left = jax.lax.broadcasted_iota(jnp.int32, s.shape, 0), s
    for _ in range(k):
        top = jnp.max(left, axis=0, keepdims=True)
        first = jnp.min(jnp.where(left == top, index, s.shape[0]), axis=0, keepdims=True)
        yield top, first
        left = jnp.where(index == first, -jnp.inf, left)


def largest(s: Float[Array, "n t"], exists: Bool[Array, "n 1"], k: int) -> tuple[Float[Array, "k t"], Bool[Array, ""]]:
    """The k largest different scores of each token, falling, and whether they are its k largest: none of them twice.

    Each is the largest below the last one, which reads s once a round. Rows that do not exist must be -inf.
    """

    def below(i, state):
        last, found = state
        last = jnp.max(jnp.where(s < last, s, -jnp.inf), axis=0, keepdims=True)
        return last, jax.lax.dynamic_update_slice(found, last, (i, 0))

    # A loop, not k fused copies: those read s three times as slowly on CPU.
    start = (jnp.full((1, s.shape[1]), jnp.inf), jnp.zeros((k, s.shape[1])))
    _, values = jax.lax.fori_loop(0, k, below, start)
    reached = jnp.sum((s >= values[-1:]) & exists, axis=0)
    return values, jnp.all(reached == jnp.minimum(k, jnp.sum(exists)))


def _kept_by_rounds(s: Float[Array, "n t"], exists: Bool[Array, "n 1"], k: int) -> Bool[Array, "n t"]:
    """All that reach the k-th largest score; one by one, and slowly, where some token has equal ones."""
    values, exact = largest(s, exists, k)

    def one_by_one():
        index = jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
        found = jnp.zeros(s.shape, bool)
        for _, first in rounds(s, k):
            found |= index == first
        return found & exists

    return jax.lax.cond(exact, lambda: (s >= values[-1:]) & exists, one_by_one)


def _largest_prefix(fits, bits: int, start: Int[Array, "1 t"]) -> Int[Array, "1 t"]:
    """The largest integer that `fits` (a monotone test), built bit by bit from the highest."""

    def step(i, found):
        candidate = found | (jnp.int32(1) << (bits - 1 - i))
        return jnp.where(fits(candidate), candidate, found)

    return jax.lax.fori_loop(0, bits, step, start)


def _kept_by_descent(s: Float[Array, "n t"], exists: Bool[Array, "n 1"], k: int) -> Bool[Array, "n t"]:
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
    return (above | (tied & (index < end))) & exists


def exists_of(
    keys: Float[Array, "n d_in"], fresh_keys: Float[Array, "r d_in"] | None, live: Int[Array, ""]
) -> Bool[Array, "rows 1"]:
    """Which of the frozen rows, followed by the fresh ones, hold an expert."""
    n = keys.shape[0]
    index = jnp.arange(n + (0 if fresh_keys is None else fresh_keys.shape[0]))[:, None]
    return (index < live) | (index >= n)


def gate(z: Float[Array, "n t"], exists: Bool[Array, "n 1"], how: Selection):
    """From responses that are zero where no expert exists: softmax p (Eq. 7), gates g (Eq. 8), 1/||z|| or 0."""
    norm2 = jnp.sum(z * z, axis=0, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.maximum(norm2, FLOOR))
    s = z * inverse
    if how.top_k >= z.shape[0]:
        kept = jnp.broadcast_to(exists, s.shape)
    else:
        select = _kept_by_rounds if how.top_k <= ROUNDS_UP_TO else _kept_by_descent
        kept = select(jnp.where(exists, s, -jnp.inf), exists, how.top_k)
    best = jnp.max(jnp.where(exists, s, -jnp.inf), axis=0, keepdims=True)  # always kept
    weight = jnp.where(kept, jnp.exp((jnp.where(kept, s, best) - best) * (1.0 / how.temperature)), 0.0)
    total = jnp.sum(weight, axis=0, keepdims=True)
    p = weight / jnp.where(total == 0.0, 1.0, total)
    g = p
    if how.threshold != 0.0:
        g = jnp.where(s >= bar(best, how), p, 0.0)
    return p, g, jnp.where(norm2 > FLOOR, inverse, 0.0)


def bar(best: Float[Array, "1 t"], how: Selection) -> Float[Array, "1 t"]:
    """What a score must reach (Eq. 8), given the best score of each token."""
    if how.threshold_mode == "absolute":
        return jnp.full_like(best, how.threshold)
    return jnp.where(best > 0, how.threshold * best, jnp.inf)


def score_cotangents(z, p, g, dc: Float[Array, "n t"], how: Selection) -> Float[Array, "n t"]:
    """ds from dc, the cotangent of c = g z: back through the threshold, which stays where it is, and the softmax."""
    dg = jnp.where(g == p, dc * z, 0.0)  # no gradient through a gate that the threshold closed
    return p * (dg - jnp.sum(p * dg, axis=0, keepdims=True)) * (1.0 / how.temperature)


def gate_backward(z, p, g, inverse, dc: Float[Array, "n t"], how: Selection) -> Float[Array, "n t"]:
    """dz from dc, the cotangent of c = g z; the other arguments are `gate`'s."""
    ds = score_cotangents(z, p, g, dc, how)
    s = z * inverse
    dz = g * dc + (ds - s * jnp.sum(s * ds, axis=0, keepdims=True)) * inverse
    return jnp.where(inverse == 0.0, 0.0, dz)  # below the floor a response is a constant


def respond(x: Float[Array, "t d_in"], keys: Float[Array, "n d_in"], exists: Bool[Array, "n 1"]) -> Float[Array, "n t"]:
    """z = keys x in float32, zero where no expert exists."""
    contract_inputs = (((1,), (1,)), ((), ()))
    z = jax.lax.dot_general(
        keys.astype(jnp.float32), x.astype(jnp.float32), contract_inputs, precision=jax.lax.Precision.HIGHEST
    )
    return jnp.where(exists, z, 0.0)


def joined(frozen: Float[Array, "n d"], fresh: Float[Array, "r d"] | None) -> Float[Array, "rows d"]:
    """Frozen rows, then fresh ones."""
    return frozen if fresh is None else jnp.concatenate([frozen.astype(fresh.dtype), fresh])


def cotangents(dx, d_keys, d_values, keys, values, fresh_keys, fresh_values) -> tuple:
    """What a backward pass returns for six arrays: gradients of rows are those of the fresh ones, if there are any."""
    if fresh_keys is None:
        return dx, d_keys.astype(keys.dtype), d_values.astype(values.dtype), None, None, None
    return dx, None, None, d_keys.astype(fresh_keys.dtype), d_values.astype(fresh_values.dtype), None


def gates(x, keys, fresh_keys, live, how: Selection) -> Float[Array, "t rows"]:
    """g for every token; differentiable only through `gated_projection`."""
    exists = exists_of(keys, fresh_keys, live)
    return gate(respond(x, joined(keys, fresh_keys), exists), exists, how)[1].T


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def gated_projection(
    x: Float[Array, "t d_in"],
    keys: Float[Array, "n d_in"],
    values: Float[Array, "n d_out"],
    fresh_keys: Float[Array, "r d_in"] | None,
    fresh_values: Float[Array, "r d_out"] | None,
    live: Int[Array, ""],
    how: Selection,
) -> Float[Array, "t d_out"]:
    """y = sum_i g_i z_i b_i; with fresh rows, keys and values are constants.

    Dense: every value is multiplied with its gate, which is the fastest while the bank is small.
    """
    return _forward(x, keys, values, fresh_keys, fresh_values, live, how)[0]


def _forward(x, keys, values, fresh_keys, fresh_values, live, how):
    exists = exists_of(keys, fresh_keys, live)
    z = respond(x, joined(keys, fresh_keys), exists)
    p, g, inverse = gate(z, exists, how)
    p = checkpoint_name(p, GATES)
    g = p if how.threshold == 0.0 else g
    y = jnp.dot((g * z).T, joined(values, fresh_values).astype(jnp.float32)).astype(x.dtype)
    return y, (x, keys, values, fresh_keys, fresh_values, z, p, g, inverse)


def _backward(how, saved, dy):
    x, keys, values, fresh_keys, fresh_values, z, p, g, inverse = saved
    wide, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    contract_outputs = (((1,), (1,)), ((), ()))
    dc = jax.lax.dot_general(joined(values, fresh_values).astype(jnp.float32), dy, contract_outputs)  # [rows t]
    dz = gate_backward(z, p, g, inverse, dc, how)
    dx = jnp.dot(dz.T, joined(keys, fresh_keys).astype(jnp.float32)).astype(x.dtype)
    first = 0 if fresh_keys is None else keys.shape[0]  # of the rows that have a gradient
    d_keys, d_values = jnp.dot(dz[first:], wide), jnp.dot((g * z)[first:], dy)
    return cotangents(dx, d_keys, d_values, keys, values, fresh_keys, fresh_values)


gated_projection.defvjp(_forward, _backward)
