"""The flow: a chain of layers with a density, samples, gradients and a file of its own."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastmaf import _arrays, _codec, _dask, _device, _files, _gradients, _networks, _partial, _tables, _within, _words, backends
from fastmaf import layers as _layers
from fastmaf.layers import Affine, Autoregressive, Elementwise, Normal, Terminal
from fastmaf.record import FlowRecord, trainable, width_of

if TYPE_CHECKING:
    import os

    from fastmaf._arrays import Seed
    from fastmaf.train import Epoch, History

__all__ = ["Flow"]

Array = NDArray[Any]

_PRECISIONS = ("highest", "high", "medium")


class Flow:
    """A normalizing flow: layers read from data to noise, and a base density.

    Most flows come from `fastmaf.MAF`, `fastmaf.MADE` or `fastmaf.load`; this constructor takes the layers themselves.

    Parameters
    ----------
    layers : sequence of layers of `fastmaf.layers`
        From data to noise, all of the same width D.
    base : Normal or Terminal, optional
        The density at the end of the chain; a standard normal if None.
    features : int, optional
        D; read off the layers if None.
    context_features : int
        C; 0 for a flow without context.
    context_layers : sequence of Elementwise or Affine
        Applied to the context first, each of width C.
    dtype : {"float32", "float64"}
        Of the arithmetic and of the results.
    names : sequence of str, optional
        One name for each of the D variables.
    training : mapping, optional
        How the flow came to its weights; kept with it and in its file. Numbers, text, lists and mappings only.

    Attributes
    ----------
    features, context_features : int
    layers, context_layers : tuple
    base : Normal or Terminal
    dtype : numpy.dtype
    names : tuple of str or None
    training : dict
    device : str

    Raises
    ------
    ValueError
        If the layers do not fit together, or the dtype or the names do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from fastmaf.layers import Affine
    >>> flow = Flow([Affine([1.0], [2.0])], dtype="float64")
    >>> np.allclose(flow.log_prob(np.array([[1.0]])), np.log(2) - 0.5 * np.log(2 * np.pi))
    True
    """

    __slots__ = ("__weakref__", "_placed", "_placement", "_record")

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
        self._record = FlowRecord(
            layers,
            base,
            features=features,
            context_features=context_features,
            context_layers=context_layers,
            dtype=dtype,
            names=names,
            training=training,
        )
        self._placement: tuple[str, str] = ("cpu", "high")
        self._placed: backends.Backend | None = None

    @classmethod
    def _of(cls, record: FlowRecord, placement: tuple[str, str] = ("cpu", "high")) -> Flow:
        """The flow of a record, on a device and in a precision that are there."""
        flow = cls.__new__(cls)
        flow._record, flow._placement = record, placement
        flow._placed = None if placement[0] == "cpu" else backends.placed(*placement)
        return flow

    # The record

    @property
    def record(self) -> FlowRecord:
        """The flow as data: immutable, and replaced as a whole by every assignment and by `fit`."""
        return self._record

    @property
    def features(self) -> int:
        """Number of variables D."""
        return self._record.features

    @property
    def context_features(self) -> int:
        """Number of variables C that the density is conditioned on."""
        return self._record.context_features

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the arithmetic and of the results; `astype` gives a flow of another."""
        return self._record.dtype

    @property
    def device(self) -> str:
        """Where the flow computes; `to` gives a flow on another device."""
        return self._placement[0]

    @property
    def precision(self) -> str:
        """Of the matrix products of float32 densities on a GPU; see `to`."""
        return self._placement[1]

    @property
    def layers(self) -> tuple[_layers.FlowLayer, ...]:
        """The layers, from data to noise; may be assigned."""
        return self._record.layers

    @layers.setter
    def layers(self, layers: Iterable[_layers.FlowLayer]) -> None:
        self._record = self._record.replaced(layers=layers)

    @property
    def base(self) -> Normal | Terminal:
        """The density at the end of the chain; may be assigned."""
        return self._record.base

    @base.setter
    def base(self, base: Normal | Terminal) -> None:
        self._record = self._record.replaced(base=base)

    @property
    def context_layers(self) -> tuple[Elementwise | Affine, ...]:
        """The layers that the context passes through first; may be assigned."""
        return self._record.context_layers

    @context_layers.setter
    def context_layers(self, layers: Iterable[Elementwise | Affine]) -> None:
        self._record = self._record.replaced(context_layers=layers)

    @property
    def names(self) -> tuple[str, ...] | None:
        """One name for each variable; may be assigned."""
        return self._record.names

    @names.setter
    def names(self, names: Sequence[str] | None) -> None:
        self._record = self._record.replaced(names=names)

    @property
    def training(self) -> dict[str, Any]:
        """How the flow came to its weights; may be assigned, or added to."""
        return self._record.training

    @training.setter
    def training(self, training: Mapping[str, Any]) -> None:
        self._record = self._record.replaced(training=training)

    def _holding(self, record: FlowRecord) -> Flow:
        """The flow of another record, in the same place."""
        return Flow._of(record, self._placement)

    def _still(self) -> Flow:
        """The flow as it is now, in the hands of nobody else."""
        return self._holding(self._record)

    def _with(self, **changes: Any) -> Flow:
        return self._holding(self._record.replaced(**changes))

    # Evaluation

    def _ready(self) -> tuple[FlowRecord, backends.Backend]:
        """The record as it is now, which a call keeps to its end, and the backend that runs it."""
        record, backend = self._record, self._placed or backends.active or backends.choose()
        if record.approved_by is not backend:
            backend = backends.runner(record, backend)
        return record, backend

    def log_prob(self, x: ArrayLike, context: ArrayLike | None = None, out: Array | None = None) -> Array:
        """Log-density of rows, in nats.

        Parameters
        ----------
        x : (n, D) or (c, n, D) array, or data frame
            Of any real dtype and any strides. Of a data frame (pandas, polars, pyarrow) the columns that `names` lists are taken, in their
            order; all from left to right if the flow has no names. On a flow of the host, arrays that only speak DLPack are taken too.
        context : array or data frame, optional
            (C,), one for all rows; for x (n, D): (n, C), one for each row, or (c, 1, C), the n rows under each of c contexts, or (c, n, C);
            for x (c, n, D): (c, C) or (c, 1, C), one for each group of n rows, or (c, n, C), one for each row. Axes of length 1 fit any
            length. The columns of a data frame are taken from left to right, whatever their names. If it or x is an array of dask, so is
            the result, and nothing is computed yet.
        out : (n,) or (c, n) array, optional
            Filled and returned; C-contiguous, in the dtype of the flow.

        Returns
        -------
        (n,) or (c, n) array
            (c, n) where x or the context has three dimensions. A row with a NaN gives NaN, also one in its context, where a number at or
            outside a bound counts as one. No other row does: at and outside a bound, at infinity, and so far out that the dtype has no
            number for it, the log-density is -inf. A tensor of torch where x is one.

        Raises
        ------
        ValueError
            If a shape or dtype does not fit.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> fastmaf.MAF(features=3).log_prob(np.zeros((5, 3))).shape
        (5,)
        """
        record, backend = self._ready()
        given = x
        if (type(x) is not np.ndarray or (context is not None and type(context) is not np.ndarray)) and _dask.among(x, context):
            if out is not None:
                raise ValueError("out is given, but x or context is an array of dask, of which only an array of dask comes; leave out out")
            return cast("Array", _dask.mapped(self._still(), "log_prob", "x", x, context, record.dtype, 0))
        x, context, shape = _arrays.rows("x", x, context, record.features, record.context_features, self._placement[0], record.names)
        if out is not None:
            result = _arrays.output(out, shape, record.dtype, x, context, device=self.device)
        else:  # `_empty` without the time of a call
            result = np.empty(shape, record.dtype) if type(x) is np.ndarray else _empty(shape, record.dtype, x)
        if result.size:
            backend.log_prob(record, x, context, result)
        if out is not None:
            return out
        return result if type(given) is np.ndarray else _device.native(result, given)

    @overload
    def to_noise(self, x: ArrayLike, context: ArrayLike | None = None, *, log_det: Literal[False] = False) -> Array: ...
    @overload
    def to_noise(self, x: ArrayLike, context: ArrayLike | None = None, *, log_det: bool) -> Any: ...
    def to_noise(self, x: ArrayLike, context: ArrayLike | None = None, *, log_det: bool = False) -> Array | tuple[Array, Array]:
        """The noise that rows come from: the layers applied, the base left out.

        Parameters
        ----------
        x, context : arrays
            As in `log_prob`.
        log_det : bool
            Whether to give log|det| of the map too, from the same pass.

        Returns
        -------
        noise : (n, D) or (c, n, D) array
            Standard normal where the flow fits the data. NaN throughout in rows on or outside a bound, with NaN or infinity in them or in
            their context, and so far out that the dtype cannot follow (in arrays on a GPU it may be some infinite columns of theirs).
        log_det : (n,) or (c, n) array
            If asked for: log|d noise / d x|, in the dtype of the flow; finite where the noise is. Elsewhere it is what log_prob is: NaN in
            a row with a NaN in it or in its context, -inf in all others.

        Raises
        ------
        ValueError
            If a shape or dtype does not fit; if variables are discrete.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> flow = fastmaf.MAF(features=3, dtype="float64")
        >>> x = np.ones((5, 3))
        >>> noise, log_det = flow.to_noise(x, log_det=True)
        >>> np.allclose(flow.from_noise(noise), x)
        True
        >>> np.allclose(log_det - 0.5 * (noise**2).sum(axis=1) - 1.5 * np.log(2 * np.pi), flow.log_prob(x))
        True
        """
        record, backend = self._ready()
        _check_continuous(record, "noise")
        log_det = _words.flag("log_det", log_det)
        given = x
        if _dask.among(x, context):
            return cast("Array", _dask.mapped(self._still(), "to_noise", "x", x, context, record.dtype, record.features, log_det=log_det))
        x, context, shape = _arrays.rows("x", x, context, record.features, record.context_features, self.device, record.names)
        result = _empty((*shape, record.features), record.dtype, x)
        of_map = _empty(shape, record.dtype, x) if log_det else None
        if result.size:
            backend.to_noise(record, x, context, result, of_map)
            _arrays.all_or_none(result)
        if type(given) is not np.ndarray:
            result, of_map = _device.native(result, given), None if of_map is None else _device.native(of_map, given)
        return result if of_map is None else (result, of_map)

    @overload
    def from_noise(
        self, u: ArrayLike, context: ArrayLike | None = None, dtype: DTypeLike | None = None, *, log_det: Literal[False] = False
    ) -> Array: ...
    @overload
    def from_noise(self, u: ArrayLike, context: ArrayLike | None = None, dtype: DTypeLike | None = None, *, log_det: bool) -> Any: ...
    def from_noise(
        self, u: ArrayLike, context: ArrayLike | None = None, dtype: DTypeLike | None = None, *, log_det: bool = False
    ) -> Array | tuple[Array, Array]:
        """The rows that noise turns into: the inverse of `to_noise`.

        Parameters
        ----------
        u : (n, D) or (c, n, D) array
        context : array, optional
            As in `log_prob`.
        dtype : {"float32", "float64"}, optional
            Of the rows; that of the flow if None. The layers in front compute in float64 whatever the dtype of the flow: with
            "float64" their results are kept, which columns with a large offset need.
        log_det : bool
            Whether to give log|det| of the map too, from the same pass.

        Returns
        -------
        x : (n, D) or (c, n, D) array
            Strictly inside the bounds, if there are any. NaN throughout in rows of which some column would not be finite (in arrays on a
            GPU it may be these columns alone).
        log_det : (n,) or (c, n) array
            If asked for: log|d x / d noise|, in the dtype of the flow, of the rows before they are rounded; the negative of that of
            `to_noise`. NaN in rows that are (in arrays on a GPU it may be a number).

        Raises
        ------
        ValueError
            If a shape or dtype does not fit; if variables are discrete.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> fastmaf.MAF(features=2, bounds=[(0, 1), None]).from_noise(np.zeros((4, 2))).shape
        (4, 2)
        """
        record, backend = self._ready()
        _check_continuous(record, "noise")
        log_det = _words.flag("log_det", log_det)
        given = u
        if _dask.among(u, context):
            own = record.sample_dtype(dtype)
            made = _dask.mapped(self._still(), "from_noise", "u", u, context, own, record.features, dtype=own.name, log_det=log_det)
            return cast("Array", made)
        u, context, shape = _arrays.rows("u", u, context, record.features, record.context_features, self.device, record.names)
        result = _empty((*shape, record.features), record.sample_dtype(dtype), u)
        of_map = _empty(shape, record.dtype, u) if log_det else None
        if result.size:
            backend.from_noise(record, u, context, result, of_map)
            _arrays.all_or_none(result, of_map)
        if type(given) is not np.ndarray:
            result, of_map = _device.native(result, given), None if of_map is None else _device.native(of_map, given)
        return result if of_map is None else (result, of_map)

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
        """Draw from the flow.

        Every number depends only on the seed, on its place and on its column: for one seed, ``sample(n)`` equals
        ``sample(k)`` followed by ``sample(n - k, offset=k)``, and likewise over contexts with `context_offset`.

        Parameters
        ----------
        n : int
            Rows to draw under each context.
        context : (C,) or (c, C) array, optional
            Finite.
        seed : int, numpy.random.Generator or SeedSequence, optional
            An int is below 2**64. None draws afresh in every call, and so does a generator.
        offset, context_offset : int
            Index of the first row and of the first context in the stream of the seed; need a seed.
        out : (n, D) or (c, n, D) array, optional
            Filled and returned; C-contiguous, float32 or float64.
        dtype : {"float32", "float64"}, optional
            Of the samples; if None that of `out`, or of the flow. Samples of both dtypes are the same but for rounding; float64 from a
            float32 flow resolves columns with a large offset, such as times in seconds.
        within : sequence or mapping, optional
            Keep what lies in a box, its edges included: for each column None, or a pair (low, high) of which one may be None; or a
            mapping from the names of the columns that have such a pair. Row k is then the k-th number of its stream that lies inside, so
            that ``sample(n)`` begins ``sample(n + 1)``, contexts can still be split by `context_offset`, and `offset` has no meaning.
            Each context is drawn from until it has its n rows; `acceptance` says beforehand how many it takes.
        max_tries : int
            With `within`, most rows to draw for each row that is wanted under a context, and for each of 100 if fewer are wanted. Without
            one inside among ``100 * max_tries`` a context is given up too.
        as_frame : {"pandas", "polars", "pyarrow"}, optional
            Give a data frame (a table, of pyarrow) with the names of the flow, or x0, x1, ... if it has none; under one context at most.

        Returns
        -------
        (n, D) array, or (c, n, D) under contexts (c, C); or a data frame of n rows
            The contexts come first (in zuko and sbi the samples do). NaN under a context at or outside a bound, or so far out that the
            dtype of the flow cannot follow.

        Warns
        -----
        RuntimeWarning
            If a context is more than 100 standard deviations away from those that the flow was fitted to.

        Raises
        ------
        ValueError
            If a shape, dtype, seed or offset does not fit, or the context is not finite (one on a GPU gives NaN); if too few rows lie
            within, under some context; if `within` goes with an `offset`, or with a context or `out` on a GPU; if `as_frame` goes with
            several contexts, a context on a GPU or `out`.
        ImportError
            If the library that `as_frame` names is not installed.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> flow = fastmaf.MAF(features=3)
        >>> np.array_equal(flow.sample(10, seed=1)[6:], flow.sample(4, seed=1, offset=6))
        True
        >>> flow.sample(1000, seed=1, within=[(0, 1), None, (None, 2)]).shape
        (1000, 3)
        """
        if type(max_tries) is not int or max_tries < 1:
            max_tries = _words.count("max_tries", max_tries, 1)
        if as_frame is not None:
            return _framed(self, as_frame, out, n, context, seed, offset, context_offset, dtype, within, max_tries)
        if within is not None:
            record, backend = self._ready()
            draw = functools.partial(_drawing, record, backend)
            return _within.sample(record, draw, n, context, seed, offset, context_offset, out, dtype, within, max_tries, self.device)
        return self._sample(n, context, seed, offset, context_offset, out, dtype, False)[0]

    def acceptance(
        self, within: _within.Within, context: ArrayLike | None = None, n: int = 10_000, seed: Seed = None, context_offset: int = 0
    ) -> Any:
        """The share of samples that lie in a box: an estimate of the probability that the flow gives it.

        Its logarithm turns log_prob into the density within the box. It is drawn, not integrated: a share p is off by about
        ``sqrt(p * (1 - p) / n)``.

        Parameters
        ----------
        within, context, seed, context_offset
            As in `sample`.
        n : int
            Rows to draw under each context; with the same seed those that ``sample(n)`` draws.

        Returns
        -------
        float, or (c,) array under contexts (c, C)
            In float64.

        Raises
        ------
        ValueError
            If a shape, seed or offset does not fit, the context is not finite, or it is on a GPU.

        Examples
        --------
        >>> import fastmaf
        >>> flow = fastmaf.Flow([], features=2)
        >>> bool(abs(flow.acceptance([(0, None), None], seed=1) - 0.5) < 0.02)
        True
        """
        record, backend = self._ready()
        return _within.acceptance(
            record, functools.partial(_drawing, record, backend), within, context, n, seed, context_offset, self.device
        )

    def sample_and_log_prob(
        self,
        n: int,
        context: ArrayLike | None = None,
        seed: Seed = None,
        offset: int = 0,
        context_offset: int = 0,
        dtype: DTypeLike | None = None,
    ) -> tuple[Array, Array]:
        """Draw from the flow, and give the log-density of each row drawn at no further cost.

        Parameters
        ----------
        n, context, seed, offset, context_offset, dtype
            As in `sample`.

        Returns
        -------
        samples : (n, D) or (c, n, D) array
            Those of `sample`.
        log_prob : (n,) or (c, n) array
            In the dtype of the flow; NaN for a sample with a NaN alone, as in `log_prob`. It is that of the row before it is rounded: where
            the dtype hardly resolves a column, close to a bound or far from 0, `log_prob` of the row as it is returned may differ by
            nats. ``dtype="float64"`` brings both together.

        Raises
        ------
        ValueError
            As in `sample`.

        Warns
        -----
        RuntimeWarning
            As in `sample`; and if samples are rounded so far that their density is another (not looked for on a GPU).

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> flow = fastmaf.MAF(features=3, dtype="float64")
        >>> x, log_prob = flow.sample_and_log_prob(10, seed=1)
        >>> np.allclose(log_prob, flow.log_prob(x))
        True
        """
        samples, log_prob = self._sample(n, context, seed, offset, context_offset, None, dtype, True)
        assert log_prob is not None
        if type(samples) is np.ndarray and (rounded := self._record.rounded(samples)):
            remedy = 'draw with dtype="float64"' if samples.dtype == np.float32 else "move the bounds away"
            where = f"{_words.columns(rounded, self.names)}, which {samples.dtype} cannot resolve there"
            _words.warn(f"samples are rounded in {where}, and log_prob is that of the rows before: {remedy}")
        return samples, log_prob

    def _sample(
        self,
        n: int,
        context: ArrayLike | None,
        seed: Seed,
        offset: int,
        context_offset: int,
        out: Array | None,
        dtype: DTypeLike | None,
        density: bool,
    ) -> tuple[Array, Array | None]:
        record, backend = self._ready()
        n = _arrays.count("n", n)
        given = context
        context, c = _arrays.contexts(context, record.context_features, self.device, record.usual_contexts)
        seed, offset, context_offset = _arrays.seed_and_offsets(seed, offset, context_offset, n, c)
        groups = (c,) if context is not None and context.ndim == 2 else ()
        shape = (*groups, n, record.features)
        dtype = record.sample_dtype(dtype, out)
        samples = _empty(shape, dtype, context) if out is None else _arrays.output(out, shape, dtype, context, device=self.device)
        log_prob = _empty((*groups, n), record.dtype, samples) if density else None
        if isinstance(samples, _device.DeviceArray):
            if samples.size:
                backend.sample(record, c, n, context, seed, offset, context_offset, samples, log_prob)
            like = samples if context is None else given
            return _device.native(samples, like), None if log_prob is None else _device.native(log_prob, like)
        if samples.size:
            log_prob_out = None if log_prob is None else log_prob.reshape(c, n)
            backend.sample(record, c, n, context, seed, offset, context_offset, samples.reshape(c, n, record.features), log_prob_out)
        if out is not None:
            samples = out
        elif given is not None:
            samples, log_prob = _device.native(samples, given), None if log_prob is None else _device.native(log_prob, given)
        return samples, log_prob

    # Partial information

    @property
    def order(self) -> tuple[int, ...]:
        """The columns in the order in which they are generated: none depends on those behind it.

        Raises
        ------
        ValueError
            If the autoregressive layers and the base do not share one order, or a layer mixes or permutes the columns.

        Examples
        --------
        >>> import fastmaf
        >>> fastmaf.MAF(features=3, order=[2, 0, 1]).order
        (2, 0, 1)
        """
        return _partial.order(self._record)

    def prefix(self, k: int) -> Flow:
        """The marginal of the first k variables of `order`, exactly.

        The other variables, and the hidden units that only they depend on, are left out.

        Parameters
        ----------
        k : int
            From 1 to D.

        Returns
        -------
        Flow
            Of k features: the columns ``sorted(order[:k])``, from left to right, with their names.

        Raises
        ------
        ValueError
            If `k` is out of range, or the flow has no order.

        Examples
        --------
        >>> import fastmaf
        >>> flow = fastmaf.MADE(features=4, order=[3, 0, 2, 1], names=["a", "b", "c", "d"])
        >>> flow.prefix(2).names
        ('a', 'd')
        """
        return self._holding(_partial.prefix(self._record, k))

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
        """Draw rows whose first k variables of `order` have given values.

        Parameters
        ----------
        x : (k,) or (c, k) array
            Finite values of the columns of ``prefix(k)``, in their order; k may be 0 or D.
        n : int
            Rows to draw for each row of `x`.
        context : (C,) or (c, C) array, optional
            One for all rows of `x`, or one for each.
        seed, offset, context_offset, dtype
            As in `sample`, splits included; `context_offset` counts the rows of `x`, or of the context.

        Returns
        -------
        (n, D) array, or (c, n, D) where x or the context has two dimensions
            Whole rows, the given values among them as they are; NaN in the other columns where the given values lie on or outside a bound.

        Raises
        ------
        ValueError
            If a shape, dtype, seed or offset does not fit, a value or the context is not finite, the flow has no order, or a discrete
            variable cannot have its value.

        Examples
        --------
        >>> import fastmaf
        >>> flow = fastmaf.MADE(features=4, order="sequential", dtype="float64")
        >>> flow.sample_given([0.5, -1.0], n=3, seed=1)[:, :2].tolist()
        [[0.5, -1.0], [0.5, -1.0], [0.5, -1.0]]
        """
        backend, device = self._placed or backends.choose(), self._placement[0]
        like, x, context = x, _arrays.fetched("x", x, device), _arrays.fetched("context", context, device)
        samples = _partial.sample_given(self._record, backend, x, n, context, seed, offset, context_offset, dtype)
        return _device.returned(samples, like, device)

    def conditional_probs(self, x: ArrayLike, context: ArrayLike | None = None) -> Array:
        """Probabilities of the values of each discrete variable, given those before it in the order.

        Parameters
        ----------
        x, context : arrays
            As in `log_prob`. What is no value of its variable (NaN, 0.5, a category too large) makes the probabilities of the variables
            behind it NaN, and no others (on a GPU NaN may spoil its whole row, and other such values are not looked for).

        Returns
        -------
        (n, D) or (c, n, D) array for Bernoulli variables
            The probability of 1.
        (n, D, m) or (c, n, D, m) array for categorical variables, also among others
            The probability of each value; m is the largest number of values, and values that a variable does not have get 0. NaN for
            variables that may have any number.

        Raises
        ------
        ValueError
            If a shape or dtype does not fit, or the flow is not discrete.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> flow = fastmaf.MADE(features=3, conditional="categorical", categories=[2, 3, 4])
        >>> flow.conditional_probs(np.zeros((5, 3))).shape
        (5, 3, 4)
        """
        record, backend = self._ready()
        base = record.base
        if not isinstance(base, Terminal) or not record.discrete:
            raise ValueError("conditional_probs is for discrete variables; those of this flow are continuous")
        given = x
        x, context, shape = _arrays.rows("x", x, context, record.features, record.context_features, self.device, record.names)
        result = _empty((*shape, record.features, *([max(base.categories)] if base.categories else [])), record.dtype, x)
        if not result.size:
            return result if type(given) is np.ndarray else _device.native(result, given)
        unknown = _impossible(x, record) if type(x) is np.ndarray else None
        if unknown is not None:
            x = np.where(unknown, _inside(record), x)
        backend.conditional_probs(record, x, context, result)
        if unknown is not None:  # what comes behind an unknown value is unknown
            first = np.where(unknown, base.ranks, base.ranks.max() + 1).min(axis=-1, keepdims=True)
            result[np.broadcast_to(base.ranks > first, result.shape[: len(shape) + 1])] = np.nan
        return result if type(given) is np.ndarray else _device.native(result, given)

    # Gradients

    def log_prob_and_grad(self, x: ArrayLike, context: ArrayLike | None = None) -> tuple[Array, Array, Array | None]:
        """Log-density and its gradients in x and in the context.

        Parameters
        ----------
        x, context : arrays
            As in `log_prob`.

        Returns
        -------
        value : (n,) or (c, n) array
        dx : array of the shape of x
            For rows (n, D) under contexts (c, 1, C), summed over the c contexts, in double.
        dcontext : array of the shape of the context, or None
            Summed over the rows that share a context, likewise.

        Raises
        ------
        ValueError
            If a shape or dtype does not fit; if variables are discrete.

        Notes
        -----
        Where log_prob is -inf a row has gradients of zero, and so where it is finite but a gradient of the row is no number in the dtype.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> value, dx, _ = fastmaf.MAF(features=3).log_prob_and_grad(np.zeros((5, 3)))
        >>> value.shape, dx.shape
        ((5,), (5, 3))
        """
        record, backend = self._ready()
        _check_continuous(record, "gradient in x")
        value, dx, dcontext, _ = self._backward(record, backend, x, context, None, False)
        assert dx is not None
        return value, dx, dcontext

    def vjp(self, x: ArrayLike, context: ArrayLike | None, cotangent: ArrayLike) -> tuple[Array | None, Array | None, Array]:
        """Gradients of ``sum(cotangent * log_prob(x, context))``.

        Parameters
        ----------
        x, context : arrays
            As in `log_prob`.
        cotangent : (n,) or (c, n) array
            Of the shape of log_prob.

        Returns
        -------
        dx, dcontext
            As in `log_prob_and_grad`; dx is None where variables are discrete.
        dparameters : (p,) array
            In the order of `parameters`, on the GPU where x lies there; exactly zero for masked weights. The statistics of a `BatchNorm`
            are constants here. Rows whose log_prob is -inf have no part in it; those that are only just finite may be too much for the
            dtype.

        Raises
        ------
        ValueError
            If a shape or dtype does not fit.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> flow = fastmaf.MAF(features=3)
        >>> dx, _, dparameters = flow.vjp(np.zeros((5, 3)), None, np.ones(5))
        >>> dparameters.shape == flow.parameters().shape
        True
        """
        record, backend = self._ready()
        _, dx, dcontext, dparameters = self._backward(record, backend, x, context, cotangent, True)
        return dx, dcontext, dparameters

    def _backward(
        self,
        record: FlowRecord,
        backend: backends.Backend,
        x: ArrayLike,
        context: ArrayLike | None,
        cotangent: ArrayLike | None,
        parameters: bool,
    ) -> tuple[Any, Array | None, Array | None, Any]:
        given, beside, dtype, device = x, context, record.dtype, self._placement[0]
        own = None if context is None else _arrays.real("context", context, device)
        x, context, shape = _arrays.rows("x", x, own, record.features, record.context_features, device, record.names)
        factor = None if cotangent is None else _arrays.cotangents(cotangent, shape, device=device)
        _device.together("x", x, factor, "cotangent")
        count = sum(array.size for array in record.parameter_arrays()) if parameters else 0
        value: Any
        dparameters: Any
        if type(x) is _device.DeviceArray:
            dparameters = x.empty((count,), dtype) if parameters else None
            value = x.empty(shape, dtype) if factor is None else None
            dx = None if record.discrete else x.empty(x.shape, dtype)
            dcontext = None if own is None else _empty(own.shape, dtype, own)
            backend.vjp(record, x, context, factor, value, dx, dcontext, dparameters)
            dparameters = None if dparameters is None else _device.native(dparameters, given)
        else:
            dparameters = np.zeros(count, dtype) if parameters else None
            value, dx, dcontext = _gradients.backward(backend, record, x, context, shape, factor, dparameters)
            dcontext = None if dcontext is None or own is None else dcontext.reshape(own.shape)
        if dcontext is not None:
            dcontext = _device.native(dcontext, beside)
        if type(given) is np.ndarray:
            return value, dx, dcontext, dparameters
        value, dx = (None if result is None else _device.native(result, given) for result in (value, dx))
        return value, dx, dcontext, dparameters

    # Parameters

    def parameters(self) -> Array:
        """All trainable numbers in one vector, masked weights (which are zero) included.

        Layer by layer, from data to noise. Of an autoregressive layer and each of its maps: weight, bias, weight and bias of the context
        if there are any; then the direct weights from inputs to outputs if there are any. Of a `BatchNorm`: log_gamma, beta. Of a `Linear`:
        lower and upper, zero outside their triangles, and bias. At last those of the network of a `Terminal` base. Matrices row by row.

        Returns
        -------
        (p,) array

        Examples
        --------
        >>> import fastmaf
        >>> fastmaf.MADE(features=2, hidden_features=(3,)).parameters().shape  # (3 * 2 + 3) + (4 * 3 + 4)
        (25,)
        """
        return self._record.parameters()

    def with_parameters(self, parameters: ArrayLike) -> Flow:
        """A flow with other weights and biases.

        Parameters
        ----------
        parameters : (p,) array
            In the order of `parameters`, zero for masked weights. What lies outside the triangles of a `Linear` is ignored.

        Returns
        -------
        Flow

        Raises
        ------
        ValueError
            If the vector has another length, or a masked weight is not zero.

        Examples
        --------
        >>> import fastmaf
        >>> flow = fastmaf.MAF(features=3)
        >>> flow.with_parameters(0.5 * flow.parameters()).features
        3
        """
        return self._holding(self._record.with_parameters(parameters))

    def astype(self, dtype: DTypeLike) -> Flow:
        """The same flow in another precision.

        Parameters
        ----------
        dtype : {"float32", "float64"}

        Returns
        -------
        Flow

        Raises
        ------
        ValueError
            For any other dtype.

        Examples
        --------
        >>> import fastmaf
        >>> fastmaf.MAF(features=3).astype("float64").dtype
        dtype('float64')
        """
        return self._with(dtype=_arrays.float_dtype(dtype))

    def to(self, device: str, precision: str = "high") -> Flow:
        """The same flow on another device.

        Parameters
        ----------
        device : {"cpu", "cuda", "cuda:0", "cuda:1", ...}
            "cuda" is the first GPU. There the flow takes NumPy arrays, which are streamed, and arrays of that GPU (torch, cupy, jax), for
            which results are of the same kind, in the same place and on the caller's stream.
        precision : {"highest", "high", "medium"}
            Of the matrix products of float32 densities on a GPU: float32; about that, from halves in two parts; or halves, which cost
            the density about three digits. All else, and what does not fit the kernels for it, has the highest.

        Returns
        -------
        Flow

        Raises
        ------
        ValueError
            If there is no device or precision of this name.
        RuntimeError
            If the device is absent here; the text says why.

        Examples
        --------
        >>> import fastmaf
        >>> fastmaf.MAF(features=3).to("cpu").device
        'cpu'
        """
        if not isinstance(precision, str) or precision not in _PRECISIONS:
            raise ValueError(_words.one_of("precision", precision, _PRECISIONS))
        name, _, number = device.partition(":") if isinstance(device, str) else ("", "", "")
        known = isinstance(device, str) and (device == "cpu" or (name == "cuda" and (number.isdecimal() if ":" in device else not number)))
        if not known:
            raise ValueError(f"device is {_words.shown(device)}; it must be 'cpu', 'cuda' or 'cuda:' and a number")
        return Flow._of(self._record, ("cpu" if device == "cpu" else f"cuda:{int(number or 0)}", precision))

    # Training

    def reset(self, seed: Seed = None) -> None:
        """Start anew, in place: the flow as it was before it was ever fitted, with new weights.

        Weights and biases are those that `fastmaf.MAF` or `fastmaf.MADE` draws for this seed. Standardisation and the statistics of batch
        norms are forgotten: every `Affine` and `Linear` is the identity, but for the one that ``standardize="full"`` has added, which is
        taken out again, so that the next fit standardises; and so is all that `training` tells. Architecture, orders (those that were
        drawn too), bounds, names, dtype and device stay, and what was saved.

        Parameters
        ----------
        seed : int, numpy.random.Generator or SeedSequence, optional
            Of the weights; None draws one. It is found in ``flow.training["init_seed"]``.

        Raises
        ------
        ValueError
            If the seed is out of range.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> x = np.random.default_rng(0).normal([1.0, -2.0], [0.5, 3.0], (500, 2))
        >>> flow = fastmaf.MAF(2, transforms=1, hidden_features=(8,), seed=1)
        >>> history = flow.fit(x, max_epochs=3)
        >>> flow.reset(seed=1)
        >>> np.array_equal(flow.log_prob(x), fastmaf.MAF(2, transforms=1, hidden_features=(8,), seed=1).log_prob(x))
        True
        """
        self._record = self._record.anew(_arrays.seed_or_fresh(seed))

    def fit(
        self,
        x: ArrayLike | Callable[[int], ArrayLike],
        context: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        *,
        validation: float | ArrayLike | tuple[ArrayLike | None, ...] = 0.1,
        batch_size: int = 256,
        optimizer: str = "adam",
        lr: float = 1e-3,
        schedule: str | Callable[[float], float] = "constant",
        l2: float = 0.0,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        patience: int | None = 30,
        max_epochs: int = 1000,
        max_seconds: float | None = None,
        standardize: bool | Literal["again", "full"] = True,
        device: str = "auto",
        seed: Seed = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: float = 1,
        resume: bool = False,
        callback: Callable[[Epoch], object] | None = None,
        on_interrupt: Literal["raise", "return"] = "raise",
        progress: bool | None = None,
        comm: Any = None,
    ) -> History:
        """Train in place by maximum likelihood, and return the history.

        The loss of a batch of B rows is ``sum(w * nll) / (B * mean(w))``, w the weights and their mean that of the training rows. The
        weights with the best validation log-likelihood are kept, those at the start included. If the data are refused, nothing changes.

        A `BatchNorm` of kind "batch" normalises each batch by its own weighted mean and variance, and everything else (validation, the
        fitted flow) by those of all training rows, found anew before the first epoch and after each; one of kind "data" by those of the
        training rows at the start of the first fit.

        Parameters
        ----------
        x : (n, D) array, or callable
            A memmap is read in blocks. A callable gives a fresh array of the same shape for each epoch, ``x(1)``, ``x(2)``, ... (for
            instance a new dequantisation), and may use one array again; ``x(0)`` serves for the standardisation and for validation rows
            taken as a fraction.
        context : (n, C) array, optional
            One row per row of `x`. A column that does not vary is only shifted.
        weights : (n,) array, optional
            Not negative. Rows of weight zero are checked, and then left out.
        validation : float, (m, D) array, or tuple ``(x,)``, ``(x, context)`` or ``(x, context, weights)``
            The fraction of the rows of positive weight to hold out (chosen by `seed` alone), or the validation rows themselves. With 0
            there is no early stopping, and the last weights are kept.
        batch_size : int
            Rows per step; the last batch of an epoch may be short. Where batch norms take their statistics from the batch, rows that fill
            no batch are left out of an epoch, unless there are none but them; then `batch_size` is at least 2.
        optimizer : {"adam"}
            With `weight_decay` it is AdamW.
        lr : float
            Learning rate.
        schedule : {"constant", "cosine"} or callable
            ``"cosine"`` falls to zero over `max_epochs`, step by step. A callable is given the number of epochs done so far, with its
            fraction (``epoch - 1 + batch / batches``), and returns the factor on `lr`.
        l2 : float
            Factor of the sum of the squared weights in the loss.
        weight_decay : float
            Decoupled decay of AdamW, times the learning rate.
        clip_norm : float, optional
            Largest norm of the gradient.
        patience : int, optional
            Stop after so many epochs without a better validation log-likelihood; never, if None.
        max_epochs : int
            Stop after so many epochs, those of a resumed checkpoint included.
        max_seconds : float, optional
            Stop at the first end of an epoch after this time, measured from this call.
        standardize : bool, "full" or "again"
            At the first fit, put the weighted mean and standard deviation of the training rows into the `Affine` in front of the networks
            (behind the bounds; added if there is none, left alone if it is not the identity), and into that of the context. Likelihoods
            stay in the units of the data. Later fits keep it, or replace it with ``"again"``. With ``"full"`` a `Linear` behind it begins
            as the map that makes the columns uncorrelated, and is trained with the rest: for columns that nearly follow from each other.
        device : {"auto", "cpu", "cuda", "cuda:0", "cuda:1", ...}
            Where the steps are made; ``"auto"`` is the device of the flow, which stays where it is. A GPU holds all rows, and takes arrays
            of its own too, which are copied to the host once to be judged.
        seed : int, numpy.random.Generator or SeedSequence, optional
            For the validation split and the shuffling. None draws one, or takes that of the checkpoint which is resumed; it is found in
            ``flow.training["settings"]["seed"]``.
        checkpoint : path, optional
            File (.safetensors) for the state of the fit; `fastmaf.load` reads the best flow so far from it. One that exists is
            refused unless `resume` is set: a new fit replaces nothing.
        checkpoint_every : int or float
            Write it at the end of so many epochs, if it is an int, or at the first end of an epoch after so many seconds, if it is a
            float; and always when the fit ends, however it does.
        resume : bool
            Go on from `checkpoint` if it exists, to the same bits as an uninterrupted run. Data and arguments must be the same, but for
            `patience`, `max_seconds` and, unless the schedule is ``"cosine"``, `max_epochs`; a callable x or schedule is taken on trust.
        callback : callable, optional
            Called after each epoch with a mapping of epoch, train, validation (None without validation rows), lr, seconds, best_epoch and
            flow: the flow as it is in this epoch, made when it is looked at. A true result stops. It must leave the flow that is trained
            as it is.
        on_interrupt : {"raise", "return"}
            What follows Ctrl-C, once the best weights are kept and the checkpoint is written.
        progress : bool, optional
            Whether to show a bar; by default only if stderr is a terminal. The logger ``fastmaf`` gets a line in ten seconds at most:
            ``logging.basicConfig(level="INFO")`` shows them.
        comm : mpi4py.MPI.Comm, optional
            Processes that fit this flow together, all with the same arguments: each gives its share of the rows, or all of them the same
            arrays, and makes its part of each batch. All end with the same flow, as one process with all rows would to rounding.

        Returns
        -------
        History
            Also summed up in ``flow.training``.

        Raises
        ------
        ValueError
            If shapes do not fit; if data are not finite, not strictly inside their bounds, or constant in a column of `x`; if discrete
            data are no integers in range; if weights are negative or all zero; if an argument is out of range; if a batch norm would see
            batches of one row; if the checkpoint exists and is not to be resumed, or is that of another fit.
        RuntimeError
            If the flow is changed meanwhile, by the callback for instance; if the device is absent here, or its memory is not enough; if
            another rank fails, or says nothing for five minutes.

        Warns
        -----
        fastmaf.FitWarning
            If the loss was not finite or no epoch was better than the start; if the dtype cannot resolve a column; if data lie far from
            where the flow was standardised; if the weights leave few rows that count; if a flow of one variable can only be a Gaussian.

        Notes
        -----
        An exception in an epoch, in the callback or in a callable `x`, Ctrl-C among them, leaves the flow with the best weights so far
        and is raised. After Ctrl-C within an epoch its weights as they are count too; a second Ctrl-C does not wait for their score. A
        loss that is not finite stops the fit, with a warning, and is named in ``history.stopped``.

        With `comm` the rows of rank 0 come first, then those of rank 1, and so on. The flow of rank 0 is the one that is fitted. Rank 0
        alone warns, shows the bar, and writes and reads the checkpoint; each rank calls its own callback. What fails on one rank, or is
        interrupted there, ends the fit on all, with their best weights. Batch norms and GPUs are refused.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> x = np.random.default_rng(0).normal([1.0, -2.0], [0.5, 3.0], (500, 2))
        >>> flow = fastmaf.MAF(2, transforms=1, hidden_features=(8,))
        >>> history = flow.fit(x, max_epochs=3)
        >>> len(history.validation), history.stopped
        (3, 'max_epochs')
        """
        from fastmaf import train  # with its progress bar it takes longer to import than all else

        with train.ranks_of(comm) as ranks:
            before, names = self._record, _tables.names_of(x)
            if before.names is None and names is not None:
                self.names = names
            named = self._record
            try:
                return train.fit(
                    self,
                    x,
                    context,
                    weights,
                    validation=validation,
                    batch_size=batch_size,
                    optimizer=optimizer,
                    lr=lr,
                    schedule=schedule,
                    l2=l2,
                    weight_decay=weight_decay,
                    clip_norm=clip_norm,
                    patience=patience,
                    max_epochs=max_epochs,
                    max_seconds=max_seconds,
                    standardize=standardize,
                    device=device,
                    seed=seed,
                    checkpoint=checkpoint,
                    checkpoint_every=checkpoint_every,
                    resume=resume,
                    callback=callback,
                    on_interrupt=on_interrupt,
                    progress=progress,
                    ranks=ranks,
                )
            finally:
                if self._record is named:  # the data were refused
                    self._record = before

    # Files and words

    def save(self, path_or_file: str | os.PathLike[str] | IO[bytes]) -> None:
        """Write the flow to one .safetensors file; `fastmaf.load` reads it.

        Parameters
        ----------
        path_or_file : path or binary file
            A path is written under a temporary name and then renamed, so that it never holds half a flow.

        Examples
        --------
        >>> import fastmaf, io
        >>> file = io.BytesIO()
        >>> fastmaf.MAF(features=3).save(file)
        >>> fastmaf.load(file.getvalue()).features
        3
        """
        _files.save(_codec.to_bytes(*self._parts()), path_or_file)

    def _parts(self) -> tuple[FlowRecord, None]:
        """What files hold."""
        return self._record, None

    def __reduce__(self) -> Any:
        return _revived, (_codec.to_bytes(*self._parts()), *self._placement)

    def __repr__(self) -> str:
        groups = [(name, len(list(group))) for name, group in itertools.groupby(map(_describe, self.layers))]
        words = [name if times == 1 else f"{times} x {name}" for name, times in groups]
        context = f", context_features={self.context_features}" if self.context_features else ""
        device = f", device={self.device}" if self.device != "cpu" else ""
        return f"Flow(features={self.features}{context}, dtype={self.dtype}{device}): {' -> '.join([*words, _describe(self.base)])}"

    def summary(self) -> str:
        """A table of the layers, with what each does and how many weights it has.

        Returns
        -------
        str
            One line per layer; masked weights are not counted.

        Examples
        --------
        >>> import fastmaf
        >>> print(fastmaf.MADE(features=2, hidden_features=(3,)).summary())
        layer           what                                    weights
        Affine          2 columns                                     0
        Autoregressive  2 -> 3 -> 4, relu, exp_soft, order 0 1       16
        Normal          2 columns                                     0
        total           2 features, float32                          16
        """
        lines = [("layer", "what", "weights")]
        total = 0
        for prefix, record in [("context ", r) for r in self.context_layers] + [("", r) for r in (*self.layers, self.base)]:
            network = _networks.free(record) if isinstance(record, (Autoregressive, Terminal)) else None
            weights = sum(map(np.count_nonzero, trainable(network)))
            total += weights
            lines.append((prefix + type(record).__name__, _details(record), f"{weights:,}"))
        context = f", {self.context_features} context features" if self.context_features else ""
        device = f", on {self.device}" if self.device != "cpu" else ""
        lines.append(("total", f"{self.features} features{context}, {self.dtype}{device}", f"{total:,}"))
        first, second, third = (max(len(line[i]) for line in lines) for i in range(3))
        return "\n".join(f"{a:<{first}}  {b:<{second}}  {c:>{third}}" for a, b, c in lines)


def _revived(data: bytes, device: str, precision: str) -> Flow:
    """A flow that comes out of a pickle."""
    return Flow._of(_codec.from_bytes(data)[0], _here(device, precision))


def _here(device: str, precision: str) -> tuple[str, str]:
    """Where what comes out of a pickle goes: to its device, if that is here."""
    if device != "cpu":
        try:
            backends.placed(device, precision)
        except RuntimeError as error:
            warnings.warn(f"a flow of {device} is on the cpu now: {error}", RuntimeWarning, stacklevel=3)
            device = "cpu"
    return device, precision


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any], like: Any) -> Any:
    """Room for results, where the arrays that came in lie."""
    return like.empty(shape, dtype) if type(like) is _device.DeviceArray else _arrays.empty(shape, dtype)


def _framed(
    flow: Any,
    as_frame: str,
    out: Any,
    n: int,
    context: Any,
    seed: Seed,
    offset: int,
    context_offset: int,
    dtype: DTypeLike | None,
    within: _within.Within | None,
    max_tries: int,
) -> Any:
    """Samples of a flow or an ensemble as a data frame."""
    frame = _tables.framer("as_frame", as_frame, flow.names, flow.features)
    if out is not None:
        raise ValueError("as_frame makes a frame of its own, and out is given; leave one of them out")
    if context is not None:
        if _device.is_on_device("context", context):
            raise ValueError("context is a CUDA array; as_frame is for samples on the host: copy the context there first")
        context = _arrays.real("context", context)
        if context.ndim == 2 and len(context) == 1:
            context = context[0]
        if context.ndim == 2:
            raise ValueError(
                f"context has shape {_words.shapes(context.shape)}; a frame holds samples under one context, ({flow.context_features},): "
                "leave as_frame out, or draw under one after another"
            )
    return frame(flow.sample(n, context, seed, offset, context_offset, dtype=dtype, within=within, max_tries=max_tries))


def _impossible(x: Array, record: FlowRecord) -> Array | None:
    """Where rows have what is no value of its variable; None if nowhere."""
    if record.discrete == "bernoulli":
        possible = (x == 0) | (x == 1)
        return None if possible.all() else ~possible
    counts, bounds = np.array(record.values), record.layers[0] if record.layers else None
    with np.errstate(invalid="ignore"):
        if (x == np.floor(x)).all() and x.min() >= 0 and (x.reshape(-1, x.shape[-1]).max(axis=0) < counts).all():
            return None
        unknown = np.where(counts, ~((x >= 0) & (x < counts) & (x == np.floor(x))), ~np.isfinite(x))
        if isinstance(bounds, Elementwise):
            unknown |= (x <= bounds.lower) | (x >= bounds.upper)
    return unknown if unknown.any() else None


def _inside(record: FlowRecord) -> Array:
    """A row of values that its variables can have."""
    bounds = record.layers[0] if record.layers else None
    if not isinstance(bounds, Elementwise):
        return np.zeros(record.features)
    low, high = bounds.lower, bounds.upper
    with np.errstate(invalid="ignore"):
        inside = np.where(
            np.isfinite(low),
            np.where(np.isfinite(high), low / 2 + high / 2, low + np.maximum(1, abs(low))),
            np.where(np.isfinite(high), high - np.maximum(1, abs(high)), 0),
        )
    return np.asarray(inside)


def _drawing(
    record: FlowRecord, backend: backends.Backend, context: Array | None, seed: int, context_offset: int, dtype: np.dtype[Any]
) -> _within.Draw:
    """Draws samples of the counted stream under some of the contexts."""

    def draw(index: Array, group: Array) -> Array:
        rows = np.empty((len(index), record.features), dtype)
        if group[0] == group[-1] and index[-1] - index[0] == len(index) - 1:  # one context, which is folded in once
            own = context if context is None or context.ndim == 1 else context[group[0]]
            backend.sample(record, 1, len(index), own, seed, int(index[0]), int(group[0]) + context_offset, rows[None], None)
            return rows
        own = None if context is None else context if context.ndim == 1 else context[group]
        counters = index.astype(np.uint64), group.astype(np.uint64) + np.uint64(context_offset)
        backend.sample_rows(record, *counters, own, seed, rows)
        return rows

    return draw


def _check_continuous(record: FlowRecord, what: str) -> None:
    if record.discrete:
        raise ValueError(f"a flow with a {record.discrete} base has no {what}")


def _describe(record: Any) -> str:
    """A layer in a word."""
    if isinstance(record, (Autoregressive, Terminal)):
        widths = ", ".join(str(dense.bias.size) for dense in record.conditioner.hidden)
        law = record.law.kind if isinstance(record, Autoregressive) else record.conditional
        return f"{type(record).__name__}(({widths}), {record.conditioner.activation}, {law})"
    return type(record).__name__


def _details(record: Any) -> str:
    """A layer in a line."""
    if isinstance(record, (Autoregressive, Terminal)):
        net = record.conditioner
        widths = [record.ranks.size, *(dense.bias.size for dense in net.hidden), net.final.bias.size]
        law = record.law.kind if isinstance(record, Autoregressive) else record.conditional
        words = [" -> ".join(map(str, widths)), net.activation, law]
        if isinstance(record, Terminal) and law == "mixed":
            words[-1] += f" ({' '.join(str(count or '-') for count in record.values[:8])}{' ...' * (record.ranks.size > 8)})"
        words += ["residual"] * any(block.kind == "residual" for block in net.blocks) + ["direct"] * (net.skip is not None)
        words += ["reads noise"] * (isinstance(record, Autoregressive) and record.direction == "noise")
        order = np.argsort(record.ranks, kind="stable")
        shown = " ".join(map(str, order[:8])) + " ..." * (order.size > 8)
        return ", ".join([*words, f"order {shown}"])
    if isinstance(record, Elementwise):
        return ", ".join(f"{record.kinds.count(kind)} {kind}" for kind in dict.fromkeys(record.kinds))
    return f"{record.features if isinstance(record, Normal) else width_of('', record)} columns"
