"""The command ``fastmaf``: fit, score, sample, picture and describe flows from a shell; each command has a module."""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import fastmaf
from fastmaf.cli import _bench, _convert, _demo, _evaluate, _fit, _show
from fastmaf.cli._common import Parser, UsageError, note

__all__ = ["main"]

EXAMPLES = """\
  fastmaf fit galaxies.csv -o flow.safetensors
  fastmaf log-prob flow.safetensors galaxies.csv -o log_prob.csv
  fastmaf sample flow.safetensors -n 1000 -o samples.csv
  fastmaf plot flow.safetensors galaxies.csv -o corner.png
  fastmaf fit --help"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process if None.

    Returns
    -------
    int
        The exit status: 0, 1 after an error, 2 after one of usage, 130 after Ctrl-C and 143 after SIGTERM, 141 where nobody reads
        what is written.

    Examples
    --------
    >>> main(["info"])  # doctest: +ELLIPSIS
    fastmaf ...
    0
    """
    arguments = _parser().parse_args(argv)
    with warnings.catch_warnings(), _ended_as_interrupted() as ended:
        _show_warnings()
        try:
            status: int = arguments.run(arguments)
            sys.stdout.flush()
        except BrokenPipeError:
            status = 141
        except KeyboardInterrupt:
            status = _failed("interrupted", 130)
        except UsageError as error:
            status = _failed(f"{error} (fastmaf {arguments.command} --help says more)", 2)
        except OSError as error:
            where = "stdout" if error.filename is None and error.errno == errno.ENOSPC else error.filename
            words = (where, error.strerror) if error.strerror else (str(error),)
            status = _failed(": ".join(str(word) for word in words if word is not None), 1)
        except MemoryError:
            status = _failed("there is not enough memory", 1)
        except (ImportError, RuntimeError, ValueError) as error:
            status = _failed(str(error), 1)
        if status == 130 and ended:
            status = 143
    if status:
        _drop_stdout()
    return status


@contextmanager
def _ended_as_interrupted() -> Iterator[list[int]]:
    """Where SIGTERM, with which batch systems end a job, is what Ctrl-C is; the list has it then."""
    ended: list[int] = []

    def end(number: int, _: Any) -> None:
        ended.append(number)
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not in the main thread
        yield ended
        return
    try:
        yield ended
    finally:
        signal.signal(signal.SIGTERM, before)


def _failed(text: str, status: int) -> int:
    with suppress(OSError):
        note(" ".join(text.split()))
    return status


def _drop_stdout() -> None:
    """Give up what could not be written, so that the interpreter does not try again when it ends."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warnings() -> None:
    """Warnings in a line each, and each once."""
    said: set[str] = set()

    def show(message: Warning | str, *_: Any) -> None:
        if (text := " ".join(str(message).split())) not in said:
            said.add(text)
            note(f"warning: {text}")

    warnings.showwarning = cast("Any", show)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        for category in (UserWarning, RuntimeWarning):
            warnings.simplefilter("always", category)


def _parser() -> Parser:
    parser = Parser(prog="fastmaf", description="Masked autoregressive flows at the speed of the hardware.", examples=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"fastmaf {fastmaf.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command", parser_class=Parser)
    for module in (_fit, _evaluate, _show, _convert, _bench, _demo):
        module.add(commands)
    return parser
