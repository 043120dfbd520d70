"""The compiled core as a backend: lowers the layer record to what the core packs, and hands arrays over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastmaf import _core
from fastmaf.layers import Affine, Autoregressive, Elementwise, Normal, Permutation

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from fastmaf.flow import Flow

    Array = NDArray[Any]

__all__ = ["backend"]

LAWS = ("exp", "exp_soft")


def _missing_in(layer: Autoregressive, context_features: int) -> str | None:
    """What the core has no kernel for."""
    conditioner, law = layer.conditioner, layer.law
    maps = (*conditioner.hidden, conditioner.final)
    if layer.direction != "data":
        return f"direction {layer.direction!r} of an Autoregressive layer"
    if law.kind not in LAWS:
        return f"law {law.kind!r}"
    for block in conditioner.blocks:
        if block.kind != "plain":
            return f"{block.kind} blocks"
    if conditioner.hidden and not conditioner.final_activation:
        return "a conditioner without activation in front of its final map"
    if conditioner.skip is not None:
        return "direct weights from variables to parameters"
    if any(dense.norm_scale is not None for dense in maps):
        return "an inner batch norm"
    if any(dense.context_bias is not None for dense in maps):
        return "a context map with a bias of its own"
    modes = [dense.context for dense in maps]
    if modes != ["added" if context_features else "none"] + ["none"] * (len(maps) - 1):
        return f"a context that enters as {', '.join(modes)} (the core has: added, at the first map of every layer)"
    return None


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


def _describe(flow: Flow) -> dict[str, Any]:
    """The flow without its weights, as `_core.Flow` takes it.  Permutations become the variable that each coordinate carries."""
    elementwise, affine, count = _front(flow.layers, flow.features)
    context_elementwise, context_affine, _ = _front(flow.context_layers, flow.context_features)
    variable = np.arange(flow.features)
    mades: list[dict[str, Any]] = []
    for layer in flow.layers[count:]:
        if isinstance(layer, Permutation):
            variable = variable[layer.perm]
        elif isinstance(layer, Affine):
            if not mades:  # behind a Permutation at the head: back to the columns of the data
                place = np.argsort(variable)
                affine = _merged(affine, Affine(layer.loc[place], layer.scale[place]))
                continue
            place = np.argsort(variable)[mades[-1]["variable"]]
            before = (
                Affine(mades[-1]["loc"], mades[-1]["scale"])
                if mades[-1]["loc"]
                else Affine(np.zeros(flow.features), np.ones(flow.features))
            )
            merged = _merged(before, Affine(layer.loc[place], layer.scale[place]))
            mades[-1].update(loc=merged.loc.tolist(), scale=merged.scale.tolist())
        elif isinstance(layer, Autoregressive):
            mades.append(_describe_made(layer, variable))
    return {
        "features": flow.features,
        "context_features": flow.context_features,
        "columns": _columns(elementwise, affine),
        "context_columns": _columns(context_elementwise, context_affine),
        "mades": mades,
        "noise_variable": variable.tolist(),
    }


def _describe_made(layer: Autoregressive, variable: Array) -> dict[str, Any]:
    maps = (*layer.conditioner.hidden, layer.conditioner.final)
    return {
        "ranks": layer.ranks.tolist(),
        "variable": variable.tolist(),
        "activation": layer.conditioner.activation,
        "law": layer.law.kind,
        "form": layer.law.form,
        "clip": layer.law.constants.get("clip", 1.0),
        "loc": [],
        "scale": [],
        "maps": [
            {
                "rows": dense.weight.shape[0],
                "inputs": dense.weight.shape[1],
                "degrees": [] if dense.degrees is None else dense.degrees.tolist(),
                "context": dense.context == "added",
            }
            for dense in maps
        ],
    }


def _pack(flow: Flow) -> _core.Flow:
    return _core.Flow(_describe(flow), flow.parameters())


class _Engine:
    """Trains a packed flow; see `fastmaf.train`."""

    def __init__(
        self,
        flow: Flow,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        l2: float = 0.0,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
    ) -> None:
        self._dtype = flow.dtype
        self._packed = _pack(flow)
        self._trainer = _core.Trainer(self._packed, *betas, eps, l2, weight_decay, clip_norm or 0.0)

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
        out = np.empty(len(x), self._dtype)
        self._packed.log_prob(x, context, out)
        return out

    def parameters(self) -> Array:
        return self._trainer.parameters()

    def set_parameters(self, parameters: Array) -> None:
        self._trainer.set_parameters(np.ascontiguousarray(parameters, self._dtype))

    def state(self) -> dict[str, Array]:
        first, second = self._trainer.moments()
        return {"parameters": self.parameters(), "first_moment": first, "second_moment": second, "step": np.array(self._trainer.steps)}

    def load_state(self, state: dict[str, Array]) -> None:
        self.set_parameters(state["parameters"])
        self._trainer.set_moments(
            np.ascontiguousarray(state["first_moment"], self._dtype), np.ascontiguousarray(state["second_moment"], self._dtype)
        )
        self._trainer.steps = int(state["step"])


class _Cpu:
    name = "cpu"

    def unsupported(self, flow: Flow) -> str | None:
        if not isinstance(flow.base, Normal):
            return f"a {flow.base.conditional} base"
        _, _, count = _front(flow.layers, flow.features)
        for layer in flow.layers[count:]:
            if not isinstance(layer, (Affine, Permutation, Autoregressive)):
                where = " behind other layers" if isinstance(layer, Elementwise) else ""
                return f"a {type(layer).__name__} layer{where}"
            if isinstance(layer, Autoregressive) and (missing := _missing_in(layer, flow.context_features)):
                return missing
        if _front(flow.context_layers, flow.context_features)[2] != len(flow.context_layers):
            return "context layers other than an Elementwise and then Affines"
        return None

    def _packed(self, flow: Flow) -> _core.Flow:
        packed = flow._packed.get("cpu")
        if packed is None:
            packed = flow._packed["cpu"] = _pack(flow)
        return packed

    def log_prob(self, flow: Flow, x: Array, context: Array | None, out: Array) -> None:
        self._packed(flow).log_prob(x, context, out)

    def to_noise(self, flow: Flow, x: Array, context: Array | None, out: Array) -> None:
        self._packed(flow).to_noise(x, context, out)

    def from_noise(self, flow: Flow, u: Array, context: Array | None, out: Array) -> None:
        self._packed(flow).from_noise(u, context, out)

    def sample(
        self,
        flow: Flow,
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

    def vjp(
        self,
        flow: Flow,
        x: Array,
        context: Array | None,
        cotangent: Array,
        value: Array | None,
        dx: Array | None,
        dcontext: Array | None,
        dparameters: Array | None,
    ) -> None:
        self._packed(flow).vjp(x, context, cotangent, value, dx, dcontext, dparameters)

    def trainer(self, flow: Flow, **options: Any) -> _Engine:
        return _Engine(flow, **options)


backend = _Cpu()
