"""What computes: the registry of backends, each with its state or the reason why it is absent."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastmaf import _words
from fastmaf.record import FlowRecord, Runner

__all__ = ["Backend", "Part", "active", "choose", "core", "get_backend", "names", "placed", "reason", "require", "runner", "set_backend"]


class Backend(Runner, Protocol):
    """What a backend offers; shapes and meaning are those of the methods of `fastmaf.Flow`.

    Arrays come validated: rows of any real dtype and strides, results in C order and in the dtype of the flow.
    """

    def log_prob(self, flow: FlowRecord, x: Any, context: Any, out: Any) -> None:
        """Fill `out`, (n,) or (c, n)."""

    def conditional_probs(self, flow: FlowRecord, x: Any, context: Any, out: Any) -> None:
        """Fill `out`, (n, D) or (c, n, D) for Bernoulli variables, with another axis for the values of categorical ones."""

    def to_noise(self, flow: FlowRecord, x: Any, context: Any, out: Any, log_det: Any = None) -> None:
        """Fill `out`, (n, D) or (c, n, D), and `log_det`, (n,) or (c, n), unless it is None."""

    def from_noise(self, flow: FlowRecord, u: Any, context: Any, out: Any, log_det: Any = None) -> None:
        """Fill `out`, (n, D) or (c, n, D), and `log_det`, (n,) or (c, n), unless it is None: whatever it is in rows that are not finite."""

    def sample(
        self, flow: FlowRecord, c: int, n: int, context: Any, seed: int, offset: int, context_offset: int, out: Any, log_prob_out: Any
    ) -> None:
        """Fill `out`, (c, n, D), and `log_prob_out`, (c, n) or None."""

    def sample_rows(self, flow: FlowRecord, index: Any, group: Any, context: Any, seed: int, out: Any) -> None:
        """Fill `out`, (k, D), with the samples `index` under the contexts number `group`, (k,) uint64 both; `context` is (k, C)."""

    def vjp(self, flow: FlowRecord, x: Any, context: Any, cotangent: Any, value: Any, dx: Any, dcontext: Any, dparameters: Any) -> None:
        """Fill those of the last four that are not None; `dcontext` has one row for each of x."""

    def trainer(self, flow: FlowRecord, **options: Any) -> Any:
        """An engine of `fastmaf.train`."""


class Part(NamedTuple):
    """What an engine of `fastmaf.train` has of each batch, where several train together.

    Attributes
    ----------
    ends : (steps,) int64 array
        Where its rows of each batch end; none is a part too.
    sizes : (steps,) array
        Rows of the whole batches.
    total : callable, optional
        ``total(gradient, loss)`` replaces two arrays, of the dtype of the flow and (1,) in double, by their sums over all engines.
    """

    ends: Any
    sizes: Any
    total: Callable[[Any, Any], object] | None = None

    @classmethod
    def whole(cls, rows: int, batch_size: int) -> Part:
        """Everything of batches of one size, the last one as it comes."""
        ends = np.minimum(batch_size * np.arange(1, -(-rows // batch_size) + 1), rows)
        return cls(ends, np.diff(ends, prepend=0))


class Own:
    """A backend that runs one flow with weights which are set in place; by a new record, where a backend has no better way."""

    def __init__(self, backend: Backend, flow: FlowRecord) -> None:
        self._backend, self._flow, self._free = backend, flow, flow.free_parameters()

    def set_parameters(self, parameters: Any) -> None:
        """Take other weights; those that masks leave out have no effect."""
        self._flow = self._flow.with_parameters(np.where(self._free, parameters, 0))

    def __getattr__(self, name: str) -> Any:
        run = getattr(self._backend, name)
        return lambda flow, *arguments: run(self._flow, *arguments)


def own(backend: Backend, flow: FlowRecord) -> Any:
    """The backend for one flow alone, with `set_parameters`; what it is called with in place of this flow does not matter."""
    made = getattr(backend, "own", None)
    return Own(backend, flow) if made is None else made(flow)


_REMEDIES = {
    "cpu": "install fastmaf from source with a C++17 compiler: pip install .",
    "numba": "pip install 'fastmaf[numba]'",
    "reference": "reinstall fastmaf",
    "cuda": "on a machine with an NVIDIA GPU and nvcc, pip install . --config-settings=cmake.define.FASTMAF_CUDA=ON",
}

names = tuple(_REMEDIES)
"""All backends, each a module of this package; the first one of the host that is there becomes the default."""

active: Backend | None = None
"""The backend in use; None until the first evaluation chooses one."""

default: Backend | None = None
"""The backend in use, if nobody named it: the reference may then compute in its place."""

_loaded: dict[str, Backend | str] = {}


def _load(name: str) -> Backend | str:
    """The backend, or why it is absent."""
    if not isinstance(name, str) or name not in names:
        raise ValueError(_words.one_of("backend", name, names))
    if name not in _loaded:
        try:
            _loaded[name] = importlib.import_module(f"{__name__}.{name}").backend
        except ImportError as error:
            if isinstance(error.__cause__, KeyboardInterrupt):  # while the core began: it is no reason to be without it
                raise error.__cause__ from None
            _loaded[name] = f"{error}; to get it: {_REMEDIES[name]}"
    return _loaded[name]


def reason(name: str) -> str | None:
    """Why a backend is absent, and what would bring it; None if it is there.

    Examples
    --------
    >>> reason("reference") is None
    True
    """
    loaded = _load(name)
    return loaded if isinstance(loaded, str) else None


def require(name: str) -> Backend:
    """The backend of this name.

    Raises
    ------
    RuntimeError
        If it is absent here; the text says why and what would bring it.
    """
    loaded = _load(name)
    if isinstance(loaded, str):
        raise RuntimeError(f"the {name} backend is absent: {loaded}")
    return loaded


def core() -> Any:
    """The compiled core as a module; None if it is absent."""
    return importlib.import_module("fastmaf._core") if reason("cpu") is None else None


def placed(device: str, precision: str) -> Backend:
    """The backend of a flow that was moved to a GPU.

    Raises
    ------
    RuntimeError
        If it, or the device, is absent here.
    """
    require("cuda")
    made: Backend = importlib.import_module(f"{__name__}.cuda").at(device, precision)
    return made


PURE = "FASTMAF_PURE"
"""Environment variable: with 1 the compiled core may be absent, and nothing is said of it."""


def pure() -> bool:
    """Whether the user knows that there is no compiled core."""
    return os.environ.get(PURE, "") not in ("", "0")


def choose() -> Backend:
    """The backend in use; the first call settles it, and warns if it is not the compiled core."""
    global active, default, _warned
    if active is None:
        active = default = next(loaded for loaded in map(_load, ("cpu", "numba", "reference")) if not isinstance(loaded, str))
        if active.name != "cpu" and not pure() and not _warned:
            _warned = True
            _words.warn(
                f"fastmaf computes with its {active.name} backend, many times slower than the compiled core, which is absent: "
                f"{_words.cut(str(reason('cpu')), 160)}; {PURE}=1 or set_backend({active.name!r}) silences this"
            )
    return active


_warned = False  # or the user has chosen a backend, and knows


def runner(record: FlowRecord, backend: Backend) -> Backend:
    """What runs a record: this backend, or the reference where this one is the default and lacks a kernel, of which one warning tells.

    Raises
    ------
    NotImplementedError
        If it lacks a kernel, and the user has named it.
    """
    if backend is default and (missing := backend.unsupported(record)) is not None:
        if missing not in told:
            _words.warn(f"{without_kernel(backend, missing)}; set_backend('reference') silences this")
            told.add(missing)
        return require("reference")
    record.approve(backend)
    return backend


told: set[str] = set()
"""What a warning has said to have no kernel."""


def without_kernel(backend: Backend, missing: str) -> str:
    """What to say of a flow that the reference runs."""
    return f"the {backend.name} backend has no kernel for {_words.cut(missing, 64)}: the reference runs this flow, many times slower"


def in_source_tree_without_core() -> str | None:
    """The folder, if this package is a source tree whose core was not compiled into it."""
    root = pathlib.Path(__file__).resolve().parents[2]
    if all((root / name).is_file() for name in ("CMakeLists.txt", "pyproject.toml")) and importlib.util.find_spec("fastmaf._core") is None:
        return str(root)
    return None


def get_backend() -> str:
    """Name of the backend in use.

    Examples
    --------
    >>> import fastmaf
    >>> fastmaf.get_backend() in ("cpu", "numba", "reference")
    True
    """
    return choose().name


def set_backend(name: str | None) -> None:
    """Choose what computes, for all flows of this process.

    Parameters
    ----------
    name : {"cpu", "numba", "reference", "cuda"} or None
        None goes back to the default: the first of "cpu", "numba" and "reference" that is there; a flow for which it lacks a kernel is run
        by the reference alone. With "cuda" every flow computes on the first GPU; `Flow.to` moves one.

    Raises
    ------
    ValueError
        If there is no backend of this name.
    RuntimeError
        If it is absent here; the text says why and what would bring it.

    Examples
    --------
    >>> import fastmaf
    >>> fastmaf.set_backend("reference")
    >>> fastmaf.get_backend()
    'reference'
    >>> fastmaf.set_backend(None)
    """
    global active, default, _warned
    active, default = None if name is None else require(name), None
    _warned = True
