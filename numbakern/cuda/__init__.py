"""The CUDA target: arrays on an NVIDIA GPU, kernels by numba-cuda, launched through cuda.core.

`functional` checks what does not depend on the target and calls the methods of `Target`. Nothing of
a CUDA stack is imported before the first call with an array on a GPU. No call waits for the GPU;
what the CPU target learns from values on the host, kernels work out on the device.
"""

import functools
import math
import operator
import os
from typing import NamedTuple

import numpy as np

from numbakern import arrays
from numbakern.cuda import copies, launch
from numbakern.cuda.families import DEVICE, NUMBERS, Family, of
from numbakern.cuda.plan import Layout, Spec, Step, kernel_of
from numbakern.cuda.plan import plan as plan_of
from numbakern.cuda.pool import contiguous_strides

__all__ = ["Target", "check", "target_of"]

# Options that are keys by their value. A tuple is none: (1, 2) and (1.0, 2) are equal.
_PLAIN = (int, float, str, type(None), type, np.dtype, np.number)
_REMEMBERED = 4096  # calls, before all are forgotten


def check():
    """Wait for the GPUs and raise IndexError for a label that was no class since the last check.

    A kernel cannot raise: a row whose label is neither in [0, C) nor `ignore_index` has loss and
    gradient NaN, and is remembered. With the environment variable NUMBAKERN_CHECK=1 every call
    checks by itself, and so waits. Without a GPU, or before its first use, there is nothing to do.

    Raises
    ------
    IndexError
        Names the position and the value of the first such label of a call; of a value beyond 23
        bits and a sign, that it is.
    """
    for device in list(launch.devices):
        found = device.take_bad_label()
        if found:
            raise found.error()


def target_of(name, given):
    """The Target for a call whose argument `name` is an array on a GPU.

    Results are of the family of the first array other than `grad_output`.
    """
    if name == "grad_output":
        others = (n for n, a in given.items() if n != name and a is not None)
        name = next(others, name)
    return Target(name, given)


class DeviceArray:
    """Elements in device memory, for planning: where they are is known when the plan is run.

    It has what the checks in `arrays` ask of an array. Its place is a slot, that of an argument or
    of memory made for the call, and an offset in bytes.
    """

    __slots__ = ("dtype", "ndim", "place", "shape", "strides", "target", "writeable")
    forc = False  # as in NumPy's flags: not known to be contiguous

    def __init__(self, target, place, shape, strides, dtype, writeable=True):
        self.target, self.place, self.writeable = target, place, writeable
        self.shape, self.strides, self.dtype = shape, strides, dtype  # strides in bytes
        self.ndim = len(shape)

    @property
    def flags(self):
        """NumPy's ``array.flags``, as far as it is asked for."""
        return self

    def like(self, shape, strides=None):
        """Elements of the same memory and type; contiguous if no strides are given."""
        if strides is None:
            strides = contiguous_strides(shape, self.dtype.itemsize)
        return DeviceArray(self.target, self.place, shape, strides, self.dtype)

    def __setitem__(self, everything, values):
        """``out[...] = values`` of an argument `out`."""
        self.target.assign(self, values)

    def unwrap(self):
        """The array as its library has it."""
        return self.target.result(self)

    def reshape(self, shape):
        """The same elements, which are contiguous, in another shape."""
        return self.target.reshaped(self, shape)


_SCRATCH = -1
"""The slot of the temporaries, one block: last in a call's addresses."""


class Call(NamedTuple):
    """All of a call that does not depend on addresses: what is remembered and run again.

    Attributes
    ----------
    made : list of (tuple, numpy.dtype)
        Shape and dtype of each array to be made; their slots follow those of the arguments.
    scratch : int
        Bytes of the temporaries.
    temporaries : list of int
        Where in the scratch memory each of them is.
    constants : list of int and float
        What kernels are given beside addresses.
    starts : list of tuple
        Of each launch the configuration, the kernel, and what picks its arguments from the
        addresses of the slots, those of the temporaries, and the constants.
    results : list of int
        The slots of what is returned.
    out : Family or None
        That of the argument `out`.
    beside : list of (int, tuple or None)
        Of each input that is looked at beside `out` its slot, and between which distances of their
        addresses they would have bytes in common; None if they are at the same address.
    holds : bool
        Whether the arguments must be kept until the work is done.
    labels : DeviceArray or None
        To be looked at under NUMBAKERN_CHECK.
    """

    made: list
    scratch: int
    temporaries: list
    constants: list
    starts: list
    results: list
    out: Family | None
    beside: list
    holds: bool
    labels: DeviceArray | None


class Target:
    """The functions that `functional` calls, for one call on one stream of one device.

    They plan: arrays are `DeviceArray`s, and what is to be started is noted down in a `Call`. Then
    the call is run. One like it, whose arguments have the same types, shapes, strides, alignment
    and options, goes straight to running what is remembered (`again`): the checks hold for it too.
    """

    ARRAY_TYPES = object  # what `out=` may be: `asarray` says
    foreign = None  # addresses of other streams that the arguments are on
    key = None  # what the call is to be remembered by
    made = None  # shape and dtype of arrays to be made, when planning has begun
    done = None  # the results, when the call has been run

    def __init__(self, name, given):
        decides = given[name]
        family = of(type(decides))
        first = family.look(name, decides, None)
        device = first[0][DEVICE]
        self.name, self.given, self.family, self.like = name, given, family, first[2]
        self.queue = queue = family.queue(first[2], device)
        self.keys, self.addresses, self.kept = keys, addresses, kept = [], [], []
        for n, value in given.items():
            if value is None:
                keys.append(None)
                addresses.append(0)
                kept.append(None)
                continue
            if value is decides:
                key, address, keep = first
            else:
                other = of(type(value))
                key, address, keep = other.look(n, value, queue)
                if other is not family or other.each_its_stream:
                    self._take_foreign(other, key, keep)
            keys.append(key)
            addresses.append(address)
            kept.append(keep)

    def _take_foreign(self, family, key, keep):
        """Note the stream of an array whose work may be on another than the call's."""
        if key[DEVICE] == self.queue.device.ordinal:
            handle = family.handle(keep, key[DEVICE])
            if handle is not None and (handle or launch.LEGACY) != self.queue.number:
                self.foreign = [*(self.foreign or ()), handle]

    # -- a call like an earlier one

    def again(self, name, *options):
        """The results of the function of this name, if a call like this one is remembered."""
        addresses = self.addresses
        out = addresses[-1]  # the last argument wherever there is one
        # 1, 1.0 and True are not the same; nor are a call in place and one that is not.
        key = (name, options, *map(type, options), out and addresses.count(out), *self.keys)
        try:
            call = self.queue.device.calls.get(key)
        except TypeError:  # an option that is no key
            return None
        if call is None:
            if all(isinstance(option, _PLAIN) for option in options):
                self.key = key
            return None
        for slot, between in call.beside:
            distance = addresses[slot] - out
            if between[0] < distance < between[1] if between else distance:
                return None
        return self._run(call)

    def _finish(self, *results):
        """Run what has been planned; these arrays are what the function returns, in order."""
        call = self._planned([array.place[0] for array in results if array is not None])
        given = self._run(call)
        given = given if len(call.results) > 1 else (given,)
        self.done = dict(zip(call.results, given, strict=True))
        if self.key is not None:
            calls = self.queue.device.calls
            if len(calls) >= _REMEMBERED:
                calls.clear()
            calls[self.key] = call

    def _planned(self, results):
        slots = len(self.given) + len(self.made)
        places = [v for _, values in self.steps for v in values if type(v) is tuple]
        temporaries = sorted({offset for slot, offset in places if slot == _SCRATCH})
        starts, constants = [], []
        for prepared, values in self.steps:
            picked = []
            for value in values:
                if type(value) is not tuple:
                    picked.append(slots + len(temporaries) + len(constants))
                    constants.append(value)
                else:
                    slot, offset = value
                    picked.append(slots + temporaries.index(offset) if slot == _SCRATCH else slot)
            starts.append((*prepared, operator.itemgetter(*picked)))
        out = self.given.get("out")
        return Call(
            self.made,
            self.scratch,
            temporaries,
            constants,
            starts,
            results,
            None if out is None else of(type(out)),
            self.beside,
            any(key is not None and key[0].holds for key in self.keys),
            self.labels,
        )

    def _run(self, call):
        queue, values, kept, like = self.queue, self.addresses, self.kept, self.like
        arguments, empty = len(kept), self.family.empty
        before = queue.device.make_current()
        try:
            if self.foreign:
                for handle in self.foreign:
                    queue.wait_for(handle)
            places = 0
            for shape, dtype in call.made:
                array, address = empty(shape, dtype, queue, like)
                kept.append(array)
                values.append(address)
                places |= address
            if call.scratch:
                scratch, address = self.family.scratch(call.scratch, queue, like)
                values += [address + offset for offset in call.temporaries]
                places |= address
            if places & 15:
                raise RuntimeError(f"memory of {type(like).__name__} not aligned to 16 bytes")
            values += call.constants
            start = queue.start
            for config, kernel, pick in call.starts:
                start(config, kernel, *pick(values))
            if self.foreign:
                for handle in self.foreign:
                    queue.release_to(handle)
            if call.holds:
                queue.hold(tuple(kept[:arguments]))
        finally:
            if before is not None:
                launch.restore(before)
        if call.out is not None:
            call.out.written(self.given["out"])
        if call.labels is not None and _CHECK in _SET and _checks_each_call():
            self._check_labels(call.labels)
        results, export = [], self.family.export
        for slot in call.results:
            result = kept[slot] if slot >= arguments else self.given["out"]
            results.append(result if export is None or slot < arguments else export(result))
        return results[0] if len(results) == 1 else tuple(results)

    def _check_labels(self, labels):
        """Raise for a bad label of this call, with its full value."""
        found = self.queue.device.take_bad_label()
        if not found:
            return
        if found.batch == labels.shape:
            steps = zip(found.position, labels.strides, strict=True)
            address = self._address(labels) + sum(i * stride for i, stride in steps)
            (value,) = np.frombuffer(
                self.queue.device.read(address, labels.dtype.itemsize), labels.dtype
            )
            if found.is_bad(int(value)):  # it may be that of an earlier call
                found = found._replace(value=int(value))
        raise found.error()

    # -- planning: the arrays of a call

    def _begin(self):
        """Start to plan."""
        self.slots = {name: slot for slot, name in enumerate(self.given)}
        self.made, self.scratch, self.steps, self.beside = [], 0, [], []
        self.labels = None

    def asarray(self, name, value):
        """The argument as a DeviceArray; TypeError if it is not on this device."""
        if self.made is None:
            self._begin()
        # It is not kept here: a ring of references would keep the caller's memory.
        view = self._view(name)
        if name == "out" and not self.keys[view.place[0]][0].mutable:
            kind = type(value).__name__
            raise TypeError(f"out: expected an array that can be written to, got {kind}")
        return view

    def _view(self, name):
        slot = self.slots[name]
        key = self.keys[slot]
        if key is None:
            raise TypeError(f"{name}: expected an array on the GPU, got None")
        ordinal = self.queue.device.ordinal
        if key[DEVICE] != ordinal:
            raise TypeError(
                f"{name}: expected an array on the same device as {self.name} (cuda:{ordinal}), "
                f"got one on cuda:{key[DEVICE]}"
            )
        family = key[0]
        shape, strides, dtype, writeable = family.describe(name, key)
        family.check_address(name, self.addresses[slot])
        if not dtype.isnative:
            raise TypeError(f"{name}: expected the machine's byte order, got dtype {dtype}")
        if not family.counts_elements:
            size = dtype.itemsize
            if self.addresses[slot] % size or any([s % size for s in strides]):
                raise TypeError(f"{name}: expected an array aligned to its {size}-byte elements")
        return DeviceArray(self, (slot, 0), shape, strides, dtype, writeable)

    def empty(self, shape, dtype):
        """An array for results, of the same family as the input."""
        shape = tuple(shape)
        self.made.append((shape, dtype))
        place = len(self.given) + len(self.made) - 1, 0
        return DeviceArray(self, place, shape, contiguous_strides(shape, dtype.itemsize), dtype)

    def _temporary(self, shape, dtype):
        """A contiguous array for the time of the call."""
        place = self._room(math.prod(shape) * dtype.itemsize)
        return DeviceArray(self, place, shape, contiguous_strides(shape, dtype.itemsize), dtype)

    def _room(self, size):
        """The place of so many bytes for the time of the call."""
        place = _SCRATCH, self.scratch
        self.scratch += -(-max(size, 1) // 16) * 16
        return place

    def _address(self, array):
        """The address of an argument."""
        slot, offset = array.place
        return self.addresses[slot] + offset

    def _is_aligned(self, array):
        slot, offset = array.place
        given = self.addresses[slot] if 0 <= slot < len(self.given) else 0
        return (given + offset) & 15 == 0

    def reshaped(self, result, shape):
        """A result of `empty` in another shape, before the call is run."""
        slot = result.place[0]
        self.made[slot - len(self.given)] = shape, result.dtype
        return result.like(shape)

    def result(self, array):
        """A result as the caller gets it."""
        if self.done is None:
            self._finish(array)
        return self.done[array.place[0]]

    def assign(self, out, values):
        """Put values of the same type and shape into the argument `out`."""
        self._copy(values, out)
        self._finish(out)

    # -- whole arrays

    def softmax(self, operation, x, axes, compute, out):
        """log_softmax or softmax (`operation`) of x along these axes into `out`."""
        self._transform(operation, {"x": x}, axes, compute, out)

    def backward(self, operation, grad_output, output, axes, compute, out):
        """log_softmax_backward or softmax_backward (`operation`) into `out`."""
        self._transform(operation, {"x": grad_output, "y": output}, axes, compute, out)

    def _transform(self, operation, inputs, axes, compute, out):
        if math.prod(out.shape):
            self._transformed(operation, inputs, axes, compute, out)
        self._finish(out)

    def _transformed(self, operation, inputs, axes, compute, out):
        inputs = {name: self._apart(array, out) for name, array in inputs.items()}
        target, axis = self._view_of_one_axis(out, axes)
        result = target
        if target is None:
            shape = _last(out.shape, axes)
            result = self._temporary(shape, out.dtype)
            axis = len(shape) - 1
        inputs = {name: self._of_one_axis(array, axes) for name, array in inputs.items()}
        self._rows(operation, (), result.shape, axis, compute, {**inputs, "out": result})
        if target is None:
            order = (*(d for d in range(out.ndim) if d not in axes), *axes)
            moved = _transposed(out, order)
            self._copy(result.like(moved.shape), moved)

    def logsumexp(self, x, axes, compute, dtype):
        """log Σ exp(x) over these axes, without them."""
        batch = tuple(n for d, n in enumerate(x.shape) if d not in axes)
        result = self.empty(batch, dtype)
        if math.prod(x.shape) == 0:
            self._fill(result, -math.inf)
            return result
        x = self._of_one_axis(x, axes)
        axis = axes[0] if len(axes) == 1 else x.ndim - 1
        self._rows("logsumexp", (), x.shape, axis, compute, {"x": x, "row_lse": result})
        return result

    # -- losses

    def nll_loss(self, log_probs, labels, axis, compute, dtype, weight, ignore_index, reduction):
        """Negative log-likelihood of the labels."""
        batch = arrays.batch_shape(log_probs.shape, axis)
        loss = self.empty(batch if reduction == "none" else (), dtype)
        given = {"x": log_probs, "labels": labels, "weight": weight, "loss": loss}
        options, values = self._of_labels(labels, batch, log_probs.shape[axis], ignore_index)
        options = (*options, ("reduction", reduction))
        self._rows("nll", options, log_probs.shape, axis, compute, given, **values)
        self._finish(loss)
        return loss.unwrap()

    def nll_loss_backward(
        self, grad_output, labels, axis, compute, weight, ignore_index, reduction, out
    ):
        """Gradient of `nll_loss` into `out`: zero but at the labels."""
        batch, classes = arrays.batch_shape(out.shape, axis), out.shape[axis]
        given = {"labels": self._apart(labels, out), "weight": self._apart(weight, out)}
        scale = self._upstream(grad_output, batch, out, given)
        options, values = self._of_labels(labels, batch, classes, ignore_index)
        options = (*options, ("reduction", reduction))
        given["out"] = out
        if not classes:
            self._no_classes(options, axis, compute, {**given, "x": out}, False, values)
        self._rows("nll_backward", options, out.shape, axis, compute, given, scale=scale, **values)
        self._finish(out)

    def cross_entropy(
        self,
        logits,
        labels,
        soft,
        axis,
        compute,
        dtype,
        weight,
        ignore_index,
        reduction,
        smoothing,
        *,
        with_loss,
        with_lse=False,
        grad_output=None,
        lse=None,
        out=None,
    ):
        """Cross-entropy: the loss, the rows' log-sum-exp, the gradient into `out`, as asked for.

        Returns
        -------
        loss, lse
            None for what was not asked for.
        """
        shape, batch = logits.shape, arrays.batch_shape(logits.shape, axis)
        classes = shape[axis]
        given = {"x": logits, "weight": weight, "row_lse": lse}
        given["y" if soft else "labels"] = labels
        scale = 1.0
        if out is not None:
            given = {name: self._apart(array, out) for name, array in given.items()}
            if grad_output is not None:
                scale = self._upstream(grad_output, batch, out, given)
            given["out"] = out
        if with_lse:
            given["row_lse"] = self.empty(batch, _FLOAT64)
        if with_loss:
            given["loss"] = self.empty(batch if reduction == "none" else (), dtype)
        values = {"keep": 1.0 - smoothing, "spread": smoothing / classes if classes else 0.0}
        options = (("given", lse is not None), ("reduction", reduction))
        if soft:
            options = (("soft", True), *options)
        else:
            of_labels, more = self._of_labels(labels, batch, classes, ignore_index)
            options = (("smooth", smoothing > 0.0), *of_labels, *options)
            values.update(more)
        if classes or not math.prod(batch):
            self._rows("cross_entropy", options, shape, axis, compute, given, scale=scale, **values)
        else:
            self._no_classes(options, axis, compute, given, soft, values)
        loss = given["loss"] if with_loss else None
        lse = given["row_lse"] if with_lse else None
        self._finish(loss, lse, out)
        return tuple(array and array.unwrap() for array in (loss, lse))

    def _no_classes(self, options, axis, compute, given, soft, values):
        """The losses of rows of zero classes: every label is out of range."""
        x, loss = given["x"], given.get("loss")
        if given.get("row_lse") is not None:
            self._fill(given["row_lse"], -math.inf)
        if soft:
            if loss is not None:
                self._fill(loss, 0.0)
            return
        options = dict(options)
        if loss is None:
            loss, options["reduction"] = self._temporary(given["labels"].shape, _FLOAT64), "none"
        options = tuple((n, options[n]) for n in ("ignores", "reduction"))
        kept = {"x": x, "labels": given["labels"], "weight": given["weight"], "loss": loss}
        self._rows("nll", options, x.shape, axis, compute, kept, **values)

    def _of_labels(self, labels, batch, classes, ignore_index):
        """The options and values that follow from class labels."""
        # Without this Target, whose arrays it would keep.
        self.labels = DeviceArray(None, labels.place, labels.shape, labels.strides, labels.dtype)
        low, high = _bounds(labels.dtype)
        ignores = low <= ignore_index <= high
        values = {"bad": self.queue.device.report.address(batch, classes, ignore_index)}
        if ignores:  # in 64 bits, as a kernel has the label
            values["ignore_index"] = (ignore_index + 2**63) % 2**64 - 2**63
        return (("ignores", ignores),), values

    def _upstream(self, grad_output, batch, out, given):
        """The number that a gradient is scaled by; an array is put among the given ones."""
        if self.keys[grad_output.place[0]][0] is NUMBERS:
            return grad_output.place
        array = self._apart(grad_output, out)
        if array.ndim != len(batch):
            array = array.like(batch, (0,) * len(batch))
        given["row_scale"] = array
        return 1.0

    # -- views and copies

    def _apart(self, array, out):
        """The array, copied if it overlaps `out` without being the same elements."""
        if array is None or self.given.get("out") is None:
            return array
        if self._same(array, out):
            self.beside.append((array.place[0], None))
            return array
        first, end = _span(array)
        out_first, out_end = _span(out)
        low, high = out_first - end, out_end - first
        if not low < self._address(array) - self._address(out) < high:
            self.beside.append((array.place[0], (low, high)))
            return array
        self.key = None  # a call of its own
        copy = self._temporary(array.shape, array.dtype)
        self._copy(array, copy)
        return copy

    def _same(self, a, b):
        """Whether two arrays are the same elements in the same places."""
        return (
            self._address(a) == self._address(b)
            and a.shape == b.shape
            and a.strides == b.strides
            and a.dtype.itemsize == b.dtype.itemsize
        )

    def _view_of_one_axis(self, array, axes):
        """(a view with one class axis, which), or (None, None)."""
        if len(axes) == 1:
            return array, axes[0]
        size, stride = 1, array.dtype.itemsize
        for d in reversed(axes):
            if array.shape[d] == 1:
                continue
            if size != 1 and array.strides[d] != stride * size:
                return None, None
            if size == 1:
                stride = array.strides[d]
            size *= array.shape[d]
        batch = [d for d in range(array.ndim) if d not in axes]
        shape = (*(array.shape[d] for d in batch), size)
        strides = (*(array.strides[d] for d in batch), stride)
        return array.like(shape, strides), len(batch)

    def _of_one_axis(self, array, axes):
        """The array with one class axis, the last if there were several; copied where need be."""
        view, _ = self._view_of_one_axis(array, axes)
        if view is None:
            order = (*(d for d in range(array.ndim) if d not in axes), *axes)
            moved = _transposed(array, order)
            copy = self._temporary(moved.shape, array.dtype)
            self._copy(moved, copy)
            view = copy.like(_last(array.shape, axes))
        return view

    def _copy(self, source, target):
        """Copy elements between two layouts of the same shape."""
        kind = ("size", source.dtype.itemsize)
        self._elementwise("copy", (kind,), {"source": source, "target": target})

    def _fill(self, target, number):
        """The number in every element."""
        kind = arrays.kind_of(target.dtype)
        params = (("kind", kind.kind), ("elem", kind.compute))
        self._elementwise("fill", params, {"target": target}, number=number)

    def _elementwise(self, name, params, given, **values):
        """A kernel of `copies` over arrays of one shape."""
        shape = given["target"].shape
        count = math.prod(shape)
        if not count:
            return
        sizes, steps = copies.steps_of(shape, [a.strides for a in given.values()])
        spec = Spec(name, (*params, ("dimensions", len(sizes))))
        values.update({n: a.place for n, a in given.items()}, rows=count)
        for d, size in enumerate(sizes):
            values |= {f"size{d}": size, f"inverse{d}": 1.0 / size}
            values |= {f"{n}_step{d}": s[d] for n, s in zip(given, steps, strict=True)}
        grid = -(-count // copies.BLOCK)
        self._step(Step(spec, grid, copies.BLOCK, 0, 1, tuple(kernel_of(spec).args)), values)

    # -- planning: the launches

    def _rows(self, operation, options, shape, axis, compute, given, **values):
        """An operation of `plan` on these arrays; None is one that is not there."""
        layouts = []
        for name, array in given.items():
            if array is not None:
                values[name] = array.place
                kind = arrays.kind_of(array.dtype).kind
                layouts.append((name, Layout(kind, array.strides, self._is_aligned(array))))
        machine = self.queue.device.machine
        plan = plan_of(operation, options, shape, axis, compute, tuple(layouts), machine)
        values.update(plan.constants)
        values.update((name, self._room(size)) for name, size in plan.temporaries)
        for step in plan.steps:
            self._step(step, values)

    def _step(self, step, values):
        """A launch; a value is a number, or a place whose address is known when the call is run."""
        self.steps.append((self.queue.device.prepared(step), [values[n] for n in step.args]))


_FLOAT64 = np.dtype(np.float64)
_CHECK = os.environ.encodekey("NUMBAKERN_CHECK")
_SET = getattr(os.environ, "_data", (_CHECK,))
"""The variables that are set: os.environ itself raises, and catches, for one that is not."""


def _checks_each_call():
    return os.environ.get("NUMBAKERN_CHECK", "") not in ("", "0")


@functools.cache
def _bounds(dtype):
    """The smallest and the largest number of an integer type."""
    info = np.iinfo(dtype)
    return info.min, info.max


def _last(shape, axes):
    """A shape with these axes joined as the last one."""
    batch = (n for d, n in enumerate(shape) if d not in axes)
    return (*batch, math.prod(shape[d] for d in axes))


def _transposed(array, order):
    shape, strides = (tuple(v[d] for d in order) for v in (array.shape, array.strides))
    return array.like(shape, strides)


def _span(array):
    """(first, last + 1) of the bytes that an array has elements at, counted from its address."""
    if 0 in array.shape:
        return 0, 0
    ends = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    return sum(min(e, 0) for e in ends), sum(max(e, 0) for e in ends) + array.dtype.itemsize
