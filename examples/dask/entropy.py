"""Draw samples from a flow in the processes of a cluster, and score them: more rows than fit into memory.

python entropy.py flow.safetensors 100000000
"""

from __future__ import annotations

import sys

import dask
from distributed import Client, LocalCluster

import fastmaf
import fastmaf.dask


def main(path: str, n: int) -> None:
    """Print the entropy of a flow with its standard error, and the first sample of its stream, which is the same for any cluster."""
    flow = fastmaf.load(path)
    with LocalCluster(dashboard_address=":0") as cluster, Client(cluster):  # of a batch system: dask_jobqueue.SLURMCluster(...)
        samples = fastmaf.dask.sample(flow, n, chunks=100_000, seed=1)  # nothing is drawn yet
        log_prob = flow.log_prob(samples).astype("float64")
        mean, deviation, first = dask.compute(log_prob.mean(), log_prob.std(), samples[0])
    print(f"entropy {-mean:.5f} +- {deviation / n**0.5:.5f} nats, from {n} samples, the first of which is {first}")


if __name__ == "__main__":  # processes of the cluster import this file
    main(sys.argv[1], int(sys.argv[2]))
