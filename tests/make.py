"""Flows for tests: every weight random, no output so large that anything explodes, shapes small and odd."""

from __future__ import annotations

import numpy as np

import fastmaf
from fastmaf import masks
from fastmaf.layers import Affine, Autoregressive, Block, Conditioner, Dense, Elementwise, Law, Permutation

SHAPES = (
    (1, (), 0),
    (1, (5,), 0),
    (1, (4, 3), 2),
    (2, (), 1),
    (2, (1,), 0),
    (2, (9, 8), 0),
    (3, (2, 2), 0),
    (4, (), 0),
    (5, (2,), 0),
    (6, (3, 3), 2),
    (7, (17, 5), 1),
    (8, (33, 16, 31), 0),
    (13, (49, 50), 3),
    (17, (8,), 0),
)
"""(features, hidden, context_features): no hidden layers, fewer units than degrees, widths around those of vectors."""

BOUNDS = ((0.0, 1.0), None, (2.0, None), (None, -1.0), (-3.0, 5.0), (None, None))
"""Repeated over the columns by ``flow(bounds=True)``."""


def dense(rng, mask, degrees=None, context_features=0, gain=1.0, **options):
    """A map whose outputs are of the size of `gain`, (rows, 1) or a number; with a context, "added" unless `options` say otherwise."""
    rows, gain = mask.shape[0], np.resize(gain, (mask.shape[0], 1))
    scale = gain / np.sqrt(np.maximum(1, mask.sum(axis=1, keepdims=True)))
    weight = np.where(mask, scale * rng.normal(size=mask.shape), 0.0)
    if context_features:
        options.setdefault("context", "added")
        options["context_weight"] = gain * rng.normal(size=(rows, context_features)) / np.sqrt(context_features)
    return Dense(weight, 0.5 * gain[:, 0] * rng.normal(size=rows), degrees, **options)


def conditioner(rng, ranks, hidden, context_features=0, activation="relu", rows=2):
    """A plain network, its context added at the first map; the units of each layer in random order; log-scales smaller than shifts."""
    maps, reads = [], ranks
    for width in hidden:
        degrees = rng.permutation(masks.hidden_degrees(width, ranks.size, context_features > 0))
        maps.append(dense(rng, masks.hidden_mask(degrees, reads), degrees, 0 if maps else context_features))
        reads = degrees
    gain = np.resize([[0.5], [0.15]], (rows * ranks.size, 1))
    final = dense(rng, masks.output_mask(ranks, reads, rows), None, 0 if maps else context_features, gain)
    return Conditioner(maps[0] if maps else None, tuple(Block("plain", (m,)) for m in maps[1:]), final, activation, bool(maps))


def flow(
    features,
    hidden=(8, 8),
    transforms=2,
    context_features=0,
    activation="relu",
    order="random",
    law="exp_soft",
    dtype="float64",
    seed=0,
    affine=False,
    bounds=None,
    between=False,
):
    """A flow of plain MADEs.

    `law` is a kind or a `Law`; `affine` puts random Affines in front of the layers and of the context; `bounds` are those of `MAF`, or True
    for a bit of everything; `between` puts a Permutation and an Affine behind every MADE.
    """
    rng = np.random.default_rng([seed, features, len(hidden), context_features])
    layers, context_layers = [], []
    if bounds is not None:
        layers.append(Elementwise.from_bounds([BOUNDS[j % len(BOUNDS)] for j in range(features)] if bounds is True else bounds))
    if affine:
        layers.append(random_affine(rng, features))
        context_layers += [random_affine(rng, context_features)] * (context_features > 0)
    for ranks in masks.layer_ranks(order, features, transforms, seed):
        net = conditioner(rng, ranks, hidden, context_features, activation)
        layers.append(Autoregressive(ranks, net, law if isinstance(law, Law) else Law(law)))
        if between:
            layers += [Permutation(rng.permutation(features)), random_affine(rng, features)]
    return fastmaf.Flow(layers, features=features, context_features=context_features, context_layers=context_layers, dtype=dtype)


def random_affine(rng, width):
    """Scales around 1 of either sign."""
    return Affine(0.5 * rng.normal(size=width), rng.choice([-1, 1], size=width) * rng.uniform(0.7, 1.4, size=width))


def contexts(flow, *shape, seed=0):
    """Standard normal contexts (*shape, C), or None for a flow without."""
    if not flow.context_features:
        return None
    return np.random.default_rng([seed, 1]).normal(size=(*shape, flow.context_features)).astype(flow.dtype)


def rows(flow, n, context=None, seed=0):
    """Rows (n, D) inside the bounds and not far out: what standard normal noise turns into."""
    noise = np.random.default_rng([seed, 2]).normal(size=(n, flow.features)).astype(flow.dtype)
    return flow.from_noise(noise, context)


def numerical_gradient(function, x, step=1e-5):
    """Central differences of a function of an array that gives a number, in float64."""
    gradient = np.empty(x.shape)
    for place in np.ndindex(*x.shape):
        moved = np.array([x, x])
        moved[(0, *place)] += step
        moved[(1, *place)] -= step
        gradient[place] = (function(moved[0]) - function(moved[1])) / (moved[(0, *place)] - moved[(1, *place)])
    return gradient
