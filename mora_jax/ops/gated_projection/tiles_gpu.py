"""Tile sizes of the Hopper kernels, by shape and dtype: what `compile_gpu` showed to fit the registers of an H100."""

from __future__ import annotations

from typing import NamedTuple

PROGRAMS = 132  # one for each multiprocessor, as a program takes more than half of its registers
SMALLEST = 16  # what a tensor core multiplies at least


class Tiles(NamedTuple):
    """Sizes of one program; every one a power of two, as Triton wants."""

    tokens: int  # rows of x
    experts: int  # columns of one block of frozen rows
    fresh: int  # columns of one block of fresh rows
    inputs: int  # columns of x and keys per step of a loop
    outputs: int  # columns of y and values per step of a loop
    warps: int
    stages: int  # loads in flight


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


def divisor(size: int, largest: int) -> int:
    """The largest power of two up to `largest` that divides `size`."""
    return min(size & -size, largest)


def tiles_of(kernel: str, d_in: int, d_out: int, n: int, r: int, exact: bool) -> Tiles:
    """Tiles of a kernel for keys [n, d_in], values [n, d_out] and r fresh rows; `exact` for float32 tokens."""
    block = 128 >> (exact + (kernel == "backward"))
    short = kernel == "backward" and d_in < 768  # a loop of few steps is unrolled, and then spills with wide ones
    return Tiles(
        tokens=64,
        experts=min(max(power_of_two(n), SMALLEST), block),
        fresh=min(max(power_of_two(r), SMALLEST), block, 32),
        inputs=divisor(d_in, 32 if exact or short else 64),
        outputs=divisor(d_out, 32 if exact else 64),
        warps=8,
        stages=2 if exact else 3,
    )
