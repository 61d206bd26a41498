"""What does a host need of its memory to load its part of a model that is cut over several hosts?

Command    python experiments/bench_sharded_loading.py [--folder DIR]
Result     experiments/results/bench_sharded_loading.json

The model of `bench_loading.py` (1.24 billion parameters, bfloat16, 2.5 GB) is loaded onto a mesh of 4 devices with
fsdp = 4, by one process and by two with 2 devices each. The devices are CPUs, so what they hold counts too. Memory is
the highest resident set of a process (VmHWM, mapped pages too) over that before loading.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from bench_loading import COMMON, ROOT, checkpoint

from mora_jax.runtime.results import device, versions
from mora_jax.runtime.writers import write_json

DEVICES = 4
LOAD = (
    COMMON
    + """
from mora_jax.runtime import distributed, hosts
hosts.start(hosts.from_options(dict(word.removeprefix("--").split("=", 1) for word in sys.argv[2:])))
import jax
import ml_dtypes
from mora_jax.models import hf
config = hf.load_config(folder)
mesh = distributed.make_mesh({"data": 1, "fsdp": -1, "model": 1})
hosts.wait()
before, started = memory(), time.perf_counter()
params = distributed.place(mesh, hf.open_params(folder, config, ml_dtypes.bfloat16))
jax.block_until_ready(params)
seconds, peak = time.perf_counter() - started, memory() - before
held = sum(piece.data.nbytes for leaf in jax.tree.leaves(params) for piece in leaf.addressable_shards)
hosts.wait()
print(json.dumps({"seconds": round(seconds, 3), "peak_bytes": peak, "held_bytes": held}))
"""
)


def load(folder: Path, processes: int) -> list[dict]:
    """What each of so many processes reports."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", LOAD, str(folder), f"--coordinator={place}", f"--processes={processes}"]
    started = [
        subprocess.Popen(
            [*command, f"--process={number}"],
            cwd=ROOT,
            env=os.environ | flags,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    told = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a process failed")
    return [json.loads(text.splitlines()[-1]) for text in told]


def main() -> None:
    """Measures, prints and writes the result file."""
    with checkpoint(__doc__.splitlines()[0]) as (folder, size):
        found = {f"{n} process{'es' if n > 1 else ''}": load(folder, n) for n in (1, 2)}
    worst = {name: max(row["peak_bytes"] / row["held_bytes"] for row in rows) for name, rows in found.items()}
    result = {
        "what": __doc__.splitlines()[0],
        "command": "python experiments/bench_sharded_loading.py",
        "device": device(),
        "versions": versions(),
        "checkpoint_bytes": size,
        "devices": DEVICES,
        "peak_over_held": {name: round(ratio, 3) for name, ratio in worst.items()},
        "runs": found,
    }
    print(json.dumps(result["peak_over_held"]))
    write_json(ROOT / "experiments" / "results" / "bench_sharded_loading.json", result)


if __name__ == "__main__":
    main()
