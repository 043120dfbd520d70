"""How far a backend may be from the reference in float64, by operation; for the flows of `make`, whose numbers are of order one."""

from __future__ import annotations

import numpy as np

LIMITS = {
    "log_prob": (40, 10),
    "to_noise": (40, 20),
    "from_noise": (40, 40),
    "sample": (40, 40),
    "normals": (2, 8),
    "round trip": (400, 200),
    "density of samples": (400, 100),
    "refinement": (20, 40),
    "gradient": (1000, 200),
    "parameters": (1000, 100),
    "differences": (2e8, 2e8),
    "derivatives": (1e8, 1e8),
}
"""For each operation (a, k): an error is at most ``(a + k |reference|) eps`` of the dtype."""

FLOAT32_LOG_PROB = {
    (6, (100, 100), 0): (1e-6, 3e-6),
    (6, (100, 100), -2): (2e-6, 6e-6),
    (43, (512, 512), -2): (1e-5, 3e-5),
}
"""Root mean square and largest error of log_prob in float32, by features, hidden layers and offset of the log-scale."""

PRECISIONS = {"highest": 1, "high": 2, "medium": 2000}
"""How many times the errors of float32 a precision of matrix products on a GPU may have."""

EXPORT_ULPS = 4
"""How far exported C may be from the reference in float64: units in the last place of the largest number of a row, or of 1."""

P_VALUE = 1e-3
"""A test of samples with a fixed seed fails below this."""

INTEGRAL = 5e-3
"""How far from 1 a fitted density may integrate."""

FIT = 0.06
"""A distance of Kolmogorov and Smirnov between a small fit and its data."""

MOVED = 1e-4
"""A change that rounding in float32 cannot hide."""


def tolerance(operation, dtype, reference):
    """The largest allowed error of each number."""
    a, k = LIMITS[operation]
    return (a + k * np.abs(reference)) * np.finfo(dtype).eps


def assert_close(operation, dtype, actual, reference, factor=1.0):
    """Equal to tolerance where the reference is finite, and equal where it is not; `factor` for flows with steep or summed results."""
    actual, reference = np.asarray(actual), np.asarray(reference)
    assert actual.shape == reference.shape, f"shape {actual.shape}, expected {reference.shape}"
    if not actual.size:
        return
    finite = np.isfinite(reference)
    np.testing.assert_array_equal(actual[~finite], reference[~finite].astype(actual.dtype))
    error = np.abs(actual.astype(np.float64)[finite] - reference[finite])
    allowed = factor * tolerance(operation, dtype, reference[finite])
    worst = np.argmax(np.where(np.isnan(error), np.inf, error / allowed)) if error.size else 0
    assert not error.size or error[worst] <= allowed[worst], (
        f"{operation} in {dtype}: {actual[finite][worst]!r}, expected {reference[finite][worst]!r}; "
        f"error {error[worst]:.3g}, allowed {allowed[worst]:.3g}"
    )
