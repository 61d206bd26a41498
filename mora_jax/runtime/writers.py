"""What a run leaves on disk beside its checkpoints: results.json, metrics.jsonl, predictions, TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mora_jax.errors import MoraError
from mora_jax.runtime import hosts, storage
from mora_jax.runtime.storage import write_text

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


class MetricsLog:
    """metrics.jsonl: one row per train step, in step order, continued after a resume from the restored step."""

    def __init__(self, workdir: Path, restored_step: int, tensorboard: bool):
        self.path = workdir / "metrics.jsonl"
        rows = [row for row in read_lines(self.path) if row["step"] <= restored_step]
        write_lines(self.path, rows)
        self._board = None
        if tensorboard and storage.is_remote(workdir):
            raise MoraError(f"log.tensorboard=true writes to folders only, and --workdir={workdir} is none")
        if tensorboard and hosts.first():
            from tensorboardX import SummaryWriter  # only when asked for: the import costs a second

            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=restored_step + 1)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        storage.append_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
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
