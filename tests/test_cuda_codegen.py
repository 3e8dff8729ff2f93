"""The code that the CUDA kernels become, read from their machine code; no GPU is needed.

The default run takes a kernel of every operation, of every type and of every way through a row,
and some for all three architectures; ``-m "codegen and slow"`` takes every kernel that ships, for
all of them. ``python -m numbakern.cuda`` prints the figures.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter

import pytest

pytestmark = pytest.mark.codegen

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from numbakern.cuda import codegen  # noqa: E402
from numbakern.cuda import compile as compiler  # noqa: E402
from numbakern.cuda.codegen import ARCHITECTURES, MACHINES, case, figures  # noqa: E402
from numbakern.cuda.plan import Layout, Spec, build, plan  # noqa: E402
from numbakern.cuda.rows import Partition, Way  # noqa: E402

try:
    from cuda import pathfinder

    TOOLS = [pathfinder.find_nvidia_binary_utility(n) for n in ("nvdisasm", "cuobjdump")]
except ImportError:
    TOOLS = [None]
if None in TOOLS:
    pytest.skip("nvdisasm and cuobjdump are not installed", allow_module_level=True)

REGISTERS = 65536  # of a multiprocessor
IN_FLIGHT = 28 << 10
"""Bytes that a multiprocessor has to have asked for to keep the memory busy: 0.8 µs at 4.3 TB/s
over 132 of them."""

# Instructions for each element of an aligned row that a warp (a block, in chunks) takes, all of the
# row's own work included. An H100 issues 62 in the time that 8 bytes take to move, 31 for 4 bytes.
BUDGET = {
    "log_softmax": 36,
    "softmax": 38,
    "logsumexp": 34,
    "log_softmax_backward": 36,
    "softmax_backward": 26,
    "cross_entropy": 34,
    "cross_entropy_value_and_grad": 47,
    "cross_entropy_backward": 46,
    "cross_entropy_backward-lse": 34,
    "cross_entropy_value_and_grad-smooth": 62,
    "cross_entropy_value_and_grad-soft": 70,
    "nll_loss_backward": 20,
}
JOIN = 9
"""Those of the loops that join the parts of a long row, counted as if they ran for each part; they
run for every 32."""
LONG_BUDGET = {"softmax": 51}
"""Where the exponentials of a row that is read twice are taken twice: 50, and about 1 for the loads
under masks, which only a row's last part takes but which are counted here."""
SINGLE = 8
"""Accesses of less than 16 bytes for what there is one of a row: label, logit there, weight, …"""
AGAIN = 1
"""Such accesses in the loops over a long row: the gradient at the label, written once more."""
STACK_OF = {
    ("log_softmax_backward", 1024): 120,
    ("log_softmax_backward", 544): 120,
    ("softmax_backward", 544): 120,
}
"""Bytes of a thread's stack in blocks of so many threads, which have 64 or 96 registers. The first
are where there are no clusters: predicted for 65,536 float32 0.996 of an A100's copy rate so, 0.987
with none. The others are of odd halves: 65,537 bfloat16 0.91 and 0.89 of an H200's so (of a B200's
0.65, 0.61), by clusters of blocks with none 0.52 (0.36)."""
SOME = ("log_softmax", "softmax_backward", "cross_entropy_value_and_grad")


def check(one, arch):
    found = figures(one, arch)
    assert found.calls == 0, found
    # Of small blocks where the compiler is told of many more than it would find registers for.
    little = compiler.LITTLE if one.step.block >= compiler.LARGE or one.step.blocks else 0
    assert found.local <= STACK_OF.get((one.operation, one.step.block), little), found
    size = 2 if one.kind in ("bf", "f2") else int(one.kind[1])
    threads = one.step.block
    # Registers are given to warps by 256; so many threads there are at once.
    resident = REGISTERS // (-(-found.registers // 8) * 8) // threads * threads
    assert resident >= threads, found
    params = dict(one.step.spec.params)
    lanes, vectors, group, chunks, *_ = params["part"]
    inputs = sum(name in ("x", "y") for name, _ in params["modes"])
    if lanes * vectors * group >= 1000 and inputs and one.layout != "columns":
        asked = min(resident, 2048) * vectors * group * size * inputs
        assert asked >= IN_FLIGHT, found
    modes = dict(params["modes"])
    moved = "realigned" in modes.values()  # read by words, written 16 bytes at once
    assert found.wide >= vectors * (moved and "out" in modes), found
    whole = one.layout == "whole" and group * size >= 16 and not moved
    if whole and one.operation != "nll_loss":
        assert found.wide >= vectors, found
        assert found.narrow <= (AGAIN if chunks and found.looped else SINGLE), found
        assert found.single <= SINGLE, found
    if whole and vectors * group >= 31 and one.kind != "f8":
        budget = LONG_BUDGET.get(one.operation, BUDGET[one.operation] + JOIN)
        assert found.instructions <= (budget if chunks else BUDGET[one.operation]), found
    return found


def cases_of(operations, kinds, part):
    """A case each, of whole rows of the given part of COUNTS."""
    return [case(op, kind, codegen.COUNTS[kind][part]) for op in operations for kind in kinds]


DEFAULT = [
    *((one, "sm_90a") for one in cases_of(SOME, codegen.KINDS, 1)),
    *(
        (case(op, "f4", 1000), "sm_90a")
        for op in codegen.OPERATIONS
        if op not in (*SOME, "nll_loss")
    ),
    *((one, "sm_90a") for part in (0, 2, 3) for one in cases_of(SOME[:1], ("f4", "bf"), part)),
    (case(SOME[2], "bf", 65536), "sm_90a"),
    *((case("log_softmax", kind, 1000, "shifted"), "sm_90a") for kind in ("f4", "bf")),
    *((case("log_softmax", kind, 1001), "sm_90a") for kind in ("f4", "bf")),
    (case("log_softmax", "f4", 21, "columns"), "sm_90a"),
    *((one, arch) for arch in ("sm_80", "sm_100a") for one in cases_of(SOME, ("f4", "bf"), 1)),
]


def named(pairs):
    return [pytest.param(one, arch, id=f"{one.name}-{arch}") for one, arch in pairs]


@pytest.mark.parametrize("one, arch", named(DEFAULT))
def test_machine_code(one, arch):
    check(one, arch)


TILES = [
    *((op, kind, n) for op in SOME for kind, n in (("bf", 21), ("bf", 129), ("f4", 31))),
    ("log_softmax", "f4", 32),
    ("log_softmax", "f8", 7),
    ("cross_entropy", "bf", 65),
    ("logsumexp", "f4", 10),
]


def check_tiles(one, arch, mode):
    """(figures, accesses of 16 bytes to a tile, inputs, outputs, elements of a group)."""
    params = dict(one.step.spec.params)
    _, vectors, group, *_ = params["part"]
    modes = dict(params["modes"])
    assert set(modes.values()) == {mode}
    assert one.step.shared <= 32 << 10
    copied = -(-vectors * group * codegen.size_of(one.kind) // 16)
    return check(one, arch), copied, sum(n != "out" for n in modes), "out" in modes, group


@pytest.mark.parametrize("operation, kind, classes", TILES)
@pytest.mark.parametrize("arch", ["sm_90a", pytest.param("sm_80", marks=pytest.mark.slow)])
def test_machine_code_of_tiles(operation, kind, classes, arch):
    """Elements pass between global and shared memory 16 bytes at once, but for an array's last."""
    one = case(operation, kind, classes)
    found, copied, inputs, out, group = check_tiles(one, arch, "staged")
    # Beside them there is what the rows' finish writes, two sums at once.
    assert 0 <= found.wide - copied * (inputs + out) <= (not out)
    # Groups of the array's last 16 bytes, an access each.
    rest = 16 // (group * codegen.size_of(kind)) - 1
    assert found.narrow <= inputs * rest + (out and rest > 0) + SINGLE


@pytest.mark.parametrize("operation, kind, classes", [*TILES, ("softmax", "bf", 1000)])
@pytest.mark.parametrize("arch", ["sm_90a", pytest.param("sm_80", marks=pytest.mark.slow)])
def test_machine_code_of_tiles_that_start_anywhere(operation, kind, classes, arch):
    """They are written 16 bytes at once, and read by words, of halves that are not at one by 5."""
    one, size = case(operation, kind, classes, "shifted", codegen.CHOSEN), codegen.size_of(kind)
    found, copied, inputs, out, _ = check_tiles(one, arch, "staged anywhere")
    assert copied * out <= found.wide <= copied * out + 1
    words = {2: 4 + 5, 4: 4, 8: 2}[size]
    edges = inputs * (16 // size - 1) + 2 * out
    assert 0 <= found.narrow - copied * inputs * words <= edges + SINGLE


@pytest.mark.parametrize("kind, to", [("f2", "f8"), ("f4", "f8"), ("bf", "f4"), ("f8", "f2")])
@pytest.mark.parametrize("classes", [21, 1000, 8192, 50_000])
def test_machine_code_of_casts(kind, to, classes):
    """A lane holds what it computes in: float64 of narrower logits take no more registers."""
    elem, sizes = "f8" if "f8" in (kind, to) else "f4", map(codegen.size_of, (kind, to))
    x, out = (Layout(k, (classes * n, n), True) for k, n in zip((kind, to), sizes, strict=True))
    (step,) = plan("log_softmax", (), (4096, classes), 1, elem, (("x", x), ("out", out))).steps
    used = compiler.resources(compiler.cubin(step.spec, "sm_90a", step.block, step.blocks))
    assert used.local + used.stack <= (compiler.LITTLE if step.block >= compiler.LARGE else 0), used
    assert used.registers <= 128


@pytest.mark.parametrize("to", ["f4", "f2"])
@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"])
def test_integers_as_any_type_compile(kind, to):
    """Logits, and class weights that are smoothed; which the emulator converts without asking."""
    size = int(kind[1])
    x, out = (Layout(k, (21 * n, n), True) for k, n in ((kind, size), (to, codegen.size_of(to))))
    calls = [plan("log_softmax", (), (40, 21), 1, "f4", (("x", x), ("out", out)))]
    arrays = {"x": Layout("f4", (84, 4), True), "labels": Layout("i8", (8,), True)}
    arrays |= {"weight": Layout(kind, (size,), True), "loss": Layout("f4", (4,), True)}
    arrays["out"] = arrays["x"]
    options = (("smooth", True),)
    calls.append(plan("cross_entropy", options, (40, 21), 1, "f4", tuple(arrays.items())))
    for step in (step for made in calls for step in made.steps):
        assert compiler.cubin(step.spec, "sm_90a", step.block, step.blocks).code


FEW = [
    ("cross_entropy_value_and_grad", "f4", 64, 1000), ("cross_entropy_value_and_grad", "bf", 1, 21),
    ("cross_entropy_value_and_grad", "f8", 500, 4096), ("cross_entropy_backward", "f4", 1000, 5),
    ("cross_entropy_value_and_grad", "f4", 64, 65536), ("nll_loss_backward", "f4", 64, 1000),
]  # fmt: skip


@pytest.mark.parametrize("operation, kind, rows, classes", FEW)
def test_machine_code_of_few_rows(operation, kind, rows, classes):
    """What blocks count beside their rows takes neither a stack nor a subroutine."""
    made, _ = codegen.call(operation, kind, rows, classes, machine=codegen.CHOSEN)
    *_, step = (s for s in made.steps if s.spec.kernel != "total")
    assert dict(step.spec.params)["counted"] and step.spec.kernel != "count"
    found = figures(codegen.Case(operation, kind, classes, "whole", step), "sm_90a")
    assert found.calls == 0, found
    assert found.local <= (compiler.LITTLE if step.block >= compiler.LARGE else 0), found


NEIGHBOURS = [
    ("log_softmax", "bf", 21, 4),
    ("log_softmax", "f2", 64, 2),
    ("log_softmax", "bf", 1000, 2),
    ("log_softmax", "f4", 32, 2),
    ("log_softmax", "f8", 3, 2),
    ("softmax_backward", "bf", 21, 2),
    ("cross_entropy", "bf", 64, 2),
    ("cross_entropy_value_and_grad", "f4", 3, 4),
    ("cross_entropy_value_and_grad", "f4", 21, 2),
    ("cross_entropy_value_and_grad", "bf", 8, 2),
]


@pytest.mark.parametrize("operation, kind, classes, rows", NEIGHBOURS)
@pytest.mark.parametrize("arch", ["sm_90a", pytest.param("sm_80", marks=pytest.mark.slow)])
def test_machine_code_of_neighbouring_rows(operation, kind, classes, rows, arch):
    """An access for a class of several rows, and one or two for what there is one of them."""
    one = case(operation, kind, classes, "columns", codegen.CHOSEN)
    check(one, arch)
    params, size = dict(one.step.spec.params), codegen.size_of(kind)
    _, vectors, group, *_ = params["part"]
    modes = dict(params["modes"])
    assert params["together"] == rows and set(modes.values()) == {"abreast"}
    sass = compiler.sass(compiler.cubin(one.step.spec, arch, one.step.block, one.step.blocks))

    def count(what, width):
        width = {2: r"\.U16", 4: "", 8: r"\.64", 16: r"\.128"}[width]
        return len(re.findall(rf"\b{what}\.E{width}(?: |\.EF)", sass))

    held, inputs, maps = vectors * group, len(modes) - ("out" in modes), "out" in modes
    # Beside them there are labels, a divisor, sums; and for each row the logit at its label and
    # the gradient there.
    assert 0 <= count("LDG", rows * size) - held * inputs <= 2 + rows * (rows * size == size)
    assert held * maps <= count("STG", rows * size) <= held * maps + 2
    if size == 2:
        assert count("LDG", 2) <= rows and count("STG", 2) <= rows


LONG = {
    "reduce": Way(4, "reduce", True, kept="no"),
    "map": Way(4, "map", True, kept="no"),
    "shared": Way(12, kept="shared"),
    "partly": Way(16, kept="partly"),
    "cluster-8": Way(8, cluster=8),
    "cluster-16": Way(16, cluster=8),
    "cluster-shared": Way(12, cluster=4, kept="shared"),
    "together": Way(8, spread=True),
    "ahead": Way(8, kept="ahead", places=2),
    "ahead-cluster": Way(8, cluster=8, kept="ahead", places=2),
    "ahead-spare": Way(16, kept="ahead", places=3, spare=True),
    "ahead-cluster-spare": Way(16, cluster=8, kept="ahead", places=3, spare=True),
}


ONLY_READ = ("logsumexp", "cross_entropy")
"""Operations that give one value a row: nothing is kept for a second look, no block maps."""
OF_SUMS = ("log_softmax_backward", "softmax_backward")
"""Operations that reduce to one sum: parts are joined once, not by their maxima first."""
OF_THE_GRADIENT = ("log_softmax_backward",)
"""Operations whose sum is of the gradient alone, so the output is first read by the map."""
SHELVED = ("shared", "partly", "ahead")
"""Where shared memory keeps what reduction and map both read."""


def ways_of(operation):
    if operation not in ONLY_READ:
        return LONG
    ways = {
        n: way
        for n, way in LONG.items()
        if way.cluster == 1 and way.kept not in SHELVED and n != "together"
    }
    return {**ways, "map": LONG["map"]._replace(spread=False)}


def long_rows(operations, kinds, architectures):
    """A kernel for every way of taking long rows but the one of `codegen.cases`."""
    for operation in operations:
        for kind in kinds:
            for name, way in ways_of(operation).items():
                for arch in architectures:
                    if way.cluster > 1 and arch == "sm_80":
                        continue
                    yield pytest.param(
                        operation, kind, way, arch, id=f"{operation}-{kind}-{name}-{arch}"
                    )


def check_way(operation, kind, way, arch):
    one = case(operation, kind, 65536)
    params = {**dict(one.step.spec.params), "way": tuple(way)}
    name = one.step.spec.kernel + "_parts" * (way.stage == "reduce")
    spec = Spec(name, tuple(params.items()))
    threads = way.warps * 32
    code = compiler.cubin(spec, arch, threads)
    used, sass = compiler.resources(code), compiler.sass(code)
    assert used.local + used.stack <= (compiler.LITTLE if threads >= compiler.LARGE else 0), used
    assert not re.search(r"\bRET\b", sass)

    def count(pattern):
        return len(re.findall(rf"\b{pattern}\b", sass))

    _, vectors, *_ = params["part"]
    inputs, ahead = sum(n in ("x", "y") for n, _ in params["modes"]), way.kept == "ahead"
    maps = way.stage != "reduce" and "out" in dict(params["modes"])
    reduced = 0 if way.stage == "map" else 1 if operation in OF_THE_GRADIENT else inputs
    shelved = reduced if way.kept in SHELVED else 0
    mapped = inputs if way.kept in ("no", "partly") else inputs - reduced
    # Without a mask for each group and with; some compilers share one of both, or repeat some.
    needed = vectors * (reduced * (not ahead) + maps * mapped)
    wide = count(r"LDG\.E[.A-Z]*\.128")
    # In a loop, and what is in registers behind it.
    twice = 1 + (way.kept in SHELVED and not ahead)
    assert needed <= wide <= 4 * needed * twice
    # The two sums of a mean's rows are neighbours, which may be written at once.
    sums = bool(params["added"])
    written = twice * maps * vectors
    assert written <= count(r"STG\.E[.A-Z]*\.128") <= written + sums
    kept = shelved * vectors
    # The two parts of a sum are neighbours as well, on the board.
    pairs = kind == "f8" and operation in OF_SUMS
    assert kept * (1 + ahead) <= count(r"LDS\.128") <= kept * (1 + ahead) + 8 * pairs
    stored = count(r"STS\.128")
    if ahead:
        assert kept and stored % kept <= pairs
        check_copies(code, way, kept, pairs)
    else:
        assert stored in {n + p for n in (kept, 2 * kept) for p in (0, pairs)}
    # Two waits, for the start of the others and for what they have written: there alone for memory.
    assert count("UCGABAR_WAIT") == 2 * (way.cluster > 1)
    assert count("MEMBAR") == (way.cluster > 1 or way.meets(1))
    if way.meets(1):
        # A ticket, told to the block. All has been written before a block says so, and is read
        # after all have, by a thread for each part, and what it takes from that by all.
        joins = 1 if operation in OF_SUMS else 2
        waits = r"\b(?:(?:ATOM|RED)G?\.E\.ADD|MEMBAR|LDG\.E\.STRONG|CCTL|BAR\.SYNC)\b"
        assert [w.split(".")[0].removesuffix("G") for w in re.findall(waits, sass)] == [
            "ATOM", "BAR", "BAR", "MEMBAR", "RED", "LD", "CCTL", "BAR", *["BAR"] * joins,
        ]  # fmt: skip


def check_copies(code, way, kept, pairs):
    """Copies are asked for where nothing reads any longer, and waited for before it does."""
    program = codegen.disassembled(code)

    def bodies(spans, depth=0):
        for span in spans:
            yield from bodies(span.parts, depth + (span.kind == "loop"))
            if span.kind == "loop" and not any(part.kind == "loop" for part in span.parts):
                inside = (i for i in program.instructions if span.first <= i.address <= span.last)
                yield depth, list(inside)

    def places(inside, *opcodes):
        return [n for n, i in enumerate(inside) if i.opcode.startswith(opcodes)]

    seen = Counter()
    for depth, inside in bodies(program.spans):
        copies, reads = places(inside, "LDGSTS"), places(inside, "LDS.128")
        if pairs and not copies and len(reads) < kept:  # who joins the parts
            continue
        waits, groups = places(inside, "DEPBAR"), places(inside, "LDGDEPBAR")
        if copies:  # without a mask for each and with; an array may share one of both
            rounds = len(groups)  # the compiler's, of one
            assert (2 * kept - 2) * rounds <= len(copies) <= 2 * kept * rounds
            assert all("BYPASS.128" in inside[n].opcode for n in copies)
            assert rounds == 1 or not reads
            assert copies[-1] < groups[-1]
        if copies and reads:
            written = places(inside, "STG")
            assert len(reads) == kept and max(reads + written[:1]) < copies[0]
        elif reads:
            assert len(reads) == kept and waits[0] < reads[0] and len(groups) == 1
            assert inside[waits[0]].operands == f"SB0, {way.places - 1:#x}"
        if copies or reads:
            seen[depth, bool(copies), bool(reads)] += 1
    # At first, where the compiler may take several rounds at once and the rest behind them; in the
    # loop over rows one loop that reduces, and one that maps and asks.
    assert seen.pop((0, True, False)) <= 2
    assert seen == {(1, False, True): 1, (1, True, True): 1}


@pytest.mark.parametrize(
    "operation, kind, way, arch",
    [
        *long_rows(("log_softmax",), ("f4",), ("sm_90a",)),
        *long_rows(("cross_entropy_value_and_grad",), ("bf",), ("sm_90a",)),
        *(
            pytest.param(operation, "f4", LONG["ahead"], "sm_80", id=f"{operation}-ahead-sm_80")
            for operation in ("log_softmax", "softmax_backward")
        ),
    ],
)
def test_machine_code_of_long_rows(operation, kind, way, arch):
    check_way(operation, kind, way, arch)


IN_TURN = {arch: MACHINES[arch]._replace(ahead=True) for arch in ("sm_80", "sm_90a")}
TURNS = [
    *(("log_softmax", "f4", n, arch) for n, arch in ((20_000, "sm_80"), (262_144, "sm_90a"))),
    *(("cross_entropy_value_and_grad", "bf", n, "sm_90a") for n in (20_000, 65_536)),
    ("softmax_backward", "f4", 20_000, "sm_90a"),
]
EVERY_TURN = [
    (operation, kind, classes, arch)
    for operation in codegen.OPERATIONS
    if operation not in ONLY_READ and "-lse" not in operation and "nll" not in operation
    for kind in codegen.KINDS
    for classes in (17_000, 20_000, 32_768, 65_536, 128_256, 262_144)
    for arch in IN_TURN
]


@pytest.mark.parametrize(
    "operation, kind, classes, arch",
    [
        *TURNS,
        *(pytest.param(*one, marks=pytest.mark.slow) for one in EVERY_TURN if one not in TURNS),
    ],
)
def test_blocks_that_have_rows_in_turn_are_all_there(operation, kind, classes, arch):
    """They find the registers for as many as the grid counts on: one left over would be late."""
    made, _ = codegen.call(operation, kind, 4096, classes, machine=IN_TURN[arch])
    step = next(s for s in made.steps if "way" in dict(s.spec.params))
    if Way(*dict(step.spec.params)["way"]).kept != "ahead":
        pytest.skip("there is no room for it")
    code = compiler.cubin(step.spec, arch, step.block, step.blocks)
    used = compiler.resources(code)
    assert used.local + used.stack <= (compiler.LITTLE if step.block >= compiler.LARGE else 0), used
    assert compiler.blocks_of(step.block, used.registers) >= step.blocks >= 1
    assert used.shared <= 1 << 10  # beside what is asked for: what the driver keeps


@pytest.mark.slow
@pytest.mark.parametrize(
    "operation, kind, way, arch",
    list(
        long_rows(
            [op for op in codegen.OPERATIONS if "-lse" not in op and "nll" not in op],
            codegen.KINDS,
            ARCHITECTURES,
        )
    ),
)
def test_machine_code_of_every_long_row(operation, kind, way, arch):
    check_way(operation, kind, way, arch)


@pytest.mark.parametrize("kind", ["f4", "bf"])
@pytest.mark.parametrize("classes", [1000, 4096, 10_000])
def test_rows_are_asked_for_before_their_labels_have_come(classes, kind):
    """The logit at a label, whose address waits for that, is asked for after the row."""
    step = case("cross_entropy_value_and_grad", kind, classes).step
    sass = compiler.sass(compiler.cubin(step.spec, "sm_90a", step.block, step.blocks))
    size = r"\.U16" if kind == "bf" else ""
    logit = re.search(rf"LDG\.E{size} ", sass)
    assert logit and logit.start() > sass.index("LDG.E.128")


@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
@pytest.mark.parametrize("kind, classes", [("f4", 128), ("f4", 1024), ("bf", 1000), ("bf", 257)])
def test_labels_come_to_l1_with_the_rows(kind, classes, arch):
    """They are on their way before a row is waited for, and read when it is reduced."""
    step = case("cross_entropy", kind, classes).step
    assert Way(*dict(step.spec.params)["way"]).gathers
    sass = compiler.sass(compiler.cubin(step.spec, arch, step.block, step.blocks))
    used = re.search(r"\b(FMNMX|HMNMX2|STS)\b", sass).start()
    assert sass.index("CCTL.E.PF1") < used < sass.index("BAR.SYNC") < sass.rindex("LDG.E.64")


@pytest.mark.parametrize("kind, classes", [("f4", 50_000), ("bf", 65_536)])
def test_what_only_a_map_reads_comes_to_l2_before(kind, classes):
    """The second input of a long row, while the first one is reduced."""
    step = case("log_softmax_backward", kind, classes).step
    params = dict(step.spec.params)
    assert Way(*params["way"]).kept in SHELVED
    code = compiler.cubin(step.spec, "sm_90a", step.block, step.blocks)
    program = codegen.disassembled(code)
    first = next(span for span in program.spans if span.kind == "loop")
    inside = [i.opcode for i in program.instructions if first.first <= i.address <= first.last]
    vectors = Partition(*params["part"]).vectors
    assert inside.count("CCTL.E.PF2") == vectors <= sum("LDG.E.128" in opcode for opcode in inside)


@pytest.mark.slow
@pytest.mark.parametrize(
    "one, arch",
    named(
        (one, arch) for arch, machine in MACHINES.items() for one in codegen.cases(machine=machine)
    ),
)
def test_machine_code_of_everything(one, arch):
    check(one, arch)


STACK = case("cross_entropy_value_and_grad-smooth", "f4", 20_000)
"""A kernel for which ptxas by itself takes a stack on sm_90a; if not, another is to be found."""


@pytest.mark.parametrize("one, bounds, there", [
    (case("log_softmax", "f4", 1000), 128, "registers"),
    (case("log_softmax", "f4", 65536), 352, "shared"),
    (case("softmax", "f4", 1000), (128, 16), "stack"),
    (STACK, STACK.step.block, "stack"),
])  # fmt: skip
def test_resources_are_those_that_cuobjdump_prints(one, bounds, there):
    code = compiler.compile_kernel(*build(one.step.spec), "sm_90a", bounds)
    printed = compiler._run("cuobjdump", "-res-usage", code=code.code)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", printed)
    used = compiler.resources(code)
    assert used == tuple(map(int, found.groups()))
    assert getattr(used, there) > 0


def test_a_stack_that_need_not_be_is_not():
    spec, threads = STACK.step.spec, STACK.step.block
    alone = compiler.compile_kernel(*build(spec), "sm_90a", threads)
    assert "STL" in compiler.sass(alone)
    kept = compiler.cubin(spec, "sm_90a", threads)
    assert not re.search(r"\b(STL|LDL)\b", compiler.sass(kept))


def test_table():
    """What `python -m numbakern.cuda` prints is a line for each kernel."""
    few = [case("log_softmax", "f4", 1000)]
    lines = codegen.table(few, "sm_90a").splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| log_softmax-f4-1000-whole | 128 |")
