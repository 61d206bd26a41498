"""Experts with constant gates added to the weights beside which they stand: a plain model for any other program.

W + scale * sum_i a_i b_i^T with the keys a_i and values b_i of a site, summed and stored in float32 whatever
`model.dtype` is: in bfloat16 most weights would not move, for the update of a short training is less than its steps.
What was trained beside quantised weights is added to what their codes stand for, so the folder answers as the run did.
A text begins and ends there as in the run, and there is no chat template: tasks are taught without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mora_jax.adapter import Adapter
from mora_jax.models import hf, quantised
from mora_jax.models.registry import DTYPES, PACKAGED, load_model
from mora_jax.models.unread import Unread


def write(adapter: Adapter, folder: Path) -> str:
    """config.json, model.safetensors and the tokenizer, as transformers reads them; returns in words what they hold.

    Raises MoraError if the weights that the config names are not those that the experts were trained on.
    """
    c = adapter.config
    model = load_model(c.model, c.seed)
    adapter.check_base(model.identity)
    dtype = np.dtype(DTYPES[c.model.dtype])
    flat = _whole(flatten_dict(model.params, sep="/"), dtype)
    for path, site in adapter.rows.items():
        name = "/".join((*path, "kernel"))
        update = np.matmul(site["keys"].swapaxes(1, 2), site["values"])  # [layers, d_in, d_out]
        flat[name] = flat[name].astype(np.float32) + np.float32(adapter.method.scale) * update
    hf.save_params(unflatten_dict(flat, sep="/"), model.config, folder, model.tokenizer.special_ids)
    model.tokenizer.save(folder)
    kept = "all weights in float32" if dtype == np.float32 else f"adapted weights in float32, others in {dtype.name}"
    return f"{kept}{_origin(c.model)}"


def _whole(flat: Mapping[str, Any], dtype: Any) -> dict[str, np.ndarray]:
    """Parameters by path as arrays of `dtype`: read where they are not yet, decoded where they are coded."""
    read = {
        path: leaf[tuple(slice(0, n) for n in leaf.shape)] if isinstance(leaf, Unread) else np.asarray(leaf)
        for path, leaf in flat.items()
    }
    scales = {path: read.pop(f"{path}_scale") for path in flat if f"{path}_scale" in flat}
    decoded = {path: np.asarray(quantised.decode(read[path], scale)).astype(dtype) for path, scale in scales.items()}
    return read | decoded


def _origin(model: Mapping[str, Any]) -> str:
    """From which fewer bits the weights of the base were made, in words."""
    packaged = not model["weights"] and model["name"] in PACKAGED
    made = ["a GGUF file"] if packaged or Path(model["weights"]).suffix == ".gguf" else []
    made += [f"{model['quantise']} codes of the dense kernels"] if model["quantise"] != quantised.NONE else []
    return f", those of the base dequantised from {' and '.join(made)}" if made else ""
