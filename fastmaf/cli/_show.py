"""``fastmaf info``, ``config``, ``export`` and ``plot``: what is there, in words, as source and as a picture."""

from __future__ import annotations

import argparse
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastmaf
from fastmaf import _files, _words
from fastmaf.cli import _common
from fastmaf.cli._common import UsageError
from fastmaf.layers import Elementwise, Terminal

__all__ = ["add"]

Array = NDArray[Any]

INFO = """\
  fastmaf info
  fastmaf info flow.safetensors"""

PLOT = """\
  fastmaf plot flow.safetensors galaxies.csv -o corner.png
  fastmaf plot flow.safetensors galaxies.csv --show z,r,i -o corner.pdf
  fastmaf plot flow.safetensors test.csv --noise -o noise.png"""

EXPORT = """\
  fastmaf export flow.safetensors --c flow.c --gradient"""

PICTURES = ("png", "pdf", "svg", "jpg", "jpeg", "eps", "ps", "webp", "tif", "tiff")


def add(commands: Any) -> None:
    """Add the commands."""
    info = commands.add_parser(
        "info",
        help="what a flow is, or what was built, what runs, and why the rest is absent",
        description="What a flow consists of and how it was fitted; without one, what this installation has, and why the rest is absent.",
        examples=INFO,
    )
    info.add_argument("flow", metavar="FLOW", nargs="?", help="a .safetensors file, or - for stdin")
    info.set_defaults(run=_info)

    config = commands.add_parser("config", help="where the library for C, C++ and Fortran lies, for compilers and build systems")
    for option, (_, text) in _CONFIG.items():
        config.add_argument(f"--{option}", action="append_const", dest="wanted", const=option, help=text)
    config.set_defaults(run=_config)

    export = commands.add_parser("export", help="write a flow as C source that needs no library", examples=EXPORT)
    export.add_argument("flow", metavar="FLOW", help="a .safetensors file, or - for stdin")
    export.add_argument("--c", type=Path, required=True, metavar="FILE", help="the C file; its header is written beside it")
    export.add_argument("--gradient", action="store_true", help="with a function for the gradients of the log-density")
    export.add_argument("--dtype", choices=("float", "double"), help="of the arithmetic and of all arrays (default: that of the flow)")
    export.add_argument("--prefix", metavar="NAME", help="what all names begin with (default: the name of the C file)")
    export.set_defaults(run=_export)

    plot = commands.add_parser(
        "plot",
        help="picture rows of a file against samples of a flow",
        description="All pairs of variables: rows of a file, and samples of the flow (under the contexts of these rows).",
        examples=PLOT,
    )
    plot.set_defaults(run=_plot)
    plot.add_argument("flow", metavar="FLOW", help="a .safetensors file, or - for stdin")
    plot.add_argument("data", metavar="DATA", help=".npy, .npz, .csv, .parquet, the root of a chain, or - for stdin")
    plot.add_argument("-o", "--output", required=True, metavar="FILE", help=".png, .pdf, .svg or what else matplotlib writes")
    _common.add_columns(plot)
    plot.add_argument("--weights", metavar="NAME", help="column with the weights of the rows (default: that of a chain)")
    plot.add_argument("--noise", action="store_true", help="the noise that the rows become, which should be N(0, I), instead")
    plot.add_argument("--show", type=_common.labels, metavar="NAMES", help="only these variables")
    plot.add_argument(
        "--rows", type=_common.positive, default=20_000, metavar="N", help="at most so many, drawn from all (default: %(default)s)"
    )
    plot.add_argument("--seed", type=_common.seed, default=0, metavar="N", help="of rows and samples (default: %(default)s)")
    _common.add_table(plot, ("refuse", "drop"))
    _common.add_run(plot)


def _info(arguments: argparse.Namespace) -> int:
    if arguments.flow is None:
        print(fastmaf.show_config())
        return 0
    flow = _common.load(arguments)
    print(flow.summary())
    context = _common.context_names(flow)
    layers = flow.layers
    bounds = layers[0] if layers and isinstance(layers[0], Elementwise) else None
    names = _common.names_of(flow)
    print(f"\nvariables       {', '.join(names) if flow.names else f'{flow.features}, without names'}")
    if flow.context_features:
        print(f"context         {', '.join(context) if context else f'{flow.context_features}, without names'}")
    if bounds is not None:
        ends = [f"{name} in ({low:g}, {high:g})" for name, low, high in zip(names, bounds.lower, bounds.upper, strict=True)]
        print(f"bounds          {', '.join(text for text, kind in zip(ends, bounds.kinds, strict=True) if kind != 'identity')}")
    base = flow.base
    if isinstance(base, Terminal) and base.categories:
        counted = [f"{name} {count}" for name, count in zip(names, base.categories, strict=True) if count]
        print(f"categories      {', '.join(counted)}")
    if isinstance(flow, fastmaf.Ensemble) and not isinstance(flow, fastmaf.MaskedEnsemble):
        print(f"member          the first of {len(flow)}")
    for key, value in flow.training.items():
        if key != _common.COLUMNS:
            words = ", ".join(f"{name} {_short(each)}" for name, each in value.items()) if isinstance(value, dict) else _short(value)
            print(f"{key:<15} {_words.cut(words, 400)}")
    return 0


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


_CONFIG: dict[str, tuple[str, str]] = {
    "cflags": ("-I{0}/include", "options of the compiler"),
    "libs": ("-L{0}/lib -lfastmaf -Wl,-rpath,{0}/lib", "options of the linker"),
    "cmake-dir": ("{0}/lib/cmake/fastmaf", "for -Dfastmaf_DIR="),
    "fortran": ("{0}/include/fastmaf.f90", "source of the Fortran module"),
}


def _config(arguments: argparse.Namespace) -> int:
    home = Path(fastmaf.__file__).parent
    if not list((home / "lib").glob("*fastmaf*")):
        raise RuntimeError("this installation has no library for C: it runs from its sources or without the core; pip install fastmaf")
    wanted = arguments.wanted or [*_CONFIG]
    print(*(_CONFIG[option][0].format(home) for option in wanted), sep=" " if arguments.wanted else "\n")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    dtype = {"float": "float32", "double": "float64", None: None}[arguments.dtype]
    _common.apart(str(arguments.c), arguments.flow)
    flow = _common.load(arguments)
    fastmaf.export_c(flow, arguments.c, gradient=arguments.gradient, dtype=dtype, prefix=arguments.prefix)
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    _common.start(arguments)
    kind = os.path.splitext(arguments.output)[1].lower().removeprefix(".") if arguments.output != "-" else "png"
    if kind not in PICTURES:
        raise UsageError(f"{arguments.output} ends in none of .{', .'.join(PICTURES[:3])}")
    _common.apart(arguments.output, arguments.flow, arguments.data)
    from fastmaf import plot

    flow = _common.load(arguments)
    if arguments.noise and isinstance(flow, fastmaf.Ensemble):
        raise UsageError(f"--noise is for a flow, and {arguments.flow} is an ensemble, whose members have noise of their own")
    with _common.open_data(arguments) as table:
        features, contexts = _common.columns_of(flow, table, arguments)
        weight = arguments.weights if arguments.weights is not None else table.weights
        columns = table.choose([*features, *contexts, *([weight] if weight is not None else [])])
        rng = np.random.default_rng(arguments.seed)
        chunks = _common.complete(table, columns, arguments)
        rows = _some(chunks, arguments.rows, rng) if weight is None else _by_weight(chunks, arguments.rows, rng)
        _common.left_out(chunks.missing, chunks.rows, "row", arguments.quiet)
        fitted = (flow.training.get(_common.COLUMNS) or {}).get("weights")
        if fitted is not None and weight is None:
            with_it = f"--weights {_words.cut(fitted)} pictures them so"
            _words.warn(f"the flow was fitted to weighted rows, and the rows here have no weights: {with_it}", UserWarning)
    if not len(rows):
        raise ValueError(f"{table.name} has no rows")
    x, context = rows[:, : len(features)], rows[:, len(features) : len(features) + len(contexts)] if contexts else None
    names = list(flow.names or features)
    shown = list(range(len(names)))
    if arguments.show:
        unknown = [label for label in arguments.show if label not in names]
        if unknown:
            raise UsageError(f"--show: no variable is named {unknown[0]}; the variables are {_common.listed(names)}")
        shown = [names.index(label) for label in arguments.show]
    labels = [names[k] for k in shown] if table.named or flow.names else None
    if arguments.noise:
        figure = plot.noise(flow.to_noise(x, context)[:, shown], labels)
    else:
        draws = flow.sample(len(x), seed=arguments.seed) if context is None else flow.sample(1, context, seed=arguments.seed)[:, 0]
        figure = plot.corner(x[:, shown], draws[:, shown], labels)
    picture = io.BytesIO()
    figure.savefig(picture, format=kind)  # type: ignore[attr-defined]
    _files.save(picture.getvalue(), _common.output(arguments.output))
    _common.note(f"{_common.counted(len(x))}: {arguments.output}", arguments.quiet or arguments.output == "-")
    return 0


def _some(chunks: Any, n: int, rng: np.random.Generator) -> Array:
    """At most n rows, each as likely as any other: those of the smallest random keys."""
    kept: list[Array] = []
    keys: list[Array] = []
    for chunk in chunks:
        kept.append(chunk)
        keys.append(rng.random(len(chunk)))
        if sum(map(len, kept)) > 2 * n + len(chunk):
            kept, keys = _smallest(kept, keys, n)
    kept, _ = _smallest(kept, keys, n) if kept else (kept, keys)
    return kept[0] if kept else np.empty((0, 1))


def _smallest(kept: list[Array], keys: list[Array], n: int) -> tuple[list[Array], list[Array]]:
    rows, key = np.concatenate(kept), np.concatenate(keys)
    chosen = np.sort(np.argsort(key, kind="stable")[:n])
    return [rows[chosen]], [key[chosen]]


def _by_weight(chunks: Any, n: int, rng: np.random.Generator) -> Array:
    """N rows, as often as their weights in the last column say, which is left out."""
    parts = list(chunks)
    rows = np.concatenate(parts) if parts else np.empty((0, 1))
    weights = rows[:, -1].astype(np.float64)
    if not len(rows):
        return rows
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise ValueError("weights must be finite, not negative and not all zero")
    ends = np.cumsum(weights)
    places = (np.arange(n) + rng.random()) * (ends[-1] / n)
    return np.asarray(rows[np.minimum(np.searchsorted(ends, places, side="right"), len(rows) - 1), :-1])
