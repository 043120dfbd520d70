"""Fixtures: every backend and instruction set that this machine has, and both dtypes.

What is missing is skipped with its reason, unless ``FASTMAF_EXPECT`` (a comma-separated list of names) says that it must be there.
"""

from __future__ import annotations

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest

import fastmaf
from fastmaf import backends, config

BACKENDS = ("reference", "numba", "cpu-baseline", "cpu-avx2", "cpu-avx512", "cuda")
# What a shell starts in the background ignores Ctrl-C, and so do its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("FASTMAF_TENSOR_CORES", "always")  # also where float32 is thought to be faster

EXPECTED = frozenset(filter(None, os.environ.get("FASTMAF_EXPECT", "").split(",")))


def absence(case: str) -> str | None:
    """Why a backend, or an instruction set of one, cannot be tested here."""
    name, _, isa = case.partition("-")
    reason = backends.reason(name)
    if reason is None and isa and isa not in config.available_isas():
        reason = f"this CPU or this build lacks {isa}"
    return reason


def pytest_report_header() -> list[str]:
    known = (*BACKENDS, "mpi")
    if unknown := EXPECTED - set(known):
        raise pytest.UsageError(f"FASTMAF_EXPECT names {sorted(unknown)}; known are {', '.join(known)}")
    return repr(fastmaf.show_config()).splitlines()


@pytest.fixture(scope="session")
def mpirun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs this Python, with a script and its arguments, on so many ranks; where there is no MPI, tests are skipped."""
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1"}
    package = str(pathlib.Path(fastmaf.__file__).parents[1])
    environment = os.environ | root | {"PYTHONPATH": package, "FASTMAF_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

    def run(*command: object, size: int, flags: Sequence[str] = (), **variables: str) -> subprocess.CompletedProcess[str]:
        words = ["mpirun", "-n", str(size), *flags, sys.executable, *map(str, command)]
        return subprocess.run(words, env=environment | variables, capture_output=True, text=True, timeout=240, check=False)

    tried = None if shutil.which("mpirun") is None else run("-c", "from mpi4py import MPI", size=1)
    if tried is None or tried.returncode:
        (pytest.fail if "mpi" in EXPECTED else pytest.skip)("there is no mpirun" if tried is None else tried.stderr)
    return run


def use(case: str) -> Iterator[str]:
    """Make a backend active, and an instruction set of it, for the time of a test."""
    reason = absence(case)
    if reason is not None:
        (pytest.fail if case in EXPECTED else pytest.skip)(f"{case}: {reason}")
    name, _, isa = case.partition("-")
    previous, previous_isa = backends.active, config.get_isa() if isa else ""
    fastmaf.set_backend(name)
    if isa:
        fastmaf.set_isa(isa)
    yield case
    if isa:
        fastmaf.set_isa(previous_isa)
    backends.active = previous


@pytest.fixture(autouse=True)
def reproducible(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds that nobody gave are drawn, but for each test the same ones in every run."""
    monkeypatch.setattr("fastmaf._arrays.secrets.randbits", random.Random(request.node.nodeid).getrandbits)


@pytest.fixture(autouse=True)
def own_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend that a test chooses is in use no longer than the test."""
    for name in ("active", "default"):
        monkeypatch.setattr(backends, name, getattr(backends, name))


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory):
    """Run outside the repository, whose folder `fastmaf` would hide the installed package from child processes."""
    os.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend in use, for every backend and instruction set."""
    yield from use(request.param)


@pytest.fixture(params=[case for case in BACKENDS if case.startswith("cpu")])
def core(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same for the compiled core alone."""
    yield from use(request.param)


@pytest.fixture(params=[case for case in BACKENDS if case.startswith(("cpu", "cuda"))])
def compiled(request: pytest.FixtureRequest) -> Iterator[str]:
    """The compiled core, and GPUs."""
    yield from use(request.param)


@pytest.fixture(params=("float32", "float64"))
def dtype(request: pytest.FixtureRequest) -> str:
    """Both dtypes of a flow."""
    return str(request.param)
