"""The validator: what it lets through, and what it says about the rest."""

from __future__ import annotations

import inspect
import itertools
import re
import sys
import types

import make
import numpy as np
import pytest

import fastmaf
from fastmaf import _arrays, _device


class CudaArray:
    __cuda_array_interface__ = {"shape": (2, 3)}


@pytest.mark.parametrize(
    ("x", "context", "shape"),
    [
        ((5, 3), (2,), (5,)),
        ((5, 3), (5, 2), (5,)),
        ((5, 3), (4, 1, 2), (4, 5)),
        ((5, 3), (1, 1, 2), (1, 5)),
        ((4, 5, 3), (2,), (4, 5)),
        ((4, 5, 3), (4, 1, 2), (4, 5)),
        ((4, 5, 3), (4, 5, 2), (4, 5)),
        ((0, 3), (2,), (0,)),
        ((0, 3), (0, 2), (0,)),
        ((5, 3), (0, 1, 2), (0, 5)),
        ((5, 3), (1, 2), (5,)),
        ((1, 3), (5, 2), (5,)),
        ((1, 3), (0, 2), (0,)),
        ((0, 3), (1, 2), (0,)),
        ((5, 3), (4, 5, 2), (4, 5)),
        ((1, 3), (4, 5, 2), (4, 5)),
        ((4, 5, 3), (4, 2), (4, 5)),
        ((4, 5, 3), (1, 2), (4, 5)),
        ((1, 5, 3), (4, 2), (4, 5)),
        ((1, 5, 3), (4, 1, 2), (4, 5)),
        ((4, 1, 3), (4, 5, 2), (4, 5)),
        ((4, 5, 3), (1, 1, 2), (4, 5)),
        ((4, 5, 3), (1, 5, 2), (4, 5)),
        ((5, 5, 3), (5, 2), (5, 5)),
        ((0, 5, 3), (0, 1, 2), (0, 5)),
    ],
)
def test_shapes_with_context(x, context, shape):
    assert _arrays.rows("x", np.zeros(x), np.zeros(context), 3, 2)[2] == shape


def test_contexts_and_rows_broadcast_as_numpy_has_it_once_placed():
    """Every pair of few axes, against a placement written out in full."""
    for x, context in itertools.product(itertools.chain(*(itertools.product((0, 1, 2, 3), repeat=k) for k in (1, 2, 3))), repeat=2):
        if len(x) == 3 or len(context) == 3 or len(x) == 0:
            continue
        placed = (context[0], 1) if (len(x), len(context)) == (2, 1) else context
        arguments = ("x", np.zeros((*x, 3)), np.zeros((*context, 2)), 3, 2)
        try:
            expected = np.broadcast_shapes(x, placed)
        except ValueError:
            with pytest.raises(ValueError, match="context must be"):
                _arrays.rows(*arguments)
        else:
            assert _arrays.rows(*arguments)[2] == expected
            assert _arrays.rows(*arguments)[1].shape == (*placed, 2)


def test_the_docs_hold_every_layout():
    text = inspect.getdoc(fastmaf.Flow.log_prob)
    for (ndim, _), (axes, _) in _arrays.LAYOUTS.items():
        shape = f"({', '.join([*axes, 'C'])}{',' * (not axes)})"
        assert shape in text and ("x (n, D)" if ndim == 2 else "x (c, n, D)") in text


@pytest.mark.parametrize(("x", "shape"), [((5, 3), (5,)), ((0, 3), (0,)), ((4, 5, 3), (4, 5)), ((0, 5, 3), (0, 5))])
def test_shapes_without_context(x, shape):
    array, context, result = _arrays.rows("x", np.zeros(x), None, 3, 0)
    assert array.shape == x and context is None and result == shape


@pytest.mark.parametrize(
    ("x", "context", "message"),
    [
        ((5, 4), (2,), "x has shape (5, 4); the flow has 3 features"),
        ((3,), (2,), "x has shape (3,); the flow has 3 features, so x must be (n, 3) or (c, n, 3)"),
        ((), (2,), "x has shape (); the flow has 3 features, so x must be"),
        ((1, 2, 5, 3), (2,), "x has shape (1, 2, 5, 3); the flow has 3 features"),
        ((5, 3), (3,), "context has shape (3,); the flow has 2 context features"),
        ((5, 3), (), "context has shape (); the flow has 2 context features"),
        ((5, 3), (1, 1, 5, 2), "context has shape (1, 1, 5, 2); the flow has 2 context features"),
        ((5, 3), (4, 2), "context has shape (4, 2), x has shape (5, 3); context must be (2,), (5, 2), (c, 1, 2) or (c, 5, 2)"),
        ((5, 3), (0, 2), "context has shape (0, 2), x has shape (5, 3)"),
        ((5, 3), (4, 3, 2), "context has shape (4, 3, 2), x has shape (5, 3)"),
        ((4, 5, 3), (5, 2), "context has shape (5, 2), x has shape (4, 5, 3); context must be (2,), (4, 2), (4, 1, 2) or (4, 5, 2)"),
        ((4, 5, 3), (3, 1, 2), "context has shape (3, 1, 2), x has shape (4, 5, 3)"),
        ((4, 5, 3), (4, 4, 2), "context has shape (4, 4, 2), x has shape (4, 5, 3)"),
        ((5, 3), None, "context is missing; the flow has 2 context features"),
    ],
)
def test_wrong_shapes_are_named(x, context, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        _arrays.rows("x", np.zeros(x), None if context is None else np.zeros(context), 3, 2)


def test_a_one_dimensional_x_is_an_error_with_one_feature_too():
    with pytest.raises(ValueError, match=re.escape("x has shape (4,); the flow has 1 feature, so x must be (n, 1)")):
        _arrays.rows("x", np.zeros(4), None, 1, 0)


def test_a_context_without_context_features_is_an_error():
    with pytest.raises(ValueError, match="the flow has no context features"):
        _arrays.rows("x", np.zeros((5, 3)), np.zeros(0), 3, 0)


@pytest.mark.parametrize("dtype", ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"])
def test_real_numbers_pass_as_they_are(dtype):
    x = np.zeros((4, 3), dtype)
    assert _arrays.rows("x", x, None, 3, 0)[0] is x


@pytest.mark.parametrize(("dtype", "native"), [("g", "f8"), (">f2", "f8"), (">f4", "f8"), (">f8", "f8"), (">i2", "i2"), (">u8", "u8")])
def test_what_no_backend_reads_is_converted(dtype, native):
    x = np.arange(6).reshape(2, 3).astype(dtype)
    array = _arrays.rows("x", x, None, 3, 0)[0]
    assert array.dtype == native and np.array_equal(array, x)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((2, 3), complex), "x has dtype complex128; it must hold real numbers"),
        (np.zeros((2, 3), object), "x has dtype object"),
        (np.full((2, 3), "a"), "x has dtype <U1"),
        (np.full((2, 3), b"a"), "x has dtype |S1"),
        (np.zeros((2, 3), "M8[s]"), "x has dtype datetime64[s]"),
        (np.zeros((2, 3), [("a", "f8")]), "x has dtype [('a', '<f8')]"),
        ([["a", "b", "c"]], "x has dtype <U1"),
        (None, "x is None; it must be an array of real numbers"),
        ([[1.0, 2.0, 3.0], [1.0]], "x is not an array"),
        (CudaArray(), "x is a CUDA array"),
        (np.ma.masked_array(np.zeros((1, 3)), [[True, False, False]]), "x has masked entries"),
    ],
)
def test_everything_else_is_refused(value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        _arrays.rows("x", value, None, 3, 0)


def test_lists_and_subclasses_become_arrays():
    for x in ([[1, 2, 3]], np.ma.masked_array([[1.0, 2.0, 3.0]]), np.array([[1.0, 2.0, 3.0]]).view(np.recarray)):
        array = _arrays.rows("x", x, None, 3, 0)[0]
        assert type(array) is np.ndarray and array.tolist() == [[1, 2, 3]]


def test_contexts_of_samples():
    assert _arrays.contexts(None, 0) == (None, 1)
    assert _arrays.contexts(np.zeros(2), 2)[1] == 1
    assert _arrays.contexts(np.zeros((0, 2)), 2)[1] == 0
    with pytest.raises(ValueError, match=re.escape("context has shape (4, 1, 2); it must be (2,) or (c, 2)")):
        _arrays.contexts(np.zeros((4, 1, 2)), 2)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ([1.0, np.nan], "context is not finite in column 1"),
        ([[np.inf, 0.0], [1.0, 2.0], [-np.inf, np.nan]], "context is not finite in columns 0, 1 of 2 of 3 rows"),
    ],
)
def test_samples_need_a_finite_context(backend, context, message):
    flow = make.flow(2, context_features=2)
    ensemble = fastmaf.MADE(2, context_features=2, hidden_features=(3,), masks=2)
    for call in (flow.sample, flow.sample_and_log_prob, ensemble.sample, ensemble.sample_and_log_prob):
        with pytest.raises(ValueError, match=message):
            call(3, context, seed=1)
    with pytest.raises(ValueError, match=message):
        flow.sample_given([], 3, context, seed=1)


@pytest.mark.parametrize("value", [1.0, "1", None, np.float64(3), [1], True, np.True_])
def test_counts_are_integers(value):
    with pytest.raises(ValueError, match=r"n is .*; it must be an integer"):
        _arrays.count("n", value)


def test_counts_have_a_range():
    assert _arrays.count("n", np.uint8(7)) == 7
    with pytest.raises(ValueError, match="n is -1; it must be at least 0"):
        _arrays.count("n", -1)
    with pytest.raises(ValueError, match=f"n is {2**63}; it must be below {2**63}"):
        _arrays.count("n", 2**63)


def test_seeds_and_offsets():
    assert _arrays.seed_and_offsets(2**64 - 1, 2**64 - 5, 2**32 - 3, 5, 3) == (2**64 - 1, 2**64 - 5, 2**32 - 3)
    assert _arrays.seed_and_offsets(None, 0, 0, 5, 3) != _arrays.seed_and_offsets(None, 0, 0, 5, 3)
    sequence = np.random.SeedSequence(3)
    assert _arrays.seed_and_offsets(sequence, 7, 1, 5, 3) == (_arrays.seed_or_fresh(np.random.SeedSequence(3)), 7, 1)


def test_seeds_have_64_bits():
    generator, bits = np.random.default_rng(0), np.random.PCG64(0)
    sequences = np.random.SeedSequence(0).spawn(40)
    for seeds in ([None] * 40, [generator] * 40, [bits] * 40, sequences):
        found = [_arrays.seed_or_fresh(seed) for seed in seeds]
        assert all(type(seed) is int and 0 <= seed < 2**64 for seed in found) and len(set(found)) == 40
        assert max(found) >= 2**63 > min(found) and {seed & 1 for seed in found} == {0, 1}
    for seed in (np.int8(5), np.uint64(5), np.array(5)):
        assert _arrays.seed_or_fresh(seed) == 5


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (True, "seed is True; it must be an integer, a numpy.random.Generator or a SeedSequence"),
        (np.False_, "seed is False; it must be an integer"),
        (1.0, "seed is 1.0; it must be an integer, a numpy.random.Generator or a SeedSequence"),
        (np.float32(2), "seed is 2.0"),
        ("3", "seed is '3'"),
        ([1, 2], "seed is [1, 2]"),
        (np.arange(100), "seed is an array of shape (100,)"),
        (np.random.RandomState(0), "seed is of type RandomState; it must be an integer, a numpy.random.Generator or a SeedSequence"),
        (np.int8(-1), "seed is -1; it must be at least 0"),
        (10**400, "seed is an integer of 1329 bits; it must be below 18446744073709551616"),
    ],
)
def test_wrong_seeds_are_refused_everywhere(seed, message):
    flow, ensemble = fastmaf.MADE(2, hidden_features=(3,)), fastmaf.MADE(2, hidden_features=(3,), masks=2)
    calls = (
        fastmaf.MAF,
        fastmaf.MADE,
        fastmaf.presets.maf_paper,
        fastmaf.presets.resmade_lu,
        lambda _, seed: flow.sample(3, seed=seed),
        lambda _, seed: flow.sample_and_log_prob(3, seed=seed),
        lambda _, seed: flow.sample_given([0.0], 3, seed=seed),
        lambda _, seed: flow.fit(np.random.default_rng(0).normal(size=(50, 2)), max_epochs=1, seed=seed),
        lambda _, seed: ensemble.sample(3, seed=seed),
        lambda _, seed: ensemble.sample_and_log_prob(3, seed=seed),
        lambda _, seed: ensemble.fit(np.random.default_rng(0).normal(size=(50, 2)), max_epochs=1, seed=seed),
    )
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            call(2, seed=seed)
        assert len(str(error.value)) <= 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, 0, 1, 1), "seed is -1"),
        ((2**64, 0, 0, 1, 1), "seed is 18446744073709551616"),
        ((1.5, 0, 0, 1, 1), "seed is 1.5; it must be an integer"),
        ((0, -1, 0, 1, 1), "offset is -1"),
        ((0, 2**64 - 4, 0, 5, 1), "offset 18446744073709551612 and n 5 together pass 2**64"),
        ((0, 0, 2**32, 1, 1), "context_offset is 4294967296"),
        ((0, 0, 2**32 - 1, 1, 2), "context_offset 4294967295 and 2 contexts together pass 2**32"),
        ((None, 3, 0, 1, 1), "offset is 3, but seed is None"),
        ((None, 0, 4, 1, 1), "context_offset is 4, but seed is None"),
        ((np.random.default_rng(0), 3, 0, 1, 1), "offset is 3, but seed is a generator"),
        ((np.random.PCG64(0), 0, 4, 1, 1), "context_offset is 4, but seed is a generator"),
    ],
)
def test_wrong_seeds_and_offsets_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        _arrays.seed_and_offsets(*arguments)


def test_out_is_used_as_it_is():
    out = np.empty(5, np.float32)
    assert _arrays.output(out, (5,), np.dtype("float32")) is out


def read_only():
    out = np.empty(5, np.float32)
    out.flags.writeable = False
    return out


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ([0.0] * 5, "out is of type list; it must be a NumPy array"),
        (np.empty(4, np.float32), "out has shape (4,) and dtype float32; the result has shape (5,) and dtype float32"),
        (np.empty((5, 1), np.float32), "out has shape (5, 1)"),
        (np.empty(5), "dtype float64; the result has shape (5,) and dtype float32"),
        (np.empty(5, ">f4"), "dtype >f4; the result"),
        (np.empty(10, np.float32)[::2], "out is not C-contiguous"),
        (read_only(), "out is read-only"),
        (np.empty(21, np.uint8)[1:].view(np.float32), "out is not aligned"),
    ],
)
def test_wrong_outputs_are_named(out, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        _arrays.output(out, (5,), np.dtype("float32"))


def test_out_must_not_lie_in_an_input():
    x = np.zeros((5, 3), np.float32)
    with pytest.raises(ValueError, match="out shares memory with an input"):
        _arrays.output(x.reshape(-1)[:5], (5,), np.dtype("float32"), x, None)


def test_cotangents():
    assert _arrays.cotangents([1, 2], (2,)).tolist() == [1, 2]
    with pytest.raises(ValueError, match=re.escape("cotangent has shape (3,); log_prob has shape (2,)")):
        _arrays.cotangents(np.zeros(3), (2,))


@pytest.mark.parametrize("dtype", ["float16", "int32", "complex64", "longdouble", "nonsense", None, object(), ">f4"])
def test_a_flow_is_float32_or_float64(dtype):
    assert _arrays.float_dtype("d") == np.float64
    with pytest.raises(ValueError, match="it must be 'float32' or 'float64'"):
        _arrays.float_dtype(dtype)


# Shapes through every backend


LAYOUTS = [
    ((4, 3), (1, 2)),
    ((1, 3), (4, 2)),
    ((4, 3), (5, 4, 2)),
    ((1, 3), (5, 4, 2)),
    ((5, 4, 3), (5, 2)),
    ((5, 4, 3), (1, 2)),
    ((1, 4, 3), (5, 2)),
    ((5, 1, 3), (5, 4, 2)),
    ((5, 1, 3), (1, 4, 2)),
    ((5, 4, 3), (1, 1, 2)),
    ((5, 4, 3), (1, 4, 2)),
    ((1, 1, 3), (5, 4, 2)),
]


@pytest.mark.parametrize(("x", "context"), LAYOUTS)
def test_layouts_equal_rows_written_out(backend, x, context):
    flow = make.flow(3, context_features=2, affine=True)
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=x), rng.normal(size=context)
    placed = context[:, None] if (x.ndim, context.ndim) == (3, 2) else context
    shape = np.broadcast_shapes(x.shape[:-1], placed.shape[:-1])
    rows = np.broadcast_to(x, (*shape, 3)).reshape(-1, 3)
    contexts = np.broadcast_to(placed, (*shape, 2)).reshape(-1, 2)
    np.testing.assert_allclose(flow.log_prob(x, context).reshape(-1), flow.log_prob(rows, contexts), rtol=1e-12)
    np.testing.assert_allclose(flow.to_noise(x, context).reshape(-1, 3), flow.to_noise(rows, contexts), rtol=1e-12)
    np.testing.assert_allclose(flow.from_noise(x, context).reshape(-1, 3), flow.from_noise(rows, contexts), rtol=1e-12)
    if flow.device != "cpu" or backend == "cuda":
        return
    value, dx, dcontext = flow.log_prob_and_grad(x, context)
    assert value.shape == shape and dx.shape == x.shape and dcontext.shape == context.shape
    _, whole, whole_context = flow.log_prob_and_grad(rows, contexts)
    np.testing.assert_allclose(dx, summed(whole.reshape(*shape, 3), x.shape), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(
        dcontext, summed(whole_context.reshape(*shape, 2), placed.shape).reshape(context.shape), rtol=1e-10, atol=1e-12
    )


def summed(array, shape):
    """Over the axes along which an array of this shape was repeated."""
    own = (1,) * (array.ndim - len(shape)) + shape
    axes = tuple(axis for axis in range(array.ndim) if own[axis] == 1 != array.shape[axis])
    return array.sum(axis=axes, keepdims=True).reshape(shape)


def test_samples_are_scored_under_the_contexts_they_were_drawn_under(backend, dtype):
    flow = make.flow(3, context_features=2, dtype=dtype)
    context = np.random.default_rng(0).normal(size=(5, 2))
    samples, log_prob = flow.sample_and_log_prob(4, context, seed=1)
    np.testing.assert_allclose(flow.log_prob(samples, context), log_prob, rtol=1e-3 if dtype == "float32" else 1e-9, atol=1e-3)
    for k in range(5):
        np.testing.assert_allclose(flow.log_prob(samples, context)[k], flow.log_prob(samples[k], context[k]), rtol=1e-6)
    one = flow.sample(4, context[:1], seed=1)
    assert flow.log_prob(one, context[:1]).shape == (1, 4)


def test_samples_of_an_ensemble_are_scored_so_too():
    ensemble = fastmaf.MADE(3, context_features=2, hidden_features=(8,), masks=3, dtype="float64")
    context = np.random.default_rng(0).normal(size=(5, 2))
    samples, log_prob = ensemble.sample_and_log_prob(4, context, seed=1)
    assert samples.shape == (5, 4, 3)
    np.testing.assert_allclose(ensemble.log_prob(samples, context), log_prob)
    np.testing.assert_allclose(log_prob[2], ensemble.log_prob(samples[2], context[2]))


def test_probabilities_follow_the_layouts_too():
    made = fastmaf.MADE(3, "categorical", context_features=2, hidden_features=(8,), categories=[2, 3, 4])
    x, context = np.zeros((5, 4, 3)), np.random.default_rng(0).normal(size=(5, 2))
    assert made.conditional_probs(x, context).shape == (5, 4, 3, 4)
    np.testing.assert_array_equal(made.conditional_probs(x, context)[3], made.conditional_probs(x[3], context[3]))


# Arrays of other packages


class Tensor:
    """A tensor of torch, as far as this package knows one."""

    def __init__(self, values, requires_grad=False):
        self.values, self.requires_grad = values, requires_grad

    def __array__(self, dtype=None, copy=None):
        if self.requires_grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        return self.values

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return (1, 0)


class OnlyDlpack:
    def __init__(self, values, device=(1, 0)):
        self.values, self.device = values, device

    def __dlpack__(self, stream=None, **options):
        return self.values.__dlpack__()

    def __dlpack_device__(self):
        return self.device


@pytest.fixture
def torch(monkeypatch):
    module = types.SimpleNamespace(Tensor=Tensor, from_numpy=Tensor)
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


def test_a_tensor_in_gives_a_tensor_out(torch):
    flow = make.flow(3, context_features=2)
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
    t, c = Tensor(x), Tensor(context)
    pairs = [
        (flow.log_prob(t, c), flow.log_prob(x, context)),
        (flow.to_noise(t, c), flow.to_noise(x, context)),
        (flow.from_noise(t, c), flow.from_noise(x, context)),
        (flow.sample(2, c, seed=1), flow.sample(2, context, seed=1)),
        *zip(flow.sample_and_log_prob(2, c, seed=1), flow.sample_and_log_prob(2, context, seed=1), strict=True),
        *zip(flow.log_prob_and_grad(t, c), flow.log_prob_and_grad(x, context), strict=True),
        *zip(flow.vjp(t, c, Tensor(np.ones(5)))[:2], flow.vjp(x, context, np.ones(5))[:2], strict=True),
    ]
    made = fastmaf.MADE(3, "bernoulli", hidden_features=(4,))
    pairs.append((made.conditional_probs(Tensor(0 * x)), made.conditional_probs(0 * x)))
    ordered = fastmaf.MADE(3, hidden_features=(4,))
    pairs.append((ordered.sample_given(Tensor(x[:, :1]), seed=1), ordered.sample_given(x[:, :1], seed=1)))
    ensemble = fastmaf.MADE(3, hidden_features=(4,), context_features=2, masks=2)
    pairs += [
        (ensemble.log_prob(t, c), ensemble.log_prob(x, context)),
        (ensemble.sample(2, c, seed=1), ensemble.sample(2, context, seed=1)),
    ]
    for tensor, array in pairs:
        assert type(tensor) is Tensor and type(array) is np.ndarray
        np.testing.assert_array_equal(tensor.values, array)
    assert type(flow.log_prob(x, c)) is np.ndarray  # the kind is that of x
    assert type(flow.vjp(t, c, np.ones(5))[2]) is np.ndarray


def test_tensors_are_read_and_written_in_place(torch):
    flow = make.flow(3)
    x, out = Tensor(np.zeros((5, 3))), Tensor(np.empty(5))
    assert np.shares_memory(_arrays.real("x", x), x.values)
    assert flow.log_prob(x, out=out) is out
    np.testing.assert_array_equal(out.values, flow.log_prob(x.values))
    samples = Tensor(np.empty((4, 3)))
    assert flow.sample(4, seed=1, out=samples) is samples
    np.testing.assert_array_equal(samples.values, flow.sample(4, seed=1))
    with pytest.raises(ValueError, match=re.escape("out has shape (4,)")):
        flow.log_prob(x, out=Tensor(np.empty(4)))


@pytest.mark.parametrize("with_torch", [True, False])
def test_a_tensor_that_requires_a_gradient_is_refused_with_the_remedy(with_torch, request):
    if with_torch:
        request.getfixturevalue("torch")
    flow = make.flow(3, context_features=2)
    bad = Tensor(np.zeros((5, 3)), True)
    for call, name in (
        (lambda: flow.log_prob(bad, np.zeros(2)), "x"),
        (lambda: flow.from_noise(bad, np.zeros(2)), "u"),
        (lambda: flow.log_prob(np.zeros((5, 3)), Tensor(np.zeros(2), True)), "context"),
        (lambda: flow.log_prob_and_grad(bad, np.zeros(2)), "x"),
        (lambda: flow.fit(bad, np.zeros((5, 2))), "x"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} requires a gradient, .* hand over {name}\.detach\(\)"):
            call()


def test_arrays_that_only_speak_dlpack_are_read_in_place():
    x = np.random.default_rng(0).normal(size=(5, 3)).T[:, ::-1].T
    array = _arrays.real("x", OnlyDlpack(x))
    assert np.shares_memory(array, x)
    result = make.flow(3).log_prob(OnlyDlpack(x))
    assert type(result) is np.ndarray
    np.testing.assert_array_equal(result, make.flow(3).log_prob(x))


def test_a_dlpack_array_of_a_device_is_no_array_of_the_host():
    for kind in (2, 13):
        with pytest.raises(ValueError, match="x is a CUDA array; this flow computes on the CPU"):
            make.flow(3).log_prob(OnlyDlpack(np.zeros((5, 3)), (kind, 0)))


@pytest.mark.parametrize("dtype", ["f4", "f8", "i1", "u2", "i8", "f2", "?", "c8"])
def test_a_capsule_says_where_an_array_lies(dtype):
    x = np.ones((4, 6), dtype)[1:, ::3]
    array = _device.DeviceArray("x", OnlyDlpack(x, (2, 0)), 0)
    assert array.address == x.ctypes.data and array.dtype == x.dtype
    assert array.shape == x.shape and array.strides == x.strides and array.stream == 0
    grouped = array[:, None]
    assert grouped.shape == (3, 1, 2) and grouped.strides == (x.strides[0], 0, x.strides[1]) and array.shape == (3, 2)
    assert _device.DeviceArray("x", OnlyDlpack(np.ones((4, 6)), (2, 0)), 0).strides == (48, 8)


class Broken:
    """An array that refuses in a way of its own."""

    def __init__(self, error):
        self.error = error

    def __array__(self, dtype=None, copy=None):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("no " * 1000), TypeError("no"), ValueError("no\nlines"), BufferError("no")])
def test_arrays_that_refuse_are_named(error):
    with pytest.raises(ValueError, match="^x is not an array: no") as caught:
        _arrays.real("x", Broken(error))
    assert len(str(caught.value)) <= 200
