"""Flows as modules of torch: gradients, training, state, shapes, and the page about them."""

from __future__ import annotations

import copy
import doctest
import io
import pathlib
import pickle
import re
import warnings

import make
import numpy as np
import pytest

import fastmaf

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")

from fastmaf.torch import MAF, Flow, _module

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "torch.md"


@pytest.fixture(autouse=True)
def few_threads():
    """Neither the seed nor the threads of torch are left to others."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def module(features=3, context_features=2, dtype="float64", **options):
    """Of random weights."""
    return Flow(make.flow(features, context_features=context_features, dtype=dtype, **options))


def numbers(*shape, dtype=None):
    return torch.randn(*shape, dtype=dtype or torch.float64, requires_grad=True)


class Call(torch.nn.Module):
    """A method of a module as its forward pass, for `functional_call`."""

    def __init__(self, flow, call):
        super().__init__()
        self.flow, self.call = flow, call

    def forward(self, *arguments):
        return self.call(self.flow, *arguments)


def as_function(flow, call):
    """A function of the arguments and, at last, the weights."""
    own = Call(flow, call)
    return lambda *arguments: torch.func.functional_call(own, {"flow.weight": arguments[-1]}, arguments[:-1])


def free_weights(flow):
    """Weights to differentiate in: a function of the free ones alone."""
    free = torch.from_numpy(flow.to_flow().record.free_parameters().copy())
    return flow.weight.detach()[free].clone().requires_grad_(), lambda part: torch.zeros(free.numel(), dtype=part.dtype).masked_scatter(
        free, part
    )


SHAPES = [
    ((4, 3), (4, 2)),
    ((4, 3), (2,)),
    ((4, 3), (1, 2)),
    ((5, 4, 3), (4, 2)),
    ((2, 1, 3), (4, 2)),
    ((3,), (2, 2)),
    ((2, 3, 3), (2, 1, 2)),
]
SHAPES += [((3,), (2,)), ((1, 4, 3), (5, 1, 2)), ((2, 3, 4, 3), (3, 4, 2)), ((2, 1, 4, 3), (3, 1, 2))]


# Gradients


@pytest.mark.parametrize("operation", ["log_prob", "to_noise", "from_noise"])
@pytest.mark.parametrize(("x", "context"), SHAPES)
def test_gradients_in_rows_contexts_and_weights(operation, x, context):
    flow = module(transforms=1, hidden=(5,), activation="tanh")
    weights, whole = free_weights(flow)
    call = as_function(flow, lambda own, x, context: getattr(own, operation)(x, context))
    assert torch.autograd.gradcheck(lambda x, c, w: call(x, c, whole(w)), (numbers(*x), numbers(*context), weights), fast_mode=True)


@pytest.mark.parametrize("operation", ["to_noise", "from_noise"])
@pytest.mark.parametrize(("x", "context"), SHAPES[:6])
def test_gradients_of_log_determinants(operation, x, context):
    flow = module(transforms=1, hidden=(5,), activation="tanh")
    weights, whole = free_weights(flow)
    call = as_function(flow, lambda own, x, context: getattr(own, operation)(x, context, log_det=True))
    assert torch.autograd.gradcheck(lambda x, c, w: call(x, c, whole(w)), (numbers(*x), numbers(*context), weights), fast_mode=True)


def test_log_determinants_without_context_and_by_halves():
    """Of one result alone too, and with weights that need no gradient."""
    flow = module(context_features=0, transforms=2, hidden=(4,), activation="silu", bounds=[(-9, 9), None, (-9, None)])
    for operation in (flow.to_noise, flow.from_noise):
        for part in (0, 1):
            assert torch.autograd.gradcheck(lambda x, own=operation, k=part: own(x, log_det=True)[k], (numbers(4, 3),))


def test_the_transform_is_that_of_zuko():
    flow, context = module(), numbers(5, 2)
    own, x = flow(context), numbers(4, 5, 3)
    noise, log_det = own.transform.call_and_ladj(x)
    assert noise.shape == (4, 5, 3) and log_det.shape == (4, 5)
    torch.testing.assert_close(own.base.log_prob(noise) + log_det, own.log_prob(x))
    assert own.base.batch_shape == (5,) and own.base.event_shape == (3,)
    back, inverse = own.transform.inv.call_and_ladj(noise)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse, -log_det)
    torch.testing.assert_close(own.transform.inv.inv(x), noise)
    torch.testing.assert_close(own.transform.log_abs_det_jacobian(x, noise), log_det)
    bounded = module(context_features=0, bounds=[(0, 1)] * 3)().transform
    assert bounded.domain.check(torch.full((2, 3), 0.5)).all() and not bounded.domain.check(torch.full((1, 3), 2.0)).any()
    assert bounded.codomain is torch.distributions.constraints.real_vector and repr(bounded.inv).startswith("NoiseTransform(from noise")


def test_log_determinants_in_float32():
    flow = fastmaf.torch.MAF(features=5, context_features=2, transforms=5, hidden_features=(32, 32), seed=1)
    x, context = torch.randn(200, 5), torch.randn(200, 2)
    noise, log_det = flow.to_noise(x, context, log_det=True)
    back, inverse = flow.from_noise(noise, context, log_det=True)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inverse, -log_det, rtol=1e-5, atol=1e-5)


def test_log_determinants_in_front_of_a_mixture():
    flow = fastmaf.torch.MAF(features=2, components=3, hidden_features=(6,), transforms=2, activation="tanh", dtype="float64", seed=0)
    for operation in (flow.to_noise, flow.from_noise):
        assert torch.autograd.gradcheck(lambda x, own=operation: own(x, log_det=True), (numbers(4, 2),))
    with pytest.raises(NotImplementedError, match="normal"):
        _ = flow().base


@pytest.mark.parametrize("context", [None, (2,), (3, 2), (2, 3, 2)])
def test_gradients_of_samples(context):
    flow = module(context_features=2 if context else 0, transforms=2, hidden=(5,), activation="tanh")
    weights, whole = free_weights(flow)

    def drawn(own, *contexts):
        torch.manual_seed(3)
        return own(*contexts).rsample((2, 3))

    call = as_function(flow, drawn)
    contexts = [numbers(*context)] if context else []
    assert torch.autograd.gradcheck(lambda *a: call(*a[:-1], whole(a[-1])), (*contexts, weights), fast_mode=True)


def test_full_gradcheck_without_context():
    flow = module(context_features=0, transforms=2, hidden=(4,), activation="silu", bounds=[(-9, 9), None, (-9, None)])
    weights, whole = free_weights(flow)
    call = as_function(flow, lambda own, x: own.log_prob(x))
    assert torch.autograd.gradcheck(lambda x, w: call(x, whole(w)), (numbers(3, 3), weights))


@pytest.mark.parametrize("operation", ["log_prob", "to_noise", "from_noise", "rsample"])
def test_second_derivatives_are_refused_by_name(operation):
    flow = module()
    context = numbers(4, 2)
    result = flow(context).rsample((2,)) if operation == "rsample" else getattr(flow, operation)(numbers(4, 3), context)
    gradient = torch.autograd.grad(result.sum(), (context, flow.weight), create_graph=True)[1]
    name = "from_noise" if operation == "rsample" else operation
    with pytest.raises(NotImplementedError, match=f"{name} of fastmaf.torch has first derivatives alone"):
        gradient.sum().backward()


def test_what_needs_no_gradient_is_not_computed(monkeypatch):
    flow, wanted = module(), []
    vjp = fastmaf.Handle.vjp
    monkeypatch.setattr(fastmaf.Handle, "vjp", lambda *a, **k: wanted.append((k["dx"], k["dcontext"], k["dparameters"])) or vjp(*a, **k))
    x, context = numbers(4, 3), numbers(4, 2)
    torch.autograd.grad(flow.log_prob(x, context).sum(), context)
    torch.autograd.grad(flow.log_prob(x.detach(), context.detach()).sum(), flow.weight)
    flow.weight.requires_grad_(False)
    assert not flow.log_prob(x.detach(), context.detach()).requires_grad
    assert wanted == [(True, True, True), (False, False, True)]


def test_masked_weights_have_no_gradient_and_no_effect():
    flow = module(context_features=0)
    free = torch.from_numpy(flow.to_flow().record.free_parameters().copy())
    x = numbers(20, 3)
    before = flow().log_prob(x)
    before.sum().backward()
    assert not flow.weight.grad[~free].any() and flow.weight.grad[free].any()
    with torch.no_grad():
        flow.weight[~free] = 3.0
    assert torch.equal(flow().log_prob(x), before)
    assert not flow.to_flow().parameters()[~free.numpy()].any()


def test_changes_behind_the_back_of_autograd_are_seen():
    flow, x = module(context_features=0), numbers(5, 3)
    first = flow().log_prob(x)
    flow.weight.data.mul_(0.5)
    second = flow().log_prob(x)
    np.testing.assert_array_equal(second.detach(), flow.to_flow().log_prob(x.detach().numpy()))
    assert not torch.equal(first, second)
    flow.weight.data = flow.weight.data.clone()[: flow.weight.numel()]
    with torch.no_grad():
        flow.weight.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.sum().backward()


def test_gradients_are_those_of_the_weights_of_their_own_forward_pass():
    flow, x = module(context_features=0), numbers(5, 3)
    weights = [flow.weight.detach().clone().requires_grad_(), (0.5 * flow.weight.detach()).requires_grad_()]
    call = as_function(flow, lambda own, x: own.log_prob(x))
    alone = [torch.autograd.grad(call(x, weight).sum(), weight)[0] for weight in weights]
    together = torch.autograd.grad(sum(call(x, weight).sum() for weight in weights), weights)
    for own, expected in zip(together, alone, strict=True):
        assert torch.equal(own, expected)


def test_weights_that_are_not_finite_are_named():
    flow = module(context_features=0)
    with torch.no_grad():
        flow.weight[-1] = torch.nan
    with pytest.raises(ValueError, match="parameters are not finite in 1 places"):
        flow().log_prob(torch.zeros(2, 3, dtype=torch.float64))


def test_transforms_of_functions():
    flow = module(context_features=0)
    x = numbers(4, 3)
    expected = torch.autograd.grad(flow.log_prob(x).sum(), x)[0]
    assert torch.equal(torch.func.grad(lambda x: flow.log_prob(x).sum())(x.detach()), expected)


# Values and shapes


@pytest.mark.parametrize(("x", "context"), SHAPES)
@pytest.mark.parametrize("operation", ["log_prob", "to_noise", "from_noise"])
def test_shapes_broadcast_as_in_torch(operation, x, context, dtype):
    flow = module(dtype=dtype)
    x, context = numbers(*x, dtype=flow.weight.dtype).detach(), numbers(*context, dtype=flow.weight.dtype).detach()
    shape = torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
    rows, contexts = x.expand(*shape, 3).reshape(-1, 3).numpy(), context.expand(*shape, 2).reshape(-1, 2).numpy()
    expected = getattr(flow.to_flow(), operation)(rows, contexts)
    result = getattr(flow, operation)(x, context)
    assert result.dtype == flow.weight.dtype and result.shape == shape + (() if operation == "log_prob" else (3,))
    np.testing.assert_array_equal(result.detach().numpy().reshape(expected.shape), expected)
    if operation == "log_prob":
        assert torch.equal(flow(context).log_prob(x), result)


def test_no_rows():
    flow = module()
    assert flow.log_prob(numbers(0, 3), numbers(2)).shape == (0,)
    assert flow.log_prob(numbers(4, 0, 3), numbers(0, 2)).shape == (4, 0)
    assert flow(numbers(4, 2)).sample((0,)).shape == (0, 4, 3)
    x = numbers(0, 3)
    flow.log_prob(x, numbers(2)).sum().backward()
    assert not flow.weight.grad.any() and x.grad.shape == (0, 3)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3)])
@pytest.mark.parametrize("batch", [None, (), (4,), (1,), (2, 5)])
def test_samples_come_first(shape, batch, dtype):
    flow = module(context_features=0 if batch is None else 2, dtype=dtype)
    context = None if batch is None else numbers(*batch, 2, dtype=flow.weight.dtype)
    distribution = flow(context)
    assert distribution.batch_shape == (batch or ()) and distribution.event_shape == (3,)
    torch.manual_seed(5)
    samples = distribution.sample(shape)
    assert samples.shape == (*shape, *(batch or ()), 3) and samples.is_contiguous() and not samples.requires_grad
    torch.manual_seed(5)
    again = distribution.rsample(torch.Size(shape))
    assert torch.equal(again, samples) and again.requires_grad
    assert not torch.equal(distribution.sample(shape), samples)
    torch.manual_seed(5)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    flat = None if context is None else context.detach().numpy().reshape(-1, 2)
    expected = flow.to_flow().sample(int(np.prod(shape)), flat, seed=seed)
    of_core = expected[None] if flat is None else expected
    np.testing.assert_array_equal(np.moveaxis(samples.numpy().reshape(len(of_core[0]), len(of_core), 3), 1, 0), of_core)
    torch.manual_seed(5)
    pair = distribution.rsample_and_log_prob(shape)
    assert torch.equal(pair[0], samples) and torch.equal(pair[1], distribution.log_prob(samples))


def test_the_distribution_expands_and_knows_its_support():
    flow = module(features=4, context_features=0, bounds=[(0, 1), None, (2, None), (None, 3)])
    distribution = flow().expand((5,))
    samples = distribution.sample((6,))
    assert (
        samples.shape == (6, 5, 4) and distribution.log_prob(samples).shape == (6, 5) and distribution.log_prob(samples[0, 0]).shape == (5,)
    )
    inside, outside = (flow().support.check(rows) for rows in (samples, samples + torch.tensor([9, 9, -999, 99])))
    assert inside.all() and (outside == torch.tensor([False, True, False, False])).all()
    box = module(features=2, context_features=0, bounds=[(0, 1), (2, 5)])()
    assert box.support.check(torch.tensor([[0.5, 3.0], [0.5, 1.0]])).tolist() == [True, False] and box.support.event_dim == 1
    assert module()(numbers(2)).support is torch.distributions.constraints.real_vector
    under = module()(numbers(1, 2)).expand((7, 4))
    assert under.sample().shape == (7, 4, 3) and under.log_prob(numbers(3)).shape == (7, 4)
    assert repr(under) == "NormalizingFlow(batch_shape=(7, 4), event_shape=(3,))"


def test_samples_of_other_bases_have_no_gradient():
    flow = MAF(2, transforms=1, hidden_features=(4,), components=3)
    assert not flow().has_rsample and flow().sample((3,)).shape == (3, 2)
    with pytest.raises(NotImplementedError, match="rsample needs a normal base"):
        flow().rsample((3,))
    x = numbers(3, 2, dtype=torch.float32)
    flow.to_noise(x).sum().backward()
    assert x.grad.all()
    discrete = Flow(fastmaf.MADE(3, conditional="bernoulli"))
    discrete().log_prob(torch.ones(4, 3)).sum().backward()
    assert discrete.weight.grad.any()
    mixed = Flow(fastmaf.MADE(2, conditional="mixed", categories=[None, 2]))
    with pytest.raises(ValueError, match="x requires a gradient, which a flow with discrete variables does not have: detach x"):
        mixed().log_prob(torch.ones(4, 2, requires_grad=True)).sum().backward()


def test_seeds_of_torch_settle_weights_too():
    torch.manual_seed(1)
    first = MAF(3, transforms=2, order="random")
    torch.manual_seed(1)
    second = MAF(3, transforms=2, order="random")
    x = torch.randn(4, 3)
    assert torch.equal(first().log_prob(x), second().log_prob(x))
    assert not torch.equal(MAF(3, transforms=2).weight, second.weight) and torch.equal(MAF(3, seed=1).weight, MAF(3, seed=1).weight)


def test_what_does_not_fit_is_refused_by_name():
    flow, x, context = module(), numbers(4, 3), numbers(4, 2)
    cases = {
        "x has dtype torch.float32; the flow computes in torch.float64": lambda: flow.log_prob(x.float(), context),
        "context has dtype torch.float32": lambda: flow(context.float()),
        "x has dtype torch.int64": lambda: flow.log_prob(torch.ones(4, 3, dtype=torch.int64), context),
        "x is of type ndarray; it must be a tensor": lambda: flow.log_prob(np.zeros((4, 3)), context),
        "u is on meta; fastmaf.torch computes on the cpu alone": lambda: flow.from_noise(x.to("meta"), context),
        r"x has shape \(4, 2\); the flow has 3 features": lambda: flow.log_prob(context, context),
        r"context has shape \(4, 3\); the flow has 2 context features": lambda: flow(x),
        "context is missing; the flow has 2 context features": lambda: flow(),
        r"context has shape \(4, 2\); the flow has no context features": lambda: module(context_features=0)(context),
        r"x has batch shape \(4,\), the context \(5,\); they must broadcast": lambda: flow.log_prob(x, numbers(5, 2)),
        "flow is of type Flow; it must be a fastmaf.Flow": lambda: Flow(flow),
        "weight has dtype torch.float16": flow.half,
        "weight is on meta": lambda: flow.to("meta"),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=f"^{message}") as error:
            call()
        assert len(str(error.value)) <= 200
    assert flow.weight.dtype == torch.float64 and flow.log_prob(x, context).shape == (4,)


# Training


def crescent(rows, seed):
    rng = np.random.default_rng(seed)
    y = rng.normal(size=rows)
    return np.stack([100 + 3 * y, 0.5 * y**2 + 0.3 * rng.normal(size=rows)], 1).astype(np.float32)


def train(loss, parameters, data, epochs, lr=3e-3, size=100):
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(data[0])).split(size):
            optimizer.zero_grad()
            loss(*(part[rows] for part in data)).backward()
            optimizer.step()
        schedule.step()


def test_it_trains_to_the_likelihood_of_a_fit():
    x, held = crescent(3000, 1), crescent(3000, 2)
    fitted = fastmaf.MAF(2, transforms=3, hidden_features=(20, 20), seed=0)
    start = fitted.parameters()
    fitted.fit(x, validation=0, max_epochs=15, batch_size=100, lr=3e-3, schedule="cosine", seed=0)
    flow = Flow(fastmaf.MAF(2, transforms=3, hidden_features=(20, 20), seed=0))
    np.testing.assert_array_equal(flow.weight.detach(), start)
    flow.standardize(x)
    train(lambda part: -flow().log_prob(part).mean(), flow.parameters(), [torch.from_numpy(x)], 15)
    scores = [np.mean(own.log_prob(held)) for own in (fitted, flow.to_flow())]
    assert abs(scores[0] - scores[1]) < 0.02, scores  # nats
    untrained = Flow(fastmaf.MAF(2, transforms=3, hidden_features=(20, 20), seed=0))
    untrained.standardize(x)
    assert scores[1] > np.mean(untrained.to_flow().log_prob(held)) + 0.3


def test_standardize_is_that_of_fit():
    x, context = crescent(500, 3), np.random.default_rng(4).normal(7, 2, (500, 1))
    flow, fitted = MAF(2, 1, dtype="float64"), fastmaf.MAF(2, 1, dtype="float64")
    flow.standardize(torch.from_numpy(x), torch.from_numpy(context))
    fitted.fit(x, context, max_epochs=1, validation=0)
    assert flow.to_flow().layers[0] == fitted.layers[0] and flow.to_flow().context_layers == fitted.context_layers
    alone = MAF(2, 1)
    alone.standardize(torch.from_numpy(x))
    assert alone.to_flow().layers[0] == fitted.layers[0] and not alone.to_flow().context_layers[0].loc.any()
    with pytest.warns(fastmaf.FitWarning, match="whose density has no bound"):
        MAF(2).standardize(torch.randint(3, (500, 2)))


def test_a_context_behind_a_network_is_trained_jointly():
    # The angle of two columns among noise is what the density turns on.
    rows = 2000
    signal = torch.rand(rows, 1) * 4 - 2
    seen = torch.cat([signal + 0.05 * torch.randn(rows, 1), torch.randn(rows, 6)], 1)
    x = torch.cat([signal**2, -signal], 1) + 0.2 * torch.randn(rows, 2)
    flow = MAF(2, 1, transforms=2, hidden_features=(16,))
    network = torch.nn.Sequential(torch.nn.Linear(7, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    before = [part.detach().clone() for part in network.parameters()]
    train(lambda x, seen: -flow(network(seen)).log_prob(x).mean(), [*flow.parameters(), *network.parameters()], [x, seen], 25, 1e-2)
    score = flow(network(seen)).log_prob(x).mean()
    entropy = 2 * (0.5 * np.log(2 * np.pi * np.e) + np.log(0.2))
    assert score > -entropy - 0.35  # -0.38 at best, -2.9 without the context
    assert all(not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))


def test_samples_can_be_fitted_to_a_density():
    """Variational inference: the gradient goes through the samples."""
    target = torch.distributions.MultivariateNormal(torch.tensor([1.0, -2.0]), torch.tensor([[1.0, 0.8], [0.8, 1.0]]))
    flow = MAF(2, transforms=2, hidden_features=(8,))
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-2)
    for step in range(250):
        if step == 200:
            optimizer.param_groups[0]["lr"] = 2e-3
        x, log_q = flow().rsample_and_log_prob((64,))
        optimizer.zero_grad()
        (log_q - target.log_prob(x)).mean().backward()
        optimizer.step()
    with torch.no_grad():
        x, log_q = flow().rsample_and_log_prob((4000,))
    assert (log_q - target.log_prob(x)).mean() < 0.02


# State


def test_the_state_is_all_of_the_flow():
    flow = MAF(3, 2, transforms=3, hidden_features=(8,), order="random", batch_norm=True, linear=True, seed=5)
    flow.standardize(5 + 3 * torch.randn(200, 3), torch.randn(200, 2))
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    other = MAF(3, 2, transforms=3, hidden_features=(8,), order="random", batch_norm=True, linear=True, seed=6)
    x, context = torch.randn(4, 3), torch.randn(4, 2)
    assert not torch.equal(other.log_prob(x, context), flow.log_prob(x, context))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.log_prob(x, context), flow.log_prob(x, context))
    assert make.file_bytes(other.to_flow()) == make.file_bytes(flow.to_flow())
    double = MAF(3, 2, transforms=3, hidden_features=(8,), batch_norm=True, linear=True, dtype="float64")
    double.load_state_dict(flow.state_dict())
    assert double.log_prob(x.double(), context.double()).dtype == torch.float64
    torch.testing.assert_close(double.log_prob(x.double(), context.double()).float(), flow.log_prob(x, context), rtol=1e-4, atol=1e-4)


def test_the_state_of_another_flow_is_refused():
    flow = MAF(3, transforms=2, hidden_features=(8,))
    before = flow.to_flow()
    with pytest.raises((ValueError, RuntimeError), match="of another flow|size mismatch"):
        flow.load_state_dict(MAF(3, transforms=2, hidden_features=(9,)).state_dict())
    with pytest.raises(ValueError, match=r"^the state is of another flow, Flow\(features=3"):
        flow.set_extra_state(MAF(3, transforms=2, hidden_features=(9,)).get_extra_state())
    assert make.file_bytes(flow.to_flow()) == make.file_bytes(before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda flow: pickle.loads(pickle.dumps(flow))])
def test_copies_are_apart(copied):
    flow, x = module(context_features=0), numbers(4, 3)
    optimizer = torch.optim.SGD(flow.parameters(), lr=1e-3)
    before = flow().log_prob(x)
    other = copied(flow)
    before.sum().backward()
    optimizer.step()
    assert torch.equal(other().log_prob(x), before) and not torch.equal(flow().log_prob(x), before)


def test_the_dtype_can_be_changed_from_outside():
    whole = torch.nn.Sequential(torch.nn.Linear(2, 3), module(dtype="float32", context_features=0))
    x = torch.randn(4, 3)
    first = whole[1]().log_prob(x)
    whole.double()
    assert whole[1].weight.dtype == torch.float64 and whole[1].to_flow().dtype == np.float64
    torch.testing.assert_close(whole[1]().log_prob(x.double()).float(), first, rtol=1e-4, atol=1e-4)
    whole.to(torch.float32)
    assert torch.equal(whole[1]().log_prob(x), first)
    flow = whole[1]
    flow.load_state_dict(module(context_features=0).state_dict(), assign=True)
    assert flow().log_prob(x.double()).dtype == torch.float64


def test_the_flow_given_and_the_flow_taken_are_apart():
    given = make.flow(3)
    flow = Flow(given)
    x = make.rows(given, 4)
    before = given.log_prob(x)
    with torch.no_grad():
        flow.weight.mul_(0.5)
    taken = flow.to_flow()
    given.layers = given.layers[:1]
    with torch.no_grad():
        flow.weight.mul_(2)
    np.testing.assert_array_equal(flow().log_prob(torch.from_numpy(x)).detach(), before)
    assert not np.array_equal(taken.log_prob(x), before)
    assert repr(flow).startswith("Flow(Flow(features=3, dtype=float64)")


@pytest.mark.filterwarnings("ignore")
def test_it_can_be_compiled():
    flow, x, context = module(), numbers(4, 3), numbers(4, 2)
    compiled = torch.compile(lambda x, context: (flow(2 * context).log_prob(torch.tanh(x)) ** 2).sum(), backend="aot_eager")
    expected = (flow(2 * context).log_prob(torch.tanh(x)) ** 2).sum()
    torch.testing.assert_close(compiled(x, context), expected)
    arguments = (x, context, flow.weight)
    for own, other in zip(torch.autograd.grad(compiled(x, context), arguments), torch.autograd.grad(expected, arguments), strict=True):
        torch.testing.assert_close(own, other)
    whole = torch.compile(flow, backend="aot_eager")
    torch.testing.assert_close(whole(context).log_prob(x), flow(context).log_prob(x))


# Words


def test_doctests():
    ran = 0
    for own in (fastmaf.torch, _module):
        for example in doctest.DocTestFinder(exclude_empty=True).find(own):
            if not example.name.endswith("sbi_maf"):
                result = doctest.DocTestRunner().run(example)
                assert not result.failed, example.name
                ran += result.attempted
    assert ran > 15


def test_the_snippets_of_the_page_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        if "sbi" not in block:
            exec(compile(block, str(PAGE), "exec"), names)
    assert len(blocks) >= 4
