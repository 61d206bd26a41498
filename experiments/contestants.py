"""What several benchmarks time: a bank full of random experts, and one train step with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped
from turns import Step

from mora_jax.methods import bank as banks
from mora_jax.methods.method import Method
from mora_jax.runtime.distributed import place, place_batch
from mora_jax.runtime.family import Family
from mora_jax.runtime.optimizer import make_optimizer
from mora_jax.runtime.state import TrainState
from mora_jax.runtime.step import TrainStep


def random_bank(family: Family, method: Method, live: int) -> dict[str, Any]:
    """A bank of `live` experts per site, none of them zero: they change what a model answers, not the time it takes."""
    sites, rng = banks.find_sites(family.params, family.site_kinds, method), np.random.default_rng(1)

    def filled(rows: jax.Array) -> jax.Array:
        if rows.ndim < 3:
            return jnp.full_like(rows, live)
        return jnp.asarray(0.02 * rng.standard_normal(rows.shape, dtype=np.float32))

    bank = banks.empty(sites, max(live, 1))
    return place(family.mesh, jax.tree.map(filled, bank) if live else bank)


def train_step(
    family: Family, method: Method, config: Any, live: int, batch: Mapping[str, Shaped[np.ndarray, "..."]]
) -> Step:
    """One train step with `live` frozen experts per site, as a function that returns when it is done."""
    bank, optimizer = random_bank(family, method, live), make_optimizer(config.train)
    step = TrainStep(family.loss, optimizer, "constant", 1e-3)
    sites = banks.find_sites(family.params, family.site_kinds, method)
    state = place(family.mesh, TrainState.create(banks.new_fresh(sites, method, 0, 0), optimizer))
    placed, horizon = place_batch(family.mesh, batch), place(family.mesh, jnp.float32(100))

    def run() -> None:
        nonlocal state
        state, metrics = step(state, family.params, bank, horizon, placed)
        jax.block_until_ready(metrics)

    return run
