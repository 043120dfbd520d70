"""The models beyond the plain MAF: density, sampling and training of each, and what torch and nflows need for the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import fastmaf
from fastmaf import backends
from fastmaf.backends import reference
from fastmaf.layers import Block, Conditioner, Dense, Terminal
from fastmaf.record import trainable

from .cases import Array, normal, unmasked_weights
from .report import Settings
from .timing import Contender, Line, WrongResult, against, compare

WIDE, DEEP, COMPONENTS = (500,), (512, 512), 10

# name -> model, rows of log_prob and sample
MEMBERS: dict[str, tuple[Callable[[], Any], int]] = {
    "Bernoulli MADE (784, 500x1)": (lambda: fastmaf.MADE(784, "bernoulli", hidden_features=WIDE, seed=0), 10_000),
    "Bernoulli MADE (63, 512x2)": (lambda: fastmaf.MADE(63, "bernoulli", hidden_features=DEEP, seed=0), 10_000),
    "mixture MADE (63, 512x2, 10)": (lambda: fastmaf.MADE(63, "mixture", hidden_features=DEEP, components=COMPONENTS, seed=0), 10_000),
    "mixture MADE (784, 1024x1, 10)": (lambda: fastmaf.MADE(784, "mixture", hidden_features=(1024,), components=COMPONENTS, seed=0), 2_000),
    "categorical MADE (63, 512x2, 8)": (lambda: fastmaf.MADE(63, "categorical", categories=8, hidden_features=DEEP, seed=0), 10_000),
    "MAF with batch norm (63, 512x2, 5)": (lambda: fastmaf.MAF(63, hidden_features=DEEP, batch_norm=True, seed=0), 10_000),
    "MAF MoG (63, 512x2, 5, 10)": (lambda: fastmaf.MAF(63, hidden_features=DEEP, components=COMPONENTS, seed=0), 10_000),
    "MAF with direct weights (63, 512x2, 5)": (lambda: fastmaf.MAF(63, hidden_features=DEEP, direct=True, seed=0), 10_000),
    "residual + LU (63, 256, 10)": (lambda: fastmaf.presets.resmade_lu(63, seed=0)[0], 10_000),
    "ensemble of 32 Bernoulli MADEs (128, 500x1)": (lambda: fastmaf.MADE(128, "bernoulli", hidden_features=WIDE, masks=32, seed=0), 10_000),
}
STEPS, RATE, SEED = 4, 1e-5, 2
CHECKED = {"log_prob": 200, "sample": 20, "steps": 2}
"""Rows and steps that are computed again in float64 by the reference backend."""
PREFIX = 64
"""Variables of a wider model whose samples are drawn again: the reference sampler makes one pass for each."""


def run(settings: Settings) -> Iterator[Line]:
    """Two or three lines per model, then those with peers."""
    for name, (build, rows) in MEMBERS.items():
        yield from _member(name, build(), 200 if settings.quick else rows, settings)
    yield from _bernoulli(settings)
    yield from _mixture(settings)


def _member(name: str, model: Any, rows: int, settings: Settings) -> Iterator[Line]:
    parts = [model.member(k) for k in range(len(model))] if isinstance(model, fastmaf.Ensemble) else [model]
    x, work = model.sample(rows, seed=1), 2.0 * sum(map(unmasked_weights, parts))

    def check_both(result: Any) -> float:
        return max(_check_sample(model, result[0]), _check_log_prob(model, *result))

    contenders = [
        Contender("log_prob", lambda: model.log_prob(x), lambda result: _check_log_prob(model, x, result)),
        Contender("sample", lambda: model.sample(rows, seed=SEED), lambda result: _check_sample(model, result)),
        Contender("sample_and_log_prob", lambda: model.sample_and_log_prob(rows, seed=SEED), check_both),
    ]
    line = compare(Line("member", name, rows), contenders, settings.rounds, settings.threads, rows * work)
    if "seconds" in line.contenders.get("log_prob", {}):
        line.values["rows/s"] = rows / line.contenders["log_prob"]["seconds"]["median"]
    for what in ("sample", "sample_and_log_prob"):
        if "ratio" in line.contenders.get(what, {}):
            line.values[f"{what} / log_prob"] = line.contenders[what]["ratio"]["median"]
    yield line
    for batch in _batches(settings):
        training = _training(model, x[: STEPS * batch], batch)
        # An ensemble trains one member per step.
        flops = 3 * batch * training.steps * work / len(parts)
        yield compare(Line("member train", name, batch), [training], settings.rounds, settings.threads, flops)


def _batches(settings: Settings) -> tuple[int, ...]:
    return (100,) if settings.quick else (100, 1000)


# Checks, all in float64 by the reference backend


def _exact(model: Any, method: str, *arguments: Any, **options: Any) -> Array:
    chosen = fastmaf.get_backend()
    fastmaf.set_backend("reference")
    try:
        return np.asarray(getattr(model.astype("float64"), method)(*arguments, **options))
    finally:
        fastmaf.set_backend(chosen)


def _check_log_prob(model: Any, x: Array, result: Any) -> float:
    """Largest difference in nats."""
    rows, result = CHECKED["log_prob"], np.asarray(result)
    if result.shape != x.shape[:1] or not np.isfinite(result).all():
        raise WrongResult(f"log_prob has shape {result.shape} and {int((~np.isfinite(result)).sum())} values that are not finite")
    exact = _exact(model, "log_prob", x[:rows])
    error = np.abs(result[:rows] - exact)
    if not (error <= 1e-3 + 1e-5 * np.abs(exact)).all():
        raise WrongResult(f"log_prob is off by {error.max():.3g} nats")
    return float(error.max())


def _check_sample(model: Any, result: Array) -> float:
    """Difference of all but a tenth of the rows: where float32 and float64 choose another value or component, a row goes its own way."""
    if not np.isfinite(result).all():
        raise WrongResult("samples are not finite")
    part = model.prefix(PREFIX) if model.features > 2 * PREFIX else model
    exact = _exact(part, "sample", CHECKED["sample"], seed=SEED)
    error = float(np.quantile(np.abs(result[: len(exact), : part.features] - exact).max(axis=1), 0.9))
    if not error <= 1e-2:
        raise WrongResult(f"samples are off by {error:.3g}")
    return error


def _check_change(change: Array, model: Any, x: Array, batch: int) -> float:
    """Relative distance of the change of all parameters by the steps of x."""
    exact = _change(_engine(reference.backend, model.astype("float64")), x.astype(np.float64), batch)
    error = float(np.linalg.norm(change - exact) / np.linalg.norm(exact))
    if not error < 0.05:
        raise WrongResult(f"{len(x) // batch} steps differ from those in float64 by {error:.3g} of their length")
    return error


# Training


def _engine(backend: Any, model: Any) -> Any:
    if not isinstance(model, fastmaf.Ensemble):
        return backend.trainer(model.record)
    members = [model.member(k) for k in range(len(model))]
    engine = backend.trainer(members[0].record, members=[member.record for member in members])
    engine.set_parameters(model.parameters())
    return engine


def _epoch(engine: Any, x: Array, batch: int) -> Any:
    return engine.epoch(x, None, None, np.arange(len(x)), batch, np.full(len(x) // batch, RATE), 1.0)


def _change(engine: Any, x: Array, batch: int) -> Array:
    before = engine.parameters().astype(np.float64)
    _epoch(engine, x, batch)
    return np.asarray(engine.parameters() - before)


def _training(model: Any, x: Array, batch: int) -> Contender:
    backend, first = backends.choose(), x[: CHECKED["steps"] * batch]
    engine = _engine(backend, model)

    def check(_: Any) -> float:
        return _check_change(_change(_engine(backend, model), first, batch), model, first, batch)

    return Contender("fastmaf", lambda: _epoch(engine, x, batch), check, steps=len(x) // batch)


def _torch_training(name: str, net: Any, loss: Callable[..., Any], flow_of: Callable[[Any], Any], x: Array, batch: int) -> Contender:
    """Adam on a torch module; its steps are checked against those of fastmaf from the same weights, which `flow_of` takes from it."""
    import torch

    def stepper(net: Any, x: Array) -> Callable[[], None]:
        optimizer, batches = torch.optim.Adam(net.parameters(), lr=RATE), torch.split(torch.from_numpy(x), batch)

        def steps() -> None:
            for rows in batches:
                optimizer.zero_grad()
                loss(net, rows).backward()
                optimizer.step()

        return steps

    def check(_: Any) -> float:
        own, first = copy.deepcopy(net), x[: CHECKED["steps"] * batch]
        start = flow_of(own)
        stepper(own, first)()
        return _check_change(flow_of(own).parameters().astype(np.float64) - start.parameters(), start, first, batch)

    return Contender(name, stepper(net, x), check, steps=len(x) // batch)


# Peers


def _bernoulli(settings: Settings) -> Iterator[Line]:
    """A Bernoulli MADE against the same masked network in torch: sampling by one pass per variable, and a step of training."""
    name, rows = "Bernoulli MADE (784, 500x1)", 20 if settings.quick else 1000
    try:
        import torch
        from torch.nn.functional import binary_cross_entropy_with_logits, linear
    except ImportError as problem:
        yield Line("member sample", name, rows, skipped={"torch": f"not installed ({problem})"})
        return
    flow = fastmaf.MADE(784, "bernoulli", hidden_features=WIDE, seed=0)
    arrays = [torch.from_numpy(np.array(a)) for a in trainable(flow.base)]

    def logits(x: Any) -> Any:
        w0, b0, w1, b1 = arrays
        return linear(torch.relu(linear(x, w0, b0)), w1, b1)

    def loop() -> Any:
        with torch.no_grad():
            x = torch.zeros(rows, flow.features)
            for j in range(flow.features):
                x[:, j] = torch.bernoulli(torch.sigmoid(logits(x)[:, j]))
            return x.numpy()

    usual = flow.log_prob(flow.sample(1000, seed=3))

    def check(result: Any) -> float:
        """The density in torch of these rows is that in fastmaf, and its mean that of other samples, to six standard errors."""
        ours, x = flow.log_prob(result), torch.from_numpy(np.array(result))
        theirs = -binary_cross_entropy_with_logits(logits(x), x, reduction="none").sum(1).numpy()
        error = float(np.abs(theirs - ours).max())
        if not error <= 1e-2:
            raise WrongResult(f"log_prob is off by {error:.3g} nats")
        away = abs(ours.mean() - usual.mean()) / (ours.var() / len(ours) + usual.var() / len(usual)) ** 0.5
        if not away < 6:
            raise WrongResult(f"mean log_prob of the samples is {away:.1f} standard errors from that of other samples")
        return error

    contenders = [
        Contender("fastmaf", lambda: flow.sample(rows, seed=1), check),
        Contender("torch, one pass per variable", loop, check, once=True),
    ]
    line = compare(Line("member sample", name, rows), contenders, settings.rounds, settings.threads)
    against(line, "times the loop")
    yield line

    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList([a.clone() for a in arrays])
            self.masks = [torch.from_numpy(np.array(m, np.float32)) for m in reference.free(flow.base)]

        def forward(self, x: Any) -> Any:
            w0, b0, w1, b1 = self.weights
            return linear(torch.relu(linear(x, w0 * self.masks[0], b0)), w1 * self.masks[2], b1)

    def loss(net: Any, x: Any) -> Any:
        return binary_cross_entropy_with_logits(net(x), x, reduction="sum") / len(x)

    def flow_of(net: Any) -> Any:
        return flow.with_parameters(torch.nn.utils.parameters_to_vector(net.parameters()).detach().numpy())

    for batch in _batches(settings):
        x = flow.sample(STEPS * batch, seed=1)
        contenders = [_training(flow, x, batch), _torch_training("torch, masked weights", Masked(), loss, flow_of, x, batch)]
        line = compare(Line("member train against torch", name, batch), contenders, settings.rounds, settings.threads)
        against(line, "times torch")
        yield line


def _mixture(settings: Settings) -> Iterator[Line]:
    """A mixture MADE against that of nflows, each with its own weights: a step of training, and density."""
    name = "mixture MADE (63, 512x2, 10)"
    try:
        import torch
        from nflows.nn.nde.made import MixtureOfGaussiansMADE
    except ImportError as problem:
        yield Line("member train against nflows", name, 100, skipped={"nflows": f"not installed ({problem})"})
        return
    flow = fastmaf.MADE(63, "mixture", hidden_features=DEEP, components=COMPONENTS, seed=0)
    torch.manual_seed(0)
    net = MixtureOfGaussiansMADE(63, DEEP[0], num_blocks=1, num_mixture_components=COMPONENTS, use_residual_blocks=False)
    for batch in _batches(settings):
        x = normal(STEPS * batch, 63)
        theirs = _torch_training("nflows", net, lambda net, rows: -net.log_prob(rows).mean(), _from_nflows, x, batch)
        line = Line("member train against nflows", name, batch)
        compare(line, [_training(flow, x, batch), theirs], settings.rounds, settings.threads)
        against(line, "times nflows")
        yield line

    x = normal(CHECKED["log_prob"] if settings.quick else 10_000, 63)
    rows = torch.from_numpy(x)

    def evaluate() -> Any:
        with torch.inference_mode():
            return net.log_prob(rows).numpy()

    contenders = [
        Contender("fastmaf", lambda: flow.log_prob(x), lambda result: _check_log_prob(flow, x, result)),
        Contender("nflows", evaluate, lambda result: _check_log_prob(_from_nflows(net), x, result)),
    ]
    line = compare(Line("member against nflows", name, len(x)), contenders, settings.rounds, settings.threads)
    against(line, "times nflows")
    yield line


def _from_nflows(net: Any) -> Any:
    """The weights of a MixtureOfGaussiansMADE with one plain block, which has no activation in front of that block."""
    maps = (net.initial_layer, net.blocks[0].linear, net.final_layer)
    weights = [((m.weight * m.mask).detach().numpy(), m.bias.detach().numpy()) for m in maps]
    initial, inner = (Dense(w, b, m.degrees.numpy()) for (w, b), m in zip(weights[:2], maps, strict=False))
    # nflows: (variable, component, one of logit, mean and scale); fastmaf: (variable, logit or mean or scale, component)
    rows = np.arange(len(weights[2][1])).reshape(net.features, -1, 3).transpose(0, 2, 1).ravel()
    conditioner = Conditioner(initial, (Block("linear", (inner,)),), Dense(*(a[rows] for a in weights[2])))
    ranks, count = np.arange(1, net.features + 1), net.num_mixture_components
    base = Terminal(ranks, conditioner, "mixture", count, constants={"eps": net.epsilon}, law="softplus")
    return fastmaf.Flow([], base)
