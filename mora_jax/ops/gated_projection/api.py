"""The public face of the op: checks arguments, picks an implementation, falls back with a stated reason."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mora_jax.ops.gated_projection import reference, xla, xla_gathered

THRESHOLD_MODES = ("absolute", "relative")
_log = logging.getLogger(__name__)


def _run_reference(x, keys, values, fresh_keys, fresh_values, live, how: xla.Selection):
    rows, all_values = (_constant_first(a, b) for a, b in ((keys, fresh_keys), (values, fresh_values)))
    exists = xla.exists_of(keys, fresh_keys, live)[:, 0]
    return reference.gated_projection(x, rows, all_values, exists, **how._asdict())


def _reference_gates(x, keys, fresh_keys, live, how: xla.Selection):
    z = reference.responses(x, xla.joined(keys, fresh_keys))
    return reference.gates(z, xla.exists_of(keys, fresh_keys, live)[:, 0], **how._asdict())


def _run_xla(x, keys, values, fresh_keys, fresh_values, live, how: xla.Selection):
    fresh = 0 if fresh_keys is None else fresh_keys.shape[0]
    path = xla_gathered if xla_gathered.pays(x.shape[0], keys.shape[0], fresh, how.top_k) else xla
    return path.gated_projection(x, keys, values, fresh_keys, fresh_values, live, how)


def _constant_first(frozen, fresh):
    return frozen if fresh is None else xla.joined(jax.lax.stop_gradient(frozen), fresh)


class Implementation(NamedTuple):
    """How y and g are computed, for x [t, d_in] and checked arguments.

    `project(x, keys, values, fresh_keys, fresh_values, live, how)` -> y; `gates(x, keys, fresh_keys, live, how)` -> g;
    `platform`: where it runs, None = everywhere; `unsupported(x, keys, values, fresh_keys, how)`: why it cannot run on
    these shapes and dtypes, None if it can.
    """

    project: Callable
    gates: Callable
    platform: str | None = None
    unsupported: Callable[..., str | None] = lambda *arguments: None


def _kernel(module: str, platform: str) -> Implementation:
    """A Pallas kernel, imported when it is first asked for: a CPU run needs none of it."""

    def deferred(name: str) -> Callable:
        return lambda *arguments: getattr(importlib.import_module(f"{__package__}.{module}"), name)(*arguments)

    return Implementation(deferred("project"), xla.gates, platform, deferred("unsupported"))


IMPLEMENTATIONS = {
    "reference": Implementation(_run_reference, _reference_gates),
    "xla": Implementation(_run_xla, xla.gates),
    "pallas_tpu": _kernel("pallas_tpu", "tpu"),
    "pallas_gpu": _kernel("pallas_gpu", "gpu"),
}
_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Within it the best implementation is that of `platform` (cpu, gpu, tpu), for compilation ahead of time."""
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def kernels() -> dict[str, str]:
    """Platform -> the implementation that is a kernel for it."""
    return {made.platform: name for name, made in IMPLEMENTATIONS.items() if made.platform}


def platform() -> str:
    """cpu, gpu or tpu: what is compiled for."""
    return _target.get() or jax.default_backend()


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
    check_rows(x, keys, values, fresh_keys, fresh_values)
    how, live = selection(top_k, temperature, threshold, threshold_mode), live_rows(live, keys.shape[0])
    tokens = x.reshape(-1, x.shape[-1])
    implemented = choose(implementation, (tokens, keys, values, fresh_keys, how))
    if fresh_keys is not None:
        keys, values = jax.lax.stop_gradient((keys, values))
    y = implemented.project(tokens, keys, values, fresh_keys, fresh_values, live, how)
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
    check_rows(x, keys, values, fresh_keys, fresh_values)
    how, live = selection(top_k, temperature, threshold, threshold_mode), live_rows(live, keys.shape[0])
    tokens = x.reshape(-1, x.shape[-1])
    implemented = choose(implementation, (tokens, keys, values, fresh_keys, how))
    g = implemented.gates(tokens, keys, fresh_keys, live, how)
    return g.reshape(*x.shape[:-1], g.shape[-1])


def check_rows(x, keys, values, fresh_keys, fresh_values) -> None:
    """ValueError, naming the argument, where shapes or dtypes do not fit together."""
    if keys.ndim != 2 or values.ndim != 2 or keys.shape[0] != values.shape[0]:
        raise ValueError(f"keys [n, d_in] and values [n, d_out] need equal n; got {keys.shape} and {values.shape}")
    if x.ndim < 1 or x.shape[-1] != keys.shape[1]:
        raise ValueError(f"x [..., d_in] must end in the d_in of keys {keys.shape}; got {x.shape}")
    if (fresh_keys is None) != (fresh_values is None):
        raise ValueError("fresh_keys and fresh_values come together")
    arrays = {"x": x, "keys": keys, "values": values}
    if fresh_keys is not None:
        ranks = fresh_keys.ndim == fresh_values.ndim == 2
        if not ranks or fresh_keys.shape[1] != keys.shape[1] or fresh_values.shape != (
            fresh_keys.shape[0], values.shape[1],
        ):  # fmt: skip
            raise ValueError(
                f"fresh rows must continue keys {keys.shape} and values {values.shape}; "
                f"got {fresh_keys.shape} and {fresh_values.shape}"
            )
        arrays |= {"fresh_keys": fresh_keys, "fresh_values": fresh_values}
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be of a float dtype; got {array.dtype}")


def selection(top_k, temperature, threshold, threshold_mode) -> xla.Selection:
    """The static half of the gate; ValueError for a value without a meaning."""
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1; got {top_k}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}")
    if threshold_mode not in THRESHOLD_MODES:
        raise ValueError(f"threshold_mode {threshold_mode!r} is none of {', '.join(THRESHOLD_MODES)}")
    return xla.Selection(int(top_k), float(temperature), float(threshold), threshold_mode)


def live_rows(live, n: int) -> Int[Array, ""]:
    """How many of n frozen rows exist, as an array; ValueError if that is known and impossible."""
    if live is None:
        return jnp.int32(n)
    if not isinstance(live, jax.core.Tracer) and not 0 <= int(live) <= n:
        raise ValueError(f"live must lie in 0..{n}, the rows of keys; got {int(live)}")
    return jnp.asarray(live, jnp.int32)


def choose(name: str | None, arguments: tuple) -> Implementation:
    """The named implementation, or the best one of the platform; xla, with a reason in the log, where it cannot run."""
    here = platform()
    known = [known for known, made in IMPLEMENTATIONS.items() if made.platform in (None, here)]
    name = name or kernels().get(here, "xla")
    if name not in known:
        raise ValueError(f"implementation {name!r} is not available on platform {here!r}; known: {', '.join(known)}")
    if reason := IMPLEMENTATIONS[name].unsupported(*arguments):
        _say_once(f"gated_projection: {name} cannot run here ({reason}); xla computes it instead")
        name = "xla"
    return IMPLEMENTATIONS[name]


@functools.cache
def _say_once(message: str) -> None:
    _log.warning(message)
