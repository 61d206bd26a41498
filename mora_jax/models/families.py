"""The model families of the decoder: how a Hugging Face `config.json` becomes a `DecoderConfig`, and back.

A family is a row of `FAMILIES`. What a `config.json` leaves out has the default of transformers' config class of that
family (models/<model_type>/configuration_*.py); what no key says is in `arithmetic`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from mora_jax.errors import MoraError, unknown
from mora_jax.models.decoder_config import DecoderConfig, RopeScaling, build, read_integer, read_number

_SILU = {"silu": "silu", "swish": "silu"}
_ANY = {**_SILU, "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
# The official Gemma files say gelu and mean its tanh form (modeling_gemma.py).
_GEMMA = {"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_TO_HF_ACTIVATION = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_NONE: Mapping[str, Any] = MappingProxyType({})


def _all_slide(config: Mapping[str, Any], layer: int) -> bool:
    return True


def _late_layers_slide(config: Mapping[str, Any], layer: int) -> bool:
    return bool(config["use_sliding_window"]) and layer >= config["max_window_layers"]


def _all_but_every(period: int) -> Callable[[Mapping[str, Any], int], bool]:
    return lambda config, layer: (layer + 1) % (config.get("sliding_window_pattern") or period) != 0


class Family(NamedTuple):
    """One family. `slides(config, layer)` says which layers have a window where no `layer_types` does."""

    architecture: str
    defaults: Mapping[str, Any] = _NONE  # of keys that a config.json may leave out
    arithmetic: Mapping[str, Any] = _NONE  # fields of DecoderConfig that all of the family share
    activations: Mapping[str, str] = _ANY
    slides: Callable[[Mapping[str, Any], int], bool] | None = None
    extra: Sequence[str] = ()  # keys of `_EXTRA` that its config.json has


_GEMMA_DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}
_GEMMA_FORM = {"norm_offset": True, "scale_embeddings": True}
_GEMMA_EXTRA = ("attention_bias", "hidden_activation")
_CAPS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "sliding_window", "layer_types")
_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_QWEN_EXTRA = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

# By `model_type`.
FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", extra=("attention_bias", "mlp_bias")),
    "mistral": Family("MistralForCausalLM", {"sliding_window": 4096}, slides=_all_slide, extra=("sliding_window",)),
    "qwen2": Family(
        "Qwen2ForCausalLM", _QWEN_WINDOW, {"attention_bias": True}, slides=_late_layers_slide, extra=_QWEN_EXTRA
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**_QWEN_WINDOW, "head_dim": 128},
        {"qk_norm": True},
        slides=_late_layers_slide,
        extra=("attention_bias", *_QWEN_EXTRA),
    ),
    "gemma": Family("GemmaForCausalLM", _GEMMA_DEFAULTS, _GEMMA_FORM, _GEMMA, extra=_GEMMA_EXTRA),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {
            **_GEMMA_DEFAULTS,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
        },
        {**_GEMMA_FORM, "post_norms": True},
        _GEMMA,
        _all_but_every(2),
        (*_GEMMA_EXTRA, *_CAPS),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            **_GEMMA_DEFAULTS,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        {**_GEMMA_FORM, "post_norms": True, "qk_norm": True},
        _GEMMA,
        _all_but_every(6),
        (*_GEMMA_EXTRA, *_CAPS, "rope_local_base_freq"),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {"tie_word_embeddings": True, "rope_theta": 2e6, "no_rope_layer_interval": 4},
        extra=("attention_bias", "mlp_bias", "no_rope_layers"),
    ),
}


def _layer_types(config: DecoderConfig) -> list[str]:
    return [_SLIDING if window else _FULL for window in config.windows] or [_FULL] * config.layers


def _window(config: DecoderConfig) -> int | None:
    return max(config.windows, default=0) or None


# What a config.json of some families has beside the keys that all have.
_EXTRA: Mapping[str, Callable[[DecoderConfig], Any]] = {
    "attention_bias": lambda c: c.attention_bias,
    "mlp_bias": lambda c: c.mlp_bias,
    "hidden_activation": lambda c: _TO_HF_ACTIVATION[c.activation],
    "sliding_window": _window,
    "use_sliding_window": lambda c: _window(c) is not None,
    "max_window_layers": lambda c: _layer_types(c).index(_SLIDING) if _window(c) else c.layers,
    "layer_types": _layer_types,
    "no_rope_layers": lambda c: [int(not off) for off in c.no_rope] or [1] * c.layers,
    "query_pre_attn_scalar": lambda c: c.query_scalar or c.head_dim,
    "attn_logit_softcapping": lambda c: c.attention_softcap or None,
    "final_logit_softcapping": lambda c: c.final_softcap or None,
    "rope_local_base_freq": lambda c: c.local_rope_theta,
}


def from_hf(config: Mapping[str, Any], source: object) -> DecoderConfig:
    """The decoder of a `config.json`; `source` names the file in errors.

    Raises MoraError for an architecture outside FAMILIES, an unknown kind of RoPE scaling, a missing key or an
    impossible value.
    """
    name = _family_name(config, source)
    family = FAMILIES[name]
    config = {**family.defaults, **config}
    heads, d_model, layers = (
        read_integer(config, key, source) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    activation = config.get("hidden_activation") or config.get("hidden_act", "silu")
    if activation not in family.activations:
        raise MoraError(f"{source}: {unknown('hidden_act', activation, family.activations)}")
    bias = bool(config.get("attention_bias", False))  # of q, k, v and o in every family that has the key
    fields = {
        "family": name,
        "vocab_size": read_integer(config, "vocab_size", source),
        "d_model": d_model,
        "d_ff": read_integer(config, "intermediate_size", source),
        "layers": layers,
        "heads": heads,
        "kv_heads": read_integer(config, "num_key_value_heads", source, heads),
        "head_dim": read_integer(config, "head_dim", source, d_model // max(heads, 1)),
        "norm_eps": read_number(config, "rms_norm_eps", source, 1e-6),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "max_positions": read_integer(config, "max_position_embeddings", source, 2048),
        "attention_bias": bias,
        "output_bias": bias,
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "activation": family.activations[activation],
        "windows": _windows(family, config, layers, source),
        "no_rope": _no_rope(config, layers, source),
        "query_scalar": read_integer(config, "query_pre_attn_scalar", source, 0),
        "attention_softcap": read_number(config, "attn_logit_softcapping", source, 0.0),
        "final_softcap": read_number(config, "final_logit_softcapping", source, 0.0),
        **_rope(config, source),
    }
    return build(source, **(fields | dict(family.arithmetic)))


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a model. Token ids are the tokenizer's business and are null here.

    Raises MoraError for a config that its family's `config.json` has no words for.
    """
    family = FAMILIES[config.family]
    content = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": _TO_HF_ACTIVATION[config.activation],
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": None,
        **_rope_to_hf(config),
        **{key: _EXTRA[key](config) for key in family.extra},
    }
    read_back = from_hf(content, family.architecture)
    lost = [key for key, value in vars(config).items() if value != getattr(read_back, key)]
    if lost:
        values = ", ".join(f"{key}={getattr(config, key)}" for key in lost)
        raise MoraError(f"{values} cannot be written as a {family.architecture} config.json")
    return content


def _family_name(config: Mapping[str, Any], source: object) -> str:
    """Both names are looked at where both are given; a config without either is not taken on trust."""
    by_architecture = {family.architecture: name for name, family in FAMILIES.items()}
    architectures, model_type = config.get("architectures") or [], config.get("model_type")
    for architecture in architectures:
        if architecture not in by_architecture:
            raise MoraError(f"{source}: {unknown('architecture', architecture, by_architecture)}")
    if model_type is None and architectures:
        return by_architecture[architectures[0]]
    if model_type not in FAMILIES:
        raise MoraError(f"{source}: {unknown('model_type', model_type, FAMILIES)}")
    for architecture in architectures:
        if by_architecture[architecture] != model_type:
            raise MoraError(f"{source}: architecture {architecture} contradicts model_type {model_type}")
    return model_type


def _windows(family: Family, config: Mapping[str, Any], layers: int, source: object) -> tuple[int, ...]:
    """The window of each layer in tokens, 0 where it sees everything; empty where no layer has one."""
    if config.get("use_bidirectional_attention"):
        raise MoraError(f"{source}: use_bidirectional_attention is not supported; a decoder here is causal")
    if family.slides is None and config.get("use_sliding_window"):
        raise MoraError(f"{source}: use_sliding_window is not supported for {family.architecture}")
    if family.slides is None or config.get("sliding_window") is None:
        return ()
    window = read_integer(config, "sliding_window", source)
    types = config.get("layer_types") or [
        _SLIDING if family.slides(config, layer) else _FULL for layer in range(layers)
    ]
    for kind in types:
        if kind not in (_FULL, _SLIDING):
            raise MoraError(f"{source}: {unknown('layer_types entry', kind, (_FULL, _SLIDING))}")
    windows = tuple(window if kind == _SLIDING else 0 for kind in types)
    return windows if any(windows) else ()


def _no_rope(config: Mapping[str, Any], layers: int, source: object) -> tuple[bool, ...]:
    """Which layers do not rotate (SmolLM3); the key's 1 means that a layer does."""
    interval = config.get("no_rope_layer_interval")
    rotates = config.get("no_rope_layers")
    if rotates is None and interval:
        rotates = [(layer + 1) % interval != 0 for layer in range(layers)]
    off = tuple(not value for value in rotates or ())
    return off if any(off) else ()


def _rope(config: Mapping[str, Any], source: object) -> dict[str, Any]:
    """transformers 5 keeps everything in `rope_parameters`, by layer type where these differ; before, there were
    `rope_theta`, `rope_scaling` and `rope_local_base_freq`."""
    rope = config.get("rope_parameters") or {}
    everywhere = rope.get(_FULL, rope) or {}
    theta = read_number(everywhere if "rope_theta" in everywhere else config, "rope_theta", source, 1e4)
    scaling = _scaling(everywhere, "rope_parameters", source) or _scaling(
        config.get("rope_scaling") or {}, "rope_scaling", source
    )
    local = rope.get(_SLIDING) or {}
    if _scaling(local, f"rope_parameters.{_SLIDING}", source) is not None:
        raise MoraError(f"{source}: RoPE scaling of {_SLIDING} layers is not supported; known: default")
    local_theta = read_number(config, "rope_local_base_freq", source, 0.0)
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "local_rope_theta": read_number(local, "rope_theta", source, local_theta),
    }


def _scaling(rope: Mapping[str, Any], key: str, source: object) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise MoraError(f"{source}: partial_rotary_factor {rope['partial_rotary_factor']} is not supported; known: 1.0")
    if kind in (None, "default"):
        return None
    where = f"{source} ({key})"
    if kind == "linear":
        return RopeScaling("linear", read_number(rope, "factor", where))
    if kind == "llama3":
        numbers = (read_number(rope, name, where) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        return RopeScaling("llama3", *numbers, read_integer(rope, "original_max_position_embeddings", where))
    raise MoraError(f"{where}: {unknown('RoPE scaling', kind, ('default', 'linear', 'llama3'))}")


def _rope_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Both spellings: transformers 4 reads `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`."""
    scaling = config.rope_scaling
    kind: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        kind = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        kind |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        kind |= {"original_max_position_embeddings": scaling.original_max_positions}
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, **kind}
    if config.local_rope_theta:
        rope = {_FULL: rope, _SLIDING: {"rope_theta": config.local_rope_theta, "rope_type": "default"}}
    return {"rope_theta": config.rope_theta, "rope_scaling": kind if scaling else None, "rope_parameters": rope}
