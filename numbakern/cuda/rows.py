"""The walker for rows: lanes of a warp take neighbouring elements, up to 16 bytes each.

A row is one part, or several of equal size. A part is what a team of lanes holds in registers: lane
l of L has the groups l, l + L, l + 2·L, … of G elements each. Short rows are one part, of a warp or
less; a longer one is a part for each of its warps; the longest are cut into parts of full size.
What the parts reduce to is put on a board and joined (`softmax.join`). How a row is divided follows
from the number of classes and the element size alone (`partition`), so its bits do not depend on
its neighbours, its place or its layout, nor on who takes the parts: that is a `Way`.
"""

from typing import NamedTuple

from numbakern.cuda.device import (
    all_lanes,
    barrier,
    cluster_rank,
    constant,
    convert,
    divmod_positive,
    dynamic_shared,
    either,
    narrow,
    prefetch,
    put_shared_words,
    repeat,
    shared,
    shared_load,
    shared_store,
    shared_words,
    smaller_integer,
    ticket,
    when,
    where,
)
from numbakern.cuda.memory import ACCESS, Place, Team, is_there, left_of
from numbakern.cuda.reduce import (
    WARP,
    Board,
    MeetingBoard,
    SharedBoard,
    team_fold,
)
from numbakern.cuda.softmax import (
    Share,
    added,
    join,
    largest,
    neutral,
    reduced_of,
    share_of,
    share_of_halves,
    sum_of,
    sum_of_terms,
    width,
)
from numbakern.cuda.tiles import Tiles, run_of
from numbakern.cuda.totals import Counted

BLOCK = 128
"""Threads of a block whose rows are a part each."""
LANE, WIDE = 128, 160
"""Bytes of a lane at most; of one that has a row of a single array, of no float64."""
FULL = 4
"""Accesses of a lane from which on it asks once whether all it reads is there."""
CROWDED, LONE = 256, 40
"""Lanes of a row, groups of one in a lane, from which on few blocks find registers."""
TEAM = 512
"""Lanes of a row that is held in registers at most; half of them for halves."""
MANY = 64
"""Halves of a part from which on their sum is taken without the maximum apart, if it can be."""
UNPACKED = 64
"""Halves of a lane, of all arrays, that are not to be kept unpacked from reduction to map."""


class Partition(NamedTuple):
    """How a row is divided.

    Attributes
    ----------
    lanes : int
        Of a row: of its one part, or a warp for each part.
    vectors : int
        Groups of a lane in a part.
    group : int
        Neighbouring elements of a lane.
    chunks : bool
        Whether the row is longer than lanes·vectors·group, and has as many parts as it takes.
    ragged : bool
        Whether the row may end within a group.
    """

    lanes: int
    vectors: int
    group: int
    chunks: bool
    ragged: bool = False

    @property
    def single(self):
        """Whether a row is one part."""
        return self.lanes <= WARP and not self.chunks

    @property
    def exact(self):
        """Whether each lane has a row, and no room for more than that."""
        return self.lanes == 1 and _grain(self.vectors) == 1 and not self.chunks

    @property
    def crowded(self):
        """Whether a multiprocessor has registers for few of them."""
        return self.lanes > CROWDED or (self.group == 1 and self.vectors > LONE)

    @property
    def sure(self):
        """Groups that each lane has of a row's only part, or of each part but its last one.

        Groups of one by twos: two halves share a word.
        """
        spare = _grain(self.vectors) if self.single else 0
        sure = self.vectors - spare
        return sure // 2 * 2 if self.group == 1 else sure

    @property
    def held(self):
        """Elements of a lane in a part."""
        return self.vectors * self.group

    @property
    def span(self):
        """Elements of a part."""
        return min(self.lanes, WARP) * self.held

    def parts(self, classes):
        """How many there are."""
        return -(-classes // self.span) if self.chunks else max(1, self.lanes // WARP)


def partition(classes, size, halved=False, halves=False, one=False):
    """The Partition of rows of `classes` elements of `size` bytes.

    `halved`: of half as many elements a lane, for an operation that holds more than the row.
    `halves`: all arrays are of halves. `one`: one array is read.

    Groups are of as many elements as divide every row and take 16 bytes: rows of an odd number are
    read element by element, neighbouring lanes side by side. Parts are of a warp, of so few lanes
    that what is done once a row is shared by several rows; then a warp; then 2 to 16 warps, with as
    many groups a lane as it takes; then parts of full size. These are of groups of 16 bytes where
    `realigned` goes, whatever the number of classes.
    """
    group, held = min(ACCESS // size, classes & -classes or ACCESS), LANE // size
    held //= 2 if halved else 1
    ragged = halves and group * size < ACCESS and classes > TEAM // 2 * held
    if ragged:
        group = ACCESS // size
    most = held // group
    if one and not halved and size < 8 and classes * size <= WIDE:
        most = max(most, -(-classes // group))
    lanes = 1
    while lanes < WARP and lanes * group * most < classes:
        lanes *= 2
    parts = -(-classes // (lanes * group * most))
    team = TEAM // 2 if size == 2 else TEAM
    chunks = parts > team // WARP
    # Of long rows an even number, for two rounds, and no longer than that takes.
    lanes *= max(1, parts + chunks * parts % 2)
    vectors = max(1, -(-classes // (lanes * group)))
    grain = _grain(vectors)
    vectors = -(-vectors // grain) * grain
    return Partition(team if chunks else lanes, vectors, group, chunks, ragged)


def _grain(vectors):
    """What so many groups of a lane are made a multiple of: each number is another kernel."""
    return 1 << max(0, vectors.bit_length() - 4)


class Way(NamedTuple):
    """Who takes the parts of a row, and where the row is between reduction and map.

    Attributes
    ----------
    warps : int
        Of a block.
    stage : {"all", "reduce", "map"}
        What this launch does: between two of them the parts' sums wait in global memory.
    spread : bool
        Whether several blocks take the parts of a row, which know of each other by what waits in
        global memory: the next launch finds it there, or they meet (`meets`).
    cluster : int
        Blocks of a cluster, which then have a row together.
    kept : {"registers", "shared", "partly", "ahead", "no"}
        Where the row is between reduction and map; "no": it is read again, if there is a map. In
        registers there is one part for each warp, that of the last round; "shared": the others are
        in shared memory; "partly": the first of them are, and the rest is read again; "ahead": all
        are in shared memory, and their places are for the block's next rows (`ahead`).
    gathers : int
        Rows of a block that are finished together (`gathered`): a power of two; 0 for none.
    abreast : int
        Rows that a lane has, of those that have but one: while one waits, the others go on.
    places : int
        Of a warp, for parts of rows that are kept ahead.
    spare : bool
        Whether those are more than its parts of a row.
    """

    warps: int
    stage: str = "all"
    spread: bool = False
    cluster: int = 1
    kept: str = "registers"
    gathers: int = 0
    abreast: int = 1
    places: int = 0
    spare: bool = False

    def meets(self, numbers):
        """Whether blocks wait for what the others of their row leave: so many numbers a part."""
        return self.spread and self.stage == "all" and numbers > 0


class Rows:
    """Walks rows as a Partition says.

    Parameters
    ----------
    part : Partition
    way : Way
    accesses : dict of str to memory access
        How x, y, w (the class weights) and out lie, as far as they are there.
    """

    def __init__(self, part, way, accesses):
        self.part, self.way, self.accesses = part, way, accesses
        self.inputs = {n: a for n, a in accesses.items() if n != "out"}
        self.out = accesses.get("out")

    def run(self, frame, op):
        """Run an operation of `kernels` on the rows of this block."""
        counted = self._counted(frame, op)
        walks = [self.walk(frame, op, turn) for turn in range(self.way.abreast)]
        for walk in walks:
            walk.begin()
        self._settle(counted, walks)
        for walk in walks:
            walk.run()

    def _counted(self, frame, op):
        """What counts the labels of all rows meanwhile, if that is for the block to do."""
        counts = op.counted and self.way.stage != "reduce"
        return Counted(frame, dict(op.counted)) if counts else None

    @staticmethod
    def _settle(counted, walks):
        """Settle rows that have been asked for."""
        if counted:  # here the least registers are taken
            scale = counted.scale()
            for walk in walks:
                walk.row.scale = scale
        for walk in walks:
            walk.settle()

    def walk(self, frame, op, turn):
        """One warp's or block's Walk, of those that it has one beside the other."""
        return Walk(self, frame, op, turn)

    @staticmethod
    def folded_unless(mask, compute, folded):
        """The sums over lanes of what `compute` gives; 0 where the mask holds.

        Skipped by the warps in which it holds for all.
        """
        zero = constant(mask, 0.0, "f8")
        return either(all_lanes(mask), lambda: [zero, zero], lambda: [folded(v) for v in compute()])


class Lane:
    """A lane's elements in a part of a row.

    Parameters
    ----------
    walker : Rows
    row : Row
    first : Value
        Class of the first of them.
    """

    def __init__(self, walker, row, first):
        self.walker, self.row, self.first = walker, row, first
        self.part = walker.part
        self.left = self._left(row.classes)
        self.places = {name: self._place(name) for name in walker.accesses}
        self.words, self.transformed = {}, False  # whether those of x are its exponentials
        step = min(self.part.lanes, WARP) * self.part.group
        self.groups = range(0, self.part.vectors * step, step)

    def _place(self, name):
        start, step = self.row.places[name]
        left = self._left(self.row.width) if name == "out" else self.left
        access = self.walker.accesses[name]
        if access.staged:
            start = self.row.tiles.start(name)
        start = start + access.distance(self.first, step)
        return Place(start, left, step, self.first)

    def _left(self, count):
        """As a Place has it, of a row of which so many are read or written."""
        if self.part.exact and count is self.row.width:
            return None
        return left_of(self.first, count)

    def load(self, staged=True):
        """Read the elements that are not there yet; of arrays that are `staged` or of no such."""
        inputs = self.walker.inputs.items()
        names = [n for n, a in inputs if n not in self.words and (staged or not a.staged)]
        self.words |= self._loaded(names)

    def load_where(self, mask):
        """Read anew those that are there, where the mask holds."""
        names = list(self.words)
        known = self._flat(self.words, names)
        words = when(mask, lambda: self._flat(self._loaded(names), names), known)
        self.words = self._split(words, names, self.groups)

    def _loaded(self, names):
        """What is read of these inputs."""
        inputs = self.walker.inputs
        direct = [n for n in names if inputs[n].direct and not inputs[n].staged]
        sure = self.groups[: self.part.sure]
        found = self._load_full(direct, sure) if self._asks_once(direct, sure) else {}
        for name in names:
            words = found.get(name, [])
            rest = self.groups[len(words) :]
            found[name] = words + (inputs[name].load(self.places[name], rest) if rest else [])
        return found

    def _flat(self, words, names):
        """All words of these inputs, from {name: groups}."""
        return [word for name in names for word in self.walker.inputs[name].flat(words[name])]

    def _split(self, words, names, groups):
        """{name: groups} again, from what `_flat` gave of these groups."""
        found = {}
        for name in names:
            access = self.walker.inputs[name]
            count = access.count(len(groups))
            found[name], words = access.grouped(words[:count], len(groups)), words[count:]
        return found

    def _asks_once(self, names, groups):
        """Whether `_load_full` is the way to read these groups of these inputs."""
        inputs = [self.walker.inputs[name] for name in names]
        if not any(len(groups) * access.accesses >= FULL for access in inputs):
            return False
        # Of long rows of halves, one array of them, the compiler would not ask for all at once.
        alone = self.part.chunks and self.walker.out is not None and len(names) == 1
        return not (alone and inputs[0].format.size == 2)

    def _load_full(self, names, groups):
        """What `load` is to read of groups that nearly every lane has: no mask for each of them."""
        inputs = self.walker.inputs

        def read(left):
            places = {n: self.places[n]._replace(left=left) for n in names}
            return self._flat({n: inputs[n].load(places[n], groups) for n in names}, names)

        if self.part.single and self.row.width is self.row.classes:
            return self._split(read(None), names, groups)
        full = self.left > groups[-1] + (self.part.group - 1 if self.part.ragged else 0)
        if self.part.single:
            unread = [w for n in names for w in inputs[n].unread(full, len(groups))]
            words = when(full, lambda: read(None), unread)
        else:
            words = either(full, lambda: read(None), lambda: read(self.left))
        return self._split(words, names, groups)

    def announce(self, names):
        """Have the elements of these inputs come to L2, for a map that reads them."""
        for name in names:
            place, size = self.places[name], self.walker.inputs[name].format.size
            for n in self.groups:
                there = is_there(place.left, n, place.address)
                prefetch(place.address + n * size, there, level=2)

    def exponentials(self):
        """Words as those that are there, but the exponentials that the reduction took for x."""
        access, taken, each = self.walker.inputs["x"], self.taken, self.part.group
        groups = [access.format.words(taken[i : i + each]) for i in range(0, len(taken), each)]
        return {**self.words, "x": groups}

    def forget(self, names):
        """Have what follows unpack the halves of these inputs anew; of a row not read they are 0.

        The compiler would keep what was made of them, which fills twice the registers or more: so
        they pass a mask that it does not know.
        """
        keep = where(self.row.classes > 0, constant(self.first, -1, "i4"), 0)
        for name in names:
            access = self.walker.inputs[name]
            words = [w & keep for w in access.flat(self.words[name])]
            self.words[name] = access.grouped(words, len(self.groups))

    def numbers(self):
        """(number behind the first, x, y, w) of each element."""
        return (v for v, n in enumerate(self.groups) for v in self.group(v, n))

    def group(self, v, n):
        """Those of group v, which starts n elements behind the first."""
        inputs = self.walker.inputs
        nothing = [None] * self.part.group
        columns = (
            inputs[name].numbers(self.words[name][v], v) if name in inputs else nothing
            for name in ("x", "y", "w")
        )
        for i, values in enumerate(zip(*columns, strict=True)):
            yield n + i, *values

    def reduce(self, op):
        """What the part comes to: [m, *Share] or [Σ of terms]; every lane has it."""
        lanes, fold = min(self.part.lanes, WARP), self.row.fold
        if not op.softmax:
            return fold(sum_of_terms(op, self.row, self.left, self.numbers()), lanes, sum_of(op))
        x = self.walker.inputs["x"]
        words = x.flat(self.words["x"])

        def folded(v, combine=added):
            return convert(*fold([v], lanes, combine), "f8")

        m = folded(x.largest(words), largest)
        if op.by_pairs:
            share = share_of_halves(
                words,
                x.format.kind,
                m,
                self.part.span >= MANY,
                folded,
                lambda mask, compute: self.walker.folded_unless(mask, compute, folded),
            )
        else:
            share, self.taken = share_of(op, self.row, self.left, self.numbers(), m)
            share = Share(*map(folded, share.known))
        return [m, *share.known]

    def map(self, op, params):
        """Write the result of every element."""
        out, numbers = self.walker.out, self.results(op, params)
        out.store(self.places["out"], self.groups, numbers, self.row.ok, self.row.team)
        self.put_exception(op, params)

    def results(self, op, params):
        """Those of each group, one after the other; but for what `put_exception` writes."""
        found, apart = op.exception(params), self._apart
        if found:
            label, exception = found
            behind = label - narrow(self.first)

        of = op.value_of if self.transformed else op.value

        def value(i, *values):
            v = of(params, *values)
            return v if apart or not found else where(behind == i, exception, v)

        return ([value(*one) for one in self.group(v, n)] for v, n in enumerate(self.groups))

    @property
    def _apart(self):
        """Whether an exception among the results is written once more."""
        return self.part.held > self.walker.out.apart

    def put_exception(self, op, params):
        """Write the exception among the results, where it is not among them."""
        found, out = op.exception(params), self.walker.out
        if found and self._apart:
            label, exception = found
            behind, place = label - narrow(self.first), self.places["out"]
            step = min(self.part.lanes, WARP) * self.part.group
            mine = (behind >= 0) & (behind < self.part.vectors * step)
            mine = self.row.ok & mine & ((behind & (step - 1)) < self.part.group)
            at = place.address + out.distance(convert(behind, "i8"), place.step)
            out.put(at, exception, mine)


class Walk:
    """A warp's way through a row: its only part, one of several, or one in each round.

    Parameters
    ----------
    walker : Rows
    frame : device.Frame
    op : kernels.Operation
    turn : int
        Which it is of those that the warp has one beside the other.
    beside : reduce.Beside, optional
        What it shares with the others, if they are neighbours.
    """

    boards = 0
    """Bytes of shared memory for boards, before the tiles of a block."""

    def __init__(self, walker, frame, op, turn=0, beside=None):
        self.walker, self.frame, self.op, self.turn = walker, frame, op, turn
        self.beside = beside
        self.part, self.way, self.thread = walker.part, walker.way, frame.thread
        count = constant(frame.thread, self.part.parts(1), "i4")
        self.count = narrow(frame.parts) if self.part.chunks else count
        self.board = self.shelf = self.held = None
        self.finishing = None  # the warps that finish a row that is not mapped; None for all
        threads = self.way.warps * WARP if self.way.gathers else BLOCK
        run = run_of(op.added and not self.way.gathers, self.part.lanes)
        short, begin = op.narrow, self.boards
        self.tiles = Tiles(walker.accesses, frame, self.part, threads, run, short, begin)
        self._place_row(frame, op)
        self.row.tiles = self.tiles

    def _place_row(self, frame, op):
        """Which row, which parts, and their board."""
        part, way, thread, p = self.part, self.way, self.thread, frame.block
        lanes = min(part.lanes, WARP)
        bits = lanes.bit_length() - 1
        self.lane, team = thread & (lanes - 1), self._team(bits)
        self.ok, block = constant(p, True, "b1"), constant(p, 0, "i8")
        if part.single:
            p, self.own = self._in_turn(p, BLOCK >> bits, team), narrow(block)
            leader = self.lane == 0
        else:
            blocks = way.cluster
            if way.cluster > 1:
                block, p = convert(cluster_rank(thread), "i8"), p >> (way.cluster.bit_length() - 1)
            elif way.spread:
                blocks = frame.blocks
                if way.meets(width(op)):
                    p = ticket(frame.meetings, thread)
                p, block = divmod_positive(p, blocks, frame.blocks_inverse)
            self.own = narrow(block) * way.warps + team
            leader = (thread == 0) & (block == 0)
            self.step = narrow(constant(p, way.warps, "i8") * blocks)  # to a warp's next part
            self.board = self._board(p, neutral(op))
            self.finishing = self.thread < WARP
        self.row = op.row(frame, p, self.ok, leader, lanes, self._peek)
        self.row.fold = team_fold
        self.row.team = Team(thread & (WARP - 1), lanes, self._room(), way.kept != "registers")

    def _team(self, bits):
        """The number of a thread's row, or part of one, in the block."""
        return self.tiles.row if self.tiles.found else self.thread >> bits

    def _in_turn(self, block, rows, number):
        """The number of a block's row, of which it has so many in each turn."""
        first = (block * self.way.abreast + self.turn) * rows
        p, self.ok = self._known(first + convert(number, "i8"))
        return p

    def _known(self, p, count=1):
        """The number of the first of so many rows, or of the last ones; whether there are those."""
        rows = self.frame.rows
        if self.op.narrow:
            p, rows = narrow(p), narrow(rows)
        return smaller_integer(p, rows - count), p < rows

    def _room(self):
        """The warp's shared memory for what it writes; None if that takes none."""
        out = self.walker.out
        if out is None or not out.room or self.way.stage == "reduce" or self.part.lanes == 1:
            return None
        warps = BLOCK // WARP if self.part.single else self.way.warps
        return shared(self.thread, out.room * warps) + (self.thread >> 5) * out.room

    def _board(self, p, nothing):
        way, address = self.way, dynamic_shared(self.thread)
        if way.meets(len(nothing)):
            self.free = address
            return MeetingBoard.of_row(self.frame, p, nothing, self.count)
        if way.stage != "all" or not nothing:
            return Board.of_row(self.frame, p, nothing, self.count)
        if way.kept in ("shared", "partly"):
            whole = narrow(self.frame.rounds) * way.warps
            parts = narrow(self.frame.shelved) if way.kept == "partly" else whole
            self.shelf = Shelf(self.lane, address, parts, self.walker, self.op.both)
            address = self.shelf.behind
        return SharedBoard(nothing, address, way.cluster)

    def _peek(self, j, read):
        """As `kernels.Row.peek`."""
        if self.way.stage == "map":
            (logit,) = self.board.get(self.count, None, 1)
            return logit
        if self.board is None and not self.part.single:  # only who has class j needs it
            first = convert(self.own, "i8") * self.part.span
            return read((j >= first) & (j < first + self.part.span))
        return read(constant(j, True, "b1"))

    def begin(self):
        """Read, as far as nothing has to be waited for."""
        early = self.op.softmax or self.part.exact
        self.tiles.load()
        if early and self.way.stage == "all" and self.way.kept == "registers":
            self.held = self._place(self.own)
            self.held.load(staged=False)

    def settle(self):
        """What is to be known of the row."""
        self.tiles.put()  # first: who waited for a label before would ask for its tile late
        self.op.look(self.frame, self.row)
        self.op.settle(self.frame, self.row)

    def run(self):
        """Reduce, join, map; as far as this launch does it."""
        op, stage, reduced = self.op, self.way.stage, None
        if op.softmax or op.sums:
            if self.part.single:
                reduced = self._reduced()
            else:
                if stage != "map":
                    self._each(self._reduce, self.board.begin)
                if stage == "reduce":
                    if self.row.x_label is not None:
                        self.board.put(self.count, [self.row.x_label], self.lane, self.row.leader)
                    return
                self.board.end()
        if self.walker.out is not None:
            params = self._finish(reduced)
            self._each(lambda part, i, _: self._map(part, i, params), nothing, back=True)
            self.tiles.store()
        elif self.finishing is None:
            self._finish(reduced)
        else:
            when(self.finishing, lambda: self._finish(reduced) or [], [])

    def _reduced(self):
        """What the row's only part comes to."""
        self.held = self._read(self.own, None)
        return reduced_of(self.op, self.held.reduce(self.op))

    def _finish(self, reduced):
        """What the operation makes of the row, whose parts are joined before."""
        if self.board is not None:
            reduced = join(self.op, self.board, self._over_parts)
        return self.op.finish(self.row, reduced)

    def _each(self, visit, begin, back=False):
        """Visit the parts of this warp, and begin: after the loads, if it has but one part.

        That of the last round, `None`, is the first one on the way back: registers hold it.
        """
        if self.way.kept == "registers":
            visit(self.own, None, begin)
            return
        begin()

        def last():
            visit(self.own + narrow(self.frame.rounds) * self.step, None, nothing)

        def in_round(i):
            if back:  # what was read last, L2 has still
                i = self.frame.rounds - 1 - i
            # Of a part that there is not, nothing is read or written. A branch around shuffles
            # would cost more.
            visit(self.own + narrow(i) * self.step, i, nothing)
            return ()

        if self.shelf and back:
            last()
        repeat(self.frame.rounds, in_round)
        if self.shelf and not back:
            last()

    def _reduce(self, part, i, begin):
        span = self._read(part, i, anew=True)
        if i is None:
            self.held = span
        begin()
        if i is not None:
            span.announce(self._announced)
        if not self._keeps:
            self._keep(i, span.words)
        numbers, there = span.reduce(self.op), self.ok & (part < self.count)
        if self._keeps:
            self._keep(i, span.exponentials())
        self.board.put(part, numbers, self.lane, there)
        self.maximum = numbers[0]

    @property
    def _announced(self):
        """Inputs of a long row that only its map reads, for which it has not the registers."""
        inputs, here = self.walker.inputs, (*self.op.both, "w")
        late = self.shelf and self.way.kept == "shared" and self.walker.out is not None
        names = [n for n in inputs if n not in here and inputs[n].direct] if late else ()
        return [n for n in names if inputs[n].chunk == ACCESS]

    @property
    def _keeps(self):
        """Whether exponentials are on the shelf; not where a map may have to read x again."""
        return self.op.keeps and self.way.kept == "shared"

    def _keep(self, i, words):
        """Put what there is of round i on the shelf, if that has room for it."""
        if self.shelf and i is not None:
            self.shelf.put(self._own_number(i), words)

    def _map(self, part, i, params):
        span, params = self._to_map(part, i, params)
        span.map(self.op, params)

    def _to_map(self, part, i, params):
        """A part's elements, and what its map needs."""
        span, m = self._read(part, i), None
        if names := self._unpacked_anew(i is None and self.held):
            span.forget(names)
        long = self.part.chunks
        if self.op.keeps if long else self.op.relative and self.part.lanes > WARP:
            held = self.held and (i is None or not long)
            m = self.maximum if held else self.board.get(part, part < self.count, 1)[0]
        return span, self.op.in_part(params, m)

    def _unpacked_anew(self, held):
        """Inputs of halves of which the map is not to keep what the reduction has unpacked.

        And that whose exponentials it takes anew, for what is in place of a row that is not read.
        """
        part, inputs, names = self.part, self.walker.inputs, set()
        if held:
            many = part.held * len(inputs) * self.row.beside.count >= UNPACKED
            names = set(inputs if part.crowded else self.op.twice if many else ())
        if self.op.anew:
            names |= {"x"}
        elif self.op.exponential and self.op.softmax and not part.crowded:
            names -= {"x"}  # its exponentials are kept instead
        return [n for n in inputs if n in names and inputs[n].wide and inputs[n].format.size == 2]

    def _read(self, part, i, anew=False):
        """The elements of a part: held ones, those of round i on the shelf, or read now."""
        span = self.held if i is None and self.held else self._place(part)
        if self.shelf and not (i is None or anew):
            n = self._own_number(i)
            span.words, span.transformed = self.shelf.get(n), self._keeps
            if self.way.kept == "partly":
                span.load_where(self.shelf.lacks(n))
        span.load()
        return span

    def _own_number(self, i):
        """That of this warp's part of round i among the parts of the block."""
        return narrow(i) * self.way.warps + (self.thread >> 5)

    def _place(self, part, row=None):
        first = convert(part, "i8") * self.part.span
        first = first + convert(self.lane * self.part.group, "i8")
        return Lane(self.walker, row or self.row, first)

    def _over_parts(self, values, combine, start, takes_long):
        """As `softmax.join` asks: lane l of a warp takes the parts l, l + 32, …."""
        start = [constant(self.own, v, "f8") for v in start]
        lane = self.lane
        if self._joins_once(takes_long):
            values = self._once_a_block(values, start)
        if not self.part.chunks:
            joiners, parts = joiners_of(self.part), self.part.lanes // WARP
            part = lane & (joiners - 1)
            found = values(part, None if parts == joiners else part < parts)
            found = combine(start, found)
        else:
            joiners = WARP

            def add(i, *state):
                part = narrow(i) * WARP + lane
                return tuple(combine(state, values(part, part < self.count)))

            found = repeat(self.frame.joins, add, *start)
        return self.row.fold(list(found), joiners, combine)

    def _joins_once(self, takes_long):
        """Whether what joins a part is taken by a thread for each, for all to read."""
        return self.board.scattered or (takes_long and self.way.kept in ("shared", "ahead"))

    def _once_a_block(self, values, nothing):
        """The same `values`, taken by a thread for each part, for all to read."""
        part, board, count = self.thread, self.board, len(nothing)
        if board.scattered:
            address, each = self.free, 8 * count
            self.free = address + self.count * each
        else:  # they take the place of those they are made of, which no other thread needs
            address, each = board.address + 8 * (board.width - count), 8 * board.width
        there = part < self.count
        for n, v in enumerate(when(there, lambda: values(part, there), nothing)):
            shared_store(address + part * each + 8 * n, v, there)
        barrier(part)

        def taken(part, there):
            at = address + where(there, part, 0) * each
            found = (shared_load(at + 8 * n) for n in range(count))
            return [where(there, v, z) for v, z in zip(found, nothing, strict=True)]

        return taken


def joiners_of(part):
    """Lanes that join the parts of a row that is held: a power of two."""
    return 1 << (part.parts(1) - 1).bit_length()


def nothing():
    """For who is to begin with nothing."""


class Shelf:
    """Places in shared memory for what lanes have read of the parts of a row.

    Parameters
    ----------
    lane, address : Value
        Of the warp; where the places begin.
    parts : Value
        How many there are room for.
    walker : Rows
    both : tuple of str
        Inputs that the reduction and the map need.
    """

    def __init__(self, lane, address, parts, walker, both):
        self.inputs, self.vectors, self.parts = walker.inputs, walker.part.vectors, parts
        self.pieces = shelved(walker.part, walker.inputs, both)
        self.address = address + lane * ACCESS
        self.behind = address + parts * (len(self.pieces) * WARP * ACCESS)

    def _places(self, n):
        at = self.address + n * (len(self.pieces) * WARP * ACCESS)
        return [(at + i * (WARP * ACCESS), *piece) for i, piece in enumerate(self.pieces)]

    def lacks(self, n):
        """Whether there is no room for part n."""
        return n >= self.parts

    def put(self, n, words):
        """Keep the words of part n, if there is room."""
        for place, size, name, at, count in self._places(n):
            flat = self.inputs[name].flat(words[name])
            put_shared_words(place, size, flat[at : at + count], n < self.parts)

    def get(self, n):
        """Have them again; any of a part that there is not."""
        flat = {}
        for place, size, name, _, count in self._places(smaller_integer(n, self.parts - 1)):
            flat.setdefault(name, []).extend(shared_words(place, size, count))
        return {n: self.inputs[n].grouped(words, self.vectors) for n, words in flat.items()}


def shelved(part, inputs, both):
    """A thread's pieces on a Shelf in a round: (bytes of a word, array, first word, count).

    Of the inputs that reduction and map need; for halves that are read one by one, in a map beside
    others, ptxas has no registers: they are kept as well.
    """
    pieces = []
    for name, access in inputs.items():
        if access.wide and (name in both or access.bytes == 2):
            size, total = max(4, access.word), access.count(part.vectors)
            at = 0
            while at < total:
                count = min(ACCESS // size, 1 << ((total - at).bit_length() - 1))
                pieces.append((size, name, at, count))
                at += count
    return pieces
