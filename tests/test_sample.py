"""from_noise and sample of every backend and instruction set: known answers, the reference, the density, and the distribution."""

from __future__ import annotations

import math

import make
import numpy as np
import pytest
import tolerances
from tolerances import assert_close

import fastmaf
from fastmaf import _reference
from fastmaf.layers import Affine, Autoregressive, Conditioner, Dense, Elementwise, Law

stats = pytest.importorskip("scipy.stats")


def noise(n, features, dtype, seed, context_row=0, offset=0):
    """By the reference."""
    index = np.arange(n, dtype=np.uint64) + np.uint64(offset)
    return _reference.normals(seed, index, np.full(n, context_row, np.uint64), features, np.dtype(dtype))


# Noise


@pytest.mark.parametrize(
    ("word", "answer"), [(0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"), (2**32 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd")]
)
def test_philox_known_answers(word, answer):
    assert " ".join(f"{int(w):08x}" for w in _reference.philox([word] * 4, word << 32 | word)) == answer


@pytest.mark.parametrize("rows", [0, 1, 2, 63, 64, 65, 2000])
@pytest.mark.parametrize(("seed", "stream", "epoch"), [(0, 3, 0), (2**64 - 1, 4, 2**32 - 1), (2**40 + 5, 3, 17)])
def test_words_of_the_core_are_exact(core, rows, seed, stream, epoch):
    """They are the keys by which rows are shuffled."""
    from fastmaf import _core

    assert np.array_equal(_core.shuffle(seed, stream, epoch, rows), _reference.shuffle(seed, stream, epoch, rows))


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
        assert stats.kstest(x[:, j], "norm", (mean[j], math.sqrt(covariance[j, j]))).pvalue > tolerances.P_VALUE
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
