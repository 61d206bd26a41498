"""The pictures of a set from wherever under the root they are: the task that X-TAIL and MTIL make of it.

Looked for in this order; `Task.variant` says which it was:
    CoOp's layout            <root>/oxford_pets/split_zhou_OxfordPets.json and the unpacked archive
    Aircraft's own files     <root>/fgvc_aircraft/images_variant_{train,val,test}.txt and images/
    MNIST's idx files        <root>/mnist/train-images-idx3-ubyte(.gz) and so on, or <root>/MNIST/raw/
    prepared by us           <root>/clip_domains/OxfordPets/<version>/, see `mora_jax.data.builders`
    prepared by TFDS         <root>/oxford_iiit_pet/<version>/, as array_record files
Only CoOp's split files and Aircraft's own are the published protocol of X-TAIL. The splits of TFDS are the official
ones, which are others for most sets (Flowers: 10 training pictures a class). Where TFDS has a single split (EuroSAT)
half of each class is drawn for train, a fifth for eval and the rest for test, CoOp's shares, by `benchmark.split_seed`.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path

from mora_jax.benchmarks import folder
from mora_jax.benchmarks.domains import DOMAINS, Domain
from mora_jax.benchmarks.pictures import Picture, PictureTask
from mora_jax.data import archives, tfds
from mora_jax.data.archives import PictureSet, Stored
from mora_jax.errors import MoraError, some

LAYOUT = "the folder that holds the sets of pictures, in CoOp's layout or prepared by TFDS"
AIRCRAFT_FOLDERS = ("fgvc_aircraft", "fgvc-aircraft-2013b/data")
MNIST_FOLDERS = ("mnist", "MNIST/raw", "mnist/MNIST/raw")
STRANGE = 0.25  # share of a set's class names that may be spelled as we do not know them
SHARES = (0.5, 0.2)  # of train and eval where the splits are drawn here

# A set as it was found: what its task's `variant` says, and what reads it.
Found = tuple[str, Callable[[], PictureSet]]


# --- where it is ------------------------------------------------------------------------------------------------------


def task_names(names: Sequence[str], root: str) -> tuple[str, ...]:
    """The `names` themselves; MoraError if the root is no folder or holds none of these sets."""
    path = folder.data_root(root, LAYOUT)
    if any((path / place).exists() for name in names for place in _places(DOMAINS[name])):
        return tuple(names)
    raise MoraError(f"benchmark.root {root!r} holds none of the sets {', '.join(names)}; set it to {LAYOUT}")


def _places(domain: Domain) -> list[str]:
    """The folders under the root that may hold the set."""
    archives_of = {"Aircraft": AIRCRAFT_FOLDERS, "MNIST": MNIST_FOLDERS}.get(domain.name, ())
    coop = [domain.coop.folder] if domain.coop else []
    return [*coop, *archives_of, f"{tfds.OURS}/{domain.name}", *filter(None, [domain.tfds])]


def _archive_name(domain: Domain) -> str:
    return {"Aircraft": "fgvc variant files", "MNIST": "mnist idx files"}.get(domain.name, "coop split_zhou")


def archive(domain: Domain, root: Path) -> Found | None:
    """The set as its authors publish it, if it is under the root."""
    read = None
    if domain.coop and (root / domain.coop.folder / domain.coop.split_file).is_file():
        coop = domain.coop
        read = partial(archives.read_coop, root / coop.folder, coop.split_file, coop.images)
    elif domain.name == "Aircraft":
        there = [root / name for name in AIRCRAFT_FOLDERS if archives.has_aircraft(root / name)]
        read = partial(archives.read_aircraft, there[0]) if there else None
    elif domain.name == "MNIST":
        there = [root / name for name in MNIST_FOLDERS if archives.has_mnist(root / name)]
        read = partial(archives.read_mnist, there[0]) if there else None
    return read and (_archive_name(domain), partial(_with_its_classes, domain, read))


def _prepared(domain: Domain, root: Path, split_seed: int) -> Found | None:
    """The set as array_record files, if they are under the root: ours, else those of TFDS."""
    ours = tfds.find(root, tfds.OURS, (domain.name,))
    if ours:
        read = partial(tfds.read, root, ours)
        return f"{_archive_name(domain)}, array_record", partial(_with_its_classes, domain, read)
    theirs = tfds.find(root, domain.tfds, domain.configs) if domain.tfds else None
    if theirs is None:
        return None
    version = " ".join(theirs.relative_to(root / domain.tfds).parts)
    read = partial(_read_tfds, domain, root, theirs, split_seed)
    if list(domain.tfds_splits) == ["train"]:
        return f"tfds {version} train, drawn by split_seed={split_seed}", read
    return f"tfds {version} {'/'.join(domain.tfds_splits.values())}", read


def _nowhere(domain: Domain, root: Path) -> MoraError:
    looked = []
    if domain.coop:
        looked.append(f"{domain.coop.folder}/{domain.coop.split_file} (CoOp's layout, see its DATASETS.md)")
    if domain.name == "Aircraft":
        looked.append(f"{AIRCRAFT_FOLDERS[0]}/{archives.AIRCRAFT_SPLIT.format('train')} (its archive's folder data)")
    if domain.name == "MNIST":
        looked.append(f"{MNIST_FOLDERS[0]}/{archives.MNIST_FILES['train'][0]} (its idx files)")
    looked.append(f"{tfds.OURS}/{domain.name}/<version> (python -m mora_jax.data.builders)")
    if domain.tfds:
        place = "/".join([domain.tfds, *domain.configs[:1], "<version>"])
        looked.append(f"{place} (TFDS: {tfds.how_to_prepare(domain.tfds, domain.configs)} where TensorFlow is)")
    return MoraError(f"task {domain.name!r}: under {root} there is none of: {'; '.join(looked)}")


# --- what is in it ----------------------------------------------------------------------------------------------------


def _folded(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())


def _with_its_classes(domain: Domain, read: Callable[[], PictureSet]) -> PictureSet:
    """What `read` gives, after a look at its classes. Its names stay: copies of one list differ in their spelling."""
    found = read()
    known = set(map(_folded, domain.classes))
    strange = [name for name in found.classes if _folded(name) not in known]
    if len(found.classes) != len(domain.classes) or len(strange) > STRANGE * len(known):
        example = f", {len(strange)} of them unknown, such as {strange[0]!r}" if strange else ""
        raise MoraError(
            f"task {domain.name!r}: the files list {len(found.classes)} classes{example}; the set has "
            f"{len(domain.classes)}, such as {domain.classes[0]!r}"
        )
    if strange:
        names = some([repr(name) for name in strange])
        print(
            f"task {domain.name!r}: {len(strange)} of {len(known)} class names are the files' own: {names}",
            file=sys.stderr,
        )
    return found


def _read_tfds(domain: Domain, root: Path, path: Path, split_seed: int) -> PictureSet:
    """The set as TFDS has it, its labels under our names, splits drawn where there is but one."""
    found = tfds.read(root, path, domain.tfds_splits)
    names = {label: domain.class_of_tfds[label] for label in found.classes if label in domain.class_of_tfds}
    strange = set(found.classes) - set(names) - domain.dropped
    if strange or len(names) != len(domain.classes):
        missing = sorted(set(domain.class_of_tfds) - set(names))
        raise MoraError(
            f"{path}: its labels are not the classes of {domain.name}: unknown {sorted(strange)[:3]}, missing "
            f"{missing[:3]}"
        )
    splits = {
        split: [stored._replace(label=names[stored.label]) for stored in records if stored.label in names]
        for split, records in found.splits.items()
    }
    if list(splits) == ["train"]:
        splits = drawn(splits["train"], random.Random(f"{domain.name} {split_seed}"))
    return PictureSet(domain.classes, splits)


def _by_class(records: Iterable[Stored]) -> dict[str, list[Stored]]:
    pools: dict[str, list[Stored]] = {}
    for stored in records:
        pools.setdefault(stored.label, []).append(stored)
    return pools


def drawn(records: Iterable[Stored], rng: random.Random) -> dict[str, list[Stored]]:
    """Splits drawn class by class in the shares of CoOp, whatever the order of the records."""
    splits: dict[str, list[Stored]] = {"train": [], "eval": [], "test": []}
    for _, pool in sorted(_by_class(records).items()):
        pool.sort(key=lambda stored: stored.source)
        rng.shuffle(pool)
        train, held_out = (round(len(pool) * share) for share in SHARES)
        splits["train"] += pool[:train]
        splits["eval"] += pool[train : train + held_out]
        splits["test"] += pool[train + held_out :]
    return splits


def _pictures(records: Iterable[Stored]) -> tuple[Picture, ...]:
    """The records, one of each class in turn: files are sorted by class, and a limit takes the first ones."""
    rounds = zip_longest(*_by_class(records).values())
    return tuple(Picture(*stored) for each in rounds for stored in each if stored is not None)


def load_task(
    name: str, root: str, *, split_seed: int, metric: str | None, templates: Callable[[Domain], tuple[str, ...]]
) -> PictureTask:
    """The task of one set; `templates` says which of the set's the benchmark takes.

    MoraError says what was looked for where a set is not there, and names the file where it is half prepared or wrong.
    """
    domain, path = DOMAINS[name], folder.data_root(root, LAYOUT)
    found = archive(domain, path) or _prepared(domain, path, split_seed)
    if found is None:
        raise _nowhere(domain, path)
    variant, read = found
    pictures = read()
    return PictureTask(
        name=name,
        metric=metric or "accuracy",
        splits={split: _pictures(records) for split, records in pictures.splits.items() if records},
        variant=variant,
        classes=pictures.classes,
        templates=templates(domain),
    )
