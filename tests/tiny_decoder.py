"""A decoder of a few thousand parameters with random weights, for tests that need no real model."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax.models.decoder import Decoder, causal_mask
from mora_jax.models.decoder_config import DecoderConfig

TINY = DecoderConfig(
    vocab_size=61,
    d_model=24,
    d_ff=40,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=6,
    rope_theta=5000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
    max_positions=256,
)


@cache
def random_params(config: DecoderConfig, scale: float = 0.3) -> Any:
    """Random float32 parameters away from what initialisers give: no zero bias, no unit norm."""
    shapes = jax.eval_shape(
        lambda key: Decoder(config).init(key, jnp.zeros((1, 2), jnp.int32), method=Decoder.initialise),
        jax.random.key(0),
    )["params"]
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        mean = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return rng.normal(mean, scale, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@partial(jax.jit, static_argnums=0)
def forward(decoder: Decoder, params: Any, tokens: jax.Array, start: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden, _ = decoder.apply({"params": params}, tokens, positions, causal_mask(tokens.shape[1]))
    return decoder.apply({"params": params}, hidden, method=Decoder.logits)


def our_logits(decoder: Decoder, params: Any, tokens: Any, start: int = 0) -> np.ndarray:
    """[b t vocab]; `start` is the position of the first token."""
    return np.asarray(forward(decoder, params, np.asarray(tokens, np.int32), np.int32(start)))
