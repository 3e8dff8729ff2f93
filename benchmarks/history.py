"""`python -m benchmarks.history MACHINE`: measure everything in `results/MACHINE` again.

First asv builds each commit of `commits.txt` in an environment of its own and measures some figures
of numbakern alone; then the suite runs on the package that Python finds here, which must be that of
a commit, beside every library that is installed. At last the README's table follows.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT, bring_home, digest, sources
from benchmarks.__main__ import machine_name
from benchmarks.bring_home import RESULTS, branch
from benchmarks.dashboard import readme, site

COMMITS = ROOT / "benchmarks/commits.txt"
# Of old commits: what a regression would show in, and takes a minute or two.
FAST = (
    r"^startup\.(Import|FirstCall.*'cpu')",
    r"^numerics\.Ulp\.track_ulp\('numbakern', '(log_softmax|gradient)', 'float(32|64)'",
    r"^cpu\.Speed\.track_(x_copy|seconds)\('numbakern', "
    r"('(log_softmax|value_and_grad)', '[^']*', 'float32'"
    r"|'(log_softmax_backward|cross_entropy)', '1024x32000', 'float32'"
    r"|'value_and_grad', '1024x32000', 'bfloat16')",
)


def status_of(command: Sequence[str]) -> int:
    """Run a command before the user's eyes; gives its status."""
    return subprocess.run(command).returncode


def of_commits(machine: str, commits: Path, results: Path) -> int:
    """Measure the commits that a file lists; gives asv's status."""
    from asv.machine import MachineCollection
    from asv.util import UserError

    try:
        MachineCollection.load(machine)
    except UserError:  # nothing but the name: every other field would split its series
        MachineCollection.save(machine, {"machine": machine})
    about = results / machine / "machine.json"
    known = about.read_bytes() if about.exists() else None  # asv knows less of a machine
    selected = [option for pattern in FAST for option in ("-b", pattern)]
    with tempfile.TemporaryDirectory() as work:
        environments = str(ROOT / ".asv/env")
        changes = {"results_dir": str(results.resolve()), "branches": [branch()]}
        config = site.configuration(Path(work), env_dir=environments, **changes)
        command = [sys.executable, "-m", "asv", "--config", str(config), "run"]
        command += ["--machine", machine, *selected, f"HASHFILE:{commits}"]
        try:
            return status_of(command)
        finally:
            if known is not None:
                about.write_bytes(known)


def of_this(machine: str, results: Path) -> int:
    """Measure the package that is installed beside all others; gives a status."""
    file = ROOT / f".asv/{machine}.json"
    file.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "benchmarks", "--machine", machine, "--save", str(file)]
    measured = status_of(command)
    return bring_home.main([str(file), "--results", str(results)]) or measured


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.history", description=__doc__)
    parser.add_argument("machine", type=machine_name, help="its class, e.g. zen5-avx512-2core")
    parser.add_argument("--commits", type=Path, default=COMMITS, help="file with a hash a line")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--only", choices=["commits", "this"], help="a half of it")
    options = parser.parse_args(argv)
    if options.only != "commits" and not any(bring_home.commits_of(digest(sources()))):
        print("The package that Python finds here is that of no commit.", file=sys.stderr)
        return 1
    status = 0
    if options.only != "this":
        status |= of_commits(options.machine, options.commits.resolve(), options.results)
    if options.only != "commits":
        status |= of_this(options.machine, options.results)
        if (options.machine, options.results) == (readme.MACHINE, RESULTS):
            readme.write(options.results)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
