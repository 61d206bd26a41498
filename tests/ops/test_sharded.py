"""The gated projection on a mesh of eight devices equals the op on one, in value and gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mora_jax.ops.gated_projection import gated_projection, gated_projection_sharded

HOW = {"top_k": 3, "temperature": 0.1}
BATCH, TIME, D_IN, D_OUT, N, R = 4, 6, 16, 8, 10, 2
# name -> (spec of x, spec of W)
LAYOUTS = {
    "replicated": (P(None, None, None), P(None, None)),
    "tokens": (P(("data", "model"), None, None), P(None, None)),
    "columns": (P("data", None, None), P(None, "model")),
    "rows": (P("data", None, "model"), P("model", None)),
    "both": (P(None, None, "data"), P("data", "model")),
    "time": (P(None, "data", "model"), P("model", None)),
}


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))


@pytest.fixture
def rows(rng):
    shapes = [(BATCH, TIME, D_IN), (N, D_IN), (N, D_OUT), (R, D_IN), (R, D_OUT), (BATCH, TIME, D_OUT)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def value_and_slopes(op, x, keys, values, fresh_keys, fresh_values, dy):
    def y(x, fresh_keys, fresh_values):
        return op(x, keys, values, fresh_keys=fresh_keys, fresh_values=fresh_values, live=jnp.int32(7), **HOW)

    out, vjp = jax.vjp(y, x, fresh_keys, fresh_values)
    return out, *vjp(dy)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mesh_changes_no_value_and_no_gradient(layout, mesh, rows):
    x_spec, kernel_spec = LAYOUTS[layout]
    if layout == "tokens":  # eight devices for the batch
        rows[0], rows[5] = (np.concatenate([a, a]) for a in (rows[0], rows[5]))
    expected = jax.jit(lambda *rows: value_and_slopes(gated_projection, *rows))(*rows)

    def op(*arguments, **options):
        return gated_projection_sharded(*arguments, mesh=mesh, x_spec=x_spec, kernel_spec=kernel_spec, **options)

    specs = [x_spec, *[P(None, axis) for axis in kernel_spec] * 2, P(*x_spec[:-1], kernel_spec[1])]
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(rows, specs, strict=True)]
    found = jax.jit(lambda *rows: value_and_slopes(op, *rows))(*placed)
    assert found[0].sharding.is_equivalent_to(NamedSharding(mesh, specs[-1]), 3)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_one_all_reduce_completes_the_responses(mesh, rows):
    x_spec, kernel_spec = LAYOUTS["rows"]

    def y(x, keys, values, fresh_keys, fresh_values):
        fresh = {"fresh_keys": fresh_keys, "fresh_values": fresh_values}
        where = {"mesh": mesh, "x_spec": x_spec, "kernel_spec": kernel_spec}
        return gated_projection_sharded(x, keys, values, **fresh, **where, **HOW)

    specs = [x_spec, *[P(None, axis) for axis in kernel_spec] * 2]
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(rows[:5], specs, strict=True)]
    text = jax.jit(y).lower(*placed).compile().as_text()
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 1
    assert "all-gather" not in text


@pytest.mark.parametrize("x_spec", [P("data", None), P("data", None, None)])
def test_specs_that_do_not_fit_are_named(mesh, rows, x_spec):
    fresh = {"fresh_keys": rows[3], "fresh_values": rows[4]}
    with pytest.raises(ValueError, match=r"x_spec .* must have 3 entries and end in W's 'model'"):
        gated_projection_sharded(*rows[:3], mesh=mesh, x_spec=x_spec, kernel_spec=P("model"), **fresh, **HOW)
