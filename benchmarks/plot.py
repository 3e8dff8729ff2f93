"""Draw the README's picture: `python -m benchmarks.plot results.json docs/roofline.svg`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from numbakern._roofline import TITLES

# Colours that stay apart for colour-blind readers, and a shape for each as well.
STYLE = {
    "numbakern": ("#0072b2", "o"),
    "torch.compile": ("#d55e00", "s"),
    "torch": ("#e69f00", "D"),
    "jax": ("#009e73", "^"),
    "scipy": ("#cc79a7", "v"),
    "numpy": ("#777777", "x"),
}


def _label(case: dict[str, Any]) -> str:
    where = f", axis {case['axis']}" if case["axis"] >= 0 else ""
    shape = " × ".join(map(str, case["shape"]))
    return f"{TITLES[case['op']]}\n{shape}{where}, {case['dtype']}"


def draw(report: dict[str, Any], path: str) -> None:
    """One line a case, a mark a library, at its time in copies of the array."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 8,
            "svg.hashsalt": "numbakern",
            "svg.fonttype": "none",
            "axes.axisbelow": True,
        }
    )
    # nll_loss reads one element a row: on this scale it would only push the others aside.
    cases = [c for c in report["cases"] if c["unit"] == "x copy" and c["op"] != "nll_loss"]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.36 * len(cases)), layout="constrained")
    for name, (colour, marker) in reversed(STYLE.items()):
        points = [
            (case["multiples"][name], line)
            for line, case in enumerate(cases)
            if name in case["multiples"]
        ]
        if points:
            axes.scatter(
                *zip(*points, strict=True),
                color=colour,
                marker=marker,
                s=46 if name == "numbakern" else 24,
                label=name,
                zorder=3 if name == "numbakern" else 2,
            )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.set_yticks(range(len(cases)), [_label(case) for case in cases], fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", color="#e6e6e6", linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    found = report["environment"]
    axes.set_xlabel(
        "time in copies of the same array (1: as fast as copying it; further left is faster)\n"
        f"{found['cpu']}, {found['threads']} threads, medians of one interleaved run"
    )
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside upper center", ncols=6, frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("results", help="a file written by python -m benchmarks --json")
    parser.add_argument("picture", help="the file to write: .svg, .png, .pdf")
    options = parser.parse_args(argv)
    with open(options.results, encoding="utf-8") as file:
        draw(json.load(file), options.picture)


if __name__ == "__main__":
    main()
