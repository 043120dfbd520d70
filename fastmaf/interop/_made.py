"""The MADE of nflows and of what was made from it: sbi, normflows.  Read from a state dict, which holds masks and degrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmaf.interop import _common
from fastmaf.interop._common import Activation, refuse
from fastmaf.layers import Block, Conditioner, Dense

Array = NDArray[Any]
State = Mapping[str, Any]


@dataclass(frozen=True)
class Wiring:
    """How a class of MADE connects what its state dict holds.

    Parameters
    ----------
    first_context : {"activated", "added"}
        How the context enters behind the initial layer.
    first_activation : bool
        Whether an activation follows it, in front of plain blocks.
    block_context : {"added", "gated"}
        At the first map of a residual block, or as a factor of its second.
    """

    first_context: str
    first_activation: bool
    block_context: str


def count(state: State, name: str) -> int:
    """The number of entries of a list of modules."""
    return 1 + max((int(key[len(name) + 1 :].split(".")[0]) for key in state if key.startswith(f"{name}.")), default=-1)


def batch_norm(state: State, prefix: str, eps: float) -> tuple[Array, Array] | None:
    """Scale and shift of a frozen `torch.nn.BatchNorm1d`, if there is one."""
    own = _common.under(state, prefix)
    if "running_mean" not in own:
        return None
    scale = _common.wide(f"{prefix}weight", own["weight"]) / np.sqrt(_common.wide(f"{prefix}running_var", own["running_var"]) + eps)
    shift = _common.wide(f"{prefix}bias", own["bias"]) - scale * _common.wide(f"{prefix}running_mean", own["running_mean"])
    return scale, shift


def _dense(state: State, name: str, context: str = "", mode: str = "added", final: bool = False) -> Dense:
    own = _common.under(state, f"{name}.")
    degrees = None if final else _common.whole(f"{name}.degrees", own["degrees"])
    reads = _common.under(state, f"{context}.") if context else {}
    return _common.dense(name, own["weight"], own["bias"], own["mask"], degrees, reads.get("weight"), reads.get("bias"), mode)


def conditioner(
    importer: str, state: State, wiring: Wiring, activation: Activation, residual: bool | None = None, eps: float = 1e-3
) -> tuple[Conditioner, Array]:
    """The network of a MADE, its inner batch norms frozen, and the ranks of its variables; rows in the order of the library.

    Parameters
    ----------
    importer : str
    state : mapping
        The state dict of the MADE.
    wiring : Wiring
    activation : Activation
    residual : bool, optional
        Whether the network is a residual one; told by its blocks if None.
    eps : float
        Of the inner batch norms.
    """
    if any(not key.startswith(("initial_layer.", "context_layer.", "blocks.", "final_layer.", "preprocessing.")) for key in state):
        odd = min(key for key in state if not key.startswith(("initial_layer.", "context_layer.", "blocks.", "final_layer.")))
        raise refuse(importer, f"a MADE with {odd}", "it is none of the versions that are known")
    initial = _dense(state, "initial_layer", "context_layer", wiring.first_context)
    blocks: list[Block] = []
    if residual is None:
        residual = "blocks.0.linear_layers.0.weight" in state
        if not count(state, "blocks") and wiring.first_activation:
            raise refuse(importer, "a state_dict of a MADE without blocks", "it does not say whether an activation ends it: give the flow")
    active = wiring.first_activation and not residual
    for b in range(count(state, "blocks")):
        name = f"blocks.{b}"
        if residual:
            gated = wiring.block_context == "gated" and f"{name}.context_layer.weight" in state
            first = _dense(state, f"{name}.linear_layers.0", "" if gated else f"{name}.context_layer")
            second = _dense(state, f"{name}.linear_layers.1", f"{name}.context_layer" if gated else "", "gated" if gated else "added")
            before, between = (batch_norm(state, f"{name}.batch_norm_layers.{k}.", eps) for k in (0, 1))
            if before is not None:
                first = replace(first, norm_scale=before[0], norm_shift=before[1])
            if between is not None:
                first = _common.scaled_rows(first, *between)
            blocks.append(Block("residual", (first, second)))
        else:
            layer, norm = _dense(state, f"{name}.linear"), batch_norm(state, f"{name}.batch_norm.", eps)
            if norm is not None:
                layer = _common.scaled_columns(layer, *norm)
            blocks.append(Block("plain" if active else "linear", (layer,)))
            active = True
    final = _dense(state, "final_layer", final=True)
    ranks = _ranks(state, initial)
    return _common.conditioner(importer, initial, blocks, final, activation, active), ranks


def _ranks(state: State, initial: Dense) -> Array:
    """1..D, or the order that permuted masks follow: the saved degrees of the output layer."""
    features = initial.weight.shape[1]
    saved = _common.whole("final_layer.degrees", state["final_layer.degrees"])
    return saved.reshape(features, -1)[:, 0]


def without_first(net: Conditioner, rows: int) -> Conditioner:
    """The network without its first variable, which is always zero: its column, its rows, and one degree less for all."""
    assert net.initial is not None

    def lower(layer: Dense) -> Dense:
        return replace(layer, degrees=None if layer.degrees is None else layer.degrees - 1)

    net = _common.mapped(net, lower)
    assert net.initial is not None
    final = replace(net.final, weight=net.final.weight[rows:], bias=net.final.bias[rows:])
    return replace(net, initial=replace(net.initial, weight=net.initial.weight[:, 1:]), final=final)


def swapped(net: Conditioner) -> Conditioner:
    """Rows (scale, shift) of each variable as (shift, scale)."""
    rows = np.arange(len(net.final.bias)).reshape(-1, 2)[:, ::-1].ravel()
    return replace(net, final=_common.rows_of(net.final, rows))


def mixture_rows(net: Conditioner, components: int) -> Conditioner:
    """Rows (variable, component, logit mean scale) as (variable, logit mean scale, component)."""
    rows = np.arange(len(net.final.bias)).reshape(-1, components, 3).transpose(0, 2, 1).ravel()
    return replace(net, final=_common.rows_of(net.final, rows))
