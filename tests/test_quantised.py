"""Frozen kernels in 8 and 4 bits: how far from the weights, what a model makes of them, and that no more changes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_clip
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh
from launching import CONFIG, Ended, assert_refused, results
from tiny_decoder import TINY, our_logits, random_params

from mora_jax import config as configs
from mora_jax import export
from mora_jax.adapter import from_workdir
from mora_jax.methods import bank as banks
from mora_jax.methods.method import from_config
from mora_jax.models import hf, quantised
from mora_jax.models.clip import CLIP
from mora_jax.models.decoder import Decoder
from mora_jax.models.registry import load_model
from mora_jax.models.unread import load
from mora_jax.planning.abstract import Work, bytes_of
from mora_jax.runtime.checkpoint import Checkpoints
from mora_jax.runtime.distributed import AXES, abstract, make_mesh, place
from mora_jax.runtime.language import LanguageFamily

NAMES = sorted(quantised.CODES)
# Half of the widest gap between levels, as a share of the largest weight of a block.
HALF_GAP = {"int8": 0.5 / 127, "nf4": (1 - 0.6961928009986877) / 2}
WIDE = dataclasses.replace(TINY, d_model=128, d_ff=192, head_dim=32)  # several blocks of 64 in every column


# ---------------------------------------------------------------- codes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("d_in", [1, 24, 64, 192])
def test_weights_come_back_within_half_a_gap_of_their_block(name, d_in, rng):
    w = rng.normal(size=(3, d_in, 5)).astype(np.float32) * 10.0 ** rng.uniform(-3, 3, (3, 1, 5)).astype(np.float32)
    w[0, :, 1] = 0
    codes, scale = quantised.encode(w, name)
    blocks = quantised.blocks(d_in, name)
    assert (codes.shape, scale.shape) == (w.shape, (3, blocks, 5))
    error = np.abs(np.asarray(quantised.decode(codes, scale)) - w).reshape(3, blocks, -1, 5)
    largest = np.abs(w).reshape(3, blocks, -1, 5).max(axis=2, keepdims=True)
    assert np.all(error <= HALF_GAP[name] * largest * (1 + 1e-5))
    assert not np.any(error[0, ..., 1])


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_coded_as_themselves(name):
    levels = np.arange(-127, 128, dtype=np.float32) if name == "int8" else np.asarray(quantised.NF4_LEVELS, np.float32)
    w = np.zeros((64 * 4, 1), np.float32)
    w[: len(levels), 0] = levels
    w[-1] = levels[-1]
    used = w if name == "int8" else w[:64]
    assert np.array_equal(quantised.decode(*quantised.encode(used, name)), used)


def test_nf4_is_nearer_to_normal_weights_than_an_even_grid(rng):
    """What the levels are for. The even grid has 15 levels, symmetric, with the same blocks."""
    w = rng.normal(size=(64, 4096)).astype(np.float32)
    largest = np.abs(w).max(axis=0)
    even = np.round(w / largest * 7) / 7 * largest
    nf4 = np.asarray(quantised.decode(*quantised.encode(w, "nf4")))
    assert np.mean((nf4 - w) ** 2) < 0.9 * np.mean((even - w) ** 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_is_that_of_the_decoded_weights(name, dtype, rng):
    w, x = rng.normal(size=(128, 24)).astype(np.float32), jnp.asarray(rng.normal(size=(2, 3, 128)), dtype)
    codes, scale = quantised.encode(w, name)
    y = quantised.product(x, codes, scale, dtype)
    assert y.dtype == dtype
    exact = np.asarray(x, np.float32) @ np.asarray(quantised.decode(codes, scale))
    tolerance = 1e-4 if dtype == jnp.float32 else 0.02 * np.abs(exact).max()
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, atol=tolerance)


# ---------------------------------------------------------------- a model


def with_decoded(params):
    """Plain parameters with the values that coded ones stand for."""
    flat = flatten_dict(params, sep="/")
    for path in [path for path in flat if f"{path}_scale" in flat]:
        flat[path] = quantised.decode(flat[path], flat.pop(f"{path}_scale"))
    return unflatten_dict(flat, sep="/")


@pytest.mark.parametrize(("name", "most"), [("int8", 0.05), ("nf4", 0.5)])
def test_logits_stay_close_and_are_those_of_the_decoded_model(name, most, rng):
    decoder, params = Decoder(WIDE), random_params(WIDE, 0.1)
    tokens = rng.integers(0, WIDE.vocab_size, (2, 9))
    plain, coded = our_logits(decoder, params, tokens), quantised.coded(params, name)
    found = our_logits(decoder, coded, tokens)
    np.testing.assert_allclose(found, our_logits(decoder, with_decoded(coded), tokens), atol=1e-4)
    assert 0 < np.sqrt(np.mean((found - plain) ** 2)) < most * np.std(plain)


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_is_coded_too(name):
    params = tiny_clip.random_params(tiny_clip.TINY)
    batch = tiny_clip.inputs(tiny_clip.TINY)
    coded = quantised.coded(params, name)
    assert {"vision/layers/mlp/up/kernel_scale", "text/layers/attn/q/kernel_scale"} <= flatten_dict(
        coded, sep="/"
    ).keys()
    found, decoded = (tiny_clip.forward(CLIP(tiny_clip.TINY), p, *batch) for p in (coded, with_decoded(coded)))
    np.testing.assert_allclose(found, decoded, atol=1e-4)


def test_only_dense_kernels_of_layers_are_coded():
    coded = quantised.coded(random_params(TINY), "nf4")
    flat = flatten_dict(coded, sep="/")
    kinds = {path: leaf.dtype for path, leaf in flat.items()}
    assert {path for path, kind in kinds.items() if kind == jnp.uint4} == {
        f"layers/{site}/kernel" for site in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
    }
    assert all(kind == jnp.float32 for path, kind in kinds.items() if kind != jnp.uint4)
    plain = quantised.plain(coded)
    assert jax.tree.map(lambda a: a.shape, plain) == jax.tree.map(lambda a: a.shape, random_params(TINY))


@pytest.mark.parametrize("name", NAMES)
def test_loading_codes_tensor_by_tensor_what_coding_the_model_would(name, tmp_path: Path):
    params = random_params(WIDE)
    hf.save_params(params, WIDE, tmp_path)
    unread = quantised.coded(hf.open_params(tmp_path, hf.load_config(tmp_path), np.float32), name)
    found = flatten_dict(load(unread), sep="/")
    expected = flatten_dict(quantised.coded(params, name), sep="/")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[path], leaf) for path, leaf in expected.items())
    kinds = {"int8": np.int8, "nf4": ml_dtypes.uint4}
    assert found["layers/attn/q/kernel"].dtype == kinds[name]
    parts = flatten_dict(unread, sep="/")
    cut = slice(1, 2), slice(37, 100), slice(8, 24)  # neither beginning nor ending with a block of 64
    assert np.array_equal(parts["layers/mlp/up/kernel"][cut], expected["layers/mlp/up/kernel"][cut])
    last = slice(0, 1), slice(quantised.blocks(192, name) - 1, quantised.blocks(192, name)), slice(3, 4)
    assert np.array_equal(parts["layers/mlp/down/kernel_scale"][last], expected["layers/mlp/down/kernel_scale"][last])


@pytest.mark.parametrize("name", NAMES)
def test_codes_and_scales_are_cut_over_the_mesh_and_counted(name):
    overrides = {"model.quantise": name, "mesh.data": "1", "mesh.fsdp": "4", "mesh.model": "2"}
    config = configs.load(f"{CONFIG}:smoke", overrides)
    mesh = make_mesh(config.mesh)
    work, model = Work(config, mesh, 4), load_model(config.model, 0)
    family = LanguageFamily(model, work.method, config, mesh)

    def described(a):
        return a.shape, a.dtype, a.sharding

    assert jax.tree.map(described, work.family.params) == jax.tree.map(described, family.params)
    q = family.params["layers"]["attn"]["q"]
    assert q["kernel"].sharding.shard_shape(q["kernel"].shape) == (2, 32 // 4, 32 // 2)
    rows = 1 if name == "int8" else quantised.blocks(32, name)
    cut = rows // 4 if rows % 4 == 0 else rows
    assert q["kernel_scale"].sharding.shard_shape(q["kernel_scale"].shape) == (2, cut, 32 // 2)
    sizes = 32 * 32 * quantised.bits(q["kernel"].dtype) / 8 + 4 * rows * 32
    assert bytes_of(work.family.params["layers"]["attn"]["q"])[1] == 2 * sizes
    assert work.sites["layers", "attn", "q"] == (2, 32, 32)


@pytest.mark.parametrize(
    ("d_in", "fsdp", "model"), [(896, 8, 1), (896, 4, 2), (3584, 16, 1), (3584, 16, 2), (4096, 8, 1)]
)
def test_no_device_holds_the_scales_of_blocks_that_do_not_divide(d_in, fsdp, model):
    """Qwen's 896 and 3584 inputs have 14 and 56 blocks; of Llama's 4096 the 64 blocks are cut themselves."""
    mesh = AbstractMesh((1, fsdp, model), AXES)
    shapes = {f"layers/{site}/kernel": (2, d_in, d_in) for site in ("attn/q", "attn/o", "mlp/up", "mlp/down")}
    tree = unflatten_dict(quantised.stored(shapes, jnp.bfloat16, "nf4"), sep="/")
    for cut in jax.tree.leaves(abstract(mesh, tree)):
        assert np.prod(cut.sharding.shard_shape(cut.shape)) == np.prod(cut.shape) / (fsdp * model)
    blocks = abstract(mesh, tree)["layers"]["mlp"]["up"]["kernel_scale"].sharding.spec[1]
    assert blocks == ("fsdp" if d_in == 4096 else None)


def test_scales_cut_over_their_outputs_are_read_and_give_the_same_product(tmp_path: Path, rng):
    config = dataclasses.replace(TINY, d_model=192, d_ff=192, head_dim=32, heads=8, kv_heads=4)  # 3 blocks, 4 devices
    params = random_params(config, 0.1)
    hf.save_params(params, config, tmp_path)
    mesh = make_mesh({"data": 1, "fsdp": 4, "model": 1}, jax.devices()[:4])
    unread = quantised.coded(hf.open_params(tmp_path, hf.load_config(tmp_path), np.float32), "nf4")
    placed, whole = place(mesh, unread), quantised.coded(params, "nf4")
    scale = placed["layers"]["mlp"]["up"]["kernel_scale"]
    assert scale.sharding.shard_shape(scale.shape) == (2, 3, 192 // 4)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(placed), jax.tree.leaves(whole), strict=True))
    decoder, tokens = Decoder(config), rng.integers(0, config.vocab_size, (2, 9))
    np.testing.assert_allclose(our_logits(decoder, placed, tokens), our_logits(decoder, whole, tokens), atol=1e-5)


# ---------------------------------------------------------------- a run


def test_mora_learns_on_a_coded_base(rng):
    """By a gradient for fresh experts: there is none for codes."""
    config = configs.load(f"{CONFIG}:smoke", {"model.quantise": "nf4"})
    method, mesh = from_config(config.method, config.kernel), make_mesh(config.mesh, jax.devices()[:1])
    family = LanguageFamily(load_model(config.model, 0), method, config, mesh)
    sites = banks.find_sites(family.params, family.site_kinds, method)
    bank, fresh = (place(mesh, tree) for tree in (banks.empty(sites, 8), banks.new_fresh(sites, method, 0, 0)))
    tokens = jnp.asarray(rng.integers(0, 200, (2, 16)), jnp.int32)
    batch = {
        "tokens": tokens,
        "prompt": jnp.full((2,), 9),
        "length": jnp.full((2,), 16),
        "answers": jnp.arange(8)[None],
    }

    def loss(fresh):
        return family.loss({"params": family.params, "bank": bank, "fresh": fresh}, batch)

    before, gradient = jax.jit(jax.value_and_grad(loss))(fresh)
    assert all(np.any(site["values"]) for site in jax.tree.leaves(gradient, is_leaf=lambda n: "values" in n))
    moved = jax.tree.map(lambda p, g: p - 0.5 * g, fresh, gradient)
    assert loss(moved) < before


def test_a_run_on_a_coded_base_says_so_wherever_it_goes(smoke, main: Callable[..., Ended], tmp_path: Path):
    coded = smoke("smoke,benchmark=folder,method=inc_lora", benchmark__tasks="colours", model__quantise="int8")
    run = main(*coded)
    assert run.code == 0, run
    assert "dense kernels int8), 26,848 frozen parameters" in run.out
    workdir = tmp_path / "w"
    assert results(workdir)["config"]["model"]["quantise"] == "int8"
    meta, arrays = Checkpoints(workdir, 1).read()
    assert set(arrays) == {"bank", "layout"}  # never the backbone
    assert meta["fingerprint"]["model.quantise"] == "int8"
    plain = [word for word in coded if "quantise" not in word]
    assert_refused(main(*plain), "holds another experiment", "model.quantise: 'int8' -> 'none'")
    assert from_workdir(workdir, None, {}).config.model.quantise == "int8"
    assert main(f"--workdir={workdir}", f"--to={tmp_path / 'adapter'}", of=export).code == 0
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["base_model"]["quantise"] == "int8"


def test_an_unknown_code_is_refused(smoke, main: Callable[..., Ended]):
    assert_refused(main(*smoke(model__quantise="int4")), "model.quantise='int4'", "none, int8, nf4")
