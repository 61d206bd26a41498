"""Compiles the Hopper kernels for an H100 on a machine that has none, and tells what the compiler made of them.

    PYTHONPATH=COMPILERS python -m mora_jax.ops.gated_projection.compile_gpu

prints one JSON line for each kernel and shape. COMPILERS is a folder with jax-cuda12-plugin, jax-cuda12-pjrt (the
release of jax) and nvidia-cuda-nvcc-cu12, for development only. That a kernel compiles says nothing of its speed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from mora_jax.ops.gated_projection import pallas_gpu
from mora_jax.ops.gated_projection.xla import Selection

SHAPES = ((768, 768), (768, 3072), (576, 576), (2048, 2048), (4096, 4096))  # (d_in, d_out)
EXPERTS = (16, 128, 1024)
TOKENS = {"forward": 16384, "backward": 16384, "decode": 8}
FRESH = 16  # rows that train; decode has none
TRAINING = Selection(top_k=8, temperature=0.1, threshold=0.0, threshold_mode="absolute")
INFERENCE = TRAINING._replace(threshold=0.2)
TARGET = Path(__file__).with_name("h100.txtpb")
OPTIONS = {"xla_gpu_autotune_level": 0}  # autotuning would need the device


def rows() -> list[dict]:
    """One row per kernel and shape; see `compile_row`. Switches JAX to the CPU, for there is no GPU to find."""
    return list(_rows())


def _rows() -> Iterator[dict]:
    jax.config.update("jax_platforms", "cpu")
    for dtype in (jnp.bfloat16, jnp.float32):
        for d_in, d_out in SHAPES:
            for experts in EXPERTS:
                for kernel in TOKENS:
                    yield compile_row(kernel, d_in, d_out, experts, TOKENS[kernel], dtype)


def compile_row(kernel: str, d_in: int, d_out: int, experts: int, tokens: int, dtype) -> dict:
    """Compiles "forward", "backward" or "decode" for tokens of a dtype and float32 experts.

    The row says `temporaries` (bytes of device memory beyond arguments and results), `shared_memory` (bytes, the
    largest of its kernels), `registers` (per thread, the largest), `spills` (bytes stored and loaded), `tensor_core`
    (mma and wgmma instructions in the PTX) and `seconds` of compiling. Only our own kernels are counted.
    """
    function, arguments = _program(kernel, d_in, d_out, experts, tokens, dtype)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile(OPTIONS | {"xla_dump_to": folder})
        seconds = time.perf_counter() - start
        found = _inspect(Path(folder))
    return {
        "target": "h100",
        "kernel": kernel,
        "shape": [d_in, d_out],
        "dtype": jnp.dtype(dtype).name,
        "tokens": tokens,
        "experts": experts,
        "fresh": 0 if kernel == "decode" else FRESH,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        **found,
        "seconds": round(seconds, 1),
    }


def _program(kernel: str, d_in: int, d_out: int, experts: int, tokens: int, dtype):
    """The function to compile, and what stands for its arguments on one H100."""
    topology = topologies.get_topology_desc("h100", platform="cuda", target_config=TARGET.read_text(), topology="1x1x1")
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("chip",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shape = partial(jax.ShapeDtypeStruct, sharding=sharding)
    bank = shape((tokens, d_in), dtype), shape((experts, d_in), jnp.float32), shape((experts, d_out), jnp.float32)
    fresh = shape((FRESH, d_in), jnp.float32), shape((FRESH, d_out), jnp.float32)
    live = shape((), jnp.int32)

    def backward(x, keys, values, fresh_keys, fresh_values, live, dy):
        def project(x, fresh_keys, fresh_values):
            return pallas_gpu.project(x, keys, values, fresh_keys, fresh_values, live, TRAINING)

        return jax.vjp(project, x, fresh_keys, fresh_values)[1](dy)

    if kernel == "backward":
        return backward, (*bank, *fresh, live, shape((tokens, d_out), dtype))
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
    for row in _rows():
        print(json.dumps(row), flush=True)
