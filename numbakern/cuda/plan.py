"""From shapes and strides to the steps of a call: which kernels, how they are launched, with what.

A plan never sees a value or waits for one: it follows from the operation, dtypes, shapes, strides
and alignments, and is remembered for them.
"""

import functools
import math
from typing import Any, NamedTuple

from numbakern import arrays
from numbakern.cuda import copies, kernels, totals
from numbakern.cuda.ahead import Ahead, can_copy
from numbakern.cuda.columns import Columns, side_by_side
from numbakern.cuda.compile import LEAN, blocks_of
from numbakern.cuda.device import Kernel
from numbakern.cuda.gathered import Gathered
from numbakern.cuda.memory import (
    ACCESS,
    Abreast,
    Format,
    Numbers,
    Shifted,
    Single,
    Strided,
    Whole,
)
from numbakern.cuda.realigned import Realigned
from numbakern.cuda.reduce import WARP
from numbakern.cuda.rows import BLOCK, Partition, Rows, Way, joiners_of, partition, shelved
from numbakern.cuda.softmax import width
from numbakern.cuda.tiles import WORD, Staged, StagedAnywhere, run_of, size_of
from numbakern.cuda.totals import Sums
from numbakern.cuda.ways import (
    EXACT,
    KEEPING,
    LANE_REGISTERS,
    MACHINE,
    NEIGHBOURS,
    REGISTERS,
    abreast,
    launches,
)

BAD_BITS = kernels.BAD_BITS
NARROW = (1 << 31) - (1 << 10)
"""Beyond every number that 32 bits are to hold: a block's rows behind the last one fit as well."""


class Layout(NamedTuple):
    """How an array lies in memory.

    Attributes
    ----------
    kind : str
        As `arrays.Kind.kind`: f2, bf, f4, f8, i1 … u8, b1.
    strides : tuple of int
        In bytes, an axis each.
    aligned : bool
        Whether its first element lies at a multiple of 16 bytes.
    """

    kind: str
    strides: tuple[int, ...]
    aligned: bool


class Spec(NamedTuple):
    """What a kernel is made of; its repr is the key of its machine code."""

    kernel: str
    params: tuple[tuple[str, Any], ...]


class Step(NamedTuple):
    """One launch.

    Attributes
    ----------
    spec : Spec
    grid, block : int
        Blocks, and threads of each.
    shared : int
        Bytes of dynamic shared memory.
    cluster : int
        Blocks of a cluster.
    args : tuple of str
        Names of what the kernel is given.
    blocks : int
        Of a multiprocessor that the compiler is told of: as many as are to keep rows beside one
        another (`Launch.beside`); with another map those that it has shared memory for, of a
        crowded Partition or long rows of halves read one by one; without one those that it has
        registers for, of halves read one by one or put into place and of what adds up, and those
        that it has shared memory for, of rows of one part that are finished together and are of
        halves or copied there; 0 of others.
    """

    spec: Spec
    grid: int
    block: int
    shared: int
    cluster: int
    args: tuple[str, ...]
    blocks: int = 0


class Plan(NamedTuple):
    """The launches of a call.

    Attributes
    ----------
    steps : tuple of Step
    temporaries : tuple of (str, int)
        Name and bytes of the device memory that the steps need beside the arrays.
    constants : dict of str to number
        What of the steps' arguments follows from shapes and strides. The caller adds the address of
        each array and temporary under its name, and of the values `ignore_index`, `scale`, `keep`,
        `spread` and the address `bad` those that the operation has.
    """

    steps: tuple[Step, ...]
    temporaries: tuple[tuple[str, int], ...]
    constants: dict[str, Any]


_OF_A_ROW = ("x", "y", "out", "labels", "row_scale", "row_lse", "loss")


@functools.lru_cache(maxsize=4096)
def plan(operation, options, shape, axis, elem, layouts, machine=MACHINE):
    """The Plan of an operation over rows along one axis.

    Parameters
    ----------
    operation : str
        log_softmax, softmax, logsumexp (x), log_softmax_backward, softmax_backward (x the gradient,
        y the output), cross_entropy, nll, nll_backward.
    options : tuple of (str, bool or str)
        For cross_entropy: soft, smooth (bools: targets are probabilities y; label smoothing of
        labels), given (row_lse is an input), ignores (the labels' type has `ignore_index`),
        reduction. For nll and nll_backward: ignores, reduction. Absent bools are False.
    shape : tuple of int
        Of x; of out for nll_backward.
    axis : int
        The class axis.
    elem : {"f4", "f8"}
        What is computed in.
    layouts : tuple of (str, Layout)
        The arrays: x, y, out of the whole shape; labels, row_scale (the upstream gradient; a
        scalar has strides of 0) and row_lse of the shape without the class axis; weight; loss (of
        the shape without the class axis under "none", else a scalar). What is there says what is
        computed: out the gradient, loss the loss, row_lse the log-sum-exp.
    machine : Machine
        What it is for. No bit of a result depends on it, but for the last ones of long rows of
        halves that are `realigned`.
    """
    return _Planner(operation, dict(options), shape, axis, elem, dict(layouts), machine).plan()


class _RowAccess(NamedTuple):
    """What a kernel's accesses to the elements of rows come to, for the choice of its launches.

    Attributes
    ----------
    out : memory access or None
        How results are written; None without a map.
    tiles : dict of str to memory access
        Those of arrays that pass through shared memory.
    mapped : int
        Arrays that a map reads; 0 if there is none.
    shelf : int
        Bytes that a warp needs to keep a part in shared memory; 0 if nothing is made of it.
    copied : bool
        Whether what it keeps there can be copied there.
    single, realigned : bool
        Whether halves are read one by one, which takes long and a register for each load in
        flight; whether some array is put into place.
    """

    out: Any
    tiles: dict[str, Any]
    mapped: int
    shelf: int
    copied: bool
    single: bool
    realigned: bool

    @classmethod
    def of(cls, part, accesses, op):
        """Those of an operation."""
        inputs = {name: access for name, access in accesses.items() if name != "out"}
        maps = "out" in accesses
        return cls(
            out=accesses.get("out"),
            tiles={name: access for name, access in accesses.items() if access.staged},
            mapped=max(1, len(inputs)) if maps else 0,
            shelf=ACCESS * WARP * len(shelved(part, inputs, op.both)) if maps else 0,
            copied=can_copy(part, inputs, op.both),
            single=any(a.wide and a.chunk == 2 and not a.staged for a in inputs.values()),
            realigned=any(isinstance(a, Realigned) for a in inputs.values()),
        )

    @property
    def room(self):
        """Bytes of shared memory that a warp's stores take."""
        return self.out.room if self.out else 0


class _Planner:
    def __init__(self, operation, options, shape, axis, elem, layouts, machine):
        self.machine = machine
        self.operation, self.options, self.elem = operation, options, elem
        self.layouts, self.axis, self.classes = layouts, axis, shape[axis]
        self.batch = shape[:axis] + shape[axis + 1 :]
        self.rows = math.prod(self.batch)
        self.reduction = options.get("reduction", "none")
        self.steps, self.temporaries = [], []
        self.constants = {"rows": self.rows, "classes": self.classes}

    def plan(self):
        added = None
        if "loss" in self.layouts and self.reduction != "none":
            added = Sums(2 if self._counts else 1, self.elem == "f8")
        if self.rows and (self.classes or self.operation == "nll"):
            added = self._rows(added)
        if added:
            self._total(added)
        return Plan(tuple(self.steps), tuple(self.temporaries), self.constants)

    # -- one value a row

    @property
    def _blocks_may_count(self):
        """Whether there are so few rows that a block can count all labels."""
        return self.machine.counted and self.rows <= totals.COUNTED

    @property
    def _counts(self):
        """Whether a mean is over labels, so that their weights are counted."""
        return self.reduction == "mean" and not self.options.get("soft")

    def _divisor(self, launch):
        """Σ w[t] over the labels that count, into `divisor`, and a gradient's scale by it.

        Or what the blocks of such a launch need to find that themselves, where this takes less time
        than a launch of its own.
        """
        weight, upstream = (self.layouts.get(name) for name in ("weight", "row_scale"))
        sizes, _ = self._batch_constants(("number", "labels"), "count_")
        params = (
            ("labels", self.layouts["labels"].kind),
            ("ignores", bool(self.options.get("ignores"))),
            ("weight", weight and weight.kind),
            ("dimensions", len(sizes)),
        )
        sums, scale = Sums(1, self.elem == "f8"), ("upstream", upstream and upstream.kind)
        if self._blocks_may_count and self.machine.is_quick(launch.grid * launch.threads):
            return *params, ("sums", tuple(sums)), scale
        self.temporaries.append(("divisor", 16))
        last = ("result", "divisor"), ("kind", "f8"), scale
        self._sum("count", params, sums, self.rows, last)
        return None

    def _division(self, added):
        """What the sum of the losses is divided by."""
        if self.reduction != "mean":
            return "none"
        return "second" if added.terms > 1 else "divisor" if self._counts else "rows"

    def _total(self, added):
        """The loss, of what the rows' launches have left in `row_loss`."""
        nodes, division = -(-self.rows // added.rows), self._division(added)
        self.temporaries.append(("row_loss", added.size * max(1, nodes)))
        self.constants["row_loss_count"] = nodes
        last = ("result", "loss"), ("kind", self.layouts["loss"].kind), ("division", division)
        self._sum("total", (("source", "row_loss"),), added, nodes, last)

    def _sum(self, kernel, params, sums, count, last):
        """The steps that add up so many items, the last of which has these parameters."""
        name = "row_loss" if kernel == "total" else kernel
        while not (shape := totals.shape_for(count, sums)):
            count, name = -(-count // totals.SPAN), name + "_left"
            left = sums._replace(rows=sums.rows * totals.SPAN)
            self.temporaries.append((name, left.size * count))
            self.constants[f"{name}_count"] = count
            several = totals.BLOCK, totals.EACH
            self._sum_step(kernel, params, sums, several, ("target", name), grid=count)
            kernel, params, sums = "total", (("source", name),), left
        self._sum_step(kernel, params, sums, shape, *last)

    def _sum_step(self, kernel, params, sums, shape, *others, grid=1):
        params = *params, ("sums", tuple(sums)), ("shape", shape), *others
        blocks = min(grid, blocks_of(shape[0], LEAN))  # all items are asked for at once
        self._step(Spec(kernel, params), grid, shape[0], blocks=blocks)

    def _step(self, spec, grid, block, shared=0, cluster=1, blocks=0):
        args = tuple(kernel_of(spec).args)
        self.steps.append(Step(spec, grid, block, shared, cluster, args, blocks))

    # -- rows

    def _batch_constants(self, names, prefix=""):
        """Put the batch's axes as these arrays have them into the constants.

        Returns their sizes, and the steps of each array along them.
        """
        strides = []
        for name in names:
            if name == "number":
                strides.append(_contiguous(self.batch, 1))
            else:
                given = self.layouts[name].strides
                full = len(given) > len(self.batch)
                strides.append(given[: self.axis] + given[self.axis + 1 :] if full else given)
        sizes, steps = _joined(self.batch, strides)
        for d, size in enumerate(sizes):
            if d:
                self.constants[f"{prefix}size{d}"] = size
                self.constants[f"{prefix}inverse{d}"] = 1.0 / max(size, 1)
            for name, step in zip(names, steps, strict=True):
                self.constants[f"{prefix}{name}_step{d}"] = step[d]
        return sizes, dict(zip(names, steps, strict=True))

    def _rows(self, added):
        """The steps of the rows; how what they add up lies in `row_loss`, None for nothing."""
        names = [n for n in _OF_A_ROW if n in self.layouts]
        if added:
            names.remove("loss")
        if self._counts and "row_scale" in names:  # one number, which `_divisor` has taken
            names.remove("row_scale")
        if added or "labels" in names:
            names.append("number")
        self.sizes, self.along = self._batch_constants(names)
        if self._in_order(names):  # then that of a row is known
            names.remove("number")
            del self.constants["number_step0"]
        full = [n for n in ("x", "y", "out") if n in self.layouts]
        layouts = {n: self.layouts[n] for n in full}
        for name in full:
            self.constants[f"{name}_class"] = layouts[name].strides[self.axis]
        if "weight" in self.layouts:
            self.constants["weight_class"] = self.layouts["weight"].strides[0]
        lead = layouts.get("x") or layouts["out"]
        lead_size = 8 if self.elem == "f8" else _size(lead.kind)  # as it is held
        halves = self.machine.realigned and all(a.kind in ("f2", "bf") for a in layouts.values())
        one = sum(n != "out" for n in full) == 1
        part = partition(self.classes, lead_size, self._halved(), halves, one)
        if self.operation == "nll":
            part = Partition(1, 1, 1, False)
        walker, modes, together = self._walk(layouts, part)
        params = (
            ("elem", self.elem),
            ("options", tuple(sorted((k, v) for k, v in self.options.items() if v))),
            ("dimensions", len(self.sizes)),
            ("narrow", self._narrow(names)),
            ("arrays", tuple((n, self._kind(n)) for n in names)),
            ("weight", "weight" in self.layouts and self.layouts["weight"].kind),
            ("walker", walker),
            ("modes", modes),
            ("together", together),
            ("dense", self._dense(names, together)),
            ("part", tuple(part)),
            ("added", added and tuple(added)),
            ("result", None),
            ("counted", None),
        )
        return self._launches(params, part)

    def _dense(self, names, together):
        """Arrays of which those of neighbouring rows are read or written at once."""
        found = []
        for name in names if together > 1 else ():
            layout, (*steps, last) = self.layouts.get(name), self.along[name]
            if layout and name not in ("x", "y", "out"):
                size = _size(layout.kind)
                each = min(ACCESS, together * size)
                dense = size >= WORD and last == size and not any(s % each for s in steps)
                found += [name] * (dense and layout.aligned)
        return tuple(found)

    def _in_order(self, names):
        """Whether rows are taken in the order of their numbers, where these are needed."""
        return "number" in names and self.along["number"] == list(_contiguous(self.sizes, 1))

    def _narrow(self, names):
        """Whether numbers of rows and classes, and distances between them, fit into 32 bits."""
        steps = [s for n in names for s in self.along[n]]
        steps += [v for n, v in self.constants.items() if n.endswith("_class")]
        return len(self.sizes) == 1 and all(
            abs(n) < NARROW for n in (self.rows, self.classes, *steps)
        )

    def _neighbours(self, part, way, columns, staged):
        """Rows of a warp that are neighbours in the batch, where it finishes them."""
        if not self._in_order(self.along):
            return 1
        if columns:
            return min(WARP, side_by_side(part, columns)) * columns
        if way.gathers:
            return min(way.gathers, WARP // joiners_of(part))
        if staged and part.lanes > 1:
            return run_of(True, part.lanes)
        return WARP // part.lanes if part.single else 1

    def _launches(self, params, part):
        """The steps of the operation on the rows; its sums, as they lie in `row_loss`, or None."""
        op, accesses = _made(self.operation, dict(params))
        rows = _RowAccess.of(part, accesses, op)
        parts, numbers = part.parts(self.classes), width(op)
        columns = dict(params)["together"] if dict(params)["walker"] == "columns" else 0
        scales = self._counts and rows.out is not None  # by what all labels come to
        # What stores may take of it, and sums of the warps.
        room = rows.room * KEEPING[1]
        room += totals.ROOM if scales and self._blocks_may_count else 0
        ahead = self.machine.ahead and rows.copied
        machine = self.machine._replace(shared=self.machine.shared - room, ahead=ahead)
        found, constants = launches(
            part,
            self.classes,
            self.rows,
            numbers,
            rows.shelf,
            rows.mapped,
            # In turn beside others they need as many as they would take alone.
            self._lane_registers(part, op.halves, rows) + (EXACT if ahead and op.exact else 0),
            columns,
            machine,
            bool(rows.tiles),
        )
        self.constants |= {"parts": parts, "joins": -(-parts // WARP), **constants}
        meets = any(launch.way.meets(numbers) for launch in found)
        if meets or any(launch.way.stage == "reduce" for launch in found):
            self.temporaries.append(("shares", 8 * self.rows * (parts * numbers + 1)))
        if meets:
            self.temporaries.append(("meetings", 4 * (self.rows + 1)))
            self._step(Spec("clear", ()), -(-(self.rows + 1) // copies.BLOCK), copies.BLOCK)
        added, result, params = op.added, None, dict(params)
        counted = self._divisor(found[-1]) if scales else None
        if added:
            added = added._replace(
                terms=1 if scales and not counted else added.terms,
                rows=self._neighbours(part, found[-1].way, columns, bool(rows.tiles)),
            )
            if self.machine.counted and added.rows >= self.rows:  # who has a node has all there is
                result = self.layouts["loss"].kind, self._division(added)
            params |= {"added": tuple(added), "result": result}
        for launch in found:
            way, threads = launch.way, launch.threads
            shared = launch.shared + size_of(rows.tiles, part, self.classes, threads)
            launch = launch._replace(shared=shared)
            name = self.operation + "_parts" * (way.stage == "reduce")
            params["counted"] = counted and totals.counted(counted, threads)
            spec = Spec(name, (*params.items(), ("way", tuple(way))))
            blocks = self._blocks_told(op, part, rows, columns, launch)
            self._step(spec, launch.grid, threads, shared, way.cluster, blocks)
        return None if result else added

    def _blocks_told(self, op, part, rows, columns, launch):
        """Blocks of a multiprocessor that ptxas is told of; 0 to leave it to itself."""
        way, _, threads, shared, beside = launch
        if beside:
            return beside
        if rows.out is not None:
            if part.crowded or (rows.single and part.chunks):
                return self.machine.beside(shared + rows.room * (threads // WARP))
            return 0
        if rows.single and not columns:
            return _roomy(part, threads)
        if rows.realigned:  # it takes a few registers more than it needs
            return blocks_of(threads, LEAN)
        if way.gathers and part.single and (rows.tiles or op.halves) and "labels" in op.arrays:
            # For one block more it would read a row in two halves, one after the other.
            return self.machine.beside(shared)
        return 0

    def _lane_registers(self, part, halves, rows):
        """Of a lane, about, beside what it holds.

        More for halves of which more than one array is read or summed, yet more for single ones.
        """
        single = rows.single
        if not rows.mapped:
            return _registers(part) if single else LANE_REGISTERS
        held, sums = rows.shelf // (4 * WARP), self._halved()
        if sums:  # they take what the row holds less
            held = max(held, 24 if single else 32)
        return held + (56 if single else 40 if halves and (sums or rows.mapped > 1) else 32)

    def _halved(self):
        """Whether every class has a target: its sums take registers."""
        return bool(self.options.get("soft") or self.options.get("smooth"))

    def _kind(self, name):
        return None if name == "number" else self.layouts[name].kind

    def _walk(self, layouts, part):
        """The walker, how it gets at x, y and out, and at so many rows together."""
        sizes = {n: _size(a.kind) for n, a in layouts.items()}
        if self.classes <= 1 or all(a.strides[self.axis] == sizes[n] for n, a in layouts.items()):
            return "rows", tuple((n, self._mode(n, a, part)) for n, a in layouts.items()), 1
        neighbours = self.sizes and all(self.along[n][-1] == sizes[n] for n in layouts)
        modes = tuple((n, self._far(a)) for n, a in layouts.items())
        if not neighbours or self.sizes[-1] < NEIGHBOURS:
            return "rows", modes, 1
        together = self._together(layouts, sizes, part)
        if together > 1:
            modes = tuple((n, "abreast") for n in layouts)
        return "columns", modes, together

    def _together(self, layouts, sizes, part):
        """Neighbouring rows that one access takes an element each of."""
        if (
            not self.machine.abreast
            or self.operation == "nll"
            or any(not a.aligned or self._far(a) == "numbers" for a in layouts.values())
        ):
            return 1
        inputs = sum(n != "out" for n in layouts)
        labels, maps = (n in self.layouts for n in ("labels", "out"))
        size = max(sizes.values())
        rows = abreast(part, self.rows, size, inputs, labels, maps, self.machine)

        def fits(name):
            steps = (*self.along[name][:-1], self.constants[f"{name}_class"])
            return all(step % (rows * sizes[name]) == 0 for step in steps)

        while self.sizes[-1] % rows or not all(map(fits, layouts)):
            rows //= 2
        return rows

    @staticmethod
    def _far(layout):
        """How elements at any distance are got at."""
        return "strided" if Format(layout.kind, "f8").real else "numbers"

    def _mode(self, name, layout, part):
        if self._far(layout) == "numbers":
            return "numbers"
        size = _size(layout.kind)
        chunk = min(ACCESS, part.group * size)
        if self._in_tiles(name, layout, part, size):
            return "staged" if layout.aligned else "staged anywhere"
        aligned = layout.aligned and all(s % chunk == 0 for s in self.along[name])
        if part.group == 1:
            return "single"
        if aligned and not part.ragged:
            return "whole"
        if self.machine.realigned and part.chunks and chunk == ACCESS and size == 2:
            return "realigned"
        return "shifted" if part.group * size <= ACCESS else "single"

    def _in_tiles(self, name, layout, part, size):
        """Whether blocks copy their rows of an array: lanes would take parts of sectors.

        Or would ask for a second array late (`_comes_late`).
        """
        row, side_by_side = self.classes * size, part.lanes * part.group * size
        apart = side_by_side < SECTOR or self._comes_late(part, size)
        # Lanes that have just a sector may meet parts of two: too much for halves one by one, which
        # take many accesses, and where results are written by parts of an access.
        if part.group * size == 2 or ("out" in self.layouts and part.group * size < ACCESS):
            apart = apart or side_by_side == SECTOR
        if layout.aligned:
            apart = apart and BLOCK // part.lanes * row % ACCESS == 0  # every block's rows begin so
        elif not self.machine.realigned:
            return False
        else:
            # Groups' elements would come one by one, those of neighbouring lanes from more lines.
            apart = apart or (part.group > 1 and (size == 2 or side_by_side <= LINE))
        whole = part.single and part.span >= self.classes  # of one label's logit it is not
        return whole and apart and self.along[name] == [row] and row > self._alone(part, size)

    def _comes_late(self, part, size):
        """Whether lanes that read two arrays by parts of an access would wait for many a latency.

        ptxas has not the registers to ask for all of the second one before the first one's sum.
        """
        if "y" not in self.layouts or part.group * size >= ACCESS:
            return False
        if self.operation == "softmax_backward":
            return size < 8
        return self.operation == "log_softmax_backward" or size == 2 or part.group == 1

    def _alone(self, part, size):
        """Bytes of a row that a lane had better read where it lies."""
        if part.group > 1 or size not in ALONE:
            return SECTOR
        simple, reduced, labelled = ALONE[size]
        if self.operation.endswith("softmax_backward"):
            return simple
        return labelled if "labels" in self.layouts else reduced


SECTOR, LINE = 32, 128
"""Bytes that L2 and DRAM move at once; that L1 looks up at once."""
ALONE = {2: (12, 16, 20), 4: (24, 24, 24)}
"""Bytes of a row of halves, of float32, one by one that a lane had better read where it lies: of
two whose products are summed; of one whose exponentials are; with labels, of which there is more to
do."""
BESIDE = 16
"""Registers that a lane takes beside one for each load."""
FEW_LOST = 4
"""Neighbouring halves that, read one by one, find in L1 what the others left: more wait for L1."""


def _registers(part):
    """Of a lane that reads halves one by one, a register for each load, about."""
    return -(-(part.held + BESIDE) // 8) * 8


def _roomy(part, threads):
    """Blocks of so many threads, a register for each load, that find registers; 0 to not tell."""
    if part.group > FEW_LOST and not part.chunks:
        return 0
    blocks = REGISTERS / (_registers(part) * threads)
    # In rounds a lane had better find too many than too few.
    return max(1, int(blocks) if part.chunks else round(blocks))


def _size(kind):
    return 2 if kind == "bf" else int(kind[1])


def _contiguous(shape, size):
    strides = []
    for n in reversed(shape):
        strides.append(size)
        size *= max(n, 1)
    return tuple(reversed(strides))


def _joined(shape, strides):
    """The axes in the order of the first array's strides, those that walk on joined.

    Returns their sizes, and the steps of each array along them; always one axis at least.
    """
    axes = [d for d in range(len(shape)) if shape[d] != 1]
    axes.sort(key=lambda d: [-abs(s[d]) for s in strides])
    sizes, steps = arrays.joined_axes(shape, axes, strides)
    if not sizes:
        return [1], [[0] for _ in strides]
    return sizes, steps


# ---------------------------------------------------------------- from a Spec to a kernel


def build(spec):
    """The Python function of a kernel, and the kinds of its arguments ("i8" or "f8")."""
    kernel = kernel_of(spec)
    return kernel.function(), tuple(kernel.args.values())


@functools.lru_cache(maxsize=4096)
def kernel_of(spec):
    """The Kernel that a Spec describes."""
    params = dict(spec.params)
    if spec.kernel in copies.KERNELS:
        return copies.kernel(spec.kernel, params)
    if spec.kernel in totals.KERNELS:
        return totals.kernel(spec.kernel, params)
    return _row_kernel(spec.kernel, params)


_ACCESS = {
    "whole": Whole,
    "single": Single,
    "shifted": Shifted,
    "strided": Strided,
    "numbers": Numbers,
    "staged": Staged,
    "staged anywhere": StagedAnywhere,
    "realigned": Realigned,
    "abreast": Abreast,
}


def _made(operation, params):
    """The operation of `kernels`, and how it gets at its elements."""
    elem, options, arrays = params["elem"], dict(params["options"]), dict(params["arrays"])
    part, modes = Partition(*params["part"]), dict(params["modes"])
    formats = {n: Format(kind, elem if n in modes else "f8") for n, kind in arrays.items() if kind}
    if params["weight"]:
        formats["weight"] = Format(params["weight"], "f8")
    access = {}
    for n, mode in modes.items():
        more = (params["together"],) if mode == "abreast" else ()
        access[n] = _ACCESS[mode](formats[n], part, *more)
    added = params["added"] and Sums(*params["added"])
    op = _operation(operation, elem, params["dimensions"], tuple(arrays), formats, options, added)
    op.added, op.result, op.narrow = added, params["result"], params["narrow"]
    op.counted, op.dense = params["counted"], params["dense"]
    op.halves = elem == "f4" and arrays.get("x") in ("f2", "bf")
    op.rough = elem == "f4" and arrays.get("out") in ("f2", "bf")
    op.anew = op.halves and op.exponential and op.rough
    keeps = op.exponential and "out" in arrays and not op.anew
    op.by_pairs = op.halves and op.softmax and not (op.linear or keeps)
    op.keeps = op.relative and arrays.get("x") == "f4"
    if op.by_pairs:
        op.twice = ("x",)
    if "x" in access and op.softmax:
        access["x"].format = Format(arrays["x"], elem, fill=-math.inf)
    if "x" in access and not (op.softmax or op.sums or "out" in access):
        del access["x"]
    if "weight" in formats and options.get("soft", options.get("smooth")):
        access["w"] = Numbers(Format(params["weight"], elem), part)
    return op, access


def _row_kernel(operation, params):
    op, access = _made(operation.removesuffix("_parts"), params)
    part, way = Partition(*params["part"]), Way(*params["way"])
    options, arrays = dict(params["options"]), dict(params["arrays"])
    walker = Gathered if way.gathers else Ahead if way.kept == "ahead" else Rows
    walk = (Columns if params["walker"] == "columns" else walker)(part, way, access)
    modes = dict(params["modes"])
    args = {}
    for name in arrays:
        if name != "number":
            args[name] = "i8"
        for d in range(params["dimensions"]):
            args[f"{name}_step{d}"] = "i8"
        if name in modes:
            args[f"{name}_class"] = "i8"
    for d in range(1, params["dimensions"]):
        args |= {f"size{d}": "i8", f"inverse{d}": "f8"}
    if params["weight"]:
        args |= {"weight": "i8", "weight_class": "i8"}
    args |= {"rows": "i8", "classes": "i8"}
    if op.added:
        args["loss" if op.result else "row_loss"] = "i8"
    if options.get("ignores"):
        args["ignore_index"] = "i8"
    if "labels" in arrays:
        args["bad"] = "i8"
    if isinstance(op, kernels.CrossEntropy) and not op.whole:
        args |= {"keep": "f8", "spread": "f8"}
    if isinstance(op, (kernels.CrossEntropy, kernels.NllBackward)) and "out" in arrays:
        counts = options.get("reduction") == "mean" and not options.get("soft")
        if op.counted:
            args |= totals.counted_args(dict(op.counted))
        else:
            args |= {"divisor": "i8"} if counts else {"scale": "f8"}
    if way.stage != "all" or way.meets(width(op)):
        args["shares"] = "i8"
    if way.meets(width(op)):
        args["meetings"] = "i8"
    if part.chunks:
        args |= {"parts": "i8", "joins": "i8"}
    if way.kept != "registers":
        args["rounds"] = "i8"
    if way.kept == "partly":
        args["shelved"] = "i8"
    if way.kept == "ahead":
        args |= {"places": "i8", "turns": "i8", "stride": "i8"}
    if way.spread:
        args |= {"blocks": "i8", "blocks_inverse": "f8"}
    return Kernel(operation, functools.partial(_run, walk, op), args)


def _run(walk, op, frame):
    walk.run(frame, op)


def _operation(operation, elem, dimensions, arrays, formats, options, added):
    common = elem, dimensions, arrays
    simple = {
        "log_softmax": kernels.LogSoftmax,
        "softmax": kernels.Softmax,
        "log_softmax_backward": kernels.LogSoftmaxBackward,
        "softmax_backward": kernels.SoftmaxBackward,
    }
    if operation in simple:
        return simple[operation](*common)
    if operation == "logsumexp":
        return kernels.LogSumExp(*common, formats["row_lse"])
    labels = None
    if "labels" in formats:
        labels = kernels.Labels(formats["labels"], options.get("ignores", False))
    if operation == "nll":
        return kernels.Nll(*common, formats, labels)
    if operation == "nll_backward":
        return kernels.NllBackward(*common, formats, labels)
    given = options.get("given", False)
    soft = options.get("soft", False)
    return kernels.CrossEntropy(
        *common,
        formats,
        labels,
        soft=soft,
        smooth=options.get("smooth", False) and not soft,
        loss="loss" in formats or added is not None,
        lse="row_lse" in formats and not given,
        given=given,
        grad="out" in formats,
        mean=soft and options.get("reduction") == "mean",
    )
