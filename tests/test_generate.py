"""Greedy decoding: a cache, batches, buckets and padding, none of which may change an answer; and the counted gates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from mora_jax.methods import bank as banks
from mora_jax.methods import boundaries
from mora_jax.methods.gates import ACTIVE
from mora_jax.methods.method import Method
from mora_jax.methods.presets import preset
from mora_jax.models.decoder import Decoder, causal_mask
from mora_jax.models.registry import LanguageModel, load_model
from mora_jax.runtime.distributed import AXES, make_mesh, place
from mora_jax.runtime.generate import GateCounts, Generation, Generator

NEVER = 300  # an id that the vocabulary of 258 does not have


class Spelling:
    """The tiny model's byte tokens, with answers spelt as ids: bytes that are no text would all decode alike."""

    def __init__(self, eos_id: int = NEVER, pad_id: int = 257, bos_id: int | None = 256):
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


class Counting(Generator):
    """Counts how often it is traced."""

    traces = 0

    def _generate(self, *arguments: Any, **options: Any) -> Any:
        self.traces += 1
        return super()._generate(*arguments, **options)


# 12 prompts; the lengths in bytes go from 0 over both sides of the first bucket (64 with BOS) into the second.
TEXT = "Which topic is this news article about: business, sports or tech? A goal in the last minute. Topic:"
PROMPTS = [TEXT[:n] for n in (30, 0, 63, 1, 64, 99, 7, 62, 2, 80, 15, 41)]
SHORT = [
    prompt for prompt in PROMPTS if len(prompt) < 64
]  # 9 prompts of the first bucket: two batches, one compilation
OPTIONS = {"max_prompt_tokens": 128, "max_new_tokens": 12, "batch_size": 8, "after_batch": lambda n: None}


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    """One device, which compiles fastest; what more of them do is a test of its own."""
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)


@pytest.fixture(scope="module")
def tiny(mesh: Mesh) -> LanguageModel:
    """The tiny model with ten times its weights, so that it does not answer one token all the time."""
    model = load_model({"name": "tiny", "weights": "", "dtype": "float32"}, 0)
    params = jax.tree.map(lambda leaf: leaf * (10.0 if leaf.ndim == 3 else 1.0), model.params)
    return dataclasses.replace(model, params=place(mesh, params))


@pytest.fixture(scope="module")
def generator(tiny: LanguageModel, mesh: Mesh) -> Counting:
    """Decodes without an end, for tests that do not need one of their own."""
    return Counting(Decoder(tiny.config), Spelling(), mesh)


@pytest.fixture(scope="module")
def run(generator: Counting, tiny: LanguageModel) -> Callable[..., Generation]:
    def call(prompts: Sequence[str], **options: Any) -> Generation:
        return generator({"params": tiny.params}, prompts, **(OPTIONS | options))

    return call


@pytest.fixture(scope="module")
def answers(run: Callable[..., Generation]) -> list[str]:
    """The 12 tokens that follow each prompt."""
    texts = run(PROMPTS).texts
    assert {len(text.split()) for text in texts} == {12}
    assert len(set(texts)) == len(PROMPTS)
    return texts


@partial(jax.jit, static_argnums=0)
def best(decoder: Decoder, variables: Any, tokens: jax.Array, length: jax.Array) -> jax.Array:
    t = tokens.shape[1]
    hidden, _ = decoder.apply(variables, tokens, jnp.arange(t)[None], causal_mask(t))
    return jnp.argmax(decoder.apply(variables, hidden[0, length - 1], method=Decoder.logits))


def recompute(decoder: Decoder, variables: Any, prompt: str, new: int) -> str:
    """Greedy decoding the slow way: no cache, no batch, no left padding, the whole prefix at every step."""
    start = [256, *prompt.encode()]
    ids = list(start)
    for _ in range(new):
        row = np.zeros((1, 160), np.int32)  # zeros stand behind the prefix, where no query looks
        row[0, : len(ids)] = ids
        ids.append(int(best(decoder, variables, row, len(ids))))
    return " ".join(map(str, ids[len(start) :]))


# --- answers ----------------------------------------------------------------------------------------------------------


def test_the_cache_changes_nothing(tiny: LanguageModel, answers: list[str]) -> None:
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer == recompute(Decoder(tiny.config), {"params": tiny.params}, prompt, 12)


def test_an_answer_beyond_the_first_answer_bucket(tiny: LanguageModel, run: Callable[..., Generation]) -> None:
    texts = run(PROMPTS[:2], max_new_tokens=45).texts
    assert texts[0] == recompute(Decoder(tiny.config), {"params": tiny.params}, PROMPTS[0], 45)


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_answers_do_not_depend_on_the_batch(
    batch_size: int, run: Callable[..., Generation], answers: list[str]
) -> None:
    """One at a time, batches that do not come out even, and all at once with room to spare."""
    assert run(PROMPTS, batch_size=batch_size).texts == answers


def test_answers_come_in_the_order_of_the_prompts(run: Callable[..., Generation]) -> None:
    order = np.random.default_rng(0).permutation(len(PROMPTS))
    shuffled = run([PROMPTS[i] for i in order]).texts
    assert shuffled == [run(PROMPTS).texts[i] for i in order]


def test_equal_prompts_have_equal_answers(run: Callable[..., Generation], answers: list[str]) -> None:
    mixed = [0, 0, 5, 0, 2, 0, 0, 5]
    assert run([PROMPTS[i] for i in mixed]).texts == [answers[i] for i in mixed]


def test_left_padding_changes_nothing(run: Callable[..., Generation], answers: list[str]) -> None:
    """A prompt alone is padded to 64; beside one of 99 bytes to 100 (the limit) or to 128."""
    for prompts, limit in ((PROMPTS[:1], 128), ([PROMPTS[0], PROMPTS[5]], 100), ([PROMPTS[0], PROMPTS[5]], 128)):
        assert run(prompts, max_prompt_tokens=limit).texts[0] == answers[0]


def test_the_padding_token_does_not_matter(tiny: LanguageModel, mesh: Mesh, run: Callable[..., Generation]) -> None:
    generate = Generator(Decoder(tiny.config), Spelling(pad_id=65), mesh)
    assert generate({"params": tiny.params}, SHORT, **OPTIONS).texts == run(SHORT).texts


@pytest.mark.parametrize("axes", [(8, 1, 1), (2, 2, 2)])
def test_the_mesh_does_not_matter(axes: tuple[int, ...], tiny: LanguageModel, mesh: Mesh) -> None:
    """Rows cut over 8 and over 4 devices, weights and bank whole and cut, and a batch that does not divide."""
    many = make_mesh(dict(zip(AXES, axes, strict=True)))
    how = method()
    variables = {"params": tiny.params, "bank": taught(tiny, how, 2)}
    generate = Generator(Decoder(tiny.config, how), Spelling(), many)
    for batch_size in (8, 6):
        cut = generate(place(many, jax.device_get(variables)), SHORT, **(OPTIONS | {"batch_size": batch_size}))
        whole = answer_with(tiny, mesh, how, 2)
        assert cut.gates.mass == pytest.approx(whole.gates.mass, rel=1e-5)  # summed in another order
        assert cut._replace(gates=cut.gates._replace(mass=whole.gates.mass)) == whole


def test_no_prompts(run: Callable[..., Generation]) -> None:
    assert run([]) == Generation([], 0, GateCounts(0, 0, 0))


def test_an_empty_prompt_without_bos_has_an_empty_answer(tiny: LanguageModel, mesh: Mesh) -> None:
    """There is nothing to continue; the row beside it is answered as ever."""
    generate = Generator(Decoder(tiny.config), Spelling(bos_id=None), mesh)
    empty, other = generate({"params": tiny.params}, ["", "abc"], **OPTIONS).texts
    assert len(other.split()) == 12
    assert empty == ""


# --- where an answer ends ---------------------------------------------------------------------------------------------


def test_an_answer_ends_before_eos(tiny: LanguageModel, mesh: Mesh, run: Callable[..., Generation]) -> None:
    """EOS is the third token of one answer: wherever it comes the text ends, and the others run on."""
    rows = [[int(word) for word in text.split()] for text in run(SHORT).texts]
    eos = rows[0][2]
    expected = [row[: row.index(eos)] if eos in row else row for row in rows]
    assert {12} < {len(row) for row in expected}
    generate = Generator(Decoder(tiny.config), Spelling(eos_id=eos), mesh)
    assert generate({"params": tiny.params}, SHORT, **OPTIONS).texts == [" ".join(map(str, row)) for row in expected]


def always(tiny: LanguageModel, token: int) -> dict[str, Any]:
    """Parameters with which `token` wins every step: layers add nothing, and its embedding is the largest."""
    params = jax.tree.map(jnp.zeros_like, tiny.params)
    embedding = jnp.ones((258, 32)).at[token].set(2.0)
    return params | {"embed": {"embedding": embedding}, "final_norm": {"scale": jnp.ones(32)}}


def test_eos_at_once_is_an_empty_answer(tiny: LanguageModel, mesh: Mesh) -> None:
    generate = Generator(Decoder(tiny.config), tiny.tokenizer, mesh)
    eos, letter = (always(tiny, token) for token in (257, tiny.tokenizer.encode("a")[0]))
    assert generate({"params": eos}, SHORT, **OPTIONS).texts == [""] * 9
    assert generate({"params": letter}, SHORT, **OPTIONS).texts == ["a" * 12] * 9


@pytest.mark.parametrize("new", [1, 2, 31, 32, 33])
def test_new_tokens_are_counted_exactly(new: int, tiny: LanguageModel, generator: Counting) -> None:
    texts = generator({"params": always(tiny, 97)}, PROMPTS[:3], **(OPTIONS | {"max_new_tokens": new})).texts
    assert texts == [" ".join(["97"] * new)] * 3


def test_a_limit_cuts_an_answer_and_changes_nothing_before(run: Callable[..., Generation], answers: list[str]) -> None:
    for new in (1, 5):
        assert run(PROMPTS, max_new_tokens=new).texts == [" ".join(answer.split()[:new]) for answer in answers]


# --- prompts that are too long ----------------------------------------------------------------------------------------


def test_long_prompts_lose_their_left_end_and_keep_bos(
    tiny: LanguageModel, run: Callable[..., Generation], answers: list[str]
) -> None:
    """32 tokens are BOS and 31 bytes."""
    cut = run(PROMPTS, max_prompt_tokens=32)
    assert cut.truncated == sum(len(prompt) > 31 for prompt in PROMPTS) == 6
    for text, prompt, answer in zip(cut.texts, PROMPTS, answers, strict=True):
        assert text == recompute(Decoder(tiny.config), {"params": tiny.params}, prompt[-31:], 12)
        assert (text == answer) == (len(prompt) <= 31)
    assert run(PROMPTS).truncated == 0


# --- progress and compilation -----------------------------------------------------------------------------------------


def test_progress_is_told_once_a_batch(run: Callable[..., Generation]) -> None:
    told: list[int] = []
    run(PROMPTS, batch_size=5, after_batch=told.append)
    assert told == [5, 5, 2]


def test_nothing_is_traced_twice(tiny: LanguageModel, mesh: Mesh) -> None:
    """One trace for each pair of buckets, whatever the prompts, their number and the number of new tokens."""
    generate = Counting(Decoder(tiny.config), Spelling(), mesh)
    variables = {"params": tiny.params}
    for prompts, new, traces in (
        (SHORT, 12, 1),
        (SHORT[:3], 12, 1),
        (SHORT[::-1], 3, 1),
        (PROMPTS, 12, 2),  # prompts of the next bucket
        (PROMPTS, 32, 2),
        (SHORT, 33, 3),  # answers of the next bucket
        (PROMPTS, 1, 3),
    ):
        generate(variables, prompts, **(OPTIONS | {"max_new_tokens": new}))
        assert (generate.traces, generate._run._cache_size()) == (traces, traces)
    generate({"params": jax.tree.map(lambda leaf: leaf + 1, tiny.params)}, SHORT, **OPTIONS)
    assert generate.traces == 3


# --- gates ------------------------------------------------------------------------------------------------------------

TARGETS = ("attn/q", "attn/o", "mlp/down")
LAYERS = 2
PAIRS = sum(1 + len(prompt) for prompt in SHORT) * len(TARGETS) * LAYERS


COMPILED: dict[tuple[Method, Mesh], Generator] = {}


def method(**axes: Any) -> Method:
    values = preset("mora") | {"targets": TARGETS, "capacity_bucket": 16, "rank": 4, "top_k": 3, **axes}
    return Method(**values)


def taught(tiny: LanguageModel, how: Method, tasks: int) -> dict[str, Any]:
    """A bank after `tasks` tasks whose experts were given random values, as training would."""
    paths = (path[:-1] for path in flatten_dict(tiny.params) if path[0] == "layers" and path[-1] == "kernel")
    sites = banks.find_sites(tiny.params, {path: "/".join(path[1:]) for path in paths}, how)
    assert len(sites) == len(TARGETS)
    bank = banks.empty(sites, how.capacity(0))
    rng = np.random.default_rng(0)
    for task in range(tasks):
        bank, fresh = boundaries.append(how, sites, bank, 0, task)
        fresh = jax.tree.map(lambda leaf: leaf + 0.5 * rng.standard_normal(leaf.shape).astype(np.float32), fresh)
        bank = boundaries.freeze(bank, fresh)
    return bank


def answer_with(tiny: LanguageModel, mesh: Mesh, how: Method, tasks: int, **options: Any) -> Generation:
    """What the tiny model answers to the short prompts after some tasks; compiled once for each method."""
    key = (how, mesh)
    if key not in COMPILED:
        COMPILED[key] = Generator(Decoder(tiny.config, how), Spelling(), mesh)
    variables = {"params": tiny.params, "bank": place(mesh, taught(tiny, how, tasks))}
    return COMPILED[key](variables, SHORT, **(OPTIONS | options))


def test_without_a_bank_nothing_is_counted(run: Callable[..., Generation]) -> None:
    assert run(PROMPTS).gates == GateCounts(0, 0, 0)


@pytest.mark.parametrize(("batch_size", "limit"), [(8, 128), (5, 128), (8, 32)])
def test_every_token_of_every_prompt_meets_every_site(
    batch_size: int, limit: int, tiny: LanguageModel, mesh: Mesh
) -> None:
    """Not the padding, not the rows that fill up a batch, not what was cut off, not the tokens of the answer."""
    how = method(threshold=0.0, temperature=1.0)  # a softmax of scores in -1..1 closes none of the 3 kept gates
    gates = answer_with(tiny, mesh, how, 2, batch_size=batch_size, max_prompt_tokens=limit).gates
    pairs = sum(min(limit, 1 + len(prompt)) for prompt in SHORT) * len(TARGETS) * LAYERS
    assert gates[:3] == (pairs, 3 * pairs, 0)
    assert len(gates.mass) == 4  # the capacity of 16 is room for 4 blocks of 4 experts
    assert sum(gates.mass) == pytest.approx(pairs, rel=1e-5)  # a softmax sums to 1 where no threshold cuts it
    assert min(gates.mass[:2]) > 0
    assert gates.mass[2:] == (0.0, 0.0)  # no third and fourth task yet
    assert (pairs == PAIRS) == (limit == 128)


def test_fewer_experts_than_k(tiny: LanguageModel, mesh: Mesh) -> None:
    gates = answer_with(tiny, mesh, method(threshold=0.0, temperature=1.0, rank=2), 1).gates
    assert gates[:3] == (PAIRS, 2 * PAIRS, 0)
    assert gates.mass[1:] == (0.0,) * 7


def test_the_gates_act_on_the_answers(tiny: LanguageModel, mesh: Mesh, run: Callable[..., Generation]) -> None:
    """Some gates close at delta = 0.2. Answers and counts are those of each prompt alone, without cache and padding."""
    how = method()
    decoder, variables = Decoder(tiny.config, how), {"params": tiny.params, "bank": taught(tiny, how, 2)}

    @jax.jit
    def gates(tokens: jax.Array) -> Any:
        t = tokens.shape[1]
        return decoder.apply(variables, tokens, jnp.arange(t)[None], causal_mask(t), mutable=["gates"])[1]["gates"]

    generation = answer_with(tiny, mesh, how, 2)
    assert generation.texts != run(SHORT).texts
    active, none, mass = 0, 0, np.zeros(16)
    for prompt, text in zip(SHORT, generation.texts, strict=True):
        assert text == recompute(decoder, variables, prompt, 12)
        row = np.zeros((1, 160), np.int32)
        row[0, : 1 + len(prompt)] = [256, *prompt.encode()]
        for leaf in jax.tree.leaves(gates(row)):
            assert leaf.shape == (LAYERS, 1, 160, 16)
            real = np.asarray(leaf)[:, 0, : 1 + len(prompt)]
            open_gates = (real > ACTIVE).sum(axis=-1)
            active, none = active + int(open_gates.sum()), none + int((open_gates == 0).sum())
            mass += real.sum(axis=(0, 1))
    assert generation.gates[:3] == (PAIRS, active, none)
    np.testing.assert_allclose(generation.gates.mass, mass.reshape(4, 4).sum(axis=1), rtol=1e-4)
    assert 0 < none < PAIRS
    assert PAIRS - none < active < 3 * PAIRS


def test_a_threshold_that_closes_all_gates_leaves_the_frozen_model(
    tiny: LanguageModel, mesh: Mesh, run: Callable[..., Generation]
) -> None:
    """A normalised score is 1 only for an expert that answers alone, so delta = 1 closes every gate of 8 experts."""
    generation = answer_with(tiny, mesh, method(threshold=1.0), 2)
    assert generation.gates == GateCounts(pairs=PAIRS, active=0, none=PAIRS, mass=(0.0,) * 4)
    assert generation.texts == run(SHORT).texts


def test_an_empty_bank_is_the_frozen_model(tiny: LanguageModel, mesh: Mesh, run: Callable[..., Generation]) -> None:
    generation = answer_with(tiny, mesh, method(), 0)
    assert generation.gates == GateCounts(pairs=PAIRS, active=0, none=PAIRS, mass=(0.0,) * 4)
    assert generation.texts == run(SHORT).texts


def test_a_method_without_gates_has_nothing_to_count(
    tiny: LanguageModel, mesh: Mesh, run: Callable[..., Generation]
) -> None:
    how = method(**{key: preset("inc_lora")[key] for key in ("score", "select", "normalise", "threshold")})
    generation = answer_with(tiny, mesh, how, 1)
    assert generation.gates == GateCounts(0, 0, 0)
    assert generation.texts != run(SHORT).texts


def test_counts_add_up() -> None:
    assert GateCounts(5, 3, 2, (1.0,)) + GateCounts(1, 1, 0, (0.5, 2.0)) == GateCounts(6, 4, 2, (1.5, 2.0))
    assert GateCounts() == GateCounts(0, 0, 0)


def test_a_gate_map_shows_the_gates_of_one_prompt(tiny: LanguageModel, mesh: Mesh) -> None:
    how = method()
    answer_with(tiny, mesh, how, 2)
    generate, prompt = COMPILED[how, mesh], "which topic?"
    variables = {"params": tiny.params, "bank": place(mesh, taught(tiny, how, 2))}
    found = generate.gate_map(variables, prompt, 128)
    ids = [256, *prompt.encode()]
    assert found.tokens == [str(i) for i in ids]
    assert (found.truncated, found.layer, set(found.sites)) == (False, 1, set(TARGETS))
    tokens = jnp.array([ids])
    alone = jax.jit(partial(generate.decoder.apply, mutable=["gates"]))(
        variables, tokens, jnp.arange(len(ids))[None], causal_mask(len(ids))
    )[1]["gates"]["layers"]
    np.testing.assert_allclose(found.sites["attn/o"], alone["attn"]["o"]["gates"][1, 0], atol=1e-4)
    assert found.sites["attn/o"].shape == (len(ids), 16)
    cut = generate.gate_map(variables, prompt, 5)
    assert (cut.tokens, cut.truncated) == ([str(i) for i in [256, *b"pic?"]], True)


def test_a_growing_bank_is_not_traced_again(tiny: LanguageModel, mesh: Mesh) -> None:
    """4, 8 and 16 experts share one capacity of 16; 20 need another."""
    how = method()
    generate = Counting(Decoder(tiny.config, how), Spelling(), mesh)
    for tasks, traces in ((0, 1), (1, 1), (2, 1), (4, 1), (5, 2)):
        bank = place(mesh, taught(tiny, how, tasks))
        generate({"params": tiny.params, "bank": bank}, PROMPTS[:1], **OPTIONS)
        assert generate.traces == traces
