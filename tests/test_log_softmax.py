"""log_softmax and its backward: values over types, layouts, axes; `out=`, `dtype=`; edge cases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from numbakern import log_softmax, log_softmax_backward, logsumexp, softmax
from tests import accuracy, cases, reference
from tests.cases import assert_close, assert_result, bfloat16, float16, float32, float64

WHOLE_AND_PART = [0, 1, 2, -1, -2, -3, (0, 1), (1, 2), (0, 2), (2, 0), (-1, 0), (0, 1, 2), None]


# --- values --------------------------------------------------------------------------------------


@cases.dtypes(*cases.FLOATS)
@pytest.mark.parametrize("classes", cases.CLASS_COUNTS)
def test_values(classes, dtype):
    x = cases.logits((5, classes), dtype)
    assert_result(log_softmax(x), reference.log_softmax(x), dtype)


@cases.dtypes(*cases.FLOATS)
@pytest.mark.parametrize(("shape", "axis"), cases.SHAPES_AND_AXES)
def test_shapes_and_axes(shape, axis, dtype):
    x = cases.logits(shape, dtype)
    assert_result(log_softmax(x, axis), reference.log_softmax(x, axis), dtype)


@pytest.mark.parametrize("axis", WHOLE_AND_PART, ids=str)
def test_one_axis_several_or_all(axis):
    x = cases.logits((4, 5, 6))
    assert_result(log_softmax(x, axis=axis), reference.log_softmax(x, axis), float32)


@cases.zoo()
@pytest.mark.parametrize("axis", [-1, 0, None], ids=str)
def test_layouts(layout, axis):
    x = layout(cases.logits((6, 35)))
    assert_result(log_softmax(x, axis), reference.log_softmax(x, axis), float32)


@cases.zoo(["reversed_all", "every_other_last", "byte_swapped", "misaligned", "record_field"])
@cases.dtypes(float16, bfloat16, float64)
def test_layouts_of_other_types(layout, dtype):
    x = layout(cases.logits((6, 35), dtype))
    assert_result(log_softmax(x), reference.log_softmax(x), dtype)


@cases.dtypes(*cases.INTEGERS, cases.BOOL)
def test_integers_are_computed_in_float64(dtype):
    x = cases.logits((4, 9), dtype)
    assert_result(log_softmax(x), reference.log_softmax(x), float64)


def test_large_integers():
    x = np.array([[2**62, 2**62 - 2**40, -(2**63)]])
    assert_result(log_softmax(x), reference.log_softmax(x), float64)
    x = np.array([[2**64 - 1, 0]], np.uint64)
    assert_result(log_softmax(x), reference.log_softmax(x), float64)


@pytest.mark.parametrize(
    "x",
    [[1.0, 2.0, 3.0], ((1, 2), (3, 5)), [[True, False]], range(5)],
    ids=["list", "tuples", "bools", "range"],
)
def test_whatever_numpy_takes_as_an_array(x):
    assert_result(log_softmax(x), reference.log_softmax(x), float64)


def test_an_object_with_the_array_protocol():
    class Holder:
        def __array__(self, dtype=None, copy=None):
            return np.array([0.0, 1.0], float32)

    assert_result(log_softmax(Holder()), reference.log_softmax([0.0, 1.0]), float32)


@pytest.mark.parametrize("x", [np.float32(3), np.array(3, float32)], ids=["scalar", "0-d"])
def test_a_scalar_over_all_its_axes(x):
    assert_result(log_softmax(x, axis=None), np.float64(0), float32)


def test_the_input_stays_as_it_was():
    x = cases.logits((5, 10))
    before = x.copy()
    log_softmax(x)
    log_softmax(x, 0)
    assert cases.same_bits(x, before)


def test_naive_formula_would_print_minus_infinity():
    """The README's numbers: [-1, 0, 1]·alpha; log of softmax loses them from alpha = 104 on."""
    for alpha in (2, 20, 104, 1000):
        x = np.array([-1, 0, 1], float32) * float32.type(alpha)
        got = log_softmax(x)
        assert np.all(np.isfinite(got))
        assert_result(got, reference.log_softmax(x), float32)


# --- dtype= --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (float32, float64),
        (float64, float32),
        (float16, float32),
        (bfloat16, float32),
        (float32, float16),
        (float32, bfloat16),
        (np.dtype(np.int32), float32),
    ],
    ids=str,
)
def test_dtype_casts(given, wanted):
    x = np.array([[0, 1, 2.5, -3], [4, 4, -8, 0.5]]).astype(given)  # the same in every type
    assert_result(log_softmax(x, dtype=wanted), reference.log_softmax(x), wanted)
    assert_result(log_softmax(x, 0, dtype=wanted.type), reference.log_softmax(x, 0), wanted)
    if wanted != bfloat16:
        assert_result(log_softmax(x, dtype=wanted.name), reference.log_softmax(x), wanted)


def test_dtype_is_the_type_of_the_computation():
    x = np.array([1e-9, 0.0], float64)
    assert_result(log_softmax(x.astype(float32), dtype=float64), reference.log_softmax(x), float64)


# --- out= ----------------------------------------------------------------------------------------


@cases.zoo(cases.OUT_ZOO)
@pytest.mark.parametrize("axis", [-1, 0])
def test_out_of_every_layout(layout, axis):
    x = cases.logits((6, 35))
    out = cases.filled_like(layout, x.shape, float32)
    assert log_softmax(x, axis, out=out) is out
    assert_close(out, reference.log_softmax(x, axis), float32)


def test_out_writes_between_the_lines_only():
    x = cases.logits((6, 35))
    wide = np.full((12, 70), 7, float32)
    log_softmax(x, out=wide[::2, 1::2])
    assert_close(wide[::2, 1::2], reference.log_softmax(x), float32)
    wide[::2, 1::2] = 7
    assert np.all(wide == 7)


@cases.zoo(cases.OUT_ZOO)
@pytest.mark.parametrize("axis", [-1, 0, None], ids=str)
def test_in_place(layout, axis):
    x = layout(cases.logits((6, 35)))
    want = reference.log_softmax(x, axis)
    assert log_softmax(x, axis, out=x) is x
    assert_close(x, want, float32)


@cases.dtypes(float16, bfloat16, float64)
def test_in_place_other_types(dtype):
    x = cases.logits((3, 1000), dtype)
    want = reference.log_softmax(x)
    log_softmax(x, out=x)
    assert_close(x, want, dtype)


OVERLAPS = {
    "shifted_ahead": (np.s_[:-1], np.s_[1:]),
    "shifted_behind": (np.s_[1:], np.s_[:-1]),
    "reversed": (np.s_[:], np.s_[::-1]),
    "by_half_a_row": (np.s_[:-17], np.s_[17:]),
}


@pytest.mark.parametrize(("read", "write"), OVERLAPS.values(), ids=OVERLAPS)
@pytest.mark.parametrize("axis", [-1, 0])
def test_out_that_overlaps_the_input(read, write, axis):
    line = cases.logits(40 * 35 + 17)
    source, target = line[read], line[write]
    size = (min(source.size, target.size) // 35) * 35
    x, out = source[:size].reshape(-1, 35), target[:size].reshape(-1, 35)
    assert np.shares_memory(x, out)
    want = reference.log_softmax(x, axis)
    log_softmax(x, axis, out=out)
    assert_close(out, want, float32)


def test_out_the_transposed_input():
    x = cases.logits((35, 35))
    want = reference.log_softmax(x)
    log_softmax(x, out=x.T)
    assert_close(x.T, want, float32)


def test_out_with_dtype_shares_memory_of_another_type():
    raw = np.zeros(800, np.uint8)
    x, out = raw[:400].view(float32).reshape(10, 10), raw.view(float64).reshape(10, 10)
    x[...] = cases.logits((10, 10))
    want = reference.log_softmax(x)
    log_softmax(x, dtype=float64, out=out)
    assert_close(out, want, float32)


# --- the case table ------------------------------------------------------------------------------

INF, NAN = np.inf, np.nan
SPECIAL_ROWS = {
    "nan": [1.0, NAN, 2.0],
    "plus_inf": [1.0, INF, 2.0],
    "two_plus_inf": [INF, INF, 0.0],
    "plus_and_minus_inf": [INF, -INF, 0.0],
    "nan_and_inf": [NAN, INF, -INF],
    "all_minus_inf": [-INF, -INF, -INF],
    "minus_inf_among_finite": [0.0, -INF, 1.0],
    "only_one_finite": [-INF, 5.0, -INF],
    "equal_huge": [3e38, 3e38, -3e38],
    "minus_zero": [-0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("row", SPECIAL_ROWS.values(), ids=SPECIAL_ROWS)
@pytest.mark.parametrize("repeat", [1, 30], ids=["short", "long"])
@pytest.mark.parametrize("axis", [-1, 0])
@cases.dtypes(float32, float64)
def test_special_rows(row, repeat, axis, dtype):
    x = np.zeros((3, 3 * repeat), dtype)
    x[1] = np.resize(np.array(row, dtype), 3 * repeat)
    x = np.ascontiguousarray(x.T) if axis == 0 else x
    got, want = log_softmax(x, axis), reference.log_softmax(x, axis)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    assert_result(got, want, dtype)


@pytest.mark.parametrize("position", [0, 1, 63, 64, 500, 999])
@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
@cases.dtypes(float16, bfloat16, float32, float64)
def test_one_bad_value_anywhere_spoils_its_row_only(position, bad, dtype):
    x = cases.logits((3, 1000), dtype)
    x[1, position] = bad
    got = log_softmax(x)
    assert np.all(np.isnan(got[1].astype(float64)))
    assert_close(got[::2], reference.log_softmax(x[::2]), dtype)


@pytest.mark.parametrize("position", [0, 1, 63, 64, 500, 999])
def test_minus_inf_stays_minus_inf(position):
    x = cases.logits((3, 1000))
    x[1, position] = -INF
    got = log_softmax(x)
    assert got[1, position] == -INF
    assert_close(got, reference.log_softmax(x), float32)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("axis", [0, -1, None], ids=str)
@cases.dtypes(float16, float32)
def test_empty(shape, axis, dtype):
    assert_result(log_softmax(np.zeros(shape, dtype), axis), np.zeros(shape), dtype)
    out = np.zeros(shape, dtype)
    assert log_softmax(np.zeros(shape, dtype), axis, out=out) is out


def test_one_class_is_certain():
    assert np.array_equal(log_softmax(np.array([[5.0], [-1e30]], float32)), [[0], [0]])


# --- backward ------------------------------------------------------------------------------------


def backward_inputs(shape, axis, dtype=float32):
    g = cases.logits(shape, dtype, scale=1.0, seed=10)
    return g, reference.log_softmax(cases.logits(shape), axis).astype(dtype)


@cases.dtypes(*cases.FLOATS)
@pytest.mark.parametrize("classes", cases.CLASS_COUNTS)
def test_backward_values(classes, dtype):
    g, y = backward_inputs((5, classes), -1, dtype)
    want = reference.log_softmax_backward(g, y)
    assert_result(log_softmax_backward(g, y), want, dtype, scale=4)


@cases.dtypes(float32, float16)
@pytest.mark.parametrize(("shape", "axis"), cases.SHAPES_AND_AXES)
def test_backward_shapes_and_axes(shape, axis, dtype):
    g, y = backward_inputs(shape, axis, dtype)
    want = reference.log_softmax_backward(g, y, axis)
    assert_result(log_softmax_backward(g, y, axis), want, dtype, scale=4)


@cases.zoo()
@pytest.mark.parametrize("which", ["grad_output", "output", "both"])
@pytest.mark.parametrize("axis", [-1, 0])
def test_backward_layouts(layout, which, axis):
    g, y = backward_inputs((6, 35), axis)
    g = layout(g) if which != "output" else g
    y = layout(y) if which != "grad_output" else y
    want = reference.log_softmax_backward(g, y, axis)
    assert_result(log_softmax_backward(g, y, axis), want, float32, scale=4)


@pytest.mark.parametrize("axis", [-1, 0])
def test_backward_of_a_constant_gradient(axis):
    """loss.sum().backward() hands down one number seen as an array."""
    _, y = backward_inputs((6, 35), axis)
    g = np.broadcast_to(float32.type(1.5), y.shape)
    want = reference.log_softmax_backward(g, y, axis)
    assert_result(log_softmax_backward(g, y, axis), want, float32, scale=4)


@pytest.mark.parametrize("target", ["grad_output", "output", "strided", "overlapping"])
@pytest.mark.parametrize("axis", [-1, 0])
def test_backward_out(target, axis):
    buffer = np.zeros((7, 35), float32)
    g, y = backward_inputs((6, 35), axis)
    buffer[1:] = g
    g = buffer[1:]
    want = reference.log_softmax_backward(g, y, axis)
    out = {
        "grad_output": g,
        "output": y,
        "strided": np.full((35, 12), 7, float32).T[::2],
        "overlapping": buffer[:-1],
    }[target]
    assert log_softmax_backward(g, y, axis, out=out) is out
    assert_close(out, want, float32, scale=4)


def backward_along(axis, g, y):
    """log_softmax_backward of rows, from arrays whose classes lie along this axis."""
    g, y = (np.ascontiguousarray(np.moveaxis(v, 1, axis)) for v in (g, y))
    return np.moveaxis(log_softmax_backward(g, y, axis), axis, 1)


@cases.dtypes(float32, float64)
@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("classes", [3, 10, 100, 300, 4099])
def test_backward_of_gradients_that_cancel(classes, axis, dtype):
    """In ulp of the larger one of what is subtracted, whatever Σg has lost by cancelling."""
    rng = cases.generator(11, classes)
    y = reference.log_softmax(rng.normal(0, 3, (40, classes))).astype(dtype)
    g = rng.normal(0, 4, y.shape)
    g = (g - np.mean(g, axis=1, keepdims=True) + 1e-3 * rng.normal(0, 1, (40, 1))).astype(dtype)
    wide = [v.astype(np.longdouble) for v in (g, y)]
    grad_sum = [[math.fsum(row.tolist())] for row in g]  # rounded once
    part = np.exp(wide[1]) * grad_sum
    got = backward_along(axis, g, y)
    error = np.abs(got - (wide[0] - part))
    ulp = np.spacing(np.maximum(np.abs(g), np.abs(part)).astype(dtype))
    assert np.all(error <= (8 - wide[1]) * ulp)


@pytest.mark.skipif(not accuracy.HAS_LONG_DOUBLE, reason="long double is no wider than float64")
@cases.dtypes(float32, float64)
@pytest.mark.parametrize("axis", [-1, 0])
def test_backward_of_large_sums_and_small_probabilities(axis, dtype):
    """exp(y)·Σg is a number of the type where exp(y) is none."""
    lowest = math.log(np.finfo(dtype).smallest_normal)
    scale = np.exp(np.linspace(0.8, -0.8, 33) * -lowest).astype(dtype)
    g, y = np.zeros((33, 8), dtype), np.full((33, 8), 1.4 * lowest, dtype)
    g[:, 0], y[:, 0], y[:, 3:] = scale, 0, lowest * np.linspace(0, 1.6, 5)
    got = backward_along(axis, g, y)
    wide_g, wide_y = (v.astype(np.longdouble) for v in (g, y))
    part = np.exp(wide_y) * np.sum(wide_g, axis=1, keepdims=True)
    ulp = np.spacing(np.maximum(np.abs(wide_g), part).astype(dtype))
    flushed = (got == 0) & (part < np.finfo(dtype).smallest_normal)
    assert np.all((np.abs(got - (wide_g - part)) <= 4 * ulp) | flushed)
    assert np.any((np.abs(got) > 0) & (np.exp(y) == 0))


@cases.dtypes(float16, bfloat16, float32, float64)
def test_backward_of_a_certain_class(dtype):
    """exp(0) is 1: what a confident row's label has of the gradient is exactly 0."""
    g = np.array([[1, 0, 0], [-3, 0, 0], [0.1, 0, 0]], dtype)
    y = np.array([[0, -40, -50]] * 3, dtype)
    np.testing.assert_array_equal(log_softmax_backward(g, y)[:, 0], np.zeros(3, dtype))


def test_backward_of_masked_classes():
    """Where log-probability is -inf the probability is 0 and the gradient passes unchanged."""
    g = np.array([[1.0, 2.0, 3.0]], float32)
    y = reference.log_softmax([[0.0, -INF, 1.0]]).astype(float32)
    got = log_softmax_backward(g, y)
    assert got[0, 1] == 2.0
    assert_close(got, reference.log_softmax_backward(g, y), float32, scale=6)


@pytest.mark.parametrize("classes", [3, 300, 20_000])
@pytest.mark.parametrize("infinity", [INF, -INF], ids=str)
def test_backward_of_an_infinite_gradient(infinity, classes):
    g, y = backward_inputs((2, classes), -1)
    g[1, 2] = infinity
    with np.errstate(invalid="ignore"):
        want = reference.log_softmax_backward(g, y)
    assert np.isinf(want[1, 0])
    assert_close(log_softmax_backward(g, y), want, float32, scale=4)


def test_backward_of_a_nan_row_is_nan():
    g, y = backward_inputs((3, 10), -1)
    y[1] = NAN
    got = log_softmax_backward(g, y)
    assert np.all(np.isnan(got[1]))
    assert np.all(np.isfinite(got[::2]))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_backward_empty(shape):
    empty = np.zeros(shape, float32)
    assert_result(log_softmax_backward(empty, empty), empty, float32)


def test_backward_of_lists():
    g, y = [[1.0, 0.0]], [[-np.log(2), -np.log(2)]]
    assert_result(log_softmax_backward(g, y), [[0.5, -0.5]], float64)


# Each integer type as one of the floating ones; as all of them in the slow run.
INTEGERS_TO = [
    pytest.param(dtype, to, marks=[] if (i + j) % 3 == 0 else pytest.mark.slow)
    for i, dtype in enumerate([*cases.INTEGERS, cases.BOOL])
    for j, to in enumerate([float16, float32, float64])
]


@pytest.mark.parametrize(("dtype", "to"), INTEGERS_TO)
def test_integers_as_a_type_that_is_asked_for(dtype, to):
    x = cases.logits((5, 7), dtype)
    want = reference.log_softmax(x)
    cases.assert_close(log_softmax(x, dtype=to), want, to)
    cases.assert_close(softmax(x, dtype=to), reference.softmax(x), to)
    assert logsumexp(x, dtype=to).shape == (5,)
