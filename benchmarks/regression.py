"""`python -m benchmarks.regression`: is the working tree slower than main?

Both versions of the package run side by side, each in a process of its own, and take turns on the
very same memory: call by call, so that a noisy neighbour hits both alike. A case that seems slower
is measured twice again in fresh processes. It is slower if, over all of them, the ratio of the
lowest deciles of their times is above the threshold, and if more neighbouring calls have a ratio
above it than noise gives. Then the status is 1; where a version cannot run or is wrong, 125.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import numpy as np

from benchmarks import ROOT, bounds, suite
from benchmarks.bring_home import branch, commit_of
from numbakern._roofline import NUMBAKERN, Arrays, Case, check, interleave, numpy_copies, table

THRESHOLD = 1.15
ATTEMPTS = 3
ROUNDS = 16
CHANCE = 1e-3  # of a false alarm, a case
CASES = (
    Case("log_softmax", (512, 32000)),
    Case("log_softmax_backward", (512, 32000)),
    Case("cross_entropy", (512, 32000)),
    Case("value_and_grad", (512, 32000)),
    Case("value_and_grad", (512, 32000), "bfloat16"),
    Case("log_softmax", bounds.SHORT),
    Case("value_and_grad", bounds.SHORT),
    Case("value_and_grad", bounds.TEN),
    Case("log_softmax", (2, 21, 512, 512), axis=1),
    Case("log_softmax", bounds.SMALL),
)
# The arrays of a case that a call may read or write, in files that both processes map.
SHARED = ("logits", "grad_output", "labels", "lse", "log_probs", "out")


@dataclass(frozen=True)
class Compared:
    """Seconds of neighbouring calls of both versions, and of the copies between them."""

    case: Case
    base: Sequence[float]
    tree: Sequence[float]
    copy: Sequence[float]

    @property
    def ratio(self) -> float:
        """How many times as long the tree takes, by lowest deciles: noise hardly reaches them."""
        return float(np.quantile(self.tree, 0.1) / np.quantile(self.base, 0.1))

    def chance(self, threshold: float) -> float:
        """How probable so many pairs above the threshold are, if a pair is below it as often."""
        pairs = len(self.base)
        above = sum(
            tree > threshold * base for base, tree in zip(self.base, self.tree, strict=True)
        )
        return sum(math.comb(pairs, n) for n in range(above, pairs + 1)) / 2**pairs

    def verdict(self, threshold: float) -> str:
        """`ok`, `slower`, or `noisy` where the pairs do not bear the ratio out."""
        if self.ratio <= threshold:
            return "ok"
        return "slower" if self.chance(threshold) < CHANCE else "noisy"

    def __add__(self, other: Compared) -> Compared:
        """Both measurements of the case in one."""
        times = (self.base, other.base), (self.tree, other.tree), (self.copy, other.copy)
        return Compared(self.case, *([*one, *more] for one, more in times))

    def x_copy(self, times: Sequence[float]) -> float:
        """Median time in copies of the array."""
        return median(times) / median(self.copy)


def share(case: Case, folder: Path) -> None:
    """Write the arrays of a case to files."""
    arrays = Arrays(case.shape, case.dtype, case.axis)
    for name in SHARED:
        array = getattr(arrays, name)
        array.view(np.uint8).reshape(-1).tofile(folder / name)


def attach(case: Case, folder: Path) -> Arrays:
    """Arrays on the memory of those files."""
    arrays = Arrays(case.shape, case.dtype, case.axis)
    rows = case.shape[: arrays.axis] + case.shape[arrays.axis + 1 :]
    kinds: dict[str, tuple[Any, tuple[int, ...]]] = {
        "labels": (np.int64, rows),
        "lse": (np.float64, rows),
    }
    for name in SHARED:
        dtype, shape = kinds.get(name, (arrays.dtype, case.shape))
        mapped = np.memmap(folder / name, np.uint8, "r+")
        arrays.__dict__[name] = np.asarray(mapped).view(dtype).reshape(shape)
    return arrays


def work(pipe_in: Iterable[str], pipe_out: Any) -> None:
    """One version: prepare a case, then answer each line with the seconds of a copy and a call."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt ends it; the parent tells
    threads = suite.available_threads()
    case, arrays, calls = None, None, {}
    with ThreadPoolExecutor(threads) as pool:
        for line in pipe_in:
            if line.strip() != "go":
                asked = json.loads(line)
                case = Case(asked["op"], tuple(asked["shape"]), asked["dtype"], asked["axis"])
                arrays = attach(case, Path(asked["folder"]))
                call = NUMBAKERN.build(case, arrays)
                assert call is not None
                arrays.out[...] = 1
                answer: Any = check(case, arrays, call())
                anchors = numpy_copies(arrays, threads, pool)
                times = interleave(anchors, rounds=3)
                fastest = min(anchors, key=lambda name: median(times[name]))
                calls = {"copy": anchors[fastest], "call": call}
            else:
                assert case is not None
                warm = case.nbytes < 2**16
                times = interleave(calls, rounds=1 if case.nbytes > 2**26 else 3, warm=warm)
                answer = {name: min(values) for name, values in times.items()}
            print(json.dumps(answer), file=pipe_out, flush=True)


def give_up(why: str) -> NoReturn:
    """End with the status at which `git bisect run` skips a commit: neither good nor bad."""
    print(why, file=sys.stderr)
    raise SystemExit(125)


class Version:
    """A process that measures one version of the package."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        program = "import sys; from benchmarks.regression import work; work(sys.stdin, sys.stdout)"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=folder,  # the first place where Python looks for the package
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, line: str) -> Any:
        """Send a line, and wait for the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            give_up(f"{self.name}: its process ended with status {self.process.wait()}")
        return json.loads(answer)

    def end(self) -> None:
        """Stop the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def compare(base: Path, tree: Path, cases: Iterable[Case], rounds: int) -> list[Compared]:
    """Measure the cases with the packages in both folders, call by call in turn."""
    versions = {"base": Version("base", base), "tree": Version("tree", tree)}
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    found = []
    try:
        for case in cases:
            with tempfile.TemporaryDirectory(dir=memory) as name:
                share(case, Path(name))
                asked = {"op": case.op, "shape": case.shape, "dtype": case.dtype}
                line = json.dumps({**asked, "axis": case.axis, "folder": name})
                for which, version in versions.items():
                    if wrong := version.ask(line):
                        give_up(f"{which}: {case.name}: wrong result: {wrong}")
                times: dict[str, list[float]] = {"base": [], "tree": [], "copy": []}
                for turn in range(rounds):
                    for which in ("base", "tree") if turn % 2 else ("tree", "base"):
                        answer = versions[which].ask("go")
                        times[which].append(answer["call"])
                        times["copy"].append(answer["copy"])
                found.append(Compared(case, **times))
    finally:
        for version in versions.values():
            version.end()
    return found


def measure(
    base: Path,
    tree: Path,
    cases: Sequence[Case],
    threshold: float,
    rounds: int = ROUNDS,
    attempts: int = ATTEMPTS,
) -> list[Compared]:
    """Each case's measurements, of those that seem slower as many as there are attempts."""
    found: dict[Case, Compared] = {}
    for _ in range(attempts):
        suspects = [case for case in cases if case not in found or found[case].ratio > threshold]
        for compared in compare(base, tree, suspects, rounds) if suspects else []:
            known = found.get(compared.case)
            found[compared.case] = known + compared if known else compared
    return list(found.values())


def unpack(commit: str, folder: Path, root: Path = ROOT) -> Path:
    """The package of a commit, or that of the working tree for an empty name."""
    folder.mkdir()
    if commit:
        archive = subprocess.run(
            ["git", "-C", str(root), "archive", commit, "numbakern"], capture_output=True
        )
        if archive.returncode:
            raise SystemExit(f"{commit[:8]}: {archive.stderr.decode().strip().splitlines()[0]}")
        subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    else:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / "numbakern", folder / "numbakern", ignore=ignored)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regression", description=__doc__)
    parser.add_argument("--base", help="what to compare with (default: main, or origin's)")
    parser.add_argument("--commit", default="", help="compare this commit, not the working tree")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="largest ratio allowed")
    parser.add_argument("--case", action="append", metavar="TEXT", help="only names with TEXT")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="pairs of calls a case")
    options = parser.parse_args(argv)
    wanted = options.case or [""]
    cases = [case for case in CASES if any(text in case.name for text in wanted)]
    if not cases:
        names = ", ".join(case.name for case in CASES)
        parser.error(f"--case: expected a part of one of {names}; got {', '.join(wanted)}")
    if options.rounds < 1 or not options.threshold > 0:
        parser.error("--rounds: expected 1 or more; --threshold: expected a positive number")
    named = options.base or branch()
    if named == "HEAD":
        parser.error("--base: neither main nor origin/main is in this clone")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        base = unpack(commit_of(named), Path(name) / "base")
        tree = unpack(options.commit and commit_of(options.commit), Path(name) / "tree")
        found = measure(base, tree, cases, options.threshold, options.rounds)
    lines = [
        [
            compared.case.name,
            compared.verdict(options.threshold),
            f"{compared.x_copy(compared.base):.3f}",
            f"{compared.x_copy(compared.tree):.3f}",
            f"{compared.ratio:.3f}",
        ]
        for compared in found
    ]
    print(table(["case", "", f"{named}, x copy", "tree, x copy", "ratio"], lines))
    slower = sum(line[1] == "slower" for line in lines)
    print(
        f"\n{slower} of {len(found)} cases more than {options.threshold:g} times as slow as "
        f"{named}, {time.perf_counter() - start:.0f} s"
    )
    return int(slower > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
