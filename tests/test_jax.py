"""Flows in JAX: what they give under jit, grad, vmap and scan, on the core and by calls of Python, beside `fastmaf.Flow`."""

from __future__ import annotations

import gc
import math
import pathlib
import re

import make
import numpy as np
import pytest
from tolerances import assert_close

import fastmaf

jax = pytest.importorskip("jax")
jnp = jax.numpy
fast = pytest.importorskip("fastmaf.jax")

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else pytest.importorskip("jax.experimental").enable_x64
D, C, N = 5, 2, 7


@pytest.fixture(params=["core", "python"])
def way(request):
    """Whether XLA calls the core, or Python."""
    if request.param == "core":
        pytest.importorskip("fastmaf._core", reason="the compiled core is not here")
    with make.using(None if request.param == "core" else make.definition.backend):
        yield request.param


@pytest.fixture(params=["float32", "float64"])
def wide(request):
    """A dtype, which JAX knows."""
    with enable_x64(request.param == "float64"):
        yield request.param


def flow_of(dtype="float32", context_features=C, **options):
    return make.flow(D, (17, 9), 2, context_features=context_features, dtype=dtype, **options)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


SHAPES = [
    ((N, D), (N, C)),
    ((N, D), (C,)),
    ((D,), (C,)),
    ((N, D), (3, 1, C)),
    ((3, N, D), (3, 1, C)),
    ((3, N, D), (3, N, C)),
    ((D,), (3, C)),
]


@pytest.mark.parametrize(("of_x", "of_context"), SHAPES)
def test_log_prob_and_gradients(way, wide, of_x, of_context):
    flow = flow_of(wide)
    own = fast.Flow(flow)
    x, context = (numbers(*shape, seed=k).astype(wide) for k, shape in enumerate((of_x, of_context)))
    lead = np.broadcast_shapes(of_x[:-1], of_context[:-1])
    rows, contexts = np.broadcast_to(x, (*lead, D)).reshape(-1, D), np.broadcast_to(context, (*lead, C)).reshape(-1, C)
    value, dx, dcontext = flow.log_prob_and_grad(rows, contexts)
    result = jax.jit(own.log_prob)(x, context)
    assert result.dtype == wide and result.shape == lead
    assert_close("log_prob", wide, result, value.reshape(lead).astype("float64"))
    factor = numbers(*lead, seed=5).astype(wide)
    gradients = jax.jit(jax.grad(lambda x, context: (factor * own.log_prob(x, context)).sum(), (0, 1)))(x, context)
    for gradient, array, each in zip(gradients, (x, context), (dx, dcontext), strict=True):
        whole = each.astype("float64").reshape(*lead, -1) * factor[..., None]
        kept = (1,) * (whole.ndim - array.ndim) + array.shape
        axes = tuple(k for k in range(whole.ndim) if whole.shape[k] != kept[k])
        assert_close("gradient", wide, gradient, whole.sum(axis=axes, keepdims=True).reshape(array.shape), factor=8)
    step = numbers(*of_x, seed=6).astype(wide)
    forward = jax.jvp(lambda x: own.log_prob(x, context), (x,), (step,))[1]
    assert_close("gradient", wide, forward, (dx.reshape(*lead, D).astype("float64") * step).sum(axis=-1), factor=8)


def test_bits_are_those_of_the_flow():
    pytest.importorskip("fastmaf._core", reason="the compiled core is not here")
    flow = flow_of()
    own, x, context = fast.Flow(flow), numbers(1000, D).astype("float32"), numbers(1000, C).astype("float32")
    with make.using(None):
        assert np.array_equal(jax.jit(own.log_prob)(x, context), flow.log_prob(x, context))
        key = jax.random.key(3)
        high, low = (int(part) for part in jax.random.bits(key, (2,), jnp.uint32))
        assert np.array_equal(own.sample(key, 50, context[:4]), flow.sample(50, context[:4], seed=high << 32 | low))


@pytest.mark.parametrize("features", [0, C])
def test_vmap_is_a_loop(way, features):
    flow = flow_of(context_features=features)
    own, x = fast.Flow(flow), numbers(4, N, D).astype("float32")
    context = numbers(4, C).astype("float32") if features else None
    arguments = (x, context) if features else (x,)
    for function in (
        own.log_prob,
        jax.grad(lambda *a: own.log_prob(*a).sum()),
        own.to_noise,
        lambda *a: own.from_noise(*a, log_det=True)[1],
    ):
        each = [function(*(array[i] for array in arguments)) for i in range(4)]
        assert_close("gradient", "float32", jax.jit(jax.vmap(function))(*arguments), np.array(each, "float64"))
    rows = jax.vmap(jax.vmap(own.log_prob, (0, None)), (0, 0))(x, context) if features else jax.vmap(jax.vmap(own.log_prob))(x)
    assert_close("log_prob", "float32", rows, np.array(own.log_prob(x, context[:, None] if features else None), "float64"))
    keys = jax.random.split(jax.random.key(0), 4)
    drawn = jax.vmap(lambda key, *a: own.sample(key, 3, *a))(keys, *arguments[1:])
    each = [own.sample(keys[i], 3, *(array[i] for array in arguments[1:])) for i in range(4)]
    assert_close("sample", "float32", drawn, np.array(each, "float64"))


def test_scan_without_python(way):
    own = fast.Flow(flow_of(context_features=0))
    start = jnp.zeros(D)

    def climb(x, _):
        value, gradient = jax.value_and_grad(own.log_prob)(x)
        return x + 1e-3 * gradient, value

    values = jax.jit(lambda x: jax.lax.scan(climb, x, None, length=100)[1])(start)
    assert values[-1] > values[0] and np.isfinite(values).all()


@pytest.mark.parametrize("operation", ["to_noise", "from_noise"])
@pytest.mark.parametrize("log_det", [False, True])
def test_gradients_of_the_maps(way, operation, log_det):
    with enable_x64(True):
        own = fast.Flow(flow_of("float64", activation="tanh"))
        at, context = numbers(3, D), numbers(C, seed=1)

        def function(at, context):
            result = getattr(own, operation)(at, context, log_det=log_det)
            return (jnp.sin(result[0]).sum() + (jnp.arange(3) * result[1]).sum()) if log_det else jnp.sin(result).sum()

        both = jax.jit(jax.grad(function, (0, 1)))(at, context)
        for k, (gradient, array) in enumerate(zip(both, (at, context), strict=True)):
            expected = np.empty(array.size)
            for i, unit in enumerate(np.eye(array.size) * 1e-6):
                ends = [function(*[(a + s * unit.reshape(a.shape)) if j == k else a for j, a in enumerate((at, context))]) for s in (1, -1)]
                expected[i] = (ends[0] - ends[1]) / 2e-6
            assert np.allclose(gradient.reshape(-1), expected, rtol=1e-6, atol=1e-7)


def test_gradient_of_samples_by_differences(way):
    with enable_x64(True):
        own = fast.Flow(flow_of("float64", activation="tanh"))
        key, contexts = jax.random.key(1), numbers(2, C)

        def function(contexts):
            return (own.sample(key, 4, contexts) ** 2).sum()

        gradient = jax.jit(jax.grad(function))(contexts)
        for i, j in np.ndindex(2, C):
            ends = [function(contexts + s * 1e-6 * (np.arange(2) == i)[:, None] * (np.arange(C) == j)) for s in (1, -1)]
            assert math.isclose(gradient[i, j], (ends[0] - ends[1]) / 2e-6, rel_tol=1e-5, abs_tol=1e-7)


def test_samples_and_densities(way):
    flow = flow_of()
    own, contexts = fast.Flow(flow), numbers(3, C)
    x, density = jax.jit(own.sample_and_log_prob, static_argnums=1)(jax.random.key(0), 6, contexts)
    assert x.shape == (3, 6, D) and density.shape == (3, 6)
    assert_close("log_prob", "float32", density, flow.log_prob(np.array(x), contexts[:, None]).astype("float64"), factor=8)
    other = own.sample(jax.random.key(1), 6, contexts)
    assert not np.isclose(x, other).all(axis=-1).any()
    assert own.sample(jax.random.key(1), 0, contexts[0]).shape == (0, D)


def test_discrete_variables_and_mixtures(way):
    coins = fastmaf.MADE(4, conditional="bernoulli", hidden_features=(8,), context_features=1, seed=0)
    own, x = fast.Flow(coins), np.array([[0, 1, 1, 0]] * 3)
    assert_close("log_prob", "float32", own.log_prob(x, np.ones(1)), coins.log_prob(x, np.ones(1)).astype("float64"))
    assert set(np.unique(own.sample(jax.random.key(0), 20, np.ones(1)))) == {0, 1}
    assert jax.grad(lambda c: own.log_prob(x, c).sum())(jnp.ones(1)).shape == (1,)
    with pytest.raises(ValueError, match="no gradient in x"):
        jax.grad(lambda x: own.log_prob(x, jnp.ones(1)).sum())(jnp.asarray(x, "float32"))
    with pytest.raises(ValueError, match="no noise"):
        own.to_noise(x, np.ones(1))
    mixture = fast.Flow(fastmaf.MAF(3, context_features=1, components=3, hidden_features=(8,), seed=0))
    assert mixture.sample(jax.random.key(0), 20, jnp.ones(1)).shape == (20, 3)
    with pytest.raises(NotImplementedError, match="base is normal"):
        jax.grad(lambda c: mixture.sample(jax.random.key(0), 20, c).sum())(jnp.ones(1))


def test_rows_without_density(way):
    flow = fastmaf.MAF(3, bounds=[(0, 1), None, None], hidden_features=(8,), transforms=2, seed=0)
    x = np.array([[0.5, 0, 0], [1, 0, 0], [-3, 0, 0], [0.5, np.nan, 0], [0.5, np.inf, 0]], "float32")
    own = fast.Flow(flow)
    value, gradient = jax.vmap(jax.value_and_grad(own.log_prob))(x)
    assert np.array_equal(value, flow.log_prob(x), equal_nan=True)
    assert not gradient[1:3].any() and np.isfinite(gradient[0]).all()


def test_second_derivatives_are_refused_by_name():
    own = fast.Flow(flow_of(context_features=0))
    with pytest.raises(NotImplementedError, match="first derivatives alone"):
        jax.hessian(own.log_prob)(jnp.zeros(D))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda own: own.log_prob(np.zeros((3, D + 1)), np.zeros(C)), r"x has shape \(3, 6\); its last axis must be 5"),
        (lambda own: own.log_prob(np.zeros((3, D))), "context is missing; it has 2 columns"),
        (lambda own: own.log_prob(np.zeros((3, D)), np.zeros((4, C))), "do not broadcast"),
        (lambda own: own.log_prob(np.zeros(D), 1j * np.zeros(C)), "context has dtype complex"),
        (lambda own: own.sample(jax.random.key(0), -1, np.zeros(C)), "n must be a number of rows"),
        (lambda own: jax.jit(own.sample)(jax.random.key(0), 3, np.zeros(C)), "known when the function is traced"),
        (lambda own: own.sample(jax.random.key(0), 3, np.zeros((1, 2, C))), r"must be \(C,\) or \(c, C\)"),
        (lambda own: fast.Flow(3), "must be a fastmaf.Flow"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call(fast.Flow(flow_of()))


def test_a_flow_is_an_argument_and_outlives_no_harm():
    flow = flow_of(context_features=0)
    x = numbers(3, D).astype("float32")
    evaluate = jax.jit(lambda flow, x: flow.log_prob(x))
    first, second = fast.Flow(flow), fast.Flow(flow_of(context_features=0, activation="tanh"))
    assert np.array_equal(evaluate(first, x), first.log_prob(x)) and np.array_equal(evaluate(second, x), second.log_prob(x))
    if first._key is None:
        return
    left = jax.jit(lambda x: fast.Flow(flow).log_prob(x)).lower(x).compile()
    jax.clear_caches()
    gc.collect()
    with pytest.raises(Exception, match="the fastmaf.jax.Flow of this compiled function is gone"):
        left(x).block_until_ready()


def test_float64_flow_where_jax_has_float32_alone(way):
    flow = flow_of("float64", context_features=0)
    own, x = fast.Flow(flow), numbers(4, D)
    result = own.log_prob(x)
    assert result.dtype == own.dtype == "float32"
    assert np.allclose(result, flow.log_prob(x.astype("float32")), rtol=1e-6)


def test_other_dtypes(way):
    own, x = fast.Flow(flow_of(context_features=0)), numbers(4, D)
    half = jnp.asarray(x, jnp.bfloat16)
    assert np.array_equal(own.log_prob(half), own.log_prob(half.astype("float32")))
    assert jax.grad(lambda x: own.log_prob(x).sum())(half).dtype == jnp.bfloat16
    assert np.array_equal(own.log_prob(np.zeros((2, D), int)), own.log_prob(np.zeros((2, D), "float32")))


def test_the_page_runs():
    page = pathlib.Path(__file__).parents[1] / "docs" / "jax.md"
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, "docs/jax.md", "exec"), names)
    assert names["path"].shape == (1000, 3) and names["of_context"].any()
