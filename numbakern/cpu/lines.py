"""Writes past the caches what starts or ends within a cache line: by whole lines nevertheless.

A line that is written in part has to be read from memory first. So results are put beside each
other in scratch memory, as far from a line's start as where they go to, and copied line by line.
"""

from numbakern.cpu.compile import apart, device
from numbakern.cpu.simd import BYTES, Format, load_vector, store_vector, traced
from numbakern.cpu.state import get_i64, put_i64

WIDE = 8 * BYTES
"""Bytes of a class in a tile from which it pays that its first and last line wait for others'."""


def _copies(form):
    """(line, some): copy a line past the caches; n elements of this format."""
    whole, size, lanes = Format("f8", "f8"), form.size, form.lanes

    @traced
    def line(source, target):
        whole.stream(target, whole.load(source))

    @traced
    def part(source, target, n):
        form.store_first(target, n, form.load_first(source, n, 0.0))

    @device
    def some(source, target, n):
        for i in range(0, n, lanes):
            part(source + i * size, target + i * size, n - i)

    return line, some


def make_move(form):
    """move(source, target, n): copy n elements of this format that lie as far from a line's start.

    Lines that the target fills are written past the caches.
    """
    size = form.size
    line, some = _copies(form)

    @device
    def move(source, target, n):
        head = min((-target % BYTES) // size, n)
        some(source, target, head)
        end, source, target = target + n * size, source + head * size, target + head * size
        while target + BYTES <= end:
            line(source, target)
            source += BYTES
            target += BYTES
        some(source, target, (end - target) // size)

    return move


def scratch_size(classes, columns):
    """Bytes of scratch memory for Lines of so many classes, of at most 8 bytes a column."""
    return classes * BYTES + columns * 8 + 2 * BYTES


class Lines:
    """Of neighbouring tiles' results, class by class; a line that two of them share waits.

    Parameters
    ----------
    form : simd.Format
        Of the results.
    slots : int
        Where in the state there is room for two int64, which begin as 0.
    """

    def __init__(self, form, slots):
        size, (line, some) = form.size, _copies(form)
        # Where class 0 of the tiles began and ended whose last lines wait; 0 for none.
        s_began, s_ended = slots, slots + 8

        @traced
        def carry(source, target):
            store_vector(target, load_vector(source, "f8", BYTES // 8))

        @apart
        def settle(state, n, step, lines):
            """Write the lines of n classes that wait, as far as they are filled."""
            began, ended = get_i64(state + s_began), get_i64(state + s_ended)
            if ended != 0:
                for j in range(n):
                    end = ended + j * step
                    at = max(end - end % BYTES, began + j * step)
                    some(lines + j * BYTES + at % BYTES, at, (end - at) // size)
                put_i64(state + s_ended, 0)

        @device
        def begin(state, first, count, n, step, lines):
            """To be called before a tile's results: those of class 0 go to `first`."""
            if get_i64(state + s_ended) != first:
                settle(state, n, step, lines)
                put_i64(state + s_began, first)
            put_i64(state + s_ended, first + count * size)

        @traced
        def place(out, j, n, lines):
            """Where results of class j are put that go to `out`, behind those that wait."""
            room = lines + n * BYTES
            carry(lines + j * BYTES, room)
            return room + out % BYTES

        @device
        def write(state, out, count, j, n, step, lines):
            """Write them: all lines that they fill."""
            source, at, end = lines + n * BYTES, out - out % BYTES, out + count * size
            began = get_i64(state + s_began) + j * step
            if at < began:  # nothing comes before them
                some(source + (began - at), began, (BYTES - (began - at)) // size)
                source += BYTES
                at += BYTES
            while at + BYTES <= end:
                line(source, at)
                source += BYTES
                at += BYTES
            carry(source, lines + j * BYTES)

        self.settle, self.begin, self.place, self.write = settle, begin, place, write
