"""Flows in JAX: densities, samples and noise as functions that `jax.jit`, `jax.grad` and `jax.vmap` take, computed by fastmaf on the CPU.

>>> import jax, jax.numpy as jnp
>>> import fastmaf.jax
>>> flow = fastmaf.jax.Flow(fastmaf.MAF(features=3, context_features=2))
>>> gradient = jax.jit(jax.grad(lambda x: flow.log_prob(x, jnp.zeros(2)).sum()))
>>> gradient(jnp.zeros((5, 3))).shape
(5, 3)
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

try:
    import jax
    import jax.numpy as jnp
except ImportError as error:
    if error.name != "jax":  # something of that name is there
        raise
    raise ImportError("fastmaf.jax needs JAX, which is not installed: pip install jax") from None

from jax.custom_derivatives import SymbolicZero

from fastmaf import _words, backends
from fastmaf.flow import Flow as _Flow
from fastmaf.handle import Handle
from fastmaf.layers import Normal

__all__ = ["Flow"]

Array = Any  # of JAX
Host = NDArray[Any]


@jax.tree_util.register_static
class Flow:
    """A flow as functions of JAX.

    Its weights are constants. On the core they run as foreign functions of XLA, without Python; on the other backends Python is called
    back. An instance may be an argument of a jitted function, which is compiled anew for another one.

    Parameters
    ----------
    flow : fastmaf.Flow
        On the CPU; what is done to it later does not reach this one.

    Attributes
    ----------
    features, context_features : int
    dtype : numpy.dtype
        Of results: that of the flow, or float32 where JAX has no float64 (``jax_enable_x64``), though a flow in float64 computes in it.

    Raises
    ------
    ValueError
        If the flow is on a GPU, or is no flow.

    Notes
    -----
    Shapes are those of JAX: x (..., D) and context (..., C), whose leading axes broadcast; a row alone is (D,). There are first
    derivatives, forward and reverse for `log_prob`, reverse for the others; second ones raise a NotImplementedError.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> import fastmaf.jax
    >>> flow = fastmaf.jax.Flow(fastmaf.MAF(features=2))
    >>> x = flow.sample(jax.random.key(0), 100)
    >>> value, gradient = jax.vmap(jax.value_and_grad(flow.log_prob))(x)
    >>> value.shape, gradient.shape
    ((100,), (100, 2))
    """

    def __init__(self, flow: _Flow) -> None:
        self._handle = Handle(flow)
        record, self._flow = flow.record, self._handle.flow
        self.features, self.context_features = record.features, record.context_features
        self._discrete, self._own_dtype = record.discrete, record.dtype
        backend = backends.choose()
        self._key: int | None = None
        if backend.name == "cpu" and _register():
            from fastmaf import _core
            from fastmaf.backends.cpu import pack

            self._key = _core.xla_add(pack(record))
            weakref.finalize(self, _core.xla_remove, self._key)

    def __repr__(self) -> str:
        return f"fastmaf.jax.Flow(features={self.features}, context_features={self.context_features})"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of results."""
        return np.dtype(jax.dtypes.canonicalize_dtype(self._own_dtype))

    def log_prob(self, x: ArrayLike, context: ArrayLike | None = None) -> Array:
        """Log-density of rows, in nats.

        Parameters
        ----------
        x : (..., D) array
        context : (..., C) array, optional
            Its leading axes and those of x broadcast.

        Returns
        -------
        (...) array
            -inf at and outside of bounds, with a gradient of zero; NaN for a row with a NaN.

        Raises
        ------
        ValueError
            If a shape does not fit.
        """
        return _log_prob(self, *self._rows("x", x, context))

    def to_noise(self, x: ArrayLike, context: ArrayLike | None = None, *, log_det: bool = False) -> Array:
        """Noise of rows, (..., D), as `fastmaf.Flow.to_noise`; with `log_det` also log|det| of the map, (...), from the same pass."""
        return self._mapped("to_noise", "x", x, context, log_det)

    def from_noise(self, u: ArrayLike, context: ArrayLike | None = None, *, log_det: bool = False) -> Array:
        """Rows of noise, (..., D), as `fastmaf.Flow.from_noise`; with `log_det` also log|det| of the map, (...), from the same pass."""
        return self._mapped("from_noise", "u", u, context, log_det)

    def _mapped(self, operation: str, name: str, at: ArrayLike, context: ArrayLike | None, log_det: bool) -> Array:
        if self._discrete:
            raise ValueError(f"a flow with a {self._discrete} base has no noise")
        both = _mapped(self, operation, log_det, *self._rows(name, at, context))
        return both if log_det else both[0]

    def sample(self, key: Array, n: int, context: ArrayLike | None = None) -> Array:
        """Rows drawn from the flow, with a gradient to the context.

        Parameters
        ----------
        key : key of jax.random
        n : int
        context : (C,) or (c, C) array, optional

        Returns
        -------
        (n, D) or (c, n, D) array
            The contexts come first. `jax.vmap` over contexts with one key draws the same noise for each of them.

        Raises
        ------
        ValueError
            If a shape does not fit.
        """
        return self._drawn(key, n, context, False)[0]

    def sample_and_log_prob(self, key: Array, n: int, context: ArrayLike | None = None) -> tuple[Array, Array]:
        """Rows as of `sample`, and their log-density from the same pass, (n,) or (c, n); both constants for gradients."""
        rows, density = self._drawn(key, n, context, True)
        return rows, density

    def _drawn(self, key: Array, n: int, context: ArrayLike | None, density: bool) -> tuple[Array, ...]:
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 0:
            shown = _words.shown(n) if isinstance(n, (bool, int, np.integer)) else f"of type {type(n).__name__}"
            raise ValueError(f"n must be a number of rows, known when the function is traced; it is {shown}")
        given = self._context(context)
        if given is not None and given.ndim > 2:
            raise ValueError(f"context has shape {_words.shapes(given.shape)}; it must be (C,) or (c, C)")
        seed = jax.random.bits(key, (2,), jnp.uint32)
        return _drawn(self, int(n), density, seed, given)

    def _context(self, context: ArrayLike | None) -> Array:
        if context is None:
            if self.context_features:
                raise ValueError(f"context is missing; it has {self.context_features} columns")
            return None
        if not self.context_features:
            raise ValueError("the flow takes no context")
        return _numbers("context", context, self.context_features)

    def _rows(self, name: str, x: ArrayLike, context: ArrayLike | None) -> tuple[Array, Array]:
        """Rows, and contexts whose leading axes are the first of theirs."""
        rows, given = _numbers(name, x, self.features), self._context(context)
        if given is None:
            return rows, None
        own, outer = rows.shape[:-1], given.shape[:-1]
        try:
            whole = np.broadcast_shapes(own, outer)
        except ValueError:
            both = f"{name} has shape {_words.shapes(rows.shape)} and context {_words.shapes(given.shape)}"
            raise ValueError(f"{both}; their leading axes do not broadcast") from None
        rows = jnp.broadcast_to(rows, (*whole, self.features))
        groups = outer
        while groups[-1:] == (1,):  # (c, 1, C): one for each group of rows
            groups = groups[:-1]
        if len(outer) in (0, len(whole)) and whole[: len(groups)] == groups:
            return rows, given.reshape(*groups, self.context_features)
        return rows, jnp.broadcast_to(given, (*whole, self.context_features))


def _numbers(name: str, array: ArrayLike, width: int) -> Array:
    result = jnp.asarray(array)
    if jnp.issubdtype(result.dtype, jnp.complexfloating):
        raise ValueError(f"{name} has dtype {result.dtype}; it must be real")
    if result.dtype not in (jnp.float32, jnp.float64):
        wide = jnp.issubdtype(result.dtype, jnp.integer)
        result = result.astype(jax.dtypes.canonicalize_dtype(np.float64 if wide else np.float32))
    if result.ndim < 1 or result.shape[-1] != width:
        raise ValueError(f"{name} has shape {_words.shapes(result.shape)}; its last axis must be {width}")
    return result


# Calls of the core, or of Python


@functools.cache
def _register() -> bool:
    """Whether XLA takes the core's functions; once per process."""
    from fastmaf import _core

    try:
        for name, handler in _core.xla_handlers().items():
            jax.ffi.register_ffi_target(f"fastmaf_{name}", handler, platform="cpu")
    except Exception:  # another interface than the one that they were written for
        return False
    return True


def _call(flow: Flow, name: str, results: tuple[Any, ...], host: Callable[..., Any], *arguments: Array, **attributes: int) -> list[Array]:
    """The results of an operation."""
    given = [argument for argument in arguments if argument is not None]
    if flow._key is None:
        own: list[Array] = jax.pure_callback(host, list(results), *given, vmap_method="broadcast_all")
        return own
    call = jax.ffi.ffi_call(f"fastmaf_{name}", list(results), vmap_method="broadcast_all")
    every: list[Array] = call(*given, flow=np.int64(flow._key), **{key: np.int64(value) for key, value in attributes.items()})
    return every


def _flat(rows: Host, context: Host | None) -> tuple[Host, Host | None]:
    """Rows (n, D) and the context of each, (n, C)."""
    n = math.prod(rows.shape[:-1])
    if context is not None:
        groups = math.prod(context.shape[:-1])
        context = np.repeat(np.asarray(context).reshape(groups, -1), n // groups if groups else 0, axis=0)
    return np.asarray(rows).reshape(n, rows.shape[-1]), context


def _room(flow: Flow, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, flow.dtype)


def _given(host: Callable[..., tuple[Host, ...]], flow: Flow) -> Callable[..., list[Host]]:
    """A function of flat rows and contexts as one of arrays of JAX."""

    def call(rows: Host, context: Host | None = None) -> list[Host]:
        lead = rows.shape[:-1]
        return [np.asarray(result, flow.dtype).reshape((*lead, *result.shape[1:])) for result in host(*_flat(rows, context))]

    return call


# log_prob


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _log_prob(flow: Flow, x: Array, context: Array) -> Array:
    host = _given(lambda x, context: (flow._handle.log_prob(x, context),), flow)
    return _call(flow, "log_prob", (_room(flow, *x.shape[:-1]),), host, x, context)[0]


@functools.partial(_log_prob.defjvp, symbolic_zeros=True)
def _log_prob_jvp(flow: Flow, primals: Any, tangents: Any) -> Any:
    x, context = primals
    of_x, of_context = (tangent is not None and not isinstance(tangent, SymbolicZero) for tangent in tangents)
    if of_x and flow._discrete:
        raise ValueError(f"a flow with a {flow._discrete} base has no gradient in x, of which values are discrete")
    value, *gradients = _value_and_gradients(flow, of_x, of_context, x, context)
    total = jnp.zeros(value.shape, value.dtype)
    for array, tangent in zip((x, context), tangents, strict=True):
        if tangent is None or isinstance(tangent, SymbolicZero):
            continue
        gradient = gradients.pop(0).astype(array.dtype)
        beside = tangent.reshape(*tangent.shape[:-1], *(1,) * (gradient.ndim - tangent.ndim), tangent.shape[-1])
        total += (gradient * beside).sum(axis=-1).astype(value.dtype)
    return value, total


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _value_and_gradients(flow: Flow, of_x: bool, of_context: bool, x: Array, context: Array) -> list[Array]:
    """The density, and its gradients row by row."""
    lead = x.shape[:-1]
    results = [_room(flow, *lead)]
    results += [_room(flow, *lead, flow.features)] * of_x + [_room(flow, *lead, flow.context_features)] * of_context

    def host(x: Host, context: Host | None) -> tuple[Host, ...]:
        with flow._handle as handle:
            ones = np.ones(len(x), handle.dtype)
            gradients = handle.vjp(x, context, ones, dx=of_x, dcontext=of_context, dparameters=False)
            return handle.log_prob(x, context), *(array for array in gradients if array is not None)

    return _call(flow, "log_prob_and_grad", tuple(results), _given(host, flow), x, context, of_x=of_x, of_context=of_context)


@_value_and_gradients.defjvp
def _second(flow: Flow, of_x: bool, of_context: bool, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError("fastmaf.jax has first derivatives alone; these are second ones")


# Noise


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _mapped(flow: Flow, operation: str, log_det: bool, at: Array, context: Array) -> tuple[Array, ...]:
    lead = at.shape[:-1]

    def host(at: Host, context: Host | None) -> tuple[Host, ...]:
        result = getattr(flow._handle, operation)(at, context, log_det=log_det)
        return result if log_det else (result,)

    results = [_room(flow, *lead, flow.features), *[_room(flow, *lead)] * log_det]
    return tuple(_call(flow, operation, tuple(results), _given(host, flow), at, context))


def _mapped_forward(flow: Flow, operation: str, log_det: bool, at: Array, context: Array) -> Any:
    results = _mapped(flow, operation, log_det, at, context)
    return results, (at, results[0] if operation == "from_noise" else at, context)


def _mapped_backward(flow: Flow, operation: str, log_det: bool, residuals: Any, cotangents: Any) -> Any:
    given, x, context = residuals
    of_at, of_context = _noise_gradients(flow, operation, x, context, cotangents[0], cotangents[1] if log_det else None)
    return of_at.astype(given.dtype), None if context is None else of_context.astype(context.dtype)


_mapped.defvjp(_mapped_forward, _mapped_backward)


def _noise_gradients(flow: Flow, operation: str, x: Array, context: Array, of_rows: Array, of_log_det: Array) -> tuple[Array, Array]:
    """Gradients of a map in its rows and in the context, at rows x, by a call of Python."""
    arguments = [x, of_rows]
    arguments += [] if of_log_det is None else [of_log_det]
    arguments += [] if context is None else [context]
    shapes = [jax.ShapeDtypeStruct(x.shape, flow.dtype)]
    shapes += [] if context is None else [jax.ShapeDtypeStruct(context.shape, flow.dtype)]

    def host(x: Host, of_rows: Host, *rest: Host) -> list[Host]:
        others = list(rest)
        beside = None if of_log_det is None else np.asarray(others.pop(0)).reshape(-1)
        given = others.pop(0) if others else None
        flat, contexts = _flat(x, given)
        cotangent = np.asarray(of_rows).reshape(flat.shape)
        gradients = getattr(flow._handle, f"{operation}_vjp")(flat, contexts, cotangent, log_det=beside, dparameters=False)
        results = [np.asarray(gradients[0], flow.dtype).reshape(x.shape)]
        if given is not None:
            groups = math.prod(given.shape[:-1])
            shape = (groups, len(flat) // groups if groups else 0, flow.context_features)
            results.append(gradients[1].reshape(shape).sum(axis=1, dtype=np.float64).astype(flow.dtype).reshape(given.shape))
        return results

    result: list[Array] = jax.pure_callback(host, shapes, *arguments, vmap_method="broadcast_all")
    return result[0], result[1] if context is not None else None


# Samples


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _drawn(flow: Flow, n: int, density: bool, seed: Array, context: Array) -> tuple[Array, ...]:
    groups = () if context is None else context.shape[:-1]
    results = [_room(flow, *groups, n, flow.features), *[_room(flow, *groups, n)] * density]

    def host(seed: Host, context: Host | None = None) -> list[Host]:
        """`seed` (..., 2) and contexts of the same leading axes."""
        lead = seed.shape[:-1]
        seeds = np.asarray(seed, np.uint64).reshape(-1, 2)
        given = None if context is None else np.asarray(context).reshape(len(seeds), *context.shape[len(lead) :])
        rows = [
            flow._flow.sample_and_log_prob(n, None if given is None else given[i], seed=int(high) << 32 | int(low))
            for i, (high, low) in enumerate(seeds)
        ]
        return [np.asarray([row[k] for row in rows], flow.dtype).reshape((*lead, *rows[0][k].shape)) for k in range(1 + density)]

    return tuple(_call(flow, "sample", tuple(results), host, seed, context, n=n))


def _drawn_forward(flow: Flow, n: int, density: bool, seed: Array, context: Array) -> Any:
    results = _drawn(flow, n, density, seed, context)
    return results, (results[0], context)


def _drawn_backward(flow: Flow, n: int, density: bool, residuals: Any, cotangents: Any) -> Any:
    x, context = residuals
    if context is None:
        return None, None
    if density:
        return None, jnp.zeros_like(context)
    if not isinstance(flow._flow.base, Normal):
        raise NotImplementedError("samples have a gradient where the base is normal: those of a mixture or of discrete variables have none")
    return None, _noise_gradients(flow, "from_noise", x, context, cotangents[0], None)[1].astype(context.dtype)


_drawn.defvjp(_drawn_forward, _drawn_backward)
