"""The bundled data is what its description says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastmaf import data

ORIGINAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "buzzard_galaxies_f32.npz"


def test_galaxies_are_clean() -> None:
    x, names = data.galaxies()
    assert x.shape == (60_000, 7) and x.dtype == np.float32
    assert names == ("redshift", "u", "g", "r", "i", "z", "y")
    assert np.isfinite(x).all()
    assert np.unique(x, axis=0).shape == x.shape
    assert x[:, 0].min() > 0 and x[:, 0].max() < 2.3
    assert x[:, 1:].min() > 10 and x[:, 1:].max() < 35


def test_bands_run_from_blue_to_red() -> None:
    """Galaxies are brighter, so smaller in magnitude, the redder the band; neighbouring bands are the most alike."""
    x, _ = data.galaxies()
    means, correlation = x.mean(axis=0), np.corrcoef(x, rowvar=False)
    assert (np.diff(means[1:]) < 0).all()
    assert correlation[1, 6] < correlation[5, 6]


def test_rows_are_in_random_order() -> None:
    x, _ = data.galaxies()
    error = 2 * x.std(axis=0) / np.sqrt(30_000)
    assert (np.abs(x[:30_000].mean(axis=0) - x[30_000:].mean(axis=0)) < 2.5 * error).all()


def test_attribution_is_beside_the_file() -> None:
    text = (Path(data.__file__).parent / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "pzflow" in text and "1901.02401" in text and "MIT License" in text


@pytest.mark.skipif(not ORIGINAL.exists(), reason="the full catalogue is not here")
def test_rows_come_from_the_catalogue() -> None:
    x, _ = data.galaxies()
    with np.load(ORIGINAL) as archive:
        original = archive["x"]
    assert np.array_equal(x, original[np.random.default_rng(0).permutation(100_000)[:60_000]])
