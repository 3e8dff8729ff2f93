"""Many threads at once, forks, thread counts: nothing aborts, hangs or differs.

Each test is a script in its own interpreter, under each threading layer that Numba can load.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest

LAYERS = ["workqueue", "omp", "tbb"]

PROBE = """
import numba
@numba.njit(parallel=True)
def f(n):
    s = 0
    for i in numba.prange(n):
        s += i
    return s
assert f(100) == 4950
print(numba.threading_layer())
"""


def layer_environment(layer):
    environment = {"NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "2"}
    if layer == "tbb":
        # Where pip puts libtbb.so, which the loader does not search by itself.
        folders = [os.path.join(sys.prefix, "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))
    return environment


@functools.cache
def loadable(layer):
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, **layer_environment(layer)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode == 0 and done.stdout.split() == [layer]


@pytest.fixture(params=LAYERS)
def layer(request):
    if not loadable(request.param):
        pytest.skip(f"Numba cannot load the threading layer {request.param}")
    return layer_environment(request.param)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

# What every script computes: a small problem, which one thread does, and a large one for all of
# them, in rows and in columns.
COMMON = """
import os, signal, sys, threading, time
import numpy as np
import numbakern as nk

rng = np.random.default_rng(5)
small = rng.normal(size=(8, 10)).astype(np.float32)
large = rng.normal(size=(700, 2000)).astype(np.float32)
small_labels, large_labels = rng.integers(0, 10, 8), rng.integers(0, 2000, 700)

def everything():
    results = []
    for x, labels in ((small, small_labels), (large, large_labels)):
        results.append(nk.log_softmax(x))
        results.append(nk.softmax(x, 0))
        results.append(nk.logsumexp(x))
        loss, grad = nk.cross_entropy_value_and_grad(x, labels)
        results += [loss, grad]
    return b"".join(r.tobytes() for r in results)

def in_child(function):
    '''Fork; the child leaves with status 0 if function() is true. Returns the status.'''
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(60)
            status = 0 if function() else 3
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return status
"""

FIRST_CALLS = (
    COMMON
    + """
results, errors = [None] * 8, []
barrier = threading.Barrier(8)

def work(i):
    try:
        barrier.wait()  # the first call of all threads, compilation and all, at the same time
        first = everything()
        for _ in range(5):
            assert everything() == first
        results[i] = first
    except BaseException as error:
        errors.append(error)

threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for t in threads: t.start()
for t in threads: t.join()
assert not errors, errors
assert len(set(results)) == 1
assert results[0] == everything()
import numba
assert numba.threading_layer() == sys.argv[1], numba.threading_layer()
"""
)


def test_eight_threads_and_their_first_calls(python, layer):
    python(FIRST_CALLS, layer["NUMBA_THREADING_LAYER"], **layer)


FORK_AFTER_USE = (
    COMMON
    + """
want = everything()
assert in_child(lambda: everything() == want) == 0
assert everything() == want  # the parent goes on
assert in_child(lambda: in_child(lambda: everything() == want) == 0) == 0  # a grandchild

def threads_in_child():
    results = []
    threads = [threading.Thread(target=lambda: results.append(everything())) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    return results == [want] * 4

assert in_child(threads_in_child) == 0
assert everything() == want
"""
)


@needs_fork
def test_fork_after_use(python, layer):
    python(FORK_AFTER_USE, **layer)


FORK_BEFORE_USE = (
    COMMON
    + """
digests = []
reader, writer = os.pipe()
def child():
    import hashlib
    os.write(writer, hashlib.sha256(everything()).digest())
    return True
assert in_child(child) == 0
import hashlib
assert os.read(reader, 32) == hashlib.sha256(everything()).digest()
"""
)


@needs_fork
def test_fork_before_use(python, layer):
    python(FORK_BEFORE_USE, **layer)


POOL = (
    COMMON
    + """
import multiprocessing

def digest(_):
    import hashlib
    return hashlib.sha256(everything()).hexdigest()

if __name__ == "__main__":
    want = digest(0)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(digest, range(6)).get(timeout=90) == [want] * 6
    assert digest(0) == want
"""
)


@needs_fork
def test_a_pool_of_forked_workers(python, layer):
    python(POOL, **layer)


SPAWNED = """
import multiprocessing

def takes_the_threads(queue):
    import numba
    numba.set_num_threads(2)  # starts them, before numbakern is imported
    from numbakern.cpu import threads
    queue.put(not threads._state.forked)

if __name__ == "__main__":
    for method, own in [("spawn", True), ("fork", False)]:
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        child = context.Process(target=takes_the_threads, args=(queue,))
        if method == "fork":
            import numba
            numba.set_num_threads(1)  # the child has none of these
        child.start()
        assert queue.get(timeout=60) == own, method
        child.join()
"""


@needs_fork
def test_a_spawned_worker_has_threads_of_its_own(python, layer, tmp_path):
    script = tmp_path / "script.py"  # a spawned process reads it again
    script.write_text(SPAWNED)
    python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')", **layer)


FORK_DURING_A_CALL = (
    COMMON
    + """
want = everything()
stop = False
def busy():
    out = np.empty_like(large)
    while not stop:
        nk.log_softmax(large, out=out)

threads = [threading.Thread(target=busy) for _ in range(2)]
for t in threads: t.start()
try:
    for _ in range(8):
        time.sleep(0.02)
        status = in_child(lambda: everything() == want)
        assert status == 0, status
finally:
    stop = True
    for t in threads: t.join()
assert everything() == want
"""
)


@needs_fork
def test_fork_while_another_thread_is_inside_a_call(python, layer):
    python(FORK_DURING_A_CALL, **layer)


CALLERS_THREADS = (
    COMMON
    + """
import numba
most = numba.get_num_threads()
want = everything()
assert numba.get_num_threads() == most
numba.set_num_threads(1)
assert everything() == want
assert numba.get_num_threads() == 1

# The number belongs to the thread that set it.
seen = []
def other():
    numba.set_num_threads(most)
    seen.append(everything() == want and numba.get_num_threads() == most)
t = threading.Thread(target=other)
t.start(); t.join()
assert seen == [True]
assert numba.get_num_threads() == 1

# Nor does an error change it.
try:
    nk.cross_entropy(small, small_labels + 100)
except IndexError:
    pass
assert numba.get_num_threads() == 1
"""
)


def test_the_callers_number_of_threads_is_left_alone(python, layer):
    python(CALLERS_THREADS, **layer)


THE_CALLERS_OWN_KERNELS = (
    COMMON
    + """
import numba

@numba.njit(parallel=True)
def theirs(x):
    total = 0.0
    for i in numba.prange(x.shape[0]):
        total += x[i].sum()
    return total

want = everything()
for _ in range(20):
    theirs(large)
    assert everything() == want
"""
)


def test_beside_kernels_of_the_caller(python, layer):
    python(THE_CALLERS_OWN_KERNELS, **layer)


def test_one_thread_only(python, layer):
    one = {**layer, "NUMBA_NUM_THREADS": "1"}
    digest = COMMON + "import hashlib; print(hashlib.sha256(everything()).hexdigest())"
    assert python(digest, **one).stdout == python(digest, **layer).stdout
    python(FIRST_CALLS.rpartition("import numba\n")[0], **one)


RELEASED = (
    COMMON
    + """
import numba
sys.setswitchinterval(1e-4)
numba.set_num_threads(1)  # a core is left for the thread that watches
big = np.zeros((2000, 8000))
out = np.empty_like(big)
nk.log_softmax(big[:2], out=out[:2])
nk.log_softmax(big, out=out)

best = 1.0
for _ in range(10):
    span = []
    def call():
        numba.set_num_threads(1)
        start = time.perf_counter()
        nk.log_softmax(big, out=out)
        span.append((start, time.perf_counter()))
    t = threading.Thread(target=call)
    ticks = []
    t.start()
    while not span:
        ticks.append(time.perf_counter())
    t.join()
    (start, end), = span
    inside = [start, *(t for t in ticks if start < t < end), end]
    gap = max(b - a for a, b in zip(inside, inside[1:]))
    best = min(best, gap / (end - start))
# With the GIL held no tick falls inside the call, and the gap is all of it.
assert best < 0.5, best
"""
)


def test_the_gil_is_released(python):
    if (os.cpu_count() or 1) < 2:
        pytest.skip("two threads cannot run at once on one processor")
    python(RELEASED)
