"""CUDA: tensors on the device, timed with its events; n/a everywhere where there is none."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from benchmarks import bounds, device, suite
from numbakern._roofline import NUMBAKERN as _NUMBAKERN
from numbakern._roofline import Bench, Case

IMPLEMENTATIONS = [_NUMBAKERN.name, *device.CUDA_PEERS]
SWEPT = ["numbakern", "torch", "quack"]
FUNCTIONS = ["log_softmax", "value_and_grad"]
DTYPES = ["float32", "bfloat16"]
SWEEP_ELEMENTS = 2**26


class _Cuda(suite.Measured):
    def bench(self, case: Case, *key: Any) -> Bench:
        names = self.params[0][1:]  # type: ignore[attr-defined]
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


class SweepClasses(_Cuda):
    """Arrays of 2**26 elements, from very many short rows to a few of a whole vocabulary."""

    params = [SWEPT, FUNCTIONS, DTYPES, suite.CLASSES]
    param_names = ["implementation", "function", "dtype", "classes"]

    def case(self, function: str, dtype: str, classes: int) -> Case:
        return Case(function, (max(1, SWEEP_ELEMENTS // classes), classes), dtype)


class SweepRows(_Cuda):
    """Rows of 1000 classes, from a single one to a million."""

    params = [SWEPT, FUNCTIONS, suite.ROWS]
    param_names = ["implementation", "function", "rows"]

    def case(self, function: str, rows: int) -> Case:
        return Case(function, (rows, 1000))


class SweepAxis(_Cuda):
    """The class axis first, in the middle and last of (256, 512, 512) arrays."""

    params = [["numbakern", "torch"], FUNCTIONS, DTYPES, suite.AXES]
    param_names = ["implementation", "function", "dtype", "axis"]

    def case(self, function: str, dtype: str, axis: int) -> Case:
        return Case(function, (256, 512, 512), dtype, axis)


class HostCost:
    """What one call costs the host, which does not wait for the device: (128, 1000) float32."""

    version = "1"
    timeout = 300
    params = [[*IMPLEMENTATIONS, "numbakern, CuPy arrays"], FUNCTIONS]
    param_names = ["implementation", "function"]

    def setup(self, implementation: str, function: str) -> None:
        device.require_cuda()
        case = Case(function, (128, 1000))
        arrays = device.DeviceArrays(case.shape, case.dtype, case.axis, "cuda")
        if implementation == "numbakern, CuPy arrays":
            arrays = self._cupy(arrays)
        name = implementation.partition(",")[0]
        library = _NUMBAKERN if name == "numbakern" else device.CUDA_PEERS[name]
        if not library.installed:
            suite.refuse(suite.NOT_INSTALLED)
        call = library.build(case, arrays)
        if call is None:
            suite.refuse(suite.DOES_NOT_APPLY)
        assert call is not None
        self.call = call

    @staticmethod
    def _cupy(arrays: Any) -> Any:
        try:
            import cupy
        except ImportError:
            raise NotImplementedError(suite.NOT_INSTALLED) from None
        for name in ("logits", "labels", "out"):
            setattr(arrays, name, cupy.from_dlpack(getattr(arrays, name)))
        return arrays

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
