"""`MAF`: the layers, masks and first weights of the flows that it builds."""

from __future__ import annotations

import io
import math
import re

import make
import numpy as np
import pytest

import fastmaf
from fastmaf.layers import Affine, Autoregressive, BatchNorm, Elementwise, Linear, Normal, Terminal


def mades(flow):
    return [layer for layer in flow.layers if isinstance(layer, Autoregressive)]


def test_layers_in_order():
    flow = fastmaf.MAF(features=3, context_features=2, transforms=4, bounds=[(0, 1), None, (0, None)])
    assert [type(layer) for layer in flow.layers] == [Elementwise, Affine] + [Autoregressive] * 4
    assert [type(layer) for layer in flow.context_layers] == [Affine]
    assert flow.layers[0].kinds == ("logit", "identity", "log_above")
    assert flow.layers[1] == Affine(np.zeros(3), np.ones(3))
    assert all(made.law.kind == "exp_soft" and made.direction == "data" for made in mades(flow))


def test_clip_bounds_how_much_a_transform_scales():
    far = 1e6 * np.random.default_rng(0).normal(size=(50, 3))

    def scales(**options):
        flow = fastmaf.MAF(features=3, transforms=1, dtype="float64", input_clip=None, **options)
        return np.abs(np.log(flow.to_noise(far + [0, 0, 1])[:, 2] - flow.to_noise(far)[:, 2])).max()

    with make.reference():
        assert 1 < scales(clip=1.5) < 1.5 < scales() < np.log(1000)
    with pytest.raises(ValueError, match="clip is -1; it must be positive"):
        fastmaf.MAF(features=3, clip=-1)


@pytest.mark.parametrize(("transforms", "bound"), [(1, math.log(1000)), (2, 5), (5, 2), (32, 0.3125)])
def test_all_transforms_together_scale_by_no_more_than_one_bound(transforms, bound):
    assert {made.law.constants["clip"] for made in mades(fastmaf.MAF(features=3, transforms=transforms))} == {bound}
    assert {made.law.constants["clip"] for made in mades(fastmaf.MAF(features=3, transforms=transforms, clip=3))} == {3}


@pytest.mark.parametrize(
    ("order", "ranks"),
    [
        ("sequential", [[1, 2, 3]] * 3),
        ("reverse", [[1, 2, 3], [3, 2, 1], [1, 2, 3]]),
        ([2, 0, 1], [[2, 3, 1]] * 3),
        ([[0, 1, 2], [1, 0, 2], [2, 1, 0]], [[1, 2, 3], [2, 1, 3], [3, 2, 1]]),
    ],
)
def test_orders(order, ranks):
    assert [made.ranks.tolist() for made in mades(fastmaf.MAF(features=3, transforms=3, order=order))] == ranks


def test_random_orders_follow_the_seed():
    orders = [[made.ranks.tolist() for made in mades(fastmaf.MAF(features=8, order="random", seed=seed))] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("hidden", [(), (1,), (3,), (16, 5), (7, 7, 7)])
@pytest.mark.parametrize("features", [1, 2, 6])
@pytest.mark.parametrize("context_features", [0, 2])
def test_weights_fill_their_bounds_and_nothing_else(hidden, features, context_features):
    flow = fastmaf.MAF(features, context_features, hidden_features=hidden, transforms=2)
    for made in mades(flow):
        net = made.conditioner
        assert tuple(dense.bias.size for dense in net.hidden) == hidden
        assert net.final.bias.size == 2 * features
        for k, dense in enumerate((*net.hidden, net.final)):
            c = context_features if k == 0 else 0
            assert (dense.context == "added") == (c > 0) == (dense.context_weight is not None)
            bound = 1 / np.sqrt(dense.weight.shape[1] + c)
            for array in (dense.weight, dense.bias, dense.context_weight):
                assert array is None or np.all(np.abs(array) <= bound)
            assert np.all(dense.bias != 0)


def test_the_first_variable_sees_the_context():
    made = mades(fastmaf.MAF(features=4, context_features=2, hidden_features=(8,)))[0]
    first = made.conditioner.final.weight[:2]
    assert np.any(first != 0)
    assert not np.any(first[:, made.conditioner.initial.degrees > 0])


def test_residual_networks_are_nearly_the_identity_at_first():
    flow = fastmaf.MAF(features=4, context_features=2, transforms=2, hidden_features=(9, 9), residual=True)
    for made in mades(flow):
        net = made.conditioner
        assert [block.kind for block in net.blocks] == ["residual"] * 2 and not net.final_activation
        assert all(np.array_equal(dense.degrees, net.initial.degrees) for dense in net.hidden)
        assert [dense.context for dense in (*net.hidden, net.final)] == ["added"] + ["none"] * 5
        for block in net.blocks:
            first, second = (np.abs([dense.weight.max(), dense.bias.max()]).max() for dense in block.maps)
            assert 0.1 < first <= 1 / 3 and 0 < second <= 1e-3


@pytest.mark.parametrize(("batch_norm", "statistics"), [(True, "batch"), ("act", "data")])
def test_batch_norms_and_linear_layers(batch_norm, statistics):
    flow = fastmaf.MAF(features=3, transforms=2, batch_norm=batch_norm, linear=True, bounds=[None] * 3, dtype="float64", seed=0)
    assert [type(layer) for layer in flow.layers] == [Elementwise, Affine] + [Linear, Autoregressive, BatchNorm] * 2
    zero, one = np.zeros(3), np.ones(3)
    assert all(layer == BatchNorm(zero, zero, zero, one, statistics=statistics) for layer in flow.layers[4::3])
    assert all(layer == Linear(np.eye(3), np.eye(3), zero) for layer in flow.layers[2::3])
    plain = fastmaf.MAF(features=3, transforms=2, bounds=[None] * 3, dtype="float64", seed=0)
    assert mades(flow) == mades(plain), "layers without weights of their own draw none"


def test_mixture_base():
    flow = fastmaf.MAF(features=3, context_features=1, transforms=2, components=4, order="reverse", dtype="float64", seed=0)
    assert isinstance(flow.base, Terminal) and flow.base.components == 4
    assert [made.ranks.tolist() for made in (*mades(flow), flow.base)] == [[1, 2, 3], [3, 2, 1], [1, 2, 3]]
    bias = flow.base.conditioner.final.bias.reshape(3, 3, 4)
    assert not bias[:, [0, 2]].any() and np.unique(bias[:, 1]).size == 12
    alone = fastmaf.MAF(features=3, context_features=1, transforms=2, order="reverse", dtype="float64", seed=0)
    assert mades(flow) == mades(alone) and alone.base == Normal(3)
    orders = [[0, 1, 2], [2, 1, 0], [1, 2, 0]]
    assert fastmaf.MAF(features=3, transforms=2, components=2, order=orders).base.ranks.tolist() == [3, 1, 2]
    random = fastmaf.MAF(features=8, transforms=2, components=2, order="random", seed=3)
    assert [made.ranks.tolist() for made in mades(random)] == [
        made.ranks.tolist() for made in mades(fastmaf.MAF(features=8, transforms=2, order="random", seed=3))
    ]


@pytest.mark.parametrize("hidden", [(), (7,)])
def test_direct_weights_reach_later_variables_only(hidden):
    for made in mades(fastmaf.MAF(features=4, transforms=2, hidden_features=hidden, direct=True, order=[2, 0, 1, 3])):
        assert np.array_equal(made.conditioner.skip != 0, np.repeat(made.ranks[:, None] > made.ranks, 2, axis=0))
        assert np.abs(made.conditioner.skip).max() <= 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"residual": True, "hidden_features": (8, 8)},
        {"batch_norm": True},
        {"batch_norm": "act", "components": 3},
        {"linear": True, "residual": True, "hidden_features": (6,)},
        {"direct": True, "components": 2},
        {"direct": True, "hidden_features": ()},
    ],
)
@pytest.mark.parametrize("context_features", [0, 2])
def test_samples_have_the_density_that_goes_with_them(options, context_features):
    with make.reference():
        flow = fastmaf.MAF(
            5, context_features, 2, **{"hidden_features": (8,), "dtype": "float64", "bounds": [(0, 1)] + [None] * 4, **options}
        )
        context = make.contexts(flow)
        samples, log_prob = flow.sample_and_log_prob(50, context, seed=1)
        np.testing.assert_allclose(flow.log_prob(samples, context), log_prob, rtol=1e-9, atol=1e-9)
        single = flow.astype("float32")
        assert np.array_equal(single.parameters(), flow.parameters().astype(np.float32))


def test_seeds_and_dtypes():
    single, double, other = (fastmaf.MAF(features=3, dtype=d, seed=s) for d, s in (("float32", 1), ("float64", 1), ("float64", 2)))
    assert single.dtype == np.float32 and double.dtype == np.float64
    assert np.array_equal(single.parameters(), double.parameters().astype(np.float32))
    assert not np.array_equal(double.parameters(), other.parameters())


FACTORIES = {
    "MAF": lambda **seed: fastmaf.MAF(4, transforms=2, hidden_features=(5,), order="random", components=2, **seed),
    "MADE": lambda **seed: fastmaf.MADE(4, hidden_features=(5,), order="random", **seed),
    "MADE with masks": lambda **seed: fastmaf.MADE(4, "bernoulli", hidden_features=(5,), masks=3, **seed),
    "maf_paper": lambda **seed: fastmaf.presets.maf_paper(4, transforms=1, hidden_features=(5,), **seed)[0],
    "resmade_lu": lambda **seed: fastmaf.presets.resmade_lu(4, transforms=1, hidden_features=(5, 5), **seed)[0],
}


def drawn(flow):
    """All that a factory draws: weights, and the ranks of the variables."""
    records = (flow._flow, flow.ranks, flow.degrees) if isinstance(flow, fastmaf.MaskedEnsemble) else (flow,)
    ranks = [part.ranks for part in (*records[0].layers, records[0].base) if hasattr(part, "ranks")]
    return b"".join(array.tobytes() for array in (flow.parameters(), *ranks, *records[1:]))


@pytest.mark.parametrize("name", FACTORIES)
def test_flows_without_a_seed_differ_and_record_theirs(name):
    flows = [FACTORIES[name]() for _ in range(5)]
    assert len(set(map(drawn, flows))) == 5
    for flow in flows:
        file = io.BytesIO()
        flow.save(file)
        seed = fastmaf.load(file.getvalue()).training["init_seed"]
        assert seed == flow.training["init_seed"] and drawn(FACTORIES[name](seed=seed)) == drawn(flow)
    assert drawn(FACTORIES[name](seed=None)) not in map(drawn, flows)


@pytest.mark.parametrize("name", FACTORIES)
def test_seeds_of_numpy(name):
    make = FACTORIES[name]

    def five(generator):
        return [drawn(make(seed=generator)) for _ in range(5)]

    assert drawn(make(seed=np.uint64(2**64 - 1))) == drawn(make(seed=2**64 - 1))
    for kind in (np.random.default_rng, np.random.PCG64):
        assert len(set(five(kind(3)))) == 5 and five(kind(3)) == five(kind(3))
    sequence = np.random.SeedSequence(3)
    assert five(sequence) == five(np.random.SeedSequence(3)) == 5 * [drawn(make(seed=sequence))]
    children = [drawn(make(seed=child)) for child in sequence.spawn(4)]
    assert len({drawn(make(seed=sequence)), *children}) == 5


def test_the_seed_of_a_flow_outlives_a_fit():
    flow = fastmaf.MAF(2, transforms=1, hidden_features=(3,))
    seed = flow.training["init_seed"]
    flow.fit(np.random.default_rng(0).normal(size=(100, 2)), max_epochs=1, seed=5)
    assert flow.training["init_seed"] == seed and flow.training["settings"]["seed"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": 0}, "features is 0; it must be at least 1"),
        ({"features": 2.5}, "features is 2.5; it must be an integer"),
        ({"context_features": -1}, "context_features is -1"),
        ({"transforms": 0}, "transforms is 0; it must be at least 1"),
        ({"hidden_features": 100}, "hidden_features is 100; it must be a sequence"),
        ({"hidden_features": (10, 0)}, "hidden_features[1] is 0; it must be at least 1"),
        ({"hidden_features": "12"}, "hidden_features[0] is '1'; it must be an integer"),
        ({"activation": "swish"}, "activation is 'swish'; it must be one of 'relu'"),
        ({"order": "backwards"}, "order is 'backwards'"),
        ({"order": [0, 1, 1]}, "order [0, 1, 1] is not a permutation of 0..2"),
        ({"order": 5}, "order is 5; it must be a sequence"),
        ({"order": [[0, 1, 2]]}, "order lists 1 permutations; the flow has 5 transforms"),
        ({"residual": True, "hidden_features": (8, 9)}, "hidden_features is (8, 9); a residual network needs at least one block"),
        ({"residual": True, "hidden_features": ()}, "hidden_features is (); a residual network needs at least one block"),
        ({"batch_norm": "data"}, "batch_norm is 'data'; it must be False, True or 'act'"),
        ({"components": 0}, "components is 0; it must be at least 1"),
        ({"components": 2.5}, "components is 2.5; it must be an integer"),
        ({"components": 2, "order": [[0, 1, 2]] * 5}, "order lists 5 permutations; the flow has 5 transforms and a base"),
        ({"bounds": [(0, 1)]}, "bounds has 1 entries; the flow has 3 features"),
        ({"bounds": [(0, 1), 3, None]}, "bounds[1] is 3; it must be None or a pair"),
        ({"bounds": [(1, 0), None, None]}, "column 0 has bounds (1.0, 0.0)"),
        ({"bounds": 1}, "bounds is 1; it must be a sequence"),
        ({"names": ["a", "b"]}, "names has 2 entries; the flow has 3 features"),
        ({"names": ["a", "b", "a"]}, "names has 'a' twice; they must differ"),
        ({"names": "abc"}, "names is 'abc'; it must be a sequence of strings"),
        ({"dtype": "float16"}, "dtype is 'float16'; it must be 'float32' or 'float64'"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fastmaf.MAF(**{"features": 3, **arguments})


def test_networks_read_no_further_than_input_clip():
    flow = fastmaf.MAF(features=3, transforms=1, order="sequential", dtype="float64", seed=0)
    assert flow.layers[-1].conditioner.input_clip == fastmaf.MADE(features=3).layers[-1].conditioner.input_clip == 5
    assert fastmaf.MADE(3, "mixture").base.conditioner.input_clip == fastmaf.MAF(3, components=2).base.conditioner.input_clip == 5
    assert fastmaf.MADE(3, "bernoulli").base.conditioner.input_clip is None
    assert fastmaf.MAF(3, input_clip=None).layers[-1].conditioner.input_clip is None
    at, beyond = flow.to_noise([[5, -5, 1.0], [5e3, -5e3, 1.0]])
    assert at[2] == beyond[2] and at[0] != beyond[0]
    (near, _, _), (far, _, _) = flow.to_noise([[6, 0, 1.0], [7, 0, 1.0]])
    _, dx, _ = flow.log_prob_and_grad([[6, 0, 1.0]])
    assert dx[0, 0] == pytest.approx(-near * (far - near))  # of the base alone


@pytest.mark.parametrize("clip", [0, -1, np.inf, np.nan, "far"])
def test_an_input_clip_is_a_positive_number(clip):
    with pytest.raises(ValueError, match="input_clip is"):
        fastmaf.MAF(features=2, input_clip=clip)
