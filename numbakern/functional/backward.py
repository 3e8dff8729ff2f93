"""What the backwards of log_softmax and softmax share: the checks and the call."""

from typing import Any

from numbakern import arrays, dispatch


def backward(operation: str, grad_output: Any, output: Any, axis: int, out: Any) -> Any:
    """`operation` on an upstream gradient and an output of the same shape and dtype."""
    target = dispatch.target_of(grad_output=grad_output, output=output, out=out)
    if target.again:
        known = target.again(operation, axis)
        if known is not None:
            return known
    grad_output = target.asarray("grad_output", grad_output)
    output = target.asarray("output", output)
    arrays.supported("grad_output", grad_output)
    kind = arrays.supported("output", output)
    arrays.same_shape("grad_output", grad_output.shape, output.shape, "output")
    if grad_output.dtype.newbyteorder("=") != output.dtype.newbyteorder("="):
        raise TypeError(
            f"grad_output: expected dtype {output.dtype} as output, got {grad_output.dtype}"
        )
    axes = (arrays.integer_axis(axis, output.ndim),) if output.ndim else arrays.axes_of(axis, 0)
    result = arrays.output(target, out, output.shape, kind.result)
    target.backward(operation, grad_output, output, axes, kind.compute, result)
    return arrays.as_result(result, out)
