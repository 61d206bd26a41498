"""From the command line to a checked config: parse, override, validate, fingerprint.

`ml_collections` holds the values; the flag parsing is ours, because its own answers an unknown key with a traceback
and a missing file with exit code 0. Every mistake is one `MoraError` that names the key and the legal values.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from mora_jax.errors import MoraError, unknown
from mora_jax.methods.presets import PRESETS
from mora_jax.metrics.text import METRICS
from mora_jax.models.decoder import REMAT
from mora_jax.models.quantised import QUANTISE
from mora_jax.models.registry import DTYPES
from mora_jax.runtime import hosts, storage
from mora_jax.runtime.decoding import DECODING
from mora_jax.runtime.optimizer import SCHEDULES

USAGE = """\
python -m mora_jax.train --config=configs/llm_cl.py[:ARG] --workdir=DIR [--config.KEY=VALUE ...]
python -m mora_jax.train --config=... --dry_run
python -m mora_jax.train --list
python -m mora_jax.train ... --coordinator=HOST:PORT --processes=N --process=I

ARG is a comma list: benchmark=NAME, model=NAME, method=NAME, smoke. KEY is any key of the config, for example
--config.train.learning_rate=1e-3. The same command in the same workdir resumes. --list prints the known names.
--dry_run compiles the steps for the devices of this machine and says what they need; python -m mora_jax.plan does that
for devices that are elsewhere. On a TPU pod, under SLURM and under Open MPI the processes of a run find each other;
elsewhere the last form starts process I of N, with the same HOST:PORT on all, where process 0 runs."""

# Keys that hold a number, or a comma list with one number per task.
PER_TASK = ("train.steps_per_task", "train.epochs_per_task")
LABEL_SPACES = ("joint", "own")
OWN = -1  # as a number of epochs: the task's own

# What changes how a run is carried out, but not its results; the rest of the config is part of the fingerprint. Paths
# of data and weights are not: their contents are. Tasks and their lengths are compared one by one, so that more can
# be added.
NOT_RESULTS = (
    "mesh.",
    "checkpoint.",
    "kernel",
    "log.",
    "eval.batch_size",
    "model.remat",
    "model.weights",
    "train.accumulate",
    "method.capacity_bucket",
    "benchmark.root",
    "benchmark.tasks",
    "benchmark.metrics",
    "benchmark.train_limit",
    "benchmark.eval_limit",
    *PER_TASK,
)


@dataclasses.dataclass(frozen=True)
class Invocation:
    """A command line that was understood. `config` is None where only --list was asked for.

    `workdir` is None there and for a dry run, which writes nothing. `hosts`: what was said of other processes.
    """

    config: ConfigDict | None
    workdir: Path | None
    hosts: Mapping[str, str]


def parse(argv: Sequence[str]) -> Invocation:
    """Reads the command line. Raises MoraError; the config that comes back has been validated."""
    options, overrides = split(argv, ("config", "config.KEY", "workdir", *hosts.OPTIONS), flags=("list", "dry_run"))
    if "list" in options:
        return Invocation(None, None, {})
    dry = "dry_run" in options
    require(options, ("config",) if dry else ("config", "workdir"), USAGE)
    config = load(options["config"], overrides)
    of_hosts = {name: options[name] for name in hosts.OPTIONS if name in options}
    return Invocation(config, None if dry else storage.at(options["workdir"]), of_hosts)


def split(
    argv: Sequence[str], known: Sequence[str], flags: Sequence[str] = ()
) -> tuple[dict[str, str], dict[str, str]]:
    """Options by name and config overrides by key; both `--name=value` and `--name value` are read.

    `known` are the options with a value (config.KEY stands for all keys), `flags` those without; else MoraError.
    """
    options: dict[str, str] = {}
    overrides: dict[str, str] = {}
    words = list(argv)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        name = flag.removeprefix("--")
        if name != flag and name in flags and not equals:
            options[name] = "yes"
            continue
        if name == flag or ("config.KEY" if name.startswith("config.") else name) not in known:
            legal = ", ".join(f"--{name}" for name in (*known, *flags, "help"))
            raise MoraError(f"{flag} is not understood; legal: {legal}")
        if not equals:
            if not words or words[0].startswith("--"):
                raise MoraError(f"{flag} needs a value: {flag}=...")
            value = words.pop(0)
        target = overrides if name.startswith("config.") else options
        target[name.removeprefix("config.")] = value
    return options, overrides


def require(options: Mapping[str, str], needed: Sequence[str], usage: str) -> None:
    """MoraError with the first line of `usage` if one of the `needed` options is absent or empty."""
    for name in needed:
        if not options.get(name):
            raise MoraError(f"--{name} is missing; usage: {usage.splitlines()[0]}")


def load(source: str, overrides: Mapping[str, str]) -> ConfigDict:
    """The config of `file.py[:ARG]` with overrides applied and every value checked."""
    file, _, arg = source.partition(":")
    # A name decides defaults (a preset's axes, a benchmark's limits), so it is known before the other overrides.
    names = [
        f"{key}={overrides[f'{key}.name']}" for key in ("benchmark", "model", "method") if f"{key}.name" in overrides
    ]
    config = _run(Path(file), ",".join(filter(None, [arg, *names])))
    for key, value in overrides.items():
        _override(config, key, value)
    validate(config)
    config.lock()
    return config


def restore(saved: Mapping[str, Any], source: object, overrides: Mapping[str, str], legal: Sequence[str]) -> ConfigDict:
    """The config that a run stored as JSON, with overrides applied to keys that begin with one of `legal`.

    Raises MoraError for an override elsewhere, which would speak of another run, and for a config of another version.
    """
    for key in overrides:
        if not key.startswith(tuple(legal)):
            raise MoraError(
                f"--config.{key} cannot be changed after training; legal: {', '.join(f'config.{k}' for k in legal)}"
            )
    flat = {key: tuple(v) if isinstance(v, list) else v for key, v in flatten(saved).items()}
    if missing := RULES.keys() - flat.keys():
        raise MoraError(f"the config in {source} is of another version: it has no key {min(missing)}")
    config = ConfigDict(unflatten_dict(flat, sep="."))
    for key, value in overrides.items():
        _override(config, key, value)
    validate(config)
    config.lock()
    return config


def _run(path: Path, arg: str) -> ConfigDict:
    if not path.is_file():
        raise MoraError(f"--config={path} does not exist")
    root = str(path.resolve().parent.parent)  # so that `from configs import common` works from any directory
    sys.path.insert(0, root)
    try:
        spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
        if spec is None:
            raise MoraError(f"--config={path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except SyntaxError as problem:
        raise MoraError(f"--config={path} is not valid Python, line {problem.lineno}: {problem.msg}") from None
    finally:
        sys.path.remove(root)
    if not hasattr(module, "get_config"):
        raise MoraError(f"--config={path} has no function get_config(arg)")
    return module.get_config(arg)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, (ConfigDict, dict)) else {name: value}
    return flat


def _override(config: ConfigDict, key: str, text: str) -> None:
    known = flatten(config)
    if key not in known:
        raise unknown("config key", key, known)
    *path, last = key.split(".")
    node = config
    for name in path:
        node = node[name]
    with node.ignore_type():
        node[last] = _convert(key, text, known[key])


def _convert(key: str, text: str, default: Any) -> Any:
    """The text as the type of the default."""
    try:
        if key in PER_TASK:
            return tuple(int(part) for part in text.split(",")) if "," in text else int(text)
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return type(default)(text)
    except (ValueError, KeyError):
        kind = "int or comma list of ints" if key in PER_TASK else type(default).__name__
        raise MoraError(f"--config.{key}={text} is not of type {kind}") from None


def _positive(value: Any) -> bool:
    return value > 0


def _not_negative(value: Any) -> bool:
    return value >= 0


def _per_task(least: int) -> Callable[[Any], bool]:
    return lambda value: all(v >= least for v in (value if isinstance(value, tuple) else (value,)))


RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda v: 0 <= v < 2**31, "at least 0 and below 2**31"),
    "benchmark.train_limit": (_not_negative, "at least 0 (0 = all)"),
    "benchmark.eval_limit": (_not_negative, "at least 0 (0 = all)"),
    "benchmark.shots": (_not_negative, "at least 0 (0 = all)"),
    "model.dtype": (DTYPES.__contains__, f"one of {', '.join(DTYPES)}"),
    "model.quantise": (QUANTISE.__contains__, f"one of {', '.join(QUANTISE)}"),
    "model.remat": (REMAT.__contains__, f"one of {', '.join(REMAT)}"),
    "train.steps_per_task": (_per_task(0), "at least 0 (0 = use epochs_per_task)"),
    "train.epochs_per_task": (_per_task(OWN), "at least 0, or -1 (the task's own)"),
    "train.batch_size": (_positive, "at least 1"),
    "train.accumulate": (_positive, "at least 1"),
    "train.learning_rate": (lambda v: 0 < v < math.inf, "greater than 0 and finite"),
    "train.schedule": (SCHEDULES.__contains__, f"one of {', '.join(SCHEDULES)}"),
    "train.adam_b1": (lambda v: 0 <= v < 1, "in 0..1, below 1"),
    "train.adam_b2": (lambda v: 0 <= v < 1, "in 0..1, below 1"),
    "train.weight_decay": (_not_negative, "at least 0"),
    "train.clip_norm": (_not_negative, "at least 0 (0 = off)"),
    "train.max_prompt_tokens": (lambda v: v == 0 or v >= 2, "0 (the task's own) or at least 2"),
    "train.max_answer_tokens": (lambda v: v == 0 or v >= 2, "0 (the task's own) or at least 2"),
    "train.length_bucket": (lambda v: v >= 8, "at least 8"),
    "train.class_bucket": (_positive, "at least 1"),
    "eval.label_space": (LABEL_SPACES.__contains__, f"one of {', '.join(LABEL_SPACES)}"),
    "eval.split": (("test", "eval").__contains__, "one of test, eval"),
    "eval.batch_size": (_positive, "at least 1"),
    "eval.max_new_tokens": (_not_negative, "at least 0 (0 = the task's own)"),
    "eval.decoding": (DECODING.__contains__, f"one of {', '.join(DECODING)}"),
    "checkpoint.every_steps": (_positive, "at least 1"),
    "checkpoint.keep": (_positive, "at least 1"),
    "log.every_steps": (_positive, "at least 1"),
}


def validate(config: ConfigDict) -> None:
    """Refuses impossible values and contradictions; the method's own axes are checked where they are defined."""
    flat = flatten(config)
    for key, (legal, words) in RULES.items():
        if not legal(flat[key]):
            raise MoraError(f"{key}={flat[key]!r} must be {words}")
    steps, epochs = flat["train.steps_per_task"], flat["train.epochs_per_task"]
    if not isinstance(steps, tuple) and not isinstance(epochs, tuple) and bool(steps) == bool(epochs):
        raise MoraError(
            f"train.steps_per_task={steps} and train.epochs_per_task={epochs}: exactly one of them must be other than 0"
        )
    if flat["train.batch_size"] % flat["train.accumulate"]:
        raise MoraError(
            f"train.accumulate={flat['train.accumulate']} does not divide train.batch_size={flat['train.batch_size']}"
        )
    if config.method.name not in PRESETS:
        raise unknown("method", config.method.name, PRESETS)
    for task, metric in pairs("benchmark.metrics", config.benchmark.metrics).items():
        if metric not in METRICS:
            raise unknown(f"metric for {task} in benchmark.metrics", metric, METRICS)


def names(comma_list: str) -> list[str]:
    """The names in a comma list."""
    return [name.strip() for name in comma_list.split(",") if name.strip()]


def pairs(key: str, comma_list: str) -> dict[str, str]:
    """`a=x,b=y` as a dict."""
    found = dict(part.partition("=")[::2] for part in names(comma_list))
    if not all(found.values()):
        raise MoraError(f"{key}={comma_list!r} must be a comma list of task=name")
    return found


def lengths(
    config: ConfigDict, tasks: Sequence[str], own: Mapping[str, int | None] = MappingProxyType({})
) -> list[tuple[int, int]]:
    """(steps, epochs) of each task, one of them 0. `own`: the epochs that tasks bring with them."""

    def spread(key: str) -> list[int]:
        value = flatten(config)[key]
        if not isinstance(value, tuple):
            return [value] * len(tasks)
        if len(value) < len(tasks):
            raise MoraError(f"{key} has {len(value)} entries for {len(tasks)} tasks ({', '.join(tasks)})")
        return list(value[: len(tasks)])

    chosen = []
    for task, steps, epochs in zip(tasks, *map(spread, PER_TASK), strict=True):
        if not steps and not epochs:
            raise MoraError(f"task {task} has neither train.steps_per_task nor train.epochs_per_task")
        if not steps and epochs == OWN and not own.get(task):
            raise MoraError(f"task {task} has no number of epochs of its own; train.epochs_per_task={OWN} needs one")
        chosen.append((steps, 0 if steps else (own[task] if epochs == OWN else epochs)))
    return chosen


def fingerprint(config: ConfigDict, model_identity: str) -> dict[str, Any]:
    """What decides results, as a flat dict: a resume compares it key by key."""
    flat = flatten(config)
    kept = {key: value for key, value in flat.items() if not any(key.startswith(prefix) for prefix in NOT_RESULTS)}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in sorted(kept.items())} | {
        "weights": model_identity
    }


def alike(config: ConfigDict) -> dict[str, Any]:
    """What must be the same on all hosts, as a flat dict: all but where data and weights lie on their disks."""
    return {key: value for key, value in flatten(config).items() if key not in ("benchmark.root", "model.weights")}


def digest(value: Any) -> str:
    """A short sum of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def stream_differences(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[str]:
    """`task I KEY: old -> new` for every task that both streams have, and the tasks that `new` lacks.

    Raises MoraError where a task was made by another version of the code (`benchmarks.stream.Task.made`; none said is
    the first), by which the same data look different.
    """
    changed = []
    for i, (was, now) in enumerate(zip(old, new, strict=False)):
        if was["epochs"] == now["epochs"] and was.get("made", 1) != now.get("made", 1):
            raise MoraError(
                f"another version of mora_jax, which made other batches or another digest of the data of task "
                f"{was['task']}, has begun this run; go on with that version, or in another --workdir"
            )
        changed += differences(*({f"task {i} {key}": value for key, value in row.items()} for row in (was, now)))
    if gone := [row["task"] for row in old[len(new) :]]:
        changed.append(f"benchmark.tasks no longer holds {', '.join(gone)}")
    return changed


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for every key that differs."""
    keys = sorted(set(old) | set(new))
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]
