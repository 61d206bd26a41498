"""The TPU kernels in interpret mode against the specification, in value and gradient."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # the only place that tells of races
from jax.experimental.pallas import tpu as pltpu

from mora_jax.errors import MoraError
from mora_jax.ops.gated_projection import compile_tpu, pallas_tpu, reference
from mora_jax.ops.gated_projection.pallas_tpu_gate import bf16_parts
from mora_jax.ops.gated_projection.shapes import SHAPES, TOP_K
from mora_jax.ops.gated_projection.tiles import TPU_VMEM, tpu_tiles
from mora_jax.ops.gated_projection.xla import Selection


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and settings; `live` None means all, `fresh` 0 none."""

    k: int = 4
    n: int = 16
    fresh: int = 3
    live: int | None = None
    tokens: int = 5
    d_in: int = 24
    d_out: int = 40
    threshold: float = 0.0
    mode: str = "absolute"
    dtype: str = "float32"
    bank: str = "float32"

    @property
    def how(self) -> Selection:
        return Selection(self.k, 0.05, self.threshold, self.mode)

    @property
    def exists(self) -> np.ndarray:
        live = self.n if self.live is None else self.live
        return np.concatenate([np.arange(self.n) < live, np.ones(self.fresh, bool)])


CASES = {
    "bfloat16": Case(dtype="bfloat16"),
    "bfloat16 bank": Case(dtype="bfloat16", bank="bfloat16"),
    "ragged tiles, blocks of experts, some dead": Case(k=17, n=300, fresh=5, live=200, tokens=300),
    "bfloat16, ragged, slices of columns": Case(tokens=130, n=130, d_in=384, d_out=384, dtype="bfloat16"),
    "k 1": Case(k=1, fresh=1),
    "k all": Case(k=19),
    "no fresh, k above padded rows": Case(k=40, fresh=0, n=9),
    "k above live": Case(k=9, live=2),
    "live 0": Case(live=0),
    "live 0, blocks, bank below": Case(live=0, n=260),
    "all below": Case(threshold=1.1),
    "threshold relative": Case(threshold=0.6, mode="relative", k=6),
    "relative, no positive score": Case(threshold=0.6, mode="relative", live=0, fresh=1),
}


# Unoptimised code compiles twice as fast, and compiling is what these tests spend their time on.
FAST = {"xla_backend_optimization_level": "0"}


def arrays(case: Case) -> list[jax.Array | None]:
    """x, keys, values, fresh keys, fresh values, dy."""
    rng = np.random.default_rng(0)
    sizes = [(case.tokens, case.d_in), (case.n, case.d_in), (case.n, case.d_out)]
    sizes += [(case.fresh, case.d_in), (case.fresh, case.d_out), (case.tokens, case.d_out)]
    drawn = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in sizes]
    dtypes = [case.dtype, case.bank, case.bank, "float32", "float32", case.dtype]
    drawn = [a.astype(dtype) for a, dtype in zip(drawn, dtypes, strict=True)]
    return [None if a.shape[0] == 0 else a for a in drawn]


@partial(jax.jit, static_argnums=(0, 1), compiler_options=FAST)
def expected(case: Case, op: str, x, keys, values, fresh_keys, fresh_values, dy):
    """(y, dx, d_fresh_keys, d_fresh_values) of the specification; without fresh rows (y, dx, d_keys, d_values)."""
    del op

    def run(x, a, b):
        rows, columns = (jnp.concatenate([keys, a]), jnp.concatenate([values, b])) if case.fresh else (a, b)
        return reference.gated_projection(x, rows, columns, jnp.asarray(case.exists), **case.how._asdict())

    y, vjp = jax.vjp(run, x, *((fresh_keys, fresh_values) if case.fresh else (keys, values)))
    return y, *vjp(dy)


@partial(jax.jit, static_argnums=(0, 1), compiler_options=FAST)
def found(case: Case, interpret, x, keys, values, fresh_keys, fresh_values, dy):
    live = jnp.int32(case.n if case.live is None else case.live)

    def run(x, a, b):
        rows = (keys, values, a, b) if case.fresh else (a, b, None, None)
        return pallas_tpu.project(x, *rows, live, case.how, interpret)

    y, vjp = jax.vjp(run, x, *((fresh_keys, fresh_values) if case.fresh else (keys, values)))
    return y, *vjp(dy)


@partial(jax.jit, static_argnums=(0, 1), compiler_options=FAST)
def decoded(case: Case, interpret, x, keys, values, fresh_keys, fresh_values, dy):
    del dy
    live = jnp.int32(case.n if case.live is None else case.live)
    return pallas_tpu.decode(x, keys, values, fresh_keys, fresh_values, live, case.how, interpret)


def close(a, b, dtype="float32"):
    """Element-wise, with the absolute tolerance in units of the largest element: sums cancel."""
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    a, b = (np.asarray(array, np.float32) for array in (a, b))
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.nanmax(np.abs(b), initial=1e-30))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_specification(name):
    case, data = CASES[name], arrays(CASES[name])
    for a, b in zip(found(case, True, *data), expected(case, "", *data), strict=True):
        close(a, b, case.dtype)


DECODED = [
    "k 1",
    "bfloat16",
    "bfloat16 bank",
    "no fresh, k above padded rows",
    "k above live",
    "live 0, blocks, bank below",
    "all below",
]


@pytest.mark.parametrize("name", DECODED)
def test_decoding_gives_the_same_values(name):
    case, data = CASES[name], arrays(CASES[name])
    close(decoded(case, True, *data), expected(case, "", *data)[0], case.dtype)


def odd_tokens(case: Case) -> list[jax.Array | None]:
    """Token 0 is zero, 1 tiny below the floor, 2 huge, 3 small, 4 has a NaN."""
    data = arrays(case)
    scale = jnp.asarray([0.0, 1e-16, 1e10, 1e-8, 1.0])[:, None]
    data[0] = (data[0] * scale).at[4, 0].set(jnp.nan)
    return data


@pytest.mark.parametrize("case", [Case(), Case(k=17, n=20, threshold=0.2)], ids=["few", "descent"])
def test_zero_tiny_huge_and_nan_tokens(case):
    data = odd_tokens(case)
    want = expected(case, "", *data)
    got = found(case, True, *data)
    for y in (got[0], decoded(case, True, *data)):
        assert np.isnan(y[4]).all()
        np.testing.assert_array_equal(y[0], 0.0)
        for token in range(4):
            close(y[token], want[0][token])
    np.testing.assert_array_equal(got[1][:2], 0.0)
    for token in (2, 3):
        close(got[1][token], want[1][token])
    data[0] = data[0].at[4].set(0.0)
    for a, b in zip(found(case, True, *data)[2:], got[2:], strict=True):
        assert np.isfinite(a).all()
        assert not np.isfinite(b).all()  # a NaN is told, not hidden


def test_of_equal_scores_exactly_k_are_kept_lowest_row_first():
    """Small integers have exact responses and many ties; the fresh rows repeat rows of the bank."""
    case, rng = Case(k=5, n=30, fresh=6, live=26, tokens=40, d_in=4), np.random.default_rng(1)
    data = [jnp.asarray(rng.integers(-2, 3, a.shape), jnp.float32) for a in arrays(case)]
    data[3] = data[1][:6]
    want = expected(case, "", *data)
    close(found(case, True, *data)[0], want[0])
    close(found(case, True, *data)[2], want[2])
    close(decoded(case, True, *data), want[0])


def test_dead_rows_may_hold_any_finite_garbage():
    case = Case(n=300, live=130, k=5)
    data = arrays(case)
    dirty = [*data[:1], *(a.at[130:].set(1e30) for a in data[1:3]), *data[3:]]
    for a, b in zip(found(case, True, *data), found(case, True, *dirty), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(decoded(case, True, *data), decoded(case, True, *dirty))


def test_three_parts_hold_all_bits_of_a_float32():
    a = jnp.asarray(np.random.default_rng(0).normal(size=(16, 128)) * 1e3, jnp.float32)
    parts = bf16_parts(a)
    assert [p.dtype for p in parts] == [jnp.bfloat16] * 3
    np.testing.assert_array_equal(sum(np.asarray(p, np.float64) for p in parts), np.asarray(a, np.float64))


# ---------------------------------------------------------------- races and bounds


@pytest.fixture
def checked():
    """Interpreting with copies that happen when they are waited for, uninitialised memory, bounds and race checks."""
    yield pltpu.InterpretParams(detect_races=True)
    pltpu.reset_tpu_interpret_mode_state()


RACING = Case(n=200, live=150, tokens=130, d_in=8, d_out=8, fresh=2)


def test_no_races_in_forward_and_backward(checked):
    data = arrays(RACING)
    for a, b in zip(found(RACING, checked, *data), expected(RACING, "", *data), strict=True):
        close(a, b)
    assert not races_found()


def test_no_races_in_decoding(checked):
    case = dataclasses.replace(RACING, tokens=3)
    close(decoded(case, checked, *arrays(case)), expected(case, "", *arrays(case))[0])
    assert not races_found()


def races_found() -> bool:
    return interpret_pallas_call.races.races_found


# ---------------------------------------------------------------- what runs where


def test_every_real_shape_has_tiles_and_other_dtypes_are_named():
    how = Selection(TOP_K, 0.05, 0.0, "absolute")
    for shape in SHAPES.values():
        x = jax.ShapeDtypeStruct((shape.tokens, shape.d_in), shape.dtype)
        keys, values = (jax.ShapeDtypeStruct((shape.experts, d), "float32") for d in (shape.d_in, shape.d_out))
        fresh = jax.ShapeDtypeStruct((shape.fresh, shape.d_in), "float32")
        assert pallas_tpu.unsupported(x, keys, values, fresh, how) is None
    assert pallas_tpu.unsupported(x.update(dtype=jnp.float16), keys, values, None, how) == (
        "x is float16, not float32 or bfloat16"
    )
    huge = jax.ShapeDtypeStruct((1 << 16, shape.d_in), "float32")
    assert "exceed VMEM" in pallas_tpu.unsupported(x, huge, values, None, how)


def test_tiles_divide_what_they_cut():
    for rows in (16, 144, 1040):
        for d in (576, 2048, 11008):
            tiles = tpu_tiles(16384, d, 4096, rows, 2, 16)
            assert d % tiles.inputs == 4096 % tiles.outputs == 0
            assert tiles.tokens in (128, 256, 512)
    assert TPU_VMEM < 64 << 20


def test_an_unknown_name_is_refused_before_anything_is_compiled():
    with pytest.raises(MoraError, match="unknown shape, kernel or target 'v9'; known: backward"):
        compile_tpu.rows(["target:forward:v9"])
