"""log_softmax of rows as one writes it in Triton: any number of classes, two passes over a row."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    # No other annotations: Triton looks up what they name when it compiles.
    @triton.jit
    def rows(x, out, classes, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        x += row * classes
        out += row * classes
        lanes = tl.arange(0, BLOCK)
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, classes, BLOCK):
            at = start + lanes
            value = tl.load(x + at, at < classes, other=float("-inf")).to(tl.float32)
            new = tl.maximum(top, value)
            base = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp(top - base) + tl.exp(value - base)
            top = new
        highest = tl.max(top, 0)
        log_sum = tl.log(tl.sum(total * tl.exp(top - highest), 0))
        for start in range(0, classes, BLOCK):
            at = start + lanes
            value = tl.load(x + at, at < classes).to(tl.float32)
            result = (value - highest) - log_sum
            tl.store(out + at, result.to(out.dtype.element_ty), at < classes)

    return rows


def log_softmax(x: Any, out: Any, result: Any) -> Any:
    """Fill `out` (rows, classes) from `x` of the same shape; give `result`, a view of `out`."""
    count, classes = x.shape
    block = min(8192, 1 << max(4, (classes - 1).bit_length()))
    warps = min(16, max(1, block // 256))
    _kernel()[(count,)](x, out, classes, BLOCK=block, num_warps=warps)
    return result
