"""Flows of normflows."""

from __future__ import annotations

import copy

import foreign
import numpy as np
import pytest

import fastmaf
from fastmaf.interop import from_normflows

torch = pytest.importorskip("torch")
nf = pytest.importorskip("normflows")
f = nf.flows

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated")


def made(features=5, context=None, units=16, **options):
    return f.MaskedAffineAutoregressive(features, units, context, **options)


def model(*flows, features=5, context=False):
    kind = nf.ConditionalNormalizingFlow if context else nf.NormalizingFlow
    return kind(nf.distributions.DiagGaussian(features), list(flows))


MODELS = {
    "residual": lambda: model(made(), f.Permute(5), made(), f.Permute(5, mode="swap")),
    "residual, batch norms": lambda: model(made(use_batch_norm=True, num_blocks=1), made(activation=torch.tanh, dropout_probability=0.2)),
    "feedforward, random masks": lambda: model(
        made(use_residual_blocks=False, random_mask=True, use_batch_norm=True), made(use_residual_blocks=False, num_blocks=0)
    ),
    "context": lambda: model(made(context=3), f.Permute(5), made(context=3, use_batch_norm=True), context=True),
    "LU": lambda: model(made(), f.LULinearPermute(5), made(), f.LULinearPermute(5, identity_init=False)),
    "invertible": lambda: model(f.InvertibleAffine(4), made(4), f.InvertibleAffine(4, use_lu=False), features=4),
    "act norms": lambda: model(made(), f.ActNorm(5), f.AffineConstFlow(5)),
    "reverse": lambda: model(f.Reverse(made()), f.Reverse(f.Permute(5)), f.Reverse(f.LULinearPermute(5))),
    "composite": lambda: model(f.Composite([made(), f.Permute(5), made()])),
    "one feature": lambda: model(made(1, 3, 8), features=1, context=True),
    "silu": lambda: model(made(activation=torch.nn.functional.silu)),
    "sigmoid": lambda: model(made(activation=torch.sigmoid, use_batch_norm=True), made(context=None, activation=torch.sigmoid)),
}


def trained(make):
    """All weights random, then a few steps, in which norms meet data."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = 1 + torch.randn(256, int(model.q0.d))
    given = (x, torch.randn(256, 3)) if isinstance(model, nf.ConditionalNormalizingFlow) else (x,)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(15):
        loss = -model.log_prob(*given).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def theirs(model):
    """What `foreign.agree` asks for, of a flow of normflows."""
    wide, narrow = copy.deepcopy(model).double().eval(), copy.deepcopy(model).float().eval()
    if isinstance(wide.flows[0], f.Composite):  # which sums log-determinants in single precision
        wide.flows = wide.flows[0]._flows

    def given(dtype, *arrays):
        return [torch.from_numpy(array).to(dtype) for array in arrays if array is not None]

    @torch.no_grad()
    def log_prob(x, context):
        return wide.log_prob(*given(torch.float64, x, context)).numpy()

    @torch.no_grad()
    def inverse(noise, context):
        noise, *context = given(torch.float64, noise, context)
        return wide(wide.q0.loc + wide.q0.log_scale.exp() * noise, *context).numpy()

    @torch.no_grad()
    def single(x, context):
        return narrow.log_prob(*given(torch.float32, x, context)).numpy()

    return log_prob, inverse, single


@pytest.mark.parametrize("name", MODELS)
def test_densities_and_samples_are_those_of_normflows(name):
    model = trained(MODELS[name])
    with foreign.quiet():
        flow = from_normflows(model)
    assert flow.dtype == np.float32 and flow.training["source"]["library"] == "normflows"
    foreign.agree(lambda dtype: from_normflows(model, dtype=dtype), *theirs(model))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model(f.AutoregressiveRationalQuadraticSpline(5, 2, 8)), "a spline law"),
        (lambda: model(made(), f.BatchNorm()), "BatchNorm cannot be imported; its statistics are those of each batch"),
        (lambda: model(f.Planar((5,))), "Planar cannot be imported"),
        (lambda: nf.NormalizingFlow(nf.distributions.GaussianMixture(3, 5), [made()]), "the base GaussianMixture"),
        (lambda: model(made(activation=torch.nn.functional.softplus)), "the activation softplus"),
    ],
)
def test_what_the_record_cannot_express_is_refused_by_name(make, message):
    with pytest.raises(NotImplementedError, match=message) as error:
        from_normflows(make())
    assert len(str(error.value)) <= 200


def test_other_objects_and_norms_without_data_are_refused():
    with pytest.raises(ValueError, match=r"takes a normflows.NormalizingFlow or .*, not Linear"):
        from_normflows(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="an ActNorm has not seen any data"):
        fastmaf.from_normflows(model(made(), f.ActNorm(5)))
