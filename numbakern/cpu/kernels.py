"""The kernels: for each operation a reduction, a finish, a map, over any walker.

A walker (`rows.Rows`, `tiles.Tiles`) knows how rows lie in memory and moves them in vectors; an
operation knows what is computed of them. Every kernel has the signature
kernel(frame, first, last, scratch) and works on items first … last − 1 of its walker.
"""

import math

from numbakern import formulas
from numbakern.cpu.compile import device
from numbakern.cpu.frame import data, integer, real
from numbakern.cpu.simd import (
    any_lane,
    convert,
    first_lane,
    load_scalar,
    splat,
    traced,
    where,
)
from numbakern.cpu.state import (
    SLOT,
    each_eight,
    get,
    get_f64,
    get_i64,
    make_centre_on,
    put,
    put_f64,
    put_i64,
)
from numbakern.cpu.vmath import (
    EXP_RANGE,
    LN_2,
    exp,
    exp_nonpositive,
    exp_scaled,
    expm1_nonpositive,
)

S_X, S_Y, S_OUT, S_M, S_K, S_REST, S_LOG_SUM = (
    SLOT[name] for name in ("x", "y", "out", "m", "k", "rest", "log_sum")
)
S_A, S_A_LOW, S_B, S_P0, S_P1, S_P2, S_SKIP, S_LABEL, S_LABEL_GRAD = (
    SLOT[name]
    for name in ("sum_a", "sum_a_low", "sum_b", "p0", "p1", "p2", "skip", "label", "label_grad")
)


@device
def log_sum_exp(m, log_sum):
    """m + log Σ exp(x − m); an infinite maximum is the result itself."""
    return m if math.isinf(m) else m + log_sum


def rest_and_count(x, _y, _w, params):
    """The terms of the softmax reduction: exponentials below the maximum, count of the maximum."""
    m, base, magic, floor = params
    h = x - base
    e = exp_scaled(h, magic)
    # −0 is what adds nothing at all, so LLVM turns these into masked additions.
    return where((x < m) & (h > floor), e, -0.0), where(x == m, x.like(x.constant(1.0)), -0.0)


def probability(x, base, magic, floor, scale):
    """exp(x − m) / Σ; 0 where h = x − base is below `floor`."""
    h = x - base
    # Written so that a NaN in the parameters, a row without softmax, reaches every element.
    return where(h <= floor, 0.0, exp_scaled(h, magic) * scale)


PROBABILITY = ("base", "magic", "floor", "scale")
"""The slots of what `probability` needs."""


def make_normalise(elem, given=False):
    """Fill the slots of `probability`, from each row's maximum, count and rest; where `given`,
    from its log-sum-exp in slot m alone."""
    span = EXP_RANGE[elem]
    centre_on = make_centre_on("m", elem)

    def normalise(state):
        floor = get(state, "floor") + (span.flush - span.floor)
        total = 1.0 if given else get(state, "k") + get(state, "rest")
        put(state, floor=floor, scale=get(state, "factor") / total)

    step = each_eight(normalise)

    @device
    def run(state, count):
        centre_on(state, count)
        step(state, count)

    return run


def log_softmax(walker):
    """out = log softmax(x)."""

    def value(x, _y, _w, params):
        return formulas.log_softmax_value(x, *params)

    reduce = walker.softmax(rest_and_count)
    sweep = walker.map(value, ("m", "log_sum"))
    advance, begin = walker.advance, walker.begin

    def kernel(frame, first, last, state):
        item = first
        while item < last:
            p, count, item = advance(frame, item, last)
            begin(frame, state, p, count)
            reduce(frame, state, count)
            sweep(frame, state, count)

    return kernel


def softmax(walker):
    """out = softmax(x)."""

    def value(x, _y, _w, params):
        p = probability(x, *params)
        return where(p > 1.0, 1.0, p)  # rounding may end one ulp above

    reduce = walker.softmax(rest_and_count)
    normalise = make_normalise(walker.elem)
    sweep = walker.map(value, PROBABILITY)
    advance, begin = walker.advance, walker.begin

    def kernel(frame, first, last, state):
        item = first
        while item < last:
            p, count, item = advance(frame, item, last)
            begin(frame, state, p, count)
            reduce(frame, state, count)
            normalise(state, count)
            sweep(frame, state, count)

    return kernel


def logsumexp(walker):
    """row_lse = log Σ exp(x)."""
    reduce = walker.softmax(rest_and_count)
    advance, begin, row_lse = walker.advance, walker.begin, data("row_lse")

    def kernel(frame, first, last, state):
        item = first
        while item < last:
            p, count, item = advance(frame, item, last)
            begin(frame, state, p, count)
            reduce(frame, state, count)
            for i in range(count):
                m, log_sum = get_f64(state + S_M + 8 * i), get_f64(state + S_LOG_SUM + 8 * i)
                put_f64(row_lse(frame) + 8 * (p + i), log_sum_exp(m, log_sum))

    return kernel


def log_softmax_backward(walker):
    """out = x − exp(y)·Σx, for the gradient x and the output y of log_softmax."""

    def terms(grad, _y, _w, _params):
        grad = convert(grad, "f8")
        return grad, grad.like(grad.constant(0.0))

    def value(grad, y, _w, params):
        return formulas.log_softmax_grad(grad, exp(y), *params)

    @each_eight
    def total(state):
        put(state, p0=get(state, "sum_a") + get(state, "sum_a_low"))

    return _backward(walker, terms, total, value, ("p0",))


def softmax_backward(walker):
    """out = y·(x − Σ x·y), for the gradient x and the output y of softmax."""
    elem = walker.elem

    def terms(grad, y, _w, _params):
        product = convert(grad, "f8") * convert(y, "f8")
        return product, product.like(product.constant(0.0))

    def value(grad, y, _w, params):
        high, low = params  # two parts, since grad − Σ cancels where a row is confident
        return formulas.softmax_grad(grad - high, y, low)

    @each_eight
    def total(state):
        a, low = get(state, "sum_a"), get(state, "sum_a_low")
        high = convert(convert(a + low, elem), "f8")
        put(state, p0=high, p1=(a - high) + low)

    return _backward(walker, terms, total, value, ("p0", "p1"))


def _backward(walker, terms, total, value, names):
    reduce, sweep = walker.sums(terms, "f8", ()), walker.map(value, names)
    advance, begin = walker.advance, walker.begin

    def kernel(frame, first, last, state):
        item = first
        while item < last:
            p, count, item = advance(frame, item, last)
            begin(frame, state, p, count)
            reduce(frame, state, count)
            total(state, count)
            sweep(frame, state, count)

    return kernel


def make_element(access):
    """element(address): one element as float64."""
    form = access.format
    return traced(lambda address: convert(first_lane(form.load_first(address, 1, 0.0)), "f8"))


def make_put_element(walker):
    """put_element(address, value): write one element of the output, rounded once."""
    form, elem = walker.out_access.format, walker.elem

    def put_element(address, value):
        form.store_first(address, 1, splat(value, elem, form.lanes))

    return traced(put_element)


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


def cross_entropy(walker, *, soft, smooth, loss, grad, given):
    """Loss and gradient of cross-entropy, in any combination.

    Parameters
    ----------
    soft : bool
        Targets are probabilities (the second input) instead of labels.
    smooth : bool
        Labels are smoothed; probabilities always may be.
    loss, grad : bool
        What to compute: row_loss, out.
    given : bool
        row_lse holds the log-sum-exp, which spares the reduction; otherwise it is written where
        the frame has an array for it. Not with `loss`.
    """
    elem, weighted = walker.elem, walker.weighted
    spread_out = soft or smooth  # every class has a target, not the label alone
    summed = soft or (smooth and loss)

    def target(y, w, keep, spread):
        """What −log p is weighted with: ((1 − ε)·y + ε/C)·w; of labels the smoothed part, ε/C·w."""
        q = formulas.smoothed_target(y, keep, spread) if soft else spread
        return q * w if weighted else q

    def terms(x, y, w, params):
        m, log_sum, keep, spread = params
        q = target(y and convert(y, "f8"), w and convert(w, "f8"), keep, spread)
        nll = -formulas.log_softmax_value(convert(x, "f8"), m, log_sum)
        return (q * nll if loss else q), q

    def value(x, y, w, params):
        base, magic, floor, scale, factor, keep, spread, skip = params
        q = target(y, w, keep, spread) if spread_out else 0.0
        p = probability(x, base, magic, floor, scale)
        g = formulas.cross_entropy_grad(p, factor, q) if spread_out else p * factor
        return where(skip != 0.0, 0.0, g)

    x_element = make_element(walker.x_access)
    y_element = make_element(walker.y_access) if soft else None
    put_element = make_put_element(walker) if grad else None
    class_weight = make_class_weight(elem)
    exp_of, expm1_of = traced(exp_nonpositive), traced(expm1_nonpositive)

    advance, begin = walker.advance, walker.begin
    classes, x_step, out_step = integer("classes"), integer("x_class"), integer("out_class")
    y_step = integer("y_class")
    labels, weights, ignored = data("labels"), data("weight"), integer("ignore_index")
    row_scale, row_lse, row_loss = data("row_scale"), data("row_lse"), data("row_loss")
    common_scale, keep_of, spread_of = real("scale"), real("keep"), real("spread")
    weight_sum = real("weight_sum")
    find = make_find(walker.x_access)

    @device
    def prepare(frame, state, p, count):
        """Labels and the parameters of the sums; rows to skip."""
        for i in range(count):
            t = -1 if soft else get_i64(labels(frame) + 8 * (p + i))
            skip = not soft and t == ignored(frame)
            put_i64(state + S_LABEL + 8 * i, -1 if skip else t)
            put_f64(state + S_SKIP + 8 * i, 1.0 if skip else 0.0)
            put_f64(state + S_P1 + 8 * i, keep_of(frame))
            put_f64(state + S_P2 + 8 * i, spread_of(frame))
            if given:
                put_f64(state + S_M + 8 * i, get_f64(row_lse(frame) + 8 * (p + i)))

    @device
    def margin(state, i, x):
        """x − lse of an element, and the share of all other elements, 1 − exp(x − lse)."""
        m = get_f64(state + S_M + 8 * i)
        if given:
            d = math.nan if math.isinf(m) else x - m
            return d, -expm1_of(0.0 if d > 0.0 else d)
        k, rest = get_f64(state + S_K + 8 * i), get_f64(state + S_REST + 8 * i)
        others = k - 1.0 + rest if x == m else k + rest - exp_of(x - m)
        return (x - m) - get_f64(state + S_LOG_SUM + 8 * i), others / (k + rest)

    @device
    def peak(state, i, x0, step, n):
        """The class with more than half of the probability; −1 if there is none."""
        m = get_f64(state + S_M + 8 * i)
        if given:
            return find(x0, step, n, m - LN_2)
        if get_f64(state + S_K + 8 * i) == 1.0 and get_f64(state + S_REST + 8 * i) < 1.0:
            return find(x0, step, n, m)
        return -1

    @device
    def settle(frame, state, p, count):
        """Losses, and the parameters of the gradient."""
        n, step = classes(frame), x_step(frame)
        keep, spread = keep_of(frame), spread_of(frame)
        for i in range(count):
            if not given and row_lse(frame) != 0:
                m, log_sum = get_f64(state + S_M + 8 * i), get_f64(state + S_LOG_SUM + 8 * i)
                put_f64(row_lse(frame) + 8 * (p + i), log_sum_exp(m, log_sum))
            if get_f64(state + S_SKIP + 8 * i) != 0.0:
                if loss:
                    put_f64(row_loss(frame) + 8 * (p + i), 0.0)
                continue
            x0, t = get_i64(state + S_X + 8 * i), get_i64(state + S_LABEL + 8 * i)
            value = total = others = q = 0.0  # of −log p: Σ of its targets, the label's target
            if summed:
                value = get_f64(state + S_A + 8 * i) + get_f64(state + S_A_LOW + 8 * i)
                total = get_f64(state + S_B + 8 * i)
            if soft and grad:
                t = peak(state, i, x0, step, n)
                put_i64(state + S_LABEL + 8 * i, t)
            if t >= 0:
                w = 1.0
                if weighted:
                    w = class_weight(weights(frame), t)
                log_p, others = margin(state, i, x_element(x0 + t * step))
                if soft:
                    y = y_element(get_i64(state + S_Y + 8 * i) + t * y_step(frame))
                    q = (y * keep + spread) * w
                else:
                    q = (keep + spread) * w
                    total = keep * w + spread * weight_sum(frame)
                    value -= keep * w * log_p
            if loss:
                put_f64(row_loss(frame) + 8 * (p + i), value)
            if grad:
                scale = common_scale(frame)
                if row_scale(frame) != 0:
                    scale *= get_f64(row_scale(frame) + 8 * (p + i))
                put_f64(state + S_P0 + 8 * i, scale * total)
                put_f64(state + S_P1 + 8 * i, scale * keep)
                put_f64(state + S_P2 + 8 * i, scale * spread)
                # p − q cancels at a confident label; 1 − p is known as the share of the others
                put_f64(state + S_LABEL_GRAD + 8 * i, scale * ((total - q) - total * others))

    @device
    def fix_labels(frame, state, count):
        """Overwrite the gradient where it is known better than the map knows it."""
        for i in range(count):
            t = get_i64(state + S_LABEL + 8 * i)
            if t >= 0:
                out = get_i64(state + S_OUT + 8 * i) + t * out_step(frame)
                put_element(out, get_f64(state + S_LABEL_GRAD + 8 * i))

    reduce = add = sweep = normalise = None
    if not given:
        reduce = walker.softmax(rest_and_count)
    if summed:
        add = walker.sums(terms, "f8", ("m", "log_sum", "p1", "p2"))
    if grad:
        normalise = make_normalise(elem, given)
        names = (*PROBABILITY, "p0", "p1", "p2", "skip")
        sweep = walker.map(value, names, packed=not given or summed)

    def kernel(frame, first, last, state):
        item = first
        while item < last:
            p, count, item = advance(frame, item, last)
            begin(frame, state, p, count)
            prepare(frame, state, p, count)
            if not given:
                reduce(frame, state, count)
            if summed:
                add(frame, state, count)
            settle(frame, state, p, count)
            if grad:
                normalise(state, count)
                sweep(frame, state, count)
                fix_labels(frame, state, count)

    return kernel


def nll(walker):
    """row_loss = −weight[t]·x[t], 0 for an ignored label t."""
    access, weighted, elem = walker.x_access, walker.weighted, walker.elem
    x_element, class_weight = make_element(access), make_class_weight(elem)
    advance, begin, x_step = walker.advance, walker.begin, integer("x_class")
    labels, weights, ignored = data("labels"), data("weight"), integer("ignore_index")
    row_loss = data("row_loss")

    def kernel(frame, first, last, state):
        item = first
        while item < last:
            p, count, item = advance(frame, item, last)
            begin(frame, state, p, count)
            for i in range(count):
                t = get_i64(labels(frame) + 8 * (p + i))
                value = 0.0
                if t != ignored(frame):
                    value = -x_element(get_i64(state + S_X + 8 * i) + t * x_step(frame))
                    if weighted:
                        value *= class_weight(weights(frame), t)
                put_f64(row_loss(frame) + 8 * (p + i), value)

    return kernel


def nll_backward(walker):
    """out[t] = −weight[t]·scale for a label t that is not ignored; the rest is not touched."""
    weighted, elem = walker.weighted, walker.elem
    put_element, class_weight = make_put_element(walker), make_class_weight(elem)
    advance, begin, out_step = walker.advance, walker.begin, integer("out_class")
    labels, weights, ignored = data("labels"), data("weight"), integer("ignore_index")
    row_scale, common_scale = data("row_scale"), real("scale")

    def kernel(frame, first, last, state):
        item = first
        while item < last:
            p, count, item = advance(frame, item, last)
            begin(frame, state, p, count)
            for i in range(count):
                t = get_i64(labels(frame) + 8 * (p + i))
                if t != ignored(frame):
                    value = -common_scale(frame)
                    if row_scale(frame) != 0:
                        value *= get_f64(row_scale(frame) + 8 * (p + i))
                    if weighted:
                        value *= class_weight(weights(frame), t)
                    put_element(get_i64(state + S_OUT + 8 * i) + t * out_step(frame), value)

    return kernel
