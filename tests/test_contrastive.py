"""The CLIP family: its loss, the classes that a picture is compared with, what the gates did, what is cut where."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from small_pictures import TASKS, write_pictures
from tiny_clip import TINY, fast, forward, inputs, random_params

from mora_jax import config as configs
from mora_jax import experiment
from mora_jax.benchmarks import image_folder
from mora_jax.benchmarks.pictures import PictureTask
from mora_jax.data.images import pixels
from mora_jax.errors import MoraError
from mora_jax.methods import bank as banks
from mora_jax.methods import boundaries
from mora_jax.methods.method import Method, from_config
from mora_jax.models.clip import CLIP
from mora_jax.models.registry import ClipModel, load_model
from mora_jax.runtime import contrastive
from mora_jax.runtime.contrastive import ClipFamily, contrastive_loss
from mora_jax.runtime.distributed import AXES, make_mesh, shardings

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "clip_cl.py"


# --- the loss ---------------------------------------------------------------------------------------------------------


def loss_of(batch: Mapping[str, Any]) -> float:
    return float(fast(lambda batch: contrastive_loss(CLIP(TINY), {"params": random_params(TINY)}, batch))(batch))


def batch_of(classes: int = 3, padding: int = 0) -> dict[str, np.ndarray]:
    pictures, texts = inputs(TINY, 4, classes)
    padded = np.zeros((classes + padding, texts.shape[1]), np.int32)
    padded[:, 0] = TINY.text.eos_id
    padded[:classes] = texts
    labels = np.array([2, 0, 2, 2], np.int32)  # no picture of class 1
    return {"pictures": pictures, "labels": labels, "texts": padded, "classes": np.array([classes], np.int32)}


def test_the_loss_is_that_of_the_formula() -> None:
    batch = batch_of()
    variables = {"params": random_params(TINY)}
    logits = np.asarray(forward(CLIP(TINY), variables["params"], batch["pictures"], batch["texts"]), np.float64)
    over_classes = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    over_pictures = logits - np.log(np.exp(logits).sum(axis=0, keepdims=True))
    pairs = list(enumerate(batch["labels"]))
    by_hand = -sum(over_classes[i, c] for i, c in pairs) / 4 - sum(over_pictures[i, c] for i, c in pairs) / 3
    assert loss_of(batch) == pytest.approx(by_hand, rel=1e-5)


def test_padded_classes_change_nothing() -> None:
    whole = loss_of(batch_of())
    padded = batch_of(padding=5)
    assert loss_of(padded) == pytest.approx(whole, rel=1e-6)
    padded["texts"][4] = batch_of()["texts"][2]  # whatever they hold
    assert loss_of(padded) == pytest.approx(whole, rel=1e-6)


# --- a family over a stream -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[PictureTask]:
    root = write_pictures(tmp_path_factory.mktemp("pictures"))
    (root / "shades" / "templates.txt").write_text("all {} here.\na {} wall\n")
    return [image_folder.load_task(name, str(root), split_seed=0, metric=None) for name in TASKS]


@pytest.fixture(scope="module")
def model() -> ClipModel:
    return load_model({"name": "tiny_clip", "weights": "", "dtype": "float32"}, 0)


class Family(ClipFamily):
    """Counts how often the text encoder is asked."""

    asked = 0

    def _points(self, *arguments: Any) -> Any:
        self.asked += 1
        return super()._points(*arguments)


def family_of(model: ClipModel, tasks: list[PictureTask], method: str = "zero_shot", **options: object) -> Family:
    given = {"method.top_k": 2, "method.rank": 4, "method.targets": "vision/attn/o,text/mlp/up"}
    given |= {key.replace("__", "."): value for key, value in options.items()}
    config = configs.load(f"{CONFIG}:smoke,method={method}", {key: str(value) for key, value in given.items()})
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)
    return quick(model, from_config(config.method, config.kernel), config, mesh, tasks)


def quick(*arguments: Any) -> Family:
    """Quickly compiled."""
    with mock.patch.object(jax, "jit", fast):
        return Family(*arguments)


def answers(family: Family, task: PictureTask, variables: Mapping[str, Any] | None = None) -> list[str | None]:
    prepared = family.prepare(variables or {"params": family.params})
    return list(family.predict(prepared, task, task.split("test"), lambda n: None).texts)


def test_a_picture_is_compared_with_the_classes_of_all_tasks_or_of_its_own(
    model: ClipModel, tasks: list[PictureTask]
) -> None:
    """Against cosines by the frozen model, with the renormalised mean over templates of each class."""
    clip, params = CLIP(model.config), {"params": model.params}
    embed_texts, embed_images = (
        fast(functools.partial(clip.apply, params, method=method)) for method in (CLIP.embed_texts, CLIP.embed_images)
    )
    names, points = [], []
    for task in tasks:
        for name in task.classes:
            texts = model.tokenizer([template.format(name) for template in task.templates])
            mean = np.asarray(embed_texts(texts)).mean(axis=0)
            names.append((task.name, name))
            points.append(mean / np.linalg.norm(mean))
    families = {space: family_of(model, tasks, eval__label_space=space) for space in ("joint", "own")}
    seen = set()
    for task in tasks:
        pictures = np.stack([pixels(p.read(), 16, p.source) for p in task.split("test")])
        cosines = np.asarray(embed_images(pictures)) @ np.array(points).T
        own = np.array([owner == task.name for owner, _ in names])
        for space, legal in (("joint", np.ones_like(own)), ("own", own)):
            found = answers(families[space], task)
            for text, row in zip(found, np.where(legal, cosines, -np.inf), strict=True):
                owner, name = names[int(row.argmax())]
                assert text == (name if owner == task.name else f"{owner}: {name}")
            seen |= {":" in text for text in found if space == "joint"}
            assert not any(":" in text for text in found if space == "own")
    assert seen == {True, False}, "both kinds of answers are shown"


def test_classes_of_one_text_are_one_answer(model: ClipModel, tasks: list[PictureTask]) -> None:
    """As in a stream of photographs, sketches and so on of the same things."""
    first, again = tasks[0], dataclasses.replace(tasks[0], name="again")
    family = family_of(model, [first, again], eval__label_space="joint")
    found = answers(family, again)
    assert found == answers(family, first)
    assert set(found) <= set(first.classes)
    assert family.chance(again) == pytest.approx(100 / len(first.classes))
    assert family.label_space == len(first.classes)


def renamed(task: PictureTask, names: Mapping[str, str], **changes: str) -> PictureTask:
    pictures = {
        split: tuple(dataclasses.replace(p, answer=names.get(p.answer, p.answer)) for p in found)
        for split, found in task.splits.items()
    }
    classes = tuple(names.get(name, name) for name in task.classes)
    return dataclasses.replace(task, splits=pictures, classes=classes, **changes)


def test_classes_that_the_tokenizer_reads_alike_are_one_answer(model: ClipModel, tasks: list[PictureTask]) -> None:
    again = renamed(tasks[0], {"dark blue": "Dark  Blue"}, name="again")
    family = family_of(model, [tasks[0], again], eval__label_space="joint")
    assert family.label_space == len(tasks[0].classes)
    found = {name.replace("Dark  Blue", "dark blue") for name in family._names(again)}
    assert found == set(tasks[0].classes)
    with pytest.raises(MoraError, match="task 'colours': the classes 'green' and 'Green' are one text to this model"):
        family_of(model, [renamed(tasks[0], {"red": "Green"})])


def test_class_texts_are_embedded_once_for_a_row(model: ClipModel, tasks: list[PictureTask]) -> None:
    family = family_of(model, tasks)
    prepared = family.prepare({"params": family.params})
    assert family.asked == len(tasks)
    for task in tasks:
        family.predict(prepared, task, task.split("test"), lambda n: None)
    assert family.asked == len(tasks)


def test_the_batch_size_does_not_matter(model: ClipModel, tasks: list[PictureTask]) -> None:
    few, many = (family_of(model, tasks, eval__batch_size=size) for size in (2, 16))
    assert [answers(few, task) for task in tasks] == [answers(many, task) for task in tasks]


def test_progress_is_told_in_pictures(model: ClipModel, tasks: list[PictureTask]) -> None:
    family, told = family_of(model, tasks), []
    prepared = family.prepare({"params": family.params})
    family.predict(prepared, tasks[0], tasks[0].split("test"), told.append)
    assert told == [4, 4, 1]


# --- gates ------------------------------------------------------------------------------------------------------------


def taught(family: Family, method: Method, blocks: int = 2) -> Any:
    sites = banks.find_sites(family.params, family.site_kinds, method)
    bank = banks.empty(sites, method.capacity(blocks - 1))
    for task in range(blocks):
        bank, fresh = boundaries.append(method, sites, bank, 0, task)
        bank = boundaries.freeze(bank, jax.tree.map(lambda a: a + 0.01, fresh))
    return bank


def test_gates_are_counted_over_pictures_and_class_texts(model: ClipModel, tasks: list[PictureTask]) -> None:
    family = family_of(model, tasks, "mora", method__threshold=0)
    variables = {"params": family.params, "bank": taught(family, family.clip.method)}
    prepared = family.prepare(variables)
    layers = 2
    for task in tasks:
        gates = family.predict(prepared, task, task.split("test"), lambda n: None).gates
        texts = [template.format(name) for name in task.classes for template in task.templates]
        tokens = sum(len(text) + 2 - text.count(" ") for text in texts)  # bytes without blanks, start and end
        patches = 5 * len(task.split("test"))
        assert gates.pairs == layers * (patches + tokens)
        assert gates.active <= 2 * gates.pairs
        assert sum(gates.mass) == pytest.approx(gates.pairs, rel=1e-5)  # no threshold: every token's gates sum to 1
        assert len([mass for mass in gates.mass if mass > 0]) == 2


def test_a_gate_map_has_a_row_for_each_patch(model: ClipModel, tasks: list[PictureTask]) -> None:
    family = family_of(model, tasks, "mora")
    bank = taught(family, family.clip.method)
    found = family.gate_map({"params": family.params, "bank": bank}, tasks[0], tasks[0].split("test"))
    assert found.tokens == ["class", *(f"row {i}, column {j}" for i in (1, 2) for j in (1, 2))]
    assert (found.truncated, found.layer, list(found.sites)) == (False, 1, ["vision/attn/o"])
    g = found.sites["vision/attn/o"]
    assert g.shape[0] == 5
    assert (g[:, :8].sum(axis=1) > 0).any()
    assert not g[:, 8:].any()


# --- training data ----------------------------------------------------------------------------------------------------


def test_a_training_batch(model: ClipModel, tasks: list[PictureTask]) -> None:
    family = family_of(model, tasks, train__class_bucket=2)
    width = family.width
    assert width % 8 == 0
    for task, rows in zip(tasks, (4, 2), strict=True):
        data = family.train_data(task, 0, 3, 0)
        assert (data.steps, data.truncated, data.skipped) == (3, 0, set())
        batch = next(data.batches)
        assert {name: value.shape for name, value in batch.items()} == {
            "pictures": (4, 16, 16, 3),
            "labels": (4,),
            "texts": (rows, width),
            "classes": (1,),
        }
        assert batch["classes"] == len(task.classes)
        assert family.count(batch) == {"examples": 4}
        first = [task.templates[0].format(name) for name in task.classes]
        np.testing.assert_array_equal(batch["texts"][: len(first)], model.tokenizer(first)[:, :width])


def test_texts_are_cut_behind_the_longest_of_the_stream(model: ClipModel, tasks: list[PictureTask]) -> None:
    longest = max(len(f"a photo of a {name}.".replace(" ", "")) + 2 for name in tasks[0].classes)
    assert family_of(model, tasks).width == -(-longest // 8) * 8
    assert family_of(model, tasks[1:]).width == 16  # "<start>allwhitehere.<end>"


# --- models and meshes ------------------------------------------------------------------------------------------------


def test_both_encoders_are_cut_like_a_decoder() -> None:
    config = configs.load(f"{CONFIG}:smoke", {})
    method = from_config(config.method)
    params = random_params(TINY)
    mesh = make_mesh({"data": 1, "fsdp": 2, "model": 4})
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="/"): sharding.spec
        for path, sharding in jax.tree_util.tree_leaves_with_path(shardings(mesh, params))
    }
    for encoder in ("vision", "text"):
        for wide in ("attn/q", "attn/k", "attn/v", "mlp/up"):
            assert specs[f"{encoder}/layers/{wide}/kernel"] == P(None, "fsdp", "model")
        for narrow in ("attn/o", "mlp/down"):
            assert specs[f"{encoder}/layers/{narrow}/kernel"] == P(None, "model", "fsdp")
    sites = banks.find_sites(params, {("vision", "layers", "mlp", "up"): "vision/mlp/up"}, method)
    bank = shardings(mesh, banks.empty(sites, 8))["vision"]["layers"]["mlp"]["up"]
    assert (bank["keys"].spec, bank["values"].spec) == (P(None, None, "fsdp"), P(None, None, "model"))


def test_the_mesh_does_not_matter(model: ClipModel, tasks: list[PictureTask]) -> None:
    whole = family_of(model, tasks, "mora")
    bank = jax.device_get(taught(whole, whole.clip.method))
    many = quick(model, whole.clip.method, whole.config, make_mesh({"data": 2, "fsdp": 2, "model": 2}), tasks)
    for task in tasks:
        one, other = (answers(family, task, {"params": family.params, "bank": bank}) for family in (whole, many))
        assert one == other


@pytest.mark.parametrize("weights", ["", "some/folder"])
def test_the_kind_of_a_named_model_is_known_without_its_weights(weights: str) -> None:
    known = {name: experiment.kind_of({"name": name, "weights": weights}) for name in ("llama2-7b", "clip-vit-b16")}
    assert known == {"llama2-7b": "decoder", "clip-vit-b16": "clip"}


def test_a_large_task_counts_gates_on_some_batches(
    model: ClipModel, tasks: list[PictureTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine pictures in five batches: the first, third and fifth are counted, and the answers are the same."""
    family = family_of(model, tasks, "mora", eval__batch_size=2)
    prepared = family.prepare({"params": family.params, "bank": taught(family, family.clip.method)})
    task = tasks[0]
    whole = family.predict(prepared, task, task.split("test"), lambda n: None)
    monkeypatch.setattr(contrastive, "COUNTED", 3)
    some = family.predict(prepared, task, task.split("test"), lambda n: None)
    assert some.texts == whole.texts
    texts = prepared["classes"].gates[task.name].pairs
    assert (whole.gates.pairs - texts, some.gates.pairs - texts) == (2 * 5 * 9, 2 * 5 * 5)
