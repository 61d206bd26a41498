"""CLIP's tokenizer: known ids, transformers' tokenizer on the same texts, folders, cutting, and what is refused."""

from __future__ import annotations

import json
import pickle
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mora_jax.errors import MoraError
from mora_jax.models.clip_tokenizer import END, START, ClipTokenizer

TEXTS = (
    "a photo of a Boeing 737-800, a type of aircraft.",
    'a photo of the number: "7".',
    "a centered satellite photo of the annual crop land.",
    "  Two\tblanks \n and a line  ",
    "It's they'll I'd we've you're I'm can't",
    "Œuvre naïve Café café Ünïcödé İstanbul ẞ",
    "2012 1234567890 ½ ² Ⅷ",
    "日本語のテキスト и русский 🐈‍⬛ 👩🏽‍🚀",
    "!!! ... ;-) a_b c--d \\ ' ''s '''",
    "zero\u200bwidth non\u00a0breaking\u3000ideographic",
    "",
    " ",
)


@cache
def packaged() -> ClipTokenizer:
    return ClipTokenizer.packaged()


def of_one_row(row: np.ndarray) -> list[int]:
    """The ids up to the first end of text."""
    ids = row.tolist()
    return ids[: ids.index(49407) + 1]


@pytest.mark.parametrize(
    ("text", "ids"),
    [  # as OpenAI's clip.tokenize prints them
        ("Hello World!", [3306, 1002, 256]),
        ("a diagram", [320, 22697]),
        ("a dog", [320, 1929]),
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("", []),
    ],
)
def test_known_ids(text: str, ids: list[int]) -> None:
    rows = packaged()([text])
    assert rows.shape == (1, 77)
    assert rows.dtype == np.int32
    assert rows[0].tolist() == [49406, *ids, 49407] + [0] * (75 - len(ids))


def test_the_vocabulary_is_that_of_the_models() -> None:
    tokenizer = packaged()
    assert (tokenizer.vocab_size, tokenizer.start_id, tokenizer.end_id) == (49408, 49406, 49407)
    assert "open_clip" not in sys.modules


def their_tokenizer() -> Any:
    """transformers' CLIPTokenizer with our vocabulary, which is in the model's order."""
    transformers = pytest.importorskip("transformers", reason="transformers is the other side of the comparison")
    model = json.loads(packaged()._backend.to_str())["model"]
    return transformers.CLIPTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def test_ids_equal_transformers() -> None:
    theirs = their_tokenizer()
    rng = np.random.default_rng(0)
    letters = np.array(list("abcXYZ   '.,-0123éßЖ漢\n"))
    noise = ["".join(rng.choice(letters, 30)) for _ in range(200)]
    for text, row in zip((*TEXTS, *noise), packaged()([*TEXTS, *noise]), strict=True):
        assert of_one_row(row) == theirs(text)["input_ids"], text


def test_a_folder_of_transformers_is_read(tmp_path: Path) -> None:
    their_tokenizer().save_pretrained(tmp_path)
    read = ClipTokenizer.from_folder(tmp_path)
    np.testing.assert_array_equal(read(TEXTS), packaged()(TEXTS))
    assert (read.vocab_size, read.start_id, read.end_id) == (49408, 49406, 49407)
    assert of_one_row(read([f"x{END}"])[0]) == of_one_row(packaged()([f"x{END}"])[0])


def written(folder: Path) -> Path:
    model = json.loads(packaged()._backend.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_vocab_and_merges_are_read(tmp_path: Path) -> None:
    np.testing.assert_array_equal(ClipTokenizer.from_folder(written(tmp_path))(TEXTS), packaged()(TEXTS))


def test_a_long_text_is_cut_and_still_ends() -> None:
    tokenizer = packaged()
    rows = tokenizer(["cat " * 75, "cat " * 76, "cat " * 500])
    assert rows[:, 0].tolist() == [49406] * 3
    assert rows[:, -1].tolist() == [49407] * 3
    np.testing.assert_array_equal(rows[1:], rows[:1].repeat(2, 0))
    assert set(rows[0, 1:-1]) == {2368}
    short = ClipTokenizer.packaged(context=5)(["a photo of a cat", "cat"])
    assert short.tolist() == [[49406, 320, 1125, 539, 49407], [49406, 2368, 49407, 0, 0]]


def test_a_special_token_inside_a_text_is_text() -> None:
    rows = packaged()([f"before {END} after", f"{START}{START}"])
    assert (rows == 49407).sum(axis=1).tolist() == [1, 1]
    assert (rows == 49406).sum(axis=1).tolist() == [1, 1]


def test_a_pickled_tokenizer_is_the_same() -> None:
    tokenizer = ClipTokenizer.packaged(context=9)
    again = pickle.loads(pickle.dumps(tokenizer))
    texts = [*TEXTS, f"before {END} after"]
    np.testing.assert_array_equal(again(texts), tokenizer(texts))


def test_no_texts() -> None:
    assert packaged()([]).shape == (0, 77)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}", encoding="utf-8")
    with pytest.raises(MoraError, match=r"no tokenizer; known: tokenizer\.json, vocab\.json with merges\.txt"):
        ClipTokenizer.from_folder(tmp_path)


def test_a_broken_tokenizer_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(MoraError, match=r"tokenizer\.json: not a readable tokenizer"):
        ClipTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ("[]", "", r"vocab\.json: holds a JSON list"),
        ('{"a": 0, "b": 1}', "a b\n", "merge 'a' 'b' needs the token 'ab', which has no id"),
        ('{"a": 0, "b": 1}', "a b c\n", r"merges\.txt: merge 0 is 'a b c'; it must be two tokens"),
        ('{"a": 0}', "", r"no token '<\|startoftext\|>' in the vocabulary"),
    ],
)
def test_a_broken_vocabulary(vocab: str, merges: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(vocab, encoding="utf-8")
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    with pytest.raises(MoraError, match=message):
        ClipTokenizer.from_folder(tmp_path)


def test_a_context_without_room() -> None:
    with pytest.raises(MoraError, match="a context of 2 tokens has no room"):
        ClipTokenizer.packaged(context=2)
