"""Walks many short or strided rows at once: a tile of columns, a vector lane a row.

Where the class axis is strided, reading row by row would touch a cache line per element; where
it is short, a row would not fill a vector. A tile of up to a few hundred rows is packed class by
class into scratch memory, in the type computed in, and every lane then walks its own row. No
transposed copy of the array is made. Sums follow the order that `rows` describes, so the bits are
the same.

Where rows are adjacent, several tiles are packed at once (a panel), and tiles begin where the
output has a whole vector, so that it can be written past the caches; if not all classes have one
there, the lines that two tiles share wait for the second one (`lines`). The next panel is packed
bit by bit while this one is summed: memory and arithmetic work at the same time.
"""

import math

from numbakern.cpu import column_sums, lines
from numbakern.cpu.compile import apart, device
from numbakern.cpu.frame import data, integer
from numbakern.cpu.rows import (
    BLOCK,
    COUNT,
    Access,
    add_blocks,
    make_put_x_labels,
    row_offsets,
)
from numbakern.cpu.simd import (
    BYTES,
    SIZES,
    constant,
    convert,
    each,
    gather,
    lane_numbers,
    larger,
    load_scalar,
    load_vector,
    prefetch,
    smaller,
    splat,
    spread,
    store_vector,
    traced,
    vector_lanes,
    when,
    where,
    zeros,
)
from numbakern.cpu.state import (
    CENTRED,
    LANES,
    MAX_ROWS,
    SLOT,
    block_of,
    constants,
    get_i64,
    join_block,
    make_finish,
    make_normalise_block,
    make_put_constants,
    put_i64,
)
from numbakern.vmath import centre

_ALL = 1 << 40  # more vectors than a panel has
PANEL_BYTES, PANEL_ROWS = 128 * 1024, 1024
"""Size of a panel of several tiles, packed in one go; it stays in the second-level cache."""

_PARAMS = column_sums.END  # parameters of a map, in the type computed in
MAXIMA = _PARAMS + 12 * 8 * MAX_ROWS  # of two panels' rows, in the type computed in
_TILE = MAXIMA + 2 * 8 * PANEL_ROWS

# In slot panel, int64 each: the worker's last item; where the tile begins in the packed panel; the
# record of its panel (0 or 1); and two records, of this panel and of the next one.
_LAST, _OFFSET, _NOW, RECORDS = (SLOT["panel"] + 8 * i for i in range(4))
# In a record: the panel's first row, −1 for none; the address of its first element in x and y; its
# rows; the rows in its first tile; the class and the row up to which it is packed.
_FIRST, _X, _Y, _WIDTH, _HEAD, CLASS, _ROW, _RECORD = (8 * i for i in range(8))
_LINES = RECORDS + 2 * _RECORD  # two int64, of `lines.Lines`

COLUMNS, SCATTERED, ROWS, SHORT = "columns", "scattered", "rows", "short"
"""Layouts: neighbouring rows are adjacent in memory; nothing is; classes are, a group of its sums
at most; and at most a vector of them (see `short`).
"""
OF_ROWS = ROWS, SHORT
TILE_BYTES = {COLUMNS: 32 * 1024, SCATTERED: 32 * 1024, ROWS: 12 * 1024, SHORT: 12 * 1024}
"""Size of a tile that is aimed at: it stays in the first-level cache.

Rows of adjacent classes need room there themselves: what a tile is packed from and unpacked to.
"""


def columns_for(elem, layout, classes, inputs):
    """Rows in a tile: as many as TILE_BYTES hold, at least one vector."""
    lanes, classes = vector_lanes(elem), min(max(1, classes), BLOCK[elem])
    fit = min(TILE_BYTES[layout] // (classes * SIZES[elem] * inputs), MAX_ROWS)
    return max(lanes, fit // lanes * lanes)


def panel_for(elem, layout, classes, inputs):
    """Rows that are packed at once: of adjacent ones several tiles: long runs suit the memory."""
    columns = columns_for(elem, layout, classes, inputs)
    if layout != COLUMNS or classes > BLOCK[elem]:
        return columns
    fit = min(PANEL_BYTES // (max(1, classes) * SIZES[elem] * inputs), PANEL_ROWS)
    return max(columns, fit // columns * columns)


def tiles_for(elem, layout, length, columns, panel):
    """How many tiles a run of adjacent rows is cut into, in whole panels; some may be empty."""
    early = _most_early(elem, layout)
    return -(-(length + early) // panel) * (panel // columns)


def _most_early(elem, layout):
    """Columns by which tiles may begin before a run."""
    return vector_lanes(elem) - 1 if layout == COLUMNS else 0


def scratch_size(elem, layout, classes, panel, inputs):
    """Bytes of scratch memory a worker needs for panels of this many rows."""
    panels = inputs + (_panels(layout) - 1)
    staged = panel * classes * 8 + 2 * BYTES if layout in OF_ROWS else 0
    if layout == COLUMNS and classes <= _most_waiting(elem):
        staged = lines.scratch_size(classes, panel)
    return _TILE + panels * _tile_size(elem, min(classes, BLOCK[elem]), panel) + staged


def _most_waiting(elem):
    """Most classes of which a tile may be WIDE, of at most 8 bytes an element."""
    return TILE_BYTES[COLUMNS] // (lines.WIDE // 8 * SIZES[elem])


def _panels(layout):
    """How many panels of x there is room for."""
    return 2 if layout == COLUMNS else 1


def _tile_size(elem, classes, columns):
    lanes = vector_lanes(elem)
    return -(-classes // lanes) * lanes * (columns * SIZES[elem] + _PAD)


_PAD = 64  # between the classes of a tile: no power of two, which would fall into one cache set


def larger_or_nan(v, m):
    """The larger one; NaN where one of them is."""
    m = where(v > m, v, m)
    return where(v == v, m, v)


class Tiles:
    """The walker for tiles; what `kernels` needs, like `rows.Rows`.

    Parameters
    ----------
    x_format, y_format, out_format : simd.Format
        How the inputs and the output lie in memory; None for what an operation has not.
    weighted : bool
        Whether there is a weight for each class.
    layout : {COLUMNS, SCATTERED}, of `short.Short` {ROWS, SHORT}
        How the rows of a tile lie.
    """

    many = 2 * LANES  # rows of a tile that are finished at once: constants are fetched once for all

    def __init__(self, x_format, y_format, out_format, weighted, layout):
        self.elem, self.weighted, self.layout = x_format.elem, weighted, layout
        self.x_access = Access(x_format, True)
        self.y_access = Access(y_format, True) if y_format else None
        self.out_access = Access(out_format, True) if out_format else None
        self._lanes, self._size = vector_lanes(self.elem), SIZES[self.elem]
        self._make_walk()
        self._make_pack()

    # -- where the tile's rows are

    def _make_walk(self):
        inner, columns, panel = integer("inner"), integer("columns"), integer("panel")
        x_row, y_row, out_row = integer("x_row"), integer("y_row"), integer("out_row")
        x_data, y_data, out_data = data("x"), data("y"), data("out")
        geometry = data("geometry")
        s_x, s_y, s_out = SLOT["x"], SLOT["y"], SLOT["out"]
        adjacent, lanes, many = self.layout == COLUMNS, self._lanes, self.many
        early = _most_early(self.elem, self.layout)
        x_size, out_size = (a.size if a else 0 for a in (self.x_access, self.out_access))

        @traced
        def offsets(frame, p):
            return row_offsets(geometry(frame), p, x_row(frame), y_row(frame), out_row(frame))

        @traced
        def skew(frame, run):
            """Columns by which the tiles of a run of adjacent rows begin before it.

            So they end with a whole vector of what is written, or else read.
            """
            if not adjacent:
                return constant(run, 0, "i8")
            x, _, out = offsets(frame, run * inner(frame))
            address = out_data(frame) + out if out_size else x_data(frame) + x
            size = out_size if out_size else x_size
            return where(address % size == 0, address % (lanes * size) // size, 0)

        @traced
        def tiles_of(frame):
            """Tiles of a run, as `tiles_for`."""
            whole = panel(frame)
            return (inner(frame) + whole + (early - 1)) // whole * (whole // columns(frame))

        put_constants = make_put_constants(self.elem)

        @traced
        def start(frame, state, last):
            """To be called before the first tile: no panel is packed."""
            put_constants(state)
            put_i64(state + _LAST, last)
            for slot in _NOW, _LINES, _LINES + 8:
                put_i64(state + slot, constant(last, 0, "i8"))
            for record in (RECORDS, RECORDS + _RECORD):
                put_i64(state + record + _FIRST, constant(last, -1, "i8"))

        @traced
        def advance(frame, item, last):
            """The tile `item`: (first row, rows, next item); tiles end with the innermost axis."""
            length, width, tiles = inner(frame), columns(frame), tiles_of(frame)
            run = item // tiles
            at = item % tiles * width - skew(frame, run)
            first = larger(at, 0)
            return run * length + first, larger(smaller(at + width, length) - first, 0), item + 1

        def describe(frame, record, run, at):
            """Note the panel from column `at` of a run on, nothing of which is packed."""
            length, width = inner(frame), panel(frame)
            first = larger(at, 0)
            x, y, _ = offsets(frame, run * length + first)
            put_i64(record + _FIRST, run * length + first)
            put_i64(record + _X, x_data(frame) + x)
            put_i64(record + _Y, y_data(frame) + y)
            put_i64(record + _WIDTH, smaller(at + width, length) - first)
            # The panel's first tile is shorter by `gap`; the others begin where they would anyway.
            gap = first - at
            put_i64(record + _HEAD, where(gap > 0, columns(frame) - gap, width))
            for progress in CLASS, _ROW:
                put_i64(record + progress, constant(at, 0, "i8"))

        @traced
        def enter(frame, state, p):
            """Find the panel that row p belongs to, and the next one."""
            length, width = inner(frame), panel(frame)
            run, column = p // length, p % length
            before = skew(frame, run)
            at = (column + before) // width * width - before  # the panel's column
            first, now = run * length + larger(at, 0), get_i64(state + _NOW)

            def change():
                if not adjacent:
                    describe(frame, state + RECORDS, run, at)
                    return
                put_i64(state + _NOW, 1 - now)
                record = state + RECORDS + (1 - now) * _RECORD
                when(get_i64(record + _FIRST) != first, lambda: describe(frame, record, run, at))
                after, tiles = at + width, tiles_of(frame)
                more = after < length  # of this run
                item = run * tiles + where(more, (after + before) // columns(frame), tiles)
                when(item < get_i64(state + _LAST), lambda: describe_next(after, more))

            def describe_next(after, more):
                other = where(more, run, run + 1)
                start = where(more, after, -skew(frame, other))
                describe(frame, state + RECORDS + now * _RECORD, other, start)

            when(get_i64(state + RECORDS + now * _RECORD + _FIRST) != first, change)
            put_i64(state + _OFFSET, where(column > 0, column - at, 0))

        @traced
        def put(state, i, x, y, out):
            put_i64(state + s_x + 8 * i, x)
            put_i64(state + s_y + 8 * i, y)
            put_i64(state + s_out + 8 * i, out)

        if adjacent:

            @traced
            def begin(frame, state, p, count):
                """Set the addresses of row p, which those of the other rows follow from."""
                enter(frame, state, p)
                x, y, out = offsets(frame, p)
                put(state, 0, x_data(frame) + x, y_data(frame) + y, out_data(frame) + out)

        else:

            def put_evenly(state, i, x, y, out, dx, dy, dout):
                """Addresses of a few rows that lie at even distances, the first one's given."""
                for slot, first, step in ((s_x, x, dx), (s_y, y, dy), (s_out, out, dout)):
                    start = spread(first, zeros(first, "i8", many))
                    start = start + lane_numbers(start, 1) * step
                    store_vector(state + slot + 8 * i, start)

            @traced
            def begin(frame, state, p, count):
                """Set the addresses of rows p … p + count − 1.

                The last vector of rows is filled up with the address of its first one.
                """
                enter(frame, state, p)
                shape, dx, dy, dout = geometry(frame), x_row(frame), y_row(frame), out_row(frame)
                x0, y0, out0 = x_data(frame), y_data(frame), out_data(frame)

                def few(i):
                    x, y, out = (p + i) * dx, (p + i) * dy, (p + i) * dout
                    put_evenly(state, i, x0 + x, y0 + y, out0 + out, dx, dy, dout)

                def one(i):
                    x, y, out = row_offsets(shape, p + i, dx, dy, dout)
                    put(state, i, x0 + x, y0 + y, out0 + out)

                when(shape == 0, lambda: each(count, many, few))
                when(shape != 0, lambda: each(count, 1, one))
                whole = (count - 1) // lanes * lanes
                first = state + whole * 8
                x0, y0, out0 = (get_i64(first + slot) for slot in (s_x, s_y, s_out))
                rest = (count + (lanes - 1)) // lanes * lanes - count
                each(rest, 1, lambda i: put(state, count + i, x0, y0, out0))

        def make_address(slot, access):
            """address(state, i): where row i of the batch lies."""
            size = access.size if access else 0
            if adjacent:
                return traced(lambda state, i: get_i64(state + slot) + i * size)
            return traced(lambda state, i: get_i64(state + slot + 8 * i))

        self.start, self.advance, self.begin = start, advance, begin
        self.x_of = make_address(s_x, self.x_access)
        self.y_of = make_address(s_y, self.y_access)
        self.out_of = make_address(s_out, self.out_access)

    # -- into the tile

    def _make_pack(self):
        """What packs the tile, and what reads from it while it holds x."""
        classes, panel = integer("classes"), integer("panel")
        x_step, y_step = integer("x_class"), integer("y_class")
        pack_y = self._packer(self.y_access, "y", False) if self.y_access else None
        has_y, size, block, lanes = pack_y is not None, self._size, BLOCK[self.elem], self._lanes
        elem, panels, flags = self.elem, _panels(self.layout), integer("flags")
        many = self.many

        @traced
        def packed(frame, state, now):
            """Addresses of the packed panel, x and y, and the bytes from class to class."""
            pitch = panel(frame) * size + _PAD
            length = (smaller(classes(frame), block) + (lanes - 1)) // lanes * lanes * pitch
            return state + _TILE + now * length, state + _TILE + panels * length, pitch

        @traced
        def staging(frame, state):
            """Where results wait to be written past the caches: behind the panels."""
            x, y, _ = packed(frame, state, constant(frame, 0, "i8"))
            return y + (y - x) // panels if has_y else y

        @traced
        def tiles(frame, state):
            """Addresses of the packed x and y, and the bytes from class to class."""
            x, y, pitch = packed(frame, state, get_i64(state + _NOW))
            offset = get_i64(state + _OFFSET) * size
            return x + offset, y + offset, pitch

        def make_pack(pack_x):
            @device
            def pack(frame, state, count, j, n):
                """Pack classes j … j + n − 1 of the tile's panel, what of them is not there yet."""
                now = get_i64(state + _NOW)
                record = state + RECORDS + now * _RECORD
                if n < classes(frame):
                    put_i64(record + CLASS, 0)
                if get_i64(record + CLASS) < n:
                    x, y, pitch = packed(frame, state, now)
                    stream = flags(frame) & 1
                    pack_x(state, now, x, pitch, count, j, n, x_step(frame), _ALL, stream)
                    if has_y:
                        put_i64(record + CLASS, 0)
                        pack_y(state, now, y, pitch, count, j, n, y_step(frame), _ALL, stream)

            return pack

        pack_x = self._packer(self.x_access, "x", True)

        if panels > 1 and not has_y:

            @device
            def pack_ahead(frame, state):
                """Pack as many vectors of the next panel as there are classes."""
                now, n = 1 - get_i64(state + _NOW), classes(frame)
                record = state + RECORDS + now * _RECORD
                if n <= block and get_i64(record + _FIRST) >= 0 and get_i64(record + CLASS) < n:
                    x, _, pitch = packed(frame, state, now)
                    pack_x(state, now, x, pitch, 0, 0, n, x_step(frame), n, 0)

        else:

            @device
            def pack_ahead(frame, state):
                """Tiles are packed when it is their turn."""
                return  # as in `rows`

        @traced
        def take_maxima(state, count):
            """The maxima that packing has found, into block_m; what `_exp_params` reads of them."""
            most = state + MAXIMA + get_i64(state + _NOW) * 8 * PANEL_ROWS
            most += get_i64(state + _OFFSET) * size

            def centre_few(c):
                self._centre_on(state, c, load_vector(most + c * size, elem, lanes))

            each(count, lanes, centre_few)

        pack_max = make_pack(pack_x)
        put_from_memory = make_put_x_labels(self)

        def put_few(state, x, pitch):
            t = load_vector(state + SLOT["label"], "i8", many)
            v = gather(x + t * pitch + lane_numbers(t, size), elem, t >= 0)
            store_vector(state + SLOT["x_label"], convert(v, "f8"))

        @device
        def load(frame, state, count):
            """Pack rows of a single block: to be called before `put_x_labels`."""
            if classes(frame) <= block:
                pack_max(frame, state, count, 0, classes(frame))

        def put_from_tile(frame, state, count):
            x, _, pitch = tiles(frame, state)
            each(count, many, lambda i: put_few(state + 8 * i, x + i * size, pitch))

        @traced
        def put_x_labels(frame, state, count):
            """`rows.make_put_x_labels`, from the tile where it holds all classes."""
            short = classes(frame) <= block
            when(short, lambda: put_from_tile(frame, state, count))
            when(~short, lambda: put_from_memory(frame, state, count))

        self._tiles, self._pack_max, self._take_maxima = tiles, pack_max, take_maxima
        self._staging = staging
        self._make_stop()
        self._pack_ahead = pack_ahead
        self.load, self.put_x_labels = load, put_x_labels
        self._pack = make_pack(self._packer(self.x_access, "x", False))

    def _make_stop(self):
        """What is to be called after the last tile."""
        classes, out_step, staging = integer("classes"), integer("out_class"), self._staging

        @device
        def stop(frame, state):
            return

        if self.layout == COLUMNS and self.out_access:
            self._lines = lines.Lines(self.out_access.format, _LINES)
            settle = self._lines.settle

            @device
            def stop(frame, state):
                settle(state, classes(frame), out_step(frame), staging(frame, state))

        self.stop = stop

    def _centre_on(self, state, c, m):
        """Slots block_m and factor of the columns from c on; what `_exp_params` reads of them."""
        size, elem = self._size, self.elem
        wide = convert(m, "f8")
        *centred, factor = centre(wide, elem)
        store_vector(state + SLOT["block_m"] + 8 * c, wide)
        store_vector(state + SLOT["factor"] + 8 * c, factor)
        for i, v in enumerate((m, *centred)):
            store_vector(state + _PARAMS + i * MAX_ROWS * size + c * size, convert(v, elem))

    def _packer(self, access, name, maxima):
        """pack(state, now, panel, pitch, count, j0, n, step, limit, stream) for one input.

        It packs classes j0 … j0 + n − 1 of the panel in record `now`; with `maxima` it leaves each
        row's maximum at MAXIMA, NaN if one of its elements is. Where rows are adjacent it goes on
        from where it stood, for `limit` vectors; elsewhere a panel is a tile, of `count` rows.
        """
        form, lanes, slot, elem = access.format, self._lanes, SLOT[name], self.elem
        size, width = self._size, lanes * self._size

        def put(target, v, most):
            store_vector(target, v)
            if maxima:
                store_vector(most, larger_or_nan(v, load_vector(most, elem, lanes)))

        @traced
        def clear_maxima(most, count):
            lowest = zeros(most, elem, lanes) - math.inf
            if maxima:
                each(count, lanes, lambda c: store_vector(most + c * size, lowest))

        if self.layout == COLUMNS:
            form_size, form_bytes = form.size, form.size * lanes

            @traced
            def whole(tile, most, address, ahead):
                put(tile, form.load(address), most)
                prefetch(address + ahead)

            @traced
            def part(tile, most, address, count):
                put(tile, form.load_first(address, count, 0.0), most)

            @device
            def run(target, most, address, count, ahead):
                c = 0
                while c + lanes <= count:
                    whole(target, most, address, ahead)
                    address += form_bytes
                    target += width
                    most += width
                    c += lanes
                if c < count:
                    part(target, most, address, count - c)

            first_of = _X if name == "x" else _Y

            @device
            def pack(state, now, panel, pitch, count, j0, n, step, limit, stream):
                record, most = state + RECORDS + now * _RECORD, state + MAXIMA
                most += now * 8 * PANEL_ROWS
                j, row = get_i64(record + CLASS), get_i64(record + _ROW)
                width = get_i64(record + _WIDTH)
                head = min(get_i64(record + _HEAD), width)  # rows of a shorter first tile
                gap = (head + lanes - 1) // lanes * lanes - head  # places left free behind it
                if j == 0 and row == 0:
                    clear_maxima(most, gap + width)
                while j < n and limit > 0:
                    end = head if row < head else width
                    rows = min(end - row, limit * lanes)
                    at = (row if row < head else row + gap) * size
                    address = get_i64(record + first_of) + (j0 + j) * step + row * form_size
                    # What comes next: the next class, in the end the next panel.
                    ahead = step if j + 1 < n else width * form_size - j * step
                    run(panel + j * pitch + at, most + at, address, rows, ahead)
                    limit -= (rows + lanes - 1) // lanes
                    row += rows
                    if row == width:
                        j, row = j + 1, 0
                put_i64(record + CLASS, j)
                put_i64(record + _ROW, row)

        else:

            @traced
            def single(state, tile, most, offset, count):
                put(tile, form.gather_at(state + slot, offset, count, 0.0), most)

            @device
            def pack(state, now, tile, pitch, count, j0, n, step, limit, stream):
                put_i64(state + RECORDS + CLASS, n)
                clear_maxima(state + MAXIMA, count)
                for j in range(n):
                    for c in range(0, count, lanes):
                        target, most = tile + j * pitch + c * size, state + MAXIMA + c * size
                        single(state + 8 * c, target, most, (j0 + j) * step, count - c)

        return pack

    # -- reductions

    def _params(self, names, elem):
        """params(state, c): the values of these slots for the columns from c on."""
        lanes = self._lanes

        def params(state, c):
            at = (load_vector(state + (SLOT[name] + 8 * c), "f8", lanes) for name in names)
            return tuple(convert(v, elem) for v in at)

        return traced(params)

    def _exp_params(self):
        """params(state, c): the maximum, CENTRED and the constants, for the columns from c on."""

        def params(state, c):
            return *self._map_params(state, c, 1 + len(CENTRED)), *constants(state, self.elem)

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

    def _make_sums(self, terms, elem, kind):
        """As `column_sums.Sums`, which see, of columns of any length."""
        sums = column_sums.Sums(self._inputs_at(), self._lanes, terms, elem, kind)
        return sums.of_any_length()

    def _make_put_sums(self):
        @traced
        def put_sums(state, c, a, a_low, b):
            at = state + 8 * c
            store_vector(at + SLOT["sum_a"], a)
            store_vector(at + SLOT["sum_a_low"], a_low)
            store_vector(at + SLOT["sum_b"], b)

        return put_sums

    def _make_put_first(self):
        lanes = self._lanes

        @traced
        def put_first(state, c, a, a_low, count):
            """As put_sums and `state.first_block`."""
            at = state + 8 * c
            m, factor = (load_vector(at + SLOT[n], "f8", lanes) for n in ("block_m", "factor"))
            values = block_of(m, factor, a, a_low, count)
            for name, v in zip(("m", "k", "rest", "rest_low"), values, strict=True):
                store_vector(at + SLOT[name], v)

        return put_first

    def softmax(self, terms, keep=False, then=None):
        """reduce(frame, state, p, count): m, k, rest and log_sum of every row; packs the tile.

        Where `keep`, the third of the `terms` is left for `map_exp`.
        """
        put_sums, put_first = self._make_put_sums(), self._make_put_first()
        sums, params = self._make_sums(terms, self.elem, COUNT), self._exp_params()
        finish = make_finish(self.elem, self.many, then)
        tiles, pack, pack_ahead = self._tiles, self._pack_max, self._pack_ahead
        classes, take_maxima = integer("classes"), self._take_maxima
        block, lanes, size = BLOCK[self.elem], self._lanes, self._size

        @traced
        def minus(length, below):
            return convert(length, "f8") - below

        @device
        def reduce(frame, state, p, count):
            n = classes(frame)
            x, _, pitch = tiles(frame, state)
            j = 0
            while j == 0 or j < n:
                length = min(n - j, block)
                pack(frame, state, count, j, length)
                take_maxima(state, count)
                for c in range(0, count, lanes):
                    operands = (x + c * size, x, x, pitch)
                    a, low, below = sums(operands, length, params(state, c), state)
                    if j == 0:
                        put_first(state, c, a, low, minus(length, below))
                    else:
                        put_sums(state, c, a, low, minus(length, below))
                    pack_ahead(frame, state)
                if j > 0:
                    join_block(state, count)
                j += block
            finish(frame, state, p, count)

        return reduce

    def sums(self, terms, elem, names, kind):
        """add(frame, state, count): both sums of `terms` (vectors of `elem`) over every row.

        With the parameters in these slots, into sum_a, sum_a_low and sum_b; packs the tile.
        `kind`: as `rows.make_sums`.
        """
        put_sums = self._make_put_sums()
        sums = self._make_sums(terms, elem, kind)
        params, tiles, pack = self._params(names, elem), self._tiles, self._pack
        classes, weight = integer("classes"), data("weight")
        block, lanes, size = BLOCK[self.elem], self._lanes, self._size

        @traced
        def more(state, c, a, a_low, b):
            slots = (SLOT[name] for name in ("sum_a", "sum_a_low", "sum_b"))
            before = [load_vector(state + slot + 8 * c, "f8", lanes) for slot in slots]
            return add_blocks(before, (a, a_low, b))

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
                    found = sums(operands, length, params(state, c), state)
                    if j > 0:
                        found = more(state, c, *found)
                    put_sums(state, c, *found)
                j += block

        return add

    # -- out of the tile

    def map(self, value, names, labelled=False):
        """sweep(frame, state, count): out = value(x, y, w, params), parameters in these slots.

        Where `labelled`, slot label_grad is the result at the class in slot label.
        """
        tiles, pack = self._tiles, self._pack
        classes, weight = integer("classes"), data("weight")
        out_step, flags = integer("out_class"), integer("flags")
        block, size = BLOCK[self.elem], self._size
        narrow, unpack = self._make_unpack(value, names, labelled)
        staging = self._staging

        @device
        def sweep(frame, state, count):
            n, step, stream = classes(frame), out_step(frame), flags(frame) & 1
            x, y, pitch = tiles(frame, state)
            staged = staging(frame, state)
            j = 0
            while j < n:
                length = min(n - j, block)
                pack(frame, state, count, j, length)
                narrow(state, count, j, length)
                operands = (x, y, weight(frame) + j * size, pitch)
                unpack(state, operands, count, j, length, step, stream, staged)
                j += block

        return sweep

    def map_exp(self, value, exponential, names, kept, labelled=False, skipping=False):
        """`map` of e = exp(x − ref), value(e, y, w, params); slot scale makes it a probability.

        Parameters
        ----------
        exponential : function (x, base, magic, floor, *constants) -> e
            Traced.
        kept : bool
            Whether `softmax` has left e in the tile; of several blocks none can be.
        """
        tiles, pack, take_maxima = self._tiles, self._pack_max, self._take_maxima
        classes, weight = integer("classes"), data("weight")
        out_step, flags = integer("out_class"), integer("flags")
        block, size, lanes = BLOCK[self.elem], self._size, self._lanes
        narrow, unpack = self._make_unpack(value, names, labelled)
        normalise_block, elem = make_normalise_block(self.elem, skipping), self.elem
        narrow_centred = self._narrower(("ref", *CENTRED), False)
        params, staging = self._exp_params(), self._staging

        @traced
        def column(at, pitch, n, params):
            _, *centred = params

            def put(at):
                store_vector(at, exponential(load_vector(at, elem, lanes), *centred))

            each(n, 1, lambda j: put(at + j * pitch))

        @device
        def sweep(frame, state, count):
            n, step, stream = classes(frame), out_step(frame), flags(frame) & 1
            x, y, pitch = tiles(frame, state)
            staged = staging(frame, state)
            j = 0
            while j < n:
                length = min(n - j, block)
                if n > block:
                    pack(frame, state, count, j, length)
                    take_maxima(state, count)
                    normalise_block(state, count)
                    narrow_centred(state, count, j, length)  # else `reduce` has left them
                if not kept or n > block:
                    for c in range(0, count, lanes):
                        column(x + c * size, pitch, length, params(state, c))
                narrow(state, count, j, length)
                operands = (x, y, weight(frame) + j * size, pitch)
                unpack(state, operands, count, j, length, step, stream, staged)
                j += block

        return sweep

    def _make_unpack(self, value, names, labelled):
        """(narrow, unpack) for `value`; with the labels' results in their places."""
        if not labelled:
            return self._narrower(names, False), self._unpacker(value, len(names))

        def labelled_value(x, y, w, params, j, i):
            *params, label, label_grad = params
            here = label - j == i if i else label == j
            return where(here, label_grad, value(x, y, w, params))

        narrow = self._narrower((*names, "label_grad"), True)
        return narrow, self._unpacker(labelled_value, len(names) + 2, indexed=True)

    def _narrower(self, names, labelled):
        """narrow(state, count, j, n): the slots' values in the type computed in, for `_map_params`.

        Where `labelled`, slot label comes before the last, relative to class j; −1 for a label
        that is not among classes j … j + n − 1.
        """
        lanes, elem, pitch, size = self._lanes, self.elem, MAX_ROWS * self._size, self._size
        at_label = len(names) - 1
        places = tuple(i + (labelled and i == at_label) for i in range(len(names)))

        def values(state, at):
            for i, name in zip(places, names, strict=True):
                v = convert(load_vector(state + SLOT[name], "f8", lanes), elem)
                store_vector(at + i * pitch, v)

        def labels(state, at, j, n):
            label = convert(load_vector(state + SLOT["label"], "i8", lanes) - j, "f8")
            inside = (label >= 0.0) & (label < convert(n, "f8"))
            store_vector(at + at_label * pitch, convert(where(inside, label, -1.0), elem))

        def narrow(state, count, j, n):
            def columns(c):
                values(state + 8 * c, state + _PARAMS + c * size)
                if labelled:
                    labels(state + 8 * c, state + _PARAMS + c * size, j, n)

            each(count, lanes, columns)

        return traced(narrow)

    def _map_params(self, state, c, count):
        """What `_narrower` left for the columns from c on. Inside traced functions."""
        pitch, at = MAX_ROWS * self._size, state + _PARAMS + c * self._size
        return tuple(load_vector(at + i * pitch, self.elem, self._lanes) for i in range(count))

    def _make_result(self, value, count_of_params, indexed):
        """Inside traced functions: the result for class j + i and the columns from c on."""
        inputs, lanes, size = self._inputs_at(), self._lanes, self._size

        def result(state, operands, c, j, i=0):
            x, y, w, pitch = operands
            here = (x + c * size, y + c * size, w, pitch)
            index = (splat(j, self.elem, lanes), i) if indexed else ()
            return value(*inputs(here, j + i), self._map_params(state, c, count_of_params), *index)

        return result

    def _unpacker(self, value, count_of_params, indexed=False):
        """unpack(state, operands, count, j0, n, step, stream, staging).

        `indexed` tells that `value` takes the class too, counted from j0: a vector and a number to
        be added. At `staging` results wait that are to fill lines.
        """
        lanes, form, slot = self._lanes, self.out_access.format, SLOT["out"]
        at = self._make_result(value, count_of_params, indexed)

        if self.layout == COLUMNS:
            form_size, line = form.size, form.size * lanes
            begin, place, write = self._lines.begin, self._lines.place, self._lines.write
            most = _most_waiting(self.elem)

            @traced
            def whole(state, operands, c, j, out):
                form.store(out, at(state, operands, c, j))

            @traced
            def streaming(state, operands, c, j, out):
                form.stream(out, at(state, operands, c, j))

            @traced
            def part(state, operands, c, j, out, count):
                form.store_first(out, count, at(state, operands, c, j))

            @apart
            def unpack_by_lines(state, operands, count, n, first, step, staging):
                """Past the caches what begins within a line."""
                begin(state, first, count, n, step, staging)
                for j in range(n):
                    out = place(first + j * step, j, n, staging)
                    for c in range(0, count, lanes):
                        part(state, operands, c, j, out + c * form_size, count - c)
                    write(state, first + j * step, count, j, n, step, staging)

            @device
            def unpack(state, operands, count, j0, n, step, stream, staging):
                first = get_i64(state + slot) + j0 * step
                if stream and (first % line or step % line):
                    stream = False
                    wide = count * form_size >= lines.WIDE and n <= most and j0 == 0
                    if wide and first % form_size == 0 and step % form_size == 0:
                        unpack_by_lines(state, operands, count, n, first, step, staging)
                        return
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

        else:

            @traced
            def single(state, operands, c, j, offset, count):
                v = at(state, operands, c, j)
                form.scatter_at(state + slot + c * 8, offset, count, v)

            @device
            def unpack(state, operands, count, j0, n, step, stream, staging):
                for j in range(n):
                    for c in range(0, count, lanes):
                        single(state, operands, c, j, (j0 + j) * step, count - c)

        return unpack
