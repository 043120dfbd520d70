"""The numba backend: densities, samples and gradients in x and the context, where there is no compiled core.

A flow is packed once into a `Program`. Units and variables are sorted by degree and rank, and the network of each MADE becomes a list of
jobs in the order in which a sampler can run them: the parameters of the variables of one rank, then the hidden units, layer by layer, that
these variables bring to life. A job is a dense panel, since everything in it reads the same prefix of sorted inputs. Density and sampler
run the same jobs and differ only in which side of the law they solve for, so that both cost the same. A Linear is a stage of its own among
the MADEs: products with its triangles one way, substitution the other way.

Layout: work arrays are (unit, lane) with `LANES` rows of data in lanes; unit 0..D-1 are the variables in the order of their ranks, then
come the hidden layers, then the variables as they are, then shift and raw log-scale of each. The context enters the first map as a bias per
row, computed beforehand. Kernels release the GIL and run in plain threads, a tile of rows each: of numba's own threading layers one dies in
a forked process and another when two threads call it.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from fastmaf import _random
from fastmaf.backends import reference
from fastmaf.layers import ACTIVATIONS, Affine, Autoregressive, Dense, Elementwise, Linear, Permutation, Terminal
from fastmaf.record import FlowRecord

__all__ = ["backend"]

Array = NDArray[Any]
Kernel = TypeVar("Kernel", bound=Callable[..., Any])

LANES = 128


def _compiled(function: Kernel) -> Kernel:
    """Compile at the first call; kept on disk where there is a place to write."""
    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
    try:
        return cast(Kernel, numba.njit(cache=True, **options)(function))
    except RuntimeError:
        return cast(Kernel, numba.njit(**options)(function))


# Kernels


class Program(NamedTuple):
    """What the kernels read: panels, biases and jobs of all stages, which are MADEs and Linears, and the maps between them."""

    tape: Array  # weights of the panels, one after the other, in the dtype of the flow
    bias: Array  # biases of all maps but the first ones
    jobs: Array  # (J, 8) int64, fields as below
    starts: Array  # (K + 1,) first job of each MADE
    linear: Array  # (K,) where on the tape a Linear has its lower and upper triangle (D, D) and its bias (D,), or -1 for a MADE
    source: Array  # (K + 1, D): variable p of stage k is (z[source] - loc) * scale, z the result of stage k - 1
    loc: Array
    scale: Array
    clip: Array  # (K,) of the exp_soft law, or 0
    reach: Array  # (K + 1,) where what the networks read is clipped, or infinity
    activation: Array  # (K,) index into ACTIVATIONS
    height: int  # rows of the work array: variables as networks read them, units, variables as they are, parameters
    constant: float  # log det of the affine maps between the stages and of the Linears
    base: float  # -D/2 log(2 pi)


OUTPUT, ROW, ROWS, INPUT, INPUTS, WEIGHT, BIAS, FIRST = range(8)
"""Fields of a job: whether it yields parameters; the rows that it writes and reads; panel and biases; whether it is in the first map."""


@_compiled
def _accumulate(out: Any, source: Any, weights: Any, row: Any, column: Any, lanes: Any) -> None:
    """out[r] += sum_c weights[r * row + c * column] source[c]."""
    for r in range(out.shape[0]):
        y, k, c = out[r], r * row, 0
        while c + 4 <= source.shape[0]:
            w0, w1, w2, w3 = weights[k], weights[k + column], weights[k + 2 * column], weights[k + 3 * column]
            x0, x1, x2, x3 = source[c], source[c + 1], source[c + 2], source[c + 3]
            for b in range(lanes):
                y[b] = y[b] + w0 * x0[b] + w1 * x1[b] + w2 * x2[b] + w3 * x3[b]
            c, k = c + 4, k + 4 * column
        while c < source.shape[0]:
            w0, x0 = weights[k], source[c]
            for b in range(lanes):
                y[b] += w0 * x0[b]
            c, k = c + 1, k + column


@_compiled
def _activate(kind: Any, h: Any, row: Any, rows: Any, slopes: Any, lanes: Any) -> None:
    """Replace h by act(h), and fill `slopes`, unless it is empty, with act'(h)."""
    number = h.dtype.type
    zero, one, half = number(0), number(1), number(0.5)
    wanted = slopes.shape[0] > 0
    for r in range(row, row + rows):
        y = h[r]
        for b in range(lanes):
            a = y[b]
            slope = one
            if kind == 0:
                if a < zero:
                    y[b] = zero
                slope = one if a > zero else zero
            elif kind == 1:
                y[b] = math.tanh(a)
                slope = one - y[b] * y[b]
            elif kind == 2:
                if a < zero:
                    y[b] = math.expm1(a)
                    slope = y[b] + one
            elif kind == 3:
                cdf = half * math.erfc(-a * number(math.sqrt(0.5)))
                y[b] = a * cdf
                if wanted:
                    slope = cdf + a * number(1 / math.sqrt(2 * math.pi)) * math.exp(-half * a * a)
            else:
                s = one / (one + math.exp(-a))
                y[b] = a * s
                slope = s * (one + a * (one - s))
            if wanted:
                slopes[r, b] = slope


@_compiled
def _made(p: Any, k: Any, h: Any, z: Any, logdet: Any, first: Any, which: Any, lanes: Any, inverse: Any, slopes: Any) -> None:
    """MADE k: from the variables in h to z, or back; takes the log-scales off `logdet`.

    With `slopes`: act' of the hidden units; e^-a and da/dr in the rows of shift and raw log-scale; whether a variable is read as it is.
    """
    own, reach = h.shape[0] - 3 * z.shape[0], p.reach[k]
    number = h.dtype.type
    zero, one = number(0), number(1)
    clip = p.clip[k]
    soft = one / clip if clip > zero else zero
    for j in range(p.starts[k], p.starts[k + 1]):
        job = p.jobs[j]
        row, rows, bias = job[ROW], job[ROWS], job[BIAS]
        for r in range(rows):
            y = h[row + r]
            if job[FIRST] and first.shape[0] > 1:
                for b in range(lanes):
                    y[b] = first[which[b], bias + r]
            else:
                y[:lanes] = first[0, bias + r] if job[FIRST] else p.bias[bias + r]
        below = h[job[INPUT] : job[INPUT] + job[INPUTS]]
        _accumulate(h[row : row + rows], below, p.tape[job[WEIGHT] :], job[INPUTS], 1, lanes)
        if not job[OUTPUT]:
            _activate(p.activation[k], h, row, rows, slopes, lanes)
            continue
        for i in range(rows // 2):
            v = (row - h.shape[0]) // 2 + z.shape[0] + i
            shift, raw, x, read, noise = h[row + 2 * i], h[row + 2 * i + 1], h[own + v], h[v], z[v]
            for b in range(lanes):
                bend = one / (one + abs(raw[b]) * soft)
                a = raw[b] * bend
                if inverse:
                    x[b] = noise[b] * math.exp(a) + shift[b]
                    read[b] = _clipped(x[b], reach)
                else:
                    e = math.exp(-a)
                    noise[b] = (x[b] - shift[b]) * e
                    if slopes.shape[0] > 0:
                        slopes[row + 2 * i, b] = e
                        slopes[row + 2 * i + 1, b] = bend * bend
                        slopes[v, b] = one if read[b] == x[b] else zero
                logdet[b] -= a


@_compiled
def _add(y: Any, source: Any, first: Any, last: Any, tape: Any, place: Any, stride: Any, lanes: Any) -> None:
    """Add to y the rows source[first:last], times the numbers of the tape that lie `stride` apart from `place` on.

    Apart from `_accumulate`, which is inlined into a MADE as long as nobody else calls it.
    """
    for c in range(first, last):
        w, x = tape[place], source[c]
        for b in range(lanes):
            y[b] += w * x[b]
        place += stride


@_compiled
def _linear(p: Any, k: Any, h: Any, z: Any, lanes: Any, inverse: Any) -> None:
    """The Linear of stage k: from the variables in h to z = L (U x) + b, or back."""
    features, zero = z.shape[0], h.dtype.type(0)
    own, middle = h.shape[0] - 3 * features, h.shape[0] - 2 * features
    lower, upper = p.linear[k], p.linear[k] + features * features
    bias = upper + features * features
    for i in range(features):
        y, v, offset = h[middle + i], z[i], p.tape[bias + i]
        for b in range(lanes):
            y[b] = zero
        if inverse:
            _add(y, h, middle, middle + i, p.tape, lower + i * features, 1, lanes)
            for b in range(lanes):
                y[b] = v[b] - offset - y[b]
        else:
            _add(y, h, own + i, own + features, p.tape, upper + i * (features + 1), 1, lanes)
    for i in range(features - 1, -1, -1):
        x, y, v, offset = h[own + i], h[middle + i], z[i], p.tape[bias + i]
        diagonal = upper + i * (features + 1)
        if inverse:
            for b in range(lanes):
                x[b] = zero
            _add(x, h, own + i + 1, own + features, p.tape, diagonal + 1, 1, lanes)
            for b in range(lanes):
                x[b] = (y[b] - x[b]) / p.tape[diagonal]
        else:
            for b in range(lanes):
                v[b] = y[b] + offset
            _add(v, h, middle, middle + i, p.tape, lower + i * features, 1, lanes)


@_compiled
def _linear_vjp(p: Any, k: Any, dz: Any, dh: Any, lanes: Any) -> None:
    """From the gradient in the result of the Linear of stage k to that in its variables."""
    features, zero = dz.shape[0], dh.dtype.type(0)
    own, middle = dh.shape[0] - 3 * features, dh.shape[0] - 2 * features
    lower, upper = p.linear[k], p.linear[k] + features * features
    for i in range(features):
        y, v = dh[middle + i], dz[i]
        for b in range(lanes):
            y[b] = v[b]
        _add(y, dz, i + 1, features, p.tape, lower + (i + 1) * features + i, features, lanes)
    for i in range(features):
        x = dh[own + i]
        for b in range(lanes):
            x[b] = zero
        _add(x, dh, middle, middle + i + 1, p.tape, upper + i, features, lanes)


@_compiled
def _clipped(x: Any, reach: Any) -> Any:
    """NaN stays NaN."""
    return -reach if x < -reach else reach if x > reach else x


@_compiled
def _gather(p: Any, k: Any, z: Any, h: Any, lanes: Any) -> None:
    """The variables of stage k, or the noise for k = K, from the result of the one before."""
    features, reach = p.source.shape[1], p.reach[k]
    for i in range(features):
        x, y, read, loc, scale = z[p.source[k, i]], h[h.shape[0] - 3 * features + i], h[i], p.loc[k, i], p.scale[k, i]
        for b in range(lanes):
            y[b] = (x[b] - loc) * scale
            read[b] = _clipped(y[b], reach)


@_compiled
def _scatter(p: Any, k: Any, h: Any, z: Any, lanes: Any) -> None:
    """The inverse of `_gather`."""
    features = p.source.shape[1]
    for i in range(features):
        x, y, loc, scale = z[p.source[k, i]], h[h.shape[0] - 3 * features + i], p.loc[k, i], p.scale[k, i]
        for b in range(lanes):
            x[b] = y[b] / scale + loc


@_compiled
def _forward(p: Any, x: Any, first: Any, which: Any, noise: Any, density: Any, value: Any) -> None:
    """Noise (n, D), unless that is empty, and log-density (n,) of the rows of x, or log|det| of the map to the noise."""
    n, features = x.shape
    h, z = np.empty((p.height, LANES), x.dtype), np.empty((features, LANES), x.dtype)
    total, none = np.empty(LANES), np.empty((0, LANES), x.dtype)
    for start in range(0, n, LANES):
        lanes = min(LANES, n - start)
        for b in range(lanes):
            for i in range(features):
                z[i, b] = x[start + b, i]
        total[:] = p.constant + (p.base if density else 0.0)
        for k in range(p.clip.size):
            _gather(p, k, z, h, lanes)
            if p.linear[k] < 0:
                _made(p, k, h, z, total, first, which[start:], lanes, False, none)
            else:
                _linear(p, k, h, z, lanes, False)
        _gather(p, p.clip.size, z, h, lanes)
        for i in range(features if density else 0):
            for b in range(lanes):
                total[b] -= 0.5 * h[i, b] * h[i, b]
        if noise.shape[0] > 0:
            for b in range(lanes):
                for i in range(features):
                    noise[start + b, i] = h[i, b]
        value[start : start + lanes] = total[:lanes]


@_compiled
def _backward(p: Any, u: Any, first: Any, which: Any, x: Any, density: Any, value: Any) -> None:
    """Rows x (n, D) of noise u, and their log-density (n,), or log|det| of the map to the noise."""
    n, features = u.shape
    h, z = np.empty((p.height, LANES), u.dtype), np.empty((features, LANES), u.dtype)
    total, none = np.empty(LANES), np.empty((0, LANES), u.dtype)
    for start in range(0, n, LANES):
        lanes = min(LANES, n - start)
        total[:] = p.constant + (p.base if density else 0.0)
        for b in range(lanes):
            for i in range(features):
                h[p.height - 3 * features + i, b] = u[start + b, i]
                if density:
                    total[b] -= 0.5 * u[start + b, i] * u[start + b, i]
        _scatter(p, p.clip.size, h, z, lanes)
        for k in range(p.clip.size - 1, -1, -1):
            if p.linear[k] < 0:
                _made(p, k, h, z, total, first, which[start:], lanes, True, none)
            else:
                _linear(p, k, h, z, lanes, True)
            _scatter(p, k, h, z, lanes)
        for b in range(lanes):
            for i in range(features):
                x[start + b, i] = z[i, b]
        value[start : start + lanes] = total[:lanes]


@_compiled
def _vjp(p: Any, x: Any, first: Any, which: Any, cotangent: Any, value: Any, dx: Any, dfirst: Any) -> None:
    """Log-density (n,), and cotangent times its gradient in x (n, D) and, unless that is empty, in the biases per row of the first maps."""
    n, features = x.shape
    number = x.dtype.type
    count = p.clip.size
    h, dh = np.empty((p.height, LANES), x.dtype), np.empty((p.height, LANES), x.dtype)
    slopes = np.empty((count, p.height, LANES), x.dtype)
    z, dz, total = np.empty((count + 1, features, LANES), x.dtype), np.empty((features, LANES), x.dtype), np.empty(LANES)
    for start in range(0, n, LANES):
        lanes = min(LANES, n - start)
        stop = start + lanes
        for b in range(lanes):
            for i in range(features):
                z[0, i, b] = x[start + b, i]
        total[:] = p.constant + p.base
        for k in range(count):
            _gather(p, k, z[k], h, lanes)
            if p.linear[k] < 0:
                _made(p, k, h, z[k + 1], total, first, which[start:], lanes, False, slopes[k])
            else:
                _linear(p, k, h, z[k + 1], lanes, False)
        _gather(p, count, z[count], h, lanes)
        for i in range(features):
            for b in range(lanes):
                total[b] -= 0.5 * h[i, b] * h[i, b]
                dh[p.height - 3 * features + i, b] = -cotangent[start + b] * h[i, b]
        value[start:stop] = total[:lanes]
        for k in range(count, -1, -1):
            if k < count and p.linear[k] >= 0:
                _linear_vjp(p, k, dz, dh, lanes)
            elif k < count:
                _made_vjp(p, k, z[k + 1], dz, dh, slopes[k], cotangent[start:stop], dfirst[start:stop], lanes)
            for i in range(features):
                y, g, scale = dz[p.source[k, i]], dh[p.height - 3 * features + i], p.scale[k, i]
                for b in range(lanes):
                    y[b] = g[b] * scale
        for b in range(lanes):
            for i in range(features):
                dx[start + b, i] = number(dz[i, b])


@_compiled
def _made_vjp(p: Any, k: Any, z: Any, dz: Any, dh: Any, slopes: Any, cotangent: Any, dfirst: Any, lanes: Any) -> None:
    """From the gradient in the result of MADE k to that in its variables as they are: its jobs backwards."""
    own = dh.shape[0] - 3 * z.shape[0]
    dh[:] = 0
    for j in range(p.starts[k + 1] - 1, p.starts[k] - 1, -1):
        job = p.jobs[j]
        row, rows = job[ROW], job[ROWS]
        if job[OUTPUT]:
            for i in range(rows // 2):
                v = (row - dh.shape[0]) // 2 + z.shape[0] + i
                for b in range(lanes):
                    e = dz[v, b] * slopes[row + 2 * i, b]
                    dh[own + v, b] = e
                    dh[row + 2 * i, b] = -e
                    dh[row + 2 * i + 1, b] = -(dz[v, b] * z[v, b] + cotangent[b]) * slopes[row + 2 * i + 1, b]
        else:
            for r in range(row, row + rows):
                for b in range(lanes):
                    dh[r, b] *= slopes[r, b]
        if job[FIRST] and dfirst.shape[1] > 0:
            for r in range(rows):
                for b in range(lanes):
                    dfirst[b, job[BIAS] + r] = dh[row + r, b]
        below = dh[job[INPUT] : job[INPUT] + job[INPUTS]]
        _accumulate(below, dh[row : row + rows], p.tape[job[WEIGHT] :], 1, job[INPUTS], lanes)
    for v in range(z.shape[0]):
        for b in range(lanes):
            dh[own + v, b] += dh[v, b] * slopes[v, b]


@_compiled
def _context_bias(context: Any, weight: Any, bias: Any, out: Any) -> None:
    """Fill out (n, F) with context (n, C) weight (C, F) + bias; not by BLAS, whose rounding depends on n."""
    number = out.dtype.type
    for r in range(out.shape[0]):
        y = out[r]
        y[:] = bias[0]
        for c in range(context.shape[1]):
            x, w = number(context[r, c]), weight[c]
            for f in range(y.size):
                y[f] += x * w[f]


@_compiled
def _philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Philox4x32-10 (Salmon et al. 2011) of 32-bit words held in uint64."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> shift) ^ c1 ^ k0, b & low, (a >> shift) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return c0, c1, c2, c3


@_compiled
def _ratio(table: Any, x: Any) -> Any:
    """A rational function; `table` holds numerator and denominator in ascending powers."""
    above, below = table[0, 7], table[1, 7]
    for k in range(6, -1, -1):
        above, below = above * x + table[0, k], below * x + table[1, k]
    return above / below


@_compiled
def _quantile(p: Any, table: Any) -> Any:
    """Phi^-1(p) for p in (0, 1/2] by AS241."""
    number = table.dtype.type
    q = p - number(0.5)
    if q >= number(-0.425):
        return q * _ratio(table[0], number(0.180625) - q * q)
    r = math.sqrt(-math.log(p))
    return -_ratio(table[1], r - number(1.6)) if r <= number(5) else -_ratio(table[2], r - number(5))


@_compiled
def _normals(seed: Any, index: Any, row: Any, table: Any, u: Any) -> None:
    """Noise u (n, D) of the samples `index` under the contexts `row`, (n,) uint64 both; `table` as for `_quantile`."""
    number = u.dtype.type
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    k0, k1 = seed & low, seed >> shift
    for r in range(u.shape[0]):
        for block in range((u.shape[1] + 3) // 4):
            words = _philox(index[r] & low, index[r] >> shift, row[r], np.uint64(block), k0, k1)
            finer = words
            if u.itemsize == 8:
                finer = _philox(index[r] & low, index[r] >> shift, row[r], np.uint64(block) | np.uint64(1 << 24), k0, k1)
            for i in range(min(4, u.shape[1] - 4 * block)):
                m = number(words[i] >> np.uint64(1))
                if u.itemsize == 8:
                    z = _quantile((m + (number(finer[i]) + number(0.5)) * number(2.0**-32)) * number(2.0**-32), table)
                else:
                    z = _quantile(m * number(2.0**-32) + number(2.0**-33), table)
                u[r, 4 * block + i] = -z if words[i] & np.uint64(1) else z


# Packing


class Packed(NamedTuple):
    """A flow in the form that runs."""

    program: Program
    front: tuple[Elementwise | Affine, ...]  # the layers in float64, before any other
    first_bias: Array  # (1, F) biases of the first maps of all MADEs
    context_weight: Array  # (C, F)


def _pack(flow: FlowRecord) -> Packed:
    features = flow.features
    stages = [layer for layer in flow.layers if isinstance(layer, (Autoregressive, Linear))]
    mades = [layer if isinstance(layer, Autoregressive) else None for layer in stages]
    split = reference._front(flow)
    source, loc, scale = np.empty((3, len(stages) + 1, features))
    identity: tuple[Array, Array, Array] = (np.arange(features), np.zeros(features), np.ones(features))
    columns = identity  # source, loc and scale of each column since the last stage
    place = np.arange(features)  # of each column in the result of the last stage
    k = 0
    for layer in (*flow.layers[split:], None):
        if isinstance(layer, Permutation):
            columns = (columns[0][layer.perm], columns[1][layer.perm], columns[2][layer.perm])
        elif isinstance(layer, Affine):
            columns = (columns[0], columns[1] + layer.loc / columns[2], columns[2] * layer.scale)
        else:
            order = np.argsort(layer.ranks, kind="stable") if isinstance(layer, Autoregressive) else np.arange(features)
            source[k], loc[k], scale[k] = place[columns[0][order]], columns[1][order], columns[2][order]
            columns = identity
            place = np.argsort(order)
            k += 1

    height = 4 * features + max((sum(dense.bias.size for dense in made.conditioner.hidden) for made in mades if made), default=0)
    tape, bias, first, context_weight = _Tape(), _Tape(), _Tape(), []
    jobs: list[tuple[int, ...]] = []
    starts, linear = [0], np.full(len(stages), -1)
    constant = float(np.log(np.abs(scale)).sum())
    for k, layer in enumerate(stages):
        if isinstance(layer, Linear):
            linear[k] = tape.add(np.concatenate([layer.lower.ravel(), layer.upper.ravel(), layer.bias]))
            constant += float(np.log(np.abs(np.diagonal(layer.upper))).sum(dtype=np.float64))
            starts.append(len(jobs))
            continue
        for output, row, rows, below, inputs, dense, units, columns_read, is_first in _steps(layer, height):
            panel = dense.weight[np.ix_(units, columns_read[:inputs])]
            offset = dense.bias[units]
            if dense.context_bias is not None:
                offset = offset + dense.context_bias[units]
            if is_first:
                weight = dense.context_weight
                context_weight.append(np.zeros((rows, flow.context_features), flow.dtype) if weight is None else weight[units])
            jobs.append((output, row, rows, below, inputs, tape.add(panel), (first if is_first else bias).add(offset), is_first))
        starts.append(len(jobs))
    program = Program(
        tape.array(flow.dtype),
        bias.array(flow.dtype),
        np.array(jobs, np.int64).reshape(-1, 8),
        np.array(starts, np.int64),
        linear.astype(np.int64),
        source.astype(np.int64),
        loc.astype(flow.dtype),
        scale.astype(flow.dtype),
        np.array([made.law.constants.get("clip", 0.0) if made else 0.0 for made in mades], flow.dtype),
        np.array([*((made and made.conditioner.input_clip) or math.inf for made in mades), math.inf], flow.dtype),
        np.array([ACTIVATIONS.index(made.conditioner.activation) if made else 0 for made in mades], np.int64),
        height,
        constant,
        -0.5 * features * math.log(2 * math.pi),
    )
    front = tuple(layer for layer in flow.layers[:split] if isinstance(layer, (Elementwise, Affine)))
    weights = np.concatenate([np.empty((0, flow.context_features), flow.dtype), *context_weight])
    return Packed(program, front, first.array(flow.dtype)[None], np.ascontiguousarray(weights.T))


class _Tape:
    """Arrays put one after the other."""

    def __init__(self) -> None:
        self.pieces: list[Array] = []
        self.size = 0

    def add(self, piece: Array) -> int:
        """Its offset."""
        self.pieces.append(piece.ravel())
        self.size += piece.size
        return self.size - piece.size

    def array(self, dtype: np.dtype[Any]) -> Array:
        return np.concatenate([np.empty(0), *self.pieces]).astype(dtype)


def _steps(made: Autoregressive, height: int) -> Iterator[tuple[int, int, int, int, int, Dense, Array, Array, int]]:
    """The jobs of a MADE: output, rows of the work array, inputs, map, its units and all that it may read in sorted order, first."""
    features = made.ranks.size
    hidden, final = made.conditioner.hidden, made.conditioner.final
    order = np.argsort(made.ranks, kind="stable")
    sorted_units = [np.argsort(dense.degrees, kind="stable") for dense in hidden if dense.degrees is not None]
    reads = [order, *sorted_units]
    degrees = [made.ranks[order], *(np.sort(dense.degrees) for dense in hidden if dense.degrees is not None)]
    begins = np.cumsum([0, features, *(dense.bias.size for dense in hidden)])
    ranks = np.unique(made.ranks)
    for rank, above in zip([-math.inf, *ranks], [*ranks, None], strict=True):
        if rank > -math.inf:
            first, last = np.searchsorted(degrees[0], rank, "left"), np.searchsorted(degrees[0], rank, "right")
            rows = (2 * order[first:last, None] + np.arange(2)).ravel()
            inputs = int(np.searchsorted(degrees[-1], rank, "left"))
            yield 1, height - 2 * features + 2 * int(first), rows.size, int(begins[-2]), inputs, final, rows, reads[-1], int(not hidden)
        if above is None:
            return
        for layer, dense in enumerate(hidden):
            own = degrees[layer + 1]
            for degree in np.unique(own[(own >= rank) & (own < above)]):
                first, last = np.searchsorted(own, degree, "left"), np.searchsorted(own, degree, "right")
                inputs = int(np.searchsorted(degrees[layer], degree, "right"))
                units = sorted_units[layer][first:last]
                yield 0, int(begins[layer + 1] + first), units.size, int(begins[layer]), inputs, dense, units, reads[layer], int(layer == 0)


# Running


@functools.cache
def _table(dtype: np.dtype[Any]) -> Array:
    """Coefficients of AS241 in ascending powers, (centre, middle, tail) x (numerator, denominator) x 8."""
    table = np.zeros((3, 2, 8), dtype)
    for piece, (above, below) in enumerate(_random.QUANTILE[dtype.itemsize]):
        table[piece, 0, : len(above)], table[piece, 1, : len(below)] = above, below
    return table


def _threads() -> int:
    """As many as the environment asks for, else as many as there are CPUs for this process."""
    for variable in ("FASTMAF_NUM_THREADS", "OMP_NUM_THREADS"):
        if os.environ.get(variable, "").isdecimal():
            return max(1, int(os.environ[variable]))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Call:
    """One call: a packed flow, and rows of shape (n,) or (c, n) with their contexts, in tiles."""

    def __init__(self, flow: FlowRecord, context: Array | None, shape: tuple[int, ...]) -> None:
        self.flow, self.packed, self.context, self.shape = flow, flow.derived("numba", _pack), context, shape

    def tiles(self, work: Callable[[int, int], None]) -> None:
        """Call work(start, stop) for tiles of rows, in threads; their size bounds the scratch."""
        total, threads = math.prod(self.shape), _threads()
        widest = max(self.flow.features, self.packed.first_bias.size if self.context is not None else 0)
        size = max(LANES, min(8192, (1 << 21) // widest, -(-total // threads)) // LANES * LANES)

        def tile(start: int) -> None:
            with np.errstate(all="ignore"):
                work(start, min(start + size, total))

        if total <= size:
            tile(0)
            return
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(tile, range(0, total, size)):
                pass

    def rows(self, x: Array, start: int, stop: int) -> Array:
        """Rows of an array (n, D) or (c, n, D) that broadcasts to the call, in float64."""
        if x.ndim == 2 and x.shape[0] == self.shape[-1] and stop <= x.shape[0]:
            return x[start:stop].astype(np.float64)
        group, row = np.divmod(np.arange(start, stop), self.shape[-1])
        x = np.broadcast_to(x, (*(1, *self.shape)[-2:], x.shape[-1]))
        return x[group, row].astype(np.float64)

    def contexts(self, start: int, stop: int) -> tuple[Array, Array]:
        """The contexts that some rows have, in float64, and which of them each row has."""
        own, context = np.arange(stop - start), self.context
        if context is None or math.prod(context.shape[:-1]) == 1:
            return np.zeros((1, 0)) if context is None else context.reshape(1, -1).astype(np.float64), np.zeros_like(own)
        if context.ndim == 2:
            return context[start:stop].astype(np.float64), own
        group, row = np.divmod(np.arange(start, stop), self.shape[-1])
        if context.shape[1] == 1:
            return context[group[0] : group[-1] + 1, 0].astype(np.float64), group - group[0]
        return np.broadcast_to(context, (*self.shape, context.shape[-1]))[group, row].astype(np.float64), own

    def first_bias(self, contexts: Array) -> Array:
        """Biases of the first maps of all MADEs under each context."""
        if self.context is None:
            return self.packed.first_bias
        result = np.empty((len(contexts), self.packed.first_bias.size), self.flow.dtype)
        _context_bias(reference._context(self.flow, contexts)[0], self.packed.context_weight, self.packed.first_bias, result)
        return result

    def enter(self, x: Array) -> tuple[Array, Array, list[Callable[[Array, Array], Array]]]:
        """Through the layers in front, in float64 and then narrowed: results, log det and the pullback of each layer."""
        log_det, pulls = np.zeros(len(x)), []
        for layer in self.packed.front:
            x, here, pull = reference.FORWARD[type(layer)](layer, x)
            log_det += here
            pulls.append(pull)
        return np.ascontiguousarray(x, self.flow.dtype), log_det, pulls

    def leave(self, z: Array, dtype: np.dtype[Any]) -> tuple[Array, Array]:
        """Back through the layers in front, to strictly inside the bounds: rows of some dtype and the log det of `enter`."""
        x, log_det = z.astype(np.float64), np.zeros(len(z))
        for layer in reversed(self.packed.front):
            x, here = reference.INVERSE[type(layer)](layer, x)
            log_det += here
        x = x.astype(dtype)
        for layer in self.packed.front[:1]:
            x = reference._inside(layer, x) if isinstance(layer, Elementwise) else x
        return x, log_det


class _Numba:
    """What `fastmaf.backends.Backend` asks for."""

    name = "numba"

    def unsupported(self, flow: FlowRecord) -> str | None:
        """The first layer or feature that has no kernel."""
        if isinstance(flow.base, Terminal):
            return f"a {flow.base.conditional} base"
        front = True
        for layer in flow.layers:
            front = front and isinstance(layer, (Elementwise, Affine))
            missing = _unsupported(layer, front)
            if missing is not None:
                return missing
        return None

    def log_prob(self, flow: FlowRecord, x: Array, context: Array | None, out: Array) -> None:
        """Log-density of rows."""
        self._forward(_Call(flow, context, out.shape), x, out.reshape(-1), None)

    def to_noise(self, flow: FlowRecord, x: Array, context: Array | None, out: Array, log_det: Array | None = None) -> None:
        """Noise of rows, and log|det| of the map."""
        value = None if log_det is None else log_det.reshape(-1)
        self._forward(_Call(flow, context, out.shape[:-1]), x, value, out.reshape(-1, flow.features))

    def _forward(self, call: _Call, x: Array, value: Array | None, noise: Array | None) -> None:
        """The density, or the noise with log|det| of the map to it if there is room for that."""

        def work(start: int, stop: int) -> None:
            rows, (contexts, which) = call.rows(x, start, stop), call.contexts(start, stop)
            z, log_det, _ = call.enter(rows)
            total = np.empty(stop - start)
            u = np.empty((0, z.shape[1]), z.dtype) if noise is None else noise[start:stop]
            _forward(call.packed.program, z, call.first_bias(contexts), which, u, noise is None, total)
            u[np.isneginf(log_det[: len(u)])] = np.nan
            if value is not None:
                total[: len(u)][~np.isfinite(u).all(axis=1)] = -np.inf
                value[start:stop] = _value(call.flow, total, log_det, rows, contexts[which])

        call.tiles(work)

    def from_noise(self, flow: FlowRecord, u: Array, context: Array | None, out: Array, log_det: Array | None = None) -> None:
        """Rows of noise, and log|det| of the map."""
        call = _Call(flow, context, out.shape[:-1])
        self._backward(call, lambda start, stop: np.ascontiguousarray(call.rows(u, start, stop), flow.dtype), out, None, log_det)

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

        def draw(start: int, stop: int) -> Array:
            group, index = np.divmod(np.arange(start, stop, dtype=np.uint64), np.uint64(n))
            u = np.empty((stop - start, flow.features), flow.dtype)
            _normals(np.uint64(seed), index + np.uint64(offset), group + np.uint64(context_offset), _table(flow.dtype), u)
            return u

        grouped = context[:, None] if context is not None and context.ndim == 2 else context
        self._backward(_Call(flow, grouped, (c, n)), draw, out, log_prob_out)

    def sample_rows(self, flow: FlowRecord, index: Array, group: Array, context: Array | None, seed: int, out: Array) -> None:
        """Samples of scattered counters."""

        def draw(start: int, stop: int) -> Array:
            u = np.empty((stop - start, flow.features), flow.dtype)
            _normals(np.uint64(seed), index[start:stop], group[start:stop], _table(flow.dtype), u)
            return u

        self._backward(_Call(flow, context, (len(index),)), draw, out, None)

    def _backward(self, call: _Call, draw: Callable[[int, int], Array], x: Array, value: Array | None, of_map: Array | None = None) -> None:
        """Rows of noise, with their density or log|det| of the map to them, if there is room for one of these."""
        flat_x, flat_value = x.reshape(-1, call.flow.features), None if value is None else value.reshape(-1)
        flat_map = None if of_map is None else of_map.reshape(-1)

        def work(start: int, stop: int) -> None:
            contexts, which = call.contexts(start, stop)
            u = draw(start, stop)
            z, total = np.empty_like(u), np.empty(stop - start)
            _backward(call.packed.program, u, call.first_bias(contexts), which, z, flat_map is None, total)
            rows, log_det = call.leave(z, x.dtype)
            flat_x[start:stop] = rows
            if flat_map is not None:
                flat_map[start:stop] = -(total + log_det)
            if flat_value is not None:
                flat_value[start:stop] = reference._density((total + log_det).astype(call.flow.dtype), rows)

        call.tiles(work)

    def vjp(self, flow: FlowRecord, x: Array, context: Any, cotangent: Array, value: Any, dx: Any, dcontext: Any, dparameters: Any) -> None:
        """Log-density, and its gradients in rows and contexts."""
        if dparameters is not None:
            raise ValueError("the numba backend has no gradient in parameters; the cpu and the reference backend have")
        call = _Call(flow, context, cotangent.shape)

        def work(start: int, stop: int) -> None:
            rows, (contexts, which) = call.rows(x, start, stop), call.contexts(start, stop)
            z, log_det, pulls = call.enter(rows)
            factor = cotangent.reshape(-1)[start:stop].astype(flow.dtype)
            total, dz = np.empty(stop - start), np.empty_like(z)
            dfirst = np.zeros((stop - start, 0 if dcontext is None else call.packed.first_bias.size), flow.dtype)
            _vjp(call.packed.program, z, call.first_bias(contexts), which, factor, total, dz, dfirst)
            density = _value(flow, total, log_det, rows, contexts[which])
            if value is not None:
                value.reshape(-1)[start:stop] = density
            zero = np.isneginf(density)[:, None]
            if dx is not None:
                gradient = dz.astype(np.float64)
                for pull in reversed(pulls):
                    gradient = pull(gradient, factor)
                dx.reshape(-1, flow.features)[start:stop] = reference._settled(
                    np.where(zero, 0, gradient).astype(flow.dtype), density, factor
                )
            if dcontext is not None:
                pull_context = reference._context(flow, contexts[which])[1]
                gradient = pull_context((dfirst @ call.packed.context_weight.T).astype(np.float64), factor)
                dcontext.reshape(-1, flow.context_features)[start:stop] = reference._settled(
                    np.where(zero, 0, gradient).astype(flow.dtype), density, factor
                )

        call.tiles(work)

    def trainer(self, flow: FlowRecord, **options: Any) -> Any:
        """The engine of the reference: this backend has no gradient in weights."""
        return reference.backend.trainer(flow, **options)


def _unsupported(layer: Any, front: bool) -> str | None:
    """What has no kernel, in a layer that has only Elementwise and Affine before it or not."""
    if isinstance(layer, (Affine, Linear, Permutation)) or (front and isinstance(layer, Elementwise)):
        return None
    if not isinstance(layer, Autoregressive):
        return f"a {type(layer).__name__} layer" + " behind other layers" * isinstance(layer, Elementwise)
    net, law = layer.conditioner, layer.law
    first, *others = maps = (*net.hidden, net.final)
    if layer.direction != "data":
        return f"direction {layer.direction!r} of an Autoregressive layer"
    if law.kind not in ("exp", "exp_soft") or law.form != "standardize":
        return f"law {law.kind!r} in form {law.form!r}"
    if kinds := [block.kind for block in net.blocks if block.kind != "plain"]:
        return f"{kinds[0]} blocks"
    if net.hidden and not net.final_activation:
        return "a conditioner without activation in front of its final map"
    if net.skip is not None:
        return "direct weights from variables to parameters"
    if any(dense.norm_scale is not None or dense.norm_shift is not None for dense in maps):
        return "an inner batch norm"
    if first.context not in ("none", "added") or any(dense.context != "none" for dense in others):
        return f"a context that enters as {', '.join(dense.context for dense in maps)} (numba has: added, at the first map)"
    return None


def _value(flow: FlowRecord, total: Array, log_det: Array, rows: Array, contexts: Array) -> Array:
    """Log-density: NaN for a row or context with a NaN, else -inf at or outside a bound and where the sums met infinity."""
    value: Array = np.where(np.isneginf(log_det), -np.inf, total + log_det).astype(flow.dtype)
    lost = np.flatnonzero(~np.isfinite(value))
    if lost.size:
        value[lost] = reference._density(value[lost], rows[lost], reference._context(flow, contexts[lost])[0])
    return value


backend = _Numba()
