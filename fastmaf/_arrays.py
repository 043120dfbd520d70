"""The only validator: every array, count, seed and offset that a caller hands over is judged here.

Backends take any strides and the dtypes of `NATIVE`, so that only long doubles and foreign byte orders are converted here.  An ndarray
without context leaves `rows` by its first return: a call on one row takes a few microseconds altogether, and the time spent here is felt.
"""

from __future__ import annotations

import operator
import secrets
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastmaf import _device

__all__ = [
    "NATIVE",
    "Seed",
    "contexts",
    "count",
    "cotangents",
    "float_dtype",
    "output",
    "real",
    "rows",
    "seed_and_offsets",
    "seed_or_fresh",
]

Array = NDArray[Any]
Shape = tuple[int, ...]
Seed = int | np.integer[Any] | np.random.Generator | np.random.BitGenerator | np.random.SeedSequence | None

NATIVE = frozenset(map(np.dtype, "?bhilqBHILQefd"))
"""What backends read: booleans, integers and floats of at most 64 bits in the byte order of this machine."""


def real(name: str, value: ArrayLike, device: str = "cpu", names: Any = None) -> Array:
    """An array of real numbers in a dtype of `NATIVE`; an array in one of them as it lies in memory, on the device of the flow or the host.

    Raises
    ------
    ValueError
        For complex numbers, objects, strings and dates, CUDA arrays, masked entries and ragged lists.
    """
    if type(value) is not np.ndarray:
        if _device.is_on_device(name, value):
            if device == "cpu":
                raise ValueError(
                    f"{name} is a CUDA array; this flow computes on the CPU: copy the array to the host first, or flow.to('cuda')"
                )
            return cast("Array", _device.wrap(name, value, device, NATIVE))
        if np.ma.is_masked(value):
            raise ValueError(f"{name} has masked entries; fill or drop them first")
        try:
            value = np.asarray(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} is not an array: {error}") from None
    if value.dtype in NATIVE:
        return value
    if value.dtype.kind not in "fiub":
        raise ValueError(f"{name} has dtype {value.dtype}; it must hold real numbers")
    return value.astype(np.float64 if value.dtype.kind == "f" else value.dtype.newbyteorder("="))


def rows(
    name: str, x: ArrayLike, context: ArrayLike | None, features: int, context_features: int, device: str = "cpu"
) -> tuple[Array, Array | None, Shape]:
    """Rows and their contexts, and the shape of one number per row.

    Parameters
    ----------
    name : str
        What the caller knows `x` as.
    x : (n, D) or (c, n, D) array
    context : None or (C,), (n, C), (c, 1, C) or (c, n, C) array
    features, context_features : int
        D and C of the flow.
    device : str
        Where the flow is: on a GPU arrays of that GPU are taken too.

    Returns
    -------
    x, context : arrays
        As given.
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
    array = x if type(x) is np.ndarray and x.dtype in NATIVE else real(name, x, device)
    shape = array.shape
    if context is None and not context_features and len(shape) == 2 and shape[1] == features:
        return array, None, shape[:1]
    if len(shape) not in (2, 3) or shape[-1] != features:
        expected = f"the flow has {features} feature{'s' * (features != 1)}"
        if len(shape) not in (2, 3):
            expected += f", so {name} must be (n, {features}) or (c, n, {features})"
        raise ValueError(f"{name} has shape {shape}; {expected}")
    context = _context(context, context_features, device)
    _device.together(name, array, context)
    if context is None or context.ndim == 1:
        return array, context, shape[:-1]
    if context.ndim == 2:
        fits, result = len(shape) == 2 and context.shape[0] == shape[0], shape[:1]
    elif len(shape) == 2:
        fits, result = context.shape[1] == 1, (context.shape[0], shape[0])
    else:
        fits, result = context.shape[0] == shape[0] and context.shape[1] in (1, shape[1]), shape[:2]
    if not fits:
        c, n = ("c", shape[0]) if len(shape) == 2 else shape[:2]
        by_row = f"({n}, {context_features})" if len(shape) == 2 else f"({c}, {n}, {context_features})"
        raise ValueError(
            f"context has shape {context.shape}, {name} has shape {shape}; "
            f"context must be ({context_features},), {by_row} or ({c}, 1, {context_features})"
        )
    return array, context, result


def _context(context: ArrayLike | None, context_features: int, device: str = "cpu") -> Array | None:
    if context is None:
        if context_features:
            raise ValueError(f"context is missing; the flow has {context_features} context feature{'s' * (context_features != 1)}")
        return None
    array = real("context", context, device)
    if not context_features:
        raise ValueError(f"context has shape {array.shape}; the flow has no context features")
    if array.ndim not in (1, 2, 3) or array.shape[-1] != context_features:
        raise ValueError(f"context has shape {array.shape}; the flow has {context_features} context feature{'s' * (context_features != 1)}")
    return array


def contexts(context: ArrayLike | None, context_features: int, device: str = "cpu") -> tuple[Array | None, int]:
    """Contexts to sample under, None, (C,) or (c, C), and how many they are.

    Examples
    --------
    >>> contexts(np.zeros((3, 2)), 2)[1]
    3
    """
    array = _context(context, context_features, device)
    if array is not None and array.ndim == 3:
        raise ValueError(f"context has shape {array.shape}; it must be ({context_features},) or (c, {context_features})")
    return array, 1 if array is None or array.ndim == 1 else int(array.shape[0])


def count(name: str, value: Any, lowest: int = 0, limit: int = 2**63) -> int:
    """An integer in [lowest, limit).

    Examples
    --------
    >>> count("n", np.int32(3))
    3
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; it must be an integer") from None
    if not lowest <= number < limit:
        bound = f"at least {lowest}" if number < lowest else f"below {limit}"
        raise ValueError(f"{name} is {number}; it must be {bound}")
    return number


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
    if isinstance(seed, (bool, np.bool_)):
        raise ValueError("seed is a bool; it must be an integer, a numpy.random.Generator or a SeedSequence")
    return count("seed", seed, limit=2**64)


def output(out: Any, shape: Shape, dtype: np.dtype[Any], *inputs: Array | None, device: str = "cpu") -> Array:
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
    if not isinstance(out, np.ndarray):
        raise ValueError(f"out is of type {type(out).__name__}; it must be a NumPy array")
    if out.dtype != dtype or out.shape != shape:
        raise ValueError(f"out has shape {out.shape} and dtype {out.dtype}; the result has shape {shape} and dtype {dtype}")
    flags = out.flags
    if not (flags.c_contiguous and flags.writeable and flags.aligned):
        wrong = "not C-contiguous" if not flags.c_contiguous else "read-only" if not flags.writeable else "not aligned"
        raise ValueError(f"out is {wrong}")
    if any(np.may_share_memory(out, array) for array in inputs if array is not None):
        raise ValueError("out shares memory with an input")
    return out


def cotangents(cotangent: ArrayLike, shape: Shape, dtype: np.dtype[Any]) -> Array:
    """Cotangents of log_prob, C-contiguous in the dtype of the flow."""
    array = real("cotangent", cotangent)
    if array.shape != shape:
        raise ValueError(f"cotangent has shape {array.shape}; log_prob has shape {shape}")
    return np.ascontiguousarray(array, dtype)


def float_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """float32 or float64.

    Examples
    --------
    >>> float_dtype("float32")
    dtype('float32')
    """
    try:
        result = np.dtype(dtype)
    except TypeError:
        result = None
    if dtype is None or result not in (np.float32, np.float64):
        raise ValueError(f"dtype is {dtype!r}; it must be 'float32' or 'float64'")
    return result
