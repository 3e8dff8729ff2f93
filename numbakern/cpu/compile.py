"""The one place where kernels are compiled and cached on disk.

Numba's own cache watches the one file a function stands in, so an edited helper elsewhere would
serve stale machine code. Here an entry lies in a folder (see `disk_cache`) named after every source
file of the package, Numba, llvmlite, Python and the CPU.
"""

import contextlib
import gc
import os
import pickle
import platform
import sys
from functools import cache
from types import FunctionType

import llvmlite
import llvmlite.binding
import numba
from numba import njit, types
from numba.core.ccallback import CFunc
from numba.core.codegen import CPUCodeLibrary
from numba.core.compiler import Compiler
from numba.core.dispatcher import _FunctionCompiler  # type: ignore[attr-defined]
from numba.core.registry import CPUDispatcher
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

from numbakern import disk_cache

_KERNEL = (types.int64, types.int64, types.int64, types.int64)  # frame, first, last, scratch


@cache
def cache_folder():
    """Folder of this CPU's and these versions' kernels, or None where none can be written."""
    cpu = llvmlite.binding
    features = cpu.get_host_cpu_features().flatten()
    versions = (numba.__version__, llvmlite.__version__, sys.version, platform.machine())
    settings = sorted((k, v) for k, v in os.environ.items() if k.startswith("NUMBA_CPU"))
    parts = (*versions, cpu.get_host_cpu_name(), features, settings, numba.config.OPT)
    return disk_cache.folder(f"numbakern-{disk_cache.fingerprint(parts)}")


class _DiskCache:
    """What Numba asks of a function's cache, one file a kernel."""

    def __init__(self, name):
        self._name = name

    @property
    def cache_path(self):
        return cache_folder()

    def load_overload(self, sig, target_context):
        # All that machine code may ask of Numba. Numba's own cache also loads what only a compiler
        # needs: three quarters of a first call's time.
        rtsys.initialize(target_context)
        folder = cache_folder()
        content = None if folder is None else disk_cache.read(folder, self._name)
        if content is None:
            return None
        try:
            payload = pickle.loads(content)
            return numba.core.compiler.CompileResult._rebuild(target_context, *payload)
        except Exception:  # undamaged, but not for this Numba: compile instead
            return None

    def save_overload(self, sig, result):
        folder = cache_folder()
        if folder is not None:
            disk_cache.write(folder, self._name, dumps(result._reduce()))


def shared(make):
    """Let `make` make one thing of functions whose code and whose closures are equal.

    The kernels of a process have most of their parts in common, and each part is compiled once.
    """

    def make_once(function):
        key = make, _identity(function)
        if key not in _made:
            _made[key] = make(function)
        return _made[key]

    make_once.__doc__, make_once.__name__ = make.__doc__, make.__name__
    return make_once


_made: dict[object, object] = {}


def _identity(value):
    """Equal for what compiles to the same code."""
    if isinstance(value, FunctionType):
        cells = tuple(_identity(cell.cell_contents) for cell in value.__closure__ or ())
        return value.__module__, value.__code__, _identity(value.__defaults__), cells
    if isinstance(value, tuple):
        return tuple(_identity(v) for v in value)
    if isinstance(value, float):
        return value.hex()  # 0.0 and −0.0 differ
    return type(value), value  # 1 and True differ


class _Part(CPUCodeLibrary):
    """Code that is optimised and turned into machine code once: in the kernel it ends in."""

    def _optimize_functions(self, ll_module):
        ll_module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self):
        pass

    def _finalize_final_module(self):
        self._finalized = True


class _PartPipeline(Compiler):
    """The compiler of a _Part: it would make a library of Numba's own."""

    def __init__(self, typing, target, _library, *rest):
        super().__init__(typing, target, _Part(target.codegen(), "part"), *rest)


class _DeviceCompiler(_FunctionCompiler):
    def _customize_flags(self, flags):
        flags.no_cpython_wrapper = flags.no_cfunc_wrapper = flags.no_compile = True
        return flags

    def compile(self, args, return_type):
        # Numba knows a compiled function by its entry point: this one needs an identity only.
        result = super().compile(args, return_type)._replace(entry_point=object())
        context = self.targetdescr.target_context
        context.insert_user_function(result.entry_point, result.fndesc, [result.library])
        if self.apart:
            _apart.add(result.fndesc.mangled_name)
        return result


class _DeviceDispatcher(CPUDispatcher):
    def __init__(self, function, apart=False):
        options = {"nopython": True, "boundscheck": False, "error_model": "numpy"}
        super().__init__(function, targetoptions=options)
        own = self._compiler
        self._compiler = _DeviceCompiler(
            own.py_func, own.targetdescr, own.targetoptions, own.locals, _PartPipeline
        )
        self._compiler.apart = apart

    def add_overload(self, result):
        self.overloads[tuple(result.signature.args)] = result  # nothing to call from Python

    def get_call_template(self, args, kws):
        # A number in a call is known as such when the kernel is optimised: no code of its own.
        return super().get_call_template([types.unliteral(a) for a in args], kws)


@shared
def device(function):
    """njit for what only other jitted code calls: no wrappers, no machine code of its own.

    A kernel is made of dozens of these; without their wrappers it compiles twice as fast.
    """
    return _DeviceDispatcher(function)


@shared
def apart(function):
    """`device` that is not merged into its callers: whose registers are to be its own.

    A loop that needs all of them would else save what its caller holds in each of its rounds.
    """
    return _DeviceDispatcher(function, apart=True)


_apart: set[str] = set()  # names of such functions in LLVM


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
                if function.name in _apart:
                    function.add_function_attribute("noinline")
            optimize()

        library._optimize_final_module = internalize_and_optimize
        return result


class _Collector:
    """The collector of cycles, at rest while kernels are compiled.

    It would walk the compiler's many objects again and again, which live until the end anyway: a
    kernel compiles in four fifths of the time.
    """

    def __init__(self):
        self.rests = False  # and is to go on
        if hasattr(os, "register_at_fork"):  # the thread that would see to that is not in a child
            os.register_at_fork(after_in_child=self.go_on)

    def go_on(self):
        if self.rests:
            self.rests = False
            gc.enable()

    @contextlib.contextmanager
    def at_rest(self):
        if gc.isenabled():
            self.rests = True
            gc.disable()
        try:
            yield
        finally:
            self.go_on()


_collector = _Collector()


def _require_compiler():
    if numba.config.DISABLE_JIT:  # then `njit` gives back the function
        raise RuntimeError("NUMBA_DISABLE_JIT: expected 0, for kernels have to be compiled, got 1")


@_collector.at_rest()
def compile_kernel(function, name):
    """Address of `function(frame, first, last, scratch)` as machine code; names are unique."""
    _require_compiler()
    function.__qualname__ = "kernel_" + name.replace("-", "_")
    compiled = _Kernel(function, (_KERNEL, types.void), {}, {"error_model": "numpy"})
    compiled._cache = _DiskCache(name)
    compiled.compile()
    _keep.append(compiled)  # its code lives as long as it does
    return compiled.address


_keep: list[object] = []


@_collector.at_rest()
def compile_function(function, name, signature, **options):
    """`function` compiled for one signature, called without Numba's type dispatch."""
    _require_compiler()
    dispatcher = njit(nogil=True, error_model="numpy", **options)(function)
    dispatcher._cache = _DiskCache(name)
    dispatcher.compile(signature)
    _keep.append(dispatcher)
    return dispatcher.overloads[signature].entry_point
