"""Held-out log-likelihood of fits to real data beside zuko's MAF: same size, rows, batch size, Adam, learning rates and steps.

Both keep the weights of the epoch with the best validation log-likelihood.  Likelihoods are in nats with every column in units of its
standard deviation over the training rows.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .cases import Array
from .report import Settings
from .timing import Line, summary

TRANSFORMS, HIDDEN, LR, CLIPS, SEEDS = 5, (100, 100), 1e-3, (None, 5.0), 4


@dataclass(frozen=True)
class Split:
    """Rows and weights of one data set, standardised by its training rows."""

    train: Array
    validation: Array
    test: Array
    train_weights: Array
    validation_weights: Array
    test_weights: Array

    @classmethod
    def of(cls, parts: list[Array], weights: list[Array] | None = None) -> Split:
        """From the three parts, each (n, D)."""
        w = weights or [np.ones(len(part)) for part in parts]
        mean = np.average(parts[0], axis=0, weights=w[0])
        scale = np.average((parts[0] - mean) ** 2, axis=0, weights=w[0]) ** 0.5
        return cls(*((part - mean) / scale for part in parts), *w)


def _thirds(x: Array, rng: np.random.Generator) -> Split:
    """Random 80/10/10."""
    x = x[rng.permutation(len(x))].astype(np.float64)
    return Split.of(np.split(x, [int(0.8 * len(x)), int(0.9 * len(x))]))


def proteins(path: Path, rng: np.random.Generator) -> Array:
    """Protein structures: duplicates dropped, the integer-valued column made continuous."""
    x = np.unique(np.load(path / "casp_f32.npz")["x"], axis=0).astype(np.float64)
    x[:, (x == np.round(x)).all(axis=0)] += rng.uniform(size=(len(x), 1))
    return x


def casp(path: Path) -> Split:
    """Those of `proteins`."""
    rng = np.random.default_rng(0)
    return _thirds(proteins(path, rng), rng)


def galaxies(path: Path) -> Split:
    """Redshift and six magnitudes of simulated galaxies."""
    return _thirds(np.load(path / "buzzard_galaxies_f32.npz")["x"], np.random.default_rng(0))


def planck(path: Path) -> Split:
    """A cosmological chain: the first chain trains (its last tenth validates), the second one tests; rows carry weights."""
    data = np.load(path / "cosmo_compare_devel_drag_f64.npz")
    first, second = (np.flatnonzero(data["chain"] == chain) for chain in (0, 1))
    parts = [*np.split(first, [int(0.9 * len(first))]), second]
    return Split.of([data["x"][rows] for rows in parts], [data["weight"][rows] for rows in parts])


# name -> loader, batch size, epochs
DATA: dict[str, tuple[Callable[[Path], Split], int, int]] = {
    "casp": (casp, 256, 30),
    "galaxies": (galaxies, 512, 25),
    "planck": (planck, 128, 60),
}


def fit_fastmaf(split: Split, batch: int, epochs: int, clip: float | None, seed: int) -> tuple[Array, float]:
    """Log-likelihood of each test row, and seconds of the fit."""
    import fastmaf

    start = time.perf_counter()
    flow = fastmaf.MAF(split.train.shape[1], transforms=TRANSFORMS, hidden_features=HIDDEN, seed=seed)
    flow.fit(
        split.train,
        weights=split.train_weights,
        validation=(split.validation, None, split.validation_weights),
        batch_size=batch,
        lr=LR,
        schedule="cosine",
        clip_norm=clip,
        max_epochs=epochs,
        patience=epochs,
        seed=seed,
        progress=False,
    )
    seconds = time.perf_counter() - start
    return flow.log_prob(split.test).astype(np.float64), seconds


def fit_zuko(split: Split, batch: int, epochs: int, clip: float | None, seed: int) -> tuple[Array, float]:
    """The same by torch."""
    import torch
    import zuko

    start = time.perf_counter()
    torch.manual_seed(seed)
    flow = zuko.flows.MAF(split.train.shape[1], 0, transforms=TRANSFORMS, hidden_features=HIDDEN)
    x, validation, test = (torch.from_numpy(part.astype(np.float32)) for part in (split.train, split.validation, split.test))
    weights = torch.from_numpy((split.train_weights / split.train_weights.mean()).astype(np.float32))
    optimizer = torch.optim.Adam(flow.parameters(), lr=LR)
    steps = epochs * math.ceil(len(x) / batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))

    def score(rows: Any) -> Array:
        with torch.inference_mode():
            return np.asarray(flow().log_prob(rows), np.float64)

    best, kept = -math.inf, copy.deepcopy(flow.state_dict())
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(x)), batch):
            optimizer.zero_grad()
            (-(weights[rows] * flow().log_prob(x[rows])).mean()).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(flow.parameters(), clip)
            optimizer.step()
            schedule.step()
        value = float(np.average(score(validation), weights=split.validation_weights))
        if value > best:
            best, kept = value, copy.deepcopy(flow.state_dict())
    flow.load_state_dict(kept)
    seconds = time.perf_counter() - start
    return score(test), seconds


def gaussian(split: Split) -> float:
    """Test log-likelihood of a full-covariance Gaussian: whether the data are what they should be."""
    covariance = np.cov(split.train.T, aweights=split.train_weights)
    solved = np.linalg.solve(covariance, split.test.T)
    logs = -0.5 * ((split.test.T * solved).sum(axis=0) + np.linalg.slogdet(2 * np.pi * covariance)[1])
    return float(np.average(logs, weights=split.test_weights))


def run(settings: Settings) -> Iterator[Line]:
    """One line per data set, without and with clipped gradients: both libraries over the same seeds, their paired difference.

    Fits of one library scatter from seed to seed by more than the test rows resolve, so the standard error has both parts.
    """
    for (name, (load, batch, epochs)), clip in itertools.product(DATA.items(), CLIPS):
        line = Line("quality", name if clip is None else f"{name}, clipped", 0)
        try:
            split = load(settings.data)
        except FileNotFoundError as problem:
            line.skipped["fastmaf"] = f"no data: {Path(problem.filename).name} is absent"
            yield line
            continue
        epochs, seeds = (1, 1) if settings.quick else (epochs, SEEDS)
        scores: dict[str, list[Array]] = {}
        for library, fit in (("fastmaf", fit_fastmaf), ("zuko", fit_zuko)):
            try:
                fits = [fit(split, batch, epochs, clip, seed) for seed in range(seeds)]
            except ImportError as problem:
                line.skipped[library] = f"not installed ({problem})"
                continue
            scores[library] = [score for score, _ in fits]
            per_seed = [float(np.average(score, weights=split.test_weights)) for score in scores[library]]
            line.contenders[library] = {"seconds": summary([seconds for _, seconds in fits]), "log_likelihoods": per_seed}
            line.values[f"{library} nats"] = float(np.mean(per_seed))
        steps = epochs * math.ceil(len(split.train) / batch)
        line.values |= {"Gaussian nats": gaussian(split), "test rows": len(split.test), "steps": steps}
        if len(scores) == 2:
            paired = np.mean(scores["fastmaf"], axis=0) - np.mean(scores["zuko"], axis=0)
            w = split.test_weights / split.test_weights.sum()
            difference = float((w * paired).sum())
            over_rows = float((w**2 * (paired - difference) ** 2).sum()) ** 0.5
            spread = [np.var(line.contenders[library]["log_likelihoods"], ddof=1) / seeds for library in scores] if seeds > 1 else [0.0]
            over_seeds = float(sum(spread)) ** 0.5
            line.values |= {"difference": difference, "two standard errors over rows": 2 * over_rows, "over seeds": 2 * over_seeds}
            line.values["difference in standard errors"] = difference / math.hypot(over_rows, over_seeds)
        yield line
