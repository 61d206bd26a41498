"""Benchmark `image_folder`: what a directory of pictures is read as, and what is wrong with a half-prepared one."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from small_pictures import COUNTS, TASKS, write_pictures

from mora_jax.benchmarks import image_folder, stream
from mora_jax.benchmarks.pictures import Picture, PictureTask
from mora_jax.errors import AGAIN, MoraError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures")


def load(root: Path, name: str = "colours") -> PictureTask:
    return image_folder.load_task(name, str(root), split_seed=0, metric=None)


# --- what is read -----------------------------------------------------------------------------------------------------


def test_tasks_are_the_folders_with_splits(root: Path) -> None:
    (root / "notes").mkdir()
    (root / ".cache" / "train").mkdir(parents=True)
    (root / "readme.txt").touch()
    assert image_folder.task_names(str(root)) == ("colours", "shades")


def test_classes_are_the_folders_of_the_train_split(root: Path) -> None:
    task = load(root)
    assert task.classes == task.labels == ("dark blue", "green", "red")
    assert task.templates == ("a photo of a {}.",)
    assert task.metric == "accuracy"
    assert {split: len(pictures) for split, pictures in task.splits.items()} == {
        split: count * len(TASKS["colours"]) for split, count in COUNTS.items()
    }
    first = task.split("train")[0]
    assert (first.source, first.prompt, first.answer) == (*["colours/train/dark_blue/0.png"] * 2, "dark blue")
    assert first.read() == (root / first.source).read_bytes()


def test_an_eval_split_is_optional(root: Path) -> None:
    shutil.copytree(root / "shades" / "test", root / "shades" / "eval")
    assert len(load(root, "shades").split("eval")) == 2 * COUNTS["test"]
    with pytest.raises(MoraError, match="'colours' has no 'eval' split; it has: train, test"):
        load(root).split("eval")


def test_pictures_decide_the_digest(root: Path) -> None:
    before = load(root).digest
    assert load(root).digest == before
    path = root / "colours" / "test" / "red" / "0.png"
    shutil.copy(root / "colours" / "test" / "green" / "0.png", path)
    assert load(root).digest != before
    path.unlink()
    path.symlink_to(root / "nowhere")  # told when it is to be read
    assert len(load(root).digest) == 64


def test_pixels_and_not_their_encoding_decide_the_digest(root: Path) -> None:
    before, path = load(root).digest, root / "colours" / "test" / "red" / "0.png"
    with Image.open(path) as picture:
        picture.load()
    encoded = path.read_bytes()
    picture.save(path, compress_level=1)  # as another version of zlib
    assert path.read_bytes() != encoded
    assert load(root).digest == before
    path.write_bytes(encoded[:-30])
    assert load(root).digest != before, "a damaged one"


def test_a_picture_that_cannot_be_read_now_is_no_other_picture(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    task = load(root)
    monkeypatch.setattr(Path, "read_bytes", fail)
    task = dataclasses.replace(task, splits={"test": (Picture("red/0.png", "red", functools.partial(fail, root)),)})
    with pytest.raises(MoraError, match=r"red/0.png cannot be read now \(.*Input/output error\); try again") as refused:
        _ = task.digest
    assert refused.value.code == AGAIN


def test_names_and_templates_may_be_given(root: Path) -> None:
    (root / "colours" / "classnames.txt").write_text("red = scarlet\n\ngreen=light green\ndark_blue = navy\n")
    (root / "colours" / "templates.txt").write_text("a patch of {}.\n{} everywhere.\n")
    task = load(root)
    assert task.classes == ("navy", "light green", "scarlet")
    assert task.templates == ("a patch of {}.", "{} everywhere.")
    assert task.split("test")[-1].answer == "scarlet"


def test_hidden_files_are_passed_over(root: Path) -> None:
    (root / "shades" / "train" / "white" / ".DS_Store").touch()
    (root / "shades" / "train" / ".ipynb_checkpoints").mkdir()
    assert len(load(root, "shades").split("train")) == 2 * COUNTS["train"]


def test_moving_the_folder_changes_no_digest(root: Path, tmp_path: Path) -> None:
    before = load(root).digest
    root.rename(tmp_path / "elsewhere")
    assert load(tmp_path / "elsewhere").digest == before


def test_classes_and_templates_are_part_of_the_digest(root: Path) -> None:
    before = load(root).digest
    (root / "colours" / "templates.txt").write_text("a patch of {}.\n")
    assert load(root).digest != before


# --- shots ------------------------------------------------------------------------------------------------------------


def test_shots_are_drawn_for_each_class_by_seed(root: Path) -> None:
    task = load(root)
    drawn = {seed: task.few_shot(3, seed) for seed in (0, 1)}
    for few in drawn.values():
        assert Counter(p.answer for p in few.split("train")) == dict.fromkeys(task.classes, 3)
        assert set(few.split("train")) <= set(task.split("train"))
        assert few.split("test") == task.split("test")
    assert drawn[0].digest == task.few_shot(3, 0).digest != drawn[1].digest
    assert drawn[0].variant == "3 shots drawn with seed 0"
    assert task.few_shot(0, 0) is task


def test_other_classes_do_not_change_a_draw(root: Path) -> None:
    before = [p for p in load(root).few_shot(2, 5).split("train") if p.answer == "red"]
    shutil.rmtree(root / "colours" / "train" / "green")
    shutil.rmtree(root / "colours" / "test" / "green")
    assert [p for p in load(root).few_shot(2, 5).split("train") if p.answer == "red"] == before


def test_a_class_with_fewer_pictures_than_shots_gives_all(root: Path) -> None:
    for i in range(2, COUNTS["train"]):
        (root / "colours" / "train" / "red" / f"{i}.png").unlink()
    few = load(root).few_shot(4, 0)
    assert Counter(p.answer for p in few.split("train")) == {"dark blue": 4, "green": 4, "red": 2}
    assert few.variant == "4 shots drawn with seed 0, all there are of 1 of 3 classes that have fewer (red)"


def test_shots_need_labels() -> None:
    task = stream.Task("sums", "last_number", {"train": (stream.Example("1 + 1 =", "2"),)})
    with pytest.raises(MoraError, match=r"benchmark.shots=4: task 'sums' has no labels"):
        task.few_shot(4, 0)


# --- what is refused --------------------------------------------------------------------------------------------------


def emptied(root: Path) -> None:
    shutil.rmtree(root / "colours" / "test" / "red")
    (root / "colours" / "test" / "red").mkdir()


def extra_class(root: Path) -> None:
    shutil.copytree(root / "shades" / "test" / "white", root / "colours" / "test" / "white")


def file(name: str, text: str) -> Callable[[Path], None]:
    return lambda root: (root / "colours" / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: shutil.rmtree(root / "colours" / "train"), "task folder colours has no train/ folder"),
        (emptied, "class folder colours/test/red is empty; half prepared?"),
        (extra_class, "class folder colours/test/white is not one of the 3 classes of colours/train"),
        (lambda root: (shutil.rmtree(root / "colours/test"), (root / "colours/test").mkdir()), "holds no class folder"),
        (file("classnames.txt", "red=a\ngreen=b\n"), r"does not name the class folder\(s\) dark_blue"),
        (
            file("classnames.txt", "red=a\ngreen=b\ndark_blue=c\npink=d\n"),
            "names the class folder 'pink', which is not",
        ),
        (file("classnames.txt", "red=a\nred=b\n"), "names the class folder 'red' twice"),
        (file("classnames.txt", "red\n"), "line 'red'; legal: folder = name"),
        (file("classnames.txt", "red=a\ngreen=a\ndark_blue=c\n"), "class 'a' is listed 2 times"),
        (file("templates.txt", "no place for a name\n"), "template 'no place for a name' must hold {} exactly once"),
        (file("templates.txt", "\n"), "templates.txt is empty"),
    ],
)
def test_half_prepared_folders_are_named(change: Callable[[Path], None], message: str, root: Path) -> None:
    change(root)
    with pytest.raises(MoraError, match=message):
        load(root)


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take no such name")
def test_a_file_name_that_no_result_could_hold_is_told(root: Path) -> None:
    folder = root / "colours" / "train" / "red"
    (folder / "0.png").rename(folder / os.fsdecode(b"\xff.png"))
    with pytest.raises(MoraError, match=r"train: the name 'colours/train/red/\\udcff.png' is not UTF-8.*; rename it"):
        load(root)


def test_roots_without_tasks(tmp_path: Path) -> None:
    for root, message in (
        ("", "benchmark.root is empty"),
        (str(tmp_path / "no"), "is no folder"),
        (tmp_path, "no task"),
    ):
        with pytest.raises(MoraError, match=message):
            image_folder.task_names(str(root))
