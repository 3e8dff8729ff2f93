"""Sums and maxima over lanes that share a row, boards for the parts of a row, where rows lie.

A team is a power of two of lanes, a warp at most. Sums run over a binary tree, neighbouring lanes
first, so that another walker can add in the same order.
"""

import math

from numbakern.cuda.device import (
    barrier,
    bits_of,
    cluster_barrier,
    cluster_start,
    constant,
    convert,
    distance,
    divmod_positive,
    float_of,
    load,
    meet,
    shared_load,
    shared_store,
    shuffle_xor,
    store,
    when,
    where,
)

WARP = 32


def team_fold(values, lanes, combine):
    """Combine numbers (f4, f8 or i4) over each team of so many lanes; every lane gets the results.

    Parameters
    ----------
    combine : function (a, b) -> c
        Of lists of such numbers; commutative.
    """
    offset = 1
    while offset < lanes:
        values = combine(values, [shuffle_xor(v, offset) for v in values])
        offset *= 2
    return values


class Board:
    """Where the parts of a row leave what they have reduced, in global memory for the next launch.

    Parameters
    ----------
    nothing : list of float
        What no elements reduce to (`softmax.neutral`): as many float64 numbers as a part has.
    address : Value
        Of those of the row's first part.

    Attributes
    ----------
    scattered : bool
        Whether each thread can get but the part of its own number.
    """

    scattered = False

    def __init__(self, nothing, address):
        self.nothing, self.width, self.address = nothing, len(nothing), address

    @classmethod
    def of_row(cls, frame, p, nothing, parts):
        """That of row number p in the array `shares`, with a place for one more number behind."""
        size = 8 * (parts * len(nothing) + 1)
        return cls(nothing, frame.shares + p * size) if nothing else None

    def begin(self):
        """Has to come before the first `put`."""

    def end(self):
        """Has to come between the last `put` and the first `get`."""

    def put(self, part, numbers, lane, there):
        """Write the numbers of a part, which all lanes of its team have, where `there`."""
        for i, v in enumerate(numbers):
            at = self.address + (part * self.width + i) * 8
            store(at, 8, [bits_of(v)], there & (lane == 0))

    def get(self, part, there, count=None):
        """The first `count` numbers of a part; where `there` does not hold, those of nothing."""
        at = self.address + part * (8 * self.width)
        fills = [_BITS[v] for v in self.nothing[:count]]
        return [float_of(load(at + 8 * i, 8, 1, there, v)[0]) for i, v in enumerate(fills)]


class MeetingBoard(Board):
    """A Board in global memory for the blocks that have a row together: they meet in between.

    Each thread has the numbers of but one part, that of its own number.
    """

    scattered = True

    @classmethod
    def of_row(cls, frame, p, nothing, parts):
        """As Board.of_row; the array `meetings` has a counter for each row, behind the tickets'."""
        board = super().of_row(frame, p, nothing, parts)
        board.counter, board.blocks = frame.meetings + ((p + 1) << 2), frame.blocks
        board.thread, board.there = frame.thread, frame.thread < parts
        return board

    def end(self):
        """As Board.end; the numbers are read."""
        meet(self.counter, self.blocks, self.thread)
        read, nothing = super().get, [constant(self.address, v, "f8") for v in self.nothing]
        self.numbers = when(self.there, lambda: read(self.thread, None), nothing)

    def get(self, part, there, count=None):
        """As Board.get, of the thread's part alone."""
        return self.numbers[:count]


_BITS = {0.0: 0, -math.inf: 0xFFF0 << 48}


class SharedBoard(Board):
    """A Board in the shared memory of the row's blocks, each of which has all of it.

    Parameters
    ----------
    nothing, address
        As of Board; the address is the same in all blocks.
    cluster : int
        How many blocks there are.
    """

    def __init__(self, nothing, address, cluster):
        super().__init__(nothing, address)
        self.cluster = cluster

    def begin(self):
        """As Board.begin: the other blocks have to have started."""
        if self.cluster > 1:
            cluster_start(self.address)

    def end(self):
        """As Board.end."""
        if self.cluster > 1:
            cluster_barrier(self.address)
        else:
            barrier(self.address)

    def put(self, part, numbers, lane, there):
        """As Board.put; a lane for each block."""
        at, peer = self.address + part * (8 * self.width), None
        if self.cluster > 1:
            peer = lane & (self.cluster - 1)
        for i, v in enumerate(numbers):
            shared_store(at + 8 * i, v, there & (lane < self.cluster), peer)

    def get(self, part, there, count=None):
        """As Board.get."""
        part = part if there is None else where(there, part, 0)
        at = self.address + part * (8 * self.width)
        found = [shared_load(at + 8 * i) for i in range(count or self.width)]
        if there is None:
            return found
        return [where(there, *pair) for pair in zip(found, self.nothing[:count], strict=True)]


class Beside:
    """The neighbouring rows that a lane has, and what is known of them until all have come to it.

    Attributes
    ----------
    count : int
        A power of two.
    known : dict
    """

    def __init__(self, count=1):
        self.count, self.known = count, {}


def offsets(frame, row, dimensions, names, behind=0):
    """Where a row of the batch starts in each of these arrays, in bytes (int64).

    The one that lies so many `behind` row number `row`, on the same last axis. The batch has
    `dimensions` axes, the last one running fastest. Axis d of size `size{d}` (its reciprocal is
    `inverse{d}`) is `{name}_step{d}` bytes apart in the array `name`.
    """
    if dimensions > 1:
        row = convert(row, "i8")
    found = [constant(row, 0, "i8") for _ in names]
    for d in range(dimensions - 1, -1, -1):
        i = row
        if d:
            row, i = divmod_positive(row, getattr(frame, f"size{d}"), getattr(frame, f"inverse{d}"))
        found = [
            at + distance(i, getattr(frame, f"{name}_step{d}"))
            for at, name in zip(found, names, strict=True)
        ]
    if behind:
        last = (getattr(frame, f"{name}_step{dimensions - 1}") for name in names)
        found = [at + step * behind for at, step in zip(found, last, strict=True)]
    return found
