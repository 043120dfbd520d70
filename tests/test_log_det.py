"""log|det| of the maps to noise and from it, of every backend and instruction set: the reference, the density, and rows that have none."""

from __future__ import annotations

import math

import make
import numpy as np
import pytest
import tolerances
from tolerances import assert_close

import fastmaf

INF = float("inf")


def factor_of(backend, dtype):
    return tolerances.PRECISIONS["high"] if backend == "cuda" and dtype == "float32" else 1


@pytest.mark.parametrize("name", make.CASES)
def test_equals_the_reference(backend, dtype, name):
    case = make.case(name, dtype)
    factor = factor_of(backend, dtype)
    with make.reference():
        exact = case.flow.astype("float64")
        there = exact.to_noise(case.x, case.context, log_det=True)[1]
        back = exact.from_noise(case.noise, case.context, log_det=True)[1]
    for n in (make.ROWS, 1, 2):
        own = None if case.context is None else case.context[-n:]
        noise, log_det = case.flow.to_noise(case.x[-n:], own, log_det=True)
        assert log_det.dtype == dtype and np.array_equal(noise, case.flow.to_noise(case.x[-n:], own))
        assert_close("log_prob", dtype, log_det, there[-n:], factor)
        x, log_det = case.flow.from_noise(case.noise[-n:], own, log_det=True)
        assert log_det.dtype == dtype and np.array_equal(x, case.flow.from_noise(case.noise[-n:], own))
        assert_close("log_prob", dtype, log_det, back[-n:], factor)


@pytest.mark.parametrize("name", ["6 (3, 3) 2", "7 (17, 5) 1", "blocks", "front", "fixed layers in front"])
def test_is_that_of_differences(backend, name):
    case = make.case(name, "float64")
    n, features, step = 3, case.flow.features, 3e-7
    chosen = make.calm_rows(case, n)
    context = None if case.context is None else case.context[chosen]
    repeated = None if context is None else np.repeat(context, 2 * features, axis=0)
    noise = case.flow.to_noise(case.x[chosen], context)
    for operation, at in ((case.flow.to_noise, case.x[chosen]), (case.flow.from_noise, noise)):
        moved = at[:, None] + np.concatenate([step * np.eye(features), -step * np.eye(features)])
        z = operation(moved.reshape(-1, features), repeated).reshape(n, 2, features, features)
        expected = np.linalg.slogdet((z[:, 0] - z[:, 1]) / (2 * step))[1]
        assert_close("differences", "float64", operation(at, context, log_det=True)[1], expected, factor=features)


def test_is_the_density_without_the_base(backend):
    """That of a mixture too, whose noise is what its base sees."""
    if backend == "numba":
        pytest.skip("the numba backend has no mixture")
    flow = fastmaf.MAF(3, transforms=2, components=4, hidden_features=(9,), bounds=[(-9, 9), None, None], dtype="float64", seed=2)
    x = np.random.default_rng(0).normal(size=(40, 3))
    noise, log_det = flow.to_noise(x, log_det=True)
    base = fastmaf.Flow([], flow.base, dtype="float64")
    assert_close("log_prob", "float64", log_det + base.log_prob(noise), flow.log_prob(x), factor=4)


@pytest.mark.parametrize("x_shape", [(7, 5), (3, 7, 5), (1, 5)])
def test_shapes(backend, dtype, x_shape):
    flow = make.flow(5, (9, 8), context_features=2, affine=True, activation="elu", dtype=dtype)
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=x_shape), rng.normal(size=(3, 1, 2))
    for operation in (flow.to_noise, flow.from_noise):
        result, log_det = operation(x, context, log_det=True)
        assert log_det.shape == result.shape[:-1] == (3, x_shape[-2])
        each = [operation(rows, own[0], log_det=True)[1] for rows, own in zip(np.broadcast_to(x, (3, *x_shape[-2:])), context, strict=True)]
        assert_close("log_prob", dtype, log_det, np.array(each, "float64"))
    empty, none = flow.to_noise(np.empty((0, 5)), context[0, 0], log_det=True)
    assert empty.shape == (0, 5) and none.shape == (0,)


def test_rows_without_noise(backend, dtype):
    """What log_prob says of them: NaN for a NaN, -inf at and outside bounds, at infinity and too far out."""
    flow = fastmaf.MAF(3, 1, hidden_features=(8,), bounds=[(0, 1), None, None], dtype=dtype, seed=0)
    far = np.finfo(dtype).max
    lost = [[0, 0, 0], [1, 0, 0], [-1, 0, 0], [INF, 0, 0], [0.5, INF, 0], [0.5, -INF, 0], [0.5, 0, INF], [0.5, 0, -INF]]
    odd = [*lost, [0.5, 0, np.nan], [0.5, np.nan, 0], [np.nan, 0, 0], [1, 0, np.nan], [0.5, 0, 0], [0.5, 0, 0]]
    x, context = np.array(odd), np.zeros((len(odd), 1))
    context[-1] = np.nan
    for rows in (slice(None), *(slice(k, k + 1) for k in range(len(odd)))):  # together, and each alone
        noise, log_det = flow.to_noise(x[rows], context[rows], log_det=True)
        density = flow.log_prob(x[rows], context[rows])
        assert np.array_equal(np.isfinite(log_det), np.isfinite(noise).all(axis=1))
        assert np.array_equal(np.isfinite(log_det), np.isfinite(density))
        assert np.array_equal(log_det[~np.isfinite(log_det)], density[~np.isfinite(log_det)], equal_nan=True)
    assert np.isneginf(flow.to_noise(x, context, log_det=True)[1][: len(lost)]).all()
    # So far out that the density is zero, but not too far for the noise.
    noise, log_det = flow.to_noise([[0.5, 0, far / 1e3]], [0.0], log_det=True)
    assert np.isfinite(noise).all() and np.isfinite(log_det).all() and np.isneginf(flow.log_prob([[0.5, 0, far / 1e3]], [0.0]))


def test_rows_that_noise_has_none_of(backend, dtype):
    flow = fastmaf.MAF(3, hidden_features=(8,), bounds=[(0, 1), (0, None), None], dtype=dtype, seed=0)
    u = np.array([[np.nan, 0, 0], [0, 0, np.nan], [0, 1e30, 0], [INF, 0, 0], [0, 0, INF], [5e5, 0, 0], [0, 0, 0]])
    x, log_det = flow.from_noise(u, log_det=True)
    assert np.array_equal(np.isnan(log_det), np.isnan(x).any(axis=1))
    assert np.isnan(log_det[[0, 1, 4]]).all() and np.isfinite(log_det[[5, 6]]).all()
    assert log_det[2] > 1e29 and log_det[3] == -np.inf and log_det[5] < -1e4  # at the largest number, and against a bound


@pytest.mark.parametrize("name", ["7 (17, 5) 1", "front", "blocks", "larger than a cache"])
def test_bits(core, dtype, name):
    """Of a row: whatever stands beside it, and for any number of threads."""
    case = make.case(name, dtype)
    for operation, x in ((case.flow.to_noise, case.x), (case.flow.from_noise, case.noise)):
        whole = operation(x, case.context, log_det=True)[1]
        for rows in (slice(1), slice(2), slice(3, 20), slice(None, None, -1)):
            own = None if case.context is None else case.context[rows]
            assert np.array_equal(operation(x[rows], own, log_det=True)[1], whole[rows])
        for threads in (1, 3):
            with fastmaf.num_threads(threads):
                assert np.array_equal(operation(x, case.context, log_det=True)[1], whole)


def test_rows_in_another_dtype(backend):
    flow = fastmaf.MAF(2, hidden_features=(8,), bounds=[(0, 1), None], seed=0)
    u = np.random.default_rng(0).normal(size=(20, 2))
    x, log_det = flow.from_noise(u, dtype="float64", log_det=True)
    assert x.dtype == "float64" and log_det.dtype == "float32"
    assert np.array_equal(log_det, flow.from_noise(u, log_det=True)[1])


def test_discrete_variables_have_none(backend):
    if backend == "numba":
        pytest.skip("the numba backend has no discrete flows")
    flow = fastmaf.MADE(2, conditional="bernoulli", hidden_features=(4,))
    for operation in (flow.to_noise, flow.from_noise):
        with pytest.raises(ValueError, match="a flow with a bernoulli base has no noise"):
            operation(np.zeros((1, 2)), log_det=True)


def test_of_a_handle(core):
    case = make.case("front", "float64")
    handle = fastmaf.Handle(case.flow)
    handle.set_parameters(0.9 * case.flow.parameters())
    flow = handle.flow
    for name, x in (("to_noise", case.x), ("from_noise", case.noise)):
        for own, expected in zip(
            getattr(handle, name)(x, case.context, log_det=True), getattr(flow, name)(x, case.context, log_det=True), strict=True
        ):
            assert np.array_equal(own, expected)
    spoilt = np.where(np.arange(case.flow.features) == 1, math.nan, case.noise[:2])
    assert np.isnan(handle.from_noise(spoilt, case.context[:2], log_det=True)[1]).all()
