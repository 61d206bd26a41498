"""What happens between two tasks, in two halves.

Freeze: the fresh experts become rows of the bank; evaluation and the task's checkpoint come after it and see the bank
alone, for every boundary. Append: at the start of the next task the experts to train are made or taken back. What
differs between boundaries is one row of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from mora_jax.methods import bank as banks

if TYPE_CHECKING:
    from mora_jax.methods.method import Method


def _new_block(method: Method, sites: banks.Sites, bank: Mapping, seed: int, task: int) -> tuple[dict, dict]:
    return bank, banks.new_fresh(sites, method, seed, task)


def _last_block(method: Method, sites: banks.Sites, bank: Mapping, seed: int, task: int) -> tuple[dict, dict]:
    return banks.pop(bank, method.rank) if task else _new_block(method, sites, bank, seed, task)


class Boundary(NamedTuple):
    """`blocks(task)`: blocks of `rank` experts in the bank after that task; `open`: what the next task trains.

    `lasting`: no later task changes a row, so that the bank after any task is the first rows of every later bank.
    """

    blocks: Callable[[int], int]
    open: Callable[..., tuple[dict, dict]]
    lasting: bool


BOUNDARIES: Mapping[str, Boundary] = {
    # old experts stay as they are, each task adds its own
    "append": Boundary(blocks=lambda task: task + 1, open=_new_block, lasting=True),
    # one block is trained on through all tasks
    "continue": Boundary(blocks=lambda task: min(task + 1, 1), open=_last_block, lasting=False),
}


def freeze(bank: Mapping, fresh: Mapping) -> dict:
    """The first half, after a task: no output changes, as an expert keeps its scale for life."""
    return banks.push(bank, fresh)


def append(method: Method, sites: banks.Sites, bank: Mapping, seed: int, task: int) -> tuple[dict, dict]:
    """The second half, before task `task` (0-based): a bank with room for the task, and its fresh experts."""
    return BOUNDARIES[method.boundary].open(method, sites, banks.grow(bank, method.capacity(task)), seed, task)
