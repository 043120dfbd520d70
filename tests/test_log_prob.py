"""log_prob and to_noise of every backend and instruction set, against the reference in float64; the bits are in test_bits.py."""

from __future__ import annotations

import dataclasses
import functools
import math

import make
import numpy as np
import pytest
import tolerances
from tolerances import assert_close

import fastmaf
from fastmaf.layers import ACTIVATIONS, Affine, Elementwise


@pytest.mark.parametrize("name", [*make.CASES, *make.MIXTURES])
def test_equals_the_reference(backend, dtype, name):
    case = make.case(name, dtype)
    factor = tolerances.PRECISIONS["high"] if backend == "cuda" and dtype == "float32" else 1
    for operation in ("log_prob", "to_noise"):
        expected = case.expected[operation]
        assert np.isfinite(expected).all()
        assert_close(operation, dtype, getattr(case.flow, operation)(case.x, case.context), expected, factor)
        for n in (1, 2):
            own = None if case.context is None else case.context[-n:]
            assert_close(operation, dtype, getattr(case.flow, operation)(case.x[-n:], own), expected[-n:], factor)


@pytest.mark.parametrize(
    ("x_shape", "context_shape"),
    [((7, 5), (2,)), ((7, 5), (7, 2)), ((7, 5), (3, 1, 2)), ((3, 7, 5), (2,)), ((3, 7, 5), (3, 1, 2)), ((3, 7, 5), (3, 7, 2))]
    + [((1, 5), (60, 1, 2)), ((60, 1, 5), (60, 1, 2)), ((2, 60, 5), (2, 1, 2)), ((1, 60, 5), (1, 1, 2)), ((60, 5), (1, 1, 2))],
)
def test_shapes(backend, dtype, x_shape, context_shape):
    flow = make.flow(5, (9, 8), context_features=2, affine=True, activation="elu", dtype=dtype)
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=x_shape).astype(dtype), rng.normal(size=context_shape).astype(dtype)
    value, noise = flow.log_prob(x, context), flow.to_noise(x, context)
    rows, of_rows = np.broadcast_to(x, noise.shape).reshape(-1, 5), np.broadcast_to(context, (*value.shape, 2)).reshape(-1, 2)
    with make.reference():
        exact = flow.astype("float64")
        assert_close("log_prob", dtype, value.ravel(), exact.log_prob(rows, of_rows))
        assert_close("to_noise", dtype, noise.reshape(-1, 5), exact.to_noise(rows, of_rows))


@pytest.mark.parametrize("name", ["6 (3, 3) 2", "7 (17, 5) 1", "blocks", "front", "front of 1", "front of 9", "fixed layers in front"])
def test_log_det_is_that_of_differences(backend, name):
    case = make.case(name, "float64")
    n, features, step = 3, case.flow.features, 3e-7
    rows = make.calm_rows(case, n)
    context = None if case.context is None else np.repeat(case.context[rows], 2 * features, axis=0)
    moved = case.x[rows, None] + np.concatenate([step * np.eye(features), -step * np.eye(features)])
    z = case.flow.to_noise(moved.reshape(-1, features), context).reshape(n, 2, features, features)
    log_det = np.linalg.slogdet((z[:, 0] - z[:, 1]) / (2 * step))[1]
    own = None if context is None else case.context[rows]
    noise = case.flow.to_noise(case.x[rows], own)
    expected = log_det - 0.5 * (noise**2).sum(axis=1) - 0.5 * features * math.log(2 * math.pi)
    assert_close("differences", "float64", case.flow.log_prob(case.x[rows], own), expected)


@functools.cache
def narrow_flow(features, hidden, offset):
    """A relu flow of five MADEs, the first of which narrows by e^offset; samples of it and their densities in float64."""
    flow = make.flow(features, hidden, 5, dtype="float32", seed=1)
    first = flow.layers[0]
    final = first.conditioner.final
    final = dataclasses.replace(final, bias=final.bias + np.resize([0, offset], final.bias.size))
    first = dataclasses.replace(first, conditioner=dataclasses.replace(first.conditioner, final=final))
    flow = fastmaf.Flow([first, *flow.layers[1:]])
    with make.using(None):  # the reference takes long to sample
        x = flow.from_noise(np.random.default_rng(0).normal(size=(40, features)))
    with make.reference():
        return flow, x, flow.astype("float64").log_prob(x)


@pytest.mark.parametrize(("features", "hidden", "offset"), tolerances.FLOAT32_LOG_PROB)
def test_float32_error(backend, features, hidden, offset):
    flow, x, expected = narrow_flow(features, hidden, offset)
    error = flow.log_prob(x) - expected
    rms, largest = tolerances.FLOAT32_LOG_PROB[features, hidden, offset]
    assert math.sqrt((error**2).mean()) <= rms and np.abs(error).max() <= largest


@pytest.mark.parametrize("name", [name for name, (features, *_) in zip(make.CASES, make.SHAPES, strict=False) if features > 1] + ["blocks"])
@pytest.mark.parametrize("n", [1, make.ROWS])
def test_a_masked_column_changes_nothing_and_another_does(core, dtype, name, n):
    """Bit for bit, in both directions, whatever stands in that column."""
    case = make.case(name, dtype)
    first = fastmaf.Flow(case.flow.layers[:1], context_features=case.flow.context_features, dtype=dtype)
    ranks, context = first.layers[0].ranks, None if case.context is None else case.context[:n]
    for operation in (first.to_noise, first.from_noise):
        before = operation(case.noise[:n], context)
        for j in range(first.features):
            moved = case.noise[:n].copy()
            moved[:, j] += 1
            with make.reference():
                exact = getattr(first.astype("float64"), operation.__name__)
                reached = np.abs(exact(moved, context) - exact(case.noise[:n], context)).max(axis=0) > tolerances.MOVED
            changed = (operation(moved, context) != before).any(axis=0)
            assert not changed[(ranks <= ranks[j]) & (np.arange(ranks.size) != j)].any()
            assert changed[reached].all() and reached[j]
            moved[:, j] = 1e30
            assert np.array_equal(operation(moved, context)[:, ranks < ranks[j]], before[:, ranks < ranks[j]])


# Bounds and NaN


def test_at_and_outside_bounds(backend, dtype):
    case = make.case("front", dtype)
    flow, x, context = case.flow, case.x.copy(), case.context
    infinity = np.inf
    wrong = [(0, 0.0), (0, 1.0), (0, -1e-9), (0, infinity), (0, -infinity), (2, 2.0), (2, 1.0), (2, infinity), (2, -infinity)]
    wrong += [(3, -1.0), (3, 0.0), (3, infinity), (3, -infinity), (4, -3.0), (4, 5.0), (4, 1e30)]
    for i, (j, value) in enumerate(wrong):
        x[3 * i, j] = value
    x[1, 0], x[1, 1] = 1, np.nan  # a NaN wins
    x[3, 1], x[6, 5] = 1e30, infinity  # nothing that stands beside a bound matters
    outside = np.isin(np.arange(make.ROWS), 3 * np.arange(len(wrong)))
    value, dx, dcontext = flow.log_prob_and_grad(x, context)
    for result in (value, flow.log_prob(x, context), np.concatenate([flow.log_prob(x[i : i + 1], context[i]) for i in range(make.ROWS)])):
        assert (result[outside] == -np.inf).all() and np.isnan(result[1])
        good = ~outside
        good[1] = False
        assert_close("log_prob", dtype, result[good], case.expected["log_prob"][good])
    assert not dx[outside].any() and not dcontext[outside].any()
    for actual, expected in zip((dx, dcontext), case.expected["gradients"], strict=True):
        assert_close("gradient", dtype, actual[good], expected[good])
    noise = flow.to_noise(x, context)
    assert np.isnan(noise[outside]).all() and np.isnan(noise[1]).any() and np.isfinite(noise[good]).all()


def test_nan_stays_in_its_row(backend, dtype):
    case = make.case("13 (49, 50) 3", dtype)
    for j in range(16):
        x, context = case.x.copy(), case.context.copy()
        spoilt = np.arange(j, make.ROWS, 16 + j)
        (x[:, j] if j < 13 else context[:, j - 13])[spoilt] = np.nan
        value = case.flow.log_prob(x, context)
        expected = np.where(np.isin(np.arange(make.ROWS), spoilt), np.nan, case.expected["log_prob"])
        assert_close("log_prob", dtype, value, expected)
        if j < 13:
            assert np.isnan(case.flow.to_noise(x, context)[spoilt, j]).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("n", [1, 60])
def test_nan_passes_every_activation(backend, dtype, activation, n):
    """That of a context reaches the density only through the networks."""
    flow = make.flow(6, (9, 7), 2, 2, activation, dtype=dtype)
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=(n, 6)), rng.normal(size=(n, 2))
    for array in (x, context):
        for j in range(array.shape[1]):
            kept, array[0, j] = array[0, j], np.nan
            value = flow.log_prob(x, context)
            assert np.isnan(value[0]) and np.isfinite(value[1:]).all()
            array[0, j] = kept


def test_nan_in_contexts_that_rows_share(backend, dtype):
    case = make.case("7 (17, 5) 1", dtype)
    assert np.isnan(case.flow.log_prob(case.x, [np.nan])).all()
    groups = np.array([[[0.5]], [[np.nan]], [[-0.5]]])
    value = case.flow.log_prob(case.x, groups)
    assert np.isnan(value[1]).all() and np.isfinite(value[[0, 2]]).all()
    with pytest.raises(ValueError, match="context is not finite in column 0 of 1 of 3 rows"):
        case.flow.sample(3, groups[:, 0], seed=0)


def test_contexts_with_bounds(backend, dtype):
    made = make.flow(4, (6,), context_features=2, dtype=dtype)
    front = [Elementwise.from_bounds([(0, 1), (None, 3)]), Affine([0.5, -0.5], [2, -1]), Affine([1, 1], [0.5, 0.5])]
    flow = fastmaf.Flow(made.layers, context_features=2, context_layers=front, dtype=dtype)
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=(50, 4)).astype(dtype), rng.uniform(0.1, 0.9, (50, 2)).astype(dtype)
    context[::7] = [[0, 0.5], [1, 0.5], [2, 0.5], [0.5, 3], [0.5, 4], [np.nan, 0.5], [0.5, np.nan], [-1, np.nan]]
    with make.reference():
        expected = flow.astype("float64").log_prob(x, context)
    assert np.isnan(expected).sum() == 8
    assert_close("log_prob", dtype, flow.log_prob(x, context), expected)
    assert_close("log_prob", dtype, np.concatenate([flow.log_prob(x[i : i + 1], context[i]) for i in range(50)]), expected)


# Numbers at the ends of their range


def test_front_layers_compute_in_float64(backend):
    made = make.flow(3, (5,), dtype="float32")
    x = np.random.default_rng(0).normal(size=(50, 3)) + 1e9
    far = fastmaf.Flow([Affine(np.full(3, 1e9), np.ones(3)), *made.layers])
    with make.reference():
        expected = made.astype("float64").log_prob((x - 1e9).astype("f4"))
    assert_close("log_prob", "float32", far.log_prob(x), expected)


@pytest.mark.parametrize(("scale", "dtype"), [(1e-38, "float32"), (1e-44, "float32"), (1e-308, "float64"), (1e-318, "float64")])
def test_denormal_numbers(backend, scale, dtype):
    """In x, in contexts and in weights."""
    case = make.case("6 (3, 3) 2", dtype)
    x, context = (scale * case.x).astype(dtype), (scale * case.context).astype(dtype)
    tiny = case.flow.with_parameters(case.flow.parameters() * scale)
    for flow in (case.flow, tiny):
        with make.reference():
            expected = flow.astype("float64").log_prob(x, context)
        assert_close("log_prob", dtype, flow.log_prob(x, context), expected)
        assert np.isfinite(flow.to_noise(x, context)).all()
        assert np.isfinite(flow.log_prob_and_grad(x, context)[1]).all()


def test_a_denormal_distance_to_a_bound(backend, dtype):
    front = [Elementwise.from_bounds([(0, 1), (0, None)]), Affine([0, 0], [0.01, 0.01])]
    flow = fastmaf.Flow([*front, *make.flow(2, (4,)).layers], dtype=dtype)
    x = np.array([[1e-310, 1.0], [0.5, 1e-310], [0.5, 5e-324], [1e-300, 1.0], [1e-290, 1e-290]])
    with make.reference():
        expected = flow.astype("float64").log_prob(x)
    assert np.isfinite(expected).all()
    assert_close("log_prob", dtype, flow.log_prob(x), expected)


FAR = [0.0, 1e-300, 1.0, 1e10, 1e19, 1e20, 1e38, 1e39, 1e155, 1e300, np.finfo(np.float64).max, np.inf]
FAR_FLOWS = [name for name in [*make.CASES, *make.MIXTURES] if "larger" not in name and "layer" not in name]


def far_rows(features, n, seed):
    """Some columns far out, or all of them; the last row has a NaN."""
    rng = np.random.default_rng(seed)
    x = rng.choice([-1.0, 1.0], (n, features)) * rng.choice(FAR, (n, features))
    x = np.where((rng.uniform(size=(n, features)) < 0.3) | (np.arange(n) % 3 == 0)[:, None], x, 0.1)
    x[-1, features // 2] = np.nan
    return x


@pytest.mark.parametrize("name", [*FAR_FLOWS, "mixture"])
def test_far_out_the_density_is_zero(backend, dtype, name):
    """Never NaN, though the sums meet inf - inf; so at infinity, in the context too. A NaN stays NaN."""
    if name == "mixture":
        flow = fastmaf.MADE(5, "mixture", 2, (9, 8), components=3, seed=1, dtype=dtype)
        if backend == "numba":
            pytest.skip("the numba backend has no mixture")
    else:
        flow = make.case(name, dtype).flow
    n, nan = 120, np.arange(120) == 119
    x = far_rows(flow.features, n, 1)
    contexts = [None] if not flow.context_features else [np.full((n, flow.context_features), 0.2), far_rows(flow.context_features, n, 2)]
    for context in contexts:
        value, *gradients = flow.log_prob_and_grad(x, context)
        alone = np.concatenate([flow.log_prob(x[i : i + 1], None if context is None else context[i]) for i in range(n)])
        for result in (flow.log_prob(x, context), value, alone):
            assert np.array_equal(np.isnan(result), nan) and (result[~nan] < np.inf).all()
            assert (result[np.isinf(x).any(axis=1) & ~nan] == -np.inf).all()
            assert name.startswith(("front", "Linear")) or (np.isfinite(result).any() and np.isneginf(result).any())
        for gradient in gradients:
            assert gradient is None or (np.isfinite(gradient[~nan]).all() and not gradient[np.isneginf(value)].any())


@pytest.mark.parametrize("far", [1e38, 1e300, np.inf])
@pytest.mark.parametrize(("conditional", "categories"), [("categorical", [2, 3, 4]), ("mixed", [2, None, 4])])
def test_far_discrete_values_and_contexts(backend, dtype, far, conditional, categories):
    if backend == "numba":
        pytest.skip("the numba backend has no discrete flows")
    flow = fastmaf.MADE(3, conditional, 1, (9,), categories=categories, seed=1, dtype=dtype)
    x = np.array([[0, 0, far], [0, -far, np.nan], [1, 2, 3]])
    value = flow.log_prob(x, [0.5])
    assert value[0] == -np.inf and np.isnan(value[1]) and np.isfinite(value[2])
    assert not np.isnan(flow.log_prob(x[[0, 2]], [-far])).any() and np.isnan(flow.log_prob(x, [np.nan])).all()


def test_integers_near_the_largest(backend, dtype):
    """Their squares are too much for float32, their densities are not."""
    flow = make.flow(2, (), 1, dtype=dtype, seed=2)
    x = np.array([[2**64 - 1, 2**63], [2**64 - 2**11, 2**64 - 1], [2**53 + 1, 2**64 - 2**12]], np.uint64)
    with make.reference():
        expected = flow.astype("float64").log_prob(x)
    assert (expected < -1e36).all() and (expected > -3e38).all()
    assert_close("log_prob", dtype, flow.log_prob(x), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_density_far_out_is_large(backend, dtype, activation):
    """Where a scale is beyond the dtype it is infinite or zero: at the largest number the log det alone would count."""
    flow = make.flow(3, (9,), 2, activation=activation, law="exp", dtype=dtype)
    x = np.random.default_rng(0).normal(size=(2000, 3)) * 10.0 ** np.arange(0, 20, 0.01)[:, None]
    assert (flow.log_prob(x) < 100).all()
