"""Run every step of the tutorial, draw its figures, and write its snippets, tables and numbers into README.md.

``python docs/tutorial/make.py`` takes less than a minute and needs fastmaf and matplotlib.  Each step is a function;
a snippet of the page is the part of it between ``# snippet`` and ``# end``, with the default values of ``rows`` and ``epochs`` put in.
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

import fastmaf
from fastmaf.data import galaxies

HERE = Path(__file__).resolve().parent
Array = NDArray[Any]
Results = dict[str, Any]

BLUE, RED, GREEN, AMBER, INK, QUIET = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#222222", "#8A8A8A"
"""Of the palette of Okabe and Ito, which colour-blind readers tell apart, and two greys."""

BLUES = LinearSegmentedColormap.from_list("blues", ["#FFFFFF", "#56B4E9", BLUE, "#00304D"])


class Page:
    """The page being made: a folder for its figures, and the text that goes between its markers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: dict[str, str] = {}
        (folder / "figures").mkdir(parents=True, exist_ok=True)

    def number(self, name: str, value: float, form: str) -> None:
        """A number inside a sentence."""
        self.parts[name] = format(value, form)

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is aligned to the left, the others to the right."""
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        self.parts[name] = "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n"

    def snippet(self, name: str, code: str) -> None:
        """A block of code."""
        self.parts[name] = f"\n\n```python\n{code}\n```\n\n"

    def figure(self, name: str, figure: Figure) -> None:
        """A picture, in figures/name.png."""
        figure.savefig(self.folder / "figures" / f"{name}.png", dpi=105, metadata={"Software": None}, pil_kwargs={"optimize": True})

    def write(self, text: str) -> str:
        """The page with everything between its markers replaced."""
        marker = re.compile(r"(<!-- begin ([\w-]+) -->).*?(<!-- end -->)", re.DOTALL)
        asked = [name for _, name, _ in marker.findall(text)]
        if sorted(asked) != sorted(self.parts):
            raise ValueError(f"markers and parts differ in {sorted(set(asked) ^ set(self.parts)) or 'how often they appear'}")
        return marker.sub(lambda match: match[1] + self.parts[match[2]] + match[3], text)


def panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, Array]:
    """A figure and its axes, in the style of the page."""
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in grid.ravel():
        axes.tick_params(labelsize=9, length=3, width=0.6, color=QUIET, labelcolor=INK)
        for spine in axes.spines.values():
            spine.set(color=QUIET, linewidth=0.6)
    return figure, grid


def named(axes: Axes, title: str = "", x: str = "", y: str = "") -> None:
    """Title and labels."""
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xlabel(x, fontsize=10, color=INK)
    axes.set_ylabel(y, fontsize=10, color=INK)


def legend(axes: Axes, **options: Any) -> None:
    """A legend without a frame."""
    axes.legend(fontsize=9, frameon=False, labelcolor=INK, **options)


# Densities of the tutorial


def curved(rows: int, seed: int) -> Array:
    """Rows (x1, x2) with x2 ~ N(0, 2^2) and x1 given x2 ~ N(x2^2 / 4, 1)."""
    x2, noise = np.random.default_rng(seed).normal(size=(2, rows)) * [[2.0], [1.0]]
    return np.stack([x2**2 / 4 + noise, x2], axis=1)


def curved_log_prob(x: Array) -> Array:
    """The log-density of `curved`."""
    return normal_log_prob(x[:, 1], 0.0, 2.0) + normal_log_prob(x[:, 0], x[:, 1] ** 2 / 4, 1.0)


def ring(rows: int, seed: int) -> Array:
    """Rows (x1, x2) at radius r ~ N(3, 0.4^2), at any angle."""
    rng = np.random.default_rng(seed)
    angle, r = rng.uniform(0, 2 * np.pi, rows), rng.normal(3, 0.4, rows)
    return np.stack([r * np.cos(angle), r * np.sin(angle)], axis=1)


def ring_log_prob(x: Array) -> Array:
    """The log-density of `ring`."""
    r = np.hypot(x[:, 0], x[:, 1])
    return normal_log_prob(r, 3.0, 0.4) - np.log(2 * np.pi * r)


def normal_log_prob(x: Array, mean: Any, scale: float) -> Array:
    """The log-density of N(mean, scale^2)."""
    return -0.5 * ((x - mean) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)


def normal_cdf(u: Array) -> Array:
    """The cumulative distribution of N(0, 1)."""
    return 0.5 * (1 + np.vectorize(math.erf)(np.asarray(u, np.float64) / math.sqrt(2)))


def ks(p: Array) -> float:
    """The Kolmogorov-Smirnov distance of numbers from the uniform distribution on (0, 1)."""
    p, steps = np.sort(p), np.arange(p.size + 1) / p.size
    return float(max((steps[1:] - p).max(), (p - steps[:-1]).max()))


def noise_distances(u: Array) -> Array:
    """KS distances of u1 and u2 from N(0, 1), and of u1^2 + u2^2 from chi^2 with two degrees of freedom."""
    return np.array([ks(normal_cdf(u[:, 0])), ks(normal_cdf(u[:, 1])), ks(1 - np.exp(-0.5 * (u**2).sum(axis=1)))])


# The steps


def one_outcome(page: Page, rows: int = 1000, epochs: int = 200) -> Results:
    """One binary outcome: the fitted probability is the fraction that was seen."""
    # snippet one
    x = (np.random.default_rng(1).random((rows, 1)) < 0.3).astype(int)  # (n, 1): it fired, or not
    coin = fastmaf.MADE(features=1, conditional="bernoulli", hidden_features=(), seed=0)
    history = coin.fit(x, validation=0, batch_size=rows, lr=0.1, schedule="cosine", max_epochs=epochs, seed=0)
    learned = coin.conditional_probs([[0]])[0, 0]
    # end
    fraction = float(x.mean())
    least = -fraction * math.log(fraction) - (1 - fraction) * math.log(1 - fraction)
    lines = [["of the source", "0.3"], ["fraction seen", f"{fraction:.4f}"], ["learned", f"{learned:.4f}"]]
    page.table("one-table", ["probability of 1", "value"], lines)
    figure, ((left, right),) = panels(1, 2, 7.5, 2.9)
    p = np.linspace(0.03, 0.9, 300)
    left.plot(p, -fraction * np.log(p) - (1 - fraction) * np.log(1 - p), color=BLUE)
    left.plot([learned], [-float(coin.log_prob(x).mean())], "o", color=RED)
    arrow = {"arrowstyle": "-", "color": RED}
    left.annotate("learned", (learned, least), (learned, least + 0.28), ha="center", fontsize=9, color=RED, arrowprops=arrow)
    named(left, "The loss of one probability", "p", "mean of $-\\log p(x)$ / nats")
    right.axhline(least, color=QUIET, linewidth=1, linestyle="--")
    right.plot(np.arange(1, len(history.train) + 1), -np.asarray(history.train), color=RED)
    right.set_xscale("log")
    right.annotate("dashed: entropy of the fraction", (0.97, 0.93), xycoords="axes fraction", ha="right", va="top", fontsize=9, color=INK)
    named(right, "Training", "epoch", "loss / nats")
    page.figure("1-one-outcome", figure)
    return {"fraction": fraction, "learned": float(learned)}


def phrase(page: Page, rows: int = 2000, epochs: int = 3000) -> Results:
    """A phrase of two words, from counts."""
    # snippet phrase
    first, second = ["dark", "hot", "cold"], ["matter", "energy", "gas", "star"]
    p1 = np.array([0.5, 0.3, 0.2])  # p(x1)
    p2 = np.array([[0.55, 0.35, 0.05, 0.05], [0.1, 0.1, 0.5, 0.3], [0.3, 0.05, 0.6, 0.05]])  # p(x2 | x1)
    counts = np.random.default_rng(2).multinomial(rows, (p1[:, None] * p2).ravel())

    phrases = np.array([(a, b) for a in range(3) for b in range(4)])  # (12, 2), each once
    model = fastmaf.MADE(features=2, conditional="categorical", categories=[3, 4], hidden_features=(32,), seed=0)
    model.fit(phrases, weights=counts, validation=0, lr=0.01, schedule="cosine", max_epochs=epochs, seed=0)
    learned = np.exp(model.log_prob(phrases)).reshape(3, 4)
    # end
    # snippet phrase-step
    q = model.conditional_probs(phrases)  # (12, 2, 4): for each phrase p(x1), then p(x2 | x1)
    q1, q2 = q[0, 0, :3], q[::4, 1]
    # end
    true, seen = p1[:, None] * p2, counts.reshape(3, 4) / rows
    seen2 = seen / seen.sum(axis=1, keepdims=True)
    tables = (true, seen, learned)
    lines = [[f"{a} {b}", *(f"{p[i, j]:.3f}" for p in tables)] for i, a in enumerate(first) for j, b in enumerate(second)]
    page.table("phrase-table", ["phrase", "true p(x1) p(x2 given x1)", "counted", "learned"], lines)
    page.number("phrase-error", float(np.abs(learned - seen).max()), ".0e")
    figure, (axes,) = panels(1, 4, 9, 2.7, sharey=True)
    bars = [(p1, seen.sum(axis=1), q1, first, "first word $x_1$")]
    bars += [(p2[i], seen2[i], q2[i], second, f"$x_2$ after “{word}”") for i, word in enumerate(first)]
    for panel, (truth, count, fit, words, title) in zip(axes, bars, strict=True):
        place = np.arange(len(words))
        panel.bar(place - 0.27, truth, 0.26, color=QUIET, label="true")
        panel.bar(place, count, 0.26, color=BLUE, label="counted")
        panel.bar(place + 0.27, fit, 0.26, color=RED, label="learned")
        panel.set_xticks(place, words, rotation=30)
        named(panel, title)
    named(axes[0], "first word $x_1$", "", "probability")
    legend(axes[3])
    page.figure("2-phrase", figure)
    return {"true": true, "seen": seen, "learned": learned, "product": q1[:, None] * q2}


def staircases(page: Page) -> Results:
    """Masks in the order drawn and sorted by degree, and the units that come to life while a row is drawn."""
    # snippet masks
    from fastmaf import masks

    rng = np.random.default_rng(3)
    ranks = np.arange(1, 7)  # six variables in the order of their columns
    m1, m2 = (masks.random_degrees(12, 6, False, rng) for _ in range(2))  # two hidden layers of 12 units

    def all_masks(m1, m2):
        return masks.hidden_mask(m1, ranks), masks.hidden_mask(m2, m1), masks.output_mask(ranks, m2, 1)

    drawn, stairs = all_masks(m1, m2), all_masks(np.sort(m1), np.sort(m2))
    # end
    figure, grid = panels(2, 3, 7.5, 5.4, gridspec_kw={"width_ratios": (6, 12, 12)})
    titles = ("$x$ to $h_1$", "$h_1$ to $h_2$", "$h_2$ to parameters of $x$")
    labels = [(ranks, m1, m2), (ranks, np.sort(m1), np.sort(m2))]
    for row, both, (r, d1, d2) in zip(grid, (drawn, stairs), labels, strict=True):
        for axes, mask, title, ins, outs in zip(row, both, titles, (r, d1, d2), (d1, d2, r), strict=True):
            axes.pcolormesh(mask[::-1], cmap=BLUES, vmin=0, vmax=1.4, edgecolors="white", linewidth=0.8)
            axes.set_xticks(np.arange(len(ins)) + 0.5, ins, fontsize=8)
            axes.set_yticks(np.arange(len(outs)) + 0.5, outs[::-1], fontsize=8)
            axes.tick_params(length=0)
            axes.set_aspect("equal")
            named(axes, title)
    grid[0, 0].set_ylabel("units as drawn", fontsize=10, color=INK)
    grid[1, 0].set_ylabel("sorted by degree", fontsize=10, color=INK)
    page.figure("3-masks", figure)

    # snippet sample
    made = fastmaf.MADE(features=6, hidden_features=(12, 12), activation="tanh", dtype="float64", seed=0)
    net = made.layers[-1].conditioner

    def units(x):
        h1 = net.initial.weight @ x + net.initial.bias
        h2 = net.blocks[0].maps[0].weight @ np.tanh(h1) + net.blocks[0].maps[0].bias
        return np.concatenate([h1, h2])

    final = made.sample(1, seed=0)[0]
    partial = [np.where(ranks <= step, final, rng.normal(size=6)) for step in range(7)]  # unknown variables are arbitrary
    alive = np.array([units(x) == units(final) for x in partial])  # (7, 24): has the unit its final value?
    # end
    step = alive.argmax(axis=0)
    degrees = np.concatenate([net.initial.degrees, net.blocks[0].maps[0].degrees])
    stages = [np.arange(7)[:, None] >= ranks, alive[:, :12], alive[:, 12:], np.arange(7)[:, None] >= ranks - 1]
    names = ("$x$", "$h_1$", "$h_2$", "parameters")
    figure, (axes,) = panels(1, 4, 8.2, 2.9, gridspec_kw={"width_ratios": (6, 12, 12, 6)}, sharey=True)
    colours = LinearSegmentedColormap.from_list("life", ["#F4F4F4", "#A9D3EE", RED])
    for panel, state, name in zip(axes, stages, names, strict=True):
        new = np.vstack([state[:1], state[1:] & ~state[:-1]])
        panel.pcolormesh(state.astype(int) + new, cmap=colours, vmin=0, vmax=2, edgecolors="white", linewidth=0.8)
        panel.set_yticks(np.arange(7) + 0.5, np.arange(7))
        panel.set_xticks([])
        panel.tick_params(length=0)
        named(panel, "", name)
    named(axes[0], "", names[0], "variables drawn so far")
    axes[0].invert_yaxis()
    figure.suptitle("red: final from this step on;  blue: final before;  grey: still depends on the unknown", fontsize=10, color=INK)
    page.figure("3-sampling", figure)
    reads = [net.initial.weight, net.blocks[0].maps[0].weight, net.final.weight]
    dense, kept = sum(w.size for w in reads), sum(int((w != 0).sum()) for w in reads)
    counted = [["one density, masks applied as zeros", dense], ["one density, staircases", kept]]
    counted += [["one sample, the network run once per variable", 6 * dense], ["one sample, each unit once", kept]]
    page.table("sample-table", ["D = 6, two layers of 12 units", "multiplications"], [[text, str(count)] for text, count in counted])
    return {"drawn": drawn, "stairs": stairs, "step": step, "degrees": degrees, "dense": dense, "kept": kept}


def conditionals(page: Page, rows: int = 20_000, epochs: int = 30) -> Results:
    """Gaussian conditionals, in the order in which the data are made."""
    # snippet conditionals
    x, held = curved(rows, seed=0), curved(rows, seed=1)
    made = fastmaf.MADE(features=2, order=[1, 0], hidden_features=(50, 50), seed=0)  # x2 first, then x1 given x2
    made.fit(x, max_epochs=epochs, schedule="cosine", seed=0)

    x2 = np.linspace(-4, 4, 81)
    u2 = made.to_noise(np.stack([0 * x2, x2], axis=1))[:, 1]
    mu, above = (made.from_noise(np.stack([u1 + 0 * u2, u2], axis=1))[:, 0] for u1 in (0.0, 1.0))
    sigma = above - mu
    # end
    # snippet given
    x1 = np.linspace(-4, 9, 261)
    p_given = {v: np.exp(made.log_prob(np.stack([x1, 0 * x1 + v], axis=1)) - made.prefix(1).log_prob([[v]])) for v in (0.0, 2.0, 4.0)}
    # end
    page.number("mu-error", float(np.abs(mu - x2**2 / 4).max()), ".2f")
    page.number("sigma-error", float(np.abs(sigma - 1).max()), ".2f")
    figure, ((left, right),) = panels(1, 2, 7.8, 3.2)
    left.plot(*held[:2000, ::-1].T, ".", color=QUIET, markersize=2, alpha=0.5, markeredgewidth=0)
    left.fill_between(x2, mu - sigma, mu + sigma, color=BLUE, alpha=0.3, linewidth=0, label="learned $\\mu \\pm \\sigma$")
    left.plot(x2, mu, color=BLUE)
    for offset in (-1, 0, 1):
        left.plot(x2, x2**2 / 4 + offset, color=RED, linewidth=1, linestyle="--", label="true" if not offset else None)
    left.set(xlim=(-4.2, 4.2), ylim=(-3.5, 8))
    legend(left, loc="upper center")
    named(left, "", "$x_2$", "$x_1$")
    for (value, density), colour in zip(p_given.items(), (BLUE, GREEN, AMBER), strict=True):
        right.plot(x1, density, color=colour, linewidth=2, label=f"$x_2 = {value:g}$")
        right.plot(x1, np.exp(normal_log_prob(x1, value**2 / 4, 1.0)), color=INK, linewidth=1, linestyle="--")
    right.set(ylim=(0, 0.55))
    legend(right, ncols=3, loc="upper center", columnspacing=1, handlelength=1.2)
    named(right, "", "$x_1$", "$p(x_1 \\mid x_2)$;  dashed: true")
    page.figure("4-conditionals", figure)
    return {"mu": np.abs(mu - x2**2 / 4).max(), "sigma": np.abs(sigma - 1).max()}


def jacobians(page: Page, rows: int = 60_000, epochs: int = 3) -> Results:
    """From data to noise and back, and the derivatives by finite differences."""
    # snippet flow
    x, names = galaxies()
    x = x[:rows].astype("float64")
    order = [3, 1, 6, 0, 4, 2, 5]
    made = fastmaf.MADE(features=7, order=order, hidden_features=(50, 50), activation="tanh", names=names, dtype="float64", seed=0)
    maf = fastmaf.MAF(features=7, transforms=2, hidden_features=(50, 50), activation="tanh", names=names, dtype="float64", seed=0)
    for flow in (made, maf):
        flow.fit(x, max_epochs=epochs, seed=0)
    round_trip = np.abs(maf.from_noise(maf.to_noise(x)) - x).max()

    # end
    # snippet jacobian
    def jacobian(flow, x, scale, step=1e-5):
        """du_i / dx_j, the columns in units of `scale`, by central differences."""
        shift = step * np.diag(scale)
        return (flow.to_noise(x + shift) - flow.to_noise(x - shift)).T / (2 * step)

    point, scale = x[0], x.std(axis=0)
    j_made, j_maf = (jacobian(flow, point, scale) for flow in (made, maf))
    j_sorted = j_made[np.ix_(order, order)]
    # end
    page.number("round-trip", float(round_trip), ".0e")
    volume = []
    for flow, j in ((made, j_made), (maf, j_maf)):
        u = flow.to_noise(point[None])[0]
        exact = float(flow.log_prob(point[None])[0] - normal_log_prob(u, 0.0, 1.0).sum())
        volume.append((np.linalg.slogdet(j / scale)[1], exact))
    diagonal = np.log(np.abs(np.diag(j_made) / scale)).sum()
    lines = [
        ["one MADE", f"{volume[0][0]:.6f}", f"{volume[0][1]:.6f}", f"{diagonal:.6f}"],
        ["MAF of two MADEs", f"{volume[1][0]:.6f}", f"{volume[1][1]:.6f}", "not triangular"],
    ]
    header = ["at the first galaxy", "log det J, finite differences", "log p(x) - log N(u; 0, I)", "sum of the logs of the diagonal"]
    page.table("jacobian-table", header, lines)
    short = ["red-\nshift", *names[1:]]
    figure, (axes,) = panels(1, 3, 8.6, 3.1)
    titles = ("MADE, columns as stored", "MADE, columns in its order", "MAF of two MADEs")
    for panel, j, title, columns in zip(axes, (j_made, j_sorted, j_maf), titles, (range(7), order, range(7)), strict=True):
        size = np.where(np.abs(j) > 0, np.log10(np.maximum(np.abs(j), 1e-12)), np.nan)
        image = panel.pcolormesh(size[::-1], cmap=BLUES, vmin=-3, vmax=2, edgecolors="white", linewidth=0.8)
        for a, b in np.argwhere(j == 0):
            panel.text(b + 0.5, 6.5 - a, "0", ha="center", va="center", fontsize=9, color=QUIET)
        panel.set_xticks(np.arange(7) + 0.5, [short[c] for c in columns], fontsize=8)
        panel.set_yticks(np.arange(7) + 0.5, [short[c] for c in columns][::-1], fontsize=8)
        panel.tick_params(length=0)
        panel.set_aspect("equal")
        named(panel, title, "$x_j$", "$u_i$" if panel is axes[0] else "")
    bar = figure.colorbar(image, ax=list(axes), shrink=0.8)
    bar.set_label("$\\log_{10}|\\partial u_i / \\partial x_j|$, $x$ in s.d.", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8)
    page.figure("5-jacobian", figure)
    return {"round_trip": round_trip, "sorted": j_sorted, "full": j_maf, "volume": volume, "diagonal": diagonal}


def densities(page: Page, rows: int = 20_000, epochs: int = 30) -> Results:
    """Target and inferred densities in two dimensions."""
    # snippet densities
    x, held = curved(rows, seed=0), curved(rows, seed=1)
    flows = {
        "MADE, x2 first": fastmaf.MADE(features=2, order=[1, 0], hidden_features=(50, 50), seed=0),
        "MADE, x1 first": fastmaf.MADE(features=2, order=[0, 1], hidden_features=(50, 50), seed=0),
        "MAF of 3 MADEs": fastmaf.MAF(features=2, transforms=3, hidden_features=(50, 50), seed=0),
    }
    for flow in flows.values():
        flow.fit(x, max_epochs=epochs, schedule="cosine", seed=0)
    score = {name: flow.log_prob(held).mean() for name, flow in flows.items()}
    # end
    truth = curved_log_prob(held)
    lines = [["the true density", f"{truth.mean():.3f}", "", ""]]
    gap, error, mass = {}, {}, {}
    first, second = np.linspace(-5, 14, 191), np.linspace(-8, 8, 161)
    points = np.stack(np.meshgrid(first, second), axis=2).reshape(-1, 2)
    shown = {"target": np.exp(curved_log_prob(points))}
    for name, flow in flows.items():
        log_p = flow.log_prob(held).astype(np.float64)
        gap[name], error[name] = float((truth - log_p).mean()), float((truth - log_p).std() / math.sqrt(len(held)))
        shown[name] = np.exp(flow.log_prob(points))
        mass[name] = float(shown[name].sum() * (first[1] - first[0]) * (second[1] - second[0]))
        lines.append([name, f"{score[name]:.3f}", f"{gap[name]:.3f} ± {error[name]:.3f}", f"{mass[name]:.3f}"])
    page.table("densities-table", ["", "held-out log p / nats", "below the truth", "integral over the picture"], lines)
    figure, (axes,) = panels(1, 4, 9, 2.7, sharex=True, sharey=True)
    top = float(shown["target"].max())
    for panel, (name, p) in zip(axes, shown.items(), strict=True):
        p = p.reshape(second.size, first.size)
        panel.contourf(first, second, p, top * np.linspace(0.02, 1, 9), cmap=BLUES, extend="max")
        panel.set(xlim=(-3.5, 8), ylim=(-6, 6))
        named(panel, re.sub(r"x(\d)", r"$x_\1$", name), "$x_1$")
    axes[0].set_ylabel("$x_2$", fontsize=10, color=INK)
    page.figure("6-densities", figure)
    return {"gap": gap, "error": error, "mass": mass}


def repeat(page: Page, rows: int = 20_000, epochs: int = 20, layers: int = 5) -> Results:
    """One MADE upon the noise of the last: the noise comes closer to N(0, I)."""
    # snippet repeat
    x, held = ring(rows, seed=0), ring(rows, seed=1)
    chain, flows = [], []
    for k in range(layers):
        made = fastmaf.MADE(features=2, order=[[0, 1], [1, 0]][k % 2], hidden_features=(50, 50), seed=k)
        chain += made.layers[1:] if k else made.layers  # an Affine that standardises the data stands in front of the first
        flow = fastmaf.Flow(chain)
        flow.fit(x, lr=2e-3, schedule="cosine", max_epochs=epochs, standardize=k == 0, seed=0)
        chain = list(flow.layers)
        flows.append(flow)
    # end
    noise = [flow.to_noise(held).astype(np.float64) for flow in flows]
    distances = np.array([noise_distances(u) for u in noise])
    log_p = np.array([flow.log_prob(held).mean() for flow in flows])
    truth = float(ring_log_prob(held).mean())
    lines = [[str(k + 1), *(f"{d:.3f}" for d in distances[k]), f"{log_p[k]:.3f}"] for k in range(layers)]
    exact = noise_distances(np.random.default_rng(5).normal(size=(len(held), 2)))
    lines.append(["N(0, I) itself, or the true density", *(f"{d:.3f}" for d in exact), f"{truth:.3f}"])
    page.table("repeat-table", ["MADEs", "KS of u1", "KS of u2", "KS of u1² + u2²", "held-out log p / nats"], lines)
    figure, grid = panels(2, layers, 9.6, 4.3)
    first = np.linspace(-5, 5, 120)  # not through the origin, where the density of the ring has no value
    points = np.stack(np.meshgrid(first, first), axis=2).reshape(-1, 2)
    top = float(np.exp(ring_log_prob(points)).max())
    angle = np.linspace(0, 2 * np.pi, 97)
    for k, (upper, lower) in enumerate(grid.T):
        p = np.exp(flows[k].log_prob(points)).reshape(first.size, first.size)
        upper.contourf(first, first, p, top * np.linspace(0.04, 1, 8), cmap=BLUES, extend="max")
        named(upper, f"{k + 1} MADE{'s' * (k > 0)}", "$x_1$", "$x_2$" if not k else "")
        lower.plot(*noise[k][:1000].T, ".", color=BLUE, markersize=2, alpha=0.6, markeredgewidth=0)
        for share in (0.5, 0.95):
            r = math.sqrt(-2 * math.log(1 - share))
            lower.plot(r * np.cos(angle), r * np.sin(angle), color=RED, linewidth=1.2)
        lower.set(xlim=(-3.9, 3.9), ylim=(-3.9, 3.9))
        named(lower, "", "$u_1$", "$u_2$" if not k else "")
        for axes in (upper, lower):
            axes.set_aspect("equal")
            if k:
                axes.set_yticklabels([])
    page.figure("7-noise", figure)
    return {"distances": distances, "log_prob": log_p, "truth": truth}


def mixtures(page: Page, rows: int = 20_000, epochs: int = 30) -> Results:
    """Mixture conditionals, and batch norm."""
    # snippet mixtures
    x, held = ring(rows, seed=0), ring(rows, seed=1)
    size = {"features": 2, "hidden_features": (50, 50)}
    flows = {
        "MADE, Gaussian": fastmaf.MADE(**size, seed=0),
        "MADE, mixture of 10": fastmaf.MADE(**size, conditional="mixture", components=10, seed=0),
        "MAF of 5": fastmaf.MAF(**size, transforms=5, seed=0),
        "MAF of 5, batch norm": fastmaf.MAF(**size, transforms=5, batch_norm=True, seed=0),
        "MAF of 5, mixture base": fastmaf.MAF(**size, transforms=5, components=10, seed=0),
    }
    for flow in flows.values():
        flow.fit(x, lr=2e-3, schedule="cosine", max_epochs=epochs, seed=0)
    # end
    truth = ring_log_prob(held)
    gap = {name: float((truth - flow.log_prob(held)).mean()) for name, flow in flows.items()}
    error = {name: float((truth - flow.log_prob(held)).std() / math.sqrt(len(held))) for name, flow in flows.items()}
    lines = [[name, f"{truth.mean() - gap[name]:.3f}", f"{gap[name]:.3f} ± {error[name]:.3f}"] for name in flows]
    page.table("mixtures-table", ["ring", "held-out log p / nats", "below the truth"], lines)
    figure, (axes,) = panels(1, 3, 8.4, 2.7, sharey=True)
    second = np.linspace(-5, 5, 300)
    for panel, value in zip(axes, (0.0, 2.0, 3.2), strict=True):
        points = np.stack([0 * second + value, second], axis=1)

        def slice_of(log_prob: Callable[[Array], Array], points: Array = points) -> Array:
            p: Array = np.exp(log_prob(points).astype(np.float64))
            return p / (p.sum() * (second[1] - second[0]))

        panel.fill_between(second, slice_of(ring_log_prob), color=QUIET, alpha=0.35, linewidth=0, label="true")
        for name, colour, style in (("MADE, Gaussian", BLUE, "--"), ("MADE, mixture of 10", RED, "-")):
            panel.plot(second, slice_of(flows[name].log_prob), color=colour, linestyle=style, label=name)
        named(panel, f"$x_1 = {value:g}$", "$x_2$", "$p(x_2 \\mid x_1)$" if value == 0 else "")
    axes[0].set_ylim(0, 0.78)
    legend(axes[0], loc="upper center", handlelength=1.4)
    page.figure("8-mixtures", figure)
    return {"gap": gap, "error": error}


def prefixes(page: Page, rows: int = 60_000, epochs: int = 8, draws: int = 1000) -> Results:
    """The first variables alone, and the rest given them."""
    # snippet prefixes
    x, names = galaxies()
    x = x[:rows]
    test, x = x[:2000], x[2000:]
    order = [1, 2, 3, 4, 5, 6, 0]  # the six magnitudes, then the redshift
    flow = fastmaf.MAF(features=7, transforms=3, order=order, components=8, bounds=[(0, None), *[None] * 6], names=names, seed=0)
    flow.fit(x, schedule="cosine", max_epochs=epochs, seed=0)

    magnitudes = flow.prefix(6)  # the marginal density of the magnitudes: a flow of its own
    draws_z = flow.sample_given(test[:, 1:], n=draws, seed=1)[:, :, 0]  # (2000, n): redshifts given magnitudes
    rank = (draws_z < test[:, :1]).mean(axis=1)  # of the true redshift among them: uniform if p(z | magnitudes) is right
    # end
    # snippet ratio
    z = np.linspace(0.01, 2.3, 400)
    galaxy = np.tile(test[0], (400, 1))
    galaxy[:, 0] = z
    p_z = np.exp(flow.log_prob(galaxy) - magnitudes.log_prob(test[:1, 1:]))  # p(z | m) = p(z, m) / p(m)
    # end
    inside = {level: float((np.abs(rank - 0.5) <= level / 2).mean()) for level in (0.5, 0.68, 0.95)}
    rank_ks = ks(rank)
    lines = [[f"{k:.0%}", f"{v:.1%}"] for k, v in inside.items()]
    page.table("prefixes-table", ["interval of p(z given magnitudes)", "galaxies inside"], lines)
    page.number("rank-ks", rank_ks, ".3f")
    page.number("p-z-mass", float(p_z.sum() * (z[1] - z[0])), ".3f")
    figure, (axes,) = panels(1, 4, 9.2, 2.5)
    for row, panel in enumerate(axes[:3]):
        galaxy[:, 1:] = test[row, 1:]
        curve = np.exp(flow.log_prob(galaxy) - magnitudes.log_prob(test[row : row + 1, 1:]))
        low, high = np.quantile(draws_z[row], [0.002, 0.998])
        panel.hist(draws_z[row], np.linspace(low, high, 31), density=True, color=BLUE, alpha=0.35, label="draws")
        panel.plot(z, curve, color=BLUE, label="p(z, m) / p(m)")
        panel.axvline(test[row, 0], color=RED, linestyle="--", label="true z")
        panel.set_xlim(min(low, test[row, 0]) - 0.05, max(high, test[row, 0]) + 0.05)
        panel.set_ylim(0, 1.55 * panel.get_ylim()[1] if not row else None)
        named(panel, f"galaxy {row + 1}", "redshift z", "p(z | m)" if not row else "")
    legend(axes[0], loc="upper left", handlelength=1.2, borderpad=0)
    axes[3].hist(rank, np.linspace(0, 1, 21), density=True, color=BLUE, alpha=0.35)
    axes[3].axhline(1, color=RED, linewidth=1.2)
    axes[3].set_ylim(0, 1.9)
    named(axes[3], f"{len(test)} galaxies", "rank of the true z", "")
    page.figure("8-prefixes", figure)
    return {"inside": inside, "rank_ks": rank_ks, "mass": float(p_z.sum() * (z[1] - z[0]))}


STEPS: tuple[Callable[..., Results], ...] = (
    one_outcome, phrase, staircases, conditionals, jacobians, densities, repeat, mixtures, prefixes,
)  # fmt: skip
SHOWN: tuple[Callable[..., Any], ...] = (curved, ring, ks)
"""Functions that the page shows whole."""


def snippets(function: Callable[..., Any], sizes: Mapping[str, int]) -> dict[str, str]:
    """The snippets of a step by name, with the values of its sizes put in."""
    result = {}
    for name, code in re.findall(r"^ *# snippet ([\w-]+)\n(.*?)^ *# end\n", inspect.getsource(function), re.DOTALL | re.MULTILINE):
        code = textwrap.dedent(code)
        for size, value in sizes.items():
            code = re.sub(rf"(?<![\w.]){size}\b(?!=)", f"{value:_}", code)
        result[name] = code.rstrip()
    return result


def run(folder: Path, template: str, sizes: Mapping[str, Mapping[str, int]] | None = None) -> dict[str, Results]:
    """Run all steps, write figures and README.md into a folder, and return what each step found.

    Parameters
    ----------
    folder : Path
    template : str
        A page with the markers.
    sizes : mapping, optional
        For each step by name, other values of its parameters.
    """
    page, results = Page(folder), {}
    for step in STEPS:
        defaults = {name: p.default for name, p in inspect.signature(step).parameters.items() if name != "page"}
        values = {**defaults, **(sizes or {}).get(step.__name__, {})}
        for name, code in snippets(step, values).items():
            page.snippet(name, code)
        results[step.__name__] = step(page, **values)
    for function in SHOWN:
        page.snippet(function.__name__, re.sub(r": (?:int|Array)\b|(?<=\)) -> \w+", "", inspect.getsource(function)).rstrip())
    (folder / "README.md").write_text(page.write(template), encoding="utf-8")
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for README.md and figures (default: this one)")
    run(parser.parse_args().out, (HERE / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
