"""The kernels: for each operation a reduction, a finish, a map, over any walker.

A walker (`rows.Rows`, `tiles.Tiles`, `short.Short`) knows how rows lie in memory and moves them in
vectors; an operation knows what is computed of them. Every kernel has the signature
kernel(frame, first, last, scratch) and works on items first … last − 1 of its walker.
"""

import math

from numbakern import formulas
from numbakern.cpu.compile import device
from numbakern.cpu.frame import data, integer, real
from numbakern.cpu.rows import PAIR, PARTS, SINGLE, make_element, make_put_element
from numbakern.cpu.simd import (
    BYTES,
    SIZES,
    any_lane,
    convert,
    each,
    fma,
    gather,
    load_scalar,
    load_vector,
    prefetch,
    splat,
    to_integer,
    traced,
    where,
    zeros,
)
from numbakern.cpu.state import (
    CENTRED,
    SLOT,
    Few,
    centre_on,
    each_few,
    get,
    get_f64,
    get_i64,
    normalise,
    put,
    put_f64,
    put_i64,
    put_rows,
    take_labels,
    take_rows,
)
from numbakern.vmath import (
    LN_2,
    exp_nonpositive,
    exp_scaled,
    expm1_nonpositive,
    is_finite,
    log_softmax_grad,
    root_of_exp,
    whole_sum,
)

S_M, S_K, S_REST = (SLOT[name] for name in ("m", "k", "rest"))
S_LABEL, S_X_LABEL, S_Q_LABEL = (SLOT[name] for name in ("label", "x_label", "q_label"))


def each_batch(walker, work):
    """The kernel that calls work(frame, state, p, count) for every batch of rows p … p+count−1."""
    start, advance, begin, stop = walker.start, walker.advance, walker.begin, walker.stop

    def kernel(frame, first, last, state):
        item = first
        start(frame, state, last)
        while item < last:
            p, count, item = advance(frame, item, last)
            if count > 0:  # a run's last tiles may be empty, and row p behind the last one
                begin(frame, state, p, count)
                work(frame, state, p, count)
        stop(frame, state)

    return kernel


def log_sum_exp(rows):
    """m + log Σ exp(x − m) of a few rows."""
    m, log_sum = get(rows, "m"), get(rows, "log_sum")
    # An infinite maximum is the result itself.
    return where(is_finite(m) | (m != m), m + log_sum, m)


def exponential(x, base, magic, floor, *constants):
    """exp(x − ref) up to the row's factor (see `vmath.centre`); 0 below `floor`."""
    h = x - base
    return where(h > floor, exp_scaled(h, magic, constants), 0.0)


def rest_and_count(x, _y, _w, params):
    """The terms of the softmax reduction: exponentials below the maximum; which these are."""
    m, base, magic, floor, *constants = params
    below = x < m
    h = x - base
    # −0 is what an addition under a mask needs no instruction for.
    return where(below & (h > floor), exp_scaled(h, magic, constants), -0.0), below


def rest_count_and_all(x, _y, _w, params):
    """`rest_and_count`, and the exponentials of all elements to be kept for a map."""
    m, *centred = params
    below, e = x < m, exponential(x, *centred)
    return where(below, e, -0.0), below, e


def log_softmax(walker):
    """out = log softmax(x)."""

    def value(x, _y, _w, params):
        return formulas.log_softmax_value(x, *params)

    def then(_frame, _p, _count):
        return lambda rows, _i: put(rows, **{name: get(rows, name) for name in names})

    names = "m", "log_sum"
    reduce = walker.softmax(rest_and_count, then=then)
    sweep = walker.map(value, names)

    @device
    def work(frame, state, p, count):
        reduce(frame, state, p, count)
        sweep(frame, state, count)

    return each_batch(walker, work)


def softmax(walker):
    """out = softmax(x)."""

    def value(e, _y, _w, params):
        p = e * params[0]
        return where(p > 1.0, 1.0, p)  # rounding may end one ulp above

    def then(_frame, _p, _count):
        return lambda rows, _i: normalise(rows)

    reduce = walker.softmax(rest_count_and_all, keep=True, then=then)
    sweep = walker.map_exp(value, exponential, ("scale",), kept=True)

    @device
    def work(frame, state, p, count):
        reduce(frame, state, p, count)
        sweep(frame, state, count)

    return each_batch(walker, work)


def logsumexp(walker):
    """row_lse = log Σ exp(x)."""
    row_lse = data("row_lse")

    def then(frame, p, count):
        values = row_lse(frame) + 8 * p
        return lambda rows, i: put_rows(values + 8 * i, count - i, log_sum_exp(rows))

    return each_batch(walker, walker.softmax(rest_and_count, then=then))


def log_softmax_backward(walker):
    """out = x − exp(y)·Σx, for the gradient x and the output y of log_softmax."""

    def terms(grad, _y, _w, _params):
        grad = convert(grad, "f8")
        return grad, _nothing(grad)

    def value(grad, y, _w, params):
        return log_softmax_grad(grad, root_of_exp(y), *params)

    @each_few
    def total(rows):
        put(rows, p0=whole_sum(get(rows, "sum_a"), get(rows, "sum_a_low")))

    return _backward(walker, terms, total, value, ("p0",))


def softmax_backward(walker):
    """out = y·(x − Σ x·y), for the gradient x and the output y of softmax."""
    elem = walker.elem

    def terms(grad, y, _w, _params):
        grad, y = convert(grad, "f8"), convert(y, "f8")
        product = grad * y
        return product, fma(grad, y, -product) if elem == "f8" else _nothing(grad)

    def value(grad, y, _w, params):
        high, low = params  # two parts, since grad − Σ cancels where a row is confident
        return formulas.softmax_grad(grad - high, y, low)

    @each_few
    def total(rows):
        a, low = get(rows, "sum_a"), get(rows, "sum_a_low")
        high = convert(convert(whole_sum(a, low), elem), "f8")
        put(rows, p0=high, p1=where(is_finite(high), (a - high) + low, 0.0))

    return _backward(walker, terms, total, value, ("p0", "p1"))


def _nothing(like):
    """What a term was rounded by that is as it was, so that no addition of it is left."""
    return like.like(like.constant(-0.0))


def _backward(walker, terms, total, value, names):
    # Sums of float32 have the bits to spare for what cancels.
    reduce = walker.sums(terms, "f8", (), PARTS if walker.elem == "f8" else SINGLE)
    sweep = walker.map(value, names)

    @device
    def work(frame, state, p, count):
        reduce(frame, state, count)
        total(state, count)
        sweep(frame, state, count)

    return each_batch(walker, work)


def make_class_weight(elem):
    """class_weight(weights, t): the weight of class t as float64."""
    size = 4 if elem == "f4" else 8
    return traced(lambda weights, t: convert(load_scalar(weights + t * size, elem), "f8"))


def make_find(access):
    """find(x, step, n, bound): the first class whose x is at least `bound`; −1 if there is none."""
    lanes = access.lanes

    @traced
    def reaches(x, j, step, n, bound):
        return any_lane(access.part(x, j, step, n, -math.inf) >= convert(bound, access.format.elem))

    single = make_element(access)

    @device
    def find(x, step, n, bound):
        for j in range(0, n, lanes):
            if reaches(x, j, step, n, bound):
                for i in range(j, min(j + lanes, n)):
                    if single(x + i * step) >= bound:
                        return i
        return -1

    return find


OPTIONS = {"cross_entropy": ("soft", "smooth", "loss", "grad", "given")}
"""Names of the options that an operation has."""


def cross_entropy(walker, *, soft, smooth, loss, grad, given):
    """Loss and gradient of cross-entropy, in any combination.

    Parameters
    ----------
    soft : bool
        Targets are probabilities (the second input) instead of labels.
    smooth : bool
        Labels are smoothed; probabilities always may be.
    loss, grad : bool
        What to compute: row_loss, out. There are upstream gradients (row_scale) only without loss.
    given : bool
        row_lse holds the log-sum-exp, which spares the reduction, of a gradient without a loss.
        Of a loss without a gradient it is written where the frame has an array for it.
    """
    elem, weighted, many = walker.elem, walker.weighted, walker.many
    spread_out = soft or smooth  # every class has a target, not the label alone
    summed = soft or (smooth and loss)

    def target(y, w, keep, spread):
        """What −log p is weighted with: ((1 − ε)·y + ε/C)·w; of labels the smoothed part, ε/C·w."""
        q = formulas.smoothed_target(y, keep, spread) if soft else spread
        return q * w if weighted else q

    def terms(x, y, w, params):
        m, log_sum, keep, spread = params
        q = target(y and convert(y, "f8"), w and convert(w, "f8"), keep, spread)
        nll = formulas.nll_value(convert(x, "f8"), m, log_sum)
        return (q * nll if loss else q), q if soft else _nothing(q)

    def value(e, y, w, params):
        scale, factor, *more = params
        p = e * scale
        if spread_out:
            keep, spread, *more = more
            g = formulas.cross_entropy_grad(p, factor, target(y, w, keep, spread))
        else:
            g = p * factor
        if more:
            (skip,) = more
            g = where(skip != 0.0, 0.0, g)
        return g

    def value_of_x(x, y, w, params):
        base, magic, floor, *rest = params
        return value(exponential(x, base, magic, floor), y, w, rest)

    classes, x_step, y_step = integer("classes"), integer("x_class"), integer("y_class")
    ignored = integer("ignore_index")
    labels, weights, row_scale = data("labels"), data("weight"), data("row_scale")
    row_lse, row_loss = data("row_lse"), data("row_loss")
    scale_of, keep_of, spread_of = real("scale"), real("keep"), real("spread")
    weight_sum_of = real("weight_sum")
    x_element, class_weight = make_element(walker.x_access), make_class_weight(elem)
    y_element = make_element(walker.y_access) if soft else None
    find = make_find(walker.x_access)
    load, put_x_labels, x_of, y_of = walker.load, walker.put_x_labels, walker.x_of, walker.y_of

    @traced
    def prepare(frame, state, p, count):
        """Each row's label, what is there, whether to skip the row, its log-sum-exp if given."""
        keep, spread, lse = keep_of(frame), spread_of(frame), row_lse(frame) + 8 * p
        targets, ignore = labels(frame) + 8 * p, convert(ignored(frame), "f8")

        def few(i):
            rows = Few(state, i, many)
            if soft:
                put(rows, skip=zeros(state, "f8", many))
            else:
                t = take_labels(many, targets + 8 * i, count - i)
                for line in range(0, 8 * many, BYTES):  # the next batch's
                    prefetch(targets + 8 * i + 8 * count + line)
                skip = t == ignore
                put(rows, skip=where(skip, 1.0, t - t), label=to_integer(where(skip, -1.0, t)))
            if summed:
                put(rows, p1=splat(keep, "f8", many), p2=splat(spread, "f8", many))
            if given:
                put(rows, m=take_rows(many, lse + 8 * i, count - i))

        each(count, many, few)
        if not soft:
            put_x_labels(frame, state, count)

    @device
    def find_peaks(frame, state, count):
        """Of probabilities, the class with more than half of the mass takes the label's part."""
        n, step = classes(frame), x_step(frame)
        for i in range(count):
            at = state + 8 * i
            m, x0, t = get_f64(at + S_M), x_of(state, i), -1
            if given:
                t = find(x0, step, n, m - LN_2)
            elif get_f64(at + S_K) == 1.0 and get_f64(at + S_REST) < 1.0:
                t = find(x0, step, n, m)
            put_i64(at + S_LABEL, t)
            if t >= 0:
                q = y_element(y_of(state, i) + t * y_step(frame)) * keep_of(frame)
                q += spread_of(frame)
                if weighted:
                    q *= class_weight(weights(frame), t)
                put_f64(at + S_Q_LABEL, q)
                put_f64(at + S_X_LABEL, x_element(x0 + t * step))

    def margin(rows):
        """At the label log p, p, and 1 − p as the share of all other classes."""
        m, x = get(rows, "m"), get(rows, "x_label")
        if given:
            d = where(is_finite(m) | (m != m), x - m, math.nan)
            below = where(d > 0.0, 0.0, d)
            return d, exp_nonpositive(below), -expm1_nonpositive(below)
        k, rest, log_sum = (get(rows, name) for name in ("k", "rest", "log_sum"))
        e = exp_nonpositive(x - m, elem)
        others = where(x == m, (k - 1.0) + rest, (k + rest) - e)
        others = where(log_sum == log_sum, others / (k + rest), math.nan)
        return (x - m) - log_sum, e / (k + rest), others

    def settle(frame, p, count):
        """Losses and the parameters of the gradient, as `state.make_finish` runs it."""
        keep, spread, weight_sum = keep_of(frame), spread_of(frame), weight_sum_of(frame)
        losses, lse, scales = row_loss(frame), row_lse(frame), row_scale(frame)
        weight, common_scale = weights(frame), scale_of(frame)

        def step(rows, i):
            def own(array):
                """Where an array has these rows' values, and of how many."""
                there = array != 0
                return where(there, array + 8 * (p + i), rows), where(there, count - i, 0)

            if not grad:
                put_rows(*own(lse), log_sum_exp(rows))
            log_p, prob, others = margin(rows)
            value = 0.0  # Σ of the targets times −log p
            if summed:
                value = whole_sum(get(rows, "sum_a"), get(rows, "sum_a_low"))
            if soft:
                total, q = get(rows, "sum_b"), get(rows, "q_label")  # Σ of the targets; the label's
                more = total - q  # Σ of all other classes' targets
            else:
                w = label_weight(rows, weight) if weighted else 1.0
                total, q = w * keep + spread * weight_sum, w * (keep + spread)
                more = spread * (weight_sum - w) if smooth else 0.0
                value = value - w * keep * log_p
            if loss:
                value = where(get(rows, "skip") != 0.0, 0.0, value)
                put_rows(losses + 8 * (p + i), count - i, value)
            if grad:
                scale = splat(common_scale, "f8", many)
                if not loss:
                    scale = scale * take_rows(many, *own(scales), 1.0)
                # p − q cancels at a confident label; 1 − p is known as the share of the others
                label_grad = more - total * others
                if smooth:  # and that cancels at an improbable one, whose target may be small too
                    label_grad = where(
                        others > 0.5, formulas.cross_entropy_grad(prob, total, q), label_grad
                    )
                label_grad = scale * label_grad
                factor = where(get(rows, "skip") != 0.0, 0.0, scale * total)
                put(rows, p0=factor, label_grad=label_grad)
                if spread_out:
                    put(rows, p1=scale * keep, p2=scale * spread)
                if given:  # slot m holds the log-sum-exp
                    centre_on(rows, get(rows, "m"), elem)
                else:
                    normalise(rows, skipping=True)

        return step

    def label_weight(rows, weight):
        """The weight of the label; 0 of a row that is skipped."""
        t = load_vector(rows + S_LABEL, "i8", many)
        return convert(gather(weight + t * SIZES[elem], elem, t >= 0), "f8")

    @traced
    def settle_all(frame, state, p, count):
        step = settle(frame, p, count)
        each(count, many, lambda i: step(Few(state, i, many), i))

    reduce = add = sweep = None
    kept = grad and not given and not summed
    at_once = not given and not summed  # settled as they are reduced
    if not given:
        terms_of = rest_count_and_all if kept else rest_and_count
        reduce = walker.softmax(terms_of, keep=kept, then=settle if at_once else None)
    if summed:
        add = walker.sums(terms, "f8", ("m", "log_sum", "p1", "p2"), PAIR if soft else SINGLE)
    # Exponentials that were summed are finite: scale and p0 of 0 are enough for a row to skip.
    names = ("scale", "p0")
    if spread_out:
        names += ("p1", "p2")
    if spread_out or given:
        names += ("skip",)
    if grad and given:
        names = (*CENTRED, "factor", *names[1:])
        sweep = walker.map(value_of_x, names, labelled=True)
    elif grad:
        sweep = walker.map_exp(value, exponential, names, kept, labelled=True, skipping=True)

    @device
    def work(frame, state, p, count):
        load(frame, state, count)
        prepare(frame, state, p, count)
        if not given:
            reduce(frame, state, p, count)
        if summed:
            add(frame, state, count)
        if soft and grad:
            find_peaks(frame, state, count)
        if not at_once:
            settle_all(frame, state, p, count)
        if grad:
            sweep(frame, state, count)

    return each_batch(walker, work)


def nll(walker):
    """row_loss = −weight[t]·x[t], 0 for an ignored label t."""
    access, weighted, elem = walker.x_access, walker.weighted, walker.elem
    x_element, class_weight = make_element(access), make_class_weight(elem)
    x_step = integer("x_class")
    labels, weights, ignored = data("labels"), data("weight"), integer("ignore_index")
    row_loss, x_of = data("row_loss"), walker.x_of

    @device
    def work(frame, state, p, count):
        for i in range(count):
            t = get_i64(labels(frame) + 8 * (p + i))
            value = 0.0
            if t != ignored(frame):
                value = -x_element(x_of(state, i) + t * x_step(frame))
                if weighted:
                    value *= class_weight(weights(frame), t)
            put_f64(row_loss(frame) + 8 * (p + i), value)

    return each_batch(walker, work)


def nll_backward(walker):
    """out[t] = −weight[t]·scale for a label t that is not ignored; the rest is not touched."""
    weighted, elem = walker.weighted, walker.elem
    put_element, class_weight = make_put_element(walker.out_access), make_class_weight(elem)
    out_step = integer("out_class")
    labels, weights, ignored = data("labels"), data("weight"), integer("ignore_index")
    row_scale, common_scale, out_of = data("row_scale"), real("scale"), walker.out_of

    @device
    def work(frame, state, p, count):
        for i in range(count):
            t = get_i64(labels(frame) + 8 * (p + i))
            if t != ignored(frame):
                value = -common_scale(frame)
                if row_scale(frame) != 0:
                    value *= get_f64(row_scale(frame) + 8 * (p + i))
                if weighted:
                    value *= class_weight(weights(frame), t)
                put_element(out_of(state, i) + t * out_step(frame), value)

    return each_batch(walker, work)
