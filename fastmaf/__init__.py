"""fastmaf: masked autoregressive flows at the speed of the hardware.

>>> import fastmaf
>>> flow = fastmaf.MAF(features=7)
>>> flow.sample(1000, seed=1).shape
(1000, 7)
"""

from __future__ import annotations

from fastmaf import presets
from fastmaf._backends import get_backend, set_backend
from fastmaf.config import get_num_threads, num_threads, set_isa, set_num_threads, show_config, version
from fastmaf.ensemble import Ensemble
from fastmaf.flow import Flow
from fastmaf.io import load
from fastmaf.made import MADE
from fastmaf.maf import MAF

__all__ = [
    "MADE",
    "MAF",
    "Ensemble",
    "Flow",
    "get_backend",
    "get_num_threads",
    "load",
    "num_threads",
    "presets",
    "set_backend",
    "set_isa",
    "set_num_threads",
    "show_config",
]

__version__ = version()
