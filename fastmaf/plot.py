"""Pictures of a fitted flow, made with matplotlib (``pip install 'fastmaf[plot]'``).

Each function draws into a new figure, or into the (sub)figure that it is given, and returns it; nothing is shown or saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastmaf import _arrays, _tables, _words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

__all__ = ["corner", "noise", "redshift"]

Array = NDArray[Any]

DATA, FLOW, INK, QUIET = "#0072B2", "#D55E00", "#222222", "#8A8A8A"
"""Blue and vermilion of Okabe and Ito, which colour-blind readers tell apart, and two greys."""

FILLED: dict[str, Any] = {"density": True, "histtype": "stepfilled", "color": DATA, "alpha": 0.35, "linewidth": 0}
GRID = {"left": 0.085, "right": 0.985, "bottom": 0.085, "top": 0.985, "wspace": 0.06, "hspace": 0.06}

MASS = (0.5, 0.8, 0.95, 0.99)
"""Share of the rows inside each contour."""


def _figure(figure: FigureBase | None, width: float, height: float) -> FigureBase:
    try:
        from matplotlib.figure import Figure, FigureBase
    except ImportError as error:
        raise ImportError(f"fastmaf.plot needs matplotlib ({error}); to get it: pip install 'fastmaf[plot]'") from None
    if figure is not None and not isinstance(figure, FigureBase):
        raise ValueError(f"figure is {_words.shown(figure)}; it must be a Figure or SubFigure of matplotlib, or None")
    return Figure(figsize=(width, height), dpi=120) if figure is None else figure


def _table(name: str, value: ArrayLike, columns: int | None = None, names: Sequence[str] | None = None) -> Array:
    """Finite rows (n, D) in float64; of a data frame the columns of these names, if there are any."""
    array = _arrays.real(name, value, names=names).astype(np.float64)
    if array.ndim != 2 or (columns is not None and array.shape[1] != columns):
        raise ValueError(f"{name} has shape {_words.shapes(array.shape)}; it must be (n, {'D' if columns is None else columns})")
    array = array[np.isfinite(array).all(axis=1)]
    if not len(array):
        raise ValueError(f"{name} has no finite rows")
    return array


def _legend(figure: FigureBase, columns: int, *words: str) -> None:
    """Words in ink, blue and vermilion, one below the other, in the upper right of a grid, which is empty."""
    for k, (text, colour) in enumerate(zip(words, (INK, DATA, FLOW), strict=True)):
        if columns > 1:
            figure.text(0.98, 0.98, "\n" * k + text, ha="right", va="top", fontsize=10, color=colour, linespacing=1.5)


def _labels(names: Sequence[str] | None, columns: int, letter: str) -> Sequence[str]:
    if names is not None and (isinstance(names, str) or not np.iterable(names)):
        raise ValueError(f"names is {_words.shown(names)}; it must be a sequence of strings")
    if names is not None and len(names) != columns:
        raise ValueError(f"names lists {len(names)} names; there are {columns} columns")
    return names if names is not None else [f"${letter}_{{{j + 1}}}$" for j in range(columns)]


def _density(x: Array, y: Array, x_edges: Array, y_edges: Array, blur: float = 1.2) -> Array:
    """A histogram of mass 1 over (y, x), smoothed by a Gaussian of `blur` bins."""
    counts = np.histogram2d(y, x, (y_edges, x_edges))[0]
    reach = math.ceil(3 * blur)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / blur) ** 2)
    for axis in (0, 1):
        counts = np.apply_along_axis(np.convolve, axis, counts, kernel, mode="same")
    density: Array = counts / max(counts.sum(), 1e-300)
    return density


def _levels(density: Array) -> list[float]:
    """Heights of the contours that hold `MASS`, from low to high."""
    heights = np.sort(density.ravel())[::-1]
    held = np.cumsum(heights)
    return sorted({float(heights[min(int(np.searchsorted(held, mass)), heights.size - 1)]) for mass in MASS})


def _frame(axes: Axes, left: bool, bottom: bool, ticks: int = 3) -> None:
    """Thin grey frame, few ticks, and labels only where the grid ends."""
    from matplotlib.ticker import MaxNLocator

    for spine in axes.spines.values():
        spine.set(color=QUIET, linewidth=0.6)
    axes.tick_params(length=2.5, width=0.6, labelsize=8, color=QUIET, labelcolor=INK, labelleft=left, labelbottom=bottom)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, prune="both"))
    axes.yaxis.set_major_locator(MaxNLocator(ticks, prune="both"))


def _histogram(axes: Axes, values: Array, edges: Array, **options: Any) -> None:
    """Of the values within the edges; a word where there are none."""
    inside = values[(values >= edges[0]) & (values <= edges[-1])]
    if inside.size:
        axes.hist(inside, edges.tolist(), **options)
    else:
        axes.text(0.5, 0.5, "all outside", transform=axes.transAxes, ha="center", va="center", fontsize=7, color=options["color"])


def corner(data: ArrayLike, samples: ArrayLike, names: Sequence[str] | None = None, figure: FigureBase | None = None) -> FigureBase:
    """Data against samples of a flow: all pairs of columns, and histograms of each.

    Filled blue is the data, vermilion lines are the samples. Contours hold 50, 80, 95 and 99 per cent of the rows.

    Parameters
    ----------
    data, samples : (n, D), (m, D) arrays or data frames
        Rows that are not finite are left out.
    names : sequence of str, optional
        One label per column; those of `data` where it is a data frame. By them the columns of `samples` are taken, if that is one too.
    figure : Figure or SubFigure, optional
        Where to draw; a new figure if None.

    Returns
    -------
    Figure or SubFigure
        With D (D + 1) / 2 axes.

    Raises
    ------
    ValueError
        If the shapes or the number of names do not fit.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(2, 1000, 3))
    >>> len(corner(x[0], x[1]).axes)
    6
    """
    own = _tables.names_of(data)
    data = _table("data", data)
    columns = data.shape[1]
    samples, names = _table("samples", samples, columns, own), own if names is None else names
    names = _labels(names, columns, "x")
    figure = _figure(figure, 1.4 * columns + 0.6, 1.4 * columns + 0.6)
    low, high = np.quantile(data, [0.001, 0.999], axis=0)
    margin = 0.06 * (high - low) + 1e-12
    edges = [np.linspace(a, b, 61) for a, b in zip(low - margin, high + margin, strict=True)]
    centres = [0.5 * (edge[1:] + edge[:-1]) for edge in edges]
    grid = figure.subplots(columns, columns, squeeze=False, gridspec_kw=GRID)
    for i in range(columns):
        for j in range(columns):
            axes = grid[i, j]
            if j > i:
                axes.remove()
                continue
            axes.set_xlim(edges[j][0], edges[j][-1])
            if i == j:
                _histogram(axes, data[:, j], edges[j], **FILLED)
                _histogram(axes, samples[:, j], edges[j], density=True, histtype="step", color=FLOW, linewidth=1.2)
            else:
                for rows, filled in ((data, True), (samples, False)):
                    density = _density(rows[:, j], rows[:, i], edges[j], edges[i])
                    if not density.any():
                        continue
                    levels = _levels(density)
                    if filled:
                        shades = [_shade(DATA, 0.25 + 0.6 * k / len(levels)) for k in range(len(levels))]
                        axes.contourf(centres[j], centres[i], density, [*levels, density.max() * 1.001], colors=shades)
                    else:
                        axes.contour(centres[j], centres[i], density, levels, colors=FLOW, linewidths=0.8)
                axes.set_ylim(edges[i][0], edges[i][-1])
            _frame(axes, left=j == 0 and i > 0, bottom=i == columns - 1)
            if i == j:
                axes.set_yticks([])
            if i == columns - 1:
                axes.set_xlabel(names[j], fontsize=10, color=INK)
            if j == 0 and i > 0:
                axes.set_ylabel(names[i], fontsize=10, color=INK)
    figure.align_labels()
    _legend(figure, columns, "data space", "data", "samples")
    return figure


def _shade(colour: str, strength: float) -> tuple[float, ...]:
    """A colour mixed with white."""
    parts = np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    return tuple(1 - strength * (1 - parts))


def noise(u: ArrayLike, names: Sequence[str] | None = None, figure: FigureBase | None = None) -> FigureBase:
    """The noise that data become under a flow, which should be N(0, I): uncorrelated, round, and normal in each column.

    Filled blue is the noise; the vermilion lines are the standard normal density, and circles that should hold 50, 80, 95 and 99 per cent.
    Columns without a row within 3.6 of zero say so.

    Parameters
    ----------
    u : (n, D) array
        From `Flow.to_noise`.
    names : sequence of str, optional
        One label per column.
    figure : Figure or SubFigure, optional
        Where to draw; a new figure if None.

    Returns
    -------
    Figure or SubFigure
        With D (D + 1) / 2 axes.

    Raises
    ------
    ValueError
        If the shape or the number of names does not fit.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> import numpy as np
    >>> len(noise(np.random.default_rng(0).normal(size=(1000, 2))).axes)
    3
    """
    u = _table("u", u)
    columns = u.shape[1]
    names = _labels(names, columns, "u")
    figure = _figure(figure, 0.9 * columns + 0.6, 0.9 * columns + 0.6)
    edges = np.linspace(-3.6, 3.6, 49)
    centres = 0.5 * (edges[1:] + edges[:-1])
    angle = np.linspace(0, 2 * np.pi, 97)
    grid = figure.subplots(columns, columns, squeeze=False, gridspec_kw=GRID)
    for i in range(columns):
        for j in range(columns):
            axes = grid[i, j]
            if j > i:
                axes.remove()
                continue
            axes.set_xlim(edges[0], edges[-1])
            if i == j:
                _histogram(axes, u[:, j], edges, **FILLED)
                axes.plot(centres, np.exp(-0.5 * centres**2) / math.sqrt(2 * math.pi), color=FLOW, linewidth=1.0)
            else:
                density = _density(u[:, j], u[:, i], edges, edges)
                if density.any():
                    levels = _levels(density)
                    shades = [_shade(DATA, 0.2 + 0.55 * k / len(levels)) for k in range(len(levels))]
                    axes.contourf(centres, centres, density, [*levels, density.max() * 1.001], colors=shades)
                for mass in MASS:
                    radius = math.sqrt(-2 * math.log(1 - mass))
                    axes.plot(radius * np.cos(angle), radius * np.sin(angle), color=FLOW, linewidth=0.7)
                axes.set_ylim(edges[0], edges[-1])
            _frame(axes, left=False, bottom=False)
            axes.set(xticks=[], yticks=[])
            if i == columns - 1:
                axes.set_xlabel(names[j], fontsize=9, color=INK)
            if j == 0 and i > 0:
                axes.set_ylabel(names[i], fontsize=9, color=INK)
    figure.align_labels()
    _legend(figure, columns, "noise space", "data", "N(0, I)")
    return figure


def redshift(
    truth: ArrayLike, estimate: ArrayLike, pit: ArrayLike | None = None, note: str | None = None, figure: FigureBase | None = None
) -> FigureBase:
    """Estimated redshifts against true ones, and their errors; dashed, the bounds beyond which an estimate counts as an outlier.

    Parameters
    ----------
    truth, estimate : (n,) arrays
    pit : (n,) array, optional
        Probability that the estimated distribution gives to redshifts below the true one: uniform if it is calibrated. Drawn in a corner.
    note : str, optional
        A few words for the upper left corner.
    figure : Figure or SubFigure, optional
        Where to draw; a new figure if None.

    Returns
    -------
    Figure or SubFigure

    Raises
    ------
    ValueError
        If the shapes differ.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> import numpy as np
    >>> z = np.linspace(0.1, 2, 500)
    >>> len(redshift(z, z + 0.01).axes)
    2
    """
    if np.ndim(truth) != 1 or np.shape(truth) != np.shape(estimate):
        raise ValueError(f"truth has shape {np.shape(truth)}, estimate {np.shape(estimate)}; both must be (n,)")
    if pit is not None:
        pit = _table("pit", _arrays.real("pit", pit)[..., None], 1)
    both = _table("truth and estimate", np.column_stack([_arrays.real("truth", truth), _arrays.real("estimate", estimate)]))
    error = (both[:, 1] - both[:, 0]) / (1 + both[:, 0])
    figure = _figure(figure, 5.0, 5.2)
    upper, lower = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"left": 0.15, "right": 0.97, "bottom": 0.11, "top": 0.97, "hspace": 0.05, "height_ratios": (3, 1)}
    )
    top = 1.04 * float(np.quantile(both[:, 0], 0.9995))
    line = np.array([0.0, top])
    reach = max(6 * float(np.median(np.abs(error))), 1e-3)
    for axes, y in ((upper, both[:, 1]), (lower, error)):
        axes.plot(both[:, 0], y, ".", color=DATA, markersize=2, alpha=0.3, markeredgewidth=0, rasterized=True)
        _frame(axes, left=True, bottom=axes is lower, ticks=5)
    upper.plot(line, line, color=FLOW, linewidth=0.8)
    for sign in (-1, 1):
        upper.plot(line, line + sign * 0.15 * (1 + line), color=FLOW, linewidth=0.8, linestyle=(0, (4, 3)))
    lower.axhline(0, color=FLOW, linewidth=0.8)
    upper.set(xlim=(0, top), ylim=(0, top))
    lower.set(ylim=(-reach, reach))
    upper.set_ylabel("estimated redshift", fontsize=10, color=INK)
    lower.set_ylabel("error / (1 + z)", fontsize=10, color=INK)
    lower.set_xlabel("true redshift z", fontsize=10, color=INK)
    if note is not None:
        upper.text(0.03, 0.97, note, transform=upper.transAxes, va="top", fontsize=9, color=INK, linespacing=1.5)
    if pit is not None:
        small = upper.inset_axes((0.66, 0.12, 0.31, 0.22))
        small.hist(pit[:, 0], np.linspace(0, 1, 21).tolist(), **FILLED)
        small.axhline(1, color=FLOW, linewidth=0.8)
        _frame(small, left=False, bottom=True)
        small.set(xlim=(0, 1), ylim=(0, 2), xticks=[0, 1], yticks=[])
        small.set_title("PIT", fontsize=8, color=INK, pad=2)
    figure.align_labels()
    return figure
