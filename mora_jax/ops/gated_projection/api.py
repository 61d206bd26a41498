"""The public face of the op: checks arguments, joins frozen and fresh rows, picks an implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mora_jax.ops.gated_projection import reference, xla

THRESHOLD_MODES = ("absolute", "relative")


def _run_reference(x, keys, values, exists, how: xla.Selection, frozen: int):
    def fixed(a):
        return jnp.concatenate([jax.lax.stop_gradient(a[:frozen]), a[frozen:]])

    return reference.gated_projection(x, fixed(keys), fixed(values), exists, **how._asdict())


def _reference_gates(x, keys, exists, how: xla.Selection):
    return reference.gates(reference.responses(x, keys), exists, **how._asdict())


class Implementation(NamedTuple):
    """`project(x, keys, values, exists, how, frozen)` -> y and `gates(x, keys, exists, how)` -> g, for x [t, d_in]."""

    project: Callable
    gates: Callable


IMPLEMENTATIONS = {
    "reference": Implementation(_run_reference, _reference_gates),
    "xla": Implementation(xla.gated_projection, xla.gates),
}


def gated_projection(
    x: Float[Array, "... d_in"],
    keys: Float[Array, "n d_in"],
    values: Float[Array, "n d_out"],
    *,
    fresh_keys: Float[Array, "r d_in"] | None = None,
    fresh_values: Float[Array, "r d_out"] | None = None,
    top_k: int,
    temperature: float,
    threshold: float = 0.0,
    threshold_mode: str = "absolute",
    live: int | Int[Array, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "... d_out"]:
    """sum_i g_i z_i b_i over the rank-1 experts (a_i, b_i) = (keys[i], values[i]); MoRA, arXiv 2506.21035, Eq. 4 to 8.

    `live` counts the leading rows of keys and values that exist (None: all; it may be traced, and is checked against
    n only when it is concrete). Fresh rows always exist and come after row live - 1 where scores tie. With fresh rows
    keys and values are constants: no cotangent, no cost. Without, everything is differentiable. `top_k` is static and
    means min(top_k, live + r). `threshold` 0.0 switches Eq. 8 off. Scores, softmax and sums are float32; the result
    has the dtype of x. Raises ValueError for shapes that do not fit and for values without a meaning.
    """
    keys, values, frozen = _join(keys, values, fresh_keys, fresh_values)
    has_fresh = fresh_keys is not None
    tokens, exists, how, implemented = _prepare(
        x, keys, frozen, has_fresh, top_k, temperature, threshold, threshold_mode, live, implementation
    )
    y = implemented.project(tokens, keys, values, exists, how, frozen if has_fresh else 0)
    return y.reshape(*x.shape[:-1], values.shape[-1])


def gates(
    x: Float[Array, "... d_in"],
    keys: Float[Array, "n d_in"],
    values: Float[Array, "n d_out"],
    *,
    fresh_keys: Float[Array, "r d_in"] | None = None,
    fresh_values: Float[Array, "r d_out"] | None = None,
    top_k: int,
    temperature: float,
    threshold: float = 0.0,
    threshold_mode: str = "absolute",
    live: int | Int[Array, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "... n_plus_r"]:
    """g for every expert, float32, fresh experts last, zero where an expert does not exist. Arguments as above."""
    keys, _, frozen = _join(keys, values, fresh_keys, fresh_values)
    tokens, exists, how, implemented = _prepare(
        x, keys, frozen, fresh_keys is not None, top_k, temperature, threshold, threshold_mode, live, implementation
    )
    return implemented.gates(tokens, keys, exists, how).reshape(*x.shape[:-1], keys.shape[0])


def _join(keys, values, fresh_keys, fresh_values):
    """One array of rows each, and how many of its leading rows came from keys and values."""
    if keys.ndim != 2 or values.ndim != 2 or keys.shape[0] != values.shape[0]:
        raise ValueError(f"keys [n, d_in] and values [n, d_out] need equal n; got {keys.shape} and {values.shape}")
    if (fresh_keys is None) != (fresh_values is None):
        raise ValueError("fresh_keys and fresh_values come together")
    if fresh_keys is None:
        return keys, values, keys.shape[0]
    if fresh_keys.shape != (fresh_values.shape[0], keys.shape[1]) or fresh_values.shape[1] != values.shape[1]:
        raise ValueError(
            f"fresh rows must continue keys {keys.shape} and values {values.shape}; "
            f"got {fresh_keys.shape} and {fresh_values.shape}"
        )
    frozen = keys.shape[0]
    keys = jnp.concatenate([jax.lax.stop_gradient(keys).astype(fresh_keys.dtype), fresh_keys])
    values = jnp.concatenate([jax.lax.stop_gradient(values).astype(fresh_values.dtype), fresh_values])
    return keys, values, frozen


def _prepare(x, keys, frozen, has_fresh, top_k, temperature, threshold, threshold_mode, live, implementation):
    """x as [tokens, d_in], which rows exist, the static half of the gate, and who computes it."""
    if x.ndim < 1 or x.shape[-1] != keys.shape[1]:
        raise ValueError(f"x [..., d_in] must end in the d_in of keys {keys.shape}; got {x.shape}")
    how = _selection(top_k, temperature, threshold, threshold_mode)
    exists = _exists(live, keys.shape[0], frozen, has_fresh)
    return x.reshape(-1, x.shape[-1]), exists, how, _implementation(implementation)


def _selection(top_k, temperature, threshold, threshold_mode) -> xla.Selection:
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1; got {top_k}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}")
    if threshold_mode not in THRESHOLD_MODES:
        raise ValueError(f"threshold_mode {threshold_mode!r} is none of {', '.join(THRESHOLD_MODES)}")
    return xla.Selection(int(top_k), float(temperature), float(threshold), threshold_mode)


def _exists(live, rows: int, frozen: int, has_fresh: bool):
    if live is None:
        return jnp.ones(rows, bool)
    if not isinstance(live, jax.core.Tracer) and not 0 <= int(live) <= frozen:
        raise ValueError(f"live must lie in 0..{frozen}, the rows of keys; got {int(live)}")
    index = jnp.arange(rows)
    exists = index < live
    return exists | (index >= frozen) if has_fresh else exists


def _implementation(name: str | None) -> Implementation:
    name = name or "xla"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {name!r} is not available here; known: {', '.join(sorted(IMPLEMENTATIONS))}")
    return IMPLEMENTATIONS[name]
