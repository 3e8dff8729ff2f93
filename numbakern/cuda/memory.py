"""How elements lie in global memory: 16 bytes at once wherever a row allows it.

A thread takes groups of consecutive elements, the same ones however the array lies: as many as
divide every row, 16 bytes at most (`rows.partition`). Four ways to get at a group:

- `Whole`: rows start at multiples of its size and end with a whole group. One access.
- `Single`: small groups, element by element; those of neighbouring lanes lie side by side.
- `Shifted`: rows are contiguous but start anywhere. Loads take the two aligned pieces that a group
  lies in and shift them into place; stores take the bytes that are missing from the next lane.
  Groups at the ends of a row go element by element.
- `Strided`: any distance between the classes; element by element.
"""

from typing import Any, NamedTuple

from numbakern.cuda.device import (
    bits_of,
    constant,
    convert,
    convert_unsigned,
    float_of,
    funnel,
    larger_halves,
    load,
    max_tree,
    narrow,
    pack_halves,
    shuffle_from,
    smaller_integer,
    store,
    tree,
    unpack_half,
    when,
    where,
)

ACCESS = 16
"""Bytes of the widest access."""


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
        return [low | (high << 16) for low, high in zip(raw[::2], raw[1::2], strict=True)]

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
        return convert_unsigned(number) if self.kind == "u8" else convert(number, self.elem)

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


def _rotate(words, steps, mask):
    """The words from index `steps` on where the mask holds, from 0 on elsewhere."""
    return [where(mask, words[i + steps], words[i]) for i in range(len(words) - steps)]


class Place(NamedTuple):
    """Where a lane's elements begin.

    Attributes
    ----------
    address : Value
        Of the first one.
    left : Value
        Elements from there to the end of the row, int32: FAR at most, perhaps below 0.
    step : Value
        Bytes between elements.
    first : Value
        Whether the row begins there.
    """

    address: Any
    left: Any
    step: Any
    first: Any


FAR = 1 << 20


def left_of(j, classes):
    """Elements from number j of a row on, as a Place has them."""
    return narrow(smaller_integer(classes - j, constant(j, FAR, "i8")))


class Whole:
    """Rows of whole groups, aligned as those are.

    Parameters
    ----------
    fmt : Format
    group : int
        Elements of one.
    chunk : int
        Bytes of an access at most.
    """

    wide = True  # what `load` gives are words of memory
    own = True  # a thread writes its own elements, and no others

    def __init__(self, fmt, group, chunk=ACCESS):
        self.format, self.group = fmt, group
        self.bytes = group * fmt.size
        self.chunk = min(chunk, self.bytes)
        self.word = min(fmt.word, self.chunk)
        self.per_chunk = self.chunk // self.word

    def load(self, place, groups):
        """What is read of the groups that lie so many elements behind a Place.

        The fill stands for what lies behind the row's end.
        """
        return [self._group(place, n) for n in groups]

    def _group(self, place, n):
        words, mask = [], place.left > n
        address = place.address + n * self.format.size
        for at in range(0, self.bytes, self.chunk):
            words += load(address + at, self.word, self.per_chunk, mask, self.format.fill_word)
        return words

    def distance(self, j, _step):
        """Bytes from a row's start to its element number j."""
        return j * self.format.size

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
        team : (Value, int)
            The thread's lane, and how many lanes share the row's part.
        """
        for n, group in zip(groups, numbers, strict=True):
            words, mask = self._words(group), ok & (place.left > n)
            address = place.address + n * self.format.size
            for i in range(0, len(words), self.per_chunk):
                store(address + i * self.word, self.word, words[i : i + self.per_chunk], mask)


class Single(Whole):
    """Rows of whole groups that start anywhere, element by element; halves are kept in pairs."""

    def __init__(self, fmt, group):
        super().__init__(fmt, group, fmt.size)
        self.paired = fmt.size == 2

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
        return [self.format.word_of(v) for v in numbers]


class Shifted(Whole):
    """Contiguous rows that start and end anywhere.

    All groups of a row lie equally far behind a multiple of 16 bytes.
    """

    own = False

    def _offset(self, place):
        """That distance in bytes, int32, and whether it is not 0."""
        offset = narrow(place.address) & (self.chunk - 1)
        return offset, offset != 0

    def load(self, place, groups):
        """As Whole.load: all pieces are asked for before the first one is waited for."""
        return [self._shift(place, *piece) for piece in [self._pieces(place, n) for n in groups]]

    def _pieces(self, place, n):
        """(n, whether both pieces that the group lies in are inside of the row, their words)."""
        fmt, chunk, word = self.format, self.chunk, self.word
        offset, shifted = self._offset(place)
        aligned = place.address - convert(offset, "i8") + n * fmt.size
        behind = (constant(offset, chunk, "i4") - offset) >> (fmt.size.bit_length() - 1)
        inside = place.left - where(shifted, behind, 0) >= n + self.group
        if n == 0:
            inside = inside & ~(place.first & shifted)
        words = []
        for at in range(0, self.bytes, chunk):
            words += load(aligned + at, word, self.per_chunk, inside, foreign=True)
        last = inside & shifted
        words += load(aligned + self.bytes, word, self.per_chunk, last, foreign=True)
        return n, inside, words

    def _shift(self, place, n, inside, words):
        """The group's words: of its pieces, or element by element."""
        fmt, word = self.format, self.word
        offset, _ = self._offset(place)
        address = place.address + n * fmt.size
        steps = self.per_chunk // 2
        while steps:
            words = _rotate(words, steps, (offset & (steps * word)) != 0)
            steps //= 2
        count = self.bytes // word
        if fmt.size < word:
            bits = (offset & (word - 1)) << 3
            words = [funnel(a, b, bits) for a, b in zip(words, words[1:] + words[:1], strict=True)]
        words = words[:count]

        def singly():
            single = (
                load(address + i * fmt.size, fmt.size, 1, place.left > n + i, fmt.fill_single)[0]
                for i in range(self.group)
            )
            return fmt.joined(list(single))

        return when(~inside, singly, words)

    def store(self, place, groups, numbers, ok, team):
        """As Whole.store."""
        lane, lanes = team
        behind = (lane & -lanes) | ((lane + 1) & (lanes - 1))  # the lane with the next group
        first, last = (lane & (lanes - 1)) == 0, (lane & (lanes - 1)) == lanes - 1
        waiting = has_before = None
        for n, group in zip(groups, numbers, strict=True):
            words = self.format.words(group)
            if waiting:
                # Behind a team's last lane comes what its first one has next.
                given = [where(first, *p) for p in zip(words, waiting[2], strict=True)]
                following = [shuffle_from(w, behind) for w in given[: self.per_chunk]]
                self._store(place, *waiting, following, ok, has_before, constant(ok, True, "b1"))
            has_before = constant(ok, True, "b1") if waiting else ~first
            waiting = n, group, words
        following = [shuffle_from(w, behind) for w in waiting[2][: self.per_chunk]]
        self._store(place, *waiting, following, ok, has_before, ~last)

    def _store(self, place, n, numbers, words, following, ok, has_before, has_next):
        """Write a group; whether lanes hold the groups before it and behind it, which begins so."""
        fmt, chunk, word = self.format, self.chunk, self.word
        address = place.address + n * fmt.size
        offset, shifted = self._offset(place)
        own = constant(offset, chunk, "i4") - offset  # bytes before the next aligned piece
        moved = words + following
        first = own & (chunk - 1)
        steps = self.per_chunk // 2
        while steps:
            moved = _rotate(moved, steps, (first & (steps * word)) != 0)
            steps //= 2
        if fmt.size < word:
            bits = (first & (word - 1)) << 3
            moved = [funnel(a, b, bits) for a, b in zip(moved, moved[1:] + moved[:1], strict=True)]
        full = ok & (place.left >= n + self.group)
        next_full = full & has_next & (place.left >= n + 2 * self.group)
        base = place.address + convert(first, "i8") + n * fmt.size
        for i in range(0, len(words), self.per_chunk):
            last = i + self.per_chunk == len(words)
            mask = where(shifted, next_full if last else full, full)
            at = base + i * word
            store(at, word, moved[i : i + self.per_chunk], mask)
        # What no aligned piece held: the head of the first group, the tail of the last.
        taken = full & has_before

        def singly():
            for i, number in enumerate(numbers):
                at = i * fmt.size
                in_tail = own <= at + chunk - self.bytes
                alone = ((own > at) & ~taken) | (in_tail & ~next_full) | ~full
                alone = where(shifted, alone, ~full)
                fmt.put(address + at, number, (place.left > n + i) & alone)
            return []

        when(ok & (~full | (shifted & ~(taken & next_full))), singly, [])


class Strided:
    """Elements at any distance."""

    wide, own = False, True

    def __init__(self, fmt, group):
        self.format, self.group = fmt, group

    def load(self, place, groups):
        """As Whole.load; the numbers themselves."""
        return [self._group(place, n) for n in groups]

    def _group(self, place, n):
        at, get = place.address + place.step * n, self.format.get
        return [get(at + place.step * i, place.left > n + i) for i in range(self.group)]

    def distance(self, j, step):
        """As Whole.distance."""
        return j * step

    def numbers(self, words, _n=0):
        """As Whole.numbers."""
        return words

    def flat(self, groups):
        """As Whole.flat."""
        return [number for numbers in groups for number in numbers]

    def largest(self, words):
        """As Whole.largest."""
        return max_tree(words)

    def store(self, place, groups, numbers, ok, _team):
        """As Whole.store."""
        for n, group in zip(groups, numbers, strict=True):
            at = place.address + place.step * n
            for i, number in enumerate(group):
                self.format.put(at + place.step * i, number, ok & (place.left > n + i))
