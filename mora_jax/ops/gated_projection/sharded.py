"""The op where the layer's W [d_in, d_out] is cut over a mesh: each device holds its columns of keys and of values.

GSPMD partitions the portable op on its own; a Pallas kernel on sharded arguments has to stand inside `jax.shard_map`,
as here. Cut along d_in, responses are partial sums until one all-reduce of z completes them, and only then is there a
gate; cut along d_out, every device computes the same gate for its part of y, and the gradient of x is a sum over them.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mora_jax.ops.gated_projection import api, xla


class Cut(NamedTuple):
    """Mesh axes: those that x's leading axes are cut over, the one of d_in, the one of d_out (None = whole)."""

    mesh: Mesh
    leading: tuple[Hashable, ...]
    d_in: str | None
    d_out: str | None

    @property
    def specs(self) -> tuple[P, ...]:
        """Of x, keys, values, fresh keys, fresh values, live."""
        keys, values = P(None, self.d_in), P(None, self.d_out)
        return P(*self.leading, self.d_in), keys, values, keys, values, P()

    @property
    def y(self) -> P:
        return P(*self.leading, self.d_out)

    @property
    def of_tokens(self) -> tuple[str, ...]:
        """Every mesh axis that cuts tokens, over which gradients of experts are summed."""
        names = (name if isinstance(name, tuple) else (name,) for name in self.leading if name is not None)
        return tuple(axis for axes in names for axis in axes)


def gated_projection_sharded(
    x: Float[Array, "... d_in"],
    keys: Float[Array, "n d_in"],
    values: Float[Array, "n d_out"],
    *,
    mesh: Mesh,
    x_spec: P,
    kernel_spec: P,
    fresh_keys: Float[Array, "r d_in"] | None = None,
    fresh_values: Float[Array, "r d_out"] | None = None,
    top_k: int,
    temperature: float,
    threshold: float = 0.0,
    threshold_mode: str = "absolute",
    live: int | Int[Array, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "... d_out"]:
    """`gated_projection` on a mesh, equal to the op on one device; y is cut like x before its last axis, like W after.

    `x_spec` has an entry for every axis of x, `kernel_spec` is that of W [d_in, d_out]; the last entry of the former
    must be the first of the latter. Keys follow W's input axis, values its output axis, whole along experts. A kernel
    needs whole keys: where d_in is cut, the portable op computes. Without fresh rows nothing is meant to be
    differentiated. ValueError for specs that do not fit.
    """
    api.check_rows(x, keys, values, fresh_keys, fresh_values)
    d_in, d_out = (*kernel_spec, None, None)[:2]
    if len(x_spec) != x.ndim or x_spec[-1] != d_in:
        raise ValueError(f"x_spec {x_spec} must have {x.ndim} entries and end in W's {d_in!r}, from {kernel_spec}")
    cut = Cut(mesh, tuple(x_spec[:-1]), d_in, d_out)
    how = api.selection(top_k, temperature, threshold, threshold_mode)
    live = api.live_rows(live, keys.shape[0])
    keys, values = jax.lax.stop_gradient((keys, values))
    project = _on_devices if fresh_keys is None else _project
    return project(x, keys, values, fresh_keys, fresh_values, live, how, cut, implementation)


def _on_devices(x, keys, values, fresh_keys, fresh_values, live, how, cut, implementation):
    rule = partial(_forward_whole if cut.d_in is None else _forward_split, how=how, cut=cut, name=implementation)
    run = jax.shard_map(rule, mesh=cut.mesh, in_specs=cut.specs, out_specs=cut.y, check_vma=False)
    return run(x, keys, values, fresh_keys, fresh_values, live)


_project = jax.custom_vjp(_on_devices, nondiff_argnums=(6, 7, 8))


def _forward(x, keys, values, fresh_keys, fresh_values, live, how, cut, implementation):
    rows = (x, keys, values, fresh_keys, fresh_values, live)
    return _project(*rows, how, cut, implementation), rows


def _backward(how, cut, implementation, rows, dy):
    rule = partial(_backward_whole if cut.d_in is None else _backward_split, how=how, cut=cut, name=implementation)
    x_spec, _, _, keys_spec, values_spec, _ = cut.specs
    run = jax.shard_map(
        rule,
        mesh=cut.mesh,
        in_specs=(*cut.specs, cut.y),
        out_specs=(x_spec, keys_spec, values_spec),
        check_vma=False,
    )
    dx, d_keys, d_values = run(*rows, dy)
    return dx, None, None, d_keys, d_values, None


_project.defvjp(_forward, _backward)


# ---------------------------------------------------------------- what one device does


def _sum(array, axes):
    axes = tuple(axis for axis in axes if axis is not None)
    return jax.lax.psum(array, axes) if axes else array


def _flat(array):
    return array.reshape(-1, array.shape[-1])


def _local(x, keys, values, fresh_keys, fresh_values, live, how, name):
    made = api.choose(name, (_flat(x), keys, values, fresh_keys, how))
    y = made.project(_flat(x), keys, values, fresh_keys, fresh_values, live, how)
    return y.reshape(*x.shape[:-1], values.shape[-1])


def _forward_whole(*rows, how, cut, name):
    del cut
    return _local(*rows, how, name)


def _backward_whole(x, keys, values, fresh_keys, fresh_values, live, dy, *, how, cut, name):
    def trained(x, fresh_keys, fresh_values):
        return _local(x, keys, values, fresh_keys, fresh_values, live, how, name)

    dx, d_keys, d_values = jax.vjp(trained, x, fresh_keys, fresh_values)[1](dy)
    return _sum(dx, (cut.d_out,)), _sum(d_keys, (*cut.of_tokens, cut.d_out)), _sum(d_values, cut.of_tokens)


def _gate(x, keys, fresh_keys, live, how, cut):
    """Complete responses and the gate, the same on all devices that hold a part of d_in."""
    exists = xla.exists_of(keys, fresh_keys, live)
    z = _sum(xla.respond(_flat(x), xla.joined(keys, fresh_keys), exists), (cut.d_in,))
    return z, xla.gate(z, exists, how)


def _forward_split(x, keys, values, fresh_keys, fresh_values, live, *, how, cut, name):
    del name
    z, (_, g, _) = _gate(x, keys, fresh_keys, live, how, cut)
    y = jnp.dot((g * z).T, xla.joined(values, fresh_values).astype(jnp.float32)).astype(x.dtype)
    return y.reshape(*x.shape[:-1], values.shape[-1])


def _backward_split(x, keys, values, fresh_keys, fresh_values, live, dy, *, how, cut, name):
    del name
    z, (p, g, inverse) = _gate(x, keys, fresh_keys, live, how, cut)
    wide, dy = _flat(x).astype(jnp.float32), _flat(dy).astype(jnp.float32)
    dc = _sum(jnp.dot(xla.joined(values, fresh_values).astype(jnp.float32), dy.T), (cut.d_out,))
    dz = xla.gate_backward(z, p, g, inverse, dc, how)
    n = keys.shape[0]
    d_keys = _sum(jnp.dot(dz[n:], wide), cut.of_tokens).astype(fresh_keys.dtype)
    d_values = _sum(jnp.dot((g * z)[n:], dy), cut.of_tokens).astype(fresh_values.dtype)
    dx = jnp.dot(dz.T, xla.joined(keys, fresh_keys).astype(jnp.float32)).astype(x.dtype)
    return dx.reshape(x.shape), d_keys, d_values
