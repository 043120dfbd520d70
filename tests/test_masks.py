"""Orders, degrees and the masks that they imply."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fastmaf import masks

D = (1, 2, 3, 5, 8)
WIDTHS = (1, 2, 3, 4, 7, 16)


def test_orders():
    ranks = lambda order, k=3: [r.tolist() for r in masks.layer_ranks(order, 3, k, seed=0)]  # noqa: E731
    assert ranks("sequential") == [[1, 2, 3]] * 3
    assert ranks("reverse") == [[1, 2, 3], [3, 2, 1], [1, 2, 3]]
    assert ranks([1, 2, 0]) == [[3, 1, 2]] * 3, "column 1 comes first"
    assert ranks(np.array([[0, 1, 2], [1, 2, 0]]), 2) == [[1, 2, 3], [3, 1, 2]]
    assert ranks("random", 0) == []


def test_random_orders():
    first, again, other = (masks.layer_ranks("random", 20, 4, seed=seed) for seed in (1, 1, 2))
    assert all(sorted(r.tolist()) == list(range(1, 21)) for r in first)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert len({tuple(r) for r in first}) == 4


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1], [1, 2, 3], [0.0, 1.0, 2.0], [[0, 1, 2]], [[0, 1, 2], [0, 0, 1]], "backwards"])
def test_wrong_orders_are_refused(order):
    with pytest.raises(ValueError, match="order"):
        masks.layer_ranks(order, 3, 2, seed=0)


@pytest.mark.parametrize(("width", "features", "conditional"), list(itertools.product(WIDTHS, D, (False, True))))
def test_degrees_are_sorted_and_cover_their_range_evenly(width, features, conditional):
    degrees = masks.hidden_degrees(width, features, conditional)
    lowest = 0 if conditional or features == 1 else 1
    values = np.arange(lowest, features)
    assert degrees.shape == (width,) and degrees.dtype == np.int64
    assert np.all(np.diff(degrees) >= 0) and np.isin(degrees, values).all()
    counts = np.bincount(degrees, minlength=features)[values]
    assert counts.max() - counts.min() <= 1
    if 1 < width < values.size:
        assert degrees[0] == lowest and degrees[-1] == features - 1
        gaps = np.diff(degrees)
        assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(("features", "conditional"), list(itertools.product(D, (False, True))))
def test_outputs_depend_on_earlier_columns_and_no_others(features, conditional):
    rng = np.random.default_rng(features)
    for widths in ((), (1,), (4,), (16, 16), (16, 3, 16)):
        ranks = rng.permutation(np.arange(1, features + 1))
        reads, paths = ranks, np.eye(features, dtype=int)
        for width in widths:
            degrees = rng.permutation(masks.hidden_degrees(width, features, conditional))
            paths = masks.hidden_mask(degrees, reads).astype(int) @ paths
            reads = degrees
        mask = masks.output_mask(ranks, reads, 3)
        assert mask.shape == (3 * features, reads.size)
        assert np.array_equal(mask[::3], mask[1::3]) and np.array_equal(mask[::3], mask[2::3])
        depends = (mask.astype(int) @ paths)[::3] > 0
        earlier = ranks[:, None] > ranks
        assert not np.any(depends & ~earlier)
        if min(widths, default=features) >= features:
            assert np.array_equal(depends, earlier), "wide enough layers reach everything"


def test_masks_in_full():
    assert masks.hidden_mask(np.array([0, 2, 1]), np.array([2, 1, 3])).tolist() == [[False] * 3, [True, True, False], [False, True, False]]
    assert masks.output_mask(np.array([1, 3]), np.array([0, 1, 3]), 1).tolist() == [[True, False, False], [True, True, False]]
