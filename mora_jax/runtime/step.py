"""The train step: traced once per (bank capacity, batch shape); state is donated, what varies is data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mora_jax.runtime.optimizer import SCHEDULES
from mora_jax.runtime.state import TrainState

Loss = Callable[[Mapping[str, Any], Mapping[str, Array]], Float[Array, ""]]


class TrainStep:
    """`step(state, params, bank, horizon, batch) -> (state, metrics)`; `traces` counts how often it was traced.

    `loss(variables, batch)` is the model family's; `horizon` is the number of steps of this task, float32. Metrics
    stay on the device: loss, grad_norm (before clipping), learning_rate and fresh_norm (after the update), each [].
    """

    def __init__(self, loss: Loss, optimizer: optax.GradientTransformation, schedule: str, learning_rate: float):
        self.traces = 0
        rate = SCHEDULES[schedule]

        def step(state: TrainState, params, bank, horizon, batch):
            self.traces += 1  # runs while tracing, not while stepping

            def loss_of(fresh):
                return loss({"params": params, "bank": bank, "fresh": fresh}, batch)

            value, gradient = jax.value_and_grad(loss_of)(state.fresh)
            direction, opt_state = optimizer.update(gradient, state.opt_state, state.fresh)
            now = learning_rate * rate(state.step.astype(jnp.float32) / horizon)
            fresh = jax.tree.map(lambda p, d: p + now * d, state.fresh, direction)
            metrics = {"loss": value, "grad_norm": optax.tree.norm(gradient), "learning_rate": now}
            metrics["fresh_norm"] = optax.tree.norm(fresh)
            return TrainState(fresh=fresh, opt_state=opt_state, step=state.step + 1), metrics

        self._step = jax.jit(step, donate_argnums=0)

    def __call__(self, state, params, bank, horizon, batch) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        return self._step(state, params, bank, horizon, batch)

    def lower(self, *arguments):
        """The lowered step, for ahead-of-time compilation and for counting what it costs."""
        return self._step.lower(*arguments)
