"""The numba backend against the reference in float64, and what is its own: packing, tiles, threads, and what it refuses."""

from __future__ import annotations

import dataclasses
import threading

import make
import numpy as np
import pytest
from tolerances import assert_close

import fastmaf
from fastmaf import _random, backends
from fastmaf.backends import reference as definition
from fastmaf.layers import ACTIVATIONS, Affine, Autoregressive, BatchNorm, Block, Elementwise, Law, Terminal

numba = pytest.importorskip("fastmaf.backends.numba", exc_type=ImportError, reason="numba is not installed")
N = 70


@pytest.fixture(autouse=True)
def active(monkeypatch):
    monkeypatch.setattr(backends, "active", numba.backend)


def reference(flow, operation, *arguments):
    """What the reference gives in float64 for the same weights."""
    previous, backends.active = backends.active, definition.backend
    try:
        return getattr(flow.astype("float64"), operation)(*arguments)
    finally:
        backends.active = previous


def check(flow, contexts=None):
    """All operations, on rows that the reference makes."""
    dtype = flow.dtype
    noise = np.random.default_rng(3).normal(size=(N, flow.features)).astype(dtype)
    assert_close("from_noise", dtype, flow.from_noise(noise, contexts), reference(flow, "from_noise", noise, contexts))
    x = flow.from_noise(noise, contexts)
    assert_close("log_prob", dtype, flow.log_prob(x, contexts), reference(flow, "log_prob", x, contexts))
    assert_close("to_noise", dtype, flow.to_noise(x, contexts), reference(flow, "to_noise", x, contexts))
    for mine, theirs in zip(flow.log_prob_and_grad(x, contexts), reference(flow, "log_prob_and_grad", x, contexts), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert_close("gradient", dtype, mine, theirs)


@pytest.mark.parametrize("shape", make.SHAPES)
@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_equals_the_reference(shape, dtype, between, linear):
    features, hidden, context_features = shape
    flow = make.flow(features, hidden, 3, context_features, "tanh", dtype=dtype, affine=True, between=between, linear=linear)
    check(flow, make.contexts(flow, N))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("law", ["exp", "exp_soft"])
def test_activations_and_laws(activation, law, dtype):
    check(make.flow(6, (9, 7), 2, activation=activation, law=Law(law, constants={"clip": 0.5} if law == "exp_soft" else {}), dtype=dtype))


@pytest.mark.parametrize("shape", [(3,), (1, 3), (4, 1, 3), (4, N, 3)])
def test_contexts_of_every_shape(shape, dtype):
    flow = make.flow(5, (8,), 2, 3, "elu", dtype=dtype, affine=True)
    contexts = np.random.default_rng(4).normal(size=shape)
    x = np.random.default_rng(5).normal(size=(N, 5) if len(shape) < 3 or shape[1] == 1 else (4, N, 5))
    x = x[:1] if shape[0] == 1 else x
    assert_close("log_prob", dtype, flow.log_prob(x, contexts), reference(flow, "log_prob", x, contexts))
    for mine, theirs in zip(flow.log_prob_and_grad(x, contexts), reference(flow, "log_prob_and_grad", x, contexts), strict=True):
        assert_close("gradient", dtype, mine, theirs, factor=N)


@pytest.mark.parametrize("linear", [False, True])
def test_samples_are_those_of_the_reference(dtype, linear):
    flow = make.flow(5, (8, 8), 2, 2, "tanh", dtype=dtype, affine=True, bounds=True, linear=linear)
    contexts = make.contexts(flow, 3)
    mine = flow.sample_and_log_prob(N, contexts, 2**63 + 1, 2**40, 7)
    index, row = np.divmod(np.arange(3 * N, dtype=np.uint64), np.uint64(N))[::-1]
    noise = _random.normals(2**63 + 1, index + np.uint64(2**40), row + np.uint64(7), 5, flow.dtype).reshape(3, N, 5)
    expected = reference(flow, "from_noise", noise, contexts[:, None])
    assert_close("sample", dtype, mine[0], expected, factor=4)
    assert_close("log_prob", dtype, mine[1], flow.log_prob(mine[0], contexts[:, None]).astype(np.float64), factor=20)


def test_normals_are_those_of_the_reference(dtype):
    index = np.arange(50_000, dtype=np.uint64) + np.uint64(2**63)
    mine = np.empty((index.size, 6), dtype)
    numba._normals(np.uint64(2**64 - 5), index, index & np.uint64(0xFFFFFFFF), numba._table(np.dtype(dtype)), mine)
    expected = _random.normals(2**64 - 5, index, index & np.uint64(0xFFFFFFFF), 6, np.dtype(dtype))
    assert_close("normals", dtype, mine, expected.astype(np.float64))


def test_philox_known_answers():
    words = [np.uint64(word) for word in (0, 0xFFFFFFFF)]
    assert [f"{word:08x}" for word in numba._philox(*[words[0]] * 6)] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert [f"{word:08x}" for word in numba._philox(*[words[1]] * 6)] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


@pytest.mark.parametrize("linear", [False, True])
def test_a_row_does_not_depend_on_its_neighbours(dtype, linear):
    flow = make.flow(7, (17, 5), 2, 3, "silu", dtype=dtype, affine=True, linear=linear)
    x, contexts = np.random.default_rng(0).normal(size=(1000, 7)), make.contexts(flow, 1000)
    value, noise = flow.log_prob(x, contexts), flow.to_noise(x, contexts)
    for rows in (slice(0, 1), slice(999, None), slice(3, 130), slice(500, 629)):
        assert np.array_equal(flow.log_prob(x[rows], contexts[rows]), value[rows])
        assert np.array_equal(flow.from_noise(noise[rows], contexts[rows]), flow.from_noise(noise, contexts)[rows])
    samples = flow.sample(300, contexts[:5], seed=1)
    assert np.array_equal(flow.sample(100, contexts[2:4], seed=1, offset=200, context_offset=2), samples[2:4, 200:])
    x[17, 3], contexts[23, 1] = np.nan, np.nan
    broken = flow.log_prob(x, contexts)
    assert np.flatnonzero(np.isnan(broken)).tolist() == [17, 23]
    assert np.array_equal(np.delete(broken, [17, 23]), np.delete(value, [17, 23]))


def test_threads_change_nothing(monkeypatch):
    flow = make.flow(4, (8, 8), 2, bounds=True, dtype="float32")
    monkeypatch.setenv("FASTMAF_NUM_THREADS", "1")
    samples = flow.sample(20_000, seed=1)
    value = flow.log_prob(samples)
    monkeypatch.setenv("FASTMAF_NUM_THREADS", "7")
    assert np.array_equal(flow.sample(20_000, seed=1), samples) and np.array_equal(flow.log_prob(samples), value)
    results = [None] * 8
    workers = [threading.Thread(target=lambda k=k: results.__setitem__(k, flow.log_prob(samples))) for k in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.array_equal(result, value) for result in results)


def test_bounds():
    flow = make.flow(4, (8,), 2, bounds=[(0, 1), None, (2, None), (None, -1)], dtype="float32")
    x = flow.sample(N, seed=1)
    inside = flow.log_prob_and_grad(x)
    x[:4] = [[0, 0, 3, -2], [0.5, 0, 1, -2], [0.5, 0, 3, -1], [2, np.nan, 3, -2]]
    value, dx, _ = flow.log_prob_and_grad(x)
    assert value[:3].tolist() == [-np.inf] * 3 and np.isnan(value[3]) and (dx[:3] == 0).all()
    assert np.array_equal(value[4:], inside[0][4:]) and np.array_equal(dx[4:], inside[1][4:])
    assert_close("gradient", "float32", dx, reference(flow, "log_prob_and_grad", x)[1])
    extreme = flow.from_noise(np.full((2, 4), [[-60.0], [60.0]]))
    assert ((extreme[:, 0] > 0) & (extreme[:, 0] < 1) & (extreme[:, 2] > 2) & (extreme[:, 3] < -1)).all()


def test_without_networks(dtype):
    flow = fastmaf.Flow([Affine([1.0, 2.0], [0.5, -4.0])], dtype=dtype)
    check(flow)


def test_units_that_nothing_reads_change_nothing():
    """Hidden units of the highest degree feed no output: they are left out."""
    flow = make.flow(3, (6,), 1, seed=1)
    (made,) = flow.layers
    net = made.conditioner
    degrees = net.initial.degrees.copy()
    degrees[0] = 3
    final = net.final.weight.copy()
    final[:, 0] = 0
    initial, final = dataclasses.replace(net.initial, degrees=degrees), dataclasses.replace(net.final, weight=final)
    net = dataclasses.replace(net, initial=initial, final=final)
    check(fastmaf.Flow([dataclasses.replace(made, conditioner=net)], dtype="float64"))


def unsupported():
    plain = make.flow(3, (4,), 1)
    made, net = plain.layers[0], plain.layers[0].conditioner
    second = dataclasses.replace(net.initial, weight=np.zeros((4, 4)))

    def with_net(**changes):
        return dataclasses.replace(made, conditioner=dataclasses.replace(net, **changes))

    gated = dataclasses.replace(net.initial, context="gated", context_weight=np.zeros((4, 2)))
    mixture = Terminal([1], make.conditioner(np.random.default_rng(0), np.array([1]), (), rows=6), "mixture", 2)
    yield [BatchNorm(np.zeros(3), np.zeros(3), np.zeros(3), np.ones(3))], {}, "a BatchNorm layer"
    yield [made, Elementwise.from_bounds([(0, 1), None, None])], {}, "an? Elementwise layer behind other layers"
    yield [dataclasses.replace(made, direction="noise")], {}, "direction 'noise'"
    yield [dataclasses.replace(made, law=Law("softplus"))], {}, "law 'softplus' in form 'standardize'"
    yield [dataclasses.replace(made, law=Law("exp", "affine"))], {}, "law 'exp' in form 'affine'"
    for kind in ("residual", "linear_residual"):
        yield [with_net(blocks=(Block(kind, (second, second)),))], {}, f"{kind} blocks"
    yield [with_net(blocks=(Block("linear", (second,)),))], {}, "linear blocks"
    yield [with_net(final_activation=False)], {}, "a conditioner without activation"
    yield [with_net(skip=np.zeros((6, 3)))], {}, "direct weights"
    yield [with_net(final=dataclasses.replace(net.final, norm_scale=np.ones(4), norm_shift=np.zeros(4)))], {}, "an inner batch norm"
    yield [with_net(initial=gated)], {"context_features": 2}, "a context that enters as gated, none"
    yield [], {"base": mixture}, "a mixture base"


@pytest.mark.parametrize(("layers", "options", "message"), list(unsupported()))
def test_what_has_no_kernel_is_named(layers, options, message):
    flow = fastmaf.Flow(layers, **options)
    with pytest.raises(NotImplementedError, match=f"the numba backend has no kernel for {message}"):
        flow.log_prob(np.zeros((1, flow.features)), np.zeros(2) if options.get("context_features") else None)


def test_there_is_no_gradient_in_parameters():
    with pytest.raises(ValueError, match="numba backend has no gradient in parameters"):
        make.flow(3).vjp(np.zeros((2, 3)), None, np.ones(2))


def test_it_still_trains():
    """With the engine of the reference."""
    flow = fastmaf.MAF(2, transforms=1, hidden_features=(8,))
    x = np.random.default_rng(0).normal(size=(300, 2)) @ [[1.0, 0.9], [0.0, 0.1]]
    history = flow.fit(x, max_epochs=3, progress=False)
    assert len(history.validation) == 3 and isinstance(flow.layers[-1], Autoregressive)
