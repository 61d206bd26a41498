"""Tiny copies of the picture sets of X-TAIL and MTIL: JPEGs in CoOp's layout, and array_record files as TFDS writes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from mora_jax.benchmarks.domains import DOMAINS
from mora_jax.data import archives

SIZES = {"train": 2, "val": 1, "test": 1}  # pictures a class


def encoded(number: int, kind: str = "JPEG", side: int = 8) -> bytes:
    """A picture of one colour, which tells the number."""
    colour = (number % 256, number // 256 % 256, 128)
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, kind)
    return file.getvalue()


def write_coop(
    root: Path, name: str, *, classes: Sequence[str] | None = None, sizes: Mapping[str, int] = SIZES, side: int = 8
) -> Path:
    """A set in CoOp's layout, sorted by class as its files are; returns the split file."""
    coop = DOMAINS[name].coop
    splits: dict[str, list[list[Any]]] = {key: [] for key in sizes}
    number = 0
    for label, class_name in enumerate(classes or DOMAINS[name].classes):
        for key, count in sizes.items():
            for i in range(count):
                picture = f"{label:03}/{key}_{i}.jpg"
                path = root / coop.folder / coop.images / picture
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(number, side=side))
                number += 1
                splits[key].append([picture, label, class_name.replace(" ", "_")])
    path = root / coop.folder / coop.split_file
    path.write_text(json.dumps(splits))
    return path


def write_aircraft(root: Path, *, sizes: Mapping[str, int] = SIZES, side: int = 8) -> Path:
    """FGVC Aircraft as its archive has it; returns its folder."""
    folder = root / "fgvc_aircraft"
    (folder / "images").mkdir(parents=True)
    classes = DOMAINS["Aircraft"].classes
    (folder / "variants.txt").write_text("".join(f"{name}\n" for name in classes))
    number = 0
    for key, count in sizes.items():
        lines = []
        for name in classes:
            for _ in range(count):
                (folder / "images" / f"{number:07}.jpg").write_bytes(encoded(number, side=side))
                lines.append(f"{number:07} {name}\n")
                number += 1
        (folder / f"images_variant_{key}.txt").write_text("".join(lines))
    return folder


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    magic = {3: 2051, 1: 2049}[values.ndim]
    path.write_bytes(b"".join(number.to_bytes(4, "big") for number in (magic, *values.shape)) + values.tobytes())


def write_mnist(folder: Path, train: int = 20, test: int = 10) -> None:
    """MNIST's four files: digits in turn, each picture filled with its number."""
    for split, count in (("train", train), ("test", test)):
        images, labels = archives.MNIST_FILES[split]
        numbers = np.arange(count, dtype=np.uint8)
        write_idx(folder / images, np.broadcast_to(numbers[:, None, None], (count, 28, 28)).copy())
        write_idx(folder / labels, numbers % 10)


def tfds_features(name: str) -> Any:
    """What a record of a set in TFDS holds, from TFDS's own builder."""
    domain = DOMAINS[name]
    features = dict(tfds.builder("/".join((domain.tfds, *domain.configs[:1])), data_dir="nowhere").info.features)
    if name == "CIFAR100":  # whose builder learns the names only from the files it downloads
        features["label"] = tfds.features.ClassLabel(names=list(DOMAINS[name].class_of_tfds))
    return tfds.features.FeaturesDict(features)


def _beside(features: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Something for every other feature of a record; masks are bytes that no decoder would take."""
    values: dict[type, Any] = {
        tfds.features.Text: f"{number:03}.jpg",
        tfds.features.ClassLabel: 0,
        tfds.features.Image: b"no picture",
        tfds.features.BBoxFeature: tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
    }
    return {key: values[type(feature)] for key, feature in features.items() if key not in ("image", "label")}


def picture_format(name: str) -> str:
    """What TFDS encodes the pictures of a set in."""
    return "PNG" if name in ("MNIST", "CIFAR100") else "JPEG"


def write_tfds(root: Path, name: str, labels: Mapping[str, Sequence[int]]) -> Path:
    """A set as TFDS prepares it, with a record for each of the labels of each split; returns its folder."""
    domain, features = DOMAINS[name], tfds_features(name)
    configs = [tfds.core.BuilderConfig(name=config, version="1.2.3") for config in domain.configs[:1]]

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.3")
        BUILDER_CONFIGS = configs
        name = domain.tfds

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples(wanted) for split, wanted in labels.items()}

        def _generate_examples(self, wanted: Sequence[int]) -> Iterator[tuple[str, dict[str, Any]]]:
            for number, label in enumerate(wanted):
                picture = {"image": encoded(label, picture_format(name)), "label": label}
                yield f"{number:03}", picture | _beside(features, number)

    builder = Builder(data_dir=root, file_format="array_record")
    builder.download_and_prepare(download_dir=root / "downloads")
    return Path(builder.data_path)
