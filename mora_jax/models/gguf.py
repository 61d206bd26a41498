"""Llama GGUF files (llama.cpp's format) to the decoder's config and parameters.

The file is memory-mapped and every tensor is dequantised on its own. Block formats: ggml-org/ggml docs/gguf.md and
gguf-py's `gguf/quants.py`, whose `dequantize` does the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mora_jax.errors import MoraError
from mora_jax.models.decoder_config import DecoderConfig
from mora_jax.models.keytable import assemble, unpermute_rotary
from mora_jax.models.unread import Entry, Index, Params, load

# llama.cpp falls back to Q5_0, Q5_1, Q8_0 and IQ4_NL where rows are no multiple of a K-quant's 256 (SmolLM2-135M: 576).
TENSOR_TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)


@dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file: its path, its metadata `fields` by key, and its memory-mapped tensors by name."""

    path: Path
    fields: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, gguf.ReaderTensor] = field(repr=False)


def open_gguf(path: str | Path | GGUFFile) -> GGUFFile:
    """Map a GGUF file and read its metadata; an open one is returned as it is.

    Reading the metadata takes seconds for a large vocabulary, so open once where config, weights and tokenizer are all
    needed. Raises MoraError for a file that is missing, not GGUF, or shorter than its metadata says.
    """
    if isinstance(path, GGUFFile):
        return path
    path = Path(path)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise MoraError(f"{path}: cannot be read ({error.strerror})") from error
    if magic != b"GGUF":
        raise MoraError(f"{path}: not a GGUF file, it begins with {magic!r} where b'GGUF' is due")
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: entry.contents() for name, entry in reader.fields.items()}
    # What the library runs into depends on where a file is cut or corrupted.
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError) as error:
        raise MoraError(f"{path}: truncated or corrupted GGUF file ({error}); get a complete copy") from error
    return GGUFFile(path, fields, {tensor.name: tensor for tensor in reader.tensors})


def load_config(file: str | Path | GGUFFile) -> DecoderConfig:
    """The decoder config of a GGUF file; raises MoraError for anything but an unscaled dense llama."""
    file = open_gguf(file)
    return DecoderConfig.from_gguf(file.fields, file.tensors.keys(), file.path)


def load_params(file: str | Path | GGUFFile, config: DecoderConfig, dtype: Any) -> Params:
    """Dequantise a GGUF file into numpy arrays of `dtype` in the decoder's layout, q and k in our rotary order.

    The host holds the model in `dtype` plus one float32 tensor. Raises MoraError for a missing, unexpected or wrongly
    shaped tensor and for a tensor type outside TENSOR_TYPES.
    """
    file = open_gguf(file)
    for tensor in file.tensors.values():
        if tensor.tensor_type.name not in TENSOR_TYPES:
            raise MoraError(
                f"{file.path}: tensor {tensor.name!r} has type {tensor.tensor_type.name}; "
                f"known: {', '.join(TENSOR_TYPES)}"
            )

    def read(entry: Entry, index: Index) -> np.ndarray:
        tensor, heads = file.tensors[entry.name], entry.row.rotary
        # The same memory as a plain array: slicing a memmap costs more than dequantising the slice.
        stored, (rows, *others) = tensor.data.view(np.ndarray), index
        if heads:  # which mixes rows
            whole = gguf.quants.dequantize(stored, tensor.tensor_type)
            return unpermute_rotary(whole, getattr(config, heads))[index]
        return gguf.quants.dequantize(stored[rows], tensor.tensor_type)[:, *others]

    # GGUF lists dimensions from the innermost outwards, numpy the other way.
    shapes = {name: tuple(int(size) for size in tensor.shape[::-1]) for name, tensor in file.tensors.items()}
    return load(assemble(config, dtype, "gguf", shapes, read, file.path))
