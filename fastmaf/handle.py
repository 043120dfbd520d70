"""A flow for frameworks that train it themselves: its weights are set in place."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastmaf import _arrays, _gradients, _words, backends
from fastmaf._noise import NoiseGradients
from fastmaf.flow import Flow
from fastmaf.record import FlowRecord

__all__ = ["Handle"]

Array = NDArray[Any]
Wanted = Array | bool | None
"""A gradient: an array to fill, True for a new one, False or None to leave it out."""


class Handle:
    """A flow and weights of its own, which are set in place: for optimizers and samplers outside of fastmaf.

    `Flow.with_parameters` makes another flow, checked and packed anew. A handle keeps the packed one and rewrites its weights, if they have
    changed. Calls of several threads wait for each other; ``with handle:`` keeps others out for several calls. It pickles with its weights.

    Parameters
    ----------
    flow : Flow
        On the host. What is done to it later does not reach the handle.

    Attributes
    ----------
    size : int
        Number of parameters p.
    dtype : numpy.dtype
        Of all results.
    features, context_features : int
    version : int
        Counts how often the weights were changed.

    Raises
    ------
    ValueError
        If the flow is not on the host.
    NotImplementedError
        If the backend in use has no kernel for it.

    Examples
    --------
    >>> import fastmaf, numpy as np
    >>> flow = fastmaf.MAF(features=2, seed=0)
    >>> handle = fastmaf.Handle(flow)
    >>> handle.set_parameters(0.9 * flow.parameters())
    >>> x = np.zeros((3, 2))
    >>> np.array_equal(handle.log_prob(x), flow.with_parameters(0.9 * flow.parameters()).log_prob(x))
    True
    """

    def __init__(self, flow: Flow) -> None:
        if not isinstance(flow, Flow):
            raise ValueError(f"flow is of type {type(flow).__name__}; it must be a fastmaf.Flow")
        if flow.device != "cpu":
            raise ValueError(f"flow is on {flow.device}; a handle computes on the host: flow.to('cpu')")
        record: FlowRecord = flow.record
        self._record, self._lock, self.version = record, threading.RLock(), 0
        self._chosen = backends.choose()
        record.approve(self._chosen)
        self._backend = backends.own(self._chosen, record)
        self._noise: NoiseGradients | None = None
        self._noise_version = 0
        self._parameters = record.parameters()
        self.size, self.dtype = self._parameters.size, record.dtype
        self.features, self.context_features = record.features, record.context_features

    def __reduce__(self) -> Any:
        return Handle, (self.flow,)

    def __enter__(self) -> Handle:
        """Keep other threads waiting until the end of a `with`, so that they do not set weights in between."""
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def flow(self) -> Flow:
        """A flow with the weights as they are now."""
        return Flow._of(self._record.with_parameters(self.parameters()))

    # Weights

    def parameters(self) -> Array:
        """The weights, (p,), in the order of `Flow.parameters`; a copy, zero where masks leave them out."""
        with self._lock:
            return self._masked()

    def _masked(self) -> Array:
        return np.where(self._record.free_parameters(), self._parameters, np.zeros((), self.dtype))

    def set_parameters(self, parameters: ArrayLike) -> None:
        """Take other weights.

        Parameters
        ----------
        parameters : (p,) array
            In the order of `Flow.parameters`. Those that masks leave out have no effect.

        Raises
        ------
        ValueError
            If there are not p of them, or some are not finite in the dtype of the flow; the weights are as before then.
        """
        vector = _arrays.real("parameters", parameters)
        if vector.shape != (self.size,):
            raise ValueError(f"parameters has shape {_words.shapes(vector.shape)}; the flow has {self.size} parameters")
        with np.errstate(over="ignore"):
            vector = vector.astype(self.dtype, copy=False)
        with self._lock:
            if _same(vector, self._parameters):
                return
            if not (good := np.isfinite(vector)).all():
                good |= ~self._record.free_parameters()
                if not good.all():
                    count, first = np.count_nonzero(~good), int(good.argmin())
                    raise ValueError(f"parameters are not finite in {count} places, the first at {first}")
                vector = np.where(self._record.free_parameters(), vector, 0)
            self._parameters[:] = vector
            self.version += 1
            self._backend.set_parameters(self._parameters)

    # Evaluation

    def log_prob(self, x: ArrayLike, context: ArrayLike | None = None) -> Array:
        """As `Flow.log_prob`, but that results are NumPy arrays."""
        rows, contexts, shape = self._rows("x", x, context)
        result = np.empty(shape, self.dtype)
        if result.size:
            with self._lock:
                self._backend.log_prob(self._record, rows, contexts, result)
        return result

    def to_noise(self, x: ArrayLike, context: ArrayLike | None = None, *, log_det: bool = False) -> Any:
        """As `Flow.to_noise`."""
        return self._mapped("to_noise", "x", x, context, log_det)

    def from_noise(self, u: ArrayLike, context: ArrayLike | None = None, *, log_det: bool = False) -> Any:
        """As `Flow.from_noise`."""
        return self._mapped("from_noise", "u", u, context, log_det)

    def _mapped(self, operation: str, name: str, given: ArrayLike, context: ArrayLike | None, log_det: bool) -> Any:
        self._check_continuous()
        rows, contexts, shape = self._rows(name, given, context)
        result = np.empty((*shape, self.features), self.dtype)
        of_map = np.empty(shape, self.dtype) if log_det else None
        if result.size:
            with self._lock:
                getattr(self._backend, operation)(self._record, rows, contexts, result, of_map)
        _arrays.all_or_none(result, of_map if operation == "from_noise" else None)
        return result if of_map is None else (result, of_map)

    def sample(self, n: int, context: ArrayLike | None = None, seed: _arrays.Seed = None) -> Array:
        """As `Flow.sample`."""
        n = _arrays.count("n", n)
        contexts, c = _arrays.contexts(context, self.context_features, usual=self._record.usual_contexts)
        groups = (c,) if contexts is not None and contexts.ndim == 2 else ()
        result = np.empty((c, n, self.features), self.dtype)
        if result.size:
            with self._lock:
                self._backend.sample(self._record, c, n, contexts, _arrays.seed_or_fresh(seed), 0, 0, result, None)
        return result.reshape(*groups, n, self.features)

    # Gradients

    def vjp(
        self,
        x: ArrayLike,
        context: ArrayLike | None,
        cotangent: ArrayLike,
        *,
        dx: Wanted = True,
        dcontext: Wanted = True,
        dparameters: Wanted = True,
    ) -> tuple[Array | None, Array | None, Array | None]:
        """Gradients of ``sum(cotangent * log_prob(x, context))``, as `Flow.vjp`; each can be left out, which saves its time.

        Parameters
        ----------
        x, context, cotangent : arrays
            As in `Flow.vjp`.
        dx, dcontext, dparameters : array, bool or None
            C-contiguous arrays of the shapes of x, of the context and (p,), in the dtype of the flow, which are filled; True for new ones,
            False or None to leave a gradient out.

        Returns
        -------
        dx, dcontext, dparameters : arrays or None
            None where it is left out, without a context, and in x where variables are discrete.

        Raises
        ------
        ValueError
            If a shape or dtype does not fit.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> handle = fastmaf.Handle(fastmaf.MAF(features=3))
        >>> gradient = np.empty(handle.size, handle.dtype)
        >>> dx, _, filled = handle.vjp(np.zeros((5, 3)), None, np.ones(5), dx=False, dparameters=gradient)
        >>> dx is None, filled is gradient
        (True, True)
        """
        given = None if context is None else _arrays.real("context", context)
        rows, contexts, shape = self._rows("x", x, given)
        factor = _arrays.cotangents(cotangent, shape)
        inputs = [rows, contexts, factor]
        weights = _wanted("dparameters", dparameters, (self.size,), self.dtype, inputs)
        of_rows = None if self._record.discrete else _wanted("dx", dx, rows.shape, self.dtype, inputs)
        of_contexts = None if given is None else _wanted("dcontext", dcontext, given.shape, self.dtype, inputs)
        if weights is not None and not factor.size:
            weights[:] = 0
        with self._lock:
            _gradients.backward(
                self._backend,
                self._record,
                rows,
                contexts,
                shape,
                factor,
                weights,
                False if of_rows is None else of_rows,
                False if of_contexts is None or contexts is None else of_contexts.reshape(contexts.shape),
            )
        return of_rows, of_contexts, weights

    def to_noise_vjp(
        self,
        x: ArrayLike,
        context: ArrayLike | None,
        cotangent: ArrayLike,
        *,
        log_det: ArrayLike | None = None,
        dparameters: Wanted = True,
    ) -> tuple[Array, Array | None, Array | None]:
        """Gradients of ``sum(cotangent * to_noise(x, context))``, at the cost of one of log_prob.

        Parameters
        ----------
        x, context : arrays
            As in `Flow.to_noise`.
        cotangent : (n, D) or (c, n, D) array
            Of the shape of the noise.
        log_det : (n,) or (c, n) array, optional
            Cotangents of log|det| of the map, where that is a result too.
        dparameters : array, bool or None
            As in `vjp`.

        Returns
        -------
        dx, dcontext : arrays of the shapes of x and of the context
        dparameters : (p,) array or None

        Raises
        ------
        ValueError
            If a shape or dtype does not fit; if variables are discrete.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> handle = fastmaf.Handle(fastmaf.MAF(features=3))
        >>> handle.to_noise_vjp(np.zeros((5, 3)), None, np.ones((5, 3)))[0].shape
        (5, 3)
        """
        return self._noise_vjp("to_noise", x, context, cotangent, log_det, dparameters)

    def from_noise_vjp(
        self,
        x: ArrayLike,
        context: ArrayLike | None,
        cotangent: ArrayLike,
        *,
        log_det: ArrayLike | None = None,
        dparameters: Wanted = True,
    ) -> tuple[Array, Array | None, Array | None]:
        """Gradients of ``sum(cotangent * x)``, x = from_noise(u, context), in u, the context and the parameters: those of samples.

        By the implicit rule, in one pass backward over the ranks of each layer, at the cost of a gradient of log_prob (two with `log_det`).
        Backends other than "cpu" solve with the Jacobian of each row, at the cost of D + 3.

        Parameters
        ----------
        x : (n, D) or (c, n, D) array
            The rows that came out, not the noise.
        context, cotangent, log_det, dparameters
            As in `to_noise_vjp`; the cotangent has the shape of the rows.

        Returns
        -------
        du, dcontext, dparameters
            As in `to_noise_vjp`. Zero for rows that the noise cannot be told of.

        Raises
        ------
        ValueError
            If a shape or dtype does not fit; if variables are discrete.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> handle = fastmaf.Handle(fastmaf.MAF(features=3))
        >>> x = handle.sample(5, seed=0)
        >>> handle.from_noise_vjp(x, None, np.ones((5, 3)))[0].shape
        (5, 3)
        """
        return self._noise_vjp("from_noise", x, context, cotangent, log_det, dparameters)

    def _noise_vjp(
        self,
        operation: str,
        x: ArrayLike,
        context: ArrayLike | None,
        cotangent: ArrayLike,
        log_det: ArrayLike | None,
        dparameters: Wanted,
    ) -> tuple[Array, Array | None, Array | None]:
        self._check_continuous()
        given = None if context is None else _arrays.real("context", context)
        rows, contexts, shape = self._rows("x", x, given)
        factor = _arrays.cotangents(cotangent, (*shape, self.features), operation)
        of_map = None if log_det is None else _arrays.cotangents(log_det, shape, f"log|det| of {operation}")
        weights = _wanted("dparameters", dparameters, (self.size,), self.dtype, [rows, contexts, factor, of_map])
        flat = np.broadcast_to(rows, (*shape, self.features)).reshape(-1, self.features)
        beside = None
        if contexts is not None:
            beside = np.broadcast_to(contexts, (*shape, self.context_features)).reshape(-1, self.context_features)
        with self._lock:
            of_rows, of_contexts, of_weights = self._pulled(
                operation,
                flat,
                beside,
                factor.reshape(-1, self.features),
                None if of_map is None else of_map.reshape(-1),
                weights is not None,
            )
        assert of_rows is not None
        if weights is not None:
            weights[:] = of_weights if factor.size else 0
        dx = _summed(of_rows.reshape(*shape, self.features), rows.shape).astype(self.dtype)
        if of_contexts is None or contexts is None or given is None:
            return dx, None, weights
        own = _summed(of_contexts.reshape(*shape, self.context_features), contexts.shape)
        return dx, own.reshape(given.shape).astype(self.dtype), weights

    def _pulled(
        self, operation: str, x: Array, context: Array | None, cotangent: Array, log_det: Array | None, weighed: bool
    ) -> tuple[Array | None, ...]:
        """Gradients of a map, and of log|det| of it if that has cotangents, in rows, contexts and weights.

        log|det| of the map to the noise is, but for a constant, the log-density over a normal base + |noise|^2 / 2; that of the map from
        it is the negative of this at x.
        """
        weights = np.empty(self.size, self.dtype) if weighed else None
        if hasattr(self._backend, "from_noise_vjp") and (log_det is None or operation == "to_noise"):
            of_rows = np.empty(x.shape, self.dtype)
            of_contexts = None if context is None else np.empty(context.shape, self.dtype)
            factors: list[Array | None] = [np.ascontiguousarray(cotangent, self.dtype)]
            if operation == "to_noise":
                factors.append(None if log_det is None else np.ascontiguousarray(log_det, self.dtype))
            if x.size:
                getattr(self._backend, f"{operation}_vjp")(self._record, x, context, *factors, of_rows, of_contexts, weights)
            return of_rows, of_contexts, weights
        if log_det is None:
            return *getattr(self._by_densities(), operation)(x, context, cotangent, weights), weights
        if operation == "from_noise":
            of_map = self._pulled("to_noise", x, context, np.zeros_like(cotangent), -log_det, weighed)
            du, *rest = self._pulled("from_noise", x, context, cotangent + of_map[0], None, weighed)
            return du, *map(_sum, rest, of_map[1:])
        factor = np.ascontiguousarray(log_det, self.dtype)
        dx, dcontext = self._by_densities().density(x, context, factor, weights)
        at = np.empty(x.shape, self.dtype)
        if at.size:
            self._backend.to_noise(self._record, x, context, at)
        pulled = cotangent + np.where(np.isfinite(at), at, 0) * factor[:, None]
        return tuple(map(_sum, (dx, dcontext, weights), self._pulled("to_noise", x, context, pulled, None, weighed)))

    def _by_densities(self) -> NoiseGradients:
        """The gradients of the two maps on a backend that has those of the density alone."""
        if self._noise is None:
            self._noise, self._noise_version = NoiseGradients(self._chosen, self._record), -1
        if self._noise_version != self.version:
            self._noise.set_parameters(self._parameters)
            self._noise_version = self.version
        return self._noise

    def _rows(self, name: str, x: ArrayLike, context: ArrayLike | None) -> tuple[Array, Array | None, tuple[int, ...]]:
        record = self._record
        return _arrays.rows(name, x, context, record.features, record.context_features, names=record.names)

    def _check_continuous(self) -> None:
        if self._record.discrete:
            raise ValueError(f"a flow with a {self._record.discrete} base has no noise")


def _sum(a: Array | None, b: Array | None) -> Array | None:
    return None if a is None or b is None else a + b


def _wanted(name: str, wanted: Wanted, shape: tuple[int, ...], dtype: np.dtype[Any], inputs: list[Array | None]) -> Array | None:
    """Room for a gradient, apart from the inputs, to which it is added."""
    if wanted is None or wanted is False:
        return None
    room = np.empty(shape, dtype) if wanted is True else _arrays.output(wanted, shape, dtype, *inputs, name=name)
    inputs.append(room)
    return room


def _same(a: Array, b: Array) -> bool:
    """Whether two vectors are equal; known soon where training has changed all numbers."""
    few = 4096
    return bool((a[:few] == b[:few]).all() and (a[few:] == b[few:]).all())


def _summed(array: Array, shape: tuple[int, ...]) -> Array:
    """The array summed over the axes along which one of this shape was repeated."""
    own = (1,) * (array.ndim - len(shape)) + shape
    axes = tuple(k for k, (size, kept) in enumerate(zip(array.shape, own, strict=True)) if size != kept)
    result: Array = array.sum(axis=axes, keepdims=True).reshape(shape) if axes else array.reshape(shape)
    return result
