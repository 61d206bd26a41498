"""How the next token is chosen: greedily, after the rules of a named decoding have changed the logits.

The rules equal the logits processors of `transformers` (5.23), which the published runs decode with; a test compares
them token by token. Like those, they see prompt and answer alike, but never the padding.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Decoding(NamedTuple):
    """A repetition penalty (1 = none) and the n of n-grams that may not come twice (0 = any may)."""

    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0

    @property
    def plain(self) -> bool:
        """Whether the logits stay as they are."""
        return self == Decoding()


# `moram`: the scorer of MoRAM's TRACE runs (arXiv 2506.21035). Since it bans the prompt's 3-grams too, it can forbid
# copying a number that is tokenised digit by digit.
DECODING: dict[str, Decoding] = {
    "greedy": Decoding(),
    "moram": Decoding(repetition_penalty=1.2, no_repeat_ngram=3),
}


def _among(ids: Int[Array, "b t"], chosen: Bool[Array, "b t"], vocabulary: int) -> Bool[Array, "b v"]:
    """Which ids of the vocabulary are among the chosen ones of a row."""
    nothing = jnp.zeros(vocabulary, bool)
    return jax.vmap(lambda ids, chosen: nothing.at[ids].max(chosen))(ids, chosen)


def ruled(
    decoding: Decoding,
    logits: Float[Array, "b v"],
    history: Int[Array, "b t"],
    start: Int[Array, "b"],
    end: Int[Array, ""],
) -> Float[Array, "b v"]:
    """The logits after the penalty and then the ban, for the token that follows `history[:, start:end]` of each row.

    What stands before `start` (padding) or from `end` on (not written yet) has no part. A plain decoding costs nothing.
    """
    at = jnp.arange(history.shape[1])[None]
    real = (at >= start[:, None]) & (at < end)
    if decoding.repetition_penalty != 1.0:
        penalty = jnp.float32(decoding.repetition_penalty)
        penalised = jnp.where(logits < 0, logits * penalty, logits / penalty)
        logits = jnp.where(_among(history, real, logits.shape[-1]), penalised, logits)
    if decoding.no_repeat_ngram:
        behind = decoding.no_repeat_ngram - 1  # tokens of an n-gram before its last
        windows = history.shape[1] - behind
        suffix = jax.lax.dynamic_slice_in_dim(history, end - behind, behind, axis=1)
        complete = real[:, :windows] & real[:, behind:]
        for i in range(behind):
            complete &= history[:, i : i + windows] == suffix[:, i, None]
        banned = _among(history[:, behind:], complete, logits.shape[-1])
        logits = jnp.where(banned, -jnp.inf, logits)
    return logits
