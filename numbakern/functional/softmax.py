"""Softmax and its gradient."""

from typing import Any

from numbakern import arrays, dispatch
from numbakern.functional.backward import backward


def softmax(
    x: Any, axis: int | tuple[int, ...] | None = -1, *, dtype: Any = None, out: Any = None
) -> Any:
    r"""Softmax along an axis.

    .. math:: p_i = \frac{e^{x_i - m}}{\sum_j e^{x_j - m}}, \qquad m = \max_j x_j

    Parameters
    ----------
    x : array_like
        Logits, of any shape. float16 and bfloat16 are computed in float32; integers and bool in
        float64.
    axis : int, tuple of int or None, default: -1
        The class axis or axes; None stands for all.
    dtype : dtype, optional
        Floating type to compute for: x is converted as it is read, without a copy.
    out : array, optional
        Where to put the result: of x's shape and the result's dtype. It may be x itself.

    Returns
    -------
    array
        Of x's shape; x's dtype, or float64 for integers and bool. Exactly 0 where x is −inf; a
        row with NaN or +inf, or of −inf alone, is NaN.

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
    softmax_backward, log_softmax

    References
    ----------
    .. [1] P. Blanchard, D. J. Higham, N. J. Higham, "Accurately computing the log-sum-exp and
       softmax functions", IMA J. Numer. Anal. 41 (2021), doi:10.1093/imanum/draa038.

    Examples
    --------
    >>> import numpy as np
    >>> import numbakern
    >>> numbakern.softmax(np.array([1000.0, 1000.0, -np.inf, 1000.0, 1000.0]))
    array([0.25, 0.25, 0.  , 0.25, 0.25])
    """
    target = dispatch.target_of(x=x, out=out)
    if target.again:
        known = target.again("softmax", axis, dtype)
        if known is not None:
            return known
    x = target.asarray("x", x)
    kind = arrays.result_kind(dtype, arrays.supported("x", x))
    axes = arrays.axes_of(axis, x.ndim)
    result = arrays.output(target, out, x.shape, kind.result)
    target.softmax("softmax", x, axes, kind.compute, result)
    return arrays.as_result(result, out)


def softmax_backward(grad_output: Any, output: Any, axis: int = -1, *, out: Any = None) -> Any:
    r"""Gradient of softmax with respect to its input.

    .. math:: \frac{\partial L}{\partial x_i} = y_i \Big(g_i - \sum_j g_j y_j\Big)

    Parameters
    ----------
    grad_output : array_like
        Gradient g of the loss with respect to the output.
    output : array_like
        The output y of `softmax`, of the same shape and dtype.
    axis : int, default: -1
        The class axis.
    out : array, optional
        Where to put the result; it may be either input itself.

    Returns
    -------
    array
        Of the inputs' shape and dtype (float64 for integers and bool).

    Raises
    ------
    TypeError
        If an input is no array of a supported dtype, the dtypes differ, or `out` has another one.
    ValueError
        If the shapes differ, or `out` is read-only or overlaps itself.
    numpy.exceptions.AxisError
        If the axis is out of range.

    See Also
    --------
    softmax

    References
    ----------
    .. [1] I. Goodfellow, Y. Bengio, A. Courville, "Deep Learning", MIT Press (2016), section 6.2.

    Examples
    --------
    >>> import numpy as np
    >>> import numbakern
    >>> y = numbakern.softmax(np.array([0.0, np.log(3.0)]))
    >>> numbakern.softmax_backward(np.array([0.0, 1.0]), y)
    array([-0.1875,  0.1875])
    """
    return backward("softmax_backward", grad_output, output, axis, out)
