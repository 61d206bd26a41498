"""The decoding `moram`: its rules are those of `transformers`, whatever the batch, the padding and the cache."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from launching import CONFIG
from parity import Numbers, transformers_or_skip
from tiny_decoder import TINY, our_logits, random_params

from mora_jax import config as configs
from mora_jax.errors import MoraError
from mora_jax.models.decoder import Decoder
from mora_jax.runtime.decoding import DECODING, Decoding, ruled
from mora_jax.runtime.distributed import AXES, make_mesh
from mora_jax.runtime.generate import Generator

torch, transformers = transformers_or_skip()  # at import: the annotations below name their classes

MORAM = DECODING["moram"]
NEW, EOS, BOS = 24, 60, 0
PAD = 7  # an id that prompts hold too

# Repetitions within a prompt, the padding token where the padding of others stands, nothing, a single token.
PROMPTS = ["3 4 5 9 3 4 5 8 3 4", "7 7 12 7 7", "", "41", "17 18 19 " * 12 + "17 18"]


def processors(decoding: Decoding) -> transformers.LogitsProcessorList:
    """What `transformers` puts into its list for these two options, in its order."""
    rules = transformers.LogitsProcessorList()
    if decoding.repetition_penalty != 1.0:
        rules.append(transformers.RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
    if decoding.no_repeat_ngram:
        rules.append(transformers.NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram))
    return rules


def one_by_one(prompt: str, decoding: Decoding) -> list[int]:
    """Greedy decoding with the processors of `transformers`: no cache, no batch, no padding on the left."""
    start = [BOS, *(int(word) for word in prompt.split())]
    ids, rules = list(start), processors(decoding)
    while len(ids) < len(start) + NEW and ids[-1] != EOS:
        row = np.zeros((1, 128), np.int32)  # zeros stand behind the prefix, where no query looks
        row[0, : len(ids)] = ids
        logits = our_logits(Decoder(TINY), random_params(TINY), row)[0, len(ids) - 1]
        scores = rules(torch.tensor([ids]), torch.tensor(logits)[None])
        ids.append(int(scores.argmax()))
    answer = ids[len(start) :]
    return answer[:-1] if answer[-1] == EOS else answer


@cache
def generated(mesh: Mesh, decoding: Decoding) -> list[list[int]]:
    """Two batches of four rows, of which three are there to fill the second."""
    generate = Generator(Decoder(TINY), Numbers(BOS, EOS, PAD), mesh, decoding)
    options = {"max_prompt_tokens": 64, "max_new_tokens": NEW, "batch_size": 4, "after_batch": lambda n: None}
    texts = generate({"params": random_params(TINY)}, PROMPTS, **options).texts
    return [[int(word) for word in text.split()] for text in texts]


@pytest.mark.parametrize("name", DECODING)
def test_token_by_token_as_transformers(one_device: Mesh, name: str) -> None:
    expected = [one_by_one(prompt, DECODING[name]) for prompt in PROMPTS]
    assert generated(one_device, DECODING[name]) == expected
    assert sum(map(len, expected)) > 2 * NEW


def test_the_rules_act_on_these_prompts(one_device: Mesh) -> None:
    """Greedy answers repeat 3-grams and those of the decoding do not, counted over prompt and answer."""

    def repeats(prompt: str, answer: list[int]) -> int:
        ids = [BOS, *(int(word) for word in prompt.split()), *answer]
        ngrams = [tuple(ids[i : i + 3]) for i in range(len(ids) - 2)]
        already = max(0, len(ids) - len(answer) - 2)
        return sum(ngram in ngrams[:i] for i, ngram in enumerate(ngrams) if i >= already)

    plain, moram = (generated(one_device, DECODING[name]) for name in ("greedy", "moram"))
    assert plain != moram
    assert sum(map(repeats, PROMPTS, plain)) > 0
    assert sum(map(repeats, PROMPTS, moram)) == 0


def test_the_mesh_does_not_matter(one_device: Mesh) -> None:
    """Rows cut over four devices, of which some have rows that only fill up the batch."""
    many = make_mesh(dict(zip(AXES, (4, 1, 2), strict=True)))
    assert generated(many, MORAM) == generated(one_device, MORAM)


@pytest.mark.parametrize("decoding", [MORAM, Decoding(0.7, 1), Decoding(1.5, 4)], ids=str)
def test_every_length_of_history(decoding: Decoding) -> None:
    """Rows of 1 to 24 tokens of 5 ids, so that nearly all repeats, after padding and before ids yet to be written."""
    rng = np.random.default_rng(0)
    width, end = 30, 24
    history = rng.integers(0, 5, (end, width)).astype(np.int32)
    logits = rng.standard_normal((end, 9)).astype(np.float32)
    start = np.arange(end, dtype=np.int32)[::-1].copy()
    ours = jax.jit(partial(ruled, decoding))(logits, history, start, np.int32(end))
    theirs = [
        processors(decoding)(torch.tensor(row[None, first:end], dtype=torch.long), torch.tensor(scores)[None])[0]
        for row, scores, first in zip(history, logits, start, strict=True)
    ]
    np.testing.assert_allclose(np.asarray(ours), np.stack(theirs), rtol=1e-6)  # XLA multiplies by 1 / 1.2
    assert np.isinf(ours).any()


def test_plain_greedy_costs_nothing() -> None:
    """No operation is added to the program."""
    arguments = (jnp.ones((2, 9)), jnp.ones((2, 6), jnp.int32), jnp.zeros(2, jnp.int32), jnp.int32(4))
    assert DECODING["greedy"].plain
    assert not MORAM.plain
    logits = arguments[0]
    assert ruled(DECODING["greedy"], *arguments) is logits


def test_names_are_checked() -> None:
    legal = ", ".join(DECODING)
    with pytest.raises(MoraError, match=rf"^eval\.decoding='sample' must be one of {legal}$"):
        configs.load(f"{CONFIG}:smoke", {"eval.decoding": "sample"})
    assert configs.load(f"{CONFIG}:smoke", {"eval.decoding": "moram"}).eval.decoding == "moram"
