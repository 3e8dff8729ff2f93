"""What runs over one value a row: checking labels, adding weights and losses up; clearing memory.

Many rows are taken in blocks, on all threads, and what the blocks come to is joined in their order:
the bits depend on the values and their number, not on who worked on which.
"""

import functools
import math

import numpy as np
from numba import types

from numbakern.cpu import threads
from numbakern.cpu.compile import compile_function, compile_kernel
from numbakern.cpu.frame import STREAM_BYTES, array_data, data, integer, slots
from numbakern.cpu.simd import (
    BYTES,
    SIZES,
    any_lane,
    clear,
    constant,
    convert,
    gather,
    lane_sum,
    lanes_of,
    load_scalar,
    load_vector,
    repeat,
    store_scalar,
    traced,
    where,
)
from numbakern.vmath import is_finite, two_sum

_i64 = types.int64
PAGE = 1 << 16
"""Bytes that `_fill` clears as one item."""
MANY = 1 << 17
"""Rows above which they are taken in blocks, for it pays to start threads."""
BLOCK = 1 << 15
"""Rows of a block."""
_CHEAP = 2
"""Rows that are the work of one element of a class axis (see `threads.run`)."""
_WIDE = 16
"""Rows that are looked at at once."""


def _by_blocks(kernel, rows, **values):
    """The two numbers of each block that a kernel of `_make_kernel` finds."""
    found = np.empty((-(-rows // BLOCK), 2))
    frame = slots(inner=rows, out=id(found), **values)
    threads.run(kernel, len(found), rows // _CHEAP, frame, 0)
    return found


def _make_kernel(name, block):
    """Address of a kernel whose items are blocks; block(frame, start, n) -> two float64."""
    rows, out = integer("inner"), data("out")

    @traced
    def put(at, first, second):
        store_scalar(at, first)
        store_scalar(at + 8, second)

    block = traced(block)

    def kernel(frame, first, last, scratch):
        for b in range(first, last):
            start = b * BLOCK
            one, other = block(frame, start, min(BLOCK, rows(frame) - start))
            put(out(frame) + 16 * b, one, other)

    return compile_kernel(kernel, name)


# ---------------------------------------------------------------- labels


def scan(labels, classes, ignored):
    """Whether all labels (int64) are classes or `ignored`; how many are not ignored."""
    rows = labels.size
    if rows <= MANY:
        return _scan()(id(labels), rows, classes, ignored)
    values = {"labels": id(labels), "classes": classes, "ignore_index": ignored}
    bad, counted = _by_blocks(_scan_kernel(), rows, **values).sum(axis=0)
    return bad == 0.0, int(counted)


def _scan_labels(at, n, classes, ignored):
    whole = n // _WIDE

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
    return any_lane(bad) | more[0], lane_sum(counted) + more[1]


@traced
def _scan_array(labels, n, classes, ignored):
    bad, counted = _scan_labels(array_data(labels), n, classes, ignored)
    return ~bad, counted


def _scan_all(labels, n, classes, ignored):
    return _scan_array(labels, n, classes, ignored)


@functools.cache
def _scan():
    return compile_function(_scan_all, "scan", (_i64,) * 4)


@functools.cache
def _scan_kernel():
    labels, classes, ignored = data("labels"), integer("classes"), integer("ignore_index")

    def block(frame, start, n):
        at = labels(frame) + 8 * start
        bad, counted = _scan_labels(at, n, classes(frame), ignored(frame))
        return where(bad, constant(at, 1.0, "f8"), 0.0), convert(counted, "f8")

    return _make_kernel("scan_blocks", block)


# ---------------------------------------------------------------- sums


def total(values):
    """Σ of float64 values, the rounding errors of its additions added too."""
    if values.size <= MANY:
        return _total()(id(values), values.size)
    return _join(_by_blocks(_total_kernel(), values.size, row_loss=id(values)))


def _join(found):
    """Σ of what blocks have added up, in two parts each."""
    try:
        return math.fsum(found.flat)
    except (OverflowError, ValueError):  # it raises where addition gives an infinity or NaN
        with np.errstate(all="ignore"):
            return float(found.sum())


def weigh(labels, ignored, weight):
    """Σ of the weights of the labels that are not ignored, like `total`."""
    rows, elem = labels.size, "f4" if weight.dtype == np.float32 else "f8"
    if rows <= MANY:
        return _weigh(elem)(id(labels), rows, ignored, id(weight))
    arrays = {"labels": id(labels), "weight": id(weight)}
    return _join(_by_blocks(_weigh_kernel(elem), rows, ignore_index=ignored, **arrays))


def _plus(total, low, value):
    total, e = two_sum(total, value)
    return total, low + e


def _add_up(at, n, wide, one):
    """Σ of wide(i), the i-th vector of _WIDE values, then of the others, one(i).

    In two parts; the second is 0 where the first is no finite number.
    """
    whole = n // _WIDE
    none, nothing = constant(at, 0.0, "f8", _WIDE), constant(at, 0.0, "f8")

    def add_many(i, total, low):
        return _plus(total, low, wide(i))

    def add_one(i, total, low):
        return _plus(total, low, one(whole * _WIDE + i))

    total, low = nothing, nothing
    for lane, rest in zip(*map(lanes_of, repeat(whole, add_many, none, none)), strict=True):
        total, low = _plus(total, low, lane)
        low = low + rest
    total, low = repeat(n - whole * _WIDE, add_one, total, low)
    return total, where(is_finite(total), low, 0.0)


def _add_values(at, n):
    def wide(i):
        return load_vector(at + i * (8 * _WIDE), "f8", _WIDE)

    def one(i):
        return load_scalar(at + i * 8, "f8")

    return _add_up(at, n, wide, one)


@traced
def _add_array(values, n):
    high, low = _add_values(array_data(values), n)
    return high + low


def _add_all(values, n):
    return _add_array(values, n)


@functools.cache
def _total():
    return compile_function(_add_all, "total", (_i64,) * 2)


@functools.cache
def _total_kernel():
    values = data("row_loss")
    return _make_kernel(
        "total_blocks", lambda frame, start, n: _add_values(values(frame) + 8 * start, n)
    )


def _add_weights(elem, at, n, ignored, weights):
    size = SIZES[elem]

    def wide(i):
        t = load_vector(at + i * (8 * _WIDE), "i8", _WIDE)
        return convert(gather(weights + t * size, elem, t != ignored), "f8")

    def one(i):
        t = load_scalar(at + i * 8, "i8")
        counts = t != ignored
        place = where(counts, weights + t * size, at)  # there might be no weight at all
        return where(counts, convert(load_scalar(place, elem), "f8"), 0.0)

    return _add_up(at, n, wide, one)


@functools.cache
def _weigh(elem):
    @traced
    def weigh_array(labels, n, ignored, weight):
        high, low = _add_weights(elem, array_data(labels), n, ignored, array_data(weight))
        return high + low

    def weigh_all(labels, n, ignored, weight):
        return weigh_array(labels, n, ignored, weight)

    return compile_function(weigh_all, f"weigh_{elem}", (_i64,) * 4)


@functools.cache
def _weigh_kernel(elem):
    labels, weight, ignored = data("labels"), data("weight"), integer("ignore_index")

    def block(frame, start, n):
        return _add_weights(elem, labels(frame) + 8 * start, n, ignored(frame), weight(frame))

    return _make_kernel(f"weigh_blocks_{elem}", block)


# ---------------------------------------------------------------- memory


def clear_array(out):
    """Set an array whose elements fill one stretch of memory to zero."""
    size = out.nbytes
    frame = slots(classes=size, out=id(out), flags=int(size > STREAM_BYTES))
    threads.run(_fill(), -(-size // PAGE), size // 4, frame, 0)


@functools.cache
def _fill():
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
