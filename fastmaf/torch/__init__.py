"""Flows in PyTorch: modules that train under torch.optim and compute in the core of fastmaf, on the CPU.

>>> import torch
>>> import fastmaf.torch
>>> flow = fastmaf.torch.MAF(features=3, context_features=2)
>>> flow(torch.zeros(5, 2)).log_prob(torch.zeros(5, 3)).shape
torch.Size([5])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

try:
    import torch as _torch
except ImportError:
    raise ImportError("fastmaf.torch needs PyTorch, which is not installed: pip install torch") from None

from fastmaf.torch._module import MAF, Flow, NormalizingFlow

__all__ = ["MAF", "Flow", "NormalizingFlow", "sbi_maf"]


def sbi_maf(
    *,
    likelihood: bool = False,
    z_score_theta: str | None = "independent",
    z_score_x: str | None = "independent",
    hidden_features: int | Sequence[int] = 50,
    num_transforms: int = 5,
    embedding_net: _torch.nn.Module | None = None,
    x_dist: Any = None,
    **options: Any,
) -> Any:
    """A builder of density estimators for sbi: ``NPE(density_estimator=sbi_maf())``, ``NLE(density_estimator=sbi_maf(likelihood=True))``.

    Parameters
    ----------
    likelihood : bool
        False: the density of theta under conditions x, for NPE. True: that of x under theta, for NLE.
    z_score_theta, z_score_x : {"independent", "structured", "none", "transform_to_unconstrained"} or None
        As in sbi; the last for the inputs of the density alone, within the support of `x_dist`.
    hidden_features : int or sequence of int
        Widths of the hidden layers of each transform; an int for two of this width.
    num_transforms : int
    embedding_net : torch.nn.Module, optional
        From conditions (b, ...) to contexts; it stays in torch and is trained with the flow.
    x_dist : torch.distributions.Distribution, optional
        Whose support bounds the inputs of the density; for NPE the prior.
    **options
        Others of `fastmaf.MAF`.

    Returns
    -------
    callable
        Of (batch_theta, batch_x), as sbi wants it. What it returns is sbi's `ConditionalDensityEstimator`; its ``net`` is a `Flow`.

    Raises
    ------
    ImportError
        If sbi is not installed.

    Examples
    --------
    >>> from sbi.inference import NPE
    >>> import fastmaf.torch, torch
    >>> trainer = NPE(density_estimator=fastmaf.torch.sbi_maf(hidden_features=32))
    >>> fastmaf.torch.sbi_maf()(torch.randn(10, 2), torch.randn(10, 3)).net.context_features
    3
    """
    from fastmaf.torch._sbi import Builder

    net = _torch.nn.Identity() if embedding_net is None else embedding_net
    return Builder(likelihood, z_score_theta, z_score_x, hidden_features, num_transforms, net, x_dist, options)
