"""Several fits at once, each in a thread of its own."""

from __future__ import annotations

import copy
import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastmaf import _arrays, _codec, _words, backends, config
from fastmaf.layers import _one_of
from fastmaf.train._bar import tqdm
from fastmaf.train.checkpoint import Store
from fastmaf.train.data import FitWarning
from fastmaf.train.loop import Epoch, History, Trainee, _real, fit
from fastmaf.train.ranks import ALONE, Ranks

__all__ = ["fit_members"]

Note = tuple[str, type[Warning]]


def fit_members(
    flows: Sequence[Trainee],
    seeds: Sequence[int | None],
    x: ArrayLike | Callable[[int], ArrayLike],
    context: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    *,
    max_epochs: int = 1000,
    max_seconds: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str = "auto",
    callback: Callable[[Epoch], object] | None = None,
    on_interrupt: str = "raise",
    progress: bool | None = None,
    resume: bool = False,
    ranks: Ranks = ALONE,
    **options: Any,
) -> list[History]:
    """Fit flows in place, as many at once as there are threads; parameters and errors are those of `Ensemble.fit`.

    If one fails, those under way end as after Ctrl-C, and its error is raised.
    """
    compiled = backends.get_backend() == "cpu"
    threads = config.get_num_threads() if compiled else 1
    jobs = min(len(flows), threads) if ranks.size == 1 else 1  # all ranks meet over the same member
    ranks.agreed({"members": len(flows)})
    _one_of("on_interrupt", on_interrupt, ("raise", "return"))
    if callback is not None and not callable(callback):
        raise ValueError(f"callback is {_words.shown(callback)}; it must be callable")
    progress = None if progress is None else _words.flag("progress", progress)
    options |= {
        "max_epochs": max_epochs,
        "device": device,
        "resume": resume,
        "max_seconds": None if max_seconds is None else _real("max_seconds", max_seconds) / -(-len(flows) // jobs),
        "on_interrupt": "return",
        "progress": False,
        "ranks": ranks,
    }
    if callable(x):
        x = _in_turn(x, flows[0].device if device == "auto" else flows[0].to(device).device)
    for k in range(len(flows) if ranks.rank == 0 else 0):  # before any of them is changed
        path = _numbered(checkpoint, k)
        if isinstance(path, (str, os.PathLike)) and os.path.isfile(path):
            if _words.flag("resume", resume):
                _codec.read_checkpoint(path)
            else:
                Store(path, {}).load(False)
    pool = ThreadPoolExecutor(jobs, "fastmaf-fit")
    with tqdm(unit="epoch", disable=ranks.rank > 0 or (None if progress is None else not progress)) as bar:
        together = _Together(len(flows), bar, callback)

        def one(k: int) -> tuple[History, list[Note]]:
            if ranks.any(together.stopped.is_set()):
                return History(stopped="interrupted"), []
            with _words.gathering() as notes, config.num_threads(threads // jobs) if compiled else nullcontext():
                try:
                    history = fit(
                        flows[k],
                        x,
                        context,
                        weights,
                        seed=seeds[k],
                        checkpoint=_numbered(checkpoint, k),
                        callback=together.told(k),
                        poll=together.poll,
                        label=f"member {k}, ",
                        **options,
                    )
                except BaseException as error:
                    ranks.farewell(error)
                    raise
            if history.stopped == "interrupted":
                together.stopped.set()
            return history, notes

        try:
            futures = [pool.submit(one, k) for k in range(len(flows))]
            interrupted = _ended(futures, together.stopped)
        finally:  # nothing is under way any more, unless Ctrl-C came before it could be waited for
            together.stopped.set()
            pool.shutdown(wait=False)
    trained = [flow._record.fitted for flow in flows]
    if any(trained) and not all(trained) and ranks.rank == 0:
        who = [str(k) for k, fitted in enumerate(trained) if not fitted]
        _words.warn(
            f"member{'s' * (len(who) > 1)} {', '.join(who[:5])}{' ...' * (len(who) > 5)} of {len(flows)} never began to be trained, and "
            "spoil the mean: fit again, or leave them out, fastmaf.Ensemble([ensemble.member(k) for k in ...])",
            FitWarning,
        )
    done = [future.result() for future in futures]
    for note, category in _merged([notes for _, notes in done]):
        _words.warn(note, category)
    if interrupted and on_interrupt == "raise":
        raise KeyboardInterrupt
    return [history for history, _ in done]


def _ended(futures: Sequence[Future[Any]], stopped: threading.Event) -> bool:
    """Wait for the end of all, which comes soon after Ctrl-C and after an error; whether Ctrl-C came, here or in one of them."""
    interrupted, first = False, FIRST_EXCEPTION
    while True:
        try:
            wait(futures, return_when=first)
        except KeyboardInterrupt:  # however often: all keep what they have learned
            interrupted = True
        else:
            interrupted |= stopped.is_set() and first == FIRST_EXCEPTION
            if first == ALL_COMPLETED:
                return interrupted
        stopped.set()
        first = ALL_COMPLETED


class _Together:
    """What fits under way have in common."""

    def __init__(self, count: int, bar: Any, callback: Callable[[Epoch], object] | None) -> None:
        self.bar, self.callback = bar, callback
        self.stopped, self.lock = threading.Event(), threading.Lock()
        self.scores = [np.nan] * count

    def poll(self) -> None:
        """End the fit that asks, if all are to end."""
        if self.stopped.is_set():
            raise KeyboardInterrupt
        self.bar.refresh()

    def told(self, k: int) -> Callable[[Epoch], object]:
        """The callback of a member."""

        def tell(epoch: Epoch) -> object:
            if self.stopped.is_set():
                raise KeyboardInterrupt
            with self.lock:
                self.scores[k] = epoch["train"] if epoch["validation"] is None else epoch["validation"]
                name = "train" if epoch["validation"] is None else "validation"
                self.bar.set_postfix_str(f"{name} {np.nanmean(self.scores):.4f} nats, mean of {np.isfinite(self.scores).sum()} members")
                self.bar.update()
                if self.callback is None:
                    return None
                values = {name: epoch[name] for name in epoch if name != "flow"}
                return self.callback(Epoch({**values, "member": k}, lambda: epoch["flow"]))

        return tell


def _in_turn(draw: Callable[[int], ArrayLike], device: str) -> Callable[[int], Any]:
    """The function, called by one thread at a time; what it gives is copied, since it may use its array again."""
    lock = threading.Lock()

    @functools.wraps(draw)
    def drawn(epoch: int) -> Any:
        with lock:
            return copy.deepcopy(draw(epoch) if device == "cpu" else _arrays.fetched(f"x({epoch})", draw(epoch), device))

    return drawn


def _numbered(path: Any, k: int) -> Any:
    """The path with the number of a member in front of its extension."""
    if not isinstance(path, (str, os.PathLike)):
        return path
    root, extension = os.path.splitext(os.fspath(path))
    return f"{root}.{k}{extension}" if root else path


def _merged(notes: Sequence[Sequence[Note]]) -> list[Note]:
    """What members have to say, each thing once, with the numbers of those who say it if not all do."""
    members: dict[Note, list[int]] = {}
    for k, own in enumerate(notes):
        for note in own:
            members.setdefault(note, []).append(k)
    return [
        (text if len(who) == len(notes) else f"member{'s' * (len(who) > 1)} {', '.join(map(str, who))}: {text}", category)
        for (text, category), who in members.items()
    ]
