"""What the sections share: how a parameter becomes a measured case, and the figures read off it.

asv runs every figure of every parameter in a process of its own. Here the first that asks for a
case measures all libraries on it, in turn with a copy of the same array, and leaves the medians in
the folder that asv gives to the class; the others read them there. So a ratio never compares two
processes, and each case is measured once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from numbakern._roofline import (
    DOES_NOT_APPLY,
    NOT_INSTALLED,
    Arrays,
    Bench,
    Call,
    Case,
    Peer,
    Result,
    check,
    limit_threads,
)

# For tests: every benchmark runs, on a few rows and with a few rounds.
SMALL = bool(os.environ.get("NUMBAKERN_BENCH_SMALL"))

# Libraries that `python -m benchmarks --without` leaves out; passed on to the process of a class.
WITHOUT_SETTING = "NUMBAKERN_BENCH_WITHOUT"
LEFT_OUT = "left out"

# Class counts that show cliffs: powers of two, their neighbours, vocabularies, odd ones.
CLASSES = sorted(
    {2**k for k in range(1, 19)}
    | {2**k + step for k in (3, 5, 7, 8, 10, 12, 14, 15, 16, 17) for step in (-1, 1)}
    | {3, 5, 10, 21, 100, 1000, 10007, 32000, 50257, 100003, 128256, 2**18 - 1}
)
ROWS = [1, 2, 4, 8, 16, 64, 256, 1000, 4096, 16384, 65536, 262144, 1000000]
FUNCTIONS = ["log_softmax", "value_and_grad"]
DTYPES = ["float32", "bfloat16"]
THREADS = [1, 2, 4, 8, 16, 32, 64]


def label(case: Case) -> str:
    """A shape as a parameter: ``1024x32000``; ``4x21x512x512 axis 1`` if that is not the last."""
    where = f" axis {case.axis}" if case.axis >= 0 else ""
    return "x".join(map(str, case.shape)) + where


def unlabel(text: str) -> tuple[tuple[int, ...], int]:
    """Shape and class axis of a parameter."""
    shape, _, axis = text.partition(" axis ")
    return tuple(map(int, shape.split("x"))), int(axis or -1)


def shrunk(case: Case) -> Case:
    """The same call on at most 8 rows along each axis and 2048 classes."""
    axis = case.axis % len(case.shape)
    shape = tuple(min(n, 2048 if i == axis else 8) for i, n in enumerate(case.shape))
    return dataclasses.replace(case, shape=shape)


def available_threads() -> int:
    """As many as Numba would start in this process."""
    import numba

    return int(numba.config.NUMBA_NUM_THREADS)


def left_out(library: str) -> bool:
    """Whether this library is not to be measured."""
    return library in os.environ.get(WITHOUT_SETTING, "").split(",")


def refuse(note: str) -> None:
    """Raise what asv shows as n/a where a library has no such call, an error if it failed."""
    if note in (NOT_INSTALLED, DOES_NOT_APPLY, LEFT_OUT):
        raise NotImplementedError(note)
    raise RuntimeError(note)


def remembered(key: object, compute: Callable[[], Any]) -> Any:
    """What `compute` gives, as JSON carries it; computed once in a working folder."""
    file = Path(f"{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.json")
    if not file.exists():
        file.write_text(json.dumps(compute()))
    return json.loads(file.read_text())


class Measured(ABC):
    """Figures of one case, measured with all its libraries in turn."""

    version = "1"
    timeout = 900

    @abstractmethod
    def case(self, *key: Any) -> Case | None:
        """The case of the parameters that follow the implementation; None if it is none of ours."""

    @abstractmethod
    def bench(self, case: Case, *key: Any) -> Bench:
        """What measures it."""

    def setup_cache(self) -> None:
        """Ask asv for a folder that the parameters share; nothing else is prepared."""
        return None

    def setup(self, implementation: str, *key: Any) -> None:
        """Measure the case, or read what another process measured; n/a is NotImplementedError."""
        case = self.case(*key)
        if case is None:
            raise NotImplementedError("not among the cases")
        if left_out(implementation):
            refuse(LEFT_OUT)
        self.result = self._measured(shrunk(case) if SMALL else case, key)
        if implementation not in self.result.seconds:
            refuse(self.result.notes.get(implementation, NOT_INSTALLED))

    def _measured(self, case: Case, key: Sequence[Any]) -> Result:
        def fields() -> dict[str, Any]:
            result = self.bench(case, *key).measure(case)
            return {f.name: getattr(result, f.name) for f in dataclasses.fields(result)[1:]}

        return Result(case, **remembered((type(self).__module__, type(self).__name__, key), fields))

    def track_x_copy(self, implementation: str, *key: Any) -> float:
        """Time in copies of the same array."""
        return self.result.multiple(implementation)

    track_x_copy.unit = "× copy"  # type: ignore[attr-defined]

    def track_seconds(self, implementation: str, *key: Any) -> float:
        """Median time of a call."""
        return self.result.seconds[implementation]

    track_seconds.unit = "seconds"  # type: ignore[attr-defined]

    def track_gigabytes(self, implementation: str, *key: Any) -> float:
        """Least traffic of the call over its time: more is better, and so no alarm."""
        return self.result.gigabytes_per_second(implementation)

    track_gigabytes.unit = "GB/s (more is better)"  # type: ignore[attr-defined]


class SweepClasses(Measured):
    """As many elements in rows of each length."""

    elements: int
    swept = [FUNCTIONS, DTYPES, CLASSES]
    param_names = ["implementation", "function", "dtype", "classes"]

    def case(self, function: str, dtype: str, classes: int) -> Case:
        """So many rows that the array has its elements."""
        return Case(function, (max(1, self.elements // classes), classes), dtype)


class SweepRows(Measured):
    """Rows of one length, from a single one to a million."""

    classes: int
    swept = [FUNCTIONS, ROWS]
    param_names = ["implementation", "function", "rows"]

    def case(self, function: str, rows: int) -> Case:
        """So many rows."""
        return Case(function, (rows, self.classes))


class SweepAxis(Measured):
    """The class axis first, in the middle and last."""

    shape: tuple[int, int, int]
    swept = [FUNCTIONS, DTYPES, [0, 1, 2]]
    param_names = ["implementation", "function", "dtype", "axis"]

    def case(self, function: str, dtype: str, axis: int) -> Case:
        """That axis of the shape."""
        return Case(function, self.shape, dtype, axis)


class Prepared(ABC):
    """One library's call, checked and compiled before asv times it or looks at its memory."""

    version = "1"
    timeout = 600

    @abstractmethod
    def library(self, implementation: str) -> Peer:
        """The library of this name."""

    @abstractmethod
    def arrays(self, case: Case) -> Arrays:
        """The arrays of a case."""

    def given(self, implementation: str, arrays: Arrays) -> Arrays:
        """The same memory as the library is given it."""
        return arrays

    def prepare(self, implementation: str, case: Case, *, checked: Case) -> Call:
        """A call on `case`; the library's result is checked on `checked`, which may be smaller."""
        library = self.library(implementation)
        if left_out(library.name):
            refuse(LEFT_OUT)
        if not library.installed:
            refuse(NOT_INSTALLED)
        limit_threads(available_threads())
        arrays = self.arrays(checked)
        call = self._built(library, checked, self.given(implementation, arrays))
        if wrong := check(checked, arrays, call()):
            raise RuntimeError(f"wrong result: {wrong}")
        if checked == case:
            return call
        return self._built(library, case, self.given(implementation, self.arrays(case)))

    @staticmethod
    def _built(library: Peer, case: Case, arrays: Arrays) -> Call:
        call = library.build(case, arrays)
        if call is None:
            raise NotImplementedError(DOES_NOT_APPLY)
        return call


class Timed(Prepared):
    """asv's own timing of a call over and over, its arrays in the caches where they fit."""

    rounds = 2
    repeat = (3, 10, 1.0)
    warmup_time = 0.02
    number = 1
    _key: tuple[Any, ...] | None = None

    @abstractmethod
    def case(self, *key: Any) -> Case:
        """The case of the parameters that follow the implementation."""

    def setup(self, implementation: str, *key: Any) -> None:
        """Prepare once: asv calls this before every sample."""
        if self._key == (implementation, *key):
            return
        case = shrunk(self.case(*key)) if SMALL else self.case(*key)
        self.call = self.prepare(implementation, case, checked=case)
        start = time.perf_counter()
        self.call()
        once = max(time.perf_counter() - start, 1e-7)
        self.number = min(10_000, max(1, math.ceil(0.005 / once)))
        self._key = (implementation, *key)

    def time_call(self, implementation: str, *key: Any) -> None:
        """One call."""
        self.call()


class Memory(Prepared):
    """The most memory that a process held which made one call."""

    @abstractmethod
    def case(self, *key: Any) -> Case:
        """The case of the parameters that follow the implementation."""

    def setup(self, implementation: str, *key: Any) -> None:
        """Check on a few rows, so that the reference adds nothing to the peak."""
        case = self.case(*key)
        self.call = self.prepare(
            implementation, shrunk(case) if SMALL else case, checked=shrunk(case)
        )

    def peakmem_call(self, implementation: str, *key: Any) -> None:
        """One call."""
        self.call()
