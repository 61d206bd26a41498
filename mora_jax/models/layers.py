"""The one seam between models and methods: a dense layer that adds an adapter's update when it is given a bank."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from mora_jax.methods import gates
from mora_jax.methods.method import Method
from mora_jax.models import quantised

MODEL = "model"  # the mesh axis over which heads and hidden features are cut


class Dense(nn.Module):
    """y = x W (+ bias) (+ the method's update, where the collections `bank` and `fresh` hold this site's experts).

    W is [d_in, d_out], plain or coded (see `quantised`). Without a bank this is a dense layer and no more, so the
    frozen model costs nothing extra. Of a method with gates two collections are filled where they are mutable: `stats`
    per token with the number of `active` experts ([...] of x, int32) and the gate `mass` of each block of frozen
    experts ([..., blocks]); `gates` with all gates.

    On a mesh `rows` says how x is cut along its first axis, and `narrows` that x, not y, is cut over `model`.
    """

    features: int
    use_bias: bool = False
    method: Method | None = None
    dtype: Any = jnp.float32
    rows: NamedSharding | None = None
    narrows: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... d_in"]) -> Float[Array, "... d_out"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), self.dtype)
        scale = self.get_variable("params", "kernel_scale")  # None where the kernel is not coded
        y = quantised.product(x, kernel, scale, self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), self.dtype)
            y = y + bias.reshape((1,) * (y.ndim - 1) + bias.shape).astype(self.dtype)
        if not self.has_variable("bank", "keys"):
            return y
        bank = {name: self.get_variable("bank", name) for name in ("keys", "values", "live")}
        fresh = None
        if self.has_variable("fresh", "keys"):
            fresh = {name: self.get_variable("fresh", name) for name in ("keys", "values")}
        if self.method.has_gates:
            self._report(x, bank, fresh)
        return y + gates.update(x, bank, fresh, self.method, self._cut(x))

    def _cut(self, x: Float[Array, "... d_in"]) -> dict[str, Any] | None:
        """How the op is cut over the mesh; None on one device. An axis that does not divide evenly stays whole."""
        if self.rows is None or self.rows.mesh.size == 1:
            return None
        mesh, axes = self.rows.mesh, self.rows.spec[0]
        features = x.shape[-1] if self.narrows else self.features
        model = MODEL if mesh.shape[MODEL] > 1 and features % mesh.shape[MODEL] == 0 else None
        d_in, d_out = (model, None) if self.narrows else (None, model)
        leading = axes if x.shape[0] % math.prod(mesh.shape[axis] for axis in axes) == 0 else None
        x_spec = P(leading, *[None] * (x.ndim - 2), d_in)
        return {"mesh": mesh, "x_spec": x_spec, "kernel_spec": P(d_in, d_out)}

    def _report(self, x, bank, fresh) -> None:
        told = [name for name in ("stats", "gates") if self.is_mutable_collection(name)]
        if not told:
            return
        g = gates.gates(x, bank, fresh, self.method)
        if "stats" in told:
            frozen = g[..., : bank["keys"].shape[0]]
            self.put_variable("stats", "active", (g > gates.ACTIVE).sum(axis=-1, dtype=jnp.int32))
            self.put_variable("stats", "mass", gates.mass_by_block(frozen, self.method.rank))
        if "gates" in told:
            self.put_variable("gates", "gates", g)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32 (arXiv 1910.07467); with `offset` times 1 + scale, as in Gemma."""

    eps: float
    dtype: Any = jnp.float32
    offset: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        start = nn.initializers.zeros_init() if self.offset else nn.initializers.ones_init()
        scale = self.param("scale", start, (x.shape[-1],), self.dtype)
        scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        if self.offset:
            return (wide * (1.0 + scale.astype(jnp.float32))).astype(self.dtype)
        return (wide.astype(self.dtype) * scale).astype(self.dtype)
