"""The portable op where few of many experts answer: values are gathered for the k selected ones instead of multiplied.

Costs per token k rows of values where the dense path costs n. What stays dense is the product with the keys, forward
and backward: every response takes part in the norm of Eq. 5.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from mora_jax.ops.gated_projection.reference import FLOOR
from mora_jax.ops.gated_projection.xla import (
    GATES,
    ROUNDS_UP_TO,
    Selection,
    bar,
    cotangents,
    exists_of,
    joined,
    largest,
    respond,
    rounds,
    score_cotangents,
)

EXPERTS_PER_CHOICE = 16  # n / k from which a gather is cheaper than the dense product, forward and backward (on CPU)


def pays(tokens: int, n: int, fresh: int, k: int) -> bool:
    """Whether this path is the faster one: a large bank, or a few tokens, as in decoding, that need little of it."""
    if fresh == 0 and 2 * tokens * k <= n:
        return True
    return k <= ROUNDS_UP_TO and n + fresh >= EXPERTS_PER_CHOICE * k


def top(z: Float[Array, "n t"], exists: Bool[Array, "n 1"], k: int) -> tuple[Float[Array, "k t"], Int[Array, "k t"]]:
    """The k largest responses of each token in falling order and their rows, the lowest first among equals.

    Where fewer than k experts exist the rest is -inf; of a token that is NaN all are, or NaN.
    """
    z = jnp.where(exists, z, -jnp.inf)
    if k > ROUNDS_UP_TO:
        return tuple(rows.T for rows in jax.lax.top_k(z.T + 0.0, k))  # + 0.0: -0.0 ties with 0.0
    values, exact = largest(z, exists, k)

    def at_once():
        index = jax.lax.broadcasted_iota(jnp.int32, z.shape, 0)
        first = jax.lax.map(lambda value: jnp.min(jnp.where(z == value[None], index, z.shape[0]), axis=0), values)
        return values, first

    def one_by_one():
        return tuple(map(jnp.concatenate, zip(*rounds(z, k), strict=True)))

    return jax.lax.cond(exact, at_once, one_by_one)


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
    """y = sum_i g_i z_i b_i; with fresh rows, keys and values are constants."""
    return _forward(x, keys, values, fresh_keys, fresh_values, live, how)[0]


def _forward(x, keys, values, fresh_keys, fresh_values, live, how):
    exists = exists_of(keys, fresh_keys, live)
    z = respond(x, joined(keys, fresh_keys), exists)
    norm2 = jnp.sum(z * z, axis=0, keepdims=True)
    raw = jax.lax.rsqrt(jnp.maximum(norm2, FLOOR))
    responses, index = top(z, exists, min(how.top_k, z.shape[0]))
    s = responses * raw
    best = s[:1]
    weight = jnp.where(responses == -jnp.inf, 0.0, jnp.exp((s - best) * (1.0 / how.temperature)))
    total = jnp.sum(weight, axis=0, keepdims=True)
    p = weight / jnp.where(total == 0.0, 1.0, total)
    g = jnp.where(s >= bar(best, how), p, 0.0) if how.threshold != 0.0 else p
    index, p, g = (checkpoint_name(a, GATES) for a in (index, p, g))
    chosen = _of_chosen(z, index)
    y = _mix(g * chosen, joined(values, fresh_values), index).astype(x.dtype)
    inverse = jnp.where(norm2 > FLOOR, raw, 0.0)
    return y, (x, keys, values, fresh_keys, fresh_values, z, index, p, g, inverse)


def _of_chosen(z: Float[Array, "n t"], index: Int[Array, "k t"]) -> Float[Array, "k t"]:
    return jnp.take_along_axis(z, index, axis=0, mode="clip")


def _mix(c: Float[Array, "k t"], values: Float[Array, "n d_out"], index: Int[Array, "k t"]) -> Float[Array, "t d_out"]:
    """sum_j c_j values[index_j], written as k terms so that XLA fuses them into one pass."""
    chosen = (jnp.take(values, rows, axis=0, mode="clip").astype(jnp.float32) for rows in index)
    return sum(weight[:, None] * rows for weight, rows in zip(c, chosen, strict=True))


def _backward(how, saved, dy):
    x, keys, values, fresh_keys, fresh_values, z, index, p, g, inverse = saved
    wide, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    all_values = joined(values, fresh_values)
    tokens = jnp.arange(z.shape[1])[None]

    def response(rows):  # to dy, of one chosen expert of every token
        return jnp.sum(jnp.take(all_values, rows, axis=0, mode="clip").astype(jnp.float32) * dy, axis=1)

    dc = jax.lax.map(response, index)  # [k t], of c = g z
    chosen = _of_chosen(z, index)
    ds = score_cotangents(chosen, p, g, dc, how)
    along = jnp.sum(chosen * inverse * ds, axis=0, keepdims=True)
    directed = inverse != 0.0  # below the floor a response is a constant
    dz = -(inverse * inverse * along) * z  # through the norm, of every expert; then through the gates of the chosen
    dz = dz.at[index, tokens].add(jnp.where(directed, g * dc + ds * inverse, 0.0), mode="drop")
    dx = jnp.dot(dz.T, joined(keys, fresh_keys).astype(jnp.float32)).astype(x.dtype)
    first = 0 if fresh_keys is None else keys.shape[0]  # of the rows that have a gradient
    trained = z.shape[0] - first
    c = jnp.zeros((trained, z.shape[1])).at[jnp.where(index < first, trained, index - first), tokens]
    d_keys, d_values = jnp.dot(dz[first:], wide), jnp.dot(c.add(g * chosen, mode="drop"), dy)
    return cotangents(dx, d_keys, d_values, keys, values, fresh_keys, fresh_values)


gated_projection.defvjp(_forward, _backward)
