"""The operations of fastmaf alone, to watch a change: ``pytest benchmarks --benchmark-save=NAME``, then ``--benchmark-compare``.

They are timed for flows of random weights. What is timed is checked first: a fast wrong result is no result.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import fastmaf

from .cases import MODELS, Array, normal

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")

ROWS = {"S": 10_000, "M": 2_000}
"""So that a call takes milliseconds on one core."""


@pytest.fixture(params=ROWS)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def flow(model: str) -> fastmaf.Flow:
    size = MODELS[model]
    return fastmaf.MAF(size.features, transforms=size.transforms, hidden_features=size.hidden, seed=0)


@pytest.fixture
def x(model: str) -> Array:
    return normal(ROWS[model], MODELS[model].features)


@pytest.fixture(autouse=True)
def group(request: pytest.FixtureRequest, benchmark: Any) -> Iterator[None]:
    """One table for each flow, and what a figure was measured with beside it."""
    benchmark.group = request.node.callspec.params["model"]
    benchmark.extra_info["config"] = {name: fastmaf.show_config().values.get(name) for name in ("fastmaf", "backend", "isa", "threads")}
    yield


def same(ours: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """To rounding."""
    np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance)


def test_log_prob(benchmark: Any, flow: fastmaf.Flow, x: Array) -> None:
    result = benchmark(flow.log_prob, x)
    same(result[:100], flow.astype("float64").log_prob(x[:100]))


def test_log_prob_of_one_row(benchmark: Any, flow: fastmaf.Flow, x: Array) -> None:
    result = benchmark.pedantic(flow.log_prob, (x[:1],), rounds=50, iterations=200, warmup_rounds=2)
    same(result, flow.astype("float64").log_prob(x[:1]))


def test_sample(benchmark: Any, flow: fastmaf.Flow, x: Array) -> None:
    result = benchmark(flow.sample, len(x), seed=1)
    same(result[:100], flow.astype("float64").sample(100, seed=1), 1e-3)


def test_to_noise(benchmark: Any, flow: fastmaf.Flow, x: Array) -> None:
    result = benchmark(flow.to_noise, x)
    same(flow.from_noise(result)[:100], x[:100], 1e-3)


def test_log_prob_and_grad(benchmark: Any, flow: fastmaf.Flow, x: Array) -> None:
    value, gradient, _ = benchmark(flow.log_prob_and_grad, x)
    same(value, flow.log_prob(x))
    same(gradient[:100], flow.astype("float64").log_prob_and_grad(x[:100])[1], 1e-3)


def test_fit_one_epoch(benchmark: Any, flow: fastmaf.Flow, x: Array) -> None:
    """With what a fit does before and behind it."""
    settings: dict[str, Any] = {"validation": 0, "max_epochs": 1, "batch_size": 250, "seed": 0, "progress": False}

    def anew() -> tuple[tuple[Any, ...], dict[str, Any]]:
        flow.reset(seed=0)
        return (x,), settings

    fit: Callable[..., Any] = flow.fit
    benchmark.pedantic(fit, setup=anew, rounds=10, warmup_rounds=1)
    fitted = flow.log_prob(x).mean()
    flow.reset(seed=0)
    assert fitted > flow.log_prob(x).mean()


def test_save(benchmark: Any, flow: fastmaf.Flow) -> None:
    def save() -> bytes:
        file = io.BytesIO()
        flow.save(file)
        return file.getvalue()

    assert fastmaf.load(benchmark(save)).features == flow.features


def test_load(benchmark: Any, flow: fastmaf.Flow, x: Array) -> None:
    file = io.BytesIO()
    flow.save(file)
    loaded = benchmark(fastmaf.load, file.getvalue())
    np.testing.assert_array_equal(loaded.log_prob(x[:10]), flow.log_prob(x[:10]))
