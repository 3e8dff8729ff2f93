"""Rows of a block as one tile, copied between global and shared memory 16 bytes at once.

A short row belongs to few lanes, so that the elements of neighbouring lanes are far apart: an
access of a warp would touch a part of as many sectors as it has lanes, and of what is written
each part goes to L2 by itself. Where rows lie one after the other without gaps, all threads of a
block copy its rows as they lie, side by side, and the lanes find their elements, those that they
have anyway, in shared memory (`Staged`). Those of an array that starts anywhere are moved on the
way, by words, so that they lie there as those of any other (`StagedAnywhere`).
"""

from numbakern.cuda.device import (
    barrier,
    constant,
    convert,
    distance,
    dynamic_shared,
    either,
    funneled,
    load,
    narrow,
    put_shared_words,
    shared_words,
    smaller_integer,
    store,
    warp_barrier,
    when,
)
from numbakern.cuda.memory import ACCESS, Single
from numbakern.cuda.reduce import WARP

WORD = 4
"""Bytes of a word of what is copied."""
SWIZZLED = 128
"""Bytes within which places are exchanged."""


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
        self.edge = self.word, self.per_chunk  # what is copied at once of less than an access
        groups = part.vectors if part.exact else part.sure
        self.sure = groups * part.lanes * part.group  # elements of a row that has the fewest
        self.copied = -(-part.held * fmt.size // ACCESS)  # accesses of a thread, for its own part
        self.full = groups * self.bytes // ACCESS  # those of the row that has the fewest
        # Those that there is room for: of a lane that has a row nearly all of its own is taken.
        self.always = self.copied if part.lanes == 1 else max(self.full, self.copied - 1)
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


class StagedAnywhere(Staged):
    """The same of an array that does not start at 16 bytes."""

    def __init__(self, fmt, part):
        super().__init__(fmt, part)
        self.edge = fmt.size, 1


def slots(accesses):
    """{name: where the tile of each array begins}, in bytes a thread.

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
    return found


def size_of(accesses, part, classes, threads):
    """Bytes of a block's tiles, of the last one no more than its rows have; 0 if there are none.

    What is not taken is left to L1.
    """
    found = slots(accesses)
    if not found:
        return 0
    last = max(found, key=lambda name: found[name])
    rows = threads // part.lanes * classes * accesses[last].format.size
    rows = max(-(-rows // SWIZZLED) * SWIZZLED, accesses[last].always * ACCESS * threads)
    return found[last] * threads + rows


def run_of(added, lanes):
    """Rows of a warp that are neighbours, where several lanes have a row.

    Those of odd rows that follow one another begin at banks that do: what lanes read would lie in
    the same ones. Where losses are `added` up, pairs are left together for there to be fewer sums.
    """
    return 2 if added and lanes < WARP else 1


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
    begin : int
        Bytes of shared memory before them, a multiple of `SWIZZLED`.

    Attributes
    ----------
    found : dict of str to int
        As `slots`; empty where nothing is copied.
    row : Value
        The number in the block of a thread's row, if there are tiles.
    """

    def __init__(self, accesses, frame, part, threads, run, short, begin):
        self.found, self.tiles, self.thread = slots(accesses), {}, frame.thread
        self.lanes = part.lanes
        if self.found:
            self.row = _row_of(self.thread, part.lanes, threads, run)
            self._place(accesses, frame, part, threads, short, begin)

    def _place(self, accesses, frame, part, threads, short, begin):
        rows = threads // part.lanes
        first = frame.block * rows
        there = narrow(smaller_integer(frame.rows - first, rows))
        first = narrow(first) if short else first
        known = constant(self.thread, part.held, "i4") if part.exact else None
        self.classes = narrow(frame.classes) if known is None else known
        for name, at in self.found.items():
            start = getattr(frame, name) + distance(first, getattr(frame, f"{name}_step0"))
            row = self.classes * accesses[name].format.size
            kind = _MovedTile if isinstance(accesses[name], StagedAnywhere) else _Tile
            at = begin + at * threads
            sizes = row * there, row * rows
            self.tiles[name] = kind(accesses[name], start, *sizes, at, frame, threads)

    def start(self, name):
        """The place of a lane's row."""
        tile = self.tiles[name]
        return self.row * self.classes * tile.access.format.size + tile.at

    def element(self, name, j, mask):
        """The number that a lane's row has of class j, where the mask holds."""
        fmt = self.tiles[name].access.format
        at = self.tiles[name].access.at(self.start(name) + j * fmt.size)
        word = shared_words(at, fmt.size, 1, mask, fmt.fill_single)[0]
        if self.lanes > 1 and "out" in self.tiles:
            warp_barrier(self.thread)  # another lane of the row may write the result there
        return fmt.number(word)

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
    """So many bytes of global memory from an address on, and their place in shared memory.

    Parameters
    ----------
    access : Staged
    start, size, room : Value
        The address; how many; how many if all of the block's rows were there.
    at : int
        The place.
    frame : device.Frame
    threads : int
        Of the block, which copy them; an edge is what each of some copies beside whole accesses.
    """

    word = WORD

    def __init__(self, access, start, size, room, at, frame, threads):
        self.access, self.start, self.size, self.room, self.at = access, start, size, room, at
        self.thread, self.threads = frame.thread, threads
        word, count = access.edge
        self.edge = word * count

    def _accesses(self, behind=0, stored=False):
        """(whether it is there, its address, its place) of each of this thread's accesses.

        The first of them all begins so many bytes behind the tile's beginning. Those that are
        `stored` compare bytes: ptxas, which has seven predicates, would keep those of the loads
        for them, and ask for accesses one after the other.
        """
        mine, end, each = self.thread, self._whole(behind), self.threads
        if stored:
            mine, end, each = (n * ACCESS for n in (mine, end, each))
        first = self.thread * ACCESS + behind
        address = self.start + convert(first, "i8")
        for i in range(self.access.copied):
            more = i * self.threads * ACCESS
            yield mine < end - i * each, address + more, first + (self.at + more)

    def _whole(self, behind=0):
        """How many accesses there are from so many bytes on."""
        return (self.size - behind) >> _bits(ACCESS)

    def load(self):
        """Read this thread's accesses, without waiting."""
        self.words = [
            load(address, WORD, ACCESS // WORD, there, None)
            for there, address, _ in self._accesses()
        ]

    def put(self):
        """Put them into the tile, with what there is behind the last one."""
        first = self.thread * ACCESS
        place = self.access.at(first + self.at)
        for i, words in enumerate(self.words):
            more = i * self.threads * ACCESS
            # Rows that there are not get something, too: lanes read it.
            always = i < self.access.always
            mask = constant(first, True, "b1") if always else first < self.room - more
            put_shared_words(place + more, self.word, words, mask)
        if self.edge < ACCESS:
            whole = self._whole()
            rest = self.size - whole * ACCESS
            mine = self.thread == (whole & (self.threads - 1))  # who has put something there
            when((rest > 0) & mine, lambda: self._put_rest(whole * ACCESS, rest), [])

    def _put_rest(self, end, rest):
        """Copy the bytes behind the last access."""
        address, place = self.start + convert(end, "i8"), self.access.at(end + self.at)
        for at in range(0, ACCESS - self.edge, self.edge):
            there = rest > at
            words = load(address + at, *self.access.edge, there, None)
            put_shared_words(place + at, self.access.edge[0], words, there)
        return []

    def store(self):
        """Write the tile."""
        for i, (there, address, place) in enumerate(self._accesses(stored=True)):
            known = None if i < self.access.full else there
            words = shared_words(self.access.at(place), WORD, ACCESS // WORD, known, None)
            store(address, WORD, words, there)
        if self.edge < ACCESS:
            self._store_edges(self._whole() * ACCESS, self.size)

    def _store_edges(self, begin, end):
        """Write the bytes from one to another, fewer than an access has."""
        at = self.thread * self.edge + begin
        when(at < end, lambda: self._store_edge(at), [])

    def _store_edge(self, at):
        words = shared_words(self.access.at(at + self.at), *self.access.edge)
        store(self.start + convert(at, "i8"), self.access.edge[0], words)
        return []


class _MovedTile(_Tile):
    """The same from an address that is a multiple of an element's bytes, not of 16.

    Read are the words in which an access of the tile lies, in global memory, and written those in
    which one of global memory does, in the tile. Nothing is read that belongs to another tile.

    Attributes
    ----------
    before : Value
        Bytes before the first 16 of global memory.
    """

    def __init__(self, access, *others):
        super().__init__(access, *others)
        self.word = max(WORD, access.format.size)
        self.before = -narrow(self.start) & (ACCESS - 1)

    def load(self):
        """As _Tile.load."""
        accesses = [(there, address) for there, address, _ in self._accesses()]

        def whole():
            return [word for a in accesses for word in self._load_whole(*a)]

        if self.edge < WORD:
            words = either((self.before & 2) > 0, lambda: self._load_moved(accesses), whole)
        else:
            words = whole()
        each = ACCESS // self.word
        self.words = [words[i : i + each] for i in range(0, len(words), each)]

    def _load_whole(self, there, address):
        """The words of an access that is at a multiple of theirs."""
        return [
            load(address + at, self.word, 1, there, None)[0] for at in range(0, ACCESS, self.word)
        ]

    def _load_moved(self, accesses):
        """The words of all accesses, each of which begins and ends within one of global memory."""
        found = []
        for there, address in accesses:
            begin = load(address, 2, 1, there, None)[0] << 16
            words = [load(address + at, WORD, 1, there, None)[0] for at in range(2, 14, WORD)]
            words = [begin, *words, *load(address + 14, 2, 1, there, None)]
            found += funneled(words, constant(begin, 16, "i4"))
        return found

    def store(self):
        """As _Tile.store."""
        odd = self.before & (WORD - 1) if self.edge < WORD else None
        for there, address, place in self._accesses(self.before, stored=True):
            store(address, self.word, self._words_of(place, there, odd), there)
        self._store_edges(0, self.before)
        self._store_edges(self._whole(self.before) * ACCESS + self.before, self.size)

    def _words_of(self, place, there, odd):
        """The words from a place of the tile on, which begin `odd` bytes behind one of its own."""
        if odd is not None:
            place = place - odd
        words = [
            shared_words(self.access.at(place + at), self.word, 1, there, None)[0]
            for at in range(0, ACCESS, self.word)
        ]
        if odd is None:
            return words
        last = self.access.at(place + ACCESS)
        words += shared_words(last, self.word, 1, there & (odd > 0), None)
        return funneled(words, odd << 3)
