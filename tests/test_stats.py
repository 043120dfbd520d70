"""What a density is for: against what is known of Gaussians, by fixed seeds."""

from __future__ import annotations

import math
import pathlib
import warnings

import make
import numpy as np
import pytest
from scipy import special, stats

import fastmaf
from fastmaf import FitWarning
from fastmaf.layers import Affine, Autoregressive, Conditioner, Dense, Law
from fastmaf.stats import (
    Estimate,
    StatsWarning,
    calibration,
    context_distance,
    entropy,
    hdr_level,
    importance,
    kl,
    marginal,
    p_value,
    product,
)

CONSTANT = 0.5 * math.log(2 * math.pi)


def gaussian(loc, sd, dtype="float64", **options):
    """N(loc, sd^2) of independent columns."""
    return fastmaf.Flow([Affine(np.atleast_1d(loc), 1 / np.atleast_1d(sd))], dtype=dtype, **options)


def following(features, sd=1.0, dtype="float64"):
    """N(context, sd^2) in each column."""
    weight = np.zeros((2 * features, features))
    weight[::2] = np.eye(features)
    bias = np.tile([0.0, math.log(sd)], features)
    net = Conditioner(None, (), Dense(np.zeros((2 * features, features)), bias, None, context="added", context_weight=weight), "relu")
    layer = Autoregressive(np.arange(1, features + 1), net, law=Law("exp"))
    return fastmaf.Flow([layer], context_features=features, dtype=dtype)


def near(estimate, truth, error=np.inf, times=4):
    """Within four standard errors, which are not zero and not large."""
    assert isinstance(estimate, Estimate)
    value, spread = map(np.asarray, estimate)
    assert value.shape == spread.shape == np.shape(truth)
    assert (spread > 0).all() and (spread < error).all()
    assert (abs(value - truth) < times * spread).all(), (value, spread, truth)


# Credible regions and outliers


@pytest.mark.parametrize("features", [1, 5])
def test_the_level_of_a_region_is_that_of_chi_square(features, dtype):
    masses = np.array([0.05, 0.5, 0.9, 0.99])
    flow = gaussian([3.0] * features, [0.1] * features, dtype)
    truth = -features * (CONSTANT + math.log(0.1)) - 0.5 * stats.chi2(features).ppf(masses)
    near(hdr_level(flow, masses, n=20_000, seed=1), truth, 0.1)
    near(hdr_level(flow, 0.5, n=20_000, seed=1), truth[1], 0.02)
    assert type(hdr_level(flow, 0.5, n=100, seed=1).value) is float


def test_the_error_of_a_level_is_that_of_repetitions():
    flow = gaussian([0.0] * 3, [1.0] * 3)
    found = [hdr_level(flow, 0.9, n=1000, seed=seed) for seed in range(100)]
    spread = np.std([level.value for level in found]) / np.mean([level.error for level in found])
    assert 0.8 < spread < 1.2


def test_a_level_holds_at_least_its_mass_where_densities_are_alike():
    flow = fastmaf.Flow([], features=1, dtype="float64")
    for mass in (0.1, 0.25, 0.3, 0.99):
        held = np.mean(flow.sample_and_log_prob(1000, seed=3)[1] >= hdr_level(flow, mass, n=1000, seed=3).value)
        assert mass <= held <= mass + 0.0011


def test_levels_under_contexts():
    flow, context = following(2, 0.5), np.array([[0.0, 0.0], [9.0, -9.0], [1.0, 1.0]])
    truth = -2 * (CONSTANT + math.log(0.5)) - 0.5 * stats.chi2(2).ppf([0.5, 0.9])
    near(hdr_level(flow, [0.5, 0.9], context, seed=1), np.broadcast_to(truth, (3, 2)), 0.1)
    near(hdr_level(flow, 0.9, context, seed=1), np.full(3, truth[1]), 0.1)
    near(hdr_level(flow, 0.9, context[0], seed=1), truth[1], 0.1)


def test_p_values_are_the_tail_of_chi_square(dtype):
    flow, n = gaussian([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], dtype), 20_000
    x = [1.0, 2.0, 3.0] + np.array([[0, 0, 0], [1, 0, 0], [2, 1, 1], [9, 0, 0]]) * [1.0, 2.0, 3.0]
    truth = stats.chi2(3).sf([0, 1, 6, 81])
    found = p_value(flow, x, n=n, seed=1)
    assert found.dtype == np.float64 and found[3] == 1 / (n + 1)
    assert np.allclose(found, truth, atol=4 * 0.5 / math.sqrt(n))
    assert np.isnan(p_value(flow, np.full((1, 3), np.nan), n=10)).all()


def test_p_values_of_rows_of_the_flow_are_uniform():
    flow = make.flow(3, context_features=2)
    context = np.random.default_rng(0).normal(size=(500, 2))
    x = flow.sample(1, context, seed=1)[:, 0]
    found = p_value(flow, x, context, n=200, seed=2)
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert stats.kstest(p_value(flow, 1.3 * x, context, n=200, seed=2), "uniform").pvalue < 0.01


def test_p_values_in_every_layout_of_contexts():
    flow = following(2)
    context, x = np.array([[0.0, 0.0], [5.0, 5.0], [-5.0, 0.0]]), np.array([[0.0, 0.0], [5.0, 6.0]])
    truth = stats.chi2(2).sf(((x - context[:, None]) ** 2).sum(axis=2))  # (3, 2)
    close = {"atol": 0.02}
    assert np.allclose(p_value(flow, x, context[:, None], seed=1), truth, **close)
    assert np.allclose(p_value(flow, np.broadcast_to(x, (3, 2, 2)), context, seed=1), truth, **close)
    assert np.allclose(p_value(flow, x, np.broadcast_to(context[:, None], (3, 2, 2)), seed=1), truth, **close)
    assert np.allclose(p_value(flow, x, context[:2], seed=1), truth[[0, 1], [0, 1]], **close)
    assert np.allclose(p_value(flow, x, context[1], seed=1), truth[1], **close)
    assert p_value(flow, x[:0], context[0], n=10).shape == (0,)


def test_the_rows_of_a_context_share_its_samples(monkeypatch):
    most = noted(monkeypatch)
    for x, context in ((np.zeros((9, 2)), np.zeros((4, 1, 2))), (np.zeros((4, 9, 2)), np.zeros((4, 2))), (np.zeros((9, 2)), np.zeros(2))):
        p_value(following(2), x, context, n=30, seed=1)
    assert most == [4 * 30 * 2, 4 * 30 * 2, 30 * 2]


def noted(monkeypatch):
    """How many numbers are drawn, call by call, from here on."""
    most, draw = [], fastmaf.Flow.sample_and_log_prob

    def sample_and_log_prob(self, *arguments, **options):
        samples, log_prob = draw(self, *arguments, **options)
        most.append(samples.size)
        return samples, log_prob

    monkeypatch.setattr(fastmaf.Flow, "sample_and_log_prob", sample_and_log_prob)
    return most


# Entropy and divergence


def test_entropy_of_gaussians(dtype):
    near(entropy(gaussian([5.0] * 4, [2.0] * 4, dtype), seed=1), 4 * (CONSTANT + 0.5 + math.log(2)), 0.03)
    near(entropy(following(2, 3.0, dtype), np.zeros((3, 2)), seed=1), np.full(3, 2 * (CONSTANT + 0.5 + math.log(3))), 0.03)


def test_entropy_of_coins():
    flow = fastmaf.MADE(3, "bernoulli", hidden_features=(5,), masks=2, seed=0, dtype="float64")
    everything = np.array([[i >> k & 1 for k in range(3)] for i in range(8)])
    log_prob = flow.log_prob(everything)
    near(entropy(flow, seed=1), -(np.exp(log_prob) * log_prob).sum(), 0.02)


def test_divergence_of_gaussians(dtype):
    p, q = gaussian([1.0, 0.0], [1.0, 0.5], dtype), gaussian([0.0, 0.0], [1.0, 1.0])
    truth = 0.5 + (0.5 * (0.25 - 1) - math.log(0.5))
    near(kl(p, q, seed=1), truth, 0.05)
    near(kl(p, stats.multivariate_normal([0.0, 0.0]).logpdf, seed=1), truth, 0.05)
    assert kl(p, p, seed=1) == pytest.approx((0, 0), abs=1e-6)
    assert kl(p, lambda x: np.where(x[:, 0] > 0, 0.0, -np.inf), seed=1) == (np.inf, np.inf)


def test_divergence_under_contexts():
    p, context = following(2), np.array([[0.0, 0.0], [3.0, 0.0]])
    near(kl(p, gaussian([0.0, 0.0], [2.0, 2.0]), context, seed=1), 2 * math.log(2) - 0.75 + np.array([0, 9 / 8]), 0.1)
    near(kl(p, following(2, 2.0), context, seed=1), np.full(2, 2 * math.log(2) - 0.75), 0.1)
    near(kl(p, lambda x: -0.5 * (x**2).sum(axis=1) - 2 * CONSTANT, context[1], seed=1), 4.5, 0.1)


# Importance weights


def test_evidence_and_moments(dtype):
    flow = gaussian([0.0, 0.0], [1.5, 1.5], dtype)
    found = importance(flow, lambda x: 2.0 - 0.5 * ((x - 0.5) ** 2).sum(axis=1), n=20_000, seed=1)
    near(found.log_evidence, 2 + 2 * CONSTANT, 0.02)
    assert found.weights.sum() == pytest.approx(1) and found.samples.dtype == np.float64
    share = 2 / 1.5**2 - 1 / 1.5**4  # per column: n / ess is the integral of target^2 / proposal
    ess = 20_000 * share * math.exp(-(0.5**2) * 2 / (2 * 1.5**2 - 1))
    assert found.ess == pytest.approx(ess, rel=0.05) and found.pareto_k < 0.5
    assert np.allclose(found.weights @ found.samples, 0.5, atol=0.03)
    rows = found.resample(20_000, seed=2)
    assert np.allclose(rows.mean(axis=0), 0.5, atol=0.05) and np.allclose(rows.std(axis=0), 1, atol=0.05)


def test_the_error_of_the_evidence_is_that_of_repetitions():
    flow = gaussian([0.0], [1.3])
    found = [importance(flow, gaussian([0.2], [1.0]), n=1000, seed=seed).log_evidence for seed in range(100)]
    assert 0.8 < np.std([each.value for each in found]) / np.mean([each.error for each in found]) < 1.2


def test_a_flow_under_a_context_as_the_proposal():
    found = importance(following(2, 1.2), gaussian([3.0, 3.0], [1.0, 1.0]), [3.0, 3.0], seed=1)
    near(found.log_evidence, 0.0, 0.02)
    with pytest.raises(ValueError, match=r"context has 2 rows; the weights are under one context, \(2,\)"):
        importance(following(2), gaussian([3.0, 3.0], [1.0, 1.0]), np.zeros((2, 2)))


def test_poor_weights_are_said():
    narrow, wide = gaussian([0.0] * 4, [0.3] * 4), gaussian([0.0] * 4, [1.0] * 4)
    with pytest.warns(StatsWarning, match=r"the importance weights are poor: .* effective samples of 5000, Pareto k \d"):
        found = importance(narrow, wide, n=5000, seed=1)
    assert found.pareto_k > 0.7 and found.ess < 500
    with pytest.warns(StatsWarning, match="poor"):  # by the tail alone: the weights have a mean and no variance
        found = importance(gaussian([0.0], [0.45]), gaussian([0.0], [1.0]), n=20_000, seed=1)
    assert found.pareto_k > 0.7 and found.ess > 100
    with pytest.warns(StatsWarning, match="poor"):  # by their number alone
        found = importance(gaussian([0.0], [1.0]), lambda x: np.where(abs(x[:, 0]) < 0.05, 0.0, -np.inf), n=2000, seed=1)
    assert not found.pareto_k > 0.7 and 40 < found.ess < 100
    assert importance(wide, wide, n=5000, seed=1).ess == pytest.approx(5000)  # and says nothing
    assert importance(wide.astype("float32"), wide, n=5000, seed=1).ess == pytest.approx(5000, rel=1e-4)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_the_tail_of_weights_is_found(shape):
    u = np.random.default_rng(0).random((20, 50_000))
    found = [fastmaf.stats._pareto_k(np.log1p((row**-shape - 1) / shape)) for row in u]
    assert np.mean(found) == pytest.approx(shape, abs=0.05)


def test_weights_that_are_not_finite_are_said():
    flow = gaussian([0.0], [1.0])

    def half(bad):
        return lambda x: np.where(x[:, 0] > 0, -0.5 * x[:, 0] ** 2 - CONSTANT, bad)

    for bad in (np.nan, np.inf):
        with pytest.warns(StatsWarning, match=r"log_density is not finite at \d+ of 5000 samples, which get no weight"):
            found = importance(flow, half(bad), n=5000, seed=1)
        assert (found.weights[found.samples[:, 0] <= 0] == 0).all()
        near(found.log_evidence, math.log(0.5), 0.02)
    near(importance(flow, half(-np.inf), n=5000, seed=1).log_evidence, math.log(0.5), 0.02)
    with pytest.raises(ValueError, match="log_density has no density at any of the 50 samples"):
        importance(flow, lambda x: np.full(len(x), -np.inf), n=50)


def test_a_product_of_gaussians():
    """N(1, 1) N(0, 0.5^2) / N(0, 1) has the precision 1 + 4 - 1."""
    p, q, prior = gaussian([1.0], [1.0]), gaussian([0.0], [0.5]), gaussian([0.0], [1.0])
    for given, precision in ((None, 5), (prior, 4)):
        found = product([p, q], given, n=20_000, seed=1)
        mean = float(found.weights @ found.samples[:, 0])
        var = float(found.weights @ (found.samples[:, 0] - mean) ** 2)
        assert mean == pytest.approx(1 / precision, abs=0.02) and var == pytest.approx(1 / precision, rel=0.05)
    near(product([p, q], n=20_000, seed=1).log_evidence, stats.norm(0, math.sqrt(1.25)).logpdf(1.0), 0.02)


def test_a_product_of_one_flow_under_many_contexts():
    flow, contexts = following(2), np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.9]])
    found = product([flow] * 3, lambda x: np.zeros(len(x)), contexts, n=30_001, seed=1)
    assert found.samples.shape == (30_001, 2)
    assert np.allclose(found.weights @ found.samples, contexts.mean(axis=0), atol=0.03)
    noise = found.samples - np.repeat(contexts, [10_001, 10_000, 10_000], axis=0)
    assert np.unique(noise.round(9), axis=0).shape == (30_001, 2)  # not the same numbers under each context


def test_posteriors_that_do_not_meet():
    with pytest.warns(StatsWarning, match="poor.*closer to the product"):
        product([gaussian([0.0], [1.0]), gaussian([9.0], [0.5])], n=2000, seed=1)


# Calibration


def pairs(rows=1500, features=3, seed=0, **options):
    flow = make.flow(features, context_features=2, **options)
    context = np.random.default_rng(seed).normal(size=(rows, 2))
    return flow, flow.sample(1, context, seed=seed + 100, dtype="float64")[:, 0], context


def test_a_flow_is_calibrated_on_its_own_samples(dtype):
    flow, x, context = pairs(dtype=dtype, affine=True)
    found = calibration(flow, x, context, n=300, seed=1)
    assert found.calibrated and "calibrated" in repr(found) and "not calibrated" not in repr(found)
    assert found.ranks.shape == found.pit.shape == x.shape and found.hdr_ranks.shape == (len(x),)
    assert found.ranks.min() >= 0 and found.ranks.max() <= 300 == found.draws
    masses = np.array([0.1, 0.5, 0.9])
    assert np.allclose(found.coverage(masses), masses, atol=4 * 0.5 / math.sqrt(len(x)))
    assert found.coverage(0.0) == 0 and found.coverage(1.0) == 1
    for column in range(3):
        assert found.ks_pit[column] == pytest.approx(stats.kstest(found.pit[:, column], "uniform").statistic)
        even = stats.kstest((found.ranks[:, column] + np.random.default_rng(0).random(len(x))) / 301, "uniform").statistic
        assert found.ks_ranks[column] == pytest.approx(even, abs=1 / 301)


def test_a_flow_is_found_calibrated_as_often_as_the_bound_says():
    found = [calibration(*pairs(200, 2, seed), n=99, seed=seed).calibrated for seed in range(100)]
    assert 0.9 <= np.mean(found) <= 1
    at = fastmaf.stats.ks_bound(200)
    u = np.random.default_rng(0).random((200, 2000))
    assert np.mean(fastmaf.stats.ks_distance(u) < at) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    ("change", "low", "high"),
    [(lambda x: 1.4 * x, 0.0, 0.85), (lambda x: 0.6 * x, 0.95, 1.0)],
    ids=["too narrow", "too wide"],
)
def test_coverage_of_a_width_that_is_wrong(change, low, high):
    flow, context = following(2), np.random.default_rng(0).normal(size=(1500, 2))
    x = context + change(np.random.default_rng(1).normal(size=(1500, 2)))
    found = calibration(flow, x, context, n=200, seed=1)
    assert not found.calibrated and "not calibrated" in repr(found)
    truth = stats.chi2(2).cdf(stats.chi2(2).ppf(0.9) / change(1.0) ** 2)
    assert low < found.coverage(0.9) < high and found.coverage(0.9) == pytest.approx(truth, abs=0.04)


def test_the_column_that_is_wrong_is_named():
    flow, x, context = pairs(affine=True)
    flow.names = ["u", "g", "r"]
    x = x.copy()
    x[:, 2] += 0.5 * x[:, 2].std()
    found = calibration(flow, x, context, n=100, seed=1)
    assert found.ks_ranks[2] > found.ks_bound > max(found.ks_ranks[:2])
    assert "of rank r" in repr(found) or "of pit r" in repr(found)


def test_pit_is_the_distribution_function():
    with pytest.warns(StatsWarning, match="2 rows can hardly tell whether a flow is calibrated"):
        found = calibration(gaussian([1.0, 2.0], [1.0, 3.0]), x := np.array([[1.0, 2.0], [2.5, -4.0]]), n=10, seed=1)
    assert np.allclose(found.pit, stats.norm([1.0, 2.0], [1.0, 3.0]).cdf(x))


@pytest.mark.parametrize(
    "flow",
    [
        fastmaf.MADE(3, "bernoulli", hidden_features=(6,), seed=0),
        fastmaf.MADE(3, "mixture", hidden_features=(6,), seed=0),
        fastmaf.MADE(3, masks=3, hidden_features=(6,), seed=0),
    ],
    ids=["coins", "mixture", "ensemble"],
)
def test_flows_without_normal_noise_have_ranks_alone(flow):
    x = flow.sample(800, seed=5, dtype="float64")
    found = calibration(flow, x, n=100, seed=1)
    assert found.pit is None and found.ks_pit is None and found.calibrated
    wrong = 1 - x if flow.base.__class__.__name__ == "Terminal" and flow.base.conditional == "bernoulli" else 2 * x
    assert found.ks_bound < 0.08 and not calibration(flow, wrong * (np.arange(3) > 0), n=100, seed=1).calibrated


def test_rows_on_a_bound_are_said():
    flow = fastmaf.MAF(2, transforms=1, hidden_features=(4,), bounds=[(0, 1), None], seed=0)
    x = flow.sample(100, seed=1, dtype="float64")
    x[:40, 0] = 1.0
    with pytest.warns(StatsWarning, match="the flow cannot follow 40 of 100 rows of x"):
        found = calibration(flow, x, n=50, seed=1)
    assert (found.pit[:40] == 1).all() and (found.hdr_ranks[:40] == 50).all() and not found.calibrated


# Marginals and contexts


def test_marginals_are_exact_for_a_prefix_of_the_order(dtype):
    flow = make.flow(4, ranks=np.array([3, 1, 4, 2]), context_features=1, dtype=dtype)
    flow.names = ["a", "b", "c", "d"]
    found = marginal(flow, ["d", "b"], [0.5], n=500, seed=1)
    assert found.exact and found.columns == (1, 3) and found.names == ("b", "d") and "exact" in repr(found)
    assert np.allclose(found.flow.log_prob(found.samples, [0.5]), flow.prefix(2).log_prob(found.samples, [0.5]))
    whole = flow.sample(500, [0.5], seed=1, dtype="float64")
    for columns in ("a", ["a", "b"], [0, 2]):
        found = marginal(flow, columns, [0.5], n=500, seed=1)
        assert not found.exact and found.flow is None and "by samples" in repr(found)
        assert np.array_equal(found.samples, whole[:, list(found.columns)])
    everything = marginal(flow, range(4), [[0.5], [0.1]], n=30, seed=1)
    assert everything.exact and everything.samples.shape == (2, 30, 4)


def test_marginals_of_flows_without_an_order():
    for flow in (fastmaf.MAF(3, seed=0, hidden_features=(4,)), fastmaf.MADE(3, masks=2, hidden_features=(4,), seed=0)):
        assert not marginal(flow, 0, n=10).exact and marginal(flow, [2, 0, 1], n=10).exact


def test_marginals_of_flows_that_are_averaged():
    flow = fastmaf.Ensemble(fastmaf.MADE(3, order=[2, 0, 1], hidden_features=(4,)), members=2, seed=0)
    found = marginal(flow, [2, 0], n=10, seed=1)
    assert found.exact and np.array_equal(found.flow.log_prob(found.samples), flow.prefix(2).log_prob(found.samples))
    assert not marginal(flow, 0, n=10).exact


def test_distances_of_contexts(monkeypatch):
    rng = np.random.default_rng(0)
    context = rng.normal([1000.0, 0.0], [10.0, 0.1], (400, 2))
    for masks in (1, 2):
        flow = fastmaf.MADE(1, "mixture", components=2, context_features=2, hidden_features=(4,), seed=0, masks=masks)
        with pytest.raises(ValueError, match="flow does not know the contexts of its fit"):
            context_distance(flow, context)
        flow.fit(rng.normal(size=(400, 1)), context, max_epochs=1, seed=0)
        assert np.allclose(context_distance(flow, [1030.0, -0.5]), [3, 5], rtol=0.15)
        assert context_distance(flow, context[:, None]).shape == (400, 1, 2)
        monkeypatch.setattr(fastmaf.stats, "PIECE", 30)
        with pytest.warns(RuntimeWarning, match="context is far away from those of the fit in column 1") as caught:
            entropy(flow, [1000.0, 50.0], n=100, seed=0)
        assert len(caught) == 1 and caught[0].filename == __file__


# What holds for all


@pytest.mark.filterwarnings("ignore::fastmaf.stats.StatsWarning")
def test_the_same_seed_gives_the_same_and_pieces_do_not_matter(monkeypatch):
    flow, x, context = pairs(60, dtype="float32")
    few = context[:5]

    def everything(seed):
        found = calibration(flow, x, context, n=40, seed=seed)
        shared = calibration(flow, x, context[0], n=40, seed=seed)
        weighted = importance(flow, lambda x: -0.5 * (x**2).sum(axis=1), context[0], n=300, seed=seed)
        both = product([flow, flow], None, context[:2], n=301, seed=seed)
        return [
            *hdr_level(flow, [0.5, 0.9], few, n=100, seed=seed),
            p_value(flow, x, context, n=50, seed=seed),
            *entropy(flow, few, n=100, seed=seed),
            *kl(flow, lambda x: -(x[:, 0] ** 2), few, n=100, seed=seed),
            weighted.samples,
            weighted.log_weights,
            both.samples,
            both.log_weights,
            found.ranks,
            found.hdr_ranks,
            shared.ranks,
            marginal(flow, [0, 2], few, n=100, seed=seed).samples,
        ]

    whole = everything(7)
    for again, other, own in zip(everything(7), everything(8), whole, strict=True):
        assert np.array_equal(again, own) and not np.array_equal(other, own)
    for numbers in (1, 200, 1300):
        monkeypatch.setattr(fastmaf.stats, "PIECE", numbers)
        for own, again in zip(whole, everything(7), strict=True):
            assert np.allclose(own, again, rtol=1e-12, atol=0), numbers


def test_no_more_is_drawn_at_a_time_than_a_piece(monkeypatch):
    monkeypatch.setattr(fastmaf.stats, "PIECE", 1000)
    flow, x, context = pairs(50)
    most = noted(monkeypatch)
    calibration(flow, x, context, n=500, seed=1)
    entropy(flow, context, n=30, seed=1)
    assert len(most) > 100 and max(most) <= 1000


def test_samples_that_are_nan_are_refused():
    flow = following(1)
    flow.context_layers = [fastmaf.layers.Elementwise.from_bounds([(0, 1)])]
    with pytest.raises(ValueError, match="there are no samples under context 1, which the flow cannot follow"):
        entropy(flow, [[0.5], [2.0]], n=10)


ONE, TWO = gaussian([0.0], [1.0]), gaussian([0.0, 0.0], [1.0, 1.0], names=["u", "g"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: entropy(3), "flow is 3; it must be a Flow or an Ensemble"),
        (lambda: entropy(ONE, n=1), "n is 1; it must be at least 2"),
        (lambda: entropy(following(2)), "context is missing; the flow has 2 context features"),
        (lambda: entropy(ONE, [1.0]), "the flow has no context features"),
        (lambda: hdr_level(ONE, 1.0), "mass is 1.0; it must be a number between 0 and 1"),
        (lambda: hdr_level(ONE, [[0.5]]), "mass is a list of length 1; it must be"),
        (lambda: kl(ONE, TWO), "q has 2 features; p has 1"),
        (lambda: kl(TWO, gaussian([0.0, 0.0], [1.0, 1.0], names=["u", "r"])), "column 1 is 'g' in p and 'r' in q"),
        (lambda: kl(ONE, following(1)), "q has 1 context features; p has 0"),
        (lambda: kl(ONE, lambda x: x), r"q\(x\) has shape \(10000, 1\); of rows \(10000, 1\) it must be \(10000,\)"),
        (lambda: kl(ONE, lambda x: x[:, 0] * np.nan), "q is NaN or infinite at 10000 of 10000 samples of p"),
        (lambda: kl(ONE, "density"), "q is 'density'; it must have log_prob, or be a function"),
        (lambda: product([ONE]), "posteriors is a list of length 1; it must be a list of two or more"),
        (lambda: product([ONE, TWO]), r"posteriors\[1\] has 2 features; posteriors\[0\] has 1"),
        (lambda: product([ONE, ONE], contexts=[None]), "contexts is .*; it must have one entry for each of 2 posteriors"),
        (lambda: product([following(1)] * 2, contexts=[[1.0], None]), r"contexts\[1\] is missing"),
        (lambda: product([following(1)] * 2, following(1), [[1.0], [1.0]]), "prior has 1 context features; it must have none"),
        (lambda: calibration(ONE, np.zeros((2, 3, 1))), r"x has shape \(2, 3, 1\); x must be \(N, 1\)"),
        (lambda: calibration(following(1), np.zeros((3, 1)), np.zeros((3, 1, 1))), r"x must be \(N, 1\), and a context \(C,\) or \(N, C\)"),
        (lambda: calibration(ONE, [[np.nan]]), "x is not finite in column 0"),
        (lambda: calibration(ONE, np.zeros((0, 1))), r"x has shape \(0, 1\)"),
        (lambda: marginal(TWO, "r"), "columns has 'r'; the flow has no such name"),
        (lambda: marginal(ONE, "r"), "columns has 'r'; the flow has no names"),
        (lambda: marginal(TWO, ["u", 0]), "columns has a variable twice"),
        (lambda: marginal(TWO, 2), "columns is 2; it must be below 2"),
        (lambda: marginal(TWO, []), r"columns is \[\]; it must list some of the 2 variables"),
        (lambda: context_distance(ONE, [1.0]), "the flow has 0 context features"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_normal_distribution_function():
    u = np.array([-40.0, -3.0, 0.0, 2.5, 40.0])
    assert np.allclose(fastmaf.stats.normal_cdf(u), special.ndtr(u), rtol=1e-12, atol=0)


def test_the_page_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    page = (pathlib.Path(__file__).parents[1] / "docs" / "uses.md").read_text(encoding="utf-8")
    code = "\n".join(block.partition("```")[0] for block in page.split("```python\n")[1:])
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        exec(compile(code, "docs/uses.md", "exec"), names)
    assert {path.name for path in tmp_path.iterdir()} == {"calibration.png", "history.png", "noise.png"}
    assert names["weighted"].ess > 500 and names["joint"].ess > 500
    assert 0.97 < names["p"][0] < 0.99 and names["p"][1] < 0.001
    grid = np.stack(np.meshgrid(*[np.linspace(-5, 5, 401)] * 2), axis=-1).reshape(-1, 2)
    density = np.exp(names["log_likelihood"](grid) + names["prior"].log_prob(grid)) * 0.025**2
    near(names["weighted"].log_evidence, math.log(density.sum()), 0.05)
    assert np.allclose(names["mean"], density @ grid / density.sum(), atol=0.1)


def test_masses_that_the_samples_do_not_resolve():
    flow = fastmaf.Flow([], features=2)
    with pytest.warns(fastmaf.stats.StatsWarning, match="of 100 samples fewer than 5 lie beyond the edge"):
        fastmaf.stats.hdr_level(flow, 0.999, n=100, seed=0)
    found = fastmaf.stats.calibration(flow, flow.sample(50, seed=1), n=20, seed=2)
    with pytest.raises(
        ValueError, match="one of p and q has discrete variables in columns 0, 1, the other continuous ones: they cannot be compared"
    ):
        fastmaf.stats.kl(flow, fastmaf.MADE(2, "bernoulli"))
    with pytest.raises(ValueError, match="mass is 2; it must be from 0 to 1"):
        found.coverage(2)
