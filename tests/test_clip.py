"""CLIP against transformers and the layout of open_clip, with tiny random models: logits, round trips, adapters."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from parity import TOLERANCE, randomise, transformers_or_skip

from mora_jax.data.images import normalise
from mora_jax.errors import MoraError
from mora_jax.methods import bank as banks
from mora_jax.methods.method import Method, from_config
from mora_jax.methods.presets import PRESETS, preset
from mora_jax.models import clip_weights
from mora_jax.models.clip import CLIP, end_of_text, site_kinds
from mora_jax.models.clip_config import LEGACY_EOS, PUBLISHED, CLIPConfig, TextConfig, VisionConfig, from_hf, to_hf
from mora_jax.models.decoder import REMAT

TINY = CLIPConfig(
    VisionConfig(24, 40, 3, 4, image_size=12, patch_size=4),
    TextConfig(16, 36, 2, 2, vocab_size=61, context=9, eos_id=60),
    10,
)
# name -> (vision, text) fields that differ from TINY
VARIANTS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "quick_gelu": ({}, {}),
    "gelu": ({"activation": "gelu"}, {"activation": "gelu"}),
    "both_activations": ({"activation": "gelu"}, {}),
    "legacy_eos": ({}, {"eos_id": LEGACY_EOS}),
    "eos_in_the_middle": ({}, {"eos_id": 30}),
    "large_patches": ({"image_size": 14, "patch_size": 7, "norm_eps": 1e-3}, {"norm_eps": 1e-2}),
    "other_pixels": ({"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.2, 0.1)}, {}),
}


def variant(name: str) -> CLIPConfig:
    vision, text = VARIANTS[name]
    return CLIPConfig(dataclasses.replace(TINY.vision, **vision), dataclasses.replace(TINY.text, **text), TINY.d_embed)


def inputs(config: CLIPConfig, images: int = 3, texts: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Random pictures, and texts that end at another place each, with ids after the end."""
    rng = np.random.default_rng(1)
    side, text = config.vision.image_size, config.text
    pictures = rng.integers(0, 256, (images, side, side, 3)).astype(np.uint8)
    legacy = text.eos_id == LEGACY_EOS
    eos = text.vocab_size - 1 if legacy else text.eos_id
    tokens = rng.integers(3, text.vocab_size - 1, (texts, text.context))
    tokens = np.where(tokens == eos, 3, tokens)
    for row, end in enumerate(rng.integers(1, text.context, texts)):
        tokens[row, end] = eos
    return pictures, tokens.astype(np.int32)


# Unoptimised code compiles twice as fast.
fast = partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


@partial(fast, static_argnums=0)
def forward(clip: CLIP, params: Any, pictures: Any, tokens: Any) -> jax.Array:
    return clip.apply({"params": params}, pictures, tokens)


def their_logits(torch: Any, model: Any, config: CLIPConfig, pictures: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    pixels = normalise(pictures, config.vision.mean, config.vision.std).transpose(0, 3, 1, 2)
    with torch.no_grad():
        out = model(input_ids=torch.tensor(tokens.astype(np.int64)), pixel_values=torch.tensor(pixels))
    return out.logits_per_image.numpy()


def random_clip(torch: Any, transformers: Any, config: CLIPConfig, scale: float = 0.3) -> Any:
    """A random CLIPModel of transformers with temperature that makes logits large enough to compare."""
    torch.manual_seed(0)
    content, _ = to_hf(config)
    model = randomise(torch, transformers.CLIPModel(transformers.CLIPConfig(**content)), scale)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One variant: the torch model, and the folder that transformers saved."""
    torch, transformers = transformers_or_skip()
    config = variant(request.param)
    model, folder = random_clip(torch, transformers, config), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    pixels = {"image_mean": list(config.vision.mean), "image_std": list(config.vision.std)}
    (folder / clip_weights.PREPROCESSOR_FILE).write_text(json.dumps(pixels), encoding="utf-8")
    return SimpleNamespace(torch=torch, transformers=transformers, model=model, folder=folder, config=config)


def test_logits_equal_transformers(pair: SimpleNamespace) -> None:
    config = clip_weights.load_config(pair.folder)
    assert config == pair.config
    pictures, tokens = inputs(config)
    theirs = their_logits(pair.torch, pair.model, config, pictures, tokens)
    assert theirs.std() > 0.3  # else nothing is compared
    ours = forward(CLIP(config), clip_weights.load_params(pair.folder, config, np.float32), pictures, tokens)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


def test_what_we_save_loads_in_transformers(pair: SimpleNamespace, tmp_path: Path) -> None:
    params = clip_weights.load_params(pair.folder, pair.config, np.float32)
    clip_weights.save_params(jax.tree.map(jnp.asarray, params), pair.config, tmp_path)
    assert clip_weights.load_config(tmp_path) == pair.config
    again, report = pair.transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    batch = inputs(pair.config)
    theirs, ours = (their_logits(pair.torch, model, pair.config, *batch) for model in (pair.model, again.eval()))
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
def test_logits_of_a_full_size_vit_b16_equal_transformers(tmp_path: Path) -> None:
    """150 million random weights; the initialisation of transformers, for 12 layers of larger ones saturate."""
    torch, transformers = transformers_or_skip()
    config = PUBLISHED["clip-vit-b16"].config
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(**to_hf(config)[0])).eval()
    with torch.no_grad():
        model.logit_scale.fill_(4.6052)  # 100, what training ends at
    model.save_pretrained(tmp_path)
    pictures, tokens = inputs(config, 4, 6)
    pictures[1], pictures[2] = 255, pictures[2] // 4  # noise alone gives four nearly equal embeddings
    theirs = their_logits(torch, model, config, pictures, tokens)
    assert theirs.std() > 0.3
    ours = forward(CLIP(config), clip_weights.load_params(tmp_path, config, np.float32), pictures, tokens)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


def test_a_text_may_be_cut_after_its_end() -> None:
    """Causal attention: what follows the end of text changes nothing, so short texts need not be 77 tokens long."""
    params = random_params(TINY)
    pictures, tokens = inputs(TINY)
    tokens[:, 4] = TINY.text.eos_id
    whole = forward(CLIP(TINY), params, pictures, tokens)
    np.testing.assert_allclose(forward(CLIP(TINY), params, pictures, tokens[:, :5]), whole, atol=1e-5)
    other = tokens.copy()
    other[:, 5:] = 7
    np.testing.assert_array_equal(forward(CLIP(TINY), params, pictures, other), whole)


def test_the_end_of_text() -> None:
    rows = jnp.asarray([[9, 4, 7, 7], [7, 4, 7, 9]])
    assert end_of_text(rows, 7).tolist() == [2, 0]
    assert end_of_text(rows, LEGACY_EOS).tolist() == [0, 3]


def test_a_new_model_starts_with_finite_logits_at_its_first_temperature() -> None:
    pictures, tokens = inputs(TINY)
    clip = CLIP(TINY)
    params = fast(clip.init)(jax.random.key(0), pictures, tokens)["params"]
    logits = forward(clip, params, pictures, tokens)
    assert logits.shape == (3, 5)
    assert jnp.isfinite(logits).all()
    assert float(jnp.abs(logits).max()) <= 1 / 0.07 + 1e-3
    assert float(jnp.exp(params["logit_scale"])) == pytest.approx(1 / 0.07)


# --- parameters -------------------------------------------------------------------------------------------------------


@cache
def random_params(config: CLIPConfig, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(rng.normal(1.0 if path.endswith("scale") else 0.0, 0.3, shape)).astype(dtype)

    shapes = clip_weights.param_shapes(config)
    return unflatten_dict({path: draw(path, shape) for path, shape in shapes.items()}, sep="/")


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


def test_a_picture_or_text_of_another_size_is_refused() -> None:
    pictures, tokens = inputs(TINY)
    with pytest.raises(MoraError, match=r"pictures are \[8, 12, 3\], the model takes \[12, 12, 3\]"):
        forward(CLIP(TINY), random_params(TINY), pictures[:, :8], tokens)
    with pytest.raises(MoraError, match="texts have 18 tokens, the model takes 9"):
        forward(CLIP(TINY), random_params(TINY), pictures, np.tile(tokens, 2))


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


# --- adapters ---------------------------------------------------------------------------------------------------------


def method_of(name: str = "mora", targets: str = ".*") -> Method:
    return from_config(
        preset(name) | {"rank": 2, "top_k": 2, "threshold": 0.0, "targets": targets, "capacity_bucket": 4}
    )


def adapted(config: CLIPConfig, method: Method) -> tuple[dict, dict, dict]:
    """(parameters, a bank with the experts of one task, fresh experts of the next); no value is zero."""
    params = random_params(config)
    sites = banks.find_sites(params, site_kinds(params), method)
    first, fresh = (
        jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.shape[-1]), a.shape), new)
        for new in (banks.new_fresh(sites, method, 0, task) for task in (0, 1))
    )
    return params, banks.push(banks.empty(sites, 4), first), fresh


def test_sites_and_their_kinds() -> None:
    params = random_params(TINY)
    kinds = site_kinds(params)
    halves = [f"attn/{name}" for name in "qkvo"] + ["mlp/up", "mlp/down"]
    assert sorted(kinds.values()) == sorted(f"{encoder}/{half}" for encoder in ("vision", "text") for half in halves)
    sites = banks.find_sites(params, kinds, method_of(targets="vision/attn/[qv],text/mlp/up"))
    assert sites == {
        ("vision", "layers", "attn", "q"): banks.Site(3, 24, 24),
        ("vision", "layers", "attn", "v"): banks.Site(3, 24, 24),
        ("text", "layers", "mlp", "up"): banks.Site(2, 16, 36),
    }


def test_the_published_run_trains_what_its_paper_says() -> None:
    """X-TAIL: rank 16 at all six kinds of both encoders of ViT-B/16 is 4,423,680 trainable numbers a task."""
    shapes = clip_weights.param_shapes(PUBLISHED["clip-vit-b16"].config)
    params = unflatten_dict({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}, sep="/")
    sites = banks.find_sites(params, site_kinds(params), method_of())
    assert sum(site.layers * 16 * (site.d_in + site.d_out) for site in sites.values()) == 4_423_680


@pytest.mark.parametrize("name", [name for name, axes in PRESETS.items() if axes["experts"] != "none"])
def test_an_empty_bank_is_the_frozen_model_exactly(name: str) -> None:
    method = method_of(name, "vision/.*,text/attn/o")  # fewer sites compile faster
    params = random_params(TINY)
    sites = banks.find_sites(params, site_kinds(params), method)
    apply, batch = fast(CLIP(TINY, method).apply), inputs(TINY)
    frozen = apply({"params": params}, *batch)
    bank, fresh = banks.empty(sites, 4), banks.new_fresh(sites, method, 0, 0)
    np.testing.assert_array_equal(apply({"params": params, "bank": bank}, *batch), frozen)
    np.testing.assert_array_equal(apply({"params": params, "bank": bank, "fresh": fresh}, *batch), frozen)


@pytest.mark.parametrize("encoder", ["vision", "text"])
def test_either_encoder_may_be_adapted_alone(encoder: str) -> None:
    method = method_of(targets=f"{encoder}/.*")
    params, bank, fresh = adapted(TINY, method)
    assert set(bank) == set(fresh) == {encoder}
    pictures, tokens = inputs(TINY)
    clip, moved = CLIP(TINY, method), {}
    for name, data in (("embed_images", pictures), ("embed_texts", tokens)):
        apply = fast(partial(clip.apply, method=name))
        frozen = apply({"params": params}, data)
        moved[name] = float(jnp.abs(apply({"params": params, "bank": bank, "fresh": fresh}, data) - frozen).max())
    untouched, changed = ("embed_texts", "embed_images") if encoder == "vision" else ("embed_images", "embed_texts")
    assert moved[untouched] == 0.0
    assert moved[changed] > 1e-3


def test_freezing_changes_no_output() -> None:
    method = method_of()
    params, bank, fresh = adapted(TINY, method)
    apply, batch = fast(CLIP(TINY, method).apply), inputs(TINY)
    taught = apply({"params": params, "bank": bank, "fresh": fresh}, *batch)
    np.testing.assert_allclose(apply({"params": params, "bank": banks.push(bank, fresh)}, *batch), taught, atol=2e-5)


def test_gradients_reach_every_fresh_expert_and_remat_changes_no_number() -> None:
    # All are kept: in the last layer only the class token and the end of text are asked, and they may skip some.
    method = dataclasses.replace(method_of(), top_k=4)
    params, bank, fresh = adapted(TINY, method)
    batch, found = inputs(TINY), {}
    for remat in REMAT:
        clip = CLIP(TINY, method, remat=remat)

        def loss(fresh: Any, clip: CLIP = clip) -> jax.Array:
            return jnp.sum(jnp.sin(clip.apply({"params": params, "bank": bank, "fresh": fresh}, *batch)))

        found[remat] = fast(jax.value_and_grad(loss))(fresh)
    for path, leaf in flatten_dict(found["none"][1], sep="/").items():
        assert (np.abs(leaf).max(axis=(1, 2)) > 1e-6).all(), path  # in every layer
    for remat in found:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), found[remat], found["none"])


def test_statistics_and_gates_have_a_row_for_each_layer_and_token() -> None:
    method = method_of()
    params, bank, _ = adapted(TINY, method)
    pictures, tokens = inputs(TINY)
    apply = fast(partial(CLIP(TINY, method).apply, mutable=["stats", "gates"]))
    _, told = apply({"params": params, "bank": bank}, pictures, tokens)
    assert told["stats"]["vision"]["layers"]["attn"]["q"]["active"].shape == (3, 3, TINY.vision.positions)
    assert told["stats"]["text"]["layers"]["mlp"]["down"]["mass"].shape == (2, 5, 9, 2)
    gates = told["gates"]["vision"]["layers"]["mlp"]["up"]["gates"]
    assert gates.shape == (3, 3, TINY.vision.positions, 4)
    np.testing.assert_allclose(gates.sum(-1), 1, atol=1e-5)


def test_a_bfloat16_model_gives_float32_points_of_length_one() -> None:
    clip, params = CLIP(TINY, dtype=jnp.bfloat16), random_params(TINY, jnp.dtype("bfloat16"))
    pictures, tokens = inputs(TINY)
    for name, data in (("embed_images", pictures), ("embed_texts", tokens)):
        points = fast(partial(clip.apply, method=name))({"params": params}, data)
        assert points.dtype == jnp.float32
        np.testing.assert_allclose(jnp.linalg.norm(points, axis=-1), 1, atol=1e-6)
        full = jax.tree.map(lambda a: a.astype(np.float32), params)
        wide = fast(partial(CLIP(TINY).apply, method=name))({"params": full}, data)
        assert (np.sum(points * wide, axis=-1) > 0.98).all()
