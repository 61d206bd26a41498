"""Eight fake devices in several meshes: the rules cut what they name, and no mesh changes what a step computes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from launching import assert_refused

from mora_jax import config as configs
from mora_jax.errors import MoraError
from mora_jax.methods import bank as banks
from mora_jax.methods.method import from_config
from mora_jax.models.registry import LanguageModel, load_model
from mora_jax.runtime.distributed import AXES, abstract, make_mesh, place, place_batch, whole_rows
from mora_jax.runtime.language import LanguageFamily
from mora_jax.runtime.optimizer import make_optimizer
from mora_jax.runtime.state import TrainState
from mora_jax.runtime.step import TrainStep

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "llm_cl.py"
FAST = {"xla_backend_optimization_level": "0"}  # unoptimised code compiles twice as fast
MESHES = [(8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 2, 4)]
ROWS, LENGTH, STEPS = 8, 16, 2


def mesh_of(*sizes: int) -> Mesh:
    return make_mesh(dict(zip(AXES, sizes, strict=True)))


@functools.cache
def tiny() -> LanguageModel:
    return load_model({"name": "tiny", "weights": "", "dtype": "float32"}, 0)


def shard(array: jax.Array) -> tuple[int, ...]:
    """The shape of what one device holds; all hold the same amount."""
    (shape,) = {piece.data.shape for piece in array.addressable_shards}
    return shape


# ---------------------------------------------------------------- meshes


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((8, 1, 1), (8, 1, 1)), ((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 8, -1), (1, 8, 1))],
)
def test_a_mesh_takes_all_devices(sizes, shape):
    mesh = mesh_of(*sizes)
    assert tuple(mesh.shape.items()) == tuple(zip(AXES, shape, strict=True))
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((2, 2, 1), "does not multiply to the 8 devices"),
        ((16, 1, 1), "does not multiply to the 8 devices"),
        ((-1, 3, 1), "does not multiply to the 8 devices"),
        ((-1, -1, 2), "must be positive, with at most one -1"),
        ((0, 1, -1), "must be positive, with at most one -1"),
        ((-2, 1, 1), "must be positive, with at most one -1"),
    ],
)
def test_a_mesh_that_cannot_fit_is_refused(sizes, says):
    with pytest.raises(MoraError, match=says) as error:
        mesh_of(*sizes)
    assert "mesh." in str(error.value)


# ---------------------------------------------------------------- what is cut


def tree_of_shapes() -> dict[str, Any]:
    """Parameters, a bank, and optimiser moments, by shape."""

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    def site(d_in: int, d_out: int) -> dict[str, Any]:
        return {"kernel": zeros(2, d_in, d_out), "keys": zeros(2, 6, d_in), "values": zeros(2, 6, d_out)}

    layers = {"attn": {"q": site(16, 8), "o": site(8, 16)}, "mlp": {"up": site(16, 24), "down": site(24, 16)}}
    layers["attn"]["k"] = site(16, 6) | {"live": np.zeros(2, np.int32), "bias": zeros(2, 6)}
    layers["attn_norm"] = {"scale": zeros(2, 16)}
    heads = {"embed": {"embedding": zeros(40, 16)}, "lm_head": {"kernel": zeros(16, 40)}}
    return {"layers": layers, **heads, "opt_state": ({"mu": {"layers": {"attn": {"o": {"keys": zeros(2, 6, 8)}}}}},)}


def test_the_rules_cut_kernels_keys_and_values():
    placed = place(mesh_of(1, 2, 4), tree_of_shapes())
    (moments,) = placed.pop("opt_state")
    found = {"/".join(path): shard(a) for path, a in flatten_dict(placed).items()}
    assert found == {
        # widening kernels: (fsdp, model) = (2, 4)
        "layers/attn/q/kernel": (2, 8, 2),
        "layers/attn/q/keys": (2, 6, 8),
        "layers/attn/q/values": (2, 6, 2),
        "layers/mlp/up/kernel": (2, 8, 6),
        "layers/mlp/up/keys": (2, 6, 8),
        "layers/mlp/up/values": (2, 6, 6),
        # six columns do not divide by four and stay whole
        "layers/attn/k/kernel": (2, 8, 6),
        "layers/attn/k/keys": (2, 6, 8),
        "layers/attn/k/values": (2, 6, 6),
        # narrowing kernels: the other way round
        "layers/attn/o/kernel": (2, 2, 8),
        "layers/attn/o/keys": (2, 6, 2),
        "layers/attn/o/values": (2, 6, 8),
        "layers/mlp/down/kernel": (2, 6, 8),
        "layers/mlp/down/keys": (2, 6, 6),
        "layers/mlp/down/values": (2, 6, 8),
        # what is small stays whole
        "layers/attn/k/live": (2,),
        "layers/attn/k/bias": (2, 6),
        "layers/attn_norm/scale": (2, 16),
        # vocabulary over model, width over fsdp
        "embed/embedding": (10, 8),
        "lm_head/kernel": (8, 10),
    }
    assert shard(moments["mu"]["layers"]["attn"]["o"]["keys"]) == (2, 6, 2)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4)])
def test_experts_are_cut_like_the_kernel_beside_them(sizes):
    """On the real model: at every site, and in the optimiser's moments too."""
    mesh, method = mesh_of(*sizes), method_of(config())
    family = LanguageFamily(tiny(), method, config(), mesh)
    sites = {path: banks.Site(*flatten_dict(family.params)[(*path, "kernel")].shape) for path in family.site_kinds}
    assert len(sites) == 7
    fresh = banks.new_fresh(sites, method, 0, 0)
    state = place(mesh, TrainState.create(fresh, make_optimizer(config().train)))
    bank = flatten_dict(place(mesh, banks.empty(sites, method.capacity(0))))
    moments = flatten_dict(next(part for part in state.opt_state if hasattr(part, "mu")).mu)
    for path in sites:
        _, d_in, d_out = shard(flatten_dict(family.params)[(*path, "kernel")])
        for tree in (bank, flatten_dict(state.fresh), moments):
            assert shard(tree[(*path, "keys")])[2] == d_in
            assert shard(tree[(*path, "values")])[2] == d_out
    ways = mesh.shape["fsdp"] * mesh.shape["model"]
    kernels = [a for path, a in flatten_dict(family.params).items() if path[-1] == "kernel"]
    assert all(np.prod(shard(a)) * ways == a.size for a in kernels)


def test_what_a_restore_fills_in_has_the_shardings_of_place():
    mesh, tree = mesh_of(2, 2, 2), tree_of_shapes()
    for wanted, placed in zip(jax.tree.leaves(abstract(mesh, tree)), jax.tree.leaves(place(mesh, tree)), strict=True):
        assert (wanted.shape, wanted.dtype, wanted.sharding) == (placed.shape, placed.dtype, placed.sharding)


def test_batches_are_cut_over_data_and_fsdp_where_they_divide():
    mesh = mesh_of(2, 2, 2)
    batch = {"tokens": np.zeros((8, 5), np.int32), "length": np.arange(8), "answers": np.zeros((1, 8))}
    placed = place_batch(mesh, batch)
    assert {name: shard(a) for name, a in placed.items()} == {"tokens": (2, 5), "length": (2,), "answers": (1, 8)}
    np.testing.assert_array_equal(placed["length"], np.arange(8))
    odd = place_batch(mesh, {"tokens": np.zeros((6, 5), np.int32)})
    assert shard(odd["tokens"]) == (6, 5)
    shared = place_batch(mesh, {"answers": np.zeros((8, 5)), "classes": np.zeros(4)})  # no rows, whatever their size
    assert {name: shard(a) for name, a in shared.items()} == {"answers": (8, 5), "classes": (4,)}


@pytest.mark.parametrize(("sizes", "rows", "whole"), [((8, 1, 1), 5, 8), ((2, 2, 2), 5, 8), ((1, 2, 4), 4, 4)])
def test_evaluation_is_filled_up_to_equal_parts(sizes, rows, whole):
    assert whole_rows(mesh_of(*sizes), rows) == whole


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((8, 1, 1), ("mesh.data x mesh.fsdp = 8", "train.batch_size=4", "legal: a multiple of 8")),
        ((1, 2, 4), ("mesh.model=4", "2 key and value heads", "legal: 1, 2")),
        ((3, 1, 1), ("does not multiply to the 8 devices",)),
    ],
)
def test_a_run_on_a_mesh_that_divides_nothing_is_refused_in_one_line(sizes, says, main, smoke):
    mesh = {f"mesh__{axis}": size for axis, size in zip(AXES, sizes, strict=True)}
    assert_refused(main(*smoke(**mesh)), *says)


# ---------------------------------------------------------------- one step, many meshes


@functools.cache
def config() -> Any:
    """One wide and one narrow site, and few experts: enough for every rule, quick to compile."""
    small = {
        "method.targets": "attn/q,mlp/down",
        "method.rank": "4",
        "method.top_k": "3",
        "method.capacity_bucket": "8",
    }
    return configs.load(f"{CONFIG}:smoke,method=mora", small)


def method_of(config: Any):
    return from_config(config.method, config.kernel)


def steps_on(mesh: Mesh) -> tuple[list[float], dict]:
    """Losses of a few steps, and the experts after them, from a bank that is half full."""
    method, optimizer = method_of(config()), make_optimizer(config().train)
    family = LanguageFamily(tiny(), method, config(), mesh)
    sites = banks.find_sites(family.params, family.site_kinds, method)

    def experts(task: int) -> dict:
        fresh = banks.new_fresh(sites, method, 0, task)
        noise = jax.random.key(task)
        return jax.tree.map(lambda a: a + 0.2 * jax.random.normal(noise, a.shape), fresh)

    bank = place(mesh, banks.push(banks.empty(sites, method.capacity(1)), experts(0)))
    state = place(mesh, TrainState.create(experts(1), optimizer))
    start = state.fresh
    before = [(a.sharding, a.ndim) for a in jax.tree.leaves(state)]
    with mock.patch.object(jax, "jit", functools.partial(jax.jit, compiler_options=FAST)):
        step = TrainStep(family.loss, optimizer, "constant", 1e-2)
    start = jax.tree.map(np.array, start)
    horizon, losses = place(mesh, jnp.float32(STEPS)), []
    for i in range(STEPS):
        rng = np.random.default_rng(i)
        rows = {
            "tokens": rng.integers(0, 256, (ROWS, LENGTH)).astype(np.int32),
            "prompt": rng.integers(2, 8, ROWS).astype(np.int32),
            "length": rng.integers(9, LENGTH + 1, ROWS).astype(np.int32),
            "answers": np.arange(12, dtype=np.int32)[None],
        }
        batch = place_batch(mesh, rows)
        with jax.transfer_guard_host_to_device("disallow"):
            state, metrics = step(state, family.params, bank, horizon, batch)
        losses.append(float(metrics["loss"]))
    # The state comes back cut as it went in: else the next step compiles again.
    for (sharding, ndim), leaf in zip(before, jax.tree.leaves(state), strict=True):
        assert sharding.is_equivalent_to(leaf.sharding, ndim)
    assert step.traces == 1
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), state.fresh, start)
    assert min(jax.tree.leaves(moved)) > 1e-3
    return losses, jax.tree.map(np.asarray, state.fresh)


@functools.cache
def on_one_device() -> tuple[list[float], dict]:
    return steps_on(Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES))


@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_takes_the_same_steps(sizes):
    losses, fresh = steps_on(mesh_of(*sizes))
    expected_losses, expected = on_one_device()
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), fresh, expected)


def test_a_sharded_bank_is_pushed_to_and_popped_from_like_a_whole_one():
    mesh, method = mesh_of(1, 2, 4), method_of(config())
    sites = {("layers", "attn", "q"): banks.Site(2, 8, 16), ("layers", "mlp", "down"): banks.Site(2, 16, 8)}
    bank, fresh = banks.empty(sites, 8), banks.new_fresh(sites, method, 0, 0)
    whole = banks.push(bank, fresh)
    cut = banks.push(place(mesh, bank), place(mesh, fresh))
    jax.tree.map(np.testing.assert_array_equal, cut, whole)
    back, taken = banks.pop(cut, method.rank)
    jax.tree.map(np.testing.assert_array_equal, back, bank)
    jax.tree.map(np.testing.assert_array_equal, taken, fresh)
    again = place(mesh, cut)
    assert again["layers"]["attn"]["q"]["keys"].sharding == NamedSharding(mesh, P(None, None, "fsdp"))
