"""From arrays to a kernel call: which kernel and walker, how the batch lies, what it is given.

Everything that follows from dtypes, shapes and strides alone is worked out once and remembered
(`plan`), so that a small call is a look-up.
"""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np

from numbakern.arrays import batch_shape, joined_axes, kind_of
from numbakern.cpu import kernels, short, threads, tiles
from numbakern.cpu.compile import compile_kernel
from numbakern.cpu.frame import STREAM_BYTES
from numbakern.cpu.rows import Rows, scratch_size
from numbakern.cpu.simd import SIZES, Format, vector_lanes

FEW_BYTES = {tiles.ROWS: 880, tiles.SCATTERED: 1920}
"""Rows up to this size, in the type computed in, are taken a vector of rows at a time.

A longer row fills vectors of its own. Classes that are apart are gathered once, not thrice. Those
of ROWS are at most a group of their sums (1024 bytes).
"""
FEW_BYTES_BACKWARD = 340
"""The same where there are two arrays to pack, and no maximum or exponential sum to be found."""
SHORTEST_STREAMED = 32
"""Bytes of the shortest rows for which it pays to put a tile of them together to whole lines."""


class Plan(NamedTuple):
    """A kernel and everything about a call of it that does not depend on the data."""

    kernel: int  # address
    items: int
    work: int  # elements
    scratch: int  # bytes a thread
    slots: tuple[int, ...]  # frame.SHAPE_SLOTS
    unit: int  # items that are best done by one thread
    batch: tuple[int, ...]  # the shape without the class axis
    rows: int
    order: tuple[int, ...] | None  # batch axes as the kernel walks them; None: as they are
    keep: object  # what the addresses in the slots belong to


@functools.lru_cache(maxsize=1024)
def plan(
    operation,
    options,
    shape,
    axis,
    elem,
    x_dtype,
    x_strides,
    y_dtype=None,
    y_strides=None,
    out_dtype=None,
    out_strides=None,
    weighted=False,
):
    """The Plan of an operation, computed in `elem`, over arrays of one shape.

    Parameters
    ----------
    operation : str
        A function of `kernels`.
    options : tuple of bool
        Its options, in the order of `kernels.OPTIONS`.
    axis : int
        The class axis.
    """
    dtypes = (x_dtype, y_dtype, out_dtype)
    kinds = [dtype and kind_of(dtype)._replace(compute=elem) for dtype in dtypes]
    strides = [x_strides, y_strides, out_strides]
    given = [i for i in range(3) if strides[i] is not None]
    classes = shape[axis]
    sizes, steps, order = _batch(shape, axis, [strides[i] for i in given])
    class_steps = [strides[i][axis] for i in given]
    itemsizes = [dtypes[i].itemsize for i in given]
    if operation in _PER_ROW:
        layout = "strided"
    else:
        backward = operation.endswith("_backward")
        layout = _layout(classes, class_steps, sizes, steps, itemsizes, elem, backward)
    names = tuple(kind and (kind.kind, kind.compute, kind.swapped) for kind in kinds)
    kernel = _kernel(operation, options, *names, weighted, layout)

    rows = math.prod(sizes)
    inner = columns = panel = items = rows
    scratch = scratch_size(elem, classes)
    work, unit = rows * (_PER_ROW.get(operation) or classes), 1
    if layout not in _ROW_LAYOUTS:
        inputs, lanes = 1 + (y_dtype is not None), vector_lanes(elem)
        inner = sizes[-1] if layout == tiles.COLUMNS else rows
        columns = tiles.columns_for(elem, layout, classes, inputs)
        panel = tiles.panel_for(elem, layout, classes, inputs)
        if rows:
            columns = min(columns, -(-inner // lanes) * lanes)
            panel = min(panel, -(-inner // columns) * columns)
            unit = panel // columns
            items = (rows // inner) * tiles.tiles_for(elem, layout, inner, columns, panel)
        scratch = tiles.scratch_size(elem, layout, classes, panel, inputs)

    def spread(values, absent):
        values = iter(values)
        return [next(values) if i in given else absent for i in range(3)]

    table = spread(steps, [0] * len(sizes))
    geometry = None
    if len(sizes) > 1:
        rows_of = zip(sizes, *table, strict=True)
        geometry = np.array([len(sizes), *itertools.chain(*rows_of)], np.int64)
    along = [s[0] if s else 0 for s in table]
    row_bytes = classes * out_dtype.itemsize if out_dtype is not None else 0
    stream = rows * row_bytes > STREAM_BYTES
    if layout in tiles.OF_ROWS:
        stream &= geometry is None and along[2] == row_bytes >= SHORTEST_STREAMED
    address = 0 if geometry is None else id(geometry)
    slots = (classes, *spread(class_steps, 0), *along, address, inner, columns, panel, int(stream))
    batch = batch_shape(shape, axis)
    return Plan(kernel, items, work, scratch, slots, unit, batch, rows, order, geometry)


_PER_ROW = {"nll": 32, "nll_backward": 32}
"""Operations that touch one element a row, and the work that this is, in elements streamed."""
_ROW_LAYOUTS = ("contiguous", "strided")


def _layout(classes, class_steps, sizes, steps, itemsizes, elem, backward):
    """How the walker has to move: see `tiles` and `rows`."""

    def few(layout):
        most = FEW_BYTES_BACKWARD if backward else FEW_BYTES[layout]
        return classes * SIZES[elem] <= most

    if classes <= 1 or class_steps == itemsizes:
        if 0 < classes <= vector_lanes(elem):
            return tiles.SHORT
        return tiles.ROWS if classes > 0 and few(tiles.ROWS) else "contiguous"
    adjacent = sizes and [s[-1] for s in steps] == itemsizes
    if adjacent and sizes[-1] >= vector_lanes(elem) // 2:
        return tiles.COLUMNS
    return tiles.SCATTERED if few(tiles.SCATTERED) else "strided"


def _batch(shape, axis, strides):
    """The batch axes in the order of the strides, those that walk on from each other joined.

    Returns their sizes, the steps of each array along them, and their order (of the batch axes)
    if that is not the array's own.
    """
    axes = [d for d in range(len(shape)) if d != axis]
    natural = [d for d in axes if shape[d] != 1]
    ordered = sorted(natural, key=lambda d: [-abs(s[d]) for s in strides])
    order = None
    if ordered != natural:
        ones = [d for d in axes if shape[d] == 1]
        order = tuple(axes.index(d) for d in (*ones, *ordered))
    return *joined_axes(shape, ordered, strides), order


@functools.lru_cache(maxsize=1024)
def _kernel(operation, options, x, y, out, weighted, layout):
    """Address of the kernel, compiled or from the disk."""
    formats = [name and Format(*name) for name in (x, y, out)]
    if layout in _ROW_LAYOUTS:
        walker = Rows(*formats, weighted, layout == "strided")
    elif layout in tiles.OF_ROWS:
        walker = short.Short(*formats, weighted, layout)
    else:
        walker = tiles.Tiles(*formats, weighted, layout)
    options = dict(zip(kernels.OPTIONS.get(operation, ()), options, strict=True))
    function = getattr(kernels, operation)(walker, **options)
    parts = [operation, *(f"{name}{int(on)}" for name, on in options.items())]
    parts += [f.name if f else "none" for f in formats] + [f"w{int(weighted)}", layout]
    return compile_kernel(function, "-".join(parts))


def call(
    plan,
    x,
    y=None,
    out=None,
    *,
    labels=None,
    weight=None,
    row_scale=None,
    row_lse=None,
    row_loss=None,
    ignore_index=0,
    scale=0.0,
    keep=1.0,
    spread=0.0,
    weight_sum=0.0,
):
    """Run a plan's kernel on arrays; the arguments are those of `frame`."""
    slots = (
        *plan.slots,
        id(x),
        0 if y is None else id(y),
        0 if out is None else id(out),
        0 if labels is None else id(labels),
        0 if weight is None else id(weight),
        0 if row_scale is None else id(row_scale),
        0 if row_lse is None else id(row_lse),
        0 if row_loss is None else id(row_loss),
        ignore_index,
        scale,
        keep,
        spread,
        weight_sum,
    )
    threads.run(plan.kernel, plan.items, plan.work, slots, plan.scratch, plan.unit)
