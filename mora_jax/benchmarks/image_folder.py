"""Benchmark `image_folder`: any directory `<root>/<task>/{train,eval,test}/<class>/*` is a stream of tasks.

Tasks are taught in the order of their names; classes are the folders of a task's train split in that order. Names that
begin with a dot are passed over. Beside the splits may lie
    classnames.txt   one line `folder = name` for each class, where the folder's name does not read well in a sentence;
                     without it underscores become blanks
    templates.txt    texts with one {} for the name of a class, one a line; the first is used in training, the mean of
                     all in evaluation; without it "a photo of a {}."
"""

from __future__ import annotations

from pathlib import Path

from mora_jax.benchmarks import folder as text_folder
from mora_jax.benchmarks.pictures import Picture, PictureTask
from mora_jax.benchmarks.stream import SPLITS
from mora_jax.data.files import read_lines
from mora_jax.errors import MoraError

LAYOUT = "the folder that holds <task>/{train,eval,test}/<class>/ with pictures"
CLASS_NAMES, TEMPLATES = "classnames.txt", "templates.txt"
DEFAULT_METRIC = "accuracy"


def _entries(folder: Path, folders: bool) -> list[Path]:
    """The folders (or files) in a folder by name, without hidden ones."""
    found = (path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir() == folders)
    return sorted(found, key=lambda path: path.name)


def task_names(root: str) -> tuple[str, ...]:
    """The sorted names of the folders under `root` with at least one split folder; MoraError if there are none."""
    top = text_folder.data_root(root, LAYOUT)
    names = tuple(path.name for path in _entries(top, True) if any((path / split).is_dir() for split in SPLITS))
    if not names:
        raise MoraError(f"benchmark.root {root!r} has no task: no folder in it holds train/, eval/ or test/")
    return names


def _lines(path: Path) -> tuple[str, ...]:
    lines = tuple(read_lines(path))
    if not lines:
        raise MoraError(f"{path} is empty; fill or remove it")
    return lines


def _class_names(task: Path, classes: list[str]) -> dict[str, str]:
    """Class folder -> name in sentences, in the order of the labels."""
    path = task / CLASS_NAMES
    if not path.is_file():
        return {name: name.replace("_", " ") for name in classes}
    named: dict[str, str] = {}
    for line in _lines(path):
        folder, equals, name = (part.strip() for part in line.partition("="))
        if not equals or not name:
            raise MoraError(f"{path}: line {line!r}; legal: folder = name")
        if folder not in classes:
            raise MoraError(f"{path} names the class folder {folder!r}, which is not in {task.name}/train")
        if folder in named:
            raise MoraError(f"{path} names the class folder {folder!r} twice")
        named[folder] = name
    if missing := [name for name in classes if name not in named]:
        raise MoraError(f"{path} does not name the class folder(s) {', '.join(missing)} of {task.name}/train")
    return {name: named[name] for name in classes}


def _pictures(task: Path, split: str, names: dict[str, str]) -> tuple[Picture, ...]:
    found = []
    for folder in _entries(task / split, True):
        if folder.name not in names:
            raise MoraError(
                f"class folder {task.name}/{split}/{folder.name} is not one of the {len(names)} classes of "
                f"{task.name}/train"
            )
        files = _entries(folder, False)
        if not files:
            raise MoraError(f"class folder {task.name}/{split}/{folder.name} is empty; half prepared?")
        source, name = f"{task.name}/{split}/{folder.name}", names[folder.name]
        found += [Picture(f"{source}/{file.name}", name, file.read_bytes) for file in files]
    if not found:
        raise MoraError(f"{task.name}/{split} holds no class folder; legal: {LAYOUT}")
    return tuple(found)


def load_task(name: str, root: str, *, split_seed: int, metric: str | None) -> PictureTask:
    """One task folder; pictures are read when they are needed. `split_seed` is unused: the folders are the splits.

    MoraError names the folder that is missing, empty, or of a class that the train split lacks.
    """
    del split_seed
    task = text_folder.data_root(root, LAYOUT) / name
    if not (task / "train").is_dir():
        raise MoraError(f"task folder {name} has no train/ folder, whose folders are the classes; legal: {LAYOUT}")
    classes = [folder.name for folder in _entries(task / "train", True)]
    names = _class_names(task, classes)
    splits = {split: _pictures(task, split, names) for split in SPLITS if (task / split).is_dir()}
    templates = {"templates": _lines(task / TEMPLATES)} if (task / TEMPLATES).is_file() else {}
    return PictureTask(
        name=name, metric=metric or DEFAULT_METRIC, splits=splits, classes=tuple(names.values()), **templates
    )
