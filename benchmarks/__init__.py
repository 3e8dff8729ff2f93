"""The asv suite: speed, start-up and accuracy of numbakern, beside its peers.

Sections are the modules `cpu`, `cuda`, `startup` and `numerics`; CONTRIBUTING.md tells how to run
them. The package that is measured is the installed one, of whatever commit. The code that measures
it, `numbakern/_roofline.py` and `tests/accuracy.py`, is that of this tree: it uses public functions
only.
"""

import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def sources() -> dict[str, str]:
    """The source files of the package that is measured, as git names their contents."""
    spec = importlib.util.find_spec("numbakern")
    if spec is None or not spec.origin:
        raise ImportError("numbakern is not installed in the environment that is measured")
    package = Path(spec.origin).parent
    names = {}
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content)  # what `git ls-tree` prints
        names[path.relative_to(package).as_posix()] = blob.hexdigest()
    return names


def digest(names: dict[str, str]) -> str:
    """One name for a set of sources."""
    lines = "".join(f"{blob} {name}\n" for name, blob in sorted(names.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _from_this_tree(name: str, path: Path) -> None:
    folder = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folder)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


# Machine code of one commit is never found by another, whatever its own cache looks at.
os.environ["NUMBA_CACHE_DIR"] = os.path.join(
    tempfile.gettempdir(), f"numbakern-benchmarks-{os.getuid()}", digest(sources())[:24]
)
for _name, _path in (
    ("numbakern._roofline", ROOT / "numbakern/_roofline.py"),
    ("tests", ROOT / "tests/__init__.py"),
):
    if _name not in sys.modules:
        _from_this_tree(_name, _path)
