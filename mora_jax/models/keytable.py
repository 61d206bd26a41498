"""One table that says where every decoder tensor lives: in our parameters, in a Hugging Face file and in a GGUF file.

Readers and writers walk this table and hold no names of their own. Hugging Face names are those of transformers'
`*ForCausalLM` classes, GGUF names those of gguf-py (`gguf/constants.py`). Both store a dense weight as
[d_out, d_in], ours is [d_in, d_out].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped

from mora_jax.errors import MoraError
from mora_jax.models.decoder_config import DecoderConfig
from mora_jax.models.unread import Entry, Params, Read, unread

Format = Literal["hf", "gguf"]


@dataclass(frozen=True)
class Row:
    """One kind of tensor.

    `ours` is the path in the parameters; rows below `layers/` are stacked on a leading [layers] axis. `dims` names our
    shape of one layer (see `_widths`). `transform` turns the stored tensor into ours. `rotary` is the config field that
    counts the heads of a tensor whose rows GGUF stores in another order (see `unpermute_rotary`), or empty.
    """

    ours: str
    hf: str
    gguf: str
    dims: tuple[str, ...]
    transform: Literal["transpose", "none"] = "none"
    rotary: Literal["", "heads", "kv_heads"] = ""
    present: Callable[[DecoderConfig], bool] = lambda config: True

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.ours,)


_QKV_BIAS, _O_BIAS, _MLP_BIAS = attrgetter("attention_bias"), attrgetter("output_bias"), attrgetter("mlp_bias")
_QK_NORM, _POST_NORMS = attrgetter("qk_norm"), attrgetter("post_norms")
_L, _B = "model.layers.{layer}.", "blk.{layer}."
_A, _M = _L + "self_attn.", _L + "mlp."

TABLE = (
    Row("embed/embedding", "model.embed_tokens.weight", "token_embd.weight", ("vocab", "d")),
    Row("layers/attn_norm/scale", _L + "input_layernorm.weight", _B + "attn_norm.weight", ("d",)),
    Row("layers/attn/q/kernel", _A + "q_proj.weight", _B + "attn_q.weight", ("d", "q"), "transpose", "heads"),
    Row("layers/attn/k/kernel", _A + "k_proj.weight", _B + "attn_k.weight", ("d", "kv"), "transpose", "kv_heads"),
    Row("layers/attn/v/kernel", _A + "v_proj.weight", _B + "attn_v.weight", ("d", "kv"), "transpose"),
    Row("layers/attn/o/kernel", _A + "o_proj.weight", _B + "attn_output.weight", ("q", "d"), "transpose"),
    Row("layers/attn/q/bias", _A + "q_proj.bias", _B + "attn_q.bias", ("q",), "none", "heads", _QKV_BIAS),
    Row("layers/attn/k/bias", _A + "k_proj.bias", _B + "attn_k.bias", ("kv",), "none", "kv_heads", _QKV_BIAS),
    Row("layers/attn/v/bias", _A + "v_proj.bias", _B + "attn_v.bias", ("kv",), "none", "", _QKV_BIAS),
    Row("layers/attn/o/bias", _A + "o_proj.bias", _B + "attn_output.bias", ("d",), "none", "", _O_BIAS),
    Row("layers/attn/q_norm/scale", _A + "q_norm.weight", _B + "attn_q_norm.weight", ("head",), present=_QK_NORM),
    Row("layers/attn/k_norm/scale", _A + "k_norm.weight", _B + "attn_k_norm.weight", ("head",), present=_QK_NORM),
    # One name in two families: the norm before the MLP, or the one after attention where there are both.
    Row("layers/mlp_norm/scale", _L + "post_attention_layernorm.weight", _B + "ffn_norm.weight", ("d",),
        present=lambda config: not config.post_norms),
    Row("layers/attn_post_norm/scale", _L + "post_attention_layernorm.weight", _B + "post_attention_norm.weight",
        ("d",), present=_POST_NORMS),
    Row("layers/mlp_norm/scale", _L + "pre_feedforward_layernorm.weight", _B + "ffn_norm.weight", ("d",),
        present=_POST_NORMS),
    Row("layers/mlp_post_norm/scale", _L + "post_feedforward_layernorm.weight", _B + "post_ffw_norm.weight", ("d",),
        present=_POST_NORMS),
    Row("layers/mlp/gate/kernel", _M + "gate_proj.weight", _B + "ffn_gate.weight", ("d", "ff"), "transpose"),
    Row("layers/mlp/up/kernel", _M + "up_proj.weight", _B + "ffn_up.weight", ("d", "ff"), "transpose"),
    Row("layers/mlp/down/kernel", _M + "down_proj.weight", _B + "ffn_down.weight", ("ff", "d"), "transpose"),
    Row("layers/mlp/gate/bias", _M + "gate_proj.bias", _B + "ffn_gate.bias", ("ff",), "none", "", _MLP_BIAS),
    Row("layers/mlp/up/bias", _M + "up_proj.bias", _B + "ffn_up.bias", ("ff",), "none", "", _MLP_BIAS),
    Row("layers/mlp/down/bias", _M + "down_proj.bias", _B + "ffn_down.bias", ("d",), "none", "", _MLP_BIAS),
    Row("final_norm/scale", "model.norm.weight", "output_norm.weight", ("d",)),
    Row("lm_head/kernel", "lm_head.weight", "output.weight", ("d", "vocab"), "transpose",
        present=lambda config: not config.tie_embeddings),
)  # fmt: skip


def rows(config: DecoderConfig) -> list[Row]:
    """The rows of the table that a model with this config has."""
    return [row for row in TABLE if row.present(config)]


def dense_modules() -> dict[tuple[str, ...], str]:
    """Our path of every dense layer inside `layers`, with its module name in Hugging Face models, {layer} left open."""
    kernels = [row for row in TABLE if _stacked(row) and row.ours.endswith("/kernel")]
    return {tuple(row.ours.split("/")[:-1]): row.hf.removesuffix(".weight") for row in kernels}


def param_shape(row: Row, config: DecoderConfig) -> tuple[int, ...]:
    """The shape of a row in our parameters, with the leading [layers] axis where it is stacked."""
    shape = _layer_shape(row, config)
    return (config.layers, *shape) if _stacked(row) else shape


def entries(config: DecoderConfig, fmt: Format) -> Iterator[Entry]:
    """Every tensor that a file of format `fmt` holds for this config, layer by layer within a row."""
    for row in rows(config):
        shape = _layer_shape(row, config)
        stored = shape[::-1] if row.transform == "transpose" else shape
        for layer in range(config.layers) if _stacked(row) else (None,):
            yield Entry(row, layer, getattr(row, fmt).format(layer=layer), stored)


def assemble(
    config: DecoderConfig,
    dtype: Any,
    fmt: Format,
    shapes: Mapping[str, tuple[int, ...]],
    read: Read,
    source: object,
    ignored: Callable[[str], bool] = lambda name: False,
) -> Params:
    """The decoder's parameters in a file, none of which is read yet: see `unread.Unread`.

    `shapes` maps every tensor of the file to its stored shape, `read` returns a part of one of them. Raises MoraError
    for a missing tensor, a wrong shape, or a tensor that the config has no place for and that is not `ignored`.
    """
    wanted = list(entries(config, fmt))
    check_shapes(wanted, shapes, source, _described(config), ignored)
    return unread(wanted, {row.ours: param_shape(row, config) for row in rows(config)}, dtype, read)


def unpermute_rotary(tensor: Shaped[np.ndarray, "rows *rest"], heads: int) -> Shaped[np.ndarray, "rows *rest"]:
    """Undo the row order of q and k in a llama GGUF.

    llama.cpp rotates neighbouring rows (2i, 2i+1) of a head, Hugging Face and we rotate rows (i, i + head_dim/2). Its
    converter therefore interleaves the halves of every head, weights and biases alike (convert_hf_to_gguf.py,
    LlamaModel.permute); this is the inverse. `tensor` is [heads * head_dim, ...].
    """
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def _stacked(row: Row) -> bool:
    return row.ours.startswith("layers/")


def _layer_shape(row: Row, config: DecoderConfig) -> tuple[int, ...]:
    widths = {
        "vocab": config.vocab_size,
        "d": config.d_model,
        "ff": config.d_ff,
        "q": config.heads * config.head_dim,
        "kv": config.kv_heads * config.head_dim,
        "head": config.head_dim,
    }
    return tuple(widths[name] for name in row.dims)


def _described(config: DecoderConfig) -> str:
    return (
        f"a {config.family} decoder with layers={config.layers}, tie_embeddings={config.tie_embeddings}, "
        f"attention_bias={config.attention_bias}, output_bias={config.output_bias}, mlp_bias={config.mlp_bias}"
    )


def check_shapes(
    wanted: Collection[Entry],
    shapes: Mapping[str, tuple[int, ...]],
    source: object,
    model: str,
    ignored: Callable[[str], bool],
) -> None:
    """Whether a file with tensors of `shapes` by name is that of the model whose tensors are `wanted`.

    Raises MoraError for a missing tensor, a wrong shape, and a tensor that is neither wanted nor `ignored`; the last
    calls the model `model`.
    """
    for entry in wanted:
        if entry.name not in shapes:
            raise MoraError(f"{source}: missing tensor {entry.name!r}, expected with shape {list(entry.stored_shape)}")
        if tuple(shapes[entry.name]) != entry.stored_shape:
            raise MoraError(
                f"{source}: tensor {entry.name!r} has shape {list(shapes[entry.name])}, "
                f"the config says {list(entry.stored_shape)}"
            )
    names = {entry.name for entry in wanted}
    for name in shapes:
        if name not in names and not ignored(name):
            raise MoraError(
                f"{source}: unexpected tensor {name!r} of shape {list(shapes[name])}; {model} has none of that name"
            )
