"""What training loops reach on held-out rows: sbi on its own `maf`, sbi on `fastmaf.torch.sbi_maf`, and `sbi_fit` on the same.

Five seeds each, on the same simulations, of which sbi and `sbi_fit` set aside a tenth for early stopping.
"""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .bench_calibration import Data, slcp
from .report import Settings
from .timing import Line, summary

SEEDS, BATCH = 5, 200


def chain(path: Path) -> Data:
    """Ten parameters given ten numbers, each bent by the parameter before."""
    rng = np.random.default_rng(7)
    theta = rng.normal(size=(12_000, 10))
    x = theta + 0.3 * rng.normal(size=theta.shape)
    x[:, 1:] += 0.5 * theta[:, :-1] ** 2
    return Data(theta, x)


SETS: dict[str, Callable[[Path], Data]] = {"slcp": slcp, "chain of 10": chain}


def run(settings: Settings) -> Iterator[Line]:
    """One line per data set: held-out nats of every loop and seed, and how far they lie above those of sbi."""
    for name, load in SETS.items():
        data = load(settings.data)
        line = Line("held-out rows of loops of sbi", name, len(data.x))
        try:
            _judge(line, data, 1 if settings.quick else SEEDS, 2 if settings.quick else 1_000)
        except ImportError as problem:
            line.skipped["all"] = str(problem)
        yield line


def _judge(line: Line, data: Data, seeds: int, epochs: int) -> None:
    import torch
    from sbi.inference import NPE

    import fastmaf.torch

    warnings.simplefilter("ignore")
    theta, x = (torch.as_tensor(array, dtype=torch.float32) for array in (data.x, data.context))
    train, test = slice(0, 10_000), slice(10_000, None)

    def looped(estimator: Any) -> Any:
        trainer = NPE(density_estimator=estimator, show_progress_bars=False).append_simulations(theta[train], x[train])
        with contextlib.redirect_stdout(io.StringIO()):
            return trainer.train(training_batch_size=BATCH, max_num_epochs=epochs), trainer

    def fitted() -> Any:
        trainer = NPE(density_estimator=fastmaf.torch.sbi_maf(), show_progress_bars=False).append_simulations(theta[train], x[train])
        return fastmaf.torch.sbi_fit(trainer, batch_size=BATCH, max_epochs=epochs), trainer

    loops = {
        "sbi_fit": fitted,
        "sbi on sbi_maf": lambda: looped(fastmaf.torch.sbi_maf()),
        "sbi": lambda: looped("maf"),
    }
    nats: dict[str, list[float]] = {loop: [] for loop in loops}
    seconds: dict[str, list[float]] = {loop: [] for loop in loops}
    trained: dict[str, list[int]] = {loop: [] for loop in loops}
    for seed in range(seeds):
        for loop, call in loops.items():
            torch.manual_seed(seed)
            start = time.perf_counter()
            estimator, trainer = call()
            seconds[loop].append(time.perf_counter() - start)
            trained[loop].append(int(trainer.summary["epochs_trained"][-1]))
            with torch.no_grad():
                nats[loop].append(float(estimator.log_prob(theta[test], condition=x[test]).mean()))
    for loop in loops:
        line.contenders[loop] = {"seconds": summary(seconds[loop]), "nats": nats[loop], "epochs": trained[loop]}
        line.values[f"nats of {loop}"] = float(np.mean(nats[loop]))
        above = np.subtract(nats[loop], nats["sbi"])
        if loop != "sbi":
            line.values[f"{loop} above sbi"] = float(above.mean())
            if seeds > 1:
                line.values[f"standard error of {loop} above sbi"] = float(above.std(ddof=1) / seeds**0.5)
