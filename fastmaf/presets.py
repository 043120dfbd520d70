"""Published recipes: a model, and the settings with which it is to be trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import DTypeLike

from fastmaf._arrays import Seed
from fastmaf.flow import Flow
from fastmaf.maf import MAF, Bounds, Order

__all__ = ["maf_paper", "resmade_lu"]

Recipe = tuple[Flow, dict[str, Any]]

CLIP = 1.0
"""Largest log-scale of a network of `resmade_lu`, however many there are. With log(1000) one test row in 50,000 came out at -1e34 nats."""


def maf_paper(
    features: int,
    context_features: int = 0,
    transforms: int = 5,
    hidden_features: Sequence[int] = (512, 512),
    activation: str = "relu",
    components: int = 1,
    bounds: Bounds | None = None,
    names: Sequence[str] | None = None,
    dtype: DTypeLike = "float32",
    seed: Seed = None,
) -> Recipe:
    """The MAF of Papamakarios et al. 2017: batch norm behind every layer, the order turned around in every second one.

    Adam with learning rate 1e-4, batches of 100 rows, an L2 penalty of 1e-6, stopping after 30 epochs without a better validation score.
    The paper takes 1 or 2 hidden layers of 100 units (POWER, GAS), 512 (HEPMASS, MINIBOONE, BSDS300) or 1024 (BSDS300, MNIST), tanh on GAS
    and relu elsewhere, 5 or 10 transforms, and 10 components in its MAF MoG. Its log-scales have no bound; here they have that of `MAF`.

    Parameters
    ----------
    features, context_features, transforms, hidden_features, activation, components, bounds, names, dtype, seed
        As in `fastmaf.MAF`.

    Returns
    -------
    flow : Flow
    settings : dict
        For `Flow.fit`.

    Raises
    ------
    ValueError
        If a parameter is out of range.

    Examples
    --------
    >>> import fastmaf
    >>> flow, settings = fastmaf.presets.maf_paper(features=6, transforms=1, hidden_features=(100,))
    >>> flow
    Flow(features=6, dtype=float32): Affine -> Autoregressive((100), relu, exp_soft) -> BatchNorm -> Normal
    >>> settings  # for flow.fit(x, **settings)
    {'batch_size': 100, 'lr': 0.0001, 'l2': 1e-06, 'patience': 30}
    """
    flow = MAF(
        features,
        context_features,
        transforms,
        hidden_features,
        activation,
        batch_norm=True,
        components=components,
        bounds=bounds,
        names=names,
        dtype=dtype,
        seed=seed,
        input_clip=None,
    )
    return flow, {"batch_size": 100, "lr": 1e-4, "l2": 1e-6, "patience": 30}


def resmade_lu(
    features: int,
    context_features: int = 0,
    transforms: int = 10,
    hidden_features: Sequence[int] = (256, 256),
    activation: str = "relu",
    order: Order = "reverse",
    bounds: Bounds | None = None,
    names: Sequence[str] | None = None,
    dtype: DTypeLike = "float32",
    seed: Seed = None,
) -> Recipe:
    """The MAF that Durkan et al. 2019 compare their spline flows with: residual networks, and a linear layer in front of each.

    Adam with learning rate 5e-4, which falls to zero over all epochs as a cosine; batches of 512 rows; gradients clipped at norm 5. No
    early stopping: the best weights by validation score are kept. Set `max_epochs` to what the data need; the paper takes 400,000 steps.
    Each network scales a variable by e^-1 to e at most, so that a row far from all others cannot grow without bound over ten of them.

    Parameters
    ----------
    features, context_features, transforms, hidden_features, activation, order, bounds, names, dtype, seed
        As in `fastmaf.MAF`.

    Returns
    -------
    flow : Flow
    settings : dict
        For `Flow.fit`.

    Raises
    ------
    ValueError
        If a parameter is out of range.

    Examples
    --------
    >>> import fastmaf
    >>> flow, settings = fastmaf.presets.resmade_lu(features=6, transforms=1)
    >>> flow
    Flow(features=6, dtype=float32): Affine -> Linear -> Autoregressive((256, 256, 256, 256, 256), relu, exp_soft) -> Normal
    >>> settings["schedule"], settings["max_epochs"]
    ('cosine', 200)
    """
    flow = MAF(
        features,
        context_features,
        transforms,
        hidden_features,
        activation,
        order,
        residual=True,
        bounds=bounds,
        names=names,
        dtype=dtype,
        seed=seed,
        linear=True,
        clip=CLIP,
        input_clip=None,
    )
    settings = {"batch_size": 512, "lr": 5e-4, "schedule": "cosine", "clip_norm": 5.0, "patience": None, "max_epochs": 200}
    return flow, settings
