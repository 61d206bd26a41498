"""The real train and decode steps of a config over shapes instead of arrays: nothing is loaded, nothing is placed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from mora_jax.benchmarks.folder import DEFAULT_METRIC
from mora_jax.benchmarks.stream import Task
from mora_jax.data import text
from mora_jax.methods import bank as banks
from mora_jax.methods.method import Method, from_config
from mora_jax.models import quantised
from mora_jax.models.keytable import param_shape, rows
from mora_jax.models.registry import DTYPES, LanguageModel
from mora_jax.models.tokenizer import Tokenizer
from mora_jax.ops.gated_projection import compiling_for
from mora_jax.planning.sizes import decoder_config
from mora_jax.planning.tasks import of_stream
from mora_jax.runtime import distributed
from mora_jax.runtime.decoding import DECODING
from mora_jax.runtime.generate import ANSWER_BUCKET, Generator
from mora_jax.runtime.language import LanguageFamily
from mora_jax.runtime.optimizer import make_optimizer
from mora_jax.runtime.state import TrainState
from mora_jax.runtime.step import TrainStep

EVERY = "every task"


class Lengths(NamedTuple):
    """Tokens of a padded prompt and of an answer, read or written, and whose they are.

    task: the one with the most of both together, `EVERY` where all have as many, None where the limits of the stream's
    own tasks are not known, and the lengths are those of the config or else the defaults.
    """

    prompt: int
    answer: int
    task: str | None


class Step(NamedTuple):
    """`lower()` gives one program; groups: the arguments by what they are; open_trips: tokens that decoding writes."""

    lower: Callable[[], Any]
    groups: dict[str, Any]
    open_trips: int


class Work:
    """What a config asks of a mesh while its last task is taught, when the bank is as large as it gets.

    The gated projection is the one that config.kernel means on the devices of the mesh, whatever this machine has.
    """

    def __init__(self, config: Any, mesh: Mesh, tasks: int):
        self.config, self.mesh, self.tasks = config, mesh, tasks
        with self._on_target():
            self.method: Method = from_config(config.method, config.kernel)
        self.sizes = decoder_config(config.model)
        model = LanguageModel(self.sizes, self.params(mesh), Tokenizer.byte_level(), "shapes only")
        streamed = of_stream(config)
        asked = streamed or [Task("any", DEFAULT_METRIC, {})]
        self.family = LanguageFamily(model, self.method, config, mesh, asked)
        self.check(mesh)
        self.sites = banks.find_sites(self.family.params, self.family.site_kinds, self.method)
        self.capacity = self.method.capacity(tasks - 1) if self.method.trains else 0
        self.bank = self._placed(lambda: banks.empty(self.sites, self.capacity))
        self.longest = {step: self._longest(step, asked, bool(streamed)) for step in ("train", "decode")}

    def _longest(self, step: str, tasks: Sequence[Task], known: bool) -> Lengths:
        """Of the tasks by the run's own rule, which also keeps them within the positions of the model."""
        found = []
        for task in tasks:
            limits = self.family.limits(task)
            answer = limits.answer if step == "train" else self.family.new_tokens(task, limits.answer)
            found.append(Lengths(limits.prompt, answer, task.name))
        longest = max(found, key=lambda lengths: lengths.prompt + lengths.answer)
        alike = all(lengths[:2] == longest[:2] for lengths in found)
        return longest._replace(task=None if not known else EVERY if alike and len(found) > 1 else longest.task)

    def _on_target(self) -> AbstractContextManager[None]:
        return compiling_for(self.mesh.devices.flat[0].platform)

    def _step(self, lower: Callable[[], Any], groups: dict[str, Any], open_trips: int) -> Step:
        def on_target() -> Any:
            with self._on_target():
                return lower()

        return Step(on_target, groups, open_trips)

    def check(self, mesh: Mesh) -> None:
        """MoraError for a mesh that a run of this config would refuse."""
        batch_size = self.config.train.batch_size if self.method.trains else 0
        distributed.check_mesh(mesh, self.family.heads, batch_size, self.config.train.accumulate)

    def params(self, mesh: Mesh, **others: str) -> dict[str, Any]:
        """Shapes of the frozen weights with their shardings on a mesh; `others` replaces values of config.model."""
        model = dict(self.config.model) | others
        shapes = {row.ours: param_shape(row, self.sizes) for row in rows(self.sizes)}
        coded = quantised.stored(shapes, DTYPES[model["dtype"]], model["quantise"])
        return distributed.place(mesh, unflatten_dict(coded, sep="/"))

    def _placed(self, make: Callable[[], Any]) -> Any:
        return distributed.place(self.mesh, jax.eval_shape(make))

    def steps(self) -> dict[str, Step]:
        """The train step (of a method that trains) and the decode step, by name."""
        decode = {"decode": self.decode()}
        return {"train": self.train()} | decode if self.method.trains else decode

    def train(self) -> Step:
        """The train step on the longest batch: every row full, with a place for each token that may be an answer's."""
        c, optimizer = self.config.train, make_optimizer(self.config.train)
        parts = (c.accumulate, self.family.weight)
        step = TrainStep(self.family.loss, optimizer, c.schedule, c.learning_rate, *parts)
        fresh = self._placed(lambda: TrainState.create(banks.new_fresh(self.sites, self.method, 0, 0), optimizer))
        horizon = self._placed(lambda: jnp.float32(1))
        prompt, answer, _ = self.longest["train"]
        b, t = c.batch_size, text.bucket(prompt + answer, c.length_bucket, prompt + answer)
        places = text.answer_bucket(answer, t)
        batch = self._batch(tokens=(b, t), prompt=(b,), length=(b,), answers=(1, places))
        groups = {"frozen": self.family.params, "bank": self.bank, "fresh_and_optimizer": fresh}
        return self._step(lambda: step.lower(fresh, self.family.params, self.bank, horizon, batch), groups, 1)

    def decode(self) -> Step:
        """Answers to one batch of prompts, all of the longest: the prompt in one pass, then token by token."""
        c, longest = self.config.eval, self.longest["decode"]
        capacity = text.bucket(longest.answer, ANSWER_BUCKET, 1 << 30)
        b = distributed.whole_rows(self.mesh, c.batch_size)
        batch = self._batch(tokens=(b, longest.prompt), length=(b,))
        variables = {"params": self.family.params} | ({"bank": self.bank} if self.method.trains else {})
        most = self._placed(lambda: jnp.int32(1))
        groups = {"frozen": self.family.params, "bank": self.bank}
        generator = Generator(self.family.decoder, self.family.tokenizer, self.mesh, DECODING[c.decoding])
        run = generator._run  # what a call runs for every batch
        return self._step(lambda: run.lower(variables, batch, most, capacity=capacity), groups, capacity - 1)

    def _batch(self, **shapes: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        return distributed.place_batch(
            self.mesh, {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
        )


def bytes_of(tree: Any) -> tuple[float, float]:
    """(bytes that one device holds, bytes of the whole) of a tree of shapes with shardings, without padding."""
    held = whole = 0.0
    for leaf in jax.tree.leaves(tree):
        width = quantised.bits(leaf.dtype) / 8
        held += width * float(np.prod(leaf.sharding.shard_shape(leaf.shape)))
        whole += width * float(np.prod(leaf.shape))
    return held, whole
