"""Gate maps on pictures: how much of the answer at each patch comes from each task's experts (MoRA, arXiv 2506.21035,
figures 3, 6 and 7), for the page and as PNG files.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from mora_jax.data.images import png
from mora_jax.reporting.assets import STYLE
from mora_jax.reporting.charts import COLOURS, colour
from mora_jax.reporting.markup import Markup, el

if TYPE_CHECKING:
    from mora_jax.reporting.gatemaps import Panel

SIDE, GAP, LINE = 132, 10, 18  # of a drawn picture, between two, of a line of text; in pixels
SHADES = 6  # a share is drawn as one of so many opacities
VEIL = 0.72  # of a picture under its patches, so that colours stand out
# The colours of series in the style sheet, whose first scheme is the light one: for files without a style sheet.
PALETTE = tuple(re.findall(r"--c\d: (#[0-9a-f]{6})", STYLE)[:COLOURS])


def side_of(m: dict[str, Any]) -> int:
    """Patches along one side of the picture of a map."""
    return math.isqrt(len(m["tokens"]) - 1)


def shares(m: dict[str, Any], site: str, origins: Sequence[str]) -> Float[np.ndarray, "origins tokens"]:
    """The sum of the gates of each origin's experts at every token, 0..1."""
    found = np.zeros((len(origins), len(m["tokens"])))
    for token, expert, gate in m["sites"][site]:
        found[origins.index(m["origins"][expert]), token] += gate
    return found


def silent(m: dict[str, Any], site: str) -> Bool[np.ndarray, " tokens"]:
    """The tokens at which no expert answers."""
    found = np.ones(len(m["tokens"]), bool)
    found[[token for token, _, _ in m["sites"][site]]] = False
    return found


def _told(name: str, values: Float[np.ndarray, " tokens"]) -> str:
    return f"{name}: {100 * values[1:].mean():.0f} % of patches, {100 * values[0]:.0f} % of class token"


def draw(m: dict[str, Any], site: str, origins: Sequence[str]) -> Markup:
    """The picture, and it again for each origin of experts with its patches under the share of that origin."""
    source, alone = f"data:image/png;base64,{m['picture']}", silent(m, site)
    parts = [_picture(source, [], "picture", m["task"])]
    for index, (name, values) in enumerate(zip(origins, shares(m, site, origins), strict=True)):
        if name in m["origins"]:
            parts.append(
                _picture(source, [_patches(values[1:], f"gate {colour(index)}")], name, _told("gates", values))
            )
    if alone.any():
        none = alone.astype(float)
        parts.append(_picture(source, [_patches(none[1:], "silent")], "no expert", _told("silent", none)))
    return el("div", *parts, class_="patches")


def _picture(source: str, over: Iterable[Markup], name: str, told: str = "") -> Markup:
    over = list(over)
    image = el("image", href=source, width=SIDE, height=SIDE, preserveAspectRatio="none")
    veil = [el("rect", width=SIDE, height=SIDE, class_="veil", opacity=VEIL)] if over else []
    drawing = el(
        "svg", image, *veil, *over, viewBox=f"0 0 {SIDE} {SIDE}", width=SIDE, height=SIDE, role="img", aria_label=name
    )
    return el("div", drawing, el("b", name), el("small", told) if told else None)


def _patches(values: Float[np.ndarray, " patches"], class_: str) -> Markup:
    """One path for each shade that occurs."""
    side = math.isqrt(len(values))
    cell, steps = SIDE / side, {}
    for index, value in enumerate(values):
        if shade := round(min(float(value), 1.0) * SHADES):
            row, column = divmod(index, side)
            step = f"M{column * cell:.1f} {row * cell:.1f}h{cell:.1f}v{cell:.1f}h-{cell:.1f}z"
            steps.setdefault(shade, []).append(step)
    paths = (el("path", d="".join(s), opacity=round(shade / SHADES, 2)) for shade, s in sorted(steps.items()))
    return el("g", *paths, class_=class_)


# ------------------------------------------------------------------------------------------------------------ PNG files


def write(folder: Path, found: Iterable[Panel]) -> list[Path]:
    """TASK.png in `folder` for every task with a picture: a strip for each site and state. Returns the files."""
    by_task: dict[str, list[Panel]] = {}
    for panel in found:
        if panel.states[-1][1].get("picture") is not None:
            by_task.setdefault(panel.task, []).append(panel)
    files = []
    for task, of_task in by_task.items():
        strips = [_strip(when, m, panel.site) for panel in of_task for when, m in panel.states]
        sheet = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
        top = 0
        for strip in strips:
            sheet.paste(strip, (0, top))
            top += strip.height
        folder.mkdir(parents=True, exist_ok=True)
        files.append(folder / f"{task}.png")
        files[-1].write_bytes(png(np.asarray(sheet)))
    return files


def _strip(when: str, m: dict[str, Any], site: str) -> Image.Image:
    """What `draw` shows, in one row under a title."""
    picture = Image.open(io.BytesIO(base64.b64decode(m["picture"])), formats=("PNG",)).convert("RGB")
    picture = picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    origins = list(dict.fromkeys(m["origins"]))
    columns: list[tuple[str, Image.Image]] = [("picture", picture)]
    layers = [*shares(m, site, origins), silent(m, site).astype(float)]
    for index, (name, values) in enumerate(zip([*origins, "no expert"], layers, strict=True)):
        tint = PALETTE[index % COLOURS] if name in origins else "#444444"
        columns.append((f"{name} {100 * values[1:].mean():.0f} %", _tinted(picture, values[1:], tint)))
    strip = Image.new("RGB", (GAP + len(columns) * (SIDE + GAP), 2 * LINE + SIDE + GAP), "white")
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(12)
    pen.text((GAP, 2), f"{site}, layer {m['layer']}, {when}", "black", font)
    for index, (name, image) in enumerate(columns):
        left = GAP + index * (SIDE + GAP)
        pen.text((left, LINE), _fitted(name, font), "black", font)
        strip.paste(image, (left, 2 * LINE))
    return strip


def _fitted(name: str, font: ImageFont.FreeTypeFont) -> str:
    """A name no wider than a picture."""
    shown = name
    while font.getlength(shown) > SIDE and len(shown) > 2:
        shown = f"{shown[:-2]}…"
    return shown


def _tinted(picture: Image.Image, values: Float[np.ndarray, " patches"], tint: str) -> Image.Image:
    """The picture paled, and over it a colour as strong as the value of each patch."""
    side = math.isqrt(len(values))
    mask: UInt8[np.ndarray, "side side"] = np.round(255 * np.clip(values, 0, 1)).astype(np.uint8).reshape(side, side)
    pale = Image.blend(picture, Image.new("RGB", picture.size, "white"), VEIL)
    pale.paste(tint, mask=Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST))
    return pale
