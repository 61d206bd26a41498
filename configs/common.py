"""What every config has: all keys with their defaults and units, and how the part after the colon is read."""

from __future__ import annotations

from ml_collections import ConfigDict

from mora_jax.errors import MoraError
from mora_jax.methods.presets import preset


def base() -> ConfigDict:
    """Every key there is; a config fills in what its claim needs."""
    c = ConfigDict()
    c.seed = 0
    c.benchmark = ConfigDict(
        {
            "name": "packaged_text",
            "root": "",  # folder of the data, for benchmarks that have one
            "tasks": "",  # comma list of tasks (or orders, where a benchmark names them); empty = all, in its own order
            "metrics": "",  # comma list of task=metric, over what the benchmark says
            "train_limit": 0,  # first so many training records of each task; 0 = all
            "eval_limit": 0,  # first so many evaluation records of each task; 0 = all
            "shots": 0,  # training records of each class, drawn by split_seed; 0 = all
            "split_seed": 0,  # of benchmarks that draw their own splits, and of the shots
        }
    )
    c.model = ConfigDict(
        {
            "name": "smollm2-135m",
            "weights": "",  # a .gguf file, a folder with safetensors, or a hub id; empty = what the name stands for
            "dtype": "float32",  # of frozen weights and activations: float32 or bfloat16
            "quantise": "none",  # frozen dense kernels in fewer bits: none, int8 or nf4
            "remat": "dots",  # what the backward pass recomputes: none, dots (all but dense products), full
        }
    )
    c.method = ConfigDict(
        {
            **preset("mora"),
            "targets": "attn/q,attn/k,attn/v,attn/o",  # regexes on site kinds, comma list
            "capacity_bucket": 32,  # rows the bank grows by; a multiple of 128 suits a TPU
        }
    )
    c.train = ConfigDict(
        {
            "steps_per_task": 0,  # optimiser steps; a number or a comma list with one per task
            "epochs_per_task": 1,  # used where steps_per_task is 0; a number or a comma list; -1 = the task's own
            "batch_size": 8,  # examples per step, over all devices
            "accumulate": 1,  # parts that a batch is taken in, one after another: less memory, the same step
            "learning_rate": 2e-3,
            "schedule": "constant",  # over the steps of one task: constant, linear or cosine
            "adam_b1": 0.9,
            "adam_b2": 0.95,
            "weight_decay": 0.0,
            "clip_norm": 1.0,  # global norm; 0 = off
            "max_prompt_tokens": 0,  # with BOS; longer prompts lose their left end; 0 = the task's own, else 1024
            "max_answer_tokens": 0,  # with EOS; 0 = the task's own, else 512
            "length_bucket": 128,  # smallest padded length in tokens; the others are it doubled
            "class_bucket": 16,  # smallest padded number of classes of a CLIP's task; the others are it doubled
        }
    )
    c.eval = ConfigDict(
        {
            "split": "test",  # test, or eval to choose hyper-parameters on
            "batch_size": 32,
            "max_new_tokens": 0,  # 0 = the task's own, else its longest answer
            "decoding": "greedy",  # greedy, or moram: with repetition penalty 1.2 and no 3-gram twice, as published
            "label_space": "joint",  # what a CLIP chooses from: joint (classes of all tasks) or own (of the task asked)
            "future_tasks": False,  # also evaluate tasks that have not been taught yet
        }
    )
    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "model": 1})  # devices per axis; -1 = all that are left
    c.checkpoint = ConfigDict({"every_steps": 50, "keep": 2})  # inside a task; the end of each task is always kept
    c.kernel = "auto"  # of the gated projection: auto, xla, or pallas (TPU and GPU)
    c.log = ConfigDict({"every_steps": 10, "tensorboard": False})  # rows are written in groups of so many steps
    return c


ARGUMENTS = ("benchmark", "model", "method")


def apply_argument(c: ConfigDict, arg: str) -> set[str]:
    """Applies `benchmark=..,model=..,method=..,smoke` to a config; returns the words it held."""
    words = set()
    for part in filter(None, (part.strip() for part in arg.split(","))):
        key, equals, value = part.partition("=")
        if key == "smoke" and not equals:
            words.add(key)
        elif key in ARGUMENTS and value:
            words.add(key)
            c[key].update(preset(value) if key == "method" else {"name": value})
        else:
            raise MoraError(
                f"--config=...:{part} is not understood; legal: {', '.join(f'{k}=NAME' for k in ARGUMENTS)}, smoke"
            )
    return words


def smoke(c: ConfigDict, model: str = "tiny") -> None:
    """Shrinks anything to seconds: a tiny random model, a few steps, a few examples. Its scores mean nothing."""
    c.model.update({"name": model, "weights": "", "dtype": "float32"})
    c.train.update(
        {"steps_per_task": 3, "epochs_per_task": 0, "batch_size": 4, "max_prompt_tokens": 48, "max_answer_tokens": 16}
    )
    c.train.length_bucket = 64
    c.benchmark.update({"train_limit": 16, "eval_limit": 4})
    c.eval.update({"batch_size": 4, "max_new_tokens": 4})
    c.checkpoint.every_steps = 2
