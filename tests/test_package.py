"""The package as a whole: what is reachable after one import, and what is said where the compiled core is absent."""

from __future__ import annotations

import ast
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import fastmaf

PACKAGE = pathlib.Path(fastmaf.__file__).parent


def run(code, folder, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "FASTMAF_PURE"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=inherited | environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The package without its compiled core, in a folder of its own."""
    folder = tmp_path_factory.mktemp("tree")
    leave = shutil.ignore_patterns("_core*.so", "__pycache__", "*.npz")
    shutil.copytree(PACKAGE, folder / "fastmaf", ignore=leave)
    return folder


@pytest.fixture(scope="module")
def source(tree, tmp_path_factory):
    """The same with the files beside it that make a source tree."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(tree, folder, dirs_exist_ok=True)
    for name in ("CMakeLists.txt", "pyproject.toml"):
        (folder / name).touch()
    return folder


FLOORS = """
_core _start _words
_device _files _random _tables data._text layers masks train.ranks
data._sink data._source
_arrays _container _networks
_dask data._chunks
data record
_codec _within
backends
backends.cpu backends.reference config
backends.cuda backends.numba _gradients _partial train.data
_noise train._bar train.checkpoint
train.loop
train.many
train
flow
ensemble export handle interop._common maf
dask interop._made interop._torch interop.flowjax masked_ensemble presets sklearn stats torch._module
io made plot
interop._zuko_parts interop.nflows interop.pyro torch._samplers torch._sbi
interop.normflows interop.zuko jax torch
interop.sbi
interop
__init__
cli._streams
cli._common cli._demo
cli._bench cli._convert cli._evaluate cli._fit cli._show
cli
__main__
"""
"""The modules of the package from the ground up: each imports only what lies on floors below its own."""


def imported(path, modules):
    """Modules of the package that a file imports, anywhere in it; the package itself where it takes one of its names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("fastmaf.") in modules else node.module for name in inner]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == "fastmaf":
                yield name.removeprefix("fastmaf").removeprefix(".") or "__init__"


def test_every_module_imports_only_what_lies_below():
    floors = {module: floor for floor, line in enumerate(FLOORS.split("\n")) for module in line.split()}
    files = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    files = {name if name == "__init__" else name.removesuffix(".__init__"): path for name, path in files.items()}
    assert set(files) == set(floors) - {"_core"}
    for name, path in files.items():
        for other in imported(path, floors):
            assert floors[other] < floors[name], f"{name} imports {other}"


DENSITY = """
import sys, warnings
sys.modules["numba"] = None  # as if it were not installed: the reference takes no time to compile
import fastmaf, numpy as np
flow = fastmaf.MAF(2, transforms=1, hidden_features=(4,))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    flow.log_prob(np.zeros((3, 2)))
    flow.log_prob(np.zeros((3, 2)))
    fastmaf.get_backend()
for warning in caught:
    print(warning.category.__name__, warning.filename, warning.message)
"""


def test_a_source_tree_without_the_core_is_refused(source):
    result = run("import fastmaf", source)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the source tree of fastmaf, ") and "has no compiled core" in last
    assert "pip install -e ." in last and "FASTMAF_PURE=1" in last


def test_a_source_tree_without_the_core_is_taken_on_request(source):
    result = run(DENSITY, source, FASTMAF_PURE="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_a_source_tree_with_the_core_is_taken(source, tmp_path):
    cores = list(PACKAGE.glob("_core*.so"))
    if not cores:
        pytest.skip("the core is not compiled here")
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    for core in cores:
        shutil.copy(core, tmp_path / "fastmaf")
    result = run("import fastmaf; print(fastmaf.__file__, fastmaf.get_backend())", tmp_path)
    assert result.stdout.split() == [str(tmp_path / "fastmaf" / "__init__.py"), "cpu"], result.stderr


def test_an_installed_package_without_the_core_warns_once_where_it_is_used(tree):
    result = run(DENSITY, tree)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("RuntimeWarning <string> fastmaf computes with its reference backend, many times slower")
    assert "pip install ." in lines[0] and "FASTMAF_PURE=1" in lines[0]


@pytest.mark.parametrize("request_", [{"FASTMAF_PURE": "1"}, {}])
def test_whoever_asks_for_a_backend_is_not_warned(tree, request_):
    code = DENSITY if request_ else DENSITY.replace("flow = ", "fastmaf.set_backend('reference')\nflow = ")
    result = run(code, tree, **request_)
    assert result.returncode == 0 and result.stdout == "", result.stderr


def test_all_is_reachable_after_one_import(tmp_path):
    code = """
import sys
import fastmaf
assert not {"fastmaf.train", "fastmaf.stats", "fastmaf.plot", "tqdm", "matplotlib"} & set(sys.modules)
names = ["FitWarning", "History", "data", "layers", "masks", "plot", "presets", "stats", "train"]
assert set(names) <= set(dir(fastmaf)) and set(fastmaf.__all__) <= set(dir(fastmaf))
for name in names:
    getattr(fastmaf, name)
assert fastmaf.History is fastmaf.train.History and issubclass(fastmaf.FitWarning, Warning)
from fastmaf import *
assert History is fastmaf.History and callable(plot.corner) and callable(data.galaxies)
try:
    fastmaf.nonsense
except AttributeError as error:
    print(error)
"""
    result = run(code, tmp_path, PYTHONPATH=str(PACKAGE.parent))
    assert result.stdout == "module 'fastmaf' has no attribute 'nonsense'\n", result.stderr


NOTEBOOK = """
import sys, types, warnings
warnings.simplefilter("always")
class Shell:
    config = {"IPKernelApp": {}}
ipython = types.ModuleType("IPython"); ipython.get_ipython = lambda: Shell()
ipython.display = types.ModuleType("IPython.display"); ipython.display.display = print
sys.modules |= {"IPython": ipython, "IPython.display": ipython.display, "ipykernel.zmqshell": types.ModuleType("zmqshell")}
sys.modules["ipywidgets"] = None
from fastmaf.train import _bar
print(_bar.tqdm.__module__)
"""


def test_a_notebook_without_widgets_hears_no_warning(tmp_path):
    result = run(NOTEBOOK, tmp_path, PYTHONPATH=str(PACKAGE.parent))
    assert result.returncode == 0 and result.stdout.startswith("tqdm"), result.stderr
    assert result.stderr == ""


def test_a_notebook_with_widgets_gets_their_bar(tmp_path):
    widgets = "from unittest.mock import MagicMock; sys.modules['ipywidgets'] = MagicMock()"
    code = NOTEBOOK.replace('sys.modules["ipywidgets"] = None', widgets)
    code = code.replace("print(_bar.tqdm.__module__)", "print([base.__module__ for base in _bar.tqdm.__mro__])")
    result = run(code, tmp_path, PYTHONPATH=str(PACKAGE.parent))
    assert "tqdm.notebook" in result.stdout, result.stderr


OPTIONAL = {
    "torch": "fastmaf.torch needs PyTorch, which is not installed: pip install torch",
    "jax": "fastmaf.jax needs JAX, which is not installed: pip install jax",
    "dask": "fastmaf.dask needs dask and its arrays, which are not installed: pip install 'fastmaf[dask]'",
    "sklearn": "fastmaf.sklearn needs scikit-learn, which is not installed: pip install 'fastmaf[sklearn]'",
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_what_needs_another_package_says_so_where_it_is_absent(name, tmp_path):
    code = f"""
import sys
sys.modules["{name}"] = None
import fastmaf
assert "{name}" not in dir(fastmaf)
try:
    fastmaf.{name}
except ImportError as error:
    print(error)
"""
    result = run(code, tmp_path, PYTHONPATH=str(PACKAGE.parent))
    assert result.stdout == f"{OPTIONAL[name]}\n", result.stderr


def test_other_packages_are_not_imported_before_they_are_asked_for(tmp_path):
    code = f"""
import sys, fastmaf
fastmaf.Handle
print([name for name in sys.modules for other in {list(OPTIONAL)} if name in (other, "fastmaf." + other)])
"""
    assert run(code, tmp_path, PYTHONPATH=str(PACKAGE.parent)).stdout == "[]\n"
