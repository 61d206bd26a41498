"""MTIL: its two orders, and OpenAI's ensembles of templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_domains
from conftest import ROOT
from launching import Ended, results

from mora_jax import config as configs
from mora_jax.benchmarks import mtil, stream, xtail
from mora_jax.benchmarks.domains import DOMAINS
from mora_jax.errors import MoraError


def test_the_two_orders() -> None:
    assert mtil.ORDERS == {
        "order1": (
            "Aircraft", "Caltech101", "CIFAR100", "DTD", "EuroSAT", "Flowers", "Food101", "MNIST", "OxfordPets",
            "StanfordCars", "SUN397",
        ),
        "order2": (
            "StanfordCars", "Food101", "MNIST", "OxfordPets", "Flowers", "SUN397", "Aircraft", "Caltech101", "DTD",
            "EuroSAT", "CIFAR100",
        ),
    }  # fmt: skip
    assert set(DOMAINS) == set(mtil.ORDERS["order1"]) == set(mtil.ORDERS["order2"]) == {*xtail.TASKS, "CIFAR100"}
    assert sum(len(domain.classes) for domain in DOMAINS.values()) == 1200


@pytest.mark.parametrize(("name", "space"), [("mtil", "own"), ("xtail", "joint"), ("packaged_images", "own")])
def test_the_config_asks_as_the_benchmark_says(name: str, space: str) -> None:
    config = configs.load(f"{ROOT}/configs/clip_cl.py:benchmark={name}", {})
    assert config.eval.label_space == stream.label_space(name) == space


def test_the_ensembles() -> None:
    assert {name: len(domain.ensemble) for name, domain in DOMAINS.items()} == {
        "Aircraft": 2, "Caltech101": 34, "CIFAR100": 18, "DTD": 8, "EuroSAT": 3, "Flowers": 1, "Food101": 1, "MNIST": 1,
        "OxfordPets": 1, "StanfordCars": 8, "SUN397": 2,
    }  # fmt: skip
    for domain in DOMAINS.values():
        assert len(set(domain.ensemble)) == len(domain.ensemble)
        assert all(template.count("{}") == 1 for template in (domain.template, *domain.ensemble))
    assert {"the toy {}.", "a {} in a video game.", "a doodle of the {}."} < set(DOMAINS["Caltech101"].ensemble)
    assert {"a low contrast photo of a {}.", "a photo of the big {}."} < set(DOMAINS["CIFAR100"].ensemble)
    assert DOMAINS["DTD"].ensemble[-1] == "a photo of the {} object."
    assert DOMAINS["StanfordCars"].ensemble[2:4] == ("a photo of my {}.", "i love my {}!")


def test_a_task_has_all_templates(tmp_path: Path) -> None:
    tiny_domains.write_coop(tmp_path, "EuroSAT")
    tiny_domains.write_mnist(tmp_path / "mnist")
    eurosat, mnist = stream.load("mtil", str(tmp_path), ["EuroSAT", "MNIST"], metrics={}, split_seed=0)
    assert eurosat.templates == (
        "a centered satellite photo of {}.",
        "a centered satellite photo of a {}.",
        "a centered satellite photo of the {}.",
    )
    assert mnist.templates == ('a photo of the number: "{}".',)
    [joint] = stream.load("xtail", str(tmp_path), ["EuroSAT"], metrics={}, split_seed=0)
    assert joint.templates == eurosat.templates[2:]
    for split, pictures in eurosat.splits.items():
        assert [picture.source for picture in joint.split(split)] == [picture.source for picture in pictures]


def test_an_order_is_a_name_for_its_sets(tmp_path: Path) -> None:
    """All eleven are there for a first look; the first of order II is the first that is missed."""
    tiny_domains.write_coop(tmp_path, "EuroSAT")
    assert stream.task_names("mtil", str(tmp_path)) == mtil.ORDERS["order1"]
    with pytest.raises(MoraError, match=r"task 'StanfordCars': under .* none of: stanford_cars/split_zhou_Stanf"):
        stream.load("mtil", str(tmp_path), ["order2"], metrics={}, split_seed=0)
    with pytest.raises(MoraError, match=r"'order3'; known: Aircraft, .*, order1, order2"):
        stream.load("mtil", str(tmp_path), ["order3"], metrics={}, split_seed=0)


@pytest.mark.slow
def test_a_run_chooses_among_the_classes_of_the_set(main: Callable[..., Ended], tmp_path: Path) -> None:
    tiny_domains.write_coop(tmp_path / "sets", "EuroSAT")
    tiny_domains.write_mnist(tmp_path / "sets" / "mnist", train=30)
    run = main(
        f"--config={ROOT}/configs/clip_cl.py:smoke,benchmark=mtil",
        f"--workdir={tmp_path / 'w'}",
        f"--config.benchmark.root={tmp_path / 'sets'}",
        "--config.benchmark.tasks=EuroSAT,MNIST",
        "--config.benchmark.shots=2",
    )
    assert (run.code, run.err) == (0, "")
    found = results(tmp_path / "w")
    assert found["complete"]
    assert found["variant"] == [
        "coop split_zhou; 2 shots drawn with seed 42",
        "mnist idx files; 2 shots drawn with seed 42",
    ]
    assert found["config"]["eval"]["label_space"] == "own"
    assert found["train_traces"] == 1
    for row in ("00_zero_shot", "01_EuroSAT", "02_MNIST"):
        for name in ("EuroSAT", "MNIST"):
            lines = (tmp_path / "w" / "predictions" / row / f"{name}.jsonl").read_text().splitlines()
            assert {json.loads(line)["prediction"] for line in lines} <= set(DOMAINS[name].classes)
