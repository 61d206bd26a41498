"""How fast is a train step? MoRA against plain LoRA of equal rank here, and against the published layer in PyTorch.

Command    python experiments/bench_train_step.py [--steps 5] [--no-torch]
Needs      torch and transformers (requirements-dev.txt) for the PyTorch column
Result     experiments/results/bench_train_step.json

Shape: SmolLM2-135M with random weights, 8 x 128 tokens, q, k, v, o adapted, float32, the loss on the last quarter of
the positions. n experts per site, 8 of them trainable. The machines are noisy, so the contestants take turns, and what
to quote is the ratio of medians within one run. "published" is our transcription of the layer that the authors describe
(arXiv 2506.21035, Eq. 4 to 8; top-k, scatter, alpha / r on the fresh values) inside transformers' Llama, with its loss
over the whole sequence; it is here to compare speed and shares no code with theirs.
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
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from mora_jax.methods import bank as banks
from mora_jax.methods.method import from_config
from mora_jax.methods.presets import preset
from mora_jax.models.decoder import Decoder
from mora_jax.models.decoder_config import DecoderConfig
from mora_jax.runtime.language import answer_loss
from mora_jax.runtime.optimizer import make_optimizer
from mora_jax.runtime.results import device, versions
from mora_jax.runtime.state import TrainState
from mora_jax.runtime.step import TrainStep
from mora_jax.runtime.writers import write_json

ROOT = Path(__file__).resolve().parent.parent
BATCH, LENGTH, ANSWER, FRESH = 8, 128, 32, 8
EXPERTS = (8, 64, 160)
SMOLLM2 = DecoderConfig(
    vocab_size=49152,
    d_model=576,
    d_ff=1536,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    rope_theta=1e5,
    norm_eps=1e-5,
    tie_embeddings=True,
    max_positions=8192,
)
OPTIMIZER = {"clip_norm": 1.0, "adam_b1": 0.9, "adam_b2": 0.95, "weight_decay": 0.0}


def random_params() -> dict:
    """SmolLM2-shaped weights; their values do not matter to the clock."""
    decoder = Decoder(SMOLLM2)
    shapes = jax.eval_shape(
        lambda: decoder.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), method=Decoder.initialise)
    )["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(0.02 * rng.standard_normal(s.shape, dtype=np.float32)), shapes)


def jax_step(name: str, experts: int, params: dict, remat: str) -> Callable[[], None]:
    """One train step of a preset with a full bank of `experts` - 8 rows, as a function that returns when it is done."""
    axes = {"targets": "attn/q,attn/k,attn/v,attn/o", "capacity_bucket": 1}
    method = from_config(preset(name) | axes)
    decoder = Decoder(SMOLLM2, method, remat=remat)
    kinds = {p[:-1]: "/".join(p[1:-1]) for p in flatten_dict(params) if p[0] == "layers" and p[-1] == "kernel"}
    sites = banks.find_sites(params, kinds, method)
    rng = np.random.default_rng(1)
    frozen = experts - FRESH
    bank = banks.empty(sites, max(frozen, 1))
    if frozen:
        bank = jax.tree.map(
            lambda leaf: (
                jnp.asarray(0.02 * rng.standard_normal(leaf.shape, dtype=np.float32))
                if leaf.ndim == 3
                else jnp.full_like(leaf, frozen)
            ),
            bank,
        )
    optimizer = make_optimizer(OPTIMIZER)
    step = TrainStep(lambda variables, batch: answer_loss(decoder, variables, batch), optimizer, "constant", 1e-3)
    state = TrainState.create(banks.new_fresh(sites, method, 0, 0), optimizer)
    batch = {
        "tokens": jnp.asarray(rng.integers(0, SMOLLM2.vocab_size, (BATCH, LENGTH)), jnp.int32),
        "prompt": jnp.full((BATCH,), LENGTH - ANSWER, jnp.int32),
        "length": jnp.full((BATCH,), LENGTH, jnp.int32),
        "answers": jnp.arange(ANSWER, dtype=jnp.int32),
    }
    horizon = jnp.float32(100)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, params, bank, horizon, batch)
        jax.block_until_ready(metrics)

    return run


def torch_step(experts: int) -> Callable[[], None]:
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
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOLLM2.to_hf()))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Published(getattr(layer.self_attn, name)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3, betas=(0.9, 0.95))
    tokens = torch.randint(0, SMOLLM2.vocab_size, (BATCH, LENGTH))
    labels = tokens.clone()
    labels[:, : LENGTH - ANSWER] = -100

    def run() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return run


def take_turns(contestants: dict[str, Callable[[], None]], steps: int) -> dict[str, list[float]]:
    """Seconds of each step; every contestant has one go, then the next round starts. One uncounted go each first."""
    for run in contestants.values():
        run()
    seconds = {name: [] for name in contestants}
    for _ in range(steps):
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


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
    parser.add_argument("--steps", type=int, default=5, help="counted steps per contestant")
    parser.add_argument("--no-torch", action="store_true", help="leave the PyTorch column out")
    parser.add_argument("--remat", default="dots", help="none, dots or full")
    options = parser.parse_args()
    params = random_params()
    rows = []
    for experts in EXPERTS:
        contestants = {name: jax_step(name, experts, params, options.remat) for name in ("mora", "inc_lora")}
        if not options.no_torch:
            contestants["published_pytorch"] = torch_step(experts)
        seconds = take_turns(contestants, options.steps)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        row = {
            "experts_per_site": experts,
            "seconds": {name: [round(v, 4) for v in values] for name, values in seconds.items()},
            "tokens_per_second": {name: round(BATCH * LENGTH / value, 1) for name, value in median.items()},
            "mora_over_lora_time": round(median["mora"] / median["inc_lora"], 3),
        }
        if "published_pytorch" in median:
            row["speedup_over_published_pytorch"] = round(median["published_pytorch"] / median["mora"], 3)
        rows.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "seconds"}), flush=True)
    result = {
        "what": __doc__.splitlines()[0],
        "command": " ".join(["python", "experiments/bench_train_step.py", *sys.argv[1:]]),
        "device": device(),
        "versions": versions(),
        "remat": options.remat,
        "rows": rows,
        "seconds_to_first_step": start_up(),
    }
    if not options.no_torch:
        import torch
        import transformers

        result["versions"] |= {"torch": torch.__version__, "transformers": transformers.__version__}
    write_json(ROOT / "experiments" / "results" / "bench_train_step.json", result)


if __name__ == "__main__":
    main()
