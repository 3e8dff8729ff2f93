"""The one place where kernels are compiled: Python function → cubin, over numba-cuda, cached.

Nothing else imports numba-cuda, which is in maintenance mode and has a successor. No driver and no
GPU is needed. A cubin that is on disk already is read without importing Numba at all.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import os
import re
import struct
import subprocess
import tempfile
import threading
import warnings
import zlib
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import NamedTuple

from numbakern import disk_cache

INSTALL = "pip install 'numbakern[cuda]'"
_DISTRIBUTIONS = ("numba-cuda", "numba", "llvmlite", "numpy", "nvidia-nvvm", "nvidia-nvjitlink")
_lock = threading.RLock()
_device = SimpleNamespace(compute_capability=None)


class Cubin(NamedTuple):
    """Machine code of one kernel."""

    entry: str  # name of the kernel in the code
    code: bytes


class Resources(NamedTuple):
    """What a kernel takes."""

    registers: int  # a thread
    stack: int  # bytes a thread
    shared: int  # bytes a block, static
    local: int  # bytes a thread


def arch_of(major, minor):
    """The architecture compiled for on a device of this compute capability, as ``"sm_90a"``.

    From 9.0 on with the features of that very architecture, as `@cuda.jit` does it.
    """
    return f"sm_{major}{minor}{'a' if (major, minor) >= (9, 0) else ''}"


# ---------------------------------------------------------------- compiling


@cache
def numba_cuda():
    """The module `numba.cuda` of numba-cuda, imported at the first kernel that is not cached."""
    with contextlib.suppress(ImportError):
        # What the .pth file of numba-cuda does; it is not read where the package came by
        # PYTHONPATH, and Numba's own, deprecated target would be imported instead.
        importlib.import_module("_numba_cuda_redirector")
    try:
        with warnings.catch_warnings():
            # As it is imported it makes a constant in a way that NumPy 2.5 has deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            cuda = importlib.import_module("numba.cuda")
    except (ImportError, AttributeError) as error:  # the latter: an older one, a newer Numba
        why = " ".join(str(error).split())
        raise RuntimeError(f"numba-cuda cannot be imported ({why}): {INSTALL}") from error
    if getattr(cuda, "implementation", None) != "NVIDIA":
        raise RuntimeError(f"numba-cuda is not installed: {INSTALL}")
    return cuda


@cache
def _complete():
    """Load what else compiling needs, once; RuntimeError saying what is missing."""
    pathfinder = importlib.import_module("cuda.pathfinder")
    for name in ("nvvm", "nvJitLink"):  # without the latter numba-cuda asks for a driver
        try:
            pathfinder.load_nvidia_dynamic_lib(name)
        except RuntimeError as error:
            raise RuntimeError(f"lib{name.lower()} was not found: {INSTALL}") from error


def capability():
    """The compute capability that a kernel is compiled for, while it is."""
    return _device.compute_capability


@contextlib.contextmanager
def _compiler(capability):
    """What numba-cuda needs around a compilation; numpy and numba-cuda are left as they were."""
    import numpy as np

    cuda = numba_cuda()
    _complete()
    dispatcher = importlib.import_module("numba.cuda.dispatcher")
    with _lock:
        # numba-cuda 0.30 asks NumPy for row_stack, which NumPy 2.5 has no longer.
        missing = "row_stack" not in vars(np)
        if missing:
            np.row_stack = np.vstack
        # Device functions ask the driver which device they are compiled for.
        current_device = dispatcher.get_current_device
        dispatcher.get_current_device = lambda: _device
        _device.compute_capability = capability
        try:
            yield cuda
        finally:
            dispatcher.get_current_device = current_device
            if missing:
                del np.row_stack


def compile_kernel(function, arg_types, arch, bounds=None):
    """`function` as machine code for one architecture; nothing is read from or put on disk.

    Parameters
    ----------
    function : function
        The kernel in Python, of scalars only.
    arg_types : sequence of {"i8", "f8"}
        int64 or float64 for each argument.
    arch : str
        As "sm_80" or "sm_90a".
    bounds : int or tuple of int, optional
        Launch bounds: threads a block, then blocks a multiprocessor, then blocks a cluster.

    Returns
    -------
    Cubin
    """
    number, suffix = re.fullmatch(r"sm_(\d+)([a-z]?)", arch).groups()
    capability = int(number[:-1]), int(number[-1])
    with _compiler(capability):
        from numba import types
        from numba.cuda.compiler import _compile_pyfunc_with_fixup

        scalars = {"i8": types.int64, "f8": types.float64}
        library, _ = _compile_pyfunc_with_fixup(
            function,
            types.void(*(scalars[kind] for kind in arg_types)),
            device=False,
            abi="numba",
            cc=capability,
            launch_bounds=bounds,
            lto=True,
        )
        # As in the library of a `@cuda.jit` kernel: LTO-IR through nvJitLink, not PTX.
        library._nvvm_options.pop("gen-lto", None)
        library._lto = True
        linked = library.get_cubin(cc=(*capability, suffix))
        return Cubin(library._entry_name, bytes(linked.code))


def blocks_of(threads, registers):
    """How many blocks a multiprocessor has the registers for.

    It has four schedulers with 512 of them for each lane, which give them out by 8 to whole warps.
    """
    warps = 4 * (512 // (-(-registers // 8) * 8))
    return warps // -(-threads // 32)


OWN = 1 << 10
"""Bytes of shared memory that the driver keeps of each block."""


def shared_of(used, shared, arch):
    """Bytes of shared memory that a block of a kernel takes which is given so many."""
    # The driver keeps some of each block; from sm_90 on ptxas counts that where there is any.
    counted = int(arch[3:].rstrip("a")) >= 90
    own = max(OWN, used.shared) if counted else used.shared + OWN
    return shared + own


THREADS, CROWD, LEFT = 2048, 6, 32 << 10
"""Threads of a multiprocessor; its blocks from which on one is given up for L1 to have so many
bytes more."""


def share_of(threads, registers, shared, most):
    """Bytes of shared memory that a multiprocessor had better have for its blocks, of `most`.

    `shared`: of a block, as `shared_of`. What is left is L1's, in which loads wait that are on
    their way to registers: of many blocks that took nearly all they would wait for room there.
    """
    blocks = min(THREADS // threads, blocks_of(threads, registers), most // shared)
    return most - LEFT if blocks >= CROWD and blocks * shared > most - LEFT else most


LITTLE, LARGE, MANY = 24, 256, 1.25
"""Bytes of a thread's stack that one block more of so many threads is worth, or of any if there are
so many times as many then."""
LEAN = 64
"""Registers of a thread that may be asked for."""
NEARLY, FEW = 72, 8
"""Registers too many, blocks too few, for which another compilation is worth a try."""


def compile_well(function, arg_types, arch, threads, room=0):
    """As `compile_kernel` for blocks of so many threads, if possible without a stack.

    To fit one more block into a multiprocessor, ptxas may leave a few registers too few and move
    values to memory and back. Told how many blocks there are to be, or of one less, or not told
    how large they are, it often finds a way that takes no or few more registers. Where it has taken
    more than would let in one block more, it is told of that block, or if that takes a stack, of
    those there are. And of so many blocks as there is also other room for (`room`; 0 to not tell).
    It takes all of their registers then, and asks for more before it waits. A large block more is
    worth a little stack: on an H200 two blocks of 512 threads are 1.2 times as fast as one.
    """
    first = compile_kernel(function, arg_types, arch, threads)
    used = resources(first)
    blocks = blocks_of(threads, used.registers)
    more = (threads, blocks + 1), LITTLE if threads >= LARGE else 0
    tried: list[tuple[tuple[int, int] | None, int]] = []  # launch bounds, stack that is accepted
    if room:
        if blocks < room <= blocks_of(threads, LEAN):
            many = room >= MANY * blocks
            tried.append(((threads, room), LITTLE if many or threads >= LARGE else 0))
        elif blocks == 1 and room > 1:
            tried.append(more)
        tried.append(((threads, min(room, blocks)), 0))
    if used.stack:
        tried.append(((threads, blocks), 0))
        if blocks > 1:  # the last of them is worth as much stack as one more
            tried += [((threads, blocks), more[1]), ((threads, blocks - 1), 0)]
        tried += [(None, 0), ((threads, 1), 0)]
    elif not room and blocks < FEW and blocks_of(threads, max(1, used.registers - NEARLY)) > blocks:
        tried = [more, ((threads, blocks), 0)]
    for bounds, stack in dict.fromkeys(tried):
        found = compile_kernel(function, arg_types, arch, bounds)
        used = resources(found)
        if used.stack <= stack and blocks_of(threads, used.registers):
            return found
    return first


# ---------------------------------------------------------------- the cache


def _version(distribution):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def versions():
    """Versions of what compiles a kernel; None for what is not installed as a package."""
    return {name: _version(name) for name in _DISTRIBUTIONS}


@cache
def cache_folder():
    """Folder of the cubins, or None where none can be written.

    With NUMBAKERN_CUBINS, a folder that may have come from another machine: there, versions of
    what compiles do not count.
    """
    carried = os.environ.get("NUMBAKERN_CUBINS")
    if carried:
        path = os.path.join(carried, f"numbakern-cuda-{disk_cache.fingerprint(())}")
        with contextlib.suppress(OSError):
            os.makedirs(path, exist_ok=True)
        return path
    # Without the wheels, NVVM and nvJitLink are those of a toolkit.
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    settings = sorted((k, v) for k, v in os.environ.items() if k in _SETTINGS)
    parts = (*versions().items(), os.path.realpath(toolkit), settings)
    return disk_cache.folder(f"numbakern-cuda-{disk_cache.fingerprint(parts)}")


_SETTINGS = ("NUMBA_OPT", "NUMBA_FORCE_CUDA_CC", "NUMBA_CUDA_DEBUGINFO")


@lru_cache(maxsize=4096)
def cubin(spec, arch, threads, room=0):
    """The kernel that `plan.build` makes of a spec, for blocks of so many threads, kept on disk.

    `room` as in `compile_well`.
    """
    folder = cache_folder()
    key = repr((spec, arch, threads, room))
    name = f"{spec.kernel}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
    if folder is not None:
        content = disk_cache.read(folder, name)
        if content is not None:
            entry, _, code = content.partition(b"\0")
            return Cubin(entry.decode(), code)
    from numbakern.cuda.plan import build

    function, arg_types = build(spec)
    compiled = compile_well(function, arg_types, arch, threads, room)
    if folder is not None:
        disk_cache.write(folder, name, compiled.entry.encode() + b"\0" + compiled.code)
    return compiled


# ---------------------------------------------------------------- looking at machine code


def _tool(name, *options, code):
    """What a tool prints of machine code; kept on disk beside it."""
    key = hashlib.sha256(repr((name, options)).encode() + code).hexdigest()[:32]
    folder, file = cache_folder(), f"{name}-{key}.txt"
    printed = disk_cache.read(folder, file) if folder is not None else None
    if printed is None:
        printed = zlib.compress(_run(name, *options, code=code).encode(), 1)
        if folder is not None:
            disk_cache.write(folder, file, printed)
    return zlib.decompress(printed).decode()


def _run(name, *options, code):
    from cuda import pathfinder

    path = pathfinder.find_nvidia_binary_utility(name)
    if path is None:
        raise RuntimeError(f"{name} is not installed: pip install nvidia-cuda-{name}")
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "kernel.cubin")
        with open(file, "wb") as out:
            out.write(code)
        done = subprocess.run([path, *options, file], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def sass(cubin):
    """The instructions of a Cubin and their encodings as nvdisasm prints them."""
    return _tool("nvdisasm", "-c", "-hex", code=cubin.code)


_SECTION = struct.Struct("<IIQQQQ")  # of an ELF file: name, kind, flags, address, place, size
_ATTRIBUTES = 0x70000000
"""Kind of the sections .nv.info, where NVIDIA's compiler says what a kernel takes."""
_TAKEN = {0x2F: "registers", 0x12: "stack"}
"""EIATTR_REGCOUNT and EIATTR_MIN_STACK_SIZE, as `cuobjdump -elf` calls these attributes."""
_LONG = 4
"""EIFMT_SVAL: such an attribute says how long its value is; those of all others are two bytes."""


def resources(cubin):
    """The Resources of a Cubin, as they stand in it."""
    taken = dict.fromkeys(Resources._fields, 0)
    for name, kind, content, size in _sections(cubin.code):
        if name in (f".nv.shared.{cubin.entry}", f".nv.local.{cubin.entry}"):
            taken[name.split(".")[2]] = size
        elif kind == _ATTRIBUTES:
            for number, (_, value) in _attributes(content):
                taken[_TAKEN[number]] = max(taken[_TAKEN[number]], value)
    return Resources(**taken)


def _sections(code):
    """(name, kind, content, size) of the sections of an ELF file."""
    (start,) = struct.unpack_from("<Q", code, 40)
    step, count, names = struct.unpack_from("<HHH", code, 58)
    headers = [_SECTION.unpack_from(code, start + i * step) for i in range(count)]
    first = headers[names][4]
    for name, kind, _, _, at, size in headers:
        end = code.index(b"\0", first + name)
        yield code[first + name : end].decode(), kind, code[at : at + size], size


def _attributes(content):
    """(number, (function, value)) of the attributes that `_TAKEN` names."""
    at = 0
    while at < len(content):
        form, number, size = struct.unpack_from("<BBH", content, at)
        at += 4
        if form == _LONG:
            if number in _TAKEN:
                yield number, struct.unpack_from("<II", content, at)
            at += size
