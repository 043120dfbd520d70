"""The NumPy backend: the definition of every operation.

A layer is a function from rows and contexts to its results, the log det of each row, and a pullback: a function that takes the gradients
in the results and in the log dets to those in what went in.  Rows run through all layers in chunks.  Samplers evaluate a network once per
rank: where the variables of lower rank are known, so are the parameters of the next ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmaf import _random, masks
from fastmaf.backends import Part
from fastmaf.layers import Affine, Autoregressive, BatchNorm, Block, Conditioner, Dense, Elementwise, Law, Linear, Permutation, Terminal
from fastmaf.record import FlowRecord, trainable

__all__ = ["backend", "free"]

Array = NDArray[Any]
Weights = Sequence[Sequence[Array]]
Statistics = Sequence[tuple[Array, Array]]
Pull = Callable[[Array, Array], Array]
Passed = tuple[Array, Array, Pull]
Learned = tuple[Array, Array, Callable[[Array, Array], tuple[Array, Any, list[Array]]]]

BUDGET = 1 << 21
"""Numbers that a chunk of rows may hold in the units of all layers."""

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def _sigmoid(x: Array) -> Array:
    tail = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + tail), tail / (1 + tail))


def _normal_cdf(x: Array) -> Array:
    values = [0.5 * math.erfc(v) for v in (-math.sqrt(0.5) * x).ravel().tolist()]
    return np.array(values, x.dtype).reshape(x.shape)


def _normal_pdf(x: Array) -> Array:
    return np.asarray(np.exp(-0.5 * x * x - HALF_LOG_2PI))


def _log_sum_exp(x: Array) -> Array:
    """Over the last axis, which stays."""
    highest = x.max(axis=-1, keepdims=True)
    highest = np.where(np.isneginf(highest), 0, highest)
    return np.asarray(highest + np.log(np.exp(x - highest).sum(axis=-1, keepdims=True)))


def _softmax(x: Array) -> Array:
    """Over the last axis. Not by way of `_log_sum_exp`: beside a large term the logarithm of the sum would be lost."""
    terms = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(terms / terms.sum(axis=-1, keepdims=True))


def _activate(kind: str, h: Array) -> Array:
    """NaN stays NaN."""
    if kind == "relu":
        return np.where(h < 0, 0, h)
    if kind == "tanh":
        return np.asarray(np.tanh(h))
    if kind == "elu":
        return np.where(h > 0, h, np.expm1(np.minimum(h, 0)))
    return h * (_normal_cdf(h) if kind == "gelu" else _sigmoid(h))


def _slope(kind: str, h: Array) -> Array:
    """The derivative of `_activate`."""
    if kind == "relu":
        return (h > 0).astype(h.dtype)
    if kind == "tanh":
        return 1 - np.tanh(h) ** 2
    if kind == "elu":
        return np.exp(np.minimum(h, 0))
    slope: Array = _normal_cdf(h) + h * _normal_pdf(h) if kind == "gelu" else _sigmoid(h) * (1 + h * _sigmoid(-h))
    return slope


def _log_scale(law: Law, r: Array) -> tuple[Array, Array]:
    """Logarithm of the scale s, and its derivative, at raw log-scales r."""
    constants = law.constants
    if law.kind == "exp":
        return r, np.ones_like(r)
    if law.kind == "exp_soft":
        bend = 1 / (1 + np.abs(r) / constants["clip"])
        return r * bend, bend * bend
    if law.kind == "softplus":
        s = np.logaddexp(0, r).astype(r.dtype) + constants["eps"]
        return np.log(s), _sigmoid(r) / s
    if law.kind == "sigmoid":
        r = r + constants["shift"]
        s = _sigmoid(r) + constants["eps"]
        return np.log(s), _sigmoid(r) * _sigmoid(-r) / s
    if law.kind == "log_precision":
        half = -0.5 if law.form == "standardize" else 0.5
        return half * r, np.full_like(r, half)
    low, high = constants["low"], constants["high"]
    return np.clip(r, low, high), ((r > low) & (r < high)).astype(r.dtype)


def _to_noise(law: Law, x: Array, shift: Array, a: Array) -> tuple[Array, Array]:
    """By the law, given log-scales a: z, and log|dz/dx|."""
    return ((x - shift) * np.exp(-a), -a) if law.form == "standardize" else (x * np.exp(a) + shift, a)


def _to_data(law: Law, z: Array, shift: Array, a: Array) -> tuple[Array, Array]:
    """By the law, given log-scales a: x, and log|dz/dx|."""
    return (z * np.exp(a) + shift, -a) if law.form == "standardize" else ((z - shift) * np.exp(-a), a)


def _total(log_slopes: Array) -> Array:
    """Sums over columns, in double."""
    return np.asarray(log_slopes.sum(axis=1, dtype=np.promote_types(log_slopes.dtype, np.float64)))


# Layers without a network: (layer, x) -> z, log det, pullback, and (layer, z) -> x, log det of the way to z


def _elementwise(layer: Elementwise, x: Array) -> Passed:
    """Rows at or outside a bound go on as zeros, with log det -inf and gradient 0."""
    from_lower, from_upper, logit = _bounded(layer)
    lower, upper = layer.lower.astype(x.dtype), layer.upper.astype(x.dtype)
    below, above = np.where(from_lower, x - lower, 1), np.where(from_upper, upper - x, 1)
    z = np.where(from_lower | from_upper, np.log(below) - np.log(above), x)
    log_det = _total(np.where(logit, np.log(upper - lower), 0) - np.log(below) - np.log(above))
    outside = ((below <= 0) | (above <= 0) | np.isinf(below) | np.isinf(above)).any(axis=1)
    z[outside], log_det[outside] = 0, -np.inf

    def pull(dz: Array, g: Array) -> Array:
        up, down = np.where(from_lower, 1 / below, 0), np.where(from_upper, 1 / above, 0)
        dx: Array = np.where(from_lower | from_upper, dz * (up + down), dz) + g[:, None] * (down - up)
        dx[outside] = 0
        return dx

    return z, log_det, pull


def _elementwise_inverse(layer: Elementwise, z: Array) -> tuple[Array, Array]:
    from_lower, from_upper, logit = _bounded(layer)
    lower, upper = layer.lower.astype(z.dtype), layer.upper.astype(z.dtype)
    tail = np.exp(-np.abs(z))
    step = (upper - lower) * (tail / (1 + tail))
    x = np.where(from_lower, lower + np.exp(z), np.where(from_upper, upper - np.exp(-z), z))
    log_slope = np.where(from_lower, -z, np.where(from_upper, z, 0))
    x = np.where(logit, np.where(z < 0, lower + step, upper - step), x)
    log_slope = np.where(logit, np.abs(z) + 2 * np.log1p(tail) - np.log(upper - lower), log_slope)
    return _inside(layer, x), _total(log_slope)


def _bounded(layer: Elementwise) -> tuple[Array, Array, Array]:
    """Which columns have a lower bound, an upper bound, and both."""
    kinds = np.array(layer.kinds)
    return np.isin(kinds, ("logit", "log_above")), np.isin(kinds, ("logit", "log_below")), kinds == "logit"


def _inside(layer: Elementwise, x: Array) -> Array:
    """The nearest values strictly inside the bounds."""
    low, high = layer.inner_range(x.dtype)
    return np.clip(x, low, high)


def _affine(layer: Affine, x: Array) -> Passed:
    loc, scale = layer.loc.astype(x.dtype), layer.scale.astype(x.dtype)
    return (x - loc) * scale, np.full(len(x), np.log(np.abs(layer.scale)).sum()), lambda dz, g: dz * scale


def _affine_inverse(layer: Affine, z: Array) -> tuple[Array, Array]:
    return z / layer.scale.astype(z.dtype) + layer.loc.astype(z.dtype), np.full(len(z), np.log(np.abs(layer.scale)).sum())


def _permutation(layer: Permutation, x: Array) -> Passed:
    return x[:, layer.perm], np.zeros(len(x)), lambda dz, g: dz[:, np.argsort(layer.perm)]


def _permutation_inverse(layer: Permutation, z: Array) -> tuple[Array, Array]:
    return z[:, np.argsort(layer.perm)], np.zeros(len(z))


# Layers with weights of their own: (layer, weights, x, ...) -> z, log det, and a pullback to x, to the contexts (0) and to the weights


def _batch_norm(layer: BatchNorm, weights: Sequence[Array], x: Array, statistics: tuple[Array, Array], shares: Array | None) -> Learned:
    """With the mean and variance given, or with those of the rows if they have `shares`, which sum to 1."""
    log_gamma, beta = weights
    if shares is not None:
        share = shares[:, None]
        mean = (share * x).sum(axis=0)
        statistics = mean, (share * (x - mean) ** 2).sum(axis=0)
    mean, var = (moment.astype(x.dtype) for moment in statistics)
    spread, gamma = np.sqrt(var + layer.eps), np.exp(log_gamma)
    scale, log_det = gamma / spread, (log_gamma - 0.5 * np.log(var + layer.eps)).sum(dtype=np.float64)

    def pull(dz: Array, g: Array) -> tuple[Array, Any, list[Array]]:
        normed = (x - mean) / spread
        dnormed = (dz * normed).sum(axis=0)
        gradients = [gamma * dnormed + g.sum(), dz.sum(axis=0)]
        if shares is None:
            return dz * scale, 0, gradients
        through = gamma * gradients[1] + normed * gradients[0]
        return dz * scale - (share * through / spread).astype(x.dtype), 0, gradients

    return (x - mean) * scale + beta, np.full(len(x), log_det), pull


def _batch_norm_inverse(layer: BatchNorm, z: Array) -> tuple[Array, Array]:
    scale = np.exp(layer.log_gamma) / np.sqrt(layer.var + layer.eps)
    log_det = (layer.log_gamma - 0.5 * np.log(layer.var + layer.eps)).sum(dtype=np.float64)
    return (z - layer.beta) / scale + layer.mean, np.full(len(z), log_det)


def _linear(weights: Sequence[Array], x: Array) -> Learned:
    lower, upper, bias = weights
    lower, upper = np.tril(lower, -1) + np.eye(len(bias), dtype=x.dtype), np.triu(upper)
    between = x @ upper.T

    def pull(dz: Array, g: Array) -> tuple[Array, Any, list[Array]]:
        dbetween = dz @ lower
        slopes = dbetween.T @ x + np.diag(g.sum() / np.diagonal(upper))
        return dbetween @ upper, 0, [np.tril(dz.T @ between, -1), np.triu(slopes), dz.sum(axis=0)]

    log_det = np.log(np.abs(np.diagonal(upper))).sum(dtype=np.float64)
    return between @ lower.T + bias, np.full(len(x), log_det), pull


def _linear_inverse(layer: Linear, z: Array) -> tuple[Array, Array]:
    lower = np.tril(layer.lower, -1) + np.eye(len(layer.bias), dtype=z.dtype)
    x = np.linalg.solve(np.triu(layer.upper), np.linalg.solve(lower, (z - layer.bias).T)).T
    return x, np.full(len(z), np.log(np.abs(np.diagonal(layer.upper))).sum(dtype=np.float64))


FORWARD: dict[type, Callable[[Any, Array], Passed]] = {
    Elementwise: _elementwise,
    Affine: _affine,
    Permutation: _permutation,
}
INVERSE: dict[type, Callable[[Any, Array], tuple[Array, Array]]] = {
    Elementwise: _elementwise_inverse,
    Affine: _affine_inverse,
    BatchNorm: _batch_norm_inverse,
    Linear: _linear_inverse,
    Permutation: _permutation_inverse,
}


# Networks.  A pullback gives the gradients in the units, in the contexts, and in the weights, in the order of `trainable`

Back = Callable[[Array], tuple[Array, Any, list[Array]]]


def _weights(net: Conditioner) -> list[Array]:
    """The trainable arrays of a network, in the order of `Flow.parameters`."""
    return list(trainable(net))


def _masks(net: Conditioner, ranks: Array, rows: Sequence[int]) -> Iterator[Array | bool]:
    """Which entries of `_weights` are free; `rows` of the final map for each variable."""
    reads, outputs = ranks, np.repeat(ranks, rows)[:, None]
    for dense in (*net.hidden, net.final):
        yield outputs > reads if dense.degrees is None or dense is net.final else masks.hidden_mask(dense.degrees, reads)
        yield from (True,) * (1 + (dense.context_weight is not None) + (dense.context_bias is not None))
        reads = dense.degrees if dense.degrees is not None else reads
    if net.skip is not None:
        yield outputs > ranks


def free(record: Any) -> Iterator[Array | bool]:
    """Which entries of the arrays of `trainable` no mask and no triangle holds at zero."""
    if isinstance(record, BatchNorm):
        yield from (True, True)
    elif isinstance(record, Linear):
        square = np.ones(record.lower.shape, bool)
        yield from (np.tril(square, -1), np.triu(square), True)
    elif isinstance(record, (Autoregressive, Terminal)):
        rows = record.rows if isinstance(record, Terminal) else (Law.parameters,) * record.ranks.size
        yield from _masks(record.conditioner, record.ranks, rows)


def _dense(dense: Dense, take: Iterator[Array], activation: str, active: bool, h: Array, c: Array) -> tuple[Array, Back]:
    """One map of a network, with the norm, and if `active` the activation, in front of it."""
    weight, bias = next(take), next(take)
    normed = h if dense.norm_scale is None or dense.norm_shift is None else h * dense.norm_scale + dense.norm_shift
    inputs = _activate(activation, normed) if active else normed
    y = inputs @ weight.T + bias
    if dense.context_weight is not None:
        context_weight = next(take)
        t = c @ context_weight.T + (0 if dense.context_bias is None else next(take))
    own = y
    if dense.context == "added":
        y = y + t
    elif dense.context == "activated":
        y = y + _activate(activation, t)
    elif dense.context == "gated":
        y = y * _sigmoid(t)

    def pull(dy: Array) -> tuple[Array, Any, list[Array]]:
        dt, dc = dy, None
        if dense.context == "activated":
            dt = dy * _slope(activation, t)
        elif dense.context == "gated":
            dt, dy = dy * own * _sigmoid(t) * _sigmoid(-t), dy * _sigmoid(t)
        gradients = [dy.T @ inputs, dy.sum(axis=0)]
        if dense.context_weight is not None:
            dc = dt @ context_weight
            gradients += [dt.T @ c] + [dt.sum(axis=0)] * (dense.context_bias is not None)
        dh = dy @ weight
        if active:
            dh = dh * _slope(activation, normed)
        return dh if dense.norm_scale is None else dh * dense.norm_scale, 0 if dc is None else dc, gradients

    return y, pull


def _block(block: Block, take: Iterator[Array], activation: str, h: Array, c: Array) -> tuple[Array, Back]:
    y, first = _dense(block.maps[0], take, activation, block.kind in ("plain", "residual"), h, c)
    if not block.residual:
        return y, first
    y, second = _dense(block.maps[1], take, activation, True, y, c)

    def pull(dy: Array) -> tuple[Array, Any, list[Array]]:
        dh, dc, later = second(dy)
        dh, dc_first, gradients = first(dh)
        return dy + dh, dc + dc_first, gradients + later

    return h + y, pull


def _network(layer: Autoregressive | Terminal, weights: Sequence[Array], x: Array, c: Array) -> tuple[Array, Back]:
    """The parameters of all variables, (n, rows of the final map)."""
    net, take = layer.conditioner, iter(weights)
    given, x = x, x if net.input_clip is None else np.clip(x, -net.input_clip, net.input_clip)
    h, steps = x, []
    if net.initial is not None:
        h, pull = _dense(net.initial, take, net.activation, False, h, c)
        steps.append(pull)
    for block in net.blocks:
        h, pull = _block(block, take, net.activation, h, c)
        steps.append(pull)
    y, pull = _dense(net.final, take, net.activation, net.final_activation and net.initial is not None, h, c)
    steps.append(pull)
    skip = None if net.skip is None else next(take)
    if skip is not None:
        y = y + x @ skip.T

    def back(dy: Array) -> tuple[Array, Any, list[Array]]:
        dx, dc, gradients = dy, 0, [] if skip is None else [dy.T @ x]
        for step in reversed(steps):
            dx, dc_here, here = step(dx)
            dc, gradients = dc + dc_here, here + gradients
        gradients = [np.where(own, gradient, 0) for own, gradient in zip(free(layer), gradients, strict=True)]
        dx = dx if skip is None else dx + dy @ skip
        return np.where(x == given, dx, 0), dc, gradients

    return y, back


def _autoregressive(layer: Autoregressive, weights: Sequence[Array], x: Array, c: Array) -> Learned:
    """From data to noise; the pullback gives the gradients in x, in the contexts and in the weights."""
    reads_noise = layer.direction == "noise"
    if reads_noise:
        z, log_det = _by_rank(layer, weights, x, c, _to_noise)
    parameters, back = _network(layer, weights, z if reads_noise else x, c)
    shift, (a, slope) = parameters[:, 0::2], _log_scale(layer.law, parameters[:, 1::2])
    if not reads_noise:
        z, log_slope = _to_noise(layer.law, x, shift, a)
        log_det = _total(log_slope)

    def law(dz: Array, g: Array) -> tuple[Array, Array]:
        """The gradients in x, beside the network, and in the parameters."""
        d = np.empty_like(parameters)
        if layer.law.form == "standardize":
            direct = dz * np.exp(-a)
            d[:, 0::2], d[:, 1::2] = -direct, (-dz * z - g[:, None]) * slope
        else:
            direct = dz * np.exp(a)
            d[:, 0::2], d[:, 1::2] = dz, (direct * x + g[:, None]) * slope
        return direct, d

    def pull(dz: Array, g: Array) -> tuple[Array, Any, list[Array]]:
        if not reads_noise:
            direct, d = law(dz, g)
            dx, dc, gradients = back(d)
            return direct + dx, dc, gradients
        through = np.zeros_like(dz)  # what the network gives z: that of a rank is known once the parameters of all higher ranks are
        for rank in np.unique(layer.ranks)[::-1]:
            _, d = law(dz + through, g)
            d[:, np.repeat(layer.ranks <= rank, 2)] = 0
            own = layer.ranks == rank
            through[:, own] = back(d)[0][:, own]
        direct, d = law(dz + through, g)
        return direct, *back(d)[1:]

    return z, log_det, pull


def _autoregressive_inverse(layer: Autoregressive, weights: Sequence[Array], z: Array, c: Array) -> tuple[Array, Array]:
    if layer.direction == "data":
        return _by_rank(layer, weights, z, c, _to_data)
    parameters, _ = _network(layer, weights, z, c)
    x, log_slope = _to_data(layer.law, z, parameters[:, 0::2], _log_scale(layer.law, parameters[:, 1::2])[0])
    return x, _total(log_slope)


def _by_rank(layer: Autoregressive, weights: Sequence[Array], given: Array, c: Array, solve: Callable[..., Any]) -> tuple[Array, Array]:
    """Solve for the side that the network reads, rank by rank; the columns yet to come are zero."""
    found, log_slope = np.zeros_like(given), np.zeros_like(given)
    for rank in np.unique(layer.ranks):
        own = np.flatnonzero(layer.ranks == rank)
        parameters, _ = _network(layer, weights, found, c)
        a, _ = _log_scale(layer.law, parameters[:, 2 * own + 1])
        found[:, own], log_slope[:, own] = solve(layer.law, given[:, own], parameters[:, 2 * own], a)
    return found, _total(log_slope)


# Bases: the log-density of rows, in double, and a pullback of its gradient to the rows, to the contexts and to the weights

Based = tuple[Array, Callable[[Array], tuple[Array, Any, list[Array]]]]


def _base(flow: FlowRecord, weights: Sequence[Array], z: Array, c: Array) -> Based:
    if isinstance(flow.base, Terminal):
        return _terminal(flow.base, weights, z, c)
    wide = z.astype(np.promote_types(z.dtype, np.float64))  # squares do not overflow there
    return -0.5 * _total(wide * wide) - flow.features * HALF_LOG_2PI, lambda g: (-z * g[:, None], 0, [])


def _terminal(base: Terminal, weights: Sequence[Array], x: Array, c: Array) -> Based:
    """Rows with a value that a discrete variable does not have go on as zeros, with log-probability -inf and gradient 0."""
    unknown, counts = np.zeros(len(x), bool), np.array(base.values)
    if counts.any():
        known = (counts == 0) | ((x >= 0) & (x < counts) & (x == np.floor(x)))
        unknown = (~known).any(axis=1) & ~np.isnan(x).any(axis=1)
        x = np.where(unknown[:, None], 0, x)
    parameters, back = _network(base, weights, x, c)
    if base.conditional == "mixture":
        values, slopes = _mixture_log_prob(base, parameters, x)
    elif base.conditional == "bernoulli":
        values, slopes = -np.logaddexp(0, np.where(x == 0, parameters, -parameters)), lambda: (x - _sigmoid(parameters), np.zeros_like(x))
    else:
        values, slopes = _mixed_log_prob(base, parameters, x)
    value = np.where(unknown, -np.inf, _total(values))

    def pull(g: Array) -> tuple[Array, Any, list[Array]]:
        g = np.where(np.isneginf(value), 0, g).astype(x.dtype)[:, None]
        dparameters, direct = slopes()
        dx, dc, gradients = back(g * dparameters)
        return g * direct + dx, dc, gradients

    return value, pull


Slopes = Callable[[], tuple[Array, Array]]


def _mixed_log_prob(base: Terminal, parameters: Array, x: Array) -> tuple[Array, Slopes]:
    """Log-densities of variables with any number and log-probabilities of others, (n, D), and their derivatives likewise."""
    values, slopes, direct = np.empty_like(x), np.empty_like(parameters), np.zeros_like(x)
    for j, (own, count) in enumerate(zip(_parts(base), base.values, strict=True)):
        if not count:
            values[:, j : j + 1], of_mixture = _mixture_log_prob(base, parameters[:, own], x[:, j : j + 1])
            slopes[:, own], direct[:, j : j + 1] = of_mixture()
            continue
        logits = parameters[:, own]
        log_p = logits - _log_sum_exp(logits)
        chosen = np.arange(count) == x[:, j, None]
        values[:, j] = np.where(np.isnan(x[:, j]), np.nan, np.where(chosen, log_p, 0).sum(axis=1))
        slopes[:, own] = chosen - _softmax(logits)
    return values, lambda: (slopes, direct)


def _parts(base: Terminal) -> list[slice]:
    """The rows of each variable."""
    first = np.cumsum((0, *base.rows))
    return [slice(*ends) for ends in zip(first, first[1:], strict=False)]


def _mixture_log_prob(base: Terminal, parameters: Array, x: Array) -> tuple[Array, Slopes]:
    """Log-densities (n, D), and their derivatives in the parameters and, at fixed parameters, in x."""
    logits, shift, a, slope = _mixture(base, parameters)
    log_p = logits - _log_sum_exp(logits)
    z = (x[:, :, None] - shift) * np.exp(-a)
    terms = log_p - a - 0.5 * z * z - HALF_LOG_2PI
    values = _log_sum_exp(terms)

    def slopes() -> tuple[Array, Array]:
        share = _softmax(terms)
        pull = np.where(share == 0, 0, share * z)
        up = pull * np.exp(-a)
        by_log_scale = np.where(share == 0, 0, pull * z - share) * slope
        return np.stack([share - _softmax(logits), up, by_log_scale], axis=2).reshape(parameters.shape), -up.sum(axis=2)

    return values[:, :, 0], slopes


def _mixture(base: Terminal, parameters: Array) -> tuple[Array, Array, Array, Array]:
    """Logits, shifts, log-scales and the derivatives of these, (n, D, components) each, for the variables whose parameters are given."""
    logits, shift, r = np.moveaxis(
        parameters.reshape(len(parameters), parameters.shape[1] // (3 * base.components), 3, base.components), 2, 0
    )
    return logits, shift, *_log_scale(Law(base.law, constants=base.constants), r)


def _draw(base: Terminal, noise: Array, uniforms: Array, c: Array) -> Array:
    """Rows of a terminal MADE, rank by rank: a component or value from a uniform number, and the Gaussian of a component from the noise."""
    x, parts, weights = np.zeros_like(noise), _parts(base), list(trainable(base))
    for rank in np.unique(base.ranks):
        parameters, _ = _network(base, weights, x, c)
        for j in np.flatnonzero(base.ranks == rank):
            own, count = parameters[:, parts[j]], base.values[j]
            if base.conditional == "bernoulli":
                own = np.concatenate([np.zeros_like(own), own], axis=1)
            logits = own if count else own[:, : base.components]
            cumulative = np.cumsum(np.exp((logits - _log_sum_exp(logits)).astype(np.float64)), axis=1)
            choice = (cumulative[:, :-1] <= uniforms[:, j, None]).sum(axis=1)
            if not count:
                _, shift, a, _ = (part[np.arange(len(x)), 0, choice] for part in _mixture(base, own))
                x[:, j] = noise[:, j] * np.exp(a) + shift
            else:
                x[:, j] = np.where(np.isnan(cumulative[:, -1]), np.nan, choice)
    return x


# Flows


def _all_weights(flow: FlowRecord, vector: Array | None = None) -> Weights:
    """The trainable arrays of each layer and of the base: their own, or views of a vector in the order of `Flow.parameters`."""
    own = [list(trainable(record)) for record in (*flow.layers, flow.base)]
    if vector is None:
        return own
    pieces = iter(np.split(vector, np.cumsum([array.size for arrays in own for array in arrays])))
    return [[next(pieces).reshape(array.shape) for array in arrays] for arrays in own]


def _statistics(flow: FlowRecord) -> Statistics:
    """Mean and variance of each batch norm, those of evaluation."""
    return [(layer.mean, layer.var) for layer in flow.layers if isinstance(layer, BatchNorm)]


def _context(flow: FlowRecord, context: Array) -> tuple[Array, Pull]:
    """Contexts as the networks see them, NaN at or outside a bound; the pullback ignores its second argument."""
    steps = []
    c = context.astype(np.promote_types(flow.dtype, np.float64))
    for layer in flow.context_layers:
        c, log_det, step = FORWARD[type(layer)](layer, c)
        c[np.isneginf(log_det)] = np.nan
        steps.append(step)

    def pull(dc: Array, g: Array) -> Array:
        for step in reversed(steps):
            dc = step(dc, np.zeros_like(g))
        return dc

    return c.astype(flow.dtype), pull


def _front(flow: FlowRecord) -> int:
    """How many layers are in front of the first that is neither Elementwise nor Affine: those compute in float64."""
    return next((k for k, layer in enumerate(flow.layers) if not isinstance(layer, (Elementwise, Affine))), len(flow.layers))


def _forward(
    flow: FlowRecord, weights: Weights, x: Array, context: Array, statistics: Statistics | None = None, shares: Array | None = None
) -> tuple[Array, Array, Array, Any]:
    """Noise, log det, contexts as the networks see them, and the pullback of the gradients in all three.

    It gives the gradients in x, in the context and in the arrays of all layers.  Batch norms use `statistics`, if they are not those of
    the flow; with `shares` of the rows in them, those of kind "batch" use the statistics of the rows.
    """
    c, pull_context = _context(flow, context)
    moments = iter(_statistics(flow) if statistics is None else statistics)
    steps, front = [], _front(flow)
    z = x.astype(np.promote_types(flow.dtype, np.float64))
    log_det = np.zeros(len(x), z.dtype)
    for k, layer in enumerate(flow.layers):
        if k == front:
            z = z.astype(flow.dtype)
        step: Any
        if isinstance(layer, Autoregressive):
            z, here, step = _autoregressive(layer, weights[k], z, c)
        elif isinstance(layer, BatchNorm):
            z, here, step = _batch_norm(layer, weights[k], z, next(moments), shares if layer.statistics == "batch" else None)
        elif isinstance(layer, Linear):
            z, here, step = _linear(weights[k], z)
        else:
            z, here, step = FORWARD[type(layer)](layer, z)
        log_det = log_det + here
        steps.append(step)

    def pull(dz: Array, dc: Array, g: Array) -> tuple[Array, Array, list[Array]]:
        gradients: list[Array] = []
        for layer, step in zip(reversed(flow.layers), reversed(steps), strict=True):
            if type(layer) in FORWARD:
                dz = step(dz, g)
            else:
                dz, dc_here, here = step(dz, g)
                dc, gradients = dc + dc_here, here + gradients
        return dz, pull_context(dc, g), gradients

    return z.astype(flow.dtype), log_det, c, pull


def _inverse(flow: FlowRecord, z: Array, context: Array, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Rows of some dtype, strictly inside the bounds of the first layer, and the log det of the way back."""
    c, _ = _context(flow, context)
    weights, front = _all_weights(flow), _front(flow)
    wide = np.promote_types(flow.dtype, np.float64)
    x, log_det = z.astype(flow.dtype), np.zeros(len(z), wide)
    for k, layer in reversed(list(enumerate(flow.layers))):
        if k < front:
            x = x.astype(wide)
        if isinstance(layer, Autoregressive):
            x, here = _autoregressive_inverse(layer, weights[k], x, c)
        else:
            x, here = INVERSE[type(layer)](layer, x)
        log_det = log_det + here
    x = x.astype(dtype)
    return _inside(flow.layers[0], x) if flow.layers and isinstance(flow.layers[0], Elementwise) else x, log_det


def _log_prob(
    flow: FlowRecord, weights: Weights, x: Array, context: Array, statistics: Statistics | None = None, shares: Array | None = None
) -> tuple[Array, Any]:
    """Log-density: NaN for a row or context with a NaN, else -inf at or outside a bound and where the sums meet infinity.

    The pullback of its gradient goes to x, to the context and to the arrays of all layers and of the base.
    """
    z, log_det, c, pull_layers = _forward(flow, weights, x, context, statistics, shares)
    base, pull_base = _base(flow, weights[-1], z, c)
    value = np.where(np.isneginf(log_det), -np.inf, log_det + base).astype(flow.dtype)
    value = _density(value, x, c)
    kept = ~np.isneginf(value)

    def pull(cotangent: Array) -> tuple[Array, Array, list[Array]]:
        if shares is None and not kept.all():
            _, pull_kept = _log_prob(flow, weights, x[kept], context[kept], statistics)
            *inner, gradients = pull_kept(cotangent[kept])
            dx, dcontext = (np.zeros(array.shape, of_kept.dtype) for array, of_kept in zip((x, context), inner, strict=True))
            dx[kept], dcontext[kept] = inner
            return dx, dcontext, gradients
        g = cotangent.astype(flow.dtype)
        dz, dc, gradients = pull_base(g)
        dx, dcontext, own = pull_layers(dz, np.zeros_like(c) + dc, g)
        return dx, dcontext, own + gradients

    return value, pull


def _density(value: Array, *arrays: Array) -> Array:
    """Log-densities: NaN where a row of one of the arrays (n, k) has a NaN; of others -inf where the sums met infinity, far out."""
    value = np.where(value < np.inf, value, -np.inf).astype(value.dtype)
    for array in arrays:
        value[np.isnan(array).any(axis=1)] = np.nan
    return value


def _settled(gradient: Array, value: Array, cotangent: Array) -> Array:
    """Gradients (n, k); zero in rows where they are no numbers, though the log-density is one."""
    lost = np.isfinite(value) & np.isfinite(cotangent) & ~np.isfinite(gradient).all(axis=1)
    return np.where(lost[:, None], 0, gradient)


def _chunks(flow: FlowRecord, total: int) -> Iterator[slice]:
    """Rows that are computed together."""
    nets = [layer.conditioner for layer in (*flow.layers, flow.base) if isinstance(layer, (Autoregressive, Terminal))]
    widths = sum(dense.bias.size for net in nets for dense in (*net.hidden, net.final)) + flow.context_features
    size = max(1, BUDGET // (widths + flow.features * (1 + len(flow.layers))))
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _take(array: Array | None, shape: tuple[int, ...], rows: slice) -> Array:
    """Rows, counted over (n,) or (c, n), of an array that broadcasts to that shape and its own columns; no columns if it is None."""
    if array is None:
        return np.empty((rows.stop - rows.start, 0))
    repeated = np.broadcast_to(array, (*shape, array.shape[-1]))
    return repeated[rows] if len(shape) == 1 else repeated[np.unravel_index(np.arange(rows.start, rows.stop), shape)]


def _sample(flow: FlowRecord, index: Array, group: Array, context: Array, seed: int, dtype: np.dtype[Any]) -> tuple[Array, Array, Array]:
    """Samples of some dtype, the log det of the way to them, and what the base gave."""
    z = _random.normals(seed, index, group, flow.features, flow.dtype)
    if isinstance(flow.base, Terminal):
        z = _draw(flow.base, z, _random.uniforms(seed, index, group, flow.features), _context(flow, context)[0])
    return *_inverse(flow, z, context, dtype), z


class _Reference:
    """What `fastmaf.backends.Backend` asks for."""

    name = "reference"

    def unsupported(self, flow: FlowRecord) -> str | None:
        """Nothing: every layer of the record is defined here."""
        return None

    @np.errstate(all="ignore")
    def log_prob(self, flow: FlowRecord, x: Array, context: Array | None, out: Array) -> None:
        """Log-density of rows."""
        weights = _all_weights(flow)
        for rows in _chunks(flow, out.size):
            xs, cs = _take(x, out.shape, rows), _take(context, out.shape, rows)
            out.reshape(-1)[rows] = _log_prob(flow, weights, xs, cs)[0]

    @np.errstate(all="ignore")
    def conditional_probs(self, flow: FlowRecord, x: Array, context: Array | None, out: Array) -> None:
        """Probabilities of the values of discrete variables, zero where a variable has no such value, NaN where it may have any."""
        base = flow.base
        assert isinstance(base, Terminal)
        shape = out.shape[: -2 if base.categories else -1]
        flat = out.reshape(-1, flow.features, max(base.categories, default=1))
        weights = _all_weights(flow)
        for rows in _chunks(flow, len(flat)):
            xs, cs = _take(x, shape, rows), _take(context, shape, rows)
            z, log_det, c, _ = _forward(flow, weights, xs, cs)
            logits, _ = _network(base, weights[-1], np.where(np.isneginf(log_det)[:, None], np.nan, z), c)
            if base.conditional == "bernoulli":
                flat[rows, :, 0] = _sigmoid(logits)
                continue
            flat[rows] = 0
            for j, (part, count) in enumerate(zip(_parts(base), base.values, strict=True)):
                own = logits[:, part]
                flat[rows, j, : count or None] = np.exp(own - _log_sum_exp(own)) if count else np.nan

    @np.errstate(all="ignore")
    def to_noise(self, flow: FlowRecord, x: Array, context: Array | None, out: Array, log_det: Array | None = None) -> None:
        """Noise of rows, NaN for a row at or outside a bound, and log|det| of the map."""
        weights = _all_weights(flow)
        for rows in _chunks(flow, out.size // flow.features):
            xs, cs = _take(x, out.shape[:-1], rows), _take(context, out.shape[:-1], rows)
            z, here, c, _ = _forward(flow, weights, xs, cs)
            out.reshape(-1, flow.features)[rows] = z = np.where(np.isneginf(here)[:, None], np.nan, z)
            if log_det is not None:
                value = np.where(np.isfinite(z).all(axis=1), here, -np.inf).astype(flow.dtype)
                log_det.reshape(-1)[rows] = _density(value, xs, c)

    @np.errstate(all="ignore")
    def from_noise(self, flow: FlowRecord, u: Array, context: Array | None, out: Array, log_det: Array | None = None) -> None:
        """Rows of noise, and log|det| of the map."""
        for rows in _chunks(flow, out.size // flow.features):
            us, cs = _take(u, out.shape[:-1], rows), _take(context, out.shape[:-1], rows)
            out.reshape(-1, flow.features)[rows], here = _inverse(flow, us, cs, out.dtype)
            if log_det is not None:
                log_det.reshape(-1)[rows] = -here

    @np.errstate(all="ignore")
    def sample(
        self,
        flow: FlowRecord,
        c: int,
        n: int,
        context: Array | None,
        seed: int,
        offset: int,
        context_offset: int,
        out: Array,
        log_prob_out: Any,
    ) -> None:
        """Samples, and their log-density."""
        if context is not None and context.ndim == 2:
            context = context[:, None]
        base_weights = list(trainable(flow.base))
        for rows in _chunks(flow, c * n):
            group, index = np.divmod(np.arange(rows.start, rows.stop, dtype=np.uint64), np.uint64(n))
            group, index = group + np.uint64(context_offset), index + np.uint64(offset)
            cs = _take(context, (c, n), rows)
            x, log_det, z = _sample(flow, index, group, cs, seed, out.dtype)
            out.reshape(-1, flow.features)[rows] = x
            if log_prob_out is not None:
                value = log_det + _base(flow, base_weights, z, _context(flow, cs)[0])[0]
                log_prob_out.reshape(-1)[rows] = _density(value.astype(flow.dtype), x)

    @np.errstate(all="ignore")
    def sample_rows(self, flow: FlowRecord, index: Array, group: Array, context: Array | None, seed: int, out: Array) -> None:
        """Samples of scattered counters."""
        for rows in _chunks(flow, len(index)):
            cs = _take(context, (len(index),), rows)
            out[rows] = _sample(flow, index[rows], group[rows], cs, seed, out.dtype)[0]

    @np.errstate(all="ignore")
    def vjp(
        self, flow: FlowRecord, x: Array, context: Array | None, cotangent: Array, value: Any, dx: Any, dcontext: Any, dparameters: Any
    ) -> None:
        """Log-density and its gradients; `dparameters` is summed over rows."""
        weights = _all_weights(flow)
        total = None if dparameters is None else np.zeros_like(dparameters)
        for rows in _chunks(flow, cotangent.size):
            xs, cs = _take(x, cotangent.shape, rows), _take(context, cotangent.shape, rows)
            values, pull = _log_prob(flow, weights, xs, cs)
            *results, gradients = pull(cotangent.reshape(-1)[rows])
            if value is not None:
                value.reshape(-1)[rows] = values
            for out, result in zip((dx, dcontext), results, strict=True):
                if out is not None:
                    out.reshape(-1, out.shape[-1])[rows] = _settled(result.astype(flow.dtype), values, cotangent.reshape(-1)[rows])
            if total is not None:
                total += _flat(gradients, total.dtype)
        if dparameters is not None:
            dparameters[:] = total

    def trainer(self, flow: FlowRecord, **options: Any) -> _Engine:
        """An engine of `fastmaf.train`."""
        return _Engine(flow, **options)


def _flat(gradients: Sequence[Array], dtype: np.dtype[Any]) -> Array:
    return np.concatenate([np.empty(0, dtype), *(gradient.ravel() for gradient in gradients)])


class _Engine:
    """Adam (Kingma and Ba 2015), with decoupled weight decay (Loshchilov and Hutter 2019), on the weights of a flow.

    Batch norms of kind "batch" are trained with the weighted mean and the biased variance of each batch; all others, and `log_prob`, use
    those of `set_statistics`, at first those of the flow.  With `members`, flows that differ in their masks, the weights have no masks:
    each step selects those of one member, in turn, and `log_prob` is the log of the mean of the densities of all.
    """

    def __init__(
        self,
        flow: FlowRecord,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        l2: float = 0.0,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        members: Sequence[FlowRecord] | None = None,
    ) -> None:
        self._flow, self._betas, self._eps = flow, betas, eps
        self._l2, self._weight_decay, self._clip_norm = l2, weight_decay, clip_norm
        self._batch_norm = any(isinstance(layer, BatchNorm) and layer.statistics == "batch" for layer in flow.layers)
        self._statistics = _statistics(flow)
        self._master = _flat([array for arrays in _all_weights(flow) for array in arrays], flow.dtype)
        self._weights = _all_weights(flow, self._master)
        self._members: list[tuple[FlowRecord, Array]] = []
        if members is not None:
            self.set_members(members)
        self._first, self._second, self._step = np.zeros_like(self._master), np.zeros_like(self._master), 0

    @np.errstate(all="ignore")
    def epoch(
        self,
        x: Array,
        context: Array | None,
        weights: Array | None,
        rows: Array,
        batch_size: int,
        lr: Array,
        mean_weight: float,
        poll: Callable[[], None] | None = None,
        part: Part | None = None,
    ) -> tuple[float, int]:
        """One step per batch of `rows`; the loss summed over rows, and the number of steps, fewer where a loss is not finite."""
        polled, loss_sum, begin = time.monotonic(), 0.0, 0
        ends, sizes, total = part or Part.whole(len(rows), batch_size)
        for step, (rate, end, size) in enumerate(zip(lr, ends, sizes, strict=True)):
            batch, begin = rows[begin:end], end
            w = np.ones(len(batch)) if weights is None else weights[batch]
            member = self._member(self._step % len(self._members)) if self._members else (self._flow, self._weights)
            c = None if context is None else context[batch]
            loss, gradient = self._gradient(*member, x[batch], c, w, w / (size * mean_weight))
            if total is not None:
                loss_of_all = np.array([loss])
                total(gradient, loss_of_all)
                loss = float(loss_of_all[0])
            if not math.isfinite(loss):
                return loss_sum, step
            self._apply(gradient, float(rate))
            loss_sum += loss
            if poll is not None and time.monotonic() - polled > 0.1:
                poll()
                polled = time.monotonic()
        return loss_sum, len(lr)

    def _member(self, k: int) -> tuple[FlowRecord, Weights]:
        flow, chosen = self._members[k]
        return flow, _all_weights(flow, np.where(chosen, self._master, 0))

    def _gradient(
        self, flow: FlowRecord, weights: Weights, x: Array, context: Array | None, w: Array, factor: Array
    ) -> tuple[float, Array]:
        """The sum of w_i nll_i, and the gradient of the sum of factor_i nll_i; all rows at once where they share statistics."""
        loss, gradient = 0.0, np.zeros_like(self._master)
        shares = w / w.sum() if self._batch_norm else None
        for rows in (slice(0, len(x)),) if self._batch_norm else _chunks(flow, len(x)):
            values, pull = _log_prob(flow, weights, x[rows], _take(context, (len(x),), rows), self._statistics, shares)
            loss -= float((w[rows] * values.astype(np.float64)).sum())
            gradient += _flat(pull(-factor[rows])[2], gradient.dtype)
        return loss, gradient

    def _apply(self, gradient: Array, rate: float) -> None:
        beta1, beta2 = self._betas
        gradient += 2 * self._l2 * self._master
        if self._clip_norm is not None:
            gradient *= min(1.0, self._clip_norm / (math.sqrt(float((gradient.astype(np.float64) ** 2).sum())) + 1e-6))
        self._step += 1
        self._first += (1 - beta1) * (gradient - self._first)
        self._second[:] = beta2 * self._second + (1 - beta2) * gradient**2
        root = np.sqrt(self._second) / math.sqrt(1 - beta2**self._step)
        self._master *= 1 - rate * self._weight_decay
        self._master -= rate / (1 - beta1**self._step) * self._first / (root + self._eps)

    @np.errstate(all="ignore")
    def log_prob(self, x: Array, context: Array | None) -> Array:
        """Log-density (n,) under the current weights."""
        if not self._members:
            return self._log_prob(self._flow, self._weights, x, context)
        each = [self._log_prob(*self._member(k), x, context) for k in range(len(self._members))]
        mean = _log_sum_exp(np.stack(each, axis=1).astype(np.float64))[:, 0] - math.log(len(each))
        return mean.astype(self._flow.dtype)

    def _log_prob(self, flow: FlowRecord, weights: Weights, x: Array, context: Array | None) -> Array:
        out = np.empty(len(x), flow.dtype)
        for rows in _chunks(flow, len(x)):
            out[rows] = _log_prob(flow, weights, x[rows], _take(context, (len(x),), rows), self._statistics)[0]
        return out

    def set_members(self, members: Sequence[FlowRecord]) -> None:
        """Replace the flows whose masks select from the weights."""
        if not members:
            raise ValueError("there are no members")
        shapes, chosen = [array.shape for arrays in self._weights for array in arrays], []
        for k, member in enumerate(members):
            records = (*member.layers, member.base)
            arrays = [array for record in records for array in trainable(record)]
            if [array.shape for array in arrays] != shapes:
                raise ValueError(f"the arrays of member {k} differ in shape from those of the flow")
            pairs = zip((mask for record in records for mask in free(record)), arrays, strict=True)
            chosen.append((member, np.concatenate([np.broadcast_to(mask, array.shape).ravel() for mask, array in pairs])))
        self._members = chosen

    def set_statistics(self, statistics: Statistics) -> None:
        """Replace mean and variance of each batch norm."""
        if len(statistics) != len(self._statistics):
            raise ValueError(f"there are {len(statistics)} pairs of mean and variance; the flow has {len(self._statistics)} batch norms")
        self._statistics = [(np.asarray(mean), np.asarray(var)) for mean, var in statistics]

    def parameters(self) -> Array:
        """A copy of the weights."""
        return np.array(self._master)

    def set_parameters(self, parameters: Array) -> None:
        """Replace the weights; moments and step stay."""
        self._master[:] = parameters

    def state(self) -> dict[str, Array]:
        """Everything that the next step depends on."""
        return {
            "parameters": self._master.copy(),
            "first_moment": self._first.copy(),
            "second_moment": self._second.copy(),
            "step": np.array(self._step),
        }

    def load_state(self, state: dict[str, Array]) -> None:
        """Go on from a state."""
        self._master[:], self._first[:], self._second[:] = state["parameters"], state["first_moment"], state["second_moment"]
        self._step = int(state["step"])


backend = _Reference()
