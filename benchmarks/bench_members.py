"""The models beyond the plain MAF: density, sampling and training of each, and what torch and nflows need for the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import fastmaf
from fastmaf import _cpu

from .cases import Array, normal, unmasked_weights
from .report import Settings
from .timing import Contender, Line, WrongResult, against, compare

WIDE, DEEP = (500,), (512, 512)

# name -> model, rows of log_prob and sample
MEMBERS: dict[str, tuple[Callable[[], Any], int]] = {
    "Bernoulli MADE (784, 500x1)": (lambda: fastmaf.MADE(784, "bernoulli", hidden_features=WIDE), 10_000),
    "Bernoulli MADE (63, 512x2)": (lambda: fastmaf.MADE(63, "bernoulli", hidden_features=DEEP), 10_000),
    "mixture MADE (63, 512x2, 10)": (lambda: fastmaf.MADE(63, "mixture", hidden_features=DEEP), 10_000),
    "mixture MADE (784, 1024x1, 10)": (lambda: fastmaf.MADE(784, "mixture", hidden_features=(1024,)), 2_000),
    "categorical MADE (63, 512x2, 8)": (lambda: fastmaf.MADE(63, "categorical", categories=8, hidden_features=DEEP), 10_000),
    "MAF with batch norm (63, 512x2, 5)": (lambda: fastmaf.MAF(63, hidden_features=DEEP, batch_norm=True), 10_000),
    "MAF MoG (63, 512x2, 5, 10)": (lambda: fastmaf.MAF(63, hidden_features=DEEP, components=10), 10_000),
    "MAF with direct weights (63, 512x2, 5)": (lambda: fastmaf.MAF(63, hidden_features=DEEP, direct=True), 10_000),
    "residual + LU (63, 256, 10)": (lambda: fastmaf.presets.resmade_lu(63)[0], 10_000),
}
STEPS = 4


def run(settings: Settings) -> Iterator[Line]:
    """Three lines per model, then those with peers."""
    for name, (build, rows) in MEMBERS.items():
        flow, rows = build(), 200 if settings.quick else rows
        x, work = flow.sample(rows, seed=1), 2.0 * unmasked_weights(flow)
        density = Contender("log_prob", lambda f=flow, x=x: f.log_prob(x), _against_float64(flow, x))
        drawn = Contender("sample", lambda f=flow, n=rows: f.sample(n, seed=2), _finite)
        both = Contender("sample_and_log_prob", lambda f=flow, n=rows: f.sample_and_log_prob(n, seed=2)[0], _finite)
        line = compare(Line("member", name, rows), [density, drawn, both], settings.rounds, settings.threads, rows * work)
        for what in ("sample", "sample_and_log_prob"):
            if "ratio" in line.contenders.get(what, {}):
                line.values[f"{what} / log_prob"] = line.contenders[what]["ratio"]["median"]
        yield line
        for batch in (100,) if settings.quick else (100, 1000):
            training = Contender(
                "fastmaf", _steps(flow, x[: min(rows, STEPS * batch)], batch), _finite_loss, steps=min(STEPS, rows // batch)
            )
            line = Line("member train", name, batch)
            yield compare(line, [training], settings.rounds, settings.threads, 3 * batch * work * training.steps)
    yield from _ancestral(settings)
    yield from _mixture(settings)


def _steps(flow: Any, x: Array, batch: int) -> Callable[[], Any]:
    engine, order = _cpu.backend.trainer(flow), np.arange(len(x))
    rates = np.full(len(x) // batch, 1e-5)
    return lambda: engine.epoch(x, None, None, order, batch, rates, 1.0)


def _against_float64(flow: Any, x: Array) -> Callable[[Any], float]:
    exact = flow.astype("float64").log_prob(x[:200])

    def check(result: Any) -> float:
        error = np.abs(result[:200] - exact)
        if not (error <= 1e-3 + 1e-5 * np.abs(exact)).all():
            raise WrongResult(f"log_prob is off by {error.max():.3g} nats")
        return float(error.max())

    return check


def _finite(result: Any) -> float:
    if not np.isfinite(result).all():
        raise WrongResult("not all values are finite")
    return 0.0


def _finite_loss(result: Any) -> float:
    return _finite(result[0])


def _ancestral(settings: Settings) -> Iterator[Line]:
    """Sampling of a Bernoulli MADE against D passes through the same network in torch."""
    import torch

    flow = fastmaf.MADE(784, "bernoulli", hidden_features=WIDE)
    net, rows = flow.base.conditioner, 20 if settings.quick else 1000
    maps = [[torch.from_numpy(np.array(a)) for a in (dense.weight, dense.bias)] for dense in (net.initial, net.final)]

    def logits(x: Any) -> Any:
        return torch.relu(x @ maps[0][0].T + maps[0][1]) @ maps[1][0].T + maps[1][1]

    def loop() -> Any:
        with torch.no_grad():
            x = torch.zeros(rows, flow.features)
            for j in range(flow.features):
                x[:, j] = torch.bernoulli(torch.sigmoid(logits(x)[:, j]))
            return x.numpy()

    def check(result: Any) -> float:
        """The same distribution: means of the first variables, and the logits of fastmaf on these rows."""
        x = torch.from_numpy(np.array(result))
        with torch.no_grad():
            theirs = torch.distributions.Bernoulli(logits=logits(x)).log_prob(x).sum(1).numpy()
        error = float(np.abs(theirs - flow.log_prob(result)).max())
        if error > 1e-2:
            raise WrongResult(f"log_prob is off by {error:.3g} nats")
        return error

    contenders = [
        Contender("fastmaf", lambda: flow.sample(rows, seed=1), check),
        Contender("torch, one pass per variable", loop, check, once=True),
    ]
    line = compare(Line("member sample", "Bernoulli MADE (784, 500x1)", rows), contenders, settings.rounds, settings.threads)
    against(line, "times the loop")
    yield line


def _mixture(settings: Settings) -> Iterator[Line]:
    """A mixture MADE against that of nflows: density, and a step of training."""
    try:
        import torch
        from nflows.nn.nde.made import MixtureOfGaussiansMADE
    except ImportError:
        return
    name, flow = "mixture MADE (63, 512x2, 10)", fastmaf.MADE(63, "mixture", hidden_features=DEEP)
    theirs = MixtureOfGaussiansMADE(63, 512, num_blocks=1, num_mixture_components=10, use_residual_blocks=False)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-5)
    for batch in (100,) if settings.quick else (100, 1000):
        x = normal(STEPS * batch, 63)
        batches = [torch.from_numpy(part) for part in np.split(x, STEPS)]

        def steps(batches: list[Any] = batches) -> Any:
            loss = 0.0
            for rows in batches:
                optimizer.zero_grad()
                value = -theirs.log_prob(rows).mean()
                value.backward()
                optimizer.step()
                loss += float(value.detach())
            return (loss,)

        contenders = [
            Contender("fastmaf", _steps(flow, x, batch), _finite_loss, steps=STEPS),
            Contender("nflows", steps, _finite_loss, steps=STEPS),
        ]
        line = compare(
            Line("member train against nflows", "mixture MADE (63, 512x2, 10)", batch), contenders, settings.rounds, settings.threads
        )
        against(line, "times nflows")
        yield line

    x = normal(200 if settings.quick else 10_000, 63)
    rows = torch.from_numpy(x)

    def evaluate() -> Any:
        with torch.no_grad():
            return theirs.log_prob(rows).numpy()

    contenders = [Contender("fastmaf", lambda: flow.log_prob(x), _finite), Contender("nflows", evaluate, _finite)]
    line = compare(Line("member against nflows", name, len(x)), contenders, settings.rounds, settings.threads)
    against(line, "times nflows")
    yield line
