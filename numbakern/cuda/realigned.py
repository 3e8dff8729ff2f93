"""Long rows of halves that start anywhere, or end within 16 bytes.

A lane's groups of 8 halves are those of a row that starts at 16 bytes. Where it does not, a lane
reads the words in which its group lies, five for four, and moves them into place: what it does not
need of a line, its neighbours find in L1. What is written is not gathered there: each access would
leave parts of sectors. So groups pass through shared memory, from where each lane writes the
16 aligned bytes, the *chunk*, in which its group begins, with the end of the group before.
"""

import functools

from numbakern.cuda.device import (
    anything,
    constant,
    convert,
    either,
    funneled,
    load,
    narrow,
    pair,
    put_shared_words,
    shared_words,
    shift_right,
    store,
    warp_barrier,
    when,
    where,
)
from numbakern.cuda.memory import ACCESS, Whole
from numbakern.cuda.reduce import WARP

HALVES, WORDS = ACCESS // 2, ACCESS // 4
"""Of a group."""


class Realigned(Whole):
    """Rows of halves that start anywhere, or end within a group; of parts of a warp each.

    Parameters
    ----------
    fmt : Format
        Of halves.
    part : rows.Partition
        Of groups of HALVES.
    """

    direct = False
    room = ACCESS + WARP * ACCESS  # a chunk before the warp's groups

    def load(self, place, groups):
        """As Whole.load."""
        at = _Words(place)
        # Nearly every lane has all of its groups, and the word behind them.
        words = either(
            at.has(groups[-1]),
            lambda: at.by_twos(groups),
            lambda: self._ending(at, groups, at.one_by_one(groups)),
        )
        return self.grouped(words, len(groups))

    def _ending(self, at, groups, words):
        """The words, flat, of a lane behind whose groups the row ends; the fill behind that."""
        fill = self.format.fill_word
        fill -= fill >> 31 << 32  # int32
        # Its last group is perhaps but a part of one, or without a word behind it.
        last = (at.left - 1) & -(WARP * HALVES)
        behind, start = at.left - last, at.address + convert(last * 2, "i8")
        halves = [
            load(start + 2 * i, 2, 1, (last >= 0) & (behind > i), fill & 0xFFFF)[0]
            for i in range(HALVES)
        ]
        pairs = [pair(*halves[i : i + 2]) for i in range(0, HALVES, 2)]
        found = []
        for n, group in zip(groups, self.grouped(words, len(groups)), strict=True):
            for word, p in zip(group, pairs, strict=True):
                found.append(where(last == n, p, where(last > n, word, fill)))
        return found

    def store(self, place, groups, numbers, ok, team):
        """As Whole.store."""
        at, own = _Chunks(place, team), []
        always = constant(at.lane, True, "b1")
        for n, group in zip(groups, numbers, strict=True):
            if own or team.again:
                warp_barrier(at.lane)  # all have read the group before
            own.append(self._words(group))
            # Before the first one lies another part's end, which is not needed.
            put_shared_words(team.room, 4, own[-2:][0], at.lane == WARP - 1)
            put_shared_words(at.own, 4, own[-1], always)
            warp_barrier(at.lane)
            words = [shared_words(at.chunk + 4 * k, 4, 1)[0] for k in range(WORDS)]
            words += shared_words(at.chunk + ACCESS, 4, 1, at.bits > 0, None)
            chunk = funneled(words, at.bits)
            # That in which the first group begins has the end of others', who write it.
            mask = at.is_whole(n) & at.begins_here if len(own) == 1 else at.is_whole(n)
            store(at.start + 2 * n, 4, chunk, ok & mask)
        when(ok & (at.shift > 0), lambda: self._store_ends(at, groups, own), [])
        ends = at.left < groups[-1] + 2 * HALVES
        when(ok & ends, lambda: self._store_rest(at, groups, own), [])
        warp_barrier(at.lane)  # for who writes one of the others' elements once more

    def _store_ends(self, at, groups, own):
        """Write what the part has of the chunks in which it begins and ends."""
        first = at.lane == 0
        words = [where(first, a, b) for a, b in zip(own[0], own[-1], strict=True)]
        behind = where(first, constant(at.lane, groups[0], "i4"), groups[-1])
        there, left = first | (at.lane == WARP - 1), at.left - behind
        self._store_halves(
            at.address + convert(behind * 2, "i8"),
            words,
            # The first lane those before its first own chunk, the last one those behind its last.
            lambda i: there & (left > i) & where(first, at.before > i, at.before <= i),
        )
        return []

    def _store_rest(self, at, groups, own):
        """Write what a lane has of the chunk that the row ends in."""
        words, behind = own[0], constant(at.lane, groups[0], "i4")
        for n, group in zip(groups[1:], own[1:], strict=True):
            here = at.left > n
            words = [where(here, b, a) for a, b in zip(words, group, strict=True)]
            behind = where(here, n, behind)
        left = at.left - behind

        def ends(i):
            """Whether the chunk of half i ends behind the row."""
            chunk = where(at.before > i, at.before, at.before + HALVES)
            return (left > i) & (left < chunk)

        self._store_halves(at.address + convert(behind * 2, "i8"), words, ends)
        return []

    @staticmethod
    def _store_halves(address, words, mask_of):
        for i in range(HALVES):
            word = shift_right(words[i // 2], 16) if i % 2 else words[i // 2]
            store(address + 2 * i, 2, [word], mask_of(i))


class _Words:
    """The words that a lane's groups lie in, as they are read: none that has nothing of the part.

    Nor is the other half read of a word in which a part begins or ends, for that is another part's,
    which may be written meanwhile.

    Parameters
    ----------
    place : Place
    """

    def __init__(self, place):
        self.address, self.left = place.address, place.left
        self.odd = narrow(self.address) & 2  # bytes to a whole word
        self.start = self.address - convert(self.odd, "i8")
        self.bits = self.odd << 3
        self.begins = (self.odd > 0) & ((narrow(place.first) & (WARP * HALVES - 1)) == 0)

    def has(self, n):
        """Whether there are all of group n and the word behind it."""
        return self.left > n + HALVES + 1

    def by_twos(self, groups):
        """The groups' words, flat, which are all there: those at 8 bytes by twos."""

        def read(reads):
            return self._moved(self.read(n, groups, reads) for n in groups)

        return either(
            (narrow(self.start) & 4) == 0,
            lambda: read(((0, 2), (2, 2), (4, 1))),
            lambda: read(((0, 1), (1, 2), (3, 2))),
        )

    def one_by_one(self, groups):
        """The same of those that the lane `has`, for others whatever is in a register."""
        nothing = [anything(self.odd, "i4")] * (WORDS + 1)
        reads = [(k, 1) for k in range(WORDS + 1)]
        return self._moved(
            when(self.has(n), functools.partial(self.read, n, groups, reads), nothing)
            for n in groups
        )

    def read(self, n, groups, reads):
        """The words of group n and the one behind; so many from word number k on at once."""
        start, words = self.start + 2 * n, []
        for k, count in reads:
            if n == groups[0] and k == 0:
                words += self._beginning(start, count)
            elif n == groups[-1] and k + count > WORDS:
                words += load(start + 4 * k, 4, 1) if count > 1 else ()
                words += load(start + ACCESS, 2, 1, self.odd > 0, None)
            else:
                words += load(start + 4 * k, 4, count)
        return words

    def _beginning(self, start, count):
        """The part's first words; where it begins within one, that is read from there on."""
        whole = load(start, 4, count, ~self.begins, None)
        (half,) = load(self.address, 2, 1, self.begins, None)
        apart = [half << 16]
        apart += [load(start + 4 * k, 4, 1, self.begins, None)[0] for k in range(1, count)]
        return [where(self.begins, a, w) for a, w in zip(apart, whole, strict=True)]

    def _moved(self, words):
        """The groups' words, flat, from those that each lies in."""
        found = []
        for each in words:
            found += funneled(each, self.bits)
        return found


class _Chunks:
    """The chunks that a lane writes, one for each of its groups.

    Parameters
    ----------
    place : Place
    team : Team
        Of a warp.

    Attributes
    ----------
    shift : Value
        Bytes from a chunk's beginning to that of the group that begins in it, the same for all.
    before : Value
        Halves of a group that lie in that chunk.
    start : Value
        Address of the chunk in which the first group begins.
    begins_here : Value
        Whether all of that is this part's.
    own, chunk : Value
        Places in shared memory of the lane's group; and of the word in which its chunk begins.
    bits : Value
        From there to where.
    """

    def __init__(self, place, team):
        self.address, self.left, self.lane = place.address, place.left, team.lane
        self.shift = narrow(self.address) & (ACCESS - 1)
        self.before = HALVES - shift_right(self.shift, 1)
        self.start = self.address - convert(self.shift, "i8")
        self.begins_here = (self.shift == 0) | (self.lane > 0)
        self.own = team.room + ACCESS + self.lane * ACCESS
        begin = self.own - self.shift
        self.chunk, self.bits = begin & -4, (begin & 2) << 3

    def is_whole(self, n):
        """Whether the row has all of the chunk in which group n begins."""
        return self.left >= n + self.before
