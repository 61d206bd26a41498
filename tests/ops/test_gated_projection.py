"""The gated projection: every implementation against the paper's equations in NumPy, in value and gradient.

The equations are in paper.py, written apart from `reference.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from functools import partial
from typing import Any
from unittest import mock

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from paper import paper

from mora_jax.ops.gated_projection import gated_projection, gates, xla, xla_gathered

PATHS = {"xla dense": False, "xla gathered": True}  # xla takes one or the other by the sizes; here both see all sizes
EVERY = ["reference", *PATHS]
GAP = 1e-5  # implementations agree on the kept experts where the k-th and the next score differ by more


def test_the_specification_has_the_gradients_of_its_own_values(rng):
    x, keys, values, dy = (rng.normal(size=s) for s in ((3, 5), (6, 5), (6, 4), (3, 4)))
    alive, how = np.array([1, 1, 0, 1, 1, 1], bool), {"top_k": 3, "temperature": 0.3, "threshold": 0.2}
    _, _, *slopes, _ = paper(x, keys, values, alive, dy, **how)
    for i, (array, slope) in enumerate(zip((x, keys, values), slopes, strict=True)):
        for at in np.ndindex(array.shape):
            sides = []
            for step in (1e-6, -1e-6):
                moved = [x.copy(), keys.copy(), values.copy()]
                moved[i][at] += step
                sides.append(np.sum(paper(*moved, alive, dy, **how)[0] * dy))
            assert slope[at] == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-7)


# ---------------------------------------------------------------- the grid


@contextlib.contextmanager
def implemented_by(name: str):
    """Options of the op that have it computed by `name`, one of EVERY; while something is traced."""
    if name not in PATHS:
        yield {"implementation": name}
        return
    with mock.patch.object(xla_gathered, "pays", return_value=PATHS[name]):
        yield {"implementation": "xla"}


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and settings; `live` None means all, `r` 0 means no fresh rows."""

    k: int = 4
    n: int = 9
    r: int = 3
    live: int | None = None
    tokens: tuple[int, ...] = (7,)
    d_in: int = 12
    d_out: int = 10
    tau: float = 0.05
    threshold: float = 0.0
    mode: str = "absolute"
    dtype: str = "float32"

    @property
    def how(self) -> dict[str, Any]:
        return {"top_k": self.k, "temperature": self.tau, "threshold": self.threshold, "threshold_mode": self.mode}

    @property
    def alive(self) -> np.ndarray:
        live = self.n if self.live is None else self.live
        return np.concatenate([np.arange(self.n) < live, np.ones(self.r, bool)])


CASES = {
    "plain": Case(),
    "no fresh": Case(r=0),
    "paper": Case(k=8, n=24, r=8, tau=0.03),
    "one token, widens": Case(tokens=(1,), d_in=5, d_out=16),
    "three axes": Case(tokens=(2, 3), r=0),
    "one expert": Case(k=1, n=1, r=0),
    "one expert, k above": Case(k=3, n=1, r=0),
    "k 1": Case(k=1),
    "k all": Case(k=12),
    "last k by rounds": Case(k=16, n=32, r=8),
    "first k by descent": Case(k=17, n=32, r=8),
    "descent to negative scores": Case(k=31, n=40, r=0),
    "descent, few live": Case(k=31, n=40, r=0, live=5),
    "live 0": Case(live=0),
    "live 0, no fresh": Case(live=0, r=0),
    "live 4": Case(live=4),
    "live 2 below k": Case(live=2, r=0),
    "threshold absolute": Case(threshold=0.3),
    "threshold relative": Case(k=6, r=0, threshold=0.6, mode="relative"),
    "threshold by descent": Case(k=17, n=20, threshold=0.2),
    "all below": Case(threshold=1.0),
    "bfloat16": Case(dtype="bfloat16"),
    "bfloat16, no fresh, descent, threshold": Case(k=17, n=32, r=0, threshold=0.2, dtype="bfloat16"),
}


def arrays(case: Case, seed: int = 0, whole: bool = False) -> list[np.ndarray]:
    """x, keys, values, fresh keys, fresh values, dy; `whole` draws small integers, whose responses are exact."""
    rng = np.random.default_rng(seed)
    shapes = [(*case.tokens, case.d_in), (case.n, case.d_in), (case.n, case.d_out)]
    shapes += [(case.r, case.d_in), (case.r, case.d_out), (*case.tokens, case.d_out)]
    if whole:
        return [rng.integers(-2, 3, s).astype(np.float32) for s in shapes]
    drawn = [rng.normal(size=s).astype(np.float32) for s in shapes]
    return [np.asarray(a.astype(jnp.dtype(case.dtype)), np.float32) if i in (0, 5) else a for i, a in enumerate(drawn)]


# Unoptimised code compiles twice as fast, and compiling is what these tests spend their time on.
FAST = {"xla_backend_optimization_level": "0"}


@partial(jax.jit, static_argnames=("dtype", "implementation", "how"), compiler_options=FAST)
def run(x, keys, values, fresh_keys, fresh_values, dy, live, *, dtype, implementation, how):
    """(y, g, cotangents of the first five arrays), with `live` traced."""
    x, dy = x.astype(dtype), dy.astype(dtype)

    def op(function, x, keys, values, fk, fv):
        fresh = {"fresh_keys": fk, "fresh_values": fv} if len(fk) else {}
        with implemented_by(implementation) as named:
            return function(x, keys, values, **fresh, **named, **dict(how), live=live)

    y, vjp = jax.vjp(partial(op, gated_projection), x, keys, values, fresh_keys, fresh_values)
    return y, op(gates, x, keys, values, fresh_keys, fresh_values), vjp(dy)


def run_case(case: Case, implementation: str, data: list[np.ndarray]) -> list[np.ndarray]:
    """y, g, dx, d_keys, d_values, d_fresh_keys, d_fresh_values, tokens flattened, in float32."""
    live = np.int32(case.n if case.live is None else case.live)
    how = tuple(case.how.items())
    y, g, slopes = run(*data, live, dtype=case.dtype, implementation=implementation, how=how)
    assert y.dtype == slopes[0].dtype == jnp.dtype(case.dtype)
    assert (y.shape, g.shape) == ((*case.tokens, case.d_out), (*case.tokens, case.n + case.r))
    assert g.dtype == jnp.float32
    assert [s.shape for s in slopes] == [a.shape for a in data[:5]]
    flat = [a.reshape(-1, a.shape[-1]) for a in (y, g, slopes[0])]
    return [np.asarray(a, np.float32) for a in (*flat, *slopes[1:])]


def expect(case: Case, data: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """The same seven arrays from the paper, and the gap at rank k per token."""
    x, keys, values, fk, fv, dy = data
    keys, values = np.concatenate([keys, fk]), np.concatenate([values, fv])
    flat_x, flat_dy = x.reshape(-1, case.d_in), dy.reshape(-1, case.d_out)
    y, g, dx, dk, dv, gap = paper(flat_x, keys, values, case.alive, flat_dy, **case.how)
    frozen = 0.0 if case.r else 1.0  # with fresh rows the bank is a constant
    return [y, g, dx, dk[: case.n] * frozen, dv[: case.n] * frozen, dk[case.n :], dv[case.n :]], gap


def close(found, expected, dtype="float32"):
    """Element-wise, with the absolute tolerance in units of the largest element: sums cancel."""
    rtol = 1e-4 if dtype == "float32" else 1e-2
    scale = np.abs(expected).max(initial=1e-30)
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_paper(name, implementation):
    case, data = CASES[name], arrays(CASES[name])
    expected, gap = expect(case, data)
    assert gap.min() > GAP  # so that the kept experts are decided
    found = run_case(case, implementation, data)
    np.testing.assert_array_equal(found[1] > 0, expected[1] > 1e-38)
    for a, b in zip(found, expected, strict=True):
        close(a, b, case.dtype)
    if case.threshold == 1.0:
        np.testing.assert_array_equal(found[0], 0.0)
    if case.r:
        assert not found[3].any()
        assert not found[4].any()


@pytest.mark.parametrize("k", [1, 16, 17, 30])
def test_ties_keep_exactly_k_lowest_index_first_fresh_last(k):
    """Small integers make the responses exact and ties frequent; dead rows lie between the bank and the fresh ones."""
    case = Case(k=k, n=30, r=6, live=26, tokens=(40,), d_in=4, d_out=3, tau=0.5)
    data = arrays(case, whole=True)
    data[3][:3] = data[1][:3]  # fresh keys that equal bank keys
    expected, gap = expect(case, data)
    assert np.sum(gap == 0) > 5
    assert not np.any((gap > 0) & (gap < GAP))
    norm = np.linalg.norm(data[0], axis=1) > 0
    for implementation in EVERY:
        found = run_case(case, implementation, data)
        kept = found[1] > 0
        np.testing.assert_array_equal(kept[norm], expected[1][norm] > 0)
        assert (kept.sum(axis=1) == k).all()
        close(found[0], expected[0])
        close(found[5], expected[5])


def _kept_by_top(s, exists, k):
    index = xla_gathered.top(s, exists, k)[1]
    return jnp.zeros(s.shape, bool).at[index, jnp.arange(s.shape[1])[None]].set(True)


@pytest.mark.parametrize("select", [xla._kept_by_rounds, xla._kept_by_descent, _kept_by_top])
@pytest.mark.parametrize("k", range(1, 7))
def test_signed_zeros_are_equal_scores(select, k):
    s = np.array([[-0.0, 0.5, 0.0, -0.5, -0.0, -0.5, 0.5]], np.float32).T
    kept = np.argsort(-s[:, 0], kind="stable")[:k]
    assert sorted(kept) == np.flatnonzero(select(s, np.ones((7, 1), bool), k)).tolist()


@pytest.mark.parametrize(("k", "n", "tokens", "fresh"), [(8, 300, 40, 4), (2, 64, 3, 0), (20, 300, 3, 0)])
def test_a_large_bank_is_gathered_from_and_agrees(k, n, tokens, fresh):
    """The choice itself: nothing forced, with and without gradients; the last two are decoding."""
    case = Case(k=k, n=n, r=fresh, live=n - 5, tokens=(tokens,), threshold=0.02)
    assert xla_gathered.pays(tokens, n, fresh, k)
    data = arrays(case)
    expected, gap = expect(case, data)
    assert gap.min() > GAP
    for a, b in zip(run_case(case, "xla", data), expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("implementation", EVERY)
def test_live_rows_are_the_same_whether_concrete_traced_or_cut(implementation):
    case = Case(live=4)
    x, keys, values, fk, fv, _ = data = arrays(case)

    def outputs(**how):
        how |= {"fresh_keys": fk, "fresh_values": fv}
        with implemented_by(implementation) as named:
            return [gated_projection(x, keys[:n], values[:n], live=4, **named, **how) for n in (9, 4)]

    traced = run_case(case, implementation, data)[0]
    for y in jax.jit(partial(outputs, **case.how), compiler_options=FAST)():
        close(y, traced)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("case", [Case(n=20, live=6), Case(k=17, n=20, live=6, threshold=0.2)], ids=str)
def test_dead_rows_may_hold_any_finite_garbage(implementation, case):
    """Promised for finite rows whose products stay finite; NaN or inf in a dead row is outside the contract."""
    clean, dirty = arrays(case), arrays(case)
    for rows in (1, 2):
        dirty[rows][6:] = np.where(np.arange(dirty[rows].shape[1]) % 2, 1e30, -1e30)
        clean[rows][6:] = 0.0
    for a, b in zip(run_case(case, implementation, clean), run_case(case, implementation, dirty), strict=True):
        np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------- numbers at the edge


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("case", [Case(n=20), Case(k=17, n=20, threshold=0.2)], ids=str)
def test_zero_rows_give_zeros_and_nan_rows_give_nan_there_only(implementation, case):
    data = arrays(case)
    data[0][2] = 0.0
    data[0][3] *= np.float32(1e-16)  # below the floor: no direction, so responses are constants
    y, _, dx, _, _, d_keys, d_values = run_case(case, implementation, data)
    np.testing.assert_array_equal(y[2], 0.0)
    np.testing.assert_array_equal(dx[2:4], 0.0)
    assert all(np.isfinite(a).all() for a in (y, d_keys, d_values))

    data[0][5, 0] = np.nan
    broken_y, _, broken_dx, *_ = run_case(case, implementation, data)
    assert np.isnan(broken_y[5]).all()
    others = np.arange(7) != 5
    np.testing.assert_array_equal(broken_y[others], y[others])
    np.testing.assert_array_equal(broken_dx[others], dx[others])


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("size", [1e-8, 1e10])
def test_huge_and_tiny_inputs_keep_their_direction(implementation, size):
    case, data = Case(), arrays(Case())
    expected, _ = expect(case, data)
    data[0] *= np.float32(size)
    found = run_case(case, implementation, data)
    close(found[1], expected[1])
    close(found[0] / np.float32(size), expected[0])
    close(found[2], expected[2])
    close(found[5] / np.float32(size), expected[5])


# ---------------------------------------------------------------- what is not computed


@pytest.mark.parametrize("path", PATHS)
def test_frozen_rows_cost_no_gradient_and_nothing_is_sorted(path):
    tokens, d_in, d_out, n, r = 24, 20, 28, 40, 4
    case = Case(n=n, r=r, k=8, tokens=(tokens,), d_in=d_in, d_out=d_out)
    x, keys, values, fk, fv, dy = arrays(case)

    def loss(x, fk, fv, keys, values, implementation=path):
        with implemented_by(implementation) as named:
            how = {"fresh_keys": fk, "fresh_values": fv, "live": 30, **named, **case.how}
            return jnp.sum(gated_projection(x, keys, values, **how) * dy)

    step = jax.value_and_grad(loss, argnums=(0, 1, 2))
    text = jax.jit(step).lower(x, fk, fv, keys, values).compile().as_text()
    dense = [(tokens, d_out), (n + r, tokens)] if path == "xla dense" else []  # y, dc: of the chosen experts otherwise
    forward = [(n + r, tokens)]  # z
    backward = [(tokens, d_in), (r, d_in), (r, d_out)]  # dx, fresh keys, fresh values
    dots = re.findall(r"= \w+\[(\d+),(\d+)\]\S* (?:dot|custom-call)\(", text)
    assert sorted((int(a), int(b)) for a, b in dots) == sorted(forward + dense + backward)

    def words(**how):
        jaxpr = jax.make_jaxpr(jax.grad(partial(loss, **how), argnums=(1, 2)))(x, fk, fv, keys, values)
        return set(re.findall(r"\b(?:sort|top_k|approx_top_k)\b", str(jaxpr)))

    assert words() == set()
    assert words(implementation="reference") == {"sort"}  # so the search would find one
    assert "sort(" not in text


@pytest.mark.parametrize("path", PATHS)
def test_with_frozen_rows_alone_nothing_is_computed_for_them(path):
    """Inference, or a layer below one that learns: the gradient of x alone is asked for."""
    case = Case(n=40, r=0, k=8, tokens=(24,), d_in=20, d_out=28)
    x, keys, values, *_, dy = arrays(case)

    def loss(x, keys, values, dy):
        with implemented_by(path) as named:
            return jnp.sum(gated_projection(x, keys, values, **named, **case.how) * dy)

    text = jax.jit(jax.grad(loss)).lower(x, keys, values, dy).compile().as_text()
    dots = re.findall(r"= \w+\[(\d+),(\d+)\]\S* (?:dot|custom-call)\(", text)
    expected = [(40, 24), (24, 20), *([(40, 24)] if path == "xla dense" else [])]  # z, dx, dc
    assert sorted((int(a), int(b)) for a, b in dots) == sorted(expected)


# ---------------------------------------------------------------- properties


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    x=hnp.arrays(np.int8, (7, 12), elements=st.integers(-3, 3)),
    keys=hnp.arrays(np.int8, (23, 12), elements=st.integers(-3, 3)),
    k=st.sampled_from([4, 17]),
    live=st.integers(0, 20),
    fresh=st.booleans(),
    order=st.permutations(range(7)),
    implementation=st.sampled_from(EVERY),
)
def test_gates_are_a_sparse_mixture_that_sees_one_token_at_a_time(x, keys, k, live, fresh, order, implementation):
    case = Case(k=k, n=20, r=3 if fresh else 0, live=live)
    data = arrays(case)
    data[0], data[1], data[3] = (a.astype(np.float32) for a in (x, keys[:20], keys[20 : 20 + case.r]))
    y, g, *_ = run_case(case, implementation, data)
    exist = live + case.r
    assert (g >= 0).all()
    np.testing.assert_allclose(g.sum(axis=1), 1.0 if exist else 0.0, atol=1e-6)
    assert ((g > 0).sum(axis=1) <= min(k, exist)).all()
    np.testing.assert_array_equal(g[:, ~case.alive], 0.0)
    data[0] = data[0][list(order)]
    moved_y, moved_g, *_ = run_case(case, implementation, data)
    np.testing.assert_allclose(moved_g, g[list(order)], atol=1e-6)
    np.testing.assert_allclose(moved_y, y[list(order)], atol=1e-5)


# Few sizes, so that few programs are compiled; every setting meets every other one.
sweeps = st.builds(
    Case,
    k=st.sampled_from([1, 3, 18, 64]),
    n=st.sampled_from([1, 33]),
    r=st.sampled_from([0, 5]),
    live=st.sampled_from([0, 1]),
    tokens=st.sampled_from([(1,), (13,)]),
    tau=st.sampled_from([0.03, 1.0]),
    threshold=st.sampled_from([0.0, 0.2]),
    mode=st.sampled_from(["absolute", "relative"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)


@pytest.mark.parametrize("implementation", EVERY)
@hypothesis.settings(max_examples=8)
@hypothesis.given(case=sweeps, seed=st.integers(0, 99), size=st.sampled_from([1e-6, 1.0, 1e6]))
def test_sweeps_agree_with_the_paper_in_float64(implementation, case, seed, size):
    case = dataclasses.replace(case, live=case.n if case.live else case.n // 2)
    data = arrays(case, seed)
    data[0] = data[0] * np.float32(2.0 ** np.round(np.log2(size)))  # a power of two keeps bfloat16 exact
    expected, gap = expect(case, data)
    hypothesis.assume(gap.min() > GAP)
    found = run_case(case, implementation, data)
    for a, b in zip(found, expected, strict=True):
        close(a, b, case.dtype)
