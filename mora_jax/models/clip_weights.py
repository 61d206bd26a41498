"""Folders of CLIP weights to and from our parameters, in the layouts of transformers and of open_clip.

The key tables say which stored tensor holds which parameters; reading, checking and writing are those of `keytable` and
`hf`. open_clip, like OpenAI, stores q, k and v as one tensor, which is split on reading and joined on writing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from mora_jax.errors import MoraError
from mora_jax.models import clip_config, hf
from mora_jax.models.clip import CLIP
from mora_jax.models.clip_config import CLIPConfig
from mora_jax.models.keytable import check_shapes
from mora_jax.models.unread import Entry, Params, load, unread

Layout = Literal["hf", "open_clip"]
PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"  # where transformers 5 keeps the same, beside a tokenizer
OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
# What some files hold beside the weights: index buffers, the causal mask, and sizes that OpenAI stored as tensors.
_IGNORED = ("position_ids", "attn_mask", "input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True)
class Row:
    """One kind of stored tensor: its name with {layer} left open, the parameters in it, and how it becomes ours."""

    name: str
    parts: tuple[str, ...]
    transform: Literal["transpose", "none"] = "none"


def _dense(name: str, *modules: str) -> tuple[Row, ...]:
    kernel = Row(f"{name}weight", tuple(f"{module}/kernel" for module in modules), "transpose")
    return kernel, Row(f"{name}bias", tuple(f"{module}/bias" for module in modules))


def _norm(name: str, module: str) -> tuple[Row, ...]:
    return Row(f"{name}.weight", (f"{module}/scale",)), Row(f"{name}.bias", (f"{module}/bias",))


def _hf_layers(name: str, ours: str) -> tuple[Row, ...]:
    layer, ours = f"{name}.encoder.layers.{{layer}}.", f"{ours}/layers/"
    attention = [_dense(f"{layer}self_attn.{q}_proj.", f"{ours}attn/{q}") for q in "qkv"]
    return (
        *_norm(f"{layer}layer_norm1", f"{ours}attn_norm"),
        *(row for rows in attention for row in rows),
        *_dense(f"{layer}self_attn.out_proj.", f"{ours}attn/o"),
        *_norm(f"{layer}layer_norm2", f"{ours}mlp_norm"),
        *_dense(f"{layer}mlp.fc1.", f"{ours}mlp/up"),
        *_dense(f"{layer}mlp.fc2.", f"{ours}mlp/down"),
    )


def _open_clip_layers(name: str, ours: str) -> tuple[Row, ...]:
    layer, ours = f"{name}.resblocks.{{layer}}.", f"{ours}/layers/"
    return (
        *_norm(f"{layer}ln_1", f"{ours}attn_norm"),
        *_dense(f"{layer}attn.in_proj_", *(f"{ours}attn/{q}" for q in "qkv")),
        *_dense(f"{layer}attn.out_proj.", f"{ours}attn/o"),
        *_norm(f"{layer}ln_2", f"{ours}mlp_norm"),
        *_dense(f"{layer}mlp.c_fc.", f"{ours}mlp/up"),
        *_dense(f"{layer}mlp.c_proj.", f"{ours}mlp/down"),
    )


_V, _T = "vision_model", "text_model"
TABLES: Mapping[Layout, tuple[Row, ...]] = {
    "hf": (
        Row("logit_scale", ("logit_scale",)),
        Row(f"{_V}.embeddings.class_embedding", ("vision/class_embedding",)),
        Row(f"{_V}.embeddings.patch_embedding.weight", ("vision/patches/kernel",), "transpose"),
        Row(f"{_V}.embeddings.position_embedding.weight", ("vision/positions",)),
        *_norm(f"{_V}.pre_layrnorm", "vision/pre_norm"),  # the name is spelt so
        *_hf_layers(_V, "vision"),
        *_norm(f"{_V}.post_layernorm", "vision/post_norm"),
        Row("visual_projection.weight", ("vision/projection/kernel",), "transpose"),
        Row(f"{_T}.embeddings.token_embedding.weight", ("text/embed/embedding",)),
        Row(f"{_T}.embeddings.position_embedding.weight", ("text/positions",)),
        *_hf_layers(_T, "text"),
        *_norm(f"{_T}.final_layer_norm", "text/final_norm"),
        Row("text_projection.weight", ("text/projection/kernel",), "transpose"),
    ),
    "open_clip": (
        Row("logit_scale", ("logit_scale",)),
        Row("visual.class_embedding", ("vision/class_embedding",)),
        Row("visual.conv1.weight", ("vision/patches/kernel",), "transpose"),
        Row("visual.positional_embedding", ("vision/positions",)),
        *_norm("visual.ln_pre", "vision/pre_norm"),
        *_open_clip_layers("visual.transformer", "vision"),
        *_norm("visual.ln_post", "vision/post_norm"),
        Row("visual.proj", ("vision/projection/kernel",)),
        Row("token_embedding.weight", ("text/embed/embedding",)),
        Row("positional_embedding", ("text/positions",)),
        *_open_clip_layers("transformer", "text"),
        *_norm("ln_final", "text/final_norm"),
        Row("text_projection", ("text/projection/kernel",)),
    ),
}


@cache
def param_shapes(config: CLIPConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of this model by its path, layers stacked."""
    pixels = jnp.zeros((1, config.vision.image_size, config.vision.image_size, 3), jnp.uint8)
    tree = jax.eval_shape(CLIP(config).init, jax.random.key(0), pixels, jnp.zeros((1, 1), jnp.int32))["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def entries(config: CLIPConfig, layout: Layout) -> Iterator[Entry]:
    """Every tensor that a file of this layout holds, layer by layer within a row."""
    shapes = param_shapes(config)
    for row in TABLES[layout]:
        encoder, _, rest = row.parts[0].partition("/")
        stacked = rest.startswith("layers/")
        shape = shapes[row.parts[0]][int(stacked) :]
        if row.parts == ("vision/patches/kernel",):  # the kernel of a convolution in both layouts
            side = config.vision.patch_size
            shape = (config.vision.d_model, 3, side, side)
        elif row.transform == "transpose":
            shape = shape[::-1]
        if len(row.parts) > 1:
            shape = (len(row.parts) * shape[0], *shape[1:])
        for layer in range(getattr(config, encoder).layers) if stacked else (None,):
            yield Entry(row, layer, row.name.format(layer=layer), shape)


def layout_of(folder: Path) -> Layout:
    """How a folder stores CLIP: for transformers, or else for open_clip; raises MoraError where it does neither."""
    folder = Path(folder)
    if (folder / hf.CONFIG_FILE).exists() and any((folder / f).exists() for f in (hf.WEIGHTS_FILE, hf.INDEX_FILE)):
        return "hf"
    if (folder / OPEN_CLIP_CONFIG).exists() and (folder / OPEN_CLIP_WEIGHTS).exists():
        return "open_clip"
    if (folder / hf.CONFIG_FILE).exists():
        hf.weight_files(folder)  # says which weights are missing, or why those there are not read
    raise MoraError(
        f"{folder}: no CLIP model; known: {hf.CONFIG_FILE} with {hf.WEIGHTS_FILE}, {OPEN_CLIP_CONFIG} with "
        f"{OPEN_CLIP_WEIGHTS}"
    )


def load_config(folder: Path) -> CLIPConfig:
    """The sizes that a folder states, preprocessing included; raises MoraError for broken files and other models."""
    folder = Path(folder)
    if layout_of(folder) == "open_clip":
        path = folder / OPEN_CLIP_CONFIG
        return clip_config.from_open_clip(hf.read_json(path), path)
    preprocessor, processor = folder / PREPROCESSOR_FILE, folder / PROCESSOR_FILE
    stated = hf.read_json(preprocessor) if preprocessor.exists() else {}
    if not stated and processor.exists():
        stated = hf.read_json(processor).get("image_processor") or {}
    return clip_config.from_hf(hf.read_json(folder / hf.CONFIG_FILE), stated, folder / hf.CONFIG_FILE)


def load_params(folder: Path, config: CLIPConfig, dtype: Any) -> Params:
    """All weights of a folder as numpy arrays; see `open_params`."""
    return load(open_params(folder, config, dtype))


def open_params(folder: Path, config: CLIPConfig, dtype: Any) -> Params:
    """The weights of a folder as `Unread` parameters of `dtype`.

    Raises MoraError for a broken file and for a missing, unexpected, wrongly shaped or non-float tensor, named: a model
    of another size is refused so.
    """
    folder = Path(folder)
    layout = layout_of(folder)
    shapes, read = hf.open_tensors(hf.weight_files(folder) if layout == "hf" else [folder / OPEN_CLIP_WEIGHTS])
    wanted = list(entries(config, layout))
    vision = config.vision
    model = f"a CLIP with {vision.layers} + {config.text.layers} layers and patches of {vision.patch_size} pixels"
    check_shapes(wanted, shapes, folder, model, lambda name: name.rpartition(".")[2] in _IGNORED)
    return unread(wanted, param_shapes(config), dtype, read)


def save_params(params: Params, config: CLIPConfig, folder: Path, layout: Layout = "hf") -> None:
    """Write a folder that transformers' CLIPModel loads, or open_clip.

    `params` are numpy or JAX arrays; the file keeps their dtypes. Raises MoraError for a parameter that is missing,
    unknown, of a wrong shape or not of a float dtype, and for a config that the layout cannot say.
    """
    folder = Path(folder)
    flat = flatten_dict(params, sep="/")
    hf.check_params(flat, param_shapes(config))
    if layout == "hf":
        content, preprocessor = clip_config.to_hf(config)
        content["dtype"] = flat["text/embed/embedding"].dtype.name
        files = {hf.CONFIG_FILE: content, PREPROCESSOR_FILE: preprocessor}
    else:
        files = {OPEN_CLIP_CONFIG: clip_config.to_open_clip(config)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    hf.write_safetensors(
        folder / (hf.WEIGHTS_FILE if layout == "hf" else OPEN_CLIP_WEIGHTS), flat, entries(config, layout)
    )
