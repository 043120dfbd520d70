"""Whether an installed wheel works, without the tests: python .ci/smoke.py cpu|numba|reference, the backend that has to be there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

import fastmaf
from fastmaf.data import galaxies

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a backend that is slow says so
    backend = sys.argv[1]
    assert fastmaf.get_backend() == backend, f"{fastmaf.get_backend()} is in use:\n{fastmaf.show_config()}"
    x, names = galaxies()
    flow = fastmaf.MAF(2, context_features=1, transforms=2, hidden_features=(8,), names=names[:2], bounds=[(0, None), None], seed=0)
    history = flow.fit(x[:500, :2], x[:500, 2:3], max_epochs=2, seed=0)
    assert len(history.train) == 2 and np.isfinite(history.train).all(), history
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flow.safetensors"
        flow.save(path)
        loaded = fastmaf.load(path)
    samples = loaded.sample(100, x[0, 2:3], seed=1)
    assert samples.shape == (100, 2) and (samples[:, 0] > 0).all()
    assert np.array_equal(loaded.log_prob(samples, x[0, 2:3]), flow.log_prob(samples, x[0, 2:3]))
    assert Path(fastmaf.__file__).with_name("py.typed").exists()
    assert np.allclose(flow.from_noise(flow.to_noise(samples, x[0, 2:3]), x[0, 2:3]), samples, rtol=1e-3, atol=1e-4)

command = shutil.which("fastmaf", path=str(Path(sys.executable).parent)) or "fastmaf"
for words in (["demo", "--help"], ["info"], *([["config", "--libs"]] if backend == "cpu" else [])):
    subprocess.run([command, *words], check=True, stdout=subprocess.DEVNULL)
print(f"fastmaf {fastmaf.__version__} works: Python {sys.version.split()[0]}, NumPy {np.__version__}, backend {backend}")
