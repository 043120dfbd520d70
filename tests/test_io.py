"""Files: every layer of the record goes there and back, and nothing else comes back."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import re
import stat
import struct
import subprocess
import sys
import threading
from pathlib import Path

import make
import numpy as np
import pytest
import safetensors.numpy

import fastmaf
from fastmaf import _container, backends, masks
from fastmaf import _files as files
from fastmaf._codec import FORMAT
from fastmaf._files import write
from fastmaf.layers import (
    ACTIVATIONS,
    LAWS,
    Affine,
    Autoregressive,
    BatchNorm,
    Block,
    Conditioner,
    Dense,
    Elementwise,
    Law,
    Linear,
    Normal,
    Permutation,
    Terminal,
)

GOLDEN = Path(__file__).parent / "golden"


def numbers(*shape):
    """Different numbers that every dtype holds exactly, none of them zero."""
    size = int(np.prod(shape))
    return ((np.arange(size) * 7 % 31 - 15.5) / 8).reshape(shape)


def dense(mask, degrees=None, context=None, width=0, bias=False, norm=False):
    rows, inputs = mask.shape
    return Dense(
        numbers(rows, inputs) * mask,
        numbers(rows),
        degrees,
        context or "none",
        numbers(rows, width) if context else None,
        numbers(rows) if bias else None,
        numbers(inputs) if norm else None,
        numbers(inputs) if norm else None,
    )


def hidden(degrees, inputs, *context, **options):
    return dense(masks.hidden_mask(degrees, inputs), degrees, *context, **options)


def final(ranks, degrees, rows_per_variable, *context, **options):
    return dense(masks.output_mask(ranks, degrees, rows_per_variable), None, *context, **options)


def zuko():
    """Ranks in both directions, context among the first inputs, no residuals; then a residual net without activation at its end."""
    ranks, degrees = np.array([1, 2, 3, 4]), np.array([0, 3, 1, 2, 1])
    plain = Conditioner(
        hidden(degrees, ranks, "added", 2),
        (Block("plain", (hidden(degrees, degrees),)),),
        final(ranks, degrees, 2),
        "elu",
    )
    turned = ranks[::-1]
    residual = Conditioner(
        hidden(degrees, turned, "added", 2),
        (Block("residual", (hidden(degrees, degrees), hidden(degrees, degrees))),),
        final(turned, degrees, 2),
        "silu",
        final_activation=False,
    )
    soft = Law("exp_soft", "affine", {"clip": 9.25})
    return fastmaf.Flow([Autoregressive(ranks, plain, soft), Autoregressive(turned, residual, soft)], context_features=2)


def nflows():
    """Permutations, residual blocks with inner batch norms and context gates, softplus scales, batch norm between the layers."""
    ranks, degrees = np.array([1, 2, 3]), np.array([1, 2, 1, 2])
    first = hidden(degrees, degrees, norm=True)
    second = hidden(degrees, degrees, "gated", 2, bias=True, norm=True)
    net = Conditioner(
        hidden(degrees, ranks, "activated", 2, bias=True), (Block("residual", (first, second)),), final(ranks, degrees, 2), "tanh", False
    )
    layers = [
        Permutation([2, 0, 1]),
        Autoregressive(ranks, net, Law("softplus", "affine")),
        BatchNorm(numbers(3), numbers(3), numbers(3), numbers(3) ** 2, 1e-3),
        Linear(np.tril(numbers(3, 3)), np.triu(numbers(3, 3)), numbers(3)),
    ]
    return fastmaf.Flow(layers, context_features=2, context_layers=[Affine([1, 2], [3, 4])], dtype="float64")


def everything_else():
    """Bounds, an inverse layer, direct weights, variables that share a rank, no hidden units, names, a training summary."""
    ranks, degrees = np.array([1, 3, 1]), np.array([1, 2])
    skip = numbers(6, 3) * masks.output_mask(ranks, ranks, 2)
    layers = [
        Elementwise.from_bounds([(0, 1), (None, 3), (-2, None)]),
        Affine(numbers(3) / 3, numbers(3) / 7),
        Autoregressive(
            ranks, Conditioner(hidden(degrees, ranks), (), final(ranks, degrees, 2), "gelu", True, skip), Law("sigmoid"), "noise"
        ),
        Autoregressive(ranks, Conditioner(None, (), final(ranks, ranks, 2), "relu", False), Law("clamp", constants={"low": -4})),
    ]
    training = {"epochs": 3, "log_prob": [1.5, None], "data": {"sha": "0"}}
    context = [Elementwise.from_bounds([None])]
    return fastmaf.Flow(layers, context_features=1, context_layers=context, names=["z", "u \u00b5", '"g"'], training=training)


def terminal(conditional):
    ranks, degrees = np.array([2, 1]), np.array([0, 1, 1])
    rows = {"mixture": 15, "bernoulli": 1, "categorical": 3}[conditional]
    net = Conditioner(hidden(degrees, ranks), (), final(ranks, degrees, rows))
    categories = (3, 3) if conditional == "categorical" else ()
    base = Terminal(ranks, net, conditional, 5 if conditional == "mixture" else 1, categories, {"clip": 7.0})
    return fastmaf.Flow([], base)


FLOWS = {
    "maf": lambda: fastmaf.MAF(features=3, context_features=2, transforms=2, hidden_features=(5, 4), seed=0),
    "maf64": lambda: fastmaf.MAF(features=2, hidden_features=(), dtype="float64", bounds=[None, (0, 1)], seed=0),
    "zuko": zuko,
    "nflows": nflows,
    "else": everything_else,
    "mixture": lambda: terminal("mixture"),
    "bernoulli": lambda: terminal("bernoulli"),
    "categorical": lambda: terminal("categorical"),
    "nothing": lambda: fastmaf.Flow([], features=3),
    "laws": lambda: fastmaf.Flow(
        [Autoregressive([1], Conditioner(None, (), final(np.ones(1), np.ones(1), 2)), Law(kind)) for kind in LAWS]
    ),
    "activations": lambda: fastmaf.Flow([layer for a in ACTIVATIONS for layer in fastmaf.MADE(2, activation=a, seed=0).layers]),
}


def assert_same(a, b):
    for name in ("layers", "context_layers", "base", "features", "context_features", "dtype", "names", "training", "device"):
        assert getattr(a, name) == getattr(b, name), name
    assert repr(a) == repr(b)


@pytest.fixture(params=FLOWS)
def flow(request):
    return FLOWS[request.param]()


def test_bytes_path_and_file_there_and_back(flow, tmp_path):
    data = make.file_bytes(flow)
    path = tmp_path / "flow.safetensors"
    flow.save(path)
    assert path.read_bytes() == data
    flow.save(str(path))
    file = io.BytesIO()
    flow.save(file)
    assert file.getvalue() == data
    for source in (data, bytearray(data), memoryview(data), path, str(path), io.BytesIO(data)):
        assert_same(fastmaf.load(source), flow)
    with path.open("rb") as opened:
        assert_same(fastmaf.load(opened), flow)


def test_pickle_and_copies(flow):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert_same(pickle.loads(pickle.dumps(flow, protocol)), flow)
    assert_same(copy.deepcopy(flow), flow)
    assert_same(copy.copy(flow), flow)


def test_summary_and_repr_of_every_layer(flow):
    assert repr(flow).startswith(f"Flow(features={flow.features}")
    assert len(flow.summary().splitlines()) == len(flow.layers) + len(flow.context_layers) + 3


def test_weights_of_every_layer_go_to_a_vector_and_back(flow):
    vector = flow.parameters()
    assert vector.dtype == flow.dtype
    assert flow.with_parameters(vector).layers == flow.layers
    assert np.array_equal(flow.with_parameters(2 * vector).parameters(), 2 * vector)


def test_the_file_is_a_plain_safetensors_file(tmp_path):
    flow = FLOWS["maf"]()
    flow.save(tmp_path / "flow.safetensors")
    tensors = safetensors.numpy.load_file(tmp_path / "flow.safetensors")
    made = flow.layers[1].conditioner
    assert np.array_equal(tensors["layers.1.conditioner.initial.weight"], made.initial.weight)
    assert np.array_equal(tensors["layers.1.conditioner.blocks.0.maps.0.bias"], made.blocks[0].maps[0].bias)
    assert tensors["layers.0.loc"].dtype == np.float64


def member():
    flow = fastmaf.MADE(3, "categorical", categories=(2, 3, 2), hidden_features=(4,), names=("a", "b", "c"), seed=1)
    return flow.with_parameters(np.where(flow.parameters() == 0, 0, np.sin(np.arange(flow.parameters().size))))


MEMBER = member()


def test_the_golden_files():
    loaded = fastmaf.load(GOLDEN / "v1.safetensors")
    assert_same(loaded, everything_else())
    assert_same(fastmaf.load(GOLDEN / "v1_nflows.safetensors"), nflows())
    loaded = fastmaf.load(GOLDEN / "v1_ensemble.safetensors")
    expected = fastmaf.MaskedEnsemble(MEMBER, MEMBER.base.conditioner, [[1, 2, 3], [3, 1, 2]], [[1, 1, 2, 2], [2, 1, 2, 1]])
    assert np.array_equal(loaded.parameters(), expected.parameters())
    assert np.array_equal(loaded.ranks, expected.ranks) and np.array_equal(loaded.degrees, expected.degrees)
    flows = fastmaf.load(GOLDEN / "v2_flows.safetensors")
    for k in range(2):
        assert_same(flows.member(k), MEMBER.with_parameters(MEMBER.parameters() * (k + 1)))
    assert len(flows) == 2 and FORMAT == 2, "a new format needs a golden file of its own; those of the older ones stay"


def test_training_summaries_become_plain():
    training = {
        "loss": np.float32(1.5),
        "best": np.int64(3),
        "nan": np.nan,
        "list": (1, np.inf),
        "array": np.array([1.0, 2.0]),
        "ok": np.True_,
    }
    flow = fastmaf.Flow([], features=1, training=training)
    assert flow.training == {"loss": 1.5, "best": 3, "nan": None, "list": [1, None], "array": [1.0, 2.0], "ok": True}
    assert fastmaf.load(make.file_bytes(flow)).training == flow.training
    with pytest.raises(ValueError, match="training holds a value of type set"):
        fastmaf.Flow([], features=1, training={"a": {1}})


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "flow.safetensors"
    write(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_what_cannot_be_written_is_named_as_it_was_given(tmp_path):
    flow = fastmaf.Flow([], features=1)
    for path, error in ((tmp_path / "none" / "flow", FileNotFoundError), (tmp_path, OSError)):
        with pytest.raises(error) as caught:
            flow.save(path)
        assert str(path) in str(caught.value) and ".tmp" not in str(caught.value)


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"


def test_a_missing_file_or_folder_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        fastmaf.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        FLOWS["maf"]().save(tmp_path / "none" / "flow.safetensors")


def test_a_text_file_is_refused(tmp_path):
    (tmp_path / "text").write_text("hello")
    with (tmp_path / "text").open() as file, pytest.raises(ValueError, match="gives str, not bytes; open it in binary mode"):
        fastmaf.load(file)


# Hostile files


def split(data):
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def edited(data, edit):
    """The file with its record changed by `edit(record, header)`."""
    header, body = split(data)
    record = json.loads(header["__metadata__"]["fastmaf"])
    replacement = edit(record, header)
    header["__metadata__"]["fastmaf"] = replacement if isinstance(replacement, str) else json.dumps(record)
    header["__metadata__"].pop("fastmaf_digest", None)
    return join(header, body)


DATA = make.file_bytes(fastmaf.MAF(features=3, context_features=2, transforms=1, hidden_features=(4,), names=["a", "b", "c"], seed=0))


def set_in(*path, value):
    def edit(record, header):
        node = record
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    return edit


def drop(*path):
    def edit(record, header):
        node = record
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]

    return edit


def tensor(name, **values):
    return lambda record, header: header[name].update(values)


NET = ("layers", 1, "conditioner")
WEIGHT = "layers.1.conditioner.initial.weight"

RECORDS = {
    "not JSON": (lambda r, h: "{", "cannot be read as a flow"),
    "not an object": (lambda r, h: "[1]", "the metadata is not a JSON object"),
    "deep": (lambda r, h: "[" * 100_000, "cannot be read as a flow"),
    "NaN": (lambda r, h: json.dumps(r).replace('"features": 3', '"features": NaN'), "its metadata holds NaN"),
    "newer": (set_in("format", value=3), "it has format 3; this version of fastmaf reads formats up to 2: update fastmaf"),
    "format text": (set_in("format", value="1"), "its format is '1'"),
    "format zero": (set_in("format", value=0), "its format is 0"),
    "no format": (drop("format"), "its format is None"),
    "no layers": (drop("layers"), "the metadata lacks 'layers'"),
    "more": (set_in("extra", value=1), "the metadata has an unknown field 'extra'"),
    "dtype": (set_in("dtype", value="float16"), "its dtype is 'float16'"),
    "other dtype": (set_in("dtype", value="float64"), "must have float64"),
    "dtype list": (set_in("dtype", value=["float32"]), "its dtype is"),
    "features": (set_in("features", value=4), "base has width 3; the flow has 4 features"),
    "features text": (set_in("features", value="3"), "features is '3'; it must be a int"),
    "features bool": (set_in("features", value=True), "features is True"),
    "features huge": (set_in("features", value=10**400), "cannot be read as a flow"),
    "context": (set_in("context_features", value=10**15), "the context of layers[1] has width 2; the flow has 1000000000000000 context"),
    "names": (set_in("names", value=["a"]), "names has 1 entries; the flow has 3 features"),
    "names numbers": (set_in("names", value=[1, 2, 3]), "names.0 is 1; it must be a str"),
    "layers object": (set_in("layers", value={}), "layers must be a list"),
    "layer number": (set_in("layers", 0, value=3), "layers.0 is not a JSON object"),
    "unknown layer": (set_in("layers", 0, "type", value="Spline"), "layers.0 has type 'Spline'; this version of fastmaf knows Elementwise"),
    "type list": (set_in("layers", 0, "type", value=["Affine"]), "layers.0 has type ['Affine']"),
    "base as layer": (set_in("layers", value=[{"type": "Normal", "features": 3}]), "layers[0] is of type Normal, which is no layer"),
    "layer as base": (set_in("base", value={"type": "Permutation", "perm": "base.perm"}), "the tensor 'base.perm' is missing"),
    "base width": (set_in("base", "features", value=5), "base has width 5"),
    "wrong part": (
        set_in(*NET, "initial", "type", value="Law"),
        "layers.1.conditioner.initial has type 'Law'; this version of fastmaf knows",
    ),
    "no part": (set_in(*NET, "final", value=None), "layers.1.conditioner.final is not a JSON object"),
    "field gone": (drop(*NET, "skip"), "layers.1.conditioner lacks 'skip'"),
    "field more": (set_in(*NET, "depth", value=3), "layers.1.conditioner has an unknown field 'depth'"),
    "activation": (set_in(*NET, "activation", value="swish"), "layers.1.conditioner: activation is 'swish'"),
    "flag": (set_in(*NET, "final_activation", value=1), "layers.1.conditioner.final_activation is 1; it must be a bool"),
    "blocks": (set_in(*NET, "blocks", value=[{"type": "Block", "kind": "plain", "maps": []}]), "a plain block has 0 maps"),
    "law": (set_in("layers", 1, "law", "kind", value="cubic"), "law is 'cubic'"),
    "clip": (set_in("layers", 1, "law", "constants", "clip", value=-1), "constant 'clip' of law 'exp_soft' is -1.0"),
    "clip inf": (
        lambda r, h: json.dumps(r).replace("6.907755278982137", "1e999"),
        "its metadata holds a number that is too large",
    ),
    "clip huge": (set_in("layers", 1, "law", "constants", "clip", value=10**400), "cannot be read as a flow"),
    "constants": (set_in("layers", 1, "law", "constants", value=[1]), "layers.1.law.constants is not a JSON object"),
    "tensor absent": (set_in(*NET, "initial", "weight", value=None), f"the tensor '{WEIGHT}' is missing"),
    "tensor inline": (set_in("layers", 0, "loc", value=[0, 0, 0]), "the tensor 'layers.0.loc' is missing"),
    "tensor elsewhere": (set_in("layers", 0, "loc", value="layers.0.scale"), "the tensor 'layers.0.loc' is missing"),
    "tensor unread": (set_in(*NET, "initial", "degrees", value=None), "hidden map 0 has no degrees"),
    "tensor left over": (drop("layers", 1), "no layer has the tensor 'layers.1."),
    "tensor shape": (tensor(WEIGHT, shape=[3, 4]), "bias has shape (4,); expected (3,)"),
    "tensor flat": (tensor(WEIGHT, shape=[12]), "weight has shape (12,); it must have 2 dimensions"),
    "tensor huge": (tensor(WEIGHT, shape=[2**62, 2**62]), "it is damaged or no safetensors file"),
    "tensor negative": (tensor(WEIGHT, shape=[-3, -4]), "it is damaged or no safetensors file"),
    "tensor type": (tensor(WEIGHT, dtype="I32"), f"tensor '{WEIGHT}' has dtype I32; it must be one of F32, F64, I64"),
    "tensor float": (tensor("layers.1.ranks", dtype="F64"), "tensor 'layers.1.ranks' has dtype float64; it must have int64"),
    "tensor integer": (tensor("layers.0.loc", dtype="I64"), "tensor 'layers.0.loc' has dtype int64; it must have float64"),
    "tensor unknown": (tensor(WEIGHT, dtype="Q7"), "it is damaged or no safetensors file"),
    "offsets outside": (tensor(WEIGHT, data_offsets=[0, 2**40]), "it is damaged or no safetensors file"),
    "offsets turned": (tensor(WEIGHT, data_offsets=[48, 0]), "it is damaged or no safetensors file"),
    "training": (set_in("training", value=[1]), "training is not a JSON object"),
    "no metadata": (lambda r, h: h.__setitem__("__metadata__", {}) or "x", "cannot be read as a flow"),
}


def test_the_file_to_be_damaged_is_whole():
    assert fastmaf.load(DATA).names == ("a", "b", "c")
    assert edited(DATA, lambda record, header: None) and fastmaf.load(edited(DATA, lambda record, header: None)).features == 3


@pytest.mark.parametrize("case", RECORDS)
def test_a_damaged_record_is_refused_with_its_fault(case):
    edit, message = RECORDS[case]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        fastmaf.load(edited(DATA, edit))
    assert str(caught.value).startswith("the data cannot be read as a flow: ")


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("layers.1.ranks", np.array([0, 1, 2]), "layers.1: ranks [0, 1, 2] must be positive"),
        ("layers.1.ranks", np.array([3, 2, 1]), "layers.1: hidden map 0 has a weight at (2, 0) that its degrees forbid"),
        ("layers.1.conditioner.initial.degrees", np.zeros(4, np.int64), "a weight at (2, 0) that its degrees forbid"),
        ("layers.0.loc", np.array([0, np.nan, 0]), "layers.0: loc[1] is nan; it must be finite"),
        ("layers.0.scale", np.array([1.0, 1.0, 0.0]), "layers.0: scale[2] is 0.0; it must be finite and not zero"),
        ("layers.1.conditioner.initial.bias", np.zeros(5, np.float32), "bias has shape (5,); expected (4,)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name, array, message):
    tensors = safetensors.numpy.load(DATA)
    metadata = split(DATA)[0]["__metadata__"]
    del metadata["fastmaf_digest"]
    tensors[name] = array
    with pytest.raises(ValueError, match=re.escape(message)):
        fastmaf.load(safetensors.numpy.save(tensors, metadata))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"12345",
        b"\x80\x04\x95",
        b"PK\x03\x04" * 100,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        bytes(range(256)) * 9,
    ],
)
def test_what_is_no_flow_is_refused(data):
    with pytest.raises(ValueError, match="the data cannot be read as a flow: "):
        fastmaf.load(data)


def test_a_safetensors_file_of_something_else_is_refused(tmp_path):
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other cannot be read as a flow: it is a safetensors file without the metadata of fastmaf"):
        fastmaf.load(tmp_path / "other")


def test_every_truncation_is_refused():
    for length in range(len(DATA)):
        with pytest.raises(ValueError, match="cannot be read as a flow"):
            fastmaf.load(DATA[:length])


def test_appended_bytes_are_refused():
    with pytest.raises(ValueError, match="cannot be read as a flow"):
        fastmaf.load(DATA + b"\0")


def test_flipped_bytes_are_refused_or_read():
    rng = np.random.default_rng(0)
    end = 8 + struct.unpack("<Q", DATA[:8])[0]
    for position in rng.integers(0, end, 3000):
        damaged = bytearray(DATA)
        damaged[position] = rng.integers(256)
        try:
            flow = fastmaf.load(damaged)
        except ValueError:
            continue
        assert flow.features == 3


@pytest.mark.parametrize("part", [Normal(3), Law("exp"), Affine([1.0], [2.0])])
def test_layers_pickle_alone(part):
    assert pickle.loads(pickle.dumps(part)) == part


# The container


def test_what_we_write_others_read_and_the_other_way_round():
    rng = np.random.default_rng(0)
    tensors = {
        "b": rng.normal(size=(3, 4)),
        "a": rng.normal(size=(2, 0)).astype("f4"),
        "n": np.arange(5),
        "s": np.array(2.5),
        "turned": rng.normal(size=(4, 3)).astype("f4").T,
        "foreign": rng.normal(size=3).astype(">f8"),
    }
    metadata = {"key": "value \u2265", "empty": ""}
    data = _container.write(tensors, metadata)
    assert data == _container.write(dict(reversed(tensors.items())), metadata), "equal contents, equal bytes"
    for loaded in (
        safetensors.numpy.load(data),
        _container.read(data)[0],
        _container.read(safetensors.numpy.save(_container.read(data)[0]))[0],
    ):
        assert loaded.keys() == tensors.keys()
        for name, array in tensors.items():
            np.testing.assert_array_equal(loaded[name], array)
            assert loaded[name].shape == array.shape
    assert _container.read(data)[1] == metadata
    with pytest.raises(ValueError, match="tensor 'x' has dtype int32; it must be one of F32, F64, I64"):
        _container.write({"x": np.zeros(3, "i4")}, {})


def container(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def one(dtype="F64", shape=(2,), data_offsets=(0, 16), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(data_offsets), **more}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "its header is cut off"),
        (b"1234567", "its header is cut off"),
        (container({}, length=1), "Expecting"),
        (container({}, length=2**63), "its header is cut off"),
        (container(b"\xff\xfe"), "its header is not text"),
        (container(b"[]"), "its header is not a JSON object"),
        (container(b'{"a": NaN}'), "its header holds NaN"),
        (container(b'{"a": 1, "a": 2}'), "its header names something twice"),
        (container(b"[" * 100_000), "recursion|Expecting"),
        (container({"__metadata__": 3}), "its metadata is not text by name"),
        (container({"__metadata__": {"a": 3}}), "its metadata is not text by name"),
        (container({"a": 3}), "a tensor lacks its dtype, shape or data_offsets"),
        (container({"a": one(more=1)}, bytes(16)), "a tensor lacks its dtype, shape or data_offsets"),
        (container({"a": one("F65")}, bytes(16)), "a tensor has a dtype that the format does not know"),
        (container({"a": one(["F64"])}, bytes(16)), "a tensor has a dtype that the format does not know"),
        (container({"a": one(shape=[True, 2])}, bytes(16)), "not made of counts"),
        (container({"a": one(shape=[-1, -2])}, bytes(16)), "not made of counts"),
        (container({"a": one(shape=[2.0])}, bytes(16)), "not made of counts"),
        (container({"a": one(shape="2")}, bytes(16)), "a shape that does not fill|not made of counts"),
        (container({"a": one(shape=[2**40, 2**40])}, bytes(16)), "a shape that does not fill its range"),
        (container({"a": one(shape=[1] * 40 + [2])}, bytes(16)), "a tensor lies outside the file"),
        (container({"a": one(data_offsets=[0, 16, 16])}, bytes(16)), "a tensor lies outside the file"),
        (container({"a": one(data_offsets=[16, 0])}, bytes(16)), "a tensor lies outside the file"),
        (container({"a": one()}, bytes(15)), "a tensor lies outside the file"),
        (container({"a": one()}, bytes(17)), "no tensor has the bytes from 16 on"),
        (container({"a": one(data_offsets=[8, 24])}, bytes(24)), "no tensor has the bytes from 0 on"),
        (container({"a": one(), "b": one(data_offsets=[8, 24])}, bytes(24)), "two tensors share the bytes from 8 on"),
        (container({"a": one(), "b": one()}, bytes(16)), "two tensors share the bytes from 0 on"),
    ],
)
def test_damaged_containers(data, message):
    with pytest.raises(ValueError, match=f"it is damaged or no safetensors file .*({message})"):
        _container.read(data)
    with pytest.raises(ValueError, match="the data cannot be read as a flow: it is damaged or no safetensors file"):
        fastmaf.load(data)


@pytest.mark.parametrize("source", [None, 3, {}, [b"x"], np.zeros(3)])
def test_what_is_no_source_is_refused(source):
    with pytest.raises(ValueError, match="source is .*; it must be a path, a binary file or bytes"):
        fastmaf.load(source)


def test_equal_flows_are_equal_bytes():
    assert (
        make.file_bytes(FLOWS["maf"]()) == make.file_bytes(FLOWS["maf"]()) == make.file_bytes(fastmaf.load(make.file_bytes(FLOWS["maf"]())))
    )


# Writers that were killed


DYING = """
import os, signal, sys
from fastmaf import _files
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
_files.write(sys.argv[1], b"half")
"""


def test_what_killed_writers_left_is_swept_by_the_next_one(tmp_path):
    target, other = tmp_path / "flow", tmp_path / "other"
    for path in (target, target, other):
        assert subprocess.run([sys.executable, "-c", DYING, str(path)], timeout=60).returncode == -9
    (tmp_path / "flow.x.tmp").write_bytes(b"of somebody else")
    assert len(list(tmp_path.iterdir())) == 4
    files.write(target, b"whole")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert target.read_bytes() == b"whole" and len(left) == 3
    assert left[:2] == ["flow", "flow.x.tmp"] and left[2].startswith("other.")


def test_a_writer_at_work_is_left_alone(tmp_path):
    target = tmp_path / "flow"
    with files._temporary(str(target)) as file:
        files.write(target, b"whole")
        assert os.path.exists(file.name)
    assert [path.name for path in tmp_path.iterdir()] == ["flow"]


def test_a_writer_whose_file_is_swept_before_it_is_locked_takes_another(tmp_path, monkeypatch):
    lock, swept = files._lock, []

    def late(file):
        if not swept:
            swept.append(file.name)
            os.unlink(file.name)
        return lock(file)

    monkeypatch.setattr(files, "_lock", late)
    files.write(tmp_path / "flow", b"whole")
    assert swept and [path.name for path in tmp_path.iterdir()] == ["flow"] and (tmp_path / "flow").read_bytes() == b"whole"


LOADING = """
import threading, time, fastmaf
data = open(r"{path}", "rb").read()
def work():
    while True:
        fastmaf.load(data)
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
"""


@pytest.mark.skipif(backends.reason("cpu") is not None, reason="the compiled core is absent")
def test_daemon_threads_may_load_while_the_interpreter_exits(tmp_path):
    path = tmp_path / "flow"
    FLOWS["maf"]().save(path)
    for _ in range(6):
        result = subprocess.run([sys.executable, "-c", LOADING.format(path=path)], timeout=60, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("mark, after", [(b"input_clip", len(b'input_clip\\": ')), (b"}}", 1000)])
def test_a_flipped_bit_in_the_record_or_the_weights_is_noticed(mark, after):
    data = bytearray(make.file_bytes(fastmaf.MAF(features=3, seed=0)))
    place = data.index(mark) + after
    assert after == 1000 or data[place : place + 1].isdigit()
    data[place] ^= 1
    with pytest.raises(ValueError, match="it is damaged: the CRC-32 of its contents is"):
        fastmaf.load(bytes(data))


def test_what_is_no_regular_file_is_written_and_stays_what_it_is(tmp_path):
    """A pipe gets the bytes; it is not replaced by a file of its name."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    got = []
    reader.start()
    fastmaf.MAF(2, seed=0).save(pipe)
    reader.join(30)
    assert stat.S_ISFIFO(os.stat(pipe).st_mode) and os.listdir(tmp_path) == ["pipe"]
    assert fastmaf.load(got[0]).features == 2


def test_a_block_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"before")
    with pytest.raises(FileNotFoundError) as caught, files.writing(path) as file:
        file.write(b"after")
        raise FileNotFoundError(2, "gone", "another")
    assert caught.value.filename == "another"  # no error of this file
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["x"]
