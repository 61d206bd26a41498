"""The loss over answers, against NumPy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY, our_logits, random_params

from mora_jax.data.text import Limits as TextLimits
from mora_jax.data.text import Record, plan_batches
from mora_jax.models.decoder import REMAT, Decoder
from mora_jax.models.decoder_config import DecoderConfig
from mora_jax.runtime.distributed import make_mesh, place, place_batch
from mora_jax.runtime.language import answer_loss

EOS = 2
# (length of the prompt with BOS, length of the row): a usual row, a long answer, EOS only, a one-token prompt.
ROWS = ((5, 9), (3, 14), (7, 8), (1, 6))


def a_batch(
    rows: Sequence[tuple[int, int]], width: int = 16, pad: int = EOS, answers: int | None = None
) -> dict[str, Any]:
    """Right-padded rows that end with EOS; the ids of a row do not depend on the width or the padding."""
    rng = np.random.default_rng(5)
    tokens = np.full((len(rows), width), pad, np.int32)
    for target, (_, length) in zip(tokens, rows, strict=True):
        target[:length] = rng.integers(3, TINY.vocab_size, 64)[:length]
        target[length - 1] = EOS
    return {
        "tokens": tokens,
        "prompt": np.array([prompt for prompt, _ in rows], np.int32),
        "length": np.array([length for _, length in rows], np.int32),
        "answers": np.arange(answers or width, dtype=np.int32)[None],
    }


jit_loss = jax.jit(answer_loss, static_argnums=0)


def loss_of(batch: dict[str, Any], config: DecoderConfig = TINY, dtype: Any = jnp.float32) -> float:
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(config))
    value = jit_loss(Decoder(config, dtype=dtype), {"params": params}, batch)
    assert (value.shape, value.dtype) == ((), jnp.float32)
    return float(value)


def by_hand(batch: dict[str, Any], config: DecoderConfig = TINY) -> float:
    """Row by row and token by token in float64: position i is predicted from the hidden state at i - 1."""
    losses = []
    for tokens, prompt, length in zip(batch["tokens"], batch["prompt"], batch["length"], strict=True):
        alone = np.zeros((1, 64), np.int32)  # one shape for all rows; what stands behind a row is never seen
        alone[0, :length] = tokens[:length]
        logits = our_logits(Decoder(config), random_params(config), alone)[0].astype(np.float64)
        for i in range(prompt, length):
            row = logits[i - 1] - logits[i - 1].max()
            losses.append(np.log(np.exp(row).sum()) - row[tokens[i]])
    return float(np.mean(losses)) if losses else 0.0


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_by_hand(tied: bool) -> None:
    config = dataclasses.replace(TINY, tie_embeddings=tied)
    batch = a_batch(ROWS)
    assert loss_of(batch, config) == pytest.approx(by_hand(batch, config), rel=1e-5)
    assert by_hand(batch, config) > 1.0


def test_the_loss_is_a_mean_over_tokens_not_over_rows() -> None:
    each = [loss_of({k: v if k == "answers" else v[i : i + 1] for k, v in a_batch(ROWS).items()}) for i in range(4)]
    counts = [length - prompt for prompt, length in ROWS]
    assert loss_of(a_batch(ROWS)) == pytest.approx(np.average(each, weights=counts), rel=1e-5)


def test_a_row_without_an_answer_counts_nothing() -> None:
    # Rows of one length, one of which is all prompt.
    batch = a_batch(((5, 9), (9, 9), (3, 14)))
    assert loss_of(batch) == pytest.approx(by_hand(batch), rel=1e-5)
    without = {k: v if k == "answers" else v[[0, 2]] for k, v in batch.items()}
    assert loss_of(batch) == pytest.approx(loss_of(without), rel=1e-5)


def test_a_batch_without_any_answer_is_zero_with_zero_gradient() -> None:
    batch = a_batch(((9, 9), (16, 16)))
    value, gradient = jax.jit(
        jax.value_and_grad(lambda p: answer_loss(Decoder(TINY), {"params": p}, batch))
    )(random_params(TINY))  # fmt: skip
    assert value == 0.0
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))


def test_the_padding_token_does_not_matter_not_even_as_eos() -> None:
    """EOS inside an answer and at its end counts as a target, EOS behind it does not."""
    batch, other = a_batch(ROWS, pad=EOS), a_batch(ROWS, pad=7)
    for tokens in (batch["tokens"], other["tokens"]):
        tokens[1, 8] = EOS  # in the middle of the answer
    assert loss_of(batch) == loss_of(other)
    assert loss_of(batch) == pytest.approx(by_hand(batch), rel=1e-5)


@pytest.mark.parametrize("width", [14, 24, 40])
def test_right_padding_does_not_change_the_loss(width: int) -> None:
    assert loss_of(a_batch(ROWS, width=width)) == pytest.approx(loss_of(a_batch(ROWS)), rel=1e-6)


@pytest.mark.parametrize("answers", [11, 12, 16, 64])
def test_offsets_past_the_length_count_nothing(answers: int) -> None:
    """11 is the longest answer; 64 offsets reach far behind the last column."""
    assert loss_of(a_batch(ROWS, answers=answers)) == pytest.approx(by_hand(a_batch(ROWS)), rel=1e-5)


def test_offsets_that_are_missing_count_nothing_either() -> None:
    """With 4 offsets the answers end after 4 tokens: what the quarter rule must never do to an answer."""
    batch = a_batch(ROWS, answers=4)
    cut = batch | {"length": np.minimum(batch["length"], batch["prompt"] + 4)}
    assert loss_of(batch) == pytest.approx(by_hand(cut), rel=1e-5)


def test_a_row_without_prompt_does_not_learn_its_first_token() -> None:
    """No BOS and an empty prompt: nothing precedes the first token, so nothing can predict it."""
    batch = a_batch(((0, 6), (3, 9)))
    expected = by_hand(batch | {"prompt": np.array([1, 3], np.int32)})
    assert loss_of(batch) == pytest.approx(expected, rel=1e-5)


def test_the_loss_in_bfloat16_is_close() -> None:
    assert loss_of(a_batch(ROWS), dtype=jnp.bfloat16) == pytest.approx(loss_of(a_batch(ROWS)), rel=0.03)


def test_the_loss_of_planned_batches_by_hand() -> None:
    """From records to the loss: whatever widths the plan chooses, every answer token of every record counts once."""
    rng = np.random.default_rng(3)
    records = [
        Record((*rng.integers(3, 61, n).tolist(), EOS), p) for n, p in ((6, 5), (7, 2), (20, 17), (29, 3), (9, 9))
    ]
    limits = TextLimits(prompt=20, answer=30, bucket=8)
    plan = plan_batches(records, limits=limits, batch_size=1, steps=0, epochs=1, seed=0, pad_id=EOS)
    assert {b[2] == b[1] // 4 for b in plan.batches} == {True, False}
    for step in range(len(plan)):
        assert loss_of(plan[step]) == pytest.approx(by_hand(plan[step]), rel=1e-5)


def test_the_loss_does_not_depend_on_how_a_batch_is_placed() -> None:
    batch = a_batch((*ROWS, *ROWS))
    expected, params = loss_of(batch), random_params(TINY)
    for axes in ({"data": 8, "fsdp": 1, "model": 1}, {"data": 2, "fsdp": 2, "model": 2}):
        mesh = make_mesh(axes)
        value = jit_loss(Decoder(TINY), {"params": place(mesh, params)}, place_batch(mesh, batch))
        assert float(value) == pytest.approx(expected, rel=1e-5)


def test_recomputation_changes_neither_loss_nor_gradient() -> None:
    params, batch = random_params(TINY), a_batch(ROWS)

    def both(name: str) -> Any:
        decoder = Decoder(TINY, remat=name)
        return jax.jit(jax.value_and_grad(lambda p: answer_loss(decoder, {"params": p}, batch)))(params)

    expected = both("none")
    for name in REMAT.keys() - {"none"}:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), both(name), expected)
