"""The packaged stream of pictures, made from the real packages: sizes, balance, splits that share nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mora_jax.benchmarks import packaged_images, stream
from mora_jax.benchmarks.pictures import PictureTask
from mora_jax.data import images, packages
from mora_jax.data.registries import Unavailable
from mora_jax.errors import MoraError

NAMES = ("clothes", "digits", "animals", "shapes", "textures")
CLASSES = (10, 10, 10, 24, 8)
SQUARES = ("clothes", "digits", "animals")


def load(name: str, seed: int = 0) -> PictureTask:
    return packaged_images.load_task(name, "", split_seed=seed, metric=None)


@pytest.fixture(scope="module")
def tasks() -> dict[str, PictureTask]:
    """All tasks, without those of Debian where there is no apt-get."""
    found = {}
    for name in NAMES:
        try:
            found[name] = load(name)
        except Unavailable:
            assert name == "clothes"
    return found


@pytest.fixture
def task(tasks: dict[str, PictureTask], request: pytest.FixtureRequest) -> PictureTask:
    if request.param not in tasks:
        pytest.skip("its package cannot be had on this machine")
    return tasks[request.param]


def every(*names: str) -> Any:
    return pytest.mark.parametrize("task", names or NAMES, indirect=True)


def pixels(task: PictureTask, split: str) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(picture.read()))) for picture in task.splits[split]]


def test_table() -> None:
    assert stream.task_names("packaged_images", "") == NAMES
    assert tuple(len(row.classes) for row in packaged_images.TASKS.values()) == CLASSES
    # One label space for all: no name may mean two things.
    names = [name for row in packaged_images.TASKS.values() for name in row.classes]
    assert len(set(names)) == len(names) == sum(CLASSES)
    assert all(re.fullmatch(r"[a-z][a-z -]+", name) for name in names)


@every()
def test_rows(task: PictureTask) -> None:
    assert task.metric == "accuracy"
    assert task.labels == task.classes
    assert {split: len(pictures) for split, pictures in task.splits.items()} == {
        "train": 1000,
        "eval": 200,
        "test": 200,
    }


@every()
def test_balanced_from_the_first_picture_on(task: PictureTask) -> None:
    for pictures in task.splits.values():
        n = len(task.classes)
        assert {picture.answer for picture in pictures[:n]} == set(task.classes)
        counts = Counter(picture.answer for picture in pictures)
        assert max(counts.values()) - min(counts.values()) <= 1


@every()
def test_no_picture_is_in_two_splits(task: PictureTask) -> None:
    contents = [picture.read() for pictures in task.splits.values() for picture in pictures]
    sources = [picture.source for pictures in task.splits.values() for picture in pictures]
    assert len(set(contents)) == len(contents) == len(set(sources)) == 1400


@every()
def test_a_model_can_look_at_them(task: PictureTask) -> None:
    for picture in task.splits["train"][:20]:
        seen = images.pixels(picture.read(), 64, picture.source)
        assert seen.shape == (64, 64, 3)
        assert seen.std() > 2  # something is on it
        # Worker processes get a copy.
        assert pickle.loads(pickle.dumps(picture)).read() == picture.read()


@every(*SQUARES)
def test_white_on_black(task: PictureTask) -> None:
    for image in pixels(task, "eval"):
        assert image.shape == (28, 28)
        assert image.dtype == np.uint8
    # The middle is brighter than the rim, which it would not be in rows of pixels read out of step.
    mean = np.mean(pixels(task, "train"), axis=0)
    assert mean[8:20, 8:20].mean() > 2 * np.r_[mean[0], mean[-1]].mean()


def nearest_mean(task: PictureTask) -> float:
    """Percent of test pictures whose class has the nearest mean training picture."""

    def rows(split: str) -> np.ndarray:
        return np.stack([images.pixels(p.read(), 16, p.source).ravel() / 255.0 for p in task.splits[split]])

    train, answers = rows("train"), np.array([p.answer for p in task.splits["train"]])
    means = np.stack([train[answers == name].mean(axis=0) for name in task.classes])
    distances = ((rows("test")[:, None] - means[None]) ** 2).sum(axis=-1)
    return task.score([task.classes[i] for i in distances.argmin(axis=1)], "test")


@every(*SQUARES)
def test_labels_belong_to_their_pictures(task: PictureTask) -> None:
    """Five times chance by the simplest classifier there is: labels in another order would give chance."""
    assert nearest_mean(task) > 50


@every("digits")
def test_class_names_are_those_of_the_labels(task: PictureTask) -> None:
    """A zero has a hole in the middle, a one has ink there."""
    middle = {
        name: np.mean(
            [
                i[13:15, 13:15].mean()
                for i, p in zip(pixels(task, "train"), task.splits["train"], strict=True)
                if p.answer == name
            ]
        )
        for name in ("zero", "one")
    }
    assert middle["one"] > 150
    assert middle["zero"] < 30


@every("shapes")
def test_shapes_have_the_colour_they_are_named_after(task: PictureTask) -> None:
    colours = {"black": (0, 0, 0), "blue": (0, 0, 255), "red": (255, 0, 0), "yellow": (255, 255, 0)}
    seen = 0
    for picture in task.splits["eval"]:
        wanted = colours.get(picture.answer.split()[0])
        if wanted is not None:
            image = images.decode(picture.read(), picture.source)
            assert wanted in {colour for _, colour in image.getcolors(1 << 20)}, picture.source
            seen += 1
    assert seen > 80


def test_shape_names() -> None:
    questions = [
        ("what is the blue shape?", "rectangle", 0),
        ("is there not a red shape?", "yes", 1),
        ("what shape is present?", "circle", 1),
        ("what color is the triangle?", "teal", 2),
    ]
    assert packaged_images._shape_names(questions) == {0: "blue rectangle", 2: "teal triangle"}


@every("textures")
def test_windows_stay_in_the_strip_of_their_split(task: PictureTask) -> None:
    edges = {"train": (0.0, 0.6), "eval": (0.6, 0.8), "test": (0.8, 1.0)}
    wide = {"brick.png": 512, "hubble_deep_field.jpg": 1000, "chelsea.png": 451, "retina.jpg": 710}
    for split, pictures in task.splits.items():
        for picture in pictures:
            file, left, side = re.match(rf"(\S+), {split} strip at (\d+), \d+, (\d+) x \d+", picture.source).groups()
            assert int(left) + int(side) <= (edges[split][1] - edges[split][0]) * wide.get(file, 512) + 1
            assert images.decode(picture.read(), picture.source).size == (int(side), int(side))


@every("digits", "textures")
def test_the_seed_decides(task: PictureTask) -> None:
    assert load(task.name).digest == task.digest
    assert load(task.name, seed=1).digest != task.digest


def test_the_same_in_another_process(tasks: dict[str, PictureTask]) -> None:
    code = (
        "import json; from mora_jax.benchmarks import packaged_images as p\n"
        "tasks = [p.load_task(name, '', split_seed=0, metric=None) for name in ('animals', 'textures')]\n"
        "print(json.dumps([task.digest for task in tasks]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [tasks[name].digest for name in ("animals", "textures")]


def test_unknown_names() -> None:
    with pytest.raises(MoraError, match="unknown task of benchmark 'packaged_images' 'cars'; known: animals, clothes"):
        load("cars")
    with pytest.raises(MoraError, match=r"benchmark\.root = 'x'; benchmark 'packaged_images' reads no folder"):
        stream.task_names("packaged_images", "x")


def test_without_apt_the_stream_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(name: str, member: str) -> None:
        raise Unavailable(f"cannot download {name}: no apt-get on this machine")

    monkeypatch.setattr(packages, "extract", refuse)
    loaded = stream.load("packaged_images", "", (), metrics={}, split_seed=0)
    assert tuple(task.name for task in loaded) == NAMES[1:]
    said = "task 'clothes' is left out: cannot download dataset-fashion-mnist: no apt-get on this machine\n"
    assert capsys.readouterr().err == said
    # Asked for by name it must be there.
    with pytest.raises(Unavailable, match="no apt-get on this machine"):
        stream.load("packaged_images", "", ("digits", "clothes"), metrics={}, split_seed=0)


def test_a_stream_without_any_task_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise Unavailable("no network")

    monkeypatch.setattr(packaged_images, "load_task", refuse)
    with pytest.raises(Unavailable, match="none of the tasks of benchmark 'packaged_images' can be had"):
        stream.load("packaged_images", "", (), metrics={}, split_seed=0)
