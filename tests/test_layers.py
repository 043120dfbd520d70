"""The layer record: what it refuses, when two records are equal, and that it can hold the networks of other libraries."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

import fastmaf
from fastmaf import masks
from fastmaf.layers import (
    Affine,
    Autoregressive,
    BatchNorm,
    Block,
    Conditioner,
    Dense,
    Elementwise,
    Law,
    Linear,
    Permutation,
    Terminal,
    astype,
)

W2, B2 = np.zeros((2, 2)), np.zeros(2)
FIRST = Dense(np.array([[1.0, 0], [1, 1]]), B2, [1, 2])
SECOND = Dense(np.array([[1.0, 0], [1, 1]]), B2, [1, 2])
FINAL = Dense(np.repeat([[0.0, 0], [1, 0]], 2, axis=0), np.zeros(4))
NET = Conditioner(FIRST, (Block("plain", (SECOND,)),), FINAL)


def made(**changes):
    return Autoregressive([1, 2], replace(NET, **changes))


# What is refused

WRONG = {
    "kind": (lambda: Elementwise(("log",), [0], [1]), "kinds[0] is 'log'; it must be one of 'identity', 'logit'"),
    "bounds missing": (lambda: Elementwise(("logit",), [0], [np.inf]), "column 0 has bounds (0.0, inf), which do not fit 'logit'"),
    "bounds turned": (lambda: Elementwise.from_bounds([None, (1, 0)]), "column 1 has bounds (1.0, 0.0)"),
    "bounds equal": (lambda: Elementwise.from_bounds([(1, 1)]), "column 0 has bounds (1.0, 1.0)"),
    "bounds nan": (lambda: Elementwise.from_bounds([(math.nan, 1)]), "column 0 has bounds (nan, 1.0)"),
    "bounds of three": (lambda: Elementwise.from_bounds([(0, 1, 2)]), "bounds[0] is (0, 1, 2); it must be None or a pair (lower, upper)"),
    "bounds of text": (lambda: Elementwise.from_bounds(["ab"]), "bounds[0] is 'ab'"),
    "bounds shape": (lambda: Elementwise(("identity",), [0, 1], [1]), "lower has shape (2,); expected (1,)"),
    "scale zero": (lambda: Affine([0, 0], [1, 0]), "scale[1] is 0.0; it must be finite and not zero"),
    "loc nan": (lambda: Affine([math.nan], [1]), "loc[0] is nan; it must be finite"),
    "affine shape": (lambda: Affine([0, 0], [1]), "scale has shape (1,); expected (2,)"),
    "affine ndim": (lambda: Affine(0.0, 1.0), "loc has shape (); it must have 1 dimension"),
    "affine text": (lambda: Affine(["a"], [1]), "it must hold real numbers"),
    "affine complex": (lambda: Affine([1j], [1]), "loc has dtype complex128; it must hold real numbers"),
    "batch norm": (lambda: BatchNorm([0], [0, 0], [0], [1]), "beta has shape (2,); expected (1,)"),
    "variance": (lambda: BatchNorm([0], [0], [0], [-1]), "var[0] is -1.0 and eps 1e-05; their sum must be positive"),
    "permutation": (lambda: Permutation([0, 2]), "perm [0, 2] is not a permutation of 0..1"),
    "permutation floats": (lambda: Permutation([0.0, 1.0]), "perm has dtype float64; it must hold integers"),
    "linear": (lambda: Linear(W2, np.eye(3), B2), "upper has shape (3, 3); expected (2, 2)"),
    "linear singular": (lambda: Linear(W2, np.diag([1, 0]), B2), "upper has a zero in row 1 of its diagonal"),
    "law": (lambda: Law("cube"), "law is 'cube'; it must be one of 'exp', 'exp_soft'"),
    "form": (lambda: Law("exp", "both"), "form is 'both'"),
    "constant": (lambda: Law("exp", constants={"clip": 1}), "law 'exp' has no constant 'clip'"),
    "constant value": (lambda: Law("exp_soft", constants={"clip": 0}), "constant 'clip' of law 'exp_soft' is 0.0"),
    "constant nan": (lambda: Law("clamp", constants={"low": math.nan}), "constant 'low' of law 'clamp' is nan"),
    "clamp": (lambda: Law("clamp", constants={"low": 4}), "law 'clamp' has low 4.0 and high 3.0"),
    "bias": (lambda: Dense(W2, np.zeros(3)), "bias has shape (3,); expected (2,)"),
    "weight": (lambda: Dense(B2, B2), "weight has shape (2,); it must have 2 dimensions"),
    "degrees": (lambda: Dense(W2, B2, [1]), "degrees has shape (1,); expected (2,)"),
    "context": (lambda: Dense(W2, B2, context="joined"), "context is 'joined'; it must be one of 'none', 'added', 'activated', 'gated'"),
    "context missing": (lambda: Dense(W2, B2, context="added"), "context is 'added', but context_weight is absent"),
    "context given": (lambda: Dense(W2, B2, context_weight=W2), "context is 'none', but context_weight is given"),
    "context bias": (lambda: Dense(W2, B2, context_bias=B2), "context is 'none', but context_bias is given"),
    "context rows": (lambda: Dense(W2, B2, None, "added", np.zeros((3, 1))), "context_weight has shape (3, 1); expected (2, 1)"),
    "norm": (lambda: Dense(W2, B2, norm_scale=B2), "norm_shift is missing"),
    "norm shape": (lambda: Dense(W2, B2, norm_scale=np.ones(3), norm_shift=B2), "norm_scale has shape (3,); expected (2,)"),
    "block": (lambda: Block("dense", (FIRST,)), "block is 'dense'; it must be one of 'plain', 'linear', 'residual', 'linear_residual'"),
    "plain of two": (lambda: Block("plain", (FIRST, FIRST)), "a plain block has 2 maps"),
    "residual of one": (lambda: Block("linear_residual", (FIRST,)), "a linear_residual block has 1 maps"),
    "residual widths": (lambda: Block("residual", (Dense(np.zeros((2, 3)), B2, [1, 1]), FIRST)), "a residual block maps 3 units to 2"),
    "residual degrees": (
        lambda: made(blocks=(Block("residual", (Dense(W2, B2, [1, 1]), Dense(W2, B2, [1, 1]))),), final=FINAL),
        "block 0 adds units to others of higher degree",
    ),
    "activation": (lambda: made(activation="sin"), "activation is 'sin'"),
    "no degrees": (lambda: made(initial=Dense(W2, B2)), "hidden map 0 has no degrees"),
    "no initial": (lambda: made(initial=None), "a conditioner with blocks needs an initial map"),
    "chain": (lambda: made(blocks=(Block("plain", (Dense(np.zeros((2, 3)), B2, [1, 1]),)),)), "hidden map 1 reads 3 units of 2"),
    "final reads": (lambda: made(final=Dense(np.zeros((4, 3)), np.zeros(4))), "the final map reads 3 units of 2"),
    "final rows": (lambda: made(final=Dense(W2, B2)), "the final map has 2 rows; 2 variables need 4"),
    "ranks": (lambda: Autoregressive([0, 1], NET), "ranks [0, 1] must be positive, one per variable"),
    "ranks many": (lambda: Autoregressive([1, 2, 3], NET), "the first map reads 2 variables; there are 3 ranks"),
    "ranks floats": (lambda: Autoregressive([1.0, 2.0], NET), "ranks has dtype float64"),
    "direction": (lambda: Autoregressive([1, 2], NET, direction="up"), "direction is 'up'"),
    "mask of initial": (lambda: made(initial=Dense(W2 + 1, B2, [1, 2])), "hidden map 0 has a weight at (0, 1) that its degrees forbid"),
    "mask of block": (
        lambda: made(blocks=(Block("plain", (Dense(W2 + 1, B2, [1, 2]),)),)),
        "hidden map 1 has a weight at (0, 1) that its degrees forbid",
    ),
    "mask of final": (
        lambda: made(final=Dense(np.ones((4, 2)), np.zeros(4))),
        "the final map has a weight at (0, 0) that its degrees forbid",
    ),
    "mask of nan": (lambda: made(final=replace(FINAL, weight=np.full((4, 2), np.nan))), "the final map has a weight at (0, 0)"),
    "mask of skip": (lambda: made(skip=np.ones((4, 2))), "skip has a weight at (0, 0) that its degrees forbid"),
    "skip": (lambda: made(skip=np.zeros((2, 2))), "skip has shape (2, 2); expected (4, 2)"),
    "conditional": (lambda: Terminal([1, 2], NET, "poisson"), "conditional is 'poisson'"),
    "components": (lambda: Terminal([1, 2], NET, "mixture", 0), "components is 0"),
    "categories": (lambda: Terminal([1, 2], NET, "categorical", categories=(4,)), "categories has 1 entries; there are 2 ranks"),
    "category": (lambda: Terminal([1, 2], NET, "categorical", categories=(3, 1)), "categories is 1; it must be at least 2"),
    "terminal rows": (lambda: Terminal([1, 2], NET, "mixture", 2), "the final map has 4 rows; 2 variables need 12"),
    "terminal law": (lambda: Terminal([1, 2], NET, "mixture", law="cube"), "law is 'cube'"),
    "terminal constant": (lambda: Terminal([1, 2], NET, "mixture", constants={"eps": 1}), "law 'exp_soft' has no constant 'eps'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case):
    build, message = WRONG[case]
    with pytest.raises(ValueError) as error:
        build()
    assert message in str(error.value)


def test_masks_of_categories_of_unequal_size():
    wide = lambda split: Dense(np.repeat([[0.0, 0], [1, 0]], split, axis=0), np.zeros(6))  # noqa: E731
    Terminal([1, 2], replace(NET, final=wide([2, 4])), "categorical", categories=(2, 4))
    with pytest.raises(ValueError, match=r"the final map has a weight at \(1, 0\) that its degrees forbid"):
        Terminal([1, 2], replace(NET, final=wide([1, 5])), "categorical", categories=(2, 4))


# Records as values


def records():
    gated = replace(FIRST, context="gated", context_weight=np.ones((2, 3)), context_bias=B2, norm_scale=np.ones(2), norm_shift=B2)
    mixture = replace(NET, final=Dense(np.repeat([[0.0, 0], [1, 0]], 3, axis=0), np.zeros(6)))
    return [
        Elementwise.from_bounds([(0, 1), None]),
        Affine([1, 2], [3, 4]),
        BatchNorm(B2, B2, B2, np.ones(2), 1e-3),
        Permutation([1, 0]),
        Linear(W2, np.eye(2), B2),
        made(),
        made(initial=gated, skip=np.array([[0.0, 0], [0, 0], [1, 0], [2, 0]])),
        Autoregressive([1, 2], NET, Law("sigmoid", "affine", {"eps": 0.1}), "noise"),
        Terminal([1, 2], mixture, "mixture", law="softplus", constants={"eps": 0.01}),
        Law("clamp", constants={"low": -1}),
    ]


@pytest.mark.parametrize("k", range(10))
def test_equality(k):
    record = records()[k]
    assert record == records()[k]
    assert all(record != other for j, other in enumerate(records()) if j != k)
    for twin in (copy.copy(record), copy.deepcopy(record), pickle.loads(pickle.dumps(record))):
        assert twin == record
    with pytest.raises(TypeError):
        hash(record)


def test_equality_sees_every_array():
    layer = Affine([1, 2], [3, 4])
    assert layer != Affine([1, 2], [3, 5]) and layer != Affine([1, 3], [3, 4]) and layer != Affine([1], [3])
    assert made() != made(activation="tanh") and made() != made(final_activation=False)
    assert made() != astype(made(), np.float32), "the dtype is part of a record"
    assert Law("softplus") != Law("softplus", constants={"eps": 0.1}) and Law() != "exp_soft"


def arrays(record):
    for f in fields(record):
        value = getattr(record, f.name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, np.ndarray):
                yield item
            elif hasattr(item, "__dataclass_fields__"):
                yield from arrays(item)


@pytest.mark.parametrize("k", range(10))
def test_records_do_not_change(k):
    record = records()[k]
    assert all(not array.flags.writeable for array in arrays(record))
    with pytest.raises(FrozenInstanceError):
        setattr(record, fields(record)[0].name, None)


def test_records_own_their_arrays():
    loc = np.array([1.0, 2.0])
    layer = Affine(loc, np.ones(2))
    loc[0] = 7
    assert layer.loc.tolist() == [1, 2]
    with pytest.raises(TypeError):
        Law().constants["clip"] = 1


def test_dtypes():
    for record in records():
        single = astype(record, np.float32)
        wanted = np.float64 if isinstance(record, (Elementwise, Affine)) else np.float32
        assert {array.dtype for array in arrays(single) if array.dtype.kind == "f"} <= {np.dtype(wanted)}
        assert astype(single, np.float64) == record
    assert made().ranks.dtype == np.int64
    assert Dense(np.ones((1, 1), np.int8), [True]).weight.dtype == np.float64


def test_constants_have_defaults():
    assert dict(Law("sigmoid").constants) == {"eps": 1e-3, "shift": 2.0}
    assert dict(Law("sigmoid", constants={"eps": 1}).constants) == {"eps": 1.0, "shift": 2.0}
    assert Law().constants["clip"] == math.log(1000)


# The networks of other libraries, evaluated number by number from their own arrays


def apply(weight, bias, h, mask=None):
    """W h + b by a double loop."""
    return [float(bias[j]) + sum(float(weight[j, k]) * h[k] for k in range(len(h)) if mask is None or mask[j, k]) for j in range(len(bias))]


def add(*vectors):
    return [sum(numbers) for numbers in zip(*vectors, strict=True)]


def each(function, *vectors):
    return [function(*numbers) for numbers in zip(*vectors, strict=True)]


def relu(v):
    return max(v, 0.0)


def elu(v):
    return v if v > 0 else math.expm1(v)


def softplus(v):
    return math.log1p(math.exp(v))


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def log_normal(z):
    return sum(-0.5 * v * v - 0.5 * math.log(2 * math.pi) for v in z)


class Maker:
    """Random arrays, with masks beside them as other libraries store them."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape, size=0.5):
        return size * self.rng.normal(size=shape)

    def linear(self, mask):
        """Weight, bias and mask; what the mask hides is not zero."""
        return self(*mask.shape), self(mask.shape[0]), mask


def stored(linear, degrees=None, rows=None, **options):
    """The Dense of a weight, a bias and a mask, its rows reordered."""
    weight, bias, mask = linear
    rows = slice(None) if rows is None else rows
    return Dense((weight * mask)[rows], bias[rows], degrees, **options)


def compare(flow, density, x, context=None):
    """log_prob against a function of one row, and samples that come back to their noise."""
    with_context = [None] * len(x) if context is None else context
    expected = [density(row.tolist(), None if c is None else c.tolist()) for row, c in zip(x, with_context, strict=True)]
    fastmaf.set_backend("reference")
    try:
        assert np.allclose(flow.log_prob(x, context), expected, rtol=1e-10)
        assert np.allclose(flow.from_noise(flow.to_noise(x, context), context), x, rtol=1e-8)
    finally:
        fastmaf.set_backend(None)


def swapped(features):
    """Rows of (scale, shift) per variable as rows of (shift, scale)."""
    return np.arange(2 * features).reshape(-1, 2)[:, ::-1].ravel()


@pytest.mark.parametrize("random_mask", [False, True])
def test_nflows_residual(random_mask):
    """A permutation, then a residual MADE with inner batch norms and contexts, softplus scales and (scale, shift) rows."""
    make, features, width, c = Maker(1), 4, 6, 2
    degrees = make.rng.integers(1, features, width) if random_mask else 1 + np.arange(width) % (features - 1)
    inputs = np.arange(1, features + 1)
    later = masks.hidden_mask(degrees, degrees)
    perm = np.array([2, 0, 3, 1])
    initial, blocks = make.linear(masks.hidden_mask(degrees, inputs)), [[make.linear(later), make.linear(later)] for _ in range(2)]
    final = make.linear(masks.output_mask(inputs, degrees, 2))
    contexts = [(make(width, c), make(width)) for _ in range(3)]
    norms = [[(make.rng.uniform(0.5, 2, width), make(width)) for _ in range(2)] for _ in range(2)]

    def density(x, context):
        x = [x[j] for j in perm]
        h = add(apply(*initial[:2], x, initial[2]), each(math.tanh, apply(*contexts[0], context)))
        for (first, second), outer, (norm_a, norm_b) in zip(blocks, contexts[1:], norms, strict=True):
            t = each(lambda v, s, b: math.tanh(v * s + b), h, *norm_a)
            t = add(apply(*first[:2], t, first[2]), apply(*outer, context))
            t = each(lambda v, s, b: math.tanh(v * s + b), t, *norm_b)
            h = add(h, apply(*second[:2], t, second[2]))
        parameters = apply(*final[:2], h, final[2])
        scale = [softplus(u) + 1e-3 for u in parameters[0::2]]
        return log_normal(each(lambda v, s, t: s * v + t, x, scale, parameters[1::2])) + sum(map(math.log, scale))

    net = Conditioner(
        stored(initial, degrees, context="activated", context_weight=contexts[0][0], context_bias=contexts[0][1]),
        tuple(
            Block(
                "residual",
                (
                    stored(
                        first, degrees, context="added", context_weight=outer[0], context_bias=outer[1], norm_scale=a[0], norm_shift=a[1]
                    ),
                    stored(second, degrees, norm_scale=b[0], norm_shift=b[1]),
                ),
            )
            for (first, second), outer, (a, b) in zip(blocks, contexts[1:], norms, strict=True)
        ),
        stored(final, rows=swapped(features)),
        "tanh",
        final_activation=False,
    )
    flow = fastmaf.Flow([Permutation(perm), Autoregressive(inputs, net, Law("softplus", "affine"))], context_features=c, dtype="float64")
    compare(flow, density, make(5, features, size=1), make(5, c, size=1))


def test_zuko_residual():
    """Widths that differ: no activation on the trunk; context columns behind those of x; soft-clipped log-scales, z = x e^s + t."""
    make, features, c, slope = Maker(2), 3, 2, 1e-3
    ranks = np.array([3, 1, 2])
    degrees = [np.arange(5) % features, np.arange(4)[::-1] % features]
    initial = make.linear(np.concatenate([masks.hidden_mask(degrees[0], ranks), np.ones((5, c), bool)], axis=1))
    wider = make.linear(masks.hidden_mask(degrees[1], degrees[0]))
    squares = [[make.linear(masks.hidden_mask(d, d)) for _ in range(2)] for d in degrees]
    final = make.linear(masks.output_mask(ranks, degrees[1], 2))

    def residual(h, first, second):
        return add(h, apply(*second[:2], each(elu, apply(*first[:2], h, first[2])), second[2]))

    def density(x, context):
        h = residual(apply(*initial[:2], x + context, initial[2]), *squares[0])
        h = residual(apply(*wider[:2], h, wider[2]), *squares[1])
        parameters = apply(*final[:2], h, final[2])
        log_scale = [a / (1 + abs(a / math.log(slope))) for a in parameters[1::2]]
        return log_normal(each(lambda v, s, t: v * math.exp(s) + t, x, log_scale, parameters[0::2])) + sum(log_scale)

    weight, bias, mask = initial
    net = Conditioner(
        Dense((weight * mask)[:, :features], bias, degrees[0], "added", weight[:, features:]),
        (
            Block("linear_residual", tuple(stored(linear, degrees[0]) for linear in squares[0])),
            Block("linear", (stored(wider, degrees[1]),)),
            Block("linear_residual", tuple(stored(linear, degrees[1]) for linear in squares[1])),
        ),
        stored(final),
        "elu",
        final_activation=False,
    )
    layer = Autoregressive(ranks, net, Law("exp_soft", "affine", {"clip": -math.log(slope)}))
    compare(fastmaf.Flow([layer], context_features=c, dtype="float64"), density, make(5, features, size=1), make(5, c, size=1))


def test_normflows_gated_inverse_flow():
    """The network reads the noise; contexts gate the residuals; x = s z + t with sigmoid scales."""
    make, features, width, c = Maker(3), 3, 5, 2
    degrees, inputs = 1 + np.arange(width) % (features - 1), np.arange(1, features + 1)
    later = masks.hidden_mask(degrees, degrees)
    initial, first, second = make.linear(masks.hidden_mask(degrees, inputs)), make.linear(later), make.linear(later)
    final = make.linear(masks.output_mask(inputs, degrees, 2))
    entry, gate = (make(width, c), make(width)), (make(width, c), make(width))

    def density(x, context):
        z, log_det = [], 0.0
        for i in range(features):  # column i of the noise follows from those before it
            known = z + [0.0] * (features - i)
            h = add(apply(*initial[:2], known, initial[2]), apply(*entry, context))
            t = apply(*first[:2], each(relu, h), first[2])
            t = apply(*second[:2], each(relu, t), second[2])
            h = add(h, each(lambda v, g: v * sigmoid(g), t, apply(*gate, context)))
            u, t = apply(*final[:2], h, final[2])[2 * i : 2 * i + 2]
            scale = sigmoid(u + 2) + 1e-3
            z.append((x[i] - t) / scale)
            log_det -= math.log(scale)
        return log_normal(z) + log_det

    gated = stored(second, degrees, context="gated", context_weight=gate[0], context_bias=gate[1])
    net = Conditioner(
        stored(initial, degrees, context="added", context_weight=entry[0], context_bias=entry[1]),
        (Block("residual", (stored(first, degrees), gated)),),
        stored(final, rows=swapped(features)),
        "relu",
        final_activation=False,
    )
    flow = fastmaf.Flow([Autoregressive(inputs, net, Law("sigmoid"), "noise")], context_features=c, dtype="float64")
    compare(flow, density, make(5, features, size=1), make(5, c, size=1))


def test_pyro_direct_weights():
    """Outputs in blocks (all means, then all log-scales), clamped; weights from inputs to outputs; columns that share a rank."""
    make, features = Maker(4), 4
    ranks, degrees = np.array([2, 1, 2, 3]), np.array([1, 2, 1, 2, 2])
    initial = make.linear(masks.hidden_mask(degrees, ranks))
    final = make.linear(np.tile(ranks[:, None] > degrees, (2, 1)))
    skip = make(2 * features, features) * np.tile(ranks[:, None] > ranks, (2, 1))
    law = Law("clamp", constants={"low": -0.1, "high": 0.2})

    def density(x, _):
        h = each(relu, apply(*initial[:2], x, initial[2]))
        parameters = add(apply(*final[:2], h, final[2]), apply(skip, np.zeros(2 * features), x))
        log_scale = [min(max(v, -0.1), 0.2) for v in parameters[features:]]
        return log_normal(each(lambda v, m, s: (v - m) * math.exp(-s), x, parameters[:features], log_scale)) - sum(log_scale)

    rows = np.arange(2 * features).reshape(2, -1).T.ravel()
    net = Conditioner(stored(initial, degrees), (), stored(final, rows=rows), "relu", skip=skip[rows])
    compare(fastmaf.Flow([Autoregressive(ranks, net, law)], dtype="float64"), density, make(5, features, size=1))


def test_papamakarios():
    """Log-precisions and the paper's batch norm; two MADEs of opposite order; the first variable does not see the context."""
    make, features, width, c = Maker(5), 3, 4, 2
    degrees, mades, layers = 1 + np.arange(width) % (features - 1), [], []
    for ranks in ([1, 2, 3], [3, 2, 1]):
        ranks = np.array(ranks)
        initial, second = make.linear(masks.hidden_mask(degrees, ranks)), make.linear(masks.hidden_mask(degrees, degrees))
        means, precisions = (make.linear(masks.output_mask(ranks, degrees, 1)) for _ in range(2))
        wx = make(c, width)
        norm = make(features), make(features), make(features), make.rng.uniform(0.5, 2, features)
        mades.append((initial, second, means, precisions, wx, norm))
        final = Dense(
            *(
                np.stack([a, b], axis=1).reshape(-1, *a.shape[1:])
                for a, b in ((means[0] * means[2], precisions[0] * precisions[2]), (means[1], precisions[1]))
            )
        )
        net = Conditioner(
            stored(initial, degrees, context="added", context_weight=wx.T), (Block("plain", (stored(second, degrees),)),), final, "tanh"
        )
        log_gamma, beta, mean, var = norm
        layers += [Autoregressive(ranks, net, Law("log_precision")), BatchNorm(log_gamma, beta, mean, var, 0)]

    def density(x, context):
        total = 0.0
        for initial, second, means, precisions, wx, (log_gamma, beta, mean, var) in mades:
            h = each(math.tanh, add(apply(*initial[:2], x, initial[2]), apply(wx.T, np.zeros(width), context)))
            h = each(math.tanh, apply(*second[:2], h, second[2]))
            m, log_p = apply(*means[:2], h, means[2]), apply(*precisions[:2], h, precisions[2])
            x = each(lambda v, mu, lp: math.exp(0.5 * lp) * (v - mu), x, m, log_p)
            x = each(lambda v, g, b, mu, s: math.exp(g) * (v - mu) / math.sqrt(s) + b, x, log_gamma, beta, mean, var)
            total += 0.5 * sum(log_p) + float(log_gamma.sum()) - 0.5 * float(np.log(var).sum())
        return log_normal(x) + total

    compare(fastmaf.Flow(layers, context_features=c, dtype="float64"), density, make(5, features, size=1), make(5, c, size=1))


def test_nflows_mixture():
    """Outputs per variable in the order (component, parameter); standard deviations softplus(r) + 0.01."""
    make, features, width, components = Maker(6), 3, 6, 4
    degrees, inputs = 1 + np.arange(width) % (features - 1), np.arange(1, features + 1)
    initial, final = make.linear(masks.hidden_mask(degrees, inputs)), make.linear(masks.output_mask(inputs, degrees, 3 * components))

    def density(x, _):
        parameters = apply(*final[:2], each(relu, apply(*initial[:2], x, initial[2])), final[2])
        total = 0.0
        for i in range(features):
            triples = [parameters[(i * components + k) * 3 :][:3] for k in range(components)]
            weights = [math.exp(logit) for logit, _, _ in triples]
            scales = [softplus(r) + 1e-2 for _, _, r in triples]
            densities = [math.exp(log_normal([(x[i] - m) / s])) / s for (_, m, _), s in zip(triples, scales, strict=True)]
            total += math.log(sum(w * p for w, p in zip(weights, densities, strict=True)) / sum(weights))
        return total

    rows = np.arange(3 * components * features).reshape(features, components, 3).transpose(0, 2, 1).ravel()
    net = Conditioner(stored(initial, degrees), (), stored(final, rows=rows), "relu")
    base = Terminal(inputs, net, "mixture", components, constants={"eps": 1e-2}, law="softplus")
    compare(fastmaf.Flow([], base, dtype="float64"), density, make(5, features, size=1))
