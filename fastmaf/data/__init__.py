"""Data that comes with the package."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["galaxies"]


def galaxies() -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """Redshift and six magnitudes of 60,000 simulated galaxies.

    A subset of the example data of pzflow, from the Buzzard simulation (DeRose et al. 2019); see ``ATTRIBUTION.md`` beside the file.
    Rows are in random order. The conditional density of redshift given the magnitudes is the photometric-redshift problem.

    Returns
    -------
    x : (60000, 7) float32 array
        Finite, without duplicate rows; redshifts lie in (0, 2.3).
    names : tuple of str
        ``("redshift", "u", "g", "r", "i", "z", "y")``: apparent magnitudes in the bands of LSST.

    Examples
    --------
    >>> x, names = galaxies()
    >>> x.shape, names[0]
    ((60000, 7), 'redshift')
    """
    with files(__name__).joinpath("galaxies.npz").open("rb") as file, np.load(file) as archive:
        x: NDArray[Any] = archive["x"]
        return x, tuple(str(name) for name in archive["names"])
