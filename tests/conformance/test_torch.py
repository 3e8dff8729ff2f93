"""PyTorch's functions and its autograd, over the product of their options, in float64."""

from __future__ import annotations

import numpy as np
import pytest

import numbakern
from tests import cases
from tests.cases import float64

torch = pytest.importorskip("torch")
functional = torch.nn.functional

SHAPES = [(6, 10), (3, 7, 5), (2, 5, 4, 3), (10,)]


def tensor(a, **options):
    return None if a is None else torch.tensor(np.asarray(a), **options)


def assert_same(got, want, scale=1.0):
    cases.assert_close(got, want.detach().numpy(), float64, scale)


def inputs(shape, weighted, ignore_index):
    x = cases.logits(shape, float64)
    classes = shape[0] if len(shape) == 1 else shape[1]
    labels = cases.class_labels(() if len(shape) == 1 else np.delete(shape, 1), classes)
    if labels.ndim:
        labels[cases.generator(6).random(labels.shape) < 0.3] = ignore_index
    weight = cases.class_weights(classes, float64) if weighted else None
    return x, labels, weight


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weight"])
@pytest.mark.parametrize("ignore_index", [-100, 1, -7])
@pytest.mark.parametrize("smoothing", [0.0, 0.15, 1.0])
def test_cross_entropy(shape, reduction, weighted, ignore_index, smoothing):
    x, labels, weight = inputs(shape, weighted, ignore_index)
    options = {
        "reduction": reduction,
        "ignore_index": ignore_index,
        "label_smoothing": smoothing,
    }
    theirs = tensor(x, requires_grad=True)
    want = functional.cross_entropy(theirs, tensor(labels), weight=tensor(weight), **options)
    want.sum().backward()
    assert_same(numbakern.cross_entropy(x, labels, weight=weight, **options), want)
    loss, grad = numbakern.cross_entropy_value_and_grad(x, labels, weight=weight, **options)
    assert_same(loss, want)
    assert_same(grad, theirs.grad)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weight"])
@pytest.mark.parametrize("smoothing", [0.0, 0.15, 1.0])
def test_cross_entropy_of_probabilities(shape, reduction, weighted, smoothing):
    x, _, weight = inputs(shape, weighted, -100)
    p = cases.probabilities(shape, 0 if len(shape) == 1 else 1, float64)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    theirs = tensor(x, requires_grad=True)
    want = functional.cross_entropy(theirs, tensor(p), weight=tensor(weight), **options)
    want.sum().backward()
    assert_same(numbakern.cross_entropy(x, p, weight=weight, **options), want)
    loss, grad = numbakern.cross_entropy_value_and_grad(x, p, weight=weight, **options)
    assert_same(loss, want)
    assert_same(grad, theirs.grad)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weight"])
@pytest.mark.parametrize("ignore_index", [-100, 1, -7])
def test_nll_loss(shape, reduction, weighted, ignore_index):
    logp, labels, weight = inputs(shape, weighted, ignore_index)
    options = {"reduction": reduction, "ignore_index": ignore_index}
    theirs = tensor(logp, requires_grad=True)
    want = functional.nll_loss(theirs, tensor(labels), weight=tensor(weight), **options)
    assert_same(numbakern.nll_loss(logp, labels, weight=weight, **options), want)
    upstream = cases.logits(want.shape, float64, seed=12)
    want.backward(tensor(upstream))
    grad = numbakern.nll_loss_backward(upstream, logp, labels, weight=weight, **options)
    assert_same(grad, theirs.grad)


@pytest.mark.parametrize("name", ["log_softmax", "softmax"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_functions_and_their_gradients(name, axis):
    x, g = cases.logits((4, 9, 5), float64), cases.logits((4, 9, 5), float64, seed=4)
    theirs = tensor(x, requires_grad=True)
    want = getattr(functional, name)(theirs, dim=axis)
    want.backward(tensor(g))
    got = getattr(numbakern, name)(x, axis)
    assert_same(got, want)
    assert_same(getattr(numbakern, f"{name}_backward")(g, got, axis), theirs.grad, scale=4)


@pytest.mark.parametrize("axis", [0, 1, (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("keepdims", [False, True])
def test_logsumexp(axis, keepdims):
    x = cases.logits((4, 9, 5), float64)
    want = torch.logsumexp(tensor(x), dim=axis, keepdim=keepdims)
    assert_same(numbakern.logsumexp(x, axis, keepdims=keepdims), want)
