"""Run the benchmarks: measure, print, and write a table and a JSON."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

OPERATIONS = (
    *("log_prob", "sample", "train", "members", "overhead", "embedding", "hmc"),
    *("interop", "held_out", "quality", "samples", "calibration"),
)


def parse() -> argparse.Namespace:
    """Read the command line."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--operations", default=",".join(OPERATIONS), help="comma-separated: %(default)s")
    parser.add_argument("--models", default="S,M,X,L", help="comma-separated: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="for fastmaf and for every peer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="even; each contender runs once per round (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="few rows, two rounds, no torch.compile: whether it works, not how fast")
    parser.add_argument("--slow", action="store_true", help="time zuko's sampler on X, minutes for one call")
    parser.add_argument("--data", type=Path, default=here.parents[1] / "shared" / "data", help="folder of the data of quality and samples")
    output = here / "results" / "latest"
    parser.add_argument("--output", type=Path, default=output, help="writes OUTPUT.json and OUTPUT.md (benchmarks/results/latest)")
    arguments = parser.parse_args()
    arguments.rounds = 2 if arguments.quick else arguments.rounds
    if arguments.rounds < 2 or arguments.rounds % 2:
        parser.error(f"--rounds is {arguments.rounds}; it must be even and at least 2")
    if arguments.threads < 1:
        parser.error(f"--threads is {arguments.threads}")
    for option, allowed in (("operations", OPERATIONS), ("models", ("S", "M", "X", "L"))):
        chosen = tuple(getattr(arguments, option).split(","))
        if unknown := set(chosen) - set(allowed):
            parser.error(f"--{option} has {sorted(unknown)[0]!r}; it knows {', '.join(allowed)}")
        setattr(arguments, option, chosen)
    return arguments


def pin(threads: int) -> None:
    """Give every library the same threads; must come before their import."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    for name in ("FASTMAF", "OMP", "MKL", "OPENBLAS", "NUMBA"):
        os.environ[f"{name}_NUM_THREADS"] = str(threads)
    os.environ["NPROC"] = str(threads)  # the size of XLA's pool
    os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen=true intra_op_parallelism_threads={threads}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(threads)


def main() -> None:
    """Run what was asked for; write the results after every line."""
    arguments = parse()
    pin(arguments.threads)

    from importlib import import_module

    from .cases import MODELS
    from .report import Settings, machine, text, write

    models = tuple(MODELS[name] for name in arguments.models)
    settings = Settings(models, arguments.operations, arguments.rounds, arguments.threads, arguments.quick, arguments.slow, arguments.data)
    where, lines = machine(settings.threads), []
    for operation in settings.operations:
        for line in import_module(f"benchmarks.bench_{operation}").run(settings):
            lines.append(line)
            print(text(line), flush=True)
            write(arguments.output, where, lines, settings)


if __name__ == "__main__":
    main()
