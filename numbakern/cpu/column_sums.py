"""Sums of two terms over the classes of a tile, a vector lane a row, in the order of `rows`.

What `rows` has in the lanes of a vector is here one row's sums in as many lines of memory: in lane
i of a group are the classes i, i + lanes, …; what `rows` adds across lanes is added line by line.
"""

from numbakern.cpu.compile import device
from numbakern.cpu.rows import (
    COUNT,
    PAIR,
    PARTS,
    STEPS,
    add_four,
    add_group,
    add_lanes,
    add_pairs,
    alone,
    count,
)
from numbakern.cpu.simd import (
    BYTES,
    SIZES,
    convert,
    each,
    either,
    load_vector,
    store_vector,
    traced,
    vector_lanes,
    zeros,
)
from numbakern.cpu.state import MAX_ROWS, SIZE

# Behind the state: lanes of a group, six areas of 16 lines of 16 float64 at most; of all groups in
# float64; and of a group of each row of a tile, what is counted behind them.
_WORK, _GROUPS = SIZE, SIZE + 8 * 16 * 128
_TOGETHER = _GROUPS + 3 * 16 * 128
END = _TOGETHER + 17 * (4 * MAX_ROWS + 3 * BYTES)


def in_tree(values, combine):
    """What values come to, a power of two of them, halves combined as by `simd.lane_fold`."""
    while len(values) > 1:
        half = len(values) // 2
        values = [combine(*pair) for pair in zip(values[:half], values[half:], strict=True)]
    return values[0]


def _line_of_all(elem):
    """Bytes of a line of all columns of a tile; no power of two."""
    return MAX_ROWS * SIZES[elem] + 3 * BYTES


def clear(state, elem, n):
    """No sums in the lanes that n classes do not reach, for `Sums` that are `together`.

    So they stay. Inside traced functions.
    """
    lanes, line = vector_lanes(elem), _line_of_all(elem)
    nothing = zeros(state, elem, lanes)

    def clear_lane(i):
        for at in range(0, MAX_ROWS * SIZES[elem], BYTES):
            store_vector(state + _TOGETHER + (n + i) * line + at, nothing)

    each(lanes - n, 1, clear_lane)


class Sums:
    """Makes what sums two terms over a vector of columns.

    Parameters
    ----------
    inputs : function (operands, j) -> (x, y, w)
        Of class j, vectors; operands are (x, y, w, bytes from class to class). Traced.
    lanes : int
        Of a vector.
    terms : function (x, y, w, params) -> (a, b) or (a, b, kept)
        What is added up; `kept` replaces x in the tile. Traced.
    elem, kind
        As for `rows.make_sums`.
    together : bool
        Of COUNT, whether the lanes of all columns of a tile have places of their own, so that they
        may be added up later than those of the next columns; those that no class reaches are 0
        before (`clear`).
    """

    def __init__(self, inputs, lanes, terms, elem, kind, together=False):
        self._lanes, self._elem = lanes, elem
        self._counts, self._exact = kind == COUNT, kind == PARTS
        self._pairs, self._both_kept = kind == PAIR, kind in (PAIR, PARTS)
        self._inputs, self._terms = inputs, terms
        if together:  # and behind them those of what is not complete
            self._work, self._line, self._column = _TOGETHER, _line_of_all(elem), SIZES[elem]
            self._spares = MAX_ROWS * SIZES[elem], MAX_ROWS * SIZES[elem] + BYTES
        else:  # areas of both terms
            self._work, self._line, self._column = _WORK, lanes * SIZES[elem], 0
            self._spares = lanes * self._line, 4 * lanes * self._line
        self._make_parts()

    # -- a line of memory for each lane

    def _put(self, at, lane, a, b):
        """A lane's sums. A count is not kept by lanes."""
        store_vector(at + lane * self._line, a)
        if self._both_kept:
            store_vector(at + (lane + 2 * self._lanes) * self._line, b)

    def _load(self, at, lane, columns=None):
        columns = columns or self._lanes
        a = load_vector(at + lane * self._line, self._elem, columns)
        if self._counts:
            return a, None
        if not self._both_kept:
            return a, a.like(a.constant(-0.0))
        return a, load_vector(at + (lane + 2 * self._lanes) * self._line, self._elem, columns)

    def _both(self, first, second):
        if self._counts:
            return first[0] + second[0], None
        return add_pairs(first, second, self._exact)

    def _take(self, operands, j, params):
        a, b, *kept = self._terms(*self._inputs(operands, j), params)
        if kept:
            x, _, _, pitch = operands
            store_vector(x + j * pitch, kept[0])
        return a, b

    def _make_parts(self):
        lanes, elem, counts = self._lanes, self._elem, self._counts
        put, load, both, take = self._put, self._load, self._both, self._take

        def more(total, b):
            return count(total, b) if counts else total

        @traced
        def four(group_a, group_b, operands, j, params):
            pairs = [take(operands, j + i * lanes, params) for i in range(4)]
            return add_four((group_a, group_b), pairs, self._exact)

        @traced
        def keep(at, lane, a, b):
            put(at, lane, a, b)

        @traced
        def set_one(at, lane, operands, j, params, total):
            a, b = take(operands, j, params)
            put(at, lane, a, b)
            return more(total, b)

        @traced
        def add_one(at, lane, operands, j, params, total):
            a, b = take(operands, j, params)
            put(at, lane, *both(load(at, lane), (a, b)))
            return more(total, b)

        @traced
        def add_area(at, other):
            for lane in range(lanes):
                put(at, lane, *both(load(at, lane), load(other, lane)))

        @traced
        def zero(j):
            return zeros(j, elem, lanes)

        @traced
        def plus(a, b):
            return a + b

        @device
        def pair(at, operands, j, n, params, total):
            """v + w of a step that is not full, v from class j on, w the next vector; n classes."""
            nothing = zero(n)
            for lane in range(min(n, lanes)):
                total = set_one(at, lane, operands, j + lane, params, total)
            for lane in range(n, lanes):
                keep(at, lane, nothing, nothing)
            for lane in range(min(n - lanes, lanes)):
                total = add_one(at, lane, operands, j + lanes + lane, params, total)
            return total

        self._four, self._keep, self._plus, self._zero = four, keep, plus, zero
        self._set_one, self._pair, self._add_area = set_one, pair, add_area

    def _close_alone(self, work, total, reached=None):
        """Of the only group: add its lanes, or those that are `reached`."""
        found = [self._load(work, lane, total.lanes) for lane in range(reached or self._lanes)]
        a, b = in_tree(found, self._both)
        b = total if self._counts else b
        # As with the other lanes, whose sums are 0: of −0 alone that is 0 as well.
        return alone((convert(a + 0.0 if reached else a, "f8"), convert(b, "f8")), self._exact)

    # -- of a single group

    def of_a_group(self, vector):
        """(add_up, close) for at most a group of classes, or where `vector` a vector of them.

        add_up(operands, n, params, state, c) adds the columns from c on, close(state, n, c,
        columns) returns (a, a_low, b) of so many of them; traced.
        """
        lanes, place, column = self._lanes, self._work, self._column
        few = lanes // 4
        (spare, other), behind = self._spares, lanes * self._line
        step = 4 * lanes
        four, keep, plus, zero = self._four, self._keep, self._plus, self._zero
        set_one, pair, add_area = self._set_one, self._pair, self._add_area

        @traced
        def put_total(work, total):
            if self._counts:
                store_vector(work + behind, total)

        def close(state, n, c, columns):
            work = state + place + c * column
            total = zeros(state, self._elem, columns)
            if self._counts:
                total = load_vector(work + behind, self._elem, columns)

            def among(reached):
                """Of the first few lanes, if no class is in another one; else of twice as many."""

                def these():
                    return self._close_alone(work, total, reached)

                if reached == lanes:
                    return these()
                return either(n <= reached, these, lambda: among(2 * reached))

            return among(few) if vector else self._close_alone(work, total)

        @device
        def add_up_vector(operands, n, params, state, c):
            work, total, nothing = state + place + c * column, zero(n), zero(n)
            for lane in range(n):
                total = set_one(work, lane, operands, lane, params, total)
            if not column:  # the lanes that `close` adds beside these
                reached = few
                while reached < n:
                    reached *= 2
                for lane in range(n, reached):
                    keep(work, lane, nothing, nothing)
            put_total(work, total)

        @device
        def add_up(operands, n, params, state, c):
            work, total = state + place + c * column, zero(n)
            whole = n - n % step  # where the last step begins, if it is not full
            if whole > 0:
                for lane in range(lanes):
                    lane_a = lane_b = zero(n)
                    for j in range(0, whole, step):
                        lane_a, lane_b = four(lane_a, lane_b, operands, j + lane, params)
                    keep(work, lane, lane_a, lane_b)
                    total = plus(total, lane_b)
            if whole < n:
                at = work if whole == 0 else state + (place + spare)
                total = pair(at, operands, whole, n - whole, params, total)
                half = whole + 2 * lanes
                if half < n:
                    more = state + (place + other)
                    total = pair(more, operands, half, n - half, params, total)
                    add_area(at, more)
                if whole > 0:
                    add_area(work, at)
            put_total(work, total)

        return add_up_vector if vector else add_up, close

    # -- of any length

    def of_any_length(self):
        """sums(operands, n, params, state) -> (a, a_low, b) of a vector of columns, float64."""
        lanes, elem, counts, exact = self._lanes, self._elem, self._counts, self._exact
        step, group = 4 * lanes, 4 * lanes * STEPS
        wide_lanes, wide_line = lanes // 2 if elem == "f4" else lanes, lanes * 8
        spare, other = self._spares
        four, keep, plus, zero = self._four, self._keep, self._plus, self._zero
        pair, add_area = self._pair, self._add_area

        # Of all groups' a, a_low and b, what there is.
        used = True, elem == "f8", self._pairs

        def place(groups, lane, i):
            return groups + (i * wide_lanes + lane) * wide_line

        def load_all(groups, lane):
            nothing = zeros(groups, "f8", lanes)
            places = [place(groups, lane, i) for i in range(3)]
            return [
                load_vector(p, "f8", lanes) if on else nothing
                for p, on in zip(places, used, strict=True)
            ]

        def put_all(groups, lane, sums):
            for i, v in enumerate(sums):
                if used[i]:
                    store_vector(place(groups, lane, i), v)

        def widened(work, lane):
            """A lane of the group in float64; of float32, added to the one half a vector apart."""
            a, b = self._load(work, lane)
            if elem == "f4":
                a, b = self._both((a, b), self._load(work, lane + wide_lanes))
            a = convert(a, "f8")
            return a, a.like(a.constant(0.0)) if b is None else convert(b, "f8")

        @traced
        def set_all(groups, work):
            for lane in range(wide_lanes):
                put_all(groups, lane, alone(widened(work, lane), exact))

        @traced
        def add_all(groups, work):
            for lane in range(wide_lanes):
                group = widened(work, lane)
                put_all(groups, lane, add_group(load_all(groups, lane), group, elem, exact))

        @device
        def put_group(groups, work, first):
            if first:
                set_all(groups, work)
            else:
                add_all(groups, work)

        @traced
        def close(groups, total):
            found = [load_all(groups, lane) for lane in range(wide_lanes)]
            a, a_low, b = in_tree(found, lambda first, second: add_lanes(first, second, elem))
            return a, a_low, convert(total, "f8") if counts else b

        close_alone = traced(lambda work, total: self._close_alone(work, total))

        @device
        def sums(operands, n, params, state):
            work, groups, total = state + _WORK, state + _GROUPS, zero(n)
            whole = n - n % step  # where the last step begins, if it is not full
            last = (n - 1) // group * group  # and the last group, full or not
            for g in range(0, whole, group):
                for lane in range(lanes):
                    lane_a = lane_b = zero(n)
                    for j in range(g, min(g + group, whole), step):
                        lane_a, lane_b = four(lane_a, lane_b, operands, j + lane, params)
                    keep(work, lane, lane_a, lane_b)
                    total = plus(total, lane_b)
                if g < last:
                    put_group(groups, work, g == 0)
            if whole < n:
                at = work if whole == last else work + spare
                total = pair(at, operands, whole, n - whole, params, total)
                half = whole + 2 * lanes
                if half < n:
                    total = pair(work + other, operands, half, n - half, params, total)
                    add_area(at, work + other)
                if whole > last:
                    add_area(work, at)
            if n <= group:
                return close_alone(work, total)
            put_group(groups, work, False)
            return close(groups, total)

        return sums
