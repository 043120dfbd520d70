"""Gradients of the two noise maps, by means of that of log_prob.

A flow gets one more layer at its noise end, which subtracts columns v that come as part of the context, one vector for each row::

    log_prob(x, [c, v]) = -|z(x, c) - v|^2 / 2 + log|dz/dx| + constant

so that half the difference between v and -v is v . z, and so are its gradients.  With v the unit vectors they give the Jacobian of a row,
and with that the inverse: dx = (dz/dx)^-1 (du - dz/dc dc - dz/dparameters dparameters).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmaf import _gradients, _networks, backends
from fastmaf.layers import Affine, Autoregressive, Conditioner, Dense, Elementwise, Law
from fastmaf.record import FlowRecord, trainable

__all__ = ["NoiseGradients"]

Array = NDArray[Any]

LENGTH = 1024.0
"""Of the vectors v, so that what cancels in the difference is small beside what is left."""


class NoiseGradients:
    """The gradients of `to_noise` and `from_noise` of one flow, with weights that are set in place.

    Parameters
    ----------
    backend : Backend
    flow : FlowRecord
        Of continuous variables.
    """

    def __init__(self, backend: backends.Backend, flow: FlowRecord) -> None:
        self._flow, self._features, self._contexts = flow, flow.features, flow.context_features
        self._extended, self._places = _extended(flow)
        self._extended.approve(backend)
        self._backend = backends.own(backend, self._extended)
        self._weights = self._extended.parameters()
        self._kept = self._places >= 0

    def set_parameters(self, parameters: Array) -> None:
        """Take other weights, those of the flow; zero where masks leave them out."""
        self._weights[self._kept] = parameters[self._places[self._kept]]
        self._backend.set_parameters(self._weights)

    def to_noise(self, x: Array, context: Array | None, cotangent: Array, dparameters: Array | None) -> tuple[Array, Array | None]:
        """Gradients of ``sum(cotangent * to_noise(x, context))`` in x and the context; `dparameters` is filled.

        Rows (n, D), contexts (n, C) and cotangents (n, D).
        """
        n = len(x)
        cotangent = cotangent.astype(np.float64)
        size = np.abs(cotangent).max(axis=1, initial=0)
        with np.errstate(invalid="ignore"):
            v = np.where(size[:, None] > 0, cotangent / np.where(size > 0, size, 1)[:, None], 0.0) * LENGTH
        dx, dcontext = self._differences(
            np.broadcast_to(x, (2, n, self._features)), context, np.stack([v, -v]), np.stack([size, -size]) / (2 * LENGTH), dparameters
        )
        return dx.sum(axis=0), None if dcontext is None else dcontext.sum(axis=0)

    def density(self, x: Array, context: Array | None, cotangent: Array, dparameters: Array | None) -> tuple[Array, Array | None]:
        """Gradients of ``sum(cotangent * (log|det| - |noise|^2 / 2))``, both of `to_noise`, whatever base the flow has; cotangents (n,)."""
        dx, dcontext = self._differences(x[None], context, np.zeros((1, len(x), self._features)), cotangent[None], dparameters)
        return dx[0], None if dcontext is None else dcontext[0]

    def from_noise(self, x: Array, context: Array | None, cotangent: Array, dparameters: Array | None) -> tuple[Array, Array | None]:
        """Gradients of ``sum(cotangent * from_noise(u, context))`` in u and the context, at the rows x that come out of it.

        Shapes as in `to_noise`.
        """
        du = self._solve(x, context, cotangent)
        if dparameters is None and context is None:
            return du, None
        _, dcontext = self.to_noise(x, context, -du, dparameters)
        return du, dcontext

    def _solve(self, x: Array, context: Array | None, cotangent: Array) -> Array:
        """Cotangents of the noise, from those of the rows: the transposed Jacobian inverted; zero for rows that have none."""
        d, n = self._features, len(x)
        result = np.zeros((n, d))
        v = np.concatenate([LENGTH * np.eye(d), np.zeros((1, d))])[:, None]
        step = max(1, _gradients.BUDGET // (8 * (d + 1) * (2 * d + self._contexts)))
        for rows in (slice(start, min(start + step, n)) for start in range(0, n, step)):
            own = x[rows]
            shape = (d + 1, len(own), d)
            slopes, _ = self._differences(
                np.broadcast_to(own, shape),
                None if context is None else context[rows],
                np.broadcast_to(v, shape),
                np.ones(shape[:2]),
                None,
                of_context=False,
            )
            jacobian = np.moveaxis((slopes[:d] - slopes[d]) / LENGTH, 0, 1)
            good = np.isfinite(jacobian).all(axis=(1, 2)) & jacobian.any(axis=2).all(axis=1)
            jacobian[~good] = np.eye(d)
            solved = np.linalg.solve(jacobian.swapaxes(1, 2), cotangent[rows, :, None].astype(np.float64))[..., 0]
            result[rows] = np.where(good[:, None], solved, 0)
        return result

    def _differences(
        self, x: Array, context: Array | None, v: Array, cotangent: Array, dparameters: Array | None, of_context: bool = True
    ) -> tuple[Array, Array | None]:
        """Gradients of the density of the extended flow, (k, n, D) and (k, n, C) in double, under each of k vectors v for each row."""
        k, n = cotangent.shape
        c = self._contexts
        both = np.empty((k, n, c + self._features), self._flow.dtype)
        if context is not None:
            both[..., :c] = context
        both[..., c:] = v
        weights = None if dparameters is None else np.zeros(self._weights.size, self._flow.dtype)
        _, dx, dcontext = _gradients.backward(
            self._backend, self._extended, x, both, (k, n), cotangent.astype(self._flow.dtype), weights, dcontext=of_context and c > 0
        )
        if dparameters is not None and weights is not None:
            dparameters[:] = 0
            dparameters[self._places[self._kept]] = weights[self._kept]
        assert dx is not None
        return dx.astype(np.float64), None if dcontext is None else dcontext[..., :c].astype(np.float64)


def _extended(flow: FlowRecord) -> tuple[FlowRecord, Array]:
    """The flow with D more columns of context, which a last layer subtracts from the noise.

    Returns
    -------
    FlowRecord
    places : (q,) array of int
        For each parameter of it the one of the flow that it is, or -1.
    """
    d, c = flow.features, flow.context_features
    places: list[Array] = [np.empty(0, np.int64)]
    position = 0

    def numbered(array: Array) -> Array:
        nonlocal position
        position += array.size
        return np.arange(position - array.size, position).reshape(array.shape)

    def widened(weight: Array, fill: float) -> Array:
        return np.concatenate([weight, np.full((len(weight), d), fill, weight.dtype)], axis=1)

    def extended(net: Conditioner) -> Conditioner:
        first = net.hidden[0] if net.hidden else net.final

        def extend(dense: Dense) -> Dense:
            places.extend([numbered(dense.weight).ravel(), numbered(dense.bias)])
            weight = dense.context_weight
            if weight is not None:
                places.append(widened(numbered(weight), -1).ravel())
                dense = replace(dense, context_weight=widened(weight, 0))
            elif dense is first:  # every network must look at a context
                places.append(np.full(dense.bias.size * (c + d), -1))
                dense = replace(dense, context="added", context_weight=np.zeros((dense.bias.size, c + d), dense.weight.dtype))
            if dense.context_bias is not None:
                places.append(numbered(dense.context_bias))
            return dense

        net = _networks.rebuilt(net, extend)
        if net.skip is not None:
            places.append(numbered(net.skip).ravel())
        return net

    layers: list[Any] = []
    for layer in flow.layers:
        if isinstance(layer, Autoregressive):
            layers.append(replace(layer, conditioner=extended(layer.conditioner)))
        else:
            layers.append(layer)
            places.extend(numbered(array).ravel() for array in trainable(layer))
    # All variables of one rank: their network sees the context alone.
    shift = np.zeros((2 * d, c + d))
    shift[::2, c:] = np.eye(d)
    last = Conditioner(None, (), Dense(np.zeros((2 * d, d)), np.zeros(2 * d), context="added", context_weight=shift), "relu", False)
    layers.append(Autoregressive(np.ones(d, np.int64), last, Law("exp")))
    places.append(np.full(sum(array.size for array in trainable(layers[-1])), -1))
    context_layers: list[Elementwise | Affine] = []
    for own in flow.context_layers:
        if isinstance(own, Elementwise):
            ends = np.full(d, np.inf)
            context_layers.append(
                Elementwise((*own.kinds, *["identity"] * d), np.concatenate([own.lower, -ends]), np.concatenate([own.upper, ends]))
            )
        else:
            context_layers.append(Affine(np.concatenate([own.loc, np.zeros(d)]), np.concatenate([own.scale, np.ones(d)])))
    record = FlowRecord(layers, features=d, context_features=c + d, context_layers=context_layers, dtype=flow.dtype)
    return record, np.concatenate(places)
