"""Gradients of every backend and instruction set: against the reference in float64, and against central differences."""

from __future__ import annotations

import make
import numpy as np
import pytest
from tolerances import assert_close

import fastmaf
from fastmaf import config
from fastmaf.layers import ACTIVATIONS

OPERATIONS = ("gradient", "gradient", "parameters")
DIFFERENCES = ["2 (1,) 0", "3 (2, 2) 0", "6 (3, 3) 2", "7 (17, 5) 1", *(f"{a}-exp_soft" for a in ACTIVATIONS), "tanh-exp", "clip", "blocks"]
DIFFERENCES += ["front", "front of 1", "without hidden layers", "fixed layers", "fixed layers in front"]


@pytest.fixture
def weights_too(backend):
    """The backends with gradients in parameters."""
    if backend == "numba":
        pytest.skip("the numba backend has no gradients in parameters")
    return backend


@pytest.mark.parametrize("name", make.CASES)
def test_equals_the_reference(backend, dtype, name):
    case = make.case(name, dtype)
    value, *gradients = case.flow.log_prob_and_grad(case.x, case.context)
    assert_close("log_prob", dtype, value, case.expected["log_prob"])
    pairs = list(zip(OPERATIONS, gradients, case.expected["gradients"], strict=False))
    if backend != "numba":
        pairs += zip(OPERATIONS, case.flow.vjp(case.x, case.context, case.cotangent), case.expected["vjp"], strict=True)
    for operation, actual, expected in pairs:
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert actual.dtype == dtype
            assert_close(operation, dtype, actual, expected)


@pytest.mark.parametrize("name", make.CASES)
def test_masked_weights_have_no_gradient(weights_too, dtype, name):
    case = make.case(name, dtype)
    gradient = case.flow.vjp(case.x, case.context, case.cotangent)[2]
    assert not gradient[case.flow.parameters() == 0].any()
    if gradient.size and not name.endswith(")"):
        assert np.count_nonzero(gradient) > gradient.size / 9


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences(backend, name):
    case = make.case(name, "float64")
    flow, rows = case.flow, make.calm_rows(case, 4)
    x, context, g = case.x[rows], None if case.context is None else case.context[rows], case.cotangent[rows]
    _, dx, dcontext = flow.log_prob_and_grad(x, context)
    assert_close("derivatives", "float64", dx, make.numerical_gradient(lambda v: flow.log_prob(v, context).sum(), x, 1e-6))
    if context is not None:
        assert_close("derivatives", "float64", dcontext, make.numerical_gradient(lambda v: flow.log_prob(x, v).sum(), context, 1e-6))
    if backend == "numba":
        return
    gradient, parameters = flow.vjp(x, context, g)[2], flow.parameters()
    rng = np.random.default_rng(0)
    free = np.flatnonzero(parameters)
    directions = [rng.normal(size=free.size) / np.sqrt(free.size) for _ in range(5)] * (free.size > 0)
    directions += [np.eye(1, free.size, k)[0] for k in rng.permutation(free.size)[:25]]
    for direction in directions:
        step = np.zeros(parameters.size)
        step[free] = 1e-6 * direction
        ends = [g @ flow.with_parameters(parameters + sign * step).log_prob(x, context) for sign in (1, -1)]
        assert_close("derivatives", "float64", gradient[free] @ direction, (ends[0] - ends[1]) / 2e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_at_the_kink(weights_too, dtype, activation):
    """Every unit of the first layer has the argument 0."""
    made = make.flow(4, (8, 8), 1, activation=activation, dtype=dtype)
    flow = made.with_parameters(np.where(np.isin(made.parameters(), made.layers[0].conditioner.initial.bias), 0, made.parameters()))
    x = np.zeros((20, 4), dtype)
    with make.reference():
        expected = flow.astype("float64").vjp(x, None, np.ones(20))
    for operation, actual, exact in zip(OPERATIONS, flow.vjp(x, None, np.ones(20)), expected, strict=True):
        if exact is not None:
            assert_close(operation, dtype, actual, exact)


def test_rows_outside_bounds_move_no_weight(weights_too, dtype):
    case = make.case("front", dtype)
    x, infinity = case.x.copy(), np.inf
    rows = np.arange(0, make.ROWS, 4)
    x[rows, 0] = np.resize([0, 1, -1, 2, infinity, -infinity], rows.size)
    x[rows, 1], x[rows, 5] = np.resize([1e30, -infinity, 0], rows.size), np.resize([0, infinity], rows.size)
    without = case.cotangent.copy()
    without[rows] = 0
    actual, expected = case.flow.vjp(x, case.context, case.cotangent), case.flow.vjp(case.x, case.context, without)
    for operation, a, b in zip(OPERATIONS, actual, expected, strict=True):
        assert_close(operation, dtype, a, b.astype(np.float64))
    assert not actual[0][rows].any() and not actual[1][rows].any()


def test_nan_stays_in_its_row(backend, dtype):
    case = make.case("7 (17, 5) 1", dtype)
    x, context = case.x.copy(), case.context.copy()
    x[::9, 3], context[1::9, 0] = np.nan, np.nan
    spoilt = np.isin(np.arange(make.ROWS) % 9, (0, 1))
    _, *gradients = case.flow.log_prob_and_grad(x, context)
    for actual, expected in zip(gradients, case.expected["gradients"], strict=True):
        assert np.isnan(actual[spoilt]).any(axis=1).all()
        assert_close("gradient", dtype, actual[~spoilt], expected[~spoilt])


@pytest.mark.parametrize(("x_shape", "context_shape"), [((9, 7), (1,)), ((9, 7), (3, 1, 1)), ((3, 9, 7), (3, 1, 1)), ((3, 9, 7), (1,))])
def test_sums_over_what_is_shared(backend, dtype, x_shape, context_shape):
    flow = make.case("7 (17, 5) 1", dtype).flow
    rng = np.random.default_rng(0)
    x, context, g = (rng.normal(size=shape).astype(dtype) for shape in (x_shape, context_shape, (3, 9)))
    shape = flow.log_prob(x, context).shape
    g = g[: len(shape) == 2 and 3 or 1].reshape(shape)
    each, of_each = np.broadcast_to(x, (*shape, 7)).reshape(-1, 7), np.broadcast_to(context, (*shape, 1)).reshape(-1, 1)
    with make.reference():
        ones = flow.astype("float64").log_prob_and_grad(each, of_each)[1:]
        weighted = flow.astype("float64").vjp(each, of_each, g.ravel())

    def summed(gradient, like):
        gradient = gradient.reshape(*shape, -1)
        own = (1,) * (gradient.ndim - like.ndim) + like.shape
        return gradient.sum(axis=tuple(k for k in range(gradient.ndim) if own[k] != gradient.shape[k])).reshape(like.shape)

    _, *gradients = flow.log_prob_and_grad(x, context)
    pairs = list(zip(gradients, ones, (x, context), strict=True))
    if backend != "numba":
        *gradients, parameters = flow.vjp(x, context, g)
        pairs += zip(gradients, weighted[:2], (x, context), strict=True)
        assert_close("parameters", dtype, parameters, weighted[2])
    for actual, expected, like in pairs:
        assert_close("gradient", dtype, actual, summed(expected, like))


@pytest.mark.parametrize(("hidden", "transforms", "n"), [((3,), 1, 70_000), ((100, 100), 3, 12_000)])
def test_chunks(core, hidden, transforms, n):
    """More rows than a chunk holds, which is 65,520 or what fits into 64 MB: sums of parts, and the same bits everywhere."""
    flow = make.flow(3, hidden, transforms, 2, dtype="float32")
    rng = np.random.default_rng(0)
    x, context, g = rng.normal(size=(n, 3)), rng.normal(size=(n, 2)), rng.normal(size=n)
    whole = flow.vjp(x, context, g)
    parts = [flow.vjp(x[part], context[part], g[part]) for part in np.array_split(np.arange(n), 5)]
    assert np.array_equal(whole[0], np.concatenate([part[0] for part in parts]))
    assert np.array_equal(whole[1], np.concatenate([part[1] for part in parts]))
    total = sum(part[2].astype(np.float64) for part in parts)
    assert_close("parameters", "float32", whole[2], total, factor=20)
    with fastmaf.num_threads(3):
        assert np.array_equal(flow.vjp(x, context, g)[2], whole[2])
    if core == "cpu-avx512" and "avx2" in config.available_isas():
        fastmaf.set_isa("avx2")
        assert np.array_equal(flow.vjp(x, context, g)[2], whole[2])
