"""Tasks whose records are pictures with a class: what a picture is, and what such a task adds to a task of a stream."""

from __future__ import annotations

import contextlib
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mora_jax import errors
from mora_jax.benchmarks.stream import Task
from mora_jax.data.images import decode
from mora_jax.errors import MoraError

SAMPLED = 16  # pictures of a split that decide the digest; to read them all takes minutes on a network drive
PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins


@dataclass(frozen=True)
class Picture:
    """One record: an encoded picture, read when it is needed, and the name of its class.

    source: what a person would call the picture: a file, or a member of an archive. It stands in errors and predictions
    where a text task has its prompt, and it must not change when the data moves to another folder.
    """

    source: str
    answer: str
    read: Callable[[], bytes] = field(compare=False)

    @property
    def prompt(self) -> str:
        return self.source


@dataclass(frozen=True)
class PictureTask(Task):
    """A task of a stream whose splits hold Pictures; `labels` are its classes.

    classes: their names, in the order of the labels. templates: texts with one `{}` for the name of a class.
    """

    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("a photo of a {}.",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "labels", self.classes)
        for name, count in Counter(self.classes).items():
            if count > 1:
                raise MoraError(f"task {self.name!r}: class {name!r} is listed {count} times")
        for template in self.templates:
            if template.count("{}") != 1:
                raise MoraError(f"task {self.name!r}: template {template!r} must hold {{}} exactly once")
        known = set(self.classes)
        for split, pictures in self.splits.items():
            for picture in pictures:
                try:
                    picture.source.encode()
                except UnicodeEncodeError:
                    raise MoraError(
                        f"task {self.name!r}, {split}: the name {picture.source!a} is not UTF-8, as the files of a run "
                        "are; rename it"
                    ) from None
                if picture.answer not in known:
                    raise MoraError(
                        f"task {self.name!r}, {split}: {picture.source} has the class {picture.answer!r}, "
                        f"which is none of the {len(known)} listed"
                    )

    def made(self, epochs: int) -> int:
        """As of a Task; the second sums are those of pixels."""
        return 2

    def _content(self) -> dict[str, Any]:
        pictures = {split: _sample(pictures) for split, pictures in self.splits.items()}
        return super()._content() | {"classes": self.classes, "templates": self.templates, "pictures": pictures}


def _sample(pictures: Sequence[Picture]) -> list[int | None]:
    """CRC-32 of some pictures, spread evenly; None where one is not to be had, which its reader tells later.

    MoraError for one that cannot be read now, for a digest without it would be that of other data.
    """
    found: list[int | None] = []
    for picture in pictures[:: max(1, -(-len(pictures) // SAMPLED))]:
        try:
            found.append(_sum(picture))
        except errors.WRONG_PATHS:  # which stay until somebody mends the data
            found.append(None)
        except OSError as problem:
            said = f"{picture.source} cannot be read now ({problem}); try again"
            raise MoraError(said, errors.AGAIN) from None
    return found


def _sum(picture: Picture) -> int:
    """Of a PNG that of its pixels: arrays are encoded here, and otherwise by each version of Pillow and zlib.

    Of other files that of their bytes: decoders of JPEG may differ in a bit of a pixel.
    """
    data = picture.read()
    if data.startswith(PNG):
        with contextlib.suppress(MoraError):  # a damaged one
            pixels = decode(data, picture.source)
            return zlib.crc32(pixels.tobytes(), pixels.width)
    return zlib.crc32(data)
