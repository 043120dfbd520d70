"""Flows whose densities are averaged."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, Concatenate, NoReturn, ParamSpec, TypeVar, cast, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastmaf import _arrays, _codec, _dask, _device, _files, _random, _tables, _within, _words, backends
from fastmaf import layers as _layers
from fastmaf.flow import Flow, _check_continuous, _framed, _here
from fastmaf.layers import Terminal

if TYPE_CHECKING:
    import os

    from fastmaf._arrays import Seed
    from fastmaf.train import History

__all__ = ["Ensemble", "parameters_of"]

Array = NDArray[Any]


P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", bound="Ensemble")


def parameters_of(function: Callable[..., Any]) -> str:
    """The parameters in the docstring of a function, but for the line above them."""
    text = inspect.cleandoc(function.__doc__ or "").partition("Parameters\n----------\n")[2].partition("\n\nReturns")[0]
    return text.replace("\n", "\n" + " " * 8)


def _with_parameters_of(
    other: Callable[Concatenate[Any, P], Any],
) -> Callable[[Callable[Concatenate[Any, ...], R]], Callable[Concatenate[Any, P], R]]:
    """The parameters of another method, which stand for ``{parameters}`` in the docstring; the result stays."""

    def changed(method: Callable[Concatenate[Any, ...], R]) -> Callable[Concatenate[Any, P], R]:
        returned = inspect.signature(method).return_annotation
        method.__signature__ = inspect.signature(other).replace(return_annotation=returned)  # type: ignore[attr-defined]
        method.__doc__ = (method.__doc__ or "").replace("{parameters}", parameters_of(other))
        return cast("Callable[Concatenate[Any, P], R]", method)

    return changed


class Ensemble:
    """Independent flows whose densities are averaged (Lakshminarayanan et al. 2017).

    Flows that differ in nothing but the weights they began with err in different places. The mean of their densities is nearer to the
    truth than each of them, and above all it is wider where they disagree: posteriors of one conditional flow are often overconfident.

    Parameters
    ----------
    flows : Flow or sequence of Flow
        The members, of which copies are kept; of the same features, context features, dtype and names. Or one flow, as which
        `members` new ones are made: with its layers, orders and bounds, and other weights.
    members : int, optional
        How many to make of one flow.
    seed : int, numpy.random.Generator or SeedSequence, optional
        Of the weights of these; None draws one. Member k is the same in an ensemble of any size.

    Attributes
    ----------
    features, context_features : int
    layers, context_layers : tuple
        Those of the first member.
    base : Normal or Terminal
        That of the first member.
    dtype : numpy.dtype
    names : tuple of str or None
    training : dict
        That of the first member.

    Raises
    ------
    ValueError
        If the flows do not fit together, or there are none.

    Examples
    --------
    >>> import fastmaf, numpy as np
    >>> ensemble = fastmaf.Ensemble(fastmaf.MAF(features=3), members=5, seed=0)
    >>> x = np.zeros((1, 3))
    >>> members = [ensemble.member(k).log_prob(x)[0] for k in range(len(ensemble))]
    >>> np.allclose(np.exp(ensemble.log_prob(x)), np.exp(members).mean())
    True
    """

    def __init__(self, flows: Flow | Iterable[Flow], members: int | None = None, seed: Seed = None) -> None:
        if isinstance(flows, Flow):
            if members is None:
                raise ValueError("members is None; say how many to make of the flow, or give a sequence of flows")
            seeds = _seeds(seed, _arrays.count("members", members, lowest=1))
            flows = [flows._holding(flows.record.anew(own)) for own in seeds]
        elif members is not None or seed is not None:
            raise ValueError(f"{'seed' if members is None else 'members'} is given beside the members themselves; leave it out")
        self._all = _fitting(flows)

    def __len__(self) -> int:
        return len(self._flows())

    def __iter__(self) -> Iterator[Flow]:
        return iter([flow._still() for flow in self._flows()])

    def _flows(self) -> Sequence[Flow]:
        """The members as they are now."""
        return self._all

    def _member(self, k: int) -> Flow:
        return self._flows()[k]

    def member(self, k: int) -> Flow:
        """One of the flows whose densities are averaged.

        Parameters
        ----------
        k : int
            Below ``len(ensemble)``.

        Returns
        -------
        Flow
            A copy: to fit it leaves the ensemble as it is.

        Raises
        ------
        ValueError
            If there is no such member.

        Examples
        --------
        >>> import fastmaf
        >>> fastmaf.Ensemble(fastmaf.MAF(features=3, order="sequential"), members=4).member(3).order
        (0, 1, 2)
        """
        return self._member(_arrays.count("k", k, limit=len(self)))._still()

    def _still(self) -> Any:
        """As in `Flow`."""
        still = object.__new__(type(self))
        vars(still).update(vars(self))
        return still

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_") or not hasattr(Flow, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        own = "order", "to_noise", "from_noise", "conditional_probs"
        reason = ", since each member has an order and noise of its own" * (name in own)
        raise AttributeError(f"an ensemble has no {name}{reason}: ensemble.member(k).{name} is that of a member")

    @property
    def device(self) -> str:
        """Where the ensemble computes; `to` gives one on another device."""
        return self._flow.device

    @property
    def precision(self) -> str:
        """Of the matrix products of float32 densities on a GPU; see `Flow.to`."""
        return self._flow.precision

    @property
    def _flow(self) -> Flow:
        return self._member(0)

    @property
    def features(self) -> int:
        """Number of variables D."""
        return self._flow.features

    @property
    def context_features(self) -> int:
        """Number of variables C that the density is conditioned on."""
        return self._flow.context_features

    @property
    def layers(self) -> tuple[_layers.FlowLayer, ...]:
        """The layers of the first member."""
        return self._flow.layers

    @property
    def context_layers(self) -> tuple[_layers.Elementwise | _layers.Affine, ...]:
        """The layers that the context passes through first."""
        return self._flow.context_layers

    @property
    def base(self) -> _layers.Normal | Terminal:
        """The base of the first member."""
        return self._flow.base

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the arithmetic and of the results."""
        return self._flow.dtype

    @property
    def names(self) -> tuple[str, ...] | None:
        """One name for each variable."""
        return self._flow.names

    @property
    def training(self) -> dict[str, Any]:
        """How the first member came to its weights; each of `member` has its own."""
        return self._flow.training

    # Evaluation

    def log_prob(self, x: ArrayLike, context: ArrayLike | None = None, out: Array | None = None) -> Array:
        """Log of the mean density of the members, in nats.

        Parameters
        ----------
        x, context, out : arrays
            As in `Flow.log_prob`.

        Returns
        -------
        (n,) or (c, n) array

        Raises
        ------
        ValueError
            If a shape or dtype does not fit.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> fastmaf.Ensemble(fastmaf.MAF(features=3), members=4).log_prob(np.zeros((5, 3))).shape
        (5,)
        """
        given = x
        if _dask.among(x, context):
            if out is not None:
                raise ValueError("out is given, but x or context is an array of dask, of which only an array of dask comes; leave out out")
            return cast("Array", _dask.mapped(self._still(), "log_prob", "x", x, context, self.dtype, 0))
        x, context = self._near(x=x, context=context)
        x, context, shape = _arrays.rows("x", x, context, self.features, self.context_features, names=self.names)
        place = self._place(out, shape, self.dtype, x, context)
        total, members = np.full(shape, -np.inf), self._flows()
        with np.errstate(invalid="ignore"):
            for member in members:
                np.logaddexp(total, member.log_prob(x, context), out=total)
        total -= math.log(len(members))
        return self._delivered(total.astype(self.dtype, copy=False), given, out, place)

    def _near(self, **arrays: Any) -> list[Any]:
        """The arrays, those of the GPU copied to the host, where members are put together."""
        return [_arrays.fetched(name, value, self.device) for name, value in arrays.items()]

    def _place(self, out: Any, shape: tuple[int, ...], dtype: np.dtype[Any], *inputs: Array | None) -> Any:
        """`out`, checked; None if there is none."""
        if out is None:
            return None
        if self.device != "cpu" and _device.is_on_device("out", out):
            return _device.output(out, shape, dtype, self.device, _arrays.NATIVE, ())
        return _arrays.output(out, shape, dtype, *inputs)

    def _delivered(self, result: Array, given: Any, out: Array | None = None, place: Any = None) -> Array:
        """A result in its place, or where the array lies that came in."""
        if out is None:
            return _device.returned(result, given, self.device)
        if isinstance(place, _device.DeviceArray):
            place.fill(result)
        else:
            place[...] = result
        return out

    def log_prob_and_grad(self, x: ArrayLike, context: ArrayLike | None = None) -> tuple[Array, Array, Array | None]:
        """Log of the mean density of the members, and its gradients in x and in the context.

        Parameters
        ----------
        x, context : arrays
            As in `Flow.log_prob`.

        Returns
        -------
        value : (n,) or (c, n) array
        dx : array of the shape of x
        dcontext : array of the shape of the context, or None
            As in `Flow.log_prob_and_grad`.

        Raises
        ------
        ValueError
            If a shape or dtype does not fit; if variables are discrete.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> value, dx, _ = fastmaf.Ensemble(fastmaf.MAF(features=3), members=4).log_prob_and_grad(np.zeros((5, 3)))
        >>> value.shape, dx.shape
        ((5,), (5, 3))
        """
        _check_continuous(self._flow.record, "gradient in x")
        value, dx, dcontext, _ = self._backward(x, context, None, False)
        assert dx is not None
        return value, dx, dcontext

    def vjp(self, x: ArrayLike, context: ArrayLike | None, cotangent: ArrayLike) -> tuple[Array | None, Array | None, Array]:
        """Gradients of ``sum(cotangent * log_prob(x, context))``.

        Parameters
        ----------
        x, context, cotangent : arrays
            As in `Flow.vjp`.

        Returns
        -------
        dx, dcontext
            As in `Flow.vjp`.
        dparameters : (p,) array
            In the order of `parameters`.

        Raises
        ------
        ValueError
            If a shape or dtype does not fit.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> ensemble = fastmaf.Ensemble(fastmaf.MAF(features=3), members=2)
        >>> dx, _, dparameters = ensemble.vjp(np.zeros((5, 3)), None, np.ones(5))
        >>> dparameters.shape == ensemble.parameters().shape
        True
        """
        _, dx, dcontext, dparameters = self._backward(x, context, cotangent, True)
        assert dparameters is not None
        return dx, dcontext, dparameters

    def _backward(
        self, x: ArrayLike, context: ArrayLike | None, cotangent: ArrayLike | None, parameters: bool
    ) -> tuple[Array, Array | None, Array | None, Array | None]:
        """Log of the mean density and gradients, with or without those in the parameters; None is a cotangent of ones."""
        given, beside, flows = x, context, self._flows()
        x, context, cotangent = self._near(x=x, context=context, cotangent=cotangent)
        x, context = _arrays.real("x", x, names=self.names), None if context is None else _arrays.real("context", context)
        values = [flow.log_prob(x, context).astype(np.float64) for flow in flows]
        factor = 1.0 if cotangent is None else _arrays.cotangents(cotangent, values[0].shape)
        dx = None if self._flow.record.discrete else np.zeros(x.shape)
        dcontext = None if context is None else np.zeros(context.shape)
        of_parameters: list[Array] = []
        with np.errstate(all="ignore"):
            total = np.logaddexp.reduce(values)
            for flow, value in zip(flows, values, strict=True):
                share = np.where(total == -np.inf, 0.0, _exp(value - total))  # of the member in the density of the row
                _, *parts = flow._backward(*flow._ready(), x, context, factor * share, parameters)
                for whole, part in zip((dx, dcontext), parts, strict=False):
                    if whole is not None:
                        whole += part
                of_parameters.append(parts[2])
        result = (total - math.log(len(flows))).astype(self.dtype)
        dx, dcontext = (None if whole is None else whole.astype(self.dtype) for whole in (dx, dcontext))
        result, dx = self._delivered(result, given), None if dx is None else self._delivered(dx, given)
        dcontext = None if dcontext is None else self._delivered(dcontext, beside)
        return result, dx, dcontext, self._delivered(self._joined(of_parameters), given) if parameters else None

    @overload
    def sample(
        self,
        n: int,
        context: ArrayLike | None = None,
        seed: Seed = None,
        offset: int = 0,
        context_offset: int = 0,
        out: Array | None = None,
        dtype: DTypeLike | None = None,
        *,
        within: _within.Within | None = None,
        max_tries: int = 1000,
        as_frame: None = None,
    ) -> Array: ...
    @overload
    def sample(
        self,
        n: int,
        context: ArrayLike | None = None,
        seed: Seed = None,
        offset: int = 0,
        context_offset: int = 0,
        out: Array | None = None,
        dtype: DTypeLike | None = None,
        *,
        within: _within.Within | None = None,
        max_tries: int = 1000,
        as_frame: str,
    ) -> Any: ...
    def sample(
        self,
        n: int,
        context: ArrayLike | None = None,
        seed: Seed = None,
        offset: int = 0,
        context_offset: int = 0,
        out: Array | None = None,
        dtype: DTypeLike | None = None,
        *,
        within: _within.Within | None = None,
        max_tries: int = 1000,
        as_frame: str | None = None,
    ) -> Any:
        """Draw from the ensemble: each row from a member drawn for it.

        Parameters
        ----------
        n, context, seed, offset, context_offset, out, dtype, within, max_tries, as_frame
            As in `Flow.sample`, splits by offset included.

        Returns
        -------
        (n, D) or (c, n, D) array, or a data frame

        Raises
        ------
        ValueError
            If a shape, dtype, seed or offset does not fit; if too few rows lie within.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> ensemble = fastmaf.Ensemble(fastmaf.MAF(features=3), members=4)
        >>> np.array_equal(ensemble.sample(10, seed=1)[6:], ensemble.sample(4, seed=1, offset=6))
        True
        """
        record = self._flow.record
        if type(max_tries) is not int or max_tries < 1:
            max_tries = _words.count("max_tries", max_tries, 1)
        if as_frame is not None:
            return _framed(self, as_frame, out, n, context, seed, offset, context_offset, dtype, within, max_tries)
        if within is not None:
            return _within.sample(
                record, self._drawing, n, context, seed, offset, context_offset, out, dtype, within, max_tries, self.device
            )
        n = _arrays.count("n", n)
        given, (context,) = context, self._near(context=context)
        context, c = _arrays.contexts(context, self.context_features, usual=record.usual_contexts)
        seed, offset, context_offset = _arrays.seed_and_offsets(seed, offset, context_offset, n, c)
        shape = (c, n) if context is not None and context.ndim == 2 else (n,)
        dtype = record.sample_dtype(dtype, out)
        shape = (*shape, self.features)
        place = self._place(out, shape, dtype, context)
        samples = place if type(place) is np.ndarray else _arrays.empty(shape, dtype)
        draw, rows = self._drawing(context, seed, context_offset, dtype), samples.reshape(c * n, self.features)
        group, index = np.divmod(np.arange(c * n), n) if n else 2 * (np.empty(0, np.int64),)
        draw(index.astype(np.uint64) + np.uint64(offset), group, rows)
        return out if out is not None and samples is place else self._delivered(samples, given, out, place)

    def acceptance(
        self, within: _within.Within, context: ArrayLike | None = None, n: int = 10_000, seed: Seed = None, context_offset: int = 0
    ) -> Any:
        """The share of samples that lie in a box.

        Parameters
        ----------
        within, context, n, seed, context_offset
            As in `Flow.acceptance`.

        Returns
        -------
        float, or (c,) array under contexts (c, C)

        Raises
        ------
        ValueError
            If a shape, seed or offset does not fit.

        Examples
        --------
        >>> import fastmaf
        >>> fastmaf.Ensemble(fastmaf.MAF(features=3), members=4).acceptance([None, None, None])
        1.0
        """
        return _within.acceptance(self._flow.record, self._drawing, within, context, n, seed, context_offset, self.device)

    def _drawing(self, context: Array | None, seed: int, context_offset: int, dtype: np.dtype[Any]) -> Callable[..., Array]:
        """Draws samples of the counted stream under some of the contexts."""

        def draw(index: Array, group: Array, out: Array | None = None) -> Array:
            rows = np.empty((len(index), self.features), dtype) if out is None else out
            index, row = index.astype(np.uint64), group.astype(np.uint64) + np.uint64(context_offset)
            chosen = self._choices(index, row, seed)
            for k, member in enumerate(self._flows()):
                own = np.flatnonzero(chosen == k)
                if own.size:
                    contexts = context if context is None or context.ndim == 1 else context[group[own]]
                    drawn = np.empty((own.size, self.features), dtype)
                    record, backend = member._ready()
                    backend.sample_rows(record, index[own], row[own], contexts, seed, drawn)
                    rows[own] = drawn
            return rows

        return draw

    def sample_and_log_prob(
        self,
        n: int,
        context: ArrayLike | None = None,
        seed: Seed = None,
        offset: int = 0,
        context_offset: int = 0,
        dtype: DTypeLike | None = None,
    ) -> tuple[Array, Array]:
        """Draw from the ensemble, and give the log of the mean density of each row drawn.

        Parameters
        ----------
        n, context, seed, offset, context_offset, dtype
            As in `sample`.

        Returns
        -------
        samples : (n, D) or (c, n, D) array
            Those of `sample`.
        log_prob : (n,) or (c, n) array
            Those of `log_prob`.

        Raises
        ------
        ValueError
            As in `sample`.

        Examples
        --------
        >>> import fastmaf
        >>> samples, log_prob = fastmaf.Ensemble(fastmaf.MAF(features=3), members=4).sample_and_log_prob(10, seed=1)
        >>> samples.shape, log_prob.shape
        ((10, 3), (10,))
        """
        samples = self.sample(n, context, seed, offset, context_offset, dtype=dtype)
        return samples, self.log_prob(samples, context)

    # Partial information

    @property
    def order(self) -> tuple[int, ...]:
        """The columns in the order in which all members generate them, if they share one; see `Flow.order`."""
        order, *others = dict.fromkeys(flow.order for flow in self._flows())
        if others:
            raise AttributeError("members have orders of their own")
        return order

    def prefix(self, k: int) -> Ensemble:
        """The marginal of the first k variables of `order`, exactly: the mean of those of the members.

        Parameters
        ----------
        k : int
            From 1 to D.

        Returns
        -------
        Ensemble

        Raises
        ------
        ValueError
            If `k` is out of range, or the members share no order.

        Examples
        --------
        >>> import fastmaf
        >>> fastmaf.Ensemble(fastmaf.MADE(features=4, order=[3, 0, 2, 1]), members=3).prefix(2).features
        2
        """
        self._ordered()
        return Ensemble([flow.prefix(k) for flow in self._flows()])

    def sample_given(
        self,
        x: ArrayLike,
        n: int = 1,
        context: ArrayLike | None = None,
        seed: Seed = None,
        offset: int = 0,
        context_offset: int = 0,
        dtype: DTypeLike | None = None,
    ) -> Array:
        """Draw rows whose first k variables of `order` have given values: from members drawn by the density that they give these.

        Each member draws all rows, of which those of the one that was drawn are kept: it costs what the members cost together.

        Parameters
        ----------
        x, n, context, seed, offset, context_offset, dtype
            As in `Flow.sample_given`.

        Returns
        -------
        (n, D) array, or (c, n, D) where x or the context has two dimensions

        Raises
        ------
        ValueError
            As in `Flow.sample_given`; if the members share no order.

        Examples
        --------
        >>> import fastmaf
        >>> ensemble = fastmaf.Ensemble(fastmaf.MADE(features=4, order="sequential", dtype="float64"), members=3)
        >>> ensemble.sample_given([0.5, -1.0], n=3, seed=1)[:, :2].tolist()
        [[0.5, -1.0], [0.5, -1.0], [0.5, -1.0]]
        """
        self._ordered()
        flows, like = self._flows(), x
        x, context = self._near(x=x, context=context)
        seed = _arrays.seed_or_fresh(seed) if seed is None and not (offset or context_offset) else seed
        drawn = [flow.sample_given(x, n, context, seed, offset, context_offset, dtype) for flow in flows]
        rows = [_arrays.real("samples", each).reshape(-1, n, self.features) for each in drawn] if n else []
        if rows:
            k = getattr(x, "shape", np.shape(x))[-1]
            given = rows[0][:, 0, sorted(self.order[:k])]
            chosen = self._chosen_given(given, n, context, (seed, offset, context_offset))
            for own, each in enumerate(rows[1:], 1):
                np.copyto(rows[0], each, where=(chosen == own)[..., None])
        return self._delivered(rows[0].reshape(drawn[0].shape) if rows else drawn[0], like)

    def _ordered(self) -> None:
        if len({flow.order for flow in self._flows()}) > 1:
            raise ValueError("members have orders of their own, in which other variables come first: build them with one order")

    def _chosen_given(self, given: Array, n: int, context: Any, place: tuple[Any, int, int]) -> Array:
        """The member of each row, (c, n), by a counted number: in the shares of the densities that members give the values (c, k)."""
        c, k = given.shape
        shares = np.ones((len(self), c))
        if k:
            parts = [flow if k == self.features else flow.prefix(k) for flow in self._flows()]
            values = np.array([part.log_prob(given, context).astype(np.float64) for part in parts])
            with np.errstate(invalid="ignore"):
                shares = _exp(values - values.max(axis=0))
            shares[:, ~np.isfinite(shares).all(axis=0)] = 1  # what is impossible to all tells nothing
        edges = np.cumsum(shares / shares.sum(axis=0), axis=0)[:-1, :, None]
        seed, offset, context_offset = _arrays.seed_and_offsets(*place, n, c)
        index = np.tile(np.arange(n, dtype=np.uint64) + np.uint64(offset), c)
        row = np.repeat(np.arange(c, dtype=np.uint64) + np.uint64(context_offset), n)
        uniform = _random.uniforms(seed, index, row, self.features + 1)[:, -1].reshape(c, n)
        return np.asarray((uniform >= edges).sum(axis=0))

    def _choices(self, index: Array, row: Array, seed: int) -> Array:
        """The member of each row: a number of the stream of components in the column behind the last variable."""
        return _random.choices(seed, index, row, self.features, len(self))

    # Parameters

    def parameters(self) -> Array:
        """All trainable numbers in one vector: those of `Flow.parameters`, member after member.

        Returns
        -------
        (p,) array

        Examples
        --------
        >>> import fastmaf
        >>> fastmaf.Ensemble(fastmaf.MADE(features=2, hidden_features=(3,)), members=4).parameters().shape
        (100,)
        """
        return self._joined([flow.parameters() for flow in self._flows()])

    def _joined(self, parts: Sequence[Array]) -> Array:
        """Vectors of the members, in the order of their parameters, as one of the ensemble."""
        return np.concatenate(parts)

    def with_parameters(self, parameters: ArrayLike) -> Ensemble:
        """An ensemble with other weights and biases.

        Parameters
        ----------
        parameters : (p,) array
            In the order of `parameters`.

        Returns
        -------
        Ensemble

        Raises
        ------
        ValueError
            If the vector has another length, or a masked weight is not zero.

        Examples
        --------
        >>> import fastmaf
        >>> ensemble = fastmaf.Ensemble(fastmaf.MAF(features=3), members=4)
        >>> len(ensemble.with_parameters(0.5 * ensemble.parameters()))
        4
        """
        vector, flows = _arrays.real("parameters", parameters), self._flows()
        sizes = [sum(array.size for array in flow.record.parameter_arrays()) for flow in flows]
        if vector.shape != (sum(sizes),):
            raise ValueError(f"parameters has shape {_words.shapes(vector.shape)}; the ensemble has {sum(sizes)} parameters")
        parts = np.split(vector, np.cumsum(sizes)[:-1])
        return Ensemble([flow.with_parameters(part) for flow, part in zip(flows, parts, strict=True)])

    def _changed(self, change: Callable[[Flow], Flow]) -> Any:
        """An ensemble of the members after a change."""
        return Ensemble([change(flow) for flow in self._flows()])

    def astype(self: E, dtype: DTypeLike) -> E:
        """The same ensemble in another precision.

        Parameters
        ----------
        dtype : {"float32", "float64"}

        Returns
        -------
        Ensemble

        Raises
        ------
        ValueError
            For any other dtype.

        Examples
        --------
        >>> import fastmaf
        >>> fastmaf.Ensemble(fastmaf.MAF(features=3), members=4).astype("float64").dtype
        dtype('float64')
        """
        return cast("E", self._changed(lambda flow: flow.astype(dtype)))

    def to(self: E, device: str, precision: str = "high") -> E:
        """The same ensemble on another device.

        Members compute there; their densities are averaged, and their samples put together, on the host, to which arrays of the GPU are
        copied. Results are arrays of the GPU where those are that came in.

        Parameters
        ----------
        device, precision
            As in `Flow.to`.

        Returns
        -------
        Ensemble

        Raises
        ------
        ValueError
            If there is no device or precision of this name.
        RuntimeError
            If the device is absent here; the text says why.

        Examples
        --------
        >>> import fastmaf
        >>> fastmaf.Ensemble(fastmaf.MAF(features=3), members=4).to("cpu").device
        'cpu'
        """
        return cast("E", self._changed(lambda flow: flow.to(device, precision)))

    # Training

    def reset(self, seed: Seed = None) -> None:
        """Start anew, in place: each member as `Flow.reset` leaves it, with weights of its own.

        Parameters
        ----------
        seed : int, numpy.random.Generator or SeedSequence, optional
            Of all weights; None draws one.

        Raises
        ------
        ValueError
            If the seed is out of range.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> ensemble = fastmaf.Ensemble(fastmaf.MAF(features=3), members=4, seed=1)
        >>> before = ensemble.parameters()
        >>> ensemble.reset(seed=2)
        >>> ensemble.reset(seed=1)
        >>> np.array_equal(ensemble.parameters(), before)
        True
        """
        flows = self._flows()
        self._all = tuple(flow._holding(flow.record.anew(own)) for flow, own in zip(flows, _seeds(seed, len(flows)), strict=True))

    @_with_parameters_of(Flow.fit)
    def fit(self, x: Any, context: Any = None, weights: Any = None, **options: Any) -> list[History]:
        """Train the members in place, each by itself as `Flow.fit` does, and return their histories.

        As many are trained at once as there are threads. Member k shuffles, and holds out a fraction of the rows, by a seed of its own,
        which depends on `seed` and k alone: it ends with the same bits in an ensemble of any size, and on any number of threads. Rows
        that all members are to be validated on are given as ``validation=(x,)``.

        Parameters
        ----------
        {parameters}

        Returns
        -------
        list of History
            One for each member.

        Notes
        -----
        `max_seconds` is the time of the whole: members that wait for a thread get their share. The checkpoint of member k has the number
        k in front of its extension, ``fit.0.safetensors`` and so on. A callback finds the number under ``"member"``; it is called by one
        thread at a time, and stops the member alone. Warnings come at the end, each of them once. After Ctrl-C, or an exception, members
        keep their best weights; if some never began, a warning names them. With `comm` members are trained one after another, each by all
        ranks.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> ensemble = fastmaf.Ensemble(fastmaf.MAF(2, transforms=1, hidden_features=(8,)), members=3, seed=0)
        >>> x = np.random.default_rng(0).normal(size=(500, 2))
        >>> [len(history.train) for history in ensemble.fit(x, max_epochs=2, seed=0, progress=False)]
        [2, 2, 2]
        """
        from fastmaf import train  # as in `Flow.fit`

        with train.ranks_of(options.pop("comm", None)) as ranks:
            flows, names = [flow._still() for flow in self._flows()], _tables.names_of(x)
            for flow in flows:
                if flow.names is None and names is not None:
                    flow.names = names
            named, seed = [flow.record for flow in flows], options.pop("seed", None)
            given = seed is not None or (options.get("resume") is not True and ranks.size == 1)
            seeds = _seeds(seed, len(flows)) if given else [None] * len(flows)  # of a checkpoint, or of rank 0
            try:
                return train.fit_members(flows, seeds, x, context, weights, ranks=ranks, **options)
            finally:
                if any(flow.record is not own for flow, own in zip(flows, named, strict=True)):  # else the data were refused
                    self._all = tuple(flows)

    # Files and words

    def save(self, path_or_file: str | os.PathLike[str] | IO[bytes]) -> None:
        """Write the ensemble to one .safetensors file; `fastmaf.load` reads it.

        Parameters
        ----------
        path_or_file : path or binary file
            As in `Flow.save`.

        Examples
        --------
        >>> import fastmaf, io
        >>> file = io.BytesIO()
        >>> fastmaf.Ensemble(fastmaf.MAF(features=3), members=4).save(file)
        >>> len(fastmaf.load(file.getvalue()))
        4
        """
        _files.save(_codec.to_bytes(*self._parts()), path_or_file)

    def _parts(self) -> tuple[Any, Any]:
        """What files hold."""
        first, *others = [flow.record for flow in self._flows()]
        return first, tuple(others)

    def __reduce__(self) -> Any:
        return _revived, (_codec.to_bytes(*self._parts()), self.device, self.precision)

    def __repr__(self) -> str:
        return repr(self._flow).replace("Flow(", f"Ensemble(members={len(self)}, ", 1)

    def summary(self) -> str:
        """The table of the first member, and how many weights all have.

        Returns
        -------
        str

        Examples
        --------
        >>> import fastmaf
        >>> print(fastmaf.Ensemble(fastmaf.MADE(2, hidden_features=(3,)), members=4).summary())
        layer           what                                    weights
        Affine          2 columns                                     0
        Autoregressive  2 -> 3 -> 4, relu, exp_soft, order 0 1       16
        Normal          2 columns                                     0
        total           2 features, float32                          16
        4 members have 64 weights
        """
        weights = sum(int(flow.record.free_parameters().sum()) for flow in self._flows())
        return f"{self._flow.summary()}\n{len(self)} members have {weights:,} weights"


def _revived(data: bytes, device: str, precision: str) -> Ensemble:
    """An ensemble that comes out of a pickle."""
    first, others = _codec.from_bytes(data)
    assert isinstance(others, tuple)
    placement = _here(device, precision)
    return Ensemble([Flow._of(record, placement) for record in (first, *others)])


def _seeds(seed: Seed, count: int) -> list[int]:
    """A seed for each member; the first are the same for any number of them."""
    sequence = np.random.SeedSequence(_arrays.seed_or_fresh(seed))
    return [int(word) for word in sequence.generate_state(count, np.uint64)]


def _fitting(flows: Any) -> tuple[Flow, ...]:
    """The flows, if they have densities of the same rows."""
    if not np.iterable(flows):
        raise ValueError(f"flows is {_words.shown(flows)}; it must be a flow or a sequence of flows")
    members = tuple(flows)
    if not members:
        raise ValueError("flows is empty; an ensemble needs at least one flow")
    for k, flow in enumerate(members):
        _words.of_type(f"flows[{k}]", flow, Flow)
    first = members[0]
    for k, flow in enumerate(members):
        for name, own, other in (
            ("features", flow.features, first.features),
            ("context_features", flow.context_features, first.context_features),
            ("dtype", flow.dtype, first.dtype),
            ("discrete variables", _kinds(flow), _kinds(first)),
            ("names", flow.names, first.names),
            ("device", flow.device, first.device),
            ("precision", flow.precision, first.precision),
        ):
            if own != other:
                raise ValueError(f"flows[{k}] has other {name} than flows[0]; members of an ensemble have the same")
    return tuple(flow._still() for flow in members)


def _kinds(flow: Flow) -> tuple[bool, tuple[int, ...]]:
    """What a sample space is made of: whether the variables are Bernoulli ones, and how many values each has."""
    return flow.record.discrete == "bernoulli", flow.record.values


def _exp(x: Array) -> Array:
    """By the compiled core if there is one: NumPy's differs in the last bit from one instruction set to another, and from libfastmaf's."""
    core = backends.core()
    return np.exp(x) if core is None else np.asarray(core.exp(x))
