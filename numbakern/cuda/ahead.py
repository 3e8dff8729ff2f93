"""The walker for long rows of which a block, or a cluster, has one after the other.

A block with one row loads, computes and stores in turn: while it stores, nothing loads. Here all
parts of a row lie in shared memory, each warp's in places that it uses in turn. As soon as a warp
has mapped a part, it asks for one of the next rows to be copied to where that lay: the same part of
the next row, or one behind that where there are more places than parts. So those rows are on their
way while this one is reduced, mapped and stored. A lane reads but what it has asked for itself, and
waits for no other one. How a row is cut and computed is as in `rows`, and so are its bits.
"""

from numbakern.cuda.device import (
    await_copies,
    commit_copies,
    constant,
    copy_to_shared,
    dynamic_shared,
    either,
    narrow,
    put_shared_words,
    repeat,
    where,
)
from numbakern.cuda.memory import ACCESS
from numbakern.cuda.reduce import WARP, SharedBoard, team_fold
from numbakern.cuda.rows import Rows, Shelf, Walk, nothing, shelved
from numbakern.cuda.softmax import neutral, width


def can_copy(part, inputs, both):
    """Whether what shared memory keeps of a row lies in pieces of whole copies."""
    kept = {name for _, name, *_ in shelved(part, inputs, both)}
    return bool(kept) and all(inputs[n].direct and inputs[n].chunk == ACCESS for n in kept)


class Ahead(Rows):
    """Walks rows in the order of a Partition, in a Way that keeps them ahead."""

    def run(self, frame, op):
        """Run an operation of `kernels` on the rows of this block."""
        counted = self._counted(frame, op)
        _Ahead(self, frame, op).run(counted)


class _Ahead(Walk):
    """A warp's way through its parts of one row after the other."""

    def _board(self, _p, _nothing):
        """The first of two boards, used in turn: one is read yet when the other one is written."""
        self.rounds, self.places = narrow(self.frame.rounds), narrow(self.frame.places)
        self.shelf = _Places(
            self.lane,
            dynamic_shared(self.thread),
            self.places * self.way.warps,
            self.walker,
            self.op.both,
        )
        self.first = constant(self.rounds, 0, "i4")
        return self._board_of(self.first)

    def _board_of(self, turn):
        """That of a turn."""
        size = self.count * (8 * width(self.op))
        place = self.shelf.behind + (turn & 1) * size
        return SharedBoard(neutral(self.op), place, self.way.cluster)

    def _take(self, turn):
        """The row of a turn; one that there is not has no elements."""
        first = self.frame.block >> (self.way.cluster.bit_length() - 1)
        p, self.ok = self._known(first + turn * self.frame.stride)
        leader = (self.own == 0) & (self.lane == 0)
        row = self.op.row(self.frame, p, self.ok, leader, WARP, self._peek)
        row.fold, row.team = team_fold, self.team
        row.classes = where(row.ok, row.classes, 0)
        return row

    def _take_next(self, turn):
        """The rows whose parts are asked for while that of the turn before is mapped."""
        return [self._take(turn + n) for n in range(1 + self.way.spare)]

    def run(self, counted):
        """Ask for as many parts as there are places; reduce, join and map one row after another."""
        self.team = self.row.team
        rows = self._take_next(constant(self.frame.block, 0, "i8"))
        self.board.begin()  # while labels are on their way
        for row in rows:
            self.op.look(self.frame, row)
        repeat(self.frame.places, lambda i: self._ask(rows, narrow(i), narrow(i)) or ())
        self.scale = counted.scale() if counted else None
        repeat(self.frame.turns, self._turn, self.first)

    def _turn(self, turn, first):
        """Do all that is done with a row, whose first part is in this of the warp's places."""
        op, frame, self.first = self.op, self.frame, first
        rows = self._take_next(turn + 1)
        self.row, self.board = self._take(turn), self._board_of(narrow(turn))
        if self.scale is not None:
            self.row.scale = self.scale
        self.ok = constant(turn, True, "b1")  # parts of a row that there is not are on the board
        op.look(frame, self.row)
        op.settle(frame, self.row)
        self._each(self._reduce, nothing)
        for row in rows:
            op.look(frame, row)  # their labels have come
        self.board.end()
        params, spare = self._finish(None), self.places - self.rounds

        def map_and_ask(part, i, _begin):
            self._map(part, i, params)
            self._ask(rows, narrow(i) + spare, self._place_of(i))

        self._each(map_and_ask, nothing, back=True)
        return (self._place_of(self.rounds) if self.way.spare else first,)

    def _each(self, visit, begin, back=False):
        """As Walk._each, the parts in the order in which they are asked for."""
        begin()

        def in_round(i):
            visit(self.own + narrow(i) * self.step, i, nothing)
            return ()

        repeat(self.frame.rounds, in_round)

    def _read(self, part, i, anew=False):
        """As Walk._read; those of a part that is read `anew` may be on their way."""
        if anew:
            await_copies(self.lane, self.way.places - 1)
            commit_copies(self.lane)  # of none: so many are behind the next part's as well
        span = self._place(part)
        span.words = self.shelf.get(self._own_number(i))
        span.load()
        return span

    def _keep(self, i, words):
        """As Walk._keep: it is there."""

    def _place_of(self, i):
        """That of the warp's places where its part i is."""
        if not self.way.spare:
            return narrow(i)
        place = self.first + narrow(i)
        return where(place >= self.places, place - self.places, place)

    def _own_number(self, i):
        """As Walk._own_number, by the place."""
        return super()._own_number(self._place_of(i))

    def _ask(self, rows, i, place):
        """Have the warp's part i of these rows, one behind the other, copied to a place."""
        later = None
        if self.way.spare:
            later = i >= self.rounds
            i = where(later, i - self.rounds, i)
        spans = [self._place(self.own + i * self.step, row) for row in rows]
        self.shelf.ask(super()._own_number(place), spans, later)
        commit_copies(self.lane)


class _Places(Shelf):
    """A Shelf to which elements are copied."""

    def ask(self, n, spans, later):
        """Have a Lane's elements copied to place n; of two the second one's, where `later`."""

        def chosen(get):
            values = [get(span) for span in spans]
            return values[0] if later is None else where(later, *reversed(values))

        left, groups = chosen(lambda span: span.left), spans[0].groups
        starts = {n: chosen(lambda span, n=n: span.places[n].address) for n in self.inputs}
        copies = []
        for place, size, name, at, count in self._places(n):
            access = self.inputs[name]
            group, behind = divmod(at * size, access.bytes)
            address = starts[name] + (groups[group] * access.format.size + behind)
            fill = access.format.filled(place, size, count)
            copies.append((place, address, left > groups[group], size, fill))

        def all_of_them():
            for place, address, *_ in copies:
                copy_to_shared(place, address)
            return []

        def those_there_are():
            for place, address, there, *_ in copies:
                copy_to_shared(place, address, there)
            for place, _, there, size, fill in copies:
                put_shared_words(place, size, fill, ~there)
            return []

        either(left > groups[-1], all_of_them, those_there_are)
