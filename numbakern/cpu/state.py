"""What is known of each row of a batch while a kernel works on it, and the finish of a reduction.

A batch is a few rows (`rows`) or a tile of columns (`tiles`). Its state lies in the worker's
scratch memory as slots of float64 or addresses, a value a row, so that what happens once a row
runs on vectors of rows: its latency is paid once a batch.
"""

from numbakern.cpu.compile import device
from numbakern.cpu.simd import (
    SIZES,
    Format,
    convert,
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
"""Rows that are finished at once."""
_NAMES = (
    "x", "y", "out",  # addresses of a row's first element
    "m", "k", "rest", "rest_low",  # maximum, its count, Σ exp(x − m) over the others in two parts
    "log_sum",  # log(k + rest), NaN where there is no softmax
    "sum_a", "sum_a_low", "sum_b",  # the last sums taken, the first in two parts
    "block_m", "ref",  # a block's maximum; what its exponentials are relative to
    "base", "magic", "floor", "factor",
    "scale", "p0", "p1", "p2", "skip", "row_scale",  # parameters of a map
    "panel",  # of the batch alone: see `tiles`
    "label",  # class whose gradient is known better than the map knows it; −1: none
    "x_label", "w_label", "q_label",  # there: logit, class weight, target
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
        zero = convert(state - state, elem)
        for i, number in enumerate(exp_constants(elem)):
            store_scalar(state + (_CONSTANTS + i * size), zero + number)

    return traced(put_constants)


def constants(state, elem):
    """What `put_constants` has left, as vectors. Inside traced functions.

    What is loaded stays in registers; constants of the code would be fetched anew in every loop.
    """
    size, lanes = SIZES[elem], vector_lanes(elem)
    count = len(exp_constants(elem))
    at = (load_scalar(state + (_CONSTANTS + i * size), elem) for i in range(count))
    return tuple(splat(v, elem, lanes) for v in at)


def get(state, name):
    """Eight rows' values of a slot, inside a traced function."""
    return load_vector(state + SLOT[name], "f8", LANES)


def put(state, **values):
    """Set slots of eight rows, inside a traced function."""
    for name, value in values.items():
        store_vector(state + SLOT[name], value)


_f8, _i8 = Format("f8", "f8"), Format("i8", "f8")


def put_rows(address, i, count, value):
    """Write eight rows' values to a float64 array with a value a row. Traced."""
    _f8.store_first(address + 8 * i, count - i, value)


def take_rows(address, i, count):
    """Eight rows' values of a float64 array with a value a row. Traced."""
    return _f8.load_first(address + 8 * i, count - i, 0.0)


def take_labels(address, i, count):
    """Eight rows' labels as float64, which holds every class; 0 behind the last row. Traced."""
    return _i8.load_first(address + 8 * i, count - i, 0.0)


def each_eight(function):
    """run(state, count): call a function of the state for every eight rows of the batch."""
    step = traced(function)

    @device
    def run(state, count):
        for i in range(0, 8 * count, 8 * LANES):
            step(state + i)

    return run


def make_centre_on(reference, elem):
    """Fill base, magic, floor and factor from the slot `reference` (see `vmath.centre`)."""

    def centre_on(state):
        base, magic, floor, factor = centre(get(state, reference), elem)
        put(state, base=base, magic=magic, floor=floor, factor=factor)

    return each_eight(centre_on)


def _block(state):
    """Maximum, count and rest (two parts) of the block whose sums were just taken."""
    m, factor = get(state, "block_m"), get(state, "factor")
    good = is_finite(m)
    rest = where(good, get(state, "sum_a") * factor, 0.0)
    low = where(good, get(state, "sum_a_low") * factor, 0.0)
    return m, where(good, get(state, "sum_b"), 0.0), rest, low


@each_eight
def first_block(state):
    """Take the first block's maximum and sums over."""
    m, k, rest, low = _block(state)
    put(state, m=m, k=k, rest=rest, rest_low=low)


@each_eight
def join_block(state):
    """Join another block's maximum and sums to the rows': each part relative to the new maximum."""
    block_m, block_k, block_rest, block_low = _block(state)
    m, k, rest, low = (get(state, name) for name in ("m", "k", "rest", "rest_low"))
    top = where((block_m > m) | (block_m != block_m), block_m, m)
    below, block_below = m != top, block_m != top
    factor, block_factor = exp_difference(m, top), exp_difference(block_m, top)
    rest = where(below, (rest + k) * factor, rest)
    low = where(below, low * factor, low)
    block_rest = where(block_below, (block_rest + block_k) * block_factor, block_rest)
    block_low = where(block_below, block_low * block_factor, block_low)
    rest, e = two_sum(rest, block_rest)
    k = where(below, 0.0, k) + where(block_below, 0.0, block_k)
    put(state, m=top, k=k, rest=rest, rest_low=low + (block_low + e))


_NEAR = 40.0


def make_normalise(elem, skipping):
    """normalise(state, count, whole): what a map of a block's exponentials needs.

    Slot `ref` is what they are relative to, and slot `scale` makes probabilities of them, zeros
    where `skipping` and slot `skip` say so. `whole`: the block is the row, and the state is as
    `make_finish` left it.
    """
    centre_on = make_centre_on("ref", elem)

    @each_eight
    def choose_ref(state):
        # The block's maximum, for so they have been summed; but the row's where that is far above,
        # since the factor between them would leave the range of the type computed in.
        m, block_m = get(state, "m"), get(state, "block_m")
        put(state, ref=where(m - block_m <= _NEAR, block_m, m))

    def put_scale(state, factor):
        scale = factor / (get(state, "k") + get(state, "rest"))
        put(state, scale=where(get(state, "skip") != 0.0, 0.0, scale) if skipping else scale)

    @each_eight
    def set_scale(state):
        put_scale(state, get(state, "factor") * exp_difference(get(state, "ref"), get(state, "m")))

    @each_eight
    def take_row(state):
        put(state, ref=get(state, "block_m"))
        put_scale(state, get(state, "factor"))

    @device
    def normalise(state, count, whole):
        if whole:
            take_row(state, count)
        else:
            choose_ref(state, count)
            centre_on(state, count)
            set_scale(state, count)

    return normalise


def make_finish(elem):
    """Set rest and log_sum once all blocks are joined."""

    def finish(state):
        m, k = get(state, "m"), get(state, "k")
        rest = get(state, "rest") + get(state, "rest_low")
        good = is_finite(m)
        value = log_sum(where(good, k, 1.0), where(good, rest, 0.0), elem)
        put(state, rest=rest, log_sum=where(good, value, float("nan")))

    return each_eight(finish)
