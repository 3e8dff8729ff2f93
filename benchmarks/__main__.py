"""`python -m benchmarks`: the speed table, measured here and now."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import startup
from benchmarks.common import CASES, JAX, PEERS, TORCH_COMPILE, Bound
from numbakern._roofline import TITLES, Bench, Result, progress, table


def use_cpus(threads: int | None) -> int:
    """Keep this process on as many CPUs as threads are asked for; how many threads it has.

    Libraries that offer no setting for their threads (JAX) then use as many as the others.
    """
    if threads is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    import numba  # looks at the CPUs of the process when it is imported

    available = numba.get_num_threads()
    return min(threads or available, available)


def figure(bound: Bound, result: Result, name: str) -> float | None:
    """A library's figure in the unit of the bound; None where there is none."""
    if name not in result.seconds:
        return None
    return result.seconds[name] * 1e6 if bound.unit == "us" else result.multiple(name)


def verdict(value: float | None, must: float, goal: float | None) -> str:
    """`goal`, `must` or `MISSED`; `FAILED` where there is no figure."""
    if value is None:
        return "FAILED"
    if goal is not None and value <= goal:
        return "goal"
    return "must" if value <= must else "MISSED"


def _digits(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def speed_table(measured: Sequence[tuple[Bound, Result]]) -> str:
    """One line a case: the figure, its bounds, and the peers' figures in the same unit."""
    names = [name for name in PEERS if any(name in result.seconds for _, result in measured)]
    rows = []
    for bound, result in measured:
        case = bound.case
        ours = figure(bound, result, "numbakern")
        where = f", axis {case.axis}" if case.axis >= 0 else ""
        rows.append(
            [
                TITLES[case.op],
                f"{case.shape}{where} {case.dtype}",
                bound.unit,
                _digits(ours),
                f"{bound.must:g}",
                f"{bound.goal:g}",
                verdict(ours, bound.must, bound.goal),
                "-" if ours is None else f"{result.seconds['numbakern'] * 1e3:.3g}",
                "-" if ours is None else f"{result.gigabytes_per_second():.1f}",
                f"{result.copy_seconds * 1e3:.3g}",
                *(_digits(figure(bound, result, name)) for name in names),
            ]
        )
    header = ["call", "array", "unit", "ours", "must", "goal", "met", "ms", "GB/s", "copy ms"]
    return table([*header, *names], rows)


def startup_table(results: Sequence[startup.StartupResult]) -> str:
    """One line a figure of a fresh process."""
    rows = [
        [
            r.name,
            "ms",
            f"{r.milliseconds:.0f}",
            f"{r.must:g}",
            verdict(r.milliseconds, r.must, r.goal),
        ]
        for r in results
    ]
    return table(["fresh process", "unit", "ours", "must", "met"], rows)


def environment(threads: int) -> dict[str, Any]:
    """What was measured on, and with which versions."""
    import importlib.metadata as metadata

    versions: dict[str, str | None] = {}
    for name in ("numbakern", "numba", "numpy", "scipy", "torch", "jax"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    import llvmlite.binding

    return {
        "threads": threads,
        "cpu": llvmlite.binding.get_host_cpu_name(),
        "python": platform.python_version(),
        "versions": versions,
    }


def as_json(bound: Bound, result: Result) -> dict[str, Any]:
    """Everything that was measured of a case, for a file."""
    case = bound.case
    return {
        "name": case.name,
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "axis": case.axis,
        "bytes": case.nbytes,
        "unit": bound.unit,
        "must": bound.must,
        "goal": bound.goal,
        "copy": result.copy_name,
        "copy_seconds": result.copy_seconds,
        "seconds": dict(result.seconds),
        "multiples": {name: result.multiple(name) for name in result.seconds},
        "notes": dict(result.notes),
    }


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    made.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    made.add_argument(
        "--case",
        action="append",
        metavar="TEXT",
        help="only the cases whose name contains TEXT (may be given again)",
    )
    made.add_argument("--quick", action="store_true", help="fewer rounds, the same arrays")
    made.add_argument("--no-peers", action="store_true", help="numbakern alone")
    made.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    made.add_argument("--no-jax", action="store_true", help="leave out JAX")
    made.add_argument("--no-startup", action="store_true", help="leave out the fresh processes")
    made.add_argument(
        "--warm",
        action="store_true",
        help="repeat each call back to back, with its arrays in the caches where they fit",
    )
    made.add_argument("--threads", type=int, metavar="N", help="use N CPUs (all by default)")
    made.add_argument("--json", metavar="FILE", help="write everything measured to FILE as well")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parser().parse_args(argv)
    wanted = options.case or [""]
    bounds = {b.case: b for b in CASES if any(text in b.case.name for text in wanted)}
    if options.list:
        print("\n".join(case.name for case in bounds))
        return 0
    if options.threads is not None and options.threads < 1:
        parser().error("--threads: expected a positive number")
    threads = use_cpus(options.threads)

    left_out = {TORCH_COMPILE.name} if options.no_compile else set()
    left_out |= {JAX.name} if options.no_jax else set()
    peers = [] if options.no_peers else [p for p in PEERS.values() if p.name not in left_out]
    bench = Bench(
        peers,
        threads,
        rounds=5 if options.quick else 15,
        seconds=0.3 if options.quick else 2.0,
        warm=options.warm,
    )
    fresh = []
    if not (options.no_startup or options.case):
        fresh = list(startup.measure(3 if options.quick else 7))
    measured = [(bounds[case], bench.measure(case)) for case in progress(list(bounds))]

    found = environment(threads)
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items() if v)
    print(f"{found['cpu']}, threads: {threads}; {versions}\n")
    if measured:
        print(speed_table(measured))
        caches = "warm" if options.warm else "cold"
        print(
            f"\nx copy: medians of one interleaved run, {caches} caches, in copies of the same "
            "array (the fastest of\nnumpy.copyto with one and with all threads and torch.copy_). "
            "us: microseconds a call, warm.\n"
            "GB/s: least traffic over time. -: the peer has no such call."
        )
    notes = {
        f"{name}: {note}" + ("" if note == "not installed" else f" ({result.case.name})")
        for _, result in measured
        for name, note in result.notes.items()
        if note != "does not apply"
    }
    print("".join(f"{note}\n" for note in sorted(notes)))
    if fresh:
        print(startup_table(fresh))
    if options.json:
        report = {
            "environment": found,
            "cases": [as_json(bound, result) for bound, result in measured],
            "startup": [vars(result) for result in fresh],
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
            file.write("\n")
    return int(any("numbakern" in result.notes for _, result in measured))


if __name__ == "__main__":
    sys.exit(main())
