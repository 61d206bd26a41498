"""How fast does a CLIP learn and answer? MoRA against plain LoRA of equal rank, and against the frozen model.

Command    python experiments/bench_clip_step.py [--turns 3] [--experts 16,160] [--model clip-vit-b16]
Result     experiments/results/bench_clip_step.json

Shape: CLIP ViT-B/16 with its text encoder, random weights, 8 pictures, 10 classes padded to 16, float32, all six
targets of both encoders, n experts per site of which 16 are trainable. A train step is that of the train binary; an
evaluation is `predict` on 8 encoded pictures against the 10 classes, the decoding included, the class texts not.
"counting" also counts the gates, which a large task does on few of its batches. The contestants take turns as
`turns.py` says: quote the ratio of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from contestants import random_bank, train_step
from turns import Step, take_turns

from mora_jax.benchmarks.pictures import Picture, PictureTask
from mora_jax.config import load
from mora_jax.data.images import png
from mora_jax.methods.method import Method, from_config
from mora_jax.models.clip import CLIP, initialise
from mora_jax.models.clip_config import PUBLISHED
from mora_jax.models.clip_tokenizer import ClipTokenizer
from mora_jax.models.registry import ClipModel
from mora_jax.runtime.contrastive import ClipFamily
from mora_jax.runtime.distributed import make_mesh
from mora_jax.runtime.results import device, versions
from mora_jax.runtime.writers import write_json

ROOT = Path(__file__).resolve().parent.parent
BATCH, CLASSES, FRESH = 8, 10, 16
STEPS = 2  # counted, in a turn


def random_model(name: str) -> ClipModel:
    """A published model's sizes with random weights."""
    sizes = PUBLISHED[name].config
    return ClipModel(sizes, initialise(CLIP(sizes), jax.random.key(0)), ClipTokenizer.packaged(), "random")


def random_task(side: int) -> PictureTask:
    """As many pictures as a batch has, of noise, as a camera's size would be after the resize."""
    rng, pictures = np.random.default_rng(0), []
    names = tuple(f"thing {i}" for i in range(CLASSES))
    for i in range(BATCH):
        file = png(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        pictures.append(Picture(f"{i}.png", names[i % CLASSES], lambda file=file: file))
    return PictureTask("things", "accuracy", {"train": tuple(pictures), "test": tuple(pictures)}, classes=names)


def family_of(model: str, method: str) -> tuple[Any, Method, ClipFamily, PictureTask]:
    """(config, method, family, task) of a preset."""
    options = {"method.capacity_bucket": "1", "train.batch_size": str(BATCH), "eval.batch_size": str(BATCH)}
    config = load(f"{ROOT}/configs/clip_cl.py:benchmark=xtail,method={method}", options)
    method, task = from_config(config.method, config.kernel), random_task(PUBLISHED[model].config.vision.image_size)
    return config, method, ClipFamily(random_model(model), method, config, make_mesh(config.mesh), [task]), task


def learning(model: str, method: str, experts: int) -> Step:
    """A train step with `experts` per site, 16 of them fresh."""
    config, method, family, task = family_of(model, method)
    batch = next(family.train_data(task, 0, 1, 0).batches)
    return train_step(family, method, config, experts - FRESH, batch)


def evaluation(model: str, method: str, experts: int, counting: bool) -> Step:
    """The classes of one batch of pictures with `experts` frozen ones per site."""
    _, method, family, task = family_of(model, method)
    bank = {"bank": random_bank(family, method, experts)} if method.trains else {}
    prepared = family.prepare({"params": family.params} | bank)
    choose = family._choose
    family._choose = lambda *arguments, count: choose(*arguments, count=counting)
    return lambda: family.predict(prepared, task, task.split("test"), lambda n: None)


def compare(model: str, experts: int, turns: int) -> dict[str, Any]:
    """A row of the result, printed as it comes."""
    learn = {name: partial(learning, model, name, experts) for name in ("mora", "inc_lora")}
    answer = {name: partial(evaluation, model, name, experts, False) for name in ("mora", "zero_shot")}
    answer["mora, counting"] = partial(evaluation, model, "mora", experts, True)
    seconds = {"train": take_turns(learn, turns, STEPS), "evaluation": take_turns(answer, turns, STEPS)}
    median = {what: {name: statistics.median(s) for name, s in found.items()} for what, found in seconds.items()}
    row = {
        "experts_per_site": experts,
        "train_seconds": {name: round(value, 4) for name, value in median["train"].items()},
        "mora_over_lora_train_step": round(median["train"]["mora"] / median["train"]["inc_lora"], 3),
        "evaluation_seconds": {name: round(value, 4) for name, value in median["evaluation"].items()},
        "mora_over_frozen_evaluation": round(median["evaluation"]["mora"] / median["evaluation"]["zero_shot"], 3),
    }
    print(json.dumps(row), flush=True)
    return row | {"seconds": seconds}


def main() -> None:
    """Runs everything, prints a line per number of experts and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3, help=f"turns per contestant, of {STEPS} counted steps")
    parser.add_argument("--experts", default="16,160", help="comma list of experts per site")
    parser.add_argument("--model", default="clip-vit-b16", choices=sorted(PUBLISHED))
    options = parser.parse_args()
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # as launch.sh does
    result = {
        "what": __doc__.splitlines()[0],
        "command": " ".join(["python", "experiments/bench_clip_step.py", *sys.argv[1:]]),
        "device": device(),
        "versions": versions(),
        "model": options.model,
        "rows": [compare(options.model, int(n), options.turns) for n in options.experts.split(",")],
    }
    write_json(ROOT / "experiments" / "results" / "bench_clip_step.json", result)


if __name__ == "__main__":
    main()
