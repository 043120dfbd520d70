"""Writing files whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import IO

from fastmaf import _words

__all__ = ["read", "save", "write", "writing"]


def read(name: str, path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file; `name` is what the caller knows the path as."""
    with _opening(name, path), open(path, "rb") as file:
        return file.read()


@contextmanager
def _opening(name: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Where the path is opened: errors name what the caller gave, in a line."""
    text = os.fsdecode(path)
    if not text or "\0" in text:
        raise ValueError(f"{name} is {_words.shown(text)}; it must be a path")
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise type(error)(error.errno, error.strerror, _words.cut(text, 200)) from None  # the path that the caller knows


def save(data: bytes, path_or_file: str | os.PathLike[str] | IO[bytes]) -> None:
    """Put bytes into a path or a binary file."""
    if isinstance(path_or_file, (str, os.PathLike)):
        write(path_or_file, data, "path_or_file")
    elif callable(getattr(path_or_file, "write", None)):
        try:
            path_or_file.write(data)
        except (TypeError, io.UnsupportedOperation):
            raise ValueError('path_or_file is a file of text, or not open for writing; open it with "wb"') from None
    else:
        raise ValueError(f"path_or_file is {_words.shown(path_or_file)}; it must be a path or a binary file")


def write(path: str | os.PathLike[str], data: bytes, name: str = "path") -> None:
    """Put bytes into a file that holds either all of them or what it held before.

    Examples
    --------
    >>> import os, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(os.path.join(folder, "x"), b"123")
    ...     os.listdir(folder)
    ['x']
    """
    with writing(path, name) as file:
        file.write(data)


@contextmanager
def writing(path: str | os.PathLike[str], name: str = "path") -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of what was there at the end of the block, unless that ends with an exception.

    What is written goes to a temporary file beside it, which is locked until it has its name: what lies there unlocked was left by a
    writer that was killed, and is swept away. What is no regular file (a pipe, a device) is written as it is.

    Examples
    --------
    >>> import os, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with writing(os.path.join(folder, "x")) as file:
    ...         _ = file.write(b"123")
    ...     os.listdir(folder)
    ['x']
    """
    with _naming(path), ExitStack() as stack:
        with _opening(name, path):
            target = os.path.realpath(path)
            regular = os.path.isfile(target) or not os.path.exists(target)
            file = stack.enter_context(_temporary(target) if regular else open(target, "wb"))  # noqa: SIM115
        yield file
        file.flush()
        if regular:
            with _opening(name, path):
                os.fsync(file.fileno())
                os.replace(file.name, target)
    if regular:
        _sweep(target)


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Where a file is written: when there is no room for it, the error says for what."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or error.filename is not None:
            raise
        raise type(error)(error.errno, error.strerror, _words.cut(os.fsdecode(path), 200)) from None


@contextmanager
def _temporary(target: str) -> Iterator[IO[bytes]]:
    """A new file beside the target, locked while it is written; gone afterwards, unless it was given another name."""
    while True:
        name = f"{target}.{secrets.token_hex(8)}.tmp"
        try:  # before the file is there, since Ctrl-C may come at any time
            with open(name, "xb") as file:
                # Before the lock was there, somebody may have taken the file for one of a dead writer.
                if _lock(file) and os.path.exists(name):
                    yield file
                    return
        finally:
            _unlink(name)


def _lock(file: IO[bytes]) -> bool:
    """Take the lock of a file, which goes with its writer; False if another has it. Where there are no locks, all have them."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


def _unlink(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


def _sweep(target: str) -> None:
    """Remove the temporary files of writers that are dead; nothing where locks cannot tell."""
    folder, name = os.path.split(target)
    pattern = re.compile(re.escape(name) + r"\.[0-9a-f]{16}\.tmp")
    with suppress(OSError, ImportError):
        import fcntl

        for entry in filter(pattern.fullmatch, os.listdir(folder)):
            with suppress(OSError), open(os.path.join(folder, entry), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _unlink(file.name)
