"""The mesh, and which axis of which array is cut over it: lists of (regex on the path, rule).

Keys are cut like the input axis of the kernel beside them and values like its output axis, so an adapter never moves
what its layer keeps in place. "pjit" is `jax.jit` over arrays with a `NamedSharding`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mora_jax.errors import MoraError
from mora_jax.models.unread import Unread

AXES = ("data", "fsdp", "model")
ROW_AXES = ("data", "fsdp")  # over which the rows of a batch are cut
# The arrays of a batch with one row per record (or per class text); what else a batch holds is the same for all rows.
ROWS = frozenset({"tokens", "prompt", "length", "pictures", "labels", "texts", "real"})

# Axis 0 of everything under `layers` is the scan over layers. Kernels that widen are cut (in, out) = (fsdp, model),
# kernels that narrow the other way round, so that the activation between them stays cut over `model`.
WIDE, NARROW = ("fsdp", "model"), ("model", "fsdp")
RULES: tuple[tuple[str, P], ...] = (
    (r"layers/.*(q|k|v|gate|up)/kernel(_scale)?", P(None, *WIDE)),
    (r"layers/.*(o|down)/kernel(_scale)?", P(None, *NARROW)),
    (r"layers/.*(q|k|v|gate|up)/keys", P(None, None, WIDE[0])),
    (r"layers/.*(q|k|v|gate|up)/values", P(None, None, WIDE[1])),
    (r"layers/.*(o|down)/keys", P(None, None, NARROW[0])),
    (r"layers/.*(o|down)/values", P(None, None, NARROW[1])),
    (r"embed/embedding", P("model", "fsdp")),
    (r"lm_head/kernel", P("fsdp", "model")),
)


def make_mesh(config: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices (None = of this run); an axis of -1 takes what the others leave. MoraError if none fits."""
    sizes = [config[axis] for axis in AXES]
    devices = jax.devices() if devices is None else devices
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise MoraError(f"mesh.{{data,fsdp,model}}={sizes} must be positive, with at most one -1 for the rest")
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise MoraError(f"mesh.{{data,fsdp,model}}={sizes} does not multiply to the {len(devices)} devices here")
    return Mesh(np.array(devices).reshape(sizes), AXES)


def ways(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def whole_rows(mesh: Mesh, rows: int) -> int:
    """So many rows, or the next number that every device has an equal part of."""
    return -(-rows // ways(mesh)) * ways(mesh)


def chosen(config: Mapping[str, int]) -> bool:
    """Whether someone asked for this mesh; the default one takes what there is."""
    return [config[axis] for axis in AXES] != [-1, 1, 1]


def check_mesh(mesh: Mesh, heads: Mapping[str, int], batch_size: int = 0, accumulate: int = 1) -> None:
    """MoraError for a mesh that divides neither heads (by name) nor batch: GSPMD would repeat work, not share it."""
    each = ways(mesh) * accumulate
    if batch_size % each:
        parts = "mesh.data x mesh.fsdp" + (" x train.accumulate" if accumulate > 1 else "")
        raise MoraError(f"{parts} = {each} does not divide train.batch_size={batch_size}; legal: a multiple of {each}")
    for name, count in heads.items():
        if count % mesh.shape["model"]:
            legal = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            raise MoraError(
                f"mesh.model={mesh.shape['model']} does not divide the model's {count} {name}; legal: {legal}"
            )


def _sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """The first rule that matches the end of the path; an axis that does not divide evenly stays whole.

    Where it is that of a kernel's blocks of scales, which are fewer than its inputs, their outputs are cut over both
    axes of the mesh instead. The one scale that int8 has for a column stays beside it: 4 bytes for all its inputs.
    """
    for pattern, rule in RULES:
        if re.search(rf"(^|/){pattern}$", path):
            cut = [
                name if name and size % mesh.shape[name] == 0 else None for name, size in zip(rule, shape, strict=True)
            ]
            if path.endswith("_scale") and cut[-2] is None and shape[-2] > 1:
                both = rule[-1], rule[-2]  # in this order a part lies within the kernel's outputs on the same device
                cut[-1] = both if shape[-1] % math.prod(mesh.shape[axis] for axis in both) == 0 else cut[-1]
            return NamedSharding(mesh, P(*cut))
    return NamedSharding(mesh, P())


def shardings(mesh: Mesh, tree: Any) -> Any:
    """A sharding for every array of a tree, by its path; an optimiser's moments are cut like what they belong to."""

    def one(path, leaf):
        return _sharding(mesh, jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape)

    return jax.tree_util.tree_map_with_path(one, tree)


def _only_shapes(tree: Any) -> bool:
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def place(mesh: Mesh, tree: Any) -> Any:
    """The tree on the devices, cut by the rules; a tree of shapes, as for compilation ahead of time, stays one."""
    return abstract(mesh, tree) if _only_shapes(tree) else jax.tree.map(_put, tree, shardings(mesh, tree))


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """A leaf on the devices; of those of other processes each process cares for its own."""
    if isinstance(leaf, Unread):
        return _read(leaf, sharding)
    elsewhere = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable  # it lies on all devices already
    if elsewhere or sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _read(leaf: Unread, sharding: NamedSharding) -> jax.Array:
    """Reads what the devices of this process hold, each part once and one after another: the host has room for one."""
    holders: dict[tuple, tuple[tuple[slice, ...], list]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        holders.setdefault(tuple((cut.start, cut.stop) for cut in index), (index, []))[1].append(device)
    held = []
    for index, devices in holders.values():
        part = leaf[index]
        held += jax.block_until_ready([jax.device_put(part, device) for device in devices])
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, held)


def abstract(mesh: Mesh, shapes: Any) -> Any:
    """Shapes with the shardings that `place` would give them: what a restore fills in."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(mesh, shapes),
    )


def place_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch on the devices, its `ROWS` cut over data and fsdp; the rest, and rows that do not divide, are copied.

    All processes have the same batch, and each gives the rows of its own devices: the order is that of one process.
    """

    def put(name, value):
        cut = name in ROWS and value.shape[0] % ways(mesh) == 0
        sharding = NamedSharding(mesh, P(ROW_AXES) if cut else P())
        if _only_shapes(value):
            return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
        return _put(value, sharding)

    return {name: put(name, value) for name, value in batch.items()}
