"""`python -m benchmarks.bring_home FILE`: add what was measured elsewhere to the results here.

The file comes from `python -m benchmarks --save`, on a machine that need have neither git nor a
network. It names the sources that were measured by their digest, which is looked up in this
repository's history: figures of edited sources belong to no commit and are refused.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT, digest
from benchmarks.runner import Benchmark, discover

RESULTS = ROOT / "benchmarks/results"


def git(*arguments: str, root: Path = ROOT) -> str:
    """What git prints."""
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    return done.stdout


def commits_of(sources: str, root: Path = ROOT) -> Iterator[str]:
    """The commits whose package has this digest, newest first."""
    for commit in git("log", "--format=%H", root=root).split():
        names = {}
        for line in git("ls-tree", "-r", commit, "numbakern/", root=root).splitlines():
            entry, _, path = line.partition("\t")
            if path.endswith(".py"):
                names[path.removeprefix("numbakern/")] = entry.split()[2]
        if digest(names) == sources:
            yield commit


def in_asv_form(benchmark: Benchmark, entry: dict[str, Any]) -> dict[str, Any] | None:
    """The figures in the order of the parameters; None if the benchmark has changed since."""
    if entry["version"] != benchmark.version:
        return None
    found = {tuple(params): value for params, value in entry["values"]}
    found = {key: math.nan if value is None else value for key, value in found.items()}
    order = [tuple(map(repr, params)) for params in benchmark.selected([])]
    if not set(order) & set(found):
        return None
    return {
        "params": [list(map(repr, values)) for values in benchmark.params],
        "result": [found.get(key, math.nan) for key in order],
    }


def bring_home(measured: dict[str, Any], commit: str, results: Path, root: Path = ROOT) -> Path:
    """Write asv's result file of a commit and a machine; gives its path."""
    from asv.results import Results
    from asv.runner import BenchmarkResult

    found, machine = measured["environment"], measured["machine"]
    # torch, for its copy may be the yardstick: with and without it are two series.
    names = [name for name in ("numba", "numpy", "torch") if name in found["versions"]]
    versions = {name: found["versions"][name] for name in names}
    env_name = f"measured-py{found['python']}" + "".join(f"-{n}{v}" for n, v in versions.items())
    date = int(git("log", "-1", "--format=%ct", commit, root=root)) * 1000
    params = {"machine": machine, "python": found["python"], **versions}
    kept = Results(params, versions, commit, date, found["python"], env_name, {})
    kept.load_data(str(results))
    for benchmark in discover():
        entry = measured["results"].get(benchmark.name)
        form = in_asv_form(benchmark, entry) if entry else None
        if form is None:
            if entry:
                print(f"{benchmark.name}: left out, its version or parameters have changed")
            continue
        nothing = [None] * len(form["result"])
        chosen = {i for i, value in enumerate(form["result"]) if not math.isnan(value)}
        kept.add_result(
            {"name": benchmark.name, "version": benchmark.version, "params": form["params"]},
            BenchmarkResult(form["result"], nothing, nothing, 0, "", None),
            # What this file has no figure for keeps the one of an earlier file.
            selected_idx=chosen if benchmark.name in kept.get_all_result_keys() else None,
        )
    folder = results / machine
    folder.mkdir(parents=True, exist_ok=True)
    about = {key: found[key] for key in ("cpu", "gpu", "threads") if key in found}
    about |= {"machine": machine, "versions": found["versions"], "version": 1}
    (folder / "machine.json").write_text(json.dumps(about, indent=4, sort_keys=True) + "\n")
    kept.save(str(results))
    return folder / f"{commit[:8]}-{env_name}.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bring_home", description=__doc__)
    parser.add_argument("file", help="what `python -m benchmarks --save` wrote")
    parser.add_argument("--commit", help="which of the commits that have these sources")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    measured = json.loads(Path(options.file).read_text(encoding="utf-8"))
    commits = list(commits_of(measured["sources"]))
    if not commits:
        print("No commit of this history has the sources that were measured.", file=sys.stderr)
        return 1
    commit = git("rev-parse", options.commit).strip() if options.commit else commits[0]
    if commit not in commits:
        print(f"{commit[:8]} does not have the sources that were measured.", file=sys.stderr)
        return 1
    path = bring_home(measured, commit, options.results)
    print(f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
