"""Tables into files, chunk by chunk: .npy, CSV and Parquet."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastmaf import _files, _words

__all__ = ["FORMATS", "Sink", "format_of", "open_sink"]

Array = NDArray[Any]

FORMATS = ("csv", "npy", "parquet")

ROOM = 128
"""Bytes of the head of an .npy."""


class Sink(Protocol):
    """What takes chunks of rows."""

    def write(self, chunk: Array) -> None:
        """Append rows (n, k)."""


def format_of(path: str) -> str:
    """The format that the end of a name stands for.

    Raises
    ------
    ValueError
        If it stands for none.

    Examples
    --------
    >>> format_of("x.npy")
    'npy'
    """
    ending = os.path.splitext(path)[1].lower().removeprefix(".")
    if ending in FORMATS:
        return ending
    raise ValueError(f"{_words.cut(path, 100)} ends in none of .{', .'.join(FORMATS)}; name a format")


@contextmanager
def open_sink(
    target: str | os.PathLike[str] | IO[bytes],
    columns: Sequence[str],
    dtype: np.dtype[Any],
    rows: int | None = None,
    format: str | None = None,
) -> Iterator[Sink]:
    r"""A file of rows, which has its name when all of them are in it.

    Parameters
    ----------
    target : path or binary file
    columns : sequence of str
        Their names, for CSV and Parquet.
    dtype : numpy.dtype
        float32 or float64.
    rows : int, optional
        How many there will be, if that is known; an .npy into a pipe goes through a temporary file otherwise.
    format : {"csv", "npy", "parquet"}, optional
        By the end of the path if None.

    Raises
    ------
    ValueError
        If there is no such format.
    OSError
        If it cannot be written.
    ImportError
        If it needs pyarrow, which is not there.

    Examples
    --------
    >>> import io
    >>> file = io.BytesIO()
    >>> with open_sink(file, ["z", "r"], np.dtype(float), format="csv") as sink:
    ...     sink.write(np.array([[0.5, 1.0]]))
    >>> file.getvalue()
    b'z,r\n0.5,1.0\n'
    """
    if format is None:
        format = format_of(os.fsdecode(target)) if isinstance(target, (str, os.PathLike)) else "csv"
    if format not in FORMATS:
        raise ValueError(_words.one_of("format", format, FORMATS))
    kind = {"csv": _csv, "npy": _npy, "parquet": _parquet}[format]
    if isinstance(target, (str, os.PathLike)):
        with _files.writing(target) as file, kind(file, columns, dtype, rows) as sink:
            yield sink
    else:
        with kind(target, columns, dtype, rows) as sink:
            yield sink
        target.flush()


class _Csv:
    def __init__(self, file: IO[bytes], head: str, dtype: np.dtype[Any]) -> None:
        self._file, self._head, self._single = file, head, dtype == np.float32

    def begin(self) -> None:
        """Write the names, which wait for the first rows: what fails before these leaves nothing."""
        if self._head:
            self._file.write(self._head.encode())
            self._head = ""

    def write(self, chunk: Array) -> None:
        self.begin()
        width = chunk.shape[1]
        step = max(1, (1 << 16) // width)
        for first in range(0, len(chunk), step):
            values = chunk[first : first + step]
            if self._single:  # nine digits are a float32 again
                line = ",".join(["%.9g"] * width) + "\n"
                text = (line * len(values)) % tuple(values.ravel().tolist())
            else:
                text = "".join([",".join(map(repr, row)) + "\n" for row in values.tolist()])
            self._file.write(text.encode())


@contextmanager
def _csv(file: IO[bytes], columns: Sequence[str], dtype: np.dtype[Any], rows: int | None) -> Iterator[Sink]:
    def quoted(label: str) -> str:
        return '"' + label.replace('"', '""') + '"' if any(mark in label for mark in ',"\n\r;\t') else label

    sink = _Csv(file, ",".join(map(quoted, columns)) + "\n", dtype)
    yield sink
    sink.begin()


class _Npy:
    def __init__(self, file: IO[bytes], columns: Sequence[str], dtype: np.dtype[Any]) -> None:
        self._file, self._width, self._dtype, self.rows = file, len(columns), dtype.newbyteorder("<"), 0

    def head(self, rows: int) -> bytes:
        """The head of an array of so many rows; always of the same length."""
        shape = (rows,) if self._width == 1 else (rows, self._width)
        text = str({"descr": self._dtype.str, "fortran_order": False, "shape": shape})
        return b"\x93NUMPY\1\0" + (ROOM - 10).to_bytes(2, "little") + text.ljust(ROOM - 11).encode() + b"\n"

    def write(self, chunk: Array) -> None:
        self._file.write(np.ascontiguousarray(chunk, self._dtype).data)
        self.rows += len(chunk)


@contextmanager
def _npy(file: IO[bytes], columns: Sequence[str], dtype: np.dtype[Any], rows: int | None) -> Iterator[Sink]:
    patched = rows is None and file.seekable()
    if rows is None and not patched:
        with tempfile.TemporaryFile() as whole:
            with _npy(whole, columns, dtype, None) as sink:
                yield sink
            whole.seek(0)
            shutil.copyfileobj(whole, file, 1 << 20)
        return
    start = file.tell() if patched else 0
    sink = _Npy(file, columns, dtype)
    file.write(sink.head(rows or 0))
    yield sink
    if patched:
        file.seek(start)
        file.write(sink.head(sink.rows))
        file.seek(0, os.SEEK_END)


class _Parquet:
    def __init__(self, writer: Any, schema: Any) -> None:
        self._writer, self._schema = writer, schema

    def write(self, chunk: Array) -> None:
        import pyarrow as pa

        arrays = [pa.array(np.ascontiguousarray(chunk[:, j])) for j in range(chunk.shape[1])]
        self._writer.write_table(pa.table(arrays, schema=self._schema))


@contextmanager
def _parquet(file: IO[bytes], columns: Sequence[str], dtype: np.dtype[Any], rows: int | None) -> Iterator[Sink]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise ImportError("Parquet files need pyarrow: pip install 'fastmaf[tables]'") from None
    schema = pa.schema([(column, pa.from_numpy_dtype(dtype)) for column in columns])
    with parquet.ParquetWriter(file, schema) as writer:
        yield _Parquet(writer, schema)
