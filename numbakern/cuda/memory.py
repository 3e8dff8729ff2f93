"""How elements lie in global memory: 16 bytes at once wherever a row allows it.

A thread takes groups of consecutive elements, the same ones however the array lies: as many as
divide every row, 16 bytes at most (`rows.partition`). The ways to get at a group:

- `Whole`: rows start at multiples of its size and end with a whole group. One access.
- `Single`: groups of one, those of neighbouring lanes lie side by side; and groups of more than 16
  bytes (of a wider type than the lead's) that start anywhere.
- `Shifted`: rows are contiguous but start anywhere. Element by element as well: what a load leaves
  of a line the next ones find in L1, and before a store groups change lanes.
- `realigned.Realigned`: long rows of halves that start anywhere, or do not end with a whole group.
- `Strided`: any distance between the classes; element by element. Integers and class weights are
  `Numbers` at any distance.
- `Abreast`: the same, of rows that lie side by side: one access for a class of several rows.

Short rows that lie one after the other pass through shared memory (`tiles.Staged`).
"""

import math
from typing import Any, NamedTuple

from numbakern.cuda.device import (
    anything,
    bits_of,
    constant,
    convert,
    convert_unsigned,
    float_of,
    larger_halves,
    load,
    max_tree,
    narrow,
    pack_halves,
    pair,
    put_shared_words,
    shared_words,
    smaller_integer,
    store,
    tree,
    unpack_half,
    warp_barrier,
    where,
)
from numbakern.cuda.reduce import WARP

ACCESS = 16
"""Bytes of the widest access."""
APART = 4
"""Elements of a lane from which on the exception among them is better written once more."""
FAR_APART = 32
"""The same where that is a sector more for each row."""


class Format:
    """How one element lies in memory, and the number that is computed with.

    Parameters
    ----------
    kind : str
        As `arrays.Kind.kind`: f2, bf, f4, f8, i1 … u8, b1.
    elem : {"f4", "f8"}
        What is computed with.
    fill : float
        What stands for an element that is not there: −inf or 0.
    """

    def __init__(self, kind, elem, fill=0.0):
        self.kind, self.elem = kind, elem
        self.size = 2 if kind == "bf" else int(kind[1])
        self.real = kind[0] == "f" or kind == "bf"
        self.word = 8 if kind == "f8" else 4  # bytes of a word in a wide access
        self.per_word = max(1, self.word // self.size)
        lowest = {"f2": 0xFC00FC00, "bf": 0xFF80FF80, "f4": 0xFF800000, "f8": 0xFFF0 << 48}
        self.fill = fill
        self.fill_word = lowest.get(kind, 0) if fill else 0
        self.fill_single = self.fill_word & 0xFFFF if self.size == 2 else self.fill_word

    # -- words of a wide access

    def elements(self, words):
        """The numbers in a list of words."""
        numbers = []
        for word in words:
            if self.kind in ("f2", "bf"):
                halves = (unpack_half(word, high, self.kind) for high in (False, True))
                numbers += [convert(v, self.elem) for v in halves]
            else:
                numbers.append(convert(float_of(word), self.elem))
        return numbers

    def words(self, numbers):
        """The words of a list of numbers, each rounded once."""
        if self.kind in ("f2", "bf"):
            single = [_to_single(v) for v in numbers]
            pairs = zip(single[::2], single[1::2], strict=True)
            return [pack_halves(low, high, self.kind) for low, high in pairs]
        return [bits_of(convert(v, self.kind)) for v in numbers]

    def joined(self, raw):
        """The words of elements that were loaded one by one."""
        if self.per_word == 1:
            return raw
        return [pair(low, high) for low, high in zip(raw[::2], raw[1::2], strict=True)]

    def filled(self, like, size, count):
        """So many words of so many bytes that stand for elements which are not there."""
        bits = 8 * size
        word = self.fill_word - ((self.fill_word >> (bits - 1)) << bits)  # of the same bits
        return [constant(like, word, "i8" if size == 8 else "i4")] * count

    # -- elements one by one

    def get(self, address, mask=None):
        """The number at this address; `fill` where the mask does not hold."""
        number = self.number(load(address, self.size, 1, mask, self.fill_single)[0])
        return number if self.real or mask is None else where(mask, number, self.fill)

    def number(self, raw):
        """The number in what `load` gave of one element."""
        if self.kind in ("f2", "bf"):
            return convert(unpack_half(raw, False, self.kind), self.elem)
        if self.real:
            return convert(float_of(raw), self.elem)
        number = self.integer(raw)
        wide = convert_unsigned(number) if self.kind == "u8" else convert(number, "f8")
        return convert(wide, self.elem)

    def integer(self, raw):
        """The int64 in what `load` gave; a uint64 by its bits."""
        if self.size == 8:
            return raw
        if self.kind[0] == "i":
            if self.size < 4:
                raw = (raw << (32 - 8 * self.size)) >> (32 - 8 * self.size)
            return convert(raw, "i8")
        wide = convert(raw, "i8")
        return wide & 0xFFFFFFFF if self.size == 4 else wide

    def put(self, address, number, mask):
        """Write a number, rounded once, where the mask holds."""
        store(address, self.size, [self.word_of(number)], mask)

    def word_of(self, number):
        """What `store` is given of one element: a number, rounded once."""
        if self.kind in ("f2", "bf"):
            number = _to_single(number)
            return pack_halves(number, number, self.kind)
        return bits_of(convert(number, self.kind))


def _to_single(v):
    """A number on its way to a half: a float64 is rounded to odd, so that the half rounds once."""
    if v.elem == "f4":
        return v
    single = convert(v, "f4")
    error = v - convert(single, "f8")
    bits = bits_of(single)
    inexact = ((error > 0.0) | (error < 0.0)) & (single != 0.0) & ((bits & 1) == 0)
    outward = where(error > 0.0, constant(bits, 1, "i4"), -1)
    outward = where(single > 0.0, outward, -outward)
    return float_of(where(inexact, bits + outward, bits))


class Place(NamedTuple):
    """Where a lane's elements begin.

    Attributes
    ----------
    address : Value
        Of the first one.
    left : Value or None
        Elements from there to the end of the row, int32: FAR at most, perhaps below 0; None if all
        that is asked for is there.
    step : Value
        Bytes between elements.
    first : Value
        Its number in the row.
    """

    address: Any
    left: Any
    step: Any
    first: Any = None


class Team(NamedTuple):
    """The lanes of a warp that share a part of a row.

    Attributes
    ----------
    lane : Value
        The thread's number in its warp.
    lanes : int
        Of the team: a power of two.
    room : Value or None
        Where the warp's bytes of shared memory begin, of an access with a `room`.
    again : bool
        Whether they have other parts before and behind this one.
    """

    lane: Any
    lanes: int
    room: Any
    again: bool


FAR = 1 << 20


def left_of(j, classes):
    """Elements from number j of a row on, as a Place has them."""
    return narrow(smaller_integer(classes - j, constant(j, FAR, "i8")))


def is_there(left, n, like):
    """Whether the element n behind one of which so many are left is there, as a mask."""
    return constant(like, True, "b1") if left is None else left > n


class Whole:
    """Rows of whole groups, aligned as those are.

    Parameters
    ----------
    fmt : Format
    part : rows.Partition
        How many elements a group has, and whether a row may end within one.
    chunk : int
        Bytes of an access at most.
    """

    wide = True  # what `load` gives are words of memory
    apart: float = APART  # elements of a lane from which on one of them may be written once more
    rows = 1  # neighbouring ones that an access is of
    staged = False  # whether they are in shared memory by then
    room = 0  # bytes of shared memory that a warp takes to store
    direct = True  # whether what `load` gives lies in memory so, at multiples of its chunks

    def __init__(self, fmt, part, chunk=ACCESS):
        self.format, self.group = fmt, part.group
        self.bytes = self.group * fmt.size
        self.chunk = min(chunk, self.bytes)
        self.word = min(fmt.word, self.chunk)
        self.per_chunk = self.chunk // self.word
        self.accesses = self.bytes // self.chunk  # of a group

    def load(self, place, groups):
        """What is read of the groups that lie so many elements behind a Place.

        The fill stands for what lies behind the row's end; of a Place with no `left` all are there.
        """
        return [self._group(place, n) for n in groups]

    def _group(self, place, n):
        words, mask = [], None if place.left is None else place.left > n
        address = place.address + n * self.format.size
        for at in range(0, self.bytes, self.chunk):
            words += load(address + at, self.word, self.per_chunk, mask, self.format.fill_word)
        return words

    def distance(self, j, _step):
        """Bytes from a row's start to its element number j."""
        return j * self.format.size

    def put(self, address, number, mask):
        """Write one number, rounded once, where the mask holds."""
        self.format.put(address, number, mask)

    def numbers(self, words, _n=0):
        """The numbers in what `load` gave of a group."""
        return self.format.elements(words)

    def flat(self, groups):
        """All words of a lane's groups, in their order."""
        return [word for words in groups for word in words]

    def grouped(self, words, count):
        """The words of `count` groups, from what `flat` gave."""
        each = len(words) // count
        return [words[i : i + each] for i in range(0, len(words), each)]

    def count(self, groups):
        """How many words `flat` gives of so many groups."""
        return -(-groups * self.bytes // max(4, self.word))

    def unread(self, like, groups):
        """As many words as `flat` gives of so many groups, for a row that is to be skipped."""
        return [anything(like, "i8" if self.word == 8 else "i4")] * self.count(groups)

    def largest(self, words):
        """The largest of the numbers in what `flat` gave; NaN if one is."""
        kind = self.format.kind
        if kind in ("f2", "bf"):
            words = [tree(words, lambda a, b: larger_halves(a, b, kind))]
        return max_tree(self.format.elements(words))

    def _words(self, numbers):
        """What is written of a group."""
        return self.format.words(numbers)

    def store(self, place, groups, numbers, ok, _team):
        """Write a lane's groups, of a row that is to be written where `ok`.

        Parameters
        ----------
        place : Place
        groups : sequence of int
            How many elements behind it each group begins.
        numbers : iterable of list of Value
            Those of each group; taken when the group before is written.
        team : Team
        """
        for n, group in zip(groups, numbers, strict=True):
            words, mask = self._words(group), ok & is_there(place.left, n, ok)
            address = place.address + n * self.format.size
            for i in range(0, len(words), self.per_chunk):
                store(address + i * self.word, self.word, words[i : i + self.per_chunk], mask)


class Single(Whole):
    """Rows of whole groups that start anywhere, element by element; halves are kept in pairs."""

    def __init__(self, fmt, part, chunk=None):
        super().__init__(fmt, part, chunk or fmt.size)
        self.paired = self.chunk == 2

    def load(self, place, groups):
        """As Whole.load."""
        found = super().load(place, groups)
        if not self.paired:
            return found
        halves = [half for group in found for half in group]
        if len(halves) % 2:
            halves.append(constant(halves[0], self.format.fill_single, "i4"))
        return self.grouped(self.format.joined(halves), len(found))

    def flat(self, groups):
        """As Whole.flat."""
        return super().flat(groups[::2] if self.paired and self.group == 1 else groups)

    def grouped(self, words, count):
        """As Whole.grouped; two groups of one half share a word."""
        if self.paired and self.group == 1:
            return [[words[n // 2]] for n in range(count)]
        return super().grouped(words, count)

    def numbers(self, words, n=0):
        """As Whole.numbers, of group number n."""
        found = self.format.elements(words)
        return found[n % 2 :][:1] if self.paired and self.group == 1 else found

    def _words(self, numbers):
        if self.paired:
            return [self.format.word_of(v) for v in numbers]
        return super()._words(numbers)


class Shifted(Single):
    """Rows of whole groups that start anywhere; written side by side, like single elements.

    A warp's groups change lanes in shared memory: written as they lie, each access would leave
    gaps that the next ones fill, and what moves to L2 are sectors of 32 bytes.
    """

    apart = math.inf  # a thread writes those of others

    @property
    def room(self):
        """As Whole.room: twice a group of each lane."""
        return 2 * WARP * self.bytes

    def store(self, place, groups, numbers, ok, team):
        """As Whole.store."""
        if team.lanes == 1:  # it has all of the row: there is nobody to change with
            super().store(place, groups, numbers, ok, team)
            return
        size, lane = self.format.size, team.lane & (team.lanes - 1)
        # From this lane's own elements to those that it writes.
        behind = lane * (1 - self.group)
        left = place.left - behind
        address = place.address + convert(behind * size, "i8")
        written = team.room + team.lane * self.bytes
        read = written + behind * size
        always = constant(ok, True, "b1")
        if team.again and len(groups) % 2:
            warp_barrier(lane)  # the part before this one has ended in the same half
        for v, (n, group) in enumerate(zip(groups, numbers, strict=True)):
            half = v % 2 * WARP * self.bytes  # one is written while the other is read
            for at, words in self._pieces(self.format.words(group)):
                put_shared_words(written + (half + at), self.format.word, words, always)
            warp_barrier(lane)
            for i in range(0, self.group * team.lanes, team.lanes):
                word = shared_words(read + (half + i * size), size, 1)
                store(address + (n + i) * size, size, word, ok & (left > n + i))

    def _pieces(self, words):
        """(where in a group, words) of each access to shared memory."""
        each = ACCESS // self.format.word
        return [(i * self.format.word, words[i : i + each]) for i in range(0, len(words), each)]


class Strided(Single):
    """Elements at any distance."""

    apart = FAR_APART

    def __init__(self, fmt, part):
        super().__init__(fmt, part)
        self.ragged = part.ragged

    def _group(self, place, n):
        at, words, fill = place.address + place.step * n, [], self.format.fill_word
        for i, mask in enumerate(_masks(self, place, n)):
            words += load(at + place.step * i, self.word, 1, mask, fill)
        return words

    def distance(self, j, step):
        """As Whole.distance."""
        return j * step

    def store(self, place, groups, numbers, ok, _team):
        """As Whole.store."""
        for n, group in zip(groups, numbers, strict=True):
            at, masks = place.address + place.step * n, _masks(self, place, n)
            for i, (number, mask) in enumerate(zip(group, masks, strict=True)):
                self.format.put(at + place.step * i, number, ok if mask is None else ok & mask)


def _masks(access, place, n):
    """Whether each element of group n is there: all or none, unless a row may end in a group."""
    if place.left is None:
        return [None] * access.group
    if not access.ragged:
        return [place.left > n] * access.group
    return [place.left > n + i for i in range(access.group)]


class Abreast(Strided):
    """Elements at any distance, behind each of which lie those of the next rows.

    Parameters
    ----------
    rows : int
        How many, of one access: a power of two.
    """

    def __init__(self, fmt, part, rows):
        super().__init__(fmt, part)
        self.rows = rows
        self.each = rows * fmt.size // fmt.word  # words of an access

    def load_rows(self, place, groups):
        """What is read of the groups of all rows, as many words for each class."""
        return [self._classes(place, n) for n in groups]

    def _classes(self, place, n):
        at, mask = place.address + place.step * n, None if place.left is None else place.left > n
        word, fill = self.format.word, self.format.fill_word
        return [load(at + place.step * i, word, self.each, mask, fill) for i in range(self.group)]

    def of_row(self, number, found):
        """Of what `load_rows` gave, that of one row as `load` would have given it."""
        word, upper = divmod(number, self.format.per_word)
        words = [of_class[word] for group in found for of_class in group]
        if self.paired:
            if len(words) % 2:
                nothing = constant(words[0], self.format.fill_single, "i4")
                words.append(pair(nothing, nothing))
            pairs = zip(words[::2], words[1::2], strict=True)
            words = [pair(low, high, bool(upper)) for low, high in pairs]
        return self.grouped(words, len(found))

    def store_rows(self, place, groups, numbers, ok):
        """As `store`, of each group the list of every row's numbers."""
        for n, rows in zip(groups, numbers, strict=True):
            at, mask = place.address + place.step * n, ok & is_there(place.left, n, ok)
            for i, of_class in enumerate(zip(*rows, strict=True)):
                words = self.format.words(of_class)
                store(at + place.step * i, self.format.word, words, mask)


class Numbers:
    """Numbers of any type at any distance: integers, class weights. Not for results."""

    wide = staged = False
    direct = True
    rows = 1

    def __init__(self, fmt, part):
        self.format, self.group, self.ragged = fmt, part.group, part.ragged
        self.accesses = self.group

    def load(self, place, groups):
        """As Whole.load; the numbers themselves."""
        return [self._group(place, n) for n in groups]

    def _group(self, place, n):
        at = place.address + place.step * n
        masks = enumerate(_masks(self, place, n))
        return [self.format.get(at + place.step * i, mask) for i, mask in masks]

    def distance(self, j, step):
        """As Whole.distance."""
        return j * step

    def numbers(self, words, _n=0):
        """As Whole.numbers."""
        return words

    def flat(self, groups):
        """As Whole.flat."""
        return [number for numbers in groups for number in numbers]

    def grouped(self, numbers, count):
        """As Whole.grouped."""
        return [numbers[i : i + self.group] for i in range(0, count * self.group, self.group)]

    def count(self, groups):
        """As Whole.count."""
        return groups * self.group

    def unread(self, like, groups):
        """As Whole.unread; a class weight is multiplied by the 0 that such a row comes to."""
        return [constant(like, self.format.fill, self.format.elem)] * self.count(groups)

    def largest(self, words):
        """As Whole.largest."""
        return max_tree(words)
