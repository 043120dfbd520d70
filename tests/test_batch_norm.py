"""Batch norm: its gradients through the statistics of a batch, the statistics of a whole training set, and act-norm."""

from __future__ import annotations

import math

import make
import numpy as np
import pytest
from tolerances import assert_close

import fastmaf
from fastmaf import backends, io
from fastmaf.layers import Autoregressive, BatchNorm, Linear, Terminal


def norm(rng, features, statistics="batch"):
    """Every number random."""
    mean, var = 0.5 * rng.normal(size=features), rng.uniform(0.5, 2, features)
    return BatchNorm(*0.3 * rng.normal(size=(2, features)), mean, var, 1e-3, statistics)


def flow(features, kinds=("batch", "batch"), context_features=0, base=None, linear=False, dtype="float64", seed=0):
    """A network and a batch norm for each of the kinds, behind bounds and an Affine."""
    rng = np.random.default_rng([seed, features])
    layers = list(make.flow(features, (), 0, affine=True, bounds=[(-30, 30), *[None] * (features - 1)]).layers)
    for k, kind in enumerate(kinds):
        ranks = rng.permutation(features) + 1
        if linear:
            square = rng.normal(size=(2, features, features)) / (2 * features)
            layers.append(Linear(square[0], square[1] + np.eye(features), 0.3 * rng.normal(size=features)))
        layers.append(Autoregressive(ranks, make.conditioner(rng, ranks, (7, 6)[: k + 1], context_features, "tanh")))
        layers.append(norm(rng, features, kind))
    if base == "mixture":
        ranks = rng.permutation(features) + 1
        base = Terminal(ranks, make.conditioner(rng, ranks, (5,), context_features, "tanh", 6), "mixture", 2)
    return fastmaf.Flow(layers, base, features=features, context_features=context_features, dtype=dtype)


def trainer(made, **options):
    """An engine of the backend in use."""
    active = backends.choose()
    if missing := active.unsupported(made.record):
        pytest.skip(f"the {active.name} backend has no kernel for {missing}")
    return active.trainer(made.record, **options)


def data(made, n, weighted=False):
    rng = np.random.default_rng(1)
    context = make.contexts(made, n)
    return rng.normal(size=(n, made.features)), context, rng.uniform(0.2, 3, n) if weighted else None


def step(engine, x, context, w, mean_weight, rate=0.0, parameters=None):
    """The loss of one batch of all rows, at the parameters given."""
    if parameters is not None:
        engine.set_parameters(parameters)
    loss, done = engine.epoch(x, context, w, np.arange(len(x)), len(x), np.array([rate]), mean_weight)
    assert done == 1
    return loss


def moments(z, w=None):
    mean = np.average(z, axis=0, weights=w)
    return mean, np.average((z - mean) ** 2, axis=0, weights=w)


def with_statistics(made, x, context, w=None, kinds=("batch",)):
    """The flow with the statistics of these rows in its batch norms of these kinds, one after the other."""
    layers = list(made.layers)
    for k, layer in enumerate(layers):
        if isinstance(layer, BatchNorm) and layer.statistics in kinds:
            before = fastmaf.Flow(layers[:k], features=made.features, context_features=made.context_features, dtype="float64")
            with make.reference():
                mean, var = moments(before.to_noise(x, context), w)
            layers[k] = BatchNorm(layer.log_gamma, layer.beta, mean, var, layer.eps, layer.statistics)
    return made._with(layers=layers)


# Steps

CASES = {
    "of 1": {"features": 1},
    "of 3": {"features": 3},
    "of 5 with context": {"features": 5, "context_features": 2},
    "mixed": {"features": 3, "kinds": ("data", "batch", "data", "batch")},
    "linear": {"features": 4, "linear": True},
    "mixture": {"features": 3, "base": "mixture", "context_features": 1},
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gradients_pass_through_the_statistics_of_the_batch(backend, name, weighted):
    made = flow(**CASES[name])
    x, context, w = data(made, 11, weighted)
    engine = trainer(made, betas=(0.0, 0.0))
    parameters = made.parameters()
    step(engine, x, context, w, 1.3, parameters=parameters)
    gradient, scale = engine.state()["first_moment"], 1 / (11 * 1.3)
    free = np.flatnonzero(parameters)
    assert not np.delete(gradient, free).any()

    def moved(values):
        vector = parameters.copy()
        vector[free] = values
        return scale * step(engine, x, context, w, 1.3, parameters=vector)

    assert_close("derivatives", "float64", gradient[free], make.numerical_gradient(moved, parameters[free], 1e-6))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_step_sees_the_statistics_of_its_batch_and_evaluation_those_that_it_is_given(backend, dtype, name, weighted):
    made = flow(**CASES[name], dtype=dtype)
    x, context, w = data(made, 13, weighted)
    engine = trainer(made)
    loss = step(engine, x, context, w, 1.0)
    own = with_statistics(made.astype("float64"), x, context, w)
    with make.reference():
        expected = -(np.ones(13) if w is None else w) @ own.log_prob(x, context)
    assert math.isclose(loss, expected, rel_tol=1e-9 if dtype == "float64" else 1e-4)
    assert np.allclose(engine.log_prob(x, context), made.log_prob(x, context), rtol=1e-12 if dtype == "float64" else 1e-5)
    count = sum(isinstance(layer, BatchNorm) for layer in made.layers)
    given = [moments(np.random.default_rng(k).normal(k, 1 + k, (20, made.features))) for k in range(count)]
    engine.set_statistics(given)
    layers, pairs = list(made.layers), iter(given)
    for k, layer in enumerate(layers):
        if isinstance(layer, BatchNorm):
            layers[k] = BatchNorm(layer.log_gamma, layer.beta, *next(pairs), layer.eps, layer.statistics)
    moved = made._with(layers=layers)
    assert np.allclose(engine.log_prob(x, context), moved.log_prob(x, context), rtol=1e-12 if dtype == "float64" else 1e-5)
    with pytest.raises(ValueError, match="0 pairs of mean and variance; the flow has"):
        engine.set_statistics([])


def test_fixed_statistics_are_constants_in_training(backend):
    made = flow(3, ("data", "data"), context_features=1)
    x, context, w = data(made, 9, True)
    engine = trainer(made, betas=(0.0, 0.0))
    loss = step(engine, x, context, w, 1.0)
    assert math.isclose(loss, -w @ made.log_prob(x, context), rel_tol=1e-12)
    expected = made.vjp(x, context, -w / 9)[2]
    assert_close("parameters", "float64", engine.state()["first_moment"], expected)


def test_batch_norm_takes_the_mean_and_the_scale_away():
    """What a step sees does not depend on a shift and scale of the columns in front of a batch norm, but for the log det."""
    rng = np.random.default_rng(0)
    made = fastmaf.Flow([BatchNorm(np.zeros(3), np.zeros(3), np.zeros(3), np.ones(3), 1e-12)], dtype="float64")
    with make.reference():
        engine = trainer(made)
        x, scale = rng.normal(size=(50, 3)), np.array([0.1, 2, 30])
        losses = [step(engine, rows, None, None, 1.0) for rows in (x, x * scale - 7)]
    assert math.isclose(losses[1] - losses[0], 50 * np.log(scale).sum(), rel_tol=1e-9)


# Fits


def start(features=2, kinds=("batch", "batch"), **options):
    """As new: batch norms that do nothing."""
    made = flow(features, kinds, **options)
    identity = (np.zeros(features), np.zeros(features), np.zeros(features), np.ones(features))
    layers = [BatchNorm(*identity, statistics=layer.statistics) if isinstance(layer, BatchNorm) else layer for layer in made.layers]
    return made._with(layers=layers)


@pytest.fixture
def x():
    rng = np.random.default_rng(7)
    x = rng.normal(size=(600, 2))
    return np.stack([3 + 2 * x[:, 0], 0.5 * x[:, 0] ** 2 + x[:, 1]], axis=1)


@pytest.fixture
def reference():
    with make.reference():
        yield


def fit(made, x, **options):
    """On the reference, which every test of this section has in use."""
    return made.fit(x, **{"batch_size": 100, "max_epochs": 4, "lr": 3e-3, "seed": 0, "standardize": False, **options})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_fitted_flow_has_the_statistics_of_all_training_rows(reference, x, dtype):
    w = np.random.default_rng(0).integers(0, 3, size=600).astype(float)
    made = start(dtype=dtype)
    history = fit(made, x[:500], weights=w[:500], validation=(x[500:], None, w[500:]))
    expected = with_statistics(made.astype("float64"), x[:500], None, w[:500])
    for found, exact in zip(made.layers, expected.layers, strict=True):
        if isinstance(found, BatchNorm):
            rtol = 1e-9 if dtype == "float64" else 1e-4
            assert np.allclose(found.mean, exact.mean, rtol=rtol, atol=rtol) and np.allclose(found.var, exact.var, rtol=rtol)
    value = np.average(made.log_prob(x[500:]), weights=w[500:])
    assert math.isclose(value, max(history.validation), rel_tol=1e-5)
    assert history.validation[-1] > history.validation[0]


def test_the_best_weights_have_their_own_statistics(reference, x):
    made = start()
    history = fit(made, x[:500], validation=(x[500:],), lr=0.5, max_epochs=6, schedule=lambda epochs: 0.01 if epochs < 2 else 1.0)
    assert 0 < history.best_epoch < 6
    assert math.isclose(made.log_prob(x[500:]).mean(), max(history.validation), rel_tol=1e-12)


def test_statistics_in_blocks(reference, x, monkeypatch):
    whole, parts = start(), start()
    fit(whole, x)
    monkeypatch.setattr(fastmaf.train.data, "BLOCK", 2 * 7)
    fit(parts, x)
    for a, b in zip(whole.layers, parts.layers, strict=True):
        if isinstance(a, BatchNorm):
            assert np.allclose(a.mean, b.mean, rtol=1e-9, atol=1e-9) and np.allclose(a.var, b.var, rtol=1e-9)


def test_act_norm_is_that_of_the_start_of_the_first_fit(reference, x):
    made = start(kinds=("data", "data"))
    expected = [layer for layer in with_statistics(made, x, None, kinds=("data",)).layers if isinstance(layer, BatchNorm)]
    for rows in (x, x + 5):
        history = fit(made, rows, validation=0)
        found = [layer for layer in made.layers if isinstance(layer, BatchNorm)]
        for a, b in zip(found, expected, strict=True):
            assert np.allclose(a.mean, b.mean, rtol=1e-9, atol=1e-12) and np.allclose(a.var, b.var, rtol=1e-9)
            assert a.log_gamma.any() and a.beta.any()
    assert history.train[-1] > history.train[0]


def test_act_norm_trains_with_batches_of_one_row(reference, x):
    history = fit(start(kinds=("data",)), x[:41], batch_size=1, validation=0, lr=1e-2)
    assert history.train[-1] > history.train[0]


def test_a_batch_of_one_row_has_no_statistics(reference, x):
    made = start()
    with pytest.raises(ValueError, match="batch_size is 1; the statistics of a batch norm need at least 2 rows"):
        fit(made, x, batch_size=1)
    assert "epochs" not in made.training


def test_rows_that_fill_no_batch_are_left_out(reference, x):
    places = []

    def schedule(epochs):
        places.append(round(epochs, 6))
        return 1.0

    made, order = start(), fastmaf.train.shuffle(0, 3, 1, 25)
    batches = [x[order[:10]], x[order[10:20]]]
    expected = np.mean([with_statistics(made, batch, None).log_prob(batch) for batch in batches])
    history = fit(made, x[:25], batch_size=10, validation=0, max_epochs=2, schedule=schedule, lr=1e-12)
    assert places == [0, 0.5, 1, 1.5]
    assert math.isclose(history.train[0], expected, rel_tol=1e-9)
    places.clear()
    fit(start(), x[:7], batch_size=10, validation=0, max_epochs=2, schedule=schedule)
    assert places == [0, 1]


@pytest.mark.parametrize("kinds", [("batch", "batch"), ("data", "batch")])
@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize("same_object", [False, True])
def test_resume_gives_the_same_bits(reference, x, tmp_path, kinds, stop, same_object):
    def interrupt(record):
        if record["epoch"] == stop:
            raise KeyboardInterrupt

    options = {"weights": np.random.default_rng(0).uniform(size=600), "lr": 0.05, "clip_norm": 1.0}
    whole, parts = start(kinds=kinds), start(kinds=kinds)
    history = fit(whole, x, **options)
    options["checkpoint"] = tmp_path / "c"
    fit(parts, x, **options, callback=interrupt, on_interrupt="return")
    if not same_object:
        parts = start(kinds=kinds, seed=0)
    resumed = fit(parts, x, **options, resume=True)
    assert resumed.train == history.train and resumed.validation == history.validation
    assert whole.layers == parts.layers


@pytest.mark.filterwarnings("ignore:training rows are less likely:fastmaf.FitWarning")
def test_a_callable_x_gives_the_statistics_of_its_epoch(reference, x):
    made = start()
    fit(made, lambda epoch: x + epoch, validation=0, max_epochs=2)
    expected = with_statistics(made, x + 2, None)
    for a, b in zip(made.layers, expected.layers, strict=True):
        assert not isinstance(a, BatchNorm) or np.allclose(a.mean, b.mean, rtol=1e-9)


@pytest.mark.parametrize("validation", [0, 0.2])
def test_a_fit_that_goes_astray_leaves_numbers(reference, x, validation):
    made = start()
    with pytest.warns(fastmaf.train.FitWarning, match="loss not finite in epoch 1"):
        history = fit(made, x, lr=1e200, validation=validation)
    assert "not finite" in history.stopped
    assert np.isfinite(made.log_prob(x)).all()


# The record


def test_statistics_are_saved_and_older_files_lack_them():
    made = flow(2, ("data", "batch"))
    assert io.load(make.file_bytes(made)).layers == made.layers
    written = make.file_bytes(made).replace(b"fastmaf_digest", b"fastmaf_before")
    old = written.replace(b', \\"statistics\\": \\"data\\"', b"").replace(b', \\"statistics\\": \\"batch\\"', b"")
    size = int.from_bytes(written[:8], "little") - (len(written) - len(old))
    loaded = io.load(size.to_bytes(8, "little") + old[8:])
    assert [layer.statistics for layer in loaded.layers if isinstance(layer, BatchNorm)] == ["batch", "batch"]


def test_refuses_other_statistics():
    with pytest.raises(ValueError, match="statistics is 'running'; it must be one of 'batch', 'data'"):
        norm(np.random.default_rng(0), 2, "running")
