"""What the kernels became: instructions, registers and widths of access, from their machine code.

No GPU is needed. ``python -m numbakern.cuda`` prints the table.
"""

import re
from collections import Counter
from typing import Any, NamedTuple

from numbakern.cuda import compile as compiler
from numbakern.cuda.plan import Layout, Step, plan

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")
KINDS = ("f4", "bf", "f2", "f8")
COUNTS = {  # classes of a part of a warp, a warp, a block, chunks
    "f4": (32, 1000, 4096, 65536),
    "bf": (64, 1024, 4096, 65536),
    "f2": (64, 1024, 4096, 65536),
    "f8": (16, 128, 2048, 65536),
}
ROWS = 16384
"""Enough that no way for few of them is taken."""


class Case(NamedTuple):
    """A kernel that ships, and the classes it is for."""

    operation: str
    kind: str
    classes: int
    layout: str  # whole, shifted, columns
    step: Step

    @property
    def name(self):
        """As tests and tables show it."""
        return f"{self.operation}-{self.kind}-{self.classes}-{self.layout}"


class Figures(NamedTuple):
    """What is said of a kernel's machine code.

    Attributes
    ----------
    registers, local : int
        Of a thread; local memory and stack in bytes.
    wide, narrow : int
        Accesses to global memory of 16 bytes, and of less, where a row's elements are moved.
    single : int
        Accesses of less for what there is one of a row.
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
    calls: int
    instructions: float
    double: float


def _arrays(operation, kind, classes, layout, elem):
    """(operation of plan, options, axis, layouts) of an operation on ROWS rows."""
    size = 2 if kind == "bf" else int(kind[1])
    wide = {
        "whole": Layout(kind, (classes * size, size), True),
        "shifted": Layout(kind, (classes * size, size), False),
        "columns": Layout(kind, (ROWS * size, size), True),
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


def case(operation, kind, classes, layout="whole"):
    """The Case of a public function on rows of a kind and length."""
    elem = "f8" if kind == "f8" else "f4"
    name, options, arrays = _arrays(operation, kind, classes, layout, elem)
    shape, axis = ((classes, ROWS), 0) if layout == "columns" else ((ROWS, classes), 1)
    made = plan(name, options, shape, axis, elem, arrays)
    (step,) = (s for s in made.steps if s.spec.kernel == name)
    return Case(operation, kind, classes, layout, step)


def cases(operations=OPERATIONS, kinds=KINDS):
    """The kernels that ship: every operation, kind, way through a row, and layout."""
    for operation in operations:
        for kind in kinds:
            counts = COUNTS[kind]
            for classes in counts if operation != "nll_loss" else counts[:1]:
                yield case(operation, kind, classes)
                yield case(operation, kind, classes + 1, "shifted")
            yield case(operation, kind, 21, "columns")
            yield case(operation, kind, counts[1], "columns")


# ---------------------------------------------------------------- reading machine code


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z0-9_.]+)(.*)")
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_GLOBAL = re.compile(r"(LDG|STG|LD|ST)\.")


def instructions(sass):
    """(address, opcode, operands) of each instruction, and the addresses of the labels."""
    found: list[tuple[int, str, str]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in sass.splitlines():
        label = _LABEL.match(line)
        if label:
            waiting.append(label.group(1))
            continue
        match = _LINE.search(line)
        if match:
            address = int(match.group(1), 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting = []
            if match.group(2) != "NOP":
                found.append((address, match.group(2), match.group(3)))
    return found, labels


def loops(found, labels):
    """(first, last) address of each loop: where a branch leads back to, and the branch."""
    for address, opcode, operands in found:
        target = re.search(r"\.L_x_\d+", operands)
        if opcode.startswith("BRA") and target:
            first = labels.get(target.group(), address)
            if first < address:
                yield first, address


def figures(case: Case, arch: str) -> Figures:
    """The Figures of a kernel, compiled for an architecture or read from the cache."""
    cubin = compiler.cubin(case.step.spec, arch, case.step.block)
    used = compiler.resources(cubin)
    found, labels = instructions(compiler.sass(cubin))
    params: dict[str, Any] = dict(case.step.spec.params)
    lanes, vectors, group, chunks = params["part"]
    elements = vectors * group
    if params["walker"] == "columns" and not chunks:
        elements = vectors * group * (lanes if lanes * elements <= 32 else 1)
    bodies = list(loops(found, labels))
    body = [i for i in found if not bodies or any(a <= i[0] <= b for a, b in bodies)]
    inside = [op for _, op, _ in body]
    moved = [op for op in inside if _GLOBAL.match(op)]
    every = Counter(op for _, op, _ in found if _GLOBAL.match(op))
    wide = [op for op in moved if ".128" in op]
    narrow = len(moved) - len(wide)
    # In straight code the accesses that there is one of a row stand among the others.
    single = sum(every.values()) - len(moved)
    double = sum(op.startswith(("DADD", "DMUL", "DFMA", "DSETP", "F2F")) for op in inside)
    return Figures(
        used.registers,
        used.local + used.stack,
        len(wide),
        narrow,
        single,
        sum(op.startswith("RET") for _, op, _ in found),
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
