"""cross_entropy, its backward and the fused step: every option, layout, label kind, edge case."""

from __future__ import annotations

import numpy as np
import pytest

from numbakern import (
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_value_and_grad,
    log_softmax,
    nll_loss,
    nll_loss_backward,
)
from tests import accuracy, cases, reference
from tests.cases import assert_close, assert_result, bfloat16, float16, float32, float64, loss_type
from tests.test_nll_loss import LOSS_SHAPES, label_shape, upstream

INF, NAN = np.inf, np.nan


def inputs(shape, axis, kind="labels", dtype=float32, ignore_index=None):
    x = cases.logits(shape, dtype)
    if kind == "probabilities":
        return x, cases.probabilities(shape, axis, dtype)
    labels = cases.class_labels(label_shape(shape, axis), shape[axis])
    if ignore_index is not None:
        labels[cases.generator(5).random(labels.shape) < 0.3] = ignore_index
    return x, labels


OPTIONS = [
    pytest.param(
        kind,
        {
            "weight": weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": smoothing,
        },
        id=f"{kind}-{'weight' if weight else 'plain'}-ignore{ignore_index}-{reduction}-{smoothing}",
    )
    for kind in ("labels", "probabilities")
    for weight in (False, True)
    for ignore_index in ((-100, 2) if kind == "labels" else (-100,))
    for reduction in cases.REDUCTIONS
    for smoothing in (0.0, 0.1, 1.0)
]


def loss_scale(x):
    return 3 * max(1.0, np.size(x) / 1000)  # a sum over rows, of which some nearly cancel


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
@pytest.mark.parametrize(("shape", "axis"), LOSS_SHAPES)
def test_every_option(shape, axis, kind, options):
    x, target = inputs(shape, axis, kind, ignore_index=options["ignore_index"])
    weight = cases.class_weights(shape[axis]) if options["weight"] else None
    options = {**options, "weight": weight, "axis": axis}
    want = reference.cross_entropy(x, target, **options)
    loss = cross_entropy(x, target, **options)
    assert_result(loss, want, float32, scale=loss_scale(x))

    rows = np.empty(label_shape(shape, axis))
    g = upstream(rows, options["reduction"])
    want_grad = reference.cross_entropy_backward(g, x, target, **options)
    grad = cross_entropy_backward(g, x, target, **options)
    assert_result(grad, want_grad, float32)

    # "none" gives the gradient of the sum of the rows' losses.
    ones = np.ones_like(rows) if options["reduction"] == "none" else 1.0
    want_grad = reference.cross_entropy_backward(ones, x, target, **options)
    loss, grad = cross_entropy_value_and_grad(x, target, **options)
    assert_result(loss, want, float32, scale=loss_scale(x))
    assert_result(grad, want_grad, float32)


@cases.dtypes(bfloat16, float32, float64, slow=[float16])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("axis", [1, pytest.param(-1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_types(dtype, kind, axis, reduction):
    shape = (4, 35, 9)
    x, target = inputs(shape, axis, kind, dtype)
    want = reference.cross_entropy(x, target, reduction=reduction, axis=axis)
    got = cross_entropy(x, target, reduction=reduction, axis=axis)
    assert_result(got, want, loss_type(dtype))

    rows = np.empty(label_shape(shape, axis))
    g = upstream(rows, reduction, dtype)
    want_grad = reference.cross_entropy_backward(g, x, target, reduction=reduction, axis=axis)
    got = cross_entropy_backward(g, x, target, reduction=reduction, axis=axis)
    assert_result(got, want_grad, dtype)

    loss, grad = cross_entropy_value_and_grad(x, target, reduction=reduction, axis=axis)
    ones = np.ones_like(rows) if reduction == "none" else 1.0
    want_grad = reference.cross_entropy_backward(ones, x, target, reduction=reduction, axis=axis)
    assert_result(loss, want, loss_type(dtype))
    assert_result(grad, want_grad, dtype)


@pytest.mark.parametrize("classes", cases.CLASS_COUNTS)
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_class_counts(classes, kind):
    x, target = inputs((5, classes), 1, kind)
    loss, grad = cross_entropy_value_and_grad(x, target, reduction="none")
    assert_result(loss, reference.cross_entropy(x, target, reduction="none"), float32)
    want = reference.cross_entropy_backward(np.ones(5), x, target, reduction="none")
    assert_result(grad, want, float32)


@cases.dtypes(*cases.SIGNED[:2], *cases.UNSIGNED[:1], cases.BOOL)
def test_integer_logits_are_computed_in_float64(dtype):
    x, labels = cases.logits((4, 9), dtype), cases.class_labels(4, 9)
    assert_result(cross_entropy(x, labels), reference.cross_entropy(x, labels), float64)
    loss, grad = cross_entropy_value_and_grad(x, labels)
    assert_result(loss, reference.cross_entropy(x, labels), float64)
    assert_result(grad, reference.cross_entropy_backward(1.0, x, labels), float64)


@cases.dtypes(*cases.INTEGERS)
def test_labels_of_every_integer_type(dtype):
    x = cases.logits((9, 10))
    labels = cases.class_labels(9, 10, dtype)
    loss, grad = cross_entropy_value_and_grad(x, labels)
    assert_result(loss, reference.cross_entropy(x, labels), float32)
    assert_result(grad, reference.cross_entropy_backward(1.0, x, labels), float32)
    assert_result(cross_entropy(x, labels), reference.cross_entropy(x, labels), float32)


@pytest.mark.parametrize(("of_logits", "of_target"), [(float32, float64), (float64, float32)])
def test_probabilities_of_another_type(of_logits, of_target):
    x, p = cases.logits((9, 10), of_logits), cases.probabilities((9, 10), 1, of_target)
    loss, grad = cross_entropy_value_and_grad(x, p)
    assert_result(loss, reference.cross_entropy(x, p), of_logits)
    assert_result(grad, reference.cross_entropy_backward(1.0, x, p), of_logits)


@cases.zoo()
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_layouts_of_logits(layout, axis, kind):
    x, target = inputs((6, 35, 4), axis, kind)
    x = layout(x)
    want = reference.cross_entropy(x, target, reduction="none", axis=axis)
    assert_result(cross_entropy(x, target, reduction="none", axis=axis), want, float32)
    loss, grad = cross_entropy_value_and_grad(x, target, axis=axis)
    assert_close(loss, np.mean(want), float32)
    want = reference.cross_entropy_backward(1.0, x, target, axis=axis)
    assert_result(grad, want, float32)


@cases.zoo()
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_layouts_of_labels_and_probabilities(layout, axis, kind):
    x, target = inputs((6, 35, 4), axis, kind)
    target = layout(target)
    loss, grad = cross_entropy_value_and_grad(x, target, axis=axis)
    assert_result(loss, reference.cross_entropy(x, target, axis=axis), float32)
    assert_result(grad, reference.cross_entropy_backward(1.0, x, target, axis=axis), float32)


@pytest.mark.parametrize("axis", [1, 0, -1])
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_unbatched(axis, reduction, kind):
    x = cases.logits((10,))
    target = 3 if kind == "labels" else cases.probabilities((10,), 0)
    want = reference.cross_entropy(x, target, reduction=reduction)
    assert_result(cross_entropy(x, target, reduction=reduction, axis=axis), want, float32)
    loss, grad = cross_entropy_value_and_grad(x, target, reduction=reduction, axis=axis)
    want_grad = reference.cross_entropy_backward(1.0, x, target, reduction=reduction)
    assert_result(loss, want, float32)
    assert_result(grad, want_grad, float32)
    grad = cross_entropy_backward(1.0, x, target, reduction=reduction, axis=axis)
    assert_result(grad, want_grad, float32)


def test_lists():
    loss, grad = cross_entropy_value_and_grad([[0.0, 0.0]], [1])
    assert_result(loss, np.log(2), float64)
    assert_result(grad, [[0.5, -0.5]], float64)


def test_inputs_stay_as_they_were():
    x, labels = inputs((9, 10), 1, ignore_index=-100)
    weight, g, p = (
        cases.class_weights(10),
        upstream(labels, "none"),
        cases.probabilities((9, 10), 1),
    )
    kept = [a.copy() for a in (x, labels, weight, g, p)]
    _, lse = cross_entropy(x, labels, weight=weight, return_lse=True)
    for target in (labels, p):
        cross_entropy_backward(g, x, target, weight=weight, reduction="none", lse=lse)
        cross_entropy_value_and_grad(x, target, weight=weight)
    for now, before in zip((x, labels, weight, g, p), kept, strict=True):
        assert np.array_equal(now, before)


# --- return_lse= and lse= ------------------------------------------------------------------------


@cases.dtypes(bfloat16, float32, slow=[float16, float64])
@pytest.mark.parametrize(("shape", "axis"), LOSS_SHAPES)
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_lse_there_and_back(shape, axis, kind, dtype):
    x, target = inputs(shape, axis, kind, dtype, ignore_index=-100)
    loss, lse = cross_entropy(x, target, axis=axis, return_lse=True)
    assert_result(loss, reference.cross_entropy(x, target, axis=axis), loss_type(dtype), scale=3)
    # In float64 whatever the logits, and as exact as their own type computes it.
    assert lse.dtype == float64
    assert_close(lse, reference.logsumexp(x, axis), loss_type(dtype))

    want = reference.cross_entropy_backward(1.0, x, target, axis=axis)
    got = cross_entropy_backward(1.0, x, target, axis=axis, lse=lse)
    assert_result(got, want, dtype)


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weight"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_lse_with_every_option(reduction, weighted, smoothing, kind):
    x, target = inputs((9, 35), 1, kind, ignore_index=-100)
    options = {
        "weight": cases.class_weights(35) if weighted else None,
        "reduction": reduction,
        "label_smoothing": smoothing,
    }
    loss, lse = cross_entropy(x, target, return_lse=True, **options)
    assert_result(loss, reference.cross_entropy(x, target, **options), float32, scale=3)
    g = upstream(np.empty(9), reduction)
    want = reference.cross_entropy_backward(g, x, target, **options)
    got = cross_entropy_backward(g, x, target, lse=lse, **options)
    assert_result(got, want, float32)
    assert cross_entropy_backward(g, x, target, lse=lse, out=x, **options) is x
    assert_close(x, want, float32)


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_lse_holds_under_an_offset(offset):
    """In float32 lse itself would be off by 0.004 at 1e5, and the gradient by as much."""
    x = (cases.logits((9, 35)) + offset).astype(float32)
    labels = cases.class_labels(9, 35)
    _, lse = cross_entropy(x, labels, return_lse=True)
    want = reference.cross_entropy_backward(1.0, x, labels)
    assert_result(cross_entropy_backward(1.0, x, labels, lse=lse), want, float32)


def test_lse_is_of_the_labels_shape():
    x, labels = inputs((2, 21, 6, 11), 1)
    _, lse = cross_entropy(x, labels, return_lse=True)
    assert lse.shape == labels.shape
    _, lse = cross_entropy(x[0, :, 0, 0], 3, return_lse=True)
    assert lse.shape == ()
    assert_close(lse, reference.logsumexp(x[0, :, 0, 0]), float32)


@cases.zoo(["reversed_all", "every_other_last", "misaligned", "byte_swapped", "read_only"])
def test_layouts_of_lse(layout):
    x, labels = inputs((6, 35, 4), 1)
    lse = layout(reference.logsumexp(x, 1))
    want = reference.cross_entropy_backward(1.0, x, labels)
    assert_result(cross_entropy_backward(1.0, x, labels, lse=lse), want, float32)


# --- out= ----------------------------------------------------------------------------------------


@cases.zoo(cases.OUT_ZOO)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_out_of_every_layout(layout, axis, kind):
    x, target = inputs((6, 35, 4), axis, kind)
    want = reference.cross_entropy_backward(1.0, x, target, axis=axis)
    out = cases.filled_like(layout, x.shape, float32)
    _, grad = cross_entropy_value_and_grad(x, target, axis=axis, out=out)
    assert grad is out
    assert_close(out, want, float32)
    out = cases.filled_like(layout, x.shape, float32)
    assert cross_entropy_backward(1.0, x, target, axis=axis, out=out) is out
    assert_close(out, want, float32)


@cases.dtypes(*cases.FLOATS)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "backward"])
def test_the_logits_are_overwritten(dtype, axis, kind, fused):
    x, target = inputs((6, 35, 4), axis, kind, dtype)
    loss = reference.cross_entropy(x, target, axis=axis)
    want = reference.cross_entropy_backward(1.0, x, target, axis=axis)
    if fused:
        value, grad = cross_entropy_value_and_grad(x, target, axis=axis, out=x)
        assert_close(value, loss, loss_type(dtype))
    else:
        grad = cross_entropy_backward(1.0, x, target, axis=axis, out=x)
    assert grad is x
    assert_close(x, want, dtype)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "backward"])
@pytest.mark.parametrize("over", ["logits", "probabilities", "weight", "same_probabilities"])
def test_out_overlaps_another_input(over, fused):
    buffer = np.zeros((10, 35), float32)
    x, p = inputs((9, 35), 1, "probabilities")
    weight = cases.class_weights(35)
    out = buffer[:-1]
    if over == "logits":
        buffer[1:] = x
        x = buffer[1:]
    elif over == "probabilities":
        buffer[1:] = p
        p = buffer[1:]
    elif over == "same_probabilities":
        out = p
    else:
        buffer[4] = weight
        weight = buffer[4]
    loss = reference.cross_entropy(x, p, weight)
    want = reference.cross_entropy_backward(1.0, x, p, weight)
    if fused:
        value, _ = cross_entropy_value_and_grad(x, p, weight=weight, out=out)
        assert_close(value, loss, float32)
    else:
        cross_entropy_backward(1.0, x, p, weight=weight, out=out)
    assert_close(out, want, float32)


def test_out_overlaps_the_labels():
    raw = np.zeros(9 * 10 * 4, np.uint8)
    out, labels = raw.view(float32).reshape(9, 10), raw[160 : 160 + 72].view(np.int64)
    x, labels[...] = inputs((9, 10), 1)
    want = reference.cross_entropy_backward(1.0, x, labels)
    cross_entropy_value_and_grad(x, labels, out=out)
    assert_close(out, want, float32)


# --- the case table ------------------------------------------------------------------------------


def everything(x, labels, **options):
    """Loss per row, gradient, and the gradient by way of lse."""
    rows = cross_entropy(x, labels, reduction="none", **options)
    fused_rows, grad = cross_entropy_value_and_grad(x, labels, reduction="none", **options)
    np.testing.assert_array_equal(np.isnan(rows), np.isnan(fused_rows))
    _, lse = cross_entropy(x, labels, return_lse=True, **options)
    ones = np.ones(len(rows), float32)
    by_lse = cross_entropy_backward(ones, x, labels, reduction="none", lse=lse, **options)
    return rows, fused_rows, grad, by_lse


@pytest.mark.parametrize("bad", [[1, NAN, 2], [1, INF, 2], [-INF, -INF, -INF]], ids=str)
@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize("repeat", [1, 40], ids=["short", "long"])
def test_a_row_without_a_distribution_is_nan(bad, label, repeat):
    x = np.zeros((3, 3 * repeat), float32)
    x[1] = np.resize(np.array(bad, float32), 3 * repeat)
    rows, fused, grad, _ = everything(x, [0, label, 0])
    for losses in (rows, fused):
        assert np.isnan(losses[1])
        assert_close(losses[::2], np.full(2, np.log(3 * repeat)), float32)
    assert np.all(np.isnan(grad[1]))
    assert np.all(np.isfinite(grad[::2]))
    assert np.isnan(cross_entropy(x, [0, label, 0]))


@pytest.mark.parametrize("repeat", [1, 40], ids=["short", "long"])
def test_masked_classes(repeat):
    """-inf is a class out of the question: probability and gradient exactly 0."""
    x = np.tile(np.array([[1.0, -INF, 2.0]], float32), (2, repeat))
    rows, fused, grad, by_lse = everything(x, [0, 1])
    want = reference.cross_entropy(x, [0, 1], reduction="none")
    assert want[1] == INF
    assert_close(rows, want, float32)
    assert_close(fused, want, float32)
    want = reference.cross_entropy_backward([1.0, 1.0], x, [0, 1], reduction="none")
    assert grad[0, 1] == by_lse[0, 1] == 0
    assert_close(grad, want, float32)
    assert_close(by_lse, want, float32)
    assert cross_entropy(x, [0, 1]) == INF


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("classes", [3, 100, 300, 20_000])
def test_a_target_that_is_out_of_the_question(classes, axis):
    """The loss is infinite, however many terms it is a sum of, and the gradient a number."""
    x = cases.logits((2, classes))
    x[0, 1] = -INF
    for target in [0, 2], cases.probabilities(x.shape, 1):
        options = {} if np.ndim(target) == 2 else {"label_smoothing": 0.1}
        want = reference.cross_entropy(x, target, reduction="none", **options)
        assert want[0] == INF and np.isfinite(want[1])
        x_turned = np.moveaxis(x, 1, axis)
        turned = np.moveaxis(target, 1, axis) if np.ndim(target) == 2 else target
        rows, fused, grad, by_lse = everything(x_turned, turned, axis=axis, **options)
        assert_close(rows, want, float32)
        assert_close(fused, want, float32)
        want = reference.cross_entropy_backward([1.0, 1.0], x, target, reduction="none", **options)
        for got in grad, by_lse:
            assert_close(np.moveaxis(got, axis, 1), want, float32, scale=4)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("classes", [3, 100, 300, 20_000])
@pytest.mark.parametrize("kind", ["probability", "label", "smoothed", "smoothed label"])
def test_a_target_of_zero(kind, classes, axis):
    """0 times an infinite or undefined log p is NaN, as in PyTorch; the gradient is as ever."""
    x, weight, options = cases.logits((3, classes)), np.ones(classes, float32), {}
    x[0, 1], x[1, 2] = -INF, NAN
    if kind == "probability":
        target = cases.probabilities(x.shape, 1)
        target[:2, 1] = 0
    else:
        target = [1, 1, 0] if kind.endswith("label") else [0, 1, 0]
        weight[1] = 0
        options = {"weight": weight, "label_smoothing": 0.1 * kind.startswith("smoothed")}
    want = reference.cross_entropy(x, target, reduction="none", **options)
    assert np.array_equal(np.isnan(want), [True, True, False])
    x_turned = np.moveaxis(x, 1, axis)
    turned = np.moveaxis(target, 1, axis) if np.ndim(target) == 2 else target
    rows, fused, grad, by_lse = everything(x_turned, turned, axis=axis, **options)
    assert_close(rows, want, float32)
    assert_close(fused, want, float32)
    want = reference.cross_entropy_backward(np.ones(3), x, target, reduction="none", **options)
    assert np.isfinite(want[0]).all() and np.isnan(want[1]).all()
    for got in grad, by_lse:
        assert_close(np.moveaxis(got, axis, 1), want, float32, scale=4)


@pytest.mark.skipif(not accuracy.HAS_LONG_DOUBLE, reason="long double is no wider than float64")
@pytest.mark.parametrize("smoothing", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("classes", [2, 10, 1000])
@cases.dtypes(float32, float64)
def test_the_gradient_at_a_smoothed_label(dtype, classes, weighted, smoothing):
    """Neither p − q nor what stands for it at a confident label cancels more than p and q do."""
    x = cases.logits((200, classes), dtype)
    x[::2] *= 8
    labels = np.arange(200) % classes
    weight = cases.class_weights(classes, dtype) if weighted else None
    if weighted:
        weight[0] = 0
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": "none"}
    want = reference.cross_entropy_backward(np.ones(200), x, labels, work=np.longdouble, **options)
    targets, _, _ = reference.class_targets(labels, classes, weight, None, smoothing, np.longdouble)
    at = np.arange(200), labels
    q = targets[at]
    log_p = reference.log_softmax(x)[at]
    share = np.exp(log_p) * np.sum(targets, axis=1)
    ulp = np.spacing(np.maximum(share, q).astype(dtype)).astype(np.longdouble)
    allowed = np.where(share < q, 4, 4 - log_p) * ulp
    found = [
        cross_entropy_value_and_grad(x, labels, **options)[1],
        cross_entropy_backward(np.ones(200), x, labels, **options),
    ]
    if dtype is float32:  # of float64 the gradient is as good as lse's own rounding
        _, lse = cross_entropy(x, labels, return_lse=True, **options)
        found.append(cross_entropy_backward(np.ones(200), x, labels, lse=lse, **options))
    for grad in found:
        assert np.all(np.abs(grad[at] - want[at]) <= allowed)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("content", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("axis", [1, -1])
def test_an_ignored_row_is_zero_whatever_it_holds(content, smoothing, axis):
    x, labels = inputs((4, 5), 1)
    x[1], labels[1] = content, -100
    options = {"label_smoothing": smoothing, "axis": axis}
    rows, fused, grad, by_lse = everything(x, labels, **options)
    want = reference.cross_entropy_backward(1.0, x, labels, **options)
    assert rows[1] == fused[1] == 0
    assert np.array_equal(grad[1], np.zeros(5))
    assert np.array_equal(by_lse[1], np.zeros(5))
    loss, grad = cross_entropy_value_and_grad(x, labels, **options)
    assert_result(loss, reference.cross_entropy(x, labels, **options), float32)
    assert_result(grad, want, float32)
    g = np.array([1, NAN, 1, 1], float32)
    grad = cross_entropy_backward(g, x, labels, reduction="none", **options)
    assert np.array_equal(grad[1], np.zeros(5))


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_no_rows(kind):
    x, target = inputs((0, 5), 1, kind)
    for reduction, want in [("none", np.zeros(0)), ("sum", 0.0), ("mean", NAN)]:
        assert_result(cross_entropy(x, target, reduction=reduction), want, float32)
        loss, grad = cross_entropy_value_and_grad(x, target, reduction=reduction)
        assert_result(loss, want, float32)
        assert_result(grad, x, float32)
    assert_result(cross_entropy_backward(1.0, x, target), x, float32)
    loss, lse = cross_entropy(x, target, return_lse=True)
    assert np.isnan(loss)
    assert lse.shape == (0,)


def test_no_classes():
    x = np.zeros((2, 0), float32)
    for call in (cross_entropy, cross_entropy_value_and_grad):
        with pytest.raises(IndexError):
            call(x, [0, 0])
    with pytest.raises(IndexError):
        cross_entropy_backward(1.0, x, [0, 0])


def test_nothing_counted():
    x, labels = inputs((4, 5), 1)
    ignored = np.full(4, -100)
    for call in (cross_entropy, lambda *a, **k: cross_entropy_value_and_grad(*a, **k)[0]):
        assert_result(call(x, ignored), NAN, float32)
        assert_result(call(x, ignored, reduction="sum"), 0.0, float32)
        assert_result(call(x, ignored, reduction="none"), np.zeros(4), float32)
        assert_result(call(x, labels, weight=np.zeros(5, float32)), NAN, float32)
    for reduction in cases.REDUCTIONS:
        _, grad = cross_entropy_value_and_grad(x, ignored, reduction=reduction)
        assert_result(grad, np.zeros((4, 5)), float32)
        g = upstream(ignored, reduction)
        got = cross_entropy_backward(g, x, ignored, reduction=reduction)
        assert_result(got, np.zeros((4, 5)), float32)


def test_a_weight_of_zero_takes_a_class_out():
    x, labels = inputs((9, 10), 1)
    weight = cases.class_weights(10)
    weight[labels[0]] = 0
    loss, grad = cross_entropy_value_and_grad(x, labels, weight=weight)
    assert_result(loss, reference.cross_entropy(x, labels, weight), float32)
    assert_result(grad, reference.cross_entropy_backward(1.0, x, labels, weight), float32)
    assert np.array_equal(grad[0], np.zeros(10))


def test_probabilities_ignore_ignore_index():
    x, p = inputs((9, 10), 1, "probabilities")
    assert cross_entropy(x, p, ignore_index=0) == cross_entropy(x, p)


def test_a_confident_label_has_a_loss_and_a_gradient():
    """SciPy, PyTorch and JAX print 0 here: 1 + exp(-30) is 1."""
    x = np.array([[0, -30]], float32)
    loss, grad = cross_entropy_value_and_grad(x, [0], reduction="sum")
    np.testing.assert_allclose(loss, np.exp(-30.0), rtol=1e-6)
    np.testing.assert_allclose(grad, [[-np.exp(-30.0), np.exp(-30.0)]], rtol=1e-6)
    np.testing.assert_allclose(
        cross_entropy_backward(1.0, x, [0]), [[-np.exp(-30.0), np.exp(-30.0)]], rtol=1e-6
    )


@pytest.mark.parametrize("classes", [5, 70000], ids=["short", "long"])
@pytest.mark.parametrize("label", ["first", "last"])
def test_the_first_and_the_last_class(classes, label):
    x = cases.logits((3, classes))
    labels = np.full(3, 0 if label == "first" else classes - 1)
    loss, grad = cross_entropy_value_and_grad(x, labels)
    assert_result(loss, reference.cross_entropy(x, labels), float32)
    assert_result(grad, reference.cross_entropy_backward(1.0, x, labels), float32)


@pytest.mark.parametrize("dtype", [float16, bfloat16], ids=str)
def test_a_mean_of_many_half_rows_is_summed_in_float32_or_better(dtype):
    x, labels = inputs((5000, 4), 1, dtype=dtype)
    want = reference.cross_entropy(x, labels)
    assert_result(cross_entropy(x, labels), want, float32)
    want = reference.cross_entropy(x, labels, reduction="sum")
    assert_result(cross_entropy(x, labels, reduction="sum"), want, float32)


def test_an_ignored_label_that_only_uint64_holds():
    labels = np.array([0, 1, 2, 2**64 - 1], np.uint64)
    loss = cross_entropy(np.zeros((4, 3), float32), labels, ignore_index=2**64 - 1)
    assert loss == pytest.approx(np.log(3.0))
    with pytest.raises(IndexError, match=r"labels\[3\]"):
        cross_entropy(np.zeros((4, 3), float32), labels, ignore_index=2**64 - 2)


@pytest.mark.parametrize(
    "weight", [np.full(5, 1e300), np.full(5, 1e-60), np.array([np.inf, -np.inf, 1, 1, 1], float32)]
)
def test_weights_beyond_their_type_raise_no_warning(weight):
    """They are rounded to the type computed in: to an infinity, or to 0."""
    x, labels = cases.logits((4, 5)), np.array([0, 1, 2, 3])
    with np.errstate(all="raise"):
        cross_entropy(x, labels, weight=weight)
        cross_entropy_value_and_grad(x, labels, weight=weight, label_smoothing=0.1)
        nll_loss(x, labels, weight=weight)
        nll_loss_backward(1.0, x, labels, weight=weight)


def test_losses_below_the_normal_numbers_raise_no_warning():
    x, labels = np.zeros((4, 5), float32), np.ones(4, int)
    x[:, 1] = 95.0
    with np.errstate(all="raise"):
        losses = cross_entropy(x, labels, reduction="none")
    np.testing.assert_allclose(losses, 4 * np.exp(-95.0), rtol=1e-3)


def test_lse_of_the_unbatched_case_is_a_scalar():
    x = cases.logits((5,))
    loss, lse = cross_entropy(x, 2, reduction="none", return_lse=True)
    assert type(loss) is np.float32
    assert type(lse) is np.float64
    grad = cross_entropy_backward(1.0, x, 2, lse=lse)
    np.testing.assert_array_max_ulp(grad, cross_entropy_backward(1.0, x, 2), 8)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@cases.dtypes(float32, float64, bfloat16)
def test_the_weight_of_a_class_that_is_no_label(dtype, reduction, value):
    """It counts for nothing, whatever it is, unless labels are smoothed."""
    x, labels = cases.logits((9, 4), dtype), np.arange(9) % 3
    weight = np.array([1.0, 0.5, 2.0, value], np.float32)
    options = {"reduction": reduction}
    loss, grad = cross_entropy_value_and_grad(x, labels, weight=weight, **options)
    weight[3] = 3.0
    want = cross_entropy_value_and_grad(x, labels, weight=weight, **options)
    assert cases.same_bits(loss, want[0]) and cases.same_bits(grad, want[1])
    given = np.ones(9) if reduction == "none" else 1.0
    wide = reference.cross_entropy_backward(given, x, labels, weight=weight, **options)
    cases.assert_close(grad, wide, dtype)


@pytest.mark.parametrize(
    "labels, first", [([0, 0], 0.0), ([-100, 0], 0.0), ([0, 1], 1.0), ([1, 0], 1.0)]
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_mean_over_weights_that_sum_to_0(axis, smoothing, labels, first):
    """It is that of nothing, also where other classes' weights have a part in the losses."""
    x, weight = cases.logits((2, 40)), np.ones(40, float32)
    weight[:2] = first, -first
    x = np.moveaxis(x, 1, axis)
    options = {"weight": weight, "label_smoothing": smoothing, "axis": axis}
    loss, grad = cross_entropy_value_and_grad(x, labels, **options)
    assert np.isnan(loss) and np.isnan(cross_entropy(x, labels, **options))
    for found in grad, cross_entropy_backward(1.0, x, labels, **options):
        for row, label in zip(np.moveaxis(found, axis, 1), labels, strict=True):
            assert not row.any() if label == -100 else np.isnan(row).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("classes", [3, 5000])
@cases.dtypes(bfloat16, float32, float64)
def test_an_ignored_row_whatever_the_weights(dtype, classes, reduction, smoothing, value):
    x, weight = cases.logits((3, classes), dtype), np.ones(classes)
    weight[2] = value
    labels, options = [-100, 1, 0], {"reduction": reduction, "label_smoothing": smoothing}
    given = np.ones(3) if reduction == "none" else 1.0
    loss, lse = cross_entropy(x, labels, weight=weight, return_lse=True, **options)
    if reduction == "none":
        assert loss[0] == 0
    for grad in (
        cross_entropy_value_and_grad(x, labels, weight=weight, **options)[1],
        cross_entropy_backward(given, x, labels, weight=weight, **options),
        cross_entropy_backward(given, x, labels, weight=weight, lse=lse, **options),
    ):
        assert not np.asarray(grad[0], float64).any()


@pytest.mark.parametrize("value", [INF, -INF])
@pytest.mark.parametrize("axis", [0, 1])
@cases.dtypes(bfloat16, float32, float64)
def test_losses_with_an_infinite_weight(dtype, axis, value):
    """They are infinite wherever its class is, at the maximum too."""
    x = cases.logits((40, 21), dtype)
    x[np.arange(21), np.arange(21)] = 9
    weight, labels = np.ones(21, float32), np.arange(40) % 21
    weight[3] = value
    for target, smoothing in (labels, 0.1), (cases.probabilities(x.shape, 1, dtype), 0.0):
        options = {"weight": weight, "label_smoothing": smoothing, "reduction": "none"}
        want = reference.cross_entropy(x, target, **options)
        assert np.array_equal(want, np.full(40, value))
        given = [np.moveaxis(a, 1, axis) if np.ndim(a) == 2 else a for a in (x, target)]
        for loss in (
            cross_entropy(*given, axis=axis, **options),
            cross_entropy_value_and_grad(*given, axis=axis, **options)[0],
        ):
            assert np.array_equal(loss, want)


def test_an_infinite_weight_of_a_label_under_mean():
    """It is all that counts: what other labels have is divided by infinity."""
    x, weight = cases.logits((3, 4)), np.array([1, 1, INF, 1], float32)
    loss, grad = cross_entropy_value_and_grad(x, [0, 2, 1], weight=weight)
    again = nll_loss_backward(1.0, log_softmax(x), [0, 2, 1], weight=weight)
    assert np.isnan(loss)
    for found in grad, again:
        assert not found[[0, 2]].any()
    assert np.isnan(grad[1]).all() and np.isnan(again[1, 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [2, 3, 21, 100, 1000, 4096, 10_000])
@cases.dtypes(float16, bfloat16, float32)
def test_an_ignored_row_of_any_logits(dtype, classes, smoothing):
    """Its gradient is 0, however low or high they are; of a column too."""
    for level in (-60_000, -1000, -300, -100, -60, -45, 45, 300, 60_000):
        x = cases.logits((4, classes), dtype)
        x[::2] = level
        labels = np.array([-100, 0, -100, 1])
        for axis, given in ((1, x), (0, np.ascontiguousarray(x.T))):
            options = {"axis": axis, "label_smoothing": smoothing}
            _, grad = cross_entropy_value_and_grad(given, labels, **options)
            again = cross_entropy_backward(1.0, given, labels, **options)
            for found in (np.moveaxis(g, axis, 1).astype(np.float64) for g in (grad, again)):
                assert not found[::2].any()
                assert np.isfinite(found).all() and found[1::2].any()
