"""The README's table and picture, from the results of the machine that it names."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import ROOT, report
from benchmarks.dashboard import plots, results

MACHINE = "zen5-avx512-2core"
BEGIN, END = "<!-- speed table -->\n", "<!-- end of the speed table -->\n"


def table(folder: Path) -> str:
    """The table of the machine, and what it was measured with."""
    machine = next(m for m in results.machines(folder) if m.name == MACHINE)
    found = machine.table("cpu")
    assert found is not None
    measured, rows = found
    versions = machine.about.get("versions", measured.versions)
    names = ", ".join(f"{name} {v}" for name, v in versions.items() if name != "numbakern")
    return (
        f"{report.markdown_table(rows)}\n\n{MACHINE}, {machine.about.get('threads', '?')} threads, "
        f"Python {measured.python}, {names}; {measured.date:%Y-%m-%d}, {measured.commit[:8]}.\n"
    )


def write(folder: Path, readme: Path = ROOT / "README.md", docs: Path = ROOT / "docs") -> None:
    """Put the table between its marks, and draw the picture in `docs`."""
    text = readme.read_text(encoding="utf-8")
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    new, count = re.subn(pattern, lambda _: BEGIN + table(folder) + END, text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{readme.name}: expected one table between {BEGIN!r} and {END!r}")
    readme.write_text(new, encoding="utf-8")
    machine = next(m for m in results.machines(folder) if m.name == MACHINE)
    if found := machine.table("cpu"):
        docs.mkdir(exist_ok=True)
        plots.roofline(found[1], "cpu", docs, "roofline")
