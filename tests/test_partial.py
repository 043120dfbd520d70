"""Marginals of the first variables of an order, the rest given them, and probabilities of discrete values."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import make
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
from tolerances import P_VALUE

import fastmaf
from fastmaf import _partial, backends
from fastmaf.layers import ACTIVATIONS, Affine, Autoregressive, BatchNorm, Block, Conditioner, Linear, Permutation, Terminal

ORDER = [2, 0, 4, 1, 3]
BOUNDS = [None, (0, 1), (-2, None), None, (None, 3)]


@pytest.fixture(autouse=True)
def _reference():
    with make.reference():
        yield


def batch_norm(rng, width):
    """A batch norm after some training."""
    return BatchNorm(*(0.3 * rng.normal(size=(3, width))), rng.uniform(0.5, 2, width))


def left_alone(affine, flow):
    """The Affine, which leaves discrete variables as they are."""
    discrete = np.array(flow.record.values) > 0
    return replace(affine, loc=np.where(discrete, 0, affine.loc), scale=np.where(discrete, 1, affine.scale))


def trained(flow):
    """Batch norms and standardisation as if trained."""
    rng = np.random.default_rng(7)
    flow.layers = [
        batch_norm(rng, flow.features)
        if isinstance(layer, BatchNorm)
        else left_alone(make.random_affine(rng, flow.features), flow)
        if isinstance(layer, fastmaf.layers.Affine)
        else layer
        for layer in flow.layers
    ]
    flow.context_layers = [make.random_affine(rng, flow.context_features) for _ in flow.context_layers]
    return flow


def made(conditional, **options):
    if conditional == "categorical":
        options["categories"] = [2, 3, 2, 4, 3]
    if conditional == "mixed":
        options = {"categories": [None, 3, 2, None, 4], **options}
    options = {"order": ORDER, "hidden_features": (9, 8), "components": 3, "dtype": "float64", **options}
    return trained(fastmaf.MADE(5, conditional, **options))


def rows(flow, n=40, seed=1):
    context = make.contexts(flow, n)
    return (flow.sample(1, context, seed=seed)[:, 0] if context is not None else flow.sample(n, seed=seed)), context


MADES = {
    **{f"gaussian {a}": {"conditional": "gaussian", "activation": a, "context_features": 2 * (k % 2)} for k, a in enumerate(ACTIVATIONS)},
    **{
        f"{conditional} {c}": {"conditional": conditional, "context_features": c, "activation": "tanh"}
        for conditional in ("mixture", "bernoulli", "categorical", "mixed")
        for c in (0, 2)
    },
    "bounds": {"conditional": "gaussian", "bounds": BOUNDS},
    "bounds and context": {"conditional": "mixture", "bounds": BOUNDS, "context_features": 1},
    "narrow": {"conditional": "gaussian", "hidden_features": (2, 1, 3)},
    "no units": {"conditional": "categorical", "hidden_features": (), "context_features": 1},
    "direct": {"conditional": "bernoulli", "direct": True},
    "direct with context": {"conditional": "mixture", "direct": True, "context_features": 3, "hidden_features": (5,)},
    "direct alone": {"conditional": "gaussian", "direct": True, "context_features": 1, "hidden_features": ()},
    "mixed with bounds": {"conditional": "mixed", "bounds": BOUNDS, "categories": [3, None, None, 2, None], "direct": True},
    "residual": {"conditional": "categorical", "residual": True, "hidden_features": (7, 7)},
    "residual with context": {"conditional": "gaussian", "residual": True, "hidden_features": (7,), "context_features": 2, "direct": True},
    "order of the columns": {"conditional": "bernoulli", "order": "sequential"},
    "turned order": {"conditional": "mixture", "order": [4, 3, 2, 1, 0]},
}


def tied(context_features=0, context="added"):
    """Variables that share ranks, the hidden units in random order, a residual block whose units rise in degree, norms around the layer."""
    rng, ranks = np.random.default_rng(5), np.array([2, 1, 1, 4, 2])
    degrees = [np.array([0, 3, 1, 2, 1, 3, 0]), np.array([2, 0, 1, 3]), np.array([1, 3, 1, 3, 2, 3, 3])]
    reads, maps = ranks, []
    for k, own in enumerate(degrees):
        mask = own[:, None] >= reads
        maps.append(make.dense(rng, mask, own, 0 if k else context_features, **({} if k or not context_features else {"context": context})))
        reads = own
    final = make.dense(rng, np.repeat(ranks, 2)[:, None] > reads)
    net = Conditioner(maps[0], (Block("residual", tuple(maps[1:])),), final, "tanh", False)
    layers = [make.random_affine(rng, 5), batch_norm(rng, 5), Autoregressive(ranks, net), batch_norm(rng, 5)]
    return fastmaf.Flow(layers, context_features=context_features, dtype="float64")


def single(name):
    return tied(2 * (name == "tied with context")) if name.startswith("tied") else made(**MADES[name])


@pytest.mark.parametrize("name", [*MADES, "tied", "tied with context"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_density_of_a_made_is_that_of_the_prefix_times_that_of_the_rest(name, k):
    flow = single(name)
    x, context = rows(flow)
    first, others = sorted(flow.order[:k]), sorted(flow.order[k:])
    marginal, (conditional, read) = flow.prefix(k), _partial.rest(flow.record, k)
    conditional = fastmaf.Flow._of(conditional)
    known = read(x[:, first])
    wide = known if context is None else np.concatenate([context, known], axis=1)
    terms = marginal.log_prob(x[:, first], context) + conditional.log_prob(x[:, others], wide)
    np.testing.assert_allclose(terms, flow.log_prob(x, context), rtol=1e-11, atol=1e-11)


def test_units_that_nobody_reads_are_left_out():
    flow = fastmaf.MADE(6, hidden_features=(10, 20), names=list("abcdef"), order=[5, 4, 3, 2, 1, 0])
    part = flow.prefix(3)
    assert [dense.bias.size for dense in part.layers[-1].conditioner.hidden] == [4, 8]
    assert part.features == 3 and part.names == ("d", "e", "f") and part.order == (2, 1, 0)
    assert part.dtype == flow.dtype and part.training == flow.training
    assert flow.prefix(1).log_prob(np.zeros((2, 1))).shape == (2,)


MAFS = {
    "plain": {},
    "context": {"context_features": 2, "activation": "silu"},
    "bounds": {"bounds": BOUNDS},
    "mixture": {"components": 3},
    "mixture, context, batch norm": {"components": 2, "context_features": 1, "batch_norm": True, "activation": "tanh"},
    "residual": {"residual": True, "hidden_features": (6, 6), "batch_norm": "act", "bounds": BOUNDS},
    "direct": {"direct": True, "hidden_features": (6,)},
    "no units": {"hidden_features": (), "context_features": 1},
}


def maf(name, **options):
    options = {"transforms": 2, "hidden_features": (9, 8), "order": ORDER, "dtype": "float64", **MAFS[name], **options}
    return trained(fastmaf.MAF(5, **options))


def on_a_grid(flow, row, context):
    """A grid of the last variable of the order, and the density there, the others as in the row."""
    last = flow.order[-1]
    bounds = BOUNDS[last] if isinstance(flow.layers[0], fastmaf.layers.Elementwise) else None
    grid = np.linspace(-40, 40, 40001) if bounds is None else 3 - np.exp(np.linspace(-30, 30, 40001))[::-1]
    x = np.repeat(row[None], grid.size, axis=0)
    x[:, last] = grid
    return grid, np.exp(flow.log_prob(x, context))


@pytest.mark.parametrize("name", MAFS)
def test_the_prefix_of_a_maf_is_its_marginal(name):
    flow = maf(name)
    x, context = rows(flow, 5)
    part, first = flow.prefix(4), sorted(ORDER[:4])
    expected = [
        np.log(scipy.integrate.trapezoid(*on_a_grid(flow, x[i], None if context is None else context[i])[::-1])) for i in range(len(x))
    ]
    np.testing.assert_allclose(part.log_prob(x[:, first], context), expected, atol=1e-6)
    smaller = sorted(ORDER[:2])
    again = part.prefix(2)
    np.testing.assert_array_equal(again.log_prob(x[:, smaller], context), flow.prefix(2).log_prob(x[:, smaller], context))


@pytest.mark.parametrize("name", MAFS)
def test_samples_given_a_prefix_follow_the_conditional_density(name):
    flow = maf(name)
    x, context = rows(flow, 3)
    first, last = sorted(ORDER[:4]), ORDER[4]
    samples = flow.sample_given(x[:, first], 2000, context, seed=3)
    for i in range(len(x)):
        grid, density = on_a_grid(flow, x[i], None if context is None else context[i])
        below = np.append(0, np.cumsum(0.5 * np.diff(grid) * (density[1:] + density[:-1])))
        uniform = np.interp(samples[i, :, last], grid, below / below[-1])
        assert scipy.stats.kstest(uniform, "uniform").pvalue > P_VALUE


@pytest.mark.parametrize("name", ["plain", "mixture, context, batch norm", "bounds", "residual"])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_samples_of_a_prefix_and_of_the_rest_are_samples_of_the_flow(name, k):
    flow = maf(name)
    context = None if not flow.context_features else make.contexts(flow)
    first = flow.prefix(k).sample(4000, context, seed=1) if k else np.empty((4000, 0))
    joint = flow.sample_given(first, 1, context, seed=2)[:, 0]
    direct = flow.sample(4000, context, seed=3)
    projection = np.random.default_rng(0).normal(size=(5, 4))
    for one, other in zip((joint @ projection).T, (direct @ projection).T, strict=True):
        assert scipy.stats.ks_2samp(one, other).pvalue > P_VALUE


@pytest.mark.parametrize(
    "name",
    [
        "bernoulli 0",
        "categorical 2",
        "mixture 2",
        "mixed 2",
        "mixed with bounds",
        "gaussian relu",
        "bounds and context",
        "direct with context",
    ],
)
@pytest.mark.parametrize("k", [0, 2, 5])
def test_given_values_stay_and_splits_are_one_call(name, k):
    flow = made(**MADES[name])
    x, context = rows(flow, 3)
    first = sorted(ORDER[:k])
    whole = flow.sample_given(x[:, first], 7, context, seed=4)
    assert whole.shape == (3, 7, 5) and np.isfinite(whole).all()
    np.testing.assert_array_equal(whole[:, :, first], np.broadcast_to(x[:, None, first], (3, 7, k)))
    later = flow.sample_given(x[1:, first], 3, None if context is None else context[1:], seed=4, offset=4, context_offset=1)
    np.testing.assert_allclose(later, whole[1:, 4:], rtol=1e-12, atol=1e-12)
    one = flow.sample_given(x[0, first], 7, None if context is None else context[0], seed=4)
    assert one.shape == (7, 5)
    np.testing.assert_allclose(one, whole[0], rtol=1e-12, atol=1e-12)
    if k == 0 and context is not None:
        np.testing.assert_allclose(whole, flow.sample(7, context, seed=4), rtol=1e-12, atol=1e-12)
    if k == 5:
        np.testing.assert_array_equal(whole, np.repeat(x[:, None], 7, axis=1))


@pytest.mark.parametrize("name", MAFS)
def test_splits_of_a_maf_are_one_call(name):
    flow = maf(name)
    x, context = rows(flow, 3)
    first = sorted(ORDER[:2])
    whole = flow.sample_given(x[:, first], 7, context, seed=4)
    np.testing.assert_array_equal(whole[:, :, first], np.broadcast_to(x[:, None, first], (3, 7, 2)))
    later = flow.sample_given(x[1:, first], 3, None if context is None else context[1:], seed=4, offset=4, context_offset=1)
    np.testing.assert_allclose(later, whole[1:, 4:], rtol=1e-10, atol=1e-10)
    assert flow.sample_given(x[:, first], 0, context).shape == (3, 0, 5)
    assert not np.array_equal(flow.sample_given(x[:, first], 2, context), flow.sample_given(x[:, first], 2, context))


def test_a_known_conditional():
    """Without hidden units and with shifts alone the rows are Gaussian, whose conditionals are known."""
    flow = fastmaf.MADE(3, hidden_features=(), direct=True, dtype="float64", order=[1, 2, 0])
    layer = flow.layers[-1]
    net = layer.conditioner
    skip, weight, bias = net.skip.copy(), net.final.weight.copy(), net.final.bias.copy()
    skip[1::2], weight[1::2], bias[1::2] = 0, 0, [0.2, -0.3, 0.1]
    layer = replace(layer, conditioner=replace(net, skip=skip, final=replace(net.final, weight=weight, bias=bias)))
    flow = fastmaf.Flow([layer], dtype="float64")
    given = 1.7
    samples = flow.sample_given([given], 20000, seed=5)
    # x = shift + A x + s u
    a, shift = (skip + weight)[::2], bias[::2]
    scale = np.exp(bias[1::2] / (1 + np.abs(bias[1::2]) / layer.law.constants["clip"]))
    inverse = np.linalg.inv(np.eye(3) - a)
    mean, covariance = inverse @ shift, inverse @ np.diag(scale**2) @ inverse.T
    rest = [0, 2]
    slope = covariance[rest, 1] / covariance[1, 1]
    expected_mean = mean[rest] + slope * (given - mean[1])
    expected = covariance[np.ix_(rest, rest)] - np.outer(slope, covariance[rest, 1])
    values = (samples[:, rest] - expected_mean) @ np.linalg.inv(np.linalg.cholesky(expected)).T
    for column in (*values.T, values @ [0.6, 0.8]):
        assert scipy.stats.kstest(column, "norm").pvalue > P_VALUE


@pytest.mark.parametrize("options", [{"context_features": 2}, {"hidden_features": (7, 7), "residual": True}, {"conditional": "mixture"}])
def test_direct_weights_to_the_rest_run_on_the_core(compiled, options):
    flow = made(**{"conditional": "gaussian", "direct": True, **options})
    assert backends.choose().unsupported(_partial.rest(flow.record, 2)[0]) is None
    context = make.contexts(flow, 3)
    given = np.random.default_rng(5).normal(size=(3, 2))
    samples = flow.sample_given(given, 131, context, seed=4)
    one = flow.sample_given(given[1], 131, None if context is None else context[1], seed=4)
    with make.reference():
        expected = flow.sample_given(given, 131, context, seed=4)
        expected_one = flow.sample_given(given[1], 131, None if context is None else context[1], seed=4)
    np.testing.assert_allclose(samples, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(one, expected_one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("context", ["gated", "activated"])
def test_a_network_that_cannot_be_split_goes_through_its_noise(context):
    flow = tied(2, context)
    assert _partial.rest(flow.record, 2) is None
    x, c = rows(flow, 3)
    first = sorted(flow.order[:2])
    samples = flow.sample_given(x[:, first], 4000, c, seed=3)
    others = sorted(flow.order[2:])
    noise = flow.to_noise(samples, c[:, None])
    np.testing.assert_allclose(noise[:, :, first], np.broadcast_to(flow.to_noise(x, c)[:, None, first], (3, 4000, 2)), atol=1e-9)
    assert scipy.stats.kstest(noise[:, :, others].ravel(), "norm").pvalue > P_VALUE


def test_an_inverse_flow_has_prefixes_too():
    flow = make.flow(4, order=[1, 3, 0, 2], transforms=1)
    made = replace(flow.layers[0], direction="noise")
    flow = fastmaf.Flow([made], dtype="float64")
    x = flow.sample(6, seed=1)
    part = flow.prefix(3)
    np.testing.assert_allclose(part.to_noise(x[:, [0, 1, 3]]), flow.to_noise(x)[:, [0, 1, 3]], rtol=1e-12)
    assert flow.sample_given(x[:, [1, 3]], 5, seed=2).shape == (6, 5, 4)


@pytest.mark.parametrize("transforms", [1, 2])
@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize("k", [0, 2, 5])
def test_the_default_backend_agrees(transforms, context_features, k):
    flow = maf("bounds", transforms=transforms, context_features=context_features)
    x, context = rows(flow, 3)
    first = sorted(ORDER[:k])
    expected = flow.sample_given(x[:, first], 4, context, seed=5)
    with make.using(None):
        np.testing.assert_allclose(flow.sample_given(x[:, first], 4, context, seed=5), expected, rtol=1e-9, atol=1e-9)
        if k:
            marginal = flow.prefix(k).log_prob(x[:, first], context)
    if k:
        np.testing.assert_allclose(marginal, flow.prefix(k).log_prob(x[:, first], context), rtol=1e-9, atol=1e-9)


def test_values_outside_a_bound_leave_no_samples():
    for flow in (made("gaussian", bounds=BOUNDS), maf("bounds")):
        samples = flow.sample_given([[0.5, -3.0], [0.5, 1.0]], 2, seed=1)
        assert np.isnan(samples[0][:, [1, 3, 4]]).all() and np.isfinite(samples[1]).all()


def test_orders():
    assert fastmaf.MAF(3, order=[2, 0, 1]).order == (2, 0, 1)
    assert fastmaf.MAF(3, transforms=1).order == (0, 1, 2)
    assert fastmaf.MADE(3, "bernoulli", order=[1, 2, 0]).order == (1, 2, 0)
    assert tied().order == (1, 2, 0, 4, 3)
    assert fastmaf.Flow([], features=3).order == (0, 1, 2)
    with pytest.raises(ValueError, match=re.escape("layers[2] has an order of its own, [2, 1, 0]")):
        _ = fastmaf.MAF(3).order
    with pytest.raises(ValueError, match=re.escape("base has an order of its own, [1, 0]")):
        fastmaf.MAF(2, transforms=1, components=2).prefix(1)


@pytest.mark.parametrize("layer", [Permutation([1, 0, 2]), Linear(np.eye(3), np.eye(3), np.zeros(3))])
def test_layers_that_mix_columns_are_refused(layer):
    flow = fastmaf.Flow([layer, *fastmaf.MADE(3).layers])
    for call in (lambda: flow.order, lambda: flow.prefix(1), lambda: flow.sample_given([1.0])):
        with pytest.raises(ValueError, match=re.escape(f"layers[0] is a {type(layer).__name__}")):
            call()


@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize("options", [{}, {"direct": True}, {"residual": True, "hidden_features": (7,)}])
def test_bernoulli_probabilities(context_features, options):
    flow = made("bernoulli", context_features=context_features, **options)
    every = np.array(list(itertools.product((0, 1), repeat=5)), float)
    context = make.contexts(flow)
    p = np.exp(flow.log_prob(every, context))
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)
    probs = flow.conditional_probs(every, context)
    assert probs.shape == (32, 5)
    for place, j in enumerate(ORDER):
        before = ORDER[:place]
        for i, row in enumerate(every):
            same = (every[:, before] == row[before]).all(axis=1)
            np.testing.assert_allclose(probs[i, j], p[same & (every[:, j] == 1)].sum() / p[same].sum(), rtol=1e-10)
    groups = flow.conditional_probs(every, None if context is None else np.stack([context, context + 1])[:, None])
    assert groups.shape == ((2, 32, 5) if context_features else (32, 5))
    samples = flow.sample_given(np.empty(0), 20000, context, seed=1)
    counts = np.bincount((samples @ 2 ** np.arange(4, -1, -1)).astype(int), minlength=32)
    assert scipy.stats.chisquare(counts, 20000 * p / p.sum()).pvalue > P_VALUE


@pytest.mark.parametrize("conditional", ["bernoulli", "categorical"])
@pytest.mark.parametrize(
    "options", [{}, {"direct": True, "context_features": 2}, {"residual": True, "hidden_features": (7,), "context_features": 1}]
)
def test_probabilities_on_the_core(compiled, dtype, conditional, options):
    flow = made(conditional, **{**options, "dtype": dtype})
    rng = np.random.default_rng(6)
    x = rng.integers(0, 2, (131, 5)).astype(float)
    x[rng.random(x.shape) < 0.05] = 0.5  # no value
    x[7, ORDER[2]] = np.nan
    contexts = [None] if not flow.context_features else [rng.normal(size=(*shape, flow.context_features)) for shape in ((), (131,), (3, 1))]
    for context in contexts:
        probs = flow.conditional_probs(x, context)
        with make.reference():
            expected = flow.conditional_probs(x, context)
        assert probs.shape == expected.shape and probs.dtype == dtype
        np.testing.assert_allclose(probs, expected, rtol=0, atol=1e-12 if dtype == "float64" else 2e-6)
        assert np.isnan(probs).any()
    assert flow.conditional_probs(x[:0], contexts[0]).shape == (0, *probs.shape[-2 if conditional == "categorical" else -1 :])


@pytest.mark.parametrize("conditional, impossible", [("bernoulli", [0.5, -1, 2]), ("categorical", [0.5, -1, 3, 1e30, -np.inf])])
@pytest.mark.parametrize("kind", ["f4", "f8", "i2"])
def test_what_is_no_value_leaves_the_probabilities_before_it(compiled, conditional, impossible, kind):
    flow = made(conditional, categories=3 if conditional == "categorical" else None)
    for value in impossible:
        x = np.ones((4, 5), kind)
        if kind == "i2" and value != int(np.clip(value, -9, 9)):
            continue
        x[2, ORDER[1]] = value
        probs, expected = flow.conditional_probs(x), flow.conditional_probs(np.ones((4, 5), kind))
        known = np.ones((4, 5), bool)
        known[2, list(ORDER[2:])] = False
        np.testing.assert_array_equal(probs[known], expected[known])
        assert np.isnan(probs[~known]).all()


@pytest.mark.parametrize("conditional", ["bernoulli", "categorical"])
@pytest.mark.parametrize("case", ["reference", "cpu"])
def test_unknown_values_leave_the_probabilities_before_them(conditional, case):
    order = np.random.default_rng(8).permutation(12)
    options = {"categories": 3} if conditional == "categorical" else {}
    flow = fastmaf.MADE(12, conditional, order=order, hidden_features=(60, 60), **options)
    x = np.random.default_rng(9).integers(0, 2, (24, 12)).astype(float)
    fastmaf.set_backend(case)
    expected = flow.conditional_probs(x)
    for place, value in itertools.product((0, 5, 11), (np.nan, np.inf, -np.inf, 1e300)):
        unknown = x.copy()
        unknown[7, order[place]] = value
        probs = flow.conditional_probs(unknown)
        assert np.isnan(probs[7, order[place + 1 :]]).all()
        probs[7, order[place + 1 :]] = expected[7, order[place + 1 :]]
        np.testing.assert_array_equal(probs, expected)


@pytest.mark.parametrize("bounds", [None, [(0, None), None, None, (None, -1), None]])
@pytest.mark.parametrize("case", ["reference", "cpu"])
def test_probabilities_of_mixed_variables(case, bounds, dtype):
    """In proportion to the density of each value where nothing comes behind; unknown values spoil what comes behind them."""
    fastmaf.set_backend(case)
    flow = made("mixed", bounds=bounds, context_features=1, dtype=dtype)
    x, context = rows(flow, 50)
    probs = flow.conditional_probs(x, context)
    assert probs.shape == (50, 5, 4) and np.isnan(probs[:, [0, 3]]).all()
    np.testing.assert_allclose(probs[:, [1, 2, 4]].sum(axis=2), 1, rtol=1e-5)
    assert not probs[:, 1, 3].any() and not probs[:, 2, 2:].any()
    part = flow.prefix(3)  # ends with column 4
    first = sorted(ORDER[:3])
    each = np.stack([part.log_prob(np.where(np.array(first) == 4, value, x[:, first]), context) for value in range(4)], axis=1)
    expected = np.exp(each - scipy.special.logsumexp(each, axis=1, keepdims=True))
    np.testing.assert_allclose(probs[:, 4], expected, rtol=1e-3 if dtype == "float32" else 1e-9)
    for place, value in itertools.product(range(5), (np.nan, np.inf, -np.inf, 0.5)):
        if value == 0.5 and flow.record.values[ORDER[place]] == 0 and bounds is None:
            continue
        unknown = x.copy()
        unknown[7, ORDER[place]] = value if value != 0.5 or flow.record.values[ORDER[place]] else (-0.5 if ORDER[place] == 0 else 0)
        found = flow.conditional_probs(unknown, context)
        assert np.isnan(found[7, ORDER[place + 1 :]]).all()
        found[7, ORDER[place + 1 :]] = probs[7, ORDER[place + 1 :]]
        np.testing.assert_array_equal(found, probs)


@pytest.mark.parametrize("case", ["reference", "cpu"])
@pytest.mark.parametrize("bound", [(0, None), (1.7e18, None), (None, -1e17), (1, 2)])
def test_a_value_outside_its_bounds_makes_no_wrong_probabilities(case, bound):
    """Those in front of it are right; what C gets, which looks at no value beforehand, is right or NaN."""
    fastmaf.set_backend(case)
    flow = fastmaf.MADE(3, "mixed", categories=[3, 2, None], bounds=[None, None, bound], order="sequential", dtype="float64", seed=1)
    inside = 3 * bound[0] + 1 if bound[1] is None else bound[1] * 2 if bound[0] is None else 1.5
    x = np.array([[2, 0, inside], [2, 0, np.nan], [2, 0, bound[0] if bound[0] is not None else bound[1]], [2, 0, np.inf]])
    right = flow.conditional_probs(x[:1])[0, :2]
    for row in flow.conditional_probs(x):
        np.testing.assert_array_equal(row[:2], right)
    raw = np.zeros((4, 3, 3))
    backends.choose().conditional_probs(flow.record, x, None, raw)
    np.testing.assert_array_equal(raw[0, :2], right)
    for row in raw[1:, :2]:
        assert (np.isnan(row) | np.isclose(row, right, rtol=1e-12)).all()


@pytest.mark.parametrize("context_features", [0, 1])
def test_categorical_probabilities(context_features):
    flow = made("categorical", context_features=context_features)
    counts = flow.base.categories
    every = np.array(list(itertools.product(*map(range, counts))), float)
    context = make.contexts(flow)
    p = np.exp(flow.log_prob(every, context))
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)
    probs = flow.conditional_probs(every, context)
    assert probs.shape == (len(every), 5, 4)
    np.testing.assert_allclose(probs.sum(axis=2), 1, rtol=1e-12)
    for place, j in enumerate(ORDER):
        before = ORDER[:place]
        assert not probs[:, j, counts[j] :].any()
        for i in range(0, len(every), 7):
            same = (every[:, before] == every[i, before]).all(axis=1)
            expected = [p[same & (every[:, j] == value)].sum() / p[same].sum() for value in range(counts[j])]
            np.testing.assert_allclose(probs[i, j, : counts[j]], expected, rtol=1e-10)
    first = sorted(ORDER[:2])
    given = every[-1, first]
    samples = flow.sample_given(given, 10000, context, seed=1)
    possible = (every[:, first] == given).all(axis=1)
    found = np.array([(samples == row).all(axis=1).sum() for row in every[possible]])
    assert found.sum() == 10000
    assert scipy.stats.chisquare(found, 10000 * p[possible] / p[possible].sum()).pvalue > P_VALUE


def test_float32_keeps_what_is_given():
    flow = made("gaussian", dtype="float32")
    samples = flow.sample_given(np.array([0.1, 0.7]), 3, seed=1)
    assert samples.dtype == np.float32 and (samples[:, [0, 2]] == np.float32([0.1, 0.7])).all()


@pytest.mark.parametrize("transforms", [1, 2])
def test_samples_in_double_from_a_float32_flow(backend, transforms):
    """Columns with an offset that float32 cannot hold: given values and samples keep their digits."""
    flow = fastmaf.MAF(3, transforms=transforms, hidden_features=(8,), order="sequential", seed=1)
    offset, scale = np.array([1.2e9, 0.0, 1.2e9]), 1e3
    far = fastmaf.Flow([Affine(offset, [scale] * 3), *flow.layers[1:]])
    near = fastmaf.Flow([Affine([0.0] * 3, [scale] * 3), *flow.layers[1:]])
    x = np.array([[1e-3, -2e-3], [2e-3, 1e-3]])
    samples = far.sample_given(x + offset[:2], 4, seed=2, dtype="float64")
    assert samples.dtype == np.float64 and (samples[:, :, :2] == (x + offset[:2])[:, None]).all()
    np.testing.assert_allclose((samples - offset)[:, :, 2], near.sample_given(x, 4, seed=2)[:, :, 2], atol=1e-6)
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        far.sample_given(x, dtype="int8")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.prefix(0), "k is 0; it must be at least 1"),
        (lambda f: f.prefix(6), "k is 6; it must be below 6"),
        (lambda f: f.prefix(1.5), "k is 1.5; it must be an integer"),
        (lambda f: f.sample_given(np.zeros(6)), "x has shape (6,); it must be (k,) or (c, k), k at most the 5 features"),
        (lambda f: f.sample_given(np.zeros((2, 2, 2))), "x has shape (2, 2, 2)"),
        (lambda f: f.sample_given(np.zeros((2, 2)), context=np.zeros((3, 2))), "x has shape (2, 2) and context (3, 2)"),
        (lambda f: f.sample_given(np.zeros(2)), "context is missing; the flow has 2 context features"),
        (lambda f: f.sample_given(np.zeros(2), n=-1, context=np.zeros(2)), "n is -1; it must be at least 0"),
        (lambda f: f.sample_given(np.zeros(2), context=np.zeros(2), offset=3), "offset is 3, but seed is None"),
        (lambda f: f.sample_given(["a"], context=np.zeros(2)), "x has dtype <U1"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(made("gaussian", context_features=2))


def test_wrong_values_are_named():
    uneven = fastmaf.MADE(3, "categorical", categories=[5, 3, 2], order="sequential")
    with pytest.raises(ValueError, match=re.escape("x has 4 in column 1; that variable has the values 0..2")):
        uneven.sample_given([[4, 2], [1, 4]])  # the variable in front has it
    flow = made("categorical")
    with pytest.raises(ValueError, match=re.escape("x has 3.0 in column 1; that variable has the values 0..1")):
        flow.sample_given([[0.0, 1.0], [1.0, 3.0]])
    with pytest.raises(ValueError, match=re.escape("x has 0.5 in column 0; that variable has the values 0..1")):
        made("bernoulli").sample_given([0.5])
    with pytest.raises(ValueError, match="conditional_probs is for discrete variables; those of this flow are continuous"):
        made("mixture").conditional_probs(np.zeros((1, 5)))
    with pytest.raises(ValueError, match=re.escape("x has shape (1, 4); the flow has 5 features")):
        flow.conditional_probs(np.zeros((1, 4)))


def test_values_that_are_not_finite_are_refused_by_name():
    flow = made("gaussian", names=["a", "b", "c", "d", "e"])
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match=r"^x is not finite in column 'c'$"):
            flow.sample_given([0.0, value])
        with pytest.raises(ValueError, match="x is not finite in column 'c' of 1 of 2 rows"):
            flow.sample_given([[0.0, value], [0.0, 1.0]])
    with pytest.raises(ValueError, match="x is not finite in column 0"):
        made("bernoulli").sample_given([np.nan])


def test_a_base_that_cannot_be_split_is_named():
    flow = tied(2, "gated")
    net = flow.layers[2].conditioner
    rng = np.random.default_rng(0)
    base = Terminal([2, 1, 1, 4, 2], replace(net, final=make.dense(rng, np.zeros((15, 7), bool))), "mixture")
    with pytest.raises(ValueError, match="base: its context enters its first map by other means than being added"):
        fastmaf.Flow([], base, context_features=2).sample_given([1.0], context=np.zeros(2))
