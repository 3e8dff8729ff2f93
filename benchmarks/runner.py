"""Finds the benchmarks of the suite and runs them as asv would, without it."""

from __future__ import annotations

import importlib
import itertools
import math
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

from benchmarks import suite

SECTIONS = ("cpu", "cuda", "startup", "numerics")
MACHINE_NAME = re.compile(r"\w[\w.+-]*")


@dataclass(frozen=True, eq=False)
class Benchmark:
    """One figure of one class, as asv names it."""

    section: str
    cls: str
    method: str
    params: list[list[Any]]
    unit: str
    version: str

    @property
    def name(self) -> str:
        """What asv calls it."""
        return f"{self.section}.{self.cls}.{self.method}"

    def selected(self, patterns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """The parameters that a pattern matches, as `asv run -b` would select them."""
        for params in itertools.product(*self.params):
            text = f"{self.name}({', '.join(map(repr, params))})" if params else self.name
            if not patterns or any(re.search(pattern, text) for pattern in patterns):
                yield params


def discover() -> list[Benchmark]:
    """Every benchmark of the suite."""
    found = []
    units = {"time": "seconds", "peakmem": "bytes"}
    for section in SECTIONS:
        module = importlib.import_module(f"benchmarks.{section}")
        for name, cls in vars(module).items():
            if not isinstance(cls, type) or name.startswith("_"):
                continue
            for method in dir(cls):
                kind, _, rest = method.partition("_")
                if rest and kind in ("time", "track", "peakmem"):
                    unit = units.get(kind) or getattr(cls, method).unit
                    params, version = getattr(cls, "params", []), getattr(cls, "version", "")
                    found.append(Benchmark(section, name, method, params, unit, version))
    return found


def _figure(instance: Any, method: str, params: Sequence[Any]) -> float:
    call = getattr(instance, method)
    if method.startswith("time_"):
        for _ in range(3):
            call(*params)
        samples = []
        for _ in range(1 if suite.SMALL else 15):
            start = time.perf_counter()
            for _ in range(instance.number):
                call(*params)
            samples.append((time.perf_counter() - start) / instance.number)
        return median(samples)
    value = call(*params)
    if method.startswith("peakmem_"):
        scale = 1 if sys.platform == "darwin" else 1024
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale)
    return float(value)


def run_class(section: str, name: str, jobs: Sequence[Any], results: Connection) -> None:
    """Send (method, parameters, figure or None, note) for every job of a class."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt ends it; the parent tells
    cls = getattr(importlib.import_module(f"benchmarks.{section}"), name)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for params, methods in itertools.groupby(jobs, key=lambda job: job[1]):
            instance, note, value = cls(), "", None
            try:
                if hasattr(instance, "setup"):
                    instance.setup(*params)
            except NotImplementedError as error:
                value, note = math.nan, str(error) or "does not apply"
            except Exception as error:
                note = f"{type(error).__name__}: {error}"
            for method, _ in methods:
                if not note:
                    try:
                        value = _figure(instance, method, params)
                    except Exception as error:
                        value, note = None, f"{type(error).__name__}: {error}"
                results.send((method, params, value, note))
            instance = None
        os.chdir("/")


def in_order(jobs: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The figures of the same parameters one after the other."""
    order = {params: place for place, params in enumerate(dict.fromkeys(p for _, p in jobs))}
    return sorted(jobs, key=lambda job: order[job[1]])


def run(benchmarks: Sequence[Benchmark], patterns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Give (benchmark, parameters, figure, note) one after the other; n/a is NaN, failed None."""
    context = multiprocessing.get_context("spawn")
    by_class = itertools.groupby(benchmarks, key=lambda b: (b.section, b.cls))
    for (section, cls), group in by_class:
        methods = {benchmark.method: benchmark for benchmark in group}
        jobs = in_order(
            [(m, params) for m, b in methods.items() for params in b.selected(patterns)]
        )
        # Peak memory is that of a process: each parameter has its own.
        alone = any(method.startswith("peakmem_") for method in methods)
        for batch in [[job] for job in jobs] if alone else [jobs] if jobs else []:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=run_class, args=(section, cls, batch, sender))
            process.start()
            sender.close()
            done = 0
            try:
                while True:
                    method, params, value, note = receiver.recv()
                    done += 1
                    yield methods[method], params, value, note
            except EOFError:
                process.join()
            finally:
                process.terminate()  # nothing to it, unless the parent was interrupted
            for method, params in batch[done:]:
                yield methods[method], params, None, f"the process ended: {process.exitcode}"
