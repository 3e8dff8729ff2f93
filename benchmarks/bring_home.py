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
from benchmarks.runner import MACHINE_NAME, Benchmark, discover

RESULTS = ROOT / "benchmarks/results"


def git(*arguments: str, root: Path = ROOT) -> str:
    """What git prints."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit("git: not found") from None
    if done.returncode:
        raise SystemExit(f"git {arguments[0]}: {done.stderr.strip().splitlines()[0]}")
    return done.stdout


def commit_of(name: str, root: Path = ROOT) -> str:
    """The hash of what a name stands for."""
    try:
        return git("rev-parse", "--verify", f"{name}^{{commit}}", root=root).strip()
    except SystemExit as error:
        raise SystemExit(f"{name}: expected a commit of this repository ({error})") from None


def branch(root: Path = ROOT) -> str:
    """Where the history is: main, or what is known of it, or what is checked out."""
    for name in ("main", "origin/main"):
        if git("for-each-ref", f"refs/heads/{name}", f"refs/remotes/{name}", root=root):
            return name
    return "HEAD"


def load(path: Path) -> dict[str, Any]:
    """What a file of `python -m benchmarks --save` holds; SystemExit for any other content."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["environment"]
        # These become names of files.
        names = [content["machine"], found["python"], *found["versions"].values()]
        if not all(MACHINE_NAME.fullmatch(name) for name in names):
            raise ValueError(f"a name with other characters than letters, digits and -_.+: {names}")
        if not isinstance(content["sources"], str):
            raise TypeError("sources: expected a digest")
        for entry in content["results"].values():
            for params, value in [(entry["version"], None), *entry["values"]]:
                if not all(isinstance(text, str) for text in params):
                    raise TypeError(f"parameters: expected text, got {params!r}")
                if not isinstance(value, (int, float, type(None))):
                    raise TypeError(f"figure: expected a number, got {value!r}")
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise SystemExit(f"{path}: not what `python -m benchmarks --save` writes: {what}") from None
    assert isinstance(content, dict)
    return content


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
    parser.add_argument("file", type=Path, help="what `python -m benchmarks --save` wrote")
    parser.add_argument("--commit", help="which of the commits that have these sources")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    measured = load(options.file)
    commits = list(commits_of(measured["sources"]))
    if not commits:
        shallow = git("rev-parse", "--is-shallow-repository").strip() == "true"
        hint = " It is cut off: git fetch --unshallow" if shallow else ""
        print(f"No commit of this history has the sources measured.{hint}", file=sys.stderr)
        return 1
    commit = commit_of(options.commit) if options.commit else commits[0]
    if commit not in commits:
        print(f"{commit[:8]} does not have the sources that were measured.", file=sys.stderr)
        return 1
    path = bring_home(measured, commit, options.results)
    print(f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
