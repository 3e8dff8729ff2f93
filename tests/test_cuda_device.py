"""The CUDA target on a real GPU: ``pytest -m cuda`` (with ``-n 8`` where there are the cores).

Every family of arrays that is installed, against the reference and, where it is there, PyTorch;
then what only a device shows: streams, graphs, memory beyond 2**31 elements, unwritten and
overwritten memory. The tests written for the CPU run here too, through ``on_device``.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import numbakern
from numbakern.cuda import launch
from tests import accuracy, cases, on_device, reference
from tests.cases import assert_close, bfloat16, float16, float32, float64
from tests.test_accuracy import LONGEST

TESTS = Path(__file__).parent
FAMILIES = ["torch", "cupy", "numba", "jax"]


def devices() -> int:
    """How many GPUs the driver has; asked of the driver alone, so that a broken stack shows."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("default"),  # other libraries' warnings are not ours
]


@pytest.fixture(scope="session", autouse=True)
def gpu():
    if not devices():
        pytest.skip("no NVIDIA GPU")


@pytest.fixture
def torch(gpu):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return torch


@pytest.fixture(scope="module", params=FAMILIES)
def on(request):
    with on_device.on(request.param) as functions:
        yield functions


@pytest.fixture
def best(request):
    """The functions on the family with the most layouts that has the dtype of the test."""
    dtype = getattr(request.node, "callspec", None) and request.node.callspec.params.get("dtype")
    for name in ("cupy", "torch", "numba_cuda"):
        if importlib.util.find_spec(name) is None:
            continue
        with on_device.on(name.partition("_")[0]) as functions:
            if name == "cupy" and dtype is not None and not functions.device.has(dtype):
                continue
            yield functions
        return
    pytest.skip("no library with GPU arrays")


def test_versions(record_property, capsys):
    names = "numba numba-cuda cuda-core cuda-bindings nvidia-nvvm nvidia-nvjitlink numpy torch jax"
    found = {}
    for name in [*names.split(), "cupy-cuda13x", "triton"]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
        record_property(name, found[name])
    with capsys.disabled():
        print(f"\n{found}")
    assert found["cuda-core"]


# --- values --------------------------------------------------------------------------------------

LONG = [10_000, 12_289, 32_000, 70_001, 128_256, 262_144]


@cases.dtypes(*cases.FLOATS)
@pytest.mark.parametrize("classes", [*cases.CLASS_COUNTS, *LONG])
def test_rows_of_every_length(best, classes, dtype):
    check_calls(best, (5, classes), 1, dtype)


@cases.dtypes(*cases.FLOATS)
@pytest.mark.parametrize("classes", [*cases.CLASS_COUNTS, 65, 300, *LONG[:3]])
def test_columns_of_every_length(best, classes, dtype):
    """Rows side by side, whose lanes meet in shared memory."""
    check_calls(best, (classes, 37), 0, dtype)


def check_calls(on, shape, axis, dtype):
    """The functions along an axis of two, against the reference."""
    classes, rows = shape[axis], shape[1 - axis]
    x = cases.logits(shape, dtype)
    y = reference.log_softmax(x, axis).astype(dtype)
    p = reference.softmax(x, axis).astype(dtype)
    g = cases.logits(shape, dtype, scale=1.0, seed=4)
    many = max(1.0, classes / 1000)
    assert_close(on.log_softmax(x, axis), reference.log_softmax(x, axis), dtype)
    assert_close(on.softmax(x, axis), reference.softmax(x, axis), dtype)
    want = reference.logsumexp(x, axis)
    assert_close(on.logsumexp(x, axis), want, cases.loss_type(dtype), scale=10)
    want = reference.log_softmax_backward(g, y, axis)
    assert_close(on.log_softmax_backward(g, y, axis), want, dtype, scale=many)
    want = reference.softmax_backward(g, p, axis)
    assert_close(on.softmax_backward(g, p, axis), want, dtype, scale=many)
    labels = cases.class_labels(rows, classes)
    call = {"reduction": "none", "axis": axis}
    loss, grad = on.cross_entropy_value_and_grad(x, labels, **call)
    want = reference.cross_entropy(x, labels, **call)
    assert_close(loss, want, cases.loss_type(dtype), scale=10)
    want = reference.cross_entropy_backward(np.ones(rows), x, labels, **call)
    assert_close(grad, want, dtype)
    loss, lse = on.cross_entropy(x, labels, return_lse=True, axis=axis)
    want = reference.cross_entropy(x, labels, axis=axis)
    assert_close(loss, want, cases.loss_type(dtype), scale=10)
    grad = on.cross_entropy_backward(1.0, x, labels, lse=lse, axis=axis)
    want = reference.cross_entropy_backward(1.0, x, labels, axis=axis)
    assert_close(grad, want, dtype)


@cases.dtypes(float16, bfloat16, float32, float64)
def test_every_family(on, dtype):
    x = cases.logits((7, 40, 9), dtype)
    labels = cases.class_labels((7, 9), 40)
    for axis in (0, 1, 2):
        assert_close(on.log_softmax(x, axis), reference.log_softmax(x, axis), dtype)
    got = on.cross_entropy(x, labels)
    assert_close(got, reference.cross_entropy(x, labels), cases.loss_type(dtype))
    _, grad = on.cross_entropy_value_and_grad(x, labels)
    assert_close(grad, reference.cross_entropy_backward(1.0, x, labels), dtype)


@pytest.mark.parametrize("dtype", [float32, float64], ids=str)
@pytest.mark.parametrize("family", accuracy.FAMILIES)
def test_accuracy(best, family, dtype, monkeypatch):
    """The bounds of SPEC §5, as on the CPU."""
    monkeypatch.setattr(accuracy, "numbakern", best)
    for classes in accuracy.classes_of(family):
        if classes > 200_000 and family not in LONGEST:
            continue
        for name in accuracy.MEASURES:
            worst = accuracy.measure(name, family, classes, dtype)
            if worst is not None:
                assert worst.closest <= worst.bound, (name, classes, worst)


FILES = ["log_softmax", "softmax", "logsumexp", "nll_loss", "cross_entropy", "gradients"]


@pytest.mark.parametrize("device", ["cupy", "torch"])
def test_the_tests_of_the_cpu(device, gpu):
    pytest.importorskip(device)
    files = [str(TESTS / f"test_{name}.py") for name in FILES]
    workers = max(4, (os.cpu_count() or 4) // 2)  # a thousand kernels are compiled
    options = ["-q", "-n", str(workers), "-W", "default", "--device", device]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=TESTS.parent)
    print(done.stdout[-4000:])
    assert done.returncode == 0, done.stdout[-4000:]


# --- PyTorch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_like_torch(torch, name, reduction, smoothing):
    torch.manual_seed(0)
    dtype = getattr(torch, name)
    tolerance = {"float32": 1e-5, "float64": 1e-12, "float16": 2e-3, "bfloat16": 2e-2}[name]
    x = torch.randn(64, 1000, 3, device="cuda", dtype=dtype, requires_grad=True)
    labels = torch.randint(1000, (64, 3), device="cuda")
    labels[::7] = -100
    weight = torch.rand(1000, device="cuda", dtype=dtype)
    options = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    loss = numbakern.cross_entropy(x, labels, **options)
    want = torch.nn.functional.cross_entropy(
        x.double(), labels, **{**options, "weight": weight.double()}
    )
    assert isinstance(loss, torch.Tensor) and loss.device == x.device and not loss.requires_grad
    torch.testing.assert_close(loss.double(), want, rtol=tolerance, atol=tolerance)
    g = torch.ones_like(want)
    (want_grad,) = torch.autograd.grad(want, x, g)
    grad = numbakern.cross_entropy_backward(g.to(loss.dtype), x, labels, **options)
    torch.testing.assert_close(grad, want_grad, rtol=tolerance, atol=tolerance)


def test_a_scalar_stays_on_the_device(torch):
    x, labels = torch.randn(8, 10, device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda")
    loss = numbakern.cross_entropy(x, labels)
    assert loss.shape == () and loss.is_cuda and loss.dtype == torch.float32


def test_out_counts_as_a_change(torch):
    """Autograd notices that a tensor it has saved was written to."""
    x = torch.randn(4, 5, device="cuda")
    before = x._version
    numbakern.softmax(x, out=x)
    assert x._version > before


# --- streams and graphs --------------------------------------------------------------------------


def test_work_goes_on_the_current_stream_and_nothing_waits(torch):
    x = torch.randn(4096, 1000, device="cuda")
    labels = torch.randint(1000, (4096,), device="cuda")
    stream = torch.cuda.Stream()

    def work():
        y = x * 2
        return numbakern.cross_entropy_value_and_grad(y, labels), numbakern.log_softmax(y)

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()  # kernels are compiled and loaded, and PyTorch has memory for this stream
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000_000)  # about a second
        (loss, _), out = work()
        assert not stream.query()  # still asleep: no call has waited
    stream.synchronize()
    want = torch.nn.functional.cross_entropy(x * 2, labels)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(out, torch.log_softmax(x * 2, 1), rtol=1e-5, atol=1e-5)


def test_a_graph_of_a_training_step(torch):
    torch.manual_seed(0)
    features = torch.randn(512, 64, device="cuda")
    labels = torch.randint(1000, (512,), device="cuda")
    weight = torch.randn(64, 1000, device="cuda") * 0.01

    def step(w):
        logits = features @ w
        loss, grad = numbakern.cross_entropy_value_and_grad(logits, labels, out=logits)
        w -= 0.1 * (features.T @ grad)
        return loss

    eager = weight.clone()
    losses = [step(eager).item() for _ in range(5)]
    captured = weight.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(captured)
    torch.cuda.current_stream().wait_stream(side)
    captured.copy_(weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(captured)
    captured.copy_(weight)
    replayed = []
    for _ in range(5):
        graph.replay()
        replayed.append(loss.item())
    # The matrix products of PyTorch may differ by a rounding; ours do not.
    torch.testing.assert_close(torch.tensor(replayed), torch.tensor(losses))
    torch.testing.assert_close(captured, eager)


def test_a_graph_gives_the_same_bits(torch):
    x = torch.randn(512, 1000, device="cuda")
    labels = torch.randint(1000, (512,), device="cuda")

    def work():
        return *numbakern.cross_entropy_value_and_grad(x, labels), numbakern.logsumexp(x, 0)

    eager = work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    x.normal_()
    for _ in range(3):
        graph.replay()
    for got, want, old in zip(captured, work(), eager, strict=True):
        assert torch.equal(got, want) and not torch.equal(got, old)


def test_threads_on_streams_of_their_own(torch):
    inputs = [torch.randn(257, 1000 + i, device="cuda") for i in range(8)]
    wants = [torch.log_softmax(x.double(), 1).float() for x in inputs]
    results = [None] * len(inputs)
    torch.cuda.synchronize()

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                results[i] = numbakern.log_softmax(inputs[i])
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(results, wants, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_host_cost(torch):
    x, out = torch.randn(8, 10, device="cuda"), torch.empty(8, 10, device="cuda")
    for _ in range(50):
        numbakern.log_softmax(x, out=out)
    best = float("inf")
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(50):
            numbakern.log_softmax(x, out=out)
        best = min(best, (time.perf_counter() - start) / 50)
    print(f"host cost of a call: {best * 1e6:.1f} us")
    assert best <= 25e-6


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("classes", [3, 33, 257, 1000, 1001, 4097, 32003, 128257])
def test_every_element_is_written_and_nothing_else(torch, name, classes):
    dtype, nan = getattr(torch, name), float("nan")
    for offset in (0, 1, 3):
        rows = 37
        wide = torch.randn(rows * classes + 64, device="cuda").to(dtype)
        x = wide[offset : offset + rows * classes].view(rows, classes)
        labels = torch.randint(classes, (rows,), device="cuda")
        guarded = torch.full((rows * classes + 64,), nan, device="cuda", dtype=dtype)
        out = guarded[offset + 8 : offset + 8 + rows * classes].view(rows, classes)
        calls = [
            lambda x=x, out=out: numbakern.log_softmax(x, out=out),
            lambda x=x, out=out: numbakern.softmax_backward(x, x, out=out),
            lambda x=x, out=out, t=labels: numbakern.cross_entropy_value_and_grad(x, t, out=out),
            lambda x=x, out=out, t=labels: numbakern.nll_loss_backward(1.0, x, t, out=out),
        ]
        for call in calls:
            guarded.fill_(nan)
            call()
            assert not out.isnan().any()
            assert int(guarded.isnan().sum()) == 64


def test_more_than_2_to_the_31_elements(torch):
    rows, classes = 2**31 // 32768 + 5, 32768
    need = 2 * rows * classes * 2
    if torch.cuda.mem_get_info()[0] < need + 2**30:
        pytest.skip(f"less than {need >> 30} GiB free")
    x = torch.empty(rows, classes, device="cuda", dtype=torch.bfloat16).normal_()
    labels = torch.randint(classes, (rows,), device="cuda")
    out = torch.full_like(x, float("nan"))
    loss, _ = numbakern.cross_entropy_value_and_grad(x, labels, reduction="none", out=out)
    at = slice(rows - 4, rows)
    wide = x[at].float().requires_grad_()
    want = torch.nn.functional.cross_entropy(wide, labels[at], reduction="none")
    torch.testing.assert_close(loss[at], want, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(want.sum(), wide)
    torch.testing.assert_close(out[at].float(), grad, rtol=1e-2, atol=1e-6)
    numbakern.log_softmax(x.view(classes, rows), 0, out=out.view(classes, rows))
    column = torch.log_softmax(x.view(classes, rows)[:, -3:].float(), 0)
    got = out.view(classes, rows)[:, -3:].float()
    torch.testing.assert_close(got, column, rtol=1e-2, atol=1e-2)


def test_a_row_has_the_same_bits_anywhere(torch):
    for name in ("float32", "bfloat16"):
        for classes in (10, 100, 1000, 1001, 5000, 40000, 128257):
            row = torch.randn(classes, device="cuda").to(getattr(torch, name))
            alone = numbakern.log_softmax(row[None])
            for rows, at in ((3, 1), (1000, 999)):
                x = torch.randn(rows, classes, device="cuda").to(row.dtype)
                x[at] = row
                assert torch.equal(numbakern.log_softmax(x)[at], alone[0])
            shifted = torch.empty(classes + 5, device="cuda", dtype=row.dtype)
            for offset in (1, 2, 5):
                moved = shifted[offset : offset + classes]
                moved.copy_(row)
                assert torch.equal(numbakern.log_softmax(moved[None]), alone)
            column = torch.randn(classes, 9, device="cuda").to(row.dtype)
            column[:, 4] = row
            assert torch.equal(numbakern.log_softmax(column, 0)[:, 4], alone[0])


# --- ways that are chosen -------------------------------------------------------------------------


@pytest.fixture
def choose(torch, monkeypatch):
    """From its call on the Machine has these fields, whatever NUMBAKERN_CUDA_PATHS says."""

    def start(**fields):
        device = launch.device(torch.cuda.current_device())
        monkeypatch.setattr(device, "machine", device.machine._replace(**fields))
        monkeypatch.setattr(device, "calls", {})

    return start


@pytest.fixture
def together(choose):
    """From its call on blocks that meet have long rows."""
    return lambda: choose(cluster=1, together=True, ahead=False)


IN_TURN = [(300, 16_392), (999, 20_000), (1000, 32_768), (1500, 40_000), (529, 65_536)]


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize("rows, classes", [*IN_TURN, (300, 128_256), (400, 262_144)])
def test_rows_in_turn_change_no_bit(torch, choose, name, cluster, rows, classes):
    """By blocks that are there all the time, or clusters; labels that are ignored, in place."""
    torch.manual_seed(rows)
    x = torch.randn(rows, classes, device="cuda").to(getattr(torch, name))
    x[5, ::7] = torch.nan
    labels = torch.randint(classes, (rows,), device="cuda")
    labels[torch.rand(rows, device="cuda") < 0.3] = -100

    def work():
        yield numbakern.log_softmax(x)
        yield numbakern.softmax_backward(x, x)
        yield numbakern.log_softmax_backward(x, x)
        y = x.clone()
        yield numbakern.softmax(y, out=y)
        y = x.clone()
        yield from numbakern.cross_entropy_value_and_grad(y, labels, out=y)
        options = {"label_smoothing": 0.1, "reduction": "sum"}
        yield from numbakern.cross_entropy_value_and_grad(x, labels, **options)

    choose(ahead=False)
    want = list(work())
    choose(ahead=True, **({} if cluster else {"cluster": 1}))
    for _ in range(3):
        for got, one in zip(work(), want, strict=True):
            assert torch.equal(bits(torch, got), bits(torch, one))


@pytest.mark.parametrize("cluster", [False, True])
def test_blocks_that_have_rows_in_turn_are_all_there(torch, choose, cluster):
    """At once: one that started late would keep all others waiting for its rows."""
    device = launch.device(torch.cuda.current_device())
    choose(ahead=True, **({} if cluster else {"cluster": 1}))
    device._steps.clear()
    for classes in (20_000, 32_768, 65_536, 128_256, 262_144):
        x = torch.randn(500, classes, device="cuda")
        labels = torch.randint(classes, (500,), device="cuda")
        for given in (x, x.to(torch.bfloat16)):
            numbakern.log_softmax(given)
            numbakern.softmax_backward(given, given)
            numbakern.cross_entropy_value_and_grad(given, labels)
    found = [(s, made) for s, made in device._steps.items() if "'ahead'" in repr(s.spec)]
    assert found
    for step, (config, kernel) in found:
        asked = kernel.occupancy
        if step.cluster > 1:
            there = asked.max_active_clusters(config, stream=device.core.default_stream)
        else:
            there = asked.max_active_blocks_per_multiprocessor(step.block, step.shared)
            there *= device.multiprocessors
        assert step.grid // step.cluster <= there, step


def bits(torch, values):
    """What tells one NaN from a number, and 0 from −0."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return values.reshape(-1).view(kind)


def all_calls(x, labels, axis):
    """What is made of rows, each in turn, and in place."""
    yield numbakern.log_softmax(x, axis)
    yield numbakern.logsumexp(x, axis)
    yield numbakern.softmax_backward(x, x, axis)
    yield numbakern.log_softmax_backward(x, x, axis)
    yield numbakern.cross_entropy_value_and_grad(x, numbakern.softmax(x, axis), axis=axis)[1]
    for reduction in cases.REDUCTIONS:
        options = {"axis": axis, "reduction": reduction, "ignore_index": 1}
        loss, lse = numbakern.cross_entropy(x, labels, return_lse=True, **options)
        yield from (loss, lse)
        yield from numbakern.cross_entropy_value_and_grad(x, labels, **options)
        upstream = loss if reduction == "none" else 1.5
        yield numbakern.cross_entropy_backward(upstream, x, labels, lse=lse, **options)
        yield numbakern.nll_loss_backward(upstream, x, labels, **options)
    y = x.clone()
    yield from numbakern.cross_entropy_value_and_grad(y, labels, axis=axis, out=y)


def check_same_bits(torch, choose, way, x, labels, axis):
    choose(**{way: False})
    want = list(all_calls(x, labels, axis))
    choose(**{way: True})
    for got, one in zip(all_calls(x, labels, axis), want, strict=True):
        assert torch.equal(bits(torch, got), bits(torch, one))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("classes", [2, 3, 8, 21, 64, 100])
def test_neighbouring_rows_change_no_bit(torch, choose, name, classes):
    """So many that lanes have several of them, in one batch axis and in two."""
    torch.manual_seed(classes)
    rows = 600_000 if classes <= 8 else 300_000
    for shape in (classes, rows), (3, classes, rows // 3):
        x = torch.randn(shape, device="cuda").to(getattr(torch, name))
        x[..., 5] = torch.nan
        axis = len(shape) - 2
        labels = torch.randint(classes, (*shape[:-2], shape[-1]), device="cuda")
        check_same_bits(torch, choose, "abreast", x, labels, axis)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("rows", [1, 3, 32, 33, 64, 1000, 1024])
@pytest.mark.parametrize("classes", [1, 10, 1000, 4096, 20_000])
def test_few_rows_that_count_their_labels_change_no_bit(torch, choose, name, rows, classes):
    torch.manual_seed(rows)
    x = torch.randn(rows, classes, device="cuda").to(getattr(torch, name))
    labels = torch.randint(classes, (rows,), device="cuda")
    check_same_bits(torch, choose, "counted", x, labels, 1)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("classes", [9, 17, 21, 32, 64, 66, 128, 513, 1000])
def test_short_rows_that_start_anywhere_change_no_bit(torch, choose, name, classes):
    torch.manual_seed(classes)
    for rows, start in itertools.product((2, 100, 5001), (1, 2, 5, 7)):
        x = torch.randn(rows * classes + 8, device="cuda").to(getattr(torch, name))
        x = x[start : start + rows * classes].reshape(rows, classes)
        labels = torch.randint(classes, (rows,), device="cuda")
        check_same_bits(torch, choose, "realigned", x, labels, 1)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("classes", [7, 9, 17, 33, 65, 101, 126, 132, 257, 450, 501, 510, 1000])
def test_short_rows_have_the_bits_of_those_that_are_not_copied(torch, name, classes):
    """A block copies rows of an array that starts at 16 bytes, many of them whole blocks."""
    torch.manual_seed(classes)
    for rows in 1, 131, 20_000:
        whole = torch.randn(rows * classes + 1, device="cuda").to(getattr(torch, name))
        x = whole[1:].reshape(rows, classes)
        labels = torch.randint(classes, (rows,), device="cuda")
        apart = list(all_calls(x, labels, 1))
        for got, want in zip(all_calls(x.clone(), labels, 1), apart, strict=True):
            assert torch.equal(bits(torch, got), bits(torch, want))


@pytest.mark.parametrize("name, eps", [("bfloat16", 2.0**-7), ("float16", 2.0**-10)])
@pytest.mark.parametrize("classes", [16_385, 16_392, 20_481, 32_001, 50_257, 100_003])
def test_long_rows_of_halves_that_start_anywhere(torch, choose, name, eps, classes):
    """Right, and the same bits wherever they start; what lies beside them stays."""
    torch.manual_seed(classes)
    choose(realigned=True)
    rows, found = 7, []
    logits = torch.randn(rows, classes, device="cuda").to(getattr(torch, name))
    labels = torch.randint(classes, (rows,), device="cuda")
    for start in range(8):
        area = torch.full((2 * rows * classes + 24,), 7.0, device="cuda", dtype=logits.dtype)
        x, out = (area[at:][: rows * classes] for at in (start, rows * classes + 2 * start))
        x.copy_(logits.reshape(-1))
        x, out = x.reshape(rows, classes), out.reshape(rows, classes)
        made = [numbakern.log_softmax(x, out=out).clone()]
        made += numbakern.cross_entropy_value_and_grad(x, labels, out=x)
        made[-1] = made[-1].clone()
        found.append(made)
        x[...], out[...] = 7.0, 7.0
        assert (area == 7.0).all()
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))
    wide = logits.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(wide, labels)
    loss.backward()
    want = torch.log_softmax(wide.detach(), 1), loss.detach(), wide.grad
    for got, one, off in zip(found[0], want, (eps, 2e-6, eps), strict=True):
        torch.testing.assert_close(
            got.double(), one, rtol=off, atol=1e-7 if name == "float16" else 0.0
        )


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(
    "rows, classes", [(1, 262_144), (7, 70_001), (7, 100_000), (300, 128_256), (2000, 128_256)]
)
def test_blocks_that_meet_change_no_bit(torch, together, name, rows, classes):
    torch.manual_seed(rows)
    x = torch.randn(rows, classes, device="cuda").to(getattr(torch, name))
    labels = torch.randint(classes, (rows,), device="cuda")

    def work():
        yield numbakern.log_softmax(x)
        yield numbakern.softmax_backward(x, x)
        y = x.clone()
        yield from numbakern.cross_entropy_value_and_grad(y, labels, out=y)

    want = list(work())
    together()
    for _ in range(3):
        for got, one in zip(work(), want, strict=True):
            assert torch.equal(got, one)


def test_blocks_that_meet_on_two_streams(torch, together):
    """Two calls always find room for each other's blocks; many of them, so that they overlap."""
    inputs = [torch.randn(64, 262_144, device="cuda") for _ in range(2)]
    wants = [numbakern.log_softmax(x) for x in inputs]
    together()
    numbakern.log_softmax(inputs[0])
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in inputs], []
    for _ in range(10):
        for x, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(numbakern.log_softmax(x, out=torch.empty_like(x)))
        torch.cuda.synchronize()
        for got, want in zip(results, wants, strict=True):
            assert torch.equal(got, want)
        results.clear()


def test_a_graph_of_blocks_that_meet(torch, together):
    """Each replay starts from counters of its own making."""
    together()
    x = torch.randn(5, 128_256, device="cuda")
    numbakern.log_softmax(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = numbakern.log_softmax(x)
    for _ in range(5):
        x.normal_()
        graph.replay()
        assert torch.equal(captured, numbakern.log_softmax(x))


# --- labels out of range -------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [10, -1, 2**40, -(2**63), 2**63 - 1])
def test_a_bad_label_gives_nan_and_is_told_by_check(torch, bad):
    numbakern.cuda.check()
    x = torch.randn(6, 10, device="cuda")
    labels = torch.tensor([0, 1, bad, 3, -100, 5], device="cuda")
    loss, grad = numbakern.cross_entropy_value_and_grad(x, labels, reduction="none")
    assert loss.isnan().tolist() == [False, False, True, False, False, False]
    assert grad.isnan().all(1).tolist() == [False, False, True, False, False, False]
    assert numbakern.cross_entropy(x, labels).isnan()
    told = "" if abs(bad) > 2**20 else f".*got {bad}$"  # a record has 24 bits for the value
    with pytest.raises(IndexError, match=rf"labels\[2\]{told}"):
        numbakern.cuda.check()
    numbakern.cuda.check()  # told once


def test_checking_every_call(torch, monkeypatch):
    monkeypatch.setenv("NUMBAKERN_CHECK", "1")
    x, labels = torch.randn(2, 3, 4, device="cuda"), torch.zeros(2, 4, dtype=torch.int32)
    labels[1, 2] = 3
    with pytest.raises(IndexError, match=r"labels\[1, 2\].*got 3"):
        numbakern.cross_entropy(x, labels.cuda())


# --- other arrays, other devices -----------------------------------------------------------------


def test_whatever_speaks_dlpack_or_the_array_interface(torch):
    x = torch.randn(5, 7, device="cuda")

    class OnlyInterface:
        __cuda_array_interface__ = x.__cuda_array_interface__

    class OnlyDLPack:
        def __dlpack__(self, **options):
            return x.__dlpack__(**options)

        def __dlpack_device__(self):
            return x.__dlpack_device__()

    for kind in (OnlyInterface, OnlyDLPack):
        torch.cuda.synchronize()
        got = torch.from_dlpack(numbakern.log_softmax(kind()))
        torch.testing.assert_close(got, torch.log_softmax(x, 1))


def test_jax_results_stay_on_the_device(gpu):
    jax = on_device.Jax().jax
    x = jax.random.normal(jax.random.key(0), (64, 1000), dtype="bfloat16")
    got = numbakern.softmax(x)
    assert isinstance(got, jax.Array) and got.dtype == x.dtype
    again = numbakern.log_softmax(got * 2)  # JAX goes on with it
    want = jax.nn.log_softmax(jax.nn.softmax(x.astype("float32")).astype("bfloat16") * 2)
    np.testing.assert_allclose(np.float32(again), np.float32(want), rtol=0.02, atol=0.02)
    with pytest.raises(TypeError, match="out"):
        numbakern.softmax(x, out=got)


def test_mixed_targets(torch):
    x = torch.randn(3, 4, device="cuda")
    with pytest.raises(TypeError, match="labels"):
        numbakern.cross_entropy(x, np.zeros(3, int))
    with pytest.raises(TypeError, match="labels"):
        numbakern.cross_entropy(x, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="out"):
        numbakern.log_softmax(x, out=np.zeros((3, 4), np.float32))


def test_another_device_than_the_current_one(torch):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    x = torch.randn(3, 4, device="cuda:1")
    got = numbakern.log_softmax(x)
    assert got.device == x.device and torch.cuda.current_device() == 0
    torch.testing.assert_close(got, torch.log_softmax(x, 1))
    with pytest.raises(TypeError, match="labels.*cuda"):
        numbakern.cross_entropy(x, torch.zeros(3, dtype=torch.int64, device="cuda:0"))
