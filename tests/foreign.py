"""Flows of other libraries beside what was imported from them."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np

from fastmaf.backends.reference import free
from fastmaf.layers import Affine
from fastmaf.record import trainable

LOG_PROB = 1e-9
"""Largest error of log_prob in float64, relative."""

SAMPLES = 1e-7
"""Largest error of rows from the same noise in float64, relative."""

ROWS = 1000


@contextlib.contextmanager
def quiet():
    """Warnings of kernels that are absent are of no concern here; all others are errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* has no kernel for ")
        yield


def scrambled(flow, seed=0):
    """All weights random, that no mask holds at zero; and contexts standardised somehow."""
    rng, values = np.random.default_rng(seed), [np.empty(0)]
    for record in (*flow.layers, flow.base):
        for array, mask in zip(trainable(record), free(record), strict=True):
            values.append((array + 0.3 * rng.normal(size=array.shape) * mask).ravel())
    flow = flow.with_parameters(np.concatenate(values))
    if flow.context_features:
        flow.context_layers = [Affine(rng.normal(size=flow.context_features), rng.uniform(0.5, 2, flow.context_features))]
    return flow


def relative(actual, expected):
    """The largest error."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.isfinite(expected).all()
    return float((np.abs(actual - expected) / (1 + np.abs(expected))).max())


def rows(flow, seed=0):
    """Data and contexts: the flow's own samples, pushed apart, so that they lie where the flow has been trained and around."""
    rng = np.random.default_rng(seed)
    context = rng.normal(size=(ROWS, flow.context_features)) if flow.context_features else None
    return rng.normal(size=(ROWS, flow.features)) * rng.uniform(0.3, 1.5, (ROWS, 1)), context


def agree(made, log_prob, inverse=None, single=None, x=None, context=None):
    """The flow in float64 has the log-densities and rows of the library, and in float32 at most twice its errors.

    `made` gives the flow in a dtype; `log_prob` (x, context) and `inverse` (noise, context) are the library's in float64, `single` its
    log_prob in float32.
    """
    with quiet():
        wide, narrow = made("float64"), made("float32")
        own_x, own_context = rows(wide)
        x, context = own_x if x is None else x, own_context if context is None else context
        assert relative(wide.log_prob(x, context), log_prob(x, context)) <= LOG_PROB
        if inverse is not None:
            noise = np.random.default_rng(1).normal(size=x.shape)
            assert relative(wide.from_noise(noise, context), inverse(noise, context)) <= SAMPLES
        if single is not None:
            near = [None if a is None else a.astype(np.float32) for a in (x, context)]
            reference = log_prob(*[None if a is None else a.astype(np.float64) for a in near])
            size, floor = 1 + np.abs(reference), np.finfo(np.float32).eps
            error = [np.abs(np.asarray(f(*near), np.float64) - reference) / size for f in (narrow.log_prob, single)]
            assert np.sqrt((error[0] ** 2).mean()) <= 2 * np.sqrt((error[1] ** 2).mean()) + floor
            assert error[0].max() <= 3 * error[1].max() + floor  # which is the error of one row
