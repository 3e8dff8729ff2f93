"""What is known of a machine: its latest figures, read from asv's result files."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.report import Row, Values, rows


@dataclass
class Measured:
    """One result file: a commit on a machine."""

    commit: str
    date: datetime
    python: str
    versions: dict[str, str]
    values: Values = field(default_factory=dict)

    def beside_peers(self) -> bool:
        """Whether other libraries were measured too."""
        return any(
            key[0] != "'numbakern'"
            for target in ("cpu", "cuda")
            for key in self.values.get(f"{target}.Speed.track_x_copy", {})
        )


@dataclass
class Machine:
    """All results of a machine, the latest commit first."""

    name: str
    about: dict[str, Any]
    files: list[Measured]

    def latest(self, holds: Callable[[Measured], Any]) -> Measured | None:
        """The file of the latest commit of which this holds."""
        return next((measured for measured in self.files if holds(measured)), None)

    def table(self, target: str) -> tuple[Measured, list[Row]] | None:
        """The latest table of a section: beside the peers, if that was ever measured."""

        def has_rows(measured: Measured) -> bool:
            return bool(rows(measured.values, target))

        found = self.latest(lambda m: m.beside_peers() and has_rows(m)) or self.latest(has_rows)
        return (found, rows(found.values, target)) if found else None


def read(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object that has these keys; SystemExit for any other file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in keys if key not in content]
        problem = f"no {', '.join(missing)}" if missing else ""
    except (OSError, ValueError, TypeError) as error:
        problem = str(error)
    if problem:
        raise SystemExit(f"{path}: not a file of asv's results: {problem}")
    assert isinstance(content, dict)
    return content


def about(folder: Path) -> dict[str, Any]:
    """What is known of the machine whose results are in a folder."""
    return read(folder / "machine.json", "machine")


def files(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The results of a machine: a file a commit, with what it holds."""
    keys = "commit_hash", "date", "params", "python", "result_columns", "results"
    for path in sorted(folder.glob("*.json")):
        if path.name != "machine.json":
            yield path, read(path, *keys)


def load(content: dict[str, Any]) -> Measured:
    """A result file of asv."""
    columns = content["result_columns"]
    measured = Measured(
        content["commit_hash"],
        datetime.fromtimestamp(content["date"] / 1000, timezone.utc),
        content["python"],
        {name: content["params"].get(name, "") for name in ("numba", "numpy")},
    )
    for name, row in content["results"].items():
        entry = dict(zip(columns, row, strict=False))
        keys = itertools.product(*(entry["params"] or []))
        figures = entry["result"] or []
        measured.values[name] = {
            key: value
            for key, value in zip(keys, figures, strict=False)
            if value is not None and not math.isnan(value)
        }
    return measured


def machines(results: Path) -> Iterator[Machine]:
    """Every machine with results, by name."""
    for folder in sorted(path.parent for path in results.glob("*/machine.json")):
        found = [load(content) for _, content in files(folder)]
        if found:
            found.sort(key=lambda m: m.date, reverse=True)
            yield Machine(folder.name, about(folder), found)
