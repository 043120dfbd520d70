"""Flows of flowjax."""

from __future__ import annotations

import foreign
import numpy as np
import pytest

import fastmaf
from fastmaf.interop import from_flowjax

jax = pytest.importorskip("jax")
flows = pytest.importorskip("flowjax.flows")
eqx = pytest.importorskip("equinox")
import flowjax.bijections as b  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jax.random as jr  # noqa: E402
from flowjax.distributions import Normal, StandardNormal, StudentT, Transformed  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

KEY = jr.key(0, impl="rbg")  # quicker to compile


def maf(features=4, base=None, **options):
    return flows.masked_autoregressive_flow(KEY, base_dist=base or StandardNormal((features,)), **{"flow_layers": 3} | options)


FLOWS = {
    "default": lambda: maf(flow_layers=8),
    "not inverted": lambda: maf(invert=False),
    "context": lambda: maf(cond_dim=3, nn_depth=2, nn_width=20, nn_activation=jnp.tanh),
    "context, not inverted": lambda: maf(cond_dim=3, invert=False),
    "no hidden layers": lambda: maf(nn_depth=0, cond_dim=2),
    "two features": lambda: maf(2),
    "one feature": lambda: maf(1, cond_dim=2),
    "a base": lambda: maf(base=Normal(jnp.arange(4.0), jnp.arange(1.0, 5.0))),
    "plain affine": lambda: maf(transformer=b.Affine(0.5, 2.0)),
    "silu": lambda: maf(nn_activation=jax.nn.silu),
    "leaky relu": lambda: maf(nn_activation=jax.nn.leaky_relu),
    "chain": lambda: Transformed(
        StandardNormal((4,)),
        b.Chain([b.Invert(maf().bijection), b.Flip((4,)), b.Affine(jnp.arange(4.0), jnp.arange(1.0, 5.0)), b.Loc(jnp.ones(4))]),
    ),
}


def trained(make):
    """All weights random, then a few steps."""
    flow = make()
    params, static = eqx.partition(flow, eqx.is_inexact_array)
    leaves, tree = jax.tree_util.tree_flatten(params)
    rng = np.random.default_rng(0)
    leaves = [leaf + np.float32(0.1) * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    params = jax.tree_util.tree_unflatten(tree, leaves)
    x = 1 + rng.normal(size=(128, *flow.shape)).astype(np.float32)
    c = None if flow.cond_shape is None else rng.normal(size=(128, *flow.cond_shape)).astype(np.float32)

    @jax.jit
    def step(params):
        gradient = jax.grad(lambda p: -eqx.combine(p, static).log_prob(x, c).mean())(params)
        return jax.tree_util.tree_map(lambda p, g: p - 1e-2 * jnp.clip(g, -1, 1), params, gradient)

    for _ in range(5):
        params = step(params)
    return eqx.combine(params, static)


def theirs(flow):
    """What `foreign.agree` asks for, of a flow of flowjax."""

    with jax.enable_x64(True):
        wide = jax.tree_util.tree_map(lambda a: jnp.asarray(np.asarray(a), "float64") if eqx.is_inexact_array(a) else a, flow)
    density = eqx.filter_jit(lambda own, x, context: own.log_prob(x, context))

    @eqx.filter_jit
    def transform(own, noise, context):
        if isinstance(own.base_dist, Normal):
            noise = own.base_dist.loc + own.base_dist.scale * noise
        if context is None:
            return jax.vmap(own.bijection.transform)(noise)
        return jax.vmap(own.bijection.transform)(noise, context)

    def arrays(dtype, *given):
        return [None if array is None else jnp.asarray(array, dtype) for array in given]

    def log_prob(x, context):
        with jax.enable_x64(True):
            return np.asarray(density(wide, *arrays("float64", x, context)))

    def inverse(noise, context):
        with jax.enable_x64(True):
            return np.asarray(transform(wide, *arrays("float64", noise, context)))

    def single(x, context):
        return np.asarray(density(flow, *arrays("float32", x, context)))

    return log_prob, inverse, single


@pytest.mark.parametrize("name", FLOWS)
def test_densities_and_samples_are_those_of_flowjax(name):
    flow = trained(FLOWS[name])
    with foreign.quiet():
        made = from_flowjax(flow)
    assert made.dtype == np.float32 and made.training["source"]["library"] == "flowjax"
    foreign.agree(lambda dtype: from_flowjax(flow, dtype=dtype), *theirs(flow))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: maf(transformer=b.RationalQuadraticSpline(knots=4, interval=3)), "the transformer RationalQuadraticSpline"),
        (lambda: Transformed(StandardNormal((2,)), b.Planar(KEY, dim=2)), "Planar cannot be imported; the record has no layer for it"),
        (lambda: maf(base=StudentT(3 * jnp.ones(4))), "the base"),
        (lambda: maf(nn_activation=jax.nn.gelu), "the activation gelu"),
    ],
)
def test_what_the_record_cannot_express_is_refused_by_name(make, message):
    with pytest.raises(NotImplementedError, match=message) as error:
        from_flowjax(make())
    assert len(str(error.value)) <= 200


def test_other_objects_are_refused():
    with pytest.raises(ValueError, match="takes a Transformed distribution of flowjax, not StandardNormal"):
        fastmaf.from_flowjax(StandardNormal((2,)))
