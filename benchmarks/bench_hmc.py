"""The Hamiltonian Monte Carlo of ``examples/hmc`` beside the same sampler of blackjax, on the same fitted flow: gradients per second.

Both move 64 chains together on one thread, with the covariance of samples of the flow as the metric and ten leapfrog steps of about 0.15.
The density of the flow in JAX is written below, jitted, and compared with the flow's own before anything is timed. blackjax runs on that of
`fastmaf.jax` too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .cases import MODELS
from .peers import Unavailable
from .report import Settings
from .timing import Line, WrongResult, summary

CHAINS, STEPS, STEP = 64, 10, 0.15


def fitted(quick: bool) -> Any:
    """Model S on correlated Gaussian rows, the first column of which bends the second."""
    import fastmaf

    model, rng = MODELS["S"], np.random.default_rng(0)
    x = rng.normal(size=(20_000, model.features)) @ (np.eye(model.features) + 0.3 * rng.normal(size=(model.features, model.features)))
    x[:, 1] += 0.3 * x[:, 0] ** 2
    flow = fastmaf.MAF(model.features, transforms=model.transforms, hidden_features=model.hidden, seed=0)
    flow.fit(x, max_epochs=1 if quick else 10, seed=0, progress=False)
    return flow


def example(flow: Any, folder: Path) -> Callable[[], float]:
    """Build ``examples/hmc`` against the installed library; a call runs it and returns what it prints, gradients per second."""
    import fastmaf

    home = Path(os.environ.get("FASTMAF_LIBRARY_PREFIX", Path(fastmaf.__file__).parent))
    if shutil.which("cmake") is None or not (home / "include" / "fastmaf.h").exists():
        raise Unavailable("needs cmake, and fastmaf installed or FASTMAF_LIBRARY_PREFIX")
    source, build = Path(__file__).parents[1] / "examples" / "hmc", folder / "build"
    subprocess.run(["cmake", "-S", source, "-B", build, f"-DCMAKE_PREFIX_PATH={home}"], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", build], check=True, capture_output=True)
    flow.save(folder / "flow.safetensors")

    def call() -> float:
        run = subprocess.run([build / "hmc", folder / "flow.safetensors"], capture_output=True, text=True, check=False)
        if run.returncode or "moments agree" not in run.stdout:
            raise WrongResult(f"the example says: {(run.stderr or run.stdout)[-150:]}")
        return float(re.search(r"([\d.e+]+) gradients/s", run.stdout)[1])  # type: ignore[index]

    return call


def density(flow: Any) -> Callable[[Any], Any]:
    """The log-density of one row in JAX; of flows with the layers of `fitted` alone."""
    import jax.numpy as jnp

    affine, *mades = flow.layers
    loc, scale = jnp.asarray(affine.loc, jnp.float32), jnp.asarray(affine.scale, jnp.float32)

    def log_prob(x: Any) -> Any:
        z, total = (x - loc) * scale, jnp.log(jnp.abs(scale)).sum() - 0.5 * flow.features * np.log(2 * np.pi)
        for made in mades:
            net = made.conditioner
            h = jnp.clip(z, -net.input_clip, net.input_clip)
            for dense in net.hidden:
                h = jnp.maximum(jnp.asarray(dense.weight) @ h + dense.bias, 0)
            parameters = jnp.asarray(net.final.weight) @ h + net.final.bias
            raw = parameters[1::2]
            a = raw / (1 + jnp.abs(raw) / made.law.constants["clip"])
            z, total = (z - parameters[0::2]) * jnp.exp(-a), total - a.sum()
        return total - 0.5 * (z**2).sum()

    return log_prob


def peer(flow: Any, draws: int, written: bool) -> Callable[[], float]:
    """The sampler of blackjax, on the density written here or on that of fastmaf.jax; a call returns gradients per second."""
    try:
        import blackjax
        import jax
        import jax.numpy as jnp
    except ImportError as problem:
        raise Unavailable(str(problem)) from None
    if not written:
        import fastmaf.jax
    log_prob, samples = density(flow) if written else fastmaf.jax.Flow(flow).log_prob, flow.sample(20_000, seed=1)
    error = np.abs(np.asarray(jax.vmap(log_prob)(jnp.asarray(samples[:1000]))) - flow.log_prob(samples[:1000])).max()
    if not error < 1e-2:
        raise WrongResult(f"the density in JAX is off by {error:.3g} nats")
    sampler = blackjax.hmc(log_prob, STEP, jnp.asarray(np.cov(samples.T), jnp.float32), STEPS)
    start = jax.vmap(sampler.init)(jnp.asarray(samples[:CHAINS]))

    @jax.jit
    def run(key: Any, states: Any) -> Any:
        def step(states: Any, key: Any) -> Any:
            states, _ = jax.vmap(sampler.step)(jax.random.split(key, CHAINS), states)
            return states, states.position

        return jax.lax.scan(step, states, jax.random.split(key, draws))[1]

    rows = np.asarray(run(jax.random.key(0), start)).reshape(-1, flow.features)
    off = np.abs(np.median(rows, axis=0) - np.median(samples, axis=0)) / samples.std(axis=0)
    if not (off < 0.2).all():
        raise WrongResult(f"medians of the chains are {off.max():.2f} standard deviations off")

    def call() -> float:
        began = time.perf_counter()
        run(jax.random.key(1), start).block_until_ready()
        return CHAINS * STEPS * draws / (time.perf_counter() - began)

    return call


def run(settings: Settings) -> Iterator[Line]:
    """One line; ratios are of runs in turn."""
    line, flow = Line("hmc", "S", CHAINS), fitted(settings.quick)
    with tempfile.TemporaryDirectory() as folder:
        contenders: dict[str, Callable[[], float]] = {}
        draws = 20 if settings.quick else 300
        makers = {
            "fastmaf": lambda: example(flow, Path(folder)),
            "blackjax": lambda: peer(flow, draws, True),
            "blackjax on fastmaf.jax": lambda: peer(flow, draws, False),
        }
        for name, make in makers.items():
            try:
                contenders[name] = make()
            except (Unavailable, WrongResult, subprocess.CalledProcessError) as problem:
                line.skipped[name] = str(problem)[:200]
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(settings.rounds):
            for name, call in contenders.items():
                rates[name].append(call())
    for name, values in rates.items():
        line.contenders[name] = {"seconds": summary([1 / value for value in values])}
        line.values[f"gradients/s of {name}"] = float(np.median(values))
    for name in rates.keys() - {"blackjax"} if "blackjax" in rates else ():
        line.values[f"{name} times blackjax"] = float(np.median(np.divide(rates[name], rates["blackjax"])))
    if {"fastmaf", "blackjax"} <= rates.keys():
        line.contenders["blackjax"]["ratio"] = summary(list(np.divide(rates["fastmaf"], rates["blackjax"])))
    yield line
