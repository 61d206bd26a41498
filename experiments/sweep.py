"""Gives every method its own learning rate, chosen on held-out data, then compares the methods on the test split.

Command    python experiments/sweep.py --name trace4 --methods mora,inc_lora,seq_lora --learning-rates 1e-3,2e-3,4e-3 \\
               --choose-on FOMC,NumGLUE-cm -- --config=configs/llm_cl.py:benchmark=folder \\
               --config.benchmark.root=DIR --config.benchmark.tasks=FOMC,NumGLUE-cm,NumGLUE-ds,Py150
Result     experiments/results/NAME.json: every run's R, summary, command and versions, and which rate was chosen

An untuned baseline proves nothing. The choice looks only at the `eval` split and only at the first tasks of the stream
(--choose-on); it takes the rate with the best overall performance, the smaller one where two are equal. What stands
after `--` goes to every run. Interrupted sweeps continue: a finished run in --runs is not done again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from mora_jax.runtime.writers import write_json

ROOT = Path(__file__).resolve().parent.parent
# Of results.json; the whole config is in the command and the fingerprint.
KEPT = (
    "tasks",
    "metric",
    "R",
    "zero_shot",
    "baselines",
    "summary",
    "method",
    "model",
    "seed",
    "fingerprint",
    "versions",
    "trainable_parameters",
    "experts_per_site",
    "sites",
    "train_traces",
    "step_seconds_median",
    "tokens_per_second",
    "active_experts_mean",
    "tokens_without_expert",
    "prompts_truncated",
    "eval_examples",
    "wall_seconds",
    "device",
    "command",
    "complete",
)


def train(workdir: Path, arguments: list[str]) -> dict:
    """Results of one run of the train binary, continued or reused if it is there."""
    command = [sys.executable, "-m", "mora_jax.train", *arguments, f"--workdir={workdir}"]
    print(shlex.join(command[1:]), flush=True)
    (ROOT / workdir).mkdir(parents=True, exist_ok=True)
    with open(ROOT / workdir / "output.txt", "a", encoding="utf-8") as output:
        code = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        sys.exit(f"{shlex.join(command)} ended with exit code {code}; see {workdir / 'output.txt'}")
    results = json.loads((ROOT / workdir / "results.json").read_text(encoding="utf-8"))
    if not results["complete"]:
        sys.exit("stopped; the same command continues")
    print(f"  {workdir.name}: {json.dumps(results['summary'])}", flush=True)
    return {key: results[key] for key in KEPT}


def main() -> None:
    """Chooses, compares, writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="of the result file")
    parser.add_argument("--methods", required=True, help="comma list of presets")
    parser.add_argument("--learning-rates", required=True, help="comma list, tried for every method")
    parser.add_argument("--choose-on", required=True, help="comma list: the first tasks of the stream")
    parser.add_argument(
        "--choose-steps", default="", help="steps per task while choosing; default: as in the final runs"
    )
    parser.add_argument("--seeds", default="0", help="comma list, for the runs on the test split")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the workdirs go, from the repository")
    parser.add_argument("common", nargs=argparse.REMAINDER, help="-- and then arguments of mora_jax.train")
    options = parser.parse_args()
    common = options.common[1:] if options.common[:1] == ["--"] else options.common
    rates = sorted(options.learning_rates.split(","), key=float)
    folder = options.runs / options.name

    result = {
        "what": __doc__.splitlines()[0],
        "command": shlex.join(["python", "experiments/sweep.py", *sys.argv[1:]]),
        "chosen_on": f"overall performance on the eval split of {options.choose_on}",
        "steps_per_task_while_choosing": options.choose_steps or "as in the final runs",
        "methods": {},
    }
    for method in options.methods.split(","):
        tried = {}
        for rate in rates:
            choose = [f"--config.benchmark.tasks={options.choose_on}", "--config.eval.split=eval"]
            choose += [f"--config.method.name={method}", f"--config.train.learning_rate={rate}"]
            choose += [f"--config.train.steps_per_task={options.choose_steps}"] if options.choose_steps else []
            tried[rate] = train(folder / f"choose_{method}_{rate}", [*common, *choose])
        best = max(rates, key=lambda rate: tried[rate]["summary"]["overall_performance"])  # the first of equals
        final = []
        for seed in options.seeds.split(","):
            arguments = [
                f"--config.method.name={method}",
                f"--config.train.learning_rate={best}",
                f"--config.seed={seed}",
            ]
            final.append(train(folder / f"test_{method}_{best}_seed{seed}", [*common, *arguments]))
        summaries = {rate: run["summary"] for rate, run in tried.items()}
        result["methods"][method] = {"learning_rate": best, "tried": summaries, "test": final}
        write_json(ROOT / "experiments" / "results" / f"{options.name}.json", result)


if __name__ == "__main__":
    main()
