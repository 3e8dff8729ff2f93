"""Walks rows of at most a vector of classes, which are adjacent in memory: a tile of many rows.

As `tiles`, but a row is one vector: no panels, blocks or groups. What depends on what comes before
it (exponentials, their sum, its logarithm) is done for all rows of a tile, one step after the
other, so that the CPU finds work in other rows while it waits.
"""

import math

from numbakern.cpu.compile import apart, device
from numbakern.cpu.frame import integer
from numbakern.cpu.simd import (
    BYTES,
    SIZES,
    constant,
    convert,
    each,
    load_scalar,
    load_vector,
    piece_lanes,
    prefetch,
    splat,
    store_vector,
    traced,
    transpose,
    transpose_pieces,
    when,
    where,
    zeros,
)
from numbakern.cpu.rows import count as counted
from numbakern.cpu.state import MAX_ROWS, SLOT, get_i64, make_finish, put_i64
from numbakern.cpu.tiles import (
    _CLASS,
    _MAXIMA,
    _PARAMS,
    _RECORDS,
    _WORK,
    SHORT,
    Tiles,
    _in_tree,
    larger_or_nan,
    make_move_past_caches,
)


class Short(Tiles):
    """The walker for such rows; the parameters are those of `tiles.Tiles`."""

    def __init__(self, x_format, y_format, out_format, weighted):
        self._pitch = MAX_ROWS * SIZES[x_format.elem] + 64  # of exponentials, from class to class
        super().__init__(x_format, y_format, out_format, weighted, SHORT)

    def _make_walk(self):
        super()._make_walk()
        lanes, size, pitch, start_tiles = self._lanes, self._size, self._pitch, self.start

        @traced
        def clear(state):
            """No exponentials: those behind a row stay so."""
            nothing = zeros(state, self.elem, lanes)
            for at in range(0, lanes * pitch, lanes * size):
                store_vector(state + (_WORK + at), nothing)

        @device
        def start(state, last):
            start_tiles(state, last)
            clear(state)

        self.start = start

    def _packer(self, access, name, maxima):
        form, lanes, slot, elem = access.format, self._lanes, SLOT[name], self.elem
        size, piece = self._size, piece_lanes(self.elem)
        fill = -math.inf if maxima else 0.0  # no class is as low as what stands for the absent ones
        out_size = self.out_access.size if name == "x" and self.out_access else 0

        def row(state, r, name=slot):
            return load_scalar(state + (name + 8 * r), "i8")

        def put(tile, pitch, j, columns, most):
            for i, column in enumerate(columns):
                store_vector(tile + (j + i) * pitch, column)
            return _in_tree([*columns], larger_or_nan) if maxima else most

        def ask_rows(state, name, ahead, to_write=False):
            for r in range(lanes):
                prefetch(row(state, r, name) + ahead, to_write)

        def ask_lines(state, name, ahead, bytes_of, to_write=False):
            first = row(state, 0, name)
            span = row(state, lanes - 1, name) - first
            close = (span >= 0) & (span < (lanes - 1) * BYTES)
            span = where(close, span + bytes_of, 0)
            each(span, BYTES, lambda at: prefetch(first + ahead + at, to_write))

        @traced
        def fetch_rows(state, ahead, stream):
            """Ask for the next tile's rows, and for the lines that this one's results go to."""
            ask_rows(state, slot, ahead)
            if out_size:
                when(stream == 0, lambda: ask_rows(state, SLOT["out"], 0, to_write=True))

        @traced
        def fetch_lines(state, n, ahead, stream):
            """The same of rows that share lines."""
            ask_lines(state, slot, ahead, n * form.size)
            if out_size:
                when(
                    stream == 0,
                    lambda: ask_lines(state, SLOT["out"], 0, n * out_size, to_write=True),
                )

        @traced
        def whole(state, tile, pitch, n, most):
            rows = [form.load_first(row(state, r), n, fill) for r in range(lanes)]
            return put(tile, pitch, constant(n, 0, "i8"), transpose(rows), most)

        @traced
        def part(state, tile, pitch, j, n, most):
            vectors = []
            for i in range(piece):
                addresses = [row(state, r) + j * form.size for r in range(i, lanes, piece)]
                vectors.append(form.load_pieces(addresses, n - j, fill))
            columns = transpose_pieces(vectors)
            m = put(tile, pitch, j, columns, most)
            return larger_or_nan(m, most) if maxima else m

        @traced
        def lowest(state):
            return zeros(state, elem, lanes) - math.inf

        @traced
        def put_most(state, c, m):
            if maxima:
                store_vector(state + _MAXIMA + c * size, m)

        @traced
        def centre_all(state, count):
            if maxima:
                each(
                    count,
                    lanes,
                    lambda c: self._centre_on(
                        state, c, load_vector(state + _MAXIMA + c * size, elem, lanes)
                    ),
                )

        @traced
        def fetch_end(state, n):
            """Ask for the line that is shared with the next tile."""
            prefetch(row(state, 0, SLOT["out"]) + n * out_size - 1, to_write=True)

        @apart
        def pack(state, now, tile, pitch, count, j0, n, step, limit, stream):
            put_i64(state + _RECORDS + _CLASS, n)
            last = 8 * (count - 1)
            if out_size:
                fetch_end(state + last, n)
            ahead = get_i64(state + slot + last) - get_i64(state + slot)
            for c in range(0, count, lanes):
                m = lowest(state)
                if n > lanes // 2:
                    fetch_rows(state + 8 * c, ahead, stream)
                    m = whole(state + 8 * c, tile + c * size, pitch, n, m)
                else:
                    fetch_lines(state + 8 * c, n, ahead, stream)
                    for j in range(0, n, piece):
                        m = part(state + 8 * c, tile + c * size, pitch, j, n, m)
                put_most(state, c, m)
            centre_all(state, count)

        return pack

    def softmax(self, terms, keep=False, then=None):
        lanes, elem, size, pitch = self._lanes, self.elem, self._size, self._pitch
        params, inputs = self._exp_params(), self._inputs_at()
        tiles, pack, classes = self._tiles, self._pack_max, integer("classes")

        @traced
        def term(operands, j, at, params, total):
            a, b, *kept = terms(*inputs(operands, j), params)
            store_vector(at + j * pitch, a)
            if kept:
                x, _, _, step = operands
                store_vector(x + j * step, kept[0])
            return counted(total, b)

        @traced
        def none(state):
            return zeros(state, elem, lanes)

        @traced
        def put_count(at, total):
            store_vector(at + lanes * pitch, total)

        def sums(frame, state, i):
            at = state + _WORK + i * size
            found = [load_vector(at + lane * pitch, elem, self.many) for lane in range(lanes)]
            total = load_vector(at + lanes * pitch, elem, self.many)
            a = _in_tree(found, lambda v, w: v + w)
            n = convert(classes(frame), "f8")
            return convert(a, "f8"), zeros(a, "f8", self.many), n - convert(total, "f8")

        finish = make_finish(elem, self.many, then, sums)

        @apart
        def reduce(frame, state, p, count):
            n = classes(frame)
            x, _, step = tiles(frame, state)
            pack(frame, state, count, 0, n)
            for c in range(0, count, lanes):
                operands, at = (x + c * size, x, x, step), state + _WORK + c * size
                values, total = params(state, c), none(state)
                for j in range(n):
                    total = term(operands, j, at, values, total)
                put_count(at, total)
            finish(frame, state, p, count)

        return reduce

    def _unpacker(self, value, count_of_params, indexed=False):
        at = self._make_result(value, count_of_params, indexed)
        lanes, form, slot, piece = (
            self._lanes,
            self.out_access.format,
            SLOT["out"],
            piece_lanes(self.elem),
        )
        form_size, move = form.size, make_move_past_caches(form)

        def row(state, r, before):
            return load_scalar(state + (slot + 8 * r), "i8") + before

        @traced
        def whole(state, operands, c, n, shift):
            rows = transpose([at(state, operands, c, shift * 0, i) for i in range(lanes)])
            # Backwards: places behind the last row stand for the first one, written at last.
            for r in reversed(range(lanes)):
                form.store_first(row(state + 8 * c, r, shift), n, rows[r])

        @traced
        def part(state, operands, c, j, n, shift):
            vectors = transpose_pieces([at(state, operands, c, j, i) for i in range(piece)])
            before = j * form_size + shift
            for i, v in reversed(list(enumerate(vectors))):
                addresses = [row(state + 8 * c, r, before) for r in range(i, lanes, piece)]
                form.store_pieces(addresses, n - j, v)

        @apart
        def unpack(state, operands, count, j0, n, step, stream, staging):
            first, shift = get_i64(state + slot), 0
            stream = stream and first % form_size == 0
            if stream:
                shift = staging + first % BYTES - first
            for c in range(0, count, lanes):
                if n > lanes // 2:
                    whole(state, operands, c, n, shift)
                else:
                    for j in range(0, n, piece):
                        part(state, operands, c, j, n, shift)
            if stream:
                move(first + shift, first, count * n)

        return unpack
