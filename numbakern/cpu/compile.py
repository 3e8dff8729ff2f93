"""The one place where kernels are compiled and cached on disk.

Numba's own cache watches the one file a function stands in, so an edited helper elsewhere would
serve stale machine code. Here an entry lies in a folder named after a fingerprint of every source
file of the package, Numba, llvmlite, Python and the CPU.
"""

import hashlib
import os
import pickle
import platform
import sys
import tempfile
from functools import cache
from pathlib import Path

import llvmlite
import llvmlite.binding
import numba
from numba import njit, types
from numba.core.ccallback import CFunc
from numba.core.dispatcher import _FunctionCompiler  # type: ignore[attr-defined]
from numba.core.registry import CPUDispatcher
from numba.core.serialize import dumps

_KERNEL = (types.int64, types.int64, types.int64, types.int64)  # frame, first, last, scratch


@cache
def fingerprint():
    """Digest of all that decides the machine code of a kernel."""
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    cpu = llvmlite.binding
    features = cpu.get_host_cpu_features().flatten()
    versions = (numba.__version__, llvmlite.__version__, sys.version, platform.machine())
    settings = sorted((k, v) for k, v in os.environ.items() if k.startswith("NUMBA_CPU"))
    for part in (*versions, cpu.get_host_cpu_name(), features, settings, numba.config.OPT):
        digest.update(repr(part).encode() + b"\0")
    return digest.hexdigest()[:24]


@cache
def cache_folder():
    """Folder of this fingerprint's cache entries, or None where none can be written."""
    base = _cache_base()
    if base is None:
        return None
    folder = base / f"numbakern-{fingerprint()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.R_OK | os.W_OK | os.X_OK)
    except OSError:
        return None
    return str(folder) if usable else None


def _cache_base():
    """NUMBA_CACHE_DIR, else the user's cache folder; None for a user without a home."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) / "numbakern" if local else None
    chosen = os.environ.get("XDG_CACHE_HOME")
    if chosen:
        return Path(chosen) / "numbakern"
    home = os.environ.get("HOME", os.path.expanduser("~"))
    return Path(home) / ".cache" / "numbakern" if home else None


class _DiskCache:
    """What Numba asks of a function's cache, one file a kernel; a broken file is no error."""

    def __init__(self, name):
        self._name = name

    @property
    def cache_path(self):
        return cache_folder()

    def load_overload(self, sig, target_context):
        target_context.refresh()
        folder = cache_folder()
        if folder is None:
            return None
        try:
            entry = (Path(folder) / self._name).read_bytes()
            digest, content = entry[:32], entry[32:]
            if hashlib.sha256(content).digest() != digest:
                return None
            payload = pickle.loads(content)
            return numba.core.compiler.CompileResult._rebuild(target_context, *payload)
        except Exception:  # absent, truncated or garbled: compile instead
            return None

    def save_overload(self, sig, result):
        folder = cache_folder()
        if folder is None:
            return
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                temporary = file.name
                content = dumps(result._reduce())
                file.write(hashlib.sha256(content).digest() + content)
            os.replace(temporary, Path(folder) / self._name)
        except OSError:  # disk full, read-only, removed meanwhile
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)


class _DeviceCompiler(_FunctionCompiler):
    def _customize_flags(self, flags):
        flags.no_cpython_wrapper = flags.no_cfunc_wrapper = flags.no_compile = True
        return flags

    def compile(self, args, return_type):
        # Numba knows a compiled function by its entry point: this one needs an identity only.
        result = super().compile(args, return_type)._replace(entry_point=object())
        library = result.library
        # It is optimised and turned into machine code once, as part of the kernel it ends in.
        library._optimize_final_module = lambda: None
        library._finalize_final_module = lambda: setattr(library, "_finalized", True)
        context = self.targetdescr.target_context
        context.insert_user_function(result.entry_point, result.fndesc, [library])
        return result


class _DeviceDispatcher(CPUDispatcher):
    def __init__(self, function):
        options = {"nopython": True, "boundscheck": False, "error_model": "numpy"}
        super().__init__(function, targetoptions=options)
        own = self._compiler
        self._compiler = _DeviceCompiler(
            own.py_func, own.targetdescr, own.targetoptions, own.locals, own.pipeline_class
        )

    def add_overload(self, result):
        self.overloads[tuple(result.signature.args)] = result  # nothing to call from Python


def device(function):
    """njit for what only other jitted code calls: no wrappers, no machine code of its own.

    A kernel is made of dozens of these; without their wrappers it compiles twice as fast.
    """
    return _DeviceDispatcher(function)


class _Kernel(CFunc):
    """A C callback whose only visible symbol is its entry.

    Numba numbers functions by process. Two kernels cached by two processes may hold helpers of one
    name, and the linker would take either for both: so helpers are made internal.
    """

    def _compile_uncached(self):
        result = super()._compile_uncached()
        library, entry = result.library, result.fndesc.llvm_cfunc_wrapper_name
        optimize = library._optimize_final_module

        def internalize_and_optimize():
            for function in library._final_module.functions:
                if not function.is_declaration and function.name != entry:
                    function.linkage = "internal"
            optimize()

        library._optimize_final_module = internalize_and_optimize
        return result


def compile_kernel(function, name):
    """Address of `function(frame, first, last, scratch)` as machine code; names are unique."""
    function.__qualname__ = "kernel_" + name.replace("-", "_")
    compiled = _Kernel(function, (_KERNEL, types.void), {}, {"error_model": "numpy"})
    compiled._cache = _DiskCache(name)
    compiled.compile()
    _keep.append(compiled)  # its code lives as long as it does
    return compiled.address


_keep: list[object] = []


def compile_function(function, name, signature, **options):
    """`function` compiled for one signature, called without Numba's type dispatch."""
    dispatcher = njit(nogil=True, error_model="numpy", **options)(function)
    dispatcher._cache = _DiskCache(name)
    dispatcher.compile(signature)
    _keep.append(dispatcher)
    return dispatcher.overloads[signature].entry_point
