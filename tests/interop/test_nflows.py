"""Flows of nflows."""

from __future__ import annotations

import copy
from pathlib import Path

import foreign
import numpy as np
import pytest

import fastmaf
from fastmaf.interop import embed, from_nflows
from fastmaf.layers import Affine, Elementwise, Linear, Permutation

torch = pytest.importorskip("torch")
pytest.importorskip("nflows")
from nflows import distributions as d  # noqa: E402
from nflows import transforms as t  # noqa: E402
from nflows.flows import Flow, MaskedAutoregressiveFlow, SimpleRealNVP  # noqa: E402
from nflows.nn.nde.made import MADE  # noqa: E402, F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.qr is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated"),
]

MODELS = Path(__file__).resolve().parents[3] / "shared" / "data" / "models"


def made(features=5, context=None, units=16, **options):
    return t.MaskedAffineAutoregressiveTransform(features, units, context, **options)


def flow(*transforms, base=None, embedding=None, features=5):
    return Flow(t.CompositeTransform(list(transforms)), base or d.StandardNormal([features]), embedding)


def encoder(*widths):
    """A network of the context."""
    layers = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in (torch.nn.Linear(a, b), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers[:-1])


def mixture(**options):
    return d.MADEMoG(5, 16, options.pop("context", 3), num_mixture_components=4, **options)


FLOWS = {
    "MaskedAutoregressiveFlow": lambda: MaskedAutoregressiveFlow(5, 16, 3, 2),
    "random permutations, batch norms": lambda: MaskedAutoregressiveFlow(
        5, 16, 3, 2, use_random_permutations=True, batch_norm_within_layers=True, batch_norm_between_layers=True, dropout_probability=0.2
    ),
    "feedforward, random masks": lambda: MaskedAutoregressiveFlow(
        5, 16, 3, 2, use_residual_blocks=False, use_random_masks=True, batch_norm_within_layers=True, activation=torch.tanh
    ),
    "feedforward without blocks": lambda: MaskedAutoregressiveFlow(5, 16, 3, 0, use_residual_blocks=False),
    "residual without blocks": lambda: flow(made(context=3, num_blocks=0, activation=torch.tanh)),
    "few units": lambda: MaskedAutoregressiveFlow(9, 4, 2, 1),
    "one feature": lambda: flow(made(1, 3, 8), features=1),
    "elu": lambda: MaskedAutoregressiveFlow(5, 16, 2, 2, activation=torch.nn.functional.elu),
    "silu, feedforward": lambda: MaskedAutoregressiveFlow(5, 16, 2, 2, use_residual_blocks=False, activation=torch.nn.functional.silu),
    "sigmoid": lambda: flow(made(activation=torch.sigmoid, use_batch_norm=True), made(activation=torch.sigmoid, use_residual_blocks=False)),
    "leaky relu": lambda: flow(made(activation=torch.nn.functional.leaky_relu, use_residual_blocks=False, use_batch_norm=True)),
    "context": lambda: flow(
        t.PointwiseAffineTransform(torch.tensor(0.3), torch.tensor(1.7)),
        made(context=3),
        t.RandomPermutation(5),
        t.LULinear(5, identity_init=False),
        made(context=3, use_residual_blocks=False, activation=torch.tanh),
        t.ActNorm(5),
        t.BatchNorm(5),
    ),
    "context, batch norms": lambda: flow(
        made(context=3, use_batch_norm=True),
        made(context=3, use_residual_blocks=False, use_batch_norm=True),
        base=d.DiagonalNormal([5]),
    ),
    "inverse": lambda: flow(
        t.InverseTransform(t.CompositeTransform([made(context=3), t.LULinear(5, identity_init=True), t.ActNorm(5), t.RandomPermutation(5)]))
    ),
    "inverse of the inverse": lambda: flow(t.InverseTransform(t.InverseTransform(made())), t.ReversePermutation(5)),
    "composites within each other": lambda: flow(t.CompositeTransform([made(), t.CompositeTransform([t.ReversePermutation(5)])]), made()),
    "linear layers": lambda: flow(t.NaiveLinear(5), t.QRLinear(5, 2), t.SVDLinear(5, 2), t.HouseholderSequence(5, 3), made()),
    "conditional base": lambda: flow(made(context=3), base=d.ConditionalDiagonalNormal([5], encoder(3, 8, 10))),
    "linear embedding": lambda: flow(made(context=3), made(context=3, use_residual_blocks=False), embedding=encoder(7, 3)),
    "embedding in two linear steps": lambda: flow(
        made(context=3), embedding=torch.nn.Sequential(torch.nn.Linear(7, 4), torch.nn.Identity(), torch.nn.Linear(4, 3, bias=False))
    ),
    "mixture": lambda: flow(t.IdentityTransform(), base=mixture()),
    "mixture, feedforward": lambda: flow(
        t.PointwiseAffineTransform(torch.randn(5), torch.rand(5) + 0.2), base=mixture(context=None, use_residual_blocks=False)
    ),
    "mixture, batch norms": lambda: flow(made(context=3), base=mixture(use_batch_norm=True)),
}

EXACT_INVERSE = {name for name in FLOWS if "mixture" not in name and name != "linear layers"}
"""That of mixtures is not one, and that of `NaiveLinear` calls what torch has no more."""


def trained(make):
    """All weights random, then a few steps, in which batch norms meet data."""
    torch.manual_seed(0)
    flow = make()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if "InverseTransform" in repr(flow):  # an ActNorm that runs backwards never meets data
            for module in flow.modules():
                if isinstance(module, t.ActNorm):
                    module.initialized.fill_(True)
    features, context_features = sizes(flow)
    x = 1 + 2 * torch.randn(512, features)
    x[:, -1] = x[:, -1] * 0.3 + 0.2 * x[:, 0] ** 2
    c = torch.randn(512, context_features) if context_features else None
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    for _ in range(30):
        loss = -flow.log_prob(x, c).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flow


def sizes(flow):
    for module in flow.modules():
        features = getattr(module, "features", None) or getattr(module, "_shape", [None])[0]
        if features:
            break
    linears = [m for m in flow._embedding_net.modules() if isinstance(m, torch.nn.Linear)]
    contexts = [m.context_layer.in_features for m in flow.modules() if hasattr(m, "context_layer")]
    return features, (linears[0].in_features if linears else max(contexts, default=0))


def theirs(flow):
    """What `foreign.agree` asks for, of a flow of nflows."""
    wide, narrow = copy.deepcopy(flow).double().eval(), copy.deepcopy(flow).float().eval()

    def tensor(array, dtype=torch.float64):
        return None if array is None else torch.from_numpy(array).to(dtype)

    @torch.no_grad()
    def log_prob(x, context):
        return wide.log_prob(tensor(x), tensor(context)).numpy()

    @torch.no_grad()
    def inverse(noise, context):
        noise, context, base = tensor(noise), tensor(context), wide._distribution
        context = context if context is None else wide._embedding_net(context)
        if isinstance(base, d.DiagonalNormal):
            noise = base.mean_ + base.log_std_.exp() * noise
        if isinstance(base, d.ConditionalDiagonalNormal):
            means, log_stds = base._compute_params(context)
            noise = means + log_stds.exp() * noise
        return wide._transform.inverse(noise, context)[0].numpy()

    @torch.no_grad()
    def single(x, context):
        return narrow.log_prob(tensor(x, torch.float32), tensor(context, torch.float32)).numpy()

    return log_prob, inverse, single


@pytest.mark.parametrize("name", FLOWS)
def test_densities_and_samples_are_those_of_nflows(name):
    flow = trained(FLOWS[name])
    with foreign.quiet():
        made = from_nflows(flow)
    assert made.dtype == np.float32 and made.training["source"]["library"] == "nflows"
    log_prob, inverse, single = theirs(flow)
    foreign.agree(lambda dtype: from_nflows(flow, dtype=dtype), log_prob, inverse if name in EXACT_INVERSE else None, single)
    assert flow.training


NO_STATE = {"inverse", "inverse of the inverse", "linear layers", "conditional base", "context", "leaky relu", "sigmoid"}
"""Whose state dicts do not say what they are of, or which have several activations."""


@pytest.mark.parametrize("name", [name for name in FLOWS if name not in NO_STATE and "embedding" not in name])
def test_a_state_dict_suffices(name):
    flow = trained(FLOWS[name])
    words = {"feedforward, random masks": "tanh", "residual without blocks": "tanh", "elu": "elu", "silu, feedforward": "silu"}
    if name.endswith("without blocks"):
        with pytest.raises(NotImplementedError, match="does not say whether an activation ends it"):
            from_nflows(state_dict=flow.state_dict(), activation="relu")
        return
    with foreign.quiet():
        made = from_nflows(state_dict=flow.state_dict(), activation=words.get(name, "relu"))
        arrays = from_nflows(
            state_dict={key: value.numpy() for key, value in flow.state_dict().items()}, activation=words.get(name, "relu"), dtype="float64"
        )
    assert made.dtype == np.float32
    foreign.agree(lambda dtype: arrays if dtype == "float64" else made, theirs(flow)[0])


def test_bounds_become_bounds():
    flow_ = flow(t.Logit(), made(), features=5)
    x = np.random.default_rng(0).uniform(0.01, 0.99, (100, 5))
    with foreign.quiet():
        made_ = from_nflows(flow_)
    assert made_.layers[0] == Elementwise(("logit",) * 5, np.zeros(5), np.ones(5))
    foreign.agree(lambda dtype: from_nflows(flow_, dtype=dtype), *theirs(flow_)[:2], x=x)


def test_linear_layers_and_batch_norms_keep_their_form():
    flow_ = flow(
        t.PointwiseAffineTransform(torch.tensor(1.0), torch.tensor(2.0)), t.LULinear(3), t.BatchNorm(3), t.ReversePermutation(3), features=3
    )
    kinds = [type(layer) for layer in from_nflows(flow_.eval()).layers]
    assert kinds == [Affine, Linear, Affine, Permutation]


def test_z_scores_of_the_context_are_folded_wherever_they_stand():
    class Standardize(torch.nn.Module):  # as in sbi
        def __init__(self, *numbers):
            super().__init__()
            for name, value in zip(("_mean", "_std"), numbers, strict=True):
                self.register_buffer(name, torch.as_tensor(value))

        def forward(self, c):
            return (c - self._mean) / self._std

    for parts in ([[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0], [0.5, 0.5, 2.0]], [[1.0, 2.0, 3.0], torch.nn.Linear(3, 3), [0.5, 0.5, 2.0]]):
        parts = [part if isinstance(part, torch.nn.Module) else Standardize(part, [2.0, 0.5, 4.0]) for part in parts]
        flow_ = flow(made(context=3), embedding=torch.nn.Sequential(*parts))
        foreign.agree(lambda dtype, flow_=flow_: from_nflows(flow_, dtype=dtype), *theirs(flow_))


def test_an_embedding_that_is_not_linear_stays_in_front():
    net = torch.nn.Sequential(torch.nn.Linear(7, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    flow_ = trained(lambda: flow(made(context=3), embedding=net))
    with foreign.quiet(), pytest.warns(UserWarning, match=r"embedding Sequential is not linear .*fastmaf.interop.embed\(source, context\)"):
        made_ = from_nflows(flow_, dtype="float64")
    c = torch.randn(50, 7)
    x = np.random.default_rng(0).normal(size=(50, 5))
    embedded = embed(flow_, c)
    assert made_.context_features == 3 and embedded.shape == (50, 3)
    assert foreign.relative(made_.log_prob(x, embedded), theirs(flow_)[0](x, c.double().numpy())) < 1e-5  # embedded in single precision


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flow(t.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(5, 8, tails="linear")), "Piecewise.*spline law"),
        (lambda: SimpleRealNVP(4, 8, 1, 1), "AffineCouplingTransform cannot be imported"),
        (lambda: flow(t.LeakyReLU(), made()), "LeakyReLU cannot be imported"),
        (lambda: flow(t.Sigmoid(), made()), "Sigmoid cannot be imported"),
        (lambda: flow(made(activation=torch.nn.functional.softplus)), "the activation softplus"),
        (lambda: flow(made(), base=d.ConditionalIndependentBernoulli([5])), "the base ConditionalIndependentBernoulli"),
        (lambda: flow(made(context=3, activation=torch.sigmoid)), "a sigmoid of the context"),
        (lambda: flow(made(activation=torch.nn.functional.leaky_relu)), "residual network with leaky relu"),
    ],
)  # fmt: skip
def test_what_the_record_cannot_express_is_refused_by_name(make, message):
    with pytest.raises(NotImplementedError, match=message) as error:
        from_nflows(make())
    assert len(str(error.value)) <= 200


def test_an_act_norm_that_has_seen_no_data_is_said():
    with pytest.warns(UserWarning, match="an ActNorm has not seen any data"), foreign.quiet():
        from_nflows(flow(t.ActNorm(5), made()))


def test_what_the_core_lacks_is_said_once_and_the_reference_takes_over(monkeypatch):
    monkeypatch.setattr(fastmaf.backends.require("cpu").__class__, "unsupported", lambda self, record: "law 'softplus'")
    fastmaf.set_backend(None)
    with pytest.warns(
        RuntimeWarning, match="from_nflows: the cpu backend has no kernel for law 'softplus': the reference runs this flow"
    ) as caught:
        made_ = from_nflows(flow(made()))
    assert len(caught) == 1 and caught[0].filename == __file__ and len(str(caught[0].message)) <= 200
    assert made_.sample(5, seed=0).shape == (5, 5)


@pytest.mark.parametrize("name", ["AFS", "AFS_LD"])
def test_trained_posteriors_reproduce_their_references(name):
    if not MODELS.is_dir():
        pytest.skip("the models are not here")
    state, known = np.load(MODELS / f"infer_posterior_{name}_state.npz"), np.load(MODELS / f"infer_{name}_reference.npz")
    theta, context = known["theta"], known["context"]
    with foreign.quiet():
        flow = from_nflows(state_dict=state, activation="tanh")
        assert flow.dtype == np.float32 and flow.context_features == context.shape[1]
        wide = from_nflows(state_dict=state, activation="tanh", dtype="float64")
        assert foreign.relative(wide.log_prob(theta, context), known["log_prob_f64"]) <= 1e-12
        assert foreign.relative(wide.to_noise(theta, context), known["noise"]) <= 1e-9
        assert foreign.relative(wide.from_noise(known["noise"], context), theta) <= 1e-7
        error = np.abs(flow.log_prob(theta, context) - known["log_prob_f64"])
        own = np.abs(known["log_prob_f32"] - known["log_prob_f64"])
        assert np.sqrt((error**2).mean()) <= 2 * np.sqrt((own**2).mean())
