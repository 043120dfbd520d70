"""Density of 1, 100, 1,000 and 10,000 rows."""

from __future__ import annotations

from collections.abc import Iterator

from .cases import normal
from .checks import check_log_prob
from .peers import LIBRARIES, ZukoCompiled, build
from .report import Settings
from .timing import Contender, Line, against, compare


def run(settings: Settings) -> Iterator[Line]:
    """One line per model and number of rows."""
    kinds = tuple(k for k in LIBRARIES if k is not ZukoCompiled) if settings.quick else LIBRARIES
    for model in settings.models:
        libraries, skipped = build(model, kinds)
        for rows in (1, 1000) if settings.quick else (1, 100, 1000, 10_000):
            x = normal(rows, model.features)
            contenders = [Contender(lib.name, lib.log_prob(x), check_log_prob(lib, x)) for lib in libraries]
            line = Line("log_prob", model.name, rows, skipped=dict(skipped))
            compare(line, contenders, settings.rounds, settings.threads, flops=2.0 * rows * libraries[0].unmasked)
            line.values["unmasked weights"] = {lib.name: lib.unmasked for lib in libraries}
            if "seconds" in line.contenders.get("fastmaf", {}):
                line.values["microseconds"] = 1e6 * line.contenders["fastmaf"]["seconds"]["median"]
                against(line, "times the best peer")
            yield line
