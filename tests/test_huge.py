"""Arrays of more than 2**31 elements: no index is kept in 32 bits. 12 GB of memory, minutes."""

from __future__ import annotations

import numpy as np
import pytest

import numbakern
from tests.cases import float16

pytestmark = pytest.mark.slow

LARGE = 2**31 + 4096  # elements; 4 GB of float16


def test_one_row_is_longer():
    x = np.zeros(LARGE, np.int8)
    x[-1] = 40
    want = np.logaddexp(40.0, np.log(LARGE - 1))
    np.testing.assert_allclose(numbakern.logsumexp(x), want, rtol=1e-14)


def test_rows_beyond_the_limit():
    rows, classes = LARGE // 1024, 1024
    x = np.zeros((rows, classes), float16)
    x[-1, -1] = 5
    want_last = -np.log1p(1023 * np.exp(-5.0))
    assert numbakern.log_softmax(x, out=x) is x
    np.testing.assert_allclose(x[-1, -1].astype(float), want_last, rtol=1e-3)
    np.testing.assert_allclose(x[-2].astype(float), -np.log(1024), rtol=1e-3)
    np.testing.assert_allclose(x[-1, 0].astype(float), want_last - 5, rtol=1e-3)


def test_columns_beyond_the_limit():
    x = np.zeros((3, LARGE // 3 + 1), float16)
    x[2, -1] = 5
    numbakern.log_softmax(x, axis=0, out=x)
    np.testing.assert_allclose(x[:, 0].astype(float), -np.log(3), rtol=1e-3)
    np.testing.assert_allclose(x[2, -1].astype(float), -np.log1p(2 * np.exp(-5.0)), rtol=2e-3)


@pytest.mark.parametrize("axis", [1, 0], ids=["rows", "columns"])
def test_a_training_step_beyond_the_limit(axis):
    rows, classes = LARGE // 1024, 1024
    x = np.zeros((rows, classes) if axis == 1 else (classes, rows), float16)
    labels = np.full(rows, 1023, np.int16)
    labels[0] = 0
    loss, grad = numbakern.cross_entropy_value_and_grad(
        x, labels, reduction="sum", axis=axis, out=x
    )
    np.testing.assert_allclose(loss, rows * np.log(1024), rtol=1e-6)
    grad = grad if axis == 1 else grad.T
    want = np.full(classes, 1 / 1024)
    want[-1] -= 1
    np.testing.assert_allclose(grad[-1].astype(float), want, rtol=1e-3)
    np.testing.assert_allclose(grad[0].astype(float), np.roll(want, 1), rtol=1e-3)
