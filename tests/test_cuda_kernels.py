"""The CUDA kernels' logic, on the NumPy machine of `emulator`, against the reference.

Every operation, dtype, option and way through a row, at the level of plans: which arrays, which
layouts. That the public functions make the right plans is the business of `test_cuda_host.py`.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from numbakern.arrays import kind_of
from numbakern.cuda import device, kernels, totals, ways
from numbakern.cuda import plan as plans
from numbakern.cuda.plan import Layout, kernel_of, plan
from numbakern.cuda.rows import BLOCK, WIDE, Partition, Way, partition
from numbakern.cuda.ways import MACHINE, Machine
from tests import accuracy, cases, emulator, reference
from tests.cases import bfloat16, float16, float32, float64
from tests.emulator import WARP, Fault, emulate

WORK = np.longdouble
NONE = np.iinfo(np.int64).max

# Every partition: parts of a warp, a warp with 1 to 8 groups a lane, blocks, chunks; whole and not.
COUNTS = {
    "f4": [1, 2, 3, 4, 5, 10, 17, 32, 33, 100, 128, 129, 257, 700, 1000, 1001, 1024, 1025, 2049],
    "f8": [1, 2, 3, 4, 5, 10, 17, 33, 64, 65, 100, 200, 500, 513, 1025],
    "half": [1, 2, 3, 8, 9, 17, 33, 100, 256, 257, 1000, 1001, 2048, 2049],
}
SLOW = pytest.mark.slow  # what takes seconds and differs little from others
CHUNKED = {"f4": [16385, 20000], "f8": [8193, 9000], "half": [33000]}


def family(dtype):
    return {float32: "f4", float64: "f8"}.get(np.dtype(dtype), "half")


def layout_of(array):
    address = array.__array_interface__["data"][0]
    return Layout(kind_of(array.dtype).kind, array.strides, address % 16 == 0)


def compute_of(dtype):
    return kind_of(np.dtype(dtype)).compute


TAKEN: dict[str, bool] = {}
"""Fields of every Machine that `run` plans for: ways that a test chooses."""


@pytest.fixture
def take():
    """From its call on the ways that are True are chosen, and no others."""

    def choose(**fields):
        TAKEN.clear()
        TAKEN.update(fields)

    yield choose
    TAKEN.clear()


def run(operation, arrays, axis, elem=None, *, of="x", record=None, machine=MACHINE, **values):
    """Plan and emulate an operation over these arrays; options and values by name."""
    elem = elem or compute_of(arrays[of].dtype)
    names = ("soft", "smooth", "given", "ignores", "reduction")
    options = tuple((n, values.pop(n)) for n in names if n in values)
    arrays = {n: a for n, a in arrays.items() if a is not None}
    layouts = tuple((n, layout_of(a)) for n, a in arrays.items())
    machine = machine._replace(**TAKEN)
    made = plan(operation, options, arrays[of].shape, axis, elem, layouts, machine)
    temporaries = {n: np.full(-(-size // 8) * 8, 0xFF, np.uint8) for n, size in made.temporaries}
    bad = np.full(1, NONE) if record is None else record
    memory = {**arrays, **temporaries, "bad": bad}
    slots = {n: a.__array_interface__["data"][0] for n, a in memory.items()}
    slots = {"scale": 1.0, "keep": 1.0, "spread": 0.0, **made.constants, **slots, **values}
    for step in made.steps:
        args = [slots[n] for n in step.args]
        kernel, memories = kernel_of(step.spec), list(memory.values())
        emulate(kernel, step.grid, step.block, args, memories, step.shared, step.cluster)
    if record is None:
        assert bad[0] == NONE
    return made


def empty_like(array, dtype=None):
    """An array of the same strides (in elements) and alignment, full of something else."""
    dtype = np.dtype(dtype or array.dtype)
    return placed(np.full(array.shape, 7, dtype), offset_of(array))


def offset_of(array):
    return array.__array_interface__["data"][0] % 16 // array.itemsize


def placed(values, offset):
    """Contiguous, `offset` elements behind a multiple of 16 bytes."""
    size = values.itemsize
    raw = np.zeros(values.size * size + 64, np.uint8)
    start = -raw.__array_interface__["data"][0] % 16 + offset * size
    out = raw[start : start + values.size * size].view(values.dtype).reshape(values.shape)
    out[...] = values
    return out


def rows_for(classes):
    return max(2, min(40, 8000 // classes))


def every_count():
    for dtype in cases.FLOATS:
        for classes in COUNTS[family(dtype)] + CHUNKED[family(dtype)]:
            yield pytest.param(dtype, classes, id=f"{dtype}-{classes}")


def bound(dtype, full):
    return 1.0 if np.dtype(dtype) in (float16, bfloat16) else full


@pytest.fixture
def small_chunks(monkeypatch):
    """Rows in parts of 128 float32 or 64 float64; a block holds four, or walks two at a time."""

    def partition(classes, size, halved, _halves, _one):
        most = max(2, min(8, 16 // size))
        group = min(most, classes & -classes or most)
        return Partition(4 * WARP, most // group, group, True)

    monkeypatch.setattr(plans, "partition", partition)
    for name, number in {"WALKING": 2, "KEEPING": (1, 2), "BUSILY": (0.0, 0.0)}.items():
        monkeypatch.setattr(ways, name, number)
    monkeypatch.setattr(ways, "HELD", 2)
    plan.cache_clear()
    yield
    plan.cache_clear()


# --- the family ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, classes", list(every_count()))
def test_family_of_rows(dtype, classes):
    """log_softmax, softmax, logsumexp; aligned and not."""
    for offset in (0, 1):
        x = placed(cases.logits((rows_for(classes), classes), dtype, scale=4.0), offset)
        want = reference.log_softmax(x, work=WORK)
        out = empty_like(x)
        run("log_softmax", {"x": x, "out": out}, 1)
        assert accuracy.errors(out, want, dtype).max() <= bound(dtype, 2.5)
        run("softmax", {"x": x, "out": out}, 1)
        assert accuracy.errors(out, np.exp(want), dtype, flushed=True).max() <= bound(dtype, 4.0)
        lse = np.empty(len(x), cases.loss_type(dtype))
        run("logsumexp", {"x": x, "row_lse": lse}, 1)
        want = reference.logsumexp(x, work=WORK)
        # Of halves: 2 ulp from the rounded exp2 on, and one rounding.
        allowed = 1.0 if dtype in (float32, float64) else 3.0
        assert accuracy.errors(lse, want, lse.dtype, np.maximum(abs(want), 1)).max() <= allowed


@pytest.mark.parametrize("dtype, classes", list(every_count()))
def test_backward_of_rows(dtype, classes):
    """log_softmax_backward and softmax_backward."""
    rng = cases.generator(classes)
    for offset in (0, 1):
        x = cases.logits((rows_for(classes), classes), dtype, scale=4.0)
        g = placed(rng.normal(0, 1, x.shape).astype(dtype), offset)
        y = placed(reference.log_softmax(x).astype(dtype), 0)
        out = empty_like(g)
        run("log_softmax_backward", {"x": g, "y": y, "out": out}, 1)
        wide, p = reference.exact(g, WORK), np.exp(reference.exact(y, WORK))
        size, whole = abs(wide), abs(wide.sum(axis=1, keepdims=True))
        want = reference.log_softmax_backward(g, y, work=WORK)
        # Of what is subtracted, however much of Σg cancels. The goal: an ulp of √p counts twice.
        at = np.maximum(np.maximum(size, p * whole), abs(want))
        assert accuracy.errors(out, want, dtype, at).max() <= bound(dtype, 4.0)
        y = placed(reference.softmax(x).astype(dtype), offset)
        run("softmax_backward", {"x": g, "y": y, "out": out}, 1)
        p = reference.exact(y, WORK)
        at = p * np.maximum(size, (size * p).sum(axis=1, keepdims=True))
        want = reference.softmax_backward(g, y, work=WORK)
        at = np.maximum(at, abs(want))
        assert accuracy.errors(out, want, dtype, at, flushed=True).max() <= bound(dtype, 5.0)


# --- losses --------------------------------------------------------------------------------------


def close(got, want, dtype, scale=1.0):
    cases.assert_close(got, np.asarray(want, np.float64), dtype, scale)


def smoothing_values(smoothing, classes):
    return {"keep": 1.0 - smoothing, "spread": smoothing / classes}


OPTIONS = [
    pytest.param(soft, smoothing, weighted, reduction, id="-".join(filter(None, name)))
    for soft, smoothing, weighted, reduction in itertools.product(
        (False, True), (0.0, 0.125), (False, True), cases.REDUCTIONS
    )
    for name in [
        ("soft" * soft, "smooth" * (smoothing > 0), "weighted" * weighted, reduction),
    ]
]
# One count for each kind of partition, whole and not.
LOSS_COUNTS = {"f4": [1, 33, 1040], "f8": [3, 513], "half": [9, 1001]}


def loss_case(dtype, classes, soft, weighted, axis=1):
    """(x, labels, reference's labels, weight): rows with an ignored label among them."""
    rows = 13
    x = placed(cases.logits((rows, classes), dtype, scale=4.0), 1)
    weight = cases.class_weights(classes, np.float32) if weighted else None
    if soft:
        return x, cases.probabilities((rows, classes), 1, np.float32), weight
    labels = cases.class_labels(rows, classes, np.int64)
    labels[0] = np.argmax(x[0])
    labels[2] = -100
    return x, labels, weight


@pytest.mark.parametrize("soft, smoothing, weighted, reduction", OPTIONS)
@pytest.mark.parametrize(
    "dtype, classes",
    [
        pytest.param(dtype, classes, id=f"{dtype}-{classes}")
        for dtype in cases.FLOATS
        for classes in LOSS_COUNTS[family(dtype)]
    ],
)
def test_cross_entropy(dtype, classes, soft, smoothing, weighted, reduction):
    """Forward with lse, both backwards, value_and_grad."""
    x, labels, weight = loss_case(dtype, classes, soft, weighted)
    options = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    want = reference.cross_entropy(x, labels, work=WORK, **options)
    targets = {"y" if soft else "labels": labels, "weight": weight}
    call = {"soft": soft, "smooth": smoothing > 0, "reduction": reduction}
    call |= smoothing_values(smoothing, classes)
    if not soft:
        call |= {"ignores": True, "ignore_index": -100}
    result = cases.loss_type(dtype)
    lse = np.empty(len(x))
    loss = np.full(len(x) if reduction == "none" else (), 7, result)
    run("cross_entropy", {"x": x, "loss": loss, "row_lse": lse, **targets}, 1, **call)
    close(loss, want, result)
    want_lse = reference.logsumexp(x, work=WORK)
    # A quarter of a float32's ulp; of halves, whose exponentials are the hardware's, one.
    allowed = {float64: 1.0, float32: 2.0**27}.get(np.dtype(dtype), 2.0**29)
    assert accuracy.errors(lse, want_lse, float64, np.maximum(abs(want_lse), 1)).max() <= allowed

    g = cases.generator(3).normal(0, 1, len(x) if reduction == "none" else ()).astype(np.float32)
    want = reference.cross_entropy_backward(g, x, labels, work=WORK, **options)
    out = empty_like(x)
    scale = g.reshape(-1) if reduction == "none" else np.broadcast_to(g, len(x))
    arrays = {"x": x, "out": out, "row_scale": scale, **targets}
    run("cross_entropy", arrays, 1, **call)
    close(out, want, dtype)
    out[...] = 7
    run("cross_entropy", {**arrays, "row_lse": lse}, 1, given=True, **call)
    close(out, want, dtype)

    ones = np.ones(len(x)) if reduction == "none" else np.float64(1)
    want_grad = reference.cross_entropy_backward(ones, x, labels, work=WORK, **options)
    loss[...], out = 7, empty_like(x)
    run("cross_entropy", {"x": x, "out": out, "loss": loss, **targets}, 1, **call)
    close(loss, reference.cross_entropy(x, labels, work=WORK, **options), result)
    close(out, want_grad, dtype)


@pytest.mark.parametrize("soft, smoothing, weighted, reduction", OPTIONS)
def test_cross_entropy_in_chunks(small_chunks, soft, smoothing, weighted, reduction):
    """Rows of three chunks, the last one in part."""
    test_cross_entropy(float32, 300, soft, smoothing, weighted, reduction)


WAYS = {
    "block": Machine(multiprocessors=1),
    "blocks": Machine(multiprocessors=132),
    "few blocks": Machine(multiprocessors=7),
    "block, room for a part of it": Machine(multiprocessors=1, shared=35 << 10),
    "block, no room": Machine(multiprocessors=1, shared=0),
    "cluster": Machine(multiprocessors=1, cluster=8, shared=71 << 9),
    "cluster, more room": Machine(multiprocessors=1, cluster=2, shared=79 << 9),
    "together": Machine(together=True),
}


@pytest.fixture
def one_block_at_a_time(monkeypatch):
    """What one block has written the next one finds, as it may on a GPU."""
    monkeypatch.setattr(emulator, "LANES_AT_ONCE", 1)


def long_row_calls(x, y):
    """(operation, inputs beside x, results, options and values) of every operation on rows."""
    rows, classes = x.shape
    labels, weight = cases.class_labels(rows, classes), cases.class_weights(classes, np.float32)
    labels[1] = -100
    hard, loss, lse = {"labels": labels, "weight": weight}, ("loss", "out"), reference.logsumexp(x)
    ignore = {"ignores": True, "ignore_index": -100}
    smooth = ignore | {"smooth": True} | smoothing_values(0.125, classes)
    soft = {"soft": True} | smoothing_values(0.125, classes)
    return [
        ("log_softmax", {}, ("out",), {}),
        ("softmax", {}, ("out",), {}),
        ("logsumexp", {}, ("row_lse",), {}),
        ("log_softmax_backward", {"y": y}, ("out",), {}),
        ("softmax_backward", {"y": y}, ("out",), {}),
        ("cross_entropy", hard, (*loss, "row_lse"), ignore),
        ("cross_entropy", hard, loss, smooth),
        ("cross_entropy", {"y": y}, loss, soft),
        ("cross_entropy", hard | {"row_lse": lse}, ("out",), ignore | {"given": True}),
        ("cross_entropy", hard | {"row_lse": lse}, ("out",), smooth | {"given": True}),
        ("cross_entropy", {"y": y, "row_lse": lse}, ("out",), soft | {"given": True}),
    ]


@pytest.mark.parametrize("operation", ["softmax", "cross_entropy"])
@pytest.mark.parametrize("classes", [20_000, 20_001])
def test_exponentials_of_long_rows_are_taken_once(classes, operation, monkeypatch):
    """In shared memory they are kept instead of the logits: maps take but those in registers."""
    taken, original = [0], kernels.scaled_exp

    def counted(*args):
        taken[0] += 1
        return original(*args)

    monkeypatch.setattr(kernels, "scaled_exp", counted)
    x = cases.logits((3, classes), float32)
    arrays = {"x": x, "out": empty_like(x)}
    if operation == "cross_entropy":
        arrays |= {"labels": cases.class_labels(3, classes)}
    made = run(operation, arrays, 1, machine=Machine(multiprocessors=1))
    (params,) = (dict(s.spec.params) for s in made.steps if "way" in dict(s.spec.params))
    assert Way(*params["way"]).kept == "shared"
    assert taken[0] == Partition(*params["part"]).held


@pytest.mark.parametrize("number", range(11))
@pytest.mark.parametrize("classes", [900, pytest.param(4100, marks=SLOW)])
def test_who_takes_the_parts_changes_no_bit(
    classes, number, small_chunks, one_block_at_a_time, dtype=float32
):
    """Rows of 8 and of 33 parts, by a block, several or a cluster; in place, and unaligned."""
    x = placed(cases.logits((3, classes), dtype, scale=4.0), 1)
    y = placed(cases.probabilities(x.shape, 1, dtype), 1)
    operation, inputs, results, call = long_row_calls(x, y)[number]
    want, taken = None, set()
    for machine in WAYS.values():
        own = placed(x, 1) if "out" in results and want is not None else x
        found = {n: np.full(len(x), 7.0) for n in results if n != "out"}
        if "out" in results:
            found["out"] = empty_like(x) if want is None else own
        made = run(operation, {"x": own, **inputs, **found}, 1, machine=machine, **call)
        taken |= {dict(step.spec.params).get("way") for step in made.steps}
        want = found if want is None else want
        for name, array in want.items():
            assert cases.same_bits(found[name], array), (name, machine)
    mapped_only = call.get("given") and not {"smooth", "soft"} & set(call)
    read_once = "out" not in results or (call.get("given") and not call.get("soft"))
    taken -= {None}
    assert len(taken) >= (1 if mapped_only else 3 if read_once else 7)
    kept = {Way(*way).kept for way in taken}
    assert read_once or kept == {"registers", "shared", "partly", "no"}


@pytest.mark.parametrize(
    "dtype, number", [(float32, 3), (float32, 6), (float64, 1), (bfloat16, 1)], ids=str
)
def test_blocks_that_meet(dtype, number, one_block_at_a_time):
    """Rows of their real parts, in place and unaligned, of one launch behind that of the zeros."""
    classes = 150_000 // np.dtype(dtype).itemsize
    x = placed(cases.logits((3, classes), dtype, scale=4.0), 1)
    y = placed(cases.probabilities(x.shape, 1, dtype), 1)
    operation, inputs, results, call = long_row_calls(x, y)[number]
    found = []
    for machine in MACHINE, Machine(multiprocessors=108, together=True):
        own = placed(x, 1)
        found.append({n: np.full(len(x), 7.0) for n in results} | {"out": own})
        made = run(operation, {"x": own, **inputs, **found[-1]}, 1, machine=machine, **call)
    assert [step.spec.kernel for step in made.steps] == ["clear", operation]
    for name, array in found[0].items():
        assert cases.same_bits(found[1][name], array), name


def in_turn(made):
    """(Way, rounds, blocks or clusters, turns) of a plan whose rows come one after the other."""
    for step in made.steps:
        way = dict(step.spec.params).get("way")
        if way and Way(*way).kept == "ahead":
            way = Way(*way)
            turns, teams = made.constants["turns"], made.constants["stride"]
            assert teams == step.grid // way.cluster
            return way, made.constants["rounds"], teams, turns
    return None


def machines_in_turn(operation, arrays, options, most):
    """One Machine each for blocks and clusters, with more room or not, with rows left over or not.

    Of multiprocessors that have few KB, so that there is no room for all rows at once.
    """
    found, rows = {}, len(arrays["x"])
    layouts = tuple((n, layout_of(a)) for n, a in arrays.items())
    elem = compute_of(arrays["x"].dtype)
    for shared, cluster, multiprocessors in itertools.product(range(1, most), (1, 2, 4), (1, 2, 8)):
        machine = Machine(multiprocessors, shared << 10, cluster, ahead=True)
        made = in_turn(plan(operation, options, arrays["x"].shape, 1, elem, layouts, machine))
        if made and made[3] > 1:
            way, _, teams, _ = made
            found.setdefault((way.cluster > 1, way.spare, rows % teams > 0), machine)
    return found


SOME_IN_TURN = [(float32, 0), (float32, 5), (float32, 7), (bfloat16, 3), (bfloat16, 5)]


@pytest.mark.parametrize(
    "dtype, number",
    [
        pytest.param(*one, id=f"{one[0]}-{one[1]}", marks=[] if one in SOME_IN_TURN else SLOW)
        for one in itertools.product(cases.FLOATS, [0, 1, 3, 4, 5, 6, 7, 10])
    ],
)
def test_rows_in_turn_have_the_same_bits(dtype, number, small_chunks, one_block_at_a_time):
    """In place; behind rows of infinities and NaN there is an ignored one, then others."""
    classes, rows = {"f4": 904, "f8": 452, "half": 1800}[family(dtype)], 18  # of 8 parts
    x = placed(cases.logits((rows, classes), dtype, scale=4.0), 0)
    y = placed(cases.probabilities(x.shape, 1, dtype), 0)
    operation, inputs, results, call = long_row_calls(x, y)[number]
    x[0, ::3], x[3, 5], x[7] = np.nan, np.inf, -np.inf
    if "labels" in inputs:
        inputs["labels"][[4, 8, -1]] = -100
    options = tuple((n, call[n]) for n in ("soft", "smooth", "given", "ignores") if n in call)

    def given(x):
        found = {n: np.full(rows, 7.0) for n in results if n != "out"}
        return {"x": x, **inputs, **found, "out": x}

    want = given(placed(x, 0))
    run(operation, want, 1, **call)
    machines = machines_in_turn(operation, want, options, 64)
    assert set(machines) == set(itertools.product((False, True), repeat=3))
    for kind, machine in machines.items():
        found = given(placed(x, 0))
        assert in_turn(run(operation, found, 1, machine=machine, **call))
        for name in results:
            assert cases.same_bits(found[name], want[name]), (name, kind)


@pytest.mark.parametrize("shared", [11 << 9, 15 << 9])
def test_rows_in_turn_of_any_batch(small_chunks, shared):
    """Whose rows lie apart, along two axes."""
    x = placed(cases.logits((4, 5, 904), float32), 0)[:, :3]
    labels, found = cases.class_labels(12, 904).reshape(4, 3), []
    for machine in MACHINE, Machine(multiprocessors=1, shared=shared, ahead=True):
        out, loss = np.zeros((4, 3, 904), float32), np.zeros((4, 3), float32)
        arrays = {"x": x, "labels": labels, "loss": loss, "out": placed(out, 0)}
        made = run("cross_entropy", arrays, 2, machine=machine)
        found.append(arrays)
    way, _, teams, turns = in_turn(made)
    assert way.spare == (teams == 1) and turns == 12 // teams
    for name in ("loss", "out"):
        assert cases.same_bits(found[1][name], found[0][name])
    close(found[1]["loss"], reference.cross_entropy(x, labels, reduction="none", axis=2), float32)


IN_TURN = Machine(multiprocessors=1, cluster=8, ahead=True)
TURNS = {  # with groups of 16 bytes; by a block, by 2, 4 and 8, and by one with room for more
    "f4": [16388, 20_000, 32_768, 65_536, 131_072, 262_144],
    "f8": [8194, 16_384, 32_768],
    "half": [16_392, 20_000, 65_536, 262_144],
}


@pytest.mark.parametrize(
    "dtype, classes",
    [
        pytest.param(dtype, n, id=f"{dtype}-{n}", marks=SLOW if n > 100_000 else [])
        for dtype in cases.FLOATS
        for n in TURNS[family(dtype)]
    ],
)
def test_rows_in_turn(dtype, classes):
    """log_softmax, softmax_backward and the gradient in place of the logits; fewer rows or more."""
    for rows in (2, 5):
        x = placed(cases.logits((rows, classes), dtype, scale=4.0), 0)
        want, out = reference.log_softmax(x, work=WORK), empty_like(x)
        assert in_turn(run("log_softmax", {"x": x, "out": out}, 1, machine=IN_TURN))
        assert accuracy.errors(out, want, dtype).max() <= bound(dtype, 2.5)
        labels = cases.class_labels(rows, classes)
        labels[1] = -100
        loss, got = np.full((), 7, cases.loss_type(dtype)), placed(x, 0)
        arrays = {"x": got, "labels": labels, "loss": loss, "out": got}
        call = {"ignores": True, "ignore_index": -100, "reduction": "mean"}
        assert in_turn(run("cross_entropy", arrays, 1, machine=IN_TURN, **call))
        close(loss, reference.cross_entropy(x, labels, reduction="mean"), loss.dtype)
        ones = np.float64(1)
        want = reference.cross_entropy_backward(ones, x, labels, reduction="mean", work=WORK)
        close(got, want, dtype)
        g, out = placed(x[::-1], 0), empty_like(x)
        y = placed(reference.softmax(x).astype(dtype), 0)
        made = run("softmax_backward", {"x": g, "y": y, "out": out}, 1, machine=IN_TURN)
        assert in_turn(made) or classes > 65_536  # or even a cluster has not the room
        p, size = reference.exact(y, WORK), abs(reference.exact(g, WORK))
        want = reference.softmax_backward(g, y, work=WORK)
        at = np.maximum(p * np.maximum(size, (size * p).sum(axis=1, keepdims=True)), abs(want))
        assert accuracy.errors(out, want, dtype, at, flushed=True).max() <= bound(dtype, 5.0)


def test_which_rows_come_in_turn():
    """Those of whole groups of 16 bytes, aligned so; what is not kept may lie anywhere."""

    def taken(dtype, classes, offset=0, operation="log_softmax", **others):
        x = placed(np.zeros((4, classes), dtype), offset)
        arrays = {"x": x, "out": placed(np.zeros_like(x), 0), **others}
        layouts = tuple((n, layout_of(a)) for n, a in arrays.items())
        return in_turn(plan(operation, (), x.shape, 1, compute_of(dtype), layouts, IN_TURN))

    for dtype, group in ((float32, 4), (bfloat16, 8), (float64, 2)):
        assert taken(dtype, 17_000)
        assert not taken(dtype, 17_000 + group // 2)
        assert not taken(dtype, 17_000, offset=1)
        assert not taken(dtype, 1000) and not taken(dtype, 4_000_000)
    y = placed(np.zeros((4, 17_000), float32), 1)
    assert taken(float32, 17_000, operation="log_softmax_backward", y=y)
    assert not taken(float32, 17_000, operation="softmax_backward", y=y)


def test_a_cluster_keeps_rows_with_gaps(small_chunks):
    """The last round of a block's share may have no parts: what is not there is read too."""
    x = placed(cases.logits((2, 1100), float32), 0)  # 9 parts, for 2 blocks of 2 warps
    found = []
    for machine in Machine(), Machine(multiprocessors=1, cluster=2, shared=11 << 9):
        found.append(empty_like(x))
        made = run("log_softmax_backward", {"x": x, "y": x, "out": found[-1]}, 1, machine=machine)
    assert [step.cluster for step in made.steps] == [2]
    assert "shared" in dict(made.steps[0].spec.params)["way"]
    assert cases.same_bits(*found)


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@cases.dtypes(*cases.FLOATS)
def test_nll(dtype, weighted, reduction):
    """nll_loss and its backward."""
    for classes in (1, 5, 200):
        x = placed(reference.log_softmax(cases.logits((300, classes), dtype)).astype(dtype), 1)
        labels = cases.class_labels(300, classes)
        labels[::7] = -100
        weight = cases.class_weights(classes, np.float32) if weighted else None
        options = {"weight": weight, "reduction": reduction}
        call = {"ignores": True, "ignore_index": -100, "reduction": reduction}
        result = cases.loss_type(dtype)
        loss = np.full(300 if reduction == "none" else (), 7, result)
        run("nll", {"x": x, "labels": labels, "weight": weight, "loss": loss}, 1, **call)
        want = reference.nll_loss(x, labels, work=WORK, **options)
        assert accuracy.errors(loss, want, result).max() <= 2.0
        g = cases.generator(3).normal(0, 1, 300 if reduction == "none" else ()).astype(np.float32)
        out = empty_like(x)
        scale = g if reduction == "none" else np.broadcast_to(g, 300)
        arrays = {"out": out, "labels": labels, "weight": weight, "row_scale": scale}
        run("nll_backward", arrays, 1, of="out", **call)
        want = reference.nll_loss_backward(g, x, labels, work=WORK, **options)
        assert accuracy.errors(out, want, dtype).max() <= bound(dtype, 2.0)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("rows", [1, 31, 33, 2047, 2048, 2049, 70_000, 262_145])
def test_sums_over_many_rows(rows, counted, take):
    """Sums by a warp that has all rows, in one step and in two, to an ulp."""
    take(counted=counted)
    x = cases.logits((rows, 2), float64, scale=30.0)
    labels = cases.class_labels(rows, 2, np.int32)
    labels[::3] = 1
    losses = reference.nll_loss(x, labels, reduction="none", work=WORK)
    for reduction in ("sum", "mean"):
        loss = np.full((), np.nan)
        made = run("nll", {"x": x, "labels": labels, "loss": loss}, 1, reduction=reduction)
        alone = counted and rows <= WARP
        assert len(made.steps) == (3 if rows == 262_145 else 1 if alone else 2)
        threads = 512 if rows == 70_000 else 256
        assert alone or made.steps[-1].block == threads
        want = losses.sum() if reduction == "sum" else losses.mean()
        size = abs(losses).sum() / (1 if reduction == "sum" else rows)
        assert abs(loss - want) <= size * 2.0**-52


@cases.dtypes(float32, float64)
def test_sums_have_the_same_bits_whoever_adds(dtype, monkeypatch):
    """By the warps that have the rows, a lane or more each, or by steps of several depths."""
    batch, found = (30, 120), set()
    labels = cases.class_labels(batch, 3)
    labels[::7] = -100
    weight = cases.class_weights(3, dtype)
    call = {"ignores": True, "ignore_index": -100, "reduction": "mean"}
    logits = cases.logits((*batch, 3), dtype)
    for each, keeper in itertools.product((8, 2, 1), (np.ascontiguousarray, cases.fortran)):
        monkeypatch.setattr(totals, "SPAN", each * totals.BLOCK)
        monkeypatch.setattr(totals, "EACH", each)
        monkeypatch.setattr(totals, "MOST", 2 * each)
        for cached in plan, plans.kernel_of:
            cached.cache_clear()
        arrays = {"x": keeper(logits), "labels": keeper(labels), "weight": weight}
        loss, same = (np.full((), np.nan, dtype) for _ in range(2))
        made = run("cross_entropy", {**arrays, "loss": loss}, 2, **call)
        of_warps = keeper is np.ascontiguousarray
        nodes = 113 if of_warps else 3600
        assert made.constants["row_loss_count"] == nodes
        at_once = 2048 * each if dtype == float32 else 1024 * each
        assert len(made.steps) == 2 + (nodes > at_once)
        run("cross_entropy", {**arrays, "loss": same, "out": empty_like(arrays["x"])}, 2, **call)
        found |= {loss.tobytes(), same.tobytes()}
        want = reference.cross_entropy(logits, labels, axis=2, weight=weight, work=WORK)
        assert accuracy.errors(loss, want, dtype) <= 2.0
    assert len(found) == 1
    for cached in plan, plans.kernel_of:
        cached.cache_clear()


def kernels_of(made):
    return [step.spec.kernel for step in made.steps]


def training_calls(x, labels, weight, axis, **call):
    """Results of all that is scaled by the labels' weights: loss, gradients; their plans."""
    upstream, lse = np.float32(1.7), np.zeros(labels.shape)
    arrays = {"x": x, "labels": labels, "weight": weight}
    loss, out = np.full((), 7, compute_of_loss(x.dtype)), empty_like(x)
    run("cross_entropy", {**arrays, "row_lse": lse, "loss": loss.copy()}, axis, **call)
    scale = {"row_scale": np.broadcast_to(upstream, labels.shape)}
    results, plans_of = [loss, out], []
    plans_of.append(run("cross_entropy", {**arrays, "loss": loss, "out": out}, axis, **call))
    for given in ({}, {"row_lse": lse}):
        out = empty_like(x)
        named = {**arrays, **scale, **given, "out": out}
        plans_of.append(run("cross_entropy", named, axis, given=bool(given), **call))
        results.append(out)
    out = empty_like(x)
    call = {n: v for n, v in call.items() if n not in ("smooth", "keep", "spread")}
    named = {**arrays, **scale, "out": out}
    del named["x"]
    plans_of.append(run("nll_backward", named, axis, of="out", **call))
    return [*results, out], plans_of


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 32, 33, 300, 1024, 1025])
@cases.dtypes(float32, float64, bfloat16)
def test_few_rows_count_their_labels_themselves(dtype, rows, weighted, smoothing, take):
    """The bits of a launch that counts, which more rows have; and what the reference says."""
    classes = 6
    x = cases.logits((rows, classes), dtype, scale=4.0)
    labels = cases.class_labels(rows, classes)
    labels[3::7] = -100
    weight = cases.class_weights(classes, np.float32 if dtype == bfloat16 else dtype)
    weight = weight if weighted else None
    call = {"ignores": True, "ignore_index": -100, "reduction": "mean", "smooth": smoothing > 0}
    call |= smoothing_values(smoothing, classes)
    take(counted=True)
    results, made = training_calls(x, labels, weight, 1, **call)
    for one in made:
        assert ("count" in kernels_of(one)) == ("divisor" in dict(one.temporaries)) == (rows > 1024)
    assert len(made[0].steps) == (1 if rows <= WARP else 2 if rows <= 1024 else 3)
    take()
    want, made = training_calls(x, labels, weight, 1, **call)
    assert all("count" in kernels_of(one) for one in made)
    assert all(map(cases.same_bits, results, want))
    options = {"weight": weight, "label_smoothing": smoothing, "work": WORK}
    loss, grad, scaled, given, _ = results
    close(loss, reference.cross_entropy(x, labels, **options), compute_of_loss(dtype))
    one, upstream = (np.float64(g) for g in (1, np.float32(1.7)))
    close(grad, reference.cross_entropy_backward(one, x, labels, **options), dtype)
    for found in scaled, given:
        close(found, reference.cross_entropy_backward(upstream, x, labels, **options), dtype)


# Lanes of a row from 1 to a block's, rows that stay and that are read again, or by several blocks.
OF_EACH_WAY = [
    (float32, 3), (float32, 21), (float32, 70), (float32, 1001), (float32, 2100), (float32, 16500),
    (float64, 9), (float64, 1100), (float64, 9000), (bfloat16, 33), (bfloat16, 5000),
]  # fmt: skip


@pytest.mark.parametrize("machine", [MACHINE, Machine(multiprocessors=2)], ids=["large", "small"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype, classes", OF_EACH_WAY)
def test_few_rows_in_every_way(dtype, classes, axis, machine, take):
    """Whoever takes the rows: the bits of a launch that counts, with bad labels among them."""
    rows = 6
    x = cases.logits((rows, classes), dtype, scale=4.0)
    x = x if axis else np.ascontiguousarray(x.T)
    labels, weight = cases.class_labels(rows, classes), cases.class_weights(classes, float32)
    arrays = {"x": x, "labels": labels, "weight": weight}
    call = {"reduction": "mean", "machine": machine}
    take(counted=True)
    found = []
    for bad in 3, classes:
        given, record = labels.copy(), np.full(1, NONE)
        given[4] = min(bad, classes)
        results = {"loss": np.full((), 7, compute_of_loss(dtype)), "out": empty_like(x)}
        named = {**arrays, "labels": given, **results}
        made = run("cross_entropy", named, axis, record=record, **call)
        assert "count" not in kernels_of(made)
        found.append((results, given, record))
    take()
    for results, given, record in found:
        want = {n: np.full_like(a, 7) for n, a in results.items()}
        again = np.full(1, NONE)
        made = run("cross_entropy", {**arrays, "labels": given, **want}, axis, record=again, **call)
        assert "count" in kernels_of(made)
        assert all(cases.same_bits(results[n], want[n]) for n in want)
        assert record[0] == again[0]
        assert np.isnan(results["loss"]) == (given[4] == classes)


def test_many_blocks_leave_counting_to_a_launch():
    """Of a row for each of many blocks: what each does once more takes longer than a launch."""
    for rows, classes, counts in [(1000, 1000, False), (1024, 262144, True), (1025, 10, True)]:
        x, labels = Layout("f4", (classes * 4, 4), True), Layout("i8", (8,), True)
        layouts = ("x", x), ("labels", labels), ("loss", Layout("f4", (), True)), ("out", x)
        options = (("reduction", "mean"),)
        clusters = Machine(cluster=8, counted=True)
        made = plan("cross_entropy", options, (rows, classes), 1, "f4", layouts, clusters)
        assert ("count" in kernels_of(made)) == counts


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 40])
@cases.dtypes(float32, float64)
def test_means_of_nothing(dtype, rows, ignored, take):
    """0 / 0 where all labels are ignored, or all weights are 0, of either sign."""
    x, labels = cases.logits((rows, 5), dtype), np.full(rows, -100 if ignored else 2)
    call = {"ignores": True, "ignore_index": -100, "reduction": "mean"}
    take(counted=True)
    found = []
    for zero in 0.0, -0.0:
        weight = np.full(5, zero, dtype)
        found.append(training_calls(x, labels, weight, 1, **call)[0])
    take()
    found.append(training_calls(x, labels, weight, 1, **call)[0])
    for one in found:
        assert np.isnan(one[0])
        assert all(map(cases.same_bits, one, found[0]))
        for grad in one[1:]:
            assert np.isnan(grad).any() or ignored


@pytest.mark.parametrize("operation", ["cross_entropy", "nll"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    ("axis", "classes"),
    [*itertools.product([0, 1], [1, 3, 21, 70, 1001, 2100]), (1, 16500)]
    + [pytest.param(0, 16500, marks=SLOW)],
)
@cases.dtypes(float32, float64)
def test_a_warp_that_has_all_rows(dtype, classes, axis, reduction, operation, take):
    """It leaves nothing to add up, and has the bits of more rows, which are ignored."""
    take(counted=True)
    few = (1, 2) if classes < 100 else (1,)
    for rows, with_grad in itertools.product(few, (False, True)):
        call = {"ignores": True, "ignore_index": -100, "reduction": reduction}
        found = []
        for more in 0, 140:
            x = cases.logits((rows, classes), dtype, scale=4.0)
            x[0, :] = 0.0 if operation == "nll" else x[0]  # a loss of −0
            x = np.concatenate([x, np.zeros((more, classes), dtype)])
            labels = np.concatenate([cases.class_labels(rows, classes), np.full(more, -100)])
            x = x if axis else np.ascontiguousarray(x.T)
            weight = cases.class_weights(classes, dtype)
            loss = np.full((), 7, compute_of_loss(dtype))
            arrays = {"x": x, "labels": labels, "weight": weight, "loss": loss}
            if with_grad and operation == "cross_entropy":
                arrays["out"] = empty_like(x)
            made = run(operation, arrays, axis, **call)
            assert ("total" in kernels_of(made)) == bool(more)
            assert ("row_loss" in dict(made.temporaries)) == bool(more)
            found.append(loss)
        assert cases.same_bits(*found)


FEW_OF_MANY = Machine(multiprocessors=1)
"""For which a test's rows are many."""


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize(
    "dtype, classes",
    [
        (float32, 41), (float32, 999), (float32, 2100), (float32, 9000), (float32, 13_000),
        (float64, 40), (float64, 1100), (float64, 3900),
        (bfloat16, 82), (bfloat16, 1000), (float16, 6000), (bfloat16, 10_000), (bfloat16, 1001),
    ],
)  # fmt: skip
def test_rows_that_are_finished_together(dtype, classes, reduction):
    """Of any number of parts, ignored and odd ones among them, as if each were alone."""
    rows = 65
    x = cases.logits((rows, classes), dtype, scale=4.0)
    x[3, 5] = np.nan
    x[4] = -np.inf
    x[5, ::2] = -np.inf
    x[6] = 1.0
    labels, weight = cases.class_labels(rows, classes), cases.class_weights(classes, dtype)
    labels[::7] = -100
    x[7] = np.nan  # ignored
    found = []
    kept = {"labels": labels, "weight": weight}
    call = {"ignores": True, "ignore_index": -100, "reduction": reduction}
    for machine in MACHINE, FEW_OF_MANY:
        for lse in False, True:
            shape = (rows,) if reduction == "none" else ()
            results = {"loss": np.full(shape, 7, compute_of_loss(dtype))}
            if lse:
                results["row_lse"] = np.full(rows, 7.0)
            made = run("cross_entropy", {"x": x, **kept, **results}, 1, machine=machine, **call)
            found.append(results)
        gathered = [
            Way(*params["way"]).gathers
            for s in made.steps
            if "way" in (params := dict(s.spec.params))
        ]
        one_by_one = dtype in (bfloat16, float16) and classes % 2
        assert one_by_one or machine is MACHINE or all(gathered)
    for one in found[1:]:
        assert cases.same_bits(one["loss"], found[0]["loss"])
    assert cases.same_bits(found[1]["row_lse"], found[3]["row_lse"])
    wide = x.astype(np.float64)
    wide[::7] = 0.0
    safe = np.where(labels < 0, 0, labels)
    with np.errstate(all="ignore"):
        want = -reference.log_softmax(wide)[np.arange(rows), safe] * weight.astype(np.float64)[safe]
    want[::7] = 0.0
    counted = weight.astype(np.float64)[safe][labels >= 0].sum()
    want = {"none": want, "sum": want.sum(), "mean": want.sum() / counted}[reduction]
    np.testing.assert_allclose(found[0]["loss"], want, 2e-6)
    lse = reference.logsumexp(x.astype(np.float64))
    np.testing.assert_allclose(found[1]["row_lse"], lse, 1e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 7, 8, 9])
@cases.dtypes(float32, float64, bfloat16)
def test_small_rows_beside_one_another(dtype, classes, axis):
    """A lane has several: ignored, odd and bad ones among them, as if each were alone."""
    rows = 1100  # three blocks of 4·128 of them, the last one not full
    x = cases.logits((rows, classes), dtype, scale=4.0)
    x[3, classes // 2] = np.nan
    x[130] = -np.inf
    x[260, ::2] = -np.inf
    x[261:264] = 1.0
    labels, weight = cases.class_labels(rows, classes), cases.class_weights(classes, dtype)
    labels[::7] = -100
    x[7] = np.nan  # ignored
    counts = labels >= 0
    want_grad = reference.cross_entropy_backward(
        np.ones(rows), x, labels, reduction="none", work=WORK
    )
    kind, alone = compute_of_loss(dtype), x.astype(np.float64)
    if classes == 1:  # the reference takes what there is of other classes
        want_grad[[3, 130, 260]] = np.nan
    with np.errstate(all="ignore"):
        picked = reference.log_softmax(alone)[np.arange(rows), np.where(counts, labels, 0)]
    losses = np.where(counts, -picked, 0.0)
    given = x if axis else np.ascontiguousarray(x.T)
    call = {"ignores": True, "ignore_index": -100}
    arrays = {"x": given, "labels": labels}
    loss, out, same = np.full(rows, 7, kind), empty_like(given), np.full(rows, 7, kind)
    made = run("cross_entropy", {**arrays, "loss": loss, "out": out}, axis, **call)
    params = dict(made.steps[-1].spec.params)
    assert params["walker"] == ("columns" if axis == 0 and classes > 1 else "rows")
    abreast = Way(*params["way"]).abreast
    assert abreast == (4 if classes <= 4 else 1)
    assert made.steps[-1].grid == -(-rows // (128 * abreast))
    close(out if axis else out.T, want_grad, dtype)
    run("cross_entropy", {**arrays, "loss": same}, axis, **call)
    assert cases.same_bits(loss, same)
    np.testing.assert_allclose(loss, losses, 2e-6, 1e-30)
    for i in (3, 130, 260, 261, 700, 1099):  # a row by itself
        one = np.full(1, 7, kind)
        kept = {"x": x[i : i + 1].copy(), "labels": labels[i : i + 1], "loss": one}
        run("cross_entropy", kept, 1, **call)
        assert cases.same_bits(one, loss[i : i + 1]), i
    # Sums, with weights and without, which a warp counts.
    x[[3, 130, 260]] = 0.5
    given[...] = x if axis else x.T
    with np.errstate(all="ignore"):
        logs = reference.log_softmax(x.astype(np.float64))
        losses = -logs[np.arange(rows), np.where(counts, labels, 0)]
    nll = -x.astype(np.float64)[np.arange(rows), np.where(counts, labels, 0)]
    for name, reduction in itertools.product((None, weight), ("sum", "mean")):
        w = np.where(
            counts, 1.0 if name is None else name.astype(np.float64)[np.maximum(labels, 0)], 0.0
        )
        divisor = w.sum() if reduction == "mean" else 1.0
        for operation, of_rows in (("cross_entropy", losses), ("nll", nll)):
            total = np.full((), 7, kind)
            more = {**arrays, "weight": name, "loss": total}
            run(operation, more, axis, reduction=reduction, **call)
            value = (np.where(counts, of_rows, 0.0) * w).sum() / divisor
            np.testing.assert_allclose(total, value, 1e-6)


@pytest.mark.parametrize("turn", range(4))
def test_bad_labels_of_small_rows(turn):
    """Whichever of a lane's rows it is, the first one is recorded; its results are NaN."""
    x = cases.logits((700, 3), float32)
    labels = cases.class_labels(700, 3)
    at = 5 + 128 * turn
    labels[at], labels[at + 100] = 3, -1
    loss, out, record = np.zeros(700, np.float32), empty_like(x), np.full(1, NONE)
    run("cross_entropy", {"x": x, "labels": labels, "loss": loss, "out": out}, 1, record=record)
    assert record[0] >> plans.BAD_BITS == at
    bad = (labels < 0) | (labels > 2)
    np.testing.assert_array_equal(np.isnan(loss), bad)
    np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(bad[:, None], x.shape))


def test_steps_beyond_32_bits():
    """Numbers and distances that 32 bits do not hold are other kernels'."""
    narrow = {}
    for rows, step, classes in [
        (10, 8, 2), (2**31 - 2**10, 8, 2), (2**31, 8, 2), (10, 2**31, 2), (10, -(2**31), 2),
    ]:  # fmt: skip
        layouts = (("x", Layout("f4", (step, 4), True)), ("labels", Layout("i8", (8,), True)))
        layouts += (("loss", Layout("f4", (4,), True)),)
        made = plan("cross_entropy", (), (rows, classes), 1, "f4", layouts)
        narrow[rows, step] = dict(made.steps[0].spec.params)["narrow"]
    assert list(narrow.values()) == [True, False, False, False, False]


def test_labels_that_32_bits_do_not_hold():
    """A label that would be a class if it were cut to them is none."""
    x = cases.logits((40, 3), float32)
    for dtype, label in [(np.int64, 2**32), (np.uint64, 2**63), (np.int64, -(2**32) + 1)]:
        labels = np.ones(40, dtype)
        labels[9] = label
        loss, record = np.zeros(40, np.float32), np.full(1, NONE)
        run("cross_entropy", {"x": x, "labels": labels, "loss": loss}, 1, record=record)
        np.testing.assert_array_equal(np.isnan(loss), np.arange(40) == 9)
        assert record[0] >> plans.BAD_BITS == 9


def compute_of_loss(dtype):
    return float64 if dtype == float64 else float32


def test_sums_of_what_is_not_finite():
    x = cases.logits((100, 3), float64)
    labels = cases.class_labels(100, 3)
    for value, want in [(-np.inf, np.inf), (np.nan, np.nan)]:
        x[[40, 41], labels[40]] = value
        labels[41] = labels[40]
        loss = np.zeros(())
        run("cross_entropy", {"x": x, "labels": labels, "loss": loss}, 1, reduction="sum")
        np.testing.assert_equal(loss, want)


@pytest.mark.parametrize("reduction, value", [("sum", 0.0), ("mean", np.nan), ("none", None)])
def test_no_rows(reduction, value):
    x, labels = np.zeros((0, 5), np.float32), np.zeros(0, np.int64)
    loss = np.full(0 if reduction == "none" else (), 7, np.float32)
    run("cross_entropy", {"x": x, "labels": labels, "loss": loss}, 1, reduction=reduction)
    if value is not None:
        np.testing.assert_equal(loss, np.float32(value))


# --- labels --------------------------------------------------------------------------------------


@cases.dtypes(*cases.INTEGERS)
def test_every_type_of_label(dtype):
    x = cases.logits((40, 100))
    labels = cases.class_labels(40, 100, dtype)
    ignored = np.iinfo(dtype).max if dtype.kind == "u" else -7
    labels[[3, 9]] = ignored
    loss, out = np.full(40, 7, np.float32), empty_like(x)
    arrays = {"x": x, "labels": labels, "loss": loss, "out": out}
    bits = int(np.array(ignored, dtype).astype(np.int64))
    run("cross_entropy", arrays, 1, ignores=True, ignore_index=bits)
    options = {"ignore_index": int(ignored), "reduction": "none"}
    close(loss, reference.cross_entropy(x, labels, **options), float32)
    close(out, reference.cross_entropy_backward(np.ones(40), x, labels, **options), float32)


@pytest.mark.parametrize(
    "dtype, label, value",
    [
        (np.int64, -1, -1),
        (np.int8, 5, 5),
        (np.int64, 2**40, 2**23 - 1),
        (np.int64, -(2**40), -(2**23)),
        (np.uint64, 2**64 - 100, 2**23 - 1),
        (np.uint8, 255, 255),
    ],
)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_bad_labels(dtype, label, value, reduction):
    """NaN for the row, nothing read out of bounds, and the first such row on record."""
    x = cases.logits((9, 5))
    labels = cases.class_labels(9, 5, np.int64).astype(dtype)
    labels[[4, 7]] = label
    record = np.full(1, NONE)
    loss = np.full(9 if reduction == "none" else (), 7, np.float32)
    out = empty_like(x)
    arrays = {"x": x, "labels": labels, "loss": loss, "out": out}
    call = {"reduction": reduction, "record": record}
    # −100 as a uint64 label is not ignored: the host says that no label can be.
    if np.dtype(dtype).kind == "i":
        call |= {"ignores": True, "ignore_index": -100}
    run("cross_entropy", arrays, 1, **call)
    bad = np.isin(np.arange(9), [4, 7])
    np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(bad[:, None], (9, 5)))
    np.testing.assert_array_equal(np.isnan(loss), bad if reduction == "none" else True)
    bits = plans.BAD_BITS
    assert record[0] >> bits == 4
    assert (int(record[0]) & (1 << bits) - 1) == value % (1 << bits)
    for operation, of in (("nll", "x"), ("nll_backward", "out")):
        arrays = {"labels": labels, "x" if of == "x" else "out": x if of == "x" else out}
        arrays |= {"loss": loss} if of == "x" else {}
        record[0] = NONE
        run(operation, arrays, 1, of=of, **call)
        assert record[0] >> bits == 4


# --- rows that pass through shared memory ---------------------------------------------------------

# Odd and even, of 1 to 16 lanes; of groups of 1 to 16 bytes.
STAGED = {
    "f4": [9, 10, 12, 16, 21, 30, 31, 32, 33, 50, 65, 127],
    "f8": [5, 6, 7, 8, 10, 16, 17, 31],
    "half": [17, 18, 21, 24, 32, 33, 40, 41, 50, 65, 76, 100, 129, 257, 513],
}
ROWS = 1, 2, 31, 33, 127, 129, 257


def modes_of(made):
    return dict(dict(made.steps[-1].spec.params)["modes"])


def every_staged():
    for dtype in cases.FLOATS:
        for classes in STAGED[family(dtype)]:
            yield pytest.param(dtype, classes, id=f"{dtype}-{classes}")


@pytest.mark.parametrize("dtype, classes", list(every_staged()))
def test_rows_of_a_tile(dtype, classes):
    """Tiles that are full or not, by their last bytes as well: the bits of rows by themselves."""
    whole = cases.logits((max(ROWS), classes), dtype, scale=4.0)
    apart, across = placed(whole, 1), np.ascontiguousarray(whole.T)
    want, columns = empty_like(apart), empty_like(across)
    made = run("log_softmax", {"x": apart, "out": want}, 1)
    assert "staged" not in modes_of(made).values()
    run("log_softmax", {"x": across, "out": columns}, 0)
    assert cases.same_bits(columns.T, want)
    for rows in ROWS:
        x = placed(whole[:rows], 0)
        area = np.full((rows + 2) * classes * x.itemsize + 64, 7, np.uint8)
        start = -area.__array_interface__["data"][0] % 16 + 16
        out = area[start : start + x.nbytes].view(dtype).reshape(x.shape)
        made = run("log_softmax", {"x": x, "out": out}, 1)
        if rows > 1:
            assert modes_of(made) == {"x": "staged", "out": "staged"}
        assert cases.same_bits(out, want[:rows])
        assert np.all(area[:start] == 7) and np.all(area[start + x.nbytes :] == 7)
        run("log_softmax", {"x": x, "out": x}, 1)
        assert cases.same_bits(x, want[:rows])


ANYWHERE = {  # of which aligned ones are read and written at once
    "f4": [*STAGED["f4"], 64, 100, 128],
    "f8": [*STAGED["f8"], 32, 64],
    "half": [*STAGED["half"], 64, 130, 256, 904, 1000],
}


LITTLE_NEW = [(float16, n) for n in ANYWHERE["half"] if n != 65]
LITTLE_NEW += [(bfloat16, 257), (bfloat16, 904)]


@pytest.mark.parametrize(
    "dtype, classes",
    [
        pytest.param(*one, id=f"{one[0]}-{one[1]}", marks=SLOW if one in LITTLE_NEW else [])
        for one in ((t, n) for t in cases.FLOATS for n in ANYWHERE[family(t)])
    ],
)
def test_rows_of_a_tile_that_starts_anywhere(dtype, classes, take):
    """At some distances from 16 bytes, results at others: what lies beside them stays."""
    whole, each = cases.logits((129, classes), dtype, scale=4.0), 16 // dtype.itemsize
    want = empty_like(whole)
    run("log_softmax", {"x": whole, "out": want}, 1)
    take(realigned=True)
    for rows, shift in itertools.product((2, 31, 127, 129), {1, each // 2, each - 1}):
        x = placed(whole[:rows], shift)
        for other in {0, shift, 3 * shift % each}:
            area = placed(np.full(rows * classes + 40, 7, dtype), other)
            out = area[each:-each][: x.size].reshape(x.shape)
            made = run("log_softmax", {"x": x, "out": out}, 1)
            assert modes_of(made)["x"] == "staged anywhere"
            assert cases.same_bits(out, want[:rows])
            out[...] = 7
            assert (area == 7).all()
        run("log_softmax", {"x": x, "out": x}, 1)
        assert cases.same_bits(x, want[:rows])


SECTOR_WIDE = (
    (float32, 66), (float32, 126), (float32, 201), (bfloat16, 132), (bfloat16, 450),
    (bfloat16, 510), (float64, 33), (float64, 63),
)  # fmt: skip
"""Rows whose lanes have a sector of 32 bytes between them, in parts of 16."""


@pytest.mark.parametrize("dtype, classes", SECTOR_WIDE)
def test_lanes_that_write_parts_of_a_sector(dtype, classes):
    """They are copied where results are written; what is only reduced is read where it lies."""
    x = cases.logits((131, classes), dtype, scale=4.0)
    for operation in "log_softmax", "softmax", "cross_entropy":
        found = []
        for offset in 0, 1:
            arrays, options = {"x": placed(x, offset), "out": placed(x, offset)}, {}
            if operation == "cross_entropy":
                labels = cases.class_labels(131, classes)
                arrays |= {"labels": labels, "loss": np.full(131, 7, compute_of_loss(dtype))}
                options = {"ignores": True, "ignore_index": -100}
            made = run(operation, arrays, 1, **options)
            assert (set(modes_of(made).values()) == {"staged"}) == (offset == 0)
            found.append(arrays)
        for name in set(found[0]) - {"x", "labels"}:
            assert cases.same_bits(found[0][name], found[1][name])
    made = run("logsumexp", {"x": placed(x, 0), "row_lse": np.empty(131)}, 1)
    assert modes_of(made)["x"] == ("whole" if classes % 2 == 0 else "single")


def staged_calls(x, y, labels):
    """(operation, arrays, options) of all that is staged, y probabilities or an output."""
    rows = len(x)
    kind = compute_of_loss(x.dtype)
    ignores = {"ignores": True, "ignore_index": -100}
    loss, lse = np.full(rows, 7, kind), np.linspace(8, 9, rows)
    yield "softmax", {"x": x, "out": x}, {}
    yield "logsumexp", {"x": x, "row_lse": loss}, {}
    yield "log_softmax_backward", {"x": x, "y": y, "out": x}, {}
    yield "softmax_backward", {"x": x, "y": y, "out": y}, {}
    yield "cross_entropy", {"x": x, "labels": labels, "loss": loss}, ignores
    yield "cross_entropy", {"x": x, "labels": labels, "loss": loss, "out": x}, ignores
    given = {"x": x, "labels": labels, "row_lse": lse, "out": x}
    yield "cross_entropy", given, {"given": True, **ignores}
    smooth = {"smooth": True, "keep": 0.9, "spread": 0.1 / x.shape[1], **ignores}
    weight = cases.class_weights(x.shape[1], np.float32)
    weighted = {"x": x, "labels": labels, "weight": weight, "loss": loss, "out": x}
    yield "cross_entropy", weighted, smooth
    yield "cross_entropy", {"x": x, "y": y, "loss": loss, "out": x}, {"soft": True}
    yield "nll_backward", {"labels": labels, "out": x}, ignores


HALVED = 7, 8
"""Those with half as many elements a lane, so that some rows have too many lanes for it."""


@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("classes", [10, 21, 32, 65, 1000])
@cases.dtypes(float32, bfloat16)
def test_all_that_is_done_in_tiles(dtype, classes, number, take):
    """Every operation, in place: the bits of rows that start anywhere, which need not be staged."""
    rows = 131
    found = []
    for offset, anywhere in (0, False), (1, False), (3, True):
        take(realigned=anywhere)
        x = placed(cases.logits((rows, classes), dtype, scale=4.0), offset)
        y = placed(cases.probabilities((rows, classes), 1, np.float32).astype(dtype), offset)
        labels = cases.class_labels(rows, classes)
        labels[5::9] = -100
        x[5, 0] = np.nan  # of an ignored row
        operation, arrays, call = list(staged_calls(x, y, labels))[number]
        made = run(operation, arrays, 1, of="x" if "x" in arrays else "out", **call)
        staged = {"staged", "staged anywhere"} & set(modes_of(made).values())
        if number not in HALVED or (offset and not anywhere):
            mode = "staged anywhere" if anywhere else "staged"
            there = (offset == 0 or anywhere) and 32 < classes * x.itemsize
            there = there and (classes < 1000 or (anywhere and dtype == bfloat16))
            assert staged == {mode} if there else not staged
        found.append(arrays)
    for name in ("out", "loss", "row_lse"):
        if name in found[0]:
            for other in found[1:]:
                assert cases.same_bits(found[0][name], other[name]), name


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("classes", [33, 65, 130, 500, 513, 1000])
@cases.dtypes(bfloat16, float32)
def test_sums_over_rows_of_a_tile(dtype, classes, reduction, take):
    """Rows of 2 to 32 lanes: the losses' sum and gradients of rows that lie apart."""
    rows = 70
    logits, labels = cases.logits((rows, classes), dtype), cases.class_labels(rows, classes)
    apart = np.full((rows, classes + 1), 7, dtype)[:, :classes]
    apart[...] = logits
    found = []
    for x, anywhere in (apart, False), (placed(logits, 0), False), (placed(logits, 3), True):
        take(realigned=anywhere)
        loss, out = np.full((), 7, np.float32), empty_like(np.ascontiguousarray(x))
        results = {"loss": loss, "out": placed(out, offset_of(x))}
        call = {"reduction": reduction, "smooth": True} | smoothing_values(0.125, classes)
        run("cross_entropy", {"x": x, "labels": labels, **results}, 1, **call)
        found.append(results)
    for other in found[1:]:
        assert all(cases.same_bits(a, found[0][name]) for name, a in other.items())


@pytest.mark.parametrize("classes", [9, 17, 20, 21, 22, 28, 65])
@pytest.mark.parametrize("dtype, to", [(bfloat16, float32), (float32, float16), (float32, float64)])
def test_tiles_of_other_types(dtype, to, classes, take):
    """Results that are wider or narrower than what is read have a tile of their own."""
    found = []
    for offset, anywhere in (0, False), (1, False), (1, True):
        take(realigned=anywhere)
        x = placed(cases.logits((131, classes), dtype, scale=4.0), offset)
        out = placed(np.full(x.shape, 7, to), offset)
        made = run("log_softmax", {"x": x, "out": out}, 1, elem=compute_of(to))
        assert ("staged" in modes_of(made).values()) == (offset == 0)
        assert ("staged anywhere" in modes_of(made).values()) == anywhere
        found.append(out)
    for other in found[1:]:
        assert cases.same_bits(other, found[0])


@pytest.mark.parametrize("operation, dtype, classes", [
    *itertools.product(["log_softmax_backward"], [float64], [37, 101, 257, 501]),
    *itertools.product(["log_softmax_backward", "softmax_backward", "soft"],
                       [bfloat16], [150, 258, 450, 501, 900]),
    *itertools.product(["log_softmax_backward", "softmax_backward"],
                       [float32], [7, 106, 129, 150, 501, 1022]),
    ("log_softmax_backward", bfloat16, 7), ("softmax_backward", bfloat16, 7),
    ("soft", float32, 129), ("soft", float64, 101),
])  # fmt: skip
def test_rows_whose_second_array_would_come_late(operation, dtype, classes):
    """They are copied, however many lanes they have; bits are those of rows that are not."""
    found = []
    for offset in 0, 1:
        rows = 70
        x = placed(cases.logits((rows, classes), dtype, scale=4.0), offset)
        y = placed(cases.probabilities((rows, classes), 1, np.float32).astype(dtype), offset)
        arrays = {"x": x, "y": y, "out": x}
        if operation == "soft":
            arrays |= {"loss": np.full(rows, 7, compute_of_loss(dtype))}
            made = run("cross_entropy", arrays, 1, soft=True)
        else:
            made = run(operation, arrays, 1)
        assert (set(modes_of(made).values()) == {"staged"}) == (offset == 0)
        found.append(arrays)
    for name in set(found[0]) - {"x", "y"}:
        assert cases.same_bits(found[0][name], found[1][name])


@pytest.mark.parametrize("dtype, classes", [*every_staged(), *SECTOR_WIDE])
def test_lanes_meet_in_few_banks(dtype, classes, monkeypatch):
    """What a warp asks of shared memory at once lies in other banks, or two to a bank."""
    seen = []

    def note(machine, address, width, mask):
        lanes = min(WARP, 128 // max(4, width))  # that are served at once
        at, mask = (np.broadcast_to(v, machine.shape).reshape(-1, lanes) for v in (address, mask))
        for places, there in zip(at[:16], mask[:16], strict=True):
            words = places[there][:, None] // 4 + np.arange(max(1, width // 4))
            seen.append(np.bincount(np.unique(words) % 32, minlength=32).max())

    class Watched(emulator.Emulator):
        def shared_load(self, address, size, count, mask, fill):
            note(self, address, size * count, True if mask is None else mask)
            return super().shared_load(address, size, count, mask, fill)

        def shared_store(self, address, size, words, mask, peer):
            note(self, address, size * len(words), mask)
            super().shared_store(address, size, words, mask, peer)

    monkeypatch.setattr(emulator, "Emulator", Watched)
    x = placed(cases.logits((256, classes), dtype), 0)
    run("log_softmax", {"x": x, "out": x}, 1)
    # Of rows of 8 lanes a block has too few to choose from.
    assert 1 <= max(seen) <= (3 if classes == 257 else 2)


@pytest.mark.parametrize(
    "dtype, classes, rows", [(float32, 49, 64), (float32, 65, 32), (bfloat16, 95, 64)]
)
def test_a_tile_takes_no_more_than_its_rows(dtype, classes, rows):
    """What of L1 it leaves is for loads in flight."""
    x = cases.logits((1000, classes), dtype)
    made = run("log_softmax", {"x": placed(x, 0), "out": empty_like(placed(x, 0))}, 1)
    assert modes_of(made) == {"x": "staged", "out": "staged"}
    size = rows * classes * x.itemsize
    assert size <= made.steps[0].shared < size + 128


def test_who_passes_through_shared_memory():
    """Short rows without gaps between them that start at 16 bytes, of few lanes."""

    def modes(dtype, classes, step=None, aligned=True, anywhere=False, rows=1000):
        kind, size = kind_of(np.dtype(dtype)).kind, np.dtype(dtype).itemsize
        array = Layout(kind, ((step or classes) * size, size), aligned)
        arrays = ("x", array), ("out", array)
        shape, machine = (rows, classes), Machine(realigned=anywhere)
        made = plan("log_softmax", (), shape, 1, compute_of(dtype), arrays, machine)
        assert made.steps[0].shared <= BLOCK * WIDE
        return set(modes_of(made).values())

    for dtype, classes in [(bfloat16, 17), (bfloat16, 513), (float32, 9), (float32, 65)]:
        assert modes(dtype, classes) == {"staged"}
        assert "staged" not in modes(dtype, classes, aligned=False)
        assert modes(dtype, classes, aligned=False, anywhere=True) == {"staged anywhere"}
        assert "staged" not in modes(dtype, classes, step=classes + 1)
        assert "single" in modes(dtype, 1 + classes // 2 * 2, 2000, aligned=False, anywhere=True)
    for dtype, classes in [
        (bfloat16, 16), (bfloat16, 88), (bfloat16, 256), (bfloat16, 1025), (bfloat16, 2049),
        (float32, 8), (float32, 64), (float32, 128), (float32, 257),
    ]:  # fmt: skip
        assert "staged" not in modes(dtype, classes)
        # Nor rows that are read one by one, or by more than a warp, or of a sector.
        there = (bfloat16, 88), (bfloat16, 256), (float32, 64), (float32, 128)
        found = modes(dtype, classes, aligned=False, anywhere=True)
        assert (found == {"staged anywhere"}) == ((dtype, classes) in there)
    assert modes(float32, 512, aligned=False, anywhere=True) == {"shifted"}


# --- layouts -------------------------------------------------------------------------------------

BATCHES = [((6,), 1), ((40,), 0), ((3, 17), 1), ((2, 3, 5), 1), ((2, 3, 5), 3), ((4, 9), 0)]


@pytest.mark.parametrize("batch, axis", BATCHES, ids=str)
@cases.dtypes(float32, float64, bfloat16)
@pytest.mark.parametrize("classes", [3, 21, 65, 100, 300, 1000])
def test_same_bits_in_every_layout(dtype, classes, batch, axis):
    """A row's bits do not depend on where it lies: rows, columns, strided, reversed, padded."""
    shape = (*batch[:axis], classes, *batch[axis:])
    x = cases.logits(shape, dtype, scale=4.0)
    rows = np.ascontiguousarray(np.moveaxis(x, axis, -1))
    want = empty_like(rows)
    run("log_softmax", {"x": rows, "out": want}, rows.ndim - 1)
    want = np.moveaxis(want, -1, axis)
    for layout in ("ascontiguousarray", "fortran", "reversed_all", "every_other_last"):
        given = cases.ZOO[layout](x)
        out = cases.filled_like(cases.ZOO[layout], shape, dtype)
        run("log_softmax", {"x": given, "out": out}, axis)
        assert cases.same_bits(out, want), layout
    out = empty_like(x)
    run("log_softmax", {"x": cases.fortran(x), "out": out}, axis)
    assert cases.same_bits(out, want)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("batch, axis", BATCHES, ids=str)
@pytest.mark.parametrize("classes", [3, 21, 300])
def test_losses_in_every_layout(classes, batch, axis, soft):
    shape = (*batch[:axis], classes, *batch[axis:])
    x = cases.logits(shape, float32, scale=4.0)
    labels = cases.probabilities(shape, axis) if soft else cases.class_labels(batch, classes)
    weight = cases.class_weights(2 * classes)[::2]
    rows = np.ascontiguousarray(np.moveaxis(x, axis, -1))
    row_labels = np.ascontiguousarray(np.moveaxis(labels, axis, -1)) if soft else labels
    call = {"soft": soft, "smooth": True, "reduction": "mean"} | smoothing_values(0.125, classes)

    def step(x, labels, axis):
        loss, out = np.zeros((), np.float32), np.full(x.shape, 7, np.float32)
        arrays = {"x": x, "y" if soft else "labels": labels, "weight": weight}
        run("cross_entropy", {**arrays, "loss": loss, "out": out}, axis, **call)
        return loss, out

    want_loss, want = step(rows, row_labels, rows.ndim - 1)
    for layout in ("ascontiguousarray", "fortran", "reversed_all", "every_other_last"):
        keeper = cases.ZOO[layout]
        loss, out = step(keeper(x), keeper(labels), axis)
        assert cases.same_bits(out, np.moveaxis(want, -1, axis)), layout
        assert cases.same_bits(loss, want_loss), layout


@pytest.mark.parametrize("classes", [1100, 2100])
@cases.dtypes(float32, float64, bfloat16)
def test_columns_of_several_parts(dtype, classes):
    """Rows of two to five parts that a block holds, by blocks: the bits of contiguous ones."""
    x = cases.logits((classes, 9), dtype, scale=4.0)
    rows = np.ascontiguousarray(x.T)
    labels = cases.class_labels(9, classes)
    for operation, given in [("softmax", {}), ("cross_entropy", {"labels": labels})]:
        want, out = empty_like(rows), empty_like(x)
        run(operation, {"x": rows, "out": want, **given}, 1)
        made = run(operation, {"x": x, "out": out, **given}, 0)
        assert dict(made.steps[-1].spec.params)["walker"] == "columns"
        assert cases.same_bits(out.T, want)


@pytest.mark.parametrize("operation", ["softmax", "cross_entropy"])
@cases.dtypes(float32, float64)
def test_columns_in_chunks(dtype, operation, small_chunks):
    """Rows in chunks, side by side or strided: the bits of contiguous ones."""
    for classes in (5, 128, 300):
        x = cases.logits((classes, 9), dtype, scale=4.0)
        rows = np.ascontiguousarray(x.T)
        extra = {"y": cases.probabilities(x.T.shape, 1, dtype)} if operation != "softmax" else {}
        across = {n: np.ascontiguousarray(a.T) for n, a in extra.items()}
        call = {"soft": True} if extra else {}
        want, out, apart = (
            empty_like(rows),
            empty_like(x),
            np.zeros((9, 2 * classes), dtype)[:, ::2],
        )
        run(operation, {"x": rows, "out": want, **extra}, 1, **call)
        run(operation, {"x": x, "out": out, **across}, 0, **call)
        assert cases.same_bits(out.T, want)
        run(operation, {"x": rows, "out": apart, **extra}, 1, **call)
        assert cases.same_bits(apart, want)


# --- neighbouring rows of columns ----------------------------------------------------------------


@pytest.fixture
def many_rows(monkeypatch, take):
    """Of rows side by side lanes have several, as if there were enough to fill a machine."""
    take(abreast=True)
    monkeypatch.setattr(ways, "FULL", 0)
    plan.cache_clear()
    yield
    plan.cache_clear()


def together_of(made):
    return {dict(s.spec.params)["together"] for s in made.steps if "part" in dict(s.spec.params)}


def odd_rows(rows, classes, dtype):
    """Logits with what there is of odd ones, in all places of a word."""
    x = cases.logits((rows, classes), dtype, scale=4.0)
    x[3, classes // 2] = np.nan
    x[130], x[261], x[-1] = -np.inf, 1.0, 2.0
    x[260, ::2] = -np.inf
    x[5, 0] = np.inf
    return x


TOGETHER = {  # (float32, halves, float64), without labels
    2: (4, 4, 2),
    3: (4, 4, 2),
    5: (2, 4, 1),
    8: (2, 4, 1),
    21: (2, 4, 1),
    64: (2, 2, 1),
    100: (2, 2, 1),
}


@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize("classes", TOGETHER)
@cases.dtypes(float32, float64, bfloat16)
def test_neighbouring_rows(dtype, classes, number, many_rows):
    """A lane has several: ignored, odd and bad ones among them, as if each were alone."""
    rows = 540  # the last block is not full
    x = odd_rows(rows, classes, dtype)
    y = cases.probabilities(x.shape, 1, dtype)
    calls = long_row_calls(x.astype(np.float64), y)
    labels = cases.class_labels(rows, classes)
    calls.append(("nll_backward", {"labels": labels}, ("out",), {}))
    operation, inputs, results, call = calls[number]
    labels = inputs.get("labels", labels)
    labels[[1, 130, 402]] = -100
    if operation == "nll_backward":
        call = {"ignores": True, "ignore_index": -100}
    of = {"of": "out" if operation == "nll_backward" else "x", "elem": compute_of(dtype)}
    found = []
    for axis, wide in ((1, placed(x, 0)), (0, placed(x.T, 0))):
        given = {n: placed(a if axis else a.T, 0) if n == "y" else a for n, a in inputs.items()}
        got = {n: np.full(rows, 7.0, np.float64) for n in results if n != "out"}
        if "out" in results:
            got["out"] = empty_like(wide)
        if operation != "nll_backward":
            given["x"] = wide
        made = run(operation, {**given, **got}, axis, **of, **call)
        found.append(got | ({"out": got["out"].T} if not axis and "out" in got else {}))
    whole = ("f4", "half", "f8").index(family(dtype))
    (together,) = together_of(made)
    assert 1 <= together <= TOGETHER[classes][whole]
    if operation in ("log_softmax", "softmax", "logsumexp"):
        assert together == TOGETHER[classes][whole]
    for name, want in found[0].items():
        assert cases.same_bits(found[1][name], want), name


@pytest.mark.parametrize("shape, axis, inside, halves, single", [
    ((21, 536), 0, (21, 536), 4, 2),
    ((21, 538), 0, (21, 538), 2, 2),
    ((21, 537), 0, (21, 537), 1, 1),
    ((21, 544), 0, (21, 535), 1, 1),  # rows of an odd number
    ((21, 544), 0, (21, 534), 2, 2),
    ((21, 538), 0, (21, 536), 2, 2),  # classes that are not as many whole words apart
    ((21, 537), 0, (21, 536), 1, 1),
    ((2, 21, 8, 68), 1, (2, 21, 8, 68), 4, 2),
    ((2, 21, 8, 68), 1, (2, 21, 7, 66), 2, 2),  # a batch of three axes
    ((2, 21, 8, 67), 1, (2, 21, 8, 66), 1, 1),
    ((3, 2, 9, 40), 1, (3, 2, 8, 36), 4, 4),
], ids=str)  # fmt: skip
@cases.dtypes(float32, bfloat16)
def test_which_rows_are_read_together(dtype, shape, axis, inside, halves, single, many_rows):
    """As many as one access may be of, wherever they lie; what lies between them stays."""
    cut = tuple(slice(n) for n in inside)
    wide = placed(cases.logits(shape, dtype, scale=4.0), 0)
    out, x = empty_like(wide), wide[cut]
    made = run("log_softmax", {"x": x, "out": out[cut]}, axis)
    assert together_of(made) == {single if dtype == float32 else halves}
    rows = placed(np.moveaxis(x, axis, -1), 0)
    want = empty_like(rows)
    run("log_softmax", {"x": rows, "out": want}, rows.ndim - 1)
    assert cases.same_bits(out[cut], np.moveaxis(want, -1, axis))
    out[cut] = 7
    assert (out == 7).all()
    for arrays in (
        {"x": placed(wide, 1)[cut], "out": out[cut]},
        {"x": x, "out": placed(out, 1)[cut]},
    ):
        out[cut] = 0
        assert together_of(run("log_softmax", arrays, axis)) == {1}
        assert cases.same_bits(arrays["out"], np.moveaxis(want, -1, axis))
    mixed = np.zeros(shape, float32 if dtype == bfloat16 else bfloat16)
    made = run("log_softmax", {"x": x, "out": placed(mixed, 0)[cut]}, axis, "f4")
    assert together_of(made) == {single}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("classes", [2, 8, 21, 100])
@cases.dtypes(float32, float64, bfloat16)
def test_losses_of_neighbouring_rows(dtype, classes, reduction, many_rows):
    """Added in the same tree; with and without a gradient, in one batch axis and in several."""
    shape = (3, classes, 6, 40)
    x = cases.logits(shape, dtype, scale=4.0)
    labels, weight = cases.class_labels((3, 6, 40), classes), cases.class_weights(classes, dtype)
    labels[1, 2, :7] = -100
    kind, found = compute_of_loss(dtype), []
    for axis in (3, 1):
        given = placed(np.moveaxis(x, 1, axis), 0)
        for results in ("loss",), ("loss", "out"):
            got = {"loss": np.zeros((), kind), "out": empty_like(given)}
            arrays = {"x": given, "labels": labels, "weight": weight}
            arrays |= {n: got[n] for n in results}
            call = {"ignores": True, "ignore_index": -100, "reduction": reduction}
            made = run("cross_entropy", arrays, axis, **call)
            found.append((got["loss"], np.moveaxis(got["out"], axis, 1)))
            if axis == 1 and dtype != float64 and (classes < 100 or results == ("loss",)):
                assert together_of(made) == {4 if classes == 2 else 2}
    for loss, _ in found[1:]:
        assert cases.same_bits(loss, found[0][0])
    assert cases.same_bits(found[3][1], found[1][1])


@pytest.mark.parametrize("classes", [2, 21, 48])
@cases.dtypes(float32, bfloat16)
def test_one_value_of_neighbouring_rows(dtype, classes, many_rows):
    """Labels, gradients, losses of any type, that may be read at once or not."""
    x = placed(cases.logits((classes, 520), dtype, scale=4.0), 0)

    def lie(n, values):
        """So many as are wanted: aligned, not aligned, every other one, backwards."""
        if n < 2:
            return placed(values, n)
        return placed(np.repeat(values, 2), 0)[::2] if n == 2 else placed(values[::-1], 0)[::-1]

    found = []
    for n, label in itertools.product(range(4), (np.int8, np.int32, np.int64)):
        labels, scale = cases.class_labels(520, classes, label), cases.logits((520,), float32)
        labels, scale = lie(n, labels), lie(n, scale)
        got = {"loss": lie(n, np.full(520, 7.0, float32)), "out": empty_like(x)}
        if label == np.int32:
            got["row_lse"] = lie(n, np.full(520, 7.0, float64))
        made = run("cross_entropy", {"x": x, "labels": labels, **got}, 0)
        dense = {"loss", "labels", "row_lse"} & {*got, *(["labels"] if label != np.int8 else [])}
        params = dict(made.steps[-1].spec.params)
        assert set(params["dense"]) == (dense if n == 0 else set())
        again = empty_like(x)
        lse = {"row_lse": lie(n, np.full(520, 7.0, float64))}
        run("logsumexp", {"x": x, **lse}, 0)
        given = {"x": x, "labels": labels, **lse, "row_scale": scale, "out": again}
        run("cross_entropy", given, 0, given=True)
        if label == np.int32:
            assert cases.same_bits(got.pop("row_lse"), lse["row_lse"])
        found.append([*got.values(), *lse.values(), again])
    for other in found[1:]:
        assert all(map(cases.same_bits, other, found[0]))


def test_bad_labels_of_neighbouring_rows(many_rows):
    """The first of them is recorded, by its number in the batch; its results are NaN."""
    x = cases.logits((3, 8, 16, 24), bfloat16)
    labels = cases.class_labels((3, 16, 24), 8)
    labels[1, 3, [7, 9]], labels[2] = (8, -3), 99
    record, loss, out = np.full(1, NONE), np.full(labels.shape, 7, np.float32), empty_like(x)
    arrays = {"x": x, "labels": labels, "loss": loss, "out": out}
    made = run("cross_entropy", arrays, 1, record=record)
    assert together_of(made) == {2}
    first = 16 * 24 + 3 * 24 + 7
    assert record[0] >> plans.BAD_BITS == first and record[0] & 0xFF == 8
    bad = (labels < 0) | (labels > 7)
    np.testing.assert_array_equal(np.isnan(loss), bad)
    np.testing.assert_array_equal(np.isnan(out.astype(np.float32)).any(axis=1), bad)


def test_few_rows_are_not_taken_together():
    """Every lane that there can be is needed."""
    for rows, together in ((1 << 10, 1), (1 << 18, 1), (300_000, 2), (1 << 20, 4)):
        layouts = tuple((n, Layout("bf", (2 * rows, 2), True)) for n in ("x", "out"))
        for chosen in (1, together):
            machine = Machine(abreast=chosen > 1)
            made = plan("log_softmax", (), (21, rows), 0, "f4", layouts, machine)
            assert together_of(made) == {chosen}
            assert made.steps[0].grid == -(-rows // (128 * chosen))


@pytest.mark.parametrize("to", cases.FLOATS, ids=str)
@cases.dtypes(*cases.FLOATS, *cases.INTEGERS, cases.BOOL)
def test_conversions(dtype, to):
    """Every type to every type, without a detour: dtype= of the public functions."""
    elem = "f8" if float64 in (dtype, to) or dtype.kind in "iub" else "f4"
    for classes, axis in ((9, 1), (40, 0)):
        x = cases.logits((9, 40), dtype)
        out = np.full(x.shape, 7, to)
        run("log_softmax", {"x": x, "out": out}, axis, elem)
        close(out, reference.log_softmax(x, axis), to)
        del classes


WIDER = [(float16, float64), (float32, float64), (float16, float32), (bfloat16, float32)]


@pytest.mark.parametrize("dtype, to", WIDER)
def test_results_wider_than_what_is_read(dtype, to):
    """Results that start anywhere, in groups of more than 16 bytes but for what is held as such."""
    elem = "f8" if to == float64 else "f4"
    x = cases.logits((2, 4608), dtype, scale=4.0)
    want = empty_like(x, to)
    run("log_softmax", {"x": x, "out": want}, 1, elem)
    close(want, reference.log_softmax(x, work=WORK), to)
    for offset in (1, 3):
        out = placed(want, offset)
        out[...] = 7
        made = run("log_softmax", {"x": placed(x, offset), "out": out}, 1, elem)
        assert modes_of(made)["out"] == ("shifted" if to == float64 else "single")
        assert cases.same_bits(out, want)


def test_halves_from_float64_round_once():
    """A float64 that lies just beside the middle of two halves."""
    y = np.full((2, 4), -np.inf)
    for to, step in ((float16, 2.0**-10), (bfloat16, 2.0**-7)):
        middle = 1.0 + step / 2
        x = np.array([[middle, middle + 2.0**-40, middle - 2.0**-40, 1.0]])
        x = np.concatenate([x, -x])
        out = np.zeros((2, 4), to)
        run("log_softmax_backward", {"x": x, "y": y, "out": out}, 1)
        want = np.array([1.0, 1.0 + step, 1.0, 1.0])
        np.testing.assert_array_equal(out.astype(np.float64), [want, -want])


# --- odd rows ------------------------------------------------------------------------------------


@cases.dtypes(*cases.FLOATS)
@pytest.mark.parametrize("classes", [1, 2, 5, 40, 1001, 33000])
def test_infinities_and_nan(dtype, classes):
    """NaN, +inf, all −inf and −inf among finite numbers; an ignored row of NaN."""
    x = np.zeros((6, classes), dtype)
    x[:, 0] = [np.nan, np.inf, -np.inf, -np.inf, 0, np.nan]
    x[2] = -np.inf
    out = empty_like(x)
    run("log_softmax", {"x": x, "out": out}, 1)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(reference.log_softmax(x)))
    close(out, reference.log_softmax(x), dtype)
    run("softmax", {"x": x, "out": out}, 1)
    close(out, reference.softmax(x), dtype)
    lse = np.zeros(6)
    run("logsumexp", {"x": x, "row_lse": lse}, 1)
    close(lse, reference.logsumexp(x), float32)
    labels = np.zeros(6, np.int64)
    labels[5] = -100
    loss = np.full(6, 7.0)
    arrays = {"x": x, "labels": labels, "loss": loss, "out": out}
    run("cross_entropy", arrays, 1, ignores=True, ignore_index=-100)
    close(loss, reference.cross_entropy(x, labels, reduction="none"), float32)
    assert loss[5] == 0
    assert np.all(out[5] == 0)
    assert np.all(np.isnan(out[:3].astype(np.float64)))


@pytest.mark.parametrize("operation", ["log_softmax", "softmax", "cross_entropy"])
@pytest.mark.parametrize("classes", [3, 100, 1001, 2048, 20000])
@cases.dtypes(float32, bfloat16)
def test_in_place(dtype, classes, operation):
    """The output may be the input itself, where whole vectors are not aligned too."""
    rows = rows_for(classes)
    for offset in (0, 1):
        x = placed(cases.logits((rows, classes), dtype), offset)
        labels = cases.class_labels(rows, classes)
        extra = {"labels": labels} if operation == "cross_entropy" else {}
        want, out = empty_like(x), x.copy()
        out = placed(x, offset)
        run(operation, {"x": x, "out": want, **extra}, 1)
        run(operation, {"x": out, "out": out, **extra}, 1)
        assert cases.same_bits(out, want)
        if operation == "cross_entropy":
            lse, out = reference.logsumexp(x), placed(x, offset)
            extra |= {"row_lse": lse}
            run(operation, {"x": x, "out": want, **extra}, 1, given=True)
            run(operation, {"x": out, "out": out, **extra}, 1, given=True)
            assert cases.same_bits(out, want)


# --- rows of halves that start anywhere ----------------------------------------------------------


def modes_of_rows(made):
    return set(dict(dict(made.steps[-1].spec.params)["modes"]).values())


def reference_softmax(x, log):
    wide = x.astype(float64)
    return (reference.log_softmax if log else reference.softmax)(wide, 1)


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("classes", [16_385, 16_390, 18_432, 20_479, 20_481, 22_532])
@pytest.mark.parametrize("realigned", [False, True])
@cases.dtypes(float16, bfloat16)
def test_long_rows_that_start_anywhere(dtype, realigned, classes, offset, take):
    """Of any number of classes, at any half, apart: right, nothing beside them written."""
    take(realigned=realigned)
    gap = (3 * offset + classes) % 11
    x = placed(cases.logits((3, classes + gap), dtype, scale=3.0), offset)[:, :classes]
    base = placed(np.full((3, classes + gap), 7, dtype), (5 * offset) % 8)
    out = base[:, :classes]
    made = run("log_softmax", {"x": x, "out": out}, 1)
    found = modes_of_rows(made)
    if realigned:
        aligned = classes % 8 == gap % 8 == offset == 0
        assert found <= ({"whole", "realigned"} if aligned else {"realigned"})
    else:
        assert found <= {"whole", "shifted", "single"}
    assert accuracy.errors(out, reference_softmax(x, True), dtype).max() <= 1.0
    assert np.all(base[:, classes:] == 7)


@pytest.mark.parametrize("classes", [16_385, 16_396, pytest.param(21_001, marks=SLOW)])
@pytest.mark.parametrize("number", range(11))
def test_all_that_is_done_with_realigned_rows(number, classes, take, dtype=bfloat16):
    """By every way, in place, at other places, columns and strided: the same bits."""
    take(realigned=True)
    x = cases.logits((3, classes), dtype, scale=4.0)
    y = cases.probabilities(x.shape, 1, dtype)
    operation, inputs, results, call = long_row_calls(x, y)[number]
    inputs = {n: a for n, a in inputs.items() if n != "weight"}  # of float32
    want, taken = None, set()

    def compare(found, by):
        for name, array in want.items():
            assert cases.same_bits(found[name], array), (name, by)

    def called(x, y, out, machine, axis=1):
        found = {n: np.full(3, 7.0) for n in results if n != "out"}
        arrays = {"x": x, **inputs, **found}
        arrays |= {"y": y} if "y" in inputs else {}
        found |= {"out": out} if "out" in results else {}
        return found, run(operation, arrays | found, axis, machine=machine, **call)

    for turn, machine in enumerate(
        (
            MACHINE,
            Machine(multiprocessors=1),
            Machine(multiprocessors=1, shared=34 << 10),
            Machine(multiprocessors=1, shared=0),
            Machine(multiprocessors=1, cluster=8, shared=48 << 10),
        )
    ):
        for in_place in (False, True):
            own, other = placed(x, turn), placed(y, 2 * turn)
            out = own if in_place else placed(np.full(x.shape, 7, dtype), 3 * turn % 8)
            found, made = called(own, other, out, machine)
            taken.add(dict(made.steps[-1].spec.params)["way"])
            assert "realigned" in modes_of_rows(made)
            want = want or found
            compare(found, (machine, in_place))
    across = np.ascontiguousarray(x.T), np.ascontiguousarray(y.T), np.full(x.T.shape, 7, dtype)
    found, _ = called(*across, MACHINE, 0)
    compare(found | ({"out": across[2].T} if "out" in results else {}), "columns")
    apart = [np.full((3, 2 * classes), 7, dtype)[:, ::2] for _ in range(3)]
    apart[0][...], apart[1][...] = x, y
    found, _ = called(*apart, MACHINE)
    compare(found, "strided")
    assert len(taken) >= (1 if call.get("given") or "out" not in results else 3)


@pytest.mark.parametrize("realigned", [False, True])
@pytest.mark.parametrize("classes", [16_385, 18_436])
def test_long_rows_of_special_values(classes, realigned, take, dtype=float16):
    """At the parts' ends: −inf, a NaN in one row, +inf in another, an ignored one."""
    take(realigned=realigned)
    x = placed(cases.logits((5, classes), dtype), 1)
    for at in (0, 7, 8, 255, 256, 2047, 2048, classes - 2, classes - 1):
        x[:, at] = -np.inf
    x[1, classes - 1], x[2, 2048] = np.nan, np.inf
    labels = np.array([2047, 5, 6, -100, classes - 1])
    out, loss = empty_like(x), np.full(5, 7.0)
    call = {"ignores": True, "ignore_index": -100}
    run("cross_entropy", {"x": x, "labels": labels, "loss": loss, "out": out}, 1, **call)
    wide = x.astype(float64)
    with np.errstate(invalid="ignore"):
        want = reference.softmax(wide, 1)
        lse = reference.logsumexp(wide)
    for row in (0, 4):
        assert loss[row] == np.inf and np.isfinite(lse[row])  # the label's logit is −inf
        want[row, labels[row]] -= 1.0
        assert accuracy.errors(out[row], want[row], dtype).max() <= 1.0
    assert np.isnan(out[1]).all() and np.isnan(loss[1])
    assert np.isnan(out[2]).all()
    assert loss[3] == 0 and not out[3].any()


def test_which_rows_are_realigned(take):
    """Long ones of halves alone that do not start and end at 16 bytes, whatever is made of them."""
    take(realigned=True)

    def modes(operation, x, out, axis=1, **more):
        return modes_of_rows(run(operation, {"x": x, "out": out, **more}, axis))

    for classes, want in ((16_384, {"whole"}), (16_383, {"single"}), (16_386, {"realigned"})):
        x = placed(cases.logits((2, classes), bfloat16), 0)
        assert modes("log_softmax", x, empty_like(x)) == want
    x = placed(cases.logits((2, 16_392), bfloat16), 1)
    assert modes("log_softmax", x, empty_like(x)) == {"realigned"}
    odd = cases.logits((2, 16_401), bfloat16)
    assert "realigned" not in modes("log_softmax", odd, empty_like(odd, float32))


# --- accuracy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", accuracy.FAMILIES)
@cases.dtypes(float32, float64)
def test_accuracy_of_hard_rows(dtype, name):
    """The rows on which subtraction, exp and log lose digits; the goals of the specification."""
    for classes in [2] if name == "[0, -30]" else [2, 3, 10, 1000, 40000]:
        rng = cases.generator(classes, *name.encode())
        x = accuracy.FAMILIES[name](rng, 3 if classes > 1000 else 40, classes).astype(dtype)
        logp = reference.log_softmax(x, work=WORK)
        p = np.exp(logp)
        out = empty_like(x)
        run("softmax", {"x": x, "out": out}, 1)
        assert accuracy.errors(out, p, dtype, flushed=True).max() <= 4.0
        labels = np.argmax(x.astype(np.float64), axis=1)
        index = np.arange(len(x)), labels
        loss = np.zeros(len(x), dtype)
        run("cross_entropy", {"x": x, "labels": labels, "loss": loss, "out": out}, 1)
        assert accuracy.errors(loss, -logp[index], dtype).max() <= 2.5
        want = p.copy()
        for row, label in enumerate(labels):
            want[row, label] = -np.sum(np.delete(p[row], label))
        assert accuracy.errors(out, want, dtype, flushed=True).max() <= 4.0
        targets = np.zeros_like(x)
        targets[index] = 1.0
        run("cross_entropy", {"x": x, "y": targets, "loss": loss, "out": out}, 1, soft=True)
        # What the peak comes to is made of two numbers: below the normal ones it has few digits.
        least = accuracy.smallest_normal(np.dtype(dtype))
        normal = np.abs(want) >= least
        errors = accuracy.errors(*(np.where(normal, v, 0) for v in (out, want)), dtype)
        assert errors.max() <= 4.0
        assert np.all(np.abs(out[~normal]) <= least)


HALF_ROWS = [
    (bfloat16, -2.0, name) for name in accuracy.FAMILIES
] + [
    (dtype, 2.0, name)
    for dtype in (bfloat16, float16)
    for name in accuracy.FAMILIES
    if dtype == bfloat16 or name not in ("offset 1e5", "scale 500")  # float16 ends at 65504
]  # fmt: skip


@pytest.mark.parametrize("dtype, off, name", HALF_ROWS)
def test_accuracy_of_hard_rows_of_halves(dtype, off, name, monkeypatch):
    """The bounds of the specification, with the hardware's exp2 as far off as it may be."""
    monkeypatch.setattr(emulator, "EXP2_ERROR", off)
    for classes in [2] if name == "[0, -30]" else [2, 10, 1000]:
        rows = accuracy.rows_of(name, classes, dtype)
        x, index, out = rows.x, np.arange(len(rows.x)), empty_like(rows.x)
        run("log_softmax", {"x": x, "out": out}, 1)
        assert accuracy.errors(out, rows.logp, dtype).max() <= 1.0
        for labels in list(accuracy.measured_labels(rows))[::2]:
            loss = np.zeros(len(x), float32)
            run("cross_entropy", {"x": x, "labels": labels, "loss": loss, "out": out}, 1)
            errors = accuracy.errors(loss, -rows.logp[index, labels], float32)
            assert np.all(errors <= 4 + accuracy.allowance(rows)[index, labels])
            want, _ = accuracy.label_gradient(rows, labels)
            assert accuracy.errors(out, want, dtype, flushed=True).max() <= 1.0


@pytest.mark.parametrize("dtype, off, name", HALF_ROWS)
def test_exponentials_that_are_taken_anew(dtype, off, name, small_chunks, monkeypatch):
    """For the halves of a long row: rounded once, the number that is rounded is nearly exact."""
    monkeypatch.setattr(emulator, "EXP2_ERROR", off)
    rows = accuracy.rows_of(name, 2 if name == "[0, -30]" else 1000, dtype)
    x, labels = rows.x, np.argmin(rows.x, axis=1)
    out, grad, given = (empty_like(x) for _ in range(3))
    run("softmax", {"x": x, "out": out}, 1)
    assert accuracy.errors(out, rows.p, dtype, flushed=True).max() <= 0.51
    run("cross_entropy", {"x": x, "labels": labels, "out": grad}, 1)
    want, _ = accuracy.label_gradient(rows, labels)
    assert accuracy.errors(grad, want, dtype, flushed=True).max() <= 0.51
    lse = rows.lse.astype(float64)
    run("cross_entropy", {"x": x, "labels": labels, "row_lse": lse, "out": given}, 1, given=True)
    assert accuracy.errors(given, want, dtype, flushed=True).max() <= 0.51


# --- the machine notices -------------------------------------------------------------------------


def broken(change):
    """A log_softmax of 3 rows of 200 with something spoiled in its arguments."""
    x, out = np.zeros((3, 200), np.float32), np.zeros((3, 200), np.float32)
    layouts = ("x", Layout("f4", x.strides, True)), ("out", Layout("f4", x.strides, True))
    step = plan("log_softmax", (), x.shape, 1, "f4", layouts).steps[0]
    made = plan("log_softmax", (), x.shape, 1, "f4", layouts).constants
    slots = {"x": x.ctypes.data, "out": out.ctypes.data, **made}
    change(slots)
    args = [slots[n] for n in step.args]
    emulate(kernel_of(step.spec), step.grid, step.block, args, [x, out], step.shared)


@pytest.mark.parametrize(
    "name, by, message",
    [
        ("x", 4, "misaligned"),
        ("rows", 1, "outside"),
        ("classes", 40, "outside|same place"),
        ("out_step0", -400, "same place|misaligned"),
    ],
)
def test_a_wrong_argument_is_noticed(name, by, message):
    def change(slots):
        slots[name] += by

    if name == "rows":  # as many as there are, read from one row further
        with pytest.raises(Fault, match=message):
            broken(lambda slots: slots.update(x=slots["x"] + 800))
        return
    with pytest.raises(Fault, match=message):
        broken(change)


def in_clusters(body, blocks=4, cluster=2, shared=64):
    """Run body(thread, address of the shared memory) for 32 threads a block."""

    def run_it(frame):
        body(frame.thread, device.dynamic_shared(frame.thread))

    emulate(device.Kernel("test", run_it, {}), blocks, 32, [], [], shared, cluster)


def tell(thread, address, peer, cluster=2):
    """Lane 0 writes the block's number in the cluster to a place of its own at another block."""
    rank = device.cluster_rank(thread)
    at = address + (rank << 3)
    v = device.convert(rank, "f8")
    device.shared_store(at, v, thread == 0, (rank + peer) & (cluster - 1))


def test_blocks_of_a_cluster_write_to_each_other():
    found = []

    def body(thread, address):
        device.cluster_barrier(thread)
        tell(thread, address, 1)
        device.cluster_barrier(thread)
        other = 1 - device.cluster_rank(thread)
        found.append(device.shared_load(address + (other << 3)).value[:, 0])

    in_clusters(body)
    np.testing.assert_array_equal(found, [[1, 0, 1, 0]])


@pytest.mark.parametrize(
    "steps, message",
    [
        ("write end", "may not have started"),
        ("wait write", "may end"),
        ("wait write read wait", "before it is written|without a barrier"),
        ("wait write sync read wait", "without a barrier"),
        ("wait write wait read write wait", "without a barrier"),
        ("wait beyond wait", "no such block"),
        ("wait outside wait", "out of bounds"),
    ],
)
def test_what_a_cluster_must_not_do(steps, message):
    def body(thread, address):
        other = 1 - device.cluster_rank(thread)
        do = {
            "wait": lambda: device.cluster_barrier(thread),
            "sync": lambda: device.barrier(thread),
            "write": lambda: tell(thread, address, 1),
            "read": lambda: device.shared_load(address + (other << 3)),
            "beyond": lambda: tell(thread, address, 1, cluster=4),
            "outside": lambda: tell(thread, address + 64, 1),
            "end": lambda: None,
        }
        for step in steps.split():
            do[step]()

    with pytest.raises(Fault, match=message):
        in_clusters(body)


def test_shared_memory_of_a_launch_has_an_end():
    with pytest.raises(Fault, match="out of bounds"):
        in_clusters(lambda _, address: device.shared_load(address + 60), cluster=1)
    with pytest.raises(Fault, match="bytes of shared memory"):
        in_clusters(lambda *_: None, cluster=1, shared=228 << 10)
    with pytest.raises(Fault, match="in clusters of"):
        in_clusters(lambda *_: None, cluster=3)


# --- who takes the parts -------------------------------------------------------------------------


def ways_of(classes, count, machine=MACHINE, size=4, numbers=3, maps=1, registers=None):
    part = partition(classes, size)
    shelf = 32 * part.vectors * part.group * size
    registers = registers or (64 if maps else ways.LANE_REGISTERS)
    found, _ = ways.launches(part, classes, count, numbers, shelf, maps, registers, False, machine)
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 12, 31, 32, 33])
def test_sums_are_of_neighbours_first(count):
    """Whatever the order in which the pairs are taken, they are those of level by level."""
    level = [str(i) for i in range(count)]
    found = device.tree(iter(level), lambda a, b: f"({a} {b})")
    while len(level) > 1:
        pairs = itertools.zip_longest(level[::2], level[1::2])
        level = [a if b is None else f"({a} {b})" for a, b in pairs]
    assert found == level[0]


def test_how_a_row_is_divided_depends_on_nothing_but_its_length():
    """Every element is in one part, whatever the number of rows and whatever is chosen."""
    for size in (2, 4, 8):
        for classes in [*range(1, 1300), *range(1300, 300_000, 97), 128256, 262144]:
            part = partition(classes, size)
            parts = part.parts(classes)
            held = part.span * parts
            assert held >= classes
            # No part is empty where several are full, and no lane has twice what it needs.
            assert part.chunks or held <= max(2 * classes, part.group) + 32 * part.group * parts
            assert part.span * size <= 4096
            # What a lane reads without a mask is there: of a row's only part, or of a full one.
            assert part.group * part.lanes * part.sure <= classes or not part.single
            assert part.sure <= part.vectors
            assert part.group > 1 or part.sure % 2 == 0  # two halves share a word


CLUSTERS = Machine(cluster=8)


@pytest.mark.parametrize(
    "classes, count, machine, stages, kept, cluster",
    [
        (1000, 1, MACHINE, ["all"], "registers", 1),
        (16384, 1, MACHINE, ["all"], "registers", 1),
        (128256, 1, MACHINE, ["reduce", "map"], "no", 1),
        (128256, 263, MACHINE, ["reduce", "map"], "no", 1),
        (128256, 264, MACHINE, ["all"], "partly", 1),
        (10_000_000, 264, MACHINE, ["reduce", "map"], "no", 1),
        (50_000, 1, MACHINE, ["reduce", "map"], "no", 1),
        (50_000, 264, MACHINE, ["all"], "shared", 1),
        (65_536, 264, MACHINE, ["all"], "shared", 1),
        (50_000, 264, Machine(shared=90 << 10), ["all"], "partly", 1),
        (20_000, 1, CLUSTERS, ["reduce", "map"], "no", 1),
        (16_385, 264, CLUSTERS, ["all"], "shared", 1),
        (50_000, 264, CLUSTERS, ["all"], "shared", 1),
        (73_448, 264, CLUSTERS, ["all"], "shared", 2),
        (65_536, 264, CLUSTERS, ["all"], "shared", 1),
        (128256, 263, CLUSTERS, ["reduce", "map"], "no", 1),
        (128256, 264, CLUSTERS, ["all"], "shared", 4),
        (262144, 300, CLUSTERS, ["all"], "shared", 8),
        (500_000, 300, CLUSTERS, ["all"], "partly", 1),
        (20_000, 1, Machine(together=True), ["all"], "registers", 1),
        (20_000, 300, Machine(together=True), ["all"], "shared", 1),
        (128256, 300, Machine(together=True), ["all"], "registers", 1),
        (262144, 300, Machine(together=True, multiprocessors=64), ["all"], "registers", 1),
        (262144, 300, Machine(together=True, multiprocessors=63), ["all"], "partly", 1),
        (262145, 300, Machine(together=True), ["all"], "partly", 1),
        (128256, 300, Machine(together=True, cluster=8), ["all"], "shared", 4),
        (16_384, 300, Machine(ahead=True, cluster=8), ["all"], "registers", 1),
        (20_000, 1, Machine(ahead=True, cluster=8), ["reduce", "map"], "no", 1),
        (20_000, 300, Machine(ahead=True, cluster=8), ["all"], "ahead", 1),
        (32_768, 300, Machine(ahead=True, cluster=8), ["all"], "ahead", 2),
        (32_768, 300, Machine(ahead=True), ["all"], "ahead", 1),
        (128256, 300, Machine(ahead=True, cluster=8), ["all"], "ahead", 8),
        (262144, 300, Machine(ahead=True, cluster=8), ["all"], "ahead", 8),
        (262144, 300, Machine(ahead=True), ["all"], "partly", 1),
    ],
)
def test_ways_of_rows(classes, count, machine, stages, kept, cluster):
    found = ways_of(classes, count, machine)
    assert [launch.way.stage for launch in found] == stages
    for way, grid, threads, shared, _ in found:
        assert (way.kept, way.cluster) == (kept, cluster)
        assert 32 * way.warps <= threads <= 1024
        assert grid % cluster == 0
        assert shared <= machine.shared


def test_what_shared_memory_keeps():
    """Of a row that is mapped as many parts as go in, beside the board; of others none."""
    for classes in (100_003, 128256, 262144):
        (mapped,), (reduced,) = (ways_of(classes, 264, maps=maps) for maps in (1, 0))
        assert mapped.shared <= MACHINE.shared < mapped.shared + 4096
        assert mapped.way.kept == "partly"
        assert reduced.shared <= ways.BOARD and reduced.way.kept == "no"


@pytest.mark.parametrize("classes", [16_388, 25_600, 28_672, 32_768, 36_864])
def test_blocks_that_keep_rows_are_beside_one_another(classes):
    """Each warp holds a part; the others are in shared memory, with room for another row's."""
    ((way, _, threads, shared, beside),) = ways_of(classes, 264)
    parts = partition(classes, 4).parts(classes)
    assert way.kept == "shared" and 1 < beside <= MACHINE.beside(shared)
    assert 64 * threads * beside <= 1 << 16
    assert (parts - way.warps) * 4096 <= shared < parts * 4096


@pytest.mark.parametrize("classes", [40_000, 50_304, 57_344, 65_536])
def test_a_row_that_needs_all_of_a_multiprocessor_keeps_it_busy(classes):
    """With a warp for each two parts; another block would have fewer for both."""
    ((way, _, threads, _, beside),) = ways_of(classes, 264, Machine(cluster=8))
    assert (way.cluster, beside) == (1, 1) and 20 * 32 <= threads <= 1024
    # Of two arrays, if each lane finds the registers for both.
    ((way, _, threads, _, beside),) = ways_of(classes, 264, Machine(cluster=8), maps=2)
    if classes in (50_304, 57_344):
        assert (way.cluster, beside) == (1, 1) and 20 * 32 <= threads <= 28 * 32
    else:
        assert (way.cluster > 1 or classes == 40_000) and beside > 1


@pytest.mark.parametrize("classes", [4096, 5000, 16384])
@pytest.mark.parametrize("count", [300, 132 * 18 - 1, 132 * 18, 10**6])
def test_rows_that_are_only_reduced_have_a_warp_each(classes, count):
    """Where there are many: four of a block are finished together. Of few, registers hold all."""
    ((way, grid, threads, *_),) = ways_of(classes, count, maps=0)
    assert threads == 32 * way.warps
    if count >= 132 * 18:
        assert (way.warps, way.gathers, way.kept, grid) == (4, 4, "no", -(-count // 4))
    else:
        assert (way.gathers, way.kept, grid) == (0, "registers", count)


@pytest.mark.parametrize("registers", [ways.LANE_REGISTERS, 80])
@pytest.mark.parametrize("classes", [20_000, 32_000, 50_257, 65_537, 128_256, 151_936, 262_144])
def test_long_rows_that_are_only_reduced_fill_the_machine(classes, registers):
    """By small blocks: hardly a warp has nothing to do in the last round, or in the last wave."""
    parts = partition(classes, 4).parts(classes)
    for count in 300, 600, 1024, 2048, 4096, 5000, 10**6:
        ((way, grid, *_),) = ways_of(classes, count, maps=0, registers=registers)
        assert grid == count and way.kept == "no" and not way.gathers and way.warps <= 11

        def idle(warps, count=count):
            """Of the warps that there is room for, in all rounds, the share without a part."""
            beside = (1 << 16) // (registers * 32 * warps)
            waves = -(-count // (132 * beside))
            room = 132 * (1 << 16) // (registers * 32)
            return 1 - count * parts / (waves * room * -(-parts // warps))

        assert idle(way.warps) <= min(map(idle, ways.REDUCING)) + 1e-12
        if count == 10**6:
            assert idle(way.warps) <= 0.08


@pytest.mark.parametrize("count", [1, 2, 8, 64])
def test_few_long_rows_find_many_blocks(count):
    """1 to 64 rows of 128256: as many threads as there are elements for, or the machine is full."""
    for way, grid, threads, _, beside in ways_of(128256, count):
        elements = count * 128256
        assert grid * threads >= min(elements // 64, 132 * 1024), way
        # Those that map are to find registers where the machine just has room for all.
        assert beside == (1024 // threads if way.stage == "map" and count == 64 else 0)


def test_who_takes_columns():
    """What lies side by side, of which each access finds a sector; as many threads as for rows."""
    for shape, walker in [((21, 9000), "columns"), ((21, 8), "columns"), ((128256, 70), "columns"),
                          ((128256, 7), "rows"), ((10_000_000, 6), "rows")]:  # fmt: skip
        layouts = tuple((n, Layout("f4", (4 * shape[1], 4), True)) for n in ("x", "out"))
        made = plan("log_softmax", (), shape, 0, "f4", layouts)
        assert {dict(step.spec.params)["walker"] for step in made.steps} == {walker}
        lanes = min(WARP, partition(shape[0], 4).lanes)
        assert all(step.block >= 128 and step.block % lanes == 0 for step in made.steps)
        if walker == "columns" and lanes == WARP:
            assert {step.block for step in made.steps} == {512}


@pytest.mark.parametrize("classes", [16385, 65536, 100_003, 128256, 262144])
def test_rows_that_several_blocks_hold(classes):
    """A warp for each part and few more, and a thread of each block; small blocks, room for all."""
    machine = Machine(multiprocessors=108, together=True)
    parts = partition(classes, 4).parts(classes)
    ((way, grid, threads, shared, _),) = ways_of(classes, 2, machine)
    blocks = grid // 2
    assert way.meets(3) and not way.meets(0)
    assert parts <= blocks * way.warps < parts + blocks
    assert parts <= threads == 32 * way.warps <= 256
    assert 2 * blocks <= machine.multiprocessors and shared <= 8 << 10


@pytest.mark.parametrize("machine", [Machine(132, 227 << 10, 8, ahead=True),
                                     Machine(108, 163 << 10, ahead=True)])  # fmt: skip
@pytest.mark.parametrize("size, registers", [(4, 64), (2, 72)])
def test_rows_that_come_in_turn_find_room(machine, size, registers):
    """For each block, and beside it; each row has a turn, and a part a place."""
    for classes in range(17_000, 300_000, 1000):
        part = partition(classes, size)
        parts, count = part.parts(classes), 1000
        found, constants = ways.launches(
            part, classes, count, 3, 4096, 1, registers, False, machine
        )
        ((way, grid, threads, shared, beside),) = found
        if way.kept != "ahead":  # a block would be alone and have no room for more of the next rows
            assert classes * size > machine.shared * machine.cluster * 0.7
            continue
        turns, teams, rounds = (constants[n] for n in ("turns", "stride", "rounds"))
        assert threads == 32 * way.warps and grid == teams * way.cluster
        assert (turns - 1) * teams < count <= turns * teams
        assert parts <= rounds * way.warps * way.cluster < parts + way.warps * way.cluster
        assert constants["places"] == way.places and rounds <= way.places <= 2 * rounds
        assert way.spare == (way.places > rounds)
        assert parts <= threads
        boards = 2 * 24 * parts
        assert shared == boards + 4096 * way.places * way.warps <= machine.shared
        assert beside > 1 or way.spare
        assert beside <= machine.beside(shared) and registers * threads * beside <= 1 << 16
        # All at once, of whole clusters in each part of the device.
        there = machine.multiprocessors // 8 * 8 if way.cluster > 1 else machine.multiprocessors
        assert teams * way.cluster <= beside * there < (teams + 8) * way.cluster


def test_what_is_only_reduced_is_read_once_as_it_is():
    assert ways_of(128256, 300, Machine(together=True), maps=0) == ways_of(128256, 300, maps=0)


def test_what_is_chosen(monkeypatch):
    assert set(ways.PATHS) == {name for name, value in MACHINE._asdict().items() if value is False}
    for setting in ("", "together", " together, ahead,", "ahead", "realigned,abreast , counted"):
        monkeypatch.setenv(ways.SETTING, setting)
        want = {name: name in setting for name in ways.PATHS}
        assert ways.machine_of(132, 227 << 10, (9, 0)) == Machine(cluster=8, **want)
        assert ways.machine_of(108, 163 << 10, (8, 0)) == Machine(108, 163 << 10, **want)
        want["ahead"] = False
        assert ways.machine_of(72, 64 << 10, (7, 5)) == Machine(72, 64 << 10, **want)
    monkeypatch.setenv(ways.SETTING, "clusters")
    with pytest.raises(ValueError, match=r"_PATHS: .*together, .*, counted, got clusters$"):
        ways.machine_of(132, 227 << 10, (9, 0))
