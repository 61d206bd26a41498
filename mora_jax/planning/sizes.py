"""Sizes of named decoders without their weights: what the published `config.json` of each says.

llama3-70b is here for its shapes only; it is no model of the registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mora_jax.errors import MoraError, unknown
from mora_jax.models import families, gguf, hf, registry
from mora_jax.models.decoder_config import DecoderConfig


def _sizes(d: int, ff: int, layers: int, heads: int, kv_heads: int, vocab: int, **others: Any) -> dict[str, Any]:
    """A `config.json` of the llama family; `others` replaces and adds keys."""
    return {
        "model_type": "llama",
        "hidden_size": d,
        "intermediate_size": ff,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **others,
    }


def _of(family: str, theta: float, positions: int, **others: Any) -> dict[str, Any]:
    """What differs in other families, whose norms all have the same epsilon but Mistral's."""
    same = {"rms_norm_eps": 1e-6, "rope_theta": theta, "max_position_embeddings": positions}
    return {"model_type": family, **same, **others}


def _stretched(factor: float) -> dict[str, Any]:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    return {"rope_theta": 5e5, "rope_scaling": scaling, "max_position_embeddings": 131072}


_TIED = {"tie_word_embeddings": True}
_SMOL = _TIED | {"rope_theta": 1e5, "max_position_embeddings": 8192}
_GEMMA = _TIED | {"head_dim": 256, "hidden_act": "gelu_pytorch_tanh"}
_QWEN3 = _of("qwen3", 1e6, 40960, head_dim=128)
SIZES: Mapping[str, Mapping[str, Any]] = {
    "llama2-7b": _sizes(4096, 11008, 32, 32, 32, 32000, rope_theta=1e4, max_position_embeddings=4096),
    "llama3.1-8b": _sizes(4096, 14336, 32, 32, 8, 128256, **_stretched(8.0)),
    "llama3.2-1b": _sizes(2048, 8192, 16, 32, 8, 128256, **_stretched(32.0), **_TIED),
    "llama3.2-3b": _sizes(3072, 8192, 28, 24, 8, 128256, **_stretched(32.0), **_TIED),
    "llama3-70b": _sizes(8192, 28672, 80, 64, 8, 128256, rope_theta=5e5, max_position_embeddings=8192),
    "mistral-7b": _sizes(
        4096, 14336, 32, 32, 8, 32768, **_of("mistral", 1e6, 32768, rms_norm_eps=1e-5, sliding_window=None)
    ),
    "qwen2.5-0.5b": _sizes(896, 4864, 24, 14, 2, 151936, **_of("qwen2", 1e6, 32768, **_TIED)),
    "qwen2.5-7b": _sizes(3584, 18944, 28, 28, 4, 152064, **_of("qwen2", 1e6, 32768)),
    "qwen3-0.6b": _sizes(1024, 3072, 28, 16, 8, 151936, **_QWEN3, **_TIED),
    "qwen3-8b": _sizes(4096, 12288, 36, 32, 8, 151936, **_QWEN3),
    "gemma-2b": _sizes(2048, 16384, 18, 8, 1, 256000, **_of("gemma", 1e4, 8192, **_GEMMA)),
    "gemma2-2b": _sizes(2304, 9216, 26, 8, 4, 256000, **_of("gemma2", 1e4, 8192, **_GEMMA)),
    "gemma3-1b": _sizes(1152, 6912, 26, 4, 1, 262144, **_of("gemma3_text", 1e6, 32768, **_GEMMA, sliding_window=512)),
    "smollm2-135m": _sizes(576, 1536, 30, 9, 3, 49152, **_SMOL),
    "smollm2-360m": _sizes(960, 2560, 32, 15, 5, 49152, **_SMOL),
    "smollm2-1.7b": _sizes(2048, 8192, 24, 32, 32, 49152, **_SMOL | {"rope_theta": 1.3e5}),
    "smollm3-3b": _sizes(2048, 11008, 36, 16, 4, 128256, **_of("smollm3", 5e6, 65536, **_TIED)),
    "tiny": _sizes(
        32, 64, 2, 4, 2, 258, **_SMOL | {"rope_theta": 1e4}
    ),  # the random one of smoke runs; bytes as tokens
}


def decoder_config(model: Mapping[str, Any]) -> DecoderConfig:
    """The sizes of what `config.model` names: of local weights, or from the table.

    Nothing is downloaded. Raises MoraError for weights that are not on this machine, whose sizes may be other than the
    name's, and for other names, listing the known ones.
    """
    name, path = model["name"], Path(model["weights"]).expanduser()
    if name in registry.MODELS and registry.MODELS[name].kind == "clip":
        raise MoraError(f"model.name={name!r} is a CLIP model; plans are made for language models only so far")
    if model["weights"] and path.suffix == ".gguf":
        return gguf.load_config(gguf.open_gguf(path))
    if model["weights"] and path.is_dir():
        return hf.load_config(path)
    if model["weights"]:
        raise MoraError(
            f"model.weights={model['weights']!r} is not here, and a plan downloads nothing; legal: a local folder with "
            f"{hf.CONFIG_FILE}, a .gguf file, or empty for the sizes of model.name={name!r}"
        )
    if name not in SIZES:
        if name == "custom":
            raise MoraError("model.name='custom' is planned from a local folder or .gguf file in model.weights")
        raise unknown("size of model", name, SIZES)
    return families.from_hf(SIZES[name], f"the sizes of {name}")
