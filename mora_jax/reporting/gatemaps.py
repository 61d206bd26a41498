"""Gate maps: which experts answer at which token of a prompt, grouped by the task that they come from."""

from __future__ import annotations

from typing import Any

from mora_jax.reporting import picturemaps
from mora_jax.reporting.charts import colour
from mora_jax.reporting.markup import Markup, el
from mora_jax.reporting.workdir import Workdir

CELL, ROW, LETTER = 15, 7, 7  # width of a token, height of an expert, width of a letter; in pixels
LETTERS = 18  # of a token
SHADES = 5  # a gate is drawn as one of so many opacities, which keeps a map small
GAP = 4  # between two groups of experts


def draw(run: Workdir) -> Markup | None:
    """All maps of a run, one shown at a time; those on pictures beside the picture."""
    panels = [
        (f"{m['task']}: {site}", picturemaps.draw(m, site) if m.get("picture") else _map(m, cells))
        for m in run.gate_maps
        for site, cells in m["sites"].items()
    ]
    if not panels:
        return None
    first = run.gate_maps[0]
    options = (el("option", name, value=i) for i, (name, _) in enumerate(panels))
    shown = (el("div", chart, class_="scroll", hidden="hidden" if i else None) for i, (_, chart) in enumerate(panels))
    if first.get("picture"):
        caption = f"Gates of layer {first['layer']} on the first evaluated picture, before and after later tasks"
        note = "a square of colour = the gate mass of one task's experts at a patch"
    else:
        caption = f"Gates of layer {first['layer']} on the first evaluated prompt, after the whole stream"
        note = "column = token, row = expert, × = no expert at this token"
    return el(
        "figure",
        el("figcaption", caption, el("span", note)),
        el("label", "task and site ", el("select", *options, class_="panels")),
        el("div", *shown),
        class_="wide",
    )


def _map(m: dict[str, Any], cells: list) -> Markup:
    """Tokens from left to right, experts from top to bottom; a stronger colour is a larger gate."""
    groups = list(dict.fromkeys(m["origins"]))
    place = {name: i for i, name in enumerate(groups)}
    shown = [_visible(token) for token in m["tokens"]]
    head = 16 + LETTER * max(map(len, shown), default=0)
    tops = [head + e * ROW + place[origin] * GAP for e, origin in enumerate(m["origins"])]
    side = 14 + (LETTER + 1) * max((len(name) for name in groups), default=0)  # bold letters are wider
    width = side + CELL * len(m["tokens"]) + 8
    bottom = (tops[-1] if tops else head) + ROW
    paths: dict[tuple[str, int], list[str]] = {}
    for token, expert, gate in cells:
        shade = max(1, min(SHADES, round(gate * SHADES)))
        step = f"M{side + token * CELL} {tops[expert]}h{CELL - 1}v{ROW - 1}h{1 - CELL}z"
        paths.setdefault((m["origins"][expert], shade), []).append(step)
    drawn = [
        el("path", d="".join(steps), class_=f"gate {colour(place[name])}", opacity=round(shade / SHADES, 2))
        for (name, shade), steps in sorted(paths.items())
    ]
    for name, index in place.items():
        own = [top for top, origin in zip(tops, m["origins"], strict=True) if origin == name]
        middle = (own[0] + own[-1] + ROW) / 2 + 4
        drawn.append(el("text", name, x=side - 8, y=middle, text_anchor="end", class_=f"own {colour(index)}"))
        drawn.append(
            el("rect", x=side, y=own[0] - 1, width=width - side - 8, height=own[-1] + ROW - own[0], class_="group")
        )
    silent = set(range(len(m["tokens"]))) - {token for token, _, _ in cells}
    for index, token in enumerate(shown):
        x = side + index * CELL + CELL / 2
        drawn.append(el("text", token, transform=f"translate({x + 4} {head - 8}) rotate(-90)"))
        if index in silent:
            drawn.append(el("text", "×", x=x, y=bottom + 14, text_anchor="middle"))
    return el("svg", *drawn, width=width, height=bottom + 20, class_="map", role="img", aria_label="gate map")


def _visible(token: str) -> str:
    """Blanks as signs, and long tokens shortened."""
    shown = token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return shown if len(shown) <= LETTERS else f"{shown[: LETTERS - 1]}…"
