"""``fastmaf fit``: from a file of columns to a flow in a file."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import fastmaf
from fastmaf import _words
from fastmaf.cli import _common, _streams
from fastmaf.cli._common import UsageError, counted, labels, listed, note, positive, real, real_or_zero, seed, share
from fastmaf.data._source import Table
from fastmaf.data._source import whole as read_whole

__all__ = ["add"]

Array = NDArray[Any]

EXAMPLES = """\
  fastmaf fit galaxies.csv -o flow.safetensors
  fastmaf fit galaxies.csv --columns z --context u,g,r,i,z --bounds z=0: -o photoz.safetensors
  fastmaf fit catalogue.csv --columns magnitude,colour,type --categories type=4 -o catalogue.safetensors
  fastmaf fit table.parquet --weights w --missing drop --seconds 600 -o flow.safetensors
  fastmaf fit chains/run1 --burn-in 0.3 --members 5 -o posterior.safetensors
  gunzip -c big.csv.gz | fastmaf fit - --columns x,y -o flow.safetensors"""

BLOCK = 1 << 18
"""Rows of a mapped file looked at together."""

SECONDS = 10.0
"""Between two lines of progress without a terminal."""


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "fit",
        help="fit a flow to a file of columns",
        description="Fit a masked autoregressive flow to the columns of a file, and write it to a .safetensors file.",
        examples=EXAMPLES,
    )
    parser.set_defaults(run=run)
    parser.add_argument("data", metavar="DATA", help=".npy, .npz, .csv, .parquet, the root of a chain, or - for stdin")
    parser.add_argument("-o", "--output", required=True, metavar="FLOW", help="the .safetensors file to write, or - for stdout")
    parser.add_argument("--columns", type=labels, metavar="NAMES", help="the variables (default: all columns that nothing else names)")
    parser.add_argument("--context", type=labels, default=[], metavar="NAMES", help="columns that the density is conditioned on")
    parser.add_argument("--weights", metavar="NAME", help="column with the weights of the rows (default: that of a chain)")
    parser.add_argument(
        "--bounds", type=_common.bound, action="append", default=[], metavar="NAME=LOW:HIGH", help="where a variable lives; may be repeated"
    )
    parser.add_argument(
        "--categories",
        type=_common.categories,
        action="extend",
        default=[],
        metavar="NAME=N,...",
        help="variables with the values 0 to N - 1; makes the flow one network, a mixed MADE",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--start", metavar="FLOW", help="go on from the weights of this flow; no other option of the model then")
    _add(model, _MODEL)
    model.add_argument("--members", type=positive, metavar="N", help="independent flows whose densities are averaged (default: 1)")
    model.add_argument("--batch-norm", action="store_true", default=None, help="batch norm behind every MADE")
    model.add_argument("--linear", action="store_true", default=None, help="a linear layer in front of every MADE")
    model.add_argument("--residual", action="store_true", default=None, help="residual networks")
    training = parser.add_argument_group("training")
    training.add_argument(
        "--validation", type=_validation, metavar="SHARE|DATA", help="of the rows to hold out, or a file of others (default: 0.1)"
    )
    _add(training, _TRAINING)
    training.add_argument("--seed", type=seed, metavar="N", help="of weights, validation rows and batches (default: drawn)")
    training.add_argument("--checkpoint", metavar="FILE", help="written after every epoch, to go on from")
    training.add_argument("--resume", action="store_true", help="go on from --checkpoint, if it is there")
    _common.add_table(parser, ("refuse", "drop"))
    _common.add_run(parser)


def _validation(text: str) -> float | str:
    try:
        float(text)
    except ValueError:
        return text
    return share(text)


def _widths(text: str) -> tuple[int, ...]:
    return tuple(positive(word) for word in text.split(","))


_MODEL: list[tuple[str, Any, str, str]] = [
    ("--transforms", positive, "N", "MADEs in a row (default: 5)"),
    ("--hidden", _widths, "N,N", "units in the hidden layers of each (default: 100,100)"),
    ("--activation", ("relu", "tanh", "elu", "gelu", "silu"), "NAME", "relu, tanh, elu, gelu or silu (default: relu)"),
    (
        "--components",
        positive,
        "N",
        "Gaussians of each variable in the base (default: 1, with --categories 10; a lone variable needs more)",
    ),
    (
        "--order",
        ("reverse", "sequential", "random"),
        "NAME",
        "of the variables: reverse, sequential or random (default: reverse; with --categories sequential)",
    ),
    ("--dtype", ("float32", "float64"), "NAME", "float32 or float64 (default: float32)"),
]

_TRAINING: list[tuple[str, Any, str, str]] = [
    ("--epochs", positive, "N", "at most so many (default: 1000)"),
    ("--seconds", real, "T", "stop at the first end of an epoch behind them"),
    ("--patience", positive, "N", "stop after so many epochs without a better one (default: 30)"),
    ("--batch-size", positive, "N", "rows in a step (default: 256)"),
    ("--lr", real, "RATE", "learning rate (default: 1e-3)"),
    (
        "--schedule",
        ("constant", "cosine"),
        "NAME",
        "of the learning rate: constant, or cosine, which falls to 0 over --epochs (default: constant)",
    ),
    (
        "--standardize",
        ("yes", "full", "again", "no"),
        "NAME",
        "the columns: yes, full (and make them uncorrelated), again (what --start has, to these rows) or no (default: yes)",
    ),
    ("--clip-norm", real, "NORM", "largest norm of a gradient"),
    ("--weight-decay", real_or_zero, "RATE", "decoupled, of AdamW"),
    ("--l2", real_or_zero, "FACTOR", "of the squared weights in the loss"),
]


def _add(group: Any, options: Sequence[tuple[str, Any, str, str]]) -> None:
    """Options whose values are words of a tuple, or what a function makes of them."""
    for option, kind, meta, text in options:
        group.add_argument(option, **({"choices": kind} if isinstance(kind, tuple) else {"type": kind}), metavar=meta, help=text)


_NAMES = {"hidden": "hidden_features", "epochs": "max_epochs", "seconds": "max_seconds"}
_STANDARDIZE = {"yes": True, "full": "full", "again": "again", "no": False}


def _given(arguments: argparse.Namespace, options: Sequence[tuple[str, Any, str, str]], *flags: str) -> dict[str, Any]:
    """The options that were given, as arguments of Python."""
    found = [option.removeprefix("--").replace("-", "_") for option, *_ in options] + list(flags)
    given = {_NAMES.get(name, name): getattr(arguments, name) for name in found if getattr(arguments, name) is not None}
    if "standardize" in given:
        given["standardize"] = _STANDARDIZE[given["standardize"]]
    return given


class _Rows(NamedTuple):
    x: Array
    context: Array | None
    weights: Array | None
    dropped: int


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    _common.start(arguments)
    _check_output(arguments.output)
    if arguments.checkpoint == "-":
        raise UsageError("--checkpoint must be a file")
    if arguments.checkpoint is not None:
        _check_output(arguments.checkpoint)
    _common.apart(arguments.output, arguments.data, arguments.validation if isinstance(arguments.validation, str) else None)
    if arguments.resume and arguments.checkpoint is None:
        raise UsageError("--resume needs --checkpoint")
    model = _given(arguments, _MODEL, "batch_norm", "linear", "residual", "members")
    if arguments.start is not None and (model or arguments.bounds or arguments.categories):
        first = "bounds" if arguments.bounds else "categories" if arguments.categories else next(iter(model))
        option = "--" + first.replace("_", "-").replace("hidden-features", "hidden")
        raise UsageError(f"{option} does not go with --start, whose flow has a model already")
    start = None if arguments.start is None else fastmaf.load(arguments.start)
    with _common.open_data(arguments) as table:
        features, context, weights = _columns(arguments, table, start)
        rows = _read(table, features, context, weights, arguments)
        named = table.named
    dropped = f"; {counted(rows.dropped)} with missing values {'is' if rows.dropped == 1 else 'are'} left out" if rows.dropped else ""
    words = [f"{counted(len(rows.x))} of {listed(features) if named else f'{len(features)} columns'}"]
    words += [f"context {listed(context)}"] * bool(context) + [f"weights {weights}"] * (weights is not None)
    note(f"{table.name}: {', '.join(words)}{dropped}", arguments.quiet)
    held = _held_out(arguments, features, context, weights)
    flow = start or _new(arguments, features, context, named, model)
    columns = {"features": [*features], "context": [*context], "named": named, "weights": weights}
    flow = _noted(flow, {_common.COLUMNS: columns})

    before = _records(flow)
    try:
        result = flow.fit(
            rows.x,
            rows.context,
            rows.weights,
            seed=arguments.seed,
            checkpoint=arguments.checkpoint,
            resume=arguments.resume,
            on_interrupt="return",
            progress=False if arguments.quiet else None,
            device=arguments.device,
            callback=None if arguments.quiet or sys.stderr.isatty() else _lines(),
            **_given(arguments, _TRAINING),
            **({} if held is None else {"validation": held}),
        )
    except OSError as error:  # of the checkpoint, for which there is no room
        if _records(flow) == before:
            raise
        where = _save(flow, arguments.output)
        raise OSError(error.errno, f"{error.strerror}; the best weights so far are in {where}", error.filename) from None
    histories = result if isinstance(result, list) else [result]
    interrupted = any(history.stopped == "interrupted" for history in histories)
    if interrupted and _records(flow) == before:
        note("interrupted before anything was learned: nothing is written")
        return 130
    flow = _trained(flow)
    where = _save(flow, arguments.output)
    for k, history in enumerate(histories):
        note(f"{f'member {k}: ' * (len(histories) > 1)}{_summed_up(history)}: {where}", arguments.quiet and not interrupted)
    return 130 if interrupted else 0 if any(history.best_epoch for history in histories) else 3


def _check_output(target: str) -> None:
    """Find out before hours of training what cannot be written behind them."""
    if target == "-":
        _streams.stdout()
        if sys.stdout.isatty():
            raise UsageError("a flow is not written to a terminal: name a file, -o flow.safetensors")
        return
    folder = os.path.dirname(os.path.realpath(target))
    if not os.path.isdir(folder):
        raise ValueError(f"{_words.cut(target, 100)} cannot be written: there is no folder {_words.cut(folder, 80)}")
    if os.path.isdir(target):
        raise ValueError(f"{_words.cut(target, 100)} is a folder; name a file")
    if not os.access(target if os.path.exists(target) and not os.path.isfile(target) else folder, os.W_OK):
        raise PermissionError(13, "Permission denied", target)


def _columns(arguments: argparse.Namespace, table: Table, start: Any) -> tuple[tuple[str, ...], tuple[str, ...], str | None]:
    """Variables, context and weights."""
    weights = arguments.weights if arguments.weights is not None else table.weights
    taken = table.choose([weights])[0] if weights is not None else None
    if start is not None:
        return *_common.columns_of(start, table, argparse.Namespace(**{**vars(arguments), "context": arguments.context or None})), taken
    context = table.choose(arguments.context)
    wanted = arguments.columns
    if wanted is None:
        wanted = [label for label in table.usual if label not in context and label != taken]
    features = table.choose(wanted)
    if not features:
        raise ValueError(f"{table.name} has no column left for the variables")
    both = [label for label in features if label in context or label == taken]
    if both:
        raise UsageError(f"{_words.named([_words.shown(label) for label in both])}: a variable cannot be context or weight too")
    return features, context, taken


def _read(table: Table, features: tuple[str, ...], context: tuple[str, ...], weights: str | None, arguments: argparse.Namespace) -> _Rows:
    """The rows, as they lie in their file where that can be."""
    groups = [group for group in (features, context, (weights,) if weights is not None else ()) if group]
    views = [table.view(group) for group in groups]
    if all(view is not None for view in views) and not any(_has_missing(view) for view in views if view is not None):
        arrays = iter(view for view in views if view is not None)
        return _Rows(next(arrays), next(arrays) if context else None, next(arrays)[:, 0] if weights is not None else None, 0)
    columns = [label for group in groups for label in group]
    complete = _common.complete(table, columns, arguments)
    both, dropped = read_whole(complete, columns, table.rows), complete.missing
    if not len(both):
        raise ValueError(f"{table.name} has no rows" + " without missing values" * bool(dropped))
    width, end = len(features), len(features) + len(context)
    return _Rows(both[:, :width], both[:, width:end] if context else None, both[:, end] if weights is not None else None, dropped)


def _has_missing(view: Array) -> bool:
    return view.dtype.kind == "f" and any(np.isnan(view[first : first + BLOCK]).any() for first in range(0, len(view), BLOCK))


def _held_out(arguments: argparse.Namespace, features: tuple[str, ...], context: tuple[str, ...], weights: str | None) -> Any:
    if arguments.validation is None:
        return None
    if isinstance(arguments.validation, float):
        return arguments.validation
    with _common.open_data(arguments, arguments.validation) as table:
        chosen = [*features, *context, *([weights] if weights is not None else [])]
        rows = _read(table, table.choose(features), table.choose(context), table.choose(chosen)[-1] if weights else None, arguments)
    return rows[:3]


def _new(arguments: argparse.Namespace, features: Sequence[str], context: Sequence[str], named: bool, model: dict[str, Any]) -> Any:
    bounds, categories = (_by_variable(arguments, option, features) for option in ("bounds", "categories"))
    members = model.pop("members", None)
    options = {
        "context_features": len(context),
        "bounds": bounds,
        "names": features if named else None,
        "seed": arguments.seed,
        **model,
    }
    if categories is None:
        flow = fastmaf.MAF(len(features), **options)
    else:
        for name in ("transforms", "batch_norm", "linear"):
            if name in model:
                raise UsageError(f"--{name.replace('_', '-')} does not go with --categories, which makes the flow one network")
        if model.get("order") == "reverse":
            raise UsageError("--order reverse turns around every second network, and --categories makes the flow one network")
        flow = fastmaf.MADE(len(features), "mixed", categories=categories, **options)
    return flow if members in (None, 1) else fastmaf.Ensemble(flow, members, arguments.seed)


def _by_variable(arguments: argparse.Namespace, option: str, features: Sequence[str]) -> list[Any] | None:
    """What an option of NAME=... says of each variable; None where it is not given."""
    pairs = getattr(arguments, option)
    given = dict(pairs)
    if len(given) < len(pairs):
        raise UsageError(f"--{option} names a variable twice")
    for label in given:
        if label not in features:
            raise UsageError(f"--{option} {label}=...: no variable has this name; the variables are {listed(features)}")
    return [given.get(label) for label in features] if given else None


def _noted(flow: Any, notes: dict[str, Any]) -> Any:
    """The flow, or ensemble, with more to tell of its training."""
    if isinstance(flow, fastmaf.MaskedEnsemble):
        raise UsageError("--start has an ensemble of masks, which only Python trains: fastmaf.load(path).fit(x)")
    if isinstance(flow, fastmaf.Ensemble):
        return fastmaf.Ensemble([_noted(member, notes) for member in flow])
    flow.training = {**flow.training, **notes}
    return flow


def _trained(flow: Any) -> Any:
    """The flow, or an ensemble without the members that Ctrl-C came before."""
    if not isinstance(flow, fastmaf.Ensemble) or isinstance(flow, fastmaf.MaskedEnsemble):
        return flow
    members = [member for member in flow if member.record.fitted]
    if not members or len(members) == len(flow):
        return flow
    note(f"{len(flow) - len(members)} of {len(flow)} members never began to be trained, and are left out")
    return fastmaf.Ensemble(members)


def _records(flow: Any) -> list[Any]:
    """By which a flow, or an ensemble, that a fit has changed is another one."""
    return [member.record for member in (flow if isinstance(flow, fastmaf.Ensemble) else [flow])]


def _lines() -> Callable[[Any], None]:
    """A line about an epoch from time to time."""
    last = 0.0

    def line(epoch: Any) -> None:
        nonlocal last
        if epoch["epoch"] == 1 or time.perf_counter() - last >= SECONDS:
            last = time.perf_counter()
            held = "" if epoch["validation"] is None else f", validation {epoch['validation']:.4f}"
            whose = f"member {epoch['member']}, " if "member" in epoch else ""
            note(f"{whose}epoch {epoch['epoch']}: train {epoch['train']:.4f}{held} nats, {epoch['seconds']:.0f} s")

    return line


def _summed_up(history: Any) -> str:
    epochs, best = len(history.train), history.best_epoch
    words = f"{epochs} epoch{'s' * (epochs != 1)} in {history.seconds[-1] if history.seconds else 0:.0f} s"
    if best:
        words += f", best {best}: train {history.train[best - 1]:.4f}"
        words += f", validation {history.validation[best - 1]:.4f}" if history.validation else ""
        words += " nats"
    return f"{words} ({history.stopped})"


def _save(flow: Any, target: str) -> str:
    """Write the flow, elsewhere where there is no room: it may have taken hours."""
    name = "stdout" if target == "-" else target
    try:
        if target == "-":
            flow.save(_streams.stdout())
            sys.stdout.flush()
        else:
            flow.save(target)
    except OSError as error:
        try:
            handle, path = tempfile.mkstemp(".safetensors", "fastmaf-")
            os.close(handle)
            flow.save(path)
        except OSError:
            raise error from None
        raise OSError(error.errno, f"{error.strerror}; the flow is in {path}", name) from None
    return name
