"""What was built, what runs, and on how many threads."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import numpy as np

from fastmaf import _arrays, _words, backends

__all__ = ["Report", "available_isas", "get_isa", "get_num_threads", "num_threads", "set_isa", "set_num_threads", "show_config", "version"]


def version() -> str:
    """The version of fastmaf.

    Examples
    --------
    >>> isinstance(version(), str)
    True
    """
    try:
        return metadata.version("fastmaf")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def _core() -> Any:
    """The compiled core.

    Raises
    ------
    RuntimeError
        If it is absent.
    """
    backends.require("cpu")
    return backends.core()


def set_num_threads(n: int) -> None:
    """Set how many threads the compiled core may use, in all threads of this process and from their next call on.

    Without this call it is ``FASTMAF_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the number of CPUs that this process may use.
    Results do not depend on it.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    ValueError
        If n is not a positive integer.
    RuntimeError
        If the compiled core is absent.

    Examples
    --------
    >>> import fastmaf
    >>> fastmaf.set_num_threads(2)  # doctest: +SKIP
    """
    n = _arrays.count("n", n, lowest=1, limit=2**31)
    _core().set_num_threads(n)


def get_num_threads() -> int:
    """How many threads the compiled core may use.

    Raises
    ------
    RuntimeError
        If the compiled core is absent.

    Examples
    --------
    >>> import fastmaf
    >>> fastmaf.get_num_threads()  # doctest: +SKIP
    2
    """
    return int(_core().num_threads())


@contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Use n threads inside a with block.

    The block holds for the Python thread that runs it, and for its own task where several take turns in one thread (asyncio): others
    keep theirs, and threads that the block starts begin with the number of the process. Blocks nest; `set_num_threads` inside one
    holds behind it.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    ValueError, RuntimeError
        As in `set_num_threads`.

    Examples
    --------
    >>> import fastmaf
    >>> with fastmaf.num_threads(1):  # doctest: +SKIP
    ...     flow.log_prob(x)
    """
    n = _arrays.count("n", n, lowest=1, limit=2**31)
    variable = _core().threads_of_context
    previous = variable.get(None)
    variable.set(n)
    try:
        yield
    finally:
        variable.set(previous)


def available_isas() -> tuple[str, ...]:
    """The instruction sets that the compiled core was built for and this CPU has, widest first.

    Raises
    ------
    RuntimeError
        If the compiled core is absent.

    Examples
    --------
    >>> import fastmaf.config
    >>> fastmaf.config.available_isas()  # doctest: +SKIP
    ('avx512', 'avx2', 'baseline')
    """
    return tuple(_core().available_isas())


def get_isa() -> str:
    """The instruction set that the compiled core uses.

    Raises
    ------
    RuntimeError
        If the compiled core is absent.

    Examples
    --------
    >>> import fastmaf.config
    >>> fastmaf.config.get_isa()  # doctest: +SKIP
    'avx512'
    """
    return str(_core().isa())


def set_isa(name: str | None) -> None:
    """Choose the instruction set of the compiled core; ``FASTMAF_ISA`` does so for a whole process.

    Parameters
    ----------
    name : {"baseline", "avx2", "avx512"} or None
        None takes what a new process would: that of ``FASTMAF_ISA``, else the widest.

    Raises
    ------
    ValueError
        If this CPU or this build lacks it.
    RuntimeError
        If the compiled core is absent.

    Examples
    --------
    >>> import fastmaf
    >>> fastmaf.set_isa("avx2")  # doctest: +SKIP
    """
    available = available_isas()
    name = os.environ.get("FASTMAF_ISA", available[0]) if name is None else name
    if not isinstance(name, str) or name not in available:
        raise ValueError(f"isa is {_words.shown(name)}; this machine and this build have {', '.join(map(repr, available))}")
    _core().set_isa(name)


class Report:
    r"""What `show_config` found out.

    Attributes
    ----------
    values : dict of str to str
        Line by line.

    Examples
    --------
    >>> str(Report({"threads": "2", "isa": "avx2"}))
    'threads  2\nisa      avx2'
    """

    def __init__(self, values: dict[str, str]) -> None:
        self.values = values

    def __repr__(self) -> str:
        width = max(map(len, self.values))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.values.items())


def show_config() -> Report:
    """What this installation of fastmaf has, what it uses, and why the rest is absent.

    Returns
    -------
    Report
        Its repr is a table; nothing is printed.

    Examples
    --------
    >>> import fastmaf
    >>> "reference" in fastmaf.show_config().values
    True
    """
    values = {
        "fastmaf": version(),
        "python": f"{platform.python_version()}, NumPy {np.__version__}, {platform.system()} {platform.machine()}",
        "backend": backends.get_backend(),
    }
    for name in backends.names:
        missing = backends.reason(name)
        values[name] = "available" if missing is None else f"absent: {missing}"
    if backends.reason("cpu") is None:
        state = _core().device_state()
        if state["built"]:
            values["cuda kernels"] = f"for {state['architectures']}; {state['versions']}"
        for number, gpu in enumerate(state["gpus"]):
            values[f"cuda:{number}"] = gpu
        values["built"] = ", ".join(f"{key} {_in_words(value)}" for key, value in _core().build_info().items())
        try:
            values["isa"] = f"{get_isa()}, of {', '.join(available_isas())}{_from('FASTMAF_ISA')}"
        except ValueError as error:
            values["isa"] = f"{error}{_from('FASTMAF_ISA')}"
        values["threads"] = f"{get_num_threads()}{_from('FASTMAF_NUM_THREADS') or _from('OMP_NUM_THREADS')}"
    return Report(values)


def _in_words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _from(variable: str) -> str:
    return f" ({variable}={os.environ[variable]})" if variable in os.environ else ""
