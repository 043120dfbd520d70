"""A single masked autoregressive network as a density: `MADE` builds one with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import DTypeLike

from fastmaf.flow import Flow
from fastmaf.maf import MAF, Order

__all__ = ["MADE"]

_CONDITIONALS = ("gaussian", "mixture", "bernoulli", "categorical")


def MADE(
    features: int,
    conditional: str = "gaussian",
    context_features: int = 0,
    hidden_features: Sequence[int] = (100, 100),
    activation: str = "relu",
    order: Order = "sequential",
    bounds: Sequence[Any] | None = None,
    names: Sequence[str] | None = None,
    dtype: DTypeLike = "float32",
    seed: int | None = 0,
) -> Flow:
    """A MADE (Germain et al. 2015): each variable has a density of its own, given those before it in the order.

    Parameters
    ----------
    features : int
        Number of variables D.
    conditional : {"gaussian"}
        The density of each variable. ``"mixture"``, ``"bernoulli"`` and ``"categorical"`` are not there yet.
    context_features, hidden_features, activation, order, bounds, names, dtype, seed
        As in `fastmaf.MAF`.

    Returns
    -------
    Flow

    Raises
    ------
    ValueError
        If a parameter is out of range, or asks for what is not there yet.

    Examples
    --------
    >>> import fastmaf
    >>> fastmaf.MADE(features=4, order=[3, 2, 1, 0])
    Flow(features=4, dtype=float32): Affine -> Autoregressive((100, 100), relu, exp_soft) -> Normal
    """
    if conditional not in _CONDITIONALS:
        raise ValueError(f"conditional is {conditional!r}; it must be one of {', '.join(map(repr, _CONDITIONALS))}")
    if conditional != "gaussian":
        raise ValueError(f"conditional={conditional!r} is not there yet; 'gaussian' is")
    return MAF(features, context_features, 1, hidden_features, activation, order, bounds=bounds, names=names, dtype=dtype, seed=seed)
