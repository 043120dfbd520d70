"""What the commands share: options, files, columns by name, and words for the terminal."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, NoReturn

from numpy.typing import NDArray

import fastmaf
from fastmaf import _words
from fastmaf.cli import _streams
from fastmaf.data._source import FORMATS, Complete, Table, _chain_files, open_table

__all__ = ["Parser", "Progress", "UsageError", "apart", "columns_of", "complete", "counted", "load", "note", "open_data", "output", "start"]

Array = NDArray[Any]

COLUMNS = "columns"
"""Where `Flow.training` keeps what columns of a file a flow was fitted to."""

LINES = (10.0, 30.0, 60.0)
"""Seconds behind which there is a line of progress without a terminal, and then each time as long as the last."""


class UsageError(Exception):
    """Options that do not go together; the command ends with status 2."""


class Parser(argparse.ArgumentParser):
    """Of a command: errors in one line, and examples as they are written."""

    def __init__(self, *, examples: str = "", **options: Any) -> None:
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"examples:\n{examples}" if examples else None,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        _streams.say(f"{self.prog}: {message} ({self.prog} --help says more)")
        self.exit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help, whose errors argparse would swallow."""
        (file or sys.stdout).write(message)


# Values of options


def labels(text: str) -> list[str]:
    """Names of columns with commas between them.

    Examples
    --------
    >>> labels("z, r")
    ['z', 'r']
    """
    found = [word.strip() for word in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{_words.shown(text)} must be names of columns with commas between them")
    return found


def whole(text: str) -> int:
    """A count, also as 1e9 or 1_000.

    Examples
    --------
    >>> whole("1e9")
    1000000000
    """
    return _whole(text, 0)


def positive(text: str) -> int:
    """A count of one or more.

    Examples
    --------
    >>> positive("12")
    12
    """
    return _whole(text, 1)


def _whole(text: str, lowest: int, bits: int = 63) -> int:
    try:
        number = float(text)
        if number != math.floor(number):
            raise ValueError
        count = int(number) if "e" in text.lower() or "." in text else int(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{_words.shown(text)} must be a whole number") from None
    if not lowest <= count < 2**bits:
        must = f"at least {lowest}" if count < lowest else f"below 2^{bits}"
        raise argparse.ArgumentTypeError(f"{_words.shown(text)} must be {must}")
    return count


def seed(text: str) -> int:
    """A seed, below 2^64.

    Examples
    --------
    >>> seed("18446744073709551615")
    18446744073709551615
    """
    return _whole(text, 0, 64)


def real(text: str) -> float:
    """A positive number.

    Examples
    --------
    >>> real("1e-3")
    0.001
    """
    return _real(text, False)


def real_or_zero(text: str) -> float:
    """A number that is not negative.

    Examples
    --------
    >>> real_or_zero("0")
    0.0
    """
    return _real(text, True)


def _real(text: str, zero: bool) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and (number > 0 or (zero and number == 0))):
        raise argparse.ArgumentTypeError(f"{_words.shown(text)} must be a {'number that is not negative' if zero else 'positive number'}")
    return number


def share(text: str) -> float:
    """A fraction in [0, 1).

    Examples
    --------
    >>> share("0.3")
    0.3
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{_words.shown(text)} must be at least 0 and below 1")
    return number


def bound(text: str) -> tuple[str, tuple[float | None, float | None]]:
    """The bounds of a column: NAME=LOW:HIGH.

    Examples
    --------
    >>> bound("z=0:")
    ('z', (0.0, None))
    """
    name, _, ends = text.rpartition("=")
    low, colon, high = ends.partition(":")
    try:
        if not name or not colon:
            raise ValueError
        return name, (float(low) if low.strip() else None, float(high) if high.strip() else None)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{_words.shown(text)} must be NAME=LOW:HIGH, of which LOW or HIGH may be left out") from None


def categories(text: str) -> list[tuple[str, int]]:
    """Columns and how many values they have: NAME=N,NAME=N.

    Examples
    --------
    >>> categories("type=5,flag=2")
    [('type', 5), ('flag', 2)]
    """
    found = []
    for part in text.split(","):
        name, _, count = part.rpartition("=")
        if not name or not count.strip().isdecimal() or int(count) < 2:
            raise argparse.ArgumentTypeError(f"{_words.shown(part)} must be NAME=N, with N at least 2")
        found.append((name, int(count)))
    return found


def value(text: str) -> tuple[str, float]:
    """A column and its value: NAME=VALUE.

    Examples
    --------
    >>> value("z=0.5")
    ('z', 0.5)
    """
    name, _, number = text.rpartition("=")
    try:
        if not name:
            raise ValueError
        return name, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{_words.shown(text)} must be NAME=NUMBER") from None


def delimiter(text: str) -> str:
    r"""One character; tab and space also by name.

    Examples
    --------
    >>> delimiter("tab"), delimiter(r"\t"), delimiter(";")
    ('\t', '\t', ';')
    """
    mark = {"tab": "\t", r"\t": "\t", "space": " "}.get(text.lower(), text)
    if len(mark) != 1 or not mark.isascii() or mark in '"\r\n\0':
        raise argparse.ArgumentTypeError(f"{_words.shown(text)} must be one ASCII character, tab or space")
    return mark


def _device_name(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{_words.shown(text)} must be cpu, cuda or cuda:1 (say)")
    return text


# Options


def add_table(parser: argparse.ArgumentParser, missing: Sequence[str]) -> None:
    """Options of what reads a file of columns."""
    group = parser.add_argument_group("reading")
    group.add_argument("--missing", choices=missing, default="refuse", help=_MISSING[len(missing)])
    group.add_argument("--format", choices=FORMATS, help="of DATA (default: seen from its contents)")
    group.add_argument(
        "--delimiter", type=delimiter, metavar="CHAR", help="between columns of text: one character, tab or space (default: what is there)"
    )
    header = group.add_mutually_exclusive_group()
    header.add_argument("--header", action="store_true", default=None, help="the first line of text has the names, though all are numbers")
    header.add_argument("--no-header", action="store_false", dest="header", help="the first line of text has no names")
    group.add_argument("--burn-in", type=share, default=0.0, metavar="SHARE", help="of each file of a chain, left out at its beginning")


_MISSING = {
    2: "rows with missing values: an error that counts them (default), or left out",
    3: "rows with missing values: an error that counts them (default), left out, or kept, with NaN as their result",
}


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Options that say which columns the variables of a flow are."""
    parser.add_argument("--columns", type=labels, metavar="NAMES", help="of the variables (default: as the flow has them)")
    parser.add_argument("--context", type=labels, metavar="NAMES", help="of the context (default: those that the flow was fitted to)")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Options of what computes."""
    group = parser.add_argument_group("running")
    group.add_argument("--threads", type=positive, metavar="N", help="default: all CPUs of this process")
    group.add_argument(
        "--device", type=_device_name, default="cpu", metavar="NAME", help='"cuda" or "cuda:1" for a GPU (default: %(default)s)'
    )
    group.add_argument("--quiet", action="store_true", help="no progress and no summary on stderr; warnings and errors all the same")


def start(arguments: argparse.Namespace) -> None:
    """Put the options of `add_run` into effect."""
    if arguments.threads is not None:
        fastmaf.set_num_threads(arguments.threads)


# Files


def load(arguments: argparse.Namespace) -> Any:
    """The flow that is named, on the device that is."""
    flow = fastmaf.load(_streams.stdin() if arguments.flow == "-" else arguments.flow)
    device = getattr(arguments, "device", "cpu")
    return flow if device == "cpu" else flow.to(device)


def open_data(arguments: argparse.Namespace, source: str | None = None) -> Table:
    """The file of columns that is named."""
    source = arguments.data if source is None else source
    if source == "-" and getattr(arguments, "flow", None) == "-":
        raise UsageError("the flow and the data cannot both come from stdin")
    file: Any = _streams.stdin() if source == "-" else source
    options = {name: getattr(arguments, name) for name in ("format", "delimiter", "header", "burn_in")}
    table = open_table(file, **options)
    if source == "-":
        table.name = "stdin"
    return table


def complete(table: Table, columns: Sequence[str], arguments: argparse.Namespace) -> Complete:
    """The chunks of columns without the rows that `--missing` leaves out."""
    return Complete(table.chunks(columns), table.name, columns, arguments.missing, "--missing drop")


def output(target: str) -> str | IO[bytes]:
    """The file to write to; stdout for "-"."""
    return _streams.stdout() if target == "-" else target


def apart(target: str, *sources: str | None) -> None:
    """Refuse to write over what is read."""
    if target == "-" or not os.path.isfile(target):
        return
    for source in sources:
        files = [] if source is None else [source] if os.path.isfile(source) else _chain_files(source)
        if any(os.path.samefile(target, file) for file in files):
            raise UsageError(f"{_words.cut(target, 100)} is read, and would be written over: name another file, -o")


# Columns


def columns_of(flow: Any, table: Table, arguments: argparse.Namespace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns of a file that are the variables of a flow, and those that are its context.

    By name where both have names. A file without names has the variables in order and then the context, and no other column.

    Raises
    ------
    ValueError
        If columns are missing, or it is not clear which they are.
    """
    wanted, context = arguments.columns, arguments.context
    known = context_names(flow)
    if context is not None and not flow.context_features:
        raise UsageError("the flow has no context: leave --context out")
    if not table.named and wanted is None and context is None:
        return _by_place(flow, table)
    if context is None and flow.context_features:
        if known is None:
            raise UsageError(f"the flow has {flow.context_features} context features without names: name their columns, --context")
        context = known
    contexts = table.choose(context or ())
    if wanted is None and flow.names is None:
        wanted = [label for label in table.usual if label not in contexts and label != table.weights]
    features = table.choose(flow.names if wanted is None else wanted)
    for found, count, option in ((features, flow.features, "--columns"), (contexts, flow.context_features, "--context")):
        if len(found) != count:
            raise ValueError(f"{len(found)} columns are chosen, and the flow has {count} of them: name these, {option}")
    if table.named and wanted is not None:
        taken_for("--columns", features, flow.names)
    if table.named:
        taken_for("--context", contexts, known)
    return features, contexts


def taken_for(option: str, found: Sequence[str], own: Sequence[str] | None) -> None:
    """Say so where columns of other names, or in another order, stand for those of a flow."""
    if own is not None and list(found) != list(own):
        what = f"{listed(found, 60)} {_are(len(found))} taken for {listed(own, 60)}"
        _words.warn(f"{option}: {what} of the flow" + ", in this order" * (len(own) > 1), UserWarning)


def _by_place(flow: Any, table: Table) -> tuple[tuple[str, ...], tuple[str, ...]]:
    width = flow.features + flow.context_features
    fitted = flow.training.get(COLUMNS)
    places = [str(k) for k in range(width)]
    own = places if not fitted or fitted["named"] else [*fitted["features"], *fitted["context"]]
    if len(table.labels) == width and own == places:
        return tuple(places[: flow.features]), tuple(places[flow.features :])
    remedy = "name them by number, from 0: --columns" + " and --context" * bool(flow.context_features)
    if own != places:
        remedy += f" (the flow was fitted to {','.join(own[: flow.features])}" + " and " * (width > flow.features)
        remedy = _words.cut(f"{remedy}{','.join(own[flow.features :])})", 120)
    raise ValueError(f"{table.name} has {len(table.labels)} columns without names; the flow has {width}: {remedy}")


def context_names(flow: Any) -> list[str] | None:
    """The columns that were the context when the flow was fitted, if they have names."""
    fitted = flow.training.get(COLUMNS)
    found = fitted["context"] if fitted and fitted["named"] else None
    return list(found) if found is not None and len(found) == flow.context_features else None


def names_of(flow: Any) -> tuple[str, ...]:
    """Names of the variables, made up if there are none."""
    return tuple(flow.names or (f"x{k}" for k in range(flow.features)))


# Words


def note(text: str, quiet: bool = False) -> None:
    """Say something on stderr, where it is lost if nobody listens."""
    if not quiet:
        _streams.say(f"fastmaf: {text}")


def counted(n: int, what: str = "row") -> str:
    """So many rows.

    Examples
    --------
    >>> counted(1), counted(2000)
    ('1 row', '2,000 rows')
    """
    return f"{n:,} {what}{'s' * (n != 1)}"


def left_out(dropped: int, of: int, what: str, quiet: bool) -> None:
    """Say how many rows `--missing drop` has left out."""
    if dropped:
        note(f"{dropped:,} of {counted(of, what)} {'has' if dropped == 1 else 'have'} missing values and {_are(dropped)} left out", quiet)


def _are(n: int) -> str:
    return "is" if n == 1 else "are"


def listed(columns: Sequence[str], longest: int = 100) -> str:
    """Names with commas between them, cut where they are many."""
    return _words.cut(", ".join(columns), longest)


class Progress:
    """Rows done: a bar on a terminal, a line now and then without one."""

    def __init__(self, rows: int | None, quiet: bool) -> None:
        self._rows, self._quiet, self._bar = rows, quiet, None
        self.done, self._began, self._said = 0, time.perf_counter(), 0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._began

    def advance(self, rows: int) -> None:
        """Count rows."""
        self.done += rows
        if self._bar is not None:
            self._bar.update(rows)
        elif not self._quiet and self.seconds > self._due():
            self._said += 1
            note(f"{self.done:,} rows" + (f" of {self._rows:,}" if self._rows else "") + f", {self.seconds:.0f} s")

    def _due(self) -> float:
        return LINES[self._said] if self._said < len(LINES) else LINES[-1] * 2.0 ** (self._said - len(LINES) + 1)

    @contextmanager
    def shown(self) -> Iterator[Progress]:
        """Where rows are counted; at the end a line sums up."""
        if not self._quiet and sys.stderr.isatty():
            from tqdm import tqdm

            with tqdm(total=self._rows, unit=" rows", unit_scale=True, leave=False) as self._bar:
                yield self
        else:
            yield self

    def summary(self, where: str) -> None:
        """A line about all of it, if the results went into a file."""
        if where != "-":
            rate = f", {self.done / self.seconds:,.0f} rows/s" if self.done else ""
            note(f"{counted(self.done)} in {self.seconds:.1f} s{rate}: {where}", self._quiet)
