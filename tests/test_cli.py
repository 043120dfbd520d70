"""The command: `demo` runs from end to end, `info` says what there is, and mistakes end in one line."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import numpy as np
import pytest

import fastmaf
from fastmaf import cli
from fastmaf.cli import _demo
from fastmaf.data import galaxies


def test_info(capsys):
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out == f"{fastmaf.show_config()}\n"


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "fastmaf", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"fastmaf {fastmaf.__version__}\n"


def test_demo(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figure, saved = tmp_path / "figure.png", tmp_path / "flow.safetensors"
    assert cli.main(["demo", "--quick", "--seed", "3", "--output", str(figure), "--save", str(saved)]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^\w+", out, re.MULTILINE)[1:] == ["data", "fit", "density", "samples", "redshift", "flow", "figure"]
    assert out.count("rows/s") == 4 and max(map(len, out.splitlines())) <= 100
    assert figure.read_bytes().startswith(b"\x89PNG")
    flow = fastmaf.load(saved)
    assert flow.names[:3] == ("redshift", "r", "u-g") and flow.training["epochs"] == 2
    x, _ = _demo._colours(*galaxies())
    score, gaussian = (float(value) for value in re.findall(r"(-?\d+\.\d+) ±", out))
    assert score == pytest.approx(flow.log_prob(x[5000:6000]).mean(), abs=2e-3)
    assert score > gaussian


def test_demo_without_matplotlib(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else find(name, *more))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--quick"]) == 0
    assert "figure    skipped: there is no matplotlib; to get it: pip install 'fastmaf[plot]'" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_demo_interrupted(tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fastmaf.Flow, "fit", interrupted)
    assert cli.main(["demo", "--quick", "--output", str(tmp_path / "figure.png")]) == 130
    assert capsys.readouterr().err == "fastmaf: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "/nowhere/at/all.png"], "/nowhere/at/all.png cannot be written: there is no folder /nowhere/at"),
        (["--save", "/nowhere/flow.safetensors"], "/nowhere/flow.safetensors cannot be written"),
        (["--seconds", "0"], "--seconds is 0; it must be positive"),
        (["--threads", "0"], "n is 0; it must be at least 1"),
        (["--seed", "-1"], "seed is -1"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--quick", *arguments]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"fastmaf: {message}") and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["demo", "--seed", "x"]])
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    err = capsys.readouterr().err
    assert err.startswith("fastmaf") and "--help says more" in err and err.count("\n") == 1


def test_colours_keep_likelihoods():
    """A map of determinant 1 or -1."""
    matrix = _demo._colours(np.eye(7), galaxies()[1])[0]
    assert abs(np.linalg.det(matrix)) == pytest.approx(1)


def test_posteriors_of_a_flow_that_is_known():
    """The first column is the second plus normal noise: medians, PIT and all scores follow."""

    class Line:
        def log_prob(self, rows):
            return -0.5 * ((rows[:, 0] - rows[:, 1]) / 0.05) ** 2

    rng = np.random.default_rng(0)
    middle = rng.uniform(0.5, 1.5, 4000)
    truth = middle + 0.05 * rng.normal(size=4000)
    found = _demo._redshifts(Line(), np.column_stack([truth, middle]))
    assert found.evaluations == 800_000
    assert np.allclose(found.estimate, middle, atol=2e-4)
    assert found.calibration < 1.63 / np.sqrt(4000)
    error = (middle - truth) / (1 + truth)
    assert found.scatter == pytest.approx(1.4826 * np.median(np.abs(error - np.median(error))), rel=0.02)
    assert found.outliers == 0


def test_the_gaussian_is_the_best_fit():
    rng = np.random.default_rng(0)
    train = rng.normal(size=(2000, 3)) @ np.triu(np.ones((3, 3))) + 5
    covariance = np.cov(train, rowvar=False)
    expected = -0.5 * (3 * (1 + np.log(2 * np.pi)) + np.linalg.slogdet(covariance)[1])
    assert _demo._gaussian(train, train).mean() == pytest.approx(expected, rel=1e-3)


def test_config_says_where_the_library_lies(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fastmaf, "__file__", str(tmp_path / "__init__.py"))
    assert cli.main(["config", "--cflags"]) == 1
    assert "has no library for C" in capsys.readouterr().err
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libfastmaf.so.0").touch()
    assert cli.main(["config", "--cflags", "--libs"]) == 0
    assert capsys.readouterr().out == f"-I{tmp_path}/include -L{tmp_path}/lib -lfastmaf -Wl,-rpath,{tmp_path}/lib\n"
    assert cli.main(["config"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [f"{tmp_path}/lib/cmake/fastmaf", f"{tmp_path}/include/fastmaf.f90"]
