"""What the tests feed in, and how close the answer has to be: types, shapes, layouts, rows.

Sharp bounds in ulp belong to ``accuracy.py``. The tolerances here catch a wrong result of any
option, layout or type; they are tight enough for that and loose enough for ill-conditioned sums.
"""

from __future__ import annotations

import tempfile
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

bfloat16 = np.dtype(ml_dtypes.bfloat16)
float16, float32, float64 = (np.dtype(t) for t in (np.float16, np.float32, np.float64))

FLOATS = [float16, bfloat16, float32, float64]
SIGNED = [np.dtype(t) for t in (np.int8, np.int16, np.int32, np.int64)]
UNSIGNED = [np.dtype(t) for t in (np.uint8, np.uint16, np.uint32, np.uint64)]
INTEGERS = SIGNED + UNSIGNED
BOOL = np.dtype(bool)

REDUCTIONS = ["none", "sum", "mean"]


def loss_type(dtype):
    """The type of logsumexp and of a loss: halves give float32, integers float64."""
    dtype = np.dtype(dtype)
    if dtype in (float16, bfloat16, float32):
        return float32
    return float64


def output_type(dtype):
    """The type of log_softmax, softmax and gradients: the input's, float64 for integers."""
    dtype = np.dtype(dtype).newbyteorder("=")
    return dtype if dtype in FLOATS else float64


# --- tolerances ----------------------------------------------------------------------------------


class Tolerance(NamedTuple):
    relative: float
    absolute: float
    reason: str


TOLERANCE = {
    float64: Tolerance(
        1e-12, 1e-13, "the float64 reference errs as much; sums of 1000 that cancel"
    ),
    float32: Tolerance(4e-6, 1e-6, "30 ulp: rounding x - m costs up to |x - m|, sums that cancel"),
    float16: Tolerance(2**-10, 2**-14, "one ulp; below the smallest normal 0 is allowed"),
    bfloat16: Tolerance(2**-7, 1e-6, "one ulp; cancellation happens in float32"),
}


def assert_close(got, want, dtype, scale=1.0):
    """Values, NaN and infinities of ``got`` are those of ``want``, for a result of ``dtype``.

    ``scale`` is the size of the largest term where terms cancel.
    """
    tolerance = TOLERANCE[np.dtype(dtype)]
    got = np.asarray(got).astype(np.float64)
    want = np.asarray(want).astype(np.float64)
    assert got.shape == want.shape
    with np.errstate(over="ignore"):
        rounded = want.astype(dtype).astype(np.float64)
    want = np.where(np.isinf(rounded), rounded, want)  # beyond the range of the type
    np.testing.assert_allclose(
        got, want, rtol=tolerance.relative, atol=tolerance.absolute * scale, equal_nan=True
    )


def assert_result(got, want, dtype, scale=1.0):
    """As ``assert_close``, and ``got`` is of exactly ``dtype``, a NumPy scalar where 0-d."""
    dtype = np.dtype(dtype)
    want = np.asarray(want)
    assert got.dtype == dtype
    assert got.dtype.isnative
    assert got.shape == want.shape
    if want.ndim == 0:
        assert isinstance(got, np.generic)
    else:
        assert isinstance(got, np.ndarray)
    assert_close(got, want, dtype, scale)


def same_bits(a, b):
    """Equal to the last bit (a NaN equals a NaN: its payload is nobody's business)."""
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    nan = np.isnan(a.astype(np.float64))
    if not np.array_equal(nan, np.isnan(b.astype(np.float64))):
        return False
    bits = np.dtype(f"u{a.dtype.itemsize}")
    a, b = np.ascontiguousarray(a).reshape(-1), np.ascontiguousarray(b).reshape(-1)
    keep = ~nan.reshape(-1)
    return np.array_equal(a.view(bits)[keep], b.view(bits)[keep])


# --- values --------------------------------------------------------------------------------------


def generator(*seed):
    """Random numbers that depend on the case alone, not on the order of the tests."""
    return np.random.default_rng([*seed, 20240607])


def logits(shape, dtype=float32, scale=3.0, seed=0):
    """Ordinary logits: normal, or small whole numbers for an integer type."""
    rng, dtype = generator(seed), np.dtype(dtype)
    if dtype == BOOL:
        return rng.random(shape) < 0.5
    if dtype.kind in "iu":
        return rng.integers(0 if dtype.kind == "u" else -9, 10, shape).astype(dtype)
    return np.asarray(rng.normal(0.0, scale, shape)).astype(dtype)


def class_labels(shape, classes, dtype=np.int64, seed=1):
    return np.asarray(generator(seed).integers(0, classes, shape)).astype(dtype)


def class_weights(classes, dtype=float32, seed=2):
    return generator(seed).uniform(0.25, 2.0, classes).astype(dtype)


def probabilities(shape, axis, dtype=float32, seed=3):
    p = generator(seed).uniform(0.05, 1.0, shape)
    return (p / p.sum(axis=axis, keepdims=True)).astype(dtype)


# Class counts around the lengths at which vector code changes its path: one SIMD register, a few,
# whole and not, and rows of several blocks.
CLASS_COUNTS = [1, 2, 3, 7, 8, 9, 10, 15, 16, 17, 31, 33, 64, 100, 255, 257, 1000, 4097]

# (shape, axis): the class axis last, first, in the middle, with few and many columns behind it.
SHAPES_AND_AXES = [
    pytest.param(shape, axis, id=f"{'x'.join(map(str, shape))}-axis{axis}")
    for shape, axis in [
        ((7,), 0),
        ((1, 1), 1),
        ((5, 10), -1),
        ((5, 10), 0),
        ((33, 17), 1),
        ((33, 17), -2),
        ((2, 3, 5), 1),
        ((2, 21, 9, 11), 1),
        ((3, 4, 130), 1),
        ((4, 5, 6), -1),
        ((600, 3), -1),
        ((3, 600), 0),
        ((2, 3, 2, 3, 2, 4), 3),
    ]
]


# --- the array zoo -------------------------------------------------------------------------------
# Each keeper gets contiguous values and returns an array of another memory layout. Broadcasting
# ones return other values: compare with the reference of what they return.


def fortran(a):
    return np.asfortranarray(a)


def transposed(a):
    return np.ascontiguousarray(a.T).T


def reversed_all(a):
    return np.ascontiguousarray(np.flip(a))[tuple(slice(None, None, -1) for _ in a.shape)]


def reversed_last(a):
    return np.ascontiguousarray(a[..., ::-1])[..., ::-1]


def reversed_first(a):
    return np.ascontiguousarray(a[::-1])[::-1]


def every_other_last(a):
    wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
    wide[..., ::2] = a
    return wide[..., ::2]


def every_other_first(a):
    wide = np.zeros((2 * a.shape[0], *a.shape[1:]), a.dtype)
    wide[::2] = a
    return wide[::2]


def padded_rows(a):
    """A window of a larger array: rows are contiguous, at odd distances."""
    wide = np.zeros((*a.shape[:-1], a.shape[-1] + 3), a.dtype)
    wide[..., 2:-1] = a
    return wide[..., 2:-1]


def broadcast_first(a):
    return np.broadcast_to(a[:1], a.shape)


def broadcast_last(a):
    return np.broadcast_to(a[..., :1], a.shape)


def overlapping_rows(a):
    """Rows that share memory, as sliding_window_view makes them."""
    if a.ndim != 2 or a.size == 0:
        return a
    line = np.resize(a.reshape(-1), a.shape[0] + a.shape[1] - 1)
    return np.lib.stride_tricks.sliding_window_view(line, a.shape[1])


def read_only(a):
    a = np.ascontiguousarray(a).copy()
    a.flags.writeable = False
    return a


def memory_mapped(a):
    if a.size == 0:
        return a
    # The mapping keeps the pages when the name is gone.
    with tempfile.NamedTemporaryFile() as file:
        file.write(np.ascontiguousarray(a).tobytes())
        file.flush()
        return np.memmap(file.name, dtype=a.dtype, mode="r", shape=a.shape)


def byte_swapped(a):
    if a.dtype.kind == "V" or a.dtype.itemsize == 1 or a.dtype == bfloat16:
        return a  # no other byte order, or a type registered in the native one only
    return a.astype(a.dtype.newbyteorder(">" if np.little_endian else "<"))


def misaligned(a):
    raw = np.zeros(a.nbytes + 1, np.uint8)
    shifted = raw[1:].view(a.dtype).reshape(a.shape)
    shifted[...] = a
    assert a.dtype.itemsize == 1 or a.size == 0 or not shifted.flags.aligned
    return shifted


def record_field(a):
    """A field of a packed structure: a stride that is no multiple of the item."""
    packed = np.zeros(a.shape, np.dtype([("tag", np.uint8), ("value", a.dtype)]))
    packed["value"] = a
    return packed["value"]


ZOO = {
    keeper.__name__: keeper
    for keeper in [
        np.ascontiguousarray,
        fortran,
        transposed,
        reversed_all,
        reversed_last,
        reversed_first,
        every_other_last,
        every_other_first,
        padded_rows,
        broadcast_first,
        broadcast_last,
        overlapping_rows,
        read_only,
        memory_mapped,
        byte_swapped,
        misaligned,
        record_field,
    ]
}

# The layouts which can be written to: `out` may have any of them.
OUT_ZOO = {
    name: ZOO[name]
    for name in [
        "ascontiguousarray",
        "fortran",
        "reversed_all",
        "reversed_last",
        "every_other_last",
        "every_other_first",
        "padded_rows",
        "misaligned",
        "record_field",
    ]
}


def zoo(names=ZOO):
    """Parametrise ``layout`` over the zoo."""
    return pytest.mark.parametrize("layout", [pytest.param(ZOO[n], id=n) for n in names])


def dtypes(*types, slow=(), name="dtype"):
    """Run a test for these types, and for those in `slow` where -m asks for it."""
    marked = [(t, ()) for t in types] + [(t, pytest.mark.slow) for t in slow]
    params = [pytest.param(np.dtype(t), id=str(t), marks=marks) for t, marks in marked]
    return pytest.mark.parametrize(name, params)


def filled_like(layout, shape, dtype, value=7):
    """An ``out`` of this layout that holds ``value``: what is not written shows."""
    return layout(np.full(shape, value, dtype))
