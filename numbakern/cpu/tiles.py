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
    prefetch,
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
_PARAMS = _WORK + 2 * 16 * 128  # parameters of a map, in the type computed in
_TILE = _PARAMS + 8 * 8 * MAX_ROWS
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
            dx, dy, dout = x_row(frame), y_row(frame), out_row(frame)
            if adjacent or shape == 0:
                x, y, out = row_offsets(shape, p, dx, dy, dout)
                if adjacent:
                    dx, dy, dout = x_size, y_size, out_size
                for i in range(count):
                    put_i64(state + s_x + 8 * i, x0 + x + i * dx)
                    put_i64(state + s_y + 8 * i, y0 + y + i * dy)
                    put_i64(state + s_out + 8 * i, out0 + out + i * dout)
            else:
                for i in range(count):
                    x, y, out = row_offsets(shape, p + i, dx, dy, dout)
                    put_i64(state + s_x + 8 * i, x0 + x)
                    put_i64(state + s_y + 8 * i, y0 + y)
                    put_i64(state + s_out + 8 * i, out0 + out)
            for i in range(count, (count + lanes - 1) // lanes * lanes):
                put_i64(state + s_x + 8 * i, get_i64(state + s_x))
                put_i64(state + s_y + 8 * i, get_i64(state + s_y))
                put_i64(state + s_out + 8 * i, get_i64(state + s_out))

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
        size, width = self._size, lanes * self._size

        if self.layout == COLUMNS:
            form_size, form_bytes = form.size, form.size * lanes

            @traced
            def whole(tile, address, ahead):
                store_vector(tile, form.load(address))
                prefetch(address + ahead)

            @traced
            def part(tile, address, count):
                store_vector(tile, form.load_first(address, count, 0.0))

            @device
            def pack(state, tile, pitch, count, j0, n, step):
                first, ahead = get_i64(state + slot), count * form_size
                for j in range(n):
                    address, target = first + (j0 + j) * step, tile + j * pitch
                    c = 0
                    while c + lanes <= count:
                        whole(target, address, ahead)  # the next tile's line
                        address += form_bytes
                        target += width
                        c += lanes
                    if c < count:
                        part(target, address, count - c)

        elif self.layout == ROWS:

            def block(state, tile, pitch, j0, j, n, whole):
                rows = []
                for r in range(lanes):
                    address = load_scalar(state + (slot + 8 * r), "i8") + (j0 + j) * form.size
                    rows.append(form.load(address) if whole else form.load_first(address, n - j, 0.0))
                for r, column in enumerate(transpose(rows)):
                    store_vector(tile + (j + r) * pitch, column)

            @traced
            def whole(state, tile, pitch, j0, j, n):
                block(state, tile, pitch, j0, j, n, True)

            @traced
            def part(state, tile, pitch, j0, j, n):
                block(state, tile, pitch, j0, j, n, False)

            @device
            def pack(state, tile, pitch, count, j0, n, step):
                for c in range(0, count, lanes):
                    j = 0
                    while j + lanes <= n:
                        whole(state + 8 * c, tile + c * size, pitch, j0, j, n)
                        j += lanes
                    if j < n:
                        part(state + 8 * c, tile + c * size, pitch, j0, j, n)

        else:

            @traced
            def single(state, tile, offset, count):
                store_vector(tile, form.gather_at(state + slot, offset, count, 0.0))

            @device
            def pack(state, tile, pitch, count, j0, n, step):
                for j in range(n):
                    for c in range(0, count, lanes):
                        target = tile + j * pitch + c * size
                        single(state + 8 * c, target, (j0 + j) * step, count - c)

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

    def _make_column_sums(self, terms, elem, counts):
        """sums(operands, n, params, work) -> (a, a_low, b) of a vector of columns, float64.

        `counts` tells that the second term is a count, exact in any order.
        """
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
            if not counts:
                store_vector(work + other, b)

        @traced
        def fold(work, far):
            for at in (work,) if counts else (work, work + other):
                store_vector(at, load_vector(at, elem, lanes) + load_vector(at + far, elem, lanes))

        @traced
        def close(a, a_low, b, work, group_b):
            a, e = two_sum(a, convert(load_vector(work, elem, lanes), "f8"))
            if not counts:
                group_b = load_vector(work + other, elem, lanes)
            return a, a_low + e, b + convert(group_b, "f8")

        @device
        def sums(operands, n, params, work):
            a = a_low = b = zero8(n)
            g = 0
            while g < n:
                end = min(g + group, n)
                live = min(lanes, end - g)
                group_b = zero(n)
                for lane in range(live):
                    group_a = zero(n)
                    if not counts:
                        group_b = zero(n)
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
                a, a_low, b = close(a, a_low, b, work, group_b)
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
        sums = self._make_column_sums(rest_and_count, self.elem, counts=True)
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
        put_sums = self._make_put_sums()
        sums = self._make_column_sums(terms, elem, counts=False)
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
        tiles, pack = self._tiles, self._pack
        classes, weight = integer("classes"), data("weight")
        out_step, flags = integer("out_class"), integer("flags")
        block, size = BLOCK[self.elem], self._size
        narrow, unpack = self._narrower(names), self._unpacker(value, len(names))

        @device
        def sweep(frame, state, count):
            n, step, stream = classes(frame), out_step(frame), flags(frame) & 1
            x, y, pitch = tiles(frame, state)
            narrow(state, count)
            j = 0
            while j < n:
                length = min(n - j, block)
                if not packed or n > block:
                    pack(frame, state, count, j, length)
                operands = (x, y, weight(frame) + j * size, pitch)
                unpack(state, operands, count, j, length, step, stream)
                j += block

        return sweep

    def _narrower(self, names):
        """narrow(state, count): the slots' values in the type computed in, for `_map_params`."""
        lanes, elem, pitch = self._lanes, self.elem, MAX_ROWS * self._size

        @traced
        def eight(state, at):
            for i, name in enumerate(names):
                v = convert(load_vector(state + SLOT[name], "f8", lanes), elem)
                store_vector(at + i * pitch, v)

        size = self._size

        @device
        def narrow(state, count):
            for c in range(0, count, lanes):
                eight(state + 8 * c, state + _PARAMS + c * size)

        return narrow

    def _map_params(self, state, c, count):
        """What `_narrower` left for the columns from c on. Inside traced functions."""
        pitch, at = MAX_ROWS * self._size, state + _PARAMS + c * self._size
        return tuple(load_vector(at + i * pitch, self.elem, self._lanes) for i in range(count))

    def _unpacker(self, value, count_of_params):
        """unpack(state, operands, count, j0, n, step, stream)."""
        inputs, lanes, form, slot = self._inputs_at(), self._lanes, self.out_access.format, SLOT["out"]
        size = self._size

        def at(state, operands, c, j):
            """The result for class j and the columns from c on."""
            x, y, w, pitch = operands
            here = (x + c * size, y + c * size, w, pitch)
            return value(*inputs(here, j), self._map_params(state, c, count_of_params))

        if self.layout == COLUMNS:
            line = form.size * lanes

            @traced
            def whole(state, operands, c, j, out):
                form.store(out, at(state, operands, c, j))

            @traced
            def streaming(state, operands, c, j, out):
                form.stream(out, at(state, operands, c, j))

            @traced
            def part(state, operands, c, j, out, count):
                form.store_first(out, count, at(state, operands, c, j))

            @device
            def unpack(state, operands, count, j0, n, step, stream):
                first = get_i64(state + slot) + j0 * step
                stream = stream and first % line == 0 and step % line == 0
                for j in range(n):
                    out, c = first + j * step, 0
                    if stream:
                        while c + lanes <= count:
                            streaming(state, operands, c, j, out)
                            out += line
                            c += lanes
                    while c + lanes <= count:
                        whole(state, operands, c, j, out)
                        out += line
                        c += lanes
                    if c < count:
                        part(state, operands, c, j, out, count - c)

        elif self.layout == ROWS:

            def block(state, operands, c, j0, j, n, count, whole):
                columns = [at(state, operands, c, j + i) for i in range(lanes)]
                for r, row in enumerate(transpose(columns)):
                    out = load_scalar(state + (slot + 8 * r) + c * 8, "i8") + (j0 + j) * form.size
                    if whole:
                        form.store(out, row)
                    else:
                        form.store_first(out, where((count - r) > 0, n - j, 0), row)

            @traced
            def whole(state, operands, c, j0, j, n, count):
                block(state, operands, c, j0, j, n, count, True)

            @traced
            def part(state, operands, c, j0, j, n, count):
                block(state, operands, c, j0, j, n, count, False)

            @device
            def unpack(state, operands, count, j0, n, step, stream):
                for c in range(0, count, lanes):
                    j = 0
                    if count - c >= lanes:
                        while j + lanes <= n:
                            whole(state, operands, c, j0, j, n, count - c)
                            j += lanes
                    while j < n:
                        part(state, operands, c, j0, j, n, count - c)
                        j += lanes

        else:

            @traced
            def single(state, operands, c, j, offset, count):
                v = at(state, operands, c, j)
                form.scatter_at(state + slot + c * 8, offset, count, v)

            @device
            def unpack(state, operands, count, j0, n, step, stream):
                for j in range(n):
                    for c in range(0, count, lanes):
                        single(state, operands, c, j, (j0 + j) * step, count - c)

        return unpack
