"""Records as the bytes of files: one flow is one .safetensors file.

Tensors go by the path of their place in the record (``layers.1.conditioner.initial.weight``).  The metadata key ``fastmaf`` is JSON that
spells out the record itself: every layer with its ``type`` and its fields, an array standing as the name of its tensor, an absent one as
null.  Reading follows the fields of the classes in `fastmaf.layers`; a tensor is used once, and none may be left over.

The checkpoint of a fit is such a file of the best flow so far, with more tensors and another metadata key, which those of flows pass over.

An ensemble of masks is written as its first member, whose network has all weights instead of those that its masks leave, and under
``ensemble`` the ranks and degrees of all members. One of independent flows is ``flows``, a list of such objects, whose tensors begin with
``flows.0.`` and so on; it has format 2.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastmaf import _container, _files, _words
from fastmaf import layers as _layers
from fastmaf._networks import masked
from fastmaf.record import FlowRecord, plain

__all__ = ["FORMAT", "Members", "checkpoint_bytes", "expect", "from_bytes", "read_checkpoint", "reading", "reading_checkpoint", "to_bytes"]

Array = NDArray[Any]

FORMAT = 2
"""The newest version of the format that is read. Each file is written in the oldest that can hold it."""

_INTEGER_FIELDS = ("ranks", "perm", "degrees")
_DOUBLE_RECORDS = (_layers.Elementwise, _layers.Affine)
_KEYS = ("dtype", "features", "context_features", "names", "context_layers", "layers", "base", "training")
_MEMBERS = ("ranks", "degrees")
_RECORDS = {cls.__name__: cls for cls in (*get_args(_layers.FlowLayer), _layers.Normal, _layers.Terminal)}
_LATER: dict[type, dict[str, Any]] = {_layers.BatchNorm: {"statistics": "batch"}, _layers.Conditioner: {"input_clip": None}}
"""Fields that older files lack, and what they mean then."""
_PARTS = {cls.__name__: cls for cls in (_layers.Conditioner, _layers.Block, _layers.Dense, _layers.Law)}


class Members(NamedTuple):
    """What an ensemble has beside the record of its first member: its network with all weights, and the masks of each member."""

    conditioner: _layers.Conditioner
    ranks: Array
    degrees: Array


@contextmanager
def reading(name: Any, what: str) -> Iterator[None]:
    """Say of what is wrong with contents whose they are."""
    try:
        yield
    except (ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"{name} cannot be read as {what}: {error}") from None


def to_bytes(record: FlowRecord, members: Members | tuple[FlowRecord, ...] | None = None, digest: bool = True) -> bytes:
    """The bytes of the file of a flow or an ensemble, with or without the digest of its tensors.

    The record is that of the flow or of the first member; `members` are the masks of all, or the records of the others.
    """
    return _container.write(*_encoded(record, members), digest)


def _encoded(record: FlowRecord, members: Members | tuple[FlowRecord, ...] | None) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors of a flow or an ensemble, and the metadata."""
    tensors: dict[str, Array] = {}
    tree: dict[str, Any]
    if members is None or isinstance(members, Members):
        tree = {"format": 1, **_tree(record, "", tensors)}
        if members is not None:
            _encode(members.conditioner, _network(record), tensors)
            tree["ensemble"] = {name: _encode(getattr(members, name), f"ensemble.{name}", tensors) for name in _MEMBERS}
    else:
        tree = {"format": 2, "flows": [_tree(each, f"flows.{k}.", tensors) for k, each in enumerate((record, *members))]}
    return tensors, {"fastmaf": json.dumps(tree, allow_nan=False)}


def _tree(record: FlowRecord, prefix: str, tensors: dict[str, Array]) -> dict[str, Any]:
    """A flow as an object of JSON, its arrays among the tensors."""
    return {
        "dtype": record.dtype.name,
        "features": record.features,
        "context_features": record.context_features,
        "names": record.names,
        "context_layers": _encode(record.context_layers, f"{prefix}context_layers", tensors),
        "layers": _encode(record.layers, f"{prefix}layers", tensors),
        "base": _encode(record.base, f"{prefix}base", tensors),
        "training": plain(record.training),
    }


def _network(record: FlowRecord) -> str:
    """The place of the first network."""
    places = (*((f"layers.{k}", layer) for k, layer in enumerate(record.layers)), ("base", record.base))
    return next(f"{path}.conditioner" for path, own in places if isinstance(own, (_layers.Autoregressive, _layers.Terminal)))


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


def from_bytes(data: bytes) -> tuple[FlowRecord, Members | tuple[FlowRecord, ...] | None]:
    """The record of a flow, or that of an ensemble's first member with the masks of all, or the records of the others.

    Raises
    ------
    ValueError
        If the bytes are damaged, no flow, or of a newer format.
    """
    tensors, metadata = _container.read(data)
    if CHECKPOINT in metadata:
        tensors = {name: array for name, array in tensors.items() if not name.startswith(PREFIX)}
    if "fastmaf" not in metadata:
        raise ValueError("it is a safetensors file without the metadata of fastmaf")
    tree = _object("the metadata", _container.parse(metadata["fastmaf"], "its metadata"))
    version = tree.pop("format", None)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"its format is {_words.shown(version)}")
    if version > FORMAT:
        raise ValueError(f"it has format {version}; this version of fastmaf reads formats up to {FORMAT}: update fastmaf")
    members: Members | tuple[FlowRecord, ...] | None = None
    if "flows" in tree:
        _keys("the metadata", tree, ("flows",))
        trees = tree["flows"]
        if not isinstance(trees, list) or not trees:
            raise ValueError("flows must be a list of at least one flow")
        record, *others = (_record(_object(f"flows.{k}", each), f"flows.{k}.", tensors)[0] for k, each in enumerate(trees))
        members = tuple(others)
    else:
        masks = tree.pop("ensemble", None)
        record, unmasked = _record(tree, "", tensors, masks is not None)
        if masks is not None:
            _keys("ensemble", _object("ensemble", masks), _MEMBERS)
            if unmasked is None:
                raise ValueError("it has members, but no network")
            integers = _Decoder(tensors, record.dtype.name)
            members = Members(unmasked, *(integers.tensor(masks[name], f"ensemble.{name}", None) for name in _MEMBERS))
    if tensors:
        raise ValueError(f"no layer has the tensor {_words.shown(min(tensors))}")
    return record, members


def _record(
    tree: dict[str, Any], prefix: str, tensors: dict[str, Array], ensemble: bool = False
) -> tuple[FlowRecord, _layers.Conditioner | None]:
    """The record that an object of JSON stands for, and the network of an ensemble with all weights."""
    _keys(prefix.rstrip(".") or "the metadata", tree, _KEYS)
    decoder = _Decoder(tensors, str(tree["dtype"]), ensemble)

    def decoded(kind: str, name: str) -> Any:
        return decoder.decode(kind, tree[name], prefix + name)

    record = FlowRecord(
        decoded("tuple[FlowLayer, ...]", "layers"),
        decoded("FlowLayer", "base"),
        features=decoded("int", "features"),
        context_features=decoded("int", "context_features"),
        context_layers=decoded("tuple[FlowLayer, ...]", "context_layers"),
        dtype=tree["dtype"],
        names=decoded("tuple[str, ...] | None", "names"),
        training=_object(f"{prefix}training", tree["training"]),
    )
    return record, decoder.unmasked


# Checkpoints

CHECKPOINT, PREFIX = "fastmaf_checkpoint", "checkpoint."
"""The metadata key of a checkpoint, and how the names of its own tensors begin."""


def checkpoint_bytes(best: FlowRecord, members: Members | None, state: Mapping[str, Any], arrays: Mapping[str, Array]) -> bytes:
    """The bytes of a checkpoint.

    Parameters
    ----------
    best, members
        What a reader of flows finds in it.
    state : mapping
        For JSON.
    arrays : mapping of str to array
        Of float32, float64 or int64.
    """
    tensors, metadata = _encoded(best, members)
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
    data = _files.read("checkpoint", path)
    with reading_checkpoint(path):
        tensors, metadata = _container.read(data)
        if CHECKPOINT not in metadata:
            raise ValueError(f"it has no metadata {CHECKPOINT!r}")
        state = _object("its state", _container.parse(metadata[CHECKPOINT], "its metadata"))
    return state, {name[len(PREFIX) :]: array for name, array in tensors.items() if name.startswith(PREFIX)}


def reading_checkpoint(path: Any) -> AbstractContextManager[None]:
    """Where arrays of a checkpoint are taken apart: an error there names the file."""
    return reading(path, "a checkpoint")


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
                counts = _base_rows(values) if cls is _layers.Terminal else None
                values["conditioner"] = masked(self.unmasked, values["ranks"], counts)
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _base_rows(values: Mapping[str, Any]) -> Sequence[int] | None:
    """Rows of a base that is not yet made; None where all variables have equally many."""
    if values["conditional"] not in ("categorical", "mixed"):
        return None
    return _layers.rows_of(values["conditional"], values["components"], values["categories"])


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
