"""The sizes and switches of a decoder, and how they are read from the fields of a GGUF file.

Hugging Face's `config.json` is read in `families.py`. Keys and defaults of GGUF: ggml-org/ggml docs/gguf.md, section
"LLM".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mora_jax.errors import MoraError, unknown

GGUF_ARCHITECTURES = ("llama",)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_UNSCALED_ROPE = (None, "default", "none")
_REQUIRED = object()


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    `linear` divides all by `factor` (arXiv 2306.15595). `llama3` divides the slow ones, leaves the fast ones and goes
    over smoothly between `original_max_positions` / high_freq_factor and / low_freq_factor tokens of wavelength
    (arXiv 2407.21783).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 0


@dataclass(frozen=True)
class DecoderConfig:
    """What fixes the parameter shapes and the arithmetic of a decoder.

    Widths are in features: `d_model` of the residual stream, `d_ff` of the gated MLP, `head_dim` of one attention head
    (q is `heads * head_dim` wide, k and v are `kv_heads * head_dim`). `max_positions` is the trained context in tokens.
    `attention_bias` is a bias on q, k and v, `output_bias` one on o. Tuples have one entry per layer, or none where all
    layers are plain. An impossible value raises MoraError.
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
    family: str = "llama"  # a row of families.FAMILIES
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float = 0.0  # of layers with a window; 0 = like all
    windows: tuple[int, ...] = ()  # tokens that a layer looks back, itself included; 0 = all
    no_rope: tuple[bool, ...] = ()  # layers that do not rotate (arXiv 2501.18795)
    qk_norm: bool = False  # RMSNorm of every query and key head before rotation (arXiv 2302.05442)
    post_norms: bool = False  # a norm after attention and after the MLP too (arXiv 2408.00118)
    norm_offset: bool = False  # norms multiply by 1 + scale
    scale_embeddings: bool = False  # by sqrt(d_model)
    query_scalar: int = 0  # attention scores are divided by its square root; 0 = head_dim
    attention_softcap: float = 0.0  # scores become cap * tanh(scores / cap) (arXiv 2408.00118); 0 = off
    final_softcap: float = 0.0  # the same for logits

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
        for name in ("windows", "no_rope"):
            if len(getattr(self, name)) not in (0, self.layers):
                raise MoraError(f"{name} has {len(getattr(self, name))} entries for {self.layers} layers")
        if min((self.query_scalar, self.attention_softcap, self.final_softcap, *self.windows)) < 0:
            raise MoraError("query_scalar, attention_softcap, final_softcap and windows must not be negative")

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], tensors: Collection[str], source: object) -> DecoderConfig:
        """Read the metadata of a llama GGUF file.

        `tensors` are the names of its tensors: GGUF has no key for tied embeddings and biases, they show by what is
        there. `source` names the file in errors. Raises MoraError for another architecture, a scaled RoPE, experts, a
        missing key or an impossible value.
        """
        architecture = fields.get("general.architecture")
        if architecture not in GGUF_ARCHITECTURES:
            raise MoraError(f"{source}: {unknown('general.architecture', architecture, GGUF_ARCHITECTURES)}")
        _check_gguf_supported(fields, tensors, source)
        heads = read_integer(fields, "llama.attention.head_count", source)
        d_model = read_integer(fields, "llama.embedding_length", source)
        head_dim = read_integer(fields, "llama.attention.key_length", source, d_model // max(heads, 1))
        for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
            if read_integer(fields, key, source, head_dim) != head_dim:
                raise MoraError(f"{source}: {key} is {fields[key]}; only the head dimension {head_dim} is supported")
        return build(
            source,
            vocab_size=read_integer(fields, "llama.vocab_size", source, len(fields.get("tokenizer.ggml.tokens", ()))),
            d_model=d_model,
            d_ff=read_integer(fields, "llama.feed_forward_length", source),
            layers=read_integer(fields, "llama.block_count", source),
            heads=heads,
            kv_heads=read_integer(fields, "llama.attention.head_count_kv", source, heads),
            head_dim=head_dim,
            rope_theta=read_number(fields, "llama.rope.freq_base", source, 10000.0),
            norm_eps=read_number(fields, "llama.attention.layer_norm_rms_epsilon", source),
            tie_embeddings="output.weight" not in tensors,
            max_positions=read_integer(fields, "llama.context_length", source),
            attention_bias="blk.0.attn_q.bias" in tensors,
            output_bias="blk.0.attn_output.bias" in tensors,
            mlp_bias="blk.0.ffn_gate.bias" in tensors,
        )


def build(source: object, **values: Any) -> DecoderConfig:
    """A DecoderConfig whose errors begin with `source`."""
    try:
        return DecoderConfig(**values)
    except MoraError as error:
        raise MoraError(f"{source}: {error}") from None


def read_integer(config: Mapping[str, Any], key: str, source: object, default: Any = _REQUIRED) -> int:
    """The integer under `key`, or `default` where it is missing or null."""
    value = config.get(key)
    if value is None and default is not _REQUIRED:
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        raise MoraError(f"{source}: key {key} is {'missing' if value is None else repr(value)}; it must be one integer")
    return value


def read_number(config: Mapping[str, Any], key: str, source: object, default: Any = _REQUIRED) -> float:
    """The number under `key`, likewise."""
    value = config.get(key)
    if value is None and default is not _REQUIRED:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise MoraError(f"{source}: key {key} is {'missing' if value is None else repr(value)}; it must be one number")
    return float(value)


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
