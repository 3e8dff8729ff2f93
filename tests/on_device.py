"""The public functions on GPU arrays, for tests that speak NumPy.

`Functions` has the ten functions of numbakern. Each puts its NumPy arguments on a device with
their very layout (aliases stay aliases), calls numbakern and brings the result back, so that a
test written for the CPU holds the CUDA target to the same answers. ``pytest --device NAME`` runs
the tests' own calls through it.

The device ``emulator`` needs no GPU: its memory is the host's, and a step of a plan runs on the
kernels' emulator instead of being launched.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import os
import types
from unittest import mock

import numpy as np
import pytest

import numbakern
from tests.cases import bfloat16

# JAX would take three quarters of the GPU's memory, in each of the tests' processes.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

ARRAYS = {"x", "logits", "log_probs", "labels", "weight", "grad_output", "output", "lse", "out"}


# --- a device whose memory is the host's ---------------------------------------------------------


class HostArray:
    """An array that says it is on a GPU; its memory is that of a NumPy array."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return 2, 0


class Words:
    """The memory of `bad_labels.Report`."""

    def __init__(self):
        self.array = None

    def write(self, array):
        if self.array is None:
            self.array = np.empty_like(array)
            self.address = self.array.ctypes.data
        self.array[...] = array

    def read(self):
        return self.array.copy().reshape(-1)


class Emulator:
    """Arrays in host memory, and the steps of plans on the kernels' emulator.

    A kernel may touch the arrays of its call: those sent and those made for it.
    """

    def __init__(self):
        from numbakern.cuda import bad_labels, compile, families, launch, plan
        from numbakern.cuda.ways import MACHINE, machine_of
        from tests.emulator import emulate

        words, touched = Words(), []
        report = bad_labels.Report(words)
        self.touched = touched

        class HostFamily(families.Family):
            def look(self, name, array, queue):
                a = array.array
                pointer = a.__array_interface__["data"][0]
                key = (self, 0, pointer & 15, a.dtype, a.shape, a.strides, a.flags.writeable)
                return key, pointer, array

            def describe(self, name, key):
                return families.Described(key[4], key[5], key[3], key[6])

            def empty(self, shape, dtype, queue, like):
                raw = np.full(max(int(np.prod(shape)) * dtype.itemsize, 1), 0xFF, np.uint8)
                a = np.ndarray(shape, dtype, raw)
                touched.append(a)
                return HostArray(a), a.__array_interface__["data"][0]

            def queue(self, kept, device):
                return Queue

        def start(step, kernel, *numbers):
            # cuda.core passes an int as 8 bytes and a float as a double, whatever a kernel expects.
            wanted = [{"i8": int, "f8": float}[elem] for elem in kernel.args.values()]
            assert [type(number) for number in numbers] == wanted
            memory = [*touched, words.array]
            emulate(kernel, step.grid, step.block, numbers, memory, step.shared, step.cluster)

        def prepared(step):
            if os.environ.get("NUMBAKERN_CUBINS"):  # what a GPU would need is compiled too
                compile.cubin(step.spec, Queue.device.arch, step.block, step.blocks)
            return step, plan.kernel_of(step.spec)

        class Queue:
            handle, number = 0, launch.LEGACY
            device = types.SimpleNamespace(
                ordinal=0,
                arch="sm_90a",
                capability=(9, 0),
                shared=232448,
                multiprocessors=132,
                machine=machine_of(MACHINE.multiprocessors, MACHINE.shared, (9, 0)),
                report=report,
                take_bad_label=report.take,
                calls={},
                prepared=prepared,
                make_current=lambda: None,
                read=ctypes.string_at,
            )

        Queue.start = staticmethod(start)

        self.patches = (
            (families._BY_PACKAGE, "tests", HostFamily),
            (launch, "devices", [Queue.device]),
        )
        self.caches = families._named, families.of

    def install(self, stack):
        for cache in self.caches:  # another emulator may have been there
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        for where, name, value in self.patches:
            if isinstance(where, dict):
                stack.enter_context(mock.patch.dict(where, {name: value}))
            else:
                stack.enter_context(mock.patch.object(where, name, value))

    def begin(self):
        self.touched.clear()

    def send(self, array, roots):
        self.touched.append(array)
        return HostArray(array)

    def fetch(self, array):
        return array.array


# --- real devices --------------------------------------------------------------------------------


def root_bytes(array, roots, upload):
    """The memory that an array is a view of, uploaded once a call, and where in it the array is."""
    root = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    low, high = np.lib.array_utils.byte_bounds(root if root.size else array)
    if low not in roots:
        raw = (ctypes.c_ubyte * (high - low)).from_address(low)
        roots[low] = upload(np.frombuffer(raw, np.uint8).copy())
    return roots[low], array.__array_interface__["data"][0] - low


class Real:
    def begin(self):
        """A call begins."""


class CuPy(Real):
    def __init__(self):
        self.cupy = pytest.importorskip("cupy")

    def send(self, array, roots):
        memory, offset = root_bytes(array, roots, self.cupy.asarray)
        dtype = array.dtype
        if not self.has(dtype):
            pytest.skip(f"this CuPy has no {dtype}")
        return self.cupy.ndarray(array.shape, dtype, memory.data + offset, array.strides)

    def has(self, dtype):
        try:
            self.cupy.empty(1, dtype)
        except (TypeError, ValueError, KeyError):
            return False
        return True

    def fetch(self, array):
        return self.cupy.asnumpy(array)


class Torch(Real):
    def __init__(self):
        self.torch = pytest.importorskip("torch")

    def send(self, array, roots):
        torch, size = self.torch, array.dtype.itemsize
        upload = lambda a: torch.from_numpy(a).cuda()  # noqa: E731
        if any(s < 0 for s in array.strides):
            pytest.skip("PyTorch has no such layout")
        memory, offset = root_bytes(array, roots, upload)
        dtype = getattr(torch, "bool" if array.dtype == bool else array.dtype.name, None)
        if dtype is None:
            pytest.skip(f"PyTorch has no {array.dtype}")
        tensor = torch.empty(0, dtype=dtype, device="cuda")
        strides = [s // size for s in array.strides]
        return tensor.set_(memory.untyped_storage(), offset // size, array.shape, strides)

    def fetch(self, tensor):
        if tensor.dtype == self.torch.bfloat16:
            return tensor.contiguous().view(self.torch.int16).cpu().numpy().view(bfloat16)
        return tensor.cpu().numpy()


class Numba(Real):
    def __init__(self):
        pytest.importorskip("numba_cuda")
        from numbakern.cuda.compile import numba_cuda

        self.cuda = numba_cuda()

    def send(self, array, roots):
        if array.size == 0:
            return self.cuda.device_array(array.shape, array.dtype)
        memory, offset = root_bytes(array, roots, self.cuda.to_device)
        interface = {
            "shape": array.shape,
            "strides": array.strides,
            "typestr": array.dtype.str,
            "data": (memory.__cuda_array_interface__["data"][0] + offset, False),
            "version": 3,
        }
        holder = type("Holder", (), {"__cuda_array_interface__": interface, "memory": memory})()
        view = self.cuda.as_cuda_array(holder)
        view.dtype = array.dtype  # bfloat16 has no type string
        return view

    def fetch(self, array):
        if array.size == 0:
            return np.empty(array.shape, array.dtype)
        if array.dtype == bfloat16:
            raw = self.cuda.devicearray.DeviceNDArray(
                array.shape, array.strides, np.uint16, gpu_data=array.gpu_data
            )
            return raw.copy_to_host().view(bfloat16)
        return array.copy_to_host()


class Jax(Real):
    def __init__(self):
        self.jax = pytest.importorskip("jax")
        if self.jax.default_backend() != "gpu":
            pytest.skip("this JAX has no GPU")
        self.jax.config.update("jax_enable_x64", True)

    def send(self, array, roots):
        return self.jax.device_put(np.ascontiguousarray(array).reshape(array.shape))

    def fetch(self, array):
        return np.asarray(array)


# --- the functions -------------------------------------------------------------------------------


class Functions:
    """The public functions, taking and giving NumPy arrays, computed on a device."""

    def __init__(self, device):
        self.device = device
        for name in numbakern.__all__:
            setattr(self, name, self._through(getattr(numbakern, name)))

    def _through(self, function):
        names = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(*args, **options):
            given = {**dict(zip(names, args, strict=False)), **options}
            sent = self._send(given)
            out = sent.get("out")
            with mock.patch.dict(os.environ, NUMBAKERN_CHECK="1"):
                result = function(*[sent.pop(n) for n in names[: len(args)]], **sent)
            results = result if isinstance(result, tuple) else (result,)
            back = tuple(self._fetch(r, out, given.get("out")) for r in results)
            return back if isinstance(result, tuple) else back[0]

        return call

    def _send(self, given):
        """The arguments with arrays on the device; what is one object here is one there."""
        self.device.begin()
        roots: dict = {}
        by_id: dict = {}
        sent = dict(given)
        for name in ARRAYS & set(given):
            value = given[name]
            if value is None or (name == "grad_output" and isinstance(value, (float, np.generic))):
                continue
            if id(value) not in by_id:
                array = value if isinstance(value, np.ndarray) else np.asarray(value)
                size = array.itemsize
                if not array.dtype.isnative or any(s % size for s in array.strides):
                    pytest.skip("a GPU has no such layout")
                if array.__array_interface__["data"][0] % size:
                    pytest.skip("a GPU has no such layout")
                by_id[id(value)] = self.device.send(array, roots)
            sent[name] = by_id[id(value)]
        return sent

    def _fetch(self, result, sent, given):
        values = self.device.fetch(result)
        if sent is None or result is not sent:
            return values if values.ndim else values[()]
        if values is not given:
            given[...] = values
        return given


_DEVICES = {"emulator": Emulator, "cupy": CuPy, "torch": Torch, "numba": Numba, "jax": Jax}


@contextlib.contextmanager
def on(name):
    """The Functions of a device of this name."""
    device = _DEVICES[name]()
    with contextlib.ExitStack() as stack:
        if name == "emulator":
            device.install(stack)
        yield Functions(device)


def replace_all(name):
    """Put the functions of a device in the place of numbakern's own, for good."""
    stack = contextlib.ExitStack()
    functions = stack.enter_context(on(name))
    for function in numbakern.__all__:
        setattr(numbakern, function, getattr(functions, function))
    functions.patches = stack  # they live as long as the functions
