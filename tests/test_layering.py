"""Imports run one way: the package's import graph, read from its sources, is held here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import numbakern

PACKAGE = Path(numbakern.__file__).parent

# A module may import those of a lower number, and its own part. A new part needs a place here.
LAYERS = {
    "__main__": 6,
    "_roofline": 5,
    "__init__": 4,
    "functional": 3,
    "dispatch": 2,
    "cpu": 1,
    "cuda": 1,
    "arrays": 0,
    "disk_cache": 0,
    "formulas": 0,
    "vmath": 0,
}

# At the top of these modules nothing but the standard library, NumPy and ml_dtypes: importing the
# package is to cost next to nothing.
LIGHT = {"__init__", "functional", "dispatch", "arrays", "disk_cache", "formulas", "vmath"}
HEAVY = {"numba", "llvmlite", "scipy", "torch", "jax", "cupy", "numba_cuda", "matplotlib", "tqdm"}

FILES = {path.relative_to(PACKAGE): path for path in sorted(PACKAGE.rglob("*.py"))}


def part(relative: Path) -> str:
    """The top-level part of the package that a file belongs to."""
    return relative.parts[0].removesuffix(".py")


def module_name(relative: Path) -> list[str]:
    names = ["numbakern", *relative.with_suffix("").parts]
    return names[:-1] if names[-1] == "__init__" else names


def imports(relative: Path, top_only: bool = False):
    """Dotted names that a file imports, relative ones resolved; lazy ones too unless top_only."""
    tree = ast.parse(FILES[relative].read_text(encoding="utf-8"))
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = []
            if node.level:
                name = module_name(relative)
                package = name if relative.name == "__init__.py" else name[:-1]
                base = package[: len(package) - (node.level - 1)]
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def parts_imported(relative: Path):
    for name in imports(relative):
        names = name.split(".")
        if names[0] == "numbakern":
            # `from numbakern import log_softmax` is an import of the package itself.
            yield names[1] if len(names) > 1 and names[1] in LAYERS else "__init__"


def test_there_is_a_graph():
    assert Path("__init__.py") in FILES
    assert any(part(f) == "cpu" for f in FILES)
    edges = {(part(f), to) for f in FILES for to in parts_imported(f)}
    assert {("__init__", "functional"), ("functional", "dispatch"), ("cpu", "formulas")} <= edges


@pytest.mark.parametrize("relative", FILES, ids=str)
def test_every_file_has_a_layer(relative):
    assert part(relative) in LAYERS


@pytest.mark.parametrize("relative", FILES, ids=str)
def test_imports_run_down(relative):
    here = part(relative)
    for to in parts_imported(relative):
        assert to == here or LAYERS[to] < LAYERS[here], f"{relative} imports {to}"


@pytest.mark.parametrize("relative", [f for f in FILES if part(f) == "functional"], ids=str)
def test_public_functions_name_no_target(relative):
    assert not {"cpu", "cuda"} & set(parts_imported(relative))
    tree = ast.parse(FILES[relative].read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not {"cpu", "cuda"} & names


@pytest.mark.parametrize("relative", [f for f in FILES if part(f) in LIGHT], ids=str)
def test_light_modules_import_nothing_heavy_at_the_top(relative):
    assert not HEAVY & {name.split(".")[0] for name in imports(relative, top_only=True)}


def test_the_reference_is_independent():
    for name in ("reference.py", "cases.py"):
        tree = ast.parse((Path(__file__).parent / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert all(not alias.name.startswith("numbakern") for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("numbakern")
