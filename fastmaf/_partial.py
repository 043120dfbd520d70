"""Partial information: marginals of the first variables of an order, and the distribution of the rest given them.

Variables that come first in the order of every network never read those behind them.  Their marginal is the flow without the others and
without the hidden units that only those read (`prefix`).  Given their values, the network of a single MADE is one of the rest, under a
context to which is added what it reads of the values (`rest`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastmaf import _arrays, _tables, _words, backends
from fastmaf._arrays import Seed
from fastmaf.layers import (
    Affine,
    Autoregressive,
    BatchNorm,
    Block,
    Conditioner,
    Dense,
    Elementwise,
    Linear,
    Normal,
    Permutation,
    Terminal,
)
from fastmaf.record import FlowRecord

__all__ = ["order", "prefix", "rest", "sample_given"]

Array = NDArray[Any]


class NoOrderError(ValueError, AttributeError):
    """A flow has no order of its columns, and so no attribute `order`."""


def order(flow: FlowRecord) -> tuple[int, ...]:
    """The columns in the order in which they are generated; see `Flow.order`."""
    records = [(f"layers[{k}]", layer) for k, layer in enumerate(flow.layers)] + [("base", flow.base)]
    networks = [(name, record) for name, record in records if isinstance(record, (Autoregressive, Terminal))]
    for name, record in records:
        if isinstance(record, (Linear, Permutation)):
            raise NoOrderError(
                f"{name} is a {type(record).__name__}: the flow has no order of its columns; build it without, and with order='sequential'"
            )
    columns = np.lexsort((np.arange(flow.features), *(record.ranks for _, record in reversed(networks))))
    for name, record in networks:
        if (np.diff(record.ranks[columns]) < 0).any():
            raise NoOrderError(
                f"{name} has an order of its own, {_words.shown(np.argsort(record.ranks, kind='stable').tolist())}: the layers share none; "
                "build the flow with order='sequential', or with one permutation for all layers"
            )
    return tuple(columns.tolist())


def _split(flow: FlowRecord, k: int) -> tuple[Array, Array]:
    """The first k columns of the order, and the others, each from left to right."""
    columns = order(flow)
    return np.sort(np.array(columns[:k], np.int64)), np.sort(np.array(columns[k:], np.int64))


def prefix(flow: FlowRecord, k: int) -> FlowRecord:
    """The marginal of the first k variables; see `Flow.prefix`."""
    k = _arrays.count("k", k, 1, flow.features + 1)
    keep, _ = _split(flow, k)
    layers = [_restricted(layer, keep) if isinstance(layer, Autoregressive) else _sliced(layer, keep) for layer in flow.layers]
    base = _restricted(flow.base, keep) if isinstance(flow.base, Terminal) else Normal(k)
    return flow.replaced(layers=layers, base=base, features=k, names=_names(flow, keep))


def _names(flow: FlowRecord, columns: Array) -> tuple[str, ...] | None:
    return None if flow.names is None else tuple(flow.names[j] for j in columns)


def _sliced(layer: Any, columns: Array) -> Any:
    """Some columns of a layer that treats each by itself."""
    if isinstance(layer, Elementwise):
        return Elementwise(tuple(layer.kinds[j] for j in columns), layer.lower[columns], layer.upper[columns])
    names = {Affine: ("loc", "scale"), BatchNorm: ("log_gamma", "beta", "mean", "var")}[type(layer)]
    return replace(layer, **{name: getattr(layer, name)[columns] for name in names})


def _rows(record: Autoregressive | Terminal, columns: Array) -> Array:
    """Rows of the final map that belong to the columns."""
    counts = np.array(record.rows if isinstance(record, Terminal) else [record.law.parameters] * record.ranks.size)
    return np.flatnonzero(np.isin(np.repeat(np.arange(record.ranks.size), counts), columns))


def _with_network(record: Any, columns: Array, ranks: Array, net: Conditioner) -> Any:
    changes: dict[str, Any] = {"ranks": ranks, "conditioner": net}
    if isinstance(record, Terminal) and record.categories:
        changes["categories"] = tuple(record.categories[j] for j in columns)
    return replace(record, **changes)


def _restricted(record: Any, columns: Array) -> Any:
    """The network of the first columns of its order."""
    net, ranks = record.conditioner, record.ranks[columns]
    below = int(ranks.max())
    reads = columns
    hidden = [] if net.initial is None else [_submap(net.initial, reads, below)]
    blocks = []
    if hidden:
        reads = _kept(net.initial.degrees, below)
    for block in net.blocks:
        first = _submap(block.maps[0], reads, below)
        if not block.residual:
            blocks.append(Block(block.kind, (first,)))
            reads = _kept(block.maps[0].degrees, below)
            continue
        inner = _kept(block.maps[0].degrees, below)
        blocks.append(Block(block.kind, (first, _submap(block.maps[1], inner, below, reads))))
    rows = _rows(record, columns)
    final = _selected(net.final, rows, reads)
    skip = None if net.skip is None else net.skip[np.ix_(rows, columns)]
    net = replace(net, initial=hidden[0] if hidden else None, blocks=tuple(blocks), final=final, skip=skip)
    return _with_network(record, columns, ranks, net)


def _kept(degrees: Array, below: int) -> Array:
    """Units of lower degree; one that nobody reads if there are none, since a layer has units."""
    kept = np.flatnonzero(degrees < below)
    return kept if kept.size else np.array([int(np.argmin(degrees))])


def _submap(dense: Dense, reads: Array, below: int, rows: Array | None = None) -> Dense:
    """A hidden map between units that are kept, zero for units of higher degree among them: nobody reads those."""
    assert dense.degrees is not None
    rows = _kept(dense.degrees, below) if rows is None else rows
    part = _selected(dense, rows, reads)
    unread = dense.degrees[rows] >= below
    if not unread.any():
        return part
    names = ("weight", "bias", "context_weight", "context_bias")
    changes = {name: getattr(part, name).copy() for name in names if getattr(part, name) is not None}
    for array in changes.values():
        array[unread] = 0
    return replace(part, **changes)


def _selected(dense: Dense, rows: Array, columns: Array) -> Dense:
    """Some rows and columns of a map."""
    changes: dict[str, Any] = {"weight": dense.weight[np.ix_(rows, columns)]}
    for name, index in (("bias", rows), ("degrees", rows), ("context_weight", rows), ("context_bias", rows)):
        changes[name] = None if getattr(dense, name) is None else getattr(dense, name)[index]
    for name in ("norm_scale", "norm_shift"):
        changes[name] = None if getattr(dense, name) is None else getattr(dense, name)[columns]
    return replace(dense, **changes)


# The rest, given the prefix


def rest(flow: FlowRecord, k: int) -> tuple[FlowRecord, Callable[[Array], Array]] | None:
    """The other variables given the first k, and what the network reads of these.

    For a flow with one network, which reads the data; None for others, and where the context of the network enters its first map
    by other means than being added.

    Returns
    -------
    flow : FlowRecord
        Its context is [context, what the network reads of the first k from left to right].
    read : function
        From values of the first k, (n, k), to that.
    """
    networks = [record for record in (*flow.layers, flow.base) if isinstance(record, (Autoregressive, Terminal))]
    if len(networks) != 1 or getattr(networks[0], "direction", "data") != "data":
        return None
    given, others = _split(flow, k)
    record = _given(networks[0], given, others, flow.context_features)
    if record is None:
        return None
    place = next((k for k, layer in enumerate(flow.layers) if layer is networks[0]), len(flow.layers))
    context_layers = flow.context_layers
    if given.size and context_layers:
        context_layers = tuple(_beside(layer, given.size) for layer in context_layers)
    front = [_fixed(_sliced(layer, given)) for layer in flow.layers[:place]]
    clip = networks[0].conditioner.input_clip

    def read(values: Array) -> Array:
        if front and given.size:
            values = _to_noise(FlowRecord(front, features=given.size, dtype=flow.dtype), values, None)
        return values if clip is None else np.clip(values, -clip, clip)

    conditional = flow.replaced(
        layers=[record if k == place else _sliced(layer, others) for k, layer in enumerate(flow.layers)],
        base=record if isinstance(flow.base, Terminal) else Normal(others.size),
        features=others.size,
        context_features=flow.context_features + given.size,
        context_layers=context_layers,
        names=_names(flow, others),
    )
    return conditional, read


def _beside(layer: Any, width: int) -> Elementwise | Affine:
    """The layer with so many columns more, which it leaves as they are."""
    if isinstance(layer, Affine):
        return Affine(np.append(layer.loc, np.zeros(width)), np.append(layer.scale, np.ones(width)))
    free = Elementwise.from_bounds([None] * width)
    return Elementwise(layer.kinds + free.kinds, np.append(layer.lower, free.lower), np.append(layer.upper, free.upper))


def _fixed(layer: Any) -> Any:
    """A batch norm as the Affine that it is in evaluation."""
    if not isinstance(layer, BatchNorm):
        return layer
    mean, var, beta, log_gamma = (np.asarray(a, np.float64) for a in (layer.mean, layer.var, layer.beta, layer.log_gamma))
    scale = np.exp(log_gamma) / np.sqrt(var + layer.eps)
    return Affine(mean - beta / scale, scale)


def _given(record: Any, given: Array, others: Array, c: int) -> Any:
    """The network of the other columns, those that are given being part of its context."""
    net = record.conditioner
    down = int(record.ranks[others].min()) - 1
    width = c + given.size
    first = net.initial or net.final
    rows = _rows(record, others)

    def lowered(dense: Dense) -> Dense:
        changes: dict[str, Any] = {"degrees": None if dense.degrees is None else np.maximum(0, dense.degrees - down)}
        if dense is net.final:
            dense = _selected(dense, rows, others if net.initial is None else np.arange(dense.weight.shape[1]))
            changes = {}
        elif dense is net.initial:
            dense = _selected(dense, np.arange(dense.bias.size), others)
        if dense.context_weight is not None:
            changes["context_weight"] = np.pad(dense.context_weight, ((0, 0), (0, given.size)))
        return replace(dense, **changes)

    if (
        first.context not in ("none", "added")
        or first.norm_scale is not None
        or (net.skip is not None and net.final.context not in ("none", "added"))
    ):
        return None
    initial = None if net.initial is None else lowered(net.initial)
    blocks = tuple(replace(block, maps=tuple(map(lowered, block.maps))) for block in net.blocks)
    final = lowered(net.final)
    if initial is None:
        final = _reading(final, net.final.weight[np.ix_(rows, given)], width)
    else:
        initial = _reading(initial, net.initial.weight[:, given], width)
    skip = None
    if net.skip is not None:
        skip, final = net.skip[np.ix_(rows, others)], _reading(final, net.skip[np.ix_(rows, given)], width)
    return _with_network(record, others, record.ranks[others] - down, replace(net, initial=initial, blocks=blocks, final=final, skip=skip))


def _reading(dense: Dense, weight: Array, width: int) -> Dense:
    """The map that adds `weight` times the last columns of the context."""
    if not weight.shape[1]:
        return dense
    old = np.zeros((len(weight), width), weight.dtype) if dense.context_weight is None else np.array(dense.context_weight)
    old[:, width - weight.shape[1] :] += weight
    return replace(dense, context="added", context_weight=old)


def sample_given(
    flow: FlowRecord,
    backend: backends.Backend,
    x: ArrayLike,
    n: int,
    context: ArrayLike | None,
    seed: Seed,
    offset: int,
    context_offset: int,
    dtype: DTypeLike | None,
) -> Array:
    """Rows that begin with given values, of arrays of the host; see `Flow.sample_given`."""
    x = _arrays.real("x", x, names=_given_names(flow, x))
    if x.ndim not in (1, 2) or x.shape[-1] > flow.features:
        raise ValueError(
            f"x has shape {_words.shapes(x.shape)}; it must be (k,) or (c, k), k at most the {flow.features} features of the flow"
        )
    n = _arrays.count("n", n)
    k = int(x.shape[-1])
    given, others = _split(flow, k)
    context, c = _arrays.contexts(context, flow.context_features, usual=flow.usual_contexts)
    grouped = x.ndim == 2 or (context is not None and context.ndim == 2)
    if x.ndim == 2:
        if context is not None and context.ndim == 2 and len(context) != len(x):
            raise ValueError(f"x has shape {x.shape} and context {context.shape}; both must have as many rows")
        c = len(x)
    seed, offset, context_offset = _arrays.seed_and_offsets(seed, offset, context_offset, n, c)
    _possible(flow, x, given, _names(flow, given))
    dtype = flow.sample_dtype(dtype)
    values = np.broadcast_to(x, (c, k)).astype(dtype)
    contexts = None if context is None else np.broadcast_to(context, (c, flow.context_features))
    place = (seed, offset, context_offset)
    samples = _arrays.empty((c, n, flow.features), dtype)
    if others.size and samples.size:
        conditional = rest(flow, k)
        if conditional is not None:
            samples[:, :, others] = _sampled(backend, *conditional, n, contexts, values, place, dtype)
        else:
            samples = _through_noise(flow, backend, n, contexts, values, given, others, place, dtype)
    samples[:, :, given] = values[:, None]
    return samples if grouped else samples[0]


def _given_names(flow: FlowRecord, x: Any) -> Sequence[str] | None:
    """The names of the first variables of the order, as many as a data frame has columns."""
    if not _tables.is_table(x) or flow.names is None:
        return None
    return _names(flow, _split(flow, min(len(_tables.labels(x)), flow.features))[0])


def _possible(flow: FlowRecord, x: Array, columns: Array, names: Sequence[str] | None) -> None:
    """The values that are given are finite, and discrete variables have them."""
    _arrays.finite("x", x, names)
    counts = np.array(flow.values)[columns]
    wrong = (counts > 0) & ((x < 0) | (x >= counts) | (x != np.floor(x)))
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        where = _words.columns([place[-1]], names)
        raise ValueError(f"x has {x[place]} in {where}; that variable has the values 0..{counts[place[-1]] - 1}")


def _sampled(
    backend: backends.Backend,
    conditional: FlowRecord,
    read: Callable[[Array], Array],
    n: int,
    contexts: Array | None,
    values: Array,
    place: tuple[int, int, int],
    dtype: np.dtype[Any],
) -> Array:
    """Samples (c, n, D) under contexts to which is added what the network reads of given values."""
    parts = [part for part in (contexts, read(values)) if part is not None]
    wide = np.concatenate(parts, axis=1, dtype=np.result_type(np.float64, *parts))
    if backend.unsupported(conditional) is not None:  # a context in an unusual place
        backend = backends.require("reference")
    samples = np.empty((len(values), n, conditional.features), dtype)
    backend.sample(conditional, len(values), n, wide if wide.shape[1] else None, *place, samples, None)
    return samples


def _through_noise(
    flow: FlowRecord,
    backend: backends.Backend,
    n: int,
    contexts: Array | None,
    values: Array,
    given: Array,
    others: Array,
    place: tuple[int, int, int],
    dtype: np.dtype[Any],
) -> Array:
    """The prefix turned into noise, the rest of the noise drawn, and both turned into rows."""
    c, k = values.shape
    free = FlowRecord(flow.layers, None, **_options(flow))
    noise = np.empty((c, n, flow.features), flow.dtype)
    if k:
        own = _to_noise(prefix(free, k), values, contexts, backend)
        noise[:, :, given] = own[:, None]
    if isinstance(flow.base, Terminal):
        base = rest(FlowRecord([], flow.base, **_options(flow)), k)
        if base is None:
            raise ValueError("base: its context enters its first map by other means than being added, which sample_given cannot follow")
        noise[:, :, others] = _sampled(backend, *base, n, contexts, own if k else values, place, flow.dtype)
    else:
        normal = FlowRecord([], features=others.size, dtype=flow.dtype)
        noise[:, :, others] = _sampled(backend, normal, lambda values: values, n, None, values[:, :0], place, flow.dtype)
    result = np.empty(noise.shape, dtype)
    backends.runner(free, backend).from_noise(free, noise, None if contexts is None else contexts[:, None], result)
    return _arrays.all_or_none(result)


def _to_noise(flow: FlowRecord, x: Array, context: Array | None, backend: backends.Backend | None = None) -> Array:
    """The noise of rows (n, D), row by row under contexts (n, C) or None."""
    result = np.empty(x.shape, flow.dtype)
    backends.runner(flow, backend or backends.choose()).to_noise(flow, x, context, result)
    return _arrays.all_or_none(result)


def _options(flow: FlowRecord) -> dict[str, Any]:
    """What the parts of a flow share."""
    return {name: getattr(flow, name) for name in ("features", "context_features", "context_layers", "dtype")}
