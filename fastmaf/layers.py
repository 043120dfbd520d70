"""The layer record: what a flow is, as data.

A flow is ``context_layers`` (elementwise, applied to the context), ``layers`` read from data to noise, and a ``base``.  The classes here
hold read-only arrays and compute nothing: they are what is saved, what importers produce and what packing consumes.  What each
of them means is defined, operation by operation, in ``fastmaf.backends.reference``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastmaf import _words

__all__ = [
    "ACTIVATIONS",
    "CONDITIONALS",
    "CONTEXT_MODES",
    "LAWS",
    "Affine",
    "Autoregressive",
    "BatchNorm",
    "Block",
    "Conditioner",
    "Dense",
    "Elementwise",
    "FlowLayer",
    "Law",
    "Linear",
    "Normal",
    "Permutation",
    "Terminal",
]

Array = NDArray[Any]

ACTIVATIONS = ("relu", "tanh", "elu", "gelu", "silu")
"""Activations of the hidden units; gelu is the exact one, x Phi(x)."""

ELEMENTWISE = ("identity", "logit", "log_above", "log_below")

BLOCKS = ("plain", "linear", "residual", "linear_residual")

CONTEXT_MODES = ("none", "added", "activated", "gated")
"""How a context enters a Dense: W_c c + b_c added; passed through the activation and added; or as a factor sigmoid(W_c c + b_c)."""

LAWS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "exp": MappingProxyType({}),
        "exp_soft": MappingProxyType({"clip": math.log(1000.0)}),
        "softplus": MappingProxyType({"eps": 1e-3}),
        "sigmoid": MappingProxyType({"eps": 1e-3, "shift": 2.0}),
        "log_precision": MappingProxyType({}),
        "clamp": MappingProxyType({"low": -5.0, "high": 3.0}),
    }
)
"""Scale laws and their constants with defaults."""

CONDITIONALS = ("mixture", "bernoulli", "categorical", "mixed")

STATISTICS = ("batch", "data")


def _frozen(name: str, value: ArrayLike, ndim: int, kind: str = "f") -> Array:
    """A read-only C-ordered copy of `value`; floats keep float32 or become float64."""
    try:
        array = np.array(value, order="C")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} is {_words.shown(value)}, which is no array of numbers") from None
    if kind == "i":
        if array.dtype.kind not in "iu" and array.size:
            raise ValueError(f"{name} has dtype {_words.cut(str(array.dtype))}; it must hold integers")
        array = array.astype(np.int64)
    elif array.dtype != np.float32:
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{name} has dtype {_words.cut(str(array.dtype))}; it must hold real numbers")
        array = array.astype(np.float64)
    if array.ndim != ndim:
        raise ValueError(f"{name} has shape {_words.shapes(array.shape)}; it must have {ndim} dimension{'s' * (ndim != 1)}")
    array.flags.writeable = False
    return array


def _expect(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; expected {shape}")


def _sequence(name: str, value: Any, kind: type) -> tuple[Any, ...]:
    if not np.iterable(value) or isinstance(value, (str, bytes, Mapping)):
        raise ValueError(f"{name} is {_words.shown(value)}; it must be a sequence")
    items = tuple(value)
    for k, item in enumerate(items):
        _words.of_type(f"{name}[{k}]", item, kind)
    return items


def _one_of(name: str, value: str, allowed: Any) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(_words.one_of(name, value, allowed))


class _Record:
    """Mix-in: assign to a frozen dataclass inside ``__post_init__``; compare by content."""

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))  # type: ignore[arg-type]

    __hash__ = None  # type: ignore[assignment]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


@dataclass(frozen=True, eq=False)
class Elementwise(_Record):
    """A fixed bijection per column, from a bounded range to the real line.

    Parameters
    ----------
    kinds : tuple of str, length n
        ``"identity"``; ``"logit"`` on (lower, upper): z = log((x - lower) / (upper - x)); ``"log_above"``: z = log(x - lower);
        ``"log_below"``: z = -log(upper - x).
    lower, upper : (n,) arrays, float64
        The bounds; infinite where the kind does not use them.

    Examples
    --------
    >>> Elementwise.from_bounds([(0, 1), None, (0, None)]).kinds
    ('logit', 'identity', 'log_above')
    """

    kinds: tuple[str, ...]
    lower: Array
    upper: Array

    def __post_init__(self) -> None:
        if not isinstance(self.kinds, (tuple, list)):
            raise ValueError(f"kinds is {_words.shown(self.kinds)}; it must be a sequence of str")
        kinds = tuple(self.kinds)
        lower = _frozen("lower", self.lower, 1).astype(np.float64)
        upper = _frozen("upper", self.upper, 1).astype(np.float64)
        _expect("lower", lower, (len(kinds),))
        _expect("upper", upper, (len(kinds),))
        for j, kind in enumerate(kinds):
            _one_of(f"kinds[{j}]", kind, ELEMENTWISE)
            below = kind in ("logit", "log_above")
            above = kind in ("logit", "log_below")
            bad = math.isnan(lower[j]) or math.isnan(upper[j])
            bad = bad or (below and not math.isfinite(lower[j])) or (above and not math.isfinite(upper[j]))
            if bad or (kind == "logit" and not (lower[j] < upper[j] and math.isfinite(float(upper[j]) - float(lower[j])))):
                raise ValueError(f"column {j} has bounds ({lower[j]}, {upper[j]}), which do not fit {kind!r}")
        lower.flags.writeable = upper.flags.writeable = False
        self._set(kinds=kinds, lower=lower, upper=upper)

    def inner_range(self, dtype: np.dtype[Any]) -> tuple[Array, Array]:
        """The least and the greatest number of a dtype strictly inside the bounds of each column, infinite for one without bounds.

        Examples
        --------
        >>> low, high = Elementwise.from_bounds([(0, 1), (2, None)]).inner_range(np.dtype("float32"))
        >>> bool((low > [0, 2]).all()), float(high[0]) < 1, bool(np.isfinite(high[1]))
        (True, True, True)
        """
        kinds = np.array(self.kinds)
        most = np.where(kinds == "identity", np.inf, np.finfo(dtype).max).astype(dtype)
        with np.errstate(over="ignore", under="ignore"):
            low, high = self.lower.astype(dtype), self.upper.astype(dtype)
            low = np.where(low > self.lower, low, np.nextafter(low, np.inf, dtype=dtype))
            high = np.where(high < self.upper, high, np.nextafter(high, -np.inf, dtype=dtype))
        low = np.where(np.isin(kinds, ("logit", "log_above")), low, -most)
        return low.astype(dtype), np.where(np.isin(kinds, ("logit", "log_below")), high, most).astype(dtype)

    def check_range(self, dtype: np.dtype[Any], names: Sequence[str] | None = None) -> None:
        """Refuse bounds between which a dtype has no number.

        Raises
        ------
        ValueError
            With the name or the number of the first such column.

        Examples
        --------
        >>> Elementwise.from_bounds([(1, 1 + 1e-9)]).check_range(np.dtype("float64"))
        """
        low, high = self.inner_range(dtype)
        for j in np.flatnonzero(~(low <= high) | np.isposinf(low) | np.isneginf(high))[:1]:
            column = f"column {j}" if names is None else f"column {names[j]!r}"
            wider = " or take dtype='float64'" if dtype == np.float32 else ""
            bounds = f"({self.lower[j]}, {self.upper[j]})"
            raise ValueError(f"{column} has bounds {bounds}, between which {dtype} has no number; widen them{wider}")

    @classmethod
    def from_bounds(cls, bounds: Any, names: Sequence[str] | None = None, name: str = "bounds") -> Elementwise:
        """From one entry per column: ``None``, or a pair (lower, upper) in which either may be ``None`` or infinite; names for messages."""
        kinds, lower, upper = [], [], []
        for j, bound in enumerate(bounds):
            where = f"{name}[{j if names is None else _words.shown(names[j])}]"
            try:
                low, high = (None, None) if bound is None else bound
                low = -math.inf if low is None else _words.number(where, low)
                high = math.inf if high is None else _words.number(where, high)
            except (TypeError, ValueError, OverflowError):
                raise ValueError(f"{where} is {_words.shown(bound)}; it must be None or a pair (lower, upper)") from None
            kind = ("identity", "log_above", "log_below", "logit")[(low > -math.inf) + 2 * (high < math.inf)]
            if not low < high:
                raise ValueError(
                    f"{_words.columns([j], names)} has bounds ({low}, {high}); the lower one must be below the upper one, both numbers"
                )
            kinds.append(kind)
            lower.append(low)
            upper.append(high)
        return cls(tuple(kinds), np.array(lower), np.array(upper))


@dataclass(frozen=True, eq=False)
class Affine(_Record):
    """z = (x - loc) * scale, column by column: standardisation, act-norm, frozen batch norm.

    Parameters
    ----------
    loc, scale : (n,) arrays
        Kept in float64 whatever the dtype of the flow. Scales are positive or negative, never zero.

    Examples
    --------
    >>> Affine([1.0, 2.0], [0.5, 4.0]).scale.tolist()
    [0.5, 4.0]
    """

    loc: Array
    scale: Array

    def __post_init__(self) -> None:
        loc = _frozen("loc", self.loc, 1).astype(np.float64)
        scale = _frozen("scale", self.scale, 1).astype(np.float64)
        _expect("scale", scale, loc.shape)
        for name, array in (("loc", loc), ("scale", scale)):
            wrong = ~np.isfinite(array) | ((array == 0) if name == "scale" else False)
            if wrong.any():
                j = int(np.argmax(wrong))
                raise ValueError(f"{name}[{j}] is {array[j]}; it must be finite" + (" and not zero" if name == "scale" else ""))
        loc.flags.writeable = scale.flags.writeable = False
        self._set(loc=loc, scale=scale)


@dataclass(frozen=True, eq=False)
class BatchNorm(_Record):
    """The batch norm of Papamakarios et al. 2017, section 3.3: z = exp(log_gamma) (x - mean) / sqrt(var + eps) + beta.

    Parameters
    ----------
    log_gamma, beta, mean, var : (n,) arrays
        `mean` and `var` are those of evaluation.
    eps : float
    statistics : {"batch", "data"}
        What training normalises with: ``"batch"``, mean and biased variance of each minibatch, and afterwards those of all training rows;
        ``"data"``, those of the training rows at the start of the first fit, fixed from then on (the act-norm of Kingma and Dhariwal 2018).
    """

    log_gamma: Array
    beta: Array
    mean: Array
    var: Array
    eps: float = 1e-5
    statistics: str = "batch"

    def __post_init__(self) -> None:
        arrays = {name: _frozen(name, getattr(self, name), 1) for name in ("log_gamma", "beta", "mean", "var")}
        eps = _words.number("eps", self.eps)
        for name, array in arrays.items():
            _expect(name, array, arrays["log_gamma"].shape)
        wrong = ~(arrays["var"].astype(np.float64) + eps > 0)
        if wrong.any():
            j = int(np.argmax(wrong))
            raise ValueError(f"var[{j}] is {arrays['var'][j]} and eps {eps}; their sum must be positive")
        _one_of("statistics", self.statistics, STATISTICS)
        self._set(**arrays, eps=eps)


@dataclass(frozen=True, eq=False)
class Permutation(_Record):
    """z = x[:, perm].

    Parameters
    ----------
    perm : (n,) array of int
    """

    perm: Array

    def __post_init__(self) -> None:
        perm = _frozen("perm", self.perm, 1, "i")
        if not np.array_equal(np.sort(perm), np.arange(perm.size)):
            raise ValueError(f"perm {_words.shown(perm.tolist())} is not a permutation of 0..{perm.size - 1}{_words.astray(perm)}")
        self._set(perm=perm)


@dataclass(frozen=True, eq=False)
class Linear(_Record):
    """z = (L U) x + bias, L unit lower and U upper triangular.

    Parameters
    ----------
    lower : (n, n) array
        Its strictly lower triangle is L; the rest is ignored.
    upper : (n, n) array
        Its upper triangle, the diagonal included, is U; the rest is ignored.
    bias : (n,) array
    """

    lower: Array
    upper: Array
    bias: Array

    def __post_init__(self) -> None:
        bias = _frozen("bias", self.bias, 1)
        lower, upper = _frozen("lower", self.lower, 2), _frozen("upper", self.upper, 2)
        _expect("lower", lower, (bias.size, bias.size))
        _expect("upper", upper, (bias.size, bias.size))
        if not np.diagonal(upper).all():
            raise ValueError(f"upper has a zero in row {int(np.argmin(np.diagonal(upper) != 0))} of its diagonal")
        self._set(lower=lower, upper=upper, bias=bias)


@dataclass(frozen=True, eq=False)
class Law(_Record):
    """How the parameters of one variable, a shift m and a raw log-scale r, act on it.

    ``form="standardize"`` is z = (x - m) / s, ``form="affine"`` is z = s x + m, with the scale s by `kind`:

    - ``exp``: s = e^r
    - ``exp_soft``: s = e^a, a = r / (1 + abs(r) / clip), so that abs(a) < clip
    - ``softplus``: s = log(1 + e^r) + eps
    - ``sigmoid``: s = 1 / (1 + e^-(r + shift)) + eps
    - ``log_precision``: s = e^(-r / 2) when standardising, e^(r / 2) otherwise (r is the log of the inverse variance)
    - ``clamp``: s = e^min(max(r, low), high)

    Parameters
    ----------
    kind : str
        A key of `LAWS`.
    form : {"standardize", "affine"}
    constants : mapping of str to float
        Overrides of the constants in `LAWS`.

    Examples
    --------
    >>> Law("softplus", constants={"eps": 0.01}).constants["eps"]
    0.01
    """

    kind: str = "exp_soft"
    form: str = "standardize"
    constants: Mapping[str, float] = field(default_factory=dict)

    parameters = 2
    """P: shift in row i * P, raw log-scale in row i * P + 1."""

    def __post_init__(self) -> None:
        _one_of("law", self.kind, LAWS)
        _one_of("form", self.form, ("standardize", "affine"))
        if not isinstance(self.constants, Mapping):
            raise ValueError(f"constants is {_words.shown(self.constants)}; it must be a mapping of names to numbers")
        unknown = set(self.constants) - set(LAWS[self.kind])
        if unknown:
            raise ValueError(f"law {self.kind!r} has no constant {_words.shown(min(unknown, key=str))}")
        constants = {name: _words.number(name, self.constants.get(name, default)) for name, default in LAWS[self.kind].items()}
        for name, value in constants.items():
            if not math.isfinite(value) or (name in ("clip", "eps") and value <= 0):
                raise ValueError(f"constant {name!r} of law {self.kind!r} is {value}")
        if self.kind == "clamp" and not constants["low"] < constants["high"]:
            raise ValueError(f"law 'clamp' has low {constants['low']} and high {constants['high']}")
        self._set(constants=MappingProxyType(constants))

    def __reduce__(self) -> Any:
        return Law, (self.kind, self.form, dict(self.constants))


@dataclass(frozen=True, eq=False)
class Dense(_Record):
    """One masked linear map, y = W h + b, with the units in any order.

    Parameters
    ----------
    weight : (n, m) array
        Masked entries are zero.
    bias : (n,) array
    degrees : (n,) array of int or None
        Degrees of the outputs, in the sense of `fastmaf.masks`; None in a final layer, where the ranks say it.
    context : {"none", "added", "activated", "gated"}
        How the context enters here, see `CONTEXT_MODES`.
    context_weight : (n, C) array or None
    context_bias : (n,) array or None
    norm_scale, norm_shift : (m,) arrays or None
        A frozen inner batch norm: h * norm_scale + norm_shift is taken before the activation in front of this map. Both or neither.
    """

    weight: Array
    bias: Array
    degrees: Array | None = None
    context: str = "none"
    context_weight: Array | None = None
    context_bias: Array | None = None
    norm_scale: Array | None = None
    norm_shift: Array | None = None

    def __post_init__(self) -> None:
        weight, bias = _frozen("weight", self.weight, 2), _frozen("bias", self.bias, 1)
        _expect("bias", bias, weight.shape[:1])
        _one_of("context", self.context, CONTEXT_MODES)
        values: dict[str, Any] = {"weight": weight, "bias": bias}
        if self.degrees is not None:
            values["degrees"] = _frozen("degrees", self.degrees, 1, "i")
            _expect("degrees", values["degrees"], bias.shape)
        if (self.context == "none") != (self.context_weight is None):
            raise ValueError(f"context is {self.context!r}, but context_weight is {'absent' if self.context_weight is None else 'given'}")
        if self.context == "none" and self.context_bias is not None:
            raise ValueError("context is 'none', but context_bias is given")
        if (self.norm_scale is None) != (self.norm_shift is None):
            raise ValueError(f"norm_{'shift' if self.norm_shift is None else 'scale'} is missing")
        if self.context_weight is not None:
            values["context_weight"] = _frozen("context_weight", self.context_weight, 2)
            _expect("context_weight", values["context_weight"], (bias.size, values["context_weight"].shape[1]))
        for name, shape in (("context_bias", bias.shape), ("norm_scale", weight.shape[1:]), ("norm_shift", weight.shape[1:])):
            if getattr(self, name) is not None:
                values[name] = _frozen(name, getattr(self, name), 1)
                _expect(name, values[name], shape)
        self._set(**values)


@dataclass(frozen=True, eq=False)
class Block(_Record):
    """A stage between the first and the last map of a conditioner.

    Parameters
    ----------
    kind : {"plain", "linear", "residual", "linear_residual"}
        ``plain``: act, one map. ``residual``: h + map2(act(map1(act(h)))), as in nflows. ``linear`` and ``linear_residual``: without the
        first activation, as in the residual networks of zuko.
    maps : tuple of Dense
        One, or two for a residual block.
    """

    kind: str
    maps: tuple[Dense, ...]

    def __post_init__(self) -> None:
        _one_of("block", self.kind, BLOCKS)
        maps = _sequence("maps", self.maps, Dense)
        if len(maps) != 1 + self.residual:
            raise ValueError(f"a {self.kind} block has {len(maps)} maps")
        if self.residual and maps[1].weight.shape[0] != maps[0].weight.shape[1]:
            raise ValueError(f"a residual block maps {maps[0].weight.shape[1]} units to {maps[1].weight.shape[0]}")
        self._set(maps=maps)

    @property
    def residual(self) -> bool:
        """Whether the units of the block are added to those in front of it."""
        return self.kind in ("residual", "linear_residual")


@dataclass(frozen=True, eq=False)
class Conditioner(_Record):
    """The masked network that gives each variable its parameters.

    initial map, blocks, activation, final map; without `initial` there are no hidden units and the final map reads the variables.
    A plain block begins with the activation of what came before, so initial -> plain -> plain -> final has three hidden layers.
    The last units of a residual block have at least the degrees of those that they are added to.

    Parameters
    ----------
    initial : Dense or None
    blocks : tuple of Block
    final : Dense
        Rows ``i * P + p``.
    activation : str
    final_activation : bool
        Whether the activation stands in front of the final map (not so in a residual network of nflows or zuko, and never without
        hidden units).
    skip : (D * P, D) array or None
        Direct weights from variables to parameters.
    input_clip : float or None
        Variables beyond +-input_clip are read as +-input_clip, by the first map and by the direct weights: out there the network is
        constant instead of going on as straight lines. The law has the variables as they are. None reads them all as they are.
    """

    initial: Dense | None
    blocks: tuple[Block, ...]
    final: Dense
    activation: str = "relu"
    final_activation: bool = True
    skip: Array | None = None
    input_clip: float | None = None

    def __post_init__(self) -> None:
        _one_of("activation", self.activation, ACTIVATIONS)
        blocks = _sequence("blocks", self.blocks, Block)
        if self.initial is not None:
            _words.of_type("initial", self.initial, Dense)
        _words.of_type("final", self.final, Dense)
        if self.initial is None and blocks:
            raise ValueError("a conditioner with blocks needs an initial map")
        chain = ([] if self.initial is None else [self.initial]) + [m for b in blocks for m in b.maps]
        for number, dense in enumerate(chain):
            if dense.degrees is None:
                raise ValueError(f"hidden map {number} has no degrees")
            if number and dense.weight.shape[1] != chain[number - 1].weight.shape[0]:
                raise ValueError(f"hidden map {number} reads {dense.weight.shape[1]} units of {chain[number - 1].weight.shape[0]}")
        if chain and self.final.weight.shape[1] != chain[-1].weight.shape[0]:
            raise ValueError(f"the final map reads {self.final.weight.shape[1]} units of {chain[-1].weight.shape[0]}")
        values: dict[str, Any] = {"blocks": blocks, "final_activation": _words.flag("final_activation", self.final_activation)}
        if self.skip is not None:
            values["skip"] = _frozen("skip", self.skip, 2)
        values["input_clip"] = checked_input_clip(self.input_clip)
        self._set(**values)

    @property
    def hidden(self) -> tuple[Dense, ...]:
        """All maps but the final one, in order."""
        return (() if self.initial is None else (self.initial,)) + tuple(m for block in self.blocks for m in block.maps)


def checked_input_clip(value: Any) -> float | None:
    """A positive number, or None."""
    if value is None:
        return None
    number = _words.number("input_clip", value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"input_clip is {_words.shown(value)}; it must be a positive number or None")
    return number


def _check_made(ranks: Array, conditioner: Conditioner, rows: tuple[int, ...]) -> None:
    """The widths fit, and every non-zero weight lies inside the staircase of its degrees; `rows` of the final map for each variable."""
    _words.of_type("conditioner", conditioner, Conditioner)
    features = ranks.size
    if features == 0 or ranks.min() < 1:
        raise ValueError(f"ranks {_words.shown(ranks.tolist())} must be positive, one per variable")
    first = conditioner.initial or conditioner.final
    if first.weight.shape[1] != features:
        raise ValueError(f"the first map reads {first.weight.shape[1]} variables; there are {features} ranks")
    if conditioner.final.weight.shape[0] != sum(rows):
        raise ValueError(f"the final map has {conditioner.final.weight.shape[0]} rows; {features} variables need {sum(rows)}")
    inputs = ranks
    for number, dense in enumerate(conditioner.hidden):
        assert dense.degrees is not None
        _inside(f"hidden map {number}", dense.weight, dense.degrees[:, None] >= inputs[None, :])
        inputs = dense.degrees
    before = None if conditioner.initial is None else conditioner.initial.degrees
    for number, block in enumerate(conditioner.blocks):
        after = block.maps[-1].degrees
        if block.residual and (after < before).any():  # type: ignore[operator]
            raise ValueError(f"block {number} adds units to others of higher degree")
        before = after
    outputs = np.repeat(ranks, rows)[:, None]
    _inside("the final map", conditioner.final.weight, outputs > inputs[None, :])
    if conditioner.skip is not None:
        _expect("skip", conditioner.skip, (sum(rows), features))
        _inside("skip", conditioner.skip, outputs > ranks[None, :])


def _inside(name: str, weight: Array, allowed: Array) -> None:
    outside = (weight != 0) & ~allowed
    if outside.any():
        row, column = (int(v) for v in np.argwhere(outside)[0])
        raise ValueError(f"{name} has a weight at ({row}, {column}) that its degrees forbid")


@dataclass(frozen=True, eq=False)
class Autoregressive(_Record):
    """A conditioner network and the law that its outputs feed: one MADE of a flow.

    Parameters
    ----------
    ranks : (D,) array of int
        Place of each column in the order, from 1; columns may share a rank.
    conditioner : Conditioner
    law : Law
    direction : {"data", "noise"}
        The side that the network reads: ``"data"`` is MAF, ``"noise"`` is IAF.
    """

    ranks: Array
    conditioner: Conditioner
    law: Law = field(default_factory=Law)
    direction: str = "data"

    def __post_init__(self) -> None:
        ranks = _frozen("ranks", self.ranks, 1, "i")
        _one_of("direction", self.direction, ("data", "noise"))
        _words.of_type("law", self.law, Law)
        _check_made(ranks, self.conditioner, (self.law.parameters,) * ranks.size)
        self._set(ranks=ranks)


@dataclass(frozen=True, eq=False)
class Normal(_Record):
    """The standard normal base.

    Parameters
    ----------
    features : int
    """

    features: int

    def __post_init__(self) -> None:
        self._set(features=_words.count("features", self.features, 1))


@dataclass(frozen=True, eq=False)
class Terminal(_Record):
    """A MADE as the base: the density of the last variables themselves instead of a map to noise.

    Parameters
    ----------
    ranks : (D,) array of int
    conditioner : Conditioner
    conditional : {"mixture", "bernoulli", "categorical", "mixed"}
        Rows per variable: ``3 * components`` (weight logits, means, raw log-scales, each of length `components`), 1 logit, or
        ``categories[i]`` logits. Variables that are mixed have those of a mixture or of a categorical one.
    components : int
        Of a mixture of Gaussians.
    categories : tuple of int
        Number of values, 0, 1, ..., of each categorical variable; 0 for one of mixed variables that may have any number.
    constants : mapping of str to float
        Overrides of the constants of the law.
    law : str
        The scale law of the mixture, a key of `LAWS`, in the form "standardize".
    """

    ranks: Array
    conditioner: Conditioner
    conditional: str
    components: int = 1
    categories: tuple[int, ...] = ()
    constants: Mapping[str, float] = field(default_factory=dict)
    law: str = "exp_soft"

    def __post_init__(self) -> None:
        ranks = _frozen("ranks", self.ranks, 1, "i")
        _one_of("conditional", self.conditional, CONDITIONALS)
        components = _words.count("components", self.components, 1)
        counted, least = self.conditional in ("categorical", "mixed"), {"categorical": 2, "mixed": 0}.get(self.conditional, -(2**63))
        categories = tuple(_words.count("categories", count, least) for count in _sequence("categories", self.categories, object))
        if counted and len(categories) != ranks.size:
            raise ValueError(f"categories has {len(categories)} entries; there are {ranks.size} ranks")
        if counted and 1 in categories:
            raise ValueError("categories is 1; it must be at least 2, or 0 for any number")
        if not counted:
            categories = ()
        self._set(ranks=ranks, components=components, categories=categories, constants=Law(self.law, constants=self.constants).constants)
        _check_made(ranks, self.conditioner, self.rows)

    @property
    def features(self) -> int:
        """Number of variables D."""
        return int(self.ranks.size)

    @property
    def rows(self) -> tuple[int, ...]:
        """Number of rows of the final map for each variable."""
        return rows_of(self.conditional, self.components, self.values)

    @property
    def values(self) -> tuple[int, ...]:
        """How many values each variable has; 0 for any number."""
        return values_of(self.conditional, self.categories, self.features)

    def __reduce__(self) -> Any:
        arguments = (self.ranks, self.conditioner, self.conditional, self.components, self.categories, dict(self.constants), self.law)
        return Terminal, arguments


def values_of(conditional: str, categories: tuple[int, ...], features: int) -> tuple[int, ...]:
    """How many values each variable of a base has; 0 for any number.

    Examples
    --------
    >>> values_of("mixed", (0, 3), 2), values_of("mixture", (), 2)
    ((0, 3), (0, 0))
    """
    return categories or (2 if conditional == "bernoulli" else 0,) * features


def rows_of(conditional: str, components: int, values: Sequence[int]) -> tuple[int, ...]:
    """Rows of the final map of a base for variables with so many values, 0 for any number.

    Examples
    --------
    >>> rows_of("mixed", 10, (0, 3)), rows_of("bernoulli", 1, (2, 2))
    ((30, 3), (1, 1))
    """
    return tuple((1 if conditional == "bernoulli" else count) if count else 3 * components for count in values)


FlowLayer = Elementwise | Affine | BatchNorm | Permutation | Linear | Autoregressive


def astype(record: Any, dtype: Any) -> Any:
    """A layer whose network weights have `dtype`, itself if they have it; Elementwise and Affine stay float64."""
    if isinstance(record, (Elementwise, Affine)):
        return record
    if isinstance(record, tuple):
        changed = tuple(astype(item, dtype) for item in record)
        return record if all(map(operator.is_, changed, record)) else changed
    if not isinstance(record, _Record):
        return record
    changes: dict[str, Any] = {}
    for f in fields(record):  # type: ignore[arg-type]
        value = getattr(record, f.name)
        other = value
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            other = value.astype(dtype, copy=False)
        elif isinstance(value, (_Record, tuple)):
            other = astype(value, dtype)
        if other is not value:
            changes[f.name] = other
    return replace(record, **changes) if changes else record  # type: ignore[type-var]
