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


def _llama(d: int, ff: int, layers: int, heads: int, kv_heads: int, vocab: int, **others: Any) -> dict[str, Any]:
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


def _stretched(factor: float) -> dict[str, Any]:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    return {"rope_theta": 5e5, "rope_scaling": scaling, "max_position_embeddings": 131072}


_SMOL = {"tie_word_embeddings": True, "rope_theta": 1e5, "max_position_embeddings": 8192}
SIZES: Mapping[str, Mapping[str, Any]] = {
    "llama2-7b": _llama(4096, 11008, 32, 32, 32, 32000, rope_theta=1e4, max_position_embeddings=4096),
    "llama3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256, **_stretched(8.0)),
    "llama3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, **_stretched(32.0), tie_word_embeddings=True),
    "llama3-70b": _llama(8192, 28672, 80, 64, 8, 128256, rope_theta=5e5, max_position_embeddings=8192),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, **_SMOL),
    "smollm2-360m": _llama(960, 2560, 32, 15, 5, 49152, **_SMOL),
    "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, 49152, **_SMOL | {"rope_theta": 1.3e5}),
    "tiny": _llama(
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
