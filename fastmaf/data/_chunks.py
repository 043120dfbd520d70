"""Rows that come in chunks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmaf import _arrays, _words
from fastmaf.data import _sink

__all__ = ["collect"]

CHUNK = 1 << 22
"""Numbers read at a time from what is cut by slices."""


def collect(chunks: Any, file: str | os.PathLike[str] | None = None) -> NDArray[Any]:
    """Rows that come in chunks, as one array that lies in a file: to fit more rows than the memory holds.

    Chunks are written as they come, and no more than two of them are in memory at a time. `Flow.fit` reads the result where it lies; so
    do `log_prob` and all else, in blocks.

    Parameters
    ----------
    chunks : iterable of (k, D) arrays or data frames, or something of shape (n, D) that is cut by slices
        A generator of simulations, for instance, or a dataset of h5py or zarr, or an array of dask.
    file : path, optional
        A .npy file to be written, replaced if it exists; if None a temporary one (in the folder that ``TMPDIR`` names), which is gone when
        the array is.

    Returns
    -------
    (n, D) array
        Read-only, in the dtype of the first chunk: float32 or float64, and float64 for all others.

    Raises
    ------
    ValueError
        If there are no rows; if a chunk has another number of columns than the first, or a dtype that the first one's does not hold.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> x = collect(rng.normal(size=(1000, 3)) for _ in range(5))
    >>> x.shape, x.dtype.name
    ((5000, 3), 'float64')
    """
    parts = _judged(_cut(chunks))
    part = next(parts, None)
    if part is None:
        raise ValueError("chunks has no rows")
    width, dtype, rows = part.shape[1], part.dtype, 0
    with tempfile.TemporaryFile() if file is None else nullcontext(file) as target:
        place: Any = target
        with _sink.open_sink(place, [str(j) for j in range(width)], dtype, format="npy") as sink:
            while part is not None:
                sink.write(part)
                rows += len(part)
                part = next(parts, None)
        return np.memmap(place, dtype, "r", _sink.ROOM, (rows, width))


def _cut(chunks: Any) -> Iterable[Any]:
    """What is iterated over, or cut by slices."""
    shape = getattr(chunks, "shape", None)
    if not isinstance(shape, tuple) or len(shape) != 2 or not hasattr(chunks, "__getitem__"):
        if not isinstance(chunks, Iterable) or isinstance(chunks, (str, bytes, dict)):
            must = "it must give arrays of rows, or have a shape (n, D) and be cut by slices"
            raise ValueError(f"chunks is {_words.shown(chunks)}; {must}")
        return chunks
    step = max(1, CHUNK // max(1, shape[1]))
    return (chunks[begin : begin + step] for begin in range(0, shape[0], step))


def _judged(chunks: Iterable[Any]) -> Iterator[NDArray[Any]]:
    """Chunks with rows, of as many columns and the dtype of the first."""
    width, dtype = None, np.dtype(np.float64)
    for k, chunk in enumerate(chunks):
        part = _arrays.real(f"chunk {k}", chunk)
        if part.ndim != 2 or part.shape[1] < 1 or width not in (None, part.shape[1]):
            raise ValueError(f"chunk {k} has shape {_words.shapes(part.shape)}; it must be (k, {'D' if width is None else width})")
        if width is None:
            width, dtype = part.shape[1], part.dtype if part.dtype == np.float32 else dtype
        if not np.can_cast(part.dtype, dtype, "same_kind" if part.dtype.kind != "f" else "safe"):
            raise ValueError(f"chunk {k} is {part.dtype}, and the first one {dtype}, which does not hold it; give all in one dtype")
        if len(part):
            yield part.astype(dtype, copy=False)
