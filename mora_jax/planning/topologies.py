"""Names of TPU and GPU topologies: what their chips can do, and devices to compile for without having them.

Figures are peaks that vendors publish, per chip. TPU: cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e ("Key chip
specifications"; ICI is given there in both directions together or in Gbps, here it is bytes per second in one).
H100: the SXM column of NVIDIA's H100 data sheet, without sparsity; NVLink 900 GB/s is both directions together, and a
DGX H100 has one 400 Gbps adapter for each GPU.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from mora_jax import compilers
from mora_jax.errors import MoraError
from mora_jax.ops import gated_projection

# What XLA must know of the card (`stream_executor.GpuTargetConfigProto`); the kernels are compiled for the same one.
H100 = Path(gated_projection.__file__).with_name("h100.txtpb")
QUIET = {"TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"}
GPU_FLAGS = "--xla_gpu_autotune_level=0"  # there is no GPU to tune on
GPUS_PER_HOST = 8
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")


@dataclass(frozen=True)
class Chip:
    """One device.

    hbm: bytes. usable: the part of it that a program may fill. flops: bf16 per second. memory, network: bytes per
    second, the latter in one direction over all links; far: the same between hosts, where that is another network.
    kind: a regex on what JAX calls the device.
    """

    name: str
    hbm: int
    usable: float
    flops: float
    memory: float
    network: float
    far: float
    kind: str
    shapes: tuple[str, ...] = ()


_GIB = 1 << 30
# usable: TPU as its compiler says ("exceeds available HBM (15.75G)" for 16); GPU: the share that JAX takes at the start
# (XLA_PYTHON_CLIENT_MEM_FRACTION, 0.75 unless set).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * _GIB, 1 - 1 / 64, 275e12, 1228e9, 300e9, 300e9, r"TPU v4", _DEEP),
        Chip("v5e", 16 * _GIB, 1 - 1 / 64, 197e12, 819e9, 200e9, 200e9, r"TPU v5 lite|TPU v5e", _FLAT),
        Chip("v5p", 95 * _GIB, 1 - 1 / 64, 459e12, 2765e9, 600e9, 600e9, r"TPU v5p?", (*_DEEP, "8x8x16")),
        Chip("v6e", 32 * _GIB, 1 - 1 / 64, 918e12, 1640e9, 400e9, 400e9, r"TPU v6 lite|TPU v6e", _FLAT),
        Chip("h100", 84_978_434_048, 0.75, 989.4e12, 3352e9, 450e9, 50e9, r"NVIDIA H100 80GB.*"),
    )
}


@dataclass(frozen=True)
class Target:
    """A topology by name; `per_host` devices share the fast network.

    chip: None where the device is in no table. limit: bytes of a device that a program may fill, where it tells itself.
    """

    name: str
    chip: Chip | None
    devices: int
    per_host: int
    platform: str
    limit: float | None = None

    @property
    def available(self) -> float | None:
        """Bytes of a device that a program may fill; None where nobody knows."""
        return self.limit or (self.chip and self.chip.hbm * self.chip.usable)


def known() -> str:
    """Every name there is, in words."""
    tpus = [f"{chip.name}:{shape}" for chip in CHIPS.values() for shape in chip.shapes]
    return ", ".join([*tpus, f"h100:GPUS (1 to {GPUS_PER_HOST} on one host), h100:HOSTSxGPUS (such as h100:4x8)"])


def target(name: str) -> Target:
    """What a name stands for. Raises MoraError, listing the known names."""
    chip_name, _, shape = name.partition(":")
    chip = CHIPS.get(chip_name)
    sizes = [int(n) for n in shape.split("x")] if re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", shape) else []
    if chip and shape in chip.shapes:
        return Target(name, chip, math.prod(sizes), math.prod(sizes), "tpu")
    if chip_name == "h100" and len(sizes) in (1, 2) and sizes[-1] <= GPUS_PER_HOST:
        return Target(name, chip, math.prod(sizes), sizes[-1], "cuda")
    raise MoraError(f"--topology={name} is unknown; known: {known()}")


def here(devices: list[Any]) -> Target:
    """The machine that this process runs on: its memory as it says itself, times only where its chip is in the table.

    Devices of a CPU, of which there are several only where someone asked for them, share its memory evenly.
    """
    kind = devices[0].device_kind
    chip = next((chip for chip in CHIPS.values() if re.fullmatch(chip.kind, kind)), None)
    platform = devices[0].platform
    local = len(devices) if platform == "tpu" else sum(d.process_index == devices[0].process_index for d in devices)
    limit = _memory() / local if platform == "cpu" else _limit(devices)
    return Target(f"{len(devices)} x {kind}", chip, len(devices), local, platform, limit)


def _memory() -> int:
    """Bytes of main memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _limit(devices: list[Any]) -> float | None:
    """Bytes that JAX may take of a device; only those of this process can be asked, and not all of these know."""
    own = next(device for device in devices if device.process_index == jax.process_index())
    return (own.memory_stats() or {}).get("bytes_limit")


def devices_of(aim: Target) -> list[Any]:
    """Devices to compile for. Needs the compilers on the path and `environment`; MoraError where one is missing."""
    try:
        if aim.platform == "cuda":
            layout = f"1x{aim.devices // aim.per_host}x{aim.per_host}"  # partitions, hosts, devices of a host
            found = topologies.get_topology_desc(
                "h100", platform="cuda", target_config=H100.read_text(), topology=layout
            )
        else:
            options = {"chips_per_host_bounds": [1, 1, 1]} if aim.devices == 1 else {}
            options |= {"chip_config_name": "megacore"} if aim.chip.name == "v4" else {}  # a chip is one device
            found = topologies.get_topology_desc(platform="tpu", topology_name=aim.name, **options)
    except (RuntimeError, ValueError, NotImplementedError) as problem:
        raise MoraError(f"--topology={aim.name} cannot be compiled for here: {problem}") from problem
    if len(found.devices) != aim.devices:
        raise MoraError(f"--topology={aim.name}: the compiler knows {len(found.devices)} devices, not {aim.devices}")
    return list(found.devices)


def environment() -> dict[str, str]:
    """The environment of a process that compiles for any of them. Raises MoraError where the compilers are missing."""
    flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), GPU_FLAGS)))
    return compilers.environment() | QUIET | {"XLA_FLAGS": flags}
