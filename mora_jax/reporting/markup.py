"""HTML and SVG as values: whatever is not already `Markup` is escaped, so data cannot become markup by oversight."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

VOID = ("meta", "wbr", "rect", "line", "path", "circle", "image")  # elements without an end tag


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def escaped(value: Any) -> Markup:
    """A value as markup; None is nothing."""
    if isinstance(value, Markup):
        return value
    return Markup("" if value is None else html.escape(str(value)))


def join(parts: Iterable[Any]) -> Markup:
    """Parts side by side."""
    return Markup("".join(map(escaped, parts)))


def el(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element. `class_` and `stroke_width` become class and stroke-width; None leaves an attribute out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID and not children:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def breakable(name: str) -> Markup:
    """A name that may be broken after each _, - and /."""
    parts = []
    for letter in name:
        parts += [letter, el("wbr")] if letter in "_-/" else [letter]
    return join(parts)


def embedded(identifier: str, value: Any) -> Markup:
    """Data for a script. No `<` survives, so that nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return el("script", Markup(text), type="application/json", id=identifier)


def number(value: float | None, digits: int = 1, *, signed: bool = False) -> str:
    """A number for people; a dot where there is none."""
    if value is None:
        return "·"
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"


def section(title: str, *children: Any, note: str = "") -> Markup:
    """A titled part of the page; `note` says how to read it."""
    return el("section", el("h2", title), el("p", note, class_="note") if note else None, *children)


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]], class_: str = "") -> Markup:
    """Rows under a header; a cell that is a `td` already stays as it is. The first cell names its row."""

    def cell(value: Any, first: bool) -> Markup:
        if isinstance(value, Markup) and value.startswith("<td"):
            return value
        return el("th", value, scope="row") if first else el("td", value)

    head = el("tr", *(el("th", name, scope="col") for name in header))
    body = (el("tr", *(cell(value, i == 0) for i, value in enumerate(row))) for row in rows)
    return el("div", el("table", el("thead", head), el("tbody", *body), class_=class_ or None), class_="scroll")


def heat_table(
    corner: str,
    columns: Sequence[Any],
    rows: Sequence[tuple[Any, Sequence[float | None]]],
    marked: Sequence[tuple[int, int]] = (),
) -> Markup:
    """Percentages with a shade behind each; `marked` cells (row, column) are outlined."""

    def cell(r: int, c: int, value: float | None) -> Markup:
        if value is None:
            return el("td", "·", class_="none")
        class_ = "heat marked" if (r, c) in marked else "heat"
        return el("td", number(value), class_=class_, style=f"--v:{min(max(value, 0), 100):.1f}%")

    body = [(name, *(cell(r, c, value) for c, value in enumerate(values))) for r, (name, values) in enumerate(rows)]
    return table((corner, *columns), body, "matrix")
