"""Words for messages: what a caller gave, in a few characters, whatever it was, and never its contents."""

from __future__ import annotations

import operator
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

__all__ = ["astray", "columns", "count", "cut", "flag", "gathering", "named", "number", "of_type", "one_of", "shapes", "shown", "warn"]

LONGEST = 60
"""Characters of the longest word for a value."""

FEW = 3
"""Columns that a message names; it counts the others."""

_SCALARS = (bool, int, float, complex, str, bytes, type(None), np.number, np.bool_)
_CONTAINERS = (tuple, list, set, frozenset, dict)


def cut(text: str, longest: int = LONGEST) -> str:
    """The text in one line, its middle left out where it is long.

    Examples
    --------
    >>> cut("abcdefghij", 7)
    'ab...ij'
    """
    text = " ".join(text.split()) if "\n" in text else text
    half = (longest - 3) // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"


def shown(value: Any) -> str:
    """A value that a caller gave: itself if it is short, else what it is.

    Numbers, text and short tuples or lists of them stand as Python writes them; arrays by shape and dtype; all else by type and length.

    Examples
    --------
    >>> shown("tanh"), shown((100, 50)), shown(np.zeros((4, 2))), shown([0.5] * 1000)
    ("'tanh'", '(100, 50)', 'an array of shape (4, 2) and dtype float64', 'a list of length 1000')
    """
    kind = type(value)
    if isinstance(value, (str, bytes)):
        short = value if len(value) <= LONGEST else value[:25] + (b"..." if isinstance(value, bytes) else "...") + value[-25:]  # type: ignore[operator]
        return cut(repr(short))
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 150:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (np.number, np.bool_)):
        return cut(str(value))
    if isinstance(value, np.dtype):
        return cut(repr(value))
    if isinstance(value, _SCALARS) and kind.__module__ == "builtins":
        return cut(repr(value))
    if kind in _CONTAINERS:
        if len(value) <= 8 and kind is not dict and all(isinstance(item, _SCALARS) for item in value):
            words = ", ".join(map(shown, value))
            words = f"({words}{',' * (len(value) == 1)})" if kind is tuple else f"[{words}]" if kind is list else f"{{{words}}}"
            if len(words) <= LONGEST:
                return words
        return f"a {kind.__name__} of length {len(value)}"
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if dtype is not None and isinstance(shape, Sequence):
        return cut(f"an array of shape {cut(str(tuple(shape)), 24)} and dtype {cut(str(dtype), 16)}")
    if isinstance(value, type):
        return f"the type {cut(value.__name__, 40)}"
    return f"of type {cut(kind.__name__, 40)}"


def of_type(name: str, value: Any, kind: type) -> None:
    """Refuse what is of another type.

    Examples
    --------
    >>> of_type("base", 3, dict)
    Traceback (most recent call last):
    ValueError: base is 3; it must be of type dict
    """
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {shown(value)}; it must be of type {kind.__name__}")


def one_of(name: str, value: Any, allowed: Iterable[str]) -> str:
    """What to say of a word that is none of those allowed.

    Examples
    --------
    >>> one_of("law", 3, ("exp", "clamp"))
    "law is 3; it must be one of 'exp', 'clamp'"
    """
    return f"{name} is {shown(value)}; it must be one of {', '.join(map(repr, allowed))}"


def columns(which: Iterable[int], names: Sequence[str] | None = None) -> str:
    """Columns by name, or by number where they have none; the first few of many.

    Examples
    --------
    >>> columns([1]), columns([1], ["u", "g"]), columns(range(6))
    ('column 1', "column 'g'", 'columns 0, 1, 2 and 3 more')
    """
    which = [int(column) for column in which]
    return named([shown(column if names is None else names[column]) for column in which])


def named(labels: Sequence[str]) -> str:
    """Columns by their labels; the first few of many.

    Examples
    --------
    >>> named(["'u'", "'g'"])
    "columns 'u', 'g'"
    """
    first = ", ".join(cut(label, 30) for label in labels[:FEW])
    more = f" and {len(labels) - FEW} more" if len(labels) > FEW else ""
    return f"column{'s' * (len(labels) != 1)} {first}{more}"


def number(name: str, value: Any) -> float:
    """A real number; any, infinite ones too, but neither text nor a truth value.

    Examples
    --------
    >>> number("clip", np.float32(2))
    2.0
    """
    try:
        if isinstance(value, (str, bytes, bool, np.bool_)):  # which float() takes
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(f"{name} is {shown(value)}; it must be a number") from None


def count(name: str, value: Any, lowest: int = 0, limit: int = 2**63, must: str = "an integer") -> int:
    """An integer in [lowest, limit); no truth value.

    Examples
    --------
    >>> count("n", np.int32(3))
    3
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {shown(value)}; it must be {must}") from None
    if not lowest <= number < limit:
        bound = f"at least {lowest}" if number < lowest else f"below {limit}"
        raise ValueError(f"{name} is {shown(number)}; it must be {bound}")
    return number


def flag(name: str, value: Any) -> bool:
    """True or False; 1 and 0 too.

    Examples
    --------
    >>> flag("residual", np.True_)
    True
    """
    if not isinstance(value, (bool, np.bool_, int, np.integer)) or value not in (0, 1):
        raise ValueError(f"{name} is {shown(value)}; it must be True or False")
    return bool(value)


_gathered: ContextVar[list[tuple[str, type[Warning]]] | None] = ContextVar("_gathered", default=None)


@contextmanager
def gathering() -> Iterator[list[tuple[str, type[Warning]]]]:
    """Have the warnings of this thread put into a list, for another one to give them at a line of the caller's.

    Examples
    --------
    >>> with gathering() as notes:
    ...     warn("something is odd")
    >>> notes
    [('something is odd', <class 'RuntimeWarning'>)]
    """
    notes: list[tuple[str, type[Warning]]] = []
    token = _gathered.set(notes)
    try:
        yield notes
    finally:
        _gathered.reset(token)


def warn(text: str, category: type[Warning] = RuntimeWarning) -> None:
    """A warning at the line that called the package."""
    if (notes := _gathered.get()) is not None:
        notes.append((text, category))
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "fastmaf":
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)


def astray(permutation: Any) -> str:
    """What keeps numbers from being a permutation of 0, 1, ...: the first one that is out of range or there twice, in brackets.

    Examples
    --------
    >>> astray(np.array([0, 2, 2])), astray(np.array([0, 3]))
    (' (2 is there twice)', ' (3 is out of range)')
    """
    seen = np.bincount(permutation[(permutation >= 0) & (permutation < permutation.size)], minlength=permutation.size)
    wrong = permutation[(permutation < 0) | (permutation >= permutation.size)]
    if wrong.size:
        return f" ({wrong[0]} is out of range)"
    return f" ({int(np.argmax(seen > 1))} is there twice)" if (seen > 1).any() else ""


def shapes(shape: Sequence[int]) -> str:
    """A shape, however many axes it has.

    Examples
    --------
    >>> shapes((4, 2))
    '(4, 2)'
    """
    return cut(str(tuple(shape)), 40)
