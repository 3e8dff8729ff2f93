"""The table of the bounds, from figures of `cpu.Speed` and `cuda.Speed`: text, Markdown, HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import bounds, predicted, suite
from numbakern._roofline import TITLES, table

# Figures by the name of the benchmark and by its parameters as asv writes them.
Values = dict[str, dict[tuple[str, ...], float]]


@dataclass(frozen=True)
class Row:
    """One case: its bound, and each library's figure in the unit of the bound."""

    bound: bounds.Bound
    seconds: float | None
    gigabytes: float | None
    figures: Mapping[str, float]

    @property
    def ours(self) -> float | None:
        """numbakern's figure."""
        return self.figures.get("numbakern")

    @property
    def verdict(self) -> str:
        """Whether the bound is met."""
        return bounds.verdict(self.ours, self.bound.must, self.bound.goal)

    def ratio(self, peer: str) -> float | None:
        """How many times as long as numbakern a peer takes."""
        theirs = self.figures.get(peer)
        return theirs / self.ours if theirs and self.ours else None

    @property
    def array(self) -> str:
        """The shape, the class axis if it is not the last, and the dtype."""
        case = self.bound.case
        where = f", axis {case.axis}" if case.axis >= 0 else ""
        return f"{case.shape} {case.dtype}{where}"

    @property
    def call(self) -> str:
        """The function, as the tables name it."""
        return TITLES[self.bound.case.op]


def implementations(target: str) -> list[str]:
    """The libraries of a section, ours first."""
    if target == "cpu":
        from benchmarks.cpu import IMPLEMENTATIONS
    else:
        from benchmarks.cuda import IMPLEMENTATIONS
    return list(IMPLEMENTATIONS)


def key(bound: bounds.Bound, target: str) -> tuple[str, ...]:
    """The parameters of a case that follow the implementation, as asv writes them."""
    case = bound.case
    shape: Any = suite.label(case) if target == "cpu" else case.classes
    return tuple(map(repr, (case.op, shape, case.dtype)))


def rows(values: Values, target: str) -> list[Row]:
    """One row a case that was measured with numbakern."""
    found = []
    for bound in bounds.CPU if target == "cpu" else bounds.CUDA:
        rest = key(bound, target)
        own = (repr("numbakern"), *rest)
        seconds = values.get(f"{target}.Speed.track_seconds", {})
        copies = values.get(f"{target}.Speed.track_x_copy", {})
        source, scale = (seconds, 1e6) if bound.unit == "us" else (copies, 1.0)
        keys = {name: (repr(name), *rest) for name in implementations(target)}
        figures = {name: source[at] * scale for name, at in keys.items() if at in source}
        if "numbakern" in figures:
            speed = values.get(f"{target}.Speed.track_gigabytes", {}).get(own)
            found.append(Row(bound, seconds.get(own), speed, figures))
    return found


def digits(value: float | None, unit: str = "") -> str:
    """Three significant digits, a dash for nothing."""
    if value is None:
        return "–"
    text = f"{value:.3f}" if value < 0.1 else f"{value:.2f}" if value < 10 else f"{value:.0f}"
    return text + unit


def short(seconds: float | None) -> str:
    """A time with its unit."""
    if seconds is None:
        return "–"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale or unit == "µs":
            return f"{seconds / scale:.3g} {unit}"
    raise AssertionError


def peers_of(rows: Sequence[Row], target: str) -> list[str]:
    """The libraries beside numbakern that have a figure in some row."""
    names = implementations(target)[1:]
    return [name for name in names if any(name in row.figures for row in rows)]


def text_table(rows: Sequence[Row]) -> str:
    """For a terminal."""
    target = "cpu" if rows[0].bound in bounds.CPU else "cuda"
    peers = peers_of(rows, target)
    unit = {"x copy": "", "us": " us"}
    told = [predicted.in_copies(row.bound.case) if target == "cuda" else None for row in rows]
    model = ["model"] if any(told) else []
    lines = []
    for row, prediction in zip(rows, told, strict=True):
        suffix = unit[row.bound.unit]
        lines.append(
            [
                row.call,
                row.array,
                short(row.seconds),
                digits(row.gigabytes),
                digits(row.ours, suffix),
                *(digits(prediction) for _ in model),
                f"{row.bound.must:.3g}",
                f"{row.bound.goal:.3g}",
                row.verdict,
                *(digits(row.figures.get(name), suffix) for name in peers),
            ]
        )
    header = ["call", "array", "time", "GB/s", "x copy", *model, "must", "goal", "met", *peers]
    return table(header, lines)


def markdown_table(rows: Sequence[Row]) -> str:
    """For the README: every library in copies of the array."""
    target = "cpu" if rows[0].bound in bounds.CPU else "cuda"
    peers = peers_of(rows, target)
    header = ["call", "array", "time", "GB/s", "numbakern", *peers, "must", "goal"]
    lines = [
        "| " + " | ".join(header) + " |",
        "| -- | -- |" + " --: |" * (len(header) - 2),
    ]
    for row in rows:
        suffix = " µs" if row.bound.unit == "us" else ""
        ours = digits(row.ours, suffix)
        cells = [
            f"`{row.call}`",
            row.array,
            short(row.seconds),
            digits(row.gigabytes),
            f"**{ours}**" if row.verdict == "missed" else ours,
            *(digits(row.figures.get(name), suffix) for name in peers),
            f"{row.bound.must:.3g}{suffix}",
            f"{row.bound.goal:.3g}{suffix}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
