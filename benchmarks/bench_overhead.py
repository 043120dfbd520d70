"""What a fresh process pays: the import, and the memory of a call over 10^7 rows beyond its input and output."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator

import numpy as np

from .cases import MODELS
from .report import Settings
from .timing import Line, WrongResult, peak_memory, summary

IMPORT = "import sys, time, numpy; t = time.perf_counter(); import {0}; print(time.perf_counter() - t)"


def scratch(operation: str, rows: int) -> float | None:
    """Growth of resident memory in MB during one call of model S; packing, threads and arenas are counted, x and out are not."""
    import fastmaf

    model = MODELS["S"]
    flow = fastmaf.MAF(model.features, transforms=model.transforms, hidden_features=model.hidden, seed=0)
    x = np.zeros((rows, model.features), np.float32)
    x[:] = np.linspace(-2, 2, rows)[:, None]
    out = np.ones(rows, np.float32) if operation == "log_prob" else x
    if operation == "log_prob":
        growth = peak_memory(lambda: flow.log_prob(x, out=out))
    else:
        growth = peak_memory(lambda: flow.sample(rows, seed=1, out=out))
    if not np.isfinite(out).all():
        raise WrongResult(f"{operation} of {rows} rows is not finite")
    return growth


def run(settings: Settings) -> Iterator[Line]:
    """One line for the import and one for each scratch memory."""
    line = Line("import", "-", 0)
    rounds = 2 if settings.quick else 10
    for package, module in (("fastmaf", "fastmaf"), ("zuko", "zuko"), ("nflows", "nflows.flows"), ("flowjax", "flowjax.flows")):
        command = [sys.executable, "-c", IMPORT.format(module)]
        runs = [subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(rounds if package == "fastmaf" else 2)]
        if any(r.returncode for r in runs):
            line.skipped[package] = runs[0].stderr.strip().rsplit("\n", 1)[-1]
        else:
            line.contenders[package] = {"seconds": summary([float(r.stdout) for r in runs])}
    if "fastmaf" in line.contenders:
        line.values["milliseconds"] = 1e3 * line.contenders["fastmaf"]["seconds"]["median"]
    yield line

    rows = 10**5 if settings.quick else 10**7
    for operation in ("log_prob", "sample"):
        line = Line(f"scratch of {operation}", "S", rows)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            try:
                line.values["MB beyond input and output"] = pool.apply(scratch, (operation, rows))
            except Exception as problem:  # a line of the table, not the end of the run
                line.skipped["fastmaf"] = f"{type(problem).__name__}: {problem}"[:200]
        yield line
