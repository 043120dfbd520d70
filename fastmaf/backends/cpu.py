"""The compiled core as a backend: hands it the bytes of the flow's file, and arrays."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmaf import _codec, _core
from fastmaf.backends import Part
from fastmaf.layers import BatchNorm
from fastmaf.record import FlowRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Engine", "backend", "pack", "unsupported"]


def _read(flow: FlowRecord) -> _core.Flow | str:
    """The flow as the core holds it, or what the core has no kernel for."""
    file = _core.File(_codec.to_bytes(flow, digest=False))
    return file.unsupported or _core.Flow(file)


def pack(flow: FlowRecord) -> _core.Flow:
    """The flow as the core holds it.

    Raises
    ------
    NotImplementedError
        If the core has no kernel for it.
    """
    packed = flow.derived("core", _read)
    if isinstance(packed, str):
        raise NotImplementedError(f"the compiled core has no kernel for {packed}")
    return packed


def unsupported(flow: FlowRecord) -> str | None:
    """What the compiled core, and the CUDA kernels with it, have no kernel for."""
    packed = flow.derived("core", _read)
    return packed if isinstance(packed, str) else None


class Engine:
    """Trains a packed flow, or several with different masks over the same weights, by a trainer of the core; see `fastmaf.train`."""

    _trainer: _core.Trainer | _core.DeviceTrainer

    def __init__(
        self,
        flow: FlowRecord,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        l2: float = 0.0,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        members: Sequence[FlowRecord] | None = None,
    ) -> None:
        self._flow = flow
        self._norms = [isinstance(layer, BatchNorm) for layer in flow.layers].count(True)
        self._packed = [pack(member).copy() for member in members or [flow]]
        self._shared = members is not None
        self._statistics: Sequence[tuple[Array, Array]] = []
        self._trainer = self._made(*betas, eps, l2, weight_decay, clip_norm or 0.0)
        if self._shared:
            self.set_parameters(flow.parameters())

    def _made(self, *settings: float) -> Any:
        return _core.Trainer(self._packed, self._shared, *settings)

    def set_members(self, members: Sequence[FlowRecord]) -> None:
        if not self._shared:
            raise ValueError("this engine was made without members")
        shape = [array.shape for array in self._flow.parameter_arrays()]
        if not members or any([array.shape for array in member.parameter_arrays()] != shape for member in members):
            raise ValueError(f"{len(members)} members: there must be at least one, all with the weights of the first ones")
        parameters = self.parameters()
        self._packed = [pack(member).copy() for member in members]
        self._trainer.set_members(self._packed)
        self.set_parameters(parameters)
        if self._statistics:
            self.set_statistics(self._statistics)

    def set_statistics(self, statistics: Sequence[tuple[Array, Array]]) -> None:
        if len(statistics) != self._norms:
            raise ValueError(f"{len(statistics)} pairs of mean and variance; the flow has {self._norms} batch norms")
        self._statistics = statistics
        for stage, moments in zip(self._packed[0].norms(), statistics, strict=True):
            self._set_statistics(stage, *(np.ascontiguousarray(moment, np.float64) for moment in moments))

    def _set_statistics(self, stage: int, mean: Array, var: Array) -> None:
        for packed in self._packed:
            packed.set_statistics(stage, mean, var)

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
        trainer: _core.Trainer = self._trainer  # type: ignore[assignment]
        ends, sizes, total = part or Part.whole(len(rows), batch_size)
        return trainer.epoch(x, context, weights, rows, ends, sizes * mean_weight, lr, poll, total)

    def log_prob(self, x: Array, context: Array | None) -> Array:
        out = np.empty((len(self._packed), len(x)), self._flow.dtype)
        self._log_prob(x, context, out)
        if not self._shared:
            return np.asarray(out[0])
        mean: Array = np.logaddexp.reduce(out.astype(np.float64), axis=0) - math.log(len(out))
        return mean.astype(out.dtype)

    def _log_prob(self, x: Array, context: Array | None, out: Array) -> None:
        """Of each member."""
        if self._shared:
            parameters = self.parameters()
        for packed, own in zip(self._packed, out, strict=True):
            if self._shared:
                packed.set_parameters(parameters)
            packed.log_prob(x, context, own)

    def parameters(self) -> Array:
        return self._trainer.parameters()

    def set_parameters(self, parameters: Array) -> None:
        self._trainer.set_parameters(np.ascontiguousarray(parameters, self._flow.dtype))

    def state(self) -> dict[str, Array]:
        first, second = self._trainer.moments()
        return {"parameters": self.parameters(), "first_moment": first, "second_moment": second, "step": np.array(self._trainer.steps)}

    def load_state(self, state: dict[str, Array]) -> None:
        self.set_parameters(state["parameters"])
        self._trainer.set_moments(*(np.ascontiguousarray(state[name], self._flow.dtype) for name in ("first_moment", "second_moment")))
        self._trainer.steps = int(state["step"])


class _Cpu:
    name = "cpu"

    _core = staticmethod(pack)

    def unsupported(self, flow: FlowRecord) -> str | None:
        return unsupported(flow)

    def log_prob(self, flow: FlowRecord, x: Array, context: Array | None, out: Array) -> None:
        self._core(flow).log_prob(x, context, out)

    def conditional_probs(self, flow: FlowRecord, x: Array, context: Array | None, out: Array) -> None:
        self._core(flow).conditional_probs(x, context, out)

    def to_noise(self, flow: FlowRecord, x: Array, context: Array | None, out: Array, log_det: Array | None = None) -> None:
        self._core(flow).to_noise(x, context, out, log_det)

    def from_noise(self, flow: FlowRecord, u: Array, context: Array | None, out: Array, log_det: Array | None = None) -> None:
        self._core(flow).from_noise(u, context, out, log_det)

    def sample(
        self,
        flow: FlowRecord,
        c: int,
        n: int,
        context: Array | None,
        seed: int,
        offset: int,
        context_offset: int,
        out: Array,
        log_prob_out: Array | None,
    ) -> None:
        self._core(flow).sample(c, n, context, seed, offset, context_offset, out, log_prob_out)

    def sample_rows(self, flow: FlowRecord, index: Array, group: Array, context: Array | None, seed: int, out: Array) -> None:
        self._core(flow).sample_rows(index, group, context, seed, out)

    def vjp(
        self,
        flow: FlowRecord,
        x: Array,
        context: Array | None,
        cotangent: Array,
        value: Array | None,
        dx: Array | None,
        dcontext: Array | None,
        dparameters: Array | None,
    ) -> None:
        self._core(flow).vjp(x, context, cotangent, value, dx, dcontext, dparameters)

    def to_noise_vjp(
        self,
        flow: FlowRecord,
        x: Array,
        context: Array | None,
        cotangent: Array,
        log_det: Array | None,
        dx: Array | None,
        dcontext: Array | None,
        dparameters: Array | None,
    ) -> None:
        """Gradients of the map to the noise and, under the cotangents `log_det`, of log|det| of it."""
        self._core(flow).to_noise_vjp(x, context, cotangent, log_det, dx, dcontext, dparameters)

    def from_noise_vjp(
        self,
        flow: FlowRecord,
        x: Array,
        context: Array | None,
        cotangent: Array,
        du: Array | None,
        dcontext: Array | None,
        dparameters: Array | None,
    ) -> None:
        """Gradients of the map from the noise, at the rows x that come out of it."""
        self._core(flow).from_noise_vjp(x, context, cotangent, du, dcontext, dparameters)

    def trainer(self, flow: FlowRecord, **options: Any) -> Engine:
        return Engine(flow, **options)

    def own(self, flow: FlowRecord) -> _Own:
        return _Own(flow)


class _Own(_Cpu):
    """One flow with weights that are set in place."""

    def __init__(self, flow: FlowRecord) -> None:
        packed = pack(flow).copy()
        self._core, self.set_parameters = lambda flow: packed, packed.set_parameters


backend = _Cpu()
