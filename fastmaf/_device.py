"""Arrays on a GPU: what a caller's array is, on which device and stream, and results of the caller's own kind.

Nothing here imports a framework; those whose arrays come in are imported already.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

__all__ = ["DeviceArray", "finished", "index_of", "is_on_device", "is_tensor", "native", "output", "returned", "together", "wrap"]

Shape = tuple[int, ...]


def index_of(device: str) -> int:
    """The number of a GPU: 1 for "cuda:1"."""
    return int(device.partition(":")[2])


DEVICES = (2, 13)
"""Memory of a GPU in DLPack: CUDA, and CUDA managed."""

LEGACY_STREAM = 1
"""The default stream in DLPack."""


def _interface(name: str, value: Any) -> dict[str, Any] | None:
    """The CUDA array interface of an array; None if it has none."""
    refused = ValueError(f"{name} requires a gradient, which is not recorded here; hand over {name}.detach()")
    if getattr(value, "requires_grad", False) is True:
        raise refused
    try:
        interface: dict[str, Any] | None = getattr(value, "__cuda_array_interface__", None)
    except RuntimeError:  # how torch refuses
        raise refused from None
    return interface


class _Tensor(ctypes.Structure):
    """DLTensor of dlpack.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


def _from_dlpack(value: Any) -> dict[str, Any]:
    """What a capsule of DLPack says, as a CUDA array interface; the capsule, which owns the memory, goes with it."""
    capsule = value.__dlpack__(stream=LEGACY_STREAM)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = _Tensor.from_address(pointer(capsule, b"dltensor"))
    code = {0: "i", 1: "u", 2: "f", 5: "c", 6: "b"}.get(tensor.code, "V")
    item, shape = tensor.bits // 8, tuple(tensor.shape[: tensor.ndim])
    return {
        "data": ((tensor.data or 0) + tensor.byte_offset, False),
        "shape": shape,
        "typestr": f"|{code}{item * tensor.lanes}",
        "strides": tuple(step * item for step in tensor.strides[: tensor.ndim]) if tensor.strides else None,
        "stream": 0,
        "capsule": capsule,
    }


def is_on_device(name: str, value: Any) -> bool:
    """Whether this is an array of a GPU."""
    if type(value) is np.ndarray:
        return False
    return _interface(name, value) is not None or (hasattr(value, "__dlpack_device__") and int(value.__dlpack_device__()[0]) in DEVICES)


def is_tensor(value: Any) -> bool:
    """Whether this is a tensor of torch."""
    known = getattr(sys.modules.get("torch"), "Tensor", None)
    return known is not None and isinstance(value, known)


class DeviceArray:
    """A caller's array on a GPU, as it lies there.

    Attributes
    ----------
    owner : object
        The caller's array.
    address : int
    shape, strides : tuple of int
        Strides in bytes.
    dtype : numpy.dtype
    kind : str
        The framework it belongs to.
    device : int
    stream : int
        The stream on which it is used.
    """

    def __init__(self, name: str, owner: Any, device: int) -> None:
        interface = _interface(name, owner) or _from_dlpack(owner)
        self.owner = owner
        self.address, self.read_only = interface["data"]
        self.shape: Shape = tuple(interface["shape"])
        self.dtype = np.dtype(interface["typestr"])
        steps = interface.get("strides")
        if steps is None:
            steps = [self.dtype.itemsize * int(np.prod(self.shape[k + 1 :])) for k in range(len(self.shape))]
        self.strides: Shape = tuple(steps)
        self.device = device
        self.capsule = interface.get("capsule")
        self.kind = _kind(owner)
        self.stream = _stream(self.kind, device, interface)
        if self.kind == "jax":  # says nothing of its streams
            owner.block_until_ready()

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def span(self) -> tuple[int, int]:
        """The first address, and the one behind the last."""
        steps = [step * (size - 1) for size, step in zip(self.shape, self.strides, strict=True)]
        first = int(self.address or 0)
        return first + sum(min(step, 0) for step in steps), first + sum(max(step, 0) for step in steps) + self.dtype.itemsize

    def __getitem__(self, index: tuple[slice, None]) -> DeviceArray:
        """``array[:, None]`` and no other view: one more axis of length 1 behind the first."""
        assert index == (slice(None), None)
        view = object.__new__(DeviceArray)
        view.__dict__.update(self.__dict__)
        view.shape, view.strides = (self.shape[0], 1, *self.shape[1:]), (self.strides[0], 0, *self.strides[1:])
        return view

    def describe(self) -> tuple[int, str, list[int], list[int]]:
        """What `_core.DeviceFlow` takes."""
        return int(self.address or 0), self.dtype.name, list(self.shape), list(self.strides)

    def host(self) -> NDArray[Any]:
        """A copy on the host, behind what its stream still has to do."""
        from fastmaf import _core

        if not self.size:
            return np.empty(self.shape, self.dtype)
        low, high = self.span()
        memory = np.empty(high - low, np.uint8)
        _core.copy_to_host(self.device, low, memory, self.stream)
        result: NDArray[Any] = np.ndarray(self.shape, self.dtype, memory.data, int(self.address) - low, self.strides)
        return result

    def fill(self, array: NDArray[Any]) -> None:
        """Copy an array of the host here, which is C-contiguous, of this shape and dtype."""
        from fastmaf import _core

        if array.size:
            _core.copy_from_host(self.device, np.ascontiguousarray(array).reshape(-1).view(np.uint8), int(self.address), self.stream)

    def empty(self, shape: Shape, dtype: np.dtype[Any]) -> DeviceArray:
        """A new array of the same kind in the same place."""
        return DeviceArray("out", _empty(_maker(self.kind), self.device, shape, dtype), self.device)


def _kind(owner: Any) -> str:
    """Its framework; a subclass belongs to that of its base."""
    for name, base in (("torch", "Tensor"), ("cupy", "ndarray")):
        known = getattr(sys.modules.get(name), base, None)
        if known is not None and isinstance(owner, known):
            return name
    return type(owner).__module__.partition(".")[0].replace("jaxlib", "jax")


def _stream(kind: str, device: int, interface: dict[str, Any]) -> int:
    if kind == "torch":
        return int(sys.modules["torch"].cuda.current_stream(device).cuda_stream)
    if kind == "cupy":
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(device):
            return int(cupy.cuda.get_current_stream().ptr)
    return int(interface.get("stream") or 0)


def _maker(kind: str) -> str:
    """The framework that allocates results."""
    if kind in ("torch", "cupy"):
        return kind
    for name in ("cupy", "torch"):
        try:
            __import__(name)
        except ImportError:
            continue
        return name
    raise ValueError(f"results for arrays of {kind} are allocated by cupy or torch, and neither can be imported")


def _empty(kind: str, device: int, shape: Shape, dtype: np.dtype[Any]) -> Any:
    if kind == "torch":
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype.name), device=f"cuda:{device}")
    cupy = sys.modules["cupy"]
    with cupy.cuda.Device(device):
        return cupy.empty(shape, dtype)


def wrap(name: str, value: Any, device: str, native: frozenset[np.dtype[Any]]) -> DeviceArray:
    """The caller's array, which must lie where the flow does.

    Raises
    ------
    ValueError
        If it lies on another device, or its dtype is none that the kernels read.
    """
    from fastmaf import _core

    expected = index_of(device)
    array = DeviceArray(name, value, expected)
    where = _core.device_of(int(array.address or 0))
    if where not in (expected, -1):
        raise ValueError(f"{name} lies on cuda:{where}; the flow is on {device}")
    if array.dtype not in native:
        raise ValueError(f"{name} has dtype {array.dtype}; it must hold real numbers of at most 64 bits")
    if any(number % array.dtype.itemsize for number in (int(array.address or 0), *array.strides)):
        raise ValueError(f"{name} is not aligned to its {array.dtype.itemsize} bytes")
    return array


def together(name: str, x: Any, other: Any, beside: str = "context") -> None:
    """Refuse an array of a GPU beside one of the host."""
    if other is not None and isinstance(x, DeviceArray) != isinstance(other, DeviceArray):
        first, second = (name, beside) if isinstance(x, DeviceArray) else (beside, name)
        raise ValueError(f"{first} is a CUDA array and {second} is not; both must lie in one place")


def output(
    out: Any, shape: Shape, dtype: np.dtype[Any], device: str, native: frozenset[np.dtype[Any]], inputs: tuple[Any, ...]
) -> DeviceArray:
    """`out`, if results of this shape and dtype can be written to it as they come."""
    if not is_on_device("out", out):
        raise ValueError(f"out is of type {type(out).__name__}; it must be a CUDA array like the other arrays")
    array = wrap("out", out, device, native)
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"out has shape {array.shape} and dtype {array.dtype}; the result has shape {shape} and dtype {dtype}")
    contiguous = tuple(dtype.itemsize * int(np.prod(shape[k + 1 :])) for k in range(len(shape)))
    if any(size > 1 and step != expected for size, step, expected in zip(shape, array.strides, contiguous, strict=True)):
        raise ValueError("out is not C-contiguous")
    if array.read_only:
        raise ValueError("out is read-only")
    low, high = array.span()
    for other in inputs:
        if isinstance(other, DeviceArray) and other.size and other.span()[0] < high and low < other.span()[1]:
            raise ValueError("out shares memory with an input")
    return array


def finished(*arrays: Any, stream: int) -> None:
    """Wait for what was enqueued elsewhere than on `stream` to make these arrays."""
    from fastmaf import _core

    for array in arrays:
        if isinstance(array, DeviceArray) and array.stream != stream:
            _core.synchronize(array.device, array.stream)


def native(result: NDArray[Any] | DeviceArray, like: Any) -> NDArray[Any]:
    """The result as the caller's framework has it; `like` is the array that came in, as the caller has it."""
    return cast("NDArray[Any]", _native(result, like))


def returned(result: NDArray[Any], like: Any, device: str) -> NDArray[Any]:
    """A result that was made on the host, as the caller's framework has it and where `like` lies."""
    if device == "cpu" or like is None or not is_on_device("array", like):
        return native(result, like)
    place = DeviceArray("array", like, index_of(device)).empty(result.shape, result.dtype)
    place.fill(result)
    return native(cast("NDArray[Any]", place), like)


def _native(result: NDArray[Any] | DeviceArray, like: Any) -> Any:
    if not isinstance(result, DeviceArray):
        return sys.modules["torch"].from_numpy(result) if is_tensor(like) else result
    kind = like.kind if isinstance(like, DeviceArray) else _kind(like)
    if kind in ("torch", "cupy"):
        return result.owner
    from fastmaf import _core

    _core.synchronize(result.device, result.stream)  # the other framework has streams of its own
    module: Any = sys.modules["jax"].dlpack if kind == "jax" else sys.modules.get(kind)
    return module.from_dlpack(result.owner) if hasattr(module, "from_dlpack") else result.owner
