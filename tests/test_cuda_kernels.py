"""The CUDA kernels' logic, on the NumPy machine of `emulator`, against the reference.

Every operation, dtype, option and way through a row, at the level of plans: which arrays, which
layouts. That the public functions make the right plans is the business of `test_cuda_host.py`.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from numbakern.arrays import kind_of
from numbakern.cuda.plan import Layout, kernel_of, plan
from tests import accuracy, cases, reference
from tests.cases import bfloat16, float16, float32, float64
from tests.emulator import emulate

WORK = np.longdouble
NONE = np.iinfo(np.int64).max

# Every partition: parts of a warp, a warp with 1 to 8 groups a lane, blocks, chunks; whole and not.
COUNTS = {
    "f4": [1, 2, 3, 4, 5, 10, 17, 32, 33, 100, 128, 129, 257, 700, 1000, 1001, 1024, 1025, 2049],
    "f8": [1, 2, 3, 4, 5, 10, 17, 33, 64, 65, 100, 200, 500, 513, 1025],
    "half": [1, 2, 3, 8, 9, 17, 33, 100, 256, 257, 1000, 1001, 2048, 2049],
}
CHUNKED = {"f4": [16385, 20000], "f8": [8193, 9000], "half": [33000]}


def family(dtype):
    return {float32: "f4", float64: "f8"}.get(np.dtype(dtype), "half")


def layout_of(array):
    address = array.__array_interface__["data"][0]
    return Layout(kind_of(array.dtype).kind, array.strides, address % 16 == 0)


def compute_of(dtype):
    return kind_of(np.dtype(dtype)).compute


def run(operation, arrays, axis, elem=None, *, of="x", record=None, **values):
    """Plan and emulate an operation over these arrays; options and values by name."""
    elem = elem or compute_of(arrays[of].dtype)
    names = ("soft", "smooth", "given", "ignores", "reduction")
    options = tuple((n, values.pop(n)) for n in names if n in values)
    arrays = {n: a for n, a in arrays.items() if a is not None}
    layouts = tuple((n, layout_of(a)) for n, a in arrays.items())
    made = plan(operation, options, arrays[of].shape, axis, elem, layouts)
    temporaries = {n: np.full(-(-size // 8), np.nan) for n, size in made.temporaries}
    bad = np.full(1, NONE) if record is None else record
    memory = {**arrays, **temporaries, "bad": bad}
    slots = {n: a.__array_interface__["data"][0] for n, a in memory.items()}
    slots = {"scale": 1.0, "keep": 1.0, "spread": 0.0, **made.constants, **slots, **values}
    for step in made.steps:
        args = [slots[n] for n in step.args]
        emulate(kernel_of(step.spec), step.grid, step.block, args, list(memory.values()))
    if record is None:
        assert bad[0] == NONE
    return made


def empty_like(array, dtype=None):
    """An array of the same strides (in elements) and alignment, full of something else."""
    dtype = np.dtype(dtype or array.dtype)
    return placed(np.full(array.shape, 7, dtype), offset_of(array))


def offset_of(array):
    return array.__array_interface__["data"][0] % 16 // array.itemsize


def placed(values, offset):
    """Contiguous, `offset` elements behind a multiple of 16 bytes."""
    size = values.itemsize
    raw = np.zeros(values.size * size + 64, np.uint8)
    start = -raw.__array_interface__["data"][0] % 16 + offset * size
    out = raw[start : start + values.size * size].view(values.dtype).reshape(values.shape)
    out[...] = values
    return out


def rows_for(classes):
    return max(2, min(40, 8000 // classes))


def every_count():
    for dtype in cases.FLOATS:
        for classes in COUNTS[family(dtype)] + CHUNKED[family(dtype)]:
            yield pytest.param(dtype, classes, id=f"{dtype}-{classes}")


def bound(dtype, full):
    return 1.0 if np.dtype(dtype) in (float16, bfloat16) else full


# --- the family ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, classes", list(every_count()))
def test_family_of_rows(dtype, classes):
    """log_softmax, softmax, logsumexp; aligned and not."""
    for offset in (0, 1):
        x = placed(cases.logits((rows_for(classes), classes), dtype, scale=4.0), offset)
        want = reference.log_softmax(x, work=WORK)
        out = empty_like(x)
        run("log_softmax", {"x": x, "out": out}, 1)
        assert accuracy.errors(out, want, dtype).max() <= bound(dtype, 2.5)
        run("softmax", {"x": x, "out": out}, 1)
        assert accuracy.errors(out, np.exp(want), dtype, flushed=True).max() <= bound(dtype, 4.0)
        lse = np.empty(len(x), cases.loss_type(dtype))
        run("logsumexp", {"x": x, "row_lse": lse}, 1)
        want = reference.logsumexp(x, work=WORK)
        assert accuracy.errors(lse, want, lse.dtype, np.maximum(abs(want), 1)).max() <= 1.0


@pytest.mark.parametrize("dtype, classes", list(every_count()))
def test_backward_of_rows(dtype, classes):
    """log_softmax_backward and softmax_backward."""
    rng = cases.generator(classes)
    for offset in (0, 1):
        x = cases.logits((rows_for(classes), classes), dtype, scale=4.0)
        g = placed(rng.normal(0, 1, x.shape).astype(dtype), offset)
        y = placed(reference.log_softmax(x).astype(dtype), 0)
        out = empty_like(g)
        run("log_softmax_backward", {"x": g, "y": y, "out": out}, 1)
        size, p = abs(reference.exact(g, WORK)), np.exp(reference.exact(y, WORK))
        at = np.maximum(size, p * size.sum(axis=1, keepdims=True))
        want = reference.log_softmax_backward(g, y, work=WORK)
        at = np.maximum(at, abs(want))
        assert accuracy.errors(out, want, dtype, at).max() <= bound(dtype, 3.0)
        y = placed(reference.softmax(x).astype(dtype), offset)
        run("softmax_backward", {"x": g, "y": y, "out": out}, 1)
        p = reference.exact(y, WORK)
        at = p * np.maximum(size, (size * p).sum(axis=1, keepdims=True))
        want = reference.softmax_backward(g, y, work=WORK)
        at = np.maximum(at, abs(want))
        assert accuracy.errors(out, want, dtype, at, flushed=True).max() <= bound(dtype, 5.0)


# --- losses --------------------------------------------------------------------------------------


def close(got, want, dtype, scale=1.0):
    cases.assert_close(got, np.asarray(want, np.float64), dtype, scale)


def smoothing_values(smoothing, classes):
    return {"keep": 1.0 - smoothing, "spread": smoothing / classes}


OPTIONS = [
    pytest.param(soft, smoothing, weighted, reduction, id="-".join(filter(None, name)))
    for soft, smoothing, weighted, reduction in itertools.product(
        (False, True), (0.0, 0.125), (False, True), cases.REDUCTIONS
    )
    for name in [
        ("soft" * soft, "smooth" * (smoothing > 0), "weighted" * weighted, reduction),
    ]
]
# One count for each kind of partition, whole and not.
LOSS_COUNTS = {"f4": [1, 3, 33, 128, 1001, 1040, 16390], "f8": [3, 100, 513], "half": [9, 1001]}


def loss_case(dtype, classes, soft, weighted, axis=1):
    """(x, labels, reference's labels, weight): rows with an ignored label among them."""
    rows = 5 if classes > 10000 else 13
    x = placed(cases.logits((rows, classes), dtype, scale=4.0), 1)
    weight = cases.class_weights(classes, np.float32) if weighted else None
    if soft:
        return x, cases.probabilities((rows, classes), 1, np.float32), weight
    labels = cases.class_labels(rows, classes, np.int64)
    labels[0] = np.argmax(x[0])
    labels[2] = -100
    return x, labels, weight


@pytest.mark.parametrize("soft, smoothing, weighted, reduction", OPTIONS)
@pytest.mark.parametrize(
    "dtype, classes",
    [
        pytest.param(dtype, classes, id=f"{dtype}-{classes}")
        for dtype in cases.FLOATS
        for classes in LOSS_COUNTS[family(dtype)]
    ],
)
def test_cross_entropy(dtype, classes, soft, smoothing, weighted, reduction):
    """Forward with lse, both backwards, value_and_grad."""
    x, labels, weight = loss_case(dtype, classes, soft, weighted)
    options = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    want = reference.cross_entropy(x, labels, work=WORK, **options)
    targets = {"y" if soft else "labels": labels, "weight": weight}
    call = {"soft": soft, "smooth": smoothing > 0, "reduction": reduction}
    call |= smoothing_values(smoothing, classes)
    if not soft:
        call |= {"ignores": True, "ignore_index": -100}
    result = cases.loss_type(dtype)
    lse = np.empty(len(x))
    loss = np.full(len(x) if reduction == "none" else (), 7, result)
    run("cross_entropy", {"x": x, "loss": loss, "row_lse": lse, **targets}, 1, **call)
    close(loss, want, result)
    want_lse = reference.logsumexp(x, work=WORK)
    assert accuracy.errors(lse, want_lse, float64, np.maximum(abs(want_lse), 1)).max() <= (
        1.0 if dtype == float64 else 2.0**27
    )

    g = cases.generator(3).normal(0, 1, len(x) if reduction == "none" else ()).astype(np.float32)
    want = reference.cross_entropy_backward(g, x, labels, work=WORK, **options)
    out = empty_like(x)
    scale = g.reshape(-1) if reduction == "none" else np.broadcast_to(g, len(x))
    arrays = {"x": x, "out": out, "row_scale": scale, **targets}
    run("cross_entropy", arrays, 1, **call)
    close(out, want, dtype)
    out[...] = 7
    run("cross_entropy", {**arrays, "row_lse": lse}, 1, given=True, **call)
    close(out, want, dtype)

    ones = np.ones(len(x)) if reduction == "none" else np.float64(1)
    want_grad = reference.cross_entropy_backward(ones, x, labels, work=WORK, **options)
    loss[...], out = 7, empty_like(x)
    run("cross_entropy", {"x": x, "out": out, "loss": loss, **targets}, 1, **call)
    close(loss, reference.cross_entropy(x, labels, work=WORK, **options), result)
    close(out, want_grad, dtype)
