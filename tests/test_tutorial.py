"""The tutorial runs, and what it says is so; with few rows, on any backend that trains."""

import importlib.util
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

import fastmaf

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
MAKE = Path(__file__).resolve().parents[1] / "docs" / "tutorial" / "make.py"
SMALL = {
    "phrase": {"epochs": 1500},
    "conditionals": {"rows": 10_000, "epochs": 25},
    "jacobians": {"rows": 3000, "epochs": 1},
    "densities": {"rows": 4000, "epochs": 12},
    "repeat": {"rows": 4000, "epochs": 15, "layers": 3},
    "mixtures": {"rows": 8000, "epochs": 25},
    "prefixes": {"rows": 12_000, "epochs": 3, "draws": 100},
}


@pytest.fixture(scope="module")
def tutorial():
    if not MAKE.exists():
        pytest.skip("the tutorial is not part of what is installed")
    spec = importlib.util.spec_from_file_location("tutorial", MAKE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tutorial")


@pytest.fixture(scope="module")
def results(tutorial, folder):
    fastmaf.set_backend(None)
    if fastmaf.get_backend() != "cpu":
        pytest.skip("the compiled core is not there; the other backends would take minutes")
    found = tutorial.run(folder, (MAKE.parent / "README.md").read_text(encoding="utf-8"), SMALL)
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert page.count("<!-- begin") == page.count("<!-- end") > 20
    for name in {part.split(")")[0] for part in page.split("(figures/")[1:]}:
        assert (folder / "figures" / name).stat().st_size > 1000
    return found


def test_the_page_shows_the_code_that_runs_and_small_figures(tutorial):
    page = (MAKE.parent / "README.md").read_text(encoding="utf-8")
    for step in tutorial.STEPS:
        sizes = {name: p.default for name, p in inspect.signature(step).parameters.items() if name != "page"}
        for name, code in tutorial.snippets(step, sizes).items():
            assert code in page, f"the page is older than snippet {name!r}; run docs/tutorial/make.py"
    for name in re.findall(r"\(figures/(.*?)\)", page):
        assert (MAKE.parent / "figures" / name).stat().st_size < 100_000


def test_snippets_run_one_after_another(results, folder):
    names = {}
    for code in re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL):
        exec(code, names)
    assert names["learned"].shape == (3, 4) and names["p_z"].shape == names["z"].shape


def test_learned_probabilities_are_those_of_the_data(results):
    one, phrase = results["one_outcome"], results["phrase"]
    assert one["learned"] == pytest.approx(one["fraction"], abs=2e-3)
    assert np.allclose(phrase["learned"], phrase["seen"], atol=5e-3)
    assert np.allclose(phrase["product"], phrase["learned"], atol=1e-6)


def test_sorted_masks_are_staircases(results):
    for mask in results["staircases"]["stairs"]:
        assert not (np.diff(mask.astype(int), axis=1) > 0).any() and not (np.diff(mask.astype(int), axis=0) < 0).any()
    assert results["staircases"]["kept"] < results["staircases"]["dense"]


def test_the_jacobian_of_one_made_is_triangular(results):
    found = results["jacobians"]
    assert not np.triu(found["sorted"], 1).any() and np.diagonal(found["sorted"]).all()
    assert found["full"].all() and found["round_trip"] < 1e-9


def test_the_better_order_and_the_chain_come_near_the_target(results):
    gap = results["densities"]["gap"]
    assert gap["MADE, x2 first"] < 0.1 and gap["MAF of 3 MADEs"] < 0.2 < gap["MADE, x1 first"]
    assert results["conditionals"]["mu"] < 0.7


def test_noise_comes_closer_to_normal_with_every_layer(results):
    radius, log_p = results["repeat"]["distances"][:, 2], results["repeat"]["log_prob"]
    assert radius[-1] < 0.5 * radius[0] and (np.diff(log_p) > 0).all() and log_p[-1] < results["repeat"]["truth"] + 0.05


def test_mixtures_and_prefixes(results):
    gap = results["mixtures"]["gap"]
    assert gap["MADE, mixture of 10"] < 0.3 < gap["MADE, Gaussian"]
    assert results["prefixes"]["mass"] == pytest.approx(1, abs=0.02) and results["prefixes"]["rank_ks"] < 0.25
