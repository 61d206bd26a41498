"""The CLIP family behind the seam of `train.py`: pictures are compared with texts that name classes.

The protocol is that of X-TAIL (arXiv 2406.18868) and MTIL (arXiv 2303.06628): a task is taught with its own classes,
and asked with the classes of all tasks of the stream (`eval.label_space=joint`) or with its own (`own`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mora_jax.benchmarks.pictures import Picture, PictureTask
from mora_jax.data import pictures
from mora_jax.data.text import bucket
from mora_jax.errors import MoraError
from mora_jax.methods.method import Method
from mora_jax.models.clip import CLIP, end_of_text, site_kinds
from mora_jax.models.registry import DTYPES, ClipModel
from mora_jax.runtime.distributed import place, place_batch, whole_rows
from mora_jax.runtime.family import GateCounts, GateMap, TrainData, count_gates

TEXT_BUCKET = 8  # tokens: class texts are padded to a multiple of it
# Most batches of a task on which gates are counted, spread evenly: counting costs 6 % with 160 experts a site.
COUNTED = 16


def contrastive_loss(clip: CLIP, variables: Mapping[str, Any], batch: Mapping[str, Array]) -> Float[Array, ""]:
    """Cross-entropy of each picture over the classes, plus that of each class over the pictures of the batch.

    In the second the targets are multi-hot and not divided by the pictures of a class, as in the published code
    (github.com/Artificer-AI-Lab/MoRAM, XTAIL/models/moram.py): with p_ic the softmax over the pictures i,
    -(1/classes) sum_c sum_{i: y_i = c} log p_ic. batch: pictures [b, size, size, 3], labels [b], texts [n, t], of which
    the first classes [1] are real and the rest is padding.
    """
    logits = clip.apply(variables, batch["pictures"], batch["texts"])  # [b n]
    index = jnp.arange(logits.shape[1])[None]  # [1 n]
    real = index < batch["classes"][:, None]
    by_class = jnp.where(real, logits, jnp.finfo(logits.dtype).min)
    of_pictures = optax.softmax_cross_entropy_with_integer_labels(by_class, batch["labels"]).mean()
    target = batch["labels"][:, None] == index  # [b n]
    of_classes = -jnp.sum(jnp.where(target, jax.nn.log_softmax(logits, axis=0), 0.0)) / batch["classes"][0]
    return of_pictures + of_classes


class Classes(NamedTuple):
    """The classes of all tasks as points on the mesh, and what the gates did on each task's texts."""

    embeddings: Float[Array, "classes d_embed"]
    gates: Mapping[str, GateCounts]


class Classification(NamedTuple):
    """Names of classes in the order of the pictures; a class that only another task has is `task: class`."""

    texts: list[str | None]
    gates: GateCounts
    truncated: int = 0


class ClipFamily:
    """A CLIP with its tokenizer, placed on a mesh, ready for a stream of tasks with pictures (see `family.Family`)."""

    rate = "examples"
    weight = None  # pictures are compared with each other: no sum over parts of a batch

    def __init__(
        self, model: ClipModel, method: Method, config: Mapping[str, Any], mesh: Mesh, tasks: Sequence[PictureTask]
    ):
        self.config, self.mesh, self.identity = config, mesh, model.identity
        method = method.portable if mesh.size > 1 else method
        self.clip = CLIP(model.config, method, DTYPES[config["model"]["dtype"]], config["model"]["remat"])
        self.sizes, self._tokenizer = model.config, model.tokenizer
        self.tasks = {task.name: task for task in tasks}
        self.classes = [(task.name, name) for task in tasks for name in task.classes]
        # One width for the whole stream, or the train step would be traced again for longer names.
        texts = [text for task in tasks for text in _texts(task, len(task.templates))]
        # Two classes that read alike, such as the dogs of photographs and of sketches, are one answer.
        self._meaning = [meaning for task in tasks for meaning in self._meanings(task)]
        self.params = place(mesh, model.params)
        longest = max((int(np.argmax(row)) for row in self._tokenizer(texts) == self._tokenizer.end_id), default=0) + 1
        self.width = min(-(-longest // TEXT_BUCKET) * TEXT_BUCKET, model.config.text.context)
        whole = NamedSharding(mesh, P())  # every process reads the answers
        self._embed_texts = jax.jit(self._text_points, out_shardings=whole)
        self._choose = jax.jit(self._choice, static_argnames="count", out_shardings=whole)
        self._map = jax.jit(self._collect, out_shardings=whole)

    @property
    def site_kinds(self) -> dict[tuple[str, ...], str]:
        return site_kinds(self.params)

    @property
    def heads(self) -> dict[str, int]:
        return {"heads of pictures": self.sizes.vision.heads, "heads of texts": self.sizes.text.heads}

    def loss(self, variables: Mapping[str, Any], batch: Mapping[str, Array]) -> Float[Array, ""]:
        return contrastive_loss(self.clip, variables, batch)

    def count(self, batch: Mapping[str, np.ndarray]) -> dict[str, int]:
        return {"examples": len(batch["labels"])}

    def _meanings(self, task: PictureTask) -> list[tuple[int | str, ...]]:
        """What the model reads of each class: ids, for the tokenizer folds case and blanks; with the text if it is cut.

        Raises MoraError where that is the same for two classes, which no score would tell apart.
        """
        texts, end = _texts(task, 1), self._tokenizer.end_id
        pairs = zip(texts, self._tokenizer(texts).tolist(), strict=True)
        read = [(*ids, text) if ids[-1] == end else tuple(ids) for text, ids in pairs]
        of: dict[tuple[int | str, ...], str] = {}
        for name, meaning in zip(task.classes, read, strict=True):
            if (first := of.setdefault(meaning, name)) != name:
                raise MoraError(f"task {task.name!r}: the classes {first!r} and {name!r} are one text to this model")
        return read

    def _tokens(self, texts: Sequence[str]) -> Int[np.ndarray, "n width"]:
        return self._tokenizer(texts)[:, : self.width]

    # -------------------------------------------------------------------- training

    def train_data(self, task: PictureTask, index: int, steps: int, epochs: int) -> TrainData:
        """Batches of pictures; of the templates the first one names the classes."""
        records, train = task.split("train"), self.config["train"]
        rows = bucket(len(task.classes), train["class_bucket"], 1 << 30)
        texts = np.zeros((rows, self.width), np.int32)
        texts[:, 0] = self._tokenizer.end_id  # where a padded text ends; no loss sees it
        texts[: len(task.classes)] = self._tokens(_texts(task, 1))
        constant = {"texts": texts, "classes": np.array([len(task.classes)], np.int32)}
        place_of = {name: i for i, name in enumerate(task.classes)}
        labels = np.array([place_of[record.answer] for record in records], np.int32)
        order = pictures.plan_batches(
            len(records),
            batch_size=train["batch_size"],
            steps=steps,
            epochs=epochs,
            seed=self.config["seed"] * 1000 + index,
        )
        reader = self._reader(task, records)
        plan = pictures.TrainPlan(reader, labels, order, constant)
        return TrainData(pictures.pipeline(plan), len(plan), skipped=reader.skipped)

    def _legal(self, task: PictureTask) -> Bool[np.ndarray, " classes"]:
        """The classes that pictures of a task are compared with."""
        own = np.array([name == task.name for name, _ in self.classes])
        return own if self.config["eval"]["label_space"] == "own" else np.ones_like(own)

    def chance(self, task: PictureTask) -> float:
        return 100.0 / len({self._meaning[i] for i in np.flatnonzero(self._legal(task))})

    def prompt_tokens(self, task: PictureTask) -> None:
        """Pictures have no prompts."""

    @property
    def label_space(self) -> int | None:
        return len(set(self._meaning)) if self.config["eval"]["label_space"] == "joint" else None

    def _reader(self, task: PictureTask, records: Sequence[Picture]) -> pictures.Reader:
        return pictures.Reader(records, self.sizes.vision.image_size, f"task {task.name}")

    # -------------------------------------------------------------------- evaluation

    def prepare(self, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        """`variables` with the class embeddings of all tasks, each the renormalised mean over the task's templates."""
        means, gates = [], {}
        for task in self.tasks.values():
            points, gates[task.name] = self._points(variables, _texts(task, len(task.templates)))
            mean = points.reshape(len(task.classes), len(task.templates), -1).mean(axis=1)
            means.append(mean / np.linalg.norm(mean, axis=-1, keepdims=True))
        return {**variables, "classes": Classes(place(self.mesh, np.concatenate(means)), gates)}

    def _points(self, variables: Mapping[str, Any], texts: Sequence[str]) -> tuple[np.ndarray, GateCounts]:
        """[texts, d_embed], and the gates on their tokens."""
        tokens, size = self._tokens(texts), whole_rows(self.mesh, self.config["eval"]["batch_size"])
        points, gates = [], GateCounts()
        for start in range(0, len(tokens), size):
            rows = tokens[start : start + size]
            padded = np.zeros((size, self.width), np.int32)
            padded[:, 0] = self._tokenizer.end_id
            padded[: len(rows)] = rows
            batch = place_batch(self.mesh, {"texts": padded, "real": np.arange(size) < len(rows)})
            found, counts = jax.device_get(self._embed_texts(variables, batch))
            points.append(found[: len(rows)])
            gates += GateCounts.fetched(counts)
        return np.concatenate(points), gates

    def _text_points(self, variables, batch):
        tokens = batch["texts"]
        points, told = self.clip.apply(variables, tokens, method=CLIP.embed_texts, mutable=["stats"])
        end = end_of_text(tokens, self.sizes.text.eos_id)
        real = batch["real"][:, None] & (jnp.arange(tokens.shape[1])[None] <= end[:, None])
        return points, count_gates(told.get("stats", {}), real)

    def predict(
        self,
        variables: Mapping[str, Any],
        task: PictureTask,
        examples: Sequence[Picture],
        after_batch: Callable[[int], None],
    ) -> Classification:
        """The class nearest to each picture, of the classes that `eval.label_space` allows."""
        variables = dict(variables)
        classes: Classes = variables.pop("classes")
        legal = place(self.mesh, self._legal(task))
        size = whole_rows(self.mesh, self.config["eval"]["batch_size"])
        texts, gates, names = [], classes.gates[task.name], self._names(task)
        plan = pictures.ReadPlan(self._reader(task, examples), size)
        every = -(-len(plan) // COUNTED)
        for i, batch in enumerate(pictures.pipeline(plan)):
            placed, count = place_batch(self.mesh, batch), i % every == 0
            chosen, counts = jax.device_get(self._choose(variables, classes.embeddings, legal, placed, count=count))
            rows = min(size, len(examples) - len(texts))
            found = zip(chosen[:rows].tolist(), batch["real"], strict=False)
            texts += [names[index] if real else None for index, real in found]
            gates += GateCounts.fetched(counts)
            after_batch(rows)
        return Classification(texts, gates)

    def _choice(self, variables, classes, legal, batch, *, count: bool):
        told_of = ["stats"] if count else []
        points, told = self.clip.apply(variables, batch["pictures"], method=CLIP.embed_images, mutable=told_of)
        logits = self.clip.apply(variables, points, classes, method=CLIP.logits)
        chosen = jnp.argmax(jnp.where(legal[None], logits, -jnp.inf), axis=-1)
        real = jnp.broadcast_to(batch["real"][:, None], (len(points), self.sizes.vision.positions))
        return chosen, count_gates(told.get("stats", {}), real)

    def _names(self, task: PictureTask) -> list[str]:
        """What each class of the stream is called as an answer to a picture of this task."""
        own = dict(zip(self._meanings(task), task.classes, strict=True))
        pairs = zip(self._meaning, self.classes, strict=True)
        return [own.get(meaning, f"{owner}: {name}") for meaning, (owner, name) in pairs]

    # -------------------------------------------------------------------- gates

    def gate_map(self, variables: Mapping[str, Any], task: PictureTask, examples: Sequence[Picture]) -> GateMap:
        """The gates of the vision encoder's middle layer on the first picture; tokens are the class and the patches."""
        reader = self._reader(task, examples)
        picture = next((found for found in map(reader, range(len(examples))) if found is not None), None)
        if picture is None:
            raise MoraError(f"task {task.name!r} has no picture that can be read")
        vision = self.sizes.vision
        layer, side = vision.layers // 2, vision.image_size // vision.patch_size
        batch = place_batch(self.mesh, {"pictures": picture[None]})
        found = jax.device_get(self._map(variables, batch, layer))
        sites = {"/".join((path[0], *path[2:-1])): g[0] for path, g in flatten_dict(found).items()}
        tokens = ["class", *(f"row {i + 1}, column {j + 1}" for i in range(side) for j in range(side))]
        return GateMap(tokens, False, layer, sites, picture)

    def _collect(self, variables, batch, layer):
        _, found = self.clip.apply(variables, batch["pictures"], method=CLIP.embed_images, mutable=["gates"])
        return jax.tree.map(lambda leaf: leaf[layer], found["gates"])


def _texts(task: PictureTask, templates: int) -> list[str]:
    """The texts that name the classes: of each class its first so many templates."""
    return [template.replace("{}", name) for name in task.classes for template in task.templates[:templates]]
