"""Who takes the parts of the rows, and where a row stays meanwhile: the launches of an operation.

Nothing here changes a result: how a row is divided is settled (`rows.partition`, which asks
whether rows are to be `Machine.realigned`). Rows of one part are several to a block, which may copy
them (`tiles`), the smallest several to a lane; so may be those side by side of which one access
takes several (`abreast`). Those that a block holds in registers are a block each. For longer ones
there are

- a small block each, which goes through it part by part, if it is only reduced; of rows that
  registers would hold a warp each, if there are many: a block has several then, for one warp to
  finish (`gathered`);
- a block each, which keeps what the map needs again: each warp its last part in registers, the
  others in shared memory, or as many of them as there is room for. What there is none for is read
  again, the last parts first: those L2 still has;
- several blocks each, where there are too few rows to fill the machine: a launch that reduces and
  one that joins and maps, the parts' sums waiting in global memory in between;
- a cluster of blocks each, which keep the row as one block would, and tell each other the parts'
  sums (`Machine.cluster`): of many rows of which a multiprocessor could keep but one;
- several blocks each that hold it in registers and meet in global memory (`Machine.together`);
- a block or a cluster that the device has room for has one row after the other, all of each in
  shared memory, the next one on its way while one is mapped (`Machine.ahead`, `ahead`).

Blocks that meet have to be at work at the same time, and in which order blocks start is not known.
So which part of which row a block has, its number does not say, but the ticket that it takes when
it starts: all blocks of all rows but the last one have started then, and come to their meetings.
Those of the last one start when they find room. That takes room for a row's blocks, and where k
calls are at work at once, for k·(blocks − 1) + 1. A row has at most one for each `ROOM`
multiprocessors: 2 calls always find room, 4 to 8 where a multiprocessor holds 2 to 4 blocks.
"""

import math
import os
from typing import NamedTuple

from numbakern.cuda.columns import side_by_side, threads_of
from numbakern.cuda.compile import OWN
from numbakern.cuda.gathered import numbers_of
from numbakern.cuda.memory import ACCESS
from numbakern.cuda.reduce import WARP
from numbakern.cuda.rows import BLOCK, Way

SETTING = "NUMBAKERN_CUDA_PATHS"
PATHS = ("together", "ahead", "realigned", "abreast", "counted")
"""What the Machine's fields of these names say; none is the default before a GPU has shown that it
is right and faster."""
CLUSTER = 8
"""Blocks of a cluster, at most: as many as every device that has clusters can start."""
FEW = 4
"""Warps of a block where several blocks have a row."""
FULL = 1024
"""Threads that keep a multiprocessor busy."""
QUICK = 4
"""How often so many have started and ended in the time of a launch, with about 100 instructions."""
WALKING, KEEPING = 16, (4, 32)
"""Warps of a block that takes long rows part by part, at most; of one that keeps all parts, at
least and at most."""
REDUCING = (3, 4, 5, 6, 8, 11)
"""The same of one that only reduces: a few numbers, for each is another kernel."""
GATHERED_ROWS, GATHERED_THREADS = 4, 256
"""Rows of several parts that a block finishes together, a warp each; threads of one whose rows have
one part."""
BUSILY = 0.85, 0.75
"""Of the warps that find registers, the share that should be busy, and has to be, for a cluster to
be better."""
ENOUGH, ENOUGH_OF_TWO, LEAST_OF_TWO = 20, 0.625, 72
"""Busy warps of a block of two rounds that needs none beside it; where a map reads two arrays, of
the warps that find registers the share that has to be busy, each lane with no fewer registers."""
NONE = math.inf, 0
"""A range of warps in which there are none."""
SIMPLE = 3
"""Numbers that say all of a part of a row of which no sums over targets are taken."""
BUSY = 18
"""Warps of a multiprocessor, of all rows, from which on a warp for each row is enough."""
HELD = 8
"""Warps of a block beside which others find room while it waits for those of its row."""
ROOM = 2
"""Multiprocessors for each block of a row that meets, so that several calls can run at once."""
BESIDE = 3
"""Blocks of a multiprocessor that are to have rows one after the other, each at another step."""
ENGAGED = 10
"""Busy warps of one that is alone from which on more room for next rows is worth more than more."""
TURNING, TURNED = 8, 80
"""Registers of a lane that are for the next rows meanwhile, about; all of them, at least."""
EXACT = 40
"""Registers of a lane more, for rows in turn whose sums are in two parts."""
PARTS = 8
"""Of a device that has clusters, each of which lies within one: no fewer multiprocessors than all
over these are in each."""
BLOCKS, REGISTERS = 32, 1 << 16
"""Of a multiprocessor."""
LANE_REGISTERS = 55
"""Of a lane that only reduces, about; one that reads many halves one by one has more."""
BOARD = 16 << 10
"""Bytes of shared memory for a board in a block beside which others are to find room."""
TINY, SMALL_ROW = 4, 8
"""Elements of a row of which a lane has four, and of which it has two where they are only reduced:
one alone leaves it too little to read."""
ABREAST, ABREAST_BYTES = 4, 256
"""Neighbouring rows of a lane at most, and bytes of them that it has in registers at most; where
much else is known of a row, half as many rows and three quarters of that."""
MANY, MOST_REGISTERS = 64, 128
"""Elements of neighbouring rows in a lane of a large block from which on the compiler is told how
many registers it may take: it would take them all."""
NEIGHBOURS = 8
"""Rows side by side from which on they are taken so: what a sector of float32 holds."""


class Machine(NamedTuple):
    """What the choice depends on beside the rows.

    Attributes
    ----------
    multiprocessors : int
    shared : int
        Bytes of shared memory that a block can have.
    cluster : int
        Blocks of the largest cluster that rows may be taken by; 1 for none.
    together : bool
        Whether blocks without a cluster may meet to have a row together.
    ahead : bool
        Whether blocks that are there all the time may have rows one after the other.
    realigned : bool
        Whether long rows of halves that start anywhere are read by words (`realigned`).
    abreast : bool
        Whether a lane may have several neighbours of rows side by side (`memory.Abreast`).
    counted : bool
        Whether blocks of few rows may count all labels themselves, and a warp that has all rows
        make their loss, instead of a launch for each (`totals.Counted`).
    """

    multiprocessors: int = 132
    shared: int = 227 << 10
    cluster: int = 1
    together: bool = False
    ahead: bool = False
    realigned: bool = False
    abreast: bool = False
    counted: bool = False

    def is_busy(self, warps):
        """Whether there are so many in all that each multiprocessor has BUSY of them."""
        return warps >= BUSY * self.multiprocessors

    def is_quick(self, threads):
        """Whether what each of so many threads does beside its row is done sooner than a launch."""
        return threads <= QUICK * FULL * self.multiprocessors

    def waves(self, blocks, warps, registers):
        """How often all multiprocessors are filled with blocks of so many warps."""
        return _ceil(blocks, _beside(warps, registers) * self.multiprocessors)

    def beside(self, shared):
        """Blocks of so many bytes that a multiprocessor has shared memory for."""
        return min(BLOCKS, max(1, (self.shared + OWN) // (shared + OWN)))

    def resident(self, beside, cluster):
        """Clusters that are there at once, of so many blocks a multiprocessor."""
        if cluster == 1:
            return beside * self.multiprocessors
        return max(1, beside * (self.multiprocessors // PARTS) // cluster * PARTS)


MACHINE = Machine()
"""An H100 and what is chosen if nothing is."""


def chosen():
    """The ways that the environment variable NUMBAKERN_CUDA_PATHS allows beside the default."""
    names = {name.strip() for name in os.environ.get(SETTING, "").split(",")} - {""}
    if names - set(PATHS):
        wrong = ", ".join(sorted(names - set(PATHS)))
        raise ValueError(f"{SETTING}: expected any of {', '.join(PATHS)}, got {wrong}")
    return names


def machine_of(multiprocessors, shared, capability):
    """The Machine that a device is, with what is chosen."""
    names = chosen()
    if capability < (8, 0):
        names -= {"ahead"}
    cluster = CLUSTER if capability >= (9, 0) else 1
    return Machine(multiprocessors, shared, cluster, **dict.fromkeys(names, True))


class Launch(NamedTuple):
    """One launch: the Way, blocks, threads of each, bytes of shared memory.

    `beside`: blocks of a multiprocessor that are to find registers; 0 for as many as do.
    """

    way: Way
    grid: int
    threads: int
    shared: int = 0
    beside: int = 0


def abreast(part, count, size, inputs, labels, maps, machine):
    """Neighbouring rows that a lane had better have, of rows side by side: a power of two.

    As many as there are registers for, while lanes keep the machine busy.

    Parameters
    ----------
    size, inputs : int
        Bytes of the largest array's elements; arrays that are read.
    labels, maps : bool
        Whether rows have labels, of which there is much to know; whether results are elements.
    """
    tiny = part.held <= TINY
    rows = ABREAST // 2 if labels and not tiny else ABREAST
    access = ACCESS if tiny else ACCESS // 2
    room = ABREAST_BYTES // 4 * (3 if labels and maps else 4)
    while rows > 1 and not (
        rows * size <= access
        and rows * part.held * size * max(1, inputs) <= room
        and count * part.lanes >= rows * FULL * machine.multiprocessors
    ):
        rows //= 2
    return rows if part.single else 1


def launches(part, classes, count, numbers, shelf, maps, registers, columns, machine, staged=False):
    """The launches for `count` rows of so many classes, and constants that they need.

    Parameters
    ----------
    part : Partition
    numbers : int
        What each part leaves, in float64 (`softmax.width`); 0 for a map alone.
    shelf : int
        Bytes that a warp needs to keep a part in shared memory; 0 if it cannot.
    maps : int
        Arrays that a map reads; 0 if there is none.
    registers : int
        Of a lane, about.
    columns : int
        Rows of a lane that are read at once, where rows lie side by side and a block has some of
        them, or of their parts; 0 elsewhere.
    machine : Machine
    staged : bool
        Whether a block copies its rows to shared memory: a lane has but one then.
    """
    parts = part.parts(classes)
    if columns:
        groups = _ceil(count, side_by_side(part, columns))
        threads = threads_of(part, columns)
        if part.single:
            return _alone(part, groups, threads, maps, staged, columns)
        return _spread(groups, parts, 1, threads, numbers, maps, machine)
    gathers = numbers and not (maps or part.chunks)
    if part.single:
        # What wants more registers comes late: rows had better not wait for each other.
        if gathers and part.lanes > 1 and registers <= LANE_REGISTERS:
            threads = GATHERED_THREADS if machine.is_busy(count * part.lanes // WARP) else BLOCK
            return _gathered(part, count, threads, numbers)
        return _alone(part, _ceil(count, BLOCK // part.lanes), BLOCK, maps, staged)
    if gathers and machine.is_busy(count):
        return _gathered(part, count, GATHERED_ROWS * WARP, numbers)
    board = 8 * parts * numbers
    if not part.chunks:
        return [Launch(Way(parts), count, parts * WARP, board)], {}
    found = None
    if numbers and maps:
        found = _mapped(parts, count, numbers, shelf, registers, maps, machine)
    elif numbers and count >= 2 * machine.multiprocessors and board <= BOARD:
        warps = _filling(parts, count, registers, machine)
        found = _in_rounds(parts, count, "no", 1, warps, board)
    return found or _spread(count, parts, FEW, FEW * WARP, numbers, maps, machine)


def _alone(part, groups, threads, maps, staged, together=1):
    """`launches` of lanes that have their rows' only parts, so many `together` at least."""
    abreast, beside = max(1, together), 0
    if abreast == 1 and part.exact and not staged:
        abreast = 4 if part.held <= TINY else 2 if part.held <= SMALL_ROW and not maps else 1
    if together > 1 and threads > BLOCK and part.held * together >= MANY:
        beside = REGISTERS // (threads * MOST_REGISTERS)
    launch = Launch(Way(1, abreast=abreast), _ceil(groups, abreast), threads, 0, beside)
    return [launch], {}


def _gathered(part, count, threads, numbers):
    """`launches` of blocks that finish several rows together, of a warp or less each."""
    rows, kept = threads // min(part.lanes, WARP), "registers" if part.single else "no"
    way = Way(threads // WARP, kept=kept, gathers=rows)
    launch = Launch(way, _ceil(count, rows), threads, 8 * rows * numbers_of(part, numbers))
    return [launch], {"rounds": part.parts(1)}


def _mapped(parts, count, numbers, shelf, registers, inputs, machine):
    """`launches` that have a row within one launch; None where that is not the way."""
    board = 8 * parts * numbers
    many = count >= 2 * machine.multiprocessors and board <= BOARD
    if machine.ahead and shelf and many:
        found = _in_turn(parts, count, numbers, shelf, registers, machine)
        if found:
            return found
    shelving, good = None, False
    if shelf and many:
        shelving, good = _shelved(parts, board, numbers, shelf, registers, inputs, machine)
    if good:
        return _in_rounds(parts, count, *shelving)
    blocks = _ceil(parts, HELD)
    room = min(WARP, machine.multiprocessors // ROOM)  # a thread of a block for each part
    if machine.together and blocks <= room:
        warps = _ceil(parts, blocks)
        taken = 8 * WARP * _ceil(parts, WARP) * numbers  # what a thread for each part makes of it
        launch = Launch(Way(warps, spread=True), count * blocks, warps * WARP, taken)
        return [launch], {"blocks": blocks, "blocks_inverse": 1.0 / blocks}
    if shelving:
        return _in_rounds(parts, count, *shelving)
    if not many:
        return None
    warps = _ceil(parts, _ceil(parts, WALKING))
    places = (machine.shared - board) // shelf if shelf else 0
    if places < 1:
        return _in_rounds(parts, count, "no", 1, warps, board)
    size = board + shelf * places
    found, constants = _in_rounds(parts, count, "partly", 1, warps, size, 1)
    return found, constants | {"shelved": places}


class _Turning(NamedTuple):
    """Blocks of a cluster that have rows in turn: their warps, each one's parts and places."""

    cluster: int
    beside: int
    warps: int
    rounds: int
    places: int


def _in_turn(parts, count, numbers, shelf, registers, machine):
    """`launches` of blocks, or clusters, that have rows in turn; None if there is no room for it.

    Of the smallest clusters of which a multiprocessor has blocks beside one another, so that one
    maps while another reduces; else of those with the most room for more of the next rows.
    """
    boards = 2 * 8 * parts * numbers
    registers = max(registers + TURNING, TURNED)
    found: list[_Turning] = []
    cluster = 1
    while cluster <= machine.cluster and not any(one.beside > 1 for one in found):
        found += _turning(parts, cluster, boards, shelf, registers, machine)
        cluster *= 2
    if not found:
        return None
    cluster, beside, warps, rounds, places = max(
        found, key=lambda t: (t.beside > 1, t.places / t.rounds, -t.cluster)
    )
    teams = min(count, machine.resident(beside, cluster))
    way = Way(warps, cluster=cluster, kept="ahead", places=places, spare=places > rounds)
    size = boards + shelf * places * warps
    launch = Launch(way, teams * cluster, warps * WARP, size, beside)
    turns = {"stride": teams, "turns": _ceil(count, teams)}
    return [launch], {"rounds": rounds, "places": places, **turns}


def _turning(parts, cluster, boards, shelf, registers, machine):
    """The best _Turning of clusters of so many blocks, as a list; empty if they are too few.

    A block that is alone and has room for one row only would not load while it reduces.
    """
    found = []
    for one in _found(parts, cluster, boards, shelf, registers, machine, held=0):
        if parts > one.warps * WARP:  # a thread for each
            continue
        rounds = one.places // one.warps
        room = (machine.shared + OWN) // one.beside - OWN - boards
        places = min(2 * rounds, room // (shelf * one.warps))
        busy = min(one.busy, WARP if one.beside > 1 else ENGAGED)
        key = min(one.beside, BESIDE), busy, places / rounds, one.busy
        if one.beside > 1 or places > rounds:
            found.append((key, _Turning(cluster, one.beside, one.warps, rounds, places)))
    return [one for _, one in sorted(found)[-1:]]


def _enough(registers, simple, inputs):
    """Busy warps that need no block beside theirs, a range; none where one array is summed up."""
    if inputs > 1:
        return ENOUGH_OF_TWO * _warps(registers), _warps(LEAST_OF_TWO)
    return (ENOUGH, WARP) if simple else NONE


def _beside(warps, registers):
    """Blocks of so many warps of a multiprocessor that find so many registers for each lane."""
    return REGISTERS // (registers * WARP * warps)


def _warps(registers):
    """Warps of a multiprocessor that find so many registers for each lane; no whole number."""
    return REGISTERS / (registers * WARP)


def _shelved(parts, board, numbers, shelf, registers, inputs, machine):
    """How `_in_rounds` keeps all of a row, None if it can't; whether nothing else is as good.

    By a block, if another finds room beside it, or if it is good alone, which is even better where
    there is nothing else to do (`simple`). Else by the smallest cluster whose blocks are beside
    others and busy; of none that are, by one whose blocks are about to be.
    """
    simple = inputs == 1 and numbers <= SIMPLE
    enough = _enough(registers, simple, inputs)
    alone, clusters, blocks = None, [], 1
    while blocks <= machine.cluster:
        best = enough if simple and blocks == 1 else NONE
        found = _shelving(parts, blocks, board, shelf, registers, best, machine)
        if found:
            kept = "shared", blocks, found.warps, board + shelf * found.places, found.beside
            if blocks > 1:
                clusters += [(found.busy, kept)] * (found.beside > 1)
            elif found.beside > 1 or found.is_enough(*enough):
                return kept, True
            else:
                alone = kept
        blocks *= 2
    for share in BUSILY[not simple :]:
        for busy, kept in clusters:
            if busy >= share * _warps(registers):
                return kept, True
    return alone, False


class _Shelving(NamedTuple):
    """How a block keeps its parts of a row.

    Attributes
    ----------
    warps : int
    places : int
        Parts in shared memory.
    beside : int
        Blocks of a multiprocessor.
    busy : float
        Their warps that have a part, in the mean of all rounds.
    """

    warps: int
    places: int
    beside: int
    busy: float

    def is_enough(self, least, most):
        """Whether so many warps are busy, of at most so many, and ask for all parts at once."""
        few = self.beside * self.warps <= most
        return self.busy >= least and few and self.places == self.warps


def _shelving(parts, blocks, board, shelf, registers, best, machine):
    """The _Shelving of a row's parts in so many blocks; None if they are too many.

    Each warp holds its last part in registers. One with so many busy warps is best. Of two
    blocks beside one another one can load while the other computes; then the busiest is best, of
    the fewest rounds.
    """

    def rank(one):
        return one.is_enough(*best), one.beside > 1, min(one.busy, WARP), one.warps

    found = _found(parts, blocks, board, shelf, registers, machine, held=1)
    return max(found, key=rank, default=None)


def _found(parts, blocks, board, shelf, registers, machine, held):
    """Each _Shelving of a row's parts in so many blocks, `held` of a warp's in registers."""
    for most in range(KEEPING[0], KEEPING[1] + 1):
        rounds = _ceil(parts, most * blocks)
        if rounds <= held:
            break
        if rounds * blocks > WARP:  # a thread for each part is to join them
            continue
        warps = _ceil(parts, rounds * blocks)
        places = (rounds - held) * warps
        size = board + shelf * places
        beside = min(machine.beside(size), _beside(warps, registers))
        if size <= machine.shared and beside:
            yield _Shelving(warps, places, beside, beside * parts / (rounds * blocks))


def _in_rounds(parts, count, kept, blocks, warps, size, beside=0):
    """Blocks of so many warps, which go through a row's parts in as many rounds as it takes.

    The last round is one of its own where parts are kept: it stays in registers.
    """
    way = Way(warps, cluster=blocks, kept=kept)
    launch = Launch(way, count * blocks, warps * WARP, size, beside)
    return [launch], {"rounds": _ceil(parts, warps * blocks) - (kept != "no")}


def _filling(parts, count, registers, machine):
    """Warps of a block for each row, so that all waves of blocks take the fewest rounds."""

    def rounds(warps):
        return machine.waves(count, warps, registers) * _ceil(parts, warps)

    return min(REDUCING, key=rounds)


def _spread(groups, parts, warps, threads, numbers, maps, machine):
    """`launches` of several blocks for each group of rows."""
    most = _ceil(parts, warps)  # blocks
    if not numbers:
        blocks, rounds = most, 1
        found = [Launch(Way(warps, spread=True), groups * blocks, threads)]
    else:
        wanted = _ceil(machine.multiprocessors * FULL, threads * groups)
        rounds = _ceil(most, min(most, wanted))
        blocks = _ceil(most, rounds)
        reduce = Way(warps, "reduce", True, kept="no")
        found = [Launch(reduce, groups * blocks, threads)]
        if maps:
            # Just as many as can be at work at once are to find registers, or some come late.
            full = groups * blocks * threads / (machine.multiprocessors * FULL)
            beside = FULL // threads if 0.5 < full <= 1 else 0
            found.append(Launch(reduce._replace(stage="map"), groups * blocks, threads, 0, beside))
        else:
            found.append(Launch(reduce._replace(stage="map", spread=False), groups, threads))
    return found, {"blocks": blocks, "blocks_inverse": 1.0 / blocks, "rounds": rounds}


def _ceil(a, b):
    return -(-a // b)
