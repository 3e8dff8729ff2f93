"""What is known of each row of a batch while a kernel works on it, and the finish of a reduction.

A batch is a few rows (`rows`) or a tile of columns (`tiles`). Its state lies in the worker's
scratch memory as slots of float64 or addresses, a value a row, so that what happens once a row
runs on vectors of rows: its latency is paid once a batch.
"""

import functools

from numbakern.cpu.simd import (
    SIZES,
    Format,
    Lanes,
    constant,
    each,
    load_scalar,
    load_vector,
    splat,
    store_scalar,
    store_vector,
    traced,
    vector_lanes,
    where,
)
from numbakern.vmath import centre, exp_constants, exp_difference, is_finite, log_sum, two_sum

MAX_ROWS = 128
"""Rows of the largest batch."""
LANES = 8
"""Rows that are finished at once, at least: a vector of float64."""
_NAMES = (
    "x", "y", "out",  # addresses of a row's first element
    "m", "k", "rest", "rest_low",  # maximum, its count, Σ exp(x − m) over the others in two parts
    "log_sum",  # log(k + rest), NaN where there is no softmax
    "sum_a", "sum_a_low", "sum_b",  # the last sums taken, the first in two parts
    "block_m", "ref",  # a block's maximum; what its exponentials are relative to
    "base", "magic", "floor", "factor",
    "scale", "p0", "p1", "p2", "skip",  # parameters of a map
    "panel",  # of the batch alone: see `tiles`
    "label",  # class whose gradient is known better than the map knows it; −1: none
    "x_label", "q_label",  # there: logit, target
    "label_grad",  # and what the gradient is
)  # fmt: skip
_PITCH = 8 * MAX_ROWS + 64  # no power of two: slots of one row fall into different cache sets
SLOT = {name: _PITCH * i for i, name in enumerate(_NAMES)}
SIZE = _PITCH * len(_NAMES)


CENTRED = ("base", "magic", "floor")
"""The slots that an exponential needs (see `vmath.centre`)."""


_CONSTANTS = SLOT["panel"] + _PITCH // 2  # behind what `tiles` keeps in that slot


@traced
def get_i64(address):
    """The int64 at this address."""
    return load_scalar(address, "i8")


@traced
def get_f64(address):
    """The float64 at this address."""
    return load_scalar(address, "f8")


@traced
def put_i64(address, value):
    """Write an int64."""
    store_scalar(address, value)


@traced
def put_f64(address, value):
    """Write a float64."""
    store_scalar(address, value)


def make_put_constants(elem):
    """put_constants(state): what an exponential is made of, for `constants`."""
    size = SIZES[elem]

    def put_constants(state):
        for i, number in enumerate(exp_constants(elem)):
            store_scalar(state + (_CONSTANTS + i * size), constant(state, number, elem))

    return traced(put_constants)


def constants(state, elem):
    """What `put_constants` has left, as vectors. Inside traced functions.

    What is loaded stays in registers; constants of the code would be fetched anew in every loop.
    """
    size, lanes = SIZES[elem], vector_lanes(elem)
    count = len(exp_constants(elem))
    at = (load_scalar(state + (_CONSTANTS + i * size), elem) for i in range(count))
    return tuple(splat(v, elem, lanes) for v in at)


class Few(Lanes):
    """Where a few rows have their slots, with what is known of these. Inside traced functions.

    Parameters
    ----------
    state, i : Value
        Of the batch; the number of their first one in it.
    many : int
        A multiple of LANES.
    """

    __slots__ = ("known", "many")

    def __init__(self, state, i, many=LANES):
        at = state + 8 * i
        super().__init__(at.builder, at.value, at.elem, at.lanes)
        self.known, self.many = {}, many


def get(rows, name):
    """A few rows' values of a slot; read once."""
    if name not in rows.known:
        rows.known[name] = load_vector(rows + SLOT[name], "f8", rows.many)
    return rows.known[name]


def put(rows, **values):
    """Set slots of a few rows."""
    for name, value in values.items():
        store_vector(rows + SLOT[name], value)
        rows.known[name] = value


@functools.cache
def _format(kind, many):
    """Of so many rows at once."""
    return Format(kind, "f8", lanes=many)


def put_rows(address, left, value):
    """Write the values of the `left` first ones of a few rows where an array has theirs, float64.

    Of an array that is not there these are 0, at any address but 0: masked, that one is slow.
    """
    _format("f8", value.lanes).store_first(address, left, value)


def take_rows(many, address, left, missing=0.0):
    """So many rows' values, `missing` of those behind the `left` first ones."""
    return _format("f8", many).load_first(address, left, missing)


def take_labels(many, address, left):
    """Their labels as float64, which holds every class; 0 of the others."""
    return _format("i8", many).load_first(address, left, 0.0)


def each_few(function):
    """run(state, count): call a function of a Few for all rows of the batch."""

    def run(state, count):
        each(count, LANES, lambda i: function(Few(state, i)))

    return traced(run)


def centre_on(rows, reference, elem):
    """Fill base, magic, floor and factor (see `vmath.centre`)."""
    base, magic, floor, factor = centre(reference, elem)
    put(rows, base=base, magic=magic, floor=floor, factor=factor)


def block_of(m, factor, a, a_low, count):
    """Maximum, count and rest (two parts) of a block, from its sums."""
    good = is_finite(m)
    return m, *(where(good, v, 0.0) for v in (count, a * factor, a_low * factor))


_SUMS = "block_m", "factor", "sum_a", "sum_a_low", "sum_b"


def _block(rows):
    """The same of the block whose sums were just taken."""
    return block_of(*(get(rows, name) for name in _SUMS))


@each_few
def first_block(rows):
    """Take the first block's maximum and sums over."""
    m, k, rest, low = _block(rows)
    put(rows, m=m, k=k, rest=rest, rest_low=low)


@each_few
def join_block(rows):
    """Join another block's maximum and sums to the rows': each part relative to the new maximum."""
    block_m, block_k, block_rest, block_low = _block(rows)
    m, k, rest, low = (get(rows, name) for name in ("m", "k", "rest", "rest_low"))
    top = where((block_m > m) | (block_m != block_m), block_m, m)
    below, block_below = m != top, block_m != top
    factor, block_factor = exp_difference(m, top), exp_difference(block_m, top)
    rest = where(below, (rest + k) * factor, rest)
    low = where(below, low * factor, low)
    block_rest = where(block_below, (block_rest + block_k) * block_factor, block_rest)
    block_low = where(block_below, block_low * block_factor, block_low)
    rest, e = two_sum(rest, block_rest)
    k = where(below, 0.0, k) + where(block_below, 0.0, block_k)
    put(rows, m=top, k=k, rest=rest, rest_low=low + (block_low + e))


_NEAR = 40.0


def _put_scale(rows, factor, skipping):
    scale = factor / (get(rows, "k") + get(rows, "rest"))
    put(rows, scale=where(get(rows, "skip") != 0.0, 0.0, scale) if skipping else scale)


def normalise(rows, skipping=False):
    """What a map of the exponentials of a row needs that is one block, once it is finished.

    Slot `ref` is what they are relative to, and slot `scale` makes probabilities of them, zeros
    where `skipping` and slot `skip` say so.
    """
    put(rows, ref=get(rows, "block_m"))
    _put_scale(rows, get(rows, "factor"), skipping)


def make_normalise_block(elem, skipping):
    """normalise_block(state, count): the same for one of several blocks."""

    def normalise_block(rows):
        # The block's maximum, for so they have been summed; but the row's where that is far above,
        # since the factor between them would leave the range of the type computed in.
        m, block_m = get(rows, "m"), get(rows, "block_m")
        ref = where(m - block_m <= _NEAR, block_m, m)
        put(rows, ref=ref)
        centre_on(rows, ref, elem)
        _put_scale(rows, get(rows, "factor") * exp_difference(ref, m), skipping)

    return each_few(normalise_block)


def know(rows, **values):
    """Note slots of a few rows that nothing will read from memory."""
    rows.known.update(values)


def make_finish(elem, many, then=None, sums=None):
    """finish(frame, state, p, count): set rest and log_sum once all blocks are joined.

    Of so `many` rows at once. `then`: function (frame, p, count) -> step(rows, i), which is run on
    those from p + i on as well: what is known of them need not be read again. `sums`: function
    (frame, state, i) -> the sums of those that are a single block, which have no slots.
    """
    keep = know if sums and then else put

    def close(rows):
        m, k = get(rows, "m"), get(rows, "k")
        rest = get(rows, "rest") + get(rows, "rest_low")
        good = is_finite(m)
        value = log_sum(where(good, k, 1.0), where(good, rest, 0.0), elem)
        keep(rows, rest=rest, log_sum=where(good, value, float("nan")))

    def finish(frame, state, p, count):
        step = then and then(frame, p, count)

        def run(i):
            rows = Few(state, i, many)
            if sums:
                block = block_of(get(rows, "block_m"), get(rows, "factor"), *sums(frame, state, i))
                keep(rows, **dict(zip(("m", "k", "rest", "rest_low"), block, strict=True)))
            close(rows)
            if step:
                step(rows, i)

        each(count, many, run)

    return traced(finish)
