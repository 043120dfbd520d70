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

__all__ = ["MAF", "Flow", "NormalizingFlow", "as_zuko", "nessai_maf", "sbi_fit", "sbi_maf"]


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
        Others of `fastmaf.MAF`. `activation` is "silu" unless it is given: with "relu" posteriors of bent relations come out worse.

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

    instead = {"dtype": "it is that of the simulations", "bounds": "they come from x_dist", "transforms": "name num_transforms"}
    if taken := sorted(set(instead) & set(options)):
        raise ValueError(f"{taken[0]} is no option of sbi_maf: {instead[taken[0]]}")
    net = _torch.nn.Identity() if embedding_net is None else embedding_net
    options = {"activation": "silu", **options}
    return Builder(likelihood, z_score_theta, z_score_x, hidden_features, num_transforms, net, x_dist, options)


def as_zuko(flow: Flow) -> Any:
    """Make a `zuko.flows.Flow` of a flow, for what asks for that class: ``pocomc.Sampler(..., flow=as_zuko(MAF(10)))``.

    Parameters
    ----------
    flow : fastmaf.torch.Flow

    Returns
    -------
    zuko.flows.Flow
        Its ``flow`` is the one given, with the same weights.

    Raises
    ------
    ImportError
        If zuko is not installed.
    ValueError
        If this is no flow of `fastmaf.torch`.

    Examples
    --------
    >>> import torch, fastmaf.torch
    >>> flow = fastmaf.torch.as_zuko(fastmaf.torch.MAF(3))
    >>> flow().sample((5,)).shape
    torch.Size([5, 3])
    """
    from fastmaf.torch import _samplers

    return _samplers.as_zuko(flow)


def nessai_maf(**options: Any) -> Any:
    """Make a class of flows for nessai: ``FlowSampler(..., flow_config=dict(flow=nessai_maf(), n_blocks=4, n_neurons=32, n_layers=2))``.

    Parameters
    ----------
    **options
        Of `fastmaf.MAF`. By default nessai's ``n_blocks`` is the number of transforms, ``n_neurons`` and ``n_layers`` are the width and the
        number of hidden layers of each.

    Returns
    -------
    class
        A subclass of nessai's `BaseFlow`.

    Raises
    ------
    ImportError
        If nessai is not installed.
    """
    from fastmaf.torch import _samplers

    return _samplers.nessai_maf(options)


def sbi_fit(trainer: Any, **options: Any) -> Any:
    """Train what a trainer of sbi was given, by `fastmaf.Flow.fit` in place of ``trainer.train()``: the same loss, several times faster.

    Batches, learning rate, clipping, the share of validation rows and the patience are those of sbi unless named.

    Parameters
    ----------
    trainer : NPE or NLE of sbi
        Made with ``density_estimator=sbi_maf(...)``, and with simulations appended.
    **options
        Of `fastmaf.Flow.fit`, except ``standardize``. By default ``batch_size=200, lr=5e-4, validation=0.1, patience=20, clip_norm=5.0``,
        epochs without limit, and a seed drawn from torch.

    Returns
    -------
    ConditionalDensityEstimator
        That of the best epoch, which ``trainer.build_posterior()`` takes from now on; ``trainer.summary`` has the losses. Each call trains
        new weights.

    Raises
    ------
    ValueError
        If the trainer was made with another density estimator.
    NotImplementedError
        For what only sbi's own loop does: an embedding with weights, and later rounds of NPE.

    Examples
    --------
    >>> import torch, fastmaf.torch
    >>> from sbi.inference import NPE
    >>> prior = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    >>> theta = prior.sample((500,))
    >>> trainer = NPE(prior, density_estimator=fastmaf.torch.sbi_maf(hidden_features=16))
    >>> trainer = trainer.append_simulations(theta, theta + torch.randn(500, 2))
    >>> estimator = fastmaf.torch.sbi_fit(trainer, max_epochs=3, progress=False)
    >>> trainer.build_posterior().sample((10,), x=torch.zeros(2), show_progress_bars=False).shape
    torch.Size([10, 2])
    """
    from fastmaf.torch._sbi import fit

    usual = {"batch_size": 200, "lr": 5e-4, "validation": 0.1, "patience": 20, "clip_norm": 5.0, "max_epochs": 2**31 - 1}
    return fit(trainer, usual | options)
