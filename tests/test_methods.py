"""Methods as compositions: the gate axes, the bank, fresh experts, boundaries, and what a config may not say."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax.errors import MoraError
from mora_jax.methods import bank as banks
from mora_jax.methods import boundaries, gates
from mora_jax.methods.boundaries import BOUNDARIES
from mora_jax.methods.initializers import INITIALIZERS
from mora_jax.methods.method import EXPERTS, Method, from_config
from mora_jax.methods.presets import PRESETS, preset
from mora_jax.ops.gated_projection import compiling_for

SITES = {
    ("layers", "attn", "q"): banks.Site(layers=2, d_in=6, d_out=5),
    ("layers", "mlp", "down"): banks.Site(layers=2, d_in=5, d_out=6),
}


# Unoptimised code compiles twice as fast.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


def make(name: str = "mora", **changes) -> Method:
    return from_config({**preset(name), "targets": "attn/q,mlp/.*", "capacity_bucket": 4} | changes)


def full(method: Method, task: int, seed: int = 7) -> dict:
    """Fresh experts whose values are not zero."""
    fresh = banks.new_fresh(SITES, method, seed, task)
    return jax.tree.map(lambda a: a + jnp.sin(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), fresh)


def same(a, b) -> None:
    """Equal trees, bit by bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


# ---------------------------------------------------------------- gate axes, by hand

Z = np.array([[3.0, -4.0, 0.0, 0.0]], np.float32)  # the last expert does not exist
EXISTS = np.array([[True, True, True, False]])
E = np.exp


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("self", [0.6, -0.8, 0.0]),
        ("absolute", [0.6, 0.8, 0.0]),
        ("raw", [3.0, -4.0, 0.0]),
        ("constant", [1.0, 1.0, 1.0]),
    ],
)
def test_scores(score, expected):
    np.testing.assert_allclose(gates.SCORES[score](Z)[0, :3], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("select", "top_k", "s", "expected"),
    [
        ("all", 1, [0.6, -0.8, 0.0, 9.0], [1, 1, 1, 0]),
        ("top_k", 1, [0.6, -0.8, 0.0, 9.0], [1, 0, 0, 0]),
        ("top_k", 2, [0.6, -0.8, 0.0, 9.0], [1, 0, 1, 0]),
        ("top_k", 3, [0.6, -0.8, 0.0, 9.0], [1, 1, 1, 0]),
        ("top_k", 9, [0.6, -0.8, 0.0, 9.0], [1, 1, 1, 0]),
        ("top_k", 2, [0.5, 0.5, 0.5, 0.5], [1, 1, 0, 0]),  # lowest index first
    ],
)
def test_selectors(select, top_k, s, expected):
    kept = gates.SELECTORS[select](jnp.array([s]), EXISTS, make(top_k=top_k))
    np.testing.assert_array_equal(kept, np.array([expected], bool))


@pytest.mark.parametrize(
    ("normalise", "expected"),
    [
        ("none", [1.0, 0.0, 1.0, 0.0]),
        ("softmax", [E(1.2) / (E(1.2) + 1), 0.0, 1 / (E(1.2) + 1), 0.0]),
        ("softmax_before", [E(1.2) / (E(1.2) + E(-1.6) + 1), 0.0, 1 / (E(1.2) + E(-1.6) + 1), 0.0]),
        ("sigmoid", [1 / (1 + E(-0.6)), 0.0, 0.5, 0.0]),
    ],
)
def test_normalisers(normalise, expected):
    """Scores 0.6, -0.8, 0 with the middle one dropped, at temperature 1/2."""
    kept = np.array([[True, False, True, False]])
    s = jnp.array([[0.6, -0.8, 0.0, 0.0]])
    found = gates.NORMALISERS[normalise](s, EXISTS, kept, make(temperature=0.5))
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("z", "threshold", "mode", "open_"),
    [
        ([3.0, -4.0, 0.0, 0.0], 0.0, "absolute", [1, 1, 1, 0]),  # off: negative scores stay
        ([3.0, -4.0, 0.0, 0.0], 0.5, "absolute", [1, 0, 0, 0]),
        ([3.0, -4.0, 0.0, 0.0], 0.7, "absolute", [0, 0, 0, 0]),
        ([3.0, 4.0, 2.5, 0.0], 0.7, "relative", [1, 1, 0, 0]),
        ([-3.0, -4.0, -1.0, 0.0], 0.7, "relative", [0, 0, 0, 0]),  # no positive score: no expert
    ],
)
def test_the_threshold_closes_gates_without_renormalising(z, threshold, mode, open_):
    method = make(top_k=3, temperature=0.5, threshold_mode=mode)
    whole = gates._compose(jnp.array([z]), EXISTS, method, 0.0)
    found = gates._compose(jnp.array([z]), EXISTS, method, threshold)
    np.testing.assert_array_equal(found, whole * np.array([open_]))


def one_site(seed: int = 0, tokens: tuple[int, ...] = (2, 5)):
    """x, a bank of 7 rows with 4 live, and 3 fresh experts."""
    rng = np.random.default_rng(seed)
    x, keys, values, fk, fv = (
        jnp.array(rng.normal(size=s), jnp.float32) for s in ((*tokens, 6), (7, 6), (7, 5), (3, 6), (3, 5))
    )
    return x, {"keys": keys, "values": values, "live": jnp.int32(4)}, {"keys": fk, "values": fv}


@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("top_k", [2, 20])
def test_the_composition_of_moras_axes_equals_the_fused_op(monkeypatch, taught, top_k):
    x, bank, fresh = one_site()
    method = make(top_k=top_k, temperature=0.1)
    assert gates._is_fused(method)

    def everything(x, bank, fresh):
        def loss(x, bank, fresh):
            y = gates.update(x, bank, fresh, method)
            return jnp.sum(jnp.cos(y)), y

        (_, y), slopes = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True, allow_int=True)(x, bank, fresh)
        slopes[1].pop("live")
        return y, gates.gates(x, bank, fresh, method), slopes

    fresh = fresh if taught else None
    fused = quick(everything)(x, bank, fresh)
    monkeypatch.setattr(gates, "_is_fused", lambda method: False)
    composed = quick(lambda *a: everything(*a))(x, bank, fresh)
    assert jnp.abs(fused[0]).max() > 0
    if taught:
        assert not np.any(fused[2][1]["keys"])
        assert not np.any(composed[2][1]["keys"])
    else:  # no fresh rows: the op differentiates the bank, an adapted layer never does
        fused[2][1].clear()
        composed[2][1].clear()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * (1 + abs(b).max())), fused, composed
    )


def test_a_composed_self_score_ignores_a_zero_input_like_the_fused_op(monkeypatch):
    """DESIGN section 2: a zero input gives a zero output and a zero gradient."""
    x, bank, fresh = one_site()
    x = x.at[0, 1].set(0.0)
    monkeypatch.setattr(gates, "_is_fused", lambda method: False)
    slope = quick(jax.grad(lambda x: jnp.sum(gates.update(x, bank, fresh, make()))))(x)
    np.testing.assert_array_equal(slope[0, 1], 0.0)


@pytest.mark.parametrize(
    ("score", "normalise"),
    [(score, "softmax") for score in gates.SCORES]
    + [("constant", name) for name in gates.NORMALISERS if name != "softmax"],
)
def test_every_composition_adds_its_own_gates_times_responses(score, normalise):
    """Also where the score is constant: select and normalise still say what they say."""
    x, bank, fresh = one_site()
    method = make(score=score, normalise=normalise, top_k=2, threshold=0.0, scale=3.0)
    keys, values = (np.concatenate([bank[name], fresh[name]]) for name in ("keys", "values"))
    y, g = quick(lambda x: (gates.update(x, bank, fresh, method), gates.gates(x, bank, fresh, method)))(x)
    assert g.shape == (2, 5, 10)
    np.testing.assert_array_equal(g[..., 4:7], 0.0)  # allocated, not live
    assert (np.sum(np.asarray(g) > 0, axis=-1) <= 2).all()
    np.testing.assert_allclose(y, 3.0 * (g * (np.asarray(x) @ keys.T)) @ values, rtol=1e-4, atol=1e-4)


def test_plain_lora_adds_every_live_expert_at_full_strength():
    x, bank, fresh = one_site()
    a, b = (jnp.concatenate([bank[name][:4], fresh[name]]) for name in ("keys", "values"))
    for name in ("inc_lora", "seq_lora"):
        y = quick(partial(gates.update, method=make(name)))(x, bank, fresh)
        np.testing.assert_allclose(y, 2.0 * x @ a.T @ b, rtol=1e-4, atol=1e-5)


def test_the_threshold_acts_only_without_fresh_experts():
    x, bank, fresh = one_site()
    method = make(threshold=1.0)
    taught, asked = quick(lambda: [gates.update(x, bank, f, method) for f in (fresh, None)])()
    assert jnp.abs(taught).max() > 0
    np.testing.assert_array_equal(asked, 0.0)


# ---------------------------------------------------------------- bank


def test_push_writes_after_the_last_live_row_and_pop_takes_it_back():
    method = make(rank=2)
    bank = banks.empty(SITES, 6)
    first, second = full(method, 0), full(method, 1)
    once = banks.push(bank, first)
    twice = banks.push(once, second)
    for site in (("attn", "q"), ("mlp", "down")):
        b, f, s = (tree["layers"][site[0]][site[1]] for tree in (twice, first, second))
        for name in ("keys", "values"):
            np.testing.assert_array_equal(b[name][:, :2], f[name])
            np.testing.assert_array_equal(b[name][:, 2:4], s[name])
            np.testing.assert_array_equal(b[name][:, 4:], 0.0)
        np.testing.assert_array_equal(b["live"], [4, 4])
    back, taken = banks.pop(twice, 2)
    same(back, once)
    same(taken, second)
    back, taken = banks.pop(back, 2)
    same(back, bank)
    same(taken, first)


def test_layers_may_hold_different_numbers_of_live_rows():
    site = {("s",): banks.Site(layers=2, d_in=3, d_out=2)}
    bank, fresh = banks.empty(site, 4), banks.new_fresh(site, make(rank=1), 0, 0)
    bank["s"]["live"] = jnp.array([0, 2])
    pushed = banks.push(bank, fresh)
    np.testing.assert_array_equal(pushed["s"]["keys"][0, 0], fresh["s"]["keys"][0, 0])
    np.testing.assert_array_equal(pushed["s"]["keys"][1, 2], fresh["s"]["keys"][1, 0])
    same(banks.pop(pushed, 1), (bank, fresh))


def test_growing_adds_empty_rows_only():
    method = make(rank=2)
    bank = banks.push(banks.empty(SITES, 2), full(method, 0))
    grown = banks.grow(bank, 5)
    assert grown["layers"]["attn"]["q"]["keys"].shape == (2, 5, 6)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:, : a.shape[1]] if a.ndim == 3 else b), bank, grown)
    np.testing.assert_array_equal(grown["layers"]["attn"]["q"]["values"][:, 2:], 0.0)
    same(banks.grow(bank, 2), bank)
    same(banks.push(banks.grow(banks.empty(SITES, 2), 5), full(method, 0)), grown)


def test_fresh_experts_are_decided_by_seed_task_and_site_alone():
    method = make(rank=3)
    fresh = banks.new_fresh(SITES, method, seed=1, task=2)
    same(fresh, banks.new_fresh(SITES, method, seed=1, task=2))
    q = fresh["layers"]["attn"]["q"]["keys"]
    alone = {path: site for path, site in SITES.items() if path[-1] == "q"}
    np.testing.assert_array_equal(q, banks.new_fresh(alone, method, 1, 2)["layers"]["attn"]["q"]["keys"])
    others = [banks.new_fresh(SITES, method, seed, task) for seed, task in ((1, 3), (2, 2), (2, 1))]
    others.append(banks.new_fresh({("layers", "attn", "k"): SITES["layers", "attn", "q"]}, method, 1, 2))
    for other in others:
        (keys,) = (site["keys"] for site in other["layers"]["attn"].values())
        assert not np.any(keys == q)
    assert not np.any(q[0] == q[1])  # layers differ


def test_kaiming_keys_fill_their_bounds_and_values_are_zero():
    keys, values = INITIALIZERS["kaiming"](jax.random.key(0), 3, 8, 16, 5)
    assert (keys.shape, values.shape) == ((3, 8, 16), (3, 8, 5))
    assert keys.dtype == values.dtype == jnp.float32
    assert 0.24 < jnp.abs(keys).max() <= 0.25  # 1 / sqrt(16)
    assert abs(keys.mean()) < 0.02
    assert float(keys.var()) == pytest.approx(0.25**2 / 3, rel=0.1)
    np.testing.assert_array_equal(values, 0.0)


# ---------------------------------------------------------------- boundaries


@pytest.mark.parametrize(
    ("boundary", "live", "capacity"),
    [("append", [0, 3, 6, 9, 12, 15], [4, 4, 8, 12, 12, 16]), ("continue", [0, 3, 3, 3, 3, 3], [4] * 6)],
)
def test_capacity_and_live_rows_of_each_task(boundary, live, capacity):
    method = make(rank=3, boundary=boundary)
    assert [method.live_after(task) for task in range(-1, 5)] == live
    assert [method.capacity(task) for task in range(-1, 5)] == capacity
    frozen = make("zero_shot", rank=3, boundary=boundary)
    assert {frozen.live_after(task) for task in range(-1, 5)} == {0}
    assert {frozen.capacity(task) for task in range(-1, 5)} == {4}


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_stream_of_boundaries_holds_what_the_method_says(boundary):
    method = make(rank=3, boundary=boundary)
    bank = banks.empty(SITES, method.capacity(0))
    for task in range(4):
        before = bank
        bank, fresh = boundaries.append(method, SITES, bank, 5, task)
        if boundary == "continue" and task:
            same(fresh, banks.pop(before, 3)[1])
        else:
            same(fresh, banks.new_fresh(SITES, method, 5, task))
        assert bank["layers"]["attn"]["q"]["keys"].shape[1] == method.capacity(task)
        bank = boundaries.freeze(bank, fresh)
        np.testing.assert_array_equal(bank["layers"]["attn"]["q"]["live"], method.live_after(task))


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name):
    method = make(name)
    assert method.name == name
    assert hash(method) == hash(make(name))
    assert dataclasses.asdict(method).items() >= PRESETS[name].items()
    assert method.adapts("attn/q") == method.trains
    assert not method.adapts("attn/qk")
    assert bool(banks.new_fresh({p: s for p, s in SITES.items() if method.trains}, method, 0, 0)) == method.trains


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(MoraError, match=r"known: .*mora.*seq_lora"):
        preset("mola")


AXES = {"experts": EXPERTS, "score": gates.SCORES, "select": gates.SELECTORS, "normalise": gates.NORMALISERS}


@pytest.mark.parametrize("axis", [*AXES, "boundary", "init", "threshold_mode"])
def test_a_name_that_is_on_no_axis_lists_the_known_ones(axis):
    known = AXES.get(axis) or {"boundary": BOUNDARIES, "init": INITIALIZERS}.get(axis) or ("absolute", "relative")
    with pytest.raises(MoraError) as error:
        make(**{axis: "wobble"})
    assert f"method.{axis}='wobble'" in str(error.value)
    assert all(name in str(error.value).split("known: ")[1].split(", ") for name in known)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rank": 0}, "method.rank=0 must be at least 1"),
        ({"top_k": 0}, "method.top_k=0 must be at least 1"),
        ({"capacity_bucket": 0}, "method.capacity_bucket=0 must be at least 1"),
        ({"temperature": 0.0}, "method.temperature=0.0 must be greater than 0"),
        ({"temperature": float("nan")}, "method.temperature=nan must be greater than 0"),
        ({"threshold": -0.1}, "method.threshold=-0.1 must lie in 0..1"),
        ({"threshold": 1.5}, "method.threshold=1.5 must lie in 0..1"),
        ({"score": "constant"}, "contradicts method.score='constant'"),
        ({"targets": ""}, "method.targets is empty"),
        ({"targets": " , "}, "method.targets is empty"),
        ({"targets": "attn/("}, "'attn/(', which is not a regular expression"),
    ],
)
def test_impossible_values_are_refused_by_key(changes, says):
    with pytest.raises(MoraError) as error:
        make(**changes)
    assert says in str(error.value)


def test_a_kernel_that_is_not_here_lists_the_legal_ones():
    config = {**preset("mora"), "targets": "attn/q", "capacity_bucket": 4}
    with pytest.raises(MoraError, match=r"kernel='cuda' is unknown; legal: auto, xla, pallas"):
        from_config(config, kernel="cuda")
    with pytest.raises(MoraError, match=r"no kernel for platform 'cpu', only for gpu, tpu; legal here: auto, xla"):
        from_config(config, kernel="pallas")
    with compiling_for("tpu"):
        assert from_config(config, kernel="pallas").implementation == "pallas_tpu"


@pytest.mark.parametrize(
    ("boundary", "origins"),
    [("append", [[], [(0,)], [(0,), (1,)], [(0,), (1,), (2,)]]), ("continue", [[], [(0,)], [(0, 1)], [(0, 1, 2)]])],
)
def test_every_block_names_the_tasks_that_trained_it(boundary, origins):
    assert [make(boundary=boundary).origins(task) for task in range(-1, 3)] == origins


def test_mass_by_block():
    g = jnp.array([[0.5, 0.0, 0.25, 0.25, 0.125]])
    np.testing.assert_array_equal(gates.mass_by_block(g, 2), [[0.5, 0.5, 0.125]])
    np.testing.assert_array_equal(gates.mass_by_block(g, 5), [[1.125]])


def test_targets_choose_sites_by_whole_kind():
    params = {
        "layers": {"attn": {"q": {"kernel": np.zeros((2, 6, 5))}}, "mlp": {"down": {"kernel": np.zeros((2, 5, 6))}}}
    }
    kinds = {path: "/".join(path[1:]) for path in SITES}
    assert banks.find_sites(params, kinds, make(targets="attn/q, mlp/.*")) == SITES
    assert list(banks.find_sites(params, kinds, make(targets="mlp/down"))) == [("layers", "mlp", "down")]
    assert banks.find_sites(params, kinds, make("zero_shot", targets="nothing")) == {}
    with pytest.raises(MoraError, match="targets=attn,down matches no site of this model; its sites: attn/q, mlp/down"):
        banks.find_sites(params, kinds, make(targets="attn,down"))
