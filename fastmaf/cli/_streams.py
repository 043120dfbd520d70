"""The three standard streams, also where they are closed, full, or nobody is there any more."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import IO

__all__ = ["give_up", "say", "standard", "stdin", "stdout"]

_instead: dict[str, IO[str]] = {}
"""What is there for those that were closed when the command was called."""


def standard() -> None:
    """Put something in the place of closed streams, so that no file gets their numbers and nothing meant for one goes to another.

    What is read from stdin then or written to stdout fails; what is said on stderr is lost.
    """
    for name, flags, mode in (("stdin", os.O_WRONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w")):
        if getattr(sys, name) is None:
            _instead[name] = open(os.open(os.devnull, flags), mode, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
            setattr(sys, name, _instead[name])


def stdin() -> IO[bytes]:
    """What is piped into the command."""
    return _open("stdin")


def stdout() -> IO[bytes]:
    """Where bytes are written that go out of the command."""
    return _open("stdout")


def _open(name: str) -> IO[bytes]:
    stream = getattr(sys, name)
    if stream is _instead.get(name):
        raise ValueError(f"{name} is closed")
    found: IO[bytes] = stream.buffer
    return found


def say(text: str) -> None:
    """Write a line to stderr, if that is possible: nothing fails because nobody listens."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        give_up("stderr")


def give_up(name: str) -> None:
    """Forget what cannot be written to a stream, so that the interpreter does not try again when it ends."""
    stream = getattr(sys, name)
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            number, null = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)
            stream.flush()
