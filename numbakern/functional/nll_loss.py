"""Negative log-likelihood and its gradient."""

from typing import Any

from numbakern import arrays, dispatch


def nll_loss(
    log_probs: Any,
    labels: Any,
    *,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    axis: int = 1,
) -> Any:
    r"""Negative log-likelihood of class labels, given log-probabilities.

    .. math:: \ell_n = -w_{t_n} \log p_{n, t_n}

    Parameters
    ----------
    log_probs : array_like
        Log-probabilities, (N, C, d1, …, dk) with C classes at `axis`; (C,) is the unbatched case.
    labels : array_like of int
        Class labels t of any integer type, of log_probs' shape without the class axis.
    weight : array_like, optional
        A weight w for each class, (C,), rounded to the type computed in.
    ignore_index : int, default: -100
        Rows with this label count nothing: loss 0, and left out of the mean.
    reduction : {"mean", "sum", "none"}, default: "mean"
        "mean" divides the sum by Σ w[t] over the rows that count; "none" gives the losses.
    axis : int, default: 1
        The class axis; -1 for the (…, C) layout.

    Returns
    -------
    scalar or array
        float64 for float64 and integers, else float32. The mean of nothing is NaN, and so is a
        row's loss where a weight of 0 meets an infinite log p, as in PyTorch.

    Raises
    ------
    TypeError
        If an argument is no array of a supported dtype, or the labels, `axis` or `ignore_index` are
        not integers.
    ValueError
        If shapes do not fit, or the reduction is unknown.
    IndexError
        If a label is neither in [0, C) nor `ignore_index`; names its position and value.
    numpy.exceptions.AxisError
        If the axis is out of range.

    See Also
    --------
    nll_loss_backward, cross_entropy

    References
    ----------
    .. [1] ONNX operator NegativeLogLikelihoodLoss, whose semantics these are.

    Examples
    --------
    >>> import numpy as np
    >>> import numbakern
    >>> log_probs = np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    >>> float(numbakern.nll_loss(log_probs, [1, -100]) / np.log(2.0))
    2.0
    """
    target = dispatch.target_of(log_probs=log_probs, labels=labels, weight=weight)
    if target.again:
        known = target.again("nll_loss", ignore_index, reduction, axis)
        if known is not None:
            return known
    log_probs = target.asarray("log_probs", log_probs)
    labels = arrays.labels_of(target, labels, log_probs.shape)
    kind, axis, _, ignore_index, _ = arrays.loss_options(
        "log_probs", log_probs, labels, False, ignore_index, reduction, 0.0, axis
    )
    weight = arrays.check_weight(target, weight, log_probs.shape[axis])
    return target.nll_loss(
        log_probs, labels, axis, kind.compute, kind.loss, weight, ignore_index, reduction
    )


def nll_loss_backward(
    grad_output: Any,
    log_probs: Any,
    labels: Any,
    *,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    axis: int = 1,
    out: Any = None,
) -> Any:
    r"""Gradient of nll_loss with respect to the log-probabilities.

    .. math:: \frac{\partial L}{\partial \log p_{n, c}} = -g\, w_{t_n} [c = t_n] / W

    with W = Σ w[t] over the rows that count under "mean", else 1.

    Parameters
    ----------
    grad_output : array_like
        Upstream gradient g: a scalar for "mean" and "sum", of the labels' shape for "none".
    log_probs : array_like
        As in `nll_loss`; only its shape and dtype matter.
    labels : array_like of int
        As in `nll_loss`.
    weight : array_like, optional
        As in `nll_loss`.
    ignore_index : int, default: -100
        Rows with this label have gradient 0.
    reduction : {"mean", "sum", "none"}, default: "mean"
        That of the forward call.
    axis : int, default: 1
        The class axis.
    out : array, optional
        Where to put the result, of log_probs' shape and the result's dtype.

    Returns
    -------
    array
        Of log_probs' shape and dtype (float64 for integers).

    Raises
    ------
    TypeError
        If an argument is no array of a supported dtype, the labels, `axis` or `ignore_index` are
        not integers, or `out` has another dtype.
    ValueError
        If shapes do not fit, the reduction is unknown, or `out` is read-only or overlaps itself.
    IndexError
        If a label is neither in [0, C) nor `ignore_index`; `out` is not touched.
    numpy.exceptions.AxisError
        If the axis is out of range.

    See Also
    --------
    nll_loss

    References
    ----------
    .. [1] ONNX operator NegativeLogLikelihoodLoss, whose semantics these are.

    Examples
    --------
    >>> import numpy as np
    >>> import numbakern
    >>> numbakern.nll_loss_backward(1.0, np.zeros((2, 3)), [1, -100])
    array([[ 0., -1.,  0.],
           [ 0.,  0.,  0.]])
    """
    target = dispatch.target_of(
        grad_output=grad_output, log_probs=log_probs, labels=labels, weight=weight, out=out
    )
    if target.again:
        known = target.again("nll_loss_backward", ignore_index, reduction, axis)
        if known is not None:
            return known
    log_probs = target.asarray("log_probs", log_probs)
    labels = arrays.labels_of(target, labels, log_probs.shape)
    kind, axis, _, ignore_index, _ = arrays.loss_options(
        "log_probs", log_probs, labels, False, ignore_index, reduction, 0.0, axis
    )
    weight = arrays.check_weight(target, weight, log_probs.shape[axis])
    batch = arrays.batch_shape(log_probs.shape, axis)
    grad_output = arrays.check_grad_output(target, grad_output, reduction, batch)
    result = arrays.output(target, out, log_probs.shape, kind.result)
    target.nll_loss_backward(
        grad_output, labels, axis, kind.compute, weight, ignore_index, reduction, result
    )
    return arrays.as_result(result, out)
