"""Sizes of real sites that the kernels are compiled for: layers of published models, banks as a stream fills them.

Widths: ViT-B/16 (arXiv 2010.11929, the image tower of CLIP); config.json of HuggingFaceTB/SmolLM2-135M,
meta-llama/Llama-3.2-1B and meta-llama/Llama-2-7b-hf.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple


class Shape(NamedTuple):
    """One call of the op: `tokens` of `d_in` features, `experts` frozen rows, `fresh` trainable ones, dtype of x."""

    tokens: int
    d_in: int
    d_out: int
    experts: int
    fresh: int
    dtype: str = "bfloat16"


SHAPES = {
    "target": Shape(65536, 2048, 2048, 128, 16),  # the one that memory and spills are told for
    "vit_b16/qkv": Shape(64 * 197, 768, 2304, 128, 16, "float32"),
    "vit_b16/mlp_up": Shape(64 * 197, 768, 3072, 64, 16),
    "vit_b16/mlp_down": Shape(64 * 197, 3072, 768, 1024, 16),
    "smollm2_135m/q": Shape(16384, 576, 576, 16, 8),
    "smollm2_135m/v": Shape(16384, 576, 192, 512, 8, "float32"),
    "smollm2_135m/down": Shape(16384, 1536, 576, 160, 8),
    "llama3.2_1b/q": Shape(16384, 2048, 2048, 256, 16),
    "llama3.2_1b/v": Shape(16384, 2048, 512, 1024, 16),
    "llama3.2_1b/up": Shape(16384, 2048, 8192, 512, 16),
    "llama2_7b/q": Shape(16384, 4096, 4096, 128, 64),
    "llama2_7b/up": Shape(16384, 4096, 11008, 512, 16),
    "llama2_7b/down": Shape(16384, 11008, 4096, 1024, 16),
}
TOP_K = 8  # experts per token, everywhere
DECODE_TOKENS = 8  # a batch of sequences that grow by one token each


def is_named(names: Collection[str], shape: str, kernel: str, target: str) -> bool:
    """Whether one of the names of a command line means this compilation; without names all are meant."""
    return not names or any(name in (shape, kernel, target, f"{shape}:{kernel}:{target}") for name in names)
