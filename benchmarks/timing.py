"""Interleaved timing: every contender once per round, so that a disturbance of the machine meets all of them."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .cases import GOALS

Call = Callable[[], Any]


class WrongResult(Exception):
    """A result that fails its check; its time is not believed."""


@dataclass
class Contender:
    """Something to time.

    `check` takes a result, returns its error against float64, or raises `WrongResult`; a contender with `once` takes minutes and runs
    a single time.
    """

    name: str
    call: Call
    check: Callable[[Any], float]
    once: bool = False
    steps: int = 1
    """How many of the things that are timed one call does."""


@dataclass
class Line:
    """One comparison: an operation on a model with a number of rows."""

    operation: str
    model: str
    rows: int
    contenders: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def goals(self) -> list[dict[str, Any]]:
        """What is judged in this line: measured value, bound, and whether it is met (None: not measured; a wrong result is not)."""
        judged = []
        for what, (sense, bound) in GOALS.get(f"{self.operation}/{self.model}/{self.rows}", {}).items():
            value = self.values.get(what)
            met = False if "fastmaf" in self.skipped else None
            if value is not None:
                met = bool(value >= bound if sense == ">=" else value <= bound)
            judged.append({"what": what, "measured": value, "goal": f"{sense} {bound:g}", "met": met})
        return judged


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def clock(call: Call, repeats: int) -> float:
    """Seconds of one call, averaged over some in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise OSError(key)


def peak_memory(call: Call) -> float | None:
    """How far resident memory rises while `call` runs, in MB, its result included; None where the system does not tell."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (AttributeError, OSError):
        return None
    result = call()
    growth = _status("VmHWM") - before
    del result
    return max(growth, 0.0)


def _cpu_seconds() -> tuple[float, float]:
    """CPU time that the CPUs of this process have given so far, and what of it this process used; (0, 0) where the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0, 0.0
    ours = {f"cpu{n}" for n in os.sched_getaffinity(0)}
    rows = [line.split() for line in stat.read_text().splitlines() if line.split()[0] in ours]
    # user, nice, system, irq, softirq and what the host took away; not idle and iowait
    busy = sum(int(row[k]) for row in rows for k in (1, 2, 3, 6, 7, 8)) / os.sysconf("SC_CLK_TCK")
    return busy, sum(os.times()[:4])


def machine_peak(dtype: str, threads: int, seconds: float = 0.05) -> dict[str, float] | None:
    """GFLOP/s of fastmaf's micro-kernel on a block in L1 and of FMAs on registers; None without the compiled core."""
    try:
        from fastmaf import _core
    except ImportError:
        return None
    return _core.peak(dtype, threads, seconds)


def compare(line: Line, contenders: list[Contender], rounds: int, threads: int, flops: float | None = None, seconds: float = 0.1) -> Line:
    """Check every contender, then time them all in turn; the first one is the one that ratios refer to.

    Parameters
    ----------
    line : Line
        Is filled and returned: per contender the median and quartiles of its time and of its per-round ratio to the first one, its
        error and its peak memory.
    contenders : list of Contender
    rounds : int
        Even; every second round runs in the opposite order.
    threads : int
        For the measurement of the peak.
    flops : float, optional
        Work of one call of the first contender; with it the fraction of peak is measured.
    seconds : float
        Each contender repeats its call for about this long per round.
    """
    alive: list[Contender] = []
    repeats, times = {}, {}
    for c in contenders:
        try:
            start = time.perf_counter()
            result = c.call()
            one = time.perf_counter() - start
            error, memory = c.check(result), None
            del result
            if not c.once:
                memory = peak_memory(c.call)
                one = min(clock(c.call, 1) for _ in range(3))
        except Exception as problem:  # one library's failure is a line of the table, not the end of the run
            line.skipped[c.name] = f"{type(problem).__name__}: {problem}".split("\n")[0][:200]
            continue
        alive.append(c)
        repeats[c.name] = max(1, math.ceil(seconds / one))
        times[c.name] = [one / c.steps] if c.once else []
        line.contenders[c.name] = {"error": error, "peak_memory_mb": memory}
    if not alive or alive[0] is not contenders[0]:
        return line
    peaks = []
    start, busy, own = time.perf_counter(), *_cpu_seconds()
    for number in range(rounds):
        for c in alive if number % 2 == 0 else alive[::-1]:
            if c.once:
                continue
            if c is alive[0] and flops is not None and (peak := machine_peak("float32", threads)):
                peaks.append(peak)
            if repeats[c.name] > 1:  # the caches and the threads still belong to the one before
                clock(c.call, math.ceil(repeats[c.name] / 10))
            times[c.name].append(clock(c.call, repeats[c.name]) / c.steps)
    later, busier, owned = time.perf_counter(), *_cpu_seconds()
    line.values["CPUs taken by others"] = max(busier - busy - (owned - own), 0.0) / (later - start)
    ours = times[alive[0].name]
    for c in alive:
        entry = line.contenders[c.name]
        entry["seconds"] = summary(times[c.name])
        base = [float(np.median(ours))] if c.once else ours
        entry["ratio"] = summary([theirs / own for theirs, own in zip(times[c.name], base, strict=True)])
    if peaks and flops is not None:
        rate = [flops / alive[0].steps / own / 1e9 for own in ours]
        line.values["GFLOP/s"] = summary(rate)["median"]
        for what, key in (("fraction of peak", "kernel"), ("fraction of FMA rate", "fma")):
            line.values[what] = summary([r / p[key] for r, p in zip(rate, peaks, strict=True)])["median"]
            line.values[f"{key} GFLOP/s"] = summary([p[key] for p in peaks])["median"]
    return line


def against(line: Line, what: str, names: set[str] | None = None) -> None:
    """Store the ratio to the fastest of the peers (all, or those in `names`)."""
    peers = {n: e for n, e in list(line.contenders.items())[1:] if "ratio" in e and (names is None or n in names)}
    if peers:
        best = min(peers, key=lambda n: peers[n]["seconds"]["median"])
        line.values[what] = peers[best]["ratio"]["median"]
        if names is None:
            line.values["best peer"] = best
