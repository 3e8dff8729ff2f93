"""Sums over the rows of a batch: the sum and mean of losses, the mean's divisor.

Rows are added in a binary tree over their numbers, neighbours first. So who has a run of rows may
add it up: the warp that has made their losses (`put_row`), or a step of its own, whose blocks leave
a sum each to the next step. The bits are the same. Sums are float64; where the losses are float64
themselves, what additions round away is kept beside them, so that a sum is right to an ulp.
"""

import math
from typing import NamedTuple

from numbakern.cuda.device import (
    Kernel,
    barrier,
    bits_of,
    constant,
    convert,
    count_lanes,
    divide,
    float_of,
    load,
    shared,
    shared_load,
    shared_store,
    shuffle_xor,
    store,
    sum_tree,
    tree,
    where,
)
from numbakern.cuda.memory import Format
from numbakern.cuda.reduce import WARP, offsets
from numbakern.vmath import is_finite, two_sum, whole_sum

BLOCK = 256
EACH = 8
"""Items of a thread in a step."""
SPAN = BLOCK * EACH
KERNELS = ("total", "count")


def quotient(a, b):
    """a / b of float64, as IEEE has it for b of 0 and infinity."""
    size = float_of(bits_of(b) & 0x7FFFFFFFFFFFFFFF)
    q = divide(a, where(size == 0.0, 1.0, size))
    q = where(is_finite(a), q, a)
    q = where(b < 0.0, -q, q)
    q = where(size == math.inf, where(is_finite(a), constant(a, 0.0, "f8"), math.nan), q)
    return where(size == 0.0, a * math.inf, q)


# ---------------------------------------------------------------- sums


class Sums(NamedTuple):
    """What is added up, and how it lies in memory.

    Attributes
    ----------
    terms : int
        How many: the sum of losses, or that and the sum of their labels' weights.
    exact : bool
        Whether rounding errors are kept.
    rows : int
        Of each node in memory: a power of two. A single row has no rounding errors.
    """

    terms: int
    exact: bool
    rows: int = 1

    @property
    def numbers(self):
        """Float64 numbers of a node: each sum, and its rounding errors behind it."""
        return self.terms * (2 if self.exact and self.rows > 1 else 1)

    @property
    def size(self):
        """Bytes of a node."""
        return 8 * self.numbers

    def load(self, address, there):
        """The node at this address; 0 where it is not there."""
        found, wide = [], 2 - self.numbers % 2
        for i in range(0, self.numbers, wide):
            found += [float_of(word) for word in load(address + 8 * i, 8, wide, there)]
        each = self.numbers // self.terms
        return [tuple(found[i : i + each]) for i in range(0, len(found), each)]

    def store(self, address, node, mask):
        """Write a node where the mask holds."""
        words = [bits_of(v) for numbers in node for v in numbers]
        wide = 2 - len(words) % 2
        for i in range(0, len(words), wide):
            store(address + 8 * i, 8, words[i : i + wide], mask)

    def joined(self, first, second):
        """The node of the rows of two."""
        return [self._joined(*pair) for pair in zip(first, second, strict=True)]

    def _joined(self, first, second):
        if not self.exact:
            return (first[0] + second[0],)
        s, rounded = two_sum(first[0], second[0])
        for a, b in zip(first[1:], second[1:], strict=True):
            rounded = (a + b) + rounded
        return s, rounded

    def over_lanes(self, node, first, end):
        """The node of neighbouring lanes, from teams of `first` lanes to those of `end`."""
        while first < end:
            other = [tuple(shuffle_xor(v, first) for v in numbers) for numbers in node]
            node, first = self.joined(node, other), 2 * first
        return node


def put_row(sums, address, row, values):
    """Write what a warp's rows come to, `sums.rows` of them side by side in its lanes.

    Of neighbouring ones that a lane has, once the last of them is given.

    Parameters
    ----------
    address : Value
        Of the node, for the first lane of its rows, or for the leader of a row that is one.
    values : list of Value
        The row's, as many as there are sums; every lane of the row has them. A mask is 1 or 0.
    """
    if sums.rows == 1:
        sums.store(address, [_of_rows(sums, row, [v], 1) for v in values], row.leader)
        return
    found = row.beside.known.setdefault("row_loss", [])
    found.append(values)
    if len(found) == row.beside.count:
        end = row.lanes * sums.rows // len(found)
        node = [_of_rows(sums, row, list(v), end) for v in zip(*found, strict=True)]
        sums.store(address, node, row.leader & ((row.lane & (end - 1)) == 0))


def _of_rows(sums, row, values, end):
    """The sum of a node, of the rows of so many lanes: what each lane has, neighbours first."""
    if values[0].elem != "b1":
        of_lane = tree(([(where(row.ok, v, 0.0),)] for v in values), sums.joined)
        return sums.over_lanes(of_lane, row.lanes, end)[0]
    zero = constant(row.number, 0.0, "f8")
    if sums.rows == 1:
        return (where(values[0] & row.ok, constant(zero, 1.0, "f8"), 0.0),)
    count = convert(sum_tree(count_lanes(v & row.leader, end) for v in values), "f8")
    return (count, zero) if sums.exact else (count,)


# ---------------------------------------------------------------- steps


def kernel(name, params):
    """The kernel `name` of a step: "count" adds up labels' weights, "total" nodes in memory.

    It leaves nodes of its own, a block each, or as one block the result, of which `division` says
    what it is divided by: nothing, the "second" sum, the number of "rows", or an array of one.
    A divisor has behind it what it makes of the gradients' scale, times the array `upstream` of
    that kind if there is one.
    """
    sums = Sums(*params["sums"])
    args = _count_args(params) if name == "count" else {params["source"]: "i8"}
    if name == "total":
        args[f"{params['source']}_count"] = "i8"
    result, division = params.get("result"), params.get("division", "none")
    if result:
        args[result] = "i8"
        if division not in ("none", "second"):
            args[division] = "i8"
    else:
        args[params["target"]] = "i8"
    if result == "divisor":
        args["scale"] = "f8"
        if params["upstream"]:
            args["row_scale"] = "i8"

    def body(frame):
        items = _Weights(frame, params) if name == "count" else _Nodes(frame, params, sums)
        node, leader = _of_block(frame, sums, items), frame.thread == 0
        if not result:
            left = sums._replace(rows=sums.rows * SPAN)
            left.store(getattr(frame, params["target"]) + frame.block * left.size, node, leader)
            return
        found = [whole_sum(*numbers) if sums.exact else numbers[0] for numbers in node]
        value = found[0]
        if division == "second":
            value = quotient(value, found[1])
        elif division == "rows":
            value = quotient(value, convert(frame.rows, "f8"))
        elif division != "none":
            value = quotient(value, float_of(load(getattr(frame, division), 8, 1)[0]))
        at = getattr(frame, result)
        Format(params["kind"], "f8").put(at, value, leader)
        if result == "divisor":
            scale = frame.scale
            if params["upstream"]:
                scale = scale * Format(params["upstream"], "f8").get(frame.row_scale)
            store(at + 8, 8, [bits_of(quotient(scale, value))], leader)

    return Kernel(name, body, args)


class _Nodes:
    """The nodes that a step before this one has left."""

    def __init__(self, frame, params, sums):
        self.first = getattr(frame, params["source"])
        self.count = getattr(frame, f"{params['source']}_count")
        self.sums = sums

    def __call__(self, i):
        return self.sums.load(self.first + i * self.sums.size, i < self.count)


def _count_args(params):
    args = {"labels": "i8"}
    for d in range(params["dimensions"]):
        args[f"count_labels_step{d}"] = "i8"
        if d:
            args |= {f"count_size{d}": "i8", f"count_inverse{d}": "f8"}
    if params["ignores"]:
        args["ignore_index"] = "i8"
    if params["weight"]:
        args |= {"weight": "i8", "weight_class": "i8"}
    return args | {"rows": "i8", "classes": "i8"}


class _Weights:
    """The weight of row i's label: 0 for one that is ignored or no class."""

    def __init__(self, frame, params):
        self.frame, self.labels, self.params = frame, Format(params["labels"], "f8"), params
        self.weight = params["weight"] and Format(params["weight"], "f8")

    def __call__(self, i):
        frame = self.frame
        counts, there = _Prefixed(frame, "count_"), i < frame.rows
        (at,) = offsets(counts, where(there, i, 0), self.params["dimensions"], ("labels",))
        t = self.labels.integer(load(frame.labels + at, self.labels.size, 1, there)[0])
        counted = there & (t >= 0) & (t < frame.classes)
        if self.params["ignores"]:
            counted = counted & (t != frame.ignore_index)
        one = constant(frame.rows, 1.0, "f8")
        if self.weight:
            at = frame.weight + where(counted, t, 0) * frame.weight_class
            one = self.weight.get(at, counted)
        return [(where(counted, one, 0.0),)]


class _Prefixed:
    """A Frame whose names start with a prefix."""

    def __init__(self, frame, prefix):
        self._frame, self._prefix = frame, prefix

    def __getattr__(self, name):
        return getattr(self._frame, self._prefix + name)


def _of_block(frame, sums, items):
    """The node of the block's SPAN items, which all lanes of the first warp have."""
    thread = frame.thread
    first = (frame.block * BLOCK + convert(thread, "i8")) * EACH
    node = tree((items(first + n) for n in range(EACH)), sums.joined)
    node = sums.over_lanes(node, 1, WARP)
    warps, lane = BLOCK // WARP, thread & (WARP - 1)
    places = [[shared(thread, 8 * warps) for _ in numbers] for numbers in node]
    for numbers, where_to in zip(node, places, strict=True):
        for v, place in zip(numbers, where_to, strict=True):
            shared_store(place + ((thread >> 5) << 3), v, lane == 0)
    barrier(thread)
    at = (lane & (warps - 1)) << 3
    node = [tuple(shared_load(place + at) for place in where_to) for where_to in places]
    return sums.over_lanes(node, 1, warps)
