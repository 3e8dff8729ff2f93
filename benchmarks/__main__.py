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
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks import digest, report, sources, suite
from benchmarks.device import CUDA_PEERS
from benchmarks.peers import CPU_PEERS
from benchmarks.runner import MACHINE_NAME, Benchmark, discover, run

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


def pattern(text: str) -> str:
    """A regular expression, as it is."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, {error}") from None
    return text


def machine_name(text: str) -> str:
    """The name of a machine, which becomes that of a folder."""
    if not MACHINE_NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"expected letters, digits and any of -_.+, got {text!r}")
    return text


def write(path: str, content: Any) -> None:
    """Write JSON at once or not at all: an interrupted run leaves what it had."""
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8") as file:
        json.dump(content, file)
    os.replace(part, path)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    made.add_argument(
        "-b",
        "--bench",
        action="append",
        default=[],
        type=pattern,
        metavar="REGEX",
        help="only what matches, e.g. \"cpu.Speed.*'numbakern'\" (may be given again)",
    )
    made.add_argument(
        "--without",
        action="append",
        default=[],
        choices=sorted({*CPU_PEERS, *CUDA_PEERS}),
        metavar="LIBRARY",
        help="do not measure it, e.g. torch.compile, which compiles for each case (repeatable)",
    )
    made.add_argument("--list", action="store_true", help="print what would run, and stop")
    made.add_argument("--save", metavar="FILE", help="write everything measured to FILE")
    made.add_argument(
        "--machine", type=machine_name, help="name of the machine in the results, e.g. h200"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parser().parse_args(argv)
    if options.save and not options.machine:
        parser().error("--save: expected --machine too")
    benchmarks = discover()
    counts = {b: sum(1 for _ in b.selected(options.bench)) for b in benchmarks}
    if not any(counts.values()):
        parser().error("--bench: nothing matches; --list tells what there is")
    if options.list:
        for benchmark, count in counts.items():
            if count:
                print(f"{benchmark.name}: {count} parameters, {benchmark.unit}")
        return 0
    os.environ[suite.WITHOUT_SETTING] = ",".join(options.without)
    saved: dict[str, Any] = {
        "machine": options.machine,
        "date": int(time.time() * 1000),
        "sources": digest(sources()),
        "environment": environment(),
        "results": {},
    }
    if options.save:
        try:
            write(options.save, saved)
        except OSError as error:
            parser().error(f"--save: {error}")
    try:
        return measure(benchmarks, options.bench, saved, options.save)
    except KeyboardInterrupt:
        print("interrupted" + (f"; {options.save} has what was measured" if options.save else ""))
        return 130


def measure(
    benchmarks: Sequence[Benchmark], patterns: Sequence[str], saved: dict[str, Any], path: str
) -> int:
    """Run, print and save what the patterns select; gives 1 if something failed, or all is n/a."""
    failed = 0
    values: report.Values = {}
    absent: Counter[tuple[str, str]] = Counter()  # why figures of a class are n/a
    for benchmark, params, value, note in run(benchmarks, patterns):
        entry = saved["results"].setdefault(
            benchmark.name, {"version": benchmark.version, "values": []}
        )
        entry["values"].append([list(map(repr, params)), value])
        text = f"{benchmark.name}({', '.join(map(repr, params))})"
        if value is None:
            failed += 1
            print(f"{text}: failed: {note}", flush=True)
        elif math.isnan(value):
            absent[f"{benchmark.section}.{benchmark.cls}", note] += 1
        else:
            values.setdefault(benchmark.name, {})[tuple(map(repr, params))] = value
            print(f"{text}: {value:.4g} {benchmark.unit}", flush=True)
        if path:
            write(path, saved)
    for target in ("cpu", "cuda"):
        if rows := report.rows(values, target):
            print(f"\n{report.text_table(rows)}")
    for (name, note), count in absent.items():
        print(f"{name}: {count} n/a: {note or 'not a number'}")
    return int(failed > 0 or not values)


if __name__ == "__main__":
    sys.exit(main())
