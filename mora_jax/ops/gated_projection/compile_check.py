"""Compiles every kernel for every accelerator it is for, on a machine without any, and fails where one got worse.

    python -m mora_jax.ops.gated_projection.compile_check [NAME ...] [--update]

A NAME is a target, a kernel or a shape of shapes.py, or the three joined by `:`; without names all are compiled. The
table says what the compilers of TPU and GPU make of the kernels: bytes of main memory beside arguments and results,
fast memory, registers, spills. Each is compared with compiled.json beside this file, which --update writes: more of
anything is a regression, and so is a kernel that no longer compiles. That shows what is legal and fits, not speed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mora_jax import compilers
from mora_jax.errors import MoraError, exit_code

Row = dict[str, Any]
TARGETS = {"compile_tpu": ("v5e", "v5p", "v6e"), "compile_gpu": ("h100",)}  # by module
RECORD = Path(__file__).with_name("compiled.json")
IDENTITY = ("target", "kernel", "shape")
MEASURES = ("temporaries", "vmem", "shared_memory", "registers", "spills")  # of which less is better
AT_LEAST = ("tensor_core",)  # of which there must be some, where there were
USAGE = "python -m mora_jax.ops.gated_projection.compile_check [NAME ...] [--update]"


def compile_all(names: Sequence[str]) -> Iterator[Row]:
    """Rows of all compilers, as they come. MoraError without the compilers or where something does not compile."""
    environment = compilers.environment()
    for module, own in TARGETS.items():
        others = {target for targets in TARGETS.values() for target in targets} - {*own}
        mine = [name for name in names if name.split(":")[-1] not in others]
        if names and not mine:
            continue
        command = [sys.executable, "-m", f"{__package__}.{module}", *mine]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
            yield from (json.loads(line) for line in child.stdout if line.startswith("{"))
        if child.returncode:
            raise MoraError(f"{module} ended with exit code {child.returncode}: see its messages above")


def identity(row: Row) -> tuple[str, ...]:
    """Which compilation a row is of."""
    return tuple(str(row.get(key, "")) for key in IDENTITY)


def regressions(rows: Iterable[Row], recorded: Iterable[Row]) -> list[str]:
    """A line for everything that got worse since it was recorded."""
    before = {identity(row): row for row in recorded}
    found = []
    for row in rows:
        old, name = before.get(identity(row)), ":".join(identity(row))
        if old is None:
            found.append(f"{name} is not recorded; --update writes it down")
            continue
        if "unsupported" in row and "unsupported" not in old:
            found.append(f"{name} is declined now: {row['unsupported']}")
            continue
        for measure in MEASURES:
            now, then = row.get(measure), old.get(measure)
            if now is not None and then is not None and now > then:
                found.append(f"{name}: {measure} {then} -> {now}")
        for measure in AT_LEAST:
            if old.get(measure) and not row.get(measure):
                found.append(f"{name}: {measure} {old[measure]} -> {row.get(measure)}")
    return found


def table(rows: Sequence[Row]) -> Table:
    """What the compilers said, a line each."""
    columns = [name for name in (*MEASURES, *AT_LEAST, "seconds") if any(row.get(name) is not None for row in rows)]
    shown = Table(title="ahead of time, bytes or counts", title_justify="left")
    for name in IDENTITY:
        shown.add_column(name)
    for name in columns:
        shown.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        cells = [_cell(row.get(name)) for name in columns]
        if "unsupported" in row:
            cells = [row["unsupported"], *[""] * (len(columns) - 1)]
        shown.add_row(*(str(row[name]) for name in IDENTITY), *cells)
    return shown


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:,}"


def run(argv: Sequence[str]) -> None:
    """Everything but the handling of errors."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return
    names = [word for word in argv if word != "--update"]
    if unknown := [name for name in names if name.startswith("-")]:
        raise MoraError(f"{unknown[0]} is not understood; usage: {USAGE}")
    rows = []
    for row in compile_all(names):
        rows.append(row)
        print(f"{len(rows):4d} {':'.join(identity(row))}", file=sys.stderr, flush=True)
    if not rows:
        raise MoraError(f"nothing is called {', '.join(names)}; names are those of the table that no name prints")
    Console(width=None if sys.stdout.isatty() else 160).print(table(rows))
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["rows"] if RECORD.exists() else []
    if "--update" in argv:
        write(rows, recorded)
        return
    if found := regressions(rows, recorded):
        raise MoraError(f"{len(found)} worse than in {RECORD.name}: {'; '.join(found)}")
    print(f"nothing got worse than in {RECORD.name}: {len(rows)} compilations")


def write(rows: Sequence[Row], recorded: Sequence[Row]) -> None:
    """The record with these rows in place of its own of the same identity."""
    merged = {identity(row): row for row in (*recorded, *rows)}
    kept = [{key: value for key, value in row.items() if key != "seconds"} for row in merged.values()]
    lines = ",\n".join(json.dumps(row) for row in sorted(kept, key=identity))
    RECORD.write_text(f'{{"rows": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{RECORD} written")


def main() -> int:
    """The exit code: 0 when nothing got worse, 2 after an error that was told in one line."""
    return exit_code(run, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
