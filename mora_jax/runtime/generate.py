"""Greedy text from a decoder, by a named decoding: left-padded prompts, a static key-value cache, a batch at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from mora_jax.data import text
from mora_jax.models.decoder import Cache, Decoder, causal_mask
from mora_jax.models.tokenizer import Tokenizer
from mora_jax.runtime.decoding import DECODING, Decoding, ruled
from mora_jax.runtime.distributed import place, place_batch, whole_rows
from mora_jax.runtime.family import GateCounts, GateMap, count_gates

PROMPT_BUCKET, ANSWER_BUCKET = 64, 32  # smallest static lengths, in tokens
MAP_TOKENS = 96  # of a prompt in a gate map: more would not be legible
SPECIAL = "⟨special⟩"  # stands in a gate map for a token without a text


class Generation(NamedTuple):
    """Texts in the order of the prompts, how many prompts were cut, and what the gates did on the prompts.

    `tokens`: what each prompt and its answer are as ids, without the end of sequence.
    """

    texts: list[str]
    truncated: int
    gates: GateCounts
    tokens: tuple[tuple[int, ...], ...] = ()


class Generator:
    """Greedy decoding for one decoder; compiles once per (bank capacity, prompt bucket, answer bucket)."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, mesh: Mesh, decoding: Decoding = DECODING["greedy"]):
        self.decoder, self.tokenizer, self.mesh, self.decoding = decoder, tokenizer, mesh, decoding
        whole = NamedSharding(mesh, P())  # every process reads the answers
        self._run = jax.jit(self._generate, static_argnames="capacity", out_shardings=whole)
        self._map = jax.jit(self._collect, out_shardings=whole)

    def __call__(
        self,
        variables: Mapping[str, Any],
        prompts: Sequence[str],
        *,
        max_prompt_tokens: int,
        max_new_tokens: int,
        batch_size: int,
        after_batch: Callable[[int], None],
    ) -> Generation:
        """Answers to all prompts, each asked once. `after_batch(n)` is called with the number that a batch answered.

        A batch has `batch_size` rows, or the next number that the mesh divides.
        """
        batch_size = whole_rows(self.mesh, batch_size)
        encoded, truncated = text.encode_prompts(prompts, self.tokenizer, max_prompt_tokens)
        order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i))  # alike lengths share a bucket
        capacity = text.bucket(max_new_tokens, ANSWER_BUCKET, 1 << 30)
        most = place(self.mesh, np.int32(max_new_tokens))
        texts, gates, tokens_of = [""] * len(encoded), GateCounts(), [()] * len(encoded)
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            rows = [encoded[i] for i in members]
            width = text.bucket(max(map(len, rows)), PROMPT_BUCKET, max_prompt_tokens)
            tokens = np.full((batch_size, width), self.tokenizer.pad_id, np.int32)
            length = np.zeros(batch_size, np.int32)  # rows that fill up the batch have length 0
            for i, row in enumerate(rows):
                tokens[i, width - len(row) :] = row
                length[i] = len(row)
            batch = place_batch(self.mesh, {"tokens": tokens, "length": length})
            ids, counts = jax.device_get(self._run(variables, batch, most, capacity=capacity))
            gates += GateCounts.fetched(counts)
            for i, row in zip(members, ids, strict=False):
                answer = _until(row.tolist(), self.tokenizer.eos_id)
                texts[i], tokens_of[i] = self.tokenizer.decode(answer), (*encoded[i], *answer)
            after_batch(len(members))
        return Generation(texts, truncated, gates, tuple(tokens_of))

    def gate_map(self, variables: Mapping[str, Any], prompt: str, max_prompt_tokens: int) -> GateMap:
        """The gates of the middle layer on the end of one prompt; compiles once, for all prompts share one shape."""
        (ids,), truncated = text.encode_prompts([prompt], self.tokenizer, min(max_prompt_tokens, MAP_TOKENS))
        tokens = np.full((1, MAP_TOKENS), self.tokenizer.pad_id, np.int32)
        tokens[0, : len(ids)] = ids
        layer = self.decoder.config.layers // 2
        batch = place_batch(self.mesh, {"tokens": tokens})
        found = jax.device_get(self._map(variables, batch, place(self.mesh, np.int32(layer))))
        sites = {"/".join(path[1:-1]): g[0, : len(ids)] for path, g in flatten_dict(found).items()}
        spelling = [self.tokenizer.decode([token]) or SPECIAL for token in ids]
        return GateMap(spelling, bool(truncated), layer, sites)

    def _collect(self, variables, batch, layer):
        tokens = batch["tokens"]
        t = tokens.shape[1]
        _, found = self.decoder.apply(variables, tokens, jnp.arange(t)[None], causal_mask(t), mutable=["gates"])
        return jax.tree.map(lambda leaf: leaf[layer], found["gates"])

    def _generate(self, variables, batch, max_new, *, capacity: int):
        tokens, length = batch["tokens"], batch["length"]
        b, width = tokens.shape
        slots = jnp.arange(width + capacity)[None, None]  # [1 1 slots]
        padding = (width - length)[:, None]
        cache = Cache.empty(self.decoder.config, b, width + capacity, self.decoder.dtype)

        def forward(tokens, cache, **options):
            at = cache.end + jnp.arange(tokens.shape[1])[None]
            mask = (slots <= at[..., None]) & (slots >= padding[..., None])
            positions = jnp.maximum(at - padding, 0)
            return self.decoder.apply(variables, tokens, positions, mask, cache, **options)

        def choose(hidden, ids, written) -> Int[Array, " b"]:
            logits = self.decoder.apply(variables, hidden[:, -1], method=Decoder.logits)
            if not self.decoding.plain:
                history = jnp.concatenate([tokens, ids], axis=1)
                logits = ruled(self.decoding, logits, history, width - length, width + written)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)

        (hidden, cache), stats = forward(tokens, cache, mutable=["stats"])
        ids = jnp.full((b, capacity), self.tokenizer.eos_id, jnp.int32)
        first = jnp.where(length == 0, self.tokenizer.eos_id, choose(hidden, ids, jnp.int32(0)))
        ids = ids.at[:, 0].set(first)
        done = (first == self.tokenizer.eos_id) | (length == 0)

        def going(state):
            _, step, done, _ = state
            return (step < max_new) & ~jnp.all(done)

        def advance(state):
            ids, step, done, cache = state
            hidden, cache = forward(jax.lax.dynamic_slice_in_dim(ids, step - 1, 1, axis=1), cache)
            token = jnp.where(done, self.tokenizer.eos_id, choose(hidden, ids, step))
            ids = jax.lax.dynamic_update_slice_in_dim(ids, token[:, None], step, axis=1)
            return ids, step + 1, done | (token == self.tokenizer.eos_id), cache

        ids, *_ = jax.lax.while_loop(going, advance, (ids, jnp.int32(1), done, cache))
        real = jnp.arange(width)[None] >= padding
        return ids, count_gates(stats.get("stats", {}), real)


def gate_counts(decoder: Decoder, variables: Mapping[str, Any], tokens: Sequence[int]) -> GateCounts:
    """What the gates do in one text, prompt and answer alike. The method must have gates and `variables` a bank."""
    width = text.bucket(len(tokens), PROMPT_BUCKET, 1 << 30)
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(tokens)] = tokens
    return GateCounts.fetched(jax.device_get(_gate_counts(decoder, variables, padded, np.int32(len(tokens)))))


@functools.partial(jax.jit, static_argnums=0)
def _gate_counts(decoder: Decoder, variables, tokens, length):
    t = tokens.shape[1]
    _, told = decoder.apply(variables, tokens, jnp.arange(t)[None], causal_mask(t), mutable=["stats"])
    return count_gates(told["stats"], (jnp.arange(t) < length)[None])


def _until(ids: list[int], stop: int) -> list[int]:
    return ids[: ids.index(stop)] if stop in ids else ids
