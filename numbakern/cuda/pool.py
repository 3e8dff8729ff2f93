"""Device memory of our own, for array libraries whose allocator cannot be asked: JAX and unknown.

It comes from the driver's stream-ordered pool, and leaves as an object that speaks DLPack and the
CUDA array interface. DLPack is written out here, for cuda.core exports no bfloat16.
"""

import copy
import ctypes
import functools
import math

import numpy as np

_CUDA = 2  # DLDeviceType
_CODES = {"i": 0, "u": 1, "f": 2, "V": 4, "b": 6}  # DLDataTypeCode; V is bfloat16


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensor))
_DLManagedTensor._fields_ = [
    ("dl_tensor", _DLTensor),
    ("manager_ctx", ctypes.c_void_p),
    ("deleter", _Deleter),
]
_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_api = ctypes.pythonapi
_new = _api.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, _Destructor]
_is_valid = _api.PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p]
_pointer = _api.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]
_NAME = b"dltensor"
_exported: dict[int, tuple] = {}  # address of a managed tensor → what it keeps alive


@_Deleter
def _delete(managed):
    _exported.pop(ctypes.addressof(managed.contents), None)


@_Destructor
def _drop(capsule):
    """A capsule that nobody consumed: a consumer renames it."""
    if _is_valid(capsule, _NAME):
        _exported.pop(_pointer(capsule, _NAME), None)


def capsule(owner, pointer, shape, dtype, device):
    """A DLPack capsule of a contiguous array; `owner` lives until its consumer lets go."""
    code = _CODES[dtype.kind]
    sizes = (ctypes.c_int64 * max(len(shape), 1))(*shape)
    managed = _DLManagedTensor()
    managed.dl_tensor = _DLTensor(
        pointer, *device, len(shape), code, 8 * dtype.itemsize, 1, sizes, None, 0
    )
    managed.deleter = _delete
    _exported[ctypes.addressof(managed)] = managed, sizes, owner
    return _new(ctypes.addressof(managed), _NAME, _drop)


@functools.lru_cache(maxsize=1024)
def contiguous_strides(shape, itemsize):
    """Strides in bytes of a C-contiguous array."""
    strides = []
    for size in reversed(shape):
        strides.append(itemsize)
        itemsize *= size
    return tuple(reversed(strides))


class Array:
    """A contiguous array in device memory, on the stream it was made on.

    What the functions return for arrays whose library offers no way to make one. Any library that
    reads DLPack or the CUDA array interface takes it without a copy.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
    device : int
    pointer : int
        Address of the first element.
    """

    def __init__(self, shape, dtype, device, stream):
        self.shape, self.dtype, self.device = tuple(shape), np.dtype(dtype), device
        self.strides = contiguous_strides(self.shape, self.dtype.itemsize)
        self.stream = stream
        self._buffer = stream.allocate(max(math.prod(self.shape) * self.dtype.itemsize, 1))
        self.pointer = int(self._buffer.handle)

    def reshape(self, shape):
        """The same memory in another shape."""
        view = copy.copy(self)
        view.shape = tuple(shape)
        view.strides = contiguous_strides(view.shape, view.dtype.itemsize)
        return view

    @property
    def ndim(self):
        """Number of dimensions."""
        return len(self.shape)

    @property
    def __cuda_array_interface__(self):
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,  # of bfloat16 <V2
            "data": (self.pointer, False),
            "strides": None,
            "stream": self.stream.handle or 1,  # 0 is not allowed there: 1 is the default stream
            "version": 3,
        }

    def __dlpack_device__(self):
        return _CUDA, self.device

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError("only shared as it is, on its own device")
        if stream != -1:
            self.stream.release_to(1 if stream is None else stream)
        return capsule(self, self.pointer, self.shape, self.dtype, self.__dlpack_device__())

    def __repr__(self):
        return f"<numbakern device array, shape {self.shape}, {self.dtype}, device {self.device}>"
