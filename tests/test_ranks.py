"""Fits by several processes (`fit(comm=)`) end where one process ends, and what goes wrong on one ends all. MPI is started by the tests."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess

import numpy as np
import pytest

import fastmaf
from fastmaf.train import data, ranks

SCRIPT = pathlib.Path(__file__).with_name("fit_in_ranks.py")
OPTIONS = {"batch_size": 64, "max_epochs": 4, "seed": 3, "lr": 5e-3, "progress": False}


@pytest.fixture(scope="module")
def rows():
    """Rows of a flow with contexts and weights, some of them zero."""
    rng = np.random.default_rng(1)
    context = rng.normal(size=(700, 2))
    x = rng.normal([4.0, -300.0, 0.01], [1.0, 40.0, 0.001], (700, 3))
    x[:, 1] += 30 * context[:, 0] * x[:, 0]
    weights = rng.integers(0, 4, 700) * 0.5
    weights[-1] = 9.0  # each part of the rows has another largest one
    return {"x": x, "context": context, "weights": weights, "few": np.linspace(0, 1, 700) ** 90}


@pytest.fixture
def run(rows, mpirun, tmp_path):
    """Runs a scenario on so many ranks, and gives what rank 0 has found."""
    np.savez(tmp_path / "data.npz", **rows)

    def run(scenario, size, *flags, **variables):
        done = mpirun(SCRIPT, scenario, tmp_path, size=size, flags=flags, **variables)
        assert done.returncode == 0 or scenario == "killed", done.stdout + done.stderr
        file = tmp_path / f"{scenario}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    return run


def shares(array, size):
    return np.split(array, [len(array) * k * (k + 1) // (size * (size + 1)) for k in range(1, size)])


def alone(rows, kind, size):
    """The fits of the script by this process."""

    def told(fitted, history):
        return fitted.parameters(), history, [fitted.training[name] for name in ("rows", "validation_rows")]

    def flow():
        return fastmaf.MAF(3, 2, hidden_features=(9, 8), dtype="float64", seed=0)

    x, context, weights = rows["x"], rows["context"], rows["weights"]
    own = flow()
    yield "weighted", *told(own, own.fit(x, context, weights, clip_norm=1.0, l2=1e-4, **OPTIONS))
    own = flow()
    parts = [[part[: len(part) // 2] for part in (shares(array, size) if kind == "share" else [array])] for array in (x, context)]
    given = tuple(np.concatenate(part) for part in parts)
    yield "whitened", *told(own, own.fit(x, context, validation=given, standardize="full", schedule="cosine", **OPTIONS))
    own = flow()
    yield "drawn", *told(own, own.fit(lambda epoch: x * (1 + 1e-3 * epoch), context, validation=0, **OPTIONS))
    made = fastmaf.MADE(3, context_features=2, hidden_features=(9,), masks=3, conditional="mixture", dtype="float64", seed=5)
    yield "masks", *told(made, made.fit(x, context, weights, **OPTIONS))


@pytest.mark.parametrize(("size", "device"), [(1, "cpu"), (2, "cpu"), (4, "cpu"), (1, "cuda"), (2, "cuda"), (4, "cuda")])
def test_ranks_end_where_one_process_does(rows, run, size, device):
    """On a GPU each has one for itself if there are enough, and ends where the CPU does."""
    if fastmaf.backends.reason(device) is not None:
        pytest.skip(f"{device}: {fastmaf.backends.reason(device)}")
    found = run("fits", size, DEVICE_OF_RANKS=device)
    for kind in ("share", "same"):
        for name, parameters, history, counts in alone(rows, kind, size):
            own = found[f"{kind}, {name}"]
            np.testing.assert_allclose(own["parameters"], parameters, rtol=1e-6, atol=1e-8, err_msg=f"{kind}, {name}")
            np.testing.assert_allclose(own["train"], history.train, rtol=1e-9)
            np.testing.assert_allclose(own["validation"], history.validation, rtol=1e-9)
            assert (own["best_epoch"], own["stopped"], own["rows"]) == (history.best_epoch, history.stopped, counts)
            assert own["start"] == (None if history.start is None else pytest.approx(history.start, rel=1e-9))
            if size == 1 and device == "cpu":
                assert own["parameters"] == parameters.tolist()
        first, second = found[f"{kind}, members"]
        assert first["stopped"] == second["stopped"] == "max_epochs"
        assert first["parameters"] != second["parameters"]


@pytest.mark.parametrize("size", [2, 3])
def test_what_fails_on_one_rank_ends_all(rows, run, size):
    found = run("faults", size)
    last, others = size - 1, range(size - 1)

    def told(name, own, elsewhere):
        assert own in found[name][last]
        assert all(elsewhere in found[name][rank] for rank in others)

    value = "ValueError: x has nan in row 5, column 1"
    told("data", value, f"RuntimeError: rank {last} has ended the fit: {value}")
    assert found["setting"] == [f"ValueError: batch_size is 64 on rank 0 and 65 on rank {last}"] * size
    assert found["seed"] == ["ValueError: seed is 0 on rank 0 and 1 on rank 1"] * size
    assert found["norms"] == ["ValueError: comm: several ranks fit no batch norms; build the flow without, or fit it in one process"] * size
    assert found["no communicator"] == ["ValueError: comm is 'world'; it must be a communicator of mpi4py, as MPI.COMM_WORLD"] * size
    told("callback", "OSError: full", f"RuntimeError: rank {last} has ended the fit: OSError: full")
    assert found["kept"] == [True] * size
    assert found["stop"] == ["callback"] * size
    assert found["interrupted"] == ["interrupted"] * size
    assert found["interrupted in a sum"] == ["interrupted"] * size
    assert all(weights == found["in the same step"][0] for weights in found["in the same step"])
    assert all(text.startswith("KeyboardInterrupt") for text in found["interrupted, raised"])
    assert found["kept then"] == found["handler"] == [True] * size
    assert found["members interrupted"] == [["interrupted"] * 3] * size
    assert found["untouched"] == [True] * size
    told("members fail", "OSError: full", f"RuntimeError: rank {last} has ended the fit: OSError: full")
    assert found["members"] == [f"ValueError: members is 2 on rank 0 and 3 on rank {last}"] * size
    assert found["interrupt"] == ["ValueError: on_interrupt is 'return' on rank 0 and 'raise' on rank 1"] * size
    assert found["dtype"] == [f"ValueError: dtype of x is 'float64' on rank 0 and 'float32' on rank {last}"] * size
    assert found["backend"] == [f"ValueError: backend is '{fastmaf.get_backend()}' on rank 0 and 'reference' on rank {last}"] * size
    assert found["weights"] == [f"ValueError: weights given is False on rank 0 and True on rank {last}"] * size
    told("no rows", "ValueError: weights are all zero", f"RuntimeError: rank {last} has ended the fit: ValueError: weights are all zero")
    assert found["file"][0].startswith("ValueError: checkpoint: the folder") and "rank 0 has ended the fit" in found["file"][1]
    assert found["disk"][0].startswith("ZeroDivisionError") and "rank 0 has ended the fit" in found["disk"][1]
    assert found["kept on the full disk"] == [True] * size
    assert all("ranks have come to different weights" in text for text in found["astray"])
    assert found["no time"] == ["max_seconds"] * size
    assert found["warnings"][1:] == [[]] * last
    notes = [note for note in found["warnings"][0] if not note.startswith("ranks of one machine")]
    assert [words.split(" of x")[0].split(" that")[0] for words in notes] == [
        "float32 cannot resolve columns 0, 1, 2",
        "weights are so unequal",
    ]
    with pytest.warns(fastmaf.FitWarning, match="weights are so unequal") as caught:
        fastmaf.MAF(3, 2, hidden_features=(9, 8), dtype="float64", seed=0).fit(rows["x"], rows["context"], rows["few"], **OPTIONS)
    assert str(caught[0].message) == notes[1]
    crowded = len(found["warnings"][0]) - len(notes)
    assert crowded == (3 if size > os.cpu_count() else 0)
    assert found["seconds"] < 60


def test_a_rank_that_dies_is_an_error_on_the_others(run, tmp_path):
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False).stdout
    if "Open MPI) 4" not in version:
        pytest.skip("how mpirun is to leave the other ranks alive is known for Open MPI 4 alone")
    run("killed", 3, "--mca", "orte_enable_recovery", "1", "--mca", "orte_abort_on_non_zero_status", "0", FASTMAF_MPI_SILENCE="2")
    for rank in (0, 1):
        text, seconds = json.loads((tmp_path / f"killed{rank}.json").read_text(encoding="utf-8"))
        assert "no word from another rank" in text
        assert seconds < 60
    found = run("resumed", 3)
    assert found["resumed"] == found["whole"]
    assert all("belongs to another fit: it differs in the data (x)" in text for text in found["other"])


def test_one_process_goes_on_where_ranks_with_the_same_rows_stopped(rows, run, tmp_path):
    run("begun", 2)
    flows = [fastmaf.MAF(3, 2, hidden_features=(9, 8), dtype="float64", seed=0) for _ in range(2)]
    arrays = rows["x"], rows["context"], rows["weights"]
    history = flows[0].fit(*arrays, checkpoint=tmp_path / "begun.safetensors", resume=True, **OPTIONS)
    whole = flows[1].fit(*arrays, **OPTIONS)
    np.testing.assert_allclose(flows[0].parameters(), flows[1].parameters(), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(history.validation, whole.validation, rtol=1e-9)


def test_the_program_of_the_guide(rows, mpirun, tmp_path):
    pages = pathlib.Path(__file__).parents[1] / "docs"
    (block,) = [block for block in (pages / "dask.md").read_text(encoding="utf-8").split("```python\n") if "mpi4py import" in block]
    (tmp_path / "program.py").write_text(f"import os\nos.chdir({str(tmp_path)!r})\n" + block.partition("```")[0], encoding="utf-8")
    for rank, part in enumerate(shares(rows["x"], 2)):
        np.save(tmp_path / f"rows.{rank}.npy", part)
    done = mpirun(tmp_path / "program.py", size=2)
    assert done.returncode == 0, done.stderr
    assert fastmaf.load(tmp_path / "flow.safetensors").training["rows"] == 630


def test_rows_that_all_ranks_hold_are_counted_once(rows):
    """A checkpoint of theirs goes on with any number of ranks, and one of shares does not."""

    class Two(ranks.Ranks):
        size = 2

        def __init__(self, rank, others):
            self.rank, self.others = rank, others

        def gather(self, value):
            other = self.others.pop(0)
            return [other, value] if self.rank else [value, other]

    x, digest = rows["x"], data.digest(rows["x"], None, None)
    record = fastmaf.MAF(3).record
    same = [data.split(record, x, None, None, 0.0, 1, False, Two(rank, [digest]))[0].rows for rank in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(same), np.arange(700))
    assert data.split(record, x, None, None, 0.0, 1, False, Two(0, ["another"]))[0].rows.size == 700
