"""Density estimators of sbi."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastmaf.flow import Flow
from fastmaf.interop import _common, nflows, zuko
from fastmaf.interop._common import Activation

__all__ = ["from_sbi"]

Array = NDArray[Any]

SELF = "from_sbi"


def from_sbi(
    estimator: Any = None,
    *,
    dtype: DTypeLike | None = None,
    state_dict: Mapping[str, Any] | None = None,
    activation: str | None = None,
) -> Flow:
    """A trained density estimator of sbi as a flow of fastmaf, with the same density.

    Taken are estimators of the builders ``maf``, ``made``, ``zuko_maf``, ``zuko_nice`` and of others of affine layers of nflows or zuko,
    their z-scores and bounds (``transform_to_unconstrained``) included. The context of the flow is the condition as sbi takes it, where its
    embedding is none, a z-score or linear. Any other stays in torch, with a warning: the context of the flow is then what
    ``fastmaf.interop.embed(estimator, condition)`` gives.

    The flow is the estimator alone: a posterior of sbi rejects samples outside its prior, and divides its density by what is left.
    Outside of bounds the flow has no density, sbi a very low one. Samples of ``made`` are those of its density, which sbi's are not.

    Parameters
    ----------
    estimator : density estimator of sbi, or a posterior that has one, optional
    dtype : {"float32", "float64"}, optional
        Of the flow; that of the weights if None.
    state_dict : mapping of str to arrays, optional
        Instead of `estimator`: its ``state_dict()``, as tensors or arrays; neither sbi nor torch is needed. It does not hold the bounds of
        ``transform_to_unconstrained``, and nothing is there to compare the result with.
    activation : str, optional
        With `state_dict`: of the hidden units; that of sbi's builder if None.

    Returns
    -------
    Flow
        Its `training` says the source.

    Raises
    ------
    NotImplementedError
        With the name of the layer, if the record cannot express it.
    ImportMismatchError
        If the log-densities of sbi and of the flow differ on random rows.

    Examples
    --------
    >>> import numpy as np
    >>> state = {"net._transform._transforms.0._shift": np.array([1.0, 0.0]), "net._transform._transforms.0._scale": np.array([2.0, 4.0])}
    >>> from_sbi(state_dict=state).features
    2
    """
    if (estimator is None) == (state_dict is None):
        raise ValueError("from_sbi takes an estimator, or a state_dict instead")
    if state_dict is not None:
        return _from_state(state_dict, dtype, activation)
    from sbi.neural_nets.estimators import NFlowsFlow, ZukoFlow, ZukoUnconditionalFlow

    source = getattr(estimator, "posterior_estimator", estimator)
    if not isinstance(source, (NFlowsFlow, ZukoFlow, ZukoUnconditionalFlow)):
        raise ValueError(f"from_sbi takes an NFlowsFlow or a ZukoFlow of sbi, or a posterior that has one, not {_common.named(source)}")
    if len(source.input_shape) != 1:
        raise _common.refuse(SELF, f"an input of shape {tuple(source.input_shape)}", "rows of a flow have one axis")
    if isinstance(source, NFlowsFlow):
        return nflows.of_flow(SELF, "sbi", source.net, dtype, tuple(source.condition_shape))
    return _of_zuko(source, dtype)


def _of_zuko(source: Any, dtype: Any) -> Flow:
    import torch

    flow = zuko.exact(SELF, source.net)
    layers, features, context_features, sparse = zuko.layers_of(SELF, flow)
    net = getattr(source, "embedding_net", None)
    shape = tuple(source.condition_shape) if net is not None else None
    embedding = nflows.embedding_of(SELF, torch.nn.Identity() if net is None else nflows.exact(net), context_features, shape)
    layers, _ = embedding.folded_into(layers, None)
    density = zuko.log_prob_of(flow)

    def log_prob(x: Array, context: Array | None) -> Array:
        if context is not None and embedding.folded and net is not None:
            with torch.no_grad():
                context = np.asarray(nflows.exact(net)(torch.from_numpy(context)).numpy())
        return density(x, context)

    made = _common.finish(
        SELF,
        "sbi",
        layers,
        features=features,
        context_features=embedding.features,
        context_layers=embedding.layers,
        dtype=_common.dtype_of(list(source.net.parameters()) + list(source.net.buffers()), dtype),
        log_prob=log_prob,
        sparse=sparse,
    )
    if not embedding.folded:
        nflows.warn_of_embedding(SELF, net)
    return made


def _from_state(state: Mapping[str, Any], dtype: Any, activation: str | None) -> Flow:
    if any("hyper." in key or ".phi." in key for key in state):
        return zuko.from_state(SELF, "sbi", state, dtype, Activation(activation or "relu"), 1e-3)
    mixture = any("_distribution._made." in key for key in state)
    return nflows.from_state(SELF, "sbi", state, Activation(activation or ("relu" if mixture else "tanh")), dtype)
