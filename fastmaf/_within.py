"""Samples within bounds: rejection on the counted stream, for each context as far as it needs.

Row k of a context is the k-th number of its stream that lies inside, so that nothing depends on how many are drawn at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmaf import _arrays, _device, _words
from fastmaf.layers import Elementwise
from fastmaf.record import FlowRecord

__all__ = ["Bounds", "Draw", "Within", "acceptance", "sample"]

Array = NDArray[Any]
Within = Sequence[Any] | Mapping[str, Any]

Draw = Callable[[Array, Array], Array]
"""Rows (k, D) of the samples `index` under the contexts `group`, (k,) int64 both, the groups in order."""

Drawing = Callable[[Array | None, int, int, np.dtype[Any]], Draw]
"""Makes that of contexts, None, (C,) or (c, C), a seed, a context_offset and a dtype."""

PIECE = 1 << 19
"""Numbers that are drawn together."""

PRIOR = 4
"""Rows that the acceptance of all contexts counts for in the guess of that of one."""

FEW = 100
"""Rows wanted at least, where tries are counted: of fewer nothing is told."""


class Bounds:
    """Lower and upper bounds of some columns, in a dtype.

    Parameters
    ----------
    within : sequence or mapping
        As the bounds of `fastmaf.MAF`.
    features : int
    names : sequence of str or None
    dtype : numpy.dtype
        Of the rows; bounds that it does not have move inwards.
    values : sequence of int
        How many values each column has, 0 for any number. Bounds of one that has some hold these, and may be equal.

    Raises
    ------
    ValueError
        If there is not one entry for each column, or a pair of numbers is not in order.

    Examples
    --------
    >>> bounds = Bounds([None, (0, 1)], 2, None, np.dtype("float64"))
    >>> bounds.hold(np.array([[9, 0.5], [0, 2], [0, np.nan]])).tolist()
    [True, False, False]
    """

    def __init__(self, within: Any, features: int, names: Sequence[str] | None, dtype: np.dtype[Any], values: Sequence[int] = ()) -> None:
        entries = _arrays.by_column("within", within, features, names)
        for j, count in enumerate(values):
            if count:
                entries[j] = _around(entries[j])
        parsed = Elementwise.from_bounds(entries, names, "within")
        with np.errstate(over="ignore"):
            low, high = parsed.lower.astype(dtype), parsed.upper.astype(dtype)
        low = np.where(low.astype(np.float64) < parsed.lower, np.nextafter(low, low.dtype.type(np.inf)), low)
        high = np.where(high.astype(np.float64) > parsed.upper, np.nextafter(high, high.dtype.type(-np.inf)), high)
        self._columns = [(j, low[j], high[j]) for j in range(features)]

    def hold(self, rows: Array) -> Array:
        """Which rows (k, D) lie inside or on the bounds; none that has a NaN."""
        inside = np.ones(len(rows), bool)
        for j, low, high in self._columns:
            column = rows[:, j]
            inside &= (column >= low) & (column <= high)
        return inside


def _around(entry: Any) -> Any:
    """Bounds of a variable with whole numbers, a quarter of its step wider; what are none, as it is."""
    try:
        low, high = entry
        if low is not None and high is not None and low > high:
            return entry
        return None if low is None else low - 0.25, None if high is None else high + 0.25
    except (TypeError, ValueError):
        return entry


def _piece(features: int) -> int:
    """Rows that are drawn together; `features` counts the columns of the context too."""
    return max(1024, PIECE // features)


def _fill(draw: Draw, out: Array, bounds: Bounds, max_tries: int, width: int, grouped: bool) -> None:
    """Fill `out` (c, n, D) with the first n rows inside of each of c contexts, `width` numbers in a row with its context.

    Raises
    ------
    ValueError
        If too few of the rows of a context lie inside.
    """
    c, n, features = out.shape
    flat, size = out.reshape(c * n, features), _piece(width)
    found, drawn = np.zeros(c, np.int64), np.zeros(c, np.int64)
    limits = min(max_tries * FEW, 2**62), min(max_tries * max(n, FEW), 2**62)  # of those that have found nothing yet, and of others
    waiting = np.arange(c if n else 0)
    while waiting.size:
        group = waiting[:size]
        lacking = n - found[group]
        # What is lacking and a standard deviation of it, by what is known of this context and a little of what is of all; but not so many
        # that a guess would cost much.
        share = (found[group] + PRIOR * max(found.sum(), 1) / max(drawn.sum(), 1)) / (drawn[group] + PRIOR)
        wanted = np.rint(np.minimum((lacking + np.sqrt(lacking) - 1) / share, 4 * drawn[group] + n)).astype(np.int64)
        wanted = np.minimum(wanted, np.where(found[group] > 0, limits[1], limits[0]) - drawn[group])
        count = max(1, int(np.searchsorted(np.cumsum(wanted), size, "right")))
        group, lacking, wanted = group[:count], lacking[:count], np.minimum(wanted[:count], size)
        begin = np.cumsum(wanted) - wanted
        index = np.arange(wanted.sum()) + np.repeat(drawn[group] - begin, wanted)
        rows = draw(index, np.repeat(group, wanted))
        inside = bounds.hold(rows)
        good = np.flatnonzero(inside)
        got = np.add.reduceat(inside, begin, dtype=np.int64)
        number = np.arange(good.size) - np.repeat(np.cumsum(got) - got, got)  # of a row among those of its context
        kept = number < np.repeat(lacking, got)
        flat[(np.repeat(group * n + found[group], got) + number)[kept]] = rows[good[kept]]
        found[group] += got
        drawn[group] += wanted
        open_ = group[found[group] < n]
        lost = open_[drawn[open_] >= np.where(found[open_] > 0, limits[1], limits[0])]
        if lost.size:
            k = int(lost[0])
            where = f" under context {k}" if grouped else ""
            if np.isnan(draw(np.zeros(1, np.int64), lost[:1])).any():
                raise ValueError(f"there are no samples{where}, which the flow cannot follow: they are NaN")
            raise ValueError(
                f"within holds {found[k]} of {drawn[k]} samples{where}, an acceptance of {found[k] / drawn[k]:.2g}, and {n} are wanted; "
                "widen it, or raise max_tries"
            )
        waiting = np.concatenate([open_, waiting[count:]])


def sample(
    record: FlowRecord,
    drawing: Drawing,
    n: int,
    context: Any,
    seed: _arrays.Seed,
    offset: int,
    context_offset: int,
    out: Any,
    dtype: Any,
    within: Within,
    max_tries: int,
    device: str = "cpu",
) -> Array:
    """`Flow.sample` within bounds."""
    n, given = _words.count("n", n), context
    context, c = _contexts(record, context, device)
    seed, offset, context_offset = _arrays.seed_and_offsets(seed, offset, context_offset, n, c)
    if offset:
        raise ValueError("offset counts what is drawn, of which within keeps a part: leave it out, or drop the first of more rows")
    grouped = context is not None and context.ndim == 2
    shape, dtype = (*((c,) if grouped else ()), n, record.features), record.sample_dtype(dtype, out)
    bounds = Bounds(within, record.features, record.names, dtype, record.values)
    samples = _arrays.empty(shape, dtype) if out is None else _arrays.output(out, shape, dtype, context)
    width = record.features + record.context_features
    _fill(drawing(context, seed, context_offset, dtype), samples.reshape(c, n, record.features), bounds, max_tries, width, grouped)
    return out if out is not None else samples if given is None else _device.native(samples, given)


def acceptance(
    record: FlowRecord,
    drawing: Drawing,
    within: Within,
    context: Any,
    n: int,
    seed: _arrays.Seed,
    context_offset: int,
    device: str = "cpu",
) -> Any:
    """`Flow.acceptance`."""
    n = _words.count("n", n, 1)
    context, c = _contexts(record, context, device)
    seed, _, context_offset = _arrays.seed_and_offsets(seed, 0, context_offset, n, c)
    bounds = Bounds(within, record.features, record.names, record.dtype, record.values)
    draw, size = drawing(context, seed, context_offset, record.dtype), _piece(record.features + record.context_features)
    found = np.zeros(c, np.int64)
    for start in range(0, c * n, size):
        group, index = np.divmod(np.arange(start, min(start + size, c * n)), n)
        found += np.bincount(group[bounds.hold(draw(index, group))], minlength=c)
    return found / n if context is not None and context.ndim == 2 else float(found[0] / n)


def _contexts(record: FlowRecord, context: Any, device: str) -> tuple[Array | None, int]:
    """Contexts to sample under, of the host."""
    array, c = _arrays.contexts(context, record.context_features, device, record.usual_contexts)
    if isinstance(array, _device.DeviceArray):
        raise ValueError("context is on a GPU, and within counts rows on the host: copy the context there, where the samples come too")
    return array, c
