"""The cases that a release is judged by, with what each must reach and what it aims at."""

from __future__ import annotations

from dataclasses import dataclass

from numbakern._roofline import Case

WIDE, SHORT, TEN, IMAGE, SMALL = (
    (1024, 32000),
    (4096, 1000),
    (32768, 10),
    (4, 21, 512, 512),
    (8, 10),
)


@dataclass(frozen=True)
class Bound:
    """A case with the figure it must reach and the one it aims at.

    `unit` is "x copy" (multiples of a copy of the array) or "us" (microseconds a call).
    """

    case: Case
    must: float
    goal: float
    unit: str = "x copy"


CPU = (
    Bound(Case("log_softmax", WIDE), 1.25, 1.05),
    Bound(Case("log_softmax_fresh", WIDE), 2.6, 1.3),
    Bound(Case("log_softmax_backward", WIDE), 1.9, 1.5),
    Bound(Case("cross_entropy_backward", WIDE), 1.3, 1.05),
    Bound(Case("value_and_grad", WIDE), 1.4, 1.1),
    Bound(Case("cross_entropy", WIDE), 0.8, 0.55),
    Bound(Case("nll_loss", WIDE), 0.03, 0.01),
    Bound(Case("nll_loss_backward", WIDE), 0.7, 0.5),
    Bound(Case("log_softmax", WIDE, "bfloat16"), 2.0, 1.2),
    Bound(Case("value_and_grad", WIDE, "bfloat16"), 2.2, 1.4),
    Bound(Case("log_softmax", WIDE, "float16"), 2.0, 1.2),
    Bound(Case("value_and_grad", WIDE, "float16"), 2.2, 1.4),
    Bound(Case("log_softmax", WIDE, "float64"), 1.5, 1.1),
    Bound(Case("log_softmax", SHORT), 1.6, 1.1),
    Bound(Case("value_and_grad", SHORT), 1.8, 1.2),
    Bound(Case("log_softmax", TEN), 5.0, 2.0),
    Bound(Case("value_and_grad", TEN), 8.0, 3.0),
    Bound(Case("log_softmax", IMAGE, axis=1), 1.5, 1.1),
    Bound(Case("value_and_grad", IMAGE, axis=1), 1.8, 1.2),
    Bound(Case("log_softmax", SMALL), 8.0, 3.0, "us"),
    Bound(Case("log_softmax_fresh", SMALL), 8.0, 3.0, "us"),
    Bound(Case("value_and_grad", SMALL), 8.0, 3.0, "us"),
)

# On a GPU the bound is a share of the device's copy rate: 85 % (goal 97 %) for calls of two streams
# or more, 90 % (100 %) for the one that only reads. Time in copies of the array follows from it.
CUDA_CLASSES = (1000, 1024, 4096, 8192, 16384, 32768, 65536, 128256, 262144)
CUDA_DTYPES = ("float32", "float16", "bfloat16")
CUDA_ELEMENTS = 2**28
CUDA_STREAMS = {
    "log_softmax": 2,
    "log_softmax_backward": 3,
    "cross_entropy": 1,
    "cross_entropy_backward": 2,
    "value_and_grad": 2,
}


def cuda_bound(op: str, classes: int, dtype: str) -> Bound:
    """The bound of a call on 2**28 elements."""
    must, goal = (0.90, 1.00) if op == "cross_entropy" else (0.85, 0.97)
    streams = CUDA_STREAMS[op] / 2  # a copy is two
    return Bound(
        Case(op, (CUDA_ELEMENTS // classes, classes), dtype), streams / must, streams / goal
    )


CUDA = tuple(
    cuda_bound(op, classes, dtype)
    for dtype in CUDA_DTYPES
    for op in CUDA_STREAMS
    for classes in CUDA_CLASSES
)

# Seconds of a fresh process (must): none of them has a goal.
STARTUP = {"import": 0.06, "cold": 2.5, "warm": 0.5}
# Microseconds of the host for one call of a GPU (must, goal).
HOST_COST = (25.0, 8.0)


def verdict(value: float | None, must: float, goal: float | None) -> str:
    """`goal`, `must` or `missed`; `failed` where there is no figure."""
    if value is None:
        return "failed"
    if goal is not None and value <= goal:
        return "goal"
    return "must" if value <= must else "missed"
