"""The sparse gated projection, MoRA's one op. `reference.py` is the specification, the other files are how fast."""

from mora_jax.ops.gated_projection.api import (
    IMPLEMENTATIONS,
    THRESHOLD_MODES,
    compiling_for,
    gated_projection,
    gates,
    kernels,
    platform,
)
from mora_jax.ops.gated_projection.sharded import gated_projection_sharded
from mora_jax.ops.gated_projection.xla import GATES

__all__ = [
    "GATES",
    "IMPLEMENTATIONS",
    "THRESHOLD_MODES",
    "compiling_for",
    "gated_projection",
    "gated_projection_sharded",
    "gates",
    "kernels",
    "platform",
]
