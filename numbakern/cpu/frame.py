"""What one call passes to a kernel: a frame of 8-byte slots, and where a row lies in it.

All kernels have one signature, `kernel(frame, first, last, scratch)`, so one parallel driver
serves them all and each is compiled once. The frame lives on the driver's stack. Arrays are
passed as the addresses of their NumPy objects, which costs the small call nothing: the data
pointer is the first field behind the object's header (NumPy's C API, PyArrayObject_fields).
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from numbakern.cpu.simd import load_scalar, traced, value_if

SHAPE_SLOTS = (  # what follows from shapes and strides alone
    "classes",  # length of the class axis
    "x_class", "y_class", "out_class",  # strides in bytes along the classes
    "x_row", "y_row", "out_row",  # strides in bytes along the batch, if that is one axis
    "geometry",  # int64 array for a batch of several axes (see `launch`), else 0
    "inner",  # length of the batch axis that tiles run along
    "columns",  # rows in a tile at most
    "panel",  # rows that are packed at once, for several tiles
    "flags",  # bit 0: non-temporal stores
)  # fmt: skip
ARRAY_SLOTS = (  # NumPy arrays, 0 where there is none
    "x",
    "y",  # second input: output of the forward, or class probabilities
    "out",
    "labels",  # int64, a row each
    "weight",  # of the type computed in, a class each
    "row_scale",  # float64, a row each: the upstream gradient under reduction "none"
    "row_lse",  # float64, a row each: log-sum-exp, in or out
    "row_loss",  # float64, a row each, out
)
VALUE_SLOTS = (
    "ignore_index",
    "scale",  # float: the gradient's common factor
    "keep",  # float: 1 − label smoothing
    "spread",  # float: label smoothing / classes
    "weight_sum",  # float: Σ of the class weights
)
SLOTS = (*SHAPE_SLOTS, *ARRAY_SLOTS, *VALUE_SLOTS)
INDEX = {name: i for i, name in enumerate(SLOTS)}
FLOAT_SLOTS = ("scale", "keep", "spread", "weight_sum")
HEADER = object.__basicsize__
STREAM_BYTES = 4 << 20
"""Outputs larger than this are written past the caches: no line is read only to be overwritten."""

_i64 = ir.IntType(64)


def slots(**values):
    """The frame that has these values in its slots, and 0 elsewhere."""
    return tuple(values.get(name, 0.0 if name in FLOAT_SLOTS else 0) for name in SLOTS)


def integer(name):
    """A function (frame) -> int64 that reads this slot."""
    return traced(lambda frame: load_scalar(frame + 8 * INDEX[name], "i8"))


def real(name):
    """A function (frame) -> float64 that reads this slot."""
    return traced(lambda frame: load_scalar(frame + 8 * INDEX[name], "f8"))


def array_data(array):
    """Address of the data of the NumPy array object at this address. Inside traced functions."""
    return load_scalar(array + HEADER, "i8")


def data(name):
    """A function (frame) -> address of the data of the array in this slot; 0 if there is none."""

    def read(frame):
        array = load_scalar(frame + 8 * INDEX[name], "i8")
        return value_if(array != 0, lambda: array_data(array))

    return traced(read)


@intrinsic
def pack(typing, values):
    """Store a tuple of ints and floats as a frame on this function's stack; its address."""

    def codegen(context, builder, sig, args):
        frame = cgutils.alloca_once(builder, ir.ArrayType(_i64, len(values)))
        for i, ty in enumerate(values):
            value = builder.extract_value(args[0], i)
            if isinstance(ty, types.Float):
                value = builder.bitcast(value, _i64)
            zero = ir.IntType(32)(0)
            builder.store(value, builder.gep(frame, [zero, ir.IntType(32)(i)]))
        return builder.ptrtoint(frame, _i64)

    return types.int64(values), codegen


@intrinsic
def call(typing, kernel, frame, first, last, scratch):
    """Call the kernel at this address."""

    def codegen(context, builder, sig, args):
        signature = ir.FunctionType(ir.VoidType(), [_i64] * 4)
        builder.call(builder.inttoptr(args[0], signature.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def take(typing, counter, amount):
    """Atomically add `amount` to the int64 at this address; what it held before."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], _i64.as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen
