"""The file from which a fit goes on: the best flow so far, which `fastmaf.load` reads, and all that the next epochs depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmaf import _codec, _files, _words
from fastmaf.layers import Elementwise
from fastmaf.record import FlowRecord
from fastmaf.train.data import Rows, digest
from fastmaf.train.ranks import ALONE, Ranks

__all__ = ["Store", "fingerprint"]

Array = NDArray[Any]
Path = str | os.PathLike[str]


class Store(NamedTuple):
    """The checkpoint file of a fit, and what tells this fit from others."""

    path: Path
    fingerprint: dict[str, Any]

    def save(self, best: FlowRecord, members: _codec.Members | None, arrays: Mapping[str, Array]) -> None:
        """Write the file under a temporary name, then rename it."""
        _files.write(self.path, _codec.checkpoint_bytes(best, members, self.fingerprint, dict(arrays)))

    def load(self, resume: bool) -> dict[str, Array]:
        """Return the arrays of the file; none where there is no file. A new fit replaces none: hours of another one may be in it."""
        if not os.path.exists(self.path):
            return {}
        name, remedy = os.path.basename(self.path), "name another file for the checkpoint, or move that one away"
        try:
            written, arrays = _codec.read_checkpoint(self.path)
        except ValueError as error:
            if resume:
                raise
            raise ValueError(f"checkpoint {_words.shown(name)} exists and is no checkpoint of a fit; {remedy}") from error
        if not resume:
            raise ValueError(f"checkpoint {_words.shown(name)} exists; pass resume=True to go on from it, or {remedy}")
        for key, value in self.fingerprint.items():
            if (old := written.get(key)) != value:
                values = "" if key.startswith("the ") else f": {_words.shown(old)} there, {_words.shown(value)} here"
                raise ValueError(f"checkpoint {self.path} belongs to another fit: it differs in {key}{values}")
        return arrays


def seed_of(path: Path | None, resume: bool) -> int | None:
    """The seed of the fit that a checkpoint goes on with, if there is one."""
    if path is None or not resume or not os.path.exists(path):
        return None
    seed = _codec.read_checkpoint(path)[0].get("seed")
    return seed if isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**64 else None


def fingerprint(
    record: FlowRecord,
    backend: str,
    settings: Mapping[str, Any],
    train: Rows,
    held: Rows | None,
    members: Sequence[FlowRecord] | None,
    redrawn: bool,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """What a resumed fit must have in common with the interrupted one; where all ranks hold the same rows, not how many they are."""
    stopping = {"patience", "max_seconds"} | ({"max_epochs"} if settings["schedule"] != "cosine" else set())
    result = {name: value for name, value in settings.items() if name not in stopping}
    result["backend"] = backend
    shape = [str(record.dtype), _shape_of(record.layers), _shape_of(record.context_layers), _shape_of(record.base)]
    if members is not None:
        shape += [[_shape_of((*member.layers, member.base)) for member in members], redrawn]
    result["the flow"] = hashlib.sha256(json.dumps(shape).encode()).hexdigest()
    given = held[:3] if held is not None and settings["validation"] == "given" else ()
    for name, arrays in (("x", train[:1]), ("context", train[1:2]), ("weights", train[2:3]), ("validation", given)):
        parts = ranks.gather(digest(*arrays))
        result[f"the data ({name})"] = parts[0] if len(set(parts)) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()
    return result


def _shape_of(record: Any) -> Any:
    """What the training of a layer leaves as it is, for JSON."""
    if isinstance(record, np.ndarray):
        return [*record.shape] if record.dtype.kind == "f" else record.tolist()
    if isinstance(record, Elementwise):
        return [record.kinds, record.lower.tolist(), record.upper.tolist()]
    if isinstance(record, tuple):
        return [_shape_of(item) for item in record]
    if is_dataclass(record):
        return [type(record).__name__, *(_shape_of(getattr(record, f.name)) for f in fields(record))]
    return dict(record) if isinstance(record, Mapping) else record
