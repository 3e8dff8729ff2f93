"""Runs a kernel over its rows: serially, over Numba's threads, or over a pool in a forked child.

Every way calls the same machine code on other ranges of rows, so the bits do not depend on it.
"""

import functools
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import parent_process

import numba
import numpy as np
from numba import prange, types
from numba.np.ufunc import parallel as numba_threads

from numbakern.cpu.compile import compile_function
from numbakern.cpu.frame import FLOAT_SLOTS, SLOTS, array_data, call, pack, take
from numbakern.cpu.simd import BYTES, traced

SERIAL_WORK = 40_000
"""Elements below which starting threads costs more than it saves."""
GRAIN = 65_536
"""Elements a thread takes at a time, at most."""

_SLOT_TYPES = types.Tuple([types.float64 if s in FLOAT_SLOTS else types.int64 for s in SLOTS])


@traced
def _aligned(memory, offset):
    """The first cache line inside this NumPy array, and `offset` bytes behind it."""
    start = array_data(memory) + (BYTES - 1)
    aligned = start.like(start.builder.and_(start.value, start.constant(-BYTES)))
    return aligned + offset


def _run_serial(kernel, first, last, memory, offset, slots):
    call(kernel, pack(slots), first, last, _aligned(memory, offset))


def _run_parallel(kernel, workers, rows, grain, memory, scratch_size, slots):
    frame = pack(slots)
    scratch = _aligned(memory, 0)
    counter = pack((0,))
    for worker in prange(workers):
        # Rows are taken as workers become free: a neighbour on one core delays one chunk only.
        first = take(counter, grain)
        while first < rows:
            call(kernel, frame, first, min(first + grain, rows), scratch + worker * scratch_size)
            first = take(counter, grain)


@functools.cache
def _serial():
    return compile_function(_run_serial, "run_serial", (*[types.int64] * 5, _SLOT_TYPES))


@functools.cache
def _parallel():
    signature = (*[types.int64] * 6, _SLOT_TYPES)
    return compile_function(_run_parallel, "run_parallel", signature, parallel=True)


def _is_forked():
    """Whether multiprocessing made this process by a fork; one that it spawned has begun anew."""
    return parent_process() is not None and "--multiprocessing-fork" not in sys.orig_argv


class _State:
    """Whether Numba's threads may be used: they are shared by all Python threads."""

    def __init__(self):
        self.lock = threading.Lock()
        self.concurrent = False  # the threading layer is known to serve several callers at once
        # A child forked after its parent used the threads has none: GNU OpenMP ends the process.
        self.forked = numba_threads._is_initialized and _is_forked()
        self.pool = None

    def after_fork(self):
        self.lock = threading.Lock()
        self.pool = None
        self.forked = self.forked or numba_threads._is_initialized


_state = _State()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_state.after_fork)


def run(kernel, rows, work, slots, scratch_size, unit=1):
    """Run `kernel` over all its rows (or tiles).

    Parameters
    ----------
    kernel : int
        Its address.
    rows : int
        How many there are.
    work : int
        Elements in all of them.
    slots : tuple
        The frame.
    scratch_size : int
        Bytes of scratch memory a thread.
    unit : int
        Threads take multiples of this many rows.
    """
    if work < SERIAL_WORK or rows == 1:
        return _run_alone(kernel, rows, slots, scratch_size)
    workers = min(numba.get_num_threads(), rows)
    if workers == 1:
        return _run_alone(kernel, rows, slots, scratch_size)
    grain = max(1, min(rows // (4 * workers), rows * GRAIN // work))
    grain = -(-grain // unit) * unit
    if _state.forked:
        return _run_pool(kernel, rows, grain, workers, slots, scratch_size)
    if _state.concurrent:
        return _run_threads(kernel, rows, grain, workers, slots, scratch_size)
    # Under workqueue a second caller at the same time would abort the process: it works alone.
    if not _state.lock.acquire(blocking=False):
        return _run_alone(kernel, rows, slots, scratch_size)
    try:
        _run_threads(kernel, rows, grain, workers, slots, scratch_size)
        _state.concurrent = numba.threading_layer() != "workqueue"
    finally:
        _state.lock.release()


def _run_alone(kernel, rows, slots, scratch_size):
    memory = np.empty(scratch_size + BYTES, np.uint8)
    _serial()(kernel, 0, rows, id(memory), 0, slots)


def _run_threads(kernel, rows, grain, workers, slots, scratch_size):
    memory = np.empty(scratch_size * workers + BYTES, np.uint8)
    _parallel()(kernel, workers, rows, grain, id(memory), scratch_size, slots)


def _run_pool(kernel, rows, grain, workers, slots, scratch_size):
    """The serial driver over a pool of Python threads; it releases the GIL."""
    memory = np.empty(scratch_size * workers + BYTES, np.uint8)
    if _state.pool is None:
        _state.pool = ThreadPoolExecutor(numba.config.NUMBA_NUM_THREADS, "numbakern")
    starts = iter(range(0, rows, grain))  # next() on it is atomic

    def work(worker):
        for first in starts:
            last = min(first + grain, rows)
            _serial()(kernel, first, last, id(memory), worker * scratch_size, slots)

    list(_state.pool.map(work, range(workers)))
