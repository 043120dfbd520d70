"""Flows of Pyro."""

from __future__ import annotations

import contextlib

import foreign
import numpy as np
import pytest

import fastmaf
from fastmaf.interop import from_pyro
from fastmaf.layers import Elementwise

torch = pytest.importorskip("torch")
dist = pytest.importorskip("pyro.distributions")
pytest.importorskip("pyro.nn")
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN  # noqa: E402

t = dist.transforms
D, C = 4, 3


def normal():
    return dist.Normal(torch.arange(float(D)) / 10, torch.arange(1.0, D + 1) / 2).to_event(1)


def made(*hidden, **options):
    laws = {name: options.pop(name) for name in ("log_scale_min_clip", "log_scale_max_clip", "stable") if name in options}
    return t.AffineAutoregressive(AutoRegressiveNN(D, list(hidden or (16,)), **options), **laws)


def conditional(*hidden, **options):
    laws = {name: options.pop(name) for name in ("log_scale_min_clip", "log_scale_max_clip") if name in options}
    return t.ConditionalAffineAutoregressive(ConditionalAutoRegressiveNN(D, C, list(hidden or (16,)), **options), **laws)


def flow(*transforms):
    return dist.TransformedDistribution(normal(), list(transforms))


def given(*transforms):
    return dist.ConditionalTransformedDistribution(normal(), list(transforms))


PERM = torch.tensor([2, 0, 3, 1])

FLOWS = {
    "IAF": lambda: flow(made(), made(16, 20)),
    "MAF": lambda: flow(made().inv, made(16, 20).inv),
    "skip connections": lambda: flow(made(skip_connections=True), made(skip_connections=True, permutation=PERM).inv),
    "clips": lambda: flow(made(log_scale_min_clip=-0.3, log_scale_max_clip=0.1, nonlinearity=torch.nn.Tanh())),
    "permutations, batch norms": lambda: flow(made(), t.BatchNorm(D), t.Permute(PERM), made(), t.BatchNorm(D).inv, t.Permute(PERM).inv),
    "context": lambda: given(conditional(), conditional(16, 20, skip_connections=True)),
    "context, inverse": lambda: given(conditional(log_scale_max_clip=0.2).inv, t.Permute(PERM), made(), conditional().inv),
    "composed": lambda: flow(t.ComposeTransform([made(), t.Permute(PERM)]), t.AffineTransform(torch.ones(D), -torch.ones(D), event_dim=1)),
    "elu": lambda: flow(made(nonlinearity=torch.nn.ELU()).inv),
    "sigmoid": lambda: flow(made(nonlinearity=torch.nn.Sigmoid()).inv),
}


def modules(source):
    import fastmaf.interop.pyro

    return fastmaf.interop.pyro._modules(source.transforms)


def trained(make):
    """All weights random, then a few steps, in which batch norms meet data."""
    torch.manual_seed(0)
    source = make()
    parameters = list({id(parameter): parameter for module in modules(source) for parameter in module.parameters()}.values())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, c = 1 + torch.randn(256, D), torch.randn(256, C)
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    for _ in range(15):
        loss = -(source.condition(c) if hasattr(source, "condition") else source).log_prob(x.clone()).mean()  # they remember rows
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return source


def theirs(source):
    """What `foreign.agree` asks for, of a flow of Pyro."""
    import fastmaf.interop.pyro

    wide, narrow = fastmaf.interop.pyro.exact(source), fastmaf.interop.pyro.exact(source)
    for module in modules(narrow):
        module.float()

    def density(own, dtype, precision):
        @torch.no_grad()
        def log_prob(x, context):
            with precision():
                conditioned = own.condition(torch.from_numpy(context).to(dtype)) if context is not None else own
                return conditioned.log_prob(torch.from_numpy(x).to(dtype)).numpy()

        return log_prob

    @torch.no_grad()
    def inverse(noise, context):
        conditioned = wide.condition(torch.from_numpy(context)) if context is not None else wide
        base = normal().base_dist
        x = base.loc.double() + base.scale.double() * torch.from_numpy(noise)
        with fastmaf.interop.pyro.doubles():
            for transform in conditioned.transforms:
                x = transform(x)
        return x.numpy()

    doubles = fastmaf.interop.pyro.doubles
    return density(wide, torch.float64, doubles), inverse, density(narrow, torch.float32, contextlib.nullcontext)


@pytest.mark.parametrize("name", FLOWS)
def test_densities_and_samples_are_those_of_pyro(name):
    source = trained(FLOWS[name])
    with foreign.quiet():
        made = from_pyro(source)
    assert made.dtype == np.float32 and made.training["source"]["library"] == "pyro-ppl"
    assert (made.features, made.context_features) == (D, C if "context" in name else 0)
    foreign.agree(lambda dtype: from_pyro(source, dtype=dtype), *theirs(source))


def test_bounds_become_bounds():
    source = flow(made(), t.SigmoidTransform(), t.AffineTransform(torch.zeros(D).double(), 2 * torch.ones(D).double()))
    with foreign.quiet():
        flow_ = from_pyro(source)
    assert flow_.layers[0] == Elementwise(("logit",) * D, np.zeros(D), np.full(D, 2.0))
    x = np.random.default_rng(0).uniform(0.01, 1.99, (100, D))
    foreign.agree(lambda dtype: from_pyro(source, dtype=dtype), *theirs(source)[:2], x=x)


def test_the_distribution_of_the_caller_stays_as_it_is():
    source = trained(FLOWS["IAF"])
    kept = source.transforms[0]._cached_x_y
    with foreign.quiet():
        from_pyro(source, dtype="float64")
    assert source.transforms[0]._cached_x_y is kept
    assert source.transforms[0].training and source.transforms[0].arn.layers[0].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flow(made(stable=True)), "stable=True cannot be imported; the record has no law"),
        (lambda: flow(t.planar(D)), "Planar cannot be imported"),
        (lambda: flow(t.spline(D)), "Spline cannot be imported"),
        (lambda: dist.TransformedDistribution(dist.StudentT(3.0, torch.zeros(D), 1.0).to_event(1), [made()]), "the base StudentT"),
        (lambda: flow(made(nonlinearity=torch.nn.Softplus())), "the activation Softplus"),
    ],
)
def test_what_the_record_cannot_express_is_refused_by_name(make, message):
    with pytest.raises(NotImplementedError, match=message) as error:
        from_pyro(make())
    assert len(str(error.value)) <= 200


def test_other_objects_are_refused():
    with pytest.raises(ValueError, match=r"takes a TransformedDistribution or .*, not Linear"):
        fastmaf.from_pyro(torch.nn.Linear(2, 2))
