"""Writes sets of pictures from their archives as array_record files: faster to read than many small files.

    python -m mora_jax.data.builders --root=DIR --set=OxfordPets [--out=DIR]

It reads CoOp's layout, FGVC Aircraft's own files and MNIST's idx files under `--root`, and writes
`<out>/clip_domains/<set>/<version>/`, which the benchmarks `xtail` and `mtil` read as the same task. `--out` is
`--root` unless it is given. No TensorFlow is needed: the pictures are stored as they are encoded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mora_jax.benchmarks import folder
from mora_jax.benchmarks.domains import DOMAINS, reading
from mora_jax.data import tfds
from mora_jax.errors import MoraError, exit_code, unknown


def prepare(name: str, root: str, out: str = "") -> Path:
    """Writes one set and returns its folder; MoraError for an unknown set and for archives that are not there."""
    if name not in DOMAINS:
        raise unknown("set", name, DOMAINS)
    path = folder.data_root(root, reading.LAYOUT)
    found = reading.archive(DOMAINS[name], path)
    if found is None:
        raise MoraError(f"{root}: no archive of {name} in CoOp's layout; see mora_jax/benchmarks/domains/reading.py")
    described, read = found
    return tfds.prepare(Path(out).expanduser() if out else path, name, described, read())


def run(argv: Sequence[str]) -> None:
    """Parses the command line (`argv` without the name of the program) and writes one set."""
    parser = argparse.ArgumentParser(prog="python -m mora_jax.data.builders", description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="the folder that holds the sets in CoOp's layout")
    parser.add_argument("--set", required=True, help=f"one of {', '.join(DOMAINS)}")
    parser.add_argument("--out", default="", help="where to write; --root unless it is given")
    options = parser.parse_args(argv)
    print(prepare(options.set, options.root, options.out))


if __name__ == "__main__":
    sys.exit(exit_code(run, sys.argv[1:]))
