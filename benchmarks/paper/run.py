"""One row, one run, one file: fit, score the test rows, write what came out."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastmaf._codec import read_checkpoint

from . import baselines
from .data import TEST, TRAIN, VALIDATION, Array, Data, load
from .recipes import Recipe, Row

BLOCK = 1000
"""Rows that are scored at a time: the parameters of a mixture over 784 variables are many."""


@dataclass(frozen=True)
class Settings:
    """What the command line chose."""

    data: Path
    output: Path
    checkpoints: Path
    minutes: float
    threads: int


class Interrupted(Exception):
    """Ctrl-C in a fit; its checkpoint is there."""


def result_file(output: Path, row: Row, seed: int) -> Path:
    """Where the result of a run is written."""
    return output / f"{row.data}_{row.model}_{seed}.json"


def finished(row: Row, seed: int, output: Path) -> str | None:
    """Why a row need not run, if so: its file is there. A file made by another recipe is kept, and said to be so."""
    path = result_file(output, row, seed)
    if not path.exists():
        return None
    same = json.loads(path.read_text())["recipe"] == _plain(row.recipe)
    return "there already" if same else f"there already, BY ANOTHER RECIPE; --again replaces {path}"


def run(row: Row, seed: int, settings: Settings) -> dict[str, Any]:
    """Run a row, or go on with it from its checkpoint, and write its file."""
    from benchmarks.report import machine

    data = _loaded(row.data, settings.data)
    began = time.perf_counter()
    fields = baseline(row, data) if row.recipe is None else fitted(row, row.recipe, data, seed, settings)
    fields.setdefault("seconds", time.perf_counter() - began)
    where = machine(settings.threads)
    head = {"data": row.data, "model": row.model, "seed": seed, "recipe": _plain(row.recipe), "training_rows": len(data.parts[TRAIN])}
    result = {**head, **fields, "threads": settings.threads, "commit": where.pop("commit"), "machine": where}
    settings.output.mkdir(parents=True, exist_ok=True)
    result_file(settings.output, row, seed).write_text(json.dumps(result, indent=1) + "\n")
    if not result.get("capped"):  # one that the cap stopped may go on, given more minutes
        _checkpoint(row, seed, settings).unlink(missing_ok=True)
    return result


def baseline(row: Row, data: Data) -> dict[str, Any]:
    """Fit and score a model without a network."""
    x, test = data.rows(TRAIN), data.rows(TEST)
    if data.labels is not None:
        scores = [score(test) for score in baselines.gaussians(x, data.labels[TRAIN])]
        return by_class(np.stack(scores, axis=1), data.labels[TEST])
    fits = {"gaussian": baselines.gaussian, "bernoulli": baselines.bernoulli, "chow-liu": baselines.chow_liu}
    return summary(fits[row.model](x)(test))


def fitted(row: Row, recipe: Recipe, data: Data, seed: int, settings: Settings) -> dict[str, Any]:
    """Fit a network under the cap, and score it."""
    context = data.context(TRAIN)
    validation, test = data.rows(VALIDATION), data.rows(TEST)
    model, arguments = build(recipe, validation.shape[1], data.classes, seed)
    path = _checkpoint(row, seed, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    history = model.fit(
        data.training(seed),
        context,
        validation=(validation, data.context(VALIDATION)),
        seed=seed,
        max_seconds=max(60 * settings.minutes - _spent(path), 1e-3),
        checkpoint=path,
        resume=True,
        **arguments,
        on_interrupt="return",
    )
    if history.stopped == "interrupted":
        raise Interrupted
    best = history.best_epoch
    return {
        "fit": arguments,
        "epochs": len(history.train),
        "best_epoch": best,
        "seconds": history.seconds[-1] if history.seconds else 0.0,
        "stopped": history.stopped,
        "capped": history.stopped == "max_seconds",
        "minutes": settings.minutes,
        "validation": history.validation[best - 1] if best else None,
        "train": history.train[best - 1] if best else None,
        **scored(model, data, test),
    }


def build(recipe: Recipe, features: int, classes: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """The model with random weights, and the arguments of its fit."""
    import fastmaf

    if recipe.factory in ("MADE", "MAF"):
        factory = getattr(fastmaf, recipe.factory)
        return factory(features, context_features=classes, seed=seed, **recipe.model), dict(recipe.fit)
    from fastmaf import presets

    model, arguments = getattr(presets, recipe.factory)(features, context_features=classes, seed=seed, **recipe.model)
    return model, {**arguments, **recipe.fit}


def scored(model: Any, data: Data, test: Array) -> dict[str, Any]:
    """Test log-likelihood."""
    if data.labels is None:
        return summary(_in_blocks(model.log_prob, test))
    each = [_in_blocks(functools.partial(model.log_prob, context=one), test) for one in np.eye(data.classes, dtype=np.float32)]
    return by_class(np.stack(each, axis=1), data.labels[TEST])


def summary(scores: Array, prefix: str = "test") -> dict[str, float | int]:
    """Mean and two standard errors over the rows."""
    error = 2 * float(np.std(scores)) / math.sqrt(len(scores))
    return {prefix: float(np.mean(scores)), f"{prefix}_two_standard_errors": error, "test_rows": len(scores)}


def by_class(scores: Array, labels: Array) -> dict[str, Any]:
    """From log p(x | class), (n, classes): the MAF paper scores log p(x), all classes equally likely; log p(x | own class) is noted."""
    top = scores.max(axis=1)
    mixture = top + np.log(np.exp(scores - top[:, None]).mean(axis=1))
    return {**summary(mixture), **summary(scores[np.arange(len(labels)), labels], "test_given_class")}


def _in_blocks(log_prob: Callable[[Array], Array], rows: Array) -> Array:
    parts = [np.asarray(log_prob(rows[first : first + BLOCK]), np.float64) for first in range(0, len(rows), BLOCK)]
    return np.concatenate(parts)


def _plain(recipe: Recipe | None) -> Any:
    """As it is read back from JSON."""
    return None if recipe is None else json.loads(json.dumps(asdict(recipe)))


def _checkpoint(row: Row, seed: int, settings: Settings) -> Path:
    return settings.checkpoints / f"{row.data}_{row.model}_{seed}.safetensors"


def _spent(checkpoint: Path) -> float:
    """Seconds of the fit so far: the cap holds for all its calls together."""
    if not checkpoint.exists():
        return 0.0
    return float(sum(read_checkpoint(checkpoint)[1]["history.seconds"][-1:]))


@functools.lru_cache(maxsize=1)
def _loaded(name: str, folder: Path) -> Data:
    return load(name, folder)


def text(result: dict[str, Any]) -> str:
    """A line for the terminal."""
    line = f"{result['data']}/{result['model']} {result['seed']}: {result['test']:.3f} +- {result['test_two_standard_errors']:.3f} nats"
    if "epochs" in result:
        line += f", best epoch {result['best_epoch']} of {result['epochs']} ({result['stopped']})"
    return f"{line}, {result['seconds']:.0f} s"
