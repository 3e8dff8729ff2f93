"""The CPU target: NumPy arrays, Numba kernels, all cores.

`functional` checks what does not depend on the target and calls the functions below. Numba is
imported by the first call that computes something.
"""

import functools
import math

import numpy as np

from numbakern import arrays

__all__ = [
    "ARRAY_TYPES",
    "again",
    "asarray",
    "backward",
    "cache_folder",
    "cross_entropy",
    "empty",
    "logsumexp",
    "nll_loss",
    "nll_loss_backward",
    "softmax",
]

ARRAY_TYPES = np.ndarray
"""What `out=` may be."""
again = None  # no call is remembered as a whole
_I8, _F8 = np.dtype(np.int64), np.dtype(np.float64)
_LOWEST, _HIGHEST = -(2**63), 2**63 - 1
_NO_ARRAY = (TypeError, ValueError, RuntimeError, AttributeError, BufferError)
"""What libraries raise when NumPy cannot have their array."""


@functools.cache
def _launch():
    """The module that needs Numba, imported at the first call."""
    from numbakern.cpu import launch

    return launch


@functools.cache
def _rowwise():
    """The other such module that this one calls."""
    from numbakern.cpu import rowwise

    return rowwise


def cache_folder():
    """Folder of the compiled kernels, or None where none can be written."""
    from numbakern.cpu.compile import cache_folder as folder

    return folder()


def asarray(name, value):
    """What NumPy makes of the argument; TypeError if that is no array of a supported dtype."""
    try:
        return np.asarray(value)
    except _NO_ARRAY as error:
        reason = next(iter(str(error).splitlines()), "")
        raise TypeError(
            f"{name}: expected an array, got {type(value).__name__}: {reason}"
        ) from None


def empty(shape, dtype):
    """An array for results."""
    return np.empty(shape, dtype)


# ---------------------------------------------------------------- views


def _joined(array, axes):
    """A view with these axes joined as the last one; None if no view can be."""
    batch = [d for d in range(array.ndim) if d not in axes]
    size, stride = 1, array.itemsize
    for d in reversed(axes):
        if array.shape[d] == 1:
            continue
        if size != 1 and array.strides[d] != stride * size:
            return None
        if size == 1:
            stride = array.strides[d]
        size *= array.shape[d]
    shape = (*(array.shape[d] for d in batch), size)
    strides = (*(array.strides[d] for d in batch), stride)
    return np.lib.stride_tricks.as_strided(array, shape, strides, writeable=array.flags.writeable)


def _one_axis(array, axes):
    """The array with one class axis, and which; a view, or a copy where no view can be."""
    if len(axes) == 1:
        return array, axes[0]
    view = _joined(array, axes)
    if view is None:
        batch = [d for d in range(array.ndim) if d not in axes]
        order = (*batch, *axes)
        shape = (*(array.shape[d] for d in batch), -1)
        view = np.ascontiguousarray(array.transpose(order)).reshape(shape)
    return view, view.ndim - 1


def _apart(array, out):
    """The array, copied if it overlaps `out` without being the same elements in the same places."""
    if array is None or array is out or (array.flags.owndata and out.flags.owndata):
        return array
    if not np.may_share_memory(array, out):
        return array
    same = (
        array.ctypes.data == out.ctypes.data
        and array.shape == out.shape
        and array.strides == out.strides
        and array.itemsize == out.itemsize
    )
    return array if same else array.copy()


# ---------------------------------------------------------------- whole arrays


def softmax(operation, x, axes, compute, out):
    """log_softmax or softmax (`operation`) of x along these axes into `out`."""
    if out.size == 0:
        return
    if out is not x:
        x = _apart(x, out)
    if len(axes) == 1:
        _transform(operation, x, None, axes[0], compute, out)
        return
    x, axis = _one_axis(x, axes)
    target = _joined(out, axes)
    result = np.empty(x.shape, out.dtype) if target is None else target
    _transform(operation, x, None, axis, compute, result)
    if target is None:
        order = (*(d for d in range(out.ndim) if d not in axes), *axes)
        moved = out.transpose(order)
        moved[...] = result.reshape(moved.shape)


def backward(operation, grad_output, output, axes, compute, out):
    """log_softmax_backward or softmax_backward (`operation`) into `out`; `axes` are one or none."""
    if out.size:
        grad_output, output = _apart(grad_output, out), _apart(output, out)
        views = [_one_axis(a, axes)[0] for a in (grad_output, output)]
        out, axis = (out, *axes) if axes else (_joined(out, axes), 0)
        _transform(operation, *views, axis, compute, out)


def _transform(operation, x, y, axis, compute, out):
    y_key = (None, None) if y is None else (y.dtype, y.strides)
    plan = _launch().plan(
        operation, (), x.shape, axis, compute, x.dtype, x.strides, *y_key, out.dtype, out.strides
    )
    _launch().call(plan, x, y, out)


def logsumexp(x, axes, compute, dtype):
    """log Σ exp(x) over these axes, without them."""
    batch = tuple(n for d, n in enumerate(x.shape) if d not in axes)
    if x.size == 0:
        return np.full(batch, -np.inf, dtype)
    x, axis = _one_axis(x, axes)
    plan = _launch().plan("logsumexp", (), x.shape, axis, compute, x.dtype, x.strides)
    lse = np.empty(plan.rows)
    _launch().call(plan, x, row_lse=lse)
    return _rounded(_by_batch(lse, plan), dtype)


# ---------------------------------------------------------------- one value a row


def _by_row(array, order, dtype):
    """One value a row, contiguous, in the order in which a plan walks the rows."""
    if array.dtype is dtype and array.ndim == 1 and array.flags.carray:
        return array
    if order is not None:
        array = array.transpose(order)
    return np.ascontiguousarray(array, dtype).reshape(-1)


def _by_batch(rows, plan):
    """The inverse of `_by_row`: values a row as an array of the batch's shape."""
    if plan.order is None:
        return rows.reshape(plan.batch)
    moved = rows.reshape([plan.batch[d] for d in plan.order])
    return np.ascontiguousarray(moved.transpose(np.argsort(plan.order)))


class _Labels:
    """Checked class labels in a plan's order, and how many are not ignored."""

    def __init__(self, labels, order, classes, ignore_index):
        self.ignored, clipped = ignore_index, labels
        narrow = labels.dtype.kind == "i" or np.can_cast(labels.dtype, _I8)
        if not narrow or not _LOWEST <= ignore_index <= _HIGHEST:
            # As int64: −1 for the ignored label, −2 for another that is no class.
            clipped = np.array(labels, _I8)
            clipped[(labels < 0) | (labels >= classes)] = -2
            clipped[labels == ignore_index] = self.ignored = -1
        self.values = _by_row(clipped, order, _I8)
        good, self.count = _rowwise().scan(self.values, classes, self.ignored)
        if not good:
            bad = (clipped != self.ignored) & ((clipped < 0) | (clipped >= classes))
            position = tuple(int(i) for i in np.argwhere(bad)[0])
            raise arrays.bad_label(position, int(labels[position]), classes, ignore_index)

    def weight_of(self, weight):
        """Σ of the weights of the labels that are not ignored."""
        if weight is None:
            return float(self.count)
        return _rowwise().weigh(self.values, self.ignored, weight)


def _divide(a, b):
    """a / b; by 0 NaN, the mean of nothing."""
    return a / b if b != 0.0 else math.nan


def _reduce(rows, plan, reduction, divisor, dtype):
    """Losses a row (float64, in a plan's order) to the loss."""
    if reduction == "none":
        losses = _rounded(_by_batch(rows, plan), dtype)
        return losses if plan.batch else losses[()]
    losses = rows if plan.order is None else _by_batch(rows, plan)
    value = _rowwise().total(losses) if losses.size else 0.0
    if reduction == "mean":
        value = _divide(value, divisor)
    if abs(value) < _SAFE:  # the common case, without an error state
        return dtype.type(value)
    return _rounded(np.float64(value), dtype)


def _rounded(values, dtype):
    """float64 as the result's type, silently where that overflows."""
    if dtype == np.float64:
        return values
    with np.errstate(all="ignore"):
        return values.astype(dtype)


_SAFE = float(np.finfo(np.float32).max) / 2


def _upstream(grad_output, order, reduction):
    """The upstream gradient as (common factor, values a row or None)."""
    if reduction == "none" and grad_output.ndim:
        return 1.0, _by_row(grad_output, order, _F8)
    return float(grad_output[()]), None


_DTYPE = {"f4": np.dtype(np.float32), "f8": np.dtype(np.float64)}


def _class_weights(weight, compute):
    """The class weights in the type computed in, apart from any output; None stays None."""
    if weight is None:
        return None
    with np.errstate(all="ignore"):
        return np.array(weight, _DTYPE[compute], order="C")


def nll_loss(log_probs, labels, axis, compute, dtype, weight, ignore_index, reduction):
    """Negative log-likelihood of the labels."""
    weight = _class_weights(weight, compute)
    plan = _launch().plan(
        "nll",
        (),
        log_probs.shape,
        axis,
        compute,
        log_probs.dtype,
        log_probs.strides,
        weighted=weight is not None,
    )
    checked = _Labels(labels, plan.order, log_probs.shape[axis], ignore_index)
    losses = np.empty(plan.rows)
    _launch().call(
        plan,
        log_probs,
        labels=checked.values,
        weight=weight,
        row_loss=losses,
        ignore_index=checked.ignored,
    )
    divisor = checked.weight_of(weight) if reduction == "mean" else 1.0
    return _reduce(losses, plan, reduction, divisor, dtype)


def nll_loss_backward(grad_output, labels, axis, compute, weight, ignore_index, reduction, out):
    """Gradient of `nll_loss` into `out`: zero but at the labels."""
    weight = _class_weights(weight, compute)
    plan = _launch().plan(
        "nll_backward",
        (),
        out.shape,
        axis,
        compute,
        out.dtype,
        out.strides,
        None,
        None,
        out.dtype,
        out.strides,
        weight is not None,
    )
    grad_output, labels = _apart(grad_output, out), _apart(labels, out)
    checked = _Labels(labels, plan.order, out.shape[axis], ignore_index)
    scale, row_scale = _upstream(grad_output, plan.order, reduction)
    if reduction == "mean":
        scale = _divide(scale, checked.weight_of(weight))
    if _is_dense(out):
        _rowwise().clear_array(out)
    else:
        out[...] = 0
    _launch().call(
        plan,
        out,
        None,
        out,
        labels=checked.values,
        weight=weight,
        row_scale=row_scale,
        ignore_index=checked.ignored,
        scale=scale,
    )


def _is_dense(array):
    """Whether the elements fill one stretch of memory that starts with the first."""
    axes = sorted(range(array.ndim), key=lambda d: -array.strides[d])
    return array.transpose(axes).flags.c_contiguous


def cross_entropy(
    logits,
    labels,
    soft,
    axis,
    compute,
    dtype,
    weight,
    ignore_index,
    reduction,
    smoothing,
    *,
    with_loss,
    with_lse=False,
    grad_output=None,
    lse=None,
    out=None,
):
    """Cross-entropy: the loss, the rows' log-sum-exp, the gradient into `out`, as asked for.

    Returns
    -------
    loss, lse
        None for what was not asked for.
    """
    x, classes = logits, logits.shape[axis]
    if out is not None and out.size:
        x, labels, lse = _apart(x, out), _apart(labels, out), _apart(lse, out)
        grad_output = _apart(grad_output, out)
    weight, weight_sum = _class_weights(weight, compute), float(classes)
    if weight is not None:
        with np.errstate(all="ignore"):
            # Without smoothing none but the label's own counts, whatever the others are.
            weight_sum = float(weight.sum(dtype=np.float64)) if smoothing else 0.0
    smooth = smoothing > 0.0 and not soft
    options = (soft, smooth, with_loss, out is not None, lse is not None)
    plan = _launch().plan(
        "cross_entropy",
        options,
        x.shape,
        axis,
        compute,
        x.dtype,
        x.strides,
        labels.dtype if soft else None,
        labels.strides if soft else None,
        None if out is None else out.dtype,
        None if out is None else out.strides,
        weight is not None,
    )
    rows, checked, divisor = plan.rows, None, float(plan.rows)
    if not soft:
        checked = _Labels(labels, plan.order, classes, ignore_index)
        if reduction == "mean":
            divisor = checked.weight_of(weight)
    scale, row_scale = 1.0, None
    if grad_output is not None:
        scale, row_scale = _upstream(grad_output, plan.order, reduction)
    if reduction == "mean":
        scale = _divide(scale, divisor)
    losses = None
    if with_loss:
        losses = np.empty(rows) if classes else np.zeros(rows)
    row_lse = None
    if lse is not None:
        row_lse = _by_row(lse, plan.order, _F8)
    elif with_lse:
        row_lse = np.full(rows, -np.inf)
    if classes:
        _launch().call(
            plan,
            x,
            labels if soft else None,
            out,
            labels=None if soft else checked.values,
            weight=weight,
            row_scale=row_scale,
            row_lse=row_lse,
            row_loss=losses,
            ignore_index=0 if soft else checked.ignored,
            scale=scale,
            keep=1.0 - smoothing,
            spread=_divide(smoothing, classes),
            weight_sum=weight_sum,
        )
    loss = None
    if with_loss:
        loss = _reduce(losses, plan, reduction, divisor, dtype)
    if not with_lse:
        return loss, None
    lse = _by_batch(row_lse, plan)
    return loss, lse if plan.batch else lse[()]
