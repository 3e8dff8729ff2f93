"""The performance model of the CUDA kernels: its arithmetic by hand, its reading of real kernels.

What compiles kernels is marked `codegen`; ``-m "codegen and slow"`` pairs every kernel that ships
with its trace, and holds the predicted times to the smooth curve.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
from collections import Counter

import pytest

from numbakern.cuda import codegen, footprint, model, predictions, ways
from numbakern.cuda.device import (
    Kernel,
    constant,
    convert,
    copy_to_shared,
    dynamic_shared,
    load,
    meet,
    repeat,
    store,
    ticket,
    when,
)
from numbakern.cuda.plan import Plan, Spec, Step
from numbakern.cuda.rows import Partition, Way

H100 = model.GPUS["H100"]


def _tools():
    if importlib.util.find_spec("numba_cuda") is None:
        return False
    try:
        from cuda import pathfinder
    except ImportError:
        return False
    found = [pathfinder.find_nvidia_binary_utility(n) for n in ("nvdisasm", "cuobjdump")]
    return None not in found


def compiles(test):
    """Mark a test that compiles kernels and reads them."""
    skip = pytest.mark.skipif(not _tools(), reason="no numba-cuda, nvdisasm or cuobjdump")
    return pytest.mark.codegen(skip(test))


# ---------------------------------------------------------------- reading machine code

# A kernel of an S2R, a loop with a branch in it, a store, as nvdisasm prints them.
SASS = """
        /*0000*/                   S2R R42, SR_TID.X ;              /* 0x00000000002a7919 */
                                                                    /* 0x000e220000002100 */
        /*0010*/               @P0 BRA `(.L_x_0) ;                  /* 0x0000000000000947 */
                                                                    /* 0x000fea0003800000 */
.L_x_1:
        /*0020*/                   IMAD.WIDE.U32 R2, R7, 0x4, R2 ;  /* 0x0000000407027825 */
                                                                    /* 0x004fe200078e0002 */
        /*0030*/              @!P1 BRA P2, `(.L_x_2) ;              /* 0x0000000000001947 */
                                                                    /* 0x000fea0003800000 */
        /*0040*/              @!P0 LDG.E.128 R4, desc[UR6][R2.64] ; /* 0x0000000602048981 */
                                                                    /* 0x000ea2000c1e1d00 */
.L_x_2:
        /*0050*/               @P3 BRA `(.L_x_1) ;                  /* 0x0000000000003947 */
                                                                    /* 0x000fea0003800000 */
.L_x_0:
        /*0060*/                   STG.E.128 desc[UR6][R2.64], R4 ; /* 0x0000000402007986 */
                                                                    /* 0x004fe2000c101d06 */
        /*0070*/                   EXIT ;                           /* 0x000000000000794d */
                                                                    /* 0x000fea0003800000 */
.L_x_3:
        /*0080*/                   BRA `(.L_x_3);                   /* 0xfffffffc00fc7947 */
                                                                    /* 0x000fc0000383ffff */
        /*0090*/                   NOP;                             /* 0x0000000000007918 */
                                                                    /* 0x000fc00000000000 */
"""


def test_instructions_are_read_with_their_scheduling():
    found, _ = codegen.program(SASS)
    assert [i.opcode for i in found] == [
        "S2R", "BRA", "IMAD.WIDE.U32", "BRA", "LDG.E.128", "BRA", "STG.E.128", "EXIT",
    ]  # fmt: skip
    assert [i.address for i in found] == list(range(0, 0x80, 16))
    assert [i.guard for i in found] == ["", "@P0", "", "@!P1", "@!P0", "@P3", "", ""]
    # By hand, from bits 41 on: 0x000e2200… is stall 1, scoreboard 0 set, none waited for;
    # 0x004fe200… stall 1, none set, scoreboard 2 waited for; 0x000ea200… stall 1, scoreboard 2 set.
    s2r, imad, ldg, stg = (found[i] for i in (0, 2, 4, 6))
    assert (s2r.stall, s2r.sets, s2r.waits) == (1, 0, 0)
    assert (imad.stall, imad.sets, imad.waits) == (1, -1, 0b100)
    assert (ldg.stall, ldg.sets, ldg.waits) == (1, 2, 0)
    assert (stg.stall, stg.sets, stg.waits) == (1, -1, 0b100)


def test_a_way_back_may_stand_behind_the_end():
    """Who has done all rounds ends, then the others jump back; what is behind that is no way on."""
    code = SASS.replace("       @P3 BRA", "      @!P3 EXIT").replace("`(.L_x_1)", "").splitlines()
    at = next(n for n, line in enumerate(code) if "/*0060*/" in line)
    code[at] = code[at].replace("STG.E.128 desc[UR6][R2.64], R4", "BRA `(.L_x_1)")
    at = next(n for n, line in enumerate(code) if "/*0070*/" in line)
    code[at] = code[at].replace("EXIT", "NOP ")
    found, spans = codegen.program("\n".join(code))
    assert [i.opcode for i in found][-2:] == ["EXIT", "BRA"]
    assert [(s.first, s.last) for s in spans if s.kind == "loop"] == [(0x20, 0x60)]


def test_loops_and_branches_are_found():
    _, spans = codegen.program(SASS)
    (loop,) = spans  # that over which the first branch jumps is no branch of its own
    assert (loop.first, loop.last, loop.kind) == (0x20, 0x50, "loop")
    (branch,) = loop.parts
    assert (branch.first, branch.last, branch.kind) == (0x40, 0x40, "branch")


def instruction(address, opcode, stall=1, sets=-1, waits=0):
    return codegen.Instruction(address, opcode, "", "", stall, sets, waits)


def scope(kind="kernel", weight=1.0, parts=(), fixed=False, again=""):
    made = footprint.Scope(kind, weight, fixed)
    made.parts, made.again = list(parts), again
    return made


def straight(*opcodes, start=0):
    return tuple(instruction(start + 16 * i, op) for i, op in enumerate(opcodes))


# A loop of 3 instructions between 2 and 1, in it a branch of 7 more.
LOOPED = codegen.Program(
    straight("S2R", "LDC", "LDG.E.128", "FFMA", *["FADD"] * 7, "BRA", "EXIT"),
    (codegen.Span(32, 176, "loop", (codegen.Span(64, 160, "branch", ()),)),),
)


def test_instructions_count_as_often_as_a_warp_meets_them():
    traced = scope(parts=[scope("loop", 10, parts=[scope("branch", 0.25)])])
    cycles = model.busy(model.weighed(LOOPED, traced), H100)
    # 3 outside, 10 × (3 + 7 / 4) inside
    assert cycles["issue"] == pytest.approx(3 + 10 * (3 + 7 / 4))
    assert cycles["fp32"] == pytest.approx(10 * (1 + 7 / 4))
    # 4 for the LDC, 4 × 4 for a load of 16 bytes a lane
    assert cycles["memory"] == pytest.approx(4 + 10 * 16)


def test_float32_takes_twice_as_long_on_an_a100_and_shares_its_pipe():
    program = codegen.Program(straight("FFMA", "FFMA", "IMAD", "DFMA", "EXIT"), ())
    code = model.weighed(program, scope())
    assert model.busy(code, H100) == {"fp32": 2, "mad": 2, "fp64": 2, "branch": 2, "issue": 5}
    assert model.busy(code, model.GPUS["A100"]) == {"fp32": 6, "fp64": 4, "branch": 2, "issue": 5}


def test_a_loop_of_constant_rounds_may_have_been_unrolled():
    parts = [scope("loop", 4, fixed=True), scope("loop", 10, parts=[scope("branch", 1.0)])]
    assert model.busy(model.weighed(LOOPED, scope(parts=parts)), H100)["issue"] == 3 + 10 * 10
    with pytest.raises(ValueError, match="2 loops were traced, the machine code has 1"):
        model.weighed(LOOPED, scope(parts=[scope("loop", 4), scope("loop", 10)]))


def test_of_an_either_one_side_may_be_all_there_is():
    """A long branch by itself is the side for odd rows; a short one is something else."""
    program = codegen.Program(
        straight(*["FADD"] * 200, "EXIT"),
        (codegen.Span(16, 16 * 10, "branch", ()), codegen.Span(16 * 20, 16 * 149, "branch", ())),
    )
    odd = scope("either", parts=[scope("side", 0.75), scope("side", 0.25)])
    cycles = model.busy(model.weighed(program, scope(parts=[odd])), H100)
    assert cycles["issue"] == pytest.approx(201 - 130 + 130 / 4)
    both = codegen.Program(
        straight(*["FADD"] * 200, "EXIT"),
        (codegen.Span(16, 16 * 30, "branch", ()), codegen.Span(16 * 31, 16 * 40, "branch", ())),
    )
    cycles = model.busy(model.weighed(both, scope(parts=[odd])), H100)
    assert cycles["issue"] == pytest.approx(201 - 40 + 30 / 4 + 10 * 3 / 4)


def test_a_jump_over_a_loop_is_no_branch():
    branch = scope("branch", 0.5, parts=[scope("loop", 10, parts=[scope("branch", 0.25)])])
    cycles = model.busy(model.weighed(LOOPED, scope(parts=[branch])), H100)
    assert cycles["issue"] == pytest.approx(3 + 5 * (3 + 7 / 4))


def test_a_loop_may_take_several_rounds_at_once():
    program = codegen.Program(
        straight(*["LDS"] * 8, "BRA", *["LDG.E"] * 4, "BRA", "LDG.E", "BRA", "EXIT"),
        tuple(codegen.Span(16 * a, 16 * b, "loop", ()) for a, b in ((0, 8), (9, 13), (14, 15))),
    )
    twice = codegen.Program(
        straight(*["LDS"] * 8, "BRA", *["LDS"] * 2, "BRA", "LDS", "BRA", "EXIT"),
        tuple(codegen.Span(16 * a, 16 * b, "loop", ()) for a, b in ((0, 8), (9, 11), (12, 13))),
    )
    cycles = model.busy(model.weighed(twice, scope(parts=[scope("loop", 29)])), H100)
    assert cycles["issue"] == 3 * 9 + 2 * 3 + 1 * 2 + 1  # 29 = 3 × 8 + 2 × 2 + 1
    parts = [scope("loop", 5), scope("loop", 11)]
    cycles = model.busy(model.weighed(program, scope(parts=parts)), H100)
    assert cycles["issue"] == 5 * 9 + 2 * 5 + 3 * 2 + 1  # 11 = 2 × 4 + 3
    with pytest.raises(ValueError, match="1 loops were traced, the machine code has 3"):
        model.weighed(program, scope(parts=[scope("loop", 11)]))


def test_a_warp_alone_waits_for_its_scoreboards():
    latency = H100.latency * H100.clock
    program = codegen.Program(
        (
            instruction(0, "LDG.E.128", stall=2, sets=0),
            instruction(16, "LDG.E.128", stall=2, sets=1),
            instruction(32, "FADD", stall=4, waits=0b01),
            instruction(48, "FADD", stall=5, waits=0b10),
            instruction(64, "EXIT", stall=1),
        ),
        (),
    )
    found = model.alone(model.weighed(program, scope()), H100)
    # The first result is there at `latency`, the second one at 2 + `latency`: waited for no more.
    assert found.cycles == pytest.approx(latency + 4 + 5 + 1)
    assert found.in_flight == 2 * 32 * 16


def test_rounds_of_a_loop_wait_one_after_the_other():
    latency = H100.latency * H100.clock
    program = codegen.Program(
        (
            instruction(0, "LDG.E", stall=2, sets=0),
            instruction(16, "FADD", stall=4, waits=1),
            instruction(32, "EXIT"),
        ),
        (codegen.Span(0, 16, "loop", ()),),
    )
    found = model.alone(model.weighed(program, scope(parts=[scope("loop", 7)])), H100)
    assert found.cycles == pytest.approx(7 * (latency + 4) + 1)
    again = scope(parts=[scope("loop", 7, again="l2")])
    found = model.alone(model.weighed(program, again), H100)
    assert found.cycles == pytest.approx(7 * (H100.l2_latency * H100.clock + 4) + 1)


def test_a_warp_waits_for_its_groups_of_copies():
    """All but the last ones; each is there when the last copy is that was asked for before."""
    latency = H100.latency * H100.clock
    copy, group = ("LDGSTS.E.BYPASS.128", -1), ("LDGDEPBAR", 0)
    for groups, waited in ((0, 2), (1, 1), (2, 0)):
        program = codegen.Program(
            tuple(
                instruction(16 * i, opcode, stall=2, sets=sets)._replace(operands=operands)
                for i, (opcode, sets, operands) in enumerate(
                    [(*copy, ""), (*group, ""), (*copy, ""), (*copy, ""), (*group, "")]
                    + [("DEPBAR.LE", -1, f"SB0, 0x{groups}"), ("EXIT", -1, "")]
                )
            ),
            (),
        )
        found = model.alone(model.weighed(program, scope()), H100)
        before = {2: 6 + latency, 1: latency, 0: 10}[waited]
        assert found.cycles == pytest.approx(before + 4)
        assert (found.in_flight, found.copied) == (0, 3 * 32 * 16)


def test_a_warp_waits_for_l2_where_blocks_meet():
    """A ticket's way there and back, what was written on its way there, a look at the counter."""
    there_and_back = H100.l2_latency * H100.clock
    opcodes = {"ATOMG.E.ADD.STRONG.GPU": 0, "IADD3": -1, "MEMBAR.ALL.GPU": -1, "REDG.E.ADD": -1}
    program = codegen.Program(
        tuple(
            instruction(16 * i, opcode, sets=sets, waits=opcode == "IADD3")
            for i, (opcode, sets) in enumerate(opcodes.items())
        ),
        (),
    )
    found = model.alone(model.weighed(program, scope()), H100)
    assert found.cycles == pytest.approx(2 * there_and_back + 3)


# ---------------------------------------------------------------- what a kernel touches


def traced(monkeypatch, body, grid=4, block=64):
    """The Scope of a kernel of one array `a` of float32, a block a piece of it."""
    kernel = Kernel("test", body, {"a": "i8", "out": "i8", "labels": "i8", "count": "i8"})
    monkeypatch.setattr(footprint, "kernel_of", lambda spec: kernel)
    spec = Spec("test", (("of", repr(body)),))
    plan = Plan((), (), {"count": 5})
    return footprint.footprint(Step(spec, grid, block, 0, 1, ()), plan, {})


def at(frame, name):
    thread = frame.block * 64 + convert(frame.thread, "i8")
    return getattr(frame, name) + (thread << 2)


def test_sectors_are_counted_once_and_by_block(monkeypatch):
    def body(frame):
        (word,) = load(at(frame, "a"), 4, 1)
        load(at(frame, "a"), 4, 1)  # nothing comes of it
        (other,) = load(at(frame, "a") + 4, 4, 1)
        store(at(frame, "out"), 4, [word + other], frame.thread < 8)

    found = traced(monkeypatch, body)
    assert found.read == {"a": 64 * 4 + 32}
    assert found.written == {"out": 32}


def test_loads_that_nothing_comes_of_are_not_counted(monkeypatch):
    def body(frame):
        (word,) = load(at(frame, "a"), 4, 1)
        _ = word + 1
        store(at(frame, "out"), 4, [constant(word, 0, "i4")])

    assert traced(monkeypatch, body).read == {"a": 0}


def test_lines_are_looked_up_one_by_one(monkeypatch):
    def body(frame):
        place = frame.a + (convert(frame.thread, "i8") << 7)
        (word,) = load(place, 4, 1)
        (other,) = load(place, 4, 1, frame.thread < 9)
        load(place, 4, 1)  # nothing comes of it
        store(at(frame, "out"), 4, [word + other])

    # Each of two warps: 32 lines; 9 lines of the first one; one line written.
    assert traced(monkeypatch, body).looked_up == {"a": 2 * 32 + 9, "out": 2}


def test_rounds_and_shares_of_warps(monkeypatch):
    def body(frame):
        def once(i, total):
            (word,) = load(at(frame, "a") + i * 1024, 4, 1)
            first = (frame.thread == 0) & (i == 0)
            (word,) = when(first, lambda: [load(at(frame, "a") + 512, 4, 1)[0]], [word])
            return (total + word,)

        (total,) = repeat(frame.count, once, constant(frame.thread, 0, "i4"))
        store(at(frame, "out"), 4, [total])

    (loop,) = traced(monkeypatch, body).parts
    assert (loop.kind, loop.weight, loop.read) == ("loop", 5, {"a": 256})
    (branch,) = loop.parts
    # one of two warps in the first of five rounds, 32 bytes in that round
    assert branch.weight == pytest.approx(0.5 / 5)
    assert branch.read == {"a": pytest.approx(32 / 5)}


def test_a_loop_in_a_branch_is_kept(monkeypatch):
    def body(frame):
        def inside():
            def once(i):
                store(at(frame, "out"), 4, [frame.thread])
                return ()

            repeat(frame.count, once)
            return []

        when(frame.thread < 32, inside, [])

    (branch,) = traced(monkeypatch, body).parts
    (loop,) = branch.parts
    assert (branch.weight, loop.weight, loop.written) == (0.5, 5, {"out": 32 * 4})


def test_what_was_read_before_is_known(monkeypatch):
    def body(frame):
        (word,) = load(at(frame, "a"), 4, 1)
        same = frame.thread < 3
        (word,) = when(same, lambda: [load(at(frame, "a"), 4, 1)[0]], [word])

        def again(i, total):
            return (total + load(at(frame, "a") + (i << 8), 4, 1)[0],)

        (word,) = repeat(frame.count, again, word)
        (word,) = repeat(frame.count, again, word)
        store(at(frame, "out"), 4, [word])

    branch, first, second = traced(monkeypatch, body).parts
    assert (branch.again, first.again, second.again) == ("l1", "", "l2")


def test_of_a_loop_over_rows_each_reads_its_own(monkeypatch):
    """Copies are read; only what a row itself has read before is there yet."""

    def body(frame):
        place = at(frame, "a")

        def copy(i):
            copy_to_shared(dynamic_shared(frame.thread), place - (place & 15) + (i << 10))
            return ()

        def turn(i, total):
            def again(j, total):
                return (total + load(place + (i << 10) + (j << 8), 4, 1)[0],)

            (total,) = repeat(frame.count, again, total)
            return repeat(frame.count, again, total)

        repeat(frame.count, copy)
        (word,) = repeat(frame.count, turn, constant(frame.thread, 0, "i4"))
        store(at(frame, "out"), 4, [word])

    begun, turns = traced(monkeypatch, body).parts
    assert (begun.read, begun.again) == ({"a": 256}, "")
    assert [part.again for part in (turns, *turns.parts)] == ["", "", "l2"]


def test_blocks_know_their_row_by_their_tickets(monkeypatch):
    """Tickets are taken in the order of blocks; what the launch writes is read from L2."""

    def body(frame):
        number = ticket(frame.out, frame.thread)
        place = (number << 8) + (convert(frame.thread, "i8") << 2)
        (word,) = load(frame.a + place, 4, 1)
        store(frame.out + place, 4, [word])
        meet(frame.out, frame.count, frame.thread)

        def again(i, total):
            return (total + load(frame.out + place + (i << 2), 4, 1)[0],)

        (word,) = repeat(frame.count, again, word)
        store(frame.labels + place, 4, [word])

    found = traced(monkeypatch, body)
    assert found.read["a"] == found.written["labels"] == 256
    asked, last = found.parts
    assert (asked.kind, asked.weight, asked.again) == ("loop", footprint.POLLS, "l2")
    assert asked.read == {"out": footprint.SECTOR}
    assert (last.weight, last.again) == (5, "l2")


def _bytes(plan, layouts, what):
    """Bytes that each array's sectors take over the whole grids of a plan."""
    sums: Counter[str] = Counter()
    for step in plan.steps:
        total = footprint.footprint(step, plan, layouts).total(what)
        sums.update({name: step.grid * size for name, size in total.items()})
    return sums


@pytest.mark.parametrize("kind", codegen.KINDS)
@pytest.mark.parametrize("layout", ["whole", "shifted", "columns"])
@pytest.mark.parametrize("operation", ["log_softmax", "softmax_backward"])
def test_a_row_is_read_and_written_as_its_length_says(operation, layout, kind):
    rows = 2**18  # so many that rows side by side are a thread each
    counts = 32, 1024, 8192 + 64 * (layout == "whole"), 100_000
    for classes, machine in itertools.product(counts, (ways.MACHINE, codegen.CHOSEN)):
        plan, layouts = codegen.call(operation, kind, rows, classes, layout, machine)
        array = rows * classes * codegen.size_of(kind)
        params = dict(plan.steps[-1].spec.params)
        read, written = (_bytes(plan, layouts, what) for what in ("read", "written"))
        # What lies at a row's two ends, or at those of its chunks, is in two sectors.
        slack = 0.03 * array + rows * 4 * footprint.SECTOR
        least = array * (1 - 1e-12)  # rounds of a loop are added up by their shares
        assert least <= written["out"] <= array + slack
        part = Partition(*params["part"])
        held = params["walker"] == "rows" and not part.chunks
        again = 0.0 if held else 1.0
        if params["walker"] == "rows" and Way(*params["way"]).kept in ("shared", "partly"):
            n = plan.constants  # the parts of the last round are in registers
            held = n["parts"] - n["rounds"] * Way(*params["way"]).warps
            again = 1 - min(1, (n.get("shelved", classes) + held) * part.span / classes)
        for name in ("x", "y") if operation == "softmax_backward" else ("x",):
            times = 1 + again if params["walker"] == "rows" else round(read[name] / array)
            assert 1 <= times <= 3
            assert times * least <= read[name] <= times * (array + slack)


# ---------------------------------------------------------------- the bounds, by hand


def used(registers=32, shared=0):
    from numbakern.cuda.compile import Resources

    return Resources(registers, 0, shared, 0)


@pytest.mark.parametrize(
    "block, registers, shared, blocks",
    [
        (128, 32, 0, 16),  # 2048 threads
        (128, 90, 0, 5),  # 96 registers a thread: 21 warps of 3072
        (512, 64, 0, 2),  # 32 warps of 2048
        (512, 65, 0, 1),  # 28 warps
        (32, 16, 0, 32),  # 32 blocks at most
        (512, 32, 100 << 10, 2),  # 101 KB of 228
        (1024, 64, 227 << 10, 1),
        (512, 255, 0, 0),  # 8 warps of 8192 are all there are
    ],
)
def test_blocks_that_a_multiprocessor_holds(block, registers, shared, blocks):
    step = Step(Spec("test", ()), 1, block, shared, 1, ())
    assert model.resident(step, used(registers), H100) == blocks


LOAD = instruction(0, "LDG.E.128", sets=0)
GPU = H100._replace(
    multiprocessors=10, clock=1e9, copy=4e11, read=5e11, l2=1 << 20, l2_rate=2e12, latency=1e-6,
    l2_latency=2e-7, launch=0.0,
)  # fmt: skip


def by_hand(
    monkeypatch,
    opcodes,
    grid,
    read,
    written=0.0,
    registers=32,
    block=128,
    array=math.inf,
    lookups=0,
):
    """The Bounds of a kernel of these instructions, whose blocks touch so many bytes."""
    made = scope()
    made.read, made.written, made.looked_up = {"x": read}, {"out": written}, {"x": lookups}
    code = [one if isinstance(one, codegen.Instruction) else instruction(0, one) for one in opcodes]
    placed = (one._replace(address=16 * i) for i, one in enumerate([*code, instruction(0, "EXIT")]))
    program = codegen.Program(tuple(placed), ())
    monkeypatch.setattr(model, "_compiled", lambda *_: (program, used(registers)))
    monkeypatch.setattr(model, "footprint", lambda *_: made)
    step = Step(Spec("test", ()), grid, block, 0, 1, ())
    return model.bounds(step, Plan((step,), (), {}), {}, {"x": array, "out": array}, GPU, 1e6)


def norm(*bounds):
    """Of the fourth order: what does not overlap perfectly."""
    return math.sqrt(math.sqrt(sum(v * v * v * v for v in bounds)))


def test_bytes_bound_the_time(monkeypatch):
    b = by_hand(monkeypatch, ["FADD"], 1600, read=1e6, written=1e6)
    # 16 blocks of 128 threads on each of 10: 10 waves, 3.2 GB at 0.4 TB/s
    assert (b.resident, b.waves, b.bound) == (16, 10.0, "dram")
    assert b.seconds == pytest.approx(norm(3.2e9 / 4e11, b.issue, b.pipe, b.latency))
    assert b.seconds == pytest.approx(3.2e9 / 4e11, rel=1e-3)
    # L2 gives 64 bytes a cycle to each of the 10.
    assert b.l2 == pytest.approx(3.2e9 / (10 * 64e9))
    # What is only read comes faster.
    assert by_hand(monkeypatch, ["FADD"], 1600, read=1e6).dram == pytest.approx(1.6e9 / 5e11)


def test_instructions_bound_the_time(monkeypatch):
    b = by_hand(monkeypatch, ["FADD"] * 9999, 1600, read=64.0)
    # 160 blocks of 4 warps a multiprocessor, each of 10000 slots, 4 issued a cycle
    assert b.issue == pytest.approx(160 * 10000 * 1e-9)
    assert b.bound == "issue"
    b = by_hand(monkeypatch, ["F2F.F64.F32"] * 9999, 1600, read=64.0)
    assert (b.bound, b.pipe) == ("convert", pytest.approx(160 * 9999 * 8 * 1e-9))
    # The same, an eighth of it in slots, and as long one block after the other.
    assert b.seconds == pytest.approx(norm(b.pipe, b.issue, b.latency, b.dram))


def test_bounds_that_are_near_take_longer_than_each(monkeypatch):
    # 3.2 GB at 0.4 TB/s and 160 blocks of 50000 slots a multiprocessor, both 8 ms
    b = by_hand(monkeypatch, ["FADD"] * 49999, 1600, read=1e6, written=1e6)
    assert (b.dram, b.issue) == (pytest.approx(8e-3), pytest.approx(8e-3))
    assert b.seconds == pytest.approx(norm(8e-3, 8e-3, b.pipe, b.latency))
    assert b.seconds > 1.18 * b.dram
    # L2 is on the way to DRAM: it adds nothing until it is what takes longest.
    slow = {"dram": 1.0, "l2": 0.99, "issue": 0.5}
    assert model.together(slow) == pytest.approx(norm(1.0, 0.5))
    assert model.together(slow | {"l2": 2.0}) == 2.0


def test_a_cluster_waits_for_all_of_its_blocks(monkeypatch):
    alone = by_hand(monkeypatch, ["FADD"] * 99, 1600, read=64.0)
    step = Step(Spec("test", ()), 1600, 128, 0, 4, ())
    clustered = model.bounds(step, Plan((step,), (), {}), {}, {}, GPU, 1e6)
    assert clustered.latency == pytest.approx(2 * alone.latency)


def test_lookups_bound_the_time(monkeypatch):
    b = by_hand(monkeypatch, ["FADD"], 1600, read=64.0, lookups=5000)
    # 160 blocks a multiprocessor, which looks a line up a cycle
    assert (b.bound, b.pipe) == ("lookup", pytest.approx(160 * 5000 * 1e-9))


def test_the_latency_bounds_few_blocks_and_a_tail(monkeypatch):
    one = by_hand(monkeypatch, ["FADD"], 1, read=64.0)
    assert one.seconds == pytest.approx(1e-6, rel=0.01)
    # 161 blocks: one wave of 160, and one more block that takes as long
    two = by_hand(monkeypatch, ["FADD"], 161, read=64.0)
    assert two.seconds == pytest.approx(2 * one.seconds, rel=0.01)
    assert two.bound == "latency"


def test_a_second_read_goes_to_dram_as_far_as_l2_does_not_hold_it(monkeypatch):
    # 160 rows of 16 KiB at once, each read twice, half of 1 MiB for them: one in five is there
    row = 1 << 14
    b = by_hand(monkeypatch, ["FADD"], 1600, read=2 * row, array=1600 * row)
    assert b.again == 1600 * row
    assert b.hit == pytest.approx((1 << 19) / (160 * row))
    assert b.bytes == pytest.approx(1600 * row * (2 - b.hit))
    # With 16 blocks at once all of it is.
    assert by_hand(monkeypatch, ["FADD"], 16, read=2 * row, array=16 * row).hit == 1.0


def test_blocks_of_a_row_wait_for_the_last_of_them(monkeypatch):
    """Of 160 at once, 40 have a row: a quarter of their time until the last one has started."""
    alone = by_hand(monkeypatch, ["FADD"], 1600, read=64.0)
    plan = Plan((), (), {"blocks": 40})
    step = Step(Spec("test", ()), 1600, 128, 0, 1, ())
    made = scope()
    made.read = {"x": 64.0, "meetings": 0.0}
    monkeypatch.setattr(model, "footprint", lambda *_: made)
    together = model.bounds(step, plan, {}, {}, GPU, 1e6)
    assert together.latency == pytest.approx(1.25 * alone.latency)
    # Those that start all at once wait for none.
    few = model.bounds(step._replace(grid=160), plan, {}, {}, GPU, 1e6)
    assert few.latency == pytest.approx(alone.latency / 10)


def test_loads_in_flight_against_littles_law(monkeypatch):
    b = by_hand(monkeypatch, ["FADD"], 160, read=1e6, written=1e6)
    assert b.needed == pytest.approx(4e11 / 10 * 1e-6)
    assert b.in_flight == b.flight == 0
    # A load of 16 bytes a lane, 16 blocks of 4 warps: 32 KiB of the 40 KB that it takes
    b = by_hand(monkeypatch, [LOAD], 160, read=1e6, written=1e6)
    assert b.in_flight == 16 * 4 * 32 * 16
    assert b.flight == pytest.approx(b.dram * 4e4 / b.in_flight)


def test_loads_in_flight_find_room_in_l1(monkeypatch):
    """One block with 200 KiB of 228: 228 are taken, 28 of 256 are left to L1."""
    by_hand(monkeypatch, [LOAD] * 8, 10, read=1e6)
    step = Step(Spec("test", ()), 10, 1024, 200 << 10, 1, ())
    b = model.bounds(step, Plan((step,), (), {}), {}, {}, GPU, 1e6)
    assert (b.resident, b.in_flight) == (1, 28 << 10)  # not the 128 KiB that it asks for
    assert model.l1_beside(step._replace(shared=99 << 10), used(32), GPU) == (256 - 228) << 10
    assert model.l1_beside(step._replace(shared=0, block=128), used(128), GPU) == (256 - 8) << 10


# ---------------------------------------------------------------- thresholds, the smooth curve


@pytest.mark.parametrize("kind", ["f4", "bf"])
@pytest.mark.parametrize("operation", ["log_softmax", "cross_entropy_value_and_grad"])
def test_how_a_row_is_divided_does_not_depend_on_the_batch(operation, kind):
    def part(rows, classes):
        plan, _ = codegen.call(operation, kind, rows, classes)
        params = [dict(step.spec.params) for step in plan.steps]
        (found,) = {p["part"] for p in params if "part" in p}
        return found

    counts = predictions.swept_classes(operation, kind)
    few, many = ([part(rows, n) for n in counts] for rows in (3, 10**6))
    assert few == many
    assert len(set(few)) > 8


@pytest.mark.parametrize("step", [2, 8])
def test_every_change_of_kernel_is_a_threshold(step):
    """Against a search of every odd number, or every multiple of 8, up to 5000."""

    def spec(classes):
        plan, _ = codegen.call("log_softmax", "bf", 64, classes, "shifted")
        return plan.steps[0].spec, plan.steps[0].block

    numbers = range(1 if step == 2 else step, 5001, step)
    changes = [n for m, n in itertools.pairwise(numbers) if spec(m) != spec(n)]
    found = predictions.thresholds("log_softmax", "bf", step, 64)
    assert [n for n in found if n <= 5000] == changes


def _sweep(monkeypatch, shares):
    """The Points of a sweep whose predictions have these shares by (classes, layout)."""

    def predict(gpu, operation, kind, rows, classes, layout):
        least = 2 * rows * classes * codegen.size_of(kind) / gpu.copy
        share = shares[classes, layout]
        step, _ = predict_one
        return model.Prediction(least / share, share, ((step, predict_one[1]),))

    step = codegen.case("log_softmax", "f4", 8).step
    fields = dict.fromkeys(model.Bounds._fields, 1.0) | {"busiest": "int"}
    predict_one = step, model.Bounds(**fields)
    monkeypatch.setattr(predictions, "predict", predict)
    counts = sorted({classes for classes, _ in shares})
    return predictions.sweep("log_softmax", "f4", H100, counts)


def test_the_table_of_thresholds():
    """Ranges that follow one another up to 262144, who and where; a lane has 128 bytes at most."""
    header, _, *lines = (line.strip("|").split("|") for line in
                         predictions.ways_table(H100).splitlines())  # fmt: skip
    table = [[cell.strip() for cell in line] for line in lines]
    for at, size in ((3, 4), (4, 2), (5, 8)):
        assert header[at].strip() == {4: "float32", 2: "bfloat16", 8: "float64"}[size]
        for call in ("log_softmax", "cross_entropy"):
            of_call = [line for line in table if line[0] == call]
            ranges = [
                (*map(int, span.split(" … ")), line[1:3])
                for line in of_call
                for span in line[at].split(", ")
                if span
            ]
            ranges.sort()
            assert ranges[0][0] == 16 // size and ranges[-1][1] == 2**18
            assert all(b[0] - a[1] == 16 // size for a, b in itertools.pairwise(ranges))
            who = [(*line, end) for _, end, line in ranges]
            assert ("a warp", "registers", 32 * 128 // size) in who
            if call == "cross_entropy":
                most = 256 if size == 2 else 512  # lanes of a row that is held
                assert ("a warp", "read once, in rounds", most * 128 // size) in who
    assert [line[1:3] for line in table if line[0] == "log_softmax"][-3:] == [
        ["a block", "registers and shared memory"],
        ["a cluster of blocks", "registers and shared memory"],
        ["a block", "registers and shared memory, the rest read again"],
    ]


def test_ways_that_are_chosen_are_told(monkeypatch):
    monkeypatch.setenv(ways.SETTING, "together, ahead")
    where = "shared memory, the next rows on their way"
    for classes, who in ((20_000, "a block"), (65_536, "a cluster of blocks")):
        assert predictions.way_of("log_softmax", "f4", classes, H100) == (who, where)
    # One that a block does not hold, on a device without clusters.
    a100 = model.GPUS["A100"]
    assert predictions.way_of("log_softmax", "f4", 20_000, a100) == ("a block", where)
    found = predictions.way_of("log_softmax", "f4", 128_256, a100)
    assert found == ("blocks that meet", "registers")


def test_the_smooth_curve_never_rises(monkeypatch):
    shares = {(8, "whole"): 0.5, (8, "shifted"): 0.4, (9, "whole"): 1.0, (9, "shifted"): 0.8}
    shares |= {(16, "whole"): 0.95, (16, "shifted"): 0.5}
    points = _sweep(monkeypatch, shares)
    excess = {(p.classes, p.layout): p.excess for p in points}
    assert excess[8, "whole"] == pytest.approx(0)
    assert excess[8, "shifted"] == pytest.approx(0.25)
    assert excess[9, "shifted"] == pytest.approx(0.25)
    assert excess[16, "whole"] == pytest.approx(1 / 0.95 - 1)
    assert excess[16, "shifted"] == pytest.approx(1.0)
    lines = predictions.cliffs(points).splitlines()[2:]
    assert len(lines) == 1 and lines[0].startswith("| 8 … 16 (3) | whole | +100% at 16 | 2.00 |")


def test_the_picture_is_drawn(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    shares = {(n, layout): 1.0 for n in (2, 64, 1024) for layout in ("whole", "shifted")}
    points = _sweep(monkeypatch, shares)
    predictions.draw({("log_softmax", "f4"): points}, tmp_path / "cliffs")
    for mode in ("light", "dark"):
        assert "<svg" in (tmp_path / f"cliffs-{mode}.svg").read_text()


# ---------------------------------------------------------------- real kernels


@compiles
@pytest.mark.parametrize("classes, loops", [(1024, False), (65536, True)])
def test_slots_are_those_of_the_listing(classes, loops):
    """Counted here line by line, without the parser."""
    case = codegen.case("log_softmax", "f4", classes)
    text = codegen.compiler.sass(
        codegen.compiler.cubin(case.step.spec, "sm_90a", case.step.block, case.step.blocks)
    ).splitlines()
    rows = [re.match(r"\s+/\*([0-9a-f]{4})\*/\s+(.*?);", line) for line in text]
    listed = [(int(m.group(1), 16), m.group(2)) for m in rows if m]
    end = max(a for a, code in listed if code.strip() == "EXIT")
    listed = [(a, code) for a, code in listed if a <= end and not code.startswith("NOP")]
    plan, layouts = codegen.call("log_softmax", "f4", codegen.ROWS, classes)
    program, _ = model._compiled(case.step.spec, "sm_90a", case.step.block, case.step.blocks)
    traced = footprint.footprint(case.step, plan, layouts)
    times: dict[int, float] = {}

    def add(part, outside):
        for item in part.items:
            if isinstance(item, model.Part):
                add(item, outside * item.weight)
            else:
                times[item.address] = times.get(item.address, 0.0) + outside

    weighed = model.weighed(program, traced)
    add(weighed, 1.0)
    assert sorted(times) == [a for a, _ in listed]
    assert model.busy(weighed, H100)["issue"] == pytest.approx(sum(times.values()))
    assert (max(times.values()) > 1) == loops
    # The loads of a row's elements are in a loop over its chunks, of which each has 16 KB or more.
    rounds = max(t for a, t in times.items() if "LDG.E.128" in dict(listed)[a])
    assert 1 <= rounds <= classes * 4 / (16 << 10) if loops else rounds == 1


@compiles
@pytest.mark.parametrize(
    "operation, kind, classes",
    [("log_softmax", "f4", 1024), ("log_softmax", "bf", 65536), ("softmax_backward", "f2", 1024)],
)
def test_the_trace_moves_what_the_machine_code_moves(operation, kind, classes):
    """Bytes by the widths and numbers of the accesses; in a long row some lanes may be idle."""
    case = codegen.case(operation, kind, classes)
    plan, layouts = codegen.call(operation, kind, codegen.ROWS, classes)
    program, _ = model._compiled(case.step.spec, "sm_90a", case.step.block, case.step.blocks)
    traced = footprint.footprint(case.step, plan, layouts)
    moved = {"LDG": 0.0, "STG": 0.0}

    def add(part, times):
        for item in part.items:
            if isinstance(item, model.Part):
                add(item, times * item.weight)
            elif item.name in moved:
                moved[item.name] += times * case.step.block * 4 * model.transfers(item)

    add(model.weighed(program, traced), 1.0)
    for name, what in (("LDG", "read"), ("STG", "written")):
        touched = sum(traced.total(what).values())
        assert touched <= moved[name] * 1.0001
        assert moved[name] <= touched * (1.2 if classes == 65536 else 1.0001)


@compiles
def test_more_rows_take_longer_and_a_faster_gpu_less():
    times = [
        model.predict(H100, "log_softmax", "f4", rows, 1024).seconds
        for rows in (1, 100, 1000, 10**4, 10**5, 10**6)
    ]
    assert times == sorted(times) and times[-1] > 5 * times[-2]
    h200 = model.predict(model.GPUS["H200"], "log_softmax", "f4", 10**6, 1024)
    assert h200.seconds < times[-1]
    longer = [
        model.predict(H100, "log_softmax", "f4", 1024, classes).seconds
        for classes in (65536, 131072, 262144)
    ]
    assert longer == sorted(longer)


@compiles
@pytest.mark.parametrize("operation, kind", [("log_softmax", "f4"), ("log_softmax", "bf")])
def test_blocks_that_meet_read_long_rows_once(operation, kind, monkeypatch, gpu="A100"):
    """At the copy rate, where a block that reads them twice gets past L2: as clusters do."""
    assert model.predict(H100, operation, kind, 2**10, 2**18).main[0].cluster > 1
    rows, classes = 2**10, 2**18
    found = {}
    for setting in "", "together":
        monkeypatch.setenv(ways.SETTING, setting)
        found[setting] = model.predict(model.GPUS[gpu], operation, kind, rows, classes)
    (clear, _), (step, b) = found["together"].steps
    assert clear.spec.kernel == "clear" and step.grid == rows * (32 if kind == "f4" else 16)
    once = 2 * rows * classes * codegen.size_of(kind)
    assert once < b.bytes < 1.02 * once
    assert found[""].main[1].bytes > 1.05 * once
    assert found["together"].share >= max(0.95, found[""].share + 0.04)


@compiles
@pytest.mark.parametrize("gpu", ["A100", "H100", "B200"])
@pytest.mark.parametrize("operation, kind", [("log_softmax", "f4"), ("softmax_backward", "bf")])
def test_rows_in_turn_are_read_once_by_blocks_that_are_all_there(operation, kind, gpu, monkeypatch):
    rows, classes = 5000, 32_768 if gpu != "A100" else 20_000
    by_default = model.predict(model.GPUS[gpu], operation, kind, rows, classes)
    monkeypatch.setenv(ways.SETTING, "ahead")
    found = model.predict(model.GPUS[gpu], operation, kind, rows, classes)
    ((step, b),) = found.steps
    assert Way(*dict(step.spec.params)["way"]).kept == "ahead"
    assert 0.9 < b.waves <= 1 and b.in_flight >= b.needed
    once = model.STREAMS[operation] * rows * classes * codegen.size_of(kind)
    assert b.bytes == pytest.approx(once, rel=0.02)
    assert by_default.main[0].grid > step.grid


@compiles
def test_a_call_is_the_sum_of_its_steps():
    found = model.predict(H100, "cross_entropy_value_and_grad", "f4", 20_000, 1024)
    assert [s.spec.kernel for s, _ in found.steps] == [
        "count", "total", "cross_entropy", "total", "total",
    ]  # fmt: skip
    found = model.predict(H100, "cross_entropy", "f4", 4096, 32)
    assert [s.spec.kernel for s, _ in found.steps] == ["cross_entropy", "total"]
    found = model.predict(H100, "cross_entropy_value_and_grad", "f4", 4096, 1024)
    assert found.seconds == pytest.approx(sum(b.seconds for _, b in found.steps))
    assert found.main[0].spec.kernel == "cross_entropy"
    least = 2 * 4096 * 1024 * 4 / H100.copy
    assert found.share == pytest.approx(least / found.seconds)


@compiles
def test_the_command_prints_a_line_a_call(capsys):
    from numbakern.cuda.__main__ import main

    main(["model", "--call", "log_softmax", "--dtype", "float32", "--classes", "1024"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "H100, predicted"
    assert lines[4].startswith("| log_softmax | (262144, 1024) float32 | 8.0 |")
    assert len(lines) == 6


@pytest.mark.parametrize(
    "words, message",
    [
        (["model", "--classes", "0"], "argument --classes: expected 1 or more, got 0"),
        (["model", "--device", "X1"], "argument --device: invalid choice: 'X1'"),
        (["model", "--call", "tan"], "argument --call: invalid choice: 'tan'"),
        (["sm_xx"], "argument ARCH: expected one such as sm_90a, got 'sm_xx'"),
        (["code", "sm_9"], "argument ARCH: expected one such as sm_90a, got 'sm_9'"),
    ],
)
def test_a_wrong_command_is_one_line(words, message, capsys):
    from numbakern.cuda.__main__ import main

    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_what_is_missing_is_one_line(monkeypatch):
    from numbakern.cuda import __main__

    def missing(*_):
        raise RuntimeError("nvdisasm is not installed")

    monkeypatch.setattr(predictions, "predict", missing)
    with pytest.raises(SystemExit, match="^error: nvdisasm is not installed$"):
        __main__.main(["model"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="^error: NUMB.*got both$"):
        patch.setenv(ways.SETTING, "both")
        __main__.main(["model"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    for words in (["cliffs", "--plot", "absent/cliffs"], ["document", "absent/file.md"]):
        with pytest.raises(SystemExit, match="^error: no such folder: absent$"):
            __main__.main(words)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="^error: matplotlib is not installed"):
        __main__.main(["cliffs", "--plot", "cliffs"])


def test_a_document_without_marks_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "page.md"
    file.write_text("no marks")
    monkeypatch.setattr(predictions, "sweep", lambda *_: [])
    monkeypatch.setattr(predictions, "table", lambda *_: "")
    monkeypatch.setattr(predictions, "overview", lambda *_: "")
    with pytest.raises(SystemExit, match="expected one part between"):
        predictions.document(file)


@compiles
def test_the_benchmarks_table_has_predictions_beside_measurements(monkeypatch):
    from benchmarks import bounds, predicted, report

    cases = [
        bounds.cuda_bound("log_softmax", 1024, "float32"),
        bounds.cuda_bound("cross_entropy", 1024, "float32"),
    ]
    rows = [report.Row(case, 1e-3, 2000.0, {"numbakern": 1.11}) for case in cases]
    monkeypatch.setattr(bounds, "CUDA", tuple(cases))
    assert "model" not in report.text_table(rows)  # no GPU here that it knows
    monkeypatch.setattr(predicted, "gpu_here", lambda: "H100")
    header, _, first, second = report.text_table(rows).splitlines()
    at = header.split().index("model") - len(header.split())
    found = model.predict(H100, "log_softmax", "f4", 2**18, 1024)
    assert float(first.split()[at]) == pytest.approx(1 / found.share, rel=0.01)
    found = model.predict(H100, "cross_entropy", "f4", 2**18, 1024)
    assert float(second.split()[at]) == pytest.approx(0.5 / found.share, rel=0.01)


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("gpu", ["A100", "H100", "B200"])
@pytest.mark.parametrize("operation", codegen.OPERATIONS)
def test_every_kernel_pairs_with_its_trace(operation, gpu):
    for case in codegen.cases([operation]):
        rows = 2**20 // case.classes + 1
        of = operation, case.kind, rows, case.classes, case.layout
        found = model.predict(model.GPUS[gpu], *of)
        assert found.seconds > 0 and found.share < 1.1, case.name


# The numbers of classes at which predicted times are further above the smooth curve than they
# should be, and how far at most. A range that has become smooth is to be taken out.
STARTS = "rows of an array that starts anywhere do not pass through shared memory"
LATE = "halves come one by one, or a row's last group of 16 bytes from each of two lines"
WAVES = "the last wave of so many blocks fills little of the machine"
ALONE = "few blocks are beside one another, or those of a cluster wait for each other"
CLIFFS = (
    ("log_softmax", "f4", "shifted", 10, 64, 2.15, STARTS),
    ("log_softmax", "f4", "single", 9, 63, 2.15, STARTS),
    ("log_softmax", "f4", "shifted", 66, 128, 0.25, STARTS),
    ("log_softmax", "f4", "single", 65, 127, 0.15, STARTS),
    ("log_softmax", "f4", "shifted", 147456, 262144, 0.15, ALONE),
    ("log_softmax", "f4", "single", 147457, 262143, 0.15, ALONE),
    ("log_softmax", "f4", "whole", 147456, 262144, 0.15, ALONE),
    ("log_softmax", "bf", "shifted", 10, 64, 5.25, STARTS),
    ("log_softmax", "bf", "single", 9, 63, 5.10, STARTS),
    ("log_softmax", "bf", "shifted", 66, 128, 5.25, STARTS),
    ("log_softmax", "bf", "single", 65, 127, 5.25, STARTS),
    ("log_softmax", "bf", "shifted", 130, 904, 1.05, STARTS),
    ("log_softmax", "bf", "single", 129, 511, 0.75, STARTS),
    ("log_softmax", "bf", "shifted", 67592, 104456, 0.20, ALONE),
    ("log_softmax", "bf", "single", 73729, 104449, 0.20, ALONE),
    ("log_softmax", "bf", "shifted", 110600, 262144, 0.15, ALONE),
    ("log_softmax", "bf", "single", 110593, 245761, 0.20, ALONE),
    ("cross_entropy", "f4", "shifted", 10, 64, 2.10, STARTS),
    ("cross_entropy", "f4", "single", 11, 63, 2.10, STARTS),
    ("cross_entropy", "f4", "shifted", 66, 128, 0.40, STARTS),
    ("cross_entropy", "f4", "single", 65, 127, 0.20, STARTS),
    ("cross_entropy", "f4", "shifted", 132, 196, 0.15, STARTS),
    ("cross_entropy", "f4", "shifted", 1028, 1032, 0.15, WAVES),
    ("cross_entropy", "f4", "whole", 1032, 1032, 0.15, WAVES),
    ("cross_entropy", "bf", "shifted", 12, 64, 4.95, STARTS),
    ("cross_entropy", "bf", "single", 13, 63, 4.85, STARTS),
    ("cross_entropy", "bf", "shifted", 66, 128, 5.05, STARTS),
    ("cross_entropy", "bf", "single", 65, 127, 5.05, STARTS),
    ("cross_entropy", "bf", "shifted", 130, 1024, 1.40, STARTS),
    ("cross_entropy", "bf", "single", 129, 511, 0.75, STARTS),
    ("cross_entropy", "bf", "shifted", 1032, 2048, 0.30, LATE),
    ("cross_entropy", "bf", "shifted", 2052, 16384, 0.35, LATE),
    ("cross_entropy", "bf", "single", 4225, 16383, 0.15, LATE),
    ("cross_entropy", "bf", "shifted", 16392, 32768, 0.35, WAVES),
    ("cross_entropy", "bf", "shifted", 32776, 65544, 0.25, WAVES),
    ("cross_entropy", "bf", "shifted", 67768, 101648, 0.25, WAVES),
    ("cross_entropy", "bf", "whole", 84704, 96800, 0.15, WAVES),
    ("cross_entropy", "bf", "shifted", 112928, 262144, 0.25, WAVES),
    ("cross_entropy", "bf", "whole", 127032, 253952, 0.35, WAVES),
    ("cross_entropy_value_and_grad", "f4", "shifted", 10, 64, 2.00, STARTS),
    ("cross_entropy_value_and_grad", "f4", "single", 11, 63, 2.05, STARTS),
    ("cross_entropy_value_and_grad", "f4", "shifted", 66, 128, 0.25, STARTS),
    ("cross_entropy_value_and_grad", "f4", "single", 65, 127, 0.15, STARTS),
    ("cross_entropy_value_and_grad", "f4", "shifted", 65538, 65544, 0.15, ALONE),
    ("cross_entropy_value_and_grad", "f4", "shifted", 81924, 81924, 0.15, ALONE),
    ("cross_entropy_value_and_grad", "bf", "shifted", 12, 64, 4.75, STARTS),
    ("cross_entropy_value_and_grad", "bf", "single", 11, 63, 4.70, STARTS),
    ("cross_entropy_value_and_grad", "bf", "shifted", 66, 128, 4.80, STARTS),
    ("cross_entropy_value_and_grad", "bf", "single", 65, 127, 4.80, STARTS),
    ("cross_entropy_value_and_grad", "bf", "shifted", 130, 904, 1.00, STARTS),
    ("cross_entropy_value_and_grad", "bf", "single", 129, 511, 0.70, STARTS),
    ("cross_entropy_value_and_grad", "bf", "shifted", 2050, 2568, 0.15, LATE),
    ("cross_entropy_value_and_grad", "bf", "shifted", 67592, 104456, 0.30, ALONE),
    ("cross_entropy_value_and_grad", "bf", "single", 73729, 104449, 0.25, ALONE),
    ("cross_entropy_value_and_grad", "bf", "shifted", 110592, 262144, 0.25, ALONE),
    ("cross_entropy_value_and_grad", "bf", "single", 110593, 245761, 0.25, ALONE),
)


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("operation, kind", predictions.SWEPT)
def test_predicted_times_are_on_a_smooth_curve(operation, kind):
    known = [c[2:] for c in CLIFFS if c[:2] == (operation, kind)]
    needed, above = set(), []
    for p in predictions.sweep(operation, kind, H100):
        if p.excess <= predictions.LIMIT:
            continue
        at = [c for c in known if c[0] == p.access and c[1] <= p.classes <= c[2]]
        if at and p.excess <= at[0][3]:
            needed.add(at[0])
        else:
            above.append((p.classes, p.layout, round(p.excess, 2)))
    assert not above
    assert needed == set(known), "these ranges have become smooth: take them out"
