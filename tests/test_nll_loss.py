"""nll_loss and its backward: every option, label type, layout and edge case."""

from __future__ import annotations

import math

import numpy as np
import pytest

from numbakern import nll_loss, nll_loss_backward
from tests import cases, reference
from tests.cases import assert_close, assert_result, bfloat16, float16, float32, float64, loss_type

INF, NAN = np.inf, np.nan

# (shape of the log-probabilities, class axis): both layouts, and a class axis anywhere.
LOSS_SHAPES = [
    pytest.param(shape, axis, id=f"{'x'.join(map(str, shape))}-axis{axis}")
    for shape, axis in [
        ((9, 10), 1),
        ((9, 10), -1),
        ((10, 9), 0),
        ((1, 1), 1),
        ((4, 7, 5), 1),
        ((4, 5, 7), -1),
        ((2, 21, 6, 11), 1),
        ((2, 3, 4, 2, 5), 1),
        ((2, 3, 4, 5), 2),
        ((700, 3), 1),
        ((3, 1000), 1),
    ]
]


def label_shape(shape, axis):
    shape = list(shape)
    del shape[axis]
    return tuple(shape)


def inputs(shape, axis, dtype=float32, ignore_index=None, label_dtype=np.int64):
    """Log-probabilities, and labels of which about a third are ``ignore_index``."""
    logp = reference.log_softmax(cases.logits(shape), axis).astype(dtype)
    labels = cases.class_labels(label_shape(shape, axis), shape[axis], label_dtype)
    if ignore_index is not None:
        labels[cases.generator(5).random(labels.shape) < 0.3] = ignore_index
    return logp, labels


def upstream(labels, reduction, dtype=float32):
    """grad_output: a number for mean and sum, an array of the labels' shape for none."""
    if reduction == "none":
        return cases.logits(np.shape(labels), dtype, scale=1.0, seed=11)
    return dtype.type(1.7)


OPTIONS = [
    pytest.param(
        {"weight": weight, "ignore_index": ignore_index, "reduction": reduction},
        id=f"{'weight' if weight else 'plain'}-ignore{ignore_index}-{reduction}",
    )
    for weight in (False, True)
    for ignore_index in (-100, 2, -1)
    for reduction in cases.REDUCTIONS
]


def with_weight(options, classes, dtype=float32):
    return {**options, "weight": cases.class_weights(classes, dtype) if options["weight"] else None}


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("shape", "axis"), LOSS_SHAPES)
def test_every_option(shape, axis, options):
    logp, labels = inputs(shape, axis, ignore_index=options["ignore_index"])
    options = with_weight(options, shape[axis])
    want = reference.nll_loss(logp, labels, axis=axis, **options)
    assert_result(nll_loss(logp, labels, axis=axis, **options), want, float32, scale=3)

    g = upstream(labels, options["reduction"])
    want = reference.nll_loss_backward(g, logp, labels, axis=axis, **options)
    got = nll_loss_backward(g, logp, labels, axis=axis, **options)
    assert_result(got, want, float32)
    assert np.all(got[want == 0] == 0)


@cases.dtypes(*cases.FLOATS)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weight"])
def test_types(dtype, reduction, weighted):
    logp, labels = inputs((9, 10), 1, dtype)
    weight = cases.class_weights(10, dtype) if weighted else None
    want = reference.nll_loss(logp, labels, weight, reduction=reduction)
    got = nll_loss(logp, labels, weight=weight, reduction=reduction)
    assert_result(got, want, loss_type(dtype))

    g = upstream(labels, reduction, dtype)
    want = reference.nll_loss_backward(g, logp, labels, weight, reduction=reduction)
    got = nll_loss_backward(g, logp, labels, weight=weight, reduction=reduction)
    assert_result(got, want, dtype)


def test_integer_log_probs_give_float64():
    logp, labels = np.array([[-1, -2], [-3, 0]]), [0, 1]
    assert_result(nll_loss(logp, labels, reduction="none"), [1.0, 0.0], float64)
    assert_result(nll_loss_backward(1.0, logp, labels), [[-0.5, 0], [0, -0.5]], float64)


def test_a_weight_of_another_type():
    logp, labels = inputs((9, 10), 1)
    for weight in (cases.class_weights(10, float64), list(range(1, 11)), np.arange(1, 11)):
        want = reference.nll_loss(logp, labels, weight)
        assert_result(nll_loss(logp, labels, weight=weight), want, float32)


@cases.dtypes(*cases.INTEGERS)
def test_labels_of_every_integer_type(dtype):
    logp, labels = inputs((9, 10), 1, label_dtype=dtype)
    want = reference.nll_loss(logp, labels, reduction="none")
    assert_result(nll_loss(logp, labels, reduction="none"), want, float32)
    want = reference.nll_loss_backward(1.0, logp, labels)
    assert_result(nll_loss_backward(1.0, logp, labels), want, float32)


@cases.zoo()
@pytest.mark.parametrize("axis", [-1, 1])
def test_layouts_of_log_probs(layout, axis):
    logp, labels = inputs((6, 35, 4), axis)
    logp = layout(logp)
    for reduction in cases.REDUCTIONS:
        want = reference.nll_loss(logp, labels, reduction=reduction, axis=axis)
        got = nll_loss(logp, labels, reduction=reduction, axis=axis)
        assert_result(got, want, float32, scale=3)


@cases.zoo()
@pytest.mark.parametrize("dtype", [np.int64, np.int16], ids=["int64", "int16"])
def test_layouts_of_labels(layout, dtype):
    logp, labels = inputs((6, 35, 4), 1, label_dtype=dtype)
    labels = layout(labels)
    want = reference.nll_loss(logp, labels, reduction="none")
    assert_result(nll_loss(logp, labels, reduction="none"), want, float32)


@cases.zoo(["ascontiguousarray", "reversed_last", "every_other_last", "misaligned", "byte_swapped"])
def test_layouts_of_weight_and_upstream(layout):
    logp, labels = inputs((6, 35), 1)
    weight = layout(cases.class_weights(35))
    g = layout(upstream(labels, "none"))
    want = reference.nll_loss_backward(g, logp, labels, weight, reduction="none")
    got = nll_loss_backward(g, logp, labels, weight=weight, reduction="none")
    assert_result(got, want, float32)


@pytest.mark.parametrize("axis", [1, 0, -1])
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("label", [3, np.int8(3), np.array(3, np.uint16)], ids=["int", "np", "0-d"])
def test_unbatched(axis, reduction, label):
    logp, _ = inputs((10,), 0)
    want = reference.nll_loss(logp, 3, reduction=reduction)
    assert_result(nll_loss(logp, label, reduction=reduction, axis=axis), want, float32)
    got = nll_loss_backward(2.0, logp, label, reduction=reduction, axis=axis)
    assert_result(got, np.where(np.arange(10) == 3, -2.0, 0.0), float32)


def test_lists():
    logp, labels = [[-1.0, -2.0], [-3.0, -0.5]], [1, 0]
    assert_result(nll_loss(logp, labels), 2.5, float64)


def test_inputs_stay_as_they_were():
    logp, labels = inputs((9, 10), 1, ignore_index=-100)
    weight, g = cases.class_weights(10), upstream(labels, "none")
    kept = [a.copy() for a in (logp, labels, weight, g)]
    nll_loss(logp, labels, weight=weight)
    nll_loss_backward(g, logp, labels, weight=weight, reduction="none")
    for now, before in zip((logp, labels, weight, g), kept, strict=True):
        assert np.array_equal(now, before)


# --- out= ----------------------------------------------------------------------------------------


@cases.zoo(cases.OUT_ZOO)
@pytest.mark.parametrize("axis", [1, -1])
def test_backward_out_of_every_layout(layout, axis):
    logp, labels = inputs((6, 35, 4), axis, ignore_index=-100)
    out = cases.filled_like(layout, logp.shape, float32)
    want = reference.nll_loss_backward(1.0, logp, labels, axis=axis)
    assert nll_loss_backward(1.0, logp, labels, axis=axis, out=out) is out
    assert_close(out, want, float32)


@pytest.mark.parametrize("dtype", [float16, bfloat16, float32, float64], ids=str)
def test_backward_in_place_of_the_log_probs(dtype):
    logp, labels = inputs((9, 10), 1, dtype)
    want = reference.nll_loss_backward(1.0, logp, labels, reduction="sum")
    assert nll_loss_backward(1.0, logp, labels, reduction="sum", out=logp) is logp
    assert_close(logp, want, dtype)


def test_backward_out_over_the_upstream_gradient():
    logp, labels = inputs((9, 10), 1)
    out = np.zeros((9, 10), float32)
    g = out[:, 3]
    g[...] = upstream(labels, "none")
    want = reference.nll_loss_backward(g, logp, labels, reduction="none")
    nll_loss_backward(g, logp, labels, reduction="none", out=out)
    assert_close(out, want, float32)


# --- the case table ------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [131_071, 131_072, 131_073, 400_003])
@cases.dtypes(float32, float64)
def test_rows_shared_by_threads(rows, dtype):
    """Labels are checked, weights and losses added up, by several threads where rows are many."""
    x = cases.logits((rows, 5), dtype)
    labels = cases.class_labels(rows, 5)
    labels[::7] = -100
    weight = cases.class_weights(5, dtype)
    live = labels != -100
    terms = weight.astype(float64)[labels[live]]
    losses = -terms * x.astype(float64)[live, labels[live]]
    for reduction, divisor in (("sum", 1.0), ("mean", math.fsum(terms))):
        got = nll_loss(x, labels, weight=weight, reduction=reduction)
        assert_close(got, math.fsum(losses) / divisor, dtype)
    got = nll_loss(x, labels)
    assert_close(got, -math.fsum(x.astype(float64)[live, labels[live]]) / live.sum(), dtype)
    for position, wrong in ((rows - 1, 5), (rows // 2, -1)):
        labels[position] = wrong
        with pytest.raises(IndexError, match=rf"labels\[{position}\].* got {wrong}"):
            nll_loss(x, labels, weight=weight)


def test_an_infinite_loss_among_many():
    x, labels = np.ones((200_003, 2), float64), np.zeros(200_003, np.int64)
    x[70_000] = -INF
    assert nll_loss(x, labels) == INF
    x[170_000, 0] = INF
    assert np.isnan(nll_loss(x, labels))
    x[...] = -1.7e308
    assert nll_loss(x, labels, reduction="sum") == INF


def test_no_rows():
    logp, labels = np.zeros((0, 5), float32), np.zeros(0, np.int64)
    assert_result(nll_loss(logp, labels, reduction="none"), np.zeros(0), float32)
    assert_result(nll_loss(logp, labels, reduction="sum"), 0.0, float32)
    assert_result(nll_loss(logp, labels, reduction="mean"), NAN, float32)
    assert_result(nll_loss_backward(1.0, logp, labels), logp, float32)


def test_no_columns_behind_the_classes():
    logp, labels = np.zeros((3, 5, 0), float32), np.zeros((3, 0), np.int64)
    assert_result(nll_loss(logp, labels), NAN, float32)
    assert_result(nll_loss_backward(1.0, logp, labels), logp, float32)


def test_no_classes():
    with pytest.raises(IndexError):
        nll_loss(np.zeros((2, 0), float32), [0, 0])
    with pytest.raises(IndexError):
        nll_loss_backward(1.0, np.zeros((2, 0), float32), [0, 0])


def test_nothing_counted():
    logp, labels = inputs((4, 5), 1)
    ignored = np.full(4, -100)
    assert_result(nll_loss(logp, ignored), NAN, float32)
    assert_result(nll_loss(logp, ignored, reduction="sum"), 0.0, float32)
    assert_result(nll_loss(logp, ignored, reduction="none"), np.zeros(4), float32)
    assert_result(nll_loss(logp, labels, weight=np.zeros(5, float32)), NAN, float32)
    for reduction in cases.REDUCTIONS:
        g = upstream(ignored, reduction)
        got = nll_loss_backward(g, logp, ignored, reduction=reduction)
        assert_result(got, np.zeros((4, 5)), float32)


@pytest.mark.parametrize("content", [NAN, INF, -INF], ids=str)
def test_an_ignored_row_is_zero_whatever_it_holds(content):
    logp, labels = inputs((4, 5), 1)
    logp[1], labels[1] = content, -100
    rows = nll_loss(logp, labels, reduction="none")
    assert rows[1] == 0
    assert np.isfinite(nll_loss(logp, labels))
    g = np.array([1, NAN, 1, 1], float32)
    grad = nll_loss_backward(g, logp, labels, reduction="none")
    assert np.array_equal(grad[1], np.zeros(5))


def test_minus_inf_at_the_label_and_elsewhere():
    logp = np.array([[-INF, -1.0], [-1.0, -INF]], float32)
    got = nll_loss(logp, [0, 0], reduction="none")
    np.testing.assert_array_equal(got, np.array([INF, 1], float32))
    assert nll_loss(logp, [0, 0]) == INF
    # 0 times an infinity or NaN, as in PyTorch.
    weight = np.array([0, 1], float32)
    got = nll_loss(logp, [0, 0], weight=weight, reduction="none")
    np.testing.assert_array_equal(got, np.array([NAN, 0], float32))
    logp[1, 0] = NAN
    got = nll_loss(logp, [1, 0], weight=weight, reduction="none")
    np.testing.assert_array_equal(got, np.array([1, NAN], float32))


@pytest.mark.parametrize("ignore_index", [255, 0, 9, -1, 300, -100, 2**40, -(2**40)])
@cases.dtypes(np.uint8, np.int8, np.int64)
def test_ignore_index_is_compared_as_a_number(ignore_index, dtype):
    """An index that the labels' type cannot hold matches no label: nothing wraps around."""
    logp, labels = inputs((50, 200), 1)
    labels = (labels % 100).astype(dtype)
    if np.iinfo(dtype).min <= ignore_index <= np.iinfo(dtype).max:
        labels[::3] = ignore_index
    want = reference.nll_loss(logp, labels, ignore_index=ignore_index)
    assert_result(nll_loss(logp, labels, ignore_index=ignore_index), want, float32)


def test_unsigned_labels_do_not_wrap_to_the_ignored_one():
    logp, _ = inputs((2, 200), 1)
    labels = np.array([156, 1], np.uint8)  # 156 is -100 of eight bits
    want = reference.nll_loss(logp, labels, reduction="none")
    assert_result(nll_loss(logp, labels, reduction="none"), want, float32)
    for wrapped in (2**64 - 100, 2**63, 2**32):
        with pytest.raises(IndexError, match=str(wrapped)):
            nll_loss(logp, np.array([wrapped, 1], np.uint64))
