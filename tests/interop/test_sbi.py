"""Density estimators of sbi."""

from __future__ import annotations

import copy
import math
import warnings

import foreign
import numpy as np
import pytest

from fastmaf.interop import embed, from_sbi
from fastmaf.layers import Elementwise

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("sbi")
    from sbi.inference.posteriors import DirectPosterior
    from sbi.neural_nets.net_builders import flow as builders
    from sbi.utils import BoxUniform

pytestmark = pytest.mark.filterwarnings("ignore")  # of sbi, in its builders

D, C = 3, 4
PRIOR = BoxUniform(torch.tensor([-2.0, 0.0, 1.0]), torch.tensor([2.0, 1.0, 4.0]))


def rows(n=400):
    torch.manual_seed(1)
    theta = PRIOR.sample((n,))
    return theta, 3 + torch.randn(n, C) * 2 + theta[:, :1]


def built(builder, embedding=None, **options):
    options |= {} if embedding is None else {"embedding_net": embedding}
    return lambda: getattr(builders, f"build_{builder}")(*rows(), **options)


BUILT = {
    "maf": built("maf"),
    "maf, batch norms, small": built("maf", use_batch_norm=True, hidden_features=8, num_transforms=2, num_blocks=1),
    "maf, no z-scores": built("maf", z_score_x="none", z_score_y="none", hidden_features=10, num_transforms=2),
    "maf, structured z-scores": built("maf", z_score_x="structured", z_score_y="structured", hidden_features=10, num_transforms=2),
    "maf, linear embedding": built("maf", torch.nn.Linear(C, 2), num_transforms=2),
    "made": built("made", num_mixture_components=4),
    "made, no z-scores": built("made", z_score_x="none", z_score_y="none", hidden_features=20),
    "zuko_maf": built("zuko_maf"),
    "zuko_maf, residual, random": built("zuko_maf", residual=True, randperm=True, hidden_features=20),
    "zuko_maf, no z-scores": built("zuko_maf", z_score_x="none", z_score_y="none", hidden_features=20, num_transforms=2),
    "zuko_maf, structured z-scores": built("zuko_maf", z_score_x="structured", z_score_y="structured", num_transforms=2),
    "zuko_maf, linear embedding": built("zuko_maf", torch.nn.Linear(C, 2), num_transforms=2),
    "zuko_maf, bounds": built("zuko_maf", z_score_x="transform_to_unconstrained", x_dist=PRIOR, hidden_features=20, num_transforms=2),
    "zuko_nice": built("zuko_nice", hidden_features=20),
}


def trained(make):
    """All weights random, then a few steps."""
    torch.manual_seed(0)
    estimator = make()
    with torch.no_grad():
        for parameter in estimator.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theta, x = rows()
    optimizer = torch.optim.Adam(estimator.parameters(), lr=3e-3)
    for _ in range(20):
        loss = estimator.loss(theta, x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return estimator


def theirs(estimator):
    """What `foreign.agree` asks for, of an estimator of sbi; the constant of its base, which sbi rounds to single, exact."""
    wide, narrow = copy.deepcopy(estimator).double().eval(), copy.deepcopy(estimator).float().eval()
    if hasattr(getattr(wide.net, "_distribution", None), "_log_z"):
        wide.net._distribution._log_z = torch.tensor(0.5 * D * math.log(2 * math.pi), dtype=torch.float64)

    def density(source, dtype):
        @torch.no_grad()
        def log_prob(x, context):
            return source.log_prob(torch.from_numpy(x).to(dtype)[None], torch.from_numpy(context).to(dtype))[0].numpy()

        return log_prob

    @torch.no_grad()
    def inverse(noise, context):
        noise, context = torch.from_numpy(noise), torch.from_numpy(context)
        if hasattr(wide.net, "_transform"):
            return wide.net._transform.inverse(noise, wide.embedding_net(context))[0].numpy()
        return wide.net(wide.embedding_net(context)).transform.inv(noise).numpy()

    return density(wide, torch.float64), inverse, density(narrow, torch.float32)


def data():
    theta, x = rows(300)
    return {"x": theta.double().numpy(), "context": x.double().numpy()}


@pytest.mark.parametrize("name", BUILT)
def test_densities_are_those_of_sbi(name):
    estimator = trained(BUILT[name])
    with foreign.quiet():
        made = from_sbi(estimator)
    assert made.dtype == np.float32 and (made.features, made.context_features) == (D, C)
    log_prob, inverse, single = theirs(estimator)
    foreign.agree(lambda dtype: from_sbi(estimator, dtype=dtype), log_prob, None if name.startswith("made") else inverse, single, **data())


@pytest.mark.parametrize("name", [name for name in BUILT if "embedding" not in name and "bounds" not in name and "nice" not in name])
def test_a_state_dict_suffices(name):
    estimator = trained(BUILT[name])
    state = {key: value.numpy() for key, value in estimator.state_dict().items()}
    with foreign.quiet():
        made = from_sbi(state_dict=state)
        assert (from_sbi(state_dict=estimator.state_dict()).parameters() == made.parameters()).all(), "tensors are taken too"
    assert made.dtype == np.float32
    foreign.agree(lambda dtype: from_sbi(state_dict=state, dtype=dtype), theirs(estimator)[0], **data())


def test_bounds_of_the_prior_are_bounds():
    estimator = trained(BUILT["zuko_maf, bounds"])
    made = from_sbi(estimator)
    first = made.layers[0]
    assert isinstance(first, Elementwise)
    np.testing.assert_allclose(np.stack([first.lower, first.upper]), [[-2, 0, 1], [2, 1, 4]], atol=1e-6)
    outside = np.array([[3.0, 0.5, 2.0]])
    assert made.log_prob(outside, np.zeros((1, C))) == -np.inf
    samples = made.sample(1000, np.zeros(C), seed=0)
    assert ((samples > first.lower) & (samples < first.upper)).all()


def test_a_posterior_is_taken_for_its_estimator():
    estimator = trained(BUILT["zuko_maf, no z-scores"])
    posterior = DirectPosterior(estimator, PRIOR)
    assert from_sbi(posterior).layers == from_sbi(estimator).layers


@pytest.mark.parametrize("builder", ["maf", "zuko_maf"])
def test_an_embedding_that_is_not_linear_stays_in_front(builder):
    net = torch.nn.Sequential(torch.nn.Linear(C, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    estimator = trained(built(builder, net, num_transforms=2, hidden_features=20))
    with pytest.warns(UserWarning, match=r"is not linear .*fastmaf.interop.embed\(source, context\)"):
        made = from_sbi(estimator, dtype="float64")
    theta, x = rows(50)
    embedded = embed(estimator, x)
    assert made.context_features == 2 and embedded.shape == (50, 2)
    expected = theirs(estimator)[0](theta.double().numpy(), x.double().numpy())
    assert foreign.relative(made.log_prob(theta.double().numpy(), embedded), expected) < 1e-4  # embedded in single precision


@pytest.mark.parametrize(
    ("builder", "message"), [("maf_rqs", "a spline law"), ("nsf", "cannot be imported"), ("zuko_nsf", "MonotonicRQSTransform")]
)
def test_splines_are_refused_by_name(builder, message):
    with pytest.raises(NotImplementedError, match=message):
        from_sbi(built(builder)())


def test_other_objects_are_refused():
    with pytest.raises(ValueError, match="takes an NFlowsFlow or a ZukoFlow of sbi, or a posterior that has one, not Linear"):
        from_sbi(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="embed takes a flow of nflows"):
        embed(torch.nn.Linear(2, 2), np.zeros((3, 2)))
