"""Text in, batches out: tokenised records, length buckets, a plan of batches, and a Grain pipeline over the plan.

Prompt and answer are joined as one string and tokenised together, BOS first where the tokenizer has one, EOS last;
the loss covers the tokens after the length of the tokenised prompt (the TRACE convention, arXiv 2310.06762). Prompts
that are too long are cut on the left and counted. Masks come from lengths, never from ids, because PAD may equal EOS.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import grain
import numpy as np
from jaxtyping import Int


class Encoder(Protocol):
    """What this module needs of a tokenizer."""

    bos_id: int | None
    eos_id: int
    pad_id: int

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


@dataclasses.dataclass(frozen=True)
class Limits:
    """Most tokens of a prompt (with BOS), of an answer (with EOS), and the smallest length bucket."""

    prompt: int
    answer: int
    bucket: int

    @property
    def total(self) -> int:
        return self.prompt + self.answer


def bucket(length: int, smallest: int, most: int) -> int:
    """The smallest power-of-two multiple of `smallest` that holds `length`, but never more than `most`."""
    size = smallest
    while size < length:
        size *= 2
    return min(size, most)


def answer_bucket(longest: int, width: int) -> int:
    """Places for the answers of a batch: a quarter of the row, or all of it, so at most two shapes a length bucket."""
    return width // 4 if longest <= width // 4 else width


@dataclasses.dataclass(frozen=True)
class Record:
    """One training example as ids, and how many of them are prompt."""

    ids: tuple[int, ...]
    prompt: int


def encode_prompts(prompts: Sequence[str], tokenizer: Encoder, limit: int) -> tuple[list[list[int]], int]:
    """Ids of each prompt with BOS, cut on the left to `limit`; and how many were cut."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    room = limit - len(bos)
    encoded = tokenizer.encode_batch(list(prompts))
    return [bos + ids[max(0, len(ids) - room) :] for ids in encoded], sum(len(ids) > room for ids in encoded)


def encode_records(
    prompts: Sequence[str], answers: Sequence[str], tokenizer: Encoder, limits: Limits
) -> tuple[list[Record], int]:
    """Training records, and how many prompts were cut. An answer that is too long loses its right end and EOS."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    room = limits.prompt - len(bos)
    records, cut = [], 0
    alone = tokenizer.encode_batch(list(prompts))
    joined = tokenizer.encode_batch([p + a for p, a in zip(prompts, answers, strict=True)])
    for prompt_ids, ids in zip(alone, joined, strict=True):
        boundary = min(len(prompt_ids), len(ids))
        prompt, answer = ids[:boundary], [*ids[boundary:], tokenizer.eos_id][: limits.answer]
        cut += boundary > room
        prompt = bos + prompt[max(0, boundary - room) :]
        records.append(Record(tuple(prompt + answer), len(prompt)))
    return records, cut


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which records make up each batch of a task: (record indices, length bucket, answer bucket) per step."""

    records: Sequence[Record]
    batches: Sequence[tuple[tuple[int, ...], int, int]]
    pad_id: int

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> dict[str, Int[np.ndarray, ...]]:
        """tokens [b, t], prompt [b] and length [b] (real tokens), answers [1, a]: offsets that can carry loss."""
        members, width, answers = self.batches[step]
        rows = [self.records[i] for i in members]
        tokens = np.full((len(rows), width), self.pad_id, np.int32)
        for row, record in zip(tokens, rows, strict=True):
            row[: len(record.ids)] = record.ids
        return {
            "tokens": tokens,
            "prompt": np.array([r.prompt for r in rows], np.int32),
            "length": np.array([len(r.ids) for r in rows], np.int32),
            "answers": np.arange(answers, dtype=np.int32)[None],
        }


def plan_batches(
    records: Sequence[Record], *, limits: Limits, batch_size: int, steps: int, epochs: int, seed: int, pad_id: int
) -> Plan:
    """A deterministic order of full batches. Exactly one of `steps` and `epochs` is positive.

    Every epoch is shuffled by (seed, epoch), and batches are filled from one length bucket each. With `steps` the
    records that do not fill a batch wait for their bucket's next epoch. `epochs` makes as many steps as it takes to see
    every record so often, the last batch filled with records of one epoch more: at the end of an epoch the records that
    wait, longest first, make batches as wide as their longest one, until fewer than one batch wait. So no record is
    seen two times more than another, however rare its length.
    """
    widths = [bucket(len(r.ids), limits.bucket, limits.total) for r in records]
    number = steps or -(-epochs * len(records) // batch_size)
    groups: list[list[int]] = []
    waiting: dict[int, list[int]] = {}
    left, epoch = number * batch_size, 0  # left: places in batches that no record has taken yet
    while len(groups) < number:
        order = np.random.default_rng((seed, epoch)).permutation(len(records))[: left if epochs else None].tolist()
        for index in order:
            group = waiting.setdefault(widths[index], [])
            group.append(index)
            if len(group) == batch_size:
                groups.append(waiting.pop(widths[index]))
        if epochs:
            groups += _together(waiting, batch_size)
        left, epoch = left - len(order), epoch + 1
    return Plan(records, [_batch(group, records, widths) for group in groups[:number]], pad_id)


def _together(waiting: dict[int, list[int]], batch_size: int) -> list[list[int]]:
    """Full batches of the records that wait, over all widths; what is left of them goes on waiting."""
    rest = [(width, index) for width in sorted(waiting, reverse=True) for index in waiting[width]]
    full = len(rest) // batch_size * batch_size
    waiting.clear()
    for width, index in rest[full:]:
        waiting.setdefault(width, []).append(index)
    return [[index for _, index in rest[i : i + batch_size]] for i in range(0, full, batch_size)]


def _batch(group: Sequence[int], records: Sequence[Record], widths: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
    """What a Plan knows of one batch."""
    width = max(widths[i] for i in group)
    longest = max(len(records[i].ids) - records[i].prompt for i in group)
    return tuple(group), width, answer_bucket(longest, width)


def pipeline(plan: Plan) -> grain.DatasetIterator:
    """The plan as a Grain iterator, whose state is the position to resume from, in the middle of an epoch or not."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(grain.MapDataset.source(plan).to_iter_dataset(options))
