"""A GPU thread's values: what kernels compute with, traced into the code of a kernel.

A kernel is a Python function of `Value` objects. It runs once when it is compiled, and operators
and the functions below leave instructions behind; loops are `repeat`. It runs as well on the
machine of the tests, which computes instead, for all threads of a launch at once. So there are no
branches: what concerns some lanes only carries a mask, and nothing can diverge.

Float products are never contracted: `fma` is where a product and a sum round once. So a formula
gives the same bits in every kernel.
"""

import inspect
import itertools
import sys
from typing import Any

SIZE = {"f4": 4, "f8": 8, "i4": 4, "i8": 8}
FLOATS = ("f4", "f8")


class Value:
    """A number of a thread: f4, f8, i4, i8, or b1 for a mask, on a machine.

    Operators take Python numbers for constants. Integers are signed; `>>` is arithmetic.
    """

    __slots__ = ("elem", "machine", "value")
    ops = sys.modules[__name__]  # where `vmath` finds what operators cannot say

    def __init__(self, machine, value, elem):
        self.machine, self.value, self.elem = machine, value, elem

    def like(self, value, elem=None):
        """Another value on this machine."""
        return Value(self.machine, value, elem or self.elem)

    def constant(self, number, elem=None):
        """The machine's constant of this kind."""
        return self.machine.constant(number, elem or self.elem)

    def _binary(self, name, other, swap=False):
        a, b = _together(self, other)
        a, b = (b, a) if swap else (a, b)
        return a.like(a.machine.binary(name, a.value, b.value, a.elem))

    def _compare(self, sign, other):
        a, b = _together(self, other)
        return a.like(a.machine.compare(sign, a.value, b.value, a.elem), "b1")

    def __add__(self, other):
        return self._binary("add", other)

    __radd__ = __add__

    def __sub__(self, other):
        return self._binary("sub", other)

    def __rsub__(self, other):
        return self._binary("sub", other, swap=True)

    def __mul__(self, other):
        return self._binary("mul", other)

    __rmul__ = __mul__

    def __truediv__(self, other):
        a, b = _together(self, other)
        return divide(a, b)

    def __rtruediv__(self, other):
        a, b = _together(self, other)
        return divide(b, a)

    def __neg__(self):
        return self._binary("sub", -0.0 if self.elem in FLOATS else 0, swap=True)

    def __and__(self, other):
        return self._binary("and", other)

    __rand__ = __and__

    def __or__(self, other):
        return self._binary("or", other)

    __ror__ = __or__

    def __xor__(self, other):
        return self._binary("xor", other)

    def __lshift__(self, other):
        return self._binary("shl", other)

    def __rshift__(self, other):
        return self._binary("ashr", other)

    def __invert__(self):
        return self._binary("xor", True if self.elem == "b1" else -1)

    def __lt__(self, other):
        return self._compare("<", other)

    def __le__(self, other):
        return self._compare("<=", other)

    def __gt__(self, other):
        return self._compare(">", other)

    def __ge__(self, other):
        return self._compare(">=", other)

    def __eq__(self, other):
        return self._compare("==", other)

    def __ne__(self, other):
        return self._compare("!=", other)

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self):
        raise TypeError("kernels do not branch on a thread's value: use where, or a mask")


def _together(*values):
    """The values with one kind: numbers become constants, an i4 beside an i8 is widened."""
    given = [v for v in values if isinstance(v, Value)]
    shape = max(given, key=lambda v: v.elem == "i8")
    return [
        convert(v, shape.elem) if isinstance(v, Value) else shape.like(shape.constant(v))
        for v in values
    ]


# ---------------------------------------------------------------- numbers


def constant(of, number, elem):
    """A constant on the machine of another value."""
    return of.like(of.constant(number, elem), elem)


def anything(of, elem):
    """A number that nothing may come of: whatever is in a register."""
    return of.like(of.machine.anything(elem), elem)


def convert(v, elem):
    """As another kind, rounded once; a float as an integer is truncated."""
    if v.elem == elem:
        return v
    if v.elem == "b1" or {v.elem, elem} == {"i4", "f4"}:
        raise TypeError(f"no conversion from {v.elem} to {elem}")
    return v.like(v.machine.convert(v.value, v.elem, elem), elem)


def convert_unsigned(v):
    """A uint64, given as an int64 of the same bits, as float64."""
    return v.like(v.machine.convert(v.value, "u8", "f8"), "f8")


def fma(a, b, c):
    """a·b + c, rounded once."""
    a, b, c = _together(a, b, c)
    return a.like(a.machine.fma(a.value, b.value, c.value, a.elem))


def where(mask, a, b):
    """a where the mask holds, b elsewhere."""
    a, b = _together(a, b)
    return a.like(a.machine.select(mask.value, a.value, b.value, a.elem))


def larger(a, b):
    """The larger of two numbers; NaN if one is."""
    a, b = _together(a, b)
    return a.like(a.machine.maximum(a.value, b.value, a.elem))


def at_least(x, low):
    """x, but no less than `low`; `low` for a NaN."""
    x, low = _together(x, low)
    return x.like(x.machine.at_least(x.value, low.value, x.elem))


def one_below(x, top):
    """1 where x < top, 0 elsewhere, as numbers of their kind."""
    x, top = _together(x, top)
    return x.like(x.machine.one_below(x.value, top.value, x.elem))


def exp2(v):
    """2**v of float32 from −126 to 127, at most 2 ulp off: an instruction of its own."""
    return v.like(v.machine.exp2(v.value))


def within(t, count):
    """Whether an integer is at least 0 and below a count."""
    return t.like(t.machine.within(t.value, count.value), "b1")


def distance(i, step):
    """i·step as an int64; for an int32 i the step fits into 32 bits as well."""
    if i.elem == "i4":
        return i.like(i.machine.wide_product(i.value, narrow(step).value), "i8")
    return i * step


def smaller_integer(a, b):
    """The smaller of two integers."""
    a, b = _together(a, b)
    return where(a < b, a, b)


def polynomial(coefficients, x):
    """Σ coefficients[i]·x**i by Horner's scheme with fma."""
    value = x.like(x.constant(coefficients[-1]))
    for c in reversed(coefficients[:-1]):
        value = fma(value, x, c)
    return value


def bits_of(v):
    """The bits of a float as an integer."""
    elem = {"f4": "i4", "f8": "i8"}[v.elem]
    return v.like(v.machine.bitcast(v.value, v.elem, elem), elem)


def float_of(bits):
    """The float that has these bits."""
    elem = {"i4": "f4", "i8": "f8"}[bits.elem]
    return bits.like(bits.machine.bitcast(bits.value, bits.elem, elem), elem)


def add_exponent(p, t):
    """p · 2**n, n standing in the lowest bits of the mantissa of t; p and the product normal."""
    return float_of(bits_of(p) + (bits_of(t) << (23 if p.elem == "f4" else 52)))


def split_exponent(y):
    """(n, 2**−n) such that y / 2**n is about in [√½, √2), for positive normal float64."""
    one, root = 0x3FF00000, 0x3FE6A09E  # the upper words of 1 and of √½
    above = split(y)[1] - root
    # What is above the 20 bits of the mantissa is n.
    inverse = join(constant(above, 0, "i4"), one - (above & (-1 << 20)))
    return convert(above >> 20, "f8"), inverse


def reciprocal(b):
    """1 / b to an ulp, of a positive normal float64 below 2**1000: no division subroutine."""
    r = float_of(0x7FDE623822FC16E6 - bits_of(b))  # 12 % off; each step squares that
    for _ in range(5):
        r = fma(r, fma(-b, r, 1.0), r)
    return r


def divide(a, b, elem="f8"):
    """a / b of float64, b as in `reciprocal`; rounded correctly but for rare cases.

    For a result of kind "f4": 2**-44 off, for b from 2**-100 to 2**100.
    """
    if elem == "f4":
        r = convert(b.like(b.machine.reciprocal(convert(b, "f4").value), "f4"), "f8")
        return a * fma(r, fma(-b, r, 1.0), r)
    r = reciprocal(b)
    q = a * r
    return fma(fma(-b, q, a), r, q)


def divmod_positive(n, size, inverse):
    """(n // size, n % size) for 0 ≤ n < 2**52, given fl(1 / size): no division subroutine."""
    q = convert(convert(n, "f8") * inverse, "i8")
    q = where(q * size > n, q - 1, q)
    q = where(n - q * size >= size, q + 1, q)
    return q, n - q * size


# ---------------------------------------------------------------- bits


def join(low, high):
    """The float64 in two 32-bit words."""
    return low.like(low.machine.join(low.value, high.value), "f8")


def split(v):
    """The two 32-bit words of a float64 or int64."""
    machine = v.machine
    bits = v if v.elem == "i8" else bits_of(v)
    return tuple(v.like(w, "i4") for w in machine.split(bits.value))


def narrow(v):
    """The low 32 bits of an integer."""
    return v if v.elem == "i4" else v.like(v.machine.convert(v.value, "i8", "i4"), "i4")


def shift_right(v, n):
    """The bits moved right by n, zeros from the left."""
    return v._binary("lshr", n)


def unpack_half(word, high, kind):
    """One of the two halves (f2 or bf) in a word, as float32."""
    if kind == "bf":
        return float_of((word & -0x10000) if high else (word << 16))
    return word.like(word.machine.half_to_single(word.value, high), "f4")


def pack_halves(low, high, kind):
    """Two float32 rounded to halves (f2 or bf) in one word."""
    return low.like(low.machine.pack_halves(low.value, high.value, kind), "i4")


def pair(low, high, upper=False):
    """The low halves of two words, or the upper ones, as one word."""
    return low.like(low.machine.pair(low.value, high.value, upper), "i4")


def funneled(words, bits):
    """The words of 32 bits, one fewer, that begin so many bits behind these: 0 to 32."""
    return [
        low.like(low.machine.funnel(low.value, high.value, bits.value))
        for low, high in itertools.pairwise(words)
    ]


def larger_halves(a, b, kind):
    """The larger of the two halves (f2 or bf) each in two words; NaN if one is."""
    return a.like(a.machine.larger_halves(a.value, b.value, kind))


def equal_halves(a, b, kind):
    """Where two words have equal halves (f2 or bf): all bits of these set, the others not."""
    return a.like(a.machine.equal_halves(a.value, b.value, kind))


# ---------------------------------------------------------------- threads


def shuffle_xor(v, offset):
    """The value of the lane whose number differs in these bits, in this warp."""
    return _by_words(v, lambda w: w.like(w.machine.shuffle_xor(w.value, offset)))


def _by_words(v, move):
    if v.elem == "i4":
        return move(v)
    if v.elem == "f4":
        return float_of(move(bits_of(v)))
    low, high = (move(w) for w in split(v))
    return bits_of(join(low, high)) if v.elem == "i8" else join(low, high)


def count_lanes(mask, lanes):
    """In how many of this lane and those behind it, `lanes` of the warp in all, the mask holds."""
    word = mask.like(mask.machine.ballot(mask.value), "i4")
    if lanes < 32:
        lane = word.like(mask.machine.thread()) & 31
        word = shift_right(word, lane) & ((1 << lanes) - 1)
    return word.like(mask.machine.ones(word.value))


def all_lanes(mask):
    """Whether the mask holds in all lanes of the warp, as a mask."""
    return (~mask).like((~mask).machine.ballot((~mask).value), "i4") == 0


def barrier(of):
    """Wait for all threads of the block."""
    of.machine.barrier()


def warp_barrier(of):
    """Wait for all threads of the warp."""
    of.machine.warp_barrier()


def cluster_barrier(of):
    """Wait for all threads of the cluster's blocks."""
    of.machine.cluster_barrier()


def cluster_start(of):
    """Wait until all of the cluster's blocks run; what they have written is not to be seen yet."""
    of.machine.cluster_start()


def cluster_rank(of):
    """Number of the block in its cluster, int32."""
    return of.like(of.machine.cluster_rank(), "i4")


def repeat(count, body, *state):
    """State after `count` rounds of ``state = body(i, *state)``; the count is that of all threads.

    Parameters
    ----------
    count : Value
        An int64 below 2**31.
    body : function (i, *state) -> tuple
    """
    return count.machine.repeat(count, body, state)


def when(mask, compute, otherwise):
    """What `compute()` gives where the mask holds, `otherwise` elsewhere.

    A branch: lanes of a warp that all do without skip it. So `compute` must not wait, and shuffle
    only where the mask is the same for all lanes of a warp.

    Parameters
    ----------
    compute : function () -> list of Value
        May load and store.
    otherwise : list of Value
        As many, of the same kinds.
    """
    return mask.machine.when(mask, compute, otherwise)


def either(mask, compute, seldom):
    """What `compute()` gives where the mask holds, elsewhere what `seldom()` gives.

    A branch as in `when`, for lists of values as many and of the same kinds. The second one is for
    odd rows, and longer: predicted times are without it.
    """
    return mask.machine.either(mask, compute, seldom)


# ---------------------------------------------------------------- memory


def load(address, size, count, mask=None, fill=0):
    """`count` words of `size` bytes (1, 2, 4 or 8) from an aligned address, in one access.

    Words narrower than 4 bytes come with zeros above. Where the mask does not hold nothing is
    read and every word is `fill`; of None whatever is in a register.
    """
    elem = "i8" if size == 8 else "i4"
    mask = None if mask is None else mask.value
    words = address.machine.load(address.value, size, count, mask, fill)
    return tuple(address.like(w, elem) for w in words)


def prefetch(address, mask, level):
    """Have what lies at this address on its way to L1 or L2, where the mask holds."""
    address.machine.prefetch(address.value, mask.value, level)


def store(address, size, words, mask=None):
    """Write words of `size` bytes to an aligned address in one access, where the mask holds."""
    mask = None if mask is None else mask.value
    address.machine.store(address.value, size, [w.value for w in words], mask)


def atomic_min(address, v, mask):
    """Make the int64 at this address no larger than v, where the mask holds."""
    address.machine.atomic_min(address.value, v.value, mask.value)


def ticket(counter, thread):
    """How many blocks have taken a ticket before, int64, by a uint32 at this address.

    Blocks with smaller ones have started, whatever their numbers: they can be waited for.
    """
    first, place = thread == 0, shared(thread, 4)
    before = counter.like(counter.machine.atomic_add(counter.value, first.value), "i4")
    put_shared_words(place, 4, [before], first)
    barrier(thread)
    return convert(*shared_words(place, 4, 1), "i8")


def meet(counter, blocks, thread):
    """Wait until so many blocks have come here, by a uint32 at this address, of 0 at first.

    What any thread of them has written to global memory before, all can read from then on. Each
    block has to have a `ticket`, and those that meet have consecutive ones.
    """
    barrier(thread)
    counter.machine.arrive(counter.value, blocks.value, (thread == 0).value)
    barrier(thread)


def shared(of, size):
    """Address of `size` bytes of the block's shared memory, for the functions below."""
    return of.like(of.machine.shared(size), "i4")


def dynamic_shared(of):
    """Address of the shared memory whose size comes with the launch."""
    return of.like(of.machine.dynamic_shared(), "i4")


def shared_words(address, size, count, mask=None, fill=0):
    """`count` words of `size` bytes (2, 4 or 8) from an aligned address in shared memory.

    Words of 2 bytes, one at a time, come with zeros above. Mask and fill are those of `load`.
    """
    mask = None if mask is None else mask.value
    words = address.machine.shared_load(address.value, size, count, mask, fill)
    return [address.like(w, "i8" if size == 8 else "i4") for w in words]


def put_shared_words(address, size, words, mask):
    """Write words of `size` bytes (2, 4 or 8) to an aligned address, where the mask holds.

    Of 2 bytes it is one, of a word's lower half.
    """
    address.machine.shared_store(address.value, size, [w.value for w in words], mask.value, None)


def copy_to_shared(place, address, mask=None):
    """Ask for 16 aligned bytes of global memory to be copied to shared memory, under a mask.

    Until the copy has been waited for, what it is of must not change, and nobody may touch the
    place: not even a thread that had read it before, unless something has come of that.
    """
    mask = None if mask is None else mask.value
    place.machine.copy_to_shared(place.value, address.value, mask)


def commit_copies(of):
    """Make what the thread has asked for since the last time a group; one of none counts, too."""
    of.machine.commit_copies()


def await_copies(of, groups):
    """Wait for all of the thread's groups of copies but the last `groups`, a Python number.

    Then the thread finds them in their places; others do behind a barrier.
    """
    of.machine.await_copies(groups)


def shared_load(address):
    """The float64 at this address in shared memory."""
    return float_of(*shared_words(address, 8, 1))


def shared_store(address, v, mask, peer=None):
    """Write a float64 to shared memory, where the mask holds.

    `peer`: number in the cluster of the block whose shared memory it is, None for the own one.
    Between that block's start and the first write stands a `cluster_start`, and between the last
    one and that block's end a `cluster_barrier`.
    """
    peer = None if peer is None else peer.value
    address.machine.shared_store(address.value, 8, [bits_of(v).value], mask.value, peer)


# ---------------------------------------------------------------- kernels


class Kernel:
    """A function of a `Frame` as a kernel: for Numba to compile, for the tests' machine to run.

    Parameters
    ----------
    name : str
    body : function (Frame) -> None
    args : dict of str to {"i8", "f8"}
        The kernel's arguments.
    """

    def __init__(self, name, body, args):
        self.name, self.body, self.args = name, body, dict(args)

    def run(self, machine, values):
        """Trace or compute the kernel on a machine, given its arguments there."""
        pairs = zip(self.args.items(), values, strict=True)
        named = {name: Value(machine, value, elem) for (name, elem), value in pairs}
        self.body(Frame(machine, named))

    def function(self):
        """The kernel as an ordinary Python function of its arguments, which Numba compiles."""
        names = ", ".join(self.args)
        space = {"kernel": self._intrinsic()}
        exec(f"def {self.name}({names}):\n    kernel({names})", space)
        return space[self.name]

    def _intrinsic(self):
        from numbakern.cuda import compile

        compile.numba_cuda()
        from numba import types
        from numba.cuda.extending import intrinsic

        from numbakern.cuda.llvm import LLVM

        def call(typing, *args):
            def codegen(context, builder, sig, values):
                self.run(LLVM(builder, compile.capability()), values)
                return context.get_dummy_value()

            return types.void(*args), codegen

        # Numba binds the arguments by this signature; it cannot pass on *args.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = [inspect.Parameter(name, kind) for name in ("typing", *self.args)]
        call.__signature__ = inspect.Signature(names)
        return intrinsic(call)


class Frame:
    """A kernel's arguments as attributes, and the thread that runs it."""

    def __init__(self, machine, named):
        self.machine, self._named = machine, named

    def __getattr__(self, name):
        try:
            return self._named[name]
        except KeyError:
            raise AttributeError(f"this kernel has no argument {name}") from None

    def __contains__(self, name):
        return name in self._named

    def constant(self, number, elem):
        """A constant."""
        return Value(self.machine, self.machine.constant(number, elem), elem)

    @property
    def thread(self):
        """Number of the thread in its block, int32."""
        return Value(self.machine, self.machine.thread(), "i4")

    @property
    def block(self):
        """Number of the block, int64."""
        return Value(self.machine, self.machine.block(), "i8")


def tree(values, combine):
    """Combine values pairwise, neighbours first, each pair at once: few wait for others."""
    waiting: list[tuple[int, Any]] = []  # (height, value)
    for value in values:
        height = 0
        while waiting and waiting[-1][0] == height:
            value, height = combine(waiting.pop()[1], value), height + 1
        waiting.append((height, value))
    _, value = waiting.pop()
    while waiting:
        value = combine(waiting.pop()[1], value)
    return value


def sum_tree(values):
    """The sum of a list, neighbours first."""
    return tree(values, lambda a, b: a + b)


def max_tree(values):
    """The largest of a list; NaN if one is."""
    return tree(values, larger)
