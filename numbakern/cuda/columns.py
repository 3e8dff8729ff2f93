"""The walker for columns: rows lie side by side, and neighbouring threads take neighbouring rows.

A row has as many lanes as in `rows`, with the same elements each; but they are in different warps
and tell each other what they have found through shared memory, in the same tree. So a row has the
same bits however it lies in memory. Rows of several parts take two launches, a block for a part of
some rows.
"""

from numbakern.cuda.device import (
    SIZE,
    barrier,
    bits_of,
    constant,
    divmod_positive,
    either,
    float_of,
    narrow,
    put_shared_words,
    shared,
    shared_words,
    tree,
)
from numbakern.cuda.reduce import WARP, Board, team_fold
from numbakern.cuda.rows import Rows, Walk
from numbakern.cuda.softmax import width

BLOCK = 128
"""Threads of a block, at least."""
MOST = 512
"""The same, at most: of the longest parts half as many rows lie side by side in a warp."""


def side_by_side(part):
    """Rows of a block: a power of two."""
    lanes = min(part.lanes, WARP)
    return min(MOST // lanes, max(WARP, BLOCK // lanes))


def threads_of(part):
    """Threads of a block."""
    return side_by_side(part) * min(part.lanes, WARP)


class Columns(Rows):
    """Walks rows, or parts of them, in the order of a Partition: `rows.Rows` of strided classes."""

    def walk(self, frame, op, turn):
        """As Rows.walk."""
        return _Columns(self, frame, op, turn)

    @staticmethod
    def folded_unless(mask, compute, folded):
        """As Rows.folded_unless; to fold, lanes meet in shared memory: all of them have to come."""
        nothing = [constant(mask, 0.0, elem) for elem in ("f4", "f8")]
        return [folded(v) for v in either(mask, lambda: nothing, compute)]


class _Columns(Walk):
    """A block's way through its rows, as one of their lanes takes it."""

    def _place_row(self, frame, op):
        p, block, blocks = frame.block, constant(frame.block, 0, "i8"), 1
        if self.way.spread:
            blocks = frame.blocks
            p, block = divmod_positive(p, blocks, frame.blocks_inverse)
        self.own, self.step = narrow(block), narrow(constant(p, 1, "i8") * blocks)
        rows = self.rows = side_by_side(self.part)
        self.near = max(1, WARP // rows)  # neighbouring lanes of a row in a warp
        if self.part.lanes == 1:
            self.column, self.lane = self.thread, self.thread & 0
        else:
            low, high = (n.bit_length() - 1 for n in (self.near, self.near * rows))
            self.column = (self.thread >> low) & (rows - 1)
            self.lane = (self.thread & (self.near - 1)) | ((self.thread >> high) << low)
        p = self._in_turn(p, rows, self.column)
        if not self.part.single:
            self.board = Board.of_row(frame, p, width(op), self.count)
        elif self.part.lanes > self.near:
            self.finishing = self.lane < self.near
        leader = (self.lane == 0) & (block == 0)
        self.row = op.row(frame, p, self.ok, leader, self.near, self._peek)
        self.row.fold = self._fold

    def _fold(self, v, lanes, combine):
        """As `reduce.team_fold`."""
        v = team_fold(v, min(self.near, lanes), combine)
        others = lanes // self.near
        if others <= 1:
            return v
        size = SIZE[v.elem]
        places = shared(self.thread, size * threads_of(self.part) // self.near)
        lane = self.lane >> (self.near.bit_length() - 1)
        if self.way.kept == "no" and width(self.op) == 1:
            # All have read what the round before left. Of several folds a round each sees to that.
            barrier(lane)
        first = (self.lane & (self.near - 1)) == 0
        put_shared_words(self._place_of(places, lane, size), size, [bits_of(v)], first)
        barrier(lane)
        found = (
            shared_words(self._place_of(places, constant(lane, n, "i4"), size), size, 1)
            for n in range(others)
        )
        return tree((float_of(word) for (word,) in found), combine)

    def _place_of(self, places, lane, size):
        return places + (lane * self.rows + self.column) * size
