"""Adapters of the tiny model whose experts are drawn at random, and the logits that they give."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from launching import CONFIG

from mora_jax import config as configs
from mora_jax import experiment, layouts
from mora_jax.adapter import Adapter
from mora_jax.models.decoder import Decoder, causal_mask

TASKS = ("colours", "digits", "shapes")
LENGTH = 12
FAST = {"xla_backend_optimization_level": "0"}


@functools.cache
def base() -> tuple[Any, ...]:
    """(mesh, family, sites) of the tiny model; every method here adapts the same sites."""
    config = configs.load(f"{CONFIG}:smoke", {})
    return experiment.load_family(config, layouts.from_config(config.method), [])


def drawn(method: str, **options: str) -> Adapter:
    """Three tasks of random experts, as large as the weights so that they decide the logits; options of the method."""
    values = {f"method.{key}": value for key, value in options.items()}
    config, (_, model, sites) = configs.load(f"{CONFIG}:smoke,method={method}", values), base()
    empty = Adapter(config, model.identity, TASKS, {}, {"step": 9})
    rng = np.random.default_rng(0)
    rows = {
        path: {
            name: rng.normal(size=(site.layers, empty.experts, width)).astype(np.float32)
            for name, width in (("keys", site.d_in), ("values", site.d_out))
        }
        for path, site in sites.items()
    }
    return dataclasses.replace(empty, rows=rows)


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def forward(decoder: Decoder, variables: Any, tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], tokens.shape)
    hidden, _ = decoder.apply(variables, tokens, positions, causal_mask(LENGTH))
    return decoder.apply(variables, hidden, method=Decoder.logits)


def text() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, LENGTH)).astype(np.int32)


def logits(adapter: Adapter) -> np.ndarray:
    mesh, model, sites = base()
    variables = {"params": model.params} | adapter.variables(mesh, sites, model.identity)
    return np.asarray(forward(model.decoder.clone(method=adapter.method), variables, text()))
