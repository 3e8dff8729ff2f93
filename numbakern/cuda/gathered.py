"""The walker for rows that are only reduced, several in a block: a few lanes of a warp finish each.

What there is to do once a row takes as long as reducing a hundred of its elements, and in `rows`
all lanes of the row do it, or a warp. Here a warp or a part of one reduces a row, part by part. The
block's rows leave their parts' sums on boards beside one another, and one warp, a lane for each
part, joins and finishes all of them at once.
"""

from numbakern.cuda.device import convert, dynamic_shared, smaller_integer, when
from numbakern.cuda.reduce import WARP, SharedBoard, team_fold
from numbakern.cuda.rows import Rows, Walk, joiners_of, nothing
from numbakern.cuda.softmax import reduced_of, width


class Gathered(Rows):
    """Walks rows in the order of a Partition, in a Way that gathers."""

    def run(self, frame, op):
        """Run an operation of `kernels` on the rows of this block."""
        _Gathered(self, frame, op).run()


class _Gathered(Walk):
    """A warp's way through the parts of one of the block's rows, or of several of one part each."""

    @property
    def boards(self):
        """As Walk.boards; one of each row."""
        return 8 * self.way.gathers * numbers_of(self.part, width(self.op))

    def _place_row(self, frame, op):
        lanes = min(self.part.lanes, WARP)
        self.lane, row = self.thread & (lanes - 1), self._team(lanes.bit_length() - 1)
        self.first = frame.block * self.way.gathers
        self.own, self.step = (frame.constant(n, "i4") for n in (0, 1))  # all of its parts
        self._take(row, self.lane == 0, lanes)
        self.ok = frame.constant(True, "b1")  # one more is the last row once more

    def _take(self, number, leader, lanes):
        """Go on with a row of the block, by its number there, and its board."""
        entries = width(self.op)
        place = dynamic_shared(self.thread) + number * (8 * numbers_of(self.part, entries))
        self.board = SharedBoard(entries, place, 1)
        p = self._known(self.first + convert(number, "i8"))
        self.row = self.op.row(self.frame, p, self.ok, leader, lanes, self._peek)
        self.row.fold = team_fold

    def _peek(self, _class, _read):
        """As `kernels.Row.peek`: it is on the board."""
        return self.board.get(self.count, None, 1)[0]

    def run(self):
        """Reduce the rows, join and finish them."""
        op, row = self.op, self.row
        self.tiles.load()
        op.look(self.frame, row)
        if self.tiles.inputs:  # who waits for them need not wait for the logit afterwards
            self._read_logit()
            self.tiles.put()
            self._each(self._reduce, nothing)
        else:
            self._each(self._reduce, self._read_logit)
        if self.logit is not None:
            self.board.put(self.count, [self.logit], self.lane, self.lane == 0)
        self.board.end()
        rows, lanes = self.way.gathers, joiners_of(self.part)
        finishing = self.thread < max(WARP, rows * lanes)
        when(finishing, lambda: self._finish_rows(rows, lanes), [])

    def _read_logit(self):
        """Read the logit at the label, while the row is on its way."""
        read = self.op.logit(self.frame, self.row)
        self.logit = read and read(self.lane == 0)

    def _finish_rows(self, rows, lanes):
        """A row for each `lanes` threads."""
        row = self.thread >> (lanes.bit_length() - 1)
        there, row = row < rows, smaller_integer(row, rows - 1)
        self.lane = self.thread & (WARP - 1)
        self._take(row, there & ((self.lane & (lanes - 1)) == 0), lanes)
        self.row.ok = self.row.ok & there
        self.op.look(self.frame, self.row)
        self.op.settle(self.frame, self.row)
        if self.part.single:
            self.op.finish(self.row, reduced_of(self.op, self.board.get(row & 0, None)))
        else:
            self._finish(None)
        return []


def numbers_of(part, entries):
    """Float64 numbers on the board of a row: of its parts, and the logit at its label."""
    return part.parts(1) * entries + 1
