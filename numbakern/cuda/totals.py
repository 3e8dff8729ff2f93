"""Sums over one value a row, in a fixed order: the mean and sum of losses, the mean's divisor.

Block b of the first step adds the rows b·SPAN … (b + 1)·SPAN − 1; a second step of one block adds
what these leave. Rounding errors are kept, so that a sum is right to an ulp.
"""

from numbakern.cuda.device import (
    Kernel,
    barrier,
    constant,
    convert,
    float_of,
    load,
    repeat,
    shared,
    shared_load,
    shared_store,
    shuffle_xor,
    store,
    where,
)
from numbakern.cuda.kernels import quotient
from numbakern.cuda.memory import Format
from numbakern.cuda.reduce import WARP, offsets
from numbakern.vmath import two_sum

BLOCK = 256
EACH = 8
"""Rows of a thread in the first step."""
SPAN = BLOCK * EACH
KERNELS = ("total", "count", "combine")


def kernel(name, params):
    """The kernel `name`: "total" of row_loss, "count" of labels, "combine" of what these leave."""
    args, source = {}, params.get("parts", name)
    if name == "total":
        args = {"row_loss": "i8", "rows": "i8"}
        items = _losses
    elif name == "count":
        args, items = _count_args(params), _Weights(params)
    else:
        args = {f"{source}_parts": "i8", f"{source}_count": "i8"}
        items = None
    result = params.get("result")
    if result:
        args[result] = "i8"
        division = params["division"]
        if division != "none":
            args[division] = "i8"
    elif name != "combine":
        args[f"{source}_parts"] = "i8"

    def body(frame):
        parts = getattr(frame, f"{source}_parts") if not result or name == "combine" else None
        s, e = _combined(frame, parts, source) if items is None else _first(frame, items)
        s, e = _block_sum(frame.thread, s, e)
        leader = frame.thread == 0
        if not result:
            at = parts + (frame.block << 4)
            store(at, 8, [_bits(s), _bits(e)], leader)
            return
        value = s + where(e == e, e, 0.0)
        if division == "divisor":
            value = quotient(value, float_of(load(frame.divisor, 8, 1)[0]))
        elif division == "rows":
            value = quotient(value, convert(frame.rows, "f8"))
        Format(params["kind"], "f8").put(getattr(frame, result), value, leader)

    return Kernel(name, body, args)


def _bits(v):
    return v.like(v.machine.bitcast(v.value, "f8", "i8"), "i8")


def _losses(frame, i, there):
    """The loss of row i."""
    return float_of(load(frame.row_loss + (i << 3), 8, 1, there)[0])


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

    def __init__(self, params):
        self.labels, self.params = Format(params["labels"], "f8"), params
        self.weight = params["weight"] and Format(params["weight"], "f8")

    def __call__(self, frame, i, there):
        counts = _Prefixed(frame, "count_")
        (at,) = offsets(counts, where(there, i, 0), self.params["dimensions"], ("labels",))
        t = self.labels.integer(load(frame.labels + at, self.labels.size, 1, there)[0])
        counted = there & (t >= 0) & (t < frame.classes)
        if self.params["ignores"]:
            counted = counted & (t != frame.ignore_index)
        one = constant(frame.rows, 1.0, "f8")
        if self.weight:
            at = frame.weight + where(counted, t, 0) * frame.weight_class
            one = self.weight.get(at, counted)
        return where(counted, one, 0.0)


class _Prefixed:
    """A Frame whose names start with a prefix."""

    def __init__(self, frame, prefix):
        self._frame, self._prefix = frame, prefix

    def __getattr__(self, name):
        return getattr(self._frame, self._prefix + name)


def _first(frame, items):
    """A thread's sum of its rows."""
    s = e = constant(frame.rows, 0.0, "f8")
    first = frame.block * SPAN + convert(frame.thread, "i8")
    for n in range(EACH):
        i = first + n * BLOCK
        s, rounded = two_sum(s, items(frame, i, i < frame.rows))
        e = e + rounded
    return s, e


def _combined(frame, parts, source):
    """A thread's sum of the blocks' sums."""
    count, thread = getattr(frame, f"{source}_count"), convert(frame.thread, "i8")
    rounds = convert(convert(count + (BLOCK - 1), "f8") * (1.0 / BLOCK), "i8")

    def add(i, s, e):
        at = i * BLOCK + thread
        part, low = load(parts + (at << 4), 8, 2, at < count)
        s, rounded = two_sum(s, float_of(part))
        return s, e + (rounded + float_of(low))

    zero = constant(count, 0.0, "f8")
    return repeat(rounds, add, zero, zero)


def _block_sum(thread, s, e):
    """The block's sum, in all lanes of the first warp."""

    def join(s, e, other_s, other_e):
        s, rounded = two_sum(s, other_s)
        return s, (e + other_e) + rounded

    offset = 1
    while offset < WARP:
        s, e = join(s, e, shuffle_xor(s, offset), shuffle_xor(e, offset))
        offset *= 2
    warps, lane = BLOCK // WARP, thread & (WARP - 1)
    high, low = shared(thread, 8 * warps), shared(thread, 8 * warps)
    at = (thread >> 5) << 3
    shared_store(high + at, s, lane == 0)
    shared_store(low + at, e, lane == 0)
    barrier(thread)
    at = (lane & (warps - 1)) << 3
    s, e = shared_load(high + at), shared_load(low + at)
    offset = 1
    while offset < warps:
        s, e = join(s, e, shuffle_xor(s, offset), shuffle_xor(e, offset))
        offset *= 2
    return s, e
