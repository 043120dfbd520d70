"""Flows of normflows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastmaf.flow import Flow
from fastmaf.interop import _common, _made, nflows
from fastmaf.interop._common import refuse
from fastmaf.layers import Autoregressive, FlowLayer, Law, Linear, Permutation

__all__ = ["from_normflows"]

Array = NDArray[Any]

SELF = "from_normflows"
MADE = _made.Wiring("added", False, "gated")


def from_normflows(model: Any, *, dtype: DTypeLike | None = None) -> Flow:
    """A flow of normflows as a flow of fastmaf, with the same density and, from the same noise, the same samples.

    Taken are `NormalizingFlow` and `ConditionalNormalizingFlow` of `MaskedAffineAutoregressive` (residual or not, batch norm inside or
    not, any context), `Permute`, `LULinearPermute`, `InvertibleAffine`, `ActNorm` and `AffineConstFlow`, over `DiagGaussian`. Their
    networks read the noise (inverse autoregressive flows): samples are fast, densities go variable by variable.

    Parameters
    ----------
    model : normflows.NormalizingFlow or normflows.ConditionalNormalizingFlow
    dtype : {"float32", "float64"}, optional
        Of the flow; that of the weights if None.

    Returns
    -------
    Flow
        Its `training` says the source.

    Raises
    ------
    NotImplementedError
        With the name of the layer, if the record cannot express it.
    ImportMismatchError
        If the log-densities of normflows and of the flow differ on random rows.

    Examples
    --------
    >>> import fastmaf, pytest
    >>> nf = pytest.importorskip("normflows")
    >>> model = nf.NormalizingFlow(nf.distributions.DiagGaussian(2), [nf.flows.Permute(2, mode="swap")])
    >>> fastmaf.from_normflows(model).layers
    (Permutation(perm=array([1, 0])),)
    """
    import torch
    from normflows import ConditionalNormalizingFlow, NormalizingFlow

    if type(model) not in (NormalizingFlow, ConditionalNormalizingFlow):
        raise ValueError(f"{SELF} takes a normflows.NormalizingFlow or a normflows.ConditionalNormalizingFlow, not {_common.named(model)}")
    twin = nflows.exact(model)
    if type(twin.q0).__name__ != "DiagGaussian":
        raise refuse(SELF, f"the base {_common.named(twin.q0)}", "the base of a flow is a diagonal normal")
    features = int(twin.q0.d)
    layers = _several(reversed(list(twin.flows)), features)
    scale = np.exp(-_common.wide("q0.log_scale", twin.q0.log_scale).ravel()) / (twin.q0.temperature or 1)
    layers.append(_common.scaled(scale, -scale * _common.wide("q0.loc", twin.q0.loc).ravel(), features))
    context_features = _common.contexts_of(layers)

    def log_prob(x: Array, context: Array | None) -> Array:
        with torch.no_grad():
            given = [torch.from_numpy(array) for array in (x, context) if array is not None]
            return np.asarray(twin.log_prob(*given).numpy())

    return _common.finish(
        SELF,
        "normflows",
        layers,
        features=features,
        context_features=context_features,
        dtype=_common.dtype_of(model.parameters(), dtype),
        log_prob=log_prob,
    )


def _several(flows: Any, features: int) -> list[FlowLayer]:
    return [layer for flow in flows for layer in _layers(flow, features)]


def _layers(flow: Any, features: int) -> Sequence[FlowLayer]:
    """The layers of the inverse of a flow: from data to noise."""
    import normflows.flows as f
    import torch

    if isinstance(flow, f.MaskedAffineAutoregressive):
        made = flow.autoregressive_net
        if not isinstance(made.preprocessing, torch.nn.Identity):
            raise refuse(SELF, f"the preprocessing {_common.named(made.preprocessing)}", "a network reads its variables as they are")
        residual = "Residual" in _common.named(made.blocks[0]) if len(made.blocks) else True
        net, ranks = _made.conditioner(SELF, made.state_dict(), MADE, nflows.activation_of(SELF, made), residual)
        return [Autoregressive(ranks, _made.swapped(net), Law("sigmoid", "standardize"), "noise")]
    if isinstance(flow, f.Composite):
        return _several(reversed(list(flow._flows)), features)
    if isinstance(flow, f.Reverse):
        return _common.inverse(SELF, list(_layers(flow.flow, features)))
    if isinstance(flow, f.Permute):
        if flow.mode == "shuffle":
            return [Permutation(_common.whole("inv_perm", flow.inv_perm))]
        return [Permutation(np.roll(np.arange(features), -((features + 1) // 2)))]
    if isinstance(flow, f.LULinearPermute):
        lower, upper = flow.linear._create_lower_upper()
        linear = Linear(_common.wide("lower", lower), _common.wide("upper", upper), _common.wide("bias", flow.linear.bias))
        return [Permutation(_common.whole("permutation", flow.permutation._permutation)), linear]
    if isinstance(flow, f.InvertibleAffine):
        rows, _ = flow.inverse(torch.eye(features, dtype=torch.float64))
        return _common.linear(SELF, _common.wide("W", rows).T, np.zeros(features))
    if isinstance(flow, f.AffineConstFlow) and type(flow).__name__ in ("AffineConstFlow", "ActNorm"):
        if not bool(getattr(flow, "data_dep_init_done", True)):
            raise ValueError(f"{SELF}: an ActNorm has not seen any data; evaluate the model on some before")
        s = 0.0 if flow.s is None else _common.wide("s", flow.s).ravel()
        t = 0.0 if flow.t is None else _common.wide("t", flow.t).ravel()
        return [_common.scaled(np.exp(-s), -t * np.exp(-s), features)]
    if isinstance(flow, f.BatchNorm):
        raise refuse(SELF, "BatchNorm", "its statistics are those of each batch that it evaluates")
    name = _common.named(flow)
    raise refuse(SELF, name, "a spline law would be needed" if "Spline" in name else "the record has no layer for it")
