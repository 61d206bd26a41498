"""Charts as inline SVG. Colours are classes s0 to s7, so that one style sheet serves light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from mora_jax.reporting.markup import Markup, el, join, number

COLOURS = 8  # classes in the style sheet; later series take them again with a dashed line
WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 22, 44  # of the plot area, for tick labels
NEAR = 14  # pixels within which points of a scatter share a label
Point = tuple[float, float]


class Series(NamedTuple):
    """A line or a cloud of points; None in the middle of a line is a gap. `lead` is drawn dashed, before the line."""

    name: str
    points: Sequence[Point]
    lead: Sequence[Point] = ()
    marks: bool = True
    faint: Sequence[Point] = ()  # drawn thin behind the line, such as the raw values of a smoothed one


class Axis(NamedTuple):
    """Labelled ticks; `ticks` None means round numbers over the range of the data."""

    label: str
    ticks: Sequence[tuple[float, str]] | None = None
    low: float | None = None
    high: float | None = None


class _Scale(NamedTuple):
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def colour(index: int) -> str:
    """The class of series number `index`."""
    return f"s{index % COLOURS}"


def line_chart(
    series: Sequence[Series], x: Axis, y: Axis, *, regions: Sequence[tuple[float, str]] = (), title: str
) -> Markup:
    """Lines over a common axis with a legend. `regions` are starts (x) of named stretches, such as tasks."""
    points = [p for s in series for p in (*s.points, *s.lead, *s.faint)]
    across, along = _scale(x, [p[0] for p in points], LEFT, WIDTH - RIGHT), _y_scale(y, points)
    parts = [*_frame(x, across, y, along)]
    for i, (start, name) in enumerate(regions):
        end = regions[i + 1][0] if i + 1 < len(regions) else across.high
        at = across(start)
        if i:
            parts.append(el("line", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM, class_="boundary"))
        middle = (at + across(end)) / 2
        parts.append(el("text", name, x=round(middle, 1), y=TOP - 7, text_anchor="middle"))
    for index, line in enumerate(series):
        parts.append(_line(line, index, across, along))
    return _figure(title, y.label, parts, series)


def scatter(series: Sequence[Series], x: Axis, y: Axis, *, title: str) -> Markup:
    """Points that carry their number, as the legend names them."""
    points = [p for s in series for p in s.points]
    across, along = _scale(x, [p[0] for p in points], LEFT, WIDTH - RIGHT), _y_scale(y, points)
    parts = [*_frame(x, across, y, along)]
    if along.low < 0 < along.high:
        parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=along(0), y2=along(0), class_="zero"))
    labels: list[tuple[float, float, list[str]]] = []  # one for points that lie on each other
    for index, cloud in enumerate(series):
        for px, py in cloud.points:
            at = across(px), along(py)
            name = el("title", f"{cloud.name}: {number(px)}, {number(py, signed=True)}")
            parts.append(el("circle", name, cx=at[0], cy=at[1], r=6, class_=f"mark {colour(index)}"))
            shared = next((texts for lx, ly, texts in labels if math.dist((lx, ly), at) < NEAR), None)
            if shared is None:
                labels.append((*at, shared := []))
            shared.append(cloud.name.partition(" ")[0])
    for lx, ly, texts in labels:
        left = lx > WIDTH * 0.8
        side = {"x": lx + (-10 if left else 10), "text_anchor": "end" if left else "start"}
        parts.append(el("text", ", ".join(texts), y=ly - 7, class_="name", **side))
    return _figure(title, y.label, parts, series)


def share_bars(rows: Sequence[tuple[str, dict[str, float] | None]], names: Sequence[str]) -> Markup:
    """One bar of 100 % per row, cut by name; the colour of a name is that of its place in `names`."""
    bars = []
    for label, shares in rows:
        cuts = [
            el(
                "span",
                f"{100 * share:.0f}" if share >= 0.06 else None,
                class_=colour(names.index(name)),
                style=f"width:{100 * share:.2f}%",
                title=f"{name}: {100 * share:.1f} %",
            )
            for name, share in (shares or {}).items()
        ]
        bars.append(el("div", el("span", label, class_="label"), el("div", *(cuts or ["none"]), class_="bar")))
    return join([el("div", *bars, class_="bars"), legend(names)])


def legend(names: Sequence[str]) -> Markup:
    """Names with the colour of their place."""
    items = []
    for index, name in enumerate(names):
        swatch = el("line", x1=1, x2=25, y1=6, y2=6, class_=_stroke(index))
        items.append(el("li", el("svg", swatch, viewBox="0 0 26 12", class_=colour(index), aria_hidden="true"), name))
    return el("ul", *items, class_="legend")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` steps apart."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / count))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def _scale(axis: Axis, values: Sequence[float], start: float, end: float) -> _Scale:
    if axis.ticks is not None:
        found = [at for at, _ in axis.ticks]
        low, high = min(found), max(found)
        return _Scale(low - 0.5, high + 0.5, start, end) if low == high else _Scale(low, high, start, end)
    low = axis.low if axis.low is not None else min(values, default=0.0)
    high = axis.high if axis.high is not None else max(values, default=1.0)
    found = ticks(low, high)
    return _Scale(found[0], found[-1], start, end)


def _y_scale(axis: Axis, points: Sequence[Point]) -> _Scale:
    return _scale(axis, [p[1] for p in points], HEIGHT - BOTTOM, TOP)


def _named_ticks(axis: Axis, scale: _Scale) -> Sequence[tuple[float, str]]:
    return axis.ticks if axis.ticks is not None else [(t, f"{t:g}") for t in ticks(scale.low, scale.high)]


def _frame(x: Axis, across: _Scale, y: Axis, along: _Scale) -> list[Markup]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for at, name in _named_ticks(y, along):
        parts.append(el("line", x1=LEFT, x2=right, y1=along(at), y2=along(at), class_="grid"))
        parts.append(el("text", name, x=LEFT - 7, y=along(at) + 4, text_anchor="end"))
    for at, name in _named_ticks(x, across):
        parts.append(el("text", name, x=across(at), y=bottom + 17, text_anchor="middle"))
    parts.append(el("line", x1=LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"))
    parts.append(el("text", x.label, x=(LEFT + right) / 2, y=HEIGHT - 6, text_anchor="middle", class_="name"))
    return parts


def _stroke(index: int) -> str:
    return "line" if index < COLOURS else "line again"


def _line(line: Series, index: int, across: _Scale, along: _Scale) -> Markup:
    def path(points: Sequence[Point], class_: str) -> Markup | None:
        if len(points) < 2:
            return None
        return el("path", d="M" + "L".join(f"{across(px)} {along(py)}" for px, py in points), class_=class_)

    dots = []
    for points, class_ in ((line.lead[:-1] if line.points else line.lead, "mark hollow"), (line.points, "mark")):
        for px, py in points if line.marks else ():
            dots.append(
                el(
                    "circle",
                    el("title", f"{line.name}: {number(py, 2)}"),
                    cx=across(px),
                    cy=along(py),
                    r=3.5,
                    class_=class_,
                )
            )
    lines = (path(line.faint, "faint"), path(line.lead, "lead"), path(line.points, _stroke(index)))
    return el("g", *lines, *dots, class_=colour(index))


def _figure(title: str, unit: str, parts: Sequence[Markup], series: Sequence[Series]) -> Markup:
    drawing = el("svg", join(parts), viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    names = [line.name for line in series]
    return el("figure", el("figcaption", title, el("span", unit)), drawing, legend(names) if len(names) > 1 else None)
