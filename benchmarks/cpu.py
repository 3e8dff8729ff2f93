"""CPU: NumPy arrays, every library with the same threads, float32 unless a parameter says."""

from __future__ import annotations

from typing import Any

from benchmarks import bounds, suite
from benchmarks.peers import CPU_PEERS
from numbakern._roofline import NUMBAKERN, TITLES, Arrays, Bench, Case, Peer

_LIBRARIES = {NUMBAKERN.name: NUMBAKERN, **CPU_PEERS}
IMPLEMENTATIONS = list(_LIBRARIES)
SWEPT = ["numbakern", "torch", "jax"]  # torch.compile takes seconds to compile each case
_CASES = {
    (bound.case.op, suite.label(bound.case), bound.case.dtype): bound.case for bound in bounds.CPU
}


class _Cpu(suite.Measured):
    threads = 0
    effort = 3, 0.5  # rounds, and seconds after which a call has had enough of them
    peers_when_small = False  # importing and compiling the peers is what takes long then

    def bench(self, case: Case, *key: Any) -> Bench:
        names = self.params[0][1:]  # type: ignore[attr-defined]
        if suite.SMALL:
            names = ["scipy", "torch", "jax"] if self.peers_when_small else []
        peers = [CPU_PEERS[name] for name in names if not suite.left_out(name)]
        threads = self.threads or suite.available_threads()
        rounds, seconds = (1, 0.01) if suite.SMALL else self.effort
        return Bench(peers, threads, rounds=rounds, seconds=seconds)


class Speed(_Cpu):
    """The calls that a release is judged by, with cold caches."""

    effort = 15, 2.0
    peers_when_small = True
    params = [
        IMPLEMENTATIONS,
        list(TITLES),
        list(dict.fromkeys(shape for _, shape, _ in _CASES)),
        list(dict.fromkeys(dtype for *_, dtype in _CASES)),
    ]
    param_names = ["implementation", "function", "shape", "dtype"]

    def case(self, function: str, shape: str, dtype: str) -> Case | None:
        return _CASES.get((function, shape, dtype))


class SweepClasses(_Cpu, suite.SweepClasses):
    """Arrays of 2**22 elements, from very many short rows to a few of a whole vocabulary."""

    params = [SWEPT, *suite.SweepClasses.swept]
    elements = 2**22


class SweepRows(_Cpu, suite.SweepRows):
    """Rows of 64 classes, from a single one to a million."""

    params = [SWEPT, *suite.SweepRows.swept]
    classes = 64


class SweepAxis(_Cpu, suite.SweepAxis):
    """The class axis first, in the middle and last of (64, 256, 256) arrays."""

    params = [["numbakern", "torch"], *suite.SweepAxis.swept]
    shape = (64, 256, 256)


class SweepThreads(_Cpu):
    """(1024, 32000) arrays on so many threads; n/a where there are fewer cores. JAX has no say."""

    params = [["numbakern", "torch"], suite.FUNCTIONS, suite.THREADS]
    param_names = ["implementation", "function", "threads"]

    def case(self, function: str, threads: int) -> Case:
        if threads > suite.available_threads():
            raise NotImplementedError("more threads than cores")
        self.threads = threads
        return Case(function, bounds.WIDE)


class _Library:
    def library(self, implementation: str) -> Peer:
        return _LIBRARIES[implementation]

    def arrays(self, case: Case) -> Arrays:
        return Arrays(case.shape, case.dtype, case.axis)


class Call(_Library, suite.Timed):
    """Calls over and over on the same arrays, which stay in the caches where they fit."""

    params = [IMPLEMENTATIONS, suite.FUNCTIONS, ["8x10", "64x1000", "1024x1024"]]
    param_names = ["implementation", "function", "shape"]

    def case(self, function: str, shape: str) -> Case:
        return Case(function, suite.unlabel(shape)[0])


class PeakMemory(_Library, suite.Memory):
    """One call on (1024, 32000) arrays: what is beyond the arrays is the library and its copies."""

    params = [IMPLEMENTATIONS, ["log_softmax", "cross_entropy", "value_and_grad"], suite.DTYPES]
    param_names = ["implementation", "function", "dtype"]

    def case(self, function: str, dtype: str) -> Case:
        return Case(function, bounds.WIDE, dtype)
