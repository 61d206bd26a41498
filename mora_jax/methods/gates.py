"""Who answers: the three gate axes (score, select, normalise) and the update that an adapted layer adds.

Rows of z are tokens, columns are experts; `exists` marks the columns that hold an expert. MoRA's own point in this
space is computed by the fused `ops.gated_projection`; every other point by the few lines of `_compose`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mora_jax.ops import gated_projection as op
from mora_jax.ops.gated_projection import reference

if TYPE_CHECKING:
    from mora_jax.methods.method import Method

ACTIVE = 1e-3  # an expert with a larger gate counts as active in reports


def _self_score(z):
    """MoRA Eq. 5: the response itself, l2-normalised over the experts that exist."""
    return z * jax.lax.rsqrt(jnp.maximum(jnp.sum(z * z, axis=-1, keepdims=True), reference.FLOOR))


def _top_k(s, exists, k):
    if k >= s.shape[-1]:
        return jnp.broadcast_to(exists, s.shape)
    _, index = jax.lax.top_k(jnp.where(exists, s + 0.0, -jnp.inf), k)  # + 0.0: a negative zero ties with zero
    return jax.nn.one_hot(index, s.shape[-1], dtype=bool).any(axis=-2) & exists


SCORES = {
    "self": _self_score,
    "absolute": lambda z: jnp.abs(_self_score(z)),
    "raw": lambda z: z,
    "constant": jnp.ones_like,
}
NORMALISED = ("self", "absolute")  # the scores that divide by the norm of the responses
SELECTORS = {
    "top_k": lambda s, exists, method: _top_k(s, exists, method.top_k),
    "all": lambda s, exists, method: jnp.broadcast_to(exists, s.shape),
}
NORMALISERS = {
    "none": lambda s, exists, kept, method: kept.astype(s.dtype),
    "softmax": lambda s, exists, kept, method: reference.masked_softmax(s, kept, method.temperature),
    "softmax_before": lambda s, exists, kept, method: reference.masked_softmax(s, exists, method.temperature) * kept,
    "sigmoid": lambda s, exists, kept, method: jax.nn.sigmoid(s) * kept,
}


def _is_plain(method: Method) -> bool:
    """Plain LoRA: every gate is 1, so none is computed."""
    return (method.score, method.select, method.normalise) == ("constant", "all", "none")


def _is_fused(method: Method) -> bool:
    return (method.score, method.select, method.normalise) == ("self", "top_k", "softmax")


def _compose(z: Float[Array, "t n"], exists: Bool[Array, "1 n"], method: Method, threshold: float):
    """g of the named axes; the threshold of Eq. 8 works on any score that is compared."""
    s = SCORES[method.score](z)
    kept = SELECTORS[method.select](jax.lax.stop_gradient(s), exists, method)
    g = NORMALISERS[method.normalise](s, exists, kept, method)
    if threshold != 0.0:
        g = jnp.where(reference.passes(s, exists, threshold, method.threshold_mode), g, 0.0)
    return g


def _responses(x, bank: Mapping, fresh: Mapping | None):
    """z [t, n] of all experts, fresh ones last, 0 where none exists; and which exist [1, n].

    Frozen and fresh rows are multiplied apart, so that no gradient of a frozen row is ever computed.
    """
    x = x.reshape(-1, x.shape[-1])
    z = reference.responses(x, jax.lax.stop_gradient(bank["keys"]))
    exists = jnp.arange(z.shape[-1]) < bank["live"]
    if fresh is not None:
        new = reference.responses(x, fresh["keys"])
        z = jnp.concatenate([z, new], axis=-1)
        exists = jnp.concatenate([exists, jnp.ones(new.shape[-1], bool)])
    return jnp.where(exists[None, :], z, 0.0), exists[None, :]


def _op_arguments(bank: Mapping, fresh: Mapping | None, method: Method) -> dict:
    return {
        "fresh_keys": fresh and fresh["keys"],
        "fresh_values": fresh and fresh["values"],
        "top_k": method.top_k,
        "temperature": method.temperature,
        "threshold": 0.0 if fresh else method.threshold,
        "threshold_mode": method.threshold_mode,
        "live": bank["live"],
        "implementation": method.implementation,
    }


def update(
    x: Float[Array, "... d_in"],
    bank: Mapping,
    fresh: Mapping | None,
    method: Method,
    cut: Mapping[str, Any] | None = None,
) -> Float[Array, "... d_out"]:
    """scale * sum_i g_i z_i b_i for one site, in the dtype of x.

    `cut`: the arguments mesh, x_spec and kernel_spec of the fused op where there are several devices: each chooses
    experts for its own tokens, and a kernel sees whole arrays. Everything else is partitioned by the compiler.

    `bank` holds keys [n, d_in], values [n, d_out] and live []; `fresh` the same without live, or None. Fresh experts
    exist only while a task is taught, so their absence means inference, and only then does the threshold act.
    """
    if _is_fused(method):
        project = partial(op.gated_projection_sharded, **cut) if cut else op.gated_projection
        y = project(x, bank["keys"], bank["values"], **_op_arguments(bank, fresh, method))
        return (method.scale * y).astype(x.dtype)
    z, exists = _responses(x, bank, fresh)
    if not _is_plain(method):
        if method.score in NORMALISED:  # without a direction a response is a constant, as in the fused op
            directed = jnp.sum(z * z, axis=-1, keepdims=True) > reference.FLOOR
            z = jnp.where(directed | jnp.isnan(z), z, jax.lax.stop_gradient(z))
        z = _compose(z, exists, method, 0.0 if fresh else method.threshold) * z
    frozen = bank["values"].shape[0]
    y = jnp.dot(z[:, :frozen], jax.lax.stop_gradient(bank["values"]))
    if fresh is not None:
        y = y + jnp.dot(z[:, frozen:], fresh["values"])
    return (method.scale * y).astype(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def gates(x: Float[Array, "... d_in"], bank: Mapping, fresh: Mapping | None, method: Method) -> Float[Array, "... n"]:
    """The gates behind `update`, float32, fresh experts last."""
    if _is_fused(method):
        return op.gates(x, bank["keys"], bank["values"], **_op_arguments(bank, fresh, method))
    z, exists = _responses(x, bank, fresh)
    g = _compose(z, exists, method, 0.0 if fresh else method.threshold)
    return g.reshape(*x.shape[:-1], g.shape[-1])


def mass_by_block(g: Float[Array, "... n"], rank: int) -> Float[Array, "... blocks"]:
    """The gates summed over every `rank` experts in a row, which were trained together; the last block may be short."""
    missing = -g.shape[-1] % rank
    g = jnp.pad(g, [(0, 0)] * (g.ndim - 1) + [(0, missing)])
    return g.reshape(*g.shape[:-1], -1, rank).sum(axis=-1)
