"""`python -m benchmarks`: run the suite here and now, without asv, git or a network.

The same classes with the same parameters as `asv run`, one process a class. `--save` writes what
was measured to one file, which `python -m benchmarks.bring_home` adds to the repository's results.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import digest, report, sources, suite
from benchmarks.runner import discover, run

LIBRARIES = (
    *("numbakern", "numba", "numba-cuda", "numpy", "scipy", "torch", "jax", "triton"),
    *("cupy", "cupy-cuda12x", "cupy-cuda13x", "liger-kernel", "quack-kernels"),
)


def environment() -> dict[str, Any]:
    """What was measured with, and on how many threads."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    import llvmlite.binding

    found = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "versions": versions,
        "cpu": llvmlite.binding.get_host_cpu_name(),
        "threads": suite.available_threads(),
    }
    try:
        import torch

        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    except ImportError:
        pass
    return found


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    made.add_argument(
        "-b",
        "--bench",
        action="append",
        default=[],
        metavar="REGEX",
        help="only what matches, e.g. \"cpu.Speed.*'numbakern'\" (may be given again)",
    )
    made.add_argument("--list", action="store_true", help="print what would run, and stop")
    made.add_argument("--save", metavar="FILE", help="write everything measured to FILE")
    made.add_argument("--machine", help="name of the machine in the results, e.g. h200")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parser().parse_args(argv)
    if options.save and not options.machine:
        parser().error("--save: expected --machine too")
    benchmarks = discover()
    if options.list:
        for benchmark in benchmarks:
            if count := len(list(benchmark.selected(options.bench))):
                print(f"{benchmark.name}: {count} parameters, {benchmark.unit}")
        return 0
    saved: dict[str, Any] = {
        "machine": options.machine,
        "date": int(time.time() * 1000),
        "sources": digest(sources()),
        "environment": environment(),
        "results": {},
    }
    failed = 0
    values: report.Values = {}
    for benchmark, params, value, note in run(benchmarks, options.bench):
        entry = saved["results"].setdefault(
            benchmark.name, {"version": benchmark.version, "values": []}
        )
        entry["values"].append([list(map(repr, params)), value])
        text = f"{benchmark.name}({', '.join(map(repr, params))})"
        if value is None:
            failed += 1
            print(f"{text}: failed: {note}", flush=True)
        elif not math.isnan(value):
            values.setdefault(benchmark.name, {})[tuple(map(repr, params))] = value
            print(f"{text}: {value:.4g} {benchmark.unit}", flush=True)
        if options.save:
            with open(options.save, "w", encoding="utf-8") as file:
                json.dump(saved, file)
    for target in ("cpu", "cuda"):
        if rows := report.rows(values, target):
            print(f"\n{report.text_table(rows)}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
