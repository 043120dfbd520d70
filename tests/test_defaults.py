"""The flow of the README's first example, by default settings: its samples look like the data."""

from __future__ import annotations

import numpy as np
import pytest

import fastmaf
from fastmaf.data import galaxies


@pytest.fixture(scope="module")
def example():
    if fastmaf.get_backend() != "cpu":
        pytest.skip("the fit takes minutes without the compiled core")
    x, names = galaxies()
    flow = fastmaf.MAF(features=7, transforms=5, hidden_features=(100, 100), names=names, seed=0)
    flow.fit(x, max_epochs=20, seed=0, progress=False)
    return flow, x


def test_samples_stay_near_the_data(example):
    flow, x = example
    draws, span = flow.sample(300_000, seed=1), np.ptp(x, axis=0)
    assert np.all((draws > x.min(axis=0) - span) & (draws < x.max(axis=0) + span))


def test_samples_spread_as_the_data_do(example):
    flow, x = example
    ratio = flow.sample(300_000, seed=1).std(axis=0, dtype=float) / x.std(axis=0, dtype=float)
    assert np.all((ratio > 0.9) & (ratio < 1.1))


def test_rows_beside_the_data_are_not_beyond_all_measure(example):
    """With log(1000) in each transform the lowest of these rows scores -1e13."""
    flow, x = example
    far = x[:5000] + np.random.default_rng(0).choice([-1, 1], (5000, 7)) * x.std(axis=0)
    assert flow.log_prob(x).min() > -1e4
    assert flow.log_prob(far).min() > -1e8
