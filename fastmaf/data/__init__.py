"""Data: files of columns, and galaxies that come with the package."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import os

    from fastmaf.data._chunks import collect
    from fastmaf.data._source import Table, open_table

__all__ = ["Table", "collect", "galaxies", "open_table", "read"]


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


def read(
    source: str | os.PathLike[str] | IO[bytes], columns: Sequence[str] | None = None, *, missing: str = "refuse", **options: Any
) -> tuple[NDArray[Any], tuple[str, ...]]:
    r"""Read columns of a file: what the command ``fastmaf fit`` reads, for `Flow.fit`.

    Parameters
    ----------
    source, **options
        As in `open_table`.
    columns : sequence of str, optional
        By name, or by number where the file has no names; `Table.usual` if None.
    missing : {"refuse", "drop", "keep"}
        What becomes of rows with missing values; kept, they have NaN there.

    Returns
    -------
    x : (n, k) array
    names : tuple of str
        One for each column.

    Raises
    ------
    ValueError
        If a column is missing or holds no numbers, values are missing, or the file is damaged.
    OSError
        If it cannot be read.

    Examples
    --------
    >>> import io
    >>> x, names = read(io.BytesIO(b"name,z,r\na,1,2\nb,3,\n"), ["r", "z"], missing="drop")
    >>> x.tolist(), names
    ([[2.0, 1.0]], ('r', 'z'))
    """
    from fastmaf import _words
    from fastmaf.data import _source

    if missing not in (allowed := ("refuse", "drop", "keep")):
        raise ValueError(_words.one_of("missing", missing, allowed))
    with _source.open_table(source, **options) as table:
        chosen = table.choose(table.usual if columns is None else columns)
        return _source.whole(_source.Complete(table.chunks(chosen), table.name, chosen, missing), chosen, table.rows), chosen


def __getattr__(name: str) -> Any:
    """What takes time to import, when it is first asked for."""
    if name in ("Table", "open_table"):
        from fastmaf.data import _source

        return getattr(_source, name)
    if name == "collect":
        from fastmaf.data import _chunks

        return _chunks.collect
    raise AttributeError(f"module 'fastmaf.data' has no attribute {name!r}")
