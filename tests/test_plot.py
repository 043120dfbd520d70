"""Pictures: they come as figures with the parts that they should have, and bad input is named."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest

from fastmaf import plot

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
from matplotlib.figure import Figure

X = np.random.default_rng(0).normal(size=(500, 3)) @ np.triu(np.ones((3, 3)))


def drawn(figure):
    """The bytes of the picture: nothing fails late."""
    file = io.BytesIO()
    figure.savefig(file)
    return file.getvalue()


def test_corner_has_one_panel_per_pair():
    figure = plot.corner(X, X[:300] + 0.1, ("a", "b", "c"))
    assert isinstance(figure, Figure) and len(figure.axes) == 6
    assert [axes.get_xlabel() for axes in figure.axes[-3:]] == ["a", "b", "c"]
    assert drawn(figure).startswith(b"\x89PNG")


def test_contours_hold_what_they_say():
    rows = np.random.default_rng(1).normal(size=(200_000, 2))
    edges = np.linspace(-5, 5, 101)
    density = plot._density(rows[:, 0], rows[:, 1], edges, edges, blur=0.5)
    held = [density[density >= level].sum() for level in plot._levels(density)]
    assert np.allclose(held, sorted(plot.MASS, reverse=True), atol=0.01)


@pytest.mark.parametrize("columns", [1, 2])
def test_few_columns(columns):
    assert len(plot.corner(X[:, :columns], X[:, :columns]).axes) == columns * (columns + 1) // 2
    drawn(plot.noise(X[:, :columns]))


def test_rows_that_are_not_finite_are_left_out():
    x = X.copy()
    x[3, 1], x[5, 0] = np.nan, -np.inf
    drawn(plot.corner(x, x))
    drawn(plot.noise(x))


def test_noise_is_drawn_beside_the_normal_density():
    figure = plot.noise(np.random.default_rng(0).normal(size=(1000, 2)))
    assert len(figure.axes) == 3 and len(figure.axes[1].lines) == len(plot.MASS)
    assert figure.axes[1].get_ylabel() == "$u_{2}$"
    drawn(figure)


def test_redshift():
    truth = np.linspace(0.1, 2, 400)
    figure = plot.redshift(truth, truth + 0.01, np.linspace(0, 1, 400), "a note")
    assert len(figure.axes) == 2 and [text.get_text() for text in figure.axes[0].texts] == ["a note"]
    drawn(figure)


def test_a_part_of_a_page_can_be_given():
    page = Figure(figsize=(8, 4))
    left, right = page.subfigures(1, 2)
    assert plot.corner(X, X, figure=left) is left and plot.noise(X, figure=right) is right
    assert len(page.axes) == 12
    drawn(page)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot.corner(X, X[:, :2]), r"samples has shape \(500, 2\); it must be \(n, 3\)"),
        (lambda: plot.corner(X[:, 0], X), r"data has shape \(500,\); it must be \(n, D\)"),
        (lambda: plot.corner(X, X, ("a", "b")), "names lists 2 names; there are 3 columns"),
        (lambda: plot.corner(X, X[:0]), "samples has no finite rows"),
        (lambda: plot.noise(X * np.nan), "u has no finite rows"),
        (lambda: plot.redshift(X[:, 0], X[:5, 0]), r"truth has shape \(500,\), estimate \(5,\); both must be \(n,\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for call in (lambda: plot.corner(X, X), lambda: plot.noise(X), lambda: plot.redshift(X[:, 0], X[:, 0])):
        with pytest.raises(ImportError, match=r"fastmaf\.plot needs matplotlib .*pip install 'fastmaf\[plot\]'"):
            call()


def test_rows_that_lie_elsewhere_are_said_in_the_picture():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 2))
    for figure in (plot.noise(x + 50), plot.corner(x, x + 1000)):
        assert sum(text.get_text() == "all outside" for axes in figure.axes for text in axes.texts) == 2
