"""Processes that fit together: each has its part of the rows and of every batch, all have the same weights."""

from __future__ import annotations

import functools
import operator
import os
import pickle
import signal
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastmaf import _words

__all__ = ["ALONE", "Ranks", "together"]

Array = NDArray[Any]
R = TypeVar("R")

SILENCE = 300.0
"""Seconds without a word from another process after which it counts as lost."""

SPIN = 1e-3
"""Seconds in which a process only gives way while it waits; then it sleeps, `NAP` seconds at a time."""

NAP = 5e-5

HURRY = 5.0
"""Seconds after which a process that has been interrupted does not wait for others any longer."""

GOOD, FAILED, INTERRUPTED = 0, 1, 2


class Ranks:
    """A process alone: its own sum, and the only one to ask."""

    size, rank = 1, 0

    def total(self, gradient: Array, loss: NDArray[np.float64]) -> None:
        """Replace the arrays by their sums over all ranks."""

    def gather(self, value: Any) -> list[Any]:
        """What each rank gives, in their order."""
        return [value]

    def first(self, value: Any) -> Any:
        """What rank 0 gives."""
        return value

    def sum(self, value: Any) -> Any:
        """The sum of numbers or arrays, with the same bits on all ranks."""
        return functools.reduce(operator.add, self.gather(value))

    def any(self, flag: bool) -> bool:
        """Whether one of the ranks says so."""
        return any(self.gather(bool(flag)))

    def agreed(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that differ from those of rank 0."""
        every = self.gather(dict(settings))
        for rank, own in enumerate(every):
            for name, value in every[0].items():
                if own[name] != value:
                    raise ValueError(f"{name} is {_words.shown(value)} on rank 0 and {_words.shown(own[name])} on rank {rank}")

    def merged(self, notes: Sequence[str]) -> list[str]:
        """What ranks have to say, each thing once, with the ranks that say it if not all do."""
        who: dict[str, list[int]] = {}
        for rank, own in enumerate(self.gather(list(notes))):
            for note in own:
                who.setdefault(note, []).append(rank)
        return [
            note if len(ranks) == self.size else f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:5]))}: {note}"
            for note, ranks in who.items()
        ]

    def crowded(self, threads: int) -> list[str]:
        """What to say of more threads than cores."""
        return []

    def farewell(self, error: BaseException) -> None:
        """Tell the others that this rank fails, unless the error came from them."""

    def close(self) -> None:
        """End it, when all others do."""

    def check(self, parameters: Array) -> None:
        """Refuse weights that are not those of the other ranks."""
        if len(set(self.gather(zlib.crc32(parameters.tobytes())))) > 1:
            raise RuntimeError("ranks have come to different weights: all must run the same fastmaf on processors of one kind")

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self.farewell(error)


ALONE = Ranks()
"""What a fit is by itself."""


class _Several(Ranks):
    """Ranks of a communicator of mpi4py.

    Whatever they do together begins with one small sum, by which a rank also tells that it has failed: the others then do not wait for it.
    Ctrl-C waits for the next of these sums, so that it ends the same step on all ranks.
    """

    def __init__(self, comm: Any) -> None:
        from mpi4py import MPI

        self._mpi, self._comm = MPI, comm.Dup()
        self.size, self.rank = self._comm.Get_size(), self._comm.Get_rank()
        self._interrupted = False
        self._handler: Any = None  # of Ctrl-C before
        self._told: BaseException | None = None  # what others know of

    def __enter__(self) -> Ranks:
        ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if ours:
            self._handler = signal.signal(signal.SIGINT, lambda number, frame: setattr(self, "_interrupted", True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        try:
            super().__exit__(kind, error, where)
        finally:
            if self._handler is not None:
                signal.signal(signal.SIGINT, self._handler)

    def _wait(self, request: Any) -> None:
        began = time.monotonic()
        while not request.Test():
            waited = time.monotonic() - began
            if waited > (HURRY if self._interrupted else SILENCE):
                self._told = RuntimeError(f"no word from another rank for {waited:.0f} seconds: it has died, or is held up")
                raise self._told
            time.sleep(NAP if waited > SPIN else 0)

    def _meet(self, value: float = 0.0, status: int = GOOD, why: str = "") -> float:
        """The sum of the values; raises where a rank has failed."""
        if self._interrupted and status == GOOD:
            self._interrupted, status = False, INTERRUPTED
        sums = np.array([value, status == FAILED, status == INTERRUPTED])
        self._wait(self._comm.Iallreduce(self._mpi.IN_PLACE, sums, self._mpi.SUM))
        if sums[1]:
            causes = self._comm.allgather(why)
            rank = next(rank for rank, cause in enumerate(causes) if cause)
            self._told = RuntimeError(f"rank {rank} has ended the fit: {causes[rank]}")
        elif sums[2]:
            self._told = KeyboardInterrupt()
        else:
            return float(sums[0])
        raise self._told

    def total(self, gradient: Array, loss: NDArray[np.float64]) -> None:
        loss[0] = self._meet(float(loss[0]))
        self._wait(self._comm.Iallreduce(self._mpi.IN_PLACE, gradient, self._mpi.SUM))

    def gather(self, value: Any) -> list[Any]:
        own = pickle.dumps(value)  # what cannot be pickled is an error before the others wait for it
        self._meet()
        return [pickle.loads(other) for other in self._comm.allgather(own)]

    def first(self, value: Any) -> Any:
        own = pickle.dumps(value) if self.rank == 0 else b""
        self._meet()
        return pickle.loads(self._comm.bcast(own))

    def any(self, flag: bool) -> bool:
        return self._meet(float(flag)) > 0

    def crowded(self, threads: int) -> list[str]:
        self._meet()
        node = self._comm.Split_type(self._mpi.COMM_TYPE_SHARED)
        here, cores = node.allreduce(threads), os.cpu_count() or 1
        node.Free()
        if here <= cores:
            return []
        return [f"ranks of one machine have {here} threads for {cores} cores: set FASTMAF_NUM_THREADS to cores by ranks, or bind ranks"]

    def farewell(self, error: BaseException) -> None:
        if error is self._told:
            return
        self._told = error
        interrupted = isinstance(error, KeyboardInterrupt)
        with suppress(RuntimeError, KeyboardInterrupt):
            self._meet(0.0, INTERRUPTED if interrupted else FAILED, f"{type(error).__name__}: {error}")
        self._told = error

    def close(self) -> None:
        self._meet()
        self._comm.Free()


def _of(comm: Any) -> Ranks:
    if comm is None:
        return ALONE
    if not all(hasattr(comm, name) for name in ("Dup", "Iallreduce", "allgather")):
        raise ValueError(f"comm is {_words.shown(comm)}; it must be a communicator of mpi4py, as MPI.COMM_WORLD")
    return ALONE if comm.Get_size() == 1 else _Several(comm)


def together(fit: Callable[..., R]) -> Callable[..., R]:
    """A function that takes `comm` where the one given takes `ranks`; if it fails on one of these, it does on all."""

    @functools.wraps(fit)
    def with_comm(*arguments: Any, comm: Any = None, **options: Any) -> R:
        with _of(comm) as ranks:
            return fit(*arguments, ranks=ranks, **options)

    return with_comm
