"""Fixtures and profiles every test shares."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile(
    # Compilation happens inside an example: no deadline. The same examples each time.
    "default",
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        help="run the public functions there instead of on the CPU: emulator, cupy, torch, numba "
        "or jax (see tests/on_device.py)",
    )


def pytest_configure(config):
    if config.getoption("--device"):
        from tests import on_device

        on_device.replace_all(config.getoption("--device"))


def pytest_collection_finish(session):
    """Compiling makes many objects that stay; looking for cycles among them costs a tenth of it."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


class Python:
    """Runs scripts in fresh interpreters which import the package under test."""

    def __init__(self, folder: Path):
        self.folder = folder

    def environment(self, **changes: str | None) -> dict[str, str]:
        import numbakern

        environment = dict(os.environ)
        folders = [Path(numbakern.__file__).parents[1], Path(__file__).parents[1]]
        environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
        environment["PYTHONHASHSEED"] = "0"
        for name, value in changes.items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value
        return environment

    def __call__(
        self,
        script: str,
        *arguments: str,
        options: tuple[str, ...] = (),
        timeout: float = 120,
        check: bool = True,
        **environment: str | None,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``script``; with ``check``, it must end by itself, in time, with status 0."""
        try:
            done = subprocess.run(
                [sys.executable, *options, "-c", textwrap.dedent(script), *arguments],
                cwd=self.folder,
                env=self.environment(**environment),
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as hung:
            pytest.fail(f"the script hung for {timeout} s; stderr: {hung.stderr}")
        if check and done.returncode != 0:
            pytest.fail(f"status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done


@pytest.fixture
def python(tmp_path):
    """Call it with a script, and environment variables as keywords (None unsets one)."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    return Python(folder)
