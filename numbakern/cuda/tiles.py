"""Rows of a block as one tile, copied between global and shared memory 16 bytes at once.

A short row belongs to few lanes, so that the elements of neighbouring lanes are far apart: an
access of a warp would touch a part of as many sectors as it has lanes, and of what is written
each part goes to L2 by itself. Where rows lie one after the other without gaps, all threads of a
block copy its rows as they lie, side by side, and the lanes find their elements, those that they
have anyway, in shared memory (`Staged`).
"""

from numbakern.cuda.device import (
    barrier,
    constant,
    convert,
    distance,
    dynamic_shared,
    load,
    narrow,
    put_shared_words,
    shared_words,
    smaller_integer,
    store,
    when,
)
from numbakern.cuda.memory import ACCESS, Single
from numbakern.cuda.reduce import WARP

WORD = 4
"""Bytes of a word of what is copied."""


class Staged(Single):
    """Rows of whole groups in a block's `Tiles`; an address is a place in one of them.

    Parameters
    ----------
    fmt : Format
    part : rows.Partition
        Of few lanes, and of one part.
    """

    staged = True

    def __init__(self, fmt, part):
        super().__init__(fmt, part, part.group * fmt.size)
        groups = part.vectors if part.exact else part.sure
        self.sure = groups * part.lanes * part.group  # elements of a row that has the fewest
        self.copied = -(-part.held * fmt.size // ACCESS)  # accesses of a thread, for its own part
        self.full = groups * self.bytes // ACCESS  # those of the row that has the fewest
        # 8 lanes, each of which has a row, are to meet all banks; of rows of 4 or 8 accesses they
        # would meet the same ones.
        self.swizzled = self.chunk == ACCESS and part.vectors % 4 == 0

    def distance(self, j, _step):
        """As Whole.distance, int32."""
        return narrow(j) * self.format.size

    def at(self, place):
        """The address of a place, or of what lies in the same 16 bytes."""
        if self.swizzled:
            place = place ^ ((place >> 3) & 0x70)
        return dynamic_shared(place) + place

    def _group(self, place, n):
        mask = self._is_there(place, n)
        at = self.at(place.address + n * self.format.size)
        return shared_words(at, self.word, self.per_chunk, mask, self.format.fill_word)

    def _is_there(self, place, n):
        """Whether a lane's element n is there; None for those that are in every row."""
        return None if place.left is None or n < self.sure else place.left > n

    def store(self, place, groups, numbers, ok, _team):
        """As Whole.store; what is not `ok` has a place as well, and is not copied."""
        for n, group in zip(groups, numbers, strict=True):
            mask = self._is_there(place, n)
            mask = constant(ok, True, "b1") if mask is None else mask
            at = self.at(place.address + n * self.format.size)
            put_shared_words(at, self.word, self._words(group), mask)

    def put(self, address, number, mask):
        """As Whole.put."""
        word = self.format.word_of(number)
        put_shared_words(self.at(address), self.format.size, [word], mask)


def slots(accesses):
    """({name: where the tile of each array begins}, where the last one ends), in bytes a thread.

    Results take the place of an input of elements as large: a lane writes over what it has read.
    """
    found: dict[str, int] = {}
    end = 0
    for name, access in accesses.items():
        if access.staged:
            same = (at for n, at in found.items() if accesses[n].format.size == access.format.size)
            at = next(same, None) if name == "out" else None
            found[name] = end if at is None else at
            end += access.copied * ACCESS if at is None else 0
    return found, end


def run_of(added):
    """Rows of a warp that are neighbours, where several lanes have a row.

    Those of odd rows that follow one another begin at banks that do: what lanes read would lie in
    the same ones. Where losses are `added` up, pairs are left together for there to be fewer sums.
    """
    return 2 if added else 1


def _row_of(thread, lanes, threads, run):
    """The number of a thread's row in its block.

    A warp's runs of rows are apart by as many as a row has lanes, or as there are warps; then L
    lanes of a row of an odd number of groups have L groups' banks for themselves.
    """
    team, warp = (thread & (WARP - 1)) >> _bits(lanes), thread >> _bits(WARP)
    if lanes == 1:
        return thread
    warps = min(lanes, threads // WARP)  # whose rows lie between one another's
    row = ((team >> _bits(run)) << _bits(warps * run)) | (team & (run - 1))
    row = row | ((warp & (warps - 1)) << _bits(run))
    return row | ((warp >> _bits(warps)) << _bits(warps * WARP // lanes))


def _bits(power):
    """Of a power of two, its exponent."""
    return power.bit_length() - 1


class Tiles:
    """The tiles of a block, one of each array that is `Staged`.

    Parameters
    ----------
    accesses : dict of str to memory access
    frame : device.Frame
    part : rows.Partition
    threads : int
        Of the block.
    run : int
        As `run_of`.
    short : bool
        Whether the numbers of rows, and distances between them, fit into 32 bits.

    Attributes
    ----------
    found : dict of str to int
        As `slots`; empty where nothing is copied.
    size : int
        Bytes of shared memory.
    row : Value
        The number in the block of a thread's row, if there are tiles.
    """

    def __init__(self, accesses, frame, part, threads, run, short):
        self.found, each = slots(accesses)
        self.size, self.tiles, self.thread = each * threads, {}, frame.thread
        if self.found:
            self.row = _row_of(self.thread, part.lanes, threads, run)
            self._place(accesses, frame, part, threads, short)

    def _place(self, accesses, frame, part, threads, short):
        rows = threads // part.lanes
        first = frame.block * rows
        there = narrow(smaller_integer(frame.rows - first, rows))
        first = narrow(first) if short else first
        known = constant(self.thread, part.held, "i4") if part.exact else None
        self.classes = narrow(frame.classes) if known is None else known
        for name, at in self.found.items():
            start = getattr(frame, name) + distance(first, getattr(frame, f"{name}_step0"))
            size = there * self.classes * accesses[name].format.size
            self.tiles[name] = _Tile(accesses[name], start, size, at * threads, frame, threads)

    def start(self, name):
        """The place of a lane's row."""
        tile = self.tiles[name]
        return self.row * self.classes * tile.access.format.size + tile.at

    @property
    def inputs(self):
        """The tiles of what is read."""
        return [tile for name, tile in self.tiles.items() if name != "out"]

    def load(self):
        """Read the rows, without waiting."""
        for tile in self.inputs:
            tile.load()

    def put(self):
        """Put them to where lanes find them."""
        for tile in self.inputs:
            tile.put()
        if self.inputs:
            barrier(self.thread)

    def store(self):
        """Write the results, of lanes that have put theirs into their tile."""
        if "out" in self.tiles:
            barrier(self.thread)
            self.tiles["out"].store()


class _Tile:
    """So many bytes of global memory from an address on, and their place in shared memory."""

    def __init__(self, access, start, size, at, frame, threads):
        self.access, self.at = access, at
        self.start, self.thread, self.threads = start, frame.thread, threads
        self.whole = size >> _bits(ACCESS)  # accesses
        self.rest = (size & (ACCESS - 1)) >> _bits(access.bytes)  # groups behind them

    def _accesses(self):
        """(whether it is there, address, address in shared memory) of those of this thread."""
        first = self.thread * ACCESS
        address, place = self.start + convert(first, "i8"), self.access.at(first + self.at)
        for i in range(self.access.copied):
            behind = i * self.threads
            there = self.thread < self.whole - behind
            yield there, address + behind * ACCESS, place + behind * ACCESS

    def load(self):
        self.words = [
            load(address, WORD, ACCESS // WORD, there, None)
            for there, address, _ in self._accesses()
        ]

    def put(self):
        # There is room for all, and something for rows that there are not.
        always = constant(self.thread, True, "b1")
        for words, (_, _, place) in zip(self.words, self._accesses(), strict=True):
            put_shared_words(place, WORD, words, always)
        if self.access.bytes < ACCESS:
            mine = self.thread == (self.whole & (self.threads - 1))
            when((self.rest > 0) & mine, self._put_rest, [])

    def _put_rest(self):
        """Copy what is left of the array, which is not 16 bytes: who has put words there does."""
        access, (address, place) = self.access, self._end()
        for i in range(ACCESS // access.bytes - 1):
            there, at = self.rest > i, i * access.bytes
            words = load(address + at, access.word, access.per_chunk, there, None)
            put_shared_words(place + at, access.word, words, there)
        return []

    def _end(self):
        """(address, address in shared memory) behind the last whole access."""
        end = self.whole * ACCESS
        return self.start + convert(end, "i8"), self.access.at(end + self.at)

    def store(self):
        for i, (there, address, place) in enumerate(self._accesses()):
            known = None if i < self.access.full else there
            words = shared_words(place, WORD, ACCESS // WORD, known, None)
            store(address, WORD, words, there)
        if self.access.bytes < ACCESS:
            when(self.thread < self.rest, self._store_rest, [])

    def _store_rest(self):
        access, (address, place) = self.access, self._end()
        at = self.thread * access.bytes
        words = shared_words(place + at, access.word, access.per_chunk)
        store(address + convert(at, "i8"), access.word, words)
        return []
