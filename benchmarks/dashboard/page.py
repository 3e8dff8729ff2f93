"""The front page: what a user asks first, with links into asv's graphs."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from benchmarks import bounds, report
from benchmarks.dashboard import plots
from benchmarks.dashboard.results import Machine, Measured, machines
from benchmarks.report import Row

TITLES = {"cpu": "CPU", "cuda": "CUDA"}
METHOD = """
<h2 id="how">How it was measured</h2>
<p>Every library is called in turn, in one process, with a copy of the same array: a noisy neighbour
hits all of them alike. The figure of each is its median, told as a multiple of the fastest copy
(<i>× copy</i>, lower is better), because that carries from one machine to another; times and GB/s
do not. No function that reads an array and writes one can take less than about 1. On the CPU the
caches are emptied before each call and all libraries have the same threads; on a GPU the device's
events are read and its L2 is flushed.</p>
<p>GB/s is the least traffic that the call allows over its time: two streams of the array for
log_softmax and the training step, three for log_softmax_backward, one for cross_entropy. Before a
call is timed, its result is compared with float64. <b>Must</b> is what a release keeps,
<b>goal</b> where it wants to be. The other libraries' columns say how many times as long they take;
a dash: it has no such call, or was not installed.</p>
<p>Regressions are drawn from × copy alone. Peak memory, start-up and errors in ulp are in asv's
pages. CONTRIBUTING.md tells how to measure it again.</p>
"""


def document(title: str, body: str) -> str:
    """A whole page; the style stands in it, so that the page is one file."""
    style = (Path(__file__).parent / "front.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{html.escape(title)}</title><link rel="icon" href="data:,">'
        f"<style>{style}</style></head>\n<body>{body}</body></html>\n"
    )


def graph(name: str, **parameters: str) -> str:
    """Address of asv's graph of a benchmark, with these parameters chosen."""
    chosen = "&".join(f"p-{key}={quote(value)}" for key, value in parameters.items())
    return f"asv/index.html#{name}" + (f"?{chosen}" if chosen else "")


def commit_link(measured: Measured) -> str:
    """The commit, and when it was made."""
    return (
        f'<a href="commits.html#{measured.commit}"><code>{measured.commit[:8]}</code></a>'
        f" of {measured.date:%Y-%m-%d}"
    )


def picture(name: str, caption: str, kind: str = "") -> str:
    """An SVG in its light and its dark form."""
    text = html.escape(caption)
    return (
        f'<figure class="{kind}"><figcaption>{text}</figcaption><picture>'
        f'<source srcset="{quote(name)}-dark.svg" media="(prefers-color-scheme: dark)">'
        f'<img src="{quote(name)}-light.svg" alt="{text}"></picture></figure>'
    )


def speed_table(rows: list[Row], target: str) -> str:
    """One line a case; the other libraries as multiples of numbakern's time."""
    peers = report.peers_of(rows, target)
    head = ["call", "× copy", "must", "goal", "met", "time", "GB/s"]
    head += [f"{peer} ÷ ours" for peer in peers]
    lines = []
    for row in rows:
        unit = " µs" if row.bound.unit == "us" else ""
        shape = report.key(row.bound, target)
        names = ("function", "shape" if target == "cpu" else "classes", "dtype")
        address = graph(f"{target}.Speed.track_x_copy", **dict(zip(names, shape, strict=True)))
        cells = [
            f'<a href="{html.escape(address)}">{row.call.replace("_", "_<wbr>")}</a>'
            f"<small>{html.escape(row.array)}</small>",
            f'<span class="{row.verdict}">{report.digits(row.ours, unit)}</span>',
            f"{row.bound.must:.3g}{unit}",
            f"{row.bound.goal:.3g}{unit}",
            f'<span class="{row.verdict}">{row.verdict}</span>',
            report.short(row.seconds),
            report.digits(row.gigabytes),
            *(report.digits(row.ratio(peer)) for peer in peers),
        ]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    header = "".join(f"<th>{name}</th>" for name in head)
    return (
        f'<div class="scroll"><table><thead><tr>{header}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def small_table(head: list[str], lines: list[list[str]]) -> str:
    """Some figures in a row."""
    header = "".join(f"<th>{name}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in line) + "</tr>" for line in lines)
    return (
        f'<div class="scroll"><table><thead><tr>{header}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def startup(machine: Machine) -> str:
    """What a fresh process pays."""
    name = "startup.FirstCall.track_seconds"
    found = machine.latest(lambda m: m.values.get(name))
    if found is None:
        return ""
    lines = []

    def line(title: str, address: str, seconds: float, must: float) -> None:
        met = bounds.verdict(seconds, must, None)
        lines.append(
            [
                f'<a href="{html.escape(address)}">{title}</a>',
                f'<span class="{met}">{report.short(seconds)}</span>',
                report.short(must),
            ]
        )

    imported = found.values.get("startup.Import.track_seconds", {}).get(())
    if imported is not None:
        must = bounds.STARTUP["import"]
        line("import, beyond NumPy", graph("startup.Import.track_seconds"), imported, must)
    for (target, function, cache), seconds in found.values[name].items():
        text = f"first {function.strip(chr(39))}, {cache.strip(chr(39))} cache"
        text += " (CUDA)" if "cuda" in target else ""
        address = graph(name, target=target, function=function, cache=cache)
        line(text, address, seconds, bounds.STARTUP[cache.strip("'")])
    table = small_table(["fresh process", "time", "must"], lines)
    return f'<h3>Start-up</h3><p class="soft">{commit_link(found)}</p>{table}'


def accuracy(machine: Machine) -> str:
    """Worst errors of each library."""
    name = "numerics.Ulp.track_ulp"
    found = machine.latest(lambda m: any(key[0] != "'numbakern'" for key in m.values.get(name, {})))
    found = found or machine.latest(lambda m: m.values.get(name))
    if found is None:
        return ""
    figures = found.values[name]
    libraries = list(dict.fromkeys(key[0] for key in figures))
    lines = []
    for function, dtype in dict.fromkeys(key[1:] for key in figures):
        address = graph(name, function=function, dtype=dtype)
        title = f"{function.strip(chr(39))}<small>{dtype.strip(chr(39))}</small>"
        cells = [figures.get((library, function, dtype), math.nan) for library in libraries]
        lines.append([f'<a href="{html.escape(address)}">{title}</a>', *map(_ulp, cells)])
    table = small_table(["worst ulp", *(name.strip("'") for name in libraries)], lines)
    return (
        "<h3>Accuracy</h3><p>Worst error over 14 families of rows (random, offset, confident, "
        "constant, masked), in units in the last place of the result.</p>"
        f'<p class="soft">{commit_link(found)}</p>{table}'
    )


def _ulp(value: float) -> str:
    if math.isnan(value):
        return "–"
    if value >= 1000:
        return f"10<sup>{math.log10(value):.0f}</sup>"
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def section(machine: Machine, folder: Path) -> Iterator[str]:
    """All that is known of one machine."""
    about = machine.about
    hardware = [about[key] for key in ("gpu", "cpu") if key in about]
    if threads := about.get("threads"):
        hardware.append(f"{threads} threads")
    versions = about.get("versions") or (machine.files[0].versions if machine.files else {})
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield f'<h2 id="{html.escape(machine.name)}">{html.escape(machine.name)}</h2>'
    with_what = html.escape("; ".join((", ".join(map(str, hardware)), libraries)).lstrip("; "))
    yield f'<p class="soft">{with_what}</p>'
    for target in ("cuda", "cpu"):
        if found := machine.table(target):
            measured, rows = found
            yield f"<h3>{TITLES[target]}: the calls a release is judged by</h3>"
            yield f'<p class="soft">{commit_link(measured)}, Python {measured.python}</p>'
            yield speed_table(rows, target)
            name = f"{machine.name}-{target}-roofline"
            plots.roofline(rows, target, folder, name)
            if (folder / f"{name}-light.svg").exists():
                text = "Time in copies of the same array; the line is the memory's roof."
                yield picture(name, text, "roof")
        sweep = f"{target}.SweepClasses.track_x_copy"
        if swept := machine.latest(lambda m, sweep=sweep: m.values.get(sweep)):  # type: ignore[misc]
            stem = f"{machine.name}-{target}"
            drawn = list(plots.sweeps(swept.values, target, folder, stem))
            links = ", ".join(
                f'<a href="{graph(f"{target}.{cls}.track_x_copy")}">{parameter}</a>'
                for cls, parameter, _ in plots.SWEEPS
                if swept.values.get(f"{target}.{cls}.track_x_copy")
            )
            yield f"<h3>{TITLES[target]}: sweeps</h3>"
            yield f'<p class="soft">{commit_link(swept)}; in asv\'s pages: {links}</p>'
            yield '<div class="figures">'
            yield from (picture(name, caption) for name, caption in drawn)
            yield "</div>"
    yield startup(machine)
    yield accuracy(machine)


def write(folder: Path, results: Path) -> None:
    """The front page and its pictures."""
    found = list(machines(results))
    places = " ".join(f'<a href="#{html.escape(m.name)}">{html.escape(m.name)}</a>' for m in found)
    body = [
        "<h1>Speed of numbakern</h1>",
        "<p>The log-softmax family against a copy of the same array, and against the libraries "
        "one would use instead: latest figures of each machine.</p>",
        f"<nav>{places} <a href='#how'>How it was measured</a>",
        '<a href="asv/index.html">All benchmarks over commits</a>',
        '<a href="asv/index.html#/regressions">Regressions</a>',
        '<a href="commits.html">Commits</a></nav>',
    ]
    for machine in found:
        body.extend(section(machine, folder))
    body.append(METHOD)
    text = document("Speed of numbakern", "\n".join(body))
    (folder / "index.html").write_text(text, encoding="utf-8")
