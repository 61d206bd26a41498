"""Files of task data: read whole, and what is wrong in them said in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mora_jax.errors import MoraError


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file that hold something, stripped; MoraError with the place of a byte that is no UTF-8."""
    try:
        # utf-8-sig: a byte-order mark, which some editors write, is not content.
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise MoraError(f"{path}: not UTF-8 at byte {error.start}") from None
    return [stripped for line in lines if (stripped := line.strip())]


def read_json(path: Path) -> Any:
    """The value in a UTF-8 JSON file; MoraError with the place of what is wrong in it."""
    try:
        # utf-8-sig: a byte-order mark, which some editors write, is not content.
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise MoraError(f"{path}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        lines = "; legal: one JSON list, not one record a line" if error.msg == "Extra data" else ""
        raise MoraError(f"{path}, line {error.lineno}, column {error.colno}: broken JSON: {error.msg}{lines}") from None
    except RecursionError:
        raise MoraError(f"{path}: broken JSON: brackets nested too deep") from None
    except ValueError as error:  # such as a number of more digits than Python reads
        raise MoraError(f"{path}: broken JSON: {error}") from None
    except OSError as error:
        raise MoraError(f"{path}: cannot be read: {error.strerror}") from None
