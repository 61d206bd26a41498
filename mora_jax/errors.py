"""The one exception for what a user can fix.

Everything below the binaries raises `MoraError` with a text that names the thing and the legal values; the binaries
print that text as one line and exit with a non-zero code. Any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence


class MoraError(Exception):
    """Bad input, named in one line (a key, a file and record, a tensor) together with what would be legal."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def unknown(kind: str, name: object, known: Iterable[str]) -> MoraError:
    """The error for a name that is in no table, with every name that is."""
    return MoraError(f"unknown {kind} {name!r}; known: {', '.join(sorted(known))}")


def some(names: Sequence[object]) -> str:
    """The first three of many names, for a line that is to stay one."""
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")


def exit_code(run: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Runs a binary: 0 when done, 2 after an error of the user or of the disk, which is told in one line on stderr."""
    try:
        run(argv)
    except MoraError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except OSError as problem:
        named = problem.filename or "the workdir"
        print(f"error: {named}: {problem.strerror}; what was saved before is kept", file=sys.stderr)
        return 2
    return 0
