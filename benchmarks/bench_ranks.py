"""An epoch of `fit(comm=...)` on several ranks beside one by a process alone, with one thread and with as many threads as there are ranks.

    FASTMAF_NUM_THREADS=1 mpirun --bind-to none -n 2 python -m benchmarks.bench_ranks [MODEL/BATCH ...]

Each rank has one thread. Rounds are interleaved; the others sleep while rank 0 is alone.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from mpi4py import MPI

import fastmaf

from .cases import MODELS
from .timing import summary

COMM = MPI.COMM_WORLD
ROUNDS, EPOCHS = 5, 4
CASES = ("S/256", "S/1000", "S/4096", "M/256", "M/1000", "M/4096")


def epoch(case: str, comm: MPI.Comm | None, threads: int) -> float:
    """Seconds of one epoch of 16 batches."""
    name, batch = case.split("/")
    model = MODELS[name]
    x = np.random.default_rng(0).normal(size=(16 * int(batch), model.features)).astype(np.float32)
    flow = fastmaf.MAF(model.features, transforms=model.transforms, hidden_features=model.hidden, seed=0)
    with fastmaf.config.num_threads(threads):
        options = {"batch_size": int(batch), "validation": 0, "max_epochs": EPOCHS, "standardize": False, "seed": 0, "progress": False}
        seconds = flow.fit(x, comm=comm, **options).seconds
    return (seconds[-1] - seconds[0]) / (EPOCHS - 1)


def wait() -> None:
    """Until all ranks are here, asleep."""
    request = COMM.Ibarrier()
    while not request.Test():
        time.sleep(1e-3)


def main() -> None:
    """Measure, and write a table to stdout."""
    if COMM.rank == 0:
        print(f"| model/batch | 1 thread, s | {COMM.size} threads | {COMM.size} ranks of 1 thread |\n|---|---|---|---|", flush=True)
    for case in sys.argv[1:] or CASES:
        found: dict[str, list[float]] = {"one": [], "threads": [], "ranks": []}
        for round_ in range(ROUNDS + 1):
            kinds = [("one", None, 1), ("threads", None, COMM.size), ("ranks", COMM, 1)]
            for kind, comm, threads in kinds if round_ % 2 else reversed(kinds):
                wait()
                seconds = epoch(case, comm, threads) if comm is not None or COMM.rank == 0 else 0.0
                wait()
                found[kind] += [seconds] * (round_ > 0)
        if COMM.rank == 0:
            ratios = [summary([one / other for one, other in zip(found["one"], found[kind], strict=True)]) for kind in ("threads", "ranks")]
            cells = [f"{ratio['median']:.2f} x ({ratio['low']:.2f} to {ratio['high']:.2f})" for ratio in ratios]
            print(f"| {case} | {np.median(found['one']):.4f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
