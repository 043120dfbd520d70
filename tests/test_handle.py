"""A handle: weights set in place, and gradients into given arrays; those of the noise maps against finite differences."""

from __future__ import annotations

import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import make
import numpy as np
import pytest
from tolerances import assert_close

import fastmaf

CASES = [name for name in make.CASES if name != "larger than a cache"]
FEW = [
    "5 (2,) 0",
    "7 (17, 5) 1",
    "tanh-exp",
    "affine exp_soft",
    "front",
    "front of 1",
    "without hidden layers",
    "fixed layers in front",
    "blocks",
    "Linear 7 (17, 5) 1",
    "gated normed blocks",
    "input_clip 5 (9, 7) 0",
    "both directions",
    "noise gated blocks",
    "noise input_clip",
]


def other(flow, seed=0):
    """Weights near those of a flow, NaN-free garbage where masks leave them out."""
    rng = np.random.default_rng(seed)
    weights = flow.parameters() + 0.02 * rng.normal(size=flow.parameters().shape).astype(flow.dtype)
    free = flow.record.free_parameters()
    return weights, np.where(free, weights, 0)


def test_free_parameters_are_those_that_the_density_depends_on():
    options = {"linear": True, "direct": True, "components": 3, "batch_norm": True, "activation": "tanh", "dtype": "float64"}
    flow = fastmaf.MAF(4, 2, transforms=2, hidden_features=(7, 5), seed=0, **options)
    rng = np.random.default_rng(0)
    gradient = flow.vjp(rng.normal(size=(200, 4)), rng.normal(size=(200, 2)), rng.normal(size=200))[2]
    free = flow.record.free_parameters()
    np.testing.assert_array_equal(gradient != 0, free)
    for discrete in (fastmaf.MADE(4, conditional="categorical", categories=[2, 3, 4, 2]), fastmaf.MADE(3, conditional="bernoulli")):
        np.testing.assert_array_equal(discrete.parameters() != 0, discrete.record.free_parameters())


@pytest.mark.parametrize("name", CASES)
def test_what_is_set_in_place_is_what_a_new_flow_has(name, backend, dtype):
    given = make.case(name, dtype)
    raw, clean = other(given.flow)
    new = given.flow.with_parameters(clean) if clean.size else given.flow
    handle = fastmaf.Handle(given.flow)
    handle.log_prob(given.x, given.context)  # packed with the weights of before
    handle.set_parameters(raw)
    context = None if given.context is None else given.context[:3]
    pairs = {
        "log_prob": (handle.log_prob(given.x, given.context), new.log_prob(given.x, given.context)),
        "to_noise": (handle.to_noise(given.x, given.context), new.to_noise(given.x, given.context)),
        "from_noise": (handle.from_noise(given.noise, given.context), new.from_noise(given.noise, given.context)),
        "sample": (handle.sample(11, context, seed=3), new.sample(11, context, seed=3)),
        "parameters": (handle.parameters(), clean),
        "flow": (handle.flow.log_prob(given.x, given.context), new.log_prob(given.x, given.context)),
    }
    if backend != "numba":  # which has no gradient in the parameters
        of_handle = handle.vjp(given.x, given.context, given.cotangent)
        for key, own, expected in zip(
            ("dx", "dcontext", "dparameters"), of_handle, new.vjp(given.x, given.context, given.cotangent), strict=True
        ):
            assert (own is None) == (expected is None)
            if own is not None:
                pairs[key] = own, expected
    for key, (own, expected) in pairs.items():
        np.testing.assert_array_equal(own, expected, err_msg=key, strict=True)


def test_the_flow_that_a_handle_was_made_of_is_its_own(core):
    flow = make.flow(4, dtype="float32")
    x = make.rows(flow, 5)
    before = flow.log_prob(x)
    handle = fastmaf.Handle(flow)
    handle.set_parameters(other(flow)[0])
    np.testing.assert_array_equal(flow.log_prob(x), before)
    first = handle.log_prob(x)
    assert not np.array_equal(first, before)
    flow.layers = flow.layers[:-1]
    np.testing.assert_array_equal(handle.log_prob(x), first)


def test_version_counts_changes():
    flow = fastmaf.MAF(3, seed=0)
    handle = fastmaf.Handle(flow)
    handle.set_parameters(flow.parameters())
    assert handle.version == 0
    handle.set_parameters(0.5 * flow.parameters().astype(np.float64))
    assert handle.version == 1
    last = 0.5 * flow.parameters()
    last[-1] += 1  # behind what is compared first
    handle.set_parameters(last)
    assert handle.version == 2 and handle.parameters()[-1] == last[-1]


@pytest.mark.parametrize("left_out", ["dx", "dcontext", "dparameters"])
def test_every_gradient_can_be_left_out_or_given_room(left_out, core, dtype):
    flow = make.flow(5, context_features=3, dtype=dtype)
    handle = fastmaf.Handle(flow)
    context = make.contexts(flow, 4, 1)
    x, cotangent = make.rows(flow, 9, np.zeros(3)), np.random.default_rng(0).normal(size=(4, 9)).astype(dtype)
    expected = dict(zip(("dx", "dcontext", "dparameters"), flow.vjp(x, context, cotangent), strict=True))
    room = {name: np.full_like(array, np.nan) for name, array in expected.items()}
    room[left_out] = None
    result = dict(zip(room, handle.vjp(x, context, cotangent, **room), strict=True))
    for name, array in result.items():
        assert array is room[name]
        if array is not None:
            assert_close("parameters", dtype, array, expected[name])


def test_no_rows_have_zero_gradients():
    handle = fastmaf.Handle(fastmaf.MAF(3, 2))
    room = np.ones(2, np.float32), np.ones(handle.size, np.float32)
    dx, dcontext, dparameters = handle.vjp(np.empty((0, 3)), np.zeros(2), np.empty(0), dcontext=room[0], dparameters=room[1])
    assert dx.shape == (0, 3) and not dcontext.any() and not dparameters.any()
    for vjp in (handle.to_noise_vjp, handle.from_noise_vjp):
        dx, dcontext, dparameters = vjp(np.empty((0, 3)), np.zeros(2), np.empty((0, 3)))
        assert dx.shape == (0, 3) and not dcontext.any() and not dparameters.any()


def test_what_does_not_fit_is_refused_by_name():
    flow = fastmaf.MAF(3, 2, transforms=1, hidden_features=(5,))
    handle = fastmaf.Handle(flow)
    x, context, ones = np.zeros((4, 3)), np.zeros(2), np.ones(4)
    with pytest.raises(ValueError, match=r"parameters has shape \(3,\); the flow has \d+ parameters"):
        handle.set_parameters(np.zeros(3))
    before = handle.parameters()
    wrong = before.copy()
    first, second = np.flatnonzero(flow.record.free_parameters())[[4, 7]]
    wrong[[first, second]] = np.nan, np.inf
    with pytest.raises(ValueError, match=f"parameters are not finite in 2 places, the first at {first}"):
        handle.set_parameters(wrong)
    assert np.array_equal(handle.parameters(), before) and handle.version == 0
    with pytest.raises(ValueError, match="dx has shape"):
        handle.vjp(x, context, ones, dx=np.zeros((4, 2), np.float32))
    with pytest.raises(ValueError, match="dcontext shares memory with an input"):
        handle.vjp(x, context, ones, dcontext=(room := np.zeros(handle.size, np.float32))[:2], dparameters=room)
    with pytest.raises(ValueError, match=r"cotangent has shape \(4,\); to_noise has shape \(4, 3\)"):
        handle.to_noise_vjp(x, context, ones)
    with pytest.raises(ValueError, match="flow is of type int"):
        fastmaf.Handle(3)
    discrete = fastmaf.Handle(fastmaf.MADE(3, conditional="bernoulli"))
    assert discrete.vjp(x, None, ones)[0] is None
    with pytest.raises(ValueError, match="a flow with a bernoulli base has no noise"):
        discrete.to_noise_vjp(x, None, x)


def test_masked_weights_that_are_not_finite_have_no_effect():
    flow = fastmaf.MAF(3, transforms=1, hidden_features=(5,), seed=0)
    handle = fastmaf.Handle(flow)
    weights = 0.5 * flow.parameters()
    expected = flow.with_parameters(weights).log_prob(np.zeros((2, 3)))
    weights[~flow.record.free_parameters()] = np.inf
    handle.set_parameters(weights)
    np.testing.assert_array_equal(handle.log_prob(np.zeros((2, 3))), expected)


def test_a_handle_pickles_with_its_weights():
    flow = make.flow(3)
    handle = fastmaf.Handle(flow)
    handle.set_parameters(0.7 * flow.parameters())
    x = make.rows(flow, 4)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(handle)).log_prob(x), handle.log_prob(x))


def test_threads_keep_each_other_out():
    flow = fastmaf.MAF(4, transforms=2, hidden_features=(30,), seed=0)
    handle, x = fastmaf.Handle(flow), np.random.default_rng(0).normal(size=(50, 4))
    factors = np.linspace(0.2, 1, 8)
    expected = [flow.with_parameters((factor * flow.parameters()).astype(np.float32)).log_prob(x) for factor in factors]

    def run(k):
        same = True
        for _ in range(30):
            with handle:
                handle.set_parameters((factors[k] * flow.parameters()).astype(np.float32))
                time.sleep(0)
                same &= np.array_equal(handle.log_prob(x), expected[k])
        return same

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(run, range(8)))


# The noise maps


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("operation", ["to_noise", "from_noise"])
def test_gradients_of_the_noise_maps_are_differences(name, operation, core):
    given = make.case(name, "float64")
    rows = make.calm_rows(given, 6)
    x, context = given.x[rows], None if given.context is None else given.context[rows]
    handle = fastmaf.Handle(given.flow)
    u = handle.to_noise(x, context)
    at = x if operation == "to_noise" else u
    cotangent = np.random.default_rng(5).normal(size=x.shape)
    run, vjp = getattr(handle, operation), getattr(handle, f"{operation}_vjp")
    first, dcontext, dparameters = vjp(x, context, cotangent)

    def value(at, context, weights):
        handle.set_parameters(weights)
        return np.sum(cotangent * run(at, context))

    weights = given.flow.parameters()
    assert_close("differences", "float64", first, make.numerical_gradient(lambda v: value(v, context, weights), at))
    assert (dcontext is None) == (context is None)
    if context is not None:
        assert_close("differences", "float64", dcontext, make.numerical_gradient(lambda v: value(at, v, weights), context))
    free = np.flatnonzero(given.flow.record.free_parameters())
    some = np.random.default_rng(6).choice(free, min(60, free.size), replace=False)

    def moved(part):
        whole = weights.copy()
        whole[some] = part
        return value(at, context, whole)

    assert_close("differences", "float64", dparameters[some], make.numerical_gradient(moved, weights[some]))
    assert not np.delete(dparameters, free).any()


@pytest.mark.parametrize("name", [*CASES, *make.MIXTURES])
@pytest.mark.parametrize("operation", ["to_noise", "from_noise"])
def test_one_pass_gives_the_gradients_that_densities_give(name, operation, core):
    given = make.case(name, "float64")
    rows = slice(0, 60)
    x, context = given.x[rows], None if given.context is None else given.context[rows]
    cotangent = np.random.default_rng(5).normal(size=x.shape)
    handle = fastmaf.Handle(given.flow)
    dparameters = np.empty(handle.size)
    expected = *getattr(handle._by_densities(), operation)(x, context, cotangent, dparameters), dparameters
    in_one_pass = getattr(handle, f"{operation}_vjp")(x, context, cotangent)
    for key, own, by_densities in zip(("rows", "context", "parameters"), in_one_pass, expected, strict=True):
        assert (own is None) == (by_densities is None)
        if own is not None and own.size:
            np.testing.assert_allclose(own, by_densities, rtol=1e-6, atol=1e-9 * (1 + np.abs(by_densities).max()), err_msg=key)
    _, _, left_out = getattr(handle, f"{operation}_vjp")(x, context, cotangent, dparameters=False)
    assert left_out is None


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("operation", ["to_noise", "from_noise"])
def test_gradients_of_the_noise_maps_in_float32(name, operation, core):
    given = make.case(name, "float32")
    cotangent = np.random.default_rng(5).normal(size=given.x.shape).astype(np.float32)
    cotangent[::7] *= 1e-6
    cotangent[3] = 0
    exact = fastmaf.Handle(given.flow.astype("float64"))
    results = [getattr(handle, f"{operation}_vjp")(given.x, given.context, cotangent) for handle in (fastmaf.Handle(given.flow), exact)]
    for own, expected in zip(*results, strict=True):
        if own is not None:
            assert_close("gradient", "float32", own, expected)
            if own.shape == given.x.shape:
                assert not own[3].any() and own[7].any()


@pytest.mark.parametrize("operation", ["to_noise_vjp", "from_noise_vjp"])
def test_gradients_of_the_noise_maps_are_summed_where_rows_or_contexts_are_shared(operation, monkeypatch):
    monkeypatch.setattr("fastmaf._gradients.BUDGET", 4096)  # several blocks
    flow = make.flow(3, context_features=2)
    handle = fastmaf.Handle(flow)
    context, x = make.contexts(flow, 4, 1), make.rows(flow, 5, np.zeros(2))
    cotangent = np.random.default_rng(0).normal(size=(4, 5, 3))
    vjp = getattr(handle, operation)
    dx, dcontext, dparameters = vjp(x, context, cotangent)
    each = [vjp(x, own, part) for own, part in zip(context[:, 0], cotangent, strict=True)]
    np.testing.assert_allclose(dx, sum(result[0] for result in each), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(dcontext[:, 0], [result[1] for result in each], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(dparameters, sum(result[2] for result in each), rtol=1e-9, atol=1e-9)


def test_rows_outside_the_bounds_have_no_gradient_of_the_noise():
    flow = make.flow(2, bounds=[(0, 1), None])
    handle = fastmaf.Handle(flow)
    x = np.array([[0.5, 0.1], [1.5, 0.2], [0.0, 0.3]])
    for vjp in (handle.to_noise_vjp, handle.from_noise_vjp):
        dx, _, dparameters = vjp(x, None, np.ones_like(x))
        assert dx[0].all() and not dx[1:].any() and np.isfinite(dparameters).all()
        np.testing.assert_allclose(dparameters, vjp(x[:1], None, np.ones((1, 2)))[2])


@pytest.mark.parametrize("operation", ["to_noise", "from_noise"])
def test_rows_far_out_do_not_spoil_the_gradients_of_weights(operation, core):
    """In float32 a scale may be zero there, and the gradient no number: that of such a row is zero."""
    for direction in ("data", "noise"):
        flow = make.flow(5, (16,), 3, law="exp", direction=direction, dtype="float32", seed=2)
        noise = (5 * np.random.default_rng(1).normal(size=(2000, 5))).astype("f4")
        x = flow.from_noise(noise)
        x = x[np.isfinite(x).all(axis=1)]
        handle = fastmaf.Handle(flow)
        dx, _, dparameters = getattr(handle, f"{operation}_vjp")(x, None, np.ones_like(x))
        lost = ~dx.any(axis=1)
        assert 0 < lost.sum() < 50 and np.isfinite(dx).all() and np.isfinite(dparameters).all()
        _, _, others = getattr(handle, f"{operation}_vjp")(x[~lost], None, np.ones_like(x[~lost]))
        np.testing.assert_allclose(dparameters, others, rtol=1e-3, atol=1e-4 * np.abs(others).max())


def test_a_mixture_base_is_no_part_of_the_maps(core):
    flow = make.flow(3, (8,), base=make.Law("exp_soft"), seed=1, dtype="float32")
    x = (1e20 * np.random.default_rng(0).normal(size=(8, 3))).astype("f4")
    assert np.isfinite(flow.to_noise(x)).all()
    dx, _, dparameters = fastmaf.Handle(flow).to_noise_vjp(x, None, np.ones_like(x))
    assert dx.any(axis=1).all() and np.isfinite(dparameters).all()


@pytest.mark.parametrize("base", [None, make.Law("softplus")], ids=["normal", "mixture"])
@pytest.mark.parametrize("operation", ["to_noise", "from_noise"])
def test_gradients_with_the_log_determinant(core, operation, base):
    """Against differences of the map and its log|det| together, in rows, contexts and weights."""
    flow = make.flow(4, (9, 8), 2, context_features=2, activation="tanh", dtype="float64", base=base)
    handle, rng = fastmaf.Handle(flow), np.random.default_rng(0)
    at, context, factor, of_map = (rng.normal(size=shape) for shape in ((3, 4), (3, 2), (3, 4), (3,)))
    x = at if operation == "to_noise" else handle.from_noise(at, context)
    free = np.flatnonzero(flow.record.free_parameters())[::7]

    def total(at, context, weights=None):
        if weights is not None:
            handle.set_parameters(weights)
        result, log_det = getattr(handle, operation)(at, context, log_det=True)
        handle.set_parameters(flow.parameters())
        return (factor * result).sum() + (of_map * log_det).sum()

    def slopes(function, array, places):
        found = []
        for place in places:
            step = np.zeros(array.size)
            step[place] = 1e-6
            found.append((function(array + step.reshape(array.shape)) - function(array - step.reshape(array.shape))) / 2e-6)
        return np.array(found)

    dx, dcontext, dweights = getattr(handle, f"{operation}_vjp")(x, context, factor, log_det=of_map)
    np.testing.assert_allclose(dx.ravel(), slopes(lambda a: total(a, context), at, range(at.size)), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(dcontext.ravel(), slopes(lambda c: total(at, c), context, range(context.size)), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(dweights[free], slopes(lambda w: total(at, context, w), flow.parameters(), free), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="cotangent has shape"):
        getattr(handle, f"{operation}_vjp")(x, context, factor, log_det=np.ones(4))
