"""From the files of the runs to Markdown: the papers' numbers beside ours, the goals, and what stopped a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .data import BINARY
from .recipes import TABLES

Results = dict[tuple[str, str], list[dict[str, Any]]]
"""(data, model) -> the runs, one per seed."""

NAMES = {
    "gaussian": "Gaussian",
    "bernoulli": "independent Bernoulli",
    "chow-liu": "Chow-Liu tree",
    "made": "MADE",
    "made-32": "MADE, 32 orders and masks",
    "made-mog": "MADE MoG",
    "maf-5": "MAF (5)",
    "maf-10": "MAF (10)",
    "maf-mog-5": "MAF MoG (5)",
    "residual-lu": "residual MADEs and LU layers (10)",
}
TITLES = {"mnist": "MNIST", "mnist-class": "MNIST, conditioned on the class", "bsds": "BSDS300 patches"}

PAPER = {
    "bsds": {
        "gaussian": 96.67,
        "made": 148.85,
        "made-mog": 153.71,
        "maf-5": 155.69,
        "maf-10": 154.93,
        "maf-mog-5": 156.36,
        "residual-lu": 156.95,
    },
    "mnist": {"gaussian": -1366.9, "made": -1380.8, "made-mog": -1038.5, "maf-5": -1300.5, "maf-mog-5": -1100.3},
    "mnist-class": {"gaussian": -1344.7, "made": -1361.9, "made-mog": -1030.3, "maf-5": -1302.9, "maf-mog-5": -1092.3},
}
"""Papamakarios et al. 2017, tables 1 and 2; residual-lu: Durkan et al. 2019, their MAF."""

_BERNOULLI = dict(zip(BINARY, (-25.772, -100.388, -34.232, -294.802, -63.738), strict=True))
_CHOW_LIU = dict(zip(BINARY, (-18.534, -87.801, -21.022, -280.904, -48.870), strict=True))
CHECKS = {
    ("mnist", "gaussian"): (-1366.98, 1.4),
    ("mnist-class", "gaussian"): (-1344.7, 1.4),
    ("bsds", "gaussian"): (96.4, 0.4),
    ("miniboone", "gaussian"): (-37.72, 0.01),
    ("casp", "gaussian"): (-5.0, 0.4),
    **{(data, "bernoulli"): (value, 0.001) for data, value in _BERNOULLI.items()},
    **{(data, "chow-liu"): (value, 0.001) for data, value in _CHOW_LIU.items()},
}
"""(data, model) -> what a correct loader gives, and how closely: noise on the test images moves their mean by 0.4, casp's split by 0.3."""

PATCHES = [
    "",
    "The patches are cut anew by the paper's recipe, 150,000 of them to train on where the paper has a million: scores compare to about",
    "0.4 nats. The paper's number of the last row is that of Durkan et al. (2019). The log-scales of MAF (5) and of the last row are",
    "bounded by 2 and by 1: by log(1000), which MAF (10) and MAF MoG (5) have here, one test row in 50,000 came out at",
    "-1e14 nats in two of three fits of MAF (5), and at -1e34 in one of the last row.",
]

ABOVE_TREE = {"adult": 4.0, "dna": 0.0, "mushrooms": 8.0, "nips": 0.0, "ocr_letters": 15.0}
ORDERS = (("gaussian", "made", "maf-5"), ("gaussian", "made", "made-mog"))


@dataclass(frozen=True)
class Goal:
    """What is judged: a measured value of at least a bound, or above 0; None is not measured yet."""

    what: str
    measured: float | None
    bound: float

    @property
    def verdict(self) -> str:
        """In words."""
        if self.measured is None:
            return "open"
        return "met" if self.measured > self.bound or self.measured == self.bound != 0 else "**missed**"


def read(folder: Path) -> Results:
    """The runs in a folder, by data set and model, in the order of their seeds."""
    results: Results = {}
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        results.setdefault((run["data"], run["model"]), []).append(run)
    for runs in results.values():
        runs.sort(key=lambda run: run["seed"])
    return results


def score(results: Results, data: str, model: str) -> float | None:
    """Test log-likelihood, the mean over the seeds."""
    runs = results.get((data, model))
    return float(np.mean([run["test"] for run in runs])) if runs else None


def goals(results: Results) -> Iterator[Goal]:
    """All of them."""

    def above(what: str, first: tuple[str, str], second: tuple[str, str] | float, bound: float) -> Goal:
        ours, other = score(results, *first), second if isinstance(second, float) else score(results, *second)
        return Goal(what, None if ours is None or other is None else ours - other, bound)

    for data, margin in ABOVE_TREE.items():
        for model in ("made", "made-32") if margin else ("made-32",):
            yield above(f"{data}: {NAMES[model]}, above the Chow-Liu tree", (data, model), (data, "chow-liu"), margin)
    for model, value in PAPER["bsds"].items():
        yield above(f"bsds: {NAMES[model]}, above the paper", ("bsds", model), value, -1.5)
    for low, high in dict.fromkeys(pair for order in ORDERS for pair in zip(order, order[1:], strict=False)):
        yield above(f"bsds: {NAMES[high]}, above {NAMES[low]}", ("bsds", high), ("bsds", low), 0.0)
    for data in ("mnist", "mnist-class"):
        for model in ("made", "maf-5"):
            yield above(f"{TITLES[data]}: {NAMES[model]}, above the paper", (data, model), PAPER[data][model], -15.0)


def markdown(results: Results) -> str:
    """The page."""
    text = [
        "# The tables of the papers",
        "",
        "Average test log-likelihood in nats, ± two standard errors over the test rows (their mean, where there are several seeds).",
        "Scores of MNIST are in logit space; those conditioned on the class are of log p(x) with all ten classes equally likely, as in the",
        "MAF paper. Made by `python -m benchmarks.paper`; one JSON file per run lies in `benchmarks/results/paper`.",
        *_machines(results),
        *_section("Goals", ("goal", "measured", "bound", ""), "-rr-", _goal_rows(results)),
        *_section("Checks of the loaders", ("data", "model", "ours", "expected", ""), "--rr-", _check_rows(results)),
        *_section("Binary data (MADE paper)", ("", *BINARY), "-rrrrr", _binary_rows(results)),
        *_runs(results, "binary"),
    ]
    for data in ("bsds", "mnist", "mnist-class"):
        head = ("", "paper", "ours", "seeds: range", "ours - paper")
        text += _section(TITLES[data], head, "-rrrr", _paper_rows(results, data))
        text += PATCHES if data == "bsds" else []
        text += _runs(results, data)
    return "\n".join(text) + "\n"


def _machines(results: Results) -> list[str]:
    seen = set()
    for run in (run for runs in results.values() for run in runs):
        commit, _, dirty = run["commit"].partition("-")
        where = f"{run['machine']['cpu']}, {run['threads']} thread{'s' * (run['threads'] != 1)}, {run['machine']['isa']}"
        seen.add(f"- {where}, commit {commit[:12]}{', with changes' if dirty else ''}")
    return ["", *sorted(seen)] if seen else []


def _section(title: str, head: tuple[str, ...], align: str, rows: list[list[str]]) -> list[str]:
    return ["", f"## {title}", "", *_table(head, align, rows)]


def _table(head: tuple[str, ...], align: str, rows: list[list[str]]) -> list[str]:
    rule = "|".join({"-": "---", "r": "---:"}[side] for side in align)
    return [f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(cells)} |" for cells in rows)]


def _goal_rows(results: Results) -> list[list[str]]:
    return [[g.what, _signed(g.measured), f"> {g.bound:g}" if g.bound == 0 else f">= {g.bound:g}", g.verdict] for g in goals(results)]


def _check_rows(results: Results) -> list[list[str]]:
    rows = []
    for (data, model), (expected, tolerance) in CHECKS.items():
        ours = score(results, data, model)
        verdict = "open" if ours is None else "agrees" if abs(ours - expected) <= tolerance else "**differs**"
        rows.append([data, NAMES[model], _number(ours, 3), f"{expected} (± {tolerance})", verdict])
    return rows


def _binary_rows(results: Results) -> list[list[str]]:
    models = dict.fromkeys(row.model for row in TABLES["binary"])
    return [[NAMES[model], *(_cell(results, data, model, 3) for data in BINARY)] for model in models]


def _paper_rows(results: Results, data: str) -> list[list[str]]:
    rows = []
    for model, paper in PAPER[data].items():
        scores = [run["test"] for run in results.get((data, model), [])]
        spread = f"{min(scores):.2f} to {max(scores):.2f} ({len(scores)})" if len(scores) > 1 else ""
        difference = _signed(float(np.mean(scores)) - paper if scores else None)
        rows.append([NAMES[model], f"{paper}", _cell(results, data, model, 2), spread, difference])
    return rows


def _runs(results: Results, table: str) -> list[str]:
    """How the networks of a table were fitted: a line per run, and the recipes where they differ from the paper's."""
    lines: list[list[str]] = []
    recipes: dict[str, dict[str, None]] = {}
    notes = []
    for row in (row for rows in TABLES.values() for row in rows):
        if row.data != table and not (table == "binary" and row.data in BINARY):
            continue
        runs, model = results.get((row.data, row.model), []), NAMES[row.model]
        for run in runs if row.recipe else ():
            epochs = f"{run['best_epoch']} of {run['epochs']}"
            stopped = f"**the cap of {run['minutes']:g} minutes**" if run["capped"] else run["stopped"]
            scores = [_number(run["test"], 2), _number(run["validation"], 2)]
            name = f"{row.data}, {model}" if table == "binary" else model
            lines.append([name, str(run["seed"]), *scores, epochs, f"{run['seconds'] / 60:.1f}", stopped])
            recipes.setdefault(run["recipe"]["differs"], {})[f"{model} (at most {run['fit']['max_epochs']} epochs)"] = None
        if runs and "test_given_class" in runs[0]:
            notes.append(f"- {model}: log p(x | own class) is {np.mean([run['test_given_class'] for run in runs]):.2f}.")
    notes = [f"- {', '.join(models)}: {differs}." for differs, models in recipes.items() if differs] + list(dict.fromkeys(notes))
    head = ("run", "seed", "test", "validation", "best epoch", "minutes", "stopped by")
    return [*(["", *_table(head, "-rrrrr-", lines)] if lines else []), *(["", "Recipes and remarks:", "", *notes] if notes else [])]


def _cell(results: Results, data: str, model: str, digits: int) -> str:
    runs = results.get((data, model))
    if not runs:
        return "not run"
    cap = ", capped" if any(run.get("capped") for run in runs) else ""
    error = float(np.mean([run["test_two_standard_errors"] for run in runs]))
    return f"{_number(score(results, data, model), digits)} ± {error:.2f}{cap}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _signed(value: float | None) -> str:
    return "not measured" if value is None else f"{value:+.2f}"
