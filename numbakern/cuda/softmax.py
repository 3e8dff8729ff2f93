"""The reduction of the softmax family: how a lane's sums start, grow and are joined.

A row is known by its maximum m, how often it occurs (k), Σ exp(x − m) over the rest, and, where a
loss has targets q for every class, Σ q and Σ q·(m − x). All but m are sums, so they can be taken
over any part of a row, relative to any maximum, and be moved to a larger one.
"""

import itertools
import math
from typing import Any, NamedTuple

from numbakern.cuda.device import (
    at_least,
    bits_of,
    constant,
    convert,
    equal_halves,
    exp2,
    float_of,
    fma,
    larger,
    one_below,
    pack_halves,
    polynomial,
    sum_tree,
    tree,
    unpack_half,
    where,
)
from numbakern.cuda.memory import is_there
from numbakern.vmath import (
    EXP_RANGE,
    LOG2_E,
    centre,
    exact_sum,
    exp_constants,
    exp_nonpositive,
    exp_scaled,
    is_finite,
    log_sum,
    two_sum,
    whole_sum,
)


class Share(NamedTuple):
    """Sums over a part of a row; None for what an operation does not need."""

    k: Any  # of the elements' kind, exact
    rest: Any  # float64, as the next two
    q: Any = None
    nll: Any = None

    @property
    def known(self):
        """What is there."""
        return tuple(v for v in self if v is not None)


def safe(m):
    """A maximum that can be subtracted: 0 for one that is not finite."""
    return where(is_finite(m), m, 0.0)


def exponentials(m, elem, known=True):
    """How to take exp(x − m) in `elem`: ((base, magic, floor) in elem, factor in float64).

    Of an m of +inf or NaN every exponential is that of the floor: finite. `known`: m is a number of
    `elem`, as a maximum is; of float32 most is done in float32 then.
    """
    if known and elem == "f4":
        m = convert(m, elem)
        near = _is_near(m)
        base, ref = where(near, 0.0, m), where(near, m, 0.0)
        magic, factor = _centre_near(ref)
        return [base, magic, ref + EXP_RANGE[elem].floor], factor
    base, magic, floor, factor = centre(safe(m), elem)
    base = where(m < math.inf, base, m)
    return [convert(v, elem) for v in (base, magic, floor)], factor


def _is_near(m):
    """Whether a float32 maximum need not be subtracted."""
    near = EXP_RANGE["f4"].near
    return (m < near) & (m > -near)


def _centre_near(ref):
    """(magic, factor) as vmath.centre has them, of a float32 that need not be subtracted."""
    span = EXP_RANGE["f4"]
    t = fma(ref, span.log2_e[0], span.magic)  # magic + n, n an integer near ref·log2(e)
    f = fma(convert(ref, "f8"), LOG2_E, -convert(t - span.magic, "f8"))
    # 2**−f = 1 − c·f + f²·r(−f), of which the last one is small enough for float32.
    one, c, *r = (v * 2.0**-span.scale for v in exp_constants("f4")[2:])
    g = convert(-f, "f4")
    factor = fma(-f, c, one + convert(g * g * polynomial(r, g), "f8"))
    return (2 * span.magic + span.scale) - t, factor


def scaled_exp(x, base, magic, floor, halves=False):
    """exp(x − m) / factor; what lies below the floor, −inf and NaN count as the floor.

    `halves`: of a float16 or bfloat16 x, at most 3 ulp of float32 off.
    """
    h = at_least(x - base, floor)
    return exp_scaled(h, magic, exp2=exp2 if halves else None)


def rough_exp(x, base, magic):
    """exp(x − m) / factor, for results that are halves themselves: off by 1e-5 of it at most."""
    span = EXP_RANGE["f4"]
    # Rounded once, of at most 128; the rest of log2(e) is 2e-8 of an h of at most 700.
    return exp2(fma(x - base, span.log2_e[0], magic - span.magic))


def rough_root_of_exp(y):
    """As vmath.root_of_exp, for results that are halves themselves; 1 of 0.

    The square is off by 5e-7 + 6e-8·abs(y) of it at most.
    """
    return exp2(y * (0.5 * EXP_RANGE["f4"].log2_e[0]))


def share_of(op, row, left, numbers, m):
    """The Share of some elements, relative to a maximum that is no smaller than any of them.

    Parameters
    ----------
    left : Value
        How many there are; None if all are.
    numbers : iterable of (int, x, y, w)
        Number of the element, logit, target, class weight.

    Returns
    -------
    share : Share
    taken : list of Value
        The exponential of each element, as `scaled_exp` gives it.
    """
    elem = op.elem
    params, factor = exponentials(m, elem)
    top, subtracted = convert(m, elem), convert(safe(m), elem)
    taken = []

    def terms():
        for i, x, y, w in numbers:
            # What is not below is the maximum, unless there is none: then nothing is of account.
            below, rest = one_below(x, top), scaled_exp(x, *params, op.halves)
            taken.append(rest)
            if not op.linear:
                yield rest, below
                continue
            there = is_there(left, i, x)
            q, own = op.target(row, y, w)
            nll = where(there, own * (subtracted - x), 0.0)
            yield rest, below, where(there, q, 0.0), nll

    rest, below, *linear = tree(_pairs(terms()), added)
    k = float(len(taken)) - below
    if op.linear:
        linear[1] = convert(linear[1], "f8")
    return Share(k, convert(rest, "f8") * factor, *linear), taken


ENOUGH = 3.0
"""Σ exp(x − m) of a part from which on it need not be known apart from its largest terms: then its
logarithm is as good as the sum."""


def share_of_halves(words, kind, m, many, fold, unless):
    """The Share of a part of halves (f2 or bf), two in each word of a lane.

    Where the sum is `ENOUGH`, exponentials are taken of products that were rounded once, and the
    maximum is one of the terms: k = 1, and the rest is the sum less 1. It is off by 6e-7 at most.
    Elsewhere the rest is all that counts, and as exact as that of single numbers.

    Parameters
    ----------
    many : bool
        Whether the sum of a part may well be `ENOUGH`.
    fold : function (v) -> Value
        The sum over the lanes of the part.
    unless : function (mask, compute) -> list of Value
        The sums over the lanes of what `compute` gives where the mask does not hold.
    """
    if not many:
        return Share(*map(fold, _apart(words, kind, m)))
    top = convert(m, "f4")
    near = _is_near(top)
    total = fold(_sum_of_halves(words, kind, top))
    enough = near & (total >= ENOUGH)
    k, rest = unless(enough, lambda: _apart(words, kind, m))
    return Share(where(enough, 1.0, k), where(enough, total - 1.0, rest))


def _sum_of_halves(words, kind, top):
    """Σ exp(x − top) over a lane, top a float32 that need not be subtracted; 0 for −inf."""
    high = EXP_RANGE["f4"].log2_e[0]
    start = -(top * high)

    def terms():
        for word in words:
            low, upper = (unpack_half(word, part, kind) for part in (False, True))
            yield exp2(fma(low, high, start)) + exp2(fma(upper, high, start))

    # What the start was rounded by, all terms are off by.
    off = convert(start, "f8") + convert(top, "f8") * high
    return convert(sum_tree(terms()), "f8") * fma(off, -math.log(2.0), 1.0)


def _apart(words, kind, m):
    """How many of a lane's halves are the maximum, and Σ exp(x − m) over the rest."""
    (base, magic, floor), factor = exponentials(m, "f4")
    top, lowest = (
        pack_halves(v, v, kind) for v in (convert(m, "f4"), constant(m, -math.inf, "f4"))
    )
    found = []

    def terms():
        for word in words:
            is_top = equal_halves(word, top, kind)
            found.append(is_top)
            # What is the maximum counts as −inf: nothing in the sum.
            word = (word & ~is_top) | (is_top & lowest)
            halves = (unpack_half(word, part, kind) for part in (False, True))
            hs = (at_least(x - base, floor) for x in halves)
            yield sum_tree(exp_scaled(h, magic, exp2=exp2) for h in hs)

    rest = convert(sum_tree(terms()), "f8") * factor
    # Each low half that is one adds 2**16 − 1, each high one −2**16.
    found = -sum_tree(found)
    low = found & 0xFFFF
    return [_single(low + low + ((found - low) >> 16)), rest]


def _single(n):
    """A whole number below 2**16 as float32."""
    magic = EXP_RANGE["f4"].magic
    return float_of(n | bits_of(constant(n, magic, "f4"))) - magic


def _pairs(terms):
    """The sums of neighbouring terms: of the first number times the second, and of each other."""
    for first, second in itertools.zip_longest(terms, terms):
        (rest, below, *linear) = first
        product = rest * below
        if second is None:
            yield product, below, *linear
        else:
            yield fma(second[0], second[1], product), *added(first[1:], second[1:])


def added(first, second):
    """The sums of two lists, number by number."""
    return [a + b for a, b in zip(first, second, strict=True)]


def largest(first, second):
    """The larger ones of two lists, number by number."""
    return [larger(a, b) for a, b in zip(first, second, strict=True)]


def decay(m, top):
    """exp(m − top) of a maximum and a larger one; 1 where it is none."""
    # A rounded distance d would cost d ulp.
    distance, error = two_sum(m, -top)
    factor = exp_nonpositive(where(m < top, distance, 0.0))
    return fma(factor, where(is_finite(distance), error, 0.0), factor)


def moved(op, m, share, top):
    """The Share of elements with maximum m, relative to a maximum `top`."""
    below = m < top
    k, rest, q, nll = share
    rest = where(below, (rest + k) * decay(m, top), rest)
    linear = ()
    if op.linear:
        linear = q, nll + where(below, q * (safe(top) - safe(m)), 0.0)
    return Share(where(below, 0.0, k), rest, *linear)


def sum_of_terms(op, row, left, numbers):
    """Σ of an operation's terms over some elements, float64; where it is `exact`, in two parts."""

    def terms():
        for i, x, y, w in numbers:
            there = is_there(left, i, x)
            term = [where(there, v, 0.0) for v in op.term(row, x, y, w)]
            if op.exact and len(term) == 1:
                term.append(constant(term[0], -0.0, "f8"))  # of which no addition is left
            yield term

    return list(tree(terms(), sum_of(op)))


def sum_of(op):
    """How the sums of an operation's terms are added: a function (a, b) of two of them."""
    return exact_sum if op.exact else added


def total_of(reduced):
    """What `sum_of_terms` gave, as one float64."""
    high, *low = reduced
    return whole_sum(high, *low) if low else high


def neutral(op):
    """What no elements come to: the numbers (m, *Share) in float64, or the sum of no terms."""
    if op.softmax:
        return [-math.inf] + [0.0] * (4 if op.linear else 2)
    return [0.0] * (2 if op.exact else 1) if op.sums else []


def width(op):
    """How many float64 say all of a part of a row (see `neutral`)."""
    return len(neutral(op))


def reduced_of(op, numbers):
    """(m, Share) or the sum of terms, which such numbers say."""
    return (numbers[0], Share(*numbers[1:])) if op.softmax else numbers


def join(op, board, over_parts):
    """(m, Share) of a row, or the sum of its terms, from those of its parts.

    Parameters
    ----------
    board : reduce.Board
        Where they are.
    over_parts : function (values, combine, start, takes_long) -> list of Value
        What the lists ``values(part, there)`` combine to, of no parts `start`. Whether they take
        long: then not all who join are to take all of them.
    """

    def sums(part, there):
        values = board.get(part, there)
        return moved(op, values[0], Share(*values[1:]), top).known if op.softmax else values

    nothing = neutral(op)
    if not op.softmax:
        return over_parts(sums, sum_of(op), nothing, False)

    def maximum(part, there):
        return board.get(part, there, 1)

    (top,) = over_parts(maximum, largest, nothing[:1], False)
    return reduced_of(op, [top, *over_parts(sums, added, nothing[1:], True)])


def row_log_sum(m, share, elem):
    """(k, rest, log Σ exp(x − m)) of a row, float64; NaN where the maximum is not finite."""
    # Of any maximum the sums are finite, and k is 1 at least.
    good, k, rest = is_finite(convert(m, elem)), convert(share.k, "f8"), share.rest
    # Smaller than every number of the type: what stands for the exponentials of −inf.
    tiny = {"f4": 2.0**-155, "f8": 0.0}[elem]
    if tiny:
        rest = where(rest < tiny, 0.0, rest)
    return k, rest, where(good, log_sum(k, rest, elem), math.nan)


def log_sum_exp(m, log_sum):
    """m + log Σ exp(x − m); an infinite maximum is the result itself."""
    return where(is_finite(m) | (m != m), m + log_sum, m)
