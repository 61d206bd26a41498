"""Contestants of a timing comparison, each in a process of its own, that take turns.

The machines are noisy, so only the ratio of medians within one run means something. A process of its own gives each
contestant the memory to itself; turns spread the noise over all of them; a turn is a few steps on end, as in real use,
and its first is not counted, for it pays for what the contestant before it did to the caches.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection

Step = Callable[[], object]  # returns when its work is done


def seconds_of(step: Step) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def _serve(connection: Connection, make: Callable[[], Step]) -> None:
    """Takes as many steps as each message says and answers with the seconds of each."""
    step = make()
    while steps := connection.recv():
        connection.send([seconds_of(step) for _ in range(steps)])


def take_turns(contestants: Mapping[str, partial[Step]], turns: int, steps: int) -> dict[str, list[float]]:
    """Seconds of each counted step, `turns * steps` per contestant. A round before the first compiles.

    A contestant is a function that makes its step, as a `partial` that can be sent to its process.
    """
    processes = multiprocessing.get_context("spawn")
    running, seconds = {}, {name: [] for name in contestants}
    for name, make in contestants.items():
        here, there = processes.Pipe()
        process = processes.Process(target=_serve, args=(there, make), daemon=True)
        process.start()
        there.close()  # so that a contestant that dies ends the wait for its answer
        running[name] = (process, here)
    for turn in range(turns + 1):
        for name, (_, connection) in running.items():
            connection.send(1 + steps if turn else 1)
            seconds[name] += connection.recv()[1:]
    for process, connection in running.values():
        connection.send(0)
        process.join()
    return seconds
