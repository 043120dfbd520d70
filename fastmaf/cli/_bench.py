"""``fastmaf bench``: how fast a flow runs here."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import fastmaf
from fastmaf import _networks, backends
from fastmaf.cli import _common
from fastmaf.cli._common import positive
from fastmaf.layers import Autoregressive, Terminal
from fastmaf.record import trainable

__all__ = ["add", "products"]

EXAMPLES = """\
  fastmaf bench flow.safetensors
  fastmaf bench flow.safetensors --rows 100 --threads 1"""

SECONDS = 0.1
"""Of a run, of which there are `ROUNDS`; the median counts."""

ROUNDS = 5


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "bench",
        help="rows per second of a flow on this machine",
        description="Rows per second of a flow on this machine, by number of threads, beside the bound: what the multiply-adds inside the "
        "masks alone would take at the speed of the matrix kernel on numbers in the first cache.",
        examples=EXAMPLES,
    )
    parser.set_defaults(run=run)
    parser.add_argument("flow", metavar="FLOW", help="a .safetensors file, or - for stdin")
    parser.add_argument("--rows", type=positive, default=10_000, metavar="N", help="in a call (default: %(default)s)")
    parser.add_argument("--threads", type=positive, metavar="N", help="at most so many (default: all CPUs of this process)")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    flow = _common.load(arguments)
    rows = arguments.rows
    context = None
    if flow.context_features:
        affine = [layer for layer in flow.context_layers if hasattr(layer, "loc")]
        context = affine[-1].loc if affine else np.zeros(flow.context_features)
    x = flow.sample(rows, context, seed=1)
    work = products(flow)
    print(f"{flow!r}\n{rows:,} rows in a call, {work:,} multiply-adds in a row\n")
    with_core = backends.reason("cpu") is None
    most = arguments.threads or (fastmaf.get_num_threads() if with_core else 1)
    print(f"{'threads':>7}{'log_prob rows/s':>18}{'of bound':>10}{'sample rows/s':>18}{'of bound':>10}{'bound rows/s':>18}")
    out = np.empty(rows, flow.dtype)
    for threads in range(1, most + 1) if with_core else (1,):
        if with_core:
            fastmaf.set_num_threads(threads)
        densities = _rate(lambda: flow.log_prob(x, context, out=out), rows)
        samples = _rate(lambda: flow.sample(rows, context, seed=1, out=x), rows)
        bound = backends.core().peak(flow.dtype.name, threads, SECONDS)["kernel"] * 1e9 / (2 * work) if with_core and work else None
        shares = [f"{rate / bound:>10.2f}" if bound else f"{'':>10}" for rate in (densities, samples)]
        end = f"{bound:>18,.0f}" if bound else ""
        print(f"{threads:>7}{densities:>18,.0f}{shares[0]}{samples:>18,.0f}{shares[1]}{end}", flush=True)
    return 0


def _rate(call: Callable[[], Any], rows: int) -> float:
    """Rows per second."""
    call()
    began = time.perf_counter()
    call()
    repeats = max(1, round(SECONDS / max(time.perf_counter() - began, 1e-9)))
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        seconds.append((time.perf_counter() - began) / repeats)
    return rows / float(np.median(seconds))


def products(flow: Any) -> int:
    """The weights inside the masks of all networks: multiply-adds of a row.

    Examples
    --------
    >>> products(fastmaf.MAF(2, transforms=1, hidden_features=(3,)))
    9
    """
    members = [flow.member(k) for k in range(len(flow))] if isinstance(flow, fastmaf.Ensemble) else [flow]
    records = [record for member in members for record in (*member.layers, member.base)]
    networks = [_networks.free(record) for record in records if isinstance(record, (Autoregressive, Terminal))]
    return sum(int(np.count_nonzero(array)) for network in networks for array in trainable(network) if array.ndim == 2)
