"""SARI: cases worked out by hand, the value printed for Hugging Face's metric, and the word splitting it rests on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mora_jax.metrics.sari import sari, words

# source, prediction, references, and the score of each of the four n-gram orders as (keep + delete + add) / 3
BY_HAND = [
    # Everything right, and 0 / 0 counts as right where there are no n-grams.
    ("a b c", "a b", ["a b"], [1, 1, 1, 1]),
    # 1: keeps a of {a, b}, should keep {a, c}: F = 1/2; deletes d of {c, d} rightly: 1/2; adds e: 1.
    # 2: ab is kept wrongly: 0; both deleted rightly: 1; be is added wrongly: 0.    3: 1, 1, 0.    4: 1, 1, 1.
    ("a b c d", "a b e", ["a c e"], [2 / 3, 1 / 3, 2 / 3, 1]),
    # Repetitions count. 1: keeps a and b once each, of them a rightly: P = 1/2; should keep a twice: R = 1/2; F = 1/2;
    # deletes one a wrongly: 0; adds nothing and should not: 1.    2: 0, 0, 1.    3 and 4: 1.
    ("a a b", "a b", ["a a"], [1 / 2, 1 / 3, 1, 1]),
    # 1: an empty prediction keeps nothing of {a}: 0; deletes {a, b}, b rightly: 1/2; adds nothing and should not: 1.
    ("a b", "", ["a"], [1 / 2, 1, 1, 1]),
    # Two references, so source and prediction count twice. 1: keeps a twice, which one of two does: P = 1/2; should
    # keep a and b once: R = 1/2; F = 1/2; deletes b twice, once rightly: 1/2; adds nothing and should not: 1.
    ("a b", "a", ["a", "b"], [2 / 3, 1, 1, 1]),
    # The reference itself, where the source has a three times. 1: keeps a rightly: 1; deletes two, of which the
    # published count credits one: 1/2; adds nothing and should not: 1.    2 to 4: all is rightly deleted, or empty.
    ("a a a", "a", ["a"], [2.5 / 3, 1, 1, 1]),
]


@pytest.mark.parametrize(("source", "prediction", "references", "orders"), BY_HAND)
def test_by_hand(source: str, prediction: str, references: list[str], orders: list[float]) -> None:
    assert sari(source, prediction, references) == pytest.approx(sum(orders) / 4, abs=1e-12)


def test_the_value_on_the_card_of_the_published_metric() -> None:
    """huggingface.co/spaces/evaluate-metric/sari shows 26.953601953601954 for this example of the paper's author."""
    references = [
        "About 95 species are currently known.",
        "About 95 species are now accepted.",
        "95 species are now accepted.",
    ]
    score = sari("About 95 species are currently accepted.", "About 95 you now get in.", references)
    assert 100 * score == pytest.approx(26.953601953601954, abs=1e-12)


def test_case_does_not_count_and_marks_are_words() -> None:
    assert sari("A B, c", "a b", ["A B"]) == sari("a b , C", "A B", ["a b"])
    assert words("It's 3,5 or 1.000,-; (Ja)!") == ["it's", "3,5", "or", "1.000", ",", "-", ";", "(", "ja", ")", "!"]
    assert words("5-3 a-b\nx-\ny &amp; &quot;z&quot;.") == ["5", "-", "3", "a-b", "xy", "&", '"', "z", '"', "."]


def test_words_are_those_of_sacrebleu(shared_data: Path) -> None:
    tokenizer = pytest.importorskip("sacrebleu.tokenizers.tokenizer_13a", reason="sacrebleu is not installed")
    split = tokenizer.Tokenizer13a()
    records = json.loads((shared_data / "trace" / "20Minuten" / "test.json").read_text(encoding="utf-8"))
    assert len(records) == 100
    for record in records:
        for text in record.values():
            assert " ".join(words(text)) == split(text.lower())
