"""Folders of CLIP weights in both layouts: round trips, published sizes, config files, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from tiny_clip import TINY, random_params, variant

from mora_jax.errors import MoraError
from mora_jax.models import clip_weights
from mora_jax.models.clip_config import LEGACY_EOS, PUBLISHED, from_hf


def assert_trees_equal(ours: Any, theirs: Any) -> None:
    ours, theirs = flatten_dict(ours, sep="/"), flatten_dict(theirs, sep="/")
    assert ours.keys() == theirs.keys()
    for path in ours:
        assert ours[path].dtype == theirs[path].dtype
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


@pytest.mark.parametrize("layout", clip_weights.TABLES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_keeps_every_bit_and_the_config(layout: clip_weights.Layout, dtype: str, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, mean=(0.1, 0.2, 0.3)))
    params = random_params(config, jnp.dtype(dtype))
    clip_weights.save_params(params, config, tmp_path / "new" / "folder", layout)
    assert clip_weights.layout_of(tmp_path / "new" / "folder") == layout
    assert clip_weights.load_config(tmp_path / "new" / "folder") == config
    assert_trees_equal(clip_weights.load_params(tmp_path / "new" / "folder", config, jnp.dtype(dtype)), params)


def test_the_fused_layout_spelt_out_by_hand(tmp_path: Path) -> None:
    """open_clip's names and shapes, independent of the key table."""
    params = random_params(TINY)
    clip_weights.save_params(params, TINY, tmp_path, "open_clip")
    tensors = safetensors.numpy.load_file(tmp_path / clip_weights.OPEN_CLIP_WEIGHTS)
    vision, text = params["vision"], params["text"]
    kernel = vision["patches"]["kernel"].reshape(3, 4, 4, 24).transpose(3, 0, 1, 2)
    expected = {
        "logit_scale": params["logit_scale"],
        "positional_embedding": text["positions"],
        "text_projection": text["projection"]["kernel"],
        "token_embedding.weight": text["embed"]["embedding"],
        "ln_final.weight": text["final_norm"]["scale"],
        "ln_final.bias": text["final_norm"]["bias"],
        "visual.class_embedding": vision["class_embedding"],
        "visual.positional_embedding": vision["positions"],
        "visual.proj": vision["projection"]["kernel"],
        "visual.conv1.weight": kernel,
    }
    for name in ("pre", "post"):
        expected[f"visual.ln_{name}.weight"] = vision[f"{name}_norm"]["scale"]
        expected[f"visual.ln_{name}.bias"] = vision[f"{name}_norm"]["bias"]
    for prefix, encoder in (("visual.", vision), ("", text)):
        stack = encoder["layers"]
        for layer in range(len(stack["attn"]["q"]["bias"])):
            block = f"{prefix}transformer.resblocks.{layer}."
            fused = [stack["attn"][name] for name in "qkv"]
            expected[f"{block}attn.in_proj_weight"] = np.concatenate([part["kernel"][layer].T for part in fused])
            expected[f"{block}attn.in_proj_bias"] = np.concatenate([part["bias"][layer] for part in fused])
            norms = {"ln_1": "attn_norm", "ln_2": "mlp_norm"}
            for theirs, ours in norms.items():
                expected[f"{block}{theirs}.weight"] = stack[ours]["scale"][layer]
                expected[f"{block}{theirs}.bias"] = stack[ours]["bias"][layer]
            dense = {"attn.out_proj": ("attn", "o"), "mlp.c_fc": ("mlp", "up"), "mlp.c_proj": ("mlp", "down")}
            for theirs, (half, ours) in dense.items():
                expected[f"{block}{theirs}.weight"] = stack[half][ours]["kernel"][layer].T
                expected[f"{block}{theirs}.bias"] = stack[half][ours]["bias"][layer]
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)


def test_both_layouts_give_the_same_model(tmp_path: Path) -> None:
    """A folder of transformers, saved fused, read again: what a user has who converts between the two."""
    params = random_params(TINY)
    for layout in clip_weights.TABLES:
        clip_weights.save_params(params, TINY, tmp_path / layout, layout)
    loaded = [clip_weights.load_params(tmp_path / layout, TINY, np.float32) for layout in clip_weights.TABLES]
    assert_trees_equal(*loaded)


def test_the_key_tables_hold_every_parameter_once() -> None:
    for table in clip_weights.TABLES.values():
        parts = [part for row in table for part in row.parts]
        assert sorted(parts) == sorted(clip_weights.param_shapes(TINY))


@pytest.mark.parametrize("layout", clip_weights.TABLES)
def test_published_sizes(layout: clip_weights.Layout) -> None:
    """Parameters of the released models, counted by others (open_clip's model_profile.csv)."""
    millions = {"clip-vit-b32": 151.28, "clip-vit-b16": 149.62, "clip-vit-l14": 427.62}
    for name, model in PUBLISHED.items():
        total = sum(np.prod(entry.stored_shape) for entry in clip_weights.entries(model.config, layout))
        assert round(total / 1e6, 2) == millions[name.removesuffix("-laion2b")]
        activation = "gelu" if model.hub_id.startswith("laion/") else "quick_gelu"
        assert {model.config.vision.activation, model.config.text.activation} == {activation}


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", clip_weights.TABLES)
def test_another_size_is_refused_by_the_name_of_a_tensor(layout: clip_weights.Layout, tmp_path: Path) -> None:
    clip_weights.save_params(random_params(TINY), TINY, tmp_path, layout)
    patches = {"hf": "vision_model.embeddings.patch_embedding.weight", "open_clip": "visual.conv1.weight"}[layout]
    other = dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, patch_size=6))
    with pytest.raises(MoraError, match=rf"tensor '{patches}' has shape \[24, 3, 4, 4\], the config says \[24, 3, 6"):
        clip_weights.load_params(tmp_path, other, np.float32)
    deeper = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, layers=3))
    name = {"hf": r"text_model.encoder.layers.2.layer_norm1", "open_clip": r"transformer.resblocks.2.ln_1"}[layout]
    with pytest.raises(MoraError, match=f"missing tensor '{name}.weight'"):
        clip_weights.load_params(tmp_path, deeper, np.float32)
    flatter = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, layers=1))
    with pytest.raises(MoraError, match=r"unexpected tensor '.*1.*; a CLIP with 3 \+ 1 layers and patches of 4 pixels"):
        clip_weights.load_params(tmp_path, flatter, np.float32)


def test_buffers_beside_the_weights_are_skipped(tmp_path: Path) -> None:
    clip_weights.save_params(random_params(TINY), TINY, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = np.arange(9)[None]
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert_trees_equal(clip_weights.load_params(tmp_path, TINY, np.float32), random_params(TINY))


def test_fused_parts_must_share_their_dtype(tmp_path: Path) -> None:
    params = jax.tree.map(np.copy, random_params(TINY))
    params["vision"]["layers"]["attn"]["k"]["bias"] = params["vision"]["layers"]["attn"]["k"]["bias"].astype(np.float16)
    with pytest.raises(MoraError, match=r"vision/layers/attn/v/bias are one tensor .* differ in dtype"):
        clip_weights.save_params(params, TINY, tmp_path, "open_clip")
    clip_weights.save_params(params, TINY, tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MoraError, match=r"no CLIP model; known: config\.json with model\.safetensors, open_clip"):
        clip_weights.load_config(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(MoraError, match="only pickled weights"):
        clip_weights.load_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip"}, "unknown model_type 'siglip'; known: clip"),
        ({"vision_config": {"num_channels": 4}}, "num_channels is 4; only 3"),
        ({"vision_config": {"image_size": 30, "patch_size": 4}}, "image_size 30 is not a multiple of patch_size 4"),
        ({"vision_config": {"hidden_act": "relu"}}, "unknown activation 'relu'; known: gelu, quick_gelu"),
        ({"text_config": {"hidden_size": "16"}}, "key hidden_size is '16'; it must be one integer"),
        ({"text_config": {"num_attention_heads": 7}}, "d_model 512 is not a multiple of heads 7"),
        ({"text_config": {"num_hidden_layers": 0}}, "layers is 0; it must be at least 1"),
        ({"text_config": []}, None),
        ({"text_config": [1]}, "text_config must be an object"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], message: str | None) -> None:
    content = {"model_type": "clip"} | change
    if message is None:
        assert from_hf(content, {}, "config.json") == PUBLISHED["clip-vit-b32"].config
        return
    with pytest.raises(MoraError, match=f"config.json: .*{message}"):
        from_hf(content, {}, "config.json")


@pytest.mark.parametrize(
    ("preprocessor", "message"),
    [
        ({"crop_size": 336}, "brought to 336 .crop_size., but the model takes 224"),
        ({"crop_size": {"height": 224, "width": 200}}, "brought to .*200"),
        ({"size": {"shortest_edge": 256}, "crop_size": 224}, "brought to .*256"),
        ({"size": {"height": 224, "width": 224}}, "only the shortest_edge can be resized"),
        ({"resample": 2}, "resample is 2; only 3"),
        ({"image_mean": [0.5, 0.5]}, r"must be three numbers each"),
        ({"image_std": [0.5, 0.5, 0]}, r"std above 0"),
        ({"image_std": "x"}, r"key image_std is 'x'"),
    ],
)
def test_preprocessing_that_is_refused(preprocessor: dict[str, Any], message: str) -> None:
    with pytest.raises(MoraError, match=f"config.json: .*{message}"):
        from_hf({"model_type": "clip"}, preprocessor, "config.json")


def test_the_keys_of_old_files_are_read() -> None:
    """transformers 4 repeated some keys under *_config_dict, which win; crop_size was a number, the EOS id 2."""
    old = {
        "model_type": "clip",
        "projection_dim": 512,
        "text_config": {"hidden_act": "quick_gelu", "eos_token_id": 2, "num_hidden_layers": 3},
        "text_config_dict": {"hidden_act": "gelu"},
        "vision_config": {"patch_size": 16},
        "vision_config_dict": None,
    }
    config = from_hf(old, {"crop_size": 224, "size": 224, "image_mean": [0.5, 0.5, 0.5]}, "old")
    assert (config.text.activation, config.text.eos_id, config.text.layers) == ("gelu", 49407, 12)
    assert (config.vision.patch_size, config.vision.mean) == (16, (0.5, 0.5, 0.5))
    assert from_hf(old | {"text_config_dict": None}, {}, "old").text.eos_id == LEGACY_EOS


def test_the_processor_file_of_transformers_5_is_read(tmp_path: Path) -> None:
    clip_weights.save_params(random_params(TINY), TINY, tmp_path)
    stated = (tmp_path / clip_weights.PREPROCESSOR_FILE).read_text(encoding="utf-8")
    (tmp_path / clip_weights.PREPROCESSOR_FILE).unlink()
    content = {"image_processor": json.loads(stated) | {"image_mean": [0.1, 0.2, 0.3]}}
    (tmp_path / clip_weights.PROCESSOR_FILE).write_text(json.dumps(content), encoding="utf-8")
    assert clip_weights.load_config(tmp_path).vision.mean == (0.1, 0.2, 0.3)


OPEN_CLIP = {"embed_dim": 10, "vision_cfg": {"patch_size": 32}, "text_cfg": {"heads": 8}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no object 'model_cfg'"),
        ({"model_cfg": {**OPEN_CLIP, "custom_text": True}}, "model_cfg.custom_text=True is not supported"),
        ({"model_cfg": OPEN_CLIP | {"vision_cfg": {"timm_model_name": "vit"}}}, "vision_cfg.timm_model_name='vit'"),
        ({"model_cfg": OPEN_CLIP | {"text_cfg": {"hf_model_name": "roberta"}}}, "text_cfg.hf_model_name='roberta'"),
        ({"model_cfg": OPEN_CLIP | {"text_cfg": None}}, "no object 'text_cfg'"),
        ({"model_cfg": OPEN_CLIP, "preprocess_cfg": {"interpolation": "bilinear"}}, "bicubic"),
        ({"model_cfg": OPEN_CLIP, "preprocess_cfg": {"mean": [0.5]}}, "must be three numbers each"),
    ],
)
def test_open_clip_configs_that_are_refused(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / clip_weights.OPEN_CLIP_CONFIG).write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / clip_weights.OPEN_CLIP_WEIGHTS).write_bytes(b"")
    with pytest.raises(MoraError, match=f"open_clip_config.json: .*{message}"):
        clip_weights.load_config(tmp_path)


def test_what_open_clip_cannot_say_is_not_written(tmp_path: Path) -> None:
    config = variant("both_activations")
    with pytest.raises(MoraError, match=r"cannot say .* two activations"):
        clip_weights.save_params(random_params(config), config, tmp_path / "out", "open_clip")
    assert not (tmp_path / "out").exists()
