"""The walker for rows that are only reduced, several in a block: a few lanes of a warp finish each.

What there is to do once a row takes as long as reducing a hundred of its elements, and in `rows`
all lanes of the row do it, or a warp. Here a block's rows leave their parts' sums on boards beside
one another, and one warp, a lane for each part, joins and finishes all of them at once.
"""

from numbakern.cuda.device import convert, dynamic_shared, narrow, smaller_integer, when
from numbakern.cuda.reduce import WARP, SharedBoard, team_fold
from numbakern.cuda.rows import Rows, Walk, joiners_of
from numbakern.cuda.softmax import reduced_of, width


class Gathered(Rows):
    """Walks rows in the order of a Partition, in a Way that gathers."""

    def run(self, frame, op):
        """Run an operation of `kernels` on the rows of this block."""
        _Gathered(self, frame, op).run()


class _Gathered(Walk):
    """A warp's way through its parts of the block's rows."""

    def _begin(self, frame, op):
        part, thread, rows = self.part, self.thread, self.way.gathers
        lanes = min(part.lanes, WARP)
        self.lane, team = thread & (lanes - 1), thread >> (lanes.bit_length() - 1)
        self.first = frame.block * rows
        row, self.own = team & (rows - 1), team >> (rows.bit_length() - 1)
        self.step = narrow(frame.constant(self.way.warps // rows, "i8"))
        self.row = self._row(row, True)
        self.row.fold = team_fold
        self.board = self._board_of(row)

    def _row(self, number, leader):
        """A row of the block, by its number there."""
        p = self.first + convert(number, "i8")
        self.ok = p < self.frame.rows
        leader = leader & self.ok
        return self.op.row(
            self.frame, smaller_integer(p, self.frame.rows - 1), self.ok, leader, _read
        )

    def _board_of(self, row):
        entries = width(self.op)
        size = self.part.parts(1) * (8 * entries)
        return SharedBoard(entries, dynamic_shared(self.thread) + row * size, 1)

    def run(self):
        """Reduce the rows, join and finish them."""
        self.op.look(self.frame, self.row)
        if self.part.single:
            numbers = self._read(self.own, None).reduce(self.op)
            self.board.put(self.own, numbers, self.lane, self.ok)
        else:
            self._each(self._reduce, self.board.begin)
        self.board.end()
        lanes = 1 if self.part.single else joiners_of(self.part)
        rows = self.way.gathers
        finishing = self.thread < max(WARP, rows * lanes)
        when(finishing, lambda: self._finish_rows(rows, lanes), [])

    def _finish_rows(self, rows, lanes):
        """A row for each `lanes` threads."""
        row = self.thread >> (lanes.bit_length() - 1)
        there, row = row < rows, smaller_integer(row, rows - 1)
        self.lane = self.thread & (WARP - 1)
        self.row = self._row(row, there & ((self.lane & (lanes - 1)) == 0))
        self.row.lanes, self.row.fold, self.row.ok = lanes, team_fold, self.row.ok & there
        self.op.look(self.frame, self.row)
        self.op.settle(self.frame, self.row)
        self.board, reduced = self._board_of(row), None
        if self.part.single:
            reduced = reduced_of(self.op, self.board.get(row & 0, None))
            self.board = None
        self._finish(reduced)
        return []


def _read(_class, read):
    """As `kernels.Row.peek`: who finishes a row reads it."""
    return read(True)
