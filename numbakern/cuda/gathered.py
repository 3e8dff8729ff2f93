"""The walker for rows that are only reduced, several in a block: a few lanes of a warp finish each.

What there is to do once a row takes as long as reducing a hundred of its elements, and in `rows`
all lanes of the row do it, or a warp. Here a warp or a part of one reduces a row, part by part. The
block's rows leave their parts' sums on boards beside one another, and one warp, a lane for each
part, joins and finishes all of them at once.
"""

from numbakern.cuda.device import constant, convert, dynamic_shared, smaller_integer, when
from numbakern.cuda.reduce import WARP, SharedBoard, team_fold
from numbakern.cuda.rows import Rows, Walk, joiners_of, nothing
from numbakern.cuda.softmax import neutral, reduced_of, width


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
        self.row, self.board = self._row(row, self.lane == 0, lanes)
        self.ok = frame.constant(True, "b1")  # one more is the last row once more

    def _row(self, number, leader, lanes):
        """A row of the block, by its number there, and its board."""
        entries = width(self.op)
        place = dynamic_shared(self.thread) + number * (8 * numbers_of(self.part, entries))
        p, ok = self._known(self.first + convert(number, "i8"))
        # Rows of one part are read whatever their labels, which are for who finishes a row.
        prompt = not self.part.single
        row = self.op.row(self.frame, p, ok, leader, lanes, self._peek, prompt=prompt)
        row.fold = team_fold
        return row, SharedBoard(neutral(self.op), place, 1)

    def _row_to_finish(self):
        """That of a thread, and its board; threads behind the last row's have it once more."""
        rows, lanes = self.way.gathers, joiners_of(self.part)
        number, lane = self.thread >> (lanes.bit_length() - 1), self.thread & (lanes - 1)
        there, number = number < rows, smaller_integer(number, rows - 1)
        row, board = self._row(number, there & (lane == 0), lanes)
        row.ok = row.ok & there
        return row, board

    def _peek(self, _class, read):
        """As `kernels.Row.peek`: of several parts it is on the board, of one in L1."""
        if self.part.single:
            return read(constant(self.thread, True, "b1"))
        return self.board.get(self.count, None, 1)[0]

    def run(self):
        """Reduce the rows, join and finish them."""
        if self.part.single:
            self._reduce_at_once()
        else:
            self._reduce_in_rounds()
        self.board.end()
        finishing = self.thread < max(WARP, self.way.gathers * joiners_of(self.part))
        when(finishing, self._finish_rows, [])

    def _reduce_at_once(self):
        """Reduce rows of one part each; nothing is waited for before all is asked for.

        A label only has to come to L1 meanwhile; the logit there comes with its row.
        """
        self.op.hint(self._row_to_finish()[0])
        self.tiles.load()
        if not self.tiles.inputs:
            self.held = self._place(self.own)
            self.held.load()
        self.tiles.put()
        self._each(self._reduce, nothing)

    def _reduce_in_rounds(self):
        """Reduce rows of several parts each, but for those that are ignored."""
        self.op.look(self.frame, self.row)
        self._each(self._reduce, self._read_logit)
        if self.logit is not None:
            self.board.put(self.count, [self.logit], self.lane, self.lane == 0)

    def _read_logit(self):
        """Read the logit at the label, while the row is on its way."""
        read = self.op.logit(self.frame, self.row)
        self.logit = read and read(self.lane == 0)

    def _finish_rows(self):
        """A row for each so many threads as join it."""
        self.row, self.board = self._row_to_finish()
        self.lane = self.thread & (WARP - 1)
        self.op.look(self.frame, self.row)
        self.op.settle(self.frame, self.row)
        if self.part.single:
            only = constant(self.thread, 0, "i4")
            self.op.finish(self.row, reduced_of(self.op, self.board.get(only, None)))
        else:
            self._finish(None)
        return []


def numbers_of(part, entries):
    """Float64 numbers on the board of a row: of its parts; of several, the logit at its label.

    Where there is one, that place is free, and tiles behind a block's boards begin where they may.
    """
    return part.parts(1) * entries + 1
