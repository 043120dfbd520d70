"""The loop over epochs: steps, scores, what is kept, and how it ends.

Everything that a run depends on is either an argument or counted (the shuffle of an epoch is a function of seed and epoch), so that a
checkpoint needs no more than the engine's state at the end of an epoch.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastmaf import _arrays, _codec, _tables, _words
from fastmaf.backends import Backend, Part, runner
from fastmaf.config import get_num_threads
from fastmaf.layers import Affine, Autoregressive, BatchNorm, Terminal, _one_of
from fastmaf.record import FlowRecord
from fastmaf.train import data
from fastmaf.train._bar import tqdm
from fastmaf.train.checkpoint import Store, fingerprint, seed_of
from fastmaf.train.data import FitWarning, Rows, shuffle
from fastmaf.train.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from fastmaf._arrays import Seed

__all__ = ["Epoch", "History", "Members", "fit"]

Array = NDArray[Any]
Layers = tuple[Any, ...]
Path = str | os.PathLike[str]
Statistics = list[tuple[Array, Array]]

SHUFFLE = 3
"""Random stream of the order of an epoch."""

LOGGED = 10.0
"""Seconds between two lines for a logger."""

SERIES = ("train", "validation", "lr", "seconds")
"""The lists of a `History`."""


@dataclass(repr=False)
class History:
    """What happened in a fit, one entry per epoch; log-likelihoods are means per row, in nats, in the units of the data.

    Attributes
    ----------
    train : list of float
        Log-likelihood of the training rows, each scored just before the step that used it; of some of them behind an epoch that Ctrl-C cut
        short.
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
    start : float or None
        Log-likelihood of the validation rows before the first epoch, behind the standardisation; None where there are none.

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
    start: float | None = None

    def __repr__(self) -> str:
        if not self.best_epoch and self.start is not None:
            done = f"{len(self.train)} epochs, none better than the start: validation {self.start:.4f}"
            return f"History({done}, stopped: {self.stopped})"
        best = slice(self.best_epoch - 1, self.best_epoch) if self.best_epoch else slice(0)
        scores = [f"{name} {score:.4f}" for name in SERIES[:2] for score in getattr(self, name)[best]]
        return f"History({len(self.train)} epochs, best {self.best_epoch}{': ' * bool(scores)}{', '.join(scores)}, stopped: {self.stopped})"


class Trainee(Protocol):
    """What is fitted: the holder of a record, which gives it another."""

    _record: FlowRecord

    @property
    def device(self) -> str:
        """Where it computes."""

    def to(self, device: str) -> Trainee:
        """The same on another device."""

    def _ready(self) -> tuple[FlowRecord, Backend]:
        """Its record, and the backend that runs it."""

    def _holding(self, record: FlowRecord) -> Any:
        """A holder of another record, in the same place."""


class Member(Protocol):
    """A flow among others; only its record is read."""

    @property
    def record(self) -> FlowRecord:
        """The flow as data."""


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
        The members for the steps of an epoch, by its number from 1 and the seed of the fit; `flows` throughout, if None.
    build : callable, optional
        What callbacks and checkpoints are given, from the flow as it is trained and the weights; the flow alone, if None.
    """

    flows: Sequence[Member]
    weights: Array
    draw: Callable[[int, int], Sequence[Member]] | None = None
    build: Callable[[Any, Array], Any] | None = None


class Epoch(Mapping[str, Any]):
    """What a callback is told after an epoch.

    Keys are epoch, train, validation (None without validation rows), lr, seconds, best_epoch and flow: the flow or ensemble as it is in
    this epoch, made when it is looked at.
    """

    def __init__(self, values: dict[str, Any], build: Callable[[], Any]) -> None:
        self._values, self._build = values, build

    def __getitem__(self, key: str) -> Any:
        if key == "flow" and key not in self._values:
            self._values[key] = self._build()
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter([*(key for key in self._values if key != "flow"), "flow"])

    def __len__(self) -> int:
        return len(list(iter(self)))


def fit(
    flow: Trainee,
    x: ArrayLike | Callable[[int], ArrayLike],
    context: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    *,
    validation: float | ArrayLike | tuple[ArrayLike | None, ...] = 0.1,
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
    standardize: bool | Literal["again", "full"] = True,
    device: str = "auto",
    seed: Seed = None,
    checkpoint: Path | None = None,
    checkpoint_every: float = 1,
    resume: bool = False,
    callback: Callable[[Epoch], object] | None = None,
    on_interrupt: Literal["raise", "return"] = "raise",
    progress: bool | None = None,
    members: Members | None = None,
    poll: Callable[[], object] | None = None,
    label: str = "",
    ranks: Ranks = ALONE,
) -> History:
    """Fit a flow in place; parameters, result and errors are those of `Flow.fit`.

    With `members`, their common weights are trained instead of those of the flow: step t, counted from 0 over all epochs, those of member t
    modulo their number. The validation log-likelihood is that of the mean of their densities. Of the flow only the fixed layers change.
    `poll` is called now and then, and may raise; it takes the place of what keeps the progress bar alive.
    `label` is how lines for a logger begin. `ranks` fit together; whoever entered them tells the others of an error.
    """
    began, root = time.perf_counter(), ranks.rank == 0
    if not root:  # it is rank 0 that writes and says something
        checkpoint, resume, progress = None, False, False
    held_out = data.validation_of(validation)
    if not isinstance(checkpoint, (str, os.PathLike, type(None))) or (checkpoint is not None and not os.fspath(checkpoint)):
        raise ValueError(f"checkpoint is {_words.shown(checkpoint)}; it must be a path")
    if checkpoint is not None:
        target = os.path.realpath(checkpoint)
        if not os.path.isdir(os.path.dirname(target)):
            raise ValueError(f"checkpoint: the folder {_words.shown(os.path.dirname(target))} does not exist")
        if os.path.isdir(target):
            raise ValueError(f"checkpoint {_words.shown(target)} is a folder; name a file in it")
    resume = _words.flag("resume", resume)
    progress = None if progress is None else _words.flag("progress", progress)
    if callback is not None and not callable(callback):
        raise ValueError(f"callback is {_words.shown(callback)}; it must be callable")
    if resume and checkpoint is None:
        raise ValueError("resume is True, but no checkpoint is named: checkpoint=path")
    before = seed_of(checkpoint, resume) if seed is None else None
    settings: dict[str, Any] = {
        "validation": held_out if isinstance(held_out, float) else "given",
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
        "standardize": _standardize(standardize),
        "seed": _arrays.seed_or_fresh(seed) if before is None else before,
    }
    _one_of("optimizer", optimizer, ("adam",))
    _one_of("on_interrupt", on_interrupt, ("raise", "return"))
    factor = _schedule(schedule, settings["max_epochs"])
    every = float(checkpoint_every) if isinstance(checkpoint_every, float) else _arrays.count("checkpoint_every", checkpoint_every, 1)
    if not every > 0:
        raise ValueError(
            f"checkpoint_every is {_words.shown(checkpoint_every)}; it must be positive: an int counts epochs, a float seconds"
        )
    own = settings["seed"]
    settings["seed"] = ranks.first(own)
    if ranks.size > 1:
        given: dict[str, Any] = {f"{name} given": value is not None for name, value in (("context", context), ("weights", weights))}
        if isinstance(held_out, tuple):
            given["validation given"] = [value is not None for value in held_out]
        same = {"seed": settings["seed"] if seed is None else own, "on_interrupt": on_interrupt, "the ensemble": _of_members(members)}
        ranks.agreed({**settings, **given, **same})
    if members is not None and standardize == "full":
        raise ValueError("standardize is 'full', which an ensemble of masks has no layer for; leave it at True")
    there = flow if isinstance(device, str) and device == "auto" else flow.to(device)
    record, backend = there._ready()
    if ranks.size > 1:
        written = ranks.first(_codec.to_bytes(record))
        record = record if root else _codec.from_bytes(written)[0]
        if _norms(record.layers):
            raise ValueError("comm: several ranks fit no batch norms; build the flow without, or fit it in one process")
    labelled = x
    if there.device != "cpu":
        x, context, weights, held_out = _fetched(there.device, x, context, weights, held_out)

    first_x = _first_of(x) if callable(x) else x
    train, held, few = data.split(record, first_x, context, weights, held_out, settings["seed"], callable(x), ranks)
    apart = held if settings["validation"] == "given" else None
    ranks.agreed({f"dtype of {name}": str(getattr(array, "dtype", None)) for name, array in (("x", train.x), ("context", train.context))})
    start, notes = data.standardised(record, train, settings["standardize"], apart, few, ranks)
    backend = runner(start, backend)
    ranks.agreed({"backend": backend.name})
    if record.names is None and _tables.has_other_labels(labelled):
        notes.append(
            "x has column labels that cannot be names (text, all different), so that columns go by place: rename them, or x.to_numpy()"
        )
    if weights is None and _tables.is_weighted(labelled):
        notes.append("x has weights of its own, which a fit takes only if they are given: weights=x.get_weights(), or np.ones(len(x))")
    if apart is not None and (of_held := data.uneven("validation weights", apart.weights)):
        notes.append(of_held)
    notes = ranks.crowded(get_num_threads() if backend.name == "cpu" else 1) + ranks.merged(notes)
    for note in notes * root:
        _words.warn(note, FitWarning)
    if _of_batch(record.layers) and settings["batch_size"] < 2:
        raise ValueError(f"batch_size is {batch_size}; the statistics of a batch norm need at least 2 rows")
    store, saved = None, {}
    if ranks.any(checkpoint is not None):
        flows = None if members is None else [member.record for member in members.flows]
        redrawn = members is not None and members.draw is not None
        what = fingerprint(record, _lineage(backend), settings, train, held, flows, redrawn, ranks)
        if checkpoint is not None:
            store = Store(checkpoint, what)
            saved = store.load(resume)
        saved = ranks.first(saved)
    if saved:
        with _codec.reading_checkpoint(checkpoint):
            start = start.replaced(
                layers=_restored(start.layers, "layers", saved), context_layers=_restored(start.context_layers, "context_layers", saved)
            )
    options: dict[str, Any] = {name: settings[name] for name in ("l2", "weight_decay", "clip_norm")}
    if members is not None:
        options["members"] = _behind(start, members.flows)
    engine = backend.trainer(start, **options)
    if members is not None:
        engine.set_parameters(members.weights)
    run = _Run(flow, start, backend, engine, train, held, settings, store, every, members, not record.fitted, bool(few), ranks)
    if saved:
        with _codec.reading_checkpoint(checkpoint):
            run.set_state(saved)
    try:
        deadline = began + (settings["max_seconds"] or math.inf)
        run.history.stopped = run.epochs(x if callable(x) else None, factor, deadline, callback, progress, poll, label)
    except BaseException as error:
        interrupted = ranks.farewell(error)
        try:
            if interrupted:
                with suppress(KeyboardInterrupt):  # twice: that takes too long
                    run.cut_short()
        finally:
            run.history.stopped = "interrupted" if interrupted else f"{type(error).__name__} after {len(run.history.train)} epochs"
            if run.history.train:  # else nothing was learned, and the flow stays as it was
                run.install()
        with suppress(OSError):
            run.save(last=True)
        if not interrupted or on_interrupt == "raise":
            raise
        return run.history
    run.install()
    run.save(last=True)
    run.at_end = run.glance()
    for note in run.complaints() * root:
        _words.warn(note, FitWarning)
    return run.history


def _fetched(device: str, x: Any, context: Any, weights: Any, held_out: Any) -> tuple[Any, ...]:
    """The arrays, those of this GPU copied to the host, where they are judged; all others as they are."""

    def fetched(name: str, value: Any) -> Any:
        return _arrays.fetched(name, value, device)

    if callable(x):
        draw = x

        @functools.wraps(draw, updated=())
        def drawn(epoch: int) -> Any:
            return fetched(f"x({epoch})", draw(epoch))

        x = drawn
    else:
        x = fetched("x", x)
    if isinstance(held_out, tuple):
        names = ("validation x", "validation context", "validation weights")
        held_out = tuple(fetched(name, value) for name, value in zip(names, held_out, strict=False))
    return x, fetched("context", context), fetched("weights", weights), held_out


def _lineage(backend: Backend) -> str:
    """Under which name checkpoints know a backend: a fit may go on on another device."""
    return "cpu" if backend.name == "cuda" else backend.name


def _first_of(draw: Callable[[int], ArrayLike]) -> ArrayLike:
    """The rows of epoch 0."""
    try:
        signature = inspect.signature(draw)
    except ValueError:  # of what is written in C
        return draw(0)
    try:
        signature.bind(0)
    except TypeError:
        raise ValueError("x is a function that cannot be called with one argument, the number of the epoch: lambda epoch: x") from None
    return draw(0)


class _Run:
    """A fit under way."""

    def __init__(
        self,
        flow: Trainee,
        start: FlowRecord,
        backend: Backend,
        engine: Any,
        train: Rows,
        held: Rows | None,
        settings: dict[str, Any],
        store: Store | None,
        every: float,
        members: Members | None,
        first: bool,
        uneven: bool,
        ranks: Ranks,
    ) -> None:
        self.flow, self.start, self.backend, self.engine = flow, start, backend, engine
        self.train, self.held, self.settings, self.members, self.first = train, held, settings, members, first
        self.store, self.every, self.ranks = store, every, ranks
        self.begin, self.total = data.place(train, ranks)
        self.total_held = 0 if held is None else data.place(held, ranks)[1]
        self.at_start = self.at_end = math.nan  # what `glance` says at the start and at the end
        self.uneven = uneven
        self.state: dict[str, Any] = {}  # at the end of the last epoch
        self.unsaved = False
        self.written, self.written_at = 0, time.perf_counter()
        self.history = History()
        self.begun: tuple[Array, float, float] | None = None  # the rows of an epoch under way, its rate, and when the fit began
        self.logged = -math.inf
        self.statistics: Statistics = [(layer.mean, layer.var) for layer in _norms(start.layers)]
        self.parameters: Array = engine.parameters()  # at the end of the last epoch
        self.best, self.best_statistics, self.best_score = self.parameters, self.statistics, -math.inf

    def epochs(
        self,
        draw: Callable[[int], ArrayLike] | None,
        factor: Callable[[float], float],
        deadline: float,
        callback: Callable[[Epoch], object] | None,
        progress: bool | None,
        poll: Callable[[], object] | None,
        label: str,
    ) -> str:
        """Train until something ends it, and say what."""
        history, train, members, ranks = self.history, self.train, self.members, self.ranks
        mass, begin, end = ranks.sum(train.mass()), self.begin, self.begin + train.rows.size
        last, batch_size, seed = (self.settings[name] for name in ("max_epochs", "batch_size", "seed"))
        patience = self.settings["patience"] or math.inf
        steps, mean_weight, used = -(-self.total // batch_size), mass / self.total, self.total
        if _of_batch(self.start.layers) and used > batch_size:
            steps, used = used // batch_size, used // batch_size * batch_size
        began, before = time.perf_counter() - (history.seconds[-1] if history.seconds else 0.0), self.flow._record
        if not history.train:
            self.renew(train.x, self.first)
            self.best_statistics = self.statistics
            score = self.score()
            self.best_score = float(np.fmax(score, -math.inf))
            history.start = None if self.held is None else score
            self.at_start = self.glance()
            self.snapshot()
            self.save(last=True)
        with tqdm(total=last, initial=len(history.train), unit="epoch", disable=None if progress is None else not progress) as bar:
            ask = poll or bar.refresh
            for epoch in range(len(history.train) + 1, last + 1):
                if epoch - 1 - history.best_epoch >= patience:
                    return "patience"
                if math.isfinite(deadline) and ranks.first(time.perf_counter() >= deadline):
                    return "max_seconds"
                x = train.x if draw is None else data.drawn(draw, epoch, train.x.shape, self.start)
                order, part = shuffle(seed, SHUFFLE, epoch, self.total)[:used], None
                if ranks.size > 1:
                    own = np.flatnonzero((order >= begin) & (order < end))
                    ends = np.minimum(batch_size * np.arange(1, steps + 1), used)
                    order, part = order[own] - begin, Part(np.searchsorted(own, ends), np.diff(ends, prepend=0), ranks.total)
                rows = train.rows[order]
                if used < self.total:
                    mass = train._replace(rows=rows).mass()
                rates = _rates(self.settings["lr"], factor, epoch, steps)
                self.begun = x, float(rates[-1]), began
                if members is not None and members.draw is not None:
                    self.engine.set_members(_behind(self.start, members.draw(epoch, seed)))
                loss, done = self.engine.epoch(x, train.context, train.weights, rows, batch_size, rates, mean_weight, ask, part)
                if done < steps:
                    return f"loss not finite in epoch {epoch}, batch {done + 1} of {steps}"
                if members is not None and members.draw is not None:
                    self.engine.set_members(_behind(self.start, members.flows))
                normed = self.renew(x, False)
                self.record(-loss / mass, self.score(), normed, float(rates[-1]), time.perf_counter() - began)
                ranks.check(self.parameters)
                self.begun = None
                self.snapshot()
                self.save()
                last_of = {name: (getattr(history, name) or [None])[-1] for name in SERIES}
                words = ", ".join(f"{name} {last_of[name]:.4f}" for name in SERIES[:2] if getattr(history, name)) + " nats"
                bar.set_postfix_str(words)
                bar.update()
                if not ranks.rank:
                    self.log(f"{label}epoch {epoch} of {last}: {words}")
                stops = callback is not None and _true(callback(self.told({"epoch": epoch, "best_epoch": history.best_epoch, **last_of})))
                if self.flow._record is not before:
                    raise RuntimeError(
                        "the flow was changed while it was fitted, by the callback or elsewhere, and has the weights of the fit again: "
                        "change it afterwards"
                    )
                if ranks.any(stops):
                    return "callback"
        return "max_epochs"

    def told(self, values: dict[str, Any]) -> Epoch:
        """What the callback is given; the flow in it is that of now, however late it is looked at."""
        parameters, statistics = self.parameters, self.statistics
        return Epoch(values, lambda: self.built(parameters, statistics))

    def renew(self, x: Array, data_too: bool) -> bool:
        """Give the batch norms the statistics of the training rows under the current weights; False where those are not finite."""
        if not (_of_batch(self.start.layers) or (data_too and self.statistics)):
            return True
        parameters = self.engine.parameters()
        if not np.isfinite(parameters).all():
            return False
        record = _normed(self.start.with_parameters(parameters), self.statistics)
        found = _whole_statistics(record, self.backend, self.train._replace(x=x), data_too)
        if found is None:
            return False
        self.statistics = found
        self.engine.set_statistics(found)
        return True

    def log(self, text: str) -> None:
        """Give a line to the logger ``fastmaf``, if the last one was some time ago."""
        if (now := time.perf_counter()) - self.logged >= LOGGED:
            self.logged = now
            logging.getLogger("fastmaf").info(text)

    def cut_short(self) -> None:
        """Take the weights of an epoch under way as those of an epoch."""
        parameters = self.engine.parameters()
        moved = self.begun is not None and not np.array_equal(parameters, self.parameters, equal_nan=True)
        if not self.ranks.any(moved) or self.begun is None:
            return
        x, rate, began = self.begun
        if self.members is not None and self.members.draw is not None:
            self.engine.set_members(_behind(self.start, self.members.flows))
        normed = self.renew(x, False)
        self.record(self.of_some(), self.score(), normed, rate, time.perf_counter() - began)
        self.unsaved = bool(self.state)  # a fit that goes on does so from there; the best is another now

    def glance(self) -> float:
        """Mean log-likelihood of some training rows, where there are no others to judge by; NaN where there are."""
        return math.nan if self.held is not None else self.of_some()

    def of_some(self) -> float:
        """Mean log-likelihood of some training rows under the current weights."""
        x, context, weights, rows = self.train
        some = rows[:: -(-self.total // data.SOME)]
        values = self.engine.log_prob(x[some], None if context is None else context[some]).astype(np.float64)
        shares = np.ones(some.size) if weights is None else weights[some]
        total, mass = self.ranks.sum(np.array([shares @ values, shares.sum()]))
        return float(total / mass)

    def score(self) -> float:
        """Mean log-likelihood of the validation rows under the current weights; NaN without such rows."""
        if self.held is None:
            return math.nan
        x, context, weights, rows = self.held
        total, block = 0.0, max(1, data.BLOCK // x.shape[1])
        for first in range(0, rows.size, block):
            part = rows[first : first + block]
            values = self.engine.log_prob(x[part], None if context is None else context[part]).astype(np.float64)
            total += float((values if weights is None else values * weights[part]).sum())
        total, mass = self.ranks.sum(np.array([total, self.held.mass()]))
        return float(total / mass)

    def record(self, train: float, validation: float, normed: bool, lr: float, seconds: float) -> None:
        """Append an epoch to the history, and keep its weights and statistics if they are the best and the statistics hold."""
        history, self.parameters = self.history, self.engine.parameters()
        history.train.append(train)
        history.lr.append(lr)
        history.seconds.append(seconds)
        if self.held is not None:
            history.validation.append(validation)
        if normed and (validation > self.best_score if self.held is not None else np.isfinite(self.parameters).all()):
            history.best_epoch, self.best, self.best_score = len(history.train), self.parameters, validation
            self.best_statistics = self.statistics

    # What comes of it

    def trained(self, parameters: Array, statistics: Statistics) -> FlowRecord:
        """The record with weights of the fit; that of the fixed layers alone where members are trained."""
        return _normed(self.start if self.members is not None else self.start.with_parameters(parameters), statistics)

    def built(self, parameters: Array, statistics: Statistics) -> Any:
        """The flow or ensemble with weights of the fit."""
        record = self.trained(parameters, statistics).replaced(training={**self.start.training, **self.summary()})
        flow = self.flow._holding(record)
        return flow if self.members is None or self.members.build is None else self.members.build(flow, parameters)

    def install(self) -> None:
        """Give the flow its best weights."""
        record = self.trained(self.best, self.best_statistics)
        noted = self.flow._record.training  # a callback may have added to it
        self.flow._record = record.replaced(training={**self.start.training, **noted, **self.summary()})
        if self.members is not None:
            self.members.weights = self.best

    def summary(self) -> dict[str, Any]:
        """Return what the flow remembers of its fit, ready for JSON; nothing in it depends on a clock."""
        history = self.history
        return {
            "epochs": len(history.train),
            "best_epoch": history.best_epoch,
            "train": history.train[history.best_epoch - 1] if history.best_epoch else None,
            "validation": self.best_score if math.isfinite(self.best_score) else None,
            "rows": self.total,
            "validation_rows": self.total_held,
            "stopped": history.stopped,
            "settings": self.settings,
        }

    def complaints(self) -> list[str]:
        """What is worth a warning at the end."""
        history = self.history
        remedy = "give weights that are less unequal" if self.uneven else f"try a lower lr than {self.settings['lr']:g}, or clip_norm"
        kept = "the best weights so far are kept" if history.best_epoch else "the weights are those of the start"
        if history.stopped.startswith("loss not finite"):
            return [f"{history.stopped}: {kept}; {remedy}"]
        if not history.train and history.stopped == "max_seconds":
            return [f"max_seconds={self.settings['max_seconds']:g} were over before the first epoch: {kept}"]
        if history.train and self.held is not None and not history.best_epoch:
            few = self.total_held < data.LEAST
            remedy = f"{self.total_held} rows decide; give more" if few else remedy
            return [f"none of {len(history.train)} epochs was better than the start on the validation rows: {kept}; {remedy}"]
        if self.held is not None and self.total_held < data.LEAST and history.best_epoch < len(history.train):
            chosen = f"epoch {history.best_epoch} of {len(history.train)}"
            return [f"{self.total_held} validation rows have chosen {chosen}, too few to tell: give more, or validation=0 and max_epochs"]
        if self.held is None and history.best_epoch < len(history.train):
            return [f"weights are no numbers behind epoch {history.best_epoch}: {kept}; {remedy}"]
        if self.held is None and self.at_end < self.at_start:
            return [f"training rows are less likely than at the start after {len(history.train)} epochs: {remedy}, or hold out rows"]
        return []

    # Checkpoints

    def snapshot(self) -> None:
        """Keep everything that the next epochs depend on, as arrays, until it is written."""
        if self.store is None:
            return
        arrays = {f"engine.{name}": value for name, value in self.engine.state().items()}
        arrays |= {f"history.{name}": getattr(self.history, name).copy() for name in SERIES}
        arrays |= {"best": self.best, "best_score": self.best_score, "best_epoch": self.history.best_epoch}
        arrays["start"] = math.nan if self.history.start is None else self.history.start
        for name, statistics in (("statistics", self.statistics), ("best_statistics", self.best_statistics)):
            for k, (mean, var) in enumerate(statistics):
                arrays |= {f"{name}.{k}.mean": mean, f"{name}.{k}.var": var}
        for prefix, layers in (("layers", self.start.layers), ("context_layers", self.start.context_layers)):
            for k, layer in enumerate(layers):
                if isinstance(layer, Affine):
                    arrays |= {f"{prefix}.{k}.loc": layer.loc, f"{prefix}.{k}.scale": layer.scale}
        self.state, self.unsaved = arrays, True

    def save(self, last: bool = False) -> None:
        """Write the checkpoint, if it is time to."""
        if self.store is None or not self.unsaved:
            return
        done, now = len(self.history.train), time.perf_counter()
        due = now - self.written_at >= self.every if isinstance(self.every, float) else done - self.written >= self.every
        if due or last:
            best, members = self.built(self.best, self.best_statistics)._parts()
            self.store.save(best, members, {name: np.array(value, order="C") for name, value in self.state.items()})
            self.unsaved, self.written, self.written_at = False, done, now

    def set_state(self, arrays: Mapping[str, Array]) -> None:
        """Go on from a checkpoint; its Affines are in `start` already."""
        size, dtype = self.best.size, self.start.dtype
        epochs = len(_codec.expect(arrays, "history.train", None, np.float64))
        held = 0 if self.held is None else epochs
        lengths = {"train": epochs, "validation": held, "lr": epochs, "seconds": epochs}
        series = {name: _codec.expect(arrays, f"history.{name}", (lengths[name],), np.float64).tolist() for name in SERIES}
        state = {name: _codec.expect(arrays, f"engine.{name}", (size,), dtype) for name in ("parameters", "first_moment", "second_moment")}
        state["step"] = _codec.expect(arrays, "engine.step", (), np.int64)
        start = float(_codec.expect(arrays, "start", (), np.float64))
        history = History(**series, start=None if self.held is None else start)
        history.best_epoch = int(_codec.expect(arrays, "best_epoch", (), np.int64))
        if not 0 <= history.best_epoch <= epochs or state["step"] < 0:
            raise ValueError(f"best_epoch is {history.best_epoch} of {epochs}, step {state['step']}")
        best, score = _codec.expect(arrays, "best", (size,), dtype), float(_codec.expect(arrays, "best_score", (), np.float64))
        found: list[Statistics] = []
        for name in ("statistics", "best_statistics"):
            found.append([])
            for k, own in enumerate(self.statistics):
                moments = [_codec.expect(arrays, f"{name}.{k}.{part}", own[0].shape, None) for part in ("mean", "var")]
                found[-1].append((moments[0], moments[1]))
        for parameters in (best, state["parameters"]):
            self.trained(parameters, found[1])  # refuses weights where the masks have none
        self.engine.load_state(state)
        self.history, self.best, self.best_score, self.parameters = history, best, score, state["parameters"]
        self.statistics, self.best_statistics = found
        self.written = epochs
        if self.statistics:
            self.engine.set_statistics(self.statistics)


def _real(name: str, value: Any, zero: bool = False) -> float:
    """A finite number, positive or, if `zero`, not negative."""
    try:
        number = _words.number(name, value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and (number > 0 or (zero and number == 0))):
        raise ValueError(f"{name} is {_words.shown(value)}; it must be a {'number that is not negative' if zero else 'positive number'}")
    return number


def _true(value: Any) -> bool:
    """Whether what a callback returned is true."""
    try:
        return bool(value)
    except (TypeError, ValueError):
        raise ValueError(f"callback returned {_words.shown(value)}; it must return True to stop, or None") from None


def _standardize(value: Any) -> bool | str:
    if not isinstance(value, str):
        return _words.flag("standardize", value)
    if value not in ("again", "full"):
        raise ValueError(f"standardize is {_words.shown(value)}; it must be True, False, 'again' or 'full'")
    return value


def _of_members(members: Members | None) -> str:
    """What tells their masks and weights from others."""
    if members is None:
        return ""
    networks = [array for each in members.flows for array in each.record.parameter_arrays()]
    return data.digest(members.weights, *networks)


def _norms(layers: Layers) -> list[BatchNorm]:
    return [layer for layer in layers if isinstance(layer, BatchNorm)]


def _of_batch(layers: Layers) -> bool:
    """Whether batch norms take their statistics from the batch."""
    return any(norm.statistics == "batch" for norm in _norms(layers))


def _normed(record: FlowRecord, statistics: Statistics) -> FlowRecord:
    """The record with other statistics in its batch norms."""
    if not statistics:
        return record
    moments = iter(statistics)
    layers = []
    for layer in record.layers:
        if isinstance(layer, BatchNorm):
            mean, var = next(moments)
            layer = replace(layer, mean=mean, var=var)
        layers.append(layer)
    return record.replaced(layers=layers)


def _behind(start: FlowRecord, members: Sequence[Member]) -> list[FlowRecord]:
    """The networks of the members behind the fixed layers of the record that is trained."""
    result = []
    for member in (each.record for each in members):
        own = iter([layer for layer in member.layers if isinstance(layer, Autoregressive)])
        layers = [next(own) if isinstance(layer, Autoregressive) else layer for layer in start.layers]
        result.append(start.replaced(layers=layers, base=member.base if isinstance(member.base, Terminal) else start.base))
    return result


def _restored(layers: Layers, prefix: str, saved: Mapping[str, Array]) -> Layers:
    """The layers with the Affines of a checkpoint."""

    def restored(name: str, layer: Affine) -> Affine:
        return Affine(*(_codec.expect(saved, f"{prefix}.{name}.{part}", layer.loc.shape, np.float64) for part in ("loc", "scale")))

    return tuple(restored(str(k), layer) if isinstance(layer, Affine) else layer for k, layer in enumerate(layers))


def _whole_statistics(record: FlowRecord, backend: Backend, train: Rows, data_too: bool) -> Statistics | None:
    """Mean and biased variance of the training rows in front of each batch norm, in double; None where they are not finite.

    Those of kind "data" keep theirs, unless `data_too`.  All rows stay at the last batch norm reached, so that no layer is evaluated twice.
    """
    statistics: Statistics = []
    segment: list[Any] = []
    z: Array | None = None  # the rows that the segment begins with; at first they are the data, read block by block
    weights = np.ones(train.rows.size) if train.weights is None else train.weights[train.rows]
    step = max(1, data.BLOCK // record.features)
    parts = [slice(first, min(first + step, train.rows.size)) for first in range(0, train.rows.size, step)]
    for layer in record.layers:
        if isinstance(layer, BatchNorm):
            chain = record.replaced(layers=segment, base=None)
            values = np.empty((train.rows.size, record.features), record.dtype)
            for part in parts:
                rows = train.rows[part]
                context = None if train.context is None else train.context[rows]
                backend.to_noise(chain, train.x[rows] if z is None else z[part], context, values[part])
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
    done = [epoch - 1 + step / steps for step in range(steps)]
    rates = np.array([lr * _words.number(f"schedule({epochs})", factor(epochs)) for epochs in done])
    wrong = ~(np.isfinite(rates) & (rates >= 0))
    if wrong.any():
        step = int(wrong.argmax())
        raise ValueError(f"schedule({done[step]}) makes the learning rate {rates[step]}; it must be finite and not negative")
    return rates
