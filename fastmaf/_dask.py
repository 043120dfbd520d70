"""Arrays of dask: what a flow does to their rows, block by block, once it is asked for.

Nothing here imports dask; whoever hands over its arrays has done so.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from fastmaf import _arrays

__all__ = ["among", "mapped", "shared", "stand_in"]


def among(*values: Any) -> bool:
    """Whether one of these is an array of dask."""
    kind = getattr(sys.modules.get("dask.array"), "Array", None)
    return kind is not None and any(isinstance(value, kind) for value in values)


def shared(flow: Any) -> Any:
    """A flow or ensemble as one object of the graph, named by what it holds: each worker gets it once, whatever the number of blocks."""
    import dask

    return dask.delayed(flow, name=f"{type(flow).__name__}-{dask.base.tokenize(flow)}", traverse=False)


def mapped(flow: Any, operation: str, name: str, x: Any, context: Any, of: np.dtype[Any], columns: int, **options: Any) -> Any:
    """What an operation gives for rows and contexts of which one at least is an array of dask.

    Parameters
    ----------
    flow : Flow or Ensemble
        That nobody changes.
    operation : str
        The name of its method.
    name : str
        What the caller knows `x` as.
    x, context : arrays
        As in `Flow.log_prob`.
    of : numpy.dtype
        That of the result.
    columns : int
        D if the result has rows (..., D), 0 if it has one number for each.
    options
        Further arguments of the method; with ``log_det=True`` it gives two arrays.

    Returns
    -------
    dask.array.Array, or a pair of them

    Raises
    ------
    ValueError
        If shapes, or the dtypes that are known, do not fit; if blocks of unknown length meet contexts.
    """
    import dask
    import dask.array as da
    from dask.utils import parse_bytes

    x = x if among(x) else _arrays.real(name, x, names=flow.names)
    context = context if context is None or among(context) else _arrays.real("context", context)
    own = None if context is None else stand_in(context)
    _, normal, shape = _arrays.rows(name, stand_in(x), own, flow.features, flow.context_features)
    if context is not None and normal is not None and normal.ndim > context.ndim:
        context = context[:, None]
    for label, array in ((name, x), ("context", context)):
        if context is not None and context.ndim > 1 and not _known(array):
            raise ValueError(
                f"{label} has blocks of unknown length, to be laid beside others: {label} = {label}.compute_chunk_sizes() first"
            )
    pair = bool(options.get("log_det"))
    width = columns + pair
    room = parse_bytes(dask.config.get("array.chunk-size")) // (of.itemsize * max(1, width))
    arguments: list[Any] = []
    for array, beside, last in ((x, context, "d"), (context, x, "k")):
        if array is not None:
            arguments += [_in_blocks(array, beside, room), _axes(array) + last]
    axes = "cn"[2 - len(shape) :] + "o" * bool(width)
    result = da.blockwise(
        _block,
        axes,
        shared(flow),
        None,
        *arguments,
        new_axes={"o": width} if width else {},
        operation=operation,
        options=options,
        token=f"fastmaf-{operation}",
        dtype=of,
        meta=np.empty((0,) * len(axes), of),
    )
    return (result[..., :columns], result[..., columns].astype(flow.dtype)) if pair else result


def _block(flow: Any, x: Any, context: Any = None, *, operation: str, options: dict[str, Any]) -> Any:
    """What the operation gives for a block; of a pair the second stands in a column behind the first."""
    x, context = _only(x), _only(context)
    result = getattr(flow, operation)(x, context, **options)
    return np.concatenate([result[0], result[1][..., None]], axis=-1) if isinstance(result, tuple) else result


def _only(blocks: Any) -> Any:
    """The block that dask hands over in a list, since its last axis, which has but one block, is not one of the result."""
    return blocks[0] if isinstance(blocks, list) else blocks


def stand_in(array: Any) -> Any:
    """An array of the same shape and dtype that takes no memory; of length 1 where the length is not known."""
    return np.broadcast_to(np.zeros((), array.dtype), [1 if math.isnan(size) else int(size) for size in array.shape])


def _known(array: Any) -> bool:
    return not any(map(math.isnan, array.shape))


def _axes(array: Any) -> str:
    """Letters for the axes of rows or contexts, without that of the columns."""
    return "cn"[3 - array.ndim :]


def _in_blocks(array: Any, beside: Any, room: int) -> Any:
    """An array as one of dask, all columns in one block.

    It is cut as the other one is along axes of the same length, and along others so that `room` has the rows of the result of a block.
    """
    if among(array):
        return array.rechunk({array.ndim - 1: -1})
    import dask.array as da

    given = dict(zip(_axes(beside), beside.chunks, strict=False)) if among(beside) else {}
    fits = room // max(1, math.prod(max(sizes) for sizes in given.values()))
    lengths = zip(_axes(array), array.shape, strict=False)
    chunks = [given[axis] if sum(given.get(axis, ())) == size else max(1, min(size, fits)) for axis, size in lengths]
    return da.from_array(array, chunks=(*chunks, -1))
