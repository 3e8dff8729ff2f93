"""What a fresh process pays: the import, and the first call with a cold and a warm cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks import suite

REPEATS = 1 if suite.SMALL else 5

_IMPORT = """
import time, numpy
start = time.perf_counter()
import numbakern
print(time.perf_counter() - start)
"""

_FIRST_CALL = """
import json, time
import numpy as np, numbakern
x = np.zeros((256, 4096), np.float32)
labels = np.zeros(256, np.int64)
{prepare}
start = time.perf_counter()
import numba
imported = time.perf_counter()
{call}
{wait}
print(json.dumps([imported - start, time.perf_counter() - imported]))
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


def run(code: str, **environment: str) -> str:
    """What a fresh interpreter prints, which finds the package where this one does."""
    import numbakern

    package = str(Path(numbakern.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": package, **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return done.stdout


class Import:
    """`import numbakern` in an interpreter that has NumPy already."""

    version = "1"
    timeout = 120

    def track_seconds(self) -> float:
        run(_IMPORT)  # writes the bytecode
        return median(float(run(_IMPORT)) for _ in range(REPEATS))

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
        def seconds() -> float:
            return float(json.loads(run(self.code, NUMBA_CACHE_DIR=folder))[1])

        with tempfile.TemporaryDirectory() as folder:
            cold = seconds()
            return cold if cache == "cold" else median(seconds() for _ in range(REPEATS))

    track_seconds.unit = "seconds"  # type: ignore[attr-defined]
