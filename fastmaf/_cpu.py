"""The compiled core as a backend: lowers the layer record to what the core packs, and hands arrays over."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmaf import _core
from fastmaf.layers import Affine, Autoregressive, BatchNorm, Conditioner, Elementwise, Law, Linear, Permutation, Terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from fastmaf.record import FlowRecord

    Array = NDArray[Any]

__all__ = ["backend", "unsupported"]

LAWS = ("exp", "exp_soft")


def _missing_in(layer: Autoregressive | Terminal, context_features: int) -> str | None:
    """What the core has no kernel for."""
    conditioner = layer.conditioner
    law = layer.law.kind if isinstance(layer, Autoregressive) else layer.law
    maps = (*conditioner.hidden, conditioner.final)
    if isinstance(layer, Autoregressive) and layer.direction != "data":
        return f"direction {layer.direction!r} of an Autoregressive layer"
    if law not in LAWS:
        return f"law {law!r}"
    wiring = _wiring(conditioner)
    for number, (_, adds) in enumerate(wiring):
        if adds >= 0 and not np.array_equal(maps[number].degrees, maps[adds].degrees):  # type: ignore[arg-type]
            return "a residual block that changes the degrees of its units"
    if any(dense.norm_scale is not None for dense in maps):
        return "an inner batch norm"
    if any(dense.context_bias is not None for dense in maps):
        return "a context map with a bias of its own"
    modes = [dense.context for dense in maps]
    if (
        modes[0] != ("added" if context_features else "none")
        or any(mode != "none" for mode in modes[1:-1])
        or modes[-1] not in ("none", "added")
    ):
        return f"a context that enters as {', '.join(modes)} (the core has: added, at the first map of every layer, and at the last)"
    return None


def _wiring(conditioner: Conditioner) -> list[tuple[bool, int]]:
    """For each map, whether the next one reads activations, and the map whose sums are added to its own, or -1."""
    activated: list[bool] = []
    adds: list[int] = [-1]
    for block in conditioner.blocks:
        activated.append(block.kind in ("plain", "residual"))
        if block.residual:
            activated.append(True)
            adds += [-1, len(activated) - 2]
        else:
            adds.append(-1)
    if conditioner.initial is not None:
        activated.append(conditioner.final_activation)
        adds.append(-1)
    return list(zip([*activated, False], adds, strict=True))


def _front(layers: tuple[Any, ...], width: int) -> tuple[Elementwise, Affine, int]:
    """The Elementwise and the Affines at the head of `layers`, merged, and how many layers they were."""
    elementwise = Elementwise(("identity",) * width, np.full(width, -np.inf), np.full(width, np.inf))
    affine, count = Affine(np.zeros(width), np.ones(width)), 0
    if layers and isinstance(layers[0], Elementwise):
        elementwise, count = layers[0], 1
    while count < len(layers) and isinstance(layers[count], Affine):
        affine, count = _merged(affine, layers[count]), count + 1
    return elementwise, affine, count


def _merged(first: Affine, second: Affine) -> Affine:
    # ((x - a) p - b) q = (x - (a + b / p)) p q
    return Affine(first.loc + second.loc / first.scale, first.scale * second.scale)


def _columns(elementwise: Elementwise, affine: Affine) -> dict[str, Any]:
    return {
        "kinds": list(elementwise.kinds),
        "lower": elementwise.lower.tolist(),
        "upper": elementwise.upper.tolist(),
        "loc": affine.loc.tolist(),
        "scale": affine.scale.tolist(),
    }


def _describe(flow: FlowRecord) -> dict[str, Any]:
    """The flow without its weights, as `_core.Flow` takes it.  Permutations become the variable that each coordinate carries."""
    elementwise, affine, count = _front(flow.layers, flow.features)
    context_elementwise, context_affine, _ = _front(flow.context_layers, flow.context_features)
    variable = np.arange(flow.features)
    stages: list[dict[str, Any]] = []
    for layer in flow.layers[count:]:
        if isinstance(layer, Permutation):
            variable = variable[layer.perm]
        elif isinstance(layer, Affine) and not stages:  # behind a Permutation at the head: back to the columns of the data
            place = np.argsort(variable)
            affine = _merged(affine, Affine(layer.loc[place], layer.scale[place]))
        elif isinstance(layer, Affine) and stages[-1]["output"] == "transform":
            last = stages[-1]
            place = np.argsort(variable)[last["variable"]]
            after = Affine(layer.loc[place], layer.scale[place])
            if "scale" in last:
                after = _merged(Affine(last["loc"], last["scale"]), after)
            last.update(loc=after.loc.tolist(), scale=after.scale.tolist())
        else:
            stages.append({"variable": variable.tolist(), **_describe_stage(layer)})
    if isinstance(flow.base, Terminal):
        stages.append({"variable": variable.tolist(), **_describe_stage(flow.base)})
    return {
        "features": flow.features,
        "context_features": flow.context_features,
        "columns": _columns(elementwise, affine),
        "context_columns": _columns(context_elementwise, context_affine),
        "stages": stages,
        "noise_variable": variable.tolist(),
    }


def _describe_stage(layer: Any) -> dict[str, Any]:
    if isinstance(layer, Linear):
        return {"output": "linear"}
    if isinstance(layer, Affine):
        return {"output": "norm", "loc": layer.loc.tolist(), "scale": layer.scale.tolist()}
    if isinstance(layer, BatchNorm):
        mean, var = (array.astype(np.float64).tolist() for array in (layer.mean, layer.var))
        return {"output": "norm", "mean": mean, "var": var, "eps": layer.eps, "of_batch": layer.statistics == "batch"}
    conditioner = layer.conditioner
    law = layer.law if isinstance(layer, Autoregressive) else Law(layer.law, constants=layer.constants)
    return {
        "output": "transform" if isinstance(layer, Autoregressive) else layer.conditional,
        "ranks": layer.ranks.tolist(),
        "rows": list(layer.rows) if isinstance(layer, Terminal) else [law.parameters] * layer.ranks.size,
        "components": layer.components if isinstance(layer, Terminal) else 1,
        "activation": conditioner.activation,
        "law": law.kind,
        "form": law.form,
        "clip": law.constants.get("clip", 1.0),
        "input_clip": conditioner.input_clip or 0.0,
        "skip": conditioner.skip is not None,
        "maps": [
            {
                "rows": dense.weight.shape[0],
                "inputs": dense.weight.shape[1],
                "degrees": [] if dense.degrees is None else dense.degrees.tolist(),
                "context": dense.context == "added",
                "activated": activated,
                "adds": adds,
            }
            for dense, (activated, adds) in zip((*conditioner.hidden, conditioner.final), _wiring(conditioner), strict=True)
        ],
    }


def unsupported(flow: FlowRecord) -> str | None:
    """What the compiled core, and the CUDA kernels with it, cannot pack."""
    if isinstance(flow.base, Terminal) and (missing := _missing_in(flow.base, flow.context_features)):
        return missing
    _, _, count = _front(flow.layers, flow.features)
    for layer in flow.layers[count:]:
        if not isinstance(layer, (Affine, BatchNorm, Linear, Permutation, Autoregressive)):
            where = " behind other layers" if isinstance(layer, Elementwise) else ""
            return f"a {type(layer).__name__} layer{where}"
        if isinstance(layer, Autoregressive) and (missing := _missing_in(layer, flow.context_features)):
            return missing
    if _front(flow.context_layers, flow.context_features)[2] != len(flow.context_layers):
        return "context layers other than an Elementwise and then Affines"
    return None


def _pack(flow: FlowRecord) -> _core.Flow:
    return _core.Flow(_describe(flow), flow.parameters())


class _Engine:
    """Trains a packed flow, or several with different masks over the same weights; see `fastmaf.train`."""

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
        self._packed = [_pack(member) for member in members or [flow]]
        self._shared = members is not None
        self._statistics: Sequence[tuple[Array, Array]] = []
        self._trainer = _core.Trainer(self._packed, self._shared, *betas, eps, l2, weight_decay, clip_norm or 0.0)
        if self._shared:
            self.set_parameters(flow.parameters())

    def set_members(self, members: Sequence[FlowRecord]) -> None:
        if not self._shared:
            raise ValueError("this engine was made without members")
        shape = [array.shape for array in self._flow.parameter_arrays()]
        if not members or any([array.shape for array in member.parameter_arrays()] != shape for member in members):
            raise ValueError(f"{len(members)} members: there must be at least one, all with the weights of the first ones")
        parameters = self.parameters()
        self._packed = [_pack(member) for member in members]
        self._trainer.set_members(self._packed)
        self.set_parameters(parameters)
        if self._statistics:
            self.set_statistics(self._statistics)

    def set_statistics(self, statistics: Sequence[tuple[Array, Array]]) -> None:
        if len(statistics) != self._norms:
            raise ValueError(f"{len(statistics)} pairs of mean and variance; the flow has {self._norms} batch norms")
        self._statistics = statistics
        for packed in self._packed:
            for stage, (mean, var) in zip(packed.norms(), statistics, strict=True):
                packed.set_statistics(stage, np.ascontiguousarray(mean, np.float64), np.ascontiguousarray(var, np.float64))

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
    ) -> tuple[float, int]:
        return self._trainer.epoch(x, context, weights, rows, batch_size, lr, mean_weight, poll)

    def log_prob(self, x: Array, context: Array | None) -> Array:
        out = np.empty((len(self._packed), len(x)), self._flow.dtype)
        if self._shared:
            parameters = self.parameters()
        for packed, own in zip(self._packed, out, strict=True):
            if self._shared:
                packed.set_parameters(parameters)
            packed.log_prob(x, context, own)
        if not self._shared:
            return np.asarray(out[0])
        mean: Array = np.logaddexp.reduce(out.astype(np.float64), axis=0) - math.log(len(out))
        return mean.astype(out.dtype)

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

    def unsupported(self, flow: FlowRecord) -> str | None:
        return unsupported(flow)

    def _packed(self, flow: FlowRecord) -> _core.Flow:
        return flow.derived("cpu", _pack)

    def log_prob(self, flow: FlowRecord, x: Array, context: Array | None, out: Array) -> None:
        self._packed(flow).log_prob(x, context, out)

    def conditional_probs(self, flow: FlowRecord, x: Array, context: Array | None, out: Array) -> None:
        self._packed(flow).conditional_probs(x, context, out)

    def to_noise(self, flow: FlowRecord, x: Array, context: Array | None, out: Array) -> None:
        self._packed(flow).to_noise(x, context, out)

    def from_noise(self, flow: FlowRecord, u: Array, context: Array | None, out: Array) -> None:
        self._packed(flow).from_noise(u, context, out)

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
        self._packed(flow).sample(c, n, context, seed, offset, context_offset, out, log_prob_out)

    def sample_rows(self, flow: FlowRecord, index: Array, group: Array, context: Array | None, seed: int, out: Array) -> None:
        self._packed(flow).sample_rows(index, group, context, seed, out)

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
        self._packed(flow).vjp(x, context, cotangent, value, dx, dcontext, dparameters)

    def trainer(self, flow: FlowRecord, **options: Any) -> _Engine:
        return _Engine(flow, **options)


backend = _Cpu()
