"""Captioned pictures from packages, for training a small CLIP: emoji with their names and clip art with its file names.

Pictures keep their transparency, so that training may lay them on any ground.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from mora_jax.data import packages
from mora_jax.data.registries import Unavailable
from mora_jax.errors import unknown

# Emoji: of every drawing the folder of its package.
_EMOJI = {"emoji-datasource-google": "google", "emoji-datasource-twitter": "twitter"}
_CLIP_ART = "usr/share/openclipart/png/"
# Folders that hold parts of programs' windows, named after functions.
_NOT_PICTURES = ("computer/",)
_WORDS = 3  # of a file's name; what follows is mostly the name of who drew it
_MAX_PIXELS = 400_000  # the quarter that is larger takes longer to read than all others together


@dataclass(frozen=True)
class Captioned:
    """Pictures with straight alpha and the caption of each."""

    pixels: UInt8[np.ndarray, "n size size 4"]
    captions: tuple[str, ...]

    def only(self, kept: Bool[np.ndarray, " n"]) -> Captioned:
        """Those that are marked."""
        return Captioned(self.pixels[kept], tuple(np.array(self.captions)[kept].tolist()))


def available(say: Callable[[str], None]) -> tuple[str, ...]:
    """The packages of SOURCES that can be had on this machine, downloaded; `say` is told of the others.

    Raises Unavailable where there is none.
    """
    found = []
    for name in SOURCES:
        try:
            packages.archive(name)
        except Unavailable as refusal:
            say(f"captioned pictures are left out: {refusal}")
        else:
            found.append(name)
    if not found:
        raise Unavailable(f"none of the packages with captioned pictures can be had: {', '.join(SOURCES)}")
    return tuple(found)


def load(names: Sequence[str], size: int) -> Captioned:
    """All pictures of these packages at size x size pixels; MoraError for a name that is not in SOURCES."""
    pictures, captions = [], []
    for name in names:
        if name not in SOURCES:
            raise unknown("package of captioned pictures", name, SOURCES)
        for data, caption in SOURCES[name](name):
            picture = _square(data, size)
            if picture is not None:
                pictures.append(picture)
                captions.append(caption)
    return Captioned(np.stack(pictures), tuple(captions))


def _square(data: bytes, size: int) -> UInt8[np.ndarray, "size size 4"] | None:
    """What there is to see, centred on a transparent square; None for an empty or very large picture."""
    # A PNG's size in pixels stands at its start; Pillow warns of a few pictures as soon as it opens them.
    if math.prod(struct.unpack(">II", data[16:24])) > _MAX_PIXELS:
        return None
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    if (seen := image.getbbox()) is None:
        return None
    image = image.crop(seen)
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    # Resized with premultiplied alpha, so that no colour of transparent pixels shows.
    image = image.convert("RGBa").resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0).convert("RGBA")
    square = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    square.paste(image, ((size - width) // 2, (size - height) // 2))
    return np.asarray(square)


def _emoji(name: str) -> Iterator[tuple[bytes, str]]:
    folder = f"package/img/{_EMOJI[name]}/64/"
    files = packages.read_members(name, "package/")
    for emoji in json.loads(files["package/emoji.json"]):
        # Some new ones have not been drawn by everyone.
        if folder + emoji["image"] in files:
            yield files[folder + emoji["image"]], _spoken(emoji["name"] or emoji["short_name"])


def _spoken(name: str) -> str:
    return " ".join(re.findall(r"\w+", name.lower()))


def _clip_art(name: str) -> Iterator[tuple[bytes, str]]:
    for member, data in packages.read_members(name, _CLIP_ART).items():
        *folders, file = member.removeprefix(_CLIP_ART).removesuffix(".png").split("/")
        words = [word for word in re.findall("[a-z]+", file.lower()) if len(word) > 2][:_WORDS]
        subject = [] if folders[:1] in ([], ["unsorted"]) else re.findall("[a-z]+", folders[-1].lower())
        if words and not member.removeprefix(_CLIP_ART).startswith(_NOT_PICTURES):
            yield data, " ".join([*words, *(word for word in subject if word not in words)])


SOURCES: dict[str, Callable[[str], Iterator[tuple[bytes, str]]]] = {
    "emoji-datasource-google": _emoji,
    "emoji-datasource-twitter": _emoji,
    "openclipart-png": _clip_art,
}
