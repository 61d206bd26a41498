"""Sets prepared by TFDS: read from array_record files without TensorFlow, under our names, or named as broken."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tensorflow_datasets
import tiny_domains

from mora_jax.benchmarks import stream
from mora_jax.benchmarks.domains import DOMAINS
from mora_jax.benchmarks.pictures import PictureTask
from mora_jax.data import builders, tfds
from mora_jax.errors import MoraError, exit_code

IN_TFDS = tuple(name for name, domain in DOMAINS.items() if domain.tfds)
VARIANTS = {
    "Caltech101": "tfds 1.2.3 train/test",
    "CIFAR100": "tfds 1.2.3 train/test",
    "DTD": "tfds 1.2.3 train/validation/test",
    "EuroSAT": "tfds rgb 1.2.3 train, drawn by split_seed=3",
    "Flowers": "tfds 1.2.3 train/validation/test",
    "Food101": "tfds 1.2.3 train/validation",
    "MNIST": "tfds 1.2.3 train/test",
    "OxfordPets": "tfds 1.2.3 train/test",
    "StanfordCars": "tfds 1.2.3 train/test",
    "SUN397": "tfds standard-part1-120k 1.2.3 train/test",
}


def load(root: Path, name: str, split_seed: int = 3) -> PictureTask:
    [task] = stream.load("mtil", str(root), [name], metrics={}, split_seed=split_seed)
    return task


@pytest.fixture(autouse=True)
def _no_open_files() -> None:
    """What is kept open per process is of other folders."""
    tfds._builder.cache_clear()
    tfds._records.cache_clear()


@pytest.mark.parametrize("name", IN_TFDS)
def test_the_labels_of_tfds_are_our_classes(name: str) -> None:
    """Against the list of TFDS's own builder, which for CIFAR100 is not known before it has downloaded."""
    domain, names = DOMAINS[name], tiny_domains.tfds_features(name)["label"].names
    assert set(names) - domain.dropped == set(domain.class_of_tfds)
    assert domain.dropped <= set(names)
    assert list(domain.class_of_tfds.values()) == list(domain.classes)
    if name == "CIFAR100":
        real = tensorflow_datasets.builder("cifar100", data_dir="nowhere").info.features
        assert real["label"].num_classes == len(names)


@pytest.mark.parametrize("name", IN_TFDS)
def test_a_prepared_set(name: str, tmp_path: Path) -> None:
    domain, labels = DOMAINS[name], [1, 0, 2, 1]
    names = tiny_domains.tfds_features(name)["label"].names
    theirs = {theirs: labels[:count] for theirs, count in zip(domain.tfds_splits.values(), (4, 3, 2), strict=False)}
    tiny_domains.write_tfds(tmp_path, name, theirs)
    task = load(tmp_path, name)
    assert (task.variant, task.classes, task.templates) == (VARIANTS[name], domain.classes, domain.ensemble)
    assert set(task.splits) == (set(domain.tfds_splits) if name != "EuroSAT" else {"train", "test"})
    pictures = [picture for split in task.splits.values() for picture in split]
    expected = Counter(domain.class_of_tfds[names[label]] for split in theirs.values() for label in split)
    assert Counter(picture.answer for picture in pictures) == expected
    assert len({picture.source for picture in pictures}) == len(pictures) == sum(map(len, theirs.values()))
    for picture in pictures:
        assert str(tmp_path) not in picture.source
        label = next(label for label in labels if domain.class_of_tfds[names[label]] == picture.answer)
        assert picture.read() == tiny_domains.encoded(label, tiny_domains.picture_format(name))
    assert "tensorflow" not in sys.modules


def test_threads_read_the_same_records(tmp_path: Path) -> None:
    """As the pipeline does; each record is found where it was when the labels were looked through."""
    tiny_domains.write_tfds(tmp_path, "EuroSAT", {"train": list(range(10)) * 20})
    pictures = [picture for split in load(tmp_path, "EuroSAT").splits.values() for picture in split]
    tfds._records.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda picture: picture.read(), pictures))
    classes = DOMAINS["EuroSAT"].classes
    assert found == [tiny_domains.encoded(classes.index(picture.answer)) for picture in pictures]


def test_dropped_classes_are_not_there(tmp_path: Path) -> None:
    names = tiny_domains.tfds_features("Caltech101")["label"].names
    labels = [names.index(name) for name in ("accordion", "background_google", "faces", "faces_easy", "yin_yang")]
    tiny_domains.write_tfds(tmp_path, "Caltech101", {"train": labels, "test": labels})
    task = load(tmp_path, "Caltech101")
    assert len(task.classes) == 100
    for split in ("train", "test"):
        assert {picture.answer for picture in task.split(split)} == {"accordion", "face", "yin yang"}
    assert "caltech101/train/yin_yang/004.jpg" in {picture.source for picture in task.split("train")}


def test_a_single_split_is_drawn_by_its_seed(tmp_path: Path) -> None:
    tiny_domains.write_tfds(tmp_path, "EuroSAT", {"train": [label for label in range(10) for _ in range(10)]})
    task, again, other = (load(tmp_path, "EuroSAT", seed) for seed in (3, 3, 4))
    for split, count in (("train", 5), ("eval", 2), ("test", 3)):
        assert set(Counter(picture.answer for picture in task.split(split)).values()) == {count}
    sources = [{picture.source for picture in pictures} for pictures in task.splits.values()]
    assert len(set.union(*sources)) == 100
    assert task.digest == again.digest != other.digest
    assert other.variant.endswith("drawn by split_seed=4")


def test_a_set_of_another_number_of_labels(tmp_path: Path) -> None:
    folder = tiny_domains.write_tfds(tmp_path, "EuroSAT", {"train": [0]})
    names = (folder / "label.labels.txt").read_text().replace("River\n", "Canal\n")
    (folder / "label.labels.txt").write_text(names)
    with pytest.raises(MoraError, match=r"not the classes of EuroSAT: unknown \['Canal'\], missing \['River'\]"):
        load(tmp_path, "EuroSAT")


# --- half prepared ----------------------------------------------------------------------------------------------------


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = tiny_domains.write_tfds(tmp_path, "OxfordPets", {"train": [0], "test": [1]})
    (folder / "oxford_iiit_pet-test.array_record-00000-of-00001").unlink()
    with pytest.raises(MoraError, match="half prepared: the test split lacks its shard oxford_iiit_pet-test"):
        load(tmp_path, "OxfordPets")


def test_a_damaged_shard(tmp_path: Path) -> None:
    folder = tiny_domains.write_tfds(tmp_path, "OxfordPets", {"train": [0] * 50, "test": [1]})
    shard = folder / "oxford_iiit_pet-train.array_record-00000-of-00001"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(
        MoraError, match=r"oxford_iiit_pet/1\.2\.3: half prepared: the train split cannot be read \(.+\)"
    ) as bad:
        load(tmp_path, "OxfordPets")
    assert "\n" not in str(bad.value)


def test_records_that_are_no_labelled_pictures(tmp_path: Path) -> None:
    folder = tiny_domains.write_tfds(tmp_path, "OxfordPets", {"train": [0], "test": [36, 1]})
    names = (folder / "label.labels.txt").read_text()
    (folder / "label.labels.txt").write_text("".join(names.splitlines(keepends=True)[:36]))
    with pytest.raises(MoraError, match=r"record 0 of test has the label 36; legal: 0\.\.35"):
        load(tmp_path, "OxfordPets")
    features = json.loads((folder / "features.json").read_text())
    del features["featuresDict"]["features"]["label"]
    (folder / "features.json").write_text(json.dumps(features))
    tfds._builder.cache_clear()
    with pytest.raises(MoraError, match=r"its records are no 'image' with a named 'label'; they have: .*species"):
        load(tmp_path, "OxfordPets")


def test_a_preparation_that_did_not_end(tmp_path: Path) -> None:
    folder = tiny_domains.write_tfds(tmp_path, "OxfordPets", {"train": [0], "test": [1]})
    (folder / "dataset_info.json").unlink()
    message = r"1\.2\.3: half prepared: no dataset_info\.json; prepare it again: tfds\.builder\('oxford_iiit_pet', data"
    with pytest.raises(MoraError, match=message):
        load(tmp_path, "OxfordPets")
    ours = tmp_path / "clip_domains" / "DTD" / "1.0.0"
    ours.mkdir(parents=True)
    with pytest.raises(MoraError, match=r"prepare it again: python -m mora_jax\.data\.builders --root=ROOT --set=DTD"):
        load(tmp_path, "DTD")
    folder.rename(folder.parent / "incomplete.ABCDEF_1.2.3")
    with pytest.raises(MoraError, match=r"incomplete\.ABCDEF_1\.2\.3: half prepared; prepare it again"):
        load(tmp_path, "OxfordPets")


def test_files_that_need_tensorflow(tmp_path: Path) -> None:
    folder = tiny_domains.write_tfds(tmp_path, "OxfordPets", {"train": [0], "test": [1]})
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(MoraError, match="prepared as tfrecord; only array_record is read without TensorFlow"):
        load(tmp_path, "OxfordPets")
    (folder / "dataset_info.json").write_text("{")
    tfds._builder.cache_clear()
    with pytest.raises(MoraError, match=r"TFDS cannot read its dataset_info\.json and features\.json"):
        load(tmp_path, "OxfordPets")


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    tiny_domains.write_tfds(tmp_path, "OxfordPets", {"train": [0]})
    with pytest.raises(MoraError, match=r"oxford_iiit_pet/1\.2\.3: no split 'test'; it has: train"):
        load(tmp_path, "OxfordPets")


def test_the_newest_version_and_the_best_configuration(tmp_path: Path) -> None:
    for place in ("a/1.9.0", "a/1.10.0", "b/second/1.0.0"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / tfds.INFO).write_text("{}")
    assert tfds.find(tmp_path, "a") == tmp_path / "a" / "1.10.0"
    assert tfds.find(tmp_path, "b", ("first", "second")) == tmp_path / "b" / "second" / "1.0.0"
    assert tfds.find(tmp_path, "b") is None
    assert tfds.find(tmp_path, "c") is None


# --- written by us ----------------------------------------------------------------------------------------------------


def test_archives_as_array_record_are_the_same_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_domains.write_coop(tmp_path / "archives", "EuroSAT")
    argv = [f"--root={tmp_path / 'archives'}", "--set=EuroSAT", f"--out={tmp_path / 'prepared'}"]
    assert exit_code(builders.run, argv) == 0
    assert str(tmp_path / "prepared" / "clip_domains" / "EuroSAT" / "1.0.0") in capsys.readouterr().out
    ours, theirs = load(tmp_path / "prepared", "EuroSAT"), load(tmp_path / "archives", "EuroSAT")
    assert ours.variant == "coop split_zhou, array_record"
    assert ours.digest == theirs.digest
    for split in ("train", "eval", "test"):
        assert [p.read() for p in ours.split(split)] == [p.read() for p in theirs.split(split)]


def test_aircraft_and_mnist_without_an_eval_split(tmp_path: Path) -> None:
    tiny_domains.write_aircraft(tmp_path, sizes={"train": 1, "val": 1, "test": 1})
    tiny_domains.write_mnist(tmp_path / "mnist")
    for name, splits in (("Aircraft", {"train", "eval", "test"}), ("MNIST", {"train", "test"})):
        raw = load(tmp_path, name)
        builders.prepare(name, str(tmp_path), str(tmp_path / "out"))
        prepared = load(tmp_path / "out", name)
        assert set(prepared.splits) == splits
        assert prepared.digest == raw.digest
        assert prepared.variant == f"{raw.variant}, array_record"


def test_archives_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(builders.run, [f"--root={tmp_path}", "--set=DTD"]) == 2
    assert "no archive of DTD" in capsys.readouterr().err
    assert exit_code(builders.run, [f"--root={tmp_path}", "--set=Birds"]) == 2
    assert "unknown set 'Birds'; known: Aircraft, CIFAR100" in capsys.readouterr().err


def test_the_train_binary_does_not_import_it() -> None:
    code = "import sys, mora_jax.train, mora_jax.benchmarks.xtail; print('tensorflow_datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
