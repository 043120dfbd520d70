"""Flows of other libraries: in by ``from_*``, out by ``to_zuko``.

Every importer gives a `fastmaf.Flow` in terms of the layer record, exactly: it folds what can be folded, refuses by name what the record
cannot express, and at its end compares the log-densities of the library and of the flow on random rows.  The libraries themselves are
imported by their own importer alone; a state dict needs none of them.

>>> import fastmaf.interop
>>> "from_zuko" in dir(fastmaf.interop)
True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmaf.interop._common import ImportMismatchError
    from fastmaf.interop.flowjax import from_flowjax
    from fastmaf.interop.nflows import embed, from_nflows
    from fastmaf.interop.normflows import from_normflows
    from fastmaf.interop.pyro import from_pyro
    from fastmaf.interop.sbi import from_sbi
    from fastmaf.interop.zuko import from_zuko, to_zuko

__all__ = [
    "ImportMismatchError",
    "embed",
    "from_flowjax",
    "from_nflows",
    "from_normflows",
    "from_pyro",
    "from_sbi",
    "from_zuko",
    "to_zuko",
]

_HOMES = {name: name.removeprefix("from_").removeprefix("to_") for name in __all__} | {"ImportMismatchError": "_common", "embed": "nflows"}


def __getattr__(name: str) -> Any:
    """An importer, when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fastmaf.interop' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastmaf.interop.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
