"""Elementary functions of a target's values, from +, −, ·, / and fma alone.

The same operations in the same order give the same bits on every machine with FMA, in every lane
and in scalar code. What operators cannot say (fma, where, convert, …) comes from the module that
the value names as its `ops`. Polynomials are minimax (Remez exchange, 60 digits), coefficients
lowest first.
"""

import math

import numpy as np

LOG2_E = 1.4426950408889634
LOG2_E_REST = 2.0355273740931033e-17  # log2(e) − LOG2_E
LN_2 = 0.6931471805599453
LN_2_HIGH = 0.6931471804855391  # ln 2 with 20 trailing zero bits: n·LN_2_HIGH is exact
LN_2_LOW = 7.440617110012397e-11

# 2**f = 1 + f·q(f) on [−½, ½].
_EXP2 = {
    "f4": (  # relative error 2.0e-9
        0.6931471824645996,
        0.24022647738456726,
        0.05550331249833107,
        0.009618442505598068,
        0.0013399390736594796,
        0.00015352945774793625,
    ),
    "f8": (  # relative error 3.5e-18
        0.6931471805599453,
        0.24022650695910133,
        0.05550410866482002,
        0.009618129107593012,
        0.0013333558146785864,
        0.0001540353045864934,
        1.5252733485571807e-05,
        1.321543445667322e-06,
        1.0178201410422862e-07,
        7.073934030397885e-09,
        4.4346830527120095e-10,
    ),
}

# log((1 + s)/(1 − s)) = 2s + s³·L(s²) for arguments in [√½, √2].
_LOG = {
    "f4": (  # relative error 8.1e-10 of the logarithm, which will be rounded to float32
        0.6666677641964172,
        0.3997752812794761,
        0.2987228091563084,
    ),
    "f8": (  # relative error 1.2e-18
        0.6666666666666735,
        0.3999999999941109,
        0.2857142874326326,
        0.22222198475944277,
        0.18183569741309427,
        0.1531390322167224,
        0.147975078519836,
    ),
}


_EXPM1 = tuple(1.0 / math.factorial(i) for i in range(1, 10))


class ExpRange:
    """How 2**n is formed for an element kind, and how far below a row's maximum it reaches.

    Attributes
    ----------
    magic : float
        1.5·2**(mantissa bits): adding it rounds to an integer, which stands in the lowest bits.
    scale : float
        Exponentials are computed times 2**scale, so that those far below the maximum, whose sum
        is a confident row's loss, are normal numbers down to exp(floor).
    floor : float
        Exponents below it count as −inf in a sum.
    near : float
        References below it, at least 2·|floor|, need not be subtracted.
    exponents : tuple of int
        Between them 2**n is formed: of a finite normal number, whatever it is multiplied with.
    log2_e : tuple of float
        log2(e) in two parts of the element kind.
    """

    def __init__(self, magic, scale, floor, near, exponents, log2_e):
        self.magic, self.scale, self.floor, self.near = magic, scale, floor, near
        self.exponents, self.log2_e = exponents, log2_e


_LOG2_E_F4 = float(np.float32(LOG2_E))
EXP_RANGE = {
    "f4": ExpRange(
        1.5 * 2.0**23, 64.0, -130.0, 512.0, (-125, 127), (_LOG2_E_F4, LOG2_E - _LOG2_E_F4)
    ),
    "f8": ExpRange(1.5 * 2.0**52, 512.0, -800.0, 2048.0, (-1021, 1023), (LOG2_E, LOG2_E_REST)),
}
_F8_MAGIC = EXP_RANGE["f8"].magic


def two_sum(a, b):
    """(s, e) with s = fl(a + b) and s + e = a + b exactly (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def exact_sum(first, second):
    """The sum of two numbers (high, *low) as (high, low): low is what additions rounded away."""
    high, rounded = two_sum(first[0], second[0])
    for a, b in zip(first[1:], second[1:], strict=True):
        rounded = (a + b) + rounded
    return high, rounded


def whole_sum(high, low):
    """A sum and what its additions rounded away (`two_sum`): nothing, if it is infinite."""
    return high.ops.where(is_finite(high), high + low, high)


def is_finite(m):
    """Whether m is neither infinite nor NaN."""
    return m - m == 0.0


def exp_constants(elem, precision=None):
    """The numbers that `exp_scaled` is made of; of another element kind's `precision`."""
    return (*EXP_RANGE[elem].log2_e, 1.0, *_EXP2[precision or elem])


def exp_scaled(h, magic, constants=(), exp2=None):
    """exp(h)·2**j, the integer j standing in `magic` (see `centre`); at most 1 ulp off.

    `constants`: `exp_constants`, if not those of h. `exp2`: 2**f by other means than these.
    """
    return h.ops.add_exponent(*_exp_parts(h, magic, constants, exp2))


def _exp_parts(h, magic, constants=(), exp2=None):
    """(p, t) with exp(h)·2**j = p·2**n, n the integer in t, p in [√½, √2]."""
    ops = h.ops
    high, low, one, *coefficients = constants or exp_constants(h.elem)
    t = ops.fma(h, high, magic)  # magic + n, n the integer nearest to h·log2(e)
    f = ops.fma(h, high, magic - t)  # rounded once: n cancels inside the fma
    f = ops.fma(h, low, f)
    return exp2(f) if exp2 else ops.fma(f, ops.polynomial(coefficients, f), one), t


def root_of_exp(y):
    """√exp(y) of any y, at most 1 ulp off; 0 where it would be subnormal.

    Its square times a large number loses nothing of what is a normal number at last, where exp(y)
    alone would be flushed.
    """
    ops, span = y.ops, EXP_RANGE[y.elem]
    high, low, *others = exp_constants(y.elem)
    p, t = _exp_parts(y, span.magic, (0.5 * high, 0.5 * low, *others))
    least, most = (span.magic + n for n in span.exponents)
    e = ops.where(t > most, math.inf, ops.add_exponent(p, t))
    e = ops.where(t < least, 0.0, e)
    return ops.where(y == y, e, y)


def log_softmax_grad(grad, root, total):
    """Gradient of log_softmax with respect to x, g − p·Σg, by √p and Σg."""
    return grad.ops.fma(-root, root * total, grad)


def expm1_nonpositive(d):
    """exp(d) − 1 of a float64 d ≤ 0, to a few ulp: Kahan's quotient where exp(d) is near 1."""
    where = d.ops.where
    u = exp_nonpositive(d)
    near = d > -0.03125
    # Σ d**i / i! to d**8: what is left out is below 2**-58 of d
    series = d.ops.polynomial(_EXPM1, where(near, d, 0.0)) * d
    return where(near, series, u - 1.0)


def exp_nonpositive(d, precision="f8"):
    """exp(d) of float64 d ≤ 0; 0 where it would be subnormal, and for −inf.

    `precision` "f4": to a relative 2e-9, which is enough for a float32 result.
    """
    where, far = d.ops.where, d <= -700.0
    magic = d.like(d.constant(_F8_MAGIC))
    d = where(far, 0.0, d)
    return where(far, 0.0, exp_scaled(d, magic, exp_constants("f8", precision)))


def exp_difference(a, b):
    """exp(a − b) of float64 a ≤ b, what a − b rounds away included; 0 for a of −inf."""
    d, e = two_sum(a, -b)
    p = exp_nonpositive(d)
    return p + p * d.ops.where(is_finite(d), e, 0.0)


def centre(ref, elem):
    """How exponentials of `elem` are taken relative to a float64 reference.

    The reference is a row's maximum or its log-sum-exp. exp(x − ref) loses precision where x − ref
    rounds. Here nothing is subtracted that rounds: with ref·log2(e) = n + f,
    exp(x − ref) = 2**(x·log2(e) − n) · 2**(−f), the second a factor of the whole row. Only a large
    reference (|ref| ≥ near) is subtracted first, exactly for every x that matters (Sterbenz: ref/2
    is farther away than `floor`).

    Returns
    -------
    base, magic, floor, factor : float64
        exp(x − ref) = exp_scaled(h, magic)·factor with h = x − base, for h > floor.
    """
    span, ops = EXP_RANGE[elem], ref.ops
    far = (ref >= span.near) | (ref <= -span.near)
    base = ops.where(far, ops.convert(ops.convert(ref, elem), "f8"), 0.0)
    rest = ref - base
    n = (rest * LOG2_E + _F8_MAGIC) - _F8_MAGIC
    f = ops.fma(rest, LOG2_E_REST, ops.fma(rest, LOG2_E, -n))
    factor = ops.polynomial([c * 2.0**-span.scale for c in (1.0, *_EXP2[elem])], -f)
    return base, (span.magic + span.scale) - n, rest + span.floor, factor


def log_sum(k, r, elem):
    """log(k + r) for a count k ≥ 1 and the rest r ≥ 0 of a row's sum; float64.

    The log1p form: n·log 2 + log1p(g) with g = (k + r) / 2**n − 1, which is rounded once: a row
    whose rest is far below 1 keeps every bit of it. Of `elem` "f4" to a relative 1e-9, which is
    enough for a float32 result.
    """
    y = k + r
    ops = y.ops
    n, inverse = ops.split_exponent(y)
    # Nothing but the last addition rounds: k is a whole number of few bits.
    g = ops.fma(r, inverse, ops.fma(k, inverse, -1.0))
    s = ops.divide(g, g + 2.0, elem)
    w = s * s
    if elem == "f4":
        return ops.fma(n, LN_2, s * ops.polynomial((2.0, *_LOG["f4"]), w))
    half = 0.5 * g * g
    tail = s * (half + w * ops.polynomial(_LOG[elem], w)) + n * LN_2_LOW
    return n * LN_2_HIGH + (g - (half - tail))
