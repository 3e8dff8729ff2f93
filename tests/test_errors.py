"""What is refused, how, and that nothing has been written by then: one line that helps."""

from __future__ import annotations

import numpy as np
import pytest

import numbakern
from numbakern import arrays
from tests import cases
from tests.cases import float16, float32, float64

X = cases.logits((3, 4))
Y = np.full((3, 4), -1.0, float32)
LABELS = np.array([0, 3, 1])
SEVEN = 7


def check(call, error, *words):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    if error in (TypeError, ValueError, IndexError):
        assert type(caught.value) is error or issubclass(type(caught.value), error)


def row_functions(x, **options):
    """Every function that takes a row of numbers, called on ``x`` in its place."""
    loss_options = {k: v for k, v in options.items() if k in ("axis", "out")}
    return {
        "log_softmax": lambda: numbakern.log_softmax(x, **options),
        "softmax": lambda: numbakern.softmax(x, **options),
        "logsumexp": lambda: numbakern.logsumexp(x, **options),
        "log_softmax_backward": lambda: numbakern.log_softmax_backward(x, Y, **options),
        "softmax_backward": lambda: numbakern.softmax_backward(x, Y, **options),
        "nll_loss": lambda: numbakern.nll_loss(x, LABELS, **loss_options),
        "nll_loss_backward": lambda: numbakern.nll_loss_backward(1.0, x, LABELS, **loss_options),
        "cross_entropy": lambda: numbakern.cross_entropy(x, LABELS, **loss_options),
        "cross_entropy_backward": lambda: numbakern.cross_entropy_backward(
            1.0, x, LABELS, **loss_options
        ),
        "cross_entropy_value_and_grad": lambda: numbakern.cross_entropy_value_and_grad(
            x, LABELS, **loss_options
        ),
    }


NAMES = list(row_functions(X))
FIRST_ARGUMENT = {
    "log_softmax": "x",
    "softmax": "x",
    "logsumexp": "x",
    "log_softmax_backward": "grad_output",
    "softmax_backward": "grad_output",
    "nll_loss": "log_probs",
    "nll_loss_backward": "log_probs",
    "cross_entropy": "logits",
    "cross_entropy_backward": "logits",
    "cross_entropy_value_and_grad": "logits",
}
LOSSES = [name for name in NAMES if "nll" in name or "cross" in name]
CROSS = [name for name in NAMES if "cross" in name]
BACKWARDS = ["nll_loss_backward", "cross_entropy_backward"]
WITH_OUT = [name for name in NAMES if name not in ("nll_loss", "cross_entropy")]


def loss_call(name, x=X, labels=LABELS, grad_output=1.0, **options):
    function = getattr(numbakern, name)
    leading = (grad_output,) if name in BACKWARDS else ()
    return lambda: function(*leading, x, labels, **options)


def parts(result):
    """What a function returns, one by one."""
    return result if isinstance(result, tuple) else (result,)


# --- types ---------------------------------------------------------------------------------------

WRONG_TYPES = {
    "complex": X.astype(np.complex64),
    "longdouble": X.astype(np.longdouble),
    "object": X.astype(object),
    "str": X.astype(str),
    "datetime": np.zeros((3, 4), "M8[s]"),
    "record": np.zeros((3, 4), [("a", float32)]),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", WRONG_TYPES)
def test_unsupported_dtype(name, kind):
    if kind == "longdouble" and np.dtype(np.longdouble) == float64:
        pytest.skip("long double is float64 here")
    x = WRONG_TYPES[kind]
    check(row_functions(x)[name], TypeError, FIRST_ARGUMENT[name], str(x.dtype))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "thing",
    [None, "abc", object(), {1: 2}, lambda: 1],
    ids=["None", "str", "object", "dict", "function"],
)
def test_not_an_array(name, thing):
    check(row_functions(thing)[name], TypeError, FIRST_ARGUMENT[name])


def test_the_second_array_of_a_backward():
    for name in ("log_softmax_backward", "softmax_backward"):
        function = getattr(numbakern, name)
        check(lambda f=function: f(Y, Y.astype(complex)), TypeError, "output", "complex128")
        check(lambda f=function: f(Y, "abc"), TypeError, "output")


@pytest.mark.parametrize("dtype", [np.int32, bool, np.complex64, np.longdouble, object], ids=str)
def test_wrong_dtype_argument(dtype):
    if np.dtype(dtype) == float64:
        pytest.skip("long double is float64 here")
    for name in ("log_softmax", "softmax", "logsumexp"):
        function = getattr(numbakern, name)
        check(lambda f=function: f(X, dtype=dtype), TypeError, "dtype", str(np.dtype(dtype)))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["bool", "complex", "object", "str"])
def test_labels_of_a_wrong_type(name, kind):
    """A truth value is no class number, as in NumPy's indexing and in PyTorch."""
    check(loss_call(name, labels=LABELS.astype(kind)), TypeError, "labels")
    check(loss_call(name, labels=None), TypeError, "labels")


def test_floating_labels():
    for name in ("nll_loss", "nll_loss_backward"):
        check(loss_call(name, labels=LABELS.astype(float)), TypeError, "labels", "float64")
        check(loss_call(name, labels=np.full((3, 4), 0.25)), TypeError, "labels", "float64")
    for name in CROSS:
        # Neither integers nor probabilities of the logits' shape: its type or its shape is wrong.
        check(loss_call(name, labels=LABELS.astype(float)), (TypeError, ValueError), "labels")
        for shape in [(3, 5), (4, 3), (3, 4, 1)]:
            check(loss_call(name, labels=np.full(shape, 0.25)), ValueError, "labels")


def test_other_arguments_of_a_wrong_type():
    for name in LOSSES:
        check(loss_call(name, weight=np.ones(4, complex)), TypeError, "weight")
        check(loss_call(name, weight="abcd"), TypeError, "weight")
        check(loss_call(name, ignore_index=1.5), TypeError, "ignore_index")
        check(loss_call(name, ignore_index=None), TypeError, "ignore_index")
        check(loss_call(name, axis=None), TypeError, "axis")
        check(loss_call(name, axis=(0, 1)), TypeError, "axis")
    for name in CROSS:
        check(loss_call(name, label_smoothing="much"), TypeError, "label_smoothing")
    for name in BACKWARDS:
        check(loss_call(name, grad_output="much"), TypeError, "grad_output")
        check(loss_call(name, grad_output=1j), TypeError, "grad_output")
    for name in ("log_softmax", "softmax", "logsumexp"):
        check(row_functions(X, axis=1.5)[name], TypeError, "axis")
        check(row_functions(X, axis="1")[name], TypeError, "axis")
        check(row_functions(X, axis=(True,))[name], TypeError, "axis", "True")
        check(row_functions(np.float32(1), axis=False)[name], TypeError, "axis", "False")
    check(lambda: numbakern.log_softmax_backward(Y, Y, axis=(0, 1)), TypeError, "axis")
    lse = np.zeros(3, complex)
    check(lambda: numbakern.cross_entropy_backward(1.0, X, LABELS, lse=lse), TypeError, "lse")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axis", [True, False, np.True_], ids=repr)
def test_a_truth_value_is_no_axis(name, axis):
    """So do NumPy's reductions, SciPy and PyTorch."""
    check(row_functions(X, axis=axis)[name], TypeError, "axis", repr(axis))


@pytest.mark.parametrize("name", LOSSES)
def test_a_truth_value_is_no_label(name):
    check(loss_call(name, ignore_index=True), TypeError, "ignore_index", "True")


@pytest.mark.parametrize("name", LOSSES)
def test_a_list_of_no_labels(name):
    """It has no type: [] indexes in NumPy, though its array is of float64. An array has one."""
    x = np.zeros((0, 4), float32)
    result = loss_call(name, x=x, labels=[])()
    if name == "cross_entropy_value_and_grad":
        result = result[0]
    assert result.shape == (x.shape if "backward" in name else ())
    assert result.size == 0 or np.isnan(result)
    loss_call(name, x=np.zeros((2, 4, 0)), labels=([], ()))()
    wrong = ValueError if name in CROSS else TypeError
    check(loss_call(name, x=x, labels=np.zeros(0)), wrong, "labels")
    check(loss_call(name, x=np.zeros((0, 4, 2)), labels=[]), ValueError, "labels", "(0, 2)")
    if name in CROSS:  # of the logits' shape: probabilities of no classes
        loss_call(name, x=np.zeros((2, 0)), labels=[[], []])()


# --- shapes and axes -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axis", [2, -3, 100, -(2**40)])
def test_axis_out_of_range(name, axis):
    check(row_functions(X, axis=axis)[name], np.exceptions.AxisError, str(axis), "2")


@pytest.mark.parametrize("name", ["log_softmax", "softmax", "logsumexp"])
def test_axes(name):
    check(row_functions(X, axis=(0, 2))[name], np.exceptions.AxisError, "2")
    check(row_functions(X, axis=(0, 0))[name], ValueError, "axis")
    check(row_functions(X, axis=(1, -1))[name], ValueError, "axis")


@pytest.mark.parametrize("name", LOSSES)
def test_losses_need_a_class_axis(name):
    check(loss_call(name, x=np.float32(1), labels=0), ValueError)


@pytest.mark.parametrize("name", ["log_softmax_backward", "softmax_backward"])
@pytest.mark.parametrize("shape", [(3, 5), (4, 3), (3,), (1, 4), (3, 4, 1), ()], ids=str)
def test_shapes_of_a_backward(name, shape):
    function = getattr(numbakern, name)
    check(lambda: function(np.zeros(shape, float32), Y), ValueError, str(shape), "(3, 4)")
    # AxisError, which is a ValueError, is as good where `output` lacks the axis.
    words = [str(shape), "(3, 4)"] if len(shape) == 2 else []
    check(lambda: function(Y, np.zeros(shape, float32)), ValueError, *words)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(4,), (2,), (3, 1), (1,), (), (3, 4)], ids=str)
def test_shape_of_labels(name, shape):
    check(loss_call(name, labels=np.zeros(shape, int)), ValueError, "labels", "(3,)", str(shape))


@pytest.mark.parametrize("name", LOSSES)
def test_shape_of_labels_in_both_layouts(name):
    x = cases.logits((2, 3, 5))
    check(loss_call(name, x=x, labels=np.zeros((2, 3), int)), ValueError, "labels", "(2, 5)")
    labels = np.zeros((2, 5), int)
    check(loss_call(name, x=x, labels=labels, axis=-1), ValueError, "labels", "(2, 3)")
    check(loss_call(name, x=x[0, 0], labels=np.zeros(1, int)), ValueError, "labels", "()")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(3,), (5,), (1,), (), (4, 1), (1, 4)], ids=str)
def test_shape_of_weight(name, shape):
    check(loss_call(name, weight=np.ones(shape, float32)), ValueError, "weight", "(4,)", str(shape))


@pytest.mark.parametrize("name", BACKWARDS)
def test_shape_of_grad_output(name):
    vector, scalar = np.ones(3, float32), np.float32(1)
    for reduction in ("mean", "sum"):
        call = loss_call(name, grad_output=vector, reduction=reduction)
        check(call, ValueError, "grad_output", "(3,)")
    for wrong in (scalar, np.ones(4, float32), np.ones((3, 4), float32), np.ones((3, 1), float32)):
        call = loss_call(name, grad_output=wrong, reduction="none")
        check(call, ValueError, "grad_output", "(3,)")


def test_shape_of_lse():
    for shape in [(4,), (3, 1), (), (3, 4)]:
        lse = np.ones(shape)
        call = lambda lse=lse: numbakern.cross_entropy_backward(1.0, X, LABELS, lse=lse)  # noqa: E731
        check(call, ValueError, "lse", "(3,)", str(shape))


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["average", "", "Mean", "batchmean"])
def test_reduction(name, reduction):
    check(loss_call(name, reduction=reduction), ValueError, "reduction", repr(reduction), "mean")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", [None, 1, ["mean"]], ids=repr)
def test_reduction_that_is_no_word(name, reduction):
    check(loss_call(name, reduction=reduction), (ValueError, TypeError), "reduction")


@pytest.mark.parametrize("name", CROSS)
@pytest.mark.parametrize("smoothing", [-0.1, 1.1, 2, np.nan, np.inf])
def test_label_smoothing(name, smoothing):
    check(loss_call(name, label_smoothing=smoothing), ValueError, "label_smoothing", str(smoothing))


class Changing:
    """A number whose value changes while it stays the same object."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value

    def __float__(self):
        return float(self.value)


@pytest.mark.parametrize("name", LOSSES)
def test_an_option_counts_for_what_it_is_now(name):
    ignored = Changing(0)
    first = loss_call(name, ignore_index=ignored, reduction="sum")()
    ignored.value = 3
    second = loss_call(name, ignore_index=ignored, reduction="sum")()
    wanted = loss_call(name, ignore_index=3, reduction="sum")()
    for got, other, right in zip(*map(parts, (second, first, wanted)), strict=True):
        np.testing.assert_array_equal(got, right)
        assert not np.array_equal(got, other)


@pytest.mark.parametrize("name", CROSS)
def test_a_smoothing_counts_for_what_it_is_now(name):
    smoothing = Changing(0)
    loss_call(name, label_smoothing=smoothing)()
    smoothing.value = 1
    got, wanted = (loss_call(name, label_smoothing=e)() for e in (smoothing, 1.0))
    for a, b in zip(parts(got), parts(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", CROSS)
@pytest.mark.parametrize("smoothing", ["0.1", b"0.1", None, [0.1]], ids=repr)
def test_label_smoothing_that_is_no_number(name, smoothing):
    check(loss_call(name, label_smoothing=smoothing), TypeError, "label_smoothing", "number")


@pytest.mark.parametrize("name", LOSSES)
def test_reductions_in_an_array(name):
    check(loss_call(name, reduction=np.array(["sum"])), ValueError, "reduction", "'mean'")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("option", [{"axis": True}, {"ignore_index": 1.0}], ids=str)
def test_an_error_comes_alone(name, option):
    with pytest.raises(TypeError) as caught:
        loss_call(name, **option)()
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_numbers_too_large_for_a_float():
    check(loss_call("cross_entropy", label_smoothing=10**400), ValueError, "label_smoothing")
    check(loss_call("cross_entropy_backward", grad_output=10**400), TypeError, "grad_output")
    huge, same = (loss_call("cross_entropy_backward", grad_output=g)() for g in (10**30, 1e30))
    np.testing.assert_array_equal(huge, same)


def test_truth_values():
    pair = np.array([1, 2])
    check(lambda: numbakern.logsumexp(X, keepdims=pair), TypeError, "keepdims", "True or False")
    check(loss_call("cross_entropy", return_lse=pair), TypeError, "return_lse", "True or False")


class Reluctant:
    """What has no array for NumPy at the moment, as a tensor that requires a gradient."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("detach it first\nfor a reason")


@pytest.mark.parametrize("name", NAMES)
def test_an_array_that_cannot_be_had(name):
    check(
        row_functions(Reluctant())[name],
        TypeError,
        FIRST_ARGUMENT[name],
        "Reluctant",
        "detach it first",
    )


@pytest.mark.parametrize("name", NAMES)
def test_options_are_keywords(name):
    extra = {"log_softmax": 2, "softmax": 2, "logsumexp": 2}.get(name, 3)
    with pytest.raises(TypeError, match="positional"):
        getattr(numbakern, name)(*[X] * (extra + 1))


# --- out -----------------------------------------------------------------------------------------


def out_call(name, out, x=X):
    if name in LOSSES:
        return loss_call(name, x=x, out=out)
    return row_functions(x, out=out)[name]


@pytest.mark.parametrize("name", WITH_OUT)
def test_shape_of_out(name):
    for shape in [(4, 3), (3,) if name != "logsumexp" else (3, 4), (3, 4, 1), (12,), ()]:
        out = np.full(shape, SEVEN, float32)
        check(out_call(name, out), ValueError, "out", str(shape))
        assert np.all(out == SEVEN)


@pytest.mark.parametrize("name", WITH_OUT)
@pytest.mark.parametrize("dtype", [float64, float16, np.int32, np.complex64], ids=str)
def test_type_of_out(name, dtype):
    out = np.full((3,) if name == "logsumexp" else (3, 4), SEVEN, dtype)
    check(out_call(name, out), TypeError, "out", "float32", str(np.dtype(dtype)))
    assert np.all(out == SEVEN)


@pytest.mark.parametrize("name", WITH_OUT)
def test_out_is_no_array(name):
    for out in ([[0.0] * 4] * 3, 1.0, "out", (np.zeros((3, 4), float32),)):
        check(out_call(name, out), TypeError, "out")


@pytest.mark.parametrize("name", WITH_OUT)
def test_out_is_read_only(name):
    out = np.full((3,) if name == "logsumexp" else (3, 4), SEVEN, float32)
    out.flags.writeable = False
    check(out_call(name, out), ValueError, "out", "read-only")
    assert np.all(out == SEVEN)


def overlapping(shape, strides):
    """An array whose elements share places, which are of SEVEN; strides in elements."""
    line = np.full(64, SEVEN, float32)
    return np.lib.stride_tricks.as_strided(line, shape, [4 * s for s in strides])


@pytest.mark.parametrize("name", WITH_OUT)
@pytest.mark.parametrize("strides", [(0, 1), (4, 0), (3, 1), (1, 2), (1, 1)], ids=str)
def test_out_overlaps_itself(name, strides):
    """It has no one result: where two elements share a place the last one written wins."""
    shape = (3, 4)
    if name == "logsumexp":
        shape, strides = (3,), (0,)
    out = overlapping(shape, strides)
    check(out_call(name, out), ValueError, "out", str(shape), str(out.strides))
    assert np.all(out == SEVEN)


@pytest.mark.parametrize("name", WITH_OUT)
def test_out_whose_elements_are_apart(name):
    """However they interleave; and where there is but one, its stride says nothing."""
    x, (shape, strides) = X, ((3, 4), (2, 3))
    if name == "logsumexp":
        x, (shape, strides) = X[:1], ((1,), (0,))
    out = overlapping(shape, strides)
    out_call(name, out, x)()
    dense = np.empty(shape, float32)
    out_call(name, dense, x)()
    assert np.array_equal(out, dense)


def test_elements_in_one_place():
    """Against all addresses, for shapes and strides of every kind."""
    rng = cases.generator(5)
    found = [0, 0]
    for _ in range(2000):
        size = int(rng.choice([1, 2, 4, 8]))
        shape = tuple(rng.integers(0, 6, rng.integers(0, 5)).tolist())
        strides = tuple((rng.choice([1, size]) * rng.integers(-40, 41, len(shape))).tolist())
        places = np.zeros(())
        for n, stride in zip(shape, strides, strict=True):
            places = places[..., None] + stride * np.arange(n)
        want = bool(np.any(np.diff(np.sort(places.reshape(-1))) < size))
        assert arrays.overlaps_itself(shape, strides, size) == want, (shape, strides, size)
        found[want] += 1
    assert min(found) > 200


@pytest.mark.parametrize("name", ["log_softmax", "softmax"])
def test_integers_cannot_be_overwritten(name):
    x = np.ones((3, 4), np.int64)
    check(out_call(name, x, x=x), TypeError, "out", "float64", "int64")
    assert np.all(x == 1)


# --- labels out of range -------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("bad", [4, -1, 5, 127, -99, -101, 2**31, 2**62, -(2**63)])
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_a_label_out_of_range(name, bad, reduction):
    labels = np.array([0, bad, 1])
    g = np.ones(3, float32) if reduction == "none" else 1.0
    out = {"out": np.full((3, 4), SEVEN, float32)} if name in WITH_OUT else {}
    call = loss_call(name, labels=labels, grad_output=g, reduction=reduction, **out)
    check(call, IndexError, "labels", "1", str(bad), "4")
    assert all(np.all(array == SEVEN) for array in out.values())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("classes", [3, 21, 1000])
def test_the_position_of_a_bad_label(name, axis, classes):
    x = cases.logits((4, classes, 5) if axis == 1 else (4, 5, classes))
    labels = np.zeros((4, 5), np.int16)
    labels[2, 3] = classes + 7
    labels[3, 4] = -5
    before = x.copy()
    out = {"out": x} if name in WITH_OUT else {}
    check(
        loss_call(name, x=x, labels=labels, axis=axis, **out),
        IndexError,
        "2, 3",
        f"{classes + 7}",
    )
    assert np.array_equal(x, before)


@pytest.mark.parametrize("name", LOSSES)
def test_a_bad_label_far_into_a_large_batch(name):
    """Found by whichever thread, told to the caller, before anything is written."""
    x = np.zeros((20_011, 50), float32)
    labels = np.zeros(len(x), np.int64)
    labels[[15_000, 20_010]] = 50, -1
    out = {"out": x} if name in WITH_OUT else {}
    check(loss_call(name, x=x, labels=labels, **out), IndexError, "15000", "50")
    assert not x.any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", cases.UNSIGNED, ids=str)
def test_unsigned_labels_out_of_range(name, dtype):
    largest = np.iinfo(dtype).max
    labels = np.array([0, 1, largest], dtype)
    check(loss_call(name, labels=labels), IndexError, "2", str(largest))
    # ignore_index=-1 is not the largest unsigned number.
    check(loss_call(name, labels=labels, ignore_index=-1), IndexError, str(largest))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("label", "ignored", "dtype"),
    [
        (2**63 + 5, 2**63 - 1, np.uint64),
        (2**63 - 1, -(2**63), np.uint64),
        (2**64 - 1, -1, np.uint64),
        (2**64 - 2, -1, np.uint64),
        (-(2**63), 2**70, np.int64),
        (-1, 2**63, np.int64),
        (-2, -(2**70), np.int8),
    ],
)
def test_no_label_passes_for_the_ignored_one(name, label, ignored, dtype):
    labels = np.array([0, label, 1], dtype)
    check(loss_call(name, labels=labels, ignore_index=ignored), IndexError, "[1]", str(label))


@pytest.mark.parametrize("name", LOSSES)
def test_an_ignored_label_beyond_int64(name):
    labels, usual = np.array([0, 2**63, 1], np.uint64), np.array([0, -100, 1])
    got = loss_call(name, labels=labels, ignore_index=2**63)()
    for a, b in zip(parts(got), parts(loss_call(name, labels=usual)()), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_unbatched_label_out_of_range(name):
    check(loss_call(name, x=X[0], labels=4), IndexError, "labels", "4")
    check(loss_call(name, x=X[0], labels=-1), IndexError, "labels: ", "-1")


@pytest.mark.parametrize("name", LOSSES)
def test_the_library_works_on_after_an_error(name):
    check(loss_call(name, labels=np.array([0, 4, 1])), IndexError)
    loss_call(name)()
