"""from_noise and sample of every backend and instruction set: known answers, the reference, the density, and the distribution."""

from __future__ import annotations

import dataclasses
import math
import re

import make
import numpy as np
import pytest
import tolerances
from tolerances import assert_close

import fastmaf
from fastmaf import _random, backends
from fastmaf.layers import Affine, Autoregressive, Conditioner, Dense, Elementwise, Law

stats = pytest.importorskip("scipy.stats")
hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

ENDS = [0.0, 1.0, -1.0, 0.1, -3.0, 1.2e9, 2460000.5, 2.0**24, 1e-40, 1e-300, 3e38, -3.4e38]
BOUNDED = [name for name in ("reference", "numba", "cpu") if backends.reason(name) is None]


def noise(n, features, dtype, seed, context_row=0, offset=0):
    """By the reference."""
    index = np.arange(n, dtype=np.uint64) + np.uint64(offset)
    return _random.normals(seed, index, np.full(n, context_row, np.uint64), features, np.dtype(dtype))


# Noise


@pytest.mark.parametrize(
    ("word", "answer"), [(0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"), (2**32 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd")]
)
def test_philox_known_answers(word, answer):
    assert " ".join(f"{int(w):08x}" for w in _random.philox([word] * 4, word << 32 | word)) == answer


@pytest.mark.parametrize("rows", [0, 1, 2, 63, 64, 65, 2000])
@pytest.mark.parametrize(("seed", "stream", "epoch"), [(0, 3, 0), (2**64 - 1, 4, 2**32 - 1), (2**40 + 5, 3, 17)])
def test_words_of_the_core_are_exact(core, rows, seed, stream, epoch):
    """They are the keys by which rows are shuffled."""
    from fastmaf import _core

    assert np.array_equal(_core.shuffle(seed, stream, epoch, rows), _random.shuffle(seed, stream, epoch, rows))


@pytest.mark.parametrize("features", [1, 3, 4, 5, 9])
@pytest.mark.parametrize(
    ("seed", "offset", "context_row"), [(0, 0, 0), (2**64 - 1, 2**32 - 30, 2**32 - 1), (2**63 + 12345, 2**64 - 5000, 7)]
)
def test_noise_is_that_of_the_reference(backend, dtype, features, seed, offset, context_row):
    """That of a flow without layers."""
    drawn = fastmaf.Flow([], features=features, dtype=dtype).sample(5000, seed=seed, offset=offset, context_offset=context_row)
    expected = noise(5000, features, dtype, seed, context_row, offset)
    assert np.array_equal(np.signbit(drawn), np.signbit(expected))
    assert_close("normals", dtype, drawn, expected.astype(np.float64))


def test_float64_refines_float32(backend):
    single, double = (fastmaf.Flow([], features=5, dtype=dtype).sample(50_000, seed=3) for dtype in ("float32", "float64"))
    assert_close("refinement", "float32", single, double)
    assert np.unique(double).size == double.size > np.unique(single).size


# From noise to rows and back


@pytest.mark.parametrize("name", make.CASES)
def test_equals_the_reference(backend, dtype, name):
    case = make.case(name, dtype)
    assert_close("from_noise", dtype, case.flow.from_noise(case.noise, case.context), case.expected["from_noise"])


@pytest.mark.parametrize("name", make.CASES)
def test_round_trips(backend, dtype, name):
    case = make.case(name, dtype)
    there = case.flow.from_noise(case.noise, case.context)
    assert_close("round trip", dtype, case.flow.to_noise(there, case.context), case.noise.astype(np.float64))
    back = case.flow.to_noise(case.x, case.context)
    assert_close("round trip", dtype, case.flow.from_noise(back, case.context), case.x.astype(np.float64))


def test_nan_in_noise_stays_in_its_row(backend, dtype):
    case = make.case("7 (17, 5) 1", dtype)
    spoilt = case.noise.copy()
    spoilt[::9, 2] = np.nan
    x = case.flow.from_noise(spoilt, case.context)
    assert np.array_equal(np.isnan(x).any(axis=1), np.arange(make.ROWS) % 9 == 0)


INF = float("inf")
ODD = [[INF, 0, 0], [0, -INF, 0], [0, 0, INF], [0, 0, np.nan], [np.nan, 0, 0], [1e300, 0, 0], [0, 0, -1e300], [0, 1e30, 0], [0, 0, 0]]


@pytest.mark.parametrize("options", [{"transforms": 1}, {"transforms": 2}, {"transforms": 1, "activation": "tanh"}])
def test_rows_are_finite_or_nan_throughout(backend, dtype, options):
    """Whatever the backend, which spread infinity in ways of their own."""
    flow = fastmaf.MAF(3, hidden_features=(8,), dtype=dtype, seed=0, **options)
    flow = flow.with_parameters(1.5 * flow.parameters())
    for call in (flow.to_noise, flow.from_noise):
        with np.errstate(all="ignore"):
            result = call(np.array(ODD))
        nan = np.isnan(result).all(axis=1)
        assert np.isfinite(result[~nan]).all()
        assert nan[:5].all() and not nan[-1] and nan[5:7].all() == (dtype == "float32")


# Samples


@pytest.mark.parametrize(
    "name", [name for name, arguments in make.CASES.items() if isinstance(arguments, dict) and arguments.get("context_features")]
)
def test_samples_under_many_contexts(backend, dtype, name):
    """Against the reference, row by row, and with their density."""
    case = make.case(name, dtype)
    flow, contexts, features = case.flow, case.context[:5], case.flow.features
    x, density = flow.sample_and_log_prob(33, contexts, seed=2**63 + 1, offset=2**33, context_offset=9)
    u = np.concatenate([noise(33, features, dtype, 2**63 + 1, 9 + row, 2**33) for row in range(5)])
    each = np.repeat(contexts, 33, axis=0)
    with make.reference():
        expected = flow.astype("float64").from_noise(u, each)
        densities = flow.astype("float64").log_prob(x.reshape(-1, features), each)
    assert_close("sample", dtype, x.reshape(-1, features), expected)
    assert_close("density of samples", dtype, density.ravel(), densities)
    assert np.array_equal(flow.sample(33, contexts, seed=2**63 + 1, offset=2**33, context_offset=9), x)


@pytest.mark.parametrize("name", make.CASES)
def test_samples_are_the_noise_turned_around(core, dtype, name):
    """Exactly."""
    flow, c = make.case(name, dtype).flow, make.case(name, dtype).context
    own = None if c is None else c[0]
    u = fastmaf.Flow([], features=flow.features, dtype=dtype).sample(60, seed=9)
    assert np.array_equal(flow.sample(60, own, seed=9), flow.from_noise(u, own))


@pytest.mark.parametrize("name", ["front", "blocks", "13 (49, 50) 3"])
def test_splits(core, dtype, name):
    """Over samples by offset, over contexts by context_offset, and into calls for one context."""
    flow, contexts = make.case(name, dtype).flow, make.case(name, dtype).context[:12]
    whole = flow.sample_and_log_prob(100, contexts, seed=5)
    for begin, end in ((0, 1), (1, 3), (0, 48), (47, 100), (83, 100), (99, 100)):
        part = flow.sample_and_log_prob(end - begin, contexts, seed=5, offset=begin)
        assert all(np.array_equal(a, b[:, begin:end]) for a, b in zip(part, whole, strict=True))
    for begin, end in ((0, 1), (1, 3), (2, 12), (11, 12)):
        part = flow.sample_and_log_prob(100, contexts[begin:end], seed=5, context_offset=begin)
        assert all(np.array_equal(a, b[begin:end]) for a, b in zip(part, whole, strict=True))
    assert np.array_equal(flow.sample(100, contexts[7], seed=5, context_offset=7), whole[0][7])
    assert not np.array_equal(flow.sample(100, contexts[7], seed=6, context_offset=7), whole[0][7])
    assert not np.array_equal(flow.sample(100, contexts[7], seed=5), whole[0][7])


def test_many_contexts_with_one_sample_each(core, dtype):
    flow = make.case("13 (49, 50) 3", dtype).flow
    contexts = np.random.default_rng(0).normal(size=(1000, 3))
    x, density = flow.sample_and_log_prob(1, contexts, seed=1)
    assert x.shape == (1000, 1, 13) and density.shape == (1000, 1)
    for k in (0, 1, 500, 999):
        assert np.array_equal(flow.sample(1, contexts[k], seed=1, context_offset=k), x[k])
    assert np.array_equal(flow.sample(3, contexts, seed=1)[:, :1], x)


@pytest.mark.parametrize("name", ["front", "13 (49, 50) 3", "relu-exp"])
def test_float32_samples_are_float64_samples(backend, name):
    case = make.case(name, "float32")
    own = None if case.context is None else case.context[0]
    single, double = (flow.sample(200, own, seed=4) for flow in (case.flow, case.flow.astype("float64")))
    assert_close("refinement", "float32", single, double, factor=10)


@pytest.mark.filterwarnings("ignore:samples are rounded:RuntimeWarning")
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_samples_lie_strictly_inside(backend, dtype, scale):
    """At the edge of what the dtype can tell apart, and with finite densities."""
    bounds = [(0, 1), (1, 1 + 1e-6), (0.1, 0.3), (3, None), (None, -1e6), (-1e30, None), (0, None)]
    front = [Elementwise.from_bounds(bounds), Affine(np.zeros(7), np.resize([scale, -scale], 7))]
    flow = fastmaf.Flow([*front, *make.flow(7, (9,), 1).layers], dtype=dtype)
    lower, upper = front[0].lower, front[0].upper
    drawn, density = flow.sample_and_log_prob(3000, seed=1)
    extreme = flow.from_noise(np.array([[-1e30], [-1e4], [-50], [50], [1e30]]) * np.ones(7))
    for x in (drawn.astype(np.float64), extreme.astype(np.float64)):
        assert ((lower < x) | np.isinf(lower)).all() and ((x < upper) | np.isinf(upper)).all() and not np.isnan(x).any()
    assert np.isfinite(density).all()
    assert np.isfinite(flow.log_prob(drawn)[np.isfinite(drawn).all(axis=1)]).all()


# The dtype of samples


@pytest.mark.parametrize("name", ["front", "13 (49, 50) 3", "fixed layers in front"])
def test_samples_of_either_dtype(backend, dtype, name):
    """The same but for rounding, of columns in the user's numbers; densities stay those of the flow."""
    case = make.case(name, dtype)
    flow, own = case.flow, None if case.context is None else case.context[:3]
    x, density = flow.sample_and_log_prob(50, own, seed=4)
    rows = flow.from_noise(case.noise, case.context)
    for other in ("float32", "float64"):
        y, same = flow.sample_and_log_prob(50, own, seed=4, dtype=other)
        assert y.dtype == other and same.dtype == dtype and np.array_equal(same, density)
        again = flow.from_noise(case.noise, case.context, dtype=other)
        assert again.dtype == other and np.array_equal(flow.sample(50, own, seed=4, dtype=other), y)
        out = np.empty(y.shape, other)
        assert flow.sample(50, own, seed=4, out=out) is out and np.array_equal(out, y)
        for ours, theirs in ((y, x), (again, rows)):
            assert np.array_equal(ours.astype("f4"), theirs.astype("f4"))


def test_a_large_offset_is_resolved_in_float64(backend):
    """Times in GPS seconds, known to milliseconds, of a float32 flow."""
    flow = fastmaf.Flow([Affine([1.2e9, 0], [1e3, 1]), *make.flow(2, (9,), 1).layers], dtype="float32")
    plain = fastmaf.Flow(flow.layers[1:], dtype="float32")
    x, density = flow.sample_and_log_prob(2000, seed=1, dtype="float64")
    assert np.abs((x[:, 0] - 1.2e9) * 1e3 - plain.sample(2000, seed=1)[:, 0]).max() < 1e-3
    assert np.abs(flow.log_prob(x) - density).max() < 1e-2
    assert np.unique(flow.sample(2000, seed=1)[:, 0]).size == 1


SAMPLERS = {
    "sample": lambda **seed: fastmaf.MADE(3, hidden_features=(4,), seed=1).sample(20, **seed),
    "sample_and_log_prob": lambda **seed: fastmaf.MADE(3, hidden_features=(4,), seed=1).sample_and_log_prob(20, **seed)[0],
    "sample_given": lambda **seed: fastmaf.MADE(3, hidden_features=(4,), seed=1).sample_given([0.5], 20, **seed),
    "an ensemble's": lambda **seed: fastmaf.MADE(3, hidden_features=(4,), masks=3, seed=1).sample(20, **seed),
    "an ensemble's with log_prob": lambda **seed: fastmaf.MADE(3, hidden_features=(4,), masks=3, seed=1).sample_and_log_prob(20, **seed)[0],
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_seeds_of_numpy(name):
    def three(**seed):
        return [SAMPLERS[name](**seed).tobytes() for _ in range(3)]

    assert len({*three(), *three(seed=None)}) == 6
    for kind in (np.random.default_rng, np.random.PCG64):
        assert len(set(three(seed=kind(3)))) == 3 and three(seed=kind(3)) == three(seed=kind(3))
        with pytest.raises(ValueError, match="offset is 1, but seed is a generator"):
            SAMPLERS[name](seed=kind(3), offset=1)
    sequence = np.random.SeedSequence(3)
    assert three(seed=sequence) == 3 * three(seed=np.random.SeedSequence(3))[:1]
    assert SAMPLERS[name](seed=sequence, offset=5)[:15].tobytes() == SAMPLERS[name](seed=sequence)[5:].tobytes()
    assert three(seed=np.int64(3)) == three(seed=3)


def test_ensembles_sample_in_either_dtype():
    ensemble = fastmaf.MADE(features=3, masks=4, seed=1)
    single, (double, density) = ensemble.sample(200, seed=1), ensemble.sample_and_log_prob(200, seed=1, dtype="float64")
    assert double.dtype == np.float64 and density.dtype == np.float32 and np.array_equal(double.astype("f4"), single)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int32"}, "dtype is 'int32'; it must be 'float32' or 'float64'"),
        ({"dtype": "float32", "out": np.empty((3, 1))}, "dtype is float32 and out has dtype float64; leave one of them out"),
        ({"out": np.empty((3, 1), int)}, "out has shape (3, 1) and dtype int64; the result has shape (3, 1) and dtype float64"),
        ({"dtype": "float32"}, "column 'a' has bounds (1.0, 1.000000001), between which float32 has no number; widen them or take"),
    ],
)
def test_wrong_dtypes_of_samples(options, message):
    flow = fastmaf.MAF(1, bounds=[(1, 1 + 1e-9)], names=["a"], dtype="float64")
    with pytest.raises(ValueError, match=re.escape(message)):
        flow.sample(3, **options)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(st.data())
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bounds_hold(dtype, data):
    """Samples lie strictly inside, whatever their dtype, and have a finite density; or no number of the dtype does."""
    lower = data.draw(st.one_of(st.none(), st.sampled_from(ENDS), st.floats(-1e30, 1e30)))
    width = data.draw(st.one_of(st.none(), st.sampled_from([5e-324, 1e-45, 1e-12, 1.0, 4.0]), st.floats(1e-320, 1e30)))
    upper = data.draw(st.one_of(st.none(), st.sampled_from(ENDS))) if lower is None else None if width is None else lower + width
    if lower is not None and upper is not None and width is not None and data.draw(st.booleans()):
        upper = float(np.nextafter(np.dtype(dtype).type(lower), np.inf)) if data.draw(st.booleans()) else upper
    if lower is not None and upper is not None and not lower < upper:
        return
    scale = data.draw(st.sampled_from([1.0, 0.01, 1e-4]))
    below, above = -math.inf if lower is None else lower, math.inf if upper is None else upper

    def inside(kind):
        number = np.dtype(kind).type
        values = [number(below) if math.isfinite(below) else number(above)]
        values = [*values, np.nextafter(values[0], number(np.inf)), np.nextafter(values[0], number(-np.inf))]
        return below == -above or any(below < float(value) < above and np.isfinite(value) for value in values)

    with np.errstate(all="ignore"):
        exists = {kind: inside(kind) for kind in ("float32", "float64")}
    layers = [Elementwise.from_bounds([(lower, upper)]), Affine([0.0], [scale]), *make.flow(1, (), 1).layers]
    if not exists[dtype]:
        with pytest.raises(ValueError, match="column 0 has bounds .*, between which float.* has no number; widen them"):
            fastmaf.Flow(layers, dtype=dtype)
        return
    flow = fastmaf.Flow(layers, dtype=dtype)
    noise = np.array([0, 1, -1, 5, -5, 1e2, -1e2, 1e6, -1e6, 1e30, -1e30])[:, None]
    for backend in BOUNDED:
        for kind in ("float32", "float64"):
            with make.using(backends.require(backend)):
                if not exists[kind]:
                    with pytest.raises(ValueError, match="has no number"):
                        flow.from_noise(noise, dtype=kind)
                    continue
                x = np.concatenate([flow.from_noise(noise, dtype=kind), flow.sample(20, seed=1, dtype=kind)])
                assert x.dtype == kind and ((below < x.astype(float)) & (x.astype(float) < above)).all()
                assert np.isfinite(x).all() or below == -above
                assert np.isfinite(flow.log_prob(x)[np.isfinite(x[:, 0])]).all() or below == -above


def test_samples_that_overflow(backend, dtype):
    """Where the sums of a density are NaN it is that of the row: NaN if that has a NaN, else zero."""
    ranks, rng = np.array([1, 2, 3]), np.random.default_rng(1)
    net = make.conditioner(rng, ranks, (8,), activation="tanh")
    exponent = np.log(np.finfo(dtype).max) - 1  # the core's scales end at half the largest number
    bias = np.where(np.arange(6) % 2, [[0, exponent, 0, 0, 0, 0]], net.final.bias)[0]
    steep = Autoregressive(ranks, dataclasses.replace(net, final=dataclasses.replace(net.final, bias=bias)), Law("exp"))
    flow = fastmaf.Flow([*make.flow(3, (8,), 1, order="sequential").layers, steep], dtype=dtype)
    x, density = flow.sample_and_log_prob(500, seed=1)
    assert not np.isfinite(x).all() and np.isfinite(x).all(axis=1).any()
    assert np.array_equal(np.isnan(density), np.isnan(x).any(axis=1)) and (density[~np.isnan(density)] < np.inf).all()


# Distributions


def gaussian_flow(dtype):
    """x_i = b_i + sum of w_ij x_j over the columns in front + s_i z_i, hence a Gaussian: the flow, its mean and its covariance."""
    rng = np.random.default_rng(8)
    ranks, b, s = np.array([2, 3, 1]), rng.normal(size=3), np.array([0.5, 2.0, 1.2])
    w = rng.normal(size=(3, 3)) * (ranks[:, None] > ranks)
    weight, bias = np.zeros((6, 3)), np.zeros(6)
    weight[::2], bias[::2], bias[1::2] = w, b, np.log(s)
    flow = fastmaf.Flow([Autoregressive(ranks, Conditioner(None, (), Dense(weight, bias), "relu", False), Law("exp"))], dtype=dtype)
    inverse = np.linalg.inv(np.eye(3) - w)
    return flow, inverse @ b, inverse @ np.diag(s**2) @ inverse.T


def test_samples_of_a_gaussian(backend, dtype):
    flow, mean, covariance = gaussian_flow(dtype)
    n = 20_000
    x = flow.sample(n, seed=1).astype(np.float64)
    for j in range(3):
        assert stats.kstest((x[:, j] - mean[j]) / math.sqrt(covariance[j, j]), "norm").pvalue > tolerances.P_VALUE
    white = np.linalg.solve(np.linalg.cholesky(covariance), (x - mean).T)
    assert stats.chi2.sf(n * (white.mean(axis=1) ** 2).sum(), 3) > tolerances.P_VALUE
    errors = math.sqrt(n) * (white @ white.T / n - np.eye(3))[np.triu_indices(3)] / np.sqrt([2, 1, 1, 2, 1, 2])
    assert stats.chi2.sf((errors**2).sum(), 6) > tolerances.P_VALUE
    assert stats.kstest((white**2).sum(axis=0), "chi2", (3,)).pvalue > tolerances.P_VALUE
    exact = stats.multivariate_normal(mean, covariance).logpdf(x)
    assert_close("density of samples", dtype, flow.log_prob(x), exact)


def test_noise_is_standard_normal_and_independent(backend, dtype):
    """Between columns, neighbours in the stream, seeds and contexts."""
    flow = fastmaf.Flow([], features=6, dtype=dtype)
    n = 20_000
    draws = [flow.sample(n, seed=1), flow.sample(n, seed=2), flow.sample(n, seed=1, context_offset=1), flow.sample(n, seed=1, offset=n)]
    z = np.concatenate([*draws, np.roll(draws[0], 1, axis=0)], axis=1).astype(np.float64)
    for column in z.T[:24]:
        assert stats.kstest(column, "norm").pvalue > tolerances.P_VALUE / 24
    correlation = math.sqrt(n) * np.corrcoef(z.T)[np.triu_indices(30, 1)]
    assert stats.kstest(correlation, "norm").pvalue > tolerances.P_VALUE
    assert np.abs(correlation).max() < stats.norm.isf(tolerances.P_VALUE / correlation.size)
    assert (np.abs(draws[0]) < 6.7).all() and (np.abs(draws[0]) > 3.5).any()


def test_states_of_an_ensemble_come_as_often_as_their_probabilities_say(core, dtype):
    """Over many ensembles and seeds together: four million draws show what one test of many would only hint at by chance."""
    states, n, p_values = np.arange(64)[:, None] >> np.arange(6) & 1, 200_000, []
    for seed in range(20):
        ensemble = fastmaf.MADE(6, "bernoulli", hidden_features=(16,), masks=8, seed=seed, dtype=dtype)
        p = np.exp(ensemble.log_prob(states).astype("f8"))
        assert abs(p.sum() - 1) < 1e-6
        assert (n * p).min() > 20, "cells large enough for the test"
        found = np.bincount(ensemble.sample(n, seed=1000 + seed).astype(int) @ (1 << np.arange(6)), minlength=64)
        p_values.append(stats.chisquare(found, n * p / p.sum()).pvalue)
    assert stats.combine_pvalues(p_values).pvalue > tolerances.P_VALUE
    assert stats.kstest(p_values, "uniform").pvalue > tolerances.P_VALUE


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_samples_that_are_rounded_away_from_their_density_are_said(dtype):
    x = np.random.default_rng(0).normal(size=(300, 2))
    flow = fastmaf.MAF(2, transforms=1, hidden_features=(4,), seed=0, dtype=dtype, names=["t", "y"])
    flow.layers = [dataclasses.replace(flow.layers[0], loc=[1.7e9, 0.0]), *flow.layers[1:]]
    flow.sample_and_log_prob(50, seed=1, dtype="float64")
    with pytest.warns(RuntimeWarning, match=r"samples are rounded in column 't', .* log_prob is that of the rows before: draw with dtype"):
        flow.sample_and_log_prob(50, seed=1, dtype="float32")
    near = fastmaf.MAF(2, transforms=1, hidden_features=(4,), bounds=[None, (0, 1)], seed=0, dtype=dtype)
    near.sample_and_log_prob(50, seed=1)
    near.layers = [near.layers[0], dataclasses.replace(near.layers[1], loc=[0.0, 30.0]), *near.layers[2:]]
    with pytest.warns(RuntimeWarning, match="samples are rounded in column 1"):
        near.sample_and_log_prob(50, seed=1, dtype="float32")
    assert np.isfinite(near.log_prob(np.c_[x[:, 0], np.full(300, 0.5)])).all()
