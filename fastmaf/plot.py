"""Pictures of a fitted flow, made with matplotlib (``pip install 'fastmaf[plot]'``).

Each function draws into a new figure, or into the (sub)figure that it is given, and returns it; nothing is shown or saved.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastmaf import _arrays, _tables, _words, stats
from fastmaf.ensemble import Ensemble
from fastmaf.flow import Flow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

    from fastmaf.train import History

__all__ = ["calibration", "corner", "history", "noise", "redshift", "slices"]

Array = NDArray[Any]

DATA, FLOW, INK, QUIET = "#0072B2", "#D55E00", "#222222", "#8A8A8A"
"""Blue and vermilion of Okabe and Ito, which colour-blind readers tell apart, and two greys."""

FILLED: dict[str, Any] = {"density": True, "histtype": "stepfilled", "color": DATA, "alpha": 0.35, "linewidth": 0}
PIECES = re.compile(r"\\\$|\$[^$]*\$|\[[^\]$]*\]|\d+\.\d+\s*|[^\s_\-/.,:;$\[\\]+[\s_\-/.,:;]*|.")
"""Parts of a name that a line may end behind: mathematics, units in brackets, numbers, words with what follows them."""

GAP, EDGE, TICK, PAD = 5.0, 6.0, 2.5, 3.0
"""Points between panels, around all, of a tick, and between a tick, its label and the name of the axis."""

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
    return _weighted(name, value, None, columns, names)[0]


def _weighted(
    name: str, value: ArrayLike, weights: ArrayLike | None, columns: int | None = None, names: Sequence[str] | None = None
) -> tuple[Array, Array | None]:
    """Finite rows of positive weight, and their weights."""
    array = _arrays.real(name, value, names=names).astype(np.float64)
    if array.ndim != 2 or (columns is not None and array.shape[1] != columns):
        raise ValueError(f"{name} has shape {_words.shapes(array.shape)}; it must be (n, {'D' if columns is None else columns})")
    kept, shares = np.isfinite(array).all(axis=1), None
    lost = int(len(array) - kept.sum())
    if weights is not None:
        whose = "weights" if name == "data" else f"{name}_weights"
        shares = _arrays.weights(whose, weights)
        if len(shares) != len(array):
            raise ValueError(f"{whose} has {len(shares)} rows; {name} has {len(array)}")
        kept &= shares > 0
        shares = shares[kept]
    if not kept.any():
        raise ValueError(f"{name} has no finite rows")
    if lost:
        _words.warn(f"{name} has {lost} row{'s' * (lost > 1)} with values that are not finite, which are left out")
    return array[kept], shares


def _labels(names: Sequence[str] | None, columns: int, letter: str) -> Sequence[str]:
    if names is not None and (isinstance(names, str) or not np.iterable(names)):
        raise ValueError(f"names is {_words.shown(names)}; it must be a sequence of strings")
    if names is not None and len(names) != columns:
        raise ValueError(f"names lists {len(names)} names; there are {columns} columns")
    return names if names is not None else [f"${letter}_{{{j + 1}}}$" for j in range(columns)]


def _density(x: Array, y: Array, x_edges: Array, y_edges: Array, weights: Array | None = None, blur: float = 1.2) -> Array:
    """A histogram of mass 1 over (y, x), in cells of one size, smoothed by a Gaussian of `blur` cells."""
    rows, columns = _cells(y, y_edges), _cells(x, x_edges)
    shape = len(y_edges) - 1, len(x_edges) - 1
    inside = (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])
    shares = None if weights is None else weights[inside]
    counts = np.bincount(rows[inside] * shape[1] + columns[inside], shares, minlength=shape[0] * shape[1]).reshape(shape)
    density: Array = _blur(shape[0], blur) @ counts @ _blur(shape[1], blur)
    density /= max(density.sum(), 1e-300)
    return density


def _cells(values: Array, edges: Array) -> Array:
    """Number of the cell of each value; -1 and beyond the last for those outside."""
    cells = np.floor((values - edges[0]) * ((len(edges) - 1) / (edges[-1] - edges[0])))
    inside: Array = np.clip(cells, -1, len(edges) - 1).astype(np.intp)
    return inside


def _blur(cells: int, width: float) -> Array:
    """Matrix of a Gaussian cut off at three widths."""
    apart = np.subtract.outer(np.arange(cells), np.arange(cells)) / width
    return np.where(np.abs(apart) <= math.ceil(3 * width) / width, np.exp(-0.5 * apart**2), 0.0)


def _levels(density: Array, masses: Sequence[float]) -> list[float]:
    """Heights of the contours that hold these masses, from low to high."""
    heights = np.sort(density.ravel())[::-1]
    held = np.cumsum(heights)
    return sorted({float(heights[min(int(np.searchsorted(held, mass)), heights.size - 1)]) for mass in masses})


def _spines(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set(color=QUIET, linewidth=0.6)


@dataclass(frozen=True)
class _Axis:
    """Limits of a variable, and its ticks in a unit in which their labels are short: value = label * scale + offset."""

    low: float
    high: float
    offset: float = 0.0
    scale: float = 1.0
    unit: str = ""

    @classmethod
    def of(cls, low: float, high: float) -> _Axis:
        """With an offset where the labels had many digits in common, and a power of ten where they had many zeros."""
        offset, words = 0.0, ""
        largest = max(abs(low), abs(high))
        if largest >= (1000 if 0.01 <= largest < 10_000 else 100) * (high - low):
            power = math.ceil(math.log10(high - low))
            whole = round(0.5 * (low + high) / 10.0**power)
            offset = float(f"{whole}e{power}")
            plain = f"{abs(offset):.{max(0, -power)}f}"
            plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
            short = re.sub(r"\.?0*e\+?(-?)0*", r"e\1", f"{abs(offset):.{len(str(abs(whole))) - 1}e}")
            words = ("+ " if offset > 0 else "\u2212 ") + (plain if len(plain) <= max(7, len(short)) else short)
        power = math.floor(math.log10(max(abs(low - offset), abs(high - offset))))
        if -3 < power < 4:
            return cls(low, high, offset, 1.0, words and f" [{words}]")
        return cls(low, high, offset, float(f"1e{power}"), f" [1e{power}{words and ' ' + words}]")

    def ticks(self, room: float, ruler: _Ruler, size: float, across: int) -> list[tuple[float, str]]:
        """Places and labels of a few ticks, whose labels lie apart and within the panel, `room` points long."""
        from matplotlib.ticker import Formatter, MaxNLocator

        low, high = (self.low - self.offset) / self.scale, (self.high - self.offset) / self.scale
        best: list[tuple[float, float, float, str]] = []
        tries = [(1, bins) for bins in range(int(np.clip(room / 18, 4, 7)), 0, -1)]
        tries += [(stride, bins) for stride in (1, 2, 3) for bins in (7, 6, 5, 4, 3, 2)]
        for stride, bins in tries:
            marks = MaxNLocator(bins, steps=[1, 2, 5, 10]).tick_values(low, high)
            decimals = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9))
            found = []
            for mark in np.where(np.abs(marks) > 1e-9 * (high - low), marks, 0.0):
                label = Formatter.fix_minus(f"{mark:.{decimals}f}")
                place, half = (mark - low) / (high - low) * room, 0.5 * ruler.size(label, size)[across]
                if half <= place <= room - half:
                    found.append((place - half, place + half, float(mark * self.scale + self.offset), label))
            found = found[::stride]
            if all(right[0] - left[1] >= 2 * PAD for left, right in pairwise(found)) and len(found) > len(best):
                best = found
            if len(best) > 1:
                break
        return [(value, label) for *_, value, label in best]


class _Ruler:
    """Sizes of texts in points, as they are drawn into a figure."""

    def __init__(self, figure: Any) -> None:
        self.text = figure.text(0, 0, "")
        self.points = 72 / figure.dpi
        self.known: dict[tuple[str, float], tuple[float, float]] = {}

    def size(self, text: str, size: float) -> tuple[float, float]:
        if (text, size) not in self.known:
            self.text.set(text=text, fontsize=size, linespacing=1.2)
            box = self.text.get_window_extent()
            self.known[text, size] = box.width * self.points, box.height * self.points
        return self.known[text, size]

    def plain(self, name: str) -> str:
        """With its dollars escaped where what stands between them is no mathematics."""
        try:
            self.size(name, 10)
        except ValueError:
            return name.replace("$", r"\$")
        return name

    def wrapped(self, name: str, room: float, size: float) -> str:
        """Broken into lines behind blanks, underscores and the like, or anywhere but in mathematics."""
        lines: list[str] = []
        for part in name.split("\n"):
            lines.append("")
            for piece in PIECES.findall(part):
                if self.size((lines[-1] + piece).rstrip(), size)[0] <= room:
                    lines[-1] += piece
                    continue
                letters = [piece] if "$" in piece or self.size(piece.rstrip(), size)[0] <= room else list(piece)
                if lines[-1]:
                    lines.append("")
                for letter in letters:
                    if lines[-1] and self.size((lines[-1] + letter).rstrip(), size)[0] > room:
                        lines.append("")
                    lines[-1] += letter
        return "\n".join(line.strip() for line in lines)

    def names(self, names: Sequence[str], room: float, most: float, lines: int = 3) -> tuple[float, list[str]]:
        """The largest size from `most` down in which all names take so many lines at most, and their lines."""
        for size in np.arange(most, 3.5, -1):
            found = [self.wrapped(name, room, size) for name in names]
            if all(text.count("\n") < lines and self.size(text, size)[0] <= room for text in found):
                break
        return float(size), found


def _triangle(
    figure: FigureBase | None, names: Sequence[str], axes: Sequence[_Axis], side: float, size: float, words: tuple[str, str, str]
) -> tuple[FigureBase, list[list[Axes]]]:
    """Panels of all pairs of variables, named, with ticks, and a legend where there is none.

    A new figure gets panels of `side` points and the size that they and their labels need; in a figure that is given, the
    panels get what the labels leave.
    """
    columns, own = len(names), figure is None
    page: Any = _figure(figure, 1.0, 1.0)
    ruler = _Ruler(page)
    names = [ruler.plain(str(name)) + axis.unit for name, axis in zip(names, axes, strict=True)]
    left, bottom, right, top = EDGE, EDGE, EDGE, EDGE
    if columns == 1:
        top += 2 * size
    while True:
        if own:
            width = height = side
        else:
            width, height = (
                max((pixels * ruler.points - margin - (columns - 1) * GAP) / columns, 4.0)
                for pixels, margin in ((page.bbox.width, left + right), (page.bbox.height, bottom + top))
            )
        below, under = ruler.names(names, width, size)
        beside, aside = ruler.names(["density", *names[1:]], height, size)
        small = 0.8 * min(below, beside)
        x_ticks = [axis.ticks(width, ruler, small, 0) for axis in axes]
        y_ticks = [axis.ticks(height, ruler, small, 1) for axis in axes]
        x_off = TICK + PAD + max((ruler.size(label, small)[1] for ticks in x_ticks for _, label in ticks), default=0) + PAD
        y_off = TICK + PAD + max((ruler.size(label, small)[0] for ticks in y_ticks[1:] for _, label in ticks), default=0) + PAD
        margins = (
            EDGE + y_off + max(ruler.size(text, beside)[1] for text in aside),
            EDGE + x_off + max(ruler.size(text, below)[1] for text in under),
        )
        done = own or (margins[0] <= left and margins[1] <= bottom) or width == height == 4.0
        left, bottom = max(left, margins[0]), max(bottom, margins[1])
        if done:
            break
    ruler.text.remove()
    total = [margin + columns * part + (columns - 1) * GAP for margin, part in ((left + right, width), (bottom + top, height))]
    if own:
        page.set_size_inches(total[0] / 72, total[1] / 72)
    grid = page.add_gridspec(
        columns,
        columns,
        left=left / total[0],
        right=1 - right / total[0],
        bottom=bottom / total[1],
        top=1 - top / total[1],
        wspace=GAP / width,
        hspace=GAP / height,
    )
    panels = [[page.add_subplot(grid[i, j]) for j in range(i + 1)] for i in range(columns)]
    for i, row in enumerate(panels):
        for j, panel in enumerate(row):
            panel.set_xlim(axes[j].low, axes[j].high)
            if i > j:
                panel.set_ylim(axes[i].low, axes[i].high)
            _spines(panel)
            panel.xaxis.set_visible(i == columns - 1)
            panel.yaxis.set_visible(j == 0)
            if i == columns - 1:
                _ticks(panel.xaxis, x_ticks[j], small)
                panel.set_xlabel(under[j], fontsize=below, color=INK, linespacing=1.2)
                panel.xaxis.set_label_coords(0.5, -x_off / height)
            if j == 0:
                _ticks(panel.yaxis, y_ticks[i] if i else [], small)
                panel.set_ylabel(aside[i], fontsize=beside, color=INK, linespacing=1.2)
                panel.yaxis.set_label_coords(-y_off / width, 0.5)
    _legend(page, columns, words, size, (left, top, width, height), total)
    return page, panels


def _legend(
    figure: Any, columns: int, words: tuple[str, str, str], size: float, inner: tuple[float, float, float, float], total: list[float]
) -> None:
    """In the empty upper right, as large as it can be read where the whole figure is looked at; above a single panel."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    left, top, width, height = inner
    size = max(size, min(total) / 40)
    area, line = Patch(color=DATA, alpha=FILLED["alpha"], linewidth=0), Line2D([], [], color=FLOW)

    def drawn(size: float) -> Any:
        line.set_linewidth(0.12 * size)
        return figure.legend(
            [area, line],
            words[1:],
            title=words[0] if columns > 1 else None,
            loc="upper right",
            bbox_to_anchor=(1 - EDGE / total[0], 1 - EDGE / total[1]),
            bbox_transform=figure.transSubfigure,
            ncols=1 if columns > 1 else 2,
            frameon=False,
            borderaxespad=0,
            borderpad=0,
            fontsize=size,
            title_fontsize=size,
            labelcolor=[DATA, FLOW],
            alignment="right",
        )

    legend = drawn(size)
    box = legend.get_window_extent()
    across, down = (72 / figure.dpi * length / size for length in (box.width, box.height))
    legend.remove()

    def fits(size: float) -> bool:
        below = math.floor(size * down / (height + GAP))
        free = width if columns == 1 else total[0] - EDGE - left - (below + 1) * (width + GAP)
        return bool(size * across <= free and (below < columns if columns > 1 else size * down <= top - EDGE - PAD))

    while size > 2 and not fits(size):
        size *= 0.95
    legend = drawn(size)
    if columns > 1:
        legend.get_title().set_color(INK)


def _ticks(axis: Any, ticks: list[tuple[float, str]], size: float) -> None:
    axis.set_ticks([place for place, _ in ticks], [label for _, label in ticks])
    axis.set_tick_params(length=TICK, width=0.6, pad=PAD, labelsize=size, color=QUIET, labelcolor=INK)


def _histogram(axes: Axes, values: Array, edges: Array, weights: Array | None = None, **options: Any) -> None:
    """Of the values within the edges; a word where there are none."""
    inside = (values >= edges[0]) & (values <= edges[-1])
    if inside.any():
        axes.hist(values[inside], edges.tolist(), weights=None if weights is None else weights[inside], **options)
    else:
        axes.text(0.5, 0.5, "all outside", transform=axes.transAxes, ha="center", va="center", fontsize=7, color=options["color"])


def corner(
    data: ArrayLike,
    samples: ArrayLike,
    names: Sequence[str] | None = None,
    figure: FigureBase | None = None,
    *,
    weights: ArrayLike | None = None,
    samples_weights: ArrayLike | None = None,
    columns: Sequence[str | int] | None = None,
    levels: Sequence[float] = (0.68, 0.95),
) -> FigureBase:
    """Data against samples of a flow: all pairs of columns, and histograms of each.

    Filled blue is the data, vermilion lines are the samples.
    The name of an axis bears the unit of its ticks where their labels are shortened by one: at "mass [1e8]" a tick 3 is 3e8, and at
    "jd [+ 2450000]" it is 2450003. Names that are long are broken into lines; a new figure has the size that panels and names need.

    Parameters
    ----------
    data, samples : (n, D), (m, D) arrays or data frames
        Rows that are not finite are left out.
    names : sequence of str, optional
        One label per column; those of `data` where it is a data frame. By them the columns of `samples` are taken, if that is one too.
    figure : Figure or SubFigure, optional
        Where to draw; a new figure if None.
    weights, samples_weights : (n,), (m,) arrays, optional
        Of the rows of data and samples: not negative. Those of `fastmaf.stats.importance` belong to its samples.
    columns : sequence of str or int, optional
        Which to show, by name or number, in this order; all, if None.
    levels : sequence of float
        Shares of the rows that contours hold, each between 0 and 1.

    Returns
    -------
    Figure or SubFigure
        With k (k + 1) / 2 axes for k columns.

    Raises
    ------
    ValueError
        If the shapes or the number of names do not fit, or an argument is out of range.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(2, 1000, 3))
    >>> len(corner(x[0], x[1]).axes), len(corner(x[0], x[1], columns=[2, 0]).axes)
    (6, 3)
    """
    own = _tables.names_of(data)
    data, shares = _weighted("data", data, weights)
    width, masses = data.shape[1], _masses(levels)
    samples, drawn = _weighted("samples", samples, samples_weights, width, own)
    names = own if names is None else names
    names = _labels(names, width, "x")
    chosen = _chosen(columns, names)
    data, samples, names = data[:, chosen], samples[:, chosen], [names[j] for j in chosen]
    axes_of = [_Axis.of(*_limits(data[:, j], samples[:, j])) for j in range(len(chosen))]
    figure, grid = _triangle(figure, names, axes_of, max(96.0, 300 / len(chosen)), 10, ("data space", "data", "samples"))
    edges = [np.linspace(axis.low, axis.high, 61) for axis in axes_of]
    centres = [0.5 * (edge[1:] + edge[:-1]) for edge in edges]
    for i, row in enumerate(grid):
        for j, axes in enumerate(row):
            if i == j:
                _histogram(axes, data[:, j], edges[j], shares, **FILLED)
                _histogram(axes, samples[:, j], edges[j], drawn, density=True, histtype="step", color=FLOW, linewidth=1.2)
            else:
                for rows, own_shares, filled in ((data, shares, True), (samples, drawn, False)):
                    density = _density(rows[:, j], rows[:, i], edges[j], edges[i], own_shares)
                    if not density.any():
                        continue
                    if filled:
                        _contours(axes, centres[j], centres[i], density, masses)
                    else:
                        axes.contour(centres[j], centres[i], density, _levels(density, masses), colors=FLOW, linewidths=0.8)
    return figure


def _contours(axes: Axes, x: Array, y: Array, density: Array, masses: Sequence[float]) -> None:
    """Filled, of a density of mass 1 over (y, x)."""
    heights = _levels(density, masses)
    shades = [_shade(DATA, 0.25 + 0.6 * k / len(heights)) for k in range(len(heights))]
    axes.contourf(x, y, density, [*heights, density.max() * 1.001], colors=shades)


def slices(
    flow: Flow | Ensemble,
    at: ArrayLike,
    context: ArrayLike | None = None,
    names: Sequence[str] | None = None,
    figure: FigureBase | None = None,
    *,
    columns: Sequence[str | int] | None = None,
    levels: Sequence[float] = (0.68, 0.95),
) -> FigureBase:
    """The density through a point: along one or two variables at a time, while all others are held at it.

    Filled blue is the density of the variables shown given all others, with contours that hold shares of it; vermilion lines cross at the
    point. Slices are narrower than the marginals that `corner` shows wherever variables depend on each other: they show what is
    left of a variable once the others are known, and whether a density is smooth. Axes reach as far as any of the slices does.

    Parameters
    ----------
    flow : Flow or Ensemble
        Of continuous variables.
    at : (D,) array
        The point; not where the density is zero.
    context : (C,) array, optional
        Needed if and only if the flow is conditional.
    names : sequence of str, optional
        One label per variable; those of the flow, if it has any.
    figure : Figure or SubFigure, optional
        Where to draw; a new figure if None.
    columns : sequence of str or int, optional
        Which variables to show, by name or number, in this order; all, if None. The others are held too.
    levels : sequence of float
        Shares of a slice that contours hold, each between 0 and 1.

    Returns
    -------
    Figure or SubFigure
        With k (k + 1) / 2 axes for k variables.

    Raises
    ------
    ValueError
        If a shape or the number of names does not fit; if variables are discrete; if the density at the point is zero.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> import fastmaf
    >>> flow = fastmaf.MAF(3, transforms=1, hidden_features=(8,), seed=0)
    >>> len(slices(flow, np.zeros(3)).axes), len(slices(flow, np.zeros(3), columns=[2]).axes)
    (6, 1)
    """
    if not isinstance(flow, (Flow, Ensemble)):
        raise ValueError(f"flow is {_words.shown(flow)}; it must be a Flow or an Ensemble")
    if (flow if isinstance(flow, Flow) else flow.member(0)).record.discrete:
        raise ValueError("flow has discrete variables; slices are of flows without")
    point = _arrays.real("at", at, names=flow.names).astype(np.float64)
    if point.shape == (1, flow.features):
        point = point[0]
    if point.shape != (flow.features,):
        raise ValueError(f"at has shape {_words.shapes(point.shape)}; it must be ({flow.features},)")
    beside = None if context is None else np.asarray(_arrays.real("context", context)).reshape(-1)
    if not np.isfinite(flow.log_prob(point[None], beside)[0]):
        raise ValueError("at is a point of density zero, through which there are no slices")
    names = _labels(flow.names if names is None else names, flow.features, "x")
    chosen, masses = _chosen(columns, names), _masses(levels)

    def density(own: Sequence[int], places: Sequence[Array]) -> Array:
        """On the grid of the places of one or two variables, the last one first; at most 1."""
        grid = np.meshgrid(*places, indexing="ij")
        rows = np.tile(point, (grid[0].size, 1))
        for j, values in zip(own, grid, strict=True):
            rows[:, j] = values.ravel()
        values = flow.log_prob(rows, beside).astype(np.float64).reshape(grid[0].shape)
        return np.exp(values - np.nanmax(values))

    ends = _ends(flow, point, beside, chosen, density)
    axes_of = [_Axis.of(*ends[j]) for j in chosen]
    figure, grid = _triangle(
        figure, [names[j] for j in chosen], axes_of, max(96.0, 300 / len(chosen)), 10, ("slices", "given all others", "the point")
    )
    places = [np.linspace(axis.low, axis.high, 81) for axis in axes_of]
    for i, row in enumerate(grid):
        for j, axes in enumerate(row):
            if i == j:
                line = np.linspace(axes_of[j].low, axes_of[j].high, 321)
                heights = density([chosen[j]], [line])
                axes.fill_between(line, heights, color=DATA, alpha=FILLED["alpha"], linewidth=0)
                axes.set_ylim(0, 1.1)
            else:
                heights = density([chosen[i], chosen[j]], [places[i], places[j]])
                _contours(axes, places[j], places[i], heights / heights.sum(), masses)
                axes.axhline(point[chosen[i]], color=FLOW, linewidth=0.8)
            axes.axvline(point[chosen[j]], color=FLOW, linewidth=0.8)
    return figure


def _ends(
    flow: Any, point: Array, context: Array | None, chosen: Sequence[int], density: Callable[[Sequence[int], Sequence[Array]], Array]
) -> dict[int, tuple[float, float]]:
    """Where the axes of slices end: beyond there all of them are less than a thousandth of their largest value."""
    draws = flow.sample(2000, context, seed=0).astype(np.float64)
    low, high = np.minimum(draws.min(axis=0), point), np.maximum(draws.max(axis=0), point)
    margin = 0.25 * (high - low)
    ends = {j: (float(low[j] - margin[j]), float(high[j] + margin[j])) for j in chosen}
    for _ in range(3):  # what is narrow is found on a grid that reaches less far each time
        reach: dict[int, list[float]] = {j: [point[j]] for j in chosen}
        for i, j in [(i, j) for k, i in enumerate(chosen) for j in chosen[: k + 1]]:
            own = [i] if i == j else [i, j]
            places = [np.linspace(*ends[k], 513 if i == j else 49) for k in own]
            inside = density(own, places) > 1e-3
            for axis, k in enumerate(own):
                there = np.flatnonzero(inside.any(axis=tuple(other for other in range(len(own)) if other != axis)))
                step = places[axis][1] - places[axis][0]
                reach[k] += [places[axis][there[0]] - step, places[axis][there[-1]] + step]
        ends = {j: (max(ends[j][0], min(reach[j])), min(ends[j][1], max(reach[j]))) for j in chosen}
    return ends


def _masses(levels: Any) -> list[float]:
    masses = _arrays.real("levels", levels).astype(np.float64)
    if masses.ndim != 1 or not masses.size or not ((masses > 0) & (masses < 1)).all():
        raise ValueError(f"levels is {_words.shown(levels)}; it must list shares between 0 and 1, such as (0.68, 0.95)")
    return [float(mass) for mass in masses]


def _chosen(columns: Any, names: Sequence[str]) -> list[int]:
    """Numbers of the columns that are named."""
    if columns is None:
        return list(range(len(names)))
    listed = [] if isinstance(columns, str) or not np.iterable(columns) else list(columns)
    if not listed:
        raise ValueError(f"columns is {_words.shown(columns)}; it must list names or numbers of columns")
    for column in listed:
        if isinstance(column, str) and column not in names:
            raise ValueError(f"columns has {_words.shown(column)}, which is no name; the names are {_words.named(names)}")
    return [
        names.index(column) if isinstance(column, str) else _words.count("columns", column, limit=len(names), must="a name or a number")
        for column in listed
    ]


def _limits(data: Array, samples: Array) -> tuple[float, float]:
    """Of nearly all data; where they are all one value, of the samples too, or around it."""
    for values in (data, np.concatenate([data, samples])):
        low, high = map(float, np.quantile(values, [0.001, 0.999]))
        if high - low > 1e-12 * max(abs(low), abs(high)):
            break
    else:
        low, high = (low - 0.05 * abs(low), low + 0.05 * abs(low)) if low else (-1.0, 1.0)
    margin = 0.06 * (high - low)
    return low - margin, high + margin


def _shade(colour: str, strength: float) -> tuple[float, ...]:
    """A colour mixed with white."""
    parts = np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    return tuple(1 - strength * (1 - parts))


def noise(u: ArrayLike, names: Sequence[str] | None = None, figure: FigureBase | None = None) -> FigureBase:
    """The noise that data become under a flow, which should be N(0, I): uncorrelated, round, and normal in each column.

    Filled blue is the noise; the vermilion lines are the standard normal density, and circles that should hold 50, 80, 95 and 99 per cent.
    Columns without a row within 3.6 of zero say so. Above each histogram is the Kolmogorov-Smirnov distance of the column from the normal,
    in vermilion with the bound where it is above it: what all columns of so many rows stay below with a probability of 95 per cent.

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
    axes_of = [_Axis(-3.6, 3.6)] * columns
    figure, grid = _triangle(figure, names, axes_of, max(62.0, 300 / columns), 9, ("noise space", "data", "N(0, I)"))
    edges = np.linspace(-3.6, 3.6, 49)
    centres = 0.5 * (edges[1:] + edges[:-1])
    angle = np.linspace(0, 2 * np.pi, 97)
    distances, bound = stats.ks_distance(stats.normal_cdf(u)), stats.ks_bound(len(u), columns)
    for i, row in enumerate(grid):
        for j, axes in enumerate(row):
            if i == j:
                _histogram(axes, u[:, j], edges, **FILLED)
                axes.plot(centres, np.exp(-0.5 * centres**2) / math.sqrt(2 * math.pi), color=FLOW, linewidth=1.0)
                axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
                far = distances[i] > bound
                text = f"KS {distances[i]:.3f}{f' > {bound:.3f}' if far else ''}"
                points = 72 / axes.figure.dpi
                size = min(8.0, 0.13 * axes.bbox.height * points, axes.bbox.width * points / (0.62 * len(text)))
                options: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": size, "color": FLOW if far else INK}
                axes.text(0.5, 0.97, text, transform=axes.transAxes, **options)
            else:
                density = _density(u[:, j], u[:, i], edges, edges)
                if density.any():
                    levels = _levels(density, MASS)
                    shades = [_shade(DATA, 0.2 + 0.55 * k / len(levels)) for k in range(len(levels))]
                    axes.contourf(centres, centres, density, [*levels, density.max() * 1.001], colors=shades)
                for mass in MASS:
                    radius = math.sqrt(-2 * math.log(1 - mass))
                    axes.plot(radius * np.cos(angle), radius * np.sin(angle), color=FLOW, linewidth=0.7)
    return figure


def _pair(page: Any, names: tuple[str, str, str], main: _Axis, small: _Axis) -> tuple[Axes, Axes]:
    """Two panels one above the other, named (below, left of the upper, left of the lower); `main` is the lower left to right too."""
    ruler = _Ruler(page)
    total = [ruler.points * pixels for pixels in (page.bbox.width, page.bbox.height)]
    left, bottom = 0.1 * total[0], 0.1 * total[1]
    for _ in range(3):
        width, height = (max(part, 8.0) for part in (total[0] - left - EDGE, total[1] - bottom - EDGE - GAP))
        rooms = width, 0.75 * height, 0.25 * height
        texts = [name + axis.unit for name, axis in zip(names, (main, main, small), strict=True)]
        size = min(ruler.names([text], room, 10)[0] for text, room in zip(texts, rooms, strict=True))
        texts = [ruler.wrapped(text, room, size) for text, room in zip(texts, rooms, strict=True)]
        ticks = [axis.ticks(room, ruler, 0.8 * size, k > 0) for k, (axis, room) in enumerate(zip((main, main, small), rooms, strict=True))]
        x_off = TICK + 2 * PAD + max((ruler.size(label, 0.8 * size)[1] for _, label in ticks[0]), default=0)
        y_off = TICK + 2 * PAD + max((ruler.size(label, 0.8 * size)[0] for _, label in ticks[1] + ticks[2]), default=0)
        left = max(left, EDGE + y_off + max(ruler.size(text, size)[1] for text in texts[1:]))
        bottom = max(bottom, EDGE + x_off + ruler.size(texts[0], size)[1])
    ruler.text.remove()
    upper, lower = page.subplots(
        2,
        1,
        sharex=True,
        gridspec_kw={
            "left": left / total[0],
            "right": 1 - EDGE / total[0],
            "bottom": bottom / total[1],
            "top": 1 - EDGE / total[1],
            "hspace": GAP / (0.5 * height),
            "height_ratios": (3, 1),
        },
    )
    upper.set(xlim=(main.low, main.high), ylim=(main.low, main.high))
    lower.set(ylim=(small.low, small.high))
    for axes, text, marks in ((upper, texts[1], ticks[1]), (lower, texts[2], ticks[2])):
        _spines(axes)
        _ticks(axes.yaxis, marks, 0.8 * size)
        _ticks(axes.xaxis, ticks[0], 0.8 * size)
        axes.set_ylabel(text, fontsize=size, color=INK, linespacing=1.2)
        axes.yaxis.set_label_coords(-y_off / width, 0.5)
    upper.tick_params(labelbottom=False)
    lower.set_xlabel(texts[0], fontsize=size, color=INK, linespacing=1.2)
    lower.xaxis.set_label_coords(0.5, -x_off / (0.25 * height))
    return upper, lower


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
    top = 1.04 * float(np.quantile(both[:, 0], 0.9995))
    line = np.array([0.0, top])
    reach = max(6 * float(np.median(np.abs(error))), 1e-3)
    figure = _figure(figure, 5.0, 5.2)
    upper, lower = _pair(figure, ("true redshift z", "estimated redshift", "error / (1 + z)"), _Axis.of(0.0, top), _Axis.of(-reach, reach))
    for axes, y in ((upper, both[:, 1]), (lower, error)):
        axes.plot(both[:, 0], y, ".", color=DATA, markersize=2, alpha=0.3, markeredgewidth=0, rasterized=True)
    upper.plot(line, line, color=FLOW, linewidth=0.8)
    for sign in (-1, 1):
        upper.plot(line, line + sign * 0.15 * (1 + line), color=FLOW, linewidth=0.8, linestyle=(0, (4, 3)))
    lower.axhline(0, color=FLOW, linewidth=0.8)
    if note is not None:
        upper.text(0.03, 0.97, note, transform=upper.transAxes, va="top", fontsize=9, color=INK, linespacing=1.5)
    if pit is not None:
        small = upper.inset_axes((0.66, 0.12, 0.31, 0.22))
        small.hist(pit[:, 0], np.linspace(0, 1, 21).tolist(), **FILLED)
        small.axhline(1, color=FLOW, linewidth=0.8)
        _spines(small)
        _ticks(small.xaxis, [(0.0, "0"), (1.0, "1")], 8)
        _ticks(small.yaxis, [], 8)
        small.set(xlim=(0, 1), ylim=(0, 2))
        small.set_title("PIT", fontsize=8, color=INK, pad=2)
    return figure


def _grid(
    page: Any, box: tuple[float, float, float, float], titles: Sequence[str], columns: int, x: tuple[str, _Axis], y: tuple[str, _Axis]
) -> list[Axes]:
    """Panels with common axes, each with a title, in a part of the page: left, bottom, width and height in points."""
    ruler = _Ruler(page)
    total = [ruler.points * pixels for pixels in (page.bbox.width, page.bbox.height)]
    rows = -(-len(titles) // columns)
    size, left, bottom = 9.0, 0.0, 0.0
    for _ in range(3):
        width = max((box[2] - left - 2 * EDGE - (columns - 1) * GAP) / columns, 4.0)
        title_size, texts = ruler.names(titles, width, size, 4)
        head = max(ruler.size(text, title_size)[1] for text in texts) + PAD if any(texts) else 0.0
        height = max((box[3] - bottom - 2 * EDGE - rows * head - (rows - 1) * GAP) / rows, 4.0)
        whole = columns * width + (columns - 1) * GAP, rows * (height + head) + (rows - 1) * GAP
        labels = [ruler.names([name + axis.unit], room, size) for (name, axis), room in zip((x, y), whole, strict=True)]
        ticks = [axis.ticks(room, ruler, 0.85 * size, k) for k, ((_, axis), room) in enumerate(((x, width), (y, height)))]
        offs = [max((ruler.size(text, 0.85 * size)[1 - k] for _, text in ticks[k]), default=0) + TICK + 2 * PAD for k in range(2)]
        bottom, left = (off + ruler.size(text, at)[1] for off, (at, (text,)) in zip(offs, labels, strict=True))
    ruler.text.remove()
    panels: list[Axes] = []
    for k, text in enumerate(texts):
        i, j = divmod(k, columns)
        corner = box[0] + EDGE + left + j * (width + GAP), box[1] + EDGE + bottom + (rows - 1 - i) * (height + head + GAP)
        panel = page.add_axes((corner[0] / total[0], corner[1] / total[1], width / total[0], height / total[1]))
        panel.set(xlim=(x[1].low, x[1].high), ylim=(y[1].low, y[1].high))
        panel.set_title(text, fontsize=title_size, color=INK, pad=PAD, linespacing=1.2)
        _spines(panel)
        _ticks(panel.xaxis, ticks[0], 0.85 * size)
        _ticks(panel.yaxis, ticks[1], 0.85 * size)
        panel.tick_params(labelbottom=k + columns >= len(texts), labelleft=not j)
        panels.append(panel)
    first = panels[(rows - 1) * columns]
    places = (left + 0.5 * whole[0], bottom - offs[0]), (left - offs[1], bottom + 0.5 * (whole[1] - head))
    for axis, (at, (text,)), place in zip((first.xaxis, first.yaxis), labels, places, strict=True):
        axis.set_label_text(text, fontsize=at, color=INK, linespacing=1.2)
        axis.set_label_coords((box[0] + EDGE + place[0]) / total[0], (box[1] + EDGE + place[1]) / total[1], transform=page.transSubfigure)
    return panels


def _key(page: Any, handles: list[Any], words: list[str]) -> float:
    """A legend in a line above all, and the points that are left below it."""
    points = 72 / page.figure.dpi
    size = 9.0
    while True:
        legend = page.legend(
            handles,
            words,
            loc="upper right",
            bbox_to_anchor=(1 - EDGE / (points * page.bbox.width), 1 - EDGE / (points * page.bbox.height)),
            bbox_transform=page.transSubfigure,
            ncols=len(words),
            frameon=False,
            borderaxespad=0,
            borderpad=0,
            fontsize=size,
            labelcolor=INK,
            columnspacing=1.2,
            handlelength=1.5,
        )
        box = legend.get_window_extent()
        if box.width * points <= page.bbox.width * points - 2 * EDGE or size < 3:
            return float(points * (page.bbox.height - box.height) - EDGE)
        legend.remove()
        size *= 0.9


def _binomial(n: int, p: float, level: float) -> int:
    """The smallest count that so many tries do not pass with this probability."""
    k = np.arange(n)
    log_mass = n * math.log1p(-p) + np.append(0.0, np.cumsum(np.log((n - k) / (k + 1)) + math.log(p / (1 - p))))
    return int(np.searchsorted(np.cumsum(np.exp(log_mass)), level))


def calibration(found: stats.Calibration, figure: FigureBase | None = None) -> FigureBase:
    """Ranks of SBC and PIT of each variable, and the coverage of highest-density regions: flat, flat and diagonal if calibrated.

    To the left is the share of rows inside the regions of each mass, with the band in which it stays with a probability of 95 per cent
    together with all other distances; below the diagonal the flow is overconfident. To the right are, for each variable, filled blue, the
    histogram of its ranks among the draws, and as a vermilion line that of its PIT, both of mean 1; 99 per cent of the bins lie in the grey
    band, and those above 4 are cut off. The larger Kolmogorov-Smirnov distance of both stands above, beside the bound where it is larger.

    Parameters
    ----------
    found : fastmaf.stats.Calibration
    figure : Figure or SubFigure, optional
        Where to draw; a new figure if None.

    Returns
    -------
    Figure or SubFigure
        With D + 1 axes, that of the coverage first.

    Raises
    ------
    ValueError
        If it is something else.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> import fastmaf
    >>> flow = fastmaf.Flow([], features=3)
    >>> len(calibration(fastmaf.stats.calibration(flow, flow.sample(500, seed=1), n=100, seed=2)).axes)
    4
    """
    _words.of_type("found", found, stats.Calibration)
    rows, variables = found.ranks.shape
    bins = int(np.clip(rows // 50, 4, min(20, found.draws + 1)))
    edges = np.round(np.linspace(0, found.draws + 1, bins + 1))
    heights = [np.histogram(column, edges - 0.5)[0] / (rows * np.diff(edges) / (found.draws + 1)) for column in found.ranks.T]
    even = np.linspace(0, 1, bins + 1)
    lines = [] if found.pit is None else [np.histogram(column, even)[0] * bins / rows for column in found.pit.T]
    band = [_binomial(rows, 1 / bins, level) * bins / rows for level in (0.005, 0.995)]
    largest = found.ks_ranks if found.ks_pit is None else np.maximum(found.ks_ranks, found.ks_pit)

    down = -(-variables // math.ceil(math.sqrt(1.6 * variables)))
    across = -(-variables // down)
    new = (270 + across * max(97, 220 / across), 60 + max(240, down * max(100, 220 / down)))
    figure = _figure(figure, new[0] / 72, new[1] / 72)
    page: Any = figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=DATA, alpha=FILLED["alpha"], linewidth=0), Patch(color=QUIET, alpha=0.3, linewidth=0)]
    words = ["rank", "within chance"]
    if lines:
        handles.insert(1, Line2D([], [], color=FLOW, linewidth=1.0))
        words.insert(1, "PIT")
    top = _key(page, handles, words)
    width = page.bbox.width * 72 / page.figure.dpi
    side = min(0.45 * width, 250.0, top)

    def title(name: str, distance: float) -> str:
        beside = f" > {found.ks_bound:.3f}" if distance > found.ks_bound else ""
        return f"{name}\nKS {distance:.3f}{beside}"

    unit = _Axis(0.0, 1.0)
    (coverage,) = _grid(
        page, (0, top - side, side, side), [title("coverage", found.ks_hdr)], 1, ("credible mass", unit), ("share of rows inside", unit)
    )
    mass = np.linspace(0, 1, 201)
    coverage.fill_between(
        mass, np.maximum(mass - found.ks_bound, 0), np.minimum(mass + found.ks_bound, 1), color=QUIET, alpha=0.3, linewidth=0
    )
    coverage.plot(mass, mass, color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
    coverage.plot(mass, found.coverage(mass), color=DATA, linewidth=1.5)
    ruler = _Ruler(page)
    names = [ruler.plain(str(name)) for name in (found.names or [f"$x_{{{j + 1}}}$" for j in range(variables)])]
    ruler.text.remove()
    highest = min(4.0, 1.08 * max(2.0, *(float(column.max()) for column in [*heights, *lines])))
    panels = _grid(
        page,
        (side, 0, width - side, top),
        [title(name, distance) for name, distance in zip(names, largest, strict=True)],
        across,
        ("rank / draws, PIT" if lines else "rank / draws", unit),
        ("density", _Axis(0.0, highest)),
    )
    for j, panel in enumerate(panels):
        panel.fill_between([0, 1], band[0], band[1], color=QUIET, alpha=0.3, linewidth=0)
        panel.stairs(heights[j], edges / (found.draws + 1), fill=True, color=DATA, alpha=FILLED["alpha"], linewidth=0)
        if lines:
            panel.stairs(lines[j], even, baseline=None, color=FLOW, linewidth=1.0)
    for panel, distance in zip((coverage, *panels), (found.ks_hdr, *largest), strict=True):
        if distance > found.ks_bound:
            panel.title.set_color(FLOW)
    return figure


def history(history: History | Sequence[History], figure: FigureBase | None = None) -> FigureBase:
    """Log-likelihood of the training and validation rows over the epochs of a fit.

    A fit that learns goes up; where the blue line of the training rows leaves the vermilion one of the validation rows behind, it learns
    them by heart. The dashed line is the epoch whose weights were kept. Epochs that are far worse than the others are cut off.

    Parameters
    ----------
    history : History, or sequence of them
        From `fit`; of an ensemble one for each member.
    figure : Figure or SubFigure, optional
        Where to draw; a new figure if None.

    Returns
    -------
    Figure or SubFigure
        With one axes.

    Raises
    ------
    ValueError
        If it is something else, or has no epochs.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> import fastmaf
    >>> flow = fastmaf.MAF(2, transforms=1, hidden_features=(8,), seed=0)
    >>> fitted = flow.fit(np.random.default_rng(0).normal(size=(500, 2)), max_epochs=3, seed=0)
    >>> history(fitted).axes[0].get_xlabel()
    'epoch'
    """
    fits: list[Any] = list(history) if isinstance(history, (list, tuple)) else [history]
    if not fits or not all(hasattr(fit, "best_epoch") and isinstance(getattr(fit, "validation", None), list) for fit in fits):
        raise ValueError(f"history is {_words.shown(history)}; it must be the History that fit returns, or a list of them")
    lines = []  # x, y and whether of the validation rows, whose score before the first epoch is known
    for fit in fits:
        lines.append((np.arange(1, len(fit.train) + 1), np.array(fit.train, np.float64), False))
        before = [] if fit.start is None else [fit.start]
        if fit.validation:
            shown = np.array([*before, *fit.validation], np.float64)
            lines.append((np.arange(len(shown)) + 1 - len(before), shown, True))
    values = np.concatenate([y[np.isfinite(y)] for _, y, _ in lines])
    if not values.size:
        raise ValueError("history has no epoch with a finite log-likelihood; there is nothing to draw")
    figure = _figure(figure, 6.4, 4.0)
    page: Any = figure
    from matplotlib.lines import Line2D

    styles: dict[bool, dict[str, Any]] = {False: {"color": DATA, "linewidth": 1.2}, True: {"color": FLOW, "linewidth": 1.6}}
    kept: dict[str, Any] = {"color": QUIET, "linewidth": 1.0, "linestyle": (0, (4, 3))}
    best = [fit.best_epoch for fit in fits if fit.best_epoch]
    handles, words = [Line2D([], [], **styles[False])], ["train"]
    if any(fit.validation for fit in fits):
        handles, words = [*handles, Line2D([], [], **styles[True])], [*words, "validation"]
    if best:
        handles, words = [*handles, Line2D([], [], **kept)], [*words, "kept" if len(fits) > 1 else f"kept: epoch {best[0]}"]
    top = _key(page, handles, words)
    high, middle = float(values.max()), float(np.median(values))
    low = max(float(values.min()), middle - 6 * (high - middle)) if high > middle else float(values.min())
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    last = max(len(fit.train) for fit in fits)
    (panel,) = _grid(
        page,
        (0, 0, page.bbox.width * 72 / page.figure.dpi, top),
        [""],
        1,
        ("epoch", _Axis(-0.02 * last, max(4.0, 1.02 * last))),
        ("log-likelihood per row, nats", _Axis.of(low - margin, high + margin)),
    )
    for epoch in best:
        panel.axvline(epoch, **kept)
    for x, y, held_out in lines:
        panel.plot(x, y, marker="." if len(y) < 3 else None, **styles[held_out])
    return figure
