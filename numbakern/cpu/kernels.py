"""The kernels: for each operation a reduction, a finish, a map, over any walker.

A walker (`rows.Rows`, `tiles.Tiles`) knows how rows lie in memory and moves them in vectors; an
operation knows what is computed of them. Every kernel has the signature
kernel(frame, first, last, scratch) and works on items first … last − 1 of its walker.
"""

import math


from numbakern import formulas
from numbakern.cpu.frame import data, integer, real
from numbakern.cpu.compile import device
from numbakern.cpu.simd import convert, splat, traced, where
from numbakern.cpu.state import SLOT, each_eight, get, get_f64, get_i64, make_centre_on, put, put_f64
from numbakern.cpu.vmath import EXP_RANGE, exp_nonpositive, exp_scaled, is_finite

S_M, S_K, S_REST, S_LOG_SUM = (SLOT[n] for n in ("m", "k", "rest", "log_sum"))
S_X, S_OUT, S_LABEL_GRAD = (SLOT[n] for n in ("x", "out", "label_grad"))
S_A, S_A_LOW, S_B = (SLOT[n] for n in ("sum_a", "sum_a_low", "sum_b"))


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


def make_normalise(elem):
    """Fill the slots of `probability`, from each row's maximum, count and rest."""
    span = EXP_RANGE[elem]
    centre_on = make_centre_on("m", elem)

    def normalise(state):
        total = get(state, "k") + get(state, "rest")
        floor = get(state, "floor") + (span.flush - span.floor)
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
