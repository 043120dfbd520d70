"""Flows and arrays of dask: more rows than a machine holds (``pip install 'fastmaf[dask]'``).

`fastmaf.Flow.log_prob`, `to_noise` and `from_noise` take arrays of dask as they are; what has no array to begin with is here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fastmaf import _arrays, _dask, _words
from fastmaf._arrays import Seed
from fastmaf.ensemble import Ensemble
from fastmaf.flow import Flow

try:
    import dask.array as da
except ImportError:
    raise ImportError("fastmaf.dask needs dask and its arrays, which are not installed: pip install 'fastmaf[dask]'") from None

__all__ = ["sample"]


def sample(
    flow: Flow | Ensemble,
    n: int,
    chunks: Any = "auto",
    seed: Seed = None,
    context: ArrayLike | None = None,
    offset: int = 0,
    context_offset: int = 0,
    dtype: DTypeLike | None = None,
) -> da.Array:
    """Samples as an array of dask: each block draws its own part of one stream, once it is asked for.

    Parameters
    ----------
    flow : Flow or Ensemble
        As it is now; what becomes of it later does not matter.
    n : int
        Rows to draw under each context.
    chunks : int, tuple or "auto"
        The rows of a block, in one of the forms that dask has for the axes (n,), or (c, n) under contexts (c, C). A block has all columns.
    seed, offset, context_offset, dtype
        As in `fastmaf.Flow.sample`. None draws a seed here, so that the array is the same whenever it is computed.
    context : (C,) or (c, C) array, optional
        Of NumPy or dask; as in `fastmaf.Flow.sample`.

    Returns
    -------
    (n, D) array of dask, or (c, n, D) under contexts (c, C)
        For any chunks what one call ``flow.sample(n, context, seed)`` gives, to the bit.

    Raises
    ------
    ValueError
        If an argument does not fit.

    Examples
    --------
    >>> import fastmaf, numpy as np
    >>> flow = fastmaf.MAF(features=3)
    >>> samples = fastmaf.dask.sample(flow, 1000, chunks=300, seed=1)
    >>> samples.chunks
    ((300, 300, 300, 100), (3,))
    >>> np.array_equal(samples.compute(), flow.sample(1000, seed=1))
    True
    """
    if not isinstance(flow, (Flow, Ensemble)):
        raise ValueError(f"flow is {_words.shown(flow)}; it must be a Flow or an Ensemble")
    still = flow._still()
    record = still.record if isinstance(still, Flow) else still.member(0).record
    n, own = _arrays.count("n", n), record.sample_dtype(dtype)
    lazy = _dask.among(context)
    given, c = _arrays.contexts(
        _dask.stand_in(context) if lazy else context, flow.context_features, usual=() if lazy else record.usual_contexts
    )
    seed, offset, context_offset = _arrays.seed_and_offsets(seed, offset, context_offset, n, c)
    grouped = given is not None and given.ndim == 2
    sizes = _sizes(chunks, (c, n) if grouped else (n,), flow.features, own)
    arguments: list[Any] = [_places(sizes[-2]), "ns"]
    if grouped:
        contexts = context.rechunk((sizes[0], -1)) if lazy else da.from_array(given, chunks=(sizes[0], -1))  # type: ignore[union-attr]
        arguments += [_places(sizes[0]), "ct", contexts, "ck"]
    elif given is not None:
        arguments += [context.rechunk(-1) if lazy else da.from_array(given, chunks=-1), "k"]  # type: ignore[union-attr]
    result = da.blockwise(
        _draw,
        "cno" if grouped else "no",
        _dask.shared(still),
        None,
        *arguments,
        new_axes={"o": flow.features},
        adjust_chunks=dict(zip("cn" if grouped else "n", sizes, strict=False)),
        align_arrays=False,
        seed=seed,
        offset=offset,
        context_offset=context_offset,
        grouped=grouped,
        of=own.name,
        token="fastmaf-sample",
        dtype=own,
        meta=np.empty((0,) * len(sizes), own),
    )
    return result


def _sizes(chunks: Any, shape: tuple[int, ...], features: int, dtype: np.dtype[Any]) -> tuple[tuple[int, ...], ...]:
    """Lengths of the blocks along each axis, the one of the columns included."""
    if not isinstance(chunks, (tuple, list)):
        each = (chunks,) * len(shape)
    else:
        each = (tuple(chunks),) if len(shape) == 1 and len(chunks) > 1 else tuple(chunks)
    try:
        sizes: tuple[tuple[int, ...], ...] = da.core.normalize_chunks((*each, features), shape=(*shape, features), dtype=dtype)
    except (TypeError, ValueError, ArithmeticError, NotImplementedError) as error:
        words = f"chunks is {_words.shown(chunks)}, which does not fit the axes {_words.shapes(shape)}"
        raise ValueError(f"{words}: {_words.cut(str(error), 80)}") from None
    return sizes


def _places(sizes: tuple[int, ...]) -> da.Array:
    """For each block of an axis, where it begins and how long it is."""
    lengths = np.array(sizes, np.int64)
    return da.from_array(np.column_stack([np.cumsum(lengths) - lengths, lengths]), chunks=(1, 2))


def _draw(flow: Any, rows: Any, *contexts: Any, seed: int, offset: int, context_offset: int, grouped: bool, of: str) -> Any:
    """The samples of a block; of arrays whose last axis is none of the result, dask gives lists of one."""
    first, n = (int(number) for number in rows[0][0])
    if grouped:
        context_offset += int(contexts[0][0][0, 0])
    context = contexts[-1] if contexts else None
    while isinstance(context, list):
        context = context[0]
    return flow.sample(n, context, seed, offset + first, context_offset, dtype=of)
