"""Checks and views that every target shares: dtypes, axes, labels, weights, outputs.

A call is (batch, classes): one axis of the input is the class axis, the others are the batch.
Everything here raises before anything is written, in one line that names the argument, what was
expected and what came.
"""

import math
import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.exceptions import AxisError, TooHardError

REDUCTIONS = ("mean", "sum", "none")


class Kind(NamedTuple):
    """How elements of a dtype are computed with."""

    kind: str  # kind and size as in NumPy's dtype.str without its byte order; bf for bfloat16
    swapped: bool  # whether the byte order is not the machine's
    compute: str  # f4 or f8: what is computed with
    result: np.dtype  # of log_softmax, softmax and gradients
    loss: np.dtype  # of logsumexp and losses


class LossOptions(NamedTuple):
    """The options of a loss as checked, and what follows from them, the types and the shapes."""

    kind: Kind  # of the input
    axis: int
    soft: bool  # whether the labels are probabilities
    ignore_index: int
    smoothing: float


@lru_cache(maxsize=256)
def kind_of(dtype: np.dtype) -> Kind | None:
    """The Kind of a dtype; None for one that is not supported."""
    native = dtype.newbyteorder("=")
    swapped = not dtype.isnative
    if native.name == "bfloat16":
        return Kind("bf", swapped, "f4", native, np.dtype(np.float32))
    if native.kind == "f" and native.itemsize <= 8:
        compute = "f8" if native.itemsize == 8 else "f4"
        loss = np.dtype(np.float64 if native.itemsize == 8 else np.float32)
        return Kind(f"f{native.itemsize}", swapped, compute, native, loss)
    if native.kind in "iub":
        double = np.dtype(np.float64)
        return Kind(f"{native.kind}{native.itemsize}", swapped, "f8", double, double)
    return None


def supported(name: str, array: Any) -> Kind:
    """The Kind of an array; TypeError if its dtype is not supported."""
    return _supported(name, array.dtype)


def _supported(name: str, dtype: np.dtype) -> Kind:
    kind = kind_of(dtype)
    if kind is None:
        raise unsupported(name, dtype)
    return kind


def unsupported(name: str, dtype: object) -> TypeError:
    """The error for elements that nothing is computed of."""
    expected = "float16, bfloat16, float32, float64, integers or bool"
    return TypeError(f"{name}: expected {expected}, got dtype {dtype}")


def result_kind(dtype: Any, default: Kind) -> Kind:
    """The Kind that `dtype=` asks for; `default` if it is None."""
    if dtype is None:
        return default
    try:
        wanted = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype: expected a floating dtype, got {dtype!r}") from None
    kind = kind_of(wanted)
    if kind is None or wanted.kind in "iub":
        raise TypeError(f"dtype: expected float16, bfloat16, float32 or float64, got {wanted}")
    return kind


def _integer(name: str, value: Any) -> int:
    """An integer argument as an int; a truth value is none, as in NumPy's reductions and SciPy."""
    try:
        if not isinstance(value, (bool, np.bool_)):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name}: expected an integer, got {value!r}")


def truth(name: str, value: Any) -> bool:
    """An argument that is true or false."""
    try:
        return bool(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}") from None


def integer_axis(axis: Any, ndim: int) -> int:
    """A class axis as an index from 0 on."""
    axis = _integer("axis", axis)
    if not -ndim <= axis < ndim:
        raise AxisError(f"axis: expected -{ndim} to {ndim - 1} for {ndim} dimensions, got {axis}")
    return axis % ndim


def axes_of(axis: Any, ndim: int) -> tuple[int, ...]:
    """The axes that an int, a tuple of ints or None (all) stands for, in the array's order."""
    if axis is None:
        return tuple(range(ndim))
    if not isinstance(axis, (tuple, list)):
        if ndim == 0 and _integer("axis", axis) in (0, -1):
            return ()
        return (integer_axis(axis, ndim),)
    axes = tuple(sorted(integer_axis(a, ndim) for a in axis))
    if len(set(axes)) != len(axes):
        raise ValueError(f"axis: expected distinct axes, got {axis}")
    return axes


def same_shape(name: str, got: tuple[int, ...], shape: tuple[int, ...], of: str) -> None:
    """ValueError unless the shape got is the expected one, which is `of` something."""
    if got != shape:
        raise ValueError(f"{name}: expected shape {shape} as {of}, got {got}")


def output(target: Any, out: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    """A new array for the result, or the caller's `out` once checked."""
    if out is None:
        return target.empty(shape, dtype)
    if not isinstance(out, target.ARRAY_TYPES):
        raise TypeError(f"out: expected an array, got {type(out).__name__}")
    if not isinstance(out, np.ndarray):
        out = target.asarray("out", out)
    if out.dtype.newbyteorder("=") != dtype:
        raise TypeError(f"out: expected dtype {dtype}, got {out.dtype}")
    if out.shape != shape:
        raise ValueError(f"out: expected shape {shape}, got {out.shape}")
    flags = out.flags
    if not flags.writeable:
        raise ValueError("out: expected a writeable array, got a read-only one")
    if not flags.forc and overlaps_itself(out.shape, out.strides, out.dtype.itemsize):
        raise ValueError(
            f"out: expected a place of its own for each element, got shape {out.shape} "
            f"with strides {out.strides}"
        )
    return out


@lru_cache(maxsize=1024)
def overlaps_itself(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether two elements of an array have a byte in common; True where that is hard to tell."""
    if 0 in shape:
        return False
    axes = sorted((abs(s), n) for s, n in zip(strides, shape, strict=True) if n > 1)
    extent = itemsize
    for stride, n in axes:
        if stride < extent:
            break
        extent += stride * (n - 1)
    else:  # each axis steps over all that those with smaller strides span
        return False
    # Two elements differ along a first axis; moved along it, the one with the lower index there
    # is at 0. Only their addresses matter: the array stands on nothing.
    steps, sizes = [s for s, _ in axes], [n for _, n in axes]
    place = np.empty(1, f"V{itemsize}")
    whole = np.lib.stride_tricks.as_strided(place, sizes, steps, writeable=False)
    try:
        for k in range(len(axes)):
            head: Any = (0,) * k
            first, others = whole[head + (slice(1),)], whole[head + (slice(1, None),)]
            if np.shares_memory(first, others, _HARD):  # type: ignore[arg-type]
                return True
    except TooHardError:
        return True
    return False


_HARD = 10**5  # steps of a search, a tenth of a second: more than useful layouts need


def _smoothing(label_smoothing: Any) -> float:
    """The label smoothing as a float in [0, 1]."""
    try:
        if isinstance(label_smoothing, (str, bytes)):
            raise TypeError
        value = float(label_smoothing)
    except OverflowError:
        value = math.inf
    except (TypeError, ValueError):
        raise TypeError(f"label_smoothing: expected a number, got {label_smoothing!r}") from None
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    return value


def check_weight(target: Any, weight: Any, classes: int) -> Any:
    """The class weights as an array of real numbers, one a class; None stays None."""
    if weight is None:
        return None
    weight = target.asarray("weight", weight)
    supported("weight", weight)
    if weight.shape != (classes,):
        raise ValueError(f"weight: expected shape ({classes},), one a class, got {weight.shape}")
    return weight


def check_grad_output(target: Any, grad_output: Any, reduction: str, batch: tuple[int, ...]) -> Any:
    """The upstream gradient of a loss: a scalar, or under "none" an array of the labels' shape."""
    if type(grad_output) is int:  # of any size
        try:
            grad_output = float(grad_output)
        except OverflowError:
            bits = grad_output.bit_length()
            raise TypeError(f"grad_output: expected a float's range, got {bits} bits") from None
    grad_output = target.asarray("grad_output", grad_output)
    supported("grad_output", grad_output)
    shape = batch if reduction == "none" else ()
    if grad_output.shape != shape:
        wanted = f"shape {shape}" if shape else "a scalar"
        raise ValueError(
            f"grad_output: expected {wanted} for reduction {reduction!r}, "
            f"got shape {grad_output.shape}"
        )
    return grad_output


def check_lse(target: Any, lse: Any, batch: tuple[int, ...]) -> Any:
    """The rows' log-sum-exp: a floating array of the batch's shape; None stays None."""
    if lse is None:
        return None
    lse = target.asarray("lse", lse)
    kind = kind_of(lse.dtype)
    if kind is None or kind.kind == "b1" or kind.kind[0] not in "fb":
        raise TypeError(f"lse: expected a floating array, got dtype {lse.dtype}")
    same_shape("lse", lse.shape, batch, "one value a row")
    return lse


def batch_shape(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape without its class axis."""
    return shape[:axis] + shape[axis + 1 :]


def labels_of(target: Any, labels: Any, of: tuple[int, ...]) -> Any:
    """The labels as an array, for an input of shape `of`.

    A list without elements has no type. It stands for class labels, as an empty list of indices
    does in NumPy, unless its shape can only be that of probabilities.
    """
    array = target.asarray("labels", labels)
    if array is not labels and isinstance(labels, (list, tuple)):
        if 0 in array.shape and array.ndim < len(of):
            return array.astype(np.int64)
    return array


def loss_options(
    name: str,
    array: Any,
    labels: Any,
    soft: bool,
    ignore_index: Any,
    reduction: Any,
    label_smoothing: Any,
    axis: Any,
) -> LossOptions:
    """Check the options, dtypes and shapes of a loss of `array`; `soft`: labels may be floats."""
    # Only what cannot change is looked up: a tensor is equal to itself, whatever it holds.
    check = _loss_options
    if type(axis) is int and type(ignore_index) is int and type(reduction) is str:
        if type(label_smoothing) in (float, int):
            check = _known_loss_options
    options = (ignore_index, reduction, label_smoothing, axis)
    return check(name, array.dtype, array.shape, labels.dtype, labels.shape, soft, *options)


def _loss_options(
    name: str,
    dtype: np.dtype,
    shape: tuple[int, ...],
    label_dtype: np.dtype,
    label_shape: tuple[int, ...],
    soft: bool,
    ignore_index: Any,
    reduction: Any,
    label_smoothing: Any,
    axis: Any,
) -> LossOptions:
    kind = _supported(name, dtype)
    if not shape:
        raise ValueError(f"{name}: expected at least 1 dimension, got shape ()")
    # Of a 1-D input, the unbatched case, the class axis is the only one, whatever `axis` says.
    axis = 0 if len(shape) == 1 else integer_axis(axis, len(shape))
    if label_dtype.kind in "iu":
        batch = batch_shape(shape, axis)
        same_shape("labels", label_shape, batch, "the input without its class axis")
        soft = False
    elif soft and kind_of(label_dtype) is not None and label_dtype.kind != "b":
        of = f"the input, for class probabilities ({label_dtype}; class labels are integers)"
        same_shape("labels", label_shape, shape, of)
    else:
        wanted = "integers, or floats for class probabilities" if soft else "integers"
        raise TypeError(f"labels: expected {wanted}, got dtype {label_dtype}")
    ignore_index = _integer("ignore_index", ignore_index)
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    return LossOptions(kind, axis, soft, ignore_index, _smoothing(label_smoothing))


_known_loss_options = lru_cache(maxsize=1024, typed=True)(_loss_options)


def bad_label(
    position: tuple[int, ...], value: int | str, classes: int, ignore_index: int
) -> IndexError:
    """The error for a label that is neither a class nor ignored."""
    where = f"[{', '.join(map(str, position))}]" if position else ""
    return IndexError(
        f"labels{where}: expected a class in [0, {classes}) or ignore_index {ignore_index}, "
        f"got {value}"
    )


def joined_axes(
    shape: tuple[int, ...], axes: Sequence[int], strides: Sequence[tuple[int, ...]]
) -> tuple[list[int], list[list[int]]]:
    """These axes in their order, those along which every array walks on from the last one joined.

    Returns their sizes, and the steps of each array along them.
    """
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for d in axes:
        here = [s[d] for s in strides]
        if sizes and all(s[-1] == h * shape[d] for s, h in zip(steps, here, strict=True)):
            sizes[-1] *= shape[d]
            for s, h in zip(steps, here, strict=True):
                s[-1] = h
        else:
            sizes.append(shape[d])
            for s, h in zip(steps, here, strict=True):
                s.append(h)
    return sizes, steps


def reduced_shape(shape: tuple[int, ...], axes: tuple[int, ...], keepdims: bool) -> tuple[int, ...]:
    """The shape without these axes, or with length 1 for them."""
    if keepdims:
        return tuple(1 if d in axes else n for d, n in enumerate(shape))
    return tuple(n for d, n in enumerate(shape) if d not in axes)


def as_result(result: Any, out: Any) -> Any:
    """What a function returns: the caller's own `out`, else the array as its library has it.

    Of NumPy's, a scalar instead of a 0-d array.
    """
    if out is not None:
        return out
    if not isinstance(result, np.ndarray):
        return result.unwrap()
    return result[()] if result.ndim == 0 else result
