"""Several real processes as one run, started and listened to; shared by the tests of that."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence

from conftest import ROOT
from interruptions import ended
from launching import Ended

# What the transport of CPU collectives says of itself on stdout: piece by piece and from several threads, so that one
# line may hold the pieces of two, or none.
GLOO = re.compile(
    r"(\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : |\d+)*"
)


def address() -> str:
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(command: Sequence[str], environment: Mapping[str, str], devices: int = 1) -> subprocess.Popen[str]:
    """One process with so many fake devices, compiled without optimisation, which takes half as long."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environment, "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def all_ended(processes: Sequence[subprocess.Popen[str]]) -> list[Ended]:
    try:
        return [ended(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def of_pair(number: int, place: str) -> list[str]:
    return [f"--coordinator={place}", "--processes=2", f"--process={number}"]


def said(run: Ended) -> list[str]:
    return [line for line in run.out.splitlines() if not GLOO.fullmatch(line)]
