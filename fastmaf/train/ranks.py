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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmaf import _words

__all__ = ["ALONE", "Ranks", "ranks_of"]

Array = NDArray[Any]

SILENCE = "FASTMAF_MPI_SILENCE"
"""Environment variable: seconds without a word from another process after which it counts as lost; 300 if it is not set."""

SPIN = 1e-3
"""Seconds in which a process only gives way while it waits; then it sleeps, `NAP` seconds at a time."""

NAP = 5e-5

HURRY = 5.0
"""Seconds for which a process waits for others that has been interrupted twice."""

_abandoned: list[Any] = []
"""Requests that nobody waits for any longer, and arrays that they may still write to."""


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
        return flag

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

    def check(self, parameters: Array) -> None:
        """Refuse weights that are not those of the other ranks."""

    def farewell(self, error: BaseException) -> bool:
        """Tell the others that this rank fails, unless they know; whether all of them end by an interruption."""
        return isinstance(error, KeyboardInterrupt)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        pass


ALONE = Ranks()
"""What a fit is by itself."""


class _Several(Ranks):
    """Ranks of a communicator of mpi4py.

    Whatever they do together begins with one small sum, by which a rank also tells that it has failed: the others then do not wait for it.
    Ctrl-C waits for the next of these sums, so that it ends the same step on all ranks. Nothing waits for ever: every call is one that
    can be asked whether it is done.
    """

    def __init__(self, comm: Any) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._silence = _silence()
        self._interrupts = 0
        self._handler: Any = None  # of Ctrl-C before
        self._told: BaseException | None = None  # what the others know of
        self._lost = False  # some of them do not answer any longer
        self._comm, request = comm.Idup()
        self._wait(request)
        self.size, self.rank = self._comm.Get_size(), self._comm.Get_rank()

    def __enter__(self) -> Ranks:
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def _interrupt(self, number: int, frame: Any) -> None:
        self._interrupts += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        try:
            if error is not None:
                self.farewell(error)
            else:
                self._meet()
                self._comm.Free()
        finally:
            if self._handler is not None:
                signal.signal(signal.SIGINT, self._handler)
        if self._interrupts and error is None and callable(self._handler):  # behind the last step, where it stops nothing
            self._handler(signal.SIGINT, None)

    def _wait(self, request: Any, *arrays: Any) -> None:
        began = time.monotonic()
        while not request.Test():
            waited = time.monotonic() - began
            if waited > (self._silence if self._interrupts < 2 else HURRY):
                _abandoned.append((request, arrays))
                self._lost = True
                self._told = RuntimeError(f"no word from another rank for {waited:.0f} seconds: it has died, or is held up")
                raise self._told
            time.sleep(NAP if waited > SPIN else 0)

    def _meet(self, value: float = 0.0, failed: str = "", interrupted: bool = False) -> float:
        """The sum of the values; raises where a rank has failed, which says how, or was interrupted."""
        if self._lost:
            raise RuntimeError("ranks have lost each other")
        if self._interrupts and not failed:
            self._interrupts, interrupted = 0, True
        sums = np.array([value, bool(failed), interrupted])
        self._wait(self._comm.Iallreduce(self._mpi.IN_PLACE, sums, self._mpi.SUM), sums)
        if sums[1]:
            causes = self._everyones(failed)
            rank = next(rank for rank, cause in enumerate(causes) if cause)
            self._told, self._lost = RuntimeError(f"rank {rank} has ended the fit: {causes[rank]}"), True
        elif sums[2]:
            self._told = KeyboardInterrupt()
        else:
            return float(sums[0])
        raise self._told

    def _everyones(self, value: Any) -> list[Any]:
        own = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = np.empty(self.size, np.int64)
        size = np.array([own.size], np.int64)
        self._wait(self._comm.Iallgather(size, sizes), size, sizes)
        ends = np.cumsum(sizes)
        every = np.empty(int(ends[-1]), np.uint8)
        places = [every, (sizes.tolist(), (ends - sizes).tolist()), self._mpi.BYTE]
        self._wait(self._comm.Iallgatherv([own, self._mpi.BYTE], places), own, every)
        return [pickle.loads(every[end - size : end].tobytes()) for size, end in zip(sizes, ends, strict=True)]

    def total(self, gradient: Array, loss: NDArray[np.float64]) -> None:
        loss[0] = self._meet(float(loss[0]))
        sums = gradient.copy()  # it outlives a wait that was given up
        self._wait(self._comm.Iallreduce(self._mpi.IN_PLACE, sums, self._mpi.SUM), sums)
        gradient[:] = sums

    def gather(self, value: Any) -> list[Any]:
        self._meet()
        return self._everyones(value)

    def first(self, value: Any) -> Any:
        return self.gather(value if self.rank == 0 else None)[0]

    def any(self, flag: bool) -> bool:
        return self._meet(float(flag)) > 0

    def crowded(self, threads: int) -> list[str]:
        machines = self.gather((self._mpi.Get_processor_name(), threads, os.cpu_count() or 1))
        for name, _, cores in machines:
            here = sum(threads for other, threads, _ in machines if other == name)
            if here > cores:
                remedy = "set FASTMAF_NUM_THREADS to cores by ranks, or bind ranks"
                return [f"ranks of one machine have {here} threads for {cores} cores: {remedy}"]
        return []

    def check(self, parameters: Array) -> None:
        if len(set(self.gather(zlib.crc32(parameters.tobytes())))) > 1:
            raise RuntimeError("ranks have come to different weights: all must run the same fastmaf on processors of one kind")

    def farewell(self, error: BaseException) -> bool:
        if error is not self._told and not self._lost:
            interrupted = isinstance(error, KeyboardInterrupt)
            with suppress(RuntimeError, KeyboardInterrupt):
                self._meet(0.0, "" if interrupted else f"{type(error).__name__}: {error}", interrupted)
            ended, self._told = self._told, error
            return isinstance(ended, KeyboardInterrupt)
        return isinstance(error, KeyboardInterrupt) and not self._lost


def _silence() -> float:
    text = os.environ.get(SILENCE, "300")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"{SILENCE} is {_words.shown(text)}; it must be a positive number of seconds")
    return seconds


def ranks_of(comm: Any) -> Ranks:
    """Those of a communicator, to be entered; what fails inside on one of them, fails on all."""
    if comm is None:
        return ALONE
    if not all(hasattr(comm, name) for name in ("Idup", "Iallreduce", "Iallgatherv")):
        raise ValueError(f"comm is {_words.shown(comm)}; it must be a communicator of mpi4py, as MPI.COMM_WORLD")
    return ALONE if comm.Get_size() == 1 else _Several(comm)
