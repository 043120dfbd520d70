"""Tables in files, read column by name and chunk by chunk, so that their size does not matter."""

from __future__ import annotations

import ast
import bz2
import difflib
import gzip
import io
import lzma
import math
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from fastmaf import _words
from fastmaf.data import _text

__all__ = ["CHUNK", "Complete", "Table", "open_table", "whole"]

Array = NDArray[Any]
Path = str | os.PathLike[str]

CHUNK = 1 << 20
"""Numbers in a chunk."""

HEAD = 1 << 20
"""Bytes in which the layout of a file of text is looked for."""

FORMATS = ("csv", "npy", "npz", "parquet")

_OPENERS: dict[bytes, Callable[[IO[bytes]], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
"""What a compressed file begins with, and what reads it."""


class Table:
    """Columns of numbers in a file, read in chunks.

    A context manager, which closes the file.  Comes from `open_table`.

    Attributes
    ----------
    name : str
        Of the file, for messages.
    labels : tuple of str
        One for each column; where `named` is False their numbers, counted from 0.
    named : bool
        Whether the file names its columns.
    rows : int or None
        Number of rows, where the file says so.
    usual : tuple of str
        The columns that are taken where none are named: all but indices, and but what a chain derives.
    weights : str or None
        The column that has the weights of the rows, where the format says so.
    groups : dict of str to tuple of str
        Labels that stand for several columns: the arrays (n, k) of an .npz.
    """

    rows: int | None = None
    weights: str | None = None
    named = True

    def __init__(self, name: str, labels: Iterable[str], usual: Iterable[str] | None = None) -> None:
        self.name, self.labels = name, tuple(labels)
        self.usual = self.labels if usual is None else tuple(usual)
        self.groups: dict[str, tuple[str, ...]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def choose(self, wanted: Iterable[str]) -> tuple[str, ...]:
        """The labels that are meant: themselves, numbers of columns in a file without names, or groups.

        Raises
        ------
        ValueError
            If one is missing, or there or wanted twice.
        """
        wanted = list(wanted)
        result = [label for each in wanted for label in (self.groups.get(each, (each,)) if each not in self.labels else (each,))]
        missing = [label for label in result if label not in self.labels]
        if missing:
            near = [label for label in self.labels if label.casefold() == missing[0].casefold()]
            near = near or difflib.get_close_matches(missing[0], self.labels, 1)
            what = "it has " + _words.named([_words.shown(label) for label in self.labels])
            if not self.named:
                what = f"it has {len(self.labels)} without names: give their numbers, from 0"
            elif near:
                what = f"did you mean {_words.shown(near[0])}?"
            raise ValueError(f"{self.name} lacks {_words.named([_words.shown(label) for label in missing])}; {what}")
        for label in result:
            if self.labels.count(label) > 1:
                raise ValueError(f"{self.name} has several columns {_words.shown(label)}; rename them")
            if result.count(label) > 1:
                raise ValueError(f"column {_words.shown(label)} is named twice")
        return tuple(result)

    def chunks(self, columns: Sequence[str] | None = None, numbers: int = CHUNK) -> Iterator[Array]:
        """The columns of these labels, `usual` if None, as arrays (n, k) of some rows each; can be read once."""
        columns = self.choose(self.usual if columns is None else columns)
        yield from self._chunks(columns, max(1, numbers // max(1, len(columns))))

    def _chunks(self, columns: Sequence[str], size: int) -> Iterator[Array]:
        raise NotImplementedError

    def view(self, columns: Sequence[str]) -> Array | None:
        """The columns as an array (n, k) that lies in the file and is read when it is used, where that can be."""
        return None


class Complete:
    """Chunks without the rows that have a NaN in them.

    Parameters
    ----------
    chunks : iterable of (n, k) arrays
    name : str
        Of their file.
    columns : sequence of str
    missing : {"refuse", "drop", "keep"}
        With "refuse" nothing follows the first such row, and there is an error at the end, which counts them.
    remedy : str
        What leaves them out, for the message.

    Attributes
    ----------
    rows, missing : int
        Rows so far, and those among them that have a NaN.
    """

    def __init__(
        self, chunks: Iterable[Array], name: str, columns: Sequence[str], missing: str = "refuse", remedy: str = 'missing="drop"'
    ) -> None:
        self._chunks, self._name, self._columns, self._policy, self._remedy = chunks, name, columns, missing, remedy
        self.rows = self.missing = 0

    def __iter__(self) -> Iterator[Array]:
        where = np.zeros(len(self._columns), bool)
        for chunk in self._chunks:
            self.rows += len(chunk)
            if self._policy != "keep" and chunk.dtype.kind == "f" and (nan := np.isnan(chunk)).any():
                bad = nan.any(axis=1)
                self.missing += int(np.count_nonzero(bad))
                where |= nan.any(axis=0)
                chunk = chunk[~bad]
            if not (self.missing and self._policy == "refuse"):
                yield chunk
        if self.missing and self._policy == "refuse":
            columns = _words.columns(np.flatnonzero(where), self._columns)
            count = f"{self.missing:,} of {self.rows:,} row{'s' * (self.rows != 1)} ({columns})"
            raise ValueError(f"{self._name} has missing values in {count}; {self._remedy} leaves them out")


def whole(complete: Complete, columns: Sequence[str], rows: int | None = None) -> Array:
    """All chunks in one array (n, k); `rows` is at least n, if it is known."""
    if rows is not None:
        result, end = None, 0
        for chunk in complete:
            if result is None or chunk.dtype != result.dtype:
                result = np.empty((rows, len(columns)), chunk.dtype)
            result[end : end + len(chunk)] = chunk
            end += len(chunk)
        return np.empty((0, len(columns))) if result is None else result[:end]
    parts = list(complete)
    result = np.empty((sum(map(len, parts)), len(columns)), parts[0].dtype if parts else np.float64)
    end = len(result)
    while parts:  # freed one by one
        part = parts.pop()
        result[end - len(part) : end] = part
        end -= len(part)
    return result


def open_table(
    source: Path | IO[bytes],
    *,
    format: str | None = None,
    delimiter: str | None = None,
    header: bool | None = None,
    burn_in: float = 0.0,
) -> Table:
    r"""Open a file of columns.

    Parameters
    ----------
    source : path, binary file, or root of a chain
        .npy (n, k), with or without fields; .npz, of arrays (n,) by name, arrays (n, k), or both; .parquet (needs pyarrow); text: CSV, or
        columns set apart by tabs, semicolons or spaces, also compressed by gzip, bzip2 or xz. What a file is, is seen from its contents.
        Of a chain of GetDist, Cobaya, CosmoMC, MultiNest or PolyChord the part of the names in front of ``.txt``, ``_1.txt`` or ``.1.txt``.
    format : {"csv", "npy", "npz", "parquet"}, optional
        Found out if None.
    delimiter : str, optional
        Of text; found out if None.
    header : bool, optional
        Whether the first line of text has the names; found out if None.
    burn_in : float
        Fraction of the rows to leave out at the beginning of each file of a chain.

    Returns
    -------
    Table

    Raises
    ------
    ValueError
        If the file is none of these, or damaged, or the delimiter is no single character.
    OSError
        If it cannot be read.
    ImportError
        If it needs pyarrow, which is not there.

    Examples
    --------
    >>> import io
    >>> with open_table(io.BytesIO(b"z,r\n1,2\n3,4\n")) as table:
    ...     print(table.labels, [chunk.tolist() for chunk in table.chunks(["r"])])
    ('z', 'r') [[[2.0], [4.0]]]
    """
    if format is not None and format not in FORMATS:
        raise ValueError(_words.one_of("format", format, FORMATS))
    if delimiter is not None and (len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\r\n\0'):
        raise ValueError(f"delimiter is {_words.shown(delimiter)}; it must be one ASCII character")
    if not 0 <= burn_in < 1:
        raise ValueError(f"burn_in is {burn_in:g}; it must be at least 0 and below 1")
    if isinstance(source, (str, os.PathLike)):
        path = os.fsdecode(source)
        if not os.path.exists(path) and (files := _chain_files(path)):
            return _Chain(path, files, burn_in)
        name = _words.cut(path, 100)
    else:
        name = _words.cut(str(getattr(source, "name", "the data")).strip("<>"), 100)
    if burn_in:
        raise ValueError(f"{name} is no chain, which alone has a burn-in")
    with ExitStack() as stack:
        file = stack.enter_context(open(source, "rb")) if isinstance(source, (str, os.PathLike)) else source
        table = _of_file(file, name, format, delimiter, header)
        table._stack.push(stack.pop_all())
    return table


def _of_file(file: IO[bytes], name: str, format: str | None, delimiter: str | None, header: bool | None) -> Table:
    start = _read(file, 8)
    for magic, opener in _OPENERS.items():
        if start.startswith(magic):
            file = io.BufferedReader(_Unpacked(opener(_again(file, start)), name), 1 << 17)
            start = _read(file, 8)
    kinds = {b"\x93NUMPY": "npy", b"PK\x03\x04": "npz", b"PAR1": "parquet"}
    found = next((kind for magic, kind in kinds.items() if start.startswith(magic)), "csv")
    if format not in (None, found):
        raise ValueError(f"{name} is no file of the format {format}" + f"; it is a file of the format {found}" * (found != "csv"))
    if found == "npy":
        return _Npy(file, start, name)
    if found == "npz":
        return _Npz(_seekable(file, start), name)
    if found == "parquet":
        return _Parquet(_seekable(file, start), name)
    return _Text(file, start + _read(file, HEAD - len(start)), name, delimiter, header)


def _read(file: IO[bytes], size: int) -> bytes:
    """So many bytes, fewer at the end of the file alone: pipes give what they have."""
    parts: list[bytes] = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class _Joined(io.RawIOBase):
    """Bytes that were read already, and the rest of a file."""

    def __init__(self, start: bytes, file: IO[bytes]) -> None:
        self._start, self._file = start, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data, self._start = self._start[: len(buffer)], self._start[len(buffer) :]
        data = data or self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Unpacked(io.RawIOBase):
    """What a decompressor gives, whose errors say what the file is."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name = file, name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def readinto(self, buffer: Any) -> int:
        with self._named():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, place: int, whence: int = 0) -> int:
        with self._named():
            return self._file.seek(place, whence)

    def tell(self) -> int:
        return self._file.tell()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk
                raise
            what = "cut off" if isinstance(error, EOFError) else f"damaged ({_words.cut(str(error))})"
            raise ValueError(f"{self._name} is {what}") from None


class _Returns:
    """Text with lines that end as on old Macs, as if they ended as elsewhere."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        return self._file.read(size).replace(b"\r", b"\n")


def _again(file: IO[bytes], start: bytes) -> Any:
    """The file from its beginning."""
    if file.seekable():
        file.seek(0)
        return file
    return io.BufferedReader(_Joined(start, file))


def _seekable(file: IO[bytes], start: bytes) -> IO[bytes]:
    """The file from its beginning, in a temporary file if it is a pipe."""
    if file.seekable():
        file.seek(0)
        return file
    spooled = tempfile.TemporaryFile()  # noqa: SIM115
    spooled.write(start)
    while data := file.read(1 << 20):
        spooled.write(data)
    spooled.seek(0)
    return spooled


# Text


class _Text(Table):
    def __init__(self, file: IO[bytes], head: bytes, name: str, delimiter: str | None, header: bool | None) -> None:
        if b"\r" in head and b"\n" not in head:
            file, head = cast("IO[bytes]", _Returns(file)), head.replace(b"\r", b"\n")
        whole = head[: head.rfind(b"\n") + 1] if len(head) >= HEAD and b"\n" in head else head
        self._layout = _text.sniff(whole, name, delimiter, header)
        labels = self._layout.labels
        super().__init__(name, labels, [label for label in labels if label] if self._layout.named else labels)
        self.named = self._layout.named
        self._file, self._head = file, head

    def _chunks(self, columns: Sequence[str], size: int) -> Iterator[Array]:
        places = [self.labels.index(column) for column in columns]
        for number, block in _text.blocks(self._file, self._head, self._layout.skip, self._layout.delimiter, self.name):
            array = _text.parse(block, number, self._layout, places, self.name)
            for first in range(0, len(array), size):
                yield array[first : first + size]


# NumPy


class _Header(NamedTuple):
    """What an .npy says of its array."""

    dtype: np.dtype[Any]
    fortran: bool
    shape: tuple[int, ...]
    offset: int


def _header(file: IO[bytes], start: bytes, name: str) -> _Header:
    """Read the head of an .npy, of which up to 8 bytes were read already."""
    start += _read(file, 8 - len(start))
    wide = 2 if start[6:7] == b"\1" else 4
    size = _read(file, wide)
    text = _read(file, int.from_bytes(size, "little"))
    try:
        if not start.startswith(b"\x93NUMPY") or len(size) < wide or len(text) < int.from_bytes(size, "little"):
            raise ValueError("its header is cut off")
        entries = ast.literal_eval(text.decode("utf-8" if start[6] >= 3 else "latin-1"))
        dtype = np.lib.format.descr_to_dtype(entries["descr"])
        shape, fortran = tuple(map(int, entries["shape"])), bool(entries["fortran_order"])
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError) as error:
        what = "its header is no description of an array" if isinstance(error, SyntaxError) else _words.cut(str(error))
        raise ValueError(f"{name} is damaged, or no .npy file ({what})") from None
    return _Header(dtype, fortran and len(shape) > 1, shape, 8 + wide + len(text))


def _check_numbers(dtype: np.dtype[Any], name: str, what: str) -> None:
    if dtype.kind not in "fiub":
        raise ValueError(f"{name} has {_words.cut(str(dtype), 40)} in {what}; it must hold real numbers")


class _Npy(Table):
    """One array; `member` names it inside an .npz."""

    def __init__(self, file: IO[bytes], start: bytes, name: str) -> None:
        header = _header(file, start, name)
        if len(header.shape) != 1 and (header.dtype.names or len(header.shape) != 2):
            raise ValueError(f"{name} has shape {_words.shapes(header.shape)}; it must be (n, k)")
        self.header = header
        names = header.dtype.names
        super().__init__(name, names or [str(k) for k in range(header.shape[1] if len(header.shape) == 2 else 1)])
        self.named = bool(names)
        self.rows = header.shape[0]
        self._file = file
        if header.fortran and not file.seekable():
            self._file = _seekable(file, b"")
            self.header = header._replace(offset=0)

    def _dtypes(self, columns: Sequence[str]) -> list[np.dtype[Any]]:
        dtype = self.header.dtype
        dtypes = [dtype[column] if dtype.names else dtype for column in columns]
        for column, own in zip(columns, dtypes, strict=True):
            _check_numbers(own, self.name, f"column {_words.shown(column)}" if dtype.names else "it")
        return dtypes

    def _chunks(self, columns: Sequence[str], size: int) -> Iterator[Array]:
        dtype, fortran, shape, offset = self.header
        result = np.result_type(*self._dtypes(columns)) if columns else np.dtype(float)
        result = result.newbyteorder("=") if result != np.float16 else np.dtype(np.float32)
        rows, width = shape[0], 1 if len(shape) == 1 else shape[1]
        size = max(1, min(size, (8 * CHUNK) // max(1, dtype.itemsize * width)))
        places = [int(column) for column in columns] if not dtype.names else []
        for first in range(0, rows, size):
            count = min(size, rows - first)
            chunk = np.empty((count, len(columns)), result)
            if fortran:
                for j, place in enumerate(places):
                    self._file.seek(offset + (place * rows + first) * dtype.itemsize)
                    chunk[:, j] = self._numbers(count, first, 1)
            else:
                block = self._numbers(count, first, width).reshape(count, width)
                for j, column in enumerate(columns):
                    chunk[:, j] = block[:, 0][column] if dtype.names else block[:, places[j]]
            yield chunk

    def _numbers(self, count: int, first: int, width: int) -> Array:
        size = self.header.dtype.itemsize * width
        data = _read(self._file, count * size)
        if len(data) < count * size:
            raise ValueError(f"{self.name} is cut off, behind row {first + len(data) // size} of {self.header.shape[0]}")
        return np.frombuffer(data, self.header.dtype)

    def view(self, columns: Sequence[str]) -> Array | None:
        dtype, fortran, shape, offset = self.header
        path = getattr(self._file, "name", None)
        if dtype.names or dtype.kind not in "fiub" or len(shape) != 2 or not isinstance(path, str) or not math.prod(shape) or not columns:
            return None
        places = [int(column) for column in columns]
        if places != list(range(places[0], places[0] + len(places))):
            return None
        if os.path.getsize(path) < offset + math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{self.name} is cut off")
        whole = np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")
        return whole[:, places[0] : places[-1] + 1]


class _Npz(Table):
    def __init__(self, file: IO[bytes], name: str) -> None:
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"{name} is damaged, or no .npz file ({_words.cut(str(error))})") from None
        self._archive = archive
        self._members: dict[str, str] = {}  # by label: the member, and the place in it
        headers: dict[str, _Header] = {}
        for member in archive.namelist():
            if member.endswith(".npy"):
                with archive.open(member) as stream:
                    headers[member.removesuffix(".npy")] = _header(stream, b"", name)
        wide = {key: each.shape[1] for key, each in headers.items() if len(each.shape) == 2 and each.dtype.kind in "fiub"}
        columns = [key for key, each in headers.items() if len(each.shape) == 1 and each.dtype.kind in "fiub"]
        names = self._names(headers, wide)
        places: dict[str, tuple[str, int]] = {}
        groups: dict[str, tuple[str, ...]] = {}
        for key, width in wide.items():
            own = names.get(key) or [f"{key}.{k}" if len(wide) + len(columns) > 1 else str(k) for k in range(width)]
            groups[key] = tuple(own)
            places |= {label: (key, k) for k, label in enumerate(own)}
        places |= {key: (key, 0) for key in columns}
        if not places:
            raise ValueError(f"{name} has no array of numbers, (n,) or (n, k)")
        main = next(iter(wide)) if len(wide) == 1 else "x" if "x" in wide else None
        super().__init__(name, places, groups[main] if main else columns or None)
        self.named = names != {} or len(wide) + len(columns) > 1 or not wide
        self.groups, self._places, self._headers = groups, places, headers
        self._stack.callback(archive.close)
        self.rows = headers[places[self.usual[0]][0]].shape[0] if self.usual else None

    def _names(self, headers: dict[str, _Header], wide: dict[str, int]) -> dict[str, list[str]]:
        """The names of the columns of the one array that an array of text has names for."""
        for key, header in headers.items():
            fitting = [each for each, width in wide.items() if header.shape == (width,)]
            if header.dtype.kind == "U" and len(fitting) == 1:
                with self._archive.open(f"{key}.npy") as stream:
                    return {fitting[0]: [str(word) for word in np.lib.format.read_array(stream, allow_pickle=False)]}
        return {}

    def _chunks(self, columns: Sequence[str], size: int) -> Iterator[Array]:
        members = list(dict.fromkeys(self._places[column][0] for column in columns))
        rows = {self._headers[member].shape[0]: member for member in members}
        if len(rows) > 1:
            shown = ", ".join(f"{count} in {_words.shown(member)}" for count, member in [*rows.items()][:3])
            raise ValueError(f"{self.name} has arrays of different numbers of rows: {shown}; choose columns")
        with ExitStack() as stack:
            streams = {}
            for member in members:
                stream = stack.enter_context(self._archive.open(f"{member}.npy"))
                table = _Npy(stream, b"", self.name)
                own = [column for column in columns if self._places[column][0] == member]
                streams[member] = own, table._chunks([str(self._places[column][1]) for column in own], size)
            try:
                while parts := {member: part for member, (_, chunks) in streams.items() if (part := next(chunks, None)) is not None}:
                    chunk = np.empty((len(next(iter(parts.values()))), len(columns)), np.result_type(*parts.values()))
                    for member, part in parts.items():
                        for k, column in enumerate(streams[member][0]):
                            chunk[:, columns.index(column)] = part[:, k]
                    yield chunk
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise ValueError(f"{self.name} is damaged ({_words.cut(str(error))})") from None


# Parquet


class _Parquet(Table):
    def __init__(self, file: IO[bytes], name: str) -> None:
        try:
            import pyarrow as pa
            from pyarrow import parquet
        except ImportError:
            raise ImportError(f"{name} is a Parquet file, which needs pyarrow: pip install 'fastmaf[tables]'") from None
        try:
            self._file = parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{name} is damaged, or no Parquet file ({_words.cut(str(error))})") from None
        schema = self._file.schema_arrow
        super().__init__(name, schema.names, [label for label in schema.names if not label.startswith("__index_level_")])
        self.rows = self._file.metadata.num_rows
        self._stack.callback(self._file.close)

    def _chunks(self, columns: Sequence[str], size: int) -> Iterator[Array]:
        import pyarrow as pa

        schema = self._file.schema_arrow
        for column in columns:
            kind = schema.field(column).type
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind)):
                has = f"{self.name} has {_words.cut(str(kind), 40)} in column {_words.shown(column)}"
                raise ValueError(f"{has}; choose columns of numbers by name (columns)")
        single = columns and all(schema.field(column).type in (pa.float32(), pa.float16()) for column in columns)
        dtype = np.dtype(np.float32 if single else np.float64)
        for batch in self._file.iter_batches(size, columns=list(columns)):
            chunk = np.empty((batch.num_rows, len(columns)), dtype)
            for j, column in enumerate(columns):
                values = batch.column(batch.schema.get_field_index(column))
                if pa.types.is_boolean(values.type):
                    values = values.cast(pa.uint8())
                chunk[:, j] = values.cast(pa.float64()).to_numpy(zero_copy_only=False)  # nulls as NaN
            yield chunk


# Chains


def _chain_files(root: str) -> list[str]:
    """The files of the chain of a root; none if it is none."""
    folder, stem = os.path.split(root)
    if not stem or not os.path.isdir(folder or "."):
        return []
    found = re.compile(re.escape(stem) + r"[._](\d+)\.txt")
    numbered = {int(match[1]): entry for entry in os.listdir(folder or ".") if (match := found.fullmatch(entry))}
    names = [numbered[k] for k in sorted(numbered)] or [f"{stem}.txt"]
    return [path for name in names if os.path.isfile(path := os.path.join(folder, name))]


class _Chain(Table):
    """Files of white space: weight, minus log-posterior, parameters; names in ``.paramnames`` or in the first line."""

    def __init__(self, root: str, files: Sequence[str], burn_in: float) -> None:
        name = _words.cut(root, 100)
        with open(files[0], "rb") as file:
            layout = _text.sniff(file.read(HEAD), files[0])
        labels, derived = list(layout.labels), set()
        if os.path.isfile(f"{root}.paramnames"):
            with open(f"{root}.paramnames", encoding="utf-8", errors="replace") as lines:
                words = [line.split()[0] for line in lines if line.strip()]
            if len(words) + 2 != len(labels):
                raise ValueError(f"{name}.paramnames names {len(words)} parameters; {files[0]} has {len(labels)} columns, not two more")
            derived = {word.rstrip("*") for word in words if word.endswith("*")}
            labels = ["weight", "minuslogpost", *(word.rstrip("*") for word in words)]
        elif not layout.named:
            raise ValueError(f"{name} is a chain without names: there is no {name}.paramnames")
        if labels[0] != "weight":
            labels = ["weight", "minuslogpost", *labels[2:]]
        usual = [label for label in labels[2:] if label not in derived and not re.match(r"(chi2|minuslog)", label)]
        super().__init__(name, labels, usual)
        self.weights = "weight"
        self._layout = _text.Layout(tuple(labels), True, layout.delimiter, layout.skip)
        self._files, self._burn_in = files, burn_in

    def _chunks(self, columns: Sequence[str], size: int) -> Iterator[Array]:
        places = [self.labels.index(column) for column in columns]
        for path in self._files:
            with open(path, "rb") as file:
                left = 0
                if self._burn_in:
                    left = int(self._burn_in * sum(len(array) for array in self._arrays(file, [0], path)))
                    file.seek(0)
                for array in self._arrays(file, places, path):
                    skipped = min(left, len(array))
                    left -= skipped
                    for first in range(skipped, len(array), size):
                        yield array[first : first + size]

    def _arrays(self, file: IO[bytes], places: Sequence[int], path: str) -> Iterator[Array]:
        for number, block in _text.blocks(file, b"", self._layout.skip, self._layout.delimiter, path):
            yield _text.parse(block, number, self._layout, places, path)
