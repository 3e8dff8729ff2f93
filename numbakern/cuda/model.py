"""How long a call should take on a GPU, predicted from its kernels' machine code.

`docs/cuda-performance.md` says how the model works, what it assumes, what it predicts, and how far
off that is on the one GPU that it was compared with, an H200; ``python -m numbakern.cuda model``
prints it.

A call is its plan's launches, one after the other. Of each launch two things are known: its
`footprint` (bytes, rounds of loops, warps that take a branch), and its machine code, which tells
what a warp issues to which pipe, and, by the stalls and scoreboards in the instructions'
encodings, how long a warp takes that is alone. The time is more than the largest of the bounds that
follow (`together`), wave by wave.
"""

import functools
import itertools
import math
import re
from collections import Counter
from typing import Any, NamedTuple

from numbakern.cuda import codegen
from numbakern.cuda import compile as compiler
from numbakern.cuda.footprint import WARP, footprint
from numbakern.cuda.plan import Plan, Step
from numbakern.cuda.ways import Machine, machine_of

SCHEDULERS = 4
"""Of a multiprocessor."""


class Gpu(NamedTuple):
    """What the model knows of a GPU.

    Attributes
    ----------
    name, arch : str
    multiprocessors : int
    clock : float
        Of the multiprocessors under load, Hz.
    copy, read : float
        Bytes a second of DRAM that a copy moves, reads and writes together, and that a kernel
        which only reads does.
    l2 : int
        Bytes of L2.
    l2_rate : float
        Bytes a second between L2 and all multiprocessors.
    latency, l2_latency : float
        Seconds from a load to its data under load: from DRAM, from L2.
    shared : int
        Bytes of a multiprocessor that shared memory can have at most, and L1 has `L1` beside it.
    cycles : dict of str to float
        Cycles that a warp's instruction keeps a scheduler's pipe busy.
    same : dict of str to str
        Pipes that are another one.
    threads, blocks : int
        That a multiprocessor has room for.
    launch : float
        Seconds between one kernel's end and the next one's first instruction.
    """

    name: str
    arch: str
    multiprocessors: int
    clock: float
    copy: float
    read: float
    l2: int
    l2_rate: float
    latency: float
    l2_latency: float
    shared: int
    cycles: dict[str, float]
    same: dict[str, str]
    threads: int = compiler.THREADS
    blocks: int = 32
    launch: float = 2e-6


FABRIC = 64
"""Bytes a cycle that L2 delivers to one multiprocessor (NVIDIA's A100 whitepaper)."""
OVERLAP = 4.0
"""Bounds come to the norm of this order: what two that are near each other take on an H200."""
IN_STEP = 2.0
"""How often the latency counts of blocks that wait for the others of their cluster; likewise."""
L1 = 28 << 10
"""Bytes that L1 has left at least. Shared memory takes its own in steps, one of `SHARES` KB."""
SHARES = 0, 8, 16, 32, 64, 100, 132, 164, 196, 228

# 32 lanes of a warp over the results of a scheduler a cycle, a quarter of what the table of
# arithmetic throughput in NVIDIA's CUDA programming guide gives for a multiprocessor: 64 results
# for integers, comparisons, logic and packing, 16 for conversions from and to 64 bits and the
# special functions, 32 for shuffles; float32 64 on 8.0 and 128 on 9.0 and 10.0, float64 32 and 64.
_CYCLES = {"int": 2.0, "mad": 2.0, "convert": 8.0, "special": 8.0, "pack": 2.0, "half": 1.0}
_CYCLES |= {"memory": 4.0, "uniform": 2.0, "branch": 2.0}
_AMPERE = {**_CYCLES, "fp32": 2.0, "fp64": 4.0}, {"mad": "fp32"}
_HOPPER: tuple[dict[str, float], dict[str, str]] = {**_CYCLES, "fp32": 1.0, "fp64": 2.0}, {}
_KB, _MB = 1 << 10, 1 << 20

# Multiprocessors, L2, shared memory: NVIDIA's whitepapers of A100, H100 and Blackwell and its CUDA
# programming guide; of the B200 as its driver tells them (pytorch/ao, pull request 4002).
# Clock: the peak dense tensor rate of the data sheets over what a multiprocessor does in a cycle.
# DRAM: an H100 copies 3.00 to 3.03 TB/s of its 3.35 and reads 3.18 (QuACK's benchmarks); an A100 of
# 40 GB copies 1355 of its 1555 GB/s (PTsolvers' workshop at JuliaCon 2023), and 80 GB have 2039.
# Of a B200 (7.67) the H100's shares of the peak are assumed. An H200's copy and read rates and its
# clock were measured (ncu, clocks as they are); its L2 is what its driver tells.
# L2: 60 % of 5120 bytes a cycle and die, about what Chips and Cheese measured on an H100.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", "sm_80", 108, 1.41e9, 1.77e12, 1.86e12, 40 * _MB, 4.3e12, 8e-7, 3e-7,
            164 * _KB, *_AMPERE),
        Gpu("H100", "sm_90a", 132, 1.83e9, 3.02e12, 3.18e12, 50 * _MB, 5.6e12, 8e-7, 3e-7,
            228 * _KB, *_HOPPER),
        Gpu("H200", "sm_90a", 132, 1.94e9, 4.22e12, 4.4e12, 60 * _MB, 5.6e12, 8e-7, 3e-7,
            228 * _KB, *_HOPPER),
        Gpu("B200", "sm_100a", 148, 1.85e9, 6.9e12, 7.3e12, 126 * _MB, 1.13e13, 8e-7, 3e-7,
            228 * _KB, *_HOPPER),
    )
}  # fmt: skip


# ---------------------------------------------------------------- machine code: pipes, a warp alone

_PIPES = {
    "fp32": "FADD FMUL FFMA",
    "half": "HADD2 HMUL2 HFMA2 HFMA2.MMA",
    "fp64": "DADD DMUL DFMA DSETP DMNMX",
    "mad": "IMAD IDP VIADD",
    "convert": "F2F I2F F2I FRND",
    "pack": "F2FP I2FP F2IP",
    "special": "MUFU POPC FLO BREV",
    "memory": "LDG STG LDS STS LD ST LDL STL LDGSTS LDGDEPBAR SHFL ATOMG ATOMS ATOM RED LDC LDSM"
    " CCTL MEMBAR ERRBAR UBLKCP SYNCS UCGABAR_ARV UCGABAR_WAIT",
    "branch": "BRA BRX BSSY BSYNC EXIT WARPSYNC BAR CALL RET NANOSLEEP BMOV YIELD DEPBAR",
}
_PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names.split()}

# Cycles until a result is there, for what a scoreboard waits for (what is of fixed latency is in
# the stalls): shared memory 29 and a load that hits L2 about 260 (Luo et al., "Benchmarking and
# dissecting the NVIDIA Hopper GPU architecture via microbenchmarking", 2024), the rest about as in
# Abdelkhalik et al., "Demystifying the NVIDIA Ampere architecture through microbenchmarking and
# instruction-level analysis", 2022.
_RESULT = {"memory": 29, "convert": 24, "special": 24, "fp64": 10, "int": 20, "uniform": 20}
_L1 = 40  # cycles of a load that hits L1, from the first of these as well
_LATER = re.compile(r"SB(\d), (0x[0-9a-f]+)")  # the groups of copies that need not be there yet
_BARRIER = 30  # cycles from the last warp's arrival


def pipe_of(instruction):
    """The pipe that an instruction goes to."""
    name = instruction.name
    if name.startswith("U") and name not in _PIPE_OF:
        return "uniform"
    return _PIPE_OF.get(name, "int")


def transfers(instruction):
    """How many times an access keeps the memory pipe busy: once for each 128 bytes of a warp."""
    return 4 if ".128" in instruction.opcode else 2 if ".64" in instruction.opcode else 1


def cycles_of(instruction, gpu):
    """(pipe, cycles) that an instruction of a warp keeps its scheduler's pipe busy."""
    pipe = pipe_of(instruction)
    times = transfers(instruction) if pipe == "memory" and instruction.name != "LDC" else 1
    return gpu.same.get(pipe, pipe), gpu.cycles[pipe] * times


class Part(NamedTuple):
    """A run of instructions, or a Span, with how often a warp takes it.

    Attributes
    ----------
    kind : {"kernel", "loop", "branch"}
    weight : float
    again : {"", "l1", "l2"}
        As in Scope.
    items : tuple of Instruction and Part
    blocks : float or None
        Of a branch the share of blocks with a warp that takes it, if not the weight.
    """

    kind: str
    weight: float
    again: str
    items: tuple[Any, ...]
    blocks: float | None = None


def weighed(program, scope):
    """The Program with the weights of what was traced, as a Part.

    Loops and branches come in the order they were traced in. A loop of a constant number of rounds
    may have been unrolled: it is left out where there are too few loops in the code. A branch may
    have become predicates, or an early exit.
    """
    return _weigh(program.instructions, program.spans, scope, "kernel", 1.0, "")


def _weigh(instructions, spans, scope, kind, weight, again):
    loops = _pair_loops(
        instructions, [s for s in spans if s.kind == "loop"], _of_kind(scope, "loop")
    )
    eithers = _eithers(instructions, spans, _of_kind(scope, "either"))
    branches = [s for s in spans if s.kind == "branch" and s not in eithers]
    taken = _pair_branches(instructions, branches, _of_kind(scope, "branch")) | eithers
    items: list[Any] = []
    rest = list(instructions)
    for span in spans:
        items += itertools.takewhile(lambda i, span=span: i.address < span.first, rest)
        inside = [i for i in rest if span.first <= i.address <= span.last]
        rest = [i for i in rest if i.address > span.last]
        if span.kind == "loop":
            of, rounds = loops[span]
            part = _weigh(inside, span.parts, of, "loop", rounds, again or of.again)
        else:
            share, near, of = taken[span]
            part = _weigh(inside, span.parts, of, "branch", share, near or again)
            part = part._replace(blocks=of and of.blocks)
        items.append(part)
    return Part(kind, weight, again, tuple(items + rest))


def _of_kind(scope, kind):
    """The parts of a Scope that are of this kind.

    A branch around a loop is none: the jump over the loop asks as well whether it runs at all.
    """
    found: list[Any] = []
    for part in () if scope is None else scope.parts:
        if part.kind == "branch" and any(p.kind == "loop" for p in part.parts):
            found += [p.times(part.weight) for p in _of_kind(part, kind)]
        elif part.kind == kind:
            found.append(part)
    return found


def _pair_loops(instructions, spans, scopes):
    """{Span: (Scope, rounds)} of the loops at one level."""
    message = f"{len(scopes)} loops were traced, the machine code has {len(spans)}"
    scopes, groups = list(scopes), [[s] for s in spans]
    while len(scopes) > len(groups):
        unrolled = [s for s in scopes if s.fixed or s.weight <= 1]
        if not unrolled:
            raise ValueError(message)
        scopes.remove(min(unrolled, key=lambda s: s.weight))
    while len(groups) > len(scopes):
        # A loop that takes several rounds at once, and others behind it for those that remain.
        pairs = enumerate(itertools.pairwise(groups))
        at = next((i for i, (g, h) in pairs if _factor(instructions, g[-1], h[0])), None)
        if at is None:
            raise ValueError(message)
        groups[at : at + 2] = [groups[at] + groups[at + 1]]
    rounds = {}
    for group, scope in zip(groups, scopes, strict=True):
        rest = scope.weight
        for span in group[:-1]:
            each = _factor(instructions, span, group[-1])
            rounds[span] = scope, rest // each
            rest %= each
        rounds[group[-1]] = scope, rest
    return rounds


def _factor(instructions, several, one):
    """How many rounds of the loop `one` a round of `several` takes, by its accesses; 0 for none."""
    first, second = (
        Counter(
            i.opcode
            for i in instructions
            if span.first <= i.address <= span.last and pipe_of(i) == "memory"
        )
        for span in (several, one)
    )
    factor = sum(first.values()) // max(1, sum(second.values()))
    same = first == Counter({opcode: factor * n for opcode, n in second.items()})
    return factor if same and factor >= 2 else 0


_SHORT = 6
"""Instructions of a branch that the compiler made of a mask, which is counted as always taken."""


_ODD = 100
"""Instructions beyond which a branch may be all that is left of an `either`."""


def _pair_branches(instructions, spans, scopes):
    """{Span: (share of the warps that take it, what holds its loads, Scope)} at one level."""
    pairs = dict.fromkeys(spans, (1.0, "", None))
    long = [s for s in spans if _length(instructions, s) > _SHORT]
    taken = [(s.weight, s.again, s) for s in scopes]
    while len(taken) > len(long):
        # What is nearly always taken became the straight way, or masks.
        taken.remove(max(taken, key=lambda t: t[:2]))
    if len(taken) != len(long):
        mean = sum(s.weight for s in scopes) / len(scopes) if scopes else 1.0
        taken = [(mean, "l1" if any(s.again for s in scopes) else "", None)] * len(long)
    return pairs | dict(zip(long, taken, strict=True))


def _eithers(instructions, spans, scopes):
    """As `_pair_branches`, of the sides of each `device.either`: the odd one is the longer.

    Or the only one, where the other computes nothing.
    """
    found: list[tuple[codegen.Span, ...]] = []
    for first, second in itertools.pairwise(spans):
        between = [i for i in instructions if first.last < i.address < second.first]
        branches = first.kind == second.kind == "branch"
        if branches and not between and not (found and first is found[-1][1]):
            found.append((first, second))
    paired = set(itertools.chain(*found))
    # Short ones more than were traced are the compiler's.
    single = [s for s in spans if s.kind == "branch" and s not in paired]
    found += [(s,) for s in single if _length(instructions, s) > _ODD]
    found.sort(key=lambda sides: -sum(_length(instructions, span) for span in sides))
    found = sorted(found[: len(scopes)], key=lambda sides: sides[0].first)
    known = {}
    for sides, scope in zip(found, scopes, strict=False):
        odd = max(sides, key=lambda s: _length(instructions, s))
        often, seldom = scope.parts
        for side in sides:
            of = seldom if side is odd else often
            known[side] = of.weight, "", of
    return known


def _length(instructions, span):
    return sum(span.first <= i.address <= span.last for i in instructions)


def busy(part, gpu):
    """Cycles of a scheduler for one warp: those of each pipe, and "issue", one an instruction."""
    total: Counter[str] = Counter()
    for item in part.items:
        if isinstance(item, Part):
            total.update(busy(item, gpu))
        else:
            pipe, cycles = cycles_of(item, gpu)
            total.update({pipe: cycles, "issue": 1})
    return {pipe: part.weight * cycles for pipe, cycles in total.items()}


class Alone(NamedTuple):
    """The warp of a block that takes most branches, with a scheduler for itself.

    Attributes
    ----------
    cycles : float
        From its first instruction to its last.
    in_flight, copied : int
        Bytes of global memory that it has asked for and not got yet, at most: for registers, by way
        of L1, and for shared memory.
    """

    cycles: float
    in_flight: int
    copied: int = 0


def alone(part, gpu):
    """The Alone of a kernel: its instructions one after the other, as the encodings time them."""
    warp = _Warp(gpu)
    warp.run(part, 1.0)
    return Alone(warp.now, warp.most["LDG"], warp.most["LDGSTS"])


class _Warp:
    """The clock of a warp, its scoreboards, and what it waits for from global memory."""

    def __init__(self, gpu):
        self.gpu, self.now, self.most = gpu, 0.0, {"LDG": 0, "LDGSTS": 0}
        self.boards = [0.0] * 6
        self.loads: list[tuple[float, int, str]] = []
        self.copies = 0.0  # when the last copy to shared memory is there that is asked for
        self.groups: list[list[float]] = [[] for _ in self.boards]  # and each group of them

    def run(self, part, weight):
        """Run a Part `weight` times; from the second round on a round takes as long as that."""
        if weight <= 0:
            return
        before = self.now
        self._once(part)
        if part.kind != "loop":
            self.now = before + weight * (self.now - before)
        elif weight > 1:
            between = self.now
            self._once(part)
            self.now = between + (weight - 1) * (self.now - between)

    def _once(self, part):
        for item in part.items:
            if isinstance(item, Part):
                self.run(item, item.weight if item.blocks is None else item.blocks)
            else:
                self._issue(item, part.again)

    def _issue(self, one, again):
        for board in range(6):
            if one.waits >> board & 1:
                self.now = max(self.now, self.boards[board])
        ready = self.now + self._latency(one, again)
        if one.name == "LDGSTS":
            self.copies = max(self.copies, ready)
        elif one.name == "LDGDEPBAR":
            self.groups[one.sets].append(self.copies)
        elif one.sets >= 0:
            self.boards[one.sets] = max(self.boards[one.sets], ready)
        if one.name == "LDGSTS" or (one.sets >= 0 and one.name in ("LDG", "LD")):
            size = 4 if transfers(one) == 1 else 4 * transfers(one)
            kind = "LDGSTS" if one.name == "LDGSTS" else "LDG"
            self.loads = [load for load in self.loads if load[0] > self.now]
            self.loads.append((ready, WARP * size, kind))
            here = sum(n for _, n, other in self.loads if other == kind)
            self.most[kind] = max(self.most[kind], here)
        if found := _LATER.match(one.operands) if one.name == "DEPBAR" else None:
            groups = self.groups[int(found[1])]
            self.now = max(self.now, *groups[: len(groups) - int(found[2], 16)], 0.0)
        self.now += max(1, one.stall) + (_BARRIER if one.name == "BAR" else 0)
        if one.name == "MEMBAR":  # until L2 has all that was written
            self.now += self.gpu.clock * self.gpu.l2_latency

    def _latency(self, one, again):
        gpu = self.gpu
        if one.name == "ATOMG":  # of a counter, which many ask for
            return gpu.clock * gpu.l2_latency
        if one.name in ("LDG", "LD", "LDGSTS"):
            if again == "l1":
                return _L1
            return gpu.clock * (gpu.l2_latency if again else gpu.latency)
        return _RESULT.get(pipe_of(one), 20)


# ---------------------------------------------------------------- the time of a step


BOUNDS = ("dram", "l2", "flight", "issue", "pipe", "latency")


def together(wave):
    """Seconds of a wave by {bound: seconds}: as if none overlapped another perfectly.

    L2's rate is on the way to DRAM's: whichever is less.
    """
    others = (seconds for name, seconds in wave.items() if name != "l2")
    return max(wave["l2"], sum(v**OVERLAP for v in others) ** (1 / OVERLAP))


class Bounds(NamedTuple):
    """What a step takes, and why.

    Attributes
    ----------
    seconds : float
        Predicted.
    dram, l2, flight, issue, pipe, latency : float
        Seconds by each of the bounds alone: bytes of DRAM and of L2, loads in flight, instructions,
        the busiest pipe, and how long a block takes that is alone, times how many come one after
        the other.
    busiest : str
        That pipe.
    bytes : float
        That DRAM moves.
    again, hit : float
        Bytes that are read once more, and the share of them that L2 still has.
    instructions : float
        Issued for each element, a thread's slots that do nothing included.
    pipes : dict of str to float
        Cycles of a scheduler that a warp keeps each pipe busy.
    registers, resident : int
        Of a thread; blocks that a multiprocessor holds at once.
    waves : float
        Blocks over all that are resident at once.
    in_flight, needed : float
        Bytes of loads in flight of a multiprocessor, as far as L1 has room for those on their way
        to registers; those that keep DRAM busy (Little's law).
    """

    seconds: float
    dram: float
    l2: float
    flight: float
    issue: float
    pipe: float
    latency: float
    busiest: str
    bytes: float
    again: float
    hit: float
    instructions: float
    pipes: dict[str, float]
    registers: int
    resident: int
    waves: float
    in_flight: float
    needed: float

    @property
    def bound(self):
        """The name of the largest bound."""
        name = max(BOUNDS, key=lambda n: getattr(self, n))
        return self.busiest if name == "pipe" else name


def resident(step, used, gpu):
    """Blocks of a step that a multiprocessor holds at once."""
    by_registers = compiler.blocks_of(step.block, used.registers)
    shared = compiler.shared_of(used, step.shared, gpu.arch)
    by_shared = compiler.share_of(step.block, used.registers, shared, gpu.shared) // shared
    return max(0, min(gpu.threads // step.block, by_registers, gpu.blocks, by_shared))


def l1_beside(step, used, gpu):
    """Bytes of L1 beside the shared memory of as many blocks as a multiprocessor holds."""
    taken = resident(step, used, gpu) * compiler.shared_of(used, step.shared, gpu.arch)
    return gpu.shared + L1 - min(share << 10 for share in SHARES if share << 10 >= taken)


@functools.lru_cache(maxsize=4096)
def _compiled(spec, arch, block, blocks):
    cubin = compiler.cubin(spec, arch, block, blocks)
    return codegen.disassembled(cubin), compiler.resources(cubin)


def bounds(step: Step, plan: Plan, layouts, rows_bytes, gpu: Gpu, elements: float) -> Bounds:
    """The Bounds of one step.

    Parameters
    ----------
    step, plan, layouts :
        As `footprint.footprint` takes them.
    rows_bytes : dict of str to int
        Bytes of each array of the call.
    gpu : Gpu
    elements : float
        Of the call, to tell instructions by.
    """
    program, used = _compiled(step.spec, gpu.arch, step.block, step.blocks)
    scope = footprint(step, plan, layouts)
    code = weighed(program, scope)
    cycles, single = busy(code, gpu), alone(code, gpu)
    warps = -(-step.block // WARP)
    held = resident(step, used, gpu)
    if not held:
        raise ValueError(f"no block of {step.spec.kernel} fits on an {gpu.name}")
    read, written = scope.total("read"), scope.total("written")
    compulsory = {n: min(step.grid * size, rows_bytes.get(n, math.inf)) for n, size in read.items()}
    # What rows share at their ends, or one value a row has in its sector, is no second read.
    again = {n: step.grid * read[n] - compulsory[n] for n in read}
    least = 0.1 * max(compulsory.values(), default=0.0)
    again = {n: size for n, size in again.items() if size > least}
    at_once = min(step.grid, held * gpu.multiprocessors)
    # Half of L2 serves: a line whose home is the other partition is held in both.
    reused = at_once * sum(again.values()) / step.grid
    hit = min(1.0, gpu.l2 / 2 / reused) if reused else 1.0
    each = sum(read.values()) + sum(written.values())  # bytes of a block
    stored = {n: min(step.grid * size, rows_bytes.get(n, math.inf)) for n, size in written.items()}
    moved = sum(compulsory.values()) + sum(stored.values()) + (1 - hit) * sum(again.values())
    rate = gpu.copy if sum(stored.values()) > 0.1 * moved else gpu.read
    pipes = {n: c for n, c in cycles.items() if n != "issue"}
    pipes["lookup"] = SCHEDULERS * sum(scope.total("looked_up").values()) / warps
    busiest = max(pipes, key=lambda n: pipes[n])
    block = {  # seconds of a multiprocessor for a block
        "issue": warps / SCHEDULERS * cycles["issue"] / gpu.clock,
        "pipe": warps / SCHEDULERS * pipes[busiest] / gpu.clock,
    }
    life = max(single.cycles / gpu.clock, gpu.latency + max(block.values()))
    if step.cluster > 1:
        life *= IN_STEP
    if "meetings" in read and step.grid > at_once:
        # Those of a row start as others end, one after the other: the first waits for the last.
        life *= 1 + plan.constants["blocks"] / at_once
    needed = rate / gpu.multiprocessors * gpu.latency
    in_flight = min(held * warps * single.in_flight, l1_beside(step, used, gpu))
    in_flight += held * warps * single.copied
    totals = dict.fromkeys(("seconds", *BOUNDS), 0.0)
    full, last = divmod(step.grid, held * gpu.multiprocessors)
    for count, times in ((held * gpu.multiprocessors, full), (last, 1 if last else 0)):
        share = count / step.grid
        deep = -(-count // gpu.multiprocessors)
        wave = {
            "dram": moved * share / rate,
            "l2": max(count * each / gpu.l2_rate, deep * each / FABRIC / gpu.clock),
            "flight": 0.0,
            "issue": deep * block["issue"],
            "pipe": deep * block["pipe"],
            "latency": life,
        }
        if in_flight:
            wave["flight"] = wave["dram"] * needed / in_flight
        for name, seconds in wave.items():
            totals[name] += times * seconds
        totals["seconds"] += times * together(wave)
    lanes = step.grid * warps * WARP
    return Bounds(
        seconds=gpu.launch + totals["seconds"],
        dram=totals["dram"],
        l2=totals["l2"],
        flight=totals["flight"],
        issue=totals["issue"],
        pipe=totals["pipe"],
        latency=totals["latency"],
        busiest=busiest,
        bytes=moved,
        again=sum(again.values()),
        hit=hit,
        instructions=cycles["issue"] * lanes / elements,
        pipes=pipes,
        registers=used.registers,
        resident=held,
        waves=step.grid / (held * gpu.multiprocessors),
        in_flight=in_flight,
        needed=needed,
    )


# ---------------------------------------------------------------- the time of a call


class Prediction(NamedTuple):
    """What a call takes.

    Attributes
    ----------
    seconds : float
    share : float
        Of the copy rate: the least bytes of the call over its time and that rate.
    steps : tuple of (Step, Bounds)
    """

    seconds: float
    share: float
    steps: tuple[tuple[Step, Bounds], ...]

    @property
    def main(self) -> tuple[Step, Bounds]:
        """The (Step, Bounds) that takes longest."""
        return max(self.steps, key=lambda pair: pair[1].seconds)


STREAMS = {
    "log_softmax": 2,
    "softmax": 2,
    "log_softmax_backward": 3,
    "softmax_backward": 3,
    "logsumexp": 1,
    "cross_entropy": 1,
    "cross_entropy_backward": 2,
    "cross_entropy_backward-lse": 2,
    "cross_entropy_value_and_grad": 2,
    "cross_entropy_value_and_grad-smooth": 2,
    "cross_entropy_value_and_grad-soft": 3,
    "nll_loss": 0,
    "nll_loss_backward": 1,
}
"""Arrays of the logits' shape that a call moves at least."""


def machine_for(gpu: Gpu) -> Machine:
    """What the choice of a way knows of a GPU."""
    capability = divmod(int(gpu.arch[3:].rstrip("a")), 10)
    return machine_of(gpu.multiprocessors, gpu.shared - compiler.OWN, capability)


def predict(gpu: Gpu, operation, kind, rows, classes, layout="whole") -> Prediction:
    """The Prediction of a public function.

    Parameters
    ----------
    gpu : Gpu
    operation : str
        Of `codegen.OPERATIONS`.
    kind : {"f4", "bf", "f2", "f8"}
    rows, classes : int
    layout : {"whole", "shifted", "columns"}
        Rows that start at multiples of 16 bytes if their length allows it; that do not; the class
        axis first.
    """
    plan, layouts = codegen.call(operation, kind, rows, classes, layout, machine_for(gpu))
    size, elements = codegen.size_of(kind), rows * classes
    sizes = {
        n: (elements if len(a.strides) == 2 else rows) * codegen.size_of(a.kind)
        for n, a in layouts.items()
    } | dict(plan.temporaries)
    steps = tuple((s, bounds(s, plan, layouts, sizes, gpu, elements)) for s in plan.steps)
    seconds = sum(b.seconds for _, b in steps)
    return Prediction(seconds, STREAMS[operation] * elements * size / gpu.copy / seconds, steps)
