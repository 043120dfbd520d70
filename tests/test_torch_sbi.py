"""The density estimator for sbi: its interface, and inference from beginning to end where the posterior is known."""

from __future__ import annotations

import copy
import doctest
import pathlib
import pickle
import re
import warnings

import numpy as np
import pytest

import fastmaf
from fastmaf.layers import Affine, Elementwise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    pytest.importorskip("sbi")
    from sbi.inference import NLE, NPE
    from sbi.neural_nets.net_builders.flow import build_zuko_maf
    from sbi.utils import BoxUniform

from fastmaf.torch import sbi_fit, sbi_maf
from fastmaf.torch._sbi import Estimator

pytestmark = pytest.mark.filterwarnings("ignore")  # those of sbi and what it stands on

D, C, NOISE = 2, 2, 0.5
QUIET = {"show_progress_bars": False}


@pytest.fixture(autouse=True)
def few_threads():
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batches(rows=200, d=3, c=4):
    return 7 + 2 * torch.randn(rows, d), -3 + 5 * torch.randn(rows, c)


def simulated(rows=2000):
    """Standard normal parameters, and one observation of each: the posterior is normal, of mean x / (1 + NOISE^2)."""
    prior = torch.distributions.MultivariateNormal(torch.zeros(D), torch.eye(D))
    theta = prior.sample((rows,))
    return prior, theta, theta + NOISE * torch.randn_like(theta)


OBSERVED = torch.tensor([[0.8, -0.4]])
MEAN, DEVIATION = OBSERVED / (1 + NOISE**2), NOISE / np.sqrt(1 + NOISE**2)


def is_posterior(samples):
    assert abs(samples.mean(0) - MEAN).max() < 0.15, samples.mean(0)
    assert abs(samples.std(0) - DEVIATION).max() < 0.15, samples.std(0)


# The interface


@pytest.mark.parametrize("network", [None, torch.nn.Linear(4, 2)])
@pytest.mark.parametrize(
    ("inputs", "conditions"), [((5,), (5,)), ((1,), (5,)), ((5,), (1,)), ((6, 5), (5,)), ((6, 1), (5,)), ((6, 5), (6, 5))]
)
def test_shapes_are_those_of_sbi(network, inputs, conditions):
    theta, x = batches()
    estimator = sbi_maf(embedding_net=network, num_transforms=2)(theta, x)
    theirs = build_zuko_maf(theta, x, embedding_net=network or torch.nn.Identity(), hidden_features=8)
    input, condition = torch.randn(*inputs, 3), torch.randn(*conditions, 4)
    result = estimator.log_prob(input, condition)
    assert result.shape == theirs.log_prob(input, condition).shape
    assert result.shape == (inputs[0] if len(inputs) > 1 else 1, max(inputs[-1], conditions[-1]))
    rows, contexts = input.expand(*result.shape, 3), condition.expand(*result.shape, 4)
    each = estimator.log_prob(rows.reshape(-1, 3), contexts.reshape(-1, 4))[0]
    torch.testing.assert_close(result.reshape(-1), each)


def test_samples_and_losses_have_the_shapes_of_sbi():
    theta, x = batches()
    estimator = sbi_maf()(theta, x)
    assert estimator.input_shape == (3,) and estimator.condition_shape == (4,)
    loss = estimator.loss(theta[:5], condition=x[:5])
    assert loss.shape == (5,) and loss.requires_grad
    torch.testing.assert_close(loss, -estimator.log_prob(theta[:5], x[:5])[0])
    for shape in ((), (7,), (2, 3)):
        torch.manual_seed(1)
        samples = estimator.sample(torch.Size(shape), x[:5])
        assert samples.shape == (*shape, 5, 3)
        torch.manual_seed(1)
        assert torch.equal(estimator.sample(torch.Size(shape), x[:5]), samples)
    samples, density = estimator.sample_and_log_prob((7,), x[:5])
    assert density.shape == (7, 5)
    torch.testing.assert_close(estimator.inverse_transform(samples, x[:5]).shape, samples.shape)
    with pytest.raises(RuntimeError, match="broadcastable batch"):
        estimator.log_prob(theta[:4], x[:5])
    with pytest.raises(ValueError, match="Shape of condition"):
        estimator.log_prob(theta[:4], theta[:4])
    with pytest.raises(ValueError, match=r"have shape \(200, 3, 1\); they must be"):
        sbi_maf()(theta[..., None], x)


def test_z_scores_are_those_of_sbi():
    theta, x = batches()
    estimator = sbi_maf(num_transforms=2)(theta, x)
    flow = estimator.net.to_flow()
    assert isinstance(flow.layers[0], Affine)
    np.testing.assert_allclose(flow.layers[0].loc, theta.mean(0), rtol=1e-6)
    np.testing.assert_allclose(flow.context_layers[0].scale, 1 / x.std(0), rtol=1e-6)
    np.testing.assert_allclose(flow.log_prob(theta.numpy(), x.numpy()), estimator.log_prob(theta, x)[0].detach(), rtol=1e-5, atol=1e-5)
    structured = sbi_maf(z_score_theta="structured", z_score_x="structured")(theta, x).net.to_flow()
    np.testing.assert_allclose(structured.layers[0].loc, np.full(3, theta.mean()), rtol=1e-6)
    np.testing.assert_allclose(structured.context_layers[0].scale, np.full(4, 1 / x.std(1).mean()), rtol=1e-6)
    none = sbi_maf(z_score_theta="none", z_score_x=None)(theta, x).net.to_flow()
    assert not none.layers[0].loc.any() and none.context_layers == ()
    behind = sbi_maf(embedding_net=torch.nn.Linear(4, 2))(theta, x)
    torch.testing.assert_close(behind.embedding_net[0](x).mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    likelihood = sbi_maf(likelihood=True)(theta, x)
    assert likelihood.input_shape == (4,) and likelihood.condition_shape == (3,)
    np.testing.assert_allclose(likelihood.net.to_flow().layers[0].loc, x.mean(0), rtol=1e-6)


def test_densities_stay_within_the_support_of_the_prior():
    prior = BoxUniform(torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 5.0]))
    theta = prior.sample((300,))
    unconstrained = {"z_score_theta": "transform_to_unconstrained"}
    estimator = sbi_maf(**unconstrained, x_dist=prior)(theta, theta)
    flow = estimator.net.to_flow()
    assert flow.layers[0] == Elementwise.from_bounds([(-1, 1), (2, 5)])
    samples = estimator.sample((1000,), theta[:1])[:, 0]
    assert prior.support.check(samples).all() and estimator.log_prob(theta + 10, theta).isneginf().all()
    noise = Elementwise.from_bounds([(-1, 1), (2, 5)])
    unbounded = fastmaf.Flow([noise], dtype="float64").to_noise(theta.double().numpy())
    np.testing.assert_allclose(flow.layers[1].loc, unbounded.mean(axis=0), rtol=1e-6)
    above = torch.distributions.Independent(torch.distributions.HalfNormal(torch.ones(2)), 1)
    assert sbi_maf(**unconstrained, x_dist=above)(theta.abs(), theta).net.to_flow().layers[0] == Elementwise.from_bounds([(0, None)] * 2)
    with pytest.raises(ValueError, match="x_dist is missing"):
        sbi_maf(**unconstrained)(theta, theta)
    with pytest.raises(ValueError, match="x_dist has a support of type _Simplex"):
        sbi_maf(**unconstrained, x_dist=torch.distributions.Dirichlet(torch.ones(2)))(theta, theta)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda own: pickle.loads(pickle.dumps(own))])
def test_estimators_are_copied_with_their_networks(copied):
    theta, x = batches()
    estimator = sbi_maf(embedding_net=torch.nn.Linear(4, 2))(theta, x)
    assert torch.equal(copied(estimator).log_prob(theta, x), estimator.log_prob(theta, x))
    other = sbi_maf(embedding_net=torch.nn.Linear(4, 2))(theta + 9, x)
    other.load_state_dict(estimator.state_dict())
    assert torch.equal(other.log_prob(theta, x), estimator.log_prob(theta, x))


# Inference


@pytest.mark.parametrize("network", [None, torch.nn.Sequential(torch.nn.Linear(D, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))])
def test_posteriors_of_a_linear_gaussian(network):
    prior, theta, x = simulated()
    before = None if network is None else [part.clone() for part in network.parameters()]
    trainer = NPE(prior, density_estimator=sbi_maf(embedding_net=network, num_transforms=2, hidden_features=20), **QUIET)
    estimator = trainer.append_simulations(theta, x).train(max_num_epochs=40, training_batch_size=100, learning_rate=2e-3)
    assert type(estimator) is Estimator
    if network is not None:
        assert not any(torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))
    posterior = trainer.build_posterior(estimator)
    samples = posterior.sample((4000,), x=OBSERVED, **QUIET)
    is_posterior(samples)
    exact = torch.distributions.Normal(MEAN, DEVIATION).log_prob(samples).sum(1)
    assert abs(posterior.log_prob(samples, x=OBSERVED) - exact).mean() < 0.3  # of few rows, and a flow of straight pieces
    assert posterior.sample_batched((10,), x=x[:7], **QUIET).shape == (10, 7, D)
    assert posterior.log_prob_batched(theta[:3, None], x=x[:1]).shape == (3, 1)
    assert pickle.loads(pickle.dumps(posterior)).sample((3,), x=OBSERVED, **QUIET).shape == (3, D)
    assert abs(posterior.set_default_x(OBSERVED).map(num_iter=100, **QUIET) - MEAN).max() < 0.3  # by its gradient


def test_likelihoods_of_a_linear_gaussian():
    prior, theta, x = simulated()
    estimator_of = sbi_maf(likelihood=True, num_transforms=2, hidden_features=20)
    trainer = NLE(prior, density_estimator=estimator_of, **QUIET)
    estimator = trainer.append_simulations(theta, x).train(max_num_epochs=40, training_batch_size=100, learning_rate=2e-3)
    posterior = trainer.build_posterior(
        mcmc_method="slice_np_vectorized", mcmc_parameters={"num_chains": 20, "warmup_steps": 40, "thin": 2}
    )
    is_posterior(posterior.sample((1000,), x=OBSERVED, **QUIET))
    theta = torch.randn(3, D, requires_grad=True)
    posterior.potential_fn.set_x(OBSERVED)
    posterior.potential_fn(theta, track_gradients=True).sum().backward()
    at = theta.detach().numpy()
    expected = estimator.net.to_flow().log_prob_and_grad(OBSERVED.numpy().repeat(3, 0), at)[2] - at  # and of the prior
    np.testing.assert_allclose(theta.grad, expected, rtol=1e-4, atol=1e-4)


def test_fit_in_place_of_the_trainer():
    prior, theta, x = simulated()
    trainer = NPE(prior, density_estimator=sbi_maf(hidden_features=24, num_transforms=2), **QUIET).append_simulations(theta, x)
    estimator = sbi_fit(trainer, max_epochs=60)
    is_posterior(trainer.build_posterior().sample((4000,), x=OBSERVED, **QUIET))
    is_posterior(trainer.build_posterior(estimator).sample((4000,), x=OBSERVED, **QUIET))
    summary = trainer.summary
    epochs = summary["epochs_trained"][-1]
    assert 0 < epochs <= 60 and all(len(summary[name]) == epochs for name in ("training_loss", "validation_loss", "epoch_durations_sec"))
    assert summary["best_validation_loss"] == [min(summary["validation_loss"])]
    likelihood = NLE(prior, density_estimator=sbi_maf(likelihood=True, hidden_features=24, num_transforms=2), **QUIET)
    fitted = sbi_fit(likelihood.append_simulations(theta, x), max_epochs=60)
    with torch.no_grad():
        expected = torch.distributions.Normal(theta[:500], NOISE).log_prob(x[:500]).sum(1)
        assert abs(fitted.log_prob(x[:500], theta[:500])[0].mean() - expected.mean()) < 0.1


def test_what_does_not_go_together_is_refused():
    """A likelihood in the trainer of a posterior has the same shapes where theta and x have, and no other sign."""
    prior, theta, x = simulated(300)
    for kind, likelihood, learns in ((NLE, False, "likelihood"), (NPE, True, "posterior")):
        trainer = kind(prior, density_estimator=sbi_maf(likelihood=likelihood), **QUIET).append_simulations(theta, x)
        with pytest.raises(ValueError, match=f"which learns a {learns}: make it with density_estimator"):
            sbi_fit(trainer, max_epochs=2)
    trainer = NPE(prior, density_estimator=sbi_maf(), **QUIET).append_simulations(theta, x)
    with pytest.raises(ValueError, match="standardize is for sbi_maf to say"):
        sbi_fit(trainer, standardize=True)
    for name in ("dtype", "bounds", "transforms"):
        with pytest.raises(ValueError, match=f"{name} is no option of sbi_maf"):
            sbi_maf(**{name: None})


def test_the_same_seed_of_torch_gives_the_same_fit():
    prior, theta, x = simulated(300)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        trainer = NPE(prior, density_estimator=sbi_maf(hidden_features=8, num_transforms=1), **QUIET).append_simulations(theta, x)
        found.append(sbi_fit(trainer, max_epochs=2).net.weight.detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_what_only_the_loop_of_sbi_does():
    prior, theta, x = simulated(100)
    with pytest.raises(ValueError, match="trainer is of type NPE_C; it must be one of sbi, made with"):
        sbi_fit(NPE(prior, density_estimator="maf").append_simulations(theta, x))
    with pytest.raises(ValueError, match="trainer is of type int"):
        sbi_fit(3)
    network = torch.nn.Linear(C, 3)
    with pytest.raises(NotImplementedError, match="trainer.train()"):
        sbi_fit(NPE(prior, density_estimator=sbi_maf(embedding_net=network)).append_simulations(theta, x))
    trainer = NPE(prior, density_estimator=sbi_maf(hidden_features=8)).append_simulations(theta, x)
    sbi_fit(trainer, max_epochs=1)
    proposal = trainer.build_posterior().set_default_x(OBSERVED)
    with pytest.raises(NotImplementedError, match="later rounds"):
        sbi_fit(trainer.append_simulations(theta, x, proposal=proposal))


def test_hidden_units_are_of_silu_unless_another_activation_is_named():
    batch = torch.randn(10, 2), torch.randn(10, 3)
    for options, activation in (({}, "silu"), ({"activation": "tanh"}, "tanh")):
        flow = sbi_maf(**options)(*batch).net.to_flow()
        assert {layer.conditioner.activation for layer in flow.layers if hasattr(layer, "conditioner")} == {activation}


def test_the_doctest_and_the_snippet_of_the_page_run():
    for example in [*doctest.DocTestFinder().find(sbi_maf, "sbi_maf"), *doctest.DocTestFinder().find(sbi_fit, "sbi_fit")]:
        assert not doctest.DocTestRunner().run(example).failed
    page = (pathlib.Path(__file__).parents[1] / "docs" / "torch.md").read_text()
    blocks = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "sbi" in code]
    assert len(blocks) == 2
    exec(compile("import torch, fastmaf.torch\n" + "\n".join(blocks), "docs/torch.md", "exec"), {})
