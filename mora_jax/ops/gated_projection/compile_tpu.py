"""Compiles the TPU kernels for real chips on a machine without any, and tells what the compiler made of them.

    PYTHONPATH=<folder with libtpu> python -m mora_jax.ops.gated_projection.compile_tpu [NAME ...]

prints one JSON line per kernel, shape of shapes.py and target. A NAME is a shape, a kernel, a target, or the three
joined by `:`; without names all but the unfused programs, which take minutes. That a program compiles shows that it is
legal and fits; it shows no speed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from mora_jax.compilers import SETTINGS
from mora_jax.errors import exit_code, unknown
from mora_jax.ops.gated_projection import pallas_tpu
from mora_jax.ops.gated_projection.shapes import DECODE_TOKENS, SHAPES, TOP_K, Shape, is_named
from mora_jax.ops.gated_projection.xla import Selection, gated_projection

TARGETS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}  # a topology each, of which one chip is used
DUMP = "MORA_JAX_TPU_DUMP"  # the folder that a compiling child process lets the compiler write to
HOW = Selection(TOP_K, 0.05, 0.0, "absolute")


def _forward(project, x, keys, values, fresh_keys, fresh_values, live):
    return project(x, keys, values, fresh_keys, fresh_values, live, HOW)


def _backward(project, x, keys, values, fresh_keys, fresh_values, live, dy):
    def of(x, fresh_keys, fresh_values):
        return project(x, keys, values, fresh_keys, fresh_values, live, HOW)

    return jax.vjp(of, x, fresh_keys, fresh_values)[1](dy)


KERNELS = {
    "forward": partial(_forward, pallas_tpu.project),
    "backward": partial(_backward, pallas_tpu.project),
    "decode": partial(_forward, pallas_tpu.decode),
    "unfused_forward": partial(_forward, gated_projection),
    "unfused_backward": partial(_backward, gated_projection),
}
COMPARISONS = ("unfused_forward", "unfused_backward")  # the xla implementation, at the shape `target`, when named


def rows(names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """What the compiler says, one row per kernel, shape and target; `names` as on the command line.

    A row holds target, kernel, shape, tokens, experts, temporaries (bytes of main memory beside arguments and results;
    what the compiler keeps in VMEM between kernels does not count), vmem (bytes of the largest kernel), spills (stores
    of spilled vector registers, loop bodies once), bundles (instructions, likewise) and seconds of compilation; or,
    where the kernel declines, target, kernel, shape and unsupported. Raises MoraError for an unknown name and
    RuntimeError where a compilation fails.
    """
    return list(_from_child(_checked(names or ())))


def _checked(names: Sequence[str]) -> Sequence[str]:
    known = {*SHAPES, *KERNELS, *TARGETS}
    for part in (part for name in names for part in name.split(":")):
        if part not in known:
            raise unknown("shape, kernel or target", part, known)
    return names


def _from_child(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The compiler reads its settings once, when it is loaded: hence a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = os.environ | SETTINGS | {DUMP: folder, "LIBTPU_INIT_ARGS": flags}
        command = [sys.executable, "-m", __spec__.name, *names]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
            for line in child.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {child.returncode}")


def _jobs(names: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    spoken = {part for name in names for part in name.split(":")}
    for shape in SHAPES:
        for kernel in KERNELS:
            if kernel in COMPARISONS and not (shape == "target" and kernel in spoken):
                continue
            for target in TARGETS:
                if is_named(names, shape, kernel, target):
                    yield shape, kernel, target


def _arguments(kernel: str, shape: Shape, sharding) -> list:
    def array(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    dtype = jnp.dtype(shape.dtype)
    tokens = DECODE_TOKENS if kernel == "decode" else shape.tokens
    x, dy = (array(tokens, d, dtype=dtype) for d in (shape.d_in, shape.d_out))
    keys, values = (array(shape.experts, d) for d in (shape.d_in, shape.d_out))
    fresh_keys, fresh_values = (array(shape.fresh, d) for d in (shape.d_in, shape.d_out))
    if kernel == "decode":
        fresh_keys = fresh_values = None
    given = [x, keys, values, fresh_keys, fresh_values, array(dtype=jnp.int32)]
    return [*given, dy] if kernel.endswith("backward") else given


def _row(name: str, kernel: str, target: str, dump: Path) -> dict[str, Any]:
    shape = SHAPES[name]
    row = {"target": target, "kernel": kernel, "shape": name}
    device = topologies.get_topology_desc(platform="tpu", topology_name=TARGETS[target]).devices[0]
    arguments = _arguments(kernel, shape, SingleDeviceSharding(device))
    if kernel not in COMPARISONS and (reason := pallas_tpu.unsupported(*arguments[:4], HOW)):
        return row | {"unsupported": reason}
    start = time.perf_counter()
    compiled = jax.jit(KERNELS[kernel]).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    bundles, spills, vmem = _counts(dump)
    return row | {
        "tokens": arguments[0].shape[0],
        "experts": shape.experts,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "vmem": vmem,
        "spills": spills,
        "bundles": bundles,
        "seconds": round(seconds, 1),
    }


def _counts(dump: Path) -> tuple[int, int, int]:
    """Bundles, spill stores and bytes of VMEM of all programs in the folder, which is emptied."""
    bundles = spills = vmem = 0
    for path in dump.glob("*final_hlo-static-per-bundle-utilization.txt"):
        head, table = path.read_text().split("== UTILIZATION:")
        column = [name.strip() for name in head.strip().splitlines()[1].split(",")].index("VSTORE:SPILL")
        lines = [line.split() for line in table.strip().splitlines()]
        bundles += len(lines)
        spills += sum(int(line[column]) for line in lines)
    for path in dump.glob("*pre-finalize-registers-and-allocations.txt"):
        sizes = re.findall(r"#allocation\d+ \[.*?space=vmem, size = (0x[0-9a-f]+), scoped", path.read_text())
        vmem = max(vmem, sum(int(size, 16) for size in sizes))
    for path in dump.iterdir():
        path.unlink()
    return bundles, spills, vmem


def main(names: Sequence[str]) -> None:
    """Prints the rows for these names."""
    dump = os.environ.get(DUMP)
    found = (_row(*job, Path(dump)) for job in _jobs(names)) if dump else _from_child(_checked(names))
    for row in found:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
