"""Adapters as files: our own layout, the one of the published PyTorch code, and PEFT's, written and read; and merged.

A folder holds `adapter_model.safetensors` and a description in JSON. Dense layers go by our site paths in the layout
`mora` and by their Hugging Face module names in the others, which store A = keys [n, d_in] and B = values [d_out, n]
for each layer. Nothing is unpickled: .pt files are read by torch.load(weights_only=True).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

import mora_jax
from mora_jax import config as configs
from mora_jax import merging
from mora_jax.adapter import CHANGEABLE, Adapter, Rows, from_workdir
from mora_jax.errors import MoraError, unknown
from mora_jax.methods.boundaries import BOUNDARIES
from mora_jax.methods.method import from_config
from mora_jax.models.hf import checked_slice, read_json
from mora_jax.models.keytable import dense_modules
from mora_jax.models.registry import base_id
from mora_jax.runtime import storage
from mora_jax.runtime.writers import write_json

TENSORS, DESCRIPTION, BESIDE = "adapter_model.safetensors", "adapter_config.json", "mora_adapter.json"
FORMAT = "mora_jax adapter 1"
Tensors = Mapping[str, np.ndarray]

# Ends of tensor names in state dicts -> (whose rows, what). The published CLIP code keeps four parameters on the layer;
# the published LLM code is a fork of PEFT whose `lora_` rows are frozen and whose `loranew_` rows are being trained.
# PEFT itself has the names of the fork without its fresh rows. (github.com/Artificer-AI-Lab/MoRAM, XTAIL and TRACE)
ENDS = {
    "old_lora_A": ("frozen", "keys"),
    "old_lora_B": ("frozen", "values"),
    "lora_A": ("fresh", "keys"),
    "lora_B": ("fresh", "values"),
    "lora_A.weight": ("frozen", "keys"),
    "lora_B.weight": ("frozen", "values"),
    "loranew_A.weight": ("fresh", "keys"),
    "loranew_B.weight": ("fresh", "values"),
}
_NAME = re.compile(rf"(?:(.*)\.)?({'|'.join(map(re.escape, sorted(ENDS, key=len, reverse=True)))})")


class Layout(NamedTuple):
    """`check` refuses what would not be exact; `tensors` and `read` are inverse; `config` is for other programs.

    `fold`: the scale is multiplied into the values, because the other program knows none. `write` stands for all of
    that where the folder is no adapter any more; it returns in words what it has written.
    """

    check: Callable[[Adapter], None]
    tensors: Callable[[Adapter], Tensors] | None = None
    read: Callable[[Tensors, object], Rows] | None = None
    fold: bool = False
    config: Callable[[Adapter], Mapping[str, Any]] | None = None
    write: Callable[[Adapter, Path], str] | None = None


# ---------------------------------------------------------------- the layout `mora`


def _ours(adapter: Adapter) -> Tensors:
    return {"/".join((*path, name)): array for path, site in adapter.rows.items() for name, array in site.items()}


def _from_ours(tensors: Tensors, source: object) -> Rows:
    rows: dict[tuple[str, ...], dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        *path, what = name.split("/")
        if what not in ("keys", "values") or array.ndim != 3:
            raise MoraError(f"{source}: unexpected tensor {name!r}; legal: SITE/keys and SITE/values with 3 axes")
        rows.setdefault(tuple(path), {})[what] = array
    return rows


# ---------------------------------------------------------------- one A and one B for each layer


def _check_named(adapter: Adapter) -> None:
    if unnamed := adapter.rows.keys() - MODULES.keys():
        raise MoraError(f"this layout has no name for the site {'/'.join(min(unnamed))}; use --layout=mora")


def _layers(adapter: Adapter, frozen: tuple[str, str], fresh: tuple[str, str] | None, prefix: str = "") -> Tensors:
    """A and B of every layer by name; the block of the last task under the names `fresh`, if those are given."""
    tensors = {}
    cut = adapter.span(len(adapter.tasks) - 1)[0] if fresh else adapter.experts
    _check_named(adapter)
    for path, site in adapter.rows.items():
        for layer, (keys, values) in enumerate(zip(site["keys"], site["values"], strict=True)):
            module = prefix + MODULES[path].format(layer=layer)
            for (a, b), rows in ((frozen, slice(0, cut)), (fresh or frozen, slice(cut, None))):
                if len(keys[rows]):  # a state dict has no tensor for rows that there are none of
                    tensors[f"{module}.{a}"], tensors[f"{module}.{b}"] = keys[rows], values[rows].T
    return tensors


def _split(name: str) -> re.Match[str] | None:
    """The module and the end of a tensor's name in a state dict; None for what is no expert."""
    return _NAME.fullmatch(name.replace(".default.", "."))  # PEFT's name of an adapter that was given none


def _from_layers(tensors: Tensors, source: object) -> Rows:
    layer_number = {path: re.escape(name).replace(r"\{layer\}", r"(\d+)") for path, name in MODULES.items()}
    patterns = {path: re.compile(rf"(?:.*\.)?{name}") for path, name in layer_number.items()}
    found: dict[tuple[str, ...], dict[int, dict[tuple[str, str], np.ndarray]]] = {}
    for name, array in tensors.items():
        split = _split(name)
        if split is None:
            continue  # a frozen weight
        module, end = split.groups(default="")
        hits = [(path, match) for path, pattern in patterns.items() if (match := pattern.fullmatch(module))]
        if not hits:
            raise MoraError(f"{source}: tensor {name!r} is of no dense layer known here: {', '.join(MODULES.values())}")
        (path, match), (whose, what) = hits[0], ENDS[end]
        if array.ndim != 2:
            raise MoraError(f"{source}: tensor {name!r} has shape {list(array.shape)}; legal: 2 axes")
        rows = array if what == "keys" else array.T
        if end.startswith("loranew_B") and np.any(rows):
            raise MoraError(
                f"{source}: {name!r} holds experts that were never frozen; their scale alpha / r is not in the file"
            )
        found.setdefault(path, {}).setdefault(int(match[1]), {})[whose, what] = rows
    if not found:
        raise MoraError(f"{source}: no tensor whose name ends in one of {', '.join(ENDS)}")
    layers = [layer for site in found.values() for layer in site.values()]
    trained = any(np.any(layer["fresh", "values"]) for layer in layers if ("fresh", "values") in layer)
    whose_rows = ("frozen", "fresh") if trained else ("frozen",)  # fresh rows as they begin are of no task yet
    return {path: _stacked("/".join(path), site, whose_rows, source) for path, site in found.items()}


def _stacked(
    name: str, site: Mapping[int, Mapping], whose_rows: tuple[str, ...], source: object
) -> dict[str, np.ndarray]:
    if sorted(site) != list(range(len(site))):
        raise MoraError(
            f"{source}: {name} is there for the layers {sorted(site)}; they must be 0 and up, none left out"
        )
    parts = {
        what: [
            [layer[whose, what] for whose in whose_rows if (whose, what) in layer] for _, layer in sorted(site.items())
        ]
        for what in ("keys", "values")
    }
    counts = {what: {sum(map(len, layer)) for layer in layers} for what, layers in parts.items()}
    for what, layers in parts.items():
        widths = {part.shape[1] for layer in layers for part in layer}
        if len(widths) > 1:
            raise MoraError(f"{source}: {name} has {what} of widths {sorted(widths)}; they must be one number")
    if counts["keys"] != counts["values"] or len(counts["keys"]) != 1 or counts["keys"] == {0}:
        raise MoraError(
            f"{source}: {name} has A of {sorted(counts['keys'])} rows and B of {sorted(counts['values'])} columns "
            "in its layers; all must be one number above 0"
        )
    return {what: np.stack([np.concatenate(layer) for layer in layers]) for what, layers in parts.items()}


# ---------------------------------------------------------------- what is exact, and the table


def _is_mora(adapter: Adapter) -> None:
    m = adapter.method
    facts = {"score": m.score, "select": m.select, "normalise": m.normalise, "threshold_mode": m.threshold_mode}
    known = {"score": "self", "select": "top_k", "normalise": "softmax", "threshold_mode": "absolute"}
    for axis, value in facts.items():
        if value != known[axis]:
            raise MoraError(
                f"layout authors cannot be exact: the published code has method.{axis}={known[axis]!r} only, not "
                f"{value!r}; use --layout=mora"
            )
    if m.top_k < 2:
        raise MoraError(
            f"layout authors cannot be exact: the published code takes max(top_k, 2) experts, not {m.top_k}; "
            "use --layout=mora"
        )


def _has_constant_gates(adapter: Adapter, layout: str) -> None:
    m = adapter.method
    for axis, value, constant in (
        ("score", m.score, "constant"), ("select", m.select, "all"), ("normalise", m.normalise, "none"),
    ):  # fmt: skip
        if value != constant:
            raise MoraError(
                f"layout {layout} cannot be exact: with method.{axis}={value!r} the gates depend on the input, and a "
                "LoRA or a merged weight is one fixed update; use --layout=mora"
            )


def _can_be_merged(adapter: Adapter) -> None:
    _has_constant_gates(adapter, "merged")
    _check_named(adapter)  # a CLIP


def _peft_config(adapter: Adapter) -> dict[str, Any]:
    n = adapter.experts
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_id(adapter.config.model),
        "r": n,
        "lora_alpha": adapter.method.scale * n,  # PEFT's scale is lora_alpha / r
        "lora_dropout": 0.0,
        "target_modules": sorted(MODULES[path].rpartition(".")[2] for path in adapter.rows),
        "bias": "none",
        "inference_mode": True,
    }


MODULES = dense_modules()
# The frozen rows of the published code carry no scale in either half, so ours is folded into the values. The last
# task's block is stored as the one in training: a block that is fresh and untrained would take part in the norm, the
# top-k and the softmax of that code.
LAYOUTS: Mapping[str, Layout] = {
    "mora": Layout(lambda adapter: None, _ours, _from_ours),
    "authors": Layout(
        _is_mora,
        lambda adapter: _layers(adapter, ("old_lora_A", "old_lora_B"), ("lora_A", "lora_B")),
        _from_layers,
        fold=True,
    ),
    "peft": Layout(
        lambda adapter: _has_constant_gates(adapter, "peft"),
        lambda adapter: _layers(adapter, ("lora_A.weight", "lora_B.weight"), None, "base_model.model."),
        _from_layers,
        config=_peft_config,
    ),
    "merged": Layout(_can_be_merged, write=merging.write),
}
ADAPTERS = tuple(name for name, layout in LAYOUTS.items() if layout.read)  # what can be read back


# ---------------------------------------------------------------- folders


def save(adapter: Adapter, folder: Path, layout: str) -> str:
    """Writes a new folder; returns what is to be said of its content, in words.

    Raises MoraError for an unknown layout, one that would not be exact, and a full folder.
    """
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MoraError(f"--to={folder} is there already and not an empty folder; choose another")
    if not adapter.experts:
        raise MoraError(f"there is nothing to export: method {adapter.config.method.name!r} has no frozen expert yet")
    kind = LAYOUTS[layout]
    kind.check(adapter)
    if kind.write:
        return kind.write(adapter, folder)
    adapter = _folded(adapter) if kind.fold else adapter
    tensors = {name: np.ascontiguousarray(t, np.float32) for name, t in kind.tensors(adapter).items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TENSORS).write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))  # save_file's is 0600
    if kind.config:
        write_json(folder / DESCRIPTION, kind.config(adapter))
    write_json(folder / (BESIDE if kind.config else DESCRIPTION), _described(adapter, layout))
    return ""


def _folded(adapter: Adapter) -> Adapter:
    config = adapter.config.copy_and_resolve_references()
    with config.unlocked():
        config.method.scale = 1.0
    rows = {
        path: {"keys": site["keys"], "values": site["values"] * np.float32(adapter.method.scale)}
        for path, site in adapter.rows.items()
    }
    return dataclasses.replace(adapter, config=config, rows=rows)


def _described(adapter: Adapter, layout: str) -> dict[str, Any]:
    rest = adapter.config.to_dict()
    method, model = rest.pop("method"), rest.pop("model")
    tasks = [{"name": name, "rows": list(adapter.span(i))} for i, name in enumerate(adapter.tasks)]
    return {
        "format": FORMAT,
        "layout": layout,
        "base_model": model | {"identity": adapter.identity},
        "method": method,
        "tasks": tasks,
        "run": rest,
        "origin": dict(adapter.origin) | {"mora_jax": mora_jax.__version__},
    }


def load(folder: Path, overrides: Mapping[str, str]) -> Adapter:
    """What `save` wrote, in any layout. Raises MoraError naming the file for anything else, and for a wrong rank."""
    files = [folder / name for name in (BESIDE, DESCRIPTION) if (folder / name).is_file()]
    if not files:
        raise MoraError(f"--adapter={folder} holds no {DESCRIPTION}; legal: a folder of python -m mora_jax.export")
    said = read_json(files[0])
    parts = ("layout", "base_model", "method", "tasks", "run", "origin")
    if said.get("format") != FORMAT or not all(part in said for part in parts):
        raise MoraError(f"{files[0]} is not of the format {FORMAT!r}; legal: a folder of python -m mora_jax.export")
    if said["layout"] not in ADAPTERS:
        raise unknown(f"layout in {files[0]}", said["layout"], ADAPTERS)
    try:
        model = dict(said["base_model"])
        identity, tasks = model.pop("identity"), tuple(task["name"] for task in said["tasks"])
        saved = said["run"] | {"method": said["method"], "model": model}
        config = configs.restore(saved, files[0], overrides, CHANGEABLE)
    except (KeyError, TypeError, ValueError) as problem:  # edited by hand
        raise MoraError(f"{files[0]} is damaged: {type(problem).__name__} {problem}; export again") from None
    file, wanted = folder / TENSORS, str if said["layout"] == "mora" else _split  # all, or those with experts
    rows = LAYOUTS[said["layout"]].read(_read_safetensors(file, wanted), file)
    return _checked(Adapter(config, identity, tasks, rows, said["origin"]), folder)


def load_state_dict(path: Path, config: Any) -> Adapter:
    """A state dict of the published code (.safetensors, or .pt and .bin through PyTorch), with the config's method.

    Task names are those of `benchmark.tasks`; without them, tasks are numbered. The file does not name its base model.
    """
    rows = _from_layers(READERS.get(path.suffix, _read_torch)(path), path)
    with config.unlocked():
        config.method.scale = 1.0  # what the published code has for frozen experts
    method = from_config(config.method, config.kernel)
    n, names = next(iter(rows.values()))["keys"].shape[1], configs.names(config.benchmark.tasks)
    tasks = tuple(names) or tuple(f"task_{i}" for i in range(max(1, n // method.rank)))
    adapter = Adapter(config, "", tasks, rows, {"file": path.name})
    _is_mora(adapter)
    return _checked(adapter, path)


def _checked(adapter: Adapter, source: Path) -> Adapter:
    for path, site in adapter.rows.items():
        for name in ("keys", "values"):
            n = site[name].shape[1] if name in site else 0
            if n != adapter.experts:
                raise MoraError(
                    f"wrong rank: {source} has {n} experts in {'/'.join((*path, name))}, but "
                    f"{len(adapter.tasks)} task(s) with method.rank={adapter.method.rank} make {adapter.experts}"
                )
    return adapter


def _read_safetensors(path: Path, wanted: Callable[[str], Any] = _split) -> Tensors:
    """The tensors whose names are `wanted`: a state dict may hold frozen weights too, in any dtype and shape."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = [name for name in file.keys() if wanted(name)]  # noqa: SIM118  no mapping
            for name in names:
                checked_slice(file, name, path)
            return {name: file.get_tensor(name).astype(np.float32) for name in names}
    except (OSError, safetensors.SafetensorError) as problem:
        raise MoraError(f"{path}: not a readable safetensors file ({problem})") from None


def _read_torch(path: Path) -> Tensors:
    try:
        import torch  # optional, and seconds to import
    except ImportError:
        raise MoraError(f"{path}: only PyTorch reads this file; pip install torch, or save it as safetensors") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # pickle, zip and torch errors alike: this is no file of plain tensors
        reason = str(problem).partition("\n")[0][:120]
        raise MoraError(f"{path}: not a file of plain tensors, and nothing else is unpickled ({reason})") from None
    if not isinstance(content, dict) or not all(isinstance(t, torch.Tensor) for t in content.values()):
        raise MoraError(f"{path}: legal: one dict from tensor names to tensors, as state_dict() gives it")
    return {name: tensor.float().numpy() for name, tensor in content.items()}


READERS = {".safetensors": _read_safetensors}


def open_adapter(options: Mapping[str, str], overrides: Mapping[str, str], task: int | None) -> Adapter:
    """The adapter that --workdir or --adapter names, as it stood after `task` (None = the last)."""
    given = [name for name in ("workdir", "adapter") if options.get(name)]
    if len(given) != 1:
        raise MoraError("exactly one of --workdir=DIR and --adapter=FOLDER says what to load")
    if given == ["workdir"]:
        return from_workdir(storage.at(options["workdir"]), task, overrides)
    adapter = load(Path(options["adapter"]), overrides)
    return adapter if task is None else adapter.after(task)


def every_state(newest: Adapter, options: Mapping[str, str], overrides: Mapping[str, str]) -> list[Adapter]:
    """`newest` as it stood before its first task and after each of them; arguments as for `open_adapter`."""
    known = range(-1, len(newest.tasks))
    if BOUNDARIES[newest.method.boundary].lasting:
        return [newest.after(task) for task in known]
    return [open_adapter(options, overrides, task) for task in known]


def task_number(text: str | None) -> int | None:
    """--task as a number, None if it was not given. Raises MoraError."""
    try:
        return None if text is None else int(text)
    except ValueError:
        raise MoraError(f"--task={text} must be a number: tasks count from 0, -1 is the frozen model") from None
