"""``python -m numbakern``: what is here, and how near this machine's memory the functions come."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from ctypes.util import find_library
from typing import Any

import numpy as np

import numbakern

# (the widest vector unit that LLVM reports for this CPU, its bits)
_SIMD = (("avx512f", 512), ("avx2", 256), ("avx", 256), ("neon", 128), ("sse2", 128))

# The first two are needed; NVVM and nvJitLink may also come from a CUDA toolkit.
_CUDA_PACKAGES = ("numba-cuda", "cuda-core", "nvidia-nvvm", "nvidia-nvjitlink")

_FULL = ((1024, 32000), (4096, 1000), (4, 21, 512, 512))
_QUICK = ((128, 32000), (1024, 1000), (1, 21, 512, 512))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith(("model name", "Model")):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cuda() -> dict[str, Any]:
    """What of a CUDA stack is installed, found without importing or starting any of it."""
    return {
        **{name: _version(name) for name in _CUDA_PACKAGES},
        "driver": find_library("cuda") or find_library("nvcuda"),
    }


def system() -> dict[str, Any]:
    """What numbakern finds on this machine; makes a first call, and so starts the threads."""
    start = time.perf_counter()
    import llvmlite.binding
    import numba

    imported = time.perf_counter()
    features = llvmlite.binding.get_host_cpu_features()
    simd = next(((name, bits) for name, bits in _SIMD if features.get(name)), ("none", 0))
    # Large enough for the threads to be started.
    numbakern.log_softmax(np.zeros((512, 4096), np.float32))
    called = time.perf_counter()
    try:
        layer = numba.threading_layer()
    except ValueError:  # no parallel kernel has run: one thread only
        layer = "not started"
    from numbakern.cpu import cache_folder

    return {
        "numbakern": _version("numbakern") or "not installed (run from its sources)",
        "python": platform.python_version(),
        "numba": numba.__version__,
        "llvmlite": _version("llvmlite"),
        "numpy": np.__version__,
        "cpu": _cpu_model(),
        "llvm_cpu": llvmlite.binding.get_host_cpu_name(),
        "simd": simd[0],
        "simd_bits": simd[1],
        "fma": bool(features.get("fma") or features.get("neon")),
        "cores": _cores(),
        "threads": numba.get_num_threads(),
        "threading_layer": layer,
        "cache": cache_folder(),
        "numba_import_seconds": imported - start,
        "first_call_seconds": called - imported,
        "cuda": _cuda(),
    }


def describe(found: dict[str, Any]) -> str:
    """The findings of `system` as lines of text."""
    cuda = found["cuda"]
    parts = [f"{name} {cuda[name] or 'not installed'}" for name in _CUDA_PACKAGES]
    parts.append(f"driver library {cuda['driver'] or 'not found'}")
    missing = [name for name in _CUDA_PACKAGES[:2] if not cuda[name]]
    hint = f"; pip install 'numbakern[cuda]' for {' and '.join(missing)}" if missing else ""
    lines = {
        "numbakern": f"{found['numbakern']}, Python {found['python']}, Numba {found['numba']}, "
        f"llvmlite {found['llvmlite']}, NumPy {found['numpy']}",
        "CPU": f"{found['cpu']} ({found['llvm_cpu']}), {found['cores']} cores usable",
        "SIMD": f"{found['simd']}, {found['simd_bits']} bits, "
        f"{'with' if found['fma'] else 'without'} FMA",
        "threads": f"{found['threads']}, threading layer {found['threading_layer']}",
        "cache": found["cache"] or "no folder can be written: kernels are compiled in each process",
        "start": f"Numba's import {found['numba_import_seconds']:.2f} s, "
        f"first call {found['first_call_seconds']:.2f} s",
        "CUDA": ", ".join(parts) + hint,
    }
    return "\n".join(f"{name:<11}{text}" for name, text in lines.items())


def _cases(quick: bool) -> list[Any]:
    from numbakern._roofline import Case

    wide, short, image = _QUICK if quick else _FULL
    cases = [
        Case("log_softmax", wide),
        Case("log_softmax_fresh", wide),
        Case("log_softmax_backward", wide),
        Case("cross_entropy", wide),
        Case("value_and_grad", wide),
        Case("log_softmax", wide, "bfloat16"),
        Case("value_and_grad", wide, "bfloat16"),
        Case("log_softmax", short),
        Case("value_and_grad", short),
        Case("log_softmax", image, axis=1),
        Case("value_and_grad", image, axis=1),
    ]
    return cases


def roofline(quick: bool, threads: int) -> list[Any]:
    """Measure the main functions, numbakern's and those of the peers that are installed."""
    from numbakern._roofline import SCIPY, TORCH, Bench, progress

    peers = [peer for peer in (SCIPY, TORCH) if peer.installed]
    bench = Bench(peers, threads, rounds=5 if quick else 9, seconds=0.25 if quick else 0.6)
    return [bench.measure(case) for case in progress(_cases(quick))]


def roofline_table(results: Sequence[Any]) -> str:
    """The results as a table: time, GB/s and copies of the array."""
    from numbakern._roofline import TITLES, table

    peers = [name for name in ("scipy", "torch") if any(name in r.seconds for r in results)]
    rows = []
    for result in results:
        case = result.case
        where = f", axis {case.axis}" if case.axis >= 0 else ""
        rows.append(
            [
                TITLES[case.op],
                f"{case.shape}{where} {case.dtype}",
                *(
                    ("failed", "-", "-")
                    if "numbakern" in result.notes
                    else (
                        f"{result.seconds['numbakern'] * 1e3:.2f}",
                        f"{result.gigabytes_per_second():.1f}",
                        f"{result.multiple():.2f}",
                    )
                ),
                *(f"{result.multiple(p):.2f}" if p in result.seconds else "-" for p in peers),
            ]
        )
    return table(["function", "array", "ms", "GB/s", "x copy", *peers], rows)


def _as_json(result: Any) -> dict[str, Any]:
    return {
        "op": result.case.op,
        "shape": result.case.shape,
        "dtype": result.case.dtype,
        "axis": result.case.axis,
        "copy_seconds": result.copy_seconds,
        "copy": result.copy_name,
        "seconds": dict(result.seconds),
        "notes": dict(result.notes),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m numbakern",
        description="Tells what numbakern finds on this machine, and measures its main functions "
        "against a copy of the same array.",
    )
    parser.add_argument("--quick", action="store_true", help="smaller arrays, fewer rounds")
    parser.add_argument("--no-bench", action="store_true", help="only tell what is here")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(argv)

    found = system()
    if not options.json:
        print(describe(found), flush=True)
    results = [] if options.no_bench else roofline(options.quick, found["threads"])
    if options.json:
        report = {"system": found, "roofline": [_as_json(result) for result in results]}
        print(json.dumps(report, indent=2))
    elif results:
        print()
        print(roofline_table(results))
        from numbakern._roofline import SCIPY, TORCH

        print(
            "\nx copy: time in copies of the same array; the peers' columns likewise. The copy is "
            f"the fastest of\nnumpy.copyto with 1 and with {found['threads']} threads"
            f"{' and torch.copy_' if TORCH.installed else ''}. Medians of one interleaved run, "
            "cold caches.\nGB/s: the least traffic of the call over its time."
        )
        if missing := [peer.name for peer in (SCIPY, TORCH) if not peer.installed]:
            print(f"Not installed, so not compared with: {', '.join(missing)}.")
    failed = [result for result in results if "numbakern" in result.notes]
    for result in failed:
        print(f"{result.case.name}: {result.notes['numbakern']}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
