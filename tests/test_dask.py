"""Arrays of dask: lazily, block by block, what arrays give; in threads and in processes of a cluster."""

from __future__ import annotations

import functools
import itertools
import os
import pathlib
import pickle

import make
import numpy as np
import pytest

import fastmaf

da = pytest.importorskip("dask.array")

import fastmaf.dask  # noqa: E402
from fastmaf import _dask  # noqa: E402


def conditional(**options):
    return fastmaf.MAF(3, 2, **{"transforms": 2, "hidden_features": (8,), "seed": 0, **options})


def blocks(shape):
    """Blocks that do not divide what they cut, columns too."""
    return tuple({20: 7, 4: 3, 3: 2}.get(size, 1) for size in shape)


def assert_same(lazy, expected):
    assert isinstance(lazy, da.Array) and lazy.shape == expected.shape and lazy.dtype == expected.dtype
    np.testing.assert_array_equal(lazy.compute(), expected, strict=True)


X_SHAPES = ((20, 3), (1, 3), (4, 20, 3), (1, 20, 3))
CONTEXT_SHAPES = ((2,), (20, 2), (1, 2), (4, 2), (4, 1, 2), (4, 20, 2), (1, 1, 2))


@pytest.mark.parametrize("shapes", list(itertools.product(X_SHAPES, CONTEXT_SHAPES)), ids=str)
@pytest.mark.parametrize("lazy", ["x", "context", "both"])
def test_every_layout(shapes, lazy):
    flow, rng = conditional(), np.random.default_rng(0)
    x, context = (rng.normal(size=shape) for shape in shapes)
    lazy_x = da.from_array(x, chunks=blocks(x.shape)) if lazy != "context" else x
    lazy_context = da.from_array(context, chunks=blocks(context.shape)) if lazy != "x" else context
    try:
        expected = flow.log_prob(x, context)
    except ValueError as error:
        with pytest.raises(ValueError) as caught:
            flow.log_prob(lazy_x, lazy_context)
        assert str(caught.value) == str(error)
        return
    assert_same(flow.log_prob(lazy_x, lazy_context), expected)
    assert_same(flow.to_noise(lazy_x, lazy_context), flow.to_noise(x, context))
    for options in ({}, {"dtype": "float64"}):
        assert_same(flow.from_noise(lazy_x, lazy_context, **options), flow.from_noise(x, context, **options))
        pairs = zip(
            flow.from_noise(lazy_x, lazy_context, log_det=True, **options),
            flow.from_noise(x, context, log_det=True, **options),
            strict=True,
        )
        for own, array in (
            *pairs,
            *zip(flow.to_noise(lazy_x, lazy_context, log_det=True), flow.to_noise(x, context, log_det=True), strict=True),
        ):
            assert_same(own, array)


@pytest.mark.parametrize("dtype", ["f4", "i8", "?"])
def test_rows_without_context(dtype):
    flow = fastmaf.MAF(3, transforms=1, hidden_features=(4,), seed=0, bounds=[None, (0, 1), None], dtype="float64")
    x = np.random.default_rng(0).uniform(0, 1, (50, 3)).round().astype(dtype)
    x[7, 1] = 0
    lazy = da.from_array(x, chunks=(8, 3))
    assert_same(flow.log_prob(lazy), flow.log_prob(x))
    assert flow.log_prob(lazy).chunks == ((8, 8, 8, 8, 8, 8, 2),)
    masked = fastmaf.MADE(3, masks=3, hidden_features=(4,), seed=0)
    assert_same(masked.log_prob(lazy), masked.log_prob(x))


def test_nothing_is_computed_before_it_is_asked_for_and_later_fits_do_not_matter():
    x, seen = np.random.default_rng(0).normal(size=(400, 2)), []

    def watched(block):
        seen.append(len(block))
        return block

    for flow in (fastmaf.MAF(2, transforms=1, hidden_features=(4,), seed=0), fastmaf.MADE(2, masks=2, hidden_features=(4,), seed=0)):
        seen.clear()
        lazy = da.from_array(x, chunks=(100, 2)).map_blocks(watched, meta=np.empty((0, 2)))
        expected, result, samples = flow.log_prob(x), flow.log_prob(lazy), fastmaf.dask.sample(flow, 50, 20, seed=1)
        drawn = flow.sample(50, seed=1)
        assert not seen
        assert result.name == flow.log_prob(lazy).name  # dask computes it once, however often it is written
        flow.reset(seed=5)
        assert result.name != flow.log_prob(lazy).name
        result[:150].compute()
        assert len(seen) == 2
        assert_same(result, expected)
        assert_same(samples, drawn)


def test_blocks_of_unknown_length():
    flow, given = fastmaf.MAF(2, transforms=1, hidden_features=(4,), seed=0), conditional()
    x = np.random.default_rng(0).normal(size=(60, 2))
    lazy = da.from_array(x, chunks=(25, 2))
    some = lazy[lazy[:, 0] > 0]
    np.testing.assert_array_equal(flow.log_prob(some).compute(), flow.log_prob(x[x[:, 0] > 0]))
    np.testing.assert_array_equal(flow.to_noise(some).compute(), flow.to_noise(x[x[:, 0] > 0]))
    rows = some @ np.ones((2, 3))
    np.testing.assert_array_equal(given.log_prob(rows, [0, 1]).compute(), given.log_prob(rows.compute(), [0, 1]))
    for name, arguments in (("x", (rows, x)), ("context", (np.zeros((60, 3)), some))):
        with pytest.raises(ValueError, match=f"{name} has blocks of unknown length, .*: {name} = {name}.compute_chunk_sizes\\(\\) first"):
            given.log_prob(*arguments)


def test_what_is_refused_before_anything_is_computed():
    flow, x = fastmaf.MAF(3, seed=0), da.zeros((10, 3), chunks=5)
    for call, text in (
        (lambda: flow.log_prob(da.zeros((10, 4))), r"x has shape \(10, 4\); the flow has 3 features"),
        (lambda: flow.from_noise(da.zeros((10, 4))), r"u has shape \(10, 4\); the flow has 3 features"),
        (lambda: flow.log_prob(x.astype(complex)), "x has dtype complex128; it must hold real numbers"),
        (lambda: flow.log_prob(x, da.zeros((10, 2))), r"context has shape \(10, 2\); the flow has no context features"),
        (lambda: flow.log_prob(x, out=np.empty(10, "f4")), "leave out out"),
        (lambda: fastmaf.MADE(3, masks=2).log_prob(x, out=np.empty(10, "f4")), "leave out out"),
        (lambda: flow.from_noise(x, dtype="int8"), "dtype is 'int8'"),
        (lambda: fastmaf.MADE(3, "bernoulli").to_noise(x), "a flow with a bernoulli base has no noise"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_a_numpy_context_is_cut_so_that_results_fit_into_blocks():
    x, context = da.zeros((1000, 3), chunks=(500, 3)), np.zeros((40, 1, 2))
    with make.using(None), pytest.MonkeyPatch.context() as patch:
        import dask

        patch.setitem(dask.config.config["array"], "chunk-size", "20kB")
        result = conditional().log_prob(x, context)
    assert result.chunks == ((10, 10, 10, 10), (500, 500))


CHUNKS = ("auto", 3, (3,), (60, 40), ((60, 40),), -1, None, "1kiB")


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_samples_are_those_of_one_call(chunks):
    flow = conditional(dtype="float64")
    options = {"seed": 3, "offset": 7, "context_offset": 2, "dtype": "float32"}
    for context in ([0.5, 1.0], da.from_array([0.5, 1.0], chunks=1)):
        samples = fastmaf.dask.sample(flow, 100, chunks, context=context, **options)
        assert_same(samples, flow.sample(100, [0.5, 1.0], **options))
        assert samples.numblocks[1] == 1


@pytest.mark.parametrize("chunks", ["auto", 3, (3, 20), ((2, 5), (60, 40)), -1, (1, -1), "1kiB"], ids=str)
def test_samples_under_many_contexts(chunks):
    flow, contexts = conditional(), np.random.default_rng(0).normal(size=(7, 2))
    expected = flow.sample(100, contexts, seed=3, context_offset=5)
    for context in (contexts, da.from_array(contexts, chunks=(4, 1))):
        assert_same(fastmaf.dask.sample(flow, 100, chunks, 3, context, context_offset=5), expected)


def test_samples_of_an_ensemble_and_of_nothing():
    masked = fastmaf.MADE(3, masks=3, hidden_features=(4,), seed=0)
    assert_same(fastmaf.dask.sample(masked, 30, 7, seed=1), masked.sample(30, seed=1))
    assert fastmaf.dask.sample(masked, 0).compute().shape == (0, 3)


def test_a_seed_is_drawn_once():
    flow = fastmaf.MAF(3, transforms=1, hidden_features=(4,), seed=0)
    samples = fastmaf.dask.sample(flow, 20, 6)
    assert_same(samples, samples.compute())
    assert not np.array_equal(samples.compute(), fastmaf.dask.sample(flow, 20, 6).compute())
    assert_same(fastmaf.dask.sample(flow, 20, 6, np.random.default_rng(3)), flow.sample(20, seed=np.random.default_rng(3)))


@pytest.mark.parametrize("chunks", [0, -2, 1.5, "wordy", (1, 2, 3), object(), (5, 5)], ids=str)
def test_chunks_that_do_not_fit(chunks):
    with pytest.raises(ValueError, match=r"chunks is .*, which does not fit the axes \(100,\)") as error:
        fastmaf.dask.sample(conditional(), 100, chunks, context=[0, 0])
    assert len(str(error.value)) <= 200


def test_arguments_of_sample_that_do_not_fit():
    flow = conditional()
    for arguments, text in (
        ({"n": -1, "context": [0, 0]}, "n is -1"),
        ({"n": 5}, "context is missing"),
        ({"n": 5, "context": da.zeros((4, 3))}, r"context has shape \(4, 3\)"),
        ({"n": 5, "context": [0, np.inf]}, "context is not finite"),
        ({"n": 5, "context": [0, 0], "offset": 3}, "offset is 3, but seed is None"),
        ({"n": 5, "context": [0, 0], "dtype": "int8"}, "dtype is 'int8'"),
    ):
        with pytest.raises(ValueError, match=text):
            fastmaf.dask.sample(flow, **arguments)
    with pytest.raises(ValueError, match="flow is 3; it must be a Flow or an Ensemble"):
        fastmaf.dask.sample(3, 5)


def test_a_flow_has_one_name_in_graphs():
    flow = conditional()
    assert _dask.shared(flow).key == _dask.shared(pickle.loads(pickle.dumps(flow))).key != _dask.shared(conditional(seed=1)).key
    lazy = flow.log_prob(da.zeros((1000, 3), chunks=(10, 3)), [0, 0])
    assert sum(isinstance(getattr(task, "value", task), fastmaf.Flow) for task in lazy.dask.values()) == 1


def count_arrivals():
    """In a worker: count the flows that come out of a pickle."""
    import fastmaf.flow

    original = fastmaf.flow._revived

    @functools.wraps(original)
    def revived(*arguments):
        revived.count += 1
        return original(*arguments)

    revived.count = 0
    fastmaf.flow._revived = revived


def arrivals():
    import fastmaf.flow

    return fastmaf.flow._revived.count, os.getpid()


def test_workers_get_the_flow_once():
    distributed = pytest.importorskip("distributed")
    flow, n = conditional(), 2000
    context = [0.5, 1.0]
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
        distributed.Client(cluster) as client,
    ):
        client.run(count_arrivals)
        samples = fastmaf.dask.sample(flow, n, 50, seed=1, context=context)
        both = da.hstack([samples, flow.log_prob(samples, context)[:, None], flow.to_noise(samples, context)])
        result = client.compute(both).result()
        counts, workers = zip(*client.run(arrivals).values(), strict=True)
    expected, log_prob = flow.sample(n, context, seed=1), flow.log_prob(flow.sample(n, context, seed=1), context)
    np.testing.assert_array_equal(result[:, :3], expected)
    np.testing.assert_array_equal(result[:, 3], log_prob)
    np.testing.assert_array_equal(result[:, 4:], flow.to_noise(expected, context))
    assert len({*workers, os.getpid()}) == 3
    assert max(counts) == 1, counts  # on a busy machine one of them may do everything


def test_the_page_runs(capsys):
    page = (pathlib.Path(__file__).parents[1] / "docs" / "dask.md").read_text(encoding="utf-8")
    code = "\n".join(block.partition("```")[0] for block in page.split("```python\n")[1:] if "mpi4py" not in block)
    exec(compile(code, "docs/dask.md", "exec"), {"__name__": "the page"})  # its cluster is that of the test above
    _, last, same = capsys.readouterr().out.splitlines()
    assert last.strip("[]").split() == same.strip("[]").split()
