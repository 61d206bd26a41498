"""Sets of pictures prepared by TensorFlow Datasets as array_record files, without TensorFlow.

    <root>/<data set>/[<configuration>/]<version>/{dataset_info.json,features.json,*.array_record-*}

The files are read by what they say of themselves (`builder_from_directory`), so any version of a data set will do.
Pictures are not decoded. This is the only importer of tensorflow_datasets, and it imports it when it is needed: that
takes seconds.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from mora_jax.data.archives import PictureSet, Stored
from mora_jax.errors import MoraError

# The data set that `prepare` writes: a configuration for each set, pictures in the order and with the sources given.
OURS = "clip_domains"
INFO = "dataset_info.json"
# The names under which data sets of TFDS keep the name of a picture's file.
_FILE_NAMES = ("file_name", "filename", "image/file_name")
_BATCH = 256  # records read at once when all labels are looked up


def how_to_prepare(name: str, configs: Sequence[str] = ()) -> str:
    """What prepares a data set. Most builders of TFDS need TensorFlow for it; reading does not."""
    if name == OURS:
        return f"python -m mora_jax.data.builders --root=ROOT --set={configs[0]}"
    name = "/".join((name, *configs[:1]))
    return f"tfds.builder({name!r}, data_dir=ROOT, file_format='array_record').download_and_prepare()"


def _version(path: Path) -> tuple[int, ...] | None:
    return tuple(map(int, path.name.split("."))) if re.fullmatch(r"\d+\.\d+\.\d+", path.name) else None


def find(root: Path, name: str, configs: Sequence[str] = ()) -> Path | None:
    """The folder of the newest prepared version of a data set, of the first configuration that is there; None if none.

    MoraError for a version whose preparation did not come to its end.
    """
    for config in configs or ("",):
        parent = root / name / config
        folders = [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
        versions = sorted((path for path in folders if _version(path)), key=_version)
        if versions:
            newest = versions[-1]
            if not (newest / INFO).is_file():
                raise MoraError(
                    f"{newest}: half prepared: no {INFO}; prepare it again: {how_to_prepare(name, configs)}"
                )
            return newest
        for path in folders:
            if path.name.startswith("incomplete."):
                raise MoraError(f"{path}: half prepared; prepare it again: {how_to_prepare(name, configs)}")
    return None


@lru_cache(maxsize=32)
def _builder(folder: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
    # Protocol buffers, JSON and TFDS raise errors of many kinds for files that are not theirs.
    except Exception as error:
        raise MoraError(f"{folder}: TFDS cannot read its {INFO} and features.json ({error})") from error
    file_format = builder.info.file_format
    if file_format is None or file_format.value != "array_record":
        found = file_format and file_format.value
        raise MoraError(f"{folder}: prepared as {found}; only array_record is read without TensorFlow: prepare it so")
    return builder


@lru_cache(maxsize=64)
def _records(folder: str, split: str) -> Any:
    """Random access to the records of a split, nothing in them decoded. One per process, opened when first needed."""
    import tensorflow_datasets as tfds

    # Not only the pictures: masks that nobody asked for would be decoded with every record.
    raw = {key: tfds.decode.SkipDecoding() for key in _builder(folder).info.features}
    return _builder(folder).as_data_source(split, decoders=raw)


def _read(folder: str, split: str, index: int) -> bytes:
    return _records(folder, split)[index]["image"]


def _check_shards(folder: Path, split: str) -> None:
    for path in _builder(str(folder)).info.splits[split].filepaths:
        if not Path(path).is_file():
            raise MoraError(f"{folder}: half prepared: the {split} split lacks its shard {Path(path).name}")


def _source(record: Mapping[str, Any], place: str, label: str, index: int) -> str:
    """What to call a picture: as `prepare` was told, else split, class and file, or number where there is no file."""
    file_name = next((record[key].decode() for key in _FILE_NAMES if key in record), str(index))
    return file_name if place.startswith(f"{OURS}/") else f"{place}/{label.strip('/')}/{file_name}"


def _all_records(folder: Path, split: str) -> Iterator[Mapping[str, Any]]:
    try:
        records = _records(str(folder), split)
        for start in range(0, len(records), _BATCH):
            yield from records.__getitems__(range(start, min(start + _BATCH, len(records))))
    # The readers of array_record and of protocol buffers raise errors of many kinds for damaged files.
    except Exception as error:
        told = str(error).partition("\n")[0]
        raise MoraError(
            f"{folder}: half prepared: the {split} split cannot be read ({told}); prepare it again"
        ) from error


def _stored(folder: Path, place: str, split: str, names: Sequence[str]) -> Iterator[Stored]:
    for index, record in enumerate(_all_records(folder, split)):
        number = int(record["label"])
        if not 0 <= number < len(names):
            raise MoraError(f"{folder}: record {index} of {split} has the label {number}; legal: 0..{len(names) - 1}")
        label = names[number]
        source = _source(record, f"{place}/{split}", label, index)
        yield Stored(source, label, partial(_read, str(folder), split, index))


def read(root: Path, folder: Path, splits: Mapping[str, str] | None = None) -> PictureSet:
    """The prepared data set in `folder` under `root`, with labels as TFDS names them.

    splits: our name -> the one in TFDS; None = those it has. All records are looked through once for their labels.
    MoraError for another file format, a split or a shard that is missing, and records that are no labelled pictures.
    """
    info = _builder(str(folder)).info
    features = dict(info.features or {})
    if "image" not in features or not getattr(features.get("label"), "names", None):
        raise MoraError(f"{folder}: its records are no 'image' with a named 'label'; they have: {', '.join(features)}")
    splits = splits or {split: split for split in info.splits}
    for split in splits.values():
        if split not in info.splits:
            raise MoraError(f"{folder}: no split {split!r}; it has: {', '.join(info.splits) or 'none'}")
        _check_shards(folder, split)
    names = tuple(features["label"].names)
    place = folder.parent.relative_to(root).as_posix()
    return PictureSet(names, {ours: list(_stored(folder, place, theirs, names)) for ours, theirs in splits.items()})


def prepare(root: Path, config: str, description: str, pictures: PictureSet) -> Path:
    """Writes `pictures` as the configuration `config` of the data set OURS under `root`, as array_record files.

    Pictures are stored as they are encoded, so that no TensorFlow is needed. Returns the folder of the data set; one
    that is already there stays as it is.
    """
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name=config, description=description),)
        name = OURS

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(names=pictures.classes),
                "file_name": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=description,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager  # nothing is downloaded
            return {split: self._generate_examples(stored) for split, stored in pictures.splits.items()}

        def _generate_examples(self, stored: Sequence[Stored]) -> Iterator[tuple[int, dict[str, Any]]]:
            for key, (source, label, read_bytes) in enumerate(stored):
                yield key, {"image": read_bytes(), "label": label, "file_name": source}

    builder = Builder(data_dir=root, config=config, file_format="array_record")
    with tempfile.TemporaryDirectory() as downloads:
        builder.download_and_prepare(download_dir=downloads)
    return Path(builder.data_path)
