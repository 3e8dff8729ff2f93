"""What a kernel touches, how often its loops run and which warps take a branch.

A kernel is traced, as when it is compiled, for a few of its blocks on a machine that only follows
what addresses, masks and counts depend on. What depends on the arrays' contents stays unknown.
"""

import copy
import functools
from collections import Counter
from typing import Any

import numpy as np

from numbakern.cuda.device import Value
from numbakern.cuda.memory import Format
from numbakern.cuda.plan import SECTOR, kernel_of

WARP = 32
LINE = 128
"""Bytes of a cache line, of which L1 looks up one a cycle."""
POLLS = 2
"""How often a block asks whether those that it waits for have come."""
SAMPLE, ROW = 4, 64
"""Neighbouring blocks that are traced, from the middle of the grid; where no more than so many have
a row, all of it."""
_DTYPE = {"f4": np.float32, "f8": np.float64, "i4": np.int32, "i8": np.int64, "b1": np.bool_}
_BASE_BITS = 44  # arrays lie so far apart that an address tells which one it is in
_BINARY: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "shl": np.left_shift, "ashr": np.right_shift,
}  # fmt: skip
_COMPARE: dict[str, Any] = {
    "<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal, "==": np.equal,
    "!=": np.not_equal,
}  # fmt: skip


class Scope:
    """A kernel, a loop or a branch, as it was traced.

    Of an "either" the parts are its two sides, the one for odd rows behind the other; what they
    touch belongs to what is around.

    Attributes
    ----------
    kind : {"kernel", "loop", "branch", "either"}
    weight : float
        Rounds of a loop, share of the warps that take a branch, or the odd side of an either.
    blocks : float
        Share of the blocks with a warp that takes a branch; else the weight.
    fixed : bool
        Whether a loop's rounds are a constant of the kernel, so that it may be unrolled.
    parts : list of Scope
        Loops and branches in it, in the order they were traced in.
    read, written : dict of str to float
        Bytes of whole sectors of each array that a block touches in one round, parts left out.
    looked_up : dict of str to float
        Cycles that its accesses of each array take to find their lines in L1.
    again : {"", "l1", "l2"}
        What holds all that it reads: L1 if it was read around a branch, L2 if in a loop before.
    """

    def __init__(self, kind, weight=1.0, fixed=False, blocks=None):
        self.kind, self.weight, self.fixed = kind, weight, fixed
        self.blocks = weight if blocks is None else blocks
        self.parts: list[Scope] = []
        self.read: dict[str, float] = {}
        self.written: dict[str, float] = {}
        self.looked_up: dict[str, float] = {}
        self.again = ""

    def times(self, share):
        """The same that runs that share as often."""
        made = copy.copy(self)
        made.weight, made.blocks = self.weight * share, self.blocks * share
        return made

    def total(self, what):
        """What there is of each array over all rounds, parts included."""
        sums: Counter[str] = Counter(getattr(self, what))
        for part in self.parts:
            sums.update(part.total(what))
        rounds = self.weight if self.kind == "loop" else 1.0
        return {name: rounds * n for name, n in sums.items()}


class _Unknown:
    """A number that depends on the arrays' contents, and on these others."""

    __slots__ = ("needs", "live")

    def __init__(self, *values):
        self.needs = [v for v in values if isinstance(v, _Unknown)]
        self.live = False

    def keep(self):
        """Mark it and all that it depends on as what something comes of."""
        waiting = [self]
        while waiting:
            one = waiting.pop()
            if not one.live:
                one.live = True
                waiting += one.needs


def _is_unknown(*values):
    return any(isinstance(v, _Unknown) for v in values)


class _Raw:
    """A Scope while it is traced: its accesses, and the parts, several rounds of a loop each."""

    def __init__(self, kind, weight=1.0, fixed=False, blocks=None):
        self.kind, self.weight, self.fixed, self.blocks = kind, weight, fixed, blocks
        # (read or written, array or None, sectors, what was loaded, cycles of looking up)
        self.accesses = []
        # _Raw of a branch or an either, or [(_Raw, rounds it stands for), …] of a loop
        self.parts = []
        self.made = []  # what comes of it

    @property
    def live(self):
        """Whether the compiler leaves any of it."""
        rounds = [[(part, 1)] if isinstance(part, _Raw) else part for part in self.parts]
        reads = (of.live for what, _, _, of, _ in self.accesses if what != "written")
        writes = any(what == "written" for what, *_ in self.accesses)
        made = (value.live for value in self.made)
        return writes or any(reads) or any(made) or any(raw.live for p in rounds for raw, _ in p)

    def taken(self):
        """Which share of the warps takes each branch in it."""
        parts = [part if isinstance(part, _Raw) else part[0][0] for part in self.parts]
        return self.weight, [part.taken() for part in parts]

    def touched(self, what, name):
        """The sectors of an array, those of loads that nothing comes of left out."""
        found = [
            sectors
            for which, array, sectors, of, _ in self.accesses
            if which == what and array == name and (of is None or of.live)
        ]
        return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)

    def settled(self, blocks, around=None):
        """The Scope, from accesses of `blocks` blocks; a branch in the code `around` it."""
        scope, near = Scope(self.kind, self.weight, self.fixed, self.blocks), []
        for _, name, _, of, cycles in self.accesses:
            if name and (of is None or of.live):
                scope.looked_up[name] = scope.looked_up.get(name, 0.0) + cycles / blocks
        for what, name in {(what, name) for what, name, *_ in self.accesses if name}:
            sectors = self.touched(what, name)
            if around is not None and sectors.size:
                there = np.isin(sectors, around.touched(what, name))
                sectors = sectors[~there]
                if what == "read":
                    near.append(np.mean(there))
            getattr(scope, what)[name] = SECTOR * len(sectors) / blocks
        if near and min(near) >= 0.5:
            scope.again = "l1"
        for part in self.parts:
            if isinstance(part, _Raw):
                if part.live or part.kind in ("either", "side"):
                    scope.parts.append(part.settled(blocks, self))
            else:
                scope.parts.append(_merged([(r.settled(blocks), n) for r, n in part]))
        return scope


def _merged(rounds):
    """One loop from (Scope, rounds it stands for) of some of its rounds, their mean."""
    scopes = [scope for scope, _ in rounds]
    total = sum(n for _, n in rounds)
    loop = Scope("loop", total, scopes[0].fixed)
    if len({len(scope.parts) for scope in scopes}) > 1:
        raise ValueError("the rounds of a loop differ in their branches")
    shares = [n / total if total else 0.0 for _, n in rounds]
    _add(loop, scopes, shares)
    return loop


def _add(to, scopes, shares):
    """Put the mean of Scopes, weighed with these shares, into another one."""
    for what in ("read", "written", "looked_up"):
        mean: Counter[str] = Counter()
        for scope, share in zip(scopes, shares, strict=True):
            mean.update({name: n * share for name, n in getattr(scope, what).items()})
        setattr(to, what, dict(mean))
    to.again = max(scope.again for scope in scopes)
    for same in zip(*(scope.parts for scope in scopes), strict=True):
        weight = sum(part.weight * share for part, share in zip(same, shares, strict=True))
        blocks = sum(part.blocks * share for part, share in zip(same, shares, strict=True))
        part = Scope(same[0].kind, weight, same[0].fixed, blocks)
        _add(part, same, shares)
        to.parts.append(part)


class _Tracer:
    """The machine that follows what addresses, masks and counts depend on."""

    def __init__(self, names, blocks, threads, cluster):
        self.names, self.threads, self.cluster = names, threads, cluster
        self.blocks = np.asarray(blocks, np.int64)[:, None]
        self.shape = (len(blocks), threads)
        self.scope = _Raw("kernel")
        self.active: Any = np.True_
        self.told: dict[Any, Any] = {}  # what all threads find at a place of shared memory

    # -- numbers

    def constant(self, number, elem):
        return _DTYPE[elem](number)

    def anything(self, _elem):
        return _Unknown()

    def binary(self, name, a, b, elem):
        if not _is_unknown(a, b):
            if name == "lshr":
                bits = np.asarray(a).view(f"u{np.asarray(a).itemsize}")
                return (bits >> np.asarray(b).astype(bits.dtype)).view(np.asarray(a).dtype)
            return _BINARY[name](a, b)
        if elem == "b1" and name in ("and", "or") and not (_is_unknown(a) and _is_unknown(b)):
            known = b if _is_unknown(a) else a
            if np.all(known == (name == "or")):  # what one side decides alone
                return known
        return _Unknown(a, b)

    def compare(self, sign, a, b, _elem):
        return _Unknown(a, b) if _is_unknown(a, b) else _COMPARE[sign](a, b)

    def wide_product(self, i, step):
        return _Unknown(i) if _is_unknown(i, step) else np.asarray(i).astype(np.int64) * step

    def within(self, t, count):
        return _Unknown(t) if _is_unknown(t, count) else (t >= 0) & (t < count)

    def select(self, mask, a, b, _elem):
        return _Unknown(mask, a, b) if _is_unknown(mask, a, b) else np.where(mask, a, b)

    def convert(self, v, _elem, to):
        return _Unknown(v) if _is_unknown(v) else np.asarray(v).astype(_DTYPE[to])

    def bitcast(self, v, _elem, to):
        return _Unknown(v) if _is_unknown(v) else np.asarray(v).view(_DTYPE[to])

    def _unknown(self, *values):
        return _Unknown(*values)

    fma = maximum = at_least = join = half_to_single = pack_halves = pair = _unknown
    one_below = exp2 = reciprocal = larger_halves = equal_halves = _unknown
    shuffle_xor = funnel = ballot = ones = dynamic_shared = _unknown

    def split(self, bits):
        return _Unknown(bits), _Unknown(bits)

    # -- threads

    def thread(self):
        return np.arange(self.threads, dtype=np.int32)[None, :]

    def block(self):
        return self.blocks

    def barrier(self):
        """Touches nothing."""

    warp_barrier = cluster_barrier = cluster_start = barrier

    def cluster_rank(self):
        return (self.blocks % self.cluster).astype(np.int32)

    def first_lane(self, v):
        if _is_unknown(v):
            return _Unknown(v)
        warps = np.broadcast_to(v, self.shape).reshape(len(self.blocks), -1, WARP)
        return np.repeat(warps[:, :, 0], WARP, axis=1)

    def _inside(self, raw, body):
        outside, self.scope = self.scope, raw
        result = body()
        self.scope = outside
        return result

    def repeat(self, count, body, state):
        """Trace the first two rounds, the last two, and as many as it takes in between.

        That is none where the same branches are taken after the first as before the last round;
        otherwise the round is looked for from which on it is others.
        """
        known = not _is_unknown(count.value)
        fixed = known and np.ndim(count.value) == 0
        rounds = int(np.max(count.value)) if known else 1
        traced = {}

        def trace(i):
            nonlocal state
            raw = traced[i] = _Raw("loop", fixed=fixed)
            state = self._inside(raw, lambda: tuple(body(Value(self, np.int64(i), "i8"), *state)))

        def look_between(low, high):
            if high - low > 1 and traced[low].taken() != traced[high].taken():
                middle = (low + high) // 2
                trace(middle)
                look_between(low, middle)
                look_between(middle, high)

        for i in sorted({0, 1, rounds - 2, rounds - 1} & set(range(max(1, rounds)))):
            trace(i)
        if rounds > 2:
            look_between(1, rounds - 2)
        places = sorted(traced)
        # Each stands for those up to the next one.
        times = np.diff([*places, max(1, rounds)]) if rounds > 0 else [0]
        self.scope.parts.append([(traced[i], int(n)) for i, n in zip(places, times, strict=True)])
        return state

    def when(self, mask, compute, otherwise):
        before = self.active
        self.active = self.binary("and", before, mask.value, "b1")
        raw = _Raw("branch", self._taken(WARP), blocks=self._taken(self.threads))
        self.scope.parts.append(raw)
        computed = self._inside(raw, compute)
        self.active = before
        pairs = zip(computed, otherwise, strict=True)
        raw.made = [_Unknown(mask.value, v.value, o.value) for v, o in pairs]
        return [o.like(made) for o, made in zip(otherwise, raw.made, strict=True)]

    def either(self, mask, compute, seldom):
        before, either, sides = self.active, _Raw("either"), []
        otherwise = self.binary("xor", mask.value, np.True_, "b1")
        for value, unknown, side in ((mask.value, 1.0, compute), (otherwise, 0.0, seldom)):
            self.active = self.binary("and", before, value, "b1")
            raw = _Raw("side", unknown if _is_unknown(self.active) else self._taken(WARP))
            sides.append(self._inside(raw, side))
            self.scope.accesses += raw.accesses
            raw.accesses = []
            either.parts.append(raw)
        self.active = before
        self.scope.parts.append(either)
        return [v.like(_Unknown(mask.value, v.value, o.value)) for v, o in zip(*sides, strict=True)]

    def _taken(self, threads):
        """Of so many threads each, the share that have one in the branch; all if unknown."""
        if _is_unknown(self.active):
            return 1.0
        groups = np.broadcast_to(self.active, self.shape).reshape(-1, threads)
        return float(np.mean(np.any(groups, axis=1)))

    # -- memory

    def _touch(self, what, address, width, mask, of):
        """Note the sectors of an access; gives the name of the array."""
        name, sectors, cycles = None, np.empty(0, np.int64), 0
        if not _is_unknown(address):
            name = self.names[int(np.max(address)) >> _BASE_BITS]
            mask = self.active if mask is None else self.binary("and", self.active, mask, "b1")
            mask = np.True_ if _is_unknown(mask) else mask
            place = np.arange(len(self.blocks), dtype=np.int64)[:, None]
            mask, address, place = (np.broadcast_to(v, self.shape) for v in (mask, address, place))
            cycles = _lookups(np.where(mask, address // LINE, -1).reshape(-1, WARP))
            address, place = address[mask], place[mask]
            ends = [address] if width == 1 else [address, address + (width - 1)]
            # A number for each sector and block, so that the traced blocks are told apart.
            sectors = np.concatenate([e // SECTOR * len(self.blocks) + place for e in ends])
        self.scope.accesses.append((what, name, sectors, of, cycles))
        return name

    def load(self, address, size, count, mask, _fill):
        of = _Unknown(address, mask)
        name = self._touch("read", address, size * count, mask, of)
        if name == "labels":  # every label is class 0: one that counts
            of.keep()
            return (_DTYPE["i8" if size == 8 else "i4"](0),) * count
        return tuple(_Unknown(of) for _ in range(count))

    def prefetch(self, address, mask, level):
        self._touch("read", address, 1, mask, None)

    def copy_to_shared(self, place, address, mask):
        of = _Unknown(place, address, mask)
        of.keep()
        self._touch("read", address, 16, mask, of)

    def commit_copies(self):
        """Touches nothing."""

    def await_copies(self, _groups):
        """Touches nothing."""

    def store(self, address, size, words, mask):
        _Unknown(address, mask, *words).keep()
        self._touch("written", address, size * len(words), mask, None)

    def shared(self, _size):
        return _Unknown()

    def shared_load(self, address, _size, count, _mask, _fill):
        return self.told.get(address) or [_Unknown(address) for _ in range(count)]

    def shared_store(self, address, _size, words, mask=None, peer=None):
        _Unknown(address, mask, peer, *words).keep()
        if not _is_unknown(*words) and all(np.size(w) <= len(self.blocks) for w in words):
            self.told[address] = words

    def atomic_add(self, address, mask):
        """A ticket: blocks take them in their order."""
        self._touch("written", address, 4, mask, None)
        return self.blocks.astype(np.int32)

    def arrive(self, address, _count, mask):
        self._touch("written", address, 4, mask, None)
        asked = _Raw("loop")
        self._inside(asked, lambda: self._touch("read", address, 4, mask, None))
        self.scope.parts.append([(asked, POLLS)])

    def atomic_min(self, address, v, mask):
        """Rare, a label that is no class: its bytes are not counted."""
        _Unknown(address, v, mask).keep()
        self.scope.accesses.append(("written", None, np.empty(0, np.int64), None, 0))


def _lookups(lines):
    """Lines of some warps' accesses, which L1 looks up; −1 for a thread that has none."""
    lines = np.sort(lines, axis=1)
    return np.count_nonzero(np.diff(lines, axis=1, prepend=-1))


@functools.lru_cache(maxsize=1024)
def _traced(step, constants, shifts):
    kernel = kernel_of(step.spec)
    known, values = dict(constants), []
    row = known["blocks"] if "blocks" in kernel.args else 1
    row = row if row <= ROW else 1
    count = max(SAMPLE, row)
    first = max(0, min(step.grid // 2 // row * row, step.grid - count))
    blocks = range(first, min(step.grid, first + count))
    tracer = _Tracer(list(kernel.args), blocks, step.block, step.cluster)
    numbers = {"ignore_index": -100, "scale": 1.0, "keep": 1.0, "spread": 0.0}
    shift = dict(shifts)
    for n, (name, elem) in enumerate(kernel.args.items()):
        value = known.get(name, numbers.get(name))
        values.append(
            _DTYPE[elem](((n << _BASE_BITS) + shift.get(name, 0)) if value is None else value)
        )
    with np.errstate(all="ignore"):
        kernel.run(tracer, values)
    scope = tracer.scope.settled(len(tracer.blocks))
    _mark_again(scope)
    return scope


def footprint(step, plan, layouts):
    """The Scope of a step's kernel.

    Parameters
    ----------
    step : Step
    plan : Plan
        That the step is of.
    layouts : dict of str to Layout
        The call's arrays: one that is not aligned is taken to start one element further.
    """
    shifts = tuple((n, Format(a.kind, "f4").size) for n, a in layouts.items() if not a.aligned)
    return _traced(step, tuple(plan.constants.items()), shifts)


def _mark_again(kernel):
    """Mark the loops that read what a loop before them has read, or what the launch writes.

    Of a loop over rows, those in it.
    """
    seen = set(kernel.written)
    for part in kernel.parts:
        if part.kind == "loop" and any(inside.kind == "loop" for inside in part.parts):
            _mark_again(part)
        elif part.kind == "loop":
            names = {n for n, size in part.total("read").items() if size}
            part.again = "l2" if names and names <= seen else ""
            seen |= names
