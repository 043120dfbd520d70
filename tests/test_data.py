"""The bundled data is what its description says."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import fastmaf
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


class Sliced:
    """As a dataset of h5py: a shape, and rows by slices."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows, self.shape, self.asked = rows, rows.shape, 0

    def __getitem__(self, rows: slice) -> np.ndarray:
        self.asked = max(self.asked, rows.stop - rows.start)
        return self._rows[rows]


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16"])
@pytest.mark.parametrize("width", [1, 3])
def test_chunks_become_one_array(dtype: str, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).integers(-99, 99, size=(1000, width)).astype(dtype)
    monkeypatch.setattr("fastmaf.data._chunks.CHUNK", 64 * width)
    sliced = Sliced(rows)
    for chunks in (iter(np.split(rows, [0, 10, 700, 700])), [rows.tolist(), rows[:0]] if dtype == "float64" else [rows], sliced):
        found = data.collect(chunks)
        assert isinstance(found, np.memmap) and not found.flags.writeable
        np.testing.assert_array_equal(found, rows)
        assert found.dtype == (dtype if dtype != "int16" else "float64")
    assert sliced.asked == 64
    data.collect([rows], tmp_path / "rows.npy")
    found = data.collect([rows, rows], tmp_path / "rows.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy").reshape(-1, width), np.concatenate([rows, rows]))
    assert found.shape == (2000, width) and [path.name for path in tmp_path.iterdir()] == ["rows.npy"]


def test_chunks_do_not_stay_in_memory() -> None:
    made: list[weakref.ref[np.ndarray]] = []
    most = 0

    def chunks() -> Iterator[np.ndarray]:
        nonlocal most
        for _ in range(6):
            chunk = np.zeros((5, 2))
            made.append(weakref.ref(chunk))
            most = max(most, sum(chunk() is not None for chunk in made))
            yield chunk
            del chunk

    assert data.collect(chunks()).shape == (30, 2)
    assert most <= 2


def test_a_fit_of_chunks_is_that_of_the_rows() -> None:
    x = data.galaxies()[0][:3000]
    flows = [fastmaf.MAF(7, transforms=1, hidden_features=(8,), seed=0) for _ in range(2)]
    for flow, rows in zip(flows, (x, data.collect(np.split(x, 7 * [400]))), strict=True):
        flow.fit(rows, max_epochs=2, seed=0, progress=False)
    np.testing.assert_array_equal(flows[0].parameters(), flows[1].parameters())


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([], "chunks has no rows"),
        ([np.zeros((0, 2))], "chunks has no rows"),
        (3, "chunks is 3; it must give arrays of rows, or have a shape"),
        ("rows.npy", "chunks is 'rows.npy'; it must give arrays of rows"),
        ([np.zeros((3, 2)), np.zeros((3, 1))], r"chunk 1 has shape \(3, 1\); it must be \(k, 2\)"),
        ([np.zeros(3)], r"chunk 0 has shape \(3,\); it must be \(k, D\)"),
        ([np.zeros((3, 2), "f4"), np.zeros((3, 2))], "chunk 1 is float64, and the first one float32, which does not hold it"),
    ],
)
def test_chunks_that_do_not_go_together_leave_no_file(chunks: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        data.collect(chunks, tmp_path / "rows.npy")
    assert not list(tmp_path.iterdir())
