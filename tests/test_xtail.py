"""X-TAIL: its order, classes and templates, the sources of its pictures, and the three numbers its papers print."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_domains

from mora_jax.benchmarks import stream, xtail
from mora_jax.benchmarks.domains import DOMAINS
from mora_jax.benchmarks.pictures import Picture, PictureTask
from mora_jax.errors import MoraError
from mora_jax.metrics import continual

ORDER = (
    "Aircraft", "Caltech101", "DTD", "EuroSAT", "Flowers", "Food101", "MNIST", "OxfordPets", "StanfordCars", "SUN397",
)  # fmt: skip
COUNTS = (100, 100, 47, 10, 102, 101, 10, 37, 196, 397)


def load(root: Path, *tasks: str, split_seed: int = 0) -> list[PictureTask]:
    return stream.load("xtail", str(root), tasks, metrics={}, split_seed=split_seed)


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_published_order_and_1100_classes() -> None:
    assert xtail.TASKS == ORDER
    assert tuple(len(DOMAINS[name].classes) for name in ORDER) == COUNTS
    assert sum(COUNTS) == 1100
    for name in ORDER:
        assert len(set(DOMAINS[name].classes)) == len(DOMAINS[name].classes), name
        assert all(each and each == each.strip() and "_" not in each for each in DOMAINS[name].classes), name


def test_the_published_templates() -> None:
    assert {name: DOMAINS[name].template for name in ORDER} == {
        "Aircraft": "a photo of a {}, a type of aircraft.",
        "Caltech101": "a photo of a {}.",
        "DTD": "{} texture.",
        "EuroSAT": "a centered satellite photo of the {}.",
        "Flowers": "a photo of a {}, a type of flower.",
        "Food101": "a photo of {}, a type of food.",
        "MNIST": 'a photo of the number: "{}".',
        "OxfordPets": "a photo of a {}, a type of pet.",
        "StanfordCars": "a photo of a {}.",
        "SUN397": "a photo of a {}.",
    }


def test_names_as_prompts_want_them() -> None:
    assert DOMAINS["Caltech101"].classes[:5] == ("face", "leopard", "motorbike", "accordion", "airplane")
    assert DOMAINS["EuroSAT"].classes[3] == "Highway or Road"
    assert DOMAINS["StanfordCars"].classes[0] == "2000 AM General Hummer SUV"
    assert "outdoor apartment building" in DOMAINS["SUN397"].classes
    assert DOMAINS["OxfordPets"].classes[:2] == ("abyssinian", "american bulldog")


def test_two_of_the_1100_texts_are_the_same() -> None:
    texts = [DOMAINS[name].template.format(each) for name in ORDER for each in DOMAINS[name].classes]
    assert len(texts) == 1100
    assert {text for text in texts if texts.count(text) > 1} == {"a photo of a pagoda."}


# --- sources ----------------------------------------------------------------------------------------------------------


def test_coops_layout(tmp_path: Path) -> None:
    path = tiny_domains.write_coop(tmp_path, "OxfordPets")
    [task] = load(tmp_path, "OxfordPets")
    assert isinstance(task, PictureTask)
    assert (task.variant, task.metric) == ("coop split_zhou", "accuracy")
    assert task.classes == task.labels == DOMAINS["OxfordPets"].classes
    assert task.templates == ("a photo of a {}, a type of pet.",)
    assert {split: len(pictures) for split, pictures in task.splits.items()} == {"train": 74, "eval": 37, "test": 37}
    assert all(isinstance(picture, Picture) for picture in task.split("test"))
    expected = json.loads(path.read_text())["test"]
    for (name, _, answer), picture in zip(expected, task.split("test"), strict=True):
        assert picture.source == f"oxford_pets/images/{name}"
        assert picture.answer == answer.replace("_", " ")
        assert picture.read() == (tmp_path / "oxford_pets" / "images" / name).read_bytes()
    assert task.score([picture.answer for picture in task.split("test")], "test") == 100


def test_the_first_pictures_are_of_different_classes(tmp_path: Path) -> None:
    """The files are sorted by class; with benchmark.eval_limit a run would else see the first classes only."""
    tiny_domains.write_coop(tmp_path, "OxfordPets")
    [task] = load(tmp_path, "OxfordPets")
    assert [picture.answer for picture in task.limited(37, 0).split("train")] == list(task.classes)


def test_aircraft_and_mnist_from_their_own_files(tmp_path: Path) -> None:
    tiny_domains.write_aircraft(tmp_path)
    tiny_domains.write_mnist(tmp_path / "mnist")
    aircraft, mnist = load(tmp_path, "Aircraft", "MNIST")
    assert [aircraft.variant, mnist.variant] == ["fgvc variant files", "mnist idx files"]
    assert len(aircraft.split("train")) == 200
    assert aircraft.split("eval")[0].source == "fgvc_aircraft/images/0000200.jpg"
    assert {split: len(pictures) for split, pictures in mnist.splits.items()} == {"train": 20, "test": 10}


def test_the_same_task_wherever_the_data_lies(tmp_path: Path) -> None:
    tiny_domains.write_coop(tmp_path / "a", "EuroSAT")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    [one], [other] = load(tmp_path / "a", "EuroSAT"), load(tmp_path / "b", "EuroSAT")
    assert one.digest == other.digest


def test_a_set_that_is_not_there(tmp_path: Path) -> None:
    tiny_domains.write_coop(tmp_path, "EuroSAT")
    with pytest.raises(MoraError) as caught:
        load(tmp_path, "EuroSAT", "OxfordPets")
    for part in (
        "task 'OxfordPets'",
        "oxford_pets/split_zhou_OxfordPets.json (CoOp's layout",
        "clip_domains/OxfordPets/<version> (python -m mora_jax.data.builders)",
        "oxford_iiit_pet/<version> (TFDS: tfds.builder('oxford_iiit_pet', data_dir=ROOT, file_format='array_record')",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(MoraError, match=r"fgvc_aircraft/images_variant_train\.txt"):
        load(tmp_path, "Aircraft")
    with pytest.raises(MoraError, match=r"mnist/train-images-idx3-ubyte .* mnist/<version> \(TFDS"):
        load(tmp_path, "MNIST")


def test_roots_that_hold_no_set(tmp_path: Path) -> None:
    with pytest.raises(MoraError, match=r"benchmark\.root is empty; set it to the folder that holds the sets of pict"):
        stream.task_names("xtail", "")
    with pytest.raises(MoraError, match=r"holds none of the sets Aircraft, Caltech101, .*; set it to the folder that"):
        stream.task_names("xtail", str(tmp_path))
    (tmp_path / "oxford_iiit_pet").mkdir()
    assert stream.task_names("xtail", str(tmp_path)) == ORDER
    with pytest.raises(MoraError, match="unknown task of benchmark 'xtail' 'CIFAR100'; known: Aircraft, "):
        load(tmp_path, "CIFAR100")


@pytest.mark.parametrize("count", [36, 38])
def test_a_split_file_with_another_number_of_classes(count: int, tmp_path: Path) -> None:
    names = (*DOMAINS["OxfordPets"].classes, "wombat")[:count]
    tiny_domains.write_coop(tmp_path, "OxfordPets", classes=names)
    with pytest.raises(MoraError, match=f"'OxfordPets': the files list {count} classes.*; the set has 37, such as"):
        load(tmp_path, "OxfordPets")


def test_the_split_file_of_another_set(tmp_path: Path) -> None:
    tiny_domains.write_coop(tmp_path, "EuroSAT", classes=DOMAINS["MNIST"].classes)
    with pytest.raises(
        MoraError, match="list 10 classes, 10 of them unknown, such as '0'; the set has 10, such as 'Ann"
    ):
        load(tmp_path, "EuroSAT")


def test_another_spelling_is_the_files_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = ("annual crop land", *DOMAINS["EuroSAT"].classes[1:9], "Lake or Sea")
    tiny_domains.write_coop(tmp_path, "EuroSAT", classes=names)
    assert load(tmp_path, "EuroSAT")[0].classes == names
    said = "task 'EuroSAT': 1 of 10 class names are the files' own: 'Lake or Sea'"
    assert capfd.readouterr().err.strip() == said


def test_names_of_another_set_are_refused(tmp_path: Path) -> None:
    names = ("zebra", "lion", "tiger", *DOMAINS["EuroSAT"].classes[3:])
    tiny_domains.write_coop(tmp_path, "EuroSAT", classes=names)
    with pytest.raises(MoraError, match="the files list 10 classes, 3 of them unknown, such as 'zebra'"):
        load(tmp_path, "EuroSAT")


# --- the three numbers ------------------------------------------------------------------------------------------------

# MoRAM's scores after the last of the ten tasks, in the published order, and the mean it prints.
MORAM_LAST, MORAM_MEAN = (37.7, 81.5, 70.7, 92.4, 95.0, 86.0, 97.6, 92.6, 81.0, 74.7), 80.9


def test_the_published_last_is_the_mean_over_the_domains() -> None:
    R = np.full((10, 10), np.nan)
    R[-1] = MORAM_LAST
    assert round(continual.last(R), 1) == MORAM_MEAN


def test_transfer_average_and_last_by_hand() -> None:
    """Three domains; column by column, transfer is the mean above the diagonal: (20 + (10 + 0) / 2) / 2."""
    R = np.array([[50.0, 20.0, 10.0], [40.0, 80.0, 0.0], [30.0, 70.0, 90.0]])
    assert continual.transfer(R) == pytest.approx((20 + 5) / 2)
    assert continual.average(R) == pytest.approx(390 / 9)
    assert continual.last(R) == pytest.approx(190 / 3)
