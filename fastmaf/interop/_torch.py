"""Transforms of `torch.distributions` that depend on nothing, as layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastmaf.interop import _common
from fastmaf.interop._common import refuse
from fastmaf.layers import Elementwise, FlowLayer

__all__ = ["layers_of", "standard"]

Parts = Callable[[Any], "Sequence[Any] | None"]
Leaf = Callable[[Any, int], "list[FlowLayer] | None"]


def layers_of(importer: str, transform: Any, features: int, inverse: bool, parts_of: Parts, leaf: Leaf) -> list[FlowLayer]:
    """The layers z = transform(x), or those of its inverse; bounds are in the record as inverses alone.

    Parameters
    ----------
    importer : str
    transform : Transform
    features : int
    inverse : bool
    parts_of : callable
        The transforms that a transform of another library is composed of, in order; None for others.
    leaf : callable
        The layers of a transform of another library, and of a number of features; None for others.

    Raises
    ------
    NotImplementedError
        With the name of the transform, if the record has no layer for it.
    """
    import torch.distributions.transforms as t

    def of(part: Any, backwards: bool, width: int = features) -> list[FlowLayer]:
        return layers_of(importer, part, width, backwards, parts_of, leaf)

    if isinstance(transform, t._InverseTransform):
        return of(transform._inv, not inverse)
    parts = parts_of(transform)
    if parts is None and isinstance(transform, t.IndependentTransform):
        parts = [transform.base_transform]
    if parts is None and isinstance(transform, t.ComposeTransform):
        parts = transform.parts
    if parts is not None:
        return [layer for part in (reversed(parts) if inverse else parts) for layer in of(part, inverse)]
    if isinstance(transform, (t.CatTransform, t.StackTransform)):
        lengths = transform.lengths if isinstance(transform, t.CatTransform) else [1] * len(transform.transforms)
        return _common.joined(importer, [(n, of(part, inverse, n)) for n, part in zip(lengths, transform.transforms, strict=True)])
    if inverse and isinstance(transform, t.SigmoidTransform):
        return [Elementwise(("logit",) * features, np.zeros(features), np.ones(features))]
    if inverse and isinstance(transform, t.ExpTransform):
        return [Elementwise(("log_above",) * features, np.zeros(features), np.full(features, np.inf))]
    own = leaf(transform, features)
    if own is None and isinstance(transform, t.AffineTransform):
        own = [_common.scaled(_common.wide("scale", transform.scale), _common.wide("loc", transform.loc), features)]
    if own is None:
        raise refuse(importer, _common.named(transform), "it has no layer in the record, from the data to the noise")
    return _common.inverse(importer, own) if inverse else own


def standard(importer: str, base: Any) -> FlowLayer:
    """From a normal of torch to a standard one."""
    from torch.distributions import Independent, Normal

    inner = base
    while isinstance(inner, Independent):
        inner = inner.base_dist
    if not isinstance(inner, Normal):
        raise refuse(importer, f"the base {_common.named(inner)}", "the base of a flow is a diagonal normal")
    loc, scale = _common.wide("base.loc", inner.loc).ravel(), _common.wide("base.scale", inner.scale).ravel()
    return _common.scaled(1 / scale, -loc / scale, loc.size)
