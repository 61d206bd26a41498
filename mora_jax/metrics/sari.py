"""SARI, the score of text simplification: what was added, kept and deleted, each against source and reference.

Xu et al., "Optimizing Statistical Machine Translation for Text Simplification", TACL 2016, section 4, with the choices
of the metric `sari` of Hugging Face, which scores 20Minuten in the published TRACE runs: F is taken for each n-gram
order and then averaged, n-grams are counted with their repetitions, and 0 / 0 is 1.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

ORDERS = (1, 2, 3, 4)

# The word splitting `13a` of mteval, which BLEU scripts share: marks stand alone, but , and . stay inside a number.
_ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
_MARKS = "".join(sorted(set(string.punctuation) - set("',-.")))
_SPLITS = (
    (re.compile(f"([{re.escape(_MARKS)}])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def words(text: str) -> list[str]:
    """The lower-case words and marks of a text, split as mteval's `13a` does."""
    text = text.lower().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES.items():
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, replacement in _SPLITS:
        text = pattern.sub(replacement, text)
    return text.split()


def _ngrams(tokens: Sequence[str], order: int, times: int = 1) -> Counter[tuple[str, ...]]:
    counts = Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))
    return Counter({ngram: times * count for ngram, count in counts.items()})


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _mean_share(part: Counter, whole: Counter) -> float:
    """Mean over the n-grams of `whole` of how much of their count is in `part`."""
    return _ratio(sum(part[ngram] / count for ngram, count in whole.items()), len(whole))


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _operations(source: Counter, prediction: Counter, reference: Counter) -> float:
    """The mean of F of keeping, precision of deleting and F of adding, for n-grams of one order."""
    kept, to_keep = source & prediction, source & reference
    rightly_kept = kept & reference
    keep = _f1(_mean_share(rightly_kept, kept), _ratio(rightly_kept.total(), to_keep.total()))

    deleted = source - prediction
    delete = _mean_share(deleted - reference, deleted)

    added, to_add = set(prediction) - set(source), set(reference) - set(source)
    rightly_added = len(added & to_add)
    add = _f1(_ratio(rightly_added, len(added)), _ratio(rightly_added, len(to_add)))
    return (keep + delete + add) / 3


def sari(source: str, prediction: str, references: Sequence[str]) -> float:
    """SARI in 0..1 of a simplification of `source` with one or more references.

    An empty prediction does not score 0: it deletes everything, much of it rightly. The reference itself can miss 1: of
    an n-gram that the source has three times and both others once, it is credited with one of two deletions, since the
    published code takes the reference's count off the deleted ones (the paper takes it off the source's).
    """
    by_text = [words(reference) for reference in references]
    from_words, to_words = words(source), words(prediction)
    scores = []
    for order in ORDERS:
        pooled = sum((_ngrams(tokens, order) for tokens in by_text), Counter())
        # A count of the references is a count of so many texts, so source and prediction are counted as often.
        of_source, of_prediction = (_ngrams(tokens, order, len(by_text)) for tokens in (from_words, to_words))
        scores.append(_operations(of_source, of_prediction, pooled))
    return sum(scores) / len(scores)
