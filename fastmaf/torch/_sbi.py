"""A density estimator of sbi that computes in the core; see `fastmaf.torch.sbi_maf`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from sbi.utils.sbiutils import standardizing_net, z_score_parser, z_standardization
from torch import Tensor, nn

from fastmaf import _words
from fastmaf.flow import Flow as _Flow
from fastmaf.layers import Affine, Elementwise
from fastmaf.torch._module import MAF, Flow

__all__ = ["Builder", "Estimator", "fit"]

UNCONSTRAINED = "transform_to_unconstrained"


class Estimator(ConditionalDensityEstimator):
    """A `fastmaf.torch.Flow` behind an embedding of the condition, as sbi's trainers and posteriors use it.

    Parameters
    ----------
    net : Flow
    embedding_net : torch.nn.Module
        From conditions (b, *shape) to contexts, which are flattened to (b, C).
    input_shape, condition_shape : torch.Size
    """

    def __init__(self, net: Flow, embedding_net: nn.Module, input_shape: torch.Size, condition_shape: torch.Size) -> None:
        super().__init__(net, input_shape, condition_shape)
        self._embedding_net = embedding_net

    @property
    def embedding_net(self) -> nn.Module:
        """What turns conditions into contexts."""
        return self._embedding_net

    def _context(self, condition: Tensor) -> Tensor:
        """The embedding of conditions (*batch, *shape): (*batch, C)."""
        self._check_condition_shape(condition)
        batch = condition.shape[: condition.dim() - len(self.condition_shape)]
        flat = self._embedding_net(condition.reshape(-1, *self.condition_shape))
        return flat.reshape(*batch, self.net.context_features)

    def log_prob(self, input: Tensor, condition: Tensor, **_: Any) -> Tensor:
        """Log-density (sample, batch) of inputs (sample, batch, D) or (batch, D) under conditions (batch, ...) or (sample, batch, ...)."""
        self._check_input_shape(input)
        self._check_condition_shape(condition)
        shape = self._broadcast_and_align(input, condition)[0].shape[:2]
        result = self.net.log_prob(input if input.dim() > 2 else input[None], self._context(condition))
        return result.expand(shape)

    def loss(self, input: Tensor, condition: Tensor, **_: Any) -> Tensor:
        """Negative log-density, (batch,)."""
        return -self.log_prob(input[None], condition)[0]

    def sample(self, sample_shape: torch.Size, condition: Tensor, **_: Any) -> Tensor:
        """Draw (*sample_shape, batch, D) under conditions (batch, ...)."""
        return self.net(self._context(condition)).sample(sample_shape)

    def inverse_transform(self, input: Tensor, condition: Tensor) -> Tensor:
        """The noise of inputs (..., D); shapes broadcast."""
        return self.net.to_noise(input, self._context(condition))


class Builder:
    """What `fastmaf.torch.sbi_maf` gives: called by sbi with a batch, it makes an `Estimator`."""

    def __init__(
        self,
        likelihood: bool,
        z_score_theta: str | None,
        z_score_x: str | None,
        hidden_features: int | Sequence[int],
        num_transforms: int,
        embedding_net: nn.Module,
        x_dist: Any,
        options: dict[str, Any],
    ) -> None:
        self.likelihood, self.z_scores = likelihood, (z_score_theta, z_score_x)
        self.hidden_features = (hidden_features,) * 2 if isinstance(hidden_features, int) else tuple(hidden_features)
        self.num_transforms, self.embedding_net, self.x_dist, self.options = num_transforms, embedding_net, x_dist, options

    def __call__(self, batch_theta: Tensor, batch_x: Tensor) -> Estimator:
        (inputs, wanted), (conditions, of_condition) = zip((batch_theta, batch_x), self.z_scores, strict=True)
        if self.likelihood:
            (inputs, wanted), (conditions, of_condition) = (conditions, of_condition), (inputs, wanted)
        if inputs.dim() != 2:
            raise ValueError(f"the inputs of the density have shape {_words.shapes(tuple(inputs.shape))}; they must be (batch, D)")
        net: nn.Module = self.embedding_net
        plain = isinstance(net, nn.Identity)
        scaled, structured = z_score_parser(of_condition)
        context_layers: list[Affine] = []
        if scaled and plain:  # by the core, with the flow
            flat = conditions.reshape(len(conditions), -1)
            context_layers = [_affine(flat, structured)]
        elif scaled:
            net = nn.Sequential(standardizing_net(conditions, structured), net)
        with torch.no_grad():
            width = net(conditions[:2]).reshape(len(conditions[:2]), -1).shape[1]
        bounds = _bounds(self.x_dist, inputs.shape[1]) if wanted == UNCONSTRAINED else None
        options = {"transforms": self.num_transforms, "hidden_features": self.hidden_features} | self.options
        module = MAF(inputs.shape[1], width, bounds=bounds, dtype=str(inputs.dtype).removeprefix("torch."), **options)
        record = module.to_flow().record
        layers = list(record.layers)
        k = [type(layer) for layer in layers].index(Affine)
        front = layers[0] if k else None
        scaled, structured = z_score_parser(wanted)
        if isinstance(front, Elementwise):
            layers[k] = _affine(_unbounded(front, inputs), False)
        elif scaled:
            layers[k] = _affine(inputs, structured)
        record = record.replaced(layers=layers, context_layers=context_layers)
        return Estimator(Flow(_Flow._of(record)), net, inputs[0].shape, conditions[0].shape)


def _affine(batch: Tensor, structured: bool) -> Affine:
    """What standardises a batch, as sbi does it."""
    mean, std = (np.broadcast_to(part.double().numpy(), batch.shape[1:]) for part in z_standardization(batch, structured))
    return Affine(mean, 1 / std)


def _unbounded(front: Elementwise, inputs: Tensor) -> Tensor:
    """Rows behind the bounds."""
    flow = _Flow([front], dtype="float64")
    result: Tensor = torch.from_numpy(flow.to_noise(inputs.double().numpy()))
    return result


def _bounds(x_dist: Any, features: int) -> list[tuple[float | None, float | None] | None]:
    """The support of a distribution, column by column."""
    if x_dist is None:
        raise ValueError(f"x_dist is missing; z-scoring by {UNCONSTRAINED!r} takes the bounds from its support: x_dist=prior")
    support = x_dist.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    low, high = getattr(support, "lower_bound", -np.inf), getattr(support, "upper_bound", np.inf)
    known = any(hasattr(support, name) for name in ("lower_bound", "upper_bound")) or isinstance(
        support, type(torch.distributions.constraints.real)
    )
    if not known:
        raise ValueError(f"x_dist has a support of type {type(support).__name__}; it must be real, or have bounds for each column")
    ends = [np.broadcast_to(np.asarray(end, np.float64), (features,)) for end in (low, high)]
    pairs = [tuple(float(end) if np.isfinite(end) else None for end in pair) for pair in zip(*ends, strict=True)]
    return [None if pair == (None, None) else (pair[0], pair[1]) for pair in pairs]


def fit(trainer: Any, options: dict[str, Any]) -> Estimator:
    """Train by `fastmaf.Flow.fit` what sbi's trainer would; see `fastmaf.torch.sbi_fit`."""
    builder = getattr(trainer, "_build_neural_net", None)
    if not isinstance(builder, Builder):
        raise ValueError(
            f"trainer is of type {type(trainer).__name__}; it must be one of sbi, made with density_estimator=fastmaf.torch.sbi_maf()"
        )
    kinds = [kind.__name__ for kind in type(trainer).__mro__]
    of_likelihood = "LikelihoodEstimatorTrainer" in kinds
    if builder.likelihood is not of_likelihood and (of_likelihood or "PosteriorEstimatorTrainer" in kinds):
        raise ValueError(
            f"trainer is of type {kinds[0]}, which learns a {'likelihood' if of_likelihood else 'posterior'}: make it with "
            f"density_estimator=fastmaf.torch.sbi_maf({'likelihood=True' if of_likelihood else ''})"
        )
    if "standardize" in options:
        raise ValueError("standardize is for sbi_maf to say: z_score_theta, z_score_x")
    if max(getattr(trainer, "_data_round_index", None) or [0]) and not builder.likelihood:
        raise NotImplementedError("simulations of later rounds need the loss of sbi: trainer.train()")
    theta, x, _ = trainer.get_simulations()
    estimator = builder(theta, x)
    if any(parameter.requires_grad for parameter in estimator.embedding_net.parameters()):
        raise NotImplementedError("an embedding_net with weights is trained in torch: trainer.train()")
    inputs, conditions = (x, theta) if builder.likelihood else (theta, x)
    with torch.no_grad():
        contexts = estimator._context(conditions)
    flow = estimator.net.to_flow()
    progress = None if getattr(trainer, "_show_progress_bars", True) else False
    options = {"seed": int(torch.empty((), dtype=torch.int64).random_()), "progress": progress} | options
    history = flow.fit(inputs, contexts, standardize=False, **options)
    fitted = Estimator(Flow(flow), estimator.embedding_net, estimator.input_shape, estimator.condition_shape)
    trainer._neural_net = fitted
    for name, values in (
        ("training_loss", [-value for value in history.train]),
        ("validation_loss", [-value for value in history.validation]),
        ("epochs_trained", [len(history.train)]),
        ("best_validation_loss", [-max(history.validation, default=float("nan"))]),
        ("epoch_durations_sec", np.diff(history.seconds, prepend=0).tolist()),
    ):
        trainer.summary[name] += values
    return fitted
