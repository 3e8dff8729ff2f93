"""`python -m benchmarks.cuda`: speed on a GPU, as a share of the device's own copy rate.

Needs PyTorch with CUDA: it holds the arrays and the clock. Peers are measured where they are
installed: PyTorch eager and compiled, a plain Triton kernel, Liger and Quack. Cases are taken in
the order of their weight until the time is spent; what was left out is said.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numbakern
from numbakern._roofline import table

ELEMENTS = 2**28
WIDTHS = (32768, 1024, 128256, 4096, 262144, 16384, 65536)
ODD_WIDTHS = (1000, 1001, 1023, 1025, 4097, 32001, 128257)
NARROW_WIDTHS = (2, 3, 10, 16, 31, 64, 100, 255, 256)
DTYPES = ("bfloat16", "float32", "float16")
# Operation: (elements moved per element of the logits, must, goal as shares of the copy rate)
OPERATIONS = {
    "log_softmax": (2, 0.85, 0.97),
    "value_and_grad": (2, 0.85, 0.97),
    "cross_entropy": (1, 0.90, 1.00),
    "cross_entropy_backward": (2, 0.85, 0.97),
    "log_softmax_backward": (3, 0.85, 0.97),
}
HOST_MUST, HOST_GOAL = 25e-6, 8e-6


@dataclass(frozen=True)
class Case:
    """An operation on (rows, classes) logits of a dtype."""

    op: str
    classes: int
    dtype: str
    compiled: bool = False  # whether to wait for torch.compile

    @property
    def rows(self) -> int:
        return -(-ELEMENTS // self.classes)

    def __str__(self) -> str:
        return f"{self.op}/{self.rows}x{self.classes}/{self.dtype}"


@dataclass
class Result:
    """Median seconds of each implementation; why one has none."""

    case: Case
    copy_bytes_per_second: float
    moved: int  # bytes
    seconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def share(self, name: str) -> float | None:
        """Rate of an implementation as a share of the copy rate."""
        if name not in self.seconds:
            return None
        return self.moved / self.seconds[name] / self.copy_bytes_per_second


def cases(quick: bool) -> Iterator[Case]:
    """All cases, the telling ones first."""
    for width in WIDTHS[:3] if quick else WIDTHS:
        for dtype in DTYPES[:2]:
            for op in OPERATIONS:
                yield Case(op, width, dtype, compiled=width in WIDTHS[:3])
    if quick:
        return
    for width in (*ODD_WIDTHS, *NARROW_WIDTHS):
        for dtype in DTYPES[:2]:
            for op in ("log_softmax", "value_and_grad"):
                yield Case(op, width, dtype)
    for width in WIDTHS:
        for op in OPERATIONS:
            yield Case(op, width, DTYPES[2])


class Bench:
    """Arrays on the device, and what is timed on them."""

    def __init__(self, rounds: int) -> None:
        try:
            import torch
        except ImportError as error:
            raise SystemExit(f"needs PyTorch with CUDA: {error}") from None
        if not torch.cuda.is_available():
            raise SystemExit("needs a GPU: PyTorch finds none")
        self.torch, self.rounds = torch, rounds
        self._copy: dict[str, float] = {}

    def seconds(self, call: Callable[[], Any]) -> float:
        """Median time of a call on the device, caches emptied by the size of the arrays."""
        torch = self.torch
        for _ in range(3):
            call()
        times = []
        for _ in range(self.rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            times.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) * 1e-3 for a, b in times)

    def copy_rate(self, dtype: str) -> float:
        """Bytes a second, read and written, of the device's copy of an array of the same size."""
        if dtype not in self._copy:
            source = self.torch.randn(ELEMENTS, device="cuda", dtype=getattr(self.torch, dtype))
            target = self.torch.empty_like(source)
            seconds = self.seconds(lambda: target.copy_(source))
            self._copy[dtype] = 2 * ELEMENTS * source.element_size() / seconds
        return self._copy[dtype]

    def measure(self, case: Case) -> Result:
        """Time every implementation of a case, each checked against float64 first."""
        torch = self.torch
        dtype = getattr(torch, case.dtype)
        streams, _, _ = OPERATIONS[case.op]
        rate = self.copy_rate(case.dtype)
        generator = torch.Generator("cuda").manual_seed(case.classes)
        shape = case.rows, case.classes
        x = torch.empty(shape, device="cuda", dtype=dtype).normal_(0, 3, generator=generator)
        labels = torch.randint(case.classes, shape[:1], device="cuda", generator=generator)
        result = Result(case, rate, streams * x.numel() * x.element_size())
        for name, make in IMPLEMENTATIONS.items():
            if name == "torch.compile" and not case.compiled:
                continue
            try:
                call = make(torch, case, x, labels)
                if call is None:
                    continue
                self.check(case, x, labels, call())
                result.seconds[name] = self.seconds(call)
            except Exception as error:  # a peer that does not run here is no reason to stop
                result.notes[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            torch.cuda.synchronize()
        return result

    def check(self, case: Case, x: Any, labels: Any, got: Any) -> None:
        """The first rows against float64."""
        torch = self.torch
        rows, tolerance = slice(0, 4), 2e-5 if case.dtype == "float32" else 2e-2
        wide = x[rows].double()
        if case.op in ("log_softmax", "log_softmax_backward"):
            want = torch.log_softmax(wide, 1)
            if case.op == "log_softmax_backward":
                y = got["output"][rows].double()
                g = x[rows].double()
                want = g - y.exp() * g.sum(1, keepdim=True)
                tolerance *= case.classes**0.5
            got = got["result"][rows].double()
        elif case.op == "cross_entropy":
            loss, step = torch.nn.functional.cross_entropy, max(1, 2**26 // case.classes)
            parts = zip(x.split(step), labels.split(step), strict=True)
            sums = [loss(a.double(), b, reduction="sum") for a, b in parts]
            want, got = sum(sums) / len(x), got["result"].double()
        else:
            onehot = torch.nn.functional.one_hot(labels[rows], case.classes)
            want = (torch.softmax(wide, 1) - onehot) / len(x)
            got = got["result"][rows].double()
            got, want = got * len(x), want * len(x)
        error = float((got - want).abs().max())
        if not error <= tolerance * max(1.0, float(want.abs().max())):
            raise ValueError(f"wrong by {error:.3g}")


# ---------------------------------------------------------------- implementations
# Each gives a call without arguments that returns its result (and what the check needs beside
# it), or None where it has no such operation.


def ours(torch: Any, case: Case, x: Any, labels: Any) -> Callable[[], Any] | None:
    """numbakern, into an array of the caller's."""
    out = None if case.op == "cross_entropy" else torch.empty_like(x)
    nk = numbakern
    if case.op == "log_softmax":
        return lambda: {"result": nk.log_softmax(x, out=out)}
    if case.op == "log_softmax_backward":
        y = torch.log_softmax(x, 1)
        return lambda: {"result": nk.log_softmax_backward(x, y, out=out), "output": y}
    if case.op == "cross_entropy":
        return lambda: {"result": nk.cross_entropy(x, labels)}
    if case.op == "cross_entropy_backward":
        _, lse = nk.cross_entropy(x, labels, return_lse=True)
        back = nk.cross_entropy_backward
        return lambda: {"result": back(1.0, x, labels, lse=lse, out=out)}
    return lambda: {"result": nk.cross_entropy_value_and_grad(x, labels, out=out)[1]}


def _torch_functions(torch: Any) -> dict[str, Callable[..., Any]]:
    def value_and_grad(x: Any, labels: Any) -> Any:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(torch.nn.functional.cross_entropy(x, labels), x)[0]

    def backward(x: Any, y: Any) -> Any:
        return torch.ops.aten._log_softmax_backward_data(x, y, 1, x.dtype)

    return {
        "log_softmax": lambda x, labels: torch.log_softmax(x, 1),
        "cross_entropy": torch.nn.functional.cross_entropy,
        "value_and_grad": value_and_grad,
        "log_softmax_backward": backward,
    }


def torch_eager(torch: Any, case: Case, x: Any, labels: Any) -> Callable[[], Any] | None:
    """PyTorch as it comes."""
    return _torch(torch, case, x, labels, lambda function: function)


def torch_compiled(torch: Any, case: Case, x: Any, labels: Any) -> Callable[[], Any] | None:
    """PyTorch compiled for this very shape."""
    torch._dynamo.reset()
    compiled = lambda f: torch.compile(f, dynamic=False, mode="max-autotune-no-cudagraphs")  # noqa: E731
    return _torch(torch, case, x, labels, compiled)


def _torch(torch: Any, case: Case, x: Any, labels: Any, wrap: Any) -> Callable[[], Any] | None:
    function = _torch_functions(torch).get(case.op)
    if function is None:
        return None
    function = wrap(function)
    if case.op == "log_softmax_backward":
        y = torch.log_softmax(x, 1)
        return lambda: {"result": function(x, y), "output": y}
    return lambda: {"result": function(x, labels)}


def triton_kernel(torch: Any, case: Case, x: Any, labels: Any) -> Callable[[], Any] | None:
    """A plain Triton log_softmax: a program a row, the row in registers."""
    if case.op != "log_softmax" or case.classes > 65536:
        return None
    from benchmarks._triton import log_softmax

    out = torch.empty_like(x)
    return lambda: {"result": log_softmax(x, out)}


def liger(torch: Any, case: Case, x: Any, labels: Any) -> Callable[[], Any] | None:
    """Liger's cross-entropy, which writes the gradient over the logits in the forward."""
    if case.op != "value_and_grad":
        return None
    ops = importlib.import_module("liger_kernel.ops.cross_entropy")
    own = x.clone()

    def call() -> dict[str, Any]:
        logits = own.detach().requires_grad_()
        loss = ops.LigerCrossEntropyFunction.apply(logits, labels, None, -100)
        (loss[0] if isinstance(loss, tuple) else loss).backward()
        return {"result": logits.grad}

    return call  # it overwrites: later calls work on what the first has left, at the same cost


def quack(torch: Any, case: Case, x: Any, labels: Any) -> Callable[[], Any] | None:
    """Quack's kernels, by CuTe."""
    if case.op == "cross_entropy":
        cross_entropy = importlib.import_module("quack.cross_entropy").cross_entropy
        return lambda: {"result": cross_entropy(x, labels).float().mean()}
    if case.op == "value_and_grad":
        forward = importlib.import_module("quack.cross_entropy").cross_entropy_fwd
        return lambda: {"result": forward(x, labels, return_dx=True)[-1] / len(x)}
    return None


IMPLEMENTATIONS: dict[str, Callable[..., Callable[[], Any] | None]] = {
    "numbakern": ours,
    "torch": torch_eager,
    "torch.compile": torch_compiled,
    "triton": triton_kernel,
    "liger": liger,
    "quack": quack,
}


# ---------------------------------------------------------------- the command


def host_cost(torch: Any) -> dict[str, float]:
    """Seconds that a call on (8, 10) takes of the host."""
    x = torch.randn(8, 10, device="cuda")
    out, labels = torch.empty_like(x), torch.zeros(8, dtype=torch.int64, device="cuda")
    calls = {
        "numbakern.log_softmax(out=)": lambda: numbakern.log_softmax(x, out=out),
        "numbakern.cross_entropy_value_and_grad(out=)": (
            lambda: numbakern.cross_entropy_value_and_grad(x, labels, out=out)
        ),
        "torch.log_softmax": lambda: torch.log_softmax(x, 1),
    }
    costs = {}
    for name, call in calls.items():
        for _ in range(20):
            call()
        best = float("inf")
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(50):
                call()
            best = min(best, (time.perf_counter() - start) / 50)
        costs[name] = best
    return costs


def versions() -> dict[str, str]:
    """What is compared, by version."""
    names = ["numbakern", "numba", "numba-cuda", "cuda-core", "numpy", "torch", "triton"]
    found = {}
    for name in [*names, "liger-kernel", "quack-kernels"]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def verdict(result: Result) -> str:
    """`goal`, `must`, `MISSED`, or `FAILED` where there is no figure."""
    _, must, goal = OPERATIONS[result.case.op]
    share = result.share("numbakern")
    if share is None:
        return "FAILED"
    return "goal" if share >= goal else "must" if share >= must else "MISSED"


def report(results: Sequence[Result]) -> str:
    """One line a case: GB/s, share of the copy rate, and the peers' shares."""
    measured = {name for result in results for name in result.seconds}
    peers = [name for name in IMPLEMENTATIONS if name in measured - {"numbakern"}]
    rows = []
    for result in results:
        case, share = result.case, result.share("numbakern")
        rate = result.moved / result.seconds["numbakern"] / 1e9 if share is not None else None
        shares = [result.share(name) for name in peers]
        rows.append(
            [
                case.op,
                f"({case.rows}, {case.classes}) {case.dtype}",
                "-" if rate is None else f"{rate:.0f}",
                "-" if share is None else f"{share:.3f}",
                verdict(result),
                *("-" if s is None else f"{s:.3f}" for s in shares),
            ]
        )
    return table(["call", "array", "GB/s", "of copy", "met", *peers], rows)


def as_json(result: Result) -> dict[str, Any]:
    """A result for the file."""
    case = result.case
    return {
        "op": case.op,
        "shape": [case.rows, case.classes],
        "dtype": case.dtype,
        "bytes": result.moved,
        "copy_bytes_per_second": result.copy_bytes_per_second,
        "seconds": result.seconds,
        "share_of_copy": {name: result.share(name) for name in result.seconds},
        "notes": result.notes,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three widths, two dtypes")
    parser.add_argument("--seconds", type=float, default=480.0, help="when to start no more cases")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file")
    options = parser.parse_args(argv)
    if options.no_compile:
        IMPLEMENTATIONS.pop("torch.compile")

    start = time.monotonic()
    bench = Bench(options.rounds)
    torch = bench.torch
    device = torch.cuda.get_device_name()
    found = versions()
    print(f"{device}; " + ", ".join(f"{n} {v}" for n, v in found.items()), flush=True)
    host = host_cost(torch)
    for name, seconds in host.items():
        print(f"host cost of {name} on (8, 10): {seconds * 1e6:.1f} us", flush=True)
    print(f"must {HOST_MUST * 1e6:.0f} us, goal {HOST_GOAL * 1e6:.0f} us\n", flush=True)

    results, left = [], []
    for case in cases(options.quick):
        if time.monotonic() - start > options.seconds:
            left.append(str(case))
            continue
        results.append(bench.measure(case))
        share = results[-1].share("numbakern")
        print(f"{case}: {'failed' if share is None else f'{share:.3f}'}", file=sys.stderr)
    print(report(results))
    rates = ", ".join(f"{n} {r / 1e9:.0f}" for n, r in bench._copy.items())
    print(f"\nof copy: share of the device's copy rate, GB/s: {rates}. Medians of one run.")
    for result in results:
        for name, note in result.notes.items():
            if not note.startswith("ModuleNotFoundError"):
                print(f"{result.case}: {name}: {note}")
    if left:
        print(f"left out for lack of time: {len(left)} cases: {', '.join(left)}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            content = {
                "device": device,
                "versions": found,
                "host_seconds": host,
                "results": [as_json(result) for result in results],
                "left_out": left,
            }
            json.dump(content, file, indent=2)
    return int(any("numbakern" not in r.seconds for r in results))


if __name__ == "__main__":
    sys.exit(main())
