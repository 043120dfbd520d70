"""`MADE` builds one autoregressive layer."""

from __future__ import annotations

import pytest

import fastmaf
from fastmaf.layers import Affine, Autoregressive, Normal


def test_is_a_maf_with_one_transform():
    made = fastmaf.MADE(features=4, context_features=2, hidden_features=(8,), seed=3)
    maf = fastmaf.MAF(features=4, context_features=2, transforms=1, hidden_features=(8,), seed=3)
    assert made.layers == maf.layers
    assert made.context_layers == maf.context_layers
    assert [type(layer) for layer in made.layers] == [Affine, Autoregressive]
    assert made.base == Normal(4)


def test_keeps_its_order():
    assert fastmaf.MADE(features=3, order=[2, 0, 1]).layers[-1].ranks.tolist() == [2, 3, 1]


@pytest.mark.parametrize("conditional", ["mixture", "bernoulli", "categorical"])
def test_what_is_not_there_yet_is_named(conditional):
    with pytest.raises(ValueError, match=f"conditional='{conditional}' is not there yet"):
        fastmaf.MADE(features=3, conditional=conditional)


def test_unknown_conditionals_are_refused():
    with pytest.raises(ValueError, match="conditional is 'poisson'; it must be one of 'gaussian'"):
        fastmaf.MADE(features=3, conditional="poisson")
