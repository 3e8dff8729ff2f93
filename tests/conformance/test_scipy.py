"""SciPy's functions of the same names: the same call gives the same shape and values."""

from __future__ import annotations

import numpy as np
import pytest

import numbakern
from tests import cases

special = pytest.importorskip("scipy.special")

AXES = [0, 1, 2, -1, -3, (0, 1), (2, 0), (-1, -2), (0, 1, 2), None]


@pytest.mark.parametrize("axis", AXES, ids=str)
@pytest.mark.parametrize("name", ["log_softmax", "softmax"])
@cases.dtypes(np.float32, np.float64)
def test_functions(name, axis, dtype):
    x = cases.logits((4, 5, 6), dtype)
    got, want = getattr(numbakern, name)(x, axis=axis), getattr(special, name)(x, axis=axis)
    assert got.dtype == want.dtype
    cases.assert_close(got, want, dtype)


@pytest.mark.parametrize("axis", AXES, ids=str)
@pytest.mark.parametrize("keepdims", [False, True], ids=["drop", "keepdims"])
@cases.dtypes(np.float32, np.float64)
def test_logsumexp(axis, keepdims, dtype):
    x = cases.logits((4, 5, 6), dtype)
    got = numbakern.logsumexp(x, axis=axis, keepdims=keepdims)
    want = special.logsumexp(x, axis=axis, keepdims=keepdims)
    assert got.dtype == want.dtype
    cases.assert_close(got, want, dtype)


@pytest.mark.parametrize("row", [[np.inf, 0], [-np.inf, -np.inf], [np.nan, np.inf], [1000, 1000]])
def test_logsumexp_of_special_values(row):
    want = special.logsumexp(np.array(row, float))
    np.testing.assert_array_equal(numbakern.logsumexp(np.array(row, float)), want)
