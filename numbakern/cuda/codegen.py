"""What the kernels became: instructions, registers and widths of access, from their machine code.

No GPU is needed. ``python -m numbakern.cuda`` prints the table.
"""

import functools
import itertools
import re
from collections import Counter
from typing import Any, NamedTuple

from numbakern.cuda import compile as compiler
from numbakern.cuda import totals
from numbakern.cuda.plan import Layout, Step, plan
from numbakern.cuda.ways import CLUSTER, MACHINE

MACHINES = {
    "sm_80": MACHINE._replace(multiprocessors=108, shared=163 << 10),
    "sm_90a": MACHINE._replace(cluster=CLUSTER),
    "sm_100a": MACHINE._replace(multiprocessors=148, cluster=CLUSTER),
}
"""Of each architecture that is looked at: an A100, an H100 or H200, a B200."""
ARCHITECTURES = tuple(MACHINES)
KINDS = ("f4", "bf", "f2", "f8")
COUNTS = {  # classes of a part of a warp, a warp, a block, chunks
    "f4": (64, 1000, 4096, 65536),
    "bf": (128, 2048, 8192, 65536),
    "f2": (128, 2048, 8192, 65536),
    "f8": (32, 512, 2048, 65536),
}
ROWS, ROWS_ABREAST = 16384, 1 << 20
"""Enough that no way for few of them is taken; the same where they lie side by side."""
CHOICE = {"realigned": True, "abreast": True, "counted": True}
"""The ways that may be chosen of rows as they are in `cases`."""
CHOSEN = MACHINE._replace(**CHOICE)
"""MACHINE with them."""


class Case(NamedTuple):
    """A kernel that ships, and the classes it is for."""

    operation: str
    kind: str
    classes: int
    layout: str  # whole, shifted, columns
    step: Step
    chosen: bool = False  # whether by a way that is not the default

    @property
    def name(self):
        """As tests and tables show it."""
        by_choice = "-chosen" * self.chosen
        return f"{self.operation}-{self.kind}-{self.classes}-{self.layout}{by_choice}"


class Figures(NamedTuple):
    """What is said of a kernel's machine code.

    Attributes
    ----------
    registers, local : int
        Of a thread; local memory and stack in bytes.
    wide, narrow : int
        Accesses to global memory of 16 bytes, and of less, where a row's elements are moved.
    single : int
        Accesses of less for what there is one of a row; without a loop they are among the narrow.
    looped : bool
        Whether a row's elements are moved in a loop.
    calls : int
        Returns from subroutines; a call without one is how sm_80 leaves a loop with shuffles.
    instructions : float
        For each element: of the whole kernel for a row in registers, of the loops for chunks.
    double : float
        Those of them that work on float64.
    """

    registers: int
    local: int
    wide: int
    narrow: int
    single: int
    looped: bool
    calls: int
    instructions: float
    double: float


def size_of(kind):
    """Bytes of an element."""
    return 2 if kind == "bf" else int(kind[1])


def _arrays(operation, kind, rows, classes, layout, elem):
    """(operation of plan, options, arrays) of a public function."""
    size = size_of(kind)
    wide = {
        "whole": Layout(kind, (classes * size, size), True),
        "shifted": Layout(kind, (classes * size, size), False),
        "columns": Layout(kind, (rows * size, size), True),
    }[layout]
    result = Layout("f8" if elem == "f8" else "f4", (), True)
    x, y, out = ("x", wide), ("y", wide), ("out", wide)
    labels, lse = ("labels", Layout("i8", (8,), True)), ("row_lse", Layout("f8", (8,), True))
    loss, scale = ("loss", result), ("row_scale", Layout("f4", (0,), True))
    mean = ("ignores", True), ("reduction", "mean")
    return {
        "log_softmax": ("log_softmax", (), (x, out)),
        "softmax": ("softmax", (), (x, out)),
        "logsumexp": ("logsumexp", (), (x, ("row_lse", Layout(result.kind, (8,), True)))),
        "log_softmax_backward": ("log_softmax_backward", (), (x, y, out)),
        "softmax_backward": ("softmax_backward", (), (x, y, out)),
        "cross_entropy": ("cross_entropy", mean, (x, labels, loss)),
        "cross_entropy_value_and_grad": ("cross_entropy", mean, (x, labels, loss, out)),
        "cross_entropy_backward": ("cross_entropy", mean, (x, labels, scale, out)),
        "cross_entropy_backward-lse": (
            "cross_entropy", (*mean, ("given", True)), (x, labels, lse, scale, out),
        ),
        "cross_entropy_value_and_grad-smooth": (
            "cross_entropy", (*mean, ("smooth", True)), (x, labels, loss, out),
        ),
        "cross_entropy_value_and_grad-soft": (
            "cross_entropy", (("soft", True), ("reduction", "mean")), (x, y, loss, out),
        ),
        "nll_loss": ("nll", mean, (x, labels, loss)),
        "nll_loss_backward": ("nll_backward", mean, (labels, scale, out)),
    }[operation]  # fmt: skip


OPERATIONS = (
    "log_softmax",
    "softmax",
    "logsumexp",
    "log_softmax_backward",
    "softmax_backward",
    "cross_entropy",
    "cross_entropy_value_and_grad",
    "cross_entropy_backward",
    "cross_entropy_backward-lse",
    "cross_entropy_value_and_grad-smooth",
    "cross_entropy_value_and_grad-soft",
    "nll_loss",
    "nll_loss_backward",
)


def case(operation, kind, classes, layout="whole", machine=MACHINE):
    """The Case of a public function on rows of a kind and length."""
    rows = ROWS_ABREAST if layout == "columns" else ROWS
    made, _ = call(operation, kind, rows, classes, layout, machine)
    # Beside it there are steps of one value a row, and before it what only reduces.
    *_, step = (s for s in made.steps if s.spec.kernel not in totals.KERNELS)
    return Case(operation, kind, classes, layout, step)


def call(operation, kind, rows, classes, layout="whole", machine=MACHINE):
    """The Plan of a public function for a machine, and the Layouts of its arrays by name."""
    elem = "f8" if kind == "f8" else "f4"
    name, options, arrays = _arrays(operation, kind, rows, classes, layout, elem)
    shape, axis = ((classes, rows), 0) if layout == "columns" else ((rows, classes), 1)
    return plan(name, options, shape, axis, elem, arrays, machine), dict(arrays)


def cases(operations=OPERATIONS, kinds=KINDS, machine=MACHINE):
    """The kernels that ship for a machine: every operation, kind, way through a row, and layout."""
    choice = machine._replace(**CHOICE)
    for operation in operations:
        for kind in kinds:
            for classes, layout in _sizes(operation, kind):
                default = case(operation, kind, classes, layout, machine)
                chosen = case(operation, kind, classes, layout, choice)
                yield default
                if chosen.step != default.step:
                    yield chosen._replace(chosen=True)


def _sizes(operation, kind):
    """(classes, layout) of the `cases` of an operation."""
    counts = COUNTS[kind]
    for classes in counts if operation != "nll_loss" else counts[:1]:
        yield from ((classes, "whole"), (classes, "shifted"), (classes + 1, "whole"))
    yield from ((21, "columns"), (counts[1], "columns"))


# ---------------------------------------------------------------- reading machine code


class Instruction(NamedTuple):
    """One instruction, with what its encoding tells the warp scheduler.

    Attributes
    ----------
    address : int
    opcode : str
        As nvdisasm writes it: LDG.E.128, FFMA, …
    operands : str
    guard : str
        The predicate it is executed under, as ``@!P0``; empty if none.
    stall : int
        Cycles before the warp's next instruction may issue.
    sets : int
        Scoreboard that is free again when its result is there; −1 for none.
    waits : int
        Scoreboards that it waits for, a bit each.
    """

    address: int
    opcode: str
    operands: str
    guard: str
    stall: int
    sets: int
    waits: int

    @property
    def name(self):
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]


class Span(NamedTuple):
    """A part of the code that runs more than once, or not always.

    Attributes
    ----------
    first, last : int
        Addresses of its first and last instruction.
    kind : {"loop", "branch"}
        A loop, or what a conditional branch jumps over or jumps to instead, or what stands behind
        the end of some threads.
    parts : tuple of Span
        Those inside of it.
    """

    first: int
    last: int
    kind: str
    parts: tuple[Any, ...]


class Program(NamedTuple):
    """The machine code of a kernel.

    Attributes
    ----------
    instructions : tuple of Instruction
        In the order of their addresses, up to the end of the kernel.
    spans : tuple of Span
        Its loops and branches.
    """

    instructions: tuple[Instruction, ...]
    spans: tuple[Span, ...]


_LINE = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P[T0-9]+\s+)?([A-Z0-9_.]+)(.*?);\s*/\* 0x([0-9a-f]{16}) \*/"
)
_REST = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_TARGET = re.compile(r"\.L_x_\d+")
_GLOBAL = re.compile(r"(LDG|STG)\.")  # ST. is to another block's shared memory


def program(sass):
    """The Program that nvdisasm printed, encodings included.

    The upper half of an encoding holds the scheduling fields, at the same bits from Volta on (Jia
    et al., "Dissecting the NVIDIA Volta GPU architecture via microbenchmarking", 2018): from bit 41
    on, 4 bits of stall, one of yield, 3 bits each of the scoreboard that is set by the result and
    by the reading of operands, 6 bits of scoreboards waited for.
    """
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    line = None
    for text in sass.splitlines():
        label = _LABEL.match(text)
        if label:
            waiting.append(label.group(1))
        elif line := _LINE.search(text) or line:
            if rest := _REST.match(text):
                found.append(_instruction(line, int(rest.group(1), 16)))
                labels.update(dict.fromkeys(waiting, found[-1].address))
                waiting, line = [], None
    # Behind the last EXIT there is only what fills the code up; or the way back, if it ends a loop.
    end = max((n for n, i in enumerate(found) if i.name == "EXIT"), default=-1)
    if end >= 0 and found[end].guard:
        end = next(n for n, i in enumerate(found) if n > end and i.name == "BRA" and not i.guard)
    found = found[: end + 1]
    jumps = [
        (i, labels[_TARGET.search(i.operands).group()])
        for i in found
        if i.name == "BRA" and _TARGET.search(i.operands)
    ]
    return Program(tuple(i for i in found if i.name != "NOP"), _nested(list(_spans(found, jumps))))


def _instruction(line, control):
    address, guard, opcode, operands, _ = line.groups()
    control >>= 41
    return Instruction(
        int(address, 16),
        opcode,
        operands.strip(),
        (guard or "").strip(),
        control & 15,
        sets if (sets := (control >> 5) & 7) < 6 else -1,
        (control >> 11) & 63,
    )


def _spans(found, jumps):
    """(first, last, kind) of the loops and branches."""
    loops = [(target, i.address) for i, target in jumps if target <= i.address]
    yield from ((first, last, "loop") for first, last in loops)
    for i, behind in itertools.pairwise(found):
        inside = any(j.address < i.address < target for j, target in jumps)
        if (
            i.name == "EXIT"
            and i.guard
            and not inside
            and all(last < i.address for _, last in loops)
        ):
            yield behind.address, found[-1].address, "branch"
    for i, target in jumps:
        inside = [j.address for j in found if i.address < j.address < target]
        # A jump over a loop asks whether it runs at all, which is in the count of its rounds.
        over = any(i.address < first and last < target for first, last in loops)
        asks = i.guard or re.match(r"!?U?P\d", i.operands)
        # Behind a branch that jumps to its end stands what the others take.
        if inside and not over and (asks or any(to == inside[0] for _, to in jumps)):
            yield inside[0], inside[-1], "branch"


def _nested(spans):
    """The Spans of these (first, last, kind), those inside others as their parts."""
    spans.sort(key=lambda s: (s[0], -s[1]))
    top: list[Span] = []
    while spans:
        first, last, kind = spans.pop(0)
        inside = [s for s in spans if s[1] <= last]
        spans = [s for s in spans if s[1] > last]
        top.append(Span(first, last, kind, _nested(inside)))
    return tuple(top)


@functools.lru_cache(maxsize=4096)
def disassembled(cubin):
    """The Program of a compiled kernel."""
    return program(compiler.sass(cubin))


def figures(case: Case, arch: str) -> Figures:
    """The Figures of a kernel, compiled for an architecture or read from the cache."""
    cubin = compiler.cubin(case.step.spec, arch, case.step.block, case.step.blocks)
    used = compiler.resources(cubin)
    found, spans = disassembled(cubin)
    params: dict[str, Any] = dict(case.step.spec.params)
    lanes, vectors, group, chunks, _ = params["part"]
    elements = vectors * group
    bodies = [s for s in spans if s.kind == "loop"]
    body = [i for i in found if not bodies or any(s.first <= i.address <= s.last for s in bodies)]
    inside = [i.opcode for i in body]
    moved = [op for op in inside if _GLOBAL.match(op)]
    every = Counter(i.opcode for i in found if _GLOBAL.match(i.opcode))
    wide = [op for op in moved if ".128" in op]
    narrow = len(moved) - len(wide)
    single = sum(n for op, n in every.items() if ".128" not in op) - narrow
    double = sum(op.startswith(("DADD", "DMUL", "DFMA", "DSETP", "F2F")) for op in inside)
    return Figures(
        used.registers,
        used.local + used.stack,
        len(wide),
        narrow,
        single,
        bool(bodies),
        sum(i.name == "RET" for i in found),
        len(inside) / elements,
        double / elements,
    )


def table(shown, arch) -> str:
    """The Figures of these Cases, as Markdown."""
    lines = [
        f"| {arch} | threads | registers | local | 16 B | narrower | calls | instr. | float64 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in shown:
        f = figures(one, arch)
        lines.append(
            f"| {one.name} | {one.step.block} | {f.registers} | {f.local} | {f.wide} | "
            f"{f.narrow} + {f.single} | {f.calls} | {f.instructions:.1f} | {f.double:.1f} |"
        )
    return "\n".join(lines)
