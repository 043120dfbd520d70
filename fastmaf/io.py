"""Reading flows and ensembles; `fastmaf._codec` has the format."""

from __future__ import annotations

import os
from typing import IO, Any

import numpy as np

from fastmaf import _codec, _files, _words
from fastmaf.ensemble import Ensemble
from fastmaf.flow import Flow
from fastmaf.masked_ensemble import MaskedEnsemble
from fastmaf.record import FlowRecord

__all__ = ["load"]


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
        name, data = _words.cut(os.fsdecode(source), 200), _files.read("source", source)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        name, data = "the data", bytes(source)
    elif callable(getattr(source, "read", None)):
        name, data = str(getattr(source, "name", "the file")), source.read()
        if not isinstance(data, bytes):
            raise ValueError(f"{name} gives {type(data).__name__}, not bytes; open it in binary mode")
    else:
        raise ValueError(f"source is {_words.shown(source)}; it must be a path, a binary file or bytes")
    with _codec.reading(name, "a flow"):
        return _revived(*_codec.from_bytes(data))


def _revived(record: FlowRecord, members: _codec.Members | tuple[FlowRecord, ...] | None) -> Flow | Ensemble:
    flow = Flow._of(record)
    if members is None:
        return flow
    if not isinstance(members, _codec.Members):
        return Ensemble([flow, *map(Flow._of, members)])
    result = MaskedEnsemble(flow, *members)
    _check_members(result)
    return result


def _check_members(ensemble: MaskedEnsemble) -> None:
    """All members are such as the first one is, which was made already."""
    if ensemble.ranks.min() < 1:
        raise ValueError("ensemble: ranks must be positive")
    pieces = np.split(ensemble.degrees, np.cumsum([dense.bias.size for dense in ensemble.conditioner.hidden]), axis=1)
    number = 0
    for block in ensemble.conditioner.blocks:
        before, number = number, number + len(block.maps)
        if block.residual and (pieces[number] < pieces[before]).any():
            raise ValueError("ensemble: the degrees of a member add units to others of higher degree")
