"""Gate maps on pictures: how much of the gate mass at each patch goes to the experts of each task, before and after.

The same as SVG for the report and as PNG files. After MoRA's own figures 3, 6 and 7 (arXiv 2506.21035).
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from mora_jax.reporting.charts import colour
from mora_jax.reporting.markup import Markup, el
from mora_jax.reporting.workdir import Workdir

TILE, GAP, HEAD = 112, 10, 18  # side of a picture, space between two, height of a line of text; in pixels
SHADES = 5  # as in the maps of prompts
# Of the series of a chart in light: the same as in `assets.STYLE`.
COLOURS = ("#1d64b0", "#b4530a", "#18764a", "#7646b4", "#b02f48", "#0c7080", "#80561f", "#a03a88")


class Strip(NamedTuple):
    """One row of tiles: when, and for each task of origin the gate mass of its experts [side, side]."""

    title: str
    mass: Mapping[str, Float[np.ndarray, "side side"]]


def strips(m: Mapping[str, Any], site: str) -> list[Strip]:
    """The gates of one map as the task left them, if that is known, and after the whole stream."""
    found = [Strip("after the whole stream", _mass(m, m, site))]
    if m.get("before"):
        found.insert(0, Strip(f"after {m['task']}", _mass(m, m["before"], site)))
    return found


def _mass(m: Mapping[str, Any], state: Mapping[str, Any], site: str) -> dict[str, np.ndarray]:
    side = math.isqrt(len(m["tokens"]))  # what is not a square of patches comes before them
    first = len(m["tokens"]) - side * side
    mass = {origin: np.zeros((side, side)) for origin in state["origins"]}
    for token, expert, gate in state["sites"][site]:
        if token >= first:
            mass[state["origins"][expert]][divmod(token - first, side)] += gate
    return mass


def draw(m: Mapping[str, Any], site: str) -> Markup:
    """The picture, and beside it a tile for each task of origin in each strip."""
    rows = strips(m, site)
    origins = list(rows[-1].mass)
    step, drawn = TILE + GAP, []
    picture = f"data:image/png;base64,{m['picture']}"
    drawn.append(el("image", href=picture, x=0, y=2 * HEAD, width=TILE, height=TILE))
    for row, strip in enumerate(rows):
        top = row * (step + 2 * HEAD) + 2 * HEAD
        drawn.append(el("text", strip.title, x=step, y=top - HEAD - 4))
        for column, (origin, mass) in enumerate(strip.mass.items()):
            left, class_ = (column + 1) * step, colour(origins.index(origin))
            drawn.append(el("text", origin, x=left, y=top - 4, class_=f"own {class_}"))
            drawn.append(el("rect", x=left, y=top, width=TILE, height=TILE, class_="group"))
            drawn += _squares(mass, left, top, class_)
    height = len(rows) * (step + 2 * HEAD)
    size = {"width": (len(origins) + 1) * step, "height": height}
    return el("svg", *drawn, **size, class_="map", role="img", aria_label=f"gate map of {m['task']} at {site}")


def _squares(mass: Float[np.ndarray, "side side"], left: int, top: int, class_: str) -> list[Markup]:
    """One path for each shade."""
    cell, paths = TILE / len(mass), {}
    for (i, j), value in np.ndenumerate(mass):
        if shade := min(SHADES, math.ceil(float(value) * SHADES - 0.5)):
            square = f"M{left + j * cell:.1f} {top + i * cell:.1f}h{cell:.1f}v{cell:.1f}h-{cell:.1f}z"
            paths.setdefault(shade, []).append(square)
    return [
        el("path", d="".join(found), class_=f"gate {class_}", opacity=round(shade / SHADES, 2))
        for shade, found in sorted(paths.items())
    ]


def save(run: Workdir) -> list[Path]:
    """gates/<task>.png of every map on a picture: a row of tiles for each site and strip, the picture on their left."""
    written = []
    for m in run.gate_maps:
        if m.get("picture"):
            path = run.path / "gates" / f"{m['task']}.png"
            _paint(m).save(path)
            written.append(path)
    return written


def _paint(m: Mapping[str, Any]) -> Image.Image:
    picture = Image.open(io.BytesIO(base64.b64decode(m["picture"]))).convert("RGB").resize((TILE, TILE))
    rows = [(site, strip) for site in m["sites"] for strip in strips(m, site)]
    origins = list(rows[-1][1].mass)
    step, tall = TILE + GAP, TILE + GAP + 2 * HEAD
    canvas = Image.new("RGB", ((len(origins) + 1) * step + GAP, len(rows) * tall + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for row, (site, strip) in enumerate(rows):
        top = row * tall + 2 * HEAD
        canvas.paste(picture, (GAP, top))
        pen.text((GAP, top - 2 * HEAD + 4), f"{m['task']}, {site}, {strip.title}", fill="black")
        for origin, mass in strip.mass.items():
            column = origins.index(origin)
            left, ink = GAP + (column + 1) * step, COLOURS[column % len(COLOURS)]
            pen.text((left, top - HEAD + 2), origin, fill=ink)
            shades = np.clip(mass, 0, 1)[..., None]
            tile = 255 - shades * (255 - np.array(Image.new("RGB", (1, 1), ink).getpixel((0, 0))))
            square = Image.fromarray(tile.astype(np.uint8)).resize((TILE, TILE), Image.Resampling.NEAREST)
            canvas.paste(square, (left, top))
            pen.rectangle((left, top, left + TILE - 1, top + TILE - 1), outline="#d5dae1")
    return canvas
