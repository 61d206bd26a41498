"""How fast is CLIP with a bank of experts? Train step against plain LoRA of equal rank, evaluation against no experts.

Command    python experiments/bench_clip_step.py [--turns 3] [--experts 16,160] [--model clip-vit-b16]
Result     experiments/results/bench_clip_step.json

Shape: both encoders of CLIP ViT-B/16 with random weights, q, k, v, o and both MLP layers of both adapted, float32. A
train step sees 8 pictures of 224 x 224 pixels and 16 class texts, and trains 16 of the n experts of a site. Evaluation
classifies 32 pictures in batches of 8 among 16 classes; decoding them is included, the texts are embedded beforehand as
in a run. The contestants take turns as `turns.py` says: quote the ratio of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contestants import random_bank, train_step
from turns import Step, take_turns

from mora_jax.benchmarks.pictures import Picture, PictureTask
from mora_jax.config import load
from mora_jax.data.images import png
from mora_jax.methods.method import Method, from_config
from mora_jax.models.clip import CLIP
from mora_jax.models.clip_config import PUBLISHED
from mora_jax.models.clip_tokenizer import ClipTokenizer
from mora_jax.models.registry import ClipModel
from mora_jax.runtime.contrastive import ClipFamily
from mora_jax.runtime.distributed import make_mesh
from mora_jax.runtime.results import device, versions
from mora_jax.runtime.writers import write_json

ROOT = Path(__file__).resolve().parent.parent
BATCH, CLASSES, FRESH, ASKED = 8, 16, 16, 32
STEPS = 2  # counted, in a turn
NAMES = tuple("abcdefghijklmnop")


def family_of(model: str, preset: str) -> tuple[ClipFamily, Method, Any]:
    """(family, method, config): a published size with random weights, and a task of random pictures."""
    overrides = {"eval.batch_size": str(BATCH), "method.capacity_bucket": "1", "train.class_bucket": str(CLASSES)}
    config = load(f"{ROOT / 'configs/clip_cl.py'}:benchmark=xtail,model={model},method={preset}", overrides)
    method, sizes = from_config(config.method, config.kernel), PUBLISHED[model].config
    rng, side = np.random.default_rng(0), sizes.vision.image_size
    files = [png(rng.integers(0, 256, (side, side, 3)).astype(np.uint8)) for _ in range(ASKED)]
    pictures = tuple(Picture(str(i), NAMES[i % CLASSES], lambda file=file: file) for i, file in enumerate(files))
    splits = {"train": pictures, "test": pictures}
    task = PictureTask("random", "accuracy", splits, labels=NAMES, classes=NAMES)
    shapes = jnp.zeros((1, side, side, 3), jnp.uint8), jnp.zeros((1, 2), jnp.int32)
    params = jax.jit(CLIP(sizes).init)(jax.random.key(0), *shapes)["params"]
    found = ClipModel(sizes, params, ClipTokenizer.packaged(sizes.text.context), "random")
    return ClipFamily(found, method, config, make_mesh(config.mesh), [task]), method, config


def training(model: str, preset: str, experts: int) -> Step:
    """One train step with `experts` per site."""
    family, method, config = family_of(model, preset)
    task = next(iter(family.tasks.values()))
    config.train.batch_size = BATCH
    batch = next(family.train_data(task, 0, 1, 0).batches)
    return train_step(family, method, config, experts - FRESH, batch)


def evaluation(model: str, preset: str, experts: int) -> Step:
    """The classes of all pictures, under `experts` per site; of preset zero_shot there are none."""
    family, method, _ = family_of(model, preset)
    task = next(iter(family.tasks.values()))
    bank = {"bank": random_bank(family, method, experts)} if method.trains else {}
    variables = family.prepare({"params": family.params} | bank)
    return lambda: family.predict(variables, task, task.split("test"), lambda n: None)


def main() -> None:
    """Runs everything, prints the ratios and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3, help=f"turns per contestant, of {STEPS} counted steps")
    parser.add_argument("--experts", default="16,160", help="comma list of experts per site")
    parser.add_argument("--model", default="clip-vit-b16", choices=PUBLISHED, help="whose sizes")
    options = parser.parse_args()
    rows = []
    for experts in map(int, options.experts.split(",")):
        row: dict[str, Any] = {"experts_per_site": experts}
        for what, make, other in (("train_step", training, "inc_lora"), ("evaluation", evaluation, "zero_shot")):
            makers = {name: partial(make, options.model, name, experts) for name in ("mora", other)}
            seconds = take_turns(makers, options.turns, STEPS)
            median = {name: statistics.median(values) for name, values in seconds.items()}
            row[what] = {
                f"mora_over_{other}_time": round(median["mora"] / median[other], 3),
                "seconds_median": {name: round(value, 3) for name, value in median.items()},
                "seconds": {name: [round(v, 3) for v in values] for name, values in seconds.items()},
            }
        print(json.dumps(row), flush=True)
        rows.append(row)
    result = {
        "what": __doc__.splitlines()[0],
        "command": " ".join(["python", "experiments/bench_clip_step.py", *sys.argv[1:]]),
        "device": device(),
        "versions": versions(),
        "model": options.model,
        "rows": rows,
    }
    write_json(ROOT / "experiments" / "results" / "bench_clip_step.json", result)


if __name__ == "__main__":
    main()
