"""`reset`: a flow that starts anew is a new one."""

from __future__ import annotations

import make
import numpy as np
import pytest

import fastmaf
from fastmaf.layers import Affine, Autoregressive, BatchNorm, Linear
from fastmaf.record import trainable

FIT = {"max_epochs": 2, "batch_size": 20, "validation": 0, "progress": False, "seed": 0}

MODELS = {
    "plain": (fastmaf.MAF, {}),
    "no units": (fastmaf.MAF, {"hidden_features": (), "context_features": 2}),
    "everything": (
        fastmaf.MAF,
        {
            "context_features": 2,
            "hidden_features": (7, 7),
            "residual": True,
            "direct": True,
            "batch_norm": True,
            "components": 3,
            "linear": True,
            "bounds": [(-50, 50), None, (-50, None)],
            "names": ["a", "b", "c"],
            "dtype": "float64",
        },
    ),
    "act-norm": (fastmaf.MAF, {"batch_norm": "act", "order": [1, 2, 0]}),
    "mixture": (fastmaf.MADE, {"conditional": "mixture", "components": 1, "direct": True}),
    "bernoulli": (fastmaf.MADE, {"conditional": "bernoulli", "hidden_features": (6,)}),
    "categorical": (fastmaf.MADE, {"conditional": "categorical", "categories": [2, 3, 4], "residual": True, "hidden_features": (5,)}),
}


def built(name, **options):
    factory, own = MODELS[name]
    return factory(3, **{"hidden_features": (8, 6), **({"transforms": 2} if factory is fastmaf.MAF else {}), **own, **options})


def data(flow, n=200):
    rng = np.random.default_rng(0)
    counts = np.array((flow.member(0) if isinstance(flow, fastmaf.Ensemble) else flow).record.values)
    x = rng.integers(0, counts, (n, 3)) if counts.all() else rng.normal([3.0, -7.0, 20.0], [0.1, 2.0, 5.0], (n, 3))
    return x, 4 + 3 * rng.normal(size=(n, flow.context_features)) if flow.context_features else None


@pytest.mark.parametrize("name", MODELS)
def test_a_flow_that_is_reset_is_a_new_one(name):
    flow = built(name, seed=1)
    x, context = data(flow)
    flow.fit(x, context, **FIT)
    before = flow.record
    flow.reset(seed=2)
    assert make.file_bytes(flow) == make.file_bytes(built(name, seed=2)) != make.file_bytes(built(name, seed=1))
    assert before is not flow.record and before.fitted and not flow.record.fitted
    other = built(name, seed=2)
    assert flow.fit(x, context, **FIT).train == other.fit(x, context, **FIT).train
    assert make.file_bytes(flow) == make.file_bytes(other)


def test_a_reset_flow_is_standardised_anew():
    flow = built("plain", seed=1)
    x, _ = data(flow)
    flow.fit(x, **FIT)
    flow.reset(seed=1)
    flow.fit(1e3 * x, **FIT)  # would be named far away from the standardisation that is kept
    np.testing.assert_allclose(flow.layers[0].loc, 1e3 * x.mean(axis=0))


def test_drawn_orders_stay():
    flow, other = built("plain", order="random", seed=1), built("plain", order="random", seed=2)
    ranks = [layer.ranks.tolist() for layer in flow.layers[1:]]
    assert ranks != [layer.ranks.tolist() for layer in other.layers[1:]]
    flow.reset(seed=2)
    assert [layer.ranks.tolist() for layer in flow.layers[1:]] == ranks
    flow.reset(seed=1)
    assert make.file_bytes(flow) == make.file_bytes(built("plain", order="random", seed=1))


def test_seeds():
    flow = built("plain", seed=1)
    flow.reset()
    first = flow.parameters()
    flow.reset()
    assert not np.array_equal(flow.parameters(), first)
    other = built("plain", seed=0)
    other.reset(seed=flow.training["init_seed"])
    assert make.file_bytes(other) == make.file_bytes(flow)
    flow.reset(np.random.SeedSequence(3))
    assert np.array_equal(flow.parameters(), built("plain", seed=np.random.SeedSequence(3)).parameters())
    before = flow.record
    with pytest.raises(ValueError, match="seed is -1; it must be at least 0"):
        flow.reset(-1)
    assert flow.record is before


def maps(layer):
    return (*layer.conditioner.hidden, layer.conditioner.final)


@pytest.mark.parametrize("name", make.NETWORKS)
def test_networks_of_other_libraries(name):
    options, blocks = make.NETWORKS[name]
    flow = make.flow(6, blocks=blocks, **{"bounds": True, "between": True, **options})
    before, context = flow.layers, make.contexts(flow, 20)
    x = make.rows(flow, 20, context)
    flow.reset(seed=3)
    assert [type(layer) for layer in flow.layers] == [type(layer) for layer in before] and flow.layers[0] == before[0]
    for old, new in zip(before, flow.layers, strict=True):
        if isinstance(old, Affine):
            assert new == Affine(np.zeros(6), np.ones(6))
        if isinstance(old, Autoregressive):
            assert old.law == new.law and np.array_equal(old.ranks, new.ranks)
            for a, b in zip(trainable(old), trainable(new), strict=True):
                assert a.shape == b.shape and a.dtype == b.dtype and not np.array_equal(a, b)
            for a, b in zip(maps(old), maps(new), strict=True):
                assert a.context == b.context and np.array_equal(a.degrees, b.degrees)
                assert b.norm_scale is None if a.norm_scale is None else (b.norm_scale == 1).all() and not b.norm_shift.any()
    assert np.isfinite(flow.log_prob(x, context)).all()
    np.testing.assert_allclose(flow.from_noise(flow.to_noise(x, context), context), x, rtol=1e-6)


def test_statistics_and_linear_layers_are_forgotten():
    flow = built("everything", seed=1)
    x, context = data(flow)
    flow.fit(x, context, **FIT)
    assert any((layer.mean != 0).any() for layer in flow.layers if isinstance(layer, BatchNorm))
    flow.reset()
    for layer in flow.layers:
        if isinstance(layer, BatchNorm):
            assert not layer.mean.any() and (layer.var == 1).all() and not layer.beta.any() and not layer.log_gamma.any()
        if isinstance(layer, Linear):
            assert np.array_equal(layer.lower, np.eye(3)) and np.array_equal(layer.upper, np.eye(3)) and not layer.bias.any()
    assert flow.names == ("a", "b", "c") and flow.dtype == np.float64


@pytest.mark.parametrize("options", [{}, {"conditional": "mixture", "components": 3}, {"conditional": "bernoulli", "context_features": 2}])
def test_an_ensemble_keeps_its_masks(options):
    ensemble = fastmaf.MADE(3, masks=4, hidden_features=(9,), direct=True, seed=1, **options)
    new = make.file_bytes(ensemble)
    x, context = data(ensemble)
    ensemble.fit(x, context, **FIT)
    ranks, degrees = ensemble.ranks, ensemble.degrees
    ensemble.reset(seed=2)
    other = fastmaf.MADE(3, masks=4, hidden_features=(9,), direct=True, seed=2, **options)
    assert np.array_equal(ensemble.parameters(), other.parameters())
    assert np.array_equal(ensemble.ranks, ranks) and np.array_equal(ensemble.degrees, degrees)
    assert not np.array_equal(degrees, other.degrees)
    assert ensemble.training == {"init_seed": 2}
    ensemble.reset(seed=1)
    assert make.file_bytes(ensemble) == new
