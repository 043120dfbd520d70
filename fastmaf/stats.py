"""What a density is for: credible regions, outliers, entropy, importance weights, calibration, marginals, products.

Each function takes a `fastmaf.Flow` or `fastmaf.Ensemble`, conditional or not. What is found by samples comes from the counted stream of a
seed: the same seed gives the same result. Rows are drawn in float64, a piece at a time, so that the memory does not grow with the number
of contexts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastmaf import _arrays, _words
from fastmaf._arrays import Seed
from fastmaf.ensemble import Ensemble
from fastmaf.flow import Flow
from fastmaf.layers import Affine, Normal
from fastmaf.record import FlowRecord

__all__ = [
    "Calibration",
    "Estimate",
    "Marginal",
    "StatsWarning",
    "Weighted",
    "calibration",
    "context_distance",
    "entropy",
    "hdr_level",
    "importance",
    "kl",
    "marginal",
    "p_value",
    "product",
]

Array = NDArray[Any]
Density = Flow | Ensemble

PIECE = 1 << 19
"""Numbers that are drawn together."""

BEYOND = 5
"""Samples on either side of the edge of a region below which its error is not to be trusted."""

LEAST = 10
"""Rows below which nothing can be told of a calibration."""

FEW = 100
"""Effective samples below which weights are called poor."""


class StatsWarning(UserWarning):
    """Something about an estimate by samples that one would want to know."""


class Estimate(NamedTuple):
    """A number that was found by samples, and its standard error; arrays of them under several contexts.

    Examples
    --------
    >>> value, error = Estimate(1.5, 0.25)
    """

    value: Any
    error: Any


# Samples and densities


def _held(name: str, flow: Any) -> Density:
    """The flow as it is now, in the hands of nobody else."""
    if not isinstance(flow, (Flow, Ensemble)):
        raise ValueError(f"{name} is {_words.shown(flow)}; it must be a Flow or an Ensemble")
    return flow._still()


def _contexts(flow: Density, context: Any, name: str = "context") -> tuple[Array | None, tuple[int, ...]]:
    """None, (C,) or (c, C), and the axes that it gives to a result."""
    if context is None and flow.context_features:
        raise ValueError(f"{name} is missing; the flow has {flow.context_features} context features")
    array, c = _arrays.contexts(context, flow.context_features)
    return array, (c,) if array is not None and array.ndim == 2 else ()


class _Piece(NamedTuple):
    """Samples (b, m, D) of b groups under contexts (b, C) or (C,), in float64, with their log-densities (b, m)."""

    groups: slice
    samples: Array
    log_prob: Array
    context: Array | None
    last: bool


def _draws(flow: Density, n: int, context: Array | None, seed: int, groups: int = 1, first: int = 0) -> Iterator[_Piece]:
    """The stream of a seed in pieces: n rows for each context (c, C), else for each of so many groups; `first` is the first context.

    Raises
    ------
    ValueError
        If some samples are NaN.
    """
    own, said = context is not None and context.ndim == 2, set()
    groups = len(context) if own and context is not None else groups
    most = max(1, PIECE // (flow.features + flow.context_features))
    step = max(1, most // n)
    for a in range(0, groups, step):
        b = min(a + step, groups)
        for i in range(0, n, most):
            m = min(most, n - i)
            part = context[a:b] if own and context is not None else context
            place = (m, part, seed, i, first + a) if own else ((b - a) * m, part, seed, a * n + i, first)
            with _words.gathering() as notes:
                samples, log_prob = flow.sample_and_log_prob(*place, dtype="float64")
            for note in notes:
                if note not in said:
                    said.add(note)
                    _words.warn(*note)
            log_prob = log_prob.reshape(b - a, m).astype(np.float64)
            if np.isnan(log_prob).any():
                where = f" under context {a + int(np.isnan(log_prob).any(axis=1).argmax())}" if own else ""
                raise ValueError(f"there are no samples{where}, which the flow cannot follow: they are NaN")
            yield _Piece(slice(a, b), samples.reshape(b - a, m, flow.features), log_prob, part, i + m == n)


def _numbers(flow: Density, n: int, context: Array | None, seed: int, of: Callable[[_Piece], Array]) -> Iterator[tuple[slice, Array]]:
    """A number (b, n) for each sample of some contexts, one block of contexts after another."""
    kept = []
    for piece in _draws(flow, n, context, seed):
        kept.append(of(piece))
        if piece.last:
            yield piece.groups, np.concatenate(kept, axis=1)
            kept = []


def _log_density(name: str, density: Any, whose: str, flow: Density) -> Callable[[Array, Array | None], Array]:
    """A log-density of the rows of a flow, as a function of samples (b, m, D) and their contexts."""
    if isinstance(density, (Flow, Ensemble)):
        held = _held(name, density)
        _alike(whose, flow, name, held)
        if held.context_features not in (0, flow.context_features):
            raise ValueError(f"{name} has {held.context_features} context features; {whose} has {flow.context_features}")
        return lambda x, context: held.log_prob(x, context if held.context_features else None).astype(np.float64)
    function = getattr(density, "log_prob", density)
    if isinstance(density, type) or not callable(function):
        raise ValueError(f"{name} is {_words.shown(density)}; it must have log_prob, or be a function from rows (n, D) to (n,)")

    def evaluated(x: Array, context: Array | None) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        values = _arrays.real(f"{name}(x)", function(rows))
        if values.shape != (len(rows),) and not (values.ndim == 0 and len(rows) == 1):
            raise ValueError(f"{name}(x) has shape {_words.shapes(values.shape)}; of rows {rows.shape} it must be ({len(rows)},)")
        return values.reshape(x.shape[:-1]).astype(np.float64)

    return evaluated


def _record(flow: Density) -> FlowRecord:
    """That of the flow, or of the first member."""
    return (flow if isinstance(flow, Flow) else flow.member(0)).record


def _alike(name: str, flow: Density, other: str, density: Density) -> None:
    """Refuse densities of other variables."""
    if density.features != flow.features:
        raise ValueError(f"{other} has {density.features} features; {name} has {flow.features}")
    pairs = zip(_record(flow).values, _record(density).values, strict=True)
    odd = [j for j, (own, theirs) in enumerate(pairs) if (own == 0) != (theirs == 0)]
    if odd:
        where = _words.columns(odd, flow.names)
        raise ValueError(f"one of {name} and {other} has discrete variables in {where}, the other continuous ones: they cannot be compared")
    if flow.names and density.names and flow.names != density.names:
        j = next(j for j, pair in enumerate(zip(flow.names, density.names, strict=True)) if pair[0] != pair[1])
        raise ValueError(f"column {j} is {_words.shown(flow.names[j])} in {name} and {_words.shown(density.names[j])} in {other}")


def _plain(array: Array) -> Any:
    """An array, or the float that it is."""
    return array if array.ndim else float(array)


# Credible regions and outliers


def hdr_level(flow: Density, mass: ArrayLike = 0.9, context: ArrayLike | None = None, n: int = 10_000, seed: Seed = None) -> Estimate:
    """The log-density at the edge of the highest-density region that holds a given mass.

    The region ``{x : log_prob(x) >= level}`` is the smallest one of its mass, a credible region where the flow is a posterior. The level is
    a quantile of the log-densities of samples (Hyndman 1996, section 3.1), its error half of what lies between the order statistics a
    binomial standard deviation below and above.

    Parameters
    ----------
    flow : Flow or Ensemble
    mass : float or (k,) array
        Between 0 and 1, both excluded.
    context : (C,) or (c, C) array, optional
    n : int
        Samples under each context.
    seed : int, numpy.random.Generator or SeedSequence, optional

    Returns
    -------
    Estimate
        Each part a float, or an array (k,), (c,) or (c, k).

    Raises
    ------
    ValueError
        If an argument does not fit.

    Warns
    -----
    StatsWarning
        If fewer than 5 samples are to be expected on one side of an edge.

    Examples
    --------
    >>> import fastmaf
    >>> flow = fastmaf.Flow([], features=2)  # within a radius r of a normal density lies 1 - exp(-r^2 / 2)
    >>> level, error = hdr_level(flow, 0.5, seed=0)
    >>> bool(abs(level - (-np.log(2 * np.pi) + np.log(0.5))) < 3 * error), bool(error < 0.02)
    (True, True)
    """
    flow, n = _held("flow", flow), _words.count("n", n, 2)
    masses = _arrays.real("mass", mass).astype(np.float64)
    if masses.ndim > 1 or not ((masses > 0) & (masses < 1)).all():
        raise ValueError(f"mass is {_words.shown(mass)}; it must be a number between 0 and 1, or (k,) of them")
    if n * np.minimum(masses, 1 - masses).min() < BEYOND:
        _words.warn(f"of {n} samples fewer than {BEYOND} lie beyond the edge of a region: draw more for this mass, n=...", StatsWarning)
    context, lead = _contexts(flow, context)
    value, error = (np.empty((*(lead or (1,)), masses.size)) for _ in range(2))
    place = np.minimum(np.floor((1 - masses.ravel()) * n + 1e-9).astype(int), n - 1)
    spread = np.maximum(1, np.ceil(np.sqrt(n * masses.ravel() * (1 - masses.ravel())))).astype(int)
    low, high = np.maximum(place - spread, 0), np.minimum(place + spread, n - 1)
    for groups, numbers in _numbers(flow, n, context, _arrays.seed_or_fresh(seed), lambda piece: piece.log_prob):
        numbers.sort(axis=1)
        value[groups] = numbers[:, place]
        error[groups] = (numbers[:, high] - numbers[:, low]) * spread / (high - low)
    shape = (*lead, *masses.shape)
    return Estimate(_plain(value.reshape(shape)), _plain(error.reshape(shape)))


def p_value(flow: Density, x: ArrayLike, context: ArrayLike | None = None, n: int = 10_000, seed: Seed = None) -> Array:
    """How far out rows lie: the mass of the region where the density is not higher than theirs.

    It is uniform over rows that come from the flow, and small for outliers; one minus it is the mass of the highest-density region whose
    edge a row lies on. With k of the n samples not denser than a row it is (k + 1) / (n + 1), which is never too small by chance (Phipson
    and Smyth 2010); its standard error is about ``sqrt(p * (1 - p) / n)``.

    Parameters
    ----------
    flow : Flow or Ensemble
    x, context : arrays
        As in `fastmaf.Flow.log_prob`. For rows under contexts of their own, (n, C), samples are drawn for each row.
    n : int
        Samples under each context.
    seed : int, numpy.random.Generator or SeedSequence, optional

    Returns
    -------
    (n,) or (c, n) array
        In float64; NaN for a row with a NaN.

    Raises
    ------
    ValueError
        If an argument does not fit.

    Examples
    --------
    >>> import fastmaf
    >>> flow = fastmaf.Flow([], features=2)
    >>> p_value(flow, [[0.0, 0.0], [0.0, 1.0], [9.0, 9.0]], seed=0).round(1).tolist()  # exp(-r^2 / 2)
    [1.0, 0.6, 0.0]
    """
    flow, n = _held("flow", flow), _words.count("n", n, 1)
    x, context, _ = _arrays.rows("x", x, context, flow.features, flow.context_features, names=flow.names)
    log_prob = flow.log_prob(x, context)
    values = log_prob.reshape(1, -1)
    if context is not None and context.ndim > 1:
        shared = context.ndim == 3 and context.shape[1] == 1  # by the rows of a group
        lead = log_prob.shape[:1] if shared else log_prob.shape
        context = np.broadcast_to(context[:, 0] if shared else context, (*lead, flow.context_features)).reshape(-1, flow.context_features)
        values = log_prob if shared else log_prob.reshape(-1, 1)
    context = None if context is None else _contexts(flow, context)[0]
    lower = np.empty(values.shape, np.int64)
    for groups, numbers in _numbers(flow, n, context, _arrays.seed_or_fresh(seed), lambda piece: piece.log_prob):
        numbers.sort(axis=1)
        for count, drawn, own in zip(lower[groups], numbers, values[groups], strict=True):
            count[...] = np.searchsorted(drawn, own, "right")
    return np.where(np.isnan(log_prob), np.nan, (lower.reshape(log_prob.shape) + 1) / (n + 1))


# Entropy and divergence


def _mean(flow: Density, n: int, context: Any, seed: Seed, of: Callable[[_Piece], Array]) -> Estimate:
    """The mean over samples of a number of each."""
    n = _words.count("n", n, 2)
    context, lead = _contexts(flow, context)
    value, error = np.empty(lead or (1,)), np.empty(lead or (1,))
    for groups, numbers in _numbers(flow, n, context, _arrays.seed_or_fresh(seed), of):
        with np.errstate(invalid="ignore"):
            value[groups], error[groups] = numbers.mean(axis=1), numbers.std(axis=1, ddof=1) / math.sqrt(n)
    error[np.isinf(value)] = np.inf
    return Estimate(_plain(value.reshape(lead)), _plain(error.reshape(lead)))


def entropy(flow: Density, context: ArrayLike | None = None, n: int = 10_000, seed: Seed = None) -> Estimate:
    """Differential entropy, -E[log_prob], in nats; the entropy of a discrete flow.

    Parameters
    ----------
    flow : Flow or Ensemble
    context : (C,) or (c, C) array, optional
    n : int
        Samples under each context.
    seed : int, numpy.random.Generator or SeedSequence, optional

    Returns
    -------
    Estimate
        Of floats, or of arrays (c,).

    Raises
    ------
    ValueError
        If an argument does not fit.

    Examples
    --------
    >>> import fastmaf
    >>> value, error = entropy(fastmaf.Flow([], features=3), seed=0)
    >>> bool(abs(value - 1.5 * np.log(2 * np.pi * np.e)) < 3 * error)
    True
    """
    return _mean(_held("flow", flow), n, context, seed, lambda piece: -piece.log_prob)


def kl(p: Density, q: Any, context: ArrayLike | None = None, n: int = 10_000, seed: Seed = None) -> Estimate:
    """Kullback-Leibler divergence KL(p || q) = E_p[log p - log q], in nats.

    With a prior as q it is what a posterior p has learned, the information gain.

    Parameters
    ----------
    p : Flow or Ensemble
        What is sampled.
    q : Flow, Ensemble, what has log_prob, or callable
        A log-density: of a Flow or Ensemble under the same context, unless it has none; else a function from rows (n, D) to (n,).
    context : (C,) or (c, C) array, optional
    n : int
        Samples under each context.
    seed : int, numpy.random.Generator or SeedSequence, optional

    Returns
    -------
    Estimate
        Of floats, or of arrays (c,); infinite where q has no density at some sample. An estimate of a small divergence may be negative.

    Raises
    ------
    ValueError
        If an argument does not fit, the variables of p and q differ, or q gives NaN.

    Examples
    --------
    >>> import fastmaf
    >>> from fastmaf.layers import Affine
    >>> p, q = fastmaf.Flow([Affine([1.0], [1.0])]), fastmaf.Flow([], features=1)  # N(1, 1) and N(0, 1)
    >>> value, error = kl(p, q, seed=0)
    >>> bool(abs(value - 0.5) < 3 * error)
    True
    """
    p = _held("p", p)
    log_q = _log_density("q", q, "p", p)

    def difference(piece: _Piece) -> Array:
        other = log_q(piece.samples, piece.context)
        if (lost := np.count_nonzero(np.isnan(other) | (other == np.inf))) > 0:
            raise ValueError(
                f"q is NaN or infinite at {lost} of {other.size} samples of p; it must be a log-density, -inf where there is none"
            )
        return piece.log_prob - other

    return _mean(p, n, context, seed, difference)


# Importance weights


@dataclass(frozen=True, eq=False, repr=False)
class Weighted:
    """Samples with importance weights.

    Attributes
    ----------
    samples : (n, D) array
        In float64.
    log_weights : (n,) array
        Normalised: the weights have the sum 1.
    log_evidence : Estimate
        Logarithm of the integral of the density that the weights are for.
    ess : float
        Effective sample size, 1 / sum(weights^2) (Kong 1992).
    pareto_k : float
        Shape of a generalised Pareto distribution fitted to the largest weights (Vehtari et al. 2024): below 0.7 the weights are of use,
        above 1 they have no mean. NaN where the largest weights are alike, or fewer than five.

    Examples
    --------
    >>> import fastmaf
    >>> found = importance(fastmaf.Flow([], features=1), lambda x: -0.5 * x[:, 0] ** 2, n=2000, seed=0)
    >>> mean = found.weights @ found.samples
    >>> found
    Weighted(2000 samples, ess 2000.0, pareto_k nan, log_evidence 0.9189 +- 0.0000)
    """

    samples: Array
    log_weights: Array
    log_evidence: Estimate
    ess: float
    pareto_k: float

    @property
    def weights(self) -> Array:
        """Of sum 1, (n,)."""
        return np.exp(self.log_weights)

    def resample(self, n: int, seed: Seed = None) -> Array:
        """Rows drawn by their weights, with replacement: samples of equal weight.

        Parameters
        ----------
        n : int
        seed : int, numpy.random.Generator or SeedSequence, optional

        Returns
        -------
        (n, D) array
        """
        total = np.cumsum(self.weights)
        drawn = np.random.default_rng(_arrays.seed_or_fresh(seed)).random(_words.count("n", n)) * total[-1]
        return np.asarray(self.samples[np.searchsorted(total, drawn, "right")])

    def __repr__(self) -> str:
        value, error = self.log_evidence
        words = f"ess {self.ess:.1f}, pareto_k {self.pareto_k:.2f}, log_evidence {value:.4f} +- {error:.4f}"
        return f"Weighted({len(self.samples)} samples, {words})"


def _weighted(name: str, samples: Array, log_weights: Array) -> Weighted:
    """With weights normalised and judged."""
    n = len(samples)
    wrong = np.isnan(log_weights) | (log_weights == np.inf)
    if wrong.any():
        _words.warn(f"{name} is not finite at {np.count_nonzero(wrong)} of {n} samples, which get no weight", StatsWarning)
        log_weights = np.where(wrong, -np.inf, log_weights)
    most = log_weights.max()
    if most == -np.inf:
        raise ValueError(f"{name} has no density at any of the {n} samples; draw more, or from a flow that is closer to it")
    total = most + math.log(np.exp(log_weights - most).sum())
    log_weights = log_weights - total
    ess = 1 / float(np.exp(2 * log_weights).sum())
    k = _pareto_k(log_weights)
    if ess < min(FEW, n / 2) or k > min(1 - 1 / math.log10(n), 0.7):
        _words.warn(
            f"the importance weights are poor: {ess:.3g} effective samples of {n}, Pareto k {k:.2f}; draw more, or from a flow "
            f"that is closer to {name}",
            StatsWarning,
        )
    error = math.sqrt(max(1 / ess - 1 / n, 0.0))
    return Weighted(samples, log_weights, Estimate(float(total - math.log(n)), error), ess, k)


def _pareto_k(log_weights: Array) -> float:
    """Shape of the tail of weights: posterior mean of Zhang and Stephens (2009), with the prior of Vehtari et al. (2024, appendix)."""
    n = log_weights.size
    tail = np.sort(log_weights)[-1 - math.ceil(min(0.2 * n, 3 * math.sqrt(n))) :]
    x = np.exp(tail[1:] - tail[-1]) - math.exp(tail[0] - tail[-1])
    x = x[x > 1e-12]
    if x.size < 5 or x[-1] < 1e-3:
        return math.nan
    j = np.arange(1, 31 + math.isqrt(x.size))
    theta = 1 / x[-1] + (1 - np.sqrt(j.size / (j - 0.5))) / (3 * x[(x.size + 2) // 4 - 1])
    shape = np.log1p(-theta[:, None] * x).mean(axis=1)
    likelihood = x.size * (np.log(-theta / shape) - shape - 1)
    share = np.exp(likelihood - likelihood.max())
    k = float(np.log1p(-(share @ theta / share.sum()) * x).mean())
    return float((x.size * k + 10 * 0.5) / (x.size + 10))


def importance(flow: Density, log_density: Any, context: ArrayLike | None = None, n: int = 10_000, seed: Seed = None) -> Weighted:
    """Samples of a flow with importance weights for another density, which need not be normalised.

    They correct what a flow does not fit, by a likelihood and a prior that can be evaluated, and give the evidence: the integral of the
    density, with its error. The weights are ``exp(log_density(x) - flow.log_prob(x))``, normalised.

    Parameters
    ----------
    flow : Flow or Ensemble
        The proposal; it should be nowhere much narrower than the density.
    log_density : callable, or what has log_prob
        As q of `kl`.
    context : (C,) array, optional
    n : int
    seed : int, numpy.random.Generator or SeedSequence, optional

    Returns
    -------
    Weighted

    Raises
    ------
    ValueError
        If an argument does not fit, or no sample has a density.

    Warns
    -----
    StatsWarning
        If fewer than 100 samples (or n / 2) are effective, or the Pareto k is above min(1 - 1 / log10(n), 0.7); if log_density is not
        finite at some samples (-inf is a density of zero, of which nothing is said).

    Examples
    --------
    >>> import fastmaf
    >>> flow = fastmaf.Flow([], features=2)
    >>> found = importance(flow, lambda x: -((x - 0.3) ** 2).sum(axis=1), seed=0)  # a normal density without its constant, pi
    >>> bool(abs(found.log_evidence.value - np.log(np.pi)) < 3 * found.log_evidence.error)
    True
    """
    flow, n = _held("flow", flow), _words.count("n", n, 2)
    log_target = _log_density("log_density", log_density, "flow", flow)
    context, lead = _contexts(flow, context)
    if lead:
        raise ValueError(f"context has {lead[0]} rows; the weights are under one context, ({flow.context_features},)")
    samples, log_weights, done = _arrays.empty((n, flow.features), np.dtype(np.float64)), np.empty(n), 0
    for piece in _draws(flow, n, context, _arrays.seed_or_fresh(seed)):
        rows = slice(done, done := done + piece.log_prob.size)
        samples[rows] = piece.samples[0]
        log_weights[rows] = (log_target(piece.samples, piece.context) - piece.log_prob)[0]
    return _weighted("log_density", samples, log_weights)


def product(
    posteriors: Sequence[Density],
    prior: Any = None,
    contexts: Sequence[ArrayLike | None] | None = None,
    n: int = 10_000,
    seed: Seed = None,
) -> Weighted:
    """The product of posteriors of the same parameters from independent data: p1 * p2 * ... / prior^(k - 1).

    As many samples are drawn from each, and weighted against the mean of the posteriors (the balance heuristic of Veach and Guibas 1995).
    The evidence is the integral of the product: above 1 where the data agree.

    Parameters
    ----------
    posteriors : sequence of k Flows or Ensembles
        The same one several times for several observations.
    prior : callable, or what has log_prob, optional
        The log-density that the posteriors share, as q of `kl`, without a context; constant if None.
    contexts : sequence of k arrays (C,) or None, optional
        One for each posterior; all None if None.
    n : int
        Samples altogether.
    seed : int, numpy.random.Generator or SeedSequence, optional

    Returns
    -------
    Weighted

    Raises
    ------
    ValueError
        If an argument does not fit, the variables differ, or no sample has a density.

    Warns
    -----
    StatsWarning
        As in `importance`.

    Examples
    --------
    >>> import fastmaf
    >>> from fastmaf.layers import Affine
    >>> p, q = fastmaf.Flow([Affine([1.0], [1.0])]), fastmaf.Flow([Affine([0.0], [1.0])])  # N(1, 1) and N(0, 1)
    >>> found = product([p, q], seed=0)  # N(0.5, 0.5)
    >>> np.round(found.weights @ found.samples, 1).tolist()
    [0.5]
    """
    if not isinstance(posteriors, (list, tuple)) or len(posteriors) < 2:
        raise ValueError(f"posteriors is {_words.shown(posteriors)}; it must be a list of two or more of Flow and Ensemble")
    held = [_held(f"posteriors[{k}]", flow) for k, flow in enumerate(posteriors)]
    for k, flow in enumerate(held):
        _alike("posteriors[0]", held[0], f"posteriors[{k}]", flow)
    given = [None] * len(held) if contexts is None else list(contexts) if np.iterable(contexts) else []
    if len(given) != len(held):
        raise ValueError(f"contexts is {_words.shown(contexts)}; it must have one entry for each of {len(held)} posteriors")
    under = []
    for k, flow in enumerate(held):
        context, lead = _contexts(flow, given[k], f"contexts[{k}]")
        if lead:
            raise ValueError(f"contexts[{k}] has {lead[0]} rows; it must be one context, ({flow.context_features},)")
        under.append(context)
    log_prior = None if prior is None else _log_density("prior", prior, "posteriors[0]", held[0])
    if isinstance(prior, (Flow, Ensemble)) and prior.context_features:
        raise ValueError(f"prior has {prior.context_features} context features; it must have none")
    n, seed = _words.count("n", n, len(held)), _arrays.seed_or_fresh(seed)
    samples, log_weights, done = _arrays.empty((n, held[0].features), np.dtype(np.float64)), np.empty(n), 0
    counts = [n // len(held) + (k < n % len(held)) for k in range(len(held))]
    for k, flow in enumerate(held):
        for piece in _draws(flow, counts[k], under[k], seed, first=k):
            x = piece.samples[0]
            rows = slice(done, done := done + len(x))
            each = [other.log_prob(x, context).astype(np.float64) for other, context in zip(held, under, strict=True)]
            proposal = np.logaddexp.reduce([log_prob + math.log(count / n) for log_prob, count in zip(each, counts, strict=True)])
            with np.errstate(invalid="ignore"):
                log_weights[rows] = np.sum(each, axis=0) - proposal
                if log_prior is not None:
                    log_weights[rows] -= (len(held) - 1) * log_prior(x, None)
            samples[rows] = x
    return _weighted("the product", samples, log_weights)


# Calibration


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """How a flow does on rows that it has not seen; see `calibration`.

    Attributes
    ----------
    ranks : (N, D) array of int
        Of each variable of a row among the n draws under its context, 0 to n (simulation-based calibration, Talts et al. 2018). Uniform
        if calibrated; in the shape of a cup where the flow is too narrow, of a cap where it is too wide.
    hdr_ranks : (N,) array of int
        How many of the n draws are denser than the row: the mass of the highest-density region that reaches to it, times n. Uniform if
        calibrated; large where the flow is too narrow.
    pit : (N, D) array or None
        Probability integral transform of each column of the noise, exactly; uniform if calibrated, and the columns independent. Column j
        is that of variable j given those before it, if the layers share an order. None where there is no normal noise: of ensembles,
        discrete flows and mixtures.
    draws : int
        n.
    names : tuple of str or None
    ks_ranks, ks_hdr, ks_pit : (D,) array, float, (D,) array or None
        Kolmogorov-Smirnov distances of these from uniform.
    ks_bound : float
        That all of these distances stay below with a probability of 95 % (at least), if the flow is calibrated.

    Examples
    --------
    >>> import fastmaf
    >>> flow = fastmaf.Flow([], features=2)
    >>> calibration(flow, flow.sample(500, seed=1), n=200, seed=2)
    Calibration(500 rows, 2 variables, 200 draws; largest KS distance 0.0401, of pit 0, bound 0.0724: calibrated)
    """

    ranks: Array
    hdr_ranks: Array
    pit: Array | None
    draws: int
    names: tuple[str, ...] | None
    ks_ranks: Array
    ks_hdr: float
    ks_pit: Array | None
    ks_bound: float

    @property
    def calibrated(self) -> bool:
        """Whether all distances are below their bound."""
        return self._largest()[0] < self.ks_bound

    def coverage(self, mass: ArrayLike) -> Any:
        """Expected coverage (Hermans et al. 2022): the share of rows within the highest-density region of a given mass.

        Below the mass the flow is overconfident, above it conservative.

        Parameters
        ----------
        mass : float or array
            From 0 to 1.

        Returns
        -------
        float, or array of the shape of mass
        """
        masses = _arrays.real("mass", mass).astype(np.float64)
        if not ((masses >= 0) & (masses <= 1)).all():
            raise ValueError(f"mass is {_words.shown(mass)}; it must be from 0 to 1")
        inside = np.searchsorted(np.sort(self.hdr_ranks), masses * (self.draws + 1) - 1e-9, "left") / len(self.hdr_ranks)
        return _plain(np.asarray(inside))

    def _largest(self) -> tuple[float, str]:
        """The largest distance, and what it is of."""
        names = self.names or range(self.ranks.shape[1])
        found = [(self.ks_hdr, "coverage")]
        found += [(float(distance), f"rank {_words.cut(str(name), 30)}") for name, distance in zip(names, self.ks_ranks, strict=True)]
        if self.ks_pit is not None:
            found += [(float(distance), f"pit {_words.cut(str(name), 30)}") for name, distance in zip(names, self.ks_pit, strict=True)]
        return max(found)

    def __repr__(self) -> str:
        size = f"{self.ranks.shape[0]} rows, {self.ranks.shape[1]} variables, {self.draws} draws"
        distance, what = self._largest()
        verdict = "calibrated" if self.calibrated else "not calibrated"
        return f"Calibration({size}; largest KS distance {distance:.4f}, of {what}, bound {self.ks_bound:.4f}: {verdict})"


def calibration(flow: Density, x: ArrayLike, context: ArrayLike | None = None, n: int = 1000, seed: Seed = None) -> Calibration:
    """Compare rows with what the flow says under their contexts: ranks of SBC, exact PIT, coverage of highest-density regions.

    For simulation-based inference x are the true parameters and the contexts their simulations, pairs that were held out of the fit. For
    each row n samples are drawn.

    Parameters
    ----------
    flow : Flow or Ensemble
    x : (N, D) array or data frame
        Finite rows that the flow was not fitted to.
    context : (N, C) or (C,) array, optional
    n : int
        Draws for each row.
    seed : int, numpy.random.Generator or SeedSequence, optional

    Returns
    -------
    Calibration

    Raises
    ------
    ValueError
        If an argument does not fit.

    Warns
    -----
    StatsWarning
        If some rows lie outside of what the flow can follow, on a bound for instance; their PIT counts as 1.

    Notes
    -----
    `fastmaf.plot.calibration` is a picture of it. Ties, which only discrete variables have, are broken at random.

    Examples
    --------
    >>> import fastmaf
    >>> flow = fastmaf.MAF(features=2, context_features=1, transforms=1, hidden_features=(8,), seed=0)
    >>> context = np.linspace(-1, 1, 400)[:, None]
    >>> x = flow.sample(1, context, seed=1)[:, 0]
    >>> calibration(flow, x, context, n=100, seed=2).calibrated, calibration(flow, 2 * x, context, n=100, seed=2).calibrated
    (True, False)
    """
    flow, n = _held("flow", flow), _words.count("n", n, 1)
    x, context, shape = _arrays.rows("x", x, context, flow.features, flow.context_features, names=flow.names)
    rows, columns = len(x), flow.features
    if x.ndim != 2 or shape != (rows,) or not rows or (context is not None and context.ndim == 2 and len(context) != rows):
        under = "" if context is None else f" and context {_words.shapes(context.shape)}"
        raise ValueError(f"x has shape {_words.shapes(x.shape)}{under}; x must be (N, {columns}), and a context (C,) or (N, C)")
    _arrays.finite("x", x, flow.names)
    context = None if context is None else _contexts(flow, context)[0]
    seed = _arrays.seed_or_fresh(seed)
    own = flow.log_prob(x, context).astype(np.float64)
    below, equal = np.zeros((2, rows, columns + 1), np.int64)  # the last column is the density, from high to low
    for piece in _draws(flow, n, context, seed, rows):
        for j in range(columns):
            below[piece.groups, j] += (piece.samples[:, :, j] < x[piece.groups, j, None]).sum(axis=1)
            equal[piece.groups, j] += (piece.samples[:, :, j] == x[piece.groups, j, None]).sum(axis=1)
        below[piece.groups, -1] += (piece.log_prob > own[piece.groups, None]).sum(axis=1)
        equal[piece.groups, -1] += (piece.log_prob == own[piece.groups, None]).sum(axis=1)
    ranks = below + np.floor(np.random.default_rng(seed).random(below.shape) * (equal + 1)).astype(np.int64)
    pit = None
    lost = np.isneginf(own)
    if isinstance(flow, Flow) and isinstance(flow.base, Normal):
        noise = flow.to_noise(x, context)
        lost |= np.isnan(noise).any(axis=1)
        pit = np.where(lost[:, None], 1.0, normal_cdf(noise))
    if lost.any():
        _words.warn(
            f"the flow cannot follow {np.count_nonzero(lost)} of {rows} rows of x, outside its bounds or far out; their PIT counts as 1",
            StatsWarning,
        )
    if rows < LEAST:
        _words.warn(f"{rows} row{'s' * (rows > 1)} can hardly tell whether a flow is calibrated: hold out more", StatsWarning)
    distances = _ks_of_ranks(ranks, n)
    tests = columns * (1 if pit is None else 2) + 1
    return Calibration(
        ranks[:, :-1],
        ranks[:, -1],
        pit,
        n,
        flow.names,
        distances[:-1],
        float(distances[-1]),
        None if pit is None else ks_distance(pit),
        ks_bound(rows, tests),
    )


def normal_cdf(u: Array) -> Array:
    """The standard normal distribution function, float64."""
    return np.asarray(0.5 * np.frompyfunc(math.erfc, 1, 1)(-math.sqrt(0.5) * np.asarray(u, np.float64)), np.float64)


def ks_distance(u: Array) -> Array:
    """Kolmogorov-Smirnov distances of the columns of (N, D) numbers from uniform ones between 0 and 1, (D,)."""
    u = np.sort(u, axis=0)
    i = np.arange(len(u))[:, None]
    return np.asarray(np.maximum((i + 1) / len(u) - u, u - i / len(u)).max(axis=0))


def _ks_of_ranks(ranks: Array, n: int) -> Array:
    """Those of the columns of (N, D) ranks from uniform ones among 0, ..., n."""
    counts = np.stack([np.bincount(column, minlength=n + 1) for column in ranks.T])
    return np.asarray(np.abs(counts.cumsum(axis=1) / len(ranks) - np.arange(1, n + 2) / (n + 1)).max(axis=1))


def ks_bound(rows: int, tests: int = 1) -> float:
    """That so many distances of uniform numbers stay below with a probability of 95 % at least.

    The Kolmogorov quantile by its first term, with the correction for few rows of Stephens (1970), and Bonferroni's for several tests.
    """
    root = math.sqrt(rows)
    return math.sqrt(0.5 * math.log(2 * tests / 0.05)) / (root + 0.12 + 0.11 / root)


# Marginals and contexts


@dataclass(frozen=True, eq=False, repr=False)
class Marginal:
    """Some variables of a flow, the others integrated out; see `marginal`.

    Attributes
    ----------
    columns : tuple of int
        Those of the flow, from left to right.
    names : tuple of str or None
    samples : (n, k) or (c, n, k) array
        In float64, in the order of the columns.
    flow : Flow, Ensemble or None
        The marginal itself, with its density, where there is one.
    """

    columns: tuple[int, ...]
    names: tuple[str, ...] | None
    samples: Array
    flow: Density | None

    @property
    def exact(self) -> bool:
        """Whether the density is known, and not by samples alone."""
        return self.flow is not None

    def __repr__(self) -> str:
        how = "exact" if self.exact else "by samples"
        return f"Marginal(columns {_words.shown(self.columns)}, {how}, samples {self.samples.shape})"


def marginal(
    flow: Density, columns: Sequence[str | int] | str | int, context: ArrayLike | None = None, n: int = 10_000, seed: Seed = None
) -> Marginal:
    """Some of the variables alone: exactly if they come first in the order of the flow, by samples otherwise.

    Parameters
    ----------
    flow : Flow or Ensemble
    columns : sequence of str or int, or one of them
        Names of variables, or their numbers; they come out from left to right.
    context : (C,) or (c, C) array, optional
    n : int
        Samples under each context.
    seed : int, numpy.random.Generator or SeedSequence, optional

    Returns
    -------
    Marginal
        Its `exact` says which; its `flow` is then ``flow.prefix(k)``.

    Raises
    ------
    ValueError
        If an argument does not fit.

    Examples
    --------
    >>> import fastmaf
    >>> flow = fastmaf.MADE(features=3, names=["u", "g", "r"])
    >>> marginal(flow, ["g", "u"]).flow.names, marginal(flow, "r", n=100)
    (('u', 'g'), Marginal(columns (2,), by samples, samples (100, 1)))
    """
    flow, n = _held("flow", flow), _words.count("n", n, 1)
    chosen = _chosen(flow, columns)
    known: Density | None = flow if len(chosen) == flow.features else None
    if known is None:
        try:
            first = flow.order[: len(chosen)]
        except AttributeError:  # it has none
            first = ()
        known = flow.prefix(len(chosen)) if set(first) == set(chosen) else None
    source, taken = (flow, chosen) if known is None else (known, list(range(len(chosen))))
    context, lead = _contexts(source, context)
    samples = _arrays.empty((*(lead or (1,)), n, len(chosen)), np.dtype(np.float64))
    done = 0
    for piece in _draws(source, n, context, _arrays.seed_or_fresh(seed)):
        samples[piece.groups, done : done + piece.samples.shape[1]] = piece.samples[:, :, taken]
        done = 0 if piece.last else done + piece.samples.shape[1]
    names = None if flow.names is None else tuple(flow.names[j] for j in chosen)
    return Marginal(tuple(chosen), names, samples.reshape(*lead, n, len(chosen)), known)


def _chosen(flow: Density, columns: Any) -> list[int]:
    """Numbers of the columns that are named, from left to right."""
    listed = [columns] if isinstance(columns, (str, int, np.integer)) else list(columns) if np.iterable(columns) else []
    if not listed or len(listed) > flow.features:
        raise ValueError(f"columns is {_words.shown(columns)}; it must list some of the {flow.features} variables")
    found = set()
    for column in listed:
        if isinstance(column, str):
            if column not in (flow.names or ()):
                raise ValueError(f"columns has {_words.shown(column)}; the flow has {'no such name' if flow.names else 'no names'}")
            found.add((flow.names or ()).index(column))
        else:
            found.add(_words.count("columns", column, 0, flow.features, "the name or number of a variable, or a list of them"))
    if len(found) != len(listed):
        raise ValueError("columns has a variable twice; each can be there once")
    return sorted(found)


def context_distance(flow: Density, context: ArrayLike) -> Array:
    """How far contexts lie from those of the fit, in standard deviations of each column.

    A conditional flow says nothing sensible about contexts far from all that it was fitted to, and says it without hesitation.
    `fastmaf.Flow.sample`, and so all functions here, warn at 100 standard deviations; `log_prob` does not look.

    Parameters
    ----------
    flow : Flow or Ensemble
        Fitted.
    context : array
        Of any shape (..., C).

    Returns
    -------
    (..., C) array

    Raises
    ------
    ValueError
        If the shape does not fit, or the flow does not know the contexts of its fit.

    Examples
    --------
    >>> import fastmaf
    >>> flow = fastmaf.MAF(features=1, context_features=1, transforms=1, hidden_features=(4,), components=2, seed=0)
    >>> x, context = np.random.default_rng(0).normal(size=(2, 200, 1)) * 3
    >>> history = flow.fit(x, context, max_epochs=1, seed=0)
    >>> bool(20 < context_distance(flow, [75.0])[0] < 30)
    True
    """
    flow = _held("flow", flow)
    array = _arrays.real("context", context)
    if not array.ndim or array.shape[-1] != flow.context_features or not flow.context_features:
        raise ValueError(f"context has shape {_words.shapes(array.shape)}; the flow has {flow.context_features} context features")
    record = _record(flow)
    if not record.usual_contexts:
        raise ValueError("flow does not know the contexts of its fit: it is not fitted, or has context layers of its own")
    (layer,) = record.context_layers
    assert isinstance(layer, Affine)
    return np.asarray(np.abs((array - layer.loc) * layer.scale))
