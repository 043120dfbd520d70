"""The record of a flow: what changes, what cannot, and what other threads see of it meanwhile."""

from __future__ import annotations

import copy
import pickle
import re
import sys
import threading
import warnings
from dataclasses import replace

import make
import numpy as np
import pytest

import fastmaf
from fastmaf import backends
from fastmaf.layers import Affine, Elementwise, Normal, Terminal
from fastmaf.record import FlowRecord

X = np.random.default_rng(0).normal(size=(40, 5))


def two_flows():
    return fastmaf.MAF(5, seed=1), fastmaf.MAF(5, seed=2)


# What an assignment does


def test_assignments_count_from_the_next_call_on(backend):
    first, second = two_flows()
    flow = fastmaf.MAF(5, seed=1)
    assert np.array_equal(flow.log_prob(X), first.log_prob(X))
    flow.layers = second.layers
    assert np.array_equal(flow.log_prob(X), second.log_prob(X))
    flow.layers = first.layers
    assert np.array_equal(flow.log_prob(X), first.log_prob(X))


def test_another_base_counts(compiled):
    first, second = (fastmaf.MADE(5, conditional="mixture", seed=seed) for seed in (1, 2))
    expected = second.log_prob(X)
    first.log_prob(X)
    first.base = second.base
    assert np.array_equal(first.log_prob(X), expected)


def test_other_context_layers_count(backend):
    flow, context = fastmaf.MAF(5, context_features=2, seed=0), np.array([0.3, -1.0])
    flow.log_prob(X, context)
    flow.context_layers = [Affine([1.0, 2.0], [0.5, 3.0])]
    moved = fastmaf.Flow(flow.layers, context_features=2, context_layers=flow.context_layers)
    assert np.array_equal(flow.log_prob(X, context), moved.log_prob(X, context))
    assert not np.array_equal(flow.log_prob(X, context), fastmaf.MAF(5, context_features=2, seed=0).log_prob(X, context))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers", [Affine([0.0], [1.0])], r"layers\[0\] has width 1; the flow has 5 features"),
        ("layers", [3], r"layers\[0\] is of type int, which is no layer"),
        ("base", Normal(4), "base has width 4; the flow has 5 features"),
        ("base", "normal", "base is of type str; it must be Normal or Terminal"),
        ("context_layers", [Affine([0.0], [1.0])], r"context_layers\[0\] has width 1; the flow has 0 context features"),
        ("names", ["a", "b"], "names has 2 entries; the flow has 5 features"),
        ("names", [1, 2, 3, 4, 5], "it must be a sequence of strings"),
        ("training", {"flow": object()}, "training holds a value of type object"),
    ],
)
def test_assignments_are_judged_and_change_nothing_when_refused(name, value, message):
    flow = fastmaf.MAF(5, names=list("abcde"))
    record = flow.record
    with pytest.raises(ValueError, match=message):
        setattr(flow, name, value)
    assert flow.record is record


def test_what_cannot_change_is_read_only():
    flow, ensemble = fastmaf.MAF(5), fastmaf.MADE(5, masks=2)
    for thing, names in (
        (flow, ("features", "context_features", "dtype", "device", "precision", "record", "order")),
        (flow.record, ("features", "layers", "base", "dtype", "names", "training", "anything")),
        (ensemble, ("features", "layers", "base", "dtype", "device", "conditioner", "ranks", "degrees")),
    ):
        for name in names:
            with pytest.raises(AttributeError):
                setattr(thing, name, None)


def test_names_can_be_given_later():
    flow = fastmaf.MAF(5)
    flow.names = list("abcde")
    assert flow.names == tuple("abcde") == fastmaf.load(flow.__reduce__()[1][0]).names
    flow.names = None
    assert flow.names is None


def test_a_flow_without_order_has_no_attribute_of_that_name():
    assert not hasattr(fastmaf.MAF(3), "order") and hasattr(fastmaf.MAF(3, order="sequential"), "order")
    with pytest.raises(ValueError):
        _ = fastmaf.MAF(3).order


# Copies


def test_copies_keep_everything():
    flow = fastmaf.MAF(5, names=list("abcde"), dtype="float64").to("cpu", "medium")
    flow.training = {"note": 1}
    for again in (pickle.loads(pickle.dumps(flow)), copy.deepcopy(flow), flow.astype("float64"), flow.with_parameters(flow.parameters())):
        assert (again.precision, again.device, again.dtype, again.names) == ("medium", "cpu", flow.dtype, flow.names)
        assert again.layers == flow.layers and again.training == {"note": 1}
        assert np.array_equal(again.log_prob(X), flow.log_prob(X))


def test_a_flow_of_an_absent_device_comes_back_on_the_cpu(monkeypatch):
    flow = fastmaf.MAF(5)
    function, (data, _, _) = flow.__reduce__()
    monkeypatch.setattr(backends, "_loaded", {**backends._loaded, "cuda": "nothing here"})
    with pytest.warns(RuntimeWarning, match="a flow of cuda:0 is on the cpu now: the cuda backend is absent"):
        again = function(data, "cuda:0", "highest")
    assert (again.device, again.precision) == ("cpu", "highest") and np.array_equal(again.log_prob(X), flow.log_prob(X))


# What backends keep


class Slow:
    """A backend whose packing waits until it is let go."""

    name = "slow"

    def __init__(self):
        self.packing, self.go = threading.Event(), threading.Event()

    def unsupported(self, flow):
        return None

    def pack(self, flow):
        mean = float(flow.layers[0].loc[0])
        self.packing.set()
        assert self.go.wait(30)
        return mean

    def log_prob(self, flow, x, context, out):
        out[:] = flow.derived("slow", self.pack)


def test_a_pack_that_began_before_an_assignment_is_never_used_after_it(monkeypatch):
    slow = Slow()
    monkeypatch.setattr(backends, "active", slow)
    flow, results = fastmaf.Flow([Affine([1.0], [1.0])]), []
    reader = threading.Thread(target=lambda: results.append(flow.log_prob(np.zeros((1, 1)))[0]))
    reader.start()
    assert slow.packing.wait(30)
    flow.layers = [Affine([2.0], [1.0])]
    slow.go.set()
    reader.join()
    assert results == [1.0] and flow.log_prob(np.zeros((1, 1))) == [2.0]


def test_what_is_derived_is_made_once():
    record, made = FlowRecord([Affine([1.0], [2.0])]), []
    assert record.derived("a", lambda r: made.append(r) or "packed") == record.derived("a", lambda r: made.append(r)) == "packed"
    assert made == [record]


def test_another_backend_is_asked_again():
    class Picky:
        name = "picky"

        def unsupported(self, flow):
            return "any layer at all"

    flow = fastmaf.MAF(5)
    flow.log_prob(X)
    with make.using(Picky()), pytest.raises(NotImplementedError, match="the picky backend has no kernel for any layer at all"):
        flow.log_prob(X)
    flow.log_prob(X)


def unusual():
    """Flows that a file can hold and the compiled core cannot run, by what it says of them."""
    flow = fastmaf.MAF(3, context_features=2, hidden_features=(8, 8), seed=0, dtype="float64")
    layer = flow.layers[1]
    net = layer.conditioner

    def with_layer(**changes):
        return flow._with(layers=[flow.layers[0], replace(layer, **changes), *flow.layers[2:]])

    def with_network(**changes):
        return with_layer(conditioner=replace(net, **changes))

    norm = {"norm_scale": np.full(3, 1.5), "norm_shift": np.ones(3)}
    yield "an inner batch norm in front of the first map", with_network(initial=replace(net.initial, **norm))
    late = {"context": "gated", "context_weight": np.ones((6, 2))}
    yield "a context that enters the final map gated", with_network(final=replace(net.final, **late))
    late = {"context": "added", "context_weight": np.ones((6, 2)), "context_bias": np.ones(6)}
    yield "a context that enters the final map with a bias", with_network(final=replace(net.final, **late))
    bounds = Elementwise.from_bounds([(-50, 50)] * 3)
    yield "a Elementwise layer behind other layers", flow._with(layers=[*flow.layers, bounds])
    yield "context layers other than", flow._with(context_layers=[*flow.context_layers, Elementwise.from_bounds([(-50, 50)] * 2)])


@pytest.mark.parametrize(("message", "flow"), list(unusual()), ids=[message for message, _ in unusual()])
def test_what_the_core_cannot_run_is_refused_and_the_reference_runs_it(compiled, message, flow):
    x, context = np.zeros((2, 3)), np.zeros(2)
    for call in (lambda: flow.log_prob(x, context), lambda: flow.sample(2, context), lambda: flow.vjp(x, context, [1, 1])):
        with pytest.raises(NotImplementedError, match=f"no kernel for {re.escape(message)}"):
            call()
    with make.reference():
        assert np.isfinite(flow.log_prob(x, context)).all()


# Threads


@pytest.fixture
def eagerly_switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def while_reading(flow, expected, change, readers=8):
    """Run `change` while threads evaluate; every result must be one of `expected`."""
    stop, wrong = threading.Event(), []
    allowed = {values.tobytes() for values in expected}

    def read():
        try:
            while not stop.is_set():
                if flow.log_prob(X).tobytes() not in allowed:
                    wrong.append("a density that belongs to neither")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=read) for _ in range(readers)]
    for thread in threads:
        thread.start()
    try:
        change()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong


def test_readers_never_keep_old_weights(backend, eagerly_switching):
    pair = two_flows()
    expected = [flow.log_prob(X) for flow in pair]
    flow = fastmaf.MAF(5, seed=1)

    def assign():
        for k in range(60):
            flow.layers = pair[k % 2].layers
            assert np.array_equal(flow.log_prob(X), expected[k % 2])

    while_reading(flow, expected, assign, 8 if backend.startswith("cpu") else 2)


def test_readers_see_a_fit_whole(eagerly_switching):
    flow, other = fastmaf.MAF(5, transforms=2, seed=1), fastmaf.MAF(5, transforms=2, seed=1)
    settings = {"max_epochs": 2, "progress": False, "seed": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.fit(X, **settings)
        while_reading(flow, [flow.log_prob(X), other.log_prob(X)], lambda: flow.fit(X, **settings))
    assert np.array_equal(flow.log_prob(X), other.log_prob(X))


def test_an_ensemble_is_swapped_as_a_whole(eagerly_switching):
    ensemble, other = (fastmaf.MADE(5, masks=3, hidden_features=(20,), seed=1) for _ in range(2))
    settings = {"max_epochs": 2, "progress": False, "seed": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.fit(X, **settings)
        while_reading(ensemble, [ensemble.log_prob(X), other.log_prob(X)], lambda: ensemble.fit(X, **settings), 4)
    assert isinstance(ensemble.base, Normal) and not isinstance(ensemble.base, Terminal)


@pytest.mark.skipif(backends.reason("cpu") is not None, reason="the compiled core is absent")
def test_readers_do_not_mind_the_number_of_threads():
    flow = fastmaf.MAF(5, seed=1)

    def switch():
        for k in range(200):
            fastmaf.set_num_threads(1 + k % 4)
            flow.log_prob(X)

    before = fastmaf.get_num_threads()
    try:
        while_reading(flow, [flow.log_prob(X)], switch)
    finally:
        fastmaf.set_num_threads(before)
