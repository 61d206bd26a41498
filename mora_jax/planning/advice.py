"""Which knob would help a config that does not fit, by what fills the memory: only those that can be turned, with the
bytes that they leave where these follow from shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from jax.sharding import Mesh

from mora_jax.errors import MoraError
from mora_jax.models.quantised import QUANTISE
from mora_jax.planning.abstract import Work, bytes_of
from mora_jax.planning.compiled import ACTIVATIONS
from mora_jax.planning.topologies import Target
from mora_jax.runtime import distributed
from mora_jax.runtime.distributed import AXES, ways

LARGE = 1 / 3  # of what is available: from there on a group is worth a line
LESS = 0.95  # what leaves more than this share of a group is not worth one


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.2f} GiB"


def advice(name: str, step: dict[str, Any], work: Work, aim: Target) -> list[str]:
    """Lines for the step called `name`, each with the key to change; none where it fits."""
    if step["fits"] is not False:
        return []
    sizes = step["bytes"]
    large = LARGE * sizes["available"]
    lines = _of_frozen(sizes["frozen"], work, aim) if sizes["frozen"] > large else []
    if sizes["bank"] > large / 2:
        lines += _of_bank(sizes["bank"], work)
    if sizes[ACTIVATIONS] is None or sizes[ACTIVATIONS] > large:
        lines += _of_train(work) if name == "train" else _of_decode(work)
    return lines or ["more devices, with a larger mesh.fsdp"]


def _meshes(work: Work) -> Iterator[Mesh]:
    """Every mesh of the same devices that a run would not refuse; small mesh.model first, then small mesh.data."""
    devices = work.mesh.devices.reshape(-1)
    for model in range(1, devices.size + 1):
        for data in range(1, devices.size // model + 1):
            if devices.size % (model * data):
                continue
            mesh = Mesh(devices.reshape(data, -1, model), AXES)
            try:
                work.check(mesh)
            except MoraError:
                continue
            yield mesh


def _said(mesh: Mesh) -> str:
    return ", ".join(f"mesh.{axis}={n}" for axis, n in mesh.shape.items())


def _of_meshes(what: str, held: float, work: Work, size: Callable[[Mesh], float]) -> list[str]:
    """The first mesh on which a device holds about as little as on the best one, if that is less than `held`."""
    sizes = [(size(mesh), mesh) for mesh in _meshes(work)]
    least = min(found for found, _ in sizes)
    found, mesh = next(pair for pair in sizes if LESS * pair[0] <= least)
    return (
        [f"{_said(mesh)}: {_gib(found)} of {what} on a device instead of {_gib(held)}"] if found < LESS * held else []
    )


def _of_frozen(held: float, work: Work, aim: Target) -> list[str]:
    model = work.config.model
    others = [{"dtype": "bfloat16"}] if model.dtype == "float32" else []
    others += [{"quantise": name} for name in QUANTISE[QUANTISE.index(model.quantise) + 1 :]]
    lines = []
    for changed in others:
        left = bytes_of(work.params(work.mesh, **changed))[0]
        if left < LESS * held:
            ((key, value),) = changed.items()
            lines.append(
                f"model.{key}={value} leaves {_gib(left)} of frozen weights on a device instead of {_gib(held)}"
            )
    meshes = _of_meshes("frozen weights", held, work, lambda mesh: bytes_of(work.params(mesh))[0])
    return lines + (meshes or [f"more than {aim.devices} devices, with a larger mesh.fsdp"])


def _of_bank(held: float, work: Work) -> list[str]:
    method = work.method
    keys = [*["fewer method.targets"] * (len(work.sites) > 1), *["a smaller method.rank"] * (method.rank > 1)]
    lines = [f"the bank takes {_gib(held)}: {' or '.join(keys)}"] if keys else []
    rows = dataclasses.replace(method, capacity_bucket=method.rank).capacity(work.tasks - 1)
    if rows < LESS * work.capacity:
        left = _gib(held * rows / work.capacity)
        lines.append(
            f"method.capacity_bucket={method.rank}: {rows} rows of the bank instead of {work.capacity} are {left}, at "
            "the cost of compiling more often"
        )
    return lines + _of_meshes("the bank", held, work, lambda mesh: bytes_of(distributed.abstract(mesh, work.bank))[0])


def _of_train(work: Work) -> list[str]:
    c, least = work.config, ways(work.mesh)
    rows = c.train.batch_size
    lines = []
    if c.model.remat != "full":
        lines.append(f"model.remat=full keeps less for the backward pass than {c.model.remat}, at the cost of time")
    if rows > least * c.train.accumulate:
        parts, fewest = rows // least, least * c.train.accumulate
        lines.append(f"train.accumulate={parts} takes the batch in parts, one row on each device, at the cost of time")
        lines.append(f"a smaller train.batch_size than {rows}: {fewest} is one row on each device at a time")
    for mesh in [mesh for mesh in _meshes(work) if mesh.shape["model"] > work.mesh.shape["model"]][:1]:
        parts = rows // ways(mesh)
        lines.append(f"{_said(mesh)} cuts heads and hidden features, with train.accumulate={parts} for single rows")
    longest = work.longest["train"]
    lengths = f"{longest.prompt} + {longest.answer}"
    lines.append(f"train.max_prompt_tokens and train.max_answer_tokens below {lengths}: scores grow with their square")
    return lines


def _of_decode(work: Work) -> list[str]:
    rows = work.config.eval.batch_size
    lines = [f"a smaller eval.batch_size than {rows}"] if rows > ways(work.mesh) else []
    return [*lines, "a smaller train.max_prompt_tokens or eval.max_new_tokens"]
