"""How fast is the gated projection? Against the frozen layer, plain LoRA of equal rank, lax.top_k and PyTorch.

Command    python experiments/bench_gated_projection.py [--widths 768,2048,4096] [--experts 16,160,512,1024]
Needs      torch (requirements-dev.txt) for the PyTorch column
Result     experiments/results/bench_gated_projection_PLATFORM.json

A layer of width d x d with n experts of which 16 are fresh, 2048 tokens, float32, k = 8, tau = 0.03; the backward pass
gives the gradients of x and of the fresh rows, beside the output. The contestants are
    frozen     W x alone
    lora       W x + LoRA of rank n whose last 16 ranks train, written plainly: the comparator
    mora       W x + gated_projection, the implementation of the platform
    top_k      the same with jax.lax.top_k as selection
    published  our transcription of the layer that the authors describe (arXiv 2506.21035, Eq. 4 to 8) in PyTorch, in a
               process of its own
which take turns within one run; what to quote is the ratio of medians, for the machines are noisy. `decode` is 8 tokens
before a bank of 1024 at d = 4096: reading the selected values against computing every value. On a machine with a TPU or
GPU the same command times the kernels there, with the whole computation on the device.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from turns import Step, seconds_of

from mora_jax.ops.gated_projection import gated_projection, xla, xla_gathered
from mora_jax.runtime.results import device, versions
from mora_jax.runtime.writers import write_json

ROOT = Path(__file__).resolve().parent.parent
TOKENS, FRESH, TOP_K, TAU = 2048, 16, 8, 0.03
DECODE_TOKENS, DECODE_EXPERTS, DECODE_WIDTH = 8, 1024, 4096
ENOUGH = 4.0  # seconds to measure at least, so that short calls are repeated often


def arrays(d: int, n: int) -> list[np.ndarray]:
    """x, W, frozen keys and values, fresh keys and values, dy."""
    rng = np.random.default_rng(d + n)
    shapes = [(TOKENS, d), (d, d), (n - FRESH, d), (n - FRESH, d), (FRESH, d), (FRESH, d), (TOKENS, d)]
    return [rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02) for shape in shapes]


def plain_lora(x, keys, values, fresh_keys, fresh_values):
    """(x A') B, frozen and fresh ranks apart, so that the frozen ones have no gradient."""
    return jnp.dot(jnp.dot(x, keys.T), values) + jnp.dot(jnp.dot(x, fresh_keys.T), fresh_values)


def mora(x, keys, values, fresh_keys, fresh_values):
    """The op as the layer calls it while a task is taught."""
    fresh = {"fresh_keys": fresh_keys, "fresh_values": fresh_values}
    return gated_projection(x, keys, values, **fresh, top_k=TOP_K, temperature=TAU)


def kept_by_top_k(s, exists, k):
    """The selection by jax.lax.top_k, as a mask [n, t]."""
    _, index = jax.lax.top_k(s.T, k)
    return jax.nn.one_hot(index, s.shape[0], dtype=bool).any(axis=1).T & exists


def top_by_top_k(z, exists, k):
    """The same as values and rows [k, t]."""
    return tuple(rows.T for rows in jax.lax.top_k(jnp.where(exists, z, -jnp.inf).T, k))


CONTESTANTS = {"frozen": None, "lora": plain_lora, "mora": mora, "top_k": mora}


def jax_steps(d: int, n: int, backward: bool) -> dict[str, Step]:
    """One call of every contestant, compiled."""
    x, w, *rows, dy = jax.device_put(arrays(d, n))

    def layer(update):
        def y(x, w, keys, values, fresh_keys, fresh_values):
            added = 0.0 if update is None else update(x, keys, values, fresh_keys, fresh_values)
            return jnp.dot(x, w) + added

        def gradients(x, w, keys, values, fresh_keys, fresh_values, dy):
            out, vjp = jax.vjp(lambda x, fk, fv: y(x, w, keys, values, fk, fv), x, fresh_keys, fresh_values)
            return out, vjp(dy)

        return gradients if backward else lambda *arguments: y(*arguments[:-1])

    steps = {}
    for name, update in CONTESTANTS.items():
        jax.clear_caches()  # or the op would be traced with the selection of the contestant before
        by_top_k = name == "top_k"
        with (
            mock.patch.object(xla, "_kept_by_rounds", kept_by_top_k if by_top_k else xla._kept_by_rounds),
            mock.patch.object(xla_gathered, "top", top_by_top_k if by_top_k else xla_gathered.top),
        ):
            compiled = jax.jit(layer(update)).lower(x, w, *rows, dy).compile()
        steps[name] = lambda compiled=compiled: jax.block_until_ready(compiled(x, w, *rows, dy))
    return steps


def torch_step(d: int, n: int, backward: bool) -> Step:
    """One call of the published layer in PyTorch."""
    import torch

    x, w, keys, values, fresh_keys, fresh_values, dy = map(torch.from_numpy, arrays(d, n))
    trained = [a.requires_grad_(backward) for a in (x, fresh_keys, fresh_values)]

    def layer():
        all_keys, all_values = torch.cat([keys, fresh_keys]), torch.cat([values, fresh_values])
        z = torch.nn.functional.linear(x, all_keys)
        s = torch.nn.functional.normalize(z, dim=-1)
        top, index = torch.topk(s, TOP_K, dim=-1)
        g = torch.zeros_like(s).scatter(-1, index, torch.softmax(top / TAU, dim=-1))
        return torch.nn.functional.linear(x, w.T) + (g * z) @ all_values

    return (lambda: torch.autograd.grad(layer(), trained, dy)) if backward else layer


def serve_torch(connection: Connection) -> None:
    """The PyTorch process: makes a step for every (d, n, backward), answers each empty message with the seconds."""
    while (message := connection.recv()) is not None:
        if message:
            step = torch_step(*message)
        connection.send(seconds_of(step))


def take_turns(steps: dict[str, Step], rounds: int, torch: Connection | None) -> dict[str, list[float]]:
    """Seconds of every contestant in every round, at least so many; two calls each, of which the second counts."""
    seconds: dict[str, list[float]] = {name: [] for name in (*steps, *(["published"] if torch else []))}
    started = time.perf_counter()
    while len(next(iter(seconds.values()))) < rounds or time.perf_counter() - started < ENOUGH:
        for name, step in steps.items():
            step()
            seconds[name].append(seconds_of(step))
        if torch:
            for _ in range(2):
                torch.send(())
                last = torch.recv()
            seconds["published"].append(last)
    return seconds


def compare(d: int, n: int, backward: bool, rounds: int, torch: Connection | None) -> dict:
    """A row of the result, printed as it comes."""
    if torch:
        torch.send((d, n, backward))
        torch.recv()
    seconds = take_turns(jax_steps(d, n, backward), rounds, torch)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    row = {
        "d": d,
        "experts": n,
        "pass": "forward+backward" if backward else "forward",
        "milliseconds": {name: round(1e3 * value, 2) for name, value in median.items()},
        "over_lora": round(median["mora"] / median["lora"], 3),
        "more_than_lora_ms": round(1e3 * (median["mora"] - median["lora"]), 2),
        "top_k_over_mora": round(median["top_k"] / median["mora"], 3),
        "published_over_mora": round(median["published"] / median["mora"], 3) if torch else None,
    }
    print(json.dumps(row), flush=True)
    return row | {"spread": {name: [round(1e3 * f(v), 2) for f in (min, max)] for name, v in seconds.items()}}


def growth(rows: Sequence[dict]) -> list[dict]:
    """Milliseconds per expert, from a straight line through the medians over n, and their ratio, for every width."""
    found = []
    for d in sorted({row["d"] for row in rows}):
        mine = [row for row in rows if row["d"] == d and row["pass"] == "forward+backward"]
        if len(mine) > 1:
            n = [row["experts"] for row in mine]
            slope = {
                name: np.polyfit(n, [row["milliseconds"][name] for row in mine], 1)[0] for name in ("mora", "lora")
            }
            slopes = {f"{name}_ms_per_expert": round(float(value), 4) for name, value in slope.items()}
            found.append({"d": d, **slopes, "ratio": round(float(slope["mora"] / slope["lora"]), 3)})
    return found


def decode(rounds: int) -> dict:
    """A few tokens before a large bank."""
    rng = np.random.default_rng(0)
    shapes = [(DECODE_TOKENS, DECODE_WIDTH), *[(DECODE_EXPERTS, DECODE_WIDTH)] * 2]
    x, keys, values = jax.device_put([rng.standard_normal(shape, dtype=np.float32) for shape in shapes])
    how = xla.Selection(TOP_K, TAU, 0.2, "absolute")
    live = jnp.int32(DECODE_EXPERTS)

    def selected(x, keys, values):
        return gated_projection(
            x, keys, values, live=live, top_k=TOP_K, temperature=TAU, threshold=how.threshold, threshold_mode="absolute"
        )

    def every(x, keys, values):
        return xla._forward(x, keys, values, None, None, live, how)[0]

    steps = {}
    for name, function in {"selected": selected, "every": every}.items():
        compiled = jax.jit(function).lower(x, keys, values).compile()
        steps[name] = lambda compiled=compiled: jax.block_until_ready(compiled(x, keys, values))
    median = {name: statistics.median(values) for name, values in take_turns(steps, 10 * rounds, None).items()}
    row = {
        "tokens": DECODE_TOKENS,
        "experts": DECODE_EXPERTS,
        "d": DECODE_WIDTH,
        "milliseconds": {name: round(1e3 * value, 3) for name, value in median.items()},
        "every_over_selected": round(median["every"] / median["selected"], 3),
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Runs everything and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="768,2048,4096", help="comma list of d")
    parser.add_argument("--experts", default="16,160,512,1024", help="comma list of n, fresh ones included")
    parser.add_argument("--rounds", type=int, default=7, help="counted calls of each contestant, at least")
    parser.add_argument("--no-torch", action="store_true", help="leave the PyTorch column out")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # PyTorch's threads must not spin while the others compute
    connection = None
    if not options.no_torch:
        processes = multiprocessing.get_context("spawn")
        connection, there = processes.Pipe()
        processes.Process(target=serve_torch, args=(there,), daemon=True).start()
    widths, experts = (list(map(int, text.split(","))) for text in (options.widths, options.experts))
    cells = [(d, n, backward) for d in widths for n in experts for backward in (False, True)]
    rows = [compare(*cell, options.rounds, connection) for cell in cells]
    result = {
        "what": __doc__.splitlines()[0],
        "command": " ".join(["python", "experiments/bench_gated_projection.py", *sys.argv[1:]]),
        "device": device(),
        "versions": versions(),
        "tokens": TOKENS,
        "rows": rows,
        "growth": growth(rows),
        "decode": decode(options.rounds),
    }
    if connection:
        import torch

        connection.send(None)
        result["versions"]["torch"] = torch.__version__
    print(json.dumps(result["growth"]))
    if not options.no_write:
        name = f"bench_gated_projection_{jax.default_backend()}.json"
        write_json(ROOT / "experiments" / "results" / name, result)


if __name__ == "__main__":
    main()
