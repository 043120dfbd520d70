"""Gradients where rows or contexts are shared: computed block by block and summed in double, so that they take little memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmaf.backends import Backend
from fastmaf.record import FlowRecord

__all__ = ["backward"]

Array = NDArray[Any]

BUDGET = 8 << 20
"""Bytes of a block that are summed away."""


class _Gradient:
    """That of an array which was repeated to (c, n, width).

    Blocks come with n cut outside and c inside; those of the whole of n are contiguous in (c, n, width), and the others have c = 1.
    """

    def __init__(self, shape: tuple[int, ...], c: int, n: int, dtype: np.dtype[Any], out: Array | None) -> None:
        self.result = np.zeros(shape, dtype) if out is None else out
        if not c * n:
            self.result[:] = 0
        own: tuple[int, ...] = (1,) * (3 - len(shape)) + shape
        self.own = self.result.reshape(own)
        self.axes = tuple(axis for axis, size in enumerate((c, n)) if own[axis] != size)
        self.kept = own[2] if self.axes else 0  # numbers of a row that are summed away
        self.sums: Array | None = None

    def part(self, groups: slice, rows: slice) -> Array:
        """What a backend is to fill: the result itself, or room for numbers that are then added up."""
        if not self.axes:
            return self.own[groups, rows]
        shape: tuple[int, ...] = (groups.stop - groups.start, rows.stop - rows.start, self.kept)
        return np.empty(shape, self.result.dtype)

    def add(self, part: Array, groups: slice, rows: slice, whole: bool) -> None:
        """Sum a block, of the whole of n or of a part."""
        if not self.axes:
            return
        total = part.sum(axis=self.axes, dtype=np.float64, keepdims=True)
        if 0 not in self.axes and whole:
            self.own[groups] = total
            return
        if self.sums is None:
            self.sums = np.zeros((len(self.own), *total.shape[1:]))
        self.sums[groups if 0 not in self.axes else slice(None)] += total

    def close(self, rows: slice, last: bool) -> None:
        """Behind all c of some rows."""
        if self.sums is not None and (1 not in self.axes or last):
            self.own[:, rows if 1 not in self.axes else slice(None)] = self.sums
            self.sums = None


def _blocks(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _at_once(
    backend: Backend,
    flow: FlowRecord,
    x: Array,
    context: Array | None,
    shape: tuple[int, ...],
    cotangent: Array | None,
    dparameters: Array | None,
    dx: Array | bool,
    dcontext: Array | bool,
) -> tuple[Array, Array | None, Array | None]:
    """`backward` of one block in which nothing is shared. For a row alone, the time of anything more would be felt."""
    dtype = flow.dtype
    value = np.empty(shape, dtype)
    if cotangent is None:
        factor = np.empty(shape, dtype)
        factor.fill(1)
    else:
        factor = np.ascontiguousarray(cotangent, dtype)
    of_x = None if dx is False or flow.discrete else np.empty(x.shape, dtype) if dx is True else dx
    of_context = part = None
    if context is not None and dcontext is not False:
        of_context = np.empty(context.shape, dtype) if dcontext is True else dcontext
        part = of_context.reshape((*shape, -1))
    backend.vjp(flow, x, context, factor, value, of_x, part, dparameters)
    return value, of_x, of_context


def backward(
    backend: Backend,
    flow: FlowRecord,
    x: Array,
    context: Array | None,
    shape: tuple[int, ...],
    cotangent: Array | None,
    dparameters: Array | None,
    dx: Array | bool = True,
    dcontext: Array | bool = True,
) -> tuple[Array, Array | None, Array | None]:
    """Log-density, and the gradients of its sum with the cotangents.

    Parameters
    ----------
    backend : Backend
    flow : FlowRecord
    x, context : arrays or None
        Validated; they broadcast to (*shape, D) and (*shape, C).
    shape : (n,) or (c, n)
    cotangent : array of that shape, or None for ones
    dparameters : (p,) array or None
        Filled.
    dx, dcontext : arrays of the shapes of x and of the context, or bool
        Filled; True for new ones, False for none.

    Returns
    -------
    value : array of that shape
    dx, dcontext : arrays of the shapes of x and of the context
        None where variables are discrete, without a context, and where they are not wanted.
    """
    dtype, count = flow.dtype, math.prod(shape)
    if x.shape[:-1] == shape and 0 < count * dtype.itemsize <= BUDGET and (context is None or context.size == count * context.shape[-1]):
        return _at_once(backend, flow, x, context, shape, cotangent, dparameters, dx, dcontext)
    c, n = (1, *shape)[-2:]
    flat = len(shape) == 1
    value = np.empty((c, n), dtype)

    def gradient_of(array: Array | None, out: Array | bool) -> _Gradient | None:
        return None if array is None or out is False else _Gradient(array.shape, c, n, dtype, None if out is True else out)

    of_x, of_context = gradient_of(None if flow.discrete else x, dx), gradient_of(context, dcontext)
    gradients = [gradient for gradient in (of_x, of_context) if gradient is not None]
    copied = cotangent is None or cotangent.dtype != dtype or not cotangent.flags.c_contiguous
    per_row = sum(gradient.kept for gradient in gradients) + copied
    most = max(1, BUDGET // (per_row * dtype.itemsize)) if per_row else max(1, c * n)
    ones = np.ones(min(most, c * n) if cotangent is None else 0, dtype)
    whole = n <= most
    total = None if dparameters is None or c * n <= most else np.zeros(dparameters.shape)

    def taken(array: Array, groups: slice, rows: slice) -> Array:
        """The part of an array that belongs to a block; of the whole of one without a third axis, as it is."""
        own = array.reshape((1,) * (3 - array.ndim) + array.shape) if array.ndim < 3 else array
        own = own[groups if own.shape[0] == c else slice(None), rows if own.shape[1] == n else slice(None)]
        return own[0] if flat else own

    for rows in _blocks(n, n if whole else most) if n else ():
        for groups in _blocks(c, max(1, most // n) if whole else 1):
            size = (groups.stop - groups.start, rows.stop - rows.start)
            if cotangent is None:
                factor = ones[: size[0] * size[1]].reshape(size)
            else:
                factor = np.ascontiguousarray(cotangent.reshape(c, n)[groups, rows], dtype)
            parts = [gradient.part(groups, rows) for gradient in gradients]
            outs = [part[0] if flat else part for part in parts]
            own_x = taken(x, groups, rows)
            backend.vjp(
                flow,
                np.broadcast_to(own_x, (*(size[1:] if flat else size), x.shape[-1])),
                context if context is None or context.ndim == 1 else taken(context, groups, rows),
                factor[0] if flat else factor,
                value[0, rows] if flat else value[groups, rows],
                outs[0] if of_x is not None else None,
                outs[-1] if of_context is not None else None,
                dparameters,
            )
            del outs
            for gradient in gradients:  # each part goes before the next block gets room
                gradient.add(parts.pop(0), groups, rows, whole)
            if total is not None and dparameters is not None:
                total += dparameters
        for gradient in gradients:
            gradient.close(rows, rows.stop == n)
    if total is not None and dparameters is not None:
        dparameters[:] = total
    return value.reshape(shape), None if of_x is None else of_x.result, None if of_context is None else of_context.result
