"""How fast is a train step? MoRA against plain LoRA of equal rank here, and against the published layer in PyTorch.

Command    python experiments/bench_train_step.py [--turns 3] [--experts 8,64,160] [--no-torch]
Needs      torch and transformers (requirements-dev.txt) for the PyTorch column
Result     experiments/results/bench_train_step.json

Shape: SmolLM2-135M, 8 x 128 tokens, q, k, v, o adapted, float32, the loss on the last quarter of the positions. n
experts per site, 8 of them trainable. The contestants take turns as `turns.py` says: quote the ratio of medians.
"published" is our transcription of the layer that the authors describe (arXiv 2506.21035, Eq. 4 to 8; top-k, scatter,
alpha / r on the fresh values) inside transformers' Llama, with its loss over the whole sequence; it is here to compare
speed and shares no code with theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from contestants import train_step
from turns import Step, take_turns

from mora_jax.config import load
from mora_jax.methods.method import from_config
from mora_jax.models.families import to_hf
from mora_jax.models.registry import load_model
from mora_jax.runtime.distributed import make_mesh
from mora_jax.runtime.language import LanguageFamily
from mora_jax.runtime.results import device, versions
from mora_jax.runtime.writers import write_json

ROOT = Path(__file__).resolve().parent.parent
CONFIG = str(ROOT / "configs/llm_cl.py")
BATCH, LENGTH, ANSWER, FRESH = 8, 128, 32, 8
STEPS = 3  # counted, in a turn


def jax_step(name: str, experts: int, remat: str) -> Step:
    """One train step of a preset with a full bank of `experts` - 8 rows, as a function that returns when it is done."""
    config = load(f"{CONFIG}:model=smollm2-135m,method={name}", {"method.capacity_bucket": "1", "model.remat": remat})
    method = from_config(config.method, config.kernel)
    family = LanguageFamily(load_model(config.model, 0), method, config, make_mesh(config.mesh))
    rng = np.random.default_rng(1)
    rows = {
        "tokens": rng.integers(0, family.decoder.config.vocab_size, (BATCH, LENGTH), dtype=np.int32),
        "prompt": np.full((BATCH,), LENGTH - ANSWER, np.int32),
        "length": np.full((BATCH,), LENGTH, np.int32),
        "answers": np.arange(ANSWER, dtype=np.int32)[None],
    }
    return train_step(family, method, config, experts - FRESH, rows)


def torch_step(experts: int) -> Step:
    """The same step with the published layer in PyTorch."""
    import torch
    import transformers

    class Published(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear):
            super().__init__()
            self.base = base
            old = experts - FRESH
            self.old_keys = torch.nn.Parameter(0.02 * torch.randn(old, base.in_features), requires_grad=False)
            self.old_values = torch.nn.Parameter(0.02 * torch.randn(old, base.out_features), requires_grad=False)
            self.keys = torch.nn.Parameter(0.02 * torch.randn(FRESH, base.in_features))
            self.values = torch.nn.Parameter(torch.zeros(FRESH, base.out_features))

        def forward(self, x):
            keys = torch.cat([self.old_keys, self.keys])
            values = torch.cat([self.old_values, 2.0 * self.values])
            z = torch.nn.functional.linear(x, keys)
            s = torch.nn.functional.normalize(z, dim=-1)
            top, index = torch.topk(s, min(8, experts), dim=-1)
            g = torch.zeros_like(s).scatter(-1, index, torch.softmax(top / 0.03, dim=-1))
            return self.base(x) + (g * z) @ values

    torch.manual_seed(0)
    sizes = load_model(load(CONFIG, {}).model, 0).config
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**to_hf(sizes)))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Published(getattr(layer.self_attn, name)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3, betas=(0.9, 0.95))
    tokens = torch.randint(0, sizes.vocab_size, (BATCH, LENGTH))
    labels = tokens.clone()
    labels[:, : LENGTH - ANSWER] = -100

    def run() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return run


def compare(seconds: Mapping[str, Sequence[float]], experts: int) -> dict:
    """A row of the result, printed as it comes."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    row = {
        "experts_per_site": experts,
        "tokens_per_second": {name: round(BATCH * LENGTH / value, 1) for name, value in median.items()},
        "mora_over_lora_time": round(median["mora"] / median["inc_lora"], 3),
    }
    if "published_pytorch" in median:
        row["speedup_over_published_pytorch"] = round(median["published_pytorch"] / median["mora"], 3)
    print(json.dumps(row), flush=True)
    return row | {"seconds": {name: [round(v, 4) for v in values] for name, values in seconds.items()}}


def start_up() -> dict[str, float]:
    """Seconds from launching the real binary to its first finished train step, the compilation cache cold and warm."""
    times = {}
    with tempfile.TemporaryDirectory() as folder:
        for start in ("first", "second"):
            workdir = Path(folder) / start
            command = [sys.executable, "-m", "mora_jax.train", "--config=configs/llm_cl.py", f"--workdir={workdir}"]
            command += ["--config.benchmark.tasks=arithmetic", "--config.benchmark.eval_limit=1"]
            command += ["--config.train.steps_per_task=1", "--config.log.every_steps=1", "--config.eval.batch_size=1"]
            environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "cache")}
            began = time.time()
            subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
            times[start] = round((workdir / "metrics.jsonl").stat().st_mtime - began, 1)
    return times


def main() -> None:
    """Runs everything, prints a line per contestant and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3, help=f"turns per contestant, of {STEPS} counted steps")
    parser.add_argument("--experts", default="8,64,160", help="comma list of experts per site")
    parser.add_argument("--no-torch", action="store_true", help="leave the PyTorch column out")
    parser.add_argument("--no-start", action="store_true", help="leave the seconds to the first step out")
    parser.add_argument("--remat", default="dots", help="none, dots or full")
    options = parser.parse_args()
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # as launch.sh does
    rows = []
    for experts in map(int, options.experts.split(",")):
        contestants = {name: partial(jax_step, name, experts, options.remat) for name in ("mora", "inc_lora")}
        if not options.no_torch:
            contestants["published_pytorch"] = partial(torch_step, experts)
        rows.append(compare(take_turns(contestants, options.turns, STEPS), experts))
    result = {
        "what": __doc__.splitlines()[0],
        "command": " ".join(["python", "experiments/bench_train_step.py", *sys.argv[1:]]),
        "device": device(),
        "versions": versions(),
        "remat": options.remat,
        "rows": rows,
        "seconds_to_first_step": None if options.no_start else start_up(),
    }
    if not options.no_torch:
        import torch
        import transformers

        result["versions"] |= {"torch": torch.__version__, "transformers": transformers.__version__}
    write_json(ROOT / "experiments" / "results" / "bench_train_step.json", result)


if __name__ == "__main__":
    main()
