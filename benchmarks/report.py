"""Settings of a run, the machine it ran on, and its results as JSON and as Markdown."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .cases import MODELS, Model
from .timing import Line

PACKAGES = ("fastmaf", "numpy", "torch", "zuko", "nflows", "jax", "flowjax")


@dataclass(frozen=True)
class Settings:
    """What the command line chose."""

    models: tuple[Model, ...]
    operations: tuple[str, ...]
    rounds: int
    threads: int
    quick: bool
    slow: bool
    data: Path


def machine(threads: int) -> dict[str, Any]:
    """Where and with what a run was made."""
    import fastmaf
    from fastmaf import config

    cpu = Path("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in cpu.read_text().splitlines() if ":" in line) if cpu.exists() else {}
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", "").split()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "commit": _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else ""),
        "cpu": fields.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "vector instructions": [f for f in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile") if f in flags],
        "system": f"{platform.system()} {platform.machine()}",
        "threads": threads,
        "load before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "backend": fastmaf.get_backend(),
        "isa": config.get_isa() if fastmaf.get_backend() == "cpu" else f"backend {fastmaf.get_backend()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown" if arguments[0] == "rev-parse" else ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(stem: Path, where: dict[str, Any], lines: list[Line], settings: Settings) -> None:
    """Write stem.json and stem.md; called after every line, so that a run cut short leaves what it has."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    run = {"rounds": settings.rounds, "quick": settings.quick, "slow": settings.slow, "operations": settings.operations}
    results = [asdict(line) | {"goals": line.goals()} for line in lines]
    stem.with_name(stem.name + ".json").write_text(json.dumps({"machine": where, "run": run, "lines": results}, indent=1) + "\n")
    stem.with_name(stem.name + ".md").write_text(markdown(where, lines, settings.quick))


def markdown(where: dict[str, Any], lines: list[Line], quick: bool) -> str:
    """The goals, then everything that was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    models = ", ".join(map(str, MODELS.values()))
    taken = max((line.values.get("CPUs taken by others", 0.0) for line in lines), default=0.0)
    busy = f"**Not a quiet machine:** other processes took up to {taken:.2f} CPUs; pools that wait at barriers (torch's) suffer most."
    text = [
        "# fastmaf beside its peers",
        "",
        f"{where['cpu']}, {where['threads']} threads, {where['isa']}, {where['date']}, commit {where['commit'][:12]}; {versions}.",
        f"Models (variables, hidden layers, MADEs): {models}; relu, float32.",
        *(["", "A quick run: it shows that the benchmark works, not how fast anything is."] if quick else []),
        *(["", busy] if taken > 0.1 else []),
        "",
        "## Goals",
        "",
        "| operation | model | rows | measured | goal | |",
        "|---|---|---:|---:|---:|---|",
    ]
    for line in lines:
        for goal in line.goals():
            value = "not measured" if goal["measured"] is None else f"{goal['measured']:.3g}"
            verdict = {True: "met", False: "**missed**", None: "open"}[goal["met"]]
            text.append(f"| {line.operation} | {line.model} | {line.rows} | {value} {goal['what']} | {goal['goal']} | {verdict} |")
    for operation in dict.fromkeys(line.operation for line in lines):
        rows = [row for line in lines if line.operation == operation for row in _rows(line)]
        text += ["", f"## {operation}", "", *HEADER, *rows]
        notes = {f"- {name}: {why}" for line in lines if line.operation == operation for name, why in line.skipped.items()}
        text += ["", "Not there:", "", *sorted(notes)] if notes else []
    return "\n".join(text) + "\n"


HEADER = [
    "| model | rows | library | time | / time of the first (quartiles) | error | peak memory | more |",
    "|---|---:|---|---:|---:|---:|---:|---|",
]


def _rows(line: Line) -> list[str]:
    """One row per contender, the line's own values beside the first."""
    more = ", ".join(f"{key} {value:.3g}" for key, value in line.values.items() if isinstance(value, (int, float)))
    rows = []
    for name, entry in line.contenders.items() or [("fastmaf", {})]:
        ratio = "{median:.3g} ({low:.3g} to {high:.3g})".format(**entry["ratio"]) if "ratio" in entry else ""
        cells = (
            duration(entry["seconds"]["median"]) if "seconds" in entry else "",
            ratio,
            f"{entry['error']:.2g}" if "error" in entry else "",
            f"{entry['peak_memory_mb']:.1f} MB" if entry.get("peak_memory_mb") is not None else "",
            more,
        )
        rows.append(f"| {line.model} | {line.rows} | {name} | {' | '.join(cells)} |")
        more = ""
    return rows


def text(line: Line) -> str:
    """A line for the terminal."""
    goals = [f"  {g['what']}: {g['measured']} ({g['goal']}): {g['met']}" for g in line.goals()]
    return "\n".join([line.operation, *_rows(line), *goals, *(f"  without {name}: {why}" for name, why in line.skipped.items())])


def duration(seconds: float) -> str:
    """A time with three digits and its unit."""
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= s), ("us", 1e-6))
    return f"{seconds / scale:.3g} {unit}"
