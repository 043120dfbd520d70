"""A single masked autoregressive network as a density: `MADE` builds one with random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, overload

import numpy as np
from numpy.typing import DTypeLike

from fastmaf import _arrays, _words
from fastmaf import masks as _masks
from fastmaf._arrays import Seed
from fastmaf._networks import masked, spread
from fastmaf.flow import Flow
from fastmaf.layers import Autoregressive, Elementwise, FlowLayer, Law, Terminal, rows_of, values_of
from fastmaf.maf import INPUT_CLIP, Bounds, Draft, Order, soft_law
from fastmaf.masked_ensemble import MaskedEnsemble, random_member

__all__ = ["MADE"]

_CONDITIONALS = ("gaussian", "mixture", "bernoulli", "categorical", "mixed")

Categories = int | Sequence[int | None] | Mapping[str, int]
"""How many values: of all variables, or of each; None for one that may have any number."""


@overload
def MADE(
    features: int,
    conditional: str = "gaussian",
    context_features: int = 0,
    hidden_features: Sequence[int] = (100, 100),
    activation: str = "relu",
    order: Order = "sequential",
    components: int = 10,
    categories: Categories | None = None,
    direct: bool = False,
    residual: bool = False,
    masks: Literal[1] = 1,
    bounds: Bounds | None = None,
    names: Sequence[str] | None = None,
    dtype: DTypeLike = "float32",
    seed: Seed = None,
    clip: float | None = None,
    input_clip: float | None = INPUT_CLIP,
) -> Flow: ...


@overload
def MADE(
    features: int,
    conditional: str = "gaussian",
    context_features: int = 0,
    hidden_features: Sequence[int] = (100, 100),
    activation: str = "relu",
    order: Order = "sequential",
    components: int = 10,
    categories: Categories | None = None,
    direct: bool = False,
    residual: bool = False,
    masks: int = 1,
    bounds: Bounds | None = None,
    names: Sequence[str] | None = None,
    dtype: DTypeLike = "float32",
    seed: Seed = None,
    clip: float | None = None,
    input_clip: float | None = INPUT_CLIP,
) -> Flow | MaskedEnsemble: ...


def MADE(
    features: int,
    conditional: str = "gaussian",
    context_features: int = 0,
    hidden_features: Sequence[int] = (100, 100),
    activation: str = "relu",
    order: Order = "sequential",
    components: int = 10,
    categories: Categories | None = None,
    direct: bool = False,
    residual: bool = False,
    masks: int = 1,
    bounds: Bounds | None = None,
    names: Sequence[str] | None = None,
    dtype: DTypeLike = "float32",
    seed: Seed = None,
    clip: float | None = None,
    input_clip: float | None = INPUT_CLIP,
) -> Flow | MaskedEnsemble:
    """A MADE (Germain et al. 2015): each variable has a density of its own, given those before it in the order.

    Parameters
    ----------
    features : int
        Number of variables D.
    conditional : {"gaussian", "mixture", "bernoulli", "categorical", "mixed"}
        The density of each variable: a Gaussian; a mixture of `components` Gaussians; the probabilities of 0 and 1; those of
        0, 1, ..., `categories` - 1; the last for variables that have `categories` and a mixture for all others, side by side.
    context_features, hidden_features, activation, order, direct, residual, bounds, names, dtype, seed
        As in `fastmaf.MAF`. Discrete variables have no bounds; in a table, integers stand for them, 0, 1, ...
    components : int
        Of a mixture.
    categories : int, or sequence or mapping of int
        How many values a categorical variable has, at least 2: one number for all variables, one for each, or a mapping by `names`. Of
        mixed variables, None or no entry is for one that may have any number.
    clip : float, optional
        Bound of the log-scales of a Gaussian; None takes log(1000), as `fastmaf.MAF` does with one transform.
    input_clip : float or None
        As in `fastmaf.MAF`; discrete variables are read as they are, for which it widens beside mixed ones.
    masks : int
        With more than one, a `fastmaf.MaskedEnsemble` of so many networks that share their weights, each with an order and connections of
        its own (sections 4.2 and 4.3). The first is what ``masks=1`` gives.

    Returns
    -------
    Flow or MaskedEnsemble

    Raises
    ------
    ValueError
        If a parameter is out of range.

    Examples
    --------
    >>> import fastmaf
    >>> fastmaf.MADE(features=4, order=[3, 2, 1, 0])
    Flow(features=4, dtype=float32): Affine -> Autoregressive((100, 100), relu, exp_soft) -> Normal
    >>> fastmaf.MADE(features=4, conditional="categorical", categories=[2, 3, 3, 5])
    Flow(features=4, dtype=float32): Terminal((100, 100), relu, categorical)
    >>> fastmaf.MADE(features=3, conditional="mixed", names=["mass", "type", "age"], categories={"type": 5})
    Flow(features=3, dtype=float32): Affine -> Terminal((100, 100), relu, mixed)
    >>> fastmaf.MADE(features=4, conditional="bernoulli", masks=8).member(3)
    Flow(features=4, dtype=float32): Terminal((100, 100), relu, bernoulli)
    """
    if not isinstance(conditional, str) or conditional not in _CONDITIONALS:
        raise ValueError(_words.one_of("conditional", conditional, _CONDITIONALS))
    components, masks = _arrays.count("components", components, lowest=1), _arrays.count("masks", masks, lowest=1)
    discrete = conditional in ("bernoulli", "categorical")
    draft = Draft(features, context_features, hidden_features, activation, residual, direct, seed, input_clip, masks)
    counts = _categories(categories, conditional, draft.features, names)
    layers: list[FlowLayer] = draft.front(order, bounds, names)
    if discrete:
        if bounds is not None:
            raise ValueError(f"bounds is {_words.shown(bounds)}; {conditional} variables have none")
        layers, draft.input_clip = [], None
    elif counts:
        bounded = layers[0].kinds if isinstance(layers[0], Elementwise) else ()
        wrong = [j for j, kind in enumerate(bounded) if kind != "identity" and counts[j]]
        if wrong:
            raise ValueError(f"bounds has an entry for {_words.columns(wrong, names)}, which is categorical and has none")
        if draft.input_clip is not None:
            draft.input_clip = max(draft.input_clip, max(counts) - 1.0)
    if clip is not None and conditional != "gaussian":
        raise ValueError(f"clip is for Gaussian variables; conditional is {conditional!r}")
    ranks = _masks.layer_ranks(order, draft.features, 1, draft.seed)[0]
    base = None
    if conditional == "gaussian":
        net = draft.network(Law.parameters * draft.features)
        layers.append(Autoregressive(ranks, masked(net, ranks), soft_law(clip, 1)))
    else:
        components = 1 if discrete else components
        values = values_of(conditional, counts, draft.features)
        rows = rows_of(conditional, components, values)
        net = spread(draft.network(sum(rows), components, values), ranks, values, draft.rng)
        base = Terminal(ranks, masked(net, ranks, rows), conditional, components, counts)
    flow = draft.flow(layers, base, dtype, names)
    if masks == 1:
        return flow
    drawn = [random_member(net, ranks, context_features > 0, draft.seed, k) for k in range(1, masks)]
    first = [dense.degrees for dense in net.hidden if dense.degrees is not None]
    members = [(ranks, np.concatenate([np.empty(0, np.int64), *first])), *drawn]
    return MaskedEnsemble(flow, net, *map(np.array, zip(*members, strict=True)))


def _categories(categories: Categories | None, conditional: str, features: int, names: Sequence[str] | None) -> tuple[int, ...]:
    """How many values each variable has, 0 for any number; nothing where none is categorical."""
    if conditional not in ("categorical", "mixed"):
        if categories is not None:
            shown = _words.shown(categories)
            raise ValueError(f"categories is {shown}; only categorical variables have some, and conditional is {conditional!r}")
        return ()
    if categories is None:
        raise ValueError(f"categories is None; conditional={conditional!r} needs the number of values of the variables")
    mixed = conditional == "mixed"
    if not np.iterable(categories) or isinstance(categories, (str, bytes)):
        if mixed:
            raise ValueError(f"categories is {_words.shown(categories)}; of mixed variables it must be a sequence or a mapping")
        return (_arrays.count("categories", categories, lowest=2),) * features
    entries = _arrays.by_column("categories", categories, features, _arrays.names(names, features))
    labels = names if isinstance(categories, Mapping) and names is not None else range(features)
    counts = tuple(
        0 if mixed and count is None else _arrays.count(f"categories[{_words.shown(label)}]", count, lowest=2)
        for label, count in zip(labels, entries, strict=True)
    )
    if mixed and not any(counts):
        raise ValueError('categories has no number; without one, conditional is "mixture"')
    return counts
