"""The boring, independent definitions: what each function of numbakern has to give.

Plain NumPy, one line of mathematics after the other, slow where that is clearer, and nothing of
the package is imported. Everything is computed in ``work`` (float64, or ``np.longdouble`` where a
test counts ulps) and returned in it, whatever came in; types are not the reference's business.

Inputs pass through float64, because integers are computed in float64 by definition.
"""

from __future__ import annotations

import functools

import numpy as np

QUIET = {"all": "ignore"}


def quiet(function):
    """Infinities and NaN are ordinary values here: no floating-point warning."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with np.errstate(**QUIET):
            return function(*args, **kwargs)

    return wrapper


def exact(x, work=np.float64):
    return np.asarray(x).astype(np.float64).astype(work)


# --- the family over one axis, a tuple of axes, or all of them (None) ----------------------------


@quiet
def log_sum_rest(x, axis):
    """Return (m, log Σ exp(x - m)), kept as dimensions of size 1.

    A confident row has Σ exp(x - m) = 1 + 1e-35: the maximum is left out of the sum and log1p put
    in its place, or any working precision would give 0.
    """
    m = np.max(x, axis=axis, keepdims=True, initial=-np.inf)
    at_max = x == m
    count = np.sum(at_max, axis=axis, keepdims=True).astype(x.dtype)
    rest = np.sum(np.where(at_max, 0, np.exp(x - m)), axis=axis, keepdims=True)
    return m, np.log(count) + np.log1p(rest / count)


@quiet
def log_softmax(x, axis=-1, work=np.float64):
    x = exact(x, work)
    m, log_sum = log_sum_rest(x, axis)
    # NaN or +inf in the row, or nothing but -inf: not a distribution.
    return np.where(np.isfinite(m), (x - m) - log_sum, np.nan).astype(work)


@quiet
def softmax(x, axis=-1, work=np.float64):
    return np.exp(log_softmax(x, axis, work))


@quiet
def logsumexp(x, axis=-1, keepdims=False, work=np.float64):
    x = exact(x, work)
    m, log_sum = log_sum_rest(x, axis)
    value = np.where(np.isfinite(m), m + log_sum, m).astype(work)
    if keepdims:
        return value
    return np.squeeze(value, axis=tuple(range(x.ndim)) if axis is None else axis)


@quiet
def log_softmax_backward(grad_output, output, axis=-1, work=np.float64):
    g, y = exact(grad_output, work), exact(output, work)
    return g - np.exp(y) * np.sum(g, axis=axis, keepdims=True)


@quiet
def softmax_backward(grad_output, output, axis=-1, work=np.float64):
    g, y = exact(grad_output, work), exact(output, work)
    return y * (g - np.sum(g * y, axis=axis, keepdims=True))


# --- losses --------------------------------------------------------------------------------------


def rows_of(x, axis, work):
    """View (…, C, …) as (rows, C), and say how a (rows, C) array becomes (…, C, …) again."""
    x = exact(x, work)
    axis = 0 if x.ndim == 1 else axis  # (C,) with a scalar label: the unbatched case
    last = np.moveaxis(x, axis, -1)
    rows = last.reshape(int(np.prod(last.shape[:-1])), last.shape[-1])
    return rows, last.shape, lambda r: np.moveaxis(np.reshape(r, last.shape), -1, axis)


def class_targets(labels, classes, weight, ignore_index, label_smoothing, work):
    """a[row, c] of the loss -Σ_c a[c]·logp[c], who counts, and the divisor of the mean."""
    labels = np.asarray(labels).reshape(-1)
    w = np.ones(classes, work) if weight is None else exact(weight, work)
    targets = np.zeros((len(labels), classes), work)
    counted = np.zeros(len(labels), bool)
    divisor = work(0)
    smoothing = work(label_smoothing)
    for row, label in enumerate(labels.tolist()):
        if label == ignore_index:
            continue
        if not 0 <= label < classes:
            raise IndexError(label)
        counted[row] = True
        targets[row] = smoothing / classes * w
        targets[row, label] += (1 - smoothing) * w[label]
        divisor += w[label]
    return targets, counted, divisor


def probability_targets(labels, axis, weight, label_smoothing, work):
    p, _, _ = rows_of(labels, axis, work)
    count, classes = p.shape
    w = np.ones(classes, work) if weight is None else exact(weight, work)
    smoothing = work(label_smoothing)
    targets = w * ((1 - smoothing) * p + smoothing / classes)
    return targets, np.ones(count, bool), work(count)


def is_probabilities(labels):
    return np.asarray(labels).dtype.kind not in "iu"


def mean_of(total, divisor):
    """Where nothing counts, and where weights sum to 0, there is no mean."""
    return total / divisor if divisor != 0 else total * np.nan


@quiet
def reduce_rows(row_losses, divisor, reduction, shape):
    if reduction == "none":
        return row_losses.reshape(shape[:-1])
    total = np.sum(row_losses)
    return total if reduction == "sum" else mean_of(total, divisor)


@quiet
def row_scales(grad_output, count, divisor, reduction, work):
    g = exact(grad_output, work)
    if reduction == "none":
        return g.reshape(-1)
    return np.full(count, g if reduction == "sum" else mean_of(g, divisor), work)


@quiet
def target_losses(logp, targets, counted, of):
    """-Σ a·logp of each row, over the classes that have a target: 0 times -inf is NaN."""
    return np.where(counted, -np.sum(np.where(of, targets * logp, 0), axis=1), 0)


def classes_with_targets(labels, classes, label_smoothing):
    """The label alone, unless labels are smoothed or probabilities."""
    if label_smoothing or is_probabilities(labels):
        return True
    return np.asarray(labels).reshape(-1, 1) == np.arange(classes)


@quiet
def nll_loss(
    log_probs, labels, weight=None, ignore_index=-100, reduction="mean", axis=1, work=np.float64
):
    logp, shape, _ = rows_of(log_probs, axis, work)
    targets, counted, divisor = class_targets(labels, shape[-1], weight, ignore_index, 0.0, work)
    losses = target_losses(logp, targets, counted, classes_with_targets(labels, shape[-1], 0.0))
    return reduce_rows(losses, divisor, reduction, shape)


@quiet
def nll_loss_backward(
    grad_output,
    log_probs,
    labels,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    axis=1,
    work=np.float64,
):
    logp, shape, back = rows_of(log_probs, axis, work)
    targets, counted, divisor = class_targets(labels, shape[-1], weight, ignore_index, 0.0, work)
    scale = row_scales(grad_output, len(logp), divisor, reduction, work)
    return back(np.where(targets == 0, 0, -targets * scale[:, None]))


@quiet
def cross_entropy(
    logits,
    labels,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    axis=1,
    work=np.float64,
):
    x, shape, _ = rows_of(logits, axis, work)
    if is_probabilities(labels):
        targets, counted, divisor = probability_targets(labels, axis, weight, label_smoothing, work)
    else:
        targets, counted, divisor = class_targets(
            labels, shape[-1], weight, ignore_index, label_smoothing, work
        )
    of = classes_with_targets(labels, shape[-1], label_smoothing)
    losses = target_losses(log_softmax(x, work=work), targets, counted, of)
    return reduce_rows(losses, divisor, reduction, shape)


@quiet
def cross_entropy_backward(
    grad_output,
    logits,
    labels,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    axis=1,
    work=np.float64,
):
    x, shape, back = rows_of(logits, axis, work)
    if is_probabilities(labels):
        targets, counted, divisor = probability_targets(labels, axis, weight, label_smoothing, work)
    else:
        targets, counted, divisor = class_targets(
            labels, shape[-1], weight, ignore_index, label_smoothing, work
        )
    p = softmax(x, work=work)
    grad = p * np.sum(targets, axis=1, keepdims=True) - targets
    if not is_probabilities(labels) and label_smoothing == 0.0:
        # At the label p - 1 cancels: it is the sum of the other probabilities.
        for row, label in enumerate(np.asarray(labels).reshape(-1).tolist()):
            if counted[row]:
                others = np.sum(np.delete(p[row], label))
                grad[row, label] = -others * targets[row, label]
    scale = row_scales(grad_output, len(x), divisor, reduction, work)
    # An ignored row is exactly 0, whatever it holds.
    return back(np.where(counted[:, None], grad * scale[:, None], 0))
