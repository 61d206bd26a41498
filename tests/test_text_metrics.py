"""Text metrics: cases worked out by hand, and the packages whose numbers two of them must reproduce."""

from __future__ import annotations

import sys

import pytest
from rouge import Rouge

from mora_jax.errors import MoraError
from mora_jax.metrics import text

PROMPT = "a b c d"  # what SARI takes for the source; the other metrics do not look at it
# metric, prediction, answer, strict, lenient
CASES = [
    ("exact_match", " Sports.", "sports", 1, 1),
    ("exact_match", "science & technology", "Science &  Technology", 1, 1),
    ("exact_match", "sports\nThe match was", "sports", 0, 1),
    ("exact_match", "sports.The match", "sports", 0, 1),
    ("exact_match", "sportswear", "sports", 0, 0),
    ("exact_match", "the sports", "sports", 0, 0),
    ("exact_match", "very negative", "very negative", 1, 1),
    ("exact_match", "very", "very negative", 0, 0),
    ("exact_match", "negative", "very negative", 0, 0),
    ("exact_match", "don't", "dont", 1, 1),
    ("exact_match", "", "sports", 0, 0),
    ("exact_match", "", "?", 0, 0),
    ("exact_match", " ?", "?", 1, 1),
    ("string_equality", "B", "B", 1, 1),
    ("string_equality", "B ", "B", 0, 1),
    ("string_equality", " B\nbecause", "B", 0, 1),
    ("string_equality", "b", "B", 0, 0),
    ("string_equality", "7.5", "7", 0, 0),
    ("string_equality", "", "", 0, 0),
    ("accuracy", "forest", "forest", 1, 1),
    ("accuracy", "EuroSAT: forest", "forest", 0, 0),  # a class of another task
    ("choice", "B", "B", 1, 1),
    ("choice", " B. hawkish", "B", 1, 1),
    ("choice", "Answer: C", "C", 1, 1),
    ("choice", "我选A吧", "A", 1, 1),  # no word boundary between letters of two scripts: the fallback finds it
    ("choice", "BAD, so C", "C", 1, 1),  # a letter that stands alone wins over one inside a word
    ("choice", "Apples", "A", 1, 1),
    ("choice", "b", "B", 0, 0),
    ("choice", "D", "D", 0, 0),
    ("choice", "", "A", 0, 0),
    ("last_number", "12", "12", 1, 1),
    ("last_number", " 3 + 4 = 7", "7", 1, 1),
    ("last_number", "7 because 3 + 4", "7", 0, 1),
    ("last_number", "1,234.50 dollars", "1234.5", 1, 1),
    ("last_number", "1,23", "23", 1, 1),
    ("last_number", "5-3", "3", 1, 1),
    ("last_number", "5-3", "-3", 0, 0),
    ("last_number", "it is -3.", "-3", 1, 1),
    ("last_number", ".5", "0.50", 1, 1),
    ("last_number", "0.1", "0.10", 1, 1),
    ("last_number", "10000000000000001", "10000000000000000", 0, 0),
    ("last_number", "none", "7", 0, 0),
    ("last_number", "", "7", 0, 0),
    ("last_number", "friday.", "Friday", 1, 1),
    ("last_number", "Friday, day 5", "Friday", 0, 1),
    ("fuzzy", "return x", "return x", 1, 1),
    ("fuzzy", "return x\nprint ( y )", "return x", 0.57, 1),  # 2 * 8 of 20 + 8 characters,
    ("fuzzy", "x = <NUM_LIT>", "x = 0", 1, 1),
    ("fuzzy", "f ( '<STR_LIT>' )", "f ( '' )", 1, 1),
    ("fuzzy", "f ( <CHAR_LIT> )", "f (  )", 1, 1),
    ("fuzzy", "v = <NUM_LIT:5> + <STR_LIT:a b>", "v = 5 + a b", 1, 1),
    ("fuzzy", "", "return x", 0, 0),
    ("fuzzy", "<STR_LIT>", "<STR_LIT>", 0, 0),
    ("fuzzy", "ab", "cd", 0, 0),
    ("rouge_l", "", "a b", 0, 0),
    ("rouge_l", "...", "a b", 0, 0),
    ("rouge_l", " . ", "a. b. ", 0, 0),
    ("rouge_l", "a b", ".", 0, 0),
    ("rouge_l", "x y", "a b", 0, 0),
    # 2 shared words of 4 and of 2: P = 1/2, R = 1, F = 2/3. The first line alone matches entirely.
    ("rouge_l", "a b c d", "a b", 2 / 3, 2 / 3),
    ("rouge_l", "\na b\nc d", "a b", 2 / 3, 1),
    ("first_character", "B\nbecause", "B\nfor it is", 1, 1),
    ("first_character", " B", "B", 0, 1),
    ("first_character", " B", " B\nfor", 1, 1),
    ("first_character", "A", "B", 0, 0),
    ("first_character", "", "B", 0, 0),
    ("first_character", "", "", 0, 0),
    ("sari", "a b e", "a c e", 2 / 3, 2 / 3),  # worked out in test_sari.py
    ("sari", "a b e\nmore", "a c e", 5 / 9, 2 / 3),
]


@pytest.mark.parametrize(("name", "prediction", "answer", "strict", "lenient"), CASES)
def test_by_hand(name: str, prediction: str, answer: str, strict: float, lenient: float) -> None:
    metric = text.metric(name)
    # The rouge package adds 1e-8 to a denominator.
    assert metric.of(prediction, answer, PROMPT) == pytest.approx(strict, abs=1e-7)
    assert metric.of(prediction, answer, PROMPT, lenient=True) == pytest.approx(lenient, abs=1e-7)


def test_every_metric_has_cases_and_lenient_is_never_stricter() -> None:
    assert {case[0] for case in CASES} == set(text.METRICS)
    for row in text.METRICS.values():
        for _, prediction, answer, _, _ in CASES:
            assert 0 <= row.of(prediction, answer, PROMPT) <= row.of(prediction, answer, PROMPT, lenient=True) <= 1


SENTENCES = [
    ("The council approved the budget. It passed five to two.", "The budget was approved. The vote was five to two."),
    ("a b a b c", "a a b b c c"),
    ("One. Two. Three.", "Three. Two. One."),
    ("Multiple   blanks \n and lines. Here", "multiple blanks and lines. Here."),
]


@pytest.mark.parametrize(("prediction", "answer"), SENTENCES)
def test_rouge_l_is_the_package(prediction: str, answer: str) -> None:
    assert text.rouge_l(prediction, answer) == Rouge().get_scores(prediction, answer)[0]["rouge-l"]["f"]


def test_rouge_l_of_long_sentences() -> None:
    limit = sys.getrecursionlimit()
    words = [f"w{i}" for i in range(1200)]
    prediction, answer = " ".join(words), " ".join(words[:6])
    with pytest.raises(RecursionError):
        Rouge().get_scores(prediction, answer)
    # P = 6/1200, R = 1.
    assert text.rouge_l(prediction, answer) == pytest.approx(2 * 6 / 1206, abs=1e-7)
    assert sys.getrecursionlimit() == limit


@pytest.mark.parametrize(("prediction", "answer"), [*SENTENCES, ("import os", "import sys"), ("a", "aaaaaaa")])
def test_fuzzy_is_the_ratio_of_the_published_scorer(prediction: str, answer: str) -> None:
    pytest.importorskip("Levenshtein", reason="without it fuzzywuzzy takes another ratio")
    fuzz = pytest.importorskip("fuzzywuzzy.fuzz", reason="the package of the published scorer is not installed")
    for one, other in ((prediction, answer), (answer, prediction), (prediction, f"{prediction} ; {answer}")):
        assert text.fuzzy(one, other) == fuzz.ratio(one, other) / 100


def test_fuzzy_rounds_to_whole_percent() -> None:
    # Indel distance 1 of 3 characters: 66.67 %, which the published scorer gives as the integer 67.
    assert text.fuzzy("ab", "a") == 0.67


def test_mean_percent() -> None:
    metric = text.metric("exact_match")
    records = (["a", "b", "c d", "e"], ["a", "x", "c", "e"], ["p"] * 4)
    assert text.mean_percent(metric, *records) == 50.0
    assert text.mean_percent(metric, *records, lenient=True) == 75.0


def test_mean_percent_gives_each_record_its_own_prompt() -> None:
    """The same words are kept from one prompt and added to the other."""
    metric = text.metric("sari")
    scores = [100 * metric.of("a b e", "a c e", prompt) for prompt in (PROMPT, "x y")]
    assert scores[0] != scores[1]
    mean = text.mean_percent(metric, ["a b e"] * 2, ["a c e"] * 2, [PROMPT, "x y"])
    assert mean == pytest.approx(sum(scores) / 2)


@pytest.mark.parametrize(
    ("predictions", "answers", "prompts"),
    [(["a"], ["a", "b"], ["p", "p"]), (["a"], ["a"], []), ([], [], [])],
)
def test_mean_percent_needs_whole_records(predictions: list[str], answers: list[str], prompts: list[str]) -> None:
    with pytest.raises(ValueError, match="as many predictions"):
        text.mean_percent(text.metric("choice"), predictions, answers, prompts)


def test_unknown_metric() -> None:
    with pytest.raises(MoraError, match="unknown metric 'bleu'; known: accuracy, choice, exact_match, first_character"):
        text.metric("bleu")
