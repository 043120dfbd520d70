"""`MaskedEnsemble`: members that share weights under masks of their own."""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickle
import re

import make
import numpy as np
import pytest
import safetensors.numpy
import scipy.special
import scipy.stats
from tolerances import P_VALUE

import fastmaf
from fastmaf import masks
from fastmaf.layers import Affine, Autoregressive, Terminal
from fastmaf.masked_ensemble import MaskedEnsemble, random_member


@pytest.fixture(autouse=True)
def _reference():
    with make.reference():
        yield


MODELS = {
    "gaussian": {},
    "gaussian with context": {"context_features": 2, "bounds": [None, (0, 1), (2, None), None, None], "direct": True},
    "mixture": {"conditional": "mixture", "components": 3, "activation": "tanh"},
    "mixture with context": {"conditional": "mixture", "components": 2, "context_features": 1},
    "bernoulli": {"conditional": "bernoulli", "direct": True, "hidden_features": (9,)},
    "bernoulli with context": {"conditional": "bernoulli", "context_features": 2},
    "categorical": {"conditional": "categorical", "categories": [2, 3, 2, 2, 4], "residual": True, "hidden_features": (7, 7)},
    "mixed": {"conditional": "mixed", "categories": [2, None, 5, None, None], "components": 3, "context_features": 1},
    "no units": {"conditional": "bernoulli", "hidden_features": (), "direct": True},
}


def model(name, masks=4, **options):
    return fastmaf.MADE(
        5, masks=masks, **{"hidden_features": (11, 7), "dtype": "float64", "order": "random", "seed": 0, **MODELS[name], **options}
    )


def network(flow):
    record = flow.base if isinstance(flow.base, Terminal) else flow.layers[-1]
    return record.conditioner, record.ranks


def rows(ensemble, n=20):
    context = make.contexts(ensemble, n)
    return (ensemble.sample(1, context, seed=1)[:, 0] if context is not None else ensemble.sample(n, seed=1)), context


@pytest.mark.parametrize("name", MODELS)
def test_members_share_weights_and_have_masks_of_their_own(name):
    ensemble = model(name)
    plain = model(name, masks=1)
    assert len(ensemble) == 4 and isinstance(ensemble, fastmaf.MaskedEnsemble)
    assert ensemble.member(0).layers == plain.layers and ensemble.member(0).base == plain.base
    assert ensemble.member(0).context_layers == plain.context_layers == ensemble.context_layers
    vector = ensemble.parameters()
    assert vector.shape == plain.parameters().shape
    ranks = []
    for k in range(4):
        own = ensemble.member(k).parameters()
        assert np.array_equal(own[own != 0], vector[own != 0])
        ranks.append(network(ensemble.member(k))[1].tolist())
        assert sorted(ranks[-1]) == [1, 2, 3, 4, 5]
    assert len(set(map(tuple, ranks))) > 2
    used = np.any([ensemble.member(k).parameters() != 0 for k in range(4)], axis=0)
    assert used.mean() > (ensemble.member(0).parameters() != 0).mean()


@pytest.mark.parametrize("name", ["bernoulli", "bernoulli with context", "categorical", "no units"])
def test_probabilities_sum_to_one(name):
    ensemble = model(name)
    every = np.array(list(itertools.product(*map(range, ensemble.base.categories or (2,) * 5))))
    context = make.contexts(ensemble)
    p = np.exp(ensemble.log_prob(every, context))
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)
    samples = ensemble.sample(20000, context, seed=2)
    codes = samples @ 4.0 ** np.arange(5)
    found = np.array([np.count_nonzero(codes == row @ 4.0 ** np.arange(5)) for row in every])
    assert found.sum() == 20000
    assert scipy.stats.chisquare(found, 20000 * p / p.sum()).pvalue > P_VALUE


@pytest.mark.parametrize("name", MODELS)
def test_density_is_the_mean_of_those_of_the_members(name):
    ensemble = model(name)
    x, context = rows(ensemble)
    members = [ensemble.member(k).log_prob(x, context) for k in range(4)]
    np.testing.assert_allclose(ensemble.log_prob(x, context), scipy.special.logsumexp(members, axis=0) - np.log(4), rtol=1e-13)
    out = np.empty(20)
    assert ensemble.log_prob(x, context, out=out) is out
    if context is not None:
        grouped = ensemble.log_prob(x, context[:3, None])
        np.testing.assert_allclose(grouped[1], ensemble.log_prob(x, context[1]), rtol=1e-12)


@pytest.mark.parametrize("name", ["gaussian", "gaussian with context", "mixture with context"])
def test_gradients_are_those_of_the_mean_density(name):
    ensemble = model(name)
    x, context = rows(ensemble, 6)
    context = None if context is None else context[:2, None]
    value, dx, dcontext = ensemble.log_prob_and_grad(x, context)
    np.testing.assert_array_equal(value, ensemble.log_prob(x, context))
    assert dx.shape == x.shape and (dcontext is None if context is None else dcontext.shape == context.shape)

    def slope(step_x, step_context):
        up, down = (ensemble.log_prob(x + s * step_x, context if context is None else context + s * step_context) for s in (1e-6, -1e-6))
        return ((up - down) / 2e-6).reshape(-1, 6)

    for j in range(5):
        np.testing.assert_allclose(slope(np.eye(5)[j], 0.0).sum(axis=0), dx[:, j], rtol=1e-5, atol=1e-6)
    for j in range(0 if context is None else context.shape[-1]):
        np.testing.assert_allclose(slope(0.0, np.eye(context.shape[-1])[j]).sum(axis=1), dcontext[:, 0, j], rtol=1e-5, atol=1e-6)


def test_gradients_of_impossible_and_missing_rows():
    ensemble, x = model("gaussian with context"), np.full((4, 5), 2.5)
    x[:, 1] = [0.5, 0.5, 1.0, 0.5]
    x[[1, 3], 4] = [np.nan, np.inf]
    with np.errstate(all="raise"):
        value, dx, _ = ensemble.log_prob_and_grad(x, np.zeros((4, 2)))
    assert np.isfinite(value[0]) and np.isnan(value[1]) and np.isneginf(value[2:]).all()
    assert dx[0].any() and np.isfinite(dx[0]).all() and np.isnan(dx[1]).all() and not dx[2:].any()
    with pytest.raises(ValueError, match="a flow with a bernoulli base has no gradient in x"):
        model("bernoulli").log_prob_and_grad(np.zeros((1, 5)))


@pytest.mark.parametrize("name", ["order", "conditional_probs", "to_noise"])
def test_what_only_members_have(name):
    ensemble = model("bernoulli")
    message = (
        f"an ensemble has no {name}, since each member has an order and noise of its own: ensemble.member(k).{name} is that of a member"
    )
    with pytest.raises(AttributeError, match=re.escape(message)):
        getattr(ensemble, name)
    assert not hasattr(ensemble, name) and hasattr(ensemble.member(0), name)
    for call in (lambda: ensemble.prefix(2), lambda: ensemble.sample_given([0, 1])):
        with pytest.raises(ValueError, match="members have orders of their own, in which other variables come first"):
            call()
    with pytest.raises(AttributeError, match="'MaskedEnsemble' object has no attribute 'nothing'"):
        _ = ensemble.nothing


def test_impossible_and_missing_rows():
    with np.errstate(all="raise"):
        discrete, bounded = model("bernoulli"), model("gaussian with context")
        x = np.zeros((3, 5))
        x[1, 2], x[2, 3] = 2, np.nan
        assert np.isfinite(discrete.log_prob(x)).tolist() == [True, False, False]
        assert np.isneginf(discrete.log_prob(x)[1])
        assert np.isneginf(bounded.log_prob(np.zeros((1, 5)), np.zeros(2)))


@pytest.mark.parametrize("name", MODELS)
def test_splits_are_one_call(name):
    ensemble = model(name)
    contexts = make.contexts(ensemble, 3)
    whole, log_prob = ensemble.sample_and_log_prob(9, contexts, seed=7)
    assert whole.shape == ((3, 9, 5) if contexts is not None else (9, 5)) and whole.shape[:-1] == log_prob.shape
    np.testing.assert_allclose(log_prob, ensemble.log_prob(whole, None if contexts is None else contexts[:, None]), rtol=1e-13)
    np.testing.assert_allclose(ensemble.sample(4, contexts, seed=7, offset=5), whole[..., 5:, :], rtol=1e-12, atol=1e-12)
    if contexts is not None:
        later = ensemble.sample(4, contexts[1:], seed=7, offset=5, context_offset=1)
        np.testing.assert_allclose(later, whole[1:, 5:], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(ensemble.sample(9, contexts[0], seed=7), whole[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("features", [1, 3, 4, 6])
def test_every_member_draws_its_share(features):
    ensemble = fastmaf.MADE(features, masks=3, hidden_features=(4,), dtype="float64", seed=2)
    samples = ensemble.sample(3000, seed=1)
    own = np.array(
        [[np.allclose(row, other) for row, other in zip(samples, ensemble.member(k).sample(3000, seed=1), strict=True)] for k in range(3)]
    )
    assert own.any(axis=0).all()
    if features > 1:
        assert scipy.stats.chisquare(own.sum(axis=1)[own.sum(axis=1) < 3000]).pvalue > P_VALUE


def test_continuous_samples_have_the_density():
    ensemble = fastmaf.MADE(2, "mixture", masks=3, components=2, hidden_features=(6,), dtype="float64", seed=1)
    samples = ensemble.sample(4000, seed=1)[:, 0]
    grid = np.linspace(-12, 12, 241)
    density = np.exp(ensemble.log_prob(np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=2).reshape(-1, 2))).reshape(241, 241)
    marginal = density.sum(axis=1) * 0.1
    below = np.append(0, np.cumsum(0.05 * (marginal[1:] + marginal[:-1])))
    np.testing.assert_allclose(below[-1], 1, atol=1e-3)
    assert scipy.stats.kstest(np.interp(samples, grid, below / below[-1]), "uniform").pvalue > P_VALUE


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_files_and_pickles(name, dtype, tmp_path):
    ensemble = model(name, dtype=dtype, names=list("abcde"))
    x, context = rows(ensemble)
    ensemble.save(tmp_path / "model.safetensors")
    file = io.BytesIO()
    ensemble.save(file)
    for other in (
        fastmaf.load(tmp_path / "model.safetensors"),
        fastmaf.load(file.getvalue()),
        pickle.loads(pickle.dumps(ensemble)),
        copy.deepcopy(ensemble),
    ):
        assert isinstance(other, fastmaf.MaskedEnsemble) and repr(other) == repr(ensemble) and other.names == tuple("abcde")
        assert other.parameters().tobytes() == ensemble.parameters().tobytes() and other.dtype == dtype
        assert np.array_equal(other.ranks, ensemble.ranks) and np.array_equal(other.degrees, ensemble.degrees)
        np.testing.assert_array_equal(other.log_prob(x, context), ensemble.log_prob(x, context))
    assert len(file.getvalue()) < 1.2 * len(pickle.dumps(model(name, masks=1, dtype=dtype))) + 4000, "the weights are there once"


def tampered(change):
    """The file of an ensemble with its metadata and tensors changed."""
    file = io.BytesIO()
    model("bernoulli").save(file)
    tensors = safetensors.numpy.load(file.getvalue())
    data = file.getvalue()
    record = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["fastmaf"])
    change(record, tensors)
    return safetensors.numpy.save(tensors, {"fastmaf": json.dumps(record)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, t: t.pop("ensemble.ranks"), "the tensor 'ensemble.ranks' is missing"),
        (lambda r, t: r["ensemble"].pop("ranks"), "ensemble lacks 'ranks'"),
        (lambda r, t: r.update(ensemble=3), "ensemble is not a JSON object"),
        (lambda r, t: t.update({"ensemble.ranks": t["ensemble.ranks"][:2]}), "ranks has 2 rows and degrees 4"),
        (lambda r, t: t.update({"ensemble.degrees": t["ensemble.degrees"][:, :3]}), "degrees has shape (4, 3)"),
        (lambda r, t: t.update({"ensemble.ranks": t["ensemble.ranks"] * 1.0}), "tensor 'ensemble.ranks' has dtype float64"),
        (lambda r, t: t.update({"ensemble.ranks": t["ensemble.ranks"] * 0}), "must be positive"),
        (
            lambda r, t: t.update({"base.conditioner.final.weight": t["base.conditioner.final.weight"][:, :1]}),
            "the final map reads 1 units of 9",
        ),
    ],
)
def test_damaged_files_are_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fastmaf.load(tampered(change))


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name):
    ensemble = model(name)
    x, context = rows(ensemble)
    vector = np.random.default_rng(0).normal(size=ensemble.parameters().size) / 3
    other = ensemble.with_parameters(vector)
    assert np.array_equal(other.parameters(), vector) and len(other) == 4
    for k in (0, 3):
        mask = ensemble.with_parameters(np.ones(vector.size)).member(k).parameters() != 0
        flow = ensemble.member(k).with_parameters(np.where(mask, vector, 0))
        assert flow.layers == other.member(k).layers and flow.base == other.member(k).base
    single = other.astype("float32")
    assert single.dtype == np.float32 and np.array_equal(single.parameters(), vector.astype(np.float32))
    np.testing.assert_allclose(single.log_prob(x, context), other.log_prob(x, context), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=re.escape(f"parameters has shape (3,); the ensemble has {vector.size} parameters")):
        ensemble.with_parameters(np.zeros(3))


def test_words():
    ensemble = fastmaf.MADE(3, "bernoulli", hidden_features=(4, 5), masks=6)
    assert repr(ensemble) == "MaskedEnsemble(masks=6, features=3, dtype=float32): Terminal((4, 5), relu, bernoulli)"
    assert ensemble.summary().splitlines()[-1] == f"6 members share {ensemble.parameters().size} weights"


def test_masks_follow_the_seed():
    first, again, other = (fastmaf.MADE(7, "bernoulli", masks=5, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first.ranks, again.ranks) and np.array_equal(first.degrees, again.degrees)
    assert not np.array_equal(first.ranks[1:], other.ranks[1:]) and not np.array_equal(first.degrees[1:], other.degrees[1:])
    more = fastmaf.MADE(7, "bernoulli", masks=9, seed=3)
    assert np.array_equal(more.ranks[:5], first.ranks) and np.array_equal(more.degrees[:5], first.degrees), "members are numbered"
    assert np.array_equal(first.ranks[0], np.arange(1, 8)) and np.array_equal(first.degrees[0][:100], masks.hidden_degrees(100, 7, False))


@pytest.mark.parametrize(("width", "features", "conditional"), list(itertools.product((1, 2, 50), (1, 2, 6), (False, True))))
def test_random_degrees_lie_in_their_range(width, features, conditional):
    rng = np.random.default_rng(0)
    lowest = 0 if conditional or features == 1 else 1
    degrees = masks.random_degrees(width, features, conditional, rng)
    assert degrees.shape == (width,) and degrees.dtype == np.int64
    assert degrees.min() >= lowest and degrees.max() < max(features, 1)
    if conditional:
        assert (degrees == 0).any()
    if width == 50:
        assert np.unique(degrees).tolist() == list(range(lowest, features))
    if features == 6 and not conditional:
        assert masks.random_degrees(width, features, conditional, rng, lowest=4).min() >= 4


def test_later_layers_read_something():
    net, ranks = network(fastmaf.MADE(20, "bernoulli", hidden_features=(2, 2, 2)))
    for number in range(50):
        order, degrees = random_member(net, ranks, False, 0, number)
        assert sorted(order) == sorted(ranks)
        assert degrees[2:4].min() >= degrees[:2].min() and degrees[4:].min() >= degrees[2:4].min()


@pytest.mark.parametrize("resample", [False, True])
@pytest.mark.parametrize("name", ["bernoulli", "categorical", "gaussian with context", "mixture", "mixed"])
def test_fit(name, resample, tmp_path):
    target = model(name, masks=1, seed=8)
    vector = target.parameters()
    target = target.with_parameters(3 * vector)
    context = make.contexts(target, 600)
    x = target.sample(1, context, seed=1)[:, 0] if context is not None else target.sample(600, seed=1)
    settings = {"max_epochs": 4, "batch_size": 50, "lr": 1e-2, "progress": False, "seed": 3, "resample": resample}
    ensemble, again = model(name), model(name)
    members = [(ensemble.ranks.copy(), ensemble.degrees.copy())]
    before = ensemble.log_prob(x, context).mean()
    history = ensemble.fit(x, context, **settings)
    assert ensemble.log_prob(x, context).mean() > before + 0.01
    assert len(history.train) == 4 and ensemble.training["epochs"] == 4
    assert np.array_equal(ensemble.ranks, members[0][0]) and np.array_equal(ensemble.degrees, members[0][1])
    if target.layers:
        assert (
            ensemble.layers[-2] != target.layers[-2]
            if name.startswith("gaussian")
            else ensemble.layers[0] != Affine(np.zeros(5), np.ones(5))
        )
        assert all(ensemble.member(k).layers[:1] == ensemble.layers[:1] for k in range(4))
    again.fit(x, context, **{**settings, "max_epochs": 2}, checkpoint=tmp_path / "c")
    again = model(name)
    again.fit(x, context, **settings, checkpoint=tmp_path / "c", resume=True)
    assert again.parameters().tobytes() == ensemble.parameters().tobytes()
    assert pickle.loads(pickle.dumps(ensemble)).training == ensemble.training


def test_refused_data_leave_the_ensemble_as_it_was():
    ensemble = model("gaussian")
    vector, layers = ensemble.parameters(), ensemble.layers
    with pytest.raises(ValueError, match="x has nan in row 3, column 2"):
        ensemble.fit(np.where(np.arange(50).reshape(10, 5) == 17, np.nan, np.arange(50).reshape(10, 5)), progress=False)
    assert np.array_equal(ensemble.parameters(), vector) and ensemble.layers == layers and "epochs" not in ensemble.training


def test_wrong_arguments_are_named():
    ensemble = model("gaussian")
    flow, net = ensemble.member(0), ensemble.conditioner
    for call, message in (
        (lambda: ensemble.member(4), "k is 4; it must be below 4"),
        (lambda: ensemble.member(-1), "k is -1; it must be at least 0"),
        (lambda: ensemble.sample(-1), "n is -1; it must be at least 0"),
        (lambda: ensemble.sample(1, offset=1), "offset is 1, but seed is None"),
        (lambda: ensemble.log_prob(np.zeros((2, 4))), "x has shape (2, 4); the flow has 5 features"),
        (lambda: ensemble.astype("int8"), "dtype is 'int8'"),
        (
            lambda: MaskedEnsemble(fastmaf.MAF(5), net, ensemble.ranks, ensemble.degrees),
            "the flow has 5 networks; an ensemble needs exactly one",
        ),
        (
            lambda: MaskedEnsemble(flow, net, ensemble.ranks[:, 1:], ensemble.degrees),
            "ranks has shape (4, 4); it must hold an integer for each feature",
        ),
        (lambda: MaskedEnsemble(flow, net, ensemble.ranks * 1.0, ensemble.degrees), "ranks has dtype float64; it must hold integers"),
        (lambda: MaskedEnsemble(flow, net, ensemble.ranks, ensemble.degrees[:, 1:]), "degrees has shape (4, 17)"),
        (lambda: MaskedEnsemble(flow, net, ensemble.ranks[1:], ensemble.degrees), "ranks has 3 rows and degrees 4"),
        (lambda: MaskedEnsemble(flow, net, ensemble.ranks[:0], ensemble.degrees[:0]), "ranks has 0 rows and degrees 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_samples_into_an_array():
    ensemble, out = model("mixture"), np.empty((6, 5))
    assert ensemble.sample(6, seed=3, out=out) is out
    np.testing.assert_array_equal(out, ensemble.sample(6, seed=3, dtype="float64"))
    with pytest.raises(ValueError, match="out has shape"):
        ensemble.sample(5, out=out)


def test_networks_of_layers_and_of_bases():
    assert isinstance(model("gaussian").layers[-1], Autoregressive) and isinstance(model("mixture").base, Terminal)


@pytest.mark.parametrize("name", ["gaussian", "gaussian with context"])
def test_the_default_backend_agrees(name):
    ensemble = model(name, direct=False)
    contexts = make.contexts(ensemble, 3)
    samples, log_prob = ensemble.sample_and_log_prob(9, contexts, seed=7)
    with make.using(None):
        again = ensemble.sample_and_log_prob(9, contexts, seed=7)
    np.testing.assert_allclose(again[0], samples, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(again[1], log_prob, rtol=1e-9, atol=1e-9)
