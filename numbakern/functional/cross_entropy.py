"""Cross-entropy of logits, its gradient, and both in one pass."""

from typing import Any, NamedTuple

from numbakern import arrays, dispatch


class _Checked(NamedTuple):
    """The arguments that the three functions share, as a target takes them."""

    logits: Any
    labels: Any
    soft: bool
    axis: int
    compute: str
    dtype: Any
    weight: Any
    ignore_index: int
    reduction: str
    smoothing: float


def _check(
    target: Any,
    logits: Any,
    labels: Any,
    weight: Any,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    axis: int,
) -> tuple[_Checked, Any]:
    logits = target.asarray("logits", logits)
    labels = arrays.labels_of(target, labels, logits.shape)
    kind, axis, soft, ignore_index, smoothing = arrays.loss_options(
        "logits", logits, labels, True, ignore_index, reduction, label_smoothing, axis
    )
    weight = arrays.check_weight(target, weight, logits.shape[axis])
    checked = _Checked(
        logits,
        labels,
        soft,
        axis,
        kind.compute,
        kind.loss,
        weight,
        ignore_index,
        reduction,
        smoothing,
    )
    return checked, kind.result


def cross_entropy(
    logits: Any,
    labels: Any,
    *,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    axis: int = 1,
    return_lse: bool = False,
) -> Any:
    r"""Cross-entropy between logits and class labels or class probabilities.

    For labels t, with weights w, smoothing ε and :math:`\log p = \mathrm{log\_softmax}(x)`,

    .. math::
        \ell_n = -(1 - \varepsilon)\, w_{t_n} \log p_{n, t_n}
                 - \frac{\varepsilon}{C} \sum_c w_c \log p_{n, c}

    and for probabilities q, with :math:`\tilde q = (1 - \varepsilon) q + \varepsilon / C`,

    .. math:: \ell_n = -\sum_c w_c\, \tilde q_{n, c} \log p_{n, c}

    The logits are read once and no log-probabilities are stored.

    Parameters
    ----------
    logits : array_like
        (N, C, d1, …, dk) with C classes at `axis`; (C,) is the unbatched case.
    labels : array_like
        Class labels t of any integer type, of the logits' shape without the class axis; or class
        probabilities q, a floating array of the logits' shape.
    weight : array_like, optional
        A weight w for each class, (C,), rounded to the type computed in.
    ignore_index : int, default: -100
        Rows with this label count nothing; does not apply to probabilities.
    reduction : {"mean", "sum", "none"}, default: "mean"
        "mean" divides the sum by Σ w[t] over the rows that count, for probabilities by the number
        of rows; "none" gives the losses.
    label_smoothing : float, default: 0.0
        ε in [0, 1].
    axis : int, default: 1
        The class axis; -1 for the (…, C) layout. Not looked at in the unbatched case.
    return_lse : bool, default: False
        Whether to return each row's log-sum-exp too, for `cross_entropy_backward`.

    Returns
    -------
    loss : scalar or array
        float64 for float64 and integers, else float32. The mean of nothing is NaN, and so is a
        row's loss where a weight or probability of 0 meets an infinite log p, as in PyTorch.
    lse : float64 scalar or array
        Only with `return_lse`: log Σ exp(x) of each row, of the labels' shape.

    Raises
    ------
    TypeError
        If an argument is no array of a supported dtype, labels are neither integers nor floats,
        `axis` or `ignore_index` is no integer, or `label_smoothing` no number.
    ValueError
        If shapes do not fit, or reduction or smoothing are not valid.
    IndexError
        If a label is neither in [0, C) nor `ignore_index`; names its position and value.
    numpy.exceptions.AxisError
        If the axis is out of range.

    See Also
    --------
    cross_entropy_backward, cross_entropy_value_and_grad, nll_loss

    References
    ----------
    .. [1] ONNX operator SoftmaxCrossEntropyLoss, whose semantics the labels have.
    .. [2] C. Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (2015),
       arXiv:1512.00567, for label smoothing.

    Examples
    --------
    >>> import numpy as np
    >>> import numbakern
    >>> logits = np.array([[0.0, -30.0], [np.log(3.0), 0.0]])
    >>> numbakern.cross_entropy(logits, [0, 1], reduction="none")
    array([9.35762297e-14, 1.38629436e+00])
    """
    target = dispatch.target_of(logits=logits, labels=labels, weight=weight)
    if target.again:
        known = target.again(
            "cross_entropy", ignore_index, reduction, label_smoothing, axis, return_lse
        )
        if known is not None:
            return known
    checked, _ = _check(
        target, logits, labels, weight, ignore_index, reduction, label_smoothing, axis
    )
    return_lse = arrays.truth("return_lse", return_lse)
    loss, lse = target.cross_entropy(*checked, with_loss=True, with_lse=return_lse)
    return (loss, lse) if return_lse else loss


def cross_entropy_backward(
    grad_output: Any,
    logits: Any,
    labels: Any,
    *,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    axis: int = 1,
    lse: Any = None,
    out: Any = None,
) -> Any:
    r"""Gradient of cross_entropy with respect to the logits.

    .. math:: \frac{\partial L}{\partial x_{n, c}} = \frac{g}{W} (Q_n\, p_{n, c} - q_{n, c})

    where q is what :math:`-\log p` is weighted with in the loss, Q its sum over the classes, and W
    the divisor of the mean, else 1. At the label, where p − 1 would cancel, minus the sum of the
    other probabilities is used.

    Parameters
    ----------
    grad_output : array_like
        Upstream gradient g: a scalar for "mean" and "sum", of the labels' shape for "none".
    logits, labels : array_like
        As in `cross_entropy`.
    weight : array_like, optional
        As in `cross_entropy`.
    ignore_index : int, default: -100
        Rows with this label have gradient 0.
    reduction : {"mean", "sum", "none"}, default: "mean"
        That of the forward call.
    label_smoothing : float, default: 0.0
        That of the forward call.
    axis : int, default: 1
        The class axis.
    lse : array_like, optional
        What `cross_entropy` with `return_lse` gave: spares the reduction over the classes.
    out : array, optional
        Where to put the result, of the logits' shape and the result's dtype. It may be the logits
        themselves.

    Returns
    -------
    array
        Of the logits' shape and dtype (float64 for integers).

    Raises
    ------
    TypeError
        If an argument is no array of a supported dtype, labels are neither integers nor floats,
        `axis` or `ignore_index` is no integer, `label_smoothing` no number, or `out` has another
        dtype.
    ValueError
        If shapes do not fit, reduction or smoothing are not valid, or `out` is read-only or
        overlaps itself.
    IndexError
        If a label is neither in [0, C) nor `ignore_index`; `out` is not touched.
    numpy.exceptions.AxisError
        If the axis is out of range.

    See Also
    --------
    cross_entropy, cross_entropy_value_and_grad

    References
    ----------
    .. [1] I. Goodfellow, Y. Bengio, A. Courville, "Deep Learning", MIT Press (2016), section 6.2.

    Examples
    --------
    >>> import numpy as np
    >>> import numbakern
    >>> logits = np.array([[0.0, np.log(3.0)]])
    >>> loss, lse = numbakern.cross_entropy(logits, [1], return_lse=True)
    >>> numbakern.cross_entropy_backward(1.0, logits, [1], lse=lse)
    array([[ 0.25, -0.25]])
    """
    target = dispatch.target_of(
        grad_output=grad_output, logits=logits, labels=labels, weight=weight, lse=lse, out=out
    )
    if target.again:
        known = target.again(
            "cross_entropy_backward", ignore_index, reduction, label_smoothing, axis
        )
        if known is not None:
            return known
    checked, dtype = _check(
        target, logits, labels, weight, ignore_index, reduction, label_smoothing, axis
    )
    shape = checked.logits.shape
    batch = arrays.batch_shape(shape, checked.axis)
    grad_output = arrays.check_grad_output(target, grad_output, reduction, batch)
    lse = arrays.check_lse(target, lse, batch)
    result = arrays.output(target, out, shape, dtype)
    target.cross_entropy(*checked, with_loss=False, grad_output=grad_output, lse=lse, out=result)
    return arrays.as_result(result, out)


def cross_entropy_value_and_grad(
    logits: Any,
    labels: Any,
    *,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    axis: int = 1,
    out: Any = None,
) -> tuple[Any, Any]:
    r"""Cross-entropy and its gradient with respect to the logits, in one pass: the training step.

    Each row of the logits is read once from memory and its gradient written once. The loss is that
    of `cross_entropy`, the gradient that of `cross_entropy_backward` with upstream gradient 1; with
    ``reduction="none"`` the losses, and the gradient of their sum.

    Parameters
    ----------
    logits, labels : array_like
        As in `cross_entropy`.
    weight : array_like, optional
        As in `cross_entropy`.
    ignore_index : int, default: -100
        Rows with this label have loss 0 and gradient 0.
    reduction : {"mean", "sum", "none"}, default: "mean"
        As in `cross_entropy`.
    label_smoothing : float, default: 0.0
        As in `cross_entropy`.
    axis : int, default: 1
        The class axis.
    out : array, optional
        Where to put the gradient. ``out=logits`` overwrites the logits with it.

    Returns
    -------
    loss : scalar or array
        As `cross_entropy` returns it.
    grad : array
        Of the logits' shape and dtype (float64 for integers).

    Raises
    ------
    TypeError
        If an argument is no array of a supported dtype, labels are neither integers nor floats,
        `axis` or `ignore_index` is no integer, `label_smoothing` no number, or `out` has another
        dtype.
    ValueError
        If shapes do not fit, reduction or smoothing are not valid, or `out` is read-only or
        overlaps itself.
    IndexError
        If a label is neither in [0, C) nor `ignore_index`; `out` is not touched.
    numpy.exceptions.AxisError
        If the axis is out of range.

    See Also
    --------
    cross_entropy, cross_entropy_backward

    References
    ----------
    .. [1] I. Goodfellow, Y. Bengio, A. Courville, "Deep Learning", MIT Press (2016), section 6.2.

    Examples
    --------
    >>> import numpy as np
    >>> import numbakern
    >>> loss, grad = numbakern.cross_entropy_value_and_grad(np.array([[0.0, np.log(3.0)]]), [1])
    >>> float(loss) == float(-np.log(0.75))
    True
    >>> grad
    array([[ 0.25, -0.25]])
    """
    target = dispatch.target_of(logits=logits, labels=labels, weight=weight, out=out)
    if target.again:
        known = target.again(
            "cross_entropy_value_and_grad", ignore_index, reduction, label_smoothing, axis
        )
        if known is not None:
            return known
    checked, dtype = _check(
        target, logits, labels, weight, ignore_index, reduction, label_smoothing, axis
    )
    grad = arrays.output(target, out, checked.logits.shape, dtype)
    loss, _ = target.cross_entropy(*checked, with_loss=True, out=grad)
    return loss, arrays.as_result(grad, out)
