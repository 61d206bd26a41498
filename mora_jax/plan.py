"""Does a config fit a TPU or GPU topology, what does it cost? Its real steps are compiled without the hardware.

    python -m mora_jax.plan --config=configs/llm_cl.py[:ARG] --topology=v5e:4x4 [--config.KEY=VALUE ...] [--json]

FLOPs, bytes and collectives are those of the compiled program. Seconds are lower bounds from the vendor's peak figures,
never measurements.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mora_jax import config as configs
from mora_jax.errors import MoraError, exit_code
from mora_jax.planning import report, topologies
from mora_jax.runtime.display import Display

USAGE = """\
python -m mora_jax.plan --config=configs/llm_cl.py[:ARG] --topology=NAME [--config.KEY=VALUE ...] [--tasks=N] [--json]

NAME is v5e:4x4, v5p:2x2x2, h100:8, h100:4x8 and the like; an unknown one lists them all. The bank is as large as
while the last of N tasks is taught (without --tasks: of the config's stream). The batch is the longest one: without
train.max_prompt_tokens and train.max_answer_tokens, 1024 + 512 tokens. --json prints one JSON object instead of tables.

The compilers of TPU and GPU are development extras that `bash launch.sh test` puts in .venv/compilers."""
COMPILERS = Path(sys.prefix) / "compilers"
CHILD = "MORA_JAX_PLAN_CHILD"  # set in the process that has the compilers


def _tasks(options: dict[str, str], config) -> int:
    if "tasks" not in options:
        return report.count_tasks(config)
    if not options["tasks"].isdigit() or int(options["tasks"]) < 1:
        raise MoraError(f"--tasks={options['tasks']} must be a whole number of at least 1")
    return int(options["tasks"])


def run(argv: Sequence[str]) -> None:
    """Everything but the handling of errors."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return
    known = ("config", "topology", "tasks", "config.KEY")
    options, overrides = configs.split(argv, known, flags=("json",))
    configs.require(options, ("config", "topology"), USAGE)
    aim = topologies.target(options["topology"])
    config = configs.load(options["config"], overrides)
    plan = report.make_plan(config, aim, topologies.devices_of(aim), _tasks(options, config))
    if "json" in options:
        print(json.dumps(plan))
        return
    report.show(plan, Display())


def _in_child(argv: Sequence[str]) -> int:
    """The same command where the compilers can be imported: their presence alone makes JAX look for a TPU and a GPU."""
    if not COMPILERS.is_dir():
        print(f"error: {COMPILERS} is missing; `bash launch.sh test` installs the compilers into it", file=sys.stderr)
        return 2
    environment = topologies.environment(COMPILERS) | {CHILD: "1"}
    command = [sys.executable, "-m", "mora_jax.plan", *argv]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as child:
        for line in child.stderr:
            if not _noise(line):
                sys.stderr.write(line)
    return child.returncode


def _noise(line: str) -> bool:
    """What the compilers say about the accelerator that is not there."""
    return "absl::InitializeLog" in line or "cudart_stub" in line


def main() -> int:
    """The exit code: 0 when planned, whether it fits or not; 2 after an error that was told in one line."""
    return exit_code(run, sys.argv[1:]) if CHILD in os.environ else _in_child(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
