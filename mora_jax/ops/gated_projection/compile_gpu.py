"""Compiles the Hopper kernels for an H100 on a machine that has none, and tells what the compiler made of them.

    PYTHONPATH=COMPILERS python -m mora_jax.ops.gated_projection.compile_gpu [NAME ...]

prints one JSON line for each kernel and shape of shapes.py, of which NAMEs choose some, as in compile_tpu. COMPILERS is
a folder with jax-cuda12-plugin, jax-cuda12-pjrt (the release of jax) and nvidia-cuda-nvcc-cu12, for development only.
That a kernel compiles says nothing of its speed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from mora_jax.ops.gated_projection import pallas_gpu
from mora_jax.ops.gated_projection.shapes import DECODE_TOKENS, SHAPES, TOP_K, Shape, is_named
from mora_jax.ops.gated_projection.xla import Selection

KERNELS = ("forward", "backward", "decode")
TRAINING = Selection(TOP_K, temperature=0.1, threshold=0.0, threshold_mode="absolute")
INFERENCE = TRAINING._replace(threshold=0.2)
TARGET = Path(__file__).with_name("h100.txtpb")
OPTIONS = {"xla_gpu_autotune_level": 0}  # autotuning would need the device


def rows(names: Sequence[str] = ()) -> Iterator[dict]:
    """Rows as `compile_row` gives them. Switches JAX to the CPU, for there is no GPU to find."""
    jax.config.update("jax_platforms", "cpu")
    for name in SHAPES:
        for kernel in KERNELS:
            if is_named(names, name, kernel, "h100"):
                yield compile_row(name, kernel)


def compile_row(name: str, kernel: str) -> dict:
    """Compiles "forward", "backward" or "decode" for a shape of shapes.py.

    The row says `temporaries` (bytes of device memory beyond arguments and results), `shared_memory` (bytes, the
    largest of its kernels), `registers` (per thread, the largest), `spills` (bytes stored and loaded), `tensor_core`
    (mma and wgmma instructions in the PTX) and `seconds` of compiling; or, where the kernel declines, `unsupported`.
    Only our own kernels are counted.
    """
    row = {"target": "h100", "kernel": kernel, "shape": name}
    function, arguments = _program(kernel, SHAPES[name])
    if reason := pallas_gpu.unsupported(*arguments[:3], None if kernel == "decode" else arguments[3], TRAINING):
        return row | {"unsupported": reason}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile(OPTIONS | {"xla_dump_to": folder})
        seconds = time.perf_counter() - start
        found = _inspect(Path(folder))
    return row | {
        "tokens": arguments[0].shape[0],
        "experts": SHAPES[name].experts,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        **found,
        "seconds": round(seconds, 1),
    }


def _program(kernel: str, size: Shape):
    """The function to compile, and what stands for its arguments on one H100."""
    topology = topologies.get_topology_desc("h100", platform="cuda", target_config=TARGET.read_text(), topology="1x1x1")
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("chip",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shape = partial(jax.ShapeDtypeStruct, sharding=sharding)
    tokens, dtype = DECODE_TOKENS if kernel == "decode" else size.tokens, jnp.dtype(size.dtype)
    widths = size.d_in, size.d_out
    bank = shape((tokens, size.d_in), dtype), *(shape((size.experts, d), jnp.float32) for d in widths)
    fresh = tuple(shape((size.fresh, d), jnp.float32) for d in widths)
    live = shape((), jnp.int32)

    def backward(x, keys, values, fresh_keys, fresh_values, live, dy):
        def project(x, fresh_keys, fresh_values):
            return pallas_gpu.project(x, keys, values, fresh_keys, fresh_values, live, TRAINING)

        return jax.vjp(project, x, fresh_keys, fresh_values)[1](dy)

    if kernel == "backward":
        return backward, (*bank, *fresh, live, shape((tokens, size.d_out), dtype))
    if kernel == "forward":
        return lambda *a: pallas_gpu.project(*a, TRAINING), (*bank, *fresh, live)
    return lambda x, k, v, live: pallas_gpu.decode(x, k, v, None, None, live, INFERENCE), (*bank, live)


def _inspect(folder: Path) -> dict:
    """What the dumped PTX and its assembly say of our kernels, and the launch plan of their shared memory."""
    registers, spills, tensor_core = [], 0, 0
    for path in folder.glob("*.ptx"):
        text = path.read_text()
        if not re.search(r"\.entry \w+_kernel\(", text):
            continue
        said = subprocess.run(
            [_ptxas(), "-v", "-arch=sm_90a", path, "-o", "/dev/null"], capture_output=True, text=True, check=True
        ).stderr
        registers += [int(number) for number in re.findall(r"Used (\d+) registers", said)]
        spills += sum(int(number) for number in re.findall(r"(\d+) bytes spill", said))
        tensor_core += len(re.findall(r"\b(?:wgmma\.mma_async|mma)\.sync", text))
    plans = "\n".join(path.read_text() for path in folder.glob("*thunk_sequence*"))
    shared = re.findall(r"_kernel grid.*shared_memory: (\d+) bytes", plans)
    return {
        "shared_memory": max(map(int, shared)),
        "registers": max(registers),
        "spills": spills,
        "tensor_core": tensor_core,
    }


def _ptxas() -> Path:
    for folder in sys.path:
        path = Path(folder) / "nvidia" / "cuda_nvcc" / "bin" / "ptxas"
        if path.is_file():
            return path
    raise FileNotFoundError("no ptxas: put a folder with nvidia-cuda-nvcc-cu12 on PYTHONPATH")


if __name__ == "__main__":
    for row in rows(sys.argv[1:]):
        print(json.dumps(row), flush=True)
