"""Masked autoregressive flows: `MAF` builds one with random weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastmaf import _arrays, masks
from fastmaf.flow import Flow
from fastmaf.layers import Affine, Autoregressive, Block, Conditioner, Dense, Elementwise, FlowLayer, Law

__all__ = ["MAF"]

Order = str | Sequence[int] | Sequence[Sequence[int]]


def MAF(
    features: int,
    context_features: int = 0,
    transforms: int = 5,
    hidden_features: Sequence[int] = (100, 100),
    activation: str = "relu",
    order: Order = "reverse",
    residual: bool = False,
    batch_norm: bool = False,
    components: int = 1,
    bounds: Sequence[Any] | None = None,
    names: Sequence[str] | None = None,
    dtype: DTypeLike = "float32",
    seed: int | None = 0,
) -> Flow:
    """A masked autoregressive flow (Papamakarios et al. 2017) with random weights.

    Parameters
    ----------
    features : int
        Number of variables D.
    context_features : int
        Number of variables C that the density is conditioned on.
    transforms : int
        Number of autoregressive layers.
    hidden_features : sequence of int
        Widths of the hidden layers of each; may be empty.
    activation : {"relu", "tanh", "elu", "gelu", "silu"}
    order : {"reverse", "sequential", "random"} or sequence of int or sequence of sequences of int
        Order of the variables: turned around in every second layer; that of the columns; drawn for each layer; the columns as they are
        to be generated, in all layers or in each.
    residual, batch_norm, components
        Only their defaults are there yet.
    bounds : sequence, optional
        For each column None or a pair (lower, upper), either of which may be None: the density lives strictly inside.
    names : sequence of str, optional
    dtype : {"float32", "float64"}
    seed : int, optional
        Of the weights and of random orders; None draws afresh. The weights in float32 are those in float64, rounded.

    Returns
    -------
    Flow
        Layers: the bounds if there are any, a standardising `Affine` (the identity until the flow is trained), and the transforms.

    Raises
    ------
    ValueError
        If a parameter is out of range, or asks for what is not there yet.

    Examples
    --------
    >>> import fastmaf
    >>> fastmaf.MAF(features=7, transforms=5, hidden_features=(64, 64))
    Flow(features=7, dtype=float32): Affine -> 5 x Autoregressive((64, 64), relu, exp_soft) -> Normal
    """
    for name, wanted in (("residual=True", residual), ("batch_norm=True", batch_norm), (f"components={components}", components != 1)):
        if wanted:
            raise ValueError(f"{name} is not there yet")
    features = _arrays.count("features", features, lowest=1)
    context_features = _arrays.count("context_features", context_features)
    transforms = _arrays.count("transforms", transforms, lowest=1)
    for name, value in (("hidden_features", hidden_features), ("order", order), ("bounds", bounds)):
        if value is not None and not np.iterable(value):
            raise ValueError(f"{name} is {value!r}; it must be a sequence")
    widths = [_arrays.count(f"hidden_features[{k}]", width, lowest=1) for k, width in enumerate(hidden_features)]
    seed = _arrays.seed_or_fresh(seed)
    rng = np.random.default_rng(seed)
    layers: list[FlowLayer] = []
    if bounds is not None:
        if len(bounds) != features:
            raise ValueError(f"bounds has {len(bounds)} entries; the flow has {features} features")
        layers.append(Elementwise.from_bounds(bounds))
    layers.append(_identity(features))
    for ranks in masks.layer_ranks(order, features, transforms, seed):
        layers.append(Autoregressive(ranks, _conditioner(ranks, context_features, widths, activation, rng), Law()))
    context_layers = [_identity(context_features)] if context_features else []
    return Flow(layers, features=features, context_features=context_features, context_layers=context_layers, dtype=dtype, names=names)


def _identity(width: int) -> Affine:
    return Affine(np.zeros(width), np.ones(width))


def _conditioner(
    ranks: NDArray[np.int64], context_features: int, widths: Sequence[int], activation: str, rng: np.random.Generator
) -> Conditioner:
    """A plain network; the context is added at its first map."""
    maps: list[Dense] = []
    inputs = ranks
    for width in widths:
        degrees = masks.hidden_degrees(width, ranks.size, context_features > 0)
        maps.append(_dense(masks.hidden_mask(degrees, inputs), 0 if maps else context_features, degrees, rng))
        inputs = degrees
    final = _dense(masks.output_mask(ranks, inputs, Law.parameters), 0 if maps else context_features, None, rng)
    blocks = tuple(Block("plain", (dense,)) for dense in maps[1:])
    return Conditioner(maps[0] if maps else None, blocks, final, activation, final_activation=bool(maps))


def _dense(mask: NDArray[np.bool_], context_features: int, degrees: NDArray[np.int64] | None, rng: np.random.Generator) -> Dense:
    """A map with weights from U(-b, b), b = 1 / sqrt(inputs), context included."""
    rows, inputs = mask.shape
    bound = 1 / math.sqrt(inputs + context_features)
    weight = np.where(mask, rng.uniform(-bound, bound, mask.shape), 0.0)
    bias = rng.uniform(-bound, bound, (rows,))
    if not context_features:
        return Dense(weight, bias, degrees)
    return Dense(weight, bias, degrees, "added", rng.uniform(-bound, bound, (rows, context_features)))
