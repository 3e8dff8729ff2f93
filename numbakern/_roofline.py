"""How near a call comes to a copy of its own array: cases, callables, interleaved timing.

One home for what ``python -m numbakern`` and the benchmark suite share. Nothing here is imported
by ``import numbakern``.

A *case* is one call on one array. Its callables (numbakern's, each peer's, and the copies that
are the measure) run in turn within one process, so that a noisy neighbour hits all of them alike;
the figure of each is its median, told as a multiple of the fastest copy. Every array is written
to before it is timed, and every result is compared with a float64 reference first.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from statistics import median
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy.dtype the name "bfloat16")
import numpy as np

import numbakern

Call = Callable[[], Any]
Times = tuple[dict[str, list[float]], dict[str, list[float]]]  # of the copies, of the calls

# Array-sized streams that a call must read or write at least, in elements N·C.
STREAMS = {
    "log_softmax": 2,
    "log_softmax_fresh": 2,
    "log_softmax_backward": 3,
    "cross_entropy": 1,
    "cross_entropy_backward": 2,
    "value_and_grad": 2,
    "nll_loss": 0,
    "nll_loss_backward": 1,
}

# How the tables name a call.
TITLES = {
    "log_softmax": "log_softmax(out=)",
    "log_softmax_fresh": "log_softmax",
    "log_softmax_backward": "log_softmax_backward(out=)",
    "cross_entropy": "cross_entropy",
    "cross_entropy_backward": "cross_entropy_backward(lse=, out=)",
    "value_and_grad": "cross_entropy_value_and_grad(out=)",
    "nll_loss": "nll_loss",
    "nll_loss_backward": "nll_loss_backward(out=)",
}

# Largest error of a result before it may be timed, relative to the largest magnitude in it. It is
# a guard against timing the wrong thing; accuracy proper is what the tests measure.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}

LABEL_BYTES = 8

# Why a library has no figure: not a fault, unlike every other note of a result.
NOT_INSTALLED = "not installed"
DOES_NOT_APPLY = "does not apply"


def bytes_moved(op: str, rows: int, classes: int, itemsize: int) -> int:
    """Bytes that `op` must read and write at least: whole streams, and a label (int64) a row.

    `nll_loss` reads one element of each row, whatever the cache line it stands in costs.
    """
    total = STREAMS[op] * rows * classes * itemsize
    if op.startswith(("nll_loss", "cross_entropy", "value_and_grad")):
        total += rows * LABEL_BYTES
    if op == "nll_loss":
        total += rows * itemsize
    return total


def gigabytes_per_second(nbytes: int, seconds: float) -> float:
    """Decimal gigabytes moved in a second."""
    return nbytes / seconds / 1e9


def multiple(seconds: float, copy_seconds: float) -> float:
    """How many copies of the array would have fitted into `seconds`."""
    return seconds / copy_seconds


# ---------------------------------------------------------------------------------------------
# Cases and their arrays


@dataclass(frozen=True)
class Case:
    """One call on one array."""

    op: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    axis: int = -1

    @property
    def classes(self) -> int:
        """Length of the class axis."""
        return self.shape[self.axis]

    @property
    def rows(self) -> int:
        """How many rows the array holds."""
        return math.prod(self.shape) // self.classes

    @property
    def nbytes(self) -> int:
        """Bytes the call must move."""
        return bytes_moved(self.op, self.rows, self.classes, np.dtype(self.dtype).itemsize)

    @property
    def name(self) -> str:
        """A name for options and files: ``op/1024x32000/float32``."""
        return f"{self.op}/{'x'.join(map(str, self.shape))}/{self.dtype}"


class Arrays:
    """The inputs and the output of a case; each is made, and so faulted in, at its first use."""

    def __init__(self, shape: tuple[int, ...], dtype: str, axis: int) -> None:
        self.shape, self.dtype, self.axis = shape, np.dtype(dtype), axis % len(shape)
        self._rng = np.random.default_rng(20)

    def _normal(self) -> np.ndarray:
        single = self._rng.standard_normal(self.shape, dtype=np.float32)
        return single.astype(self.dtype, copy=False)

    @cached_property
    def logits(self) -> np.ndarray:
        """Standard normal logits."""
        return self._normal()

    @cached_property
    def grad_output(self) -> np.ndarray:
        """A gradient with respect to the log-probabilities."""
        return self._normal()

    @cached_property
    def labels(self) -> np.ndarray:
        """One class a row, int64."""
        shape = self.shape[: self.axis] + self.shape[self.axis + 1 :]
        return self._rng.integers(0, self.shape[self.axis], shape, dtype=np.int64)

    @cached_property
    def lse(self) -> np.ndarray:
        """The log-sum-exp of each row, float64, of the labels' shape."""
        rows = self.as_rows(self.logits)
        result = np.empty(len(rows))
        for start in range(0, len(rows), step := max(1, 2**22 // rows.shape[1])):
            block = rows[start : start + step].astype(np.float64)
            top = block.max(axis=1, keepdims=True)
            result[start : start + step] = top[:, 0] + np.log(np.exp(block - top).sum(axis=1))
        return result.reshape(self.labels.shape)

    @cached_property
    def log_probs(self) -> np.ndarray:
        """Log-probabilities of the logits, in their dtype."""
        lse = np.expand_dims(self.lse, self.axis).astype(np.float32)
        return (self.logits - lse).astype(self.dtype, copy=False)

    @cached_property
    def out(self) -> np.ndarray:
        """An output of the logits' shape and dtype."""
        out = np.empty_like(self.logits)
        out.fill(1)
        return out

    def as_rows(self, array: Any, rows: slice = slice(None)) -> np.ndarray:
        """`array` as (rows, classes), a copy where the class axis is not the last."""
        array = self.host(array)
        classes = array.shape[self.axis]
        return np.moveaxis(array, self.axis, -1).reshape(-1, classes)[rows]

    def host(self, array: Any) -> np.ndarray:
        """An array or tensor as a NumPy array; bfloat16 tensors as float32."""
        if hasattr(array, "detach"):
            array = array.detach().cpu()
            array = array.float() if str(array.dtype) == "torch.bfloat16" else array
        return np.asarray(array)

    def at_labels(self, array: np.ndarray) -> np.ndarray:
        """The value at the label of each row, flat, in float64."""
        labels = np.expand_dims(self.labels, self.axis)
        return np.take_along_axis(array, labels, axis=self.axis).astype(np.float64).reshape(-1)


# ---------------------------------------------------------------------------------------------
# The reference, on a sample of the rows and on every label


def _sample(n: int) -> slice:
    return slice(None, None, max(1, n // 64))


def reference(case: Case, arrays: Arrays) -> tuple[float | None, np.ndarray | None]:
    """Loss and sampled rows of the array result in float64; None for what the op does not give."""
    some = _sample(case.rows)
    labels, lse = arrays.host(arrays.labels).reshape(-1), arrays.host(arrays.lse).reshape(-1)

    def rows(array: Any) -> np.ndarray:
        return arrays.as_rows(array, some).astype(np.float64)

    if case.op in ("log_softmax", "log_softmax_fresh"):
        return None, rows(arrays.logits) - lse[some, None]
    if case.op == "log_softmax_backward":
        grad = rows(arrays.grad_output)
        return None, grad - np.exp(rows(arrays.log_probs)) * grad.sum(axis=1, keepdims=True)
    if case.op == "nll_loss":
        return -float(np.mean(arrays.at_labels(arrays.log_probs))), None
    one_hot = (labels[some, None] == np.arange(case.classes)).astype(np.float64)
    if case.op == "nll_loss_backward":
        return None, -one_hot / case.rows
    loss = float(np.mean(lse - arrays.at_labels(arrays.logits)))
    if case.op == "cross_entropy":
        return loss, None
    grad = (np.exp(rows(arrays.logits) - lse[some, None]) - one_hot) / case.rows
    return (None if case.op == "cross_entropy_backward" else loss), grad


def check(case: Case, arrays: Arrays, result: Any) -> str | None:
    """What is wrong with the result of a call, in words, or None."""
    parts = result if isinstance(result, tuple) else (result,)
    loss, rows = reference(case, arrays)
    expected = [part for part in (loss, rows) if part is not None]
    if len(parts) != len(expected):
        return f"{len(parts)} results where {len(expected)} were expected"
    for part, want in zip(parts, expected, strict=True):
        if shape := tuple(np.shape(part)):
            if shape != case.shape:
                return f"shape {shape} where {case.shape} was expected"
            part = arrays.as_rows(part, _sample(case.rows))
        else:
            part = arrays.host(part)
        error = np.max(np.abs(part.astype(np.float64) - want)) / np.max(np.abs(want))
        if not error <= TOLERANCE[case.dtype]:
            return f"relative error {error:.1e}"
    return None


# ---------------------------------------------------------------------------------------------
# The callables: numbakern's, SciPy's and PyTorch's. A builder prepares everything and returns a
# call without arguments; an op that a library does not have is not in its table.

Builder = Callable[[Arrays], Call]


@dataclass(frozen=True)
class Peer:
    """A library, and its calls by the name of the op."""

    name: str
    module: str
    builders: Mapping[str, Builder]
    dtypes: frozenset[str] = frozenset({"float32", "float64"})

    @property
    def installed(self) -> bool:
        """Whether its module can be found (it is not imported)."""
        return importlib.util.find_spec(self.module) is not None

    def build(self, case: Case, arrays: Arrays) -> Call | None:
        """The call for a case; None where the library has nothing for it."""
        builder = self.builders.get(case.op)
        return None if builder is None or case.dtype not in self.dtypes else builder(arrays)


NUMBAKERN = Peer(
    "numbakern",
    "numbakern",
    {
        "log_softmax": lambda a: partial(numbakern.log_softmax, a.logits, a.axis, out=a.out),
        "log_softmax_fresh": lambda a: partial(numbakern.log_softmax, a.logits, a.axis),
        "log_softmax_backward": lambda a: partial(
            numbakern.log_softmax_backward, a.grad_output, a.log_probs, a.axis, out=a.out
        ),
        "cross_entropy": lambda a: partial(
            numbakern.cross_entropy, a.logits, a.labels, axis=a.axis
        ),
        "cross_entropy_backward": lambda a: partial(
            numbakern.cross_entropy_backward,
            1.0,
            a.logits,
            a.labels,
            axis=a.axis,
            lse=a.lse,
            out=a.out,
        ),
        "value_and_grad": lambda a: partial(
            numbakern.cross_entropy_value_and_grad, a.logits, a.labels, axis=a.axis, out=a.out
        ),
        "nll_loss": lambda a: partial(numbakern.nll_loss, a.log_probs, a.labels, axis=a.axis),
        "nll_loss_backward": lambda a: partial(
            numbakern.nll_loss_backward, 1.0, a.log_probs, a.labels, axis=a.axis, out=a.out
        ),
    },
    frozenset(TOLERANCE),
)


def _scipy_log_softmax(a: Arrays) -> Call:
    from scipy.special import log_softmax

    return partial(log_softmax, a.logits, axis=a.axis)


def _scipy_cross_entropy(a: Arrays) -> Call:
    from scipy.special import logsumexp

    labels = np.expand_dims(a.labels, a.axis)

    def call() -> Any:
        at_label = np.take_along_axis(a.logits, labels, axis=a.axis)
        return np.mean(logsumexp(a.logits, axis=a.axis, keepdims=True) - at_label)

    return call


def _scipy_value_and_grad(a: Arrays) -> Call:
    from scipy.special import log_softmax

    labels = np.expand_dims(a.labels, a.axis)
    scale = a.dtype.type(1 / labels.size)

    def call() -> Any:
        log_probs = log_softmax(a.logits, axis=a.axis)
        loss = -np.mean(np.take_along_axis(log_probs, labels, axis=a.axis))
        grad = np.exp(log_probs, out=log_probs)
        at_label = np.take_along_axis(grad, labels, axis=a.axis) - 1
        np.put_along_axis(grad, labels, at_label, axis=a.axis)
        grad *= scale
        return loss, grad

    return call


SCIPY = Peer(
    "scipy",
    "scipy",
    {
        "log_softmax": _scipy_log_softmax,
        "log_softmax_fresh": _scipy_log_softmax,
        "cross_entropy": _scipy_cross_entropy,
        "value_and_grad": _scipy_value_and_grad,
    },
)


def as_tensor(array: Any) -> Any:
    """A torch tensor on the array's own memory; a tensor as it is."""
    import torch

    if isinstance(array, torch.Tensor):
        return array
    if array.dtype.name == "bfloat16":  # torch.from_numpy does not know it
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _class_axis_second(a: Arrays, array: np.ndarray) -> Any:
    """A tensor laid out as torch's losses take it: (N, C, …); never a copy."""
    tensor = as_tensor(array)
    return tensor.movedim(a.axis, 1)


def _torch_log_softmax(a: Arrays) -> Call:
    import torch

    return partial(torch.log_softmax, as_tensor(a.logits), a.axis, out=as_tensor(a.out))


def _torch_log_softmax_fresh(a: Arrays) -> Call:
    import torch

    return partial(torch.log_softmax, as_tensor(a.logits), a.axis)


def _torch_log_softmax_backward(a: Arrays) -> Call:
    import torch

    log_probs = as_tensor(a.log_probs)
    backward = torch.ops.aten._log_softmax_backward_data
    return partial(
        backward.out,
        as_tensor(a.grad_output),
        log_probs,
        a.axis,
        log_probs.dtype,
        out=as_tensor(a.out),
    )


def _torch_loss(loss: str, array: str) -> Builder:
    def build(a: Arrays) -> Call:
        import torch.nn.functional

        function = getattr(torch.nn.functional, loss)
        return partial(function, _class_axis_second(a, getattr(a, array)), as_tensor(a.labels))

    return build


def _torch_loss_backward(loss: str, array: str) -> Builder:
    def build(a: Arrays) -> Call:
        import torch

        leaf = _class_axis_second(a, getattr(a, array)).requires_grad_()
        value = getattr(torch.nn.functional, loss)(leaf, as_tensor(a.labels))
        return lambda: torch.autograd.grad(value, leaf, retain_graph=True)[0].movedim(1, a.axis)

    return build


def torch_value_and_grad(a: Arrays, cross_entropy: Any) -> Call:
    """Loss and gradient through autograd; `cross_entropy` may be a compiled function."""
    import torch

    leaf = _class_axis_second(a, a.logits).requires_grad_()
    labels = as_tensor(a.labels)

    def call() -> Any:
        loss = cross_entropy(leaf, labels)
        return loss, torch.autograd.grad(loss, leaf)[0].movedim(1, a.axis)

    return call


def _torch_value_and_grad(a: Arrays) -> Call:
    import torch.nn.functional

    return torch_value_and_grad(a, torch.nn.functional.cross_entropy)


TORCH = Peer(
    "torch",
    "torch",
    {
        "log_softmax": _torch_log_softmax,
        "log_softmax_fresh": _torch_log_softmax_fresh,
        "log_softmax_backward": _torch_log_softmax_backward,
        "cross_entropy": _torch_loss("cross_entropy", "logits"),
        "cross_entropy_backward": _torch_loss_backward("cross_entropy", "logits"),
        "value_and_grad": _torch_value_and_grad,
        "nll_loss": _torch_loss("nll_loss", "log_probs"),
        "nll_loss_backward": _torch_loss_backward("nll_loss", "log_probs"),
    },
    frozenset(TOLERANCE),
)


# ---------------------------------------------------------------------------------------------
# Timing


def limit_threads(threads: int) -> None:
    """Give Numba, and PyTorch where it is installed, the same number of threads."""
    import numba

    numba.set_num_threads(threads)
    if TORCH.installed:
        import torch

        torch.set_num_threads(threads)


def numpy_copies(arrays: Arrays, threads: int, pool: ThreadPoolExecutor) -> dict[str, Call]:
    """NumPy's copy of the logits to the output, by one thread and by all."""
    bits = np.dtype(f"u{arrays.dtype.itemsize}")
    source, target = arrays.logits.view(bits).reshape(-1), arrays.out.view(bits).reshape(-1)
    calls: dict[str, Call] = {"numpy.copyto": partial(np.copyto, target, source)}
    if threads > 1:
        parts = np.array_split(target, threads), np.array_split(source, threads)
        calls[f"numpy.copyto, {threads} threads"] = lambda: list(pool.map(np.copyto, *parts))
    return calls


def copies(arrays: Arrays, threads: int, pool: ThreadPoolExecutor) -> dict[str, Call]:
    """Every way of copying the logits to the output that may turn out the fastest."""
    calls = numpy_copies(arrays, threads, pool)
    if TORCH.installed:
        calls["torch.copy_"] = partial(as_tensor(arrays.out).copy_, as_tensor(arrays.logits))
    return calls


@cache
def _ballast() -> np.ndarray:
    return np.ones(2**24)  # 128 MiB, more than the caches of a core hold


def interleave(
    calls: Mapping[str, Call], *, rounds: int = 15, seconds: float = 2.0, warm: bool = False
) -> dict[str, list[float]]:
    """Time each call once a round, in an order that turns; return the seconds a call.

    Before each turn 128 MiB of other memory are read. So no array is in the caches, whatever its
    size and whoever came before, and the threads that spin for some milliseconds after their work
    are asleep. `warm` is for calls of microseconds: each turn is then an untimed call and
    2 ms of the same call over and over.

    A call that has used up `seconds` stops after three rounds at the earliest. Two calls of each
    come before everything: they compile, and say how long one takes.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    number = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        number[name] = max(1, math.ceil(2e-3 / max(once, 1e-7))) if warm else 1
    ballast = _ballast()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                repeat, call = number[name], calls[name]
                if len(times[name]) >= 3 and sum(times[name]) * repeat > seconds:
                    continue
                ballast.sum()
                if warm:
                    call()
                start = time.perf_counter()
                for _ in range(repeat):
                    call()
                times[name].append((time.perf_counter() - start) / repeat)
    finally:
        if collecting:
            gc.enable()
    return times


@dataclass(frozen=True)
class Result:
    """The medians of one case, in seconds, and what could not be measured and why."""

    case: Case
    copy_seconds: float
    copy_name: str
    seconds: Mapping[str, float]
    notes: Mapping[str, str] = field(default_factory=dict)

    def multiple(self, name: str = "numbakern") -> float:
        """The time of a library in copies of the array."""
        return multiple(self.seconds[name], self.copy_seconds)

    def gigabytes_per_second(self, name: str = "numbakern") -> float:
        """The least traffic of the call over the time of a library."""
        return gigabytes_per_second(self.case.nbytes, self.seconds[name])


class Bench:
    """Measures cases one after the other, keeping the arrays between cases that share them."""

    def __init__(
        self,
        peers: Sequence[Peer],
        threads: int,
        *,
        rounds: int = 15,
        seconds: float = 2.0,
        warm: bool = False,
    ) -> None:
        self.peers, self.threads, self.warm = peers, threads, warm
        self.rounds, self.seconds = rounds, seconds
        self._key: tuple[Any, ...] = ()
        self._arrays: Arrays | None = None
        limit_threads(threads)

    def arrays(self, case: Case) -> Arrays:
        """The arrays of a case, those of the case before where they serve."""
        key = case.shape, case.dtype, case.axis
        if self._arrays is None or key != self._key:
            self._arrays = None  # freed before the next ones are made
            self._key, self._arrays = key, self.make(*key)
        return self._arrays

    def make(self, shape: tuple[int, ...], dtype: str, axis: int) -> Arrays:
        """Fresh arrays."""
        return Arrays(shape, dtype, axis)

    def time(self, case: Case, arrays: Arrays, calls: Mapping[str, Call]) -> Times:
        """Seconds of every call and of every copy."""
        with ThreadPoolExecutor(self.threads) as pool:
            anchors = copies(arrays, self.threads, pool)
            times = interleave(
                {**anchors, **calls},
                # The shorter the call, the noisier, and the cheaper another round.
                rounds=self.rounds * (4 if case.nbytes < 2**26 else 1),
                seconds=self.seconds,
                warm=self.warm or case.nbytes < 2**16,
            )
        return {name: times[name] for name in anchors}, {name: times[name] for name in calls}

    def measure(self, case: Case) -> Result:
        """Check and time one case; what fails, numbakern's own call included, ends in the notes."""
        arrays = self.arrays(case)
        calls: dict[str, Call] = {}
        notes: dict[str, str] = {}
        for library in (NUMBAKERN, *self.peers):
            if not library.installed:
                notes[library.name] = NOT_INSTALLED
                continue
            try:
                call = library.build(case, arrays)
                arrays.out[...] = 1  # an earlier result in it would pass the check
                wrong = None if call is None else check(case, arrays, call())
            except Exception as error:
                notes[library.name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                continue
            if call is None:
                notes[library.name] = DOES_NOT_APPLY
            elif wrong:
                notes[library.name] = f"wrong result: {wrong}"
            else:
                calls[library.name] = call
        copy_times, times = self.time(case, arrays, calls)
        fastest = min(copy_times, key=lambda name: median(copy_times[name]))
        return Result(
            case,
            median(copy_times[fastest]),
            fastest,
            {name: median(values) for name, values in times.items()},
            notes,
        )


# ---------------------------------------------------------------------------------------------
# On the screen


def progress(cases: Sequence[Case]) -> Iterator[Case]:
    """The cases, with a bar on stderr while it is a terminal: tqdm's where it is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        shown = sys.stderr.isatty()
        for done, case in enumerate(cases):
            if shown:
                bar = "#" * (20 * done // len(cases))
                print(f"\r[{bar:20}] {done}/{len(cases)} {case.name:50}", end="", file=sys.stderr)
            yield case
        if shown:
            print(f"\r{'':80}\r", end="", file=sys.stderr)
        return
    with tqdm(cases, unit="case", disable=None, leave=False) as bar_of_cases:
        for case in bar_of_cases:
            bar_of_cases.set_description(case.name)
            yield case


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns, the first two to the left and the figures to the right; plain ASCII."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
