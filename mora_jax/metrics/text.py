"""Text metrics: a table of pure functions of two strings, the prediction and the answer, each giving 0..1.

A metric that also reads the prompt (SARI: what was simplified) says so in its row.

A new metric is a new row of `METRICS`. `score` is strict. `lenient` also counts a right answer that is followed by more
text: the larger of the strict score and the score of the prediction's leading part. It tells "does not know" from "does
not stop", which is most of the gap of an untrained model.
"""

from __future__ import annotations

import re
import string
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from rapidfuzz import fuzz
from rouge import Rouge

from mora_jax.errors import unknown
from mora_jax.metrics.sari import sari


@dataclass(frozen=True)
class Metric:
    """A metric: strict and lenient score in 0..1 of (prediction, answer), or of (prediction, answer, prompt).

    `labels` says whether always giving the most frequent answer is a meaningful baseline.
    """

    name: str
    score: Callable[..., float]
    lenient: Callable[..., float]
    labels: bool
    reads_prompt: bool = False

    def of(self, prediction: str, answer: str, prompt: str, lenient: bool = False) -> float:
        """The score of one record in 0..1."""
        function = self.lenient if lenient else self.score
        return function(prediction, answer, prompt) if self.reads_prompt else function(prediction, answer)


# --- exact_match ------------------------------------------------------------------------------------------------------

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
_BLANK_PUNCTUATION = str.maketrans(string.punctuation, " " * len(string.punctuation))


def _normalised(text: str) -> str:
    return " ".join(text.lower().translate(_DELETE_PUNCTUATION).split())


def _words(text: str) -> list[str]:
    # Punctuation becomes a blank here, so that "sports.The" begins with the word "sports".
    return text.lower().translate(_BLANK_PUNCTUATION).split()


def exact_match(prediction: str, answer: str) -> float:
    """1 if equal after lower-casing, deleting ASCII punctuation and collapsing blanks (O-LoRA, arXiv 2310.14152).

    An answer made of punctuation alone is compared as it stands: normalised, it would equal an empty prediction.
    """
    expected = _normalised(answer)
    if not expected:
        return float(prediction.strip() == answer.strip())
    return float(_normalised(prediction) == expected)


def _exact_match_lenient(prediction: str, answer: str) -> float:
    expected = _words(answer)
    begins = bool(expected) and _words(prediction)[: len(expected)] == expected
    return max(exact_match(prediction, answer), float(begins))


def string_equality(prediction: str, answer: str) -> float:
    """1 if the two strings are the same, character by character, and not empty: the strict scorer of TRACE's choices
    and arithmetic (arXiv 2310.06762)."""
    return float(prediction == answer != "")


def _string_equality_lenient(prediction: str, answer: str) -> float:
    expected = answer.split()
    begins = bool(expected) and prediction.split()[: len(expected)] == expected
    return max(string_equality(prediction, answer), float(begins))


# --- choice, first_character ------------------------------------------------------------------------------------------

_CHOICES = "ABC"
_CHOICE_WORD = re.compile(rf"\b([{_CHOICES}])\b")


def _choice_of(text: str) -> str | None:
    word = _CHOICE_WORD.search(text)
    if word:
        return word.group(1)
    return next((letter for letter in text if letter in _CHOICES), None)


def choice(prediction: str, answer: str) -> float:
    r"""1 if the chosen letter is the answer's: the first match of `\b([ABC])\b`, else the first A, B or C anywhere.

    The scorer of MoRAM's TRACE runs (arXiv 2506.21035) for the three-way tasks C-STANCE and FOMC; letters after C are
    no choices. A prediction (or an answer) without a letter scores 0. Leading blanks never matter, so lenient = strict.
    """
    expected = _choice_of(answer)
    return float(expected is not None and _choice_of(prediction) == expected)


def first_character(prediction: str, answer: str) -> float:
    """1 if the first characters are equal: ScienceQA of TRACE (arXiv 2310.06762), where "B\\n<reason>" is the answer.

    Blanks that begin the answer are expected of the prediction too, and then passed over.
    """
    expected = answer.lstrip()
    blanks = answer[: len(answer) - len(expected)]
    found = prediction.removeprefix(blanks)
    return float(found[:1] == expected[:1] != "")


def _first_character_lenient(prediction: str, answer: str) -> float:
    return first_character(prediction.lstrip(), answer.lstrip())


# --- last_number ------------------------------------------------------------------------------------------------------

# A sign counts only where no word or number stands before it: "3-4" holds 3 and 4, "= -4" holds -4.
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+])?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\d.])\.\d+)", re.ASCII
)


def _numbers(text: str) -> list[Decimal]:
    # Decimal, not float: "0.10" equals "0.1", and integers of any length stay exact.
    return [Decimal(number.replace(",", "")) for number in _NUMBER.findall(text)]


def _number_score(prediction: str, answer: str, position: int) -> float | None:
    """1 or 0 for the prediction's number at `position` against the answer's last; None if the answer has no number."""
    expected = _numbers(answer)
    if not expected:
        return None
    found = _numbers(prediction)
    return float(bool(found) and found[position] == expected[-1])


def last_number(prediction: str, answer: str) -> float:
    """1 if the last number of the prediction equals the last number of the answer: NumGLUE in MoRAM's TRACE runs.

    Reads signs, decimals and commas between thousands; a fraction such as 1/2 is two numbers. An answer without
    a number ("Friday") is compared as `exact_match` does.
    """
    score = _number_score(prediction, answer, -1)
    return exact_match(prediction, answer) if score is None else score


def _last_number_lenient(prediction: str, answer: str) -> float:
    score = _number_score(prediction, answer, 0)
    if score is None:
        return _exact_match_lenient(prediction, answer)
    return max(last_number(prediction, answer), score)


# --- fuzzy, rouge_l ---------------------------------------------------------------------------------------------------


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


_LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)


def _literals_restored(code: str) -> str:
    """Py150's placeholders as code: `<NUM_LIT>` -> 0, bare `<STR_LIT>`, `<CHAR_LIT>` -> nothing, `<X_LIT:v>` -> v."""
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return _LITERAL.sub(r"\1", code)


def fuzzy(prediction: str, answer: str) -> float:
    """Edit similarity in whole percent / 100 after restoring Py150's literals (TRACE, arXiv 2310.06762).

    Equals `fuzzywuzzy.fuzz.ratio` with python-Levenshtein: round(100 * (1 - indel distance / total length)). Like the
    published scorer it gives 0 when either string is empty after the literals are restored.
    """
    prediction, answer = _literals_restored(prediction), _literals_restored(answer)
    if not prediction or not answer:
        return 0.0
    return round(fuzz.ratio(prediction, answer)) / 100


def _fuzzy_lenient(prediction: str, answer: str) -> float:
    return max(fuzzy(prediction, answer), fuzzy(_first_line(prediction), answer))


_ROUGE = Rouge(metrics=["rouge-l"], stats=["f"])


def _longest_sentence(text: str) -> int:
    return max(len(sentence.split()) for sentence in text.split("."))


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L F of the `rouge` package 1.0.1 (summary level, distinct words), the scorer of TRACE's MeetingBank.

    0 if either text has nothing but blanks and full stops: the package raises there, or counts the empty sentence after
    a full stop as a shared word. It also recurses once per word of two sentences, so long ones need a higher limit.
    """
    if not prediction.replace(".", " ").strip() or not answer.replace(".", " ").strip():
        return 0.0
    limit = sys.getrecursionlimit()
    needed = limit + _longest_sentence(prediction) + _longest_sentence(answer)
    try:
        sys.setrecursionlimit(needed)
        return float(_ROUGE.get_scores(prediction, answer)[0]["rouge-l"]["f"])
    finally:
        sys.setrecursionlimit(limit)


def _rouge_l_lenient(prediction: str, answer: str) -> float:
    return max(rouge_l(prediction, answer), rouge_l(_first_line(prediction), answer))


# --- sari -------------------------------------------------------------------------------------------------------------


def simplification(prediction: str, answer: str, prompt: str) -> float:
    """SARI with the whole prompt, its instruction included, as the source: 20Minuten in the published TRACE runs."""
    return sari(prompt, prediction, [answer])


def _simplification_lenient(prediction: str, answer: str, prompt: str) -> float:
    return max(simplification(text, answer, prompt) for text in (prediction, _first_line(prediction)))


# --- the table --------------------------------------------------------------------------------------------------------

METRICS: dict[str, Metric] = {
    row.name: row
    for row in (
        Metric("exact_match", exact_match, _exact_match_lenient, labels=True),
        Metric("string_equality", string_equality, _string_equality_lenient, labels=True),
        Metric("accuracy", string_equality, string_equality, labels=True),  # of names of classes
        Metric("choice", choice, choice, labels=True),
        Metric("last_number", last_number, _last_number_lenient, labels=False),
        Metric("fuzzy", fuzzy, _fuzzy_lenient, labels=False),
        Metric("rouge_l", rouge_l, _rouge_l_lenient, labels=False),
        Metric("first_character", first_character, _first_character_lenient, labels=True),
        Metric("sari", simplification, _simplification_lenient, labels=False, reads_prompt=True),
    )
}


def metric(name: str) -> Metric:
    """The row of `METRICS` with that name; MoraError naming the known ones otherwise."""
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]


def mean_percent(
    metric: Metric, predictions: Sequence[str], answers: Sequence[str], prompts: Sequence[str], lenient: bool = False
) -> float:
    """Mean score of the records in percent, 0..100. ValueError for no records or different lengths."""
    if not answers or not len(predictions) == len(answers) == len(prompts):
        counts = f"{len(predictions)}, {len(answers)}, {len(prompts)}"
        raise ValueError(f"need as many predictions as answers and prompts and at least one: {counts}")
    records = zip(predictions, answers, prompts, strict=True)
    return 100.0 * sum(metric.of(*record, lenient) for record in records) / len(answers)
