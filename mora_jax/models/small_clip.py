"""The sizes of a CLIP of our own for 64-pixel pictures: 10 million parameters, which a laptop trains in minutes.

No package on PyPI, npm or Debian holds CLIP weights, so this one is trained on the spot: see `runtime.pretraining`. It
stands for "a pretrained CLIP" in streams that must run on a fresh machine; it knows emoji, no photographs.
"""

from __future__ import annotations

from mora_jax.models.clip_config import CLIPConfig, TextConfig, VisionConfig
from mora_jax.models.clip_tokenizer import ClipTokenizer

CONTEXT = 32  # tokens of a text, start and end included
CONFIG = CLIPConfig(
    VisionConfig(192, 768, 6, 6, "gelu", image_size=64, patch_size=16),
    TextConfig(128, 512, 4, 4, "gelu", context=CONTEXT),
    128,
)


def tokenizer() -> ClipTokenizer:
    """CLIP's own vocabulary with a short context."""
    return ClipTokenizer.packaged(CONTEXT)
