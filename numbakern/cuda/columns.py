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
    convert,
    divmod_positive,
    either,
    float_of,
    narrow,
    put_shared_words,
    shared,
    shared_words,
    tree,
    when,
)
from numbakern.cuda.reduce import WARP, Beside, Board, team_fold
from numbakern.cuda.rows import Rows, Walk
from numbakern.cuda.softmax import neutral

BLOCK = 128
"""Threads of a block, at least."""
MOST = 512
"""The same, at most: of the longest parts half as many rows lie side by side in a warp. Half of
that where a lane has several rows, and so many more registers."""


def side_by_side(part, together=1):
    """Lanes of a block that have the same classes, of so many rows each: a power of two."""
    lanes, most = min(part.lanes, WARP), MOST if together == 1 else MOST // 2
    return min(most // lanes, max(WARP, BLOCK // lanes))


def threads_of(part, together=1):
    """Threads of a block."""
    return side_by_side(part, together) * min(part.lanes, WARP)


class Columns(Rows):
    """Walks rows, or parts of them, in the order of a Partition: `rows.Rows` of strided classes.

    With arrays that are `memory.Abreast` a lane has neighbouring rows, of one part each, which are
    read and written together.
    """

    def __init__(self, part, way, accesses):
        super().__init__(part, way, accesses)
        self.together = max((a.rows for a in accesses.values()), default=1)

    def run(self, frame, op):
        """As Rows.run."""
        if self.together == 1:
            super().run(frame, op)
            return
        counted, beside = self._counted(frame, op), Beside(self.together)
        walks = [_Columns(self, frame, op, turn, beside) for turn in range(self.together)]
        _load([walk.hold() for walk in walks])
        self._settle(counted, walks)
        _run(walks, op)

    def walk(self, frame, op, turn):
        """As Rows.walk."""
        return _Columns(self, frame, op, turn)

    @staticmethod
    def folded_unless(mask, compute, folded):
        """As Rows.folded_unless; to fold, lanes meet in shared memory: all of them have to come."""
        nothing = [constant(mask, 0.0, elem) for elem in ("f4", "f8")]
        return [folded(v) for v in either(mask, lambda: nothing, compute)]


def _load(lanes):
    """Read what the lanes of neighbouring rows have."""
    first = lanes[0]
    sure = first.part.sure
    for name, access in first.walker.inputs.items():
        place, load = first.places[name], access.load if access.rows == 1 else access.load_rows
        found = load(place._replace(left=None), first.groups[:sure])
        found += load(place, first.groups[sure:])
        for turn, lane in enumerate(lanes):
            lane.words[name] = found if access.rows == 1 else access.of_row(turn, found)


def _run(walks, op):
    """Reduce and map neighbouring rows."""
    first, reduces = walks[0], op.softmax or op.sums
    out, finishing = first.walker.out, first.finishing
    # Each is finished before the next one is reduced: what that takes in between need not be kept.
    reduced = (walk._reduced() if reduces else None for walk in walks)
    if out is None and finishing is not None:
        reduced = list(reduced)  # all threads have to come to it
    finished = (walk._finish(r) for walk, r in zip(walks, reduced, strict=True))
    if out is not None:
        pairs = zip(walks, finished, strict=True)
        found = [walk._to_map(walk.own, None, params) for walk, params in pairs]
        lane, _ = found[0]
        rows = zip(*(lane.results(op, params) for lane, params in found), strict=True)
        out.store_rows(lane.places["out"], lane.groups, rows, lane.row.ok)
        for lane, params in found:
            lane.put_exception(op, params)
    elif finishing is None:
        list(finished)
    else:
        when(finishing, lambda: list(finished) and [], [])


class _Columns(Walk):
    """A block's way through its rows, as one of their lanes takes it."""

    def _place_row(self, frame, op):
        p, block, blocks = frame.block, constant(frame.block, 0, "i8"), 1
        if self.way.spread:
            blocks = frame.blocks
            p, block = divmod_positive(p, blocks, frame.blocks_inverse)
        self.own, self.step = narrow(block), narrow(constant(p, 1, "i8") * blocks)
        together = self.walker.together
        rows = self.rows = side_by_side(self.part, together)
        self.near = max(1, WARP // rows)  # neighbouring lanes of a row in a warp
        if self.part.lanes == 1:
            self.column, self.lane = self.thread, self.thread & 0
        else:
            low, high = (n.bit_length() - 1 for n in (self.near, self.near * rows))
            self.column = (self.thread >> low) & (rows - 1)
            self.lane = (self.thread & (self.near - 1)) | ((self.thread >> high) << low)
        if self.beside:
            p = (p * rows + convert(self.column, "i8")) * together
            p, self.ok = self._known(p, together)
        else:
            p = self._in_turn(p, rows, self.column)
        if not self.part.single:
            self.board = Board.of_row(frame, p, neutral(op), self.count)
        elif self.part.lanes > self.near:
            self.finishing = self.lane < self.near
        leader = (self.lane == 0) & (block == 0)
        which = (self.turn, self.beside) if self.beside else ()
        self.row = op.row(frame, p, self.ok, leader, self.near, self._peek, *which)
        self.row.fold = self._fold

    def hold(self):
        """The elements that this row's lane is to have, not read yet."""
        self.held = self._place(self.own)
        return self.held

    def _fold(self, values, lanes, combine):
        """As `reduce.team_fold`."""
        values = team_fold(values, min(self.near, lanes), combine)
        others = lanes // self.near
        if others <= 1:
            return values
        sizes = [SIZE[v.elem] for v in values]
        teams = threads_of(self.part, self.walker.together) // self.near
        places = [shared(self.thread, size * teams) for size in sizes]
        lane = self.lane >> (self.near.bit_length() - 1)
        if self.way.kept == "no" and not self.op.softmax:
            # All have read what the round before left. Of several folds a round each sees to that.
            barrier(lane)
        first = (self.lane & (self.near - 1)) == 0
        for v, at, size in zip(values, places, sizes, strict=True):
            put_shared_words(self._place_of(at, lane, size), size, [bits_of(v)], first)
        barrier(lane)

        def left(lane):
            words = (
                shared_words(self._place_of(at, lane, size), size, 1)
                for at, size in zip(places, sizes, strict=True)
            )
            return [float_of(word) for (word,) in words]

        return tree((left(constant(lane, n, "i4")) for n in range(others)), combine)

    def _place_of(self, places, lane, size):
        return places + (lane * self.rows + self.column) * size
