"""What a fresh process pays: the import, and the first call with a cold and a warm cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

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
start = time.perf_counter()
import numba
imported = time.perf_counter()
{call}
print(json.dumps([imported - start, time.perf_counter() - imported]))
"""

FIRST_CALLS = {
    "log_softmax": "numbakern.log_softmax(x)",
    "cross_entropy_value_and_grad": "numbakern.cross_entropy_value_and_grad(x, labels)",
}


@dataclass(frozen=True)
class StartupResult:
    """One figure of a fresh process, in milliseconds, and its bound."""

    name: str
    milliseconds: float
    must: float
    goal: float | None = None


def _run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


def import_seconds(repeats: int = 7) -> float:
    """`import numbakern` in an interpreter that has NumPy already."""
    _run(_IMPORT)  # writes the bytecode
    return median(float(_run(_IMPORT)) for _ in range(repeats))


def first_call_seconds(name: str, cache: str) -> float:
    """The first call of a fresh process with this cache folder, beyond Numba's own import."""
    code = _FIRST_CALL.format(call=FIRST_CALLS[name])
    return float(json.loads(_run(code, NUMBA_CACHE_DIR=cache))[1])


def measure(repeats: int = 5) -> Iterator[StartupResult]:
    """Every figure in turn."""
    yield StartupResult("import numbakern, beyond NumPy", import_seconds(repeats) * 1e3, 60)
    for name in FIRST_CALLS:
        with tempfile.TemporaryDirectory() as cache:
            cold = first_call_seconds(name, cache)
            warm = median(first_call_seconds(name, cache) for _ in range(repeats))
        yield StartupResult(f"first {name}, cold cache", cold * 1e3, 2500)
        yield StartupResult(f"first {name}, warm cache", warm * 1e3, 500)
