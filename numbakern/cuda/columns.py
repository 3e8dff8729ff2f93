"""The walker for columns: rows lie side by side, and every thread takes a part of a row of its own.

A thread goes through its part slot by slot, where slot l is what lane l of `rows` would have, and
combines the slots in the same tree. So a row has the same bits however it lies in memory. Rows of
several parts take two launches, so that few long rows find as many threads as many short ones.
"""

import operator

from numbakern.cuda.device import (
    constant,
    convert,
    divmod_positive,
    larger,
    max_tree,
    narrow,
    repeat,
    smaller_integer,
    tree,
    where,
)
from numbakern.cuda.reduce import WARP, Board
from numbakern.cuda.rows import Lane, Walk, joiners_of
from numbakern.cuda.softmax import share_of, sum_of_terms, width

BLOCK = 128
"""Threads of a block."""
HELD = 32
"""Elements that a thread keeps in registers at most."""


class Columns:
    """Walks rows, or parts of them, a thread each, in the order of a Partition.

    Parameters
    ----------
    part : Partition
    way : Way
        Of one warp: what a thread takes is what a warp of `Rows` would.
    accesses : dict of str to memory.Strided
        How x, y, w (the class weights) and out lie, as far as they are there.
    """

    def __init__(self, part, way, accesses):
        self.part, self.way, self.accesses = part, way, accesses
        self.inputs = {n: a for n, a in accesses.items() if n != "out"}
        self.out = accesses.get("out")
        self.lanes = min(part.lanes, WARP)
        self.held = part.single and part.span <= HELD

    def run(self, frame, op):
        """Run an operation of `kernels` on the rows of this block."""
        _Columns(self, frame, op).run()


class _Columns(Walk):
    """A thread's way through its row."""

    def _begin(self, frame, op):
        p, block, blocks = frame.block, constant(frame.block, 0, "i8"), 1
        if self.way.spread:
            blocks = frame.blocks
            p, block = divmod_positive(p, blocks, frame.blocks_inverse)
        self.own, self.step = narrow(block), narrow(constant(p, 1, "i8") * blocks)
        p = p * BLOCK + convert(self.thread, "i8")
        self.ok = p < frame.rows
        p = smaller_integer(p, frame.rows - 1)
        self.lane = self.thread & 0
        if not self.part.single:
            self.board = Board.of_row(frame, p, width(op), self.count)
        self.row = op.row(frame, p, self.ok, block == 0, self._peek)

    def _place(self, part):
        return Slots(self.walker, self.row, convert(part, "i8") * self.part.span)

    def _over_parts(self, values, combine, start, count):
        """As `softmax.join` asks: what the lanes of a warp would do, one after the other."""
        start = [constant(self.own, start, "f8")] * count
        if self.part.chunks:
            rounds, joiners = self.frame.joins, WARP
        else:
            rounds, joiners = constant(self.own, 1, "i8"), joiners_of(self.part)

        def slot(lane):
            def add(i, *state):
                part = narrow(i * WARP + lane)
                found = values(part, part < self.count)
                return tuple(combine(s, v) for s, v in zip(state, found, strict=True))

            return repeat(rounds, add, *start)

        return in_tree(constant(self.own, joiners, "i8"), slot, combine, start)


class Slots:
    """A part of a row, slot by slot.

    Parameters
    ----------
    walker : Columns
    row : Row
    first : Value
        Class that it begins with.
    """

    def __init__(self, walker, row, first):
        self.walker, self.row, self.first = walker, row, first
        self.kept = None

    def load(self):
        """Read the elements that can be kept."""
        if self.walker.held:
            self.kept = [self._read(slot) for slot in range(self.walker.lanes)]

    def _read(self, slot):
        lane = Lane(self.walker, self.row, self.first + slot * self.walker.part.group)
        lane.load()
        return lane

    def _combined(self, values, combine, zeros):
        """What ``values(lane)`` combine to, in the tree of `reduce.team_fold`."""
        if self.kept is not None:
            every = [values(lane) for lane in self.kept]
            return [tree(some, combine) for some in zip(*every, strict=True)]
        lanes = constant(self.first, self.walker.lanes, "i8")
        return in_tree(lanes, lambda slot: values(self._read(slot)), combine, zeros)

    def reduce(self, op):
        """As Lane.reduce."""
        zero = constant(self.first, 0.0, "f8")
        if not op.softmax:

            def total(lane):
                return [sum_of_terms(op, self.row, lane.left, lane.numbers())]

            return self._combined(total, operator.add, [zero])
        lowest = constant(self.first, float("-inf"), op.elem)

        def largest(lane):
            return [max_tree(x for _, x, _, _ in lane.numbers())]

        (m,) = self._combined(largest, larger, [lowest])
        m = convert(m, "f8")

        def share(lane):
            return share_of(op, self.row, lane.left, lane.numbers(), m).known

        zeros = [constant(self.first, 0.0, op.elem)] + [zero] * (width(op) - 2)
        return [m, *(convert(v, "f8") for v in self._combined(share, operator.add, zeros))]

    def map(self, op, params):
        """As Lane.map."""
        if self.kept is not None:
            for lane in self.kept:
                lane.map(op, params)
            return

        def put(slot):
            self._read(slot).map(op, params)
            return ()

        repeat(constant(self.first, self.walker.lanes, "i8"), put)


LEVELS = WARP.bit_length() - 1


def in_tree(count, values, combine, zeros):
    """``values(slot)`` combined over `count` slots (a power of two) in the tree of a team's lanes.

    A binary counter: what 2**b slots come to waits at level b until its neighbour is complete.
    """

    def visit(slot, *state):
        waiting = [state[i : i + len(zeros)] for i in range(0, len(state), len(zeros))]
        carry = values(slot)
        for b in range(LEVELS):
            low = (1 << b) - 1
            arrives, complete = (slot & low) == low, ((slot >> b) & 1) != 0
            merged = [combine(w, c) for w, c in zip(waiting[b], carry, strict=True)]
            waiting[b] = [
                where(arrives & ~complete, c, w) for w, c in zip(waiting[b], carry, strict=True)
            ]
            carry = [where(arrives & complete, s, c) for s, c in zip(merged, carry, strict=True)]
        return tuple(v for level in [*waiting[:LEVELS], carry] for v in level)

    state = repeat(count, visit, *(list(zeros) * (LEVELS + 1)))
    return state[len(zeros) * LEVELS :]
