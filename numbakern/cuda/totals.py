"""Sums over the rows of a batch: the sum and mean of losses, the mean's divisor.

Rows are added in a binary tree over their numbers, neighbours first. So who has a run of rows may
add it up: the warp that has made their losses (`node_of`), or a step of its own, whose blocks leave
a sum each to the next step. The bits are the same. Sums are float64; where the losses are float64
themselves, what additions round away is kept beside them, so that a sum is right to an ulp.

A launch behind another takes longer than adding up a few hundred numbers. So of few rows every
block that needs the divisor adds it up itself (`Counted`), and a warp that has all rows of the
batch makes of their sum what a last step would (`put_result`).
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
    smaller_integer,
    store,
    sum_tree,
    tree,
    when,
    where,
    within,
)
from numbakern.cuda.memory import Format
from numbakern.cuda.reduce import WARP, offsets
from numbakern.vmath import exact_sum, is_finite, whole_sum

BLOCK, EACH = 256, 8
"""Threads of a step's blocks, and items of each."""
LARGE, MOST = 1024, 16
"""The same of a block that is alone, at most; half of them where each is a sum in two parts."""
SPAN = BLOCK * EACH
KERNELS = ("total", "count")
COUNTED = 1024
"""Rows of a batch, at most, of which each block adds up the labels' weights itself: a small block's
threads read eight each."""
ROOM = 512
"""Bytes of shared memory that it takes for that: two numbers of each warp, at most."""


def quotient(a, b):
    """a / b of float64, as IEEE has it for b of infinity; NaN for 0, the mean of nothing."""
    size = float_of(bits_of(b) & 0x7FFFFFFFFFFFFFFF)
    q = divide(a, where(size == 0.0, 1.0, size))
    q = where(is_finite(a), q, a)
    q = where(b < 0.0, -q, q)
    q = where(size == math.inf, where(is_finite(a), constant(a, 0.0, "f8"), math.nan), q)
    return where(size == 0.0, math.nan, q)


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
        pairs = zip(first, second, strict=True)
        return [exact_sum(a, b) if self.exact else (a[0] + b[0],) for a, b in pairs]

    def over_lanes(self, node, first, end):
        """The node of neighbouring lanes, from teams of `first` lanes to those of `end`."""
        while first < end:
            other = [tuple(shuffle_xor(v, first) for v in numbers) for numbers in node]
            node, first = self.joined(node, other), 2 * first
        return node


def node_of(sums, row, values):
    """What a warp's rows come to, `sums.rows` of them side by side in its lanes; who writes it.

    Of neighbouring ones that a lane has, once the last of them is given; None before.

    Parameters
    ----------
    values : list of Value
        The row's, as many as there are sums; every lane of the row has them. A mask is 1 or 0.

    Returns
    -------
    node
        As the first lane of its rows has it, or the leader of a row that is one.
    leader : Value
        Whether the lane is that.
    """
    if sums.rows == 1:
        return [_of_rows(sums, row, [v], 1) for v in values], row.leader
    found = row.beside.known.setdefault("row_loss", [])
    found.append(values)
    if len(found) < row.beside.count:
        return None
    end = row.lanes * sums.rows // len(found)
    node = [_of_rows(sums, row, list(v), end) for v in zip(*found, strict=True)]
    return node, row.leader & ((row.lane & (end - 1)) == 0)


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


def divisor_of(frame, division):
    """What a sum is divided by: the number of "rows", or the "divisor"; None for nothing else."""
    if division == "rows":
        return convert(frame.rows, "f8")
    return float_of(load(frame.divisor, 8, 1)[0]) if division == "divisor" else None


def put_result(node, address, kind, divisor, leader):
    """Write what all rows come to, over the second sum or else such a number, if there is one."""
    value, *others = map(_whole, node)
    for number in others or [divisor]:
        value = value if number is None else quotient(value, number)
    Format(kind, "f8").put(address, value, leader)
    return value


def _whole(numbers):
    """A sum of a node."""
    return whole_sum(*numbers) if numbers[1:] else numbers[0]


# ---------------------------------------------------------------- steps


def shape_for(count, sums):
    """Of one block that adds up so many items: threads, and items of each; None for several."""
    threads, each = BLOCK, EACH
    while threads * each < count and threads < LARGE:
        threads *= 2
    while threads * each < count and each < MOST // (2 if sums.exact else 1):
        each *= 2
    return (threads, each) if threads * each >= count else None


def kernel(name, params):
    """The kernel `name` of a step: "count" adds up labels' weights, "total" nodes in memory.

    It leaves nodes of its own, a block each, or as one block the result, of which `division` says
    what it is divided by: nothing, the "second" sum, or `divisor_of` it. `shape`: threads of a
    block, and items of each.
    A divisor has behind it what it makes of the gradients' scale.
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
        args |= _scale_args(params)

    def body(frame):
        items = _Weights(frame, params) if name == "count" else _Nodes(frame, params, sums)
        threads, each = params["shape"]
        divisor = divisor_of(frame, division)  # asked for before the items
        numbers = _numbers(frame.thread, each, frame.block * (threads * each))
        node = _of_warp(sums, items(numbers), frame.thread)
        node, leader = _of_block(frame, sums, node, threads // WARP), frame.thread == 0
        if not result:
            left = sums._replace(rows=sums.rows * SPAN)
            left.store(getattr(frame, params["target"]) + frame.block * left.size, node, leader)
            return
        at = getattr(frame, result)
        value = put_result(node, at, params["kind"], divisor, leader)
        if result == "divisor":
            scale = quotient(_scale(frame, params), value)
            store(at + 8, 8, [bits_of(scale)], leader)

    return Kernel(name, body, args)


def _numbers(thread, each, first=0):
    """The numbers of a lane's items: neighbours are in one access of neighbouring lanes."""
    lane = thread & (WARP - 1)
    first = convert((thread - lane) * each + lane, "i8") + first
    return [first + i * WARP for i in range(each)]


class _Nodes:
    """The nodes that a step before this one has left."""

    def __init__(self, frame, params, sums):
        self.first = getattr(frame, params["source"])
        self.count = getattr(frame, f"{params['source']}_count")
        self.sums = sums

    def __call__(self, numbers):
        return [self._node(i) for i in numbers]

    def _node(self, i):
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


def _scale_args(params):
    return {"scale": "f8"} | ({"row_scale": "i8"} if params["upstream"] else {})


def _scale(frame, params):
    """The gradients' scale, times the array `upstream` of such a kind if there is one."""
    if not params["upstream"]:
        return frame.scale
    return frame.scale * Format(params["upstream"], "f8").get(frame.row_scale)


class _Weights:
    """The weights of rows' labels as nodes: 0 for one that is ignored or no class."""

    def __init__(self, frame, params):
        self.frame, self.labels, self.params = frame, Format(params["labels"], "f8"), params
        self.weight = params["weight"] and Format(params["weight"], "f8")

    def __call__(self, numbers):
        return self.of(numbers, self.read(numbers))

    def read(self, numbers):
        """The labels as they lie in memory; of a row that there is not, the last one's."""
        return [self._read(i) for i in numbers]

    def _read(self, i):
        frame = self.frame
        row = smaller_integer(i, frame.rows - 1)
        (at,) = offsets(_Prefixed(frame, "count_"), row, self.params["dimensions"], ("labels",))
        return load(frame.labels + at, self.labels.size, 1)[0]

    def of(self, numbers, labels):
        """The nodes of such labels."""
        return [self._of(i, raw) for i, raw in zip(numbers, labels, strict=True)]

    def _of(self, i, raw):
        frame, t = self.frame, self.labels.integer(raw)
        counted = (i < frame.rows) & within(t, frame.classes)
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


def _of_warp(sums, nodes, thread):
    """The node of a warp, lane l of which has number l of each so many neighbours, a power of two.

    Neighbouring lanes join each other's, one those of the first of two runs, one of the second.
    """
    each, offset = len(nodes), 1
    while len(nodes) > 1:
        second = (thread & offset) > 0
        pairs = zip(nodes[::2], nodes[1::2], strict=True)
        nodes = [_exchanged(sums, *pair, second, offset) for pair in pairs]
        offset *= 2
    # Lane l has what is the same in its last bits of run number l & (each − 1).
    (node,) = nodes
    return sums.over_lanes(sums.over_lanes(node, each, WARP), 1, each)


def _exchanged(sums, first, second, is_second, offset):
    """Joined with the other lane's: the first node, or the second."""
    pairs = [list(zip(a, b, strict=True)) for a, b in zip(first, second, strict=True)]
    own = [tuple(where(is_second, b, a) for a, b in numbers) for numbers in pairs]
    other = [
        tuple(shuffle_xor(where(is_second, a, b), offset) for a, b in numbers) for numbers in pairs
    ]
    return sums.joined(own, other)


def _of_block(frame, sums, node, warps):
    """The node of a block's first warps, a power of two, which all lanes have."""
    thread = frame.thread
    warp, lane = thread >> 5, thread & (WARP - 1)
    places = [[shared(thread, 8 * warps) for _ in numbers] for numbers in node]
    for numbers, where_to in zip(node, places, strict=True):
        for v, place in zip(numbers, where_to, strict=True):
            shared_store(place + (warp << 3), v, (lane == 0) & (warp < warps))
    barrier(thread)
    at = (lane & (warps - 1)) << 3
    node = [tuple(shared_load(place + at) for place in where_to) for where_to in places]
    return sums.over_lanes(node, 1, warps)


# ---------------------------------------------------------------- in the rows' own launch


def counted(params, threads):
    """The parameters of a `Counted` for blocks of so many threads: with the labels of each."""
    each = 1
    while each * threads < COUNTED:
        each *= 2
    return *params, ("each", each)


def counted_args(params):
    """The arguments that a kernel with a `Counted` has for it."""
    return _count_args(params) | _scale_args(params)


class Counted:
    """The scale of a block's gradients, over the weights of all labels of the batch.

    The bits are those of the steps that leave it in memory: it is the same tree. Each thread reads
    a few labels, and waits for none of them before `scale`.

    Parameters
    ----------
    frame : device.Frame
    params : dict
        Those of the kernel "count", and `upstream` and `each`.
    """

    def __init__(self, frame, params):
        self.frame, self.params = frame, params
        self.weights = _Weights(frame, params)
        self.numbers = _numbers(frame.thread, params["each"])
        first = convert((frame.thread & -WARP) * params["each"], "i8")
        self.there = first < frame.rows  # of any lane of the warp
        self.labels = self.weights.read(self.numbers)

    def scale(self):
        """The scale; all threads of the block wait for one another."""
        sums, warps = Sums(*self.params["sums"]), COUNTED // (WARP * self.params["each"])

        def compute():
            nodes = self.weights.of(self.numbers, self.labels)
            return _of_warp(sums, nodes, self.frame.thread)[0]

        nothing = [constant(self.numbers[0], 0.0, "f8")] * (2 if sums.exact else 1)
        node = [tuple(when(self.there, compute, nothing))]
        (numbers,) = _of_block(self.frame, sums, node, warps)
        return quotient(_scale(self.frame, self.params), _whole(numbers))
