"""Networks changed map by map."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmaf import _words, masks
from fastmaf.layers import Autoregressive, Conditioner, Dense, Terminal, rows_of

__all__ = ["counts_of", "drawn", "free", "masked", "rebuilt", "redrawn", "spread"]

Array = NDArray[Any]

SMALL = 1e-3
"""Bound of the first weights of the second map of a residual block, which makes the block nearly the identity."""


def drawn(
    net: Conditioner, features: int, rng: np.random.Generator, components: int | None = None, values: Sequence[int] | None = None
) -> Conditioner:
    """The network with new weights and biases from U(-b, b), b = 1 / sqrt(inputs), context included, without masks; norms are forgotten.

    `components` and `values` of the variables are those of a base. Mixtures, of variables with `values` 0, have means apart from each
    other, raw log-scales and logits around zero.
    """
    small = {id(block.maps[1]) for block in net.blocks if block.residual}

    def new(dense: Dense) -> Dense:
        contexts = 0 if dense.context_weight is None else dense.context_weight.shape[1]
        bound = SMALL if id(dense) in small else 1 / math.sqrt(dense.weight.shape[1] + contexts)
        arrays = {name: getattr(dense, name) for name in ("weight", "bias", "context_weight", "context_bias")}
        fresh = {name: rng.uniform(-bound, bound, array.shape) for name, array in arrays.items() if array is not None}
        if dense.norm_scale is not None:
            fresh |= {"norm_scale": np.ones(dense.weight.shape[1]), "norm_shift": np.zeros(dense.weight.shape[1])}
        return replace(dense, **fresh)

    net = rebuilt(net, new)
    if net.skip is not None:
        bound = 1 / math.sqrt(features)
        net = replace(net, skip=0.01 * rng.uniform(-bound, bound, net.skip.shape))
    if components is not None and values is not None and 0 in values:
        own = np.zeros((features, 3, components))
        own[:, 1] = rng.normal(size=(features, components))
        pieces = np.split(net.final.bias, np.cumsum(rows_of("mixed", components, values))[:-1])
        bias = np.concatenate([piece if count else mixture.ravel() for count, piece, mixture in zip(values, pieces, own, strict=True)])
        net = replace(net, final=replace(net.final, bias=bias))
    return net


def redrawn(record: Autoregressive | Terminal, net: Conditioner, rng: np.random.Generator) -> Conditioner:
    """The network of a layer or base with new weights, without masks."""
    if isinstance(record, Terminal):
        return spread(drawn(net, record.ranks.size, rng, record.components, record.values), record.ranks, record.values, rng)
    return drawn(net, record.ranks.size, rng)


def spread(net: Conditioner, ranks: Array, values: Sequence[int], rng: np.random.Generator) -> Conditioner:
    """The network with biases that make each first unit bend somewhere among the values 0, 1, ... of the variables that it reads.

    Those of continuous variables lie around zero, where units bend anyway. Far from it one unit is much like another.
    """
    counts = np.array(values)
    many = np.flatnonzero(counts > 2)
    if net.initial is None or not many.size:
        return net
    weight, degrees = net.initial.weight[:, many], net.initial.degrees
    places = rng.uniform(-0.5, counts[many] - 0.5, weight.shape)
    shift = np.where(masks.hidden_mask(degrees, ranks)[:, many], weight * places, 0).sum(axis=1)  # type: ignore[arg-type]
    return replace(net, initial=replace(net.initial, bias=net.initial.bias - shift))


def counts_of(record: Autoregressive | Terminal) -> Sequence[int] | None:
    """Final rows of each variable; None where they are all equal."""
    return record.rows if isinstance(record, Terminal) else None


def masked(net: Conditioner, ranks: Array, counts: Sequence[int] | None = None) -> Conditioner:
    """The network with zeros for the weights that its degrees forbid; `counts`: final rows of each variable, if they are not all equal."""
    if ranks.ndim != 1 or not ranks.size:
        raise ValueError(f"ranks has shape {_words.shapes(ranks.shape)}; it must have one entry per variable")
    if counts is not None and sum(counts) != net.final.bias.size:
        raise ValueError(f"the final map has {net.final.bias.size} rows; its variables need {sum(counts)}")
    rows = net.final.bias.size // ranks.size if counts is None else counts
    reads, free = ranks, []
    for dense in net.hidden:
        free.append(masks.hidden_mask(dense.degrees, reads))  # type: ignore[arg-type]
        reads = dense.degrees  # type: ignore[assignment]
    only = iter([*free, masks.output_mask(ranks, reads, rows)])
    skip = None if net.skip is None else _zeroed("skip", net.skip, masks.output_mask(ranks, ranks, rows))
    net = rebuilt(net, lambda dense: replace(dense, weight=_zeroed("weight", dense.weight, next(only))))
    return replace(net, skip=skip)


def free(record: Autoregressive | Terminal) -> Conditioner:
    """The network of a layer or base with ones in place of its weights and biases, and zeros for those that its degrees forbid."""

    def ones(array: Array | None) -> Any:
        return None if array is None else np.ones(array.shape, np.int8)

    def one(dense: Dense) -> Dense:
        arrays = {name: ones(getattr(dense, name)) for name in ("weight", "bias", "context_weight", "context_bias")}
        return replace(dense, **arrays)

    net = rebuilt(record.conditioner, one)
    return masked(replace(net, skip=ones(net.skip)), record.ranks, counts_of(record))


def _zeroed(name: str, weight: Array, mask: Array) -> Array:
    if weight.shape != mask.shape:
        raise ValueError(f"{name} has shape {weight.shape}; expected {mask.shape}")
    return np.where(mask, weight, 0.0)


def rebuilt(net: Conditioner, change: Callable[[Dense], Dense]) -> Conditioner:
    """The network with each of its maps changed, in their order."""
    initial = None if net.initial is None else change(net.initial)
    blocks = tuple(replace(block, maps=tuple(map(change, block.maps))) for block in net.blocks)
    return replace(net, initial=initial, blocks=blocks, final=change(net.final))
