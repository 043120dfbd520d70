"""``fastmaf log-prob`` and ``fastmaf sample``: rows in, rows out, a chunk at a time."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmaf import _arrays
from fastmaf.cli import _common
from fastmaf.cli._common import Progress, UsageError, whole
from fastmaf.data import _sink
from fastmaf.data._source import CHUNK

__all__ = ["add"]

Array = NDArray[Any]

LOG_PROB = """\
  fastmaf log-prob flow.safetensors galaxies.csv > log_prob.csv
  fastmaf log-prob flow.safetensors test.npy --mean
  fastmaf log-prob flow.safetensors huge.parquet --missing keep -o log_prob.npy
  fastmaf sample flow.safetensors -n 5 | fastmaf log-prob flow.safetensors -"""

SAMPLE = """\
  fastmaf sample flow.safetensors -n 1e6 -o samples.npy
  fastmaf sample flow.safetensors -n 10 --seed 1
  fastmaf sample photoz.safetensors -n 1000 --given r=22.5 --given i=21.9
  fastmaf sample photoz.safetensors -n 100 --contexts galaxies.csv -o posteriors.parquet"""


def add(commands: Any) -> None:
    """Add the commands."""
    parser = commands.add_parser(
        "log-prob",
        help="log-density of the rows of a file",
        description="The log-density of each row of a file, in nats. Files may be larger than the memory.",
        examples=LOG_PROB,
    )
    parser.set_defaults(run=log_prob)
    parser.add_argument("flow", metavar="FLOW", help="a .safetensors file, or - for stdin")
    parser.add_argument("data", metavar="DATA", help=".npy, .npz, .csv, .parquet, the root of a chain, or - for stdin")
    _add_output(parser)
    _common.add_columns(parser)
    parser.add_argument("--mean", action="store_true", help="only the mean over the rows and its standard error")
    _common.add_table(parser, ("refuse", "drop", "keep"))
    _common.add_run(parser)

    parser = commands.add_parser(
        "sample",
        help="draw rows",
        description="Draw rows from a flow. With a seed they are the same for any number of threads, and in any format.",
        examples=SAMPLE,
    )
    parser.set_defaults(run=sample)
    parser.add_argument("flow", metavar="FLOW", help="a .safetensors file, or - for stdin")
    parser.add_argument("-n", type=whole, required=True, metavar="N", help="rows to draw (under each context)")
    _add_output(parser)
    parser.add_argument("--seed", type=_common.seed, metavar="N", help="default: drawn")
    parser.add_argument("--offset", type=whole, default=0, metavar="N", help="begin with this row of the stream of the seed")
    parser.add_argument("--dtype", choices=("float32", "float64"), help="of the numbers (default: that of the flow)")
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "--given", type=_common.value, action="append", metavar="NAME=VALUE", help="of the context; to be repeated for each of its columns"
    )
    given.add_argument("--contexts", metavar="DATA", dest="data", help="a file of contexts, each of which gets N rows")
    parser.add_argument("--context", type=_common.labels, metavar="NAMES", help="columns of --contexts (default: those of the fit)")
    _common.add_table(parser, ("refuse", "drop"))
    _common.add_run(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", default="-", metavar="FILE", help=".csv, .npy or .parquet (default: -, CSV on stdout)")
    parser.add_argument("--to", choices=_sink.FORMATS, help="format of the output (default: by the end of its name)")


def _format(arguments: argparse.Namespace) -> str:
    if arguments.to is None and arguments.output != "-":
        try:
            return _sink.format_of(arguments.output)
        except ValueError:
            raise UsageError(f"{arguments.output} ends in none of .{', .'.join(_sink.FORMATS)}: name a format, --to") from None
    found: str = arguments.to or "csv"
    if arguments.output == "-" and found != "csv" and sys.stdout.isatty():
        raise UsageError(f"{found} is not written to a terminal: name a file, -o")
    return found


def log_prob(arguments: argparse.Namespace) -> int:
    """Run ``fastmaf log-prob``."""
    _common.start(arguments)
    format = _format(arguments)
    _common.apart(arguments.output, arguments.flow, arguments.data)
    flow = _common.load(arguments)
    with _common.open_data(arguments) as table:
        features, contexts = _common.columns_of(flow, table, arguments)
        chosen = (*features, *contexts)
        rows = _common.complete(table, chosen, arguments)
        progress = Progress(table.rows, arguments.quiet)
        values = _Densities(flow, rows, len(features), progress)
        if arguments.mean:
            with progress.shown():
                result = _mean(values)
            print(result)
        else:
            known = table.rows if arguments.missing != "drop" else None
            with _sink.open_sink(_common.output(arguments.output), ["log_prob"], flow.dtype, known, format) as sink, progress.shown():
                for part in values:
                    sink.write(part[:, None])
        _common.left_out(rows.missing, rows.rows, "row", arguments.quiet)
        if values.impossible:
            of = f"{values.impossible:,} of {_common.counted(progress.done)} cannot come from the flow"
            _common.note(f"{of} (log_prob is -inf): outside its bounds, no value of its categories, or too far away", arguments.quiet)
        if not arguments.mean:
            progress.summary(arguments.output)
    return 0


class _Densities:
    """Log-densities of chunks, and how many of them are -inf."""

    def __init__(self, flow: Any, chunks: Any, width: int, progress: Progress) -> None:
        self._flow, self._chunks, self._width, self._progress, self.impossible = flow, chunks, width, progress, 0

    def __iter__(self) -> Iterator[Array]:
        width = self._width
        for chunk in self._chunks:
            values = self._flow.log_prob(chunk[:, :width], chunk[:, width:] if chunk.shape[1] > width else None)
            self.impossible += int(np.count_nonzero(np.isneginf(values)))
            yield values
            self._progress.advance(len(chunk))


def _mean(parts: Iterable[Array]) -> str:
    """The mean in words, from one pass."""
    count, mean, square = 0, 0.0, 0.0
    with np.errstate(invalid="ignore"):
        for part in parts:
            if not part.size:
                continue
            values = part.astype(np.float64)
            own = float(values.mean())
            step, added = own - mean, values.size
            count += added
            mean += step * added / count
            square += float(((values - own) ** 2).sum()) + step**2 * added * (count - added) / count
    if not count:
        raise ValueError("there is no row")
    error = math.sqrt(square / (count - 1) / count) if count > 1 and math.isfinite(square) else math.nan
    return f"{mean:.6f} ± {error:.6f} nats per row, {_common.counted(count)}"


def sample(arguments: argparse.Namespace) -> int:
    """Run ``fastmaf sample``."""
    _common.start(arguments)
    format = _format(arguments)
    _common.apart(arguments.output, arguments.flow, arguments.data)
    flow = _common.load(arguments)
    if arguments.offset and arguments.seed is None:
        raise UsageError("--offset needs --seed")
    if flow.context_features and not (arguments.given or arguments.data):
        known = _common.context_names(flow)
        which = f", {_common.listed(known)}" if known else ""
        raise UsageError(f"the flow has {flow.context_features} context features{which}: name their values, --given or --contexts")
    if not flow.context_features and (arguments.given or arguments.data or arguments.context):
        raise UsageError("the flow has no context: leave --given, --contexts and --context out")
    seed = _arrays.seed_or_fresh(arguments.seed)
    dtype = np.dtype(arguments.dtype or flow.dtype)
    if arguments.data is None:
        context = _given(flow, arguments.given) if arguments.given else None
        names = _common.context_names(flow) or [name for name, _ in arguments.given or []]
        draws = _one(flow, arguments.n, context, seed, arguments.offset, dtype)
        _write(flow, names, draws, arguments.n, dtype, format, arguments)
        return 0
    with _common.open_data(arguments) as table:
        columns = table.choose(_context_columns(flow, table, arguments.context))
        if table.named:
            _common.taken_for("--context", columns, _common.context_names(flow))
        rows = _common.complete(table, columns, arguments)
        known_rows = table.rows * arguments.n if table.rows is not None and arguments.missing != "drop" else None
        draws = _many(flow, arguments.n, rows, seed, arguments.offset, dtype)
        _write(flow, _common.context_names(flow) or columns, draws, known_rows, dtype, format, arguments)
        _common.left_out(rows.missing, rows.rows, "context", arguments.quiet)
    return 0


def _given(flow: Any, pairs: Sequence[tuple[str, float]]) -> Array:
    """One context, by name; by number where the flow does not know the names."""
    names = _common.context_names(flow) or [str(k) for k in range(flow.context_features)]
    values = dict(pairs)
    unknown = [name for name in values if name not in names]
    absent = [name for name in names if name not in values]
    if unknown or absent or len(values) < len(pairs):
        twice = f"{_common.listed([name for name, _ in pairs])} has a column twice"
        what = f"no context is named {unknown[0]}" if unknown else f"{_common.listed(absent)} is missing" if absent else twice
        raise UsageError(f"--given: {what}; the context is {_common.listed(names)}")
    return np.array([values[name] for name in names], np.float64)


def _context_columns(flow: Any, table: Any, wanted: list[str] | None) -> Sequence[str]:
    found: Sequence[str] | None = wanted if wanted is not None else _common.context_names(flow)
    if found is None or (wanted is None and not table.named):
        found = table.usual
    if len(found) != flow.context_features:
        raise ValueError(f"{table.name} has {len(found)} columns; the context has {flow.context_features}: name them, --context")
    return found


def _one(flow: Any, n: int, context: Array | None, seed: int, offset: int, dtype: np.dtype[Any]) -> Iterator[Array]:
    """Rows under one context, which follows them."""
    size = max(1, CHUNK // (flow.features + flow.context_features))
    for first in range(0, n, size):
        count = min(size, n - first)
        draws = flow.sample(count, context, seed=seed, offset=offset + first, dtype=dtype)
        yield draws if context is None else np.hstack([draws, np.broadcast_to(context.astype(dtype), (count, context.size))])


def _many(flow: Any, n: int, chunks: Any, seed: int, offset: int, dtype: np.dtype[Any]) -> Iterator[Array]:
    """N rows under each context, which follows them."""
    width = flow.features + flow.context_features
    size = max(1, CHUNK // width)
    done = 0
    for chunk in chunks:
        step = max(1, size // max(1, n))
        for first in range(0, len(chunk), step):
            contexts = chunk[first : first + step]
            for begin in range(0, n, size):
                count = min(size, n - begin)
                draws = flow.sample(count, contexts, seed=seed, offset=offset + begin, context_offset=done, dtype=dtype)
                result = np.empty((len(contexts), count, width), dtype)
                result[..., : flow.features] = draws
                result[..., flow.features :] = contexts[:, None]
                yield result.reshape(-1, width)
            done += len(contexts)


def _write(
    flow: Any,
    context: Sequence[str],
    draws: Iterator[Array],
    rows: int | None,
    dtype: np.dtype[Any],
    format: str,
    arguments: argparse.Namespace,
) -> None:
    progress = Progress(rows, arguments.quiet)
    columns = [*_common.names_of(flow), *(context if flow.context_features else ())]
    with _sink.open_sink(_common.output(arguments.output), columns, dtype, rows, format) as sink, progress.shown():
        for part in draws:
            sink.write(part)
            progress.advance(len(part))
    progress.summary(arguments.output)
