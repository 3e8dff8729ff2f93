"""Walks short rows of adjacent classes: a tile of many rows, a vector lane a row.

As `tiles`; but a row is a single group of its sums, so there are no blocks to be joined, and what
waits for what comes before it (exponentials, their sum, its logarithm) is done for all rows of a
tile before the next step: while it waits the CPU finds work in other rows.
"""

import math

from numbakern.cpu.column_sums import Sums, clear, in_tree
from numbakern.cpu.compile import apart, device
from numbakern.cpu.frame import integer
from numbakern.cpu.lines import make_move
from numbakern.cpu.rows import COUNT
from numbakern.cpu.simd import (
    BYTES,
    convert,
    each,
    load_scalar,
    piece_lanes,
    prefetch,
    store_vector,
    traced,
    transpose,
    transpose_pieces,
    when,
    where,
    zeros,
)
from numbakern.cpu.state import SLOT, get_i64, make_finish, put_i64
from numbakern.cpu.tiles import CLASS, MAXIMA, RECORDS, SHORT, Tiles, larger_or_nan


class Short(Tiles):
    """The walker for such rows; the parameters are those of `tiles.Tiles`."""

    def _make_walk(self):
        super()._make_walk()
        start_tiles, elem, classes = self.start, self.elem, integer("classes")

        @traced
        def start(frame, state, last):
            start_tiles(frame, state, last)
            clear(state, elem, classes(frame))

        self.start = start

    def _packer(self, access, name, maxima):
        form, lanes, slot, elem = access.format, self._lanes, SLOT[name], self.elem
        size, piece, half = self._size, piece_lanes(self.elem), self._lanes // 2
        fill = -math.inf if maxima else 0.0  # no class is as low as what stands for the absent ones
        # Once for all inputs the output's lines are asked for.
        out_size = self.out_access.size if name == "x" and self.out_access else 0
        s_out = SLOT["out"]

        def row(state, r, slot=slot):
            return load_scalar(state + (slot + 8 * r), "i8")

        def ask_for_rows(state, slot, offset, to_write=False):
            for r in range(lanes):
                prefetch(row(state, r, slot) + offset, to_write)

        def ask_for_lines(state, slot, offset, length, to_write=False):
            """The same, of rows of `length` bytes that may share lines."""
            first = row(state, 0, slot)
            span = row(state, lanes - 1, slot) - first
            close = (span >= 0) & (span < (lanes - 1) * BYTES)
            lines = where(close, span + length, 0)
            each(lines, BYTES, lambda at: prefetch(first + offset + at, to_write))
            when(~close, lambda: ask_for_rows(state, slot, offset, to_write))

        @traced
        def fetch(state, j, ahead, stream):
            """Ask for the next tile's rows from class j on, and for this one's lines to write."""
            ask_for_rows(state, slot, ahead + j * form.size)
            if out_size:
                when(stream == 0, lambda: ask_for_rows(state, s_out, j * out_size, to_write=True))

        @traced
        def fetch_short(state, n, ahead, stream):
            """The same of rows of half a vector at most."""
            ask_for_lines(state, slot, ahead, n * form.size)
            if out_size:
                length = n * out_size
                when(stream == 0, lambda: ask_for_lines(state, s_out, 0, length, to_write=True))

        def put(tile, pitch, j, columns, most):
            for i, column in enumerate(columns):
                store_vector(tile + (j + i) * pitch, column)
            return larger_or_nan(in_tree(columns, larger_or_nan), most) if maxima else most

        @traced
        def whole(state, tile, pitch, j, n, most):
            """Up to a vector of classes from j on; the maxima with these."""
            addresses = [row(state, r) + j * form.size for r in range(lanes)]
            rows = [form.load_first(address, n - j, fill) for address in addresses]
            return put(tile, pitch, j, transpose(rows), most)

        @traced
        def part(state, tile, pitch, j, n, most):
            """The same of as many classes as 16 bytes hold."""
            vectors = []
            for i in range(piece):
                addresses = [row(state, r) + j * form.size for r in range(i, lanes, piece)]
                vectors.append(form.load_pieces(addresses, n - j, fill))
            return put(tile, pitch, j, transpose_pieces(vectors), most)

        @traced
        def lowest(state):
            return zeros(state, elem, lanes) - math.inf

        @traced
        def leave(state, c, most):
            if maxima:
                store_vector(state + MAXIMA + c * size, most)

        @traced
        def begin(state, n, count):
            put_i64(state + (RECORDS + CLASS), n)
            last = 8 * (count - 1)
            if out_size:  # the line that is shared with the next tile
                prefetch(row(state, 0, s_out + last) + n * out_size - 1, to_write=True)
            return row(state, 0, slot + last) - row(state, 0)

        @device
        def take_vector(at, target, pitch, n, ahead, stream):
            """Pack a vector of rows, of at most a vector of classes; their maxima.

            As `take`, whose loop would take 8 to 10 % more time for so few.
            """
            most = lowest(at)
            if n > half:
                fetch(at, 0, ahead, stream)
                most = whole(at, target, pitch, 0, n, most)
            else:
                fetch_short(at, n, ahead, stream)
                for j in range(0, n, piece):
                    most = part(at, target, pitch, j, n, most)
            return most

        @device
        def take(at, target, pitch, n, ahead, stream):
            """The same of any number of classes."""
            most, j = lowest(at), 0
            while j < n:
                if j % lanes == 0:
                    fetch(at, j, ahead, stream)
                if n - j > half:
                    most = whole(at, target, pitch, j, n, most)
                    j += lanes
                else:
                    most = part(at, target, pitch, j, n, most)
                    j += piece
            return most

        if self.layout == SHORT:
            take = take_vector

        @apart
        def pack(state, now, tile, pitch, count, j0, n, step, limit, stream):
            ahead = begin(state, n, count)
            for c in range(0, count, lanes):
                leave(state, c, take(state + 8 * c, tile + c * size, pitch, n, ahead, stream))

        return pack

    def _group_sums(self, terms, elem, kind, together=False):
        sums = Sums(self._inputs_at(), self._lanes, terms, elem, kind, together)
        return sums.of_a_group(self.layout == SHORT)

    def _make_sums(self, terms, elem, kind):
        add_up, close = self._group_sums(terms, elem, kind)
        close_few = traced(lambda state, n: close(state, n, 0, self._lanes))

        @device
        def sums(operands, n, params, state):
            add_up(operands, n, params, state, 0)
            return close_few(state, n)

        return sums

    def softmax(self, terms, keep=False, then=None):
        """As that of `tiles.Tiles`; without `then` every slot is set, else `then` sets them."""
        lanes, size, many = self._lanes, self._size, self.many
        params, tiles, pack = self._exp_params(), self._tiles, self._pack_max
        classes, take_maxima = integer("classes"), self._take_maxima
        add_up, close = self._group_sums(terms, self.elem, COUNT, together=True)

        def sums(frame, state, i):
            n = classes(frame)
            a, low, below = close(state, n, i, many)
            return a, low, convert(n, "f8") - below

        finish = make_finish(self.elem, self.many, then, sums)

        @apart
        def reduce(frame, state, p, count):
            n = classes(frame)
            x, _, pitch = tiles(frame, state)
            pack(frame, state, count, 0, n)
            take_maxima(state, count)
            for c in range(0, count, lanes):
                operands = (x + c * size, x, x, pitch)
                add_up(operands, n, params(state, c), state, c)
            finish(frame, state, p, count)

        return reduce

    def _unpacker(self, value, count_of_params, indexed=False):
        at = self._make_result(value, count_of_params, indexed)
        lanes, form, slot = self._lanes, self.out_access.format, SLOT["out"]
        form_size, move = form.size, make_move(form)
        piece, half = piece_lanes(self.elem), self._lanes // 2

        def row(state, r, before):
            return load_scalar(state + (slot + 8 * r), "i8") + before

        @traced
        def whole(state, operands, c, j, n, shift):
            rows = transpose([at(state, operands, c, j, i) for i in range(lanes)])
            # Backwards: places behind the last row stand for the first one, written at last.
            for r in reversed(range(lanes)):
                form.store_first(row(state + 8 * c, r, j * form_size + shift), n - j, rows[r])

        @traced
        def part(state, operands, c, j, n, shift):
            vectors = transpose_pieces([at(state, operands, c, j, i) for i in range(piece)])
            for i, v in reversed(list(enumerate(vectors))):
                rows = range(i, lanes, piece)
                addresses = [row(state + 8 * c, r, j * form_size + shift) for r in rows]
                form.store_pieces(addresses, n - j, v)

        @device
        def give_vector(state, operands, c, n, shift):
            """Unpack a vector of rows, of at most a vector of classes; as `take_vector`."""
            if n > half:
                whole(state, operands, c, 0, n, shift)
            else:
                for j in range(0, n, piece):
                    part(state, operands, c, j, n, shift)

        @device
        def give(state, operands, c, n, shift):
            """The same of any number of classes."""
            j = 0
            while j < n:
                if n - j > half:
                    whole(state, operands, c, j, n, shift)
                    j += lanes
                else:
                    part(state, operands, c, j, n, shift)
                    j += piece

        if self.layout == SHORT:
            give = give_vector

        @apart
        def unpack(state, operands, count, j0, n, step, stream, staging):
            first, shift = get_i64(state + slot), 0
            stream = stream and first % form_size == 0
            if stream:  # rows wait there, as far from a line's start
                shift = staging + first % BYTES - first
            for c in range(0, count, lanes):
                give(state, operands, c, n, shift)
            if stream:
                move(first + shift, first, count * n)

        return unpack
