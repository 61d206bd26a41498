"""MoRA, arXiv 2506.21035, Eq. 4 to 8, in NumPy and float64: loops over tokens and explicit Jacobians.

Written from DESIGN section 2; shares no code with `reference.py`.
"""

from __future__ import annotations

import numpy as np


def token_gate(z, alive, *, top_k, temperature, threshold=0.0, threshold_mode="absolute"):
    """(g, dg/dz as a [n, n] matrix, gap of the scores at rank k) of one token."""
    n, index = len(z), np.flatnonzero(alive)
    g, slope = np.zeros(n), np.zeros((n, n))
    square = float(np.sum(z[index] ** 2))
    if len(index) == 0:
        return g, slope, np.inf
    s = z[index] / np.sqrt(max(square, 1e-24))  # Eq. 5
    order = np.lexsort((index, -s))  # largest score first, then lowest index
    kept = order[:top_k]  # Eq. 6
    gap = s[order[top_k - 1]] - s[order[top_k]] if top_k < len(order) else np.inf
    p = np.zeros(len(s))
    p[kept] = np.exp((s[kept] - s[kept].max()) / temperature)
    p /= p.sum()  # Eq. 7
    open_ = np.ones(len(s))
    if threshold:  # Eq. 8
        bar = threshold if threshold_mode == "absolute" else (threshold * s.max() if s.max() > 0 else np.inf)
        open_ = (s >= bar).astype(float)
    dp_ds = (np.diag(p) - np.outer(p, p)) / temperature
    ds_dz = np.zeros_like(dp_ds)
    if square > 1e-24:
        ds_dz = np.eye(len(s)) / np.sqrt(square) - np.outer(z[index], z[index]) / square**1.5
    g[index] = open_ * p
    slope[np.ix_(index, index)] = open_[:, None] * (dp_ds @ ds_dz)
    return g, slope, gap


def paper(x, keys, values, alive, dy, **how):
    """(y, g, dx, d_keys, d_values, gap) for x [t, d_in]; gradients of sum(y * dy)."""
    x, keys, values, dy = (np.asarray(a, np.float64) for a in (x, keys, values, dy))
    y, dx = np.zeros((len(x), values.shape[1])), np.zeros_like(x)
    d_keys, d_values, g_all, gaps = np.zeros_like(keys), np.zeros_like(values), [], []
    for t in range(len(x)):
        z = np.where(alive, keys @ x[t], 0.0)
        g, slope, gap = token_gate(z, alive, **how)
        y[t] = (g * z) @ values  # Eq. 4
        dc = values @ dy[t]  # of c = g z
        dz = (g * dc + slope.T @ (dc * z)) * (np.sum(z**2) > 1e-24)  # no direction: a response is a constant
        dx[t] = dz @ keys
        d_keys += np.outer(dz, x[t])
        d_values += np.outer(g * z, dy[t])
        g_all, gaps = [*g_all, g], [*gaps, gap]
    return y, np.array(g_all), dx, d_keys, d_values, np.array(gaps)
