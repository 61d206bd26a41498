"""Gate maps: which experts answer at which token of a record, grouped by the task that they come from.

Of every task there is one record: as the bank saw it right after that task, and at the end of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from mora_jax.reporting import picturemaps
from mora_jax.reporting.charts import colour
from mora_jax.reporting.markup import Markup, el, join
from mora_jax.reporting.workdir import Workdir
from mora_jax.runtime.writers import row_name

CELL, ROW, LETTER = 15, 7, 7  # width of a token, height of an expert, width of a letter; in pixels
PATCH, WIDE = 7, 700  # width of a token that is a patch of a picture; where all are wider than WIDE, less
LETTERS = 18  # of a token
SHADES = 5  # a gate is drawn as one of so many opacities, which keeps a map small
GAP = 4  # between two groups of experts


class Panel(NamedTuple):
    """One record at one kind of site: (when, its map), from the oldest bank to the newest."""

    task: str
    site: str
    states: list[tuple[str, dict[str, Any]]]


def panels(run: Workdir) -> Iterator[Panel]:
    """All there is of a run, by task and site."""
    rows = [(row_name(i, run.tasks), task) for i, task in enumerate(run.tasks)]
    newest = run.gate_maps.get(rows[-1][0], [])
    own = {task: run.gate_maps.get(row, []) for row, task in rows[:-1]}
    for m in newest:
        before = [e for e in own.get(m["task"], ()) if e["task"] == m["task"]]
        for site in m["sites"]:
            states = [(f"right after {m['task']}", e) for e in before if site in e["sites"]]
            yield Panel(m["task"], site, [*states, ("after the whole stream", m)])


def draw(run: Workdir) -> Markup | None:
    """All maps of a run, one shown at a time."""
    found = list(panels(run))
    if not found:
        return None
    newest = found[0].states[-1][1]
    kind = "prompt" if newest.get("picture") is None else "picture"
    options = (el("option", f"{p.task}: {p.site}", value=i) for i, p in enumerate(found))
    shown = (el("div", _panel(p), class_="scroll", hidden="hidden" if i else None) for i, p in enumerate(found))
    how = "column = token" if kind == "prompt" else "column = patch, row by row behind the class token"
    return el(
        "figure",
        el(
            "figcaption",
            f"Gates of layer {newest['layer']} on the first evaluated {kind}",
            el("span", f"{how}; row = expert, × = no expert at this token"),
        ),
        el("label", f"{kind} and site ", el("select", *options, class_="panels")),
        el("div", *shown),
        class_="wide",
    )


def _panel(panel: Panel) -> Markup:
    origins = list(dict.fromkeys(panel.states[-1][1]["origins"]))
    parts = []
    for when, m in panel.states:
        pictures = None if m.get("picture") is None else picturemaps.draw(m, panel.site, origins)
        parts += [el("h3", when) if len(panel.states) > 1 else None, pictures, _map(m, panel.site, origins)]
    return join(parts)


def _map(m: dict[str, Any], site: str, groups: list[str]) -> Markup:
    """Tokens from left to right, experts from top to bottom; a stronger colour is a larger gate."""
    cells, place = m["sites"][site], {name: i for i, name in enumerate(groups)}
    cell, shown = _columns(m)
    head = 16 + LETTER * max(map(len, shown), default=0)
    tops = [head + e * ROW + place[origin] * GAP for e, origin in enumerate(m["origins"])]
    side = 14 + (LETTER + 1) * max((len(name) for name in groups), default=0)  # bold letters are wider
    width = side + cell * len(m["tokens"]) + 8
    bottom = (tops[-1] if tops else head) + ROW
    paths: dict[tuple[str, int], list[str]] = {}
    for token, expert, gate in cells:
        shade = max(1, min(SHADES, round(gate * SHADES)))
        step = f"M{side + token * cell} {tops[expert]}h{cell - 1}v{ROW - 1}h{1 - cell}z"
        paths.setdefault((m["origins"][expert], shade), []).append(step)
    drawn = [
        el("path", d="".join(steps), class_=f"gate {colour(place[name])}", opacity=round(shade / SHADES, 2))
        for (name, shade), steps in sorted(paths.items())
    ]
    for name in dict.fromkeys(m["origins"]):
        own = [top for top, origin in zip(tops, m["origins"], strict=True) if origin == name]
        middle = (own[0] + own[-1] + ROW) / 2 + 4
        drawn.append(el("text", name, x=side - 8, y=middle, text_anchor="end", class_=f"own {colour(place[name])}"))
        drawn.append(
            el("rect", x=side, y=own[0] - 1, width=width - side - 8, height=own[-1] + ROW - own[0], class_="group")
        )
    silent = set(range(len(m["tokens"]))) - {token for token, _, _ in cells}
    for index, token in enumerate(shown):
        x = side + index * cell + cell / 2
        if token:
            drawn.append(el("text", token, transform=f"translate({x + 4} {head - 8}) rotate(-90)"))
        if index in silent:
            drawn.append(el("text", "×", x=x, y=bottom + 14, text_anchor="middle"))
    return el("svg", *drawn, width=width, height=bottom + 20, class_="map", role="img", aria_label="gate map")


def _columns(m: dict[str, Any]) -> tuple[int, list[str]]:
    """The width of a column and what stands over each: every token of a text, of a picture the first patch of a row."""
    if m.get("picture") is None:
        return CELL, [_visible(token) for token in m["tokens"]]
    side = picturemaps.side_of(m)
    cell = PATCH if PATCH * len(m["tokens"]) <= WIDE else PATCH - 3
    return cell, ["", *(f"row {i // side + 1}" if i % side == 0 else "" for i in range(side * side))]


def _visible(token: str) -> str:
    """Blanks as signs, and long tokens shortened."""
    shown = token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return shown if len(shown) <= LETTERS else f"{shown[: LETTERS - 1]}…"
