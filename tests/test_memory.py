"""Peak memory: the output and nothing else; of losses, some numbers a row."""

from __future__ import annotations

import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read as Linux has it")

# 128 MiB of input; the same call on an eighth of it has brought in code and threads before.
SCRIPT = """
import resource, sys
import ml_dtypes
import numpy as np
import numbakern as nk

case, dtype = sys.argv[1:]
dtype = np.dtype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16)
classes = 4096
rows = 2**27 // dtype.itemsize // classes

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def call(x, out, labels):
    if case == "log_softmax":
        nk.log_softmax(x, out=out)
    elif case == "log_softmax in place":
        nk.log_softmax(x, out=x)
    elif case == "log_softmax by columns":
        nk.log_softmax(x, 0, out=out)
    elif case == "log_softmax every other":
        nk.log_softmax(x[:, ::2], out=out[:, ::2])
    elif case == "log_softmax cast":
        nk.log_softmax(x[: len(x) // 2], dtype=np.float64, out=out)
    elif case == "log_softmax_backward":
        nk.log_softmax_backward(x, out, out=out)
    elif case == "cross_entropy":
        nk.cross_entropy(x, labels)
    elif case == "value_and_grad":
        nk.cross_entropy_value_and_grad(x, labels, label_smoothing=0.1, out=x)
    elif case == "class axis in the middle":
        shape = (len(x) // 64, 64, classes)
        nk.cross_entropy_value_and_grad(
            x.reshape(shape), np.zeros((shape[0], classes), np.uint8), out=out.reshape(shape)
        )
    else:
        raise SystemExit(case)

def inputs(rows):
    x = np.ones((rows, classes), dtype)
    out = np.ones((rows, classes), dtype)
    if case == "log_softmax cast":
        out = np.ones((rows // 2, classes), np.float64)
    return x, out, np.zeros(rows, np.int32)

call(*inputs(rows // 8))
arrays = inputs(rows)
before = peak()
call(*arrays)
print(peak() - before)
"""

CASES = [
    "log_softmax",
    "log_softmax in place",
    "log_softmax by columns",
    "log_softmax every other",
    "log_softmax cast",
    "log_softmax_backward",
    "cross_entropy",
    "value_and_grad",
    "class axis in the middle",
]


IN_HALVES = ["log_softmax", "log_softmax by columns", "cross_entropy", "value_and_grad"]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, "float32") for case in CASES] + [(case, "bfloat16") for case in IN_HALVES],
)
def test_no_temporary_of_the_inputs_size(python, case, dtype):
    extra = int(python(SCRIPT, case, dtype).stdout)
    assert extra < 2**27 / 8  # a copy would be 128 MiB, of halves in float32 256 MiB


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages by mprotect")
def test_nothing_is_read_or_written_outside(python):
    """Arrays between pages that nobody may touch; the process ends by itself."""
    script = """
        import ctypes, mmap
        import numpy as np
        import numbakern

        libc = ctypes.CDLL(None, use_errno=True)
        page = mmap.PAGESIZE

        def fenced(shape, dtype, at_end):
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            inside = -(-size // page) * page
            memory = mmap.mmap(-1, inside + 2 * page)
            start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            for fence in (start, start + page + inside):
                assert libc.mprotect(ctypes.c_void_p(fence), page, 0) == 0
            offset = page + (inside - size if at_end else 0)
            keep.append(memory)
            return np.frombuffer(memory, dtype, int(np.prod(shape)), offset).reshape(shape)

        keep = []
        last = ((37, 10), (5, 300), (3, 5000))
        middle = ((2, 21, 33, 31), (2, 21, 64, 64), (3, 4, 5))
        first = ((10, 37), (300, 19), (5000, 18))
        shapes = [(s, -1) for s in last] + [(s, 1) for s in middle] + [(s, 0) for s in first]
        for shape, axis in shapes:
            for at_end in (False, True):
                x, out = fenced(shape, np.float32, at_end), fenced(shape, np.float32, at_end)
                x[...] = np.random.default_rng(0).standard_normal(shape)
                batch = tuple(np.delete(shape, axis))
                labels = fenced(batch, np.int64, at_end)
                labels[...] = np.arange(labels.size).reshape(batch) % shape[axis]
                numbakern.log_softmax(x, axis, out=out)
                assert np.allclose(np.exp(out.astype(float)).sum(axis), 1)
                loss, grad = numbakern.cross_entropy_value_and_grad(x, labels, axis=axis, out=out)
                assert np.allclose(grad.astype(float).sum(axis), 0, atol=1e-6)
        print("done")
        """
    assert python(script).stdout.strip() == "done"
