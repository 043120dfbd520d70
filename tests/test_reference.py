"""The NumPy backend, which the others are held against: here it is held against mathematics."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from make import SHAPES, conditioner, contexts, dense, flow, numerical_gradient, random_affine, rows
from tolerances import assert_close

import fastmaf
from fastmaf import _random, backends, masks
from fastmaf.backends import reference as definition
from fastmaf.layers import (
    ACTIVATIONS,
    LAWS,
    Affine,
    Autoregressive,
    BatchNorm,
    Block,
    Conditioner,
    Elementwise,
    Law,
    Linear,
    Permutation,
    Terminal,
)

KINDS = [Law(kind, form) for kind in LAWS for form in ("standardize", "affine")]


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setattr(backends, "active", definition.backend)


def law_name(law):
    return f"{law.kind}-{law.form}"


def everything(activation, seed=0):
    """Residual blocks of both kinds, all context modes, inner norms, direct weights, shared ranks, fixed layers in between."""
    rng = np.random.default_rng(seed)
    ranks, degrees = np.array([2, 1, 3, 1]), np.array([1, 0, 2, 0, 1])

    def hidden(reads=degrees, width=0, norm=False, **options):
        if norm:
            options |= {"norm_scale": rng.uniform(0.5, 1.5, reads.size), "norm_shift": rng.normal(size=reads.size)}
        return dense(rng, masks.hidden_mask(degrees, reads), degrees, width, **options)

    bias = {"context_bias": rng.normal(size=5)}
    blocks = (
        Block("residual", (hidden(width=2, norm=True), hidden(width=2, context="gated", **bias))),
        Block("plain", (hidden(width=2, context="activated"),)),
        Block("linear", (hidden(norm=True),)),
        Block("linear_residual", (hidden(), hidden(norm=True))),
    )
    gain = np.resize([[0.2], [0.05]], (8, 1))
    final = dense(rng, masks.output_mask(ranks, degrees, 2), None, 2, gain)
    skip = gain * rng.normal(size=(8, 4)) * masks.output_mask(ranks, ranks, 2)
    net = Conditioner(hidden(ranks, 2, context="activated", **bias), blocks, final, activation, seed % 2 == 0, skip)
    layers = [
        Elementwise.from_bounds([(-4, 4), None, None, (-5, 9)]),
        Autoregressive(ranks, net, Law("softplus", "affine")),
        BatchNorm(*0.3 * rng.normal(size=(3, 4)), rng.uniform(0.5, 2, 4)),
        Linear(0.3 * rng.normal(size=(4, 4)), np.eye(4) + 0.2 * rng.normal(size=(4, 4)), 0.3 * rng.normal(size=4)),
        Autoregressive(ranks[::-1], conditioner(rng, ranks[::-1], (6,), 2, activation)),
        random_affine(rng, 4),
    ]
    return fastmaf.Flow(layers, context_features=2, context_layers=[random_affine(rng, 2)], dtype="float64")


def inverse_flow(activation="tanh"):
    """A network that reads the noise (IAF)."""
    rng = np.random.default_rng(5)
    ranks = np.array([3, 1, 2])
    layer = Autoregressive(ranks, conditioner(rng, ranks, (7, 6), 2, activation), Law("sigmoid"), "noise")
    return fastmaf.Flow([layer], context_features=2, dtype="float64")


# Random numbers


def philox_of_one(counter, seed):
    """The textbook form, in Python integers."""
    words, key = list(counter), [seed % 2**32, seed >> 32]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * words[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * words[2], 2**32)
        words = [high1 ^ words[1] ^ key[0], low1, high0 ^ words[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return words


@pytest.mark.parametrize(
    ("word", "answer"),
    [(0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]), (2**32 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD])],
)
def test_philox_known_answers(word, answer):
    assert [int(w) for w in _random.philox([word] * 4, word << 32 | word)] == answer
    assert philox_of_one([word] * 4, word << 32 | word) == answer


def test_every_normal_has_its_counter():
    seed, index, row = 0xFEDCBA9876543210, [0, 5, 2**32 + 7, 2**64 - 1], [0, 3, 2**32 - 1, 1]
    single = _random.normals(seed, np.array(index, np.uint64), np.array(row, np.uint64), 6, np.dtype("f4"))
    double = _random.normals(seed, np.array(index, np.uint64), np.array(row, np.uint64), 6, np.dtype("f8"))
    scipy_special = pytest.importorskip("scipy.special")
    for k, j in np.ndindex(4, 6):
        counter = [index[k] % 2**32, index[k] >> 32, row[k], j // 4]
        word = philox_of_one(counter, seed)[j % 4]
        finer = philox_of_one([*counter[:3], 1 << 24 | j // 4], seed)[j % 4]
        p = ((word >> 1) + (finer + 0.5) / 2**32) / 2**32
        expected = scipy_special.ndtri(p) * (-1 if word & 1 else 1)
        assert math.isclose(double[k, j], expected, rel_tol=1e-14)
        assert math.isclose(single[k, j], expected, rel_tol=1e-5, abs_tol=1e-6)


@pytest.mark.parametrize(("dtype", "limit", "lowest"), [("f4", 2e-6, 1e-30), ("f8", 3e-15, 1e-300)])
def test_quantiles(dtype, limit, lowest):
    ndtri = pytest.importorskip("scipy.special").ndtri
    joints = (0.075 + np.linspace(-1e-3, 1e-3, 101), np.exp(-(np.linspace(4.9, 5.1, 101) ** 2)))
    p = np.concatenate([np.geomspace(lowest, 0.5, 20001), np.linspace(1e-4, 0.5, 20001), *joints]).astype(dtype)
    z = _random.quantile(p)
    expected = ndtri(p.astype("f8"))
    assert z.dtype == p.dtype
    assert np.all(np.abs(z - expected) <= limit * np.maximum(1, np.abs(expected)))
    assert _random.quantile(np.array([0.5], dtype)) == 0


def test_noise_is_standard_normal():
    index = np.arange(100_000, dtype=np.uint64)
    z = _random.normals(3, index, 0 * index, 3, np.dtype("f4")).astype("f8")
    assert np.all(np.abs(z.mean(axis=0)) < 4 / math.sqrt(len(z)))
    assert np.all(np.abs((z**2).mean(axis=0) - 1) < 4 * math.sqrt(2 / len(z)))
    assert np.all(np.abs(np.corrcoef(z.T) - np.eye(3)) < 4 / math.sqrt(len(z)))


def test_shuffle_sorts_keys():
    for seed, stream, epoch, n in ((0, 3, 1, 50), (2**64 - 1, 4, 0, 7), (1, 3, 2**32 - 1, 1), (1, 3, 1, 0)):
        words = [philox_of_one([i, 0, epoch, stream << 24], seed) for i in range(n)]
        keys = [w[1] << 32 | w[0] for w in words]
        order = _random.shuffle(seed, stream, epoch, n)
        assert order.dtype == np.int64
        assert order.tolist() == sorted(range(n), key=keys.__getitem__)


# Densities


def flows():
    """One flow of every kind."""
    for (features, hidden, c), activation in zip(SHAPES, itertools.cycle(ACTIVATIONS), strict=False):
        yield flow(features, hidden, context_features=c, activation=activation)
    yield from (flow(4, (6, 5), context_features=1, law=law, activation="tanh") for law in KINDS)
    yield from (everything(activation, seed) for activation in ACTIVATIONS for seed in (0, 1))
    yield flow(6, (9,), affine=True, bounds=True, between=True, activation="silu")
    yield inverse_flow()


@pytest.fixture(params=range(len(list(flows()))))
def any_flow(request):
    return next(itertools.islice(flows(), request.param, None))


def test_round_trips(any_flow):
    c = contexts(any_flow, 50)
    u = np.random.default_rng(0).normal(size=(50, any_flow.features))
    x = any_flow.from_noise(u, c)
    assert_close("to_noise", "float64", any_flow.to_noise(x, c), u, factor=1e4)
    assert_close("from_noise", "float64", any_flow.from_noise(any_flow.to_noise(x, c), c), x, factor=1e4)


def jacobian(any_flow, x, c):
    """dz/dx of one row."""
    return np.stack([numerical_gradient(lambda v, j=j: any_flow.to_noise(v[None], c)[0, j], x, 1e-6) for j in range(x.size)])


def test_log_prob_is_that_of_the_noise_plus_the_log_det_of_the_jacobian(any_flow):
    c = contexts(any_flow, 4)
    x = rows(any_flow, 4, c)
    z = any_flow.to_noise(x, c)
    for k, value in enumerate(any_flow.log_prob(x, c)):
        own = None if c is None else c[k]
        sign, log_det = np.linalg.slogdet(jacobian(any_flow, x[k], own))
        expected = log_det - 0.5 * (z[k] ** 2).sum() - 0.5 * z[k].size * math.log(2 * math.pi)
        assert math.isclose(value, expected, abs_tol=1e-6), any_flow


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_column_moves_those_behind_it_and_no_others(shape):
    features, hidden, c = shape
    made = flow(features, hidden, 1, c)
    context, ranks = contexts(made, 6), made.layers[0].ranks
    x = rows(made, 6, context)
    z = made.to_noise(x, context)
    for j in range(features):
        moved = x.copy()
        moved[:, j] += 1
        same = np.all(made.to_noise(moved, context) == z, axis=0)
        assert np.all(same[ranks < ranks[j]]) and not same[j]


def test_columns_that_share_a_rank_do_not_see_each_other():
    made, c = everything("tanh"), np.zeros(2)
    z = jacobian(fastmaf.Flow([made.layers[1]], context_features=2, dtype="f8"), np.array([0.3, -1, 0.8, 0.1]), c)
    ranks = made.layers[1].ranks
    assert np.all((z != 0) <= ((ranks[:, None] > ranks) | np.eye(4, dtype=bool)))
    assert np.all(z[ranks[:, None] > ranks] != 0)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[2]], ids=str)
def test_every_column_sees_the_context(shape):
    made = flow(shape[0], shape[1], 1, shape[2], activation="tanh")
    x = np.zeros((1, made.features))
    z = made.to_noise(x, np.zeros(shape[2]))
    reached = made.to_noise(x, np.ones(shape[2])) != z
    assert reached[0, made.layers[0].ranks == 1].all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"affine": True, "bounds": True}, {"between": True}], ids=str)
def test_float32_is_float64_to_rounding(shape, options):
    single = flow(*shape[:2], context_features=shape[2], activation="elu", dtype="float32", **options)
    double = single.astype("float64")
    c = contexts(single, 30)
    x, u = rows(single, 30, c), np.random.default_rng(1).normal(size=(30, shape[0])).astype("f4")
    assert_close("log_prob", "float32", single.log_prob(x, c), double.log_prob(x, c))
    assert_close("to_noise", "float32", single.to_noise(x, c), double.to_noise(x, c))
    assert_close("from_noise", "float32", single.from_noise(u, c), double.from_noise(u, c))
    for operation, a, b in zip(("gradient", "gradient", "parameters"), single.vjp(x, c, x[:, 0]), double.vjp(x, c, x[:, 0]), strict=True):
        if a is not None:
            assert_close(operation, "float32", a, b)


def test_front_layers_compute_in_float64():
    made = flow(3, (), 1)
    far = fastmaf.Flow([Affine(np.full(3, 1e9), np.ones(3)), *made.layers])
    x = np.random.default_rng(0).normal(size=(5, 3))
    assert_close("log_prob", "float32", far.log_prob(x + 1e9), made.log_prob(x + 1e9 - 1e9))


def test_shapes_agree():
    made = everything("tanh")
    c, x = np.random.default_rng(0).normal(size=(3, 2)), rows(everything("tanh"), 4, np.zeros(2))
    expected = np.stack([made.log_prob(x, one) for one in c])
    each = np.stack([x, 0.9 * x, 0.8 * x])
    assert np.allclose(made.log_prob(x, c[:, None]), expected, rtol=1e-12)
    assert np.allclose(made.log_prob(np.stack([x] * 3), np.repeat(c[:, None], 4, axis=1)), expected, rtol=1e-12)
    assert np.allclose(made.log_prob(each, c[:, None])[1], made.log_prob(each[1], c[1]), rtol=1e-12)
    assert np.allclose(made.log_prob(x, np.stack([c[1]] * 4)), expected[1], rtol=1e-12)
    assert np.allclose(made.log_prob(each, c[0])[2], made.log_prob(each[2], c[0]), rtol=1e-12)
    assert np.allclose(made.log_prob(np.asfortranarray(x)[::-1].astype("f4"), c[0])[::-1], expected[0], rtol=1e-4)


def test_chunks_change_nothing(monkeypatch):
    made, c = everything("elu"), np.random.default_rng(0).normal(size=(3, 1, 2))
    x = np.stack([rows(made, 11, one) for one in c[:, 0]])
    once = [made.log_prob(x, c), made.to_noise(x, c), *made.vjp(x, c, x[:, :, 0]), *made.sample_and_log_prob(11, c[:, 0], seed=4)]
    monkeypatch.setattr(definition, "BUDGET", 500)
    assert len(list(definition._chunks(made, 33))) > 3
    parts = [made.log_prob(x, c), made.to_noise(x, c), *made.vjp(x, c, x[:, :, 0]), *made.sample_and_log_prob(11, c[:, 0], seed=4)]
    for a, b in zip(once, parts, strict=True):
        assert np.allclose(a, b, rtol=1e-10, atol=1e-12)


# Places where there is no density


def test_bounds():
    made = flow(2, (3,), 2, bounds=[(0, 1), (None, 2)], dtype="float32")
    x = np.array([[0.5, 1], [0, 1], [1, 1], [-0.1, 1], [1.1, 1], [0.5, 2], [0.5, 3], [0.5, -np.inf], [np.nan, 3], [0, np.nan]])
    value, dx, _ = made.log_prob_and_grad(x)
    assert np.isfinite(value[0]) and np.isfinite(dx[0]).all()
    assert np.all(value[1:8] == -np.inf) and np.all(np.isnan(value[8:]))
    assert np.all(dx[1:8] == 0)
    assert np.array_equal(np.isnan(made.to_noise(x)).all(axis=1), np.arange(10) > 0)
    dparameters = made.vjp(x[:8], None, np.ones(8))[2]
    assert np.allclose(dparameters, made.vjp(x[:1], None, np.ones(1))[2], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_samples_lie_strictly_inside(dtype):
    bounds = Elementwise.from_bounds([(0, 1), (1, 1 + 1e-6), (0.1, 0.3), (3, None), (None, -1e9), (-1e30, None)])
    noise = np.array([-1e30, -1e4, -50, 0, 50, 1e30])[:, None] * np.ones(6)
    for layers in ([bounds], [bounds, Affine(np.ones(6), -np.ones(6))]):
        x = fastmaf.Flow(layers, dtype=dtype).from_noise(noise)
        assert np.all((bounds.lower < x) | np.isinf(bounds.lower)) and np.all((x < bounds.upper) | np.isinf(bounds.upper))


def test_nan_stays_in_its_row():
    made = everything("relu")
    c = np.random.default_rng(0).normal(size=(6, 2))
    x = rows(made, 6, c)
    expected = made.log_prob(x, c)
    x[1, 0], x[2, 3], c[4, 1] = np.nan, np.nan, np.nan
    value = made.log_prob(x, c)
    assert np.array_equal(np.isnan(value), [False, True, True, False, True, False])
    assert np.array_equal(value[[0, 3, 5]], expected[[0, 3, 5]])
    assert np.isnan(made.log_prob(x, [np.nan, 0])).all()


def test_a_context_out_of_bounds_has_no_density():
    made = flow(2, (4,), context_features=1)
    bounded = fastmaf.Flow(made.layers, context_features=1, context_layers=[Elementwise.from_bounds([(0, 1)])], dtype="f8")
    assert np.isnan(bounded.log_prob(np.zeros((4, 2)), [[0.5], [0], [1], [2]])).tolist() == [False, True, True, True]


# Samples


def test_samples_are_the_noise_turned_around(any_flow):
    c = contexts(any_flow, 1)
    own = None if c is None else c[0]
    x, log_prob = any_flow.sample_and_log_prob(20, own, seed=7)
    index = np.arange(20, dtype=np.uint64)
    noise = _random.normals(7, index, 0 * index, any_flow.features, any_flow.dtype)
    assert np.array_equal(x, any_flow.from_noise(noise, own))
    assert_close("log_prob", "float64", log_prob, any_flow.log_prob(x, own), factor=100)


def test_samples_split_anyhow():
    made = flow(5, (6,), context_features=2, bounds=True)
    c = np.random.default_rng(0).normal(size=(4, 2))
    whole = made.sample(9, c, seed=2**63 + 1)
    assert whole.shape == (4, 9, 5)
    part = made.sample(5, c[1:3], seed=2**63 + 1, offset=4, context_offset=1)
    assert np.allclose(part, whole[1:3, 4:], rtol=1e-12)
    assert np.allclose(made.sample(9, c[0], seed=2**63 + 1), whole[0], rtol=1e-12)
    far = made.sample(2, c[0], seed=1, offset=2**64 - 2, context_offset=2**32 - 1)
    assert np.allclose(far[1], made.sample(1, c[0], seed=1, offset=2**64 - 1, context_offset=2**32 - 1), rtol=1e-12)
    assert not np.allclose(made.sample(9, c[0], seed=3), whole[0])
    single = made.astype("float32").sample(9, c, seed=2**63 + 1)
    assert np.allclose(single, whole, rtol=1e-3, atol=1e-4)


# Gradients


def check_gradients(made, n=3, rtol=2e-6):
    rng = np.random.default_rng(0)
    c = contexts(made, n)
    x, g = rows(made, n, c), rng.normal(size=n)
    value, dx, dc = made.log_prob_and_grad(x, c)
    assert np.array_equal(value, made.log_prob(x, c))
    expected = numerical_gradient(lambda v: made.log_prob(v, c).sum(), x, 1e-6)
    assert np.allclose(dx, expected, rtol=rtol, atol=rtol * (1 + np.abs(expected).max()))
    if c is not None:
        expected = numerical_gradient(lambda v: made.log_prob(x, v).sum(), c, 1e-6)
        assert np.allclose(dc, expected, rtol=rtol, atol=rtol * (1 + np.abs(expected).max()))
    dx_weighted, _, dparameters = made.vjp(x, c, g)
    assert np.allclose(dx_weighted, g[:, None] * dx, rtol=1e-10, atol=1e-12)
    parameters, free = made.parameters(), free_parameters(made)
    assert dparameters.shape == parameters.shape
    assert np.all(dparameters[~free] == 0)
    sum_of = lambda v: float(g @ made.with_parameters(v).log_prob(x, c))  # noqa: E731
    for k in rng.permutation(np.flatnonzero(free))[:40]:
        moved = np.stack([parameters, parameters])
        moved[0, k] += 1e-6
        moved[1, k] -= 1e-6
        expected = (sum_of(moved[0]) - sum_of(moved[1])) / (moved[0, k] - moved[1, k])
        assert math.isclose(dparameters[k], expected, rel_tol=rtol, abs_tol=rtol * (1 + np.abs(dparameters).max())), k


def free_parameters(made):
    """Which parameters no mask holds at zero; in these flows, those that are not zero."""
    return made.parameters() != 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_shapes(shape, activation):
    check_gradients(flow(*shape[:2], context_features=shape[2], activation=activation))


@pytest.mark.parametrize("law", KINDS, ids=law_name)
def test_gradients_of_laws(law):
    check_gradients(flow(4, (6, 5), context_features=1, law=law, activation="tanh"))


def test_gradient_where_the_clamp_holds():
    made = flow(3, (5,), activation="tanh", law=Law("clamp", constants={"low": -0.01, "high": 0.01}))
    check_gradients(made)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_of_everything(activation, seed):
    check_gradients(everything(activation, seed))


def test_gradients_of_bounds_and_affines():
    check_gradients(flow(6, (9,), context_features=2, affine=True, bounds=True, between=True, activation="silu"))


def test_gradients_of_bounds_behind_other_layers():
    first, second = flow(2, (3,), activation="gelu").layers
    between = [Affine([0, -40], [1, 1]), Elementwise.from_bounds([None, (0, None)])]
    check_gradients(fastmaf.Flow([first, *between, second], dtype="float64"))


def test_gradients_of_contexts_that_rows_share():
    made = everything("tanh")
    c, g = np.random.default_rng(0).normal(size=(3, 1, 2)), np.random.default_rng(1).normal(size=(3, 4))
    x = rows(made, 4, np.zeros(2))
    dx, dc, dparameters = made.vjp(x, c, g)
    each = [made.vjp(x, c[k, 0], g[k]) for k in range(3)]
    assert np.allclose(dx, sum(e[0] for e in each))
    assert np.allclose(dc[:, 0], [e[1] for e in each])
    assert np.allclose(dparameters, sum(e[2] for e in each))


@pytest.mark.parametrize("form", ["standardize", "affine"])
@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_gradients_where_networks_read_the_noise(activation, form):
    made = inverse_flow(activation)
    layer = made.layers[0]
    tied = replace(layer, law=Law("softplus", form), conditioner=replace(layer.conditioner, input_clip=0.6))
    check_gradients(fastmaf.Flow([layer, Affine([1, 0, -1], [2, -1, 0.5]), tied], context_features=2, dtype="float64"))


def test_what_has_no_gradient_says_so():
    with pytest.raises(ValueError, match="a flow with a bernoulli base has no gradient in x"):
        terminal("bernoulli", 2).log_prob_and_grad(np.zeros((1, 2)))


def test_the_order_of_the_parameters():
    """From data to noise: the arrays of a network, log_gamma and beta, lower, upper and bias, and at last those of the base."""
    front = everything("relu").layers[:4]
    made = terminal("mixture", 4, context_features=2, layers=front)
    network, norm, linear = front[1].conditioner, front[2], front[3]
    maps = (*network.hidden, network.final)
    expected = [a for m in maps for a in (m.weight, m.bias, m.context_weight, m.context_bias) if a is not None]
    expected += [network.skip, norm.log_gamma, norm.beta, np.tril(linear.lower, -1), np.triu(linear.upper), linear.bias]
    for final in (made.base.conditioner.initial, made.base.conditioner.final):
        expected += [a for a in (final.weight, final.bias, final.context_weight) if a is not None]
    vector = made.parameters()
    assert np.array_equal(vector, np.concatenate([a.ravel() for a in expected]))
    start = int(np.flatnonzero(vector == norm.beta[-1])[0]) + 1
    full = vector.copy()
    full[start : start + 32][vector[start : start + 32] == 0] = 7
    moved = made.with_parameters(full)
    assert np.array_equal(moved.parameters(), vector) and moved.layers[3] == linear
    assert not made.vjp(np.zeros((3, 4)), np.zeros((3, 2)), np.ones(3))[2][full == 7].any()
    assert np.array_equal(made.with_parameters(2 * vector).parameters(), 2 * vector)


# Bases


def terminal(conditional, features, components=3, categories=(), context_features=0, layers=(), law="exp_soft", hidden=(7,)):
    rng = np.random.default_rng(features)
    ranks = rng.permutation(np.arange(1, features + 1))
    per_variable = {"mixture": (3 * components,) * features, "bernoulli": (1,) * features, "categorical": categories}.get(
        conditional, tuple(count or 3 * components for count in categories)
    )
    made = conditioner(rng, ranks, hidden, context_features, "tanh")
    outputs = np.repeat(ranks, per_variable)[:, None]
    reads = made.hidden[-1].degrees if hidden else ranks
    final = dense(rng, outputs > reads, None, 0 if hidden else context_features)
    net = Conditioner(made.initial, made.blocks, final, "tanh", bool(hidden))
    base = Terminal(ranks, net, conditional, components, categories, law=law)
    return fastmaf.Flow(layers, base, context_features=context_features, dtype="float64")


@pytest.mark.parametrize("hidden", [(), (7,)])
@pytest.mark.parametrize(("conditional", "values"), [("bernoulli", (2, 2, 2)), ("categorical", (2, 5, 3)), ("categorical", (4, 2, 3))])
def test_discrete_probabilities_sum_to_one_and_samples_follow_them(conditional, values, hidden):
    made = terminal(conditional, 3, categories=values if conditional == "categorical" else (), context_features=2, hidden=hidden)
    cells = np.array(list(itertools.product(*map(range, values))), float)
    c = np.array([0.3, -1])
    p = np.exp(made.log_prob(cells, c))
    assert math.isclose(p.sum(), 1, rel_tol=1e-12)
    n = 40_000
    x, log_prob = made.sample_and_log_prob(n, c, seed=1)
    assert np.allclose(log_prob, made.log_prob(x, c))
    counts = (x[:, None] == cells).all(axis=2).sum(axis=0)
    assert counts.sum() == n
    assert np.sum((counts - n * p) ** 2 / (n * p)) < 2 * len(cells) + 20
    assert np.all(made.log_prob([[0.5, 0, 0], [0, -1, 0], [0, 0, 7]], c) == -np.inf)
    assert np.isnan(made.log_prob([[np.nan, 0, 0]], c)).all()
    for call in (made.to_noise, made.from_noise):
        with pytest.raises(ValueError, match=f"a flow with a {conditional} base has no noise"):
            call(cells, c)


@pytest.mark.parametrize("hidden", [(), (7,)])
@pytest.mark.parametrize("values", [(3, 0, 2), (0, 2, 4), (2, 3, 0)])
def test_mixed_densities_integrate_to_one_and_samples_follow_them(values, hidden):
    made = terminal("mixed", 3, components=2, categories=values, context_features=2, hidden=hidden)
    c, axis, free = np.array([0.3, -1]), np.linspace(-40, 40, 4001), values.index(0)
    n = 40_000
    x, log_prob = made.sample_and_log_prob(n, c, seed=1)
    assert np.allclose(log_prob, made.log_prob(x, c))
    total, statistic, cells = 0, 0, list(itertools.product(*(range(count) for count in values if count)))
    for cell in cells:
        own = np.insert(np.tile(np.array(cell, float), (axis.size, 1)), free, axis, axis=1)
        p = np.exp(made.log_prob(own, c))
        mass = p.sum() * (axis[1] - axis[0])
        inside = x[(np.delete(x, free, axis=1) == cell).all(axis=1), free]
        total, statistic = total + mass, statistic + (inside.size - n * mass) ** 2 / (n * mass)
        cumulative = np.cumsum(p) * (axis[1] - axis[0]) / mass
        if inside.size > 200:
            assert scipy.stats.kstest(inside, lambda t, cdf=cumulative: np.interp(t, axis, cdf)).pvalue > 1e-4
    assert math.isclose(total, 1, rel_tol=1e-6) and statistic < 2 * len(cells) + 20
    wrong = x[:1].copy()
    wrong[0, values.index(max(values))] = max(values)
    assert made.log_prob(wrong, c) == -np.inf
    for call in (made.to_noise, made.from_noise):
        with pytest.raises(ValueError, match="a flow with a mixed base has no noise"):
            call(x, c)


def test_layers_in_front_of_discrete_variables_leave_them():
    base = terminal("mixed", 3, categories=(3, 0, 2)).base
    front = [Elementwise.from_bounds([None, (0, None), None]), Affine([0, 1.5, 0], [1, 2, 1])]
    made = fastmaf.Flow(front, base, dtype="float64", names=["k", "mass", "flag"])
    x = [[2, 3.5, 1], [1, -1, 0]]
    assert made.log_prob(x)[1] == -np.inf
    z = (np.log(3.5) - 1.5) * 2
    expected = fastmaf.Flow([], base, dtype="float64").log_prob([[2, z, 1]]) + np.log(2 / 3.5)
    assert made.log_prob(x)[0] == pytest.approx(expected[0], rel=1e-12)
    for wrong, where in (
        (Affine([0, 0, 0.5], [1, 1, 1]), "column 'flag'"),
        (Affine([0, 0, 0], [2, 1, 1]), "column 'k'"),
        (Elementwise.from_bounds([(-1, 5), None, None]), "column 'k'"),
        (Permutation(np.array([0, 1, 2])), "columns 'k', 'flag'"),
    ):
        with pytest.raises(ValueError, match=rf"layers\[1\] changes {where}, whose variables are discrete"):
            fastmaf.Flow([front[1], wrong], base, dtype="float64", names=["k", "mass", "flag"])


@pytest.mark.parametrize("law", ["exp_soft", "softplus", "log_precision"])
def test_mixtures_integrate_to_one_and_samples_follow_them(law):
    made = terminal("mixture", 2, law=law)
    axis = np.linspace(-30, 30, 1201)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    p = np.exp(made.log_prob(grid.reshape(-1, 2))).reshape(axis.size, axis.size) * (axis[1] - axis[0]) ** 2
    assert math.isclose(p.sum(), 1, rel_tol=1e-3)
    x, log_prob = made.sample_and_log_prob(20_000, seed=3)
    assert np.allclose(log_prob, made.log_prob(x))
    for j in (0, 1):
        expected = np.cumsum(p.sum(axis=1 - j))
        found = np.searchsorted(np.sort(x[:, j]), axis + 0.5 * (axis[1] - axis[0])) / len(x)
        assert np.abs(found - expected).max() < 2 / math.sqrt(len(x))


def test_a_mixture_of_one_is_a_gaussian_made():
    mixture = terminal("mixture", 3, components=1)
    net = mixture.base.conditioner
    keep = np.delete(np.arange(9), [0, 3, 6])  # without the logits
    final = dense(np.random.default_rng(0), np.zeros((6, 7), bool))
    final = type(final)(net.final.weight[keep], net.final.bias[keep])
    gaussian = fastmaf.Flow([Autoregressive(mixture.base.ranks, Conditioner(net.initial, (), final, "tanh"))], dtype="f8")
    x = gaussian.sample(10, seed=1)
    assert np.allclose(mixture.log_prob(x), gaussian.log_prob(x), rtol=1e-12)
    assert np.allclose(mixture.sample(10, seed=1), x, rtol=1e-12)
    assert np.array_equal(mixture.to_noise(x), x)


def test_a_mixture_behind_layers():
    front = flow(2, (5,), 1, bounds=[(0, 1), None]).layers
    made = terminal("mixture", 2, layers=front)
    x, log_prob = made.sample_and_log_prob(10, seed=1)
    assert np.all((x[:, 0] > 0) & (x[:, 0] < 1))
    assert np.allclose(made.log_prob(x), log_prob)
    z = made.to_noise(x)
    log_det = fastmaf.Flow(front, dtype="f8").log_prob(x) + 0.5 * (z**2).sum(axis=1) + math.log(2 * math.pi)
    assert np.allclose(log_prob, log_det + fastmaf.Flow([], made.base, dtype="f8").log_prob(z))


@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize("hidden", [(), (7,), (5, 6)], ids=str)
@pytest.mark.parametrize("features", [1, 3])
@pytest.mark.parametrize("components", [1, 3])
def test_gradients_of_mixtures(features, components, hidden, context_features):
    check_gradients(terminal("mixture", features, components, context_features=context_features, hidden=hidden))


@pytest.mark.parametrize("law", LAWS)
def test_gradients_of_mixtures_with_every_law(law):
    check_gradients(terminal("mixture", 3, 2, law=law))


def test_gradients_of_a_mixture_behind_layers():
    check_gradients(terminal("mixture", 4, context_features=2, layers=everything("tanh").layers))


def residual(made, rng):
    """The flow with a residual block and direct weights in its base."""
    base, net = made.base, made.base.conditioner
    degrees = net.hidden[-1].degrees
    block = Block("residual", tuple(dense(rng, masks.hidden_mask(degrees, degrees), degrees) for _ in range(2)))
    skip = dense(rng, np.repeat(base.ranks, base.rows)[:, None] > base.ranks, gain=0.5).weight
    net = Conditioner(net.initial, (*net.blocks, block), net.final, "silu", False, skip)
    base = Terminal(base.ranks, net, base.conditional, base.components, base.categories, base.constants, base.law)
    return fastmaf.Flow(made.layers, base, context_features=made.context_features, dtype="float64")


def test_gradients_of_residual_mixtures():
    check_gradients(residual(terminal("mixture", 3, context_features=1), np.random.default_rng(2)))


DISCRETE = [
    ("bernoulli", (2,)),
    ("bernoulli", (2,) * 5),
    ("categorical", (4,)),
    ("categorical", (2, 5, 3)),
    ("mixed", (3, 0, 0, 2)),
    ("mixed", (0, 4)),
]


def drawn(rng, values, n):
    """Some of the values of each variable, any number where there is no number of them."""
    return np.where(np.array(values) > 0, rng.integers(np.maximum(values, 1), size=(n, len(values))), rng.normal(size=(n, len(values))))


@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize("hidden", [(), (7,), "residual"], ids=str)
@pytest.mark.parametrize(("conditional", "values"), DISCRETE, ids=str)
def test_gradients_of_discrete_variables(conditional, values, hidden, context_features):
    rng = np.random.default_rng(1)
    categories = () if conditional == "bernoulli" else values
    width = (7,) if hidden == "residual" else hidden
    made = terminal(conditional, len(values), categories=categories, context_features=context_features, hidden=width)
    made = residual(made, rng) if hidden == "residual" else made
    x, c, g = drawn(rng, values, 4), contexts(made, 4), rng.normal(size=4)
    dx, dc, dparameters = made.vjp(x, c, g)
    assert dx is None
    if c is not None:
        assert np.allclose(dc, numerical_gradient(lambda v: float(g @ made.log_prob(x, v)), c), rtol=1e-6, atol=1e-8)
    parameters = made.parameters()
    free = parameters != 0
    assert not dparameters[~free].any()

    def moved(values):
        vector = parameters.copy()
        vector[free] = values
        return float(g @ made.with_parameters(vector).log_prob(x, c))

    assert np.allclose(dparameters[free], numerical_gradient(moved, parameters[free]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("conditional", "values"), DISCRETE, ids=str)
def test_values_that_a_discrete_variable_lacks_move_nothing(conditional, values):
    if 0 in (values[0], values[-1]):
        pytest.skip("the first and the last are not both discrete")
    made = terminal(conditional, len(values), categories=() if conditional == "bernoulli" else values, context_features=1)
    known = np.zeros((2, len(values)))
    for wrong in (-1, 0.5, values[-1], 1e30, np.inf, -np.inf):
        x = np.concatenate([known, known])
        x[1, -1] = x[2, 0] = wrong
        if len(values) > 1 and 0 <= wrong < values[0] and wrong == int(wrong):
            x[2, 0] = -1
        c = np.ones((4, 1))
        assert np.array_equal(np.isneginf(made.log_prob(x, c)), [False, True, True, False])
        _, dc, dparameters = made.vjp(x, c, np.ones(4))
        assert not dc[1:3].any() and dc[0].all()
        assert np.allclose(dparameters, made.vjp(known, c[:2], np.ones(2))[2], rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("conditional", "values"), [("mixture", (2, 2, 2)), ("bernoulli", (2, 2, 2)), ("categorical", (4, 2, 3)), ("mixed", (4, 0, 2))], ids=str
)
def test_extreme_logits(conditional, values, dtype):
    """Logits of 1e4 either way: probabilities of exactly 0 and 1, and gradients that are numbers."""
    made = terminal(conditional, 3, categories=values if conditional in ("categorical", "mixed") else ()).astype(dtype)
    final = made.base.conditioner.final
    of_mixture = np.arange(9) < 3
    every = [
        of_mixture if conditional == "mixture" or count == 0 else np.ones(rows, bool)
        for count, rows in zip(values, made.base.rows, strict=True)
    ]
    logits = np.concatenate(every)
    parameters = made.parameters()
    rng = np.random.default_rng(0)
    for _ in range(5):
        parameters[-final.bias.size :][logits] = 1e4 * rng.choice([-1, 1], size=logits.sum())
        moved = made.with_parameters(parameters)
        x = drawn(rng, values, 50)
        value = moved.log_prob(x)
        _, _, dparameters = moved.vjp(x, None, np.ones(50))
        assert np.isfinite(value).all() and value.min() > -1e5
        assert np.isfinite(dparameters).all()
        assert not np.isnan(moved.sample(50, seed=1)).any()
        if conditional == "mixture":
            assert np.isfinite(moved.log_prob_and_grad(x)[1]).all()
            far = moved.log_prob_and_grad(np.full((1, 3), 1e25))
            assert far[0] < -1e20 and not np.isnan(far[1]).any()


# Training


def adam(made, x, c, w, batches, lr, mean_weight, l2=0.0, weight_decay=0.0, clip_norm=None):
    """The formulas of torch, number by number; gradients from vjp."""
    theta = made.parameters().astype(float).tolist()
    m, v, losses = [0.0] * len(theta), [0.0] * len(theta), []
    for t, (batch, rate) in enumerate(zip(batches, lr, strict=True), 1):
        current = made.with_parameters(theta)
        c_batch = None if c is None else c[batch]
        losses.append(-float(w[batch] @ current.log_prob(x[batch], c_batch)))
        gradient = current.vjp(x[batch], c_batch, -w[batch] / (len(batch) * mean_weight))[2].tolist()
        gradient = [g + 2 * l2 * value for g, value in zip(gradient, theta, strict=True)]
        norm = math.sqrt(sum(g * g for g in gradient))
        factor = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))
        for k, g in enumerate(gradient):
            m[k] = 0.9 * m[k] + 0.1 * factor * g
            v[k] = 0.999 * v[k] + 0.001 * (factor * g) ** 2
            theta[k] -= rate * weight_decay * theta[k]
            theta[k] -= rate * (m[k] / (1 - 0.9**t)) / (math.sqrt(v[k] / (1 - 0.999**t)) + 1e-8)
    return theta, losses


@pytest.mark.parametrize(
    "options", [{}, {"l2": 0.1}, {"weight_decay": 0.3}, {"clip_norm": 0.05}, {"l2": 0.1, "weight_decay": 0.3, "clip_norm": 2.0}], ids=str
)
@pytest.mark.parametrize("weighted", [False, True])
def test_adam(options, weighted):
    made = flow(3, (5, 4), context_features=2, activation="tanh", affine=True)
    rng = np.random.default_rng(0)
    c, w = rng.normal(size=(30, 2)), rng.uniform(0, 3, 30)
    x = rows(made, 30, c)
    order, lr = rng.permutation(30)[:23], np.array([0.1, 0.03, 0.02])
    w = w if weighted else np.ones(30)
    batches = [order[:10], order[10:20], order[20:]]
    expected, losses = adam(made, x, c, w, batches, lr, 1.3, **options)
    engine = definition.backend.trainer(made.record, **options)
    loss, done = engine.epoch(x, c, w if weighted else None, order, 10, lr, 1.3)
    assert done == 3 and math.isclose(loss, sum(losses), rel_tol=1e-10)
    assert np.allclose(engine.parameters(), expected, rtol=1e-8, atol=1e-10)
    assert np.all((engine.parameters() != 0) == (made.parameters() != 0))
    assert np.allclose(engine.log_prob(x, c), made.with_parameters(engine.parameters()).log_prob(x, c), rtol=1e-12)


def trained(made, x, epochs=3, **options):
    engine = definition.backend.trainer(made.record, **options)
    for _ in range(epochs):
        engine.epoch(x, None, None, np.arange(len(x)), 10, np.full(-(-len(x) // 10), 0.01), 1.0)
    return engine


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_state_goes_on_bit_for_bit(dtype):
    made = flow(3, (5,), dtype=dtype)
    x = rows(made, 35)
    engine = trained(made, x, 2, clip_norm=1.0)
    state = {name: array.copy() for name, array in engine.state().items()}
    assert engine.parameters().dtype == made.dtype
    other = definition.backend.trainer(made.record, clip_norm=1.0)
    other.load_state(state)
    for each in (engine, other):
        each.epoch(x, None, None, np.arange(35), 10, np.full(4, 0.01), 1.0)
    assert np.array_equal(engine.parameters(), other.parameters())
    assert np.array_equal(engine.parameters(), trained(made, x, 3, clip_norm=1.0).parameters())
    assert not np.array_equal(state["parameters"], engine.parameters()), "a state is a copy"


def test_training_stops_before_a_loss_that_is_not_finite():
    made = flow(2, (4,))
    x = rows(made, 30)
    x[25] = np.nan
    engine = definition.backend.trainer(made.record)
    assert engine.epoch(x, None, None, np.arange(30), 10, np.full(3, 0.01), 1.0)[1] == 2
    assert np.array_equal(engine.parameters(), trained(made, x[:20], 1).parameters())


def test_poll_raises_between_steps(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(definition.time, "monotonic", lambda: next(clock))
    made = flow(2, (4,))
    x = rows(made, 30)

    def poll():
        raise KeyboardInterrupt

    engine = definition.backend.trainer(made.record)
    with pytest.raises(KeyboardInterrupt):
        engine.epoch(x, None, None, np.arange(30), 10, np.full(3, 0.01), 1.0, poll)
    assert np.array_equal(engine.parameters(), trained(made, x[:10], 1).parameters())


def test_training_takes_any_array_and_replaces_parameters():
    made = flow(3, (5,))
    x = np.asfortranarray(rows(made, 30)).astype("f4")[::-1]
    engine = definition.backend.trainer(made.record)
    before = engine.parameters()
    engine.epoch(x, None, None, np.arange(30), 7, np.full(5, 0.01), 1.0)
    assert not np.array_equal(engine.parameters(), before)
    engine.set_parameters(before)
    assert np.array_equal(engine.parameters(), before)
    empty = definition.backend.trainer(fastmaf.Flow([random_affine(np.random.default_rng(0), 3)], dtype="f8").record)
    assert empty.epoch(x, None, None, np.arange(30), 30, np.ones(1), 1.0)[1] == 1


def test_training_finds_a_gaussian():
    rng = np.random.default_rng(0)
    covariance = np.array([[1.0, 0.8], [0.8, 2.0]])
    x = rng.multivariate_normal([1, -1], covariance, size=2000)
    made = fastmaf.MADE(2, hidden_features=(), dtype="float64")
    engine = definition.backend.trainer(made.record)
    for epoch in range(80):
        loss, _ = engine.epoch(x, None, None, _random.shuffle(0, 3, epoch, 2000), 200, np.full(10, 0.05 * 0.95**epoch), 1.0)
    entropy = 0.5 * math.log((2 * math.pi * math.e) ** 2 * np.linalg.det(np.cov(x.T)))
    assert abs(loss / 2000 - entropy) < 0.02


# Training of one vector under many masks


def members(conditional="bernoulli", count=3, features=5):
    """Flows of the same shapes with orders and degrees of their own, and a vector without masks."""
    rng, made = np.random.default_rng(8), []
    rows = {"mixture": 6, "bernoulli": 1}[conditional]
    for _ in range(count):
        ranks = rng.permutation(features) + 1
        base = Terminal(ranks, conditioner(rng, ranks, (9,), 2, "tanh", rows), conditional, 2 if conditional == "mixture" else 1)
        front = [Affine(np.zeros(features), np.ones(features))] if conditional == "mixture" else []
        made.append(fastmaf.Flow(front, base, context_features=2, dtype="float64"))
    return made, 0.4 * rng.normal(size=made[0].parameters().size)


def chosen(member, vector):
    """The vector under the masks of a member, which are known from its weights: none of them is zero."""
    return np.where(member.parameters() != 0, vector, 0)


@pytest.mark.parametrize("conditional", ["bernoulli", "mixture"])
def test_each_step_takes_the_next_member(conditional):
    made, vector = members(conditional)
    rng = np.random.default_rng(0)
    x, c = rng.integers(2, size=(40, 5)).astype(float), rng.normal(size=(40, 2))
    engine = definition.backend.trainer(made[0].record, members=[flow.record for flow in made], betas=(0.0, 0.0), eps=1.0)
    engine.set_parameters(vector)
    assert np.array_equal(engine.parameters(), vector)
    for step in range(5):
        before, member = engine.parameters(), made[step % 3]
        loss, done = engine.epoch(x, c, None, np.arange(40), 40, np.array([0.1]), 1.0)
        own = member.with_parameters(chosen(member, before))
        gradient = own.vjp(x, c, np.full(40, -1 / 40))[2]
        assert done == 1 and math.isclose(loss, -own.log_prob(x, c).sum(), rel_tol=1e-12)
        assert np.allclose(engine.parameters(), before - 0.1 * gradient / (np.abs(gradient) + 1), rtol=1e-12)
        outside = member.parameters() == 0
        assert np.array_equal(engine.parameters()[outside], before[outside])
        assert engine.state()["step"] == step + 1
    each = [member.with_parameters(chosen(member, engine.parameters())).log_prob(x, c) for member in made]
    assert np.allclose(engine.log_prob(x, c), np.log(np.mean(np.exp(each), axis=0)), rtol=1e-10)


def test_members_can_be_replaced_and_states_resume():
    made, vector = members()
    x, c = np.random.default_rng(0).integers(2, size=(30, 5)), np.zeros((30, 2))
    rates = np.full(4, 0.05)

    def engine(flows, state=None):
        result = definition.backend.trainer(made[0].record, members=[flow.record for flow in flows])
        result.set_parameters(vector)
        if state is not None:
            result.load_state(state)
        return result

    def run(trained):
        trained.epoch(x, c, None, np.arange(30), 8, rates, 1.0)
        return trained.parameters()

    first = engine(made[:2])
    run(first)
    other = engine(made, first.state())
    first.set_members([flow.record for flow in made])
    assert np.array_equal(run(first), run(other))
    assert set(first.state()) == {"parameters", "first_moment", "second_moment", "step"}
    with pytest.raises(ValueError, match="the arrays of member 1 differ in shape"):
        first.set_members([made[0].record, terminal("bernoulli", 4).record])
    with pytest.raises(ValueError, match="there are no members"):
        first.set_members([])
