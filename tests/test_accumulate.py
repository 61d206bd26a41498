"""A batch taken in parts gives the step of the whole batch, and the state is given away instead of copied."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mora_jax import config as configs
from mora_jax.errors import MoraError
from mora_jax.methods import bank as banks
from mora_jax.methods.method import from_config
from mora_jax.models.registry import load_model
from mora_jax.runtime.distributed import AXES, make_mesh, place, place_batch
from mora_jax.runtime.language import LanguageFamily
from mora_jax.runtime.optimizer import make_optimizer
from mora_jax.runtime.state import TrainState
from mora_jax.runtime.step import TrainStep

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "llm_cl.py"
FAST = {"xla_backend_optimization_level": "0"}  # unoptimised code compiles twice as fast
ROWS, LENGTH = 16, 12


@functools.cache
def config() -> Any:
    small = {"method.targets": "attn/q,mlp/down", "method.rank": "4", "method.capacity_bucket": "4"}
    return configs.load(f"{CONFIG}:smoke,method=inc_lora", small)


def batch() -> dict[str, np.ndarray]:
    """Rows with one to nine answer tokens, and one with none: means of parts would differ from the mean."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(2, 4, ROWS).astype(np.int32)
    answer = np.arange(ROWS) % 10
    return {
        "tokens": rng.integers(0, 256, (ROWS, LENGTH)).astype(np.int32),
        "prompt": prompt,
        "length": (prompt + answer).astype(np.int32),
        "answers": np.arange(9, dtype=np.int32)[None],
    }


def one_step(mesh: Mesh, accumulate: int) -> tuple[TrainState, TrainState, dict[str, Any]]:
    """The state that went in, the one that came out, and the metrics."""
    method, optimizer = from_config(config().method, config().kernel), make_optimizer(config().train)
    family = LanguageFamily(load_model({"name": "tiny", "weights": "", "dtype": "float32"}, 0), method, config(), mesh)
    sites = banks.find_sites(family.params, family.site_kinds, method)
    noise = jax.random.key(1)
    fresh = jax.tree.map(lambda a: a + 0.2 * jax.random.normal(noise, a.shape), banks.new_fresh(sites, method, 0, 0))
    state = place(mesh, TrainState.create(fresh, optimizer))
    bank = place(mesh, banks.empty(sites, method.capacity(0)))
    with mock.patch.object(jax, "jit", functools.partial(jax.jit, compiler_options=FAST)):
        step = TrainStep(family.loss, optimizer, "constant", 1e-2, accumulate, family.weight)
    after, metrics = step(state, family.params, bank, place(mesh, jnp.float32(1)), place_batch(mesh, batch()))
    assert step.traces == 1
    return state, after, jax.device_get(metrics)


@functools.cache
def whole() -> tuple[dict[str, Any], Any]:
    _, after, metrics = one_step(Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES), 1)
    return metrics, jax.device_get(after.opt_state)


@pytest.mark.parametrize(("sizes", "parts"), [((1, 1, 1), 4), ((2, 2, 2), 4)])
def test_parts_give_the_step_of_the_whole_batch(sizes, parts):
    devices = jax.devices()[: int(np.prod(sizes))]
    before, after, metrics = one_step(make_mesh(dict(zip(AXES, sizes, strict=True)), devices), parts)
    expected, moments = whole()
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), after.opt_state, moments)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before)), "the state was copied"


def test_a_mean_over_parts_of_unequal_weight_would_differ():
    """Else the test above could not tell a weighted mean from a plain one."""
    rows = batch()
    counted = np.clip(rows["length"] - rows["prompt"], 0, 9).reshape(-1, 4).sum(axis=0)
    assert counted.min() < 0.8 * counted.max()


def test_a_loss_that_compares_rows_is_not_taken_in_parts():
    with pytest.raises(MoraError, match=r"train.accumulate=2.*legal: 1"):
        TrainStep(lambda variables, batch: 0.0, make_optimizer(config().train), "constant", 1e-2, 2, None)


@pytest.mark.parametrize(("parts", "says"), [("3", "does not divide train.batch_size=4"), ("0", "at least 1")])
def test_parts_that_cannot_be_are_refused(parts, says):
    with pytest.raises(MoraError, match=says):
        configs.load(f"{CONFIG}:smoke", {"train.accumulate": parts})
