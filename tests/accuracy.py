"""How many ulp off: every function on every family of rows, against long double.

``python -m tests.accuracy`` prints the table; ``test_accuracy.py`` holds the bounds. An error is
counted in units in the last place of the result's own type, at the true value.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

import numbakern
from tests import cases, reference
from tests.cases import bfloat16, float16, float32, float64

WORK = np.longdouble
HAS_LONG_DOUBLE = np.finfo(WORK).nmant >= 63  # 11 bits more than float64; not so on Windows

# --- the yardstick -------------------------------------------------------------------------------

# dtype: (bits of the fraction, exponent of the smallest normal number)
FORMATS = {float16: (10, -14), bfloat16: (7, -126), float32: (23, -126), float64: (52, -1022)}


def smallest_normal(dtype):
    return np.ldexp(WORK(1), FORMATS[dtype][1])


def ulp(value, dtype):
    """The distance between neighbours of ``dtype`` at ``value``."""
    fraction, smallest = FORMATS[np.dtype(dtype)]
    _, exponent = np.frexp(np.abs(np.where(np.isfinite(value), value, 1)).astype(WORK))
    return np.ldexp(WORK(1), np.maximum(exponent - 1, smallest) - fraction)


def errors(got, want, dtype, at=None, flushed=False):
    """Error of each element in ulp of ``at`` (the true value, if not given).

    ``flushed``: 0 is as good as the true value where that is below the smallest normal number.
    Infinities and NaN have to be the same, or the error is infinite.
    """
    got, want = reference.exact(got, WORK).ravel(), np.asarray(want, WORK).ravel()
    with np.errstate(all="ignore"):
        error = np.abs(got - want) / ulp(want if at is None else np.ravel(at), dtype)
    if flushed:
        error[(got == 0) & (np.abs(want) < smallest_normal(dtype))] = 0
    odd = ~np.isfinite(want)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    error[odd] = np.where(same[odd], 0, np.inf)
    error[~odd & ~np.isfinite(got)] = np.inf
    return error.astype(np.float64)


# --- families of rows ----------------------------------------------------------------------------


def scaled(scale):
    return lambda rng, rows, classes: rng.normal(0, scale, (rows, classes))


def offset(by):
    return lambda rng, rows, classes: by + rng.normal(0, 3, (rows, classes))


def confident(margin, others):
    """One logit ``margin`` above the others, which are a constant or random."""

    def make(rng, rows, classes):
        x = rng.normal(0, 1, (rows, classes) if others == "random" else (rows, 1))
        x = np.broadcast_to(x, (rows, classes)).copy()
        hot = rng.integers(0, classes, rows)
        x[np.arange(rows), hot] = x.max(axis=1) + margin
        return x

    return make


def constant(rng, rows, classes):
    levels = np.array([0, 1, -1, 0.1, 12.5, -300, 1e4])
    return np.repeat(np.resize(levels, rows)[:, None], classes, axis=1)


def masked(rng, rows, classes):
    x = rng.normal(0, 4, (rows, classes))
    mask = rng.random((rows, classes)) < 0.5
    mask[np.arange(rows), rng.integers(0, classes, rows)] = False
    return np.where(mask, -np.inf, x)


def two_elements(rng, rows, classes):
    return np.array([[0.0, -30.0], [-30.0, 0.0]])


FAMILIES = {
    "scale 1": scaled(1),
    "scale 4": scaled(4),
    "scale 500": scaled(500),
    "offset 1e3": offset(1e3),
    "offset 1e5": offset(1e5),
    "confident 20": confident(20, "constant"),
    "confident 80": confident(80, "constant"),
    "confident 300": confident(300, "constant"),
    "confident 20 of random": confident(20, "random"),
    "confident 80 of random": confident(80, "random"),
    "confident 300 of random": confident(300, "random"),
    "[0, -30]": two_elements,
    "constant": constant,
    "-inf mask": masked,
}

# The real vocabularies are 128256; 2**20 is longer than a core's cache. How many rows of each.
ROWS = {1: 7, 2: 200, 3: 200, 10: 200, 1000: 20, 128256: 2, 1048576: 1}


def classes_of(family):
    return [2] if family == "[0, -30]" else list(ROWS)


class Rows(NamedTuple):
    """Rows of one family and all that the reference says about them."""

    x: np.ndarray
    logp: np.ndarray
    p: np.ndarray
    lse: np.ndarray
    margin: np.ndarray  # of the largest over the runner-up, 0 for all other entries


@functools.lru_cache(maxsize=1)
def rows_of(family, classes, dtype):
    dtype = np.dtype(dtype)
    rng = cases.generator(classes, *family.encode())
    with np.errstate(over="ignore"):
        x = FAMILIES[family](rng, ROWS[classes], classes).astype(dtype)
    logp = reference.log_softmax(x, work=WORK)
    margin = np.zeros(x.shape)
    if classes > 1:
        wide = x.astype(np.float64)
        top = np.argmax(wide, axis=1)
        second, first = np.partition(wide, -2, axis=1)[:, -2:].T
        gap = np.where(np.isfinite(first), first - second, 0)
        # With a single finite logit the loss is exactly 0 and no margin excuses anything.
        margin[np.arange(len(x)), top] = np.where(np.isfinite(gap), gap, 0)
    return Rows(x, logp, np.exp(logp), reference.logsumexp(x, work=WORK), margin)


def allowance(rows):
    """d of the bound 4 + d: an entry whose loss is below its margin to the runner-up."""
    return np.where(-rows.logp < rows.margin, rows.margin, 0)


# --- what is measured ----------------------------------------------------------------------------
# Each yields (error, bound) arrays: the *must* column, entry by entry.


def own(dtype, bound):
    """The bound for a result of ``dtype``; one rounding for halves."""
    return np.ones_like(bound) if dtype in (float16, bfloat16) else bound


def measure_log_softmax(rows, dtype):
    got = numbakern.log_softmax(rows.x)
    yield errors(got, rows.logp, dtype), own(dtype, 4 + allowance(rows).ravel())


def measure_softmax(rows, dtype):
    got = numbakern.softmax(rows.x)
    yield errors(got, rows.p, dtype, flushed=True), own(dtype, probability_bound(rows.p).ravel())


def probability_bound(p):
    """8 + abs(log p); a probability of 0 has nothing to be rounded."""
    with np.errstate(divide="ignore"):
        bound = 8 - np.log(np.asarray(p, WORK))
    return np.where(np.isfinite(bound), bound, 8).astype(np.float64)


def measure_logsumexp(rows, dtype):
    result = cases.loss_type(dtype)
    at = np.maximum(np.maximum(np.abs(rows.lse), np.abs(rows.x.astype(WORK)).min(axis=1)), 1)
    at = np.maximum(at, np.abs(rows.x.astype(np.float64).max(axis=1)))
    yield errors(numbakern.logsumexp(rows.x), rows.lse, result, at), np.full(len(rows.x), 4.0)


def measured_labels(rows):
    """The likeliest class, any, and the least likely (of long rows the first two will do)."""
    wide = rows.x.astype(np.float64)
    yield np.argmax(wide, axis=1)
    if rows.x.shape[1] <= 1000:
        yield np.argmin(wide, axis=1)
    yield cases.generator(7).integers(0, rows.x.shape[1], len(rows.x))


def measure_loss(rows, dtype):
    """Of halves too the losses are float32: the bound of that type."""
    result = cases.loss_type(dtype)
    index = np.arange(len(rows.x))
    for labels in measured_labels(rows):
        want, bound = -rows.logp[index, labels], 4 + allowance(rows)[index, labels]
        loss, lse = numbakern.cross_entropy(rows.x, labels, reduction="none", return_lse=True)
        yield errors(loss, want, result), bound
        loss, _ = numbakern.cross_entropy_value_and_grad(rows.x, labels, reduction="none")
        yield errors(loss, want, result), bound
        logp = rows.logp.astype(dtype)
        loss = numbakern.nll_loss(logp, labels, reduction="none")
        want = -reference.exact(logp, WORK)[index, labels]
        yield errors(loss, want, result), np.full(len(index), 4.0)


def measure_reduced_loss(rows, dtype):
    """mean and sum: 2 ulp and the rows' own."""
    result = cases.loss_type(dtype)
    index = np.arange(len(rows.x))
    for labels in measured_labels(rows):
        losses, bounds = -rows.logp[index, labels], 4 + allowance(rows)[index, labels]
        for reduction, want in [("sum", np.sum(losses)), ("mean", np.mean(losses))]:
            loss = numbakern.cross_entropy(rows.x, labels, reduction=reduction)
            yield errors(loss, want, result), 2 + bounds.max(keepdims=True)
            loss, _ = numbakern.cross_entropy_value_and_grad(rows.x, labels, reduction=reduction)
            yield errors(loss, want, result), 2 + bounds.max(keepdims=True)


def label_gradient(rows, labels):
    """softmax - onehot; at the label minus the sum of the others. With the bound of each."""
    grad, index = rows.p.copy(), np.arange(len(rows.x))
    others = rows.p.copy()
    others[index, labels] = 0
    grad[index, labels] = -np.sum(others, axis=1)
    # The probability of a gradient is its own size: at the label, that of all other classes.
    return grad, probability_bound(np.abs(grad))


def measure_cross_entropy_gradient(rows, dtype):
    g = np.linspace(0.25, 1, len(rows.x)).astype(dtype)
    for labels in measured_labels(rows):
        want, bound = label_gradient(rows, labels)
        bound = own(dtype, bound).ravel()
        _, grad = numbakern.cross_entropy_value_and_grad(rows.x, labels, reduction="none")
        yield errors(grad, want, dtype, flushed=True), bound
        _, grad = numbakern.cross_entropy_value_and_grad(rows.x, labels, reduction="mean")
        yield errors(grad, want / len(g), dtype, flushed=True), bound
        scaled = want * reference.exact(g, WORK)[:, None]
        grad = numbakern.cross_entropy_backward(g, rows.x, labels, reduction="none")
        yield errors(grad, scaled, dtype, flushed=True), bound


def measure_gradient_by_lse(rows, dtype):
    """A float64 lse is rounded once: the gradient is no better than exp of that."""
    for labels in measured_labels(rows):
        want, bound = label_gradient(rows, labels)
        _, lse = numbakern.cross_entropy(rows.x, labels, return_lse=True)
        ones = np.ones(len(lse), dtype)
        grad = numbakern.cross_entropy_backward(ones, rows.x, labels, reduction="none", lse=lse)
        rounding = ulp(rows.lse, float64)[:, None] * rows.p / ulp(want, dtype)
        rounding = np.where(np.isfinite(rounding), np.minimum(rounding, 1e300), 0)
        bound = own(dtype, bound) + rounding.astype(np.float64)
        yield errors(grad, want, dtype, flushed=True), bound.ravel()


def measure_smoothed_gradient(rows, dtype):
    """p·Σa - a cancels where p is near its target: in ulp of the larger of the two."""
    if np.any(np.isinf(rows.x.astype(np.float64))):
        return
    labels = cases.generator(8).integers(0, rows.x.shape[1], len(rows.x))
    smoothing = WORK(0.125)  # exact in every type
    target = np.full(rows.x.shape, smoothing / rows.x.shape[1])
    target[np.arange(len(labels)), labels] += 1 - smoothing
    _, grad = numbakern.cross_entropy_value_and_grad(
        rows.x, labels, reduction="none", label_smoothing=0.125
    )
    at = np.maximum(rows.p, target)
    bound = own(dtype, probability_bound(at)).ravel()
    yield errors(grad, rows.p - target, dtype, at, flushed=True), bound


def measure_log_softmax_backward(rows, dtype):
    """g - exp(y)·Σg cancels, and so does Σg: in ulp of the larger of abs(g) and exp(y)·abs(Σg)."""
    y = rows.logp.astype(dtype)
    p = np.exp(reference.exact(y, WORK))
    for g in gradients(y):
        want = reference.log_softmax_backward(g, y, work=WORK)
        wide = reference.exact(g, WORK)
        at = np.maximum(np.abs(wide), p * np.abs(np.sum(wide, axis=1, keepdims=True)))
        at = np.maximum(at, np.abs(want))
        got = numbakern.log_softmax_backward(g, y)
        yield errors(got, want, dtype, at), own(dtype, probability_bound(p).ravel())


def gradients(like):
    """Random ones, and others that nearly add up to 0 in each row."""
    g = cases.generator(9).normal(0, 1, like.shape)
    yield g.astype(like.dtype)
    yield (g - np.mean(g, axis=1, keepdims=True) + 1e-4).astype(like.dtype)


def measure_softmax_backward(rows, dtype):
    """y·(g - Σ g·y) cancels, and so does Σ: in ulp of y times the larger of abs(g) and abs(Σ)."""
    y = rows.p.astype(dtype)
    p = reference.exact(y, WORK)
    for g in gradients(y):
        want = reference.softmax_backward(g, y, work=WORK)
        wide = reference.exact(g, WORK)
        dot = np.abs(np.sum(wide * p, axis=1, keepdims=True))
        at = np.maximum(p * np.maximum(np.abs(wide), dot), np.abs(want))
        got = numbakern.softmax_backward(g, y)
        yield errors(got, want, dtype, at, flushed=True), own(dtype, np.full(y.size, 8.0))


MEASURES = {
    "log_softmax": measure_log_softmax,
    "softmax": measure_softmax,
    "logsumexp": measure_logsumexp,
    "losses of rows": measure_loss,
    "sum and mean of losses": measure_reduced_loss,
    "gradient of cross_entropy": measure_cross_entropy_gradient,
    "gradient by way of lse": measure_gradient_by_lse,
    "gradient with smoothing": measure_smoothed_gradient,
    "log_softmax_backward": measure_log_softmax_backward,
    "softmax_backward": measure_softmax_backward,
}


class Worst(NamedTuple):
    """The largest error, and the one that comes nearest to (or is farthest above) its bound."""

    error: float
    closest: float
    bound: float


def measure(name, family, classes, dtype) -> Worst | None:
    rows = rows_of(family, classes, np.dtype(dtype).name)
    worst = None
    for error, bound in MEASURES[name](rows, np.dtype(dtype)):
        error, bound = np.broadcast_arrays(error, bound)
        if error.size == 0:
            continue
        at = np.argmax(error / bound)
        if worst is None or error[at] / bound[at] > worst.closest / worst.bound:
            largest = max(error.max(), worst.error if worst else 0)
            worst = Worst(float(largest), float(error[at]), float(bound[at]))
        else:
            worst = worst._replace(error=max(worst.error, float(error.max())))
    return worst


def table(dtype, counts=tuple(ROWS)) -> str:
    """Worst ulp of each function over each family, as Markdown."""
    lines = [f"| {np.dtype(dtype)} | " + " | ".join(FAMILIES) + " |"]
    lines.append("|---" * (1 + len(FAMILIES)) + "|")
    worst = {}
    for family in FAMILIES:  # the rows of a family are made once for all functions
        for classes in classes_of(family):
            if classes in counts:
                for name in MEASURES:
                    found = measure(name, family, classes, dtype)
                    if found is not None:
                        key = name, family
                        worst[key] = max(worst.get(key, 0), found.error)
    for name in MEASURES:
        row = [f"{worst[name, f]:.2g}" if (name, f) in worst else "–" for f in FAMILIES]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    for dtype in (float32, float64):
        print(table(dtype), end="\n\n")
