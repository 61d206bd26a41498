"""Which knob would help a config that does not fit, by what fills the memory."""

from __future__ import annotations

from typing import Any

from mora_jax.planning.abstract import Work
from mora_jax.planning.compiled import ACTIVATIONS
from mora_jax.planning.topologies import Target
from mora_jax.runtime.distributed import ways

LARGE = 1 / 3  # of what is available: from there on a group is worth a line


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.2f} GiB"


def advice(name: str, step: dict[str, Any], work: Work, aim: Target) -> list[str]:
    """Lines for the step called `name`, each with the key to change; none where it fits."""
    if step["fits"] is not False:
        return []
    sizes = step["bytes"]
    large = LARGE * sizes["available"]
    lines = _of_frozen(sizes, work, aim) if sizes["frozen"] > large else []
    if sizes["bank"] > large / 2:
        lines.append(
            f"the bank takes {_gib(sizes['bank'])}: fewer method.targets, a smaller method.rank or a larger mesh.fsdp"
        )
    if sizes[ACTIVATIONS] is None or sizes[ACTIVATIONS] > large:
        lines += _of_train(work) if name == "train" else _of_decode(work)
    return lines or ["more devices, with a larger mesh.fsdp"]


def _of_frozen(sizes: dict[str, Any], work: Work, aim: Target) -> list[str]:
    shape, lines = work.mesh.shape, []
    if work.config.model.dtype == "float32":
        lines.append(f"model.dtype=bfloat16 halves the frozen weights ({_gib(sizes['frozen'])})")
    elif work.config.model.quantise == "none":
        lines.append(f"model.quantise=int8 about halves the frozen weights ({_gib(sizes['frozen'])}), nf4 halves again")
    if shape["data"] > 1:
        cut = sizes["frozen"] / shape["data"]
        lines.append(
            f"mesh.data={shape['data']} holds as many copies of the frozen weights: mesh.data=1 and "
            f"mesh.fsdp={shape['data'] * shape['fsdp']} leave {_gib(cut)} of them on a device"
        )
    else:
        lines.append(f"more than {aim.devices} devices, for mesh.fsdp or mesh.model to cut the frozen weights further")
    return lines


def _of_train(work: Work) -> list[str]:
    c, least = work.config, ways(work.mesh)
    lines = []
    if c.model.remat != "full":
        lines.append(f"model.remat=full keeps less for the backward pass than {c.model.remat}, at the cost of time")
    if c.train.batch_size > least * c.train.accumulate:
        parts = c.train.batch_size // least
        lines.append(
            f"train.accumulate={parts} takes the batch in parts with one row on each device, at the cost of time"
        )
        lines.append(f"a smaller train.batch_size than {c.train.batch_size}: {least} is one row on each device")
    if work.mesh.shape["model"] == 1 and work.sizes.heads > 1:
        lines.append("mesh.model=2 or more cuts heads and hidden features, if mesh.data or mesh.fsdp is made smaller")
    lengths = f"{work.longest['train'].prompt} + {work.longest['train'].answer}"
    lines.append(f"train.max_prompt_tokens and train.max_answer_tokens below {lengths}: scores grow with their square")
    return lines


def _of_decode(work: Work) -> list[str]:
    rows = work.config.eval.batch_size
    lines = [f"a smaller eval.batch_size than {rows}"] if rows > ways(work.mesh) else []
    return [*lines, "a smaller train.max_prompt_tokens or eval.max_new_tokens"]
