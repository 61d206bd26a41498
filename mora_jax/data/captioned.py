"""Captioned pictures from packages, for training a small CLIP: emoji with their names, as two companies drew them.

Pictures keep their transparency, so that training may lay them on any ground.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from mora_jax.data import packages
from mora_jax.data.registries import Unavailable
from mora_jax.errors import unknown

# Package -> the folder of its drawings, 64 x 64 pixels.
SOURCES = {
    "emoji-datasource-google": "package/img/google/64/",
    "emoji-datasource-twitter": "package/img/twitter/64/",
}


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
        for data, caption in _emoji(name):
            picture = _square(data, size)
            if picture is not None:
                pictures.append(picture)
                captions.append(caption)
    return Captioned(np.stack(pictures), tuple(captions))


def _square(data: bytes, size: int) -> UInt8[np.ndarray, "size size 4"] | None:
    """What there is to see, centred on a transparent square; None for an empty picture."""
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
    """Every emoji that was drawn, with its name in words."""
    files = packages.read_members(name, "package/")
    for emoji in json.loads(files["package/emoji.json"]):
        picture = files.get(SOURCES[name] + emoji["image"])
        if picture is not None:
            yield picture, " ".join(re.findall(r"\w+", (emoji["name"] or emoji["short_name"]).lower()))
