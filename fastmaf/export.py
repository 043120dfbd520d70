"""Flows as C source: one file and its header, weights inside, that need nothing but the mathematical library.

The C code is `_runtime.c`, with the parts that a flow needs, behind tables that are made here.  Hidden units are sorted by degree, and
every map is cut into panels by the step of the sampler at which all that its rows read is known: then density, sampler and gradient
use the same panels, each weight once and no masked one.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastmaf import _random, _words
from fastmaf import layers as _layers
from fastmaf._files import write
from fastmaf.flow import Flow
from fastmaf.layers import Affine, Autoregressive, BatchNorm, Conditioner, Elementwise, Linear, Permutation, Terminal
from fastmaf.record import FlowRecord

__all__ = ["LARGEST", "c_source", "export_c"]

Array = NDArray[Any]

LARGEST = 64 << 20
"""Bytes of source beyond which nothing is written."""

STACK = 1 << 20
"""Bytes that a call may take from the stack."""

ROWS = 16
"""Rows of a block, twice as many for clang, which makes better loops of them; fewer where a block would need much of the stack."""

_KINDS = {"identity": 0, "log_above": 1, "log_below": 2, "logit": 3}
_KEYWORDS = (
    "auto break case char const continue default do double else enum extern float for goto if inline int long register restrict return "
    "short signed sizeof static struct switch typedef union unsigned void volatile while class namespace template new delete this"
)
_POLYNOMIALS: dict[int, dict[str, tuple[float, ...]]] = {
    4: {
        "EXP_POLY": (0.5, 0.166665769896987757, 0.0416665546172045742, 0.00836317905272257737, 0.00139261835877134945),
        "LOG_POLY": (0.666666850451560291, 0.399887782821628077, 0.295800530431884422),
    },
    8: {
        "EXP_POLY": (0.5, 0.16666666666666671, 0.0416666666666666698, 0.00833333333332613513, 0.00138888888888837483)
        + (0.000198412698748206253, 0.0000248015873255477412, 2.75572554002064244e-6, 2.75572736431102953e-7)
        + (2.51052170047207452e-8, 2.09146869680868772e-9),
        "LOG_POLY": (0.666666666666666665, 0.400000000000008776, 0.2857142857080323, 0.222222223918004693, 0.181817956308847532)
        + (0.153862402058134779, 0.132687596685606127, 0.130867670099481738),
    },
}
"""Chebyshev fits of (e^r - 1 - r) / r^2, and of the logarithm in s^2, s = (m - 1) / (m + 1); those of the compiled core."""


def export_c(
    flow: Flow, path: str | os.PathLike[str], *, gradient: bool = False, dtype: DTypeLike | None = None, prefix: str | None = None
) -> None:
    """Write a flow as a C99 file and, beside it, its header.

    Parameters
    ----------
    flow : Flow
    path : path
        Of the C file, ending in ``.c``; the header has the same name with ``.h``. What is there is replaced.
    gradient : bool
        Whether there is a function for the gradients of the log-density.
    dtype : {"float32", "float64"}, optional
        Of the arithmetic and of all arrays; that of the flow if None.
    prefix : str, optional
        What the names in the header begin with; the name of the file if None.

    Raises
    ------
    ValueError
        If the file would exceed 64 MB, or a call 1 MB of stack; if a name is none in C.
    NotImplementedError
        If there is no code for a layer of the flow.

    Examples
    --------
    >>> import fastmaf, os, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_c(fastmaf.MAF(features=3), os.path.join(folder, "flow.c"))
    ...     sorted(os.listdir(folder))
    ['flow.c', 'flow.h']
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"path is {_words.shown(path)}; it must be a path that ends in .c")
    target = os.fspath(path)
    stem, extension = os.path.splitext(target)
    if extension != ".c":
        raise ValueError(f"path is {_words.shown(target)}; it must end in .c")
    source, header = c_source(flow, os.path.basename(stem), gradient=gradient, dtype=dtype, prefix=prefix)
    write(f"{stem}.h", header.encode())
    write(target, source.encode())


def c_source(
    flow: Flow, name: str = "flow", *, gradient: bool = False, dtype: DTypeLike | None = None, prefix: str | None = None
) -> tuple[str, str]:
    """The text of the C file and of its header; `name` is that of the files, without ending. All else as in `export_c`.

    Examples
    --------
    >>> import fastmaf
    >>> source, header = c_source(fastmaf.MAF(features=3, seed=1), gradient=True)
    >>> "flow_log_prob_and_grad" in header
    True
    """
    if not isinstance(flow, Flow):
        remedy = ": export each member, ensemble.member(k), and average their densities" if hasattr(flow, "member") else ""
        raise ValueError(f"flow is {_words.shown(flow)}; it must be a Flow{remedy}")
    prefix = name if prefix is None else prefix
    if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", prefix) or prefix in _KEYWORDS.split():
        raise ValueError(f"prefix is {_words.shown(prefix)}; it must be a name in C")
    record = flow.record if dtype is None else flow.record.replaced(dtype=dtype)
    return _Source(record, name, prefix, gradient).text()


def _lacks(what: str) -> NotImplementedError:
    return NotImplementedError(f"fastmaf export has no code for {what}")


@dataclass
class _Panels:
    """The weights of a stage in the order of their panels, and the panels."""

    numbers: list[Array] = field(default_factory=list)
    size: int = 0
    panels: list[tuple[int, int, int, int, int]] = field(default_factory=list)

    def add(self, array: Array) -> int:
        self.numbers.append(np.ravel(array))
        self.size += array.size
        return self.size - array.size

    def rows(self, weight: Array, first: int, last: int, begin: int, ends: Array) -> None:
        """Rows [first, last) of a matrix, of which each reads the columns [begin, its end)."""
        while first < last:
            width = 4 if last - first >= 4 else 2 if last - first >= 2 else 1
            end = int(ends[first : first + width].max())
            if end > begin:
                place = self.add(weight[first : first + width, begin:end].T)
                self.panels.append((width, first, begin, end - begin, place))
            first += width


class _Source:
    def __init__(self, record: FlowRecord, name: str, prefix: str, gradient: bool) -> None:
        self._record, self._name, self._prefix, self._gradient = record, name, prefix, gradient
        self._single = record.dtype == np.float32
        self._parts: set[str] = {"whole"}
        self._tables: list[str] = []
        self._calls: list[tuple[str, str, str]] = []  # density, sampler, gradient of a stage
        self._units, self._outputs, self._terms, self._keeps = record.context_features + record.features, 1, 1, False
        self._constant = 0.0
        self._nets: set[bool] = set()
        if gradient and record.discrete:
            raise _lacks(f"the gradient of a flow with a {record.discrete} base; leave out gradient")
        weights = sum(array.size for array in record.parameter_arrays())
        # Half of the weights may be masked, and a number has at least three characters.
        if weights * 3 // 2 > LARGEST:
            raise ValueError(f"the C file would have more than {weights * 3 // 2 >> 20} MB; at most {LARGEST >> 20} MB are written")
        self._lower()

    # From the record to tables

    def _lower(self) -> None:
        record = self._record
        self._columns, count = self._front(record.layers, record.features)
        self._context_columns, used = self._front(record.context_layers, record.context_features)
        if used != len(record.context_layers):
            raise _lacks("context layers other than an Elementwise and then Affines")
        slots = np.arange(record.features)
        for layer in record.layers[count:]:
            if isinstance(layer, Permutation):
                slots = slots[layer.perm]
            elif isinstance(layer, (Affine, BatchNorm)):
                self._affine(layer, slots)
            elif isinstance(layer, Linear):
                self._linear(layer, slots)
            elif isinstance(layer, Autoregressive):
                self._net(layer, slots)
            else:
                raise _lacks(f"a {type(layer).__name__} layer behind other layers")
        if isinstance(record.base, Terminal):
            self._net(record.base, slots)
        self._constant -= 0.5 * record.values.count(0) * math.log(2 * math.pi)
        self._table("int", "noise_slot", slots)

    def _front(self, layers: tuple[Any, ...], width: int) -> tuple[list[str], int]:
        """The columns of the data, and how many layers they stand for."""
        kinds, lower, upper, count = ("identity",) * width, np.full(width, -np.inf), np.full(width, np.inf), 0
        low, high = lower, upper
        if layers and isinstance(layers[0], Elementwise):
            first, count = layers[0], 1
            kinds, lower, upper = first.kinds, first.lower, first.upper
            low, high = first.inner_range(self._record.dtype)
        loc, scale = np.zeros(width), np.ones(width)
        while count < len(layers) and isinstance(layers[count], Affine):
            own = layers[count]
            loc, scale, count = loc + own.loc / scale, scale * own.scale, count + 1
        if layers is self._record.layers:
            self._constant += float(np.log(np.abs(scale)).sum())
        rows = zip(kinds, lower, upper, loc, scale, low, high, strict=True)
        return [
            f"{{{_KINDS[kind]}, {', '.join(_number(v) for v in numbers)}, {self._real(least)}, {self._real(most)}}}"
            for kind, *numbers, least, most in rows
        ], count

    def _affine(self, layer: Affine | BatchNorm, slots: Array) -> None:
        k, dtype = len(self._calls), self._record.dtype
        if isinstance(layer, Affine):
            loc, scale, shift = layer.loc, layer.scale, np.zeros(len(slots))
            self._constant += float(np.log(np.abs(scale)).sum())
        else:
            variance = layer.var.astype(np.float64) + layer.eps
            gamma, shift = layer.log_gamma.astype(np.float64), layer.beta
            loc, scale = layer.mean, np.exp(gamma) / np.sqrt(variance)
            self._constant += float((gamma - 0.5 * np.log(variance)).sum())
        place = np.argsort(slots)
        self._table("real", f"affine_{k}", np.concatenate([array[place] for array in (loc, scale, shift)]).astype(dtype))
        self._parts.add("affine")
        self._calls.append((f"affine(affine_{k}, m->z);", f"affine_back(affine_{k}, m->z);", f"affine_gradient(affine_{k}, dz);"))

    def _linear(self, layer: Linear, slots: Array) -> None:
        k, size, dtype = len(self._calls), len(slots), self._record.dtype
        lower = np.tril(layer.lower.astype(np.float64), -1) + np.eye(size)
        upper, bias = np.triu(layer.upper.astype(np.float64)), layer.bias.astype(np.float64)
        self._constant += float(np.log(np.abs(np.diagonal(upper))).sum())
        inverse = np.linalg.inv(lower)
        pairs = {"": ((upper, 0 * bias), (lower, bias)), "_back": ((inverse, -inverse @ bias), (np.linalg.inv(upper), 0 * bias))}
        self._table("int", f"slot_{k}", slots)
        for which, maps in pairs.items():
            panels, counts, biases = _Panels(), [], []
            for weight, shift in maps:
                biases.append(panels.add(shift.astype(dtype)))
                before = len(panels.panels)
                triangle = bool(np.triu(weight, 1).any())
                for first in range(0, size, 4):
                    last = min(size, first + 4)
                    ends = np.full(size, size) if triangle else np.full(size, last)
                    panels.rows(weight.astype(dtype), first, last, first if triangle else 0, ends)
                counts.append(len(panels.panels) - before)
            self._weights(f"linear{which}_{k}", panels)
            data = f"weights_linear{which}_{k}, panels_linear{which}_{k}, slot_{k}"
            self._tables.append(
                f"static const struct linear linear{which}_{k} = {{{data}, {{{counts[0]}, {counts[1]}}}, {{{biases[0]}, {biases[1]}}}}};"
            )
        self._parts |= {"linear", "net"}
        self._calls.append((f"linear(&linear_{k}, m->z);", f"linear(&linear_back_{k}, m->z);", f"linear_gradient(&linear_{k}, dz);"))

    def _net(self, layer: Autoregressive | Terminal, slots: Array) -> None:
        k, context, net = len(self._calls), self._record.context_features, layer.conditioner
        base = isinstance(layer, Terminal)
        law = _layers.Law(layer.law, constants=layer.constants) if isinstance(layer, Terminal) else layer.law
        maps = (*net.hidden, net.final)
        wires = _wires(net)
        _check(layer, law.kind, wires)
        order = np.argsort(layer.ranks, kind="stable")
        ranks = layer.ranks[order]
        steps, starts = np.unique(ranks, return_index=True)
        group = np.append(starts, len(ranks))
        counts = np.array(layer.rows if isinstance(layer, Terminal) else (2,) * len(ranks))
        rows_of = np.concatenate([[0], np.cumsum(counts)])
        first = np.concatenate([[0], np.cumsum(counts[order])])
        final_rows = np.concatenate([np.arange(rows_of[v], rows_of[v + 1]) for v in order])

        panels, entries = _Panels(), []
        keys = np.concatenate([np.full(context, -1), ranks])  # of the inputs: which units may read them
        least = np.full(context, -1)
        inputs, place, reads_inputs = np.arange(len(keys)), 0, True
        out = context + len(ranks)
        for number, dense in enumerate(maps):
            last = number == len(maps) - 1
            weight = dense.weight
            if reads_inputs:
                added = dense.context_weight if dense.context_weight is not None else np.zeros((len(weight), context), weight.dtype)
                weight = np.hstack([added, weight[:, order]])
            else:
                weight = weight[:, inputs]
            if last:
                rows, degrees, cuts = final_rows, np.repeat(ranks, counts[order]) - 1, first[group]
            else:
                assert dense.degrees is not None
                rows = np.argsort(dense.degrees, kind="stable")
                rows = rows[dense.degrees[rows] < steps[-1]]
                degrees = dense.degrees[rows]
                cuts = np.concatenate([[0], np.searchsorted(degrees, steps)])
            bias = panels.add(dense.bias[rows])
            entry = self._cut(panels, weight[rows], np.searchsorted(keys, degrees, side="right"), cuts, 0)
            activated, adds = wires[number]
            entries.append([*entry, cuts, bias, place, 0 if last else out, activated and not last, adds, False])
            if adds >= 0 and wires[adds][0]:
                entries[adds][-1] = True
            if not last:
                if activated and self._gradient and net.activation in ("gelu", "silu"):
                    entries[-1][-1] = True
                place, out, inputs, keys, reads_inputs = out, out + len(rows), rows, degrees, False
        late = bool(net.hidden) and net.final.context_weight is not None
        if late or net.skip is not None:
            weight = np.zeros((len(final_rows), context + len(ranks)), net.final.weight.dtype)
            if late:
                weight[:, :context] = net.final.context_weight[final_rows]  # type: ignore[index]
            if net.skip is not None:
                weight[:, context:] = net.skip[np.ix_(final_rows, order)]
            reads = np.concatenate([least, ranks])
            degrees = np.repeat(ranks, counts[order]) - 1
            ends = np.searchsorted(reads, degrees, side="right") if net.skip is not None else np.full(len(degrees), context)
            entry = self._cut(panels, weight, ends, first[group], 0 if late else context)
            entries.append([*entry, first[group], 0, 0, 0, False, -1, False])
        self._keeps = self._keeps or any(entry[-1] or entry[-2] >= 0 for entry in entries)
        self._units = max(self._units, out)
        self._outputs = max(self._outputs, int(np.diff(first[group]).max()))
        self._terms = max(self._terms, layer.components if isinstance(layer, Terminal) and 0 in layer.values else 1, int(counts.max()))
        self._weights(str(k), panels)
        self._table("int", f"group_{k}", group)
        self._table("int", f"slot_{k}", slots[order])
        self._table("int", f"first_{k}", first)
        structs = []
        for number, (begin, cut, cuts, bias, source, target, activated, adds, keep) in enumerate(entries):
            self._table("int", f"starts_{k}_{number}", cut)
            self._table("int", f"rows_{k}_{number}", cuts)
            data = f"panels_{k} + {begin}, starts_{k}_{number}, rows_{k}_{number}, {bias}, {source}, {target}"
            structs.append(f"{{{data}, {int(activated)}, {adds}, {int(keep)}}}")
        self._tables.append(f"static const struct map maps_{k}[] = {{\n    " + ",\n    ".join(structs) + "};")
        numbers = (len(net.hidden), int(len(entries) > len(maps)), len(steps), out, _layers.ACTIVATIONS.index(net.activation), int(base))
        components = layer.components if isinstance(layer, Terminal) else 1
        law_numbers = (components, int(law.form == "affine"), int(law.kind == "exp_soft"))
        clips = f"{self._real(law.constants.get('clip', 1.0))}, {self._real(net.input_clip or np.inf)}"
        self._tables.append(
            f"static const struct net net_{k} = {{weights_{k}, maps_{k}, group_{k}, slot_{k}, first_{k}, "
            f"{', '.join(map(str, (*numbers, *law_numbers)))}, {clips}}};"
        )
        self._nets.add(base)
        self._parts |= {"net", "network", "base" if base else "transform"}
        self._calls.append((f"density(&net_{k}, m);", f"sampler(&net_{k}, m, uniforms);", f"gradient(&net_{k}, m, delta, dz, dc);"))

    @staticmethod
    def _cut(panels: _Panels, weight: Array, ends: Array, cuts: Array, begin: int) -> tuple[int, list[int]]:
        """Panels of the rows between cuts: the number of the first panel, and where each step begins behind it."""
        start, starts = len(panels.panels), [0]
        for first, last in zip(cuts[:-1], cuts[1:], strict=True):
            panels.rows(weight, int(first), int(last), begin, ends)
            starts.append(len(panels.panels) - start)
        return start, starts

    # From tables to text

    def _real(self, value: Any) -> str:
        return _number(value, self._single)

    def _table(self, kind: str, name: str, values: Any) -> None:
        words = [self._real(v) for v in values] if kind == "real" else [str(int(v)) for v in values]
        self._tables.append(f"static const {kind} {name}[] = {{{_lines(words)}}};")

    def _weights(self, name: str, panels: _Panels) -> None:
        numbers = np.concatenate([np.zeros(0, self._record.dtype), *panels.numbers])
        if not np.isfinite(numbers).all():
            raise ValueError("the flow has weights that are not finite numbers; they cannot be written as C")
        self._table("real", f"weights_{name}", numbers if numbers.size else [0.0])
        rows = panels.panels or [(1, 0, 0, 0, 0)]
        words = ["{" + ", ".join(map(str, row)) + "}" for row in rows]
        self._tables.append(f"static const struct panel panels_{name}[] = {{{_lines(words)}}};")

    def text(self) -> tuple[str, str]:
        """The C file and its header.

        Raises
        ------
        ValueError
            If they would be too large, or need too much of the stack.
        """
        record, prefix = self._record, self._prefix
        copies = 1 + self._keeps + self._gradient
        width = copies * self._units + self._outputs + 4 * record.features + 2 * record.context_features + 16
        width += (len(self._calls) + 2) * record.features * self._gradient
        rows = ROWS
        while rows > 4 and 2 * rows * width * record.dtype.itemsize > STACK // 4:
            rows //= 2
        stack = 2 * rows * width * record.dtype.itemsize + 4096
        if stack > STACK:
            raise ValueError(f"a call would need {stack >> 10} KB of stack; at most {STACK >> 10} KB are taken: make the networks narrower")
        source, header = self._c(rows), self._header(rows, stack)
        size = len(source) + len(header)
        if size > LARGEST:
            raise ValueError(f"the C file would have {size / 2**20:.0f} MB; at most {LARGEST >> 20} MB are written")
        return source, header.replace("$N", prefix)

    def _c(self, rows: int) -> str:
        record, single = self._record, self._single
        tables = "\n".join(self._tables)
        parts, runtime = self._parts, files("fastmaf").joinpath("_runtime.c").read_text(encoding="utf-8")
        kept: list[str] = []
        on = True
        for line in runtime.splitlines():
            if line.startswith("//"):
                words = line[2:].split()
                on = words == ["end"] or (words[0] in parts and (len(words) == 1 or self._gradient))
            elif on:
                kept.append(line)
        code = "\n".join(kept)
        indent = "    {}".format
        code = code.replace("$FORWARD", "\n".join(indent(call) for call, _, _ in self._calls))
        code = code.replace("$BACKWARD", "\n".join(indent(call) for _, call, _ in reversed(self._calls)))
        keep, back = [], []
        for k, (forward, _, gradient) in enumerate(self._calls):
            keep += [f"        memcpy(kept[{k}], m.z, sizeof m.z);", f"        {forward.replace(' m)', ' &m)').replace('m->', 'm.')}"]
            restore = f"        memcpy(m.z, kept[{k}], sizeof m.z);"
            back.append(f"{restore}\n        {gradient.replace(' m,', ' &m,')}")
        code = code.replace("$KEEPING", "\n".join(keep)).replace("$GRADIENT", "\n".join(reversed(back)))
        laws = {frozenset({False}): "a", frozenset({True}): "b"}.get(frozenset(self._nets), "if (s->kind) b; else a")
        base = record.base
        values = sorted(set(record.values))
        constants = {
            "CONTEXT": record.context_features,
            "FEATURES": record.features,
            "UNITS": self._units,
            "OUTPUTS": self._outputs,
            "TERMS": self._terms,
            "STAGES": len(self._calls),
            "KEEPS": int(self._keeps),
            "NORMAL": int(not isinstance(base, Terminal)),
            "DOUBLE": int(not single),
            "CONSTANT": f"({self._constant!r})",
            "VALUES(v)": "values[v]" if len(values) > 1 else values[0],
            "LAW(a, b)": laws,
            "MOST": "0.99999994" if single else "1.0",
            "EXP_LOW": "K(-87.0)" if single else "K(-708.0)",
            "EXP_HIGH": "K(88.0)" if single else "K(709.0)",
            "SHIFTER": "K(12582912.0)" if single else "K(6755399441055744.0)",
            "LN2_HIGH": "K(0.693359375)" if single else "K(0.693147180369123816490)",
            "LN2_LOW": "K(-2.12194440e-4)" if single else "K(1.90821492927058770002e-10)",
            "BIAS": 127 if single else 1023,
            "MANTISSA": 23 if single else 52,
            **{f"{name}(x)": _horner(c, single) for name, c in _POLYNOMIALS[record.dtype.itemsize].items()},
            **{
                f"QUANTILE_{name}(x)": f"({_horner(top, single)} / {_horner(bottom, single)})"
                for name, (top, bottom) in zip(("CENTRE", "MIDDLE", "TAIL"), _random.QUANTILE[record.dtype.itemsize], strict=True)
            },
        }
        macros = "\n".join(f"#define {name} {value}" for name, value in constants.items())
        names = ", ".join(map(_string, record.names)) if record.names else ""
        head = f"""/* {self._name}.c: see {self._name}.h. Made by fastmaf export. */
#include "{self._name}.h"

#include <math.h>
#include <string.h>

#if !defined($N_ROWS) && defined(__clang__)
#define $N_ROWS {2 * rows}
#elif !defined($N_ROWS)
#define $N_ROWS {rows}
#endif
#define ROWS $N_ROWS
typedef $N_real real;
typedef {"uint32_t" if single else "uint64_t"} word;
{macros}
"""
        if len(values) > 1:
            head += f"\nstatic const int values[] = {{{', '.join(map(str, record.values))}}};\n"
        if record.names:
            head += f"\nconst char *const $N_names[] = {{{names}}};\n"
        # The tables stand behind the structures that they fill, in front of the first function that knows them by name.
        columns = f"static const struct column columns[] = {{{_lines(self._columns)}}};"
        if self._context_columns:
            columns += f"\nstatic const struct column context_columns[] = {{{_lines(self._context_columns)}}};"
        mark = "\n/* A column to the real line"
        code = code.replace("@BIG@", "F" if single else "").replace("@", "f" if single else "")
        before, after = code.split(mark)
        text = head + before + "\n" + columns + "\n" + tables + "\n" + mark + after + "\n"
        return text.replace("$N", self._prefix)

    def _header(self, rows: int, stack: int) -> str:
        record = self._record
        names = ""
        if record.names:
            names = "\n/* Names of the features. */\nextern const char *const $N_names[$N_features];\n"
        context = "n x $N_context_features, one row for each row of x" if record.context_features else "not read; pass a null pointer"
        one = "$N_context_features numbers, for all rows" if record.context_features else "not read; pass a null pointer"
        rows_of = each = grad = ""
        if record.context_features:
            rows_of = (
                "\n/* One sample under each of n contexts: those of flow.sample(1, context, seed, offset, context_offset). */\n"
                "void $N_sample_rows(size_t n, const $N_real *context, uint64_t seed, uint64_t offset,\n"
                "    uint64_t context_offset, $N_real *out);\n"
            )
            each = " or null"
        if self._gradient:
            grad = (
                "\n/* The same with its gradients: dx n x $N_features; dcontext n x $N_context_features"
                f"{each or ', not written'}. Zero where the density is. */\n"
                "void $N_log_prob_and_grad(size_t n, const $N_real *x, const $N_real *context, $N_real *out, $N_real *dx,\n"
                "    $N_real *dcontext);\n"
            )
        return f"""/* {self._name}.h: a density of {record.features} variables, made by fastmaf export.

   Arrays are C-ordered, n rows. Nothing is allocated and nothing kept: all functions may run in several threads at once. A call takes
   at most {-(-stack // 1024)} KB of stack. {rows} rows or {2 * rows} go together, which the
   compiler makes vectors of: compile with -O3 and for the machine at hand (-march=native), and do not with -ffast-math. For
   calls with few rows, -D$N_ROWS=4 or less saves time. */
#ifndef $N_H_INCLUDED
#define $N_H_INCLUDED

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {{
#endif

typedef {"float" if self._single else "double"} $N_real;
enum {{ $N_features = {record.features}, $N_context_features = {record.context_features} }};
{names}
/* Log-density of rows x, n x $N_features, in nats, to out, n; context: {context}. -inf at and outside a bound;
   NaN for a row with a NaN, in its context too. */
void $N_log_prob(size_t n, const $N_real *x, const $N_real *context, $N_real *out);

/* Samples to out, n x $N_features: rows offset, offset + 1, ... of the stream of a seed, those of flow.sample(n, context, seed, offset)
   but for rounding; context: {one}. */
void $N_sample(size_t n, const $N_real *context, uint64_t seed, uint64_t offset, $N_real *out);
{rows_of}{grad}
#ifdef __cplusplus
}}
#endif
#endif
"""


def _check(layer: Autoregressive | Terminal, law: str, wires: list[tuple[bool, int]]) -> None:
    """Raise what there is no code for."""
    net = layer.conditioner
    maps = (*net.hidden, net.final)
    if isinstance(layer, Autoregressive) and layer.direction != "data":
        raise _lacks(f"direction {layer.direction!r} of an Autoregressive layer")
    if law not in ("exp", "exp_soft"):
        raise _lacks(f"law {law!r}")
    if any(adds >= 0 and not np.array_equal(maps[k].degrees, maps[adds].degrees) for k, (_, adds) in enumerate(wires)):  # type: ignore[arg-type]
        raise _lacks("a residual block that changes the degrees of its units")
    if any(dense.norm_scale is not None for dense in maps):
        raise _lacks("an inner batch norm")
    if any(dense.context_bias is not None for dense in maps):
        raise _lacks("a context map with a bias of its own")
    modes = [dense.context for dense in maps]
    if any(mode not in ("none", "added") for mode in modes) or any(mode != "none" for mode in modes[1:-1]):
        raise _lacks(f"a context that enters as {', '.join(modes)} (there is: added, at the first and at the last map)")


def _wires(net: Conditioner) -> list[tuple[bool, int]]:
    """For each map, whether the next one reads activations, and the map whose sums are added to its own, or -1."""
    activated: list[bool] = []
    adds = [-1]
    for block in net.blocks:
        activated.append(block.kind in ("plain", "residual"))
        if block.residual:
            activated.append(True)
            adds += [-1, len(activated) - 2]
        else:
            adds.append(-1)
    if net.initial is not None:
        activated.append(net.final_activation)
        adds.append(-1)
    return list(zip([*activated, False], adds, strict=True))


def _horner(coefficients: tuple[float, ...], single: bool) -> str:
    """The text of a polynomial in x, ascending powers."""
    text = _number(coefficients[-1], single)
    for c in coefficients[-2::-1]:
        text = f"MADD({text}, x, {_number(c, single)})"
    return text


def _number(value: Any, single: bool = False) -> str:
    if math.isinf(value):
        return "-INFINITY" if value < 0 else "INFINITY"
    text = f"{np.float32(value):.9g}" if single else repr(float(value))
    if "." not in text and "e" not in text:
        text += ".0"
    return f"{text}f" if single else text


def _lines(words: list[str], width: int = 132) -> str:
    """Comma-separated words, in lines."""
    if sum(map(len, words)) + 2 * len(words) < 60:
        return ", ".join(words)
    lines, line = [], ""
    for word in words:
        if len(line) + len(word) > width:
            lines.append(line)
            line = ""
        line += f"{word}, "
    return "\n    " + "\n    ".join([*lines, line.rstrip(", ")])


def _string(text: str) -> str:
    """A literal of C, in ASCII."""
    return '"' + "".join(chr(b) if 32 <= b < 127 and chr(b) not in '"\\?' else f"\\{b:03o}" for b in text.encode()) + '"'
