"""Adapters out of a workdir, and from one layout into another. `evaluate` and `generate` read what this writes.

python -m mora_jax.export --workdir=DIR --to=FOLDER [--layout=mora|authors|peft|merged] [--task=N]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mora_jax import config as configs
from mora_jax.errors import MoraError, exit_code
from mora_jax.layouts import LAYOUTS, load_state_dict, open_adapter, save, task_number
from mora_jax.runtime.display import Display

USAGE = f"""\
python -m mora_jax.export --workdir=DIR --to=FOLDER [--layout={"|".join(LAYOUTS)}] [--task=N]
python -m mora_jax.export --adapter=FOLDER --to=FOLDER [--layout=...] [--task=N]
python -m mora_jax.export --state_dict=FILE --config=configs/llm_cl.py[:ARG] --to=FOLDER [--config.KEY=VALUE ...]

--workdir takes the newest intact checkpoint of a finished or running run. --task=N is the state after task N, counted
from 0; without it the last task that has been frozen. --layout=merged adds the experts to the weights, where no gate
depends on the input, and writes the whole model for transformers. --state_dict is a state dict of the published PyTorch
code (.safetensors, or .pt and .bin where PyTorch is installed); --config says its method and its model."""
OPTIONS = ("workdir", "adapter", "state_dict", "to", "layout", "task", "config", "config.KEY")


def run(argv: Sequence[str]) -> None:
    """Everything but the handling of errors."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return
    options, overrides = configs.split(argv, OPTIONS)
    configs.require(options, ("to",), USAGE)
    layout = options.get("layout", "mora")
    if "state_dict" in options:
        configs.require(options, ("config",), USAGE.splitlines()[2])
        if others := {"workdir", "adapter", "task"} & options.keys():
            raise MoraError(f"--state_dict and --{min(others)} exclude each other")
        adapter = load_state_dict(Path(options["state_dict"]), configs.load(options["config"], overrides))
    elif "config" in options:
        raise MoraError("--config is for --state_dict only; a workdir and an adapter bring their own")
    else:
        adapter = open_adapter(options, overrides, task_number(options.get("task")))
    said = save(adapter, Path(options["to"]), layout)
    tasks = ", ".join(adapter.tasks)
    Display().say(
        f"{options['to']} written: layout {layout}, {adapter.experts} experts per site of {tasks}"
        + (said and f"; {said}")
    )


def main() -> int:
    """The exit code: 0 when done, else as `mora_jax.errors` lists them."""
    return exit_code(run, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
