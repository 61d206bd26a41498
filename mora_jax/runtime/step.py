"""The train step: traced once per (bank capacity, batch shape); state is donated, what varies is data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mora_jax.errors import MoraError
from mora_jax.runtime.distributed import ROWS
from mora_jax.runtime.optimizer import SCHEDULES
from mora_jax.runtime.state import TrainState

Loss = Callable[[Mapping[str, Any], Mapping[str, Array]], Float[Array, ""]]


class TrainStep:
    """`step(state, params, bank, horizon, batch) -> (state, metrics)`; `traces` counts how often it was traced.

    `loss(variables, batch)` is the model family's; `horizon` is the number of steps of this task, float32. Metrics
    stay on the device: loss, grad_norm (before clipping), learning_rate and fresh_norm (after the update), each [].

    With `accumulate` > 1 the rows are taken in so many parts, one after another, and gradients are summed: activations
    of one part at a time. The result is that of the whole batch, whose loss must be a mean with `weight(batch)` terms.
    """

    def __init__(
        self,
        loss: Loss,
        optimizer: optax.GradientTransformation,
        schedule: str,
        learning_rate: float,
        accumulate: int = 1,
        weight: Callable[[Mapping[str, Array]], Float[Array, ""]] | None = None,
    ):
        if accumulate > 1 and weight is None:
            raise MoraError(
                f"train.accumulate={accumulate}: the loss of this model compares the rows of a batch with each other, "
                "so a batch cannot be taken in parts; legal: 1"
            )
        self.traces = 0
        rate = SCHEDULES[schedule]

        def step(state: TrainState, params, bank, horizon, batch):
            self.traces += 1  # runs while tracing, not while stepping

            def loss_of(fresh, rows):
                return loss({"params": params, "bank": bank, "fresh": fresh}, rows)

            gradient_of = jax.value_and_grad(loss_of)
            if accumulate == 1:
                value, gradient = gradient_of(state.fresh, batch)
            else:
                value, gradient = _mean_over_parts(gradient_of, weight, state.fresh, batch, accumulate)
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


def _mean_over_parts(gradient_of: Callable, weight: Callable, fresh: Any, batch: Mapping, parts: int) -> tuple:
    """(loss, gradient) of a batch, as the mean of those of its parts by the terms that each of them counts."""

    def part_first(value):  # part i has the rows i, i + parts, ...: of every device's rows an equal share
        return value.reshape(-1, parts, *value.shape[1:]).swapaxes(0, 1)

    rows = {name: part_first(value) for name, value in batch.items() if name in ROWS}
    shared = {name: value for name, value in batch.items() if name not in ROWS}

    def add(total, part):
        part = part | shared
        weighed = weight(part)
        found = (jnp.float32(1.0), gradient_of(fresh, part))
        return jax.tree.map(lambda sum_, one: sum_ + weighed * one, total, found), None

    nothing = (jnp.float32(0.0), (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, fresh)))
    (weights, total), _ = jax.lax.scan(add, nothing, rows)
    return jax.tree.map(lambda one: one / jnp.maximum(weights, 1.0), total)
