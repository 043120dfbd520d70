"""Exported C: compiles without a warning, and its numbers are those of the reference and of the library but for rounding."""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import make
import numpy as np
import pytest
from make import CASES
from tolerances import EXPORT_ULPS, assert_close

import fastmaf
from fastmaf import cli, export, masks
from fastmaf.export import export_c
from fastmaf.layers import Affine, Autoregressive, BatchNorm, Block, Conditioner, Elementwise, Law, Linear, Terminal

STRICT = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror"]


def compiler():
    """The C compiler: that of CC, or the system's."""
    words = shlex.split(os.environ.get("CC", "")) or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    assert words, "there is no C compiler; apt install gcc, or set CC"
    return words


def compiled(flow, folder, *flags, name="flow", **options):
    """The functions of the exported flow, as functions of arrays."""
    path = Path(folder) / f"{name}.c"
    export_c(flow, path, **options)
    library = path.with_suffix(".so")
    command = [*compiler(), *STRICT, *(flags or ("-O1",)), "-shared", "-fPIC", str(path), "-o", str(library), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dtype = np.dtype(options.get("dtype") or flow.dtype)
    prefix = options.get("prefix") or name
    functions, features, width = ctypes.CDLL(str(library)), flow.features, flow.context_features
    size, word = ctypes.c_size_t, ctypes.c_uint64

    def pointer(array):
        if array is None:
            return None
        assert array.flags.c_contiguous and array.dtype == dtype
        return ctypes.c_void_p(array.ctypes.data)

    def own(array):
        return None if array is None else np.ascontiguousarray(array, dtype)

    def log_prob(x, context=None):
        x, context, out = own(x), own(context), np.full(len(x), 77, dtype)
        getattr(functions, f"{prefix}_log_prob")(size(len(x)), pointer(x), pointer(context), pointer(out))
        return out

    def log_prob_and_grad(x, context=None):
        x, context, out = own(x), own(context), np.full(len(x), 77, dtype)
        dx, dcontext = np.full_like(x, 77), None if context is None else np.full_like(context, 77)
        arguments = map(pointer, (x, context, out, dx, dcontext))
        getattr(functions, f"{prefix}_log_prob_and_grad")(size(len(x)), *arguments)
        return out, dx, dcontext

    def sample(n, context, seed, offset=0):
        context, out = own(context), np.full((n, features), 77, dtype)
        getattr(functions, f"{prefix}_sample")(size(n), pointer(context), word(seed), word(offset), pointer(out))
        return out

    def sample_rows(context, seed, offset=0, context_offset=0):
        context, out = own(context), np.full((len(context), features), 77, dtype)
        arguments = (size(len(context)), pointer(context), word(seed), word(offset), word(context_offset), pointer(out))
        getattr(functions, f"{prefix}_sample_rows")(*arguments)
        return out

    return SimpleNamespace(
        log_prob=log_prob, log_prob_and_grad=log_prob_and_grad, sample=sample, sample_rows=sample_rows, features=features, width=width
    )


def assert_near(actual, expected, dtype, factor=1.0):
    """Within EXPORT_ULPS of the largest number of the row, or of 1."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    size = np.maximum(1, np.abs(np.where(finite, expected, 0)))
    if size.ndim == 2:
        size = np.broadcast_to(size.max(axis=1, keepdims=True), size.shape)
    error = np.abs(actual - expected)[finite] / size[finite] / np.finfo(dtype).eps
    assert not error.size or error.max() <= factor * EXPORT_ULPS, f"{error.max():.1f} ulp, allowed {factor * EXPORT_ULPS}"


@pytest.mark.parametrize("name", CASES)
def test_cases(name, dtype, tmp_path):
    given = make.case(name, dtype)
    try:
        c = compiled(given.flow, tmp_path, gradient=True)
    except NotImplementedError as error:
        pytest.skip(str(error))
    value, dx, dcontext = c.log_prob_and_grad(given.x, given.context)
    assert_close("log_prob", dtype, value, given.expected["log_prob"])
    np.testing.assert_array_equal(c.log_prob(given.x, given.context), value)
    for actual, expected in zip((dx, dcontext), given.expected["gradients"], strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert_close("gradient", dtype, actual, expected)
    context = None if given.context is None else given.context[0]
    with make.reference():
        exact = given.flow.astype("float64").sample(37, context, seed=5, offset=3)
    assert_close("sample", dtype, c.sample(37, context, 5, 3), exact)


def random_dense(rng, mask, degrees=None, context_features=0):
    return make.dense(rng, mask, degrees, context_features, 0.5)


def residual(rng, features, context_features, kind="residual", late=True, skip=True, rows=2):
    """A network with a residual block, a context at both ends and direct weights."""
    ranks = rng.permutation(features) + 1
    degrees = np.sort(masks.hidden_degrees(11, features, True))
    mask = masks.hidden_mask(degrees, degrees)
    initial = random_dense(rng, masks.hidden_mask(degrees, ranks), degrees, context_features)
    blocks = tuple(Block(kind, (random_dense(rng, mask, degrees), random_dense(rng, mask, degrees))) for _ in range(2))
    final = random_dense(rng, masks.output_mask(ranks, degrees, rows), None, context_features if late else 0)
    direct = np.where(masks.output_mask(ranks, ranks, rows), 0.3 * rng.normal(size=(rows * features, features)), 0) if skip else None
    return ranks, Conditioner(initial, blocks, final, "silu" if late else "tanh", late, direct, input_clip=1.5)


def mixture(rng, features, context_features, components=3):
    ranks = rng.permutation(features) + 1
    net = make.conditioner(rng, ranks, (9, 8), context_features, "gelu", rows=3 * components, input_clip=2.0)
    return Terminal(ranks, net, "mixture", components=components)


def unusual(name, dtype):
    """Flows with what `make.CASES` has not."""
    rng, features = np.random.default_rng(8), 5
    norm = BatchNorm(*(0.3 * rng.normal(size=(3, features))), rng.uniform(0.5, 2, size=features))
    triangles = np.eye(features) + 0.2 * rng.normal(size=(2, features, features))
    linear = Linear(*triangles, rng.normal(size=features))
    width = 2 if name != "linear" else 0
    ranks, net = residual(rng, features, width, "linear_residual" if name == "linear_residual" else "residual", name == "residual")
    layers = {
        "residual": [Autoregressive(ranks, net), Affine(*rng.uniform(0.5, 2, size=(2, features)))],
        "linear_residual": [Autoregressive(ranks, net, Law("exp", "affine"))],
        "linear": [linear, norm, make.flow(features, (9,), 1).layers[0], linear],
        "mixture": [Elementwise.from_bounds([(0, 1), None, (0, None), None, None]), make.flow(features, (9,), 1, 2).layers[0]],
        "lone mixture": [],
    }[name]
    base = mixture(rng, features, 2) if "mixture" in name else None
    return fastmaf.Flow(layers, base, features=features, context_features=width, dtype=dtype)


@pytest.mark.parametrize("name", ("residual", "linear_residual", "linear", "mixture", "lone mixture"))
def test_what_layers_there_are(name, dtype, tmp_path):
    flow = unusual(name, dtype)
    c, exact = compiled(flow, tmp_path, gradient=True), flow.astype("float64")
    context = make.contexts(flow, 101)
    with make.reference():
        x = exact.sample(1, context, seed=1).reshape(-1, flow.features) if context is not None else exact.sample(101, seed=1)
        x = x.astype(dtype)
        expected = exact.log_prob_and_grad(x, context)
        samples = exact.sample(50, None if context is None else context[0], seed=2, offset=2**40 - 1)
    value, *gradients = c.log_prob_and_grad(x, context)
    assert_close("log_prob", dtype, value, expected[0])
    for actual, reference in zip(gradients, expected[1:], strict=True):
        if reference is not None:
            assert_close("gradient", dtype, actual, reference)
    assert_close("sample", dtype, c.sample(50, None if context is None else context[0], 2, 2**40 - 1), samples, factor=2)


@pytest.mark.parametrize("conditional", ("bernoulli", "categorical", "mixed"))
def test_discrete_variables(conditional, dtype, tmp_path):
    options = {"bernoulli": {}, "categorical": {"categories": (2, 3, 4, 2, 5)}}.get(conditional, {"categories": (2, None, 4, None, 5)})
    flow = fastmaf.MADE(5, conditional, context_features=1, hidden_features=(9,), dtype=dtype, seed=1, **options)
    flow = flow.with_parameters(flow.parameters() + np.where(flow.parameters() == 0, 0, 0.5))
    c, context = compiled(flow, tmp_path), make.contexts(flow, 60)
    x = flow.sample(1, context, seed=1)[:, 0]
    x[3, 1], x[4, 2], x[5, 0] = 0.5, np.nan, -1
    with make.reference():
        assert_close("log_prob", dtype, c.log_prob(x, context), flow.astype("float64").log_prob(x, context))
        samples, expected = c.sample(500, context[0], 3), flow.sample(500, context[0], seed=3)
        counted = np.array(flow.record.values) > 0
        np.testing.assert_array_equal(samples[:, counted], expected[:, counted])
        assert_close("sample", dtype, samples, expected)
    with pytest.raises(NotImplementedError, match=f"no code for the gradient of a flow with a {conditional} base"):
        compiled(flow, tmp_path, gradient=True)


def trained(dtype="float32", **options):
    """A flow like those that `fit` gives: bounds, names and a context."""
    flow = make.flow(6, (20, 20), transforms=3, context_features=2, affine=True, bounds=True, input_clip=5.0, dtype=dtype, **options)
    flow.names = ("a", "b?", 'c"', "µ", "e\\", "f")
    return flow


def test_numbers_are_those_of_the_library(dtype, tmp_path):
    flow = trained(dtype)
    c, contexts = compiled(flow, tmp_path, "-O3", "-march=native", gradient=True), make.contexts(flow, 999)
    for n in (0, 1, 15, 16, 17, 999):
        x, context = make.rows(flow, n, contexts[:n]), contexts[:n]
        exact = flow.astype("float64").log_prob(x, context)
        assert_near(c.log_prob(x, context), exact, dtype)
        value, dx, dcontext = c.log_prob_and_grad(x, context)
        assert_near(value, exact, dtype)
        assert_close("gradient", dtype, dx, flow.astype("float64").log_prob_and_grad(x, context)[1])
        assert_close("gradient", dtype, dcontext, flow.astype("float64").log_prob_and_grad(x, context)[2])
    for seed, offset, n in ((0, 0, 33), (1, 5, 1), (2**64 - 1, 2**63, 16), (7, 2**32 - 3, 50)):
        assert_close("sample", dtype, c.sample(n, contexts[0], seed, offset), flow.sample(n, contexts[0], seed=seed, offset=offset))
        each = flow.sample(1, contexts[:n], seed=seed, offset=offset, context_offset=9)[:, 0]
        assert_close("sample", dtype, c.sample_rows(contexts[:n], seed, offset, 9), each)
    whole = c.sample(40, contexts[0], 3)
    np.testing.assert_array_equal(np.vstack([c.sample(13, contexts[0], 3), c.sample(27, contexts[0], 3, 13)]), whole)
    low, high = flow.layers[0].inner_range(np.dtype(dtype))
    assert ((whole >= low) & (whole <= high)).all()


def test_rows_without_a_density(dtype, tmp_path):
    flow = trained(dtype)
    c, context = compiled(flow, tmp_path, gradient=True), make.contexts(flow, 8)
    x = make.rows(flow, 8, context)
    x[0, 0], x[1, 1], x[2, 0], x[3, 4], x[4, 1], x[5, 1] = 2, np.nan, 0, -3.5, np.inf, 1e30
    x[4, 2], context[6, 1] = np.nan, np.nan
    value, dx, dcontext = c.log_prob_and_grad(x, context)
    with make.reference():
        expected = flow.log_prob_and_grad(x, context)
    np.testing.assert_array_equal(np.isnan(value), [False, True, False, False, True, False, True, False])
    np.testing.assert_array_equal(np.isneginf(value), np.isneginf(expected[0]))
    assert np.isneginf(value[[0, 2, 3, 5]] if dtype == "float32" else value[[0, 2, 3]]).all()
    lost = ~np.isfinite(value)
    np.testing.assert_array_equal(dx[lost], expected[1][lost])
    np.testing.assert_array_equal(dcontext[lost], expected[2][lost])
    assert_close("gradient", dtype, dx[7:], flow.astype("float64").log_prob_and_grad(x[7:], context[7:])[1])


@pytest.mark.parametrize("target", ("float32", "float64"))
def test_another_dtype(target, tmp_path):
    flow = trained("float64" if target == "float32" else "float32")
    c, context = compiled(flow, tmp_path, dtype=target), make.contexts(flow, 50).astype(target)
    x = make.rows(flow, 50, context).astype(target)
    assert_near(c.log_prob(x, context), flow.astype(target).astype("float64").log_prob(x, context), target)


@pytest.mark.parametrize("rows", (1, 4, 7, 64))
def test_rows_that_go_together_change_nothing_but_bits(rows, tmp_path):
    flow = trained()
    c, context = compiled(flow, tmp_path, "-O2", f"-Dflow_ROWS={rows}", gradient=True), make.contexts(flow, 70)
    x = make.rows(flow, 70, context)
    exact = flow.astype("float64").log_prob_and_grad(x, context)
    value, dx, _ = c.log_prob_and_grad(x, context)
    assert_near(value, exact[0], "float32")
    assert_close("gradient", "float32", dx, exact[1])


@pytest.mark.parametrize("language", ("gcc -std=c99", "gcc -std=c17", "clang -std=c99", "g++ -std=c++11", "clang++ -std=c++17"))
@pytest.mark.parametrize("flags", ("-O0", "-O3", "-O3 -march=native"))
def test_compilers(language, flags, tmp_path):
    command, standard = language.split()
    if shutil.which(command) is None:
        (pytest.fail if os.environ.get("FASTMAF_EXPECT") else pytest.skip)(f"there is no {command}")
    for number, flow in enumerate((trained(), unusual("mixture", "float64"), unusual("residual", "float32"), unusual("linear", "float64"))):
        path = tmp_path / f"f{number}.c"
        export_c(flow, path, gradient=True)
        kind = ["-x", "c++"] if "++" in command else []
        words = [command, standard, *STRICT[1:], *flags.split(), *kind, "-c", str(path), "-o", str(tmp_path / "f.o")]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_no_state_and_no_allocation(tmp_path):
    """Everything static is constant, and nothing but mathematics is called."""
    export_c(trained(), tmp_path / "flow.c", gradient=True)
    words = [*compiler(), "-O2", "-fno-pic", "-c", "flow.c", "-o", "flow.o"]
    subprocess.run(words, check=True, cwd=tmp_path)
    lines = subprocess.run(["nm", "flow.o"], capture_output=True, text=True, check=True, cwd=tmp_path).stdout.splitlines()
    own = [line.split() for line in lines]
    assert not [words for words in own if words[-2] in "bBdDcC"]
    called = {words[-1] for words in own if words[-2] == "U"} - {"__stack_chk_fail"}
    assert called <= {"exp", "log", "memcpy", "memset", "floor", "floorf", "sqrtf", "tanhf", "expm1f", "erfcf", "fmaf", "fma"}


def test_the_header_says_what_there_is(tmp_path):
    flow = trained()
    functions = compiled(flow, tmp_path, name="waves", prefix="sea")
    assert functions.features == 6
    main = tmp_path / "main.c"
    main.write_text(
        '#include "waves.h"\n#include <stdio.h>\nint main(void) {\n    int i;\n'
        '    printf("%d %d %d\\n", sea_features, sea_context_features, (int)sizeof(sea_real));\n'
        "    for (i = 0; i < sea_features; ++i) puts(sea_names[i]);\n    return 0;\n}\n"
    )
    program = tmp_path / "main"
    subprocess.run([*compiler(), *STRICT, str(main), str(tmp_path / "waves.c"), "-o", str(program), "-lm"], check=True)
    said = subprocess.run([str(program)], capture_output=True, text=True, check=True, encoding="utf-8").stdout.splitlines()
    assert said == ["6 2 4", *flow.names]


def test_refusals_leave_no_file(tmp_path, monkeypatch):
    flow = trained()
    path = tmp_path / "flow.c"
    for prefix in ("1x", "a-b", "", "double", "é"):
        with pytest.raises(ValueError, match="it must be a name in C"):
            export_c(flow, path, prefix=prefix)
    with pytest.raises(ValueError, match=r"must end in \.c"):
        export_c(flow, tmp_path / "flow.h")
    with pytest.raises(ValueError, match="it must be a Flow: export each member"):
        fastmaf.export_c(fastmaf.Ensemble(fastmaf.MAF(2), members=2), tmp_path / "a.c")
    with pytest.raises(ValueError, match="flow is 3; it must be a Flow$"):
        export_c(3, path)
    with pytest.raises(ValueError, match=r"a call would need \d+ KB of stack"):
        export_c(make.flow(2, (70_000,), transforms=1), path)
    with pytest.raises(NotImplementedError, match="fastmaf export has no code for law 'softplus'"):
        export_c(make.flow(2, law="softplus"), path)
    own = make.flow(2).layers[0]
    with pytest.raises(NotImplementedError, match="no code for direction 'noise'"):
        export_c(fastmaf.Flow([Autoregressive(own.ranks, own.conditioner, own.law, "noise")]), path)
    weights = flow.parameters()
    weights[np.flatnonzero(weights)[0]] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        export_c(flow.with_parameters(weights), path)
    monkeypatch.setattr(export, "LARGEST", 20_000)
    with pytest.raises(ValueError, match=r"the C file would have \S+ MB; at most"):
        export_c(make.flow(2, (8,)), path)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path, capsys):
    flow = trained()
    flow.save(tmp_path / "flow.safetensors")
    arguments = ["export", str(tmp_path / "flow.safetensors"), "--c", str(tmp_path / "out.c")]
    assert cli.main([*arguments, "--gradient", "--dtype", "double", "--prefix", "own"]) == 0
    source, header = export.c_source(flow, "out", gradient=True, dtype="float64", prefix="own")
    assert (tmp_path / "out.c").read_text() == source and (tmp_path / "out.h").read_text() == header
    assert "typedef double own_real;" in header and "own_log_prob_and_grad" in header
    assert cli.main([*arguments, "--prefix", "int"]) == 1
    assert capsys.readouterr().err == "fastmaf: prefix is 'int'; it must be a name in C\n"


def test_the_page(tmp_path):
    """The program of docs/export.md compiles, and prints what the library gives."""
    page = Path(__file__).resolve().parents[1] / "docs" / "export.md"
    if not page.exists():
        pytest.skip("the documentation is not part of what is installed")
    (code,) = re.findall(r"```c\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    flow = make.flow(3, affine=True, dtype="float32")
    export_c(flow, tmp_path / "flow.c", gradient=True)
    (tmp_path / "main.c").write_text(code)
    words = [*compiler(), *STRICT, "-O2", "main.c", "flow.c", "-o", "main", "-lm"]
    subprocess.run(words, check=True, cwd=tmp_path)
    said = subprocess.run(["./main"], capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()
    x = flow.sample(4, seed=1)
    assert np.allclose(np.array(said, float), flow.log_prob(x), atol=1e-4)
