"""What each rank of test_ranks.py runs: fit_in_ranks.py SCENARIO FOLDER. Rank 0 writes what came of it into the folder."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys
import time
import warnings

import numpy as np
from mpi4py import MPI

import fastmaf
from fastmaf.train import ranks_of
from fastmaf.train.checkpoint import Store

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.rank, COMM.size
FOLDER = pathlib.Path(sys.argv[2])
DATA = np.load(FOLDER / "data.npz")
DEVICE = os.environ.get("DEVICE_OF_RANKS", "cpu")
OPTIONS = {"batch_size": 64, "max_epochs": 4, "seed": 3, "lr": 5e-3, "progress": False, "comm": COMM}
OPTIONS["device"] = f"cuda:{RANK % len(fastmaf._core.device_state()['gpus'])}" if DEVICE == "cuda" else DEVICE


def flow(seed=0, **options):
    """Of another seed on each rank: that of rank 0 is fitted."""
    return fastmaf.MAF(3, 2, hidden_features=(9, 8), dtype="float64", seed=seed + RANK, **options)


def shares(rows, size):
    """What each rank has: not the same number."""
    return np.split(rows, [len(rows) * k * (k + 1) // (size * (size + 1)) for k in range(1, size)])


def share(name):
    """Rows of this rank."""
    return shares(DATA[name], SIZE)[RANK]


def said(act):
    """What an act ends with, as words of each rank."""
    try:
        result = act()
        if isinstance(result, list) and isinstance(result[0], fastmaf.History):
            result = [fitted.stopped for fitted in result]
        result = getattr(result, "stopped", result)
    except BaseException as error:
        result = f"{type(error).__name__}: {error}"
    return COMM.gather(result)


def told(fitted, history):
    """What must be the same everywhere."""
    return {
        "parameters": fitted.parameters().tolist(),
        "train": history.train,
        "validation": history.validation,
        "start": history.start,
        "best_epoch": history.best_epoch,
        "stopped": history.stopped,
        "rows": [fitted.training[name] for name in ("rows", "validation_rows")],
    }


def results(made):
    """Of all ranks; all must be one."""
    everyones = COMM.gather(made)
    assert RANK or all(other == everyones[0] for other in everyones)
    return made


def fits():
    """Fits in shares and of rows that all have, as one process does them too."""
    found = {}
    for kind, take in (("share", share), ("same", DATA.__getitem__)):
        x, context, weights = take("x"), take("context"), take("weights")
        own = flow()
        found[f"{kind}, weighted"] = results(told(own, own.fit(x, context, weights, clip_norm=1.0, l2=1e-4, **OPTIONS)))
        own = flow()
        given = take("x")[: len(x) // 2], take("context")[: len(x) // 2]
        history = own.fit(x, context, validation=given, standardize="full", schedule="cosine", **OPTIONS)
        found[f"{kind}, whitened"] = results(told(own, history))
        own = flow()
        history = own.fit(lambda epoch, x=x: x * (1 + 1e-3 * epoch), context, validation=0, **OPTIONS)
        found[f"{kind}, drawn"] = results(told(own, history))
        made = fastmaf.MADE(3, context_features=2, hidden_features=(9,), masks=3, conditional="mixture", dtype="float64", seed=5)
        found[f"{kind}, masks"] = results(told(made, made.fit(x, context, weights, **OPTIONS)))
        several = fastmaf.Ensemble(flow(), members=2, seed=RANK)
        histories = several.fit(x, context, **OPTIONS)
        found[f"{kind}, members"] = results([told(several.member(k), history) for k, history in enumerate(histories)])
    return found


def faults():
    """What goes wrong on one rank ends the fit on all, soon."""
    x, context = share("x").copy(), share("context")
    last = SIZE - 1
    began = time.monotonic()
    found, trained = {}, []

    def fit(**options):
        own = flow()
        before = own.parameters()
        try:
            return own.fit(options.pop("x", x), context, **{**OPTIONS, **options}).stopped
        finally:
            trained.append(not np.array_equal(own.parameters(), before))

    wrong = x.copy()
    wrong[5, 1] = np.nan if last == RANK else wrong[5, 1]
    found["data"] = said(lambda: fit(x=wrong))
    found["setting"] = said(lambda: fit(batch_size=64 + (last == RANK)))
    found["seed"] = said(lambda: fit(seed=RANK))
    found["norms"] = said(lambda: fastmaf.MAF(3, 2, batch_norm=True).fit(x, context, **OPTIONS))
    found["no communicator"] = said(lambda: fit(comm="world"))

    def fails(epoch):
        if last == RANK and epoch["epoch"] == 2:
            raise OSError("full")

    found["callback"] = said(lambda: fit(callback=fails))
    found["kept"] = said(lambda: trained[-1])
    found["stop"] = said(lambda: fit(callback=(lambda epoch: epoch["epoch"] == 2) if last == RANK else None, max_epochs=10))

    def interrupts(epoch):
        if last == RANK and epoch["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    if last == RANK:  # a handler of somebody's, which raises
        signal.signal(signal.SIGINT, lambda number, frame: signal.default_int_handler(number, frame))
    handler = signal.getsignal(signal.SIGINT)
    found["interrupted"] = said(lambda: fit(callback=interrupts, max_epochs=2000, on_interrupt="return"))
    several = type(ranks_of(COMM))
    wait = several._wait

    def interrupted_there(ranks, request, *arrays):
        if last == RANK and arrays and arrays[0].size > 100 and arrays[0].dtype == np.float64:  # between two that belong together
            os.kill(os.getpid(), signal.SIGINT)
        wait(ranks, request, *arrays)

    several._wait = interrupted_there
    own = flow()
    long = {**OPTIONS, "max_epochs": 2000, "validation": 0, "on_interrupt": "return"}
    found["interrupted in a sum"] = said(lambda: own.fit(x, context, **long))
    found["in the same step"] = said(lambda: own.parameters().tolist())
    several._wait = wait
    found["interrupted, raised"] = said(lambda: fit(callback=interrupts, max_epochs=2000))
    found["kept then"] = said(lambda: trained[-1])
    found["handler"] = said(lambda: signal.getsignal(signal.SIGINT) is handler)
    own, flows = flow(), fastmaf.Ensemble(flow(), members=3, seed=0)
    before = flows.member(2).parameters()
    options = {**OPTIONS, "max_epochs": 2000}
    found["members interrupted"] = said(lambda: flows.fit(x, context, callback=interrupts, on_interrupt="return", **options))
    found["members fail"] = said(lambda: fastmaf.Ensemble(flow(), members=3).fit(x, context, callback=fails, **OPTIONS))
    found["members"] = said(lambda: fastmaf.Ensemble(flow(), members=2 + (last == RANK)).fit(x, context, **OPTIONS))
    found["untouched"] = said(lambda: np.array_equal(flows.member(2).parameters(), before))
    found["interrupt"] = said(lambda: fit(on_interrupt="raise" if RANK else "return"))
    found["dtype"] = said(lambda: fit(x=x.astype("f4") if last == RANK else x))
    backend = fastmaf.get_backend()
    fastmaf.set_backend("reference" if last == RANK else backend)
    found["backend"] = said(fit)
    fastmaf.set_backend(backend)
    found["weights"] = said(lambda: own.fit(x, context, np.zeros(len(x)) if last == RANK else None, **OPTIONS))
    empty = np.zeros(len(x)) if last == RANK else np.ones(len(x))
    found["no rows"] = said(lambda: own.fit(x, context, empty, **OPTIONS))
    found["file"] = said(lambda: fit(checkpoint=FOLDER / "none" / "c"))
    Store.save, save = (lambda store, best, *_: best.training["epochs"] < 4 or 1 / 0), Store.save  # behind the last epoch
    own = flow()
    before = own.parameters()
    found["disk"] = said(lambda: own.fit(x, context, validation=0, checkpoint=FOLDER / "full", checkpoint_every=1e9, **OPTIONS))
    Store.save = save
    found["kept on the full disk"] = said(lambda: not np.array_equal(own.parameters(), before))
    total, own = several.total, flow()

    def astray(ranks, gradient, loss):
        total(ranks, gradient, loss)
        gradient += 1e-3 * (last == RANK)

    several.total = astray
    found["astray"] = said(lambda: own.fit(x, context, **OPTIONS))
    several.total = total
    found["no time"] = said(lambda: fit(max_seconds=1e-9))
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        constant = context.copy()
        constant[:, 0] = 1e6 + RANK
        flow().fit((x * [1, 0.03, 1e3]).astype(np.float32) + np.float32(1e6), constant, **OPTIONS)
        flow().fit(x, context, share("few"), **OPTIONS)
        apart = x.copy()  # rows in some order, so that a column hardly varies on each rank
        apart[:, 2] = 1000.0 * RANK + context[:, 0]
        flow().fit(apart, context, **OPTIONS)
    found["warnings"] = COMM.gather([str(note.message) for note in notes])
    found["seconds"] = time.monotonic() - began
    return found


def killed():
    """The last rank dies in the second epoch."""

    def dies(epoch):
        if SIZE - 1 == RANK and epoch["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    own, began = flow(), time.monotonic()
    try:
        own.fit(share("x"), share("context"), checkpoint=FOLDER / "fit.safetensors", callback=dies, **OPTIONS)
    except RuntimeError as error:
        (FOLDER / f"killed{RANK}.json").write_text(json.dumps([str(error), time.monotonic() - began]), encoding="utf-8")
    os._exit(0)  # MPI would wait for the dead


def begun():
    """Two epochs over rows that all ranks hold, for one process to go on with."""
    own = flow()
    options = {**OPTIONS, "max_epochs": 2}
    return told(own, own.fit(DATA["x"], DATA["context"], DATA["weights"], checkpoint=FOLDER / "begun.safetensors", **options))


def resumed():
    """A fit in two parts, and in one; another fit may not go on with its file."""
    x, context, path = share("x"), share("context"), FOLDER / "fit.safetensors"
    own, whole = flow(), flow()
    history = own.fit(x, context, checkpoint=path if RANK == 0 else None, resume=RANK == 0, **OPTIONS)
    found = {"resumed": results(told(own, history)), "whole": results(told(whole, whole.fit(x, context, **OPTIONS)))}
    found["other"] = said(lambda: flow().fit(x[::-1], context, checkpoint=path, resume=True, **OPTIONS).stopped)
    return found


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in conftest.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.filterwarnings("ignore", "ranks of one machine", fastmaf.FitWarning)
    found = globals()[sys.argv[1]]()
    if RANK == 0:
        (FOLDER / f"{sys.argv[1]}.json").write_text(json.dumps(found), encoding="utf-8")
