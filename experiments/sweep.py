"""Gives every method its own learning rate, chosen on held-out data, then compares the methods on the test split.

Command    python experiments/sweep.py --name trace4 --methods mora,inc_lora,seq_lora --learning-rates 1e-3,2e-3,4e-3 \\
               --choose-on FOMC,NumGLUE-cm -- --config=configs/llm_cl.py:benchmark=folder \\
               --config.benchmark.root=DIR --config.benchmark.tasks=FOMC,NumGLUE-cm,NumGLUE-ds,Py150
Result     experiments/results/NAME.json: every run's R, summary, command and versions, and which rate was chosen;
           with --frontier also NAME.png, learned against backward transfer (a method is a curve, not a point)
Needs      matplotlib (requirements-dev.txt)

An untuned baseline proves nothing. The choice looks only at the `eval` split and only at the first tasks of the stream
(--choose-on); it takes the rate with the best overall performance, the smaller one where two are equal. A stream
without an `eval` split takes the rates of another sweep (--chosen-in). What stands after `--` goes to every run. Every
run of a method with a threshold is evaluated a second time with the other threshold mode, which acts at inference only.
Interrupted sweeps continue: a finished run in --runs is not done again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mora_jax.metrics import continual
from mora_jax.runtime.writers import write_json

ROOT = Path(__file__).resolve().parent.parent
COLORS = ("#1b6ca8", "#c8553d", "#4a7c59", "#8a5a83", "#7a7a7a")
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
    "gates",
    "prompts_truncated",
    "prompts_truncated_of",
    "eval_examples",
    "wall_seconds",
    "device",
    "command",
    "complete",
)


OTHER_MODE = {"absolute": "relative", "relative": "absolute"}


def call(module: str, workdir: Path, arguments: list[str], output: str) -> dict:
    """What a binary of ours wrote to `output` in its workdir; what it said goes to output.txt there."""
    command = [sys.executable, "-m", f"mora_jax.{module}", f"--workdir={workdir}", *arguments]
    print(shlex.join(command[1:]), flush=True)
    (ROOT / workdir).mkdir(parents=True, exist_ok=True)
    with open(ROOT / workdir / "output.txt", "a", encoding="utf-8") as said:
        code = subprocess.run(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        sys.exit(f"{shlex.join(command)} ended with exit code {code}; see {workdir / 'output.txt'}")
    return json.loads((ROOT / workdir / output).read_text(encoding="utf-8"))


def train(workdir: Path, arguments: list[str]) -> dict:
    """Results of one run of the train binary, continued or reused if it is there."""
    results = call("train", workdir, arguments, "results.json")
    if not results["complete"]:
        sys.exit("stopped; the same command continues")
    print(f"  {workdir.name}: {json.dumps(results['summary'])}", flush=True)
    return results


def other_threshold(workdir: Path, results: dict) -> dict:
    """The summary of the run with the other threshold mode; nothing for methods without a threshold."""
    method = results["config"]["method"]
    if not method["threshold"] or results["R"] is None:
        return {}
    mode = OTHER_MODE[method["threshold_mode"]]
    output = f"evaluate_{mode}.json"
    if (ROOT / workdir / output).exists():
        told = json.loads((ROOT / workdir / output).read_text(encoding="utf-8"))
    else:
        arguments = ["--task=all", f"--config.method.threshold_mode={mode}", f"--output={workdir / output}"]
        told = call("evaluate", workdir, arguments, output)
    taught = told["rows"][1:]  # the first is the frozen model
    scores = np.array([row["scores"] for row in taught], dtype=float)
    last = {key: taught[-1][key] for key in ("active_experts_mean", "tokens_without_expert")}
    return {mode: {"R": [row["scores"] for row in taught], "summary": continual.summary(scores), **last}}


def spread(runs: list[dict]) -> dict:
    """Mean and standard deviation (n - 1) over seeds of every number of the summaries."""
    found = {}
    for name in ("summary", *OTHER_MODE):
        summaries = [run["summary"] if name == "summary" else run[name]["summary"] for run in runs if name in run]
        if not summaries:
            continue
        columns = {key: [summary[key] for summary in summaries] for key in summaries[0]}
        found[name] = {
            key: {
                "mean": round(statistics.mean(values), 2),
                "std": round(statistics.stdev(values), 2) if len(values) > 1 else None,
            }
            for key, values in columns.items()
            if None not in values
        }
    return found


def choose(options: argparse.Namespace, method: str, common: list[str]) -> tuple[str, dict]:
    """The learning rate of a method, and the summaries it was chosen by."""
    if options.chosen_in:
        other = json.loads(options.chosen_in.read_text(encoding="utf-8"))
        return other["methods"][method]["learning_rate"], {}
    tried = {}
    for rate in options.rates:
        arguments = [f"--config.benchmark.tasks={options.choose_on}", "--config.eval.split=eval"]
        arguments += [f"--config.method.name={method}", f"--config.train.learning_rate={rate}"]
        arguments += [f"--config.train.steps_per_task={options.choose_steps}"] if options.choose_steps else []
        tried[rate] = train(options.folder / f"choose_{method}_{rate}", [*common, *arguments])["summary"]
    return max(options.rates, key=lambda rate: tried[rate]["overall_performance"]), tried  # the first of equals


def plot(result: dict, path: Path) -> None:
    """Learned against backward transfer: a line per method over its learning rates, the chosen one ringed."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for color, (method, found) in zip(COLORS, result["methods"].items(), strict=False):
        points = {rate: seeds["spread"]["summary"] for rate, seeds in found["frontier"].items()}
        x, y = ([p[key]["mean"] for p in points.values()] for key in ("backward_transfer", "learned"))
        axes.plot(x, y, "o-", color=color, label=method)
        for rate, at_x, at_y in zip(points, x, y, strict=True):
            axes.annotate(rate, (at_x, at_y), xytext=(6, 4), textcoords="offset points", fontsize=8, color=color)
        at = points[found["learning_rate"]]
        error = {f"{axis}err": at[key]["std"] for axis, key in (("x", "backward_transfer"), ("y", "learned"))}
        ring = (at["backward_transfer"]["mean"], at["learned"]["mean"])
        axes.errorbar(*ring, **error, fmt="o", ms=12, mfc="none", color=color, capsize=3)
    axes.set_xlabel("backward transfer, points (signed; 0 = nothing forgotten)")
    axes.set_ylabel("learned, percent right after each task")
    axes.set_title(result["name"], fontsize=10, loc="left")
    axes.margins(0.08)  # room for the labels of the rates
    axes.grid(alpha=0.3)
    axes.legend(title="ringed: the chosen rate, +- std over seeds", fontsize=8, title_fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Chooses, compares, writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="of the result file")
    parser.add_argument("--methods", required=True, help="comma list of presets")
    parser.add_argument("--learning-rates", required=True, help="comma list, tried for every method")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--choose-on", help="comma list: the first tasks of the stream")
    how.add_argument("--chosen-in", type=Path, help="result file of another sweep, whose rates are taken")
    parser.add_argument(
        "--choose-steps", default="", help="steps per task while choosing; default: as in the final runs"
    )
    parser.add_argument("--seeds", default="0", help="comma list, for the runs on the test split")
    parser.add_argument(
        "--frontier", action="store_true", help="also the rates not chosen, on the test split with the first seed"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the workdirs go, from the repository")
    parser.add_argument("common", nargs=argparse.REMAINDER, help="-- and then arguments of mora_jax.train")
    options = parser.parse_args()
    common = options.common[1:] if options.common[:1] == ["--"] else options.common
    options.rates = sorted(options.learning_rates.split(","), key=float)
    options.folder = options.runs / options.name
    methods, seeds = options.methods.split(","), options.seeds.split(",")

    result = {
        "what": __doc__.splitlines()[0],
        "name": options.name,
        "command": shlex.join(["python", "experiments/sweep.py", *sys.argv[1:]]),
        "chosen_on": f"overall performance on the eval split of {options.choose_on}"
        if options.choose_on
        else f"another stream: {options.chosen_in}",
        "steps_per_task_while_choosing": options.choose_steps or "as in the final runs",
        "methods": {},
    }

    def test(method: str, rate: str, seed: str) -> dict:
        arguments = [f"--config.method.name={method}", f"--config.train.learning_rate={rate}", f"--config.seed={seed}"]
        workdir = options.folder / f"test_{method}_{rate}_seed{seed}"
        results = train(workdir, [*common, *arguments])
        kept = {key: results.get(key) for key in KEPT}  # a run of an earlier version lacks the newest
        return kept | other_threshold(workdir, results)

    for method in methods:
        best, tried = choose(options, method, common)
        result["methods"][method] = {"learning_rate": best, "tried": tried, "frontier": {}}
    for seed in seeds:  # the outer loop, so that an early look compares all methods
        for method, found in result["methods"].items():
            for rate in options.rates if options.frontier and seed == seeds[0] else [found["learning_rate"]]:
                at = found["frontier"].setdefault(rate, {"test": []})
                at["test"].append(test(method, rate, seed))
                at["spread"] = spread(at["test"])
            write_json(ROOT / "experiments" / "results" / f"{options.name}.json", result)
    if options.frontier:
        plot(result, ROOT / "experiments" / "results" / f"{options.name}.png")


if __name__ == "__main__":
    main()
