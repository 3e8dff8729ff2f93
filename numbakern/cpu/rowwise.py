"""What runs over one value a row: checking labels, adding losses up, setting memory to zero."""

import functools

from numba import types

from numbakern.cpu.compile import compile_function, compile_kernel
from numbakern.cpu.frame import array_data, data, integer
from numbakern.cpu.simd import (
    BYTES,
    any_lane,
    clear,
    constant,
    convert,
    lane_sum,
    lanes_of,
    load_scalar,
    load_vector,
    repeat,
    traced,
    where,
)
from numbakern.vmath import two_sum, whole_sum

_i64 = types.int64
PAGE = 1 << 16
"""Bytes that `fill` clears as one item."""


_WIDE = 16
"""Rows that are looked at at once."""


@traced
def _scan_labels(labels, n, classes, ignored):
    at, whole = array_data(labels), n // _WIDE

    def look(t, bad, counted):
        live = t != ignored
        outside = (t < 0) | (t >= classes)
        return bad | (live & outside), counted + where(live, constant(t, 1, "i8", t.lanes), 0)

    def look_at_many(i, bad, counted):
        return look(load_vector(at + i * (8 * _WIDE), "i8", _WIDE), bad, counted)

    def look_at_one(i, bad, counted):
        return look(load_scalar(at + (whole * _WIDE + i) * 8, "i8"), bad, counted)

    none, no_lane = constant(at, False, "b1"), constant(at, False, "b1", _WIDE)
    bad, counted = repeat(whole, look_at_many, no_lane, constant(at, 0, "i8", _WIDE))
    more = repeat(n - whole * _WIDE, look_at_one, none, constant(at, 0, "i8"))
    return ~(any_lane(bad) | more[0]), lane_sum(counted) + more[1]


def _scan(labels, n, classes, ignored):
    """(whether all labels are classes or ignored, how many are not ignored)."""
    return _scan_labels(labels, n, classes, ignored)


def _plus(total, low, value):
    total, e = two_sum(total, value)
    return total, low + e


@traced
def _weigh_labels(labels, n, ignored, weight, single):
    at, weights, nothing = array_data(labels), array_data(weight), constant(labels, 0.0, "f8")
    size = where(single != 0, constant(at, 4, "i8"), 8)

    def add(i, total, low):
        t = load_scalar(at + i * 8, "i8")
        counts = t != ignored
        place = where(counts, weights + t * size, at)  # there might be no weight at all
        wide = load_scalar(where(single != 0, at, place), "f8")
        w = where(single != 0, convert(load_scalar(place, "f4"), "f8"), wide)
        return _plus(total, low, where(counts, w, -0.0))

    return whole_sum(*repeat(n, add, nothing, nothing))


def _weigh(labels, n, ignored, weight, single):
    """Σ of the weights of the labels that are not ignored, in their order, exactly rounded."""
    return _weigh_labels(labels, n, ignored, weight, single)


@traced
def _add_up(values, n):
    at, whole = array_data(values), n // _WIDE
    none, nothing = constant(at, 0.0, "f8", _WIDE), constant(at, 0.0, "f8")

    def add_many(i, total, low):
        return _plus(total, low, load_vector(at + i * (8 * _WIDE), "f8", _WIDE))

    def add_one(i, total, low):
        return _plus(total, low, load_scalar(at + (whole * _WIDE + i) * 8, "f8"))

    total, low = nothing, nothing
    for lane, rest in zip(*map(lanes_of, repeat(whole, add_many, none, none)), strict=True):
        total, low = _plus(total, low, lane)
        low = low + rest
    return whole_sum(*repeat(n - whole * _WIDE, add_one, total, low))


def _total(values, n):
    """Σ of float64 values in an order that depends on n alone, the rounding errors added too."""
    return _add_up(values, n)


@functools.cache
def scan():
    """The compiled `_scan(labels, n, classes, ignored)`; arrays as their ids."""
    return compile_function(_scan, "scan", (_i64,) * 4)


@functools.cache
def weigh():
    """The compiled `_weigh(labels, n, ignored, weight, single)`."""
    return compile_function(_weigh, "weigh", (_i64,) * 5)


@functools.cache
def total():
    """The compiled `_total(values, n)`."""
    return compile_function(_total, "total", (_i64,) * 2)


@functools.cache
def fill():
    """Address of the kernel that clears `classes` bytes at `out`, PAGE bytes an item."""
    size, out, flags = integer("classes"), data("out"), integer("flags")

    byte = traced(lambda at: clear(at, 1))
    line = traced(lambda at: clear(at, BYTES))
    stream = traced(lambda at: clear(at, BYTES, past_caches=True))

    def kernel(frame, first, last, scratch):
        at = out(frame) + first * PAGE
        end = min(out(frame) + last * PAGE, out(frame) + size(frame))
        while at < end and at % BYTES != 0:
            byte(at)
            at += 1
        if flags(frame) & 1:
            while at + BYTES <= end:
                stream(at)
                at += BYTES
        while at + BYTES <= end:
            line(at)
            at += BYTES
        while at < end:
            byte(at)
            at += 1

    return compile_kernel(kernel, "fill")
