"""The emulator of a GPU's threads notices what a GPU would punish: faults planted on purpose.

In kernels that ship, each barrier is left out once, each array shortened or moved by an element;
and in small kernels, a shuffle, a barrier or a loop is made to differ from thread to thread.
"""

from __future__ import annotations

import numpy as np
import pytest

from numbakern.cuda import ahead, device, totals
from numbakern.cuda.plan import Layout, Spec, kernel_of, plan
from numbakern.cuda.ways import MACHINE, Machine
from tests import emulator
from tests.emulator import Emulator, Fault, emulate

# --- kernels that ship ---------------------------------------------------------------------------


def launch(operation, classes, options=(), machine=MACHINE, rows=3, offset=0, axis=1):
    """What starts the launches of a call on float32 rows, and its arrays by name.

    `offset`: elements from a multiple of 16 bytes to the rows' start.
    """
    shape = (rows, classes) if axis else (classes, rows)

    def array():
        raw = np.zeros(rows * classes + 8, np.float32)
        skipped = -raw.ctypes.data % 16 // 4 + offset
        return raw[skipped : skipped + rows * classes].reshape(shape)

    x = array()
    x[...] = np.linspace(-3, 3, x.size).reshape(shape)
    given = {"x": x}
    if operation == "cross_entropy":
        given |= {"labels": np.arange(rows) % classes, "loss": np.zeros((), np.float32)}
    if operation == "logsumexp":
        given["row_lse"] = np.zeros(rows, np.float32)
    else:
        given["out"] = array()
    kinds = {"labels": "i8"}
    layouts = tuple(
        (n, Layout(kinds.get(n, "f4"), a.strides, not offset)) for n, a in given.items()
    )
    made = plan(operation, options, shape, axis, "f4", layouts, machine)
    given |= {name: np.full(size, 0xFF, np.uint8) for name, size in made.temporaries}
    given["bad"] = np.zeros(16, np.int64)
    numbers = {"ignore_index": -100, "scale": 1.0, "keep": 1.0, "spread": 0.0, **made.constants}

    def start(change=lambda slots: None, leave_out=""):
        for step in made.steps:
            if step.spec.kernel == leave_out:
                continue
            slots = {n: a.ctypes.data for n, a in given.items()} | numbers
            change(slots)
            args, memory = [slots[name] for name in step.args], given.values()
            kernel = kernel_of(step.spec)
            emulate(kernel, step.grid, step.block, args, memory, step.shared, step.cluster)

    return start, given


MEAN = ("ignores", True), ("reduction", "mean")
CLUSTERS = Machine(multiprocessors=1, cluster=8)
SHARED = Machine(multiprocessors=1)
PARTLY = Machine(multiprocessors=1, shared=40 << 10)
TOGETHER = Machine(together=True)
ANYWHERE = Machine(realigned=True)
AHEAD = Machine(multiprocessors=1, cluster=8, ahead=True)
KERNELS = {
    "a block a row": ("log_softmax", 4096),
    "a block a row, its loss": ("cross_entropy", 3000, MEAN),
    "a block a row, one value": ("logsumexp", 4096),
    "a long row in shared memory": ("log_softmax", 20_000, (), SHARED),
    "a long row of which shared memory has a part": ("log_softmax", 20_000, (), PARTLY),
    "a cluster": ("softmax", 50_000, (), CLUSTERS),
    "rows of a tile": ("log_softmax", 21, (), MACHINE, 140),
    "rows of a tile, finished together": ("cross_entropy", 65, MEAN, MACHINE, 40),
    "rows of a tile that starts anywhere": ("log_softmax", 21, (), ANYWHERE, 140, 1),
    "a warp a row that starts anywhere": ("log_softmax", 160, (), MACHINE, 3, 1),
    "a block a row that starts anywhere": ("softmax", 4096, (), MACHINE, 3, 3),
    "rows side by side": ("log_softmax", 150, (), MACHINE, 40, 0, 0),
    "rows side by side, their losses": ("cross_entropy", 1000, MEAN, MACHINE, 40, 0, 0),
    "parts of rows side by side": ("softmax", 3000, (), MACHINE, 40, 0, 0),
    "blocks that meet": ("log_softmax", 20_000, (), TOGETHER),
    "rows in turn": ("log_softmax", 20_000, (), AHEAD),
    "rows in turn, their losses": ("cross_entropy", 20_000, MEAN, AHEAD, 5),
    "rows in turn, of a cluster": ("softmax", 50_000, (), AHEAD),
    "rows in turn, room for more": ("softmax", 40_000, (), AHEAD._replace(cluster=1)),
}


def counted(monkeypatch, name, leave_out=None):
    """How often the kernels wait from now on, as a list with one number; one wait is left out."""
    original, calls = getattr(Emulator, name), [0]

    def wait(self, *of):
        calls[0] += 1
        if calls[0] - 1 != leave_out:
            original(self, *of)

    monkeypatch.setattr(Emulator, name, wait)
    return calls


@pytest.mark.parametrize("name", KERNELS)
def test_each_barrier_that_is_left_out_is_missed(name, monkeypatch):
    start, _ = launch(*KERNELS[name])
    waits = 0
    for kind in ("warp_barrier", "barrier", "cluster_barrier", "cluster_start"):
        with monkeypatch.context() as patch:
            calls = counted(patch, kind)
            start()
        for k in range(calls[0]):
            with monkeypatch.context() as patch:
                counted(patch, kind, leave_out=k)
                with pytest.raises(Fault):
                    start()
        waits += calls[0]
    least = 5 if "meet" in name else 2 if "cluster" in name or "anywhere" in name else 1
    assert waits >= least


@pytest.mark.parametrize("name", [name for name in KERNELS if "in turn" in name])
def test_each_wait_for_copies_that_is_left_out_is_missed(name, monkeypatch):
    """Or one that is satisfied with a copy less; or copies of which no group is made."""
    start, _ = launch(*KERNELS[name])
    with monkeypatch.context() as patch:
        calls = counted(patch, "await_copies")
        start()
    assert calls[0] >= 4
    for k in range(calls[0]):
        with monkeypatch.context() as patch:
            counted(patch, "await_copies", leave_out=k)
            with pytest.raises(Fault, match="on its way"):
                start()
    original = Emulator.await_copies
    monkeypatch.setattr(Emulator, "await_copies", lambda self, n: original(self, n + 1))
    with pytest.raises(Fault, match="on its way"):
        start()
    monkeypatch.setattr(Emulator, "await_copies", original)
    counted(monkeypatch, "commit_copies", leave_out=0)
    with pytest.raises(Fault, match="on its way"):
        start()


@pytest.mark.parametrize("name", [name for name in KERNELS if "in turn" in name])
def test_a_part_that_is_asked_for_too_early_is_noticed(name, monkeypatch):
    """Before the one that lies there has been mapped."""
    ask, read = ahead._Ahead._ask, ahead._Ahead._map

    def early(self, part, i, params):
        if len(self.asked) > 1:
            ask(self, *self.asked.pop())
        read(self, part, i, params)

    def note(self, *of):
        self.asked = [*getattr(self, "asked", []), of]
        ask(self, *of)

    monkeypatch.setattr(ahead._Ahead, "_ask", note)
    monkeypatch.setattr(ahead._Ahead, "_map", early)
    with pytest.raises(Fault, match="on its way"):
        launch(*KERNELS[name])[0]()


def test_counters_that_are_not_cleared_are_noticed():
    start, given = launch(*KERNELS["blocks that meet"])
    for _ in range(2):  # with what was there before, and with what the call before left
        with pytest.raises(Fault, match="start at 0"):
            start(leave_out="clear")
        start()
    given["meetings"][:4] = 0  # that of the tickets alone
    with pytest.raises(Fault, match="fewer than come"):
        start(leave_out="clear")


MEETINGS = {
    "none": (lambda *_: None, "reads what another thread wrote"),
    "for one more": (lambda meet, at, n, mask: meet(at, n + 1, mask), "more than come"),
    "for one fewer": (lambda meet, at, n, mask: meet(at, n - 1, mask), "fewer than come"),
    "of every thread": (lambda meet, at, n, mask: meet(at, n, mask | True), "fewer than come"),
    "twice": (lambda meet, *of: meet(*of) or meet(*of), "fewer than come"),
    "at the next row's": (lambda meet, at, n, mask: meet(at + 4, n, mask), "outside"),
}


@pytest.mark.parametrize("name", MEETINGS)
def test_a_meeting_that_is_none_is_noticed(name, monkeypatch):
    change, message = MEETINGS[name]
    original = Emulator.arrive
    monkeypatch.setattr(Emulator, "arrive", lambda self, *of: change(original.__get__(self), *of))
    with pytest.raises(Fault, match=message):
        launch(*KERNELS["blocks that meet"])[0]()


def test_a_block_waits_for_none_without_its_ticket(monkeypatch):
    """Blocks that take their parts by their own numbers."""
    monkeypatch.setattr(
        Emulator, "atomic_add", lambda self, *_: np.broadcast_to(self.blocks, self.shape)
    )
    with pytest.raises(Fault, match="may not have started"):
        launch(*KERNELS["blocks that meet"])[0]()


@pytest.mark.parametrize("classes", [40, 1000, 1001, 4096, 4097])
@pytest.mark.parametrize("name", ["x", "out"])
def test_a_row_beyond_the_array_is_noticed(name, classes):
    start, given = launch("log_softmax", classes)
    start()  # as it is, it is right
    for by in (4, -4):
        with pytest.raises(Fault, match="outside|misaligned"):
            start(lambda slots, by=by: slots.update({name: slots[name] + by}))
    size = given[name].itemsize * classes
    for by in (size, -size):
        with pytest.raises(Fault, match="outside"):
            start(lambda slots, by=by: slots.update({name: slots[name] + by}))


@pytest.mark.parametrize("classes", [41, 1000, 1001, 4097])
def test_a_row_too_long_by_an_element_is_noticed(classes):
    """Two rows write to one place, or the last one beyond the end."""
    start, _ = launch("softmax", classes)
    with pytest.raises(Fault):
        start(lambda slots: slots.update(classes=classes + 1))


def test_the_board_of_a_block_has_an_end(monkeypatch):
    start, _ = launch("log_softmax", 4096)
    original = Emulator.__init__

    def short(self, memory, blocks, threads, shared=0, cluster=1):
        original(self, memory, blocks, threads, shared - 8, cluster)

    monkeypatch.setattr(Emulator, "__init__", short)
    with pytest.raises(Fault, match="out of bounds"):
        start()


def test_totals_miss_their_barrier(monkeypatch):
    rows, loss = np.ones(3000), np.zeros((), np.float32)
    made = ("source", "row_loss"), ("sums", (1, False)), ("result", "loss"), ("kind", "f4")
    kernel = kernel_of(Spec("total", (*made, ("shape", (totals.BLOCK, totals.EACH)))))
    slots = {"row_loss": rows.ctypes.data, "loss": loss.ctypes.data, "row_loss_count": 2000}

    def start():
        args = [slots[n] for n in kernel.args]
        emulate(kernel, 1, totals.BLOCK, args, [rows, loss])

    start()
    assert loss == 2000
    with monkeypatch.context() as patch:
        patch.setattr(Emulator, "barrier", lambda self: None)
        with pytest.raises(Fault, match="without a barrier"):
            start()


# --- kernels of a few lines ----------------------------------------------------------------------


def run(body, arrays=(), blocks=2, threads=64, shared=64):
    """Run body(thread) for some threads."""
    emulate(device.Kernel("test", lambda frame: body(frame.thread), {}), blocks, threads, [],
            arrays, shared)  # fmt: skip


def in_a_branch(compute, mask=lambda thread: (thread & 1) == 0):
    """A kernel that does this where the mask holds, in the even threads alone."""

    def body(thread):
        device.when(mask(thread), lambda: [compute(thread)], [thread])

    return body


def wait(thread):
    device.barrier(thread)
    return thread


def loop(thread):
    return device.repeat(device.constant(thread, 2, "i8"), lambda i, v: [v + 1], thread)[0]


@pytest.mark.parametrize(
    "compute, message",
    [
        (lambda thread: device.shuffle_xor(thread, 1), "a shuffle in a branch"),
        (wait, "a barrier in a branch"),
        (loop, "a loop in a branch"),
    ],
    ids=["shuffle_xor", "barrier", "loop"],
)
def test_threads_that_part(compute, message):
    run(compute)
    with pytest.raises(Fault, match=message):
        run(in_a_branch(compute))


@pytest.mark.parametrize("compute", [lambda thread: device.shuffle_xor(thread, 1), loop])
def test_warps_that_part(compute):
    """What all threads of a warp do, other warps need not; but all wait at a barrier."""
    run(in_a_branch(compute, lambda thread: thread < emulator.WARP))
    with pytest.raises(Fault, match="a barrier in a branch"):
        run(in_a_branch(wait, lambda thread: thread < emulator.WARP))


def exchange(wait, partner):
    """A kernel in which each thread reads what another one has put into shared memory."""

    def body(thread):
        always, area = device.constant(thread, True, "b1"), device.shared(thread, 4 * 64)
        device.put_shared_words(area + thread * 4, 4, [thread], always)
        wait(thread)
        device.shared_words(area + partner(thread) * 4, 4, 1)
        return area, always

    return body


def in_warp(thread):
    return (thread & 32) | ((thread + 1) & 31)


def across(thread):
    return (thread + 32) & 63


def no_wait(_):
    pass


def test_a_warp_waits_for_itself_alone():
    run(exchange(device.warp_barrier, in_warp))
    run(exchange(device.barrier, across))
    for wait, partner in ((no_wait, in_warp), (device.warp_barrier, across)):
        with pytest.raises(Fault, match="read without a barrier"):
            run(exchange(wait, partner))


@pytest.mark.parametrize(
    "first, second, partner, good",
    [
        (device.warp_barrier, device.warp_barrier, in_warp, True),
        (device.warp_barrier, no_wait, in_warp, False),
        (device.barrier, device.barrier, across, True),
        (device.barrier, device.warp_barrier, across, False),
        (device.barrier, no_wait, across, False),
    ],
)
def test_what_another_thread_reads_is_not_overwritten_yet(first, second, partner, good):
    def body(thread):
        area, always = exchange(first, partner)(thread)
        second(thread)
        device.put_shared_words(area + thread * 4, 4, [thread], always)

    if good:
        run(body)
        return
    with pytest.raises(Fault, match="written without a barrier"):
        run(body)


def test_readers_of_two_warps_both_count():
    """The second reading does not hide the first, of another warp, from who waits for its own."""

    def body(thread):
        always, area = device.constant(thread, True, "b1"), device.shared(thread, 4 * 64)
        device.put_shared_words(area + thread * 4, 4, [thread], always)
        device.barrier(thread)
        device.shared_words(area + across(thread) * 4, 4, 1)
        device.warp_barrier(thread)
        device.shared_words(area + thread * 4, 4, 1)
        device.warp_barrier(thread)
        device.put_shared_words(area + thread * 4, 4, [thread], always)

    with pytest.raises(Fault, match="written without a barrier"):
        run(body)


def test_halves_in_shared_memory():
    found = np.zeros((2, 64), np.uint16)

    def body(frame):
        thread, always = frame.thread, device.constant(frame.thread, True, "b1")
        area = device.shared(thread, 2 * 64)
        word = (thread << 17) | (1 << 16) | (thread << 1)  # of the halves 2·t and 2·t + 1
        device.put_shared_words(area + thread * 4, 4, [word], always & (thread < 32))
        device.barrier(thread)
        half = device.shared_words(area + thread * 2, 2, 1)
        at = frame.block * 128 + device.convert(thread * 2, "i8")
        device.store(frame.out + at, 2, half)

    kernel = device.Kernel("test", body, {"out": "i8"})
    emulate(kernel, 2, 64, [found.ctypes.data], [found])
    assert np.array_equal(found, [range(64)] * 2)


def test_halves_are_written_and_read_where_a_mask_holds():
    found = np.zeros((2, 64), np.uint16)

    def body(frame):
        thread, always = frame.thread, device.constant(frame.thread, True, "b1")
        area = device.shared(thread, 2 * 64)
        device.put_shared_words(area + thread * 2, 2, [thread | (7 << 16)], thread < 32)
        device.barrier(thread)
        there = (thread & 33) == 1  # others are not read, nor have all been written
        half = device.shared_words(area + thread * 2, 2, 1, there, 9)
        at = frame.block * 128 + device.convert(thread * 2, "i8")
        device.store(frame.out + at, 2, half, always)

    kernel = device.Kernel("test", body, {"out": "i8"})
    emulate(kernel, 2, 64, [found.ctypes.data], [found])
    assert np.array_equal(found, [[t if t % 2 and t < 32 else 9 for t in range(64)]] * 2)


def test_halves_of_a_word_are_written_by_two_threads():
    def body(thread, by):
        always, area = device.constant(thread, True, "b1"), device.shared(thread, 2 * 64)
        device.put_shared_words(area + (thread >> by) * 2, 2, [thread], always)

    run(lambda thread: body(thread, 0))
    with pytest.raises(Fault, match="same place of shared memory"):
        run(lambda thread: body(thread, 1))


def test_a_loop_that_differs_between_threads():
    def body(thread):
        device.repeat(device.convert(thread & 3, "i8"), lambda i, v: [v + 1], thread)

    with pytest.raises(Fault, match="differs from thread to thread"):
        run(body)


def test_a_shuffle_from_no_lane():
    with pytest.raises(Fault, match="shuffle by 32"):
        run(lambda thread: device.shuffle_xor(thread, emulator.WARP))


@pytest.mark.parametrize("size, count", [(4, 4), (4, 2), (8, 2), (2, 2)])
@pytest.mark.parametrize("access", ["load", "store"])
def test_a_wide_access_needs_its_alignment(access, size, count):
    array = np.zeros(4096, np.uint8)
    base = -(-array.ctypes.data // 64) * 64

    def body(thread, by):
        width = size * count
        address = device.constant(thread, base + by, "i8") + device.convert(thread, "i8") * width
        ok = device.constant(thread, True, "b1")
        if access == "load":
            device.load(address, size, count, ok)
        else:
            word = device.constant(thread, 0, "i8" if size == 8 else "i4")
            device.store(address, size, [word] * count, ok)

    run(lambda thread: body(thread, 0), [array], blocks=1, threads=32)
    for by in (size, size * count // 2 if count > 2 else size):
        with pytest.raises(Fault, match="misaligned"):
            run(lambda thread, by=by: body(thread, by), [array], blocks=1, threads=32)


def test_two_threads_at_one_place():
    array = np.zeros(64, np.int32)

    def body(thread):
        at = device.constant(thread, array.ctypes.data, "i8") + (device.convert(thread, "i8") << 2)
        device.store(at, 4, [thread], device.constant(thread, True, "b1"))

    run(body, [array], blocks=1)
    np.testing.assert_array_equal(array, np.arange(64))
    with pytest.raises(Fault, match="same place"):
        run(body, [array], blocks=2)


def test_what_another_thread_wrote_to_global_memory():
    array = np.zeros(64, np.int32)

    def place(number):
        start = device.constant(number, array.ctypes.data, "i8")
        return start + (device.convert(number, "i8") << 2)

    def body(thread, waits, further):
        ok = device.constant(thread, True, "b1")
        device.store(place(thread), 4, [thread], ok)
        if waits:
            device.barrier(thread)
        return device.load(place((thread + further) & 63), 4, 1, ok)[0].value

    read = []
    run(lambda thread: read.append(body(thread, True, 33)), [array], blocks=1)
    np.testing.assert_array_equal(read[0][0], (np.arange(64) + 33) % 64)
    run(lambda thread: body(thread, False, 0), [array], blocks=1)  # its own
    with pytest.raises(Fault, match="no barrier between"):
        run(lambda thread: body(thread, False, 1), [array], blocks=1)


def copying(steps, array=None, places=64):
    """A kernel of two warps, of whose threads each asks for 16 bytes of an array to be copied."""
    array = np.arange(4 * places, dtype=np.int32) if array is None else array
    base, found = -(-array.ctypes.data // 16) * 16, []

    def body(thread):
        always, start = device.constant(thread, True, "b1"), device.constant(thread, base, "i8")
        area = device.shared(thread, 16 * 64)
        place, address = area + thread * 16, start + (device.convert(thread, "i8") << 4)
        words = [thread] * 4

        def read(at):
            found[:] = [w.value for w in device.shared_words(at, 4, 4)]
            return [thread]

        def odd(compute):
            device.when((thread & 1) == 1, lambda: [compute() or thread], [thread])

        do = {
            "copy": lambda: device.copy_to_shared(place, address),
            "copy-few": lambda: device.copy_to_shared(place, address, thread < 60),
            "misplace": lambda: device.copy_to_shared(area + 8 * thread, address),
            "commit": lambda: device.commit_copies(thread),
            "await": lambda: device.await_copies(thread, 0),
            "await-1": lambda: device.await_copies(thread, 1),
            "read": lambda: read(place),
            "read-other": lambda: read(area + 16 * in_warp(thread)),
            "write": lambda: device.put_shared_words(place, 4, words, always),
            "change": lambda: device.store(address, 4, words, always),
            "sync": lambda: device.warp_barrier(thread),
            "commit-odd": lambda: odd(lambda: device.commit_copies(thread)),
            "await-odd": lambda: odd(lambda: device.await_copies(thread, 0)),
        }
        for step in steps.split():
            do[step]()

    run(body, [array], blocks=1, shared=0)
    return found


def test_copies_come_when_they_are_waited_for():
    want = np.arange(256).reshape(64, 4).T
    for steps in ("copy commit await read", "copy commit commit await-1 read",
                  "write read copy commit await read copy commit await read"):  # fmt: skip
        np.testing.assert_array_equal([v[0] for v in copying(steps)], want)
    found = copying("copy commit await sync read-other")
    others = (np.arange(64) & 32) | ((np.arange(64) + 1) & 31)
    np.testing.assert_array_equal([v[0] for v in found], want[:, others])
    found = copying("write copy-few commit await read", places=60)
    np.testing.assert_array_equal([v[0][:60] for v in found], want[:, :60])
    np.testing.assert_array_equal(found[0][0][60:], np.arange(60, 64))


@pytest.mark.parametrize(
    "steps, message",
    [
        ("copy commit read await", "while a copy to it is on its way"),
        ("copy await read", "while a copy to it is on its way"),
        ("copy commit await-1 read", "while a copy to it is on its way"),
        ("copy commit commit copy commit await", "while a copy to it is on its way"),
        ("copy write commit await", "while a copy to it is on its way"),
        ("copy commit await read-other", "without a barrier"),
        ("write sync read-other copy commit await", "without a barrier"),
        ("copy change commit await", "written meanwhile"),
        ("copy commit", "end while a copy"),
        ("copy", "end while a copy"),
        ("misplace", "misaligned"),
        ("copy commit-odd", "in a branch"),
        ("copy commit await-odd", "in a branch"),
    ],
)
def test_what_must_not_be_done_with_a_copy(steps, message):
    with pytest.raises(Fault, match=message):
        copying(steps)


def test_a_copy_is_of_an_array():
    with pytest.raises(Fault, match="outside"):
        copying("copy commit await", places=63)
    with pytest.raises(Fault, match="outside"):
        copying("copy-few commit await", places=59)
