"""Flows of zuko, both ways."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastmaf import _words, masks
from fastmaf.flow import Flow
from fastmaf.interop import _common, _torch
from fastmaf.interop._common import Activation, refuse
from fastmaf.layers import (
    Affine,
    Autoregressive,
    BatchNorm,
    Block,
    Dense,
    Elementwise,
    FlowLayer,
    Law,
    Linear,
    Normal,
    Permutation,
)
from fastmaf.record import width_of

__all__ = ["from_zuko", "to_zuko"]

Array = NDArray[Any]
Item = Any
"""An Activation, a Masked, a residual block (a tuple of these), or in front of all the bound at which inputs are clipped."""

SELF = "from_zuko"
CLIP = -np.log(1e-3)
"""Of `MonotonicAffineTransform` of zuko since 1.5, which does not save it."""


def from_zuko(
    flow: Any = None,
    *,
    dtype: DTypeLike | None = None,
    state_dict: Mapping[str, Any] | None = None,
    activation: str | None = None,
    slope: float = 1e-3,
) -> Flow:
    """A flow of zuko as a flow of fastmaf, with the same density and, from the same noise, the same samples.

    Taken are `zuko.flows.Flow` objects of `MaskedAutoregressiveTransform` (`MAF` with any order, passes, adjacency, context, residual
    networks), affine `GeneralCouplingTransform` (`NICE`, `RealNVP`), `ElementWiseTransform`, and around them unconditional transforms:
    affine, permutation, rotation, LU, and those from a bounded range to the real line.  The base is a diagonal normal.

    Parameters
    ----------
    flow : zuko.flows.Flow, optional
    dtype : {"float32", "float64"}, optional
        Of the flow; that of the weights if None.
    state_dict : mapping of str to arrays, optional
        Instead of `flow`: the ``state_dict()`` of a `zuko.flows.MAF`, as tensors or arrays; neither zuko nor torch is needed.  It does not
        say the activation and the slope, and nothing is there to compare the result with.
    activation : str, optional
        With `state_dict`: of the hidden units, if there are any.
    slope : float
        With `state_dict`: the minimum slope; 1e-3 in zuko up to 1.0.0 and since 1.5, 1e-4 between.

    Returns
    -------
    Flow
        Its `training` says the source.

    Raises
    ------
    NotImplementedError
        With the name of the layer, if the record cannot express it.
    ImportMismatchError
        If the log-densities of zuko and of the flow differ on random rows.

    Examples
    --------
    >>> import numpy as np
    >>> keys = {"order": np.array([0, 1]), "hyper.0.mask": np.array([[1, 0]]), "hyper.2.mask": np.array([[0], [0], [1], [1]])}
    >>> keys |= {"hyper.0.weight": np.ones((1, 2)), "hyper.0.bias": np.zeros(1)}
    >>> keys |= {"hyper.2.weight": np.ones((4, 1)), "hyper.2.bias": np.zeros(4)}
    >>> state = {f"transform.transforms.0.{key}": value for key, value in keys.items()}
    >>> flow = from_zuko(state_dict=state, activation="relu")
    >>> flow.features, str(flow.dtype)
    (2, 'float64')
    """
    if (flow is None) == (state_dict is None):
        raise ValueError("from_zuko takes a flow, or a state_dict instead")
    if flow is None:
        assert state_dict is not None
        if not 0 < (number := _words.number("slope", slope)) < 1:
            raise ValueError(f"slope is {_words.shown(slope)}; it must lie between 0 and 1")
        kind = _common.activation_of(SELF, activation, any(".hyper.2." in key for key in state_dict))
        return from_state(SELF, "zuko", state_dict, dtype, Activation(kind), number)
    twin = exact(SELF, flow)
    layers, features, context_features, sparse = layers_of(SELF, twin)
    return _common.finish(
        SELF,
        "zuko",
        layers,
        features=features,
        context_features=context_features,
        dtype=_common.dtype_of(list(flow.parameters()) + list(flow.buffers()), dtype),
        log_prob=log_prob_of(twin),
        sparse=sparse,
    )


def exact(importer: str, flow: Any) -> Any:
    """A copy of a flow of zuko in float64, for what is made of its weights too, which single precision would round."""
    from zuko.flows import Flow as ZukoFlow

    if not isinstance(flow, ZukoFlow):
        raise ValueError(f"{importer} takes a zuko.flows.Flow, not {_common.named(flow)}")
    if not (hasattr(flow, "transform") and hasattr(flow, "base")):  # of as_zuko, or another class that keeps its parts elsewhere
        raise ValueError(f"{importer} reads the transform and the base of a flow, which {_common.named(flow)} does not have")
    return copy.deepcopy(flow).cpu().double().eval()


def log_prob_of(flow: Any) -> Callable[[Array, Array | None], Array]:
    """The log-density of a flow of zuko in float64."""
    import torch

    def log_prob(x: Array, context: Array | None) -> Array:
        with torch.no_grad():
            given = None if context is None else torch.from_numpy(context)
            return np.asarray(flow(given).log_prob(torch.from_numpy(x)).numpy())

    return log_prob


def layers_of(importer: str, flow: Any) -> tuple[list[FlowLayer], int, int, bool]:
    """The layers of a flow of zuko from data to noise, its features, its context features, and whether its masks follow a graph."""
    from zuko.flows import MaskedAutoregressiveTransform
    from zuko.lazy import LazyComposedTransform, LazyInverse

    sizes: list[tuple[int, int]] = []
    pending: list[tuple[Any, bool]] = []

    def flatten(transform: Any, inverted: bool) -> None:
        if isinstance(transform, LazyComposedTransform):
            for part in reversed(transform.transforms) if inverted else transform.transforms:
                flatten(part, inverted)
        elif isinstance(transform, LazyInverse):
            flatten(transform.transform, not inverted)
        else:
            pending.append((transform, inverted))
            found = _sizes(transform)
            if found is not None:
                sizes.append(found)

    flatten(flow.transform, False)
    base = _base(importer, flow)
    features = sizes[0][0] if sizes else width_of("base", base)
    context_features = max((c for _, c in sizes), default=0)
    layers: list[FlowLayer] = []
    for transform, inverted in pending:
        own = _lazy(importer, transform, features)
        layers += _common.inverse(importer, own) if inverted else own
    sparse = any(isinstance(transform, MaskedAutoregressiveTransform) and transform.order is None for transform, _ in pending)
    return [*layers, base], features, context_features, sparse


def _sizes(transform: Any) -> tuple[int, int] | None:
    """Features and context features of a conditional transform."""
    from zuko.flows import ElementWiseTransform, GeneralCouplingTransform, MaskedAutoregressiveTransform

    if isinstance(transform, MaskedAutoregressiveTransform):
        features = transform.hyper[-1].out_features // transform.total
        first = next(module for module in transform.hyper if hasattr(module, "in_features"))
        return features, first.in_features - features
    if isinstance(transform, GeneralCouplingTransform):
        return transform.mask.numel(), transform.hyper.in_features - int(transform.mask.sum())
    if isinstance(transform, ElementWiseTransform):
        if hasattr(transform, "hyper"):
            return transform.hyper.out_features // transform.total, transform.hyper.in_features
        return len(next(iter(transform.phi))), 0
    return None


def _base(importer: str, flow: Any) -> FlowLayer:
    """From the base to a standard normal."""
    try:
        base = flow.base(None)
    except Exception as error:  # whatever a base that wants a context raises
        raise refuse(importer, f"the base {_common.named(flow.base)}", "the base of a flow is a normal without context") from error
    return _torch.standard(importer, base)


def _lazy(importer: str, transform: Any, features: int) -> list[FlowLayer]:
    """The layers of a lazy transform."""
    from zuko.flows import ElementWiseTransform, GeneralCouplingTransform, MaskedAutoregressiveTransform
    from zuko.lazy import Unconditional, UnconditionalTransform

    if isinstance(transform, MaskedAutoregressiveTransform):
        law, parameters = _law(importer, transform)
        return [_autoregressive(importer, transform, law, parameters)]
    if isinstance(transform, GeneralCouplingTransform):
        law, parameters = _law(importer, transform)
        maps, found = _mlp(importer, transform.hyper)
        kept = _common.whole("mask", transform.mask).astype(bool)
        maps[-1] = _with_scales(maps[-1], int((~kept).sum()), parameters)
        return [_common.coupling(importer, kept, maps, found, law)]
    if isinstance(transform, ElementWiseTransform):
        law, parameters = _law(importer, transform)
        if hasattr(transform, "hyper"):
            maps, found = _mlp(importer, transform.hyper)
            maps[-1] = _with_scales(maps[-1], features, parameters)
            return [_common.constant_in_x(importer, features, maps, found, law)]
        shift = _common.wide("phi[0]", list(transform.phi)[0])
        raw = np.zeros(features) if parameters == 1 else _common.wide("phi[1]", list(transform.phi)[1])
        scale = np.exp(raw / (1 + np.abs(raw) / law.constants["clip"])) if parameters == 2 else np.ones(features)
        return [_common.scaled(scale, shift, features)]
    if isinstance(transform, (UnconditionalTransform, Unconditional)):
        return _torch.layers_of(importer, transform(), features, False, _parts_of, _leaf)
    raise refuse(importer, _common.named(transform), "there are masked autoregressive, coupling, element-wise and unconditional transforms")


def _law(importer: str, transform: Any) -> tuple[Law, int]:
    """The law of a univariate transformation, and its number of parameters."""
    import torch
    from zuko.transforms import AdditiveTransform, MonotonicAffineTransform

    univariate = transform.univariate
    if isinstance(univariate, functools.partial) and univariate.func.__module__ == "fastmaf.interop._zuko_parts":
        kind, form, constants = univariate.keywords["kind"], univariate.keywords["form"], dict(univariate.keywords)
        return Law(kind, form, {name: value for name, value in constants.items() if name not in ("kind", "form")}), 2
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    if [tuple(shape) for shape in transform.shapes] in ([()], [(), ()]):
        made = univariate(*[zero, one][: transform.total])
        if type(made) is MonotonicAffineTransform and transform.total == 2:
            bent = float(made.log_scale)
            return Law("exp_soft", "affine", {"clip": bent / (1 - bent)}), 2
        if type(made) is AdditiveTransform and transform.total == 1:
            return Law("exp_soft", "affine", {"clip": CLIP}), 1
        name = _common.named(made)
    else:
        name = _common.named(univariate.func if isinstance(univariate, functools.partial) else univariate)
    raise refuse(importer, f"the univariate {name}", "a law with its parameters would be needed; there are affine and additive ones")


def _with_scales(final: Dense, variables: int, parameters: int) -> Dense:
    """The final map of an additive law with rows of zeros for the log-scales."""
    if parameters == 2:
        return final
    double = np.repeat(np.arange(variables), 2)
    keep = np.tile([1.0, 0.0], variables)
    rows = _common.rows_of(final, double)
    rows = replace(rows, weight=rows.weight * keep[:, None], bias=rows.bias * keep)
    return rows if rows.context_weight is None else replace(rows, context_weight=rows.context_weight * keep[:, None])


def _mlp(importer: str, hyper: Any) -> tuple[list[Dense], list[Activation]]:
    """The maps and the activations of a network without masks."""
    import torch

    maps: list[Dense] = []
    found = []
    for number, module in enumerate(hyper):
        if isinstance(module, torch.nn.Linear) or (hasattr(module, "weight") and type(module).__name__ == "Linear"):
            maps.append(_common.dense(f"hyper[{number}]", module.weight, module.bias))
            found.append(Activation("identity"))
        elif type(module).__name__ == "LayerNorm":
            raise refuse(importer, "LayerNorm", "the record has no norm over the units of a row")
        else:
            found[-1] = _common.torch_activation(importer, module)
    return maps, found[:-1]


def _items(importer: str, hyper: Any) -> list[Item]:
    """The parts of a masked network: maps (weights under their masks), activations, and residual blocks as tuples of parts."""
    from zuko.nn import MaskedLinear, Residual

    items: list[Item] = []
    for module in hyper:
        if type(module).__name__ == "ClippedInputs":
            items.append(float(module.bound))
        elif isinstance(module, MaskedLinear):
            items.append(_masked(module.weight, module.bias, module.mask))
        elif isinstance(module, Residual):
            items.append(tuple(_items(importer, module)))
        else:
            items.append(_common.torch_activation(importer, module))
    return items


@dataclass(frozen=True)
class Masked:
    """A map in which variables and context are still together, and its mask."""

    layer: Dense
    mask: Array


def _masked(weight: Any, bias: Any, mask: Any) -> Masked:
    return Masked(_common.dense("MaskedLinear", weight, bias, mask), _common.whole("mask", mask).astype(bool))


def _autoregressive(importer: str, transform: Any, law: Law, parameters: int) -> Autoregressive:
    order = None if transform.order is None else _common.whole("order", transform.order)
    return _made(importer, _items(importer, transform.hyper), order, law, parameters)


def _made(importer: str, items: Sequence[Item], order: Array | None, law: Law, parameters: int) -> Autoregressive:
    """The layer of the parts of a masked network."""
    bound = items[0] if isinstance(items[0], float) else None
    items = items if bound is None else items[1:]
    found: list[Activation] = []
    for item in items:
        found += (
            [item] if isinstance(item, Activation) else [a for a in item if isinstance(a, Activation)] if isinstance(item, tuple) else []
        )
    activation = _common.one_activation(importer, found)
    linears = [item for item in items if isinstance(item, Masked)]
    features = len(linears[-1].mask) // parameters
    ranks = _ranks(items, features, parameters) if order is None else np.unique(order, return_inverse=True)[1] + 1
    columns = np.arange(linears[0].mask.shape[1])

    def hidden(part: Masked, inputs: Array | None, at_least: Array | None = None) -> Dense:
        assert inputs is not None
        degrees = masks.degrees_from(part.mask, inputs)
        degrees = degrees if at_least is None else np.maximum(degrees, at_least)
        return replace(part.layer, degrees=degrees)

    def first_of(part: Masked) -> Dense:
        return _common.split_context(part.layer, columns[:features], columns[features:])

    blocks: list[Block] = []
    initial: Dense | None = None
    before: Array | None = ranks
    active = False
    for number, item in enumerate(items[:-1]):
        if isinstance(item, Activation):
            active = True
            continue
        if isinstance(item, tuple):
            inner = list(item)
            pre = isinstance(inner[0], Activation)
            one, two = (part for part in inner if isinstance(part, Masked))
            maps = [hidden(one, before)]
            maps.append(hidden(two, maps[0].degrees, before))
            blocks.append(Block("residual" if pre else "linear_residual", tuple(maps)))
        elif number == 0:
            own = replace(item, layer=first_of(item), mask=item.mask[:, :features])
            initial = hidden(own, ranks)
        else:
            blocks.append(Block("plain" if active else "linear", (hidden(item, before),)))
        before = blocks[-1].maps[-1].degrees if blocks else initial.degrees if initial is not None else ranks
        active = False
    last = items[-1]
    assert isinstance(last, Masked)
    final = last.layer if initial is not None else first_of(last)
    net = _common.conditioner(importer, initial, blocks, _with_scales(final, features, parameters), activation, active, input_clip=bound)
    return Autoregressive(ranks, net, law)


def _ranks(items: Sequence[Item], features: int, parameters: int) -> Array:
    """Ranks by the longest chain of dependences, of a network whose masks follow a graph instead of an order."""
    reach: Array = np.eye(items[0].mask.shape[1], dtype=bool)
    for item in items:
        if isinstance(item, Masked):
            reach = item.mask @ reach
        elif isinstance(item, tuple):
            inner = reach
            for part in item:
                inner = part.mask @ inner if isinstance(part, Masked) else inner
            reach = reach | inner
    depends: Array = np.any(reach.reshape(features, parameters, -1), axis=1)[:, :features]
    ranks = np.ones(features, np.int64)
    for _ in range(features):
        ranks = 1 + np.where(depends, ranks, 0).max(axis=1)
    return ranks


def from_state(importer: str, library: str, state: Mapping[str, Any], dtype: Any, activation: Activation, slope: float) -> Flow:
    """The flow of a state dict of `zuko.flows.MAF`, or of an estimator of sbi that holds one under "net."."""
    prefix = next((key[: key.index("transforms.")] for key in state if re.match(r"(.*\.)?transforms\.\d+\.", key)), None)
    if prefix is None:
        raise ValueError("state_dict has no keys of the form 'transform.transforms.0.hyper.0.weight', those of a zuko.flows.MAF")
    base = prefix.removesuffix("transform.") + "base."
    map_of = r"transforms\.\d+\.(order|loc|scale|phi\.\d+|hyper\.\d+(\.\d+)?\.(weight|bias|mask))"
    read = re.compile(rf"{re.escape(prefix)}{map_of}|{re.escape(base)}(loc|scale|_0|_1)|(.*\.)?_embedding_net\..*")
    if other := [key for key in state if not read.fullmatch(key)]:
        raise refuse(importer, f"{min(other)} of the state_dict", "give the flow itself")
    count = 1 + max(int(re.findall(r"transforms\.(\d+)\.", key)[0]) for key in state if key.startswith(f"{prefix}transforms."))
    law = Law("exp_soft", "affine", {"clip": -float(np.log(slope))})
    layers: list[FlowLayer] = []
    features = context_features = 0
    for k in range(count):
        own = {key.removeprefix(f"{prefix}transforms.{k}."): v for key, v in state.items() if key.startswith(f"{prefix}transforms.{k}.")}
        if {"loc", "scale"} <= set(own):
            scale, shift = _common.wide("scale", own["scale"]), _common.wide("loc", own["loc"])
            layers.append(_common.scaled(scale, shift, shift.size))
        elif {"phi.0", "phi.1"} <= set(own):
            shift, raw = _common.wide("phi.0", own["phi.0"]), _common.wide("phi.1", own["phi.1"])
            layers.append(_common.scaled(np.exp(raw / (1 + np.abs(raw) / law.constants["clip"])), shift, shift.size))
            features = shift.size
        elif "hyper.0.weight" not in own or "hyper.0.mask" not in own:
            raise refuse(importer, f"transforms.{k} of the state_dict, no masked network of zuko,", "give the flow itself")
        else:
            items = _state_items(own, activation)
            order = own.get("order")
            if order is not None and (rows := len(items[-1].mask)) != 2 * len(order):
                what = f"transforms.{k} of the state_dict, with {rows // len(order)} parameters for each variable in place of two,"
                raise refuse(importer, what, "give the flow itself")
            layers.append(_made(importer, items, None if order is None else _common.whole("order", order), law, 2))
            features = layers[-1].ranks.size  # type: ignore[union-attr]
            context_features = items[0].mask.shape[1] - features
    loc = state.get(f"{base}loc", state.get(f"{base}_0"))
    scale = state.get(f"{base}scale", state.get(f"{base}_1"))
    if loc is not None and scale is not None:
        layers.append(Affine(_common.wide("base.loc", loc), 1 / _common.wide("base.scale", scale)))
    layers = [_common.broadcast(layer, features) for layer in layers]
    ordered = any(re.match(rf"{re.escape(prefix)}transforms\.\d+\.order$", key) for key in state)
    sparse = not ordered and any(key.endswith(".mask") for key in state)
    return _common.finish(
        importer,
        library,
        layers,
        features=features,
        context_features=context_features,
        context_layers=_common.z_score_of(importer, _common.under(state, "_embedding_net."), context_features),
        dtype=_common.dtype_of(state.values(), dtype),
        log_prob=None,
        sparse=sparse,
        notes={"activation": activation.name, "slope": slope},
    )


def _state_items(own: Mapping[str, Any], activation: Activation) -> list[Item]:
    """The parts of a masked network from the keys hyper.N.weight and hyper.N.M.weight."""

    def masked(name: str) -> Masked:
        return _masked(own[f"{name}.weight"], own.get(f"{name}.bias"), own[f"{name}.mask"])

    numbers = sorted({int(key.split(".")[1]) for key in own if key.startswith("hyper.")})
    residual = any(f"hyper.{n}.0.weight" in own for n in numbers)
    items: list[Item] = []
    for n in numbers:
        if f"hyper.{n}.weight" in own:
            items += [] if residual or not items else [activation]
            items.append(masked(f"hyper.{n}"))
        else:
            first, second = sorted({int(key.split(".")[2]) for key in own if key.startswith(f"hyper.{n}.")})
            items.append((*[activation] * first, masked(f"hyper.{n}.{first}"), activation, masked(f"hyper.{n}.{second}")))
    return items


# The way back


def to_zuko(flow: Flow) -> Any:
    """A flow of fastmaf as a `zuko.flows.Flow`, with the same density and, from the same noise, the same samples.

    Its networks are zuko's own modules. Laws that zuko does not have, bounds and clipped inputs are functions and a module of
    `fastmaf.interop`: to unpickle such a flow takes fastmaf, its `state_dict()` does not. `from_zuko` reads it again.

    Parameters
    ----------
    flow : Flow

    Returns
    -------
    zuko.flows.Flow
        In the dtype of the flow, with its weights as parameters. What is fixed in the flow (standardisation, statistics of batch norms) is
        held in buffers.

    Raises
    ------
    NotImplementedError
        With the name of the piece, if zuko has nothing like it.
    ImportMismatchError
        If the log-densities of zuko and of the flow differ on random rows.

    Examples
    --------
    >>> import fastmaf, pytest
    >>> torch, zuko = pytest.importorskip("torch"), pytest.importorskip("zuko")
    >>> theirs = to_zuko(fastmaf.MAF(3, context_features=2, seed=0))
    >>> theirs(torch.zeros(2)).sample((5,)).shape
    torch.Size([5, 3])
    """
    import torch
    import zuko

    record = flow.record
    if not isinstance(record.base, Normal):
        raise refuse(BACK, f"a {record.base.conditional} base", "zuko has normal bases")
    exact = record.replaced(dtype="float64")
    layers = list(exact.layers)
    for affine in reversed(exact.context_layers):
        if not isinstance(affine, Affine):
            raise refuse(BACK, "bounds of the context", "transform the context before, and leave context_layers without an Elementwise")
        layers, _ = _common.fold_linear_context(layers, None, np.diag(affine.scale), -affine.loc * affine.scale)
    transforms = [_lazily(layer, record.features, record.context_features) for layer in layers]
    # A flow needs at least one transform.
    transforms = transforms or [_lazily(Affine(np.zeros(record.features), np.ones(record.features)), record.features, 0)]
    zeros, ones = torch.zeros(record.features, dtype=torch.float64), torch.ones(record.features, dtype=torch.float64)
    base = zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, loc=zeros, scale=ones, buffer=True)
    made = zuko.flows.Flow(transforms, base)
    _common.check(BACK, exact, log_prob_of(made))
    return made.to(torch.float32 if record.dtype == np.float32 else torch.float64)


BACK = "to_zuko"


def _lazily(layer: FlowLayer, features: int, context_features: int) -> Any:
    """A lazy transform of zuko, in float64."""
    import torch
    from torch.distributions import transforms as t
    from zuko.lazy import LazyComposedTransform, UnconditionalTransform
    from zuko.transforms import LULinearTransform, PermutationTransform

    from fastmaf.interop import _zuko_parts

    def tensor(array: Array) -> Any:
        return torch.from_numpy(np.array(array))

    def affine(loc: Array, scale: Array) -> Any:
        return UnconditionalTransform(t.AffineTransform, tensor(loc), tensor(scale), event_dim=1, buffer=True)

    if isinstance(layer, Affine):
        return affine(-layer.loc * layer.scale, layer.scale)
    if isinstance(layer, BatchNorm):
        scale = np.exp(layer.log_gamma) / np.sqrt(layer.var + layer.eps)
        return affine(layer.beta - layer.mean * scale, scale)
    if isinstance(layer, Permutation):
        return UnconditionalTransform(PermutationTransform, tensor(layer.perm), buffer=True)
    if isinstance(layer, Elementwise):
        ends = np.where(np.isfinite([layer.lower, layer.upper]), [layer.lower, layer.upper], 0.0)
        return UnconditionalTransform(_zuko_parts.bounded, *map(tensor, ends), kinds=layer.kinds, buffer=True)
    if isinstance(layer, Linear):
        diagonal = np.diagonal(layer.upper)
        lower = (np.tril(layer.lower, -1) + np.eye(features)) * diagonal
        factors = UnconditionalTransform(LULinearTransform, tensor(lower + np.triu(layer.upper, 1) / diagonal[:, None]))
        return LazyComposedTransform(factors, UnconditionalTransform(t.AffineTransform, tensor(layer.bias), 1.0, event_dim=1))
    return _lazily_autoregressive(layer, features, context_features)


def _lazily_autoregressive(layer: Autoregressive, features: int, context_features: int) -> Any:
    import torch
    from torch import nn
    from zuko.flows import MaskedAutoregressiveTransform
    from zuko.lazy import LazyInverse
    from zuko.nn import MaskedLinear, Residual

    from fastmaf.interop import _zuko_parts

    net, law = layer.conditioner, layer.law
    first, *others = maps = (*net.hidden, net.final)
    if net.skip is not None:
        raise refuse(BACK, "a network with direct weights", "networks of zuko have no skip connections")
    if any(m.context != "none" for m in others) or first.context not in ("none", "added") or first.context_bias is not None:
        raise refuse(BACK, f"a context that enters as {', '.join(m.context for m in maps)}", "networks of zuko add it at the first map")
    if any(m.norm_scale is not None for m in maps):
        raise refuse(BACK, "an inner batch norm", "networks of zuko have none")
    activations = {"relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU, "gelu": nn.GELU, "silu": nn.SiLU}
    activation = activations[net.activation]

    def linear(own: Dense, mask: Array) -> Any:
        weight = own.weight
        if own is first and context_features:
            context = np.zeros((len(weight), context_features)) if own.context_weight is None else own.context_weight
            weight, mask = np.concatenate([weight, context], 1), np.concatenate([mask, np.ones_like(context, dtype=bool)], 1)
        made = MaskedLinear(torch.from_numpy(mask)).double()
        with torch.no_grad():
            made.weight.copy_(torch.from_numpy(np.array(weight)))
            made.bias.copy_(torch.from_numpy(np.array(own.bias)))
        return made

    modules: list[Any] = []
    if net.input_clip is not None:
        modules.append(_zuko_parts.ClippedInputs(features, net.input_clip))
    inputs = layer.ranks

    def hidden(own: Dense) -> Any:
        nonlocal inputs
        assert own.degrees is not None
        made = linear(own, masks.hidden_mask(own.degrees, inputs))
        inputs = own.degrees
        return made

    if net.initial is not None:
        modules.append(hidden(net.initial))
    for block in net.blocks:
        before = [activation()] * (block.kind in ("plain", "residual"))
        if block.residual:
            one, two = map(hidden, block.maps)
            modules.append(Residual(*before, one, activation(), two))
        else:
            modules += [*before, hidden(block.maps[0])]
    if net.initial is not None and net.final_activation:
        modules.append(activation())
    modules.append(linear(net.final, masks.output_mask(layer.ranks, inputs, law.parameters)))

    made = MaskedAutoregressiveTransform(max(features, 2), hidden_features=(1,), univariate=_univariate(law, layer))
    made.hyper, made.order, made.passes = nn.Sequential(*modules), torch.from_numpy(layer.ranks - 1), len(np.unique(layer.ranks))
    return made if layer.direction == "data" else LazyInverse(made)


def _univariate(law: Law, layer: Autoregressive) -> Any:
    """What makes the transform of a variable of its parameters; where the network reads noise it goes from noise to data."""
    from zuko.transforms import MonotonicAffineTransform

    from fastmaf.interop import _zuko_parts

    form = law.form if layer.direction == "data" else {"affine": "standardize", "standardize": "affine"}[law.form]
    if law.kind == "exp_soft" and form == "affine" and abs(law.constants["clip"] - CLIP) < 1e-12:
        return MonotonicAffineTransform
    kind = law.kind
    if kind == "log_precision" and form != law.form:
        raise refuse(BACK, "log-precisions of a network that reads noise", "give them as log-scales")
    return functools.partial(_zuko_parts.law, kind=kind, form=form, **law.constants)


# Transforms that depend on nothing


def _parts_of(transform: Any) -> Sequence[Any] | None:
    import zuko.transforms as z

    if isinstance(transform, z.DependentTransform):
        return [transform.base]
    if isinstance(transform, z.IdentityTransform):
        return []
    return transform.transforms if isinstance(transform, z.ComposedTransform) else None


def _leaf(transform: Any, features: int) -> list[FlowLayer] | None:
    import zuko.transforms as z

    if isinstance(transform, z.AdditiveTransform):
        return [_common.scaled(1.0, _common.wide("shift", transform.shift), features)]
    if isinstance(transform, z.MonotonicAffineTransform):
        return [_common.scaled(_common.wide("scale", transform.scale), _common.wide("shift", transform.shift), features)]
    if isinstance(transform, z.PermutationTransform):
        return [Permutation(_common.whole("order", transform.order))]
    if isinstance(transform, z.RotationTransform):
        return _common.linear(SELF, _common.wide("R", transform.R), np.zeros(features))
    if isinstance(transform, z.LULinearTransform):
        lower = _common.wide("L", transform.L)  # its diagonal is not one, that of U is
        diagonal = np.diagonal(lower).copy()
        return [Linear(lower / diagonal, diagonal[:, None] * _common.wide("U", transform.U), np.zeros(features))]
    return None
