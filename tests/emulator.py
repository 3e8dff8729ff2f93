"""A GPU in NumPy: runs a kernel for all threads of a launch at once, and watches it.

A kernel (`numbakern.cuda.device.Kernel`) has no branches, so every operation is done for all
threads before the next one: a value is an array of (blocks, threads), or of fewer where all
threads agree. Arithmetic is that of the hardware to the last bit: each operation rounds once, fma
too. What a real GPU would punish by wrong numbers or a fault raises `Fault` here:

- an access outside the arrays that were given, or not aligned to its width;
- two threads that write to the same place, or one that reads what another one wrote, without a
  barrier between them (in global memory: of different blocks at all);
- shared memory that is read before it is written, or beyond what was asked for;
- a copy into shared memory whose place anybody touches before it has been waited for, whose source
  is written meanwhile, or that is still on its way when the block ends;
- a block that waits for others where more come, or fewer, or some that need not have started: those
  have which took consecutive tickets (the emulator gives the first one to the last block);
- a write to the shared memory of another block of the cluster before that has started, or with no
  barrier of the cluster before it ends;
- a loop whose count differs from thread to thread: barriers and shuffles in it would diverge.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import ml_dtypes
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from numbakern.cuda.device import Kernel, Value

WARP = 32
SEVERAL = -2
LANES_AT_ONCE = 1 << 17
SHARED = 227 << 10  # bytes that a block can have
EXP2_ERROR = 2.0  # ulp from the rounded 2**v: the most that PTX says of ex2.approx
RECIPROCAL_ERROR = 1.0  # the same of rcp.approx
DTYPE = {"f4": np.float32, "f8": np.float64, "i4": np.int32, "i8": np.int64, "b1": np.bool_}


class Fault(Exception):
    """A kernel did what it must not do."""


@intrinsic
def _fused(typing, a, b, c):
    def codegen(context, builder, sig, args):
        name = f"llvm.fma.{'f32' if a == types.float32 else 'f64'}"
        function_type = ir.FunctionType(args[0].type, [args[0].type] * 3)
        function = builder.module.globals.get(name) or ir.Function(
            builder.module, function_type, name
        )
        return builder.call(function, args)

    return a(a, b, c), codegen


@numba.vectorize(["f4(f4,f4,f4)", "f8(f8,f8,f8)"])
def _fma(a, b, c):
    return _fused(a, b, c)


class Memory:
    """The global memory that a launch may touch: the extents of some NumPy arrays."""

    def __init__(self, arrays):
        extents = []
        for array in arrays:
            low, high = np.lib.array_utils.byte_bounds(array)
            if high > low:
                extents.append((low, high))
        self.areas = []
        for low, high in sorted(extents):
            if self.areas and low <= self.areas[-1][1]:
                self.areas[-1] = (self.areas[-1][0], max(high, self.areas[-1][1]))
            else:
                self.areas.append((low, high))
        self.views = [self._view(low, high) for low, high in self.areas]
        # who wrote each byte in this launch (number of the thread + 1), and in which phase
        self.writer = [np.zeros(high - (low & ~15), np.int32) for low, high in self.areas]
        self.phase = [np.zeros(high - (low & ~15), np.int32) for low, high in self.areas]

    @staticmethod
    def _view(low, high):
        """Its bytes, from a multiple of 16 on."""
        start = low & ~15
        return np.ctypeslib.as_array((ctypes.c_uint8 * (high - start)).from_address(start))

    def find(self, addresses, width):
        """For each area: which of these accesses fall into it, and at which byte."""
        if np.any(addresses % width):
            raise Fault(f"misaligned access of {width} bytes")
        left = addresses.size
        for k, (low, high) in enumerate(self.areas):
            inside = (addresses >= low) & (addresses + width <= high)
            count = np.count_nonzero(inside)
            if count:
                left -= count
                inside = slice(None) if count == addresses.size else inside
                yield k, inside, addresses[inside] - (low & ~15)
            if not left:
                return
        if left:
            raise Fault(f"access of {width} bytes outside of every array")


class Emulator:
    """The machine that `device.Value`s are on in a test; its methods are those of `device`."""

    def __init__(self, memory, blocks, threads, shared=0, cluster=1):
        self.memory, self.cluster = memory, cluster
        self.blocks = np.asarray(blocks, np.int64)[:, None]
        self.threads = threads
        self.shape = (len(blocks), threads)
        self.number = self.blocks * threads + np.arange(threads) + 1  # of the thread, from 1
        self.now = 1  # phases between barriers
        # The phases that all of a warp, a block, a cluster have reached.
        self.warp_time = self.time = 1
        self.cluster_time = 1 if cluster == 1 else 0
        self.started = cluster == 1  # whether all blocks of a cluster are known to run
        self.remote_time = -1  # the last phase with a write to another block's shared memory
        self.tickets = np.full(len(blocks), -1)  # of each block, as a counter had it
        self.meeting = np.zeros(len(blocks), np.int64)  # the counter that each has met at
        self.met = 0  # the phase in which
        self.cells: list[_Shared] = [_Shared(self, shared)]
        self.asked: list[_Copy] = []  # of no group yet
        self.groups: list[list[_Copy]] = []  # of copies that have not been waited for
        self.active = np.True_  # the threads that are not in another branch

    def argument(self, value, elem):
        return DTYPE[elem](value)

    # -- numbers

    def constant(self, number, elem):
        return DTYPE[elem](number)

    def binary(self, name, a, b, elem):
        return _BINARY[name](a, b) if elem != "b1" else _MASKS[name](a, b)

    def compare(self, sign, a, b, elem):
        return _COMPARE[sign](a, b)

    def select(self, mask, a, b, elem):
        return np.where(mask, a, b)

    def convert(self, v, elem, to):
        if elem == "u8":
            v = np.asarray(v).view(np.uint64)
        if elem == "f8" and to == "i8":
            v = np.where(np.isfinite(v), v, 0)
        return np.asarray(v).astype(DTYPE[to])

    def anything(self, elem):
        """NaN, or as a word two that are."""
        bits = {"i4": np.int32(-1), "i8": np.int64(-1)}
        return bits[elem] if elem in bits else DTYPE[elem](np.nan)

    def bitcast(self, v, elem, to):
        return np.asarray(v).view(DTYPE[to])

    def fma(self, a, b, c, elem):
        return _fma(a, b, c)

    def maximum(self, a, b, elem):
        return np.maximum(a, b)

    def at_least(self, x, low, elem):
        return np.where(x > low, x, low)

    # -- bits

    def join(self, low, high):
        low, high = np.broadcast_arrays(low, high)
        bits = low.astype(np.int64) & 0xFFFFFFFF | high.astype(np.int64) << 32
        return bits.view(np.float64)

    def split(self, bits):
        bits = np.asarray(bits)
        return bits.astype(np.int32), (bits >> 32).astype(np.int32)

    def half_to_single(self, word, high):
        return _halves(word, high).view(np.float16).astype(np.float32)

    def pack_halves(self, low, high, kind):
        to_bits = _bfloat16_bits if kind == "bf" else _float16_bits
        return (to_bits(low) | to_bits(high) << np.uint32(16)).view(np.int32)

    def pair(self, low, high, upper):
        low, high = np.broadcast_arrays(low, high)
        if upper:
            return (low >> 16) & 0xFFFF | high & -0x10000
        return low & 0xFFFF | high << 16

    def funnel(self, low, high, bits):
        if np.any((np.asarray(bits) < 0) | (np.asarray(bits) > 32)):
            raise Fault("funnel by more than a word")
        low, high, bits = np.broadcast_arrays(low, high, bits)
        both = low.astype(np.int64) & 0xFFFFFFFF | high.astype(np.int64) << 32
        return (both.view(np.uint64) >> bits.astype(np.uint64)).astype(np.uint32).view(np.int32)

    def larger_halves(self, a, b, kind):
        dtype = ml_dtypes.bfloat16 if kind == "bf" else np.float16
        low, high = (
            np.maximum(*(_halves(v, part).view(dtype).astype(np.float32) for v in (a, b)))
            for part in (False, True)
        )
        return self.pack_halves(low, high, kind)

    def equal_halves(self, a, b, kind):
        dtype = ml_dtypes.bfloat16 if kind == "bf" else np.float16
        low, high = (
            np.equal(*(_halves(v, part).view(dtype).astype(np.float32) for v in (a, b)))
            for part in (False, True)
        )
        return (low * np.int32(0xFFFF) | high * np.int32(-0x10000)).astype(np.int32)

    def one_below(self, x, top, elem):
        return np.less(x, top).astype(DTYPE[elem])

    def exp2(self, v):
        """As far off as the hardware may be, always to the same side: in a sum that adds up."""
        rounded = np.exp2(np.asarray(v, np.float64)).astype(np.float32)
        rounded = np.where(rounded < 2.0**-126, 0.0, rounded).astype(np.float32)  # flushed
        off = np.where(rounded > 0, EXP2_ERROR * np.spacing(rounded), 0.0)
        return np.where(v == 0, 1.0, rounded + off).astype(np.float32)

    def reciprocal(self, v):
        """As far off as the hardware may be, always to the same side."""
        rounded = (1 / np.asarray(v, np.float64)).astype(np.float32)
        return (rounded + RECIPROCAL_ERROR * np.spacing(rounded)).astype(np.float32)

    def wide_product(self, i, step):
        return np.asarray(i).astype(np.int64) * step

    def within(self, t, count):
        return (t >= 0) & (t < count)

    # -- threads

    def thread(self):
        return np.arange(self.threads, dtype=np.int32)[None, :]

    def block(self):
        return self.blocks

    def _together(self, what):
        if not np.all(self.active):
            raise Fault(f"{what} in a branch that not all threads take")

    def _whole_warps(self, what):
        lanes = np.broadcast_to(self.active, self.shape).reshape(-1, WARP)
        if np.any(lanes != lanes[:, :1]):
            raise Fault(f"{what} in a branch that not all threads of a warp take")

    def _by_lane(self, word):
        self._whole_warps("a shuffle")
        return np.broadcast_to(word, self.shape).reshape(self.shape[0], -1, WARP)

    def shuffle_xor(self, word, offset):
        if not 0 < offset < WARP:
            raise Fault(f"shuffle by {offset}")
        return self._by_lane(word)[:, :, np.arange(WARP) ^ offset].reshape(self.shape)

    def ballot(self, mask):
        bits = self._by_lane(mask).astype(np.int64) << np.arange(WARP)
        words = np.sum(bits, axis=-1, keepdims=True).astype(np.uint32).view(np.int32)
        return np.broadcast_to(words, (*words.shape[:-1], WARP)).reshape(self.shape)

    def ones(self, word):
        return np.bitwise_count(np.asarray(word).view(np.uint32)).astype(np.int32)

    def _phase(self):
        """The number of the phase that a barrier begins."""
        self._together("a barrier")
        self.now += 1
        return self.now

    def warp_barrier(self):
        self.warp_time = self._phase()

    def barrier(self):
        self.warp_time = self.time = self._phase()

    def cluster_barrier(self):
        self.warp_time = self.time = self.cluster_time = self._phase()
        self.started = True

    def cluster_start(self):
        self._together("a barrier")
        self.started = True

    def cluster_rank(self):
        if self.cluster == 1:
            raise Fault("a block's number in a cluster, without clusters")
        return (self.blocks % self.cluster).astype(np.int32)

    def end(self):
        """Whether the blocks may end now."""
        if self.remote_time >= self.cluster_time:
            raise Fault("a block may end while another one writes to its shared memory")
        if self.asked or any(self.groups):
            raise Fault("a block may end while a copy is on its way")

    def repeat(self, count, body, state):
        self._whole_warps("a loop")
        rounds = np.asarray(count.value)
        if rounds.size > 1 and np.any(rounds != rounds.flat[0]):
            raise Fault("a loop's count differs from thread to thread")
        for i in range(int(rounds.flat[0])):
            before = [v.elem for v in state]
            state = tuple(body(Value(self, np.int64(i), "i8"), *state))
            if [v.elem for v in state] != before:
                raise Fault("a loop changes what its state is")
        return state

    def when(self, mask, compute, otherwise):
        pairs = zip(self._where(mask.value, compute), otherwise, strict=True)
        return [v.like(np.where(mask.value, v.value, o.value)) for v, o in pairs]

    def either(self, mask, compute, seldom):
        return self.when(mask, compute, self._where(np.logical_not(mask.value), seldom))

    def _where(self, mask, compute):
        before, self.active = self.active, np.logical_and(self.active, mask)
        computed = compute()
        self.active = before
        return computed

    # -- global memory

    def _places(self, address, mask):
        """Addresses of the threads that take part, and who they are."""
        address = np.broadcast_to(address, self.shape)
        mask = self.active if mask is None else np.logical_and(self.active, mask)
        mask = np.broadcast_to(mask, self.shape)
        return address[mask], mask

    def load(self, address, size, count, mask, fill):
        addresses, mask = self._places(address, mask)
        raw = self._read(addresses, size * count, self.number[mask])
        wide = {1: np.uint8, 2: np.uint16, 4: np.int32, 8: np.int64}[size]
        dtype, filled = self._filled(size, fill)
        words = raw.view(wide).astype(dtype)
        out = []
        for i in range(count):
            word = np.full(self.shape, filled, dtype)
            word[mask] = words[:, i]
            out.append(word)
        return out

    def prefetch(self, address, mask, level):
        addresses, mask = self._places(address, mask)
        self._read(addresses, 1, self.number[mask])

    def _read(self, addresses, width, numbers):
        """So many bytes at each of some threads' addresses."""
        raw = np.zeros((len(addresses), width), np.uint8)
        for k, inside, at in self.memory.find(addresses, width):
            raw[inside] = self.memory.views[k][at[:, None] + np.arange(width)]
            self._check_read(k, at, width, numbers[inside])
        return raw

    @staticmethod
    def _filled(size, fill):
        """The type of the words of a load, and what one is that is not read."""
        dtype, bits = (np.int64, 64) if size == 8 else (np.int32, 32)
        fill = -1 if fill is None else fill  # as `anything`
        return dtype, np.array([fill % (1 << bits)], f"u{bits // 8}").view(dtype)[0]

    def _check_read(self, k, at, width, numbers):
        writer = self.memory.writer[k]
        for byte in (0, width - 1):
            wrote = writer[at + byte]
            other = (wrote > 0) & (wrote != numbers)
            if np.any(other):
                same_block = (wrote - 1) // self.threads == (numbers - 1) // self.threads
                earlier = self.memory.phase[k][at + byte] < self.time
                when = self.memory.phase[k][at + byte]
                told = self._have_met(wrote, when, numbers)
                told |= self._in_warp_before(wrote, when, numbers)
                if np.any(other & ~(same_block & earlier) & ~told):
                    raise Fault("reads what another thread wrote, no barrier between")

    def _in_warp_before(self, wrote, when, numbers):
        """Whether a thread of the same warp has written, before a barrier for the warp."""
        return ((wrote - 1) // WARP == (numbers - 1) // WARP) & (when < self.warp_time)

    def store(self, address, size, words, mask):
        width = size * len(words)
        addresses, mask = self._places(address, mask)
        narrow = {1: np.uint8, 2: np.uint16, 4: np.int32, 8: np.int64}[size]
        lanes = [np.broadcast_to(w, self.shape)[mask].astype(narrow) for w in words]
        raw = np.ascontiguousarray(np.stack(lanes, axis=1)).view(np.uint8).reshape(-1, width)
        numbers = self.number[mask]
        for k, inside, at in self.memory.find(addresses, width):
            bytes_at = at[:, None] + np.arange(width)
            self.memory.views[k][bytes_at] = raw[inside]
            writer, mine = self.memory.writer[k], numbers[inside, None]
            before, when = writer[bytes_at], self.memory.phase[k][bytes_at]
            if np.any((before > 0) & (before != mine) & ~self._in_warp_before(before, when, mine)):
                raise Fault("two threads write to the same place")
            writer[bytes_at] = mine
            if np.any(writer[bytes_at] != mine):
                raise Fault("two threads write to the same place")
            self.memory.phase[k][bytes_at] = self.now

    def atomic_min(self, address, v, mask):
        addresses, mask = self._places(address, mask)
        values = np.broadcast_to(v, self.shape)[mask]
        for k, inside, at in self.memory.find(addresses, 8):
            words = self.memory.views[k][: self.memory.views[k].size // 8 * 8].view(np.int64)
            np.minimum.at(words, at // 8, values[inside])

    # -- blocks that wait for others

    def _count(self, address, mask):
        """One more for each thread; yields (which, what there was, what there is) of a counter."""
        self._together("a counter")
        addresses, _ = self._places(address, mask)
        for one in np.unique(addresses):
            which = np.nonzero(addresses == one)[0]
            ((k, _, (at,)),) = self.memory.find(np.array([one]), 4)
            word = self.memory.views[k][at : at + 4].view(np.uint32)
            before = int(word[0])
            word[0] = (before + len(which)) % (1 << 32)
            yield which, before, int(word[0])

    def atomic_add(self, address, mask):
        """A ticket for a thread of each block: the last block comes first."""
        _, mask = self._places(address, mask)
        blocks, found = np.nonzero(mask)[0], np.zeros(self.shape, np.int32)
        for which, before, _ in self._count(address, mask):
            if before != self.blocks[0, 0]:
                raise Fault("tickets that do not start at 0")
            self.tickets[blocks[which]] = before + np.arange(len(which))[::-1]
        found[mask] = self.tickets[blocks]
        return found

    def arrive(self, address, count, mask):
        addresses, mask = self._places(address, mask)
        blocks, counts = np.nonzero(mask)[0], np.broadcast_to(count, self.shape)[mask]
        for which, _, now in self._count(address, mask):
            if np.any(now < counts[which]):
                raise Fault("a block waits for more than come")
            if np.any(now > counts[which]):
                raise Fault("a block waits for fewer than come")
            tickets = np.sort(self.tickets[blocks[which]])
            if tickets[0] < 0 or tickets[-1] - tickets[0] != len(tickets) - 1:
                raise Fault("a block waits for others that may not have started")
        self.meeting[blocks], self.met = addresses, self.time

    def _have_met(self, wrote, when, numbers):
        """Whether what one thread wrote has reached another one by a meeting of their blocks."""
        theirs, own = ((n - 1) // self.threads - self.blocks[0, 0] for n in (wrote, numbers))
        here = (theirs >= 0) & (theirs < len(self.blocks))
        at = self.meeting[np.where(here, theirs, 0)]
        return (
            here
            & (at == self.meeting[own])
            & (at != 0)
            & (when < self.met)
            & (self.met < self.time)
        )

    # -- shared memory

    def shared(self, size):
        self.cells.append(_Shared(self, size))
        return np.int32((len(self.cells) - 1) << 20)

    def dynamic_shared(self):
        return np.int32(0)

    def _cell(self, address, mask):
        """The area that the threads of a mask address, and where in it."""
        address = np.broadcast_to(address, self.shape)
        area = np.unique(address[mask] >> 20)
        if len(area) > 1 or not all(0 <= a < len(self.cells) for a in area):
            raise Fault("shared memory out of bounds")
        return self.cells[area[0] if len(area) else 0], address & ((1 << 20) - 1)

    def shared_load(self, address, size, count, mask, fill):
        mask = self.active if mask is None else np.logical_and(self.active, mask)
        mask = np.broadcast_to(mask, self.shape)
        cell, at = self._cell(address, mask)
        dtype, filled = self._filled(size, fill)
        words = np.full((*self.shape, count), filled, dtype)
        raw = cell.load(at, size * count, mask)
        words[mask] = raw.view("u2" if size == 2 else dtype)  # zeros above a half
        return [words[:, :, i] for i in range(count)]

    def shared_store(self, address, size, words, mask, peer):
        mask = np.broadcast_to(np.logical_and(self.active, mask), self.shape)
        cell, at = self._cell(address, mask)
        lanes = [np.broadcast_to(w, self.shape)[mask].astype(f"i{size}") for w in words]
        raw = np.ascontiguousarray(np.stack(lanes, axis=1)).view(np.uint16)
        blocks = np.nonzero(mask)[0]
        if peer is not None:
            peer = np.broadcast_to(peer, self.shape)[mask]
            if np.any((peer < 0) | (peer >= self.cluster)):
                raise Fault("no such block in the cluster")
            if not self.started:
                raise Fault("another block of the cluster may not have started")
            self.remote_time = self.now
            blocks = blocks // self.cluster * self.cluster + peer
        cell.store(at, raw, mask, blocks)

    # -- copies into shared memory

    def copy_to_shared(self, place, address, mask):
        addresses, mask = self._places(address, mask)
        cell, at = self._cell(place, mask)
        numbers = self.number[mask]
        raw = self._read(addresses, 16, numbers)
        where = cell.expect(at, 16, mask)
        if len(numbers):
            self.asked.append(_Copy(cell, where, addresses, numbers, raw))

    def commit_copies(self):
        self._together("a group of copies")
        self.groups.append(self.asked)
        self.asked = []

    def await_copies(self, groups):
        self._together("a wait for copies")
        while len(self.groups) > groups:
            for copy in self.groups.pop(0):
                if np.any(self._read(copy.addresses, 16, copy.numbers) != copy.raw):
                    raise Fault("what is copied is written meanwhile")
                copy.cell.fulfil(copy.where, copy.raw.view(np.uint16), copy.numbers)


class _Copy(NamedTuple):
    """What some threads have asked for: their places, where from, and what was there."""

    cell: _Shared
    where: tuple
    addresses: np.ndarray
    numbers: np.ndarray
    raw: np.ndarray


class _Shared:
    """An area of every block's shared memory, in words of 2 bytes."""

    def __init__(self, machine, size):
        self.machine, self.count = machine, size // 2
        shape = (machine.shape[0], self.count)
        self.values = np.zeros(shape, np.uint16)
        self.writer = np.zeros(shape, np.int32)  # number of the thread, 0 for none
        self.written = np.zeros(shape, np.int32)  # the phase in which
        self.reader = np.zeros(shape, np.int32)  # SEVERAL: threads of one warp
        self.warp = np.zeros(shape, np.int32)  # the readers'; SEVERAL
        self.read = np.zeros(shape, np.int32)
        self.expected = np.zeros(shape, np.bool_)  # whether a copy to it is on its way

    def _index(self, at, width, blocks):
        """The words of some accesses, one in each row."""
        if np.any(at % width) or np.any(at < 0) or np.any(at + width > 2 * self.count):
            raise Fault("shared memory misaligned or out of bounds")
        where = blocks[:, None], at[:, None] // 2 + np.arange(width // 2)
        if np.any(self.expected[where]):
            raise Fault("shared memory is touched while a copy to it is on its way")
        return where

    def _unseen(self, other, warp, when, mine):
        """Whether an access of another thread, of this warp, may not have come before ours."""
        machine, reached = self.machine, self.machine.time
        if machine.cluster > 1:
            same_block = (other - 1) // machine.threads == (mine - 1) // machine.threads
            reached = np.where(same_block, reached, machine.cluster_time)
        reached = np.where(warp == self._warp_of(mine), machine.warp_time, reached)
        return (other != mine) & (when >= reached)

    @staticmethod
    def _warp_of(thread):
        """The number of a thread's warp among all, from 1; blocks are of whole warps."""
        return (thread + WARP - 1) // WARP

    def load(self, at, width, mask):
        machine, where = self.machine, self._index(at[mask], width, np.nonzero(mask)[0])
        mine = machine.number[mask][:, None]
        wrote = self.writer[where]
        if np.any(wrote == 0):
            raise Fault("shared memory is read before it is written")
        if np.any(self._unseen(wrote, self._warp_of(wrote), self.written[where], mine)):
            raise Fault("shared memory is read without a barrier behind another thread's write")
        index = tuple(np.broadcast_to(w, wrote.shape) for w in where)
        mine = np.broadcast_to(mine, wrote.shape)
        # A reading that all have seen, or all who could be in its way, is forgotten.
        warp = self._warp_of(mine)
        seen = np.where(self.warp[where] == warp, machine.warp_time, machine.time)
        forgotten = tuple(w[self.read[where] < seen] for w in index)
        self.reader[forgotten] = self.warp[forgotten] = 0
        for noted, now in ((self.reader, mine), (self.warp, warp)):
            fresh = tuple(w[noted[where] == 0] for w in index)
            noted[fresh] = now[noted[where] == 0]
            noted[tuple(w[noted[where] != now] for w in index)] = SEVERAL
        self.read[where] = machine.now
        return self.values[where]

    def store(self, at, raw, mask, blocks):
        where = self._taken(at, 2 * raw.shape[1], mask, blocks)
        self.values[where] = raw

    def expect(self, at, width, mask):
        """Have a copy to these places on its way; where they are."""
        where = self._taken(at, width, mask, np.nonzero(mask)[0])
        self.expected[where] = True
        return where

    def fulfil(self, where, values, numbers):
        """The copy has come, for who asked for it."""
        self.expected[where] = False
        self.values[where], self.writer[where] = values, numbers[:, None]
        self.written[where] = self.machine.now

    def _taken(self, at, width, mask, blocks):
        """The words of some writing accesses, now those of their threads."""
        where = self._index(at[mask], width, blocks)
        mine = self.machine.number[mask][:, None]
        wrote, read = self.writer[where], self.reader[where]
        unseen = self._unseen(wrote, self._warp_of(wrote), self.written[where], mine)
        owner = self.machine.number[blocks, :1]  # only a block's own threads read it
        reader = np.where(read == SEVERAL, owner + (mine == owner), read)
        unread = self._unseen(reader, self.warp[where], self.read[where], mine)
        if np.any((wrote != 0) & unseen | (read != 0) & unread):
            raise Fault("shared memory is written without a barrier behind another thread's access")
        self.writer[where] = mine
        if np.any(self.writer[where] != mine):
            raise Fault("two threads write to the same place of shared memory")
        self.written[where] = self.machine.now
        return where


def _halves(words, high):
    """The bits of the low or high half of each word."""
    words = np.asarray(words).view(np.uint32)
    return (words >> 16 if high else words & 0xFFFF).astype(np.uint16)


def _float16_bits(v):
    return np.asarray(v).astype(np.float16).view(np.uint16).astype(np.uint32)


def _bfloat16_bits(v):
    bits = np.asarray(v).astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(v), 0x7FFF, rounded).astype(np.uint32)


def _shift_logical(a, b):
    a = np.asarray(a)
    unsigned = a.view(np.dtype(f"u{a.itemsize}"))
    return (unsigned >> np.asarray(b).astype(unsigned.dtype)).view(a.dtype)


_BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": np.left_shift,
    "ashr": np.right_shift,
    "lshr": _shift_logical,
}
_MASKS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_COMPARE = {
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
    "==": np.equal,
    "!=": np.not_equal,
}


def emulate(kernel: Kernel, grid, block, args, arrays, shared=0, cluster=1):
    """Launch a kernel over host memory.

    Parameters
    ----------
    kernel : Kernel
        As `numbakern.cuda.plan.kernel_of` makes it from a Step's spec.
    grid, block : int
        Blocks, and threads of each.
    args : sequence of int or float
        Arguments of the kernel; addresses are those of NumPy arrays.
    arrays : iterable of numpy.ndarray
        All memory that the kernel may touch.
    shared, cluster : int
        As in a Step.
    """
    if block % WARP or not 0 < block <= 1024:
        raise Fault(f"a block of {block} threads")
    if cluster < 1 or cluster > 16 or grid % cluster:
        raise Fault(f"{grid} blocks in clusters of {cluster}")
    together = cluster  # blocks that are run at once, for they wait for each other
    if "meetings" in kernel.args and "blocks" in kernel.args:
        together = args[list(kernel.args).index("blocks")]
    if not 0 <= shared <= SHARED:
        raise Fault(f"{shared} bytes of shared memory")
    memory = Memory(arrays)
    step = max(1, LANES_AT_ONCE // (block * together)) * together
    with np.errstate(all="ignore"):
        for first in range(0, grid, step):
            blocks = range(first, min(grid, first + step))
            machine = Emulator(memory, blocks, block, shared, cluster)
            elems = kernel.args.values()
            values = [machine.argument(v, e) for v, e in zip(args, elems, strict=True)]
            kernel.run(machine, values)
            machine.end()
