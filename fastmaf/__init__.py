"""fastmaf: masked autoregressive flows at the speed of the hardware.

>>> import fastmaf
>>> flow = fastmaf.MAF(features=7)
>>> flow.sample(1000, seed=1).shape
(1000, 7)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastmaf import _start

if _start.is_command():
    _start.interrupt_quietly()  # in front of what takes time to import

from fastmaf import backends

if (_folder := backends.in_source_tree_without_core()) is not None and not backends.pure():
    raise ImportError(
        f"the source tree of fastmaf, {_folder}, has no compiled core: pip install . and run Python in another folder, "
        f"or pip install -e . ({backends.PURE}=1 goes without, many times slower)"
    )

from fastmaf import layers, masks, presets
from fastmaf.backends import get_backend, set_backend
from fastmaf.config import get_num_threads, num_threads, set_isa, set_num_threads, show_config, version
from fastmaf.ensemble import Ensemble
from fastmaf.export import export_c
from fastmaf.flow import Flow
from fastmaf.handle import Handle
from fastmaf.io import load
from fastmaf.made import MADE
from fastmaf.maf import MAF
from fastmaf.masked_ensemble import MaskedEnsemble

if TYPE_CHECKING:
    from fastmaf import data, interop, plot, stats, train
    from fastmaf.interop import from_flowjax, from_nflows, from_normflows, from_pyro, from_sbi, from_zuko
    from fastmaf.train import FitWarning, History

__all__ = [
    "MADE",
    "MAF",
    "Ensemble",
    "FitWarning",
    "Flow",
    "Handle",
    "History",
    "MaskedEnsemble",
    "data",
    "export_c",
    "from_flowjax",
    "from_nflows",
    "from_normflows",
    "from_pyro",
    "from_sbi",
    "from_zuko",
    "get_backend",
    "get_num_threads",
    "interop",
    "layers",
    "load",
    "masks",
    "num_threads",
    "plot",
    "presets",
    "set_backend",
    "set_isa",
    "set_num_threads",
    "show_config",
    "stats",
    "train",
]

__version__ = version()

_MODULES = ("data", "interop", "plot", "stats", "train")
_OPTIONAL = ("dask", "jax", "sklearn", "torch")  # which import other packages
_IMPORTERS = tuple(name for name in __all__ if name.startswith("from_"))


def __getattr__(name: str) -> Any:
    """Modules that take time to import, when they are first asked for."""
    if name in ("FitWarning", "History"):
        return getattr(importlib.import_module("fastmaf.train"), name)
    if name in _IMPORTERS:
        return getattr(importlib.import_module("fastmaf.interop"), name)
    if name in _MODULES or name in _OPTIONAL:
        return importlib.import_module(f"fastmaf.{name}")
    raise AttributeError(f"module 'fastmaf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
