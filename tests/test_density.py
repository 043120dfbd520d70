"""Fitted flows: the density integrates to 1, and samples follow it."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import tolerances

import fastmaf
from fastmaf import backends

stats = pytest.importorskip("scipy.stats")
pytestmark = pytest.mark.skipif(backends.reason("cpu") is not None, reason="the compiled core is absent")


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setattr(backends, "active", None)
    fastmaf.set_backend("cpu")


def data(features, n, seed=0):
    """Two columns: a bent Gaussian cut by a bound; six: bent likewise, and mixed by a matrix."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, features))
    if features == 2:
        return np.stack([np.exp(0.5 * z[:, 0]), z[:, 1] + z[:, 0] ** 2], axis=1)
    matrix = np.random.default_rng(1).normal(size=(6, 6)) / 2 + np.eye(6)
    z[:, 1] += z[:, 0] ** 2
    return z @ matrix


@functools.cache
def fitted(features):
    bounds = [(0, None), None] if features == 2 else None
    flow = fastmaf.MAF(features, transforms=3, hidden_features=(32, 32), activation="tanh", bounds=bounds, seed=0)
    flow.fit(data(features, 6000), batch_size=200, lr=3e-3, schedule="cosine", max_epochs=16, patience=16, seed=0)
    return flow


def test_two_columns_integrate_to_one():
    flow, cells = fitted(2), 600
    # Over log x_0, which has no bound.
    s, y = (np.linspace(low, high, cells + 1) for low, high in ((-6, 6), (-12, 30)))
    area = (s[1] - s[0]) * (y[1] - y[0])
    s, y = 0.5 * (s[1:] + s[:-1]), 0.5 * (y[1:] + y[:-1])
    grid = np.stack(np.meshgrid(np.exp(s), y, indexing="ij"), axis=-1).reshape(-1, 2)
    p = np.exp(flow.log_prob(grid).astype(np.float64)).reshape(cells, cells) * np.exp(s)[:, None] * area
    assert abs(p.sum() - 1) < tolerances.INTEGRAL
    # The samples fall where the density says: its marginals, and the cells of a coarse grid.
    n = 20_000
    x = flow.sample(n, seed=1).astype(np.float64)
    for column, centres, marginal in ((np.log(x[:, 0]), s, p.sum(axis=1)), (x[:, 1], y, p.sum(axis=0))):
        step = centres[1] - centres[0]
        edges, distribution = np.append(centres - 0.5 * step, centres[-1] + 0.5 * step), np.append(0, np.cumsum(marginal))
        assert stats.kstest(column, lambda v, e=edges, d=distribution: np.interp(v, e, d)).pvalue > tolerances.P_VALUE
    expected = n * p.reshape(20, 30, 20, 30).sum(axis=(1, 3))
    i, j = ((np.log(x[:, 0]) + 6) / 0.6).astype(int), ((x[:, 1] + 12) / 2.1).astype(int)
    found = np.zeros((20, 20))
    np.add.at(found, (i, j), 1)
    full = expected > 10
    chi_squared = ((found - expected)[full] ** 2 / expected[full]).sum()
    assert stats.chi2.sf(chi_squared, full.sum() - 1) > tolerances.P_VALUE


def test_six_columns_integrate_to_one():
    """By importance sampling from a wide Student distribution."""
    flow, x = fitted(6), data(6, 6000)
    proposal = stats.multivariate_t(x.mean(axis=0), 1.2 * np.cov(x.T), df=8, seed=3)
    points = proposal.rvs(100_000)
    weights = np.exp(flow.log_prob(points) - proposal.logpdf(points))
    error = weights.std() / math.sqrt(weights.size)
    assert error < tolerances.INTEGRAL
    assert abs(weights.mean() - 1) < stats.norm.isf(tolerances.P_VALUE) * error + tolerances.INTEGRAL / 5
    # Moments and log-densities of the samples are those of the density.
    drawn, density = flow.sample_and_log_prob(20_000, seed=1)
    drawn = drawn.astype(np.float64)
    quantities = [(points, drawn), (points**2, drawn**2), (np.abs(points[:, :1] * points[:, 1:]), np.abs(drawn[:, :1] * drawn[:, 1:]))]
    quantities.append((flow.log_prob(points)[:, None], density[:, None].astype(np.float64)))
    for of_points, of_samples in quantities:
        weighted = weights[:, None] * of_points
        errors = np.hypot(weighted.std(axis=0) / math.sqrt(len(points)), of_samples.std(axis=0) / math.sqrt(len(drawn)))
        pulls = (weighted.mean(axis=0) - of_samples.mean(axis=0)) / errors
        assert (np.abs(pulls) < stats.norm.isf(tolerances.P_VALUE / pulls.size)).all()


@pytest.mark.parametrize("features", [2, 6])
def test_noise_of_samples_is_normal(features):
    """Two ways around: the noise of the samples, and of their densities."""
    flow = fitted(features)
    z = flow.to_noise(flow.sample(20_000, seed=5)).astype(np.float64)
    for column in z.T:
        assert stats.kstest(column, "norm").pvalue > tolerances.P_VALUE
    assert stats.kstest((z**2).sum(axis=1), "chi2", (features,)).pvalue > tolerances.P_VALUE


@pytest.mark.parametrize("features", [2, 6])
def test_samples_are_like_the_data(features):
    """To the fit's own accuracy: columns, and distances from the mean, of data that it has not seen."""
    flow, x = fitted(features), data(features, 3000, seed=9)
    drawn = flow.sample(3000, seed=2).astype(np.float64)
    directions = np.concatenate([np.eye(features), np.random.default_rng(0).normal(size=(4, features))])
    for direction in directions:
        assert stats.ks_2samp(x @ direction, drawn @ direction).statistic < tolerances.FIT
    gaussian = stats.multivariate_normal(x.mean(axis=0), np.cov(x.T)).logpdf(x).mean()
    assert flow.log_prob(x).mean() > gaussian + tolerances.FIT
