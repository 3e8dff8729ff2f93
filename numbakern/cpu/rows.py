"""Walks a contiguous (or strided) class axis row by row.

A row is read in blocks that stay in the first-level cache: its maximum is found, then the
exponentials are summed from there while what comes next is fetched. Several short rows are taken
as one batch. The order of every sum is fixed by the number of classes and the type alone, and
`tiles` adds in the same order: a row's bits depend neither on the layout nor on its neighbours.

The order: a step is four vectors, (v0 + v1) + (v2 + v3); a group is STEPS steps one after the
other. Of a stretch of one group the lanes are added in a tree. Of a longer one the lanes of all
groups are added in float64, one group after the other (of float64 with the rounding errors kept;
of float32 the two halves of a vector first), and these in a tree. Blocks are joined by
`state.join_block`, or added likewise. Where terms of float64 may cancel, all of these additions
keep their rounding errors (`exact`).

A map that needs the exponentials again takes those that were summed, relative to their block's
maximum (see `state.make_normalise_block`): from scratch memory where the row is short enough for
it, else computed once more, to the same bits.
"""

import functools
import math
from typing import NamedTuple

from numbakern.cpu.compile import device
from numbakern.cpu.frame import data, integer
from numbakern.cpu.simd import (
    BYTES,
    SIZES,
    Format,
    any_lane,
    constant,
    convert,
    each,
    first_lanes,
    halves,
    lane_at,
    lane_fold,
    lane_max,
    lane_sum,
    larger,
    load_scalar,
    prefetch,
    repeat,
    smaller,
    splat,
    spread,
    store_vector,
    traced,
    unordered,
    value_if,
    vector_lanes,
    when,
    where,
    zeros,
)
from numbakern.cpu.state import (
    CENTRED,
    LANES,
    SIZE,
    SLOT,
    centre_on,
    constants,
    each_few,
    first_block,
    get,
    get_f64,
    get_i64,
    join_block,
    make_finish,
    make_normalise_block,
    make_put_constants,
    put_f64,
    put_i64,
)
from numbakern.vmath import exact_sum, two_sum

BLOCK = {"f4": 4096, "f8": 2048}
"""Elements whose maximum is found before their exponentials are summed: 16 KiB."""
STEPS = 4
PAIR, COUNT, PARTS, SINGLE = "pair", "count", "parts", "single"
"""What the second one of two terms is: summed like the first; a mask, to be counted; what the first
one was rounded by, so that no addition rounds; nothing, −0.
"""
BATCH = 8
"""Rows in a batch at most; fewer when they would not stay in the first-level cache."""
KEPT = 1 << 16
"""Longest row whose exponentials are kept for the map: they stay in the second-level cache."""
_BLOCKS = SIZE  # scratch memory: each block's maximum, then the exponentials


def row_offsets(geometry, p, x_row, y_row, out_row):
    """Where row p starts in x, y and out, in bytes (see `launch.plan`). Inside traced functions."""

    def along(d, p, x, y, out):
        # The innermost dimension comes last.
        at = geometry + 32 * (dimensions - d)
        i = p % get_i64(at - 24)
        steps = (get_i64(at - 16), get_i64(at - 8), get_i64(at))
        x, y, out = (start + i * step for start, step in zip((x, y, out), steps, strict=True))
        return p // get_i64(at - 24), x, y, out

    even = geometry == 0
    dimensions = value_if(~even, lambda: get_i64(geometry))
    nothing = constant(p, 0, "i8")
    _, x, y, out = repeat(dimensions, along, p, nothing, nothing, nothing)
    # No dimensions: one step from row to row.
    return tuple(
        where(even, p * step, start)
        for start, step in zip((x, y, out), (x_row, y_row, out_row), strict=True)
    )


def _blocks_for(n, block):
    """How many blocks there are, rounded up to a cache line of values."""
    return ((n + block - 1) // block + 7) // 8 * 8


def scratch_size(elem, classes):
    """Bytes of scratch memory a worker needs."""
    block, step = BLOCK[elem], 4 * vector_lanes(elem)
    if classes <= block:
        kept = 2 * block + BATCH * step  # a batch
    else:
        kept = (classes if classes <= KEPT else block) + step  # a row, or one block of it
    return _BLOCKS + _blocks_for(classes, block) * 8 + kept * SIZES[elem]


class Access(NamedTuple):
    """A row's vectors, contiguous or strided, under the same names. Inside traced functions."""

    format: Format
    strided: bool

    @property
    def size(self):
        """Bytes of an element."""
        return self.format.size

    @property
    def lanes(self):
        """Elements of a vector."""
        return self.format.lanes

    def whole(self, address, j, step):
        """The full vector from class j on."""
        if self.strided:
            return self.format.gather(address + j * step, step, self.lanes, 0.0)
        return self.format.load(address + j * self.size)

    def part(self, address, j, step, n, fill):
        """The vector from class j on; `fill` behind class n."""
        if self.strided:
            return self.format.gather(address + j * step, step, n - j, fill)
        return self.format.load_first(address + j * self.size, n - j, fill)

    def put_part(self, address, j, step, n, v):
        """Write the vector from class j on, up to class n."""
        if self.strided:
            self.format.scatter(address + j * step, step, n - j, v)
        else:
            self.format.store_first(address + j * self.size, n - j, v)


class Operands(NamedTuple):
    """The inputs of a sum or a map at class j, as (x, y, w). Inside traced functions.

    `operands` are (x, x_step, y, y_step, w): addresses and byte strides along the classes. An
    absent input reads as None.
    """

    x: Access
    y: Access | None
    w: Access | None

    def whole(self, operands, j):
        """Full vectors from class j on."""
        x, x_step, y, y_step, w = operands
        return (
            self.x.whole(x, j, x_step),
            self.y and self.y.whole(y, j, y_step),
            self.w and self.w.whole(w, j, None),
        )

    def part(self, operands, j, n):
        """Vectors from class j on; what is behind class n is 0."""
        x, x_step, y, y_step, w = operands
        return (
            self.x.part(x, j, x_step, n, 0.0),
            self.y and self.y.part(y, j, y_step, n, 0.0),
            self.w and self.w.part(w, j, None, n, 0.0),
        )


def is_mask(b):
    """Whether a term is to be counted instead of added."""
    return b.elem == "b1"


def count(total, mask):
    """One more in the lanes of the mask."""
    return where(mask, total + 1.0, total)


def add_pairs(first, second, exact):
    """The sums of two pairs of terms; where `exact`, of two numbers in two parts each."""
    if exact:
        return exact_sum(first, second)
    (a0, b0), (a1, b1) = first, second
    return a0 + a1, b0 + b1


def add_four(total, pairs, exact):
    """total + ((t0 + t1) + (t2 + t3)), of pairs of terms; where b is a mask, that is counted."""
    if is_mask(pairs[0][1]):
        (a, counted), (a0, a1, a2, a3) = total, (a for a, _ in pairs)
        counted = functools.reduce(count, (b for _, b in pairs), counted)
        return a + ((a0 + a1) + (a2 + a3)), counted
    t0, t1, t2, t3 = pairs
    step = add_pairs(add_pairs(t0, t1, exact), add_pairs(t2, t3, exact), exact)
    return add_pairs(total, step, exact)


def alone(group, exact):
    """(a, a_low, b) of a stretch that is one group, of its a and b in float64."""
    a, b = group
    nothing = a.like(a.constant(0.0))
    return (a, b, nothing) if exact else (a, nothing, b)


def add_group(sums, group, elem, exact):
    """(a, a_low, b) in some lanes, and what a group comes to there, in float64: its a and b."""
    (a, a_low, b), (group_a, group_b) = sums, group
    if elem == "f4":  # float64 has the bits to spare
        return a + group_a, a_low, b + group_b
    a, e = two_sum(a, group_a)
    return (a, a_low + (e + group_b), b) if exact else (a, a_low + e, b + group_b)


def add_lanes(first, second, elem):
    """The sum of (a, a_low, b) in some lanes and in others."""
    if elem == "f4":
        (a0, nothing, b0), (a1, _, b1) = first, second
        return a0 + a1, nothing, b0 + b1
    return add_blocks(first, second)


def add_blocks(first, second):
    """The sum of (a, a_low, b) of two blocks, and of other stretches of float64."""
    (*parts, b0), (*others, b1) = first, second
    return *exact_sum(parts, others), b0 + b1


def make_sums(terms, elem, x_access, y_access, w_access, kind):
    """Sum two terms over a stretch of a row, in the canonical order.

    Parameters
    ----------
    terms : function (x, y, w, params) -> (a, b) or (a, b, kept)
        Vectors to be added up. Traced.
    elem : str
        Element kind of the terms: what the order's vectors are added in.
    kind : {PAIR, COUNT, PARTS, SINGLE}
        What b is. A count is exact in any order; of PARTS there is one sum, of a + b.

    Returns
    -------
    function (operands, n, ahead, params, kept) -> (a, a_low, b)
        Σ of the first term is a + a_low, Σ of the second is b (0 of PARTS), float64. With each
        line another one is fetched, `ahead` bytes behind it (0: none). What is to be kept goes to
        the address `kept`, up to the end of a step.
    """
    operands_at = Operands(x_access, y_access, w_access)
    lanes, size = x_access.lanes, x_access.size
    step, group = 4 * lanes, 4 * lanes * STEPS
    wide_lanes = lanes // 2 if elem == "f4" else lanes
    counts, exact = kind == COUNT, kind == PARTS

    def keep(v, kept, j):
        if v:
            store_vector(kept + j * SIZES[elem], v[0])

    @traced
    def whole(group_a, group_b, operands, j, params, kept):
        four = []
        for i in range(4):
            a, b, *v = terms(*operands_at.whole(operands, j + i * lanes), params)
            keep(v, kept, j + i * lanes)
            four.append((a, b))
        return add_four((group_a, group_b), four, exact)

    @traced
    def part(group_a, group_b, operands, j, n, params, kept):
        four = []
        for i in range(4):
            a, b, *v = terms(*operands_at.part(operands, j + i * lanes, n), params)
            keep(v, kept, j + i * lanes)
            inside = first_lanes(n - (j + i * lanes), lanes)
            b = b & inside if counts else where(inside, b, -0.0)
            four.append((where(inside, a, -0.0), b))
        return add_four((group_a, group_b), four, exact)

    @traced
    def fetch(operands, j, ahead):
        for i in range(4):
            prefetch(operands[0] + j * size + ahead + i * lanes * size)

    @traced
    def zero(j):
        return zeros(j, elem, lanes)

    @traced
    def zero8(j):
        return zeros(j, "f8", wide_lanes)

    @traced
    def next_b(group_b):
        """What b of the next group begins with: it goes on counting."""
        return group_b if counts else zeros(group_b, elem, lanes)

    def widened(v):
        """Lanes in float64; of float32, added to those that are half a vector apart."""
        if elem == "f8":
            return v
        low, high = halves(v)
        return convert(low + high, "f8")

    @traced
    def more(a, a_low, b, group_a, group_b):
        wide_b = b.like(b.constant(0.0)) if counts else widened(group_b)
        return add_group((a, a_low, b), (widened(group_a), wide_b), elem, exact)

    @traced
    def close_alone(group_a, group_b):
        group = lane_fold((group_a, group_b), lambda low, high: add_pairs(low, high, exact))
        return alone([convert(v, "f8") for v in group], exact)

    @traced
    def close(a, a_low, b, group_b):
        a, a_low, b = lane_fold((a, a_low, b), lambda low, high: add_lanes(low, high, elem))
        return a, a_low, convert(lane_sum(group_b), "f8") if counts else b

    @device
    def sums(operands, n, ahead, params, kept):
        a = a_low = b = zero8(n)
        group_a = group_b = zero(n)
        j = 0
        while j < n:
            group_a, group_b = zero(j), next_b(group_b)
            end = min(j + group, n)
            while j + step <= end:
                group_a, group_b = whole(group_a, group_b, operands, j, params, kept)
                if ahead > 0:
                    fetch(operands, j, ahead)
                j += step
            if j < end:
                group_a, group_b = part(group_a, group_b, operands, j, n, params, kept)
                j += step
            a, a_low, b = more(a, a_low, b, group_a, group_b)
        if n <= group:
            return close_alone(group_a, group_b)
        return close(a, a_low, b, group_b)

    return sums


def make_map(value, out_access, x_access, y_access, w_access, labelled=False):
    """sweep(operands, out, out_step, n, stream, params, label, grad): out = value(x, y, w, params).

    Along a row; past the caches where `stream` is set and rows are contiguous. Where `labelled`,
    the result of class `label` is `grad`, if it is one of the n classes.
    """
    operands_at = Operands(x_access, y_access, w_access)
    size, lanes, strided = out_access.size, out_access.lanes, out_access.strided
    line = max(BYTES // size, lanes)  # classes of a cache line, or more

    @traced
    def whole(operands, j, params, out):
        v = value(*operands_at.whole(operands, j), params)
        out_access.format.store(out + j * size, v)

    @traced
    def stream_whole(operands, j, params, out):
        for i in range(0, line, lanes):
            v = value(*operands_at.whole(operands, j + i), params)
            out_access.format.stream(out + (j + i) * size, v)

    @traced
    def stream_labelled(operands, j, params, out, label, grad):
        for i in range(0, line, lanes):
            v = value(*operands_at.whole(operands, j + i), params)
            v = where(lane_at(label - (j + i), lanes), spread(grad, v), v)
            out_access.format.stream(out + (j + i) * size, v)

    @traced
    def part(operands, j, n, params, out, out_step):
        v = value(*operands_at.part(operands, j, n), params)
        out_access.put_part(out, j, out_step, n, v)

    put_element = make_put_element(out_access)

    @device
    def sweep(operands, out, out_step, n, stream, params, label, grad):
        j, at_label = 0, n  # where the line begins that is streamed with the label's result
        if not strided:
            if stream and out % size == 0:
                head = min((-out % (line * size)) // size, n)
                while j < head:
                    part(operands, j, head, params, out, out_step)
                    j += lanes
                j = head
                # Written afterwards, it would have to wait until its line has come back.
                if labelled and j <= label < n:
                    at_label = j + (label - j) // line * line
                while j + line <= n:
                    if labelled and j == at_label:
                        stream_labelled(operands, j, params, out, label, grad)
                    else:
                        stream_whole(operands, j, params, out)
                    j += line
            else:
                while j + lanes <= n:
                    whole(operands, j, params, out)
                    j += lanes
        while j < n:
            part(operands, j, n, params, out, out_step)
            j += lanes
        if labelled and 0 <= label < n and at_label + line > n:
            put_element(out + label * out_step, grad)

    return sweep


def make_element(access):
    """element(address): one element as float64."""
    return traced(lambda address: convert(access.format.get(address), "f8"))


def make_put_element(access):
    """put_element(address, value): write one element, rounded once."""
    return traced(lambda address, value: access.format.put(address, value))


def make_put_x_labels(walker):
    """put_x_labels(frame, state, count): x at each row's label into x_label; 0 where it is −1."""
    x_element, x_of, x_step = make_element(walker.x_access), walker.x_of, integer("x_class")
    s_label, s_x_label = SLOT["label"], SLOT["x_label"]

    def put_x_labels(frame, state, count):
        step, nothing = x_step(frame), constant(count, 0.0, "f8")

        def put(i):
            t, at = get_i64(state + s_label + 8 * i), state + s_x_label + 8 * i
            put_f64(at, nothing)
            when(t >= 0, lambda: put_f64(at, x_element(x_of(state, i) + t * step)))

        each(count, 1, put)

    return traced(put_x_labels)


def make_block_max(access, elem):
    """block_max(x, step, n): the largest of n elements as float64; NaN if one is NaN."""
    lanes = access.lanes

    def larger(v, m):
        return where(v > m, v, m)

    @traced
    def start(x):
        lowest = zeros(x, elem, lanes) - math.inf
        return lowest, lowest, unordered(lowest, lowest)

    @traced
    def whole(a, b, bad, x, j, step):
        v = [access.whole(x, j + i * lanes, step) for i in range(4)]
        bad = bad | (unordered(v[0], v[1]) | unordered(v[2], v[3]))
        return larger(v[2], larger(v[0], a)), larger(v[3], larger(v[1], b)), bad

    @traced
    def part(a, b, bad, x, j, step, n):
        v = access.part(x, j, step, n, -math.inf)
        return larger(v, a), b, bad | unordered(v, v)

    @traced
    def close(a, b, bad):
        m = convert(lane_max(larger(a, b)), "f8")
        return where(any_lane(bad), math.nan, m)

    @device
    def block_max(x, step, n):
        a, b, bad = start(x)
        j = 0
        while j + 4 * lanes <= n:
            a, b, bad = whole(a, b, bad, x, j, step)
            j += 4 * lanes
        while j < n:
            a, b, bad = part(a, b, bad, x, j, step, n)
            j += lanes
        return close(a, b, bad)

    return block_max


class Rows:
    """The walker for rows: what `kernels` needs to reduce and to map them, for these formats.

    Parameters
    ----------
    x_format, y_format, out_format : simd.Format
        How the inputs and the output lie in memory; None for what an operation has not.
    weighted : bool
        Whether there is a weight for each class.
    strided : bool
        Whether the class axis of some array is not contiguous.
    """

    many = LANES  # rows of a batch that are finished at once

    def __init__(self, x_format, y_format, out_format, weighted, strided):
        self.elem = x_format.elem
        self.weighted = weighted
        self.x_access = Access(x_format, strided)
        self.y_access = Access(y_format, strided) if y_format else None
        self.out_access = Access(out_format, strided) if out_format else None
        w_access = Access(Format(self.elem, self.elem), False) if weighted else None
        self._inputs = (self.x_access, self.y_access, w_access)
        self._make_walk()
        self._make_kept()

    def _make_walk(self):
        classes, x_step, y_step = integer("classes"), integer("x_class"), integer("y_class")
        x_row, y_row, out_row = integer("x_row"), integer("y_row"), integer("out_row")
        x_data, y_data, out_data, weight = data("x"), data("y"), data("out"), data("weight")
        geometry = data("geometry")
        s_x, s_y, s_out = SLOT["x"], SLOT["y"], SLOT["out"]
        near = 2 * BLOCK[self.elem]

        @traced
        def advance(frame, item, last):
            """The next batch from row `item` on: (first row, rows, next item)."""
            fit = smaller(near // larger(classes(frame), 1), BATCH)
            count = larger(smaller(fit, last - item), 1)
            return item, count, item + count

        @traced
        def begin(frame, state, p, count):
            """Set the addresses of rows p … p + count − 1."""
            shape, x0, y0, out0 = geometry(frame), x_data(frame), y_data(frame), out_data(frame)
            steps = x_row(frame), y_row(frame), out_row(frame)

            def put(i):
                x, y, out = row_offsets(shape, p + i, *steps)
                put_i64(state + s_x + 8 * i, x0 + x)
                put_i64(state + s_y + 8 * i, y0 + y)
                put_i64(state + s_out + 8 * i, out0 + out)

            each(count, 1, put)

        @traced
        def operands(frame, state, i):
            x, y = get_i64(state + s_x + 8 * i), get_i64(state + s_y + 8 * i)
            return x, x_step(frame), y, y_step(frame), weight(frame)

        put_constants = make_put_constants(self.elem)

        @traced
        def start(frame, state, last):
            """To be called before the first batch."""
            put_constants(state)

        @traced
        def stop(frame, state):
            """To be called after the last batch."""

        @traced
        def load(frame, state, count):
            """To be called before `put_x_labels`: rows are read where they lie."""

        def make_address(slot):
            """address(state, i): where row i of the batch lies."""
            return traced(lambda state, i: get_i64(state + slot + 8 * i))

        self.start, self.advance, self.begin, self.stop = start, advance, begin, stop
        self.x_of, self.y_of, self.out_of = (make_address(s) for s in (s_x, s_y, s_out))
        self.load, self.put_x_labels = load, make_put_x_labels(self)
        self._operands = operands

    def _params(self, names, elem=None):
        """params(state, i): a row's values of these slots, spread over vectors of `elem`."""
        elem, lanes = elem or self.elem, vector_lanes(self.elem)

        def params(state, i):
            at = (load_scalar(state + SLOT[name] + 8 * i, "f8") for name in names)
            return tuple(splat(value, elem, lanes) for value in at)

        return traced(params)

    def _exp_params(self):
        """params(state, i): the row's maximum, CENTRED and the constants."""
        lanes, elem = vector_lanes(self.elem), self.elem

        def params(state, i):
            at = (load_scalar(state + SLOT[n] + 8 * i, "f8") for n in ("block_m", *CENTRED))
            return *(splat(v, elem, lanes) for v in at), *constants(state, elem)

        return traced(params)

    def softmax(self, terms, keep=False, then=None):
        """reduce(frame, state, p, count): m, k, rest and log_sum of every row.

        Where `keep`, the third of the `terms` is left for `map_exp`, as are the blocks' maxima.
        """
        x_access = self.x_access
        block, size, strided = BLOCK[self.elem], x_access.size, x_access.strided
        block_max = make_block_max(x_access, self.elem)
        sums = make_sums(terms, self.elem, x_access, None, None, COUNT)
        elem = self.elem
        centre_block = each_few(lambda rows: centre_on(rows, get(rows, "block_m"), elem))
        finish = make_finish(elem, self.many, then)
        params = self._exp_params()
        classes, x_step = integer("classes"), integer("x_class")
        s_x, s_block_m = SLOT["x"], SLOT["block_m"]
        s_a, s_a_low, s_b = SLOT["sum_a"], SLOT["sum_a_low"], SLOT["sum_b"]
        kept_at, elem_size = self._kept, SIZES[self.elem]

        @device
        def reduce(frame, state, p, count):
            n, step = classes(frame), x_step(frame)
            j = 0
            while j == 0 or j < n:
                length = min(n - j, block)
                for i in range(count):
                    x = get_i64(state + s_x + 8 * i) + j * step
                    put_f64(state + s_block_m + 8 * i, block_max(x, step, length))
                centre_block(state, count)
                ahead = 0 if strided else count * length * size
                for i in range(count):
                    x = get_i64(state + s_x + 8 * i) + j * step
                    kept = kept_at(frame, state, i) + (j * elem_size if n <= KEPT else 0)
                    operands = (x, step, x, step, x)
                    a, low, below = sums(operands, length, ahead, params(state, i), kept)
                    put_f64(state + s_a + 8 * i, a)
                    put_f64(state + s_a_low + 8 * i, low)
                    put_f64(state + s_b + 8 * i, length - below)
                if j == 0:
                    first_block(state, count)
                else:
                    join_block(state, count)
                if n > block:
                    put_f64(state + _BLOCKS + j // block * 8, get_f64(state + s_block_m))
                j += block
            finish(frame, state, p, count)

        return reduce

    def sums(self, terms, elem, names, kind):
        """add(frame, state, count): both sums of `terms` (vectors of `elem`) over every row.

        With the parameters in these slots, into sum_a, sum_a_low and sum_b. `kind`: as
        `make_sums`.
        """
        sums = make_sums(terms, elem, *self._inputs, kind)
        operands, params, classes = self._operands, self._params(names, elem), integer("classes")
        s_a, s_a_low, s_b = SLOT["sum_a"], SLOT["sum_a_low"], SLOT["sum_b"]
        block, size = BLOCK[self.elem], SIZES[self.elem]

        @traced
        def behind(operands, j):
            """The operands from class j on."""
            x, x_step, y, y_step, w = operands
            return x + j * x_step, x_step, y + j * y_step, y_step, w + j * size

        @traced
        def more(a, low, b, next_a, next_low, next_b):
            return add_blocks((a, low, b), (next_a, next_low, next_b))

        @device
        def add(frame, state, count):
            n = classes(frame)
            for i in range(count):
                row, values = operands(frame, state, i), params(state, i)
                a, low, b = sums(row, min(n, block), 0, values, 0)
                for j in range(block, n, block):
                    found = sums(behind(row, j), min(n - j, block), 0, values, 0)
                    a, low, b = more(a, low, b, *found)
                put_f64(state + s_a + 8 * i, a)
                put_f64(state + s_a_low + 8 * i, low)
                put_f64(state + s_b + 8 * i, b)

        return add

    def map(self, value, names, labelled=False):
        """sweep(frame, state, count): out = value(x, y, w, params), parameters in these slots.

        Where `labelled`, slot label_grad is the result at the class in slot label.
        """
        row = make_map(value, self.out_access, *self._inputs, labelled)
        operands, params, label_of = self._operands, self._params(names), self._label(labelled)
        classes, out_step, flags = integer("classes"), integer("out_class"), integer("flags")
        s_out = SLOT["out"]

        @device
        def sweep(frame, state, count):
            n, step, stream = classes(frame), out_step(frame), flags(frame) & 1
            for i in range(count):
                out = get_i64(state + s_out + 8 * i)
                label, grad = label_of(state, i)
                row(operands(frame, state, i), out, step, n, stream, params(state, i), label, grad)

        return sweep

    def map_exp(self, value, exponential, names, kept, labelled=False, skipping=False):
        """`map` of e = exp(x − ref), value(e, y, w, params); slot scale makes it a probability.

        Parameters
        ----------
        exponential : function (x, base, magic, floor, *constants) -> e
            Traced.
        kept : bool
            Whether `softmax` has kept e, relative to each block's maximum.
        """
        _, y_access, w_access = self._inputs
        e_access = Access(Format(self.elem, self.elem), False)
        width = len(names)

        def value_of_x(x, y, w, params):
            return value(exponential(x, *params[width:]), y, w, params[:width])

        row_of_e = make_map(value, self.out_access, e_access, y_access, w_access, labelled)
        row_of_x = make_map(value_of_x, self.out_access, *self._inputs, labelled)
        operands, label_of = self._operands, self._label(labelled)
        params_of_e, params_of_x = self._params(names), self._params((*names, *CENTRED))
        normalise_block = make_normalise_block(self.elem, skipping)
        classes, out_step, flags = integer("classes"), integer("out_class"), integer("flags")
        s_out, s_block_m, s_ref = SLOT["out"], SLOT["block_m"], SLOT["ref"]
        block, size, kept_at = BLOCK[self.elem], SIZES[self.elem], self._kept

        @device
        def sweep(frame, state, count):
            n, step, stream = classes(frame), out_step(frame), flags(frame) & 1
            j = 0
            while j < n:
                length = min(n - j, block)
                if n > block:  # of one row, then
                    put_f64(state + s_block_m, get_f64(state + _BLOCKS + j // block * 8))
                    normalise_block(state, count)
                for i in range(count):
                    x, x_step, y, y_step, w = operands(frame, state, i)
                    y, w, out = y + j * y_step, w + j * size, get_i64(state + s_out + 8 * i)
                    out += j * step
                    label, grad = label_of(state, i)
                    own = get_f64(state + s_ref + 8 * i) == get_f64(state + s_block_m + 8 * i)
                    if kept and n <= KEPT and own:
                        at = (kept_at(frame, state, i) + j * size, 0, y, y_step, w)
                        values = params_of_e(state, i)
                        row_of_e(at, out, step, length, stream, values, label - j, grad)
                    else:
                        at = (x + j * x_step, x_step, y, y_step, w)
                        values = params_of_x(state, i)
                        row_of_x(at, out, step, length, stream, values, label - j, grad)
                j += block

        return sweep

    def _make_kept(self):
        """self._kept(frame, state, i): where the exponentials of the batch's row i are."""
        classes, block, size = integer("classes"), BLOCK[self.elem], SIZES[self.elem]
        step = 4 * vector_lanes(self.elem)

        @traced
        def kept(frame, state, i):
            n = classes(frame)
            each = (n + step - 1) // step * step
            return state + _BLOCKS + _blocks_for(n, block) * 8 + i * each * size

        self._kept = kept

    def _label(self, labelled):
        """label(state, i): class whose result is known better than the map knows it, the result."""
        s_label, s_grad = SLOT["label"], SLOT["label_grad"]

        @traced
        def label(state, i):
            return get_i64(state + s_label + 8 * i), get_f64(state + s_grad + 8 * i)

        @traced
        def no_label(_state, i):
            return constant(i, -1, "i8"), constant(i, 0.0, "f8")

        return label if labelled else no_label
