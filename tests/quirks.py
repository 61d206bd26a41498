"""The parity mode: a run of mora_jax with quirks of the published code, so that a difference to its numbers can be
attributed.

    python tests/quirks.py --quirks=NAME,NAME|all -- ARGUMENTS OF mora_jax.train
    python tests/quirks.py --list

The published code (github.com/Artificer-AI-Lab/MoRAM) differs from its paper, and its two halves, TRACE for language
models and X-TAIL for CLIP, from each other. mora_jax has none of that: a quirk is a patch of the package that lasts as
long as its context. `published_layer.py` has the same quirks in PyTorch, and `test_quirks.py` compares the two.

The workdir of such a run says so in results.json and in the report, and the ordinary binaries refuse it: its experts
answered with the quirks, which are of the process and not in the files. What was traced outside a context stays as it
was traced: make jitted functions inside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float

from mora_jax import config as configs
from mora_jax import train
from mora_jax.errors import MoraError, unknown
from mora_jax.methods import bank as banks
from mora_jax.methods import boundaries, gates
from mora_jax.methods.method import Method
from mora_jax.metrics import continual
from mora_jax.runtime import results
from mora_jax.runtime.language import LanguageFamily
from mora_jax.runtime.optimizer import SCHEDULES

USAGE = "python tests/quirks.py --quirks=NAME,NAME|all -- ARGUMENTS OF mora_jax.train (or --list alone)"
DROPOUT = 0.1  # lora_dropout of the TRACE runs
Patch = contextlib.AbstractContextManager


# ---------------------------------------------------------------- the layer


def _scale_lost_at_freeze() -> Patch:
    update = gates.update

    def patched(x, bank, fresh, method, *others):
        return update(x, {**bank, "values": bank["values"] / method.scale}, fresh, method, *others)

    return mock.patch.object(gates, "update", patched)


def with_next_block(bank: Mapping, method: Method, seed: int) -> dict:
    """A bank with the fresh experts of the next task behind the frozen ones, as that task will begin: values 0."""
    flat = flatten_dict(bank)
    sites = {
        path[:-1]: banks.Site(keys.shape[0], keys.shape[2], flat[(*path[:-1], "values")].shape[2])
        for path, keys in flat.items()
        if path[-1] == "keys"
    }
    live = int(next(leaf for path, leaf in flat.items() if path[-1] == "live")[0])
    fresh = banks.new_fresh(sites, method, seed, live // method.rank)
    rows = -(-(live + method.rank) // method.capacity_bucket) * method.capacity_bucket
    return banks.push(banks.grow(bank, rows), fresh)


def _fresh_at_inference() -> Patch:
    predict, gate_map = LanguageFamily.predict, LanguageFamily.gate_map

    def filled(family, variables):
        if not variables.get("bank"):
            return variables
        return {**variables, "bank": with_next_block(variables["bank"], family.decoder.method, family.config["seed"])}

    return mock.patch.multiple(
        LanguageFamily,
        predict=lambda self, variables, *rest: predict(self, filled(self, variables), *rest),
        gate_map=lambda self, variables, *rest: gate_map(self, filled(self, variables), *rest),
    )


def _top_k_at_least_two() -> Patch:
    def patched(function):
        return lambda x, bank, fresh, method, *others: function(
            x, bank, fresh, dataclasses.replace(method, top_k=max(method.top_k, 2)), *others
        )

    return mock.patch.multiple(gates, update=patched(gates.update), gates=patched(gates.gates))


def _rank_below_two_fails() -> Patch:
    append = boundaries.append

    def patched(method, *rest):
        if method.rank < 2:
            raise MoraError(f"method.rank={method.rank}: the published CLIP layer selects 2 experts and finds only one")
        return append(method, *rest)

    return mock.patch.object(boundaries, "append", patched)


def dropout_keep(fresh: Mapping[str, Float[Array, "r d"]], shape: Sequence[int]) -> Bool[Array, "*shape"]:
    """Which entries of x are kept at one site in one step.

    The random key is a checksum over the bits of the site's fresh experts. No state has to be threaded through the
    model for that; sites and layers differ, and so do steps, as each of them moves the experts; a resumed run draws
    the same, and so does a backward pass that computes this again.
    """
    rows = [jax.lax.bitcast_convert_type(jax.lax.stop_gradient(leaf), jnp.uint32) for leaf in jax.tree.leaves(fresh)]
    checksum = sum(jnp.sum(bits, dtype=jnp.uint32) for bits in rows)
    return jax.random.bernoulli(jax.random.key(checksum), 1.0 - DROPOUT, shape)


def _dropout_before_scoring() -> Patch:
    update = gates.update

    def patched(x, bank, fresh, *others):
        if fresh is not None:
            x = jnp.where(dropout_keep(fresh, x.shape), x / (1.0 - DROPOUT), 0.0).astype(x.dtype)
        return update(x, bank, fresh, *others)

    return mock.patch.object(gates, "update", patched)


# ---------------------------------------------------------------- the schedule and the metrics


def _constant_despite_cosine() -> Patch:
    return mock.patch.dict(SCHEDULES, cosine=SCHEDULES["constant"])


def _transfer_ignores_zeros() -> Patch:
    def patched(R):
        R = np.asarray(R, np.float64)
        above = [R[:i, i][R[:i, i] != 0] for i in range(1, len(R))]
        means = [np.mean(column) for column in above if column.size]  # a column of zeros is gone altogether
        return float(np.mean(means)) if means else math.nan

    return mock.patch.object(continual, "transfer", patched)


def _clipped_backward_transfer() -> Patch:
    backward_transfer = continual.backward_transfer

    def patched(R, clipped=False):
        return backward_transfer(R, clipped=True)

    return mock.patch.object(continual, "backward_transfer", patched)


# ---------------------------------------------------------------- the table


class Quirk(NamedTuple):
    """`item`: differences are numbered 1 to 7, and one that shows in two ways has two rows; `half`: of that code."""

    item: int
    half: str
    changes: str
    patch: Callable[[], Patch]


# Item 4, a threshold after the softmax without normalising again, is the paper's own Eq. 8: no quirk.
QUIRKS: Mapping[str, Quirk] = {
    "scale_lost_at_freeze": Quirk(
        1, "TRACE", "the scale applies to fresh experts only: at scale 2 a task's part halves when it is frozen",
        _scale_lost_at_freeze,
    ),
    "fresh_at_inference": Quirk(
        2, "TRACE", "the next task's untrained experts take part in norm, top-k and softmax at inference",
        _fresh_at_inference,
    ),
    "top_k_at_least_two": Quirk(3, "both", "method.top_k=1 means 2", _top_k_at_least_two),
    "rank_below_two_fails": Quirk(3, "CLIP", "method.rank=1 is an error", _rank_below_two_fails),
    "constant_despite_cosine": Quirk(
        5, "TRACE", "train.schedule=cosine leaves the learning rate constant", _constant_despite_cosine
    ),
    "dropout_before_scoring": Quirk(
        6, "TRACE", "in training a tenth of x is dropped before it is scored", _dropout_before_scoring
    ),
    "transfer_ignores_zeros": Quirk(7, "CLIP", "true zeros do not count in transfer", _transfer_ignores_zeros),
    "clipped_backward_transfer": Quirk(
        7, "TRACE", "backward_transfer cuts gains to zero and divides by all tasks", _clipped_backward_transfer
    ),
}  # fmt: skip


@contextlib.contextmanager
def quirks(*names: str) -> Iterator[None]:
    """The package with these quirks, and as it was afterwards. Raises MoraError for an unknown name."""
    for name in names:
        if name not in QUIRKS:
            raise unknown("quirk", name, QUIRKS)
    with contextlib.ExitStack() as stack:
        for name in dict.fromkeys(names):
            stack.enter_context(QUIRKS[name].patch())
        yield


# ---------------------------------------------------------------- the command


@contextlib.contextmanager
def recorded(names: Sequence[str], command: str) -> Iterator[None]:
    """Every results.json says the names, and the method of the run carries them: into its report, its fingerprint and
    its checkpoints, where the ordinary binaries do not know it.
    """
    parse_ordinary, write = configs.parse, results.write_json
    which = "all published quirks" if set(names) == set(QUIRKS) else f"published quirks {', '.join(sorted(names))}"

    def parse_with_names(argv: Sequence[str]) -> configs.Invocation:
        invocation = parse_ordinary(argv)
        if invocation.config is not None:
            with invocation.config.unlocked():
                invocation.config.method.name += f" with {which}"
        return invocation

    def write_with_names(path: Path, content: Mapping[str, Any]) -> None:
        write(path, {**content, "quirks": list(names), "command": command})

    with (
        mock.patch.object(configs, "parse", parse_with_names),
        mock.patch.object(results, "write_json", write_with_names),
    ):
        yield


def parse(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of quirks and the arguments for the train binary; no names where the table is asked for."""
    own, theirs = list(argv), []
    if "--" in own:
        at = own.index("--")
        own, theirs = own[:at], own[at + 1 :]
    options, _ = configs.split(own, ("quirks",), flags=("list",))
    if "list" in options:
        return [], []
    configs.require(options, ("quirks",), USAGE)
    asked = options["quirks"]
    names = list(QUIRKS) if asked == "all" else configs.names(asked)
    for name in names or [asked]:
        if name not in QUIRKS:
            raise unknown("quirk", name, ("all", *QUIRKS))
    return names, theirs


def print_table() -> None:
    """What --list prints."""
    width = max(map(len, QUIRKS))
    for name, quirk in QUIRKS.items():
        print(f"{name:{width}}  {quirk.item}  {quirk.half:5}  {quirk.changes}")


def main() -> int:
    """The exit code of the train binary; 2 after an error of this command line, told in one line."""
    if {"-h", "--help"} & set(sys.argv[1:2]):
        print(USAGE)
        return 0
    try:
        names, arguments = parse(sys.argv[1:])
    except MoraError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if not names:
        print_table()
        return 0
    command = shlex.join(["python", "tests/quirks.py", *sys.argv[1:]])
    with quirks(*names), recorded(names, command), mock.patch.object(sys, "argv", ["mora_jax.train", *arguments]):
        return train.main()


if __name__ == "__main__":
    sys.exit(main())
