"""The tables of the papers: baselines, dequantisation, runs that go on where they stopped, and the page."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.append(str(Path(__file__).parents[1]))  # the benchmarks are not installed; what is installed comes first

import fastmaf
from benchmarks.paper import __main__ as command
from benchmarks.paper import baselines, data, recipes, run, tables

TINY = recipes.Row("own", "made", recipes.Recipe("MADE", {"hidden_features": (8,)}, {"max_epochs": 4, "batch_size": 50}, "tiny"))


def images(labelled: bool) -> data.Data:
    """Small 8-bit images; the brightness goes with the label."""
    rng = np.random.default_rng(0)
    labels = tuple(rng.integers(0, 3, rows) for rows in (300, 60, 90))
    parts = tuple(np.clip(rng.normal(60 + 50 * y[:, None], 20, (len(y), 4)), 0, 255).astype(np.uint8) for y in labels)
    return data.Data(parts, labels if labelled else None, data.logit)


@pytest.fixture
def settings(tmp_path):
    return run.Settings(tmp_path, tmp_path / "results", tmp_path / "checkpoints", minutes=5, threads=1)


@pytest.fixture(params=(False, True), ids=("plain", "class"))
def own(request, monkeypatch):
    """Data of our own in place of the files."""
    value = images(request.param)
    monkeypatch.setattr(run, "_loaded", lambda name, folder: value)
    return value


def chain(rows: int = 2000) -> np.ndarray:
    """Bits, each of which is mostly the one before."""
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2, (rows, 1))
    for _ in range(5):
        bits = np.hstack([bits, bits[:, -1:] ^ (rng.random((rows, 1)) < 0.1)])
    return bits[:, [3, 0, 5, 1, 4, 2]]


def test_gaussian():
    x = np.random.default_rng(0).normal(size=(400, 3)) @ [[1, 2, 0], [0, 1, 1], [0, 0, 3]] + [1, 2, 3]
    expected = stats.multivariate_normal(x.mean(axis=0), np.cov(x.T)).logpdf(x)
    np.testing.assert_allclose(baselines.gaussian(x.astype(np.float32))(x), expected, rtol=1e-4)


@pytest.mark.parametrize("fit", (baselines.bernoulli, baselines.chow_liu))
def test_bits_have_probabilities(fit):
    every = np.array(list(itertools.product((0, 1), repeat=6)))
    assert np.exp(fit(chain())(every)).sum() == pytest.approx(1)


def test_bernoulli_adds_one():
    assert baselines.bernoulli(np.array([[1], [1], [0]]))(np.array([[1], [0]])) == pytest.approx(np.log([3 / 5, 2 / 5]))


def test_tree_is_the_chain():
    position = np.array([3, 0, 5, 1, 4, 2])  # column -> place in the chain
    parent = baselines._tree(chain())
    assert parent[0] == -1
    assert np.abs(position[1:] - position[parent[1:]]).tolist() == [1] * 5
    assert baselines.chow_liu(chain())(chain()).mean() > baselines.bernoulli(chain())(chain()).mean() + 1


def test_noise_is_a_function_of_seed_and_epoch():
    pixels = np.random.default_rng(0).integers(0, 256, (5000, 3)).astype(np.uint8)  # more rows than a block
    one, same, epoch, seed = (data.dequantised(pixels, lambda x: x, *key) for key in ((0, 0, 1), (0, 0, 1), (0, 0, 2), (1, 0, 1)))
    assert one.tobytes() == same.tobytes() != epoch.tobytes() != seed.tobytes() != one.tobytes()
    noise = one.astype(np.float64) * 256 - pixels
    assert noise.min() >= 0 and noise.max() <= 1 + 1e-4
    assert stats.kstest(noise.ravel(), "uniform").pvalue > 1e-3


def test_patches_and_logit():
    patches = np.random.default_rng(0).random((5, 64))
    assert data.centred(patches).shape == (5, 63)
    np.testing.assert_allclose(data.centred(patches), (patches - patches.mean(axis=1, keepdims=True))[:, :63])
    x = data.logit(np.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(x, [-13.8155, 0, 13.8155], atol=1e-3)


def test_classes_are_mixed():
    scores = np.log([[0.2, 0.4], [0.1, 0.7]])
    result = run.by_class(scores, np.array([1, 0]))
    assert result["test"] == pytest.approx(np.log([0.3, 0.4]).mean())
    assert result["test_given_class"] == pytest.approx(np.log([0.4, 0.1]).mean())


def test_gaussian_row(own, settings):
    result = run.run(recipes.Row("own", "gaussian"), 0, settings)
    assert result["test_rows"] == 90 and result["recipe"] is None and result["training_rows"] == 300


def test_row_is_written_once(own, settings):
    result = run.run(TINY, 3, settings)
    path = run.result_file(settings.output, TINY, 3)
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert {"commit", "threads", "seconds", "validation", "test_two_standard_errors", "best_epoch", "capped"} <= set(result)
    assert result["epochs"] == 4 and not result["capped"]
    assert not list(settings.checkpoints.iterdir())
    assert run.finished(TINY, 3, settings.output) == "there already"
    assert "ANOTHER RECIPE" in run.finished(TINY.with_epochs(9), 3, settings.output)
    assert run.finished(TINY, 4, settings.output) is None
    assert ("test_given_class" in result) == (own.labels is not None)


def test_training_images_are_turned_and_others_are_not():
    pixels = np.arange(9, dtype=np.uint8)[None] * 16 + np.zeros((300, 1), np.uint8)
    own = data.Data((pixels, pixels[:5], pixels[:5]), transform=lambda x: x, symmetries=data.turned(3))
    seen = {tuple(row) for row in np.floor(own.training(0)(1) * 16).astype(int)}
    images = {tuple(np.arange(9)[one]) for one in data.turned(3)}
    assert len(images) == 8 and seen == images
    assert all((np.diff(part) > 0).all() for part in (own.rows(data.TRAIN), own.rows(data.TEST)))


def test_interrupted_row_goes_on_to_the_same_result(own, settings, monkeypatch, tmp_path):
    whole = run.run(TINY, 0, settings)
    settings = run.Settings(tmp_path, tmp_path / "again", tmp_path / "checkpoints", minutes=5, threads=1)
    rows = data.Data.rows

    def stop(self, part, seed=0, epoch=0, symmetries=None):
        if epoch == 3:
            raise KeyboardInterrupt
        return rows(self, part, seed, epoch, symmetries)

    with monkeypatch.context() as patch, pytest.raises(run.Interrupted):
        patch.setattr(data.Data, "rows", stop)
        run.run(TINY, 0, settings)
    assert not settings.output.exists()
    assert run.run(TINY, 0, settings)["test"] == whole["test"]


def test_cap_is_noted_and_may_be_raised(own, settings):
    with pytest.warns(fastmaf.FitWarning, match="were over before the first epoch"):
        capped = run.run(TINY, 0, run.Settings(settings.data, settings.output, settings.checkpoints, minutes=0, threads=1))
    assert capped["capped"] and capped["epochs"] == 0 and capped["validation"] is None
    assert list(settings.checkpoints.iterdir())
    assert run.run(TINY, 0, settings)["epochs"] == 4


@pytest.mark.parametrize("name", [row.name for rows in recipes.TABLES.values() for row in rows if row.recipe])
def test_recipes_can_be_built(name):
    row = next(row for rows in recipes.TABLES.values() for row in rows if row.name == name)
    classes = 3 if row.data == "mnist-class" else 0
    model, arguments = run.build(row.recipe, 4, classes, 0)
    assert (model.features, model.context_features) == (4, classes)
    assert set(arguments) <= set(inspect.signature(model.fit).parameters)


def test_every_row_has_a_name():
    assert {row.model for rows in recipes.TABLES.values() for row in rows} <= set(tables.NAMES)
    for name in tables.PAPER:
        assert set(tables.PAPER[name]) == {row.model for rows in recipes.TABLES.values() for row in rows if row.data == name}


def test_command_lists_rows(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    where = ["--output", str(tmp_path), "--list"]
    assert command.main(["bsds", "--rows", "maf-*,bsds/made", "--seeds", "0,1", *where]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["bsds/made 0: to run", "bsds/maf-5 0: to run"] and len(printed) == 8
    assert command.main(["bsds", "--rows", "absent", *where]) == 2
    with pytest.raises(SystemExit):
        command.main(["bsds", "--seeds", "a", *where])


def test_row_that_fails_is_not_the_end(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    assert command.main(["gaussians", "--data", str(tmp_path), "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("FileNotFoundError") == 5


def result(name: str, model: str, test: float, seed: int = 0, **more) -> dict:
    machine = {"cpu": "CPU", "isa": "isa"}
    fit = {"epochs": 9, "best_epoch": 8, "seconds": 60.0, "stopped": "patience", "capped": False, "validation": -1.0, "minutes": 40}
    head = {"data": name, "model": model, "seed": seed, "test": test, "test_two_standard_errors": 0.5, "threads": 1}
    return {
        **head,
        **fit,
        "commit": "0123456789abcdef-dirty",
        "machine": machine,
        "recipe": {"differs": "other steps"},
        "fit": {"max_epochs": 9},
        **more,
    }


def test_page(tmp_path):
    runs = [
        result("adult", "chow-liu", -18.5),
        result("adult", "made", -13.5),
        result("bsds", "made", 148.0),
        result("bsds", "maf-5", 153.0, capped=True, stopped="max_seconds"),
        result("bsds", "maf-5", 155.0, seed=1),
        result("mnist-class", "made", -1380.0, test_given_class=-1390.0),
    ]
    for number, item in enumerate(runs):
        (tmp_path / f"{number}.json").write_text(json.dumps(item))
    results = tables.read(tmp_path)
    verdicts = {goal.what: goal.verdict for goal in tables.goals(results)}
    assert verdicts["adult: MADE, above the Chow-Liu tree"] == "met"
    assert verdicts["bsds: MAF (5), above the paper"] == "**missed**"  # 154 on average
    assert verdicts["bsds: MAF (5), above MADE"] == "met"
    assert verdicts["bsds: MADE, above Gaussian"] == "open"
    assert verdicts["MNIST, conditioned on the class: MADE, above the paper"] == "**missed**"
    page = tables.markdown(results)
    assert "| MAF (5) | 155.69 | 154.00 ± 0.50, capped | 153.00 to 155.00 (2) | -1.69 |" in page
    assert "**the cap of 40 minutes**" in page and "- MADE (at most 9 epochs), MAF (5) (at most 9 epochs): other steps." in page
    assert "log p(x | own class) is -1390.00" in page and "commit 0123456789ab, with changes" in page
    widths = [{line.count("|") for line in block.splitlines()} for block in page.split("\n\n") if block.startswith("|")]
    assert all(len(width) == 1 for width in widths)


def test_page_without_runs(tmp_path):
    assert "not run" in tables.markdown(tables.read(tmp_path))


SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is absent")
@pytest.mark.parametrize("name", [*data.BINARY, "bsds", "miniboone", "casp"])
def test_loaders_agree_with_known_scores(name):
    for (of, model), (expected, tolerance) in tables.CHECKS.items():
        if of == name:
            assert run.baseline(recipes.Row(name, model), data.load(name, SHARED))["test"] == pytest.approx(expected, abs=tolerance)
