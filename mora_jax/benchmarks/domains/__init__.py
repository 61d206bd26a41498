"""The eleven sets of pictures behind X-TAIL and MTIL: names of classes and prompts for them, and where data may lie.

`<set in lower case>.txt` beside this file lists the classes in the order of the labels, one a line; where the data set
in TFDS calls a class otherwise, a tab and that name follow. The names are those of CoOp (arXiv 2109.01134) with blanks
for underscores: Caltech101's and EuroSAT's as its code renames them, SUN397's with the qualifier first, StanfordCars'
with the year first, Flowers' from its cat_to_name.json. They are the names of the published X-TAIL runs (RAIL, arXiv
2406.18868) too. MTIL's authors (ZSCL, arXiv 2303.06628) take OpenAI's names, which differ in Caltech101 (101 classes
there) and EuroSAT; here both benchmarks share one list.

Templates: `template` is X-TAIL's; `ensemble` is OpenAI's, all of data/prompts.md in the repository of CLIP (arXiv
2103.00020), which is what MTIL averages over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

# Names of splits in TFDS for ours. Food-101 calls its test split `validation`; EuroSAT has but one.
_TRAIN_TEST = {"train": "train", "test": "test"}
_THREE = {"train": "train", "eval": "validation", "test": "test"}

_A_PHOTO = ("a photo of a {}.", "a photo of the {}.")
_CALTECH = tuple(
    template.format(article, "{}")
    for article in ("a", "the")
    for template in (
        "a photo of {} {}.", "a painting of {} {}.", "{} plastic {}.", "a sculpture of {} {}.", "a sketch of {} {}.",
        "a tattoo of {} {}.", "{} toy {}.", "a rendition of {} {}.", "{} embroidered {}.", "{} cartoon {}.",
        "{} {} in a video game.", "{} plushie {}.", "{} origami {}.", "art of {} {}.", "graffiti of {} {}.",
        "a drawing of {} {}.", "a doodle of {} {}.",
    )
)  # fmt: skip
_CIFAR = tuple(
    f"a {before}photo of {article} {after}{{}}."
    for article in ("a", "the")
    for before, after in (
        ("", ""), ("blurry ", ""), ("black and white ", ""), ("low contrast ", ""), ("high contrast ", ""),
        ("bad ", ""), ("good ", ""), ("", "small "), ("", "big "),
    )
)  # fmt: skip
_CARS = (
    *_A_PHOTO, "a photo of my {}.", "i love my {}!", "a photo of my dirty {}.", "a photo of my clean {}.",
    "a photo of my new {}.", "a photo of my old {}.",
)  # fmt: skip
_DTD = tuple(
    f"a photo of {article} {{}} {noun}."
    for article in ("a", "the")
    for noun in ("texture", "pattern", "thing", "object")
)


@dataclass(frozen=True)
class Coop:
    """Where CoOp's layout has a set, relative to the root: its folder, and in that its split file and its pictures."""

    folder: str
    split_file: str
    images: str


@dataclass(frozen=True)
class Domain:
    """One set.

    tfds: its name in TFDS, empty where it has none; configs: those that may serve, the best first.
    tfds_splits: our split -> the one in TFDS; with a `train` alone the splits are drawn from it.
    dropped: labels in TFDS whose pictures belong to no class.
    """

    name: str
    template: str
    ensemble: tuple[str, ...]
    coop: Coop | None = None
    tfds: str = ""
    configs: tuple[str, ...] = ()
    tfds_splits: Mapping[str, str] = field(default_factory=lambda: _TRAIN_TEST)
    dropped: frozenset[str] = frozenset()

    @cached_property
    def _lines(self) -> list[list[str]]:
        text = (Path(__file__).parent / f"{self.name.lower()}.txt").read_text(encoding="utf-8")
        return [line.split("\t") for line in text.splitlines()]

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the labels."""
        return tuple(line[0] for line in self._lines)

    @cached_property
    def class_of_tfds(self) -> dict[str, str]:
        """Label in TFDS -> name of the class; labels that are dropped are not in it."""
        return {line[-1]: line[0] for line in self._lines}


DOMAINS: dict[str, Domain] = {
    row.name: row
    for row in (
        Domain(
            "Aircraft",
            template="a photo of a {}, a type of aircraft.",
            ensemble=("a photo of a {}, a type of aircraft.", "a photo of the {}, a type of aircraft."),
        ),
        Domain(
            "Caltech101",
            template="a photo of a {}.",
            ensemble=_CALTECH,
            coop=Coop("caltech-101", "split_zhou_Caltech101.json", "101_ObjectCategories"),
            tfds="caltech101",
            dropped=frozenset({"background_google", "faces_easy"}),
        ),
        Domain("CIFAR100", template="a photo of a {}.", ensemble=_CIFAR, tfds="cifar100"),
        Domain(
            "DTD",
            template="{} texture.",
            ensemble=_DTD,
            coop=Coop("dtd", "split_zhou_DescribableTextures.json", "images"),
            tfds="dtd",
            tfds_splits=_THREE,
        ),
        Domain(
            "EuroSAT",
            template="a centered satellite photo of the {}.",
            ensemble=tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")),
            coop=Coop("eurosat", "split_zhou_EuroSAT.json", "2750"),
            tfds="eurosat",
            configs=("rgb",),
            tfds_splits={"train": "train"},
        ),
        Domain(
            "Flowers",
            template="a photo of a {}, a type of flower.",
            ensemble=("a photo of a {}, a type of flower.",),
            coop=Coop("oxford_flowers", "split_zhou_OxfordFlowers.json", "jpg"),
            tfds="oxford_flowers102",
            tfds_splits=_THREE,
        ),
        Domain(
            "Food101",
            template="a photo of {}, a type of food.",
            ensemble=("a photo of {}, a type of food.",),
            coop=Coop("food-101", "split_zhou_Food101.json", "images"),
            tfds="food101",
            tfds_splits={"train": "train", "test": "validation"},
        ),
        Domain(
            "MNIST",
            template='a photo of the number: "{}".',
            ensemble=('a photo of the number: "{}".',),
            tfds="mnist",
        ),
        Domain(
            "OxfordPets",
            template="a photo of a {}, a type of pet.",
            ensemble=("a photo of a {}, a type of pet.",),
            coop=Coop("oxford_pets", "split_zhou_OxfordPets.json", "images"),
            tfds="oxford_iiit_pet",
        ),
        Domain(
            "StanfordCars",
            template="a photo of a {}.",
            ensemble=_CARS,
            coop=Coop("stanford_cars", "split_zhou_StanfordCars.json", ""),
            tfds="cars196",
        ),
        Domain(
            "SUN397",
            template="a photo of a {}.",
            ensemble=_A_PHOTO,
            coop=Coop("sun397", "split_zhou_SUN397.json", "SUN397"),
            tfds="sun397",
            # The first is the official partition 1, from which CoOp's split is drawn; its pictures are only smaller.
            configs=("standard-part1-120k", "tfds"),
        ),
    )
}
