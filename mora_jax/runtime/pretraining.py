"""Contrastive pretraining of a small CLIP on captioned pictures (arXiv 2103.00020, section 2.3 and figure 3).

This is not the continual trainer: all parameters move, there are no tasks, and it ends within minutes. The result is
kept in the cache under a sum over everything that decides it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

from mora_jax.data import captioned, packages
from mora_jax.data.captioned import Captioned
from mora_jax.models import clip_weights, small_clip
from mora_jax.models.clip import CLIP, initialise
from mora_jax.models.clip_config import CLIPConfig
from mora_jax.models.clip_tokenizer import ClipTokenizer
from mora_jax.runtime.display import Display
from mora_jax.runtime.results import device, versions

REPORT_FILE = "pretraining.json"  # beside the weights
_MAX_LOGIT_SCALE = float(np.log(100.0))  # arXiv 2103.00020, section 2.5


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a small CLIP is trained: AdamW, linear warm-up, cosine decay to 0.

    version: to be raised when this module or `data.captioned` changes what is learned, for it is part of the identity
    of cached weights.
    """

    steps: int
    batch_size: int = 64  # pictures, each with another caption
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    held_out: int = 16  # one of so many pictures is kept for measuring retrieval
    seed: int = 0
    version: int = 2


RECIPES: Mapping[str, Recipe] = {"small-clip": Recipe(steps=400)}


# --- what a picture may look like -------------------------------------------------------------------------------------


def augment(key: Array, pictures: UInt8[Array, "b size size 4"]) -> UInt8[Array, "b size size 3"]:
    """Pictures moved and scaled a little and laid on a random ground; some grey.

    Little on purpose: so few steps do not suffice to learn what stronger changes, such as silhouettes, leave of them.
    """
    keys, n = jax.random.split(key, 3), len(pictures)
    x = jax.vmap(_move)(jax.random.split(keys[0], n), _premultiplied(pictures))
    x = x[..., :3] + (1.0 - x[..., 3:]) * _grounds(keys[1], n)
    grey = jnp.broadcast_to(x.mean(axis=-1, keepdims=True), x.shape)
    return _bytes(jnp.where(jax.random.bernoulli(keys[2], 0.1, (n, 1, 1, 1)), grey, x))


def on_white(pictures: UInt8[Array, "b size size 4"]) -> UInt8[Array, "b size size 3"]:
    """Pictures as they are, on white."""
    x = _premultiplied(pictures)
    return _bytes(x[..., :3] + (1.0 - x[..., 3:]))


def _premultiplied(pictures):
    x = pictures.astype(jnp.float32) / 255.0
    return jnp.concatenate([x[..., :3] * x[..., 3:], x[..., 3:]], axis=-1)


def _bytes(x):
    return jnp.round(255.0 * jnp.clip(x, 0.0, 1.0)).astype(jnp.uint8)


def _move(key, picture):
    """One picture at another scale somewhere in the square; [size, size, 4], premultiplied."""
    size = picture.shape[0]
    scale_key, key = jax.random.split(key)
    scale = jax.random.uniform(scale_key, (), minval=0.9, maxval=1.0)
    shift = jax.random.uniform(key, (2,)) * (1.0 - scale) * size
    return jax.image.scale_and_translate(picture, picture.shape, (0, 1), jnp.stack([scale, scale]), shift, "linear")


def _grounds(key, n):
    """[n, 1, 1, 3]: a third each black, white and any colour."""
    kind_key, key = jax.random.split(key)
    kind = jax.random.randint(kind_key, (n, 1, 1, 1), 0, 3)
    return jnp.where(kind == 2, jax.random.uniform(key, (n, 1, 1, 3)), kind.astype(jnp.float32))


# --- training ---------------------------------------------------------------------------------------------------------


def contrastive_loss(logits: Float[Array, "n n"]) -> Float[Array, ""]:
    """Symmetric InfoNCE: picture i belongs to text i and to no other (arXiv 2103.00020, figure 3)."""
    pairs = jnp.arange(len(logits))
    over_texts = optax.softmax_cross_entropy_with_integer_labels(logits, pairs)
    over_pictures = optax.softmax_cross_entropy_with_integer_labels(logits.T, pairs)
    return 0.5 * (over_texts.mean() + over_pictures.mean())


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, min(recipe.warmup_steps, recipe.steps // 2), recipe.steps
    )

    def decays(params):
        return jax.tree.map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)

    adam = optax.adamw(rate, b1=0.9, b2=0.98, eps=1e-6, weight_decay=recipe.weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _step(clip: CLIP, recipe: Recipe, params, opt_state, key, pictures, tokens):
    def loss(params):
        return contrastive_loss(clip.apply({"params": params}, augment(key, pictures), tokens))

    value, gradient = jax.value_and_grad(loss)(params)
    updates, opt_state = _optimizer(recipe).update(gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
    params["logit_scale"] = jnp.minimum(params["logit_scale"], _MAX_LOGIT_SCALE)
    return params, opt_state, value


def _trim(tokens: Int[np.ndarray, "n context"]) -> Int[np.ndarray, "n t"]:
    """Without the columns that are padding in every row: captions are much shorter than the context."""
    return tokens[:, : int(np.flatnonzero(tokens.any(axis=0))[-1]) + 1]


def pretrain(
    config: CLIPConfig,
    data: Captioned,
    tokens: Int[np.ndarray, "n t"],
    recipe: Recipe,
    advance: Callable[[int, str], None],
) -> tuple[dict[str, Any], list[float]]:
    """(parameters, loss of every step). tokens: of each picture's caption. `advance(1, note)` follows every step."""
    clip, rng = CLIP(config), np.random.default_rng(recipe.seed)
    first, key = jax.random.split(jax.random.key(recipe.seed))
    params = initialise(clip, first)
    opt_state = jax.jit(_optimizer(recipe).init)(params)
    # Pictures that share a caption are positives of each other, so a batch holds each caption at most once.
    groups: dict[str, list[int]] = {}
    for index, caption in enumerate(data.captions):
        groups.setdefault(caption, []).append(index)
    members = list(groups.values())
    batch_size = min(recipe.batch_size, len(members))
    losses = []
    for number in range(recipe.steps):
        drawn = rng.choice(len(members), batch_size, replace=False)
        batch = np.array([members[group][rng.integers(len(members[group]))] for group in drawn])
        params, opt_state, loss = _step(
            clip, recipe, params, opt_state, jax.random.fold_in(key, number), data.pixels[batch], tokens[batch]
        )
        losses.append(float(loss))
        advance(1, f"loss {losses[-1]:.2f}")
    return jax.device_get(params), losses


def retrieval(
    config: CLIPConfig, params: Mapping[str, Any], data: Captioned, tokens: Int[np.ndarray, "n t"]
) -> tuple[float, float]:
    """(percent of pictures whose own caption is the nearest of all captions of `data`, percent expected by chance)."""
    clip = CLIP(config)
    captions = sorted(set(data.captions))
    rows = {caption: tokens[i] for i, caption in enumerate(data.captions)}
    apply = jax.jit(clip.apply, static_argnames="method")
    texts = apply({"params": params}, np.stack([rows[caption] for caption in captions]), method="embed_texts")
    images = apply({"params": params}, on_white(data.pixels), method="embed_images")
    nearest = np.asarray(jnp.argmax(images @ texts.T, axis=1))
    right = [captions[i] == caption for i, caption in zip(nearest, data.captions, strict=True)]
    return 100.0 * float(np.mean(right)), 100.0 / len(captions)


# --- kept in the cache ------------------------------------------------------------------------------------------------


def small_clip_folder() -> Path:
    """The folder of the trained small CLIP, in the layout of transformers; trained first if it is not in the cache.

    Raises Unavailable where no captioned pictures can be had, and MoraError for a cache that cannot be written.
    """
    display = Display()
    sources = captioned.available(display.say)
    return trained("small-clip", small_clip.CONFIG, small_clip.tokenizer(), RECIPES["small-clip"], sources, display)


def trained(
    name: str, config: CLIPConfig, tokenizer: ClipTokenizer, recipe: Recipe, sources: Sequence[str], display: Display
) -> Path:
    """The folder of a CLIP trained on these packages of captioned pictures; from the cache where it is there.

    The folder's name is a sum over sizes, recipe and packages. It appears complete or not at all.
    """
    sums = {source: packages.PACKAGES[source].sha256 for source in sources}
    decides = {"config": dataclasses.asdict(config), "recipe": dataclasses.asdict(recipe), "packages": sums}
    identity = hashlib.sha256(json.dumps(decides, sort_keys=True).encode("ascii")).hexdigest()[:16]
    folder = packages.cache_dir() / name / identity
    if folder.is_dir():
        return folder
    display.say(f"{name} is trained once on captioned pictures from {', '.join(sources)}; kept in {folder}")
    start = time.monotonic()
    data = captioned.load(sources, config.vision.image_size)
    tokens = _trim(tokenizer(data.captions))
    held_out = np.arange(len(data.captions)) % recipe.held_out == 0
    with display.progress(name, "steps", recipe.steps) as advance:
        params, losses = pretrain(config, data.only(~held_out), tokens[~held_out], recipe, advance)
    top, chance = retrieval(config, params, data.only(held_out), tokens[held_out])
    seconds = time.monotonic() - start
    display.say(
        f"{name}: of {held_out.sum()} pictures not trained on, {top:.1f} % find their caption (chance {chance:.1f} %); "
        f"{seconds:.0f} s"
    )
    told = {"retrieval_percent": top, "chance_percent": chance, "seconds": seconds}
    report = {**decides, "losses": losses, **told, "device": device(), "versions": versions()}
    packages.made(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="training-") as temporary:
        complete = Path(temporary) / "model"
        clip_weights.save_params(params, config, complete)
        (complete / REPORT_FILE).write_text(json.dumps(report) + "\n", encoding="utf-8")
        try:
            os.replace(complete, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder
