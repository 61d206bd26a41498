"""The decoder family behind the seam that `train.py` uses: what a batch is, what the loss is, what an answer is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mora_jax.benchmarks.stream import Example, Task
from mora_jax.data import text
from mora_jax.errors import MoraError
from mora_jax.methods.method import Method
from mora_jax.models.decoder import Decoder, causal_mask
from mora_jax.models.registry import DTYPES, LanguageModel
from mora_jax.runtime import hosts
from mora_jax.runtime.decoding import DECODING
from mora_jax.runtime.distributed import ROW_AXES, place
from mora_jax.runtime.family import GateMap, TrainData
from mora_jax.runtime.generate import Generation, Generator

# Tokens allowed where neither the config nor the task says: the limits of the TRACE runs.
PROMPT_TOKENS, ANSWER_TOKENS = 1024, 512
LEAST_PROMPT = 2  # BOS and one token, as for train.max_prompt_tokens


def answer_loss(decoder: Decoder, variables: Mapping[str, Any], batch: Mapping[str, Array]) -> Float[Array, ""]:
    """Mean cross-entropy over answer tokens (with EOS).

    Only the hidden states that predict an answer token meet the vocabulary: `batch["answers"]` [1, a] are the offsets
    from a row's first answer token that can carry loss, and offsets past a row's length count nothing.
    """
    tokens, t = batch["tokens"], batch["tokens"].shape[1]
    positions = jnp.broadcast_to(jnp.arange(t)[None], tokens.shape)
    hidden, _ = decoder.apply(variables, tokens, positions, causal_mask(t))
    target_at, counts = answer_tokens(batch)
    target_at = jnp.clip(target_at, 1, t - 1)
    source = jnp.take_along_axis(hidden, (target_at - 1)[..., None], axis=1)
    logits = decoder.apply(variables, source, method=Decoder.logits)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.take_along_axis(tokens, target_at, axis=1))
    return jnp.sum(losses * counts) / jnp.maximum(jnp.sum(counts), 1)


def answer_tokens(batch: Mapping[str, Array]) -> tuple[Int[Array, "b a"], Bool[Array, "b a"]]:
    """Where the tokens that can carry loss stand in their rows, and which of them do."""
    at = batch["prompt"][:, None] + batch["answers"]
    return at, (at < batch["length"][:, None]) & (at > 0)  # nothing comes before a row's first token


class LanguageFamily:
    """A decoder with its tokenizer, placed on a mesh, ready to be taught a stream of text tasks; a `family.Family`."""

    rate = "tokens"
    label_space = None  # texts are scored by their own task

    def __init__(
        self, model: LanguageModel, method: Method, config: Mapping[str, Any], mesh: Mesh, tasks: Sequence[Task] = ()
    ):
        """Raises MoraError, before the weights are placed, if the limits of one of the `tasks` do not fit the model."""
        self.config, self.mesh, self.tokenizer = config, mesh, model.tokenizer
        self.identity = model.identity
        rows = NamedSharding(mesh, P(ROW_AXES, None, None))
        self.decoder = Decoder(model.config, method, DTYPES[config["model"]["dtype"]], config["model"]["remat"], rows)
        self._shortened: set[str] = set()  # tasks whose prompts are shorter than they say, for the model's sake
        for task in tasks:
            self.limits(task)
        self.params = place(mesh, model.params)
        self._generate = Generator(self.decoder, model.tokenizer, mesh, DECODING[config["eval"]["decoding"]])

    @property
    def site_kinds(self) -> dict[tuple[str, ...], str]:
        """The path of every dense layer that a method may adapt, with its kind, such as attn/q."""
        paths = (path[:-1] for path in flatten_dict(self.params) if path[0] == "layers" and path[-1] == "kernel")
        return {path: "/".join(path[1:]) for path in paths}

    def loss(self, variables: Mapping[str, Any], batch: Mapping[str, Array]) -> Float[Array, ""]:
        return answer_loss(self.decoder, variables, batch)

    def weight(self, batch: Mapping[str, Array]) -> Float[Array, ""]:
        return jnp.sum(answer_tokens(batch)[1], dtype=jnp.float32)

    @property
    def heads(self) -> dict[str, int]:
        return {"heads": self.decoder.config.heads, "key and value heads": self.decoder.config.kv_heads}

    def limits(self, task: Task) -> text.Limits:
        """Token limits of a task: the config's where it has them, else the task's, else the defaults above.

        A prompt with its answer, read or written, fits the model's trained context: where the limit of the prompt is
        not the config's it gives way, which is told once. Raises MoraError where that does not help.
        """
        train = self.config["train"]
        prompt = train["max_prompt_tokens"] or task.max_prompt_tokens or PROMPT_TOKENS
        answer = train["max_answer_tokens"] or task.max_answer_tokens or ANSWER_TOKENS
        longest, most = max(answer, self.new_tokens(task, answer)), self.decoder.config.max_positions
        if prompt + longest > most:
            if train["max_prompt_tokens"] or most - longest < LEAST_PROMPT:
                raise MoraError(
                    f"task {task.name!r}: {prompt} tokens of prompt (train.max_prompt_tokens) and {longest} of answer "
                    f"(the larger of train.max_answer_tokens and eval.max_new_tokens; 0 = the task's own) are more "
                    f"than the {most} positions of the model; legal: together at most {most}"
                )
            if task.name not in self._shortened and hosts.first():
                said = (
                    f"task {task.name!r}: prompts are cut to {most - longest} tokens instead of {prompt}, because the "
                )
                print(f"{said}model has {most} positions and answers may take {longest}", file=sys.stderr)
            self._shortened.add(task.name)
            prompt = most - longest
        return text.Limits(prompt, answer, train["length_bucket"])

    def new_tokens(self, task: Task, answer: int) -> int:
        """The most tokens of an answer that are generated; `answer` where neither config nor task says."""
        return self.config["eval"]["max_new_tokens"] or task.max_new_tokens or answer

    def count(self, batch: Mapping[str, np.ndarray]) -> dict[str, int]:
        return {"tokens": int(batch["length"].sum()), "examples": len(batch["length"])}

    def train_data(self, task: Task, index: int, steps: int, epochs: int) -> TrainData:
        examples = task.split("train")
        limits = self.limits(task)
        records, cut = text.encode_records(
            [e.prompt for e in examples], [e.answer for e in examples], self.tokenizer, limits
        )
        plan = text.plan_batches(
            records,
            limits=limits,
            batch_size=self.config["train"]["batch_size"],
            steps=steps,
            epochs=epochs,
            seed=self.config["seed"] * 1000 + index,
            pad_id=self.tokenizer.pad_id,
        )
        return TrainData(text.pipeline(plan), len(plan), cut)

    def prompt_tokens(self, task: Task) -> int:
        return self.limits(task).prompt

    def chance(self, task: Task) -> None:
        """Texts have no chance level."""

    def gate_map(self, variables: Mapping[str, Any], task: Task, examples: Sequence[Example]) -> GateMap:
        return self._generate.gate_map(variables, examples[0].prompt, self.limits(task).prompt)

    def prepare(self, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        return variables

    def predict(
        self,
        variables: Mapping[str, Any],
        task: Task,
        examples: Sequence[Example],
        after_batch: Callable[[int], None],
    ) -> Generation:
        limits = self.limits(task)
        return self._generate(
            variables,
            [example.prompt for example in examples],
            max_prompt_tokens=limits.prompt,
            max_new_tokens=self.new_tokens(task, limits.answer),
            batch_size=self.config["eval"]["batch_size"],
            after_batch=after_batch,
        )
