"""A frozen CLIP learns visual domains, one after another; `benchmark=` chooses stream and defaults.

benchmark=packaged_images (default): five small domains that come inside packages, and a small CLIP of our own. It is a
small-scale stream, not X-TAIL. A picture is compared with the classes of its own domain (chance 4 to 12.5 %): in one
label space of all 62 (--config.eval.label_space=joint) most pictures of a new domain go to classes of the first one,
for this CLIP does not tell domains apart and the loss never compares them.
    Command    python -m mora_jax.train --config=configs/clip_cl.py --workdir=runs/clip_cl
    Model      small-clip, 10 M parameters for 64-pixel pictures, trained by the first run that needs it on emoji and
               their names (npm), 400 steps. Of 239 pictures not trained on 12.1 % find their caption among 239 (chance
               0.4 %).
    Defaults   as for X-TAIL below, but 100 steps of 32 pictures, learning rate 5e-3, tau 0.1 and clipping at 1.0, set
               by hand on the eval split of clothes and digits. Rates tuned per preset, and what they give, are in
               experiments/README.md, "Presets on pictures".

benchmark=image_folder: any directory <task>/{train,test}/<class>/*.
    Command    python -m mora_jax.train --config=configs/clip_cl.py:benchmark=image_folder,model=clip-vit-b16
               --workdir=runs/folder --config.benchmark.root=DIR

benchmark=xtail: ten domains, 1100 classes of 1099 texts in one label space, domain unknown at test (arXiv 2406.18868).
    Command    python -m mora_jax.train --config=configs/clip_cl.py:benchmark=xtail --workdir=runs/xtail
               --config.benchmark.root=DIR
    Defaults   published for MoRA (arXiv 2506.21035, github.com/Artificer-AI-Lab/MoRAM): CLIP ViT-B/16, 16 shots drawn
               with seed 42, rank = k = 16, tau 0.01, delta 0.2, scale 1, q, k, v, o and both MLP layers of both
               encoders (4,423,680 trainable per task), 500 steps per task, batch 64, AdamW (0.9, 0.9999) without weight
               decay, learning rate 5e-4 to 0 by a cosine per task, float32.
    Published  PUBLISHED BY OTHERS AND NOT REPRODUCED HERE. Transfer / average / last:
               zero-shot    62.4 / -    / 58.5
               ZSCL         59.0 / 60.0 / 63.4
               MoE-Adapter  56.0 / 63.0 / 70.5
               LoRA r16     61.8 / 60.5 / 59.4
               RAIL-Primal  62.4 / 70.7 / 79.1
               CoDyRA       63.2 / 71.3 / 79.2
               MoRAM        63.3 / 72.7 / 80.9
               one fine-tuned model per domain: last 81.9

benchmark=mtil: eleven domains, the domain known at test (arXiv 2303.06628); tasks=order1 (default) or order2.
    Command    python -m mora_jax.train --config=configs/clip_cl.py:benchmark=mtil --workdir=runs/mtil
               --config.benchmark.root=DIR     (--config.benchmark.shots=0 for all training pictures)
    Defaults   5 shots; the rest as for xtail.
    Published  PUBLISHED BY OTHERS AND NOT REPRODUCED HERE. 5-shot, order 1, transfer / average / last: ZSCL
               65.3 / 64.4 / 67.4, MoE-Adapter 68.9 / 71.4 / 76.1, RAIL 69.4 / 71.9 / 77.2, CoDyRA 70.1 / 73.3 / 78.0.
               Full-shot: ZSCL 68.1 / 75.4 / 83.6, CMAP (arXiv 2605.25708) 74.2 / 80.5 / 88.7.
"""

from configs import common
from mora_jax.benchmarks import stream

# Published for X-TAIL; tau is read by methods with gates only.
_PUBLISHED = {
    "method.rank": 16,
    "method.top_k": 16,
    "method.temperature": 0.01,
    "method.scale": 1.0,
    "method.targets": ".*/attn/[qkvo],.*/mlp/(up|down)",
    "method.capacity_bucket": 160,  # ten tasks in one, for one trace
    "train.steps_per_task": 500,
    "train.epochs_per_task": 0,
    "train.batch_size": 64,
    "train.learning_rate": 5e-4,
    "train.schedule": "cosine",
    "train.adam_b2": 0.9999,
    "train.clip_norm": 0.0,
    "eval.batch_size": 64,
    "eval.future_tasks": True,  # transfer is about them
}
# Benchmark -> what its claim above changes of `common.base`.
CLAIMS = {
    "packaged_images": {
        **_PUBLISHED,
        "train.class_bucket": 32,
        "method.capacity_bucket": 80,
        "train.steps_per_task": 100,
        "train.batch_size": 32,
        "train.learning_rate": 5e-3,
        "train.clip_norm": 1.0,
        "method.temperature": 0.1,
    },
    "image_folder": _PUBLISHED,
    "xtail": {**_PUBLISHED, "benchmark.shots": 16, "benchmark.split_seed": 42},
    "mtil": {
        **_PUBLISHED,
        "benchmark.shots": 5,
        "benchmark.split_seed": 42,
        "method.capacity_bucket": 176,
    },
}
MODEL = {"packaged_images": "small-clip"}  # of a claim where none is named


def get_config(arg=""):
    c = common.base()
    c.benchmark.name = "packaged_images"
    words = common.apply_argument(c, arg)
    if "model" not in words:
        c.model.name = MODEL.get(c.benchmark.name, "clip-vit-b16")
    c.update_from_flattened_dict(CLAIMS.get(c.benchmark.name, _PUBLISHED))
    c.eval.label_space = stream.label_space(c.benchmark.name)
    if "smoke" in words:
        common.smoke(c, "tiny_clip")
    return c
