"""``fastmaf demo``: a demonstration on real data."""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

import fastmaf
from fastmaf.data import galaxies
from fastmaf.flow import Flow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["add"]

Array = NDArray[Any]
T = TypeVar("T")

EPOCHS = 200
FIT: dict[str, Any] = {"batch_size": 256, "lr": 4e-3, "clip_norm": 0.5, "weight_decay": 0.05}
"""The decay keeps the density of rare galaxies from falling off a cliff; it costs a little of that of the others."""

HELD_OUT = 10_000
SAMPLES = 1_000_000
EDGES = np.linspace(0.0, 2.4, 201)
"""Borders of the grid of redshifts; the density is evaluated in the middle of each cell."""


def add(commands: Any) -> None:
    """Add the command."""
    demo = commands.add_parser("demo", help="fit, score, sample and picture 60,000 galaxies, in under two minutes")
    demo.add_argument("--output", type=Path, default=Path("fastmaf-demo.png"), metavar="FILE", help="the figure (default: %(default)s)")
    demo.add_argument("--save", type=Path, metavar="FILE", help="write the fitted flow to a .safetensors file")
    demo.add_argument("--seconds", type=float, default=90.0, help="longest time for the fit (default: %(default)g)")
    demo.add_argument("--seed", type=int, default=0, help="of weights, training and samples (default: %(default)s)")
    demo.add_argument("--threads", type=int, help="default: all CPUs of this process")
    demo.add_argument("--quick", action="store_true", help="two epochs on a tenth of everything: shows that all parts work, not how well")
    demo.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if arguments.seconds <= 0:
        raise ValueError(f"--seconds is {arguments.seconds:g}; it must be positive")
    for path in (arguments.output, arguments.save):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {path.absolute().parent}")
    if arguments.threads is not None:
        fastmaf.set_num_threads(arguments.threads)
    share = 10 if arguments.quick else 1
    x, names = _colours(*galaxies())
    x = x[: len(x) // share]
    train, held = x[: -HELD_OUT // share], x[-HELD_OUT // share :]

    print(f"fastmaf {fastmaf.__version__}, {fastmaf.get_backend()} backend\n")
    _line("data", f"{len(train):,} simulated galaxies to fit, {len(held):,} held out: {', '.join(names)}")
    flow, epochs, seconds = _fit(train, names, arguments)
    rate = epochs * flow.training["rows"] / seconds
    _line("fit", f"{epochs} epochs in {seconds:.0f} s: five MADEs, two layers of 100 units each", rate)
    log_prob, seconds = _timed(lambda: flow.log_prob(held))
    _line("density", f"{_score(log_prob)} nats per held-out galaxy", len(held) / seconds)
    _line("", f"{_score(_gaussian(train, held))} for a Gaussian with full covariance")
    samples, seconds = _timed(lambda: flow.sample(SAMPLES // share, seed=arguments.seed))
    _line("samples", f"{len(samples):,} galaxies drawn", len(samples) / seconds)
    found, seconds = _timed(lambda: _redshifts(flow, held))
    _line("redshift", f"{len(held):,} posteriors from the density on {EDGES.size - 1} redshifts each", found.evaluations / seconds)
    quality = f"scatter {found.scatter:.4f}, outliers {100 * found.outliers:.1f} %, PIT off uniform by {found.calibration:.3f}"
    _line("", quality)
    if arguments.save is not None:
        flow.save(arguments.save)
        _line("flow", str(arguments.save))
    if importlib.util.find_spec("matplotlib") is None:
        _line("figure", "skipped: there is no matplotlib; to get it: pip install 'fastmaf[plot]'")
    else:
        _figure(flow, held, samples, found, quality).savefig(arguments.output)
        _line("figure", str(arguments.output))
    return 0


def _colours(x: Array, names: tuple[str, ...]) -> tuple[Array, tuple[str, ...]]:
    """Redshift, the r band, and the differences of neighbouring bands.

    Magnitudes are nearly equal to each other; their differences are what tells galaxies apart. The map has determinant 1 or -1, so
    log-likelihoods are those of the magnitudes.
    """
    redshift, r, bands = x[:, :1], x[:, 3:4], x[:, 1:].astype(np.float64)
    colours = np.hstack([redshift, r, bands[:, :-1] - bands[:, 1:]]).astype(x.dtype)
    return colours, (names[0], names[3], *(f"{blue}-{red}" for blue, red in zip(names[1:-1], names[2:], strict=True)))


def _line(title: str, text: str, rate: float | None = None) -> None:
    end = "" if rate is None else f"{rate:>13,.0f} rows/s"
    print(f"{title:<10}{text:<66}{end}".rstrip(), flush=True)


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def _fit(train: Array, names: Sequence[str], arguments: argparse.Namespace) -> tuple[Flow, int, float]:
    """A flow for the galaxies, and in how many epochs and seconds."""
    epochs = 2 if arguments.quick else EPOCHS
    flow = fastmaf.MAF(len(names), names=names, seed=arguments.seed)
    start = time.perf_counter()

    def cosine(epoch: float) -> float:
        """Falls to zero over the epochs, or over the second half of the time where that comes first."""
        done = max(epoch / epochs, 2 * (time.perf_counter() - start) / arguments.seconds - 1)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1)))

    history = flow.fit(
        train,
        schedule=cosine,
        patience=epochs,
        max_epochs=epochs,
        max_seconds=arguments.seconds,
        seed=arguments.seed,
        **FIT,
    )
    return flow, len(history.train), history.seconds[-1]


def _score(log_prob: Array) -> str:
    """Mean and two standard errors."""
    return f"{log_prob.mean(dtype=np.float64):7.3f} ± {2 * log_prob.std() / math.sqrt(log_prob.size):.3f}"


def _gaussian(train: Array, x: Array) -> Array:
    """Log-density of rows under the Gaussian with mean and covariance of the training rows."""
    train = train.astype(np.float64)
    factor = np.linalg.cholesky(np.cov(train, rowvar=False))
    z: Array = np.linalg.solve(factor, (x - train.mean(axis=0)).T)
    log_prob: Array = -0.5 * (z**2).sum(axis=0) - np.log(np.diag(factor)).sum() - 0.5 * len(z) * math.log(2 * math.pi)
    return log_prob


class _Redshifts(NamedTuple):
    truth: Array
    estimate: Array  # posterior medians
    pit: Array  # posterior probability of redshifts below the true one
    evaluations: int

    @property
    def error(self) -> Array:
        error: Array = (self.estimate - self.truth) / (1 + self.truth)
        return error

    @property
    def scatter(self) -> float:
        """sigma_NMAD: 1.4826 times the median deviation of (estimate - truth) / (1 + truth) from its median."""
        return float(1.4826 * np.median(np.abs(self.error - np.median(self.error))))

    @property
    def outliers(self) -> float:
        """Share of the galaxies with an error above 0.15 (1 + truth)."""
        return float((np.abs(self.error) > 0.15).mean())

    @property
    def calibration(self) -> float:
        """Largest difference between the distribution of the PIT and the uniform one."""
        steps = np.arange(self.pit.size + 1) / self.pit.size
        pit = np.sort(self.pit)
        return float(max((steps[1:] - pit).max(), (pit - steps[:-1]).max()))


def _redshifts(flow: Flow, x: Array) -> _Redshifts:
    """Posteriors of the first column given the others: the joint density along a grid, normalised."""
    step, middle = EDGES[1], 0.5 * (EDGES[1:] + EDGES[:-1])
    estimates, pits = [], []
    for part in np.array_split(x, -(-len(x) // 1000)):
        rows = np.repeat(part, middle.size, axis=0)
        rows[:, 0] = np.tile(middle, len(part))
        log_prob = flow.log_prob(rows).reshape(len(part), middle.size).astype(np.float64)
        mass = np.exp(log_prob - log_prob.max(axis=1, keepdims=True))
        cdf = np.pad(np.cumsum(mass, axis=1), ((0, 0), (1, 0)))
        cdf /= cdf[:, -1:]
        galaxy = np.arange(len(part))
        half = (cdf < 0.5).sum(axis=1)
        below, above = cdf[galaxy, half - 1], cdf[galaxy, half]
        estimates.append(EDGES[half - 1] + step * (0.5 - below) / (above - below))
        place = part[:, 0] / step
        cell = np.minimum(place.astype(int), middle.size - 1)
        pits.append(cdf[galaxy, cell] + (place - cell) * (cdf[galaxy, cell + 1] - cdf[galaxy, cell]))
    return _Redshifts(x[:, 0].astype(np.float64), np.concatenate(estimates), np.concatenate(pits), len(x) * middle.size)


def _figure(flow: Flow, x: Array, samples: Array, found: _Redshifts, note: str) -> Figure:
    """Data against samples, redshift estimates against truth, and the noise of the data, on one page."""
    from matplotlib.figure import Figure

    from fastmaf import plot

    figure = Figure(figsize=(14.5, 9.6), dpi=130)
    left, right = figure.subfigures(1, 2, width_ratios=(9.6, 4.9), squeeze=False)[0]
    top, bottom = right.subfigures(2, 1, squeeze=False)[:, 0]
    plot.corner(x, samples, flow.names, left)
    plot.redshift(found.truth, found.estimate, found.pit, note.replace(", ", "\n"), top)
    plot.noise(flow.to_noise(x), None, bottom)
    return figure
