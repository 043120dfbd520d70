"""1,000 samples against the peers, and 10,000 samples against the density of as many rows."""

from __future__ import annotations

from collections.abc import Iterator

from .cases import normal
from .checks import check_log_prob, check_sample
from .peers import LIBRARIES, Fastmaf, Unavailable, Zuko, build
from .report import Settings
from .timing import Contender, Line, against, compare

SLOW = ("X",)
"""Models of which the peers need a minute or more for one call."""


def run(settings: Settings) -> Iterator[Line]:
    """Two lines per model."""
    for model in settings.models:
        slow = model.name in SLOW
        kinds = LIBRARIES if not slow else (Fastmaf, Zuko) if settings.slow else (Fastmaf,)
        libraries, skipped = build(model, kinds)
        skipped |= {k.name: "one call takes minutes; zuko's is timed with --slow" for k in LIBRARIES if k not in kinds}

        rows = 100 if settings.quick else 1000
        contenders = []
        for lib in libraries:
            try:
                once = slow and lib.name != "fastmaf"
                contenders.append(Contender(lib.name, lib.sample(rows), check_sample(lib, rows, model.features), once))
            except Unavailable as problem:
                skipped[lib.name] = str(problem)
        work = 2.0 * libraries[0].unmasked
        line = Line("sample", model.name, rows, skipped=skipped)
        compare(line, contenders, settings.rounds, settings.threads, flops=rows * work)
        against(line, "times zuko", {"zuko"})
        against(line, "times the best peer")
        yield line

        ours, rows = libraries[0], 1000 if settings.quick else 10_000
        x = normal(rows, model.features)
        contenders = [
            Contender("fastmaf sample", ours.sample(rows), check_sample(ours, rows, model.features)),
            Contender("fastmaf log_prob", ours.log_prob(x), check_log_prob(ours, x)),
        ]
        line = compare(Line("sample against log_prob", model.name, rows), contenders, settings.rounds, settings.threads, flops=rows * work)
        if "ratio" in line.contenders.get("fastmaf log_prob", {}):
            line.values["sample / log_prob"] = 1 / line.contenders["fastmaf log_prob"]["ratio"]["median"]
        yield line
