"""The command as a shell drives it: files of every format, pipes, bad files, a full disk, little memory, Ctrl-C."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import random
import re
import signal
import stat
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

import fastmaf
from fastmaf import cli

resource = pytest.importorskip("resource", reason="there are no limits of memory here")

NAMES = ("z", "u g", "r")
HOME = os.path.dirname(os.path.dirname(fastmaf.__file__))


def environment(**more):
    path = os.pathsep.join(filter(None, [HOME, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "FASTMAF_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **more}


def fastmaf_command(*arguments, **options):
    """Run the command in a process of its own; its output as text unless bytes are asked for."""
    given = {"capture_output": True, "text": True, "timeout": 120, "check": False, "env": environment(), **options}
    return subprocess.run([sys.executable, "-m", "fastmaf", *map(str, arguments)], **given)


@pytest.fixture
def call(capfd):
    """The command in this process, which is quicker; with what it says."""

    def run(*arguments):
        capfd.readouterr()
        try:
            status = cli.main([*map(str, arguments)])
        except SystemExit as error:
            status = error.code
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, status, out, err)

    return run


def said(result, status, *words):
    """The process ended so, with one line on stderr that has these words."""
    assert result.returncode == status, result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("fastmaf"), result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
    assert len(result.stderr) < 320


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 3)) @ np.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
    x[:, 0] = np.exp(x[:, 0])
    return x


@pytest.fixture(scope="module")
def table(rows, tmp_path_factory):
    """A CSV with a row index, numbers in another order, text, weights, and two rows with missing values."""
    path = tmp_path_factory.mktemp("table") / "table.csv"
    lines = [',r,z,name,"u g",w']
    for k, (z, u, r) in enumerate(rows.tolist()):
        lines.append(f'{k},{"NA" if k == 7 else repr(r)},{z!r},"a, ""b""",{"" if k == 99 else repr(u)},{1 + k % 3}')
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """The file of a flow with names and a bound."""
    path = tmp_path_factory.mktemp("flow") / "flow.safetensors"
    fastmaf.MAF(3, transforms=2, hidden_features=(8,), names=NAMES, bounds={"z": (0, None)}, seed=1).save(path)
    return path


@pytest.fixture(scope="module")
def conditional(table, tmp_path_factory):
    """The file of a conditional flow that the command has fitted."""
    path = tmp_path_factory.mktemp("flow") / "conditional.safetensors"
    model = ("--hidden", "8", "--transforms", "1", "--components", "2", "--epochs", "2", "--seed", "3")
    result = fastmaf_command("fit", table, "--columns", "z", "--context", "u g,r", "--missing", "drop", "-o", path, *model)
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture(scope="module")
def expected(flow, rows):
    """Log-densities of the rows of the table, NaN where values are missing."""
    result = fastmaf.load(flow).log_prob(rows)
    result[[7, 99]] = np.nan
    return result


# A user's way


def test_from_a_table_to_samples(table, rows, tmp_path):
    out = tmp_path / "flow.safetensors"
    arguments = ["--columns", "z,u g,r", "--weights", "w", "--bounds", "z=0:", "--missing", "drop", "--seed", "5", "--epochs", "3"]
    result = fastmaf_command("fit", table, "-o", out, *arguments, "--hidden", "16,16", "--transforms", "2", "--lr", "2e-3")
    assert result.returncode == 0 and result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0].endswith("table.csv: 598 rows of z, u g, r, weights w; 2 rows with missing values are left out")
    assert lines[1].startswith("fastmaf: epoch 1: train ") and ", validation " in lines[1]
    assert lines[-1].startswith("fastmaf: 3 epochs in ") and lines[-1].endswith(f"nats (max_epochs): {out}")

    own = fastmaf.MAF(3, transforms=2, hidden_features=(16, 16), names=NAMES, bounds={"z": (0, None)}, seed=5)
    kept = np.delete(np.arange(600), [7, 99])
    own.fit(rows[kept], weights=1.0 + kept % 3, max_epochs=3, seed=5, lr=2e-3)
    fitted = fastmaf.load(out)
    assert fitted.names == NAMES and fitted.context_features == 0
    assert np.array_equal(fitted.parameters(), own.parameters())

    shown = fastmaf_command("info", out).stdout
    assert "variables       z, u g, r" in shown and "bounds          z in (0, inf)" in shown and "epochs          3" in shown
    drawn = fastmaf_command("sample", out, "-n", "200", "--seed", "1").stdout.splitlines()
    assert drawn[0] == "z,u g,r" and len(drawn) == 201
    read = np.array([line.split(",") for line in drawn[1:]], np.float64)
    assert np.array_equal(read.astype(np.float32), fitted.sample(200, seed=1))
    mean = fastmaf_command("log-prob", out, "-", "--mean", input="\n".join(drawn)).stdout
    log_prob = fitted.log_prob(read)
    assert mean == f"{log_prob.mean(dtype=float):.6f} ± {log_prob.std(ddof=1, dtype=float) / 200**0.5:.6f} nats per row, 200 rows\n"


def test_a_picture(call, table, flow, conditional, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    picture = tmp_path / "corner.png"
    result = call("plot", flow, table, "-o", picture, "--missing", "drop", "--show", "z,r", "--rows", "300", "--weights", "w")
    assert result.returncode == 0 and picture.read_bytes().startswith(b"\x89PNG")
    result = fastmaf_command("plot", conditional, table, "-o", "-", "--missing", "drop", "--noise", "--quiet", text=False)
    assert result.returncode == 0 and result.stdout.startswith(b"\x89PNG") and result.stderr == b""
    said(call("plot", flow, table, "-o", "corner.xyz"), 2, "corner.xyz ends in none of .png, .pdf, .svg")


def test_going_on_from_a_flow_and_from_a_checkpoint(call, table, flow, tmp_path):
    out, again, checkpoint = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "state.safetensors"
    fit = ["fit", table, "--missing", "drop", "--seed", "1", "--quiet"]
    result = call(*fit, "--start", flow, "--epochs", "1", "-o", out, "--checkpoint", checkpoint)
    assert (result.returncode, result.stderr) == (0, "")
    assert fastmaf.load(out).training["epochs"] == 1 and fastmaf.load(out).names == NAMES
    assert call(*fit, "--start", flow, "--epochs", "2", "-o", again, "--checkpoint", checkpoint, "--resume").returncode == 0
    assert fastmaf.load(again).training["epochs"] == 2
    said(call(*fit, "--start", flow, "--hidden", "9", "-o", out), 2, "--hidden does not go with --start")
    said(call(*fit, "--start", flow, "-o", out, "--resume"), 2, "--resume needs --checkpoint")


def test_a_device_that_is_not_there_is_said(call, table, flow, tmp_path):
    fit = ["fit", table, "--columns", "z,r", "--missing", "drop", "--hidden", "8", "--epochs", "1", "--quiet", "-o", tmp_path / "a"]
    assert call(*fit, "--members", "2").returncode == 0
    if fastmaf.backends.reason("cuda") is not None:
        said(call("log-prob", tmp_path / "a", table, "--device", "cuda"), 1, "the cuda backend is absent")
        said(call(*fit, "--device", "cuda"), 1, "the cuda backend is absent")


def test_messages_name_options(call, table, tmp_path):
    """Not arguments of Python."""
    fit = ["fit", table, "--columns", "z,r", "--missing", "drop", "--seed", "1", "--hidden", "8", "-o", tmp_path / "a"]
    checkpoint = ["--checkpoint", tmp_path / "c", "--epochs", "1"]
    assert call(*fit, *checkpoint).returncode == 0
    assert "exists; pass --resume to go on from it, or name another file" in call(*fit, *checkpoint).stderr
    result = call(*fit, "--seconds", "1e-9")
    assert result.returncode == 3
    assert "warning: --seconds 1e-09 were over before the first epoch: the weights are those of the start" in result.stderr
    other = tmp_path / "other.csv"
    other.write_text("z,r\n" + "\n".join(f"{1e6 + k},{k % 97}" for k in range(300)), encoding="utf-8")
    again = ["fit", other, "--start", tmp_path / "a", "--epochs", "1", "-o", tmp_path / "b"]
    assert "make a new flow for other data, or pass --standardize again" in call(*again).stderr
    assert call(*again, "--standardize", "again").returncode == 0
    assert fastmaf.load(tmp_path / "b").layers[0].loc[0] > 1e6


def test_columns_are_made_uncorrelated(call, table, tmp_path):
    fit = ["fit", table, "--columns", "z,u g,r", "--missing", "drop", "--seed", "1", "--epochs", "1", "--hidden", "8", "-o"]
    kinds = {}
    for how in ("yes", "full", "no"):
        call(*fit, tmp_path / how, "--standardize", how)
        kinds[how] = [type(layer).__name__ for layer in fastmaf.load(tmp_path / how).layers[:2]]
    assert kinds["full"] == ["Affine", "Linear"] and kinds["yes"] == kinds["no"] == ["Affine", "Autoregressive"]
    assert fastmaf.load(tmp_path / "no").layers[0].loc.tolist() == [0.0] * 3 != fastmaf.load(tmp_path / "yes").layers[0].loc.tolist()
    assert call(*fit, tmp_path / "a", "--standardize", "half").returncode == 2


def test_members(call, table, flow, tmp_path):
    out, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    fit = ["fit", table, "--columns", "z", "--context", "u g,r", "--missing", "drop", "--seed", "1", "--epochs", "2"]
    result = call(*fit, "--members", "3", "--hidden", "8", "--transforms", "1", "--components", "2", "-o", out)
    assert result.returncode == 0 and all(f"member {k}: 2 epochs" in result.stderr for k in range(3)), result.stderr
    ensemble = fastmaf.load(out)
    assert len(ensemble) == 3 and ensemble.names == ("z",)
    assert call(*fit, "--members", "1", "--hidden", "8", "--components", "2", "-o", again).returncode == 0
    assert isinstance(fastmaf.load(again), fastmaf.Flow)
    assert "3 members have" in call("info", out).stdout
    scored = call("log-prob", out, table, "--missing", "drop")
    drawn = call("sample", out, "-n", "4", "--given", "u g=0", "--given", "r=1", "--seed", "2")
    assert scored.returncode == 0 and drawn.stdout.startswith("z,u g,r\n") and drawn.stdout.count("\n") == 5, drawn.stderr
    samples = np.loadtxt(drawn.stdout.splitlines()[1:], delimiter=",")
    np.testing.assert_allclose(samples[:, 0], ensemble.sample(4, [0.0, 1.0], seed=2)[:, 0], rtol=1e-6)
    assert call(*fit, "--start", out, "--quiet", "-o", again).stderr == ""
    assert (fastmaf.load(again).parameters() != ensemble.parameters()).any()
    said(call("plot", out, table, "--missing", "drop", "--noise", "-o", tmp_path / "p.png"), 2, "--noise is for a flow")
    fastmaf.MADE(3, masks=2, hidden_features=(4,), names=NAMES).save(again)
    result = call("fit", table, "--missing", "drop", "--start", again, "-o", out)
    assert result.returncode == 2 and "ensemble of masks" in result.stderr


def test_members_that_never_began_are_left_out(call, table, tmp_path, monkeypatch):
    out = tmp_path / "a.safetensors"

    def interrupted(ensemble, x, *arguments, **options):
        fitted = [ensemble.member(k) for k in range(3)]
        histories = [flow.fit(x, max_epochs=1) for flow in fitted[:2]]
        ensemble._all = tuple(fitted)
        return [*histories, fastmaf.History(stopped="interrupted")]

    monkeypatch.setattr(fastmaf.Ensemble, "fit", interrupted)
    arguments = ["fit", table, "--columns", "z,r", "--missing", "drop", "--hidden", "8", "--members", "3", "-o", out]
    result = call(*arguments)
    assert result.returncode == 130 and "1 of 3 members never began to be trained, and are left out" in result.stderr
    assert len(fastmaf.load(out)) == 2


def test_validation_rows_of_their_own(call, table, tmp_path):
    out = tmp_path / "flow.safetensors"
    arguments = [
        "--columns",
        "r",
        "--context",
        "z",
        "--missing",
        "drop",
        "--components",
        "2",
        "--hidden",
        "4",
        "--seed",
        "1",
        "--epochs",
        "1",
        "-o",
        out,
    ]
    assert call("fit", table, "--validation", table, *arguments).returncode == 0
    training = fastmaf.load(out).training
    assert training["rows"] == training["validation_rows"] == 599 and training["settings"]["validation"] == "given"


# Formats


def files_of(rows, folder):
    """The same numbers in every format that takes no other package."""
    a = rows.astype(np.float32)
    np.save(folder / "c.npy", a)
    np.save(folder / "f.npy", np.asfortranarray(a))
    np.save(folder / "fields.npy", np.rec.fromarrays([a[:, 2], a[:, 0], a[:, 1]], names=["r", "z", "u g"]))
    np.savez(folder / "one.npz", x=a)
    np.savez(folder / "names.npz", x=a, names=np.array(NAMES))
    np.savez_compressed(folder / "columns.npz", **{"r": a[:, 2], "z": a[:, 0], "u g": a[:, 1], "other": np.arange(5)})
    text = [",".join(map(repr, row)) for row in a.astype(np.float64).tolist()]
    (folder / "plain.csv").write_text("\n".join(text))
    (folder / "windows.csv").write_bytes(("\ufeffz,u g,r\r\n" + "\r\n".join(text) + "\r\n").encode())
    (folder / "tabs.tsv").write_text("z\tu g\tr\n" + "\n".join(text).replace(",", "\t") + "\n\n")
    (folder / "semicolons.csv").write_text("# made by hand\nz;u g;r\n" + "\n".join(text).replace(",", ";") + "\n")
    (folder / "spaces.txt").write_text("# a table\n" + "\n".join(text).replace(",", "   ") + "\n")
    import gzip

    (folder / "packed.csv.gz").write_bytes(gzip.compress(("z,u g,r\n" + "\n".join(text) + "\n").encode()))
    return sorted(path.name for path in folder.iterdir())


def test_every_format_says_the_same(rows, flow, tmp_path):
    names = files_of(rows, tmp_path)
    assert len(names) == 12
    truth = fastmaf.load(flow).log_prob(rows.astype(np.float32))
    with pytest.raises(ValueError, match="different numbers of rows: 600 in 'u g', 5 in 'other'; choose columns"):
        fastmaf.data.read(tmp_path / "columns.npz")
    tables = {name: fastmaf.data.read(tmp_path / name, NAMES if name == "columns.npz" else None) for name in names}
    for name, (x, found) in tables.items():
        if "z" in found:
            x = x[:, [found.index(label) for label in NAMES]]
        assert np.array_equal(x, rows.astype(np.float32)), name
    for name in ("fields.npy", "columns.npz", "packed.csv.gz", "f.npy"):
        with open(tmp_path / name, "rb") as file:  # as a pipe would give it
            result = fastmaf_command("log-prob", flow, "-", "--to", "npy", text=False, input=file.read())
        assert result.returncode == 0, result.stderr
        (tmp_path / "out.npy").write_bytes(result.stdout)
        assert np.allclose(np.load(tmp_path / "out.npy"), truth, atol=1e-5), name


def test_output_formats_hold_the_same_numbers(call, flow, tmp_path):
    truth = fastmaf.load(flow).sample(1500, seed=4, dtype="float64")
    arguments = ["sample", flow, "-n", "1.5e3", "--seed", "4", "--dtype", "float64"]
    for name in ("x.npy", "x.csv"):
        result = call(*arguments, "-o", tmp_path / name)
        assert result.returncode == 0 and result.stderr.startswith("fastmaf: 1,500 rows in ")
        x, names = fastmaf.data.read(tmp_path / name)
        assert np.array_equal(x, truth) and names == (NAMES if name == "x.csv" else ("0", "1", "2"))
    said(call(*arguments, "-o", tmp_path / "x.fits"), 2, "ends in none of .csv, .npy, .parquet: name a format, --to")
    rest = fastmaf_command("sample", flow, "-n", "500", "--seed", "4", "--offset", "1000", "--to", "npy", text=False).stdout
    assert np.array_equal(np.frombuffer(rest[128:], np.float32).reshape(500, 3), truth[1000:].astype(np.float32))


def test_parquet(table, flow, expected, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import csv, parquet

    parquet.write_table(csv.read_csv(table), tmp_path / "table.parquet")
    out = tmp_path / "out.parquet"
    result = fastmaf_command("log-prob", flow, tmp_path / "table.parquet", "--missing", "keep", "-o", out)
    assert result.returncode == 0, result.stderr
    found = parquet.read_table(out)
    assert found.column_names == ["log_prob"]
    assert np.allclose(found["log_prob"].to_numpy(), expected, equal_nan=True, atol=1e-5)
    said(fastmaf_command("log-prob", flow, tmp_path / "table.parquet"), 1, "missing values in 2 of 600 rows (columns 'u g', 'r')")
    said(fastmaf_command("fit", tmp_path / "table.parquet", "-o", tmp_path / "f"), 1, "has string in column 'name'")
    piped = fastmaf_command("sample", flow, "-n", "10", "--seed", "1", "--to", "parquet", text=False).stdout
    again = fastmaf_command("log-prob", flow, "-", "--mean", input=piped, text=False)
    assert again.returncode == 0 and again.stdout.endswith(b"10 rows\n")


def test_parquet_needs_pyarrow(flow, tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + bytes(100))
    (tmp_path / "pyarrow.py").write_text("raise ImportError")  # as if it were not installed
    absent = {"env": environment(PYTHONPATH=os.pathsep.join([str(tmp_path), HOME]))}
    said(fastmaf_command("log-prob", flow, tmp_path / "x.parquet", **absent), 1, "pip install 'fastmaf[tables]'")
    said(fastmaf_command("sample", flow, "-n", "3", "-o", tmp_path / "y.parquet", **absent), 1, "pip install 'fastmaf[tables]'")
    assert sorted(os.listdir(tmp_path)) == ["pyarrow.py", "x.parquet"] or "__pycache__" in os.listdir(tmp_path)


def test_chains(call, tmp_path):
    """Of GetDist, with names and derived parameters in a file, and of Cobaya, with names in the first line."""
    rng = np.random.default_rng(1)
    body = np.column_stack([rng.integers(1, 4, 300), rng.random(300), rng.normal(size=(300, 3))])
    for k in (1, 2):
        np.savetxt(tmp_path / f"run_{k}.txt", body[k - 1 :: 2])
        np.savetxt(tmp_path / f"cob.{k}.txt", body[k - 1 :: 2], header="weight minuslogpost ns h chi2__cmb")
    (tmp_path / "run.paramnames").write_text("ns  n_s\nh  h\nH0*  H_0\n")
    for root in ("run", "cob"):
        with fastmaf.data.open_table(tmp_path / root) as table:
            assert table.usual == ("ns", "h") and table.weights == "weight"
            assert np.allclose(np.vstack([*table.chunks()]), np.vstack([body[::2], body[1::2]])[:, 2:4], atol=0)
        x, _ = fastmaf.data.read(tmp_path / root, ["weight", "ns"], burn_in=0.3)
        assert np.array_equal(x, np.vstack([body[::2][45:], body[1::2][45:]])[:, [0, 2]])
        out = tmp_path / f"{root}.safetensors"
        result = call("fit", tmp_path / root, "-o", out, "--epochs", "1", "--hidden", "4")
        assert "300 rows of ns, h, weights weight" in result.stderr
        assert fastmaf.load(out).names == ("ns", "h")
    with pytest.raises(ValueError, match="run is a chain without names"):
        os.remove(tmp_path / "run.paramnames")
        fastmaf.data.open_table(tmp_path / "run")
    said(call("fit", tmp_path / "rum", "-o", tmp_path / "x"), 1, "rum: No such file or directory")


@pytest.mark.parametrize("rows_in_a_block", [1, 7, 100])
def test_blocks_of_text_are_read_alike_by_all_readers(rows_in_a_block, monkeypatch):
    """What NumPy and pyarrow make of a block is what the careful reader makes of it; where lines are cut does not matter."""
    import io

    from fastmaf.data import _text

    rng = np.random.default_rng(rows_in_a_block)
    x = rng.normal(size=(40, 3)) * 10.0 ** rng.integers(-300, 300, (40, 3))
    lines = [",".join(map(repr, row)) for row in x.tolist()]
    plain = "\n".join(lines).encode() + b"\n"
    quoted = b"\n".join(f'{line},"two\nlines, and ""quotes"""'.encode() for line in lines) + b"\n"
    for text, width in ((plain, 3), (quoted, 4)):
        layout = _text.Layout(tuple("abcd"[:width]), True, ",", 0)
        monkeypatch.setattr(_text, "BLOCK", rows_in_a_block * 30)
        for readers in ((), ("_numpy",), ("_arrow",)):
            for name in ("_numpy", "_arrow"):
                if name not in readers:
                    monkeypatch.setattr(_text, name, lambda *_: None)
            parts = [_text.parse(block, n, layout, [2, 0], "x") for n, block in _text.blocks(io.BytesIO(text), b"", 0)]
            monkeypatch.undo()
            monkeypatch.setattr(_text, "BLOCK", rows_in_a_block * 30)
            assert np.array_equal(np.vstack(parts), x[:, [2, 0]]), readers
            assert rows_in_a_block == 100 or len(parts) > 1


FIELDS = [
    "1",
    "-2.5e3",
    "NA",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e-400",
    "True",
    "1_0",
    "0x10",
    "+5",
    ".5",
    "5.",
    "1e",
    "--1",
    "NULL",
    "-",
    "n/a",
    "#N/A",
    "-nan",
    "1d5",
    "1,5",
    "9007199254740993",
    "FALSE",
]


def test_odd_fields_are_read_alike_by_all_readers():
    """A quick reader leaves a block to the careful one, or finds the same."""
    from fastmaf.data import _text

    rng, taken = random.Random(1), 0
    odd = [*FIELDS, "", " 3 ", '"4"', '""', "  ", '"a\nb"', "1 2", "\u0661"]
    for _ in range(3000):
        width, mark = rng.choice([1, 2, 3]), rng.choice([",", ";", None])
        lines = [(mark or " ").join(rng.choice(odd if rng.random() < 0.1 else ["1", "-0.1"]) for _ in range(width)) for _ in range(3)]
        layout, block = _text.Layout(tuple("abc"[:width]), True, mark, 0), "\n".join(lines).encode().rstrip(b"\n")
        if b"#" in block or not block.strip():
            continue
        for quick in (_text._arrow, _text._numpy):
            if (found := quick(block, layout, range(width))) is not None:
                assert np.array_equal(found, _text._careful(block, 1, layout, range(width), "x"), equal_nan=True), block
                taken += 1
    assert taken > 1000


@pytest.mark.parametrize(
    ("text", "labels", "named"),
    [
        ("1,2\n3,4\n", ("0", "1"), False),
        ("a,b\n3,4\n", ("a", "b"), True),
        ("0,1,2\n3,4,5\n", ("0", "1", "2"), False),
        (",0,1\n3,4,5\n", ("", "0", "1"), False),
        ("# a b\n1 2\n", ("a", "b"), True),
        ("# by me, today\n1 2\n", ("0", "1"), False),
        ("x\n1\n2\n", ("x",), True),
        ('"a;b",c\n1,2\n', None, None),
        ("NA,1\n2,3\n", ("0", "1"), False),
        ("True,1\nFalse,0\n", ("0", "1"), False),
    ],
)
def test_headers(text, labels, named):
    from fastmaf.data import _text

    if labels is not None:
        found = _text.sniff(text.encode(), "x.csv")
        assert (found.labels, found.named) == (labels, named)
    found = _text.sniff(text.encode(), "x.csv", ",", header=True)
    assert found.skip == 1 + text.startswith("#")


# Columns


def test_names_decide_and_places_only_where_there_are_no_names(call, table, flow, expected, rows, tmp_path):
    result = call("log-prob", flow, table, "--missing", "keep")
    found = np.array(result.stdout.split()[1:], np.float64)
    assert np.allclose(found, expected, equal_nan=True, atol=1e-5)
    np.savetxt(tmp_path / "renamed.csv", rows, delimiter=",", header="z,ug,r", comments="")
    said(call("log-prob", flow, tmp_path / "renamed.csv"), 1, "lacks column 'u g'; did you mean 'ug'?")
    chosen = call("log-prob", flow, tmp_path / "renamed.csv", "--columns", "z,ug,r", "--mean").stdout
    assert float(chosen.split()[0]) == pytest.approx(fastmaf.load(flow).log_prob(rows).mean(dtype=float), abs=1e-5)
    np.save(tmp_path / "wide.npy", np.hstack([rows, rows]))
    said(call("log-prob", flow, tmp_path / "wide.npy"), 1, "6 columns without names; the flow has 3", "--columns")
    turned = call("log-prob", flow, tmp_path / "wide.npy", "--columns", "3,1,5", "--mean").stdout
    assert turned == chosen
    said(call("log-prob", flow, tmp_path / "wide.npy", "--columns", "3,1,6"), 1, "lacks column '6'; it has 6 without names")
    said(call("log-prob", flow, table, "--columns", "z,r"), 1, "2 columns are chosen, and the flow has 3")
    said(call("log-prob", flow, table, "--context", "z"), 2, "the flow has no context")


def test_a_flow_of_chosen_places_does_not_guess(call, rows, tmp_path):
    np.save(tmp_path / "x.npy", rows)
    out = tmp_path / "flow.safetensors"
    few = ["--hidden", "4", "--seed", "1", "--epochs", "1", "--quiet"]
    assert call("fit", tmp_path / "x.npy", "--columns", "2,0", "--context", "1", "-o", out, *few).returncode == 0
    result = call("log-prob", out, tmp_path / "x.npy")
    said(result, 1, "3 columns without names", "--columns and --context (the flow was fitted to 2,0 and 1)")
    given = call("log-prob", out, tmp_path / "x.npy", "--columns", "2,0", "--context", "1", "--mean")
    truth = fastmaf.load(out).log_prob(rows[:, [2, 0]], rows[:, [1]]).mean(dtype=float)
    assert float(given.stdout.split()[0]) == pytest.approx(truth, abs=1e-5)


def test_contexts_by_name(call, conditional, table, rows, tmp_path):
    flow = fastmaf.load(conditional)
    assert flow.names == ("z",)
    kept = np.delete(np.arange(600), [7, 99])
    result = call("log-prob", conditional, table, "--missing", "drop")
    assert "2 of 600 rows have missing values and are left out" in result.stderr
    truth = flow.log_prob(rows[kept, :1], rows[kept, 1:])
    assert np.allclose(np.array(result.stdout.split()[1:], float), truth, atol=1e-5)

    one = call("sample", conditional, "-n", "5", "--given", "r=0.25", "--given", "u g=-1", "--seed", "2").stdout.splitlines()
    assert one[0] == "z,u g,r"
    assert np.allclose(np.array([line.split(",") for line in one[1:]], float)[:, :1], flow.sample(5, [-1, 0.25], seed=2))
    many = tmp_path / "many.npy"
    assert call("sample", conditional, "-n", "4", "--contexts", table, "--missing", "drop", "--seed", "2", "-o", many).returncode == 0
    found = np.load(many).reshape(598, 4, 3)
    assert np.array_equal(found[..., :1], flow.sample(4, rows[kept, 1:], seed=2))
    assert np.array_equal(found[:, 3, 1:], rows[kept, 1:].astype(np.float32))
    closed = call("log-prob", conditional, many, "--mean")
    assert closed.returncode == 0 and "2,392 rows" in closed.stdout

    said(call("sample", conditional, "-n", "5"), 2, "2 context features, u g, r: name their values, --given or --contexts")
    said(call("sample", conditional, "-n", "5", "--given", "r=1"), 2, "u g is missing")
    said(call("sample", conditional, "-n", "5", "--given", "q=1"), 2, "no context is named q")
    said(call("sample", conditional, "-n", "5", "--given", "q"), 2, "must be NAME=NUMBER")


def test_chunks_do_not_show(conditional, table, monkeypatch, capfd):
    """Results of many small chunks are those of one."""
    from fastmaf.cli import _evaluate
    from fastmaf.data import _source

    commands = [
        ["sample", str(conditional), "-n", "7", "--contexts", str(table), "--missing", "drop", "--seed", "1"],
        ["sample", str(conditional), "-n", "700", "--given", "r=0", "--given", "u g=0", "--seed", "1", "--offset", "5"],
        ["log-prob", str(conditional), str(table), "--missing", "keep"],
        ["log-prob", str(conditional), str(table), "--missing", "drop", "--mean"],
    ]

    def outputs():
        for command in commands:
            assert cli.main(command) == 0
        return capfd.readouterr().out

    whole = outputs()
    for numbers in (1, 20, 50):
        monkeypatch.setattr(_evaluate, "CHUNK", numbers)
        monkeypatch.setattr(_source.Table.chunks, "__defaults__", (None, numbers))
        few = outputs()
        assert few.split("\n")[:-2] == whole.split("\n")[:-2]
        assert few.split()[-7:-4] != [] and few.split("±")[0][-10:] == whole.split("±")[0][-10:]


def test_categories_make_a_mixed_made(call, tmp_path):
    rng, out, file = np.random.default_rng(0), tmp_path / "flow.safetensors", tmp_path / "kinds.csv"
    kind = rng.integers(0, 4, 400)
    rows = np.stack([np.exp(rng.normal(kind / 2)), kind, rng.normal(size=400), kind > 1], axis=1)
    np.savetxt(file, rows, delimiter=",", header="mass,kind,age,flag", comments="")
    given = ["--columns", "mass,kind,flag", "--context", "age", "--categories", "kind=4,flag=2", "--bounds", "mass=0:"]
    result = call("fit", file, "-o", out, *given, "--hidden", "12", "--components", "2", "--epochs", "2", "--seed", "3")
    assert result.returncode == 0, result.stderr
    flow = fastmaf.load(out)
    own = fastmaf.MADE(
        3, "mixed", 1, (12,), categories={"kind": 4, "flag": 2}, components=2, bounds=[(0, None), None, None], names=flow.names, seed=3
    )
    own.fit(rows[:, [0, 1, 3]], rows[:, 2:3], max_epochs=2, seed=3)
    assert flow.base.categories == (0, 4, 2) and np.array_equal(flow.parameters(), own.parameters())
    assert "categories      kind 4, flag 2\n" in call("info", out).stdout and "mixed (- 4 2)" in call("info", out).stdout
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("mass,kind,flag,age\n1,0,1,0\n1,0.5,1,0\n")
    said(call("log-prob", out, wrong), 0, "1 of 2 rows cannot come from the flow (log_prob is -inf): outside its bounds, no value of its")
    drawn = call("sample", out, "-n", "50", "--given", "age=0.5", "--seed", "1").stdout.splitlines()
    assert {line.split(",")[1] for line in drawn[1:]} <= {"0", "1", "2", "3", "0.0", "1.0", "2.0", "3.0"}
    said(call("fit", file, "-o", out, "--categories", "kind=1"), 2, "must be NAME=N, with N at least 2")
    said(call("fit", file, "-o", out, "--categories", "mass=3", "--start", out), 2, "--categories does not go with --start")
    for options, status, words in (
        (["sort=3"], 2, "--categories sort=...: no variable has this name; the variables are mass"),
        (["kind=4", "--transforms", "3"], 2, "--transforms does not go with --categories"),
        (["kind=4", "--categories", "kind=5"], 2, "--categories names a variable twice"),
        (["kind=4", "--order", "reverse"], 2, "--order reverse turns around every second network, and --categories makes"),
        (["kind=3"], 1, "column 'kind'; it must be an integer from 0 to 2"),
    ):
        result = call("fit", file, "-o", out, "--categories", *options)
        assert result.returncode == status and words in result.stderr.splitlines()[-1]


# What goes wrong


def test_bad_files_and_columns_end_in_a_line(call, table, flow, rows, tmp_path):
    out = tmp_path / "out.safetensors"
    said(call("fit", table, "-o", out), 1, "has text in column 'name', line 2", "columns")
    said(call("fit", table, "--columns", "z,r", "-o", out), 1, "missing values in 1 of 600 rows (column 'r'); --missing drop")
    said(call("fit", table, "--columns", "z,R", "-o", out), 1, "lacks column 'R'; did you mean 'r'?")
    said(call("fit", table, "--columns", "z,r", "--context", "z", "-o", out), 2, "a variable cannot be context or weight too")
    said(call("fit", table, "--columns", "z", "--bounds", "z=0", "-o", out), 2, "must be NAME=LOW:HIGH")
    said(call("fit", table, "-o", tmp_path / "no" / "x"), 1, "there is no folder")
    said(call("fit", tmp_path / "no.csv", "-o", out), 1, "no.csv: No such file or directory")
    said(call("fit", tmp_path, "-o", out), 1, "Is a directory")
    said(call("log-prob", table, table), 1, "cannot be read as a flow")
    said(call("log-prob", flow, flow), 1, "neither text nor a file of a known format")
    said(call("sample", flow, "-n", "3.5"), 2, "must be a whole number")
    said(call("nothing"), 2, "invalid choice")
    bad = {
        "empty.csv": (b"", "holds no rows"),
        "ragged.csv": (b"z,u g,r\n1,2,3\n1,2\n", "2 fields in line 3, and 3 columns"),
        "wide.csv": (b"z,u g,r\n1,2,3\n1,2,3,4\n", "4 fields in line 3, and 3 columns"),
        "text.csv": (b"z,u g,r\n1,2,3\n\n1,b,3\n", "text in column 'u g', line 4"),
        "twice.csv": (b"z,r,u g,r\n1,2,3,4\n", "several columns 'r'"),
        "old.npy": (b"\x93NUMPY\1\0\x10\0{'descr': 'O'}  \n", "damaged, or no .npy file"),
        "zip.npz": (b"PK\3\4" + bytes(50), "damaged, or no .npz file"),
    }
    for name, (data, words) in bad.items():
        (tmp_path / name).write_bytes(data)
        said(call("log-prob", flow, tmp_path / name), 1, name, words)
    np.save(tmp_path / "whole.npy", rows)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-8])
    said(call("log-prob", flow, tmp_path / "cut.npy", "-o", tmp_path / "y.csv"), 1, "cut.npy is cut off")
    said(call("fit", tmp_path / "cut.npy", "-o", out), 1, "cut.npy is cut off")
    np.save(tmp_path / "objects.npy", np.array([[1, "a"]], object), allow_pickle=True)
    said(call("log-prob", flow, tmp_path / "objects.npy", "--columns", "0,0,1"), 1)
    assert not out.exists() and not (tmp_path / "y.csv").exists()
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_a_reader_that_goes_away_ends_it_quietly(flow):
    command = [sys.executable, "-m", "fastmaf", "sample", str(flow), "-n", "1e9"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout.readline() == b"z,u g,r\n"
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_loses_nothing(table, flow, tmp_path):
    before = os.stat("/dev/full").st_mode
    with open("/dev/full", "w") as full:
        for arguments in (["info"], ["sample", flow, "-n", "3"], ["sample", flow, "-n", "300000"]):
            result = fastmaf_command(*arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
            said(result, 1, "stdout: No space left on device")
    for name in ("npy", "csv"):
        said(fastmaf_command("sample", flow, "-n", "3", "-o", "/dev/full", "--to", name), 1, "/dev/full: No space left on device")
    few = ["--columns", "z,u g", "--missing", "drop", "--hidden", "4", "--seed", "1", "--epochs", "1", "--quiet"]
    result = fastmaf_command("fit", table, *few, "-o", "/dev/full", env=environment(TMPDIR=str(tmp_path)))
    said(result, 1, f"/dev/full: No space left on device; the flow is in {tmp_path}")
    assert fastmaf.load(result.stderr.split()[-1]).training["epochs"] == 1
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode) and os.stat("/dev/full").st_mode == before


def test_what_was_there_stays_if_there_is_no_room_for_all(flow, tmp_path):
    """A limit on the size of files stands for the disk."""
    out = tmp_path / "samples.npy"
    out.write_bytes(b"before")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    said(fastmaf_command("sample", flow, "-n", "1e6", "-o", out, preexec_fn=limit), 1, f"{out}: File too large")
    assert os.listdir(tmp_path) == ["samples.npy"] and out.read_bytes() == b"before"


MEASURED = """
import sys
from fastmaf.cli import main
status = main(sys.argv[1:])
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmPeak")][0])
raise SystemExit(status)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs the address space of a process from /proc")
@pytest.mark.parametrize("kind", ["c.npy", "f.npy", "csv", "sample.csv", "sample.npy"])
def test_files_larger_than_the_memory(kind, tmp_path):
    """Address space for a small file and a little more is enough for a large one, of which a part would not fit."""
    path, flow = tmp_path / "flow.safetensors", fastmaf.MAF(64, transforms=1, hidden_features=(4,), seed=0)
    if kind == "csv":
        flow = fastmaf.MAF(2, transforms=1, hidden_features=(4,), seed=0)
    flow.save(path)
    large = tmp_path / "large"
    rows = 4_000_000 if kind == "csv" else 1_200_000  # 64 MB once read; 307 MB, of which the disk holds none

    def arguments(n):
        if kind.startswith("sample"):
            return [
                "sample",
                path,
                "-n",
                n // (5 if kind.endswith("npy") else 6),
                "-o",
                large,
                "--to",
                kind.removeprefix("sample."),
                "--quiet",
            ]
        if kind == "csv":
            large.write_bytes(b"0,1\n" * n)
        else:
            np.lib.format.open_memmap(large, "w+", np.float32, (n, 64), fortran_order=kind == "f.npy")
        return ["log-prob", path, large, "-o", os.devnull, "--to", "npy", "--quiet"]

    def measured(n, **options):
        command = [sys.executable, "-c", MEASURED, *map(str, arguments(n))]
        return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120, check=False, **options)

    small = measured(30_000)
    assert small.returncode == 0, small.stderr
    room = (int(small.stdout) + (40 << 10)) << 10

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (room, room))

    found = measured(rows, preexec_fn=limit)
    assert found.returncode == 0, found.stderr


def listen():
    """In a child: take the signals that a shell in the background, or nohup, has it ignore."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def started(*arguments):
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "fastmaf", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=listen,
    )


@pytest.mark.parametrize("members", [(), ("--members", "2")])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_fit_keeps_what_was_learned(number, status, members, table, tmp_path):
    out = tmp_path / "flow.safetensors"
    endless = ("--patience", "100000", "--epochs", "100000", *members)
    process = started("fit", table, "--columns", "z,u g,r", "--missing", "drop", *endless, "-o", out)
    with process:
        lines = [process.stderr.readline(), process.stderr.readline()]
        assert lines[1].removeprefix("fastmaf: member 0, ").removeprefix("fastmaf: ").startswith("epoch 1: ")
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(60) == status
    assert rest.count(f"(interrupted): {out}") == max(1, len(members)), rest
    assert fastmaf.load(out).training["stopped"] == "interrupted" and fastmaf.load(out).training["epochs"] >= 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_interrupted_output_leaves_nothing(number, status, flow, tmp_path):
    with started("sample", flow, "-n", "1e9", "-o", tmp_path / "x.npy") as process:
        end = time.monotonic() + 60
        while not os.listdir(tmp_path) and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.stderr.read() == "fastmaf: interrupted\n"
        assert process.wait(60) == status
    assert os.listdir(tmp_path) == []


# Text that is broken


def _fields(count, line="1.0,0.5,note"):
    return ["z,r,note", *[line] * count]


@pytest.mark.parametrize("arrow", [True, False])
@pytest.mark.parametrize(
    ("rows", "at", "line"),
    [(500, 400, '1.0,0.5,"open'), (500, 1, '"1.0,0.5,open'), (60_000, 50_000, '1.0,0.5,"open'), (500, 500, '1.0,0.5,"open')],
)
def test_a_quote_that_is_never_closed_is_an_error_with_its_line(rows, at, line, arrow, monkeypatch, tmp_path):
    from fastmaf.data import _text

    if not arrow:
        monkeypatch.setattr(_text, "_arrow", lambda *_: None)
    lines = _fields(rows)
    lines[at] = line
    (tmp_path / "x.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=f"x.csv has a quote in line {at + 1} that is never closed"):
        fastmaf.data.read(tmp_path / "x.csv", ["z", "r"])


@pytest.mark.parametrize("tail", ['1.0,0.5,"closed"', '"1.0",0.5,note', '1.0,0.5,"x, ""y"""'])
def test_a_quote_that_another_lines_later_closes_is_an_error(tail, monkeypatch, tmp_path):
    from fastmaf.data import _text

    lines = [*_fields(300, '1.0,0.5,"two\nlines"'), '1.0,0.5,"open', *_fields(20)[1:], *[tail] * 20]
    (tmp_path / "x.csv").write_text("\n".join(lines) + "\n")
    for block in (50, 1 << 20):
        monkeypatch.setattr(_text, "BLOCK", block)
        with pytest.raises(ValueError, match="x.csv has a quote in line 602 that is never closed"):
            fastmaf.data.read(tmp_path / "x.csv", ["z", "r"])


def test_an_open_quote_does_not_fill_the_memory(monkeypatch):
    import io

    from fastmaf.data import _text

    monkeypatch.setattr(_text, "BLOCK", 100)
    monkeypatch.setattr(_text, "LONGEST", 1000)
    file = io.BytesIO(b'1,2\n1,"2\n' + b"1,2\n" * 10_000)
    with pytest.raises(ValueError, match="a quote in line 2 that is never closed"):
        list(_text.blocks(file, b"", 0))
    assert file.tell() < 1500


@pytest.mark.parametrize("rows_in_a_block", [1, 7, 1000])
def test_quotes_inside_fields_are_characters(rows_in_a_block, monkeypatch, tmp_path):
    from fastmaf.data import _text

    monkeypatch.setattr(_text, "BLOCK", rows_in_a_block * 20)
    notes = ['5" pipe', '"a"b', '"a ""b"""', '""', '"two\n""lines"', '3" and 5"', '"a" ', "plain"] * 30
    (tmp_path / "x.csv").write_text("z,note,r\n" + "".join(f"{k},{note},1\n" for k, note in enumerate(notes)))
    for quick in (True, False):
        if not quick:
            monkeypatch.setattr(_text, "_arrow", lambda *_: None)
        x, _ = fastmaf.data.read(tmp_path / "x.csv", ["z", "r"])
        assert np.array_equal(x, np.column_stack([np.arange(240), np.ones(240)]))


def test_headers_with_open_quotes_are_refused(tmp_path):
    (tmp_path / "x.csv").write_text('# made\n"z,r\n1,2\n')
    with pytest.raises(ValueError, match="x.csv has a quote in line 2 that is never closed"):
        fastmaf.data.read(tmp_path / "x.csv")


def _packed(kind):
    import bz2
    import gzip
    import lzma

    return {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_packed_files_that_are_cut_off_end_in_a_line(kind, call, flow, tmp_path):
    rng = np.random.default_rng(0)
    text = "z,u g,r\n" + "".join(f"{z!r},{u!r},{r!r}\n" for z, u, r in rng.random((60_000, 3)).tolist())
    data, path = _packed(kind)(text.encode()), tmp_path / f"x.csv.{kind}"
    path.write_bytes(data[: len(data) // 2])
    result = call("log-prob", flow, path, "-o", tmp_path / "y.csv")
    said(result, 1, f"x.csv.{kind} is cut off")
    if kind != "bz2":
        lines = int(re.search(r"behind line (\d+)", result.stderr)[1])
        assert 10_000 < lines < 50_000
    path.write_bytes(data[:100])
    said(call("log-prob", flow, path), 1, f"x.csv.{kind} is cut off")
    path.write_bytes(data[:-8] + b"damaged.")
    said(call("log-prob", flow, path), 1, f"x.csv.{kind} is damaged")
    assert not (tmp_path / "y.csv").exists()


def test_lines_of_old_macs(call, flow, rows, tmp_path):
    text = "z,u g,r\r" + "".join(",".join(map(repr, row)) + "\r" for row in rows.tolist())
    (tmp_path / "x.csv").write_bytes(text.encode())
    x, names = fastmaf.data.read(tmp_path / "x.csv")
    assert np.array_equal(x, rows) and names == NAMES
    (tmp_path / "x.csv").write_bytes(b"z,u g\rx,r\n1,2,3\n")
    said(call("log-prob", flow, tmp_path / "x.csv"), 1, "x.csv has no columns in line 1")


def test_delimiters(call, flow, rows, tmp_path):
    (tmp_path / "x.txt").write_text("z\tu g\tr\n" + "".join("\t".join(map(repr, row)) + "\n" for row in rows.tolist()))
    for mark in ("tab", "\\t", "\t"):
        assert call("log-prob", flow, tmp_path / "x.txt", "--delimiter", mark, "--mean").returncode == 0
    for mark in ("xx", "", "\u00a7", '"'):
        said(call("log-prob", flow, tmp_path / "x.txt", "--delimiter", mark), 2, "must be one ASCII character, tab or space")
        with pytest.raises(ValueError, match="delimiter is .*; it must be one ASCII character"):
            fastmaf.data.open_table(tmp_path / "x.txt", delimiter=mark)


# Streams that are closed, full, or that nobody reads


def shell(words, *arguments, **options):
    """Run the command with the redirections of a shell: `fastmaf` stands for it in the words, and "$@" for the arguments."""
    script = words.replace("fastmaf", f"'{sys.executable}' -m fastmaf")
    given = {"capture_output": True, "text": True, "timeout": 120, "check": False, "env": environment(), **options}
    return subprocess.run(["bash", "-c", f"set -o pipefail; {script}", "bash", *map(str, arguments)], **given)


LITTLE = ["--columns", "z,u g", "--missing", "drop", "--hidden", "4", "--transforms", "1", "--epochs", "3", "--seed", "1"]


@pytest.mark.parametrize("words", ["2>&-", "2>/dev/full", "2>&1 | head -n 1", ">&-", ">&- 2>&- <&-"])
def test_a_fit_does_not_depend_on_who_listens(words, table, tmp_path):
    out = tmp_path / "flow.safetensors"
    result = shell(f'fastmaf fit "$@" {words}', table, "-o", out, *LITTLE)
    assert result.returncode == 0, result.stderr
    assert fastmaf.load(out).training["epochs"] == 3
    assert (result.stdout == "") == ("head" not in words)


def test_closed_streams_get_nothing_that_is_meant_for_others(flow, table, tmp_path):
    result = shell('fastmaf sample "$@" 2>&-', flow, "-n", "5", "--seed", "1")
    assert result.returncode == 0 and result.stdout.count("\n") == 6 and result.stderr == ""
    out = tmp_path / "out"
    result = shell(f'fastmaf log-prob "$@" > {out} 2>&-', flow, tmp_path / "no.csv")
    assert (result.returncode, out.read_text(), result.stderr) == (1, "", "")
    result = shell('fastmaf sample "$@" -n x >&- 2>&-', flow)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "")


def test_closed_streams_that_are_needed_are_an_error(flow, table, tmp_path):
    said(shell('fastmaf sample "$@" -n 3 >&-', flow), 1, "stdout is closed")
    said(shell("fastmaf info >&-"), 1, "stdout: Bad file descriptor")
    said(shell('fastmaf log-prob "$@" - <&-', flow), 1, "stdin is closed")
    said(shell("fastmaf info - <&-"), 1, "stdin is closed")
    said(shell('fastmaf fit "$@" -o - >&-', table, *LITTLE), 1, "stdout is closed")
    assert shell('fastmaf info "$@" <&-', flow).returncode == 0
    result = shell('fastmaf log-prob "$@" --missing keep >&-', flow, table, "-o", tmp_path / "y.csv")
    assert result.returncode == 0 and (tmp_path / "y.csv").read_text().count("\n") == 601
    for option in ("--help", "--version"):
        if os.path.exists("/dev/full"):
            said(shell(f"fastmaf {option} >/dev/full"), 1, "stdout: No space left on device")


@pytest.mark.parametrize(("words", "status", "error"), [(">/dev/full", 1, "No space left on device"), ("| true", 141, "Broken pipe")])
def test_a_flow_for_stdout_is_not_lost(words, status, error, table, tmp_path):
    result = shell(f'fastmaf fit "$@" -o - --quiet {words}', table, *LITTLE, env=environment(TMPDIR=str(tmp_path)))
    said(result, status, f"stdout: {error}; the flow is in {tmp_path}")
    assert fastmaf.load(result.stderr.split()[-1]).training["epochs"] == 3


def test_a_checkpoint_without_room_does_not_lose_the_fit(call, table, tmp_path, monkeypatch):
    from fastmaf import _files

    write, out, checkpoint, room = _files.write, tmp_path / "flow.safetensors", tmp_path / "state.safetensors", 2

    def full(path, data, name="path"):
        nonlocal room
        if path == str(checkpoint):
            room -= 1
            if room < 0:
                raise OSError(28, "No space left on device", path)
        write(path, data, name)

    monkeypatch.setattr(_files, "write", full)
    result = call("fit", table, *LITTLE, "-o", out, "--checkpoint", checkpoint, "--quiet")
    said(result, 1, f"{checkpoint}: No space left on device; the best weights so far are in {out}")
    assert fastmaf.load(out).training["epochs"] == 2
    os.remove(out)
    monkeypatch.setattr(os, "access", lambda path, mode: os.path.basename(path) != "locked")
    (tmp_path / "locked").mkdir()
    locked = tmp_path / "locked" / "state.safetensors"
    said(call("fit", table, *LITTLE, "-o", out, "--checkpoint", locked), 1, f"{locked}: Permission denied")
    said(call("fit", table, *LITTLE, "-o", out, "--checkpoint", tmp_path / "no" / "x"), 1, "there is no folder")
    assert not out.exists()


def test_hangups_that_are_ignored_stay_so_and_only_the_first_counts(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cli._ended_as_interrupted() as ended:
            os.kill(os.getpid(), signal.SIGHUP)
        assert ended == [] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with cli._ended_as_interrupted() as ended:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
        assert ended == [signal.SIGHUP] * 2 and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


# What a user would want to know


def test_the_mean_of_one_row_has_no_error_and_rows_left_out_are_counted(call, flow, table, tmp_path):
    (tmp_path / "one.csv").write_text("z,u g,r\n1,0,0\n")
    result = call("log-prob", flow, tmp_path / "one.csv", "--mean")
    assert re.fullmatch(r"-?\d+\.\d{6} ± nan nats per row, 1 row\n", result.stdout) and result.stderr == ""
    (tmp_path / "two.csv").write_text("z,u g,r\n1,0,0\n2,0,0\n,0,0\n")
    result = call("log-prob", flow, tmp_path / "two.csv", "--mean", "--missing", "drop")
    assert result.stdout.endswith("nats per row, 2 rows\n") and " ± 0." in result.stdout
    assert result.stderr == "fastmaf: 1 of 3 rows has missing values and is left out\n"
    assert call("log-prob", flow, table, "--mean", "--missing", "drop").stderr.startswith("fastmaf: 2 of 600 rows have missing values")


def test_rows_outside_the_bounds_are_counted(call, flow, tmp_path):
    (tmp_path / "x.csv").write_text("z,u g,r\n" + "-1,0,0\n" * 3 + "1,0,0\n")
    result = call("log-prob", flow, tmp_path / "x.csv")
    assert result.stdout.count("-inf") == 3
    said(result, 0, "3 of 4 rows cannot come from the flow (log_prob is -inf): outside its bounds")
    said(call("log-prob", flow, tmp_path / "x.csv", "--mean"), 0, "3 of 4 rows")
    assert call("log-prob", flow, tmp_path / "x.csv", "--quiet").stderr == ""


def test_what_is_read_is_not_written_over(call, flow, table, tmp_path):
    data, own = tmp_path / "same.csv", tmp_path / "flow.safetensors"
    data.write_bytes(table.read_bytes())
    own.write_bytes(flow.read_bytes())
    (tmp_path / "other.csv").symlink_to(data)
    np.savetxt(tmp_path / "run_1.txt", np.ones((3, 5)), header="weight minuslogpost z r q")
    commands = [
        ("log-prob", own, data, "--missing", "drop", "-o", tmp_path / "other.csv"),
        ("log-prob", own, data, "--to", "csv", "-o", own),
        ("sample", own, "-n", "1", "--to", "csv", "-o", own),
        ("fit", data, *LITTLE, "-o", data),
        ("fit", table, *LITTLE, "--validation", data, "-o", data),
        ("fit", tmp_path / "run", "-o", tmp_path / "run_1.txt"),
        ("convert", data, "--from", "zuko", "--activation", "relu", "-o", data),
        ("export", own, "--c", own),
    ]
    for command in commands:
        said(call(*command), 2, "is read, and would be written over: name another file, -o")
    assert data.read_bytes() == table.read_bytes() and own.read_bytes() == flow.read_bytes()
    assert call("fit", table, "--start", own, "--missing", "drop", "--epochs", "1", "--quiet", "-o", own).returncode in (0, 3)


def test_a_fit_that_learned_nothing_has_a_status_of_its_own(call, table, tmp_path):
    out = tmp_path / "flow.safetensors"
    result = call("fit", table, *LITTLE, "--lr", "1e10", "--seed", "1", "-o", out, "--quiet")
    said(result, 3, "warning: ", "the weights are those of the start")
    assert fastmaf.load(out).training["best_epoch"] == 0


def test_columns_of_other_names_or_in_another_order_are_told(call, flow, conditional, table, tmp_path):
    few = ["--missing", "drop", "--mean", "--quiet"]
    said(
        call("log-prob", flow, table, "--columns", "r,z,w", *few),
        0,
        "warning: --columns: r, z, w are taken for z, u g, r of the flow, in this",
    )
    assert call("log-prob", flow, table, "--columns", "z,u g,r", *few).stderr == ""
    told = "warning: --context: r, u g are taken for u g, r of the flow, in this order"
    said(call("log-prob", conditional, table, "--context", "r,u g", *few), 0, told)
    sample = ["-n", "1", "--contexts", table, "--missing", "drop", "--quiet"]
    said(call("sample", conditional, *sample, "--context", "r,u g"), 0, told)
    assert call("sample", conditional, *sample).stderr == ""
    again = ["--start", flow, "--missing", "drop", "--epochs", "1", "--quiet", "-o", tmp_path / "f"]
    result = call("fit", table, "--columns", "z,r,w", *again)
    assert "fastmaf: warning: --columns: z, r, w are taken for z, u g, r of the flow, in this order\n" in result.stderr


def test_a_picture_of_a_weighted_fit_asks_for_weights(call, table, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    out, picture = tmp_path / "flow.safetensors", tmp_path / "x.png"
    assert call("fit", table, *LITTLE, "--weights", "w", "-o", out).returncode == 0
    plot = ["plot", out, table, "--missing", "drop", "--quiet", "--rows", "50", "-o", picture]
    said(call(*plot), 0, "warning: the flow was fitted to weighted rows", "--weights w pictures them so")
    assert call(*plot, "--weights", "w").stderr == ""


@pytest.mark.parametrize("how", ["module", "script"])
def test_an_interrupted_import_is_quiet(how, tmp_path):
    (tmp_path / "numpy.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    (tmp_path / "fastmaf").write_text("from fastmaf.cli import main\nraise SystemExit(main())\n")
    command = [sys.executable, *(["-m", "fastmaf"] if how == "module" else [tmp_path / "fastmaf"]), "info"]
    apart = environment(PYTHONPATH=os.pathsep.join([str(tmp_path), HOME]))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=apart, preexec_fn=listen) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "" and process.wait(60) == -signal.SIGINT


def test_importing_the_package_leaves_signals_alone():
    code = "import signal, fastmaf; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("fit x -o y --activation foo", "--activation: invalid choice: 'foo'"),
        ("fit x -o y --schedule foo", "--schedule: invalid choice"),
        ("fit x -o y --order foo", "--order: invalid choice"),
        ("fit x -o y --dtype float16", "--dtype: invalid choice"),
        ("fit x -o y --hidden 0", "--hidden: '0' must be at least 1"),
        ("fit x -o y --transforms 0", "--transforms: '0' must be at least 1"),
        ("fit x -o y --components 0", "--components: '0' must be at least 1"),
        ("fit x -o y --epochs 0", "--epochs: '0' must be at least 1"),
        ("fit x -o y --validation 1", "--validation: '1' must be at least 0 and below 1"),
        ("fit x -o y --lr -1", "--lr: '-1' must be a positive number"),
        ("fit x -o y --lr nan", "--lr: 'nan' must be a positive number"),
        ("fit x -o y --l2 -1", "--l2: '-1' must be a number that is not negative"),
        ("fit x -o y --threads 0", "--threads: '0' must be at least 1"),
        ("fit x -o y --seed 1e30", "--seed: '1e30' must be below 2^64"),
        ("fit x -o y --burn-in 1", "--burn-in: '1' must be at least 0 and below 1"),
        ("fit x -o y --checkpoint -", "--checkpoint must be a file"),
        ("log-prob x y --device foo", "--device: 'foo' must be cpu, cuda"),
        ("sample x -n -3", "-n: '-3' must be at least 0"),
        ("bench x --rows 0", "--rows: '0' must be at least 1"),
    ],
)
def test_options_that_are_not_right(call, command, words):
    said(call(*command.split()), 2, words)


def test_seeds_go_up_to_their_end(call, flow):
    result = call("sample", flow, "-n", "1", "--seed", str(2**64 - 1))
    assert result.returncode == 0 and result.stdout.count("\n") == 2
    said(call("sample", flow, "-n", "1", "--seed", str(2**64)), 2, "must be below 2^64")


def test_numpy_files_that_are_cut_off_say_where(call, flow, rows, tmp_path):
    for name, array in (("c.npy", rows), ("f.npy", np.asfortranarray(rows))):
        np.save(tmp_path / name, array)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) - 8 * 100])
        row = (600 * 3 - 100) // 3 if name == "c.npy" else 500
        said(call("log-prob", flow, tmp_path / name), 1, f"{name} is cut off, behind row {row} of 600")
    for size in (7, 9, 30, 100):
        (tmp_path / "x.npy").write_bytes(data[:size])
        said(call("log-prob", flow, tmp_path / "x.npy"), 1, "x.npy is damaged, or no .npy file (its header is cut off)")


def test_nothing_is_printed_before_the_first_rows_are_read(call, flow, conditional, tmp_path):
    (tmp_path / "x.csv").write_text("z,u g,r\n1,,0\n")
    for command in (["log-prob", flow, tmp_path / "x.csv"], ["sample", conditional, "-n", "1", "--contexts", tmp_path / "x.csv"]):
        result = call(*command)
        assert result.stdout == ""
        said(result, 1, "missing values in 1 of 1 row (column 'u g')")
    assert call("sample", flow, "-n", "0").stdout == "z,u g,r\n"


def test_numbers_of_fortran(tmp_path):
    (tmp_path / "x.txt").write_text("  1.0D+00  -.5d-3\n  2.5D0  1.E1\n")
    x, names = fastmaf.data.read(tmp_path / "x.txt")
    assert x.tolist() == [[1.0, -0.5e-3], [2.5, 10.0]] and names == ("0", "1")
    (tmp_path / "x.txt").write_text("a\n1d5\n")  # is no number of Fortran
    with pytest.raises(ValueError, match="text in column 'a', line 2"):
        fastmaf.data.read(tmp_path / "x.txt")


def test_convert_looks_for_the_file_first(call, tmp_path):
    said(call("convert", tmp_path / "no.pt", "--from", "zuko", "-o", tmp_path / "f"), 1, "no.pt: No such file or directory")


# The rest


def test_warnings_are_lines(tmp_path):
    x = np.random.default_rng(0).normal(size=(400, 2)).astype(np.float32)
    x[:, 1] += 1e7  # float32 cannot resolve it
    np.save(tmp_path / "x.npy", x)
    result = fastmaf_command("fit", tmp_path / "x.npy", "--hidden", "4", "--seed", "1", "--epochs", "1", "-o", tmp_path / "flow")
    assert result.returncode == 0
    assert [line for line in result.stderr.splitlines() if line.startswith("fastmaf: warning: ")]
    assert "site-packages" not in result.stderr and "Warning" not in result.stderr


def test_a_flow_goes_through_a_pipe(table, flow):
    few = ["--columns", "z,u g,r", "--missing", "drop", "--hidden", "4", "--seed", "1", "--epochs", "1", "--quiet"]
    made = fastmaf_command("fit", "-", "-o", "-", *few, input=table.read_bytes(), text=False)
    assert made.returncode == 0, made.stderr
    shown = fastmaf_command("info", "-", input=made.stdout, text=False).stdout.decode()
    assert "z, u g, r" in shown
    result = fastmaf_command("log-prob", "-", "-", input=made.stdout, text=False)
    assert result.returncode == 2 and b"cannot both come from stdin" in result.stderr


def test_bench(flow):
    lines = fastmaf_command("bench", flow, "--rows", "50", "--threads", "2").stdout.splitlines()
    assert "50 rows in a call, 72 multiply-adds in a row" in lines[1]  # two MADEs: 4 + 8 into the units, 2 (4 + 8) out of them
    if fastmaf.get_backend() == "cpu":
        assert [line.split()[0] for line in lines[-3:]] == ["threads", "1", "2"] and len(lines[-1].split()) == 6


def test_convert(call, tmp_path):
    weights = {"order": np.array([0, 1]), "hyper.0.mask": np.array([[True, False]]), "hyper.2.mask": np.array([[0], [0], [1], [1]], bool)}
    weights |= {
        "hyper.0.weight": np.ones((1, 2)),
        "hyper.0.bias": np.zeros(1),
        "hyper.2.weight": np.ones((4, 1)),
        "hyper.2.bias": np.zeros(4),
    }
    state = {f"transform.transforms.0.{key}": value for key, value in weights.items()}
    numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    numpy.save_file(state, tmp_path / "weights.safetensors")
    out = tmp_path / "flow.safetensors"
    command = ["convert", tmp_path / "weights.safetensors", "--from"]
    result = call(*command, "zuko", "--activation", "tanh", "--slope", "1e-4", "-o", out)
    assert result.returncode == 0, result.stderr
    truth = fastmaf.from_zuko(state_dict=state, activation="tanh", slope=1e-4)
    x = np.array([[0.5, -1.0]])
    assert np.array_equal(fastmaf.load(out).log_prob(x), truth.log_prob(x))
    said(call(*command, "zuko", "-o", out), 1, "does not say the activation of its networks; name it, --activation relu for instance")
    said(call(*command, "nflows", "--activation", "relu", "-o", out), 1, "state_dict has no keys")
    (tmp_path / "model.pt").write_bytes(b"\x80\x02cos\nsystem\n(S'touch " + str(tmp_path).encode() + b"/run'\ntR.")
    refused = call("convert", tmp_path / "model.pt", "--from", "zuko", "--activation", "relu", "-o", out)
    assert refused.returncode == 1 and not (tmp_path / "run").exists()
    assert "needs torch" in refused.stderr or "fastmaf.from_zuko(torch.load(" in refused.stderr


def test_help_has_examples(call):
    commands = ("fit", "log-prob", "sample", "info", "plot", "convert", "bench", "export")
    for command in commands:
        result = call(command, "--help")
        assert result.returncode == 0 and "examples:\n  fastmaf " in result.stdout, command
    parser = cli._parser()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = parser.format_help()
    assert all(f"    {command} " in text for command in commands)


def test_reading_in_python(table, rows):
    x, names = fastmaf.data.read(table, ["r", "z"], missing="keep")
    assert names == ("r", "z") and np.array_equal(np.isnan(x), np.arange(1200).reshape(600, 2) == 14)
    assert np.array_equal(np.delete(x, 7, 0), np.delete(rows, 7, 0)[:, [2, 0]])
    with pytest.raises(ValueError, match=r"missing values in 1 of 600 rows \(column 'r'\); missing=\"drop\" leaves them out"):
        fastmaf.data.read(table, ["r"])
    with pytest.raises(ValueError, match="missing is 'no'"):
        fastmaf.data.read(table, ["r"], missing="no")
    with pytest.raises(ValueError, match="burn_in is 1"):
        fastmaf.data.open_table(table, burn_in=1)
    with pytest.raises(ValueError, match="no chain"):
        fastmaf.data.open_table(table, burn_in=0.5)
    with pytest.raises(ValueError, match="column 'z' is named twice"):
        fastmaf.data.read(table, ["z", "z"])


def test_the_page_runs(call, tmp_path, monkeypatch):
    """Its commands in order, with little data and one epoch, and its Python."""
    path = pathlib.Path(__file__).parents[1] / "docs" / "command-line.md"
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    shells = "".join(block for language, block in blocks if not language)
    commands = [line for line in shells.splitlines() if line.startswith("fastmaf ")]
    assert len(commands) == 8
    monkeypatch.chdir(tmp_path)
    x, names = fastmaf.data.galaxies()
    np.savetxt("galaxies.csv", x[:500], delimiter=",", header=",".join(names), comments="")
    absent = {word: importlib.util.find_spec(name) is None for word, name in ((" plot ", "matplotlib"), (".parquet", "pyarrow"))}
    for command in commands:
        if not any(missing and word in command for word, missing in absent.items()):
            words = command.replace("1e6", "1e3").replace("-n 100 ", "-n 2 ").split()[1:]
            result = call(*words, *["--epochs", "1", "--hidden", "8", "--seed", "1"] * (words[0] == "fit"))
            assert result.returncode == 0, (command, result.stderr)
    for code in (block for language, block in blocks if language == "python"):
        exec(compile(code, path, "exec"), {})
