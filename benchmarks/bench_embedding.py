"""The density of few rows through libfastmaf, called in a loop in C, beside Python and the peers; against reading the weights once.

Two peers are called from C++ as well: a flow of zuko as TorchScript, and as AOTInductor compiles it for this number of rows.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .cases import Array, Model, normal
from .checks import check_log_prob
from .peers import LIBRARIES, Unavailable, Zuko, ZukoCompiled, build
from .report import Settings
from .timing import Contender, Line, compare

ROWS = (1, 16, 1000)


class Compiled:
    """libfastmaf with the loops of ``embedding.c`` around it, and a model and an evaluator of one thread."""

    def __init__(self, flow: Any, folder: Path) -> None:
        import fastmaf

        home = Path(os.environ.get("FASTMAF_LIBRARY_PREFIX", Path(fastmaf.__file__).parent))
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None or not (home / "include" / "fastmaf.h").exists():
            raise Unavailable(
                "no C compiler" if compiler is None else "fastmaf runs from its sources: install it, or set FASTMAF_LIBRARY_PREFIX"
            )
        library, source = folder / "embedding.so", Path(__file__).with_name("embedding.c")
        options = [
            "-O3",
            "-march=native",
            "-ffast-math",
            "-shared",
            "-fPIC",
            f"-I{home}/include",
            f"-L{home}/lib",
            f"-Wl,-rpath,{home}/lib",
        ]
        subprocess.run([compiler, *options, str(source), "-o", str(library), "-lfastmaf"], check=True)
        self.loops, self.features = ctypes.CDLL(str(library)), flow.features
        model, self.evaluator, text = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.create_string_buffer(300)
        flow.save(folder / "flow.safetensors")
        path = str(folder / "flow.safetensors").encode()
        if self.loops.fastmaf_model_open(path, ctypes.byref(model), text, 300) or self.loops.fastmaf_evaluator_create(
            model, 1, ctypes.byref(self.evaluator), text, 300
        ):
            raise Unavailable(text.value.decode())
        self.loops.repeat_reading.restype = ctypes.c_float

    def log_prob(self, x: Array, times: int) -> Callable[[], Array]:
        """So many calls over the rows."""
        out = np.empty(len(x), np.float32)

        def call() -> Array:
            size = ctypes.c_int64
            pointers = ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(out.ctypes.data)
            status = self.loops.repeat_log_prob(self.evaluator, size(times), size(len(x)), size(self.features), *pointers)
            if status:
                raise RuntimeError(f"status {status}")
            return out

        return call

    def read(self, count: int, times: int) -> Callable[[], float]:
        """So many times reading so many numbers."""
        numbers = np.ones(count + 128, np.float32)
        return lambda: self.loops.repeat_reading(ctypes.c_int64(times), ctypes.c_int64(count), ctypes.c_void_p(numbers.ctypes.data))


class FromTorch:
    """What torch makes of a flow of zuko for C++, with the loops of ``embedding_torch.cpp`` around it."""

    def __init__(self, folder: Path) -> None:
        import torch
        from torch.utils import cpp_extension

        compiler = shutil.which(os.environ.get("CXX", "c++"))
        if compiler is None:
            raise Unavailable("no C++ compiler")
        library, source = folder / "embedding_torch.so", Path(__file__).with_name("embedding_torch.cpp")
        shipped = Path(torch.__file__).with_name("lib")
        places = [*(f"-I{path}" for path in cpp_extension.include_paths()), f"-L{shipped}", f"-Wl,-rpath,{shipped}"]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
        options = ["-O2", "-std=c++20", "-shared", "-fPIC", abi, *places]
        libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
        subprocess.run([compiler, *options, str(source), "-o", str(library), *libraries], check=True, capture_output=True)
        self.loops, self.folder = ctypes.CDLL(str(library)), folder
        self.loops.torch_open.restype = ctypes.c_void_p
        self.loops.torch_message.restype = ctypes.c_char_p

    def log_prob(self, flow: Any, x: Array, times: int, compiled: bool) -> Callable[[], Array]:
        """So many calls over the rows, of a file made for as many."""
        import torch

        class Density(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.flow = flow

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.flow().log_prob(x)

        density, example = Density().eval(), torch.from_numpy(x)
        path = str(self.folder / f"{len(x)}_rows.{'pt2' if compiled else 'pt'}")
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if compiled:
                torch._inductor.aoti_compile_and_package(torch.export.export(density, (example,)), package_path=path)
            else:
                traced = torch.jit.freeze(torch.jit.trace(density, example, check_trace=False))
                torch.jit.optimize_for_inference(traced).save(path)
        model = self.loops.torch_open(path.encode(), int(compiled))
        if not model:
            raise Unavailable(self.loops.torch_message().decode()[:200])
        out = np.empty(len(x), np.float32)

        def call() -> Array:
            size, pointer = ctypes.c_int64, ctypes.c_void_p
            if self.loops.torch_repeat(
                pointer(model), size(times), size(len(x)), size(x.shape[1]), pointer(x.ctypes.data), pointer(out.ctypes.data)
            ):
                raise RuntimeError(self.loops.torch_message().decode()[:200])
            return out

        return call


def run(settings: Settings) -> Iterator[Line]:
    """One line per model and number of rows."""
    kinds = tuple(kind for kind in LIBRARIES if kind is not ZukoCompiled)
    for model in settings.models:
        if model.name in ("S", "M"):
            yield from _lines(model, kinds, settings)


def _lines(model: Model, kinds: Any, settings: Settings) -> Iterator[Line]:
    libraries, skipped = build(model, kinds)
    ours, zuko = libraries[0], next((lib for lib in libraries if isinstance(lib, Zuko)), None)
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = Compiled(ours.flow, Path(folder))  # type: ignore[attr-defined]
        except (Unavailable, OSError, subprocess.CalledProcessError) as problem:
            line = Line("embedding", model.name, 0)
            line.skipped["fastmaf"] = str(problem)
            yield line
            return
        try:
            torch = FromTorch(Path(folder))
        except (ImportError, Unavailable, OSError, subprocess.CalledProcessError) as problem:
            torch, skipped["zuko, from C++"] = None, str(problem)[:200]
        for rows in ROWS:
            x = normal(rows, model.features)
            steps = max(1, 10**6 // (rows * ours.unmasked // 20))
            numbers = -(-ours.unmasked // 64) * 64
            contenders = [
                Contender("fastmaf", compiled.log_prob(x, steps), check_log_prob(ours, x), steps=steps),
                Contender("reading the weights", compiled.read(numbers, steps), lambda total: 0.0, steps=steps),
                *(Contender(f"{lib.name}, from Python", lib.log_prob(x), check_log_prob(lib, x)) for lib in libraries),
            ]
            if torch is not None and zuko is not None:
                few = max(1, steps // 50)
                for name, ahead in (("TorchScript", False), ("AOTInductor", True)):
                    try:
                        call = torch.log_prob(zuko.model, x, few, ahead)  # type: ignore[attr-defined]
                    except Exception as problem:
                        skipped[f"zuko, {name}, from C++"] = f"{type(problem).__name__}: {str(problem)[:160]}"
                        continue
                    contenders.append(Contender(f"zuko, {name}, from C++", call, check_log_prob(zuko, x), steps=few))
            line = Line("embedding", model.name, rows, skipped=dict(skipped))
            compare(line, contenders, settings.rounds, 1)
            if "seconds" in line.contenders.get("fastmaf", {}):
                line.values["microseconds"] = 1e6 * line.contenders["fastmaf"]["seconds"]["median"]
                line.values["times reading"] = 1 / line.contenders["reading the weights"]["ratio"]["median"]
                jax = [entry["ratio"]["median"] for name, entry in line.contenders.items() if name.startswith("flowjax")]
                if jax:
                    line.values["times jitted jax"] = min(jax)
                from_cpp = [entry["ratio"]["median"] for name, entry in line.contenders.items() if name.endswith("from C++")]
                if from_cpp:
                    line.values["times torch from C++"] = min(from_cpp)
            yield line
