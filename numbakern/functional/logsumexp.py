"""Logarithm of a sum of exponentials."""

from typing import Any

from numbakern import arrays, dispatch


def logsumexp(
    x: Any,
    axis: int | tuple[int, ...] | None = -1,
    *,
    keepdims: bool = False,
    dtype: Any = None,
    out: Any = None,
) -> Any:
    r"""Logarithm of the sum of exponentials along an axis.

    .. math:: \log \sum_j e^{x_j} = m + \log \sum_j e^{x_j - m}, \qquad m = \max_j x_j

    Parameters
    ----------
    x : array_like
        Of any shape. float16 and bfloat16 are computed in float32; integers and bool in float64.
    axis : int, tuple of int or None, default: -1
        The axis or axes to sum over; None stands for all.
    keepdims : bool, default: False
        Whether the axes summed over stay, with length 1.
    dtype : dtype, optional
        Floating type to compute for: x is converted as it is read, without a copy.
    out : array, optional
        Where to put the result: of the result's shape and dtype.

    Returns
    -------
    array or scalar
        float64 for float64, integers and bool, else float32. NaN for a row with NaN, else +inf
        for one with +inf; −inf for a row of −inf alone or of no elements.

    Raises
    ------
    TypeError
        If x is no array of a supported dtype, `dtype` not a floating one, or `out` of another
        dtype.
    ValueError
        If `out` has another shape, is read-only or overlaps itself, or an axis is named twice.
    numpy.exceptions.AxisError
        If an axis is out of range.

    See Also
    --------
    log_softmax, cross_entropy

    References
    ----------
    .. [1] P. Blanchard, D. J. Higham, N. J. Higham, "Accurately computing the log-sum-exp and
       softmax functions", IMA J. Numer. Anal. 41 (2021), doi:10.1093/imanum/draa038.

    Examples
    --------
    >>> import numpy as np
    >>> import numbakern
    >>> numbakern.logsumexp(np.array([[1000.0, 1000.0], [0.0, -np.inf]]))
    array([1000.69314718,    0.        ])
    """
    target = dispatch.target_of(x=x, out=out)
    if target.again:
        known = target.again("logsumexp", axis, keepdims, dtype)
        if known is not None:
            return known
    x = target.asarray("x", x)
    kind = arrays.result_kind(dtype, arrays.supported("x", x))
    axes = arrays.axes_of(axis, x.ndim)
    shape = arrays.reduced_shape(x.shape, axes, arrays.truth("keepdims", keepdims))
    checked: Any = None if out is None else arrays.output(target, out, shape, kind.loss)
    result = target.logsumexp(x, axes, kind.compute, kind.loss).reshape(shape)
    if out is None:
        return arrays.as_result(result, out)
    checked[...] = result
    return out
