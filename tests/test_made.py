"""`MADE` builds one network, as a layer or as a base."""

from __future__ import annotations

import io
import itertools
import re
from dataclasses import replace

import make
import numpy as np
import pytest

import fastmaf
from fastmaf.layers import Affine, Autoregressive, Elementwise, Normal, Terminal


def test_is_a_maf_with_one_transform():
    made = fastmaf.MADE(features=4, context_features=2, hidden_features=(8,), seed=3)
    maf = fastmaf.MAF(features=4, context_features=2, transforms=1, hidden_features=(8,), seed=3)
    assert made.layers == maf.layers
    assert made.context_layers == maf.context_layers
    assert [type(layer) for layer in made.layers] == [Affine, Autoregressive]
    assert made.base == Normal(4)


def test_bound_of_the_log_scales():
    assert fastmaf.MADE(features=3, clip=1.5).layers[1].law.constants["clip"] == 1.5
    with pytest.raises(ValueError, match="clip is for Gaussian variables; conditional is 'mixture'"):
        fastmaf.MADE(features=3, conditional="mixture", clip=1.5)


@pytest.mark.parametrize(
    "options", [{"direct": True}, {"residual": True, "hidden_features": (5, 5)}, {"bounds": [(0, 1), None, None, None]}]
)
def test_has_the_networks_of_a_maf(options):
    made, maf = fastmaf.MADE(features=4, seed=0, **options), fastmaf.MAF(features=4, transforms=1, seed=0, **options)
    assert made.layers == maf.layers


@pytest.mark.parametrize("conditional", ["gaussian", "mixture", "bernoulli", "categorical", "mixed"])
def test_keeps_its_order(conditional):
    categories = {"categorical": 3, "mixed": [2, None, 3]}.get(conditional)
    flow = fastmaf.MADE(3, conditional, order=[2, 0, 1], categories=categories)
    assert flow.order == (2, 0, 1)
    assert (
        fastmaf.MADE(3, conditional, order="random", categories=categories, seed=1).order
        == fastmaf.MAF(3, order="random", seed=1, transforms=1).order
    )


def test_mixture():
    flow = fastmaf.MADE(3, "mixture", 2, hidden_features=(6,), components=5, bounds=[None, (0, 1), None], dtype="float64")
    assert [type(layer) for layer in flow.layers] == [Elementwise, Affine]
    assert (flow.base.conditional, flow.base.components, flow.base.rows) == ("mixture", 5, (15, 15, 15))
    bias = flow.base.conditioner.final.bias.reshape(3, 3, 5)
    assert not bias[:, [0, 2]].any() and np.unique(bias[:, 1]).size == 15
    assert fastmaf.MADE(3, "mixture").base.components == 10


@pytest.mark.parametrize("conditional", ["bernoulli", "categorical"])
@pytest.mark.parametrize("context_features", [0, 2])
def test_discrete_probabilities_sum_to_one(conditional, context_features):
    categories = [2, 4, 3, 2] if conditional == "categorical" else None
    flow = fastmaf.MADE(4, conditional, context_features, (9,), categories=categories, direct=True, dtype="float64", order="random")
    assert not flow.layers and isinstance(flow.base, Terminal) and flow.base.categories == tuple(categories or ())
    every = np.array(list(itertools.product(*map(range, categories or [2] * 4))))
    with make.reference():
        np.testing.assert_allclose(np.exp(flow.log_prob(every, make.contexts(flow))).sum(), 1, rtol=1e-12)


def test_mixed():
    options = {"components": 5, "bounds": {"mass": (0, None)}, "names": ["type", "mass", "age", "flag"], "dtype": "float64", "seed": 0}
    flow = fastmaf.MADE(4, "mixed", 2, hidden_features=(6,), categories={"flag": 2, "type": 9}, **options)
    assert [type(layer) for layer in flow.layers] == [Elementwise, Affine]
    assert (flow.base.categories, flow.base.rows) == ((9, 0, 0, 2), (9, 15, 15, 2))
    pieces = np.split(flow.base.conditioner.final.bias, [9, 24, 39])
    for piece in pieces[1:3]:
        assert not piece[:5].any() and not piece[10:].any() and np.unique(piece[5:10]).size == 5
    assert pieces[0].all() and pieces[3].all()
    assert flow.base.conditioner.input_clip == 8, "the network tells all values apart"
    again = fastmaf.MADE(4, "mixed", 2, hidden_features=(6,), categories=[9, None, None, 2], **options)
    assert again.base == flow.base
    flow.reset(seed=0)
    assert flow.base == again.base
    assert fastmaf.load(saved(flow)).base == flow.base
    assert flow.prefix(3).base.categories == (9, 0, 0) and flow.prefix(1).base.categories == (9,)


def test_units_bend_among_the_values_that_they_read():
    """The biases of the first map are shifted by each unit's weights times places among the values; those of other columns are not."""
    options = {"hidden_features": (200,), "dtype": "float64", "seed": 0}
    flow = fastmaf.MADE(3, "mixed", categories=[40, None, 2], **options)
    plain = fastmaf.MADE(3, "mixed", categories=[2, None, 2], **options)
    first, other = flow.base.conditioner.initial, plain.base.conditioner.initial
    assert np.array_equal(first.weight, other.weight)
    bend = (other.bias - first.bias) / first.weight[:, 0]
    assert (bend > -0.5).all() and (bend < 39.5).all() and 15 < bend.mean() < 24 and bend.std() > 8
    masks = fastmaf.MADE(3, "mixed", categories=[40, None, 2], masks=3, **options)
    assert masks.member(0).base == flow.base
    masks.reset(seed=0)
    assert masks.member(0).base == flow.base


def saved(flow):
    file = io.BytesIO()
    flow.save(file)
    return file.getvalue()


def test_one_number_of_categories_is_that_of_all():
    assert fastmaf.MADE(3, "categorical", categories=4).base.categories == (4, 4, 4)


@pytest.mark.parametrize("conditional", ["mixture", "bernoulli"])
def test_weights_are_those_of_the_seed_in_both_dtypes(conditional):
    single, double, other = (fastmaf.MADE(4, conditional, dtype=d, seed=s) for d, s in (("float32", 1), ("float64", 1), ("float64", 2)))
    assert np.array_equal(single.base.conditioner.final.weight, double.base.conditioner.final.weight.astype(np.float32))
    assert not np.array_equal(double.base.conditioner.final.weight, other.base.conditioner.final.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conditional": "poisson"}, "conditional is 'poisson'; it must be one of 'gaussian'"),
        ({"conditional": "mixture", "components": 0}, "components is 0; it must be at least 1"),
        ({"conditional": "categorical"}, "categories is None; conditional='categorical' needs the number of values"),
        ({"conditional": "categorical", "categories": 1}, "categories is 1; it must be at least 2"),
        ({"conditional": "categorical", "categories": [2, 3]}, "categories has 2 entries; the flow has 3 features"),
        ({"conditional": "categorical", "categories": [2, 3, 1]}, "categories[2] is 1; it must be at least 2"),
        ({"conditional": "categorical", "categories": [2, 3, 2.5]}, "categories[2] is 2.5; it must be an integer"),
        ({"conditional": "mixed"}, "categories is None; conditional='mixed' needs the number of values"),
        ({"conditional": "mixed", "categories": 3}, "categories is 3; of mixed variables it must be a sequence or a mapping"),
        ({"conditional": "mixed", "categories": [None] * 3}, 'categories has no number; without one, conditional is "mixture"'),
        ({"conditional": "mixed", "categories": [None, 1, None]}, "categories[1] is 1; it must be at least 2"),
        ({"conditional": "mixed", "categories": {"b": 1}, "names": list("abc")}, "categories['b'] is 1; it must be at least 2"),
        ({"conditional": "mixed", "categories": {"a": 2}}, "categories goes by name, but names is None"),
        ({"conditional": "mixed", "categories": {"d": 2}, "names": list("abc")}, "categories has column 'd'; names has no such"),
        (
            {"conditional": "mixed", "categories": [None, 3, 2], "bounds": [None, (0, 3), None]},
            "bounds has an entry for column 1, which is categorical",
        ),
        ({"categories": 3}, "categories is 3; only categorical variables have some, and conditional is 'gaussian'"),
        ({"conditional": "bernoulli", "bounds": [(0, 1)] * 3}, "bounds is a list of length 3; bernoulli variables have none"),
        ({"masks": 0}, "masks is 0; it must be at least 1"),
        ({"masks": "many"}, "masks is 'many'; it must be an integer"),
        ({"residual": True, "hidden_features": (3, 4)}, "hidden_features is (3, 4); a residual network needs"),
        ({"order": [[0, 1, 2], [0, 1, 2]]}, "order lists 2 permutations; the flow has 1 transform"),
        ({"features": 0}, "features is 0; it must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fastmaf.MADE(**{"features": 3, **arguments})


def test_logits_beyond_which_nothing_can_be_added(compiled):
    flow = fastmaf.MADE(2, "mixture", components=3, hidden_features=(4,), seed=0)
    net = flow.base.conditioner
    bias = np.array(net.final.bias)
    bias[0] = 1e30
    flow = fastmaf.Flow(flow.layers, replace(flow.base, conditioner=replace(net, final=replace(net.final, bias=bias))))
    x = np.random.default_rng(0).normal(size=(9, 2))
    with make.reference():
        expected = flow.astype("float64").log_prob(x)
    assert np.allclose(flow.log_prob(x), expected, rtol=1e-4, atol=1e-4)
