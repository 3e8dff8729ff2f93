"""softmax and its backward: values over types, layouts, axes; `out=`, `dtype=`; edge cases."""

from __future__ import annotations

import numpy as np
import pytest

from numbakern import softmax, softmax_backward
from tests import cases, reference
from tests.cases import assert_close, assert_result, bfloat16, float16, float32, float64
from tests.test_log_softmax import OVERLAPS, SPECIAL_ROWS, WHOLE_AND_PART

INF, NAN = np.inf, np.nan

# --- values --------------------------------------------------------------------------------------


@cases.dtypes(*cases.FLOATS)
@pytest.mark.parametrize("classes", cases.CLASS_COUNTS)
def test_values(classes, dtype):
    x = cases.logits((5, classes), dtype)
    assert_result(softmax(x), reference.softmax(x), dtype)


@cases.dtypes(float32, float16)
@pytest.mark.parametrize(("shape", "axis"), cases.SHAPES_AND_AXES)
def test_shapes_and_axes(shape, axis, dtype):
    x = cases.logits(shape, dtype)
    assert_result(softmax(x, axis), reference.softmax(x, axis), dtype)


@pytest.mark.parametrize("axis", WHOLE_AND_PART, ids=str)
def test_one_axis_several_or_all(axis):
    x = cases.logits((4, 5, 6))
    got = softmax(x, axis=axis)
    assert_result(got, reference.softmax(x, axis), float32)
    np.testing.assert_allclose(np.sum(got, axis=axis, dtype=float64), 1, rtol=1e-6)


@cases.zoo()
@pytest.mark.parametrize("axis", [-1, 0, None], ids=str)
def test_layouts(layout, axis):
    x = layout(cases.logits((6, 35)))
    assert_result(softmax(x, axis), reference.softmax(x, axis), float32)


@cases.dtypes(*cases.INTEGERS, cases.BOOL)
def test_integers_are_computed_in_float64(dtype):
    x = cases.logits((4, 9), dtype)
    assert_result(softmax(x), reference.softmax(x), float64)


@pytest.mark.parametrize("x", [[1.0, 2.0, 3.0], ((1, 2), (3, 5))], ids=["list", "tuples"])
def test_whatever_numpy_takes_as_an_array(x):
    assert_result(softmax(x), reference.softmax(x), float64)


@pytest.mark.parametrize("x", [np.float32(3), np.array(3, float32)], ids=["scalar", "0-d"])
def test_a_scalar_over_all_its_axes(x):
    assert_result(softmax(x, axis=None), np.float64(1), float32)


# --- dtype= and out= -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(float32, float64), (bfloat16, float32), (float32, float16), (np.dtype(np.int32), float32)],
    ids=str,
)
def test_dtype_casts(given, wanted):
    x = np.array([[0, 1, 2.5, -3], [4, 4, -8, 0.5]]).astype(given)  # the same in every type
    assert_result(softmax(x, dtype=wanted), reference.softmax(x), wanted)


@cases.zoo(cases.OUT_ZOO)
@pytest.mark.parametrize("axis", [-1, 0])
def test_out_of_every_layout(layout, axis):
    x = cases.logits((6, 35))
    out = cases.filled_like(layout, x.shape, float32)
    assert softmax(x, axis, out=out) is out
    assert_close(out, reference.softmax(x, axis), float32)


@cases.zoo(cases.OUT_ZOO)
@pytest.mark.parametrize("axis", [-1, 0, None], ids=str)
def test_in_place(layout, axis):
    x = layout(cases.logits((6, 35)))
    want = reference.softmax(x, axis)
    assert softmax(x, axis, out=x) is x
    assert_close(x, want, float32)


@pytest.mark.parametrize(("read", "write"), OVERLAPS.values(), ids=OVERLAPS)
def test_out_that_overlaps_the_input(read, write):
    line = cases.logits(40 * 35 + 17)
    source, target = line[read], line[write]
    size = (min(source.size, target.size) // 35) * 35
    x, out = source[:size].reshape(-1, 35), target[:size].reshape(-1, 35)
    want = reference.softmax(x)
    softmax(x, out=out)
    assert_close(out, want, float32)


# --- the case table ------------------------------------------------------------------------------


@pytest.mark.parametrize("row", SPECIAL_ROWS.values(), ids=SPECIAL_ROWS)
@pytest.mark.parametrize("repeat", [1, 30], ids=["short", "long"])
@pytest.mark.parametrize("axis", [-1, 0])
@cases.dtypes(float32, float64)
def test_special_rows(row, repeat, axis, dtype):
    x = np.zeros((3, 3 * repeat), dtype)
    x[1] = np.resize(np.array(row, dtype), 3 * repeat)
    x = np.ascontiguousarray(x.T) if axis == 0 else x
    got, want = softmax(x, axis), reference.softmax(x, axis)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    assert_result(got, want, dtype)


@pytest.mark.parametrize("position", [0, 63, 64, 999])
@cases.dtypes(*cases.FLOATS)
def test_minus_inf_is_exactly_zero(position, dtype):
    x = cases.logits((3, 1000), dtype)
    x[1, position] = -INF
    got = softmax(x)
    assert got[1, position] == 0
    assert_close(got, reference.softmax(x), dtype)


@pytest.mark.parametrize("classes", [3, 300, 20_000])
@pytest.mark.parametrize("infinity", [INF, -INF], ids=str)
def test_backward_of_an_infinite_gradient(infinity, classes):
    """Its own element is NaN, all others are infinite."""
    g = cases.logits((2, classes))
    y = cases.probabilities(g.shape, 1)
    g[1, 2] = infinity
    with np.errstate(invalid="ignore"):
        want = reference.softmax_backward(g, y)
    assert np.isnan(want[1]).sum() == 1 and np.isinf(want[1]).sum() == classes - 1
    assert_close(softmax_backward(g, y), want, float32, scale=4)


@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
@cases.dtypes(*cases.FLOATS)
def test_one_bad_value_spoils_its_row_only(bad, dtype):
    x = cases.logits((3, 1000), dtype)
    x[1, 700] = bad
    got = softmax(x)
    assert np.all(np.isnan(got[1].astype(float64)))
    assert_close(got[::2], reference.softmax(x[::2]), dtype)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("axis", [0, -1, None], ids=str)
def test_empty(shape, axis):
    assert_result(softmax(np.zeros(shape, float32), axis), np.zeros(shape), float32)


def test_one_class_is_certain():
    assert np.array_equal(softmax(np.array([[5.0], [-1e30]], float32)), [[1], [1]])


# --- backward ------------------------------------------------------------------------------------


def backward_inputs(shape, axis, dtype=float32):
    g = cases.logits(shape, dtype, scale=1.0, seed=10)
    return g, reference.softmax(cases.logits(shape), axis).astype(dtype)


@cases.dtypes(*cases.FLOATS)
@pytest.mark.parametrize("classes", cases.CLASS_COUNTS)
def test_backward_values(classes, dtype):
    g, y = backward_inputs((5, classes), -1, dtype)
    assert_result(softmax_backward(g, y), reference.softmax_backward(g, y), dtype)


@cases.dtypes(float32, bfloat16)
@pytest.mark.parametrize(("shape", "axis"), cases.SHAPES_AND_AXES)
def test_backward_shapes_and_axes(shape, axis, dtype):
    g, y = backward_inputs(shape, axis, dtype)
    want = reference.softmax_backward(g, y, axis)
    assert_result(softmax_backward(g, y, axis), want, dtype)


@cases.zoo()
@pytest.mark.parametrize("which", ["grad_output", "output", "both"])
@pytest.mark.parametrize("axis", [-1, 0])
def test_backward_layouts(layout, which, axis):
    g, y = backward_inputs((6, 35), axis)
    g = layout(g) if which != "output" else g
    y = layout(y) if which != "grad_output" else y
    want = reference.softmax_backward(g, y, axis)
    assert_result(softmax_backward(g, y, axis), want, float32)


@pytest.mark.parametrize("target", ["grad_output", "output", "strided", "overlapping"])
@pytest.mark.parametrize("axis", [-1, 0])
def test_backward_out(target, axis):
    buffer = np.zeros((7, 35), float32)
    g, y = backward_inputs((6, 35), axis)
    buffer[1:] = g
    g = buffer[1:]
    want = reference.softmax_backward(g, y, axis)
    out = {
        "grad_output": g,
        "output": y,
        "strided": np.full((35, 12), 7, float32).T[::2],
        "overlapping": buffer[:-1],
    }[target]
    assert softmax_backward(g, y, axis, out=out) is out
    assert_close(out, want, float32)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_backward_empty(shape):
    empty = np.zeros(shape, float32)
    assert_result(softmax_backward(empty, empty), empty, float32)
