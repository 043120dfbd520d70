"""Flows for tests: every weight random, no output so large that anything explodes, shapes small and odd."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import fastmaf
from fastmaf import backends, masks
from fastmaf.backends import reference as definition
from fastmaf.layers import ACTIVATIONS, Affine, Autoregressive, Block, Conditioner, Dense, Elementwise, Law, Linear, Permutation, Terminal

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


def conditioner(rng, ranks, hidden, context_features=0, activation="relu", rows=2, input_clip=None):
    """A plain network, its context added at the first map; the units of each layer in random order; log-scales smaller than shifts."""
    maps, reads = [], ranks
    for width in hidden:
        degrees = rng.permutation(masks.hidden_degrees(width, ranks.size, context_features > 0))
        maps.append(dense(rng, masks.hidden_mask(degrees, reads), degrees, 0 if maps else context_features))
        reads = degrees
    gain = np.resize([[0.5], [0.15]], (rows * ranks.size, 1))
    final = dense(rng, masks.output_mask(ranks, reads, rows), None, 0 if maps else context_features, gain)
    return Conditioner(
        maps[0] if maps else None, tuple(Block("plain", (m,)) for m in maps[1:]), final, activation, bool(maps), input_clip=input_clip
    )


def blocks_network(rng, ranks, kinds, modes, context_features=0, activation="relu", rows=2, width=11, bias=True, norms=False, zeros=False):
    """A network of blocks as other libraries build them.

    `kinds` are those of the blocks; `modes` how a context enters, map by map, the first one's and the final one's included, "none" where
    there are too few; with a `bias` of its own but in the final map. Degrees grow from one map to the next inside blocks, the last ones
    of a residual block beyond those that they are added to. With `norms`, there is one in front of every map but the first;
    with `zeros` a fifth of the weights are zero.
    """
    least, most = (0 if context_features else 1), max(1, int(ranks.max()) - 1)
    modes = iter(modes)

    def options(final=False):
        mode = next(modes, "none")
        if mode == "none" or not context_features:
            return {}
        own = {"context": mode, "context_weight": rng.normal(size=(rows * ranks.size if final else width, context_features))}
        own["context_weight"] *= (0.2 if final else 0.7) / np.sqrt(context_features)
        return own if final or not bias else {**own, "context_bias": 0.5 * rng.normal(size=width)}

    def norm(inputs):
        return {"norm_scale": rng.uniform(0.6, 1.5, inputs), "norm_shift": 0.4 * rng.normal(size=inputs)} if norms else {}

    def zeroed(mask):
        return mask & (rng.uniform(size=mask.shape) < 0.8) if zeros else mask

    def hidden(reads, degrees, first=False):
        mask = zeroed(masks.hidden_mask(degrees, reads))
        return dense(rng, mask, degrees, gain=0.8, **options(), **({} if first else norm(reads.size)))

    degrees = rng.integers(least, most + 1, width)
    initial, own, blocks = hidden(ranks, degrees, True), degrees, []
    for kind in kinds:
        if "residual" not in kind:
            degrees = rng.integers(least, most + 1, width)
            blocks.append(Block(kind, (hidden(own, degrees),)))
        else:
            inner = np.minimum(rng.permutation(own) + rng.integers(0, 2, width), most)
            degrees = np.minimum(own + rng.integers(0, 2, width), most)
            blocks.append(Block(kind, (hidden(own, inner), hidden(inner, degrees))))
        own = degrees
    gain = np.resize([[0.5], [0.15]], (rows * ranks.size, 1))
    final = dense(rng, zeroed(masks.output_mask(ranks, own, rows)), None, 0, gain, **options(True), **norm(width))
    return Conditioner(initial, tuple(blocks), final, activation, not kinds or "residual" not in kinds[-1])


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
    linear=False,
    ranks=None,
    input_clip=None,
    base=None,
    blocks=None,
    direction="data",
):
    """A flow of plain MADEs.

    `ranks`, one vector for all MADEs, goes before `order`; `law` is a kind or a `Law`; `affine` puts random Affines in front of
    the layers and of the context; `bounds` are those of `MAF`, or True
    for a bit of everything; `between` puts a Permutation and an Affine behind every MADE; `linear` puts a Linear and a Permutation in
    front of the first one and behind every one; `base` is the law of a mixture of three;
    `blocks` are arguments of `blocks_network` in place of `hidden`; `direction` of the MADEs, or "both" in turn.
    """
    directions = itertools.cycle(("noise", "data") if direction == "both" else (direction,))
    rng = np.random.default_rng([seed, features, len(hidden), context_features])
    layers, context_layers = [], []
    if bounds is not None:
        layers.append(Elementwise.from_bounds([BOUNDS[j % len(BOUNDS)] for j in range(features)] if bounds is True else bounds))
    if affine:
        layers.append(random_affine(rng, features))
        context_layers += [random_affine(rng, context_features)] * (context_features > 0)
    if linear:
        layers += [random_linear(rng, features), Permutation(rng.permutation(features))]
    for own in masks.layer_ranks(order, features, transforms, seed) if ranks is None else [np.array(ranks)] * transforms:
        if blocks is None:
            net = conditioner(rng, own, hidden, context_features, activation, input_clip=input_clip)
        else:
            net = replace(
                blocks_network(rng, own, context_features=context_features, activation=activation, **blocks), input_clip=input_clip
            )
        layers.append(Autoregressive(own, net, law if isinstance(law, Law) else Law(law), next(directions)))
        if between:
            layers += [Permutation(rng.permutation(features)), random_affine(rng, features)]
        if linear:
            layers += [random_linear(rng, features), Permutation(rng.permutation(features))]
    if base is not None:
        own = rng.permutation(features) + 1
        net = conditioner(rng, own, hidden, context_features, activation, rows=9)
        base = Terminal(own, net, "mixture", 3, law=base.kind, constants=base.constants)
    return fastmaf.Flow(layers, features=features, context_features=context_features, context_layers=context_layers, base=base, dtype=dtype)


def random_affine(rng, width):
    """Scales around 1 of either sign."""
    return Affine(0.5 * rng.normal(size=width), rng.choice([-1, 1], size=width) * rng.uniform(0.7, 1.4, size=width))


def random_linear(rng, features):
    """Diagonals around 1 of either sign; what lies beside them is smaller, and is there where the triangles are zero too."""
    lower, upper = 0.3 * rng.normal(size=(2, features, features)) / np.sqrt(features)
    np.fill_diagonal(upper, rng.choice([-1, 1], size=features) * rng.uniform(0.7, 1.4, size=features))
    return Linear(lower, upper, 0.5 * rng.normal(size=features))


def file_bytes(flow):
    """What `save` writes of a flow or an ensemble."""
    file = io.BytesIO()
    flow.save(file)
    return file.getvalue()


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


# What every backend is held against

ROWS = 101

FIXED = [
    Elementwise.from_bounds(BOUNDS),
    random_affine(np.random.default_rng(0), 6),
    Permutation([3, 1, 5, 0, 2, 4]),
    random_affine(np.random.default_rng(1), 6),
    random_affine(np.random.default_rng(2), 6),
]

# With constants that matter: of the raw log-scales of `conditioner` some are beyond what is clamped.
LAWS = [
    Law(kind, form, constants)
    for kind, constants in (
        ("softplus", {"eps": 0.01}),
        ("sigmoid", {"eps": 0.02, "shift": 0.5}),
        ("log_precision", {}),
        ("clamp", {"low": -0.15, "high": 0.1}),
    )
    for form in ("standardize", "affine")
]

NETWORKS = {
    "linear": ({"activation": "elu"}, {"kinds": ("linear", "plain", "linear"), "modes": ()}),
    "residual": ({"activation": "relu", "transforms": 3}, {"kinds": ("residual", "residual"), "modes": ()}),
    "linear_residual": ({"activation": "gelu"}, {"kinds": ("linear_residual", "linear", "linear_residual"), "modes": (), "zeros": True}),
    "tied": (
        {"activation": "silu", "ranks": (2, 1, 3, 3, 1, 2), "context_features": 1},
        {"kinds": ("residual", "plain"), "modes": ("added",)},
    ),
    "normed": (
        {"activation": "silu", "affine": True},
        {"kinds": ("plain", "linear", "residual", "linear_residual"), "modes": (), "norms": True},
    ),
    "normed relu": ({"activation": "relu"}, {"kinds": ("residual", "plain", "plain"), "modes": (), "norms": True}),
    "activated": ({"context_features": 2, "activation": "tanh"}, {"kinds": ("plain",), "modes": ("activated",)}),
    "activated gelu": (
        {"context_features": 3, "activation": "gelu", "input_clip": 1.0},
        {"kinds": ("plain", "residual"), "modes": ("activated", "activated", "activated", "activated", "added"), "bias": False},
    ),
    "added": (
        {"context_features": 1, "activation": "relu", "between": True},
        {"kinds": ("residual", "linear_residual"), "modes": ("added", "added", "none", "none", "added", "added"), "bias": True},
    ),
    "gated": (
        {"context_features": 2, "activation": "relu", "transforms": 3},
        {"kinds": ("residual", "residual"), "modes": ("activated", "none", "gated", "none", "gated")},
    ),
    "gated normed": (
        {"context_features": 2, "activation": "silu", "affine": True},
        {"kinds": ("residual", "plain"), "modes": ("gated", "gated", "gated", "gated", "added"), "norms": True, "bias": False},
    ),
    "unheard": ({"context_features": 2, "activation": "tanh"}, {"kinds": ("plain",), "modes": ()}),
    "late": ({"context_features": 2, "activation": "tanh"}, {"kinds": ("plain",), "modes": ("none", "none", "added")}),
}
"""By name, arguments of `flow` and of `blocks_network`."""

CASES = {
    **{
        f"{features} {hidden} {c}": {"features": features, "hidden": hidden, "context_features": c, "activation": activation}
        for (features, hidden, c), activation in zip(SHAPES, itertools.cycle(ACTIVATIONS), strict=False)
    },
    **{
        f"{activation}-{law}": {"features": 6, "hidden": (9, 7), "activation": activation, "law": law, "transforms": 3, "affine": True}
        for activation, law in itertools.product(ACTIVATIONS, ("exp", "exp_soft"))
    },
    **{
        f"affine {law}": {"features": 5, "context_features": 1, "activation": "tanh", "law": Law(law, "affine"), "between": True}
        for law in ("exp", "exp_soft")
    },
    **{
        f"{law.kind} {law.form}": {"features": 5, "hidden": (9, 7), "context_features": 1, "activation": "tanh", "law": law} for law in LAWS
    },
    **{f"{name} blocks": {"features": 6, "blocks": blocks, **options} for name, (options, blocks) in NETWORKS.items()},
    "clip": {"features": 4, "law": Law("exp_soft", constants={"clip": 0.1})},
    **{
        f"input_clip {features} {hidden} {c}": {
            "features": features,
            "hidden": hidden,
            "context_features": c,
            "input_clip": 0.7,
            "affine": True,
        }
        for features, hidden, c in ((1, (4,), 1), (5, (9, 7), 0), (6, (), 2), (9, (7, 6, 5), 2), (17, (30,), 1))
    },
    "blocks": {"features": 6, "hidden": (9, 8), "context_features": 2, "ranks": (2, 1, 3, 3, 1, 2)},
    "one block": {"features": 3, "hidden": (4,), "context_features": 1, "ranks": (1, 1, 1)},
    "front": {"features": 6, "hidden": (9,), "context_features": 2, "affine": True, "bounds": True, "between": True, "activation": "silu"},
    "front of 1": {"features": 1, "hidden": (4,), "context_features": 1, "affine": True, "bounds": True, "between": True},
    "front of 9": {"features": 9, "hidden": (7, 6, 5), "affine": True, "bounds": True, "between": True, "activation": "tanh"},
    "without hidden layers": {"features": 5, "hidden": (), "context_features": 2, "affine": True, "between": True, "transforms": 3},
    "larger than a cache": {"features": 3, "hidden": (900, 900), "transforms": 1, "context_features": 1},
    "no layer": [],
    "fixed layers": FIXED,
    "fixed layers in front": [*FIXED, *flow(6, (9,), 1).layers, *FIXED[2:]],
    **{
        f"Linear {features} {hidden} {c}": {
            "features": features,
            "hidden": hidden,
            "context_features": c,
            "activation": activation,
            "linear": True,
        }
        for (features, hidden, c), activation in zip(
            [(1, (4,), 1), (2, (), 0), (7, (17, 5), 1), (16, (9,), 0), (23, (11,), 2), (33, (30,), 0)], itertools.cycle(ACTIVATIONS)
        )
    },
    "Linear front": {
        "features": 9,
        "context_features": 2,
        "affine": True,
        "bounds": True,
        "between": True,
        "linear": True,
        "activation": "gelu",
        "input_clip": 0.7,
    },
    **{
        f"noise {features} {hidden} {c}": {
            "features": features,
            "hidden": hidden,
            "context_features": c,
            "activation": activation,
            "direction": "noise",
        }
        for (features, hidden, c), activation in zip(
            [(1, (), 0), (1, (4, 3), 2), (2, (), 1), (5, (2,), 0), (7, (17, 5), 1), (8, (33, 16, 31), 0), (13, (49, 50), 3)],
            itertools.cycle(ACTIVATIONS),
        )
    },
    **{f"noise {law.kind} {law.form}": {"features": 5, "activation": "tanh", "law": law, "direction": "noise"} for law in LAWS},
    **{
        f"noise {name} blocks": {"features": 6, "blocks": blocks, "direction": "noise", **options}
        for name, (options, blocks) in NETWORKS.items()
    },
    "noise affine": {"features": 5, "context_features": 1, "law": Law("exp", "affine"), "between": True, "direction": "noise"},
    "noise input_clip": {"features": 9, "hidden": (7, 6), "context_features": 2, "input_clip": 0.7, "affine": True, "direction": "noise"},
    "noise tied": {"features": 6, "hidden": (9, 8), "context_features": 2, "ranks": (2, 1, 3, 3, 1, 2), "direction": "noise"},
    "noise one block": {"features": 3, "hidden": (4,), "context_features": 1, "ranks": (1, 1, 1), "direction": "noise"},
    "both directions": {
        "features": 9,
        "hidden": (30,),
        "context_features": 2,
        "between": True,
        "linear": True,
        "transforms": 3,
        "activation": "silu",
        "direction": "both",
    },
    "Linear alone": [random_linear(np.random.default_rng(3), 6)],
    "Linear between fixed layers": [*FIXED, random_linear(np.random.default_rng(4), 6), *FIXED[2:]],
    "Linears around one MADE": [
        random_linear(np.random.default_rng(5), 6),
        random_linear(np.random.default_rng(6), 6),
        *flow(6, (9,), 1).layers,
        random_linear(np.random.default_rng(7), 6),
    ],
}
"""Arguments of `flow`, or layers of a flow of six columns."""

MIXTURES = {
    f"mixture {law.kind}": {"features": 5, "transforms": 1, "context_features": 2, "base": law} for law in LAWS if law.form == "standardize"
}
"""Whose samples rounding may carry from one component to another."""


@contextlib.contextmanager
def using(backend):
    """Another backend is in use; None for the default."""
    previous, backends.active = backends.active, backend
    try:
        yield
    finally:
        backends.active = previous


def reference():
    """The reference is in use."""
    return using(definition.backend)


def case(name, dtype):
    """A flow of `CASES`, what to call it with, and what the reference gives in float64 for the same weights and numbers."""
    given, backend = _case(name, dtype), backends.choose()
    if backend.name == "numba" and (missing := backend.unsupported(given.flow.record)):
        pytest.skip(f"the numba backend has no kernel for {missing}")
    return given


@functools.cache
def _case(name, dtype):
    arguments = {**CASES, **MIXTURES}[name]
    own = fastmaf.Flow(arguments, features=6, dtype=dtype) if isinstance(arguments, list) else flow(**arguments, dtype=dtype)
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(ROWS, own.features)).astype(dtype)
    cotangent = rng.normal(size=ROWS).astype(dtype)
    context = contexts(own, ROWS)
    with reference():
        x = own.from_noise(noise, context)
        exact = own.astype("float64")
        expected = {
            "log_prob": exact.log_prob(x, context),
            "to_noise": exact.to_noise(x, context),
            "from_noise": exact.from_noise(noise, context),
            "gradients": exact.log_prob_and_grad(x, context)[1:],
            "vjp": exact.vjp(x, context, cotangent),
        }
    return SimpleNamespace(flow=own, x=x, context=context, noise=noise, cotangent=cotangent, expected=expected)


def calm_rows(given, n):
    """Rows of a `case` that are farthest from the bounds, for finite differences."""
    first = given.flow.layers[0]
    if not isinstance(first, Elementwise):
        return np.arange(n)
    return np.argsort(-np.minimum(given.x - first.lower, first.upper - given.x).min(axis=1))[:n]


def results(given, rows=slice(None), parameters=True):
    """The bits of every operation, on some of the rows of a `case`."""
    x, noise, cotangent = given.x[rows], given.noise[rows], given.cotangent[rows]
    context = None if given.context is None else given.context[rows]
    value, dx, dcontext = given.flow.log_prob_and_grad(x, context)
    arrays = {
        "log_prob": given.flow.log_prob(x, context),
        "to_noise": given.flow.to_noise(x, context),
        "from_noise": given.flow.from_noise(noise, context),
        "value": value,
        "dx": dx,
        "dcontext": dcontext,
    }
    if parameters:
        arrays["weighted dx"], arrays["weighted dcontext"], arrays["dparameters"] = given.flow.vjp(x, context, cotangent)
        arrays["samples"], arrays["density"] = given.flow.sample_and_log_prob(37, None if context is None else context[:3], seed=5)
    return {name: array for name, array in arrays.items() if array is not None}


def assert_same_bits(actual, expected):
    """Equal, NaN where the other is NaN; zeros may differ in sign."""
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name, strict=True)
