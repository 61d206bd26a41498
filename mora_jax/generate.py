"""A prompt in, the model's answer out, and which experts gave it.

python -m mora_jax.generate --workdir=DIR --prompt="..."
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mora_jax import config as configs
from mora_jax import experiment
from mora_jax.adapter import Adapter
from mora_jax.benchmarks.stream import Example, Task
from mora_jax.errors import MoraError, exit_code
from mora_jax.layouts import open_adapter, task_number
from mora_jax.runtime.family import GateCounts
from mora_jax.runtime.generate import gate_counts

USAGE = """\
python -m mora_jax.generate --workdir=DIR --prompt="..." [--task=N] [--config.KEY=VALUE ...]
python -m mora_jax.generate --adapter=FOLDER < prompts.txt

Without --prompt every line of the standard input is a prompt and every line of the standard output its answer, both
with \\n for a line break. Which experts answered goes to the standard error. --task=N asks the experts as they stood
after task N, counted from 0; -1 is the frozen model. --config.eval.max_new_tokens and --config.train.max_prompt_tokens
limit the tokens."""
OPTIONS = ("workdir", "adapter", "task", "prompt", "config.KEY")


def prompts_of(options: dict[str, str]) -> list[str]:
    """What to answer. Raises MoraError if there is nothing."""
    try:
        if "prompt" in options:
            options["prompt"].encode()  # what the shell passed on was perhaps not UTF-8
            return [options["prompt"]]
        lines = sys.stdin.read().split("\n")
    except UnicodeError as problem:
        raise MoraError(f"the prompt is not UTF-8 text: {problem.reason} at {problem.start}") from None
    if not any(lines):
        raise MoraError('there is no prompt; give --prompt="..." or one prompt a line on the standard input')
    return [line.replace("\\n", "\n") for line in lines if line]


def shares_by_task(adapter: Adapter, found: GateCounts) -> dict[str, float]:
    """The share of gate mass that the experts of each task took; tasks that trained the same rows stand together."""
    names: dict[tuple[int, int], list[str]] = {}
    for i, name in enumerate(adapter.tasks):
        names.setdefault(adapter.span(i), []).append(name)
    total = sum(found.mass) or 1.0  # no expert at all: every share is 0
    rank = adapter.method.rank  # the gates were summed over as many experts
    return {"+".join(who): sum(found.mass[i // rank : j // rank]) / total for (i, j), who in names.items()}


def describe(adapter: Adapter, found: GateCounts) -> str:
    """One line for one answer."""
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares_by_task(adapter, found).items())
    return (
        f"gate mass: {shares}; {found.active / found.pairs:.2f} of {adapter.experts} experts active per token and "
        f"site, {100 * found.none / found.pairs:.2f} % of them without any"
    )


def run(argv: Sequence[str]) -> None:
    """Everything but the handling of errors."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return
    options, overrides = configs.split(argv, OPTIONS)
    adapter = open_adapter(options, overrides, task_number(options.get("task")))
    prompts = prompts_of(options)
    experiment.keep_compiled()
    method, config = adapter.method, adapter.config
    with config.unlocked():  # a batch is padded to its size, so one prompt should not be a batch of many
        config.eval.batch_size = min(config.eval.batch_size, len(prompts))
    asked = Task(name="prompts", metric="exact_match", splits={})  # its limits are the config's
    mesh, family, sites = experiment.load_family(config, method, [asked])
    variables = {"params": family.params} | adapter.variables(mesh, sites, family.identity)
    answers = family.predict(variables, asked, [Example(prompt, "") for prompt in prompts], lambda n: None)
    for text, tokens in zip(answers.texts, answers.tokens, strict=True):
        print(text if "prompt" in options else text.replace("\n", "\\n"), flush=True)
        if not adapter.tasks:
            note = "no experts: this is the frozen model"
        elif not tokens:
            note = "no token was read or written, so no expert was asked"
        elif not method.has_gates:
            note = f"method {config.method.name} has no gates: all {adapter.experts} experts answer every token"
        else:
            note = describe(adapter, gate_counts(family.decoder, variables, tokens))
        print(note, file=sys.stderr, flush=True)
    if answers.truncated:
        cut = f"{answers.truncated} prompt(s) lost their left end; see --config.train.max_prompt_tokens"
        print(cut, file=sys.stderr)


def main() -> int:
    """The exit code: 0 when done, else as `mora_jax.errors` lists them."""
    return exit_code(run, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
