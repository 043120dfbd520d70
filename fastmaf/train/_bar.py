"""Progress bars."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a notebook that cannot draw bars (ipywidgets are absent) gets the one of a terminal
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
