"""Text in, batches out: what is cut and where, what a batch holds, in which order, and how a stream is resumed."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from mora_jax.data.text import (
    Limits,
    Plan,
    Record,
    bucket,
    encode_prompts,
    encode_records,
    pipeline,
    plan_batches,
)
from mora_jax.models.tokenizer import Tokenizer

BOS, EOS, PAD = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Two characters make a token, a last odd one another: an odd prompt grows together with its answer."""

    bos_id: int | None = BOS
    eos_id: int = EOS
    pad_id: int = PAD

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            [100 * ord(t[i]) + (ord(t[i + 1]) if i + 1 < len(t) else 0) for i in range(0, len(t), 2)] for t in texts
        ]


def ids(text: str) -> list[int]:
    return Pairs().encode_batch([text])[0]


def limits(prompt: int = 100, answer: int = 100, smallest: int = 8) -> Limits:
    return Limits(prompt=prompt, answer=answer, bucket=smallest)


# --- bucket -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "smallest", "most", "size"),
    [
        (0, 8, 64, 8),
        (1, 8, 64, 8),
        (8, 8, 64, 8),
        (9, 8, 64, 16),
        (33, 8, 64, 64),
        (13, 12, 100, 24),
        (49, 12, 90, 90),  # 96 would be more than can occur
        (5, 64, 10, 10),  # the smallest bucket is never wider than the limit
    ],
)
def test_bucket(length: int, smallest: int, most: int, size: int) -> None:
    assert bucket(length, smallest, most) == size


@hypothesis.given(st.integers(1, 600), st.integers(1, 64), st.integers(0, 600))
def test_a_bucket_holds_the_length_and_wastes_less_than_half(length: int, smallest: int, slack: int) -> None:
    most = length + slack
    size = bucket(length, smallest, most)
    assert length <= size <= most
    assert size <= max(smallest, 2 * length - 1)
    assert bucket(size, smallest, most) == size


def test_there_are_few_buckets() -> None:
    assert {bucket(length, 128, 1536) for length in range(1, 1537)} == {128, 256, 512, 1024, 1536}


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_begin_with_bos_and_are_cut_on_the_left() -> None:
    encoded, cut = encode_prompts(["aabbcc", "aabb", "aa", ""], Pairs(), 3)
    assert encoded == [[BOS, *ids("bbcc")], [BOS, *ids("aabb")], [BOS, *ids("aa")], [BOS]]
    assert cut == 1  # a prompt that just fits is not cut


def test_prompts_without_bos_have_one_more_token_of_room() -> None:
    encoded, cut = encode_prompts(["aabbcc", "aabbccdd"], Pairs(bos_id=None), 3)
    assert encoded == [ids("aabbcc"), ids("bbccdd")]
    assert cut == 1


def test_a_limit_of_one_leaves_bos_alone() -> None:
    assert encode_prompts(["aabb", ""], Pairs(), 1) == ([[BOS], [BOS]], 1)


def test_no_prompts() -> None:
    assert encode_prompts([], Tokenizer.byte_level(), 8) == ([], 0)
    assert encode_records([], [], Tokenizer.byte_level(), limits()) == ([], 0)


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_record_is_bos_prompt_answer_eos() -> None:
    records, cut = encode_records(["aabb"], ["ccd"], Pairs(), limits())
    assert records == [Record((BOS, *ids("aabb"), *ids("ccd"), EOS), prompt=3)]
    assert cut == 0


def test_the_boundary_is_the_length_of_the_prompt_alone() -> None:
    """The odd prompt is the 2 tokens "aa" and "b", joined with the answer "aa" and "bc"; the loss starts after them."""
    (record,), _ = encode_records(["aab"], ["cdd"], Pairs(), limits())
    assert record == Record((BOS, *ids("aabcdd"), EOS), prompt=1 + len(ids("aab")))
    assert record.ids[record.prompt :] == (*ids("dd"), EOS)


def test_an_answer_that_vanishes_into_the_prompt_leaves_eos_to_learn() -> None:
    (record,), _ = encode_records(["aab"], ["c"], Pairs(), limits())
    assert record == Record((BOS, *ids("aabc"), EOS), prompt=3)


def test_a_tokenizer_may_shorten_what_it_joins() -> None:
    """A merge over the boundary can leave fewer tokens than the prompt alone had; the boundary is then the end."""

    class Greedy(Pairs):
        def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
            return [[7] if text == "prompt answer" else [4, 5, 6] for text in texts]

    for most in (limits(), limits(prompt=3)):  # 3 tokens hold what is left of the prompt, so nothing is cut
        assert encode_records(["prompt "], ["answer"], Greedy(), most) == ([Record((BOS, 7, EOS), prompt=2)], 0)


@pytest.mark.parametrize("bos", [[BOS], []])
def test_an_empty_prompt_and_an_empty_answer(bos: list[int]) -> None:
    tokenizer = Pairs(bos_id=bos[0] if bos else None)
    records, cut = encode_records(["", "aa", ""], ["bb", "", ""], tokenizer, limits())
    assert [r.ids for r in records] == [(*bos, *ids("bb"), EOS), (*bos, *ids("aa"), EOS), (*bos, EOS)]
    assert [r.prompt for r in records] == [len(bos), len(bos) + 1, len(bos)]
    assert cut == 0


def test_a_long_prompt_loses_its_left_end_and_keeps_bos_and_the_answer() -> None:
    records, cut = encode_records(["aabbccdd", "aabbcc", "aabb"], ["ee"] * 3, Pairs(), limits(prompt=4))
    assert records[0] == Record((BOS, *ids("bbccdd"), *ids("ee"), EOS), prompt=4)
    assert records[1] == Record((BOS, *ids("aabbcc"), *ids("ee"), EOS), prompt=4)
    assert records[2] == Record((BOS, *ids("aabb"), *ids("ee"), EOS), prompt=3)
    assert cut == 1


def test_a_long_answer_loses_its_right_end_and_eos() -> None:
    records, cut = encode_records(["aa"] * 3, ["bb", "bbcc", "bbccdd"], Pairs(), limits(answer=2))
    assert [r.ids[r.prompt :] for r in records] == [(*ids("bb"), EOS), tuple(ids("bbcc")), tuple(ids("bbcc"))]
    assert cut == 0  # prompts are counted, answers are not


def test_both_are_cut() -> None:
    (record,), cut = encode_records(["aabbccdd"], ["eeffgg"], Pairs(), limits(prompt=3, answer=2))
    assert record == Record((BOS, *ids("ccdd"), *ids("eeff")), prompt=3)
    assert cut == 1


def test_training_and_generation_see_the_same_prompt() -> None:
    tokenizer = Tokenizer.byte_level()
    prompts = ["short", "a prompt that is much too long", "naïve größe"]
    alone, cut_alone = encode_prompts(prompts, tokenizer, 12)
    records, cut = encode_records(prompts, [" yes", " no", " ja"], tokenizer, limits(prompt=12))
    assert [list(r.ids[: r.prompt]) for r in records] == alone
    assert cut_alone == cut == 2  # bytes are counted, not characters
    assert [tokenizer.decode(r.ids[r.prompt :]) for r in records] == [" yes", " no", " ja"]
    assert {r.ids[0] for r in records} == {tokenizer.bos_id}
    assert {r.ids[-1] for r in records} == {tokenizer.eos_id}


def test_prompts_and_answers_come_in_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        encode_records(["aa", "bb"], ["cc"], Pairs(), limits())


@hypothesis.given(
    st.lists(st.tuples(st.text("ab", max_size=20), st.text("cd", max_size=20)), max_size=6),
    st.integers(2, 8),
    st.integers(1, 8),
    st.sampled_from([BOS, None]),
)
def test_every_record_fits_its_limits(pairs: list[tuple[str, str]], prompt: int, answer: int, bos: int | None) -> None:
    tokenizer, most = Pairs(bos_id=bos), limits(prompt, answer)
    records, cut = encode_records([p for p, _ in pairs], [a for _, a in pairs], tokenizer, most)
    assert cut == encode_prompts([p for p, _ in pairs], tokenizer, prompt)[1]
    for record in records:
        assert record.prompt <= prompt
        assert 1 <= len(record.ids) - record.prompt <= answer
        assert len(record.ids) <= most.total
        assert bos is None or record.ids[0] == bos


# --- the plan of batches ----------------------------------------------------------------------------------------------


def some_records(*sizes: tuple[int, int, int]) -> list[Record]:
    """(count, tokens, of which prompt) -> records whose first token is their own number."""
    numbers = itertools.count(1000)
    return [Record((next(numbers), *range(10, 9 + n)), prompt) for count, n, prompt in sizes for _ in range(count)]


def plan(records: Sequence[Record], **options: Any) -> Plan:
    defaults = {"limits": limits(32, 32), "batch_size": 4, "steps": 0, "epochs": 0, "seed": 0, "pad_id": PAD}
    return plan_batches(records, **(defaults | options))


# Two buckets, 8 and 16 tokens, with 24 and 12 records: batches of 4 and 12 come out even after every epoch.
TWO = some_records((24, 6, 5), (12, 12, 10))


def members(batches: Plan) -> list[tuple[int, ...]]:
    return [batch[0] for batch in batches.batches]


def test_a_plan_is_decided_by_its_seed() -> None:
    assert plan(TWO, steps=20).batches == plan(TWO, steps=20).batches
    assert plan(TWO, steps=20, seed=1).batches != plan(TWO, steps=20).batches
    assert plan(TWO, steps=20, seed=1000).batches != plan(TWO, steps=20, seed=1).batches


def test_a_longer_plan_begins_like_a_shorter_one() -> None:
    """So a stream whose step count was raised starts the same way."""
    assert plan(TWO, steps=31).batches[:7] == plan(TWO, steps=7).batches


def test_every_epoch_has_another_order() -> None:
    batches = members(plan(TWO, epochs=6))
    epochs = [tuple(batches[i : i + 9]) for i in range(0, 54, 9)]
    assert len(set(epochs)) == 6
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(36))


def test_batches_of_so_many_steps_are_from_one_bucket() -> None:
    records = some_records((13, 6, 5), (9, 12, 10), (7, 40, 30))
    for indices, width, _ in plan(records, steps=50).batches:
        assert len(indices) == 4
        assert {bucket(len(records[i].ids), 8, 64) for i in indices} == {width}


def test_batches_are_full_and_as_wide_as_their_longest_record() -> None:
    records = some_records((13, 6, 5), (9, 12, 10), (7, 40, 30))
    batches = plan(records, epochs=8).batches
    assert len(batches) == 58
    mixed = 0
    for indices, width, _ in batches:
        widths = {bucket(len(records[i].ids), 8, 64) for i in indices}
        assert (len(indices), max(widths)) == (4, width)
        mixed += len(widths) > 1
    assert 0 < mixed <= 8 * 2  # at the end of an epoch fewer than 12 records wait


def test_steps_and_epochs() -> None:
    assert len(plan(TWO, steps=1)) == 1
    assert len(plan(TWO, steps=100)) == 100
    assert len(plan(TWO, epochs=1)) == 9
    assert len(plan(TWO, epochs=3)) == 27
    # 10 records in batches of 4: 2.5 batches an epoch, rounded up over all epochs together
    assert [len(plan(some_records((10, 6, 5)), epochs=n)) for n in (1, 2, 3)] == [3, 5, 8]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 12])
def test_over_whole_epochs_all_records_are_seen_equally_often(batch_size: int) -> None:
    seen = Counter(itertools.chain(*members(plan(TWO, epochs=5, batch_size=batch_size))))
    assert seen == dict.fromkeys(range(36), 5)


def test_records_that_wait_are_seen_in_the_next_epoch() -> None:
    """6 and 10 records in batches of 4: neither bucket comes out even in one epoch, both do in two."""
    records = some_records((6, 6, 5), (10, 12, 10))
    assert Counter(itertools.chain(*members(plan(records, epochs=2)))) == dict.fromkeys(range(16), 2)


SIZES = st.lists(st.sampled_from([5, 12, 30, 60]), min_size=1, max_size=40)


@hypothesis.given(SIZES, st.integers(1, 7), st.integers(1, 4), st.integers(0, 3))
def test_every_record_is_seen_as_often_as_there_are_epochs(
    sizes: list[int], batch_size: int, epochs: int, seed: int
) -> None:
    """Whatever the sizes of the buckets; only the last batch is filled up, and shapes are those of the buckets."""
    records = some_records(*((1, n, n - 1) for n in sizes))
    batches = plan(records, batch_size=batch_size, epochs=epochs, seed=seed)
    seen = Counter(itertools.chain(*members(batches)))
    counts = [seen[i] for i in range(len(sizes))]
    assert epochs <= min(counts) <= max(counts) <= min(counts) + 1
    assert sum(seen.values()) - epochs * len(sizes) < batch_size
    assert {width for _, width, _ in batches.batches} <= {bucket(n, 8, 64) for n in sizes}


@hypothesis.given(SIZES, st.integers(1, 7), st.integers(1, 40), st.integers(0, 3))
def test_no_record_runs_ahead(sizes: list[int], batch_size: int, steps: int, seed: int) -> None:
    """At any step, records of a bucket that fills a batch differ by at most 2: one epoch in progress, one waiting."""
    records = some_records(*((1, n, n - 1) for n in sizes))
    batches = plan(records, batch_size=batch_size, steps=steps, seed=seed)
    assert len(batches) == steps
    seen = Counter(itertools.chain(*members(batches)))
    by_bucket: dict[int, list[int]] = {}
    for index, record in enumerate(records):
        by_bucket.setdefault(bucket(len(record.ids), 8, 64), []).append(seen[index])
    for counts in by_bucket.values():
        if len(counts) >= batch_size:
            assert max(counts) - min(counts) <= 2


def test_fewer_records_than_a_batch_are_enough_for_steps() -> None:
    batches = plan(some_records((2, 6, 5), (1, 12, 10)), steps=3)
    assert len(batches) == 3
    assert {i for indices in members(batches) for i in indices} <= {0, 1, 2}


def test_a_rare_length_is_trained_on() -> None:
    """One record of 60 tokens among 15 of 6, once: it stands in a wide batch with what else waited."""
    batches = plan(some_records((15, 6, 5), (1, 60, 50)), epochs=1).batches
    assert [width for _, width, _ in batches] == [8, 8, 8, 64]
    assert 15 in batches[-1][0]


def test_as_many_records_as_a_batch_are_enough() -> None:
    assert len(plan(some_records((4, 6, 5)), steps=3)) == 3


def test_a_bucket_smaller_than_a_batch_fills_over_epochs() -> None:
    """No bucket alone fills a batch here, and the plan still ends and treats all alike."""
    records = some_records((2, 6, 5), (1, 12, 10), (1, 30, 20))
    assert Counter(itertools.chain(*members(plan(records, epochs=4)))) == dict.fromkeys(range(4), 4)


# --- one batch --------------------------------------------------------------------------------------------------------


def test_a_batch_row_by_row() -> None:
    records = [Record((1, 10, 11, 2), 3), Record((1, 20, 21, 22, 23, 2), 2)]
    batch = Plan(records, [((1, 0), 8, 4)], pad_id=9)[0]
    assert batch.keys() == {"tokens", "prompt", "length", "answers"}
    assert {value.dtype for value in batch.values()} == {np.dtype(np.int32)}
    np.testing.assert_array_equal(batch["tokens"], [[1, 20, 21, 22, 23, 2, 9, 9], [1, 10, 11, 2, 9, 9, 9, 9]])
    np.testing.assert_array_equal(batch["prompt"], [2, 3])
    np.testing.assert_array_equal(batch["length"], [6, 4])
    np.testing.assert_array_equal(batch["answers"], [[0, 1, 2, 3]])


@pytest.mark.parametrize(("answer", "width"), [(1, 4), (4, 4), (5, 16), (11, 16)])
def test_answers_take_a_quarter_of_the_row_or_all_of_it(answer: int, width: int) -> None:
    records = some_records((3, 12, 11), (1, 12, 12 - answer))
    assert [batch[1:] for batch in plan(records, steps=2).batches] == [(16, width)] * 2


def test_every_answer_token_can_carry_loss_and_there_are_few_shapes() -> None:
    rng = np.random.default_rng(0)
    sizes = [(1, n, int(rng.integers(1, n))) for n in rng.integers(2, 65, 200).tolist()]
    batches = plan(some_records(*sizes), epochs=3)
    for step in range(len(batches)):
        batch = batches[step]
        assert (batch["length"] - batch["prompt"]).max() <= batch["answers"].size
        assert batch["length"].max() <= batch["tokens"].shape[1]
    shapes = {(b[1], b[2]) for b in batches.batches}
    assert shapes <= {(w, a) for w in (8, 16, 32, 64) for a in (w // 4, w)}


def test_pad_may_equal_eos() -> None:
    """Only the padding differs between two plans that differ in the pad id, and nothing is derived from ids."""
    records = [Record((BOS, 10, EOS, 11, EOS), 3), Record((BOS, 12, 13, EOS), 2), *some_records((6, 12, 10))]
    same, other = (plan(records, steps=6, batch_size=2, pad_id=pad) for pad in (EOS, PAD))
    for a, b in zip((same[i] for i in range(6)), (other[i] for i in range(6)), strict=True):
        for name in ("prompt", "length", "answers"):
            np.testing.assert_array_equal(a[name], b[name])
        real = np.arange(a["tokens"].shape[1]) < a["length"][:, None]
        np.testing.assert_array_equal(a["tokens"][real], b["tokens"][real])
        assert set(a["tokens"][~real].tolist()) <= {EOS}
        assert set(b["tokens"][~real].tolist()) <= {PAD}


# --- the pipeline -----------------------------------------------------------------------------------------------------


def assert_batches_equal(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], strict=True)


def test_the_pipeline_is_the_plan_in_order() -> None:
    batches = plan(TWO, epochs=2)
    assert_batches_equal(list(pipeline(batches)), [batches[step] for step in range(18)])


@pytest.mark.parametrize("position", [0, 1, 5, 9, 13, 17, 18])
def test_a_saved_position_continues_bitwise(position: int) -> None:
    """In the first epoch, between the two, in the second and at the end; the state passes through JSON on its way."""
    everything = list(pipeline(plan(TWO, epochs=2)))
    first = pipeline(plan(TWO, epochs=2))
    for _ in range(position):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    second = pipeline(plan(TWO, epochs=2))
    second.set_state(state)
    assert_batches_equal(list(second), everything[position:])
    # and saving changed nothing for the one that was saved
    assert_batches_equal(list(first), everything[position:])


def test_a_position_is_restored_on_an_iterator_in_use() -> None:
    everything = list(pipeline(plan(TWO, steps=12)))
    used = pipeline(plan(TWO, steps=12))
    start = used.get_state()
    assert_batches_equal([next(used) for _ in range(7)], everything[:7])
    used.set_state(start)
    assert_batches_equal(list(used), everything)
