"""Pictures: they come as figures with the parts that they should have, and bad input is named."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace

import numpy as np
import pytest

import fastmaf
from fastmaf import plot, stats

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.stats import kstest

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


NAMES = [
    "mass",
    "velocity_dispersion_km_s_within_re",
    "g-r",
    "$\\Omega_m h^2$ of the chain",
    "thelongestwordofalltheseandnoblankinit",
    "z",
    "jd",
]
SCALE, SHIFT = [1e8, 1e12, 1e-8, 1.0, 1e-3, 30.0, 1.0], [1e9, 0.0, 0.0, -1e6, 1.0, 1e5, 2451541.5]


def uneven(columns, rows=200):
    """Names long and short, and columns of all sizes and places."""
    x = np.random.default_rng(2).normal(size=(rows, columns))
    names, scale, shift = ([some[j % 7] for j in range(columns)] for some in (NAMES, SCALE, SHIFT))
    return x * scale + shift, names


def texts_of(figure, monkeypatch):
    """What is written around the panels, and where: {text: box} of all that is drawn."""
    found = {}
    draw = Text.draw

    def note(self, renderer, *more):
        if self.get_visible() and self.get_text() and not (self.axes and self in self.axes.texts):
            found[self] = self.get_window_extent(renderer)
        draw(self, renderer, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", note)
        figure.draw_without_rendering()
    return found


def check_texts(figure, panels, texts):
    """All within the figure, apart from each other and outside of the panels."""
    boxes = np.array([box.extents for box in texts.values()])
    words = [text.get_text() for text in texts]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= figure.bbox.extents[2:]).all()
    frames = np.array([axes.get_window_extent().extents for axes in panels])
    for others, same in ((boxes, np.eye(len(boxes), dtype=bool)), (frames, False)):
        common = np.minimum(boxes[:, None, 2:], others[:, 2:]) - np.maximum(boxes[:, None, :2], others[:, :2])
        first, second = np.nonzero((common > 0.5).all(axis=2) & ~same)
        assert not first.size, [(words[i], words[j] if others is boxes else "panel") for i, j in zip(first, second, strict=True)]


def check_triangle(figure, panels, texts):
    """As well, and each outer axis has a name and two tick labels."""
    check_texts(figure, panels, texts)
    columns = round((2 * len(panels)) ** 0.5 - 0.5)
    for axes in panels[-columns:]:
        assert axes.xaxis.label in texts and len(set(axes.get_xticklabels()) & texts.keys()) > 1
    for i in range(columns):
        axes = panels[i * (i + 1) // 2]
        assert axes.yaxis.label in texts and (i == 0 or len(set(axes.get_yticklabels()) & texts.keys()) > 1)


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 7, 27])
def test_labels_are_whole_and_apart(columns, monkeypatch):
    x, names = uneven(columns)
    if columns > 7:
        monkeypatch.setattr(plot, "_density", lambda *_: np.zeros((1, 1)))  # contours take time and change no label
    figure = plot.corner(x, x, names)
    texts = texts_of(figure, monkeypatch)
    check_triangle(figure, figure.axes, texts)
    legend = [box.height for text, box in texts.items() if text.get_text() in ("data", "samples")]
    assert len(legend) == 2 and min(legend) > figure.bbox.height / 100
    for axes, name in zip(figure.axes[-columns:], names, strict=True):
        assert axes.get_xlabel().replace("\n", "").replace(" ", "").startswith(name.replace(" ", ""))


def calibrated(columns, rows=1000, factor=1.0, names=None, **options):
    """How a normal flow does on normal rows, of which the last column is multiplied."""
    flow = fastmaf.Flow([], features=columns, names=names, **options)
    x = np.random.default_rng(3).normal(size=(rows, columns)) * np.append(np.ones(columns - 1), factor)
    return stats.calibration(flow, x, n=100, seed=1)


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize(("columns", "size"), [(1, None), (3, None), (4, (9, 3)), (2, (4, 4)), (27, None), (27, (12, 7))])
def test_labels_of_a_calibration_are_whole_and_apart(columns, size, factor, monkeypatch):
    names = [NAMES[j % 7] + str(j) for j in range(columns)]
    found = calibrated(columns, 1000, factor, names)
    figure = plot.calibration(found, None if size is None else Figure(figsize=size))
    coverage, *panels = figure.axes
    texts = texts_of(figure, monkeypatch)
    check_texts(figure, figure.axes, texts)
    assert len(panels) == columns and coverage.get_xlabel() == "credible mass"
    assert coverage.get_ylabel().replace("\n", " ") == "share of rows inside" and "0.\n" not in coverage.get_title()
    words = {text.get_text() for text in texts}
    assert {"rank / draws, PIT", "density", "rank", "PIT", "within chance"} <= words
    for panel, name in zip(panels, names, strict=True):
        title, _, distance = panel.get_title().replace("\n", "").rpartition("KS ")
        assert panel.title in texts and title.replace(" ", "") == name.replace(" ", "")
        assert (">" in distance) == (panel is panels[-1] and factor > 1) == (panel.title.get_color() == plot.FLOW)
    for labels in (coverage.get_xticklabels(), panels[0].get_yticklabels(), panels[-1].get_xticklabels()):
        assert len(set(labels) & texts.keys()) > 1
    assert drawn(figure).startswith(b"\x89PNG")


def test_a_calibration_shows_its_ranks_and_its_coverage():
    found = calibrated(2, factor=0.5)
    coverage, first, last = plot.calibration(found).axes
    band, ranks = first.collections[0], first.patches[0]
    for column, panel in enumerate((first, last)):
        heights, edges, _ = panel.patches[0].get_data()
        counts = np.histogram(found.ranks[:, column], np.round(edges * 101) - 0.5)[0]
        assert counts.sum() == len(found.ranks) and np.allclose(heights * np.diff(edges), counts / len(found.ranks))
        assert panel.patches[1].get_data().values.mean() == pytest.approx(1)
    low, high = band.get_paths()[0].get_extents().intervaly
    inside = (ranks.get_data().values >= low) & (ranks.get_data().values <= high)
    assert inside.mean() >= 0.9 and not ((last.patches[0].get_data().values >= low) & (last.patches[0].get_data().values <= high)).all()
    mass, share = coverage.lines[1].get_data()
    assert np.array_equal(share, found.coverage(mass)) and share[100] > 0.6
    assert len(plot.calibration(stats.calibration(fastmaf.MADE(2, masks=2, seed=0), X[:, :2], n=20, seed=1)).axes[1].patches) == 1


def test_ranks_that_are_even_are_flat_where_bins_hold_more_of_some():
    found = replace(calibrated(1), ranks=np.tile(np.arange(101), 10)[:, None])
    assert np.allclose(plot.calibration(found).axes[1].patches[0].get_data().values, 1)


def test_bins_lie_within_chance_as_often_as_they_should():
    counts = np.random.default_rng(0).binomial(500, 0.1, 100_000)
    low, high = (plot._binomial(500, 0.1, level) for level in (0.005, 0.995))
    assert 0.99 <= np.mean((counts >= low) & (counts <= high)) < 0.994


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_labels_of_the_noise_are_whole_and_apart(columns, monkeypatch):
    figure = plot.noise(X[:, [0, 1, 2, 0]][:, :columns], NAMES[:columns])
    check_triangle(figure, figure.axes, texts_of(figure, monkeypatch))


def test_labels_fit_into_a_part_of_a_page(monkeypatch):
    page = Figure(figsize=(12, 5))
    x, names = uneven(4)
    for part, draw in zip(page.subfigures(1, 2), (lambda f: plot.corner(x, x, names, f), lambda f: plot.noise(x, names, f)), strict=True):
        draw(part)
        panels = list(part.axes)
        words = {text: box for text, box in texts_of(page, monkeypatch).items() if text.figure is part}
        check_triangle(page, panels, words)


@pytest.mark.parametrize(("scale", "size"), [(1, (5, 5.2)), (1e-6, (3, 3)), (1e4, (8, 3))])
def test_labels_of_redshifts_are_whole_and_apart(scale, size, monkeypatch):
    truth = np.linspace(0.1, 2, 400) * scale
    figure = plot.redshift(truth, truth * 1.001, np.linspace(0, 1, 400), figure=Figure(figsize=size))
    upper, lower = figure.axes
    texts = texts_of(figure, monkeypatch)
    for text in upper.child_axes[0].findobj(Text):
        texts.pop(text, None)
    check_texts(figure, [upper, lower], texts)
    assert {upper.yaxis.label, lower.yaxis.label, lower.xaxis.label} <= texts.keys()
    for labels in (upper.get_yticklabels(), lower.get_yticklabels(), lower.get_xticklabels()):
        assert len(set(labels) & texts.keys()) > 1


def test_ticks_times_unit_plus_offset_are_the_values():
    x, names = uneven(7)
    figure = plot.corner(x, x, names)
    units = ["[1e9]", "[1e12]", "[1e-8]", "[\u2212 1000000]", "", "[+ 100000]", "[+ 2451540]"]
    values = [(1e9, 0), (1e12, 0), (1e-8, 0), (1, -1e6), (1, 0), (1, 1e5), (1, 2451540)]
    for axes, unit, (scale, offset), (low, high) in zip(figure.axes[-7:], units, values, np.quantile(x, [0.1, 0.9], axis=0).T, strict=True):
        assert axes.get_xlabel().endswith(unit) and ("[" in axes.get_xlabel()) == bool(unit)
        labels = [float(text.get_text().replace("\u2212", "-")) for text in axes.get_xticklabels()]
        assert np.allclose(axes.get_xticks(), np.array(labels) * scale + offset, rtol=1e-12, atol=1e-9 * scale)
        assert any(abs(place - 0.5 * (low + high)) < high - low for place in axes.get_xticks())


@pytest.mark.parametrize("x", [[[0.5174466, 1e10, 0.0]], [[1e-25, 3.0, -7e-12]] * 9, np.array([[3, -2, 1]]) * [[1], [2], [5]] * 1e-20])
def test_a_lone_row_constants_and_small_values_have_room(x, monkeypatch):
    figure = plot.corner(x, x, ["mass", "frac", "z"])
    check_triangle(figure, figure.axes, texts_of(figure, monkeypatch))
    drawn(figure)
    for axes, values in zip(figure.axes[-3:], np.transpose(x), strict=True):
        low, high = axes.get_xlim()
        assert low < min(values) and max(values) < high
        assert high - low <= max(1.2 * np.ptp(values), 0.2 * abs(values[0]) or 3)


def test_constant_data_are_shown_beside_their_samples():
    low, high = plot.corner(np.full((50, 1), 3.0), np.linspace(2, 5, 50)[:, None]).axes[0].get_xlim()
    assert low < 2.1 and high > 4.9


def test_dollars_that_hold_no_mathematics_are_themselves():
    figure = plot.corner(X, X, ["a$^$b", "$x_1$", "5$"])
    drawn(figure)
    assert [axes.get_xlabel() for axes in figure.axes[-3:]] == [r"a\$^\$b", "$x_1$", "5$"]


def test_contours_hold_what_they_say():
    rows = np.random.default_rng(1).normal(size=(200_000, 2))
    edges = np.linspace(-5, 5, 101)
    density = plot._density(rows[:, 0], rows[:, 1], edges, edges, blur=0.5)
    held = [density[density >= level].sum() for level in plot._levels(density, plot.MASS)]
    assert np.allclose(held, sorted(plot.MASS, reverse=True), atol=0.01)


HISTORIES = {
    "long": fastmaf.History(
        [-9.0, *(-1 / k for k in range(1, 60))], [-8.0, *(-1.1 / k for k in range(1, 60))], [], [], 55, "patience", -1e4
    ),
    "one epoch": fastmaf.History([1e6 + 0.5], [1e6 + 0.25], [], [], 1, "max_epochs", 1e6),
    "no validation": fastmaf.History([-1e9, -3.0, -2.5, -2.4, np.nan], [], [], [], 0, "the loss was not finite"),
    "members": [
        fastmaf.History([-3.0, -2.0, -1.5], [-3.1, -2.1, -1.6], [], [], 2, "callback", -5.0),
        fastmaf.History([-2.9, -2.2], [-3.0, -2.4], [], [], 2, "patience", -5.1),
    ],
    "constant": fastmaf.History([2.0, 2.0], [2.0, 2.0], [], [], 0, "max_epochs", 2.0),
}


@pytest.mark.parametrize("case", HISTORIES)
@pytest.mark.parametrize("size", [None, (3, 2)])
def test_labels_of_a_history_are_whole_and_apart(case, size, monkeypatch):
    history = HISTORIES[case]
    figure = plot.history(history, None if size is None else Figure(figsize=size))
    (panel,) = figure.axes
    texts = texts_of(figure, monkeypatch)
    check_texts(figure, [panel], texts)
    assert panel.get_xlabel() == "epoch" and panel.get_ylabel().replace("\n", " ").startswith("log-likelihood per row, nats")
    words = {text.get_text() for text in texts}
    fits = history if isinstance(history, list) else [history]
    kept = "kept" if len(fits) > 1 else f"kept: epoch {fits[0].best_epoch}"
    assert ("validation" in words) == bool(fits[0].validation) and (kept in words) == bool(fits[0].best_epoch)
    low, high = panel.get_ylim()
    assert low < fits[0].train[-2:][0] < high and high - low < 20
    assert panel.get_xlim()[0] <= 0 and panel.get_xlim()[1] >= len(fits[0].train)
    expected = [(plot.DATA, range(1, len(fit.train) + 1), fit.train) for fit in fits]
    expected += [(plot.FLOW, range(len(fit.validation) + 1), [fit.start, *fit.validation]) for fit in fits if fit.validation]
    for colour in (plot.DATA, plot.FLOW):
        shown = [line.get_data() for line in panel.lines if line.get_color() == colour]
        for line, (_, *data) in zip(shown, (each for each in expected if each[0] == colour), strict=True):
            assert np.array_equal(line, data, equal_nan=True)
    assert sum(line.get_color() == plot.QUIET for line in panel.lines) == sum(fit.best_epoch > 0 for fit in fits)
    assert drawn(figure)


@pytest.mark.parametrize("columns", [1, 2])
def test_few_columns(columns):
    assert len(plot.corner(X[:, :columns], X[:, :columns]).axes) == columns * (columns + 1) // 2
    drawn(plot.noise(X[:, :columns]))


def test_rows_that_are_not_finite_are_left_out():
    x = X.copy()
    x[3, 1], x[5, 0] = np.nan, -np.inf
    with pytest.warns(RuntimeWarning, match="data has 2 rows with values that are not finite, which are left out"):
        drawn(plot.corner(x, X))
    with pytest.warns(RuntimeWarning, match="u has 1 row with"):
        drawn(plot.noise(x[:5]))


def test_noise_is_drawn_beside_the_normal_density():
    figure = plot.noise(np.random.default_rng(0).normal(size=(1000, 2)))
    assert len(figure.axes) == 3 and len(figure.axes[1].lines) == len(plot.MASS)
    assert figure.axes[1].get_ylabel() == "$u_{2}$"
    drawn(figure)


@pytest.mark.parametrize("columns", [2, 6])
def test_the_distances_of_noise_stand_above_its_histograms(columns, monkeypatch):
    monkeypatch.setattr(plot, "_density", lambda *_: np.zeros((1, 1)))
    u = np.random.default_rng(0).normal(size=(1000, columns))
    u[:, 1] *= 1.3
    figure = plot.noise(u)
    texts = [figure.axes[i * (i + 3) // 2].texts[0] for i in range(columns)]
    distances = kstest(u[:, 0], "norm").statistic, kstest(u[:, 1], "norm").statistic
    assert texts[0].get_text() == f"KS {distances[0]:.3f}" and texts[0].get_color() == plot.INK
    assert texts[1].get_text() == f"KS {distances[1]:.3f} > {stats.ks_bound(1000, columns):.3f}" and texts[1].get_color() == plot.FLOW
    figure.draw_without_rendering()
    for text in texts:
        box, panel = text.get_window_extent().extents, text.axes.get_window_extent().extents
        assert (box[:2] > panel[:2]).all() and (box[2:] < panel[2:]).all()
        curve = text.axes.transData.transform([0, 1 / np.sqrt(2 * np.pi)])[1]
        assert box[1] > curve


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


@pytest.mark.parametrize("contexts", [0, 2])
@pytest.mark.parametrize("members", [1, 2])
def test_slices_are_those_of_the_density(contexts, members):
    flow = fastmaf.MAF(3, contexts, transforms=2, hidden_features=(16,), bounds=[(None, None), (None, None), (0, None)], seed=4)
    context = np.array([0.5, -1.0]) if contexts else None
    x = X + [0, 5, 1e4]
    flow.fit(x, np.random.default_rng(1).normal(context, size=(500, 2)) if contexts else None, max_epochs=2, seed=0, progress=False)
    flow.names = ["a", "b", "c"]
    flow = flow if members == 1 else fastmaf.Ensemble([flow, flow])
    point = x.mean(axis=0)
    figure = plot.slices(flow, point, context, columns=["c", 0])
    assert [axes.get_xlabel() for axes in figure.axes[1:]] == ["c [+ 10000]", "a"]
    for axes, j in ((figure.axes[0], 2), (figure.axes[2], 0)):
        low, high = axes.get_xlim()
        places = np.linspace(low, high, 321)
        rows = np.tile(point, (321, 1))
        rows[:, j] = places
        values = np.exp(flow.log_prob(rows, context) - flow.log_prob(rows, context).max())
        (filled,) = axes.collections
        outline = filled.get_paths()[0].vertices
        np.testing.assert_allclose(outline[1:322, 1].max(), 1)
        upper = {round(float(x), 6): y for x, y in outline if y > 0}
        found = np.array([upper.get(round(float(place), 6), 0.0) for place in places])
        np.testing.assert_allclose(found, values, atol=1e-5)
        assert values[[0, -1]].max() < 0.05, "axes hold the slices"
        assert axes.lines[0].get_xdata()[0] == point[j]
    assert figure.axes[1].lines[0].get_ydata()[0] == point[0] and figure.axes[1].lines[1].get_xdata()[0] == point[2]
    drawn(figure)


def test_axes_are_as_narrow_as_slices():
    x = X[:, :2] * [1, 0.01] + X[:, :1]  # the second column is the first one, nearly
    flow = fastmaf.MAF(2, transforms=1, hidden_features=(8,), seed=0)
    flow.fit(x, standardize="full", max_epochs=1, lr=1e-6, seed=0, progress=False)
    (axes,) = plot.slices(flow, x.mean(axis=0), columns=[0]).axes
    assert np.ptp(axes.get_xlim()) < 0.05 * np.ptp(x[:, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot.slices(fastmaf.MAF(3), X), r"at has shape \(500, 3\); it must be \(3,\)"),
        (lambda: plot.slices(fastmaf.MAF(1, bounds=[(0, 1)]), [2.0]), "at is a point of density zero"),
        (lambda: plot.slices(fastmaf.MADE(3, "bernoulli"), [0, 1, 0]), "flow has discrete variables"),
        (lambda: plot.slices(X, X[0]), "flow is an array of shape .* it must be a Flow or an Ensemble"),
        (lambda: plot.corner(X, X[:, :2]), r"samples has shape \(500, 2\); it must be \(n, 3\)"),
        (lambda: plot.corner(X[:, 0], X), r"data has shape \(500,\); it must be \(n, D\)"),
        (lambda: plot.corner(X, X, ("a", "b")), "names lists 2 names; there are 3 columns"),
        (lambda: plot.corner(X, X[:0]), "samples has no finite rows"),
        (lambda: plot.noise(X * np.nan), "u has no finite rows"),
        (lambda: plot.calibration(X), r"found is an array of shape \(500, 3\) .*; it must be of type Calibration"),
        (lambda: plot.history(X), r"history is an array of shape .*; it must be the History that fit returns"),
        (lambda: plot.history(fastmaf.History()), "history has no epoch with a finite log-likelihood"),
        (lambda: plot.redshift(X[:, 0], X[:5, 0]), r"truth has shape \(500,\), estimate \(5,\); both must be \(n,\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for call in (
        lambda: plot.corner(X, X),
        lambda: plot.noise(X),
        lambda: plot.redshift(X[:, 0], X[:, 0]),
        lambda: plot.history(HISTORIES["long"]),
    ):
        with pytest.raises(ImportError, match=r"fastmaf\.plot needs matplotlib .*pip install 'fastmaf\[plot\]'"):
            call()


def test_rows_that_lie_elsewhere_are_said_in_the_picture():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 2))
    for figure in (plot.noise(x + 50), plot.corner(x, x + 1000)):
        assert sum(text.get_text() == "all outside" for axes in figure.axes for text in axes.texts) == 2


def test_weights_levels_and_columns_of_a_corner():
    """Rows by their weights are the rows drawn by them; contours hold the shares that are asked for; columns come by name or number."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40_000, 3))
    weights = np.where(x[:, 0] > 0, 3.0, 0.0)
    weights[:100] = 0.0
    figure = plot.corner(x, x[weights > 0], names=["a", "b", "c"], weights=weights, columns=["c", 0], levels=[0.5])
    assert len(figure.axes) == 3
    names = {axes.get_xlabel() for axes in figure.axes} | {axes.get_ylabel() for axes in figure.axes}
    assert {"a", "c"} <= names and "b" not in names
    drawn, filled = (patch for patch in figure.axes[2].patches)
    assert min(drawn.get_xy()[:, 0]) >= -0.7, "what has no weight is not drawn"
    tilted = plot.corner(x, x + [1, 0, 0], columns=[0, 1], weights=np.exp(x[:, 0]), levels=[0.5])  # N(1, 1) in the first column
    filled, drawn = (patch.get_xy() for patch in tilted.axes[0].patches)
    peaks = [float(outline[outline[:, 1] > 0.5 * outline[:, 1].max(), 0].mean()) for outline in (filled, drawn)]
    assert peaks[0] == pytest.approx(peaks[1], abs=0.15) and peaks[1] == pytest.approx(1, abs=0.2)
    shaded, line = (np.concatenate([path.vertices for path in each.get_paths()]) for each in tilted.axes[1].collections)
    assert shaded.max(axis=0) == pytest.approx(line.max(axis=0), abs=0.2) and shaded.min(axis=0) == pytest.approx(line.min(axis=0), abs=0.2)
    same = plot.corner(x, x[weights > 0], columns=[2, 0], levels=[0.5], samples_weights=rng.uniform(1, 1.0001, (weights > 0).sum()))
    contours = [axes.collections[-1] for axes in (figure.axes[1], same.axes[1])]
    one, two = (np.concatenate([path.vertices for path in contour.get_paths()]) for contour in contours)
    assert one.min(axis=0) == pytest.approx(two.min(axis=0), abs=0.05) and one.max(axis=0) == pytest.approx(two.max(axis=0), abs=0.05)
    for options, message in (
        ({"weights": np.ones(3)}, "weights has 3 rows; data has 40000"),
        ({"samples_weights": -np.ones(len(x))}, "samples_weights has -1.0 in row 0; weights must be finite and not negative"),
        ({"columns": ["d"]}, "columns has 'd', which is no name"),
        ({"columns": [3]}, "columns is 3"),
        ({"columns": "a"}, "columns is 'a'; it must list names or numbers"),
        ({"levels": [0.5, 1.0]}, "levels is "),
        ({"levels": []}, "levels is "),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            plot.corner(x, x, names=["a", "b", "c"], **options)
