"""Which rows the tables have, and how each is fitted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from .data import BINARY


@dataclass(frozen=True)
class Recipe:
    """How a row is fitted.

    Attributes
    ----------
    factory : str
        ``"MADE"`` or ``"MAF"``, or the name of a preset.
    model, fit : dict
        Arguments of the factory and of `fit`, on top of those of a preset.
    differs : str
        In what it is not the paper's.
    """

    factory: str
    model: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)
    differs: str = ""


@dataclass(frozen=True)
class Row:
    """A model on a data set; without a recipe it is one of the baselines, which have no seed."""

    data: str
    model: str
    recipe: Recipe | None = None

    @property
    def name(self) -> str:
        """As the command line and the files call it."""
        return f"{self.data}/{self.model}"

    def with_epochs(self, epochs: int | None) -> Row:
        """The same with another number of epochs, if one is given."""
        if epochs is None or self.recipe is None:
            return self
        return replace(self, recipe=replace(self.recipe, fit=self.recipe.fit | {"max_epochs": epochs}))


SPEED = "512 hidden units, batches of 200 with Adam at 1e-3 falling by a cosine, fresh noise in every epoch"
TURNED = ", in which patches are turned and mirrored at random"
CLIP, WIDE = 2.0, math.log(1000.0)
"""Of MAF (5) on the patches, and of the other MAFs. With the second, one test row in 50,000 came out at -1e14 nats in two of three fits."""


def _fast(factory: str, epochs: int, layers: int, differs: str, **model: Any) -> Recipe:
    """The recipe of the MAF paper, but for what makes it fast."""
    fit = {"batch_size": 200, "lr": 1e-3, "schedule": "cosine", "l2": 1e-6, "patience": 30, "max_epochs": epochs}
    if factory == "MAF":
        model["batch_norm"] = True
    return Recipe(factory, {"hidden_features": (512,) * layers, **model}, fit, differs)


def _binary(**model: Any) -> Recipe:
    """Direct weights are what brings dna above the tree; 32 masks need several times the epochs of one."""
    fit = {"batch_size": 100, "lr": 1e-3, "patience": 30, "max_epochs": 2000}
    differs = "500 hidden units in one layer, direct weights, Adam at 1e-3, batches of 100"
    return Recipe("MADE", {"conditional": "bernoulli", "hidden_features": (500,), "direct": True, **model}, fit, differs)


def _continuous(data: str, epochs: dict[str, int]) -> tuple[Row, ...]:
    """The rows of a column of the MAF paper; only those that have a number of epochs."""
    recipes: dict[str, tuple[str, dict[str, Any]]] = {
        "made": ("MADE", {}),
        "made-mog": ("MADE", {"conditional": "mixture", "components": 10}),
        "maf-5": ("MAF", {"transforms": 5}),
        "maf-10": ("MAF", {"transforms": 10}),
        "maf-mog-5": ("MAF", {"transforms": 5, "components": 10}),
    }
    rows = [Row(data, "gaussian")]
    for name, number in epochs.items():
        factory, model = recipes[name]
        differs = SPEED
        if factory == "MAF":
            model["clip"] = WIDE
        if data == "bsds":
            differs += TURNED
            if name == "maf-5":
                model["clip"] = CLIP
                differs += f", log-scales bounded by {CLIP:g}"
        rows.append(Row(data, name, _fast(factory, number, 2, differs, **model)))
    return tuple(rows)


RESIDUAL = Row(
    "bsds",
    "residual-lu",
    Recipe(
        "resmade_lu",
        {},
        {"batch_size": 256, "lr": 1e-3, "max_epochs": 40},
        f"10 steps, 2 residual blocks of 256, batches of 256 with Adam at 1e-3 falling by a cosine, fresh noise in every epoch{TURNED}",
    ),
)
MNIST = {"made": 40, "made-mog": 12, "maf-5": 12, "maf-mog-5": 8}

TABLES: dict[str, tuple[Row, ...]] = {
    "gaussians": tuple(Row(data, "gaussian") for data in ("mnist", "mnist-class", "bsds", "miniboone", "casp")),
    "binary": tuple(
        Row(data, model, recipe)
        for data in BINARY
        for model, recipe in (("bernoulli", None), ("chow-liu", None), ("made", _binary()), ("made-32", _binary(masks=32)))
    ),
    "bsds": (*_continuous("bsds", {"made": 100, "made-mog": 40, "maf-5": 50, "maf-10": 36, "maf-mog-5": 22}), RESIDUAL),
    "mnist": (*_continuous("mnist", MNIST), *_continuous("mnist-class", MNIST)),
}
