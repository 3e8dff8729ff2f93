"""Arrays, copies, clock and peers of the CUDA section.

Arrays are torch tensors on the device, which numbakern and every other library take. Nothing here
touches CUDA while it is imported.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from ctypes.util import find_library
from functools import cache, cached_property, partial
from typing import Any

import numpy as np

from benchmarks.peers import TORCH_COMPILE
from numbakern._roofline import TOLERANCE, TORCH, Arrays, Bench, Call, Case, Peer, Times

FLUSHED_BYTES = 2**28  # more than any GPU's L2


@cache
def _missing() -> str:
    if not (find_library("cuda") or find_library("nvcuda")):
        return "no NVIDIA GPU (this machine has no CUDA driver)"
    try:
        import torch
    except ImportError:
        return "needs torch for arrays on the device"
    return "" if torch.cuda.is_available() else "no NVIDIA GPU that torch can use"


def require_cuda() -> None:
    """Raise NotImplementedError, which asv shows as n/a, where no CUDA benchmark can run."""
    if missing := _missing():
        raise NotImplementedError(missing)


class DeviceArrays(Arrays):
    """The inputs and the output of a case as tensors on a device."""

    def __init__(self, shape: tuple[int, ...], dtype: str, axis: int, device: str) -> None:
        import torch

        super().__init__(shape, dtype, axis)
        self.device, self.torch_dtype = device, getattr(torch, dtype)
        self._generator = torch.Generator(device).manual_seed(20)

    def _normal(self) -> Any:
        import torch

        return torch.randn(
            self.shape, generator=self._generator, device=self.device, dtype=self.torch_dtype
        )

    @cached_property
    def labels(self) -> Any:
        import torch

        shape = self.shape[: self.axis] + self.shape[self.axis + 1 :]
        classes = self.shape[self.axis]
        return torch.randint(classes, shape, generator=self._generator, device=self.device)

    @cached_property
    def lse(self) -> Any:
        """Float64, some rows at a time: no float64 copy of the whole array."""
        import torch

        logits: Any = self.logits
        rows = logits.movedim(self.axis, -1).reshape(-1, self.shape[self.axis])
        step = max(1, 2**24 // rows.shape[1])
        parts = [torch.logsumexp(part.double(), 1) for part in rows.split(step)]
        return torch.cat(parts).reshape(self.labels.shape)

    @cached_property
    def log_probs(self) -> Any:
        return (self.logits - self.lse.unsqueeze(self.axis).float()).to(self.torch_dtype)

    @cached_property
    def out(self) -> Any:
        import torch

        return torch.ones_like(self.logits)

    def as_rows(self, array: Any, rows: slice = slice(None)) -> np.ndarray:
        import torch

        tensor = torch.as_tensor(array, device=self.device)
        tensor = tensor.movedim(self.axis, -1).reshape(-1, self.shape[self.axis])
        return self.host(tensor[rows])

    def host(self, array: Any) -> np.ndarray:
        """On the host; CuPy's arrays too."""
        return super().host(array.get() if hasattr(array, "get") else array)

    def at_labels(self, array: Any) -> np.ndarray:
        at = array.gather(self.axis, self.labels.unsqueeze(self.axis))
        return self.host(at.double()).reshape(-1)


class EventClock:
    """Time between two events of the device around one call, with the caches flushed before it.

    The flush keeps the device busy while the host enqueues the call, so that the launch of a short
    kernel is not counted.
    """

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
        """Seconds of each call, once a round in an order that turns."""
        torch, names = self._torch, list(calls)
        pairs: dict[str, list[Any]] = {name: [] for name in names}
        for call in calls.values():
            for _ in range(3):  # compiles, tunes, fills the allocator
                call()
        torch.cuda.synchronize()
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flushed.zero_()
                start.record()
                calls[name]()
                end.record()
                pairs[name].append((start, end))
            torch.cuda.synchronize()
        return {
            name: [start.elapsed_time(end) / 1e3 for start, end in events]
            for name, events in pairs.items()
        }


class DeviceBench(Bench):
    """`Bench` for arrays on a GPU; another device and clock let it be tested without one."""

    def __init__(
        self, peers: list[Peer], *, rounds: int = 20, device: str = "cuda", clock: Any = None
    ) -> None:
        super().__init__(peers, threads=1, rounds=rounds)
        self.device, self.clock = device, clock or EventClock()

    def make(self, shape: tuple[int, ...], dtype: str, axis: int) -> Arrays:
        return DeviceArrays(shape, dtype, axis, self.device)

    def time(self, case: Case, arrays: Arrays, calls: Mapping[str, Call]) -> Times:
        anchors = copies(arrays)
        times = self.clock({**anchors, **calls}, self.rounds)
        return {name: times[name] for name in anchors}, {name: times[name] for name in calls}


def peak_bytes(call: Call) -> int:
    """The most memory of the device that a call holds at once beyond what is held before it.

    Told by the allocators themselves, which is NotImplementedError where torch's keeps no books.
    CuPy's pool tells no peak, but how far it grew, and it grows only when it must.
    """
    import torch

    call()  # compiles, tunes
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    if not before:  # with the arguments there
        raise NotImplementedError("torch's allocator keeps no books")
    pool = sys.modules["cupy"].get_default_memory_pool() if "cupy" in sys.modules else None
    held = 0
    if pool is not None:
        pool.free_all_blocks()
        held = pool.total_bytes()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    grown = pool.total_bytes() - held if pool is not None else 0
    del result
    return int(torch.cuda.max_memory_allocated() - before + grown)


def copies(arrays: Any) -> dict[str, Call]:
    """The driver's copy, and that of an elementwise kernel, which may be the faster."""
    import torch

    out, logits = arrays.out, arrays.logits
    return {
        "torch.copy_": partial(out.copy_, logits),
        "torch.mul by 1": partial(torch.mul, logits, 1, out=out),
    }


# ---------------------------------------------------------------------------------------------
# CuPy


def _cupy_log_softmax(a: Any) -> Call:
    import cupy
    from cupyx.scipy.special import log_softmax

    return partial(log_softmax, cupy.from_dlpack(a.logits), axis=a.axis)


def _cupy_cross_entropy(a: Any) -> Call:
    import cupy
    from cupyx.scipy.special import logsumexp

    logits = cupy.from_dlpack(a.logits)
    labels = cupy.expand_dims(cupy.from_dlpack(a.labels), a.axis)

    def call() -> Any:
        at_label = cupy.take_along_axis(logits, labels, axis=a.axis)
        return cupy.mean(logsumexp(logits, axis=a.axis, keepdims=True) - at_label)

    return call


CUPY = Peer(
    "cupy",
    "cupy",
    {"log_softmax": _cupy_log_softmax, "cross_entropy": _cupy_cross_entropy},
    frozenset({"float32", "float64"}),
)


# ---------------------------------------------------------------------------------------------
# Triton: one program a row, the row in two passes with a running maximum and sum


def _triton_log_softmax(a: Any) -> Call:
    from benchmarks.triton_kernel import log_softmax

    if a.axis != len(a.shape) - 1:
        raise NotImplementedError("rows only")
    classes = a.shape[-1]
    return partial(log_softmax, a.logits.reshape(-1, classes), a.out.reshape(-1, classes), a.out)


TRITON = Peer(
    "triton",
    "triton",
    {"log_softmax": _triton_log_softmax},
    frozenset(TOLERANCE),
)


# ---------------------------------------------------------------------------------------------
# Liger: the gradient overwrites the logits, so it has an array of its own to overwrite


def _liger_value_and_grad(a: Any) -> Call:
    import torch
    from liger_kernel.transformers.functional import liger_cross_entropy

    fresh = a.logits.clone()

    def call() -> Any:
        leaf = fresh.detach().requires_grad_()
        loss = liger_cross_entropy(leaf, a.labels)
        return loss, torch.autograd.grad(loss, leaf)[0]

    return call


LIGER = Peer(
    "liger",
    "liger_kernel",
    {"value_and_grad": _liger_value_and_grad},
    frozenset({"float32", "float16", "bfloat16"}),
)


# ---------------------------------------------------------------------------------------------
# Quack


def _quack_cross_entropy(a: Any) -> Call:
    from quack.cross_entropy import cross_entropy

    return partial(cross_entropy, a.logits, a.labels)


def _quack_value_and_grad(a: Any) -> Call:
    import torch
    from quack.cross_entropy import cross_entropy

    leaf = a.logits.detach().requires_grad_()

    def call() -> Any:
        loss = cross_entropy(leaf, a.labels)
        return loss, torch.autograd.grad(loss, leaf)[0]

    return call


def _quack_backward(a: Any) -> Call:
    import torch
    from quack.cross_entropy import cross_entropy_bwd

    scale = torch.full_like(a.lse, 1 / a.labels.numel(), dtype=torch.float32)
    return partial(cross_entropy_bwd, a.logits, a.labels, scale, a.lse.float())


QUACK = Peer(
    "quack",
    "quack",
    {
        "cross_entropy": _quack_cross_entropy,
        "cross_entropy_backward": _quack_backward,
        "value_and_grad": _quack_value_and_grad,
    },
    frozenset({"float32", "float16", "bfloat16"}),
)

CUDA_PEERS = {peer.name: peer for peer in (CUPY, TORCH, TORCH_COMPILE, TRITON, LIGER, QUACK)}
