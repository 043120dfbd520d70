"""What flows of zuko that were made of those of fastmaf consist of, beside zuko's own parts; imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributions import transforms as t

__all__ = ["ClippedInputs", "bounded", "law"]


class ClippedInputs(torch.nn.Module):  # type: ignore[misc]
    """Inputs of a network of which the first `features` are clipped: variables, but not the context behind them."""

    def __init__(self, features: int, bound: float) -> None:
        super().__init__()
        self.features, self.bound = features, bound

    def forward(self, x: Any) -> Any:
        """Clip."""
        return torch.cat([x[..., : self.features].clamp(-self.bound, self.bound), x[..., self.features :]], dim=-1)

    def extra_repr(self) -> str:
        """Both numbers."""
        return f"features={self.features}, bound={self.bound}"


def law(shift: Any, raw: Any, /, kind: str, form: str, **constants: float) -> Any:
    """The transform of one variable by a law of `fastmaf.layers.Law`."""
    if kind == "softplus":
        scale = torch.nn.functional.softplus(raw) + constants["eps"]
    elif kind == "sigmoid":
        scale = torch.sigmoid(raw + constants["shift"]) + constants["eps"]
    elif kind == "exp_soft":
        scale = (raw / (1 + abs(raw / constants["clip"]))).exp()
    elif kind == "log_precision":
        scale = (raw * (-0.5 if form == "standardize" else 0.5)).exp()
    elif kind == "clamp":
        scale = raw.clamp(constants["low"], constants["high"]).exp()
    else:
        scale = raw.exp()
    made = t.AffineTransform(shift, scale)
    return made.inv if form == "standardize" else made


def bounded(lower: Any, upper: Any, kinds: Sequence[str]) -> Any:
    """From bounds to the real line, column by column."""
    columns = []
    for kind, low, high in zip(kinds, lower, upper, strict=True):
        if kind == "logit":
            parts = [t.AffineTransform(-low / (high - low), 1 / (high - low)), t.SigmoidTransform().inv]
        elif kind == "log_above":
            parts = [t.AffineTransform(-low, 1.0), t.ExpTransform().inv]
        elif kind == "log_below":
            parts = [t.AffineTransform(high, -1.0), t.ExpTransform().inv, t.AffineTransform(0.0, -1.0)]
        else:
            parts = [t.AffineTransform(0.0, 1.0)]
        columns.append(t.IndependentTransform(t.ComposeTransform(parts), 1))
    return t.CatTransform(columns, dim=-1)
