"""Sets of pictures as their authors publish them, read where the archives were unpacked.

CoOp's layout (its DATASETS.md, arXiv 2109.01134): a folder a set with the unpacked archive and `split_zhou_<set>.json`,
an object of "train", "val" and "test", each a list of [picture, label, name of the class].
FGVC Aircraft (arXiv 1306.5151): `variants.txt`, `images_variant_{train,val,test}.txt`, each line a picture's number and
its variant, and `images/`.
MNIST: the four idx files.
Pictures are not opened here; each is read when it is needed.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mora_jax.data.files import read_json, read_lines
from mora_jax.data.images import png
from mora_jax.errors import MoraError

# Our split -> the word for it in the files of CoOp and of Aircraft.
SPLITS = {"train": "train", "eval": "val", "test": "test"}
AIRCRAFT_CLASSES, AIRCRAFT_SPLIT = "variants.txt", "images_variant_{}.txt"
MNIST_FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
               "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}  # fmt: skip
_IDX_MAGIC = {3: 2051, 1: 2049}  # number of axes -> the number an idx file of bytes begins with


class Stored(NamedTuple):
    """An encoded picture: what to call it, the name of its class, and how to read it. `read` can be pickled."""

    source: str
    label: str
    read: Callable[[], bytes]


class PictureSet(NamedTuple):
    """The names of the classes in the order of the labels, and the pictures by split."""

    classes: tuple[str, ...]
    splits: dict[str, list[Stored]]


def _read_file(path: str) -> bytes:
    return Path(path).read_bytes()


# --- CoOp -------------------------------------------------------------------------------------------------------------


def _checked(record: Any, where: str) -> tuple[str, int, str]:
    """[picture, label, name of the class] as read from JSON; MoraError for anything else."""
    legal = (
        isinstance(record, list)
        and len(record) == 3
        and isinstance(record[0], str)
        and isinstance(record[1], int)
        and isinstance(record[2], str)
    )
    if not legal:
        raise MoraError(f"{where}: legal: [picture, label, name of the class], such as ['a/1.jpg', 0, 'cat']")
    picture, label, name = record
    if Path(picture).is_absolute() or ".." in Path(picture).parts:
        raise MoraError(f"{where}: {picture!r} leads out of the folder of the pictures")
    return picture, label, name.replace("_", " ")


def _class_names(path: Path, labelled: Iterable[tuple[int, str]]) -> tuple[str, ...]:
    """The names in the order of the labels; MoraError unless labels 0, 1, ... and names go together one to one."""
    names: dict[int, str] = {}
    for label, name in labelled:
        if names.setdefault(label, name) != name:
            raise MoraError(f"{path}: label {label} has two names, {names[label]!r} and {name!r}")
    if sorted(names) != list(range(len(names))):
        raise MoraError(f"{path}: {len(names)} labels from {min(names)} to {max(names)}; legal: 0, 1, ... without gaps")
    labels = {name: label for label, name in names.items()}
    for label, name in names.items():
        if labels[name] != label:
            raise MoraError(f"{path}: labels {label} and {labels[name]} have the same name {name!r}")
    return tuple(names[label] for label in range(len(names)))


def check_present(listing: Path, folder: Path, pictures: Iterable[str]) -> None:
    """MoraError, naming the first that is missing, unless all `pictures` that `listing` names lie under `folder`."""
    by_folder: dict[str, list[str]] = {}
    for picture in pictures:
        parent, _, name = picture.rpartition("/")
        by_folder.setdefault(parent, []).append(name)
    listed, missing = 0, []
    for parent, names in by_folder.items():
        # A folder is listed once: asking for each of 100 000 files takes minutes on a network drive.
        there = set(os.listdir(folder / parent)) if (folder / parent).is_dir() else set()
        listed += len(names)
        missing += [f"{parent}/{name}".lstrip("/") for name in names if name not in there]
    if missing:
        raise MoraError(
            f"{listing}: half prepared: of the {listed} pictures it names {len(missing)} are not in {folder}, such as "
            f"{missing[0]}; unpack the set's archive there"
        )


def read_coop(folder: Path, split_file: str, images: str) -> PictureSet:
    """A set in CoOp's layout: `folder`/`split_file` with the pictures under `folder`/`images`. CoOp's val is our eval.

    MoraError names the file and the record for whatever is wrong in it, and the first picture that is missing.
    """
    path = folder / split_file
    content = read_json(path)
    if not isinstance(content, dict) or any(not isinstance(content.get(key), list) for key in SPLITS.values()):
        raise MoraError(f'{path}: legal: an object of three lists, "train", "val" and "test"')
    records = {
        split: [_checked(record, f"{path}, {key}, record {i} (from 0)") for i, record in enumerate(content[key])]
        for split, key in SPLITS.items()
    }
    for split in ("train", "test"):
        if not records[split]:
            raise MoraError(f"{path}: {split} is empty")
    everything = [record for split in records.values() for record in split]
    classes = _class_names(path, ((label, name) for _, label, name in everything))
    check_present(path, folder / images, (picture for picture, _, _ in everything))
    place = f"{folder.name}/{images}".rstrip("/")
    splits = {
        split: [
            Stored(f"{place}/{picture}", name, partial(_read_file, str(folder / images / picture)))
            for picture, _, name in entries
        ]
        for split, entries in records.items()
        if entries
    }
    return PictureSet(classes, splits)


# --- FGVC Aircraft ----------------------------------------------------------------------------------------------------


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise MoraError(f"{path.parent}: half prepared: no {path.name}; unpack the archive of FGVC Aircraft there")
    return read_lines(path)


def has_aircraft(folder: Path) -> bool:
    """Whether any of the files that make the splits of FGVC Aircraft by variant is in the folder."""
    return any((folder / AIRCRAFT_SPLIT.format(key)).is_file() for key in SPLITS.values())


def read_aircraft(folder: Path) -> PictureSet:
    """FGVC Aircraft by variant: the folder `data` of its archive. MoraError names file and line of what is wrong."""
    classes = tuple(_lines(folder / AIRCRAFT_CLASSES))
    known, splits = set(classes), {}
    for split, key in SPLITS.items():
        path = folder / AIRCRAFT_SPLIT.format(key)
        splits[split] = []
        for number, line in enumerate(_lines(path), start=1):
            picture, _, variant = line.partition(" ")
            if variant not in known:
                raise MoraError(f"{path}, line {number}: {variant!r} is none of the {len(known)} in {AIRCRAFT_CLASSES}")
            name = f"{picture}.jpg"
            read = partial(_read_file, str(folder / "images" / name))
            splits[split].append(Stored(f"{folder.name}/images/{name}", variant, read))
        check_present(path, folder / "images", (stored.source.rpartition("/")[2] for stored in splits[split]))
    return PictureSet(classes, splits)


# --- MNIST ------------------------------------------------------------------------------------------------------------


def _idx_file(folder: Path, name: str) -> Path | None:
    """The file of that name, plain or gzipped; the dot in `t10k-images.idx3-ubyte` is how some copies spell it."""
    spellings = (name, f"{name}.gz", name.replace("-idx", ".idx"))
    return next((folder / spelling for spelling in spellings if (folder / spelling).is_file()), None)


def has_mnist(folder: Path) -> bool:
    """Whether any of MNIST's four idx files is in the folder."""
    return any(_idx_file(folder, name) for names in MNIST_FILES.values() for name in names)


@lru_cache(maxsize=8)
def _idx(path: str, axes: int) -> np.ndarray:
    """The bytes of an idx file in its shape; MoraError if it is none with that many axes, or cut short."""
    try:
        data = gzip.decompress(Path(path).read_bytes()) if path.endswith(".gz") else Path(path).read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise MoraError(f"{path}: cannot be read: {error}") from None
    header = 4 * (1 + axes)
    numbers = [int.from_bytes(data[i : i + 4], "big") for i in range(0, min(header, len(data)), 4)]
    if len(numbers) != 1 + axes or numbers[0] != _IDX_MAGIC[axes]:
        raise MoraError(f"{path}: not an idx file of bytes with {axes} axes")
    shape = tuple(numbers[1:])
    if len(data) - header != int(np.prod(shape)):
        raise MoraError(f"{path}: {len(data) - header} bytes for the shape {shape}; the file is damaged")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _idx_png(path: str, index: int) -> bytes:
    return png(_idx(path, 3)[index])


def read_mnist(folder: Path) -> PictureSet:
    """MNIST from its four idx files, gzipped or not; a picture is encoded as PNG when it is read."""
    splits = {}
    for split, names in MNIST_FILES.items():
        images, labels = (_idx_file(folder, name) for name in names)
        if images is None or labels is None:
            missing = names[0] if images is None else names[1]
            raise MoraError(f"{folder}: half prepared: no {missing} (or {missing}.gz)")
        answers = _idx(str(labels), 1)
        if len(_idx(str(images), 3)) != len(answers) or answers.max(initial=0) > 9:
            raise MoraError(f"{labels}: legal: one label from 0 to 9 for each picture of {images.name}")
        splits[split] = [
            Stored(f"{names[0]}[{i}]", str(answer), partial(_idx_png, str(images), i))
            for i, answer in enumerate(answers.tolist())
        ]
    return PictureSet(tuple(str(digit) for digit in range(10)), splits)
