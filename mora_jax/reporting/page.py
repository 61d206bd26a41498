"""The document around the sections: one file without anything from outside, in light and dark."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import mora_jax
from mora_jax.errors import MoraError
from mora_jax.reporting import comparison, gatemaps, picturemaps, single
from mora_jax.reporting.assets import SCRIPT, STYLE
from mora_jax.reporting.markup import Markup, el
from mora_jax.reporting.workdir import read
from mora_jax.runtime import storage

FILE = "report.html"
# The page may load nothing, from nowhere; its pictures lie in it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write(workdirs: Sequence[Path], output: Path | None = None) -> Path:
    """Draws one run, or several side by side, and returns where to.

    The default is report.html in the workdir, for several in the current folder. Gate maps of one run on pictures also
    become PNG files, in a folder `gates` beside it. Raises MoraError for workdirs that cannot be drawn and for a file
    that cannot be written.
    """
    if len({storage.absolute(path) for path in workdirs}) < len(workdirs):
        raise MoraError("a workdir was given twice; name each run once")
    runs = [read(path) for path in workdirs]
    alone = len(runs) == 1
    title = f"{runs[0].name}: {runs[0].results['method']}" if alone else f"{len(runs)} runs"
    text = document(title, single.sections(runs[0]) if alone else comparison.sections(runs))
    file = output or (workdirs[0] / FILE if alone else Path(FILE))
    if file.is_dir():
        raise MoraError(f"{file} is a folder; the report needs a file, such as {file / FILE}")
    try:
        storage.write_text(file, text)
        picturemaps.write(file.parent / "gates", gatemaps.panels(runs[0]) if alone else ())
    except OSError as problem:
        raise MoraError(f"{file} cannot be written: {os.strerror(problem.errno)}") from None
    return file


def document(title: str, sections: Sequence[Markup]) -> str:
    """The whole file."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{title} - mora_jax"),
        el("style", Markup(STYLE)),
    )
    footer = el("footer", f"drawn by mora_jax {mora_jax.__version__} from the files of a workdir alone")
    body = el("body", el("main", *sections, footer), el("script", Markup(SCRIPT)))
    return f"<!DOCTYPE html>\n{el('html', head, body, lang='en')}\n"
