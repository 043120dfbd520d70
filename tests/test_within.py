"""Samples within bounds: the stream that they are taken from, and what they cost."""

from __future__ import annotations

import re

import make
import numpy as np
import pytest

import fastmaf
from fastmaf import _arrays, _within, backends
from fastmaf.flow import Flow
from fastmaf.layers import Elementwise

BOX = [(-0.8, 1.5), None, (None, 1.0)]


def conditional(dtype="float32", **options):
    """A flow whose acceptance depends on the context."""
    flow = fastmaf.MAF(3, 2, hidden_features=(16, 16), seed=1, dtype=dtype, **options)
    return flow.with_parameters(1.3 * flow.parameters())


def contexts(c):
    return np.random.default_rng(0).normal(size=(c, 2))


def inside(rows):
    return (rows[..., 0] >= -0.8) & (rows[..., 0] <= 1.5) & (rows[..., 2] <= 1)


def first_inside(flow, n, context, seed, context_offset=0, dtype=None):
    """By the definition: of many samples the first ones that lie inside."""
    rows = flow.sample(30 * n + 300, context, seed, context_offset=context_offset, dtype=dtype)
    return rows[inside(rows)][:n]


@pytest.mark.parametrize("n", [1, 7, 300])
def test_are_the_first_ones_inside(backend, dtype, n):
    flow, c = conditional(dtype), contexts(5)
    rows = flow.sample(n, c, seed=3, context_offset=11, within=BOX)
    assert rows.shape == (5, n, 3) and rows.dtype == dtype
    for k in range(5):
        expected = first_inside(flow, n, c[k], 3, 11 + k)
        if backend.startswith("cpu"):
            assert np.array_equal(rows[k], expected)
        np.testing.assert_allclose(rows[k], expected, rtol=1e-4, atol=1e-5)
    one = flow.sample(n, c[2], seed=3, within=BOX)
    assert one.shape == (n, 3)
    np.testing.assert_allclose(one, first_inside(flow, n, c[2], 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("piece", "threads"), [(1, 1), (5000, 3), (1 << 19, 2)])
def test_bits_depend_on_nothing_else(core, dtype, piece, threads, monkeypatch):
    flow, c = conditional(dtype), contexts(40)
    expected = flow.sample(200, c, seed=5, within=BOX)
    monkeypatch.setattr(_within, "PIECE", piece)
    with fastmaf.num_threads(threads):
        assert np.array_equal(flow.sample(200, c, seed=5, within=BOX), expected)
        parts = [
            flow.sample(200, c[rows], seed=5, context_offset=rows.start, within=BOX) for rows in (slice(0, 1), slice(1, 33), slice(33, 40))
        ]
        assert np.array_equal(np.concatenate(parts), expected)
        assert np.array_equal(flow.sample(61, c, seed=5, within=BOX), expected[:, :61])
        assert np.array_equal(flow.sample(200, c[7], seed=5, context_offset=7, within=BOX), expected[7])


def test_no_context_is_drawn_from_for_another(monkeypatch):
    """Where one context accepts little, the others end early."""
    flow, c, drawn = conditional("float64"), contexts(30), np.zeros(30)
    share = flow.acceptance(BOX, c, 20_000, seed=2)
    assert share.min() < 0.4 and share.max() > 0.6
    backend = backends.choose()
    many, one = backend.sample_rows, backend.sample

    def sample_rows(record, index, group, *rest):
        np.add.at(drawn, group.astype(int), 1)
        many(record, index, group, *rest)

    def sample(record, c, n, context, seed, offset, group, *rest):
        drawn[group] += n
        one(record, c, n, context, seed, offset, group, *rest)

    monkeypatch.setattr(type(backend), "sample_rows", staticmethod(sample_rows))
    monkeypatch.setattr(type(backend), "sample", staticmethod(sample))
    flow.sample(1000, c, seed=4, within=BOX)
    assert (drawn * share / 1000 < 1.5).all() and (drawn * share).sum() < 1.25 * 30_000


def test_the_density_inside(backend):
    """Rows within bounds have the density of the flow over the acceptance."""
    flow = fastmaf.Flow([], features=1, dtype="float64")
    x = flow.sample(20_000, seed=1, within=[(0, 1)])
    edges = np.linspace(0, 1, 6)
    observed, _ = np.histogram(x, edges)
    share = flow.acceptance([(0, 1)], n=200_000, seed=3)
    middle = (edges[1:] + edges[:-1])[:, None] / 2
    expected = 20_000 * 0.2 * np.exp(flow.log_prob(middle)) / share
    assert abs(share - 0.3413447) < 5e-3
    assert (np.abs(observed - expected) < 5 * np.sqrt(expected)).all()


def test_acceptance_is_the_share_of_samples(backend, dtype):
    flow, c = conditional(dtype), contexts(4)
    expected = inside(flow.sample(3000, c, seed=9, context_offset=2)).mean(axis=1)
    np.testing.assert_allclose(flow.acceptance(BOX, c, 3000, seed=9, context_offset=2), expected, atol=1e-3)
    one = flow.acceptance(BOX, c[1], 3000, seed=9, context_offset=3)
    assert isinstance(one, float) and abs(one - expected[1]) <= 1e-3


def test_bounds_by_name_and_by_edge():
    flow = fastmaf.Flow([], features=2, dtype="float32", names=["u", "g"])
    by_name = flow.sample(50, seed=1, within={"g": (0.1, None)})
    assert np.array_equal(by_name, flow.sample(50, seed=1, within=[None, (0.1, np.inf)]))
    assert (by_name[:, 1].astype(float) >= 0.1).all()


@pytest.mark.parametrize("end", [0.1, 0.7, -0.1, 1e-300, 1e300])
def test_bounds_that_float32_has_not_move_inwards(end):
    nearest = np.float32(end) if abs(end) < 1e38 else np.finfo("float32").max
    numbers = np.array([[np.nextafter(nearest, np.float32(-9))], [nearest], [np.nextafter(nearest, np.float32(9))]])
    for within in ((end, None), (None, end)):
        held = _within.Bounds([within], 1, None, np.dtype("float32")).hold(numbers)
        exact = numbers[:, 0].astype(float) >= end if within[1] is None else numbers[:, 0].astype(float) <= end
        assert np.array_equal(held, exact)


def test_out_dtype_and_nothing():
    flow = conditional(bounds=[(-3, 3), None, None])
    out = np.empty((5, 3))
    assert flow.sample(5, contexts(1)[0], seed=1, within=BOX, out=out) is out
    assert np.array_equal(out, flow.sample(5, contexts(1)[0], seed=1, within=BOX, dtype="float64"))
    assert flow.sample(0, contexts(3), within=BOX).shape == (3, 0, 3)
    assert flow.sample(4, np.empty((0, 2)), within=BOX).shape == (0, 4, 3)
    assert np.array_equal(flow.sample(5, contexts(2), seed=1, within=[None] * 3), flow.sample(5, contexts(2), seed=1))


def test_of_discrete_variables():
    flow = fastmaf.MADE(3, conditional="categorical", categories=5, hidden_features=(8,), seed=0)
    rows = flow.sample(100, seed=1, within=[(1, 3), None, None])
    assert set(rows[:, 0]) == {1, 2, 3}
    whole = flow.sample(1000, seed=1)
    assert np.array_equal(rows, whole[(whole[:, 0] >= 1) & (whole[:, 0] <= 3)][:100])


@pytest.mark.parametrize("piece", [1, 1 << 19])
def test_the_cap(piece, monkeypatch):
    monkeypatch.setattr(_within, "PIECE", piece)
    flow = fastmaf.Flow([], features=1, dtype="float64")
    rows = flow.sample(1000, seed=1)[:, 0]
    above = np.sort(rows)[-10]  # the tenth from above
    last = int(np.flatnonzero(rows >= above)[-1])
    cut, few = [(above, None)], _within.FEW
    tries = last // few + 1
    assert len(flow.sample(10, seed=1, within=cut, max_tries=tries)) == 10
    message = rf"within holds \d+ of {few * (tries - 1)} samples, an acceptance of .*, and 10 are wanted; widen it, or raise max_tries"
    with pytest.raises(ValueError, match=message):
        flow.sample(10, seed=1, within=cut, max_tries=tries - 1)


def test_nothing_inside_is_found_out_early():
    flow, counted = conditional(), []
    backend = backends.choose()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(backend), "sample", staticmethod(lambda *a, own=backend.sample: (counted.append(a[2]), own(*a))))
        with pytest.raises(ValueError, match=r"within holds 0 of 1000 samples under context 0, an acceptance of 0, and 1000000 are wanted"):
            flow.sample(1_000_000, contexts(1), within=[(1e6, None), None, None], max_tries=10)
    assert sum(counted) <= 1001


def test_contexts_that_the_flow_cannot_follow():
    made = fastmaf.MAF(2, 1, hidden_features=(8,))
    flow = Flow(made.layers, context_features=1, context_layers=[Elementwise.from_bounds([(0, 1)])])
    with pytest.raises(ValueError, match="there are no samples under context 1, which the flow cannot follow"):
        flow.sample(5, [[0.5], [1.0]], within=[(-1, 1), None])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"offset": 3, "seed": 1}, "offset counts what is drawn, of which within keeps a part"),
        ({"within": [None]}, "within has 1 entries; the flow has 3 features"),
        ({"within": [(1, 0), None, None]}, "column 0 has bounds (1.0, 0.0); the lower one must be below the upper one"),
        ({"within": [(0, 1, 2), None, None]}, "within[0] is (0, 1, 2); it must be None or a pair"),
        ({"within": {"z": (0, 1)}}, "within goes by name, but names is None"),
        ({"within": 3}, "within is 3; it must be a sequence"),
        ({"max_tries": 0}, "max_tries is 0; it must be at least 1"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        conditional().sample(4, contexts(2), **{"within": BOX, **arguments})


def test_arrays_of_a_gpu_are_refused(monkeypatch):
    from fastmaf import _device

    monkeypatch.setattr(_arrays, "contexts", lambda *_: (object.__new__(_device.DeviceArray), 2))
    for call in (lambda: conditional().sample(4, 0, within=BOX), lambda: conditional().acceptance(BOX, 0)):
        with pytest.raises(ValueError, match="context is on a GPU, and within counts rows on the host"):
            call()


def test_of_an_ensemble():
    density = fastmaf.MADE(3, masks=4, hidden_features=(16,), seed=2, order="sequential")
    rows = density.sample(300, seed=1, within=BOX)
    whole = density.sample(5000, seed=1)
    assert np.array_equal(rows, whole[inside(whole)][:300])
    assert abs(density.acceptance(BOX, n=5000, seed=1) - inside(whole).mean()) < 1e-12


def test_is_found_where_sample_is():
    """Of the same flow on another backend, to rounding."""
    flow = conditional("float64")
    with make.reference():
        expected = flow.sample(20, contexts(3), seed=1, within=BOX)
    np.testing.assert_allclose(flow.sample(20, contexts(3), seed=1, within=BOX), expected, rtol=1e-9, atol=1e-12)


def test_one_value_of_a_category_is_a_bound():
    flow = fastmaf.MADE(2, "mixed", categories=[3, None], seed=0)
    whole = flow.sample(4000, seed=1)
    for ends, kept in (((1, 1), [1]), ((1, None), [1, 2]), ((0, 1), [0, 1]), ((0.4, 2), [1, 2]), (None, [0, 1, 2])):
        samples = flow.sample(50, seed=1, within=[ends, None])
        np.testing.assert_array_equal(samples, whole[np.isin(whole[:, 0], kept)][:50])
        assert flow.acceptance([ends, None], n=4000, seed=1) == np.isin(whole[:, 0], kept).mean()
    with pytest.raises(ValueError, match="column 1 has bounds"):
        flow.sample(5, within=[None, (1, 1)])
    with pytest.raises(ValueError, match="column 0 has bounds"):
        flow.sample(5, within=[(2, 1), None])
