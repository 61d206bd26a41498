"""The sparse gated projection, MoRA's one op. `reference.py` is the specification, the other files are how fast."""

from mora_jax.ops.gated_projection.api import IMPLEMENTATIONS, THRESHOLD_MODES, gated_projection, gates
from mora_jax.ops.gated_projection.xla import GATES

__all__ = ["GATES", "IMPLEMENTATIONS", "THRESHOLD_MODES", "gated_projection", "gates"]
