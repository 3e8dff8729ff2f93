"""Libraries with GPU arrays, as far as numbakern uses them, over host memory.

Each mock has the attributes, the units and the oddities of the real one: PyTorch counts strides in
elements and has dtypes of its own, CuPy counts in bytes, JAX's arrays cannot be written to and come
and go by DLPack. A test installs one in `sys.modules`, where `families` looks for it.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import types

import ml_dtypes
import numpy as np

from numbakern.cuda import launch, pool
from numbakern.cuda.compile import Cubin
from numbakern.cuda.ways import Machine

bfloat16 = np.dtype(ml_dtypes.bfloat16)


def module(name, **members):
    made = types.ModuleType(name)
    for key, value in members.items():
        if isinstance(value, type):
            value.__module__ = name
        setattr(made, key, value)
    return made


class Log(list):
    """What a library was asked for, in order."""


memory: list[np.ndarray] = []
"""The arrays that there are: what a kernel may touch."""


def filled(shape, dtype):
    """A new array whose content shows where nothing is written."""
    raw = np.full(max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1), 0xFF, np.uint8)
    memory.append(raw)
    return np.ndarray(shape, dtype, raw)


# --- PyTorch -------------------------------------------------------------------------------------

_NAMES = "float16 bfloat16 float32 float64 int8 int16 int32 int64 uint8 bool complex64".split()


def torch_module():
    log = Log()

    class DType:
        def __init__(self, name):
            self.name = name

        def __repr__(self):
            return f"torch.{self.name}"

    dtypes = {name: DType(name) for name in _NAMES}

    def numpy_of(dtype):
        return bfloat16 if dtype.name == "bfloat16" else np.dtype(dtype.name)

    @functools.cache
    def own(dtype):
        return dtypes["bfloat16" if dtype == bfloat16 else dtype.name]

    class Tensor:
        is_cuda = True
        layout = "strided"

        def __init__(self, array, device=0, requires_grad=False):
            self._array, self._device, self.requires_grad = array, device, requires_grad
            self._version = 0
            self.shape, self.dtype = Size(array.shape), own(array.dtype)
            self._stride = tuple(s // array.itemsize for s in array.strides)
            self._pointer = array.ctypes.data

        def stride(self):
            return self._stride

        def data_ptr(self):
            return self._pointer

        def get_device(self):
            return self._device

        def is_neg(self):
            return False

        def is_inference(self):
            return False

        def reshape(self, shape):
            return Tensor(self._array.reshape(shape), self._device)

        @property
        def __cuda_array_interface__(self):
            raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad.")

        def __dlpack_device__(self):
            raise AssertionError("is_cuda says it ten times faster")

    class Size(tuple):
        pass

    class Device(tuple):
        def __new__(cls, kind, index):
            return super().__new__(cls, (kind, index))

    def empty(size, dtype, device):
        log.append(("bytes", size))
        return Tensor(filled((size,), numpy_of(dtype)), device[1])

    def empty_strided(shape, strides, dtype, device):
        log.append(("empty", tuple(shape)))
        tensor = Tensor(filled(shape, numpy_of(dtype)), device[1])
        assert tensor.stride() == tuple(strides)
        return tensor

    def increment_version(tensor):
        tensor._version += 1

    torch = module("torch", Tensor=Tensor, Size=Size, device=Device, strided="strided")
    torch.empty, torch.empty_strided = empty, empty_strided
    for name, dtype in dtypes.items():
        setattr(torch, name, dtype)
    torch.cuda = types.SimpleNamespace(device_count=lambda: 2)
    torch._C = types.SimpleNamespace(_cuda_getCurrentRawStream=lambda device: 0x70 + device)
    torch.autograd = types.SimpleNamespace(
        graph=types.SimpleNamespace(increment_version=increment_version)
    )
    torch.log = log
    return torch


# --- CuPy ----------------------------------------------------------------------------------------


def cupy_module():
    log = Log()

    class Device:
        current = 0

        def __init__(self, ordinal):
            self.id = ordinal

        def __enter__(self):
            self._before, Device.current = Device.current, self.id

        def __exit__(self, *_):
            Device.current = self._before

    class ndarray:
        def __init__(self, shape, dtype=np.float64):
            log.append(("empty", tuple(shape)))
            self._is(filled(shape, dtype), Device.current)

        def _is(self, array, device):
            self._array, self.device = array, Device(device)
            self.shape, self.strides, self.dtype = array.shape, array.strides, array.dtype
            pointer = array.__array_interface__["data"][0]
            self.data = types.SimpleNamespace(ptr=pointer, device_id=device)

        @classmethod
        def of(cls, array, device=0):
            self = cls.__new__(cls)
            self._is(array, device)
            return self

        def __dlpack_device__(self):
            return 2, self.device.id

    streams = [types.SimpleNamespace(ptr=0xC0 + device) for device in range(2)]

    def get_current_stream(device_id=-1):
        return streams[device_id]

    cupy = module("cupy", ndarray=ndarray)
    cupy.cuda = types.SimpleNamespace(Device=Device, get_current_stream=get_current_stream)
    cupy.log = log
    return cupy


# --- JAX -----------------------------------------------------------------------------------------


def jax_modules():
    log = Log()

    class ArrayImpl:
        def __init__(self, array):
            self._owner, self.shape, self.dtype = array, array.shape, array.dtype
            taken = isinstance(array, pool.Array)
            self._pointer = array.pointer if taken else array.ctypes.data

        @functools.cached_property
        def _array(self):
            if not isinstance(self._owner, pool.Array):
                return self._owner
            raw = (ctypes.c_uint8 * max(self._owner.nbytes, 1)).from_address(self._pointer)
            values = np.frombuffer(raw, self.dtype, int(np.prod(self.shape)))
            return values.reshape(self.shape)

        def __dlpack_device__(self):
            return 2, 0

        def __dlpack__(self, *, stream=None, **_):
            log.append(("ready", stream))
            return pool.capsule(self, self._pointer, self.shape, self.dtype, (2, 0))

    def from_dlpack(array):
        assert array.__dlpack_device__()[0] == 2
        array.__dlpack__(stream=0xA0)  # as JAX does: the producer is told what will wait for it
        log.append(("from_dlpack", array.shape))
        return ArrayImpl(array)

    jaxlib = module("jaxlib", ArrayImpl=ArrayImpl)
    dlpack = module("jax.dlpack", from_dlpack=from_dlpack)
    jaxlib.log = log
    return {"jaxlib": jaxlib, "jax": module("jax", dlpack=dlpack), "jax.dlpack": dlpack}


# --- Numba ---------------------------------------------------------------------------------------


def numba_cuda_module():
    log = Log()

    class Context:
        device = types.SimpleNamespace(id=0)

        def memalloc(self, size):
            log.append(("memalloc", size))
            return Memory(filled((size,), np.uint8))

    class Memory:
        context = Context()

        def __init__(self, array):
            self.array = array
            pointer = array.__array_interface__["data"][0]
            self.device_ctypes_pointer = ctypes.c_void_p(pointer if array.size else None)

    class DeviceNDArray:
        def __init__(self, shape, strides, dtype, stream=0, gpu_data=None):
            self.shape, self.strides, self.dtype = shape, strides, dtype
            self.stream, self.gpu_data = stream, gpu_data
            self._array = np.ndarray(shape, dtype, gpu_data.array, 0, strides)

        @classmethod
        def of(cls, array, stream=0):
            self = cls.__new__(cls)
            self.shape, self.strides, self.dtype = array.shape, array.strides, array.dtype
            self.stream, self.gpu_data, self._array = stream, Memory(array), array
            return self

        @property
        def __cuda_array_interface__(self):
            raise AssertionError("it takes its time")

    def device_array(shape, dtype):
        return DeviceNDArray.of(filled(shape, dtype))

    made = module("numba.cuda", device_array=device_array)
    made.cudadrv = types.SimpleNamespace(
        devicearray=types.SimpleNamespace(DeviceNDArray=DeviceNDArray)
    )
    DeviceNDArray.__module__ = "numba.cuda"
    made.log = log
    return made


# --- a device to go with them --------------------------------------------------------------------


class Buffer:
    def __init__(self, size):
        self.array = filled((size,), np.uint8)
        self.handle, self.size = self.array.ctypes.data, size


class Stream:
    def __init__(self, device, handle):
        self.device, self.handle, self.number = device, handle, handle or launch.LEGACY
        self.waited_for_by, self.waits_for, self.held = [], [], []

    def start(self, step, start, *numbers):
        start(step, numbers, self)

    def allocate(self, size):
        buffer = Buffer(size)
        return buffer, buffer.handle

    def wait_for(self, handle):
        self.waits_for.append(handle)

    def release_to(self, handle):
        self.waited_for_by.append(handle)

    def hold(self, objects):
        self.held.append(objects)


class Device:
    """What `launch.Device` is for a target; `start(step, numbers, stream)` runs the kernels."""

    def __init__(self, ordinal, report, start):
        self.ordinal, self.report, self._start = ordinal, report, start
        self.take_bad_label, self.calls = report.take, {}
        self.machine = Machine()
        self.own_stream = Stream(self, 0x0E)
        self._streams = {}

    def stream(self, handle):
        handle = 0 if handle == launch.LEGACY else handle
        return self._streams.setdefault(handle, Stream(self, handle))

    def prepared(self, step):
        return step, self._start

    def make_current(self):
        return None

    def read(self, address, size):
        return ctypes.string_at(address, size)


def cubin(registers=64, stack=0):
    """A Cubin that says it takes so many, in an ELF file with nothing else."""
    names = b"\0.nv.info\0.shstrtab\0"
    other = struct.pack("<BBH", 3, 0x12, 77)  # an attribute of two bytes, of that number
    found = [struct.pack("<BBHII", 4, n, 8, 5, v) for n, v in ((0x2F, registers), (0x12, stack))]
    info = other + b"".join(found)
    header = b"\x7fELF" + bytes(36) + struct.pack("<Q", 64 + len(names) + len(info))
    header = header.ljust(58, b"\0") + struct.pack("<HHH", 64, 2, 0)
    sections = ((10, 3, 64, len(names)), (1, 0x70000000, 64 + len(names), len(info)))
    table = (struct.pack("<IIQQQQ", a, b, 0, 0, c, d).ljust(64, b"\0") for a, b, c, d in sections)
    return Cubin("kernel", header + names + info + b"".join(table))


# --- arrays of unknown libraries -----------------------------------------------------------------


class OnlyInterface:
    """An array that has nothing but the CUDA array interface."""

    def __init__(self, array, read_only=False, stream=None):
        self._array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": "<V2" if array.dtype == bfloat16 else array.dtype.str,
            "strides": None if array.flags.c_contiguous else array.strides,
            "data": (array.__array_interface__["data"][0], read_only),
            "stream": stream,
            "version": 3,
        }
        if array.dtype == bfloat16:
            self.dtype = "bfloat16"


class OnlyDLPack:
    """An array that has nothing but DLPack."""

    def __init__(self, array):
        self._array, self._pointer = array, array.ctypes.data

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, *, stream=None, **_):
        a = self._array
        return pool.capsule(self, self._pointer, a.shape, a.dtype, (2, 0))


class _VersionedTensor(ctypes.Structure):
    """A DLManagedTensorVersioned, with shape and strides behind it."""

    _fields_ = [
        ("version", ctypes.c_uint32 * 2),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("offset", ctypes.c_uint64),
        ("sizes", ctypes.c_int64 * 8),
    ]


class Versioned(OnlyDLPack):
    """An array by the newer protocol, which can say that it is read-only, of any DLDataType."""

    def __init__(self, array, read_only, code=2, bits=32):
        super().__init__(array)
        self._read_only, self._of, self._tensors = read_only, (code, bits), []

    def __dlpack__(self, *, stream=None, max_version=None, **_):
        assert max_version >= (1, 0)
        a, tensor = self._array, _VersionedTensor()
        tensor.version[:], tensor.flags = (1, 0), int(self._read_only)
        tensor.deleter = ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p).value
        tensor.data, tensor.device[:] = a.__array_interface__["data"][0], (2, 0)
        tensor.ndim, (tensor.code, tensor.bits), tensor.lanes = a.ndim, self._of, 1
        steps = [s // a.itemsize for s in a.strides]
        tensor.sizes[: 2 * a.ndim] = [*a.shape, *steps]
        tensor.shape = ctypes.addressof(tensor) + _VersionedTensor.sizes.offset
        tensor.strides = tensor.shape + 8 * a.ndim
        self._tensors.append(tensor)
        new = ctypes.PYFUNCTYPE(
            ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
        )(("PyCapsule_New", ctypes.pythonapi))
        return new(ctypes.addressof(tensor), b"dltensor_versioned", None)
