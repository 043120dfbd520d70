"""Flows on a GPU: moving them there, arrays of the host and of the device, and what is refused.

Where the package was built with ``FASTMAF_CUDA=HOST`` the host stands in for a GPU, and arrays of a make-believe framework for its arrays.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import types

import make
import numpy as np
import pytest
from tolerances import PRECISIONS, assert_close

import fastmaf
from fastmaf import backends

absent = backends.reason("cuda")
needs_device = pytest.mark.skipif(absent is not None, reason=f"cuda: {absent}")


def state():
    from fastmaf import _core

    return _core.device_state()


class Pretended:
    """Memory of the host that says it lies on a device."""

    __module__ = "cupy"

    def __init__(self, values):
        self.values = values

    @property
    def __cuda_array_interface__(self):
        v = self.values
        return {
            "shape": v.shape,
            "typestr": v.dtype.str,
            "strides": v.strides,
            "data": (v.ctypes.data, not v.flags.writeable),
            "version": 3,
        }


class Framework:
    """How a framework moves arrays to the device and back."""

    def __init__(self, name, monkeypatch):
        self.name = name
        if name == "pretended":
            if state()["architectures"] != "host":
                pytest.skip("arrays of the host are no arrays of this device")
            cuda = types.SimpleNamespace(Device=lambda number: _Nothing(), get_current_stream=lambda: types.SimpleNamespace(ptr=0))
            module = types.SimpleNamespace(cuda=cuda, empty=lambda shape, dtype: Pretended(np.empty(shape, dtype)))
            monkeypatch.setitem(sys.modules, "cupy", module)
        else:
            self.module = pytest.importorskip(name)
            if name == "torch" and not self.module.cuda.is_available():
                pytest.skip("torch sees no GPU")

    def put(self, array):
        if self.name == "pretended":
            return Pretended(np.array(array))
        return self.module.as_tensor(array, device="cuda:0") if self.name == "torch" else self.module.asarray(array)

    def get(self, array):
        from fastmaf import _core

        _core.synchronize(0, 0)
        if self.name == "pretended":
            return array.values
        return array.cpu().numpy() if self.name == "torch" else self.module.asnumpy(array)


class _Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.fixture(params=["torch", "cupy", "pretended"])
def framework(request, monkeypatch):
    if absent is not None:
        pytest.skip(f"cuda: {absent}")
    return Framework(request.param, monkeypatch)


def conditional(dtype="float32"):
    bounds = [(0, None), *[None] * 4]
    return fastmaf.MAF(features=5, context_features=2, transforms=2, hidden_features=(20, 20), bounds=bounds, dtype=dtype, seed=1)


def rows(n):
    rng = np.random.default_rng(0)
    return np.abs(rng.normal(size=(n, 5))), rng.normal(size=(n, 2))


# Without a device too


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "", 3, None])
def test_unknown_devices_are_refused(device):
    with pytest.raises(ValueError, match="device is .*; it must be 'cpu', 'cuda' or 'cuda:' and a number"):
        fastmaf.MAF(features=2).to(device)


def test_a_device_that_is_absent_says_why(monkeypatch):
    monkeypatch.setitem(backends._loaded, "cuda", "no GPU was at hand")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(RuntimeError, match="the cuda backend is absent: no GPU was at hand"):
            fastmaf.MAF(features=2).to(device)
    assert fastmaf.show_config().values["cuda"] == "absent: no GPU was at hand"


def test_a_flow_of_the_host_refuses_arrays_of_a_device():
    flow = conditional()
    x, context = rows(3)
    for call in (
        lambda: flow.log_prob(Pretended(x), context),
        lambda: flow.log_prob(x, Pretended(context)),
        lambda: flow.sample(3, Pretended(context)),
    ):
        with pytest.raises(ValueError, match="is a CUDA array; this flow computes on the CPU"):
            call()


def test_a_tensor_that_wants_a_gradient_is_refused():
    class Tensor:
        @property
        def __cuda_array_interface__(self):
            raise RuntimeError("requires grad")

    with pytest.raises(ValueError, match=r"x requires a gradient, .* hand over x.detach\(\)"):
        fastmaf.MAF(features=2).log_prob(Tensor())


# On a device


@needs_device
def test_a_flow_moves_and_says_where_it_is():
    flow = fastmaf.MAF(features=3)
    there = flow.to("cuda", precision="highest")
    assert (flow.device, there.device) == ("cpu", "cuda:0")
    assert "device=cuda:0" in repr(there) and "on cuda:0" in there.summary() and "cuda" not in repr(flow)
    assert there.astype("float64").device == there.with_parameters(there.parameters()).device == "cuda:0"
    assert there.to("cpu").device == "cpu" and repr(there.to("cpu")) == repr(flow)
    again = pickle.loads(pickle.dumps(there))
    assert (again.device, again.precision) == ("cuda:0", "highest")
    values = fastmaf.show_config().values
    assert values["cuda"] == "available" and values["cuda:0"] and values["cuda kernels"]


@needs_device
def test_a_device_that_is_not_there_is_named():
    with pytest.raises(RuntimeError, match="there is no cuda:99 here; there is cuda:0, "):
        fastmaf.MAF(features=2).to("cuda:99")


@pytest.fixture(params=["high", "medium"])
def precision(request):
    """What runs on tensor cores."""
    if absent is not None:
        pytest.skip(f"cuda: {absent}")
    return request.param


@pytest.mark.parametrize("n", [1, 33, 300])
def test_precisions(precision, n):
    flow, (x, context) = conditional(), rows(n)
    exact, there, highest = flow.astype("float64"), flow.to("cuda", precision), flow.to("cuda", "highest")
    for given in (context, context[0], context[:3, None]):
        for operation in ("log_prob", "to_noise"):
            result, expected = getattr(there, operation)(x, given), getattr(exact, operation)(x, given)
            assert_close(operation, "float32", result, expected, PRECISIONS[precision])
            assert_close(operation, "float32", getattr(highest, operation)(x, given), expected)
            assert n == 1 or (result != getattr(highest, operation)(x, given)).any()
    noise = np.random.default_rng(3).normal(size=x.shape)
    result, expected = there.from_noise(noise, context), exact.from_noise(noise, context)
    assert_close("from_noise", "float32", result, expected, PRECISIONS[precision])
    assert n == 1 or (result != highest.from_noise(noise, context)).any()
    draws, density = there.sample_and_log_prob(n, context[:3], seed=1)
    expected, of_expected = exact.sample_and_log_prob(n, context[:3], seed=1)
    assert_close("sample", "float32", draws, expected, PRECISIONS[precision])
    assert_close("density of samples", "float32", density, of_expected, PRECISIONS[precision])
    assert np.array_equal(there.sample(n, context[:3], seed=1), draws)
    assert np.array_equal(there.sample(n, context[:3], seed=1, offset=1)[:, :-1], draws[:, 1:])
    in_double = flow.astype("float64").to("cuda", precision)
    assert np.array_equal(in_double.log_prob(x, context), in_double.to("cuda", "highest").log_prob(x, context))


@pytest.mark.parametrize(
    "name", ["blocks", "front of 9", "6 (3, 3) 2", "7 (17, 5) 1", "without hidden layers", "fixed layers in front", "mixtures"]
)
def test_precisions_of_other_stages(precision, name):
    if name == "mixtures":
        flow = fastmaf.MAF(features=6, transforms=2, components=3, linear=True, batch_norm=True, seed=1)
        x, context = np.random.default_rng(0).normal(size=(70, 6)).astype("float32"), None
    else:
        case = make.case(name, "float32")
        flow, x, context = case.flow, case.x, case.context
    result, expected = flow.to("cuda", precision).log_prob(x, context), flow.astype("float64").log_prob(x, context)
    assert_close("log_prob", "float32", result, expected, PRECISIONS[precision])


def test_rows_beyond_halves_are_computed_as_without(precision):
    """NaN, infinity and numbers that no half can hold; a masked column changes nothing, whatever it is."""
    flow = make.flow(9, (30, 20), 1, seed=2, dtype="float32")
    ranks = flow.layers[0].ranks
    there, highest = flow.to("cuda", precision), flow.to("cuda", "highest")
    row = np.random.default_rng(0).normal(size=9).astype("float32")
    before = there.to_noise(row[None])[0]
    for value in (2.5, 1e5, -1e30, np.nan, np.inf, -np.inf):
        x = np.repeat(row[None], 9, axis=0)
        np.fill_diagonal(x, value)
        result, exact, density = there.to_noise(x), highest.to_noise(x), there.log_prob(x)
        for j in range(9):
            earlier, later = ranks < ranks[j], ranks > ranks[j]
            if np.isfinite(value):
                assert np.array_equal(result[j, earlier], before[earlier])
            else:  # rows are finite or NaN throughout
                assert np.isnan(result[j]).all()
            assert value == 2.5 or np.array_equal(result[j, later], exact[j, later], equal_nan=True)
            assert value == 2.5 or not later.any() or np.array_equal(density[j], highest.log_prob(x)[j], equal_nan=True)


@needs_device
def test_small_networks_are_left_to_float32():
    """Where bringing the halves would take longer than the products; the other tests have tensor cores always."""
    program = """
import fastmaf, numpy as np
x = np.random.default_rng(0).normal(size=(300, 5))
results = []
for units in (8, 512):
    flow = fastmaf.MAF(features=5, transforms=2, hidden_features=(units, units), seed=1)
    high, highest = flow.to("cuda", "medium"), flow.to("cuda", "highest")
    results.append(np.array_equal(high.log_prob(x), highest.log_prob(x)))
print(*results)
"""
    environment = os.environ | {"FASTMAF_TENSOR_CORES": "auto"}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert found.stdout.split() == ["True", "False"], found.stderr
    environment["FASTMAF_TENSOR_CORES"] = "yes"
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert "FASTMAF_TENSOR_CORES is neither auto nor always" in found.stderr


FORMS = [
    ((9, 7), (1,)),
    ((9, 7), (9, 1)),
    ((9, 7), (5, 1, 1)),
    ((5, 9, 7), (1,)),
    ((5, 9, 7), (5, 1)),
    ((5, 9, 7), (5, 1, 1)),
    ((5, 9, 7), (5, 9, 1)),
    ((1, 7), (5, 1, 1)),
    ((5, 1, 7), (5, 1, 1)),
    ((1, 7), (9, 1)),
    ((0, 7), (5, 1, 1)),
    ((0, 7), (1,)),
    ((2, 7), (700, 1, 1)),
    ((700, 7), (2, 1, 1)),
]


@needs_device
@pytest.mark.parametrize(("x_shape", "context_shape"), FORMS)
def test_gradients_of_arrays_of_a_device(framework, dtype, x_shape, context_shape):
    """They have the shapes of x and of the context; over what is shared they are sums."""
    flow = make.case("7 (17, 5) 1", dtype).flow
    there, rng = flow.to("cuda"), np.random.default_rng(0)
    x, context = rng.normal(size=x_shape).astype(dtype), rng.normal(size=context_shape)
    g = rng.integers(-3, 4, flow.log_prob(x, context).shape).astype("int8")
    of_x, of_context, of_g = framework.put(x), framework.put(context), framework.put(g)
    with make.reference():
        exact = flow.astype("float64")
        expected = *exact.log_prob_and_grad(x, context), *exact.vjp(x, context, g)
    results = *there.log_prob_and_grad(of_x, of_context), *there.vjp(of_x, of_context, of_g)
    operations = ("log_prob", "gradient", "gradient", "gradient", "gradient", "parameters")
    for operation, result, right in zip(operations, results, expected, strict=True):
        assert type(result) is type(of_x) and framework.get(result).dtype == dtype
        assert_close(operation, dtype, framework.get(result), right)
    again = there.vjp(of_x, of_context, of_g)
    assert all(np.array_equal(framework.get(a), framework.get(b)) for a, b in zip(again, results[3:], strict=True))
    for result, right in zip(there.vjp(x, context, g), expected[3:], strict=True):  # the same weights, rows of the host
        assert_close("parameters", dtype, result, right)


@needs_device
@pytest.mark.parametrize("name", ["front", "mixture softplus", "bernoulli", "mixed", "no context"])
def test_gradients_of_odd_arrays_of_a_device(framework, name):
    if name == "bernoulli":
        flow = fastmaf.MADE(5, "bernoulli", seed=1)
        x, context = np.random.default_rng(0).integers(2, size=(70, 5)), None
    elif name == "mixed":
        flow = fastmaf.MADE(5, "mixed", categories=[None, 3, 2, None, None], seed=1)
        x, context = np.random.default_rng(0).integers(2, size=(70, 5)) + [0.3, 0, 0, -0.4, 0.1], None
    elif name == "no context":
        flow = fastmaf.MAF(5, seed=1)
        x, context = np.random.default_rng(0).normal(size=(70, 5)), None
    else:
        case = make.case(name, "float32")
        flow, x, context = case.flow, case.x, case.context
    there, g = flow.to("cuda"), np.random.default_rng(1).normal(size=len(x))
    turned = [None if array is None else framework.put(array[::-1]) for array in (x, context, g)]
    expected = flow.astype("float64").vjp(*(None if array is None else array[::-1] for array in (x, context, g)))
    for operation, result, right in zip(("gradient", "gradient", "parameters"), there.vjp(*turned), expected, strict=True):
        assert (result is None) == (right is None)
        if right is not None:
            assert_close(operation, "float32", framework.get(result), right, factor=3)
    if name not in ("bernoulli", "mixed"):
        value, dx, dcontext = there.log_prob_and_grad(turned[0], turned[1])
        right = flow.astype("float64").log_prob_and_grad(x[::-1], None if context is None else context[::-1])
        assert_close("log_prob", "float32", framework.get(value), right[0])
        assert_close("gradient", "float32", framework.get(dx), right[1])
        assert (dcontext is None) == (context is None)


@needs_device
def test_cotangents_lie_with_the_rows(framework):
    there, (x, context) = conditional().to("cuda"), rows(5)
    g = np.ones(5)
    with pytest.raises(ValueError, match="x is a CUDA array and cotangent is not; both must lie in one place"):
        there.vjp(framework.put(x), framework.put(context), g)
    with pytest.raises(ValueError, match="cotangent is a CUDA array and x is not"):
        there.vjp(x, context, framework.put(g))
    with pytest.raises(ValueError, match=r"cotangent has shape \(4,\); log_prob has shape \(5,\)"):
        there.vjp(framework.put(x), framework.put(context), framework.put(g[:4]))
    with pytest.raises(ValueError, match="cotangent is a CUDA array; this flow computes on the CPU"):
        conditional().vjp(x, context, framework.put(g))


@needs_device
@pytest.mark.parametrize("n", [1, 33, 3000])
def test_gradients_of_rows_of_the_host_are_streamed(n, dtype):
    flow, (x, context) = conditional(dtype), rows(n)
    there, exact, g = flow.to("cuda"), flow.astype("float64"), np.random.default_rng(2).normal(size=n)
    for given in (context, context[0], context[:3, None]):
        weights = g if given.ndim < 3 else np.broadcast_to(g, (len(given), n))
        for result, right in zip(there.vjp(x, given, weights), exact.vjp(x, given, weights), strict=True):
            assert type(result) is np.ndarray and result.dtype == dtype
            assert_close("parameters", dtype, result, right, factor=10)


@needs_device
@pytest.mark.parametrize("n", [1, 33, 1000, 40000])
def test_arrays_of_the_host_are_streamed(n, dtype):
    flow = conditional(dtype)
    there = flow.to("cuda")
    x, context = rows(n)
    for given in (context, context[0]):
        assert_close("log_prob", dtype, there.log_prob(x, given), flow.log_prob(x, given).astype("float64"))
        assert_close("to_noise", dtype, there.to_noise(x, given), flow.to_noise(x, given).astype("float64"))
    first, second = there.sample(n // 3, context[:3], seed=1), there.sample(n // 3, context[1:3], seed=1, context_offset=1)
    assert np.array_equal(first[1:3], second[: len(first) - 1])
    assert_close("sample", dtype, first, flow.sample(n // 3, context[:3], seed=1).astype("float64"))


@needs_device
def test_arrays_of_a_device_are_used_in_place(framework, dtype):
    flow = conditional(dtype)
    there = flow.to("cuda")
    x, context = rows(300)
    of_x, of_context = framework.put(x), framework.put(context)
    result = there.log_prob(of_x, of_context)
    assert type(result) is type(of_x)
    assert_close("log_prob", dtype, framework.get(result), flow.log_prob(x, context).astype("float64"))
    noise = there.to_noise(of_x, of_context)
    assert_close("to_noise", dtype, framework.get(noise), flow.to_noise(x, context).astype("float64"))
    assert_close("round trip", dtype, framework.get(there.from_noise(noise, of_context)), x, factor=20)
    for mine, own, at in ((there.to_noise, flow.to_noise, of_x), (there.from_noise, flow.from_noise, noise)):
        results, expected = mine(at, of_context, log_det=True), own(framework.get(at), context, log_det=True)
        assert type(results[1]) is type(of_x)
        for result, right in zip(results, expected, strict=True):
            assert_close("round trip", dtype, framework.get(result), right.astype("float64"))
    one = framework.put(context[0])
    assert_close("log_prob", dtype, framework.get(there.log_prob(of_x, one)), flow.log_prob(x, context[0]).astype("float64"))
    groups = framework.put(context[:4, None])
    assert_close("log_prob", dtype, framework.get(there.log_prob(of_x, groups)), flow.log_prob(x, context[:4, None]).astype("float64"))
    draws, density = there.sample_and_log_prob(10, framework.put(context[:4]), seed=3)
    expected = flow.sample_and_log_prob(10, context[:4], seed=3)
    assert_close("sample", dtype, framework.get(draws), expected[0].astype("float64"))
    assert_close("log_prob", dtype, framework.get(density), expected[1].astype("float64"), factor=4)


@needs_device
def test_results_are_written_where_the_caller_says(framework):
    flow = fastmaf.MAF(features=5, seed=1)
    there = flow.to("cuda")
    out = framework.put(np.zeros((20, 5), "float32"))
    assert there.sample(20, seed=4, out=out) is out
    assert_close("sample", "float32", framework.get(out), flow.sample(20, seed=4).astype("float64"))
    for wrong, message in (
        (np.zeros((20, 5), "float64"), "and dtype float64; the result has"),
        (np.zeros((20, 4), "float32"), r"out has shape \(20, 4\) and dtype float32; the result has shape \(20, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            there.sample(20, seed=4, out=framework.put(wrong))
    x = np.zeros((20, 5), "float32")
    with pytest.raises(ValueError, match="out is of type ndarray; it must be a CUDA array"):
        there.log_prob(framework.put(x), out=np.zeros(20, "float32"))
    with pytest.raises(ValueError, match="out is a CUDA array and context is not|x is a CUDA array|is a CUDA array and .* is not"):
        there.log_prob(x, out=framework.put(np.zeros(20, "float32")))


@needs_device
def test_arrays_that_overlap_or_are_not_aligned_are_refused(framework):
    if framework.name != "pretended":
        pytest.skip("views are cut out of memory of the host")
    flow = fastmaf.MADE(1, context_features=1).to("cuda")
    memory = np.zeros(100, np.float32)
    with pytest.raises(ValueError, match="out shares memory with an input"):
        flow.sample(1, Pretended(memory[:40].reshape(40, 1)), seed=1, out=Pretended(memory[39:79].reshape(40, 1, 1)))
    with pytest.raises(ValueError, match="x is not aligned to its 4 bytes"):
        flow.log_prob(Pretended(memory.view(np.uint8)[3:43].view(np.float32).reshape(10, 1)), Pretended(memory[:1]))


@needs_device
def test_arrays_of_two_places_are_refused(framework):
    there = conditional().to("cuda")
    x, context = rows(5)
    with pytest.raises(ValueError, match="x is a CUDA array and context is not; both must lie in one place"):
        there.log_prob(framework.put(x), context)
    with pytest.raises(ValueError, match="context is a CUDA array and x is not"):
        there.log_prob(x, framework.put(context))
    with pytest.raises(ValueError, match="x has dtype complex64"):
        there.log_prob(framework.put(x.astype("complex64")), framework.put(context))
    with pytest.raises(ValueError, match=r"x has shape \(5, 4\); the flow has 5 features"):
        there.log_prob(framework.put(x[:, :4]), framework.put(context))


@needs_device
def test_empty_arrays_and_odd_strides(framework):
    flow = fastmaf.MAF(features=5, seed=1)
    there = flow.to("cuda")
    assert framework.get(there.log_prob(framework.put(np.zeros((0, 5))))).shape == (0,)
    x = np.random.default_rng(1).normal(size=(5, 40))
    turned = framework.put(x)
    turned = Pretended(turned.values.T) if framework.name == "pretended" else turned.T
    assert_close("log_prob", "float32", framework.get(there.log_prob(turned)), flow.log_prob(x.T).astype("float64"))


@needs_device
def test_samples_of_a_device_are_scored_under_their_contexts(framework, dtype):
    flow = conditional(dtype)
    there = flow.to("cuda")
    context = rows(4)[1]
    of_context = framework.put(context)
    samples = there.sample(10, of_context, seed=3)
    expected = flow.log_prob(framework.get(samples), context).astype("float64")
    assert_close("log_prob", dtype, framework.get(there.log_prob(samples, of_context)), expected, factor=4)
    assert_close("log_prob", dtype, there.log_prob(framework.get(samples), context), expected, factor=4)
    x = rows(1)[0]
    assert_close(
        "log_prob", dtype, framework.get(there.log_prob(framework.put(x), of_context)), flow.log_prob(x, context).astype("float64")
    )
    assert_close("log_prob", dtype, there.log_prob(x, context), flow.log_prob(x, context).astype("float64"))


class Spoken:
    """Memory of the host that says, by DLPack alone, that it lies on a device."""

    def __init__(self, values):
        self.values = values

    def __dlpack__(self, stream=None):
        assert stream == 1  # the default stream, on which the array is then used
        return self.values.__dlpack__()

    def __dlpack_device__(self):
        return (2, 0)


Spoken.__module__ = "spoken"


@needs_device
def test_arrays_of_a_device_that_only_speak_dlpack(framework, monkeypatch):
    if framework.name != "pretended":
        pytest.skip("arrays of the host stand for those of a device")
    flow = conditional()
    there = flow.to("cuda")
    x, context = rows(30)
    expected = flow.log_prob(x, context).astype("float64")
    result = there.log_prob(Spoken(x[::-1]), Spoken(context[::-1]))
    assert type(result) is Pretended  # a package that takes nothing over DLPack gets what its neighbour allocates
    assert_close("log_prob", "float32", result.values[::-1], expected)
    monkeypatch.setitem(sys.modules, "spoken", types.SimpleNamespace(from_dlpack=lambda array: Spoken(array.values)))
    for result in (there.log_prob(Spoken(x), Spoken(context)), there.log_prob(Spoken(x), framework.put(context))):
        assert type(result) is Spoken
        assert_close("log_prob", "float32", result.values, expected)
    assert type(there.sample(3, Spoken(context), seed=1)) is Spoken
    with pytest.raises(ValueError, match="x has dtype complex64"):
        there.log_prob(Spoken(x.astype("complex64")), Spoken(context))


@needs_device
def test_tensors_of_the_host_are_streamed_and_come_back_as_tensors(monkeypatch):
    class Tensor:
        def __init__(self, values):
            self.values = values

        def __array__(self, dtype=None, copy=None):
            return self.values

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(Tensor=Tensor, from_numpy=Tensor))
    flow = conditional()
    x, context = rows(30)
    result = flow.to("cuda").log_prob(Tensor(x), Tensor(context))
    assert type(result) is Tensor
    assert_close("log_prob", "float32", result.values, flow.log_prob(x, context).astype("float64"))


@needs_device
def test_a_signal_handler_may_use_the_device():
    """In the middle of a call that streams rows, even of the same flow."""
    flow, (x, context) = conditional().to("cuda"), rows(5000)
    expected, inside = flow.log_prob(x, context), []

    def handler(*_):
        inside.append(flow.log_prob(x[:3], context[:3]))

    before = signal.signal(signal.SIGALRM, handler)
    try:
        deadline = time.monotonic() + 20
        while not inside and time.monotonic() < deadline:
            threading.Timer(0.002, lambda: os.kill(os.getpid(), signal.SIGALRM)).start()
            assert np.array_equal(flow.log_prob(x, context), expected)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert inside and all(np.array_equal(got, expected[:3]) for got in inside)


def test_other_python_threads_run_while_a_flow_is_deleted(framework):
    """Its end waits for the device."""
    flow, (x, context) = conditional().to("cuda", "highest"), rows(40_000)
    x, context, ticks, done = framework.put(x), framework.put(context), [], threading.Event()
    results = flow.log_prob(x, context)  # only enqueued

    def tick():
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    other = threading.Thread(target=tick)
    other.start()
    begin = time.perf_counter()
    del flow
    end = time.perf_counter()
    done.set()
    other.join()
    if end - begin > 0.1:
        assert sum(begin < at < end for at in ticks) > 3
    assert np.isfinite(framework.get(results)).all()


@needs_device
def test_a_process_ends_with_a_flow_on_the_device():
    """Its end comes while the interpreter goes down."""
    code = """
import fastmaf, sys
flow = fastmaf.MAF(features=2, seed=1).to("cuda")
flow.sample(10, seed=1)
sys.kept = flow  # until modules are taken apart
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# Ensembles, and partial information


def ensembles(kind, dtype):
    if kind == "masks":
        return fastmaf.MADE(5, context_features=2, hidden_features=(20,), masks=3, dtype=dtype, seed=1)
    flow = fastmaf.MAF(5, context_features=2, transforms=1, hidden_features=(20,), order="sequential", dtype=dtype, seed=1)
    return fastmaf.Ensemble(flow, members=3, seed=2)


@needs_device
@pytest.mark.parametrize("kind", ["masks", "flows"])
def test_ensembles_compute_where_they_are_moved(framework, kind, dtype):
    here, (x, context) = ensembles(kind, dtype), rows(40)
    there, g = here.to("cuda", "highest"), np.random.default_rng(4).normal(size=40)
    assert (here.device, there.device, there.precision) == ("cpu", "cuda:0", "highest") and "cuda:0" in repr(there)
    assert there.member(1).device == there.astype("float64").device == there.with_parameters(there.parameters()).device == "cuda:0"
    again = pickle.loads(pickle.dumps(there))
    assert (again.device, again.precision, again.to("cpu").device) == ("cuda:0", "highest", "cpu")
    of_x, of_context, of_g = framework.put(x), framework.put(context), framework.put(g)

    def results(flow, x, context, g):
        value, dx, dcontext = flow.log_prob_and_grad(x, context)
        yield from (("log_prob", flow.log_prob(x, context)), ("log_prob", value), ("gradient", dx), ("gradient", dcontext))
        yield from zip(("gradient", "gradient", "parameters"), flow.vjp(x, context, g), strict=True)
        yield "sample", flow.sample(8, context, seed=3, offset=2)
        yield from zip(("sample", "log_prob"), flow.sample_and_log_prob(8, context, seed=3), strict=True)

    expected = list(results(here.astype("float64"), x, context, g))
    for (operation, right), (_, streamed), (_, result) in zip(
        expected, results(there, x, context, g), results(there, of_x, of_context, of_g), strict=True
    ):
        assert type(streamed) is np.ndarray and type(result) is type(of_x) and framework.get(result).dtype == dtype
        assert_close(operation, dtype, streamed, right, factor=2)
        assert np.array_equal(framework.get(result), streamed)
    out = framework.put(np.zeros(40, dtype))
    assert there.log_prob(of_x, of_context, out=out) is out and np.array_equal(framework.get(out), there.log_prob(x, context))
    out = framework.put(np.zeros((40, 8, 5), dtype))
    assert there.sample(8, context, seed=3, out=out) is out and np.array_equal(framework.get(out), there.sample(8, context, seed=3))
    with pytest.raises(ValueError, match=r"out has shape .*; the result has shape \(3, 5\)"):
        there.sample(3, context[0], out=out)
    with pytest.raises(ValueError, match="x is a CUDA array; this flow computes on the CPU"):
        here.log_prob(of_x, of_context)
    with pytest.raises(ValueError, match="members of an ensemble have the same"):
        fastmaf.Ensemble([here.member(0), there.member(0)])


@needs_device
def test_values_that_are_given_lie_where_the_flow_computes(framework, monkeypatch):
    _, context = rows(4)
    kind, counted = type(backends.placed("cuda:0", "high")), []
    for name in ("sample", "from_noise"):
        call = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *arguments, call=call: (counted.append(1), call(*arguments))[1])
    for here in (ensembles("flows", "float64"), ensembles("flows", "float64").member(0)):
        there = here.to("cuda")
        assert there.prefix(2).device == "cuda:0"
        for x in (np.array([0.3, -0.2]), np.random.default_rng(0).normal(size=(4, 3))):
            expected = here.sample_given(x, 6, context, seed=5)
            assert not counted
            result = there.sample_given(framework.put(x), 6, framework.put(context), seed=5)
            assert type(result) is type(framework.put(x))
            np.testing.assert_allclose(framework.get(result), expected, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(there.sample_given(x, 6, context, seed=5), expected, rtol=1e-12, atol=1e-12)
            assert len(counted) >= 2
            counted.clear()
