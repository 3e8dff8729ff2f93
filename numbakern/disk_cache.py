"""Compiled kernels on disk: where, under which name, and read back only if unharmed.

An entry lies in a folder named after a fingerprint of all that decides the machine code: every
source file of the package and what the target adds (versions, hardware). It is written to a
temporary file and moved into place, and starts with a digest of its content. A folder that cannot
be written, a full disk or a damaged file is no error: the kernel is compiled instead.
"""

import hashlib
import os
import sys
import tempfile
from functools import cache
from pathlib import Path

_DIGEST = 32  # bytes


@cache
def _source_digest():
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()


def fingerprint(parts):
    """Digest of the package's sources and of these parts, each told apart by its repr."""
    digest = hashlib.sha256(_source_digest())
    for part in parts:
        digest.update(repr(part).encode() + b"\0")
    return digest.hexdigest()[:24]


def folder(name):
    """The folder of this name in the user's cache, made if need be; None where none can be."""
    base = _base()
    if base is None:
        return None
    path = base / name
    try:
        path.mkdir(parents=True, exist_ok=True)
        usable = os.access(path, os.R_OK | os.W_OK | os.X_OK)
    except OSError:
        return None
    return str(path) if usable else None


def _base():
    """NUMBA_CACHE_DIR, else the user's cache folder; None for a user without a home."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) / "numbakern" if local else None
    chosen = os.environ.get("XDG_CACHE_HOME")
    if chosen and os.path.isabs(chosen):  # others are to be ignored, says its specification
        return Path(chosen) / "numbakern"
    home = os.environ.get("HOME", os.path.expanduser("~"))
    return Path(home) / ".cache" / "numbakern" if home else None


def read(folder, name):
    """The content of an entry; None if there is none or it is damaged."""
    try:
        entry = (Path(folder) / name).read_bytes()
    except OSError:
        return None
    content = entry[_DIGEST:]
    return content if hashlib.sha256(content).digest() == entry[:_DIGEST] else None


def write(folder, name, content):
    """Store an entry; other processes see all of it or nothing."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            temporary = file.name
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(temporary, Path(folder) / name)
    except OSError:  # disk full, read-only, removed meanwhile
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
