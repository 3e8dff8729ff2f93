"""What a fresh process pays: the import, and the first call with a cold and a warm cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import suite
from numbakern._roofline import Arrays, Case, check

REPEATS = 1 if suite.SMALL else 5

_IMPORT = """
import time, numpy
start = time.perf_counter()
import numbakern
print(time.perf_counter() - start)
print(numbakern.__file__)
"""

_FIRST_CALL = """
import time
import numpy as np, numbakern
x, labels = np.load("logits.npy"), np.load("labels.npy")
{prepare}
import numba
start = time.perf_counter()
result = {call}
{wait}
print(time.perf_counter() - start)
for i, part in enumerate(result if isinstance(result, tuple) else (result,)):
    np.save(f"result{{i}}.npy", part.cpu() if hasattr(part, "cpu") else part)
    print(f"result{{i}}.npy")
"""

_CUDA = """
import torch
x, labels = torch.from_numpy(x).cuda(), torch.from_numpy(labels).cuda()
torch.cuda.synchronize()
"""

CALLS = {
    "log_softmax": "numbakern.log_softmax(x)",
    "value_and_grad": "numbakern.cross_entropy_value_and_grad(x, labels)",
}


def run(code: str, folder: str, **environment: str) -> tuple[float, list[str]]:
    """Seconds and names that a fresh interpreter prints, which finds the package as this one."""
    import numbakern

    package = str(Path(numbakern.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": package, **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    seconds, *names = done.stdout.splitlines()
    return float(seconds), names


class Import:
    """`import numbakern` in an interpreter that has NumPy already."""

    version = "1"
    timeout = 120

    def track_seconds(self) -> float:
        import numbakern

        def seconds() -> float:
            found, names = run(_IMPORT, folder)
            if names != [numbakern.__file__]:
                raise RuntimeError(f"wrong result: imported {names}")
            return found

        with tempfile.TemporaryDirectory() as folder:
            seconds()  # writes the bytecode
            return median(seconds() for _ in range(REPEATS))

    track_seconds.unit = "seconds"  # type: ignore[attr-defined]


class FirstCall:
    """The first call of a process, beyond Numba's own import: compiling, or loading from disk."""

    version = "1"
    timeout = 300
    params = [["cpu", "cuda"], list(CALLS), ["cold", "warm"]]
    param_names = ["target", "function", "cache"]

    def setup(self, target: str, function: str, cache: str) -> None:
        if target == "cuda":
            from benchmarks.device import require_cuda

            require_cuda()
        self.code = _FIRST_CALL.format(
            call=CALLS[function],
            prepare=_CUDA if target == "cuda" else "",
            wait="torch.cuda.synchronize()" if target == "cuda" else "",
        )

    def track_seconds(self, target: str, function: str, cache: str) -> float:
        case = Case(function, (256, 4096))
        arrays = Arrays(case.shape, case.dtype, case.axis)

        def seconds() -> float:
            found, names = run(self.code, folder, NUMBA_CACHE_DIR=str(Path(folder, "cache")))
            result: Any = tuple(np.load(Path(folder, name)) for name in names)
            if wrong := check(case, arrays, result):
                raise RuntimeError(f"wrong result: {wrong}")
            return found

        with tempfile.TemporaryDirectory() as folder:
            for name in ("logits", "labels"):
                np.save(Path(folder, name), getattr(arrays, name))
            cold = seconds()
            return cold if cache == "cold" else median(seconds() for _ in range(REPEATS))

    track_seconds.unit = "seconds"  # type: ignore[attr-defined]
