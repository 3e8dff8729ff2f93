"""Hypothesis over shapes, strides, types, axes and options, against the reference."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import numbakern
from tests import cases, reference
from tests.cases import assert_close, assert_result, bfloat16, float16, float32, float64, loss_type

more = hypothesis.settings(max_examples=3000, derandomize=False)

# Mostly ordinary numbers which halves hold exactly, with infinities and NaN among them.
ORDINARY = st.integers(-640, 640).map(lambda n: n / 64)
ANYTHING = st.one_of(ORDINARY, ORDINARY, ORDINARY, st.sampled_from([-np.inf, np.inf, np.nan, -0.0]))

TYPES = st.sampled_from([float32, float32, float64, float16, bfloat16])
LENGTH = st.one_of(st.integers(0, 9), st.sampled_from([16, 17, 33, 70]))


@st.composite
def arrays(draw, min_dims=1, min_length=0, elements=ANYTHING, dtypes=TYPES):
    """An array of any shape, type and memory layout, and an axis of it."""
    lengths = LENGTH.filter(lambda n: n >= min_length)
    shape = draw(st.lists(lengths, min_size=min_dims, max_size=4))
    while np.prod(shape, dtype=int) > 20_000:
        shape[int(np.argmax(shape))] //= 2
    pool = np.array(draw(st.lists(elements, min_size=1, max_size=12)))
    seed = draw(st.integers(0, 2**16))
    a = np.random.default_rng(seed).choice(pool, size=shape).astype(draw(dtypes))
    if draw(st.booleans()):  # any order of the axes in memory
        order = draw(st.permutations(range(a.ndim)))
        a = np.ascontiguousarray(a.transpose(order)).transpose(np.argsort(order))
    a = cases.ZOO[draw(st.sampled_from(list(cases.ZOO)))](a)
    return a, draw(st.integers(-a.ndim, a.ndim - 1))


@st.composite
def axes_of(draw, ndim):
    if draw(st.booleans()):
        return draw(st.integers(-ndim, ndim - 1))
    if draw(st.booleans()):
        return None
    axes = draw(st.lists(st.integers(0, ndim - 1), min_size=1, unique=True))
    return tuple(a - ndim if draw(st.booleans()) else a for a in axes)


def check_functions(data):
    x, _ = data.draw(arrays())
    axis = data.draw(axes_of(x.ndim))
    dtype = cases.output_type(x.dtype)
    for name in ("log_softmax", "softmax"):
        want = getattr(reference, name)(x, axis)
        assert_result(getattr(numbakern, name)(x, axis), want, dtype)
        out = cases.filled_like(
            data.draw(st.sampled_from(list(cases.OUT_ZOO.values()))), x.shape, dtype
        )
        assert getattr(numbakern, name)(x, axis, out=out) is out
        assert_close(out, want, dtype)
    keepdims = data.draw(st.booleans())
    want = reference.logsumexp(x, axis, keepdims)
    assert_result(numbakern.logsumexp(x, axis, keepdims=keepdims), want, loss_type(dtype))


def check_backwards(data):
    y, axis = data.draw(arrays(elements=ORDINARY))
    g = data.draw(st.sampled_from(list(cases.ZOO.values())))(
        cases.logits(y.shape, y.dtype.newbyteorder("="), scale=1.0)
    )
    dtype = cases.output_type(y.dtype)
    # Log-probabilities and probabilities of y: what a backward is given.
    logp, p = reference.log_softmax(y, axis).astype(dtype), reference.softmax(y, axis).astype(dtype)
    want = reference.log_softmax_backward(g, logp, axis)
    scale = 4 + np.sqrt(y.shape[axis])
    assert_result(numbakern.log_softmax_backward(g, logp, axis), want, dtype, scale)
    want = reference.softmax_backward(g, p, axis)
    assert_result(numbakern.softmax_backward(g, p, axis), want, dtype, scale)


def check_losses(data):
    x, axis = data.draw(arrays(min_dims=1, min_length=1, elements=ORDINARY))
    dtype, classes = cases.output_type(x.dtype), x.shape[axis]
    rows = () if x.ndim == 1 else tuple(np.delete(x.shape, axis))
    ignore_index = data.draw(st.sampled_from([-100, 0, classes - 1, 5, -1]))
    reduction = data.draw(st.sampled_from(cases.REDUCTIONS))
    smoothing = data.draw(st.sampled_from([0.0, 0.1, 1.0]))
    weight = cases.class_weights(classes, dtype) if data.draw(st.booleans()) else None
    options = {"weight": weight, "reduction": reduction, "axis": axis}

    labels = np.asarray(cases.class_labels(rows, classes, seed=data.draw(st.integers(0, 99))))
    labels = np.where(cases.generator(3).random(rows) < 0.2, ignore_index, labels)
    kind = data.draw(st.sampled_from([np.int64, np.int32, np.int8]))
    labels = labels.astype(kind)
    if labels.ndim:
        labels = data.draw(st.sampled_from(list(cases.ZOO.values())))(labels)
    target = labels
    if data.draw(st.booleans()):
        target = cases.probabilities(x.shape, 0 if x.ndim == 1 else axis, dtype)

    g = cases.logits(rows, dtype, scale=1.0) if reduction == "none" else dtype.type(0.5)
    size = max(1.0, float(np.size(labels)))
    plain = {"ignore_index": ignore_index}
    smooth = {**plain, "label_smoothing": smoothing}
    for name, given, extra in [("nll_loss", labels, plain), ("cross_entropy", target, smooth)]:
        want = getattr(reference, name)(x, given, **options, **extra)
        got = getattr(numbakern, name)(x, given, **options, **extra)
        assert_result(got, want, loss_type(dtype), scale=size)
        backward = f"{name}_backward"
        want = getattr(reference, backward)(g, x, given, **options, **extra)
        got = getattr(numbakern, backward)(g, x, given, **options, **extra)
        assert_result(got, want, dtype)
    ones = np.ones(rows) if reduction == "none" else 1.0
    loss, grad = numbakern.cross_entropy_value_and_grad(x, target, **options, **smooth)
    want = reference.cross_entropy(x, target, **options, **smooth)
    assert_result(loss, want, loss_type(dtype), scale=size)
    want = reference.cross_entropy_backward(ones, x, target, **options, **smooth)
    assert_result(grad, want, dtype)


@hypothesis.given(st.data())
def test_functions(data):
    check_functions(data)


@hypothesis.given(st.data())
def test_backwards(data):
    check_backwards(data)


@hypothesis.settings(max_examples=10)  # nearly each compiles kernels; test_many_more draws more
@hypothesis.given(st.data())
def test_losses(data):
    check_losses(data)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_functions, check_backwards, check_losses])
def test_many_more(check):
    more(hypothesis.given(st.data())(lambda data: check(data)))()


@hypothesis.given(
    st.lists(ORDINARY, min_size=1, max_size=40), st.integers(-1000, 1000), st.sampled_from([0, 1])
)
def test_a_shift_changes_nothing_and_probabilities_sum_to_one(row, shift, axis):
    """Multiples of 1/64 can be shifted exactly; both results are then right to an ulp or two."""
    x = np.array([row, row[::-1]], float64)
    x = x.T if axis == 0 else x
    shifted = numbakern.log_softmax(x + shift, axis)
    np.testing.assert_array_max_ulp(shifted, numbakern.log_softmax(x, axis), maxulp=4)
    np.testing.assert_allclose(numbakern.softmax(x, axis).sum(axis), 1, rtol=1e-14)
    assert np.all(numbakern.log_softmax(x, axis) <= 0)
