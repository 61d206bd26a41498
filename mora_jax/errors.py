"""The one exception for what a user can fix, and the exit codes of all binaries.

Everything below the binaries raises `MoraError` with a text that names the thing and the legal values; the binaries
print that text as one line and exit with a non-zero code. Any other exception is a bug of ours and keeps its traceback.

| exit code | why | the same command again |
|---|---|---|
| 0 | done; of the train binary also stopped as asked | resumes what was stopped |
| REFUSED (2) | bad input, a loss that is not finite, a workdir in use | ends the same way |
| LOST (3) | another process of the run is gone | resumes |
| AGAIN (75) | trouble with a disk, a bucket or the network; of train_to_end.py also stopped as asked | resumes |
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

REFUSED, LOST, AGAIN = 2, 3, 75  # 75 is EX_TEMPFAIL of sysexits.h
WRONG_PATHS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


class MoraError(Exception):
    """Bad input, named in one line (a key, a file and record, a tensor) together with what would be legal.

    `code` is AGAIN for what is no fault of the input and may be over by the next start.
    """

    def __init__(self, message: str, code: int = REFUSED):
        super().__init__(" ".join(message.split()))
        self.code = code


def unknown(kind: str, name: object, known: Iterable[str]) -> MoraError:
    """The error for a name that is in no table, with every name that is."""
    return MoraError(f"unknown {kind} {name!r}; known: {', '.join(sorted(known))}")


def some(names: Sequence[object]) -> str:
    """The first three of many names, for a line that is to stay one."""
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")


def exit_code(run: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Runs a binary: 0 when done, else the code of an error that was told in one line on stderr."""
    try:
        run(argv)
    except MoraError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return code_of(problem)
    except OSError as problem:
        named = problem.filename or "the workdir"
        print(f"error: {named}: {problem.strerror}; what was saved before is kept", file=sys.stderr)
        return code_of(problem)
    return 0


def code_of(problem: Exception) -> int:
    """The exit code of an error; one that is not ours is trouble, but for paths that were given wrongly."""
    if isinstance(problem, MoraError):
        return problem.code
    return REFUSED if isinstance(problem, WRONG_PATHS) else AGAIN
