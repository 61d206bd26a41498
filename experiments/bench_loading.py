"""What does loading a model from safetensors cost, in memory and against reading the file?

Command    python experiments/bench_loading.py [--folder DIR]
Result     experiments/results/bench_loading.json

A random model of Llama-3.2-1B's sizes (1.24 billion parameters, bfloat16, 2.5 GB) is written once. A process of its own
then reads the files from one end to the other, and another one loads the model; both three times, in turns, first from
the disk (the page cache is told to drop the files) and then from the page cache. A third one only fills as much new
memory: that part of loading is the machine's. Memory is the highest resident set (VmHWM, mapped pages too) over that
before loading.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mora_jax.runtime.results import device, versions
from mora_jax.runtime.writers import write_json

ROOT = Path(__file__).resolve().parent.parent
TURNS = 3

WRITE = """
import numpy as np, sys
from pathlib import Path
from flax.traverse_util import unflatten_dict
from mora_jax.models import families, hf
from mora_jax.models.keytable import param_shape, rows
import ml_dtypes
sizes = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=128256, hidden_size=2048,
    intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
    rope_theta=500000.0, rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=131072)
config = families.from_hf(sizes, Path("config.json"))
rng = np.random.default_rng(0)
flat = {r.ours: rng.standard_normal(param_shape(r, config), dtype=np.float32).astype(ml_dtypes.bfloat16)
        for r in rows(config)}
hf.save_params(unflatten_dict(flat, sep="/"), config, Path(sys.argv[1]))
"""
COMMON = """
import sys, time, json
from pathlib import Path
def memory():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
folder = Path(sys.argv[1])
"""
READ = (
    COMMON
    + """
buffer = bytearray(1 << 24)
started = time.perf_counter()
for path in folder.glob("*.safetensors"):
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
print(json.dumps({"seconds": time.perf_counter() - started}))
"""
)
FILL = (
    COMMON
    + """
import numpy as np
sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
started = time.perf_counter()
kept = [np.full(1 << 24, 1, np.uint8) for size in sizes for _ in range(0, size, 1 << 24)]
print(json.dumps({"seconds": time.perf_counter() - started}))
"""
)
LOAD = (
    COMMON
    + """
from mora_jax.models import hf
import ml_dtypes
config = hf.load_config(folder)
before, started = memory(), time.perf_counter()
params = hf.load_params(folder, config, ml_dtypes.bfloat16)
print(json.dumps({"seconds": time.perf_counter() - started, "bytes": memory() - before}))
"""
)


def run(program: str, folder: Path) -> dict:
    """What a program printed last."""
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}


def forget(folder: Path) -> None:
    """Drops the files from the page cache."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # only what is on the disk can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def checkpoint(what: str) -> Iterator[tuple[Path, int]]:
    """(a folder with the model, bytes of its weights): that of --folder, or a temporary one; written if it is empty."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--folder", type=Path, help="where the model is kept (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not list(folder.glob("*.safetensors")):
            folder.mkdir(parents=True, exist_ok=True)
            run(WRITE, folder)
        yield folder, sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    """Measures, prints and writes the result file."""
    with checkpoint(__doc__.splitlines()[0]) as (folder, size):
        turns = []
        for _ in range(TURNS):
            turn = {}
            for name, program in (("read_from_disk", READ), ("load_from_disk", LOAD)):
                forget(folder)
                turn[name] = run(program, folder)
            turns.append(turn | {"read": run(READ, folder), "load": run(LOAD, folder), "fill": run(FILL, folder)})
    seconds = {name: statistics.median(turn[name]["seconds"] for turn in turns) for name in turns[0]}
    result = {
        "what": __doc__.splitlines()[0],
        "command": " ".join(["python", "experiments/bench_loading.py"]),
        "device": device(),
        "versions": versions(),
        "checkpoint_bytes": size,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "load_over_read": round(seconds["load"] / seconds["read"], 2),
        "load_over_read_from_disk": round(seconds["load_from_disk"] / seconds["read_from_disk"], 2),
        "peak_memory_over_checkpoint": round(max(turn["load"]["bytes"] for turn in turns) / size, 3),
        "turns": turns,
    }
    print(json.dumps({key: result[key] for key in result if "over" in key or "seconds" in key}))
    write_json(ROOT / "experiments" / "results" / "bench_loading.json", result)


if __name__ == "__main__":
    main()
