"""Flows of Pyro."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastmaf import masks
from fastmaf.flow import Flow
from fastmaf.interop import _common, _torch
from fastmaf.interop._common import refuse
from fastmaf.layers import Autoregressive, Block, FlowLayer, Law, Permutation

__all__ = ["from_pyro"]

Array = NDArray[Any]

SELF = "from_pyro"


def from_pyro(distribution: Any, *, dtype: DTypeLike | None = None) -> Flow:
    """A flow of Pyro as a flow of fastmaf, with the same density and, from the same noise, the same samples.

    Taken are `TransformedDistribution` and `ConditionalTransformedDistribution` of `AffineAutoregressive` and
    `ConditionalAffineAutoregressive` (any permutation, with skip connections or not), `BatchNorm`, `Permute`, the transforms of
    `torch.distributions` that are affine or from a bounded range, and the inverses of these; over a normal. In Pyro an autoregressive
    network reads the noise, that of its ``.inv`` the data. Batch norms are taken as in evaluation.

    Parameters
    ----------
    distribution : pyro.distributions.TransformedDistribution or pyro.distributions.ConditionalTransformedDistribution
    dtype : {"float32", "float64"}, optional
        Of the flow; that of the weights if None.

    Returns
    -------
    Flow
        Its `training` says the source.

    Raises
    ------
    NotImplementedError
        With the name of the layer, if the record cannot express it.
    ImportMismatchError
        If the log-densities of Pyro and of the flow differ on random rows.

    Examples
    --------
    >>> import fastmaf, pytest
    >>> torch, dist = pytest.importorskip("torch"), pytest.importorskip("pyro.distributions")
    >>> base, swap = dist.Normal(torch.zeros(2), 1.0).to_event(1), dist.transforms.Permute(torch.tensor([1, 0]))
    >>> fastmaf.from_pyro(dist.TransformedDistribution(base, [swap])).layers
    (Permutation(perm=array([1, 0])),)
    """
    import torch
    from pyro.distributions import ConditionalTransformedDistribution

    if not isinstance(distribution, (torch.distributions.TransformedDistribution, ConditionalTransformedDistribution)):
        raise ValueError(
            f"{SELF} takes a TransformedDistribution or a ConditionalTransformedDistribution of Pyro, not {_common.named(distribution)}"
        )
    modules = _modules(distribution.transforms)
    dtypes = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    twin = exact(distribution)
    base = getattr(twin.base_dist, "base_dist", twin.base_dist) if _conditional(twin) else twin.base_dist
    last = _torch.standard(SELF, base)
    features = int(np.prod(base.event_shape or base.batch_shape))
    layers: list[FlowLayer] = []
    for transform in reversed(twin.transforms):
        layers += _torch.layers_of(SELF, transform, features, True, _parts_of, _leaf)
    layers.append(_common.broadcast(last, features))
    context_features = _common.contexts_of(layers)

    def log_prob(x: Array, context: Array | None) -> Array:
        with torch.no_grad(), doubles():
            given = twin.condition(torch.from_numpy(np.zeros((len(x), 0)) if context is None else context)) if _conditional(twin) else twin
            value = given.log_prob(torch.from_numpy(x)).numpy()
            return np.asarray(value if value.ndim == 1 else value.sum(axis=1))

    return _common.finish(
        SELF,
        "pyro-ppl",
        layers,
        features=features,
        context_features=context_features,
        dtype=_common.dtype_of(dtypes, dtype),
        log_prob=log_prob,
    )


@contextlib.contextmanager
def doubles() -> Iterator[None]:
    """New tensors of torch are float64: inverses of Pyro begin with zeros of no stated dtype."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _conditional(distribution: Any) -> bool:
    return hasattr(distribution, "condition")


def _owners(transforms: Sequence[Any]) -> list[Any]:
    """Transforms, what they are composed of, and the modules in them."""
    import torch
    from torch.distributions.transforms import _InverseTransform

    found: list[Any] = []
    for transform in transforms:
        own = vars(transform)
        inner = [transform._inv] if isinstance(transform, _InverseTransform) else []
        inner += [own[name] for name in ("transform", "base_transform") if name in own]
        inner += [*own.get("parts", ()), *own.get("transforms", ())]
        found += [transform, *_owners(inner)]
        if isinstance(transform, torch.nn.Module):
            found += list(transform.modules())
    return found


def _modules(transforms: Sequence[Any]) -> list[Any]:
    """The modules that transforms are, or hold."""
    import torch

    return [owner for owner in _owners(transforms) if isinstance(owner, torch.nn.Module)]


def exact(distribution: Any) -> Any:
    """A copy in float64, as in evaluation. What transforms remember of their last call is no part of it, and cannot be copied."""
    kept = [
        (owner, name, value)
        for owner in _owners(distribution.transforms)
        for name, value in vars(owner).items()
        if name.startswith("_cached")
    ]
    try:
        for owner, name, _ in kept:
            setattr(owner, name, (None, None) if name == "_cached_x_y" else None)
        twin = copy.deepcopy(distribution)
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)
    for module in _modules(twin.transforms):
        module.cpu().double().eval()
    base = twin.base_dist
    while hasattr(base, "base_dist"):
        base = base.base_dist
    for name in ("loc", "scale"):
        if name in vars(base):
            setattr(base, name, getattr(base, name).detach().cpu().double())
    return twin


def _parts_of(transform: Any) -> Sequence[Any] | None:
    from pyro.distributions import conditional

    if isinstance(transform, conditional.ConstantConditionalTransform):
        return [transform.transform]
    return transform.transforms if isinstance(transform, conditional.ConditionalComposeTransformModule) else None


def _leaf(transform: Any, features: int) -> list[FlowLayer] | None:
    """The layers from noise to data, in the sense of Pyro."""
    from pyro.distributions import conditional
    from pyro.distributions import transforms as t

    if isinstance(transform, conditional._ConditionalInverseTransformModule):
        return _torch.layers_of(SELF, transform._transform, features, True, _parts_of, _leaf)
    if isinstance(transform, t.AffineAutoregressive):
        return [_autoregressive(transform.arn, transform.log_scale_min_clip, transform.log_scale_max_clip, transform.stable)]
    if isinstance(transform, t.ConditionalAffineAutoregressive):
        options = transform.kwargs
        bounds = options.get("log_scale_min_clip", -5.0), options.get("log_scale_max_clip", 3.0)
        return [_autoregressive(transform.nn, *bounds, options.get("stable", False))]
    if isinstance(transform, t.Permute):
        return [Permutation(_common.whole("permutation", transform.permutation))]
    if isinstance(transform, t.BatchNorm):
        gain = _common.wide("gamma", transform.constrained_gamma)
        deviation = np.sqrt(_common.wide("moving_variance", transform.moving_variance) + transform.epsilon)
        scale = deviation / gain
        mean, beta = _common.wide("moving_mean", transform.moving_mean), _common.wide("beta", transform.beta)
        return [_common.scaled(scale, mean - beta * scale, features)]
    return None


def _autoregressive(net: Any, low: float, high: float, stable: bool) -> Autoregressive:
    """The layer y = e^l x + m, the network reading x."""
    if stable:
        raise refuse(SELF, "an AffineAutoregressive with stable=True", "the record has no law z = s x + (1 - s) m")
    if list(net.param_dims) != [1, 1]:
        raise refuse(SELF, f"a network with param_dims {tuple(net.param_dims)}", "an affine law has two parameters of one number")
    features, contexts = int(net.input_dim), int(net.context_dim)
    ranks = np.empty(features, np.int64)
    ranks[_common.whole("permutation", net.permutation)] = np.arange(1, features + 1)
    columns, inputs, maps = np.arange(contexts, contexts + features), ranks, []
    for number, layer in enumerate(net.layers):
        mask = _common.whole("mask", layer.mask).astype(bool)
        dense = _common.dense(f"layers[{number}]", layer.weight, layer.bias, layer.mask)
        if not number:
            dense, mask = _common.split_context(dense, columns, np.arange(contexts)), mask[:, contexts:]
        if number + 1 < len(net.layers):
            inputs = masks.degrees_from(mask, inputs)
            dense = _common.with_degrees(dense, inputs)
        maps.append(dense)
    rows = np.arange(2 * features).reshape(2, features).T.ravel()  # all shifts, then all log-scales
    final, skip = _common.rows_of(maps[-1], rows), None
    if net.skip_layer is not None:
        direct = _common.dense("skip_layer", net.skip_layer.weight, None, net.skip_layer.mask).weight[rows]
        skip = direct[:, contexts:]
        final = _common.with_context(final, direct[:, :contexts])
    activation = _common.torch_activation(SELF, net.f)
    blocks = [Block("plain", (dense,)) for dense in maps[1:-1]]
    made = _common.conditioner(SELF, maps[0], blocks, final, activation, True, skip)
    return Autoregressive(ranks, made, Law("clamp", "affine", {"low": float(low), "high": float(high)}))
