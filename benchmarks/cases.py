"""The models, their data, the exact count of their work, and the goals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmaf.backends.reference import free
from fastmaf.record import trainable

Array = NDArray[Any]


@dataclass(frozen=True)
class Model:
    """The size of a MAF: variables, hidden layers, number of MADEs."""

    name: str
    features: int
    hidden: tuple[int, ...]
    transforms: int = 5

    def __str__(self) -> str:
        return f"{self.name} ({self.features}, {self.hidden[0]}x{len(self.hidden)}, {self.transforms})"


MODELS = {
    model.name: model
    for model in (
        Model("S", 6, (100, 100)),
        Model("M", 43, (512, 512)),
        Model("X", 784, (1024,)),
        Model("L", 63, (1024, 1024)),
    )
}

# operation/model/rows -> what is judged -> (sense, bound)
GOALS: dict[str, dict[str, tuple[str, float]]] = {
    "log_prob/S/10000": {"times the best peer": (">=", 3.5), "fraction of peak": (">=", 0.75)},
    "log_prob/M/10000": {"times the best peer": (">=", 2.5), "fraction of peak": (">=", 0.85)},
    "log_prob/X/10000": {"times the best peer": (">=", 2.0), "fraction of peak": (">=", 0.75)},
    "log_prob/S/1": {"times the best peer": (">=", 15), "microseconds": ("<=", 10)},
    "log_prob/M/1": {"times the best peer": (">=", 8)},
    "log_prob/X/1": {"times the best peer": (">=", 5)},
    "sample/S/1000": {"times zuko": (">=", 15)},
    "sample/M/1000": {"times zuko": (">=", 80)},
    "sample/X/1000": {"times zuko": (">=", 500)},
    "sample against log_prob/S/10000": {"sample / log_prob": ("<=", 1.10)},
    "sample against log_prob/M/10000": {"sample / log_prob": ("<=", 1.10)},
    "sample against log_prob/X/10000": {"sample / log_prob": ("<=", 1.15)},
    "train/S/100": {"times zuko": (">=", 15)},
    "train/S/1000": {"times zuko": (">=", 8)},
    "train/M/100": {"times zuko": (">=", 4)},
    "train/M/1000": {"times zuko": (">=", 2.5)},
    **{
        f"member/{name}": {"sample / log_prob": ("<=", 1.15)}
        for name in (
            "Bernoulli MADE (784, 500x1)/10000",
            "Bernoulli MADE (63, 512x2)/10000",
            "mixture MADE (63, 512x2, 10)/10000",
            "mixture MADE (784, 1024x1, 10)/2000",
        )
    },
    "member sample/Bernoulli MADE (784, 500x1)/1000": {"times the loop": (">=", 300)},
    "hmc/S/64": {"fastmaf times blackjax": (">=", 10)},
    "scratch of log_prob/S/10000000": {"MB beyond input and output": ("<=", 64)},
    "scratch of sample/S/10000000": {"MB beyond input and output": ("<=", 64)},
    **{
        f"quality/{data}{recipe}/0": {"difference in standard errors": (">=", -2)}
        for data in ("casp", "galaxies", "planck")
        for recipe in ("", ", clipped")
    },
    **{
        f"samples/{data}, default/1000000": {"unexplained": ("<=", 0), "std ratio": ("<=", 1.1), "lowest row": (">=", -1e4)}
        for data in ("galaxies", "casp", "planck", "student", "lognormal")
    },
    "embedding/S/1": {"microseconds": ("<=", 3)},
    "embedding/S/16": {"microseconds": ("<=", 10)},
    "embedding/M/1": {"times reading": ("<=", 1.5), "times jitted jax": (">=", 10)},
    "import/-/0": {"milliseconds": ("<=", 150)},
}


def normal(rows: int, features: int, seed: int = 0) -> Array:
    """Standard normal float32 rows."""
    return np.random.default_rng(seed).standard_normal((rows, features), np.float32)


def unmasked_weights(flow: Any) -> int:
    """Count the weights inside the masks of a flow: the multiply-adds of one row.

    Examples
    --------
    >>> import fastmaf
    >>> unmasked_weights(fastmaf.MAF(2, transforms=1, hidden_features=(3,)))
    9
    """
    count = 0
    for record in (*flow.layers, flow.base):
        for array, inside in zip(trainable(record), free(record), strict=True):
            if array.ndim == 2:
                count += array.size if inside is True else int(np.sum(inside))
    return count
