"""What training changes, as one pytree: the optimiser and the gradient exist for fresh experts only."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Int


@struct.dataclass
class TrainState:
    """`fresh` experts of the current task, the optimiser's state over them, and the steps done in this task."""

    fresh: Any
    opt_state: Any
    step: Int[Array, ""]

    @classmethod
    def create(cls, fresh: Any, optimizer: optax.GradientTransformation) -> TrainState:
        return cls(fresh=fresh, opt_state=optimizer.init(fresh), step=jnp.zeros((), jnp.int32))


def count_parameters(tree: Any) -> int:
    """Numbers in the floating-point leaves of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating))
