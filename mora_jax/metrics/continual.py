"""Continual-learning metrics: pure functions of the matrix R.

R[t, i] is the score in percent on task i after training task t (both from 0, T tasks), NaN where it was not evaluated.
Every function returns a float in percent (points for differences) and NaN where an entry it needs is missing or where
the number is undefined, so that half-filled matrices never give a number that looks finished.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

Matrix = Float[np.ndarray, "T T"]  # R, percent
Vector = Float[np.ndarray, "T"]  # one score per task, percent


# What each number of `summary` means, in one line for tables.
CONVENTIONS = {
    "overall_performance": "mean of the last row",
    "learned": "mean of the diagonal: what each task reached right after it was taught",
    "average": "mean of all entries that exist",
    "transfer": "tasks not taught yet",
    "last": "the same number as overall_performance, under the name of the CLIP papers",
    "backward_transfer": "signed, over the first T-1 tasks",
    "backward_transfer_clipped": "gains cut to 0, divided by T (the TRACE convention)",
    "forgetting": "best earlier score minus last score",
}


def _square(R: Matrix) -> Matrix:
    R = np.asarray(R, dtype=np.float64)
    if R.ndim != 2 or R.shape[0] != R.shape[1] or R.shape[0] == 0:
        raise ValueError(f"R must be a square matrix [T, T] with T >= 1, not of shape {R.shape}")
    return R


def overall_performance(R: Matrix) -> float:
    """OP = mean_i R[T-1, i]: the mean over all tasks after the last one (Chaudhry et al., arXiv 1801.10112)."""
    return float(np.mean(_square(R)[-1]))


def last(R: Matrix) -> float:
    """Last = mean_i R[T-1, i]: `overall_performance` under the name the CLIP papers use (ZSCL, arXiv 2303.06628)."""
    return overall_performance(R)


def learned(R: Matrix) -> float:
    """learned = mean_i R[i, i]: what each task reached right after it was taught (plasticity)."""
    return float(np.mean(np.diagonal(_square(R))))


def average(R: Matrix) -> float:
    """average = mean of the evaluated R[t, i]: the whole table for CLIP streams (ZSCL), t >= i for LLM streams.

    NaN unless every entry with t >= i is there.
    """
    R = _square(R)
    if np.isnan(R[np.tril_indices(len(R))]).any():
        return math.nan
    return float(np.nanmean(R))


def transfer(R: Matrix) -> float:
    """transfer = mean_{i>=1} [ mean_{t<i} R[t, i] ]: zero-shot ability on tasks not trained yet (ZSCL).

    A true 0 counts (the published code drops zeros). NaN for T = 1 and unless every entry with t < i is there.
    """
    R = _square(R)
    if len(R) == 1:
        return math.nan
    return float(np.mean([np.mean(R[:i, i]) for i in range(1, len(R))]))


def backward_transfer(R: Matrix, clipped: bool = False) -> float:
    """BWT = mean_{i<T-1} (R[T-1, i] - R[i, i]), signed; negative means forgetting (GEM, arXiv 1706.08840).

    clipped=True: (1/T) sum_i min(R[T-1, i] - R[i, i], 0), the convention behind the TRACE numbers of TreeLoRA, CoDyRA
    and MoRAM, which print its magnitude. The last task adds 0 to that sum. NaN for T = 1.
    """
    R = _square(R)
    if len(R) == 1:
        return math.nan
    change = (R[-1] - np.diagonal(R))[:-1]
    if clipped:
        return float(np.sum(np.minimum(change, 0.0)) / len(R))
    return float(np.mean(change))


def forgetting(R: Matrix) -> float:
    """forgetting = mean_{i<T-1} ( max_{i<=t<T-1} R[t, i] - R[T-1, i] ) (Chaudhry et al., arXiv 1801.10112).

    NaN for T = 1.
    """
    R = _square(R)
    if len(R) == 1:
        return math.nan
    return float(np.mean([np.max(R[i:-1, i]) - R[-1, i] for i in range(len(R) - 1)]))


def _none_for_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def summary(R: Matrix) -> dict[str, float | None]:
    """All metrics of this module by name, None where undefined (JSON has no NaN)."""
    values = {
        "overall_performance": overall_performance(R),
        "learned": learned(R),
        "average": average(R),
        "transfer": transfer(R),
        "last": last(R),
        "backward_transfer": backward_transfer(R),
        "backward_transfer_clipped": backward_transfer(R, clipped=True),
        "forgetting": forgetting(R),
    }
    return {name: _none_for_nan(value) for name, value in values.items()}


def summary_of_zero_shot(zero_shot: Vector) -> dict[str, float | None]:
    """The summary of a model that is never trained, from its scores per task: every row of its R would be `zero_shot`.

    overall_performance = last = average = mean_i z[i]; transfer = mean_{i>=1} z[i] (None for T = 1). What speaks of
    learning is None rather than a hollow 0.
    """
    z = np.asarray(zero_shot, dtype=np.float64)
    if z.ndim != 1 or z.size == 0:
        raise ValueError(f"zero_shot must be a vector [T] with T >= 1, not of shape {z.shape}")
    mean = _none_for_nan(float(np.mean(z)))
    return {
        "overall_performance": mean,
        "learned": None,
        "average": mean,
        "transfer": _none_for_nan(float(np.mean(z[1:]))) if z.size > 1 else None,
        "last": mean,
        "backward_transfer": None,
        "backward_transfer_clipped": None,
        "forgetting": None,
    }
