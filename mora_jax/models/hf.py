"""Hugging Face folders (config.json + safetensors) to and from the decoder's parameters.

Only safetensors is read: pickles run code when loaded. Nothing from the folder is ever executed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import huggingface_hub
import jax
import numpy as np
import safetensors
from flax.traverse_util import flatten_dict

from mora_jax.errors import MoraError
from mora_jax.models import families
from mora_jax.models.decoder_config import DecoderConfig
from mora_jax.models.keytable import assemble, entries, param_shape, rows
from mora_jax.models.unread import Entry, Index, Params, Read, load

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DOWNLOADS = ["*.safetensors", "*.json", "tokenizer*"]
_NOT_DOWNLOADED = ["*/*", "consolidated*"]  # subfolders, and a second copy of the weights in Mistral's own layout
# safetensors' name of a dtype -> numpy's; the formats we accept and write.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NO_IDS: Mapping[str, int | None] = MappingProxyType({})


def resolve(name_or_path: str | Path) -> Path:
    """The local folder of a model: a folder as it is, or a hub id such as `HuggingFaceTB/SmolLM2-135M`, downloaded.

    Only safetensors, JSON and tokenizer files of the repository's top folder are downloaded, once. Raises MoraError for
    a path that is not a folder and for a hub id that cannot be had.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    name = str(name_or_path)
    if path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise MoraError(
            f"model {name!r} is not a folder; give a folder with {CONFIG_FILE} and safetensors, or a hub id"
        )
    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=_DOWNLOADS, ignore_patterns=_NOT_DOWNLOADED)
    # The hub client raises classes of four libraries (HTTP, cache, validation, transfer), and all of them mean the same
    # to the user: this id cannot be had from here.
    except Exception as error:
        raise MoraError(
            f"hub id {name!r} not reachable ({type(error).__name__}: {error}); give the id of a repository you can "
            f"download, or a local folder with {CONFIG_FILE} and safetensors"
        ) from error
    return Path(folder)


def load_config(folder: Path) -> DecoderConfig:
    """Read `folder/config.json`; raises MoraError when it is absent, broken, or of a family that we lack."""
    path = Path(folder) / CONFIG_FILE
    return families.from_hf(read_json(path), path)


def load_params(folder: Path, config: DecoderConfig, dtype: Any) -> Params:
    """All weights of a folder as numpy arrays; see `open_params`."""
    return load(open_params(folder, config, dtype))


def open_params(folder: Path, config: DecoderConfig, dtype: Any) -> Params:
    """The weights of a folder, in one file or several, as `Unread` parameters of `dtype` in the decoder's layout.

    Rotary frequency buffers, and the copy of the embeddings
    that some tied models store as `lm_head.weight`, are skipped. Raises MoraError for a folder without safetensors, a
    broken file, and a missing, unexpected, wrongly shaped or non-float tensor.
    """
    folder = Path(folder)
    shapes, read = open_tensors(weight_files(folder))
    ignored = {"lm_head.weight"} if config.tie_embeddings else set()
    return assemble(
        config, dtype, "hf", shapes, read, folder,
        ignored=lambda name: name in ignored or name.endswith("rotary_emb.inv_freq"),
    )  # fmt: skip


def open_tensors(files: Iterable[Path]) -> tuple[dict[str, tuple[int, ...]], Read]:
    """(the shape of every tensor in some safetensors files by its name, a function that reads a part of one of them).

    Raises MoraError for a broken file; the function raises it for a tensor of another than a float dtype.
    """
    owners: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118  safe_open is no mapping
                    owners[name], shapes[name] = path, tuple(file.get_slice(name).get_shape())
        except (OSError, safetensors.SafetensorError) as error:
            raise MoraError(f"{path}: not a readable safetensors file ({error})") from error

    def read(entry: Entry, index: Index) -> np.ndarray:
        path = owners[entry.name]
        with safetensors.safe_open(path, framework="numpy") as file:  # opened anew: closing gives its pages back
            stored = checked_slice(file, entry.name, path)
            whole = all(cut == slice(0, size) for cut, size in zip(index, entry.stored_shape, strict=True))
            return file.get_tensor(entry.name) if whole else stored[index]

    return shapes, read


def checked_slice(file: Any, name: str, path: Path) -> Any:
    """The slice `name` of an open safetensors file; MoraError naming both if its dtype is no float that we know."""
    stored = file.get_slice(name)
    if stored.get_dtype() not in _DTYPES:
        raise MoraError(f"{path}: tensor {name!r} has dtype {stored.get_dtype()}; known: {', '.join(_DTYPES)}")
    return stored


def save_params(
    params: Params, config: DecoderConfig, folder: Path, special_ids: Mapping[str, int | None] = _NO_IDS
) -> None:
    """Write `model.safetensors` and `config.json` that transformers loads.

    `params` are numpy or JAX arrays in the decoder's layout; the file keeps their dtypes, and config.json names the
    widest, in which all are exact. `special_ids` are those of a `Tokenizer`, for config.json and
    generation_config.json: without an end of sequence there, transformers generates up to its limit. Raises MoraError
    for a parameter that is missing, unknown, of a wrong shape or not of a float dtype.
    """
    folder = Path(folder)
    content = families.to_hf(config)
    flat = flatten_dict(params, sep="/")
    check_params(flat, {row.ours: param_shape(row, config) for row in rows(config)})
    content |= {"dtype": np.result_type(*(array.dtype for array in flat.values())).name, **special_ids}
    folder.mkdir(parents=True, exist_ok=True)
    for name, said in ((CONFIG_FILE, content), (GENERATION_FILE, special_ids)):
        if said:
            (folder / name).write_text(json.dumps(dict(said), indent=2) + "\n", encoding="utf-8")
    write_safetensors(folder / WEIGHTS_FILE, flat, entries(config, "hf"))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises MoraError for a missing file, broken JSON or another top-level value."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MoraError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(content, dict):
        raise MoraError(f"{path}: holds a JSON {type(content).__name__}; it must be an object")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, sharded or not; raises MoraError where there are none or the index is bad."""
    index = folder / INDEX_FILE
    if index.exists():
        shards = read_json(index).get("weight_map")
        # A shard is a file of this folder; an index must not lead the reader elsewhere.
        if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
            raise MoraError(f"{index}: 'weight_map' must map every tensor to a file name in the same folder")
        return [folder / shard for shard in sorted(set(shards.values()))]
    if (folder / WEIGHTS_FILE).exists():
        return [folder / WEIGHTS_FILE]
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise MoraError(
            f"{folder}: only pickled weights ({pickles[0]}), which are never loaded because they can run code; convert "
            f"them to {WEIGHTS_FILE}"
        )
    raise MoraError(f"{folder}: no weights; known: {WEIGHTS_FILE}, {INDEX_FILE} with its shards")


def check_params(flat: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises MoraError unless the parameters by path are those of shapes `wanted`, in dtypes that can be written."""
    if missing := wanted.keys() - flat.keys():
        raise MoraError(f"missing parameter {min(missing)!r} of shape {list(wanted[min(missing)])}")
    for path, array in flat.items():
        if path not in wanted:
            raise MoraError(f"unexpected parameter {path!r}; this config has {', '.join(wanted)}")
        if array.shape != wanted[path]:
            raise MoraError(f"parameter {path!r} has shape {list(array.shape)}, the config says {list(wanted[path])}")
        if array.dtype.name not in _DTYPES.values():
            raise MoraError(f"parameter {path!r} has dtype {array.dtype.name}; known: {', '.join(_DTYPES.values())}")


def write_safetensors(path: Path, flat: Mapping[str, Any], stored: Iterable[Entry]) -> None:
    """Stream one tensor at a time; `safetensors.numpy.save_file` would hold two more copies of the model.

    `flat` has the parameters by path, `stored` the tensors to write, layer by layer within a row. The format
    (safetensors README, "Format"): u64 length of a JSON header, the header, the tensors without gaps.
    """
    kinds = {name: kind for kind, name in _DTYPES.items()}
    # Wide dtypes first keep every tensor aligned to its item size.
    order: Collection[Entry] = sorted(stored, key=lambda entry: -flat[entry.row.parts[0]].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for row, _, name, shape in order:
        start, dtype = end, flat[row.parts[0]].dtype
        if any(flat[part].dtype != dtype for part in row.parts):
            raise MoraError(f"{', '.join(row.parts)} are one tensor in {path.name}, but they differ in dtype")
        end += int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": kinds[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    current, stacks = None, {}
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for row, layer, _, _ in order:
            if row is not current:
                # One transfer for a whole stack rather than one for each layer.
                current, stacks = row, {part: np.asarray(jax.device_get(flat[part])) for part in row.parts}
            for stack in stacks.values():
                tensor = stack if layer is None else stack[layer]
                out.write(np.ascontiguousarray(tensor.T if row.transform == "transpose" else tensor).tobytes())
