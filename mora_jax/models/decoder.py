"""A decoder-only language model in the manner of Llama (arXiv 2302.13971): GQA, rotary positions, RMSNorm, gated MLP.

One module for all families; what differs between models is a field of `DecoderConfig`. Layers are scanned, so compile
time does not grow with depth, and every per-layer tensor is stacked on a leading [layers] axis.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from mora_jax.methods.method import Method
from mora_jax.models.decoder_config import DecoderConfig, RopeScaling
from mora_jax.models.layers import Dense, RMSNorm
from mora_jax.ops.gated_projection import GATES

NO_WINDOW = 1 << 30  # tokens
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


def frequencies(config: DecoderConfig) -> Float[np.ndarray, "kinds h"]:
    """theta^(-2i/head_dim), i = 0..head_dim/2 - 1 (arXiv 2104.09864), a row for each way in which layers rotate:
    stretched as `rope_scaling` says; with `local_rope_theta`; not at all. Rows that no layer needs are left out.
    """
    half = np.arange(config.head_dim // 2, dtype=np.float32) / np.float32(config.head_dim // 2)
    rows = [_stretched(np.float32(config.rope_theta) ** -half, config.rope_scaling)]
    if config.local_rope_theta:
        rows.append(np.float32(config.local_rope_theta) ** -half)
    if config.no_rope:
        rows.append(np.zeros_like(half))
    return np.stack(rows)


def _stretched(frequency: Float[np.ndarray, " h"], scaling: RopeScaling | None) -> Float[np.ndarray, " h"]:
    if scaling is None:
        return frequency
    slow = frequency / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return slow
    turns = scaling.original_max_positions * frequency / np.float32(2 * np.pi)  # within the context first trained on
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    fast = np.clip((turns - low) / (high - low), 0, 1)
    return fast * frequency + (1 - fast) * slow


def rotary_kinds(config: DecoderConfig) -> list[int]:
    """Which row of `frequencies` each layer takes."""
    local = [int(bool(config.local_rope_theta and window)) for window in config.windows or (0,) * config.layers]
    last = 1 + bool(config.local_rope_theta)
    return [last if off else kind for off, kind in zip(config.no_rope or (False,) * config.layers, local, strict=True)]


def rotary(
    positions: Int[Array, "b t"], config: DecoderConfig
) -> tuple[Float[Array, "kinds b t h"], Float[Array, "kinds b t h"]]:
    """cos and sin of position * frequency, float32."""
    table = frequencies(config)
    angle = positions.astype(jnp.float32)[None, ..., None] * table[:, None, None]
    return jnp.cos(angle), jnp.sin(angle)


def soft_cap(x: Float[Array, "*shape"], cap: float) -> Float[Array, "*shape"]:
    """cap * tanh(x / cap) (arXiv 2408.00118); x itself where cap is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def _rotate(x: Float[Array, "b heads t d"], cos: Float[Array, "b t h"], sin: Float[Array, "b t h"]):
    """Rotates the pair (x_i, x_{i + d/2}): the half-split layout of Hugging Face checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class PerLayer(NamedTuple):
    """What differs between layers, scanned: its number, its window in tokens (large = none), its row of frequencies."""

    index: Int[Array, ""]
    window: Int[Array, ""]
    rotary: Int[Array, ""]

    @classmethod
    def stacked(cls, config: DecoderConfig) -> PerLayer:
        windows = [window or NO_WINDOW for window in config.windows or (0,) * config.layers]
        rows = rotary_kinds(config)
        return cls(jnp.arange(config.layers), jnp.asarray(windows, jnp.int32), jnp.asarray(rows, jnp.int32))


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions.

    x is [b, t, d], mask [b or 1, t, slots], distance [1, t, slots] how far back a slot lies.
    """

    config: DecoderConfig
    method: Method | None
    dtype: Any
    rows: NamedSharding | None = None

    @nn.compact
    def __call__(self, x, cos, sin, mask, distance, cache: Cache | None, layer: PerLayer):
        c, (b, t, _) = self.config, x.shape
        if c.windows:
            mask = mask & (distance < layer.window)
        of_layer = layer.rotary if cos.shape[0] > 1 else 0  # a constant where all layers rotate alike
        cos, sin = (jax.lax.dynamic_index_in_dim(table, of_layer, keepdims=False) for table in (cos, sin))
        dense = {"method": self.method, "dtype": self.dtype, "rows": self.rows}

        def heads(name, count):
            y = Dense(count * c.head_dim, c.attention_bias, name=name, **dense)(x)
            return y.reshape(b, t, count, c.head_dim).transpose(0, 2, 1, 3)

        def direction(name, y):
            return RMSNorm(c.norm_eps, self.dtype, c.norm_offset, name=name)(y) if c.qk_norm else y

        q = _rotate(direction("q_norm", heads("q", c.heads)), cos, sin)
        k = _rotate(direction("k_norm", heads("k", c.kv_heads)), cos, sin)
        v = heads("v", c.kv_heads)
        if cache is not None:
            at = (layer.index, 0, 0, cache.end, 0)
            cache = cache._replace(
                keys=jax.lax.dynamic_update_slice(cache.keys, k[None], at),
                values=jax.lax.dynamic_update_slice(cache.values, v[None], at),
            )
            k = jax.lax.dynamic_index_in_dim(cache.keys, layer.index, keepdims=False)
            v = jax.lax.dynamic_index_in_dim(cache.values, layer.index, keepdims=False)
        group = c.heads // c.kv_heads  # query heads that share a key head
        q = q.reshape(b, c.kv_heads, group * t, c.head_dim)
        scores = jnp.einsum("bkqd,bksd->bkqs", q, k, preferred_element_type=jnp.float32)
        scores = soft_cap(scores * (c.query_scalar or c.head_dim) ** -0.5, c.attention_softcap)
        scores = scores.reshape(b, c.kv_heads, group, t, -1)
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
        weights = weights.astype(self.dtype).reshape(b, c.kv_heads, group * t, -1)
        y = jnp.einsum("bkqs,bksd->bkqd", weights, v)
        y = y.reshape(b, c.heads, t, c.head_dim).transpose(0, 2, 1, 3).reshape(b, t, -1)
        return Dense(c.d_model, c.output_bias, narrows=True, name="o", **dense)(y), cache


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (arXiv 2002.05202)."""

    config: DecoderConfig
    method: Method | None
    dtype: Any
    rows: NamedSharding | None = None

    @nn.compact
    def __call__(self, x):
        c = self.config

        def dense(name, features):
            narrows = name == "down"
            return Dense(features, c.mlp_bias, self.method, self.dtype, self.rows, narrows, name=name)

        hidden = ACTIVATIONS[c.activation](dense("gate", c.d_ff)(x)) * dense("up", c.d_ff)(x)
        return dense("down", c.d_model)(hidden)


def _kept(h: Float[Array, "b t d"], rows: NamedSharding | None) -> Float[Array, "b t d"]:
    """h with its rows cut as the batch is. Without this the partitioner may cut d instead, like the input axis of the
    weights: then each device holds all rows and sums of activations travel instead of weights.
    """
    if rows is None:
        return h
    ways = math.prod(rows.mesh.shape[axis] for axis in rows.spec[0])
    return h if h.shape[0] % ways else jax.lax.with_sharding_constraint(h, rows)


class Layer(nn.Module):
    """One transformer layer, norms before its halves and in some families after them too; the body of a scan."""

    config: DecoderConfig
    method: Method | None
    dtype: Any
    rows: NamedSharding | None = None

    @nn.compact
    def __call__(self, carry, layer: PerLayer, cos, sin, mask, distance):
        h, cache = carry
        rows, method = self.rows, self.method
        if cache is not None and rows is not None:  # of single tokens the sums are smaller than the weights
            rows, method = None, method and (method if rows.mesh.size == 1 else method.portable)
        h, c = _kept(h, rows), self.config

        def norm(name, y):
            return RMSNorm(c.norm_eps, self.dtype, c.norm_offset, name=name)(y)

        attended, cache = Attention(c, method, self.dtype, rows, name="attn")(
            norm("attn_norm", h), cos, sin, mask, distance, cache, layer
        )
        h = h + (norm("attn_post_norm", attended) if c.post_norms else attended)
        fed = MLP(c, method, self.dtype, rows, name="mlp")(norm("mlp_norm", h))
        h = h + (norm("mlp_post_norm", fed) if c.post_norms else fed)
        return (_kept(h, rows), cache), None


class Decoder(nn.Module):
    """tokens -> hidden states; `logits` turns chosen hidden states into scores over the vocabulary."""

    config: DecoderConfig
    method: Method | None = None
    dtype: Any = jnp.float32
    remat: str = "none"
    rows: NamedSharding | None = None  # of hidden states on a mesh

    def setup(self):
        c = self.config
        body = Layer if REMAT[self.remat] is None else nn.remat(Layer, policy=REMAT[self.remat], prevent_cse=False)
        self.embed = nn.Embed(c.vocab_size, c.d_model, dtype=self.dtype, param_dtype=self.dtype)
        self.layers = nn.scan(
            body,
            variable_axes={"params": 0, "bank": 0, "fresh": 0, "stats": 0, "gates": 0},
            split_rngs={"params": True},
            in_axes=(0, *[nn.broadcast] * 4),
            length=c.layers,
        )(c, self.method, self.dtype, self.rows)
        self.final_norm = RMSNorm(c.norm_eps, self.dtype, c.norm_offset)
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
        c = self.config
        cos, sin = rotary(positions, c)
        first = 0 if cache is None else cache.end
        distance = first + jnp.arange(tokens.shape[1])[None, :, None] - jnp.arange(mask.shape[-1])[None, None]
        h = self.embed(tokens)
        if c.scale_embeddings:
            h = h * jnp.asarray(c.d_model**0.5, h.dtype)
        (h, cache), _ = self.layers((h, cache), PerLayer.stacked(c), cos, sin, mask, distance)
        if cache is not None:
            cache = cache._replace(end=cache.end + tokens.shape[1])
        return self.final_norm(h), cache

    def logits(self, hidden: Float[Array, "... d"]) -> Float[Array, "... vocab"]:
        """Scores over the vocabulary in float32."""
        scores = self.embed.attend(hidden) if self.config.tie_embeddings else self.lm_head(hidden)
        return soft_cap(scores.astype(jnp.float32), self.config.final_softcap)

    def initialise(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t vocab"]:
        """Touches every parameter; the entry point of `init` for random models."""
        t = tokens.shape[1]
        positions = jnp.broadcast_to(jnp.arange(t), tokens.shape)
        return self.logits(self(tokens, positions, causal_mask(t))[0])


def causal_mask(t: int) -> Bool[Array, "1 t t"]:
    """Every query sees itself and what came before. Right padding needs no mask of its own: no real query sees it."""
    return jnp.tril(jnp.ones((1, t, t), bool))
