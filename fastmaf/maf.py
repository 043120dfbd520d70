"""Masked autoregressive flows: `MAF` builds one with random weights."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastmaf import _arrays, _words, masks
from fastmaf import layers as _layers
from fastmaf._arrays import Seed
from fastmaf._networks import drawn, masked
from fastmaf.flow import Flow
from fastmaf.layers import Affine, Autoregressive, BatchNorm, Block, Conditioner, Dense, Elementwise, FlowLayer, Law, Linear, Terminal

__all__ = ["MAF"]

Array = NDArray[Any]
Order = str | Sequence[int] | Sequence[Sequence[int]]
Bounds = Sequence[Any] | Mapping[str, Any]

INPUT_CLIP = 5.0
"""How far from their mean, in standard deviations, networks read variables as they are."""

TOTAL = 10.0
"""Bound of the log-scales of all transforms of a variable together; measured in ``docs/defaults.md``."""


def MAF(
    features: int,
    context_features: int = 0,
    transforms: int = 5,
    hidden_features: Sequence[int] = (100, 100),
    activation: str = "relu",
    order: Order = "reverse",
    residual: bool = False,
    batch_norm: bool | str = False,
    components: int = 1,
    bounds: Bounds | None = None,
    names: Sequence[str] | None = None,
    dtype: DTypeLike = "float32",
    seed: Seed = None,
    linear: bool = False,
    direct: bool = False,
    clip: float | None = None,
    input_clip: float | None = INPUT_CLIP,
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
        to be generated, in all layers or in each. A mixture base counts as one more layer.
    residual : bool
        Residual networks (Nash and Durkan 2019): `hidden_features` names the width of each block, the same for all.
    batch_norm : bool or "act"
        A `BatchNorm` behind every autoregressive layer, the last included (Papamakarios et al. 2017, section 3.3); with ``"act"`` its
        statistics are those of the data at the start of the first fit.
    components : int
        With more than one, the base is a mixture of so many Gaussians for each variable, given those before it: MAF MoG.
    bounds : sequence or mapping, optional
        For each column None or a pair (lower, upper), either of which may be None: the density lives strictly inside. With `names` also
        ``{"z": (0, None)}``: those of some columns, by name.
    names : sequence of str, optional
        Of the columns. By them a data frame is selected; without names a flow takes those of the first frame that it is fitted to.
    dtype : {"float32", "float64"}
    seed : int, numpy.random.Generator or SeedSequence, optional
        Of the weights and of random orders; None draws one, so that no two flows are the same. It is found in
        ``flow.training["init_seed"]``. The weights in float32 are those in float64, rounded.
    linear : bool
        A `Linear` in front of every autoregressive layer, at first the identity.
    direct : bool
        Direct weights from the variables to the parameters (Germain et al. 2015, section 3).
    clip : float, optional
        Bound of the log-scale of a variable in each transform. None takes ``10 / transforms``, at most log(1000): then all of them
        together scale a variable by at most e^10. A wider one lets samples stray: a row a little outside the data can be scaled up in one
        transform after another, and a row of data far from all others can have a density that is low beyond all measure.
    input_clip : float or None
        The networks read a variable beyond +-input_clip, in units of its standardisation, as +-input_clip: out there they are constant.
        None reads every value as it is; then a stray sample meets straight lines, which carry it on in one transform after another.

    Returns
    -------
    Flow
        Layers: the bounds if there are any, a standardising `Affine` (the identity until the flow is trained), and the transforms.

    Raises
    ------
    ValueError
        If a parameter is out of range.

    Examples
    --------
    >>> import fastmaf
    >>> fastmaf.MAF(features=7, transforms=5, hidden_features=(64, 64))
    Flow(features=7, dtype=float32): Affine -> 5 x Autoregressive((64, 64), relu, exp_soft) -> Normal
    >>> fastmaf.MAF(features=7, transforms=1, hidden_features=(64,), batch_norm=True, components=10)
    Flow(features=7, dtype=float32): Affine -> Autoregressive((64), relu, exp_soft) -> BatchNorm -> Terminal((64), relu, mixture)
    """
    if not isinstance(batch_norm, (bool, np.bool_)) and not (isinstance(batch_norm, str) and batch_norm == "act"):
        raise ValueError(f"batch_norm is {_words.shown(batch_norm)}; it must be False, True or 'act'")
    components = _arrays.count("components", components, lowest=1)
    transforms, linear = _arrays.count("transforms", transforms, lowest=1), _words.flag("linear", linear)
    draft = Draft(features, context_features, hidden_features, activation, residual, direct, seed, input_clip, transforms)
    layers = draft.front(order, bounds, names)
    law = soft_law(clip, transforms)
    ranks = masks.layer_ranks(order, draft.features, transforms, draft.seed, components > 1)
    one = np.ones(draft.features)
    for own in ranks[:transforms]:
        if linear:
            layers.append(Linear(np.diag(one), np.diag(one), 0 * one))
        net = draft.network(Law.parameters * draft.features)
        layers.append(Autoregressive(own, masked(net, own), law))
        if batch_norm:
            layers.append(BatchNorm(0 * one, 0 * one, 0 * one, one, statistics="data" if batch_norm == "act" else "batch"))
    base = None
    if components > 1:
        net = draft.network(3 * components * draft.features, components, (0,) * draft.features)
        base = Terminal(ranks[-1], masked(net, ranks[-1]), "mixture", components)
    return draft.flow(layers, base, dtype, names)


def soft_law(clip: float | None, transforms: int) -> Law:
    """The law of each of so many transforms; without `clip`, with the default bound."""
    law = Law()
    if clip is None:
        return replace(law, constants={"clip": min(law.constants["clip"], TOTAL / transforms)})
    if not 0 < _words.number("clip", clip) < math.inf:
        raise ValueError(f"clip is {_words.shown(clip)}; it must be positive and finite, or None for the default")
    return replace(law, constants={"clip": clip})


class Draft:
    """What the parts of a new flow have in common; the parts are drawn in the order in which they are asked for."""

    def __init__(
        self,
        features: int,
        context_features: int,
        hidden_features: Sequence[int],
        activation: str,
        residual: bool,
        direct: bool,
        seed: Seed,
        input_clip: float | None,
        networks: int = 1,
    ) -> None:
        self.features = _arrays.count("features", features, lowest=1)
        self.context_features = _arrays.count("context_features", context_features)
        _iterable("hidden_features", hidden_features)
        self.widths = [_arrays.count(f"hidden_features[{k}]", width, lowest=1) for k, width in enumerate(hidden_features)]
        self.residual = _words.flag("residual", residual)
        if self.residual and len(set(self.widths)) != 1:
            raise ValueError(
                f"hidden_features is {_words.shown(tuple(self.widths))}; a residual network needs at least one block, and all of one width"
            )
        self.activation, self.direct = activation, _words.flag("direct", direct)
        self.networks = networks
        self._check_size(Law.parameters * self.features)
        self.input_clip = _layers.checked_input_clip(input_clip)
        self.seed = _arrays.seed_or_fresh(seed)
        self.rng = np.random.default_rng(self.seed)

    def _check_size(self, outputs: int) -> None:
        """Refuse what memory cannot hold before anything is drawn."""
        widths = [self.features + self.context_features, *self.widths, outputs]
        within = 2 * sum(width**2 for width in self.widths) if self.residual else 0
        straight = outputs * self.features if self.direct or not self.widths else 0
        size = self.networks * (outputs + within + straight + sum(a * b for a, b in itertools.pairwise(widths) if self.widths))
        if size > _most_parameters():
            raise ValueError(
                f"{self.features} features, hidden_features {_words.shown(tuple(self.widths))} and {self.networks} networks of {outputs} "
                f"outputs make about {size:.1g} weights, more than memory holds; build a smaller flow"
            )

    def front(self, order: Order, bounds: Bounds | None, names: Sequence[str] | None) -> list[FlowLayer]:
        """The layers in front of the networks."""
        _iterable("order", order)
        layers: list[FlowLayer] = []
        if bounds is not None:
            names = _arrays.names(names, self.features)
            layers.append(Elementwise.from_bounds(_arrays.by_column("bounds", bounds, self.features, names), names))
        return [*layers, _identity(self.features)]

    def network(self, outputs: int, components: int | None = None, values: Sequence[int] | None = None) -> Conditioner:
        """A network without its masks, the context added at its first map; `components` and `values` of a base."""
        self._check_size(outputs)
        width = [self.features, *self.widths]
        hidden = [self._dense(width[1], width[0], True)] if self.widths else []
        if self.residual:
            hidden += [self._dense(width[1], width[1]) for _ in self.widths for _ in range(2)]
        else:
            hidden += [self._dense(*pair) for pair in zip(width[2:], width[1:-1], strict=True)]
        final = self._dense(outputs, width[-1], not self.widths, final=True)
        step = 1 + self.residual
        kind = "residual" if self.residual else "plain"
        blocks = tuple(Block(kind, tuple(hidden[first : first + step])) for first in range(1, len(hidden), step))
        skip = np.zeros((outputs, self.features)) if self.direct else None
        last = bool(self.widths) and not self.residual
        net = Conditioner(hidden[0] if hidden else None, blocks, final, self.activation, last, skip, self.input_clip)
        return drawn(net, self.features, self.rng, components, values)

    def _dense(self, rows: int, inputs: int, first: bool = False, final: bool = False) -> Dense:
        """A map of zeros, context included."""
        degrees = None if final else masks.hidden_degrees(rows, self.features, self.context_features > 0)
        weight, bias = np.zeros((rows, inputs)), np.zeros(rows)
        if not (first and self.context_features):
            return Dense(weight, bias, degrees)
        return Dense(weight, bias, degrees, "added", np.zeros((rows, self.context_features)))

    def flow(self, layers: Iterable[FlowLayer], base: Terminal | None, dtype: DTypeLike, names: Sequence[str] | None) -> Flow:
        """The flow of these parts."""
        context_layers = [_identity(self.context_features)] if self.context_features else []
        return Flow(
            layers,
            base,
            features=self.features,
            context_features=self.context_features,
            context_layers=context_layers,
            dtype=dtype,
            names=names,
            training={"init_seed": self.seed},
        )


def _most_parameters() -> int:
    """Weights in float64 that fit into memory four times over, as in a fit, and that 31 bits count."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        memory = 2**63
    return int(min(memory // 32, 2**31))


def _iterable(name: str, value: Any) -> None:
    if not np.iterable(value):
        raise ValueError(f"{name} is {_words.shown(value)}; it must be a sequence")


def _identity(width: int) -> Affine:
    return Affine(np.zeros(width), np.ones(width))
