"""Start-up and the cache on disk: cheap to import, quick the second time, never stale or fatal."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import numbakern

CALL = """
import time
import numpy as np
import numbakern
x = np.array([[0.0, 1.0], [3.0, 3.0]], np.float32)
import numba  # not what is measured
start = time.process_time()
y = numbakern.log_softmax(x)
print(time.process_time() - start)
print(y.tolist())
"""

TWO_KERNELS = CALL + "print(numbakern.cross_entropy_value_and_grad(x, [0, 1])[1].tolist())\n"


def answer(done):
    return done.stdout.splitlines()[1:]


def seconds(done):
    return float(done.stdout.splitlines()[0])


# --- import --------------------------------------------------------------------------------------


def test_import_brings_in_nothing_heavy(python):
    done = python(
        """
        import sys
        import numbakern
        heavy = {"numba", "llvmlite", "numba_cuda", "cupy", "torch", "jax", "scipy", "cuda"}
        print(sorted(heavy & set(sys.modules)))
        """
    )
    assert done.stdout.strip() == "[]"


def test_import_costs_at_most_60_ms_beyond_numpy(python):
    script = """
        import time
        import numpy
        start = time.process_time()
        import numbakern
        print(time.process_time() - start)
        """
    python(script)  # writes the bytecode
    # CPU time, and the least of several: a neighbour, another test among them, adds little to it.
    assert min(float(python(script).stdout) for _ in range(7)) <= 0.060


def test_a_refused_call_needs_no_compiler(python):
    """Arguments are checked before Numba is even imported."""
    done = python(
        """
        import sys
        import numpy as np
        import numbakern
        try:
            numbakern.log_softmax(np.zeros((2, 3), complex))
        except TypeError:
            print("numba" in sys.modules)
        """
    )
    assert done.stdout.strip() == "False"


# --- the cache -----------------------------------------------------------------------------------


def contents(folder):
    return {p: p.stat().st_mtime_ns for p in Path(folder).rglob("*") if p.is_file()}


def test_a_second_process_compiles_nothing(python, tmp_path):
    cache = tmp_path / "cache"
    cold = python(TWO_KERNELS, NUMBA_CACHE_DIR=str(cache))
    files = contents(cache)
    assert files
    warm = [python(TWO_KERNELS, NUMBA_CACHE_DIR=str(cache)) for _ in range(5)]
    assert contents(cache) == files
    assert all(answer(done) == answer(cold) for done in warm)
    best = min(seconds(done) for done in warm)
    assert best < 0.5 * seconds(cold)
    assert best < 0.5


def test_what_is_cached_needs_no_compiler(python, tmp_path):
    """Loading a kernel leaves Numba's registries alone; compiling after it still finds them."""
    script = (
        TWO_KERNELS
        + """
import sys
print("numba.np.linalg" in sys.modules)
column = numba.njit(lambda a: np.log(a).sum())
print(column(np.ones((2, 3))), numbakern.softmax(np.zeros((1, 2))).tolist())
"""
    )
    cache = str(tmp_path / "cache")
    python(TWO_KERNELS, NUMBA_CACHE_DIR=cache)
    done = python(script, NUMBA_CACHE_DIR=cache)
    assert done.stdout.splitlines()[-2:] == ["False", "0.0 [[0.5, 0.5]]"]


def test_two_processes_fill_one_cache(python, tmp_path):
    cache = str(tmp_path / "cache")
    both = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", TWO_KERNELS],
            env=python.environment(NUMBA_CACHE_DIR=cache),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert [err for _, err in outputs] == ["", ""]
    assert outputs[0][0].splitlines()[1:] == outputs[1][0].splitlines()[1:]


def bad_places(tmp_path):
    """Environments in which the cache cannot be written, by anybody."""
    file = tmp_path / "file"
    file.write_text("no folder")
    nowhere = "/proc/nowhere" if os.path.isdir("/proc") else str(file / "nowhere")
    homeless = {"NUMBA_CACHE_DIR": None, "XDG_CACHE_HOME": None}
    return {
        "a file": {"NUMBA_CACHE_DIR": str(file)},
        "below a file": {"NUMBA_CACHE_DIR": str(file / "deeper")},
        "cannot be made": {"NUMBA_CACHE_DIR": nowhere},
        "home is nowhere": {**homeless, "HOME": nowhere},
        "home is a file": {**homeless, "HOME": str(file)},
        "cache home is a file": {"NUMBA_CACHE_DIR": None, "XDG_CACHE_HOME": str(file)},
        "home is unset": {**homeless, "HOME": None},
        "home is empty": {**homeless, "HOME": ""},
    }


BAD_PLACES = [
    "a file",
    "cannot be made",
    "home is nowhere",
    "home is unset",
    *(
        pytest.param(place, marks=pytest.mark.slow)
        for place in ("below a file", "home is a file", "cache home is a file", "home is empty")
    ),
]


@pytest.mark.parametrize("place", BAD_PLACES)
def test_a_cache_that_cannot_be_written(python, tmp_path, place):
    done = python(CALL, options=("-W", "error"), **bad_places(tmp_path)[place])
    assert done.stderr == ""
    assert answer(done) == answer(python(CALL))


def test_a_relative_cache_home_is_none(python, tmp_path):
    """As the specification of XDG's folders says."""
    home, script = tmp_path / "home", CALL + "print(*sorted(os.listdir()))\n"
    home.mkdir()
    settings = {"NUMBA_CACHE_DIR": None, "HOME": str(home), "XDG_CACHE_HOME": "here"}
    done = python("import os\n" + script, **settings)
    assert done.stdout.splitlines()[-1] == ""
    assert contents(home / ".cache" / "numbakern")


# --- settings of Numba ---------------------------------------------------------------------------


def test_nothing_to_compile_with(python, tmp_path):
    script = """
        import numpy as np
        import numbakern
        try:
            numbakern.log_softmax(np.zeros((3, 4), np.float32))
        except RuntimeError as error:
            print(error)
        """
    warm = str(tmp_path / "warm")
    python(CALL, NUMBA_CACHE_DIR=warm)
    for cache in (str(tmp_path / "cold"), warm):
        done = python(script, NUMBA_DISABLE_JIT="1", NUMBA_CACHE_DIR=cache)
        assert done.stdout.strip() == (
            "NUMBA_DISABLE_JIT: expected 0, for kernels have to be compiled, got 1"
        )


def test_kernels_that_are_to_be_debugged(python, tmp_path):
    script = CALL + "print(numbakern.cross_entropy(np.ones((2, 99), np.float32), [0, 1]))\n"
    plain = python(script)
    cache = str(tmp_path / "debugged")
    done = python(script, options=("-W", "ignore"), NUMBA_DEBUGINFO="1", NUMBA_CACHE_DIR=cache)
    assert answer(done) == answer(plain)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_the_collector_of_a_process_forked_from_one_that_compiles(python, tmp_path):
    script = """
        import gc, os, threading, time
        import numpy as np
        import numbakern
        x = np.zeros((3, 4), np.float32)
        at_work = threading.Thread(target=numbakern.log_softmax, args=(x,))
        at_work.start()
        while gc.isenabled() and at_work.is_alive():
            time.sleep(0.001)
        assert not gc.isenabled(), "it compiled too fast to be watched"
        pid = os.fork()
        if pid == 0:
            os._exit(0 if gc.isenabled() else 9)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        at_work.join()
        print(gc.isenabled())
        """
    done = python(script, options=("-W", "ignore"), NUMBA_CACHE_DIR=str(tmp_path / "none"))
    assert done.stdout.split() == ["0", "True"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_cache_folder(python, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o555)
    done = python(CALL, options=("-W", "error"), NUMBA_CACHE_DIR=str(cache))
    assert done.stderr == ""
    assert answer(done) == answer(python(CALL))


def spoil_empty(data):
    return b""


def spoil_half(data):
    return data[: len(data) // 2]


def spoil_garbage(data):
    return b"\x00garbage\xff" * 10


def spoil_middle(data):
    middle = len(data) // 2
    return data[:middle] + bytes(b ^ 0xFF for b in data[middle : middle + 64]) + data[middle + 64 :]


SPOILT = [
    pytest.param(spoil_empty, slice(None), id="all empty"),
    pytest.param(spoil_half, slice(-1, None), id="last cut in half"),
    pytest.param(spoil_middle, slice(None), id="all flipped in the middle"),
    pytest.param(spoil_empty, slice(1), id="first empty", marks=pytest.mark.slow),
    pytest.param(spoil_half, slice(None), id="all cut in half", marks=pytest.mark.slow),
    pytest.param(spoil_garbage, slice(None), id="all garbage", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("spoil", "which"), SPOILT)
def test_spoilt_cache_files_do_no_harm(python, tmp_path, spoil, which):
    """A full disk, a crash or a bad sector: such a file counts as absent and is written anew."""
    cache = tmp_path / "cache"
    want = answer(python(CALL, NUMBA_CACHE_DIR=str(cache)))
    spoilt = sorted(contents(cache))[which]
    assert spoilt
    for path in spoilt:
        path.write_bytes(spoil(path.read_bytes()))
    for _ in range(2):  # the second finds what the first left
        done = python(CALL, options=("-W", "error"), NUMBA_CACHE_DIR=str(cache))
        assert done.stderr == ""
        assert answer(done) == want


# --- stale code ----------------------------------------------------------------------------------


def test_an_edited_helper_never_serves_stale_code(python, tmp_path):
    """Numba's own index looks at the kernel's file only; the formula stands in another."""
    shutil.copytree(
        Path(numbakern.__file__).parent,
        tmp_path / "copy" / "numbakern",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    formulas = tmp_path / "copy" / "numbakern" / "formulas.py"
    environment = {
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": str(tmp_path / "copy"),
    }
    script = (
        "import numpy as np, numbakern; print(numbakern.__file__);"
        "print(numbakern.log_softmax(np.array([[0.0, 1.0]], np.float32)).tolist())"
    )

    def result():
        where, value = python(script, **environment).stdout.splitlines()
        assert Path(where).parent == formulas.parent
        return value

    original = formulas.read_text()
    edited = original.replace("return (x - m) - log_sum", "return x - m")
    assert edited != original

    before = result()
    assert result() == before  # from the cache
    files = contents(tmp_path / "cache")
    assert files

    # The cache is full of the old code. (Python's own bytecode looks at the time stamp.)
    stamps = formulas.stat()
    formulas.write_text(edited)
    os.utime(formulas, ns=(stamps.st_atime_ns, stamps.st_mtime_ns + 1_000_000_000))
    assert result() == "[[-1.0, 0.0]]"

    formulas.write_text(original)
    os.utime(formulas, ns=(stamps.st_atime_ns, stamps.st_mtime_ns + 2_000_000_000))
    assert result() == before
