"""Explicit SIMD for Numba: vectors as values, written as ordinary Python functions.

Numba has no vector type, and LLVM's auto-vectoriser reorders no floating-point sum without
fastmath. Here a `Lanes` object stands for a value in a kernel under compilation, a vector of 64
bytes or a scalar; operators and the functions below emit LLVM instructions. `traced` turns a
Python function of such values into one that jitted code can call. So the mathematics is traced
instead of typed, which compiles several times faster than a jitted function each, and one source
(`formulas`, `vmath`) serves vectors, scalars and plain Python floats.

Arithmetic is IEEE, lane by lane, with no fastmath flag; the order of each sum is what the source
says. LLVM maps a vector to one AVX-512 register, two AVX2 ones or four of NEON, so the same source
gives the same bits on every CPU with FMA.
"""

import inspect
import sys

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import infer, infer_global, make_intrinsic_template
from numba.extending import models, register_model

from numbakern.cpu.compile import shared

BYTES = 64
"""Width of a vector: one AVX-512 register, one cache line."""

_i1, _i8, _i32, _i64 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_half, _single, _double = ir.HalfType(), ir.FloatType(), ir.DoubleType()
_byte_pointer = _i8.as_pointer()
_ELEMENT = {"f4": _single, "f8": _double, "i4": _i32, "i8": _i64, "b1": _i1}
SIZES = {"f4": 4, "f8": 8, "i4": 4, "i8": 8}
"""Bytes of an element."""


# ---------------------------------------------------------------- jitted code's view


class Vector(types.Type):
    """Numba's type of a vector: `lanes` values of element kind `elem` (b1 for a mask)."""

    def __init__(self, elem, lanes):
        self.elem, self.lanes = elem, lanes
        super().__init__(name=f"{elem}x{lanes}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.VectorType(_ELEMENT[fe_type.elem], fe_type.lanes))


_SCALAR = {"f4": types.float32, "f8": types.float64, "i4": types.int32, "i8": types.int64}
_SCALAR["b1"] = types.boolean


def _numba_type(value):
    """Numba's type of what a traced function returned."""
    if value is None:
        return types.void
    if isinstance(value, tuple):
        return types.Tuple([_numba_type(v) for v in value])
    return Vector(value.elem, value.lanes) if value.lanes else _SCALAR[value.elem]


def _wrap(context, builder, ty, value):
    """Numba's value of type `ty` as `Lanes`, a tuple of them, or what a literal holds."""
    if isinstance(ty, types.BaseTuple):
        parts = (builder.extract_value(value, i) for i in range(len(ty)))
        return tuple(_wrap(context, builder, t, v) for t, v in zip(ty, parts, strict=True))
    if isinstance(ty, Vector):
        return Lanes(builder, value, ty.elem, ty.lanes)
    if isinstance(ty, types.Boolean):
        return Lanes(builder, context.cast(builder, value, ty, types.boolean), "b1", 0)
    if isinstance(ty, types.Integer):
        return Lanes(builder, context.cast(builder, value, ty, types.int64), "i8", 0)
    return Lanes(builder, value, "f4" if ty == types.float32 else "f8", 0)


def _unwrap(context, builder, ty, value):
    if value is None:
        return context.get_dummy_value()
    if isinstance(value, tuple):
        parts = [_unwrap(context, builder, t, v) for t, v in zip(ty, value, strict=True)]
        return context.make_tuple(builder, ty, parts)
    return value.value


class _Traced:
    """What `traced` makes: for Numba an intrinsic, in another traced function the function."""

    def __init__(self, call, function):
        self._function = function
        template = make_intrinsic_template(self, call, call.__name__)
        infer(template)
        infer_global(self, types.Function(template))

    def __call__(self, *args):
        return self._function(*args)


@shared
def traced(function):
    """Make a Python function of `Lanes` callable from jitted code, and from other traced functions.

    It is run when the call is compiled, with `Lanes` (or tuples of them) for its arguments, and
    returns Lanes, a tuple of them, or None. Each call of it makes its code anew.
    """

    def call(typing, *args):
        module = ir.Module()
        context = _target_context()
        slots = [context.get_value_type(a) for a in args]
        trial = ir.Function(module, ir.FunctionType(ir.VoidType(), slots), "trial")
        builder = ir.IRBuilder(trial.append_basic_block())
        values = [_wrap(context, builder, *pair) for pair in zip(args, trial.args, strict=True)]
        result = _numba_type(function(*values))

        def codegen(context, builder, sig, values):
            wrapped = [_wrap(context, builder, *pair) for pair in zip(args, values, strict=True)]
            return _unwrap(context, builder, result, function(*wrapped))

        return result(*args), codegen

    # Numba binds the arguments by this signature; it cannot pass on *args.
    own = inspect.signature(function)
    first = inspect.Parameter("typing", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    call.__signature__ = own.replace(parameters=[first, *own.parameters.values()])
    call.__name__, call.__doc__ = function.__name__, function.__doc__
    return _Traced(call, function)


def _target_context():
    from numba.core.registry import cpu_target

    return cpu_target.target_context


# ---------------------------------------------------------------- values


class Lanes:
    """A value in a kernel under compilation: a vector, or a scalar where `lanes` is 0.

    `elem` is f4, f8, i4, i8 or b1. Operators take Python numbers for constants and scalars for
    vectors of equal lanes; + − · / compare floats, + − · integers, & | masks.
    """

    __slots__ = ("builder", "elem", "lanes", "value")
    ops = sys.modules[__name__]  # where `vmath` finds what operators cannot say

    def __init__(self, builder, value, elem, lanes):
        self.builder, self.value, self.elem, self.lanes = builder, value, elem, lanes

    def like(self, value, elem=None, lanes=None):
        """Another value of this shape."""
        return Lanes(self.builder, value, elem or self.elem, self.lanes if lanes is None else lanes)

    def llvm(self, elem=None):
        """LLVM's type of this shape, with other elements if named."""
        element = _ELEMENT[elem or self.elem]
        return ir.VectorType(element, self.lanes) if self.lanes else element

    def constant(self, number, elem=None):
        """A constant of this shape."""
        llvm = self.llvm(elem)
        return ir.Constant(llvm, [number] * self.lanes if self.lanes else number)

    def __add__(self, other):
        return _arithmetic(self, other, "fadd", "add")

    __radd__ = __add__

    def __sub__(self, other):
        return _arithmetic(self, other, "fsub", "sub")

    def __rsub__(self, other):
        return _arithmetic(_constant_like(self, other), self, "fsub", "sub")

    def __mul__(self, other):
        return _arithmetic(self, other, "fmul", "mul")

    __rmul__ = __mul__

    def __truediv__(self, other):
        return _arithmetic(self, other, "fdiv", None)

    def __floordiv__(self, other):
        """Of integers that are not negative."""
        return _arithmetic(self, other, None, "sdiv")

    def __rfloordiv__(self, other):
        return _arithmetic(_constant_like(self, other), self, None, "sdiv")

    def __mod__(self, other):
        """Of integers that are not negative."""
        return _arithmetic(self, other, None, "srem")

    def __neg__(self):
        if self.elem in ("f4", "f8"):
            return self.like(self.builder.fneg(self.value))
        return self.like(self.builder.neg(self.value))

    def __and__(self, other):
        return self.like(self.builder.and_(self.value, other.value))

    def __or__(self, other):
        return self.like(self.builder.or_(self.value, other.value))

    def __invert__(self):
        return self.like(self.builder.not_(self.value))

    def __lt__(self, other):
        return _compare("<", self, other)

    def __le__(self, other):
        return _compare("<=", self, other)

    def __gt__(self, other):
        return _compare(">", self, other)

    def __ge__(self, other):
        return _compare(">=", self, other)

    def __eq__(self, other):
        return _compare("==", self, other)

    def __ne__(self, other):
        return _compare("!=", self, other)

    __hash__ = None  # type: ignore[assignment]


def _constant_like(shape, number):
    return number if isinstance(number, Lanes) else shape.like(shape.constant(number))


def _together(*values):
    """The values with one shape: numbers become constants, scalars are spread over the lanes."""
    shape = max((v for v in values if isinstance(v, Lanes)), key=lambda v: v.lanes)
    values = [_constant_like(shape, v) for v in values]
    return [spread(v, shape) if v.lanes != shape.lanes else v for v in values]


def _arithmetic(a, b, real, integer):
    a, b = _together(a, b)
    return a.like(getattr(a.builder, real if a.elem in ("f4", "f8") else integer)(a.value, b.value))


def _compare(sign, a, b):
    a, b = _together(a, b)
    if a.elem not in ("f4", "f8"):
        compare = a.builder.icmp_signed
    else:
        compare = a.builder.fcmp_unordered if sign == "!=" else a.builder.fcmp_ordered
    return a.like(compare(sign, a.value, b.value), "b1")


def _suffix(llvm):
    """How LLVM mangles this type in the names of its overloaded functions."""
    if isinstance(llvm, ir.VectorType):
        return f"v{llvm.count}{_suffix(llvm.element)}"
    names = {ir.HalfType: "f16", ir.FloatType: "f32", ir.DoubleType: "f64"}
    return names.get(type(llvm)) or f"i{llvm.width}"


def _call(builder, name, result, args, suffix=None):
    suffix = suffix or _suffix(result)
    function_type = ir.FunctionType(result, [a.type for a in args])
    module = builder.module
    return builder.call(
        cgutils.get_or_insert_function(module, function_type, f"llvm.{name}.{suffix}"), args
    )


def _splat(builder, value, lanes):
    llvm = ir.VectorType(value.type, lanes)
    undefined = ir.Constant(llvm, ir.Undefined)
    first = builder.insert_element(undefined, value, _i32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_i32, lanes), None))


# ---------------------------------------------------------------- lane by lane


def vector_lanes(elem):
    """Lanes of a full-width vector of this element kind."""
    return BYTES // SIZES[elem]


def spread(scalar, like):
    """A scalar in every lane, with the shape (and element kind) of `like`."""
    scalar = convert(scalar, like.elem)
    return like.like(_splat(like.builder, scalar.value, like.lanes)) if like.lanes else scalar


def splat(scalar, elem, lanes):
    """A scalar in every lane of a vector of `elem`."""
    scalar = convert(scalar, elem)
    return scalar.like(_splat(scalar.builder, scalar.value, lanes), lanes=lanes)


def constant(builder_of, number, elem, lanes=0):
    """A number, in the function that `builder_of` is computed in; in every lane of a vector."""
    shape = Lanes(builder_of.builder, None, elem, lanes)
    return shape.like(shape.constant(number))


def zeros(builder_of, elem, lanes):
    """A vector of +0, in the function that `builder_of` is computed in."""
    return constant(builder_of, 0.0, elem, lanes)


def convert(v, elem):
    """As float32 or float64, same lanes, rounded once."""
    if v.elem == elem:
        return v
    if v.elem in ("i4", "i8"):
        return v.like(v.builder.sitofp(v.value, v.llvm(elem)), elem)
    change = v.builder.fpext if elem == "f8" else v.builder.fptrunc
    return v.like(change(v.value, v.llvm(elem)), elem)


def fma(a, b, c):
    """a·b + c, rounded once."""
    a, b, c = _together(a, b, c)
    return a.like(_call(a.builder, "fma", a.llvm(), [a.value, b.value, c.value]))


def first_lanes(count, lanes):
    """The mask of the first `count` lanes."""
    b = count.builder
    iota = ir.Constant(ir.VectorType(_i64, lanes), list(range(lanes)))
    mask = b.icmp_signed("<", iota, _splat(b, count.value, lanes))
    return Lanes(b, mask, "b1", lanes)


def lane_at(place, lanes):
    """The mask of the lane at this place; of none where there is no such lane."""
    numbers = lane_numbers(splat(place, "i8", lanes), 1)
    return numbers == place


def where(mask, a, b):
    """a where the mask holds, b elsewhere."""
    if not isinstance(a, Lanes) and not isinstance(b, Lanes):
        raise TypeError("where needs a value beside the mask")
    a, b = _together(a, b)
    return a.like(a.builder.select(mask.value, a.value, b.value))


def unordered(a, b):
    """Lanes in which a or b is NaN."""
    return a.like(a.builder.fcmp_unordered("uno", a.value, b.value), "b1")


def polynomial(coefficients, x):
    """Σ coefficients[i]·x**i by Horner's scheme with fma."""
    value = _constant_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = fma(value, x, c)
    return value


def add_exponent(p, t):
    """p · 2**n, n standing in the lowest bits of the mantissa of t; p and the product normal."""
    integer, shift = ("i4", 23) if p.elem == "f4" else ("i8", 52)
    b = p.builder
    bits, n = (b.bitcast(v.value, v.llvm(integer)) for v in (p, t))
    return p.like(b.bitcast(b.add(bits, b.shl(n, p.constant(shift, integer))), p.llvm()))


def divide(a, b, _elem):
    """a / b."""
    return a / b


def split_exponent(y):
    """(n, 2**−n) such that y / 2**n is in [√½, √2), for positive normal float64."""
    b, one, low = y.builder, 0x3FF0000000000000, 0x3FE6A09E667F3BCD  # the bits of 1 and of √½
    bits = b.bitcast(y.value, y.llvm("i8"))
    shifted = b.add(bits, y.constant(one - low, "i8"))
    biased = b.lshr(shifted, y.constant(52, "i8"))
    n = b.sub(biased, y.constant(1023, "i8"))
    inverse = b.shl(b.sub(y.constant(2046, "i8"), biased), y.constant(52, "i8"))
    n = b.sitofp(b.trunc(n, y.llvm("i4")), y.llvm())
    return y.like(n), y.like(b.bitcast(inverse, y.llvm()))


# ---------------------------------------------------------------- across lanes


def lane_fold(values, combine):
    """What the lanes of some vectors combine to, by a fixed tree.

    Their halves are combined until one lane is left: scalars.
    """
    while values[0].lanes > 1:
        values = combine(*zip(*map(halves, values), strict=True))
    return [first_lane(v) for v in values]


def halves(v):
    """The lower half of the lanes, and the upper one."""
    count, b = v.lanes // 2, v.builder
    undefined, index = ir.Constant(v.value.type, ir.Undefined), ir.VectorType(_i32, count)
    places = (ir.Constant(index, list(range(i, i + count))) for i in (0, count))
    return [v.like(b.shuffle_vector(v.value, undefined, p), lanes=count) for p in places]


def lane_sum(v):
    """Sum of the lanes (see `lane_fold`)."""
    (total,) = lane_fold([v], lambda low, high: [low[0] + high[0]])
    return total


def lane_max(v):
    """Largest lane; no lane may be NaN."""
    (most,) = lane_fold([v], lambda low, high: [where(low[0] > high[0], low[0], high[0])])
    return most


def lanes_of(v):
    """All lanes, scalars."""
    each = (v.builder.extract_element(v.value, _i32(i)) for i in range(v.lanes))
    return [v.like(value, lanes=0) for value in each]


def first_lane(v):
    """Lane 0."""
    return v.like(v.builder.extract_element(v.value, _i32(0)), lanes=0)


def any_lane(mask):
    """Whether the mask holds in some lane."""
    bits = mask.builder.bitcast(mask.value, ir.IntType(mask.lanes))
    return mask.like(mask.builder.icmp_unsigned("!=", bits, bits.type(0)), "b1", 0)


def piece_lanes(elem):
    """Lanes of a piece of 16 bytes."""
    return 16 // SIZES[elem]


def transpose(rows):
    """The columns of a square block, given its rows.

    Neighbouring rows exchange elements inside their pieces of 16 bytes, then rows that are apart
    exchange these pieces: a CPU has shuffles of two vectors for both.
    """
    piece = piece_lanes(rows[0].elem)
    pieces = rows[0].lanes // piece

    def across(known, columns):
        return [
            (n * pieces + row * (pieces // known) + column) * piece + i
            for n in (0, 1)
            for row in range(known)
            for column in columns
            for i in range(piece)
        ]

    groups = (transpose_pieces(rows[at : at + piece]) for at in range(0, len(rows), piece))
    rows = [v for group in groups for v in group]
    found = [_exchanged(rows[i::piece], pieces, across) for i in range(piece)]
    return [columns[i] for i in range(pieces) for columns in found]


def transpose_pieces(rows):
    """The columns of the square blocks that the vectors' pieces of 16 bytes form."""
    lanes, piece = rows[0].lanes, piece_lanes(rows[0].elem)

    def inside(known, columns):
        return [
            n * lanes + at + column * known + row
            for at in range(0, lanes, piece)
            for column in columns
            for n in (0, 1)
            for row in range(known)
        ]

    return _exchanged(rows, piece, inside)


def _exchanged(rows, count, order, known=1):
    """Each of `count` columns of all rows, from vectors of some columns of `known` rows each.

    `order` tells which elements of two of them are those of half of their columns.
    """
    if len(rows) == 1:
        return rows
    half, b = count // known // 2, rows[0].builder
    found = []
    for columns in range(half), range(half, 2 * half):
        chosen = order(known, columns)
        index = ir.Constant(ir.VectorType(_i32, len(chosen)), chosen)
        pairs = zip(rows[::2], rows[1::2], strict=True)
        one = [v.like(b.shuffle_vector(v.value, w.value, index)) for v, w in pairs]
        found += _exchanged(one, count, order, 2 * known)
    return found


# ---------------------------------------------------------------- control


def each(count, step, body):
    """Run body(i) for i = 0, step, 2·step, … below `count`."""
    b = count.builder
    with cgutils.for_range_slice(b, _i64(0), count.value, _i64(step)) as (i, _):
        body(count.like(i))


def repeat(count, body, *state):
    """The state after body(i, *state) -> state, for i = 0 … count − 1."""
    b = count.builder
    variables = [cgutils.alloca_once_value(b, v.value) for v in state]

    def values():
        return tuple(v.like(b.load(at)) for v, at in zip(state, variables, strict=True))

    def once(i):
        for v, at in zip(body(i, *values()), variables, strict=True):
            b.store(v.value, at)

    each(count, 1, once)
    return values()


def when(mask, body):
    """Run body() if a scalar mask holds."""
    with mask.builder.if_then(mask.value):
        body()


def value_if(mask, compute):
    """The integer compute() if a scalar mask holds, 0 otherwise."""
    (value,) = either(mask, lambda: (compute(),), lambda: (constant(mask, 0, "i8"),))
    return value


def either(mask, compute, otherwise):
    """The values, a tuple, of compute() if a scalar mask holds, of otherwise() if not."""
    b, found = mask.builder, []
    with b.if_else(mask.value) as branches:
        for branch, values in zip(branches, (compute, otherwise), strict=True):
            with branch:
                found.append((values(), b.block))
    chosen = []
    for one, other in zip(*(values for values, _ in found), strict=True):
        phi = b.phi(one.value.type)
        for v, (_, block) in zip((one, other), found, strict=True):
            phi.add_incoming(v.value, block)
        chosen.append(one.like(phi))
    return tuple(chosen)


def smaller(a, b):
    """The smaller one of two integers."""
    a, b = _together(a, b)
    return where(b < a, b, a)


def larger(a, b):
    """The larger one of two integers."""
    a, b = _together(a, b)
    return where(b > a, b, a)


# ---------------------------------------------------------------- memory


def _at(address, llvm):
    return address.builder.inttoptr(address.value, llvm.as_pointer())


def load_scalar(address, elem):
    """The int64 (i8), float32 (f4) or float64 (f8) at a byte address."""
    llvm = _ELEMENT[elem]
    return address.like(address.builder.load(_at(address, llvm), typ=llvm), elem)


def store_scalar(address, scalar):
    """Write a scalar to a byte address."""
    address.builder.store(scalar.value, _at(address, scalar.value.type))


def load_vector(address, elem, lanes):
    """A vector of native elements, naturally aligned."""
    llvm = ir.VectorType(_ELEMENT[elem], lanes)
    value = address.builder.load(_at(address, llvm), typ=llvm)
    value.align = SIZES[elem]
    return address.like(value, elem, lanes)


def store_vector(address, v):
    """Write a vector of native elements, naturally aligned."""
    v.builder.store(v.value, _at(address, v.llvm())).align = SIZES[v.elem]


def gather(addresses, elem, mask):
    """The native elements at these addresses, naturally aligned; 0 where the mask does not hold."""
    b, lanes = addresses.builder, addresses.lanes
    llvm = ir.VectorType(_ELEMENT[elem], lanes)
    places = b.inttoptr(addresses.value, ir.VectorType(_byte_pointer, lanes))
    args = [places, _i32(SIZES[elem]), mask.value, ir.Constant(llvm, None)]
    return addresses.like(
        _call(b, "masked.gather", llvm, args, f"{_suffix(llvm)}.v{lanes}p0"), elem
    )


def lane_numbers(like, step):
    """Multiples of an integer: 0, step, 2·step, …, of int64, as many lanes as `like` has."""
    return like.like(ir.Constant(like.llvm("i8"), [i * step for i in range(like.lanes)]), "i8")


def to_integer(v):
    """float64 lanes that hold integers as int64."""
    return v.like(v.builder.fptosi(v.value, v.llvm("i8")), "i8")


def clear(address, size, past_caches=False):
    """Write `size` zero bytes at a multiple of `size`."""
    llvm = ir.VectorType(_i8, size)
    done = address.builder.store(ir.Constant(llvm, None), _at(address, llvm))
    done.align = size
    if past_caches:
        done.set_metadata("nontemporal", address.builder.module.add_metadata([_i32(1)]))


def prefetch(address, to_write=False):
    """Ask for the cache line at this address; harmless where nothing is mapped."""
    args = [_at(address, _i8), _i32(int(to_write)), _i32(3), _i32(1)]  # near, of data
    _call(address.builder, "prefetch", ir.VoidType(), args, "p0")


class Format:
    """How elements lie in memory and in which vectors they are computed; loads and stores between.

    Parameters
    ----------
    kind : str
        Kind and size as in NumPy's dtype.str (f2, f4, f8, i1 … u8, b1), or bf for bfloat16.
    elem : {"f4", "f8"}
        What is computed with.
    swapped : bool
        Whether the bytes are in the order that is not the machine's.
    lanes : int, optional
        Of a vector; as many as fill one.
    """

    def __init__(self, kind, elem, swapped=False, lanes=None):
        self.kind, self.elem, self.swapped = kind, elem, swapped
        self.size = 2 if kind == "bf" else int(kind[1])
        self.lanes = lanes or vector_lanes(elem)
        self.name = ("s" if swapped else "") + kind + elem
        self._native = {"f2": _half, "f4": _single, "f8": _double}.get(kind)
        integer = ir.IntType(8 * self.size)
        self._bits = ir.VectorType(integer, self.lanes)
        element = self._native if self._native and not swapped else integer
        self._memory = ir.VectorType(element, self.lanes)

    def __eq__(self, other):
        return isinstance(other, Format) and self.name == other.name

    def __hash__(self):
        return hash(self.name)

    # -- between what lies in memory and what is computed with

    def _decode(self, builder, value):
        lanes = self.lanes
        if self.swapped:
            value = _call(builder, "bswap", self._bits, [value])
        if self.kind == "bf":
            wide = builder.zext(value, ir.VectorType(_i32, lanes))
            wide = builder.shl(wide, ir.Constant(wide.type, [16] * lanes))
            value = builder.bitcast(wide, ir.VectorType(_single, lanes))
        elif self._native is None:
            change = builder.sitofp if self.kind[0] == "i" else builder.uitofp
            return Lanes(builder, change(value, _vector(self.elem, lanes)), self.elem, lanes)
        elif self.swapped:
            value = builder.bitcast(value, ir.VectorType(self._native, lanes))
        target = _vector(self.elem, lanes)
        if value.type != target:
            narrower = value.type.element == _double
            value = (builder.fptrunc if narrower else builder.fpext)(value, target)
        return Lanes(builder, value, self.elem, lanes)

    def _encode(self, v):
        builder = v.builder
        if self.kind == "bf":
            return self._to_bfloat16(v)
        value, target = v.value, ir.VectorType(self._native, self.lanes)
        if value.type != target:
            wider = self._native == _double
            value = (builder.fpext if wider else builder.fptrunc)(value, target)
        if self.swapped:
            value = _call(builder, "bswap", self._bits, [builder.bitcast(value, self._bits)])
        return value

    def _to_bfloat16(self, v):
        """Rounded to nearest even by integer arithmetic; a NaN stays one."""
        v = convert(v, "f4")
        b = v.builder

        def constant(number):
            return v.constant(number, "i4")

        bits = b.bitcast(v.value, v.llvm("i4"))
        odd = b.and_(b.lshr(bits, constant(16)), constant(1))
        rounded = b.add(bits, b.add(odd, constant(0x7FFF)))
        bits = b.select(unordered(v, v).value, constant(0x7FC00000), rounded)
        return b.trunc(b.lshr(bits, constant(16)), self._bits)

    # -- contiguous

    def load(self, address):
        """A full vector, from any byte address."""
        value = address.builder.load(_at(address, self._memory), typ=self._memory)
        value.align = 1
        return self._decode(address.builder, value)

    def store(self, address, v):
        """Write a full vector to any byte address."""
        v.builder.store(self._encode(v), _at(address, self._memory)).align = 1

    def stream(self, address, v):
        """Write past the caches; the address is a multiple of the vector's size in memory."""
        done = v.builder.store(self._encode(v), _at(address, self._memory))
        done.align = self.size * self.lanes
        done.set_metadata("nontemporal", v.builder.module.add_metadata([_i32(1)]))

    def load_first(self, address, count, fill):
        """The first `count` lanes from memory, `fill` in the others, which are not read."""
        return self._masked_load(_at(address, _i8), address.builder, count, fill, "masked.load")

    def load_pieces(self, addresses, count, fill):
        """`load_first` of as many lanes from each address as `transpose_pieces` takes together."""
        b = count.builder
        pieces = [self._masked_piece(b, a, count) for a in addresses]
        whole = _joined(b, pieces)
        v = self._decode(b, whole)
        mask = _joined(b, [self._piece_mask(count)] * len(pieces))
        return v.like(b.select(mask, v.value, _constant_like(v, fill).value))

    def store_pieces(self, addresses, count, v):
        """`store_first` of a vector's pieces at these addresses, the last one first."""
        b, value = v.builder, self._encode(v)
        lanes = piece_lanes(self.elem)
        mask = self._piece_mask(count)
        suffix = f"v{lanes}{_suffix(value.type.element)}.p0"
        for i, address in reversed(list(enumerate(addresses))):
            index = ir.Constant(ir.VectorType(_i32, lanes), list(range(i * lanes, (i + 1) * lanes)))
            part = b.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), index)
            args = [part, _at(address, _i8), _i32(1), mask]
            _call(b, "masked.store", ir.VoidType(), args, suffix)

    def _piece_mask(self, count):
        return first_lanes(count, piece_lanes(self.elem)).value

    def _masked_piece(self, builder, address, count):
        llvm = ir.VectorType(self._memory.element, piece_lanes(self.elem))
        args = [_at(address, _i8), _i32(1), self._piece_mask(count), ir.Constant(llvm, None)]
        return _call(builder, "masked.load", llvm, args, f"{_suffix(llvm)}.p0")

    def store_first(self, address, count, v):
        """Write the first `count` lanes only."""
        self._masked_store(_at(address, _i8), count, v, "masked.store")

    def get(self, address):
        """One element, as a scalar of `elem`."""
        b = address.builder
        value = b.load(_at(address, self._memory.element), typ=self._memory.element)
        value.align = 1
        some = b.insert_element(ir.Constant(self._memory, ir.Undefined), value, _i32(0))
        return first_lane(self._decode(b, some))

    def put(self, address, scalar):
        """Write one element."""
        b = address.builder
        value = self._encode(splat(scalar, self.elem, self.lanes))
        value = b.extract_element(value, _i32(0))
        b.store(value, _at(address, self._memory.element)).align = 1

    # -- elements apart from each other

    def gather(self, address, stride, count, fill):
        """`load_first` of elements `stride` bytes apart."""
        places = self._places(address, stride)
        return self._masked_load(places, address.builder, count, fill, "masked.gather")

    def scatter(self, address, stride, count, v):
        """`store_first` of elements `stride` bytes apart."""
        self._masked_store(self._places(address, stride), count, v, "masked.scatter")

    def gather_at(self, addresses, offset, count, fill):
        """`load_first` of elements `offset` bytes behind each of a list of int64 addresses."""
        places = self._listed(addresses, offset)
        return self._masked_load(places, addresses.builder, count, fill, "masked.gather")

    def scatter_at(self, addresses, offset, count, v):
        """`store_first` of elements `offset` bytes behind each of a list of int64 addresses."""
        self._masked_store(self._listed(addresses, offset), count, v, "masked.scatter")

    def _places(self, address, stride):
        b, index = address.builder, ir.VectorType(_i64, self.lanes)
        iota = ir.Constant(index, list(range(self.lanes)))
        offset = b.mul(iota, _splat(b, stride.value, self.lanes))
        places = b.add(_splat(b, address.value, self.lanes), offset)
        return b.inttoptr(places, ir.VectorType(_byte_pointer, self.lanes))

    def _listed(self, addresses, offset):
        b = addresses.builder
        base = load_vector(addresses, "i8", self.lanes) + offset
        return b.inttoptr(base.value, ir.VectorType(_byte_pointer, self.lanes))

    def _first(self, builder, count):
        count = count if isinstance(count, Lanes) else Lanes(builder, _i64(count), "i8", 0)
        return first_lanes(count, self.lanes).value

    def _masked_load(self, places, builder, count, fill, name):
        mask = self._first(builder, count)
        zero = ir.Constant(self._memory, None)
        suffix = f"{_suffix(self._memory)}.{self._pointer_suffix(places)}"
        value = _call(builder, name, self._memory, [places, _i32(1), mask, zero], suffix)
        v = self._decode(builder, value)
        return v.like(builder.select(mask, v.value, _constant_like(v, fill).value))

    def _masked_store(self, places, count, v, name):
        mask = self._first(v.builder, count)
        suffix = f"{_suffix(self._memory)}.{self._pointer_suffix(places)}"
        args = [self._encode(v), places, _i32(1), mask]
        _call(v.builder, name, ir.VoidType(), args, suffix)

    def _pointer_suffix(self, places):
        return f"v{self.lanes}p0" if isinstance(places.type, ir.VectorType) else "p0"


def _joined(builder, values):
    """Vectors one behind the other, a power of two of them."""
    while len(values) > 1:
        lanes = 2 * values[0].type.count
        index = ir.Constant(ir.VectorType(_i32, lanes), list(range(lanes)))
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [builder.shuffle_vector(a, b, index) for a, b in pairs]
    return values[0]


def _vector(elem, lanes):
    return ir.VectorType(_ELEMENT[elem], lanes)
