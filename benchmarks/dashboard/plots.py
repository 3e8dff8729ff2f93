"""Pictures as SVG, each for a light and for a dark page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Row, Values, implementations

# Colours that stay apart for colour-blind readers, and a shape for each as well.
STYLE = {
    "numbakern": ("#0072b2", "#56b4e9", "o"),
    "torch": ("#d98a00", "#e69f00", "D"),
    "torch.compile": ("#d55e00", "#ff8c42", "s"),
    "jax": ("#009e73", "#2fd3a5", "^"),
    "scipy": ("#b3588f", "#e59ac6", "v"),
    "cupy": ("#7a6a00", "#f0e442", "v"),
    "triton": ("#5b4fb3", "#a99cff", "P"),
    "liger": ("#777777", "#aaaaaa", "X"),
    "quack": ("#a3312a", "#ff7b72", "*"),
}
MODES = ("light", "dark")


def _pyplot(mode: str) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ink, grid = ("#1f2328", "#e3e6ea") if mode == "light" else ("#e6edf3", "#30363d")
    plt.rcParams.update(
        {
            "font.family": "sans-serif",
            "font.size": 9,
            "svg.hashsalt": "numbakern",
            "svg.fonttype": "none",
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": grid,
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), ink),
            **dict.fromkeys(("xtick.color", "ytick.color"), ink),
        }
    )
    return plt


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None}, transparent=True)
    plt.close(figure)


def roofline(rows: Sequence[Row], target: str, folder: Path, name: str) -> None:
    """One line a case, a mark a library, at its time in copies of the array."""
    # nll_loss reads one element a row: on this scale it would only push the others aside.
    rows = [r for r in rows if r.bound.unit == "x copy" and r.bound.case.op != "nll_loss"]
    if not rows:
        return
    for mode in MODES:
        plt = _pyplot(mode)
        figure, axes = plt.subplots(figsize=(4.6, 1.3 + 0.4 * len(rows)), layout="constrained")
        ink = plt.rcParams["text.color"]
        for library in reversed(implementations(target)):
            points = [(r.figures[library], i) for i, r in enumerate(rows) if library in r.figures]
            if points:
                ours = library == "numbakern"
                axes.scatter(
                    *zip(*points, strict=True),
                    color=STYLE[library][MODES.index(mode)],
                    marker=STYLE[library][2],
                    s=46 if ours else 22,
                    label=library,
                    zorder=3 if ours else 2,
                )
        must = [row.bound.must for row in rows]
        axes.scatter(must, range(len(rows)), marker="|", s=90, color=ink, label="must", zorder=1)
        axes.axvline(1, color=ink, linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        labels = [f"{row.call.partition('(')[0]}\n{row.array}" for row in rows]
        axes.set_yticks(range(len(rows)), labels, fontsize=7)
        axes.invert_yaxis()
        axes.grid(axis="x", which="both")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("time in copies of the same array")
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], names[::-1], loc="outside upper center", ncols=4)
        _save(plt, figure, folder / f"{name}-{mode}.svg")


# (the class of a section, its parameter on the x-axis, whether that is logarithmic)
SWEEPS = (
    ("SweepClasses", "classes", True),
    ("SweepRows", "rows", True),
    ("SweepAxis", "axis", False),
    ("SweepThreads", "threads", False),
)


def sweeps(values: Values, target: str, folder: Path, stem: str) -> Iterator[tuple[str, str]]:
    """Draw time in copies against the parameter of each sweep; gives (name of file, caption)."""
    for cls, parameter, logarithmic in SWEEPS:
        lines: dict[tuple[str, ...], dict[str, list[tuple[float, float]]]] = {}
        for key, value in values.get(f"{target}.{cls}.track_x_copy", {}).items():
            library, *middle, x = (text.strip("'") for text in key)
            lines.setdefault(tuple(middle), {}).setdefault(library, []).append((float(x), value))
        for panel, libraries in lines.items():
            name = "-".join((stem, cls, *panel))
            caption = f"{', '.join(panel)}: time in copies by {parameter}"
            for mode in MODES:
                _sweep(libraries, parameter, logarithmic, mode, folder / f"{name}-{mode}.svg")
            yield name, caption


def _sweep(libraries: Any, parameter: str, logarithmic: bool, mode: str, path: Path) -> None:
    plt = _pyplot(mode)
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(figsize=(4.6, 2.7), layout="constrained")
    ticks = sorted({x for points in libraries.values() for x, _ in points})
    for library, points in libraries.items():
        colour, marker = STYLE[library][MODES.index(mode)], STYLE[library][2]
        size = 3 if len(points) > 15 else 5
        axes.plot(
            *zip(*sorted(points), strict=True),
            color=colour,
            marker=marker,
            markersize=size,
            linewidth=0 if parameter == "axis" else 1.2,
            label=library,
        )
    axes.axhline(1, color=plt.rcParams["text.color"], linewidth=1)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    if logarithmic:
        axes.set_xscale("log", base=2 if parameter == "classes" else 10)
        if parameter == "classes":
            axes.set_xticks([2, 16, 128, 1024, 8192, 65536])
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xticks(ticks)
    axes.grid(which="major")
    axes.set_xlabel(parameter)
    axes.set_ylabel("× copy")
    figure.legend(loc="outside upper center", ncols=4)
    _save(plt, figure, path)
