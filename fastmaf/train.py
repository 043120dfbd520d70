"""Fitting a flow: maximum likelihood by Adam, early stopping on held-out rows, exact checkpoints.

`fit` is a loop over epochs around the training engine of a backend, which holds weights and moments and does the arithmetic.  Everything
that a run depends on is either an argument or counted (the shuffle of an epoch is a function of seed and epoch), so that a
checkpoint needs no more than the engine's state at the end of an epoch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize
from tqdm import tqdm

from fastmaf import _arrays, io
from fastmaf.layers import Affine, BatchNorm, Elementwise, Terminal, _one_of

try:
    from fastmaf._core import shuffle
except ImportError:
    from fastmaf._reference import shuffle

if TYPE_CHECKING:
    from fastmaf.flow import Flow
    from fastmaf.record import FlowRecord

__all__ = ["History", "Members", "fit"]

Array = NDArray[Any]
Layers = tuple[Any, ...]
Path = str | os.PathLike[str]
Statistics = list[tuple[Array, Array]]

SHUFFLE, SPLIT = 3, 4
"""Random streams of the order of an epoch and of the choice of validation rows."""

BLOCK = 1 << 18
"""Numbers read at a time when data are checked, summed, scored or hashed."""

SERIES = ("train", "validation", "lr", "seconds")
"""The lists of a `History`."""


@dataclass(repr=False)
class History:
    """What happened in a fit, one entry per epoch; log-likelihoods are means per row, in nats, in the units of the data.

    Attributes
    ----------
    train : list of float
        Log-likelihood of the training rows, each scored just before the step that used it.
    validation : list of float
        Log-likelihood of the validation rows after the epoch; empty where there are none.
    lr : list of float
        Learning rate of the last step.
    seconds : list of float
        Time since the start, summed over resumed calls.
    best_epoch : int
        The epoch whose weights were kept, counted from 1; 0 if none was better than the start.
    stopped : str
        ``"patience"``, ``"max_epochs"``, ``"max_seconds"``, ``"callback"``, ``"interrupted"``, or where the loss was not finite.

    Examples
    --------
    >>> History(train=[-1.5, -1.25], validation=[-1.5, -1.375], best_epoch=2, stopped="max_epochs")
    History(2 epochs, best 2: train -1.2500, validation -1.3750, stopped: max_epochs)
    """

    train: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    best_epoch: int = 0
    stopped: str = ""

    def __repr__(self) -> str:
        best = slice(self.best_epoch - 1, self.best_epoch) if self.best_epoch else slice(0)
        scores = [f"{name} {score:.4f}" for name in SERIES[:2] for score in getattr(self, name)[best]]
        return f"History({len(self.train)} epochs, best {self.best_epoch}{': ' * bool(scores)}{', '.join(scores)}, stopped: {self.stopped})"


@dataclass
class Members:
    """Flows that share one vector of weights and differ in their masks, for `fit`.

    Attributes
    ----------
    flows : sequence of Flow
        All of the same arrays; what their masks leave of `weights` are their weights.
    weights : (p,) array
        In the order of `Flow.parameters`, without masks; `fit` replaces it.
    draw : callable, optional
        The members for the steps of an epoch, by its number from 1; `flows` throughout, if None.
    """

    flows: Sequence[Flow]
    weights: Array
    draw: Callable[[int], Sequence[Flow]] | None = None


def fit(
    flow: Flow,
    x: ArrayLike | Callable[[int], ArrayLike],
    context: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    *,
    validation: float | tuple[ArrayLike | None, ...] = 0.1,
    batch_size: int = 256,
    optimizer: str = "adam",
    lr: float = 1e-3,
    schedule: str | Callable[[float], float] = "constant",
    l2: float = 0.0,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    patience: int | None = 30,
    max_epochs: int = 1000,
    max_seconds: float | None = None,
    standardize: bool = True,
    device: str = "auto",
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    callback: Callable[[dict[str, Any]], object] | None = None,
    progress: bool | None = None,
    members: Members | None = None,
) -> History:
    """Fit a flow to data, in place, and return the history.

    The loss of a batch of B rows is ``sum(w * nll) / (B * mean(w))``, w the weights and their mean that of the training rows. The weights
    with the best validation log-likelihood are kept, those at the start included. If the data are refused, the flow is left as it was.

    A `BatchNorm` of kind "batch" normalises each batch by its own weighted mean and variance, and everything else (validation, the fitted
    flow) by those of all training rows, found anew before the first epoch and after each; one of kind "data" by those of the training rows
    at the start of the first fit.

    Parameters
    ----------
    flow : Flow
        The second fit of a flow goes on from its current weights and keeps its standardisation.
    x : (n, D) array, or callable
        A memmap is read in blocks. A callable gives a fresh array of the same shape for each epoch, ``x(1)``, ``x(2)``, ... (for instance
        a new dequantisation); ``x(0)`` serves for the standardisation and for validation rows taken as a fraction.
    context : (n, C) array, optional
        One row per row of `x`.
    weights : (n,) array, optional
        Not negative. Rows of weight zero are checked, and then left out.
    validation : float, or tuple ``(x,)``, ``(x, context)`` or ``(x, context, weights)``
        The fraction of the rows to hold out (chosen by `seed` alone), or the validation rows themselves. With 0 there is no early
        stopping, and the last weights are kept.
    batch_size : int
        Rows per step; the last batch of an epoch may be short. Where batch norms take their statistics from the batch, rows that fill no
        batch are left out of an epoch, unless there are none but them; then `batch_size` is at least 2.
    optimizer : {"adam"}
        With `weight_decay` it is AdamW.
    lr : float
        Learning rate.
    schedule : {"constant", "cosine"} or callable
        ``"cosine"`` falls to zero over `max_epochs`, step by step. A callable is given the number of epochs done so far, with its fraction
        (``epoch - 1 + batch / batches``), and returns the factor on `lr`.
    l2 : float
        Factor of the sum of the squared weights in the loss.
    weight_decay : float
        Decoupled decay of AdamW, times the learning rate.
    clip_norm : float, optional
        Largest norm of the gradient.
    patience : int, optional
        Stop after so many epochs without a better validation log-likelihood; never, if None.
    max_epochs : int
        Stop after so many epochs, those of a resumed checkpoint included.
    max_seconds : float, optional
        Stop at the first end of an epoch after this time, measured from this call.
    standardize : bool
        At the first fit, put the weighted mean and standard deviation of the training rows into the `Affine` in front of the networks
        (behind the bounds), and into that of the context. Likelihoods stay in the units of the data.
    device : {"auto", "cpu"}
        ``"auto"`` is the device of the flow.
    seed : int
        For the validation split and the shuffling.
    checkpoint : path, optional
        File written at the end of each epoch (a .safetensors file).
    resume : bool
        Go on from `checkpoint` if it exists, to the same bits as an uninterrupted run. Data and arguments must be the same, but for
        `patience`, `max_seconds` and, unless the schedule is ``"cosine"``, `max_epochs`; a callable x or schedule is taken on trust.
    callback : callable, optional
        Called after each epoch with a dict of epoch, train, validation (None without validation rows), lr, seconds and best_epoch; a true
        result stops.
    progress : bool, optional
        Whether to show a bar on stderr; by default only if that is a terminal.
    members : Members, optional
        Train their common weights instead of those of the flow: step t, counted from 0 over all epochs, those of member t modulo their
        number. The validation log-likelihood is that of the mean of their densities. Of the flow only the fixed layers change.

    Returns
    -------
    History
        Also summed up in ``flow.training``.

    Raises
    ------
    ValueError
        If shapes do not fit; if data are not finite, not strictly inside their bounds, or constant in a column; if discrete data are no
        integers in range; if weights are negative or all zero; if an argument is out of range; if a batch norm would see batches of one
        row; if `resume` meets a checkpoint of another run.

    Notes
    -----
    Ctrl-C stops and keeps the best weights so far; the checkpoint is that of the last whole epoch. A loss that is not finite does the
    same and is reported in ``history.stopped``.

    Examples
    --------
    >>> import fastmaf, numpy as np
    >>> x = np.random.default_rng(0).normal([1.0, -2.0], [0.5, 3.0], (500, 2))
    >>> flow = fastmaf.MAF(2, transforms=1, hidden_features=(8,))
    >>> history = flow.fit(x, max_epochs=3)
    >>> len(history.validation), history.stopped
    (3, 'max_epochs')
    """
    began = time.perf_counter()
    settings: dict[str, Any] = {
        "validation": "given" if isinstance(validation, tuple) else _real("validation", validation, zero=True),
        "batch_size": _arrays.count("batch_size", batch_size, 1),
        "optimizer": optimizer,
        "lr": _real("lr", lr),
        "schedule": "callable" if callable(schedule) else schedule,
        "l2": _real("l2", l2, zero=True),
        "weight_decay": _real("weight_decay", weight_decay, zero=True),
        "clip_norm": None if clip_norm is None else _real("clip_norm", clip_norm),
        "patience": None if patience is None else _arrays.count("patience", patience, 1),
        "max_epochs": _arrays.count("max_epochs", max_epochs, 1, 2**32),
        "max_seconds": None if max_seconds is None else _real("max_seconds", max_seconds),
        "standardize": bool(standardize),
        "seed": _arrays.count("seed", seed, limit=2**64),
    }
    _one_of("optimizer", optimizer, ("adam",))
    factor = _schedule(schedule, settings["max_epochs"])
    if resume and checkpoint is None:
        raise ValueError("resume is True, but no checkpoint is named")
    where = flow.device if device == "auto" else flow.to(device).device
    if where != "cpu":
        raise NotImplementedError(f"training on {where} is to come; it runs on the cpu: flow.to('cpu').fit(...)")
    _, backend = flow._ready()

    train, held = _split(flow, x(0) if callable(x) else x, context, weights, validation, settings["seed"])
    layers, context_layers = _standardised(flow, train, standardize)
    if _of_batch(flow.layers) and settings["batch_size"] < 2:
        raise ValueError(f"batch_size is {batch_size}; the statistics of a batch norm need at least 2 rows")
    store, saved = None, {}
    if checkpoint is not None:
        store = _Store(checkpoint, _fingerprint(flow, backend.name, settings, train, held, members))
        saved = store.load() if resume else {}
    start = flow._with(layers=_restored(layers, "layers", saved), context_layers=_restored(context_layers, "context_layers", saved))
    options: dict[str, Any] = {name: settings[name] for name in ("l2", "weight_decay", "clip_norm")}
    if members is not None:
        options["members"] = _behind(start, members.flows)
    engine = backend.trainer(start.record, **options)
    if members is not None:
        engine.set_parameters(members.weights)
    run = _Run(start, engine, train, held, settings, store, members, engine.parameters(), not flow.training)
    if saved:
        run.set_state(saved)
    try:
        deadline = began + (settings["max_seconds"] or math.inf)
        run.history.stopped = run.epochs(x if callable(x) else None, factor, deadline, callback, progress)
    except KeyboardInterrupt:
        run.history.stopped = "interrupted"
    if members is None:
        fitted = _normed(start.with_parameters(run.best), run.best_statistics)
    else:
        fitted, members.weights = start, run.best
    flow._record = fitted.record.replaced(training=run.summary())
    return run.history


class _Rows(NamedTuple):
    """Arrays of the same length, and which of their rows to use."""

    x: Array
    context: Array | None
    weights: Array | None
    rows: NDArray[np.int64]

    def mass(self) -> float:
        """Sum of the weights."""
        return float(self.rows.size if self.weights is None else self.weights[self.rows].sum())


class _Store(NamedTuple):
    """The checkpoint file of a fit, and what tells this fit from others."""

    path: Path
    fingerprint: dict[str, Any]

    def save(self, arrays: dict[str, Array]) -> None:
        """Write the file under a temporary name, then rename it."""
        io.write(self.path, serialize(arrays, {"fastmaf_checkpoint": json.dumps(self.fingerprint)}))

    def load(self) -> dict[str, Array]:
        """Return the arrays of the file; none where there is no file."""
        if not os.path.exists(self.path):
            return {}
        try:
            with safe_open(self.path, framework="numpy") as file:
                fingerprint = json.loads(file.metadata()["fastmaf_checkpoint"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} cannot be read as a checkpoint: {error!r}") from None
        for name, value in self.fingerprint.items():
            if (old := fingerprint.get(name)) != value:
                values = "" if name.startswith("the ") else f": {old!r} there, {value!r} here"
                raise ValueError(f"checkpoint {self.path} belongs to another fit: it differs in {name}{values}")
        return arrays


@dataclass
class _Run:
    """A fit under way."""

    start: Flow
    engine: Any
    train: _Rows
    held: _Rows | None
    settings: dict[str, Any]
    store: _Store | None
    members: Members | None
    best: Array
    first: bool
    best_score: float = -math.inf
    history: History = field(default_factory=History)

    def __post_init__(self) -> None:
        self.statistics: Statistics = [(layer.mean, layer.var) for layer in _norms(self.start.layers)]
        self.best_statistics = self.statistics

    def epochs(
        self,
        draw: Callable[[int], ArrayLike] | None,
        factor: Callable[[float], float],
        deadline: float,
        callback: Callable[[dict[str, Any]], object] | None,
        progress: bool | None,
    ) -> str:
        """Train until something ends it, and say what."""
        history, train, mass, members = self.history, self.train, self.train.mass(), self.members
        last, batch_size, seed = (self.settings[name] for name in ("max_epochs", "batch_size", "seed"))
        patience = self.settings["patience"] or math.inf
        steps, mean_weight, used = -(-train.rows.size // batch_size), mass / train.rows.size, train.rows.size
        if _of_batch(self.start.layers) and used > batch_size:
            steps, used = used // batch_size, used // batch_size * batch_size
        began = time.perf_counter() - (history.seconds[-1] if history.seconds else 0.0)
        if not history.train:
            self.renew(train.x, self.first)
            self.best_statistics = self.statistics
            self.best_score = float(np.fmax(self.score(), -math.inf))
            self.save()
        with tqdm(total=last, initial=len(history.train), unit="epoch", disable=None if progress is None else not progress) as bar:
            for epoch in range(len(history.train) + 1, last + 1):
                if epoch - 1 - history.best_epoch >= patience:
                    return "patience"
                if time.perf_counter() >= deadline:
                    return "max_seconds"
                x = train.x if draw is None else _drawn(draw, epoch, train.x.shape, self.start)
                rows = train.rows[shuffle(seed, SHUFFLE, epoch, train.rows.size)][:used]
                if rows.size < train.rows.size:
                    mass = train._replace(rows=rows).mass()
                rates = _rates(self.settings["lr"], factor, epoch, steps)
                if members is not None and members.draw is not None:
                    self.engine.set_members(_behind(self.start, members.draw(epoch)))
                loss, done = self.engine.epoch(x, train.context, train.weights, rows, batch_size, rates, mean_weight, poll=bar.refresh)
                if done < steps:
                    return f"loss not finite in epoch {epoch}, batch {done + 1} of {steps}"
                if members is not None and members.draw is not None:
                    self.engine.set_members(_behind(self.start, members.flows))
                normed = self.renew(x, False)
                self.record(-loss / mass, self.score(), normed, float(rates[-1]), time.perf_counter() - began)
                self.save()
                last_of = {name: (getattr(history, name) or [None])[-1] for name in SERIES}
                bar.set_postfix_str(", ".join(f"{name} {last_of[name]:.4f}" for name in SERIES[:2] if getattr(history, name)) + " nats")
                bar.update()
                if callback is not None and callback({"epoch": epoch, "best_epoch": history.best_epoch, **last_of}):
                    return "callback"
        return "max_epochs"

    def renew(self, x: Array, data_too: bool) -> bool:
        """Give the batch norms the statistics of the training rows under the current weights; False where those are not finite."""
        if not (_of_batch(self.start.layers) or (data_too and self.statistics)):
            return True
        parameters = self.engine.parameters()
        if not np.isfinite(parameters).all():
            return False
        flow = _normed(self.start.with_parameters(parameters), self.statistics)
        found = _whole_statistics(flow, self.train._replace(x=x), data_too)
        if found is None:
            return False
        self.statistics = found
        self.engine.set_statistics(found)
        return True

    def score(self) -> float:
        """Mean log-likelihood of the validation rows under the current weights; NaN without such rows."""
        if self.held is None:
            return math.nan
        x, context, weights, rows = self.held
        total, block = 0.0, max(1, BLOCK // x.shape[1])
        for first in range(0, rows.size, block):
            part = rows[first : first + block]
            values = self.engine.log_prob(x[part], None if context is None else context[part]).astype(np.float64)
            total += float((values if weights is None else values * weights[part]).sum())
        return total / self.held.mass()

    def record(self, train: float, validation: float, normed: bool, lr: float, seconds: float) -> None:
        """Append an epoch to the history, and keep its weights and statistics if they are the best and the statistics hold."""
        history, parameters = self.history, self.engine.parameters()
        history.train.append(train)
        history.lr.append(lr)
        history.seconds.append(seconds)
        if self.held is not None:
            history.validation.append(validation)
        if normed and (validation > self.best_score if self.held is not None else np.isfinite(parameters).all()):
            history.best_epoch, self.best, self.best_score = len(history.train), parameters, validation
            self.best_statistics = self.statistics

    def save(self) -> None:
        """Write the checkpoint: everything that the next epochs depend on, as arrays."""
        if self.store is None:
            return
        arrays = {f"engine.{name}": value for name, value in self.engine.state().items()}
        arrays |= {f"history.{name}": getattr(self.history, name) for name in SERIES}
        arrays |= {"best": self.best, "best_score": self.best_score, "best_epoch": self.history.best_epoch}
        for name, statistics in (("statistics", self.statistics), ("best_statistics", self.best_statistics)):
            for k, (mean, var) in enumerate(statistics):
                arrays |= {f"{name}.{k}.mean": mean, f"{name}.{k}.var": var}
        for prefix, layers in (("layers", self.start.layers), ("context_layers", self.start.context_layers)):
            for k, layer in enumerate(layers):
                if isinstance(layer, Affine):
                    arrays |= {f"{prefix}.{k}.loc": layer.loc, f"{prefix}.{k}.scale": layer.scale}
        self.store.save({name: np.array(value, order="C") for name, value in arrays.items()})

    def set_state(self, arrays: Mapping[str, Array]) -> None:
        """Go on from a checkpoint; its Affines are in `start` already."""
        self.engine.load_state({name[7:]: value for name, value in arrays.items() if name.startswith("engine.")})
        self.history = History(**{name: arrays[f"history.{name}"].tolist() for name in SERIES})
        self.history.best_epoch = int(arrays["best_epoch"])
        self.best, self.best_score = arrays["best"], float(arrays["best_score"])
        self.statistics, self.best_statistics = (
            [(arrays[f"{name}.{k}.mean"], arrays[f"{name}.{k}.var"]) for k in range(len(self.statistics))]
            for name in ("statistics", "best_statistics")
        )
        if self.statistics:
            self.engine.set_statistics(self.statistics)

    def summary(self) -> dict[str, Any]:
        """Return what the flow remembers of its fit, ready for JSON."""
        history, held = self.history, self.held
        return {
            "epochs": len(history.train),
            "best_epoch": history.best_epoch,
            "train": history.train[history.best_epoch - 1] if history.best_epoch else None,
            "validation": self.best_score if math.isfinite(self.best_score) else None,
            "rows": int(self.train.rows.size),
            "validation_rows": 0 if held is None else int(held.rows.size),
            "seconds": history.seconds[-1] if history.seconds else 0.0,
            "stopped": history.stopped,
            "settings": self.settings,
        }


def _real(name: str, value: Any, zero: bool = False) -> float:
    """A finite number, positive or, if `zero`, not negative."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and (number > 0 or (zero and number == 0))):
        raise ValueError(f"{name} is {value!r}; it must be a {'number that is not negative' if zero else 'positive number'}")
    return number


def _norms(layers: Layers) -> list[BatchNorm]:
    return [layer for layer in layers if isinstance(layer, BatchNorm)]


def _of_batch(layers: Layers) -> bool:
    """Whether batch norms take their statistics from the batch."""
    return any(norm.statistics == "batch" for norm in _norms(layers))


def _normed(flow: Flow, statistics: Statistics) -> Flow:
    """The flow with other statistics in its batch norms."""
    if not statistics:
        return flow
    moments = iter(statistics)
    layers = []
    for layer in flow.layers:
        if isinstance(layer, BatchNorm):
            mean, var = next(moments)
            layer = replace(layer, mean=mean, var=var)
        layers.append(layer)
    return flow._with(layers=layers)


def _behind(start: Flow, members: Sequence[Flow]) -> list[FlowRecord]:
    """The members behind the fixed layers of the flow that is trained."""
    result = []
    for member in members:
        pairs = zip(member.layers, start.layers, strict=True)
        layers = [new if isinstance(new, (Elementwise, Affine)) else own for own, new in pairs]
        result.append(member.record.replaced(layers=layers, context_layers=start.context_layers))
    return result


def _whole_statistics(flow: Flow, train: _Rows, data_too: bool) -> Statistics | None:
    """Mean and biased variance of the training rows in front of each batch norm, in double; None where they are not finite.

    Those of kind "data" keep theirs, unless `data_too`.  All rows stay at the last batch norm reached, so that no layer is evaluated twice.
    """
    from fastmaf.flow import Flow

    statistics: Statistics = []
    segment: list[Any] = []
    z: Array | None = None  # the rows that the segment begins with; at first they are the data, read block by block
    weights = np.ones(train.rows.size) if train.weights is None else train.weights[train.rows]
    step = max(1, BLOCK // flow.features)
    parts = [slice(first, min(first + step, train.rows.size)) for first in range(0, train.rows.size, step)]
    for layer in flow.layers:
        if isinstance(layer, BatchNorm):
            chain = Flow(
                segment,
                features=flow.features,
                context_features=flow.context_features,
                context_layers=flow.context_layers,
                dtype=flow.dtype,
            )
            values = np.empty((train.rows.size, flow.features), flow.dtype)
            for part in parts:
                rows = train.rows[part]
                context = None if train.context is None else train.context[rows]
                values[part] = chain.to_noise(train.x[rows] if z is None else z[part], context)
            z, segment = values, []
            if layer.statistics == "batch" or data_too:
                mean, var = _mean_and_variance(z, weights, parts)
                if not (np.isfinite(mean).all() and np.isfinite(var).all()):
                    return None
                layer = replace(layer, mean=mean, var=var)
                statistics.append((mean, var))
            else:
                statistics.append((layer.mean, layer.var))
        segment.append(layer)
    return statistics


def _mean_and_variance(z: Array, weights: NDArray[np.float64], parts: Sequence[slice]) -> tuple[Array, Array]:
    """Weighted mean and biased variance of the columns, in double."""
    total = weights.sum()
    mean = sum((weights[part] @ z[part].astype(np.float64) for part in parts), np.zeros(z.shape[1])) / total
    var = sum((weights[part] @ (z[part] - mean) ** 2 for part in parts), np.zeros(z.shape[1])) / total
    return mean, var


def _schedule(schedule: str | Callable[[float], float], max_epochs: int) -> Callable[[float], float]:
    if callable(schedule):
        return schedule
    _one_of("schedule", schedule, ("constant", "cosine"))
    if schedule == "cosine":
        return lambda epochs: 0.5 * (1.0 + math.cos(math.pi * epochs / max_epochs))
    return lambda epochs: 1.0


def _rates(lr: float, factor: Callable[[float], float], epoch: int, steps: int) -> NDArray[np.float64]:
    """The learning rate of each step of an epoch."""
    rates = np.array([lr * float(factor(epoch - 1 + step / steps)) for step in range(steps)])
    wrong = ~(np.isfinite(rates) & (rates >= 0))
    if wrong.any():
        step = int(wrong.argmax())
        raise ValueError(f"schedule({epoch - 1 + step / steps}) makes the learning rate {rates[step]}; it must be finite and not negative")
    return rates


def _matrix(name: str, value: ArrayLike, columns: int, what: str) -> Array:
    array = _arrays.real(name, value)
    if array.ndim != 2 or array.shape[1] != columns or columns == 0:
        raise ValueError(f"{name} has shape {array.shape}; the flow has {columns} {what}{'s' * (columns != 1)}")
    return array


def _rows(flow: Flow, prefix: str, x: ArrayLike, context: ArrayLike | None = None, weights: ArrayLike | None = None) -> _Rows:
    """The arrays, judged by shape, and their rows of positive weight."""
    x = _matrix(f"{prefix}x", x, flow.features, "feature")
    if context is not None:
        context = _matrix(f"{prefix}context", context, flow.context_features, "context feature")
    elif flow.context_features:
        raise ValueError(f"{prefix}context is missing; the flow has {flow.context_features} context features")
    if weights is not None:
        weights = _arrays.real(f"{prefix}weights", weights).astype(np.float64)
        if weights.ndim != 1:
            raise ValueError(f"{prefix}weights has shape {weights.shape}; it must have one number per row")
        wrong = ~(np.isfinite(weights) & (weights >= 0))
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(f"{prefix}weights has {weights[row]} in row {row}; weights must be finite and not negative")
    for name, array in (("context", context), ("weights", weights)):
        if array is not None and len(array) != len(x):
            raise ValueError(f"{prefix}{name} has {len(array)} rows; {prefix}x has {len(x)}")
    return _Rows(x, context, weights, np.arange(len(x)) if weights is None else np.flatnonzero(weights))


def _split(
    flow: Flow,
    x: ArrayLike,
    context: ArrayLike | None,
    weights: ArrayLike | None,
    validation: float | tuple[ArrayLike | None, ...],
    seed: int,
) -> tuple[_Rows, _Rows | None]:
    """Rows to train on, and rows to validate on."""
    train, held = _rows(flow, "", x, context, weights), None
    if isinstance(validation, tuple):
        if not 1 <= len(validation) <= 3 or validation[0] is None:
            raise ValueError("validation must be a fraction, or a tuple (x,), (x, context) or (x, context, weights)")
        held = _rows(flow, "validation ", *validation)  # type: ignore[arg-type]
        _check("validation x", held.x, flow.layers, _counts(flow))
        if held.context is not None:
            _check("validation context", held.context, flow.context_layers)
    elif validation:
        order = shuffle(seed, SPLIT, 0, len(train.x))
        chosen = np.zeros(order.size, bool)
        chosen[order[: round(validation * order.size)]] = True
        chosen = chosen[train.rows]
        train, held = train._replace(rows=train.rows[~chosen]), train._replace(rows=train.rows[chosen])
    for name, part in (("training", train), ("validation", held)):
        if part is not None and not part.rows.size:
            raise ValueError(f"no {name} rows: x has {len(train.x)} rows, {train.rows.size} of them to train on")
    return train, held


def _counts(flow: Flow) -> Array | None:
    """How many values each variable has, if they are discrete."""
    if not isinstance(flow.base, Terminal) or flow.base.conditional == "mixture":
        return None
    return np.array(flow.base.categories or (2,) * flow.features)


def _blocks(name: str, array: Array, layers: Layers, counts: Array | None = None) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """The array in float64, block by block, each made sure to be finite and inside the bounds of the first layer, or one of the values."""
    bounds = layers[0] if layers and isinstance(layers[0], Elementwise) else None
    step = max(1, BLOCK // array.shape[1])
    for first in range(0, len(array), step):
        part = slice(first, min(first + step, len(array)))
        block = array[part].astype(np.float64)
        wrong = ~np.isfinite(block)
        if bounds is not None:
            wrong |= (block <= bounds.lower) | (block >= bounds.upper)
        if counts is not None:
            wrong |= (block < 0) | (block >= counts) | (block != np.floor(block))
        if wrong.any():
            row, column = (int(i) for i in np.argwhere(wrong)[0])
            value, must = block[row, column], "be finite"
            if bounds is not None and math.isfinite(value):
                must = f"lie strictly between {bounds.lower[column]} and {bounds.upper[column]}"
            if counts is not None:
                must = f"be an integer from 0 to {counts[column] - 1}"
            raise ValueError(f"{name} has {value} in row {first + row}, column {column}; it must {must}")
        yield part, block


def _check(name: str, array: Array, layers: Layers, counts: Array | None = None) -> None:
    for _ in _blocks(name, array, layers, counts):
        pass


def _drawn(draw: Callable[[int], ArrayLike], epoch: int, shape: tuple[int, ...], flow: Flow) -> Array:
    """A fresh x for an epoch."""
    name = f"x({epoch})"
    x = _arrays.real(name, draw(epoch))
    if x.shape != shape:
        raise ValueError(f"{name} has shape {x.shape}; x(0) has shape {shape}")
    _check(name, x, flow.layers, _counts(flow))
    return x


def _standardised(flow: Flow, train: _Rows, wanted: bool) -> tuple[Layers, Layers]:
    """The layers and context layers to train, those of a new flow standardised if that is wanted; judges the data on the way."""
    weights = np.zeros(len(train.x))
    weights[train.rows] = 1.0 if train.weights is None else train.weights[train.rows]
    chains = []
    for name, array, layers in (("x", train.x, flow.layers), ("context", train.context, flow.context_layers)):
        if name == "x" and (counts := _counts(flow)) is not None:
            _check(name, train.x, layers, counts)
        elif array is not None:
            affine = _moments(name, array, weights, layers)
            k = int(isinstance(layers[0], Elementwise)) if layers else 0
            if wanted and not flow.training and layers[k : k + 1] == (Affine(np.zeros(affine.loc.size), np.ones(affine.loc.size)),):
                layers = (*layers[:k], affine, *layers[k + 1 :])
        chains.append(layers)
    return chains[0], chains[1]


def _moments(name: str, array: Array, weights: NDArray[np.float64], layers: Layers) -> Affine:
    """The Affine that standardises the columns, behind the bounds; judges all rows, counts those of positive weight."""
    total, mean, square = 0.0, np.zeros(array.shape[1]), np.zeros(array.shape[1])
    low, high = np.full(array.shape[1], math.inf), np.full(array.shape[1], -math.inf)
    for part, block in _blocks(name, array, layers):
        used = weights[part] > 0
        if not used.any():
            continue
        values, factor = block[used], weights[part][used, None]
        low, high = np.minimum(low, values.min(axis=0)), np.maximum(high, values.max(axis=0))
        values = _unbounded(values, layers)
        added = float(factor.sum())
        centre = (factor * values).sum(axis=0) / added
        step, total = centre - mean, total + added
        mean += step * (added / total)
        square += (factor * (values - centre) ** 2).sum(axis=0) + step**2 * (added * (total - added) / total)
    constant = (low == high) | (square == 0)
    if constant.any():
        column = int(constant.argmax())
        raise ValueError(f"{name} is constant in column {column}: {low[column]} in every row to train on")
    return Affine(mean, np.sqrt(total / square))


def _unbounded(values: NDArray[np.float64], layers: Layers) -> NDArray[np.float64]:
    """The rows behind an Elementwise, if the first layer is one."""
    if not (layers and isinstance(layers[0], Elementwise)):
        return values
    result: NDArray[np.float64] = values.copy()
    for column, (kind, lower, upper) in enumerate(zip(layers[0].kinds, layers[0].lower, layers[0].upper, strict=True)):
        if kind != "identity":
            above = np.log(values[:, column] - lower) if kind != "log_below" else 0.0
            below = np.log(upper - values[:, column]) if kind != "log_above" else 0.0
            result[:, column] = above - below
    return result


def _restored(layers: Layers, prefix: str, saved: Mapping[str, Array]) -> Layers:
    """The layers with the Affines of a checkpoint, if there is one."""
    if not saved:
        return layers
    return tuple(
        Affine(saved[f"{prefix}.{k}.loc"], saved[f"{prefix}.{k}.scale"]) if isinstance(layer, Affine) else layer
        for k, layer in enumerate(layers)
    )


def _fingerprint(
    flow: Flow, backend: str, settings: Mapping[str, Any], train: _Rows, held: _Rows | None, members: Members | None
) -> dict[str, Any]:
    """What a resumed fit must have in common with the interrupted one."""
    stopping = {"patience", "max_seconds"} | ({"max_epochs"} if settings["schedule"] != "cosine" else set())
    result = {name: value for name, value in settings.items() if name not in stopping}
    result["backend"] = backend
    record = [str(flow.dtype), _shape_of(flow.layers), _shape_of(flow.context_layers), _shape_of(flow.base)]
    if members is not None:
        record += [[_shape_of((*member.layers, member.base)) for member in members.flows], members.draw is not None]
    result["the flow"] = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    given = held[:3] if held is not None and settings["validation"] == "given" else ()
    for name, arrays in (("x", train[:1]), ("context", train[1:2]), ("weights", train[2:3]), ("validation", given)):
        result[f"the data ({name})"] = _digest(*arrays)
    return result


def _shape_of(record: Any) -> Any:
    """What the training of a layer leaves as it is, for JSON."""
    if isinstance(record, np.ndarray):
        return [*record.shape] if record.dtype.kind == "f" else record.tolist()
    if isinstance(record, Elementwise):
        return [record.kinds, record.lower.tolist(), record.upper.tolist()]
    if isinstance(record, tuple):
        return [_shape_of(item) for item in record]
    if is_dataclass(record):
        return [type(record).__name__, *(_shape_of(getattr(record, f.name)) for f in fields(record))]
    return dict(record) if isinstance(record, Mapping) else record


def _digest(*arrays: Array | None) -> str:
    state = hashlib.sha256()
    for array in arrays:
        if array is None:
            state.update(b"none")
            continue
        state.update(f"{array.dtype.str} {array.shape}".encode())
        step = max(1, BLOCK // math.prod(array.shape[1:]))
        for first in range(0, len(array), step):
            state.update(np.ascontiguousarray(array[first : first + step]).data)
    return state.hexdigest()
