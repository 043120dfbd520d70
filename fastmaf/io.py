"""Files: one flow is one .safetensors file.

Tensors go by the path of their place in the record (``layers.1.conditioner.initial.weight``).  The metadata key ``fastmaf`` is JSON that
spells out the record itself: every layer with its ``type`` and its fields, an array standing as the name of its tensor, an absent one as
null.  Reading follows the fields of the classes in `fastmaf.layers`; a tensor is used once, and none may be left over.

The checkpoint of a fit is such a file of the best flow so far, with more tensors and another metadata key, which `load` passes over.

An `fastmaf.Ensemble` is written as its first member, whose network has all weights instead of those that its masks leave, and under
``ensemble`` the ranks and degrees of all members.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import fields
from typing import IO, Any, get_args

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastmaf import _container, _words
from fastmaf import layers as _layers
from fastmaf.ensemble import Ensemble
from fastmaf.flow import Flow
from fastmaf.maf import masked
from fastmaf.record import FlowRecord, plain

__all__ = ["FORMAT", "checkpoint_bytes", "expect", "load", "read_checkpoint", "reading_checkpoint", "save", "write"]

Array = NDArray[Any]

FORMAT = 1
"""Version of the format that is written; older ones are read."""

_INTEGER_FIELDS = ("ranks", "perm", "degrees")
_DOUBLE_RECORDS = (_layers.Elementwise, _layers.Affine)
_KEYS = ("format", "dtype", "features", "context_features", "names", "context_layers", "layers", "base", "training")
_MEMBERS = ("ranks", "degrees")
_RECORDS = {cls.__name__: cls for cls in (*get_args(_layers.FlowLayer), _layers.Normal, _layers.Terminal)}
_LATER: dict[type, dict[str, Any]] = {_layers.BatchNorm: {"statistics": "batch"}, _layers.Conditioner: {"input_clip": None}}
"""Fields that older files lack, and what they mean then."""
_PARTS = {cls.__name__: cls for cls in (_layers.Conditioner, _layers.Block, _layers.Dense, _layers.Law)}


def save(flow: Flow | Ensemble, path_or_file: str | os.PathLike[str] | IO[bytes]) -> None:
    """Write a flow or an ensemble to a path or to a binary file; see `Flow.save`.

    Examples
    --------
    >>> import fastmaf, io
    >>> file = io.BytesIO()
    >>> save(fastmaf.MAF(features=3), file)
    >>> load(file.getvalue()).features
    3
    """
    data = to_bytes(flow)
    if isinstance(path_or_file, (str, os.PathLike)):
        write(path_or_file, data)
    elif callable(getattr(path_or_file, "write", None)):
        path_or_file.write(data)
    else:
        raise ValueError(f"path_or_file is {_words.shown(path_or_file)}; it must be a path or a binary file")


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Put bytes into a file that holds either all of them or what it held before.

    They go to a temporary file beside it, which is locked until it has its name: what lies there unlocked was left by a writer that was
    killed, and is swept away.

    Examples
    --------
    >>> import os, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(os.path.join(folder, "x"), b"123")
    ...     os.listdir(folder)
    ['x']
    """
    target = os.path.realpath(path)
    try:
        with _temporary(target) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, target)
    except OSError as error:
        if error.filename is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error  # the path that the caller knows
    _sweep(target)


@contextmanager
def _temporary(target: str) -> Iterator[IO[bytes]]:
    """A new file beside the target, locked while it is written; gone afterwards, unless it was given another name."""
    while True:
        file = open(f"{target}.{secrets.token_hex(8)}.tmp", "xb")  # noqa: SIM115
        # Before the lock was there, somebody may have taken the file for one of a dead writer.
        if _lock(file) and os.path.exists(file.name):
            break
        file.close()
        _unlink(file.name)
    try:
        with file:
            yield file
    finally:
        _unlink(file.name)


def _lock(file: IO[bytes]) -> bool:
    """Take the lock of a file, which goes with its writer; False if another has it. Where there are no locks, all have them."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


def _unlink(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


def _sweep(target: str) -> None:
    """Remove the temporary files of writers that are dead; nothing where locks cannot tell."""
    folder, name = os.path.split(target)
    pattern = re.compile(re.escape(name) + r"\.[0-9a-f]{16}\.tmp")
    with suppress(OSError, ImportError):
        import fcntl

        for entry in filter(pattern.fullmatch, os.listdir(folder)):
            with suppress(OSError), open(os.path.join(folder, entry), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _unlink(file.name)


def load(source: str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]) -> Any:
    """Read a flow or an ensemble.

    Parameters
    ----------
    source : path, binary file or bytes
        What `Flow.save` or `Ensemble.save` wrote.

    Returns
    -------
    Flow or Ensemble

    Raises
    ------
    ValueError
        If this is no flow, is damaged, or was written by a newer fastmaf.
    OSError
        If the file cannot be read.

    Examples
    --------
    >>> import fastmaf, io
    >>> file = io.BytesIO()
    >>> fastmaf.MAF(features=3).save(file)
    >>> fastmaf.load(file.getvalue())
    Flow(features=3, dtype=float32): Affine -> 5 x Autoregressive((100, 100), relu, exp_soft) -> Normal
    """
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        with open(source, "rb") as file:
            data = file.read()
    elif isinstance(source, (bytes, bytearray, memoryview)):
        name, data = "the data", bytes(source)
    elif callable(getattr(source, "read", None)):
        name, data = str(getattr(source, "name", "the file")), source.read()
        if not isinstance(data, bytes):
            raise ValueError(f"{name} gives {type(data).__name__}, not bytes; open it in binary mode")
    else:
        raise ValueError(f"source is {_words.shown(source)}; it must be a path, a binary file or bytes")
    with _reading(name, "a flow"):
        return _from_bytes(data)


@contextmanager
def _reading(name: Any, what: str) -> Iterator[None]:
    """Say of what is wrong with contents whose they are."""
    try:
        yield
    except (ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"{name} cannot be read as {what}: {error}") from None


def to_bytes(flow: Flow | FlowRecord | Ensemble, digest: bool = True) -> bytes:
    """The bytes of the file of a flow or an ensemble, with or without the digest of its tensors."""
    return _container.write(*_encoded(flow), digest)


def _encoded(flow: Flow | FlowRecord | Ensemble) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors of a flow or an ensemble, and the metadata."""
    tensors: dict[str, Array] = {}
    record = {
        "format": FORMAT,
        "dtype": flow.dtype.name,
        "features": flow.features,
        "context_features": flow.context_features,
        "names": flow.names,
        "context_layers": _encode(flow.context_layers, "context_layers", tensors),
        "layers": _encode(flow.layers, "layers", tensors),
        "base": _encode(flow.base, "base", tensors),
        "training": plain(flow.training),
    }
    if isinstance(flow, Ensemble):
        _encode(flow.conditioner, next(path for path, _ in _networks(flow)), tensors)
        record["ensemble"] = {name: _encode(getattr(flow, name), f"ensemble.{name}", tensors) for name in _MEMBERS}
    return tensors, {"fastmaf": json.dumps(record, allow_nan=False)}


def _networks(flow: Flow | FlowRecord | Ensemble) -> Iterator[tuple[str, Any]]:
    """The networks of a flow, and their places."""
    for path, record in (*((f"layers.{k}", layer) for k, layer in enumerate(flow.layers)), ("base", flow.base)):
        if isinstance(record, (_layers.Autoregressive, _layers.Terminal)):
            yield f"{path}.conditioner", record.conditioner


def _encode(value: Any, path: str, tensors: dict[str, Array]) -> Any:
    if isinstance(value, np.ndarray):
        tensors[path] = value
        return path
    if isinstance(value, tuple):
        return [_encode(item, f"{path}.{k}", tensors) for k, item in enumerate(value)]
    if isinstance(value, Mapping):
        return dict(value)
    name = type(value).__name__
    if name in _RECORDS or name in _PARTS:
        return {"type": name, **{f.name: _encode(getattr(value, f.name), f"{path}.{f.name}", tensors) for f in fields(value)}}
    return value


def _from_bytes(data: bytes) -> Flow | Ensemble:
    tensors, metadata = _container.read(data)
    if CHECKPOINT in metadata:
        tensors = {name: array for name, array in tensors.items() if not name.startswith(PREFIX)}
    if "fastmaf" not in metadata:
        raise ValueError("it is a safetensors file without the metadata of fastmaf")
    record = _object("the metadata", _container.parse(metadata["fastmaf"], "its metadata"))
    version = record.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"its format is {_words.shown(version)}")
    if version > FORMAT:
        raise ValueError(f"it has format {version}; this version of fastmaf reads formats up to {FORMAT}: update fastmaf")
    members = record.pop("ensemble", None)
    _keys("the metadata", record, _KEYS)
    decoder = _Decoder(tensors, str(record["dtype"]), members is not None)
    flow = Flow(
        decoder.decode("tuple[FlowLayer, ...]", record["layers"], "layers"),
        decoder.decode("FlowLayer", record["base"], "base"),
        features=decoder.decode("int", record["features"], "features"),
        context_features=decoder.decode("int", record["context_features"], "context_features"),
        context_layers=decoder.decode("tuple[FlowLayer, ...]", record["context_layers"], "context_layers"),
        dtype=record["dtype"],
        names=decoder.decode("tuple[str, ...] | None", record["names"], "names"),
        training=_object("training", record["training"]),
    )
    result: Flow | Ensemble = flow
    if members is not None:
        _keys("ensemble", _object("ensemble", members), _MEMBERS)
        if decoder.unmasked is None:
            raise ValueError("it has members, but no network")
        result = Ensemble(flow, decoder.unmasked, *(decoder.tensor(members[name], f"ensemble.{name}", None) for name in _MEMBERS))
        _check_members(result)
    if tensors:
        raise ValueError(f"no layer has the tensor {_words.shown(min(tensors))}")
    return result


def _check_members(ensemble: Ensemble) -> None:
    """All members are such as the first one is, which was made already."""
    if ensemble.ranks.min() < 1:
        raise ValueError("ensemble: ranks must be positive")
    pieces = np.split(ensemble.degrees, np.cumsum([dense.bias.size for dense in ensemble.conditioner.hidden]), axis=1)
    number = 0
    for block in ensemble.conditioner.blocks:
        before, number = number, number + len(block.maps)
        if block.residual and (pieces[number] < pieces[before]).any():
            raise ValueError("ensemble: the degrees of a member add units to others of higher degree")


# Checkpoints

CHECKPOINT, PREFIX = "fastmaf_checkpoint", "checkpoint."
"""The metadata key of a checkpoint, and how the names of its own tensors begin."""


def checkpoint_bytes(best: Flow | Ensemble, state: Mapping[str, Any], arrays: Mapping[str, Array]) -> bytes:
    """The bytes of a checkpoint.

    Parameters
    ----------
    best : Flow or Ensemble
        What `load` gives.
    state : mapping
        For JSON.
    arrays : mapping of str to array
        Of float32, float64 or int64.
    """
    tensors, metadata = _encoded(best)
    tensors |= {PREFIX + name: array for name, array in arrays.items()}
    return _container.write(tensors, metadata | {CHECKPOINT: json.dumps(state, allow_nan=False)}, digest=True)


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Array]]:
    """State and arrays of a checkpoint.

    Raises
    ------
    ValueError
        If it is none, or is damaged.
    OSError
        If the file cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read()
    with reading_checkpoint(path):
        tensors, metadata = _container.read(data)
        if CHECKPOINT not in metadata:
            raise ValueError(f"it has no metadata {CHECKPOINT!r}")
        state = _object("its state", _container.parse(metadata[CHECKPOINT], "its metadata"))
    return state, {name[len(PREFIX) :]: array for name, array in tensors.items() if name.startswith(PREFIX)}


def reading_checkpoint(path: Any) -> AbstractContextManager[None]:
    """Where arrays of a checkpoint are taken apart: an error there names the file."""
    return _reading(path, "a checkpoint")


def expect(arrays: Mapping[str, Array], name: str, shape: tuple[int, ...] | None, dtype: DTypeLike | None) -> Array:
    """An array of a checkpoint, of this shape (any vector, if None) and dtype (any float, if None); a copy.

    Raises
    ------
    ValueError
        If it is absent or has another shape or dtype.
    """
    array = arrays.get(name)
    if array is None:
        raise ValueError(f"it lacks {_words.shown(name)}")
    fits = array.ndim == 1 if shape is None else array.shape == shape
    if not fits or (array.dtype.kind != "f" if dtype is None else array.dtype != dtype):
        raise ValueError(f"{_words.shown(name)} has shape {_words.shapes(array.shape)} and dtype {array.dtype}, which do not fit")
    return np.array(array)


class _Decoder:
    """From JSON and tensors to the classes of `fastmaf.layers`, guided by the annotations of their fields."""

    def __init__(self, tensors: dict[str, Array], dtype: str, ensemble: bool = False) -> None:
        self.tensors, self.ensemble = tensors, ensemble
        self.unmasked: _layers.Conditioner | None = None  # the network of an ensemble
        self.weights = {"float32": _container.CODES["F32"], "float64": _container.CODES["F64"]}.get(dtype)
        if self.weights is None:
            raise ValueError(f"its dtype is {_words.shown(dtype)}")

    def decode(self, kind: str, node: Any, path: str, owner: type | None = None) -> Any:
        """The value that a node stands for, given the annotation of its field."""
        if kind.endswith(" | None"):
            return None if node is None else self.decode(kind[:-7], node, path, owner)
        if kind.startswith("tuple["):
            if not isinstance(node, list):
                raise ValueError(f"{path} must be a list")
            return tuple(self.decode(kind[6:-6], item, f"{path}.{k}", owner) for k, item in enumerate(node))
        if kind == "Array":
            return self.tensor(node, path, owner)
        if kind == "Mapping[str, float]":
            return {key: self.decode("float", value, f"{path}.{key}") for key, value in _object(path, node).items()}
        if kind in _SCALARS:
            if not _is(node, *_SCALARS[kind]) or (kind == "float" and not math.isfinite(node)) or (kind == "int" and abs(node) >= 2**63):
                raise ValueError(f"{path} is {_words.shown(node)}; it must be a{' finite' * (kind == 'float')} {kind}")
            return node
        return self.record(kind, node, path)

    def tensor(self, node: Any, path: str, owner: type | None) -> Array:
        if node != path or path not in self.tensors:
            raise ValueError(f"the tensor {_words.shown(path)} is missing")
        array = self.tensors.pop(path)
        integers = path.rsplit(".", 1)[-1] in _INTEGER_FIELDS
        dtype = _container.CODES["I64"] if integers else _container.CODES["F64"] if owner in _DOUBLE_RECORDS else self.weights
        if array.dtype != dtype:
            raise ValueError(f"tensor {_words.shown(path)} has dtype {array.dtype}; it must have {dtype}")
        return array

    def record(self, kind: str, node: Any, path: str) -> Any:
        node = dict(_object(path, node))
        name = node.pop("type", None)
        allowed = _RECORDS if kind == "FlowLayer" else {kind: _PARTS[kind]}
        if not isinstance(name, str) or name not in allowed:
            raise ValueError(f"{path} has type {_words.shown(name)}; this version of fastmaf knows {', '.join(allowed)}")
        cls = allowed[name]
        for field, value in _LATER.get(cls, {}).items():
            node.setdefault(field, value)
        _keys(path, node, [f.name for f in fields(cls)])
        values = {f.name: self.decode(str(f.type), node[f.name], f"{path}.{f.name}", cls) for f in fields(cls)}
        try:
            if self.ensemble and "conditioner" in values:
                self.unmasked = values["conditioner"]
                categories = values["categories"] if values.get("conditional") == "categorical" else ()
                values["conditioner"] = masked(self.unmasked, values["ranks"], categories)
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


_SCALARS: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}


def _is(value: Any, *types: type) -> bool:
    """Whether the value is of one of the types; a bool is no number."""
    return isinstance(value, types) and (not isinstance(value, bool) or bool in types)


def _object(name: str, node: Any) -> dict[str, Any]:
    if not isinstance(node, dict):
        raise ValueError(f"{name} is not a JSON object")
    return node


def _keys(path: str, node: dict[str, Any], expected: Any) -> None:
    if set(node) != set(expected):
        wrong = sorted(set(node) ^ set(expected))[0]
        raise ValueError(f"{path} {'lacks' if wrong in expected else 'has an unknown field'} {_words.shown(wrong)}")
