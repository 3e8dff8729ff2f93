"""The reference itself: against 50 digits (mpmath), against SciPy, and on hand-worked numbers."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest

from tests import cases, reference

ROWS = {
    "ordinary": [0.5, -1.25, 3.0, 2.75, -7.0],
    "two": [0.0, -30.0],
    "confident": [80.0, 0.0, 1.0, -1.0],
    "very_confident": [300.0, 0.0, 0.0],
    "offset": [1e5 + 0.5, 1e5, 1e5 - 3.0],
    "constant": [4.0] * 7,
    "masked": [1.0, -np.inf, 2.0, -np.inf],
    "wide": [-500.0, 499.0, 120.0, 498.5],
}


def mp_log_softmax(row):
    with mpmath.workdps(200):  # exp(-300) beside 1, with 50 digits of it left
        total = mpmath.fsum(mpmath.exp(mpmath.mpf(v)) for v in row)
        return [mpmath.mpf(v) - mpmath.log(total) for v in row]


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("work", [np.float64, np.longdouble], ids=["float64", "longdouble"])
def test_log_softmax_has_all_its_digits(row, work):
    got = reference.log_softmax(np.array(row), work=work)
    epsilon = float(np.finfo(work).eps)
    for value, want in zip(got, mp_log_softmax(row), strict=True):
        if mpmath.isinf(want):
            assert value == -np.inf
            continue
        with mpmath.workdps(60):
            mantissa, exponent = np.frexp(value)
            digits = mpmath.ldexp(mpmath.mpf(int(np.ldexp(mantissa, 64))), int(exponent) - 64)
            spread = 1 + max(abs(v) for v in row if np.isfinite(v))
            assert abs(digits - want) <= 4 * spread * epsilon * abs(want)


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 1), None], ids=str)
def test_against_scipy(axis):
    special = pytest.importorskip("scipy.special")
    x = cases.logits((6, 11), cases.float64)
    np.testing.assert_allclose(reference.log_softmax(x, axis), special.log_softmax(x, axis), 1e-13)
    np.testing.assert_allclose(reference.softmax(x, axis), special.softmax(x, axis), 1e-13)
    np.testing.assert_allclose(reference.logsumexp(x, axis), special.logsumexp(x, axis), 1e-13)


def test_losses_by_hand():
    logp = np.log([[0.5, 0.25, 0.25], [0.125, 0.5, 0.375]])
    weight = [1.0, 2.0, 4.0]
    rows = [2 * np.log(4), np.log(8)]
    for reduction, want in [("none", rows), ("sum", sum(rows)), ("mean", sum(rows) / 3)]:
        np.testing.assert_allclose(
            reference.nll_loss(logp, [1, 0], weight, reduction=reduction), want, 1e-15
        )
        np.testing.assert_allclose(  # logits + any number have the same losses
            reference.cross_entropy(logp + 7, [1, 0], weight, reduction=reduction), want, 1e-14
        )
    smooth = 0.7 * 2 * np.log(4) + 0.1 * (np.log(2) + 2 * np.log(4) + 4 * np.log(4))
    np.testing.assert_allclose(
        reference.cross_entropy(logp[:1], [1], weight, reduction="none", label_smoothing=0.3),
        [smooth],
        1e-14,
    )
    half = 0.5 * np.log(2) + 0.5 * np.log(4)
    np.testing.assert_allclose(
        reference.cross_entropy(logp[:1], [[0.5, 0.5, 0.0]], reduction="mean"), half, 1e-14
    )


def test_ignored_rows_and_nothing_counted():
    logits = np.array([[np.nan, 1.0], [0.0, 0.0]])
    got = reference.cross_entropy(logits, [-100, 1], reduction="none")
    np.testing.assert_allclose(got, [0, np.log(2)])
    assert np.isnan(reference.cross_entropy(logits, [-100, -100]))
    grad = reference.cross_entropy_backward(1.0, logits, [-100, 1], reduction="sum")
    np.testing.assert_allclose(grad, [[0, 0], [0.5, -0.5]])


def test_gradient_at_a_confident_label_does_not_cancel():
    grad = reference.cross_entropy_backward(1.0, np.array([[80.0, 0.0]]), [0], reduction="sum")
    np.testing.assert_allclose(grad, [[-np.exp(-80), np.exp(-80)]], 1e-13)
