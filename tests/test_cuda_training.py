"""Fits on a GPU: they end where those of the CPU end, in the same bits every time, with every option.

Where the package was built with ``FASTMAF_CUDA=HOST`` the host stands in for a GPU.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from test_cuda import Framework, absent, needs_device
from test_train import BENT, BITS, MIXED, at, interrupt

import fastmaf
from fastmaf.train import FitWarning

pytestmark = needs_device

ROWS = 400
CONTEXT = np.random.default_rng(5).normal(size=(ROWS, 2))
WEIGHTS = np.random.default_rng(6).uniform(0.2, 2, ROWS)

MODELS = {
    "maf": (BENT, functools.partial(fastmaf.MAF, 3, transforms=3, hidden_features=(20, 20))),
    "bernoulli": (BITS, functools.partial(fastmaf.MADE, 5, "bernoulli", hidden_features=(12,))),
    "mixed": (MIXED, functools.partial(fastmaf.MADE, 3, "mixed", categories=(3, None, 2), hidden_features=(12,), components=2)),
    "mixture": (BENT, functools.partial(fastmaf.MADE, 3, "mixture", hidden_features=(12,), components=3)),
    "residual": (BENT, functools.partial(fastmaf.MAF, 3, transforms=2, hidden_features=(12, 12), residual=True, linear=True)),
    "batch norm": (BENT, functools.partial(fastmaf.MAF, 3, transforms=3, hidden_features=(12,), batch_norm=True)),
    "act-norm": (BENT, functools.partial(fastmaf.MAF, 3, transforms=2, hidden_features=(12,), batch_norm="act")),
    "context": (BENT, functools.partial(fastmaf.MAF, 3, context_features=2, transforms=2, hidden_features=(12,), activation="tanh")),
    "bounds": (np.exp(BENT), functools.partial(fastmaf.MAF, 3, transforms=2, hidden_features=(12,), bounds=[(0, None)] * 3)),
}

LENGTHS = {
    "one step": {"batch_size": ROWS, "max_epochs": 1},
    "ten steps": {"batch_size": 40, "max_epochs": 1},
    "five epochs": {"batch_size": 90, "max_epochs": 5},
}


@pytest.fixture(params=["torch", "cupy", "pretended"])
def framework(request, monkeypatch):
    if absent is not None:
        pytest.skip(f"cuda: {absent}")
    return Framework(request.param, monkeypatch)


def made(name, dtype="float32"):
    rows, model = MODELS[name]
    flow = model(dtype=dtype, seed=1)
    return flow, rows[:ROWS], CONTEXT if flow.context_features else None


def fitted(name, device, dtype="float32", shaken=False, **options):
    """A flow, its history, and its weights; from weights that are changed in their last digits, if it is `shaken`."""
    flow, x, context = made(name, dtype)
    if shaken:
        start = flow.parameters()
        noise = np.random.default_rng(0).choice([-1, 1], start.size) * np.finfo(dtype).eps
        flow = flow.with_parameters((start * (1 + noise)).astype(dtype))
    options = {"validation": 0, "weights": WEIGHTS, "lr": 1e-2, "seed": 2, **options}
    history = flow.fit(x, context, device=device, **options)
    return flow, history, flow.parameters()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", MODELS)
def test_ends_where_the_cpu_ends(name, length, dtype):
    """As near as two fits of the CPU whose first weights differ in their last digits are to each other, but for a factor.

    With batch norm some gradients are zero but for rounding, which Adam follows.
    """
    options = {**LENGTHS[length], "l2": 1e-3, "weight_decay": 0.01, "clip_norm": 5.0}
    _, history, expected = fitted(name, "cpu", dtype, **options)
    _, shaken, other = fitted(name, "cpu", dtype, shaken=True, **options)
    condition, of_history = np.abs(other - expected).max(), np.abs(np.subtract(shaken.train, history.train)).max()
    flow, there, result = fitted(name, "cuda", dtype, **options)
    assert flow.device == "cpu" and result.dtype == dtype
    assert np.abs(result - expected).max() <= 10 * condition + 10 * np.finfo(dtype).eps
    assert np.abs(np.subtract(there.train, history.train)).max() <= 10 * of_history + (1e-5 if dtype == "float32" else 1e-12)
    assert (there.lr, there.stopped, there.best_epoch) == (history.lr, history.stopped, history.best_epoch)
    assert not np.array_equal(result, made(name, dtype)[0].parameters())


@pytest.mark.parametrize("name", ["maf", "residual", "batch norm"])
def test_same_bits_every_time(name):
    first, again = (fitted(name, "cuda:0", batch_size=90, max_epochs=3, validation=0.2) for _ in range(2))
    assert np.array_equal(first[2], again[2]) and first[1].train == again[1].train and first[1].validation == again[1].validation


@pytest.mark.parametrize("name", ["maf", "context", "bernoulli", "batch norm"])
@pytest.mark.parametrize("weights", [WEIGHTS, None])
def test_rows_too_many_for_the_device_come_from_the_host(name, weights, monkeypatch):
    """To the same bits, in whatever order they lie on the host."""
    options = {"batch_size": 45, "max_epochs": 3, "validation": 0.2, "weights": weights}
    there = fitted(name, "cuda", **options)
    monkeypatch.setattr(fastmaf.backends.cuda, "RESIDENT", 0)
    streamed = fitted(name, "cuda", **options)
    assert np.array_equal(streamed[2], there[2]) and streamed[1].train == there[1].train
    flow, x, context = made(name)
    columns = np.asfortranarray(x), None if context is None else np.asfortranarray(context)
    flow.fit(*columns, weights=weights, lr=1e-2, seed=2, device="cuda", batch_size=45, max_epochs=3, validation=0.2)
    assert np.array_equal(flow.parameters(), there[2])


OPTIONS = {
    "validation rows": {"validation": 0.25},
    "rows of their own to validate on": {"validation": (BENT[500:], np.ones((300, 2)), np.arange(300.0))},
    "a schedule": {"schedule": "cosine"},
    "a callable schedule": {"schedule": lambda epochs: 1 / (1 + epochs)},
    "patience": {"validation": 0.25, "patience": 2, "lr": 0.05, "max_epochs": 30},
    "no weights": {"weights": None},
    "no standardisation": {"standardize": False},
    "a Linear in front": {"standardize": "full"},
    "a callback that stops": {"callback": lambda epoch: epoch["epoch"] == 2},
    "Ctrl-C": {"callback": at(2, interrupt), "on_interrupt": "return"},
    "one batch": {"batch_size": 10_000},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_mean_what_they_mean_on_the_cpu(name):
    options = {"max_epochs": 4, "batch_size": 60, **OPTIONS[name]}
    runs = []
    for device in ("cpu", "cuda"):
        runs.append(fitted("context", device, "float64", **options))
    (_, history, expected), (_, there, result) = runs
    assert np.allclose(result, expected, rtol=1e-7, atol=1e-9)
    assert (there.stopped, there.best_epoch, there.lr) == (history.stopped, history.best_epoch, history.lr)
    assert there.train == pytest.approx(history.train, rel=1e-9) and there.validation == pytest.approx(history.validation, rel=1e-9)


def test_a_loss_that_is_not_finite_is_named():
    options = {"schedule": lambda epochs: 1.0 if epochs < 2 + 3 / 9 else 1e200, "batch_size": 50, "max_epochs": 9}
    for device in ("cpu", "cuda"):
        with pytest.warns(FitWarning, match="loss not finite in epoch 3, batch 5 of 8: the best weights so far are kept"):
            flow, history, result = fitted("maf", device, **options)
        assert history.stopped == "loss not finite in epoch 3, batch 5 of 8" and len(history.train) == 2
        assert np.array_equal(result, fitted("maf", device, batch_size=50, max_epochs=2)[2])


def test_auto_is_where_the_flow_is(monkeypatch):
    from fastmaf.backends import cuda

    x, places, engine = BENT[:ROWS], [], cuda._Engine
    monkeypatch.setattr(cuda, "_Engine", lambda flow, device, **options: places.append(device) or engine(flow, device, **options))
    flow = fastmaf.MAF(3, transforms=1, hidden_features=(8,), seed=1)
    there, elsewhere = flow.to("cuda", "highest"), flow.to("cuda")
    there.fit(x, max_epochs=2, seed=1)
    flow.fit(x, max_epochs=2, seed=1, device="cuda:1")
    elsewhere.fit(x, max_epochs=2, seed=1, device="cpu")
    assert (there.device, there.precision, flow.device, elsewhere.device) == ("cuda:0", "highest", "cpu", "cuda:0")
    assert places == [0, 1] and np.array_equal(there.parameters(), flow.parameters())
    assert np.allclose(flow.parameters(), elsewhere.parameters(), atol=1e-4)
    seen = []
    there.fit(x, max_epochs=3, seed=1, callback=lambda epoch: seen.append((epoch["flow"].device, epoch["flow"].log_prob(x).mean())))
    assert {device for device, _ in seen} == {"cuda:0"} and seen[-1][1] > seen[0][1]


@pytest.mark.parametrize("name", ["maf", "mixture", "residual", "batch norm"])
@pytest.mark.parametrize("first, second", [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_a_checkpoint_goes_on_anywhere(name, first, second, tmp_path):
    """To the same bits on one device, to the same numbers on another one."""
    options = {"batch_size": 90, "max_epochs": 4, "validation": 0.2, "schedule": "cosine"}
    whole, history, expected = fitted(name, second, **options)
    stopped = at(2, interrupt)
    fitted(name, first, **options, checkpoint=tmp_path / "c", callback=stopped, on_interrupt="return")
    _, resumed, result = fitted(name, second, **options, checkpoint=tmp_path / "c", resume=True)
    assert len(resumed.train) == 4 and resumed.stopped == history.stopped
    if first == second:
        assert np.array_equal(result, expected) and (resumed.train, resumed.validation) == (history.train, history.validation)
    else:
        assert resumed.train == pytest.approx(history.train, abs=1e-4)
        assert name == "batch norm" or np.allclose(result, expected, atol=2e-3)  # see test_ends_where_the_cpu_ends


def test_arrays_of_the_device(framework):
    """They give the bits of the same arrays of the host."""
    x, options = BENT[:ROWS], {"max_epochs": 2, "batch_size": 90, "seed": 1}
    own = BENT[500:], CONTEXT[:300].astype("float32"), np.arange(300)
    results = []
    for put in (lambda array: array, framework.put):
        flow = fastmaf.MAF(3, context_features=2, transforms=1, hidden_features=(8,), seed=1).to("cuda")
        given = tuple(map(put, own))
        history = flow.fit(put(x), put(CONTEXT), put(WEIGHTS), validation=given, **options)
        flow.fit(lambda epoch, put=put: put(x + 0.01 * epoch), put(CONTEXT), validation=given[:2], **options)
        results.append((flow.parameters(), history.validation))
    assert np.array_equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    turned, straight = fastmaf.MAF(3, seed=1, transforms=1).to("cuda"), fastmaf.MAF(3, seed=1, transforms=1).to("cuda")
    turned.fit(framework.put(x)[::-1, ::-1] if framework.name != "pretended" else type(framework.put(x))(x[::-1, ::-1]), **options)
    straight.fit(x[::-1, ::-1], **options)
    assert np.array_equal(turned.parameters(), straight.parameters())
    with pytest.raises(ValueError, match="x is a CUDA array; this flow computes on the CPU"):
        flow.fit(framework.put(x), CONTEXT, device="cpu")
    with pytest.raises(ValueError, match="x has nan in row 3, column 1; it must be finite"):
        flow.fit(framework.put(np.where(np.arange(3 * ROWS).reshape(-1, 3) == 10, np.nan, x)), CONTEXT)


@pytest.mark.parametrize("resample", [False, True])
@pytest.mark.parametrize("conditional", ["bernoulli", "mixture"])
def test_ensembles_end_where_those_of_the_cpu_end(conditional, resample, tmp_path):
    x = BITS[:ROWS] if conditional == "bernoulli" else BENT[:ROWS]
    options = {"max_epochs": 3, "batch_size": 90, "lr": 1e-2, "seed": 2, "resample": resample, "clip_norm": 1.0, "weight_decay": 0.1}

    def fit(device, **more):
        ensemble = fastmaf.MADE(x.shape[1], conditional, hidden_features=(12,), masks=4, seed=1, dtype="float64")
        return ensemble, ensemble.fit(x, device=device, **{**options, **more})

    (here, history), (there, other) = fit("cpu"), fit("cuda")
    assert there.device == "cpu" and np.allclose(there.parameters(), here.parameters(), rtol=1e-8, atol=1e-10)
    assert other.train == pytest.approx(history.train, rel=1e-9) and other.validation == pytest.approx(history.validation, rel=1e-9)
    assert np.allclose(there.log_prob(x), here.log_prob(x), rtol=1e-8)
    fit("cuda", max_epochs=2, checkpoint=tmp_path / "c")
    assert np.array_equal(fit("cuda", checkpoint=tmp_path / "c", resume=True)[0].parameters(), there.parameters())


def test_ensembles_of_flows(framework):
    """Each member ends where it would end alone, of arrays of either side, and of callables that give them."""
    x, options = BENT[:ROWS], {"max_epochs": 2, "batch_size": 90, "seed": 1, "device": "cuda"}
    results = []
    for given in (x, framework.put(x), lambda epoch: framework.put(x)):
        ensemble = fastmaf.Ensemble(fastmaf.MAF(3, transforms=1, hidden_features=(8,), seed=1), members=2, seed=3)
        ensemble.fit(given, **options)
        results.append(ensemble.parameters())
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])
    alone = fastmaf.Ensemble(fastmaf.MAF(3, transforms=1, hidden_features=(8,), seed=1), members=2, seed=3).member(1)
    alone.fit(x, **{**options, "seed": ensemble.member(1).training["settings"]["seed"]})
    assert np.array_equal(alone.parameters(), ensemble.member(1).parameters())


def test_a_callable_may_use_one_array_again():
    results, buffer = [], np.empty((ROWS, 3))

    def again(epoch):
        buffer[:] = BENT[:ROWS] * (1 - epoch / 50)
        return buffer

    for x in (again, lambda epoch: BENT[:ROWS] * (1 - epoch / 50)):
        flow = fastmaf.MAF(3, transforms=1, hidden_features=(8,), seed=1)
        flow.fit(x, validation=0, max_epochs=3, seed=1, device="cuda")
        results.append(flow.parameters())
    assert np.array_equal(*results)
