"""CLIP models of a few thousand parameters with random weights, and batches for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from mora_jax.models import clip_weights
from mora_jax.models.clip import CLIP
from mora_jax.models.clip_config import LEGACY_EOS, CLIPConfig, TextConfig, VisionConfig

TINY = CLIPConfig(
    VisionConfig(24, 40, 3, 4, image_size=12, patch_size=4),
    TextConfig(16, 36, 2, 2, vocab_size=61, context=9, eos_id=60),
    10,
)
# name -> (vision, text) fields that differ from TINY
VARIANTS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "quick_gelu": ({}, {}),
    "gelu": ({"activation": "gelu"}, {"activation": "gelu"}),
    "both_activations": ({"activation": "gelu"}, {}),
    "legacy_eos": ({}, {"eos_id": LEGACY_EOS}),
    "eos_in_the_middle": ({}, {"eos_id": 30}),
    "large_patches": ({"image_size": 14, "patch_size": 7, "norm_eps": 1e-3}, {"norm_eps": 1e-2}),
    "other_pixels": ({"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.2, 0.1)}, {}),
}


def variant(name: str) -> CLIPConfig:
    vision, text = VARIANTS[name]
    return CLIPConfig(dataclasses.replace(TINY.vision, **vision), dataclasses.replace(TINY.text, **text), TINY.d_embed)


@cache
def random_params(config: CLIPConfig, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(rng.normal(1.0 if path.endswith("scale") else 0.0, 0.3, shape)).astype(dtype)

    shapes = clip_weights.param_shapes(config)
    return unflatten_dict({path: draw(path, shape) for path, shape in shapes.items()}, sep="/")


def inputs(config: CLIPConfig, images: int = 3, texts: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Random pictures, and texts that end at another place each, with ids after the end."""
    rng = np.random.default_rng(1)
    side, text = config.vision.image_size, config.text
    pictures = rng.integers(0, 256, (images, side, side, 3)).astype(np.uint8)
    legacy = text.eos_id == LEGACY_EOS
    eos = text.vocab_size - 1 if legacy else text.eos_id
    tokens = rng.integers(3, text.vocab_size - 1, (texts, text.context))
    tokens = np.where(tokens == eos, 3, tokens)
    for row, end in enumerate(rng.integers(1, text.context, texts)):
        tokens[row, end] = eos
    return pictures, tokens.astype(np.int32)


# Unoptimised code compiles twice as fast.
fast = partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


@partial(fast, static_argnums=0)
def forward(clip: CLIP, params: Any, pictures: Any, tokens: Any) -> jax.Array:
    return clip.apply({"params": params}, pictures, tokens)
