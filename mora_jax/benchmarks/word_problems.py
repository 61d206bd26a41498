"""Templates of arithmetic word problems; answers show their working in a line that ends in a number from 0 to 99."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """A word problem: text with {n}, {m} (names), {o} (things) and {a}, {b}, {c} (numbers from `ranges`).

    `answer` gives None for numbers that make no sense, such as a division with a remainder.
    """

    text: str
    ranges: tuple[range, ...]
    working: str  # with {a}, {b}, {c}: the answer shows it, since a small model cannot do sums in its head
    answer: Callable[..., int | None]

    def problems(self) -> list[tuple[int, ...]]:
        """All legal numbers, in order: those with an answer from 0 to 99."""
        answers = ((numbers, self.answer(*numbers)) for numbers in itertools.product(*self.ranges))
        return [numbers for numbers, answer in answers if answer is not None and 0 <= answer <= 99]


SOME, FEW, TIMES, SHARED = range(5, 70), range(2, 30), range(2, 13), range(4, 100)
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Iris", "Jon", "Kim", "Leo", "Mia", "Noah", "Olga")
THINGS = ("apples", "books", "buttons", "cards", "coins", "eggs", "flowers", "marbles", "pencils", "shells", "stamps")


def quotient(a: int, b: int) -> int | None:
    """a / b where that is a whole number above 1, else None."""
    return a // b if a % b == 0 and a > b else None


TEMPLATES = (
    Template(
        "{n} has {a} {o}. {m} gives {n} {b} more. How many {o} does {n} have now?",
        (SOME, FEW),
        "{a} + {b}",
        lambda a, b: a + b,
    ),
    Template(
        "There are {a} {o} on the table and {b} {o} in a box. How many {o} are there?",
        (SOME, SOME),
        "{a} + {b}",
        lambda a, b: a + b,
    ),
    Template(
        "{n} has {a} {o} and gives {b} of them to {m}. How many {o} does {n} keep?",
        (SOME, FEW),
        "{a} - {b}",
        lambda a, b: a - b,
    ),
    Template(
        "{n} needs {a} {o} but has only {b}. How many {o} are missing?", (SOME, SOME), "{a} - {b}", lambda a, b: a - b
    ),
    Template(
        "{n} has {a} {o}. {m} has {b} fewer. How many {o} does {m} have?",
        (SOME, FEW),
        "{a} - {b}",
        lambda a, b: a - b,
    ),
    Template(
        "{n} fills {a} bags with {b} {o} each. How many {o} are in the bags?",
        (TIMES, TIMES),
        "{a} * {b}",
        lambda a, b: a * b,
    ),
    Template(
        "A shop has {a} shelves with {b} {o} on each. How many {o} are there?",
        (TIMES, TIMES),
        "{a} * {b}",
        lambda a, b: a * b,
    ),
    Template(
        "{n} has {a} {o}. {m} has {b} times as many. How many {o} does {m} have?",
        (FEW, TIMES),
        "{a} * {b}",
        lambda a, b: a * b,
    ),
    Template(
        "{n} shares {a} {o} equally among {b} friends. How many {o} does each get?",
        (SHARED, TIMES),
        "{a} / {b}",
        quotient,
    ),
    Template(
        "{a} {o} are packed into boxes of {b}. How many boxes are filled?", (SHARED, TIMES), "{a} / {b}", quotient
    ),
    Template(
        "{n} has {a} {o}, buys {b} more and loses {c}. How many {o} are left?",
        (SOME, FEW, TIMES),
        "{a} + {b} - {c}",
        lambda a, b, c: a + b - c,
    ),
    Template(
        "{n} had {a} {o}, sold {b} on Monday and {c} on Tuesday. How many {o} are left?",
        (SOME, FEW, FEW),
        "{a} - {b} - {c}",
        lambda a, b, c: a - b - c,
    ),
    Template(
        "{n} found {a} {o} on Friday, {b} on Saturday and {c} on Sunday. How many {o} is that?",
        (FEW, FEW, FEW),
        "{a} + {b} + {c}",
        lambda a, b, c: a + b + c,
    ),
    Template(
        "{n} buys {a} packs of {b} {o} and had {c} {o} before. How many {o} does {n} have now?",
        (TIMES, TIMES, FEW),
        "{a} * {b} + {c}",
        lambda a, b, c: a * b + c,
    ),
    Template(
        "{n} buys {a} packs of {b} {o} and gives {c} {o} to {m}. How many {o} does {n} keep?",
        (TIMES, TIMES, FEW),
        "{a} * {b} - {c}",
        lambda a, b, c: a * b - c,
    ),
    Template(
        "{n} has {a} {o} and {m} has {b}. They share all {o} equally. How many does each get?",
        (SOME, FEW),
        "({a} + {b}) / 2",
        lambda a, b: quotient(a + b, 2),
    ),
)
