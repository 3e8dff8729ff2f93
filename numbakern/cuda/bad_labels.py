"""Labels that are no class: what kernels leave of them on the device, and the error it becomes.

A device has one block of memory with a record for each kind of call, that is for each batch shape,
number of classes and ignored label: an int64 that a kernel lowers to the row's number times
2**BITS plus the label's value, cut to BITS bits. So the first bad label stays. Only `check` reads
the records, and so only `check` waits for the device.
"""

import threading
from typing import NamedTuple

import numpy as np

from numbakern import arrays

BITS = 24
NONE = np.iinfo(np.int64).max  # the record of calls without a bad label
_LARGEST = (1 << (BITS - 1)) - 1
_ROOM = 4096  # records; more kinds of call than that share the last one


class Report:
    """The records of a device.

    Parameters
    ----------
    memory : object
        On the device: ``write(array)`` of int64, ``read()`` after all that has been started is
        done, and its ``address``.
    """

    def __init__(self, memory):
        self._memory = memory
        self._kinds = {}
        self._lock = threading.Lock()
        self._used = False
        memory.write(np.full(_ROOM, NONE))

    def address(self, batch, classes, ignore_index):
        """Address of the record for calls of this kind."""
        self._used = True
        kind = batch, classes, ignore_index
        index = self._kinds.get(kind)
        if index is None:
            with self._lock:
                index = self._kinds.setdefault(kind, min(len(self._kinds), _ROOM - 1))
        return self._memory.address + 8 * index

    def take(self):
        """The first record since the last time, as a Found; None if there is none."""
        if not self._used:
            return None
        records = self._memory.read()
        if np.all(records == NONE):
            return None
        self._memory.write(np.full(_ROOM, NONE))
        with self._lock:
            kinds = list(self._kinds.items())
        for (batch, classes, ignore_index), index in kinds:
            record = int(records[index])
            if record != NONE:
                row, value = record >> BITS, record & ((1 << BITS) - 1)
                if index == _ROOM - 1 and len(kinds) > _ROOM:  # of which kind is not known
                    return Found(None, (row,), _told(value), None, None)
                where = tuple(int(i) for i in np.unravel_index(row, batch)) if batch else ()
                return Found(batch, where, _told(value), classes, ignore_index)
        return None


class Found(NamedTuple):
    """A bad label of a call on a batch of this shape.

    Of a record that kinds of calls share, batch, classes and ignore_index are None and the position
    is the row's number in the batch.
    """

    batch: tuple[int, ...] | None
    position: tuple[int, ...]
    value: int | str  # as far as a record holds it
    classes: int | None
    ignore_index: int | None

    def is_bad(self, value):
        """Whether such a label is no class, and not ignored, in calls of this kind."""
        return value != self.ignore_index and not 0 <= value < self.classes

    def error(self):
        """The IndexError that tells of it."""
        if self.batch is None:
            (row,) = self.position
            return IndexError(
                f"labels: expected a class or ignore_index, got {self.value} for row {row}"
            )
        return arrays.bad_label(self.position, self.value, self.classes, self.ignore_index)


def _told(bits):
    """The value of a label as far as a record holds it."""
    value = bits - (1 << BITS) if bits > _LARGEST else bits
    if value == _LARGEST:
        return f"{value} or more"
    return f"{value} or less" if value == -_LARGEST - 1 else value
