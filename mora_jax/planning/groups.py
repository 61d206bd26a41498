"""The devices that a collective joins, as compiled programs write them."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np

_PAIRS = re.compile(r"source_target_pairs={(.*?)}}")
_LISTED = re.compile(r"replica_groups={{([\d,]*)}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? {([^}]*)}")


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text or "")]


def _on_mesh(axes: str, dims: str | None, order: str | None, named: str) -> list[int]:
    """`mesh['a'=4,'b'=8] {'b'}`, where `'b':(2)4` is a part of an axis: the first device's group.

    The mesh is filled with devices in their order, or in that of `device_ids=([8,4]T(1,0))`.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    devices = np.arange(math.prod(sizes.values()))
    if dims:
        devices = devices.reshape(_numbers(dims)).transpose(_numbers(order) or None)
    devices = devices.reshape(tuple(sizes.values()))
    taken = []
    for name, size in sizes.items():
        part = re.search(rf"'{name}'(?::\((\d+)\)(\d+))?", named)
        if part is None:
            taken.append([0])
            continue
        before, length = (int(part.group(1)), int(part.group(2))) if part.group(1) else (1, size)
        taken.append([i * (size // before // length) for i in range(length)])
    return devices[np.ix_(*taken)].reshape(-1).tolist()


def first_group(attributes: str) -> list[int]:
    """The devices of the first group; of a permutation its widest pair."""
    if pairs := _PAIRS.search(attributes):
        found = [_numbers(pair) for pair in pairs.group(1).split("},{")]
        return max(found, key=lambda pair: abs(pair[0] - pair[-1]))
    if mesh := _MESH.search(attributes):
        return _on_mesh(*mesh.groups())
    if iota := _IOTA.search(attributes):
        shape, dims, order = (_numbers(part) for part in iota.groups())
        devices = np.arange(math.prod(dims)).reshape(dims)
        return (devices.transpose(order) if order else devices).reshape(shape)[0].tolist()
    if listed := _LISTED.search(attributes):
        return _numbers(listed.group(1))
    raise ValueError(f"no groups of devices in {attributes[:200]}")


def spread(attributes: str, per_host: int) -> tuple[int, int]:
    """How many devices a collective joins (2 for a permutation), and the fewest of them that one host has.

    `per_host` devices make a host, in their order. ValueError for a form that is not known: better than a wrong sum.
    """
    group = first_group(attributes)
    return len(group), min(Counter(device // per_host for device in group).values())
