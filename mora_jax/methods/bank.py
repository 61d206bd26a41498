"""The bank of frozen experts: allocation, growth, and moving rows in and out of it.

A bank is a nested dict that mirrors the parameters: at each adapted site keys [layers, capacity, d_in], values [layers,
capacity, d_out] and live [layers] (how many leading rows hold an expert). Rows from live on are zero. `fresh` has the
same nesting with keys [layers, r, d_in] and values [layers, r, d_out]. Everything is float32.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from mora_jax.errors import MoraError
from mora_jax.methods.initializers import INITIALIZERS

if TYPE_CHECKING:
    from mora_jax.methods.method import Method


class Site(NamedTuple):
    """One adapted kind of dense layer, stacked over the layers of the model."""

    layers: int
    d_in: int
    d_out: int


Sites = Mapping[tuple[str, ...], Site]


def find_sites(params: Mapping, kinds: Mapping[tuple[str, ...], str], method: Method) -> dict[tuple[str, ...], Site]:
    """The sites that `method.targets` selects. `kinds` maps the path of each dense layer to its site kind."""
    found = {path: kind for path, kind in kinds.items() if method.adapts(kind)}
    if method.trains and not found:
        known = ", ".join(sorted(set(kinds.values())))
        raise MoraError(f"method.targets={','.join(method.targets)} matches no site of this model; its sites: {known}")
    flat = flatten_dict(params)
    return {path: Site(*flat[(*path, "kernel")].shape) for path in found}


def empty(sites: Sites, capacity: int) -> dict:
    """A bank without experts and with room for `capacity` of them at every site."""

    def rows(site: Site) -> dict:
        return {
            "keys": jnp.zeros((site.layers, capacity, site.d_in), jnp.float32),
            "values": jnp.zeros((site.layers, capacity, site.d_out), jnp.float32),
            "live": jnp.zeros((site.layers,), jnp.int32),
        }

    return unflatten_dict({path: rows(site) for path, site in sites.items()})


def capacity_of(bank: Mapping) -> int:
    """Rows per site; 0 without sites."""
    return next((leaf.shape[1] for leaf in jax.tree.leaves(bank) if leaf.ndim == 3), 0)


def new_fresh(sites: Sites, method: Method, seed: int, task: int) -> dict:
    """Fresh experts for a task, decided by (seed, task, site) alone, so that a resume needs no stored random state."""
    start = INITIALIZERS[method.init]
    task_key = jax.random.fold_in(jax.random.key(seed), task)
    fresh = {}
    for path, site in sites.items():
        key = jax.random.fold_in(task_key, zlib.crc32("/".join(path).encode()))
        keys, values = start(key, site.layers, method.rank, site.d_in, site.d_out)
        fresh[path] = {"keys": keys, "values": values}
    return unflatten_dict(fresh)


def grow(bank: Mapping, capacity: int) -> dict:
    """The same bank with room for at least `capacity` rows."""

    def pad(rows):
        missing = max(0, capacity - rows.shape[1])
        return jnp.pad(rows, ((0, 0), (0, missing), (0, 0))) if missing else rows

    return _each_site(lambda b: {"keys": pad(b["keys"]), "values": pad(b["values"]), "live": b["live"]}, bank)


@jax.jit
def push(bank: Mapping, fresh: Mapping) -> dict:
    """Fresh experts become the rows after the last live one. No output changes: an expert keeps its scale."""

    def put(rows, new, live):
        return jax.vmap(lambda r, n, at: jax.lax.dynamic_update_slice(r, n, (at, 0)))(rows, new, live)

    def site(b, f):
        keys, values = (put(b[name], f[name], b["live"]) for name in ("keys", "values"))
        return {"keys": keys, "values": values, "live": b["live"] + f["keys"].shape[1]}

    return _each_site(site, bank, fresh)


def pop(bank: Mapping, rank: int) -> tuple[dict, dict]:
    """The reverse of `push`: the last `rank` live rows leave the bank and are trained again."""

    def take(rows, live):
        return jax.vmap(lambda r, at: jax.lax.dynamic_slice(r, (at, 0), (rank, r.shape[1])))(rows, live - rank)

    def clear(rows, live):
        return jnp.where((jnp.arange(rows.shape[1])[None] < (live - rank)[:, None])[..., None], rows, 0.0)

    fresh = _each_site(lambda b: {name: take(b[name], b["live"]) for name in ("keys", "values")}, bank)
    kept = _each_site(
        lambda b: {
            "keys": clear(b["keys"], b["live"]),
            "values": clear(b["values"], b["live"]),
            "live": b["live"] - rank,
        },
        bank,
    )
    return kept, fresh


def first(bank: Mapping, live: int) -> dict:
    """The bank with at most its first `live` rows: where no later task changes a row, as it was with so many."""
    return _each_site(lambda b: {**b, "live": jnp.minimum(b["live"], live)}, bank)


def _each_site(function: Callable, *trees: Mapping) -> dict:
    """Applies `function` to the dicts of each site; a site is the node that holds `keys`."""
    first = trees[0]
    if "keys" in first:
        return function(*trees)
    return {name: _each_site(function, *(tree[name] for tree in trees)) for name in first}
