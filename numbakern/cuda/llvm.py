"""The machine that `device.Value`s are on when a kernel is compiled: it emits instructions.

Memory is reached by inline PTX, which says exactly how wide an access is and under which mask, and
so are the few operations that LLVM has no instruction for.
"""

import itertools

from llvmlite import ir

from numbakern.cuda.device import Value

_i1, _i32, _i64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)
_f32, _f64, _void = ir.FloatType(), ir.DoubleType(), ir.VoidType()
_TYPE = {"f4": _f32, "f8": _f64, "i4": _i32, "i8": _i64, "b1": _i1}
_CONSTRAINT = {"f4": "f", "f8": "d", "i4": "r", "i8": "l"}
_WORD = {1: ("r", "i4"), 2: ("r", "i4"), 4: ("r", "i4"), 8: ("l", "i8")}  # by bytes
_NAMES = {"add": "fadd", "sub": "fsub", "and": "and_", "or": "or_"}
_ALL = -1  # every lane of the warp
_serial = itertools.count()


class LLVM:
    """Emits into an llvmlite builder. Values are LLVM values; the methods are those of `device`.

    `capability`: that of the devices which the code is for, such as (9, 0).
    """

    def __init__(self, builder, capability):
        self.builder, self.capability = builder, capability

    # -- numbers

    def constant(self, number, elem):
        """A number of this kind."""
        return ir.Constant(_TYPE[elem], number)

    def anything(self, elem):
        """See device.anything; LLVM's own `undef` would let it draw conclusions."""
        return self._ptx("// $0", elem, [])

    def binary(self, name, a, b, elem):
        """An operator's result."""
        if elem in ("f4", "f8"):
            if name == "mul":  # a product that is rounded; fmul would be contracted
                return self._call(f"nvvm.mul.rn.{elem[0] if elem == 'f4' else 'd'}", a.type, a, b)
            return getattr(self.builder, _NAMES[name])(a, b)
        names = {"and": "and_", "or": "or_"}
        return getattr(self.builder, names.get(name, name))(a, b)

    def compare(self, sign, a, b, elem):
        """A comparison; with NaN only != holds."""
        if elem not in ("f4", "f8"):
            return self.builder.icmp_signed(sign, a, b)
        if sign == "!=":
            return self.builder.fcmp_unordered(sign, a, b)
        return self.builder.fcmp_ordered(sign, a, b)

    def select(self, mask, a, b, _elem):
        """See device.where."""
        return self.builder.select(mask, a, b)

    def convert(self, v, elem, to):
        """See device.convert; from u8, an unsigned int64, too."""
        change = {
            "f4f8": "fpext", "f8f4": "fptrunc", "f8i8": "fptosi", "i8i4": "trunc",
            "i8f8": "sitofp", "i4f8": "sitofp", "u8f8": "uitofp", "i4i8": "sext",
        }[elem + to]  # fmt: skip
        return getattr(self.builder, change)(v, _TYPE[to])

    def bitcast(self, v, _elem, to):
        """The same bits as another kind of the same size."""
        return self.builder.bitcast(v, _TYPE[to])

    def fma(self, a, b, c, elem):
        """See device.fma."""
        return self._call(f"fma.{'f32' if elem == 'f4' else 'f64'}", a.type, a, b, c)

    def maximum(self, a, b, elem):
        """See device.larger."""
        if elem == "f4":
            return self._ptx("max.NaN.f32 $0, $1, $2;", "f4", [(a, "f4"), (b, "f4")])
        nan = self.builder.fcmp_unordered("uno", a, a)
        above = self.builder.fcmp_ordered(">", a, b)
        return self.builder.select(self.builder.or_(above, nan), a, b)

    def at_least(self, x, low, elem):
        """See device.at_least."""
        if elem == "f4":
            return self._ptx("max.f32 $0, $1, $2;", "f4", [(x, "f4"), (low, "f4")])
        return self.builder.select(self.builder.fcmp_ordered(">", x, low), x, low)

    def one_below(self, x, top, elem):
        """See device.one_below."""
        if elem == "f4":
            return self._ptx("set.lt.f32.f32 $0, $1, $2;", "f4", [(x, "f4"), (top, "f4")])
        below = self.builder.fcmp_ordered("<", x, top)
        return self.builder.select(below, _f64(1.0), _f64(0.0))

    def exp2(self, v):
        """See device.exp2."""
        return self._ptx("ex2.approx.ftz.f32 $0, $1;", "f4", [(v, "f4")])

    def reciprocal(self, v):
        """See device.divide; an ulp off at most (PTX ISA, rcp)."""
        return self._ptx("rcp.approx.ftz.f32 $0, $1;", "f4", [(v, "f4")])

    def wide_product(self, i, step):
        """See device.distance; of widened factors ptxas makes a product of four."""
        return self._ptx("mul.wide.s32 $0, $1, $2;", "i8", [(i, "i4"), (step, "i4")])

    def within(self, t, count):
        """See device.within."""
        return self.builder.icmp_unsigned("<", t, count)

    # -- bits

    def join(self, low, high):
        """See device.join."""
        return self._ptx("mov.b64 $0, {$1, $2};", "f8", [(low, "i4"), (high, "i4")])

    def split(self, bits):
        """See device.split."""
        high = self.builder.lshr(bits, _i64(32))
        return self.builder.trunc(bits, _i32), self.builder.trunc(high, _i32)

    def half_to_single(self, word, high):
        """The low or high half of a word."""
        half = "hi" if high else "lo"
        code = f"{{.reg .b16 lo, hi; mov.b32 {{lo, hi}}, $1; cvt.f32.f16 $0, {half};}}"
        return self._ptx(code, "f4", [(word, "i4")])

    def pack_halves(self, low, high, kind):
        """See device.pack_halves."""
        name = "bf16x2" if kind == "bf" else "f16x2"
        code = f"cvt.rn.{name}.f32 $0, $2, $1;"
        return self._ptx(code, "i4", [(low, "f4"), (high, "f4")])

    def pair(self, low, high, upper):
        """See device.pair; by shifts the compiler would see through it and keep both words."""
        code = f"prmt.b32 $0, $1, $2, {'0x7632' if upper else '0x5410'};"
        return self._ptx(code, "i4", [(low, "i4"), (high, "i4")])

    def funnel(self, low, high, bits):
        """See device.funnel."""
        operands = [(low, "i4"), (high, "i4"), (bits, "i4")]
        return self._ptx("shf.r.clamp.b32 $0, $1, $2, $3;", "i4", operands)

    def larger_halves(self, a, b, kind):
        """See device.larger_halves."""
        name = "bf16x2" if kind == "bf" else "f16x2"
        return self._ptx(f"max.NaN.{name} $0, $1, $2;", "i4", [(a, "i4"), (b, "i4")])

    def equal_halves(self, a, b, kind):
        """See device.equal_halves."""
        if kind == "f2" or self.capability >= (9, 0):
            name = "bf16x2" if kind == "bf" else "f16x2"
            return self._ptx(f"set.eq.u32.{name} $0, $1, $2;", "i4", [(a, "i4"), (b, "i4")])
        # a − b, which is 0 for equal ones alone; then what a carry into each sign bit says.
        code = (
            "{.reg .b32 d, m, s; mov.b32 m, 0xbf80bf80; fma.rn.bf16x2 d, $2, m, $1; "
            "and.b32 d, d, 0x7fff7fff; sub.s32 s, 0x80008000, d; "
            "prmt.b32 $0, s, s, 0xbb99;}"
        )
        return self._ptx(code, "i4", [(a, "i4"), (b, "i4")])

    # -- threads

    def thread(self):
        """Number of the thread in its block."""
        return self._call("nvvm.read.ptx.sreg.tid.x", _i32)

    def block(self):
        """Number of the block."""
        return self.builder.zext(self._call("nvvm.read.ptx.sreg.ctaid.x", _i32), _i64)

    def shuffle_xor(self, word, offset):
        """See device.shuffle_xor."""
        return self._call("nvvm.shfl.sync.bfly.i32", _i32, _i32(_ALL), word, _i32(offset), _i32(31))

    def ballot(self, mask):
        """The lanes of the warp in which a mask holds, a bit each."""
        return self._call("nvvm.vote.ballot.sync", _i32, _i32(_ALL), mask)

    def ones(self, word):
        """How many bits of a word are set."""
        return self._call("ctpop.i32", _i32, word)

    def warp_barrier(self):
        """See device.warp_barrier."""
        self._call("nvvm.bar.warp.sync", _void, _i32(_ALL))

    def barrier(self):
        """See device.barrier."""
        self._call("nvvm.barrier0", _void)

    def cluster_barrier(self):
        """See device.cluster_barrier."""
        self._meet_in_cluster("arrive.release")

    def cluster_start(self):
        """See device.cluster_start: nobody waits for memory."""
        self._meet_in_cluster("arrive.relaxed")

    def _meet_in_cluster(self, arrive):
        for step in (arrive, "wait.acquire"):
            self._assembly(f"barrier.cluster.{step}.aligned;", _void, [], [])

    def cluster_rank(self):
        """See device.cluster_rank."""
        return self._ptx("mov.u32 $0, %cluster_ctarank;", "i4", [])

    def repeat(self, count, body, state):
        """See device.repeat."""
        b, before = self.builder, self.builder.basic_block
        head, inside, after = (b.append_basic_block(n) for n in ("repeat", "body", "done"))
        total = b.trunc(count.value, _i32)  # half the registers, and half the work of a round
        b.branch(head)
        b.position_at_end(head)
        i, values = b.phi(_i32), [b.phi(v.value.type) for v in state]
        i.add_incoming(_i32(0), before)
        for phi, v in zip(values, state, strict=True):
            phi.add_incoming(v.value, before)
        b.cbranch(b.icmp_signed("<", i, total), inside, after)
        b.position_at_end(inside)
        current = [v.like(phi) for phi, v in zip(values, state, strict=True)]
        result = body(Value(self, b.sext(i, _i64), "i8"), *current)
        i.add_incoming(b.add(i, _i32(1)), b.basic_block)
        for phi, v in zip(values, result, strict=True):
            phi.add_incoming(v.value, b.basic_block)
        b.branch(head)
        b.position_at_end(after)
        return tuple(current)

    def when(self, mask, compute, otherwise):
        """See device.when."""
        b, before = self.builder, self.builder.basic_block
        inside, after = b.append_basic_block("when"), b.append_basic_block("after")
        b.cbranch(mask.value, inside, after)
        computed = self._side(inside, compute, after)
        b.position_at_end(after)
        return self._joined(computed, (otherwise, before))

    def either(self, mask, compute, seldom):
        """See device.either."""
        b = self.builder
        often, other, after = (b.append_basic_block(n) for n in ("often", "seldom", "after"))
        b.cbranch(mask.value, often, other).set_weights([1000, 1])
        sides = [self._side(often, compute, after), self._side(other, seldom, after)]
        b.position_at_end(after)
        return self._joined(*sides)

    def _side(self, block, compute, after):
        """What is computed in a block that ends with a jump; and the block at that end."""
        self.builder.position_at_end(block)
        computed, last = compute(), self.builder.basic_block
        self.builder.branch(after)
        return computed, last

    def _joined(self, first, second):
        """Of the values that come from two blocks those of the one that was taken."""
        result = []
        for v, other in zip(first[0], second[0], strict=True):
            phi = self.builder.phi(v.value.type)
            phi.add_incoming(v.value, first[1])
            phi.add_incoming(other.value, second[1])
            result.append(v.like(phi))
        return result

    # -- memory

    def load(self, address, size, count, mask, fill):
        """See device.load."""
        letter, elem = _WORD[size]
        width = {1: "u8", 2: "u16", 4: "b32", 8: "b64"}[size]
        vector, names = _vector(0, count)
        constraints = [f"={letter}"] * count + ["l"]
        args, code = [address], f"ld.global{vector}.{width} {names}, [${count}];"
        return self._loaded(code, elem, count, constraints, args, mask, fill)

    def prefetch(self, address, mask, level):
        """See device.prefetch."""
        constraints, args = ["l"], [address]
        code = self._masked(f"prefetch.global.L{level} [$0];", mask, constraints, args)
        self._assembly(code, _void, constraints, args)

    def store(self, address, size, words, mask):
        """See device.store."""
        width = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}[size]
        if size < 4:  # of a register's lowest bits, as ld and st allow
            width = width.replace("b", "u")
        vector, names = _vector(1, len(words))
        code = f"st.global{vector}.{width} [$0], {names};"
        constraints, args = ["l"] + [_WORD[size][0]] * len(words), [address, *words]
        if mask is not None:
            code = self._masked(code, mask, constraints, args)
        self._assembly(code, _void, constraints, args)

    def atomic_min(self, address, v, mask):
        """See device.atomic_min."""
        constraints, args = ["l", "l"], [address, v]
        code = self._masked("red.global.min.s64 [$0], $1;", mask, constraints, args)
        self._assembly(code, _void, constraints, args)

    def atomic_add(self, address, mask):
        """What the uint32 at an address was before 1 was added, where the mask holds."""
        constraints, args = ["=r", "l"], [address]
        code = "atom.relaxed.gpu.global.add.u32 $0, [$1], 1;"
        code = self._masked(code, mask, constraints, args, "mov.b32 $0, 0;")
        return self._assembly(code, _i32, constraints, args)

    def arrive(self, address, count, mask):
        """Where the mask holds, add 1 to the uint32 at an address and wait until it is `count`."""
        code = (
            "{.reg .pred p, q; .reg .u32 n; setp.ne.b32 p, $2, 0; mov.u32 n, $1; "
            "@p red.release.gpu.global.add.u32 [$0], 1; "
            "again: @p ld.acquire.gpu.global.u32 n, [$0]; "
            "setp.lt.u32 q, n, $1; @q bra again;}"
        )
        args = [address, self.builder.trunc(count, _i32), self.builder.zext(mask, _i32)]
        self._assembly(code, _void, ["l", "r", "r"], args)

    def shared(self, size):
        """See device.shared."""
        name = f"shared_{next(_serial)}"
        area = ir.GlobalVariable(self.builder.module, ir.ArrayType(ir.IntType(8), size), name, 3)
        area.linkage, area.align = "internal", 16
        area.initializer = ir.Constant(area.value_type, ir.Undefined)
        return self.builder.ptrtoint(area, _i32)

    def dynamic_shared(self):
        """See device.dynamic_shared."""
        name, module = "dynamic_shared", self.builder.module
        area = module.globals.get(name)
        if area is None:
            area = ir.GlobalVariable(module, ir.ArrayType(ir.IntType(8), 0), name, 3)
            area.linkage, area.align = "external", 16
        return self.builder.ptrtoint(area, _i32)

    def shared_load(self, address, size, count, mask, fill):
        """See device.shared_words."""
        letter, kind = _WORD[size]
        vector, names = _vector(0, count)
        width = "u16" if size == 2 else f"b{8 * size}"
        code = f"ld.shared{vector}.{width} {names}, [${count}];"
        constraints = [f"={letter}"] * count + ["r"]
        return self._loaded(code, kind, count, constraints, [address], mask, fill)

    def shared_store(self, address, size, words, mask, peer):
        """See device.put_shared_words and device.shared_store."""
        vector, names = _vector(1, len(words))
        space, constraints = "", ["r"] + [_WORD[size][0]] * len(words)
        if peer is not None:
            code = "mapa.shared::cluster.u32 $0, $1, $2;"
            address = self._ptx(code, "i4", [(address, "i4"), (peer, "i4")])
            space = "::cluster"
        width = "u16" if size == 2 else f"b{8 * size}"
        args, code = [address, *words], f"st.shared{space}{vector}.{width} [$0], {names};"
        code = self._masked(code, mask, constraints, args)
        self._assembly(code, _void, constraints, args)

    def copy_to_shared(self, place, address, mask):
        """See device.copy_to_shared."""
        constraints, args = ["r", "l"], [place, address]
        code = "cp.async.cg.shared.global [$0], [$1], 16;"
        if mask is not None:
            code = self._masked(code, mask, constraints, args)
        self._assembly(code, _void, constraints, args)

    def commit_copies(self):
        """See device.commit_copies."""
        self._assembly("cp.async.commit_group;", _void, [], [])

    def await_copies(self, groups):
        """See device.await_copies."""
        self._assembly(f"cp.async.wait_group {groups};", _void, [], [])

    # -- emitting

    def _call(self, name, result, *args):
        function_type = ir.FunctionType(result, [a.type for a in args])
        name, module = f"llvm.{name}", self.builder.module
        function = module.globals.get(name) or ir.Function(module, function_type, name)
        return self.builder.call(function, args)

    def _ptx(self, code, result, args):
        """An operation on registers alone: the compiler may make one of two alike, or move it."""
        constraints = [f"={_CONSTRAINT[result]}", *(_CONSTRAINT[elem] for _, elem in args)]
        values = [v for v, _ in args]
        function_type = ir.FunctionType(_TYPE[result], [v.type for v in values])
        assembly = ir.InlineAsm(function_type, code, ",".join(constraints), False)
        return self.builder.call(assembly, values, attrs=("readnone",))

    def _loaded(self, code, elem, count, constraints, args, mask, fill):
        """The words that a load gives where the mask holds, if there is one."""
        if mask is not None:
            bits, fills = 64 if elem == "i8" else 32, ""
            if fill is not None:
                fills = "".join(f"mov.b{bits} ${i}, {fill % (1 << bits)};" for i in range(count))
            code = self._masked(code, mask, constraints, args, fills)
        return self._words(code, elem, count, constraints, args)

    def _words(self, code, elem, count, constraints, args):
        """The words that an access gives."""
        result = ir.LiteralStructType([_TYPE[elem]] * count) if count > 1 else _TYPE[elem]
        value = self._assembly(code, result, constraints, args)
        return (
            [value] if count == 1 else [self.builder.extract_value(value, i) for i in range(count)]
        )

    def _masked(self, code, mask, constraints, args, before=""):
        """An access under a mask, which inline PTX takes as an integer only."""
        index = len(constraints)
        constraints.append("r")
        args.append(self.builder.zext(mask, _i32))
        return f"{{.reg .pred p; setp.ne.b32 p, ${index}, 0; {before} @p {code}}}"

    def _assembly(self, code, result, constraints, args):
        """An access to memory, in its place among the others."""
        function_type = ir.FunctionType(result, [a.type for a in args])
        constraints = ",".join([*constraints, "~{memory}"])
        assembly = ir.InlineAsm(function_type, code, constraints, True)
        together = ("convergent",) if ".aligned" in code else ()  # not to be moved into a branch
        return self.builder.call(assembly, args, attrs=together)


def _vector(first, count):
    """How PTX writes so many registers from number `first` on: (suffix, names)."""
    names = ", ".join(f"${first + i}" for i in range(count))
    return (f".v{count}", f"{{{names}}}") if count > 1 else ("", names)
