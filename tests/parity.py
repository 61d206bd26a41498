"""Comparing a decoder with transformers: logits, and greedy text token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny_decoder import our_logits

from mora_jax.models import hf
from mora_jax.models.decoder import Decoder
from mora_jax.runtime.distributed import AXES
from mora_jax.runtime.generate import Generator

TOLERANCE = 2e-4  # of a logit, float32, absolute
PROMPT_LENGTHS = (5, 1, 23, 12, 70, 2)  # 70 is past the smallest prompt bucket, so the rows are padded a lot
NEW_TOKENS = 12


class Numbers:
    """Texts are numbers in words, and every number is a token; nothing added but BOS, nothing lost in decoding."""

    def __init__(self, bos_id: int | None = None, eos_id: int = 0, pad_id: int = 0):
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def spelled(rows: Sequence[Sequence[int]]) -> list[str]:
    return [" ".join(map(str, row)) for row in rows]


@pytest.fixture(scope="session")
def one_device() -> Mesh:
    """A mesh of one device: what 8 fake ones on the same cores do with these models is in test_generate.py."""
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)


def transformers_or_skip() -> tuple[Any, Any]:
    torch = pytest.importorskip("torch", reason="torch is the other side of the comparison")
    return torch, pytest.importorskip("transformers", reason="transformers is the other side of the comparison")


def ids_of(lengths: Sequence[int], vocab: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(1, vocab, length).tolist() for length in lengths]


def their_logits(torch: Any, model: Any, tokens: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def their_greedy(
    torch: Any, model: Any, rows: Sequence[Sequence[int]], new: int, eos: int, pad: int
) -> list[list[int]]:
    """generate(do_sample=False) over one left-padded batch; each answer up to its EOS."""
    width = max(map(len, rows))
    tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():
        out = model.generate(
            tokens, attention_mask=mask, do_sample=False, max_new_tokens=new, eos_token_id=eos, pad_token_id=pad
        )
    answers = out[:, width:].tolist()
    return [answer[: answer.index(eos)] if eos in answer else answer for answer in answers]


def randomise(torch: Any, model: Any, scale: float = 0.3) -> Any:
    """Biases start at 0 and norms at one number, where errors hide."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, scale)
    return model.eval()


def assert_equal_logits(torch: Any, model: Any, folder: Path) -> None:
    """What we read from `folder` gives the logits of `model`."""
    config = hf.load_config(folder)
    tokens = ids_of((33, 33, 33), config.vocab_size)
    theirs = their_logits(torch, model, tokens)
    assert theirs.std() > 0.3  # else nothing is compared
    ours = our_logits(Decoder(config), hf.load_params(folder, config, np.float32), tokens)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


def assert_equal_greedy_ids(torch: Any, model: Any, folder: Path, mesh: Mesh) -> None:
    """With an EOS that stops some rows early and others not at all."""
    config = hf.load_config(folder)
    vocab = config.vocab_size
    rows = ids_of(PROMPT_LENGTHS, vocab)
    whole = their_greedy(torch, model, rows, NEW_TOKENS, eos=vocab, pad=0)  # an EOS that never comes
    assert {len(answer) for answer in whole} == {NEW_TOKENS}
    stops = [sum(token in answer for answer in whole) for token in range(vocab)]
    early = next(token for token in range(vocab) if 0 < stops[token] < len(rows))
    stopped = their_greedy(torch, model, rows, NEW_TOKENS, eos=early, pad=0)
    assert min(map(len, stopped)) < NEW_TOKENS == max(map(len, stopped))
    ours = Generator(Decoder(config), Numbers(eos_id=early), mesh)(
        {"params": hf.load_params(folder, config, np.float32)},
        spelled(rows),
        max_prompt_tokens=128,
        max_new_tokens=NEW_TOKENS,
        batch_size=len(rows),
        after_batch=lambda n: None,
    )
    assert ours.texts == spelled(stopped)
