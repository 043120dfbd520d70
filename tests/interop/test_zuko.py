"""Flows of zuko, in and out."""

from __future__ import annotations

import copy
import functools
import pickle

import foreign
import numpy as np
import pytest

import fastmaf
from fastmaf.interop import ImportMismatchError, _common, from_zuko, to_zuko
from fastmaf.layers import LAWS, Affine, Autoregressive, Elementwise, Law, Permutation

torch = pytest.importorskip("torch")
zuko = pytest.importorskip("zuko")
nn, flows, lazy = torch.nn, zuko.flows, zuko.lazy

ADJACENCY = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 1, 1], [1, 1, 1, 0, 0]]).bool()
BOX = functools.partial(lazy.UnconditionalDistribution, zuko.distributions.BoxUniform, torch.zeros(2), torch.ones(2))
GAUSSIAN = functools.partial(
    lazy.UnconditionalDistribution, zuko.distributions.DiagNormal, torch.arange(5.0), torch.arange(1.0, 6.0), buffer=True
)


def around(*transforms, context=2):
    """A MAF between other transforms."""
    return flows.Flow([*transforms, *flows.MAF(5, context, transforms=2, hidden_features=(16,)).transform.transforms], GAUSSIAN())


FLOWS = {
    "plain": lambda: flows.MAF(5),
    "context": lambda: flows.MAF(5, 3, transforms=2, randperm=True, hidden_features=(32, 16), activation=nn.Tanh),
    "residual": lambda: flows.MAF(5, 3, hidden_features=(32, 32, 16), residual=True, activation=nn.ELU),
    "residual of one width": lambda: flows.MAF(5, 0, hidden_features=(32, 32, 32), residual=True),
    "passes": lambda: flows.MAF(5, 3, passes=2),
    "order": lambda: flows.Flow([flows.MaskedAutoregressiveTransform(4, 2, order=torch.tensor([2, 0, 3, 1]))], flows.MAF(4).base),
    "no hidden layers": lambda: flows.MAF(4, 2, hidden_features=()),
    "one feature": lambda: flows.MAF(1, 2),
    "one feature without context": lambda: flows.MAF(1),
    "few units": lambda: flows.MAF(7, 1, hidden_features=(3, 2)),
    "slope": lambda: flows.MAF(3, univariate=functools.partial(zuko.transforms.MonotonicAffineTransform, slope=1e-5)),
    "additive": lambda: flows.MAF(3, 2, univariate=zuko.transforms.AdditiveTransform, shapes=[()]),
    "RealNVP": lambda: flows.RealNVP(5, 3),
    "NICE": lambda: flows.NICE(5, 0, randmask=True, hidden_features=()),
    "element-wise": lambda: flows.Flow([flows.ElementWiseTransform(3, 2)], flows.MAF(3).base),
    "affine": lambda: around(
        lazy.UnconditionalTransform(torch.distributions.AffineTransform, torch.arange(5.0), torch.arange(1.0, 6), event_dim=1, buffer=True)
    ),
    "permutation": lambda: around(lazy.UnconditionalTransform(zuko.transforms.PermutationTransform, torch.randperm(5), buffer=True)),
    "rotation": lambda: around(lazy.UnconditionalTransform(zuko.transforms.RotationTransform, torch.randn(5, 5))),
    "LU": lambda: around(lazy.UnconditionalTransform(zuko.transforms.LULinearTransform, torch.eye(5) + 0.2 * torch.randn(5, 5)), context=0),
    "inverse": lambda: flows.Flow([t.inv for t in flows.MAF(5, 3).transform.transforms], GAUSSIAN()),
    "inverse LU": lambda: around(
        lazy.UnconditionalTransform(zuko.transforms.LULinearTransform, torch.eye(5) + 0.2 * torch.randn(5, 5)).inv
    ),
    "sigmoid": lambda: flows.MAF(5, 3, activation=nn.Sigmoid),
    "sigmoid, residual": lambda: flows.MAF(5, 3, activation=nn.Sigmoid, residual=True, hidden_features=(16, 16, 8)),
    "leaky relu": lambda: flows.MAF(5, 3, activation=nn.LeakyReLU),
    "gelu": lambda: flows.MAF(5, 3, activation=nn.GELU),
    "silu": lambda: flows.MAF(5, 3, activation=nn.SiLU),
    "identity": lambda: flows.MAF(5, 3, activation=nn.Identity),
}


def trained(make):
    """All weights random, and then a few steps towards a banana."""
    torch.manual_seed(0)
    flow = make()
    with torch.no_grad():
        for parameter in flow.parameters():
            if parameter.ndim < 2 or not torch.equal(parameter, torch.eye(len(parameter))):
                parameter.add_(0.2 * torch.randn_like(parameter))
    features, context_features = sizes(flow)
    x, c = torch.randn(512, features), torch.randn(512, context_features) if context_features else None
    x[:, -1] = x[:, -1] * 0.3 + x[:, 0] ** 2 + (0 if c is None else c[:, 0])
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    for _ in range(40):
        loss = -flow(c).log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flow


def sizes(flow):
    _, features, context_features, _ = zuko_module().layers_of("test", copy.deepcopy(flow).double())
    return features, context_features


def zuko_module():
    import fastmaf.interop.zuko

    return fastmaf.interop.zuko


def theirs(flow):
    """What `foreign.agree` asks for, of a flow of zuko."""
    wide, narrow = copy.deepcopy(flow).double(), copy.deepcopy(flow).float()

    def tensor(array, dtype=torch.float64):
        return None if array is None else torch.from_numpy(array).to(dtype)

    @torch.no_grad()
    def log_prob(x, context):
        return wide(tensor(context)).log_prob(tensor(x)).numpy()

    @torch.no_grad()
    def inverse(noise, context):
        base = wide.base(None)
        base = getattr(base, "base_dist", base)
        return wide(tensor(context)).transform.inv(base.loc + base.scale * tensor(noise)).numpy()

    @torch.no_grad()
    def single(x, context):
        return narrow(tensor(context, torch.float32)).log_prob(tensor(x, torch.float32)).numpy()

    return log_prob, inverse, single


@pytest.mark.parametrize("name", FLOWS)
def test_densities_and_samples_are_those_of_zuko(name):
    flow = trained(FLOWS[name])
    with foreign.quiet():
        made = from_zuko(flow)
    assert made.dtype == np.float32 and made.training["source"]["library"] == "zuko"
    foreign.agree(lambda dtype: from_zuko(flow, dtype=dtype), *theirs(flow))


def test_an_adjacency_is_taken_and_what_fit_would_do_to_it_is_said():
    flow = trained(lambda: flows.MAF(3, 2, hidden_features=(16, 16), adjacency=ADJACENCY))
    with foreign.quiet(), pytest.warns(UserWarning, match="masks of the model hold weights at zero"):
        from_zuko(flow)
    with pytest.warns(UserWarning, match="masks of the model"):
        foreign.agree(lambda dtype: from_zuko(flow, dtype=dtype), *theirs(flow))


@pytest.mark.parametrize("name", ["plain", "context", "residual", "residual of one width", "passes", "no hidden layers"])
@pytest.mark.parametrize("arrays", [False, True])
def test_a_state_dict_suffices(name, arrays):
    flow = trained(FLOWS[name])
    state = flow.state_dict()
    state = {key: value.numpy() for key, value in state.items()} if arrays else state
    activation = {"context": "tanh", "residual": "elu"}.get(name, "relu")
    with foreign.quiet():
        made, expected = from_zuko(state_dict=state, activation=activation), from_zuko(flow)
    assert made.layers == expected.layers and made.dtype == expected.dtype


def test_the_layers_need_the_compiled_core_alone():
    """Networks in the shape that the core has; nothing is lost by folding."""
    for name in ("plain", "context", "RealNVP", "sigmoid", "leaky relu", "permutation", "rotation", "LU", "element-wise", "residual"):
        assert fastmaf.backends.require("cpu").unsupported(from_zuko(trained(FLOWS[name])).record) is None


def test_bounds_become_bounds():
    transforms = [
        torch.distributions.AffineTransform(torch.tensor([-2.0, 1.0]).double(), torch.tensor([4.0, 2.0]).double(), event_dim=1),
        torch.distributions.transforms.CatTransform(
            [torch.distributions.SigmoidTransform(), torch.distributions.ExpTransform()], dim=-1, lengths=[1, 1]
        ),
    ]
    data = torch.distributions.ComposeTransform(transforms[::-1])  # from the line to (-2, 2) and beyond 1
    flow = flows.Flow([lazy.UnconditionalTransform(lambda: data.inv), *flows.MAF(2).transform.transforms], flows.MAF(2).base)
    made = from_zuko(flow)
    assert isinstance(made.layers[0], Elementwise) and made.layers[0].kinds == ("logit", "log_above")
    assert (made.layers[0].lower.tolist(), made.layers[0].upper[0]) == ([-2.0, 1.0], 2.0)
    x = np.random.default_rng(0).uniform([-2, 1], [2, 4], (100, 2))
    foreign.agree(lambda dtype: from_zuko(flow, dtype=dtype), *theirs(flow)[:2], x=x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flows.NSF(3), "MonotonicRQSTransform .*a law with its parameters would be needed"),
        (lambda: flows.NAF(3), "cannot be imported"),
        (lambda: flows.MAF(3, activation=nn.Softplus), "the activation Softplus .*there are relu"),
        (lambda: flows.MAF(3, activation=functools.partial(nn.ELU, alpha=2.0)), "the activation ELU"),
        (lambda: flows.MAF(3, activation=nn.Identity, residual=True), "without activation"),
        (lambda: flows.RealNVP(3, normalize=True), "LayerNorm"),
        (lambda: flows.NCSF(3), "cannot be imported"),
        (
            lambda: flows.Flow(flows.MAF(2).transform, BOX()),
            "the base Uniform",
        ),
    ],
)  # fmt: skip
def test_what_the_record_cannot_express_is_refused_by_name(make, message):
    with pytest.raises(NotImplementedError, match=message) as error:
        from_zuko(make())
    assert len(str(error.value)) <= 200


def test_other_objects_are_refused():
    from fastmaf.torch import MAF, as_zuko

    with pytest.raises(ValueError, match=r"reads the transform and the base of a flow, which Wrapped does not have"):
        from_zuko(as_zuko(MAF(2)))
    with pytest.raises(ValueError, match=r"takes a zuko.flows.Flow, not Linear"):
        from_zuko(nn.Linear(2, 2))


def test_an_import_that_is_wrong_is_noticed(monkeypatch):
    monkeypatch.setattr(zuko_module(), "CLIP", 3.0)
    law = zuko_module()._law
    monkeypatch.setattr(zuko_module(), "_law", lambda *a: (Law("exp_soft", "affine", {"clip": 3.0}), law(*a)[1]))
    with pytest.raises(ImportMismatchError, match="differ by .* on random rows"):
        from_zuko(trained(FLOWS["plain"]))


def test_half_precision_is_read_and_numbers_that_are_not_finite_are_named():
    made = from_zuko(flows.MAF(3).bfloat16())
    assert made.dtype == np.float32
    flow = flows.MAF(3)
    flow.transform.transforms[1].hyper[0].bias.data[0] = np.nan
    with pytest.raises(ValueError, match="bias, of shape .*, holds numbers that are not finite"):
        from_zuko(flow)


def test_the_flow_of_the_caller_stays_as_it_is():
    flow = flows.MAF(3)
    before = {key: value.clone() for key, value in flow.state_dict().items()}
    from_zuko(flow, dtype="float64")
    assert all(torch.equal(value, before[key]) and value.dtype == before[key].dtype for key, value in flow.state_dict().items())
    assert flow.training


# The way back


def laws():
    flow = fastmaf.MAF(4, context_features=2, transforms=2, hidden_features=(8, 8), dtype="float64", seed=0, activation="tanh")
    for kind in LAWS:
        for form in ("standardize", "affine"):
            for direction in ("data", "noise"):
                if kind == "log_precision" and direction == "noise":
                    continue
                layers = [
                    Autoregressive(made.ranks, made.conditioner, Law(kind, form), direction) if isinstance(made, Autoregressive) else made
                    for made in flow.layers
                ]
                yield f"{kind}, {form}, {direction}", flow._with(layers=layers)


OWN = {
    "MAF": lambda: fastmaf.MAF(4, seed=0),
    "context": lambda: fastmaf.MAF(4, context_features=2, activation="silu", seed=0),
    "residual": lambda: fastmaf.MAF(4, context_features=2, hidden_features=(16, 16), residual=True, seed=0),
    "bounds": lambda: fastmaf.MAF(4, bounds=[(0, 1), None, (2, None), (None, -1)], seed=0),
    "batch norm": lambda: fastmaf.MAF(3, batch_norm=True, seed=0),
    "linear": lambda: fastmaf.MAF(3, linear=True, seed=0),
    "one feature": lambda: fastmaf.MAF(1, context_features=2, seed=0),
    "permutation": lambda: fastmaf.Flow([Permutation([2, 0, 1]), Affine([1, 2, 3], [0.5, 1, -2])], dtype="float64"),
    "nothing": lambda: fastmaf.Flow([], features=2),
} | {name: functools.partial(lambda flow: flow, flow) for name, flow in laws()}


@pytest.mark.parametrize("name", OWN)
def test_flows_go_to_zuko_and_come_back(name):
    flow = foreign.scrambled(OWN[name]())
    made = to_zuko(flow)
    assert isinstance(made, flows.Flow) and made.base.loc.dtype == (torch.float32 if flow.dtype == np.float32 else torch.float64)
    x = np.random.default_rng(0).uniform([0, -3, 2, -9][: flow.features], [1, 3, 5, -1][: flow.features], (100, flow.features))
    exact = to_zuko(flow.astype("float64"))
    log_prob, inverse, _ = theirs(exact)
    foreign.agree(flow.astype, log_prob, inverse, x=x, context=None if not flow.context_features else np.ones((100, 2)) * x[:, :1])
    with foreign.quiet():
        again = from_zuko(exact)
        context = np.ones((100, 2)) if flow.context_features else None
        np.testing.assert_allclose(again.log_prob(x, context), flow.astype("float64").log_prob(x, context), rtol=1e-9, atol=1e-9)
    copied = pickle.loads(pickle.dumps(made))
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), copied.state_dict().values(), strict=True))


def test_flows_of_zuko_train_on():
    flow = to_zuko(foreign.scrambled(fastmaf.MAF(3, context_features=2, hidden_features=(8, 8), seed=0)))
    x, c = torch.randn(100, 3), torch.randn(100, 2)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = -flow(c).log_prob(x).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    foreign.agree(from_zuko(flow).astype, *theirs(flow))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fastmaf.MAF(3, components=2), "a mixture base .*zuko has normal bases"),
        (lambda: fastmaf.MAF(3, direct=True), "direct weights"),
        (
            lambda: fastmaf.MAF(3, context_features=1)._with(context_layers=[Elementwise.from_bounds([(0, 1)])]),
            "bounds of the context",
        ),
    ],
)
def test_what_zuko_cannot_hold_is_refused_by_name(make, message):
    with pytest.raises(NotImplementedError, match=message) as error:
        to_zuko(make())
    assert len(str(error.value)) <= 200


def test_the_check_has_no_false_alarm_in_the_tails():
    assert _common.LIMIT >= 1e-7
    flow = foreign.scrambled(fastmaf.MAF(2, clip=None, hidden_features=(32, 32), input_clip=None, seed=0))
    to_zuko(flow.with_parameters(5 * flow.parameters()))
