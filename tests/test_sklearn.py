"""`fastmaf.sklearn`: scikit-learn's own checks, and that the estimator is the flow."""

from __future__ import annotations

import inspect
import pathlib
import pickle
import warnings

import make
import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastmaf
from fastmaf.sklearn import MAFDensity
from fastmaf.train import FitWarning

SMALL = {"transforms": 1, "hidden_features": (4,), "max_epochs": 3}


def data(n=300):
    return np.random.default_rng(0).normal([3.0, -7.0], [0.1, 2.0], (n, 2))


# Rows of the checks are few or integers, which fit has words for. check_array_api_input, whose subject is arrays of other libraries, skips
# itself unless SCIPY_ARRAY_API is set.
@pytest.mark.filterwarnings("ignore::fastmaf.FitWarning")
@parametrize_with_checks(
    [MAFDensity(**SMALL), MAFDensity(**SMALL, members=2), MAFDensity(**SMALL, batch_norm=True, components=2, dtype="float64")]
)
def test_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


def test_the_estimator_is_the_flow():
    x, weights = data(), np.random.default_rng(1).integers(0, 3, 300)
    own = {"transforms": 2, "hidden_features": (8,), "order": "random", "bounds": [(0, None), None]}
    settings = {"max_epochs": 4, "batch_size": 64, "lr": 2e-3, "validation": 0.2}
    density = MAFDensity(**own, **settings, random_state=5).fit(x, sample_weight=weights)
    flow = fastmaf.MAF(2, **own, seed=5)
    history = flow.fit(x, weights=weights, **settings, seed=5, progress=False)
    assert make.file_bytes(density.flow_) == make.file_bytes(flow)
    assert density.history_.validation == history.validation
    np.testing.assert_array_equal(density.score_samples(x), flow.log_prob(x))
    np.testing.assert_array_equal(density.sample(20, random_state=7), flow.sample(20, seed=7))
    assert density.score(x) == pytest.approx(flow.log_prob(x).mean())
    assert density.score(x, sample_weight=weights) == pytest.approx(np.average(flow.log_prob(x), weights=weights))


def test_members_are_an_ensemble():
    x = data()
    density = MAFDensity(**SMALL, members=3, random_state=5).fit(x)
    ensemble = fastmaf.Ensemble(fastmaf.MAF(2, transforms=1, hidden_features=(4,), seed=5), members=3, seed=5)
    ensemble.fit(x, max_epochs=3, seed=5)
    assert np.array_equal(density.flow_.parameters(), ensemble.parameters()) and len(density.history_) == 3
    np.testing.assert_array_equal(density.score_samples(x), ensemble.log_prob(x))
    np.testing.assert_array_equal(density.sample(20, random_state=7), ensemble.sample(20, seed=7))
    with pytest.raises(ValueError, match="members is 0"):
        MAFDensity(members=0).fit(x)


def test_every_parameter_of_flow_and_fit_is_there_with_its_default():
    of = inspect.signature
    theirs = {**of(fastmaf.MAF).parameters, **of(fastmaf.Flow.fit).parameters}
    elsewhere = {"features", "context_features", "names", "seed", "self", "x", "context", "weights"}
    no_settings = {"device", "checkpoint", "checkpoint_every", "resume", "callback", "comm"}
    own = of(MAFDensity).parameters
    shared = set(own) - {"random_state", "members"}
    assert shared == set(theirs) - elsewhere - no_settings
    assert all(own[name].default == theirs[name].default for name in shared - {"progress"})
    given = {name: object() for name in own}
    assert MAFDensity(**given).get_params() == given


def test_each_fit_starts_anew():
    x = data()
    fresh = make.file_bytes(MAFDensity(**SMALL, random_state=1).fit(x).flow_)
    density = MAFDensity(**SMALL, random_state=1).fit(np.hstack([10 - x, x[:, :1] ** 2]))
    flow = density.flow_
    assert make.file_bytes(density.fit(x).flow_) == fresh and density.n_features_in_ == 2
    assert flow.features == 3  # whoever holds the old one keeps it


def test_a_refused_fit_leaves_the_fitted_flow():
    density = MAFDensity(**SMALL, random_state=1).fit(data())
    flow = density.flow_
    with pytest.raises(ValueError, match="lr is -1; it must be a positive number"):
        density.set_params(lr=-1).fit(data())
    assert density.flow_ is flow


def test_early_stopping():
    density = MAFDensity(transforms=1, hidden_features=(8,), lr=0.02, patience=2, random_state=0).fit(data(400))
    assert density.history_.stopped == "patience" and len(density.history_.train) == density.history_.best_epoch + 2


def test_in_a_pipeline_and_a_grid_search_in_two_processes():
    x = data()
    pipeline = make_pipeline(StandardScaler(), MAFDensity(**{**SMALL, "max_epochs": 30}, lr=0.01, patience=3, random_state=0))
    grid = {"mafdensity__hidden_features": [(2,), (6,)], "mafdensity__patience": [1, 3]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        search = GridSearchCV(pipeline, grid, cv=2, n_jobs=2, error_score="raise").fit(x)
        alone = GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(x)
    np.testing.assert_array_equal(search.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"])
    assert len(set(search.cv_results_["mean_test_score"])) > 1
    scaled = search.best_estimator_[0].transform(x)
    assert search.score(x) == pytest.approx(search.best_estimator_[1].flow_.log_prob(scaled).mean())
    assert search.best_score_ == max(search.cv_results_["mean_test_score"])


def test_names_of_a_data_frame():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(data(), columns=["z", "m"])
    density = MAFDensity(**SMALL, bounds={"z": (0, None)}, random_state=0).fit(frame)
    assert density.flow_.names == ("z", "m") == tuple(density.feature_names_in_)
    assert density.flow_.layers[0].kinds == ("log_above", "identity")
    np.testing.assert_array_equal(density.score_samples(frame), density.flow_.log_prob(frame))
    with pytest.raises(ValueError, match="feature names"):
        density.score_samples(frame[["m", "z"]])
    density.set_params(bounds=None).fit(frame.to_numpy())
    assert density.flow_.names is None and not hasattr(density, "feature_names_in_")


def test_a_frame_with_weights_of_its_own():
    pandas = pytest.importorskip("pandas")

    class Chain(pandas.DataFrame):
        def isweighted(self):
            return True

        def get_weights(self):
            return np.ones(len(self))

    chain = Chain(data(), columns=["z", "m"])
    with pytest.warns(FitWarning, match=r"X has weights of its own, .*: sample_weight=X.get_weights\(\)"):
        MAFDensity(**SMALL, random_state=0).fit(chain)
    MAFDensity(**SMALL, random_state=0).fit(chain, sample_weight=chain.get_weights())


@pytest.mark.filterwarnings("ignore::fastmaf.FitWarning")
@pytest.mark.parametrize(("n", "validation", "held"), [(2, 0.1, 1), (4, 0.1, 1), (4, 0.5, 2), (14, 0.1, 1), (16, 0.1, 2), (5, 0, 0)])
def test_a_fraction_of_few_rows_holds_out_one_at_least(n, validation, held):
    x = data(n)
    density = MAFDensity(**SMALL, validation=validation, random_state=0).fit(x)
    assert density.flow_.training["validation_rows"] == held and density.flow_.training["rows"] == n - held
    assert np.isfinite(density.score_samples(x)).all()
    weighted = MAFDensity(**SMALL, validation=validation, random_state=0).fit(np.vstack([x, x + 1]), sample_weight=[1] * n + [0] * n)
    assert weighted.flow_.training["validation_rows"] == held


def test_too_few_rows_and_weights_that_do_not_fit():
    density = MAFDensity(**SMALL, random_state=0)
    with pytest.raises(ValueError, match="1 sample"):
        density.fit(data(1))
    with pytest.raises(ValueError, match="validation is 0.1 of the 1 rows of positive weight"):
        density.fit(data(3), sample_weight=[0, 1, 0])
    for bad, text in (
        ([1.0, 2.0], "sample_weight has 2 rows; X has 3"),
        ([1.0, -2.0, 1.0], "sample_weight has -2.0 in row 1"),
        (np.zeros(3), "sample_weight are all zero: no row is left; leave sample_weight out"),
        (np.ones((3, 1)), r"sample_weight has shape \(3, 1\); it must have one number per row"),
    ):
        with pytest.raises(ValueError, match=text):
            density.fit(data(3), sample_weight=bad)
    density.fit(data())
    with pytest.raises(ValueError, match="sample_weight has 2 rows; X has 300"):
        density.score(data(), sample_weight=[1, 2])
    assert density.score(data()[:2], sample_weight=[0, 1]) == pytest.approx(density.score(data()[1:2]))


def test_random_states():
    x, density = data(), MAFDensity(**SMALL)

    def fitted(state):
        return clone(density).set_params(random_state=state).fit(x).flow_.parameters()

    def drawn(state):
        return fitted_once.sample(3, random_state=state)

    fitted_once = clone(density).set_params(random_state=0).fit(x)
    for call in (fitted, drawn):
        for state in (np.random.RandomState, np.random.default_rng):
            np.testing.assert_array_equal(call(state(3)), call(state(3)))
            assert not np.array_equal(call(state(3)), call(state(4)))
        one = np.random.RandomState(3)
        assert not np.array_equal(call(one), call(one))
        state = np.random.get_state()  # noqa: NPY002
        try:
            results = []
            for seed in (0, 0, 1):
                np.random.seed(seed)  # noqa: NPY002
                results.append(call(None))
        finally:
            np.random.set_state(state)  # noqa: NPY002
        assert np.array_equal(results[0], results[1]) and not np.array_equal(results[1], results[2])
    for bad in (-1, "one", 2**64, 1.5):
        with pytest.raises(ValueError, match="random_state is .*; it must be"):
            drawn(bad)
    with pytest.raises(ValueError, match="n_samples is -1"):
        fitted_once.sample(-1)
    with pytest.raises(NotFittedError):
        density.sample()


def test_a_fitted_estimator_travels():
    density = MAFDensity(**SMALL, random_state=0).fit(data())
    copy = pickle.loads(pickle.dumps(density))
    np.testing.assert_array_equal(copy.score_samples(data()), density.score_samples(data()))
    assert copy.history_.train == density.history_.train
    assert not hasattr(clone(density), "flow_") and clone(density).get_params() == density.get_params()


def test_what_a_fit_complains_of_is_said_where_it_was_called():
    with pytest.warns(FitWarning, match="a flow of one variable with a normal base is one Gaussian") as caught:
        MAFDensity(**SMALL, random_state=0).fit(data()[:, :1])
    assert {warning.filename for warning in caught} == {__file__}


def test_the_page_runs():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "scikit-learn.md").read_text(encoding="utf-8")
    code = "\n".join(block.partition("```")[0] for block in page.split("```python\n")[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        exec(compile(code, "docs/scikit-learn.md", "exec"), {})
