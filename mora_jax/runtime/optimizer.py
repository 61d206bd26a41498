"""The optimiser over fresh experts, from optax, with the learning rate as data so that no horizon is compiled in."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

# progress in 0..1 (steps done / steps of this task) -> factor on the peak learning rate
SCHEDULES: Mapping[str, Callable[[Float[Array, ""]], Float[Array, ""]]] = {
    "constant": lambda progress: jnp.ones_like(progress),
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
}


def make_optimizer(train: Mapping) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980) with global-norm clipping and decoupled weight decay; it yields a direction for rate 1."""
    return optax.chain(
        optax.clip_by_global_norm(train["clip_norm"]) if train["clip_norm"] else optax.identity(),
        optax.scale_by_adam(b1=train["adam_b1"], b2=train["adam_b2"]),
        optax.add_decayed_weights(train["weight_decay"]) if train["weight_decay"] else optax.identity(),
        optax.scale(-1.0),
    )
