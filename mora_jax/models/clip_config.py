"""The sizes and switches of a CLIP model (arXiv 2103.00020), the table of published ones, and their config files.

Two files are read and written: `config.json` of transformers' CLIPModel (defaults: configuration_clip.py) and
`open_clip_config.json` of the open_clip package (defaults: CLIPVisionCfg and CLIPTextCfg in its model.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mora_jax.data.images import OPENAI_MEAN, OPENAI_STD
from mora_jax.errors import MoraError, unknown
from mora_jax.models.decoder_config import read_integer, read_number

ACTIVATIONS = ("quick_gelu", "gelu")
LEGACY_EOS = 2  # what old config.json files say; the position of the largest id is meant
_NORM_EPS = 1e-5
_BICUBIC = 3  # of Pillow's resampling filters


@dataclass(frozen=True)
class EncoderConfig:
    """What both encoders have: widths in features (`d_model` of the residual stream, `d_ff` of the MLP) and depth."""

    d_model: int
    d_ff: int
    layers: int
    heads: int
    activation: str = "quick_gelu"
    norm_eps: float = _NORM_EPS

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise MoraError(f"{name} is {value}; it must be at least 1")
        if self.d_model % self.heads:
            raise MoraError(f"d_model {self.d_model} is not a multiple of heads {self.heads}")
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)
        if self.norm_eps <= 0:
            raise MoraError(f"norm_eps {self.norm_eps} must be above 0")


@dataclass(frozen=True)
class VisionConfig(EncoderConfig):
    """Pictures of `image_size` x `image_size` pixels in squares of `patch_size`, three channels (x/255 - mean)/std."""

    image_size: int = 224
    patch_size: int = 32
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise MoraError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise MoraError(f"mean {self.mean} and std {self.std} must be three numbers each, std above 0")

    @property
    def positions(self) -> int:
        """Patches, and one for the class token before them."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True)
class TextConfig(EncoderConfig):
    """Texts of at most `context` tokens; the embedding is taken at the first `eos_id` (see LEGACY_EOS)."""

    vocab_size: int = 49408
    context: int = 77
    eos_id: int = 49407


@dataclass(frozen=True)
class CLIPConfig:
    """Two encoders into one space of `d_embed` dimensions. An impossible value raises MoraError."""

    vision: VisionConfig
    text: TextConfig
    d_embed: int

    def __post_init__(self) -> None:
        if self.d_embed < 1:
            raise MoraError(f"d_embed is {self.d_embed}; it must be at least 1")


class Published(NamedTuple):
    """A published model: its id on the Hugging Face hub and its sizes."""

    hub_id: str
    config: CLIPConfig


def _base(patch_size: int, activation: str) -> CLIPConfig:
    vision = VisionConfig(768, 3072, 12, 12, activation, patch_size=patch_size)
    return CLIPConfig(vision, TextConfig(512, 2048, 12, 8, activation), 512)


def _large(activation: str, **pixels: tuple[float, ...]) -> CLIPConfig:
    vision = VisionConfig(1024, 4096, 24, 16, activation, patch_size=14, **pixels)
    return CLIPConfig(vision, TextConfig(768, 3072, 12, 12, activation), 768)


_HALF = (0.5, 0.5, 0.5)  # LAION's L/14 alone was trained so (open_clip, pretrained.py)
PUBLISHED: Mapping[str, Published] = {
    "clip-vit-b32": Published("openai/clip-vit-base-patch32", _base(32, "quick_gelu")),
    "clip-vit-b16": Published("openai/clip-vit-base-patch16", _base(16, "quick_gelu")),
    "clip-vit-l14": Published("openai/clip-vit-large-patch14", _large("quick_gelu")),
    "clip-vit-b32-laion2b": Published("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", _base(32, "gelu")),
    "clip-vit-b16-laion2b": Published("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", _base(16, "gelu")),
    "clip-vit-l14-laion2b": Published("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", _large("gelu", mean=_HALF, std=_HALF)),
}

# What transformers takes where a config.json is silent.
_HF_LAYERS = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": _NORM_EPS}
_HF_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    **_HF_LAYERS,
}
_HF_TEXT = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
    **_HF_LAYERS,
}


def from_hf(config: Mapping[str, Any], preprocessor: Mapping[str, Any], source: object) -> CLIPConfig:
    """The model of a `config.json` and its `preprocessor_config.json` ({} where a folder has none).

    `source` names the folder in errors. Raises MoraError for another model type, a missing key, an impossible value and
    a preprocessing that is not CLIP's.
    """
    if config.get("model_type") != "clip":
        raise MoraError(f"{source}: {unknown('model_type', config.get('model_type'), ('clip',))}")
    vision = _hf_part(config, "vision_config", _HF_VISION, source)
    text = _hf_part(config, "text_config", _HF_TEXT, source)
    if vision["num_channels"] != 3:
        raise MoraError(f"{source}: vision_config.num_channels is {vision['num_channels']!r}; only 3 is supported")
    image_size = read_integer(vision, "image_size", source)
    pixels = _pixels(preprocessor, image_size, ("image_mean", "image_std"), source)
    try:
        return CLIPConfig(
            VisionConfig(
                *_hf_encoder(vision, source),
                image_size=image_size,
                patch_size=read_integer(vision, "patch_size", source),
                **pixels,
            ),
            TextConfig(
                *_hf_encoder(text, source),
                vocab_size=read_integer(text, "vocab_size", source),
                context=read_integer(text, "max_position_embeddings", source),
                eos_id=read_integer(text, "eos_token_id", source),
            ),
            read_integer(config, "projection_dim", source, 512),
        )
    except MoraError as error:
        raise _at(source, error) from None


def _at(source: object, error: MoraError) -> MoraError:
    text = str(error)
    return error if text.startswith(str(source)) else MoraError(f"{source}: {text}")


def _hf_part(config: Mapping[str, Any], key: str, defaults: Mapping[str, Any], source: object) -> dict[str, Any]:
    """One encoder's keys. Older files repeat some under `<key>_dict`, which wins, its silence included."""
    parts = [config.get(name) or {} for name in (key, f"{key}_dict")]
    if not all(isinstance(part, Mapping) for part in parts):
        raise MoraError(f"{source}: {key} must be an object")
    content, old = parts
    return {**defaults, **content, **defaults, **old} if old else {**defaults, **content}


def _hf_encoder(part: Mapping[str, Any], source: object) -> tuple[Any, ...]:
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = (read_integer(part, key, source) for key in keys)
    return (*sizes, part["hidden_act"], read_number(part, "layer_norm_eps", source))


def _pixels(
    preprocessor: Mapping[str, Any], image_size: int, names: tuple[str, str], source: object
) -> dict[str, tuple[float, ...]]:
    """mean and std, where a file has them under `names`; CLIP's own where it has none."""
    for key in ("size", "crop_size"):
        side = preprocessor.get(key, image_size)
        sides = side.values() if isinstance(side, Mapping) else side if isinstance(side, list) else [side]
        if any(value != image_size for value in sides):
            raise MoraError(
                f"{source}: pictures are brought to {side} ({key}), but the model takes {image_size} pixels"
            )
    if isinstance(preprocessor.get("size"), Mapping) and list(preprocessor["size"]) != ["shortest_edge"]:
        raise MoraError(f"{source}: size is {preprocessor['size']}; only the shortest_edge can be resized")
    if preprocessor.get("resample", _BICUBIC) != _BICUBIC:
        raise MoraError(f"{source}: resample is {preprocessor['resample']!r}; only {_BICUBIC}, bicubic, is supported")
    found = {}
    for field, name in zip(("mean", "std"), names, strict=True):
        value = preprocessor.get(name)
        if value is None:
            continue
        if not isinstance(value, list) or not all(type(number) in (int, float) for number in value):
            raise MoraError(f"{source}: key {name} is {value!r}; it must be three numbers")
        found[field] = tuple(float(number) for number in value)
    return found


def to_hf(config: CLIPConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json, preprocessor_config.json) of this model for transformers."""
    vision, text = config.vision, config.text

    def encoder(part: EncoderConfig, model_type: str) -> dict[str, Any]:
        return {
            "model_type": model_type,
            "hidden_size": part.d_model,
            "intermediate_size": part.d_ff,
            "num_hidden_layers": part.layers,
            "num_attention_heads": part.heads,
            "hidden_act": part.activation,
            "layer_norm_eps": part.norm_eps,
            "projection_dim": config.d_embed,
        }

    content = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.d_embed,
        "vision_config": encoder(vision, "clip_vision_model")
        | {"image_size": vision.image_size, "patch_size": vision.patch_size, "num_channels": 3},
        "text_config": encoder(text, "clip_text_model")
        | {
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context,
            "eos_token_id": text.eos_id,
            "bos_token_id": None if text.eos_id == LEGACY_EOS else text.eos_id - 1,
            "pad_token_id": None,
        },
    }
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": vision.image_size},
        "crop_size": {"height": vision.image_size, "width": vision.image_size},
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
        "resample": _BICUBIC,
    } | dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True)
    return content, preprocessor


_OPEN_CLIP_VISION = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16}
_OPEN_CLIP_TEXT = {"layers": 12, "width": 512, "heads": 8, "mlp_ratio": 4.0, "vocab_size": 49408, "context_length": 77}
# Keys that do not change what this model computes from its published weights.
_OPEN_CLIP_HARMLESS = {"patch_dropout", "output_tokens", "hf_tokenizer_name", "tokenizer_kwargs", "pad_id"}


def from_open_clip(content: Mapping[str, Any], source: object) -> CLIPConfig:
    """The model of an `open_clip_config.json`; its text embedding is that at the largest id, the end-of-text token.

    Raises MoraError for every switch that this model lacks (other towers, layer scale, pooling), named.
    """
    model, preprocess = content.get("model_cfg"), content.get("preprocess_cfg") or {}
    if not isinstance(model, Mapping) or not isinstance(preprocess, Mapping):
        raise MoraError(f"{source}: no object 'model_cfg'; an open_clip_config.json has it")
    _refuse(model, {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}, "model_cfg", source)
    vision = _open_clip_part(model, "vision_cfg", {**_OPEN_CLIP_VISION, "image_size": 224}, source)
    text = _open_clip_part(model, "text_cfg", _OPEN_CLIP_TEXT, source)
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    width, image_size = read_integer(vision, "width", source), read_integer(vision, "image_size", source)
    heads = width // max(read_integer(vision, "head_width", source), 1)
    if (
        preprocess.get("interpolation", "bicubic") != "bicubic"
        or preprocess.get("resize_mode", "shortest") != "shortest"
    ):
        raise MoraError(f"{source}: preprocess_cfg must resize the shorter side, bicubic")
    pixels = _pixels(preprocess, image_size, ("mean", "std"), source)
    try:
        return CLIPConfig(
            VisionConfig(
                *_open_clip_encoder(vision, heads, activation, source),
                image_size=image_size,
                patch_size=read_integer(vision, "patch_size", source),
                **pixels,
            ),
            TextConfig(
                *_open_clip_encoder(text, read_integer(text, "heads", source), activation, source),
                vocab_size=read_integer(text, "vocab_size", source),
                context=read_integer(text, "context_length", source),
                eos_id=read_integer(text, "vocab_size", source) - 1,
            ),
            read_integer(model, "embed_dim", source),
        )
    except MoraError as error:
        raise _at(source, error) from None


def _open_clip_part(model: Mapping[str, Any], key: str, defaults: Mapping[str, Any], source: object) -> dict[str, Any]:
    part = model.get(key)
    if not isinstance(part, Mapping):
        raise MoraError(f"{source}: no object {key!r} in 'model_cfg'")
    _refuse(part, {*defaults, *_OPEN_CLIP_HARMLESS}, key, source)
    return {**defaults, **part}


def _refuse(part: Mapping[str, Any], known: set[str], where: str, source: object) -> None:
    # A key that is null or false is switched off.
    for key, value in part.items():
        if key not in known and value not in (None, False):
            raise MoraError(f"{source}: {where}.{key}={value!r} is not supported; known: {', '.join(sorted(known))}")


def _open_clip_encoder(part: Mapping[str, Any], heads: int, activation: str, source: object) -> tuple[Any, ...]:
    width = read_integer(part, "width", source)
    return (
        width,
        int(width * read_number(part, "mlp_ratio", source)),
        read_integer(part, "layers", source),
        heads,
        activation,
    )


def to_open_clip(config: CLIPConfig) -> dict[str, Any]:
    """The content of `open_clip_config.json`; raises MoraError for a model that open_clip's keys cannot say."""
    vision, text = config.vision, config.text
    model = {
        "embed_dim": config.d_embed,
        "quick_gelu": vision.activation == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.layers,
            "width": vision.d_model,
            "head_width": vision.d_model // vision.heads,
            "mlp_ratio": vision.d_ff / vision.d_model,
            "patch_size": vision.patch_size,
        },
        "text_cfg": {
            "context_length": text.context,
            "vocab_size": text.vocab_size,
            "width": text.d_model,
            "heads": text.heads,
            "layers": text.layers,
            "mlp_ratio": text.d_ff / text.d_model,
        },
    }
    pixels = {"mean": list(vision.mean), "std": list(vision.std)}
    preprocess = {"interpolation": "bicubic", "resize_mode": "shortest", **pixels}
    content = {"model_cfg": model, "preprocess_cfg": preprocess}
    if from_open_clip(content, "open_clip_config.json") != config:
        raise MoraError(
            f"open_clip_config.json cannot say norm_eps other than {_NORM_EPS}, two activations, an MLP of "
            f"{vision.d_ff} and {text.d_ff} features or eos_id {text.eos_id} in one of these encoders"
        )
    return content
