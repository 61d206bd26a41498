"""The one exception for what a user can fix.

Everything below the binaries raises `MoraError` with a text that names the thing and the legal values; the binaries
print that text as one line and exit with a non-zero code. Any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable


class MoraError(Exception):
    """Bad input, named in one line (a key, a file and record, a tensor) together with what would be legal."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def unknown(kind: str, name: object, known: Iterable[str]) -> MoraError:
    """The error for a name that is in no table, with every name that is."""
    return MoraError(f"unknown {kind} {name!r}; known: {', '.join(sorted(known))}")
