"""What a call costs the host: ``python -m tests.host_cost [family ...]``, on Linux with cuda-core.

Against a driver that does nothing (``fake_driver.c``), with the libraries of ``mock_libraries`` and
the real Numba. A call is split into the launches themselves (cuda.core's, with the same arguments),
what the array library or the driver does for it (allocations, the exchange by DLPack), and the
rest, which is numbakern's. All in turn, in CPU time of the thread; a fixed piece of Python beside
them tells what *ours* would be on a quiet machine.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import quantiles

FAMILIES = ["torch", "cupy", "numba", "jax", "interface", "dlpack"]
FUNCTIONS = ["log_softmax(out=)", "log_softmax", "cross_entropy", "value_and_grad(out=)"]
ROUNDS, CALLS = 300, 10
YARDSTICK = 4.8
"""µs of `yardstick` on a quiet machine of today, with CPython 3.11."""


def build_driver(folder):
    """The fake libcuda.so.1 in this folder; None where none can be built."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        return None
    source, target = Path(__file__).parent / "fake_driver.c", Path(folder) / "libcuda.so.1"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(target), str(source), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return str(folder)


def environment(folder):
    """What a process needs to find the driver of `build_driver`, with one GPU."""
    return {"LD_LIBRARY_PATH": folder, "FAKE_DEVICES": "1"}


_COUNTS = "launches", "launches_on_1", "synchronizations", "allocations", "events"


def counts(driver):
    """How often the fake driver was asked for what, by name."""
    return {name: driver.fake_count(i) for i, name in enumerate(_COUNTS)}


class _Thing:
    def __init__(self, a, b):
        self.a, self.b = a, b

    def key(self):
        return self.a, self.b, (self.a, 1.0)


def yardstick():
    """Calls, attributes, tuples and look-ups, as in a call of a kernel."""
    table = {}
    for i in range(16):
        thing = _Thing(i, "b")
        key = thing.key()
        table[key] = thing
        if table.get(key) is not thing:
            raise AssertionError
    return table


def interleaved(parts):
    """The time of each part in µs: its lowest decile, for others may be busy meanwhile."""
    times = {name: [] for name in parts}
    for part in parts.values():
        for _ in range(20):
            part()
    gc.collect()
    gc.disable()
    for _ in range(ROUNDS):
        for name, part in parts.items():
            start = time.thread_time_ns()
            for _ in range(CALLS):
                part()
            times[name].append((time.thread_time_ns() - start) / CALLS / 1e3)
    gc.enable()
    return {name: quantiles(values, n=10)[0] for name, values in times.items()}


def library(family):
    """What makes an array of this family of a NumPy one, and whether `out` can be one."""
    import numpy as np

    from numbakern.cuda import compile
    from tests import mock_libraries

    mock_libraries.filled = np.empty  # the cost of the mocks: as little as can be
    if family == "numba":
        return compile.numba_cuda().to_device, True
    if family == "torch":
        sys.modules["torch"] = torch = mock_libraries.torch_module()
        return torch.Tensor, True
    if family == "cupy":
        sys.modules["cupy"] = cupy = mock_libraries.cupy_module()
        return cupy.ndarray.of, True
    if family == "jax":
        modules = mock_libraries.jax_modules()
        sys.modules.update(modules)
        return modules["jaxlib"].ArrayImpl, False
    kinds = {"dlpack": mock_libraries.OnlyDLPack, "interface": mock_libraries.OnlyInterface}
    return kinds[family], family == "interface"


def measure(family):
    """Print a line a function: launches; µs of call, launches, library, ours; ours when quiet."""
    import ctypes

    import numpy as np

    import numbakern
    from numbakern.cuda import compile, families, launch, pool
    from tests import mock_libraries

    compile.cubin = lambda *_: mock_libraries.cubin()
    make, mutable = library(family)
    x, labels = make(np.zeros((64, 1000), np.float32)), make(np.zeros(64, np.int64))
    out = make(np.zeros((64, 1000), np.float32)) if mutable else None
    calls = {
        "log_softmax(out=)": (lambda: numbakern.log_softmax(x, out=out), [x]),
        "log_softmax": (lambda: numbakern.log_softmax(x), [x]),
        "cross_entropy": (lambda: numbakern.cross_entropy(x, labels), [x, labels]),
        "value_and_grad(out=)": (
            lambda: numbakern.cross_entropy_value_and_grad(x, labels, out=out),
            [x, labels],
        ),
    }
    driver, core = ctypes.CDLL("libcuda.so.1"), launch.core().launch
    kind, device = families.of(type(x)), launch.device(0)
    for name, (call, given) in calls.items():
        device.calls.clear()
        call()
        (known,) = device.calls.values()
        like = kind.look("x", x, None)[2]
        queue = kind.queue(like, 0)
        started = [(c, k, pick([1] * 99)) for c, k, pick in known.starts]
        stream = queue.core

        def launches(started=started, stream=stream):
            for config, kernel, numbers in started:
                core(stream, config, kernel, *numbers)

        exchanged = given if family in ("jax", "dlpack") else []

        results = [kind.empty(shape, dtype, queue, like)[0] for shape, dtype in known.made]
        pooled = [array.nbytes for array in results if isinstance(array, pool.Array)]
        if kind.export is None:
            results = []

        def theirs(
            known=known, queue=queue, like=like, exchanged=exchanged, results=results, pooled=pooled
        ):
            if pooled:
                for size in pooled:
                    queue.allocate(size)
            else:
                for shape, dtype in known.made:
                    kind.empty(shape, dtype, queue, like)
            for result in results:
                kind.export(result)
            if known.scratch:
                kind.scratch(known.scratch, queue, like)
            for array in exchanged:
                array.__dlpack__(stream=queue.number)

        before = counts(driver)
        for _ in range(10):
            call()
        launched = (counts(driver)["launches"] - before["launches"]) / 10
        parts = {"call": call, "launches": launches, "theirs": theirs, "yard": yardstick}
        took = interleaved(parts)
        ours = took["call"] - took["launches"] - took["theirs"]
        quiet = ours / took["yard"] * YARDSTICK
        columns = [launched, took["call"], took["launches"], took["theirs"], ours, quiet]
        print(family, name.replace(" ", ""), *(f"{c:.2f}" for c in columns), flush=True)
    print("yardstick", f"{took['yard']:.2f}", file=sys.stderr)


def main():
    if "--measure" in sys.argv:
        measure(sys.argv[-1])
        return
    names = sys.argv[1:] or FAMILIES
    if wrong := sorted(set(names) - set(FAMILIES)):
        sys.exit(f"expected any of {', '.join(FAMILIES)}, got {', '.join(wrong)}")
    with tempfile.TemporaryDirectory() as folder:
        path = build_driver(folder)
        if path is None:
            sys.exit("a C compiler on Linux is needed to build the fake driver")
        print("family function launches: µs of call, launches, library, ours; ours when quiet")
        for name in names:
            command = [sys.executable, "-m", "tests.host_cost", "--measure", name]
            subprocess.run(command, check=True, env={**os.environ, **environment(path)})


if __name__ == "__main__":
    main()
