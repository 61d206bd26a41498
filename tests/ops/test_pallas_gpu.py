"""The Hopper kernels on the CPU (interpreted) against the specification, and their lowering to Triton.

Interpreting compiles slowly, so one compiled function per configuration serves every data set of that configuration.
"""

from __future__ import annotations

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax.ops.gated_projection import pallas_gpu, pallas_gpu_decode, pallas_gpu_gate, reference
from mora_jax.ops.gated_projection.xla import Selection

T, D_IN, D_OUT, FRESH = 70, 32, 48, 4  # two tiles, the second not full; output slices of 16
FEW = Selection(top_k=3, temperature=0.2, threshold=0.0, threshold_mode="absolute")
ONE = FEW._replace(top_k=1, threshold=0.5, threshold_mode="relative")
MANY = FEW._replace(top_k=40, threshold=0.3)  # past the largest k that counts in rounds
ALL = FEW._replace(top_k=40)
QUICK = {"xla_backend_optimization_level": 0}  # half the compile time


def specification(x, keys, values, fresh_keys, fresh_values, live, how):
    exists = jnp.arange(keys.shape[0]) < live
    if fresh_keys is not None:
        keys = jnp.concatenate([jax.lax.stop_gradient(keys), fresh_keys])
        values = jnp.concatenate([jax.lax.stop_gradient(values), fresh_values])
        exists = jnp.concatenate([exists, jnp.ones(fresh_keys.shape[0], bool)])
    return reference.gated_projection(x, keys, values, exists, **how._asdict())


@cache
def compiled(project, how, dtype, n, fresh, bank):
    """y and the gradients of sum(y dy), for x of a dtype, n frozen rows of dtype `bank`, with fresh rows or without."""
    arrays = [jax.ShapeDtypeStruct((n, d), bank) for d in (D_IN, D_OUT)]
    arrays += [jax.ShapeDtypeStruct((FRESH, d), jnp.float32) for d in (D_IN, D_OUT) if fresh]
    tokens, dy = jax.ShapeDtypeStruct((T, D_IN), dtype), jax.ShapeDtypeStruct((T, D_OUT), dtype)

    def both(live, dy, x, keys, values, fresh_keys=None, fresh_values=None):
        arguments = x, keys, values, fresh_keys, fresh_values
        y, pull = jax.vjp(lambda *a: project(*a, live, how), *arguments)
        return y, *pull(dy)

    step = jax.jit(both, compiler_options=QUICK)
    return step.lower(jax.ShapeDtypeStruct((), jnp.int32), dy, tokens, *arrays).compile()


interpreted = partial(pallas_gpu.project, interpret=True)


def data(rng, dtype, n, fresh):
    """x, keys, values and fresh rows, with responses of size 1."""
    shapes = [(T, D_IN), (n, D_IN), (n, D_OUT)] + ([(FRESH, D_IN), (FRESH, D_OUT)] if fresh else [])
    arrays = [jnp.asarray(rng.normal(size=shape) / shape[-1] ** 0.5, jnp.float32) for shape in shapes]
    return [arrays[0].astype(dtype), *arrays[1:]]


def check(rng, how, arrays, live, n, tolerances=(1e-5,) * 5):
    """y, dx and the gradients of keys, values and fresh rows equal the specification's, relative to the largest."""
    dy = jnp.asarray(rng.normal(size=(T, D_OUT)), arrays[0].dtype)
    configuration = how, arrays[0].dtype, n, len(arrays) == 5, arrays[1].dtype
    ours, wanted = (compiled(f, *configuration)(jnp.int32(live), dy, *arrays) for f in (interpreted, specification))
    names = ["y", "dx", "d_keys", "d_values", "d_fresh_keys", "d_fresh_values"]
    for name, a, b in zip(names, ours, wanted, strict=False):
        if a is None:
            continue
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        tolerance = (tolerances[0], tolerances[1], *(1e-5,) * 2, *tolerances[2:])[names.index(name)]
        largest = np.max(np.abs(b), initial=0.0, where=np.isfinite(b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest, err_msg=name)
    return ours


BFLOAT16 = (0.01, 0.02, 0.02, 1e-4)  # y and dx round to bfloat16, as do the factors that d_fresh_keys comes from


@pytest.mark.parametrize("live", [0, 1, 17, 24])
def test_training_in_float32(rng, live):
    y, _, d_keys, d_values, *_ = check(rng, FEW, data(rng, jnp.float32, 24, True), live, 24, (1e-5,) * 4)
    assert np.any(y)
    assert not np.any(d_keys)
    assert not np.any(d_values)


@pytest.mark.parametrize("live", [0, 24])
def test_training_in_bfloat16(rng, live):
    check(rng, FEW, data(rng, jnp.bfloat16, 24, True), live, 24, BFLOAT16)


@pytest.mark.parametrize("size", [1e-9, 1e-15, 1e12])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_magnitudes_above_and_below_the_floor(rng, dtype, size):
    x, *rows = data(rng, dtype, 24, True)
    tolerances = BFLOAT16 if dtype == jnp.bfloat16 else (1e-5,) * 4
    check(rng, FEW, [x * jnp.asarray(size, dtype), *rows], 20, 24, tolerances)


def test_squares_that_overflow_choose_by_index(rng):
    x, *rows = data(rng, jnp.float32, 24, True)
    arguments = jnp.int32(20), jnp.ones((T, D_OUT)), x * 1e20, *rows
    y, wanted = (
        compiled(f, FEW, x.dtype, 24, True, rows[0].dtype)(*arguments)[0] for f in (interpreted, specification)
    )
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5 * np.max(np.abs(wanted)))


def test_zero_input_gives_zero_and_no_gradient(rng):
    x, *rows = data(rng, jnp.float32, 24, True)
    y, dx, *_ = check(rng, FEW, [x.at[:40].set(0.0), *rows], 20, 24, (1e-5,) * 4)
    assert not np.any(y[:40])
    assert not np.any(dx[:40])
    assert np.any(dx[40:])


def test_equal_scores_keep_the_lowest_index(rng):
    x, keys, values, fresh_keys, fresh_values = data(rng, jnp.float32, 24, True)
    x, keys = jnp.round(8 * x), jnp.round(2 * keys)  # whole numbers: responses are exact whatever the order of sums
    keys = keys.at[3:20].set(keys[3])
    fresh_keys = jnp.tile(keys[3], (FRESH, 1))
    y, *_, d_fresh = check(rng, FEW, [x, keys, values, fresh_keys, fresh_values], 22, 24, (1e-5,) * 4)
    assert np.any(y)
    assert not np.any(d_fresh)  # a fresh row comes after a frozen one of the same score


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nan_in_gives_nan_out_for_that_token_only(rng, dtype):
    x, *rows = data(rng, dtype, 24, True)
    dy = jnp.ones((T, D_OUT), dtype)
    y, dx, *_ = compiled(interpreted, FEW, x.dtype, 24, True, rows[0].dtype)(
        jnp.int32(24), dy, x.at[65, 3].set(jnp.nan), *rows
    )
    bad = np.arange(T) == 65
    assert np.all(np.isnan(np.asarray(y, np.float32)) == bad[:, None])
    assert np.all(np.isnan(np.asarray(dx, np.float32)) == bad[:, None])


@pytest.mark.parametrize("live", [0, 2, 33, 40])
def test_without_fresh_rows_and_with_every_expert_kept(rng, live):
    _, _, d_keys, d_values, *_ = check(rng, ALL, data(rng, jnp.float32, 40, False), live, 40)
    for gradient in (d_keys, d_values):
        assert not np.any(gradient[live:])
        assert np.any(gradient) == (live > 0)


@pytest.mark.parametrize(("how", "live"), [(ONE, 100), (ONE, 0), (MANY, 90), (MANY, 20), (MANY, 0)])
def test_thresholds_and_every_k(rng, how, live):
    x, keys, values, *fresh = data(rng, jnp.float32, 100, True)
    bank = jnp.bfloat16 if how is ONE else jnp.float32
    y, *_ = check(rng, how, [x, keys.astype(bank), values.astype(bank), *fresh], live, 100, (1e-5,) * 4)
    if live == 90:
        assert 0 < np.mean(np.any(y, axis=1)) < 0.9  # in many tokens all scores lie below the threshold


def test_the_largest_k_takes_equal_scores_by_index(rng):
    x, keys, values, *fresh = data(rng, jnp.float32, 100, True)
    x, keys = jnp.round(8 * x), jnp.round(2 * keys)
    check(rng, MANY, [x, keys.at[1:80].set(keys[1]), values, *fresh], 95, 100, (1e-5,) * 4)


@cache
def decoder(how, dtype):
    def decode(x, keys, values, live):
        return pallas_gpu.decode(x, keys, values, None, None, live, how, interpret=True)

    arrays = [
        jax.ShapeDtypeStruct(*a) for a in (((5, D_IN), dtype), ((90, D_IN), "f4"), ((90, D_OUT), "f4"), ((), "i4"))
    ]
    return jax.jit(decode, compiler_options=QUICK).lower(*arrays).compile()


@pytest.mark.parametrize(
    ("how", "dtype", "live"), [(FEW, "f4", 77), (FEW, "f4", 2), (FEW, "f4", 0), (ONE, "f4", 77), (FEW, "bfloat16", 77)]
)
def test_decode(rng, how, dtype, live):
    _, keys, values = data(rng, jnp.float32, 90, False)
    x = jnp.asarray(rng.normal(size=(5, D_IN)), dtype).at[2].set(0.0).at[3, 1].set(jnp.nan)
    y = decoder(how, dtype)(x, keys, values, jnp.int32(live))
    wanted = specification(x, keys, values, None, None, live, how)
    assert y.dtype == x.dtype
    assert np.any(np.isnan(y[3])) == (live > 0)
    np.testing.assert_allclose(
        np.asarray(y, np.float32), np.asarray(wanted, np.float32), rtol=0.01 if dtype == "bfloat16" else 0, atol=1e-5
    )


def test_decode_takes_equal_scores_by_index(rng):
    _, keys, values = data(rng, jnp.float32, 90, False)
    x = jnp.round(4 * jnp.asarray(rng.normal(size=(5, D_IN)), jnp.float32))
    keys = jnp.round(2 * keys).at[4:60].set(1.0)
    y = decoder(FEW, "f4")(x, keys, values, jnp.int32(50))
    np.testing.assert_allclose(y, specification(x, keys, values, None, None, 50, FEW), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_responses_are_exact_to_twenty_bits(rng, dtype):
    x, keys = jnp.asarray(rng.normal(size=(16, 64)), dtype), jnp.asarray(rng.normal(size=(16, 64)), jnp.float32)
    z = pallas_gpu_gate.product(pallas_gpu_gate.cut(x, 3), pallas_gpu_gate.cut(keys, 3), transpose=True)
    x, keys = np.asarray(x, np.float64), np.asarray(keys, np.float64)
    assert np.all(np.abs(z - x @ keys.T) < 2.0**-20 * np.linalg.norm(x, axis=1)[:, None])
    assert np.all(sum(np.asarray(part, np.float64) for part in pallas_gpu_gate.cut(jnp.asarray(keys), 3)) == keys)


def test_no_tokens_and_no_rows(rng):
    x, *rows = data(rng, jnp.float32, 24, True)
    y, pull = jax.vjp(lambda x: pallas_gpu.project(x, *rows, jnp.int32(3), FEW, True), x[:0])
    assert y.shape == (0, D_OUT)
    assert pull(y)[0].shape == (0, D_IN)
    empty = jax.jit(lambda *a: pallas_gpu.project(*a, jnp.int32(0), FEW, True), compiler_options=QUICK)
    assert not np.any(empty(x, *(a[:0] for a in rows)))


def test_what_cannot_run_is_named():
    def ask(tokens=(8, 64), d_out=64, dtype=jnp.float32, n=24):
        x = jax.ShapeDtypeStruct(tokens, dtype)
        keys, values = (jax.ShapeDtypeStruct((n, d), jnp.float32) for d in (tokens[1], d_out))
        return pallas_gpu.unsupported(x, keys, values, None, FEW)

    assert ask() is None
    assert "d_in 40" in ask(tokens=(8, 40))
    assert "d_out 72" in ask(d_out=72)
    assert "float16" in ask(dtype=jnp.float16)
    assert "32-bit" in ask(tokens=(2**20, 4096))
    assert "32-bit" in ask(tokens=(8, 4096), n=2**18)


def lowered(function, *arguments) -> str:
    check = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=[check])(*arguments)
    return exported.mlir_module()


def test_lowers_to_triton_and_keeps_no_gate_in_memory():
    tokens, d, n = 16384, 512, 256
    shape = jax.ShapeDtypeStruct
    x, fresh = shape((tokens, d), jnp.bfloat16), shape((16, d), jnp.float32)
    keys, live = shape((n, d), jnp.float32), shape((), jnp.int32)

    def train(x, keys, values, fresh_keys, fresh_values, live):
        def project(x, a, b):
            return pallas_gpu.project(x, keys, values, a, b, live, FEW)

        y, pull = jax.vjp(project, x, fresh_keys, fresh_values)
        return pull(y)

    text = lowered(train, x, keys, keys, fresh, fresh, live)
    assert text.count("@__gpu$xla.gpu.triton") == 2
    assert {int(width) for width in re.findall(rf"tensor<{tokens}x(\d+)x", text)} <= {d, 16}


@pytest.mark.parametrize(
    ("dtype", "forward", "backward"),
    [(jnp.bfloat16, 3 * 64 + 32, 4 * 64 + 32), (jnp.float32, 6 * 64 + 6 * 32, 12 * 64 + 6 * 32)],
)
def test_a_kernel_says_its_products_to_who_reads_the_program(dtype, forward, backward):
    """Three parts of a float32 row meet one bfloat16 part, or in six pairs three; dx takes one part of each, or six."""
    shape = jax.ShapeDtypeStruct
    rows = [shape((n, d), jnp.float32) for n in (64, 16) for d in (64, 32)]

    def train(x, keys, values, fresh_keys, fresh_values, live, dy):
        def project(x, a, b):
            return pallas_gpu.project(x, keys, values, a, b, live, FEW)

        y, pull = jax.vjp(project, x, fresh_keys, fresh_values)
        return y, pull(dy)

    traced = jax.jit(train).trace(shape((128, 64), dtype), *rows, shape((), jnp.int32), shape((128, 32), dtype))
    text = traced.lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    said = {int(count) for count in re.findall(r"flops=(\d+)", text)}
    assert said == {2 * 128 * (64 + 16) * per_row for per_row in (forward, backward)}


def test_decode_lowers_to_triton():
    shape = jax.ShapeDtypeStruct
    keys = shape((100, 512), jnp.float32)
    text = lowered(
        lambda x, keys, values, live: pallas_gpu.decode(x, keys, values, None, None, live, FEW),
        *(shape((8, 512), jnp.bfloat16), keys, keys, shape((), jnp.int32)),
    )
    assert text.count("@__gpu$xla.gpu.triton") == 2


def test_decode_of_what_its_kernel_cannot_take_is_the_projection():
    shape = jax.ShapeDtypeStruct
    keys = shape((100, 64), jnp.float32)
    assert pallas_gpu_decode.fits(shape((32, 64), jnp.float32), keys, FEW)
    assert not pallas_gpu_decode.fits(shape((33, 64), jnp.float32), keys, FEW)
    assert not pallas_gpu_decode.fits(shape((8, 64), jnp.float32), keys, FEW._replace(top_k=65))
    text = lowered(
        lambda *a: pallas_gpu.decode(*a, FEW),
        *(shape((8, 64), jnp.float32), keys, keys, keys, keys, shape((), jnp.int32)),
    )
    assert text.count("@__gpu$xla.gpu.triton") == 1
