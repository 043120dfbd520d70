"""Flows of nflows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastmaf import _words
from fastmaf.flow import Flow
from fastmaf.interop import _common, _made
from fastmaf.interop._common import Activation, refuse
from fastmaf.layers import Affine, Autoregressive, Dense, Elementwise, FlowLayer, Law, Linear, Normal, Permutation, Terminal
from fastmaf.record import width_of

__all__ = ["embed", "from_nflows"]

Array = NDArray[Any]

SELF = "from_nflows"
MADE = _made.Wiring("activated", True, "added")
MIXTURE = _made.Wiring("added", False, "added")


def from_nflows(
    flow: Any = None,
    *,
    dtype: DTypeLike | None = None,
    state_dict: Mapping[str, Any] | None = None,
    activation: str | None = None,
) -> Flow:
    """A flow of nflows as a flow of fastmaf, with the same density and, from the same noise, the same samples.

    Taken are `nflows.flows.Flow` objects, `MaskedAutoregressiveFlow` among them, of `MaskedAffineAutoregressiveTransform` (residual or
    not, batch norm inside or not, any context), permutations, `BatchNorm`, `ActNorm`, `PointwiseAffineTransform`, linear layers (LU and
    others), `Logit`, and inverses of these; over `StandardNormal`, `DiagonalNormal`, `ConditionalDiagonalNormal` or `MADEMoG`.  Batch norms
    are taken as in evaluation, and stay as they are.  An embedding of the context that is linear or a z-score is folded; one that is not
    stays where it is, with a warning: the context of the flow is then its output, see `fastmaf.interop.embed`.

    Parameters
    ----------
    flow : nflows.flows.Flow, optional
    dtype : {"float32", "float64"}, optional
        Of the flow; that of the weights if None.
    state_dict : mapping of str to arrays, optional
        Instead of `flow`: its ``state_dict()``, as tensors or arrays; neither nflows nor torch is needed.  It does not say the activation,
        and nothing is there to compare the result with.
    activation : str, optional
        With `state_dict`: of the hidden units, if there are any.

    Returns
    -------
    Flow
        Its `training` says the source.

    Raises
    ------
    NotImplementedError
        With the name of the layer, if the record cannot express it.
    ImportMismatchError
        If the log-densities of nflows and of the flow differ on random rows.

    Examples
    --------
    >>> import numpy as np
    >>> keys = {"_shift": np.array([1.0, 0.0]), "_scale": np.array([2.0, 4.0])}
    >>> flow = from_nflows(state_dict={f"_transform._transforms.0.{key}": value for key, value in keys.items()})
    >>> flow.layers[0].scale.tolist()
    [2.0, 4.0]
    """
    if (flow is None) == (state_dict is None):
        raise ValueError("from_nflows takes a flow, or a state_dict instead")
    if flow is None:
        assert state_dict is not None
        kind = _common.activation_of(SELF, activation, any("initial_layer.weight" in key for key in state_dict))
        return from_state(SELF, "nflows", state_dict, Activation(kind), dtype)
    from nflows.flows import Flow as NFlow

    if not isinstance(flow, NFlow):
        raise ValueError(f"from_nflows takes an nflows.flows.Flow, not {_common.named(flow)}")
    return of_flow(SELF, "nflows", flow, dtype)


def exact(module: Any) -> Any:
    """A copy of a module of torch as in evaluation, in float64 for what is made of its weights too; the caller's stays as it is."""
    return copy.deepcopy(module).cpu().double().eval()


def of_flow(importer: str, library: str, flow: Any, dtype: Any, context_shape: tuple[int, ...] | None = None) -> Flow:
    """The flow of a `nflows.flows.Flow`; `context_shape` is that of one context in front of the embedding, if it is known."""
    import torch

    twin = exact(flow)
    parts = Parts(importer)
    parts.transform(twin._transform, False)
    base = parts.distribution(twin._distribution)
    embedding = embedding_of(importer, twin._embedding_net, parts.context_features, context_shape)
    layers, base = embedding.folded_into(parts.layers, base)

    def log_prob(x: Array, context: Array | None) -> Array:
        with torch.no_grad():
            c = None if context is None else torch.from_numpy(context)
            if c is None or embedding.folded:
                value = twin.log_prob(torch.from_numpy(x), c)
            else:
                noise, log_det = twin._transform(torch.from_numpy(x), context=c)
                value = log_det + twin._distribution.log_prob(noise, context=c)
            return np.asarray(value.numpy())

    made = _common.finish(
        importer,
        library,
        layers,
        base,
        features=parts.features,
        context_features=embedding.features,
        context_layers=embedding.layers,
        dtype=_common.dtype_of(flow.parameters(), dtype),
        log_prob=log_prob,
    )
    if not embedding.folded:
        warn_of_embedding(importer, twin._embedding_net)
    return made


def embed(source: Any, context: Any) -> Array:
    """What the embedding of a model of torch makes of contexts: the contexts of the flow that was imported from it.

    Parameters
    ----------
    source : nflows.flows.Flow, or a density estimator or posterior of sbi
        What was imported.
    context : (n, ...) tensor or array
        As the model takes them.

    Returns
    -------
    (n, C) array

    Examples
    --------
    >>> import pytest
    >>> torch, nflows = pytest.importorskip("torch"), pytest.importorskip("nflows")
    >>> from nflows import distributions, flows, transforms
    >>> net = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Tanh())
    >>> source = flows.Flow(transforms.IdentityTransform(), distributions.StandardNormal([2]), net)
    >>> embed(source, torch.zeros(4, 5)).shape
    (4, 3)
    """
    import torch

    owner = getattr(source, "posterior_estimator", source)
    net = getattr(owner, "embedding_net", getattr(owner, "_embedding_net", None))
    if net is None:
        raise ValueError(f"embed takes a flow of nflows, an estimator or a posterior of sbi, not {_common.named(source)}")
    net = copy.deepcopy(net).cpu().eval()
    dtype = next((parameter.dtype for parameter in net.parameters()), torch.float32)
    with torch.no_grad():
        return np.asarray(net(torch.as_tensor(context).to(dtype)).numpy())


def warn_of_embedding(importer: str, net: Any) -> None:
    """Say that the context of a flow is the output of an embedding that stays where it is."""
    _words.warn(
        f"{importer}: the embedding {_words.cut(_common.named(net), 40)} is not linear and stays in torch; the context of the flow is its "
        "output: fastmaf.interop.embed(source, context)",
        UserWarning,
    )


@dataclass
class Embedding:
    """What an embedding of the context becomes: context layers, then weight c + bias; `folded` is False where it stays outside."""

    features: int
    layers: list[Any] = field(default_factory=list)
    weight: Array | None = None
    bias: Array | None = None
    folded: bool = True

    def folded_into(self, layers: Sequence[FlowLayer], base: Any) -> tuple[list[FlowLayer], Any]:
        """Layers and base that read the context in front of the embedding."""
        if self.weight is None or self.bias is None:
            return list(layers), base
        return _common.fold_linear_context(layers, base, self.weight, self.bias)


def embedding_of(importer: str, net: Any, features: int, shape: tuple[int, ...] | None = None) -> Embedding:
    """The embedding as layers and a linear map, where it is one; `features` are those that it gives."""
    import torch

    made = Embedding(features)
    width: int | None = None if shape is None or len(shape) != 1 else shape[0]
    outside = Embedding(features, folded=False)

    def flat(module: Any) -> list[Any]:
        if isinstance(module, torch.nn.Sequential):
            return [inner for part in module for inner in flat(part)]
        return [] if isinstance(module, (torch.nn.Identity, torch.nn.Dropout)) else [module]

    parts = flat(net)
    if shape is not None and len(shape) != 1 and parts:
        return outside
    if not features:
        return made
    linears = [part for part in parts if isinstance(part, torch.nn.Linear)]
    width = width or (linears[0].in_features if linears else features)
    weight, bias = np.eye(width), np.zeros(width)
    for part in parts:
        if isinstance(part, torch.nn.Linear):
            own = _common.wide("the embedding", part.weight)
            bias = own @ bias + (0 if part.bias is None else _common.wide("the bias of the embedding", part.bias))
            weight = own @ weight
        elif type(part).__name__ == "Standardize":
            mean = np.broadcast_to(_common.wide("the mean of the z-score", part._mean), len(bias))
            std = np.broadcast_to(_common.wide("the standard deviation of the z-score", part._std), len(bias))
            if part is parts[0]:
                made.layers.append(Affine(mean, 1 / std))
            else:
                weight, bias = weight / std[:, None], (bias - mean) / std
        else:
            return outside
    made.features = width
    if linears or len(parts) > 1:
        made.weight, made.bias = weight, bias
    return made


class Parts:
    """Collects the layers of transforms of nflows, from data to noise."""

    def __init__(self, importer: str) -> None:
        self.importer = importer
        self.layers: list[FlowLayer] = []
        self.features = 0
        self.context_features = 0
        self.late: list[tuple[int, Callable[[int], FlowLayer]]] = []

    def transform(self, transform: Any, inverted: bool) -> None:
        """Add the layers of a transform, or of its inverse."""
        from nflows import transforms as t

        if isinstance(transform, t.CompositeTransform):
            for part in reversed(transform._transforms) if inverted else transform._transforms:
                self.transform(part, inverted)
            return
        if isinstance(transform, t.InverseTransform):
            if isinstance(transform._transform, t.Sigmoid) and not inverted:
                self._logit(transform._transform)
                return
            self.transform(transform._transform, not inverted)
            return
        if isinstance(transform, t.Sigmoid) and inverted:
            self._logit(transform)
            return
        own = self._layers(transform)
        self._add(_common.inverse(self.importer, own) if inverted else own)

    def _logit(self, sigmoid: Any) -> None:
        temperature = float(_common.wide("temperature", sigmoid.temperature).ravel()[0])

        def made(n: int) -> list[FlowLayer]:
            return [Elementwise(("logit",) * n, np.zeros(n), np.ones(n)), _common.scaled(1 / temperature, 0.0, n)]

        self._scalar(made)

    def _scalar(self, made: Callable[[int], list[FlowLayer]]) -> None:
        """A layer that is the same for all columns, whose number may be known only later."""
        place = len(self.layers)
        for number in range(len(made(1))):
            self.layers.append(Affine(np.zeros(1), np.ones(1)))  # its place is taken
            self.late.append((place + number, lambda n, number=number: made(n)[number]))  # type: ignore[misc]

    def _add(self, layers: Sequence[FlowLayer]) -> None:
        for layer in layers:
            self.layers.append(layer)
            self.features = self.features or width_of("", layer)

    def settled(self, features: int) -> list[FlowLayer]:
        """The layers, those of all columns now with their number."""
        self.features = self.features or features
        for place, made in self.late:
            self.layers[place] = made(self.features)
        self.late = []
        return self.layers

    def _layers(self, transform: Any) -> list[FlowLayer]:
        from nflows import transforms as t
        from nflows.transforms.linear import Linear as AnyLinear

        if isinstance(transform, t.MaskedAffineAutoregressiveTransform):
            made = transform.autoregressive_net
            activation = activation_of(self.importer, made)
            return [self._autoregressive(made.state_dict(), activation, float(transform._epsilon), bool(made.use_residual_blocks))]
        if isinstance(transform, t.IdentityTransform):
            return []
        if isinstance(transform, t.Permutation):
            if transform._dim != 1:
                raise refuse(self.importer, f"a permutation of axis {transform._dim}", "the record permutes columns")
            return [Permutation(_common.whole("_permutation", transform._permutation))]
        if isinstance(transform, t.PointwiseAffineTransform):
            scale, shift = _common.wide("_scale", transform._scale), _common.wide("_shift", transform._shift)
            if max(scale.size, shift.size) > 1:
                return [_common.scaled(scale, shift, max(scale.size, shift.size))]
            self._scalar(lambda n: [_common.scaled(scale, shift, n)])
            return []
        if isinstance(transform, t.BatchNorm):
            return [_norm(transform.state_dict(), float(transform.eps))]
        if isinstance(transform, t.ActNorm):
            if not bool(transform.initialized):
                _words.warn(f"{self.importer}: an ActNorm has not seen any data; it is taken as it stands", UserWarning)
            return [_act_norm(transform.state_dict())]
        if type(transform).__name__ == "LULinear":
            lower, upper = transform._create_lower_upper()
            return [Linear(_common.wide("lower", lower), _common.wide("upper", upper), _common.wide("bias", transform.bias))]
        if isinstance(transform, AnyLinear):
            return _common.linear(self.importer, _common.wide("weight", transform.weight()), _common.wide("bias", transform.bias))
        if type(transform).__name__ == "HouseholderSequence":
            import torch

            rows, _ = transform(torch.eye(transform.features, dtype=torch.float64))
            matrix = _common.wide("matrix", rows).T
            return _common.linear(self.importer, matrix, np.zeros(len(matrix)))
        what = _common.named(transform)
        if "Spline" in what or "Piecewise" in what or "Quadratic" in what or "Cubic" in what:
            raise refuse(self.importer, what, "a spline law would be needed")
        raise refuse(self.importer, what, "the record has no layer for it")

    def _autoregressive(self, state: Mapping[str, Any], activation: Activation, eps: float, residual: bool | None = None) -> Autoregressive:
        net, ranks = _made.conditioner(self.importer, state, MADE, activation, residual)
        self._reads(net)
        return Autoregressive(ranks, _made.swapped(net), Law("softplus", "affine", {"eps": eps}))

    def _reads(self, net: Any) -> None:
        for layer in (*net.hidden, net.final):
            if layer.context_weight is not None:
                self.context_features = layer.context_weight.shape[1]

    def distribution(self, base: Any) -> Normal | Terminal | None:
        """The base; one that is normal, but not standard, becomes a layer."""
        name = type(base).__name__
        if name in ("MADEMoG", "MADEMoGWrapper"):
            made = base._made
            return self.mixture(made.state_dict(), made, name == "MADEMoGWrapper")
        features = int(np.prod(base._shape)) if hasattr(base, "_shape") else 0
        self.settled(features)
        if name == "StandardNormal":
            return None
        if name == "DiagonalNormal":
            scale = np.exp(_common.wide("log_std_", base.log_std_).ravel())
            self._add([Affine(_common.wide("mean_", base.mean_).ravel(), 1 / scale)])
            return None
        if name == "ConditionalDiagonalNormal":
            maps, found = _plain(self.importer, base._context_encoder)
            half = np.arange(2 * self.features).reshape(2, -1).T.ravel()  # all means, then all log-scales
            if not maps:
                maps, found = [Dense(np.eye(2 * self.features), np.zeros(2 * self.features))], []
            maps[-1] = _common.rows_of(maps[-1], half)
            layer = _common.constant_in_x(self.importer, self.features, maps, found, Law("exp", "standardize"))
            self._reads(layer.conditioner)
            self._add([layer])
            return None
        raise refuse(self.importer, f"the base {name}", "the bases are normals and the mixture MADE")

    def mixture(self, state: Mapping[str, Any], made: Any, dummy: bool) -> Terminal:
        """A mixture MADE; that of sbi has a first variable that is always zero."""
        return self.mixture_of(state, activation_of(self.importer, made), int(made.num_mixture_components), float(made.epsilon), dummy)

    def mixture_of(self, state: Mapping[str, Any], activation: Activation, components: int, eps: float, dummy: bool) -> Terminal:
        """The same by its numbers."""
        net, ranks = _made.conditioner(self.importer, state, MIXTURE, activation)
        if dummy:
            net, ranks = _made.without_first(net, 3 * components), ranks[1:] - 1
        self._reads(net)
        self.settled(ranks.size)
        return Terminal(ranks, _made.mixture_rows(net, components), "mixture", components, (), {"eps": eps}, "softplus")


def activation_of(importer: str, made: Any) -> Activation:
    """That of a MADE, whose blocks have it as attributes of their own."""
    functions = [made.activation] if hasattr(made, "activation") else []
    functions += [block.activation for block in made.blocks]
    return _common.one_activation(importer, [_common.torch_activation(importer, function) for function in functions])


def _norm(state: Mapping[str, Any], eps: float) -> Affine:
    """A frozen `BatchNorm` of nflows."""
    weight = np.logaddexp(0, _common.wide("unconstrained_weight", state["unconstrained_weight"])) + eps
    scale = weight / np.sqrt(_common.wide("running_var", state["running_var"]) + eps)
    mean, bias = _common.wide("running_mean", state["running_mean"]), _common.wide("bias", state["bias"])
    return Affine(mean - bias / scale, scale)


def _act_norm(state: Mapping[str, Any]) -> Affine:
    shift = _common.wide("shift", state["shift"])
    return _common.scaled(np.exp(_common.wide("log_scale", state["log_scale"])), shift, shift.size)


def _plain(importer: str, net: Any) -> tuple[list[Dense], list[Activation]]:
    """The maps and activations of a network without masks: the identity, a linear layer or a sequence with activations between."""
    import torch

    modules = list(net) if isinstance(net, torch.nn.Sequential) else [net]
    maps: list[Dense] = []
    found: list[Activation] = []
    for module in modules:
        if isinstance(module, torch.nn.Linear):
            maps.append(_common.dense("Linear", module.weight, module.bias))
            found.append(Activation("identity"))
        elif isinstance(module, torch.nn.Identity) or (not isinstance(module, torch.nn.Module) and not maps):
            continue
        elif maps:
            found[-1] = _common.torch_activation(importer, module)
        else:
            raise refuse(importer, f"a context encoder that begins with {_common.named(module)}", "it must begin with a linear layer")
    if found and found[-1].name != "identity":
        raise refuse(importer, "a context encoder that ends with an activation", "it must end with a linear layer")
    return maps, found[:-1]


# State dicts


def from_state(importer: str, library: str, state: Mapping[str, Any], activation: Activation, dtype: Any) -> Flow:
    """The flow of a state dict of nflows, or of an sbi estimator that holds one under "net."."""
    state = {key.removeprefix("net."): value for key, value in state.items()}
    parts = Parts(importer)
    own = _common.under(state, "_transform.")
    if any(key.startswith("_transforms.") for key in own):
        own = _flat(own)
    elif own:
        own = {f"_transforms.0.{key}": value for key, value in own.items()}
    for k in range(_made.count(own, "_transforms")):
        if not (layer := _common.under(own, f"_transforms.{k}.")):
            raise refuse(importer, f"_transforms.{k}, of which the state_dict has nothing,", "give the flow itself")
        _state_layer(parts, layer, activation)
    base: Any = None
    made = _common.under(state, "_distribution._made.")
    if made:
        features = made["initial_layer.weight"].shape[1]
        known = parts.features or features
        components = made["final_layer.weight"].shape[0] // (3 * features)
        base = parts.mixture_of(made, activation, components, 1e-2, known == features - 1 or (not parts.features and library == "sbi"))
    elif "_distribution.mean_" in state:
        mean = _common.wide("mean_", state["_distribution.mean_"]).ravel()
        parts._add([Affine(mean, np.exp(-_common.wide("log_std_", state["_distribution.log_std_"]).ravel()))])
    elif other := [key for key in state if key.startswith("_distribution.") and key != "_distribution._log_z"]:
        raise refuse(importer, f"{min(other)} of the state_dict", "give the flow itself")
    if not parts.features:
        sizes = [_common.wide(key, value).size for key, value in own.items() if key.endswith("_scale")]
        parts.features = max(sizes, default=0)
        if not parts.features:
            raise ValueError("state_dict has no keys of the form '_transform._transforms.0.autoregressive_net...', those of nflows")
    layers = parts.settled(parts.features)
    width = parts.context_features
    return _common.finish(
        importer,
        library,
        layers,
        base,
        features=parts.features,
        context_features=width,
        context_layers=_common.z_score_of(importer, _common.under(state, "_embedding_net."), width),
        dtype=_common.dtype_of((value for key, value in state.items() if key != "_distribution._log_z"), dtype),
        log_prob=None,
        notes={"activation": activation.name},
    )


def _flat(own: Mapping[str, Any]) -> dict[str, Any]:
    """Composite transforms within composite transforms as one list."""
    made: dict[str, Any] = {}
    number = 0
    for k in range(_made.count(own, "_transforms")):
        inner = _common.under(own, f"_transforms.{k}.")
        if any(key.startswith("_transforms.") for key in inner):
            inner = _flat(inner)
            for j in range(_made.count(inner, "_transforms")):
                made |= {f"_transforms.{number}.{key}": value for key, value in _common.under(inner, f"_transforms.{j}.").items()}
                number += 1
        else:
            made |= {f"_transforms.{number}.{key}": value for key, value in inner.items()}
            number += 1
    return made


def _state_layer(parts: Parts, own: Mapping[str, Any], activation: Activation) -> None:
    """Add the layer that has these names."""
    names = set(own)
    if "autoregressive_net.initial_layer.weight" in names:
        state = _common.under(own, "autoregressive_net.")
        features, rows = state["initial_layer.weight"].shape[1], state["final_layer.weight"].shape[0]
        if rows != 2 * features:
            raise refuse(parts.importer, f"a MADE with {rows // features} parameters for each variable", "a spline law would be needed")
        parts._add([parts._autoregressive(state, activation, 1e-3)])
    elif names == {"_permutation"}:
        parts._add([Permutation(_common.whole("_permutation", own["_permutation"]))])
    elif names == {"_shift", "_scale"}:
        scale, shift = _common.wide("_scale", own["_scale"]), _common.wide("_shift", own["_shift"])
        if max(scale.size, shift.size) > 1:
            parts._add([_common.scaled(scale, shift, max(scale.size, shift.size))])
        else:
            parts._scalar(lambda n: [_common.scaled(scale, shift, n)])
    elif names == {"unconstrained_weight", "bias", "running_mean", "running_var"}:
        parts._add([_norm(own, 1e-5)])
    elif {"log_scale", "shift"} <= names:
        parts._add([_act_norm(own)])
    elif names == {"bias", "lower_entries", "upper_entries", "unconstrained_upper_diag"}:
        bias = _common.wide("bias", own["bias"])
        lower, upper = np.eye(bias.size), np.zeros((bias.size, bias.size))
        lower[np.tril_indices(bias.size, -1)] = _common.wide("lower_entries", own["lower_entries"])
        upper[np.triu_indices(bias.size, 1)] = _common.wide("upper_entries", own["upper_entries"])
        diagonal = np.logaddexp(0, _common.wide("unconstrained_upper_diag", own["unconstrained_upper_diag"])) + 1e-3
        parts._add([Linear(lower, upper + np.diag(diagonal), bias)])
    else:
        raise refuse(parts.importer, f"a transform with {min(names)} of the state_dict", "give the flow itself")
