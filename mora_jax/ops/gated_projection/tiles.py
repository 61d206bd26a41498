"""How the kernels cut their work: rows and columns that lie in fast memory at a time, by platform and size."""

from __future__ import annotations

from typing import NamedTuple

LANES = 128  # columns of a TPU vector register; tokens lie along them while gates are computed
ROWS = 16  # rows of a packed bfloat16 register: what experts are padded to
BLOCK = 128  # experts of one matrix product
SLICE = 256  # columns of d_in or d_out in one matrix product: with STRIP, the most that leaves no register spills
STRIP = {"bfloat16": 256, "float32": 128}  # tokens in one product that makes responses
MIX_STRIP = {"bfloat16": 512, "float32": 128}  # tokens in one product that takes gates
WIDEST = 2048  # columns in one product where d is no multiple of LANES and so cannot be sliced
TPU_VMEM = 40 << 20  # bytes the buffers of a kernel may take: v5p has 64 MiB, v5e and v6e 128 MiB
TPU_VMEM_LIMIT = TPU_VMEM + (12 << 20)  # with room for what the compiler keeps itself


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
    """The widest slice that divides d, in whole registers, and is not above `at_most`; d where there is none."""
    if d % LANES or d <= at_most:
        return d
    return max(c for c in range(LANES, at_most + 1, LANES) if d % c == 0)


def tpu_tiles(
    tokens: int, d_in: int, d_out: int, rows: int, itemsize: int, gradient_rows: int | None = None
) -> Tiles | None:
    """The largest tile whose buffers fit TPU_VMEM: whole rows before many tokens. None where none fits.

    `rows` are the padded experts, frozen and fresh; `itemsize` is that of x in bytes, banks count as float32;
    `gradient_rows` are the rows whose gradients gather in VMEM, None for the forward kernel.
    """
    sizes = [tile for tile in (512, 256, 128) if tile <= round_up(tokens, LANES)]
    widths = [None, 8192, 4096, 2048, 1024, 512]
    for tile, width in [(tile, None) for tile in sizes] + [(tile, w) for w in widths[1:] for tile in sizes]:
        tiles = Tiles(tile, whole_lanes(d_in, width or d_in), whole_lanes(d_out, width or d_out))
        if tpu_vmem(tiles, d_in, d_out, rows, itemsize, gradient_rows) <= TPU_VMEM:
            return tiles
    return None


def tpu_vmem(tiles: Tiles, d_in: int, d_out: int, rows: int, itemsize: int, gradient_rows: int | None) -> int:
    """Bytes of all buffers: blocks that come and go twice, scratch once."""
    width = tiles.inputs + tiles.outputs
    per_token = 2 * itemsize * width + 3 * 4 * rows + itemsize * (round_up(rows, LANES) + LANES) + 4 * SLICE
    gradients = 0
    if gradient_rows is not None:
        per_token += 2 * itemsize * tiles.inputs + 4 * rows
        gradients = 2 * 4 * gradient_rows * (d_in + d_out)
    stack = 3 * itemsize * 2 * BLOCK * max([SLICE, *(d for d in (d_in, d_out) if d % LANES)])
    return tiles.tokens * per_token + 2 * 4 * rows * width + gradients + stack
