"""The reader of the core against that of Python: what one refuses the other refuses, and what both read is the same flow."""

from __future__ import annotations

import copy
import json
import random
import struct
import zlib

import make
import numpy as np
import pytest

import fastmaf
from fastmaf import _container
from fastmaf.backends import reference

_core = pytest.importorskip("fastmaf._core")

FLOWS = {
    "maf": lambda: fastmaf.MAF(3, 2, transforms=2, hidden_features=(5, 4), seed=0, names=["a", "b", "c"], bounds=[(0, 1), None, (2, None)]),
    "double": lambda: fastmaf.MAF(2, hidden_features=(), transforms=1, dtype="float64", seed=0, input_clip=None),
    "mixture": lambda: fastmaf.MAF(3, components=2, transforms=1, hidden_features=(4,), batch_norm=True, seed=0),
    "linear": lambda: fastmaf.MAF(3, transforms=1, hidden_features=(4, 4), residual=True, direct=True, linear=True, seed=0),
    "bernoulli": lambda: fastmaf.MADE(3, "bernoulli", hidden_features=(4,), seed=0),
    "categorical": lambda: fastmaf.MADE(2, "categorical", categories=[2, 3], hidden_features=(4,), seed=0),
    "mixed": lambda: fastmaf.MADE(3, "mixed", categories=[None, 3, 2], bounds=[(0, 1), None, None], hidden_features=(4,), seed=0),
    "mixed masks": lambda: fastmaf.MADE(3, "mixed", categories=[2, None, 3], masks=3, hidden_features=(4,), seed=0),
    "categorical flows": lambda: fastmaf.Ensemble(
        fastmaf.MADE(2, "categorical", categories=[2, 3], hidden_features=(4,)), members=2, seed=1
    ),
    "flows": lambda: fastmaf.Ensemble(fastmaf.MAF(3, 1, transforms=1, hidden_features=(4,), seed=0), members=2, seed=1),
    "masks": lambda: fastmaf.MADE(3, masks=3, hidden_features=(4,), seed=0),
}
ROUNDS = 400

VALUES = (None, True, False, 0, 1, -1, 2, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, "", "relu", "added", "NaN", [], [1], [[]], {}, {"a": 1})


def python(data: bytes) -> object:
    try:
        return fastmaf.load(data)
    except ValueError:
        return None


def core(data: bytes) -> object:
    try:
        return _core.File(data)
    except ValueError:
        return None


def split(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: object, tensors: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def places(node, path=()):
    """All places in a JSON tree."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def edit(node, rng):
    """A value somewhere in the tree replaced, removed, or doubled."""
    path = rng.choice(list(places(node)))
    if not path:
        return rng.choice(VALUES)
    node = copy.deepcopy(node)
    parent = node
    for key in path[:-1]:
        parent = parent[key]
    kind = rng.randrange(4)
    if kind == 0:
        del parent[path[-1]]
    elif kind == 1 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[path[-1]]))
    elif kind == 2 and isinstance(parent, dict):
        parent[path[-1] + "x"] = parent[path[-1]]
    elif isinstance(value := parent[path[-1]], (int, float)) and rng.random() < 0.5:
        parent[path[-1]] = value + rng.choice((-1, 1, 8))
    else:
        parent[path[-1]] = rng.choice(VALUES)
    return node


def without_digest(header):
    header = copy.deepcopy(header)
    header["__metadata__"].pop(_container.DIGEST, None)
    return header


SPLINTERS = (
    *(b"\xef\xbb\xbf", b"\0", b"\xed\xa0\x80", b"\xc3\xa9", b"[" * 70 + b"]" * 70, b"9" * 19, b"9" * 20, b"9" * 400, b" "),
    *rb"""\\ud800 \\u0000 \ud83d\ude00 \n NaN 1e999 -0 1E5 0 [ ] {} , \"x\": null true""".split(b" "),
)
"""What readers of JSON disagree about."""


def splintered(data, rng):
    """The file with something put into the text of its header, before a token or over it."""
    (length,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + length]
    place = rng.choice([k for k, byte in enumerate(text) if byte in b'0123456789":,[{'])
    text = text[:place] + rng.choice(SPLINTERS) + text[place + rng.randrange(2) :]
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def mutations(data, rng):
    """Files that are nearly this one."""
    header, tensors = split(data)
    plain = without_digest(header)
    for _ in range(ROUNDS):
        kind = rng.randrange(7)
        if kind == 6:
            yield splintered(joined(plain, tensors), rng)
        elif kind == 0:
            yield data[: rng.randrange(len(data))]
        elif kind == 1:  # any byte
            place = rng.randrange(len(data))
            yield data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
        elif kind == 2:  # a byte of the tensors, the digest gone
            place = rng.randrange(len(tensors))
            yield joined(plain, tensors[:place] + bytes([rng.randrange(256)]) + tensors[place + 1 :])
        elif kind == 3:
            yield joined(edit(plain, rng), tensors)
        else:  # the record
            changed = copy.deepcopy(plain)
            record = edit(json.loads(plain["__metadata__"]["fastmaf"]), rng)
            changed["__metadata__"]["fastmaf"] = json.dumps(record)
            yield joined(changed, tensors)


def density(flow, file):
    """By the core, and by the reference from what Python read; None where the core has no kernel."""
    own = flow.member(0) if isinstance(flow, fastmaf.Ensemble) else flow
    if file.unsupported:
        return None
    rng = np.random.default_rng(0)
    values = np.array(own.record.values)
    free = rng.uniform(0.1, 0.9, (5, own.features)) + 2.0 * (not values.any())
    x = np.where(values > 0, rng.integers(0, 2, (5, own.features)), free)
    context = rng.normal(size=(5, own.context_features)) if own.context_features else None
    actual = np.empty(5, own.dtype)
    _core.Flow(file).log_prob(x, context, actual)
    with make.reference(), np.errstate(all="ignore"):
        return actual, own.astype("float64").log_prob(x, context)


@pytest.mark.parametrize("name", FLOWS)
def test_both_readers_agree(name):
    rng = random.Random(int(np.random.SeedSequence().generate_state(1)[0]))
    data = make.file_bytes(FLOWS[name]())
    refused = read = 0
    for mutant in (data, *mutations(data, rng)):
        theirs, ours = python(mutant), core(mutant)
        assert (theirs is None) == (ours is None), f"{'the core' if ours is None else 'Python'} alone reads it: {mutant!r}"
        if theirs is None or ours is None:
            refused += 1
            continue
        read += 1
        assert ours.features == theirs.features and ours.context_features == theirs.context_features
        assert ours.dtype == theirs.dtype.name and tuple(ours.names or ()) == (theirs.names or ())
        if (values := density(theirs, ours)) is not None:
            actual, expected = values
            finite = np.abs(expected) < 1e6
            assert np.allclose(actual[finite], expected[finite], rtol=1e-2, atol=1e-2)
    assert refused > ROUNDS / 10 and read > ROUNDS / 20


def test_the_digest_is_that_of_zlib():
    data = make.file_bytes(FLOWS["maf"]())
    header, _ = split(data)
    tensors, _ = _container.read(data)
    metadata = header["__metadata__"]
    crc = zlib.crc32(b"fastmaf\0" + metadata["fastmaf"].encode() + b"\0")
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode() + b"\0" + tensors[name].tobytes(), crc)
    assert metadata["fastmaf_digest"] == f"{crc:08x}"


def test_the_digest_is_of_the_record_too_and_of_no_ones_else():
    header, tensors = split(make.file_bytes(FLOWS["maf"]()))
    metadata = header["__metadata__"]
    edited = {**header, "__metadata__": {**metadata, "fastmaf": metadata["fastmaf"].replace('"training": {', '"training": {"a": 1')}}
    assert edited != header
    noted = {**header, "__metadata__": {**metadata, "by": "me"}}
    for reader in (_core.File, fastmaf.load):
        with pytest.raises(ValueError, match="it is damaged: the CRC-32 of its contents"):
            reader(joined(edited, tensors))
        reader(joined(noted, tensors))


def test_a_file_of_claims_costs_no_memory():
    header = {"__metadata__": {"fastmaf": json.dumps({"format": 1, "features": 10**9})}}
    header["x"] = {"dtype": "F64", "shape": [10**9], "data_offsets": [0, 8 * 10**9]}
    for reader in (_core.File, fastmaf.load):
        with pytest.raises(ValueError, match="outside the file"):
            reader(joined(header, b"1234"))
    record = {"format": 1, "dtype": "float32", "features": 10**9, "context_features": 10**9, "names": None, "training": {}}
    record |= {"layers": [], "context_layers": [], "base": {"type": "Normal", "features": 10**9}}
    file = joined({"__metadata__": {"fastmaf": json.dumps(record)}}, b"")
    assert (core(file) is None) == (python(file) is None)


def test_what_the_core_reads_is_what_the_reference_has():
    for build in FLOWS.values():
        flow = build()
        values = density(flow, _core.File(make.file_bytes(flow)))
        assert values is not None
        assert np.allclose(*values, rtol=1e-4, atol=1e-4)
    assert reference.backend.name == "reference"


def test_notes_may_lie_as_deep_in_a_member_as_in_a_flow():
    """Each reader takes what `FlowRecord` takes, and no more."""
    deepest = {}
    for _ in range(62):
        deepest = {"a": deepest}
    flow = fastmaf.Flow([], features=2, training=deepest)
    for contents in (flow, fastmaf.Ensemble([flow, flow])):
        data = make.file_bytes(contents)
        assert python(data) is not None and core(data) is not None
        header, tensors = split(data)
        plain = without_digest(header)
        text = plain["__metadata__"]["fastmaf"]
        plain["__metadata__"]["fastmaf"] = text.replace('"training": {', '"training": {"a": {', 1).replace("}" * 62, "}" * 63, 1)
        deeper = joined(plain, tensors)
        assert python(deeper) is None and core(deeper) is None
