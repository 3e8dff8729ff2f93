"""``python -m numbakern.cuda``: what the kernels became, and how fast they should be."""

import argparse
import importlib.util
import re
import sys
from pathlib import Path

from numbakern.cuda import codegen, model, predictions, ways


def _count(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def _architecture(text):
    if not re.fullmatch(r"sm_\d{2,}[a-z]?", text):
        raise argparse.ArgumentTypeError(f"expected one such as sm_90a, got {text!r}")
    return text


def parser():
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m numbakern.cuda", description=__doc__)
    commands = made.add_subparsers(dest="command")
    code = commands.add_parser("code", help="instructions and registers of every kernel (default)")
    code.add_argument(
        "architectures", nargs="*", type=_architecture, metavar="ARCH", help="such as sm_90a"
    )
    told = commands.add_parser("model", help="predicted times, and what they are made of")
    told.add_argument("--rows", type=_count, help="so many, instead of 2**28 elements")
    told.add_argument("--classes", type=_count, nargs="+", default=predictions.CLASSES, metavar="C")
    told.add_argument(
        "--layout",
        choices=("whole", "shifted", "columns"),
        default="whole",
        help="rows at multiples of 16 bytes, rows that start anywhere, the class axis first",
    )
    found = commands.add_parser("cliffs", help="predicted times from 1 to 262144 classes")
    found.add_argument("--plot", type=Path, metavar="PATH", help="also PATH-light.svg, -dark.svg")
    for one in told, found:
        one.add_argument("--device", nargs="+", choices=model.GPUS, default=["H100"])
        one.add_argument(
            "--call",
            nargs="+",
            choices=codegen.OPERATIONS,
            metavar="CALL",
            help=", ".join(codegen.OPERATIONS),
        )
        one.add_argument("--dtype", nargs="+", choices=predictions.DTYPES)
    written = commands.add_parser("document", help="write the tables of the documentation anew")
    written.add_argument("file", type=Path, nargs="?", default=Path("docs/cuda-performance.md"))
    return made


def main(argv):
    """Run a command; without one, print the machine code's table of each architecture."""
    if not argv or argv[0].startswith("sm_"):
        argv = ["code", *argv]
    options = parser().parse_args(argv)
    kinds = [predictions.DTYPES[name] for name in getattr(options, "dtype", None) or ()]
    if options.command == "document" or getattr(options, "plot", None):
        _need_matplotlib()
        _need_folder(options.file if options.command == "document" else options.plot)
    try:
        ways.chosen()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    try:
        _run(options, kinds)
    except RuntimeError as error:  # nothing that compiles or disassembles
        raise SystemExit(f"error: {error}") from None


def _need_matplotlib():
    """Say so before anything is computed where there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("error: matplotlib is not installed: pip install 'numbakern[bench]'")


def _need_folder(path):
    """Say so before anything is computed where the file cannot be put there."""
    if not path.parent.is_dir():
        raise SystemExit(f"error: no such folder: {path.parent}")


def _run(options, kinds):
    if options.command == "code":
        for arch in options.architectures or codegen.ARCHITECTURES:
            shown = codegen.cases(machine=codegen.MACHINES.get(arch, ways.MACHINE))
            print(codegen.table(shown, arch), flush=True)
            print()
    elif options.command == "model":
        cases = predictions.judged(
            options.call, kinds or ("f4", "f2", "bf"), options.classes, options.rows, options.layout
        )
        for name in options.device:
            told = predictions.table(cases, model.GPUS[name])
            print(f"{name}, predicted\n\n{told}\n", flush=True)
    elif options.command == "cliffs":
        swept = [
            (operation, kind)
            for operation in options.call or dict.fromkeys(op for op, _ in predictions.SWEPT)
            for kind in kinds or ("f4", "bf")
        ]
        for name in options.device:
            gpu, sweeps = model.GPUS[name], {}
            for operation, kind in swept:
                sweeps[operation, kind] = points = predictions.sweep(operation, kind, gpu)
                over = predictions.cliffs(points)
                print(f"{name}, {operation}, {kind}: over the smooth curve\n\n{over}\n", flush=True)
            if options.plot:
                predictions.draw(sweeps, options.plot)
    else:
        predictions.document(options.file)


if __name__ == "__main__":
    main(sys.argv[1:])
