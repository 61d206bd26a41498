"""How the kernels cut their work: rows and columns that lie in fast memory at a time, by platform and size."""

from __future__ import annotations

from typing import NamedTuple

LANES = 128  # columns of a TPU vector register; tokens lie along them while gates are computed
ROWS = 16  # rows of a packed bfloat16 register: what experts are padded to
BLOCK = 128  # experts of one matrix product
TPU_VMEM = 40 << 20  # bytes a kernel may plan with: v5p has 64 MiB, v5e and v6e 128 MiB


class Tiles(NamedTuple):
    """`tokens` per tile; `inputs` and `outputs` are the columns of d_in and d_out that lie in VMEM at a time."""

    tokens: int
    inputs: int
    outputs: int


def round_up(size: int, unit: int) -> int:
    """The smallest multiple of `unit` that is not below `size`."""
    return -(-size // unit) * unit


def padded_rows(rows: int) -> int:
    """How many rows a bank of `rows` experts takes: whole blocks, or one smaller block."""
    return round_up(max(rows, 1), ROWS if rows <= BLOCK else BLOCK)


def whole_lanes(d: int, at_most: int) -> int:
    """The widest slice of d that is a whole number of lanes, divides d and is not above `at_most`."""
    if d % LANES or d <= at_most:
        return d
    return max(c for c in range(LANES, at_most + 1, LANES) if d % c == 0)


def tpu_tiles(tokens: int, d_in: int, d_out: int, rows: int, itemsize: int, backward: bool) -> Tiles | None:
    """The largest tile whose buffers fit TPU_VMEM; None where none fits.

    `rows` are the padded experts, frozen and fresh; `itemsize` is that of x in bytes, banks count as float32.
    """
    largest = 512 if rows <= 512 else 256
    for tile in (512, 256, 128):
        if tile > min(largest, round_up(tokens, LANES)):
            continue
        for at_most in (4096, 2048, 1024, 512):
            tiles = Tiles(tile, whole_lanes(d_in, at_most), whole_lanes(d_out, at_most))
            if tpu_vmem(tiles, d_in, d_out, rows, itemsize, backward) <= TPU_VMEM:
                return tiles
    return None


def tpu_vmem(tiles: Tiles, d_in: int, d_out: int, rows: int, itemsize: int, backward: bool) -> int:
    """Bytes of all buffers: pipelined blocks twice, scratch once."""
    width = tiles.inputs + tiles.outputs
    banks = 2 * 4 * rows * width
    tokens = 2 * itemsize * tiles.tokens * (width + (tiles.inputs if backward else 0))
    scratch = 4 * rows * tiles.tokens * (6 if backward else 4) + 4 * tiles.tokens * 512
    return banks + tokens + scratch + (2 * 4 * rows * (d_in + d_out) if backward and rows <= BLOCK else 0)
