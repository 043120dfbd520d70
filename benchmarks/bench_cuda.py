"""Density and samples on a GPU beside zuko under torch.compile, in one process: `python -m benchmarks.bench_cuda [OUTPUT.json]`.

`medium` stands beside zuko with TF32 allowed, `high` beside zuko in float32.  Times are medians of CUDA events over arrays that already lie
on the device, interleaved round by round.  A result must agree with the float64 density of the CPU, or its time is not reported.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import fastmaf

MODELS = {"S": (6, (100, 100), 5), "M": (43, (512, 512), 5), "L2": (64, (512, 512), 10), "X": (784, (1024,), 5)}
ROWS = {"S": 2**20, "M": 2**20, "L2": 2**19, "X": 2**16}
SAMPLES = {"S": 2**17, "M": 2**15, "L2": 2**13, "X": 2**10}
ROUNDS = 7
ALLOWED = {"S": 1e-4, "M": 1e-3, "L2": 1e-2, "X": 1e-2}
"""Largest error of log_prob in nats."""


def seconds(call: Callable[[], Any]) -> float:
    """One call, by the clock of the device."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def medians(calls: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """Median, quickest and slowest of interleaved rounds, after two calls each; those that fail are left out."""
    times: dict[str, list[float]] = {}
    for name, call in calls.items():
        try:
            for _ in range(2):
                seconds(call)
            times[name] = []
        except RuntimeError as error:
            print(f"  {name}: {str(error)[:120]}", file=sys.stderr)
    for _ in range(ROUNDS):
        for name in times:
            times[name].append(seconds(calls[name]))
    return {name: {"median": statistics.median(own), "least": min(own), "most": max(own)} for name, own in times.items()}


def latency(call: Callable[[], Any]) -> float:
    """Median wall time of one call with its result, in seconds."""
    import torch

    own = []
    for _ in range(300):
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        own.append(time.perf_counter() - begin)
    return statistics.median(own[100:])


def measure(name: str) -> list[dict[str, Any]]:
    """All lines of one model."""
    import torch
    import zuko

    features, hidden, transforms = MODELS[name]
    flow = fastmaf.MAF(features=features, hidden_features=hidden, transforms=transforms, seed=1)
    ours = {precision: flow.to("cuda", precision) for precision in ("high", "medium")}
    peer = zuko.flows.MAF(features, 0, transforms=transforms, hidden_features=list(hidden)).cuda()
    density = torch.compile(lambda x: peer().log_prob(x), dynamic=False)
    lines = []

    x = torch.randn(ROWS[name], features, device="cuda")
    some = x[:1000].cpu().numpy()
    exact = flow.astype("float64").log_prob(some.astype(np.float64))
    for precision, tf32 in (("medium", True), ("high", False)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        error = float(np.abs(ours[precision].log_prob(some) - exact).max())
        calls: dict[str, Callable[[], Any]] = {"zuko compiled": lambda: density(x), "zuko": lambda: peer().log_prob(x)}
        if error <= ALLOWED[name]:
            calls["fastmaf"] = lambda precision=precision: ours[precision].log_prob(x)  # type: ignore[misc]
        with torch.no_grad():
            lines.append({"model": name, "operation": f"log_prob {precision}", "rows": len(x), "error": error, "seconds": medians(calls)})

    rows = SAMPLES[name]
    out = torch.empty(ROWS[name], features, device="cuda")
    calls = {"fastmaf": lambda: ours["high"].sample(rows, seed=1, out=out[:rows])}
    if name != "X":
        calls["zuko"] = lambda: peer().sample((rows,))
    with torch.no_grad():
        lines.append({"model": name, "operation": "sample high", "rows": rows, "seconds": medians(calls)})
    both = {
        "fastmaf sample": lambda: ours["high"].sample(len(out), seed=1, out=out),
        "fastmaf log_prob": lambda: ours["high"].log_prob(x),
    }
    lines.append({"model": name, "operation": "sample against log_prob", "rows": len(out), "seconds": medians(both)})
    one, host = x[:1].clone(), some[:1].copy()
    found = {"device array": latency(lambda: ours["high"].log_prob(one)), "NumPy array": latency(lambda: ours["high"].log_prob(host))}
    lines.append({"model": name, "operation": "one row", "rows": 1, "seconds": {key: {"median": value} for key, value in found.items()}})
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """One row per line: our time, and the others' as multiples of it."""
    rows = ["| model | operation | rows | ms | others |", "|---|---|---:|---:|---|"]
    for line in lines:
        times = line["seconds"]
        first = next((key for key in times if key.startswith("fastmaf")), next(iter(times), None))
        if first is None:
            continue
        own = times[first]["median"]
        others = ", ".join(f"{key} {value['median'] / own:.2f}x" for key, value in times.items() if key != first)
        error = f"; error {line['error']:.1g} nats" if "error" in line else ""
        rows.append(f"| {line['model']} | {line['operation']} | {line['rows']:,} | {own * 1e3:.3f} | {others}{error} |")
    return "\n".join(rows)


def said_by(command: list[str]) -> str:
    """What a program prints; nothing where there is no such program."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def main() -> None:
    """Measure all models, print the table and write what was measured."""
    import torch
    import zuko

    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem", "--format=csv,noheader"]
    gpu, commit = said_by(query), said_by(["git", "rev-parse", "HEAD"])
    lines: list[dict[str, Any]] = []
    for name in MODELS:  # what was measured stays, whatever comes next
        try:
            lines += measure(name)
        except Exception as problem:
            print(f"{name}: {type(problem).__name__}: {problem}", file=sys.stderr, flush=True)
        found = {"gpu": gpu, "torch": torch.__version__, "zuko": zuko.__version__, "commit": commit, "lines": lines}
        if len(sys.argv) > 1:
            with open(sys.argv[1], "w") as file:
                json.dump(found, file, indent=1)
        print(gpu, table(lines), sep="\n\n", flush=True)


if __name__ == "__main__":
    main()
