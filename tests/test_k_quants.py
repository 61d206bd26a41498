"""The K-quants of GGUF: superblocks of 256 weights, packed here field by field as ggml's struct comments say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import test_gguf
from test_gguf import Block, as_bytes, assert_loaded, halves, write_gguf

from mora_jax.models.decoder_config import DecoderConfig
from mora_jax.models.gguf import TENSOR_TYPES, load_params

WIDE = DecoderConfig(**(vars(test_gguf.TINY) | {"d_model": 256, "d_ff": 256, "head_dim": 64, "layers": 1}))


def bytes_of(values: np.ndarray) -> np.ndarray:
    return values.astype(np.uint8)


def codes_of(rng: np.random.Generator, rows: int, bits: int, size: int) -> np.ndarray:
    """[rows, 256 / size, size] random codes, one sub-block after another."""
    return rng.integers(0, 1 << bits, (rows, 256 // size, size))


def exact(scale: np.ndarray, per_block: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return scale.astype(np.float64)[:, :, None] * per_block[:, :, None] * codes


def flat(value: np.ndarray) -> np.ndarray:
    return value.reshape(len(value), 256).astype(np.float32)


def pack_6bit(scales: np.ndarray, mins: np.ndarray) -> np.ndarray:
    """8 scales and 8 minima of 6 bits in 12 bytes; the upper two bits of the last four stand over the first four."""
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = mins[:, :4] | (mins[:, 4:] >> 4) << 6
    third = scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4
    return bytes_of(np.concatenate([first, second, third], axis=1))


def paired_nibbles(codes: np.ndarray) -> np.ndarray:
    """Sub-blocks 2p and 2p + 1 share 32 bytes: the low and the high halves."""
    return bytes_of((codes[:, 0::2] & 15) | (codes[:, 1::2] & 15) << 4).reshape(len(codes), 128)


def with_minimum(rng: np.random.Generator, rows: int, bits: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """What Q4_K and Q5_K have in common: (d, dmin and packed scales; codes; values)."""
    d, dmin, codes = halves(rng, rows), halves(rng, rows), codes_of(rng, rows, bits, 32)
    scales, mins = rng.integers(0, 64, (rows, 8)), rng.integers(0, 64, (rows, 8))
    value = exact(d, scales, codes) - dmin.astype(np.float64)[:, :, None] * mins[:, :, None]
    return [d, dmin, pack_6bit(scales, mins)], codes, flat(value)


def q4_k(rng: np.random.Generator, rows: int) -> Block:
    head, codes, value = with_minimum(rng, rows, 4)
    return as_bytes(*head, paired_nibbles(codes)), value


def q5_k(rng: np.random.Generator, rows: int) -> Block:
    head, codes, value = with_minimum(rng, rows, 5)
    fifth = (codes >> 4) << np.arange(8)[None, :, None]  # sub-block j has bit j of byte l
    return as_bytes(*head, bytes_of(fifth.sum(axis=1)), paired_nibbles(codes)), value


def q6_k(rng: np.random.Generator, rows: int) -> Block:
    d, scales, codes = halves(rng, rows), rng.integers(-128, 128, (rows, 16), dtype=np.int8), codes_of(rng, rows, 6, 16)
    halves_of_128 = codes.reshape(rows, 2, 4, 32)  # quarters of 32
    low = (halves_of_128[:, :, :2] & 15) | (halves_of_128[:, :, 2:] & 15) << 4
    high = ((halves_of_128 >> 4) << (2 * np.arange(4)[None, None, :, None])).sum(axis=2)
    data = as_bytes(bytes_of(low).reshape(rows, 128), bytes_of(high).reshape(rows, 64), scales, d)
    return data, flat(exact(d, scales.astype(int), codes - 32))


def two_bits(codes: np.ndarray) -> np.ndarray:
    """Four runs of 32 share 32 bytes, two bits each."""
    runs = codes.reshape(len(codes), 2, 4, 32) & 3
    return bytes_of((runs << (2 * np.arange(4)[None, None, :, None])).sum(axis=2)).reshape(len(codes), 64)


def q2_k(rng: np.random.Generator, rows: int) -> Block:
    d, dmin, codes = halves(rng, rows), halves(rng, rows), codes_of(rng, rows, 2, 16)
    scales, mins = rng.integers(0, 16, (rows, 16)), rng.integers(0, 16, (rows, 16))
    value = exact(d, scales, codes) - dmin.astype(np.float64)[:, :, None] * mins[:, :, None]
    return as_bytes(bytes_of(scales | mins << 4), two_bits(codes), d, dmin), flat(value)


def q3_k(rng: np.random.Generator, rows: int) -> Block:
    d, scales, codes = halves(rng, rows), rng.integers(0, 64, (rows, 16)), codes_of(rng, rows, 3, 16)
    third = (codes.reshape(rows, 8, 32) >> 2) << np.arange(8)[None, :, None]  # run j has bit j of byte l
    low = scales[:, :8] & 15 | (scales[:, 8:] & 15) << 4
    high = ((scales >> 4).reshape(rows, 4, 4) << (2 * np.arange(4)[None, :, None])).sum(axis=1)
    packed = bytes_of(np.concatenate([low, high], axis=1))
    return as_bytes(bytes_of(third.sum(axis=1)), two_bits(codes), packed, d), flat(exact(d, scales - 32, codes - 4))


BLOCKS = {"Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}


def test_every_type_is_tested() -> None:
    assert set(BLOCKS) | set(test_gguf.BLOCKS) == set(TENSOR_TYPES)


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_type_follows_its_formula(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # write_gguf counts in blocks of 32 weights
    monkeypatch.setitem(test_gguf.BLOCKS, kind, lambda rng, count: BLOCKS[kind](rng, count // 8))
    sizes = {"embedding_length": 256, "feed_forward_length": 256, "block_count": 1, "rope.dimension_count": 64}
    values = write_gguf(tmp_path / "wide.gguf", WIDE, (kind,), fields=sizes)
    assert_loaded(load_params(tmp_path / "wide.gguf", WIDE, np.float32), values, WIDE)
