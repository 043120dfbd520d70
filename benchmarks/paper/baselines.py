"""Models without a network, in NumPy: they check the loaders, and say what a network has to beat.

Each function fits a model and returns its log-likelihood as a function of rows, (n, D) -> (n,).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Score = Callable[[Array], Array]

BLOCK = 4096
"""Rows that are in float64 at a time."""


def gaussian(x: Array) -> Score:
    """A Gaussian with full covariance."""
    mean = x.mean(axis=0, dtype=np.float64)
    blocks = (x[first : first + BLOCK] - mean for first in range(0, len(x), BLOCK))
    covariance = sum(block.T @ block for block in blocks) / (len(x) - 1)
    precision = np.linalg.inv(covariance)
    constant = -0.5 * float(np.linalg.slogdet(2 * math.pi * covariance)[1])

    def score(rows: Array) -> Array:
        centred = rows - mean
        return np.asarray(constant - 0.5 * np.einsum("ni,ni->n", centred @ precision, centred))

    return score


def gaussians(x: Array, labels: Array) -> list[Score]:
    """One Gaussian for each class."""
    return [gaussian(x[labels == label]) for label in range(int(labels.max()) + 1)]


def bernoulli(x: Array) -> Score:
    """Independent 0/1 variables, one added to each count."""
    ones = (x.sum(axis=0, dtype=np.float64) + 1) / (len(x) + 2)
    log_odds, constant = np.log(ones / (1 - ones)), float(np.log1p(-ones).sum())
    return lambda rows: rows @ log_odds + constant


def chow_liu(x: Array) -> Score:
    """The best tree of pairwise dependences (Chow and Liu 1968) between 0/1 variables, one added to each count."""
    parent = _tree(x)
    child = np.flatnonzero(parent >= 0)
    counts = np.ones((2, 2, x.shape[1]))  # value of the parent, value of the variable
    for value in (0, 1):
        given = x[:, parent] == value
        counts[value, 1] += (given & (x == 1)).sum(axis=0)
        counts[value, 0] += (given & (x == 0)).sum(axis=0)
    log_p = np.log(counts / counts.sum(axis=1, keepdims=True))
    root = bernoulli(x[:, parent < 0])

    def score(rows: Array) -> Array:
        values = rows.astype(np.int64)
        return root(rows[:, parent < 0]) + log_p[values[:, parent[child]], values[:, child], child].sum(axis=1)

    return score


def _tree(x: Array) -> NDArray[np.int64]:
    """The parent of each variable in the tree of largest mutual information, -1 for the first (Prim's algorithm)."""
    weight = _mutual_information(x)
    parent = np.zeros(len(weight), np.int64)
    parent[0], best = -1, weight[0].copy()
    outside = np.ones(len(weight), bool)
    outside[0] = False
    while outside.any():
        new = int(np.where(outside, best, -math.inf).argmax())
        outside[new] = False
        closer = outside & (weight[new] > best)
        best[closer], parent[closer] = weight[new][closer], new
    return parent


def _mutual_information(x: Array) -> Array:
    """Between each two columns, in nats, one added to each of the four counts."""
    x = x.astype(np.float64)
    both = x.T @ x
    ones = np.diag(both)
    either = {(1, 1): both, (1, 0): ones[:, None] - both, (0, 1): ones - both, (0, 0): len(x) - ones[:, None] - ones + both}
    joint = {values: (count + 1) / (len(x) + 4) for values, count in either.items()}
    one = joint[1, 1] + joint[1, 0]
    first = {1: one, 0: 1 - one}
    one = joint[1, 1] + joint[0, 1]
    second = {1: one, 0: 1 - one}
    return np.asarray(sum(p * np.log(p / (first[a] * second[b])) for (a, b), p in joint.items()))
