"""CLIP (arXiv 2103.00020): a vision transformer (arXiv 2010.11929) and a text transformer into one space.

Both encoders are stacks of the same scanned layer, so compile time does not grow with depth; per-layer tensors are
stacked on a leading [layers] axis. Site kinds are `vision/attn/q`, ..., `text/mlp/down`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int, UInt8

from mora_jax.data.images import normalise
from mora_jax.errors import MoraError
from mora_jax.methods.method import Method
from mora_jax.models import decoder
from mora_jax.models.clip_config import LEGACY_EOS, CLIPConfig, EncoderConfig, TextConfig, VisionConfig
from mora_jax.models.layers import Dense

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI's approximation (arXiv 1606.08415, section 2)
    "gelu": decoder.ACTIVATIONS["gelu"],
}
FIRST_TEMPERATURE = 0.07  # logits are cosines divided by it before training (arXiv 2103.00020, section 2.5)
_EMBEDDING = nn.initializers.normal(0.02)


class Attention(nn.Module):
    """Multi-head attention (arXiv 1706.03762). x is [b, t, d]; mask [1, t, t] says who sees whom, None = all."""

    config: EncoderConfig
    method: Method | None
    dtype: Any

    @nn.compact
    def __call__(self, x, mask):
        c, (b, t, _) = self.config, x.shape

        def dense(name):
            return Dense(c.d_model, True, self.method, self.dtype, name=name)

        q, k, v = (dense(name)(x).reshape(b, t, c.heads, -1).transpose(0, 2, 1, 3) for name in "qkv")
        scores = jnp.einsum("bhqd,bhsd->bhqs", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        y = jnp.einsum("bhqs,bhsd->bhqd", weights, v)
        return dense("o")(y.transpose(0, 2, 1, 3).reshape(b, t, -1))


class MLP(nn.Module):
    """down(activation(up(x)))."""

    config: EncoderConfig
    method: Method | None
    dtype: Any

    @nn.compact
    def __call__(self, x):
        c = self.config
        hidden = ACTIVATIONS[c.activation](Dense(c.d_ff, True, self.method, self.dtype, name="up")(x))
        return Dense(c.d_model, True, self.method, self.dtype, name="down")(hidden)


class Layer(nn.Module):
    """One transformer layer with its norms before both halves; the body of a scan."""

    config: EncoderConfig
    method: Method | None
    dtype: Any

    @nn.compact
    def __call__(self, h, mask):
        c = self.config
        attend = Attention(c, self.method, self.dtype, name="attn")
        h = h + attend(_norm(c, self.dtype, "attn_norm")(h), mask)
        h = h + MLP(c, self.method, self.dtype, name="mlp")(_norm(c, self.dtype, "mlp_norm")(h))
        return h, None


def _norm(config: EncoderConfig, dtype: Any, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm in float32; its variance from centred values, for E[x^2] - E[x]^2 loses what is left of large means."""
    return nn.LayerNorm(config.norm_eps, dtype, dtype, use_fast_variance=False, name=name)


def _layers(config: EncoderConfig, method: Method | None, dtype: Any, remat: str) -> nn.Module:
    policy = decoder.REMAT[remat]
    body = Layer if policy is None else nn.remat(Layer, policy=policy, prevent_cse=False)
    return nn.scan(
        body,
        variable_axes={"params": 0, "bank": 0, "fresh": 0, "stats": 0, "gates": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=config.layers,
    )(config, method, dtype)


class VisionEncoder(nn.Module):
    """Pictures -> points of the common space: patches behind a class token, whose last state is projected."""

    config: VisionConfig
    d_embed: int
    method: Method | None
    dtype: Any
    remat: str

    def setup(self):
        c = self.config
        self.patches = nn.Dense(c.d_model, use_bias=False, dtype=self.dtype, param_dtype=self.dtype)
        self.class_embedding = self.param("class_embedding", _EMBEDDING, (c.d_model,), self.dtype)
        self.positions = self.param("positions", _EMBEDDING, (c.positions, c.d_model), self.dtype)
        self.pre_norm = _norm(c, self.dtype)
        self.layers = _layers(c, self.method, self.dtype, self.remat)
        self.post_norm = _norm(c, self.dtype)
        self.projection = nn.Dense(self.d_embed, use_bias=False, dtype=self.dtype, param_dtype=self.dtype)

    def __call__(self, pictures: UInt8[Array, "b size size 3"]) -> Float[Array, "b d_embed"]:
        c = self.config
        if pictures.shape[1:] != (c.image_size, c.image_size, 3):
            raise MoraError(f"pictures are {list(pictures.shape[1:])}, the model takes {[c.image_size] * 2 + [3]}")
        x = self.patches(_patches(normalise(pictures, c.mean, c.std).astype(self.dtype), c.patch_size))
        first = jnp.broadcast_to(self.class_embedding[None, None], (len(x), 1, c.d_model))
        h = jnp.concatenate([first, x], axis=1) + self.positions[None]
        h, _ = self.layers(self.pre_norm(h), None)
        return self.projection(self.post_norm(h[:, 0]))


def _patches(x: Float[Array, "b size size 3"], side: int) -> Float[Array, "b patches pixels"]:
    """Squares row by row; the numbers of a square in the order of a convolution's kernel: channel, row, column."""
    b, size, _, channels = x.shape
    x = x.reshape(b, size // side, side, size // side, side, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, (size // side) ** 2, channels * side * side)


class TextEncoder(nn.Module):
    """Token ids -> points of the common space: causal, and the state at the end of text is projected."""

    config: TextConfig
    d_embed: int
    method: Method | None
    dtype: Any
    remat: str

    def setup(self):
        c = self.config
        self.embed = nn.Embed(
            c.vocab_size, c.d_model, dtype=self.dtype, param_dtype=self.dtype, embedding_init=_EMBEDDING
        )
        self.positions = self.param("positions", _EMBEDDING, (c.context, c.d_model), self.dtype)
        self.layers = _layers(c, self.method, self.dtype, self.remat)
        self.final_norm = _norm(c, self.dtype)
        self.projection = nn.Dense(self.d_embed, use_bias=False, dtype=self.dtype, param_dtype=self.dtype)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b d_embed"]:
        c, t = self.config, tokens.shape[1]
        if t > c.context:
            raise MoraError(f"texts have {t} tokens, the model takes {c.context}")
        h, _ = self.layers(self.embed(tokens) + self.positions[None, :t], decoder.causal_mask(t))
        end = end_of_text(tokens, c.eos_id)[:, None, None]
        return self.projection(self.final_norm(jnp.take_along_axis(h, end, axis=1)[:, 0]))


def end_of_text(tokens: Int[Array, "b t"], eos_id: int) -> Int[Array, " b"]:
    """Where the first `eos_id` of a row lies; with LEGACY_EOS the first of its largest ids (as transformers does)."""
    return jnp.argmax(tokens if eos_id == LEGACY_EOS else tokens == eos_id, axis=-1)


class CLIP(nn.Module):
    """Pictures and texts as points on the unit sphere; `logits` compares them.

    `remat` is a row of decoder.REMAT. Called with both, it gives the logits, which is also the entry point of `init`.
    """

    config: CLIPConfig
    method: Method | None = None
    dtype: Any = jnp.float32
    remat: str = "none"

    def setup(self):
        c, shared = self.config, (self.config.d_embed, self.method, self.dtype, self.remat)
        self.vision = VisionEncoder(c.vision, *shared)
        self.text = TextEncoder(c.text, *shared)
        start = nn.initializers.constant(-math.log(FIRST_TEMPERATURE))
        self.logit_scale = self.param("logit_scale", start, (), self.dtype)

    def __call__(self, pictures: UInt8[Array, "b size size 3"], tokens: Int[Array, "n t"]) -> Float[Array, "b n"]:
        return self.logits(self.embed_images(pictures), self.embed_texts(tokens))

    def embed_images(self, pictures: UInt8[Array, "b size size 3"]) -> Float[Array, "b d_embed"]:
        """8-bit pixels as `data.images.pixels` gives them -> points of length 1, float32."""
        return _unit(self.vision(pictures))

    def embed_texts(self, tokens: Int[Array, "n t"]) -> Float[Array, "n d_embed"]:
        """Token ids as `ClipTokenizer` gives them, t up to the context -> points of length 1, float32."""
        return _unit(self.text(tokens))

    def logits(self, images: Float[Array, "b d_embed"], texts: Float[Array, "n d_embed"]) -> Float[Array, "b n"]:
        """exp(logit_scale) * cosine, float32."""
        return jnp.exp(self.logit_scale.astype(jnp.float32)) * (images @ texts.T)


def initialise(clip: CLIP, key: Array) -> dict[str, Any]:
    """Random parameters of a model."""
    size = clip.config.vision.image_size
    blank = jnp.zeros((1, size, size, 3), jnp.uint8), jnp.zeros((1, 2), jnp.int32)
    return jax.jit(clip.init)(key, *blank)["params"]


def _unit(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True))


def site_kinds(params: Mapping[str, Any]) -> dict[tuple[str, ...], str]:
    """The path of every dense layer that a method may adapt, with its kind, such as vision/attn/q."""
    paths = (path[:-1] for path in flatten_dict(params) if path[1:2] == ("layers",) and path[-1] == "kernel")
    return {path: "/".join((path[0], *path[2:])) for path in paths}
