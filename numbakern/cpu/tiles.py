"""Walks many short or strided rows at once: a tile of columns, a vector lane a row.

Where the class axis is strided, reading row by row would touch a cache line per element; where
it is short, a row would not fill a vector. A tile of up to a few hundred rows is packed class by
class into scratch memory, in the type computed in, and every lane then walks its own row. No
transposed copy of the array is made. Sums follow the order that `rows` describes, so the bits are
the same.
"""

import math

from numbakern.cpu.compile import device
from numbakern.cpu.frame import data, integer
from numbakern.cpu.rows import BLOCK, STEPS, Access, row_offsets
from numbakern.cpu.simd import (
    convert,
    load_scalar,
    load_vector,
    splat,
    store_vector,
    traced,
    transpose,
    unordered,
    vector_lanes,
    where,
    zeros,
)
from numbakern.cpu.state import (
    MAX_ROWS,
    SIZE,
    SLOT,
    first_block,
    get_i64,
    join_block,
    make_centre_on,
    make_finish,
    put_i64,
)
from numbakern.cpu.vmath import two_sum

_WORK = SIZE  # lane sums of a column: two terms, 16 lanes, 16 float64 at most
_TILE = _WORK + 2 * 16 * 128
_SIZES = {"f4": 4, "f8": 8}

COLUMNS, ROWS, SCATTERED = "columns", "rows", "scattered"
"""Layouts: neighbouring rows adjacent in memory; classes adjacent in memory; neither."""


TILE_BYTES = 32 * 1024
"""Size of a tile that is aimed at where rows are adjacent in memory."""


def columns_for(elem, classes, inputs):
    """Rows in a tile of adjacent rows: as many as TILE_BYTES hold, at least one vector."""
    lanes, classes = vector_lanes(elem), min(max(1, classes), BLOCK[elem])
    fit = min(TILE_BYTES // (classes * _SIZES[elem] * inputs), MAX_ROWS)
    return max(lanes, fit // lanes * lanes)


def scratch_size(elem, classes, columns, inputs):
    """Bytes of scratch memory a worker needs for tiles of this many columns."""
    return _TILE + inputs * _tile_size(elem, min(classes, BLOCK[elem]), columns)


def _tile_size(elem, classes, columns):
    lanes = vector_lanes(elem)
    return -(-classes // lanes) * lanes * columns * _SIZES[elem]


class Tiles:
    """The walker for tiles; what `kernels` needs, like `rows.Rows`.

    Parameters
    ----------
    x_format, y_format, out_format : simd.Format
        How the inputs and the output lie in memory; None for what an operation has not.
    weighted : bool
        Whether there is a weight for each class.
    layout : {COLUMNS, ROWS, SCATTERED}
        How the rows of a tile lie.
    """

    def __init__(self, x_format, y_format, out_format, weighted, layout):
        self.elem, self.weighted, self.layout = x_format.elem, weighted, layout
        self.x_access = Access(x_format, True)
        self.y_access = Access(y_format, True) if y_format else None
        self.out_access = Access(out_format, True) if out_format else None
        self._lanes, self._size = vector_lanes(self.elem), _SIZES[self.elem]
        self._make_walk()
        self._make_pack()

    # -- where the tile's rows are

    def _make_walk(self):
        inner, columns = integer("inner"), integer("columns")
        x_row, y_row, out_row = integer("x_row"), integer("y_row"), integer("out_row")
        x_data, y_data, out_data = data("x"), data("y"), data("out")
        geometry = data("geometry")
        s_x, s_y, s_out = SLOT["x"], SLOT["y"], SLOT["out"]
        adjacent, lanes = self.layout == COLUMNS, self._lanes
        x_size, y_size, out_size = (
            a.size if a else 0 for a in (self.x_access, self.y_access, self.out_access)
        )

        @device
        def advance(frame, item, last):
            """The tile `item`: (first row, rows, next item); tiles end with the innermost axis."""
            length, width = inner(frame), columns(frame)
            tiles = (length + width - 1) // width
            start = (item % tiles) * width
            return (item // tiles) * length + start, min(width, length - start), item + 1

        @device
        def begin(frame, state, p, count):
            """Set the addresses of rows p … p + count − 1; behind them, of row p again."""
            shape, x0, y0, out0 = geometry(frame), x_data(frame), y_data(frame), out_data(frame)
            x, y, out = row_offsets(shape, p, x_row(frame), y_row(frame), out_row(frame))
            x, y, out = x + x0, y + y0, out + out0
            if adjacent:
                for i in range(count):
                    put_i64(state + s_x + 8 * i, x + i * x_size)
                    put_i64(state + s_y + 8 * i, y + i * y_size)
                    put_i64(state + s_out + 8 * i, out + i * out_size)
            else:
                for i in range(lanes):
                    put_i64(state + s_x + 8 * i, x)
                    put_i64(state + s_y + 8 * i, y)
                    put_i64(state + s_out + 8 * i, out)
                for i in range(1, count):
                    x, y, out = row_offsets(
                        shape, p + i, x_row(frame), y_row(frame), out_row(frame)
                    )
                    put_i64(state + s_x + 8 * i, x0 + x)
                    put_i64(state + s_y + 8 * i, y0 + y)
                    put_i64(state + s_out + 8 * i, out0 + out)

        self.advance, self.begin = advance, begin

    # -- into the tile

    def _make_pack(self):
        classes, columns = integer("classes"), integer("columns")
        x_step, y_step = integer("x_class"), integer("y_class")
        pack_x = self._packer(self.x_access, "x")
        pack_y = self._packer(self.y_access, "y") if self.y_access else None
        has_y, size, block, lanes = pack_y is not None, self._size, BLOCK[self.elem], self._lanes

        @device
        def tiles(frame, state):
            """Addresses of the packed x and y, and the bytes from class to class."""
            pitch = columns(frame) * size
            length = (min(classes(frame), block) + lanes - 1) // lanes * lanes
            return state + _TILE, state + _TILE + length * pitch, pitch

        @device
        def pack(frame, state, count, j, n):
            """Pack classes j … j + n − 1."""
            x, y, pitch = tiles(frame, state)
            pack_x(state, x, pitch, count, j, n, x_step(frame))
            if has_y:
                pack_y(state, y, pitch, count, j, n, y_step(frame))

        self._tiles, self._pack = tiles, pack

    def _packer(self, access, name):
        """pack(state, tile, pitch, count, j0, n, step) for one input."""
        form, lanes, slot = access.format, self._lanes, SLOT[name]
        width = lanes * self._size

        if self.layout == COLUMNS:
            form_bytes = form.size * lanes

            @traced
            def whole(tile, address):
                store_vector(tile, form.load(address))

            @traced
            def part(tile, address, count):
                store_vector(tile, form.load_first(address, count, 0.0))

            @device
            def pack(state, tile, pitch, count, j0, n, step):
                first = get_i64(state + slot)
                for j in range(n):
                    address, target = first + (j0 + j) * step, tile + j * pitch
                    c = 0
                    while c + lanes <= count:
                        whole(target, address)
                        address += form_bytes
                        target += width
                        c += lanes
                    if c < count:
                        part(target, address, count - c)

        elif self.layout == ROWS:

            def block(state, tile, j0, j, n, whole):
                rows = []
                for r in range(lanes):
                    address = load_scalar(state + (slot + 8 * r), "i8") + (j0 + j) * form.size
                    rows.append(form.load(address) if whole else form.load_first(address, n - j, 0.0))
                for r, column in enumerate(transpose(rows)):
                    store_vector(tile + j * width + r * width, column)

            whole = traced(lambda state, tile, j0, j, n: block(state, tile, j0, j, n, True))
            part = traced(lambda state, tile, j0, j, n: block(state, tile, j0, j, n, False))

            @device
            def pack(state, tile, pitch, count, j0, n, step):
                j = 0
                while j + lanes <= n:
                    whole(state, tile, j0, j, n)
                    j += lanes
                if j < n:
                    part(state, tile, j0, j, n)

        else:

            @traced
            def single(state, tile, offset, count):
                store_vector(tile, form.gather_at(state + slot, offset, count, 0.0))

            @device
            def pack(state, tile, pitch, count, j0, n, step):
                for j in range(n):
                    single(state, tile + j * pitch, (j0 + j) * step, count)

        return pack

    # -- reductions

    def _params(self, names, elem):
        """params(state, c): the values of these slots for the columns from c on."""
        lanes = self._lanes

        def params(state, c):
            at = (load_vector(state + (SLOT[name] + 8 * c), "f8", lanes) for name in names)
            return tuple(convert(v, elem) for v in at)

        return traced(params)

    def _inputs_at(self):
        """Inside traced functions: (x, y, w) of class j in the tile; operands (x, y, w, pitch)."""
        lanes, elem, size = self._lanes, self.elem, self._size
        has_y, has_w = self.y_access is not None, self.weighted

        def inputs(operands, j):
            x, y, w, pitch = operands
            return (
                load_vector(x + j * pitch, elem, lanes),
                load_vector(y + j * pitch, elem, lanes) if has_y else None,
                splat(load_scalar(w + j * size, elem), elem, lanes) if has_w else None,
            )

        return inputs

    def _make_column_sums(self, terms, elem):
        """sums(operands, n, params, work) -> (a, a_low, b) of a vector of columns, float64."""
        inputs, lanes = self._inputs_at(), self._lanes
        group = 4 * lanes * STEPS
        line = lanes * _SIZES[elem]
        other = 16 * 128  # from the first term's lane sums to the second's

        @traced
        def one(operands, j, params):
            return terms(*inputs(operands, j), params)

        @traced
        def four(group_a, group_b, operands, j, params):
            (a0, b0), (a1, b1), (a2, b2), (a3, b3) = (
                terms(*inputs(operands, j + i * lanes), params) for i in range(4)
            )
            return group_a + ((a0 + a1) + (a2 + a3)), group_b + ((b0 + b1) + (b2 + b3))

        @traced
        def plus(a, b):
            return a + b

        @traced
        def zero(j):
            return zeros(j, elem, lanes)

        @traced
        def zero8(j):
            return zeros(j, "f8", lanes)

        @traced
        def put(work, a, b):
            store_vector(work, a)
            store_vector(work + other, b)

        @traced
        def fold(work, far):
            for at in (work, work + other):
                store_vector(at, load_vector(at, elem, lanes) + load_vector(at + far, elem, lanes))

        @traced
        def close(a, a_low, b, work):
            a, e = two_sum(a, convert(load_vector(work, elem, lanes), "f8"))
            return a, a_low + e, b + convert(load_vector(work + other, elem, lanes), "f8")

        @device
        def sums(operands, n, params, work):
            a = a_low = b = zero8(n)
            g = 0
            while g < n:
                end = min(g + group, n)
                live = min(lanes, end - g)
                for lane in range(live):
                    group_a = group_b = zero(n)
                    j = g + lane
                    while j + 3 * lanes < end:
                        group_a, group_b = four(group_a, group_b, operands, j, params)
                        j += 4 * lanes
                    if j < end:
                        a0, b0 = one(operands, j, params)
                        if j + lanes < end:
                            a1, b1 = one(operands, j + lanes, params)
                            a0, b0 = plus(a0, a1), plus(b0, b1)
                            if j + 2 * lanes < end:
                                a1, b1 = one(operands, j + 2 * lanes, params)
                                a0, b0 = plus(a0, a1), plus(b0, b1)
                        group_a, group_b = plus(group_a, a0), plus(group_b, b0)
                    put(work + lane * line, group_a, group_b)
                half = lanes // 2
                while half > 0:
                    for lane in range(min(half, live - half)):
                        fold(work + lane * line, half * line)
                    half //= 2
                a, a_low, b = close(a, a_low, b, work)
                g += group
            return a, a_low, b

        return sums

    def _make_put_sums(self):
        @traced
        def put_sums(state, c, a, a_low, b):
            at = state + 8 * c
            store_vector(at + SLOT["sum_a"], a)
            store_vector(at + SLOT["sum_a_low"], a_low)
            store_vector(at + SLOT["sum_b"], b)

        return put_sums

    def _make_column_max(self):
        """column_max(state, c, tile, pitch, n): maxima of a vector of columns into block_m."""
        elem, lanes = self.elem, self._lanes

        @traced
        def start(n):
            lowest = zeros(n, elem, lanes) - math.inf
            return lowest, unordered(lowest, lowest)

        @traced
        def step(m, bad, tile):
            v = load_vector(tile, elem, lanes)
            return where(v > m, v, m), bad | unordered(v, v)

        @traced
        def put(state, c, m, bad):
            store_vector(state + (SLOT["block_m"] + 8 * c), convert(where(bad, math.nan, m), "f8"))

        @device
        def column_max(state, c, tile, pitch, n):
            m, bad = start(n)
            for j in range(n):
                m, bad = step(m, bad, tile + j * pitch)
            put(state, c, m, bad)

        return column_max

    def softmax(self, rest_and_count):
        """reduce(frame, state, count): m, k, rest and log_sum of every row; packs the tile."""
        column_max, put_sums = self._make_column_max(), self._make_put_sums()
        sums = self._make_column_sums(rest_and_count, self.elem)
        params = self._params(("block_m", "base", "magic", "floor"), self.elem)
        centre_on, finish = make_centre_on("block_m", self.elem), make_finish(self.elem)
        tiles, pack, classes = self._tiles, self._pack, integer("classes")
        block, lanes, size = BLOCK[self.elem], self._lanes, self._size

        @device
        def reduce(frame, state, count):
            n = classes(frame)
            x, _, pitch = tiles(frame, state)
            j = 0
            while j == 0 or j < n:
                length = min(n - j, block)
                pack(frame, state, count, j, length)
                for c in range(0, count, lanes):
                    column_max(state, c, x + c * size, pitch, length)
                centre_on(state, count)
                for c in range(0, count, lanes):
                    operands = (x + c * size, x, x, pitch)
                    a, low, k = sums(operands, length, params(state, c), state + _WORK)
                    put_sums(state, c, a, low, k)
                if j == 0:
                    first_block(state, count)
                else:
                    join_block(state, count)
                j += block
            finish(state, count)

        return reduce

    def sums(self, terms, elem, names):
        """add(frame, state, count): both sums of `terms` (vectors of `elem`) over every row, with
        the parameters in these slots, into sum_a, sum_a_low and sum_b; packs the tile."""
        sums, put_sums = self._make_column_sums(terms, elem), self._make_put_sums()
        params, tiles, pack = self._params(names, elem), self._tiles, self._pack
        classes, weight = integer("classes"), data("weight")
        block, lanes, size = BLOCK[self.elem], self._lanes, self._size

        @traced
        def more(state, c, a, a_low, b):
            at = state + 8 * c
            total, e = two_sum(load_vector(at + SLOT["sum_a"], "f8", lanes), a)
            low = load_vector(at + SLOT["sum_a_low"], "f8", lanes) + (a_low + e)
            return total, low, load_vector(at + SLOT["sum_b"], "f8", lanes) + b

        @device
        def add(frame, state, count):
            n = classes(frame)
            x, y, pitch = tiles(frame, state)
            j = 0
            while j == 0 or j < n:
                length = min(n - j, block)
                pack(frame, state, count, j, length)
                for c in range(0, count, lanes):
                    operands = (x + c * size, y + c * size, weight(frame) + j * size, pitch)
                    a, low, b = sums(operands, length, params(state, c), state + _WORK)
                    if j > 0:
                        a, low, b = more(state, c, a, low, b)
                    put_sums(state, c, a, low, b)
                j += block

        return add

    # -- out of the tile

    def map(self, value, names, packed=True):
        """sweep(frame, state, count): out = value(x, y, w, params) with the parameters in these
        slots. `packed` tells that a reduction has left a tile of a single block in scratch."""
        params, tiles, pack = self._params(names, self.elem), self._tiles, self._pack
        classes, weight = integer("classes"), data("weight")
        out_step, flags = integer("out_class"), integer("flags")
        block, lanes, size = BLOCK[self.elem], self._lanes, self._size
        unpack = self._unpacker(value)

        @device
        def sweep(frame, state, count):
            n, step, stream = classes(frame), out_step(frame), flags(frame) & 1
            x, y, pitch = tiles(frame, state)
            j = 0
            while j < n:
                length = min(n - j, block)
                if not packed or n > block:
                    pack(frame, state, count, j, length)
                for c in range(0, count, lanes):
                    operands = (x + c * size, y + c * size, weight(frame) + j * size, pitch)
                    unpack(state, operands, c, count - c, j, length, step, stream, params(state, c))
                j += block

        return sweep

    def _unpacker(self, value):
        """unpack(state, operands, c, count, j0, n, step, stream, params) of a vector of columns."""
        inputs, lanes, form, slot = self._inputs_at(), self._lanes, self.out_access.format, SLOT["out"]

        def at(operands, j, params):
            return value(*inputs(operands, j), params)

        if self.layout == COLUMNS:
            line = form.size * lanes

            @traced
            def whole(operands, j, params, out):
                form.store(out, at(operands, j, params))

            @traced
            def streaming(operands, j, params, out):
                form.stream(out, at(operands, j, params))

            @traced
            def part(operands, j, params, out, count):
                form.store_first(out, count, at(operands, j, params))

            @device
            def unpack(state, operands, c, count, j0, n, step, stream, params):
                out = get_i64(state + slot + 8 * c) + j0 * step
                if count < lanes:
                    for j in range(n):
                        part(operands, j, params, out + j * step, count)
                elif stream and out % line == 0 and step % line == 0:
                    for j in range(n):
                        streaming(operands, j, params, out + j * step)
                else:
                    for j in range(n):
                        whole(operands, j, params, out + j * step)

        elif self.layout == ROWS:

            def block(state, operands, j0, j, n, count, params, whole):
                columns = [at(operands, j + i, params) for i in range(lanes)]
                for r, row in enumerate(transpose(columns)):
                    out = load_scalar(state + (slot + 8 * r), "i8") + (j0 + j) * form.size
                    if whole:
                        form.store(out, row)
                    else:
                        inside = (count - r) > 0
                        form.store_first(out, where(inside, n - j, 0), row)

            @traced
            def whole(state, operands, j0, j, n, count, params):
                block(state, operands, j0, j, n, count, params, True)

            @traced
            def part(state, operands, j0, j, n, count, params):
                block(state, operands, j0, j, n, count, params, False)

            @device
            def unpack(state, operands, c, count, j0, n, step, stream, params):
                j = 0
                if count >= lanes:
                    while j + lanes <= n:
                        whole(state, operands, j0, j, n, count, params)
                        j += lanes
                while j < n:
                    part(state, operands, j0, j, n, count, params)
                    j += lanes

        else:

            @traced
            def single(state, operands, j, params, offset, count):
                form.scatter_at(state + slot, offset, count, at(operands, j, params))

            @device
            def unpack(state, operands, c, count, j0, n, step, stream, params):
                for j in range(n):
                    single(state, operands, j, params, (j0 + j) * step, count)

        return unpack
