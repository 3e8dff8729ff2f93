"""The bounds in ulp: every function, every family of rows, forward and backward, to the label."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest

from tests import accuracy, cases
from tests.cases import bfloat16, float16, float32, float64

pytestmark = pytest.mark.skipif(
    not accuracy.HAS_LONG_DOUBLE, reason="long double is no wider than float64 here"
)


def assert_within(family, classes, dtype):
    over = []
    for name in accuracy.MEASURES:
        worst = accuracy.measure(name, family, classes, dtype)
        if worst is not None and not worst.closest <= worst.bound:
            over.append(f"{name}: {worst.closest:.4g} ulp, allowed are {worst.bound:.4g}")
    assert not over, "; ".join(over)


LONGEST = ("scale 4", "confident 80 of random", "-inf mask")  # the others' reference takes a minute


def marks_of(family, classes):
    return pytest.mark.slow if classes > 200_000 and family not in LONGEST else ()


FAMILIES_AND_CLASSES = [
    pytest.param(family, classes, id=f"{family}-{classes}", marks=marks_of(family, classes))
    for family in accuracy.FAMILIES
    for classes in accuracy.classes_of(family)
]


@pytest.mark.parametrize(("family", "classes"), FAMILIES_AND_CLASSES)
@cases.dtypes(float32, float64)
def test_worst_case(family, classes, dtype):
    assert_within(family, classes, dtype)


# Halves: what their range holds (float16 ends at 65504), and lengths that a test can afford.
HALF_FAMILIES = [f for f in accuracy.FAMILIES if f not in ("offset 1e5", "scale 500", "constant")]


@pytest.mark.parametrize("family", HALF_FAMILIES)
@cases.dtypes(bfloat16, slow=[float16])
def test_halves_are_rounded_once(family, dtype):
    for classes in accuracy.classes_of(family):
        if classes <= 1000:
            assert_within(family, classes, dtype)


def test_the_yardstick():
    for dtype in (np.float32, np.float64):
        for value in (1.0, 1.5, 0.75, 3e-5, 1e30):
            assert accuracy.ulp(dtype(value), dtype) == np.spacing(dtype(value))
        tiny = np.finfo(dtype).smallest_normal
        assert accuracy.ulp(tiny / 8, dtype) == np.finfo(dtype).smallest_subnormal
    one = np.array([1.0], float32)
    assert accuracy.errors(np.nextafter(one, 2), one, float32) == 1
    assert accuracy.errors(np.zeros(1), np.array([1e-40]), float32, flushed=True) == 0
    assert accuracy.errors(np.zeros(1), np.array([1e-40]), float32) > 1e4
    assert accuracy.errors(np.array([np.nan]), one, float32) == np.inf
    assert accuracy.errors(np.array([np.inf]), np.array([-np.inf]), float32) == np.inf


def test_the_mean_of_many_rows():
    """A naive float32 sum of 200000 equal losses would be off by hundreds of ulp."""
    import numbakern

    x = np.tile(np.array([[0.1, 1.7, -0.3]], float32), (200_000, 1))
    labels = np.zeros(len(x), np.int8)
    loss = -accuracy.reference.log_softmax(x[:1], work=accuracy.WORK)[0, 0]
    for reduction, want in [("mean", loss), ("sum", loss * len(x))]:
        got = numbakern.cross_entropy(x, labels, reduction=reduction)
        assert accuracy.errors(got, want, float32) <= 6
        got, _ = numbakern.cross_entropy_value_and_grad(x, labels, reduction=reduction)
        assert accuracy.errors(got, want, float32) <= 6


@pytest.mark.parametrize("classes", [2048, 2049, 4096, 4097, 12289])
@pytest.mark.parametrize("lead", [80.0, 300.0])
def test_confident_float64_rows_of_many_blocks(classes, lead):
    """However far above the others: no subtraction rounds what the loss consists of."""
    import numbakern

    x = np.random.default_rng(classes).standard_normal(classes)
    for position in (0, classes - 1):
        row = x.copy()
        row[position] += lead
        with mpmath.workprec(400):
            m = mpmath.mpf(float(row[position]))
            rest = sum(mpmath.exp(mpmath.mpf(float(v)) - m) for v in np.delete(row, position))
            want = -mpmath.log1p(rest)
            gradient = -rest / (1 + rest)

        def ulps(value, want):
            return abs(float((mpmath.mpf(float(value)) - want) / np.spacing(abs(float(want)))))

        assert ulps(numbakern.log_softmax(row)[position], want) <= 3
        for axis in (0, 1):
            one = row.reshape((-1, 1) if axis == 0 else (1, -1))
            loss, grad = numbakern.cross_entropy_value_and_grad(one, [position], axis=axis)
            assert ulps(-loss, want) <= 3
            assert ulps(grad.ravel()[position], gradient) <= 4
