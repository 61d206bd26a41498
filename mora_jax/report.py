"""THE report binary: draws what a run left in its workdir, or several runs side by side, as one HTML file.

    python -m mora_jax.report DIR [DIR ...] [--output=FILE]

The file needs nothing else: no network, no other file. It shows the numbers of results.json and computes none anew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mora_jax.errors import MoraError, exit_code
from mora_jax.reporting import page
from mora_jax.runtime import storage


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise MoraError(f"{message}; usage: python -m mora_jax.report DIR [DIR ...] [--output=FILE]")


def run(argv: Sequence[str]) -> None:
    """Everything but the handling of errors."""
    parser = _Parser(prog="python -m mora_jax.report", description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", metavar="DIR", type=storage.at, help="the --workdir of a train run")
    parser.add_argument(
        "--output",
        type=storage.at,
        metavar="FILE",
        help="default: report.html in DIR, for several in the current folder",
    )
    arguments = parser.parse_args(argv)
    print(f"{page.write(arguments.workdirs, arguments.output)} written")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 when drawn, else as `mora_jax.errors` lists them."""
    return exit_code(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
