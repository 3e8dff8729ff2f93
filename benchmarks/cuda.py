"""CUDA: tensors on the device, timed with its events; n/a everywhere where there is none."""

from __future__ import annotations

import copy
import time
from statistics import median
from typing import Any

from benchmarks import bounds, device, suite
from numbakern._roofline import NUMBAKERN, Bench, Case, Peer

_LIBRARIES = {NUMBAKERN.name: NUMBAKERN, **device.CUDA_PEERS}
IMPLEMENTATIONS = list(_LIBRARIES)
SWEPT = ["numbakern", "torch", "quack"]
CUPY_ARRAYS = "numbakern, CuPy arrays"


class _Cuda(suite.Measured):
    def bench(self, case: Case, *key: Any) -> Bench:
        names = [n for n in self.params[0][1:] if not suite.left_out(n)]  # type: ignore[attr-defined]
        rounds = 2 if suite.SMALL else 20
        return device.DeviceBench([device.CUDA_PEERS[name] for name in names], rounds=rounds)

    def setup(self, implementation: str, *key: Any) -> None:
        device.require_cuda()
        super().setup(implementation, *key)


class Speed(_Cuda):
    """Arrays of 2**28 elements, against the copy rate of the device."""

    params = [
        IMPLEMENTATIONS,
        list(bounds.CUDA_STREAMS),
        list(bounds.CUDA_CLASSES),
        list(bounds.CUDA_DTYPES),
    ]
    param_names = ["implementation", "function", "classes", "dtype"]

    def case(self, function: str, classes: int, dtype: str) -> Case:
        return bounds.cuda_bound(function, classes, dtype).case


class SweepClasses(_Cuda, suite.SweepClasses):
    """Arrays of 2**26 elements, from very many short rows to a few of a whole vocabulary."""

    params = [SWEPT, *suite.SweepClasses.swept]
    elements = 2**26


class SweepRows(_Cuda, suite.SweepRows):
    """Rows of 1000 classes, from a single one to a million."""

    params = [SWEPT, *suite.SweepRows.swept]
    classes = 1000


class SweepAxis(_Cuda, suite.SweepAxis):
    """The class axis first, in the middle and last of (256, 512, 512) arrays."""

    params = [["numbakern", "torch"], *suite.SweepAxis.swept]
    shape = (256, 512, 512)


class _Prepared(suite.Prepared):
    where = "cuda"

    def library(self, implementation: str) -> Peer:
        return _LIBRARIES[implementation.partition(",")[0]]

    def arrays(self, case: Case) -> device.DeviceArrays:
        return device.DeviceArrays(case.shape, case.dtype, case.axis, self.where)

    def given(self, implementation: str, arrays: Any) -> Any:
        if implementation != CUPY_ARRAYS:
            return arrays
        try:
            import cupy
        except ImportError:
            raise NotImplementedError(suite.NOT_INSTALLED) from None
        given = copy.copy(arrays)
        for name in ("logits", "labels", "out"):
            setattr(given, name, cupy.from_dlpack(getattr(arrays, name)))
        return given


class HostCost(_Prepared):
    """What one call costs the host, which does not wait for the device: (128, 1000) float32."""

    params = [[*IMPLEMENTATIONS, CUPY_ARRAYS], suite.FUNCTIONS]
    param_names = ["implementation", "function"]

    def setup(self, implementation: str, function: str) -> None:
        device.require_cuda()
        case = Case(function, (128, 1000))
        self.call = self.prepare(implementation, case, checked=case)

    def track_microseconds(self, implementation: str, function: str) -> float:
        import torch

        for _ in range(20):
            self.call()
        samples = []
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(50):
                self.call()
            samples.append((time.perf_counter() - start) / 50)
        torch.cuda.synchronize()
        return median(samples) * 1e6

    track_microseconds.unit = "µs"  # type: ignore[attr-defined]


class PeakMemory(_Prepared):
    """What one call on (4096, 32000) arrays takes of the device's memory beyond its arguments."""

    params = [
        [*IMPLEMENTATIONS, CUPY_ARRAYS],
        ["log_softmax", "cross_entropy", "value_and_grad"],
        suite.DTYPES,
    ]
    param_names = ["implementation", "function", "dtype"]

    def setup(self, implementation: str, function: str, dtype: str) -> None:
        device.require_cuda()
        case = Case(function, (4096, 32000), dtype)
        self.peak = device.peak_bytes(self.prepare(implementation, case, checked=case))

    def track_peakmem(self, implementation: str, function: str, dtype: str) -> int:
        return self.peak

    track_peakmem.unit = "bytes"  # type: ignore[attr-defined]
