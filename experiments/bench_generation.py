"""How fast is generation with a bank of experts, against the same model without any?

Command    python experiments/bench_generation.py [--experts 64] [--turns 4]
Result     experiments/results/bench_generation.json

Shape: SmolLM2-135M, 16 prompts of 64 tokens, 64 new tokens each (the end of sequence does not stop them), float32,
greedy, q, k, v, o adapted. The experts are random: they change the text, not the time. The contestants take turns as
`turns.py` says: quote the ratio of medians, in which prefill is included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import numpy as np
from contestants import random_bank
from turns import Step, take_turns

from mora_jax.config import load
from mora_jax.methods.method import from_config
from mora_jax.models.decoder import Decoder
from mora_jax.models.registry import load_model
from mora_jax.models.tokenizer import Tokenizer
from mora_jax.runtime.distributed import make_mesh
from mora_jax.runtime.generate import Generator
from mora_jax.runtime.language import LanguageFamily
from mora_jax.runtime.results import device, versions
from mora_jax.runtime.writers import write_json

ROOT = Path(__file__).resolve().parent.parent
BATCH, PROMPT, NEW = 16, 64, 64  # rows, tokens, tokens
STEPS = 2  # counted generations in a turn


class Endless:
    """A tokenizer of random prompts of one length whose texts never end."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.rng = tokenizer, np.random.default_rng(0)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    eos_id = -1

    def encode_batch(self, texts):
        return [self.rng.integers(0, self.vocab_size, PROMPT - 1).tolist() for _ in texts]


def generation(name: str, experts: int) -> Step:
    """Texts for one batch under a preset with `experts` frozen experts per site."""
    config = load(f"{ROOT / 'configs/llm_cl.py'}:model=smollm2-135m,method={name}", {})
    method = from_config(config.method, config.kernel)
    model = load_model(config.model, 0)
    family = LanguageFamily(model, method, config, make_mesh(config.mesh))
    bank = {"bank": random_bank(family, method, experts)} if method.trains else {}
    variables = {"params": family.params} | bank
    generator = Generator(Decoder(model.config, method), Endless(model.tokenizer), family.mesh)
    limits = {"max_prompt_tokens": PROMPT, "max_new_tokens": NEW, "batch_size": BATCH}
    return lambda: generator(variables, [""] * BATCH, **limits, after_batch=lambda n: None)


def main() -> None:
    """Runs everything, prints the ratios and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=4, help=f"turns per contestant, of {STEPS} counted generations")
    parser.add_argument("--experts", type=int, default=64, help="experts per site")
    options = parser.parse_args()
    names = ("zero_shot", "mora", "inc_lora")
    seconds = take_turns({name: partial(generation, name, options.experts) for name in names}, options.turns, STEPS)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "what": __doc__.splitlines()[0],
        "command": " ".join(["python", "experiments/bench_generation.py", *sys.argv[1:]]),
        "device": device(),
        "versions": versions(),
        "experts_per_site": options.experts,
        "tokens_per_second": {name: round(BATCH * NEW / value, 1) for name, value in median.items()},
        "time_over_frozen_model": {name: round(median[name] / median["zero_shot"], 3) for name in names},
        "seconds": {name: [round(v, 4) for v in values] for name, values in seconds.items()},
    }
    print(json.dumps({key: result[key] for key in ("tokens_per_second", "time_over_frozen_model")}))
    write_json(ROOT / "experiments" / "results" / "bench_generation.json", result)


if __name__ == "__main__":
    main()
