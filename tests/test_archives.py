"""Sets of pictures in the files of their authors: what is read, and one line for each way to be wrong."""

from __future__ import annotations

import gzip
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_domains
from PIL import Image

from mora_jax.data import archives
from mora_jax.errors import MoraError

SPLIT = "split_zhou_EuroSAT.json"


def read_eurosat(root: Path) -> archives.PictureSet:
    return archives.read_coop(root / "eurosat", SPLIT, "2750")


def test_coop(tmp_path: Path) -> None:
    tiny_domains.write_coop(tmp_path, "EuroSAT")
    found = read_eurosat(tmp_path)
    assert found.classes[:2] == ("Annual Crop Land", "Forest")
    assert {split: len(records) for split, records in found.splits.items()} == {"train": 20, "eval": 10, "test": 10}
    first = found.splits["train"][0]
    assert (first.source, first.label) == ("eurosat/2750/000/train_0.jpg", "Annual Crop Land")
    assert pickle.loads(pickle.dumps(first)).read() == tiny_domains.encoded(0)


def test_pictures_in_the_sets_own_folder(tmp_path: Path) -> None:
    tiny_domains.write_coop(tmp_path, "StanfordCars", sizes={"train": 1, "val": 0, "test": 1})
    found = archives.read_coop(tmp_path / "stanford_cars", "split_zhou_StanfordCars.json", "")
    assert found.splits["test"][0].source == "stanford_cars/000/test_0.jpg"
    assert "eval" not in found.splits


BAD = [
    (lambda s: [], r"legal: an object of three lists, \"train\", \"val\" and \"test\""),
    (lambda s: {"train": s["train"], "test": s["test"]}, "legal: an object of three lists"),
    (lambda s: s | {"test": []}, "test is empty"),
    (lambda s: s | {"val": [["a.jpg", "0", "Forest"]]}, r"val, record 0 \(from 0\): legal: \[picture, label, name"),
    (lambda s: s | {"val": [["a.jpg", 0]]}, r"val, record 0 \(from 0\): legal"),
    (lambda s: s | {"val": [["../a.jpg", 0, "x"]]}, r"val, record 0 .*'\.\./a\.jpg' leads out of the folder"),
    (lambda s: s | {"val": [["/a.jpg", 0, "x"]]}, "leads out of the folder"),
    (lambda s: s | {"val": [["a.jpg", 0, "Marsh"]]}, "label 0 has two names, 'Annual Crop Land' and 'Marsh'"),
    (lambda s: s | {"val": [["a.jpg", 10, "Forest"]]}, "labels 10 and 1 have the same name|labels 1 and 10 have the"),
    (lambda s: s | {"val": [["a.jpg", 11, "Marsh"]]}, r"11 labels from 0 to 11; legal: 0, 1, \.\.\. without gaps"),
    (lambda s: s | {"val": [["000/none.jpg", 0, "Annual_Crop_Land"]]},
     r"half prepared: of the 31 pictures it names 1 are not in .*2750, such as 000/none\.jpg; unpack"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_split_files(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    path = tiny_domains.write_coop(tmp_path, "EuroSAT")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(MoraError, match=message) as caught:
        read_eurosat(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_json(tmp_path: Path) -> None:
    path = tiny_domains.write_coop(tmp_path, "EuroSAT")
    path.write_text(path.read_text()[:-9])
    with pytest.raises(MoraError, match=r"split_zhou_EuroSAT\.json, line 1, column \d+: broken JSON"):
        read_eurosat(tmp_path)


def test_a_split_file_without_any_pictures(tmp_path: Path) -> None:
    path = tiny_domains.write_coop(tmp_path, "EuroSAT")
    (tmp_path / "eurosat" / "2750").rename(tmp_path / "elsewhere")
    with pytest.raises(MoraError, match=r"half prepared: of the 40 pictures it names 40 are not in .*2750") as caught:
        read_eurosat(tmp_path)
    assert str(path) in str(caught.value)


# --- FGVC Aircraft ----------------------------------------------------------------------------------------------------


def test_aircraft(tmp_path: Path) -> None:
    folder = tiny_domains.write_aircraft(tmp_path)
    found = archives.read_aircraft(folder)
    assert len(found.classes) == 100
    assert [len(found.splits[split]) for split in ("train", "eval", "test")] == [200, 100, 100]
    label = "BAE 146-200"  # blanks in the name of a variant
    record = next(record for record in found.splits["test"] if record.label == label)
    number = 300 + found.classes.index(label)
    assert record.source == f"fgvc_aircraft/images/{number:07}.jpg"
    assert record.read() == tiny_domains.encoded(number)


def test_half_prepared_aircraft(tmp_path: Path) -> None:
    folder = tiny_domains.write_aircraft(tmp_path)
    (folder / "images" / "0000007.jpg").unlink()
    with pytest.raises(MoraError, match=r"images_variant_train\.txt: half prepared: .* such as 0000007\.jpg"):
        archives.read_aircraft(folder)
    lines = (folder / "images_variant_train.txt").read_text()
    (folder / "images_variant_train.txt").write_text(lines.replace("707-320", "707-321"))
    with pytest.raises(MoraError, match=r"images_variant_train\.txt, line 1: '707-321' is none of the 100 in variants"):
        archives.read_aircraft(folder)
    (folder / "variants.txt").write_bytes(b"Boeing \xff")
    with pytest.raises(MoraError, match=r"variants\.txt: not UTF-8 at byte 7"):
        archives.read_aircraft(folder)
    (folder / "variants.txt").unlink()
    with pytest.raises(MoraError, match=r"fgvc_aircraft: half prepared: no variants\.txt; unpack the archive"):
        archives.read_aircraft(folder)


# --- MNIST ------------------------------------------------------------------------------------------------------------


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_mnist(tmp_path: Path) -> None:
    tiny_domains.write_mnist(tmp_path)
    for name in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        (tmp_path / name).unlink()
    found = archives.read_mnist(tmp_path)
    assert found.classes == tuple("0123456789")
    assert [len(records) for records in found.splits.values()] == [20, 10]
    record = found.splits["train"][17]
    assert (record.source, record.label) == ("train-images-idx3-ubyte[17]", "7")
    np.testing.assert_array_equal(pixels(record.read()), np.full((28, 28), 17))
    np.testing.assert_array_equal(pixels(pickle.loads(pickle.dumps(record)).read()), np.full((28, 28), 17))


def test_half_prepared_mnist(tmp_path: Path) -> None:
    tiny_domains.write_mnist(tmp_path)
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    data = images.read_bytes()
    images.unlink()
    with pytest.raises(
        MoraError, match=r"half prepared: no train-images-idx3-ubyte \(or train-images-idx3-ubyte\.gz\)"
    ):
        archives.read_mnist(tmp_path)
    for broken, message in (
        (data[:-1], r"15679 bytes for the shape \(20, 28, 28\); the file is damaged"),
        (b"\x89PNG" + data[4:], "not an idx file of bytes with 3 axes"),
        (b"", "not an idx file"),
    ):
        archives._idx.cache_clear()
        images.write_bytes(broken)
        with pytest.raises(MoraError, match=message):
            archives.read_mnist(tmp_path)
    archives._idx.cache_clear()
    packed = bytearray(gzip.compress(data))
    packed[10] = 0xFF  # the first block is of a type that there is not
    images.unlink()
    images.with_suffix(".gz").write_bytes(packed)
    with pytest.raises(MoraError, match=r"train-images-idx3-ubyte\.gz: cannot be read: .*invalid block type"):
        archives.read_mnist(tmp_path)
    archives._idx.cache_clear()
    images.with_suffix(".gz").unlink()
    images.write_bytes(data)
    tiny_domains.write_idx(labels, np.full(20, 10, np.uint8))
    with pytest.raises(MoraError, match="train-labels-idx1-ubyte: legal: one label from 0 to 9 for each picture"):
        archives.read_mnist(tmp_path)
