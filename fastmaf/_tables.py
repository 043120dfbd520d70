"""Data frames, known by what they offer (those of pandas, polars, pyarrow and their like): columns by name, converted one by one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmaf import _words

__all__ = ["check_rows", "column", "framer", "has_other_labels", "is_column", "is_table", "is_weighted", "labels", "matrix", "names_of"]

Array = NDArray[Any]

FRAMES = ("pandas", "polars", "pyarrow")
"""Libraries whose frames can be had."""


def is_table(value: Any) -> bool:
    """Whether this is a data frame."""
    kind = type(value)
    return any(hasattr(kind, name) for name in ("columns", "column_names")) and any(hasattr(kind, name) for name in ("dtypes", "schema"))


def is_column(value: Any) -> bool:
    """Whether this is a column of a data frame."""
    return hasattr(type(value), "to_numpy") and not is_table(value)


def check_rows(name: str, rows: Any, other_name: str, other: Any) -> None:
    """Refuse frames or columns of the same row labels in another order: rows go by place, and a person may think they go by label.

    Raises
    ------
    ValueError
        Where both have an index (pandas), and one is the other in another order.
    """
    own, beside = (getattr(value, "index", None) for value in (rows, other))
    if not all(callable(getattr(index, "equals", None)) and hasattr(index, "sort_values") for index in (own, beside)):
        return
    try:
        moved = len(own) == len(beside) and not own.equals(beside) and own.sort_values().equals(beside.sort_values())  # type: ignore[union-attr, arg-type]
    except (TypeError, ValueError):  # labels without an order
        return
    if moved:
        raise ValueError(
            f"{other_name} has the row labels of {name} in another order, and rows go by place: {other_name}.loc[{name}.index]"
        )


def labels(table: Any) -> list[Any]:
    """The labels of its columns; those of chains of anesthetic without what stands beside them in pictures."""
    found = list(table.column_names if hasattr(type(table), "column_names") else table.columns)
    if hasattr(type(table), "drop_labels") and all(isinstance(label, tuple) and len(label) == 2 for label in found):
        return [label for label, _ in found]
    return found


def is_weighted(value: Any) -> bool:
    """Whether this is a data frame that carries weights of its rows with it, as chains of anesthetic do."""
    return is_table(value) and hasattr(type(value), "isweighted") and hasattr(type(value), "get_weights") and bool(value.isweighted())


def names_of(value: Any) -> tuple[str, ...] | None:
    """The labels of a data frame if they can serve as names: text, all different; None for anything else."""
    if not is_table(value) or _lazy(value):
        return None
    found = labels(value)
    return tuple(found) if all(isinstance(label, str) for label in found) and len(set(found)) == len(found) else None


def has_other_labels(value: Any) -> bool:
    """Whether this is a data frame with labels that cannot serve as names and do not just count its columns."""
    return is_table(value) and names_of(value) is None and (found := labels(value)) != list(range(len(found)))


def matrix(name: str, table: Any, names: Sequence[str] | None = None) -> Array:
    """The columns of these names, or all from left to right if there are no names, as one C-ordered array (n, D).

    Raises
    ------
    ValueError
        If a name is missing or there twice, or a column has missing values or holds no real numbers; all such columns are named.
    """
    if method := _lazy(table):
        lazily = f", or {name}[names].to_dask_array()" if hasattr(type(table), "to_dask_array") else ""
        raise ValueError(f"{name} is a lazy table, {_words.shown(table)}; hand over {name}.{method}(){lazily}")
    found = labels(table)
    places = range(len(found)) if names is None else _places(name, found, names)
    columns = [_numbers(_column(table, found[j], j)) for j in places]
    absent = [_words.shown(found[j]) for j, given in zip(places, columns, strict=True) if given is None]
    if absent:
        raise ValueError(f"{name} has missing values in {_words.named(absent)}; fill or drop them first")
    wrong = [f"{_words.shown(found[j])} ({given})" for j, given in zip(places, columns, strict=True) if isinstance(given, str)]
    if wrong:
        remedy = ": give the number of each category, as .cat.codes does" if any("(category)" in label for label in wrong) else ""
        raise ValueError(f"{name} must hold real numbers; it has {_words.named(wrong)}{remedy}")
    arrays = [given for given in columns if isinstance(given, np.ndarray)]
    result = np.empty((len(table), len(arrays)), np.result_type(*arrays) if arrays else np.float64)
    for j, array in enumerate(arrays):
        result[:, j] = array
    return result


def column(name: str, value: Any) -> Array:
    """One column by itself."""
    result = _numbers(value)
    if result is None:
        raise ValueError(f"{name} has missing values; fill or drop them first")
    if isinstance(result, str):
        raise ValueError(f"{name} has dtype {result}; it must hold real numbers")
    return result


def framer(name: str, kind: Any, names: Sequence[str] | None, features: int) -> Callable[[Any], Any]:
    """What makes a frame of rows (n, D): of `names`, or of x0, x1, ... where there are none.

    Raises
    ------
    ValueError
        If `kind` is none of `FRAMES`.
    ImportError
        If that library is not installed.
    """
    if not isinstance(kind, str) or kind not in FRAMES:
        raise ValueError(_words.one_of(name, kind, FRAMES))
    try:
        library = importlib.import_module(kind)
    except ImportError:
        raise ImportError(f"{name} is {kind!r}, which is not installed: pip install {kind}") from None
    labels = [f"x{j}" for j in range(features)] if names is None else list(names)

    def frame(rows: Any) -> Any:
        rows = np.asarray(rows)
        if kind == "pandas":
            return library.DataFrame(rows, columns=labels)
        if kind == "polars":
            return library.DataFrame(rows, schema=labels, orient="row")
        return library.table([np.ascontiguousarray(column) for column in rows.T], names=labels)

    return frame


def _lazy(table: Any) -> str:
    """The method that computes a table which is only planned."""
    return next((method for method in ("collect", "compute") if hasattr(type(table), method)), "")


def _places(name: str, found: Sequence[Any], names: Sequence[str]) -> list[int]:
    place = {label: j for j, label in reversed(list(enumerate(found)))}
    missing = [_words.shown(label) for label in names if label not in place]
    if missing:
        text = all(isinstance(label, str) for label in found)
        remedy = "rename them, or hand over an array" if text else f"its labels are not text: rename them, or pass {name}.to_numpy()"
        raise ValueError(f"{name} lacks {_words.named(missing)}, by which the flow names its variables; {remedy}")
    twice = [_words.shown(label) for label in names if found.count(label) > 1]
    if twice:
        raise ValueError(f"{name} has several of {_words.named(twice)}; rename them")
    return [place[label] for label in names]


def _column(table: Any, label: Any, place: int) -> Any:
    if hasattr(type(table), "iloc"):
        return table.iloc[:, place]
    if hasattr(type(table), "to_series"):
        return table.to_series(place)
    return table.column(place) if hasattr(type(table), "column") else table[label]


def _numbers(values: Any) -> Array | str | None:
    """The numbers of a column; None if some are missing, the dtype if it holds none."""
    dtype = getattr(values, "dtype", None)
    word = str(getattr(values, "type", None) or dtype)
    if isinstance(dtype, np.dtype):
        array = np.asarray(values.to_numpy())
    elif (missing := getattr(values, "null_count", None)) is not None:  # polars, pyarrow
        if missing() if callable(missing) else missing:
            return None
        try:
            array = np.asarray(values if hasattr(values, "__array__") else values.to_numpy())  # pyarrow's to_numpy refuses booleans
        except Exception:  # what NumPy has no type for, which polars says in a class of its own
            return _words.cut(word, 20)
        if array.dtype.kind == "O" and word.lower().startswith("decimal"):
            array = array.astype(np.float64)
    else:  # extension dtypes of pandas
        if getattr(dtype, "kind", "O") not in "fiub" and not word.startswith("decimal"):
            return _words.cut(word, 20)
        if values.isna().any():
            return None
        array = np.asarray(values.to_numpy(dtype=np.float64 if word.startswith("decimal") else getattr(dtype, "numpy_dtype", np.float64)))
    return array if array.dtype.kind in "fiub" and array.ndim == 1 else _words.cut(word, 20)
