"""The rows of a fit: judged, split, summed up, and what is worth a warning about them."""

from __future__ import annotations

import functools
import hashlib
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastmaf import _arrays, _tables, _words
from fastmaf.layers import Affine, Autoregressive, Elementwise, Linear, Terminal
from fastmaf.record import FlowRecord
from fastmaf.train.ranks import ALONE, Ranks

try:
    from fastmaf._core import shuffle
except ImportError:
    from fastmaf._random import shuffle

__all__ = ["FitWarning", "Moments", "Rows", "digest", "drawn", "place", "shuffle", "split", "standardised"]

Array = NDArray[Any]
Layers = tuple[Any, ...]

SPLIT = 4
"""Random stream of the choice of validation rows."""

BLOCK = 1 << 18
"""Numbers read at a time when data are checked, summed, scored or hashed."""

MANY = 8192
"""Rows among which a value that many of them share is looked for."""

FEW = 30
"""Rows that are few for a fit, if there are ten times as many that count for little."""

MANY_VALUES = 12
"""Values of a category that a network still learns to tell apart when it reads them as one number."""

LEAST = 20
"""Rows that are needed to tell anything of how they lie."""

POINT = 0.05
"""Share of the rows at one value that is no accident in a continuous variable, if the values beside it have far less."""

VALUES = 20
"""Different values that are few for a continuous variable: more of them, and a flow sees them as one slope."""

NINE_TENTHS = 30
"""Ranges of the nine tenths in the middle that a standard deviation has only where a few values make it."""

SOME = 1024
"""Rows that show whether values fall together."""

MOST = 256
"""Columns of which it is found out whether some follow from others."""

ASTRAY = 10
"""Ranges of the training rows beyond which a validation row is none like them."""

SHRINK = 1e-9
"""By how much of the identity a correlation matrix is mixed with it before it is inverted, so that columns may follow from each other."""

ENOUGH = 4
"""Rows for each column that are needed to tell how columns go together."""

UNIT = -1000
"""Exponent of the least unit of a column: no less, so that this power of two and its inverse are numbers."""

LARGE = 1e6
"""Values that float32 holds with steps that are felt."""

SINGLE = "give it as float64, or subtract an offset"
"""The remedy for columns that single precision has rounded."""


class FitWarning(UserWarning):
    """Something about a fit or its data that one would want to know."""


class Rows(NamedTuple):
    """Arrays of the same length, and which of their rows to use."""

    x: Array
    context: Array | None
    weights: Array | None
    rows: NDArray[np.int64]

    def own_weights(self) -> NDArray[np.float64] | None:
        """The weights of these rows."""
        return None if self.weights is None else self.weights[self.rows]

    def mass(self) -> float:
        """Sum of the weights."""
        own = self.own_weights()
        return float(self.rows.size if own is None else own.sum())


# Shapes


def _matrix(name: str, value: ArrayLike, columns: int, what: str, names: Sequence[str] | None = None) -> Array:
    array = _arrays.real(name, value, names=names)
    has = f"{name} has shape {_words.shapes(array.shape)}"
    if array.ndim == 1 and columns:
        raise ValueError(f"{has}; it must be (n, {columns}), one row for each of n samples" + f": {name}[:, None]" * (columns == 1))
    if array.ndim != 2 or array.shape[1] != columns:
        raise ValueError(f"{has}; the flow has {columns} {what}{'s' * (columns != 1)}")
    if not columns:
        raise ValueError(f"{has}, but the flow has no {what}s; leave {name} out")
    return array


def rows_of(
    record: FlowRecord,
    prefix: str,
    x: ArrayLike,
    context: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    ranks: Ranks = ALONE,
) -> Rows:
    """The arrays, judged by shape, and their rows of positive weight."""
    for name, other in (("context", context), ("weights", weights)):
        _tables.check_rows(f"{prefix}x", x, f"{prefix}{name}", other)
    rows = _matrix(f"{prefix}x", x, record.features, "feature", record.names)
    contexts = None if context is None else _matrix(f"{prefix}context", context, record.context_features, "context feature")
    if contexts is None and record.context_features:
        remedy = "; pass validation=(x, context)" * bool(prefix)
        raise ValueError(f"{prefix}context is missing; the flow has {record.context_features} context features{remedy}")
    shares = None if weights is None else _arrays.weights(f"{prefix}weights", weights, lambda own: max(ranks.gather(own)))
    for name, array in (("context", contexts), ("weights", shares)):
        if array is not None and len(array) != len(rows):
            raise ValueError(f"{prefix}{name} has {len(array)} rows; {prefix}x has {len(rows)}")
    if not len(rows):
        raise ValueError(f"{prefix}x has no rows")
    return Rows(rows, contexts, shares, np.arange(len(rows)) if shares is None else np.flatnonzero(shares))


def split(
    record: FlowRecord,
    x: ArrayLike,
    context: ArrayLike | None,
    weights: ArrayLike | None,
    validation: Any,
    seed: int,
    reused: bool,
    ranks: Ranks,
) -> tuple[Rows, Rows | None, str]:
    """Rows of this rank to train on, rows to validate on, and what to say of the weights of both.

    Rows to validate on are copied if the array of x is `reused` by the caller.
    """
    train = _own(rows_of(record, "", x, context, weights, ranks), ranks)
    few = uneven("weights", train.own_weights(), ranks)
    if not isinstance(validation, float):
        x, context, weights = (*validation, None, None)[:3]
        held = _own(rows_of(record, "validation ", x, context, weights, ranks), ranks)
        _check("validation x", held.x, record.layers, _counts(record), record.names)
        if held.context is not None:
            _check("validation context", held.context, record.context_layers)
        _check_some(train)
        return train, held, few
    if not validation:
        _check_some(train)
        return train, None, few
    begin, total = place(train, ranks)
    count = round(validation * total)
    if not 0 < count < total:
        left = "no row to validate on" if not count else "no row to train on"
        of = f"{total} rows" if train.weights is None else f"the {total} rows of positive weight"
        raise ValueError(f"validation is {validation} of {of}, which leaves {left}; give more rows, validation rows, or validation=0")
    chosen = np.zeros(total, bool)
    chosen[shuffle(seed, SPLIT, 0, total)[:count]] = True
    chosen = chosen[begin : begin + train.rows.size]
    train, held = train._replace(rows=train.rows[~chosen]), train._replace(rows=train.rows[chosen])
    if reused:
        context, weights = (None if array is None else array[held.rows] for array in held[1:3])
        held = Rows(held.x[held.rows], context, weights, np.arange(held.rows.size))
    _check_some(train)
    return train, held, few


def _check_some(train: Rows) -> None:
    if not train.rows.size:
        raise ValueError("this rank has no row to train on; give each of them some, or start fewer ranks")


def place(rows: Rows, ranks: Ranks) -> tuple[int, int]:
    """Where the rows of this rank begin among those of all, and how many these are."""
    counts = ranks.gather(rows.rows.size)
    return sum(counts[: ranks.rank]), sum(counts)


def _some_of_all(train: Rows, ranks: Ranks) -> Rows:
    """Rows by which columns are judged: the training rows, or every so many of those of all ranks."""
    if ranks.size == 1:
        return train
    rows = train.rows[:: -(-place(train, ranks)[1] // MANY)]

    def joined(array: Array) -> Array:
        return np.concatenate(ranks.gather(array[rows]))

    context, weights = (None if array is None else joined(array) for array in train[1:3])
    x = joined(train.x)
    return Rows(x, context, weights, np.arange(len(x)))


def _own(rows: Rows, ranks: Ranks) -> Rows:
    """The rows of this rank: all, or its part where every rank holds the same arrays."""
    if ranks.size > 1 and len(set(ranks.gather(digest(*rows[:3])))) == 1:
        first, last = (rows.rows.size * k // ranks.size for k in (ranks.rank, ranks.rank + 1))
        rows = rows._replace(rows=rows.rows[first:last])
    return rows


def digest(*arrays: Array | None) -> str:
    """What tells arrays from others."""
    state = hashlib.sha256()
    for array in arrays:
        if array is None:
            state.update(b"none")
            continue
        state.update(f"{array.dtype.str} {array.shape}".encode())
        step = max(1, BLOCK // max(1, math.prod(array.shape[1:])))
        for first in range(0, len(array), step):
            state.update(np.ascontiguousarray(array[first : first + step]).data)
    return state.hexdigest()


def validation_of(value: Any) -> float | tuple[ArrayLike | None, ...]:
    """The argument `validation`: a fraction, or the rows themselves with their contexts and weights."""
    must = "it must be a fraction below 1, rows x, or a tuple (x,), (x, context) or (x, context, weights)"
    if isinstance(value, tuple):
        if not 1 <= len(value) <= 3 or value[0] is None:
            raise ValueError(f"validation is a tuple of length {len(value)}; {must}")
        return value
    if isinstance(value, (str, bytes, bool)) or value is None:
        raise ValueError(f"validation is {_words.shown(value)}; {must}")
    if isinstance(value, (numbers.Real, np.number)):
        if not 0 <= value < 1:  # type: ignore[operator]
            raise ValueError(f"validation is {_words.shown(value)}; {must}")
        return float(value)
    return (value,)


def uneven(name: str, weights: NDArray[np.float64] | None, ranks: Ranks = ALONE) -> str:
    """What to say of weights so unequal that few rows count, by Kish's effective number of them; nothing of others."""
    if weights is None:
        return ""
    shares = weights / max(ranks.gather(weights.max(initial=0)))
    rows, mass, squares = ranks.sum(np.array([np.count_nonzero(weights), shares.sum(), (shares**2).sum()]))
    effective = mass**2 / squares
    if effective >= min(FEW, rows / 10):
        return ""
    return f"{name} are so unequal that {rows:.0f} rows count like {effective:.3g}: cap the largest weights, or leave {name} out"


# Values


def _counts(record: FlowRecord) -> Array | None:
    """How many values each variable has, 0 for any number; None where all may have any."""
    return np.array(record.values) if record.discrete else None


def _blocks(
    name: str, array: Array, layers: Layers, counts: Array | None = None, names: Sequence[str] | None = None
) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """The array in float64, block by block, each made sure to be finite and inside the bounds of the first layer, or one of the values."""
    bounds = layers[0] if layers and isinstance(layers[0], Elementwise) else None
    step = max(1, BLOCK // array.shape[1])

    def judged(first: int) -> tuple[slice, NDArray[np.float64], NDArray[np.bool_]]:
        part = slice(first, min(first + step, len(array)))
        block = array[part].astype(np.float64)
        wrong = ~np.isfinite(block)
        if bounds is not None:
            wrong |= (block <= bounds.lower) | (block >= bounds.upper)
        if counts is not None:
            wrong |= (counts > 0) & ((block < 0) | (block >= counts) | (block != np.floor(block)))
        return part, block, wrong

    for first in range(0, len(array), step):
        part, block, wrong = judged(first)
        if wrong.any():
            row, column = (int(i) for i in np.argwhere(wrong)[0])
            value, must = block[row, column], "be finite"
            if bounds is not None and math.isfinite(value):
                must = f"lie strictly between {bounds.lower[column]} and {bounds.upper[column]}"
            discrete = 0 if counts is None else counts[column]
            if discrete:
                must = f"be an integer from 0 to {discrete - 1}"
            faulty = wrong.any(axis=0)
            for later in range(first + step, len(array), step):
                faulty |= judged(later)[2].any(axis=0)
            others = [int(j) for j in np.flatnonzero(faulty) if j != column]
            also = f" ({_words.columns(others, names)} too)" if others else ""
            remedy = "" if discrete else "; leave such rows out, or " + ("widen the bounds" if math.isfinite(value) else "fill them")
            raise ValueError(f"{name} has {value} in row {first + row}, {_words.columns([column], names)}; it must {must}{also}{remedy}")
        yield part, block


def _check(name: str, array: Array, layers: Layers, counts: Array | None = None, names: Sequence[str] | None = None) -> None:
    for _ in _blocks(name, array, layers, counts, names):
        pass


def drawn(draw: Callable[[int], ArrayLike], epoch: int, shape: tuple[int, ...], record: FlowRecord) -> Array:
    """A fresh x for an epoch."""
    name = f"x({epoch})"
    x = _arrays.real(name, draw(epoch), names=record.names)
    if x.shape != shape:
        raise ValueError(f"{name} has shape {_words.shapes(x.shape)}; x(0) has shape {_words.shapes(shape)}")
    _check(name, x, record.layers, _counts(record), record.names)
    return x[:]  # one array may come again, with other numbers: to who keeps the last one, it is another object


# Standardisation


@dataclass
class Moments:
    """Weighted mean and standard deviation of columns behind the bounds, in double, whatever their size; and their extremes as given.

    Columns are summed up in units of a power of two near their largest value, so that no square overflows or vanishes.
    """

    mean: Array
    deviation: Array
    low: Array
    high: Array

    @classmethod
    def of(
        cls,
        name: str,
        array: Array,
        weights: NDArray[np.float64],
        layers: Layers,
        names: Sequence[str] | None = None,
        ranks: Ranks = ALONE,
    ) -> Moments:
        """Of the rows of positive weight of all ranks; judges all rows of this one."""
        width = array.shape[1]
        sums = _Sums(0.0, np.zeros(width), np.zeros(width), np.full(width, UNIT), np.full(width, math.inf), np.full(width, -math.inf))
        for part, block in _blocks(name, array, layers, None, names):
            if (used := weights[part] > 0).any():
                sums = sums.and_of(_Sums.of(block[used], weights[part][used], layers))
        sums = functools.reduce(_Sums.and_of, ranks.gather(sums))
        deviation = np.where(sums.low == sums.high, 0.0, np.ldexp(np.sqrt(np.maximum(sums.square, 0) / sums.total), sums.unit))
        return cls(np.ldexp(sums.mean, sums.unit), deviation, sums.low, sums.high)

    def without(self, discrete: NDArray[np.bool_]) -> Moments:
        """Those of a standard column for the columns that keep their values."""
        mean, low, high = (np.where(discrete, 0.0, own) for own in (self.mean, self.low, self.high))
        return Moments(mean, np.where(discrete, 1.0, self.deviation), low, high)


class _Sums(NamedTuple):
    """Of columns: the weight of the rows; mean and sum of squares about it, in units of two to the `unit`; extremes as given."""

    total: float
    mean: Array
    square: Array
    unit: Array
    low: Array
    high: Array

    @classmethod
    def of(cls, values: NDArray[np.float64], weights: NDArray[np.float64], layers: Layers) -> _Sums:
        low, high = least, most = values.min(axis=0), values.max(axis=0)
        if layers and isinstance(layers[0], Elementwise):
            values = _unbounded(values, layers)
            least, most = values.min(axis=0), values.max(axis=0)
        unit = np.maximum(UNIT, np.frexp(np.maximum(np.abs(least), np.abs(most)))[1])
        values = values * np.ldexp(1.0, -unit)
        total = float(weights.sum())
        near = np.einsum("i,ij->j", weights, values) / total
        values -= near
        rest = np.einsum("i,ij->j", weights, values) / total  # what rounding has left
        values *= values
        return cls(total, near + rest, np.einsum("i,ij->j", weights, values) - total * rest**2, unit, low, high)

    def and_of(self, other: _Sums) -> _Sums:
        """Of the rows of both (Chan, Golub and LeVeque 1983)."""
        low, high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        unit, total = np.maximum(self.unit, other.unit), self.total + other.total
        mine, theirs = self.unit - unit, other.unit - unit
        mean = np.ldexp(self.mean, mine)
        square = np.ldexp(other.square, 2 * theirs)
        if total > 0:
            step = np.ldexp(other.mean, theirs) - mean
            mean = mean + step * (other.total / total)
            square = square + step**2 * (other.total * (total - other.total) / total)
        return _Sums(total, mean, np.ldexp(self.square, 2 * mine) + square, unit, low, high)


def _unbounded(values: NDArray[np.float64], layers: Layers) -> NDArray[np.float64]:
    """The rows behind an Elementwise, if the first layer is one."""
    if not (layers and isinstance(layers[0], Elementwise)):
        return values
    result: NDArray[np.float64] = values.copy()
    for column, (kind, lower, upper) in enumerate(zip(layers[0].kinds, layers[0].lower, layers[0].upper, strict=True)):
        if kind != "identity":
            above = np.log(values[:, column] - lower) if kind != "log_below" else 0.0
            below = np.log(upper - values[:, column]) if kind != "log_above" else 0.0
            result[:, column] = above - below
    return result


def standardised(
    record: FlowRecord, train: Rows, wanted: bool | str, held: Rows | None = None, few: str = "", ranks: Ranks = ALONE
) -> tuple[FlowRecord, list[str]]:
    """The record with the data's mean and deviation in the Affines in front, if that is wanted, and what to warn of; judges the data.

    `wanted` is True for a flow that was never fitted, if its Affine is the identity or absent; "again" whatever was there; "full" is
    True and a `Linear` that makes the columns uncorrelated. `held` are validation rows that do not come from the same arrays, `few` is
    what there is to say of weights.
    """
    weights = np.zeros(len(train.x))
    weights[train.rows] = 1.0 if train.weights is None else train.weights[train.rows]
    fresh = wanted == "again" or (bool(wanted) and not record.fitted)
    layers, context_layers, notes = record.layers, record.context_layers, []
    some = _some_of_all(train, ranks)
    discrete = np.array(record.values) > 0
    if discrete.any():
        notes += _of_categories(record, train, ranks)
    if not discrete.all():
        moments = Moments.of("x", train.x, weights, layers, record.names, ranks).without(discrete)
        seldom = constant = np.flatnonzero(moments.deviation == 0)
        if constant.size:  # the few rows in which it varies may all be held out: the seed is not to decide
            used = np.ones(len(train.x)) if train.weights is None else train.weights
            moments.deviation[constant] = Moments.of("x", train.x, used, layers, record.names, ranks).deviation[constant]
            seldom, constant = constant, np.flatnonzero(moments.deviation == 0)
        if constant.size:
            value = f": {moments.low[constant[0]]} in every row to train on" if constant.size == 1 else " in the rows to train on"
            remedy = "leave out what does not vary"
            if train.x.dtype.itemsize < 8 and (np.abs(moments.low[constant]) > LARGE).any():
                remedy += f", unless {train.x.dtype} has rounded it away: then give rows as float64"
            raise ValueError(f"x is constant in {_words.columns(constant, record.names)}{value}; {few or remedy}")
        if seldom.size:
            where = _words.columns(seldom, record.names)
            notes.append(
                f"x varies in {where} only in rows to validate on, so that nothing can be learned of it: give more rows, or leave it out"
            )
        layers = _placed("x", layers, moments, fresh, wanted == "again", record.names)
        if wanted == "full" and discrete.any():
            notes.append('standardize="full" is for columns that may have any number; beside discrete ones it does what True does')
        elif wanted == "full" and layers is not record.layers:
            mass, squares = ranks.sum(np.array([weights.sum(), (weights**2).sum()]))
            rows = mass**2 / squares
            if rows < ENOUGH * record.features:
                notes.append(
                    f"x has {rows:.3g} rows that count for {record.features} columns, too few to tell how these go together: their "
                    "covariance is left alone, as standardize=True does"
                )
            else:
                layers = _whitened(train, weights, layers, moments, ranks)
        elif wanted == "full" and not _whitens(layers):
            notes.append('standardize="full" does nothing, since the flow is standardised already: flow.reset() before, or make a new flow')
        judged = replace(moments, deviation=np.where(discrete, 0.0, moments.deviation))  # of what does not vary nothing is said
        notes += _notes(record, some, layers, judged) or _degenerate(record, some, np.flatnonzero(~discrete))
        if held is not None:
            notes += _astray("validation x", held.x, held, moments, record.names)
        if wanted and layers is record.layers:
            notes += _far_out("x", layers, moments, record.names)
        elif not wanted:
            notes += _out_of_reach(record, layers, moments)
    if train.context is not None:
        moments = Moments.of("context", train.context, weights, context_layers, None, ranks)
        noise = _noise(train.context, moments)
        notes += _spoilt("context", some, context_layers, moments, noise, record.dtype, None)
        if held is not None and held.context is not None:
            notes += _astray("validation context", held.context, held, moments, None)
        coarse = np.flatnonzero(~noise & _coarse(train.context, moments))
        if coarse.size:
            where = _words.columns(coarse)
            notes.append(f"{train.context.dtype} cannot resolve {where} of context, far from 0 for the spread: {SINGLE}")
        moments.deviation = np.where(noise, 1.0, moments.deviation)  # what does not vary tells nothing, and harms nothing
        context_layers = _placed("context", context_layers, moments, fresh, wanted == "again", None)
        if wanted and context_layers is record.context_layers:
            notes += _far_out("context", context_layers, moments, None)
    if few:  # what the moments of so few rows seem to show is no matter of the columns
        notes = [few]
    if layers is record.layers and context_layers is record.context_layers:
        return record, notes
    training = {**record.training, **({"whitened": True} if len(layers) > len(record.layers) and _whitens(layers) else {})}
    return record.replaced(layers=layers, context_layers=context_layers, training=training), notes


def _of_categories(record: FlowRecord, train: Rows, ranks: Ranks) -> list[str]:
    """About discrete columns, which are judged: of other values than they were made for, of more than a network tells apart."""
    counts, base, notes = np.array(record.values), record.base, []
    low, high = counts.astype(np.float64), np.full(counts.size, -1.0)
    for _, block in _blocks("x", train.x, record.layers, counts, record.names):
        low, high = np.minimum(low, block.min(axis=0)), np.maximum(high, block.max(axis=0))
    low, high = np.min(ranks.gather(low), axis=0), np.max(ranks.gather(high), axis=0)
    odd = np.flatnonzero((counts > 2) & ((low > 0) | (2 * (high + 1) <= counts)))
    if odd.size:
        j, also = odd[0], f" ({_words.columns(odd[1:], record.names)} likewise)" if odd.size > 1 else ""
        notes.append(
            f"x has values from {low[j]:.0f} to {high[j]:.0f} in {_words.columns([j], record.names)}, which was made for 0 to "
            f"{counts[j] - 1}{also}: values that never occur have a probability too"
        )
    assert isinstance(base, Terminal)
    many = np.flatnonzero((counts > MANY_VALUES) & (base.ranks < base.ranks.max()))
    if many.size and base.conditional == "mixed":
        notes.append(
            f"networks read the values of {_words.columns(many, record.names)} as numbers, of which they tell no more than about "
            f"{MANY_VALUES} apart where neighbours have nothing in common: put such columns last in the order, or give them as one-hot "
            "context"
        )
    return notes


def _placed(name: str, layers: Layers, moments: Moments, fresh: bool, again: bool, names: Sequence[str] | None) -> Layers:
    """The layers with a standardising Affine behind the bounds, if one is to be put there."""
    k = int(bool(layers) and isinstance(layers[0], Elementwise))
    width = moments.mean.size
    there = layers[k : k + 1] and isinstance(layers[k], Affine)
    if not fresh or (there and not again and layers[k] != Affine(np.zeros(width), np.ones(width))):
        return layers
    with np.errstate(all="ignore"):
        scale = 1 / moments.deviation
        wrong = np.flatnonzero(~(np.isfinite(scale) & (scale > 0) & np.isfinite(moments.high - moments.low)))
    if wrong.size:
        raise ValueError(f"{name} has a scale that float64 cannot hold in {_words.columns(wrong, names)}; give it in other units")
    return (*layers[:k], Affine(moments.mean, scale), *layers[k + bool(there) :])


def _whitened(train: Rows, weights: NDArray[np.float64], layers: Layers, moments: Moments, ranks: Ranks) -> Layers:
    """The layers with a Linear behind the Affine that makes standard columns uncorrelated; of the variable and those before it each."""
    width = moments.mean.size
    k = int(bool(layers) and isinstance(layers[0], Elementwise)) + 1
    there = len(layers) > k and isinstance(layers[k], Linear)
    if width == 1 or (there and not _is_identity(layers[k])):
        return layers
    correlation = np.zeros((width, width))
    for part, block in _blocks("x", train.x, layers, None, None):
        z = (_unbounded(block, layers) - moments.mean) / moments.deviation
        correlation += (z.T * weights[part]) @ z
    correlation = (1 - SHRINK) * ranks.sum(correlation) / ranks.sum(weights.sum()) + SHRINK * np.eye(width)
    whitening = np.linalg.inv(np.linalg.cholesky(correlation))
    scale = np.diag(whitening)
    return (*layers[:k], Linear(np.tril(whitening / scale), np.diag(scale), np.zeros(width)), *layers[k + there :])


def _whitens(layers: Layers) -> bool:
    """Whether a Linear is where `_whitened` puts it."""
    k = int(bool(layers) and isinstance(layers[0], Elementwise)) + 1
    return len(layers) > k and isinstance(layers[k], Linear)


def _is_identity(layer: Linear) -> bool:
    one = np.eye(layer.bias.size)
    return np.array_equal(layer.lower, one) and np.array_equal(layer.upper, one) and not layer.bias.any()


# What is worth a warning


def _notes(record: FlowRecord, train: Rows, layers: Layers, moments: Moments) -> list[str]:
    """About columns that the flow's dtype cannot resolve, and about values so far away that they spoil all others."""
    names = record.names
    front = layers[0] if layers else None
    kinds = front.kinds if isinstance(front, Elementwise) else ("identity",) * record.features
    bounded = np.array([kind != "identity" for kind in kinds])
    largest, spread = np.maximum(np.abs(moments.low), np.abs(moments.high)), np.where(bounded, np.inf, moments.deviation)
    noise = _noise(train.x, moments) & ~bounded
    notes = _spoilt("x", train, layers, moments, noise, record.dtype, names)
    given = min(record.dtype, train.x.dtype, key=lambda dtype: dtype.itemsize if dtype.kind == "f" else 8)
    coarse = ~noise & _coarse(train.x, moments, given, bounded)
    limits = np.finfo(record.dtype)
    outside = ~noise & ~bounded & ((largest > float(limits.max) / 100) | (spread < float(limits.tiny) * 100))
    if (coarse & ~outside).any():
        where = _words.columns(np.flatnonzero(coarse & ~outside), names)
        remedy = ', or give rows as float64 and draw with dtype="float64"' if given != np.float64 else ""
        notes.append(f"{given} cannot resolve {where} of x, far from 0 for the spread: subtract an offset{remedy}")
    if outside.any():
        where = _words.columns(np.flatnonzero(outside), names)
        remedy = ', or make the flow with dtype="float64"' if record.dtype == np.float32 else ""
        notes.append(f"x has values in {where} at the ends of {record.dtype}, where samples overflow or vanish: use other units{remedy}")
    if record.features == 1 and not isinstance(record.base, Terminal):
        each = " for each context" if record.context_features else ""
        notes.append(
            f'a flow of one variable with a normal base is one Gaussian{each}; MADE(1, conditional="mixture") can have other shapes'
        )
    return notes


def _degenerate(record: FlowRecord, train: Rows, columns: NDArray[np.intp]) -> list[str]:
    """About rows in less than all dimensions of the columns that may have any number, where a density has no bound."""
    chosen = train.rows[:: -(-train.rows.size // MANY)]
    everything = train.x[chosen].astype(np.float64)
    rows = everything[:, columns]
    if len(rows) < LEAST:
        return []
    some = rows[:: -(-len(rows) // SOME)]
    counts = [np.unique(column, return_counts=True)[1] for column in some.T]
    if 10 * max(count.size for count in counts) <= len(some) and 10 * (different := len(np.unique(everything, axis=0))) <= len(rows):
        return [f"x has {different} different rows among {len(rows)}, whose density has no bound: drop the copies, or add noise"]
    few = [j for j, count in enumerate(counts) if count.size <= VALUES and 5 * count.size <= len(some)]
    if few:
        return [
            f"x has few different values in {_words.columns(columns[few], record.names)}, whose density has no bound: add uniform noise as "
            'wide as their distance, or make them categories of a MADE with conditional="mixed"'
        ]
    shares = np.array([_point(count) for count in counts]) / len(some)
    if (points := np.flatnonzero(shares > POINT)).size:
        most = f"{100 * shares.max():.0f} % of the rows at one value in {_words.columns(columns[points], record.names)}"
        return [f"x has up to {most}, whose density has no bound: leave those rows out and count them apart, or add noise"]
    known = np.delete(everything, columns, axis=1)  # discrete ones, of which nothing is said
    known = known[:, (known != known[0]).any(axis=0)]
    linked = _linked(np.hstack([rows, known]))[: columns.size]
    if (values := _unbounded(everything, record.layers)) is not everything:
        linked |= _linked(np.hstack([values[:, columns], known]))[: columns.size]
    follows = np.flatnonzero(linked)
    if follows.size:
        where = _words.columns(columns[follows], record.names)
        return [f"columns of x follow from each other, and their density has no bound: leave out one of {where}"]
    if train.context is not None:
        context = train.context[chosen].astype(np.float64)
        context = context[:, (context != context[0]).any(axis=0)]
        follows = np.flatnonzero(_linked(np.hstack([rows, context]))[: columns.size])
        if follows.size:
            where = _words.columns(columns[follows], record.names)
            return [f"{where} of x can be told from the context, and the density has no bound: leave out what x and context share"]
    return []


def _point(counts: NDArray[np.int64]) -> int:
    """The largest of the counts of values in order that is four times those of the values beside it; 0 if none is."""
    beside = np.maximum(np.append(counts[1:], 0), np.append(0, counts[:-1]))
    return int(counts[counts >= 4 * beside].max(initial=0))


def _linked(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Columns that are sums of others, but for factors, a constant and rounding; none are found where rows are few, or columns many."""
    rows, width = values.shape
    none = np.zeros(width, bool)
    if not 1 < width <= MOST or rows <= 2 * width:
        return none
    with np.errstate(all="ignore"):
        values = values / np.abs(values).max(axis=0)
        values -= values.mean(axis=0)
        values /= np.sqrt(np.einsum("ij,ij->j", values, values))
    if not np.isfinite(values).all():
        return none
    small, directions = np.linalg.eigh(values.T @ values)
    linked: NDArray[np.bool_] = (np.abs(directions[:, small < 1e-12]) > 0.05).any(axis=1)
    return linked


def _spacing(values: Array, dtype: Any) -> Array:
    with np.errstate(all="ignore"):
        return np.asarray(np.abs(np.spacing(values.astype(dtype))), np.float64)


def _coarse(array: Array, moments: Moments, dtype: np.dtype[Any] | None = None, bounded: Any = False) -> Array:
    """Columns whose spread, a quarter of the range where they are bounded, is few steps of a dtype; of their own, if None is named."""
    if dtype is None:
        dtype = array.dtype if array.dtype.kind == "f" else np.dtype(np.float64)
    largest = np.maximum(np.abs(moments.low), np.abs(moments.high))
    spread = np.where(bounded, moments.high / 4 - moments.low / 4, moments.deviation)
    return np.asarray(spread < 100 * _spacing(largest, dtype))


def _noise(array: Array, moments: Moments) -> Array:
    """Columns that are constant, but for rounding."""
    single = array.dtype in (np.float16, np.float32)  # whose columns may be coarse by nature
    largest = np.maximum(np.abs(moments.low), np.abs(moments.high))
    least = 2 * _spacing(largest, np.float32) if single else 16 * _spacing(largest, np.float64)
    return np.asarray((moments.deviation == 0) | (moments.deviation < least))


def _spoilt(
    name: str, train: Rows, layers: Layers, moments: Moments, noise: Array, dtype: np.dtype[Any], names: Sequence[str] | None
) -> list[str]:
    """About columns that are constant but for rounding, and those in which some values are too far away from others."""
    array: Array = getattr(train, name)
    notes, varying = [], noise & (moments.deviation > 0)
    if varying.any():
        where = _words.columns(np.flatnonzero(varying), names)
        remedy = "" if array.dtype.itemsize >= 8 else f"; if not, {SINGLE}"
        notes.append(f"{name} varies in {where} by no more than rounding errors; if it is constant, leave it out{remedy}")
    lost = ~noise & _collapsed(array[train.rows[:: -(-train.rows.size // SOME)]], layers, moments, dtype)
    if lost.any():
        where = _words.columns(np.flatnonzero(lost), names)
        notes.append(
            f"some values of {name} in {where} are so far away that the others hardly differ in {dtype}; "
            "drop those rows if they stand for missing values"
        )
    rows = array[train.rows[:: -(-train.rows.size // MANY)]].astype(np.float64)
    marked = ~noise & ~lost & _marked(rows)
    if marked.any():
        where = _words.columns(np.flatnonzero(marked), names)
        notes.append(f"rows of {name} share one value in {where} that is far from all others; drop them if it stands for a missing one")
    strays = ~noise & ~lost & ~marked & _strays(rows, moments, layers)
    if strays.any():
        where = _words.columns(np.flatnonzero(strays), names)
        notes.append(
            f"a few values of {name} in {where} are so far from all others that they make the standard deviation: drop them if they are "
            "faults, or take logarithms"
        )
    return notes


def _strays(rows: NDArray[np.float64], moments: Moments, layers: Layers) -> Array:
    """Columns with one value many ranges away from all others, or of which few values make the deviation; none behind bounds."""
    strays = np.zeros(rows.shape[1], bool)
    if len(rows) < LEAST or (layers and isinstance(layers[0], Elementwise)):
        return strays
    values = np.sort(rows, axis=0)
    cut = len(values) // 20
    with np.errstate(all="ignore"):
        inner = values[-2] - values[1]
        away = np.maximum(values[1] - moments.low, moments.high - values[-2])
        middle = values[-1 - cut] - values[cut]
        return np.asarray(((inner > 0) & (away > ASTRAY * inner)) | ((middle > 0) & (moments.deviation > NINE_TENTHS * middle)))


def _astray(name: str, array: Array, held: Rows, moments: Moments, names: Sequence[str] | None) -> list[str]:
    """About validation rows that are not where the training rows are."""
    width, step = array.shape[1], max(1, BLOCK // array.shape[1])
    least, most = np.full(width, math.inf), np.full(width, -math.inf)
    for first in range(0, held.rows.size, step):
        block = array[held.rows[first : first + step]].astype(np.float64)
        least, most = np.minimum(least, block.min(axis=0)), np.maximum(most, block.max(axis=0))
    with np.errstate(all="ignore"):
        reach = ASTRAY * (moments.high - moments.low)
        wrong = np.flatnonzero((reach > 0) & ((least < moments.low - reach) | (most > moments.high + reach)))
    if not wrong.size:
        return []
    return [
        f"{name} has values in {_words.columns(wrong, names)} more than {ASTRAY} ranges away from all rows to train on, and one such row "
        "can decide when the fit stops: drop those that stand for missing values"
    ]


def _marked(rows: Array) -> Array:
    """Columns whose least or largest value stands in several rows, at least three ranges of all other values away from these."""
    values, marked = rows.astype(np.float64), np.zeros(rows.shape[1], bool)
    with np.errstate(all="ignore"):
        for sign in (1.0, -1.0):
            own = sign * values
            least, most = own.min(axis=0), own.max(axis=0)
            second = np.where(own > least, own, math.inf).min(axis=0)
            for j in np.flatnonzero((second - least >= 3 * (most - second)) & (most > second) & ((own == least).sum(axis=0) > 1)):
                marked[j] |= np.unique(own[:, j]).size > 10  # else the column has a few values by nature
    return marked


def _collapsed(rows: Array, layers: Layers, moments: Moments, dtype: np.dtype[Any]) -> Array:
    """Columns in which half of the distinct values lie, in units of the deviation, hardly further apart than the dtype resolves."""
    values = np.sort(_unbounded(rows.astype(np.float64), layers), axis=0)
    lost = np.zeros(moments.mean.size, bool)
    with np.errstate(all="ignore"):
        place = np.abs(values[[0, -1]] - moments.mean).max(axis=0) / moments.deviation
        steps, most = np.diff(values, axis=0), 100 * _spacing(np.maximum(place, 1e-3), dtype) * moments.deviation
        many = (steps > 0).sum(axis=0)
        suspect = (many > 0) & (2 * ((steps > 0) & (steps < most)).sum(axis=0) >= many)
        for j in np.flatnonzero(suspect & (moments.deviation > 0)):
            distinct = np.unique(values[:, j])
            half = distinct.size // 2  # steps between the ends of the narrowest interval that holds more than half of them
            widths = distinct[half:] - distinct[: distinct.size - half]
            first = int(widths.argmin())
            near = np.abs(distinct[first] - moments.mean[j]) / moments.deviation[j]
            lost[j] = widths[first] / moments.deviation[j] < 100 * _spacing(np.maximum(near, 1e-3), dtype)
    return lost


def _out_of_reach(record: FlowRecord, layers: Layers, moments: Moments) -> list[str]:
    """Whether the first network reads much of the data at its clip only."""
    nets = [made.conditioner for made in (*layers, record.base) if isinstance(made, (Autoregressive, Terminal))]
    if not nets or nets[0].input_clip is None:
        return []
    away, width = _behind_the_front(layers, moments)
    values, clip = np.array(record.values), nets[0].input_clip
    wrong = np.flatnonzero(np.where(values > 0, values - 1 > clip, ~(away + width < clip)))
    if not wrong.size:
        return []
    where = _words.columns(wrong, record.names)
    return [
        f"many values in {where} of x lie beyond input_clip, {clip:g}, where networks do not tell them apart: standardize x, or "
        "build the flow with input_clip=None"
    ]


def _behind_the_front(layers: Layers, moments: Moments) -> tuple[Array, Array]:
    """Distance of the mean from 0 and standard deviation of each column, behind the bounds and the Affine in front."""
    k = int(bool(layers) and isinstance(layers[0], Elementwise))
    affine = layers[k] if len(layers) > k and isinstance(layers[k], Affine) else None
    loc, scale = (0.0, 1.0) if affine is None else (affine.loc, np.abs(affine.scale))
    with np.errstate(all="ignore"):
        return np.abs(moments.mean - loc) * scale, moments.deviation * scale


def _far_out(name: str, layers: Layers, moments: Moments, names: Sequence[str] | None) -> list[str]:
    """Whether the data, behind the Affine that the flow has and keeps, are anything but standard."""
    away, width = _behind_the_front(layers, moments)
    wrong = np.flatnonzero(~((away < 3 * np.maximum(1, width)) & (width < 3) & (width > 0.2)))
    if not wrong.size:
        return []
    where = _words.columns(wrong, names)
    return [
        f"{name} is not standard in {where} behind the standardisation that the flow has, which is kept: make a new flow for other data, "
        'or pass standardize="again"'
    ]
