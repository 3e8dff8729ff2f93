"""logsumexp: values over types, layouts, axes; `keepdims=`, `out=`, `dtype=`; edge cases."""

from __future__ import annotations

import numpy as np
import pytest

from numbakern import logsumexp
from tests import cases, reference
from tests.cases import assert_close, assert_result, bfloat16, float16, float32, float64, loss_type
from tests.test_log_softmax import SPECIAL_ROWS, WHOLE_AND_PART

INF, NAN = np.inf, np.nan


@cases.dtypes(*cases.FLOATS)
@pytest.mark.parametrize("classes", cases.CLASS_COUNTS)
def test_values(classes, dtype):
    x = cases.logits((5, classes), dtype)
    assert_result(logsumexp(x), reference.logsumexp(x), loss_type(dtype))


@cases.dtypes(float32, float16)
@pytest.mark.parametrize(("shape", "axis"), cases.SHAPES_AND_AXES)
@pytest.mark.parametrize("keepdims", [False, True], ids=["drop", "keepdims"])
def test_shapes_and_axes(shape, axis, keepdims, dtype):
    x = cases.logits(shape, dtype)
    want = reference.logsumexp(x, axis, keepdims)
    assert_result(logsumexp(x, axis, keepdims=keepdims), want, float32)


@pytest.mark.parametrize("axis", WHOLE_AND_PART, ids=str)
@pytest.mark.parametrize("keepdims", [False, True], ids=["drop", "keepdims"])
def test_one_axis_several_or_all(axis, keepdims):
    x = cases.logits((4, 5, 6))
    want = reference.logsumexp(x, axis, keepdims)
    assert_result(logsumexp(x, axis, keepdims=keepdims), want, float32)


@cases.zoo()
@pytest.mark.parametrize("axis", [-1, 0, None], ids=str)
def test_layouts(layout, axis):
    x = layout(cases.logits((6, 35)))
    assert_result(logsumexp(x, axis), reference.logsumexp(x, axis), float32)


@cases.dtypes(*cases.INTEGERS, cases.BOOL)
def test_integers_are_computed_in_float64(dtype):
    x = cases.logits((4, 9), dtype)
    assert_result(logsumexp(x), reference.logsumexp(x), float64)


@pytest.mark.parametrize("x", [[1.0, 2.0, 3.0], ((1, 2), (3, 5))], ids=["list", "tuples"])
def test_whatever_numpy_takes_as_an_array(x):
    assert_result(logsumexp(x), reference.logsumexp(x), float64)


@pytest.mark.parametrize("x", [np.float32(3), np.array(3, float32)], ids=["scalar", "0-d"])
def test_a_scalar_over_all_its_axes(x):
    assert_result(logsumexp(x, axis=None), np.float64(3), float32)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(float32, float64), (float64, float32), (bfloat16, float64), (np.dtype(np.int8), float32)],
    ids=str,
)
def test_dtype_casts(given, wanted):
    x = np.array([[0, 1, 2, -3], [4, 4, -8, 0]]).astype(given)  # the same in every type
    assert_result(logsumexp(x, dtype=wanted), reference.logsumexp(x), wanted)


@pytest.mark.parametrize("axis", [-1, 0, (0, 1), None], ids=str)
@pytest.mark.parametrize("keepdims", [False, True], ids=["drop", "keepdims"])
def test_out(axis, keepdims):
    x = cases.logits((6, 35))
    want = reference.logsumexp(x, axis, keepdims)
    out = np.full(want.shape, 7, float32)
    assert logsumexp(x, axis, keepdims=keepdims, out=out) is out
    assert_close(out, want, float32)


@cases.zoo(["reversed_all", "every_other_last", "misaligned", "record_field"])
def test_out_layouts(layout):
    x = cases.logits((35, 6))
    out = cases.filled_like(layout, (35,), float32)
    logsumexp(x, out=out)
    assert_close(out, reference.logsumexp(x), float32)


@pytest.mark.parametrize("axis", [-1, 0])
def test_out_inside_the_input(axis):
    x = cases.logits((6, 6))
    want = reference.logsumexp(x, axis)
    out = x[3] if axis == -1 else x[:, 2]
    logsumexp(x, axis, out=out)
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
    assert_result(logsumexp(x, axis), reference.logsumexp(x, axis), dtype)


def test_special_values_by_hand():
    x = np.array([[NAN, INF], [0, INF], [-INF, INF], [-INF, -INF], [-INF, 2]], float32)
    np.testing.assert_array_equal(logsumexp(x), np.array([NAN, INF, INF, -INF, 2], float32))


@pytest.mark.parametrize("position", [0, 63, 64, 999])
@cases.dtypes(*cases.FLOATS)
def test_one_special_value_anywhere(position, dtype):
    x = cases.logits((4, 1000), dtype)
    x[0, position], x[1, position], x[2, position] = NAN, INF, -INF
    got = logsumexp(x)
    assert np.isnan(got[0])
    assert got[1] == INF
    assert_close(got, reference.logsumexp(x), loss_type(dtype))


@pytest.mark.parametrize("keepdims", [False, True], ids=["drop", "keepdims"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((0, 5), -1), ((0, 5), 0), ((5, 0), -1), ((5, 0), None), ((0,), 0), ((2, 0, 3), 1)],
    ids=str,
)
def test_empty(shape, axis, keepdims):
    """No rows: an empty result. No classes: the sum is empty, its logarithm -inf."""
    want = reference.logsumexp(np.zeros(shape), axis, keepdims)
    assert np.all(want == -INF)
    got = logsumexp(np.zeros(shape, float32), axis, keepdims=keepdims)
    assert_result(got, want, float32)
