"""What the model predicts, as tables and pictures: ``python -m numbakern.cuda model``, ``cliffs``.

``python -m numbakern.cuda document`` writes both into `docs/cuda-performance.md`.
"""

import functools
import itertools
import re
import sys
from pathlib import Path
from typing import NamedTuple

from numbakern.cuda import codegen
from numbakern.cuda.footprint import WARP
from numbakern.cuda.model import GPUS, Gpu, Prediction, machine_for, predict
from numbakern.cuda.rows import Partition, Way

DTYPES = {"float32": "f4", "bfloat16": "bf", "float16": "f2", "float64": "f8"}
_NAMES = {kind: name for name, kind in DTYPES.items()}
ELEMENTS = 2**28
"""Of the arrays that the bounds are for."""
JUDGED = {  # share of the copy rate: must, goal
    "log_softmax": (0.85, 0.97),
    "log_softmax_backward": (0.85, 0.97),
    "cross_entropy": (0.90, 1.00),
    "cross_entropy_backward-lse": (0.85, 0.97),
    "cross_entropy_value_and_grad": (0.85, 0.97),
}
CLASSES = (1000, 1024, 4096, 8192, 16384, 32768, 65536, 128256, 262144)
LIMIT = 0.10
"""How far above the smooth curve a predicted time may be."""
SWEPT = tuple(
    (operation, kind)
    for operation in ("log_softmax", "cross_entropy", "cross_entropy_value_and_grad")
    for kind in ("f4", "bf")
)
BEGIN, END = "<!-- predictions -->\n", "<!-- end of the predictions -->\n"


def progress(items, text, unit="case"):
    """The items, with a bar on stderr while it is a terminal and tqdm is installed."""
    items = list(items)
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    with tqdm(items, unit=unit, disable=None, leave=False) as bar:
        for item in bar:
            bar.set_description(text(item))
            yield item


# ---------------------------------------------------------------- tables


_HEADER = (
    "call", "array", "bytes / element", "issue", "int", "fp32", "fp64", "convert", "memory",
    "in flight / needed", "registers", "warps", "blocks", "waves", "launches", "L2 hits", "bound",
    "µs", "× copy rate", "must", "goal",
)  # fmt: skip


def row(gpu: Gpu, operation, kind, rows, classes, layout) -> list[str]:
    """The cells of `table` for one call."""
    made = predict(gpu, operation, kind, rows, classes, layout)
    step, b = made.main
    warps = -(-step.block // WARP)
    # Cycles of a warp as cycles for each element, like the issue slots.
    each = step.grid * warps * WARP / (rows * classes)
    pipes = [b.pipes.get(n, 0.0) * each for n in ("int", "fp32", "fp64", "convert", "memory")]
    must, goal = JUDGED.get(operation, (None, None))
    return [
        operation,
        f"({rows}, {classes}) {_NAMES[kind]}{'' if layout == 'whole' else ', ' + layout}",
        f"{sum(x.bytes for _, x in made.steps) / (rows * classes):.1f}",
        f"{b.instructions:.0f}",
        *(f"{c:.0f}" for c in pipes),
        f"{b.in_flight / 1024:.0f} / {b.needed / 1024:.0f} KB",
        str(b.registers),
        str(b.resident * warps),
        f"{b.resident} × {step.block}",
        f"{b.waves:.1f}",
        str(len(made.steps)),
        f"{b.hit:.0%}" if b.again else "",
        b.bound,
        f"{made.seconds * 1e6:.0f}",
        f"{made.share:.2f}",
        "" if must is None else f"{must:.2f}",
        "" if goal is None else f"{goal:.2f}",
    ]


def markdown(header, lines) -> str:
    """A table as Markdown, the first two columns to the left."""
    rule = [":--"] * 2 + ["--:"] * (len(header) - 2)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def table(cases, gpu: Gpu) -> str:
    """What is known of these calls: (operation, kind, rows, classes, layout) each."""
    shown = progress(cases, lambda c: f"{gpu.name} {c[0]} {c[1]} {c[3]}")
    return markdown(_HEADER, [row(gpu, *case) for case in shown])


def judged(operations=None, kinds=("f4", "f2", "bf"), classes=CLASSES, rows=None, layout="whole"):
    """The cases of `table` that have bounds, or as chosen."""
    return [
        (operation, kind, rows or ELEMENTS // c, c, layout)
        for operation in operations or JUDGED
        for kind in kinds
        for c in classes
    ]


def overview(gpu: Gpu) -> str:
    """Shares of the copy rate of the calls that have bounds, as Markdown."""
    cases = judged()
    shown = progress(cases, lambda c: f"{gpu.name} {c[0]} {c[1]} {c[3]}")
    shares = {case: predict(gpu, *case).share for case in shown}
    lines = []
    for operation, kind in dict.fromkeys(case[:2] for case in cases):
        must, goal = JUDGED[operation]
        cells = [_marked(share, must) for c, share in shares.items() if c[:2] == (operation, kind)]
        lines.append([operation, _NAMES[kind], *cells, f"{must:.2f}", f"{goal:.2f}"])
    return markdown(["call", "dtype", *map(str, CLASSES), "must", "goal"], lines)


def _marked(share, must):
    return f"{share:.2f}" if share >= must else f"**{share:.2f}**"


# ---------------------------------------------------------------- thresholds


def way_of(operation, kind, classes, gpu: Gpu) -> tuple[str, str]:
    """(who takes a row that starts at 16 bytes, where it is between reduction and map).

    Of many rows.
    """
    rows = ELEMENTS // classes
    plan, _ = codegen.call(operation, kind, rows, classes, "whole", machine_for(gpu))
    params = next(p for s in reversed(plan.steps) if "way" in (p := dict(s.spec.params)))
    part, way = Partition(*params["part"]), Way(*params["way"])
    maps = "out" in dict(params["modes"])
    if part.single:
        lanes = "a lane" if part.lanes == 1 else f"{part.lanes} lanes"
        return "a warp" if part.lanes == WARP else lanes, "registers"
    if way.meets(1):
        return "blocks that meet", "registers"
    where = "registers" if way.kept == "registers" else ""
    if way.kept in ("shared", "partly"):
        where = "registers and shared memory"
        where += ", the rest read again" if way.kept == "partly" else ""
    elif way.kept == "ahead":
        where = "shared memory, the next rows on their way"
    elif way.kept == "no":
        where = "read again" if maps else "read once, in rounds"
    if way.gathers:
        return "a warp", where
    return "a cluster of blocks" if way.cluster > 1 else "a block", where


def ways_table(gpu: Gpu) -> str:
    """From which number of classes on who takes a row, as Markdown: all thresholds there are.

    They follow from the numbers of classes and the element's size, and for rows that registers do
    not hold from the device's shared memory.
    """
    kinds = "f4", "bf", "f8"
    found: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for operation, kind in itertools.product(("log_softmax", "cross_entropy"), kinds):
        step = 16 // codegen.size_of(kind)
        way = functools.partial(way_of, operation, kind, gpu=gpu)
        starts = [step, *_changes(way, step, step)]
        for first, end in zip(starts, [*starts[1:], 2**18 + step], strict=True):
            at = found.setdefault((operation, *way(first)), {})
            at.setdefault(kind, []).append(f"{first} … {end - step}")
    lines = [
        [*which, *(", ".join(at.get(kind, [])) for kind in kinds)] for which, at in found.items()
    ]
    names = (_NAMES[kind] for kind in kinds)
    return markdown(["call", "a row is taken by", "and stays in", *names], lines)


# ---------------------------------------------------------------- cliffs


class Point(NamedTuple):
    """A number of classes in a sweep.

    Attributes
    ----------
    classes : int
    layout : {"whole", "shifted"}
    access : str
        How the kernel gets at the logits: a row of "whole" layout may be too odd for that.
    copies : float
        Predicted time in copies of the array.
    excess : float
        How much longer that is than the smooth curve, as a share of it.
    prediction : Prediction
    """

    classes: int
    layout: str
    access: str
    copies: float
    excess: float
    prediction: Prediction


def thresholds(operation: str, kind: str, step: int, rows=None) -> list[int]:
    """The numbers of classes from which on another kernel runs (of rows that start anywhere).

    Parameters
    ----------
    operation, kind : str
    step : int
        Of the odd numbers if 2, else of its multiples: how rows are read depends on that.
    rows : int, optional
        How many there are; 2**28 elements of them if None.
    """

    def kernels(classes):
        plan, _ = codegen.call(operation, kind, rows or ELEMENTS // classes, classes, "shifted")
        return tuple((s.spec, s.block) for s in plan.steps)

    return _changes(kernels, 1 if step == 2 else step, step)


def _changes(what, first, step) -> list[int]:
    """Of the numbers of classes first, first + step, … those with another `what` than before."""

    @functools.cache
    def found(k):
        return what(first + k * step)

    def between(low, high):
        if found(low) == found(high) or high - low == 1:
            return [high] if found(low) != found(high) else []
        middle = (low + high) // 2
        return between(low, middle) + between(middle, high)

    last = (2**18 - first) // step
    grid = sorted({round(2 ** (k / 16)) - 1 for k in range(18 * 16 + 1)} | {last})
    grid = [k for k in grid if k <= last]
    every = (k for low, high in zip(grid, grid[1:], strict=False) for k in between(low, high))
    return [first + k * step for k in every]


def swept_classes(operation: str, kind: str) -> list[int]:
    """Numbers of classes from 1 to 262144, dense where the kernel changes."""
    counts = set(range(1, 66)) | set(CLASSES) | {10007, 32000, 50257, 100003}
    whole = 16 // codegen.size_of(kind)
    counts |= set(thresholds(operation, kind, 2))
    for t in thresholds(operation, kind, whole):
        counts |= {t - whole, t}
    for k in range(6, 19):
        counts |= {2**k - 1, 2**k, 2**k + 1, 2**k + 2, 2**k + 4, 2**k + 8}
        counts |= {3 * 2 ** (k - 1), 3 * 2 ** (k - 1) + 1}
    return sorted(n for n in counts if 1 <= n <= 2**18)


def sweep(operation: str, kind: str, gpu: Gpu, counts=None) -> list[Point]:
    """Points of both layouts, against the smooth curve.

    The curve is the least time per element of any row that is no longer, in either layout: what is
    done once a row weighs less the longer the row is: no longer row need take longer per element.
    """
    counts = swept_classes(operation, kind) if counts is None else sorted(counts)
    cases = [(n, layout) for n in counts for layout in ("whole", "shifted")]
    found = {}
    for n, layout in progress(cases, lambda c: f"{gpu.name} {operation} {kind} {c[0]}"):
        found[n, layout] = predict(gpu, operation, kind, max(1, ELEMENTS // n), n, layout)
    size = codegen.size_of(kind)
    points, best = [], float("inf")
    for n in counts:
        elements = max(1, ELEMENTS // n) * n
        copies = {
            layout: found[n, layout].seconds * gpu.copy / (2 * elements * size)
            for layout in ("whole", "shifted")
        }
        best = min(best, *copies.values())
        for layout, c in copies.items():
            prediction = found[n, layout]
            modes = dict(dict(prediction.main[0].spec.params).get("modes", ()))
            access = modes.get("x", layout)
            points.append(Point(n, layout, access, c, c / best - 1, prediction))
    return points


def cliffs(points, most=None) -> str:
    """The kernels whose times are over LIMIT above a sweep's curve, as Markdown.

    `most`: so many of them, the worst ones.
    """
    over: dict[object, list[Point]] = {}
    for p in points:
        if p.excess > LIMIT:
            over.setdefault(_kernel_of(p), []).append(p)
    worst = {key: max(found, key=lambda p: p.excess) for key, found in over.items()}
    shown = sorted(worst, key=lambda key: -worst[key].excess)[:most]
    lines = []
    for key in sorted(shown, key=lambda key: over[key][0].classes):
        counts, p = sorted({p.classes for p in over[key]}), worst[key]
        step, b = p.prediction.main
        span = f"{counts[0]} … {counts[-1]}" if len(counts) > 1 else str(counts[0])
        lines.append(
            [
                f"{span} ({len(over[key])})",
                p.access,
                f"+{p.excess:.0%} at {p.classes}",
                f"{p.copies:.2f}",
                b.bound,
                f"{b.instructions:.0f}",
                f"{b.resident} × {step.block}",
                f"{b.hit:.0%}" if b.again else "",
            ]
        )
    header = [
        "classes (points)", "access", "worst", "× copy", "bound", "issue / element", "blocks",
        "L2 hits",
    ]  # fmt: skip
    return markdown(header, lines) if lines else "none"


def _kernel_of(point):
    step = point.prediction.main[0]
    return step.spec, step.block


def draw(sweeps, path: Path) -> None:
    """The sweeps {(operation, kind): points} as `path`-light.svg and `path`-dark.svg."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for mode, ink, grid, colours in (
        ("light", "#1f2328", "#e3e6ea", ("#0072b2", "#d55e00")),
        ("dark", "#e6edf3", "#30363d", ("#56b4e9", "#ff8c42")),
    ):
        plt.rcParams.update(
            {
                "font.size": 9, "svg.hashsalt": "numbakern", "svg.fonttype": "none",
                "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                "grid.color": grid, "grid.linewidth": 0.6, "text.color": ink,
                "axes.labelcolor": ink, "axes.edgecolor": ink, "xtick.color": ink,
                "ytick.color": ink,
            }
        )  # fmt: skip
        rows = -(-len(sweeps) // 2)
        figure, panels = plt.subplots(
            rows, 2, figsize=(9, 3 * rows), layout="constrained",
            squeeze=False, sharex=True,
        )  # fmt: skip
        for axes, ((operation, kind), points) in zip(panels.flat, sweeps.items(), strict=False):
            for layout, colour, label in zip(
                ("shifted", "whole"), colours[::-1], ("array starts anywhere", "at 16 bytes"),
                strict=True,
            ):  # fmt: skip
                shown = [p for p in points if p.layout == layout]
                axes.plot(
                    [p.classes for p in shown], [p.copies for p in shown], color=colour,
                    linewidth=0.8, label=label,
                )  # fmt: skip
            curve = [(p.classes, p.copies / (1 + p.excess)) for p in points]
            axes.plot(*zip(*curve, strict=True), color=ink, linewidth=1, linestyle="--",
                      label="smooth curve")  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
            axes.set_yticks([], minor=True)
            axes.set_ylim(0.45, 14)
            axes.set_title(f"{operation}, {_NAMES[kind]}", fontsize=9)
            axes.grid(which="major")
        for axes in panels[-1]:
            axes.set_xlabel("classes")
        for axes in panels[:, 0]:
            axes.set_ylabel("predicted time in copies")
        handles, names = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=3)
        figure.savefig(f"{path}-{mode}.svg", metadata={"Date": None}, transparent=True)
        plt.close(figure)


# ---------------------------------------------------------------- commands


def document(file: Path) -> None:
    """Put the tables between the marks of this file, and the picture beside it."""
    text = file.read_text(encoding="utf-8")
    h100 = GPUS["H100"]
    sweeps = {(op, kind): sweep(op, kind, h100) for op, kind in SWEPT}
    parts = []
    for gpu in GPUS.values():
        parts += [
            f"### Share of the copy rate on {gpu.name}, 2**28 elements\n",
            overview(gpu) + "\n",
        ]
    parts += [
        "### How it comes about on an H100\n",
        table(judged(kinds=("f4", "bf"), classes=(1024, 16384, 262144)), h100) + "\n",
        "### Thresholds on an H100\n",
        ways_table(h100) + "\n",
        "### Few rows\n",
        table([(op, "bf", n, 128256, "whole") for op in JUDGED for n in (1, 64)], h100) + "\n",
        "### Few classes, one row after the other and beside one another\n",
        table(
            [
                (op, "f4", ELEMENTS // n, n, layout)
                for op in ("log_softmax", "cross_entropy_value_and_grad")
                for n in (2, 8, 21, 64)
                for layout in ("whole", "columns")
            ],
            h100,
        )
        + "\n",
    ]
    for (operation, kind), points in sweeps.items():
        over = [p for p in points if p.excess > LIMIT]
        parts += [
            f"### Cliffs of {operation}, {_NAMES[kind]}, on an H100\n",
            f"{len(over)} of {len(points)} predicted times are over {LIMIT:.0%} above the smooth "
            f"curve, {len({_kernel_of(p) for p in over})} kernels. The worst ones:\n",
            cliffs(points, 12) + "\n",
        ]
    pattern = re.escape(BEGIN) + ".*" + re.escape(END)
    new, count = re.subn(
        pattern, lambda _: BEGIN + "\n".join(parts) + END, text, flags=re.DOTALL
    )  # fmt: skip
    if count != 1:
        raise SystemExit(f"{file}: expected one part between {BEGIN!r} and {END!r}")
    draw(sweeps, file.with_name("cuda-cliffs"))
    file.write_text(new, encoding="utf-8")
    print(f"wrote {file}", file=sys.stderr)
