"""How fresh experts start."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def kaiming(
    key: jax.Array, layers: int, rank: int, d_in: int, d_out: int
) -> tuple[Float[Array, "layers r d_in"], Float[Array, "layers r d_out"]]:
    """Keys Kaiming-uniform with a = sqrt(5), that is U(-1/sqrt(d_in), 1/sqrt(d_in)); values 0."""
    bound = 1.0 / math.sqrt(d_in)
    keys = jax.random.uniform(key, (layers, rank, d_in), jnp.float32, -bound, bound)
    return keys, jnp.zeros((layers, rank, d_out), jnp.float32)


INITIALIZERS = {"kaiming": kaiming}
