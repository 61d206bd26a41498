"""What a run has learned, apart from the run: its experts, which task each of them comes from, and what they adapt.

A frozen expert never changes, so the bank after task t is the first `live_after(t)` rows of any later bank, and the
newest checkpoint answers for all tasks. Where a boundary trains rows on (`lasting` is false) each task has its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Float

from mora_jax import config as configs
from mora_jax.errors import MoraError
from mora_jax.methods import bank as banks
from mora_jax.methods.boundaries import BOUNDARIES
from mora_jax.methods.method import Method, from_config
from mora_jax.models.hf import read_json
from mora_jax.runtime import distributed
from mora_jax.runtime.checkpoint import Checkpoints
from mora_jax.runtime.family import SitePath

# keys [layers, n, d_in] and values [layers, n, d_out] of each site
Rows = Mapping[SitePath, Mapping[str, Float[np.ndarray, "layers n d"]]]

# What may be said anew about a trained adapter: where things lie, how it is asked, and what gates do at inference.
CHANGEABLE = (
    "benchmark.",
    "eval.",
    "mesh.",
    "kernel",
    "model.weights",
    "train.max_prompt_tokens",
    "train.max_answer_tokens",
    "method.top_k",
    "method.temperature",
    "method.threshold",
)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Frozen experts of the `tasks` taught so far. `identity` names the weights they adapt; empty = not known."""

    config: Any
    identity: str
    tasks: tuple[str, ...]
    rows: Rows
    origin: Mapping[str, Any]

    @property
    def method(self) -> Method:
        return from_config(self.config.method, self.config.kernel)

    @property
    def experts(self) -> int:
        """Rows per site."""
        return self.method.live_after(len(self.tasks) - 1)

    def span(self, task: int) -> tuple[int, int]:
        """The rows [start, stop) that task `task` (from 0) trained last."""
        stop = self.method.live_after(task)
        return stop - self.method.rank, stop

    def after(self, task: int) -> Adapter:
        """The adapter as it stood after task `task`, -1 = before the first. Raises MoraError if that is not here."""
        check_task(task, self.tasks)
        last = len(self.tasks) - 1
        if -1 < task < last and not BOUNDARIES[self.method.boundary].lasting:
            raise MoraError(
                f"--task={task}: with method.boundary={self.method.boundary!r} later tasks have changed the rows of "
                f"task {task}; legal here: -1, {last}, or a --workdir that still has the checkpoint of that task"
            )
        n = self.method.live_after(task)
        rows = {path: {name: array[:, :n] for name, array in site.items()} for path, site in self.rows.items()}
        return dataclasses.replace(self, tasks=self.tasks[: task + 1], rows=rows)

    def check_base(self, identity: str) -> None:
        """MoraError if the weights `identity` are known not to be those that the experts were trained on."""
        if self.identity and identity != self.identity:
            raise MoraError(
                f"wrong base model: the experts were trained on the weights {self.identity!r} (model.name="
                f"{self.config.model.name!r}), these are {identity!r}; set --config.model.weights to the former"
            )

    def variables(self, mesh: Mesh, sites: banks.Sites, identity: str) -> dict[str, Any]:
        """The collection `bank` on the devices, as a run has it after the last of `tasks`; nothing without experts.

        Raises MoraError if the weights `identity` or their `sites` are not those that the experts were trained on.
        """
        if not self.method.trains:
            return {}
        self.check_base(identity)
        capacity, flat = self.method.capacity(max(0, len(self.tasks) - 1)), {}
        if missing := sites.keys() ^ self.rows.keys():
            ours, theirs = (", ".join(sorted("/".join(path) for path in paths)) for paths in (sites, self.rows))
            raise MoraError(
                f"wrong base model or method.targets: {'/'.join(min(missing))} is a site of one only; the model has "
                f"{ours}, the adapter {theirs}"
            )
        for path, site in sites.items():
            n, wanted = self.experts, {"keys": site.d_in, "values": site.d_out}
            flat[(*path, "live")] = np.full((site.layers,), n, np.int32)
            for name, width in wanted.items():
                found = self.rows[path][name]
                if found.shape != (site.layers, n, width):
                    raise MoraError(
                        f"wrong base model: {'/'.join((*path, name))} of the adapter has shape {list(found.shape)}, "
                        f"the model needs [layers, experts, width] = {[site.layers, n, width]}"
                    )
                full = np.zeros((site.layers, capacity, width), np.float32)
                full[:, :n] = found
                flat[(*path, name)] = full
        return {"bank": distributed.place(mesh, unflatten_dict(flat))}


def check_task(task: int, tasks: Sequence[str]) -> None:
    """MoraError unless `task` is -1 or one of the tasks, counted from 0."""
    if not -1 <= task < len(tasks):
        known = ", ".join(f"{i} ({name})" for i, name in enumerate(tasks)) or "none yet"
        raise MoraError(f"--task={task} has not been taught; legal: -1 (the frozen model), and of the tasks {known}")


def from_workdir(workdir: Path, task: int | None, overrides: Mapping[str, str]) -> Adapter:
    """The experts as they stood after task `task` (from 0; -1 = before the first, None = the last one frozen).

    Reads the newest intact checkpoint that knows them and changes nothing, so the run may go on meanwhile. Raises
    MoraError if there is none, if the task has not been taught, or if an override is not one of `CHANGEABLE`.
    """
    held = Checkpoints(workdir, keep=1)
    found = held.read()
    if found is None:
        raise MoraError(f"--workdir={workdir} holds no checkpoint; give the --workdir of python -m mora_jax.train")
    meta, arrays = found
    source = workdir / "results.json"  # runs of earlier versions have their config only there
    saved = meta.get("config") or read_json(source).get("config", {})
    config = configs.restore(saved, source, overrides, CHANGEABLE)
    method = from_config(config.method, config.kernel)
    frozen = meta["task"] + (meta["phase"] != "training") if method.trains else 0
    tasks = tuple(row["task"] for row in meta["stream"][:frozen])
    task = len(tasks) - 1 if task is None else task
    check_task(task, tasks)
    if task >= 0 and not BOUNDARIES[method.boundary].lasting:
        found = held.read(lambda its_task, phase: its_task == task and phase != "training")
        if found is None:
            raise MoraError(
                f"--workdir={workdir} no longer has the checkpoint of task {task} ({tasks[task]}), and with "
                f"method.boundary={method.boundary!r} later ones have other rows"
            )
        meta, arrays = found
    n = method.live_after(task)
    rows: dict[SitePath, dict[str, np.ndarray]] = {}
    for path, array in flatten_dict(arrays.get("bank") or {}).items():
        if path[-1] != "live":
            rows.setdefault(path[:-1], {})[path[-1]] = array[:, :n]
    origin = {name: meta[name] for name in ("step", "task", "phase")}
    return Adapter(config, meta["fingerprint"]["weights"], tasks[: task + 1], rows, origin)
