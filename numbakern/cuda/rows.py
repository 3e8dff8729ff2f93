"""The walker for rows: a team of lanes takes a row, in groups of neighbouring elements.

Lane l of L has the groups l, l + L, l + 2·L, … of G elements each. A row that fits is read once and
kept in registers; a longer one is taken in chunks of V groups a lane, read once for the reduction
and once more for the map. How a row is divided follows from the number of classes and the element
size alone (`partition`), so its bits do not depend on its neighbours, its place or its layout.
"""

from typing import NamedTuple

from numbakern.cuda.device import (
    constant,
    convert,
    larger,
    max_tree,
    repeat,
    smaller_integer,
    sum_tree,
    where,
)
from numbakern.cuda.reduce import WARP, team_max, team_sum
from numbakern.cuda.softmax import Share, in_chunk, join_chunks, nothing_yet

BLOCK = 128
"""Threads of a block whose teams are no larger than a warp."""
LANE = 32
"""Elements of a lane at most, half as many float64; half of that where rows are taken in chunks,
for there a lane keeps the sums of what it has seen beside them."""


class Partition(NamedTuple):
    """How a row is divided.

    Attributes
    ----------
    lanes : int
        Size of the team.
    vectors : int
        Groups of a lane that are in flight at once.
    group : int
        Neighbouring elements of a lane.
    chunks : bool
        Whether the row is longer than lanes·vectors·group and taken in chunks of that.
    """

    lanes: int
    vectors: int
    group: int
    chunks: bool

    @property
    def threads(self):
        """Of a block."""
        return max(self.lanes, BLOCK)


def partition(classes, size, halved=False):
    """The Partition of rows of `classes` elements of `size` bytes.

    `halved`: of half as many elements a lane, for an operation that holds more than the row.

    Parts of a warp, of so few lanes that what is done once a row is shared by several rows; then a
    warp, then blocks of 128 to 512 lanes, with as many groups a lane as it takes; longer rows in
    chunks.
    """
    group = max(2, min(8, 16 // size))
    most = LANE // (2 if size == 8 else 1) // (2 if halved else 1) // group
    lanes = 1
    while lanes < WARP and lanes * group * (most // 2) < classes:
        lanes *= 2
    if lanes * group * most < classes:
        lanes = 128
    while lanes < 512 and lanes > WARP and lanes * group * most < classes:
        lanes *= 2
    if lanes * group * most < classes:
        return Partition(512, max(1, LANE // (4 if size == 8 else 2) // group), group, True)
    return Partition(lanes, max(1, -(-classes // (lanes * group))), group, False)


class Rows:
    """Walks rows as a Partition says.

    Parameters
    ----------
    part : Partition
    x, y, w, out : memory access or None
        How the inputs, the class weights and the output lie.
    """

    def __init__(self, part, x, y, w, out):
        self.part, self.x, self.y, self.w, self.out = part, x, y, w, out

    def run(self, frame, op):
        """Run an operation of `kernels` on the rows of this block."""
        part, thread = self.part, frame.thread
        lane, p = thread, frame.block
        ok = constant(thread, True, "b1")
        if part.lanes < part.threads:
            lane = thread & (part.lanes - 1)
            bits = part.lanes.bit_length() - 1
            p = p * (part.threads // part.lanes) + convert(thread >> bits, "i8")
            ok = p < frame.rows
            p = smaller_integer(p, frame.rows - 1)
        row = op.row(frame, p, ok, lane == 0)
        in_warp = thread & (min(part.lanes, WARP) - 1)
        row.near = in_warp > 0, in_warp < min(part.lanes, WARP) - 1
        first = convert(lane, "i8") * part.group
        if part.chunks:
            self._in_chunks(frame, op, row, first, thread)
        else:
            self._held(op, row, first, thread)

    def _load(self, row, first):
        """The groups of a chunk: (class, x, y, w) each, functions that give the numbers."""
        part, groups = self.part, []
        for v in range(part.vectors):
            j = first + v * part.lanes * part.group
            groups.append((j, *(self._group(row, name, j) for name in ("x", "y", "w"))))
        return groups

    def _group(self, row, name, j):
        access = getattr(self, name)
        if access is None:
            return lambda: [None] * self.part.group
        start, step = row.places[name]
        return access.load(start, step, j, row.classes)

    def _numbers(self, groups):
        """(class, x, y, w) of each element."""
        for j, x, y, w in groups:
            for i, values in enumerate(zip(x(), y(), w(), strict=True)):
                yield j + i, *values

    def _held(self, op, row, first, thread):
        part, share = self.part, None
        groups = self._load(row, first) if op.softmax or op.sums or self.out else []
        if op.softmax:
            m = max_tree(x for _, x, _, _ in self._numbers(groups))
            m = convert(team_max(m, part.lanes, thread), "f8")
            share = self._add_up(op, row, in_chunk(op, row, self._numbers(groups), m), m, thread)
        elif op.sums:
            share = self._sum(op, row, groups, thread)
        params = op.finish(row, share)
        if self.out is not None:
            self._store(op, row, groups, params)

    def _in_chunks(self, frame, op, row, first, thread):
        part, share = self.part, None
        span = part.lanes * part.vectors * part.group
        inverse = 1.0 / span  # a power of two
        count = convert(convert(frame.classes + (span - 1), "f8") * inverse, "i8")
        if op.softmax:

            def absorb(i, *state):
                groups = self._load(row, first + i * span)
                m = convert(max_tree(x for _, x, _, _ in self._numbers(groups)), "f8")
                m = larger(state[0], m)
                new = in_chunk(op, row, self._numbers(groups), m)
                joined = join_chunks(op, state[0], Share(*state[1:]), m, new)
                return m, *joined.known

            m, *state = repeat(count, absorb, *nothing_yet(op, first))
            top = team_max(m, part.lanes, thread)
            mine = join_chunks(op, m, Share(*state), top, None)
            share = self._add_up(op, row, mine, top, thread)
        elif op.sums:

            def add(i, total):
                return (total + self._lane_sum(op, row, self._load(row, first + i * span)),)

            (total,) = repeat(count, add, constant(first, 0.0, "f8"))
            share = team_sum(total, part.lanes, thread)
        params = op.finish(row, share)
        if self.out is not None:

            def sweep(i):
                self._store(op, row, self._load(row, first + i * span), params)
                return ()

            repeat(count, sweep)

    def _add_up(self, op, row, share, m, thread):
        """The row's share of each sum from the lanes'."""
        sums = [v if v is None else team_sum(v, self.part.lanes, thread) for v in share]
        return m, Share(*sums)

    def _sum(self, op, row, groups, thread):
        return team_sum(self._lane_sum(op, row, groups), self.part.lanes, thread)

    def _lane_sum(self, op, row, groups):
        terms = [
            where(j < row.classes, op.term(row, x, y, w), 0.0)
            for j, x, y, w in self._numbers(groups)
        ]
        return sum_tree(terms)

    def _store(self, op, row, groups, params):
        start, step = row.places["out"]
        for j, x, y, w in groups:
            numbers = [
                op.value(params, j, i, *values)
                for i, values in enumerate(zip(x(), y(), w(), strict=True))
            ]
            self.out.store(start, step, j, row.width, numbers, row.ok, row.near)
