"""The decoder family behind the seam that `train.py` uses: what a batch is, what the loss is, what an answer is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mora_jax.models.decoder import Decoder, causal_mask


def answer_loss(decoder: Decoder, variables: Mapping[str, Any], batch: Mapping[str, Array]) -> Float[Array, ""]:
    """Mean cross-entropy over answer tokens (with EOS).

    Only the hidden states that predict an answer token meet the vocabulary: `batch["answers"]` [a] are the offsets from
    a row's first answer token that can carry loss, and offsets past a row's length count nothing.
    """
    tokens, prompt, length = batch["tokens"], batch["prompt"], batch["length"]
    t = tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(t)[None], tokens.shape)
    hidden, _ = decoder.apply(variables, tokens, positions, causal_mask(t))
    target_at = prompt[:, None] + batch["answers"][None]  # [b a]
    counts = target_at < length[:, None]
    target_at = jnp.minimum(target_at, t - 1)
    source = jnp.take_along_axis(hidden, (target_at - 1)[..., None], axis=1)
    logits = decoder.apply(variables, source, method=Decoder.logits)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.take_along_axis(tokens, target_at, axis=1))
    return jnp.sum(losses * counts) / jnp.maximum(jnp.sum(counts), 1)
