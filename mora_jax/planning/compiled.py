"""Compiles a step and says what it needs of one device: memory by group, FLOPs, traffic, collectives, a lower bound."""

from __future__ import annotations

import re
import time
from typing import Any

import jax

from mora_jax.errors import MoraError
from mora_jax.planning.abstract import Step, bytes_of
from mora_jax.planning.hlo import Reader, Tally
from mora_jax.planning.topologies import Target

# What a kernel of the gated projection is called in a program, with the name of the implementation.
KERNELS = {"tpu_custom_call": "pallas_tpu", "__gpu$xla.gpu.triton": "pallas_gpu"}
ACTIVATIONS = "activations_and_temporaries"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# The two ways in which the TPU compiler says that a program does not fit.
_TEMPORARIES = re.compile(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM")
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm")


def examine(step: Step, aim: Target) -> dict[str, Any]:
    """Everything that is known of one step on one target, as plain values: bytes, FLOPs and seconds of one device.

    `fits` is None where the memory of the device is unknown. `kernel` is what computes the gated projection: xla where
    the program has no kernel, be it asked for or not. Of a program that the compiler refused for its memory only that
    and the bytes are known.
    """
    started = time.monotonic()
    lowered = step.lower()
    found = {"kernel": _kernel(lowered.as_text())}
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as problem:
        if "RESOURCE_EXHAUSTED" not in str(problem):
            raise MoraError(f"the {aim.name} compiler refused: {str(problem).splitlines()[0]}") from problem
        memory = _too_large(str(problem), step, aim)
        return found | {"fits": False, "bytes": memory, "compile_seconds": round(time.monotonic() - started, 1)}
    seconds = round(time.monotonic() - started, 1)
    memory = _memory(program.memory_analysis(), step, aim)
    tally = Reader(program.as_text(), step.open_trips, aim.per_host).tally()
    fits = None if memory["available"] is None else memory["total"] <= memory["available"]
    return found | {"fits": fits, "bytes": memory, "compile_seconds": seconds} | _costs(tally, aim)


def _kernel(text: str) -> str:
    return next((name for target, name in KERNELS.items() if target in text), "xla")


def _groups(step: Step) -> dict[str, float]:
    return {name: bytes_of(tree)[0] for name, tree in step.groups.items()}


def _memory(analysis: Any, step: Step, aim: Target) -> dict[str, float | None]:
    """Bytes of one device by group; the rest of the arguments is the batch, and what a tiled layout pads."""
    groups = _groups(step)
    arguments = float(analysis.argument_size_in_bytes)
    # A donated argument is the place of a result; other results are new.
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    groups["batch_and_padding"] = max(0.0, arguments - sum(groups.values()))
    groups[ACTIVATIONS] = float(analysis.temp_size_in_bytes + results)
    groups["program"] = float(analysis.generated_code_size_in_bytes)
    return groups | {"total": sum(groups.values()), "available": aim.available}


def _too_large(message: str, step: Step, aim: Target) -> dict[str, float | None]:
    """What the compiler told before it gave up; a number it did not tell is None."""
    groups = _groups(step)
    held = sum(groups.values())
    temporaries = None
    if found := _TEMPORARIES.search(message):
        temporaries = float(found[1]) * _UNITS[found[2]]
    elif found := _USED.search(message):
        temporaries = max(0.0, float(found[1]) * _UNITS[found[2]] - held)
    total = None if temporaries is None else held + temporaries
    return groups | {ACTIVATIONS: temporaries, "total": total, "available": aim.available}


def _costs(tally: Tally, aim: Target) -> dict[str, Any]:
    """FLOPs, traffic, collectives, and the roofline (Williams et al., 2009): the slowest part bounds a step.

    The networks within a host and between hosts can work at the same time, so the slower one bounds both.
    """
    transfers = {
        kind: {"count": round(t.count), "bytes": t.bytes, "bytes_between_hosts": t.far}
        for kind, t in sorted(tally.collectives.items())
    }
    costs = {"flops": tally.flops, "memory_traffic": tally.bytes, "collectives": transfers}
    if aim.chip is None:
        return costs | {"seconds": None, "bound": None}
    far = sum(t.far for t in tally.collectives.values())
    near = sum(t.bytes for t in tally.collectives.values()) - far
    seconds = {
        "compute": tally.flops / aim.chip.flops,
        "memory": tally.bytes / aim.chip.memory,
        "network": max(near / aim.chip.network, far / aim.chip.far),
    }
    return costs | {"seconds": seconds, "bound": max(seconds, key=seconds.get)}
