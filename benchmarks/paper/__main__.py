"""Make the tables of the MADE and MAF papers again: fit rows, or turn what was fitted into Markdown."""

from __future__ import annotations

import argparse
import os
import sys
from fnmatch import fnmatch
from pathlib import Path

HERE = Path(__file__).resolve()
TABLES = ("gaussians", "binary", "bsds", "mnist")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    root = HERE.parents[2]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument("table", choices=(*TABLES, "tables"), help="the rows of one table; `tables` writes the Markdown")
    parser.add_argument("--rows", default="*", help="comma-separated patterns of model or data/model, e.g. 'maf-5,mnist/*' (%(default)s)")
    parser.add_argument("--seeds", default="0", help="comma-separated; all rows of one seed before those of the next (%(default)s)")
    parser.add_argument("--minutes", type=float, default=40.0, help="cap of one fit, its resumed calls included (%(default)s)")
    parser.add_argument("--epochs", type=int, help="another largest number of epochs, and length of the schedule, than the recipe's")
    parser.add_argument("--threads", type=int, default=2, help="%(default)s")
    parser.add_argument("--backend", help="of fastmaf; its own choice unless given")
    parser.add_argument("--again", action="store_true", help="also rows that are there; one that the cap stopped goes on from where it was")
    parser.add_argument("--list", action="store_true", help="name the rows, and do not run them")
    parser.add_argument("--data", type=Path, default=root.parent / "shared" / "data", help="%(default)s")
    parser.add_argument("--output", type=Path, default=HERE.parents[1] / "results" / "paper", help="folder of the results (%(default)s)")
    parser.add_argument("--checkpoints", type=Path, default=root / ".benchmarks" / "paper", help="of fits under way (%(default)s)")
    parser.add_argument("--markdown", type=Path, default=root / "docs" / "tables.md", help="written by `tables` (%(default)s)")
    arguments = parser.parse_args(words)
    for option, least in (("threads", 1), ("epochs", 1), ("minutes", 0.0)):
        if (value := getattr(arguments, option)) is not None and not value >= least:
            parser.error(f"--{option} is {value}; it must be at least {least}")
    try:
        arguments.seeds = [int(seed) for seed in arguments.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds is {arguments.seeds!r}; it must be a list of integers such as 0,1,2")
    return arguments


def main(words: list[str] | None = None) -> int:
    """Do what was asked for; 1 if a row failed or was interrupted."""
    arguments = parse(words)
    for library in ("FASTMAF", "OMP", "MKL", "OPENBLAS", "NUMBA"):  # before they are imported
        os.environ[f"{library}_NUM_THREADS"] = str(arguments.threads)
    if arguments.table == "tables":
        from . import tables

        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(tables.markdown(tables.read(arguments.output)))
        return 0

    import fastmaf

    from . import run
    from .recipes import TABLES as ROWS

    if arguments.backend:
        fastmaf.set_backend(arguments.backend)
    patterns = arguments.rows.split(",")
    rows = [row for row in ROWS[arguments.table] if any(fnmatch(row.model, p) or fnmatch(row.name, p) for p in patterns)]
    if not rows:
        print(f"--rows is {arguments.rows!r}; the table has {', '.join(row.name for row in ROWS[arguments.table])}", file=sys.stderr)
        return 2
    settings = run.Settings(arguments.data, arguments.output, arguments.checkpoints, arguments.minutes, arguments.threads)
    failed = False
    for seed in arguments.seeds:
        for row in (row.with_epochs(arguments.epochs) for row in rows):
            if row.recipe is None and seed != arguments.seeds[0]:
                continue
            number = seed if row.recipe else 0
            done = None if arguments.again else run.finished(row, number, arguments.output)
            if done or arguments.list:
                print(f"{row.name} {number}: {done or 'to run'}", flush=True)
                continue
            try:
                result = run.run(row, number, settings)
            except run.Interrupted:
                print(f"{row.name} {number}: interrupted; the same command goes on with it", flush=True)
                return 1
            except Exception as problem:  # one row's failure is not the end of the others
                print(f"{row.name} {number}: {type(problem).__name__}: {problem}", file=sys.stderr, flush=True)
                failed = True
                continue
            print(run.text(result), flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
