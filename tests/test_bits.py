"""What the compiled core promises bit for bit, for all operations: rows that do not meet, tails, threads, instruction sets, scratch."""

from __future__ import annotations

import make
import numpy as np
import pytest

import fastmaf
from fastmaf import backends, config

SIZES = (1, 2, 3, 15, 16, 17, 47, 48, 49, 191, 192, 193)
NAMES = ["7 (17, 5) 1", "front", "blocks", "larger than a cache", "fixed layers in front", "Linear front", "Linears around one MADE"]


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


def case(name, dtype, n):
    """`make.case` with more rows, a cotangent for each."""
    given, rng = make.case(name, dtype), np.random.default_rng(4)
    pick = rng.integers(0, make.ROWS, n)
    fields = {key: getattr(given, key)[pick] for key in ("x", "noise", "cotangent")}
    fields["noise"] = rng.normal(size=fields["noise"].shape).astype(dtype)
    with make.reference():
        fields["x"] = given.flow.from_noise(fields["noise"], None if given.context is None else given.context[pick])
    return type(given)(flow=given.flow, context=None if given.context is None else given.context[pick], **fields)


def row_by_row(results, rows):
    return {key: array[rows] for key, array in results.items()}


def test_rows_do_not_meet(core, dtype, name):
    """Any split, any tail, any order, and neighbours that hold nothing."""
    given = case(name, dtype, 200)
    whole = make.results(given, parameters=False)
    order = np.random.default_rng(0).permutation(200)
    pieces = [slice(n) for n in SIZES] + [slice(200 - n, 200) for n in SIZES] + [slice(5, 150, 3), slice(None, None, -1), order, order[:77]]
    for rows in pieces:
        make.assert_same_bits(make.results(given, rows, parameters=False), row_by_row(whole, rows))
    spoilt = type(given)(**vars(given))
    spoilt.x, spoilt.noise = given.x.copy(), given.noise.copy()
    spoilt.x[::5], spoilt.noise[::5] = np.nan, np.nan
    others = np.arange(200) % 5 != 0
    make.assert_same_bits(row_by_row(make.results(spoilt, parameters=False), others), row_by_row(whole, others))


@pytest.mark.parametrize("name", make.CASES)
def test_gradients_of_few_rows(core, dtype, name):
    """They are those of the same rows among many, which lie otherwise in vectors; also where there is no density, or hardly any."""
    given = make.case(name, dtype)
    x, context = given.x.copy(), None if given.context is None else given.context.copy()
    x[range(8), np.arange(8) % x.shape[1]] = np.nan, np.inf, -np.inf, 1e38, -1e38, 1e12, 2, -1
    cotangent = given.cotangent.copy()
    cotangent[10:14] = np.nan, np.inf, 0, 1e30
    if context is not None:
        context[14:18, 0] = np.nan, np.inf, 1e38, 1e12
    handle = fastmaf.Handle(given.flow)

    def results(rows, own):
        with np.errstate(all="ignore"):  # of casts
            value, dx, dcontext = given.flow.log_prob_and_grad(x[rows], own)
            weighted = handle.vjp(x[rows], own, cotangent[rows], dparameters=False)
            alone = handle.vjp(x[rows], own, cotangent[rows], dx=False, dparameters=False)
        arrays = dict(zip(("value", "dx", "dcontext", "weighted dx", "weighted dcontext"), (value, dx, dcontext, *weighted), strict=False))
        arrays["dcontext alone"] = alone[1]
        return {key: array for key, array in arrays.items() if array is not None}

    whole = results(slice(None), context)
    for n in (1, 2):
        for start in range(0, make.ROWS - 1, n):
            rows = slice(start, start + n)
            make.assert_same_bits(results(rows, None if context is None else context[rows]), row_by_row(whole, rows))
    for r in range(8, 24) if context is not None else ():
        own = {key: array[0] if "dcontext" in key else array for key, array in row_by_row(whole, slice(r, r + 1)).items()}
        make.assert_same_bits(results(slice(r, r + 1), context[r]), own)


def test_value_of_the_gradient_is_the_density(core, dtype, name):
    results = make.results(make.case(name, dtype))
    assert np.array_equal(results["value"], results["log_prob"])


@pytest.mark.parametrize("n", [1, 20, 200])
def test_threads(core, dtype, name, n):
    given = case(name, dtype, n)
    with fastmaf.num_threads(1):
        expected = make.results(given)
    for threads in (2, 7):
        with fastmaf.num_threads(threads):
            make.assert_same_bits(make.results(given), expected)


@pytest.fixture
def both(monkeypatch):
    """Sets one instruction set or the other; the baseline has no fused multiply-add, so it has bits of its own."""
    if backends.reason("cpu") is not None or not {"avx2", "avx512"} <= set(config.available_isas()):
        pytest.skip("needs avx2 and avx512")
    previous = config.get_isa()
    monkeypatch.setattr(backends, "active", None)
    fastmaf.set_backend("cpu")
    yield fastmaf.set_isa
    fastmaf.set_isa(previous)


@pytest.mark.parametrize("name", [*make.CASES, *make.MIXTURES])
def test_instruction_sets(both, dtype, name):
    given, results = make.case(name, dtype), []
    for isa in ("avx512", "avx2"):
        both(isa)
        results.append([make.results(given, rows) for rows in (slice(None), slice(1), slice(17))])
    for wide, narrow in zip(*results, strict=True):
        make.assert_same_bits(narrow, wide)


@pytest.mark.parametrize(
    "name",
    ["13 (49, 50) 3", "8 (33, 16, 31) 0", "blocks", "front", "front of 9", "larger than a cache", "Linear 23 (11,) 2", "Linear front"],
)
def test_scratch_holds_nothing(core, dtype, name):
    from fastmaf import _core

    given = make.case(name, dtype)
    pieces = [slice(None), slice(1), slice(20), slice(50)]
    expected = [make.results(given, rows) for rows in pieces]
    _core.set_poison(True)
    try:
        for rows, clean in zip(pieces, expected, strict=True):
            make.assert_same_bits(make.results(given, rows), clean)
    finally:
        _core.set_poison(False)


@pytest.mark.parametrize(
    "name", [name for name, arguments in make.CASES.items() if "context_features" in arguments and arguments["context_features"]]
)
def test_a_shared_context_is_that_context_in_every_row(core, dtype, name):
    given = make.case(name, dtype)
    flow, one = given.flow, given.context[3]
    each = np.repeat(one[None], make.ROWS, axis=0)
    for rows in (slice(None), slice(1), slice(2), slice(17)):
        for operation, x in ((flow.log_prob, given.x), (flow.to_noise, given.x), (flow.from_noise, given.noise)):
            expected = operation(x[rows], each[rows])
            assert np.array_equal(operation(x[rows], one), expected)
            assert np.array_equal(operation(x[rows], one[None, None])[0], expected)
            assert np.array_equal(operation(x[rows], np.stack([one, given.context[0]])[:, None])[0], expected)
    assert np.array_equal(flow.sample(70, one, seed=1), flow.sample(70, np.stack([one, one]), seed=1)[0])


@pytest.mark.parametrize("x_shape", [(3, 70, 6), (70, 6)])
def test_groups_are_their_rows(core, dtype, x_shape):
    flow = make.case("blocks", dtype).flow
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=x_shape), rng.normal(size=(3, 1, 2))
    for operation in (flow.log_prob, flow.to_noise, flow.from_noise):
        expected = [operation(rows, own[0]) for rows, own in zip(np.broadcast_to(x, (3, 70, 6)), context, strict=True)]
        assert np.array_equal(operation(x, context), expected)
        assert np.array_equal(operation(x, np.repeat(context, 70, axis=1)) if x.ndim == 3 else expected, expected)
