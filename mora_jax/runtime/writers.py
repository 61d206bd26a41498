"""What a run leaves on disk beside its checkpoints: results.json, metrics.jsonl, predictions, TensorBoard events."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mora_jax.errors import MoraError

ZERO_SHOT_ROW = "00_zero_shot"
SCALARS = {"loss", "grad_norm", "learning_rate", "tokens_per_second", "examples_per_second"}  # for TensorBoard


def row_name(index: int, tasks: Sequence[str]) -> str:
    """What the files of row `index` of R are called."""
    return f"{index + 1:02d}_{tasks[index]}"


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, likewise whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


@contextlib.contextmanager
def locked(workdir: Path):
    """Holds a workdir for this process; the lock goes with the process, however it ends. Raises MoraError if taken."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / ".lock", "a+")  # noqa: SIM115 - open as long as the lock is held
    except OSError as problem:
        raise MoraError(f"--workdir={workdir} cannot be written: {problem.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise MoraError(f"--workdir={workdir} is in use by another run; wait for it or choose another") from None
        yield


class MetricsLog:
    """metrics.jsonl: one row per train step, in step order, continued after a resume from the restored step."""

    def __init__(self, workdir: Path, restored_step: int, tensorboard: bool):
        self.path = workdir / "metrics.jsonl"
        rows = [row for row in read_lines(self.path) if row["step"] <= restored_step]
        write_lines(self.path, rows)
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter  # only when asked for: the import costs a second

            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=restored_step + 1)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        if self._board:
            for row in rows:
                for name in SCALARS & row.keys():
                    self._board.add_scalar(f"train/{name}", row[name], row["step"])
            self._board.flush()

    def write_score(self, name: str, percent: float, step: int) -> None:
        """A score for TensorBoard; results.json has it anyway."""
        if self._board:
            self._board.add_scalar(f"score/{name}", percent, step)

    def timing(self) -> dict[str, float | None]:
        """Medians over all steps but each process's first, which compiles."""
        rows = [row for row in read_lines(self.path) if not row["compiled"]]
        if not rows:
            return {"step_seconds_median": None, "tokens_per_second": None, "examples_per_second": None}
        seconds = sum(row["seconds"] for row in rows)
        tokens = sum(row["tokens"] for row in rows) if "tokens" in rows[0] else None
        return {
            "step_seconds_median": round(statistics.median(row["seconds"] for row in rows), 4),
            "tokens_per_second": tokens and round(tokens / seconds, 1),
            "examples_per_second": round(sum(row["examples"] for row in rows) / seconds, 3),
        }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line that a kill cut short is dropped."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows
