"""Numbers out of text, a block of lines at a time: CSV, columns set apart by tabs, semicolons or spaces.

`Careful` reading defines what a block means.  NumPy and pyarrow read the same where they read a block at all, and are tried first.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fastmaf import _words

__all__ = ["Layout", "blocks", "parse", "sniff"]

Array = NDArray[Any]

BLOCK = 1 << 20
"""Bytes of text read at a time."""

NEWLINE, QUOTE = b"\n", b'"'

MISSING = ("", "na", "n/a", "nan", "null", "none", "-", "#n/a")
"""Fields, in lower case, that stand for no number."""

LONGEST = 1 << 24
"""Bytes in which a quote must be closed."""

TRUTH = {"true": 1.0, "false": 0.0}

FORTRAN = re.compile(r"[+-]?(\d+\.\d*|\.\d+)d[+-]?\d+", re.ASCII)
"""Numbers in double precision as Fortran writes them, 1.0D+00, in lower case."""

_ARROW_MISSING = [*dict.fromkeys(form for word in MISSING for form in (word, word.upper(), word.capitalize())), "NaN", "-nan"]


@dataclass(frozen=True)
class Layout:
    """How a file of text is laid out.

    Attributes
    ----------
    labels : tuple of str
        One for each column; numbers counted from 0 where `named` is False.
    named : bool
    delimiter : str or None
        None for any white space.
    skip : int
        Lines in front of the numbers.
    """

    labels: tuple[str, ...]
    named: bool
    delimiter: str | None
    skip: int


def sniff(head: bytes, name: str, delimiter: str | None = None, header: bool | None = None) -> Layout:
    r"""The layout of a file, from the lines that it begins with.

    The first line that is neither blank nor a comment has the labels, unless all its fields are numbers; then the last comment in front
    of it has them, if it has as many words.

    Parameters
    ----------
    head : bytes
    name : str
        Of the file, for messages.
    delimiter : str, optional
        Found out if None: tabs, semicolons, commas, spaces, whichever is there first in this order.
    header : bool, optional
        Whether that line has labels; found out if None.

    Raises
    ------
    ValueError
        If there is no line, nothing but bytes, or a quote that is not closed in the line of the labels.

    Examples
    --------
    >>> sniff(b"z,r\n1,2\n", "x.csv")
    Layout(labels=('z', 'r'), named=True, delimiter=',', skip=1)
    """
    if b"\0" in head:
        raise ValueError(f"{name} is neither text nor a file of a known format (.npy, .npz, .parquet)")
    comment, first, skip = "", "", 0
    for number, line in enumerate(head.decode("utf-8-sig", "replace").split("\n")):
        if line.lstrip().startswith("#"):
            comment = line.lstrip().lstrip("#")
        elif line.strip():
            first, skip = line.rstrip("\r"), number
            break
    if not first:
        raise ValueError(f"{name} holds no rows")
    if delimiter is None:
        delimiter = next((mark for mark in "\t;," if mark in first), None)
        if delimiter is None and len(first.split()) == 1:
            delimiter = ","
    elif delimiter.isspace() and delimiter != "\t":
        delimiter = None
    if delimiter is not None and _quotes(text := first.encode(), len(text), delimiter)[0] >= 0:
        raise ValueError(_unclosed(name, skip + 1))
    try:
        fields = _fields(first, delimiter)
    except csv.Error as error:
        raise ValueError(f"{name} has no columns in line {skip + 1} ({error})") from None
    width = len(fields)
    counted = [str(k) for k in range(width)]
    if header is None:
        header = not all(map(_is_number, fields)) or (width > 2 and fields in (counted, ["", *counted[:-1]]))
    if not header:
        words = _fields(comment.strip(), delimiter) if delimiter is not None and delimiter in comment else comment.split()
        named = len(words) == width and not all(map(_is_number, words))
        return Layout(tuple(words if named else counted), named, delimiter, skip)
    labels = [field.strip() for field in fields]
    named = not all(map(_is_number, labels))
    return Layout(tuple(labels), named, delimiter, skip + 1)


def _fields(line: str, delimiter: str | None) -> list[str]:
    return line.split() if delimiter is None else [field.strip() for field in next(csv.reader([line], delimiter=delimiter), [])]


def _is_number(field: str) -> bool:
    return _value(field) is not None


def _value(field: str) -> float | None:
    """The number that a field has, NaN if it is missing; None for text."""
    field = field.strip()
    if (word := field.lower()) in MISSING:
        return np.nan
    if word in TRUTH:
        return TRUTH[word]
    try:
        return None if "_" in field else float(field)
    except ValueError:
        return float(word.replace("d", "e")) if FORTRAN.fullmatch(word) else None


def blocks(file: IO[bytes], start: bytes, skip: int, delimiter: str | None = ",", name: str = "the data") -> Iterator[tuple[int, bytes]]:
    """Whole lines of a file in blocks, behind its first `skip` lines, and the number of the first line of each, counted from 1.

    `start` was read already.  A line that goes on inside quotes is not cut.

    Raises
    ------
    ValueError
        If a quote is never closed, or the file cannot be unpacked further; with the line.
    """
    rest, number = start, 1

    def more() -> bytes:
        try:
            return file.read(BLOCK)
        except ValueError as error:
            raise ValueError(f"{error}, behind line {number + rest.count(NEWLINE) - 1}") from None

    if rest.startswith(b"\xef\xbb\xbf"):
        rest = rest[3:]
    while skip:
        end = rest.find(b"\n")
        if end < 0:
            data = more()
            if not data:
                return
            rest += data
            continue
        rest, skip, number = rest[end + 1 :], skip - 1, number + 1
    while True:
        data = more()
        rest += data
        cut, open_at, hopeless = _cut(rest, not data, delimiter)
        if cut:
            yield number, rest[:cut]
            number += rest.count(NEWLINE, 0, cut)
            rest = rest[cut:]
        if open_at >= 0 and (hopeless or not data or len(rest) > LONGEST):
            raise ValueError(_unclosed(name, number + rest.count(NEWLINE, 0, open_at - cut)))
        if not data:
            return


def _cut(data: bytes, last: bool, delimiter: str | None) -> tuple[int, int, bool]:
    """Where the last whole line ends, where a quote behind it is open (-1 if none is), and whether nothing that follows can close it."""
    end = len(data) if last else data.rfind(NEWLINE) + 1
    if delimiter is None:
        return end, -1, False
    first, hopeless = wrong, _ = _quotes(data, end, delimiter)
    while wrong >= 0:  # the line in which it is opened may have begun inside other quotes
        end = data.rfind(NEWLINE, 0, wrong) + 1
        wrong, _ = _quotes(data, end, delimiter)
    return end, first, hopeless


def _quotes(data: bytes, end: int, delimiter: str) -> tuple[int, bool]:
    """Where in front of `end` the quote lies that goes wrong, -1 if all are well, and whether it was closed.

    A quote opens at the beginning of a field, as for `csv.reader`, and is an ordinary character elsewhere.  One that is closed lines later
    in front of something else than a delimiter was never meant to be open until there.
    """
    if data.find(QUOTE, 0, end) < 0:
        return -1, False
    ends, fields = _quoted(delimiter)
    characters = np.frombuffer(data, np.uint8, end)
    places = np.flatnonzero(characters == QUOTE[0])
    opening, closing = places[::2], places[1::2]
    if ends[characters[opening - 1]].all() and ends[characters[np.minimum(closing + 1, end - 1)]].all():  # each pair a field
        k = len(places) - 1
        if k % 2:
            return -1, False
        while k and places[k - 1] == places[k] - 1:  # two quotes inside are one
            k -= 2
        return int(places[k]), False
    for field in fields.finditer(data, 0, end):
        if field[1] is None:
            return field.start(), False
        if NEWLINE in field[0] and field.end() < end and not ends[data[field.end()]]:
            return field.start(), True
    return -1, False


@cache
def _quoted(delimiter: str) -> tuple[NDArray[np.bool_], re.Pattern[bytes]]:
    """What may lie beside a pair of quotes, by its byte, and what finds pairs."""
    beside = delimiter.encode() + b"\r\n"
    ends = np.zeros(256, bool)
    ends[[*beside, QUOTE[0]]] = True
    return ends, re.compile(rb'"(?<![^' + re.escape(beside) + rb']")[^"]*(?:""[^"]*)*("(?!"))?')


def _unclosed(name: str, line: int) -> str:
    return f"{name} has a quote in line {line} that is never closed"


def parse(block: bytes, number: int, layout: Layout, places: Sequence[int], name: str) -> Array:
    r"""The numbers in some columns of a block, (n, k) in float64; NaN where they are missing.

    Parameters
    ----------
    block : bytes
        Whole lines.
    number : int
        Of its first line, for messages.
    layout : Layout
    places : sequence of int
        The columns, counted from 0.
    name : str
        Of the file.

    Raises
    ------
    ValueError
        If a column has text, or a line has more or fewer fields than the first one; with the line.

    Examples
    --------
    >>> parse(b"1,2,a\n3,,b\n", 2, Layout(("x", "y", "z"), True, ",", 1), [0, 1], "x.csv").tolist()
    [[1.0, 2.0], [3.0, nan]]
    """
    block = block.rstrip(b"\r\n")
    if not block.strip():
        return np.empty((0, len(places)))
    if b"#" not in block:
        for quick in (_arrow, _numpy):
            result = quick(block, layout, places)
            if result is not None:
                return result
    return _careful(block, number, layout, places, name)


def _arrow(block: bytes, layout: Layout, places: Sequence[int]) -> Array | None:
    if layout.delimiter is None or len(layout.delimiter) != 1:
        return None
    try:
        import pyarrow as pa
        from pyarrow import csv as arrow
    except ImportError:
        return None
    columns = [str(place) for place in places]
    try:
        table = arrow.read_csv(
            pa.BufferReader(block),
            arrow.ReadOptions(column_names=[str(k) for k in range(len(layout.labels))]),
            arrow.ParseOptions(delimiter=layout.delimiter, newlines_in_values=b'"' in block),
            arrow.ConvertOptions(
                column_types={column: pa.float64() for column in columns}, include_columns=columns, null_values=_ARROW_MISSING
            ),
        )
    except pa.ArrowInvalid:
        return None
    result = np.empty((table.num_rows, len(places)))
    for j in range(len(places)):
        result[:, j] = table.column(j).to_numpy()  # nulls as NaN
    return result


def _numpy(block: bytes, layout: Layout, places: Sequence[int]) -> Array | None:
    width, mark = len(layout.labels), layout.delimiter
    if b'"' in block or b"\n\n" in block or b"\n\r" in block or block[:1] in b"\r\n":
        return None
    if mark is not None and block.count(mark.encode()) != (block.count(b"\n") + 1) * (width - 1):
        return None
    try:
        text = io.StringIO(block.decode())
        result = np.loadtxt(text, comments=None, delimiter=mark, ndmin=2, usecols=None if mark is None else list(places))
    except ValueError:  # UnicodeDecodeError too
        return None
    if mark is None:
        return result[:, list(places)] if result.shape[1] == width else None
    return result


def _careful(block: bytes, number: int, layout: Layout, places: Sequence[int], name: str) -> Array:
    text, width = block.decode("utf-8", "replace"), len(layout.labels)
    rows = []
    for line, fields in _lines(text, layout.delimiter, number, name):
        if len(fields) != width:
            has = f"{len(fields)} field{'s' * (len(fields) != 1)}"
            raise ValueError(f"{name} has {has} in line {line}, and {width} columns")
        values = [_value(fields[place]) for place in places]
        if None in values:
            label = _words.shown(layout.labels[places[values.index(None)]])
            raise ValueError(f"{name} has text in column {label}, line {line}; choose columns of numbers by name (columns)")
        rows.append(values)
    return np.array(rows, np.float64).reshape(len(rows), len(places))


def _lines(text: str, delimiter: str | None, number: int, name: str) -> Iterator[tuple[int, list[str]]]:
    """The fields of each line that is neither blank nor a comment, and its number; the first line has `number`."""
    if delimiter is None:
        lines = enumerate(re.split(r"\r?\n", text), number)
        yield from ((k, fields) for k, line in lines if (fields := line.split()) and not fields[0].startswith("#"))
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    while True:
        line = number + reader.line_num
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # a field beyond the limit
            raise ValueError(f"{name} cannot be read from line {line} on ({error})") from None
        blank = not fields or (len(fields) == 1 and fields[0].isspace())
        if not blank and not fields[0].lstrip().startswith("#"):
            yield line, fields
