"""The CUDA kernels as a backend: flows are packed as for the compiled core, and copied to a device when first used there.

Arrays of the host are streamed; arrays of a device are used in place, on the caller's stream.  Densities in float32 multiply halves on
tensor cores unless the precision is "highest"; gradients and training never do.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from fastmaf import _core
from fastmaf._device import DeviceArray, finished, index_of
from fastmaf.backends import Part
from fastmaf.backends.cpu import Engine, pack, unsupported
from fastmaf.record import FlowRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["at", "backend"]


def _state() -> dict[str, Any]:
    state: dict[str, Any] = _core.device_state()
    return state


RESIDENT = -1
"""Most bytes of rows to train on that are kept on the device; half of what is free there if negative."""


if _state()["reason"]:
    raise ImportError(_state()["reason"])


def _at(array: Any) -> Any:
    return array.describe() if isinstance(array, DeviceArray) else array


def _where(out: Any, *inputs: Any) -> tuple[Any, int | None]:
    """The output as the core takes it, and the stream if it lies on a device; inputs from other streams are there then."""
    if not isinstance(out, DeviceArray):
        return out, None
    finished(*inputs, stream=out.stream)
    return out.address, out.stream


class _Engine(Engine):
    """The same on a device, where the rows lie too."""

    _trainer: _core.DeviceTrainer

    def __init__(self, flow: FlowRecord, device: int, **options: Any) -> None:
        self._device = device
        self._held: tuple[Any, ...] = ()
        super().__init__(flow, **options)

    def _made(self, *settings: float) -> Any:
        return _core.DeviceTrainer(self._packed, self._shared, self._device, *settings)

    def _set_statistics(self, stage: int, mean: Array, var: Array) -> None:
        self._trainer.set_statistics(stage, mean, var)

    def epoch(
        self,
        x: Array,
        context: Array | None,
        weights: Array | None,
        rows: Array,
        batch_size: int,
        lr: Array,
        mean_weight: float,
        poll: Callable[[], None] | None = None,
        part: Part | None = None,
    ) -> tuple[float, int]:
        """As on the CPU. Arrays go to the device, unless they are those of the last call, whose numbers must be the same then.

        What is too large for it stays on the host, from which each call brings the rows in their order.
        """
        given = (x, context, weights)
        if len(self._held) != len(given) or any(new is not old for new, old in zip(given, self._held, strict=True)):
            self._held = ()
            self._trainer.set_rows(*given, RESIDENT)
            self._held = given
        ends, sizes, total = part or Part.whole(len(rows), batch_size)
        return self._trainer.epoch(rows, ends, sizes * mean_weight, lr, poll, total)

    def _log_prob(self, x: Array, context: Array | None, out: Array) -> None:
        for member, own in enumerate(out):
            self._trainer.log_prob(member, x, context, own)


class _Cuda:
    """The kernels on one device, in one precision."""

    name = "cuda"

    def __init__(self, device: int, precision: str) -> None:
        gpus = _state()["gpus"]
        if device >= len(gpus):
            raise RuntimeError(f"there is no cuda:{device} here; there is {', '.join(f'cuda:{k}, {gpu}' for k, gpu in enumerate(gpus))}")
        self._device, self._precision = device, precision
        self._key = f"cuda:{device} {precision}"

    def unsupported(self, flow: FlowRecord) -> str | None:
        return unsupported(flow)

    def _packed(self, flow: FlowRecord) -> _core.DeviceFlow:
        return flow.derived(self._key, self._pack)

    def _pack(self, flow: FlowRecord) -> _core.DeviceFlow:
        return _core.DeviceFlow(pack(flow), self._device, self._precision)

    def log_prob(self, flow: FlowRecord, x: Any, context: Any, out: Any) -> None:
        self._packed(flow).log_prob(_at(x), _at(context), *_where(out, x, context))

    def to_noise(self, flow: FlowRecord, x: Any, context: Any, out: Any, log_det: Any = None) -> None:
        (noise, stream), (of_map, _) = _where(out, x, context), _where(log_det, x, context)
        self._packed(flow).to_noise(_at(x), _at(context), noise, of_map, stream)

    def conditional_probs(self, flow: FlowRecord, x: Any, context: Any, out: Any) -> None:
        self._packed(flow).conditional_probs(_at(x), _at(context), *_where(out, x, context))

    def from_noise(self, flow: FlowRecord, u: Any, context: Any, out: Any, log_det: Any = None) -> None:
        (x, stream), (of_map, _) = _where(out, u, context), _where(log_det, u, context)
        self._packed(flow).from_noise(_at(u), _at(context), x, of_map, stream, out.dtype.name)

    def sample(
        self, flow: FlowRecord, c: int, n: int, context: Any, seed: int, offset: int, context_offset: int, out: Any, log_prob_out: Any
    ) -> None:
        (x, stream), (log_prob, _) = _where(out, context), _where(log_prob_out, context)
        self._packed(flow).sample(c, n, _at(context), seed, offset, context_offset, x, log_prob, stream, out.dtype.name)

    def sample_rows(self, flow: FlowRecord, index: Array, group: Array, context: Array | None, seed: int, out: Array) -> None:
        self._packed(flow).sample_rows(index, group, context, seed, out)

    def vjp(self, flow: FlowRecord, x: Any, context: Any, cotangent: Any, value: Any, dx: Any, dcontext: Any, dparameters: Any) -> None:
        """Of arrays of the device the gradients have the shapes of x and of the context; no cotangents are ones."""
        outs = [out.address if isinstance(out, DeviceArray) else out for out in (value, dx, dcontext, dparameters)]
        stream = _where(x, context, cotangent, dcontext)[1]
        self._packed(flow).vjp(_at(x), _at(context), _at(cotangent), outs[0], outs[1], outs[2], outs[3], stream)
        if stream is not None and isinstance(dcontext, DeviceArray) and dcontext.stream != stream:  # where the caller looks for it
            _core.synchronize(self._device, stream)

    def trainer(self, flow: FlowRecord, **options: Any) -> _Engine:
        return _Engine(flow, self._device, **options)


@functools.cache
def at(device: str, precision: str) -> _Cuda:
    """The backend of a flow that was moved to "cuda:..."; refuses a device that is not there."""
    return _Cuda(index_of(device), precision)


backend = at("cuda:0", "high")
