"""Moving elements as they are: from one layout to another, and one value to everywhere.

What the operations need where a view cannot be had: an input that overlaps `out`, and several
class axes that do not walk on from each other; and zeros where blocks are to meet (`rows.Way`).
"""

import functools

from numbakern.cuda.device import Kernel, constant, convert, load, smaller_integer, store
from numbakern.cuda.memory import Format
from numbakern.cuda.reduce import offsets

BLOCK = 256
KERNELS = ("copy", "fill", "clear")


def steps_of(shape, strides):
    """The axes of a shape in C order, those joined that walk on from each other in every array.

    Returns sizes, and for each array its steps along them.
    """
    sizes, steps = [], [[] for _ in strides]
    for d, n in enumerate(shape):
        if n == 1:
            continue
        here = [s[d] for s in strides]
        if sizes and all(s[-1] == h * n for s, h in zip(steps, here, strict=True)):
            sizes[-1] *= n
            for s, h in zip(steps, here, strict=True):
                s[-1] = h
        else:
            sizes.append(n)
            for s, h in zip(steps, here, strict=True):
                s.append(h)
    return (sizes, steps) if sizes else ([1], [[0] for _ in strides])


def kernel(name, params):
    """The Kernel `copy`, `fill` or `clear`."""
    if name == "clear":
        return Kernel(name, _clear, {"meetings": "i8", "rows": "i8"})
    dimensions = params["dimensions"]
    arrays = ("source", "target") if name == "copy" else ("target",)
    args = {"rows": "i8", **({"number": "f8"} if name == "fill" else {})}
    for array in arrays:
        args[array] = "i8"
        args |= {f"{array}_step{d}": "i8" for d in range(dimensions)}
    for d in range(1, dimensions):
        args |= {f"size{d}": "i8", f"inverse{d}": "f8"}
    return Kernel(name, functools.partial(_run, arrays, params), args)


def _clear(frame):
    """Zero the tickets' counter and that of each row."""
    i = frame.block * BLOCK + convert(frame.thread, "i8")
    store(frame.meetings + (i << 2), 4, [constant(i, 0, "i4")], i <= frame.rows)


def _run(arrays, params, frame):
    row = frame.block * BLOCK + convert(frame.thread, "i8")
    ok = row < frame.rows
    row = smaller_integer(row, frame.rows - 1)
    *source, target = [
        getattr(frame, name) + at
        for name, at in zip(arrays, offsets(frame, row, params["dimensions"], arrays), strict=True)
    ]
    if source:
        store(target, params["size"], load(source[0], params["size"], 1, ok), ok)
    else:
        number = convert(frame.number + constant(row, 0.0, "f8"), params["elem"])
        Format(params["kind"], params["elem"]).put(target, number, ok)
