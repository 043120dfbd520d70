"""Flows of flowjax."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastmaf import masks
from fastmaf.flow import Flow
from fastmaf.interop import _common
from fastmaf.interop._common import refuse
from fastmaf.layers import Autoregressive, Block, FlowLayer, Law, Permutation

__all__ = ["from_flowjax"]

Array = NDArray[Any]

SELF = "from_flowjax"


def from_flowjax(distribution: Any, *, dtype: DTypeLike | None = None) -> Flow:
    """A flow of flowjax as a flow of fastmaf, with the same density and, from the same noise, the same samples.

    Taken are `Transformed` distributions of what `masked_autoregressive_flow` makes with its affine transformer or with `Affine`
    (inverted or not, any context, width, depth and activation), of `Permute`, `Flip`, `Affine`, `Loc` and `Scale`, in any chain, scan or
    inverse; over `Normal` or `StandardNormal`.

    Parameters
    ----------
    distribution : flowjax.distributions.Transformed
    dtype : {"float32", "float64"}, optional
        Of the flow; that of the weights if None.

    Returns
    -------
    Flow
        Its `training` says the source.

    Raises
    ------
    NotImplementedError
        With the name of the bijection, if the record cannot express it.
    ImportMismatchError
        If the log-densities of flowjax and of the flow differ on random rows.

    Examples
    --------
    >>> import fastmaf, pytest
    >>> bijections, distributions = pytest.importorskip("flowjax.bijections"), pytest.importorskip("flowjax.distributions")
    >>> theirs = distributions.Transformed(distributions.StandardNormal((2,)), bijections.Flip((2,)))
    >>> fastmaf.from_flowjax(theirs).layers
    (Permutation(perm=array([1, 0])),)
    """
    import equinox as eqx
    import jax
    from flowjax.distributions import AbstractTransformed

    if not isinstance(distribution, AbstractTransformed):
        raise ValueError(f"{SELF} takes a Transformed distribution of flowjax, not {_common.named(distribution)}")
    if len(distribution.shape) != 1:
        raise refuse(SELF, f"a distribution of shape {tuple(distribution.shape)}", "rows of a flow have one axis")
    features = int(distribution.shape[0])
    context_features = 0 if distribution.cond_shape is None else int(np.prod(distribution.cond_shape))
    leaves = jax.tree_util.tree_leaves(eqx.filter(distribution, eqx.is_inexact_array))
    with _double(jax):
        twin = jax.tree_util.tree_map(
            lambda leaf: jax.numpy.asarray(np.asarray(leaf), "float64") if _inexact(eqx, leaf) else leaf, distribution
        )
        layers = _layers_of(twin, features)

    def log_prob(x: Array, context: Array | None) -> Array:
        with _double(jax):
            given = None if context is None else jax.numpy.asarray(context)
            density = eqx.filter_jit(lambda flow, x, context: flow.log_prob(x, context))
            return np.asarray(density(twin, jax.numpy.asarray(x), given))

    return _common.finish(
        SELF,
        "flowjax",
        layers,
        features=features,
        context_features=context_features,
        dtype=_common.dtype_of(leaves, dtype),
        log_prob=log_prob,
    )


def _inexact(eqx: Any, leaf: Any) -> bool:
    return bool(eqx.is_inexact_array(leaf))


def _double(jax: Any) -> contextlib.AbstractContextManager[Any]:
    """Double precision, for as long as it lasts."""
    if hasattr(jax, "enable_x64"):
        manager: contextlib.AbstractContextManager[Any] = jax.enable_x64(True)
        return manager
    from jax.experimental import enable_x64

    older: contextlib.AbstractContextManager[Any] = enable_x64()
    return older


def _layers_of(distribution: Any, features: int) -> list[FlowLayer]:
    """From data to noise."""
    from flowjax.distributions import AbstractTransformed, StandardNormal

    layers: list[FlowLayer] = []
    while isinstance(distribution, AbstractTransformed):
        layers += _walk(distribution.bijection, features, True)
        distribution = distribution.base_dist
    if not isinstance(distribution, StandardNormal):
        raise refuse(SELF, f"the base {_common.named(distribution)}", "the base of a flow is a diagonal normal")
    return layers


def _walk(bijection: Any, features: int, inverse: bool) -> list[FlowLayer]:
    """The layers y = bijection(x), or those of its inverse."""
    import equinox as eqx
    import flowjax.bijections as b
    import jax

    if isinstance(bijection, b.Invert):
        return _walk(bijection.bijection, features, not inverse)
    if isinstance(bijection, b.Scan):
        arrays, rest = eqx.partition(bijection.bijection, eqx.is_array)
        count = len(jax.tree_util.tree_leaves(arrays)[0])
        slices = [jax.tree_util.tree_map(lambda leaf, k=k: leaf[k], arrays) for k in range(count)]
        parts = [eqx.combine(part, rest) for part in slices]
    elif isinstance(bijection, b.Chain):
        parts = list(bijection.bijections)
    else:
        own = _leaf(bijection, features)
        return _common.inverse(SELF, own) if inverse else own
    return [layer for part in (reversed(parts) if inverse else parts) for layer in _walk(part, features, inverse)]


def _leaf(bijection: Any, features: int) -> list[FlowLayer]:
    import flowjax.bijections as b
    import paramax

    if isinstance(bijection, b.MaskedAutoregressive):
        return [_autoregressive(bijection)]
    if isinstance(bijection, b.Permute):
        return [Permutation(_common.whole("permutation", np.asarray(bijection.permutation[0])))]
    if isinstance(bijection, b.Flip):
        return [Permutation(np.arange(features)[::-1])]
    if isinstance(bijection, b.Identity):
        return []
    if type(bijection) in (b.Affine, b.Loc, b.Scale):
        plain = paramax.unwrap(bijection)
        scale, loc = (np.asarray(getattr(plain, name, value), np.float64) for name, value in (("scale", 1.0), ("loc", 0.0)))
        return [_common.scaled(scale, loc, features)]
    raise refuse(SELF, _common.named(bijection), "the record has no layer for it")


def _autoregressive(bijection: Any) -> Autoregressive:
    """The layer y = s x + m, the network reading x."""
    import jax
    import paramax

    net = bijection.masked_autoregressive_mlp
    features = int(bijection.shape[0])
    constants, eps = _scale_law(bijection, net)
    ranks = np.arange(1, features + 1)
    inputs, maps = ranks, []
    for number, layer in enumerate(net.layers):
        mask = np.asarray(layer.weight.args[0]).astype(bool)
        weight = np.asarray(paramax.unwrap(layer.weight))
        dense = _common.dense(f"layers[{number}]", weight, None if layer.bias is None else np.asarray(layer.bias))
        if not number:
            dense, mask = _common.split_context(dense, ranks - 1, np.arange(features, weight.shape[1])), mask[:, :features]
        if number + 1 < len(net.layers):
            inputs = masks.degrees_from(mask, inputs)
            dense = _common.with_degrees(dense, inputs)
        maps.append(dense)
    final = _common.shifted(maps[-1], np.tile(constants, features))
    law = Law("softplus", "affine", {"eps": eps})
    if len(maps) == 1:
        return Autoregressive(ranks, _common.conditioner(SELF, None, (), final, _common.Activation("identity"), False), law)

    def evaluate(x: Array) -> Array:
        return np.asarray(net.activation(jax.numpy.asarray(x)))

    activation = _common.activation_by_values(SELF, net.activation, evaluate)
    blocks = [Block("plain", (dense,)) for dense in maps[1:-1]]
    return Autoregressive(ranks, _common.conditioner(SELF, maps[0], blocks, final, activation, True), law)


def _scale_law(bijection: Any, net: Any) -> tuple[Array, float]:
    """What is added to the two parameters of a variable, and the least scale: s = softplus(r) + eps, told by values."""
    import flowjax.bijections as b
    import jax.numpy as jnp
    import paramax

    count = net.out_size // bijection.shape[0]
    template = bijection.transformer_constructor(jnp.zeros(count))
    name = _common.named(template)
    if type(template) is b.Affine and count == 2 and isinstance(template.scale, paramax.Parameterize) and len(template.scale.args) == 1:

        def scale(raw: float) -> float:
            return float(paramax.unwrap(bijection.transformer_constructor(jnp.array([0.0, raw])).scale))

        raw, eps = float(template.scale.args[0]), scale(-800.0)
        points = np.array([-5.0, -1.0, 0.0, 2.0, 9.0])
        if eps >= 0 and np.allclose([scale(r) for r in points], np.logaddexp(0, raw + points) + eps, rtol=1e-6):
            return np.array([float(template.loc), raw]), eps or float(np.finfo(np.float32).tiny)
        name = "Affine with a scale that is no softplus"
    raise refuse(SELF, f"the transformer {name}", "a law with its parameters would be needed; there are affine ones")
