"""Counted random numbers: each is a function of the seed and of its place; those of the core are the same, word by word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["QUANTILE", "choices", "normals", "philox", "quantile", "shuffle", "uniforms"]

Array = NDArray[Any]

NOISE, REFINEMENT, COMPONENT = 0, 1, 2
"""Random streams of the noise, of its lower bits in float64, and of the draws among components or values."""

LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(counter: Sequence[Any], seed: int) -> tuple[Array, Array, Array, Array]:
    """Philox4x32-10 (Salmon et al. 2011).

    Parameters
    ----------
    counter : four arrays of 32-bit words
        Least significant first.
    seed : int
        The key, 64 bits.

    Returns
    -------
    four arrays of 32-bit words, held in uint64

    Examples
    --------
    >>> [hex(word) for word in philox((0, 0, 0, 0), 0)]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (b >> HALF) ^ c1 ^ np.uint64(k0), b & LOW, (a >> HALF) ^ c3 ^ np.uint64(k1), a & LOW
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _words(seed: int, index: Array, row: Array, columns: int, stream: int) -> Array:
    """Words (n, columns) of the samples `index` under the context rows `row`, (n,) uint64 both."""
    block = np.arange(-(-columns // 4), dtype=np.uint64) | np.uint64(stream << 24)
    index, row = index[:, None], row[:, None]
    words = philox((index & LOW, index >> HALF, row & LOW, block), seed)
    return np.stack(words, axis=2).reshape(len(index), -1)[:, :columns]


def shuffle(seed: int, stream: int, epoch: int, rows: int) -> Array:
    """An order of `rows` rows, int64: that of the 64-bit keys which the generator gives them.

    Examples
    --------
    >>> sorted(shuffle(0, 3, 1, 5).tolist())
    [0, 1, 2, 3, 4]
    """
    index = np.arange(rows, dtype=np.uint64)
    low, high, _, _ = philox((index & LOW, index >> HALF, epoch, stream << 24), seed)
    return np.argsort((high << HALF) | low, kind="stable")


def uniforms(seed: int, index: Array, row: Array, columns: int) -> Array:
    """Uniform numbers (n, columns) in (0, 1), float64."""
    return (_words(seed, index, row, columns, COMPONENT).astype(np.float64) + 0.5) * 2.0**-32


def choices(seed: int, index: Array, row: Array, column: int, count: int) -> Array:
    """One of `count` things for each of the samples `index` under the context rows `row`: uint64 arrays that broadcast.

    It comes of the number of the stream of components that belongs to a column.

    Examples
    --------
    >>> choices(1, np.arange(6, dtype=np.uint64), np.uint64(0), 3, 4).tolist()
    [2, 1, 3, 2, 0, 1]
    """
    block, lane = divmod(column, 4)
    word = philox((index & LOW, index >> HALF, row & LOW, block | COMPONENT << 24), seed)[lane]
    return np.asarray((word * np.uint64(count)) >> HALF)


def normals(seed: int, index: Array, row: Array, columns: int, dtype: np.dtype[Any]) -> Array:
    """Standard normal noise.

    The lowest bit of a word is the sign; the other 31 are the lower tail probability, to which float64 adds the 32 bits of a second word.

    Parameters
    ----------
    seed : int
        64 bits.
    index, row : (n,) uint64 arrays
        Index of each sample and of its context.
    columns : int
    dtype : numpy.dtype

    Returns
    -------
    (n, columns) array

    Examples
    --------
    >>> index = np.arange(3, dtype=np.uint64)
    >>> single, double = (normals(1, index, 0 * index, 5, np.dtype(t)) for t in ("f4", "f8"))
    >>> bool(np.allclose(single, double, atol=1e-5))
    True
    """
    words = _words(seed, index, row, columns, NOISE)
    tail = words >> np.uint64(1)
    if dtype == np.float32:  # a fused multiply-add: float64 holds the sum exactly
        p: Array = (tail.astype(np.float32) * 2.0**-32 + np.float64(2.0**-33)).astype(np.float32)
    else:
        finer = _words(seed, index, row, columns, REFINEMENT)
        p = (tail.astype(np.float64) + (finer.astype(np.float64) + 0.5) * 2.0**-32) * 2.0**-32
    z = quantile(p)
    return np.where(words & np.uint64(1), -z, z).astype(dtype)


QUANTILE = {
    4: (
        ((3.3871327179, 5.0434271938e1, 1.5929113202e2, 5.9109374720e1), (1.0, 1.7895169469e1, 7.8757757664e1, 6.7187563600e1)),
        ((1.4234372777, 2.7568153900, 1.3067284816, 1.7023821103e-1), (1.0, 7.3700164250e-1, 1.2021132975e-1)),
        ((6.6579051150, 3.0812263860, 4.2868294337e-1, 1.7337203997e-2), (1.0, 2.4197894225e-1, 1.2258202635e-2)),
    ),
    8: (
        (
            (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4)
            + (4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3),
            (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3)
            + (2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3),
        ),
        (
            (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0)
            + (1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4),
            (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1)
            + (1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
        ),
        (
            (6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1)
            + (2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7),
            (1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2)
            + (7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15),
        ),
    ),
}
"""AS241 (Wichura 1988), PPND7 and PPND16 by item size: centre, middle and tail, numerator and denominator in ascending powers."""


def _ratio(table: Sequence[Sequence[float]], x: Array) -> Array:
    """A rational function."""
    above, below = (np.full_like(x, coefficients[-1]) for coefficients in table)
    for a in table[0][-2::-1]:
        above = above * x + a
    for b in table[1][-2::-1]:
        below = below * x + b
    return above / below


@np.errstate(all="ignore")
def quantile(p: Array) -> Array:
    """The normal quantile of lower tail probabilities.

    Parameters
    ----------
    p : array of float32 or float64
        In (0, 1/2].

    Returns
    -------
    array of the shape and dtype of p

    Examples
    --------
    >>> quantile(np.array([0.5])).tolist()
    [0.0]
    """
    centre, middle, far = QUANTILE[p.dtype.itemsize]
    q, r = p - 0.5, np.sqrt(-np.log(p))
    outer = np.where(r <= 5, _ratio(middle, r - 1.6), _ratio(far, r - 5))
    return np.where(q >= -0.425, q * _ratio(centre, 0.180625 - q * q), -outer)
