"""Degrees, orders and the masks they imply.

The rule is that of MADE (Germain et al. 2015, section 4), written with ranks that start at 1: variable *j* carries the rank
``r[j]`` of its place in the order, a hidden unit carries a degree *m* and may read variables of rank ``<= m`` and units of degree
``<= m``, and the parameters of variable *i* read units of degree ``< r[i]``.  Units sorted by degree make every mask a staircase.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastmaf import _words

__all__ = ["degrees_from", "hidden_degrees", "hidden_mask", "layer_ranks", "output_mask", "random_degrees"]

_ORDERS = "it must be 'sequential', 'reverse', 'random', a permutation of the columns, or one for each layer"

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


def layer_ranks(
    order: str | Sequence[int] | Sequence[Sequence[int]], features: int, transforms: int, seed: int, base: bool = False
) -> list[IntArray]:
    """Ranks of the variables in each autoregressive layer.

    Parameters
    ----------
    order : {"sequential", "reverse", "random"} or sequence of int or sequence of sequences of int
        ``"sequential"``: column order in every layer. ``"reverse"``: column order, turned around in every second layer.
        ``"random"``: an independent permutation per layer. A permutation of ``0..features-1`` lists the columns in the order in
        which they are generated, in every layer; a sequence of them gives one per layer.
    features : int
        Number of variables D.
    transforms : int
        Number of layers K.
    seed : int
        Seed of the random orders.
    base : bool
        Whether a base with an order of its own follows, as if it were one more layer.

    Returns
    -------
    list of (D,) int64 arrays
        For each layer, the rank 1..D of each column; at last those of the base, if there is one.

    Raises
    ------
    ValueError
        If `order` is not one of the above.

    Examples
    --------
    >>> [r.tolist() for r in layer_ranks("reverse", 3, 2, seed=0)]
    [[1, 2, 3], [3, 2, 1]]
    >>> [r.tolist() for r in layer_ranks([2, 0, 1], 3, 1, seed=0)]
    [[2, 3, 1]]
    """
    forward = np.arange(1, features + 1, dtype=np.int64)
    count = transforms + base
    if isinstance(order, str):
        if order == "sequential":
            return [forward.copy() for _ in range(count)]
        if order == "reverse":
            return [(forward if k % 2 == 0 else forward[::-1]).copy() for k in range(count)]
        if order == "random":
            rng = np.random.default_rng([seed, 0x6F72])
            return [rng.permutation(forward) for _ in range(count)]
        raise ValueError(f"order is {_words.shown(order)}; {_ORDERS}")
    try:
        given = [order] * count if np.ndim(order) == 1 else list(order)
    except (TypeError, ValueError):  # no array, or lists of several lengths
        given = list(order) if isinstance(order, (list, tuple)) else []
        if not given:
            raise ValueError(f"order is {_words.shown(order)}; {_ORDERS}") from None
    if len(given) != count:
        raise ValueError(f"order lists {len(given)} permutations; the flow has {transforms} transforms{' and a base' * base}")
    ranks = []
    for permutation in given:
        try:
            columns = np.asarray(permutation)
        except (TypeError, ValueError, RuntimeError):
            columns = np.empty(0, object)
        if columns.shape != (features,) or columns.dtype.kind not in "iu":
            raise ValueError(f"order {_words.shown(permutation)} is not a permutation of 0..{features - 1}")
        if not np.array_equal(np.sort(columns), forward - 1):
            raise ValueError(f"order {_words.shown(columns.tolist())} is not a permutation of 0..{features - 1}{_words.astray(columns)}")
        rank = np.empty(features, np.int64)
        rank[columns] = forward
        ranks.append(rank)
    return ranks


def hidden_degrees(width: int, features: int, conditional: bool) -> IntArray:
    """Degrees of a hidden layer: sorted, balanced over 1..D-1, or over 0..D-1 when there is a context.

    A layer narrower than the number of degrees takes degrees evenly spaced over the range.  Units of degree 0 read the context
    alone; without them the first variable would not depend on it.

    Parameters
    ----------
    width : int
        Number of units H.
    features : int
        Number of variables D.
    conditional : bool
        Whether the flow has a context.

    Returns
    -------
    (H,) int64 array
        Nondecreasing degrees.

    Examples
    --------
    >>> hidden_degrees(7, 4, False).tolist()
    [1, 1, 1, 2, 2, 3, 3]
    >>> hidden_degrees(3, 8, True).tolist()
    [0, 4, 7]
    """
    lowest = 0 if conditional or features == 1 else 1
    count = features - lowest
    if width >= count:
        return lowest + np.sort(np.arange(width, dtype=np.int64) % count)
    return lowest + np.round(np.linspace(0, count - 1, width)).astype(np.int64)


def random_degrees(width: int, features: int, conditional: bool, rng: np.random.Generator, lowest: int = 0) -> IntArray:
    """Degrees of a hidden layer as MADE draws them (Germain et al. 2015, section 4.3): uniform between `lowest` and D - 1.

    With a context one unit at least has degree 0, so that the first variable depends on the context.

    Parameters
    ----------
    width : int
        Number of units H.
    features : int
        Number of variables D.
    conditional : bool
        Whether the flow has a context.
    rng : numpy.random.Generator
    lowest : int
        The lowest degree of the layer before, below which a unit would read nothing.

    Returns
    -------
    (H,) int64 array
        In no order.

    Examples
    --------
    >>> degrees = random_degrees(100, 4, False, np.random.default_rng(0))
    >>> np.unique(degrees).tolist()
    [1, 2, 3]
    """
    lowest = max(lowest, 0 if conditional or features == 1 else 1)
    degrees = rng.integers(lowest, features, width, dtype=np.int64)
    if conditional:
        degrees[rng.integers(width)] = 0
    return degrees


def hidden_mask(degrees: IntArray, inputs: IntArray) -> BoolArray:
    """Mask (H, n) of a hidden layer: unit reads input where ``degrees >= inputs`` (ranks of variables, or degrees of units).

    Examples
    --------
    >>> hidden_mask(np.array([1, 2]), np.array([1, 2, 3])).astype(int).tolist()
    [[1, 0, 0], [1, 1, 0]]
    """
    return np.asarray(degrees)[:, None] >= np.asarray(inputs)[None, :]


def output_mask(ranks: IntArray, inputs: IntArray, parameters: int | Sequence[int]) -> BoolArray:
    """Mask (D * P, H) of an output layer: row ``i * P + p`` reads units of degree below ``ranks[i]``; `parameters` is P, or that of each i.

    Examples
    --------
    >>> output_mask(np.array([1, 2]), np.array([0, 1]), 2).astype(int).tolist()
    [[1, 0], [1, 0], [1, 1], [1, 1]]
    """
    return np.repeat(np.asarray(ranks)[:, None] > np.asarray(inputs)[None, :], parameters, axis=0)


def degrees_from(mask: BoolArray, inputs: IntArray) -> IntArray:
    """Degrees of the units of a layer of which only the mask is known: the highest of those inputs that each reads, 0 if it reads none.

    Parameters
    ----------
    mask : (H, n) bool array
        Which unit reads which input.
    inputs : (n,) array of int
        Ranks of variables, or degrees of units.

    Returns
    -------
    (H,) int64 array

    Examples
    --------
    >>> degrees_from(np.array([[True, False], [True, True]]), np.array([1, 2])).tolist()
    [1, 2]
    """
    degrees: IntArray = np.where(mask, inputs, 0).max(axis=1, initial=0).astype(np.int64)
    return degrees
