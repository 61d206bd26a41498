"""Splits drawn from pools of labelled items, for the benchmarks that draw their own."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TypeVar

# In the order in which records are handed out: where a source runs short, the train split is the shorter one.
SIZES = {"test": 200, "eval": 200, "train": 1000}

Item = TypeVar("Item")


def balanced(
    pools: Mapping[str, list[Item]], sizes: Mapping[str, int], rng: random.Random
) -> dict[str, list[tuple[Item, str]]]:
    """Splits of (item, label), each a run of blocks that hold every label once, in random order within the block.

    pools: items by label; no item is in two splits. sizes: records by split, in the order in which they are handed out.
    A block cut short at the end of a split is dropped, so that no label runs ahead over the splits.
    """
    pools = {label: list(pools[label]) for label in sorted(pools)}
    for pool in pools.values():
        rng.shuffle(pool)
    splits: dict[str, list[tuple[Item, str]]] = {}
    for split, size in sizes.items():
        splits[split] = []
        while len(splits[split]) < size and all(pools.values()):
            block = [(pool.pop(), label) for label, pool in pools.items()]
            rng.shuffle(block)
            splits[split] += block
        del splits[split][size:]
    return splits
