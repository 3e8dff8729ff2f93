"""A row's result depends on that row alone: the same bits in any company and on any way.

Here our own results are compared with each other; that they are right is for the other tests.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import pytest

import numbakern
from tests import cases
from tests.cases import bfloat16, float16, float32, float64, misaligned, same_bits

# All lengths of a vector and its tail, the seams of larger steps, rows of several blocks.
LENGTHS = [*range(1, 41), *range(63, 67), *range(127, 131), *range(255, 259), 1000]
LONG = [4095, 4096, 4097, 5000, 20000, 70000]
FEW_LENGTHS = [1, 2, 3, 5, 8, 13, 16, 17, 21, 33, 64, 130, 257, 1000]


def results(x, labels, axis=-1):
    """Everything that is computed row by row, each with the class axis last."""
    last = lambda a: np.moveaxis(a, axis, -1)  # noqa: E731
    classes = x.shape[axis]
    weight = cases.class_weights(classes, x.dtype)
    g = np.full(labels.shape, 0.75, x.dtype)
    logp, p = numbakern.log_softmax(x, axis), numbakern.softmax(x, axis)
    upstream = np.sin(last(x).astype(np.float64)).astype(x.dtype)  # made of the row as well
    upstream = np.moveaxis(upstream, -1, axis)
    none = {"reduction": "none", "axis": axis}
    loss, lse = numbakern.cross_entropy(x, labels, return_lse=True, **none)
    smooth, smooth_grad = numbakern.cross_entropy_value_and_grad(
        x, labels, weight=weight, label_smoothing=0.1, **none
    )
    fused, fused_grad = numbakern.cross_entropy_value_and_grad(x, labels, **none)
    return {
        "log_softmax": last(logp),
        "softmax": last(p),
        "logsumexp": numbakern.logsumexp(x, axis),
        "log_softmax_backward": last(numbakern.log_softmax_backward(upstream, logp, axis)),
        "softmax_backward": last(numbakern.softmax_backward(upstream, p, axis)),
        "nll_loss": numbakern.nll_loss(logp, labels, weight=weight, **none),
        "nll_loss_backward": last(
            numbakern.nll_loss_backward(g, logp, labels, weight=weight, **none)
        ),
        "cross_entropy": loss,
        "lse": lse,
        "cross_entropy_backward": last(numbakern.cross_entropy_backward(g, x, labels, **none)),
        "by_lse": last(numbakern.cross_entropy_backward(g, x, labels, lse=lse, **none)),
        "fused": fused,
        "fused_grad": last(fused_grad),
        "smooth": smooth,
        "smooth_grad": last(smooth_grad),
    }


def assert_same(one, other, what=""):
    different = [name for name in one if not same_bits(one[name], other[name])]
    assert not different, f"{what}: {different}"


def rows_and_labels(rows, classes, dtype=float32):
    return cases.logits((rows, classes), dtype, scale=4.0), cases.class_labels(rows, classes)


def company(x, labels, position, before=7, after=30):
    """The row in a larger batch of other rows."""
    classes = x.shape[-1]
    many = cases.logits((before + after, classes), x.dtype, scale=30.0, seed=77)
    many_labels = cases.class_labels(before + after, classes, seed=78)
    many[position], many_labels[position] = x, labels
    return many, many_labels


# --- batch and position --------------------------------------------------------------------------


@cases.dtypes(float16, float32, float64)
def test_the_order_in_which_axes_are_named(dtype):
    x = cases.logits((7, 40, 6, 30), dtype, scale=4.0)
    for function in numbakern.log_softmax, numbakern.softmax, numbakern.logsumexp:
        for one, other in ((1, 3), (3, 1)), ((0, 2, 3), (-1, 0, -2)), (None, (2, 0, 3, 1)):
            assert same_bits(function(x, one), function(x, other))


@cases.dtypes(float32, float64)
@pytest.mark.parametrize("classes", LENGTHS + LONG)
def test_alone_or_in_company(classes, dtype):
    x, labels = rows_and_labels(1, classes, dtype)
    alone = results(x, labels)
    position = classes % 37
    many = results(*company(x[0], labels[0], position))
    assert_same(alone, {name: value[position : position + 1] for name, value in many.items()})


@cases.dtypes(bfloat16, slow=[float16])
@pytest.mark.parametrize("classes", FEW_LENGTHS + [4097, 20000])
def test_alone_or_in_company_halves(classes, dtype):
    x, labels = rows_and_labels(1, classes, dtype)
    alone = results(x, labels)
    many = results(*company(x[0], labels[0], 11))
    assert_same(alone, {name: value[11:12] for name, value in many.items()})


@cases.dtypes(float32, float64)
@pytest.mark.parametrize("classes", [1, 2, 3, 8, 10, 16, 21, 33, 64, 100, 1000])
def test_few_rows_or_so_many_that_threads_share_them(classes, dtype):
    few, labels = rows_and_labels(5, classes, dtype)
    repeat = 500_000 // (5 * classes)
    # Not a whole number of any vector or chunk: the same row meets every position.
    x, many_labels = np.tile(few, (repeat, 1))[1:-1], np.tile(labels, repeat)[1:-1]
    want = results(few, labels)
    got = results(np.ascontiguousarray(x), many_labels)
    for name, value in got.items():
        for row in range(5):
            first = (row - 1) % 5
            same = value[first::5]
            assert same_bits(np.ascontiguousarray(same), np.resize(want[name][row], same.shape)), (
                name,
                row,
            )


# --- layout and alignment ------------------------------------------------------------------------

LAYOUTS = [
    "fortran",
    "reversed_all",
    "reversed_last",
    "every_other_last",
    "padded_rows",
    "misaligned",
    "byte_swapped",
    "record_field",
]


@cases.zoo(LAYOUTS)
@pytest.mark.parametrize("classes", [*FEW_LENGTHS, 5000])
@cases.dtypes(float32, slow=[float64])
def test_memory_layout(classes, layout, dtype):
    x, labels = rows_and_labels(9, classes, dtype)
    want = results(x, labels)
    assert_same(want, results(layout(x), labels))


@pytest.mark.parametrize("classes", [*LENGTHS, 4097, 20000])
@cases.dtypes(float32, slow=[float64])
def test_the_class_axis_first(classes, dtype):
    """Vectors run along the other axis there: other code, the same sums in the same order."""
    x, labels = rows_and_labels(19, classes, dtype)
    want = results(x, labels)
    assert_same(want, results(np.ascontiguousarray(x.T), labels, axis=0))


@pytest.mark.parametrize("classes", [*FEW_LENGTHS, 4097])
@cases.dtypes(bfloat16, slow=[float16])
def test_the_class_axis_first_halves(classes, dtype):
    x, labels = rows_and_labels(19, classes, dtype)
    want = results(x, labels)
    assert_same(want, results(np.ascontiguousarray(x.T), labels, axis=0))


@pytest.mark.parametrize("columns", [1, 2, 3, 8, 15, 16, 17, 33, 100, 300])
@pytest.mark.parametrize("classes", [3, 21, 130])
def test_the_class_axis_in_the_middle(classes, columns):
    x, labels = rows_and_labels(3 * columns, classes)
    want = results(x, labels)
    middle = np.ascontiguousarray(x.reshape(3, columns, classes).swapaxes(1, 2))
    got = results(middle, labels.reshape(3, columns), axis=1)
    got = {name: value.reshape(want[name].shape) for name, value in got.items()}
    assert_same(want, got)


@pytest.mark.parametrize("shift", [4, 8, 12, 28, 60, 1, 2, 3])
@pytest.mark.parametrize("classes", [10, 33, 1000, 5000])
def test_alignment(classes, shift):
    x, labels = rows_and_labels(6, classes)
    raw = np.zeros(x.nbytes + 64, np.uint8)
    shifted = raw[shift : shift + x.nbytes].view(float32).reshape(x.shape)
    shifted[...] = x
    assert_same(results(x, labels), results(shifted, labels))
    out = misaligned(np.zeros_like(x))
    numbakern.log_softmax(shifted, out=out)
    assert same_bits(out, numbakern.log_softmax(x))


@pytest.mark.parametrize("classes", FEW_LENGTHS)
@cases.dtypes(float32, bfloat16)
def test_out_of_any_layout_and_in_place(classes, dtype):
    x, labels = rows_and_labels(9, classes, dtype)
    want, want_grad = numbakern.log_softmax(x), numbakern.cross_entropy_value_and_grad(x, labels)[1]
    for name, layout in cases.OUT_ZOO.items():
        out = layout(np.zeros_like(x))
        assert same_bits(numbakern.log_softmax(x, out=out), want), name
        numbakern.cross_entropy_value_and_grad(x, labels, out=out)
        assert same_bits(out, want_grad), name
        inplace = layout(x.copy())  # contiguous ones would come back as they are
        assert same_bits(numbakern.log_softmax(inplace, out=inplace), want), name


def test_an_output_far_larger_than_the_cache():
    """Non-temporal stores write the same numbers."""
    row, _ = rows_and_labels(1, 8192)
    out = numbakern.log_softmax(np.broadcast_to(row, (4096, 8192)))  # 128 MiB
    want = numbakern.log_softmax(row)[0]
    assert np.all(out.view(np.uint32) == want.view(np.uint32))


def everything_into(out, x, labels, axis=-1):
    """What each function that takes `out` leaves there."""
    logp = numbakern.log_softmax(x, axis)
    g, rows = cases.logits(x.shape, x.dtype, seed=5), np.ones(labels.shape, x.dtype)
    q, none = cases.probabilities(x.shape, axis, x.dtype), {"reduction": "none", "axis": axis}
    lse = numbakern.logsumexp(x, axis)
    calls = {
        "log_softmax": lambda: numbakern.log_softmax(x, axis, out=out),
        "softmax": lambda: numbakern.softmax(x, axis, out=out),
        "log_softmax_backward": lambda: numbakern.log_softmax_backward(g, logp, axis, out=out),
        "softmax_backward": lambda: numbakern.softmax_backward(g, q, axis, out=out),
        "fused": lambda: numbakern.cross_entropy_value_and_grad(x, labels, out=out, **none),
        "soft": lambda: numbakern.cross_entropy_value_and_grad(x, q, out=out, **none),
        "by_lse": lambda: numbakern.cross_entropy_backward(
            rows, x, labels, lse=lse, out=out, **none
        ),
        "nll": lambda: numbakern.nll_loss_backward(rows, logp, labels, out=out, **none),
    }
    for call in calls.values():
        call()
        yield out.copy()
    given = x
    for name in ("log_softmax", "fused", "soft", "by_lse"):
        out[...] = given
        x = out  # in place: the calls take x as it is now
        calls[name]()
        yield out.copy()


@pytest.mark.parametrize("classes", [*FEW_LENGTHS, 9, 31, 40, 90, 241, 300, 5000, 70000])
@cases.dtypes(float32, bfloat16, slow=(float16, float64))
def test_past_the_caches(classes, dtype, monkeypatch):
    """Small outputs written as the large ones are, from any address: the same, and nothing else."""
    rows = 75 if classes <= 1000 else 3
    x, labels = rows_and_labels(rows, classes, dtype)
    labels[:: max(1, rows // 3)] = 0, classes - 1, classes // 2
    assert_same_past_the_caches(monkeypatch, x, labels, 1)
    assert_same_past_the_caches(monkeypatch, np.ascontiguousarray(x.T), labels, 0)


@pytest.mark.parametrize("length", [9, 127, 144, 331, 1024, 1500, 2111])
@pytest.mark.parametrize("classes", [5, 21])
@cases.dtypes(float32, bfloat16, slow=(float16, float64))
def test_columns_past_the_caches(classes, length, dtype, monkeypatch):
    """Classes that begin with a line, and classes that begin anywhere in one."""
    x = cases.logits((3, classes, length), dtype)
    labels = cases.class_labels((3, length), classes)
    for end in (length, length // 2 + 1):
        assert_same_past_the_caches(monkeypatch, x[:, :, :end], labels[:, :end], 1)


def assert_same_past_the_caches(monkeypatch, x, labels, axis):
    """All results do not depend on how they are written, from any address; nothing else changes."""
    from numbakern.cpu import launch

    want = list(everything_into(np.empty(x.shape, x.dtype), x, labels, axis))
    with monkeypatch.context() as patch:
        patch.setattr(launch, "STREAM_BYTES", -1)
        patch.setattr(launch, "SHORTEST_STREAMED", 0)
        patch.setattr(launch, "plan", functools.cache(launch.plan.__wrapped__))
        for shift in (0, x.itemsize, 16, 32, 64 - x.itemsize, 1):
            raw = np.full(x.nbytes + 256, 0xA5, np.uint8)
            first = -raw.ctypes.data % 64 + 64 + shift
            out = raw[first : first + x.nbytes].view(x.dtype).reshape(x.shape)
            for one, other in zip(want, everything_into(out, x, labels, axis), strict=True):
                assert same_bits(one, other), shift
            rest = np.concatenate([raw[:first], raw[first + x.nbytes :]])
            assert np.all(rest == 0xA5)


@cases.dtypes(*cases.INTEGERS)
def test_labels_of_every_type(dtype):
    x, labels = rows_and_labels(9, 21)
    want = results(x, labels)
    assert_same(want, results(x, labels.astype(dtype)))


# --- threads -------------------------------------------------------------------------------------

SCRIPT = """
    import sys
    import numba
    from tests.test_reproducibility import by_threads
    numba.set_num_threads(int(sys.argv[1]))
    print(by_threads())
"""


def by_threads():
    """A digest of all results, with the reductions over rows, of large and small problems."""
    digest = hashlib.sha256()
    for rows, classes, dtype in [
        (5, 10, float32),
        (4001, 33, float32),
        (60001, 3, float32),
        (301, 1000, float64),
        (33, 20000, float32),
        (3, 70000, float64),
        (700, 257, bfloat16),
    ]:
        x, labels = rows_and_labels(rows, classes, dtype)
        for axis, a in [(-1, x), (0, np.ascontiguousarray(x.T))]:
            for value in results(a, labels, axis).values():
                digest.update(np.ascontiguousarray(value).tobytes())
            for reduction in ("mean", "sum"):
                options = {"reduction": reduction, "axis": axis}
                weight = cases.class_weights(classes, dtype)
                for w in (None, weight):
                    loss, grad = numbakern.cross_entropy_value_and_grad(
                        a, labels, weight=w, **options
                    )
                    digest.update(loss.tobytes() + np.ascontiguousarray(grad).tobytes())
                    loss = numbakern.cross_entropy(a, labels, weight=w, **options)
                    digest.update(loss.tobytes())
                    loss = numbakern.nll_loss(a, labels, weight=w, **options)
                    digest.update(loss.tobytes())
    return digest.hexdigest()


def test_any_number_of_threads(python):
    # The first process may have all kernels to compile, by itself.
    digests = {
        f"{count} of {most}": python(SCRIPT, str(count), timeout=300, NUMBA_NUM_THREADS=most)
        for count, most in [(1, "1"), (1, "2"), (2, "2"), (3, "3")]
    }
    assert len({done.stdout for done in digests.values()}) == 1, {
        name: done.stdout for name, done in digests.items()
    }


def test_the_mean_is_that_of_the_rows_in_their_order():
    """Repeated calls agree; the same rows in the class-axis-first layout have the same mean."""
    x, labels = rows_and_labels(10_001, 21)
    for reduction in ("mean", "sum"):
        want = numbakern.cross_entropy(x, labels, reduction=reduction)
        for _ in range(3):
            assert same_bits(numbakern.cross_entropy(x, labels, reduction=reduction), want)
        turned = np.ascontiguousarray(x.T)
        got = numbakern.cross_entropy(turned, labels, reduction=reduction, axis=0)
        assert same_bits(got, want)
