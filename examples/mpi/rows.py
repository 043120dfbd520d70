"""Ranks draw or score disjoint parts of many rows, and write them where they belong: the files are the same for any number of ranks.

mpirun -n 4 python rows.py sample flow.safetensors 1000000 samples.npy
mpirun -n 4 python rows.py log_prob flow.safetensors samples.npy log_prob.npy

A rank computes on the cores that it is bound to, or on OMP_NUM_THREADS threads.
"""

from __future__ import annotations

import sys

import numpy as np
from mpi4py import MPI

import fastmaf

BLOCK = 1_000_000
"""Rows at a time, so that memory stays flat."""


def main(operation: str, path: str, source: str, target: str) -> None:
    """Write to `target` what a flow draws, `source` being a number of rows, or what it says of the rows of a file."""
    ranks = MPI.COMM_WORLD
    flow = ranks.bcast(fastmaf.load(path) if ranks.rank == 0 else None)  # one rank reads the file
    rows = None if operation == "sample" else np.load(source, mmap_mode="r")
    total = int(source) if rows is None else len(rows)
    shape = (total, flow.features) if rows is None else (total,)
    offset = None
    if ranks.rank == 0:
        offset = np.lib.format.open_memmap(target, "w+", flow.dtype, shape).offset
    offset = ranks.bcast(offset)
    begin, end = total * ranks.rank // ranks.size, total * (ranks.rank + 1) // ranks.size
    row = int(np.prod(shape[1:])) * flow.dtype.itemsize
    file = MPI.File.Open(ranks, target, MPI.MODE_WRONLY)
    for first in range(begin, end, BLOCK):
        last = min(first + BLOCK, end)
        block = flow.sample(last - first, seed=1, offset=first) if rows is None else flow.log_prob(rows[first:last])
        file.Write_at(offset + first * row, block)
    file.Close()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except BaseException as error:  # a rank that is gone would let the others wait for ever
        print(f"rank {MPI.COMM_WORLD.rank}: {error}", file=sys.stderr)
        MPI.COMM_WORLD.Abort(1)
