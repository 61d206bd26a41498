"""Weights that stay in their file: any part of a parameter is what it would be of the whole, and no more is read."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_clip import TINY as TINY_CLIP
from tiny_clip import random_params as random_clip
from tiny_decoder import TINY, random_params

from mora_jax.models import clip_weights, hf, unread
from mora_jax.models.unread import Unread
from mora_jax.runtime.distributed import AXES, make_mesh, place


@functools.cache
def decoder(dtype: str) -> Any:
    return jax.tree.map(lambda a: a.astype(dtype), random_params(TINY))


def opened(kind: str, folder: Path) -> tuple[Mapping[str, np.ndarray], Mapping[str, Unread]]:
    """Saved parameters by path, as they were and as they lie in the file."""
    if kind in ("float32", "bfloat16"):
        params = decoder(kind)
        hf.save_params(params, TINY, folder)
        found = hf.open_params(folder, TINY, np.dtype(kind))
    else:
        params = random_clip(TINY_CLIP)
        clip_weights.save_params(params, TINY_CLIP, folder, kind)
        found = clip_weights.open_params(folder, TINY_CLIP, np.float32)
    return flatten_dict(params, sep="/"), flatten_dict(found, sep="/")


@pytest.mark.parametrize("block", [1 << 24, 40])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "hf", "open_clip"])
def test_a_part_is_that_of_the_whole(kind, block, tmp_path: Path, rng: np.random.Generator, monkeypatch):
    """Stacked, transposed, fused and flattened tensors, read at once or a few rows at a time."""
    monkeypatch.setattr(unread, "MAPPED", block)
    expected, found = opened(kind, tmp_path)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        assert (leaf.shape, leaf.dtype) == (expected[path].shape, expected[path].dtype)
        for _ in range(3):
            index = tuple(slice(*sorted(rng.choice(n + 1, 2, replace=False).tolist())) for n in leaf.shape)
            np.testing.assert_array_equal(leaf[index], expected[path][index], err_msg=path)
        np.testing.assert_array_equal(leaf[tuple(slice(None) for _ in leaf.shape)], expected[path], err_msg=path)


@pytest.mark.parametrize("sizes", [(1, 4, 2), (4, 2, 1), (8, 1, 1)])
def test_devices_read_their_own_parts_each_once(sizes, tmp_path: Path):
    expected, found = opened("float32", tmp_path)
    read: dict[str, int] = {}

    def counted(path: str, leaf: Unread):
        def reader(entry, index):
            part = leaf.read(entry, index)
            read[path] = read.get(path, 0) + part.size
            return part

        return Unread(leaf.shape, leaf.dtype, leaf.entries, leaf.share, reader)

    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)))
    tree = unflatten_dict({path: counted(path, leaf) for path, leaf in found.items()}, sep="/")
    placed = flatten_dict(place(mesh, tree), sep="/")
    for path, array in placed.items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)
        assert read[path] == array.size, path  # parts that several devices hold are read for all of them at once
    cut = {path for path, array in placed.items() if array.addressable_shards[0].data.size < array.size}
    assert ("layers/mlp/up/kernel" in cut) == (sizes != (8, 1, 1))
