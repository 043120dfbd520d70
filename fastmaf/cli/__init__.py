"""The command ``fastmaf``: fit, score, sample, picture and describe flows from a shell; each command has a module."""

from __future__ import annotations

import errno
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import fastmaf
from fastmaf.cli import _bench, _convert, _demo, _evaluate, _fit, _show, _streams
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
        The exit status: 0, 1 after an error, 2 after one of usage, 3 after a fit that learned nothing, 130 after Ctrl-C, 129 after SIGHUP
        and 143 after SIGTERM, 141 where nobody reads what is written.

    Examples
    --------
    >>> main(["info"])  # doctest: +ELLIPSIS
    fastmaf ...
    0
    """
    _streams.standard()
    command = None
    with warnings.catch_warnings(), _ended_as_interrupted() as ended:
        _show_warnings()
        try:
            try:
                arguments = _parser().parse_args(argv)
            except SystemExit:  # of --help too, which may have had no room
                sys.stdout.flush()
                raise
            command = arguments.command
            status: int = arguments.run(arguments)
            sys.stdout.flush()
        except BrokenPipeError as error:
            status = 141 if error.filename is None else _failed(_words_of(error), 141)
        except KeyboardInterrupt:
            status = _failed("interrupted", 130)
        except UsageError as error:
            status = _failed(f"{error} (fastmaf {command} --help says more)", 2)
        except OSError as error:
            status = _failed(_words_of(error), 1)
        except MemoryError:
            status = _failed("there is not enough memory", 1)
        except (ImportError, RuntimeError, ValueError) as error:
            status = _failed(_in_options(str(error)), 1)
        if status == 130 and ended:
            status = 128 + ended[0]
    if status:
        _streams.give_up("stdout")
    return status


@contextmanager
def _ended_as_interrupted() -> Iterator[list[int]]:
    """Where SIGTERM, with which batch systems end a job, and SIGHUP, of a terminal that goes, are what Ctrl-C is; the list has them then.

    A SIGHUP that is ignored, as under nohup, stays so. Only the first one counts, because a terminal that goes sends several.
    """
    ended: list[int] = []

    def end(number: int, _: Any) -> None:
        again = number in ended and number == hangup
        ended.append(number)
        if not again:
            raise KeyboardInterrupt

    hangup = getattr(signal, "SIGHUP", None)
    before: dict[int, Any] = {}
    try:
        with suppress(ValueError):  # not in the main thread
            if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # of `_start`
                signal.signal(signal.SIGINT, signal.default_int_handler)
            for number in (signal.SIGTERM, hangup):
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, end)
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _words_of(error: OSError) -> str:
    of_stdout = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EBADF, errno.EIO)
    words = ("stdout" if of_stdout else error.filename, error.strerror) if error.strerror else (str(error),)
    return ": ".join(str(word) for word in words if word is not None)


def _failed(text: str, status: int) -> int:
    note(" ".join(text.split()))
    return status


_ARGUMENT = re.compile(r"""\b(activation|resume|standardize|validation|max_seconds|clip_norm)=(["']?)([\w.+-]+)\2|(?<=, or )clip_norm\b""")


def _in_options(text: str) -> str:
    """What messages of the library say of arguments, in words of the command.

    Examples
    --------
    >>> _in_options("pass resume=True to go on from it"), _in_options('or pass standardize="again"')
    ('pass --resume to go on from it', 'or pass --standardize again')
    >>> _in_options("try a lower lr than 0.1, or clip_norm"), _in_options("clip_norm.csv lacks column 'clip_norm'")
    ('try a lower lr than 0.1, or --clip-norm', "clip_norm.csv lacks column 'clip_norm'")
    """

    def option(found: re.Match[str]) -> str:
        name, value = found[1] or "clip_norm", found[3]
        words = "--seconds" if name == "max_seconds" else f"--{name.replace('_', '-')}"
        return words if value in (None, "True") else f"{words} {value}"

    return _ARGUMENT.sub(option, text)


def _show_warnings() -> None:
    """Warnings in a line each, and each once."""
    said: set[str] = set()

    def show(message: Warning | str, *_: Any) -> None:
        if (text := " ".join(str(message).split())) not in said:
            said.add(text)
            note(f"warning: {_in_options(text)}")

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
