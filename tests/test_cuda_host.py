"""The host side of the CUDA target, on a machine without a GPU.

Compiling and its cache; DLPack; which arrays are taken, from whose allocator results come and on
whose stream the work goes; what is refused; what a call costs against a driver that does nothing.
"""

from __future__ import annotations

import gc
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import numbakern
from numbakern import disk_cache
from numbakern.cuda import bad_labels, pool
from tests import on_device
from tests.test_errors import check

TESTS = Path(__file__).parent


def installed(*names):
    return all(importlib.util.find_spec(name) for name in names)


needs_numba_cuda = pytest.mark.skipif(
    not installed("numba_cuda"), reason="numba-cuda is not installed"
)
needs_cuda_core = pytest.mark.skipif(
    not (installed("cuda") and installed("cuda.core")), reason="cuda-core is not installed"
)


# --- compiling -----------------------------------------------------------------------------------

KERNEL = """
from numbakern.cuda import compile

def kernel(n, factor, m):
    i = cuda.grid(1)
    if i < n and helper(factor) == m:
        cuda.syncthreads()

cuda = compile.numba_cuda()

@cuda.jit(device=True)
def helper(x):
    return x * 2.0
"""


@needs_numba_cuda
def test_machine_code_without_a_driver(python):
    done = python(
        KERNEL
        + """
for arch in ("sm_80", "sm_90a", "sm_100a"):
    cubin = compile.compile_kernel(kernel, ("i8", "f8", "i8"), arch, 128)
    print(arch, cubin.code[:4] == b"\\x7fELF", "kernel" in cubin.entry)
"""
    )
    assert done.stdout.splitlines() == [f"{a} True True" for a in ("sm_80", "sm_90a", "sm_100a")]


@needs_numba_cuda
def test_a_numpy_without_row_stack(python):
    """NumPy 2.5 has none, and numba-cuda asks for it; NumPy is left as it was."""
    done = python(
        """
        import numpy
        del numpy.row_stack
        """.replace("        ", "")
        + KERNEL
        + """
print(len(compile.compile_kernel(kernel, ("i8", "f8", "i8"), "sm_90a").code) > 0)
print(hasattr(numpy, "row_stack"))
"""
    )
    assert done.stdout.split() == ["True", "False"]


@needs_numba_cuda
def test_numba_cuda_where_no_pth_file_is_read(python):
    """-S: no site-packages but by PYTHONPATH, and Numba's own CUDA target would be imported."""
    import numba

    site = str(Path(numba.__file__).parents[1])
    done = python(
        f"""
        import sys
        sys.path.append({site!r})
        from numbakern.cuda import compile
        print(compile.numba_cuda().implementation)
        """,
        options=("-S",),
    )
    assert done.stdout.strip() == "NVIDIA"


def test_the_architecture_of_a_device():
    from numbakern.cuda.compile import arch_of

    assert [arch_of(*c) for c in ((8, 0), (8, 9), (9, 0), (10, 3))] == [
        "sm_80", "sm_89", "sm_90a", "sm_103a",
    ]  # fmt: skip


# --- the disk cache ------------------------------------------------------------------------------


def test_an_entry_is_whole_or_not_there(tmp_path):
    disk_cache.write(tmp_path, "entry", b"content")
    assert disk_cache.read(tmp_path, "entry") == b"content"
    assert [p.name for p in tmp_path.iterdir()] == ["entry"]
    whole = (tmp_path / "entry").read_bytes()
    for damaged in (whole[:-1], whole[:10], b"", whole[:-1] + b"x"):
        (tmp_path / "entry").write_bytes(damaged)
        assert disk_cache.read(tmp_path, "entry") is None
    assert disk_cache.read(tmp_path, "absent") is None
    disk_cache.write(tmp_path / "no folder", "entry", b"content")  # no error


def test_a_folder_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    assert disk_cache.folder("numbakern") is None
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "new"))
    assert disk_cache.folder("numbakern") == str(tmp_path / "new" / "numbakern")


def test_the_fingerprint_is_that_of_the_sources(python, tmp_path):
    """One byte more in any file of the package makes another folder."""
    package = tmp_path / "numbakern"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(numbakern.__file__).parent, package, ignore=ignored)
    script = "from numbakern import disk_cache; print(disk_cache.fingerprint(('x', 1)))"

    def fingerprint():
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    before = fingerprint()
    assert fingerprint() == before
    with open(package / "formulas.py", "a", encoding="utf-8") as file:
        file.write("\n")
    assert fingerprint() != before


CACHED = """
import sys
from numbakern.cuda import compile, plan
spec = plan.plan(*{arguments}).steps[0].spec
cubin = compile.cubin(spec, "sm_90a", 128)
print(len(cubin.code), cubin.entry, "numba" in sys.modules, compile.cache_folder())
"""


# --- DLPack --------------------------------------------------------------------------------------


class Exported:
    """A NumPy array by way of the capsules of `pool`."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **_):
        a = self.array
        return pool.capsule(self, a.ctypes.data, a.shape, a.dtype, (1, 0))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "i8", "u2", "u8", "?"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)], ids=str)
def test_a_capsule_is_read_back(shape, dtype):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    before = len(pool._exported)
    back = np.from_dlpack(Exported(array))
    assert back.dtype == array.dtype and np.array_equal(back, array)
    assert array.size == 0 or np.shares_memory(back, array)
    assert len(pool._exported) == before + 1
    del back
    gc.collect()
    assert len(pool._exported) == before


def test_a_capsule_that_nobody_reads_lets_go():
    array = np.zeros(3)
    before = sys.getrefcount(array)
    capsule = Exported(array).__dlpack__()
    del capsule
    gc.collect()
    assert sys.getrefcount(array) == before


def test_a_bfloat16_capsule():
    torch = pytest.importorskip("torch")
    array = np.array([[1.5, -2.0]], ml_dtypes.bfloat16)
    tensor = torch.from_dlpack(Exported(array))
    assert tensor.dtype == torch.bfloat16 and tensor.tolist() == [[1.5, -2.0]]


# --- labels out of range -------------------------------------------------------------------------


def test_a_record_becomes_an_error():
    words = on_device.Words()
    report = bad_labels.Report(words)

    def told():
        raise report.take().error()

    assert report.take() is None
    first = report.address((4, 5), 10, -100)
    assert report.address((4, 5), 10, -100) == first
    second = report.address((), 3, 7)
    assert second != first
    words.array[(second - words.address) // 8] = (0 << bad_labels.BITS) | 12
    check(told, IndexError, "labels[]", "[0, 3)", "7", "12")
    assert report.take() is None  # told once
    value = -2 & ((1 << bad_labels.BITS) - 1)
    words.array[(first - words.address) // 8] = (13 << bad_labels.BITS) | value
    check(told, IndexError, "labels[2, 3]", "[0, 10)", "-2")
    for value, words_of_it in ((2**23 - 1, "8388607 or more"), (2**23, "-8388608 or less")):
        words.array[(first - words.address) // 8] = value
        check(told, IndexError, "labels[0, 0]", words_of_it)
