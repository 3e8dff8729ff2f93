"""The CUDA target: arrays on an NVIDIA GPU, kernels by numba-cuda, launched through cuda.core.

`functional` checks what does not depend on the target and calls the methods of `Target`. Nothing of
a CUDA stack is imported before the first call with an array on a GPU. No call waits for the GPU;
what the CPU target learns from values on the host, kernels work out on the device.
"""

import os

import numpy as np

from numbakern.cuda import families, launch

__all__ = ["Target", "check", "target_of"]


def check():
    """Wait for the GPUs and raise IndexError for a label that was no class since the last check.

    A kernel cannot raise: a row whose label is neither in [0, C) nor `ignore_index` has loss and
    gradient NaN, and is remembered. With the environment variable NUMBAKERN_CHECK=1 every call
    checks by itself, and so waits. Without a GPU, or before its first use, there is nothing to do.

    Raises
    ------
    IndexError
        Names the position and the value of the first such label of a call.
    """
    for device in list(launch.devices):
        report = vars(device).get("report")  # made at the first call with labels
        if report is not None:
            report.check()


def _checks_each_call():
    return os.environ.get("NUMBAKERN_CHECK", "") not in ("", "0")


class Number:
    """A number of the host as `grad_output`: it needs no array and no copy."""

    shape, ndim = (), 0
    __slots__ = ("dtype", "value")

    def __init__(self, value):
        self.dtype = np.asarray(value).dtype
        self.value = value


def target_of(name, given):
    """The Target for a call whose argument `name` is an array on a GPU.

    Results are of the family of the first array other than `grad_output`.
    """
    if name == "grad_output":
        others = (n for n, a in given.items() if n != name and a is not None)
        name = next(others, name)
    array = given[name]
    family = families.of(type(array))
    view = family.view(name, array)
    return Target(family, family.queue(array, view.device), name, array, view)


class Target:
    """The functions that `functional` calls, for one call on one stream of one device."""

    ARRAY_TYPES = object  # what `out=` may be: `asarray` says

    def __init__(self, family, queue, name, array, view):
        self.family, self.queue, self.name = family, queue, name
        self._views = {id(array): (array, self._checked(name, view))}

    def asarray(self, name, value):
        """The argument as a DeviceArray, or a Number; TypeError if it is not on this device."""
        known = self._views.get(id(value))
        view = known[1] if known is not None else self._view(name, value)
        if name == "out":
            if not view.family.mutable:
                kind = type(value).__name__
                raise TypeError(f"out: expected an array that can be written to, got {kind}")
            view.family.written(value)
        return view

    def _view(self, name, value):
        if isinstance(value, (int, float, np.number, np.bool_)):
            if name != "grad_output":
                kind = type(value).__name__
                raise TypeError(f"{name}: expected an array on the GPU, got {kind}")
            return Number(value)
        view = self._checked(name, families.of(type(value)).view(name, value))
        self._views[id(value)] = value, view
        return view

    def _checked(self, name, view):
        if view.device != self.queue.device.ordinal:
            raise TypeError(
                f"{name}: expected an array on the same device as {self.name} "
                f"(cuda:{self.queue.device.ordinal}), got one on cuda:{view.device}"
            )
        if not view.dtype.isnative:
            raise TypeError(f"{name}: expected the machine's byte order, got dtype {view.dtype}")
        size = view.dtype.itemsize
        if view.pointer % size or any(s % size for s in view.strides):
            raise TypeError(f"{name}: expected an array aligned to its {size}-byte elements")
        return view

    def empty(self, shape, dtype):
        """An array for results, of the same family as the input."""
        return self.family.empty(shape, dtype, self.queue)
