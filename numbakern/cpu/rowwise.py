"""What runs over one value a row: checking labels, adding losses up, setting memory to zero."""

import functools

from llvmlite import ir
from numba import types
from numba.core import cgutils

from numbakern.cpu.compile import compile_function, compile_kernel
from numbakern.cpu.frame import array_data, data, integer
from numbakern.cpu.simd import (
    BYTES,
    any_lane,
    clear,
    convert,
    lane_sum,
    load_scalar,
    load_vector,
    spread,
    store_vector,
    traced,
    where,
    zeros,
)
from numbakern.vmath import two_sum, whole_sum

_i64, _i64_llvm = types.int64, ir.IntType(64)
PAGE = 1 << 16
"""Bytes that `fill` clears as one item."""


@traced
def _start(array):
    return array_data(array)


@traced
def _label(labels, i):
    return load_scalar(labels + i * 8, "i8")


_WIDE = 16


def _all(t, number):
    return t.like(t.constant(number, "i8"))


@traced
def _scan_vector(at, bad, counted, classes, ignored):
    """Of 16 labels: whether one is neither a class nor ignored, how many are not ignored."""
    t = load_vector(at, "i8", _WIDE)
    live = t != spread(ignored, t)
    outside = (t < _all(t, 0)) | (t >= spread(classes, t))
    return bad | (live & outside), counted + where(live, _all(t, 1), _all(t, 0))


@traced
def _scan_start(at):
    zero = at.like(ir.Constant(ir.VectorType(_i64_llvm, _WIDE), None), "i8", _WIDE)
    return zero != zero, zero


@traced
def _scan_end(bad, counted):
    return any_lane(bad), lane_sum(convert(counted, "f8"))


def _scan(labels, n, classes, ignored):
    """(whether all labels are classes or ignored, how many are not ignored)."""
    at = _start(labels)
    bad_lanes, counted_lanes = _scan_start(at)
    whole = n // _WIDE * _WIDE
    for i in range(0, whole, _WIDE):
        bad_lanes, counted_lanes = _scan_vector(
            at + 8 * i, bad_lanes, counted_lanes, classes, ignored
        )
    found, counted = _scan_end(bad_lanes, counted_lanes)
    bad, count = int(found), int(counted)
    for i in range(whole, n):
        t = _label(at, i)
        live = t != ignored
        count += live
        bad |= live & ((t < 0) | (t >= classes))
    return bad == 0, count


def _weigh(labels, n, ignored, weight, single):
    """Σ of the weights of the labels that are not ignored, in their order, exactly rounded."""
    at, weights = _start(labels), _start(weight)
    total = low = 0.0
    for i in range(n):
        t = _label(at, i)
        if t != ignored:
            w = _weight4(weights, t) if single else _weight8(weights, t)
            total, low = _plus(total, low, w)
    return _whole(total, low)


@traced
def _weight4(weights, t):
    return convert(load_scalar(weights + t * 4, "f4"), "f8")


@traced
def _weight8(weights, t):
    return load_scalar(weights + t * 8, "f8")


@traced
def _plus(total, low, value):
    total, e = two_sum(total, value)
    return total, low + e


@traced
def _whole(total, low):
    return whole_sum(total, low)


_LANES = 16


@traced
def _zero(at):
    return zeros(at, "f8", _LANES)


@traced
def _plus_vector(total, low, at):
    total, e = two_sum(total, load_vector(at, "f8", _LANES))
    return total, low + e


@traced
def _spill(at, total, low):
    store_vector(at, total)
    store_vector(at + 8 * _LANES, low)


@traced
def _value(at):
    return load_scalar(at, "f8")


@traced
def _room(at):
    """The address of 2 · _LANES float64 on the stack."""
    room = cgutils.alloca_once(at.builder, ir.ArrayType(ir.DoubleType(), 2 * _LANES))
    return at.like(at.builder.ptrtoint(room, _i64_llvm))


def _total(values, n):
    """Σ of float64 values in an order that depends on n alone, the rounding errors added too."""
    at = _start(values)
    lanes = _room(at)
    total = low = _zero(at)
    i = 0
    while i + _LANES <= n:
        total, low = _plus_vector(total, low, at + 8 * i)
        i += _LANES
    _spill(lanes, total, low)
    result = rest = 0.0
    for lane in range(_LANES):
        result, rest = _plus(result, rest, _value(lanes + 8 * lane))
        rest += _value(lanes + 8 * (_LANES + lane))
    while i < n:
        result, rest = _plus(result, rest, _value(at + 8 * i))
        i += 1
    return _whole(result, rest)


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
