"""Data frames: columns by name, what converts, and what is refused by the name of its column."""

from __future__ import annotations

import decimal
import importlib
import sys
import types

import make
import numpy as np
import pytest

import fastmaf
from fastmaf import _tables, plot
from fastmaf.train import FitWarning

NAMES = ["z", "m", "r"]


class Series:
    """A column as polars has it."""

    def __init__(self, values, missing=0):
        self.values, self.missing = np.asarray(values), missing
        self.dtype = f"Polars{self.values.dtype}"

    def null_count(self):
        return self.missing

    def to_numpy(self):
        return self.values


class Frame:
    """A data frame as polars has it: columns are text, `schema` is there, columns go by place through `to_series`."""

    schema = None

    def __init__(self, data):
        self.data = {name: column if isinstance(column, Series) else Series(column) for name, column in data.items()}

    @property
    def columns(self):
        return list(self.data)

    @property
    def shape(self):
        return len(self), len(self.data)

    def __len__(self):
        return len(next(iter(self.data.values())).values)

    def to_series(self, place):
        return list(self.data.values())[place]


class ArrowTable:
    """A table as pyarrow has it: `column_names`, while `columns` are the columns themselves."""

    schema = None

    class Column:
        def __init__(self, values, missing):
            self.values, self.null_count, self.type = np.asarray(values), missing, f"arrow {np.asarray(values).dtype}"

        def __array__(self, dtype=None, copy=None):
            return self.values

        def to_numpy(self):
            if self.values.dtype == bool:
                raise RuntimeError("Zero copy conversions not possible with boolean types")
            return self.values

    def __init__(self, data, missing=0):
        self.names, self.columns = list(data), [self.Column(values, missing) for values in data.values()]

    @property
    def column_names(self):
        return self.names

    def __len__(self):
        return len(self.columns[0].values)

    def column(self, place):
        return self.columns[place]


def frame(kind, data):
    if kind == "pandas":
        return pytest.importorskip("pandas").DataFrame(data)
    return {"polars": Frame, "arrow": ArrowTable}[kind](data)


@pytest.fixture(params=["polars", "arrow", "pandas"])
def kind(request):
    return request.param


def data(n=60):
    rng = np.random.default_rng(0)
    return {"z": rng.normal(10, 1, n), "m": rng.normal(-300, 50, n), "r": rng.normal(0, 0.1, n)}


def permuted(columns):
    return {name: columns[name] for name in ("r", "z", "m")}


def named(**options):
    return fastmaf.MAF(3, names=NAMES, transforms=2, hidden_features=(8,), seed=1, dtype="float64", **options)


def test_columns_go_by_name(kind):
    columns, flow = data(), named()
    x = np.column_stack(list(columns.values()))
    for own in (columns, permuted(columns), {"other": np.zeros(60), **permuted(columns)}):
        table = frame(kind, own)
        np.testing.assert_array_equal(flow.log_prob(table), flow.log_prob(x))
        np.testing.assert_array_equal(flow.to_noise(table), flow.to_noise(x))
        np.testing.assert_array_equal(flow.from_noise(table), flow.from_noise(x))
        np.testing.assert_array_equal(flow.log_prob_and_grad(table)[1], flow.log_prob_and_grad(x)[1])
        np.testing.assert_array_equal(flow.vjp(table, None, np.ones(60))[0], flow.vjp(x, None, np.ones(60))[0])
    made = fastmaf.MADE(3, masks=2, hidden_features=(4,), names=NAMES)
    np.testing.assert_array_equal(made.log_prob(frame(kind, permuted(columns))), made.log_prob(x))


def test_missing_names_are_refused_by_name(kind):
    columns = data()
    table = frame(kind, {"z": columns["z"], "q": columns["m"], "p": columns["r"]})
    for call in (named().log_prob, named().fit, named().log_prob_and_grad):
        with pytest.raises(ValueError, match="x lacks columns 'm', 'r', by which the flow names its variables"):
            call(table)
    with pytest.raises(ValueError, match="validation x lacks column"):
        named().fit(frame(kind, columns), validation=(table,))


def test_numbers_and_booleans_convert(kind):
    columns = {"z": np.arange(6) % 2 == 0, "m": np.arange(6, dtype="i4"), "r": np.arange(6, dtype="f4")}
    x = np.column_stack([column.astype(float) for column in columns.values()])
    np.testing.assert_array_equal(named().log_prob(frame(kind, columns)), named().log_prob(x))


def test_columns_that_hold_no_numbers_are_named_all_at_once(kind):
    columns = {"z": np.array(["a", "b"], object), "m": np.zeros(2), "r": np.array(["2020-01-01"] * 2, "M8[s]")}
    with pytest.raises(ValueError, match=r"x must hold real numbers; it has columns 'z' \(.*\), 'r' \(.*\)") as error:
        named().log_prob(frame(kind, columns))
    assert len(str(error.value)) <= 200


def test_missing_values_are_refused_and_the_column_named():
    table = Frame({"z": Series([1.0, np.nan], 1), "m": [1.0, 2.0], "r": Series([1, 2], 2)})
    with pytest.raises(ValueError, match="x has missing values in columns 'z', 'r'; fill or drop them first"):
        named().log_prob(table)
    with pytest.raises(ValueError, match="x has missing values in columns 'z', 'm', 'r'"):
        named().log_prob(ArrowTable({"z": [1], "m": [1], "r": [2]}, 1))
    assert np.isnan(named().log_prob(Frame({"z": [np.nan], "m": [1.0], "r": [1.0]}))).all()  # NaN is a number, as in an array


def test_nullable_columns_of_pandas():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(data()).assign(m=lambda d: d.m.round().astype("Int64"), r=lambda d: (d.r > 0).astype("boolean"))
    x = np.column_stack([table[name].astype(float) for name in NAMES])
    np.testing.assert_allclose(named().log_prob(table), named().log_prob(x))
    table.loc[3, "m"] = pandas.NA
    with pytest.raises(ValueError, match="x has missing values in column 'm'"):
        named().log_prob(table)
    with pytest.raises(ValueError, match=r"it has column 'm' \(category\)"):
        named().log_prob(table.assign(m=table.m.fillna(0).astype("category")))
    with pytest.raises(ValueError, match="weights has missing values"):
        named().fit(x, weights=table.m)
    table = pandas.DataFrame(np.zeros((4, 4)), columns=["z", "m", "r", "m"])
    with pytest.raises(ValueError, match="x has several of column 'm'"):
        named().log_prob(table)
    with pytest.raises(ValueError, match="x lacks columns 'z', 'm', 'r'"):
        named().log_prob(pandas.DataFrame(np.zeros((4, 3))))


def test_fit_takes_over_the_names_of_the_first_frame(kind):
    columns = data(200)
    flow = fastmaf.MAF(3, transforms=1, hidden_features=(4,), seed=1)
    flow.fit(frame(kind, columns), max_epochs=1, progress=False, seed=1)
    assert flow.names == tuple(NAMES)
    np.testing.assert_array_equal(flow.log_prob(frame(kind, permuted(columns))), flow.log_prob(frame(kind, columns)))
    other = fastmaf.MAF(3, transforms=1, hidden_features=(4,), seed=1)
    other.fit(np.column_stack(list(columns.values())), max_epochs=1, progress=False, seed=1)
    assert other.names is None
    np.testing.assert_array_equal(flow.parameters(), other.parameters())
    flow.fit(frame(kind, permuted(columns)), max_epochs=1, progress=False, seed=1)
    assert flow.names == tuple(NAMES)
    made = fastmaf.MADE(3, masks=2, hidden_features=(4,))
    made.fit(frame(kind, columns), max_epochs=1, progress=False, validation=(frame(kind, permuted(columns)),))
    assert made.names == tuple(NAMES)


def test_a_refused_fit_leaves_the_flow_without_names(kind):
    flow = fastmaf.MAF(3, transforms=1, hidden_features=(4,))
    record = flow.record
    bad = data(200) | {"m": np.full(200, np.inf)}
    with pytest.raises(ValueError, match="x has inf in row 0, column 'm'; it must be finite"):
        flow.fit(frame(kind, bad), progress=False)
    assert flow.record is record and flow.names is None
    with pytest.raises(ValueError, match="the flow has 3 features"):
        flow.fit(frame(kind, {"a": np.zeros(9), "b": np.zeros(9)}), progress=False)


def test_all_columns_that_fit_refuses_are_named():
    x = np.random.default_rng(0).normal(size=(50, 3))
    x[7:9, 1:] = [[np.nan, 0], [0, np.inf]]
    with pytest.raises(ValueError, match=r"x has nan in row 7, column 'm'; it must be finite \(column 'r' too\)"):
        named().fit(x)
    x = np.random.default_rng(0).normal(size=(50, 3)) * [0, 1, 0]
    with pytest.raises(ValueError, match="x is constant in columns 'z', 'r'"):
        named().fit(x)


def test_a_flow_without_names_takes_columns_from_left_to_right(kind):
    columns, flow = data(), fastmaf.MAF(3, transforms=1, hidden_features=(4,))
    np.testing.assert_array_equal(flow.log_prob(frame(kind, columns)), flow.log_prob(np.column_stack(list(columns.values()))))


LABELS = {"integers": [2, 0, 1], "several levels": [("z", 1), ("m", 1), ("r", 2)]}


class Labelled(Frame):
    """A data frame with labels that need not be text, as pandas has it."""


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_labels_that_are_no_names(labels):
    columns = list(data(200).values())
    table = Labelled(dict(zip(labels, columns, strict=True)))
    with pytest.raises(ValueError, match=r"x lacks columns 'z', 'm', 'r', .* its labels are not text: rename them, or pass x.to_numpy\(\)"):
        named().log_prob(table)
    options = {"max_epochs": 1, "progress": False, "seed": 1}
    for flow in (fastmaf.MAF(3, transforms=1, hidden_features=(4,)), fastmaf.MADE(3, masks=2, hidden_features=(4,))):
        with pytest.warns(FitWarning, match="x has column labels that cannot be names") as notes:
            flow.fit(table, **options)
        assert flow.names is None and all(len(str(note.message)) <= 200 and note.filename == __file__ for note in notes)
    fastmaf.MAF(3, transforms=1, hidden_features=(4,)).fit(Labelled(dict(enumerate(columns))), **options)  # counted, not labelled
    with pytest.raises(ValueError, match="its labels are not text"):
        named().fit(Labelled(dict(enumerate(columns))), **options)


class Chain(Labelled):
    """A data frame of weighted rows, as anesthetic has it."""

    drop_labels = None

    def isweighted(self):
        return True

    def get_weights(self):
        return np.ones(len(self))


def check_chain(chain, x):
    flow, options = fastmaf.MAF(3, transforms=1, hidden_features=(4,), seed=0), {"max_epochs": 1, "progress": False, "seed": 1}
    with pytest.warns(FitWarning, match=r"x has weights of its own, .*: weights=x.get_weights\(\), or np.ones\(len\(x\)\)") as notes:
        flow.fit(chain, **options)
    assert len(notes) == 1 and notes[0].filename == __file__
    assert flow.names == tuple(NAMES)
    flow.fit(chain, weights=chain.get_weights(), **options)  # and says nothing
    np.testing.assert_array_equal(flow.log_prob(chain), flow.log_prob(x))
    moved = fastmaf.MAF(2, transforms=1, hidden_features=(4,), seed=0, names=["r", "z"])
    np.testing.assert_array_equal(moved.log_prob(chain), moved.log_prob(x[:, [2, 0]]))


@pytest.mark.parametrize("labels", [False, True])
def test_chains(labels):
    columns = data(300)
    chain = Chain({(name, f"${name}$") if labels else name: column for name, column in columns.items()})
    check_chain(chain, np.column_stack(list(columns.values())))


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
def test_chains_of_anesthetic(labels):
    anesthetic = pytest.importorskip("anesthetic")
    x = np.column_stack(list(data(300).values()))
    weights = np.random.default_rng(1).uniform(size=300)
    shown = {"labels": [f"${name}$" for name in NAMES]} if labels else {}
    check_chain(anesthetic.MCMCSamples(data=x, columns=NAMES, weights=weights, **shown), x)


def test_labels_of_pandas():
    pandas = pytest.importorskip("pandas")
    x = np.random.default_rng(0).normal(size=(200, 3))
    flow = fastmaf.MAF(3, transforms=1, hidden_features=(4,))
    for columns in (pandas.MultiIndex.from_tuples(LABELS["several levels"]), LABELS["integers"]):
        with pytest.warns(FitWarning, match="x has column labels that cannot be names"):
            flow.fit(pandas.DataFrame(x, columns=columns), max_epochs=1, progress=False)
    flow.fit(pandas.DataFrame(x), max_epochs=1, progress=False)
    with pytest.raises(ValueError, match="its labels are not text"):
        named().log_prob(pandas.DataFrame(x))


def test_contexts_are_taken_from_left_to_right(kind):
    flow = make.flow(3, context_features=2)
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=(4, 3)), rng.normal(size=(4, 2))
    table = frame(kind, {"b": context[:, 0], "a": context[:, 1]})
    np.testing.assert_array_equal(flow.log_prob(x, table), flow.log_prob(x, context))
    np.testing.assert_array_equal(flow.sample(2, table, seed=1), flow.sample(2, context, seed=1))
    assert flow.log_prob_and_grad(x, table)[2].shape == (4, 2)


def test_given_values_go_by_name(kind):
    flow = fastmaf.MADE(3, names=NAMES, order=[2, 0, 1], hidden_features=(4,), dtype="float64")
    given = {"r": np.array([0.5, 1.0]), "z": np.array([2.0, 3.0])}
    samples = flow.sample_given(frame(kind, given), seed=1)
    assert samples[:, 0, 0].tolist() == [2.0, 3.0] and samples[:, 0, 2].tolist() == [0.5, 1.0]
    with pytest.raises(ValueError, match="x lacks column 'r'"):
        flow.sample_given(frame(kind, {"m": [0.5]}), seed=1)


def test_a_lazy_table_is_refused_with_the_remedy():
    class Lazy(Frame):
        def collect(self):
            return None

    with pytest.raises(ValueError, match=r"x is a lazy table, of type Lazy; hand over x.collect\(\)"):
        named().log_prob(Lazy(data()))
    with pytest.raises(ValueError, match=r"x is a lazy table"):
        fastmaf.MAF(3).fit(Lazy(data()))

    class Dask(Frame):
        compute = to_dask_array = None

    with pytest.raises(ValueError, match=r"hand over x.compute\(\), or x\[names\].to_dask_array\(\)"):
        named().log_prob(Dask(data()))


LIBRARIES = ("pandas", "polars", "pyarrow")


def made(library, data):
    """A frame of a library itself."""
    module = pytest.importorskip(library)
    return module.table(data) if library == "pyarrow" else module.DataFrame(data)


@pytest.mark.parametrize("library", LIBRARIES)
def test_frames_of_the_libraries_themselves(library):
    columns, flow = data(), named()
    x = np.column_stack(list(columns.values()))
    np.testing.assert_array_equal(flow.log_prob(made(library, permuted(columns))), flow.log_prob(x))
    other = {"r": [0.5, 1.5], "z": np.array([True, False]), "m": [decimal.Decimal("1.25"), decimal.Decimal(-2)]}
    if library != "pandas":  # which makes objects of them
        np.testing.assert_array_equal(flow.log_prob(made(library, other)), flow.log_prob([[1, 1.25, 0.5], [0, -2, 1.5]]))
    with pytest.raises(ValueError, match="x lacks columns 'z', 'r'"):
        flow.log_prob(made(library, {"m": [1.0], "zed": [2.0]}))
    with pytest.raises(ValueError, match=r"x must hold real numbers; it has columns 'z' \(.*\), 'r' \(.*\)"):
        flow.log_prob(made(library, {"z": ["a"], "m": [1], "r": [[1.0, 2.0]]}))


def test_columns_that_numpy_has_no_type_for():
    class Odd(Series):
        dtype = "Int128"

        def __init__(self):
            super().__init__([1, 2])
            self.dtype = "Int128"

        def to_numpy(self):
            raise ArithmeticError("cannot convert i128 to NumPy")

    with pytest.raises(ValueError, match=r"x must hold real numbers; it has columns 'z' \(Int128\), 'r' \(Polarsfloat64\)"):
        named().log_prob(Frame({"z": Odd(), "m": [1.0, 2.0], "r": np.zeros((2, 2))}))
    exact = Series(np.array([decimal.Decimal("0.1"), decimal.Decimal(3)], object))
    exact.dtype = "Decimal(precision=38, scale=1)"
    table = Frame({"z": exact, "m": [1.0, 2.0], "r": [0.5, 1.5]})
    np.testing.assert_array_equal(named().log_prob(table), named().log_prob([[0.1, 1, 0.5], [3, 2, 1.5]]))


def in_arrays(frame):
    """Names and columns of a frame of any of the libraries."""
    labels = list(getattr(frame, "column_names", None) or frame.columns)
    return labels, np.column_stack([np.asarray(frame[label]) for label in labels])


@pytest.mark.parametrize("library", LIBRARIES)
def test_samples_as_a_frame(library):
    module = pytest.importorskip(library)
    flow, single = named(), fastmaf.MAF(3, 2, transforms=1, hidden_features=(4,), seed=1)
    frame = flow.sample(5, seed=1, offset=2, as_frame=library)
    assert isinstance(frame, module.Table if library == "pyarrow" else module.DataFrame)
    labels, rows = in_arrays(frame)
    assert labels == NAMES
    np.testing.assert_array_equal(rows, flow.sample(5, seed=1, offset=2), strict=True)
    np.testing.assert_array_equal(flow.log_prob(frame), flow.log_prob(rows))
    assert in_arrays(flow.sample(5, dtype="float32", as_frame=library))[1].dtype == np.float32
    boxed = in_arrays(flow.sample(5, seed=1, within={"z": (0, None)}, as_frame=library))[1]
    np.testing.assert_array_equal(boxed, flow.sample(5, seed=1, within={"z": (0, None)}))
    for context in ([0.5, 1.0], [[0.5, 1.0]]):
        labels, rows = in_arrays(single.sample(5, context, seed=1, as_frame=library))
        assert labels == ["x0", "x1", "x2"]
        np.testing.assert_array_equal(rows, single.sample(5, [0.5, 1.0], seed=1))
    assert len(flow.sample(0, as_frame=library)) == 0
    masked = fastmaf.MADE(3, masks=2, hidden_features=(4,), names=NAMES)
    np.testing.assert_array_equal(in_arrays(masked.sample(5, seed=1, as_frame=library))[1], masked.sample(5, seed=1))


def test_frames_of_samples_without_the_libraries(monkeypatch):
    fakes = {
        "pandas": types.SimpleNamespace(DataFrame=lambda rows, columns: dict(zip(columns, rows.T, strict=True))),
        "polars": types.SimpleNamespace(DataFrame=lambda rows, schema, orient: dict(zip(schema, rows.T, strict=orient == "row"))),
        "pyarrow": types.SimpleNamespace(table=lambda columns, names: dict(zip(names, columns, strict=True))),
    }
    flow = named()
    for library, fake in fakes.items():
        monkeypatch.setitem(sys.modules, library, fake)
        assert importlib.import_module(library) is fake
        frame = flow.sample(4, seed=1, as_frame=library)
        assert list(frame) == NAMES
        np.testing.assert_array_equal(np.column_stack(list(frame.values())), flow.sample(4, seed=1))
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ImportError, match=f"as_frame is '{library}', which is not installed: pip install {library}"):
            flow.sample(4, as_frame=library)


def test_frames_of_samples_that_cannot_be(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace())
    flow = fastmaf.MAF(3, 2, transforms=1, hidden_features=(4,), seed=1)
    with pytest.raises(ValueError, match="as_frame is 'arrow'; it must be one of 'pandas', 'polars', 'pyarrow'"):
        flow.sample(4, [0, 0], as_frame="arrow")
    with pytest.raises(ValueError, match=r"context has shape \(4, 2\); a frame holds samples under one context, \(2,\)"):
        flow.sample(4, np.zeros((4, 2)), as_frame="pandas")
    with pytest.raises(ValueError, match="out is given; leave one of them out"):
        flow.sample(4, [0, 0], out=np.empty((4, 3), "f4"), as_frame="pandas")
    with pytest.raises(ValueError, match="context is missing"):
        flow.sample(4, as_frame="pandas")


def test_pictures_take_frames(kind):
    pytest.importorskip("matplotlib")
    columns = data()
    figure = plot.corner(frame(kind, columns), frame(kind, permuted(columns)))
    assert {axes.get_xlabel() for axes in figure.axes} >= {"z", "m", "r"}


def test_only_frames_are_frames():
    assert not any(map(_tables.is_table, (np.zeros(3), [], {}, None, 3, np.zeros(3).view(np.recarray), Series([1]))))
    assert _tables.names_of(Frame({"a": [1], 3: [1]})) is None and _tables.names_of(np.zeros(3)) is None


def test_rows_of_the_same_labels_in_another_order_are_refused():
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    x = pandas.DataFrame(rng.normal(size=(300, 2)), columns=["a", "b"])
    weights = x.a.abs().sort_values()
    context = pandas.DataFrame({"c": rng.normal(size=300)})[::-1]
    flow, given = fastmaf.MAF(2, transforms=1, seed=0), fastmaf.MAF(2, 1, transforms=1, seed=0)
    with pytest.raises(ValueError, match=r"weights has the row labels of x in another order, .* place: weights.loc\[x.index\]"):
        flow.fit(x, weights=weights, max_epochs=1)
    with pytest.raises(ValueError, match="context has the row labels of x in another order"):
        given.fit(x, context, max_epochs=1)
    with pytest.raises(ValueError, match="context has the row labels of x in another order"):
        given.log_prob(x, context)
    flow.fit(x, weights=weights.loc[x.index], max_epochs=1, validation=0, seed=0)
    given.log_prob(x, context.reset_index(drop=True))
    given.log_prob(x, context.loc[x.index])
