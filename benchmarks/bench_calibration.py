"""Held-out log-likelihood and coverage of default fits, of a falling learning rate, of whitened columns, and of means of five.

A recipe is fitted with five seeds. The mean of their densities is an `Ensemble`, which costs no further fit. The coverage is the share of
held-out rows in the region of highest density that has 90 % of the flow's own samples; under contexts, of samples under the row's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import bench_samples
from .cases import Array
from .report import Settings
from .timing import Line, summary

SEEDS, MASS, DRAWS, SCORED = 5, 0.9, 400, 2000
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "cosine": {"schedule": "cosine"},
    "full": {"standardize": "full"},
    "full, cosine": {"standardize": "full", "schedule": "cosine"},
}


@dataclass(frozen=True)
class Data:
    """Rows, the contexts and weights that belong to them, and the bounds of the columns."""

    x: Array
    context: Array | None = None
    weights: Array | None = None
    bounds: Any = None


def slcp(path: Path) -> Data:
    """Five parameters given eight numbers (SLCP of sbi's benchmark, Lueckmann et al. 2021): four draws from a Gaussian that they shape."""
    rng = np.random.default_rng(3)
    theta = rng.uniform(-3, 3, (12_000, 5))
    noise = rng.normal(size=(len(theta), 4, 2))
    s, t, rho = theta[:, 2] ** 2, theta[:, 3] ** 2, np.tanh(theta[:, 4])
    first = theta[:, 0, None] + s[:, None] * noise[..., 0]
    second = theta[:, 1, None] + t[:, None] * (rho[:, None] * noise[..., 0] + np.sqrt(1 - rho[:, None] ** 2) * noise[..., 1])
    return Data(theta, np.stack([first, second], axis=2).reshape(len(theta), 8), bounds=[(-3, 3)] * 5)


def ring(path: Path) -> Data:
    """Two parameters given two noisy numbers: the posterior is an arc."""
    rng = np.random.default_rng(4)
    theta = rng.normal(size=(6_000, 2))
    seen = np.stack([np.hypot(*theta.T), theta[:, 0] * 0.3], axis=1) + 0.1 * rng.normal(size=(6_000, 2))
    return Data(theta, seen)


def _of(load: Callable[[Path], bench_samples.Data], rows: int) -> Callable[[Path], Data]:
    def chosen(path: Path) -> Data:
        x, weights = load(path)
        some = np.random.default_rng(6).permutation(len(x))[:rows]
        return Data(x[some], None, None if weights is None else weights[some])

    chosen.__doc__ = load.__doc__
    return chosen


# name -> loader, epochs
SETS: dict[str, tuple[Callable[[Path], Data], int]] = {
    "casp": (_of(bench_samples.casp, 20_000), 60),
    "galaxies": (_of(bench_samples.galaxies, 20_000), 60),
    "planck": (_of(bench_samples.planck, 20_000), 120),
    "slcp": (slcp, 120),
    "ring": (ring, 120),
}


def ranks(flow: Any, x: Array, context: Array | None) -> Array:
    """For each row the share of samples that are denser than it."""
    own = flow.log_prob(x, context).astype(np.float64)
    if context is None:
        drawn = np.sort(flow.log_prob(flow.sample(50 * DRAWS, seed=9, dtype="float64")).astype(np.float64))
        return 1 - np.searchsorted(drawn, own) / drawn.size
    found = np.empty(len(x))
    for first in range(0, len(x), 200):
        part = slice(first, first + 200)
        drawn = flow.sample_and_log_prob(DRAWS, context[part], seed=9, context_offset=first, dtype="float64")[1]
        found[part] = (drawn > own[part, None]).mean(axis=1)
    return found


def judged(flow: Any, data: Data, test: Array) -> dict[str, float]:
    """Mean log-likelihood of held-out rows, its standard error, and the coverage."""
    weights = np.ones(test.size) if data.weights is None else data.weights[test]
    share = weights / weights.sum()
    context = None if data.context is None else data.context[test]
    scores = flow.log_prob(data.x[test], context).astype(np.float64)
    nats = float(share @ scores)
    some = slice(0, SCORED if context is not None else None)
    inside = ranks(flow, data.x[test][some], None if context is None else context[some]) < MASS
    return {
        "nats": nats,
        "standard error": float((share**2 * (scores - nats) ** 2).sum() ** 0.5),
        "coverage": float(np.average(inside, weights=weights[some])),
    }


def run(settings: Settings) -> Iterator[Line]:
    """One line per data set and recipe."""
    import fastmaf

    for name, (load, epochs) in SETS.items():
        for recipe, options in RECIPES.items():
            line = Line("calibration", f"{name}, {recipe}", 0)
            try:
                data = load(settings.data)
            except FileNotFoundError as problem:
                line.skipped["fastmaf"] = f"no data: {Path(problem.filename).name} is absent"
                yield line
                continue
            line.rows = len(data.x)
            order = np.random.default_rng(5).permutation(len(data.x))
            train, test = np.split(order, [4 * len(order) // 5])
            context, weights = (None if array is None else array[train] for array in (data.context, data.weights))
            flows, seconds = [], []
            for seed in range(2 if settings.quick else SEEDS):
                start = time.perf_counter()
                flow = fastmaf.MAF(data.x.shape[1], 0 if context is None else context.shape[1], bounds=data.bounds, seed=seed)
                flow.fit(data.x[train], context, weights, max_epochs=1 if settings.quick else epochs, seed=seed, progress=False, **options)
                seconds.append(time.perf_counter() - start)
                flows.append(flow)
            fits = [judged(flow, data, test) for flow in flows]
            line.contenders["fastmaf"] = {"seconds": summary(seconds), "fits": fits}
            line.values |= {key: float(np.mean([one[key] for one in fits])) for key in fits[0]}
            line.values |= {f"{key} of the mean density": value for key, value in judged(fastmaf.Ensemble(flows), data, test).items()}
            yield line
