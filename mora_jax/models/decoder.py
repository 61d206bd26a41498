"""A decoder-only language model of the Llama family (arXiv 2302.13971): GQA, rotary positions, RMSNorm, gated MLP.

One module; what differs between models is a field of `DecoderConfig`. Layers are scanned, so compile time does not grow
with depth, and every per-layer tensor is stacked on a leading [layers] axis.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mora_jax.methods.method import Method
from mora_jax.models.decoder_config import DecoderConfig
from mora_jax.models.layers import Dense, RMSNorm
from mora_jax.ops.gated_projection import GATES

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
# What the backward pass recomputes: nothing, everything inside a layer, or all but the products of dense layers and the
# gates. Attention weights are products too, but they grow with the square of the length: they are made again.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(GATES)
    ),
}


class Cache(NamedTuple):
    """Keys and values of all layers so far, and where the next ones go. Unwritten slots are masked."""

    keys: Float[Array, "layers b kv_heads slots head_dim"]
    values: Float[Array, "layers b kv_heads slots head_dim"]
    end: Int[Array, ""]

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, slots: int, dtype: Any) -> Cache:
        shape = (config.layers, batch, config.kv_heads, slots, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))


def rotary(positions: Int[Array, "b t"], config: DecoderConfig) -> tuple[Float[Array, "b t h"], Float[Array, "b t h"]]:
    """cos and sin of the angles position * theta^(-2i/head_dim), i = 0..head_dim/2 - 1 (arXiv 2104.09864), float32."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * frequency.reshape(1, 1, half)
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x: Float[Array, "b heads t d"], cos: Float[Array, "b t h"], sin: Float[Array, "b t h"]):
    """Rotates the pair (x_i, x_{i + d/2}): the half-split layout of Hugging Face checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions; x is [b, t, d], mask [b or 1, t, slots]."""

    config: DecoderConfig
    method: Method | None
    dtype: Any

    @nn.compact
    def __call__(self, x, cos, sin, mask, cache: Cache | None, layer):
        c, (b, t, _) = self.config, x.shape
        dense = {"method": self.method, "dtype": self.dtype}

        def heads(name, count):
            y = Dense(count * c.head_dim, c.attention_bias, name=name, **dense)(x)
            return y.reshape(b, t, count, c.head_dim).transpose(0, 2, 1, 3)

        q = _rotate(heads("q", c.heads), cos, sin)
        k = _rotate(heads("k", c.kv_heads), cos, sin)
        v = heads("v", c.kv_heads)
        if cache is not None:
            at = (layer, 0, 0, cache.end, 0)
            cache = cache._replace(
                keys=jax.lax.dynamic_update_slice(cache.keys, k[None], at),
                values=jax.lax.dynamic_update_slice(cache.values, v[None], at),
            )
            k = jax.lax.dynamic_index_in_dim(cache.keys, layer, keepdims=False)
            v = jax.lax.dynamic_index_in_dim(cache.values, layer, keepdims=False)
        group = c.heads // c.kv_heads  # query heads that share a key head
        q = q.reshape(b, c.kv_heads, group * t, c.head_dim)
        scores = jnp.einsum("bkqd,bksd->bkqs", q, k, preferred_element_type=jnp.float32) * c.head_dim**-0.5
        scores = scores.reshape(b, c.kv_heads, group, t, -1)
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
        weights = weights.astype(self.dtype).reshape(b, c.kv_heads, group * t, -1)
        y = jnp.einsum("bkqs,bksd->bkqd", weights, v)
        y = y.reshape(b, c.heads, t, c.head_dim).transpose(0, 2, 1, 3).reshape(b, t, -1)
        return Dense(c.d_model, c.output_bias, name="o", **dense)(y), cache


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (arXiv 2002.05202)."""

    config: DecoderConfig
    method: Method | None
    dtype: Any

    @nn.compact
    def __call__(self, x):
        c = self.config

        def dense(name, features):
            return Dense(features, c.mlp_bias, self.method, self.dtype, name=name)

        hidden = ACTIVATIONS[c.activation](dense("gate", c.d_ff)(x)) * dense("up", c.d_ff)(x)
        return dense("down", c.d_model)(hidden)


class Layer(nn.Module):
    """One pre-norm transformer layer, shaped as the body of a scan over layers."""

    config: DecoderConfig
    method: Method | None
    dtype: Any

    @nn.compact
    def __call__(self, carry, layer, cos, sin, mask):
        h, cache = carry
        c = self.config
        attended, cache = Attention(c, self.method, self.dtype, name="attn")(
            RMSNorm(c.norm_eps, self.dtype, name="attn_norm")(h), cos, sin, mask, cache, layer
        )
        h = h + attended
        h = h + MLP(c, self.method, self.dtype, name="mlp")(RMSNorm(c.norm_eps, self.dtype, name="mlp_norm")(h))
        return (h, cache), None


class Decoder(nn.Module):
    """tokens -> hidden states; `logits` turns chosen hidden states into scores over the vocabulary."""

    config: DecoderConfig
    method: Method | None = None
    dtype: Any = jnp.float32
    remat: str = "none"

    def setup(self):
        c = self.config
        body = Layer if REMAT[self.remat] is None else nn.remat(Layer, policy=REMAT[self.remat], prevent_cse=False)
        self.embed = nn.Embed(c.vocab_size, c.d_model, dtype=self.dtype, param_dtype=self.dtype)
        self.layers = nn.scan(
            body,
            variable_axes={"params": 0, "bank": 0, "fresh": 0, "stats": 0, "gates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.layers,
        )(c, self.method, self.dtype)
        self.final_norm = RMSNorm(c.norm_eps, self.dtype)
        if not c.tie_embeddings:
            self.lm_head = nn.Dense(c.vocab_size, use_bias=False, dtype=self.dtype, param_dtype=self.dtype)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        mask: Bool[Array, "b t slots"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        """Hidden states after the final norm, and the cache with these tokens in it.

        `mask[b, i, j]`: may query i look at key j; without a cache slots = t, with one they are its slots.
        """
        cos, sin = rotary(positions, self.config)
        carry = (self.embed(tokens), cache)
        (h, cache), _ = self.layers(carry, jnp.arange(self.config.layers), cos, sin, mask)
        if cache is not None:
            cache = cache._replace(end=cache.end + tokens.shape[1])
        return self.final_norm(h), cache

    def logits(self, hidden: Float[Array, "... d"]) -> Float[Array, "... vocab"]:
        """Scores over the vocabulary in float32."""
        scores = self.embed.attend(hidden) if self.config.tie_embeddings else self.lm_head(hidden)
        return scores.astype(jnp.float32)

    def initialise(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t vocab"]:
        """Touches every parameter; the entry point of `init` for random models."""
        t = tokens.shape[1]
        positions = jnp.broadcast_to(jnp.arange(t), tokens.shape)
        return self.logits(self(tokens, positions, causal_mask(t))[0])


def causal_mask(t: int) -> Bool[Array, "1 t t"]:
    """Every query sees itself and what came before. Right padding needs no mask of its own: no real query sees it."""
    return jnp.tril(jnp.ones((1, t, t), bool))
