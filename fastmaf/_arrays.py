"""The only validator: every array, count, seed and offset that a caller hands over is judged here.

Backends take any strides and the dtypes of `NATIVE`, so that only long doubles and foreign byte orders are converted here.  An ndarray
without context leaves `rows` by its first return: a call on one row takes a few microseconds altogether, and the time spent here is felt.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastmaf import _device, _tables, _words

__all__ = [
    "LAYOUTS",
    "NATIVE",
    "Seed",
    "by_column",
    "contexts",
    "count",
    "cotangents",
    "empty",
    "finite",
    "float_dtype",
    "names",
    "output",
    "real",
    "rows",
    "sample_dtype",
    "seed_and_offsets",
    "seed_or_fresh",
]

Array = NDArray[Any]
Shape = tuple[int, ...]
Seed = int | np.integer[Any] | np.random.Generator | np.random.BitGenerator | np.random.SeedSequence | None

FAR = 100
"""Standard deviations of the contexts of a fit beyond which a context is none of them."""

count = _words.count

NATIVE = frozenset(map(np.dtype, "?bhilqBHILQefd"))
"""What backends read: booleans, integers and floats of at most 64 bits in the byte order of this machine."""

LAYOUTS: Mapping[tuple[int, int], tuple[str, str]] = MappingProxyType(
    {
        (2, 1): ("", "one for all rows"),
        (2, 2): ("n", "one for each row"),
        (2, 3): ("cn", "the n rows under each of c contexts (c, 1, C), or under contexts of their own"),
        (3, 1): ("", "one for all rows"),
        (3, 2): ("c", "one for each group of n rows"),
        (3, 3): ("cn", "one for each group (c, 1, C), or for each row"),
    }
)
"""By the dimensions of x, (n, D) or (c, n, D), and of the context: which axes of the rows the context has, and what it is to them.

Axes of length 1 fit any length, as in NumPy.  A context (c, C) beside rows (c, n, D) is the one case that NumPy would place otherwise.
"""


def real(name: str, value: Any, device: str = "cpu", names: Sequence[str] | None = None) -> Array:
    """An array of real numbers in a dtype of `NATIVE`; an array in one of them as it lies in memory, on the device of the flow or the host.

    A data frame gives its columns of these names, or all from left to right without names.

    Raises
    ------
    ValueError
        For complex numbers, objects, strings and dates, CUDA arrays, tensors that require a gradient, masked or missing entries,
        ragged lists.
    """
    if type(value) is not np.ndarray:
        value = _foreign(name, value, device, names)
        if isinstance(value, _device.DeviceArray):
            return cast("Array", value)
    if value.dtype in NATIVE:
        return cast("Array", value)
    if value.dtype.kind not in "fiub":
        if value.ndim == 0 and value.dtype.kind == "O":
            raise ValueError(f"{name} is {_words.shown(value.item())}; it must be an array of real numbers")
        remedy = f": {name}.astype(float), if they are" if value.dtype.kind == "O" else ""
        raise ValueError(f"{name} has dtype {_words.cut(str(value.dtype))}; it must hold real numbers{remedy}")
    return cast("Array", value.astype(np.float64 if value.dtype.kind == "f" else value.dtype.newbyteorder("=")))


def fetched(name: str, value: Any, device: str) -> Any:
    """A copy on the host of an array of this GPU; anything else as it is."""
    return cast("Any", real(name, value, device)).host() if _device.is_on_device(name, value) else value


def weights(name: str, value: ArrayLike, largest: Callable[[float], float] = float) -> NDArray[np.float64]:
    """Weights of rows, (n,), in other units: by a power of two, so that sums of them are finite.

    `largest` is given the largest of them, and says which is the largest of all that go with them.

    Raises
    ------
    ValueError
        If one is negative or not finite, all are zero, or the shape is another.

    Examples
    --------
    >>> weights("weights", [3, 0, 1]).tolist()
    [0.75, 0.0, 0.25]
    """
    array: NDArray[np.float64] = real(name, value).astype(np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {_words.shapes(array.shape)}; it must have one number per row")
    wrong = ~(np.isfinite(array) & (array >= 0))
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"{name} has {array[row]} in row {row}; weights must be finite and not negative")
    if array.size and not array.any():
        raise ValueError(f"{name} are all zero: no row is left; leave {name} out, or give some rows a positive one")
    # In other units, so that sums are finite; the powers of two leave all bits, and no row is lost.
    scaled: NDArray[np.float64] = np.ldexp(array, -np.frexp(largest(array.max(initial=1.0)))[1])
    return np.maximum(scaled, np.minimum(array, np.nextafter(0.0, 1.0)))


def _foreign(name: str, value: Any, device: str, names: Sequence[str] | None) -> Any:
    """What is no plain ndarray, as one, or as a `_device.DeviceArray`; without a copy where that can be."""
    if isinstance(value, _device.DeviceArray):
        return value
    if np.ma.is_masked(value):
        raise ValueError(f"{name} has masked entries; fill or drop them first")
    try:
        if isinstance(value, np.ndarray):
            return np.asarray(value)
        if _tables.is_table(value):
            return _tables.matrix(name, value, names)
        if _tables.is_column(value):
            return _tables.column(name, value)
        if _device.is_on_device(name, value):
            if device == "cpu":
                raise ValueError(
                    f"{name} is a CUDA array; this flow computes on the CPU: copy the array to the host first, or flow.to('cuda')"
                )
            return _device.wrap(name, value, device, NATIVE)
        if hasattr(value, "__dlpack__") and not (hasattr(value, "__array__") or hasattr(value, "__array_interface__")):
            return np.from_dlpack(value)
        return np.asarray(value)
    except (TypeError, RuntimeError, BufferError, OverflowError) as error:
        if "bfloat16" in str(getattr(value, "dtype", "")):
            raise ValueError(f"{name} has dtype bfloat16, which NumPy lacks: {name}.float()") from None
        raise ValueError(f"{name} is not an array: {_words.cut(str(error), 120)}") from None
    except ValueError as error:
        if str(error).startswith(f"{name} "):  # ours
            raise
        raise ValueError(f"{name} is not an array: {_words.cut(str(error), 120)}") from None


def rows(
    name: str,
    x: Any,
    context: Any,
    features: int,
    context_features: int,
    device: str = "cpu",
    names: Sequence[str] | None = None,
) -> tuple[Array, Array | None, Shape]:
    """Rows and their contexts, and the shape of one number per row.

    Parameters
    ----------
    name : str
        What the caller knows `x` as.
    x : (n, D) or (c, n, D) array
    context : None or array
        See `LAYOUTS`.
    features, context_features : int
        D and C of the flow.
    device : str
        Where the flow is: on a GPU arrays of that GPU are taken too.
    names : sequence of str, optional
        The columns that a data frame must have.

    Returns
    -------
    x, context : arrays
        As given, but that a context of fewer axes than its rows is (C,), or has got an axis of length 1: its axes and those of the rows
        broadcast as NumPy has it.
    shape : (n,) or (c, n)

    Raises
    ------
    ValueError
        If a shape or dtype does not fit the flow.

    Examples
    --------
    >>> rows("x", np.zeros((4, 2)), np.zeros((3, 1, 5)), 2, 5)[2]
    (3, 4)
    """
    array = x if type(x) is np.ndarray and x.dtype in NATIVE else real(name, x, device, names)
    if array is not x and context is not None:
        _tables.check_rows(name, x, "context", context)
    shape = array.shape
    if context is None and not context_features and len(shape) == 2 and shape[1] == features:
        return array, None, shape[:1]
    if len(shape) not in (2, 3) or shape[-1] != features:
        expected = f"the flow has {features} feature{'s' * (features != 1)}"
        if len(shape) not in (2, 3):
            expected += f", so {name} must be (n, {features}) or (c, n, {features})"
        raise ValueError(f"{name} has shape {_words.shapes(shape)}; {expected}")
    context = _context(context, context_features, device)
    _device.together(name, array, context)
    if context is None or context.ndim == 1:
        return array, context, shape[:-1]
    given = context.shape
    if len(given) == len(shape) and given[:-1] == shape[:-1]:
        return array, context, shape[:-1]
    if LAYOUTS[len(shape), len(given)][0] == "c":
        context = context[:, None]
    result = _joined(shape[:-1], context.shape[:-1])
    if result is None:
        raise ValueError(
            f"context has shape {_words.shapes(given)}, {name} has shape {_words.shapes(shape)}; context must be "
            f"{_allowed(shape, context_features)}"
        )
    return array, context, result


def _joined(a: Shape, b: Shape) -> Shape | None:
    """The shape that two shapes broadcast to; None if they do not."""
    if a == b:
        return a
    a, b = (1,) * (len(b) - len(a)) + a, (1,) * (len(a) - len(b)) + b
    if any(p != q and p != 1 and q != 1 for p, q in zip(a, b, strict=True)):
        return None
    return tuple(q if p == 1 else p for p, q in zip(a, b, strict=True))


def _allowed(shape: Shape, context_features: int) -> str:
    """The shapes of contexts that rows of this shape can have, in words."""
    size = dict(zip("cn" if len(shape) == 3 else "n", map(str, shape), strict=False))
    words = []
    for (ndim, _), (axes, _) in LAYOUTS.items():
        if ndim == len(shape):
            if len(axes) == 2:
                words.append(f"({size.get('c', 'c')}, 1, {context_features})")
            words.append(f"({', '.join([*(size.get(axis, axis) for axis in axes), str(context_features)])}{',' * (not axes)})")
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _context(context: Any, context_features: int, device: str = "cpu") -> Array | None:
    if context is None:
        if context_features:
            raise ValueError(f"context is missing; the flow has {context_features} context feature{'s' * (context_features != 1)}")
        return None
    array = real("context", context, device)
    if not context_features:
        raise ValueError(f"context has shape {_words.shapes(array.shape)}; the flow has no context features")
    if array.ndim not in (1, 2, 3) or array.shape[-1] != context_features:
        has = f"{context_features} context feature{'s' * (context_features != 1)}"
        raise ValueError(f"context has shape {_words.shapes(array.shape)}; the flow has {has}")
    return array


def contexts(context: Any, context_features: int, device: str = "cpu", usual: tuple[Array, ...] = ()) -> tuple[Array | None, int]:
    """Contexts to sample under, None, (C,) or (c, C), and how many they are; finite, unless they lie on a GPU.

    `usual` may be two finite arrays (C,), the ends between which contexts are expected; a warning names the columns of others.

    Examples
    --------
    >>> contexts(np.zeros((3, 2)), 2)[1]
    3
    """
    array = _context(context, context_features, device)
    if array is not None and array.ndim == 3:
        raise ValueError(f"context has shape {array.shape}; it must be ({context_features},) or (c, {context_features})")
    if type(array) is np.ndarray and not (usual and ((array >= usual[0]) & (array <= usual[1])).all()):
        finite("context", array)
        if usual:
            wrong = ((array < usual[0]) | (array > usual[1])).reshape(-1, context_features).any(axis=0)
            _words.warn(
                f"context is far away from those of the fit in {_words.columns(np.flatnonzero(wrong))}, {FAR} standard deviations and "
                "more: what the flow says there is not learned; check its units"
            )
    return array, 1 if array is None or array.ndim == 1 else int(array.shape[0])


def finite(name: str, array: Array, names: Sequence[str] | None = None) -> None:
    """Refuse NaN and infinity; names of the columns for the message.

    Examples
    --------
    >>> finite("context", np.array([[1.0, np.nan], [0.0, 2.0]]))
    Traceback (most recent call last):
    ValueError: context is not finite in column 1 of 1 of 2 rows; leave these out, or fill them
    """
    good = np.isfinite(array)
    if not good.all():
        wrong = ~np.atleast_2d(good)
        where = _words.columns(np.flatnonzero(wrong.any(axis=0)), names)
        rows = f" of {np.count_nonzero(wrong.any(axis=1))} of {len(wrong)} rows; leave these out, or fill them" if array.ndim > 1 else ""
        raise ValueError(f"{name} is not finite in {where}{rows}")


def all_or_none(result: Array, beside: Array | None = None) -> Array:
    """Make rows NaN that are not finite, in place, and numbers beside them: into which columns infinity spreads is a matter of the backend.

    Examples
    --------
    >>> all_or_none(np.array([[1.0, np.inf], [0.0, 2.0]])).tolist()
    [[nan, nan], [0.0, 2.0]]
    """
    if type(result) is np.ndarray and not (finite := np.isfinite(result)).all():
        lost = ~finite.all(axis=-1)
        result[lost] = np.nan
        if beside is not None:
            beside[lost] = np.nan
    return result


def seed_and_offsets(seed: Seed, offset: Any, context_offset: Any, n: int, c: int) -> tuple[int, int, int]:
    """A seed of 64 bits, fresh if it is None, and the offsets of the samples and of the contexts.

    Raises
    ------
    ValueError
        If one of them is out of range, if a counter would wrap around, or if an offset is given without a seed.
    """
    offset = count("offset", offset, limit=2**64)
    context_offset = count("context_offset", context_offset, limit=2**32)
    if offset + n > 2**64:
        raise ValueError(f"offset {offset} and n {n} together pass 2**64")
    if context_offset + c > 2**32:
        raise ValueError(f"context_offset {context_offset} and {c} contexts together pass 2**32")
    if (offset or context_offset) and (seed is None or isinstance(seed, (np.random.Generator, np.random.BitGenerator))):
        name, value = ("offset", offset) if offset else ("context_offset", context_offset)
        what = "None" if seed is None else "a generator"
        raise ValueError(f"{name} is {value}, but seed is {what}, which draws afresh in every call; give a seed")
    return seed_or_fresh(seed), offset, context_offset


def seed_or_fresh(seed: Seed) -> int:
    """A seed of 64 bits: fresh entropy for None, the next 64 bits of a generator, those that a `SeedSequence` stands for.

    Raises
    ------
    ValueError
        If it is something else, or an int that is out of range.

    Examples
    --------
    >>> seed_or_fresh(3), seed_or_fresh(np.random.SeedSequence(3)) == seed_or_fresh(np.random.SeedSequence(3))
    (3, True)
    """
    if seed is None:
        return secrets.randbits(64)
    if isinstance(seed, np.random.Generator):
        return int(seed.integers(2**64, dtype=np.uint64))
    if isinstance(seed, np.random.BitGenerator):
        return int(np.random.Generator(seed).integers(2**64, dtype=np.uint64))
    if isinstance(seed, np.random.SeedSequence):
        return int(seed.generate_state(1, np.uint64)[0])
    return count("seed", seed, limit=2**64, must="an integer, a numpy.random.Generator or a SeedSequence")


def sample_dtype(dtype: DTypeLike | None, out: Any, own: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of samples: the one asked for, else that of `out`, else the flow's own.

    Raises
    ------
    ValueError
        If it is neither float32 nor float64, or differs from that of `out`.

    Examples
    --------
    >>> sample_dtype(None, np.empty((3, 2)), np.dtype("float32"))
    dtype('float64')
    """
    given: Any = None if out is None else getattr(out, "dtype", None)
    if not isinstance(given, np.dtype):  # of a framework, whose own names are judged with the array itself
        given = None if given is None else str(given).rpartition(".")[2]
    if given is not None and given in ("float32", "float64"):
        given = np.dtype(given)
        if dtype is not None and float_dtype(dtype) != given:
            raise ValueError(f"dtype is {float_dtype(dtype)} and out has dtype {given}; leave one of them out")
        return cast("np.dtype[Any]", given)
    return own if dtype is None else float_dtype(dtype)


def empty(shape: Shape, dtype: np.dtype[Any]) -> Array:
    """Room for results.

    Raises
    ------
    MemoryError
        If there is none.

    Examples
    --------
    >>> empty((10**9, 10**9), np.dtype("float32"))
    Traceback (most recent call last):
    MemoryError: no memory for a result of shape (1000000000, 1000000000) in float32, 3.7e+09 GiB; ask for fewer rows at a time
    """
    try:
        return np.empty(shape, dtype)
    except (MemoryError, ValueError):  # the latter where no memory could have as many
        size = math.prod(shape) * dtype.itemsize / 2**30
        raise MemoryError(
            f"no memory for a result of shape {_words.shapes(shape)} in {dtype}, {size:.2g} GiB; ask for fewer rows at a time"
        ) from None


def output(out: Any, shape: Shape, dtype: np.dtype[Any], *inputs: Array | None, device: str = "cpu", name: str = "out") -> Array:
    """`out`, if results of this shape and dtype can be written to it as they come.

    Raises
    ------
    ValueError
        If it is not a writeable, C-contiguous array of that shape and dtype, or shares memory with an input.
    """
    if any(isinstance(array, _device.DeviceArray) for array in inputs) or (device != "cpu" and _device.is_on_device("out", out)):
        result = _device.output(out, shape, dtype, device, NATIVE, inputs)
        for array in inputs:
            _device.together("out", result, array)
        return cast("Array", result)
    if _device.is_tensor(out):
        out = real(name, out)
    if not isinstance(out, np.ndarray):
        raise ValueError(f"{name} is of type {type(out).__name__}; it must be a NumPy array")
    if out.dtype != dtype or out.shape != shape:
        wrong = f"{name} has shape {_words.shapes(out.shape)} and dtype {_words.cut(str(out.dtype))}"
        raise ValueError(f"{wrong}; the result has shape {shape} and dtype {dtype}")
    flags = out.flags
    if not (flags.c_contiguous and flags.writeable and flags.aligned):
        wrong = "not C-contiguous" if not flags.c_contiguous else "read-only" if not flags.writeable else "not aligned"
        raise ValueError(f"{name} is {wrong}")
    if any(np.may_share_memory(out, array) for array in inputs if array is not None):
        raise ValueError(f"{name} shares memory with an input")
    return out


def cotangents(cotangent: Any, shape: Shape, operation: str = "log_prob", device: str = "cpu") -> Array:
    """Cotangents of the result of an operation, as they are."""
    array = real("cotangent", cotangent, device)
    if array.shape != shape:
        raise ValueError(f"cotangent has shape {_words.shapes(array.shape)}; {operation} has shape {shape}")
    return array


def names(value: Any, features: int) -> tuple[str, ...] | None:
    """One name for each variable, all different, or None.

    Examples
    --------
    >>> names(["u", "g"], 2)
    ('u', 'g')
    """
    if value is None:
        return None
    listed = tuple(value) if np.iterable(value) and not isinstance(value, (str, bytes, Mapping)) else ()
    if not listed or not all(isinstance(name, str) for name in listed):
        raise ValueError(f"names is {_words.shown(value)}; it must be a sequence of strings")
    for name in listed:
        if name.encode("utf-8", "replace").decode() != name:
            raise ValueError(f"names holds {_words.shown(name)}, half of a surrogate pair, which is no text")
    if len(listed) != features:
        raise ValueError(f"names has {len(listed)} entries; the flow has {features} feature{'s' * (features != 1)}")
    twice = [name for k, name in enumerate(listed) if name in listed[:k]] if len(set(listed)) < features else []
    if twice:
        raise ValueError(f"names has {_words.shown(twice[0])} twice; they must differ")
    return tuple(map(str, listed))


def by_column(name: str, value: Any, features: int, names: Sequence[str] | None) -> list[Any]:
    """One entry for each column, from a sequence of them or from a mapping by name, None for columns that this leaves out.

    Examples
    --------
    >>> by_column("bounds", {"g": (0, 1)}, 2, ["u", "g"])
    [None, (0, 1)]
    """
    if isinstance(value, Mapping):
        if names is None:
            raise ValueError(f"{name} goes by name, but names is None; give names, or one entry for each column")
        unknown = [_words.shown(key) for key in value if key not in names]
        if unknown:
            raise ValueError(f"{name} has {_words.named(unknown)}; names has no such")
        return [value.get(key) for key in names]
    if not np.iterable(value):
        raise ValueError(f"{name} is {_words.shown(value)}; it must be a sequence")
    entries = list(value)
    if len(entries) != features:
        raise ValueError(f"{name} has {len(entries)} entries; the flow has {features} features")
    return entries


def float_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """float32 or float64.

    Examples
    --------
    >>> float_dtype("float32")
    dtype('float32')
    """
    try:
        result = np.dtype(dtype)
    except (TypeError, ValueError, OverflowError):
        result = None
    if dtype is None or result not in (np.float32, np.float64):
        raise ValueError(f"dtype is {_words.shown(dtype)}; it must be 'float32' or 'float64'")
    return result
