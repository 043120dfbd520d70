"""libfastmaf from C, C++ and Fortran, built outside the source tree against an installed one: the same bits as Python; the examples."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import make
import numpy as np
import pytest

import fastmaf
from fastmaf import backends

HERE = Path(__file__).resolve().parent
EXAMPLES, DOCS = HERE.parent / "examples", [HERE.parent / "docs" / name for name in ("embedding.md", "cuda.md")]
EXPECTED = "FASTMAF_EXPECT" in os.environ
STRICT = ["-Wall", "-Wextra", "-pedantic", "-Werror", "-O1"]
COMPILERS = {"c": ["cc", "-std=c99"], "cpp": ["c++", "-std=c++17"], "f90": ["gfortran", "-std=f2008"]}


def absent(what):
    """Skip, unless this machine is expected to have everything."""
    if EXPECTED:
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def home():
    """The installed tree: that of the package, or another one, ``FASTMAF_LIBRARY_PREFIX``."""
    path = Path(os.environ.get("FASTMAF_LIBRARY_PREFIX", Path(fastmaf.__file__).parent))
    if not list(path.glob("lib/libfastmaf*")):
        absent("fastmaf runs from its sources, without libfastmaf: install it, or set FASTMAF_LIBRARY_PREFIX")
    return path


def tool(name):
    path = shutil.which(name)
    return path or absent(f"{name} is not installed")


@pytest.fixture(scope="session")
def environment(home, tmp_path_factory):
    """Of the examples: a `fastmaf` that tells of this tree, and threads as MPI wants them."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "fastmaf"
    code = f"import fastmaf; fastmaf.__file__ = {str(home / '__init__.py')!r}; from fastmaf.cli import main; raise SystemExit(main())"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(code)} "$@"\n')
    script.chmod(0o755)
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return os.environ | root | {"PATH": f"{folder}:{os.environ['PATH']}"}


def run(*command, status=0, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, check=False, **options)
    assert done.returncode == status, f"{command[0]}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout if status == 0 else done.stdout + done.stderr


def build(home, kind, sources, target, *options):
    compiler, *standard = COMPILERS[kind]
    flags = [f"-I{home}/include", f"-L{home}/lib", f"-Wl,-rpath,{home}/lib"]
    module = [home / "include" / "fastmaf.f90"] if compiler == "gfortran" else []
    run(tool(compiler), *standard, *STRICT, *flags, *module, *sources, "-o", target, "-lfastmaf", *options, cwd=target.parent)
    return target


def test_the_header_is_c99_and_cpp(home, tmp_path):
    for name in ("header.c", "header.cpp"):
        (tmp_path / name).write_text("#include <fastmaf.h>\nint main(void) { return fastmaf_abi_version() != FASTMAF_ABI_VERSION; }\n")
        run(build(home, name[7:], [tmp_path / name], tmp_path / f"{name}.out"))


def test_python_and_the_library_in_one_process(home):
    code = (
        "import ctypes, sys, fastmaf; library = ctypes.CDLL(sys.argv[1]); library.fastmaf_version.restype = ctypes.c_char_p;"
        "assert library.fastmaf_version().decode().count(chr(46)) == 2; fastmaf.MAF(3, seed=0).sample(10, seed=0)"
    )
    library = next(path for path in sorted((home / "lib").glob("libfastmaf.so*")) if path.read_bytes()[:4] == b"\x7fELF")
    run(sys.executable, "-c", code, library)


@pytest.fixture(scope="session")
def flow_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("flow") / "flow.safetensors"
    fastmaf.MAF(features=4, transforms=2, hidden_features=(32,), seed=0).save(path)
    return path


@pytest.fixture
def example(tmp_path, environment):
    def copied(name):
        return Path(shutil.copytree(EXAMPLES / name, tmp_path / name))

    return copied


def test_the_example_of_make(example, environment, flow_file):
    tool("cc")
    folder = example("make")
    run(tool("make"), cwd=folder, env=environment)
    said = run(folder / "density", flow_file, env=environment)
    assert said == f"log_prob {fastmaf.load(flow_file).log_prob(np.zeros((1, 4)))[0]:.17g}\n"


@pytest.mark.parametrize(("name", "program"), [("cmake", "density"), ("hmc", "hmc")])
def test_the_examples_of_cmake(example, environment, home, flow_file, name, program):
    folder = example(name)
    package = home / "lib" / "cmake" / "fastmaf"
    run(tool("cmake"), "-S", folder, "-B", folder / "build", f"-Dfastmaf_DIR={package}", env=environment)
    run("cmake", "--build", folder / "build", env=environment)
    said = run(folder / "build" / program, flow_file, env=environment)
    assert re.search(r"entropy -?\d|effective sample size \d{3}", said)


def test_the_example_of_fortran(example, environment, flow_file):
    tool("gfortran")
    folder = example("fortran")
    run(tool("make"), cwd=folder, env=environment)
    said = run(folder / "posterior", flow_file, env=environment)
    x, log_prob = fastmaf.load(flow_file).sample_and_log_prob(100000, seed=1, dtype="float64")
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", said)]
    assert np.allclose(numbers[:-1:2], x.mean(axis=0), atol=2e-6) and np.isclose(numbers[-1], log_prob.mean(), atol=2e-6)


def test_ranks_draw_parts_of_one_stream(example, environment, flow_file):
    for name in ("mpicxx", "mpifort", "mpirun"):
        tool(name)
    folder = example("mpi")
    run(tool("make"), cwd=folder, env=environment)
    expected = fastmaf.load(flow_file).sample(10001, seed=1, dtype="float64").tobytes()
    for program in ("stream", "stream_fortran"):
        for ranks in (1, 2, 4):
            file = folder / f"{program}{ranks}"
            run("mpirun", "--oversubscribe", "-n", ranks, folder / program, flow_file, 10001, file, env=environment)
            assert file.read_bytes() == expected


def snippets():
    """The code of the pages, by language."""
    text = "".join(page.read_text() for page in DOCS if page.exists())
    return re.findall(r"```(c|cpp|f90)\n(.*?)```", text, re.S)


@pytest.mark.parametrize("number", range(len(snippets())))
def test_the_snippets_of_the_pages_compile(home, tmp_path, number):
    kind, code = snippets()[number]
    source = tmp_path / f"snippet.{kind}"
    source.write_text(code)
    build(home, kind, [source], tmp_path / "snippet", *(["-pthread"] if kind == "cpp" else []))


# Every call in every language, in both dtypes of flows and of arrays

ROWS, DRAWS, GROUPS = 23, 5, 3


def ensemble(dtype, *arguments, **options):
    made = fastmaf.MADE(*arguments, masks=6, dtype=dtype, seed=1, **options)
    return made.with_parameters(np.random.default_rng(2).normal(scale=0.3, size=made.parameters().shape))


EVERY = {
    "plain": lambda dtype: make.flow(6, (9, 7), dtype=dtype, affine=True, bounds=True),
    "one variable": lambda dtype: make.flow(1, (5,), dtype=dtype),
    "conditional": lambda dtype: make.flow(5, (9, 8), context_features=2, dtype=dtype, affine=True, input_clip=0.7),
    "mixture": lambda dtype: fastmaf.MAF(4, 2, transforms=2, components=3, hidden_features=(9,), dtype=dtype, seed=1),
    "bernoulli": lambda dtype: fastmaf.MADE(7, conditional="bernoulli", hidden_features=(9,), dtype=dtype, seed=1),
    "ensemble": lambda dtype: ensemble(dtype, 5, hidden_features=(9, 7), bounds=[None, (-9, 9), None, (None, 9), None]),
    "conditional ensemble": lambda dtype: ensemble(dtype, 4, "mixture", components=3, context_features=20, hidden_features=(9,)),
    "discrete ensemble": lambda dtype: ensemble(dtype, 4, "categorical", categories=[2, 3, 4, 2], hidden_features=(9,)),
    "flows": lambda dtype: fastmaf.Ensemble([make.flow(5, (9, 8), seed=k, context_features=2, dtype=dtype, affine=True) for k in range(3)]),
    "discrete flows": lambda dtype: fastmaf.Ensemble(fastmaf.MADE(7, "bernoulli", hidden_features=(9,), dtype=dtype), members=2, seed=1),
    "mixed": lambda dtype: fastmaf.MADE(
        4, "mixed", categories=[None, 3, 2, None], bounds=[(-9, None), *[None] * 3], hidden_features=(9,), dtype=dtype, seed=1
    ),
    "categorical": lambda dtype: fastmaf.MADE(4, "categorical", categories=[2, 3, 4, 2], hidden_features=(9,), dtype=dtype, seed=1),
}
LANGUAGES = {"C99": "c", "C++17": "cpp", "C++20": "cpp", "C++17 of clang": "cpp", "Fortran": "F90"}
COMPILERS |= {
    "C99": ["cc", "-std=c99"],
    "C++17": ["c++", "-std=c++17", "-Wconversion"],
    "C++20": ["c++", "-std=c++20", "-Wconversion"],
    "C++17 of clang": ["clang++", "-std=c++17", "-Wconversion"],
    "Fortran": ["gfortran", "-std=f2008", "-cpp", "-fcheck=all", "-Wno-compare-reals"],
}


@pytest.fixture(scope="session")
def programs(home, tmp_path_factory):
    """Compiles a program of `embedding` once: f(name, language, options) -> path."""

    @functools.cache
    def compiled(name, language, *options):
        source = HERE / "embedding" / f"{name}.{LANGUAGES[language]}"
        target = tmp_path_factory.mktemp("program") / name
        return build(home, language, [source], target, *options)

    return compiled


@pytest.fixture
def cpu():
    """Numbers are those of the compiled core, whatever was in use before."""
    previous = backends.active
    fastmaf.set_backend("cpu")
    yield
    backends.active = previous


def discrete(flow):
    return bool(first(flow).record.discrete)


def first(flow):
    return flow.member(0) if isinstance(flow, fastmaf.Ensemble) else flow


def inputs(flow, kind):
    rng = np.random.default_rng(8)
    if discrete(flow):
        return (rng.random((ROWS, flow.features)) < 0.5).astype(kind), None
    context = make.contexts(flow, ROWS)
    x = first(flow).from_noise(rng.normal(size=(ROWS, flow.features)), context).astype(kind)
    return x, None if context is None else context.astype(kind)


def answers(flow, x, context, kind):
    """What Python says to the calls of the consumers."""
    one = None if context is None else context[0]
    results = {"log_prob": flow.log_prob(x, context), "log_prob_shared": flow.log_prob(x, one)}
    if discrete(flow):
        if flow is first(flow):
            results["probabilities"] = flow.conditional_probs(x, context)
    else:
        results["value"], results["d_x"], d_context = flow.log_prob_and_grad(x, context)
        results["d_context"] = np.empty(0) if d_context is None else d_context
        d_context = flow.log_prob_and_grad(x, one)[2]
        results["d_context_shared"] = np.empty(0) if d_context is None else d_context
        if flow is first(flow):
            results["noise"] = flow.to_noise(x, context)
            results["from_noise"] = flow.from_noise(x, context, dtype=kind)
    results["samples"], results["density"] = flow.sample_and_log_prob(DRAWS, one, 2**64 - 1, 7, 2, dtype=kind)
    if context is not None:
        results["samples_of_groups"] = flow.sample(DRAWS, context[:GROUPS], 1, dtype=kind)
        results["log_prob_of_groups"] = flow.log_prob(x, context[:GROUPS, None])
    return results


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_call_has_the_bits_of_python(programs, language, name, kind, dtype, tmp_path):
    flow = EVERY[name](dtype)
    flow.save(tmp_path / "flow.safetensors")
    x, context = inputs(flow, kind)
    x.tofile(tmp_path / "x")
    if context is not None:
        context.tofile(tmp_path / "context")
    program = programs("evaluate", language, *([f"-DKIND=real{kind[-2:]}"] if language == "Fortran" else []))
    environment = os.environ | {"FASTMAF_ISA": fastmaf.config.get_isa()}
    run(program, tmp_path / "flow.safetensors", tmp_path, {"float32": "f", "float64": "d"}[kind], ROWS, env=environment)
    for result, array in answers(flow, x, context, kind).items():
        found = np.fromfile(tmp_path / result, kind)
        if result == "d_context_shared":  # a sum in double, which Python rounds to the dtype of the flow
            found = found.astype(min(dtype, kind))
        np.testing.assert_array_equal(found, array.astype(found.dtype).ravel(), err_msg=result)
        if result == "probabilities":  # NaN where a variable may have any number
            found = found[
                np.repeat(np.array(flow.record.values) > 0, found.size // ROWS // flow.features).reshape(1, -1).repeat(ROWS, 0).ravel()
            ]
        assert np.isfinite(found).all() and (found.size < 2 or np.ptp(found) > 0), result


# On a GPU, or the device's code run by the host; elsewhere the library says why not


@pytest.mark.parametrize("language", ["C99", "C++17", "Fortran"])
def test_an_evaluator_on_cuda(programs, language, dtype, tmp_path):
    flow = make.flow(6, (9, 7), dtype=dtype, affine=True, bounds=True)
    flow.save(tmp_path / "flow.safetensors")
    output = run(programs("device", language, *(["-lm"] if language == "C99" else [])), tmp_path / "flow.safetensors")
    devices, status, rest = output.strip().split(" ", 2)
    if int(devices):
        assert status == "0" and float(rest) < {"float32": 1e-4, "float64": 1e-11}[dtype]
    else:
        assert re.match("4 this build of fastmaf has no|4 the CUDA kernels did not|7 no GPU can be used", f"{status} {rest}"), output


# Errors


@pytest.fixture(scope="module")
def three_flows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flows")
    made = [make.flow(6, (200, 200)), make.flow(6, (5,), context_features=2), fastmaf.MADE(6, conditional="bernoulli", seed=1)]
    paths = [folder / f"{i}.safetensors" for i in range(3)]
    for flow, path in zip(made, paths, strict=True):
        flow.save(path)
    return paths


def said(output, *expected):
    """Each line is a status and a text; `expected` has the status and words of the text."""
    lines = output.splitlines()
    assert len(lines) == len(expected), output
    for line, (status, words) in zip(lines, expected, strict=True):
        assert line.startswith(f"{status} ") and words in line and len(line) < 260, (line, status, words)


def test_every_status_that_c_can_get(programs, three_flows):
    output = run(programs("errors", "C99", "-D_POSIX_C_SOURCE=200809L"), three_flows[0])
    said(
        output,
        (0, ""),
        (0, ""),
        (0, ""),
        (1, "x is a null pointer"),
        (1, "rows is negative"),
        (1, "evaluator is a null pointer"),
        (2, "/nowhere/to/be.found"),
        (2, "/nowher"),
        (3, ""),
        (4, "continuous"),
        (5, ""),
    )


def test_exceptions(programs, three_flows):
    said(
        run(programs("errors", "C++17"), *three_flows),
        (2, "/nowhere/to/be.found"),
        (3, ""),
        (1, "threads"),
        (1, "x has shape (31,); rows of 6 numbers"),
        (1, "x has shape (5, 1); the flow has 6 features"),
        (1, "log_prob has shape (4,)"),
        (1, "the flow takes none"),
        (1, "context"),
        (1, "context has shape (4,)"),
        (1, "context"),
        (1, "contexts (c, 2) are needed"),
        (1, "n is negative"),
        (1, "rows of 6 numbers are needed for each context"),
        (1, "one behind the other"),
        (4, "continuous"),
        (4, "discrete"),
        (4, "discrete"),
        (1, "offset"),
    )


def test_stat_and_errmsg(programs, three_flows):
    output = run(programs("errors", "Fortran"), *three_flows, status=1)
    output, _, stop = output.partition("fastmaf: ")
    assert stop.startswith("x(features, samples): the flow has 6 features, not 7") and "ERROR STOP" in stop
    said(
        output,
        (2, "/nowhere/to/be.found"),
        (1, "the model is not open"),
        (3, ""),
        (0, ""),
        (1, "threads"),
        (1, "not created"),
        (0, ""),
        (1, "x(features, samples): the flow has 6 features, not 7"),
        (1, "log_prob does not fit"),
        (1, "the flow has none"),
        (1, "needs a context"),
        (1, "context has 3 samples, x has 4"),
        (1, "the flow has 2 context features, not 6"),
        (1, "d_x does not fit"),
        (1, "number of contexts"),
        (1, "the flow has 6 features"),
        (1, "offset is negative"),
        (1, "context_offset is negative"),
        (4, "continuous"),
        (4, "discrete"),
        (0, ""),
    )
