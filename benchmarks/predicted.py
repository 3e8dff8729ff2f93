"""What the performance model says of a CUDA case, beside what was measured."""

from __future__ import annotations

import functools

from numbakern._roofline import Case

# The model's names of operations and types; the others are the same in both.
OPERATIONS = {
    "value_and_grad": "cross_entropy_value_and_grad",
    "cross_entropy_backward": "cross_entropy_backward-lse",
}


@functools.cache
def gpu_here() -> str | None:
    """The name under which the model knows the GPU of this machine; None if it knows none."""
    try:
        import torch

        from numbakern.cuda.model import GPUS

        found = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    except (ImportError, RuntimeError):
        return None
    return next((name for name in GPUS if name in found), None)


def in_copies(case: Case) -> float | None:
    """The predicted time in copies of the array; None where there is no prediction."""
    name = gpu_here()
    if name is None or len(case.shape) != 2:
        return None
    from numbakern.cuda import model, predictions

    rows, classes = case.shape if case.axis % 2 else case.shape[::-1]
    layout = "whole" if case.axis % 2 else "columns"
    gpu, kind = model.GPUS[name], predictions.DTYPES[case.dtype]
    operation = OPERATIONS.get(case.op, case.op)
    try:
        seconds = model.predict(gpu, operation, kind, rows, classes, layout).seconds
    except RuntimeError:  # nothing here that disassembles
        return None
    return seconds * gpu.copy / (2 * rows * classes * model.codegen.size_of(kind))
