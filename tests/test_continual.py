"""Continual-learning metrics against matrices worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mora_jax.metrics import continual

NAN = math.nan
FULL = np.array([[80.0, 10.0, 30.0], [60.0, 70.0, 0.0], [50.0, 75.0, 90.0]])
LOWER = np.array([[80.0, NAN, NAN], [60.0, 70.0, NAN], [50.0, 75.0, 90.0]])
JOINT = np.array([[NAN, NAN, NAN], [NAN, NAN, NAN], [50.0, 75.0, 90.0]])


def test_full_matrix() -> None:
    assert continual.overall_performance(FULL) == pytest.approx((50 + 75 + 90) / 3)
    assert continual.last(FULL) == continual.overall_performance(FULL)
    assert continual.learned(FULL) == pytest.approx(80.0)
    assert continual.average(FULL) == pytest.approx(465 / 9)
    assert continual.transfer(FULL) == pytest.approx((10 + (30 + 0) / 2) / 2)
    assert continual.backward_transfer(FULL) == pytest.approx(((50 - 80) + (75 - 70)) / 2)
    assert continual.backward_transfer(FULL, clipped=True) == pytest.approx(-30 / 3)
    assert continual.forgetting(FULL) == pytest.approx(((80 - 50) + (70 - 75)) / 2)


def test_a_true_zero_counts_in_transfer() -> None:
    R = np.array([[50.0, 0.0], [40.0, 60.0]])
    assert continual.transfer(R) == 0.0
    assert continual.average(R) == pytest.approx(37.5)


def test_lower_triangle_has_all_but_transfer() -> None:
    assert continual.average(LOWER) == pytest.approx((80 + 60 + 70 + 50 + 75 + 90) / 6)
    assert math.isnan(continual.transfer(LOWER))
    for metric in (continual.overall_performance, continual.learned, continual.backward_transfer, continual.forgetting):
        assert metric(LOWER) == metric(FULL)


def test_transfer_needs_every_entry_above_the_diagonal() -> None:
    R = FULL.copy()
    R[1, 2] = NAN
    assert math.isnan(continual.transfer(R))
    assert continual.average(R) == pytest.approx(465 / 8)


def test_forgetting_takes_the_best_ever_but_not_the_last() -> None:
    R = np.array([[20.0, NAN, NAN], [60.0, 70.0, NAN], [90.0, 40.0, 50.0]])
    # Task 0 peaked at 60 before the last row; the 90 in the last row is no peak to fall from.
    assert continual.forgetting(R) == pytest.approx(((60 - 90) + (70 - 40)) / 2)


def test_clipped_drops_gains_only() -> None:
    R = np.array([[20.0, NAN], [90.0, 50.0]])
    assert continual.backward_transfer(R) == 70.0
    assert continual.backward_transfer(R, clipped=True) == 0.0


def test_joint_knows_only_the_end() -> None:
    assert continual.summary(JOINT) == {
        "overall_performance": pytest.approx(215 / 3),
        "learned": None,
        "average": None,
        "transfer": None,
        "last": pytest.approx(215 / 3),
        "backward_transfer": None,
        "backward_transfer_clipped": None,
        "forgetting": None,
    }


def test_unfinished_stream_has_no_last_row() -> None:
    R = np.array([[80.0, NAN], [NAN, NAN]])
    assert set(continual.summary(R).values()) == {None}


def test_one_task() -> None:
    assert continual.summary(np.array([[42.0]])) == {
        "overall_performance": 42.0,
        "learned": 42.0,
        "average": 42.0,
        "transfer": None,
        "last": 42.0,
        "backward_transfer": None,
        "backward_transfer_clipped": None,
        "forgetting": None,
    }


def test_zero_shot_summary() -> None:
    summary = continual.summary_of_zero_shot(np.array([10.0, 20.0, 60.0]))
    assert summary.keys() == continual.summary(FULL).keys()
    assert {key: value for key, value in summary.items() if value is not None} == {
        "overall_performance": 30.0,
        "average": 30.0,
        "transfer": 40.0,
        "last": 30.0,
    }
    # It is what a matrix with that row T times would give.
    repeated = continual.summary(np.tile([10.0, 20.0, 60.0], (3, 1)))
    assert all(summary[key] in (None, pytest.approx(value)) for key, value in repeated.items())


def test_zero_shot_of_one_task_has_no_transfer() -> None:
    assert continual.summary_of_zero_shot(np.array([10.0]))["transfer"] is None


@pytest.mark.parametrize("shape", [(2, 3), (3,), (0, 0)])
def test_not_square(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="square matrix"):
        continual.summary(np.zeros(shape))


def test_zero_shot_is_a_vector() -> None:
    with pytest.raises(ValueError, match="vector"):
        continual.summary_of_zero_shot(np.zeros((2, 2)))
