"""The walker for columns: rows lie side by side, and every lane takes a row of its own.

A lane goes through its row slot by slot, where slot l is what lane l of `rows` would have, and adds
the slots' sums in the same tree. So a row has the same bits however it lies in memory.
"""

from numbakern.cuda.device import (
    constant,
    convert,
    larger,
    max_tree,
    repeat,
    smaller_integer,
    sum_tree,
    where,
)
from numbakern.cuda.rows import Partition
from numbakern.cuda.softmax import Share, in_chunk, join_chunks, nothing_yet

HELD = 32
"""Elements that a lane keeps in registers at most."""


class Columns:
    """Walks rows a lane each, in the order of a Partition.

    Parameters
    ----------
    part : Partition
    x, y, w, out : memory.Strided or None
        How the inputs, the class weights and the output lie.
    """

    threads = 128

    def __init__(self, part: Partition, x, y, w, out):
        self.part, self.x, self.y, self.w, self.out = part, x, y, w, out
        self.held = not part.chunks and part.lanes * part.vectors * part.group <= HELD

    def run(self, frame, op):
        """Run an operation of `kernels` on the rows of this block."""
        p = frame.block * self.threads + convert(frame.thread, "i8")
        ok = p < frame.rows
        p = smaller_integer(p, frame.rows - 1)
        row = op.row(frame, p, ok, constant(p, True, "b1"))
        part = self.part
        span = part.lanes * part.vectors * part.group
        counted = convert(frame.classes + (span - 1), "f8") * (1.0 / span)
        chunks = convert(counted, "i8") if part.chunks else constant(p, 1, "i8")
        walk = _Walk(self, op, row, chunks)
        reduced = None
        if op.softmax:
            reduced = walk.softmax()
        elif op.sums:
            reduced = walk.sums()
        params = op.finish(row, reduced)
        if self.out is not None:
            walk.sweep(params)


class _Walk:
    """A lane's way through its row."""

    def __init__(self, walker, op, row, chunks):
        self.walker, self.op, self.row, self.chunks = walker, op, row, chunks
        self.part = walker.part
        self.kept = None
        if walker.held and (op.softmax or op.sums or walker.out):
            self.kept = [
                self._load(constant(chunks, 0, "i8"), slot) for slot in range(self.part.lanes)
            ]

    def _load(self, chunk, slot):
        """The groups of a slot in a chunk, as Rows has them."""
        part, groups = self.part, []
        for v in range(part.vectors):
            at = (chunk * part.vectors + v) * part.lanes + slot
            j = at * part.group
            groups.append((j, *(self._group(name, j) for name in ("x", "y", "w"))))
        return groups

    def _group(self, name, j):
        access = getattr(self.walker, name)
        if access is None:
            return lambda: [None] * self.part.group
        start, step = self.row.places[name]
        return access.load(start, step, j, self.row.classes)

    def _numbers(self, groups):
        for j, x, y, w in groups:
            for i, values in enumerate(zip(x(), y(), w(), strict=True)):
                yield j + i, *values

    def _slots(self, visit, *state):
        """State after ``state = visit(slot, *state)`` for all slots."""
        if self.kept is None:
            return repeat(constant(self.chunks, self.part.lanes, "i8"), visit, *state)
        for slot in range(self.part.lanes):
            state = visit(slot, *state)
        return state

    def _groups(self, chunk, slot):
        return self._load(chunk, slot) if self.kept is None else self.kept[slot]

    def _chunks(self, visit, *state):
        if not self.part.chunks:
            return visit(constant(self.chunks, 0, "i8"), *state)
        return repeat(self.chunks, visit, *state)

    def _max(self):
        def in_slot(slot, m):
            def largest(chunk, m):
                numbers = self._numbers(self._groups(chunk, slot))
                return (larger(m, max_tree(x for _, x, _, _ in numbers)),)

            return self._chunks(largest, m)

        (m,) = self._slots(in_slot, constant(self.chunks, float("-inf"), self.op.elem))
        return convert(m, "f8")

    def softmax(self):
        """(m, Share) of the row."""
        op, row, m = self.op, self.row, self._max()

        def share(slot):
            if not self.part.chunks:
                return in_chunk(op, row, self._numbers(self._groups(self.chunks * 0, slot)), m)

            def absorb(chunk, top, *state):
                groups = self._groups(chunk, slot)
                here = convert(max_tree(x for _, x, _, _ in self._numbers(groups)), "f8")
                here = larger(top, here)
                new = in_chunk(op, row, self._numbers(groups), here)
                joined = join_chunks(op, top, Share(*state), here, new)
                return here, *joined.known

            top, *state = self._chunks(absorb, *nothing_yet(op, self.chunks))
            return join_chunks(op, top, Share(*state), m, None)

        zeros = nothing_yet(op, self.chunks)[1:]
        return m, Share(*self._add_slots(lambda slot: share(slot).known, zeros))

    def sums(self):
        """Σ of the operation's terms."""
        op, row, zero = self.op, self.row, constant(self.chunks, 0.0, "f8")

        def total(slot):
            def add(chunk, total):
                groups = self._groups(chunk, slot)
                terms = [
                    where(j < row.classes, op.term(row, x, y, w), 0.0)
                    for j, x, y, w in self._numbers(groups)
                ]
                return (total + sum_tree(terms),)

            if self.part.chunks:
                return self._chunks(add, zero)
            (own,) = add(constant(self.chunks, 0, "i8"), constant(zero, -0.0, "f8"))
            return (own,)

        return self._add_slots(total, (zero,))[0]

    def _add_slots(self, values, zeros):
        """Add what `values(slot)` gives over all slots, in the tree of `reduce.team_fold`.

        A binary counter: a sum of 2**b slots waits at level b until its neighbour is complete.
        """
        levels = self.part.lanes.bit_length() - 1
        if self.kept is not None:
            parts = [values(slot) for slot in range(self.part.lanes)]
            return [sum_tree(part) for part in zip(*parts, strict=True)]

        def visit(slot, *state):
            waiting = [state[i : i + len(zeros)] for i in range(0, len(state), len(zeros))]
            carry = values(slot)
            for b in range(levels):
                complete = ((slot >> b) & 1) != 0
                merged = tuple(w + c for w, c in zip(waiting[b], carry, strict=True))
                arrives = self._arrives(slot, b)
                waiting[b] = tuple(
                    where(arrives & ~complete, c, w) for w, c in zip(waiting[b], carry, strict=True)
                )
                carry = tuple(
                    where(arrives & complete, s, c) for s, c in zip(merged, carry, strict=True)
                )
            return tuple(v for level in [*waiting[:levels], carry] for v in level)

        state = self._slots(visit, *(zeros * (levels + 1)))
        return state[len(zeros) * levels :]

    def _arrives(self, slot, b):
        """Whether the sum that a slot completes reaches level b: bits below b are all ones."""
        low = (1 << b) - 1
        return (slot & low) == low

    def sweep(self, params):
        """Map every element and write it."""
        op, row, walker = self.op, self.row, self.walker
        start, step = row.places["out"]

        def in_slot(slot):
            def put(chunk):
                for j, x, y, w in self._groups(chunk, slot):
                    numbers = [
                        op.value(params, j, i, *values)
                        for i, values in enumerate(zip(x(), y(), w(), strict=True))
                    ]
                    walker.out.store(start, step, j, row.width, numbers, row.ok, None)
                return ()

            self._chunks(put)
            return ()

        self._slots(in_slot)
