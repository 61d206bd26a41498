"""The small CLIP: its sizes, its captioned pictures, and that contrastive training teaches it to find captions."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_clip import random_params

from mora_jax.data import captioned, packages
from mora_jax.data.captioned import Captioned
from mora_jax.data.registries import Unavailable
from mora_jax.errors import MoraError
from mora_jax.models import clip_weights, registry, small_clip
from mora_jax.models.clip_config import CLIPConfig, TextConfig, VisionConfig
from mora_jax.models.clip_tokenizer import ClipTokenizer
from mora_jax.models.unread import load
from mora_jax.runtime import pretraining
from mora_jax.runtime.display import Display
from mora_jax.runtime.pretraining import Recipe

TOKENIZER = ClipTokenizer.byte_level()
TINY = CLIPConfig(
    VisionConfig(32, 64, 2, 4, "gelu", image_size=16, patch_size=8),
    TextConfig(
        32, 64, 2, 4, "gelu", vocab_size=TOKENIZER.vocab_size, context=TOKENIZER.context, eos_id=TOKENIZER.end_id
    ),
    32,
)
RECIPE = Recipe(steps=40, batch_size=12, learning_rate=3e-3, warmup_steps=5, held_out=13)
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "gray": (128, 128, 128)}
FORMS = {"bar": np.s_[6:10, :], "pole": np.s_[:, 6:10], "block": np.s_[3:13, 3:13]}


def drawn(copies: int) -> Captioned:
    """Every colour and form so many times, each moved a little, with noise: 12 captions."""
    rng = np.random.default_rng(0)
    pixels, captions = [], []
    for _, (colour, rgb), (form, place) in itertools.product(range(copies), COLOURS.items(), FORMS.items()):
        picture = np.zeros((16, 16, 4), np.uint8)
        picture[place] = (*rgb, 255)
        picture[..., :3] = np.clip(picture[..., :3] + rng.integers(-20, 21, (16, 16, 3)), 0, 255)
        pixels.append(np.roll(picture, rng.integers(-2, 3, 2), (0, 1)))
        captions.append(f"{colour} {form}")
    return Captioned(np.stack(pixels), tuple(captions))


# --- the model --------------------------------------------------------------------------------------------------------


def test_sizes() -> None:
    count = sum(int(np.prod(shape)) for shape in clip_weights.param_shapes(small_clip.CONFIG).values())
    assert 5_000_000 < count < 10_000_000
    tokens = small_clip.tokenizer()(["a photo of a cat.", "word " * 100])
    assert tokens.shape == (2, small_clip.CONTEXT)
    assert small_clip.tokenizer().vocab_size == small_clip.CONFIG.text.vocab_size
    assert (tokens == small_clip.CONFIG.text.eos_id).sum(axis=1).tolist() == [1, 1]


def test_the_named_model_is_the_trained_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = random_params(small_clip.CONFIG)
    clip_weights.save_params(params, small_clip.CONFIG, tmp_path)
    monkeypatch.setattr(pretraining, "small_clip_folder", lambda: tmp_path)
    model = registry.load_model({"name": "small-clip", "weights": "", "dtype": "float32"}, seed=0)
    assert model.config == small_clip.CONFIG
    assert model.tokenizer.context == small_clip.CONTEXT
    jax.tree.map(np.testing.assert_array_equal, load(model.params), params)


# --- captioned pictures -----------------------------------------------------------------------------------------------


def png(width: int, height: int, box: tuple[int, int, int, int], colour: tuple[int, ...] = (255, 0, 0, 255)) -> bytes:
    image = Image.new("RGBA", (width, height), (0, 0, 255, 0))
    image.paste(colour, box)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_emoji(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [
        {"name": "GREEN APPLE-TREE", "short_name": "apple", "image": "a.png"},
        {"name": None, "short_name": "flag-eg", "image": "b.png"},
        {"name": "NOT DRAWN", "short_name": "x", "image": "c.png"},
        {"name": "NOTHING ON IT", "short_name": "x", "image": "d.png"},
    ]
    dot = png(20, 20, (5, 5, 15, 15))
    files = {
        "package/emoji.json": json.dumps(table).encode(),
        "package/img/google/64/a.png": dot,
        "package/img/google/64/b.png": dot,
        "package/img/google/64/d.png": png(20, 20, (0, 0, 0, 0)),
    }
    monkeypatch.setattr(packages, "read_members", lambda name, prefix: files)
    data = captioned.load(("emoji-datasource-google",), 8)
    assert data.captions == ("green apple tree", "flag eg")
    assert data.pixels.shape == (2, 8, 8, 4)
    # The empty rim is gone, and no hidden blue shows.
    np.testing.assert_array_equal(data.pixels[0], np.broadcast_to([255, 0, 0, 255], (8, 8, 4)))
    assert data.only(np.array([False, True])).captions == ("flag eg",)
    with pytest.raises(MoraError, match="unknown package of captioned pictures 'x'; known: emoji-datasource-google"):
        captioned.load(("x",), 8)


def test_pictures_keep_their_proportions() -> None:
    square = captioned._square(png(40, 20, (0, 0, 40, 10)), 16)
    assert square[..., 3].sum(axis=1).nonzero()[0].tolist() == [6, 7, 8, 9]


def test_packages_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def archive(name: str) -> Path:
        if name == "emoji-datasource-twitter":
            raise Unavailable("no such file in the registry")
        return Path(name)

    said: list[str] = []
    monkeypatch.setattr(packages, "archive", archive)
    assert captioned.available(said.append) == ("emoji-datasource-google",)
    assert said == ["captioned pictures are left out: no such file in the registry"]
    monkeypatch.setattr(captioned, "SOURCES", {"emoji-datasource-twitter": ""})
    with pytest.raises(Unavailable, match="none of the packages with captioned pictures can be had: emoji"):
        captioned.available(said.append)


# --- training ---------------------------------------------------------------------------------------------------------


def test_contrastive_loss() -> None:
    logits = np.array([[2.0, 0.0, 1.0], [0.5, 1.5, -1.0], [0.0, 0.0, 3.0]])

    def nll(x: np.ndarray) -> float:
        return float(np.mean(np.log(np.exp(x).sum(axis=1)) - np.diag(x)))

    np.testing.assert_allclose(pretraining.contrastive_loss(logits), 0.5 * (nll(logits) + nll(logits.T)), rtol=1e-6)
    np.testing.assert_allclose(pretraining.contrastive_loss(np.zeros((5, 5))), np.log(5), rtol=1e-6)


def test_augmented_pictures() -> None:
    pictures = np.zeros((200, 16, 16, 4), np.uint8)
    pictures[:, 4:12, 4:12] = (250, 10, 10, 255)
    seen = np.asarray(pretraining.augment(jax.random.key(0), pictures))
    assert seen.shape == (200, 16, 16, 3)
    assert seen.dtype == np.uint8
    assert len(np.unique(seen.reshape(200, -1), axis=0)) > 190
    seen = seen.astype(int)
    for colour in (0, 255):
        assert 0.15 < np.mean((seen[:, 0, 0] == colour).all(axis=1)) < 0.5
    middle = seen[:, 8, 8]
    red, grey = np.ptp(middle, axis=1) > 200, np.ptp(middle, axis=1) == 0
    assert (red | grey).all()
    assert 0.02 < grey.mean() < 0.3
    # Where there is no transparency the ground shows at the rim at most.
    pictures[:] = (250, 10, 10, 255)
    whole = np.asarray(pretraining.augment(jax.random.key(0), pictures)).astype(int)[:, 3:-3, 3:-3]
    assert set(map(tuple, whole.reshape(-1, 3).tolist())) == {(250, 10, 10), (90, 90, 90)}


def test_on_white() -> None:
    picture = np.array([[[[10, 20, 30, 255], [10, 20, 30, 0]]]], np.uint8)
    assert np.asarray(pretraining.on_white(picture)).tolist() == [[[[10, 20, 30], [255, 255, 255]]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny CLIP trained once on `drawn` pictures, in a cache of its own; and what was said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MORA_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(captioned, "load", lambda names, size: drawn(16))
        yield pretraining.trained("tiny", TINY, TOKENIZER, RECIPE, ("emoji-datasource-twitter",), Display())


def test_training_teaches_retrieval(folder: Path) -> None:
    report = json.loads((folder / pretraining.REPORT_FILE).read_text())
    losses = report["losses"]
    assert len(losses) == RECIPE.steps
    assert losses[0] > np.log(12) - 0.1  # it knows nothing
    assert np.mean(losses[-5:]) < np.log(12) - 0.3
    np.testing.assert_allclose(report["chance_percent"], 100 / 12)
    assert report["retrieval_percent"] > 4 * report["chance_percent"]
    # What was kept is what was measured.
    config = clip_weights.load_config(folder)
    assert config == TINY
    params = clip_weights.load_params(folder, config, np.float32)
    data = drawn(16)
    held_out = np.arange(len(data.captions)) % RECIPE.held_out == 0
    tokens = pretraining._trim(TOKENIZER(data.captions))
    found = pretraining.retrieval(config, params, data.only(held_out), tokens[held_out])
    np.testing.assert_allclose(found, (report["retrieval_percent"], report["chance_percent"]))


def test_trained_once(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MORA_JAX_CACHE", str(folder.parent.parent))

    def refuse(names: Any, size: int) -> None:
        raise Unavailable("trained again")

    monkeypatch.setattr(captioned, "load", refuse)
    sources = ("emoji-datasource-twitter",)
    assert pretraining.trained("tiny", TINY, TOKENIZER, RECIPE, sources, Display()) == folder
    assert capsys.readouterr().out == ""
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]  # nothing half made stays
    for recipe, packages_used in ((Recipe(steps=41), sources), (RECIPE, ("emoji-datasource-google",))):
        with pytest.raises(Unavailable, match="trained again"):
            pretraining.trained("tiny", TINY, TOKENIZER, recipe, packages_used, Display())


def test_the_same_weights_from_the_same_seed() -> None:
    data = drawn(1)
    tokens = pretraining._trim(TOKENIZER(data.captions))
    recipe = Recipe(steps=3, batch_size=6)
    first, second = (pretraining.pretrain(TINY, data, tokens, recipe, lambda n, note: None) for _ in range(2))
    assert first[1] == second[1]
    assert len(set(first[1])) == 3
    jax.tree.map(np.testing.assert_array_equal, first[0], second[0])
