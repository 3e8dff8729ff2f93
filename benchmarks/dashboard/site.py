"""Builds the folder of pages: asv's own, their scripts, and the front page on top of them."""

from __future__ import annotations

import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numbakern
from benchmarks import ROOT
from benchmarks.bring_home import branch, git
from benchmarks.dashboard import page
from benchmarks.dashboard.results import about, files, machines

# Name in asv's index.html: (npm package, its version, file in it).
SCRIPTS = {
    "jquery-3.3.1.min.js": ("jquery", "3.3.1", "dist/jquery.min.js"),
    "jquery.flot.min.js": ("flot", "0.8.3", "jquery.flot.js"),
    "jquery.flot.time.min.js": ("flot", "0.8.3", "jquery.flot.time.js"),
    "jquery.flot.selection.min.js": ("flot", "0.8.3", "jquery.flot.selection.js"),
    "jquery.flot.categories.min.js": ("flot", "0.8.3", "jquery.flot.categories.js"),
    "jquery.flot.orderBars.js": ("flot-orderbars", "1.0.0", "js/jquery.flot.orderBars.js"),
    "stupidtable.min.js": ("stupid-table-plugin", "1.1.3", "stupidtable.min.js"),
    "md5.min.js": ("blueimp-md5", "2.19.0", "js/md5.min.js"),
    "bootstrap.min.js": ("bootstrap", "3.1.1", "dist/js/bootstrap.min.js"),
    "bootstrap.min.css": ("bootstrap", "3.1.1", "dist/css/bootstrap.min.css"),
}

# (file, a line of it, what has to follow that line).
CORRECTIONS = (
    # The length of the axis is no number where a text parameter is the axis: no bars.
    (
        "vendor/jquery.flot.orderBars.js",
        "var AxeSize = minMaxValues[1] - minMaxValues[0];",
        " if (isNaN(AxeSize)) { AxeSize = plot.getData()[0].data.length; }",
    ),
    # A series without any point has no last one.
    (
        "asv.js",
        "time_idx = raw_series.length - 1;",
        " if (time_idx < 0) { return []; }",
    ),
)

# What becomes a choice in asv's sidebar; every other field would split the series of a machine.
FACETS = ("machine", "python", "numba", "numpy", "torch")


def build(folder: Path, results: Path, scripts: Path | None = None) -> None:
    """Build all pages in `folder`, which is replaced if it has such pages or nothing."""
    built = (folder / "commits.html").exists()
    if folder.exists() and any(folder.iterdir()) and not built:
        raise SystemExit(f"{folder}: expected a folder of the dashboard's own, or none")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        staged = stage(results, work / "results")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_commits(folder, results)  # first: it marks the folder as ours, whatever follows
        publish(staged, folder / "asv", work)
        vendor(folder / "asv", scripts or fetch(ROOT / ".asv/npm"))
    page.write(folder, results)


def stage(results: Path, staged: Path) -> Path:
    """A copy of the results that asv shows as one series a machine and version."""
    for machine in results.glob("*/machine.json"):
        target = staged / machine.parent.name
        target.mkdir(parents=True)
        content = {"machine": about(machine.parent)["machine"], "version": 1}
        (target / "machine.json").write_text(json.dumps(content))
        for path, content in files(machine.parent):
            content["params"] = {name: content["params"].get(name, "-") for name in FACETS}
            content["env_vars"] = {}
            (target / path.name).write_text(json.dumps(content))
    if not staged.exists():
        raise SystemExit(f"{results}: expected a folder with machine.json for each machine")
    return staged


def asv(*arguments: str, config: Path) -> str:
    """Run asv with a home of its own, on the package that is imported here."""
    environment = {
        **os.environ,
        "HOME": str(config.parent),
        "ASV_PYTHONPATH": str(Path(numbakern.__file__).parents[1]),
    }
    machine = {"version": 1, "here": {"machine": "here"}}
    (config.parent / ".asv-machine.json").write_text(json.dumps(machine))
    done = subprocess.run(
        [sys.executable, "-m", "asv", "--config", str(config), *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"asv {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done.stdout


def configuration(work: Path, **changes: Any) -> Path:
    """asv.conf.json with absolute paths and these changes, written to `work`."""
    content = json.loads((ROOT / "asv.conf.json").read_text(encoding="utf-8"))
    content |= {"repo": str(ROOT), "benchmark_dir": str(ROOT / "benchmarks")}
    content |= {"env_dir": str(work / "env"), **changes}
    path = work / "asv.conf.json"
    path.write_text(json.dumps(content))
    return path


def publish(staged: Path, folder: Path, work: Path) -> None:
    """asv's pages, from results and the benchmarks as they are now."""
    config = configuration(work, results_dir=str(staged), html_dir=str(folder), branches=[branch()])
    asv(
        *("run", "--bench", "just-discover", "--environment", "existing:same"),
        *("--machine", "here"),
        config=config,
    )
    shutil.rmtree(staged / "here", ignore_errors=True)
    show_what_is_missing(staged)
    asv("publish", "--no-pull", config=config)


def show_what_is_missing(staged: Path) -> None:
    """Give each series an n/a for every benchmark that it never ran: asv's pages ask for it."""
    benchmarks = json.loads((staged / "benchmarks.json").read_text(encoding="utf-8"))
    del benchmarks["version"]
    paths = sorted(path for path in staged.glob("*/*.json") if path.name != "machine.json")
    contents = {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    series: dict[str, list[Path]] = {}
    for path, content in contents.items():
        series.setdefault(json.dumps(content["params"]), []).append(path)
    for paths in series.values():
        run = {name for path in paths for name in contents[path]["results"]}
        for name in set(benchmarks) - run:
            benchmark = benchmarks[name]
            nothing = [math.nan] * math.prod(map(len, benchmark["params"]))
            row = [nothing, benchmark["params"], benchmark["version"]]
            contents[paths[0]]["results"][name] = row
        paths[0].write_text(json.dumps(contents[paths[0]]))


def fetch(folder: Path) -> Path:
    """The scripts' npm packages, installed in `folder` unless they are there."""
    packages = sorted({f"{package}@{version}" for package, version, _ in SCRIPTS.values()})
    wanted = "\n".join(packages)
    note = folder / "packages.txt"
    if not note.exists() or note.read_text() != wanted:
        if shutil.which("npm") is None:
            raise SystemExit("npm: not found; it fetches the scripts of asv's pages")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}')
        options = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
        done = subprocess.run(
            ["npm", "install", *options, *packages], cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"npm install\n{done.stdout}{done.stderr}")
        note.write_text(wanted)
    return folder / "node_modules"


def vendor(folder: Path, node_modules: Path) -> None:
    """Make asv's pages work without internet, on a phone and in the dark."""
    index = folder / "index.html"
    text = index.read_text(encoding="utf-8")
    (folder / "vendor").mkdir(exist_ok=True)

    def local(match: re.Match[str]) -> str:
        name = match[3].rsplit("/", 1)[1]
        if name not in SCRIPTS:
            raise SystemExit(f"asv's pages need a script that is not listed: {match[3]}")
        package, _, file = SCRIPTS[name]
        shutil.copy(node_modules / package / file, folder / "vendor" / name)
        rest = re.sub(r'\s(integrity|crossorigin|referrerpolicy)="[^"]*"', "", match[4])
        return f'<{match[1]}{match[2]}="vendor/{name}"{rest}>'

    tag = r'<(script|link)([^>]*?\s(?:src|href))="(https?://[^"]+)"([^>]*)>'
    text = re.sub(tag, local, text)
    shutil.copy(Path(__file__).parent / "asv.css", folder / "extra.css")
    head = '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    head += '<link href="extra.css" rel="stylesheet" type="text/css">\n</head>'
    index.write_text(text.replace("</head>", head, 1), encoding="utf-8")
    for name, line, added in CORRECTIONS:
        script = (folder / name).read_text(encoding="utf-8")
        if script.count(line) != 1:
            raise SystemExit(f"{name} has changed: look at its correction again")
        (folder / name).write_text(script.replace(line, line + added), encoding="utf-8")


def history() -> list[str]:
    """A line a commit: its hash, its date, its subject."""
    return git("log", "--format=%H%x09%cs%x09%s", branch()).splitlines()


def write_commits(folder: Path, results: Path) -> None:
    """One line a commit, for the links of asv's pages."""
    measured = {file.commit for machine in machines(results) for file in machine.files}
    rows = [line.split("\t", 2) for line in history()]
    if unknown := sorted(measured - {commit for commit, *_ in rows}):
        names = ", ".join(commit[:8] for commit in unknown)
        print(f"not in this history, so not in asv's graphs: {names}", file=sys.stderr)
        rows += [[commit, "", "not in this history"] for commit in unknown]
    lines = []
    for commit, date, subject in rows:
        mark = ' class="measured"' if commit in measured else ""
        # asv links by the whole hash.
        lines.append(
            f'<tr id="{commit}"{mark}><td>{date}</td><td><code>{commit[:8]}</code></td>'
            f"<td>{html.escape(subject)}</td></tr>"
        )
    body = (
        '<p><a href="index.html">Speed of numbakern</a></p><h1>Commits</h1>'
        "<p>Those that were measured are bold.</p>"
        f'<div class="scroll"><table class="commits">{"".join(lines)}</table></div>'
    )
    (folder / "commits.html").write_text(page.document("Commits", body), encoding="utf-8")
