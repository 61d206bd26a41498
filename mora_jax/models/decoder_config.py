"""The sizes and switches of a Llama-family decoder, read from a `config.json` or from the fields of a GGUF file.

Key names and defaults follow transformers' `LlamaConfig` (models/llama/configuration_llama.py) and the GGUF
specification (ggml-org/ggml docs/gguf.md, section "LLM").
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mora_jax.errors import MoraError, unknown

ARCHITECTURES = ("LlamaForCausalLM",)
MODEL_TYPES = ("llama",)
GGUF_ARCHITECTURES = ("llama",)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

# Hugging Face's name of an activation -> ours.
_HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_TO_HF_ACTIVATION = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_UNSCALED_ROPE = (None, "default", "none")
_REQUIRED = object()


@dataclass(frozen=True)
class DecoderConfig:
    """What fixes the parameter shapes and the arithmetic of a decoder.

    Widths are in features: `d_model` of the residual stream, `d_ff` of the gated MLP, `head_dim` of one attention head
    (q is `heads * head_dim` wide, k and v are `kv_heads * head_dim`). `max_positions` is the trained context in tokens.
    `attention_bias` is a bias on q, k and v, `output_bias` one on o. An impossible value raises MoraError.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    max_positions: int
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "d_ff", "layers", "heads", "kv_heads", "head_dim", "max_positions"):
            if getattr(self, name) < 1:
                raise MoraError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise MoraError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise MoraError(f"head_dim {self.head_dim} is odd; rotary embeddings need an even one")
        if self.rope_theta <= 0 or self.norm_eps <= 0:
            raise MoraError(f"rope_theta {self.rope_theta} and norm_eps {self.norm_eps} must be above 0")
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], source: object) -> DecoderConfig:
        """Read the content of a `config.json`; `source` names the file in errors.

        Raises MoraError for an architecture other than Llama, a scaled RoPE, a missing key or an impossible value.
        """
        _check_hf_architecture(config, source)
        heads = _integer(config, "num_attention_heads", source)
        d_model = _integer(config, "hidden_size", source)
        activation = config.get("hidden_act", "silu")
        if activation not in _HF_ACTIVATIONS:
            raise MoraError(f"{source}: {unknown('hidden_act', activation, _HF_ACTIVATIONS)}")
        # Llama's one switch covers q, k, v and o (modeling_llama.py, LlamaAttention).
        bias = bool(config.get("attention_bias", False))
        return _build(
            source,
            vocab_size=_integer(config, "vocab_size", source),
            d_model=d_model,
            d_ff=_integer(config, "intermediate_size", source),
            layers=_integer(config, "num_hidden_layers", source),
            heads=heads,
            kv_heads=_integer(config, "num_key_value_heads", source, heads),
            head_dim=_integer(config, "head_dim", source, d_model // max(heads, 1)),
            rope_theta=_hf_rope_theta(config, source),
            norm_eps=_number(config, "rms_norm_eps", source, 1e-6),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_positions=_integer(config, "max_position_embeddings", source, 2048),
            attention_bias=bias,
            output_bias=bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            activation=_HF_ACTIVATIONS[activation],
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of a LlamaForCausalLM. Token ids are the tokenizer's business and are written as null.

        Raises MoraError for a bias on q, k, v without one on o, or the reverse: `LlamaConfig` has one switch for both.
        """
        if self.attention_bias != self.output_bias:
            raise MoraError(
                f"attention_bias={self.attention_bias} with output_bias={self.output_bias} cannot be written as a "
                "LlamaForCausalLM config.json; both must be equal"
            )
        return {
            "architectures": list(ARCHITECTURES),
            "model_type": MODEL_TYPES[0],
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_ff,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": _TO_HF_ACTIVATION[self.activation],
            "rms_norm_eps": self.norm_eps,
            "max_position_embeddings": self.max_positions,
            # Both spellings: transformers 4 reads the first, transformers 5 the second.
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "tie_word_embeddings": self.tie_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "bos_token_id": None,
            "eos_token_id": None,
        }

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], tensors: Collection[str], source: object) -> DecoderConfig:
        """Read the metadata of a llama GGUF file.

        `tensors` are the names of its tensors: GGUF has no key for tied embeddings and biases, they show by what is
        there. `source` names the file in errors. Raises MoraError like `from_hf`.
        """
        architecture = fields.get("general.architecture")
        if architecture not in GGUF_ARCHITECTURES:
            raise MoraError(f"{source}: {unknown('general.architecture', architecture, GGUF_ARCHITECTURES)}")
        _check_gguf_supported(fields, tensors, source)
        heads = _integer(fields, "llama.attention.head_count", source)
        d_model = _integer(fields, "llama.embedding_length", source)
        head_dim = _integer(fields, "llama.attention.key_length", source, d_model // max(heads, 1))
        for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
            if _integer(fields, key, source, head_dim) != head_dim:
                raise MoraError(f"{source}: {key} is {fields[key]}; only the head dimension {head_dim} is supported")
        return _build(
            source,
            vocab_size=_integer(fields, "llama.vocab_size", source, len(fields.get("tokenizer.ggml.tokens", ()))),
            d_model=d_model,
            d_ff=_integer(fields, "llama.feed_forward_length", source),
            layers=_integer(fields, "llama.block_count", source),
            heads=heads,
            kv_heads=_integer(fields, "llama.attention.head_count_kv", source, heads),
            head_dim=head_dim,
            rope_theta=_number(fields, "llama.rope.freq_base", source, 10000.0),
            norm_eps=_number(fields, "llama.attention.layer_norm_rms_epsilon", source),
            tie_embeddings="output.weight" not in tensors,
            max_positions=_integer(fields, "llama.context_length", source),
            attention_bias="blk.0.attn_q.bias" in tensors,
            output_bias="blk.0.attn_output.bias" in tensors,
            mlp_bias="blk.0.ffn_gate.bias" in tensors,
        )


def _build(source: object, **values: Any) -> DecoderConfig:
    try:
        return DecoderConfig(**values)
    except MoraError as error:
        raise MoraError(f"{source}: {error}") from None


def _integer(config: Mapping[str, Any], key: str, source: object, default: Any = _REQUIRED) -> int:
    value = config.get(key)
    if value is None and default is not _REQUIRED:
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        raise MoraError(f"{source}: key {key} is {'missing' if value is None else repr(value)}; it must be one integer")
    return value


def _number(config: Mapping[str, Any], key: str, source: object, default: Any = _REQUIRED) -> float:
    value = config.get(key)
    if value is None and default is not _REQUIRED:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise MoraError(f"{source}: key {key} is {'missing' if value is None else repr(value)}; it must be one number")
    return float(value)


def _check_hf_architecture(config: Mapping[str, Any], source: object) -> None:
    """Both names are looked at where both are given; a config without either is not taken on trust."""
    architectures, model_type = config.get("architectures") or [], config.get("model_type")
    for architecture in architectures:
        if architecture not in ARCHITECTURES:
            raise MoraError(f"{source}: {unknown('architecture', architecture, ARCHITECTURES)}")
    if model_type not in MODEL_TYPES and not (model_type is None and architectures):
        raise MoraError(f"{source}: {unknown('model_type', model_type, MODEL_TYPES)}")


def _hf_rope_theta(config: Mapping[str, Any], source: object) -> float:
    """transformers 5 keeps everything in `rope_parameters`; before, there were `rope_theta` and `rope_scaling`."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        kind = rope.get("rope_type", rope.get("type"))
        if kind not in _UNSCALED_ROPE:
            raise MoraError(f"{source}: RoPE scaling {kind!r} ({key}) is not supported yet; known: default")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise MoraError(
                f"{source}: partial_rotary_factor {rope['partial_rotary_factor']} is not supported; known: 1.0"
            )
    rope = config.get("rope_parameters") or {}
    return _number(rope if "rope_theta" in rope else config, "rope_theta", source, 10000.0)


def _check_gguf_supported(fields: Mapping[str, Any], tensors: Collection[str], source: object) -> None:
    scaling = fields.get("llama.rope.scaling.type")
    if scaling not in _UNSCALED_ROPE:
        raise MoraError(f"{source}: RoPE scaling {scaling!r} is not supported yet; known: none")
    if "rope_freqs.weight" in tensors:
        # llama.cpp writes Llama 3.1's scaled frequencies as a tensor, without a scaling.type.
        raise MoraError(f"{source}: RoPE scaling by tensor 'rope_freqs.weight' is not supported yet; known: none")
    if fields.get("llama.expert_count"):
        raise MoraError(
            f"{source}: llama.expert_count is {fields['llama.expert_count']}; only dense models are supported"
        )
