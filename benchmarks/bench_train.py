"""A step of training, gradient and Adam, at batches of 100 and 1,000 rows."""

from __future__ import annotations

from collections.abc import Iterator

from .cases import normal
from .checks import check_train
from .peers import Fastmaf, Zuko, ZukoCompiled, build
from .report import Settings
from .timing import Contender, Line, against, compare

STEPS = {"S": 100, "M": 20}
"""Steps of one call; 5 for the larger models."""


def run(settings: Settings) -> Iterator[Line]:
    """One line per model and batch size; times are those of one step."""
    kinds = (Fastmaf, Zuko) if settings.quick else (Fastmaf, Zuko, ZukoCompiled)
    for model in settings.models:
        libraries, skipped = build(model, kinds)
        steps = 5 if settings.quick else STEPS.get(model.name, 5)
        for batch in (100,) if settings.quick else (100, 1000):
            x = normal(steps * batch, model.features)
            contenders = [Contender(lib.name, lib.train(x, batch), check_train(lib, x, batch), steps=steps) for lib in libraries]
            # The gradient costs two more products of the size of the density.
            flops = 6.0 * steps * batch * libraries[0].unmasked
            line = Line("train", model.name, batch, skipped=dict(skipped))
            compare(line, contenders, settings.rounds, settings.threads, flops)
            against(line, "times zuko", {"zuko"})
            against(line, "times the best peer")
            yield line
