"""A flow as data: one immutable object, and what is derived from it.

A `FlowRecord` is checked when it is made and never changes.  Whatever a backend makes of it (packed weights, the approval of its layers)
is kept with the record itself, so that to give a flow other weights is to give it another record: no reader of the one can
meet what was derived from the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastmaf import _arrays, _networks, _words
from fastmaf import layers as _layers
from fastmaf.layers import Affine, Autoregressive, BatchNorm, Conditioner, Dense, Elementwise, Linear, Normal, Permutation, Terminal

__all__ = ["FlowRecord", "Runner", "plain", "trainable", "width_of"]

Array = NDArray[Any]
Made = TypeVar("Made")


class Runner(Protocol):
    """What a backend is to a record."""

    name: str

    def unsupported(self, flow: FlowRecord) -> str | None:
        """The layer or feature of the flow that has no kernel here, or None."""


class FlowRecord:
    """What a flow is; the parameters are those of `fastmaf.Flow`.

    Attributes
    ----------
    features, context_features : int
    layers, context_layers : tuple
    base : Normal or Terminal
    dtype : numpy.dtype
    names : tuple of str or None
    training : dict

    Raises
    ------
    ValueError
        If the layers do not fit together, or the dtype or the names do not fit.

    Examples
    --------
    >>> record = FlowRecord([Affine([1.0], [2.0])])
    >>> record.replaced(dtype="float64").dtype
    dtype('float64')
    """

    __slots__ = (
        "_derived",
        "approved_by",
        "base",
        "context_features",
        "context_layers",
        "dtype",
        "features",
        "layers",
        "names",
        "training",
    )

    features: int
    context_features: int
    layers: tuple[_layers.FlowLayer, ...]
    context_layers: tuple[Elementwise | Affine, ...]
    base: Normal | Terminal
    dtype: np.dtype[Any]
    names: tuple[str, ...] | None
    training: dict[str, Any]

    def __init__(
        self,
        layers: Iterable[_layers.FlowLayer],
        base: Normal | Terminal | None = None,
        *,
        features: int | None = None,
        context_features: int = 0,
        context_layers: Iterable[Elementwise | Affine] = (),
        dtype: DTypeLike = "float32",
        names: Sequence[str] | None = None,
        training: Mapping[str, Any] | None = None,
    ) -> None:
        layers, context_layers = _chain("layers", layers), _chain("context_layers", context_layers)
        dtype = _arrays.float_dtype(dtype)
        context_features = _arrays.count("context_features", context_features)
        if not isinstance(base, (Normal, Terminal, type(None))):
            raise ValueError(f"base is of type {type(base).__name__}; it must be Normal or Terminal")
        if features is None:
            if base is None and not layers:
                raise ValueError("a flow without layers and without base needs features")
            features = base.features if base is not None else width_of("layers[0]", layers[0])
        features = _arrays.count("features", features, lowest=1)
        base = base or Normal(features)
        _check_width("base", base.features, features, "features")
        if isinstance(base, Terminal):
            _check_conditioner("base", base.conditioner, context_features)
        for k, layer in enumerate(layers):
            _check_width(f"layers[{k}]", width_of(f"layers[{k}]", layer), features, "features")
            if isinstance(base, Terminal):
                _check_left(f"layers[{k}]", layer, base, names)
            if isinstance(layer, Autoregressive):
                _check_conditioner(f"layers[{k}]", layer.conditioner, context_features)
        for k, own in enumerate(context_layers):
            if not isinstance(own, (Elementwise, Affine)):
                raise ValueError(f"context_layers[{k}] is of type {type(own).__name__}; it must be Elementwise or Affine")
            _check_width(f"context_layers[{k}]", width_of("", own), context_features, "context features")
        names = _arrays.names(names, features)
        for k, layer in enumerate(layers):
            if isinstance(layer, Elementwise):
                layer.check_range(dtype, names if k == 0 else None)
        values = {
            "features": features,
            "context_features": context_features,
            "layers": _layers.astype(layers, dtype),
            "context_layers": context_layers,
            "base": _layers.astype(base, dtype),
            "dtype": dtype,
            "names": names,
            "training": _training(training),
            "_derived": {},
            "approved_by": None,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name} of a FlowRecord cannot be changed; replaced({name}=...) makes another record")

    def replaced(self, **changes: Any) -> FlowRecord:
        """The record with other values for some of the parameters."""
        names = ("layers", "base", "features", "context_features", "context_layers", "dtype", "names", "training")
        return FlowRecord(**({name: getattr(self, name) for name in names} | changes))

    @property
    def fitted(self) -> bool:
        """Whether a fit has left its trace on the flow; notes of others do not count."""
        return {"epochs", "best_epoch", "settings"} <= set(self.training)

    @property
    def usual_contexts(self) -> tuple[Array, ...]:
        """The ends between which contexts are like those of the fit, (C,) each; nothing if no lone Affine remembers these."""
        return self.derived("usual_contexts", _usual_contexts)

    @property
    def discrete(self) -> str:
        """The conditional of the base if some of its variables are discrete, else nothing."""
        return self.base.conditional if isinstance(self.base, Terminal) and any(self.base.values) else ""

    @property
    def values(self) -> tuple[int, ...]:
        """How many values each variable has; 0 for any number."""
        return self.base.values if isinstance(self.base, Terminal) else (0,) * self.features

    def sample_dtype(self, dtype: DTypeLike | None, out: Any = None) -> np.dtype[Any]:
        """The dtype of samples for which this one or `out` is asked for; it must have numbers between the bounds."""
        result = _arrays.sample_dtype(dtype, out, self.dtype)
        if result != self.dtype and self.layers and isinstance(self.layers[0], Elementwise):
            self.layers[0].check_range(result, self.names)
        return result

    def rounded(self, samples: Array) -> list[int]:
        """Columns of samples (..., D) whose dtype cannot tell them apart: all through, or where they have met a bound.

        Examples
        --------
        >>> record = FlowRecord([Affine([1e9, 0.0], [1.0, 1.0])])
        >>> record.rounded(np.zeros((3, 2), np.float32)), record.rounded(np.zeros((3, 2)))
        ([0], [])
        """
        coarse, low, high = self.derived(f"limits of {samples.dtype}", lambda record: _limits(record, samples.dtype))
        met = coarse
        for j in np.flatnonzero(np.isfinite(low) | np.isfinite(high)):
            column = samples[..., j]
            if not met[j] and ((column == low[j]) | (column == high[j])).any():
                met = met | (np.arange(met.size) == j)
        return [int(j) for j in np.flatnonzero(met)]

    def anew(self, seed: int) -> FlowRecord:
        """The record before all training: see `Flow.reset`.

        Examples
        --------
        >>> FlowRecord([Affine([3.0], [2.0])]).anew(0).layers[0] == Affine([0.0], [1.0])
        True
        """
        rng = np.random.default_rng(seed)
        kept = list(self.layers)
        if self.training.get("whitened") is True:  # a fit has put it there
            kept.remove(next(layer for layer in kept if isinstance(layer, Linear)))
        layers, base = [_anew(layer, rng) for layer in kept], _anew(self.base, rng)
        context_layers = [_anew(layer, rng) for layer in self.context_layers]
        return self.replaced(layers=layers, base=base, context_layers=context_layers, training={"init_seed": seed})

    # What backends make of it

    def approve(self, backend: Runner) -> None:
        """Note that a backend can run all layers.

        Raises
        ------
        NotImplementedError
            If it cannot.
        """
        missing = backend.unsupported(self)
        if missing is not None:
            raise NotImplementedError(f"the {backend.name} backend has no kernel for {missing}")
        object.__setattr__(self, "approved_by", backend)

    def derived(self, key: str, make: Callable[[FlowRecord], Made]) -> Made:
        """What `make` gives for this record; made once, unless two threads ask at the same time."""
        found: Made | None = self._derived.get(key)
        return self._derived.setdefault(key, make(self)) if found is None else found

    _derived: dict[str, Any]
    approved_by: Runner | None
    """The backend that was the last to say that it can run all layers."""

    # Parameters

    def parameter_arrays(self) -> Iterator[Array]:
        """The trainable arrays, in the order of `Flow.parameters`."""
        for record in (*self.layers, self.base):
            yield from trainable(record)

    def parameters(self) -> Array:
        """All trainable numbers in one vector; see `Flow.parameters`."""
        return np.concatenate([np.empty(0, self.dtype), *(array.ravel() for array in self.parameter_arrays())])

    def free_parameters(self) -> Array:
        """Which of them are free, (p,) bool: not those that masks hold at zero, nor what lies outside the triangles of a `Linear`."""
        return self.derived("free_parameters", _free_parameters)

    def with_parameters(self, parameters: ArrayLike) -> FlowRecord:
        """The record with other weights and biases; see `Flow.with_parameters`."""
        vector = _arrays.real("parameters", parameters)
        size = sum(array.size for array in self.parameter_arrays())
        if vector.shape != (size,):
            raise ValueError(f"parameters has shape {vector.shape}; the flow has {size} parameters")
        with np.errstate(over="ignore"):
            vector = vector.astype(self.dtype)
        if not (good := np.isfinite(vector)).all():
            raise ValueError(f"parameters are not finite in {np.count_nonzero(~good)} places, the first at {int(good.argmin())}")
        position = 0

        def take(array: Array | None) -> Array | None:
            nonlocal position
            if array is None:
                return None
            position += array.size
            return vector[position - array.size : position].reshape(array.shape)

        return self.replaced(layers=[_refill(layer, take) for layer in self.layers], base=_refill(self.base, take))


def _free_parameters(record: FlowRecord) -> Array:
    free = [np.empty(0, bool)]
    for layer in (*record.layers, record.base):
        if isinstance(layer, Linear):
            one = np.ones_like(layer.lower, bool)
            free += [np.tril(one, -1).ravel(), np.triu(one).ravel(), np.ones(layer.bias.size, bool)]
        else:
            net = _networks.free(layer) if isinstance(layer, (Autoregressive, Terminal)) else None
            free += [array.ravel() != 0 if net else np.ones(array.size, bool) for array in trainable(net or layer)]
    result = np.concatenate(free)
    result.flags.writeable = False
    return result


def _limits(record: FlowRecord, dtype: np.dtype[Any]) -> tuple[Array, Array, Array]:
    """Columns of which a dtype has less than 100 numbers for a standard deviation, and the numbers next to the bounds of each column."""
    bounds = record.layers[0] if record.layers and isinstance(record.layers[0], Elementwise) else None
    if bounds is not None:
        low, high = bounds.inner_range(dtype)
        most = np.finfo(dtype).max
        return np.zeros(record.features, bool), np.where(np.abs(low) < most, low, -np.inf), np.where(np.abs(high) < most, high, np.inf)
    none = np.full(record.features, np.inf)
    affine = record.layers[0] if record.layers and isinstance(record.layers[0], Affine) else None
    if affine is None:
        return np.zeros(record.features, bool), -none, none
    with np.errstate(all="ignore"):
        step = np.abs(np.spacing(affine.loc.astype(dtype))).astype(np.float64) * np.abs(affine.scale)
    return step > 0.01, -none, none


def _usual_contexts(record: FlowRecord) -> tuple[Array, ...]:
    if not record.fitted or len(record.context_layers) != 1 or not isinstance(affine := record.context_layers[0], Affine):
        return ()
    most = np.finfo(np.float64).max
    with np.errstate(over="ignore"):
        reach = _arrays.FAR / np.abs(affine.scale)
        return np.clip(affine.loc - reach, -most, most), np.clip(affine.loc + reach, -most, most)


def width_of(name: str, layer: Any) -> int:
    """Number of columns that a layer works on."""
    if isinstance(layer, Elementwise):
        return len(layer.kinds)
    if isinstance(layer, Affine):
        return layer.loc.size
    if isinstance(layer, BatchNorm):
        return layer.beta.size
    if isinstance(layer, Permutation):
        return layer.perm.size
    if isinstance(layer, Linear):
        return layer.bias.size
    if isinstance(layer, Autoregressive):
        return layer.ranks.size
    raise ValueError(f"{name} is of type {type(layer).__name__}, which is no layer")


def _check_width(name: str, width: int, expected: int, what: str) -> None:
    if width != expected:
        raise ValueError(f"{name} has width {width}; the flow has {expected} {what}")


def _check_left(name: str, layer: _layers.FlowLayer, base: Terminal, names: Sequence[str] | None) -> None:
    """Discrete variables reach the base as they are, and no other variable depends on them in front of it."""
    discrete = np.array(base.values) > 0
    if isinstance(layer, Elementwise):
        wrong = discrete & [kind != "identity" for kind in layer.kinds]
    elif isinstance(layer, Affine):
        wrong = discrete & ((layer.loc != 0) | (layer.scale != 1))
    else:
        wrong = discrete
    if wrong.any():
        where = _words.columns(np.flatnonzero(wrong), names)
        raise ValueError(f"{name} changes {where}, whose variables are discrete: a base of those takes their values as they are")


def _check_conditioner(name: str, conditioner: Conditioner, context_features: int) -> None:
    for dense in (*conditioner.hidden, conditioner.final):
        if not dense.bias.size:
            raise ValueError(f"{name} has a hidden layer without units")
        if dense.context_weight is not None:
            _check_width(f"the context of {name}", dense.context_weight.shape[1], context_features, "context features")


def _chain(name: str, layers: Any) -> tuple[Any, ...]:
    if not np.iterable(layers):
        raise ValueError(f"{name} is {_words.shown(layers)}; it must be a sequence of layers")
    return tuple(layers)


def _training(training: Any) -> dict[str, Any]:
    if training is not None and not isinstance(training, Mapping):
        raise ValueError(f"training is {_words.shown(training)}; it must be a mapping")
    return cast("dict[str, Any]", plain(dict(training or {})))


DEEPEST = 63
"""Lists and mappings within each other in `training`; files hold no more."""


def plain(value: Any, room: int = DEEPEST) -> Any:
    """The value in types that JSON knows; numbers that are not finite, or beyond float64, become None."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _unicode(value)
    if isinstance(value, int):
        return value if abs(value) < 2**1023 else None
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, (np.bool_, np.integer)):
        return value.item()
    if isinstance(value, (Mapping, list, tuple, np.ndarray)) and not room:
        raise ValueError(f"training holds lists or mappings more than {DEEPEST} deep")
    if isinstance(value, Mapping):
        return {_unicode(str(key)): plain(item, room - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item, room - 1) for item in value]
    raise ValueError(f"training holds a value of type {type(value).__name__}; it must hold numbers, text, lists and mappings")


def _unicode(text: str) -> str:
    """The text without halves of surrogate pairs (names of files may hold them), which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()


def trainable(record: Any) -> Iterator[Array]:
    """The arrays of a layer, base or network that training changes, in the order of `Flow.parameters`."""
    if isinstance(record, BatchNorm):
        yield from (record.log_gamma, record.beta)
    elif isinstance(record, Linear):
        yield from (np.tril(record.lower, -1), np.triu(record.upper), record.bias)
    elif isinstance(record, (Autoregressive, Terminal)):
        yield from trainable(record.conditioner)
    elif isinstance(record, Conditioner):
        for dense in (*record.hidden, record.final):
            for array in (dense.weight, dense.bias, dense.context_weight, dense.context_bias):
                if array is not None:
                    yield array
        if record.skip is not None:
            yield record.skip


def _anew(record: Any, rng: np.random.Generator) -> Any:
    """The layer or base with the weights of a new one, drawn from `rng`, and without anything that comes from data."""
    zero = np.zeros(0 if isinstance(record, Normal) else record.features if isinstance(record, Terminal) else width_of("", record))
    if isinstance(record, Affine):
        return Affine(zero, zero + 1)
    if isinstance(record, BatchNorm):
        return replace(record, log_gamma=zero, beta=zero, mean=zero, var=zero + 1)
    if isinstance(record, Linear):
        return Linear(np.eye(zero.size), np.eye(zero.size), zero)
    if isinstance(record, (Autoregressive, Terminal)):
        net = _networks.redrawn(record, record.conditioner, rng)
        return replace(record, conditioner=_networks.masked(net, record.ranks, _networks.counts_of(record)))
    return record


def _refill(record: Any, take: Callable[[Array | None], Any]) -> Any:
    """The layer or base with its arrays replaced by what `take` gives for each, in the order of `Flow.parameters`."""

    def refill(dense: Dense) -> Dense:
        weight, bias = take(dense.weight), take(dense.bias)
        return replace(dense, weight=weight, bias=bias, context_weight=take(dense.context_weight), context_bias=take(dense.context_bias))

    if isinstance(record, BatchNorm):
        return replace(record, log_gamma=take(record.log_gamma), beta=take(record.beta))
    if isinstance(record, Linear):
        lower, upper, bias = (take(array) for array in trainable(record))
        lower, upper = np.tril(lower, -1) + np.triu(record.lower), np.triu(upper) + np.tril(record.upper, -1)
        return replace(record, lower=lower, upper=upper, bias=bias)
    if not isinstance(record, (Autoregressive, Terminal)):
        return record
    old = record.conditioner
    initial = None if old.initial is None else refill(old.initial)
    blocks = tuple(replace(block, maps=tuple(map(refill, block.maps))) for block in old.blocks)
    return replace(record, conditioner=replace(old, initial=initial, blocks=blocks, final=refill(old.final), skip=take(old.skip)))
