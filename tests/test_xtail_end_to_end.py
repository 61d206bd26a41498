"""The protocol of X-TAIL with the real binary at the real size: a ViT-B/16 of random weights over three domains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_domains
from conftest import ROOT
from flax.traverse_util import unflatten_dict
from launching import Ended, results

from mora_jax.benchmarks.domains import DOMAINS
from mora_jax.metrics import continual
from mora_jax.models import clip_config, clip_weights

TASKS = ("EuroSAT", "MNIST", "OxfordPets")
PICTURES = 4  # of each domain that are tested


def write_vit_b16(folder: Path) -> None:
    """Random weights of the published sizes, in the files that transformers reads."""
    config = clip_config.PUBLISHED["clip-vit-b16"].config
    rng = np.random.default_rng(0)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith("scale"):
            return np.ones(shape, np.float32)
        return 0.02 * rng.standard_normal(shape, np.float32)

    params = {path: draw(path, shape) for path, shape in clip_weights.param_shapes(config).items()}
    params["logit_scale"] = np.float32(np.log(100))
    clip_weights.save_params(unflatten_dict(params, sep="/"), config, folder)


@pytest.fixture
def domains(tmp_path: Path) -> Path:
    """One domain from each kind of source."""
    root = tmp_path / "domains"
    tiny_domains.write_tfds(root, "EuroSAT", {"train": [label for label in range(10) for _ in range(4)]})
    tiny_domains.write_mnist(root / "mnist")
    tiny_domains.write_coop(root, "OxfordPets", side=40)
    return root


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_three_domains(domains: Path, binary: Callable[..., Ended], tmp_path: Path) -> None:
    write_vit_b16(tmp_path / "vit")
    workdir = tmp_path / "w"
    values = {
        "model.name": "custom",
        "model.weights": tmp_path / "vit",
        "benchmark.root": domains,
        "benchmark.tasks": ",".join(TASKS),
        "benchmark.shots": 1,
        "benchmark.eval_limit": PICTURES,
        "train.steps_per_task": 2,
        "train.batch_size": 2,
        "eval.batch_size": 8,
    }
    options = [f"--config.{key}={value}" for key, value in values.items()]
    run = binary(f"--config={ROOT}/configs/clip_cl.py:benchmark=xtail", f"--workdir={workdir}", *options, seconds=2300)
    assert (run.code, run.err) == (0, "")

    found = results(workdir)
    assert found["complete"]
    assert found["tasks"] == list(TASKS)
    assert found["metric"] == ["accuracy"] * 3
    assert [variant.partition(";")[0] for variant in found["variant"]] == [
        "tfds rgb 1.2.3 train, drawn by split_seed=42", "mnist idx files", "coop split_zhou",
    ]  # fmt: skip
    assert all("1 shots drawn with seed 42" in variant for variant in found["variant"])
    assert found["trainable_parameters"] == 4_423_680, "the published number"
    assert found["train_traces"] == 2, "buckets of 16 and of 64 classes"
    assert found["tokens_per_second"] is None
    assert found["summary"] == pytest.approx(continual.summary(np.array(found["R"])), abs=0.01)

    answers = {f"{name}: {each}": name for name in TASKS for each in DOMAINS[name].classes}
    folders = sorted(path for path in (workdir / "predictions").iterdir())
    for folder, scores in zip(folders, [found["zero_shot"], *found["R"]], strict=True):
        for task, score in zip(TASKS, scores, strict=True):
            lines = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]
            assert len(lines) == PICTURES
            assert score == pytest.approx(100 * np.mean([line["prediction"] == line["answer"] for line in lines]))
            for line in lines:
                assert line["answer"] in DOMAINS[task].classes
                assert line["prediction"] in DOMAINS[task].classes or answers[line["prediction"]] != task
                assert str(tmp_path) not in line["prompt"]
