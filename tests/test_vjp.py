"""Gradients of every backend and instruction set: against the reference in float64, and against central differences."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace

import make
import numpy as np
import pytest
from tolerances import assert_close

import fastmaf
from fastmaf import _gradients, backends, config
from fastmaf.backends import reference
from fastmaf.layers import ACTIVATIONS, BatchNorm, Linear
from fastmaf.record import trainable

OPERATIONS = ("gradient", "gradient", "parameters")
DIFFERENCES = ["2 (1,) 0", "3 (2, 2) 0", "6 (3, 3) 2", "7 (17, 5) 1", *(f"{a}-exp_soft" for a in ACTIVATIONS), "tanh-exp", "clip", "blocks"]
DIFFERENCES += ["front", "front of 1", "without hidden layers", "fixed layers", "fixed layers in front"]


@pytest.fixture
def weights_too(backend):
    """The backends with gradients in parameters."""
    if backend == "numba":
        pytest.skip("the numba backend has no gradients in parameters")
    return backend


@pytest.mark.parametrize("name", [*make.CASES, *make.MIXTURES])
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


@pytest.mark.parametrize("name", [name for name in [*make.CASES, *make.MIXTURES] if "linear_residual blocks" not in name])
def test_masked_weights_have_no_gradient(weights_too, dtype, name):
    """Of flows without zeros where no mask asks for them."""
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


@pytest.mark.parametrize("name", ["7 (17, 5) 1", "relu-exp", "affine exp_soft", "without hidden layers", "mixture"])
@pytest.mark.parametrize("far", [1e200, 1e308, np.inf, -np.inf])
def test_rows_of_density_zero_move_no_weight(weights_too, dtype, name, far):
    """Nor the gradients of their neighbours, also where they are the last ones of a tile."""
    if name == "mixture":
        flow = fastmaf.MADE(5, "mixture", 1, (9, 8), components=3, seed=1, dtype=dtype)
        x, context = make.rows(flow, make.ROWS, make.contexts(flow, make.ROWS)), make.contexts(flow, make.ROWS)
    else:
        case = make.case(name, dtype)
        flow, x, context = case.flow, case.x, case.context
    moved, of_moved = x.astype(np.float64), None if context is None else context.astype(np.float64)
    rows = np.arange(0, make.ROWS, 5)
    moved[rows, rows % flow.features] = far
    if of_moved is not None:
        of_moved[rows[::2]] = far
    cotangent = np.random.default_rng(0).normal(size=make.ROWS)
    without = cotangent.copy()
    without[rows] = 0
    assert (flow.log_prob(moved, of_moved)[rows] == -np.inf).all()
    actual, expected = flow.vjp(moved, of_moved, cotangent), flow.vjp(x, context, without)
    for operation, a, b in zip(OPERATIONS, actual, expected, strict=True):
        if b is not None:
            assert_close(operation, dtype, a, b.astype(np.float64))
    assert not actual[0][rows].any() and (context is None or not actual[1][rows].any())


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


FORMS = [
    ((9, 7), (1,)),
    ((9, 7), (9, 1)),
    ((9, 7), (5, 1, 1)),
    ((5, 9, 7), (1,)),
    ((5, 9, 7), (5, 1, 1)),
    ((5, 9, 7), (5, 9, 1)),
    ((1, 7), (5, 1, 1)),
    ((5, 1, 7), (5, 1, 1)),
    ((0, 7), (5, 1, 1)),
    ((9, 7), (1, 1)),
    ((1, 7), (9, 1)),
    ((5, 9, 7), (5, 1)),
]


@pytest.mark.parametrize(("x_shape", "context_shape"), FORMS)
@pytest.mark.parametrize("budget", [1, 40, 300])
def test_blocks_change_no_sum(weights_too, dtype, monkeypatch, x_shape, context_shape, budget):
    """Of one row, of some of the rows of one context, of some contexts with all their rows."""
    flow = make.case("7 (17, 5) 1", dtype).flow
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=x_shape), rng.normal(size=context_shape)
    g = rng.normal(size=flow.log_prob(x, context).shape)
    whole = (*flow.log_prob_and_grad(x, context), *flow.vjp(x, context, g))
    monkeypatch.setattr(_gradients, "BUDGET", budget * np.dtype(dtype).itemsize)
    parts = (*flow.log_prob_and_grad(x, context), *flow.vjp(x, context, g))
    for operation, actual, expected in zip(("log_prob", *OPERATIONS[:2], *OPERATIONS), parts, whole, strict=True):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype == dtype
        assert_close(operation, dtype, actual, expected.astype(np.float64))


@pytest.mark.parametrize("budget", [100, 8 << 20])
def test_shared_gradients_are_summed_in_double(backend, monkeypatch, budget):
    """A sum in float32 would be off by tens of its last digit."""
    flow = make.case("7 (17, 5) 1", "float32").flow
    rng = np.random.default_rng(0)
    x, contexts = rng.normal(size=(2, 7)).astype("f4"), rng.normal(size=(3000, 1, 1)).astype("f4")
    _, each, _ = flow.log_prob_and_grad(np.broadcast_to(x, (3000, 2, 7)), contexts)
    rows = rng.normal(size=(3000, 7)).astype("f4")
    _, _, of_each = flow.log_prob_and_grad(rows, np.broadcast_to(contexts[0, 0], (3000, 1)))
    monkeypatch.setattr(_gradients, "BUDGET", budget)
    dx, dcontext = flow.log_prob_and_grad(x, contexts)[1], flow.log_prob_and_grad(rows, contexts[0, 0])[2]
    for actual, parts in ((dx, each.reshape(3000, -1)), (dcontext, of_each)):
        exact = np.array([math.fsum(column) for column in parts.T.astype(np.float64).tolist()])
        assert (np.abs(actual.ravel() - exact) <= np.spacing(np.abs(actual.ravel()))).all()


class Filling:
    """A backend whose gradients are all 1."""

    name = "filling"

    def unsupported(self, flow):
        return None

    def vjp(self, flow, x, context, cotangent, value, dx, dcontext, dparameters):
        assert x.shape == dx.shape and all(out.flags.c_contiguous for out in (cotangent, value, dx, dcontext))
        value[...], dx[...], dcontext[...] = 0, 1, 1
        if dparameters is not None:
            dparameters[:] = cotangent.sum()


@pytest.mark.parametrize(("x_shape", "context_shape"), [((1500, 5), (1500, 1, 20)), ((1500, 1500, 5), (20,)), ((2_000_000, 5), (20,))])
def test_gradients_take_little_memory(x_shape, context_shape):
    x, context = (np.broadcast_to(np.float32(0.5), shape) for shape in (x_shape, context_shape))
    flow = fastmaf.MAF(5, context_features=20, transforms=1, hidden_features=(8,))
    rows = np.prod(x_shape[:-1]) * (context_shape[0] if len(x_shape) == 2 and len(context_shape) == 3 else 1)
    shape = x_shape[:-1] if len(context_shape) == 1 else (1500, 1500)
    ones = np.broadcast_to(np.int8(1), shape)
    with make.using(Filling()):
        for call in (lambda: flow.log_prob_and_grad(x, context), lambda: flow.vjp(x, context, ones)):
            tracemalloc.start()
            *_, last = results = call()
            beyond = tracemalloc.get_traced_memory()[1] - sum(array.nbytes for array in results)
            tracemalloc.stop()
            assert beyond <= 64 << 20
            assert (last == (rows if last.ndim == 1 else 1500)).all()


# Every model


def equal_components(dtype):
    """A mixture of four times the same Gaussian, N(0.5, e^0.6)."""
    made = fastmaf.MADE(1, "mixture", components=4, seed=1, dtype=dtype)
    net = made.base.conditioner
    bias = np.repeat([0.3, 0.5, 0.3 / (1 - 0.3 / made.base.constants["clip"])], 4)
    base = replace(made.base, conditioner=replace(net, final=replace(net.final, weight=0 * net.final.weight, bias=bias)))
    return fastmaf.Flow([], base, dtype=dtype)


@pytest.mark.parametrize("far", [1.0, 1e4, 1e8, 1e15, 1e18])
def test_shares_of_components_sum_to_one(weights_too, dtype, far):
    """Also far out, where the logarithm of their sum is lost beside those of the terms."""
    flow = equal_components(dtype)
    x = np.array([[far], [-far]])
    dx, _, dparameters = flow.vjp(x, None, np.ones(2))
    np.testing.assert_allclose(dx, (0.5 - x) * np.exp(-0.6), rtol=1e-5)
    of_logits = dparameters[-12:-8]
    np.testing.assert_allclose(of_logits, 0, atol=1e-6)


@pytest.mark.parametrize("far", [1e3, 1e6, 1e8])
@pytest.mark.parametrize("conditional", ["gaussian", "mixture"])
def test_slopes_of_raw_log_scales_far_beyond_the_clip(weights_too, dtype, conditional, far):
    """They are small, not lost: beside them stand squares of numbers that are large."""
    flow = fastmaf.MADE(2, conditional, hidden_features=(9,), components=1, activation="tanh", seed=3, dtype=dtype)
    flow = flow.with_parameters(flow.parameters() * far)
    x, g = np.array([[0.3, far], [-0.7, -far]], dtype), np.ones(2)
    with make.reference():
        expected = flow.astype("float64").vjp(x, None, g)
    for actual, exact in zip(flow.vjp(x, None, g)[::2], expected[::2], strict=True):
        np.testing.assert_allclose(actual, exact, rtol=1e5 * np.finfo(dtype).eps, atol=1e-30)


def mixed(features, blocks=2, **options):
    return fastmaf.MAF(features, transforms=2, hidden_features=(9,) * blocks, residual=True, seed=2, **options)


MODELS = {
    "mixture": lambda **o: fastmaf.MADE(5, "mixture", 1, (9, 8), components=3, order="random", **o),
    "mixture of 1": lambda **o: fastmaf.MADE(1, "mixture", 2, (3,), components=2, **o),
    "mixture without hidden layers": lambda **o: fastmaf.MADE(4, "mixture", hidden_features=(), components=4, **o),
    "bernoulli": lambda **o: fastmaf.MADE(7, "bernoulli", 2, (17,), "tanh", direct=True, **o),
    "bernoulli of 1": lambda **o: fastmaf.MADE(1, "bernoulli", 0, (4,), **o),
    "categorical": lambda **o: fastmaf.MADE(4, "categorical", 1, (9, 5), categories=(2, 7, 3, 4), **o),
    "mixed": lambda **o: fastmaf.MADE(5, "mixed", 1, (9, 8), components=3, categories=(None, 3, None, 2, 7), order="random", **o),
    "residual mixed": lambda **o: fastmaf.MADE(2, "mixed", 0, (6, 6), residual=True, direct=True, categories=(300, None), **o),
    "residual": lambda **o: mixed(6, context_features=2, activation="silu", **o),
    "residual of three blocks": lambda **o: mixed(3, 3, **o),
    "residual bernoulli": lambda **o: fastmaf.MADE(6, "bernoulli", 0, (9, 9), residual=True, **o),
    "direct": lambda **o: fastmaf.MAF(5, 1, transforms=2, hidden_features=(7,), direct=True, **o),
    "linear": lambda **o: mixed(5, context_features=1, linear=True, **o),
    "linear of 1": lambda **o: mixed(1, linear=True, **o),
    "batch norm": lambda **o: fastmaf.MAF(5, 2, transforms=3, hidden_features=(8, 7), batch_norm=True, **o),
    "everything": lambda **o: mixed(
        4, context_features=2, batch_norm="act", components=3, linear=True, direct=True, bounds=[None, (-9, 9), None, (-9, None)], **o
    ),
}
"""Flows of the factories; their weights are drawn anew."""


def model(name, dtype):
    """The flow in the dtype, the arguments of `vjp`, and its results in float64; all parameters and statistics random."""
    rng = np.random.default_rng(0)
    exact = MODELS[name](dtype="float64")
    records = (*exact.layers, exact.base)
    arrays = [array for record in records for array in trainable(record)]
    scales = [0.6 / np.sqrt(array.shape[1]) if array.ndim == 2 else 0.3 for array in arrays]
    free = [mask for record in records for mask in reference.free(record)]
    vector = np.concatenate([np.where(m, s * rng.normal(size=a.shape), 0).ravel() for m, s, a in zip(free, scales, arrays, strict=True)])
    position = 0
    for record in records:  # the diagonal of a Linear stays away from zero
        start, position = position, position + sum(array.size for array in trainable(record))
        if isinstance(record, Linear):
            n = record.bias.size
            vector[start + n * n : start + 2 * n * n : n + 1] += 1
    exact = exact.with_parameters(vector.astype(dtype))
    layers = [
        replace(layer, mean=0.3 * rng.normal(size=exact.features), var=rng.uniform(0.5, 2, exact.features))
        if isinstance(layer, BatchNorm)
        else layer
        for layer in exact.layers
    ]
    exact = exact._with(layers=layers).astype(dtype).astype("float64")
    x, counts = rng.normal(size=(61, exact.features)), np.array(exact.record.values)
    if counts.any():
        x = np.where(counts > 0, rng.integers(np.maximum(counts, 1), size=x.shape), x)
    arguments = x.astype(dtype), make.contexts(exact, 61), rng.normal(size=61).astype(dtype)
    with make.reference():
        expected = exact.vjp(*arguments)
    flow = exact.astype(dtype)
    backend = backends.choose()
    if missing := backend.unsupported(flow.record):
        pytest.skip(f"the {backend.name} backend has no kernel for {missing}")
    return flow, arguments, expected


@pytest.mark.parametrize("name", MODELS)
def test_every_model_equals_the_reference(weights_too, dtype, name):
    flow, arguments, expected = model(name, dtype)
    results = flow.vjp(*arguments)
    for operation, actual, exact in zip(OPERATIONS, results, expected, strict=True):
        assert (actual is None) == (exact is None)
        if actual is not None:
            assert_close(operation, dtype, actual, exact, factor=3)
    assert not results[2][flow.parameters() == 0].any()


@pytest.mark.parametrize("name", MODELS)
def test_differences_of_every_model(weights_too, name):
    flow, (x, context, g), _ = model(name, "float64")
    x, g, context = x[:4], g[:4], None if context is None else context[:4]
    dx, dcontext, dparameters = flow.vjp(x, context, g)
    if dx is not None:
        assert_close("derivatives", "float64", dx, make.numerical_gradient(lambda v: g @ flow.log_prob(v, context), x, 1e-6))
    if dcontext is not None:
        assert_close("derivatives", "float64", dcontext, make.numerical_gradient(lambda v: g @ flow.log_prob(x, v), context, 1e-6))
    parameters = flow.parameters()
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(parameters))[:60]

    def moved(values):
        vector = parameters.copy()
        vector[chosen] = values
        return g @ flow.with_parameters(vector).log_prob(x, context)

    assert_close("derivatives", "float64", dparameters[chosen], make.numerical_gradient(moved, parameters[chosen], 1e-6))


# Many rows


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
