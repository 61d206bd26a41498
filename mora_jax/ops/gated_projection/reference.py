"""The specification of the sparse gated projection: MoRA, arXiv 2506.21035, Eq. 4 to 8, as plain array code.

Written to be read against the paper, not to be fast: it sorts, and leaves every gradient to automatic differentiation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

FLOOR = 1e-24  # of the squared norm: below it a token has no direction, so its responses count as constants


def responses(x: Float[Array, "t d_in"], keys: Float[Array, "n d_in"]) -> Float[Array, "t n"]:
    """z_i = a_i . x in float32, at full precision: a score gap of 1e-5 must survive it."""
    return jnp.dot(x.astype(jnp.float32), keys.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)


def masked_softmax(s: Float[Array, "t n"], mask: Bool[Array, "t n"], temperature: float) -> Float[Array, "t n"]:
    """softmax(s / temperature) over the columns in the mask, zero elsewhere and in rows without any."""
    peak = jax.lax.stop_gradient(jnp.max(jnp.where(mask, s, -jnp.inf), axis=-1, keepdims=True))
    weight = jnp.where(mask, jnp.exp((jnp.where(mask, s, peak) - peak) / temperature), 0.0)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return weight / jnp.where(total == 0.0, 1.0, total)


def passes(s: Float[Array, "t n"], exists: Bool[Array, "#t n"], threshold: float, mode: str) -> Bool[Array, "t n"]:
    """Which scores reach the bar of Eq. 8: `threshold` itself, or that share of the best score if this is positive."""
    if mode == "absolute":
        return s >= threshold
    best = jnp.max(jnp.where(exists, s, -jnp.inf), axis=-1, keepdims=True)
    return s >= jnp.where(best > 0, threshold * best, jnp.inf)


def gates(
    z: Float[Array, "t n"],
    exists: Bool[Array, " n"],
    *,
    top_k: int,
    temperature: float,
    threshold: float,
    threshold_mode: str,
) -> Float[Array, "t n"]:
    """g, zero outside the kept experts. What does not exist takes no part in norm, top-k or softmax."""
    exists = exists[None, :]
    z = jnp.where(exists, z, 0.0)
    norm2 = jnp.sum(z * z, axis=-1, keepdims=True)
    s = z * jax.lax.rsqrt(jnp.maximum(norm2, FLOOR))  # Eq. 5
    rank = jnp.argsort(jnp.argsort(jnp.where(exists, -s, jnp.inf), axis=-1, stable=True), axis=-1)
    kept = (rank < top_k) & exists  # Eq. 6; a stable sort keeps the lowest index among ties
    g = masked_softmax(s, kept, temperature)  # Eq. 7
    if threshold != 0.0:  # Eq. 8, at inference
        g = jnp.where(passes(s, exists, threshold, threshold_mode), g, 0.0)
    return g


def gated_projection(
    x: Float[Array, "t d_in"],
    keys: Float[Array, "n d_in"],
    values: Float[Array, "n d_out"],
    exists: Bool[Array, " n"],
    **selection,
) -> Float[Array, "t d_out"]:
    """y = sum_i g_i z_i b_i (Eq. 4 without W and scale), in the dtype of x."""
    z = jnp.where(exists[None, :], responses(x, keys), 0.0)
    has_direction = jnp.sum(z * z, axis=-1, keepdims=True) > FLOOR
    z = jnp.where(has_direction | jnp.isnan(z), z, jax.lax.stop_gradient(z))  # a zero input gives a zero gradient
    g = gates(z, exists, **selection)
    return jnp.dot(g * z, values.astype(jnp.float32)).astype(x.dtype)
