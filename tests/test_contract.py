"""What every preset promises on every model family: nothing changes but the fresh experts, and one trace is enough.

No accuracy is tested here. The mesh has one device; `test_distributed.py` has the others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from mora_jax import config as configs
from mora_jax.methods import bank as banks
from mora_jax.methods import boundaries
from mora_jax.methods.method import Method, from_config
from mora_jax.methods.presets import PRESETS
from mora_jax.models.decoder import REMAT, Decoder, causal_mask
from mora_jax.models.registry import load_model
from mora_jax.runtime.checkpoint import Checkpoints
from mora_jax.runtime.contrastive import ClipFamily
from mora_jax.runtime.distributed import AXES, abstract, place, place_batch
from mora_jax.runtime.family import Family
from mora_jax.runtime.language import LanguageFamily
from mora_jax.runtime.optimizer import make_optimizer
from mora_jax.runtime.state import TrainState, count_parameters
from mora_jax.runtime.step import Loss, TrainStep

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TAUGHT = [name for name, axes in PRESETS.items() if axes["experts"] != "none"]
# Unoptimised code compiles twice as fast.
FAST = {"xla_backend_optimization_level": "0"}
TASKS, STEPS, ROWS, LENGTH, CLASSES = 3, 2, 4, 16, 3


# ---------------------------------------------------------------- the model families


@dataclasses.dataclass(frozen=True)
class Tiny:
    """The tiny model of a family: its config, its family on a mesh, the sites that it adapts here, and what goes in.

    batch(family, rng) is a batch for the loss. model(family) is the module, and forward(module, variables, batch) what
    it makes of a batch, [rows, ...].
    """

    config: str
    overrides: dict[str, str]
    family: Callable[..., Family]
    sites: set[str]
    batch: Callable[[Any, np.random.Generator], dict[str, np.ndarray]]
    model: Callable[[Any], Any]
    forward: Callable[[Any, Any, dict[str, Any]], jax.Array]


def random_text(family: LanguageFamily, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random tokens; every row has another prompt and another length."""
    prompt = rng.integers(2, 8, ROWS).astype(np.int32)
    tokens = rng.integers(0, family.decoder.config.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    length = np.minimum(prompt + rng.integers(1, 9, ROWS), LENGTH).astype(np.int32)
    return {"tokens": tokens, "prompt": prompt, "length": length, "answers": np.arange(8, dtype=np.int32)[None]}


def random_pictures(family: ClipFamily, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random pictures and texts; the last class is padding."""
    text, side = family.sizes.text, family.sizes.vision.image_size
    texts = rng.integers(0, text.eos_id, (CLASSES + 1, LENGTH)).astype(np.int32)
    texts[np.arange(CLASSES + 1), rng.integers(4, LENGTH, CLASSES + 1)] = text.eos_id
    return {
        "pictures": rng.integers(0, 256, (ROWS, side, side, 3)).astype(np.uint8),
        "labels": rng.integers(0, CLASSES, ROWS).astype(np.int32),
        "texts": texts,
        "classes": np.array([CLASSES], np.int32),
    }


def hidden_states(decoder: Decoder, variables: Any, batch: dict[str, Any]) -> jax.Array:
    tokens = batch["tokens"]
    positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], tokens.shape)
    return decoder.apply(variables, tokens, positions, causal_mask(LENGTH))[0]


FAMILIES = {
    "decoder": Tiny(
        "llm_cl.py:smoke",
        {},
        LanguageFamily,
        {"attn/q", "attn/k", "attn/v", "attn/o"},
        random_text,
        lambda family: family.decoder,
        hidden_states,
    ),
    "clip": Tiny(
        "clip_cl.py:smoke",
        {"method.targets": "vision/attn/o,text/mlp/up", "method.rank": "8"},  # fewer sites compile faster
        lambda *arguments: ClipFamily(*arguments, tasks=()),
        {"vision/attn/o", "text/mlp/up"},
        random_pictures,
        lambda family: family.clip,
        lambda clip, variables, batch: clip.apply(variables, batch["pictures"], batch["texts"]),
    ),
}


@functools.cache
def loaded(name: str, dtype: str) -> Any:
    return load_model({"name": name, "weights": "", "dtype": dtype}, 0)


@dataclasses.dataclass
class Bench:
    """A preset on the tiny model of a family, as `train.py` builds it; k is small, because its rounds are compiled."""

    tiny: Tiny
    method: Method
    config: Any
    family: Any
    sites: banks.Sites
    mesh: Mesh
    apply: Callable

    @classmethod
    @functools.cache
    def of(cls, name: str, kind: str = "decoder", dtype: str = "float32") -> Bench:
        tiny = FAMILIES[kind]
        overrides = {"model.dtype": dtype, "method.top_k": "2", **tiny.overrides}
        config = configs.load(f"{CONFIGS}/{tiny.config},method={name}", overrides)
        mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)
        method = from_config(config.method, config.kernel)
        family = tiny.family(loaded(config.model.name, dtype), method, config, mesh)
        sites = banks.find_sites(family.params, family.site_kinds, method)
        # Without the threshold, which acts where no fresh experts are.
        model = tiny.model(family).clone(method=dataclasses.replace(method, threshold=0.0))
        apply = jax.jit(functools.partial(tiny.forward, model), compiler_options=FAST)
        return cls(tiny, method, config, family, sites, mesh, apply)

    def batch(self, seed: int) -> dict[str, Any]:
        return place_batch(self.mesh, self.tiny.batch(self.family, np.random.default_rng(seed)))

    def first_task(self, fewer_sites: bool = False) -> tuple[Any, Any]:
        """An empty bank and the fresh experts of task 0; fewer sites compile faster."""
        sites = {path: site for path, site in self.sites.items() if not fewer_sites or path[-1] == "o"}
        return boundaries.append(self.method, sites, banks.empty(sites, self.method.capacity(0)), self.config.seed, 0)

    def hidden(self, **collections: Any) -> np.ndarray:
        """What the model makes of a batch with these collections beside the parameters."""
        return np.asarray(self.apply({"params": self.family.params, **collections}, self.batch(99)))


def hidden_dtype(b: Bench, variables: Any) -> Any:
    """Of what leaves the adapted layers: points of CLIP are float32 whatever they are made of."""
    batch = b.batch(0)
    if b.tiny is FAMILIES["decoder"]:
        return jax.eval_shape(functools.partial(hidden_states, b.family.decoder), variables, batch).dtype
    encode = functools.partial(b.family.clip.apply, method=lambda clip, pictures: clip.vision(pictures))
    return jax.eval_shape(encode, variables, batch["pictures"]).dtype


def train_step(loss: Loss, optimizer: optax.GradientTransformation, schedule: str, rate: float) -> TrainStep:
    """The train step, quickly compiled."""
    with mock.patch.object(jax, "jit", functools.partial(jax.jit, compiler_options=FAST)):
        return TrainStep(loss, optimizer, schedule, rate)


def frozen_copy(tree: Any) -> Any:
    """The values now: buffers that are donated later do not change it."""
    return jax.tree.map(lambda a: np.array(a, copy=True), tree)


def same(a: Any, b: Any) -> None:
    """Equal trees, bit by bit, in structure, type and value."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module", params=[(name, kind) for kind in FAMILIES for name in TAUGHT], ids="-".join)
def bench(request) -> Bench:
    return Bench.of(*request.param)


# ---------------------------------------------------------------- the frozen model


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", PRESETS)
def test_an_empty_bank_is_the_frozen_model_exactly(name, kind):
    b = Bench.of(name, kind)
    frozen = b.hidden()
    bank = banks.empty(b.sites, b.method.capacity(0))
    np.testing.assert_array_equal(b.hidden(bank=bank), frozen)
    if b.method.trains:  # values start at zero
        bank, fresh = b.first_task()
        np.testing.assert_array_equal(b.hidden(bank=bank, fresh=fresh), frozen)


@pytest.mark.parametrize("kind", FAMILIES)
def test_zero_shot_has_nothing_to_train(kind):
    b = Bench.of("zero_shot", kind)
    assert b.sites == {}
    assert not b.method.trains
    assert count_parameters(banks.new_fresh(b.sites, b.method, 0, 0)) == 0
    assert count_parameters(banks.empty(b.sites, b.method.capacity(0))) == 0


def test_every_adapted_site_gets_its_block_in_every_layer(bench):
    fresh = banks.new_fresh(bench.sites, bench.method, 0, 0)
    assert {bench.family.site_kinds[path] for path in bench.sites} == bench.tiny.sites
    sizes = [site.layers * bench.method.rank * (site.d_in + site.d_out) for site in bench.sites.values()]
    assert count_parameters(fresh) == sum(sizes)


# ---------------------------------------------------------------- a stream


def blocks_of(bank: Any, live: int) -> Any:
    """The first `live` rows of keys and values at every site."""
    return jax.tree.map(lambda a: np.asarray(a)[:, :live] if a.ndim == 3 else None, bank)


def test_a_stream_moves_only_fresh_experts_and_is_traced_once(bench):
    b, method = bench, bench.method
    optimizer = make_optimizer(b.config.train)
    step = train_step(b.family.loss, optimizer, b.config.train.schedule, b.config.train.learning_rate)
    params = frozen_copy(b.family.params)
    horizon = place(b.mesh, jnp.float32(STEPS))
    bank = place(b.mesh, banks.empty(b.sites, method.capacity(0)))
    assert method.capacity(0) == method.capacity(TASKS - 1)  # or a second trace would be right

    for task in range(TASKS):
        # append: new rows beside the old ones, or the last block back
        before, old = bank, method.live_after(task - 1)
        bank, fresh = boundaries.append(method, b.sites, bank, b.config.seed, task)
        if method.boundary == "append":
            same(bank, before)
            same(fresh, banks.new_fresh(b.sites, method, b.config.seed, task))
        elif task:
            for name in ("keys", "values"):
                for path in b.sites:
                    node, given = before, fresh
                    for part in path:
                        node, given = node[part], given[part]
                    np.testing.assert_array_equal(given[name], node[name][:, old - method.rank : old])

        # teach
        bank = place(b.mesh, bank)
        state = place(b.mesh, TrainState.create(fresh, optimizer))
        bank_then, start = frozen_copy(bank), frozen_copy(state)
        for i in range(STEPS):
            state, metrics = step(state, b.family.params, bank, horizon, b.batch(10 * task + i))
            assert np.isfinite(metrics["loss"])
            assert metrics["grad_norm"] > 0
        same(bank, bank_then)
        same(b.family.params, params)
        assert state.step == STEPS
        assert jax.tree.structure(state) == jax.tree.structure(start)
        for moved, was in zip(jax.tree.leaves(state.fresh), jax.tree.leaves(start.fresh), strict=True):
            assert moved.dtype == jnp.float32
            assert not np.array_equal(moved, was)

        # freeze: the same model, with the experts in the bank
        taught = b.hidden(bank=bank, fresh=state.fresh)
        frozen = boundaries.freeze(bank, state.fresh)
        np.testing.assert_allclose(b.hidden(bank=frozen), taught, atol=5e-6)  # the sums run in another order
        assert not np.array_equal(taught, b.hidden())
        kept = method.live_after(task) - method.rank
        same(blocks_of(frozen, kept), blocks_of(bank, kept))
        bank = place(b.mesh, frozen)
    assert step.traces == 1


def test_the_learning_rate_follows_the_schedule_of_its_task(bench):
    """The horizon is data: another number of steps is not another trace."""
    b, optimizer = bench, make_optimizer(bench.config.train)
    step = train_step(
        lambda variables, batch: sum(map(jnp.sum, jax.tree.leaves(variables["fresh"]))), optimizer, "linear", 0.5
    )
    bank, fresh = b.first_task(fewer_sites=True)
    for steps in (2, 4):
        state, rates = TrainState.create(jax.tree.map(jnp.copy, fresh), optimizer), []
        for _ in range(steps):
            state, metrics = step(state, {}, bank, jnp.float32(steps), {})
            rates.append(float(metrics["learning_rate"]))
        np.testing.assert_allclose(rates, 0.5 * (1 - np.arange(steps) / steps), rtol=1e-6)
    assert step.traces == 1


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_gives_back_every_bit(bench, tmp_path):
    b, optimizer = bench, make_optimizer(bench.config.train)
    rng = np.random.default_rng(0)

    def noise(tree: Any) -> Any:
        """Numbers that no initialisation gives, subnormal and negative zero among them."""
        drawn = jax.tree.map(lambda a: np.asarray(rng.normal(size=a.shape) * 100).astype(a.dtype), tree)
        for leaf in jax.tree.leaves(drawn):
            if leaf.dtype == np.float32:
                leaf.reshape(-1)[:2] = (-0.0, 1e-42)
        return drawn

    def make() -> dict[str, Any]:
        bank, fresh = b.first_task()
        return {"bank": bank, "state": dict(vars(TrainState.create(fresh, optimizer)))}

    arrays = place(b.mesh, noise(make()))
    meta = {"step": 3, "task": 0, "phase": "training"}
    Checkpoints(tmp_path, keep=2).save(arrays, meta)
    restored = Checkpoints(tmp_path, keep=2).restore(lambda meta: abstract(b.mesh, jax.eval_shape(make)))
    assert restored is not None
    assert restored[0] == meta
    bits = [[np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)] for tree in (restored[1], arrays)]
    assert bits[0] == bits[1]
    same(restored[1], arrays)
    TrainState(**restored[1]["state"])


# ---------------------------------------------------------------- recomputation and narrow weights


def test_what_the_backward_pass_recomputes_changes_no_number():
    """Of CLIP: test_clip.py."""
    b = Bench.of("mora")
    bank, fresh = b.first_task(fewer_sites=True)
    fresh = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.shape[-1]), a.shape), fresh)
    bank, batch = banks.push(bank, fresh), b.batch(0)
    fresh = jax.tree.map(lambda a: -0.7 * a, fresh)
    found = {}
    for remat in REMAT:
        config = b.config.copy_and_resolve_references()
        config.model.remat = remat
        family = b.tiny.family(loaded(config.model.name, "float32"), b.method, config, b.mesh)

        def loss(fresh, family=family):
            return family.loss({"params": b.family.params, "bank": bank, "fresh": fresh}, batch)

        found[remat] = jax.jit(jax.value_and_grad(loss), compiler_options=FAST)(fresh)
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(found["none"][1])) > 1e-3
    for remat in found:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found[remat], found["none"])


def test_the_loss_counts_answer_tokens_only():
    """What stands in the prompt's labels or after the end of a row moves nothing; an answer token does."""
    b = Bench.of("zero_shot")
    rng = np.random.default_rng(0)
    rows = {"tokens": rng.integers(0, 256, (2, 12)), "prompt": np.array([4, 5]), "length": np.array([7, 9])}
    rows = {name: value.astype(np.int32) for name, value in rows.items()} | {
        "answers": np.arange(6, dtype=np.int32)[None]
    }
    loss = jax.jit(lambda batch: b.family.loss({"params": b.family.params}, batch), compiler_options=FAST)
    whole = loss(rows)

    tokens, params = rows["tokens"], {"params": b.family.params}
    positions = np.broadcast_to(np.arange(12)[None], (2, 12))
    hidden, _ = b.family.decoder.apply(params, tokens, positions, causal_mask(12))
    logits = np.asarray(b.family.decoder.apply(params, hidden, method=Decoder.logits), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    by_hand = [log_p[r, i - 1, tokens[r, i]] for r, (p, n) in enumerate(((4, 7), (5, 9))) for i in range(p, n)]
    assert float(whole) == pytest.approx(-np.mean(by_hand), rel=1e-5)

    after = tokens.copy()
    after[0, 7:], after[1, 9:] = 3, 250
    assert loss(rows | {"tokens": after}) == whole
    after[1, 8] += 1
    assert loss(rows | {"tokens": after}) != whole


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_bfloat16_model_trains_float32_experts(kind):
    b = Bench.of("mora", kind, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(b.family.params)} == {jnp.dtype(jnp.bfloat16)}
    bank, fresh = b.first_task(fewer_sites=True)
    variables = {"params": b.family.params, "bank": bank, "fresh": fresh}
    assert hidden_dtype(b, variables) == jnp.bfloat16
    optimizer = make_optimizer(b.config.train)
    step = train_step(b.family.loss, optimizer, "constant", 1e-2)
    state, losses = place(b.mesh, TrainState.create(fresh, optimizer)), []
    bank, horizon = place(b.mesh, bank), place(b.mesh, jnp.float32(4))
    for _ in range(4):
        state, metrics = step(state, b.family.params, bank, horizon, b.batch(0))
        losses.append(float(metrics["loss"]))
        assert metrics["loss"].dtype == jnp.float32
    assert losses[-1] < losses[0]
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype(jnp.float32)}
    assert all(np.isfinite(leaf).all() for leaf in floats)
