"""Settings and the report; importing fastmaf."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

import pytest

import fastmaf
from fastmaf import backends, config

core = pytest.mark.skipif(backends.reason("cpu") is not None, reason=str(backends.reason("cpu")))


def test_the_report_names_every_backend(capsys):
    report = fastmaf.show_config()
    assert {"fastmaf", "python", "backend", *backends.names} <= set(report.values)
    assert report.values["backend"] == fastmaf.get_backend()
    assert report.values["cuda"] == "available" or report.values["cuda"].startswith("absent: ")
    assert repr(report) == str(report) and len(str(report).splitlines()) == len(report.values)
    assert capsys.readouterr() == ("", "")


@core
def test_the_report_tells_how_the_core_was_built(monkeypatch):
    monkeypatch.setenv("FASTMAF_NUM_THREADS", "3")
    values = fastmaf.show_config().values
    assert values["isa"].startswith(config.get_isa())
    assert values["threads"] == f"{fastmaf.get_num_threads()} (FASTMAF_NUM_THREADS=3)"
    assert values["built"]


@core
def test_threads():
    before = fastmaf.get_num_threads()
    with fastmaf.num_threads(before + 1):
        assert fastmaf.get_num_threads() == before + 1
        with pytest.raises(ZeroDivisionError), fastmaf.num_threads(1):
            raise ZeroDivisionError
        assert fastmaf.get_num_threads() == before + 1
    assert fastmaf.get_num_threads() == before


@pytest.mark.parametrize(("n", "message"), [(0, "n is 0; it must be at least 1"), (-2, "n is -2"), (1.5, "n is 1.5"), ("2", "n is '2'")])
def test_wrong_thread_counts_are_named(n, message):
    with pytest.raises(ValueError, match=message):
        fastmaf.set_num_threads(n)


@core
def test_instruction_sets():
    before = config.get_isa()
    assert before in config.available_isas() and "baseline" in config.available_isas()
    for isa in config.available_isas():
        fastmaf.set_isa(isa)
        assert config.get_isa() == isa
    fastmaf.set_isa(None)
    assert config.get_isa() == os.environ.get("FASTMAF_ISA", config.available_isas()[0])
    fastmaf.set_isa(before)
    with pytest.raises(ValueError, match="isa is 'avx1024'; this machine and this build have .*'baseline'"):
        fastmaf.set_isa("avx1024")


@core
def test_an_instruction_set_of_the_environment_that_is_not_there_is_reported_and_refused(tmp_path):
    code = "import fastmaf, numpy; print(fastmaf.show_config().values['isa']); fastmaf.MAF(features=2).log_prob(numpy.zeros((1, 2)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "FASTMAF_ISA": "mmx"}, capture_output=True, text=True
    )
    assert "mmx" in done.stdout and "(FASTMAF_ISA=mmx)" in done.stdout
    assert "ValueError" in done.stderr and "mmx" in done.stderr


def test_without_the_core_the_settings_say_why(monkeypatch):
    monkeypatch.setitem(backends._loaded, "cpu", "no compiler was at hand")
    for call in (fastmaf.get_num_threads, config.get_isa, config.available_isas, lambda: fastmaf.set_num_threads(2)):
        with pytest.raises(RuntimeError, match="the cpu backend is absent: no compiler was at hand"):
            call()
    assert fastmaf.show_config().values["cpu"] == "absent: no compiler was at hand"


def test_the_version_is_that_of_the_installation(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "1.2.3")
    assert config.version() == "1.2.3"

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert config.version() == "0+unknown"


def test_the_import_is_light():
    heavy = ("numba", "torch", "tqdm", "safetensors", "matplotlib", "fastmaf.backends.numba", "fastmaf.backends.reference", "fastmaf._core")
    code = f"import fastmaf, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_public_names_exist_and_are_documented():
    for name in fastmaf.__all__:
        assert getattr(fastmaf, name).__doc__, name
