"""Does a config fit a TPU or GPU topology, what does it cost? Its real steps are compiled without the hardware.

    python -m mora_jax.plan --config=configs/llm_cl.py[:ARG] --topology=v5e:4x4 [--config.KEY=VALUE ...] [--json]

FLOPs, bytes and collectives are those of the compiled program, with the kernel that config.kernel means on the target;
of a kernel's inside the FLOPs are those that it states itself. Seconds are lower bounds from the vendor's peak figures,
never measurements.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from mora_jax import config as configs
from mora_jax.errors import MoraError, exit_code
from mora_jax.planning import report, topologies
from mora_jax.runtime.display import Display

USAGE = """\
python -m mora_jax.plan --config=configs/llm_cl.py[:ARG] --topology=NAME [--config.KEY=VALUE ...] [--tasks=N] [--json]

NAME is v5e:4x4, v5p:2x2x2, h100:8, h100:4x8 and the like; an unknown one lists them all. The bank is as large as
while the last of N tasks is taught (without --tasks: of the config's stream). The batch is the longest one: as many
tokens as the task with the largest limits may have, or as train.max_prompt_tokens and train.max_answer_tokens say; for
limits that lie with data that is not here 1024 + 512. --json prints one JSON object instead of tables.

The compilers of TPU and GPU are development extras that `bash launch.sh test` puts in .venv/compilers."""
NOISE = ("absl::InitializeLog", "cudart_stub")  # the compilers on the accelerator that is not there
CHILD = "MORA_JAX_PLAN_CHILD"  # set in the process that has the compilers


class Asked(NamedTuple):
    """A command line that was understood."""

    config: Any
    aim: topologies.Target
    tasks: int
    as_json: bool


def understand(argv: Sequence[str]) -> Asked:
    """Reads the command line. Raises MoraError for what cannot be planned on any machine."""
    known = ("config", "topology", "tasks", "config.KEY")
    options, overrides = configs.split(argv, known, flags=("json",))
    configs.require(options, ("config", "topology"), USAGE)
    aim = topologies.target(options["topology"])
    config = configs.load(options["config"], overrides)
    tasks = options.get("tasks")
    if tasks is not None and not (tasks.isdecimal() and int(tasks)):
        raise MoraError(f"--tasks={tasks} must be a whole number of at least 1")
    return Asked(config, aim, int(tasks) if tasks else report.count_tasks(config), "json" in options)


def run(argv: Sequence[str]) -> None:
    """Everything but the handling of errors."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return
    asked = understand(argv)
    if CHILD not in os.environ:
        in_child(argv)
        return
    plan = report.make_plan(asked.config, asked.aim, topologies.devices_of(asked.aim), asked.tasks)
    if asked.as_json:
        print(json.dumps(plan))
    else:
        report.show(plan, Display())


def in_child(argv: Sequence[str]) -> None:
    """The same command where the compilers can be imported: their presence alone makes JAX look for a TPU and a GPU.

    Raises MoraError without the compilers, and SystemExit with the child's code where it fails; it has said why.
    """
    environment = topologies.environment() | {CHILD: "1"}
    command = [sys.executable, "-m", "mora_jax.plan", *argv]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as child:
        for line in child.stderr:
            if not any(words in line for words in NOISE):
                sys.stderr.write(line)
    if child.returncode:
        raise SystemExit(child.returncode)


def main() -> int:
    """The exit code: 0 when planned, whether it fits or not, else as `mora_jax.errors` lists them."""
    return exit_code(run, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
