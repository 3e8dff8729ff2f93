"""Types that meet in one call on the CUDA target, its kernels emulated."""

from __future__ import annotations

import numpy as np
import pytest

from tests import cases, on_device, reference
from tests.cases import assert_result, float32

WEIGHTS = [None, *cases.FLOATS, np.dtype(np.int32)]


@pytest.fixture
def emulated():
    with on_device.on("emulator") as functions:
        yield functions


@cases.dtypes(*cases.FLOATS, *cases.INTEGERS, cases.BOOL)
def test_probabilities_and_weights_of_every_type(emulated, dtype):
    """Beside logits of every type: each of them is converted as it is read."""
    for k, of_probabilities in enumerate(cases.FLOATS):
        for classes in (5, 130):
            x = cases.logits((6, classes), dtype)
            p = cases.probabilities(x.shape, 1, of_probabilities)
            weight = WEIGHTS[(k + classes + cases.FLOATS.index(of_probabilities)) % len(WEIGHTS)]
            if weight is not None:
                weight = (4 * cases.class_weights(classes, float32)).astype(weight)
            options = {"weight": weight, "label_smoothing": 0.125 * (k % 2)}
            loss, grad = emulated.cross_entropy_value_and_grad(x, p, **options)
            want = reference.cross_entropy(x, p, **options)
            assert_result(loss, want, cases.loss_type(dtype), scale=10)
            want = reference.cross_entropy_backward(1.0, x, p, **options)
            assert_result(grad, want, cases.output_type(dtype), scale=5)


@cases.dtypes(*cases.FLOATS)
def test_upstream_gradients_and_lse_of_every_type(emulated, dtype):
    x, labels = cases.logits((6, 33), dtype), cases.class_labels(6, 33, np.uint8)
    lse = reference.logsumexp(x)
    for of_lse in {cases.loss_type(dtype), np.dtype(np.float64)}:  # logsumexp's, cross_entropy's
        for of_g in [*cases.FLOATS, np.dtype(np.int16)]:
            g = np.arange(-2, 4).astype(of_g)
            want = reference.cross_entropy_backward(g, x, labels, reduction="none")
            given = {"lse": lse.astype(of_lse), "reduction": "none"}
            got = emulated.cross_entropy_backward(g, x, labels, **given)
            assert_result(got, want, cases.output_type(dtype), scale=20)
