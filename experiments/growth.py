"""What a step needs as the bank grows, as pod and batch grow, and where it fits: from compiled programs.

Command    python experiments/growth.py [--only SUBSTRING]
Result     experiments/results/growth.json and growth.png
Needs      the compilers that `bash launch.sh test` installs, and matplotlib (requirements-dev.txt)

Each point says what it comes from. `compiled` for a topology: all its numbers are those of the program that the
topology's own compiler made. `shapes`: bytes of weights, bank, fresh experts and optimiser are summed over shapes and
shardings, which is exact but for padding; FLOPs are those of the same step compiled for one CPU device, divided by the
devices of the topology (checked against the points that are compiled); nothing is known of temporaries. Nothing here is
a measured time. A point that is in the result file is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from mora_jax import config as configs
from mora_jax.planning import topologies
from mora_jax.planning.abstract import Work, bytes_of
from mora_jax.planning.compiled import examine
from mora_jax.runtime.distributed import make_mesh
from mora_jax.runtime.results import versions
from mora_jax.runtime.writers import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "experiments" / "results" / "growth.json"
TASKS, RANKS = (1, 15, 50, 100), (8, 16)
COLORS = ("#1b6ca8", "#c8553d")
# Two rows of 1024 + 512 tokens on each chip; bank rows are not rounded up, so that the curve is the method's own.
COMMON = {
    "model.name": "llama2-7b",
    "model.dtype": "bfloat16",
    "model.remat": "full",
    "mesh.data": "1",
    "mesh.fsdp": "-1",
    "method.capacity_bucket": "8",
    "train.max_prompt_tokens": "1024",
    "train.max_answer_tokens": "512",
}
# Curves over tasks go without the kernel: FLOPs compiled for a CPU and for a TPU are then those of the same products.
CURVE = COMMON | {"kernel": "xla"}
PODS = {"llama2-7b": ("v5e:4x4", 32), "llama3-70b": ("v5p:4x4x4", 128)}
# Llama-2-7B with the 64 experts per site of eight tasks. A name begins with the topology; `decode` ends that of a batch
# of answers.
ROW = {"train.batch_size": "1", "eval.batch_size": "1"}
ROWS_32 = {"train.batch_size": "32", "eval.batch_size": "32"}
PLANS = {
    **{f"v5e:1x1 {name}": ROW | {"model.quantise": name} for name in ("none", "nf4", "int8")},
    "v5e:1x1 int8 decode": ROW | {"model.quantise": "int8"},
    "v5p:2x2x2": ROWS_32,
    "h100:4x8": ROWS_32,
    **{
        f"h100:8 {method} {step}": ROWS_32 | {"method.name": method}
        for method in ("mora", "inc_lora")
        for step in ("train", "decode")
    },
    "v5p:8x8x8": {"train.batch_size": "512", "mesh.data": "8"},
}
CHIPS = {"v5e:4x4": 16, "v5e:8x8": 64, "v5e:16x16": 256}


def points() -> dict[str, dict[str, Any]]:
    """Every point by name: kind, topology, tasks, overrides. Those compiled for a pod come last: they take minutes."""
    found = {}
    for model, (pod, batch) in PODS.items():
        for rank in RANKS:
            for tasks in TASKS:
                own = {"model.name": model, "method.rank": str(rank), "train.batch_size": str(batch)}
                point = {"model": model, "rank": rank, "tasks": tasks, "topology": pod, "overrides": CURVE | own}
                found[f"growth {model} r{rank} {tasks} tasks"] = point | {"kind": "shapes"}
                if (rank, tasks) == (8, 100):
                    found[f"compiled {model} r{rank} {tasks} tasks"] = point | {"kind": "compiled"}
    for pod, chips in CHIPS.items():
        size = {"mesh.data": str(chips // 16), "mesh.fsdp": "16", "train.batch_size": str(2 * chips)}
        overrides = COMMON | size | {"method.rank": "8"}
        point = {"model": "llama2-7b", "rank": 8, "tasks": 15, "topology": pod, "overrides": overrides}
        found[f"weak {chips} chips"] = point | {"kind": "compiled"}
    for pod, overrides in PLANS.items():
        point = {"model": "llama2-7b", "rank": 8, "tasks": 8, "topology": pod.partition(" ")[0]}
        step = "decode" if pod.endswith("decode") else "train"
        found[f"plan {pod}"] = point | {"overrides": COMMON | overrides, "kind": "compiled", "step": step}
    return dict(sorted(found.items(), key=lambda pair: pair[1]["kind"] == "compiled"))


def make(point: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one point, of one device and one train or decode step. Needs the compilers' environment."""
    config = configs.load(f"{ROOT}/configs/llm_cl.py:benchmark=trace", point["overrides"])
    aim = topologies.target(point["topology"])
    work = Work(config, make_mesh(config.mesh, topologies.devices_of(aim)), point["tasks"])
    step = work.steps()[point.get("step", "train")]
    found = {"experts_per_site": work.capacity, "devices": aim.devices}
    if point["kind"] == "compiled":
        return found | examine(step, aim)
    held = {name: bytes_of(tree)[0] for name, tree in step.groups.items()}
    with config.unlocked():
        config.mesh.update({"data": 1, "fsdp": 1})
    cpu = jax.devices("cpu")[:1]
    whole = examine(Work(config, make_mesh(config.mesh, cpu), point["tasks"]).train(), topologies.here(cpu))
    return found | {"bytes": held, "flops": whole["flops"] / aim.devices}


def plot(made: dict[str, Any], path: Path) -> None:
    """Bytes of the bank and FLOPs of a step against the tasks, a column for each model."""
    figure = Figure(figsize=(8.4, 5.6), layout="constrained")
    axes = figure.subplots(2, len(PODS), sharex=True, squeeze=False)
    for column, (model, (pod, _)) in enumerate(PODS.items()):
        top, bottom = axes[0][column], axes[1][column]
        for rank, color in zip(RANKS, COLORS, strict=True):
            line = [made[f"growth {model} r{rank} {tasks} tasks"] for tasks in TASKS]
            top.plot(TASKS, [p["bytes"]["bank"] / 2**30 for p in line], "o-", color=color, label=f"bank, r = {rank}")
            bottom.plot(TASKS, [p["flops"] / 1e12 for p in line], "o-", color=color, label=f"r = {rank}")
        frozen = line[0]["bytes"]["frozen"] / 2**30
        top.axhline(frozen, color="#7a7a7a", ls="--", lw=1, label="frozen weights")
        known = [p for name, p in made.items() if name.startswith(f"compiled {model} ")]
        if known:
            flops = [p["flops"] / 1e12 for p in known]
            bottom.plot([p["tasks"] for p in known], flops, "x", color="k", label=f"by {pod}'s compiler")
        top.set_title(f"{model}, one chip of {pod}", fontsize=10, loc="left")
        bottom.set_xlabel("tasks in the bank")
        bottom.set_ylim(0, 1.1 * line[-1]["flops"] / 1e12)
        for part in (top, bottom):
            part.grid(alpha=0.3)
            part.legend(fontsize=8)
    axes[0][0].set_ylabel("GiB")
    axes[1][0].set_ylabel("TFLOP of a train step")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Makes the points that are not there yet, one process each, and draws them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="of a point's name")
    parser.add_argument("--point", help="for a child process: makes this one and prints it")
    options = parser.parse_args()
    if options.point:
        print(json.dumps(make(points()[options.point])))
        return
    environment = topologies.environment()
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"points": {}}
    result |= {"what": __doc__.splitlines()[0], "command": "python experiments/growth.py", "versions": versions()}
    for name, point in points().items():
        if name in result["points"] or options.only not in name:
            continue
        command = [sys.executable, os.path.abspath(__file__), f"--point={name}"]
        child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        result["points"][name] = point | json.loads(child.stdout)
        print(name, flush=True)
        write_json(RESULT, result)
    if all(name in result["points"] for name, point in points().items() if point["kind"] == "shapes"):
        plot(result["points"], RESULT.with_suffix(".png"))


if __name__ == "__main__":
    main()
