"""CLIP against transformers with tiny random models, and with adapters in either encoder."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from parity import TOLERANCE, randomise, transformers_or_skip
from tiny_clip import TINY, VARIANTS, fast, forward, inputs, random_params, variant

from mora_jax.data.images import normalise
from mora_jax.errors import MoraError
from mora_jax.methods import bank as banks
from mora_jax.methods.method import Method, from_config
from mora_jax.methods.presets import PRESETS, preset
from mora_jax.models import clip_weights
from mora_jax.models.clip import CLIP, end_of_text, site_kinds
from mora_jax.models.clip_config import LEGACY_EOS, PUBLISHED, CLIPConfig, to_hf
from mora_jax.models.decoder import REMAT


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


def test_a_picture_or_text_of_another_size_is_refused() -> None:
    pictures, tokens = inputs(TINY)
    with pytest.raises(MoraError, match=r"pictures are \[8, 12, 3\], the model takes \[12, 12, 3\]"):
        forward(CLIP(TINY), random_params(TINY), pictures[:, :8], tokens)
    with pytest.raises(MoraError, match="texts have 18 tokens, the model takes 9"):
        forward(CLIP(TINY), random_params(TINY), pictures, np.tile(tokens, 2))


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


def value_and_gradient(clip: CLIP, params: Any, bank: Any, fresh: Any) -> tuple[jax.Array, Any]:
    """Of a smooth function of all logits, by the fresh experts."""
    batch = inputs(TINY)

    def loss(fresh: Any) -> jax.Array:
        return jnp.sum(jnp.sin(clip.apply({"params": params, "bank": bank, "fresh": fresh}, *batch)))

    return fast(jax.value_and_grad(loss))(fresh)


def test_gradients_reach_every_site_in_every_layer() -> None:
    """Without gates: in the last layer only the class token and the end of text are asked, and gates may skip some."""
    method = method_of("inc_lora")
    _, gradient = value_and_gradient(CLIP(TINY, method), *adapted(TINY, method))
    assert len(jax.tree.leaves(gradient)) == 2 * 6 * 2
    for path, leaf in flatten_dict(gradient, sep="/").items():
        assert (np.abs(leaf).max(axis=(1, 2)) > 1e-4).all(), path


def test_what_the_backward_pass_recomputes_changes_no_number() -> None:
    method = method_of(targets="vision/attn/[qo],text/(attn/v|mlp/down)")
    found = {remat: value_and_gradient(CLIP(TINY, method, remat=remat), *adapted(TINY, method)) for remat in REMAT}
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(found["none"][1])) > 1e-2
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
