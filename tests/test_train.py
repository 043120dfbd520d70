"""The training loop: what it reaches, what it refuses, and how it stops, goes on and comes back."""

from __future__ import annotations

import _thread
import functools
import inspect
import itertools
import json
import math
import re
import threading
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import make
import numpy as np
import pytest

import fastmaf
from fastmaf import backends, config
from fastmaf.backends import reference
from fastmaf.layers import Affine, Linear
from fastmaf.train import FitWarning, History, Members, shuffle
from fastmaf.train import fit as fit_flow

MEAN = np.array([3.0, -200.0])
COVARIANCE = np.array([[4.0, 9.0], [9.0, 25.0]])


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(7).multivariate_normal(MEAN, COVARIANCE, 2000)


def linear(features=2, **options):
    """A flow of one transform without hidden units: fast, and able to hold any Gaussian."""
    return fastmaf.MAF(features, transforms=1, hidden_features=(), **options)


def gaussian(x, mean=MEAN, covariance=COVARIANCE):
    y = np.linalg.solve(np.linalg.cholesky(covariance), (x - mean).T)
    return -0.5 * (y**2).sum(axis=0) - 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]


@pytest.fixture(autouse=True)
def same_seeds(monkeypatch):
    """Fits and flows that are given no seed have seed 0: what is compared here differs in other things."""
    monkeypatch.setattr("fastmaf._arrays.secrets.randbits", lambda bits: 0)


def same(a, b):
    """The same weights and Affines, bit for bit."""
    return a.layers == b.layers and a.context_layers == b.context_layers


def at(epoch, action):
    """A callback that acts after that epoch."""

    def callback(record):
        return action() if record["epoch"] == epoch else None

    return callback


def interrupt():
    raise KeyboardInterrupt


# What it reaches


def test_reaches_the_gaussian(x, backend, dtype):
    flow = linear(dtype=dtype)
    before = flow.log_prob(x).mean()
    history = flow.fit(x, lr=1e-2, schedule="cosine", max_epochs=40)
    held = np.random.default_rng(8).multivariate_normal(MEAN, COVARIANCE, 4000)
    assert flow.log_prob(held).mean() > before + 1
    assert flow.log_prob(held).mean() == pytest.approx(gaussian(held).mean(), abs=0.01)
    assert history.validation[history.best_epoch - 1] == max(history.validation) > history.validation[0]
    assert history.train[-1] == pytest.approx(flow.log_prob(x).mean(dtype=float), abs=0.02)


def test_hidden_units_and_context(backend):
    rng = np.random.default_rng(0)
    context = rng.normal([5.0], [100.0], (3000, 1))
    x = np.sin(context / 50) + 0.1 * rng.normal(size=(3000, 1))
    flow = fastmaf.MAF(1, 1, transforms=1, hidden_features=(32, 32))
    with pytest.warns(FitWarning, match='one Gaussian for each context; MADE.1, conditional="mixture". can have other shapes'):
        history = flow.fit(x, context, lr=5e-3, max_epochs=60)
    assert max(history.validation) > -0.5 * math.log(2 * math.pi * math.e * x.var()) + 0.8
    loc, scale = flow.context_layers[0].loc, flow.context_layers[0].scale
    assert loc == pytest.approx(context.mean(axis=0), abs=6) and 1 / scale == pytest.approx(context.std(axis=0), rel=0.05)


def test_best_weights_are_kept(x, backend):
    flow = linear(dtype="float64")
    kept = {}
    history = flow.fit(x, validation=(x[:500],), lr=0.3, max_epochs=25, callback=lambda record: kept.update({record["epoch"]: record}))
    assert 0 < history.best_epoch < 25, "a step size this large must not end at its best"
    assert flow.log_prob(x[:500]).mean() == pytest.approx(max(history.validation), rel=1e-12)
    assert [kept[e]["validation"] for e in sorted(kept)] == history.validation
    assert kept[25]["best_epoch"] == history.best_epoch


def test_start_is_kept_when_nothing_is_better(x):
    flow = linear()
    flow.fit(x, lr=1e-2, max_epochs=40)
    trained = flow.layers
    with pytest.warns(
        FitWarning, match="none of 3 epochs was better than the start on the validation rows: the weights are those of the start"
    ):
        history = flow.fit(x, lr=50.0, patience=3)
    assert (history.best_epoch, history.stopped, len(history.train)) == (0, "patience", 3)
    assert repr(history) == f"History(3 epochs, none better than the start: validation {history.start:.4f}, stopped: patience)"
    assert flow.layers == trained


def test_few_validation_rows_that_choose_an_epoch_are_said(x):
    flow = linear()
    with pytest.warns(FitWarning, match=r"^15 validation rows have chosen epoch \d+ of \d+, too few to tell: give more, or validation=0"):
        flow.fit(x[:150], lr=0.3, patience=3, seed=0)
    again = linear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.fit(x[:150], lr=1e-4, max_epochs=2, seed=0)  # the last epoch was the best: nothing was chosen
        again.fit(x[:250], lr=0.3, patience=3, seed=0)


def test_no_validation_keeps_the_last(x):
    flow = linear()
    history = flow.fit(x, validation=0, max_epochs=3)
    assert (history.best_epoch, history.validation, history.stopped) == (3, [], "max_epochs")
    assert flow.training["rows"] == 2000 and flow.training["validation"] is None


def test_continuing(x):
    flow = linear()
    flow.fit(x, max_epochs=5)
    affine, first = flow.layers[0], flow.training["validation"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        history = flow.fit(1.1 * x + 1, max_epochs=1, validation=(x,))
    assert flow.layers[0] == affine
    assert history.validation[0] > first - 1


def test_same_arguments_same_bits(x):
    flows = [linear(), linear()]
    histories = [flow.fit(x, max_epochs=3, seed=5) for flow in flows]
    assert same(*flows)
    assert histories[0].train == histories[1].train
    other = linear()
    other.fit(x, max_epochs=3, seed=6)
    assert not same(other, flows[0])


def test_same_bits_for_every_thread_count(x, backend):
    if not backend.startswith("cpu"):
        pytest.skip(f"{backend} has no threads of its own in training")
    flows = []
    for threads in (1, 2, 7):
        flows.append(fastmaf.MAF(2, transforms=2, hidden_features=(20,)))
        with fastmaf.num_threads(threads):
            flows[-1].fit(x, max_epochs=3)
    assert same(flows[0], flows[1]) and same(flows[0], flows[2])


def test_avx2_and_avx512_train_to_the_same_bits(x):
    if backends.reason("cpu") is not None or not {"avx2", "avx512"} <= set(config.available_isas()):
        pytest.skip("needs the compiled core on a CPU with avx512")
    flows, active, isa = [], backends.active, config.get_isa()
    fastmaf.set_backend("cpu")
    try:
        for name in ("avx2", "avx512"):
            fastmaf.set_isa(name)
            flows.append(fastmaf.MAF(2, transforms=2, hidden_features=(20,)))
            flows[-1].fit(x, max_epochs=3)
    finally:
        fastmaf.set_isa(isa)
        backends.active = active
    assert same(*flows)


# The data


def test_standardisation():
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.uniform(2, 5, 4000), 1e6 + rng.normal(size=4000), rng.exponential(size=4000)])
    weights = rng.integers(0, 3, 4000).astype(float)
    flow = linear(3, bounds=[(2, 5), None, (0, None)])
    with pytest.warns(FitWarning, match="float32 cannot resolve column 1 of x, far from 0 for the spread: subtract an offset"):
        flow.fit(x, weights=weights, validation=0, max_epochs=1)
    y = np.column_stack([np.log((x[:, 0] - 2) / (5 - x[:, 0])), x[:, 1], np.log(x[:, 2])])
    mean = np.average(y, axis=0, weights=weights)
    deviation = np.sqrt(np.average((y - mean) ** 2, axis=0, weights=weights))
    affine = flow.layers[1]
    assert isinstance(affine, Affine)
    np.testing.assert_allclose(affine.loc, mean, rtol=1e-11)
    np.testing.assert_allclose(1 / affine.scale, deviation, rtol=1e-9)

    plain = linear()
    plain.fit(x[:, [0, 2]], standardize=False, max_epochs=1)
    assert plain.layers[0] == Affine(np.zeros(2), np.ones(2))


def test_standardisation_in_blocks(x, monkeypatch):
    whole, parts = linear(), linear()
    whole.fit(x, max_epochs=1)
    monkeypatch.setattr("fastmaf.train.data.BLOCK", 74)
    parts.fit(x, max_epochs=1)
    np.testing.assert_allclose(parts.layers[0].loc, whole.layers[0].loc, rtol=1e-13)
    np.testing.assert_allclose(parts.layers[0].scale, whole.layers[0].scale, rtol=1e-13)


def test_weights_equal_repeated_rows(x, backend):
    weights = np.random.default_rng(1).integers(0, 4, len(x))
    options = {"validation": (x[:100], None, 1 + weights[:100]), "batch_size": 10_000, "max_epochs": 4, "lr": 1e-2}
    weighted, repeated = linear(dtype="float64"), linear(dtype="float64")
    a = weighted.fit(x, weights=weights, **options)
    b = repeated.fit(np.repeat(x, weights, axis=0), **options)
    np.testing.assert_allclose(a.train, b.train, rtol=1e-12)
    np.testing.assert_allclose(a.validation, b.validation, rtol=1e-9)
    np.testing.assert_allclose(weighted.parameters(), repeated.parameters(), rtol=1e-9)


def test_weights_have_no_scale(x):
    flows = [linear(dtype="float64"), linear(dtype="float64")]
    weights = np.random.default_rng(1).uniform(size=len(x))
    a, b = (flow.fit(x, weights=factor * weights, max_epochs=3) for flow, factor in zip(flows, (1, 1024), strict=True))
    assert a.train == b.train and a.validation == b.validation and same(*flows)


def test_validation_fraction(x):
    fraction, given = linear(), linear()
    order = shuffle(3, 4, 0, len(x))
    held = np.sort(order[:400])
    a = fraction.fit(x, validation=0.2, max_epochs=3, seed=3)
    b = given.fit(np.delete(x, held, axis=0), validation=(x[held],), max_epochs=3, seed=3)
    assert same(fraction, given)
    assert a.train == b.train and a.validation == b.validation
    assert fraction.training["validation_rows"] == 400 and fraction.training["rows"] == 1600


def test_validation_tuple_is_weighted(x):
    context = np.random.default_rng(0).normal(size=(2000, 3))
    weights = np.random.default_rng(1).uniform(size=2000)
    flow = linear(2, context_features=3, dtype="float64")
    history = flow.fit(x[:1000], context[:1000], validation=(x[1000:], context[1000:], weights[1000:]), max_epochs=2)
    expected = np.average(flow.log_prob(x[1000:], context[1000:]), weights=weights[1000:])
    assert history.validation[history.best_epoch - 1] == pytest.approx(expected, rel=1e-12)


def test_memmap_and_layouts(x, tmp_path):
    x = x.astype(np.float32)
    path = tmp_path / "x.npy"
    np.save(path, x)
    flows = []
    for data in (x, np.load(path, mmap_mode="r"), np.asfortranarray(x), np.column_stack([x, x])[:, :2]):
        flows.append(linear())
        flows[-1].fit(data, max_epochs=2)
    assert all(same(flows[0], flow) for flow in flows[1:])


def test_callable_x(x):
    epochs = []

    def draw(epoch):
        epochs.append(epoch)
        return np.floor(x) + np.random.default_rng(epoch).uniform(size=x.shape)

    flow, fixed = linear(dtype="float64"), linear(dtype="float64")
    history = flow.fit(draw, max_epochs=3)
    assert epochs == [0, 1, 2, 3]
    held = np.sort(shuffle(0, 4, 0, len(x))[:200])
    assert max(history.validation) == pytest.approx(flow.log_prob(draw(0)[held]).mean(), rel=1e-12)
    fixed.fit(draw(0), max_epochs=3)
    assert fixed.layers[0] == flow.layers[0] and fixed.layers[1] != flow.layers[1]


@pytest.mark.parametrize(
    ("fresh", "message"),
    [
        (lambda x: x[:-1], r"x\(2\) has shape \(1999, 2\); x\(0\) has shape \(2000, 2\)"),
        (lambda x: np.where(np.arange(2000)[:, None] == 17, np.nan, x), r"x\(2\) has nan in row 17, column 0"),
    ],
)
def test_callable_x_is_judged(x, fresh, message):
    flow, reference = linear(), linear()
    with pytest.raises(ValueError, match=message):
        flow.fit(lambda epoch: fresh(x) if epoch == 2 else x, max_epochs=3)
    reference.fit(x, max_epochs=1)
    assert same(flow, reference) and flow.training["stopped"] == "ValueError after 1 epochs"
    layers = reference.layers
    with pytest.raises(ValueError, match=message.replace("2\\)", "1\\)", 1)):
        reference.fit(lambda epoch: fresh(x) if epoch else x, max_epochs=3)
    assert reference.layers == layers, "nothing was learned"


# What it refuses


def put(x, row, column, value):
    x = x.copy()
    x[row, column] = value
    return x


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda x: x[:, :1], {}, r"x has shape \(2000, 1\); the flow has 2 features"),
        (lambda x: x[0], {}, r"x has shape \(2,\)"),
        (lambda x: x.astype(complex), {}, "x has dtype complex128"),
        (lambda x: x[:0], {}, "x has no rows"),
        (lambda x: x[:4], {}, "validation is 0.1 of 4 rows, which leaves no row to validate on; give more rows, .* or validation=0"),
        (lambda x: x[:4], {"validation": 0.9}, "validation is 0.9 of 4 rows, which leaves no row to train on"),
        (lambda x: x, {"validation": 1.0}, "validation is 1.0; it must be a fraction below 1, rows x, or a tuple"),
        (lambda x: x, {"validation": 100}, "validation is 100; it must be a fraction below 1"),
        (lambda x: x, {"validation": True}, "validation is True; it must be a fraction below 1"),
        (lambda x: x, {"validation": None}, "validation is None; it must be a fraction below 1"),
        (lambda x: x, {"validation": [x[:9] for x in [np.zeros((9, 2))]]}, r"validation x has shape \(1, 9, 2\); the flow has 2 features"),
        (lambda x: x, {"validation": np.zeros(9)}, r"validation x has shape \(9,\); it must be \(n, 2\), one row for each of n samples"),
        (
            lambda x: x,
            {"context": np.zeros((2000, 0))},
            "context has shape .2000, 0., but the flow has no context features; leave context out",
        ),
        (lambda x: put(x, 1234, 1, np.nan), {}, "x has nan in row 1234, column 1; it must be finite"),
        (lambda x: put(x, 1999, 0, -np.inf), {}, "x has -inf in row 1999, column 0"),
        (lambda x: put(x, slice(None), 1, 0.1), {}, "x is constant in column 1: 0.1"),
        (lambda x: x, {"context": np.zeros((2000, 1))}, r"context has shape \(2000, 1\); the flow has 0 context features"),
        (lambda x: x, {"weights": np.ones(3)}, "weights has 3 rows; x has 2000"),
        (lambda x: x, {"weights": np.ones((2000, 1))}, r"weights has shape \(2000, 1\)"),
        (lambda x: x, {"weights": -np.arange(2000.0)}, "weights has -1.0 in row 1"),
        (lambda x: x, {"weights": np.full(2000, np.inf)}, "weights has inf in row 0"),
        (
            lambda x: x,
            {"weights": np.zeros(2000)},
            "weights are all zero: no row is left; leave weights out, or give some rows a positive one",
        ),
        (lambda x: x, {"validation": (np.zeros((5, 3)),)}, r"validation x has shape \(5, 3\)"),
        (
            lambda x: x,
            {"validation": (np.full((5, 2), np.nan),)},
            r"validation x has nan in row 0, column 0; it must be finite \(column 1 too\)",
        ),
        (lambda x: x, {"validation": (np.zeros((0, 2)),)}, "validation x has no rows"),
        (lambda x: x, {"validation": (np.zeros((5, 2)), None, np.zeros(5))}, "validation weights are all zero: no row is left"),
        (lambda x: x, {"validation": ()}, "validation is a tuple of length 0; it must be a fraction below 1"),
        (lambda x: x, {"checkpoint": 3}, "checkpoint is 3; it must be a path"),
        (lambda x: x, {"checkpoint": "/no/such/folder/c"}, "checkpoint: the folder '/no/such/folder' does not exist"),
        (lambda x: x, {"checkpoint": Path(__file__).parent}, "checkpoint '.*tests' is a folder; name a file in it"),
        (lambda x: x, {"checkpoint_every": True}, "checkpoint_every is True; it must be an integer"),
        (lambda x: x, {"checkpoint_every": 0}, "checkpoint_every is 0"),
        (lambda x: x, {"checkpoint_every": math.nan}, "checkpoint_every is nan"),
        (lambda x: x, {"on_interrupt": "stop"}, "on_interrupt is 'stop'"),
        (lambda x: x, {"standardize": "twice"}, "standardize is 'twice'; it must be True, False, 'again' or 'full'"),
        (lambda x: x, {"validation": "some"}, "validation is 'some'"),
        (lambda x: x, {"validation": -0.1}, "validation is -0.1"),
        (lambda x: x, {"batch_size": 0}, "batch_size is 0"),
        (lambda x: x, {"batch_size": 2.5}, "batch_size is 2.5"),
        (lambda x: x, {"optimizer": "sgd"}, "optimizer is 'sgd'"),
        (lambda x: x, {"schedule": "steps"}, "schedule is 'steps'"),
        (lambda x: x, {"schedule": lambda epochs: -epochs}, r"schedule\(0.125\) makes the learning rate -"),
        (lambda x: x, {"schedule": lambda epochs: "slow"}, r"schedule\(0.0\) is 'slow'; it must be a number"),
        (lambda x: x, {"schedule": lambda epochs: np.ones(3)}, r"schedule\(0.0\) is an array of shape \(3,\)"),
        (lambda x: x, {"lr": 0}, "lr is 0"),
        (lambda x: x, {"lr": True}, "lr is True; it must be a positive number"),
        (lambda x: x, {"lr": "1e-3"}, "lr is '1e-3'; it must be a positive number"),
        (lambda x: x, {"max_epochs": True}, "max_epochs is True; it must be an integer"),
        (lambda x: x, {"lr": math.nan}, "lr is nan"),
        (lambda x: x, {"l2": -1}, "l2 is -1"),
        (lambda x: x, {"weight_decay": math.inf}, "weight_decay is inf"),
        (lambda x: x, {"clip_norm": 0}, "clip_norm is 0"),
        (lambda x: x, {"patience": 0}, "patience is 0"),
        (lambda x: x, {"max_epochs": 0}, "max_epochs is 0"),
        (lambda x: x, {"max_seconds": 0}, "max_seconds is 0"),
        (lambda x: x, {"seed": -1}, "seed is -1"),
        (lambda x: x, {"device": "tpu"}, "device is 'tpu'"),
        (lambda x: x, {"resume": True}, "resume is True, but no checkpoint is named"),
    ],
)
def test_refusals_leave_the_flow_as_it_was(x, change, options, message):
    flow = linear()
    layers = flow.layers
    with pytest.raises(ValueError, match=message):
        flow.fit(change(x), **options)
    assert flow.layers == layers and "epochs" not in flow.training


@pytest.mark.parametrize(("value", "bound"), [(1.0, "1"), (-1.0, "-1"), (7.0, "1")])
def test_refuses_data_on_or_outside_a_bound(value, bound):
    x = np.random.default_rng(0).uniform(-0.5, 0.5, (50, 2))
    flow = linear(bounds=[None, (-1, 1)])
    with pytest.raises(ValueError, match=f"x has {value} in row 31, column 1; it must lie strictly between -1.0 and 1.0"):
        flow.fit(put(x, 31, 1, value))
    with pytest.raises(ValueError, match=f"validation x has {value} in row 3, column 1"):
        flow.fit(x, validation=(put(x, 3, 1, value),))


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, "context is missing; the flow has 2 context features"),
        (np.zeros((2000, 3)), r"context has shape \(2000, 3\); the flow has 2 context features"),
        (np.zeros(2), r"context has shape \(2,\)"),
        (np.arange(3998.0).reshape(1999, 2), "context has 1999 rows; x has 2000"),
        (put(np.arange(4000.0).reshape(2000, 2), 8, 1, np.inf), "context has inf in row 8, column 1"),
    ],
)
def test_refuses_contexts(x, context, message):
    flow = linear(context_features=2)
    with pytest.raises(ValueError, match=message):
        flow.fit(x, context)


# How it stops


def test_patience_and_callback_and_time(x):
    history = linear().fit(x, patience=4, validation=(x,), callback=at(2, lambda: True))
    assert (history.stopped, len(history.train)) == ("callback", 2)
    with pytest.warns(fastmaf.FitWarning, match="max_seconds=1e-09 were over before the first epoch: the weights are those of the start"):
        history = linear().fit(x, max_seconds=1e-9)
    assert (history.stopped, len(history.train)) == ("max_seconds", 0)
    history = linear().fit(x, lr=1.0, patience=4, max_epochs=10_000)
    assert history.stopped == "patience" and len(history.train) == history.best_epoch + 4


def test_a_callback_must_return_a_truth_value(x):
    flow, reference = linear(), linear()
    with pytest.raises(ValueError, match=r"callback returned an array of shape \(3,\) and dtype float64; it must return True to stop"):
        flow.fit(x, max_epochs=5, callback=at(2, lambda: np.ones(3)))
    reference.fit(x, max_epochs=2)
    assert same(flow, reference)


@pytest.mark.parametrize("where", ["callback", "x"])
@pytest.mark.parametrize("change", [{"layers": []}, {"base": None}, {"names": ("u", "v")}])
def test_a_flow_that_is_changed_in_a_fit_is_said(x, where, change):
    flow, reference = linear(), linear()

    def draw(epoch):
        if epoch == 2:
            for name, value in change.items():
                setattr(flow, name, value if name != "base" else flow.base)
        return x

    with pytest.raises(RuntimeError, match="the flow was changed while it was fitted, by the callback or elsewhere") as error:
        if where == "x":
            flow.fit(draw, max_epochs=5)
        else:
            flow.fit(x, max_epochs=5, callback=lambda record: draw(record["epoch"]) is None)
    reference.fit(x, max_epochs=2)
    assert same(flow, reference) and len(str(error.value)) <= 200


def test_interruption_keeps_the_best(x, tmp_path):
    flow, reference, returned = linear(), linear(), linear()
    with pytest.raises(KeyboardInterrupt):
        flow.fit(x, max_epochs=9, callback=at(4, interrupt), checkpoint=tmp_path / "c")
    reference.fit(x, max_epochs=4)
    assert same(flow, reference)
    assert flow.training["stopped"] == "interrupted"
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    history = returned.fit(x, max_epochs=9, callback=at(4, interrupt), on_interrupt="return")
    assert history.stopped == "interrupted" and len(history.train) == 4 and same(returned, reference)


def test_interruption_keeps_the_best_and_not_the_last(x):
    flow, seen = linear(dtype="float64"), []

    def callback(record):
        seen.append(record["validation"])
        if len(seen) > 3 and seen[-1] < max(seen):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flow.fit(x, validation=(x[:500],), lr=0.3, max_epochs=50, callback=callback)
    assert seen[-1] < max(seen)
    assert flow.log_prob(x[:500]).mean() == pytest.approx(max(seen), rel=1e-12)


@pytest.mark.parametrize("where", ["callback", "schedule", "x"])
def test_an_exception_keeps_the_best_and_is_raised(x, tmp_path, where):
    flow, reference = linear(), linear()

    def fail(*_):
        raise OSError("disk full")

    options = {"max_epochs": 9, "checkpoint": tmp_path / "c", "checkpoint_every": 100}
    if where == "callback":
        options["callback"] = at(3, fail)
    elif where == "schedule":
        options["schedule"] = lambda epochs: fail() if epochs >= 3 else 1.0
    with pytest.raises(OSError, match="disk full"):
        flow.fit((lambda epoch: fail() if epoch == 4 else x) if where == "x" else x, **options)
    reference.fit(x, max_epochs=3)
    assert same(flow, reference) and flow.training["stopped"] == "OSError after 3 epochs"
    assert same(fastmaf.load(tmp_path / "c"), reference), "the checkpoint is written however a fit ends"


def test_a_flow_that_was_stopped_before_its_first_epoch_is_as_it_was(x):
    flow = linear()
    record = flow.record
    with pytest.raises(KeyboardInterrupt):
        flow.fit(lambda epoch: interrupt() if epoch else x)
    assert flow.record is record


def test_interruption_between_callbacks(x):
    flow, reference = linear(), linear()
    history = flow.fit(lambda epoch: interrupt() if epoch == 3 else x, max_epochs=9, on_interrupt="return")
    assert history.stopped == "interrupted" and len(history.train) == 2
    reference.fit(x, max_epochs=2)
    assert same(flow, reference)


@contextmanager
def engines(flow, epoch):
    """Fits of the flow whose engines have another epoch: a function of the engine and its arguments."""

    class Engine:
        def __init__(self, engine):
            self.engine = engine

        def __getattr__(self, name):
            return getattr(self.engine, name)

        def epoch(self, *arguments, **options):
            return epoch(self.engine, *arguments, **options)

    backend = flow._ready()[1]
    trainer = backend.trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(backend), "trainer", lambda self, *a, **k: Engine(trainer(*a, **k)))
        yield


def test_signal_within_an_epoch(backend):
    x = np.random.default_rng(0).normal(size=(400_000, 2))
    timer = threading.Timer(0.2, _thread.interrupt_main)
    flow = linear()
    before = flow.parameters()
    with engines(flow, lambda engine, *a, **k: (timer.start(), engine.epoch(*a, **k))[1]):
        history = flow.fit(x, validation=(x[:9],), batch_size=1, on_interrupt="return")
    timer.join()
    assert history.stopped == "interrupted" and len(history.train) == len(history.validation) == 1
    assert history.best_epoch == (history.validation[0] > history.start), "what the epoch learned until then is not lost"
    assert (flow.parameters() != before).any() == bool(history.best_epoch)
    assert flow.log_prob(x[:9]).mean() == pytest.approx(max(history.start, history.validation[0]), abs=1e-5)


def cut_short(flow, x, epoch, steps=5, **options):
    """A fit that Ctrl-C ends within an epoch, after some steps."""
    numbers = itertools.count(1)

    def some(engine, x, context, weights, rows, size, rates, mean, poll, part):
        if next(numbers) < epoch:
            return engine.epoch(x, context, weights, rows, size, rates, mean, poll, part)
        engine.epoch(x, context, weights, rows[: steps * size], size, rates[:steps], mean, poll)
        raise KeyboardInterrupt

    with engines(flow, some):
        return flow.fit(x, on_interrupt="return", **options)


@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize("held", [0.1, 0])
@pytest.mark.parametrize("options", [{}, {"batch_norm": True}])
def test_an_epoch_that_is_cut_short_counts(x, tmp_path, epoch, held, options):
    flow, whole = (linear(seed=0, **options) for _ in range(2))
    arguments = {"validation": held, "max_epochs": 5, "seed": 1}
    history = cut_short(flow, x, epoch, checkpoint=tmp_path / "c", **arguments)
    assert history.stopped == "interrupted" and len(history.train) == epoch == history.best_epoch
    assert np.isfinite(history.train).all() and (not held or np.isfinite(history.validation).all())
    if options and not held:
        norm = flow.layers[-1]
        assert np.allclose(flow.to_noise(x).mean(axis=0), norm.beta, atol=1e-5), "statistics are those of the rows under these weights"
    scored = flow.log_prob(x).mean()
    assert scored == pytest.approx(history.train[-1], abs=0.2)
    assert same(fastmaf.load(tmp_path / "c"), flow), "the checkpoint shows the best"
    whole.fit(x, **arguments)
    again = linear(seed=0, **options)
    again.fit(x, **arguments, checkpoint=tmp_path / "c", resume=True)
    assert same(again, whole), "and goes on from the last whole epoch"


def test_an_ensemble_of_masks_that_is_cut_short(x):
    ensemble = fastmaf.MADE(2, masks=3, hidden_features=(9,), seed=0)
    before = ensemble.parameters()
    timer = threading.Timer(0.2, _thread.interrupt_main)
    with engines(ensemble.member(0), lambda engine, *a, **k: (timer.start(), engine.epoch(*a, **k))[1]):
        history = ensemble.fit(np.tile(x, (200, 1)), validation=(x[:200],), batch_size=1, resample=True, on_interrupt="return")
    timer.join()
    assert len(history.train) == 1 and (ensemble.parameters() != before).any() == bool(history.best_epoch)


def test_lines_for_a_logger(x, caplog, monkeypatch):
    linear().fit(x, max_epochs=3)
    assert not caplog.records
    with caplog.at_level("INFO", "fastmaf"):
        linear().fit(x, max_epochs=3)
        assert len(caplog.records) == 1, "one in ten seconds"
        monkeypatch.setattr("fastmaf.train.loop.LOGGED", 0)
        linear().fit(x, max_epochs=3)
    assert re.fullmatch(r"epoch 3 of 3: train -\d\.\d{4}, validation -\d\.\d{4} nats", caplog.messages[-1]) and len(caplog.messages) == 4


def test_loss_that_is_not_finite(x, backend):
    flow, reference = linear(), linear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        history = flow.fit(x, batch_size=200, schedule=lambda epochs: 1.0 if epochs < 2 + 3 / 9 else 1e200, max_epochs=20)
    (said,) = [str(note.message) for note in seen if note.category is FitWarning]
    assert said.startswith("loss not finite in epoch 3, batch 5 of 9: the best weights so far are kept; try a lower lr")
    assert history.stopped == "loss not finite in epoch 3, batch 5 of 9"
    assert len(history.train) == 2
    reference.fit(x, batch_size=200, max_epochs=2)
    assert same(flow, reference)


def test_weights_that_are_not_finite_are_never_the_best(x):
    flow = linear()
    with pytest.warns(FitWarning, match="weights are no numbers behind epoch 2: the best weights so far are kept"):
        flow.fit(x, validation=0, batch_size=2000, schedule=lambda epochs: 1.0 if epochs < 2 else 1e300, max_epochs=3)
    assert np.isfinite(flow.parameters()).all() and flow.training["best_epoch"] == 2


def test_schedules(x):
    constant, cosine, custom = (
        linear().fit(x, lr=0.1, schedule=schedule, max_epochs=4, batch_size=900).lr
        for schedule in ("constant", "cosine", lambda epochs: 1 / (1 + epochs))
    )
    assert constant == [0.1] * 4
    assert cosine == pytest.approx([0.05 * (1 + math.cos(math.pi * (e + 0.5) / 4)) for e in range(4)])
    assert custom == pytest.approx([0.1 / (e + 1.5) for e in range(4)])


def test_regularisation_shrinks(x):
    sizes = []
    for options in ({}, {"l2": 1.0}, {"weight_decay": 30.0}, {"clip_norm": 1e-12}):
        flow = linear()
        start = flow.parameters()
        flow.fit(x, validation=0, max_epochs=10, lr=1e-2, **options)
        sizes.append(np.linalg.norm(flow.parameters()))
    assert sizes[1] < 0.8 * sizes[0] and sizes[2] < 0.8 * sizes[0]
    assert sizes[3] == pytest.approx(np.linalg.norm(start), rel=0.1)


# Every model


@pytest.fixture
def in_numpy():
    """The backend that trains every model."""
    with make.reference():
        yield


BENT = np.random.default_rng(3).normal(size=(800, 3)) @ np.array([[1, 0.8, 0], [0, 0.5, 1], [0, 0, 0.3]])
BENT[:, 2] += BENT[:, 0] ** 2
BITS = np.random.default_rng(4).integers(0, 2, size=(800, 5))
BITS[:, 3] = BITS[:, 0] ^ (BITS[:, 1] & (np.arange(800) % 10 > 0))
VALUES = np.stack([BITS[:, 0] + BITS[:, 1], BITS[:, 3] + 2 * BITS[:, 2], BITS[:, 4]], axis=1)
MIXED = np.stack([BITS[:, 0] + BITS[:, 1], 30 + 7 * (BENT[:, 0] + 2 * BITS[:, 0]), BITS[:, 3]], axis=1)

MODELS = {
    "mixture": (BENT, lambda: fastmaf.MADE(3, "mixture", hidden_features=(12,), components=3)),
    "bernoulli": (BITS, lambda: fastmaf.MADE(5, "bernoulli", hidden_features=(12,))),
    "direct bernoulli": (BITS, lambda: fastmaf.MADE(5, "bernoulli", hidden_features=(12,), direct=True)),
    "categorical": (VALUES, lambda: fastmaf.MADE(3, "categorical", categories=(3, 4, 2), hidden_features=(12,))),
    "mixed": (MIXED, lambda: fastmaf.MADE(3, "mixed", categories=(3, None, 2), hidden_features=(12,), components=2)),
    "batch norm": (BENT, lambda: fastmaf.MAF(3, transforms=2, hidden_features=(12,), batch_norm=True)),
    "act-norm": (BENT, lambda: fastmaf.MAF(3, transforms=2, hidden_features=(12,), batch_norm="act")),
    "residual": (BENT, lambda: fastmaf.MAF(3, transforms=2, hidden_features=(12, 12), residual=True, linear=True)),
    "mixture base": (BENT, lambda: fastmaf.MAF(3, transforms=1, hidden_features=(12,), components=2, batch_norm=True)),
}

FOREIGN = {
    **{
        f"{law.kind} {law.form}": (BENT, functools.partial(make.flow, 3, (12,), law=law, base=law if law.form == "standardize" else None))
        for law in make.LAWS
    },
    **{
        f"{name} blocks": (BENT, functools.partial(make.flow, 3, blocks=blocks, **{**options, "ranks": None}))
        for name, (options, blocks) in make.NETWORKS.items()
    },
    **{
        f"{direction} directions": (BENT, functools.partial(make.flow, 3, (12,), linear=True, between=True, direction=direction))
        for direction in ("noise", "both")
    },
    "noise in residual blocks": (
        BENT,
        functools.partial(make.flow, 3, blocks=make.NETWORKS["gated"][1], context_features=2, direction="noise"),
    ),
}
"""As other libraries build them."""


def trained(name, **options):
    rows, model = MODELS[name]
    flow = model()
    return flow, flow.fit(rows, **{"max_epochs": 12, "lr": 1e-2, "batch_size": 100, **options})


@pytest.mark.parametrize(("name", "count"), [*itertools.product(MODELS, [0, 3]), *((name, 0) for name in FOREIGN)])
def test_engines_agree_on_every_model(backend, name, count):
    """With a weight, an L2 penalty and a norm to clip at; batches of 24, the last of 16; one vector of weights or `count` masks on it."""
    rows, model = {**MODELS, **FOREIGN}[name]
    flow, active = model().astype("float64"), backends.choose()
    if missing := active.unsupported(flow.record):
        pytest.skip(f"the {backend} backend has no kernel for {missing}")
    if count and len(flow.layers) > 1:
        pytest.skip("an ensemble is of single networks")
    # Some gradients begin at zero (those of a batch norm): with a small eps Adam would follow their rounding.
    options = {"l2": 0.01, "weight_decay": 0.1, "clip_norm": 0.5, "eps": 1e-3}
    if count:
        options["members"] = [member.record for member in (flow, *(mirrored(flow, k) for k in range(1, count)))]
    x, w = rows[:88] - rows[:88].min(axis=0), np.random.default_rng(0).uniform(0.5, 2, 88)
    order, results, context = np.random.default_rng(1).permutation(88), [], make.contexts(flow, 88)
    for each in (active, reference.backend):
        engine = each.trainer(flow.record, **options)
        if count:
            engine.set_parameters(0.3 * np.random.default_rng(2).normal(size=engine.parameters().size))
        losses = [engine.epoch(x.astype(float), context, w, order, 24, np.full(4, 0.01), w.mean()) for _ in range(2)]
        results.append((losses, engine.parameters(), engine.log_prob(x.astype(float), context)))
    for actual, expected in zip(*results, strict=True):
        assert np.allclose(actual, expected, rtol=1e-7, atol=1e-7)


def test_moments_of_a_unit_that_is_never_active_fade_to_zero(backend):
    """Not to denormal numbers, with which arithmetic is a hundred times slower. What is not a number is not taken for small."""
    if not backend.startswith("cpu"):
        pytest.skip("others leave them to NumPy")
    flow, rows = fastmaf.MAF(features=3, transforms=1, hidden_features=(8,)), np.random.default_rng(0).normal(size=(4000, 3))
    engine = backends.choose().trainer(flow.record)
    order = np.arange(4000)

    def epoch(parameters):
        engine.set_parameters(parameters)
        engine.epoch(rows, None, None, order, 4, np.full(1000, 1e-3), 1.0)
        return engine.state()

    start = engine.parameters()
    assert np.count_nonzero(epoch(start)["first_moment"]) == np.count_nonzero(start)
    idle = start.copy()
    idle[:24], idle[24:32] = 0, -1e3  # weights and biases of the hidden units
    moments = epoch(idle)
    for name in ("first_moment", "second_moment"):
        assert not np.any((moments[name] != 0) & (np.abs(moments[name]) < np.finfo(np.float32).tiny))
    assert not moments["first_moment"][:24].any()
    engine.load_state({**moments, "second_moment": np.full(start.size, np.nan, np.float32)})
    engine.epoch(rows, None, None, order[:4], 4, np.full(1, 1e-3), 1.0)
    assert np.isnan(engine.state()["second_moment"][np.nonzero(start)]).all()


def test_gradients_and_losses_are_summed_over_all_who_train_together(backend):
    """With somebody who has the same half of each batch; one batch has no rows at all."""
    if backend in ("numba", "cuda"):
        pytest.skip("the engine is that of the reference, or trains alone")
    flow, x = fastmaf.MAF(3, transforms=2, hidden_features=(8,), dtype="float64", seed=1), np.random.default_rng(0).normal(size=(24, 3))
    seen = []

    def twice(gradient, loss):
        seen.append((gradient.copy(), loss.copy()))
        gradient *= 2
        loss *= 2

    engine = backends.choose().trainer(flow.record, clip_norm=0.5)
    part = backends.Part(np.array([8, 8]), np.array([16, 16]), twice)
    assert engine.epoch(x, None, None, np.arange(8), 16, np.array([0.01, 0.0]), 1.0, None, part)[1] == len(seen) == 2
    assert seen[0][0].any() and seen[0][1] == pytest.approx(-flow.log_prob(x[:8]).sum()) and not seen[1][0].any() and seen[1][1] == 0
    whole = backends.choose().trainer(flow.record, clip_norm=0.5)
    same = whole.epoch(x, None, None, np.r_[0:8, 0:8], 16, np.full(1, 0.01), 1.0)
    first = backends.choose().trainer(flow.record, clip_norm=0.5)
    one = backends.Part(np.array([8]), np.array([16]), twice)
    assert first.epoch(x, None, None, np.arange(8), 16, np.full(1, 0.01), 1.0, None, one) == pytest.approx(same, rel=1e-12)
    np.testing.assert_allclose(first.parameters(), whole.parameters(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("ends", "message"), [([4, 2], "step 1 ends at row 2 of 8"), ([4, 9], "step 1 ends at row 9 of 8"), ([4], "2 rates have 1 ends")]
)
def test_steps_that_end_nowhere_are_refused(ends, message):
    if fastmaf.get_backend() != "cpu":
        pytest.skip("of the compiled core")
    engine = backends.choose().trainer(fastmaf.MAF(2).record)
    part = backends.Part(np.array(ends), np.full(len(ends), 4))
    with pytest.raises(ValueError, match=message):
        engine.epoch(np.zeros((8, 2)), None, None, np.arange(8), 4, np.full(2, 0.1), 1.0, None, part)


def mirrored(flow, k):
    """The flow in another order: the ranks turned by k."""
    base = flow.base
    features, net = flow.features, base.conditioner
    ranks = (base.ranks - 1 + k) % features + 1
    arrays = [np.where(mask, 0.1, 0.0) for mask in reference._masks(net, ranks, base.rows) if mask is not True]
    maps = [net.initial, net.final]
    initial, final = (replace(dense, weight=array) for dense, array in zip(maps, arrays[:2], strict=True))
    net = replace(net, initial=initial, final=final, skip=None if net.skip is None else arrays[2])
    return flow._with(base=replace(base, ranks=ranks, conditioner=net))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_learns(in_numpy, name):
    flow, history = trained(name, validation=(MODELS[name][0][600:],))
    start = flow.training["validation"]
    assert history.validation[-1] > history.validation[0] + 0.05 and start == max(history.validation)
    assert flow.log_prob(MODELS[name][0][600:]).mean() == pytest.approx(start, abs=1e-4)
    if name == "bernoulli":
        assert start > -4.9 * math.log(2), "a column depends on two others"


@pytest.mark.parametrize("name", ["bernoulli", "mixture base", "residual"])
def test_every_model_resumes_to_the_same_bits(in_numpy, tmp_path, name):
    whole, _ = trained(name, max_epochs=4)
    trained(name, max_epochs=2, checkpoint=tmp_path / "c")
    parts, history = trained(name, max_epochs=4, checkpoint=tmp_path / "c", resume=True)
    assert same(whole, parts) and whole.base == parts.base and len(history.train) == 4


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bernoulli", 2, r"x has 2.0 in row 7, column 1; it must be an integer from 0 to 1"),
        ("bernoulli", -1, "it must be an integer from 0 to 1"),
        ("categorical", 0.5, "x has 0.5 in row 7, column 1; it must be an integer from 0 to 3"),
        ("categorical", 4, "it must be an integer from 0 to 3"),
        ("categorical", np.nan, "x has nan in row 7, column 1; it must be"),
        ("mixed", np.nan, "x has nan in row 7, column 1; it must be finite; leave such rows out, or fill them"),
    ],
)
def test_refuses_what_a_discrete_variable_cannot_be(in_numpy, name, value, message):
    rows, model = MODELS[name]
    flow, rows = model(), rows.astype(float)
    wrong = put(rows, 7, 1, value)
    for given, options in ((wrong, {}), (rows, {"validation": (wrong,)}), (lambda epoch: wrong if epoch else rows, {})):
        expected = message.replace("x has", f"{'validation ' * bool(options)}x{r'.1.' * callable(given)} has")
        before = flow.parameters()
        with pytest.raises(ValueError, match=expected):
            flow.fit(given, **options)
        assert np.array_equal(flow.parameters(), before) and "epochs" not in flow.training


def test_mixed_columns_are_standardised_but_for_the_discrete(in_numpy):
    flow = fastmaf.MADE(3, "mixed", categories=(3, None, 2), hidden_features=(8,), names=["k", "mass", "flag"])
    flow.fit(MIXED, validation=0, max_epochs=1, seed=0)
    affine = flow.layers[0]
    assert affine.loc[[0, 2]].tolist() == [0, 0] and affine.scale[[0, 2]].tolist() == [1, 1]
    assert affine.loc[1] == pytest.approx(MIXED[:, 1].mean()) and affine.scale[1] == pytest.approx(1 / MIXED[:, 1].std())
    with pytest.raises(ValueError, match="x has 0.5 in row 3, column 'flag'; it must be an integer from 0 to 1$"):
        flow.fit(put(MIXED, 3, 2, 0.5))
    with pytest.raises(ValueError, match="x is constant in column 'mass'"):
        flow.fit(np.where([False, True, False], 1.0, MIXED))
    constant = fastmaf.MADE(3, "mixed", categories=(3, None, 2), hidden_features=(8,))
    constant.fit(np.where([False, False, True], 1.0, MIXED), max_epochs=1)
    with pytest.warns(FitWarning, match='standardize="full" is for columns that may have any number'):
        whitened = fastmaf.MADE(3, "mixed", categories=(3, None, 2), hidden_features=(8,))
        whitened.fit(MIXED, max_epochs=1, standardize="full")
    assert len(whitened.layers) == 1


def test_what_is_said_of_columns_is_not_said_of_discrete_ones(in_numpy):
    """A category that is rare and far from others is no mark of a missing value; a column of few values is, where it may have any."""
    rare = np.where(np.arange(800) % 40 == 0, 99, np.arange(800) % 12)
    flow = fastmaf.MADE(3, "mixed", categories=(100, None, 2), hidden_features=(8,), order=[2, 1, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.fit(np.stack([rare, *MIXED[:, 1:].T], axis=1), max_epochs=2, lr=1e-2, seed=0)
    flow = fastmaf.MADE(3, "mixed", categories=(None, None, 2), hidden_features=(8,), names=["k", "mass", "flag"])
    with pytest.warns(FitWarning, match="x has few different values in column 'k', .* categories of a MADE with conditional=\"mixed\""):
        flow.fit(MIXED, max_epochs=1)


def test_categories_that_data_or_networks_do_not_fit_are_said(in_numpy):
    x = np.stack([MIXED[:, 1], MIXED[:, 0] + 1], axis=1)
    options = {"hidden_features": (8,), "names": ["mass", "kind"]}
    for count, values in ((4, "1 to 3"), (30, "1 to 3")):
        message = f"x has values from {values} in column 'kind', which was made for 0 to {count - 1}: values that never occur"
        with pytest.warns(FitWarning, match=message):
            fastmaf.MADE(2, "mixed", categories=[None, count], **options).fit(x, max_epochs=1, seed=0)
    with pytest.warns(FitWarning, match="x has values from 0 to 2 in column 'kind', which was made for 0 to 29"):
        fastmaf.MADE(2, "mixed", categories=[None, 30], **options).fit(x - [0, 1], max_epochs=1, seed=0)
    both = fastmaf.MADE(2, "mixed", categories=[4, 30], hidden_features=(8,))
    with pytest.warns(FitWarning, match="x has values from 1 to 2 in column 0, which was made for 0 to 3 .column 1 likewise.: values"):
        both.fit(np.stack([BITS[:, 0] + 1, BITS[:, 1]], axis=1), max_epochs=1, seed=0)
    x[:, 1] = np.arange(800) % 20
    with pytest.warns(FitWarning, match="networks read the values of column 'kind' as numbers, .* put such columns last in the order"):
        fastmaf.MADE(2, "mixed", categories=[None, 20], order=[1, 0], **options).fit(x, max_epochs=1, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastmaf.MADE(2, "mixed", categories=[None, 20], **options).fit(x, max_epochs=1, seed=0)


@pytest.mark.parametrize(("clip", "where"), [(9.0, None), (2.0, "column 0"), (1.0, "column 0"), (0.5, "columns 0, 1")])
def test_what_a_clip_hides_of_categories_is_said(in_numpy, clip, where):
    flow = fastmaf.MADE(2, "mixed", categories=[None, 2], hidden_features=(8,))
    base = flow.base
    flow = fastmaf.Flow(flow.layers, replace(base, conditioner=replace(base.conditioner, input_clip=clip)))
    x = np.stack([3 + BENT[:, 0], BITS[:, 0]], axis=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        flow.fit(x, max_epochs=1, standardize=False, seed=0)
    said = [str(one.message) for one in caught if "beyond input_clip" in str(one.message)]
    assert [text.split(" of x lie")[0] for text in said] == ([f"many values in {where}"] if where else [])


def test_discrete_columns_may_be_constant_and_contexts_are_standardised(in_numpy):
    flow = fastmaf.MADE(5, "bernoulli", context_features=1, hidden_features=(8,))
    flow.fit(put(BITS.astype("u1"), slice(None), 2, 1), BITS[:, :1] + 3.0 + BENT[:, :1], max_epochs=2)
    assert flow.context_layers[0].loc == pytest.approx(3.5, abs=0.2)
    assert flow.log_prob(put(BITS, slice(None), 2, 1), BITS[:, :1] + 3.0).mean() > -5 * math.log(2)


@pytest.mark.parametrize("conditional", ["bernoulli", "mixture"])
@pytest.mark.parametrize("redrawn", [False, True])
def test_members_share_their_weights(in_numpy, tmp_path, conditional, redrawn):
    rows, pieces = (BITS, 5) if conditional == "bernoulli" else (BENT, 3)

    def flows(seed):
        return [fastmaf.MADE(pieces, conditional, hidden_features=(12,), order="random", seed=10 * seed + k) for k in range(3)]

    def fit(**options):
        own = flows(0)
        weights = 0.1 * np.random.default_rng(0).normal(size=own[0].parameters().size)
        members = Members(own, weights, (lambda epoch, seed: flows(epoch)) if redrawn else None)
        flow = flows(0)[0]
        history = fit_flow(flow, rows, members=members, **{"lr": 1e-2, "max_epochs": 10, "batch_size": 100, **options})
        return flow, members, history

    flow, members, history = fit()
    assert members.weights.all(), "the masks hold no weight at zero"
    assert history.validation[-1] > history.validation[0]
    if conditional == "mixture":
        assert flow.layers[0].loc.any()
    engine = backends.choose().trainer(flow.record, members=[flow.record.replaced(base=member.base) for member in members.flows])
    engine.set_parameters(members.weights)
    held = np.sort(shuffle(0, 4, 0, 800)[:80])
    assert engine.log_prob(rows[held].astype(float), None).mean() == pytest.approx(max(history.validation), abs=1e-4)
    fit(max_epochs=4, checkpoint=tmp_path / "c")
    assert np.array_equal(fit(max_epochs=10, checkpoint=tmp_path / "c", resume=True)[1].weights, members.weights)


# Checkpoints


@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.parametrize("same_object", [False, True])
def test_resume_gives_the_same_bits(x, backend, tmp_path, stop, same_object):
    context, weights = x[:, :1] ** 2, np.random.default_rng(0).uniform(size=2000)
    options = {"context": context, "weights": weights, "max_epochs": 7, "lr": 0.05, "schedule": "cosine", "weight_decay": 0.01}
    whole, parts = linear(context_features=1), linear(context_features=1)
    history = whole.fit(x, **options)
    parts.fit(x, **options, checkpoint=tmp_path / "c", callback=at(stop, interrupt), on_interrupt="return")
    if not same_object:
        parts = linear(context_features=1, seed=99)
    resumed = parts.fit(x, **options, checkpoint=tmp_path / "c", resume=True)
    assert same(whole, parts)
    assert (resumed.train, resumed.validation, resumed.lr) == (history.train, history.validation, history.lr)
    assert (resumed.best_epoch, resumed.stopped) == (history.best_epoch, history.stopped)
    assert resumed.seconds == sorted(resumed.seconds)


def test_resume_of_a_callable(x, tmp_path):
    def draw(epoch):
        return np.floor(x) + np.random.default_rng(epoch).uniform(size=x.shape)

    whole, parts = linear(), linear()
    whole.fit(draw, max_epochs=5)
    parts.fit(draw, max_epochs=3, checkpoint=tmp_path / "c")
    parts.fit(draw, max_epochs=5, checkpoint=tmp_path / "c", resume=True)
    assert same(whole, parts)


def test_resume_after_the_end(x, tmp_path):
    flow = linear()
    options = {"lr": 1.0, "patience": 3, "checkpoint": tmp_path / "c"}
    first = flow.fit(x, **options)
    again = linear().fit(x, **options, resume=True)
    assert (again.stopped, again.train) == ("patience", first.train)


def test_resume_without_a_file_starts(x, tmp_path):
    flow, reference = linear(), linear()
    flow.fit(x, max_epochs=2, checkpoint=tmp_path / "c", resume=True)
    reference.fit(x, max_epochs=2)
    assert same(flow, reference)


def test_a_checkpoint_is_not_replaced_by_another_fit(x, tmp_path):
    linear().fit(x, max_epochs=2, checkpoint=tmp_path / "c")
    data = (tmp_path / "c").read_bytes()
    for rows, options in ((x, {}), (x[::-1], {"lr": 0.1})):
        flow = linear()
        with pytest.raises(ValueError, match="checkpoint 'c' exists; pass resume=True to go on from it, or name another file"):
            flow.fit(rows, max_epochs=2, checkpoint=tmp_path / "c", **options)
        assert (tmp_path / "c").read_bytes() == data and "epochs" not in flow.training


@pytest.mark.parametrize(
    ("other", "options", "message"),
    [
        ({}, {"lr": 2e-3}, r"lr: 0.001 there, 0.002 here"),
        ({}, {"batch_size": 100}, "batch_size: 256 there, 100 here"),
        ({}, {"seed": 1}, "seed: 0 there, 1 here"),
        ({}, {"validation": 0.2}, "validation: 0.1 there, 0.2 here"),
        ({}, {"clip_norm": 1.0}, "clip_norm: None there, 1.0 here"),
        ({}, {"weights": np.ones(2000)}, r"the data \(weights\)"),
        ({"hidden_features": (3,)}, {}, "the flow"),
        ({"dtype": "float64"}, {}, "the flow"),
        ({"order": [1, 0]}, {}, "the flow"),
        ({"bounds": [None, (-1e3, None)]}, {}, "the flow"),
    ],
)
def test_resume_refuses_another_fit(x, tmp_path, other, options, message):
    linear().fit(x, max_epochs=1, checkpoint=tmp_path / "c")
    flow = fastmaf.MAF(2, **{"transforms": 1, "hidden_features": (), **other})
    with pytest.raises(ValueError, match=f"belongs to another fit: it differs in {message}"):
        flow.fit(x, **options, checkpoint=tmp_path / "c", resume=True)
    assert "epochs" not in flow.training


def test_resume_refuses_other_data(x, tmp_path):
    linear().fit(x, max_epochs=1, checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match=r"the data \(x\)"):
        linear().fit(put(x, 5, 0, 1.0), checkpoint=tmp_path / "c", resume=True)
    linear().fit(x, max_epochs=2, checkpoint=tmp_path / "d", schedule="cosine")
    with pytest.raises(ValueError, match="max_epochs: 2 there, 3 here"):
        linear().fit(x, max_epochs=3, checkpoint=tmp_path / "d", schedule="cosine", resume=True)
    linear().fit(x, max_epochs=1, checkpoint=tmp_path / "e", validation=(x[:9],))
    with pytest.raises(ValueError, match=r"the data \(validation\)"):
        linear().fit(x, max_epochs=1, checkpoint=tmp_path / "e", validation=(x[:8],), resume=True)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: b"\xff" * 200])
def test_damaged_checkpoint(x, tmp_path, damage):
    path = tmp_path / "c"
    linear().fit(x, max_epochs=1, checkpoint=path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        linear().fit(x, checkpoint=path, resume=True)
    linear().save(path)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        linear().fit(x, checkpoint=path, resume=True)
    data = path.read_bytes()
    with pytest.raises(ValueError, match="checkpoint 'c' exists and is no checkpoint of a fit; name another file"):
        linear().fit(x, checkpoint=path)
    assert path.read_bytes() == data


def test_a_checkpoint_is_the_best_flow_so_far(x, tmp_path):
    flow, seen = linear(dtype="float64", names=("a", "b")), []

    def callback(record):
        loaded = fastmaf.load(tmp_path / "c")
        assert loaded.log_prob(x[:500]).mean() == pytest.approx(max(seen := [*seen_before(), record["validation"]]), rel=1e-12)
        assert loaded.names == ("a", "b") and loaded.training["epochs"] == len(seen)

    def seen_before():
        return seen

    flow.fit(
        x,
        validation=x[:500],
        lr=0.1,
        max_epochs=6,
        checkpoint=tmp_path / "c",
        callback=lambda r: (callback(r), seen.append(r["validation"]))[0],
    )
    assert same(fastmaf.load(tmp_path / "c"), flow)
    ensemble = fastmaf.MADE(2, masks=3, hidden_features=(9,))
    ensemble.fit(x, max_epochs=2, checkpoint=tmp_path / "e")
    again = fastmaf.load(tmp_path / "e")
    assert len(again) == 3 and np.array_equal(again.log_prob(x), ensemble.log_prob(x))


def test_checkpoint_every(x, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        "fastmaf.train.checkpoint.Store.save", lambda self, best, members, arrays: written.append(int(arrays["history.train"].size))
    )
    for every, epochs in ((1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (9, [0, 5]), (1e9, [0, 5]), (1e-9, [0, 1, 2, 3, 4, 5])):
        written.clear()
        linear().fit(x, max_epochs=5, checkpoint=tmp_path / "c", checkpoint_every=every)
        assert written == epochs, every


def test_checkpoint_every_so_many_seconds(x, tmp_path, monkeypatch):
    written, clock = [], [0.0]
    monkeypatch.setattr("fastmaf.train.loop.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(
        "fastmaf.train.checkpoint.Store.save", lambda self, best, members, arrays: written.append(int(arrays["history.train"].size))
    )

    def draw(epoch):
        clock[0] += 10.0 * (epoch > 0)
        return x

    linear().fit(draw, max_epochs=8, checkpoint=tmp_path / "c", checkpoint_every=25.0)
    assert written == [0, 3, 6, 8], "epochs end after 10, 20, 30 ... seconds"


def test_resumed_with_gaps_it_gives_the_same_bits(x, tmp_path):
    whole, parts = linear(), linear()
    whole.fit(x, max_epochs=7)
    with pytest.raises(KeyboardInterrupt):
        parts.fit(x, max_epochs=7, checkpoint=tmp_path / "c", checkpoint_every=100, callback=at(4, interrupt))
    parts = linear()
    parts.fit(x, max_epochs=7, checkpoint=tmp_path / "c", resume=True)
    assert same(whole, parts)


def test_the_digest_reads_all_blocks(x, tmp_path, monkeypatch):
    monkeypatch.setattr("fastmaf.train.data.BLOCK", 64)
    linear().fit(x, max_epochs=1, checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match=r"the data \(x\)"):
        linear().fit(put(x, 1999, 1, -200.0), checkpoint=tmp_path / "c", resume=True)


def mutations(data, rng):
    """Checkpoints that are damaged in many ways."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    other = [None, [], {}, -1, 0, 10**30, 1.5, True, "x", [1], [[1]], {"a": 1}]

    def packed(head):
        text = json.dumps(head).encode()
        return len(text).to_bytes(8, "little") + text + body

    for _ in range(150):
        at, size = rng.integers(len(data)), rng.integers(1, 9)
        yield data[:at] + rng.bytes(size) + data[at + size :]
        yield data[:at]
        at = rng.integers(8, 8 + length)
        yield data[:at] + rng.bytes(1) + data[at + 1 :]
    names = list(header)
    for _ in range(300):
        head = json.loads(json.dumps(header))
        name = names[rng.integers(len(names))]
        kind = rng.integers(4)
        if kind == 0:
            del head[name]
        elif kind == 1:
            head[name] = other[rng.integers(len(other))]
        elif kind == 2 and name != "__metadata__":
            head[name][["dtype", "shape", "data_offsets"][rng.integers(3)]] = [*other, "F32", "F64", "I64"][rng.integers(len(other) + 3)]
        else:
            key = ["fastmaf", "fastmaf_checkpoint"][rng.integers(2)]
            inner = json.loads(head["__metadata__"][key])
            inner[list(inner)[rng.integers(len(inner))]] = other[rng.integers(len(other))]
            head["__metadata__"][key] = json.dumps(inner)
        yield packed(head)


def test_mutated_checkpoints_are_refused_by_name(x, tmp_path):
    path = tmp_path / "c"
    made = fastmaf.MAF(2, 1, transforms=1, hidden_features=(3,), batch_norm=True)
    options = {"context": x[200:400, :1], "batch_size": 100, "checkpoint": path}
    made.fit(x[:200], max_epochs=2, **options)
    refused = 0
    for data in mutations(path.read_bytes(), np.random.default_rng(0)):
        path.write_bytes(data)
        for call in (
            lambda: fastmaf.MAF(2, 1, transforms=1, hidden_features=(3,), batch_norm=True).fit(
                x[:200], max_epochs=2, resume=True, **options
            ),
            lambda: fastmaf.load(path),
        ):
            path.write_bytes(data)
            try:
                with warnings.catch_warnings(), np.errstate(all="ignore"):
                    warnings.simplefilter("ignore")
                    call()
            except ValueError as error:
                refused += 1
                assert str(path) in str(error) or "belongs to another fit" in str(error), error
    assert refused > 1000


# Its seeds


def test_a_fit_draws_its_seed_and_records_it(x, monkeypatch):
    monkeypatch.undo()
    flows = [linear(seed=1), linear(seed=1)]
    histories = [flow.fit(x, max_epochs=2) for flow in flows]
    seeds = [flow.training["settings"]["seed"] for flow in flows]
    assert seeds[0] != seeds[1] and not same(*flows) and histories[0].train != histories[1].train
    again = linear(seed=1)
    again.fit(x, max_epochs=2, seed=seeds[0])
    assert same(again, flows[0])


def test_a_resumed_fit_takes_the_seed_of_its_checkpoint(x, tmp_path, monkeypatch):
    monkeypatch.undo()
    parts, whole = linear(seed=1), linear(seed=1)
    parts.fit(x, max_epochs=2, checkpoint=tmp_path / "c")
    parts.fit(x, max_epochs=4, checkpoint=tmp_path / "c", resume=True)
    whole.fit(x, max_epochs=4, seed=parts.training["settings"]["seed"])
    assert same(whole, parts)


def test_seeds_of_numpy(x):
    def fitted(seed):
        flow = linear(seed=1)
        flow.fit(x, max_epochs=1, seed=seed)
        return flow

    sequence = np.random.SeedSequence(3)
    assert same(fitted(sequence), fitted(np.random.SeedSequence(3)))
    generator = np.random.default_rng(3)
    first, second = fitted(generator), fitted(generator)
    assert not same(first, second) and same(first, fitted(np.random.default_rng(3)))
    for wrong in (1.5, "a", True, [1], 2**64):
        with pytest.raises(ValueError, match="seed is"):
            linear().fit(x, seed=wrong)


# What it does not stumble over


def test_contexts_that_do_not_vary(x):
    context = np.column_stack([x[::-1, 0], np.full(2000, 7.0), np.zeros(2000)])
    flow = linear(context_features=3)
    flow.fit(x, context, max_epochs=1)
    affine = flow.context_layers[0]
    assert affine.loc[1:].tolist() == [7.0, 0.0] and affine.scale[1:].tolist() == [1.0, 1.0]
    assert np.isfinite(flow.log_prob(x, context)).all()
    rare = np.zeros((60, 1))
    rare[17] = 1
    for seed in range(40):  # in some of them the one row is held out
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FitWarning)
            linear(context_features=1).fit(x[:60], rare, max_epochs=1, seed=seed)


def test_a_column_that_varies_in_one_row_never_keeps_a_fit_from_starting(x):
    rows = np.c_[x[:60, 0], np.arange(60) == 17]
    held_out = 0
    for seed in range(60):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            flow = linear(seed=0)
            flow.fit(rows, max_epochs=1, validation=0.3, seed=seed)
        notes = [str(note.message) for note in seen if "nothing can be learned" in str(note.message)]
        assert notes in (
            [],
            ["x varies in column 1 only in rows to validate on, so that nothing can be learned of it: give more rows, or leave it out"],
        )
        held_out += len(notes)
        assert np.isfinite(flow.layers[0].scale).all() and flow.layers[0].scale.max() < 20
    assert 0 < held_out < 60
    with pytest.raises(ValueError, match="x is constant in column 1: 0.0 in every row to train on"):
        linear().fit(rows, weights=np.arange(60) != 17)


def test_few_rows_of_positive_weight(x):
    weights = np.zeros(2000)
    weights[np.random.default_rng(0).choice(2000, 20, replace=False)] = 1
    for seed in range(40):
        flow = linear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FitWarning)
            flow.fit(x, weights=weights, max_epochs=1, seed=seed)
        assert (flow.training["rows"], flow.training["validation_rows"]) == (18, 2)


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e-30, 1e30, 1e155, 1e200, 1e300])
def test_columns_of_any_size(scale):
    z = np.random.default_rng(0).normal(3.0, 0.5, (500, 2))
    flow, plain = linear(dtype="float64"), linear(dtype="float64")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        flow.fit(z * scale, max_epochs=1)
    plain.fit(z, max_epochs=1)
    np.testing.assert_allclose(flow.layers[0].loc / scale, plain.layers[0].loc, rtol=1e-13)
    np.testing.assert_allclose(flow.layers[0].scale * scale, plain.layers[0].scale, rtol=1e-12)


def test_weights_of_any_size(x):
    weights = np.random.default_rng(1).integers(1, 4, 2000)
    flows = [linear(dtype="float64") for _ in range(3)]
    for flow, factor in zip(flows, (1.0, 2.0**1000, 2.0**-1000), strict=True):
        flow.fit(x, weights=weights * factor, max_epochs=2)
    assert same(flows[0], flows[1]) and same(flows[0], flows[2])


def test_scales_that_float64_cannot_hold_are_named():
    x = np.random.default_rng(0).normal(size=(50, 2))
    with pytest.raises(ValueError, match="x has a scale that float64 cannot hold in column 'b'; give it in other units"):
        linear(dtype="float64", names=("a", "b")).fit(x * [1, 1e-310])


def test_a_callable_takes_the_number_of_the_epoch(x):
    with pytest.raises(ValueError, match="x is a function that cannot be called with one argument, the number of the epoch"):
        fastmaf.MAF(x.shape[1]).fit(lambda: x)


def test_a_callable_that_uses_one_array_again(x):
    buffer, fresh, reused = x.copy(), linear(), linear()

    def draw(epoch, out):
        out[:] = x + 0.1 * np.random.default_rng(epoch).normal(size=x.shape)
        return out

    a = fresh.fit(lambda epoch: draw(epoch, np.empty_like(x)), max_epochs=4)
    b = reused.fit(lambda epoch: draw(epoch, buffer), max_epochs=4)
    assert a.validation == b.validation and same(fresh, reused)


def test_validation_rows_without_a_tuple(x):
    a, b, c = linear(), linear(), linear()
    a.fit(x[500:], validation=(x[:500],), max_epochs=2)
    b.fit(x[500:], validation=x[:500], max_epochs=2)
    c.fit(x[500:], validation=x[:500].tolist(), max_epochs=2)
    assert same(a, b) and same(a, c)


def test_a_score_that_is_not_a_number_at_the_start_is_worse_than_any(x, monkeypatch):
    score, calls = fastmaf.train.loop._Run.score, []

    def first_unknown(self):
        calls.append(1)
        return math.nan if len(calls) == 1 else score(self)

    monkeypatch.setattr("fastmaf.train.loop._Run.score", first_unknown)
    history = linear().fit(x, max_epochs=3)
    assert history.best_epoch > 0


# Standardisation and what went before


def test_notes_do_not_keep_a_flow_from_being_standardised(x):
    flow, plain = linear(), linear()
    flow.training = {"note": "of mine"}
    flow.training["another"] = 1
    flow.fit(x, max_epochs=1)
    plain.fit(x, max_epochs=1)
    assert same(flow, plain)
    assert flow.training["note"] == "of mine" and flow.training["another"] == 1 and flow.training["epochs"] == 1


def test_a_second_fit_leaves_an_identity_alone(x):
    flow = linear()
    flow.fit((x - MEAN) / 5, standardize=False, max_epochs=1)
    flow.fit((x - MEAN) / 5, max_epochs=1)
    assert flow.layers[0] == Affine(np.zeros(2), np.ones(2))


def test_a_flow_without_affine_gets_one(x):
    for bounds in (None, [(-1e3, None), None]):
        whole, bare = linear(bounds=bounds), linear(bounds=bounds)
        bare.layers = [layer for layer in bare.layers if not isinstance(layer, Affine)]
        whole.fit(x, max_epochs=2)
        bare.fit(x, max_epochs=2)
        assert same(whole, bare)


def test_an_affine_of_ones_own_is_kept_and_said_if_it_does_not_fit(x):
    own = Affine([3.0, -190.0], [0.3, 0.3])
    flow = linear()
    flow.layers = [own, *flow.layers[1:]]
    flow.fit(x, max_epochs=1)
    assert flow.layers[0] == own
    far = linear(names=("u", "v"))
    far.layers = [Affine([3.0, 0.0], [0.5, 1.0]), *far.layers[1:]]
    with pytest.warns(
        FitWarning, match=r"x is not standard in column 'v' behind the standardisation that the flow has, .* standardize=\"again\""
    ):
        far.fit(x, max_epochs=1)


def test_other_data_in_a_second_fit(x):
    flow = linear()
    flow.fit(x, max_epochs=5)
    first = flow.layers[0]
    with pytest.warns(FitWarning, match="x is not standard in columns 0, 1 behind"):
        history = flow.fit(1e6 * x, max_epochs=1)
    assert flow.layers[0] == first and history.start < -1e6
    other = linear(context_features=1)
    other.fit(x, x[::-1, :1], max_epochs=1)
    with pytest.warns(FitWarning, match="context is not standard in column 0"):
        other.fit(x, 1e5 * x[::-1, :1], max_epochs=1)
    history = flow.fit(1e6 * x, standardize="again", max_epochs=1)
    assert history.start == pytest.approx(math.nan, nan_ok=True) or history.start > -60
    assert flow.layers[0].loc == pytest.approx(1e6 * x.mean(axis=0), rel=0.01)


def correlated(n=3000):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(n, 4)) @ np.array([[1, 0.99, 0, 0], [0, 0.1, 0, 0], [0, 0, 1, -3], [0, 0, 0, 0.01]])
    return 1e3 + x * [1, 10, 100, 1000], rng.integers(0, 4, n).astype(float)


@pytest.mark.parametrize("options", [{}, {"linear": True}, {"bounds": [(900, None), None, None, None]}])
def test_full_standardisation_makes_columns_uncorrelated(options, dtype):
    x, weights = correlated()
    flow = linear(4, dtype=dtype, **options)
    number = len(flow.layers)
    flow.fit(x, weights=weights, validation=0, standardize="full", lr=1e-300, max_epochs=1)
    assert len(flow.layers) == number + ("linear" not in options)
    k = next(k for k, layer in enumerate(flow.layers) if isinstance(layer, Linear))
    assert isinstance(flow.layers[k - 1], Affine)
    z = fastmaf.Flow(flow.layers[: k + 1], dtype=dtype).to_noise(x)
    tolerance = 2e-3 if dtype == "float32" else 2e-4
    assert np.average(z, axis=0, weights=weights) == pytest.approx(np.zeros(4), abs=tolerance)
    assert np.cov(z.T, aweights=weights, ddof=0) == pytest.approx(np.eye(4), abs=tolerance)
    before = flow.layers
    flow.fit(x[::-1], weights=weights, validation=0, standardize="full", lr=1e-300, max_epochs=1)
    assert np.allclose(flow.layers[k].lower, before[k].lower, atol=1e-6), "later fits keep it"
    again = fastmaf.load(make.file_bytes(flow))
    again.reset()
    assert len(again.layers) == number and "whitened" not in again.training, "without what the fit has added"
    flow.reset()
    flow.fit(x, weights=weights, validation=0, standardize="full", lr=1e-300, max_epochs=1)
    assert len(flow.layers) == len(before), "in the place of the identity that is there"
    assert np.allclose(flow.layers[k].lower, before[k].lower, atol=1e-6)


def test_full_standardisation_is_trained_resumed_and_scored_like_all_else(tmp_path):
    x, _ = correlated()
    flow, plain = (fastmaf.MAF(4, transforms=2, hidden_features=(8,), seed=0) for _ in range(2))
    arguments = {"max_epochs": 6, "seed": 1, "validation": (x[:500],)}
    history = flow.fit(x[500:], standardize="full", **arguments)
    assert history.start > plain.fit(x[500:], **arguments).start + 5, "a Gaussian of full covariance is where it starts"
    assert np.mean(flow.log_prob(x[:500])) == pytest.approx(max(history.validation), abs=1e-4)
    half = fastmaf.MAF(4, transforms=2, hidden_features=(8,), seed=0)
    half.fit(x[500:], standardize="full", **{**arguments, "max_epochs": 3}, checkpoint=tmp_path / "c.safetensors")
    resumed = fastmaf.MAF(4, transforms=2, hidden_features=(8,), seed=0)
    resumed.fit(x[500:], standardize="full", **arguments, checkpoint=tmp_path / "c.safetensors", resume=True)
    assert np.array_equal(resumed.parameters(), flow.parameters())


class WithoutLinear(type(reference.backend)):
    """A backend that lacks what the standardisation brings."""

    name = "partial"

    def unsupported(self, flow):
        return "a Linear layer" if any(isinstance(layer, Linear) for layer in flow.layers) else None


def test_full_standardisation_where_a_backend_has_no_kernel_for_it(monkeypatch):
    partial = WithoutLinear()
    x, _ = correlated()
    monkeypatch.setattr(backends, "active", partial)
    flow = linear(4)
    before = flow.record
    with pytest.raises(NotImplementedError, match="the partial backend has no kernel for a Linear layer"):
        flow.fit(x, standardize="full", max_epochs=1)
    assert flow.record is before
    monkeypatch.setattr(backends, "default", partial)
    monkeypatch.setattr(backends, "told", set())
    with pytest.warns(RuntimeWarning, match="no kernel for a Linear layer: the reference runs this flow"):
        flow.fit(x, standardize="full", max_epochs=1)


def test_full_standardisation_of_what_has_no_covariance():
    x = np.random.default_rng(0).normal(size=(300, 3))
    with pytest.warns(FitWarning, match="follow from each other"):
        history = linear(3).fit(np.c_[x[:, :2], x.sum(axis=1) - x[:, 2]], standardize="full", validation=0, lr=1e-5, max_epochs=2)
    assert np.isfinite(history.train).all()
    lone = fastmaf.MADE(1, "mixture", components=2)
    lone.fit(x[:, :1], standardize="full", validation=0, max_epochs=1)
    assert not any(isinstance(layer, Linear) for layer in lone.layers)
    discrete = fastmaf.MADE(3, "bernoulli")
    discrete.fit((x > 0).astype(float), standardize="full", validation=0, max_epochs=1)
    assert discrete.layers == ()
    kept = fastmaf.Flow([Affine([5.0] * 3, [2.0] * 3), *linear(3).layers[1:]])
    with pytest.warns(FitWarning, match="does nothing, since the flow is standardised"), pytest.warns(FitWarning, match="not standard"):
        kept.fit(x, standardize="full", validation=0, max_epochs=1)
    with pytest.warns(FitWarning, match="x has 11 rows that count for 3 columns, too few to tell how these go together"):
        few = linear(3)
        few.fit(x[:11], standardize="full", validation=0, max_epochs=1)
    assert not any(isinstance(layer, Linear) for layer in few.layers) and few.layers[0].loc.any()
    with pytest.warns(FitWarning, match="does nothing, since the flow is standardised already"):
        few.fit(x, standardize="full", validation=0, max_epochs=1)
    assert not any(isinstance(layer, Linear) for layer in kept.layers), "an Affine that is not the identity is left alone"
    with pytest.raises(ValueError, match="standardize is 'full', which an ensemble of masks has no layer for"):
        fastmaf.MADE(3, masks=2).fit(x, standardize="full")


def test_identical_fits_give_identical_files(x):
    files = []
    for _ in range(2):
        flow = linear()
        flow.fit(x, max_epochs=2)
        files.append(flow.__reduce__()[1][0])
    assert files[0] == files[1]


# What it warns of


def warned(flow, x, **options):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        flow.fit(x, **{"max_epochs": 1, **options})
    assert all(issubclass(note.category, FitWarning) and note.filename == __file__ for note in seen)
    assert all(len(str(note.message)) <= 200 for note in seen)
    return [str(note.message) for note in seen]


RNG = np.random.default_rng(0)
Z = RNG.normal(size=(2000, 2))


@pytest.mark.parametrize(
    ("rows", "dtype", "message"),
    [
        (
            Z * [1e-3, 1] + [1.2e9, 0],
            "float32",
            "float32 cannot resolve column 't' of x, .* or give rows as float64 and draw with dtype=\"float64\"",
        ),
        (Z * [1e-2, 1] + [2460000.5, 0], "float32", "float32 cannot resolve column 't' of x"),
        (Z * [1e46, 1], "float32", "x has values in column 't' at the ends of float32, .* or make the flow with dtype=\"float64\""),
        (Z * [1e-46, 1e300], "float32", "x has values in columns 't', 'u' at the ends of float32"),
        (Z * [1e307, 1], "float64", "x has values in column 't' at the ends of float64, .*: use other units$"),
        (Z * [1e-12, 1] + [100.0, 0], "float64", "float64 cannot resolve column 't' of x"),
        (np.c_[(0.3 + Z[:, 1]) - Z[:, 1], Z[:, 0]], "float32", "x varies in column 't' by no more than rounding errors"),
        (np.where(np.arange(2000)[:, None] % 200 == 0, [1e20, 0], Z), "float32", "some values of x in column 't' are so far away"),
        (np.where(np.arange(2000)[:, None] % 200 == 0, [1e30, 0], Z), "float64", "some values of x in column 't' are so far away"),
    ],
)
def test_columns_that_cannot_be_resolved(rows, dtype, message):
    notes = warned(linear(dtype=dtype, names=("t", "u")), rows)
    assert any(re.match(message.replace("(", r"\(").replace(")", r"\)").replace("...", r"\.\.\."), note) for note in notes), notes


@pytest.mark.parametrize("value", [-999.0, 99.0, -9999.0])
@pytest.mark.parametrize("every", [3, 20, 500])
def test_a_value_that_stands_for_a_missing_one(value, every):
    rows = np.where(np.arange(2000)[:, None] % every == 0, [value, 0], [1, 1] * Z)
    rows[:, 1] = Z[:, 1]
    (note,) = warned(linear(names=("t", "u")), rows, validation=0)
    assert note.startswith("rows of x share one value in column 't' that is far from all others")


@pytest.mark.parametrize(("factor", "shift"), [(0.1, 0), (0.001, 3), (4, 0), (1, 5)])
def test_a_second_fit_on_data_elsewhere(factor, shift):
    flow = linear(names=("t", "u"))
    flow.fit(Z, max_epochs=1, validation=0)
    assert warned(flow, Z + 0.5, validation=0) == [] and warned(flow, 1.5 * Z, validation=0) == []
    (note,) = warned(flow, Z * [factor, 1] + [shift, 0], validation=0)
    assert note.startswith("x is not standard in column 't' behind the standardisation that the flow has")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_is_said_of_ordinary_data(dtype):
    for rows in (Z, Z * [1e6, 1e-6] + [1e8, 0], np.exp(2 * Z), np.round(Z, 1), np.round(1e4 * Z), Z.astype("f4"), Z * [10, 1] + [58000, 0]):
        assert warned(linear(dtype=dtype), rows, validation=0) == []


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("others", [lambda z: z, np.round, lambda z: np.where(z > 0, 0.0, z)])
def test_some_values_far_away_are_said_however_many_they_are(share, others, dtype):
    rows = np.c_[others(Z[:, 0]), Z[:, 1]]
    rows[RNG.random(2000) < share, 0] = -1e30
    rows[0, 0] = -1e30
    message = f"some values of x in column 't' are so far away that the others hardly differ in {dtype}"
    assert warned(linear(dtype=dtype, names=("t", "u")), rows, validation=0)[0].startswith(message)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_far_away_and_rounding_errors_are_said_of_contexts_too(dtype):
    context = Z[::-1].copy()
    context[::10, 1] = 1e30
    flow = linear(context_features=2, dtype=dtype)
    assert warned(flow, Z, context=context)[0].startswith(
        f"some values of context in column 1 are so far away that the others hardly differ in {dtype}"
    )
    context = np.c_[Z[::-1, 1], (0.3 + Z[:, 1]) - Z[:, 1]]
    flow = linear(context_features=2, dtype=dtype)
    assert warned(flow, Z, context=context) == [
        "context varies in column 1 by no more than rounding errors; if it is constant, leave it out"
    ]
    assert flow.context_layers[0].scale[1] == 1, "else 0.31 would be 1e14 deviations away"
    for offset, scale in ((1.2e9, 1e-3), (0, 1e46), (0, 1e-46)):  # the Affine of the context is applied in double
        assert warned(linear(context_features=1, dtype=dtype), Z, context=offset + scale * Z[::-1, :1]) == []


@pytest.mark.parametrize("largest", [1e5, 1e300, 1e308])
def test_weights_that_leave_few_rows_are_said(largest):
    weights = np.full(2000, 5e-324 if largest == 1e308 else 1.0)
    weights[7] = largest
    said = "weights are so unequal that 2000 rows count like 1: cap the largest weights, or leave weights out"
    first, *others = warned(linear(), Z, weights=weights, validation=0)
    assert re.sub(r"like 1\.\d*", "like 1", first) == said and all("weights that are less unequal" in note for note in others)
    first, *_ = warned(linear(), Z, validation=(Z, None, weights))
    assert re.sub(r"like 1\.\d*", "like 1", first) == f"validation {said.replace('leave weights', 'leave validation weights')}"


def test_nothing_is_said_of_weights_that_leave_enough_rows():
    for weights in (Z[:, 0] ** 2, np.exp(Z[:, 0]), (np.arange(2000) < 20) + 0.0, 1e300 * (Z[:, 0] > 0)):
        assert warned(linear(), Z, weights=weights, validation=0) == []


def test_one_variable_is_one_gaussian():
    assert 'MADE(1, conditional="mixture")' in warned(fastmaf.MAF(1), Z[:, :1], validation=0)[0]
    assert warned(fastmaf.MADE(1, conditional="mixture"), Z[:, :1], validation=0) == []


# What it tells


def test_the_callback_sees_the_flow_of_its_epoch(x):
    flow, scores, kept = linear(dtype="float64"), [], []

    def callback(record):
        kept.append(record)
        assert sorted(record) == ["best_epoch", "epoch", "flow", "lr", "seconds", "train", "validation"] and len(record) == 7
        scores.append(record["flow"].log_prob(x[:500]).mean())
        assert "epochs" not in flow.training, "the flow itself changes at the end"

    history = flow.fit(x, validation=x[:500], lr=0.3, max_epochs=6, callback=callback)
    assert scores == pytest.approx(history.validation, rel=1e-12)
    later = [record["flow"].log_prob(x[:500]).mean() for record in kept]
    assert later == scores
    unseen = []
    linear(dtype="float64").fit(x, validation=x[:500], lr=0.3, max_epochs=6, callback=unseen.append)
    assert [record["flow"].log_prob(x[:500]).mean() for record in unseen] == pytest.approx(scores, rel=1e-12), "looked at only afterwards"


def test_the_callback_of_an_ensemble_sees_an_ensemble(x):
    seen = []
    ensemble = fastmaf.MADE(2, masks=3, hidden_features=(9,))
    ensemble.fit(x, max_epochs=2, validation=0, callback=lambda record: seen.append(record["flow"]))
    assert [len(each) for each in seen] == [3, 3]
    assert np.array_equal(seen[-1].log_prob(x), ensemble.log_prob(x)) and not np.array_equal(seen[0].log_prob(x), ensemble.log_prob(x))


def test_redrawn_members_differ_from_epoch_to_epoch(x, monkeypatch):
    drawn, masked = [], fastmaf.masked_ensemble._Shared.masked
    monkeypatch.setattr("fastmaf.masked_ensemble._Shared.masked", lambda self, *member: (drawn.append(member), masked(self, *member))[1])
    ensemble = fastmaf.MADE(4, masks=2, hidden_features=(40,))
    before = len(drawn)
    ensemble.fit(np.c_[x, x[::-1]], max_epochs=3, resample=True)
    degrees = [member[1].tobytes() for member in drawn[before:]]
    assert len(set(degrees)) >= 6, "two members in each of three epochs"


def test_an_ensemble_keeps_the_best_of_a_fit_that_ends_early(x):
    ensemble, reference = (fastmaf.MADE(2, masks=3, hidden_features=(9,)) for _ in range(2))
    with pytest.raises(KeyboardInterrupt):
        ensemble.fit(x, max_epochs=9, callback=at(2, interrupt))
    reference.fit(x, max_epochs=2)
    assert np.array_equal(ensemble.parameters(), reference.parameters()) and ensemble.training["stopped"] == "interrupted"


def test_help_shows_the_parameters():
    for fit in (fastmaf.Flow.fit, fastmaf.MaskedEnsemble.fit):
        text = inspect.getdoc(fit)
        for name in inspect.signature(fit).parameters:
            assert name == "self" or re.search(rf"^{name} : ", text, re.MULTILINE), name
        assert "{" + "parameters}" not in text
    defaults = [inspect.signature(fit).parameters for fit in (fit_flow, fastmaf.Flow.fit, fastmaf.MaskedEnsemble.fit)]
    for name, parameter in defaults[1].items():
        if parameter.kind is parameter.KEYWORD_ONLY and name != "comm":
            assert defaults[0][name].default == parameter.default == defaults[2][name].default


def test_training_summary(x):
    flow = linear()
    history = flow.fit(x, max_epochs=3, seed=11)
    assert json.loads(json.dumps(flow.training, allow_nan=False)) == flow.training
    assert flow.training["epochs"] == 3 and flow.training["settings"]["seed"] == 11
    assert flow.training["validation"] == max(history.validation)
    assert history.seconds[-1] > 0 and "seconds" not in flow.training


def test_progress(x, capfd):
    linear().fit(x, max_epochs=2)
    assert capfd.readouterr() == ("", "")
    linear().fit(x, max_epochs=2, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "2/2" in err and "train -" in err and "validation -" in err and "nats" in err
    linear().fit(x, max_epochs=2, progress=False)
    assert capfd.readouterr() == ("", "")


def test_history_repr():
    assert repr(History()) == "History(0 epochs, best 0, stopped: )"
    history = History(train=[-2.0, -1.0], lr=[1.0, 1.0], seconds=[0.0, 1.0], best_epoch=2, stopped="max_epochs")
    assert repr(history) == "History(2 epochs, best 2: train -1.0000, stopped: max_epochs)"


def test_values_that_networks_read_clipped_are_a_warning():
    x = np.random.default_rng(0).normal(size=(200, 2)) * [1, 100]
    flow = fastmaf.MAF(2, transforms=1, hidden_features=(4,), names=["a", "b"], seed=0)
    with pytest.warns(fastmaf.FitWarning, match=r"'b' of x lie beyond input_clip, 5.*standardize x"):
        flow.fit(x, max_epochs=1, standardize=False, seed=0, lr=1e-5, progress=False)
    fastmaf.MAF(2, transforms=1, hidden_features=(4,), input_clip=None, seed=0).fit(
        x, max_epochs=1, standardize=False, seed=0, lr=1e-5, progress=False
    )


def degenerate(kind, rng):
    x = rng.normal(size=(600, 3))
    if kind == "equal":
        x[:, 2] = 5 * x[:, 0] - 3
    elif kind == "sum":
        x[:, 1] = x[:, 0] - 2 * x[:, 2]
    elif kind == "copies":
        x = x[rng.integers(7, size=600)]
    elif kind == "whole":
        x[:, 1] = rng.integers(3, size=600)
    elif kind == "rounded":
        x = np.round(x, 2)
    elif kind == "counts":
        x[:, 1] = np.floor(1e5 * x[:, 1])
    elif kind == "near":
        x[:, 2] = x[:, 0] + 1e-4 * rng.normal(size=600)
    elif kind == "few":
        x = x[:60]
        x[:, 2] = 1 - x[:, 0]
    elif kind == "few whole":
        x = x[:60]
        x[:, 2] = x[:, 0] > 0
    elif kind == "point":
        x[rng.random(600) < 0.2, 1] = 0
    elif kind == "clipped":
        x[:, 1] = np.clip(x[:, 1], -1.2, 1.2)
    elif kind == "ratings":
        x[:, 1] = rng.integers(1, 6, 600)
    elif kind == "half degrees":
        x[:, 1] = np.round(2 * (20 + 3 * x[:, 1])) / 2
    elif kind == "heights":
        x[:, 1] = np.round(172 + 9 * x[:, 1])
    elif kind == "poisson":
        x[:, 1] = rng.poisson(100, 600)
    return x


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "kind, said",
    [
        ("equal", "columns of x follow from each other, .* leave out one of columns 0, 2$"),
        ("sum", "columns of x follow from each other, .* leave out one of columns 0, 1, 2$"),
        ("copies", "x has [1-7] different rows among 540, whose density has no bound: drop the copies"),
        ("whole", "x has few different values in column 1, whose density has no bound: add uniform noise"),
        ("few", "columns of x follow from each other, .* leave out one of columns 0, 2$"),
        ("few whole", "x has few different values in column 2, whose density has no bound: add uniform noise"),
        ("point", r"x has up to \d+ % of the rows at one value in column 1, whose density has no bound: leave those rows out"),
        ("clipped", r"x has up to \d+ % of the rows at one value in column 1"),
        ("ratings", "x has few different values in column 1"),
        *((kind, None) for kind in ("plain", "rounded", "counts", "near", "half degrees", "heights", "poisson")),
    ],
)
def test_rows_in_less_than_all_dimensions_are_said(kind, said, dtype):
    x = degenerate(kind, np.random.default_rng(3)).astype(dtype)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        linear(3, seed=0).fit(x, max_epochs=1, seed=0)
    notes = [str(note.message) for note in seen]
    assert (not notes) if said is None else len(notes) == 1 and re.search(said, notes[0]), notes


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_that_sum_to_one_within_bounds_are_said(dtype):
    x = np.random.default_rng(0).dirichlet([2, 3, 4], size=600).astype(dtype)
    with pytest.warns(FitWarning, match="columns of x follow from each other, .* leave out one of columns 0, 1, 2$"):
        linear(3, bounds=3 * [(0, 1)], seed=0).fit(x, max_epochs=1, seed=0)


def test_what_x_shares_with_the_context_is_said(x):
    context = np.c_[np.ones(len(x)), np.random.default_rng(0).normal(size=len(x)), 3 * x[:, 1] - 7]
    flow = linear(2, context_features=3, seed=0)
    with pytest.warns(FitWarning, match="column 1 of x can be told from the context, and the density has no bound: leave out what"):
        flow.fit(x, context, max_epochs=1, seed=0)
    context[:, 2] = 1 - context[:, 1]  # what follows within the context is no matter
    linear(2, context_features=3, seed=0).fit(x, context, max_epochs=1, seed=0)


def test_validation_rows_far_from_all_others_are_said(x):
    held, context = x[:100].copy(), np.random.default_rng(0).normal(size=(len(x), 1))
    held[7, 1] = -9999
    with pytest.warns(FitWarning, match="validation x has values in column 1 more than 10 ranges away from all rows to train on"):
        linear(seed=0).fit(x, validation=held, max_epochs=1, seed=0)
    strange = context[:100].copy()
    strange[3] = -9999
    with pytest.warns(FitWarning, match="validation context has values in column 0 more than 10 ranges away"):
        linear(2, context_features=1, seed=0).fit(x, context, validation=(x[:100], strange), max_epochs=1, seed=0)


@pytest.mark.parametrize("rows, far", [(1000, [-9999.0]), (300, [1e5]), (20_000, [-9999.0]), (1000, [3e3, -4e4, 7e5, 1e6, 2e4])])
def test_a_few_values_far_from_all_others_are_said(rows, far):
    x = np.random.default_rng(0).normal([20, 0], [2, 1], (rows, 2))
    x[7 : 7 + len(far), 0] = far
    with pytest.warns(FitWarning, match="a few values of x in column 0 are so far from all others .* drop them if they are faults"):
        linear(seed=0).fit(x, max_epochs=1, validation=0, lr=1e-5, seed=0)


@pytest.mark.parametrize("kind", ["t", "lognormal", "exponential", "gamma", "uniform"])
def test_tails_are_no_faults(kind):
    rng = np.random.default_rng(0)
    draw = {
        "t": lambda shape: rng.standard_t(3, shape),
        "lognormal": lambda shape: rng.lognormal(0, 1.5, shape),
        "exponential": lambda shape: rng.exponential(1, shape),
        "gamma": lambda shape: rng.gamma(0.3, 1, shape),
        "uniform": lambda shape: rng.random(shape),
    }[kind]
    for rows in (30, 300, 3000, 30_000):
        linear(seed=0).fit(draw((rows, 2)), max_epochs=1, validation=0, lr=1e-5, seed=0)


@pytest.mark.parametrize("lr", [1.0, 3.0])
def test_a_fit_that_ends_worse_than_it_began_is_said_without_validation_rows_too(x, lr):
    with pytest.warns(
        FitWarning, match="training rows are less likely than at the start after 5 epochs: try a lower lr .* or hold out rows"
    ):
        fastmaf.MAF(2, hidden_features=(8,), seed=0).fit(x, lr=lr, validation=0, max_epochs=5, batch_size=50, seed=0)


def test_notes_of_a_callback_stay_with_the_flow(x):
    flow = linear(seed=0, names=["a", "b"])
    flow.fit(x, max_epochs=2, seed=0, callback=lambda epoch: flow.training.update(seen=epoch["epoch"]))
    assert flow.training["seen"] == 2 and flow.training["epochs"] == 2


def test_what_single_precision_has_rounded_away_is_said(x):
    flow = linear(1 + 1, context_features=1, seed=0)
    times = np.float32(1.2e9) + np.float32(1000) * np.random.default_rng(0).normal(size=(len(x), 1)).astype(np.float32)
    with pytest.warns(FitWarning, match="float32 cannot resolve column 0 of context, far from 0 for the spread: give it as float64"):
        flow.fit(x, times, max_epochs=1, seed=0)
    bounded = fastmaf.MAF(2, transforms=1, hidden_features=(), bounds=[None, (1.7e9, None)], seed=0)
    with pytest.warns(FitWarning, match="float32 cannot resolve column 1 of x, .* or give rows as float64 and draw with"):
        bounded.fit(np.c_[x[:, 0], 1.7e9 + np.exp(x[:, 0])], max_epochs=1, seed=0)
    late = x.astype(np.float32)
    late[:, 1] = 1.2e9
    with pytest.raises(ValueError, match="x is constant in column 1: .* unless float32 has rounded it away: then give rows as float64"):
        linear().fit(late, max_epochs=1)
    late[:, 1] += 1000 * np.random.default_rng(0).normal(size=len(x)).astype(np.float32)
    with pytest.warns(FitWarning, match="float32 cannot resolve column 1 of x, .* or give rows as float64"):
        linear(dtype="float64").fit(late, max_epochs=1, seed=0)
