"""The examples in Python run, and give what one call gives. (Those in other languages are in test_embedding.)"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import fastmaf

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def run(*command):
    package = str(pathlib.Path(fastmaf.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def flow(tmp_path):
    own = fastmaf.MAF(4, transforms=2, hidden_features=(8,), seed=0)
    own.save(tmp_path / "flow.safetensors")
    return own


def test_dask(flow, tmp_path):
    pytest.importorskip("distributed")
    n = 250_000
    result = run(sys.executable, EXAMPLES / "dask" / "entropy.py", tmp_path / "flow.safetensors", n)
    assert result.returncode == 0, result.stderr
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", result.stdout)]
    samples, log_prob = flow.sample_and_log_prob(n, seed=1)
    assert numbers[0] == pytest.approx(-log_prob.mean(dtype=float), abs=2e-5)
    assert numbers[1] == pytest.approx(log_prob.std(dtype=float) / n**0.5, rel=1e-2)
    np.testing.assert_allclose(numbers[2:], samples[0], rtol=1e-6)


@pytest.mark.parametrize("ranks", [1, 3])
def test_mpi(flow, tmp_path, ranks, mpirun):
    script, file = EXAMPLES / "mpi" / "rows.py", tmp_path / "flow.safetensors"
    small = tmp_path / "rows.py"  # with blocks that end within the rows of a rank
    small.write_text(script.read_text(encoding="utf-8").replace("BLOCK = 1_000_000", "BLOCK = 1_000"), encoding="utf-8")
    for operation, source in (("sample", 10_001), ("log_prob", tmp_path / "sample.npy")):
        result = mpirun(small, operation, file, source, tmp_path / f"{operation}.npy", size=ranks)
        assert result.returncode == 0, result.stderr
    samples = flow.sample(10_001, seed=1)
    np.testing.assert_array_equal(np.load(tmp_path / "sample.npy"), samples, strict=True)
    np.testing.assert_array_equal(np.load(tmp_path / "log_prob.npy"), flow.log_prob(samples), strict=True)
    result = mpirun(small, "log_prob", file, tmp_path / "none.npy", tmp_path / "out", size=ranks)
    assert result.returncode != 0 and "No such file" in result.stderr
