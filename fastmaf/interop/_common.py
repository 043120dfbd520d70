"""What all importers share: numbers of other libraries, folds that keep a flow exact, and the check at the end of an import."""

from __future__ import annotations

import copy
import importlib.metadata
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmaf import _arrays, _words, backends
from fastmaf.backends.reference import INVERSE
from fastmaf.flow import Flow
from fastmaf.layers import (
    Affine,
    Autoregressive,
    Block,
    Conditioner,
    Dense,
    Elementwise,
    FlowLayer,
    Law,
    Linear,
    Normal,
    Permutation,
    Terminal,
)
from fastmaf.record import FlowRecord

Array = NDArray[Any]
LogProb = Callable[[Array, "Array | None"], Array]


class ImportMismatchError(RuntimeError):
    """The log-densities of a library and of the flow that was made of its model differ: the import is wrong, and no flow is returned."""


def refuse(importer: str, what: str, needs: str) -> NotImplementedError:
    """The error for what the record cannot express: by name, with what would be needed."""
    done = "exported" if importer.startswith("to_") else "imported"
    return NotImplementedError(f"{importer}: {_words.cut(what, 100)} cannot be {done}; {needs}")


def activation_of(importer: str, activation: str | None, has_networks: bool) -> str:
    """The activation for a state dict, which does not say it."""
    if activation is None and has_networks:
        raise ValueError(f"{importer}: state_dict does not say the activation of its networks; name it, activation='relu' for instance")
    return activation or "relu"


def named(thing: Any) -> str:
    """The name of an object's class, or of a function."""
    return str(getattr(thing, "__name__", type(thing).__name__))


def version(package: str) -> str:
    """The version of an installed package, or "unknown"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


# Numbers


def numbers(name: str, value: Any) -> Array:
    """An array of NumPy, float32 or float64, of one of torch, JAX or NumPy; half precisions become float32.

    Raises
    ------
    ValueError
        With the name, if it holds something else than real numbers, or numbers that are not finite.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if "float16" in str(value.dtype):
            value = value.float()
        value = value.numpy()
    array = np.asarray(value)
    if array.dtype.name in ("bfloat16", "float16"):
        array = array.astype(np.float32)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} has dtype {_words.cut(str(array.dtype))}; it must hold real numbers")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name}, of shape {array.shape}, holds numbers that are not finite")
    return array if array.dtype == np.float32 else array.astype(np.float64)


def wide(name: str, value: Any) -> Array:
    """`numbers` in float64."""
    return numbers(name, value).astype(np.float64)


def whole(name: str, value: Any) -> Array:
    """An int64 array."""
    array = np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
    if array.dtype.kind not in "iub" and not (array == np.floor(array)).all():
        raise ValueError(f"{name} has dtype {_words.cut(str(array.dtype))}; it must hold integers")
    return array.astype(np.int64)


def dtype_of(arrays: Iterable[Any], dtype: Any) -> np.dtype[Any]:
    """That which is asked for, else float64 if one of the arrays is, else float32."""
    if dtype is not None:
        return _arrays.float_dtype(dtype)
    return np.dtype(np.float64 if any("float64" in str(getattr(array, "dtype", "")) for array in arrays) else np.float32)


def under(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries of a state dict whose names begin with a prefix, without it."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def z_score_of(importer: str, state: Mapping[str, Any], width: int) -> list[Affine]:
    """The z-score of contexts that a state dict of sbi holds as its embedding."""
    if not state:
        return []
    names = {key.removeprefix("0.") for key in state}
    if names != {"_mean", "_std"}:
        raise refuse(importer, "the embedding net of the state_dict", "give the estimator itself, or leave the keys of _embedding_net out")
    mean, std = (wide(name, next(value for key, value in state.items() if key.endswith(name))) for name in ("_mean", "_std"))
    return [Affine(np.broadcast_to(mean, width), 1 / np.broadcast_to(std, width))]


# Activations


@dataclass(frozen=True)
class Activation:
    """One of `fastmaf.layers.ACTIVATIONS`, or one that folds into one of them: "sigmoid", "leaky_relu" with its slope, "identity"."""

    name: str
    slope: float = 0.0


_POINTS = np.array([-40.0, -30.0, -3.0, -1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0, 3.0, 30.0, 40.0])


def _known(x: Array) -> dict[str, Array]:
    phi = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
    logistic = 1 / (1 + np.exp(-x))
    return {
        "relu": np.maximum(x, 0),
        "tanh": np.tanh(x),
        "elu": np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
        "gelu": x * phi,
        "silu": x * logistic,
        "sigmoid": logistic,
        "identity": x,
    }


def activation_by_values(importer: str, what: Any, evaluate: Callable[[Array], Array]) -> Activation:
    """The activation that a function of another library is, told by its values: names and classes vary, values do not.

    Parameters
    ----------
    importer : str
    what : object
        The function or module, for its name in the error.
    evaluate : callable
        The function on float64 arrays of NumPy.

    Raises
    ------
    NotImplementedError
        If it is none that the record has or that folds into one.
    """
    try:
        values = np.asarray(evaluate(_POINTS.copy()), np.float64)
    except Exception as error:  # whatever a foreign function raises
        raise refuse(importer, f"the activation {named(what)}", f"it fails on an array of numbers ({type(error).__name__})") from error
    if values.shape == _POINTS.shape:
        for name, known in _known(_POINTS).items():
            if np.allclose(values, known, rtol=3e-7, atol=1e-7):
                return Activation(name)
        slope = float(values[3] / _POINTS[3])
        if slope >= 0 and np.allclose(values, np.where(_POINTS < 0, slope * _POINTS, _POINTS), rtol=1e-6):
            return Activation("leaky_relu", slope)
    raise refuse(
        importer,
        f"the activation {named(what)}",
        "there are relu, tanh, elu (alpha 1), gelu (exact), silu, sigmoid and leaky relu",
    )


def torch_activation(importer: str, function: Any) -> Activation:
    """The activation that a function or module of torch is; dropout is the identity."""
    import torch

    def evaluate(x: Array) -> Array:
        with torch.no_grad():
            try:
                return np.asarray(function(torch.from_numpy(x)).numpy())
            except RuntimeError:  # a module with parameters in float32
                return np.asarray(function(torch.from_numpy(x).float()).numpy())

    if isinstance(function, torch.nn.Module):
        function = copy.deepcopy(function).cpu().eval()
    return activation_by_values(importer, function, evaluate)


def one_activation(importer: str, found: Sequence[Activation]) -> Activation:
    """The activation of a conditioner, which has one for all its layers."""
    different = set(found)
    if len(different) > 1:
        names = " and ".join(sorted(a.name for a in different))
        raise refuse(importer, f"a network with {names}", "the record has one activation for all layers of a conditioner")
    return found[0] if found else Activation("identity")


# Networks


def dense(
    name: str,
    weight: Any,
    bias: Any = None,
    mask: Any = None,
    degrees: Array | None = None,
    context: Any = None,
    context_bias: Any = None,
    mode: str = "added",
) -> Dense:
    """A `Dense` in float64: the weight under its mask, a bias of zeros if there is none, and the bias of an added context in the bias."""
    weight = wide(f"{name}.weight", weight)
    if mask is not None:
        weight = weight * wide(f"{name}.mask", mask)
    bias = np.zeros(len(weight)) if bias is None else wide(f"{name}.bias", bias)
    if context is None:
        return Dense(weight, bias, degrees)
    context = wide(f"the context weight of {name}", context)
    own = None if context_bias is None else wide(f"the context bias of {name}", context_bias)
    if own is not None and mode == "added":
        bias, own = bias + own, None
    return Dense(weight, bias, degrees, mode, context, own)


def split_context(layer: Dense, features: Sequence[int] | Array, contexts: Sequence[int] | Array) -> Dense:
    """A map that reads variables and context together, as one that reads the variables and to which the context is added."""
    features, contexts = np.asarray(features, int), np.asarray(contexts, int)
    own = replace(layer, weight=layer.weight[:, features])
    return replace(own, context="added", context_weight=layer.weight[:, contexts]) if contexts.size else own


def with_degrees(layer: Dense, degrees: Array) -> Dense:
    """A map with the degrees of its units."""
    return replace(layer, degrees=degrees)


def with_context(layer: Dense, weight: Array) -> Dense:
    """A map to which a context of any width is added."""
    return replace(layer, context="added", context_weight=weight) if weight.shape[1] else layer


def shifted(layer: Dense, bias: Array) -> Dense:
    """A map with more bias."""
    return replace(layer, bias=layer.bias + bias)


def rows_of(layer: Dense, rows: Array) -> Dense:
    """A map with other rows, for a library that orders the parameters of the variables in another way."""
    return replace(
        layer,
        weight=layer.weight[rows],
        bias=layer.bias[rows],
        context_weight=None if layer.context_weight is None else layer.context_weight[rows],
        context_bias=None if layer.context_bias is None else layer.context_bias[rows],
    )


def scaled_rows(layer: Dense, scale: Array, shift: Array) -> Dense:
    """A map whose sums, the added context among them, are multiplied and shifted: a frozen batch norm behind it."""
    changed = replace(layer, weight=layer.weight * scale[:, None], bias=layer.bias * scale + shift)
    if layer.context_weight is not None:
        assert layer.context == "added" and layer.context_bias is None
        changed = replace(changed, context_weight=layer.context_weight * scale[:, None])
    return changed


def scaled_columns(layer: Dense, scale: Array, shift: Array) -> Dense:
    """A map that reads what a frozen batch norm makes of its inputs."""
    return replace(layer, weight=layer.weight * scale[None, :], bias=layer.bias + layer.weight @ shift)


def conditioner(
    importer: str,
    initial: Dense | None,
    blocks: Sequence[Block],
    final: Dense,
    activation: Activation,
    final_activation: bool,
    skip: Array | None = None,
    input_clip: float | None = None,
) -> Conditioner:
    """A `Conditioner`, with a sigmoid or a leaky relu folded."""
    maps = [m for m in (initial, *(m for block in blocks for m in block.maps), final) if m is not None]
    uses = final_activation or any(block.kind != "linear" for block in blocks)
    name = activation.name
    if not uses and not any(m.context == "activated" for m in maps):
        name, final_activation = "relu", False
    elif initial is None:
        final_activation = False
    elif name == "sigmoid":
        initial, blocks, final = _sigmoid_as_tanh(importer, initial, blocks, final, final_activation)
        name = "tanh"
    elif name == "leaky_relu":
        initial, blocks, final = _leaky_as_relu(importer, initial, blocks, final, final_activation, activation.slope)
        name = "relu"
    elif name == "identity":
        if any(block.residual for block in blocks) or any(m.context == "activated" for m in maps):
            raise refuse(importer, "a network without activation, residual or with an activated context", "give it one")
        blocks, name, final_activation = [Block("linear", block.maps) for block in blocks], "relu", False
    return Conditioner(initial, tuple(blocks), final, name, final_activation, skip, input_clip)


def _sigmoid_as_tanh(
    importer: str, initial: Dense, blocks: Sequence[Block], final: Dense, final_activation: bool
) -> tuple[Dense, list[Block], Dense]:
    """By sigmoid(h) = 1/2 + tanh(h/2) / 2: all units carry half of what they did."""

    def halved(layer: Dense) -> Dense:
        half = replace(layer, weight=0.5 * layer.weight, bias=0.5 * layer.bias)
        if layer.context_weight is None or layer.context == "gated":
            return half
        return replace(half, context_weight=0.5 * layer.context_weight)

    def turned(layer: Dense, active: bool, hidden: bool) -> Dense:
        if layer.context == "activated":
            raise refuse(importer, "a sigmoid of the context", "the record has the sigmoid of hidden units alone, as a tanh")
        if active:
            layer = replace(layer, bias=layer.bias + 0.5 * layer.weight.sum(axis=1), weight=0.5 * layer.weight)
        else:
            layer = replace(layer, weight=2 * layer.weight)
        if layer.norm_shift is not None:
            layer = replace(layer, norm_shift=0.5 * layer.norm_shift)
        if not hidden:
            return layer
        return halved(layer)

    if initial.context == "activated":
        turned(initial, True, True)
    first = halved(initial)
    made = []
    for block in blocks:
        maps = [turned(block.maps[0], block.kind in ("plain", "residual"), True)]
        maps += [turned(inner, True, True) for inner in block.maps[1:]]
        made.append(Block(block.kind, tuple(maps)))
    return first, made, turned(final, final_activation, False)


def _leaky_as_relu(
    importer: str, initial: Dense, blocks: Sequence[Block], final: Dense, final_activation: bool, slope: float
) -> tuple[Dense, list[Block], Dense]:
    """By leaky(h) = relu(h) - slope relu(-h): twice as many units."""
    if any(block.residual for block in blocks) or any(m.context not in ("none", "added") for b in blocks for m in b.maps):
        raise refuse(importer, "a residual network with leaky relu", "the record would need it as an activation")
    if initial.context not in ("none", "added") or any(m.norm_scale is not None for b in blocks for m in b.maps):
        raise refuse(importer, "leaky relu of a context or an inner batch norm", "the record would need it as an activation")

    def out(layer: Dense) -> Dense:
        both = np.array([1.0, -1.0])
        changes: dict[str, Any] = {"weight": np.kron(both[:, None], layer.weight), "bias": np.kron(both, layer.bias)}
        if layer.context_weight is not None:
            changes["context_weight"] = np.kron(both[:, None], layer.context_weight)
        return replace(layer, **changes, degrees=None if layer.degrees is None else np.tile(layer.degrees, 2))

    def read(layer: Dense, active: bool) -> Dense:
        if active:
            return replace(layer, weight=np.concatenate([layer.weight, -slope * layer.weight], axis=1))
        return replace(layer, weight=np.concatenate([layer.weight, np.zeros_like(layer.weight)], axis=1))

    made = [Block(block.kind, (out(read(block.maps[0], block.kind == "plain")),)) for block in blocks]
    return out(initial), made, read(final, final_activation)


def constant_in_x(
    importer: str, features: int, maps: Sequence[Dense], found: Sequence[Activation], law: Law, direction: str = "data"
) -> Autoregressive:
    """A layer whose parameters depend on the context alone: `maps`, with activations in between, read it; all variables have rank 1."""
    ranks = np.ones(features, np.int64)
    first = maps[0]
    as_context = Dense(np.zeros((len(first.weight), features)), first.bias, None, "added", first.weight)
    if len(maps) == 1:
        net = conditioner(importer, None, (), as_context, Activation("identity"), False)
    else:
        initial = replace(as_context, degrees=np.zeros(len(first.weight), np.int64))
        blocks = [Block("plain", (replace(m, degrees=np.zeros(len(m.weight), np.int64)),)) for m in maps[1:-1]]
        net = conditioner(importer, initial, blocks, maps[-1], one_activation(importer, found), True)
    return Autoregressive(ranks, net, law, direction)


def coupling(
    importer: str, kept: Array, maps: Sequence[Dense], found: Sequence[Activation], law: Law, direction: str = "data"
) -> Autoregressive:
    """An affine coupling: variables that are `kept` have rank 1, the others 2; the maps read [kept, context] and give rows (m, r)."""
    kept = np.asarray(kept, bool)
    ranks = np.where(kept, 1, 2)
    own, changed = np.flatnonzero(kept), np.flatnonzero(~kept)
    first, last = maps[0], maps[-1]
    columns = np.zeros((len(first.weight), kept.size))
    columns[:, own] = first.weight[:, : own.size]
    first = split_context(first, np.arange(own.size), np.arange(own.size, first.weight.shape[1]))
    first = replace(first, weight=columns)
    if len(maps) == 1:
        last = first
    weight, bias = np.zeros((2 * kept.size, last.weight.shape[1])), np.zeros(2 * kept.size)
    rows = (2 * changed[:, None] + np.arange(2)).ravel()
    weight[rows], bias[rows] = last.weight, last.bias
    changes: dict[str, Any] = {"weight": weight, "bias": bias}
    if last.context_weight is not None:
        changes["context_weight"] = np.zeros((2 * kept.size, last.context_weight.shape[1]))
        changes["context_weight"][rows] = last.context_weight
    last = replace(last, **changes)
    if len(maps) == 1:
        net = conditioner(importer, None, (), last, Activation("identity"), False)
    else:
        hidden = [replace(m, degrees=np.ones(len(m.weight), np.int64)) for m in (first, *maps[1:-1])]
        net = conditioner(importer, hidden[0], [Block("plain", (m,)) for m in hidden[1:]], last, one_activation(importer, found), True)
    return Autoregressive(ranks, net, law, direction)


# Layers


def scaled(scale: Any, shift: Any, features: int) -> Affine:
    """The layer z = scale x + shift."""
    scale, shift = np.broadcast_to(scale, features).astype(np.float64), np.broadcast_to(shift, features).astype(np.float64)
    return Affine(-shift / scale, scale)


def linear(importer: str, matrix: Array, bias: Array) -> list[FlowLayer]:
    """The layers z = matrix x + bias: a triangular factorisation with pivots, and a permutation."""
    n = len(matrix)
    upper, lower, order = matrix.astype(np.float64).copy(), np.eye(n), np.arange(n)
    for k in range(n):
        pivot = k + int(np.argmax(np.abs(upper[k:, k])))
        if upper[pivot, k] == 0:
            raise ValueError(f"{importer}: a linear layer of {n} features is singular")
        upper[[k, pivot]], order[[k, pivot]] = upper[[pivot, k]], order[[pivot, k]]
        lower[[k, pivot], :k] = lower[[pivot, k], :k]
        factors = upper[k + 1 :, k] / upper[k, k]
        lower[k + 1 :, k] = factors
        upper[k + 1 :, k:] -= factors[:, None] * upper[k, k:]
    return [Linear(lower, np.triu(upper), bias[order]), Permutation(np.argsort(order))]


def inverse(importer: str, layers: Sequence[FlowLayer]) -> list[FlowLayer]:
    """The layers of the opposite way; an autoregressive one reads its other side."""
    turned: list[FlowLayer] = []
    for layer in reversed(layers):
        if isinstance(layer, Affine):
            turned.append(Affine(-layer.loc * layer.scale, 1 / layer.scale))
        elif isinstance(layer, Permutation):
            turned.append(Permutation(np.argsort(layer.perm)))
        elif isinstance(layer, Autoregressive):
            form = "standardize" if layer.law.form == "affine" else "affine"
            if layer.law.kind == "log_precision":
                raise refuse(importer, "the inverse of a layer with log-precisions", "the record has them in one form")
            law = replace(layer.law, form=form)
            turned.append(replace(layer, law=law, direction="noise" if layer.direction == "data" else "data"))
        elif isinstance(layer, Linear):
            turned += _inverse_linear(layer)
        else:
            raise refuse(importer, f"the inverse of {type(layer).__name__}", "the record has bounds towards the real line alone")
    return turned


def _inverse_linear(layer: Linear) -> list[FlowLayer]:
    """U^-1 L^-1 is lower times upper where the columns run backwards: nothing is factorised anew, which would cost digits."""
    n = len(layer.bias)
    lower = _inverse_lower(np.tril(layer.lower, -1) + np.eye(n))
    upper = _inverse_lower(np.triu(layer.upper).T).T
    shift = -upper @ (lower @ layer.bias)
    first, second = upper[::-1, ::-1], lower[::-1, ::-1]
    diagonal = np.diagonal(first).copy()
    backwards = Permutation(np.arange(n)[::-1])
    return [backwards, Linear(first / diagonal, diagonal[:, None] * second, shift[::-1]), backwards]


def _inverse_lower(matrix: Array) -> Array:
    """Of a lower triangular matrix, row by row."""
    inverse = np.zeros_like(matrix)
    for i, row in enumerate(matrix):
        inverse[i] = -(row[:i] @ inverse[:i])
        inverse[i, i] = 1
        inverse[i] /= row[i]
    return inverse


def simplified(layers: Sequence[FlowLayer]) -> list[FlowLayer]:
    """The same map in fewer layers: neighbours merged, identities left out, what stands in front of bounds moved into or behind them."""
    made: list[FlowLayer] = []
    for layer in layers:
        before = made[-1] if made else None
        if isinstance(layer, Affine) and isinstance(before, Affine):
            made[-1] = layer = Affine(before.loc + layer.loc / before.scale, before.scale * layer.scale)
        elif isinstance(layer, Permutation) and isinstance(before, Permutation):
            made[-1] = layer = Permutation(before.perm[layer.perm])
        elif isinstance(layer, Elementwise) and isinstance(before, Affine):
            made = simplified([*made[:-1], *_through_bounds(before, layer)])
            continue
        elif isinstance(layer, Elementwise) and isinstance(before, Permutation):
            back = np.argsort(before.perm)
            kinds = tuple(layer.kinds[j] for j in back)
            made = simplified([*made[:-1], Elementwise(kinds, layer.lower[back], layer.upper[back]), before])
            continue
        else:
            made.append(layer)
        if (
            isinstance(layer, Affine)
            and (layer.loc == 0).all()
            and (layer.scale == 1).all()
            or isinstance(layer, Permutation)
            and (layer.perm == np.arange(layer.perm.size)).all()
            or isinstance(layer, Elementwise)
            and set(layer.kinds) == {"identity"}
        ):
            made.pop()
    return made


def _through_bounds(affine: Affine, layer: Elementwise) -> list[FlowLayer]:
    """First (x - loc) scale and then bounds, as bounds of x and an Affine behind them."""
    kinds, lower, upper = list(layer.kinds), layer.lower.copy(), layer.upper.copy()
    loc, scale = np.zeros(len(kinds)), np.ones(len(kinds))
    for j, kind in enumerate(kinds):
        s = affine.scale[j]
        if kind == "identity":
            loc[j], scale[j] = affine.loc[j], s
            continue
        ends = sorted((affine.loc[j] + layer.lower[j] / s, affine.loc[j] + layer.upper[j] / s))
        lower[j], upper[j] = ends
        if s < 0:
            kinds[j] = {"log_above": "log_below", "log_below": "log_above", "logit": "logit"}[kind]
            scale[j] = -1
        if kind != "logit":  # log |s| is added to, or taken from, the logarithm
            add = math.log(abs(s)) * (1 if kind == "log_above" else -1)
            loc[j] = -add / scale[j]
    return [Elementwise(tuple(kinds), lower, upper), Affine(loc, scale)]


def joined(importer: str, parts: Sequence[tuple[int, Sequence[FlowLayer]]]) -> list[FlowLayer]:
    """Layers of groups of columns side by side: at most bounds and an Affine each; `parts` are (columns, layers)."""
    kinds: list[str] = []
    ends: list[Array] = []
    affines: list[Affine] = []
    for width, layers in parts:
        bounds, affine = Elementwise(("identity",) * width, np.full(width, -np.inf), np.full(width, np.inf)), None
        for layer in simplified(layers):
            if isinstance(layer, Elementwise) and affine is None:
                bounds = layer
            elif isinstance(layer, Affine) and affine is None:
                affine = layer
            else:
                raise refuse(importer, f"{type(layer).__name__} on some columns", "the record has bounds and an Affine for single columns")
        kinds += bounds.kinds
        ends.append(np.stack([bounds.lower, bounds.upper]))
        affines.append(affine or Affine(np.zeros(width), np.ones(width)))
    lower, upper = np.concatenate(ends, axis=1)
    return simplified(
        [
            Elementwise(tuple(kinds), lower, upper),
            Affine(np.concatenate([a.loc for a in affines]), np.concatenate([a.scale for a in affines])),
        ]
    )


def fold_linear_context(layers: Sequence[FlowLayer], base: Any, weight: Array, bias: Array) -> tuple[list[FlowLayer], Any]:
    """Layers and base that read c where they read weight c + bias: a linear embedding moved into their context weights."""

    def turned(layer: Dense) -> Dense:
        if layer.context_weight is None:
            return layer
        shift = layer.context_weight @ bias
        changed = replace(layer, context_weight=layer.context_weight @ weight)
        if layer.context == "added":
            return replace(changed, bias=changed.bias + shift)
        return replace(changed, context_bias=shift if layer.context_bias is None else layer.context_bias + shift)

    def through(record: Any) -> Any:
        if not isinstance(record, (Autoregressive, Terminal)):
            return record
        return replace(record, conditioner=mapped(record.conditioner, turned))

    return [through(layer) for layer in layers], through(base)


def mapped(net: Conditioner, change: Callable[[Dense], Dense]) -> Conditioner:
    """A conditioner with all its maps changed."""
    return replace(
        net,
        initial=None if net.initial is None else change(net.initial),
        blocks=tuple(replace(block, maps=tuple(map(change, block.maps))) for block in net.blocks),
        final=change(net.final),
    )


def contexts_of(layers: Sequence[FlowLayer]) -> int:
    """Number of context features that the networks of layers read."""
    for layer in layers:
        if isinstance(layer, Autoregressive):
            for dense in (*layer.conditioner.hidden, layer.conditioner.final):
                if dense.context_weight is not None:
                    return int(dense.context_weight.shape[1])
    return 0


def broadcast(layer: FlowLayer, features: int) -> FlowLayer:
    """An Affine of one number for all columns as one for each."""
    if isinstance(layer, Affine) and layer.loc.size != features:
        return Affine(np.broadcast_to(layer.loc, features), np.broadcast_to(layer.scale, features))
    return layer


def _with_context(record: Any, context_features: int) -> Any:
    """A layer that reads no context, in a flow that has one, as one that adds zero times it: the compiled core has one shape of those."""
    if not context_features or not isinstance(record, (Autoregressive, Terminal)):
        return record
    net = record.conditioner
    if any(layer.context != "none" for layer in (*net.hidden, net.final)):
        return record
    first = net.initial or net.final
    first = replace(first, context="added", context_weight=np.zeros((len(first.weight), context_features)))
    net = replace(net, final=first) if net.initial is None else replace(net, initial=first)
    return replace(record, conditioner=net)


# The end of an import


def finish(
    importer: str,
    library: str,
    layers: Sequence[FlowLayer],
    base: Normal | Terminal | None = None,
    *,
    features: int,
    context_features: int = 0,
    context_layers: Sequence[Elementwise | Affine] = (),
    dtype: np.dtype[Any],
    log_prob: LogProb | None,
    sparse: bool = False,
    notes: dict[str, Any] | None = None,
) -> Flow:
    """The flow of the layers, compared with its library.

    Parameters
    ----------
    importer, library : str
    layers, base, features, context_features, context_layers, dtype
        Of `fastmaf.Flow`; in float64.
    log_prob : callable or None
        The log-densities by the library of x (n, D) under contexts (n, C) or None, all float64 of NumPy; None where there is no library.
    sparse : bool
        Whether masks of the library hold weights at zero that the order of its variables would allow.
    notes : dict, optional
        For the flow's `training`.

    Raises
    ------
    ImportMismatchError
        If they differ.
    """
    made = [_with_context(layer, context_features) for layer in simplified(layers)]
    front = simplified(list(context_layers))
    record = FlowRecord(
        made,
        _with_context(base, context_features),
        features=features,
        context_features=context_features,
        context_layers=front,  # type: ignore[arg-type]
        dtype="float64",
        training={"source": {"library": library, "version": version(library), "importer": importer, **(notes or {})}},
    )
    if log_prob is not None:
        check(importer, record, log_prob)
    if sparse:
        _words.warn(
            f"{importer}: the masks of the model hold weights at zero that the order of its variables would allow: fit would train them",
            UserWarning,
        )
    flow = Flow._of(record.replaced(dtype=dtype))
    backend = backends.choose()
    missing = backend.unsupported(flow.record)
    if missing is not None:
        backends.told.add(missing)
        remedy = "set_backend('reference') silences this" if backend is backends.default else "set_backend(None) lets it"
        _words.warn(f"{importer}: {backends.without_kernel(backend, missing)}; {remedy}")
    return flow


ROWS = 32


LIMIT = 1e-6
"""Of the difference of log-densities, relative: a wrong import is far beyond it, rounding far below."""


def check(importer: str, record: FlowRecord, log_prob: LogProb) -> None:
    """Compare log-densities of a library with those of a record on random rows, by the reference in float64.

    Raises
    ------
    ImportMismatchError
        If they differ by more than rounding.
    """
    rng = np.random.default_rng(0)
    context = None
    if record.context_features:
        context = _pulled(record.context_layers, rng.standard_normal((ROWS, record.context_features)))
    x = _pulled(record.layers, rng.standard_normal((ROWS, record.features)) * rng.uniform(0.3, 1.5, (ROWS, 1)))
    own = np.empty(ROWS)
    backends.require("reference").log_prob(record, x, context, own)
    theirs = np.asarray(log_prob(x, context), np.float64).reshape(ROWS)
    with np.errstate(invalid="ignore"):
        error = np.abs(own - theirs) / (1 + np.abs(theirs))
    error[(own == theirs) | ~(np.isfinite(own) | np.isfinite(theirs))] = 0
    worst = float(np.where(np.isnan(error), np.inf, error).max())
    if not worst <= LIMIT:
        raise ImportMismatchError(
            f"{importer}: log_prob of the library and of the imported flow differ by {worst:.1e}, relative, on random rows; "
            "please report this model: its import is wrong"
        )


@np.errstate(all="ignore")
def _pulled(layers: Sequence[Any], rows: Array) -> Array:
    """Rows in front of leading layers without a network, from rows behind them."""
    front = []
    for layer in layers:
        if not isinstance(layer, (Elementwise, Affine)):
            break
        front.append(layer)
    for layer in reversed(front):
        rows = INVERSE[type(layer)](layer, rows)[0]
    return rows
