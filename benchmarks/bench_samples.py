"""Whether samples of flows fitted by default settings look like the data, and what that costs in held-out log-likelihood.

Each data set is fitted as it is by default; with the default bound of the log-scales alone, networks reading every value as it is; and
with log(1000) in every transform, which was the default before and is that of a single transform. A fifth of the rows is held out. Draws
are far out where they lie 1.5 ranges of the data beyond its ends;
how many of them the tails of the data explain is extrapolated from its outermost rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .bench_quality import proteins
from .cases import Array
from .report import Settings
from .timing import Line, summary

DRAWS, SEEDS, RANGES, OUTERMOST, RARE = 1_000_000, 5, 1.5, 50, 0.05
OPTIONS: dict[str, dict[str, Any]] = {
    "log 1000": {"clip": math.log(1000), "input_clip": None},
    "clip alone": {"input_clip": None},
    "default": {},
}

Data = tuple[Array, Array | None]


def galaxies(path: Path) -> Data:
    """Redshift and six magnitudes: the data of the README."""
    from fastmaf.data import galaxies as load

    return load()[0].astype(np.float64), None


def casp(path: Path) -> Data:
    """Protein structures; one column has a row at 53 standard deviations."""
    return proteins(path, np.random.default_rng(0)), None


def planck(path: Path) -> Data:
    """Both chains, with their weights."""
    data = np.load(path / "cosmo_compare_devel_drag_f64.npz")
    return data["x"], data["weight"]


def student(path: Path) -> Data:
    """Six correlated columns of a Student t distribution with three degrees of freedom."""
    rng = np.random.default_rng(7)
    mix = rng.normal(size=(6, 6))
    return rng.normal(size=(20_000, 6)) @ mix / np.sqrt(rng.chisquare(3, size=(20_000, 1)) / 3), None


def lognormal(path: Path, features: int = 8, rows: int = 20_000) -> Data:
    """Correlated lognormal columns, of scales from 1e-6 to 1e6."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(features, features))
    return np.exp(rng.normal(size=(rows, features)) @ mix * 0.3) * 10.0 ** rng.integers(-6, 7, features), None


def many(path: Path) -> Data:
    """4,000 rows of 19 lognormal columns."""
    return lognormal(path, 19, 4000)


def patches(path: Path) -> Data:
    """20,000 patches of photographs, dequantised, their mean taken off, without the last pixel; 50,000 more are held out."""
    data, rng = np.load(path / "bsds300_like_patches_u8.npz"), np.random.default_rng(0)
    x = np.concatenate([data["train"][:20_000], data["test"]])
    x = (x + rng.uniform(size=x.shape)) / 256
    return (x - x.mean(axis=1, keepdims=True))[:, :-1], None


@dataclass(frozen=True)
class Case:
    """A data set and the flow that is fitted to it; those of the README's example if nothing else is said."""

    name: str
    load: Callable[[Path], Data]
    transforms: int = 5
    hidden: tuple[int, ...] = (100, 100)
    epochs: int = 20
    seeds: int = SEEDS
    batch_norm: bool = False


SETS = (galaxies, casp, planck, student, lognormal)
CASES = (
    *(Case(load.__name__, load) for load in SETS),
    Case("19 lognormal columns, 32 transforms", many, 32, (64, 64), 6, 2),
    Case("19 lognormal columns, 32 transforms, batch norm", many, 32, (64, 64), 6, 2, True),
    Case("patches", patches, 5, (128, 128), 8, 1),
    *(Case(f"{load.__name__}, 10 transforms", load, 10, seeds=2) for load in SETS),
)


def tails(x: Array, draws: int) -> tuple[float, Array, Array]:
    """What the outermost rows of each column and side say (Hill's estimator of a power law, about the median).

    Returns
    -------
    expected : float
        How many of `draws` rows lie `RANGES` ranges beyond the ends of the data.
    lower, upper : (D,) arrays
        Where fewer than `RARE` rows are expected, and no nearer than that.
    """
    span, middle, expected, ends = np.ptp(x, axis=0), np.median(x, axis=0), 0.0, []
    for sign in (-1.0, 1.0):
        far = np.sort(sign * (x - middle), axis=0)[-OUTERMOST - 1 :]
        end = far[-1] + RANGES * span
        index = np.maximum(np.log(far[1:] / far[0]).mean(axis=0), 1e-3)  # of a column that ends abruptly it is 0
        expected += float((draws * OUTERMOST / len(x) * (end / far[0]) ** (-1 / index)).sum())
        ends.append(middle + sign * np.maximum(end, far[0] * (draws * OUTERMOST / len(x) / RARE) ** index))
    return expected, ends[0], ends[1]


def fit(case: Case, data: Data, options: dict[str, Any], seed: int, quick: bool = False) -> dict[str, Any]:
    """Held-out log-likelihood and samples of one fit."""
    import fastmaf

    (x, weights), draws = data, DRAWS // 50 if quick else DRAWS
    order = np.random.default_rng(5).permutation(len(x))
    train, test = np.split(order, [4 * len(x) // 5 if case.load is not patches else 20_000])
    w = np.ones(len(x)) if weights is None else weights
    start = time.perf_counter()
    flow = fastmaf.MAF(
        x.shape[1], transforms=case.transforms, hidden_features=case.hidden, batch_norm=case.batch_norm, seed=seed, **options
    )
    flow.fit(x[train], weights=w[train], max_epochs=1 if quick else case.epochs, seed=seed, progress=False)
    seconds = time.perf_counter() - start
    scores, share = flow.log_prob(x[test]).astype(np.float64), w[test] / w[test].sum()
    nats = float((share * scores).sum())
    with np.errstate(all="ignore"):
        y = flow.sample(draws, seed=1).astype(np.float64)
        low, high, span = x.min(axis=0), x.max(axis=0), np.ptp(x, axis=0)
        mean = np.average(x, axis=0, weights=w)
        std = np.average((x - mean) ** 2, axis=0, weights=w) ** 0.5
        distance = (np.maximum(y - high, low - y) / span).max(axis=1)
        expected, lower, upper = tails(x, draws)
        return {
            "seconds": seconds,
            "nats": nats,
            "standard error": float((share**2 * (scores - nats) ** 2).sum() ** 0.5),
            "median": float(np.median(scores)),
            "lowest row": float(scores.min()),
            "far rows": int((~(distance <= RANGES)).sum()),
            "explained": expected,
            "unexplained": int((~((y >= lower) & (y <= upper)).all(axis=1)).sum()),
            "farthest": float(distance.max()),
            "std ratio": float((y.std(axis=0) / std).max()),
        }


def run(settings: Settings) -> Iterator[Line]:
    """One line per data set, flow and bound: means of log-likelihoods over the seeds, the worst seed of everything else."""
    for case in CASES:
        for label, options in OPTIONS.items():
            line = Line("samples", f"{case.name}, {label}", DRAWS)
            try:
                data = case.load(settings.data)
            except FileNotFoundError as problem:
                line.skipped["fastmaf"] = f"no data: {Path(problem.filename).name} is absent"
                yield line
                continue
            fits = [fit(case, data, options, seed, settings.quick) for seed in range(1 if settings.quick else case.seeds)]
            line.contenders["fastmaf"] = {"seconds": summary([one["seconds"] for one in fits]), "fits": fits}
            line.values |= {key: float(np.mean([one[key] for one in fits])) for key in ("nats", "standard error", "median", "explained")}
            line.values["lowest row"] = min(one["lowest row"] for one in fits)
            line.values |= {key: max(one[key] for one in fits) for key in ("far rows", "unexplained", "farthest", "std ratio")}
            yield line
