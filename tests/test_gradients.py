"""Backwards against central differences, and fused functions against chains of simple ones."""

from __future__ import annotations

import numpy as np
import pytest

import numbakern
from tests import cases
from tests.cases import assert_close, float32, float64

STEP = 1e-5


def central_differences(function, x):
    """d function / d x, element by element; the error is about 1e-10 for values around 1."""
    grad = np.empty_like(x)
    for index in np.ndindex(x.shape):
        there, here = x.copy(), x.copy()
        there[index] += STEP
        here[index] -= STEP
        grad[index] = (function(there) - function(here)) / (2 * STEP)
    return grad


def assert_gradient(got, function, x):
    # STEP² of truncation (third derivatives below 10), 1e-16 / STEP of rounding.
    np.testing.assert_allclose(got, central_differences(function, x), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["log_softmax", "softmax"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_backward_of_the_functions(name, axis):
    forward, backward = getattr(numbakern, name), getattr(numbakern, f"{name}_backward")
    x = cases.logits((3, 4, 5), float64, scale=1.0)
    g = cases.logits((3, 4, 5), float64, scale=1.0, seed=9)
    got = backward(g, forward(x, axis), axis)
    assert_gradient(got, lambda x: np.sum(g * forward(x, axis)), x)


@pytest.mark.parametrize("axis", [1, -1])
def test_the_gradient_of_logsumexp_is_softmax(axis):
    x = cases.logits((3, 4, 5), float64, scale=1.0)
    got = numbakern.softmax(x, axis)
    assert_gradient(got, lambda x: np.sum(numbakern.logsumexp(x, axis)), x)


OPTIONS = [
    pytest.param(weight, reduction, id=f"{'weight' if weight else 'plain'}-{reduction}")
    for weight in (False, True)
    for reduction in cases.REDUCTIONS
]


def loss_inputs(axis, dtype=float64):
    x = cases.logits((4, 5, 3), dtype, scale=1.0)
    labels = cases.class_labels(np.delete(x.shape, axis), x.shape[axis])
    labels[0, 0] = -100
    return x, labels


@pytest.mark.parametrize(("weighted", "reduction"), OPTIONS)
@pytest.mark.parametrize("axis", [1, -1])
def test_backward_of_nll_loss(weighted, reduction, axis):
    logp, labels = loss_inputs(axis)
    options = {"reduction": reduction, "axis": axis}
    options["weight"] = cases.class_weights(logp.shape[axis], float64) if weighted else None
    g = cases.logits(labels.shape, float64) if reduction == "none" else np.float64(1.5)
    got = numbakern.nll_loss_backward(g, logp, labels, **options)
    assert_gradient(got, lambda x: np.sum(g * numbakern.nll_loss(x, labels, **options)), logp)


@pytest.mark.parametrize(("weighted", "reduction"), OPTIONS)
@pytest.mark.parametrize("axis", [1, pytest.param(-1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_backward_of_cross_entropy(weighted, reduction, axis, smoothing, kind):
    x, target = loss_inputs(axis)
    g = cases.logits(target.shape, float64) if reduction == "none" else np.float64(1.5)
    if kind == "probabilities":
        target = cases.probabilities(x.shape, axis, float64)
    options = {"reduction": reduction, "axis": axis, "label_smoothing": smoothing}
    options["weight"] = cases.class_weights(x.shape[axis], float64) if weighted else None
    got = numbakern.cross_entropy_backward(g, x, target, **options)
    assert_gradient(got, lambda x: np.sum(g * numbakern.cross_entropy(x, target, **options)), x)


# --- fused against unfused: both are ours, and both have been compared with the reference --------


@pytest.mark.parametrize(("weighted", "reduction"), OPTIONS)
@pytest.mark.parametrize("axis", [1, pytest.param(-1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@cases.dtypes(float64, slow=[float32])
def test_value_and_grad_is_cross_entropy_and_its_backward(
    weighted, reduction, axis, smoothing, kind, dtype
):
    x, target = loss_inputs(axis, dtype)
    ones = np.ones(target.shape, dtype) if reduction == "none" else dtype.type(1)
    if kind == "probabilities":
        target = cases.probabilities(x.shape, axis, dtype)
    options = {"reduction": reduction, "axis": axis, "label_smoothing": smoothing}
    options["weight"] = cases.class_weights(x.shape[axis], dtype) if weighted else None
    loss, grad = numbakern.cross_entropy_value_and_grad(x, target, **options)
    assert_close(loss, numbakern.cross_entropy(x, target, **options), dtype)
    assert_close(grad, numbakern.cross_entropy_backward(ones, x, target, **options), dtype)
    _, lse = numbakern.cross_entropy(x, target, return_lse=True, **options)
    by_lse = numbakern.cross_entropy_backward(ones, x, target, lse=lse, **options)
    assert_close(by_lse, grad, dtype)


@pytest.mark.parametrize(("weighted", "reduction"), OPTIONS)
@pytest.mark.parametrize("axis", [1, -1])
def test_cross_entropy_is_log_softmax_then_nll_loss(weighted, reduction, axis):
    x, labels = loss_inputs(axis)
    options = {"reduction": reduction, "axis": axis}
    options["weight"] = cases.class_weights(x.shape[axis], float64) if weighted else None
    g = cases.logits(labels.shape, float64) if reduction == "none" else np.float64(1.5)

    logp = numbakern.log_softmax(x, axis)
    loss = numbakern.nll_loss(logp, labels, **options)
    assert_close(numbakern.cross_entropy(x, labels, **options), loss, float64)

    grad = numbakern.nll_loss_backward(g, logp, labels, **options)
    chain = numbakern.log_softmax_backward(grad, logp, axis)
    got = numbakern.cross_entropy_backward(g, x, labels, **options)
    assert_close(got, chain, float64)


def test_the_gradient_of_a_row_sums_to_zero():
    x, labels = loss_inputs(-1)
    grad = numbakern.cross_entropy_backward(1.0, x, labels, axis=-1)
    np.testing.assert_allclose(grad.sum(axis=-1), 0, atol=1e-16)
