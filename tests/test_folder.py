"""The folder benchmark: what it reads, and one clear line for whatever is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mora_jax.benchmarks import folder, stream
from mora_jax.benchmarks.stream import Example, Task
from mora_jax.errors import MoraError

RECORDS = [{"prompt": "1 + 1 =", "answer": "two"}, {"prompt": "1 + 2 =", "answer": "three"}]


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def load(root: Path, *tasks: str, **metrics: str) -> list[Task]:
    return stream.load("folder", str(root), tasks, metrics=metrics, split_seed=0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in stream.SPLITS:
        write(tmp_path / "sums" / f"{split}.json", RECORDS)
    return tmp_path


def test_reads_a_task(root: Path) -> None:
    [task] = load(root)
    assert task.name == "sums"
    assert task.metric == "exact_match"
    assert task.labels == ("three", "two")
    assert task.split("test") == (Example("1 + 1 =", "two"), Example("1 + 2 =", "three"))
    assert task.score(["two", "four"], "test") == 50.0
    assert (task.max_prompt_tokens, task.max_answer_tokens, task.max_new_tokens) == (None, None, None)


def test_default_order_is_sorted_folders_with_splits(root: Path) -> None:
    write(root / "Zoo" / "test.json", RECORDS)
    write(root / "adds" / "train.json", RECORDS)
    write(root / "notes" / "readme.json", RECORDS)
    write(root / "loose.json", RECORDS)
    assert stream.task_names("folder", str(root)) == ("Zoo", "adds", "sums")
    assert [task.name for task in load(root)] == ["Zoo", "adds", "sums"]
    assert [task.name for task in load(root, "sums", "Zoo")] == ["sums", "Zoo"]


def test_settings_and_precedence_of_the_metric(root: Path) -> None:
    write(root / "sums" / "task.json", {"metric": "last_number", "max_prompt_tokens": 4096, "max_new_tokens": 8})
    [task] = load(root)
    assert (task.metric, task.max_prompt_tokens, task.max_answer_tokens, task.max_new_tokens) == (
        "last_number",
        4096,
        None,
        8,
    )
    assert load(root, sums="fuzzy")[0].metric == "fuzzy"


@pytest.mark.parametrize(
    "content", [["World", "Sports"], {"0": "World", "1": "Sports"}, {"World": 0, "Sports": 1}], ids=str
)
def test_labels_file(root: Path, content: Any) -> None:
    write(root / "sums" / "labels.json", content)
    assert load(root)[0].labels == ("World", "Sports")


def test_labels_need_a_metric_of_labels_and_few_answers(root: Path) -> None:
    assert load(root, sums="rouge_l")[0].labels is None
    for count, expected in ((32, 32), (33, None)):
        write(root / "sums" / "train.json", [{"prompt": "", "answer": f"a{i}"} for i in range(count)])
        labels = load(root)[0].labels
        assert (labels and len(labels)) == expected


def test_numbers_become_text(root: Path) -> None:
    write(root / "sums" / "test.json", [{"prompt": "p", "answer": 7}, {"prompt": "p", "answer": 2.5}])
    assert [example.answer for example in load(root)[0].split("test")] == ["7", "2.5"]


def test_utf8_with_and_without_byte_order_mark(root: Path) -> None:
    content = json.dumps([{"prompt": "Wählen", "answer": "选A"}], ensure_ascii=False)
    for encoding in ("utf-8", "utf-8-sig"):
        (root / "sums" / "test.json").write_bytes(content.encode(encoding))
        assert load(root)[0].split("test") == (Example("Wählen", "选A"),)


def test_missing_split_is_an_error_only_when_asked_for(root: Path) -> None:
    (root / "sums" / "train.json").unlink()
    [task] = load(root)
    assert len(task.split("eval")) == 2
    assert task.majority_percent("test") is None
    with pytest.raises(MoraError, match=r"^task 'sums' has no 'train' split; it has: eval, test$"):
        task.split("train")


BAD_FILES = [
    ('[{"prompt": "p",\n "answer": }]', r"test\.json, line 2, column 12: broken JSON"),
    ({"prompt": "p", "answer": "a"}, r"test\.json: dict instead of a list"),
    ([], r"test\.json: an empty list"),
    ([*RECORDS, ["p", "a"]], r"test\.json, record 2 \(from 0\): list instead of an object"),
    ([*RECORDS, {"answer": "a"}], r'test\.json, record 2 \(from 0\): no "prompt"'),
    ([{"prompt": "p"}], r'test\.json, record 0 \(from 0\): no "answer"'),
    ([*RECORDS, {"prompt": 3, "answer": "a"}], r'test\.json, record 2 \(from 0\): "prompt" is 3; legal: text'),
    ([{"prompt": None, "answer": "a"}], r'record 0 \(from 0\): "prompt" is null; legal: text'),
    ([{"prompt": "p", "answer": True}], r'record 0 \(from 0\): "answer" is true; legal: text or a finite number'),
    ([{"prompt": "p", "answer": None}], r'record 0 \(from 0\): "answer" is null; legal'),
    ([{"prompt": "p", "answer": ["a"]}], r'record 0 \(from 0\): "answer" is \["a"\]; legal'),
    ('[{"prompt": "p", "answer": NaN}]', r'record 0 \(from 0\): "answer" is NaN; legal'),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_bad_split_file(root: Path, content: Any, message: str) -> None:
    path = write(root / "sums" / "test.json", content)
    with pytest.raises(MoraError, match=message) as error:
        load(root)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_not_utf8(root: Path) -> None:
    (root / "sums" / "test.json").write_bytes(b'[{"prompt": "\xff"}]')
    with pytest.raises(MoraError, match=r"test\.json: not UTF-8 at byte 13"):
        load(root)


BAD_SETTINGS = [
    ({"metrics": "fuzzy"}, r"task\.json: unknown key 'metrics'; legal: metric, max_prompt_tokens"),
    ({"metric": "bleu"}, r'task\.json: unknown metric "bleu"; known: accuracy, choice, exact_match'),
    ({"metric": ["fuzzy"]}, r'task\.json: unknown metric \["fuzzy"\]; known'),
    ({"max_new_tokens": 0}, r"task\.json: max_new_tokens = 0; legal: a whole number of tokens >= 1"),
    ({"max_new_tokens": True}, r"task\.json: max_new_tokens = true; legal"),
    ({"max_prompt_tokens": "9"}, r'task\.json: max_prompt_tokens = "9"; legal'),
    (["fuzzy"], r"task\.json: list instead of an object; legal keys: metric"),
    ("{", r"task\.json, line 1, column 2: broken JSON"),
]


@pytest.mark.parametrize(("content", "message"), BAD_SETTINGS)
def test_bad_settings(root: Path, content: Any, message: str) -> None:
    write(root / "sums" / "task.json", content)
    with pytest.raises(MoraError, match=message):
        load(root)


@pytest.mark.parametrize("content", [[], {}, "3", [1, 2]], ids=str)
def test_bad_labels(root: Path, content: Any) -> None:
    write(root / "sums" / "labels.json", content)
    with pytest.raises(MoraError, match=r"labels\.json: legal: a non-empty list of texts"):
        load(root)


def test_bad_root(tmp_path: Path) -> None:
    with pytest.raises(MoraError, match=r"benchmark\.root is empty; set it to the folder that holds <task>"):
        stream.task_names("folder", "")
    with pytest.raises(MoraError, match="nowhere' is no folder"):
        stream.task_names("folder", str(tmp_path / "nowhere"))
    with pytest.raises(MoraError, match="has no task: no folder in it holds"):
        stream.task_names("folder", str(tmp_path))
    with pytest.raises(MoraError, match=r"task folder .*sums holds none of train\.json"):
        folder.load_task("sums", str(tmp_path), split_seed=0, metric=None)


def test_unknown_names(root: Path) -> None:
    with pytest.raises(MoraError, match=r"unknown benchmark 'trace2'; known: folder, image_folder, .*packaged_text"):
        stream.load("trace2", str(root), [], metrics={}, split_seed=0)
    with pytest.raises(MoraError, match="unknown task of benchmark 'folder' 'sum'; known: sums"):
        load(root, "sum")
    with pytest.raises(MoraError, match="unknown task of benchmark 'folder' 'sum'; known: sums"):
        load(root, sum="fuzzy")
    with pytest.raises(MoraError, match="unknown metric 'bleu'"):
        load(root, sums="bleu")
    with pytest.raises(MoraError, match="task 'sums' is named 2 times"):
        load(root, "sums", "sums")
    assert {"folder", "packaged_text"} <= set(stream.names())


def task(**changes: Any) -> Task:
    splits = {
        "train": tuple(Example(f"p{i}", "ab"[i % 3 == 0]) for i in range(6)),
        "eval": (Example("e0", "a"), Example("e1", "b"), Example("e2", "a")),
        "test": (Example("t0", "a"), Example("t1", "b"), Example("t2", "b"), Example("t3", "b")),
    }
    return Task(**{"name": "t", "metric": "exact_match", "splits": splits, "labels": ("a", "b")} | changes)


def test_majority() -> None:
    assert task().majority_percent("test") == 25.0
    assert task().majority_percent("eval") == pytest.approx(200 / 3)
    assert task(labels=None).majority_percent("test") is None
    # Four a, two b; the first three records tie no more than the first two, where "a" comes first in order.
    assert task().limited(2, 0).majority_percent("test") == 25.0


def test_limited() -> None:
    small = task().limited(2, 1)
    assert {name: len(examples) for name, examples in small.splits.items()} == {"train": 2, "eval": 1, "test": 1}
    assert small.split("train") == task().split("train")[:2]
    assert task().limited(0, 0) == task().limited(99, 99) == task()
    with pytest.raises(MoraError, match=r"benchmark\.eval_limit = -1; legal: 0"):
        task().limited(0, -1)


def test_digest_covers_what_decides_results() -> None:
    assert task().digest == task().digest == task(labels=None).digest
    assert len(task().digest) == 64
    other = task().splits | {"test": (Example("t0", "b"),)}
    changed = [
        task(name="u"),
        task(metric="fuzzy"),
        task(splits=other),
        task(max_new_tokens=4),
        task(max_answer_tokens=4),
        task(max_prompt_tokens=4),
        task().limited(1, 0),
    ]
    assert len({task().digest, *(each.digest for each in changed)}) == 1 + len(changed)


def test_task_checks_itself() -> None:
    with pytest.raises(MoraError, match="unknown metric"):
        task(metric="bleu")
    with pytest.raises(ValueError, match="splits are"):
        task(splits={"validation": ()})
