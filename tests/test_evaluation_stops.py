"""Stops while a row of R is filled: the entries it has are kept, the rest follows, and R comes out the same."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import Ended, results

from mora_jax import experiment
from mora_jax.runtime.checkpoint import ROW, Checkpoints

OPTIONS = {"train__learning_rate": 0.1, "train__steps_per_task": 10, "benchmark__metrics": "colours=fuzzy,digits=fuzzy"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[str], list[str]]]:
    """Titles of the evaluations so far, and those at which a SIGTERM comes."""
    titles: list[str] = []
    stops: list[str] = []
    evaluate = experiment.evaluate

    def noted(*words: Any) -> Any:
        titles.append(words[5].strip())
        if titles[-1] in stops:
            stops.remove(titles[-1])
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*words)

    monkeypatch.setattr(experiment, "evaluate", noted)
    return titles, stops


def test_a_stop_between_two_tasks_of_a_row_keeps_the_first(
    asked: tuple[list[str], list[str]], smoke: Callable[..., list[str]], main: Callable[..., Ended], tmp_path: Path
) -> None:
    titles, stops = asked
    assert main(*smoke(workdir=tmp_path / "whole", **OPTIONS)).code == 0
    whole = list(titles)
    assert len(whole) == len(set(whole)) == 5  # two before all training, then a row of one and a row of two
    titles.clear()
    stops += [whole[1], whole[4]]
    for _ in range(2):
        run = main(*smoke(workdir=tmp_path / "w", **OPTIONS))
        assert "stopped as asked" in run.out
        assert (tmp_path / "w" / ROW).exists()
    assert main(*smoke(workdir=tmp_path / "w", **OPTIONS)).code == 0
    assert titles == [*whole[:2], *whole[1:5], whole[4]]  # only what was interrupted is asked again
    assert not (tmp_path / "w" / ROW).exists()
    found, expected = results(tmp_path / "w"), results(tmp_path / "whole")
    for key in ("R", "zero_shot", "baselines", "gates", "summary", "prompts_truncated_of"):
        assert found[key] == expected[key], key
    assert len({value for row in found["R"] for value in row}) > 2, "a degenerate R would prove nothing"


def test_a_row_of_another_checkpoint_or_run_and_a_damaged_one_are_passed_over(tmp_path: Path) -> None:
    held, row = Checkpoints(tmp_path, 2), {"R": [1 / 3, None], "gates": [[1, 2, 3, (0.1, 0.2)], None]}

    def restored(run: str) -> Any:
        again = Checkpoints(tmp_path, 2)
        again.restore(lambda meta: {"x": np.zeros(1)})
        return again.noted(run)

    held.note("this run", row)
    assert restored("this run") == json.loads(json.dumps(row))
    held.save({"x": np.ones(1)}, {"step": 1, "task": 0, "phase": "trained"})
    assert restored("this run") is None
    held.note("this run", row)
    assert restored("this run")["R"] == row["R"]
    assert restored("another") is None
    kept = (tmp_path / ROW).read_text()
    for damaged in (kept.replace("0.1", "0.2"), kept[:-9], "3", "{}"):
        (tmp_path / ROW).write_text(damaged)
        assert restored("this run") is None
    (tmp_path / ROW).write_text(kept)
    held.save({"x": np.ones(1)}, {"step": 2, "task": 0, "phase": "training"})
    (tmp_path / ROW).write_text(kept)  # as after a kill between the two
    assert restored("this run") is None
