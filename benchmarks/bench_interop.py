"""Trained flows of zuko and sbi beside what fastmaf makes of them, and the training loop of sbi beside `fastmaf.torch.sbi_fit`."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import fastmaf

from .report import Settings
from .timing import Contender, Line, WrongResult, against, compare

PARAMETERS = (5, 10)
DRAWS, OBSERVATIONS, EACH = 10_000, 1_000, 100
SIMULATIONS, BATCH, EPOCHS = 10_000, 200, 3


def run(settings: Settings) -> Iterator[Line]:
    """A zuko MAF M, then estimators of sbi."""
    try:
        import sbi  # noqa: F401
        import torch
        import zuko  # noqa: F401
    except ImportError as problem:
        line = Line("interop", "zuko, sbi", 0)
        line.skipped["all"] = str(problem)
        yield line
        return
    torch.manual_seed(0)
    yield from _zuko(settings)
    for number in PARAMETERS:
        for model in ("maf", "zuko_maf"):
            yield from _sbi(settings, model, number)


def _zuko(settings: Settings) -> Iterator[Line]:
    import torch
    import zuko

    theirs = zuko.flows.MAF(43, 0, transforms=5, hidden_features=(512, 512))
    ours = fastmaf.from_zuko(theirs)

    def original(rows: int) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad():
                return theirs().sample((rows,))

        return call

    for rows in (100,) if settings.quick else (1_000, 100_000):
        contenders = [
            Contender("fastmaf", lambda rows=rows: ours.sample(rows, seed=1), _moments),
            Contender("zuko", original(rows), _moments, once=rows > 1_000),
        ]
        line = compare(Line("sample of a zuko flow", "M", rows), contenders, settings.rounds, settings.threads)
        against(line, "times the original")
        yield line
    yield _gradients_of_samples(settings, theirs, ours)


def _gradients_of_samples(settings: Settings, theirs: Any, ours: fastmaf.Flow) -> Line:
    """`rsample` and the gradient of a mean over it in all weights."""
    import torch

    import fastmaf.torch

    module, rows = fastmaf.torch.Flow(ours), 100 if settings.quick else 1_000

    def trained(flow: Any) -> Callable[[], Any]:
        def call() -> Any:
            flow.zero_grad()
            flow().rsample((rows,)).square().mean().backward()
            return torch.cat([own.grad.reshape(-1) for own in flow.parameters()])

        return call

    contenders = [Contender("fastmaf", trained(module), _moments), Contender("zuko", trained(theirs), _moments)]
    line = compare(Line("gradients of samples of a zuko flow", "M", rows), contenders, settings.rounds, settings.threads)
    against(line, "times the original")
    return line


def _sbi(settings: Settings, model: str, number: int) -> Iterator[Line]:
    import torch
    from sbi.inference import NPE
    from sbi.utils import BoxUniform

    warnings.simplefilter("ignore")
    prior = BoxUniform(-3 * torch.ones(number), 3 * torch.ones(number))
    theta = prior.sample((2_000 if settings.quick else SIMULATIONS,))
    x = theta + 0.3 * torch.randn_like(theta)
    trainer = NPE(prior, density_estimator=model, show_progress_bars=False).append_simulations(theta, x)
    with contextlib.redirect_stdout(io.StringIO()):
        estimator = trainer.train(max_num_epochs=20)
    posterior, flow = trainer.build_posterior(estimator), fastmaf.from_sbi(estimator)
    one, box = torch.zeros(1, number), [(-3, 3)] * number
    many = x[theta.abs().max(dim=1).values < 2.5][: 20 if settings.quick else OBSERVATIONS]  # whose posteriors lie within the prior
    name = f"{model}, {number} parameters"
    quiet = {"show_progress_bars": False}

    def moments(of: Any) -> Callable[[Any], float]:
        def check(result: Any) -> float:
            rows = np.asarray(result).reshape(-1, number)
            off = np.abs(rows.mean(axis=0) - of.mean(axis=0)).max()
            if not off < 0.1:
                raise WrongResult(f"means are off by {off:.3g}")
            return float(off)

        return check

    own = posterior.sample((DRAWS,), x=one, **quiet).numpy()
    contenders = [
        Contender("fastmaf", lambda: flow.sample(DRAWS, one[0], within=box, seed=1), moments(own)),
        Contender("sbi", lambda: posterior.sample((DRAWS,), x=one, **quiet), moments(own)),
    ]
    line = compare(Line("posterior of one observation", name, DRAWS), contenders, settings.rounds, settings.threads)
    against(line, "times the original")
    yield line

    whole = np.asarray(flow.sample(EACH, many, within=box, seed=2)).reshape(-1, number)
    contenders = [
        Contender("fastmaf", lambda: flow.sample(EACH, many, within=box, seed=1), moments(whole)),
        Contender("sbi", lambda: posterior.sample_batched((EACH,), x=many, **quiet), moments(whole)),
    ]
    line = compare(Line("posterior of many observations", name, len(many) * EACH), contenders, settings.rounds, settings.threads)
    against(line, "times the original")
    yield line

    rows, contexts = theta.numpy(), x.numpy()

    def density() -> Any:
        with torch.no_grad():
            return estimator.log_prob(theta, condition=x)

    exact = flow.astype("float64").log_prob(rows, contexts)

    def error(result: Any) -> float:
        worst = float(np.abs(np.asarray(result).reshape(-1) - exact).max())
        if not worst < 1e-2:
            raise WrongResult(f"log_prob is off by {worst:.3g}")
        return worst

    contenders = [Contender("fastmaf", lambda: flow.log_prob(rows, contexts), error), Contender("sbi", density, error)]
    line = compare(Line("log_prob of an estimator", name, len(rows)), contenders, settings.rounds, settings.threads)
    against(line, "times the original")
    yield line
    yield _epochs(settings, model, number, prior, theta, x)


def _epochs(settings: Settings, model: str, number: int, prior: Any, theta: Any, x: Any) -> Line:
    """Seconds per epoch: of sbi on its own estimator, of sbi on ours, and of `sbi_fit`."""
    from sbi.inference import NPE

    import fastmaf.torch

    def made(estimator: Any) -> Any:
        return NPE(prior, density_estimator=estimator, show_progress_bars=False).append_simulations(theta, x)

    def looped(estimator: Any) -> Callable[[], Any]:
        def call() -> Any:
            with contextlib.redirect_stdout(io.StringIO()):
                trainer = made(estimator)
                trainer.train(training_batch_size=BATCH, max_num_epochs=EPOCHS - 1)  # sbi makes one epoch more
            return trainer.summary["epochs_trained"][-1]

        return call

    def fitted() -> Any:
        trainer = made(fastmaf.torch.sbi_maf())
        fastmaf.torch.sbi_fit(trainer, batch_size=BATCH, max_epochs=EPOCHS)
        return trainer.summary["epochs_trained"][-1]

    def check(epochs: int) -> float:
        if epochs != EPOCHS:
            raise WrongResult(f"{epochs} epochs instead of {EPOCHS}")
        return 0.0

    contenders = [
        Contender("sbi_fit", fitted, check, steps=EPOCHS),
        Contender("sbi on sbi_maf", looped(fastmaf.torch.sbi_maf()), check, steps=EPOCHS),
        Contender("sbi", looped(model), check, steps=EPOCHS),
    ]
    line = compare(Line("epoch of sbi", f"{model}, {number} parameters", len(theta)), contenders, settings.rounds, settings.threads)
    against(line, "times the original", {"sbi"})
    against(line, "times sbi on sbi_maf", {"sbi on sbi_maf"})
    return line


def _moments(result: Any) -> float:
    rows = np.asarray(result)
    if not np.isfinite(rows).all():
        raise WrongResult("samples are not finite")
    return 0.0
