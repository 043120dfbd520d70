"""The validator: what it lets through, and what it says about the rest."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fastmaf import _arrays


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
        ((0, 5, 3), (0, 1, 2), (0, 5)),
    ],
)
def test_shapes_with_context(x, context, shape):
    assert _arrays.rows("x", np.zeros(x), np.zeros(context), 3, 2)[2] == shape


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
        ((5, 3), (4, 2), "context has shape (4, 2), x has shape (5, 3); context must be (2,), (5, 2) or (c, 1, 2)"),
        ((5, 3), (1, 2), "context has shape (1, 2), x has shape (5, 3)"),
        ((5, 3), (4, 5, 2), "context has shape (4, 5, 2), x has shape (5, 3)"),
        ((4, 5, 3), (5, 2), "context has shape (5, 2), x has shape (4, 5, 3); context must be (2,), (4, 5, 2) or (4, 1, 2)"),
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
        (None, "x has dtype object"),
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


@pytest.mark.parametrize("value", [1.0, "1", None, np.float64(3), [1]])
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
    assert _arrays.cotangents([1, 2], (2,), np.dtype("float32")).dtype == np.float32
    with pytest.raises(ValueError, match=re.escape("cotangent has shape (3,); log_prob has shape (2,)")):
        _arrays.cotangents(np.zeros(3), (2,), np.dtype("float32"))


@pytest.mark.parametrize("dtype", ["float16", "int32", "complex64", "longdouble", "nonsense", None, object(), ">f4"])
def test_a_flow_is_float32_or_float64(dtype):
    assert _arrays.float_dtype("d") == np.float64
    with pytest.raises(ValueError, match="it must be 'float32' or 'float64'"):
        _arrays.float_dtype(dtype)
