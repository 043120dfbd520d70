"""The safetensors container: eight bytes with the length of a JSON header, the header, and the raw numbers behind it.

Read and written here rather than by the package of that name: the bytes of equal contents are equal, and all that can be wrong in a header
(names twice, ranges that overlap or leave holes, sizes that overflow) is looked for and said.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmaf import _words

__all__ = ["CODES", "parse", "read", "write"]

Array = NDArray[Any]

CODES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "I64": np.dtype("<i8")}
"""The dtypes that files of fastmaf hold."""

OTHERS = frozenset(["BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "U64", "F8_E4M3", "F8_E5M2"])
"""Other dtypes of the format."""

_FOREIGN = {"BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "I32": "<i4", "U32": "<u4", "U64": "<u8"}
FOREIGN: dict[str, np.dtype[Any]] = {code: np.dtype(kind) for code, kind in _FOREIGN.items()}
"""Dtypes that NumPy has too, which files of other libraries hold."""

METADATA = "__metadata__"
OURS = "fastmaf"
"""How the keys of our metadata begin; other packages may add theirs."""
DIGEST = "fastmaf_digest"
"""The metadata key of the digest: a CRC-32 in 8 hexadecimal digits. Readers of other packages, and older ones of this, pass over it."""

LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the format."""


class _OtherDtypeError(ValueError):
    """The file is whole, and holds what fastmaf does not write."""


def write(tensors: Mapping[str, Array], metadata: Mapping[str, str], digest: bool = False) -> bytes:
    """The bytes of a file.

    Parameters
    ----------
    tensors : mapping of str to array
        Of the dtypes of `CODES`; the larger dtypes come first, each sorted by name, so that equal contents give equal bytes.
    metadata : mapping of str to str
    digest : bool
        Whether the metadata gets a digest, which `read` checks: of our metadata and of the tensors.

    Returns
    -------
    bytes

    Raises
    ------
    ValueError
        If a tensor has another dtype.

    Examples
    --------
    >>> read(write({"a": np.array([1.0, 2.0])}, {"by": "me"}))
    ({'a': array([1., 2.])}, {'by': 'me'})
    """
    codes = {dtype: code for code, dtype in CODES.items()}
    entries: dict[str, Any] = {}
    pieces: dict[str, Array] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        array = tensors[name]
        dtype = array.dtype if array.dtype in codes else array.dtype.newbyteorder("<")
        if dtype not in codes:
            raise ValueError(f"tensor {_words.shown(name)} has dtype {array.dtype}; it must be one of {', '.join(CODES)}")
        pieces[name] = np.ascontiguousarray(array, dtype)
        entries[name] = {"dtype": codes[dtype], "shape": [*array.shape], "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    if digest:
        metadata = {**metadata, DIGEST: _digest(pieces, metadata)}
    text = json.dumps({METADATA: dict(sorted(metadata.items())), **entries}, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(piece.data for piece in pieces.values())])


def _digest(pieces: Mapping[str, Array], metadata: Mapping[str, str]) -> str:
    """The CRC-32 of our metadata and of all tensors, in the order of their names: each name and text ends in a zero byte."""
    crc = 0
    for key in sorted(metadata):
        if key.startswith(OURS) and key != DIGEST:
            crc = zlib.crc32(f"{key}\0{metadata[key]}\0".encode(), crc)
    for name in sorted(pieces):
        crc = zlib.crc32(pieces[name].data, zlib.crc32(f"{name}\0".encode(), crc))
    return f"{crc:08x}"


def read(data: bytes, foreign: bool = False) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors of a file, which are read-only views of its bytes, and its metadata; with `foreign` also tensors of those dtypes.

    Raises
    ------
    ValueError
        If the bytes are damaged or no such file, or a tensor has a dtype that is not in `CODES`. A digest is checked where there is one.
    """
    try:
        header, begin = _header(data)
        metadata = header.pop(METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not text by name")
        tensors, ranges = {}, []
        for name, entry in header.items():
            dtype, shape, first, last = _entry(name, entry, len(data) - begin, CODES | FOREIGN if foreign else CODES)
            ranges.append((first, last))
            tensors[name] = np.frombuffer(data, dtype, math.prod(shape), begin + first).reshape(shape)
        end = 0
        for first, last in sorted(ranges):
            if first != end:
                raise ValueError(f"{'two tensors share' if first < end else 'no tensor has'} the bytes from {min(first, end)} on")
            end = last
        if end != len(data) - begin:
            raise ValueError(f"no tensor has the bytes from {end} on")
    except _OtherDtypeError:
        raise
    except (ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"it is damaged or no safetensors file ({error})") from None
    if DIGEST in metadata:
        digest = _digest(tensors, metadata)
        if metadata.pop(DIGEST) != digest:
            raise ValueError(f"it is damaged: the CRC-32 of its contents is {digest}, and it names another")
    return tensors, metadata


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """The JSON object at the head of a file, and where the numbers begin."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8 or length > LONGEST_HEADER:
        raise ValueError("its header is cut off")

    try:
        header = parse(data[8 : 8 + length].decode(), "its header")
    except UnicodeDecodeError:
        raise ValueError("its header is not text") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return header, 8 + length


def parse(text: str, what: str) -> Any:
    """What a JSON text holds; `what` begins the messages.

    Raises
    ------
    ValueError
        If it is no JSON, or holds a name twice in an object, a number beyond float64, or half of a surrogate pair.

    Examples
    --------
    >>> parse('{"a": [1, 2.5]}', "it")
    {'a': [1, 2.5]}
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{what} holds {constant}")

    def real(digits: str) -> float:
        number = float(digits)
        return number if math.isfinite(number) else refuse("a number that is too large")

    def integer(digits: str) -> int:
        return int(digits) if len(digits) < 300 or math.isfinite(real(digits)) else 0

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError(f"{what} names something twice")
        return result

    value = json.loads(text, parse_constant=refuse, parse_float=real, parse_int=integer, object_pairs_hook=unique)
    if "\\ud" in text.lower() and not _is_unicode(value):
        raise ValueError(f"{what} holds half of a surrogate pair")
    return value


def _is_unicode(value: Any) -> bool:
    """Whether UTF-8 can hold all text in what was JSON."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _entry(name: str, entry: Any, size: int, codes: Mapping[str, np.dtype[Any]]) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """Dtype, shape and range of a tensor whose numbers lie within `size` bytes."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("a tensor lacks its dtype, shape or data_offsets")
    code = entry["dtype"]
    if isinstance(code, str) and code in OTHERS and code not in codes:
        raise _OtherDtypeError(f"tensor {_words.shown(name)} has dtype {code}; it must be one of {', '.join(codes)}")
    dtype = codes.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise ValueError("a tensor has a dtype that the format does not know")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in numbers):
            raise ValueError("a tensor has a shape or range that is not made of counts")
    if len(shape) > 32 or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        raise ValueError("a tensor lies outside the file")
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0] or math.prod(n or 1 for n in shape) * dtype.itemsize >= 2**63:
        raise ValueError("a tensor has a shape that does not fill its range")
    return dtype, tuple(shape), offsets[0], offsets[1]
