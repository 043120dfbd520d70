"""`Flow`: the rules of shapes, types, contexts, seeds and outputs, on every backend; its record, parameters and copies.

Every flow here has random weights in all maps.  Whether the numbers are right is the business of the tests of the operations.
"""

from __future__ import annotations

import copy
import pickle
import re

import numpy as np
import pytest
import tolerances

import fastmaf
from fastmaf.layers import Affine, Autoregressive, Elementwise, Linear, Normal, Permutation

D, C = 5, 2
NO_VJP = "the numba backend has no gradients in parameters, hence no vjp"


def assert_close(operation, dtype, actual, other):
    """Two results of one backend: each may be off by the tolerance."""
    tolerances.assert_close(operation, dtype, actual, other, factor=2)


def make(dtype="float32", context_features=C, **options):
    """A small flow with standardisation on both sides."""
    options = {"transforms": 3, "hidden_features": (9, 11), "activation": "tanh", "dtype": dtype, "seed": 0, **options}
    flow = fastmaf.MAF(D, context_features, **options)
    flow.layers = [Affine(np.arange(D) / 4, 1 + np.arange(D) / 8) if isinstance(layer, Affine) else layer for layer in flow.layers]
    if context_features:
        flow.context_layers = [Affine([0.25, -0.5], [2.0, 0.5])]
    return flow


def inputs(*shape, seed=0):
    """Numbers of which every float dtype holds each exactly."""
    return np.random.default_rng(seed).integers(-128, 128, shape) / 64


SHAPES = [((7, D), (C,)), ((7, D), (7, C)), ((7, D), (3, 1, C)), ((3, 7, D), (C,)), ((3, 7, D), (3, 1, C)), ((3, 7, D), (3, 7, C))]


@pytest.mark.parametrize(("x_shape", "context_shape"), SHAPES)
def test_shapes_mean_what_they_say(backend, dtype, x_shape, context_shape):
    flow, x, context = make(dtype), inputs(*x_shape), inputs(*context_shape, seed=1)
    value = flow.log_prob(x, context)
    rows = (*value.shape, D)
    flat_x = np.broadcast_to(x, rows).reshape(-1, D)
    flat_context = np.broadcast_to(context, (*value.shape, C)).reshape(-1, C)
    assert value.dtype == dtype
    assert_close("log_prob", dtype, value.ravel(), flow.log_prob(flat_x, flat_context))
    noise = flow.to_noise(x, context)
    assert noise.shape == rows and noise.dtype == dtype
    assert_close("to_noise", dtype, noise.reshape(-1, D), flow.to_noise(flat_x, flat_context))
    back = flow.from_noise(x, context)
    assert back.shape == rows and back.dtype == dtype
    assert_close("from_noise", dtype, back.reshape(-1, D), flow.from_noise(flat_x, flat_context))


@pytest.mark.parametrize(("x_shape", "context_shape"), SHAPES)
def test_gradients_are_summed_over_what_is_shared(backend, dtype, x_shape, context_shape):
    flow, x, context = make(dtype), inputs(*x_shape), inputs(*context_shape, seed=1)
    value, dx, dcontext = flow.log_prob_and_grad(x, context)
    assert_close("log_prob", dtype, value, flow.log_prob(x, context))
    assert dx.shape == x.shape and dcontext.shape == context.shape and dx.dtype == dcontext.dtype == dtype
    rows = value.shape
    cotangent = inputs(*rows, seed=2)
    flat_x, flat_context = np.broadcast_to(x, (*rows, D)).reshape(-1, D), np.broadcast_to(context, (*rows, C)).reshape(-1, C)
    if backend == "numba":
        pytest.skip(NO_VJP)
    ones = flow.vjp(x, context, np.ones(rows))
    assert_close("gradient", dtype, dx, ones[0])
    assert_close("gradient", dtype, dcontext, ones[1])
    flat = flow.vjp(flat_x, flat_context, cotangent.ravel())
    shaped = flow.vjp(x, context, cotangent)
    for shared, own, single in zip(shaped[:2], (x, context), flat[:2], strict=True):
        padded = (1,) * (len(rows) + 1 - own.ndim) + own.shape
        axes = tuple(axis for axis in range(len(rows)) if padded[axis] != rows[axis])
        assert_close("gradient", dtype, shared.ravel(), single.reshape(*rows, -1).sum(axis=axes, dtype=np.float64).ravel())
    assert_close("parameters", dtype, shaped[2], flat[2])


def test_without_context_there_is_no_gradient_in_it(backend):
    flow = make(context_features=0)
    assert flow.log_prob_and_grad(inputs(4, D))[2] is None
    if backend != "numba":
        assert flow.vjp(inputs(4, D), None, np.ones(4))[1] is None


def test_numba_says_that_it_has_no_gradients_in_parameters(backend):
    if backend == "numba":
        with pytest.raises(ValueError, match="numba backend has no gradient in parameters"):
            make(context_features=0).vjp(inputs(4, D), None, np.ones(4))


@pytest.mark.parametrize("numbers", ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "g", ">f4", ">f8", ">i2"])
def test_every_real_dtype_means_its_numbers(backend, dtype, numbers):
    flow = make(dtype)
    integers = np.random.default_rng(0).integers(0, 2 if numbers == "?" else 4, (9, D + C))
    x, context = integers[:, :D].astype(numbers), integers[:, D:].astype(numbers)
    assert np.array_equal(flow.log_prob(x, context), flow.log_prob(x.astype(float), context.astype(float)))
    assert np.array_equal(flow.from_noise(x, context[0]), flow.from_noise(x.astype(float), context[0].astype(float)))


def unaligned(x):
    data = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    data[...] = x
    return data


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


LAYOUTS = {
    "Fortran": np.asfortranarray,
    "columns apart": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "rows apart": lambda x: np.repeat(x, 3, axis=-2)[..., ::3, :],
    "rows turned": lambda x: x[..., ::-1, :].copy()[..., ::-1, :],
    "columns turned": lambda x: x[..., ::-1].copy()[..., ::-1],
    "unaligned": unaligned,
    "read-only": read_only,
    "list": np.ndarray.tolist,
    "field": lambda x: np.rec.fromarrays([x, x], names="a, b")["b"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("numbers", ["f4", "f8"])
def test_every_layout_means_its_numbers(backend, layout, numbers):
    flow, x, context = make(), inputs(3, 20, D).astype(numbers), inputs(3, 20, C, seed=1).astype(numbers)
    laid = LAYOUTS[layout]
    assert np.array_equal(flow.log_prob(laid(x), laid(context)), flow.log_prob(x, context))
    assert np.array_equal(flow.log_prob(laid(x[0]), laid(context[0])), flow.log_prob(x[0], context[0]))
    assert np.array_equal(flow.to_noise(laid(x), laid(context)), flow.to_noise(x, context))
    assert np.array_equal(flow.from_noise(laid(x), laid(context)), flow.from_noise(x, context))
    assert np.array_equal(flow.sample(3, laid(context[0]), seed=1), flow.sample(3, context[0], seed=1))
    for a, b in zip(flow.log_prob_and_grad(laid(x), laid(context)), flow.log_prob_and_grad(x, context), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_cotangent_means_its_numbers(layout):
    flow, x, context, cotangent = make(), inputs(3, 20, D), inputs(C), inputs(3, 20, seed=2)
    for a, b in zip(flow.vjp(x, context, LAYOUTS[layout](cotangent)), flow.vjp(x, context, cotangent), strict=True):
        assert np.array_equal(a, b)


def test_repeated_rows_and_a_memmap(backend, tmp_path):
    flow, row = make(context_features=0), inputs(D).astype("f4")
    np.save(tmp_path / "x.npy", np.tile(row, (50, 1)))
    expected = flow.log_prob(np.tile(row, (50, 1)))
    assert np.array_equal(flow.log_prob(np.broadcast_to(row, (50, D))), expected)
    assert np.array_equal(flow.log_prob(np.load(tmp_path / "x.npy", mmap_mode="r")), expected)


def test_no_input_is_written_to(backend):
    flow, x, context, cotangent = make(), inputs(4, D).astype("f4"), inputs(C).astype("f4"), np.ones(4, np.float32)
    before = [array.copy() for array in (x, context, cotangent)]
    flow.log_prob(x, context), flow.to_noise(x, context), flow.from_noise(x, context), flow.sample(3, context)
    flow.log_prob_and_grad(x, context)
    if backend != "numba":
        flow.vjp(x, context, cotangent)
    for array, old in zip((x, context, cotangent), before, strict=True):
        assert np.array_equal(array, old)


@pytest.mark.parametrize("x_shape", [(0, D), (0, 4, D), (3, 0, D)])
def test_no_rows_give_no_rows(backend, dtype, x_shape):
    flow, x, context = make(dtype), np.zeros(x_shape), np.zeros(C)
    assert flow.log_prob(x, context).shape == x_shape[:-1]
    assert flow.to_noise(x, context).shape == flow.from_noise(x, context).shape == x_shape
    value, dx, dcontext = flow.log_prob_and_grad(x, context)
    assert value.shape == x_shape[:-1] and dx.shape == x_shape and not dcontext.any()
    assert not flow.vjp(x, context, np.zeros(x_shape[:-1]))[2].any()
    assert flow.log_prob(np.zeros((4, D)), np.zeros((0, 1, C))).shape == (0, 4)
    assert flow.log_prob_and_grad(np.zeros((4, D)), np.zeros((0, 1, C)))[1].tolist() == np.zeros((4, D)).tolist()


def test_no_samples(backend, dtype):
    flow = make(dtype)
    assert flow.sample(0, np.zeros(C)).shape == (0, D)
    assert flow.sample(0, np.zeros((4, C))).shape == (4, 0, D)
    assert flow.sample(3, np.zeros((0, C))).shape == (0, 3, D)
    assert [array.shape for array in flow.sample_and_log_prob(0, np.zeros(C))] == [(0, D), (0,)]


def test_out_is_filled_and_returned(backend, dtype):
    flow, x, context = make(dtype), inputs(7, D), inputs(3, 1, C, seed=1)
    out = np.full((3, 7), np.nan, dtype)
    assert flow.log_prob(x, context, out=out) is out
    assert np.array_equal(out, flow.log_prob(x, context))
    out = np.full((3, 7, D), np.nan, dtype)
    assert flow.sample(7, context[:, 0], seed=1, out=out) is out
    assert np.array_equal(out, flow.sample(7, context[:, 0], seed=1))
    out = np.full((7, D), np.nan, dtype)
    assert flow.sample(7, context[0, 0], seed=1, out=out) is out
    assert np.array_equal(out, flow.sample(7, context[0, 0], seed=1))


def test_a_wrong_out_is_refused():
    flow = make(context_features=0)
    with pytest.raises(ValueError, match=re.escape("out has shape (4,) and dtype float32; the result has shape (7,) and dtype float32")):
        flow.log_prob(inputs(7, D), out=np.empty(4, np.float32))
    with pytest.raises(ValueError, match="out shares memory with an input"):
        x = inputs(7, D).astype("f4")
        flow.log_prob(x, out=x.reshape(-1)[:7])
    with pytest.raises(ValueError, match="out is not C-contiguous"):
        flow.sample(7, out=np.empty((7, D), np.float32, order="F"))


# Samples


@pytest.mark.parametrize("split", [0, 1, 4, 17, 40])
def test_samples_split_anywhere(backend, dtype, split):
    flow, context = make(dtype), inputs(C)
    whole, density = flow.sample_and_log_prob(40, context, seed=5)
    assert np.array_equal(whole, flow.sample(40, context, seed=5))
    parts = [flow.sample(split, context, seed=5), flow.sample(40 - split, context, seed=5, offset=split)]
    assert_close("sample", dtype, np.concatenate(parts), whole)
    assert_close("log_prob", dtype, density, flow.log_prob(whole, context))


def test_samples_split_over_contexts(backend, dtype):
    flow, contexts = make(dtype), inputs(6, C)
    whole, density = flow.sample_and_log_prob(3, contexts, seed=5)
    assert whole.shape == (6, 3, D) and density.shape == (6, 3)
    assert_close("sample", dtype, flow.sample(3, contexts[2:], seed=5, context_offset=2), whole[2:])
    assert_close("sample", dtype, flow.sample(3, contexts[4], seed=5, context_offset=4), whole[4])
    assert_close("log_prob", dtype, density, flow.log_prob(whole, contexts[:, None]))
    assert not np.array_equal(whole[0], flow.sample(3, contexts[0], seed=5, context_offset=1))


def test_large_seeds_and_offsets(backend):
    flow = make(context_features=0)
    draws = [
        flow.sample(2, seed=seed, offset=offset, context_offset=context_offset)
        for seed, offset, context_offset in [
            (0, 0, 0),
            (1, 0, 0),
            (2**32, 0, 0),
            (2**64 - 1, 0, 0),
            (0, 2**32, 0),
            (0, 2**64 - 2, 0),
            (0, 0, 1),
            (0, 0, 2**32 - 1),
        ]
    ]
    assert len({draw.tobytes() for draw in draws}) == len(draws)


def test_without_a_seed_samples_are_fresh(backend):
    flow = make(context_features=0)
    assert not np.array_equal(flow.sample(3), flow.sample(3))
    with pytest.raises(ValueError, match="offset is 3, but seed is None"):
        flow.sample(3, offset=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": -1}, "n is -1; it must be at least 0"),
        ({"n": 1e6}, "n is 1000000.0; it must be an integer"),
        ({"n": 3, "seed": -1}, "seed is -1"),
        ({"n": 3, "context": np.zeros((2, 1, C))}, "context has shape (2, 1, 2); it must be (2,) or (c, 2)"),
        ({"n": 3, "context": np.zeros(C + 1)}, "context has shape (3,); the flow has 2 context features"),
        ({"n": 3, "context": None}, "context is missing; the flow has 2 context features"),
    ],
)
def test_wrong_arguments_of_sample_are_named(arguments, message):
    for call in (make().sample, make().sample_and_log_prob):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(**{"context": np.zeros(C), **arguments})


def test_absurd_sizes_end_in_an_error():
    for n in (2**62, 2**63 - 1):
        with pytest.raises((MemoryError, ValueError)):
            make(context_features=0).sample(n)


# NaN and bounds


def test_nan_stays_in_its_row(backend, dtype):
    flow, x, context = make(dtype), inputs(40, D), inputs(40, C, seed=1)
    clean = flow.log_prob(x, context)
    x[7, 2] = context[30, 1] = np.nan
    value = flow.log_prob(x, context)
    assert np.flatnonzero(np.isnan(value)).tolist() == [7, 30]
    assert np.array_equal(np.delete(value, [7, 30]), np.delete(clean, [7, 30]))
    assert np.isnan(flow.log_prob(x[:3], context[30])).all()


def test_bounds(backend, dtype):
    flow = fastmaf.MAF(3, bounds=[(0, 1), (None, 2), (-1, None)], hidden_features=(8,), dtype=dtype)
    x = np.array([[0.5, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.5, 2.0, 0.0], [0.5, 3.0, 0.0], [0.5, 1.0, -1.0], [0.5, 1.0, -9.0]])
    value, dx, _ = flow.log_prob_and_grad(x)
    for result in (value, flow.log_prob(x)):
        assert np.isfinite(result[0]) and np.all(result[1:] == -np.inf)
    assert dx[0].all() and not dx[1:].any()
    samples = np.concatenate([flow.sample(2000, seed=1), flow.from_noise(np.array([[300.0] * 3, [-300.0] * 3]))])
    assert np.all((samples[:, 0] > 0) & (samples[:, 0] < 1) & (samples[:, 1] < 2) & (samples[:, 2] > -1))
    assert np.isfinite(flow.log_prob(samples[:2000])).all()


# The record


def test_changed_layers_change_the_flow(backend, dtype):
    flow, x, context = make(dtype), inputs(4, D), inputs(C)
    flow.log_prob(x, context), flow.sample(2, context), flow.log_prob_and_grad(x, context)
    other = make(dtype, seed=1)
    flow.layers, flow.context_layers = other.layers, [Affine([1, 2], [3, 4])]
    other.context_layers = flow.context_layers
    assert np.array_equal(flow.log_prob(x, context), other.log_prob(x, context))
    assert np.array_equal(flow.sample(2, context, seed=1), other.sample(2, context, seed=1))
    assert np.array_equal(flow.log_prob_and_grad(x, context)[1], other.log_prob_and_grad(x, context)[1])


def test_copies_evaluate_alike(backend, dtype):
    flow, x, context = make(dtype), inputs(4, D), inputs(C)
    expected = flow.log_prob(x, context)
    copies = [
        pickle.loads(pickle.dumps(flow)),
        copy.deepcopy(flow),
        flow.to("cpu"),
        flow.astype(dtype),
        flow.with_parameters(flow.parameters()),
    ]
    for other in copies:
        assert other is not flow
        assert np.array_equal(other.log_prob(x, context), expected)


def test_parameters_are_in_the_order_of_the_layers():
    flow = make("float64")
    expected = []
    for made in flow.layers:
        if isinstance(made, Autoregressive):
            net = made.conditioner
            expected += [net.initial.weight, net.initial.bias, net.initial.context_weight]
            expected += [net.blocks[0].maps[0].weight, net.blocks[0].maps[0].bias, net.final.weight, net.final.bias]
    assert np.array_equal(flow.parameters(), np.concatenate([array.ravel() for array in expected]))
    assert flow.parameters().dtype == np.float64


def test_with_parameters():
    flow = make()
    other = flow.with_parameters(0.5 * flow.parameters().astype(np.float64))
    assert other.dtype == np.float32 and other.context_layers == flow.context_layers
    assert np.array_equal(other.parameters(), 0.5 * flow.parameters())
    assert np.array_equal(flow.parameters(), make().parameters())
    size = flow.parameters().size
    with pytest.raises(ValueError, match=re.escape(f"parameters has shape ({size + 1},); the flow has {size} parameters")):
        flow.with_parameters(np.zeros(size + 1))
    with pytest.raises(ValueError, match="that its degrees forbid"):
        flow.with_parameters(np.ones(size))
    assert fastmaf.Flow([], features=3).parameters().shape == (0,)


def test_the_gradient_of_masked_weights_is_zero(backend, dtype):
    if backend == "numba":
        pytest.skip(NO_VJP)
    flow = make(dtype)
    gradient = flow.vjp(inputs(20, D), inputs(C), np.ones(20))[2]
    assert gradient.dtype == dtype and not gradient[flow.parameters() == 0].any()
    assert flow.with_parameters(flow.parameters() + gradient).features == D


def test_astype_rounds_weights_and_keeps_the_rest():
    double = make("float64", names=["a", "b", "c", "d", "e"])
    single = double.astype("float32")
    assert single.dtype == np.float32 and single.names == double.names and single.context_layers == double.context_layers
    assert np.array_equal(single.parameters(), double.parameters().astype(np.float32))
    assert single.layers[0] == double.layers[0]
    assert np.array_equal(single.astype("float64").parameters(), single.parameters())
    with pytest.raises(ValueError, match="dtype is 'float16'"):
        double.astype("float16")


def test_devices():
    flow = make()
    assert flow.device == flow.to("cpu").device == "cpu"
    with pytest.raises(ValueError, match="precision is 'low'; it must be one of 'highest', 'high', 'medium'"):
        flow.to("cpu", precision="low")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": []}, "a flow without layers and without base needs features"),
        ({"layers": [], "features": 0}, "features is 0; it must be at least 1"),
        ({"layers": [Affine([0], [1]), Permutation([1, 0])]}, "layers[1] has width 2; the flow has 1 features"),
        ({"layers": [Affine([0], [1])], "features": 2}, "layers[0] has width 1; the flow has 2 features"),
        ({"layers": [], "base": Normal(3), "features": 2}, "base has width 3; the flow has 2 features"),
        ({"layers": [Affine([0], [1])], "base": Normal(2)}, "layers[0] has width 1; the flow has 2 features"),
        ({"layers": [Linear(np.eye(2), np.eye(2), [0, 0])], "base": "normal"}, "base is of type str; it must be Normal or Terminal"),
        ({"layers": [None]}, "layers[0] is of type NoneType, which is no layer"),
        ({"layers": [Affine([0], [1])], "context_features": -1}, "context_features is -1"),
        (
            {"layers": [Affine([0], [1])], "context_layers": [Affine([0], [1])]},
            "context_layers[0] has width 1; the flow has 0 context features",
        ),
        ({"layers": [Affine([0], [1])], "context_layers": [Permutation([0])]}, "context_layers[0] is of type Permutation"),
        ({"layers": make().layers, "context_features": 3}, "the context of layers[1] has width 2; the flow has 3 context features"),
        ({"layers": [Affine([0], [1])], "dtype": "int32"}, "dtype is 'int32'"),
        ({"layers": [Affine([0], [1])], "names": [3]}, "names is [3]; it must be a sequence of strings"),
        ({"layers": [Affine([0], [1])], "training": {"a": object()}}, "training holds a value of type object"),
    ],
)
def test_what_does_not_fit_together_is_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fastmaf.Flow(**{"base": None, **arguments})


def test_layers_that_do_not_fit_leave_the_flow_as_it_was():
    flow = make()
    before = flow.layers
    with pytest.raises(ValueError, match="layers\\[0\\] has width 2"):
        flow.layers = [Permutation([1, 0])]
    assert flow.layers is before


def test_repr_and_summary():
    flow = make(names=["a", "b", "c", "d", "e"])
    assert repr(flow) == (
        "Flow(features=5, context_features=2, dtype=float32): Affine -> 3 x Autoregressive((9, 11), tanh, exp_soft) -> Normal"
    )
    lines = flow.summary().splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "context", "Affine", *["Autoregressive"] * 3, "Normal", "total"]
    free = sum(np.count_nonzero(array) for array in flow.record.parameter_arrays())
    assert lines[-1].split()[-1].replace(",", "") == str(free)
    assert len({len(line) for line in lines}) == 1
    assert "logit" in fastmaf.Flow([Elementwise.from_bounds([(0, 1), None])]).summary()


def test_fit_hands_everything_on(monkeypatch):
    from fastmaf import train

    seen = {}
    monkeypatch.setattr(train, "fit", lambda *arguments, **options: seen.update(arguments=arguments, options=options) or "history")
    flow = make()
    assert flow.fit("x", "context", "weights", lr=0.5) == "history"
    assert seen["arguments"] == (flow, "x", "context", "weights")
    assert seen["options"]["lr"] == 0.5 and len(seen["options"]) == 21
