"""The CUDA target: arrays on an NVIDIA GPU, kernels by numba-cuda, launched through cuda.core.

`functional` checks what does not depend on the target and calls the methods of `Target`. Nothing of
a CUDA stack is imported before the first call with an array on a GPU. No call waits for the GPU;
what the CPU target learns from values on the host, kernels work out on the device.
"""

import functools
import math
import os

import numpy as np

from numbakern import arrays
from numbakern.cuda import copies, families, launch
from numbakern.cuda.plan import Layout, Spec, Step, kernel_of
from numbakern.cuda.plan import plan as plan_of

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
        found = report and report.take()
        if found:
            raise found.error()


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
        self._out_given = False
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
            view.target, self._out_given = self, True
        return view

    def _view(self, name, value):
        if isinstance(value, (int, float, np.generic)):
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
        if not view.family.counts_elements:
            size = view.dtype.itemsize
            if view.pointer % size or any([s % size for s in view.strides]):
                raise TypeError(f"{name}: expected an array aligned to its {size}-byte elements")
        return view

    def empty(self, shape, dtype):
        """An array for results, of the same family as the input."""
        return self.family.empty(shape, dtype, self.queue)

    def assign(self, out, values):
        """Put values of the same type and shape into the argument `out`."""
        self._copy(values, out)

    # -- whole arrays

    def softmax(self, operation, x, axes, compute, out):
        """log_softmax or softmax (`operation`) of x along these axes into `out`."""
        self._transform(operation, {"x": x}, axes, compute, out)

    def backward(self, operation, grad_output, output, axes, compute, out):
        """log_softmax_backward or softmax_backward (`operation`) into `out`."""
        self._transform(operation, {"x": grad_output, "y": output}, axes, compute, out)

    def _transform(self, operation, inputs, axes, compute, out):
        if math.prod(out.shape) == 0:
            return
        inputs = {name: self._apart(array, out) for name, array in inputs.items()}
        target, axis = self._view_of_one_axis(out, axes)
        result = target
        if target is None:
            shape = _last(out.shape, axes)
            result = self.empty(shape, out.dtype)
            axis = len(shape) - 1
        inputs = {name: self._of_one_axis(array, axes) for name, array in inputs.items()}
        self._run(operation, (), result.shape, axis, compute, {**inputs, "out": result})
        if target is None:
            order = (*(d for d in range(out.ndim) if d not in axes), *axes)
            moved = _transposed(out, order)
            self._copy(result.like(result.pointer, moved.shape), moved)

    def logsumexp(self, x, axes, compute, dtype):
        """log Σ exp(x) over these axes, without them."""
        batch = tuple(n for d, n in enumerate(x.shape) if d not in axes)
        result = self.empty(batch, dtype)
        if math.prod(x.shape) == 0:
            self._fill(result, -math.inf)
            return result
        x = self._of_one_axis(x, axes)
        axis = axes[0] if len(axes) == 1 else x.ndim - 1
        self._run("logsumexp", (), x.shape, axis, compute, {"x": x, "row_lse": result})
        return result

    # -- losses

    def nll_loss(self, log_probs, labels, axis, compute, dtype, weight, ignore_index, reduction):
        """Negative log-likelihood of the labels."""
        batch = arrays.batch_shape(log_probs.shape, axis)
        loss = self.empty(batch if reduction == "none" else (), dtype)
        given = {"x": log_probs, "labels": labels, "weight": weight, "loss": loss}
        options, values = self._of_labels(labels, batch, log_probs.shape[axis], ignore_index)
        options = (*options, ("reduction", reduction))
        self._run("nll", options, log_probs.shape, axis, compute, given, **values)
        self._checked_labels(labels)
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
        self._run("nll_backward", options, out.shape, axis, compute, given, scale=scale, **values)
        self._checked_labels(labels)

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
            self._run("cross_entropy", options, shape, axis, compute, given, scale=scale, **values)
        else:
            self._no_classes(options, axis, compute, given, soft, values)
        if not soft:
            self._checked_labels(labels)
        loss = given["loss"].unwrap() if with_loss else None
        return loss, given["row_lse"].unwrap() if with_lse else None

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
            loss, options["reduction"] = self.empty(given["labels"].shape, _FLOAT64), "none"
        options = tuple((n, options[n]) for n in ("ignores", "reduction"))
        kept = {"x": x, "labels": given["labels"], "weight": given["weight"], "loss": loss}
        self._run("nll", options, x.shape, axis, compute, kept, **values)

    def _of_labels(self, labels, batch, classes, ignore_index):
        """The options and values that follow from class labels."""
        low, high = _bounds(labels.dtype)
        ignores = low <= ignore_index <= high
        values = {"bad": self.queue.device.report.address(batch, classes, ignore_index)}
        if ignores:  # in 64 bits, as a kernel has the label
            values["ignore_index"] = (ignore_index + 2**63) % 2**64 - 2**63
        return (("ignores", ignores),), values

    def _upstream(self, grad_output, batch, out, given):
        """The number that a gradient is scaled by; an array is put among the given ones."""
        if isinstance(grad_output, Number):
            return float(grad_output.value)
        array = self._apart(grad_output, out)
        if array.ndim != len(batch):
            array = array.like(array.pointer, batch, (0,) * len(batch))
        given["row_scale"] = array
        return 1.0

    def _checked_labels(self, labels):
        """Under NUMBAKERN_CHECK, raise for a bad label of this call, with its full value."""
        if os.environ.get("NUMBAKERN_CHECK", "") in ("", "0"):
            return
        device = self.queue.device
        found = device.report.take()
        if not found:
            return
        if found.batch == labels.shape:
            steps = zip(found.position, labels.strides, strict=True)
            address = labels.pointer + sum(i * stride for i, stride in steps)
            (value,) = np.frombuffer(device.read(address, labels.dtype.itemsize), labels.dtype)
            found = found._replace(value=int(value))
        raise found.error()

    # -- views and copies

    def _apart(self, array, out):
        """The array, copied if it overlaps `out` without being the same elements."""
        if not self._out_given or array is None or array is out or _same(array, out):
            return array
        first, second = _extent(array), _extent(out)
        if first[0] >= second[1] or second[0] >= first[1]:
            return array
        copy = self.empty(array.shape, array.dtype)
        self._copy(array, copy)
        return copy

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
        return array.like(array.pointer, shape, strides), len(batch)

    def _of_one_axis(self, array, axes):
        """The array with one class axis, the last if there were several; copied where need be."""
        view, _ = self._view_of_one_axis(array, axes)
        if view is None:
            order = (*(d for d in range(array.ndim) if d not in axes), *axes)
            moved = _transposed(array, order)
            copy = self.empty(moved.shape, array.dtype)
            self._copy(moved, copy)
            view = copy.like(copy.pointer, _last(array.shape, axes))
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
        shape = given["target"].shape
        if 0 in shape:
            return
        strides = tuple((n, a.strides) for n, a in given.items())
        values.update({n: a.pointer for n, a in given.items()})
        self._start(_elementwise_steps(name, params, shape, strides), values)

    # -- running

    def _run(self, operation, options, shape, axis, compute, given, **values):
        """Run an operation of `plan` on these arrays; None is one that is not there."""
        layouts = []
        for name, array in given.items():
            if array is not None:
                pointer = values[name] = array.pointer
                layouts.append((name, array.dtype, array.strides, pointer & 15 == 0))
        steps, places, size = _prepared(operation, options, shape, axis, compute, tuple(layouts))
        scratch = None
        if size:
            scratch, address = self.family.scratch(size, self.queue)
            for name, offset in places:
                values[name] = address + offset
        self._start(steps, values)
        if self.family.holds:
            self.queue.hold((*given.values(), scratch))

    def _start(self, steps, values):
        queue = self.queue
        before = queue.device.make_current()
        try:
            for step, arguments, variable in steps:
                arguments = arguments.copy()
                for i, name in variable:
                    arguments[i] = values[name]
                launch.start(step, arguments, queue)
        finally:
            if before is not None:
                launch.restore(before)


@functools.lru_cache(maxsize=4096)
def _prepared(operation, options, shape, axis, compute, layouts):
    """All of a call that does not depend on addresses and values.

    Returns the steps as of `_with_constants`, and where each temporary is in a block of how many
    bytes.
    """
    layouts = tuple((n, Layout(arrays.kind_of(t).kind, s, aligned)) for n, t, s, aligned in layouts)
    made = plan_of(operation, options, shape, axis, compute, layouts)
    places, size = [], 0
    for name, wanted in made.temporaries:
        places.append((name, size))
        size += -(-wanted // 16) * 16
    return _with_constants(made.steps, made.constants), places, size


def _with_constants(steps, constants):
    """(step, its arguments with the constants in place, (index, name) of the others) of each."""
    prepared = []
    for step in steps:
        arguments = [constants.get(name) for name in step.args]
        variable = [(i, n) for i, n in enumerate(step.args) if n not in constants]
        prepared.append((step, arguments, variable))
    return tuple(prepared)


_FLOAT64 = np.dtype(np.float64)


@functools.cache
def _bounds(dtype):
    """The smallest and the largest number of an integer type."""
    info = np.iinfo(dtype)
    return info.min, info.max


@functools.lru_cache(maxsize=1024)
def _elementwise_steps(name, params, shape, strides):
    """The step of `copies` for arrays of these strides, as of `_with_constants`."""
    sizes, steps = copies.steps_of(shape, [s for _, s in strides])
    spec = Spec(name, (*params, ("dimensions", len(sizes))))
    count = math.prod(sizes)
    constants = {"rows": count}
    for d, size in enumerate(sizes):
        constants |= {f"size{d}": size, f"inverse{d}": 1.0 / size}
        constants |= {f"{n}_step{d}": s[d] for (n, _), s in zip(strides, steps, strict=True)}
    grid = -(-count // copies.BLOCK)
    step = Step(spec, grid, copies.BLOCK, 0, 1, tuple(kernel_of(spec).args))
    return _with_constants((step,), constants)


def _last(shape, axes):
    """A shape with these axes joined as the last one."""
    batch = (n for d, n in enumerate(shape) if d not in axes)
    return (*batch, math.prod(shape[d] for d in axes))


def _transposed(array, order):
    shape, strides = (tuple(v[d] for d in order) for v in (array.shape, array.strides))
    return array.like(array.pointer, shape, strides)


def _same(a, b):
    """Whether two arrays are the same elements in the same places."""
    return (
        a.pointer == b.pointer
        and a.shape == b.shape
        and a.strides == b.strides
        and a.dtype.itemsize == b.dtype.itemsize
    )


def _extent(array):
    """(first, last + 1) of the addresses that an array has elements at."""
    low, high = _span(array.shape, array.strides, array.dtype.itemsize)
    return array.pointer + low, array.pointer + high


@functools.lru_cache(maxsize=1024)
def _span(shape, strides, itemsize):
    if 0 in shape:
        return 0, 0
    ends = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    return sum(min(e, 0) for e in ends), sum(max(e, 0) for e in ends) + itemsize
