"""What a result must satisfy before its time is believed; each check returns the error that is printed beside the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .cases import Array, normal
from .peers import Library
from .timing import WrongResult

ROWS = 1000
"""Rows that are evaluated again in float64, spread over the whole input."""


def _expect(name: str, result: Any, shape: tuple[int, ...]) -> Array:
    array = np.asarray(result)
    if array.shape != shape or array.dtype != np.float32:
        raise WrongResult(f"{name} has shape {array.shape} and dtype {array.dtype}; expected float32 {shape}")
    if not np.isfinite(array).all():
        raise WrongResult(f"{name} has {int((~np.isfinite(array)).sum())} values that are not finite")
    return array


def check_log_prob(library: Library, x: Array) -> Callable[[Any], float]:
    """Largest absolute difference in nats from the float64 density of the same weights."""
    rows = np.unique(np.linspace(0, len(x) - 1, ROWS).astype(int))

    def check(result: Any) -> float:
        exact = library.log_prob64(x[rows])
        error = np.abs(_expect("log_prob", result, x.shape[:1])[rows] - exact)
        if (error > 1e-3 + 1e-5 * np.abs(exact)).any():
            raise WrongResult(f"log_prob is off by {error.max():.3g} nats")
        return float(error.max())

    return check


def check_sample(library: Library, rows: int, features: int) -> Callable[[Any], float]:
    """Largest difference between noise and the noise recovered in float64 from what the library's sampler makes of it.

    The samples themselves must come back as standard normal noise, to six standard errors of mean and mean square.
    """

    def check(result: Any) -> float:
        noise = library.to_noise64(_expect("samples", result, (rows, features))[:ROWS])
        mean, square = abs(noise.mean()) * noise.size**0.5, abs((noise**2).mean() - 1) * (noise.size / 2) ** 0.5
        if max(mean, square) > 6:
            raise WrongResult(f"noise of the samples is {mean:.1f} and {square:.1f} standard errors from N(0, 1) in mean and mean square")
        noise = normal(10, features, seed=2)
        error = float(np.abs(library.to_noise64(library.from_noise(noise)) - noise).max())
        if error > 1e-2:
            raise WrongResult(f"the sampler is off by {error:.3g} in units of the noise")
        return error

    return check


def check_train(library: Library, x: Array, batch: int) -> Callable[[Any], float]:
    """Relative distance |float32 - float64| / |float64| of the change of all parameters over five steps from the same start."""

    def check(_: Any) -> float:
        single, double = library.updates(x[: 5 * batch], batch)
        error = float(np.linalg.norm(single - double) / np.linalg.norm(double))
        if not error < 0.05:
            raise WrongResult(f"five steps differ from those in float64 by {error:.3g} of their length")
        return error

    return check
