"""The registry: which backend is chosen, and what is said of those that are absent."""

from __future__ import annotations

import sys

import make
import numpy as np
import pytest

import fastmaf
from fastmaf import backends


class Partial:
    """A backend without kernels for half of all flows."""

    name = "partial"

    def unsupported(self, flow):
        return None if flow.features == 3 else "BatchNorm"

    def log_prob(self, flow, x, context, out):
        out[...] = 7


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(backends, "_loaded", dict(backends._loaded))


def test_the_reference_is_always_there():
    assert backends.reason("reference") is None
    fastmaf.set_backend("reference")
    assert fastmaf.get_backend() == "reference"


def test_an_interrupted_import_is_no_absence(monkeypatch):
    """Ctrl-C while the core begins comes out of its import as the cause of an ImportError."""

    def interrupted(name):
        raise ImportError("initialization failed") from KeyboardInterrupt()

    backends._loaded.pop("cpu", None)
    with monkeypatch.context() as context:
        context.setattr(backends.importlib, "import_module", interrupted)
        context.setattr(backends, "active", None)
        with pytest.raises(KeyboardInterrupt):
            backends.choose()
    assert "cpu" not in backends._loaded


def test_the_default_is_the_first_that_is_there():
    for absent in ((), ("cpu",), ("cpu", "numba")):
        for name in absent:
            backends._loaded[name] = "not today"
        fastmaf.set_backend(None)
        assert fastmaf.get_backend() == next(name for name in backends.names if backends.reason(name) is None)
    assert fastmaf.get_backend() == "reference"


def test_an_absent_backend_says_why_and_what_would_bring_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastmaf.backends.numba", None)
    backends._loaded.pop("numba", None)
    with pytest.raises(RuntimeError, match=r"the numba backend is absent: .*backends.numba.*pip install 'fastmaf\[numba\]'"):
        fastmaf.set_backend("numba")


def test_cuda_is_there_or_absent_for_a_reason():
    if backends.reason("cuda") is None:
        fastmaf.set_backend("cuda")
        assert fastmaf.get_backend() == "cuda"
    else:
        with pytest.raises(RuntimeError, match="the cuda backend is absent: .*; to get it: on a machine with an NVIDIA GPU"):
            fastmaf.set_backend("cuda")


@pytest.mark.parametrize("name", ["gpu", "", "_cpu", 3])
def test_unknown_backends_are_refused(name):
    with pytest.raises(ValueError, match="it must be one of 'cpu', 'numba', 'reference', 'cuda'"):
        fastmaf.set_backend(name)


def test_a_layer_without_kernel_is_named():
    backends.active = Partial()
    assert fastmaf.MAF(features=3).log_prob(np.zeros((2, 3))).tolist() == [7, 7]
    for call in (lambda f: f.log_prob(np.zeros((0, 2))), lambda f: f.sample(3), lambda f: f.vjp(np.zeros((1, 2)), None, [1])):
        with pytest.raises(NotImplementedError, match="the partial backend has no kernel for BatchNorm"):
            call(fastmaf.MAF(features=2))


def test_where_nobody_named_a_backend_the_reference_takes_its_place_and_says_so_once(monkeypatch):
    monkeypatch.setattr(backends, "told", set())
    flow = fastmaf.MAF(features=2)
    with make.reference():
        expected = flow.log_prob(np.zeros((2, 2)))
    backends._loaded["cpu"] = Partial()
    fastmaf.set_backend(None)
    assert fastmaf.MAF(features=3).log_prob(np.zeros((2, 3))).tolist() == [7, 7]
    with pytest.warns(RuntimeWarning, match="the partial backend has no kernel for BatchNorm: the reference runs this flow") as caught:
        np.testing.assert_array_equal(flow.log_prob(np.zeros((2, 2))), expected)
    assert len(caught) == 1 and caught[0].filename == __file__
    np.testing.assert_array_equal(flow.log_prob(np.zeros((2, 2))), expected)
    assert fastmaf.MAF(features=2).sample(3).shape == (3, 2)


def test_changed_layers_are_judged_again(monkeypatch):
    flow = fastmaf.MAF(features=3)
    backends.active = Partial()
    flow.log_prob(np.zeros((2, 3)))
    monkeypatch.setattr(Partial, "unsupported", lambda self, flow: "Linear")
    flow.layers = flow.layers[:-1]
    with pytest.raises(NotImplementedError, match="Linear"):
        flow.log_prob(np.zeros((2, 3)))


def test_every_backend_answers(backend):
    assert fastmaf.get_backend() == backend.partition("-")[0]
    assert np.isfinite(fastmaf.MAF(features=3).log_prob(np.zeros((2, 3)))).all()
