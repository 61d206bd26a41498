"""The sparse gated projection, MoRA's one op. `reference.py` is the specification, the other files are how fast."""

from mora_jax.ops.gated_projection.api import IMPLEMENTATIONS, THRESHOLD_MODES, gated_projection, gates

__all__ = ["IMPLEMENTATIONS", "THRESHOLD_MODES", "gated_projection", "gates"]
